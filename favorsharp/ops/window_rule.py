"""The window rule, for array functions: which blocks of keys a query scores exactly (docs: design, window blocks).

Positions are cut into blocks of `window` positions from the start of the sequence. A query scores the keys of its own
block and of the neighbouring blocks exactly; for causal attention, the keys up to its own of its own block and of the
blocks before. It reads all other keys by their features. The kernels of a backend name the rule once in their language.
"""

NEIGHBOURS = 1
"""The number of neighbouring blocks, on each side, whose keys are scored exactly."""
RECENT_BLOCKS = NEIGHBOURS + 1
"""The number of blocks up to the current one that a stream keeps, because later queries score their keys exactly."""


def num_leaving(length: int, window: int) -> int:
    """The number of leading positions that are not in the last blocks, which a stream keeps."""
    return max(0, -(-length // window) - RECENT_BLOCKS) * window


def near_blocks(*, causal: bool) -> range:
    """The blocks of keys that a query scores exactly, counted from its own block."""
    return range(-NEIGHBOURS, 1 if causal else NEIGHBOURS + 1)
