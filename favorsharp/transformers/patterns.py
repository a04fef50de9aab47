"""Recognises the attention patterns of transformers models, which are functions of a query's and a key's position."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

Tensor = Any


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
) -> tuple[torch.dtype, int | None]:
    """The dtype of the mask for a pattern, in the format of `masks`, and the reach of a sliding window.

    The arguments are those of `compact_mask`, with its other `keywords`; `length` is the number of keys, with those
    that a cache has seen.
    """
    if mask_function is bidirectional_mask_function:
        return torch.bool, None
    if mask_function is causal_mask_function:
        return torch.int8, None
    if not torch.compiler.is_compiling() or _has_no_tensor(mask_function, attention_mask, use_vmap, keywords):
        window: tuple[torch.dtype, int] | None = _window_of(mask_function)
        if window is not None:
            return window
    return _recognised(mask_function, attention_mask, batch_size, q_length, q_offset, length, use_vmap, device), None


def _has_no_tensor(mask_function: Any, attention_mask: Any, use_vmap: bool, keywords: dict[str, Any]) -> bool:
    """Whether a pattern surely contains no tensor, so that torch.compile can make it a constant.

    Patterns with tensors are those of packed sequences, which are looked for where a causal model gets no mask, of
    blocks, which are joined by "or", of chunks, and of the caller's own functions, which are evaluated by vmap.
    """
    is_chunked = getattr(keywords.get("config"), "attention_chunk_size", None) is not None
    may_be_packed = attention_mask is None and "allow_is_bidirectional_skip" not in keywords
    if use_vmap or is_chunked or may_be_packed:
        return False
    return str(getattr(mask_function, "__qualname__", "")).startswith("and_masks.")


@torch.compiler.assume_constant_result
def _window_of(mask_function: Any) -> tuple[torch.dtype, int] | None:
    """The dtype of the mask and the reach of a sliding window, from the parts that transformers made the pattern of.

    It runs in Python while a graph is recorded, too.
    """
    parts = list(_parts_of(mask_function))
    is_causal = causal_mask_function in parts
    reaches: list[int] = []
    for part in parts:
        if part is causal_mask_function or part is bidirectional_mask_function:
            continue
        size = _held_by(part).get("sliding_window")
        name = getattr(part, "__qualname__", "")
        if not isinstance(size, int) or getattr(part, "__module__", None) != _MASKS_OF_TRANSFORMERS:
            return None
        if name.startswith("sliding_window_bidirectional_overlay."):
            reaches.append(size)
        elif name.startswith("sliding_window_overlay.") and is_causal and size > 0:
            reaches.append(size - 1)
        else:
            return None
    return (torch.int32 if is_causal else torch.int64, min(reaches)) if reaches else None


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
    """The variables that a function has from the function in which it was made."""
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _recognised(
    mask_function: Callable[..., Any],
    attention_mask: Tensor,
    batch_size: int,
    q_length: int,
    q_offset: int,
    length: int,
    use_vmap: bool,
    device: Any,
) -> torch.dtype:
    """The dtype that tells whether a composed pattern is causal, bidirectional, or another one, for these lengths.

    Chunks that are at least as long as the sequence are causal. Keys that a cache has seen count towards the length: a
    pattern that hides a past key is another pattern, even if the block of new keys is short.
    """
    if torch.compiler.is_compiling():
        return torch.uint8

    def dense(function: Callable[..., Any], **options: Any) -> Tensor:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=length,
            q_offset=q_offset,
            mask_function=function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            device=device,
            **options,
        )

    asked = dense(mask_function, **({"use_vmap": True} if use_vmap else {}))
    if torch.equal(asked, dense(causal_mask_function)):
        return torch.int8
    if torch.equal(asked, dense(bidirectional_mask_function)):
        return torch.bool
    return torch.int16
