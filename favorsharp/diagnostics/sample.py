"""Real heads that ship with the library: the public function `load_sample`."""

from typing import Any

from favorsharp._checks import check_integer


def load_sample(length: int | None = None) -> tuple[Any, Any, Any]:
    """Queries, keys and values of six heads of a sentence encoder on 512 tokens of English.

    Parameters
    ----------
    length : int, optional
        The number of tokens. The first 512 are the recorded ones. Each further token is drawn, head by head, from the
        normal distribution of a recorded token and the eight tokens with the nearest keys; the recorded tokens take
        turns. Means and covariances of a head stay about the same. None means 512.

    Returns
    -------
    tuple of numpy.ndarray
        q, k and v, each of shape (6, length, 32), in float16, as recorded; data/PROVENANCE.md says where they come
        from.

    Raises
    ------
    TypeError, ValueError
        If length is not a positive integer.

    Examples
    --------
    >>> from favorsharp.diagnostics import load_sample
    >>> [x.shape for x in load_sample()]
    [(6, 512, 32), (6, 512, 32), (6, 512, 32)]
    >>> load_sample(8192)[0].shape
    (6, 8192, 32)
    """
    from importlib.resources import as_file, files  # imported here, to keep the import of this module fast

    import numpy as np

    with as_file(files("favorsharp") / "data" / "attention_sample.npz") as path, np.load(path) as archive:
        q, k, v = archive["q"], archive["k"], archive["v"]
    recorded = k.shape[-2]
    length = recorded if length is None else check_integer("length", length, 1)
    if length > recorded:
        more = _resampled(np.concatenate([q, k, v], axis=-1), k, length - recorded)
        parts = np.split(more, [q.shape[-1], q.shape[-1] + k.shape[-1]], axis=-1)
        q, k, v = (np.concatenate([x, part], axis=-2) for x, part in zip((q, k, v), parts, strict=True))
    return q[:, :length], k[:, :length], v[:, :length]


def _resampled(tokens: Any, keys: Any, count: int, neighbours: int = 8) -> Any:
    """Tokens (heads, count, width), drawn near given ones (heads, n, width); keys (heads, n, d) say what is near."""
    import numpy as np

    rng = np.random.default_rng(0)
    chosen = np.arange(count) % tokens.shape[1]
    drawn = np.empty((tokens.shape[0], count, tokens.shape[2]), tokens.dtype)
    for head, (x, y) in enumerate(zip(tokens.astype(np.float32), keys.astype(np.float32), strict=True)):
        squares = (y * y).sum(-1)
        distances = squares[:, None] + squares - 2 * y @ y.T
        near = np.argpartition(distances, neighbours, axis=-1)[:, : neighbours + 1]  # itself among them
        means = x[near].mean(axis=1)
        weights = rng.standard_normal((count, neighbours + 1), np.float32) / (neighbours + 1) ** 0.5
        spread = x[near] - means[:, None]
        drawn[head] = means[chosen] + np.einsum("tj,tjd->td", weights, spread[chosen])
    return drawn
