"""Plans: what the checks and the choice of one call came to, kept for later calls like it.

Checks and choice take longer than the arithmetic of one token. So `linear_attention` and `decode_step` keep their
outcome for each feature map, under a key that holds everything on which the outcome depends. A check of these functions
may look at no more than this:

- the type, shape, dtype, device, layout and need of a gradient of each array, and for one token its memory layout;
- the type and value of each plain option (bool, int, str and None);
- the arrays of the map, as long as no tensor of it is written to or changes its need of a gradient;
- for one token, the same of the arrays in the state, its window and its fingerprint;
- the backends that `use` or the environment asks for, and the global settings of the array library.

tests/test_plans.py varies each argument of a call that has a plan. See docs: design, calls like one before.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from favorsharp._arrays import is_compiling, mode_of_library, records_gradients, signature_of, stamps_of
from favorsharp.dispatch import circumstances
from favorsharp.ops.state import State


class Plan(NamedTuple):
    """The function that runs calls of one kind, the map that it takes, and the layout of the state that it returns."""

    run: Callable[..., Any]
    feature_map: Any
    layout: Hashable = None


class Layout:
    """The part of a key that stands for a state: a value that computes its hash once."""

    __slots__ = ("_hash", "parts")

    def __init__(self, parts: Hashable) -> None:
        self.parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.parts == other.parts


MOST = 64
"""Plans kept for each map; when there are more, for example as lengths vary, the oldest is forgotten."""

_plans: WeakKeyDictionary[Any, dict[Hashable, Plan]] = WeakKeyDictionary()
"""The plans of each map by key. None stands for the map itself in its own plans, so that it can be freed."""


def key_of(
    feature_map: Any, *arguments: object, with_layout: bool = False, state: Hashable = ()
) -> tuple[Hashable, ...] | None:
    """The key of a call; None if it has none and must be checked.

    With `with_layout` it includes how arrays lie in memory. `state` is what `layout_of` gives for the state.
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
    """The part of a key that stands for a state; None if the checks must run each time."""
    if is_compiling():
        return None
    arrays = state.kv, state.z, state.c, state.recent_k, state.recent_v, state.recent_mask
    if state.known_layout is not None and not records_gradients(arrays):  # a tensor may need gradients by now
        return state.known_layout
    parts = [signature_of(x, with_layout=True) for x in arrays]
    return None if None in parts else Layout((*parts, state.window, state.fingerprint))


def find(feature_map: Any, key: Hashable) -> Plan | None:
    """The plan that an earlier call of this map kept under the key, or None."""
    own = None if key is None else _plans.get(feature_map)
    plan = None if own is None else own.get(key)
    if plan is None or plan.feature_map is not None:
        return plan
    return Plan(plan.run, feature_map, plan.layout)


def keep(feature_map: Any, key: Hashable, plan: Plan) -> None:
    """Keep a plan under the key of its call."""
    own = _plans.setdefault(feature_map, {})
    while len(own) >= MOST:
        own.pop(next(iter(own)), None)
    own[key] = plan._replace(feature_map=None) if plan.feature_map is feature_map else plan
