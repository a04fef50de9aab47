"""What the models' masks say: which keys are padding, and whether the future is hidden.

transformers asks a registered mask function for a mask once a forward, and hands it to every layer. Linear attention
needs one bit a key and one bit in all, so that is what `mask_function_of` returns, and no n by n mask is ever made:

    bool  (B, 1, 1, s)    every query sees the keys that are True
    int8  (B, 1, 1, s)    query i sees the keys that are 1, up to its own
    a last axis of 1      no key is padding

A caller's own dense mask passes transformers unchanged, and is compared, value by value, with the two patterns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

Tensor = Any

_ACCEPTED = (
    "accepted: key padding, causal, or both (bidirectional and causal models with attention_mask of shape (B, s))"
)


@dataclass(frozen=True)
class Visible:
    """Which keys a query may see.

    Attributes
    ----------
    key_mask : boolean tensor, shape (B, 1, s), or None
        True where a key is no padding; None where none is.
    is_causal : bool
        Whether query i of the last n positions sees keys up to its own only.
    """

    key_mask: Tensor
    is_causal: bool


def compact_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor = None,
    device: Any = "cpu",
    **unused: Any,
) -> Tensor:
    """The mask of one forward, in the form above; what transformers calls for a registered name.

    Parameters
    ----------
    batch_size, q_length, kv_length, q_offset, kv_offset : int
        Queries are positions q_offset .. q_offset + q_length - 1, keys likewise.
    mask_function : callable
        (batch, head, query position, key position) -> bool; what transformers composes a model's pattern of.
    attention_mask : boolean tensor, shape (B, positions), optional
        True where a position is no padding.

    Raises
    ------
    ValueError
        If the pattern is neither bidirectional nor causal, or the cache holds room for keys that do not exist yet.
    """
    is_causal = mask_function is not bidirectional_mask_function
    if is_causal and not _same_end(q_offset, q_length, kv_offset, kv_length):
        raise ValueError(
            f"queries end at position {q_offset} + {q_length}, keys at {kv_offset} + {kv_length}: a static cache has "
            "room for later keys; accepted: favorsharp.transformers.StateCache, a DynamicCache, or no cache"
        )
    padding = None
    if attention_mask is not None:
        if attention_mask.shape[-1] < kv_offset + kv_length:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[-1]} positions; accepted: all {kv_offset + kv_length}, with "
                "those that the cache has seen"
            )
        padding = attention_mask[:, kv_offset : kv_offset + kv_length]
        if not torch.compiler.is_compiling() and bool(padding.all()):
            padding = None
    if is_causal and mask_function is not causal_mask_function:
        is_causal = _recognised(
            mask_function, attention_mask, batch_size, q_length, q_offset, kv_offset + kv_length, device
        )
    dtype = torch.int8 if is_causal else torch.bool
    if padding is None:
        return torch.ones((1, 1, 1, 1), dtype=dtype, device=device)
    return padding[:, None, None, :].to(dtype)


def read_mask(mask: Any, n: int, s: int, is_causal: bool) -> Visible:
    """Decode the mask that a layer is handed.

    Parameters
    ----------
    mask : tensor or None
        Of `compact_mask`, or dense: (B or 1, heads or 1, n or 1, s), boolean or added to the scores.
    n, s : int
        Queries and keys of the call.
    is_causal : bool
        What the layer says of itself; believed where there is no mask.

    Raises
    ------
    TypeError, ValueError
        If the mask is something else.
    """
    if mask is None:
        if is_causal and 1 < n < s:
            raise ValueError(
                f"a causal layer with n={n} queries, s={s} keys and no mask does not say which keys precede which query"
            )
        return Visible(None, is_causal)
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"attention mask is a {type(mask).__name__}; {_ACCEPTED}")
    if mask.ndim != 4 or mask.shape[-2] not in (1, n) or mask.shape[-1] not in (1, s):
        raise ValueError(f"attention mask has shape {tuple(mask.shape)} for n={n}, s={s}; accepted: (B, 1, n, s)")
    if mask.dtype is torch.int8:
        if not is_causal:
            raise ValueError("attention mask of int8 says causal, and its layer says it is not")
        return Visible(_keys(mask, s), True)
    if mask.dtype is torch.bool and mask.shape[1] == 1 and mask.shape[2] == 1:
        # one row for all queries; a single query sees the same keys whether or not its layer is causal
        return Visible(_keys(mask, s), is_causal and n == 1)
    return _read_dense(mask, n, s, is_causal)


def _keys(mask: Tensor, s: int) -> Tensor:
    """(B, 1, 1, s) -> boolean (B, 1, s); None where the last axis says that nothing is padding."""
    if mask.shape[-1] == 1 and s != 1:
        return None
    return mask[:, :, 0, :].bool()


def _read_dense(mask: Tensor, n: int, s: int, is_causal: bool) -> Visible:
    if torch.compiler.is_compiling():
        raise ValueError(
            "a dense attention mask cannot be decoded under torch.compile, where its values are not known; accepted: "
            "attention_mask of shape (B, s)"
        )
    if mask.dtype is not torch.bool:
        if not mask.dtype.is_floating_point:
            raise TypeError(f"attention mask has dtype {mask.dtype}; accepted: bool, or floats added to the scores")
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if bool((~hidden & (mask != 0)).any()):
            raise ValueError(f"attention mask adds a bias to the scores, which features do not take; {_ACCEPTED}")
        mask = ~hidden
    if mask.shape[1] > 1 and not torch.equal(mask, mask[:, :1].expand_as(mask)):
        raise ValueError(f"attention mask differs between heads; {_ACCEPTED}")
    mask = mask[:, :1].expand(-1, 1, n, s)
    last = mask[:, :, -1:, :]
    key_mask = None if bool(last.all()) else last[:, :, 0, :]
    if torch.equal(mask, last.expand_as(mask)):
        return Visible(key_mask, is_causal and n == 1)
    if n <= s and torch.equal(mask, last & _causal_pattern(n, s, mask.device)):
        return Visible(key_mask, True)
    raise ValueError(f"attention mask of shape {tuple(mask.shape)} is of another pattern; {_ACCEPTED}")


def _causal_pattern(n: int, s: int, device: Any) -> Tensor:
    """True where key j is not after query i, the queries being the last n of s positions."""
    positions = torch.arange(s, device=device)
    return positions[None, :] <= positions[s - n :, None]


def _same_end(q_offset: Any, q_length: int, kv_offset: int, kv_length: int) -> bool:
    if isinstance(q_offset, torch.Tensor):  # of a static cache, whose keys have a fixed length
        return False
    return bool(q_offset + q_length == kv_offset + kv_length)


def _recognised(
    mask_function: Callable[..., Any],
    attention_mask: Tensor,
    batch_size: int,
    q_length: int,
    q_offset: int,
    length: int,
    device: Any,
) -> bool:
    """Whether a composed pattern comes to plain causal (True) or bidirectional (False) here; or an error.

    A sliding window over a shorter sequence is plain causal. What a cache has seen counts: a window that hides a past
    key is another pattern, however short the block of new ones is.
    """
    if torch.compiler.is_compiling():
        raise ValueError(
            "the model composes its attention mask of several parts, whose values are not known under torch.compile; "
            "pass attention_mask (all ones, where nothing is padding): without it packed sequences are looked for"
        )

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
        )

    asked = dense(mask_function)
    if torch.equal(asked, dense(causal_mask_function)):
        return True
    if torch.equal(asked, dense(bidirectional_mask_function)):
        return False
    raise ValueError(
        "the model asks for another attention pattern (a sliding window, chunks, packed sequences, a prefix); "
        f"{_ACCEPTED}"
    )
