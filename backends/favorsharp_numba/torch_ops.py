"""The ops that torch differentiates on the CPU; the backward kernels compute their gradients.

Gradients flow to q, k and v, and to every array of a feature map. The reference computes them if they are to be
differentiated again (`create_graph=True`), or if a mode of torch traces or follows them. The state that causal
attention returns is differentiable too, through the reference. If a call takes a state, the reference computes all of
it, because only the reference carries gradients from one call to the next.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from favorsharp.backend import State, arrays_of, empty_state
from favorsharp.ops.attention import attention as attention_op
from favorsharp.ops.causal_attention import causal_attention as causal_op
from favorsharp.ops.state import update as updating_op
from favorsharp.torch_operators import FEATURES, MATVEC, Operator, recorded
from favorsharp_numba import attention as plain_attention
from favorsharp_numba import causal_attention as plain_causal
from favorsharp_numba import exponential_features as plain_features
from favorsharp_numba import kernel_matvec as plain_matvec
from favorsharp_numba.causal_attention import recent
from favorsharp_numba.host.attention_gradients import attention_backward, attention_with_stats, of_arrays_of_map
from favorsharp_numba.host.kernel_matvec_gradients import kernel_matvec_backward
from favorsharp_numba.host.problem import packed_attention
from favorsharp_numba.kernel_matvec import with_sums


def exponential_features(u: Any, rows: Any, row: Any, column: Any, *, out: Any = None) -> Any:
    """As `favorsharp.ops.exponential_features.exponential_features`."""
    if not recorded(u, rows, row, column, out):
        return plain_features.exponential_features(u, rows, row, column, out=out)
    (result,) = _FEATURES(None, u, rows, row, column)
    if out is None:
        return result
    out[...] = result
    return out


def kernel_matvec(x: Any, y: Any, v: Any, feature_map: Any) -> Any:
    """As `favorsharp.ops.kernel_matvec.kernel_matvec`."""
    if not recorded(x, y, v, *arrays_of(feature_map)):
        return plain_matvec.kernel_matvec(x, y, v, feature_map)
    return _MATVEC(feature_map, x, y, v)[0]


def attention(
    q: Any, k: Any, v: Any, feature_map: Any, *, key_mask: Any = None, window: int = 0, out: Any = None
) -> Any:
    """As `favorsharp.ops.attention.attention`; written to `out` if torch records nothing."""
    if not recorded(q, k, v, out, *arrays_of(feature_map)):
        return plain_attention.attention(q, k, v, feature_map, key_mask=key_mask, window=window, out=out)
    return _ATTENTION(feature_map, q, k, v, key_mask, window=window, causal=False, bounds=None)[0]


def causal_attention(
    q: Any,
    k: Any,
    v: Any,
    feature_map: Any,
    *,
    key_mask: Any = None,
    window: int = 0,
    state: State | None = None,
    out: Any = None,
) -> tuple[Any, State]:
    """As `favorsharp.ops.causal_attention.causal_attention`; written to `out` if torch records nothing."""
    carried = () if state is None else (state.kv, state.z, state.c, state.recent_k, state.recent_v)
    if not recorded(q, k, v, out, *arrays_of(feature_map), *carried):
        return plain_causal.causal_attention(
            q, k, v, feature_map, key_mask=key_mask, window=window, state=state, out=out
        )
    if state is not None:
        return causal_op.reference(q, k, v, feature_map, key_mask=key_mask, window=window, state=state)
    out, kv, z, c = _CAUSAL(feature_map, q, k, v, key_mask, window=window, causal=True, bounds=None)
    state = empty_state(feature_map, tuple(kv.shape[:-2]), k.shape[-1], v.shape[-1], window, k[..., :0, :])
    state = replace(state, kv=kv, z=z, c=c)
    return out, replace(state, **recent(state, k, v, key_mask)) if window else state


def _packed(
    q: Any, k: Any, v: Any, feature_map: Any, bounds: list[int], *, causal: bool, out: Any = None,
    key_mask: Any = None, window: int = 0,
) -> Any:  # fmt: skip
    options: dict[str, Any] = {"causal": causal, "window": window}
    if not recorded(q, k, v, out, *arrays_of(feature_map)):
        return packed_attention(q, k, v, feature_map, bounds, out=out, key_mask=key_mask, **options)
    return _ATTENTION(feature_map, q, k, v, key_mask, bounds=bounds, **options)[0]


attention_packed = partial(_packed, causal=False)
causal_attention_packed = partial(_packed, causal=True)


def _attended(own: Any, q: Any, k: Any, v: Any, key_mask: Any, **options: Any) -> tuple[Any, ...]:
    """The result and the sums of a state, if there are any; then what the backward pass needs."""
    out, exact, stats, state = attention_with_stats(q, k, v, own, key_mask=key_mask, **options)
    sums = () if state is None else (torch.from_numpy(state[name]) for name in ("kv", "z", "c"))
    return out, *sums, None if exact is out else exact, stats


def _attended_backward(
    gradients: Any, made: Any, own: Any, q: Any, k: Any, v: Any, key_mask: Any, *, of_map: bool, **options: Any
) -> list[Any]:
    (gradient, *of_state), (out, *_, exact, stats) = gradients, made
    exact = out if exact is None else exact
    gradient = torch.zeros_like(exact) if gradient is None else gradient
    *found, sums = attention_backward(
        gradient, q, k, v, own, exact, stats, key_mask=key_mask, of_map=of_map, **options
    )  # fmt: skip
    found += of_arrays_of_map(own, sums) if of_map else ()
    if any(x is not None for x in of_state):
        batch = next(tuple(x.shape[:-2]) for x in of_state if x is not None)
        flat = k, v, key_mask, *arrays_of(own)
        of_k, of_v, _, *of_arrays = _SUMS.gradients_of_reference(
            of_state, own, {"window": options["window"], "batch": batch}, flat
        )  # fmt: skip
        through = (None, of_k, of_v, *of_arrays)
        found = [a if b is None else a + b for a, b in zip(found, through, strict=False)]
    return found


def _sums_reference(own: Any, k: Any, v: Any, key_mask: Any, *, window: int, batch: tuple[int, ...]) -> Any:
    """The sums of the state after all keys, from which causal attention that returns it is differentiated."""
    state = empty_state(own, batch, k.shape[-1], v.shape[-1], window, k[..., :0, :])
    state = updating_op.reference(state, k, v, own, key_mask=key_mask)
    return state.kv, state.z, state.c


def _attended_reference(
    own: Any, q: Any, k: Any, v: Any, key_mask: Any, *, window: int, causal: bool, bounds: list[int] | None
) -> tuple[Any, ...]:
    """The result and, for causal attention that is not packed, the sums of its state."""
    parts = [(0, q.shape[-2], k.shape[-2])] if bounds is None else [(a, b, b) for a, b in pairwise(bounds)]
    outs = []
    for start, stop, end in parts:
        points = q[..., start:stop, :], k[..., start:end, :], v[..., start:end, :]
        options: Any = {"key_mask": None if key_mask is None else key_mask[..., start:end], "window": window}
        if causal:
            out, state = causal_op.reference(*points, own, **options)
        else:
            out = attention_op.reference(*points, own, **options)
        outs.append(out)
    if bounds is None:
        return (out, state.kv, state.z, state.c) if causal else (out,)
    return (torch.cat(outs, dim=-2),)


def _multiplied(own: Any, x: Any, y: Any, v: Any) -> tuple[Any, Any]:
    return with_sums(x, y, v, own)


def _multiplied_backward(
    gradients: Any, made: Any, own: Any, x: Any, y: Any, v: Any, *, of_map: bool
) -> tuple[Any, ...]:  # fmt: skip
    *found, sums = kernel_matvec_backward(gradients[0], x, y, v, own, made[1], of_map=of_map)
    return (*found, *(of_arrays_of_map(own, sums) if of_map else ()))


_ATTENTION, _CAUSAL = (
    Operator(
        "attention",
        "q: n d, k: s d, v: s e, key_mask?: s",
        results,
        forward=_attended,
        backward=_attended_backward,
        reference=_attended_reference,
    )
    for results in ("out: n e", "out: n e, kv: m e, z: 1 m, c: 1 m")
)
_SUMS = Operator(
    "sums",
    "k: s d, v: s e, key_mask?: s",
    "kv: m e, z: 1 m, c: 1 m",
    forward=_sums_reference,
    reference=_sums_reference,
)
_MATVEC = MATVEC(forward=_multiplied, backward=_multiplied_backward)
_FEATURES = FEATURES(
    forward=lambda _, *given: (plain_features.exponential_features(*given),),
    backward=lambda gradients, made, _, *given, of_map: plain_features.exponential_features_backward(
        gradients[0], *given
    ),
)
