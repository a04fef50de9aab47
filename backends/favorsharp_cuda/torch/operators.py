"""Declares the operators of torch that run the kernels: their results, gradients and shapes.

`torch_ops` calls them. `favorsharp.torch_operators` turns each declaration into what eager and traced calls need.
"""

from collections import OrderedDict
from typing import Any

import torch

from favorsharp.backend import State, broadcast_shapes, empty_state, map_gradients
from favorsharp.ops.attention import attention as attention_op
from favorsharp.ops.causal_attention import causal_attention as causal_op
from favorsharp.ops.state import read as reading_op
from favorsharp.ops.state import update as updating_op
from favorsharp.torch_operators import FEATURES, MATVEC, Library, Operator, TensorMap
from favorsharp_cuda import state as states
from favorsharp_cuda.attention import attention_with_stats
from favorsharp_cuda.causal_attention import causal_attention_with_stats
from favorsharp_cuda.exponential_features import exponential_features
from favorsharp_cuda.host import arrays as memory
from favorsharp_cuda.host.attention_gradients import attention_backward
from favorsharp_cuda.host.exponential_features_gradients import exponential_features_backward
from favorsharp_cuda.host.launch import stream_of
from favorsharp_cuda.host.problem import sums_of
from favorsharp_cuda.host.state_gradients import read_backward, update_backward
from favorsharp_cuda.kernel_matvec import kernel_matvec

MAPS_KEPT = 64
"""The number of maps in the cache."""

_maps: "OrderedDict[Any, TensorMap]" = OrderedDict()


def kept(own: TensorMap) -> TensorMap:
    """The map itself, or the map of an earlier call with the same tensors, whose packed form is known.

    The cache identifies tensors by their addresses and versions.
    """
    # Changes of inference tensors are not counted, trained tensors change all the time, and a captured graph must pack
    # the map each time it runs.
    if any(x.is_inference() or x.requires_grad for x in own.arrays) or stream_of(own.rows)[1]:
        return own
    scale, kernel = own.parameters.scale, own.parameters.kernel
    key = scale, kernel, *((x.data_ptr(), x._version, x.shape, x.stride(), x.dtype, x.device) for x in own.arrays)
    found = _maps.pop(key, None)
    if found is None:  # it keeps the memory, so that addresses stay unique
        found = TensorMap([x.detach() for x in own.arrays], scale, kernel)
    _maps[key] = found
    while len(_maps) > MAPS_KEPT:
        _maps.popitem(last=False)
    return found


_LIBRARY = Library("favorsharp_cuda", "cuda", kept)


def _with_map(feature_map: Any, *found: Any) -> tuple[Any, ...]:
    """The gradients of tensors, and those of the map if `found` ends with the sums for them."""
    *gradients, sums = found
    return tuple(gradients) if sums is None else (*gradients, *map_gradients(feature_map, sums.finished()))


def _like(gradient: Any, x: Any) -> Any:
    """A gradient in the dtype of the points."""
    return memory.cast(gradient, memory.name_of(x))


# Attention. The recent keys of a state come before the other keys. ---------------------------------------------------


def sums_alone(k: Any, v: Any, sums: Any, window: int) -> State | None:
    """A state with these sums and without recent keys; None if kv is None."""
    kv, z, c = sums
    if kv is None:
        return None
    none = k.narrow(-2, 0, 0), v.narrow(-2, 0, 0)
    return State(kv, z, c, window, *none, none[0].new_zeros(none[0].shape[:-1], dtype=torch.bool), fingerprint=None)


def _after_zeros(x: Any, count: int) -> Any:
    """The rows of x behind `count` rows of zeros, which stand for the missing queries of a state's recent keys."""
    return x if count == 0 else torch.cat([x.new_zeros((*x.shape[:-2], count, x.shape[-1])), x], dim=-2)


def _attention(
    own: Any, q: Any, k: Any, v: Any, key_mask: Any, *sums: Any, window: int, causal: bool
) -> tuple[Any, Any]:  # fmt: skip
    if not causal:
        return attention_with_stats(q, k, v, own, key_mask=key_mask, window=window)
    state = sums_alone(k, v, sums, window)
    return causal_attention_with_stats(q, k, v, own, key_mask=key_mask, window=window, state=state)[:2]


def _attention_backward(
    gradients: Any, made: Any, own: Any, q: Any, k: Any, v: Any, key_mask: Any, *sums: Any, of_map: bool, window: int,
    causal: bool,
) -> Any:  # fmt: skip
    before = k.shape[-2] - q.shape[-2] if causal else 0
    gradient, queries, out, stats = (_after_zeros(x, before) for x in (_like(gradients[0], q), q, *made))
    of_q, *others = attention_backward(
        gradient, queries, k, v, own, out, stats, key_mask=key_mask, window=window, causal=causal, of_map=of_map,
        state=None if sums[0] is None else sums,
    )  # fmt: skip
    return _with_map(own, of_q.narrow(-2, before, q.shape[-2]), *others)


def _attention_reference(
    own: Any, q: Any, k: Any, v: Any, key_mask: Any, *sums: Any, window: int, causal: bool
) -> Any:  # fmt: skip
    options = {"key_mask": key_mask, "window": window}
    if not causal:
        return (attention_op.reference(q, k, v, own, **options),)
    before = k.shape[-2] - q.shape[-2]
    options["state"] = sums_alone(k, v, sums, window)
    out, _ = causal_op.reference(_after_zeros(q, before), k, v, own, **options)
    return (out.narrow(-2, before, q.shape[-2]),)


ATTENTION = Operator(
    "attention",
    "q: n d, k: s d, v: s e, key_mask?: s, kv?: m e, z?: 1 m, c?: 1 m",
    "out: n e",
    kept="stats: n 2",
    options="int window, bool causal",
    forward=_attention,
    backward=_attention_backward,
    reference=_attention_reference,
    library=_LIBRARY,
)
"""Attention; if it is causal, it may begin with the sums of a state."""


# The sums after keys -------------------------------------------------------------------------------------------------


def _absorb(own: Any, k: Any, v: Any, key_mask: Any, *sums: Any, update: Any = states.update) -> Any:
    state = sums_alone(k, v, sums, 0)
    if state is None:
        batch = [tuple(own.batch_shape), *(tuple(x.shape[:-2]) for x in (k, v))]
        batch += [] if key_mask is None else [tuple(key_mask.shape[:-1])]
        state = empty_state(own, broadcast_shapes(*batch), k.shape[-1], v.shape[-1], 0, k.narrow(-2, 0, 0))
    return sums_of(update(state, k, v, own, key_mask=key_mask))


def _absorb_reference(*given: Any) -> Any:
    return _absorb(*given, update=updating_op.reference)


def _absorb_backward(
    gradients: Any, made: Any, own: Any, k: Any, v: Any, key_mask: Any, *sums: Any, of_map: bool
) -> Any:  # fmt: skip
    of_sums = tuple(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, made, strict=True))
    before = None if sums[0] is None else sums
    return _with_map(own, *update_backward(of_sums, k, v, before, tuple(made), own, key_mask=key_mask, of_map=of_map))


ABSORB = Operator(
    "absorb",
    "k: s d, v: s e, key_mask?: s, kv?: m e, z?: 1 m, c?: 1 m",
    "kv: m e, z: 1 m, c: 1 m",
    wide=True,
    forward=_absorb,
    backward=_absorb_backward,
    reference=_absorb_reference,
    library=_LIBRARY,
)
"""The sums of a state after keys; those before them are optional."""


# What queries read from a state --------------------------------------------------------------------------------------


def _state_to_read(kv: Any, z: Any, c: Any, recent_k: Any, recent_v: Any, recent_mask: Any) -> State:
    """The state with these arrays. Reading does not depend on the window, which is set to 0."""
    return State(kv, z, c, 0, recent_k, recent_v, recent_mask, fingerprint=None)


def _read(own: Any, q: Any, *state: Any) -> Any:
    return states.read_with_stats(_state_to_read(*state), q, own)


def _read_backward(gradients: Any, made: Any, own: Any, q: Any, *state: Any, of_map: bool) -> Any:
    return _with_map(
        own, *read_backward(_like(gradients[0], q), q, _state_to_read(*state), own, *made, of_map=of_map)
    )  # fmt: skip


def _read_reference(own: Any, q: Any, *state: Any) -> Any:
    return (reading_op.reference(_state_to_read(*state), q, own),)


_STATE = "kv: m e, z: 1 m, c: 1 m, recent_k: r d, recent_v: r e, recent_mask: r"
READ = Operator(
    "read",
    f"q: n d, {_STATE}",
    "out: n e",
    kept="stats: n 2",
    forward=_read,
    backward=_read_backward,
    reference=_read_reference,
    library=_LIBRARY,
)


# The changes of a state, without derivatives -------------------------------------------------------------------------


def tensors_of(state: State) -> tuple[Any, ...]:
    """The arrays of a state in the order in which operators take them."""
    return state.kv, state.z, state.c, state.recent_k, state.recent_v, state.recent_mask


def _state_of(window: int, kv: Any, z: Any, c: Any, k: Any, v: Any, mask: Any, *lows: Any) -> State:
    return State(kv, z, c, window, k, v, mask, None, *lows)


def changes(state: State, new: Any) -> tuple[str, ...]:
    """The names of the arrays of a state that change when `new` keys arrive.

    Operators return only these, because an operator must not return its arguments.
    """
    sums: tuple[str, ...] = ("kv", "z", "c") if state.window == 0 or states.entering(state, new) else ()
    if sums and memory.name_of(state.kv) != "float64":
        sums += ("kv_low", "z_low")
    return (*sums, *(("recent_k", "recent_v", "recent_mask") if state.window else ()))


def _changed(state: State, after: State, new: int) -> list[Any]:
    return [getattr(after, name) for name in changes(state, new)]


def _update(own: Any, k: Any, v: Any, key_mask: Any, *arrays: Any, window: int) -> list[Any]:
    state = _state_of(window, *arrays)
    return _changed(state, states.update(state, k, v, own, key_mask=key_mask), k.shape[-2])


def _decode_step(own: Any, q: Any, k: Any, v: Any, key_mask: Any, *arrays: Any, window: int) -> list[Any]:
    state = _state_of(window, *arrays)
    out, after = states.decode_step(q, k, v, state, own, key_mask=key_mask)
    return [out, *_changed(state, after, 1)]


def _fake_update(own: Any, k: Any, v: Any, key_mask: Any, *arrays: Any, window: int) -> list[Any]:
    state = _state_of(window, *arrays)
    recent, new, m, e = _recent_batch(state, k, v, key_mask), k.shape[-2], state.kv.shape[-2], v.shape[-1]
    batch = broadcast_shapes(recent, tuple(state.kv.shape[:-2]), own.batch_shape)
    length = state.recent_k.shape[-2] + new - states.entering(state, new)
    kv, row, wide = (*batch, m, e), (*batch, 1, m), state.kv.dtype
    made = {
        **{"kv": (kv, wide), "z": (row, wide), "c": (row, wide), "kv_low": (kv, wide), "z_low": (row, wide)},
        "recent_k": ((*recent, length, k.shape[-1]), k.dtype),
        "recent_v": ((*recent, length, e), v.dtype),
        "recent_mask": ((*recent, length), torch.bool),
    }
    return [k.new_empty(made[name][0], dtype=made[name][1]) for name in changes(state, new)]


def _fake_decode_step(own: Any, q: Any, *others: Any, window: int) -> list[Any]:
    k, v, key_mask, *arrays = others
    state = _state_of(window, *arrays)
    recent = _recent_batch(state, k, v, key_mask)
    batch = broadcast_shapes(tuple(q.shape[:-2]), recent, tuple(state.kv.shape[:-2]), own.batch_shape)
    return [q.new_empty((*batch, 1, v.shape[-1])), *_fake_update(own, *others, window=window)]


def _recent_batch(state: State, k: Any, v: Any, key_mask: Any) -> tuple[int, ...]:
    """The leading axes of the recent keys of a state after further keys."""
    points = [k, v, *((state.recent_k, state.recent_v) if state.window else ())]
    masks = [x for x in (key_mask, state.recent_mask if state.window else None) if x is not None]
    return broadcast_shapes(*(tuple(x.shape[:-2]) for x in points), *(tuple(x.shape[:-1]) for x in masks))


_WHOLE = f"{_STATE}, kv_low?: m e, z_low?: 1 m"
UPDATE = Operator(
    "update",
    f"k: s d, v: s e, key_mask?: s, {_WHOLE}",
    _fake_update,
    options="int window",
    forward=_update,
    library=_LIBRARY,
)
DECODE_STEP = Operator(
    "decode_step",
    f"q: n d, k: s d, v: s e, key_mask?: s, {_WHOLE}",
    _fake_decode_step,
    options="int window",
    forward=_decode_step,
    library=_LIBRARY,
)


# Features and kernel products ----------------------------------------------------------------------------------------


def _features(_: Any, *given: Any) -> Any:
    return (exponential_features(*given),)


def _features_backward(gradients: Any, made: Any, _: Any, *given: Any, of_map: bool) -> Any:
    return exponential_features_backward(_like(gradients[0], given[0]), *given)


def _kernel_matvec(own: Any, x: Any, y: Any, v: Any) -> Any:
    return (kernel_matvec(x, y, v, own),)


def _kernel_matvec_backward(gradients: Any, made: Any, own: Any, x: Any, y: Any, v: Any, *, of_map: bool) -> Any:
    return _with_map(own, *attention_backward(_like(gradients[0], x), x, y, v, own, None, None, of_map=of_map))


EXPONENTIAL_FEATURES = FEATURES(forward=_features, backward=_features_backward, library=_LIBRARY)
KERNEL_MATVEC = MATVEC(forward=_kernel_matvec, backward=_kernel_matvec_backward, library=_LIBRARY)
