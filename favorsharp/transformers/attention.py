"""The public function `register`, and the attention function that transformers then calls for each layer."""

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from favorsharp._checks import check_choice, check_integer
from favorsharp.exact import softmax_attention
from favorsharp.features import FeatureMap, feature_map
from favorsharp.fitting import fit
from favorsharp.landmarks.settings import Landmarks, landmarks
from favorsharp.landmarks.verbs import check_landmark_options
from favorsharp.linear_attention import decode_step, init_state, linear_attention, read, update
from favorsharp.methods import LANDMARKS, MethodLike, check_method, method_of
from favorsharp.transformers.cache import StateLayer, layer_of
from favorsharp.transformers.masks import Visible, compact_mask, read_mask
from favorsharp.transformers.models import adds_masks_only, guard, heard, label, warn_once
from favorsharp.transformers.windows import NearKeys, near_attention, near_step

Tensor = Any

EXACT = "exact"
"""The name of the method that computes softmax attention, for comparison."""

WITHOUT_MAPS = {EXACT: "is exact", LANDMARKS: "chooses landmarks anew in each call"}
"""The methods that have no feature map, and the reasons for error messages."""

_HARMLESS = frozenset(
    {
        # positions and kinds of tokens: already part of the queries, the keys and the mask
        *("position_ids", "cache_position", "position_embeddings", "token_type_ids", "mm_token_type_ids"),
        # what the model returns or counts
        *("use_cache", "return_dict", "output_hidden_states", "output_router_logits", "num_items_in_batch"),
        *("labels", "logits_to_keep", "return_loss"),
        # options of other kernels: determinism, and lengths of packed sequences (their bounds are refused)
        *("max_length_q", "max_length_k", "deterministic", "use_top_left_mask"),
        # the index of the layer, and its cache, which was used before this call
        *("layer_idx", "cache", "past_key_values"),
    }
)
"""Keywords of the call that do not change its result."""

_FLAGS = frozenset({"output_attentions", "softcap", "head_mask"})
"""Keywords that have no effect if they are False."""


@dataclass(frozen=True, eq=False)
class Registration:
    """The options of one registered name.

    Attributes
    ----------
    name : str
    method, num_features, window, draw, calibration
        As in `register`.
    seed : int
        The seed of every draw.
    landmarks : Landmarks or None
        The settings of the method "landmarks".
    room : int or None
    per, dropout : str
        As in `register`.
    """

    name: str
    method: MethodLike
    num_features: int
    window: int
    draw: Any
    seed: int
    calibration: str
    landmarks: Landmarks | None
    room: int | None = None
    per: str = "head"
    dropout: str = "ignore"

    def landmarks_for(self, module: Any, heads: int, scaling: float | None) -> Landmarks:
        """The settings of landmarks for each key head of a layer."""
        assert self.landmarks is not None
        shares = 1 if self.per == "head" else heads
        if self.per == "model":
            layers = getattr(getattr(module, "config", None), "num_hidden_layers", None)
            if not isinstance(layers, int):
                raise ValueError(
                    f"per='model' needs the number of layers, and the config of {label(module)} has no "
                    "num_hidden_layers; accepted: per='layer' or 'head'"
                )
            shares *= layers
        if self.num_features < shares:
            raise ValueError(
                f"num_features={self.num_features} for a whole {self.per} is less than one landmark for each of "
                f"{shares} heads of {label(module)}; accepted: {shares} or more"
            )
        m, scale = self.num_features // shares, None if scaling is None else float(scaling)
        return _settings(self.landmarks, m, m if self.room is None else self.room, scale)

    def draw_for(self, size: int, like: Tensor) -> Any:
        """The random rows for heads of this size, on the device of `like`; all layers use the same draw."""
        if not isinstance(self.draw, str):
            return self.draw
        return _rows(self.draw, self.num_features, size, self.seed, like.device)


@lru_cache(maxsize=256)
def _settings(settings: Landmarks, m: int, room: int, scale: float | None) -> Landmarks:
    return replace(settings, num_landmarks=m, room=room, scale=scale)


REGISTERED: dict[str, Registration] = {}
"""All registrations by name."""


def register(
    name: str = "favorsharp",
    *,
    method: MethodLike = "optimal",
    num_features: int = 256,
    window: int = 0,
    draw: Any = "orthogonal",
    rng: Any = None,
    calibration: str = "input",
    room: int | None = None,
    per: str = "head",
    dropout: str = "ignore",
) -> None:
    """Register linear attention, by random features or landmarks, under a name for `attn_implementation`.

    Afterwards `from_pretrained(..., attn_implementation=name)` and `model.set_attn_implementation(name)` accept the
    name, for models whose attention goes through transformers' attention interface. A name that this function
    registered before is replaced.

    Parameters
    ----------
    name : str
    method : str or callable
        As in `favorsharp.fit`, only methods whose features are positive; or `"landmarks"`, as in
        `favorsharp.attention`, which are biased and need no calibration; or `"exact"` for softmax attention, for
        comparison.
    num_features : int
        m, 1 or more; the number of landmarks with that method.
    window : int
        Block length of exactly scored near keys, as in `favorsharp.linear_attention`; 0 means none. It is used in
        self-attention only.
    draw
        As in `favorsharp.feature_map`. Landmarks take none.
    rng : None, int, SeedSequence or Generator
        As in `favorsharp.feature_map` and in `favorsharp.landmarks`. All that is random depends only on the seed of the
        registration, so the same seed gives the same model.
    calibration : {"input", "frozen"}
        What a layer does that `calibrate` has not fitted. With "input", bidirectional self-attention is fitted to each
        input, separately for each head and each row of the batch; causal and cross-attention raise an error, because a
        fit to the sequence would show it its own future. With "frozen", every layer raises an error. Methods that fit
        nothing (`posrf`) need no calibration. Landmarks take none.
    room : int, optional
        How many keys beyond its landmarks a stream of landmarks holds, as in `favorsharp.landmarks`; None means as many
        as landmarks.
    per : {"head", "layer", "model"}
        What `num_features` landmarks are for: each key head, or all key heads of a layer or of all layers together, in
        equal shares. Features take "head" only.
    dropout : {"ignore", "refuse"}
        What happens in training if the model asks for dropout of attention weights, which do not exist here. With
        "ignore" the model trains without it, and warns once; with "refuse" it raises an error.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or transformers itself uses the name.

    Examples
    --------
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from favorsharp.transformers import register
    >>> register("favorsharp", num_features=64, rng=0)
    >>> config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    >>> model = BertModel(config).eval()
    >>> model.set_attn_implementation("favorsharp")
    >>> model(torch.arange(40)[None]).last_hidden_state.shape
    torch.Size([1, 40, 32])
    """
    from favorsharp.draws import DRAWS, generator

    if not isinstance(name, str) or not name:
        raise TypeError(f"name must be a string that is not empty, got {name!r}")
    known = AttentionInterface._global_mapping
    if (
        name == "eager"
        or "flash" in name
        or any(c in name for c in "/|@:")
        or (name in known and name not in REGISTERED)
    ):
        raise ValueError(f"name {name!r} means something to transformers already; accepted: any other, without / | @ :")
    check_method(method, positive=True, also=tuple(WITHOUT_MAPS))
    if isinstance(draw, str):
        check_choice("draw", draw, DRAWS, also=", an (m, d) array of rows, or a pair (rows, log_weight)")
    check_choice("calibration", calibration, ("input", "frozen"))
    check_choice("per", per, ("head", "layer", "model"))
    check_choice("dropout", dropout, ("ignore", "refuse"))
    m = check_integer("num_features", num_features, 1)
    settings = None
    if method == LANDMARKS:
        check_landmark_options(draw, calibrated=calibration != "input")
        settings = landmarks(m, room=room, rng=rng)
    elif room is not None or per != "head":
        raise ValueError(f"room and per are of method 'landmarks', and method is {method!r}; accepted: their defaults")
    registration = Registration(
        name=name,
        method=method,
        num_features=m,
        window=check_integer("window", window, 0),
        draw=draw,
        seed=int(generator(rng).integers(2**62)) if settings is None else settings.seed,
        calibration=calibration,
        landmarks=settings,
        room=room,
        per=per,
        dropout=dropout,
    )
    REGISTERED[name] = registration
    AttentionInterface.register(name, partial(attend, registration))
    AttentionMaskInterface.register(name, compact_mask)
    guard(REGISTERED)


def attend(
    registration: Registration,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one layer, (B, H, n, d) with keys and values of (B, Hkv, s, d) -> (B, n, H, d).

    transformers calls this for every layer. It refuses attention patterns other than bidirectional, causal and sliding
    windows; biases; and keywords that might change the result.
    """
    heard()
    if dropout:
        _without_dropout(registration, module, dropout)
    _check_keywords(registration, module, kwargs)
    layer = layer_of(module, key, value)
    n, s = query.shape[-2], key.shape[-2]
    if layer is not None and s == 0:  # cross-attention after its first step
        seen = Visible(None, False)
    else:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        if attention_mask is None and causal:
            causal = not adds_masks_only(module)
        seen = read_mask(attention_mask, n, s, causal)
    if attention_mask is None and sliding_window is not None and seen.reach is None:
        seen = replace(seen, reach=int(sliding_window) - 1)
    _check_sliding(registration, module, sliding_window, seen, s if layer is None else layer.seen + s)
    grouped = query.shape[1] != key.shape[1]
    if seen.reach is not None:
        if _collector is not None and _collector.wants(module):
            _collector.windows += 1
        return near(layer, query, key, value, seen, scaling).transpose(1, 2).contiguous(), None
    if _collector is not None and _collector.wants(module):
        _collector.collect(registration, module, query, key, seen, scaling, grouped)
        out = exact(query, key, value, seen, scaling, grouped)
    elif registration.method == EXACT:
        if layer is not None:
            raise ValueError("method 'exact' needs every key: a StateCache has none; accepted: a DynamicCache")
        out = exact(query, key, value, seen, scaling, grouped)
    else:
        _check_positions(module, seen, kwargs.get("position_ids"), n == s)
        fm: FeatureMap | Landmarks
        if registration.landmarks is None:
            fm = map_for(registration, module, query, key, seen, scaling, grouped)
        else:
            fm = registration.landmarks_for(module, key.shape[1], scaling)
        cross = crosses(module, n, s, seen)
        window = 0 if cross else registration.window
        run = partial(approximate, cross) if layer is None else partial(remember, layer)
        out = run(query, key, value, fm, seen, window, grouped)
    return out.transpose(1, 2).contiguous(), None


def _without_dropout(registration: Registration, module: Any, dropout: float) -> None:
    what = f"attention dropout is {dropout}: there are no attention weights to drop"
    how = "(in the config: attention_probs_dropout_prob, attn_pdrop or attention_dropout)"
    if registration.dropout == "refuse":
        raise ValueError(f"{what}; accepted: 0 {how}, or model.eval()")
    warn_once(module, "dropout", f"{what}, and the model trains without it; 0 {how} says so")


def _check_positions(module: Any, seen: Visible, position_ids: Any, is_whole: bool) -> None:
    """Warn if padding on the left moves the positions of its rows, which the caller did not correct."""
    if seen.key_mask is None or position_ids is None or not is_whole or torch.compiler.is_compiling():
        return
    if position_ids.shape[0] == 1 < seen.key_mask.shape[0] and not bool(seen.key_mask[:, 0, 0].all()):
        warn_once(
            module,
            "positions",
            "rows are padded on the left, and their positions count the padding: an approximation of such a row "
            "differs from that of the row alone; pass position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0), as "
            "generate does",
        )


def _check_keywords(registration: Registration, module: Any, keywords: dict[str, Any]) -> None:
    collected = None if torch.compiler.is_compiling() else _collected()
    if any("attentions" in name for name in collected or ()):
        keywords = keywords | {"output_attentions": True}
    unknown = [
        name
        for name, value in keywords.items()
        if value is not None and name not in _HARMLESS and not (name in _FLAGS and value is False)
    ]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} is not served by attn_implementation={registration.name!r}, and {label(module)} "
            f"passes it to its attention; accepted beside the mask: {', '.join(sorted(_HARMLESS))}"
        )


def _check_sliding(registration: Registration, module: Any, window: int | None, seen: Visible, length: int) -> None:
    """Refuse a sliding window that hides a key and is not in the mask that the layer got."""
    if window is not None and seen.reach is None and length > window + (0 if seen.is_causal else 1):
        raise ValueError(
            f"{label(module)} has a sliding window of {window}, and {length} keys: the window is not served by "
            f"attn_implementation={registration.name!r}; accepted: sequences no longer than the window"
        )


def near(
    layer: StateLayer | None, query: Tensor, key: Tensor, value: Tensor, seen: Visible, scaling: float | None
) -> Tensor:
    """Attention of a layer with a sliding window, which is exact with every method."""
    if layer is None:
        return near_attention(query, key, value, seen, scaling)
    if not seen.is_causal:
        raise ValueError("a bidirectional sliding window cannot go on from a StateCache; accepted: use_cache=False")
    state = layer.state
    out, state = near_step(state if isinstance(state, NearKeys) else None, query, key, value, seen, scaling)
    layer.take(state)
    return out


def exact(query: Tensor, key: Tensor, value: Tensor, seen: Visible, scaling: float | None, grouped: bool) -> Tensor:
    """Softmax attention; causal queries are at the last positions of the keys."""
    n, s = query.shape[-2], key.shape[-2]
    if seen.is_causal and 1 < n < s:
        query = torch.cat([query.new_zeros((*query.shape[:-2], s - n, query.shape[-1])), query], dim=-2)
    causal = seen.is_causal and n > 1
    out = softmax_attention(
        query, key, value, is_causal=causal, key_mask=seen.key_mask, scale=scaling, enable_gqa=grouped
    )
    return out[..., -n:, :] if n else out


def approximate(
    cross: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fm: FeatureMap | Landmarks,
    seen: Visible,
    window: int,
    grouped: bool,
) -> Tensor:
    """Linear attention; causal queries are at the last positions of the keys, and earlier keys enter by a state."""
    n, s = query.shape[-2], key.shape[-2]
    key_mask, state = seen.key_mask, None
    if isinstance(fm, Landmarks) and cross:
        return read(state_of(query, key, value, fm, seen, grouped), query, fm, enable_gqa=grouped)
    if seen.is_causal and n < s:
        state = init_state(fm, value.shape[-1], like=key, window=window)
        past = None if key_mask is None else key_mask[..., : s - n]
        state = update(state, key[..., : s - n, :], value[..., : s - n, :], fm, key_mask=past)
        key, value = key[..., s - n :, :], value[..., s - n :, :]
        key_mask = None if key_mask is None else key_mask[..., s - n :]
    return linear_attention(
        query,
        key,
        value,
        fm,
        is_causal=seen.is_causal,
        window=window,
        key_mask=key_mask,
        enable_gqa=grouped,
        state=state,
    )


def remember(
    layer: StateLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fm: FeatureMap | Landmarks,
    seen: Visible,
    window: int,
    grouped: bool,
) -> Tensor:
    """Linear attention that continues from the state of a `StateCache`, and stores the new state there."""
    state = layer.state
    if not seen.is_causal:
        if state is None:
            state = state_of(query, key, value, fm, seen, grouped)
            layer.take(state, keep=(key[..., :0, :].clone(), value[..., :0, :].clone()))
        elif key.shape[-2]:
            raise ValueError(
                "bidirectional attention cannot go on from a StateCache; accepted: use_cache=False, and for an "
                "encoder-decoder model EncoderDecoderCache(StateCache(), StateCache())"
            )
        return read(state, query, fm, enable_gqa=grouped)
    if state is not None and query.shape[-2] == 1 and seen.key_mask is None:
        out, state = decode_step(query, key, value, state, fm, enable_gqa=grouped)
    else:
        out, state = linear_attention(
            query,
            key,
            value,
            fm,
            is_causal=True,
            window=window,
            key_mask=seen.key_mask,
            enable_gqa=grouped,
            state=state,
            return_state=True,
        )
    layer.take(state)
    return out


def state_of(
    query: Tensor, key: Tensor, value: Tensor, fm: FeatureMap | Landmarks, seen: Visible, grouped: bool
) -> Any:
    """The state of all keys, for queries of another sequence.

    Of the queries it depends on the shape only. Landmarks chosen for them would show a decoder its own future.
    """
    _, state = linear_attention(
        query[..., :0, :], key, value, fm, key_mask=seen.key_mask, enable_gqa=grouped, return_state=True
    )
    return state


def map_for(
    registration: Registration,
    module: Any,
    query: Tensor,
    key: Tensor,
    seen: Visible,
    scaling: float | None,
    grouped: bool,
) -> FeatureMap:
    """The frozen map of the layer; without one, a map fitted to this input, if that shows a query no later keys."""
    frozen = frozen_map(module, registration)
    if frozen is not None:
        expected = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        if abs(frozen.parameters.scale - expected) > 1e-6 * expected:
            raise ValueError(
                f"{label(module)} was calibrated with scaling {frozen.parameters.scale}, and called with {expected}"
            )
        return frozen
    if method_of(registration.method).is_fitted:
        why = None
        if registration.name in (getattr(getattr(module, "config", None), CALIBRATED, None) or ()):
            why = "the model was calibrated before it was saved, and its maps are not in the checkpoint: load_maps them"
        elif registration.calibration == "frozen":
            why = "it was registered with calibration='frozen'"
        elif seen.is_causal:
            why = "it is causal: a fit to the sequence itself would show it its own future"
        elif crosses(module, query.shape[-2], key.shape[-2], seen):
            why = "its queries come from another sequence, which a fit would show its own future where that is causal"
        if why is not None:
            raise ValueError(
                f"attn_implementation={registration.name!r}, method {registration.method!r}: {label(module)} has no "
                f"feature map, and {why}; accepted: favorsharp.transformers.calibrate(model, batches) first, or a "
                "method that needs no calibration (posrf, landmarks)"
            )
    visible = seen.key_mask
    same = visible is not None and query.shape[-2] == key.shape[-2]
    parameters = fit(
        query.detach(),
        key.detach(),
        method=registration.method,
        scale=scaling,
        mask_x=visible if same else None,
        mask_y=visible,
        enable_gqa=grouped,
    )
    return feature_map(parameters, registration.num_features, draw=registration.draw_for(query.shape[-1], query))


# What is stored on modules --------------------------------------------------------------------------------------------

CALIBRATED = "favorsharp_calibrated"
"""Entry of a model's config: the names it was calibrated for. It is saved with the model; the maps are not."""

CHILD = "favorsharp"
"""Name of the child module that holds the frozen maps of a layer."""


class FrozenMaps(torch.nn.Module):
    """The maps that `calibrate` fitted to one attention layer, by the name of the registration.

    They are not parameters and not in the state dict, so that any loader can read the model's checkpoints. They are
    copied with the model, move with it between devices, and keep their dtype when the model's dtype changes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, FeatureMap] = {}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        from favorsharp._values import map_arrays

        def moved(x: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=x.device)).device
            return x if device == x.device else x.to(device)

        self.by_name = {name: map_arrays(fm, moved) for name, fm in self.by_name.items()}
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """One line for each map."""
        return "\n".join(f"({name}): {fm!r}" for name, fm in self.by_name.items())


def frozen_map(module: Any, registration: Registration) -> FeatureMap | None:
    """The map that `calibrate` or `load_maps` stored on a layer for this registration, or None."""
    holder = getattr(module, CHILD, None)
    fm: FeatureMap | None = None if holder is None else holder.by_name.get(registration.name)
    if fm is None:
        return None
    if fm.num_features != registration.num_features or fm.parameters.method != registration.method:
        raise ValueError(
            f"{label(module)} was calibrated for {fm.parameters.method_name!r} with {fm.num_features} features, and "
            f"{registration.name!r} now means {registration.method!r} with {registration.num_features}: calibrate again"
        )
    return fm


def is_cross(module: Any) -> bool:
    """Whether the queries of a layer come from another sequence than its keys, judged by its class and attributes."""
    if getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__:
        return True
    # decoders of encoder-decoder models use one class for both, and mark only their self-attention as causal
    return bool(getattr(module, "is_decoder", False)) and not getattr(module, "is_causal", True)


def crosses(module: Any, n: int, s: int, seen: Visible) -> bool:
    """Whether the queries of a call come from another sequence than its keys.

    No causal mask is of such a call, even if its layer does not say that it is causal, as in some decoders.
    """
    return not seen.is_causal and (is_cross(module) or n != s)


def _collected() -> Any:
    """What transformers records in the running call besides its result; it does not tell every layer."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # versions that tell every layer
        return None
    return _active_collector.get()


_collector: Any = None
"""The object of `calibrate` that records the calls of its model; a plain global, which torch.compile can read."""


def set_collector(collector: Any) -> Any:
    """Set the collector, and return the previous one."""
    global _collector
    before, _collector = _collector, collector
    return before


@lru_cache(maxsize=64)
def _drawn(draw: str, num_rows: int, size: int, seed: int, device: torch.device) -> Tensor:
    from favorsharp.draws import draw_rows

    return torch.asarray(draw_rows(draw, num_rows, size, seed), device=device)


@torch.library.custom_op("favorsharp::transformers_rows", mutates_args=())
def _rows(draw: str, num_rows: int, size: int, seed: int, device: torch.device) -> torch.Tensor:
    """Random rows as a custom op of torch, so that torch.compile does not trace the code that draws them."""
    return _drawn(draw, num_rows, size, seed, device).clone()


@_rows.register_fake
def _(draw: str, num_rows: int, size: int, seed: int, device: torch.device) -> torch.Tensor:
    return torch.empty((num_rows, size), dtype=torch.float64, device=device)
