"""The mergeable state of linear attention, in numbers that never overflow (docs: theory, the stabiliser).

With log query features lq and log key features lk, the state of a set of keys is

    c = max_j lk_j,    z = sum_j exp(lk_j - c),    S = sum_j exp(lk_j - c) v_j

for each feature. A query reads it with the weights exp(lq + c - r), where r = max over features of (lq + c). The
feature that attains r has a key at which it attains c, so the denominator is at least 1 and needs no epsilon. All
references of attention are built from these functions and from those of `favorsharp.ops.partials`.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from favorsharp._arrays import (
    broadcast_shapes,
    cast,
    compute_dtype,
    namespace_of,
    on_device_of,
    under_own_settings,
)
from favorsharp._checks import check_broadcast, check_together
from favorsharp._nonfinite import hide, masked
from favorsharp._typing import Array, PositiveMap
from favorsharp._values import fields_alone
from favorsharp.dispatch import Op
from favorsharp.moments import combine
from favorsharp.ops.compensated_sums import added, has_low_parts, sums_of
from favorsharp.ops.partials import Partial, exact_partial, finish, finite, merge
from favorsharp.ops.tiles import tiles_of
from favorsharp.ops.window_rule import num_leaving


def log_features(feature_map: PositiveMap, side: str, x: Array) -> Array:
    """Log features of queries or keys (`side`), computed without kernels, because references must not run any.

    The methods of this package's maps may run kernels; for maps of other classes, their methods are called.
    """
    own: Callable[[str, Array], Array] | None = getattr(feature_map, "log_features", None)
    if own is not None:
        return own(side, x)
    return feature_map.log_query(x) if side == "query" else feature_map.log_key(x)


@dataclass(frozen=True, eq=False, repr=False)
class State:
    """The sums over all keys and values that linear attention has seen; their size does not grow.

    Attributes
    ----------
    kv : array, shape (*b, m, e)
        S, float32 at least.
    z : array, shape (*b, 1, m)
    c : array, shape (*b, 1, m)
        Largest log key feature; -inf before the first visible key.
    window : int
        Block length of exactly scored keys; 0 for none.
    recent_k, recent_v : array, shape (*b, r, d) and (*b, r, e)
        With a window, the last r <= 2 window keys and values: the current block and the one before. They begin on a
        block boundary and are not in kv yet. r = 0 without a window.
    recent_mask : array of bool, shape (*b, r)
    fingerprint : str or None
        The fingerprint of the feature map that made the state.
    kv_low, z_low : array or None, shapes of kv and z
        Low parts: the rounding errors of kv and z, at most half a unit in their last place. Whoever adds keys to kv and
        z adds these too, so that the error does not grow with the number of keys; reading a state may ignore them.
        None stands for zeros. A float64 state has none.

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 64, 8))
    >>> feature_map = fs.feature_map(fs.fit(q, k), 32, rng=0)
    >>> empty = fs.init_state(feature_map, v_size=8, like=k)
    >>> first, second = (fs.update(empty, k[part], v[part], feature_map) for part in (slice(40), slice(40, 64)))
    >>> fs.combine(first, second)
    State(num_features=32, v_size=8, batch=(), window=0, recent=0)
    """

    kv: Array
    z: Array
    c: Array
    window: int
    recent_k: Array
    recent_v: Array
    recent_mask: Array
    fingerprint: str | None
    kv_low: Array | None = field(default_factory=lambda: None)  # not set on the class, because of __getattr__
    z_low: Array | None = field(default_factory=lambda: None)

    known_layout: ClassVar[Hashable] = None
    """What `favorsharp.plans.layout_of` gives for this state, if it is known; set on results of `decode_step`."""
    single_tokens: ClassVar[Any] = None
    """Tokens that a backend keeps beside a state, from which the state computes its sums (`unsettled`)."""
    store: ClassVar[Any] = None
    """A backend's memory for a state with a window: it holds the state's keys, and has room for further ones
    (`in_store`)."""

    def remember(self, name: str, value: Any) -> None:
        """Attach `known_layout`, `single_tokens` or `store`. They are not part of the value: `replace` drops them."""
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        """Compute the fields that `unsettled` or `in_store` left out, when one of them is first read."""
        if name in _SUMS and "single_tokens" in vars(self):
            found = self.single_tokens.sums()
        elif name in _RECENT and "store" in vars(self):
            found = self.store.recent()
        else:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        for field_name, array in found.items():
            self.remember(field_name, array)
        return vars(self)[name]

    def __getstate__(self) -> dict[str, Any]:
        """The fields of the dataclass, without anything that was attached."""
        return fields_alone(self)

    @property
    def like(self) -> Array:
        """An array with the shape, dtype and device of kv."""
        return self.kv if "kv" in vars(self) else self.single_tokens.like

    @property
    def present(self) -> tuple[Array, ...]:
        """The arrays other than low parts, without those that have not been computed."""
        known = vars(self)
        return tuple(known[name] for name in _ARRAYS if name in known)

    @property
    def num_features(self) -> int:
        """The number of features, m."""
        return int(self.like.shape[-2])

    @property
    def v_size(self) -> int:
        """The size of a value, e."""
        return int(self.like.shape[-1])

    def __repr__(self) -> str:
        return (
            f"State(num_features={self.num_features}, v_size={self.v_size}, batch={tuple(self.like.shape[:-2])}, "
            f"window={self.window}, recent={self.recent_k.shape[-2]})"
        )


def empty_state(feature_map: PositiveMap, batch: tuple[int, ...], d: int, e: int, window: int, like: Array) -> State:
    """The state of no keys, in the library, on the device and in the dtype of like; the caller sets its fingerprint."""
    xp = namespace_of(like)
    dtype = compute_dtype(xp, like)
    m = feature_map.num_features
    device = on_device_of(like)
    kv = xp.zeros((*batch, m, e), dtype=dtype, **device)
    none = xp.zeros((*batch, 1, m), dtype=dtype, **device)
    low = has_low_parts(kv)
    return State(
        kv=kv,
        z=none,
        c=none - xp.inf,
        window=window,
        recent_k=xp.zeros((*batch, 0, d), dtype=like.dtype, **device),
        recent_v=xp.zeros((*batch, 0, e), dtype=like.dtype, **device),
        recent_mask=xp.zeros((*batch, 0), dtype=xp.bool, **device),
        fingerprint=None,
        kv_low=xp.zeros_like(kv) if low else None,
        z_low=xp.zeros_like(none) if low else None,
    )


_SUMS = ("kv", "z", "c", "kv_low", "z_low")
_RECENT = ("recent_k", "recent_v", "recent_mask")
_ARRAYS = ("kv", "z", "c", *_RECENT)
_OTHERS = ("window", "recent_k", "recent_v", "recent_mask", "fingerprint")
_BATCHED = ("kv", "z", "c", "recent_k", "recent_v", "kv_low", "z_low")


def with_group_axis(group: int, state: State) -> State:
    """The state with a further axis after the key heads, for the query heads that read each of them."""
    if group == 1:
        return state
    return replace(
        state,
        **{name: x[..., None, :, :] for name in _BATCHED if (x := getattr(state, name)) is not None},
        recent_mask=state.recent_mask[..., None, :],
    )


def without_group_axis(group: int, state: State) -> State:
    """Undo `with_group_axis`."""
    if group == 1:
        return state
    return replace(
        state,
        **{name: x[..., 0, :, :] for name in _BATCHED if (x := getattr(state, name)) is not None},
        recent_mask=state.recent_mask[..., 0, :],
    )


def unsettled(state: State, tokens: Any) -> State:
    """A state that computes its sums when they are read, by `tokens.sums()`, which returns the sums after these tokens.

    `tokens.like` is an array with the shape, dtype and device of its kv. All other fields are those of `state`.
    """
    after = object.__new__(State)
    after.__dict__.update({name: getattr(state, name) for name in _OTHERS}, single_tokens=tokens)
    return after


def in_store(others: dict[str, Any], store: Any) -> State:
    """A state whose recent keys are in a store; `store.recent()` returns them, and `others` holds the other fields."""
    after = object.__new__(State)
    after.__dict__.update(others, store=store)
    return after


def with_sums(state: State, kv: Array, z: Array, c: Array, **others: Any) -> State:
    """The state with other sums and without low parts."""
    return replace(state, kv=kv, z=z, c=c, kv_low=None, z_low=None, **others)


@Op
def update(state: State, k: Array, v: Array, feature_map: PositiveMap, *, key_mask: Array | None = None) -> State:
    """The state after a further block of keys and values.

    Parameters
    ----------
    state : State
    k : array, shape (*b, s, d)
    v : array, shape (*b, s, e)
    feature_map : PositiveFeatureMap
    key_mask : array of bool, shape (*b, s), optional
        True where a key is visible.

    Returns
    -------
    State
        A new state. With a window, blocks enter the features once they are not among the last two.
    """
    if state.window == 0:
        return absorb(state, k, v, key_mask, feature_map)
    k, v, mask = with_recent(state, k, v, key_mask)
    leaving = num_leaving(k.shape[-2], state.window)
    state = absorb(state, k[..., :leaving, :], v[..., :leaving, :], mask[..., :leaving], feature_map)
    xp = namespace_of(k)
    batch = broadcast_shapes(k.shape[:-2], v.shape[:-2], mask.shape[:-1])
    return replace(
        state,
        recent_k=xp.broadcast_to(k[..., leaving:, :], (*batch, *k[..., leaving:, :].shape[-2:])),
        recent_v=xp.broadcast_to(v[..., leaving:, :], (*batch, *v[..., leaving:, :].shape[-2:])),
        recent_mask=xp.broadcast_to(mask[..., leaving:], (*batch, mask[..., leaving:].shape[-1])),
    )


@Op
def read(state: State, q: Array, feature_map: PositiveMap) -> Array:
    """Attention of queries to every key of a state.

    Parameters
    ----------
    state : State
    q : array, shape (*b, n, d)
    feature_map : PositiveFeatureMap

    Returns
    -------
    array, shape (*b, n, e)
        In the dtype of q; zeros where no key is visible. Keys that a window keeps are scored exactly.
    """
    xp = namespace_of(q)
    tiles = []
    width = max(state.num_features, state.recent_k.shape[-2])
    for start, stop in tiles_of(q.shape[-2], width, broadcast_shapes(q.shape[:-2], state.kv.shape[:-2])):
        tile = cast(q[..., start:stop, :], state.kv.dtype)
        partial = read_partial(state, log_features(feature_map, "query", tile))
        if state.recent_k.shape[-2] > 0:
            k, v = cast(state.recent_k, tile.dtype), cast(state.recent_v, tile.dtype)
            visible = state.recent_mask[..., None, :]
            near = exact_partial(feature_map.log_kernel(tile, k), visible, hide(v, state.recent_mask))
            partial = merge(partial, near)
        tiles.append(cast(finish(partial), q.dtype))
    return tiles[0] if len(tiles) == 1 else xp.concat(tiles, axis=-2)


@Op
def decode_step(
    q: Array, k: Array, v: Array, state: State, feature_map: PositiveMap, *, key_mask: Array | None = None
) -> tuple[Array, State]:
    """One token: the state takes its key and value, and its query reads the state.

    Parameters
    ----------
    q : array, shape (*b, 1, d)
    k : array, shape (*b, 1, d)
    v : array, shape (*b, 1, e)
    state : State
    feature_map : PositiveFeatureMap
    key_mask : array of bool, shape (*b, 1), optional

    Returns
    -------
    out : array, shape (*b, 1, e)
    state : State
    """
    state = update.reference(state, k, v, feature_map, key_mask=key_mask)
    return read.reference(state, q, feature_map), state


@combine.register
def _combine_states(a: State, b: Any) -> State:
    if not isinstance(b, State):
        raise TypeError(f"combine takes two Moments or two States, got State and {type(b).__name__}")
    if a.fingerprint is not None and b.fingerprint is not None and a.fingerprint != b.fingerprint:
        raise ValueError("combine needs states of one feature map: a and b come from different feature maps")
    if (a.window, a.num_features, a.v_size) != (b.window, b.num_features, b.v_size):
        raise ValueError(f"combine needs states of one kind: a is {a!r}, b is {b!r}")
    if a.recent_k.shape[-2] and b.recent_k.shape[-2]:
        raise ValueError(
            "states with a window cannot be combined unless one is empty: the blocks of b would move; "
            "use window=0, or update a with b's keys and values"
        )
    check_together(a=a.kv, b=b.kv)
    check_broadcast("states", a=a.kv.shape[:-2], b=b.kv.shape[:-2])
    last = b if b.recent_k.shape[-2] else a
    merged = _merged(a, b.kv, b.z, b.c, (b.kv_low, b.z_low))
    return replace(
        merged,
        recent_k=last.recent_k,
        recent_v=last.recent_v,
        recent_mask=last.recent_mask,
        fingerprint=a.fingerprint if b.fingerprint is None else b.fingerprint,
    )


def absorb(state: State, k: Array, v: Array, key_mask: Array | None, feature_map: PositiveMap) -> State:
    """The state after taking keys and values into its features, a tile at a time."""
    batch = broadcast_shapes(state.kv.shape[:-2], k.shape[:-2], v.shape[:-2])
    for start, stop in tiles_of(k.shape[-2], state.num_features, batch):
        if start == stop:
            continue
        mask = None if key_mask is None else key_mask[..., start:stop]
        lk = masked(log_features(feature_map, "key", hide(cast(k[..., start:stop, :], state.kv.dtype), mask)), mask)
        state = absorb_features(state, lk, hide(cast(v[..., start:stop, :], state.kv.dtype), mask))
    return state


def absorb_features(state: State, lk: Array, v: Array) -> State:
    """The state after taking in keys given by their log features; masked keys need -inf there and 0 in v."""
    xp = namespace_of(lk)
    c = xp.max(lk, axis=-2, keepdims=True)
    p = xp.exp(lk - finite(c))
    return _merged(state, *sums_of(p, v), c)


def read_partial(state: State, lq: Array) -> Partial:
    """Partial sums of queries, given by their log features, over the features of a state."""
    xp = namespace_of(lq)
    shifted = lq + state.c
    ref = xp.max(shifted, axis=-1, keepdims=True)
    p = xp.exp(shifted - finite(ref))
    return Partial(p @ state.kv, p @ xp.matrix_transpose(state.z), ref)


def with_recent(state: State, k: Array, v: Array, key_mask: Array | None) -> tuple[Array, Array, Array]:
    """The keys, values and mask that a windowed state keeps, followed by new ones."""
    xp = namespace_of(k, v)
    mask = xp.ones_like(k[..., 0], dtype=xp.bool) if key_mask is None else key_mask
    batch = broadcast_shapes(state.recent_mask.shape[:-1], mask.shape[:-1])
    mask = xp.concat(
        [xp.broadcast_to(x, (*batch, x.shape[-1])) for x in (state.recent_mask, mask)],
        axis=-1,
    )
    return _joined(state.recent_k, k), _joined(state.recent_v, v), mask


@under_own_settings
def _merged(
    state: State, kv: Array, z: Array, c: Array, low: tuple[Array | None, Array | None] = (None, None)
) -> State:
    """The state merged with the (kv, z, c) of further keys and the low parts of these kv and z."""
    xp = namespace_of(c)
    top = xp.maximum(state.c, c)
    safe = finite(top)
    old, new = xp.exp(state.c - safe), xp.exp(c - safe)
    scales = xp.matrix_transpose(old), xp.matrix_transpose(new)
    kv, kv_low = added(scales, (state.kv, kv), (state.kv_low, low[0]))
    z, z_low = added((old, new), (state.z, z), (state.z_low, low[1]))
    return replace(state, kv=kv, z=z, c=top, kv_low=kv_low, z_low=z_low)


def _joined(a: Array, b: Array) -> Array:
    xp = namespace_of(a, b)
    batch = broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return xp.concat([xp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (cast(a, b.dtype), b)], axis=-2)
