"""The kernels as custom operators of torch, which take tensors and numbers and return new tensors.

Traced calls use them: `torch_traced` and `torch_ops` call the operators that this file defines at its end. Each has a
function that runs kernels, a fake one that only computes shapes, and a rule for `vmap`.

An operator takes a feature map as six tensors and a few options. The packed form of a map is cached by the addresses
and versions of these tensors, for the maps that were used last.
"""

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch

from favorsharp.backend import State, broadcast_shapes, empty_state, map_gradients
from favorsharp.features.dense_exponential import DenseExponentialMap
from favorsharp.parameters import Parameters
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
from favorsharp_cuda.state import decode_step, entering, read, read_with_stats, update

MAPS_KEPT = 64
"""The number of maps in the cache."""

_MAP = "Tensor rows, Tensor log_weight, Tensor g1, Tensor g2, Tensor center_x, Tensor center_y"
_OPTIONS = "float scale, str kernel, int window, bool causal"
_POINTS = f"Tensor q, Tensor k, Tensor v, Tensor? key_mask, {_MAP}, {_OPTIONS}"
_CARRIED = "Tensor? kv, Tensor? z, Tensor? c"
_STATE = "Tensor kv, Tensor z, Tensor c, Tensor recent_k, Tensor recent_v, Tensor recent_mask"
_OF_STATE = f"{_STATE}, {_MAP}, float scale, str kernel, int window"
_LOWS = "Tensor? kv_low, Tensor? z_low"
_KEYS = f"Tensor k, Tensor v, Tensor? key_mask, {_MAP}, float scale, str kernel"
_PRODUCT = f"Tensor x, Tensor y, Tensor v, {_MAP}, float scale, str kernel"
SCHEMAS = {
    "attention": f"({_POINTS}, {_CARRIED}) -> (Tensor, Tensor)",
    "attention_backward": (
        f"(Tensor gradient, {_POINTS}, {_CARRIED}, Tensor out, Tensor stats, *, bool of_map) -> Tensor[]"
    ),
    "absorb": f"({_KEYS}, {_CARRIED}) -> (Tensor, Tensor, Tensor)",
    "absorb_backward": (
        f"(Tensor of_kv, Tensor of_z, Tensor of_c, {_KEYS}, {_CARRIED}, Tensor new_kv, Tensor new_z, Tensor new_c, "
        "*, bool of_map) -> Tensor[]"
    ),
    "update": f"(Tensor k, Tensor v, Tensor? key_mask, {_OF_STATE}, {_LOWS}) -> Tensor[]",
    "read": f"(Tensor q, {_OF_STATE}) -> Tensor",
    "read_with_stats": f"(Tensor q, {_OF_STATE}) -> (Tensor, Tensor)",
    "read_backward": f"(Tensor gradient, Tensor q, {_OF_STATE}, Tensor out, Tensor stats, *, bool of_map) -> Tensor[]",
    "decode_step": f"(Tensor q, Tensor k, Tensor v, Tensor? key_mask, {_OF_STATE}, {_LOWS}) -> Tensor[]",
    "kernel_matvec": f"({_PRODUCT}) -> Tensor",
    "kernel_matvec_backward": f"(Tensor gradient, {_PRODUCT}, *, bool of_map) -> Tensor[]",
    "exponential_features": "(Tensor u, Tensor rows, Tensor row, Tensor column) -> Tensor",
    "exponential_features_backward": (
        "(Tensor gradient, Tensor u, Tensor rows, Tensor row, Tensor column) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}
"""The signature of each operator."""


def arrays_of(feature_map: Any) -> list[Any]:
    """The arrays of a map that its features depend on, in the order of `map_gradients`."""
    p = feature_map.parameters
    return [feature_map.rows, feature_map.log_weight, p.g1, p.g2, p.center_x, p.center_y]


def options_of(feature_map: Any, window: int, causal: bool) -> tuple[float, str, int, bool]:
    """The options that operators take after the tensors of a map."""
    return float(feature_map.parameters.scale), feature_map.parameters.kernel, window, causal


def map_of(arrays: Any, scale: float, kernel: str) -> DenseExponentialMap:
    """A map made of the six tensors and options. Its features are right; other parameters are placeholders."""
    rows, log_weight, g1, g2, center_x, center_y = arrays
    parameters = Parameters("oprf", kernel, scale, center_x, g1, g2, center_x, center_y)
    return DenseExponentialMap(parameters, int(rows.shape[-2]), rows, rows, log_weight)


def tensors_of(state: State) -> list[Any]:
    """The arrays of a state in the order in which operators take them."""
    return [state.kv, state.z, state.c, state.recent_k, state.recent_v, state.recent_mask]


def arguments_of(state: State, feature_map: Any) -> tuple[Any, ...]:
    """A state and a map as arguments of an operator."""
    return (*tensors_of(state), *arrays_of(feature_map), *options_of(feature_map, state.window, True)[:3])


def parted(saved: Any, count: int) -> tuple[Any, Any, Any]:
    """Saved tensors in three parts: the first `count`, the six of the map, and the others."""
    return saved[:count], saved[count : count + 6], saved[count + 6 :]


def changes(state: State, new: Any) -> tuple[str, ...]:
    """The names of the arrays of a state that change when `new` keys arrive.

    Operators return only these, because an operator must not return its arguments.
    """
    sums: tuple[str, ...] = ("kv", "z", "c") if state.window == 0 or entering(state, new) else ()
    if sums and memory.name_of(state.kv) != "float64":
        sums += ("kv_low", "z_low")
    return (*sums, *(("recent_k", "recent_v", "recent_mask") if state.window else ()))


_maps: "OrderedDict[Any, DenseExponentialMap]" = OrderedDict()


def kept_map_of(arrays: Any, scale: float, kernel: str) -> DenseExponentialMap:
    """A map of six tensors. Calls with unchanged tensors get the same object, and so the same packed form."""
    # Changes of inference tensors are not counted, trained tensors change all the time, and a captured graph must pack
    # the map each time it runs.
    if any(x.is_inference() or x.requires_grad for x in arrays) or stream_of(arrays[0])[1]:
        return map_of(arrays, scale, kernel)
    stamps = tuple((x.data_ptr(), x._version, x.shape, x.stride(), x.dtype, x.device) for x in arrays)
    key = (scale, kernel, stamps)
    found = _maps.pop(key, None)
    if found is None:
        found = map_of([x.detach() for x in arrays], scale, kernel)  # keeps the memory, so that addresses stay unique
    _maps[key] = found
    while len(_maps) > MAPS_KEPT:
        _maps.popitem(last=False)
    return found


# The operators on tensors with values --------------------------------------------------------------------------------


def attention(q: Any, k: Any, v: Any, key_mask: Any, *rest: Any) -> Any:
    """The result, and the stats that a backward pass needs (1 / total and the reference of every query)."""
    *arrays, scale, kernel, window, causal, kv, z, c = rest
    feature_map = kept_map_of(arrays, scale, kernel)
    if causal:
        state = None if kv is None else sums_alone(k, v, (kv, z, c), window)
        out, stats, _ = causal_attention_with_stats(
            q, k, v, feature_map, key_mask=key_mask, window=window, state=state
        )  # fmt: skip
    else:
        out, stats = attention_with_stats(q, k, v, feature_map, key_mask=key_mask, window=window)
    return out, stats


def attention_backward_(gradient: Any, q: Any, k: Any, v: Any, key_mask: Any, *rest: Any, of_map: bool) -> Any:
    """The gradients of q, k, v and of a state and, with `of_map`, the ten sums for the map in the order of names."""
    *arrays, scale, kernel, window, causal, kv, z, c, out, stats = rest
    return _listed(
        *attention_backward(
            memory.cast(gradient, memory.name_of(q)), q, k, v, kept_map_of(arrays, scale, kernel), out, stats,
            key_mask=key_mask, window=window, causal=causal, of_map=of_map, state=None if kv is None else (kv, z, c),
        )
    )  # fmt: skip


def _listed(*found: Any) -> list[Any]:
    """Gradients, and the ten sums for a map if they are wanted, as one list of tensors."""
    *gradients, sums = found
    finished = {} if sums is None else sums.finished()
    return [_own(x) for x in (*gradients, *(finished[name] for name in sorted(finished)))]


def _own(x: Any) -> Any:
    """The tensor itself, or a copy if it is a view or not contiguous: results of an operator have their own memory."""
    return x.clone(memory_format=torch.contiguous_format) if x._is_view() or not x.is_contiguous() else x


def absorb(k: Any, v: Any, key_mask: Any, *rest: Any) -> Any:
    """The sums after keys; the sums before them are optional."""
    *arrays, scale, kernel, kv, z, c = rest
    feature_map = kept_map_of(arrays, scale, kernel)
    if kv is None:
        batch = _keys_batch(k, v, key_mask, arrays)
        state = empty_state(feature_map, batch, k.shape[-1], v.shape[-1], 0, k[..., :0, :])
    else:
        state = sums_alone(k, v, (kv, z, c), 0)
    state = update(state, k, v, feature_map, key_mask=key_mask)
    return sums_of(state)


def absorb_backward(
    of_kv: Any, of_z: Any, of_c: Any, k: Any, v: Any, key_mask: Any, *rest: Any, of_map: bool
) -> Any:  # fmt: skip
    """The gradients of k and v, of the sums before them if there were any, and, with `of_map`, the ten sums."""
    *arrays, scale, kernel, kv, z, c, new_kv, new_z, new_c = rest
    feature_map = kept_map_of(arrays, scale, kernel)
    before = None if kv is None else (kv, z, c)
    return _listed(
        *update_backward(
            (of_kv, of_z, of_c), k, v, before, (new_kv, new_z, new_c), feature_map, key_mask=key_mask, of_map=of_map
        )
    )  # fmt: skip


def sums_alone(k: Any, v: Any, sums: Any, window: int) -> State:
    """A state with these sums and without recent keys."""
    kv, z, c = sums
    none = k.narrow(-2, 0, 0), v.narrow(-2, 0, 0)
    return State(kv, z, c, window, *none, none[0].new_zeros(none[0].shape[:-1], dtype=torch.bool), fingerprint=None)


def first_keys(count: Any, k: Any, v: Any, key_mask: Any) -> tuple[Any, Any, Any]:
    """The first `count` keys, their values and their mask."""
    return k.narrow(-2, 0, count), v.narrow(-2, 0, count), None if key_mask is None else key_mask.narrow(-1, 0, count)


def after_zeros(x: Any, count: int) -> Any:
    """The rows of x behind `count` rows of zeros, which stand for the missing queries of a state's recent keys."""
    return x if count == 0 else torch.cat([x.new_zeros((*x.shape[:-2], count, x.shape[-1])), x], dim=-2)


def read_with_stats_(q: Any, *rest: Any) -> Any:
    """What queries read, and the stats that a backward pass needs."""
    state, feature_map = _of_state(rest)
    return read_with_stats(state, q, feature_map)


def read_backward_(gradient: Any, q: Any, *rest: Any, of_map: bool) -> Any:
    """The gradients of q, kv, z, c, recent_k and recent_v, and, with `of_map`, the ten sums."""
    *of_state, out, stats = rest
    state, feature_map = _of_state(of_state)
    return _listed(
        *read_backward(memory.cast(gradient, memory.name_of(q)), q, state, feature_map, out, stats, of_map=of_map)
    )  # fmt: skip


def kernel_matvec_(x: Any, y: Any, v: Any, *rest: Any) -> Any:
    """The product."""
    *arrays, scale, kernel = rest
    return kernel_matvec(x, y, v, kept_map_of(arrays, scale, kernel))


def kernel_matvec_backward(gradient: Any, x: Any, y: Any, v: Any, *rest: Any, of_map: bool) -> Any:
    """The gradients of x, y and v, and, with `of_map`, the ten sums."""
    *arrays, scale, kernel = rest
    feature_map = kept_map_of(arrays, scale, kernel)
    gradient = memory.cast(gradient, memory.name_of(x))
    return _listed(*attention_backward(gradient, x, y, v, feature_map, None, None, of_map=of_map))


def update_(k: Any, v: Any, key_mask: Any, *rest: Any) -> Any:
    """The arrays of the state that change, as `changes` names them."""
    state, feature_map = _with_lows(rest)
    return _changed(state, update(state, k, v, feature_map, key_mask=key_mask), k.shape[-2])


def read_(q: Any, *rest: Any) -> Any:
    """What queries read."""
    state, feature_map = _of_state(rest)
    return read(state, q, feature_map)


def decode_step_(q: Any, k: Any, v: Any, key_mask: Any, *rest: Any) -> Any:
    """The result, and the arrays of the state that change."""
    state, feature_map = _with_lows(rest)
    out, after = decode_step(q, k, v, state, feature_map, key_mask=key_mask)
    return [out, *_changed(state, after, 1)]


def _of_state(rest: Any) -> tuple[State, DenseExponentialMap]:
    *tensors, scale, kernel, window = rest
    state, arrays = _state_of(tensors, window)
    return state, kept_map_of(arrays, scale, kernel)


def _with_lows(rest: Any) -> tuple[State, DenseExponentialMap]:
    *of_state, kv_low, z_low = rest
    state, feature_map = _of_state(of_state)
    return replace(state, kv_low=kv_low, z_low=z_low), feature_map


def _state_of(tensors: Any, window: int) -> tuple[State, Any]:
    """The first tensors as a state, and the others, which are those of a map."""
    kv, z, c, recent_k, recent_v, recent_mask, *arrays = tensors
    return State(kv, z, c, window, recent_k, recent_v, recent_mask, fingerprint=None), arrays


def _changed(state: State, after: State, new: int) -> list[Any]:
    return [getattr(after, name).contiguous() for name in changes(state, new)]


def exponential_features_backward_(gradient: Any, u: Any, *rest: Any) -> Any:
    """The gradients of u, rows, row and column."""
    return exponential_features_backward(memory.cast(gradient, memory.name_of(u)), u, *rest)


# Fake kernels: new tensors of the right shapes and dtypes, for tracers -----------------------------------------------


def _wide(x: Any) -> Any:
    return x.dtype if x.dtype == torch.float64 else torch.float32


def _keys_batch(k: Any, v: Any, key_mask: Any, arrays: Any) -> tuple[int, ...]:
    shapes = [tuple(x.shape[:-2]) for x in (k, v, *arrays)]
    return broadcast_shapes(*shapes, () if key_mask is None else tuple(key_mask.shape[:-1]))


def _fake_attention(q: Any, k: Any, v: Any, key_mask: Any, *rest: Any) -> Any:
    kv = rest[-3]
    of_state = () if kv is None else kv.shape[:-2]
    batch = broadcast_shapes(tuple(q.shape[:-2]), _keys_batch(k, v, key_mask, rest[:6]), of_state)
    out = q.new_empty((*batch, q.shape[-2], v.shape[-1]))
    return out, q.new_empty((*batch, q.shape[-2], 2), dtype=_wide(q))


def _fake_backward(gradient: Any, q: Any, k: Any, v: Any, key_mask: Any, *rest: Any, of_map: bool) -> Any:
    *_, kv, z, c, _, stats = rest
    return _fake_gradients((q, k, v, *(() if kv is None else (kv, z, c))), rest[0], stats.shape[:-2], of_map)


def _fake_gradients(given: Any, rows: Any, batch: Any, of_map: bool) -> Any:
    """The gradients of `given` and, with `of_map`, the ten sums for each head of a batch."""
    d, m = rows.shape[-1], rows.shape[-2]
    sizes = [shape for _, shape in sorted(_sum_shapes(m, d).items())] if of_map else []
    like = given[0]
    return [x.new_empty(tuple(x.shape)) for x in given] + [
        like.new_empty((*batch, *size), dtype=_wide(like)) for size in sizes
    ]


def _sum_shapes(m: Any, d: Any) -> dict[str, tuple[Any, Any]]:
    parts = {
        "points": (m, d),
        "column": (1, m),
        "factor": (1, 1),
        "factor_points": (1, d),
        "factor_products": (d, d),
    }
    return {f"{side}_{name}": size for side in ("query", "key") for name, size in parts.items()}


def _fake_absorb(k: Any, v: Any, key_mask: Any, *rest: Any) -> Any:
    kv, m = rest[-3], rest[0].shape[-2]
    batch = broadcast_shapes(_keys_batch(k, v, key_mask, rest[:6]), () if kv is None else kv.shape[:-2])
    return tuple(k.new_empty((*batch, *size), dtype=_wide(k)) for size in ((m, v.shape[-1]), (1, m), (1, m)))


def _fake_absorb_backward(
    of_kv: Any, of_z: Any, of_c: Any, k: Any, v: Any, key_mask: Any, *rest: Any, of_map: bool
) -> Any:  # fmt: skip
    kv, z, c, new_kv, *_ = rest[8:]
    return _fake_gradients((k, v, *(() if kv is None else (kv, z, c))), rest[0], new_kv.shape[:-2], of_map)


def _fake_read_with_stats(q: Any, *rest: Any) -> Any:
    out = _fake_read(q, *rest)
    return out, q.new_empty((*out.shape[:-1], 2), dtype=_wide(q))


def _fake_read_backward(gradient: Any, q: Any, *rest: Any, of_map: bool) -> Any:
    kv, z, c, recent_k, recent_v, _, rows, *_, stats = rest
    return _fake_gradients((q, kv, z, c, recent_k, recent_v), rows, stats.shape[:-2], of_map)


def _fake_matvec(x: Any, y: Any, v: Any, *rest: Any) -> Any:
    batch = broadcast_shapes(tuple(x.shape[:-2]), _keys_batch(y, v, None, rest[:6]))
    return x.new_empty((*batch, x.shape[-2], v.shape[-1]))


def _fake_matvec_backward(gradient: Any, x: Any, y: Any, v: Any, *rest: Any, of_map: bool) -> Any:
    batch = broadcast_shapes(tuple(x.shape[:-2]), _keys_batch(y, v, None, rest[:6]))
    return _fake_gradients((x, y, v), rest[0], batch, of_map)


def _fake_update(k: Any, v: Any, key_mask: Any, *rest: Any) -> Any:
    return _fake_changes(k, v, key_mask, *rest[:-2])


def _fake_changes(k: Any, v: Any, key_mask: Any, *rest: Any) -> Any:
    *tensors, _, _, window = rest
    state, arrays = _state_of(tensors, window)
    kv, recent_k, recent_v, recent_mask = state.kv, state.recent_k, state.recent_v, state.recent_mask
    new, m = k.shape[-2], kv.shape[-2]
    masks = [x.shape[:-1] for x in (key_mask, recent_mask if window else None) if x is not None]
    own = broadcast_shapes(*(x.shape[:-2] for x in (k, v, *((recent_k, recent_v) if window else ()))), *masks)
    batch = broadcast_shapes(own, kv.shape[:-2], *(x.shape[:-2] for x in arrays))
    length = recent_k.shape[-2] + new - entering(state, new)
    made = {
        "kv": ((*batch, m, v.shape[-1]), kv.dtype),
        "z": ((*batch, 1, m), kv.dtype),
        "c": ((*batch, 1, m), kv.dtype),
        "kv_low": ((*batch, m, v.shape[-1]), kv.dtype),
        "z_low": ((*batch, 1, m), kv.dtype),
        "recent_k": ((*own, length, k.shape[-1]), k.dtype),
        "recent_v": ((*own, length, v.shape[-1]), v.dtype),
        "recent_mask": ((*own, length), torch.bool),
    }
    return [k.new_empty(made[name][0], dtype=made[name][1]) for name in changes(state, new)]


def _fake_read(q: Any, kv: Any, z: Any, c: Any, recent_k: Any, recent_v: Any, recent_mask: Any, *rest: Any) -> Any:
    batch = broadcast_shapes(q.shape[:-2], kv.shape[:-2], _keys_batch(recent_k, recent_v, recent_mask, rest[:6]))
    return q.new_empty((*batch, q.shape[-2], kv.shape[-1]))


def _fake_decode(q: Any, k: Any, v: Any, key_mask: Any, *rest: Any) -> Any:
    kv, _, _, recent_k, recent_v, recent_mask, *arrays, _, _, window, _, _ = rest
    near = [_keys_batch(recent_k, recent_v, recent_mask, arrays)] if window else []
    batch = broadcast_shapes(q.shape[:-2], kv.shape[:-2], _keys_batch(k, v, key_mask, arrays), *near)
    return [q.new_empty((*batch, 1, v.shape[-1])), *_fake_changes(k, v, key_mask, *rest[:-2])]


def _fake_features(u: Any, rows: Any, row: Any, column: Any) -> Any:
    batch = broadcast_shapes(*(tuple(x.shape[:-2]) for x in (u, rows, row, column)))
    return u.new_empty((*batch, u.shape[-2], rows.shape[-2]))


def _fake_features_backward(gradient: Any, *given: Any) -> Any:
    return tuple(x.new_empty(tuple(x.shape)) for x in given)


# Registration --------------------------------------------------------------------------------------------------------


def gradients_of_map(sums: Any, arrays: Any, options: Any) -> Any:
    """The gradients of a map's arrays, from the ten sums that a backward operator returns."""
    m, d = arrays[0].shape[-2], arrays[0].shape[-1]
    return map_gradients(
        map_of(arrays, options[0], options[1]), dict(zip(sorted(_sum_shapes(m, d)), sums, strict=True))
    )


def _vmap_of(op: Any) -> Any:
    """The rule for `vmap`: a mapped axis becomes the first leading axis of every tensor.

    Tensors that are not mapped are expanded along it, so that gradients have an entry for each index.
    """

    def mapped(info: Any, dims: Any, *given: Any, **options: Any) -> Any:
        axes = [_leading(x) - (dim is not None) for x, dim in zip(given, dims, strict=True) if _is_tensor(x)]
        front = [
            _fronted(x, dim, max(axes), info.batch_size) if _is_tensor(x) else x
            for x, dim in zip(given, dims, strict=True)
        ]
        found = op(*front, **options)
        return found, 0 if _is_tensor(found) else type(found)(0 for _ in found)

    return mapped


def _fronted(x: Any, dim: int | None, leading: int, size: int) -> Any:
    """The tensor with the mapped axis first, padded to as many leading axes as the other tensors have."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.reshape(size, *(1,) * (leading + 1 - _leading(x)), *x.shape[1:])


def _leading(x: Any) -> int:
    return int(x.ndim) - (1 if x.dtype == torch.bool else 2)  # a mask has no columns


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _defined(name: str, run: Any, fake: Any) -> Any:
    op = torch.library.custom_op(
        f"favorsharp_cuda::{name}", run, mutates_args=(), device_types="cuda", schema=SCHEMAS[name]
    )
    op.register_fake(fake)
    op.register_vmap(_vmap_of(op))
    return op


attention_op = _defined("attention", attention, _fake_attention)
attention_backward_op = _defined("attention_backward", attention_backward_, _fake_backward)
absorb_op = _defined("absorb", absorb, _fake_absorb)
absorb_backward_op = _defined("absorb_backward", absorb_backward, _fake_absorb_backward)
update_op = _defined("update", update_, _fake_update)
read_op = _defined("read", read_, _fake_read)
read_with_stats_op = _defined("read_with_stats", read_with_stats_, _fake_read_with_stats)
read_backward_op = _defined("read_backward", read_backward_, _fake_read_backward)
decode_step_op = _defined("decode_step", decode_step_, _fake_decode)
kernel_matvec_op = _defined("kernel_matvec", kernel_matvec_, _fake_matvec)
kernel_matvec_backward_op = _defined("kernel_matvec_backward", kernel_matvec_backward, _fake_matvec_backward)
exponential_features_op = _defined("exponential_features", exponential_features, _fake_features)
exponential_features_backward_op = _defined(
    "exponential_features_backward", exponential_features_backward_, _fake_features_backward
)
