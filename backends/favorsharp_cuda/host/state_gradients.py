"""The gradients of `read` and `update` of states. `torch.operators` calls this module.

It uses the backward kernels of attention (`Backward`). Queries that read a state use its sums in place of the sums of
keys. Keys that entered a state read the gradients of its sums in place of the sums of queries.
"""

from typing import Any

from favorsharp.backend import State, namespace_of, summed_to
from favorsharp_cuda.host.attention_gradients import Backward, of_references
from favorsharp_cuda.host.problem import Sums, sums_of


def read_backward(
    gradient: Any, q: Any, state: State, feature_map: Any, out: Any, stats: Any, *, of_map: bool = False
) -> tuple[Any, ...]:
    """The gradients of q, and of kv, z, c, recent_k and recent_v of a state, then the sums for those of the map.

    Parameters
    ----------
    gradient : array, shape (*b, n, e)
        The gradient of the result `out`.
    state : State
        Its recent keys and values have the dtype of q, and its sums the dtype that is computed in.
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
    """The gradients of k and v, then those of the sums before the update, then the sums for those of the map.

    If several keys have the largest log feature c of a feature, its gradient goes to the earlier state, or else to the
    first of these keys.

    Parameters
    ----------
    gradients : three arrays
        The gradients of the sums after the update: kv (*b, m, e), z and c (*b, 1, m).
    before : (kv, z, c) or None
        The sums before the update. None if there were no keys; then the result has no gradients of these sums.
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
    # kv and z account for a part of the gradient of c; this is the rest
    rest = of_c - (of_references(of_kv, after[0]) + of_z * after[1])
    left = b.route(rest, weight)
    if before is None:
        return b.of_points(1), b.of_values(), sums
    of_kv, of_z = of_kv * xp.matrix_transpose(weight), of_z * weight
    of_c = of_references(of_kv, kv) + of_z * z + left
    of_state = (summed_to(x, tuple(like.shape)) for x, like in zip((of_kv, of_z, of_c), before, strict=True))
    return b.of_points(1), b.of_values(), *of_state, sums
