"""Recognises the attention patterns of transformers models, which are functions of two positions."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.masking_utils import and_masks, bidirectional_mask_function, causal_mask_function, sdpa_mask

from favorsharp._autodiff import constant_while_compiling

Tensor = Any

Reach = tuple[int, int]
"""How far before and after a query the keys reach that it sees through a sliding window."""


def kind_of(
    mask_function: Callable[..., Any],
    attention_mask: Tensor,
    batch_size: int,
    q_length: int,
    q_offset: int,
    length: int,
    use_vmap: bool,
    device: Any,
    keywords: dict[str, Any],
) -> tuple[torch.dtype, Reach | None]:
    """The dtype of the mask for a pattern, in the format of `masks`, and the reach of a sliding window.

    The arguments are those of `compact_mask`, with its other `keywords`; `length` is the number of keys, including
    those that a cache has seen.
    """
    if mask_function is bidirectional_mask_function:
        return torch.bool, None
    if mask_function is causal_mask_function:
        return torch.int8, None
    if torch.compiler.is_compiling():
        may_try = _has_no_tensor(mask_function, attention_mask, use_vmap, keywords)
        constant = _constant(mask_function) if may_try else None
        return (torch.uint8, None) if constant is None else (constant[0], constant[1:] or None)

    def dense(function: Callable[..., Any]) -> Tensor:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=length,
            q_offset=q_offset,
            mask_function=function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            device=device,
            **({"use_vmap": True} if use_vmap else {}),
        )

    windows, others = _split(_largest(mask_function, dense))
    if all(map(_is_plain, others)):
        kind = torch.int8 if causal_mask_function in others else torch.bool
    else:
        kind = _recognised(and_masks(*others), dense)
    return _within(kind, windows)


def _within(kind: torch.dtype, windows: list[tuple[int, int | None]]) -> tuple[torch.dtype, Reach | None]:
    """The dtype and the reach for a causal or bidirectional pattern within windows."""
    if not windows or kind is torch.int16:
        return kind, None
    before, ahead = min(w[0] for w in windows), [w[1] for w in windows if w[1] is not None]
    if kind is torch.int8:
        return torch.int32, (before, 0)
    return (torch.int64, (before, min(ahead))) if ahead else (torch.int16, None)


def _has_no_tensor(mask_function: Any, attention_mask: Any, use_vmap: bool, keywords: dict[str, Any]) -> bool:
    """Whether a pattern surely contains no tensor, so that torch.compile can make it a constant.

    Four kinds of patterns contain tensors: packed sequences, which transformers looks for if a causal model gets no
    mask; blocks, which are joined by "or"; chunks; and the caller's own functions, which are evaluated by vmap.
    """
    is_chunked = getattr(keywords.get("config"), "attention_chunk_size", None) is not None
    may_be_packed = attention_mask is None and "allow_is_bidirectional_skip" not in keywords
    if use_vmap or is_chunked or may_be_packed:
        return False
    return str(getattr(mask_function, "__qualname__", "")).startswith("and_masks.")


@constant_while_compiling
def _constant(mask_function: Any) -> tuple[Any, ...] | None:
    """The dtype and the reach of a pattern that needs no evaluation; it runs in Python while a graph is recorded."""
    windows, others = _split(mask_function)
    if not all(map(_is_plain, others)):
        return None
    kind, reach = _within(torch.int8 if causal_mask_function in others else torch.bool, windows)
    return None if kind is torch.int16 else (kind, *(reach or ()))


def _is_plain(part: Any) -> bool:
    return part is causal_mask_function or part is bidirectional_mask_function


def _split(mask_function: Any) -> tuple[list[tuple[int, int | None]], list[Any]]:
    """The sliding windows of which a pattern is made, and its other parts."""
    parts = [(part, _window_of(part)) for part in _parts_of(mask_function)]
    return [w for _, w in parts if w is not None], [part for part, w in parts if w is None]


def _window_of(part: Any) -> tuple[int, int | None] | None:
    """How far a sliding-window pattern reaches before and after a query; None after it means all later keys."""
    held = _held_by(part)
    size, is_causal = held.get("sliding_window"), held.get("is_causal", False)
    name, module = getattr(part, "__qualname__", ""), getattr(part, "__module__", None) or ""
    if module == _MASKS_OF_TRANSFORMERS and isinstance(size, int):
        if name.startswith("sliding_window_bidirectional_overlay."):
            return size, size
        if name.startswith("sliding_window_overlay.") and size > 0:
            return size - 1, None
    if module.startswith("transformers.models.") and name.startswith("sliding_window_mask_function."):
        if isinstance(size, int):
            size = (size, 0) if is_causal else ((size + 1) // 2, size // 2 + 1)
        if isinstance(size, tuple) and size[0] > 0:
            return size[0] - 1, max(size[1] - 1, 0)
    return None


_MASKS_OF_TRANSFORMERS = "transformers.masking_utils"


def _parts_of(mask_function: Any) -> Iterator[Any]:
    """The patterns of which a pattern is the intersection."""
    if getattr(mask_function, "__qualname__", "").startswith("and_masks.") and (
        mask_function.__module__ == _MASKS_OF_TRANSFORMERS
    ):
        for part in _held_by(mask_function).get("mask_functions", ()):
            yield from _parts_of(part)
    else:
        yield mask_function


def _held_by(function: Any) -> dict[str, Any]:
    """The variables that a function has captured from the function in which it was made."""
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _largest(mask_function: Any, dense: Callable[[Any], Tensor]) -> Any:
    """The part of a union that contains all other parts for these lengths; for example, blocks of images may be empty.

    If the pattern is no union, or has no such part, the result is the pattern itself.
    """
    if getattr(mask_function, "__qualname__", "").startswith("or_masks."):
        whole = dense(mask_function)
        for part in _held_by(mask_function).get("mask_functions", ()):
            if torch.equal(dense(part), whole):
                return part
    return mask_function


def _recognised(pattern: Any, dense: Callable[[Any], Tensor]) -> torch.dtype:
    """The dtype that tells whether a pattern is causal, bidirectional, or another one, for these lengths.

    Chunks that are at least as long as the sequence are causal. Keys that a cache has seen count towards the length: a
    pattern that hides a past key is another pattern, even if the block of new keys is short.
    """
    asked = dense(pattern)
    if torch.equal(asked, dense(causal_mask_function)):
        return torch.int8
    return torch.bool if torch.equal(asked, dense(bidirectional_mask_function)) else torch.int16
