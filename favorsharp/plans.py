"""Plans: the outcome of a call's checks and of its choice of an implementation, kept for later calls like it.

For one token, the checks and the choice take longer than the arithmetic. So `linear_attention` and `decode_step` keep
their outcome for each feature map, under a key. A later call with the same key skips the checks. So the checks of these
two functions must not look at anything but what the key holds:

- of each array: type, shape, dtype, device, layout and whether it needs a gradient; for `decode_step` also how it
  lies in memory (strides, alignment);
- of each plain option (bool, int, str and None): type and value;
- of the feature map: its arrays (the key changes if a tensor among them is written to, or begins or ceases to need a
  gradient);
- for `decode_step`, of the state: the same of its arrays as of the arguments, its window and its fingerprint;
- the backends that `use` or the environment asks for, and the global settings of the array library.

A map in the dtype of a computation, or with an axis for grouped heads, is kept in the same way (`prepared_map`):
backends find again what they derived from it.

If you add a check that looks at more, add that to `key_of`. tests/test_plans.py varies each argument of a call that has
a plan. See docs: design, calls like one before.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from favorsharp._arrays import signature_of, stamps_of
from favorsharp._autodiff import is_compiling, mode_of_library, records_gradients
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

_plans: WeakKeyDictionary[Any, dict[Hashable, Plan]] = WeakKeyDictionary()
"""The plans of each map by key. A plan that takes the map itself holds None for it, so that it can be freed."""


def key_of(
    feature_map: Any, *arguments: object, with_layout: bool = False, state: Hashable = ()
) -> tuple[Hashable, ...] | None:
    """The key of a call; None if the call has no key, so that its arguments must be checked.

    With `with_layout` the key also says how arrays lie in memory. `state` is what `layout_of` returns for the state.
    """
    mode = mode_of_library()
    if mode is None or state is None or (around := circumstances()) is None:
        return None
    held = getattr(feature_map, "arrays", None)  # read after the mode: compilers cannot trace a cached property
    if held is None:
        return None
    key: list[Hashable] = [mode, around, stamps_of(held), state]
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
    arrays = state.kv, state.z, state.c, state.recent_k, state.recent_v, state.recent_mask
    if state.known_layout is not None and not records_gradients(arrays):  # by now a tensor may need a gradient
        return state.known_layout
    parts = [signature_of(x, with_layout=True) for x in arrays]
    return None if None in parts else Layout((*parts, state.window, state.fingerprint))


def prepared_map(feature_map: Any, dtype: Any, *, grouped: bool = False) -> Any:
    """The map in a dtype, with an axis for grouped heads if wanted: for later calls the same object, or the map itself.

    A map whose tensors need gradients is prepared for each call, because the graph of one call must not be that of
    another; so is a map in traced calls, and one of a library other than NumPy and torch.
    """
    key = None
    if mode_of_library() is not None and (held := getattr(feature_map, "arrays", None)) is not None:
        stamps = stamps_of(held)
        trained = any(stamp is None or stamp[0] for stamp in stamps)
        if not trained and all(signature_of(x) is not None for x in held):
            key = ("prepared", dtype, grouped, stamps)
    if (plan := find(feature_map, key)) is not None:
        return plan.feature_map
    prepared: Any = astype(feature_map, dtype)
    if grouped:
        prepared = prepared.expanded()
    if key is not None and prepared is not feature_map:
        keep(feature_map, key, Plan(prepared_map, prepared))
    return prepared


def find(feature_map: Any, key: Hashable) -> Plan | None:
    """The plan that an earlier call of this map kept under the key, or None."""
    own = None if key is None else _plans.get(feature_map)
    plan = None if own is None else own.get(key)
    if plan is None or plan.feature_map is not None:
        return plan
    return Plan(plan.run, feature_map, plan.layout)


def keep(feature_map: Any, key: Hashable, plan: Plan) -> None:
    """Keep a plan for later calls that have this key."""
    own = _plans.setdefault(feature_map, {})
    while len(own) >= MOST:
        own.pop(next(iter(own)), None)
    own[key] = plan._replace(feature_map=None) if plan.feature_map is feature_map else plan
