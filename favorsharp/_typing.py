"""Type aliases and protocols that all modules share.

The array API has no published protocol that type checkers can use (array-api-typing is a placeholder), so arrays and
namespaces are `Any` here and nowhere else: an alias documents what is meant without pretending to check it.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

Array: TypeAlias = Any
"""An array of any library that implements the array API standard."""

Namespace: TypeAlias = Any
"""The functions of one array library, as the standard names them."""

DType: TypeAlias = Any
"""A dtype object of one array library."""

Elementwise: TypeAlias = Callable[[Array], Array]
"""A caller's own non-negative function of the projected inputs."""


class PositiveMap(Protocol):
    """The methods that attention needs of a feature map: logarithms of non-negative features."""

    @property
    def num_features(self) -> int:
        """The number of features, m."""

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes of the map's own arrays."""

    def log_query(self, x: Array, /) -> Array:
        """Log features of queries, (*b, n, d) -> (*b, n, m)."""

    def log_key(self, y: Array, /) -> Array:
        """Log features of keys, (*b, s, d) -> (*b, s, m)."""

    def log_kernel(self, x: Array, y: Array) -> Array:
        """The exact log kernel, (*b, n, d), (*b, s, d) -> (*b, n, s)."""

    def expanded(self) -> "PositiveMap":
        """The same map with an axis of length 1 before the point axis of its batched arrays."""
