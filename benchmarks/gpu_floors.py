"""The least time of attention by random features on a GPU: bytes, products and exponentials of one token of a head.

Sources of the rates: an H100 copies at 3.0 TB/s (3.35 on paper). Charts of mma.sync kernels for softmax attention show
324 to 370 TFLOP/s on it, taken as 300. Each of its 132 multiprocessors computes 16 exponentials and 128 float32
multiply-adds a clock, at 1.75 GHz.
"""

from dataclasses import dataclass

BYTES_A_SECOND = 3.0e12
FLOPS_A_SECOND = 300e12
EXPONENTIALS_A_SECOND = 3.7e12
PLAIN_FLOPS_A_SECOND = 59e12
SPLIT = 3  # products of bfloat16 parts that replace one of float32

CHUNK = 64
"""Number of tokens that see each other pair by pair in causal mode."""


@dataclass(frozen=True)
class Work:
    """The work of one token of one head.

    Attributes
    ----------
    is_causal, backward : bool
        Which pass is computed; `backward` means the backward pass alone.
    d, m, e : int
        Sizes of points, features and values.
    itemsize : int
        Bytes of a number in memory: 2 or 4.
    """

    d: int
    m: int
    e: int
    is_causal: bool = False
    backward: bool = False
    itemsize: int = 2

    @property
    def bytes(self) -> int:
        """Queries, keys, values and output are read or written once; in the backward pass, so are their gradients."""
        once = 2 * (self.d + self.e) * self.itemsize
        return 2 * once if self.backward else once

    @property
    def planned_bytes(self) -> int:
        """The bytes of our kernels: in causal mode, keys and values are read again for the states of segments."""
        again = (self.d + self.e) * self.itemsize if self.is_causal else 0
        return self.bytes + (3 * again if self.backward else again)

    @property
    def planned_flops(self) -> int:
        """The multiplications and additions in the matrix products of our kernels."""
        d, m, e = self.d, self.m, self.e
        if not self.is_causal:
            forward = 4 * m * (d + e)
            return 2 * forward if self.backward else forward
        if self.backward:
            return 13 * m * (d + e) + 6 * CHUNK * (m + e)
        return 6 * m * (d + e) + 2 * CHUNK * (m + e)

    @property
    def exponentials(self) -> int:
        """One for each feature; in causal mode, two for each key feature."""
        return (3 if self.is_causal else 2) * self.m * (2 if self.backward else 1)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that each resource needs for a token of a head."""
        products = SPLIT if self.itemsize == 4 else 1
        return {
            "bytes": self.planned_bytes / BYTES_A_SECOND,
            "products": products * self.planned_flops / FLOPS_A_SECOND,
            "exponentials": self.exponentials / EXPONENTIALS_A_SECOND,
        }

    @property
    def floor(self) -> float:
        """Seconds for a token of a head, if all three resources work at once: those of the slowest."""
        return max(self.seconds.values())


@dataclass(frozen=True)
class TokenWork:
    """The work of one token of one head, whose state is in float32.

    Attributes
    ----------
    d, m, e : int
        Sizes of points, features and values.
    recent : int or None
        Keys that a window keeps before the token, none of which leaves. None means no window.
    itemsize : int
        Bytes of a number of points and values in memory.
    """

    d: int
    m: int
    e: int
    recent: int | None = None
    itemsize: int = 2

    @property
    def bytes(self) -> int:
        """The sums are read, and written if there is no window; recent keys and values are read and written."""
        sums, pair = 4 * self.m * (self.e + 2), (self.d + self.e) * self.itemsize
        if self.recent is None:
            return 2 * sums + 2 * pair
        return sums + 2 * pair + (2 * self.recent + 1) * pair

    @property
    def flops(self) -> int:
        """Multiplications and additions for features, for changed sums, for reading the sums, and for exact scores."""
        features = 2 * self.m * self.d
        if self.recent is None:
            return 2 * features + 5 * self.m * self.e
        return features + 2 * self.m * self.e + 2 * (self.recent + 1) * (self.d + self.e)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that each resource needs for a token of a head."""
        return {"bytes": self.bytes / BYTES_A_SECOND, "products": self.flops / PLAIN_FLOPS_A_SECOND}

    @property
    def floor(self) -> float:
        """Seconds for a token of a head, without the launch: those of the slower resource."""
        return max(self.seconds.values())
