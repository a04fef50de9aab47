"""A store of what was made from a feature map: plans of calls, prepared maps, and the packed maps of backends.

Maps are frozen, but torch tensors that a map holds may be written to, or begin to need gradients. Then everything that
was made from the map is forgotten.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from favorsharp._arrays import stamps_of


class _Made(NamedTuple):
    """What was made from a map while its tensors had these stamps, by key."""

    stamps: tuple[Any, ...]
    by_key: dict[Hashable, Any]


_stores: "WeakKeyDictionary[Any, _Made]" = WeakKeyDictionary()


def _store_of(feature_map: Any) -> _Made:
    stamps = stamps_of(feature_map.arrays)
    store = _stores.get(feature_map)
    if store is None or store.stamps != stamps:
        store = _stores[feature_map] = _Made(stamps, {})
    return store


def made_from(feature_map: Any) -> dict[Hashable, Any]:
    """What was made from the present numbers of a map, by key; nothing in it may refer to the map itself."""
    return _store_of(feature_map).by_key


def derived(feature_map: Any, key: Hashable, make: Callable[[], Any]) -> Any:
    """The value that was made from the present numbers of a map under a key, or a new one from `make`."""
    return _from(_store_of(feature_map), key, make)


def _from(store: _Made, key: Hashable, make: Callable[[], Any]) -> Any:
    if key not in store.by_key:
        store.by_key[key] = make()
    return store.by_key[key]


def derived_unless_trained(feature_map: Any, key: Hashable, make: Callable[[], Any]) -> Any:
    """As `derived`, but always a new value if a tensor of the map needs gradients, or was made in inference mode.

    Changes of inference tensors cannot be noticed, and a value with gradients has a graph that belongs to one call.
    """
    store = _store_of(feature_map)
    if any(stamp is None or stamp[0] for stamp in store.stamps):
        return make()
    return _from(store, key, make)
