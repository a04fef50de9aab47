"""The state of a stream of landmarks: weighted keys, of which the last ones are exact; and how it is compressed.

A key enters as it is, with log weight 0. When the state holds m + room keys, apart from those in the last block of the
window, these keys are compressed to m landmarks, which are chosen with the moments of all queries and keys seen so far.
Whether a compression is due depends only on the numbers of keys seen and held, so chunks of any length give the same
stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from favorsharp._arrays import (
    broadcast_shapes,
    cast,
    compute_dtype,
    dtype_name,
    is_on_gpu,
    namespace_of,
    on_device_of,
    result_dtype,
    under_own_settings,
)
from favorsharp._autodiff import without_gradient
from favorsharp._checks import check_broadcast, check_together
from favorsharp._heads import add_mask_axis
from favorsharp._nonfinite import hide
from favorsharp._typing import Array, DType
from favorsharp._values import fields_alone
from favorsharp.exact import gaussian_rows
from favorsharp.landmarks.chosen import LandmarkMap
from favorsharp.landmarks.metric import RIDGE, STREAM_RIDGE, metric_of
from favorsharp.landmarks.settings import Landmarks
from favorsharp.moments import Moments, combine, moments, point_moments, weighted_moments
from favorsharp.ops.landmarks import choose_landmarks, condense
from favorsharp.ops.weighted_attention import read_rows, weighted_attention


@dataclass(frozen=True, eq=False, repr=False)
class LandmarkState:
    """Weighted keys that stand for all keys seen so far; any exact attention that takes a bias can read them.

    The output of a query q is the mean of `values` with the weights exp(log_weight) K(q, keys): for the softmax kernel,
    attention over `keys` with the bias `log_weight`; for the Gaussian kernel, the same with the bias
    `log_weight - scale |keys|^2 / 2`.

    Attributes
    ----------
    keys : array, shape (*b, m', d)
        Not scaled. Landmarks first, then exact keys in their order. The dtype is float32 at least.
    log_weight : array, shape (*b, m')
        0 for an exact key, -inf for a masked one and for an unused landmark.
    values : array, shape (*b, m', e)
    num_seen : int
        The number of keys seen, masked ones included.
    window : int
        Block length of the keys that stay exact; 0 for none.
    moments : Moments
        Of the queries and keys seen.
    settings : Landmarks

    Examples
    --------
    >>> import numpy as np, favorsharp as fs
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 200, 8))
    >>> lm = fs.landmarks(32)
    >>> out, state = fs.linear_attention(q, k, v, lm, is_causal=True, return_state=True)
    >>> state
    LandmarkState(num_landmarks=32, held=40, d=8, v_size=8, batch=(), window=0, num_seen=200)
    >>> logits = q[-1:] @ state.keys.T * 8**-0.5 + state.log_weight
    >>> weights = np.exp(logits - logits.max())
    >>> np.allclose(out[-1:], weights @ state.values / weights.sum())
    True
    """

    keys: Array
    log_weight: Array
    values: Array
    num_seen: int
    window: int
    moments: Moments
    settings: Landmarks

    store: ClassVar[Any] = None
    """A backend's memory for the state of a token: it holds the state, and has room for further keys."""
    next_token: ClassVar[Any] = None
    """What `decode_step` keeps of its checks for the next token."""

    def remember(self, name: str, value: Any) -> None:
        """Attach `store` or `next_token`. They are not part of the value: `replace` drops them."""
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        """Compute the moments of a state that `grown` made, when they are first read."""
        if name != "moments" or "pending" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        before, queries, start, grouped = vars(self)["pending"]
        d, held = self.keys.shape[-1], self.held
        seen = moments_of(queries[..., start:held, :d], self.keys[..., start:, :], None, grouped=grouped)
        self.remember("moments", combine(before, seen))
        return self.moments

    def __getstate__(self) -> dict[str, Any]:
        """The fields of the dataclass, without anything that was attached."""
        return fields_alone(self)

    @property
    def v_size(self) -> int:
        """The size of a value, e."""
        return int(self.values.shape[-1])

    @property
    def held(self) -> int:
        """The number of weighted keys, m'."""
        return int(self.keys.shape[-2])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes."""
        return broadcast_shapes(self.keys.shape[:-2], self.log_weight.shape[:-1], self.values.shape[:-2])

    def __repr__(self) -> str:
        return (
            f"LandmarkState(num_landmarks={self.settings.num_landmarks}, held={self.held}, d={self.keys.shape[-1]}, "
            f"v_size={self.v_size}, batch={self.batch_shape}, window={self.window}, num_seen={self.num_seen})"
        )


def empty_landmarks(
    settings: Landmarks, batch: tuple[int, ...], d: int, e: int, window: int, like: Array
) -> LandmarkState:
    """The state of no keys, in the library, on the device and in the dtype (float32 at least) of like."""
    xp = namespace_of(like)
    kind = {"dtype": compute_dtype(xp, like), **on_device_of(like)}
    none = xp.zeros((*batch, 0, d), **kind)
    return LandmarkState(
        keys=none,
        log_weight=xp.zeros((*batch, 0), **kind),
        values=xp.zeros((*batch, 0, e), **kind),
        num_seen=0,
        window=window,
        moments=moments(none, none),
        settings=settings,
    )


def no_keys(settings: Landmarks, q: Array, k: Array, v: Array, key_mask: Array | None, window: int) -> LandmarkState:
    """The state with which a call of attention begins: of no keys, with the leading axes of keys, values and mask."""
    like = cast(k[..., :0, :], compute_dtype(namespace_of(q, k, v), q, k, v))
    batch = broadcast_shapes(k.shape[:-2], v.shape[:-2], () if key_mask is None else key_mask.shape[:-1])
    return empty_landmarks(settings, batch, k.shape[-1], v.shape[-1], window, like)


class Segment(NamedTuple):
    """Keys start .. stop of a call, between two compressions.

    If `due`, the `before` keys that the state holds are compressed before the first key enters, with the random numbers
    of the event `seen`, the number of keys seen. Afterwards the state holds `held` keys.
    """

    start: int
    stop: int
    due: bool
    seen: int
    before: int
    held: int


def segments_of(state: LandmarkState, length: int) -> Iterator[Segment]:
    """The segments of a call with so many keys; at least one, which is empty if there is no key."""
    start, held, seen = 0, state.held, state.num_seen
    while True:
        before = held
        if due := _until_due(state, held, seen) == 0:
            held = state.settings.num_landmarks + state.window
        stop = min(length, start + _until_due(state, held, seen))
        yield Segment(start, stop, due, seen, before, held)
        held, seen, start = held + stop - start, seen + stop - start, stop
        if start == length:
            return


def _until_due(state: LandmarkState, held: int, seen: int) -> int:
    """The number of keys that can enter before the next compression; 0 if it is due before the next key."""
    full = state.settings.num_landmarks + state.settings.room
    needed = max(0, full - (held - state.window))
    return needed + -(seen + needed) % max(state.window, 1)


def moments_of(q: Array | None, k: Array, key_mask: Array | None, *, grouped: bool = False) -> Moments:
    """Moments of queries and keys, without masked points and points that are not finite.

    If there are as many queries as keys, the mask applies to queries too. Grouped queries have one more axis than keys,
    before the last two, for the heads that share a key head; these heads are pooled.
    """
    xp = namespace_of(k)
    k = without_gradient(k)
    grouped = grouped and q is not None
    q = k[..., :0, :] if q is None else without_gradient(q)
    mask_x = key_mask if q.shape[-2] == k.shape[-2] else None
    if grouped:
        *batch, group, n, d = q.shape
        q = xp.reshape(q, (*batch, group * n, d))
        if mask_x is not None:
            mask_x = xp.broadcast_to(add_mask_axis(mask_x), (*mask_x.shape[:-1], group, n))
            mask_x = xp.reshape(mask_x, (*mask_x.shape[:-2], group * n))
    dtype = dtype_name(compute_dtype(xp, q, k))
    return Moments(*point_moments(q, mask_x), *point_moments(k, key_mask), dtype=dtype)


def landmark_map(
    k: Array, log_weight: Array, seen: Moments, settings: Landmarks, *, ridge: float = RIDGE, event: int = 0
) -> LandmarkMap:
    """Choose landmarks for keys with log weights, -inf for hidden ones, (*b, s, d) and (*b, s)."""
    scale = settings.scale_of(k.shape[-1])
    metric = metric_of(seen, settings, ridge, log_weight.dtype)
    points, used = choose_landmarks(
        k,
        log_weight,
        metric,
        num_landmarks=settings.num_landmarks,
        steps=settings.steps,
        kernel=settings.kernel,
        scale=scale,
        seed=settings.seed,
        event=event,
    )
    return LandmarkMap(points, used, metric, settings.kernel, scale)


def condensed(
    chosen: LandmarkMap, k: Array, log_weight: Array, v: Array, *, conserving: bool = False
) -> tuple[Array, Array, Array]:
    """Replace keys with log weights by landmarks: points that are not scaled, log weights, and mean values.

    (*b, s, d), (*b, s), (*b, s, e) -> (*b, m, d), (*b, m), (*b, m, e). Conserving weights are for keys that are
    compressed repeatedly, because weights of least squared error make kernels smaller each time.
    """
    given = chosen.points, chosen.used, chosen.metric
    return condense(k, log_weight, v, *given, kernel=chosen.kernel, scale=chosen.scale, conserving=conserving)


@under_own_settings
def read_landmarks(
    q: Array,
    keys: Array,
    log_weight: Array,
    values: Array,
    settings: Landmarks,
    causal_from: int | None = None,
) -> Array:
    """Attention of queries to weighted keys, in the dtype of the log weights.

    With `causal_from`, the keys from this position on belong to the queries, and each query sees those up to its own.
    """
    scale = settings.scale_of(q.shape[-1])
    if settings.kernel == "softmax":
        out: Array = weighted_attention(q, keys, log_weight, values, scale=scale, causal_from=causal_from)
        return out
    dtype = log_weight.dtype
    keys = hide(cast(keys, dtype), log_weight != -namespace_of(keys).inf)
    logs = gaussian_rows(cast(q, dtype), keys, scale, waits=not is_on_gpu(q))
    batch = broadcast_shapes(q.shape[:-2], keys.shape[:-2], log_weight.shape[:-1], values.shape[:-2])
    shape = (*batch, q.shape[-2])
    return read_rows(lambda start, stop: cast(logs(start, stop), dtype), shape, log_weight, values, causal_from)


def log_weights(k: Array, key_mask: Array | None, dtype: DType) -> Array:
    """Log weights of exact keys: 0, and -inf for those that a mask hides."""
    xp = namespace_of(k)
    weight = xp.zeros(k.shape[:-1], dtype=dtype, **on_device_of(k))
    return weight if key_mask is None else xp.where(key_mask, weight, -xp.inf)


def extended(
    state: LandmarkState, q: Array | None, k: Array, v: Array, key_mask: Array | None, *, grouped: bool = False
) -> LandmarkState:
    """The state with further exact keys, and with the moments of further queries."""
    dtype = state.log_weight.dtype
    return replace(
        state,
        keys=_joined(state.keys, cast(k, dtype), 2),
        log_weight=_joined(state.log_weight, log_weights(k, key_mask, dtype), 1),
        values=_joined(state.values, cast(v, dtype), 2),
        num_seen=state.num_seen + k.shape[-2],
        moments=combine(state.moments, moments_of(q, k, key_mask, grouped=grouped)),
    )


def grown(
    state: LandmarkState,
    keys: Array,
    log_weight: Array,
    values: Array,
    before: Moments,
    queries: Array,
    start: int,
    grouped: bool,
) -> LandmarkState:
    """The state with a further exact key; its moments are computed when they are first read.

    They combine `before` with the moments of the queries (*b, n, d), or (*b, g, n, d) if `grouped`, and of the keys
    from the position `start` on. The array of queries may be longer than that of the keys, and have more coordinates.
    """
    after = object.__new__(LandmarkState)
    own = {"keys": keys, "log_weight": log_weight, "values": values, "num_seen": state.num_seen + 1}
    pending = before, queries, start, grouped
    vars(after).update(own, window=state.window, settings=state.settings, pending=pending)
    return after


def compressed(state: LandmarkState, keep: int, *, once: bool = False, event: int = 0) -> LandmarkState:
    """The state with its keys condensed to m landmarks, except for the last `keep`.

    With `once`, all queries are known, and the landmarks will not be compressed again.
    """
    old, new = slice(0, state.held - keep), slice(state.held - keep, state.held)
    k, log_weight, v = state.keys[..., old, :], state.log_weight[..., old], state.values[..., old, :]
    ridge = RIDGE if once else STREAM_RIDGE
    chosen = landmark_map(k, log_weight, state.moments, state.settings, ridge=ridge, event=event)
    points, mass, means = condensed(chosen, k, log_weight, v, conserving=not once and conserves_means(state.settings))
    return replace(
        state,
        keys=_joined(points, state.keys[..., new, :], 2),
        log_weight=_joined(mass, state.log_weight[..., new], 1),
        values=_joined(means, state.values[..., new, :], 2),
    )


def conserves_means(settings: Landmarks) -> bool:
    """Whether compressions of a stream conserve the mean kernel of a key; only attention profits from it."""
    return settings.kernel == "softmax"


def reduced(state: LandmarkState, keep: int = 0) -> LandmarkState:
    """The state with no more keys than landmarks, apart from the last `keep`; all queries are known."""
    return state if state.held - keep <= state.settings.num_landmarks else compressed(state, keep, once=True)


def map_of_points(x: Array, settings: Landmarks, weight: Array | None = None) -> LandmarkMap:
    """Landmarks for points (n, d) with positive weights (n,), to be read at points like them."""
    return landmark_map(x, *_mass_and_moments(x, weight), settings)


@under_own_settings
def state_of_points(x: Array, v: Array, settings: Landmarks, weight: Array | None = None) -> LandmarkState:
    """The state of points (n, d) with values (n, e) and positive weights (n,), to be read at points like them."""
    return state_with(x, v, *_mass_and_moments(x, weight), settings)


@under_own_settings
def state_with(k: Array, v: Array, log_weight: Array, seen: Moments, settings: Landmarks) -> LandmarkState:
    """The state of keys (*b, s, d) with values and log weights (*b, s), compressed at once with the given moments."""
    dtype = log_weight.dtype
    state = LandmarkState(cast(k, dtype), log_weight, cast(v, dtype), k.shape[-2], 0, seen, settings)
    return reduced(state)


def _mass_and_moments(x: Array, weight: Array | None) -> tuple[Array, Moments]:
    """Log weights of points, and their moments as queries and as keys."""
    xp = namespace_of(x)
    dtype = compute_dtype(xp, x)
    if weight is None:
        return log_weights(x, None, dtype), moments(x, x)
    return xp.log(cast(weight, dtype)), weighted_moments(x, weight)


def entered(state: LandmarkState, segment: Segment) -> LandmarkState:
    """The state, compressed if that is due before a segment enters."""
    return compressed(state, state.window, event=segment.seen) if segment.due else state


@combine.register
def _combine_landmarks(a: LandmarkState, b: Any) -> LandmarkState:
    if not isinstance(b, LandmarkState):
        raise TypeError(f"combine takes two values of one type, got LandmarkState and {type(b).__name__}")
    if a.settings != b.settings:
        raise ValueError(f"combine needs states of one feature map: a has {a.settings}, b has {b.settings}")
    sizes = [(s.window, s.keys.shape[-1], s.v_size) for s in (a, b)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"combine needs states of one kind: a is {a!r}, b is {b!r}")
    if a.window and a.num_seen and b.num_seen:
        raise ValueError(
            "states with a window cannot be combined unless one is empty: the blocks of b would move; "
            "use window=0, or update a with b's keys and values"
        )
    check_together(a=a.keys, b=b.keys)
    check_broadcast("states", a=a.batch_shape, b=b.batch_shape)
    joined = replace(
        a,
        keys=_joined(a.keys, b.keys, 2),
        log_weight=_joined(a.log_weight, b.log_weight, 1),
        values=_joined(a.values, b.values, 2),
        num_seen=a.num_seen + b.num_seen,
        moments=combine(a.moments, b.moments),
    )
    if a.window or joined.held <= a.settings.num_landmarks + a.settings.room:
        return joined
    return compressed(joined, 0, event=joined.num_seen)


def _joined(a: Array, b: Array, core: int) -> Array:
    """Two arrays joined along their axis -core; the axes before it broadcast."""
    xp = namespace_of(a, b)
    batch = broadcast_shapes(a.shape[:-core], b.shape[:-core])
    dtype = result_dtype(xp, a, b)
    return xp.concat([xp.broadcast_to(cast(x, dtype), (*batch, *x.shape[-core:])) for x in (a, b)], axis=-core)
