"""The attention function that transformers calls for each layer of a model with a registered name."""

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from favorsharp.exact import softmax_attention
from favorsharp.features import FeatureMap
from favorsharp.landmarks.settings import Landmarks
from favorsharp.linear_attention import decode_step, init_state, linear_attention, read, update
from favorsharp.transformers.cache import StateLayer, layer_of
from favorsharp.transformers.maps import FrozenMaps as FrozenMaps  # models pickled with 0.1.0 name it here
from favorsharp.transformers.maps import crosses, map_for
from favorsharp.transformers.masks import Visible, read_mask
from favorsharp.transformers.models import adds_masks_only, heard, label, warn_once
from favorsharp.transformers.registrations import EXACT, Registration
from favorsharp.transformers.windows import NearKeys, near_attention, near_step

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # versions that tell every layer what they record
    _active_collector = None

Tensor = Any

_HARMLESS = frozenset(
    {
        # positions and kinds of tokens: already part of the queries, the keys and the mask
        *("position_ids", "cache_position", "position_embeddings", "token_type_ids", "mm_token_type_ids"),
        # options of what the model returns or counts
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
    if dropout:
        _without_dropout(registration, module, dropout)
    _check_keywords(registration, module, kwargs)
    layer = layer_of(module, key, value)
    n, s = query.shape[-2], key.shape[-2]
    seen = _visible(registration, module, attention_mask, n, s, is_causal, sliding_window, layer)
    if seen.others:
        key, value, seen = others_first(key, value, seen)
    grouped = query.shape[1] != key.shape[1]
    if seen.reach is None or registration.method == EXACT or _collector is not None:
        heard()
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
        out = _linear(registration, module, layer, query, key, value, seen, scaling, grouped)
    return out.transpose(1, 2).contiguous(), None


def _linear(
    registration: Registration,
    module: Any,
    layer: StateLayer | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Visible,
    scaling: float | None,
    grouped: bool,
) -> Tensor:
    """Linear attention through the layer's map or landmarks, from the state in the cache if there is one."""
    fm: FeatureMap | Landmarks
    if registration.landmarks is None:
        fm = map_for(registration, module, query, key, seen, scaling, grouped)
    else:
        fm = registration.landmarks_for(module, key.shape[1], scaling)
    cross = crosses(module, query.shape[-2], key.shape[-2], seen)
    window = 0 if cross else registration.window
    run = partial(approximate, cross) if layer is None else partial(remember, layer)
    return run(query, key, value, fm, seen, window, grouped)


def _visible(
    registration: Registration,
    module: Any,
    attention_mask: Any,
    n: int,
    s: int,
    is_causal: bool | None,
    sliding_window: int | None,
    layer: StateLayer | None,
) -> Visible:
    """Which keys the queries of a call see, by its mask, or by the layer's attributes if there is no mask."""
    if layer is not None and s == 0:  # cross-attention after its first step
        seen = Visible(None, False)
    else:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        if attention_mask is None and causal:
            causal = not adds_masks_only(module)
        seen = read_mask(attention_mask, n, s, causal)
    if attention_mask is None and sliding_window is not None and seen.reach is None:
        reach = int(sliding_window) - 1
        seen = replace(seen, reach=(reach, 0 if seen.is_causal else reach))
    _check_sliding(registration, module, sliding_window, seen, s if layer is None else layer.seen + s)
    return seen


def _without_dropout(registration: Registration, module: Any, dropout: float) -> None:
    what = f"attention dropout is {dropout}: there are no attention weights to drop"
    how = "(in the config: attention_probs_dropout_prob, attn_pdrop or attention_dropout)"
    if registration.dropout == "refuse":
        raise ValueError(f"{what}; accepted: 0 {how}, or model.eval()")
    warn_once(module, "dropout", f"{what}, and the model trains without it; set it to 0 {how} to avoid this warning")


def _check_positions(module: Any, seen: Visible, position_ids: Any, is_whole: bool) -> None:
    """Warn if padding on the left shifts the positions of its rows and the caller did not correct them."""
    if seen.key_mask is None or not is_whole or torch.compiler.is_compiling():
        return
    visible = seen.key_mask[:, 0]
    if bool(visible[:, 0].all()):
        return
    positions = _positions_above() if position_ids is None else position_ids
    rows, s = visible.shape
    if positions is None or positions.ndim < 2 or positions.shape[-1] != s or positions.shape[-2] not in (1, rows):
        return
    positions = positions.reshape(-1, *positions.shape[-2:])[0].expand(rows, -1)
    first = visible.int().argmax(-1, keepdim=True).to(positions.device)
    if bool(((first > 0) & (positions.gather(-1, first) == first)).any()):
        warn_once(
            module,
            "positions",
            "rows are padded on the left, and their positions count the padding: an approximation of such a row "
            "differs from that of the row alone; pass position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0), as "
            "generate does, or pad on the right",
        )


def _positions_above() -> Any:
    """The positions of the nearest module above that has them; some models do not pass them to their attention."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        positions = frame.f_locals.get("position_ids")
        if isinstance(positions, torch.Tensor) and isinstance(frame.f_locals.get("self"), torch.nn.Module):
            return positions
        frame = frame.f_back
    return None


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
    """Refuse a sliding window that hides a key but is missing in the mask that the layer got."""
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


def others_first(key: Tensor, value: Tensor, seen: Visible) -> tuple[Tensor, Tensor, Visible]:
    """Move keys of another sequence, which all queries see, before the own keys, so that attention is causal."""
    mask = None if seen.key_mask is None else seen.key_mask.roll(seen.others, -1)
    return key.roll(seen.others, -2), value.roll(seen.others, -2), replace(seen, key_mask=mask)


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
    """Linear attention.

    Causal queries are at the last positions of the keys, and earlier keys enter through a state.
    """
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

    It depends only on the shape of the queries. Landmarks that are chosen for the queries would show a decoder its own
    future.
    """
    _, state = linear_attention(
        query[..., :0, :], key, value, fm, key_mask=seen.key_mask, enable_gqa=grouped, return_state=True
    )
    return state


def _collected() -> Any:
    """The outputs besides the result that transformers records in the running call; it does not tell every layer."""
    return None if _active_collector is None else _active_collector.get()


_collector: Any = None
"""The object of `calibrate` that records the calls of its model; a plain global, which torch.compile can read."""


def set_collector(collector: Any) -> Any:
    """Set the collector, and return the previous one."""
    global _collector
    before, _collector = _collector, collector
    return before
