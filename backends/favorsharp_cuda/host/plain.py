"""Launches the kernels of plain arithmetic (kernels/plain.cu) and the kernel of single tokens (kernels/decode.cu).

The modules of the ops call it where the tensor-core kernels do not serve: for float64, for points or values of more
than 128 entries, for calls that do not fit into shared memory, and for few points.
"""

import math
from typing import Any

from favorsharp.backend import broadcast_shapes
from favorsharp_cuda.host import arrays
from favorsharp_cuda.host.declarations import DECODE_THREADS, PLAIN_THREADS, Plain
from favorsharp_cuda.host.launch import run, shared_room
from favorsharp_cuda.host.maps import plain_map
from favorsharp_cuda.host.problem import Lows, Problem, Sums, key_batch_of, new_lows, new_sums
from favorsharp_cuda.host.repeats import repeated
from favorsharp_cuda.host.source import DECODED_HEADS, expression

PROCESSORS = 132
"""Multiprocessors of an H100. The values of a token are cut into parts until there are about as many blocks, but not
further, because every part computes all features again."""
QUERIES_A_BLOCK = 16
"""Queries of one head that a block of `plain_attention` processes when queries only read sums."""


def attend(
    batch: tuple[int, ...],
    feature_map: Any,
    dtype: str,
    *,
    like: Any,
    e: int,
    q: Any = None,
    k: Any = None,
    v: Any = None,
    mask: Any = None,
    out: Any = None,
    sums: Sums | None = None,
    low: Lows = (None, None),
    new: Sums | None = None,
    partial: Any = None,
    stats: Any = None,
    flags: int = 0,
    pieces: int = 1,
    **numbers: int,
) -> Lows:
    """Launch `plain_attention` once, with `pieces` blocks for each head; return the low parts of the new sums.

    `numbers` are further fields of the structure.
    """
    d, m = feature_map.parameters.g1.shape[-1], feature_map.num_features
    shared = shared_of(like, dtype, d=d, e=e, m=m)
    given = {"q": q, "k": k, "v": v, "mask": mask, "out": out, "partial_sums": partial, "stats": stats}
    problem = _problem(Problem(batch), feature_map, dtype, e, given, sums, new)
    new_low = (None, None) if new is None else new_lows(new)
    problem.sums("in", None, low)
    problem.sums("out", None, new_low)
    problem.set(
        normalised=1, segments=pieces, flags=flags, num_queries=0 if q is None else q.shape[-2],
        num_keys=0 if k is None else k.shape[-2],
    )  # fmt: skip
    problem.set(**numbers)
    run(expression("plain_attention", dtype), like, problem.heads * pieces, PLAIN_THREADS, problem.values, shared)
    return new_low


def _problem(
    problem: Problem,
    feature_map: Any,
    dtype: str,
    e: int,
    given: dict[str, Any],
    sums: Sums | None,
    new: Sums | None,
) -> Problem:
    """The problem, with the map's constants, the sizes, and the arrays that are not None."""
    packed = plain_map(feature_map, arrays.WIDER[dtype])
    problem.number("map_axis", tuple(feature_map.batch_shape))
    problem.side("query", header=problem.hold(packed.query))
    problem.side("key", header=problem.hold(packed.key))
    problem.set(
        m=feature_map.num_features, d=feature_map.parameters.g1.shape[-1], e=e, has_dense=packed.has_dense,
        map_rows=packed.size, gaussian=feature_map.parameters.kernel == "gaussian",
    )  # fmt: skip
    for name, x in given.items():
        if x is not None:
            problem.array(name, x, trailing=1 if name == "mask" else 2)
    problem.sums("in", sums)
    problem.sums("out", new)
    return problem


def shared_of(like: Any, dtype: str, *, d: int, e: int, m: int) -> int:
    """Bytes of shared memory that a block of `plain_attention` needs; raises if the device has less."""
    item = arrays.computed_item(dtype)
    others = d + e + PLAIN_THREADS // 32 + PLAIN_THREADS
    needed = item * (3 * m + others)
    device = arrays.device_number(like)
    if needed > (room := shared_room(device)):
        most = (room // item - others) // 3
        served = [f"m of at most {most} beside these d and e"] if most > 0 else ["smaller d and e"]
        served += ["float32"] if item == 8 else []
        raise ValueError(
            f"{dtype} of d={d} and e={e} with m={m} features needs {needed} bytes of shared memory for a block, and "
            f"device {device} has {room}; accepted there: {', or '.join(served)}"
        )
    return needed


def attention(
    q: Any,
    k: Any,
    v: Any,
    feature_map: Any,
    key_mask: Any,
    window: int,
    *,
    normalised: bool = True,
    stats: Any = None,
    out: Any = None,
) -> Any:
    """Bidirectional attention, or the product with the kernel matrix if it is not normalised.

    The result is in `out` if a kernel can write to it. 1 / total and the reference of every query are written to
    `stats` (*b, n, 2), in the dtype that is computed in, for a backward pass.
    """
    dtype, e, m = arrays.name_of(q), v.shape[-1], feature_map.num_features
    keys = key_batch_of(feature_map, k, v, key_mask)
    batch = broadcast_shapes(tuple(q.shape[:-2]), keys)
    out = arrays.target(out, (q, k, v, key_mask), (*batch, q.shape[-2], e), dtype)
    wide = arrays.WIDER[dtype]
    given = {"like": q, "e": e, "k": k, "v": v, "mask": key_mask}
    if window and k.shape[-2]:
        partial = arrays.empty(q, (*batch, q.shape[-2], e + 2), wide)
        both = {"q": q, "out": out, "new": new_sums(q, batch, m, e, wide), "partial": partial, "window": window}
        there, back = Plain.ENTER | Plain.NEAR | Plain.STORE_PARTIAL, Plain.ENTER | Plain.LOAD_PARTIAL
        attend(batch, feature_map, dtype, flags=there, **given, **both)
        attend(batch, feature_map, dtype, flags=back, reverse=1, stats=stats, **given, **both)
        return out
    sums = new_sums(q, keys, m, e, wide)
    attend(keys, feature_map, dtype, flags=Plain.ENTER, new=sums, limit=k.shape[-2], **given)
    read(out, q, feature_map, sums, normalised=normalised, stats=stats)
    return out


def read(
    out: Any,
    q: Any,
    feature_map: Any,
    sums: Sums,
    recent: Any = None,
    *,
    normalised: bool = True,
    stats: Any = None,
) -> None:
    """Queries read sums, and recent keys (k, v, mask), which are scored exactly; the result is written to `out`."""
    k, v, mask = recent or (None, None, None)
    pieces = max(1, -(-q.shape[-2] // QUERIES_A_BLOCK))
    attend(
        tuple(out.shape[:-2]), feature_map, arrays.name_of(q), like=q, e=out.shape[-1], q=q, k=k, v=v, mask=mask,
        out=out, sums=sums, flags=Plain.NEAR if recent else 0, pieces=pieces, normalised=normalised,
        recent=0 if k is None else k.shape[-2], stats=stats,
    )  # fmt: skip


def absorb(k: Any, v: Any, feature_map: Any, key_mask: Any, sums: Sums, low: Lows) -> tuple[Sums, Lows]:
    """The sums after further keys, and their low parts."""
    keys = broadcast_shapes(key_batch_of(feature_map, k, v, key_mask), tuple(sums[0].shape[:-2]))
    dtype = arrays.name_of(k)
    new = new_sums(k, keys, feature_map.num_features, v.shape[-1], arrays.WIDER[dtype])
    new_low = attend(
        keys, feature_map, dtype, like=k, e=v.shape[-1], k=k, v=v, mask=key_mask, sums=sums, low=low, new=new,
        flags=Plain.ENTER, limit=k.shape[-2],
    )  # fmt: skip
    return new, new_low


def causal(
    out: Any,
    q: Any,
    k: Any,
    v: Any,
    feature_map: Any,
    key_mask: Any,
    sums: Sums | None,
    low: Lows,
    *,
    window: int,
    first_query: int,
    limit: int,
    stats: Any = None,
) -> tuple[Sums, Lows]:
    """Every query reads the keys up to its own position; the result is written to `out`.

    Returns the sums of the first `limit` keys and their low parts, for every head of the queries.
    """
    dtype, e, batch = arrays.name_of(q), v.shape[-1], tuple(out.shape[:-2])
    new = new_sums(q, batch, feature_map.num_features, e, arrays.WIDER[dtype])
    new_low = attend(
        batch, feature_map, dtype, like=q, e=e, q=q, k=k, v=v, mask=key_mask, out=out, sums=sums, low=low, new=new,
        flags=Plain.ENTER | (Plain.NEAR if window else 0), window=window, causal=1, first_query=first_query,
        limit=limit, stats=stats,
    )  # fmt: skip
    return new, new_low


Recent = tuple[Any, Any, Any]
"""The recent keys, values and mask of a state, which are not in its sums yet."""


@repeated
def decode(
    q: Any, k: Any, v: Any, feature_map: Any, key_mask: Any, sums: Sums, low: Lows, entering: int = 1,
    recent: Recent | None = None,
) -> tuple[Any, tuple[Sums, Lows], Recent | None] | None:  # fmt: skip
    """One token: the result of its queries, which see its own key, the new sums with low parts, and new recent keys.

    Without recent keys, the token's key enters the sums. With them, it is appended to the recent keys, and the first
    `entering` of these leave and enter the sums; if `entering` is 0, the sums are returned unchanged.

    The result is None if there are no heads, or if a block of `decode` would not fit into shared memory.
    """
    dtype, d, e = arrays.name_of(q), q.shape[-1], v.shape[-1]
    token = broadcast_shapes(tuple(k.shape[:-2]), tuple(v.shape[:-2]), () if key_mask is None else key_mask.shape[:-1])
    if recent is not None:
        of_recent = (tuple(x.shape[:-trailing]) for x, trailing in zip(recent, (2, 2, 1), strict=True))
        token = broadcast_shapes(token, *of_recent)
    keys = broadcast_shapes(tuple(feature_map.batch_shape), token, tuple(sums[0].shape[:-2]))
    batch = broadcast_shapes(tuple(q.shape[:-2]), keys)
    group = math.prod(batch) // max(1, math.prod(keys))
    cut = cut_of_decode(q, math.prod(keys), group, d, e, entering, recent is not None) if group else None
    if cut is None:
        return None
    heads, span, shared = cut
    blocks, parts = math.prod(keys) * -(-group // heads), max(1, -(-e // span))
    out = arrays.empty(q, (*batch, 1, e), dtype)
    new = new_sums(q, keys, feature_map.num_features, e, arrays.WIDER[dtype]) if entering else None
    given = {"q": q, "k": k, "v": v, "mask": key_mask, "out": out}
    problem = _problem(Problem(batch, keys=keys), feature_map, dtype, e, given, sums, new)
    new_low: Lows = (None, None)
    if new is not None:
        new_low = new_lows(new)
        problem.lows("in", low)
        problem.lows("out", new_low)
    problem.set(num_queries=group, segments=parts, span=span, limit=entering)
    after = None if recent is None else _recent_after(problem, q, recent, token, entering)
    name = expression("decode", dtype, heads, int(recent is not None))
    run(name, q, blocks * parts, DECODE_THREADS, problem.values, shared)
    return out, (sums, low) if new is None else (new, new_low), after


def _recent_after(problem: Problem, q: Any, recent: Recent, batch: tuple[int, ...], entering: int) -> Recent:
    """Arrays for the recent keys after a token, without the `entering` keys that leave; both are set in the problem."""
    (before, d), e, dtype = recent[0].shape[-2:], recent[1].shape[-1], arrays.name_of(q)
    length = before + 1 - entering
    after = (
        arrays.empty(q, (*batch, length, d), dtype),
        arrays.empty(q, (*batch, length, e), dtype),
        arrays.empty(q, (*batch, length), "bool"),
    )
    names = ("recent_k", "recent_v", "recent_mask")
    for name, x, written, trailing in zip(names, recent, after, (2, 2, 1), strict=True):
        problem.array(name, x, trailing)
        problem.array(f"{name}_out", written, trailing)
    problem.set(num_keys=before, recent=length)
    return after


def cut_of_decode(
    like: Any, keys: int, group: int, d: int, e: int, entering: int, near: bool
) -> tuple[int, int, int] | None:
    """The number of query heads and of columns of the values that a block of `decode` takes, and its shared memory.

    The number of heads is the smallest of `DECODED_HEADS` that covers all query heads of a key head, or else the
    largest that fits into shared memory. The result is None if none fits.
    """
    item, room = arrays.computed_item(arrays.name_of(like)), shared_room(arrays.device_number(like))
    fitting = []
    for heads in DECODED_HEADS:
        span = columns_decoded(e, item, keys * -(-group // heads))
        shared = shared_of_decode(d, heads, span, item, entering, near)
        if shared <= room:
            fitting.append((heads, span, shared))
    return next((cut for cut in fitting if cut[0] >= group), fitting[-1] if fitting else None)


def columns_decoded(e: int, item: int, blocks: int) -> int:
    """The number of columns of the values that a block of `decode` takes: whole sectors of 32 bytes."""
    sector, widest = 32 // item, widest_decoded(item)
    parts = max(1, PROCESSORS // max(1, blocks), -(-e // widest))
    return max(1, -(-e // (parts * sector))) * sector


def widest_decoded(item: int) -> int:
    """The largest number of columns that a block of `decode` takes: 16 bytes for each lane of a warp."""
    return 32 * 16 // item


def shared_of_decode(d: int, heads: int, span: int, item: int, entering: int, near: bool) -> int:
    """Bytes of shared memory that a block of `decode` takes; `near` says whether there are recent keys."""
    warps = DECODE_THREADS // 32
    keys = min(entering, 1) * (warps if near else 1)  # keys that are in shared memory at once, beside the queries
    points = warps if near else 1 + heads  # points that are multiplied with the map at once
    of_keys = entering * (1 + span + DECODE_THREADS)
    features = (2 + heads) * DECODE_THREADS + points * warps + heads
    sums = max(points * DECODE_THREADS, heads * warps * (span + 1))
    return item * ((keys + heads) * d + heads + of_keys + features + sums)


def features(u: Any, rows: Any, row: Any, column: Any, out: Any) -> None:
    """Write exp(u W^T + row + column) to `out`."""
    problem = Problem(tuple(out.shape[:-2]))
    n, m = out.shape[-2:]
    pieces = max(1, min(-(-n * m // PLAIN_THREADS), 65536))
    problem.set(m=m, d=u.shape[-1], num_queries=n, segments=pieces)
    for name, x in (("q", u), ("k", rows), ("v", row), ("mask", column), ("out", out)):
        problem.array(name, x)
    if math.prod(out.shape):
        run(expression("plain_features", arrays.name_of(u)), u, problem.heads * pieces, PLAIN_THREADS, problem.values)
