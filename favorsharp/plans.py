"""Plans: the outcome of a call's checks and of its choice of an implementation, kept for later calls like it.

For one token, the checks and the choice take longer than the arithmetic. So `linear_attention`, `decode_step` and
`update` keep their outcome for each feature map, under a key, and a later call with the same key skips the checks.
Therefore the checks of these functions may only depend on what the key holds:

- of each array: type, shape, dtype, device, layout and whether it needs a gradient; for `decode_step` also how it
  lies in memory (strides, alignment);
- of each plain option (bool, int, str and None): type and value;
- of the feature map: its arrays (the key changes if a tensor among them is written to, or begins or ceases to need a
  gradient);
- for `decode_step` and `update`, of the state: the same of its arrays as for `decode_step`, its window and its
  fingerprint;
- the backends that `use` or the environment asks for, and the global settings of the array library.

A map in the dtype of a computation, or with an axis for grouped heads, is kept in the same way (`prepared_map`), so
that backends find again what they have derived from it.

If you add a check that depends on more, extend `key_of`. tests/test_plans.py varies each argument of a call that has a
plan. See docs: design, calls with the layout of an earlier call.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from favorsharp._arrays import signature_of
from favorsharp._autodiff import is_compiling, mode_of_library, records_gradients
from favorsharp._derived import derived, derived_unless_trained, made_from
from favorsharp._values import astype
from favorsharp.dispatch import circumstances
from favorsharp.ops.state import State


class Plan(NamedTuple):
    """The function that runs calls of one kind, the map that it takes, and the layout of the state that it returns."""

    run: Callable[..., Any]
    feature_map: Any
    layout: Hashable = None


class Layout:
    """The part of a key that describes a state; its hash is computed only once."""

    __slots__ = ("_hash", "parts")

    def __init__(self, parts: Hashable) -> None:
        self.parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.parts == other.parts


MOST = 64
"""The most plans kept for a map. If there are more, for example because lengths vary, the oldest is forgotten."""

_PLANS = "plans"
"""The key of a map's plans among what was made from it."""


def key_of(
    feature_map: Any, *arguments: object, with_layout: bool = False, state: Hashable = ()
) -> tuple[Hashable, ...] | None:
    """The key of a call; None if the call has no key, so that its arguments must be checked.

    With `with_layout` the key also holds the memory layout of arrays. `state` is the result of `layout_of` for the
    state.
    """
    mode = mode_of_library()
    if mode is None or state is None or (around := circumstances()) is None:
        return None
    if getattr(feature_map, "arrays", None) is None:  # after the mode: not traceable
        return None
    key: list[Hashable] = [mode, around, state]
    for x in arguments:
        part = signature_of(x, with_layout=with_layout)
        if part is None:
            return None
        key.append(part)
    return tuple(key)


def layout_of(state: State) -> Hashable:
    """The part of a key that describes a state; None if the call has no key."""
    if is_compiling():
        return None
    if state.known_layout is not None and not records_gradients(state.present):  # by now a tensor may need a gradient
        return state.known_layout
    arrays = state.kv, state.z, state.c, state.recent_k, state.recent_v, state.recent_mask
    parts = [signature_of(x, with_layout=True) for x in arrays]
    return None if None in parts else Layout((*parts, state.window, state.fingerprint))


def prepared_map(feature_map: Any, dtype: Any, *, grouped: bool = False) -> Any:
    """The map in a dtype, with an axis for grouped heads if wanted. Later calls get the same object.

    A map that needs no change is returned itself. Three kinds of maps are prepared for each call: maps whose tensors
    need gradients, because calls must not share a graph; maps in traced calls; and maps of libraries other than NumPy
    and torch.
    """

    def prepare() -> Any:
        prepared: Any = astype(feature_map, dtype)
        return prepared.expanded() if grouped else prepared

    held = None if mode_of_library() is None else getattr(feature_map, "arrays", None)
    if held is None or any(signature_of(x) is None for x in held):
        return prepare()
    key = "prepared", dtype, grouped
    prepared = derived_unless_trained(feature_map, key, lambda: _unless(feature_map, prepare()))
    return feature_map if prepared is None else prepared


def _unless(feature_map: Any, value: Any) -> Any:
    """The value; or None if it is the map itself, so that the store does not keep the map alive."""
    return None if value is feature_map else value


def find(feature_map: Any, key: Hashable) -> Plan | None:
    """The plan that an earlier call of this map kept under the key, or None."""
    if key is None:
        return None
    plan: Plan | None = made_from(feature_map).get(_PLANS, {}).get(key)
    if plan is None or plan.feature_map is not None:
        return plan
    return Plan(plan.run, feature_map, plan.layout)


def keep(feature_map: Any, key: Hashable, plan: Plan) -> None:
    """Keep a plan for later calls that have this key."""
    own = derived(feature_map, _PLANS, dict)
    while len(own) >= MOST:
        own.pop(next(iter(own)), None)
    own[key] = plan._replace(feature_map=_unless(feature_map, plan.feature_map))
