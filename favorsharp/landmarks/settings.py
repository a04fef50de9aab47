"""The settings of landmarks: a value without data, which attention takes in place of a feature map."""

import math
from dataclasses import dataclass
from typing import Any

from favorsharp._checks import check_choice, check_integer, check_scale
from favorsharp.exact import KERNELS, kernel_scale

GAUSSIAN_TILT = 2.0
"""The best tilt for narrow Gaussian kernels: with a smaller one, far points get most of the landmarks."""


@dataclass(frozen=True)
class Landmarks:
    """How to choose landmarks: weighted keys that stand in for all keys of a sequence. `landmarks` makes it.

    Attributes
    ----------
    num_landmarks : int
        m.
    kernel : {"softmax", "gaussian"}
    scale : float or None
        As in `fit`; None stands for the default of the kernel, which may depend on d.
    tilt : float
        How strongly the choice discounts the errors of queries with a large denominator; see `landmarks`.
    steps : int
        Lloyd steps after the seeds.
    room : int
        How many keys beyond m a stream holds before it compresses them.
    seed : int
        The seed of all draws.

    Examples
    --------
    >>> import favorsharp as fs
    >>> fs.landmarks(32)
    Landmarks(num_landmarks=32, kernel='softmax', scale=None, tilt=1.5, steps=3, room=32, seed=0)
    """

    num_landmarks: int
    kernel: str
    scale: float | None
    tilt: float
    steps: int
    room: int
    seed: int

    def scale_of(self, size: int) -> float:
        """The scale of the kernel for points with this number of coordinates."""
        return kernel_scale(self.kernel, self.scale, size)


def landmarks(
    num_landmarks: int = 128,
    *,
    kernel: str = "softmax",
    scale: float | None = None,
    tilt: float = 1.5,
    steps: int = 3,
    room: int | None = None,
    rng: Any = None,
) -> Landmarks:
    """Settings for landmarks: m weighted keys in place of n, chosen for the queries that a head gets.

    Pass the result to attention in place of a feature map. Landmarks are chosen anew in each call, and repeatedly in a
    stream, so nothing has to be calibrated. They are much closer to exact attention than as many random features.
    **They are biased**: the mean over draws is the exact kernel for random features, but not for landmarks.

    Parameters
    ----------
    num_landmarks : int
        m, 1 or more. If it is at least the number of different visible keys, attention is exact.
    kernel : {"softmax", "gaussian"}
        exp(scale x.y), or exp(-scale |x - y|^2 / 2).
    scale : float, optional
        Positive and finite. None means d**-0.5 for softmax and 1 for Gaussian.
    tilt : float
        The choice divides the squared error of a query by its denominator to this power: 0 or more. For attention,
        values from 1 to 2 do equally well. For Gaussian kernels that are narrow compared with the spread of the points,
        take 2.
    steps : int
        Lloyd steps after the seeds, 0 or more; each is a pass over the keys.
    room : int, optional
        How many keys beyond m a stream holds before it compresses them to m: 1 or more; None means m.
    rng : None, int, SeedSequence, BitGenerator or Generator
        None means seed 0, so that the same arguments give the same result. A generator advances by one draw.

    Returns
    -------
    Landmarks

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> from favorsharp.diagnostics import load_sample
    >>> q, k, v = (x.astype("float32") for x in load_sample())
    >>> exact = fs.softmax_attention(q, k, v)
    >>> out = fs.linear_attention(q, k, v, fs.landmarks(128))
    >>> bool(np.linalg.norm(out - exact) < 0.2 * np.linalg.norm(exact))
    True
    >>> np.allclose(fs.linear_attention(q, k, v, fs.landmarks(512)), exact, atol=1e-5)
    True
    """
    m = check_integer("num_landmarks", num_landmarks, 1)
    return Landmarks(
        num_landmarks=m,
        kernel=check_choice("kernel", kernel, KERNELS),
        scale=None if scale is None else check_scale(scale, 1.0),
        tilt=_check_tilt(tilt),
        steps=check_integer("steps", steps, 0),
        room=m if room is None else check_integer("room", room, 1),
        seed=_seed_of(rng),
    )


def _check_tilt(tilt: Any) -> float:
    if isinstance(tilt, bool | str | complex):
        raise TypeError(f"tilt must be a finite number of 0 or more, got {tilt!r}")
    try:
        value = float(tilt)
    except (TypeError, ValueError):
        raise TypeError(f"tilt must be a finite number of 0 or more, got {type(tilt).__name__}") from None
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"tilt must be a finite number of 0 or more, got {value}")
    return value


def _seed_of(rng: Any) -> int:
    """An integer seed taken from rng, so that settings hold plain values only and can be compared."""
    if rng is None:
        return 0
    from favorsharp.draws import generator  # imports NumPy

    drawn = generator(rng)  # checks it
    return int(rng) if not hasattr(rng, "spawn") and hasattr(rng, "__index__") else int(drawn.integers(1 << 62))
