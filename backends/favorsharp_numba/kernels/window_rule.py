"""The window rule: which blocks of keys a query scores exactly, and which it reads by features.

Positions are cut into blocks of `window` positions from the start of the sequence. A query scores the keys of its own
block and of the neighbouring blocks exactly; for causal attention, the keys up to its own of its own block and of the
block before. It reads all other keys by their features (docs/design/window-blocks.md). Every kernel with a window takes
the rule from here. Blocks are given by their numbers, which may lie outside of the sequence.
"""

from favorsharp_numba.vectors.compiling import inlined

NEIGHBOURS = 1
"""The number of neighbouring blocks, on each side, whose keys are scored exactly."""


@inlined
def first_near(block):
    """The first block whose keys the queries of a block score exactly."""
    return block - NEIGHBOURS


@inlined
def behind_near(block):
    """The block behind the last one whose keys the queries of a block score exactly, if attention is not causal."""
    return block + NEIGHBOURS + 1


@inlined
def first_reader(block, causal):
    """The first block whose queries score the keys of a block exactly."""
    return block if causal else block - NEIGHBOURS


@inlined
def last_reader(block):
    """The last block whose queries score the keys of a block exactly."""
    return block + NEIGHBOURS


@inlined
def far_before(block):
    """The last of the blocks before a block whose keys its queries read by features."""
    return block - NEIGHBOURS - 1


@inlined
def far_after(block):
    """The first of the blocks after a block whose keys its queries read by features, if attention is not causal."""
    return block + NEIGHBOURS + 1
