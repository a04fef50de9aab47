"""Draws random rows w, each distributed as N(0, I), on the host in float64; `feature_map` calls `draw_rows`.

The rows of one draw may depend on each other: that keeps every estimate unbiased and lowers its variance. The same seed
gives the same draw for every array library and device; the caller casts and moves it. All random rows are drawn here.
"""

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from favorsharp._checks import check_choice

Rows: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


def draw_rows(draw: str, num_rows: int, size: int, rng: Any = None) -> Rows:
    """Draw num_rows rows of the given size.

    Parameters
    ----------
    draw : {"iid", "orthogonal", "simplex", "sobol", "antithetic"}
    num_rows, size : int
        Rows m and coordinates d.
    rng : None, int, SeedSequence, BitGenerator or Generator
        As `numpy.random.default_rng` takes it (SPEC 7). An int or a SeedSequence gives the same rows each time, None
        gives new rows each time, and a generator advances.

    Returns
    -------
    numpy.ndarray, shape (m, d), float64
    """
    check_choice("draw", draw, DRAWS, also=", an (m, d) array of rows, or a pair (rows, log_weight)")
    return DRAWS[draw](num_rows, size, generator(rng))


def generator(rng: Any) -> np.random.Generator:
    """Turn rng into a Generator."""
    kinds = (int, np.integer, np.random.SeedSequence, np.random.BitGenerator, np.random.Generator)
    if isinstance(rng, bool) or not (rng is None or isinstance(rng, kinds)):
        raise TypeError(f"rng must be None, an int, a SeedSequence or a numpy Generator, got {type(rng).__name__}")
    if isinstance(rng, int | np.integer) and rng < 0:
        raise ValueError(f"rng must be a non-negative int, got {rng}")
    return np.random.default_rng(rng)


def iid(num_rows: int, size: int, rng: np.random.Generator) -> Rows:
    """Independent rows."""
    return rng.standard_normal((num_rows, size))


_WHOLE = 256
"""Up to this size whole orthogonal matrices are drawn for any number of rows, as in version 0.1.0."""


def orthogonal(num_rows: int, size: int, rng: np.random.Generator) -> Rows:
    """Blocks of d mutually orthogonal rows, with Haar directions and independent chi_d lengths (arXiv 2009.14794)."""
    if num_rows >= size or size <= _WHOLE:
        return _blocks(np.eye(size), num_rows, size, rng)
    # the first columns of a Haar matrix can be drawn without the others
    directions, lengths = _haar(1, size, rng, num_rows)[0].T, np.sqrt(rng.chisquare(size, num_rows))
    rows: Rows = lengths[:, None] * directions
    return rows


def simplex(num_rows: int, size: int, rng: np.random.Generator) -> Rows:
    """Blocks of d rows towards the corners of a randomly rotated simplex, with chi_d lengths (arXiv 2301.13856)."""
    return _blocks(_simplex_corners(size), num_rows, size, rng)


def sobol(num_rows: int, size: int, rng: np.random.Generator) -> Rows:
    """A scrambled Sobol sequence, mapped to normal rows by the normal quantile function; needs SciPy."""
    try:
        from scipy.special import ndtri
        from scipy.stats import qmc
    except ImportError as error:
        raise ImportError("draw='sobol' needs SciPy: pip install 'favorsharp[sobol]'") from error
    # the sequence is balanced at powers of two; a draw of another length is the leading part of a longer one
    bits = 30
    sequence = qmc.Sobol(size, scramble=True, bits=bits, rng=rng)
    points = sequence.random_base2(math.ceil(math.log2(max(num_rows, 1))))[:num_rows]
    # the points lie on a grid that contains 0, whose quantile is infinite: move them to the middle of each cell
    rows: Rows = ndtri(points + 0.5 ** (bits + 1))
    return rows


def antithetic(num_rows: int, size: int, rng: np.random.Generator) -> Rows:
    """Orthogonal rows followed by their negatives."""
    half = orthogonal(-(-num_rows // 2), size, rng)
    return np.concatenate([half, -half])[:num_rows]


DRAWS: MappingProxyType[str, Callable[[int, int, np.random.Generator], Rows]] = MappingProxyType(
    {"iid": iid, "orthogonal": orthogonal, "simplex": simplex, "sobol": sobol, "antithetic": antithetic}
)


def discrete_rows(method: str, rows: Rows, rate: Rows) -> tuple[Rows, Rows]:
    """Counts at the quantiles Phi(rows), and their log densities; so every Gaussian draw gives a discrete one.

    Parameters
    ----------
    method : {"poisson", "geometric"}
    rows : numpy.ndarray, shape (m, d)
        Gaussian rows.
    rate : numpy.ndarray, shape (*b, 1, 1)
        lambda of the Poisson distribution, or the success probability p of the geometric one.

    Returns
    -------
    counts : numpy.ndarray, shape (*b, m, d)
    log_density : numpy.ndarray, shape (*b, m)
        Logarithm of the factor of a feature that depends only on its counts.
    """
    quantiles, log_density = _DISCRETE[method]
    rate = rate.astype(np.float64)
    counts = quantiles(_normal_cdf(rows.astype(np.float64)), rate)
    return counts, log_density(counts, rate).sum(axis=-1)


def _blocks(directions: Rows, num_rows: int, size: int, rng: np.random.Generator) -> Rows:
    """Blocks of d unit directions: each block is rotated by its own Haar matrix, each row is given a chi_d length."""
    num_blocks = -(-num_rows // size)
    rows: Rows = directions @ _haar(num_blocks, size, rng)
    lengths = np.linalg.norm(rng.standard_normal((num_blocks, size, size)), axis=-1, keepdims=True)
    rows = (lengths * rows).reshape(-1, size)
    return rows[:num_rows]


def _haar(num_blocks: int, size: int, rng: np.random.Generator, columns: int | None = None) -> Rows:
    """Orthogonal matrices, or their first columns, uniformly distributed (Mezzadri, arXiv math-ph/0609050)."""
    q, r = np.linalg.qr(rng.standard_normal((num_blocks, size, size if columns is None else columns)))
    # Without the signs, LAPACK's Q favours some directions, and positive features would estimate 0.7 to 1.3 times the
    # kernel, depending on the direction of x + y.
    signs = np.where(np.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
    turned: Rows = q * signs[:, None, :]
    return turned


def _simplex_corners(size: int) -> Rows:
    """Unit vectors, d in d dimensions with equal angles between them (arXiv 2301.13856, eq. 5)."""
    if size == 1:
        return np.ones((1, 1))
    ones = np.append(np.ones(size - 1), 0.0)
    corners: Rows = math.sqrt(size / (size - 1)) * np.eye(size) - (math.sqrt(size) + 1) / (size - 1) ** 1.5 * ones
    corners[-1] = ones / math.sqrt(size - 1)
    return corners


def _normal_cdf(w: Rows) -> Rows:
    """Phi(w), kept below 1 so that every quantile is finite."""
    levels: Rows = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in w.ravel().tolist()]).reshape(w.shape)
    return np.minimum(levels, 1 - 2.0**-53)


def _poisson_quantiles(levels: Rows, rate: Rows) -> Rows:
    """The counts k with P(K < k) <= level < P(K <= k)."""
    counts = np.zeros(np.broadcast_shapes(levels.shape, rate.shape))
    log_density = -rate  # logarithms, because the density underflows at a rate of 800
    below = np.exp(log_density) + 0 * counts
    count = 0
    while np.any(more := (below <= levels) & ((count < rate) | (log_density > -60))):
        count += 1
        counts[more] = count
        log_density = log_density + np.log(rate / count)
        below = below + np.exp(log_density)
    return counts


def _poisson_log_density(counts: Rows, rate: Rows) -> Rows:
    """Log of the factor of one coordinate: lambda / 2 - (w / 2) log lambda."""
    return 0.5 * rate - 0.5 * counts * np.log(rate)


def _geometric_quantiles(levels: Rows, rate: Rows) -> Rows:
    """The counts k >= 0 of P(k) = p (1 - p)^k."""
    counts: Rows = np.floor(np.log1p(-levels) / np.log1p(-rate))
    return counts


def _geometric_log_density(counts: Rows, rate: Rows) -> Rows:
    """Log of the factor of one coordinate: -(1/2) log p - (w / 2) log(1 - p) - (1/2) log w!."""
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, int(counts.max(initial=0)) + 1)))])
    log_density: Rows = -0.5 * np.log(rate) - 0.5 * counts * np.log1p(-rate) - 0.5 * factorials[counts.astype(int)]
    return log_density


_DISCRETE = MappingProxyType(
    {
        "poisson": (_poisson_quantiles, _poisson_log_density),
        "geometric": (_geometric_quantiles, _geometric_log_density),
    }
)
