"""The error that landmarks are expected to make, computed from the choice of landmarks alone."""

from favorsharp._arrays import compute_dtype, on_device_of, under_own_settings
from favorsharp._autodiff import without_gradient
from favorsharp._checks import (
    check_broadcast,
    check_flag,
    check_floats,
    check_group,
    check_mask,
    check_points,
    check_same_size,
)
from favorsharp._heads import split_heads
from favorsharp._nonfinite import hide
from favorsharp._typing import Array
from favorsharp.landmarks.settings import Landmarks
from favorsharp.landmarks.state import landmark_map, log_weights, moments_of
from favorsharp.ops.landmark_metric import centred
from favorsharp.ops.landmarks import gather, nearness
from favorsharp.ops.partials import finish
from favorsharp.ops.tiles import tiles_of


@under_own_settings
def expected_error(
    q: Array, k: Array, /, settings: Landmarks, *, key_mask: Array | None = None, enable_gqa: bool = False
) -> Array:
    """The relative error of the kernels of keys that is to be expected when landmarks replace the keys.

    Queries are modelled as in the metric of landmarks (docs: theory, landmarks). If the landmark of a key is at the
    distance D, it leaves the share 1 - exp(-D^2) of the key's squared kernel unexplained. The result is the root of the
    mean of these shares, weighted by the squared kernels. It costs as much as the choice of landmarks, and needs no
    values. Use it to compare heads and numbers of landmarks. The error of the output also depends on the values, and
    was 0.2 to 2 times this number on the heads of the attention sample. Where queries form sharp clusters, which no
    normal distribution describes, it was up to 15 times this number; so `suggest` measures the error instead.

    Parameters
    ----------
    q : array, shape (*b, n, d)
    k : array, shape (*b, s, d)
    settings : Landmarks
    key_mask : array of bool, shape (*b, s), optional
        True where a key is visible.
    enable_gqa : bool
        q has g times the heads of k; the result has the heads of k.

    Returns
    -------
    array, shape (*b,)
        0 to 1; 0 where every key is its own landmark. In the dtype that q and k promote to, float32 at least.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Examples
    --------
    >>> import favorsharp as fs
    >>> from favorsharp.diagnostics import expected_error, load_sample
    >>> q, k, v = (x.astype("float32") for x in load_sample())
    >>> [round(float(expected_error(q, k, fs.landmarks(m)).mean()), 1) for m in (8, 128, 512)]
    [0.4, 0.1, 0.0]
    """
    xp = check_floats(q=q, k=k)
    check_points("q", q, "(*b, n, d)")
    check_points("k", k, "(*b, s, d)")
    check_same_size("d", q=(-1, q.shape[-1]), k=(-1, k.shape[-1]))
    check_mask("key_mask", key_mask, "(*b, s)", k=k)
    group = check_group(check_flag("enable_gqa", enable_gqa), q, k)
    heads = (*q.shape[:-3], k.shape[-3]) if group > 1 else q.shape[:-2]
    batch = check_broadcast("*b", q=heads, k=k.shape[:-2], key_mask=() if key_mask is None else key_mask.shape[:-1])
    q, k = without_gradient(q), without_gradient(k)
    weights = log_weights(k, key_mask, compute_dtype(xp, q, k))
    if k.shape[-2] <= settings.num_landmarks:
        return xp.zeros(batch, dtype=weights.dtype, **on_device_of(k))
    visible = weights != -xp.inf
    k = hide(k, visible)
    seen = moments_of(split_heads(group, q), k, key_mask, grouped=group > 1)
    chosen = landmark_map(k, weights, seen, settings)
    total = None
    for start, stop in tiles_of(k.shape[-2], chosen.num_features, batch):
        y, mass = centred(k[..., start:stop, :], None, chosen.metric, chosen.kernel, chosen.scale)
        scores, own = nearness(chosen.points, chosen.used, chosen.metric, y)
        u, log_norm = chosen.metric.coordinates(y)
        closest = xp.max(xp.where(own, scores, -xp.inf), axis=-1, keepdims=True)
        squares = xp.sum(u * u, axis=-1, keepdims=True) - 2 * closest
        share = -xp.expm1(-xp.maximum(squares, xp.zeros_like(squares)))
        logs = xp.where(visible[..., start:stop, None], 2 * (log_norm + mass), -xp.inf)
        total = gather(logs, share, total)
    assert total is not None  # there is at least one key
    return xp.broadcast_to(xp.sqrt(finish(total)[..., 0, 0]), batch)
