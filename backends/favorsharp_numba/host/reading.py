"""The constants with which queries read weighted keys: scalars, and zeros."""

from functools import lru_cache
from typing import Any

import numpy as np

from favorsharp_numba.host.arguments import LOG2E
from favorsharp_numba.kernels.arguments import ALPHA, HEADER, NEAR_ALPHA, NEAR_SCALE, ONE
from favorsharp_numba.vectors.emitter import BYTES


def reading_places(lanes: int, d_pad: int, e_pad: int) -> tuple[int, int]:
    """Where the zeros begin, and the number of constants."""
    zeros = -(-HEADER // lanes) * lanes
    return zeros, zeros + max(d_pad, e_pad)


@lru_cache(maxsize=64)
def reading_constants(d_pad: int, e_pad: int, scale: float, dtype: str) -> Any:
    """The constants, read-only."""
    constants = np.zeros(reading_places(BYTES // np.dtype(dtype).itemsize, d_pad, e_pad)[1], dtype)
    constants[ALPHA], constants[NEAR_ALPHA] = scale**0.5, LOG2E * scale**0.5
    constants[ONE], constants[NEAR_SCALE] = 1, LOG2E
    constants.flags.writeable = False
    return constants
