"""Checks the arguments of attention, for `linear_attention`, `vjp` and `distributed.linear_attention`.

`checked` returns a `Call`: the arguments in the form that the ops take.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from favorsharp._arrays import broadcast_shapes, compute_dtype, dtype_name, is_array, result_dtype, to_host
from favorsharp._autodiff import is_followed, is_traced
from favorsharp._checks import (
    check_array,
    check_attention,
    check_broadcast,
    check_floats,
    check_integer,
    check_same_size,
    check_window,
    check_window_of_state,
)
from favorsharp._heads import grouped, merge_heads, merged_batch, split_heads
from favorsharp._typing import Array, DType, Namespace
from favorsharp.dispatch import Implementation
from favorsharp.features import FeatureMap, PositiveFeatureMap
from favorsharp.ops.state import State, empty_state, with_group_axis
from favorsharp.plans import prepared_map


@dataclass(frozen=True, eq=False)
class Call:
    """Checked arguments of attention, in the form that the ops take.

    Attributes
    ----------
    q, k, v : array
        As the caller passed them; if heads are grouped, with the group axis of `favorsharp._heads`.
    key_mask : array or None
    feature_map : PositiveFeatureMap
        In the dtype of the computation; if heads are grouped, with the group axis.
    group : int
        Query heads that share a key head.
    is_causal : bool
    window : int
    xp : namespace
    dtype : dtype
        The dtype of the result.
    """

    q: Array
    k: Array
    v: Array
    key_mask: Array | None
    feature_map: Any
    group: int
    is_causal: bool
    window: int
    xp: Namespace
    dtype: DType

    @property
    def arguments(self) -> tuple[Array, Array, Array, Any]:
        """What every op of attention takes first."""
        return self.q, self.k, self.v, self.feature_map

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that every op of attention takes."""
        return {"key_mask": self.key_mask, "window": self.window}

    @property
    def key_batch(self) -> tuple[int, ...]:
        """The leading axes of a state of these keys."""
        mask = () if self.key_mask is None else self.key_mask.shape[:-1]
        return broadcast_shapes(self.k.shape[:-2], self.v.shape[:-2], self.feature_map.batch_shape, mask)

    def shape_with(self, state: State | None) -> tuple[int, ...]:
        """The shape of the result of a call, which may continue from a state; the state has the group axis too."""
        held = () if state is None else state.like.shape[:-2]
        batch = merged_batch(self.group, self.q.shape[:-2], self.key_batch, held)
        return (*batch, self.q.shape[-2], self.v.shape[-1])

    def empty_state(self, window: int, like: Array) -> State:
        """The state of no keys, for these keys."""
        return empty_state(self.feature_map, self.key_batch, self.k.shape[-1], self.v.shape[-1], window, like)

    def place(self, run: Implementation, out: Array | None) -> dict[str, Array]:
        """The keyword argument `out` if the implementation can write its result there, otherwise no argument."""
        if out is None or not run.takes_out or is_followed(out):
            return {}
        return {"out": split_heads(self.group, out)}

    def deliver(self, result: Array, out: Array | None, place: dict[str, Array] | None = None) -> Array:
        """The result with merged heads, in `out` if that is given; `place` is the result of the method `place`."""
        if place and result is place["out"]:
            assert out is not None
            return out
        result = merge_heads(self.group, result)
        if out is None:
            return result
        out[...] = result  # the package writes to an array of the caller only here
        return out


def checked(
    q: Array,
    k: Array,
    v: Array,
    feature_map: FeatureMap,
    *,
    is_causal: bool,
    window: int,
    key_mask: Array | None,
    enable_gqa: bool,
) -> Call:
    """Check the arguments that all forms of linear attention share, and prepare them."""
    xp, group = check_attention(q, k, v, is_causal=is_causal, key_mask=key_mask, enable_gqa=enable_gqa)
    check_map(feature_map, group, q=q, k=k)
    window = check_window(window, q, k)
    prepared = prepared_map(feature_map, compute_dtype(xp, q, k, v), grouped=group > 1)
    return Call(
        *grouped(group, q, k, v, key_mask),
        feature_map=prepared,
        group=group,
        is_causal=is_causal,
        window=window,
        xp=xp,
        dtype=result_dtype(xp, q, k, v),
    )


def check_positive(feature_map: Any) -> PositiveFeatureMap:
    """Check that a map has positive features."""
    if not isinstance(feature_map, FeatureMap):
        raise TypeError(f"feature_map must be a favorsharp.FeatureMap, got {type(feature_map).__name__}")
    if not isinstance(feature_map, PositiveFeatureMap):
        raise ValueError(
            f"feature_map of method {feature_map.parameters.method_name!r} is signed: its denominators can vanish, so "
            "attention refuses it; accepted: positive maps (kernel_matvec and nadaraya_watson take signed ones)"
        )
    return feature_map


def check_map(feature_map: Any, group: int, **named: Array) -> None:
    """Check that a map is positive and fits the library, device and shapes of the points."""
    check_positive(feature_map)
    check_floats(**named, feature_map=feature_map.projection)
    size = feature_map.parameters.size
    for name, x in named.items():
        check_same_size("d", **{name: (-1, x.shape[-1]), "feature_map": (-1, size)})
    batch = feature_map.batch_shape
    for name, x in named.items():
        leading = x.shape[:-2]
        if name == "q" and group > 1:
            leading = (*leading[:-1], leading[-1] // group)
        check_broadcast("(*b, n, d)", **{name: leading, "feature_map": batch})


def check_state(state: Any, feature_map: FeatureMap, **named: Array) -> None:
    """Check that a state was made by this map, and fits the library, device and leading axes of these arrays."""
    if not isinstance(state, State):
        raise TypeError(f"state must be a favorsharp.State, got {type(state).__name__}")
    check_floats(**named, state=state.like)
    own = feature_map.fingerprint if state.fingerprint is not None else None
    if state.num_features != feature_map.num_features or (own is not None and own != state.fingerprint):
        raise ValueError(
            f"state comes from another feature map: it is {state!r}, the map is {feature_map!r}; accepted: the map "
            "that made it, or one with the same numbers"
        )
    for name, x in named.items():
        if name != "q":
            check_broadcast("(*b, s, d)", **{name: x.shape[:-2], "state": state.like.shape[:-2]})


def check_continued(call: Call, state: Any, feature_map: FeatureMap, k: Array) -> State:
    """Check the state from which a call continues, and give it the group axis of the call."""
    check_state(state, feature_map, k=k)
    check_values(state, call.v)
    check_window_of_state(state.window, call.window, call.is_causal)
    return with_group_axis(call.group, state)


def check_values(state: State, v: Array) -> None:
    """Check that values have the size of those in the state."""
    if v.shape[-1] != state.v_size:
        raise ValueError(f"state and v must agree in e: state has e={state.v_size}, v has e={v.shape[-1]}")


def check_bounds(cu_seqlens: Any, n: int, s: int) -> list[int]:
    """Check the boundaries of packed sequences, and return them as host integers."""
    if n != s:
        raise ValueError(f"cu_seqlens needs as many queries as keys: q has n={n}, k has s={s}")
    if is_array(cu_seqlens):
        check_array("cu_seqlens", cu_seqlens)
        if not dtype_name(cu_seqlens).startswith(("int", "uint")):
            raise TypeError(f"cu_seqlens must hold integers, got dtype {dtype_name(cu_seqlens)}")
        if cu_seqlens.ndim != 1:
            raise ValueError(f"cu_seqlens must have one axis, got shape {tuple(cu_seqlens.shape)}")
        if is_traced(cu_seqlens):
            raise TypeError("cu_seqlens must be known while tracing: pass a list or tuple of ints")
        bounds = [int(bound) for bound in to_host(cu_seqlens)]
    elif isinstance(cu_seqlens, list | tuple):
        bounds = [check_integer("cu_seqlens", bound, 0) for bound in cu_seqlens]
    else:
        raise TypeError(f"cu_seqlens must be an integer array or a list of ints, got {type(cu_seqlens).__name__}")
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != n or any(b < a for a, b in pairwise(bounds)):
        shown = bounds if len(bounds) <= 12 else [*bounds[:6], "...", *bounds[-3:]]
        raise ValueError(f"cu_seqlens must start at 0, end at n={n} and ascend, got {shown}")
    return bounds
