"""Gradients of updates and readings of states, by the kernels of attention's (kernels/attention_gradients.cu).

Queries that read a state find its sums where they would find those of keys. Keys that entered one read the gradient of
its sums, as they would read the sums of queries.
"""

from typing import Any

from favorsharp._arrays import namespace_of
from favorsharp.features.map_gradients import summed_to
from favorsharp.ops.state import State
from favorsharp_cuda.gradients import Backward, of_references
from favorsharp_cuda.problem import Sums, sums_of


def read_backward(
    gradient: Any, q: Any, state: State, feature_map: Any, out: Any, stats: Any, *, of_map: bool = False
) -> tuple[Any, ...]:
    """The gradients of q, of kv, z, c, recent_k and recent_v of a state, and the sums for those of a map.

    Parameters
    ----------
    gradient : array, shape (*b, n, e)
        Of the result `out`.
    state : State
        Whose recent keys and values are of the dtype of q, and its sums of the type that is computed in.
    stats : array, shape (*b, n, 2)
        1 / total and the reference of every query.
    """
    sums = sums_of(state)
    recent = {"k": state.recent_k, "v": state.recent_v, "key_mask": state.recent_mask}
    b = Backward(gradient, q, feature_map=feature_map, out=out, stats=stats, state=sums, only_near=True, **recent)
    of_map_sums = b.pass_back(of_map)
    return b.of_points(0), *b.of_state(), b.of_points(1), b.of_values(), of_map_sums


def update_backward(
    gradients: Sums, k: Any, v: Any, before: Sums | None, after: Sums, feature_map: Any, *,
    key_mask: Any = None, of_map: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """The gradients of k and v, of the sums before them, and the sums for those of a map.

    Of a feature whose largest log feature several have, that of a state before counts, then that of the first key.

    Parameters
    ----------
    gradients : three arrays
        Of the sums after: kv (*b, m, e), z and c (*b, 1, m).
    before : (kv, z, c) or None
        The sums before; None where there were no keys, and then there are no gradients of them.
    """
    of_kv, of_z, of_c = gradients
    top = after[2]
    xp = namespace_of(top)
    nothing = top == -xp.inf
    kv, z, c = before or (xp.zeros_like(after[0]), xp.zeros_like(top), xp.zeros_like(top) - xp.inf)
    weight = xp.exp(c - xp.where(nothing, xp.zeros_like(top), top))
    b = Backward(
        None, k[..., :0, :], k, v, feature_map, None, None, key_mask=key_mask, batch=tuple(top.shape[:-2]),
        read_by_keys=(of_kv, of_z, xp.where(nothing, top, -top)),
    )  # fmt: skip
    sums = b.pass_back(of_map)
    rest = of_c - (of_references(of_kv, after[0]) + of_z * after[1])  # what the sums do not take off by themselves
    left = b.route(rest, weight)
    if before is None:
        return b.of_points(1), b.of_values(), sums
    of_kv, of_z = of_kv * xp.matrix_transpose(weight), of_z * weight
    of_c = of_references(of_kv, kv) + of_z * z + left
    of_state = (summed_to(x, tuple(like.shape)) for x, like in zip((of_kv, of_z, of_c), before, strict=True))
    return b.of_points(1), b.of_values(), *of_state, sums
