"""`Parameters`: the result of a fit, from which feature maps are made; and the coordinates that it defines.

Formulas use scaled coordinates: x is sqrt(scale) times the caller's queries, and y is sqrt(scale) times the keys.
"""

import math
from dataclasses import dataclass
from typing import Any

from favorsharp._algebra import apply, row_sum
from favorsharp._arrays import cast, compute_dtype, dtype_name, namespace_of
from favorsharp._checks import check_broadcast, check_floats, check_points, check_same_size
from favorsharp._typing import Array, Elementwise
from favorsharp.exact import log_gaussian, log_softmax_kernel


@dataclass(frozen=True, eq=False, repr=False)
class Parameters:
    """The parameters of a feature map, without its random rows.

    A dense-exponential feature is exp(sum_l a_l w_l^2 + sqrt(1 - 4 a_l) w_l u_l + (1/4) log(1 - 4 a_l) - |u|^2 / 2).
    Here u is g1 (x - center_x) for queries and g2 (y - center_y) for keys, with g1^T g2 = I (arXiv 2302.00787, theorem
    4.1).

    Attributes
    ----------
    method : str or callable
    kernel : {"softmax", "gaussian"}
    scale : float
        The scale of the kernel. The arrays below refer to points multiplied by its square root.
    a : array, shape (*b, 1, d)
        At most 0. With 0, the exponent has no quadratic term in w.
    g1, g2 : array, shape (*b, d, d)
        The transforms of queries and of keys.
    center_x, center_y : array, shape (*b, 1, d)
        Subtracted before the transforms; a factor of each point compensates for this exactly.
    rate : array, shape (*b, 1, 1), or None
        The rate of the counts that `poisson` and `geometric` draw.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k = np.random.default_rng(0).standard_normal((2, 64, 4))
    >>> fs.fit(q, k)
    Parameters(method='optimal', kernel='softmax', scale=0.5, d=4, batch=(), dtype='float64')
    """

    method: str | Elementwise
    kernel: str
    scale: float
    a: Array
    g1: Array
    g2: Array
    center_x: Array
    center_y: Array
    rate: Array | None = None

    @property
    def size(self) -> int:
        """The number of coordinates, d."""
        return int(self.g1.shape[-1])

    @property
    def method_name(self) -> str:
        """The name of the method; for a callable, its `__name__`."""
        return self.method if isinstance(self.method, str) else getattr(self.method, "__name__", "callable")

    def __repr__(self) -> str:
        batch = tuple(self.g1.shape[:-2])
        return (
            f"Parameters(method={self.method_name!r}, kernel={self.kernel!r}, scale={self.scale:g}, d={self.size}, "
            f"batch={batch}, dtype={dtype_name(self.g1)!r})"
        )


def check_data(parameters: Parameters, **named: Array) -> Any:
    """Check that arrays fit the parameters they are used with, and return their namespace."""
    if not isinstance(parameters, Parameters):
        raise TypeError(f"parameters must be favorsharp.Parameters, got {type(parameters).__name__}")
    xp = check_floats(**named, parameters=parameters.g1)
    for name, x in named.items():
        check_points(name, x, "(*b, n, d)")
        check_same_size("d", **{name: (-1, x.shape[-1]), "parameters": (-1, parameters.size)})
    batches = {name: x.shape[:-2] for name, x in named.items()}
    check_broadcast("(*b, n, d)", **batches, parameters=parameters.g1.shape[:-2])
    return xp


def embed_query(p: Parameters, x: Array) -> tuple[Array, Array]:
    """Return u = g1 (x - center_x) for unscaled queries, and the log of a factor that depends on x only, (*b, n, 1).

    K(x, y) = exp(u.v + factor_x + factor_y), where `embed_key` returns v and factor_y.
    """
    return _embed(p, x, p.g1, p.center_x, p.center_y)


def embed_key(p: Parameters, y: Array) -> tuple[Array, Array]:
    """Return v = g2 (y - center_y) for unscaled keys, and the log of a factor that depends on y only, (*b, s, 1)."""
    return _embed(p, y, p.g2, p.center_y, p.center_x)


def log_kernel_of(p: Parameters, x: Array, y: Array) -> Array:
    """The exact log kernel that the parameters' features estimate, (*b, n, d), (*b, s, d) -> (*b, n, s)."""
    if p.kernel == "gaussian":
        return cast(log_gaussian(x, y, p.scale), compute_dtype(namespace_of(x, y), x, y))
    root = math.sqrt(p.scale)
    return log_softmax_kernel(x * root, y * root)


def _embed(p: Parameters, x: Array, g: Array, own: Array, other: Array) -> tuple[Array, Array]:
    xp = namespace_of(x)
    z = x * math.sqrt(p.scale) - own
    if p.kernel == "softmax":
        # x.y = (x - c1).(y - c2) + c2.(x - c1) + c1.(y - c2) + c1.c2
        factor = z @ xp.matrix_transpose(other) + 0.5 * row_sum(own * other)
    else:
        # the same identity, with every term of |x - y|^2 in centred coordinates, so that a common offset of queries and
        # keys causes no rounding errors
        gap = other - own
        factor = z @ xp.matrix_transpose(gap) - 0.5 * row_sum(z * z) - 0.25 * row_sum(gap * gap)
    return apply(g, z), factor
