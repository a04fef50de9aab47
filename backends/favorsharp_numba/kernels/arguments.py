"""The arguments of kernels: arrays by address, the sizes of a problem, and the packed constants of a feature map.

The host fills these named tuples (`favorsharp_numba.host.arguments` and `.problem`). Two units of memory occur:
*addresses* count bytes, and *places* count items of the dtype that the kernel computes in (`vectors/blocks.py`).
"""

from typing import NamedTuple

from favorsharp_numba.vectors.compiling import inlined
from favorsharp_numba.vectors.items import byte_at, integer_at

TILE = 64
"""The number of points that a kernel works on at once."""
GROUP = 16
"""The number of keys of a causal tile that are scored at once; a later group is seen by fewer queries."""
ROWS = 6
"""The number of queries of a causal tile that read values together, although each sees one key more than the one
before: the rows of a register tile."""

HEADER = 9
ALPHA, OFFSET, BETA, ONE, ZERO, NEAR_ALPHA, NEAR_HALF, NEAR_HALF_SCALED, NEAR_SCALE = range(HEADER)
"""The scalars at the beginning of packed constants. ALPHA is the square root of the scale; OFFSET and BETA are the
constant of the log factor and its coefficient of -|z|^2; ONE and ZERO are 1 and 0. For exact scores, NEAR_ALPHA is
log2(e) ALPHA, NEAR_SCALE is log2(e), and NEAR_HALF and NEAR_HALF_SCALED are the coefficients of |y|^2 of points y, and
of points that have been multiplied by log2(e)."""


class Points(NamedTuple):
    """An array of points (*b, n, size).

    The kind of its items (`vectors/arrays.py`), the address of its first item, the address of the list of offsets of
    the batch entries, the strides of points and of coordinates, and the size of an item. Offsets, strides and the size
    are in bytes.
    """

    kind: int
    base: int
    offsets: int
    row: int
    column: int
    item: int


class Mask(NamedTuple):
    """A boolean array (*b, n): its address, the address of the offsets of its batch entries, and its stride, in bytes.

    `offsets` is 0 if there is no mask.
    """

    base: int
    offsets: int
    step: int


NO_MASK = Mask(0, 0, 0)


class Sizes(NamedTuple):
    """The sizes of a problem, and where in the packed constants of a side (queries or keys) the arrays are.

    `d_pad`, `m_pad` and `e_pad` are d, m and e rounded up to whole vectors. Rows of features are `feature_step` items
    apart, a vector more than m_pad, so that the items of a column are not mapped to the same cache lines.

    The log features of a point x are z A^T + column + f with z = alpha x - center and
    f = offset + linear.z - beta |z|^2 - |dense z|^2; `rows` holds A row by row, and `panels` its transpose in panels.
    Exact scores are (alpha x - near_center).(alpha y - near_center), minus half of both squared norms if `gaussian` is
    1. `near_scaled` and `near_shift` are log2(e) times near_center and times center - near_center.
    """

    d: int
    d_pad: int
    m: int
    m_pad: int
    e: int
    e_pad: int
    feature_step: int
    center: int
    linear: int
    near_center: int
    near_scaled: int
    near_shift: int
    column: int
    rows: int
    panels: int
    dense: int
    dense_back: int
    has_dense: int
    gaussian: int
    total: int


class Problem(NamedTuple):
    """The numbers and places that all forward kernels take.

    `query_side` and `key_side` are the places of the packed constants of all maps; the number of the map of a key head
    is in the list at the address `map_of`. q and out are indexed by query head; k, v and mask by key head. The query
    heads of key head b are members[member_starts[b]] .. members[member_starts[b + 1]], and `key_head_of` lists the key
    head of every query head; these three are addresses of lists.

    The sums of a key head take `sums_size` items from the place `sums` on: kv (`kv_size` items), z and top (m_pad items
    each). They are those of a `State`, but to base 2. If `lows` is not 0, it is the place of the low parts of kv and z,
    kv_size + m_pad items for each key head, which a state keeps. If `stats` is not 0, it is the place of two items for
    each query, 1 / total and the reference, which a backward pass needs.
    """

    num_keys: int
    num_queries: int
    first_query: int
    window: int
    causal: int
    transposed: int
    segments: int
    query_side: int
    key_side: int
    map_of: int
    members: int
    member_starts: int
    key_head_of: int
    sums: int
    sums_size: int
    kv_size: int
    stats: int
    lows: int


@inlined
def query_side(s, p, head):
    """The place of the packed constants with which queries read a key head."""
    return p.query_side + integer_at(p.map_of + 8 * head) * s.total


@inlined
def key_side(s, p, head):
    """The place of the packed constants of the keys of a key head."""
    return p.key_side + integer_at(p.map_of + 8 * head) * s.total


@inlined
def place_of(points, b, position):
    """The place of a point of a batch entry, in an array of the dtype that the kernel computes in."""
    return (points.base + integer_at(points.offsets + 8 * b) + position * points.row) // points.item


@inlined
def is_hidden(mask, b, position):
    """Whether a mask hides a position of a batch entry."""
    if mask.offsets == 0:
        return False
    return byte_at(mask.base + integer_at(mask.offsets + 8 * b) + position * mask.step) == 0
