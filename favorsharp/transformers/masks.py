"""Makes and reads attention masks of transformers models: which keys are padding, and whether attention is causal.

transformers calls a registered mask function once in each forward pass, and passes its result to every layer. Linear
attention needs only one bit for each key and one bit for the whole mask. So `compact_mask` returns one of the following
masks instead of an n by n mask:

    bool   (B, 1, 1, s)   every query sees the keys that are True
    int8   (B, 1, 1, s)   query i sees the keys that are 1, up to its own position
    int16  (B, 1, 1, s)   a pattern that is not supported: the layer that reads it raises an error
    int32  (B, 1, 1, s)   as int8, and a query sees keys at most `reach[0]` positions before it
    int64  (B, 1, 1, s)   as bool, and a query sees keys at most `reach[0]` positions before and `reach[1]` behind it
    uint8  (B, 1, 1, s)   a pattern that is unknown under torch.compile: the layer that reads it raises an error
    a stride of 0         no key is padding

Other code does not know this format. So the mask is a `CompactMask`, a tensor that can be moved but not computed with.
While a graph is recorded, tensors cannot have a class of their own. There, the mask has two more axes, of lengths 2 and
3, so that it does not broadcast with the scores of other code, and with a window two more that are longer by 1 than its
`reach`; their strides are 0.
If a layer joins two masks along the keys, the last `others` keys belong to another sequence and precede all queries;
this is known only outside graphs. A dense mask that the caller made passes through transformers unchanged; `read_mask`
compares it, value by value, with the bidirectional and the causal pattern.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from favorsharp.transformers.patterns import Reach, kind_of

Tensor = Any

_ACCEPTED = (
    "accepted: key padding, causal, or both (bidirectional and causal models with attention_mask of shape (B, s))"
)


_REFUSED = {
    torch.int16: "the model asks for another attention pattern (chunks, packed sequences, a prefix); " + _ACCEPTED,
    torch.uint8: "the model composes its attention mask of several parts, whose values are not known under "
    "torch.compile; pass attention_mask (all ones, where nothing is padding): without it packed sequences are looked "
    "for",
}
"""The error messages for masks of patterns that are not supported."""

_HARMLESS = frozenset({"allow_is_causal_skip", "allow_is_bidirectional_skip", "local_size", "dtype", "config"})
"""Keywords of mask functions that have no effect here: whether a mask may be omitted, the length of a window that
`mask_function` already contains, the dtype of masks for eager attention, and the config of the model."""

_MOVES = frozenset(
    {
        *("__get__", "__set__", "__getitem__", "__len__", "__hash__", "__repr__", "__format__"),
        *("__reduce_ex__", "to", "cpu", "cuda", "type", "contiguous", "clone", "detach", "requires_grad_"),
        *("pin_memory", "record_stream", "share_memory_", "as_subclass", "repeat", "reshape", "dim", "size", "stride"),
        *("storage_offset", "numel", "nelement", "element_size", "get_device", "data_ptr", "untyped_storage"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_pinned", "is_shared", "is_inference", "_is_view"),
        *("is_conj", "is_neg", "is_same_size", "is_signed", "_is_zerotensor"),
    }
)
"""Operations on a mask that do not depend on the meaning of its numbers."""


_HIDDEN = -9000.0
"""A bias that hides a key: models that add -10000 round it in half precision, and exp of it is 0 in every dtype."""

_RECORDED = (2, 3)
"""The lengths of the two axes that every mask has in addition while a graph is recorded."""


class CompactMask(torch.Tensor):
    """The result of `compact_mask`: a tensor that may be moved, sliced and copied, and that only `read_mask` reads.

    A layer that computes with its mask does not know the format above: it would add the ones to its scores, and attend
    to padding or to the future. So any computation raises an error that names the layer. One use is allowed: a boolean
    mask as the condition of `torch.where`, because it has the usual meaning of a boolean mask there.
    """

    reach: Reach | None = None
    """For masks of sliding windows: how far before and after a query the keys that it sees reach."""

    others: int = 0
    """The number of keys at the end that belong to another sequence."""

    known: dict[tuple[int, int, bool], "Visible"] | None = None
    """The results of `read_mask` for this mask, by the numbers of queries and keys and by whether a layer is causal."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, own = func.__name__, bool(args) and isinstance(args[0], CompactMask)
        if own and name in _MOVES and (name != "__getitem__" or _keeps_queries(args[1])):
            out = super().__torch_function__(func, types, args, kwargs)
            if not isinstance(out, torch.Tensor):
                return out
            if out.dtype == args[0].dtype:
                return out.described(args[0].reach, args[0].others) if isinstance(out, CompactMask) else out
        if func is torch.cat and (joined := _joined(*args, **kwargs)) is not None:
            return joined
        others = (*args[1:], *kwargs.values())
        is_condition = own and func is torch.where and not any(isinstance(x, CompactMask) for x in others)
        if is_condition and args[0].dtype is torch.bool:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        raise ValueError(
            f"{_reader()} computes with its attention mask itself ({name}). The mask is one that only the attention "
            "registered by favorsharp.transformers reads, so the layer would see padding or the future; accepted: "
            "models whose attention goes through transformers' attention interface and passes its mask on as it is, or "
            "attn_implementation='eager' for this model"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompactMask":
        twin: CompactMask = memo.setdefault(id(self), self.clone())
        return twin

    def described(self, reach: Reach | None, others: int = 0) -> "CompactMask":
        """The mask itself, to which these are attached."""
        self.reach, self.others, self.known = reach, others, None
        return self

    def plain(self) -> Tensor:
        """The same numbers as an ordinary tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.detach()


def _joined(masks: Any = (), dim: int = 0, **others: Any) -> CompactMask | None:
    """A causal mask and the mask of another sequence's keys, joined along the keys; None for other tensors."""
    if len(masks) != 2 or others or not all(isinstance(x, CompactMask) and x.ndim == 4 and not x.others for x in masks):
        return None
    own, other = masks
    if dim not in (-1, 3) or own.dtype not in (torch.int8, torch.int32) or other.dtype is not torch.bool:
        return None
    numbers = [x.plain().to(own.dtype) for x in masks]
    if all(x.stride(-1) == 0 for x in masks):
        s = own.shape[-1] + other.shape[-1]
        whole = numbers[0][..., :1].expand(*own.shape[:-1], s)
    else:
        whole = torch.cat(numbers, dim=-1)
    joined: CompactMask = whole.as_subclass(CompactMask)
    return joined.described(own.reach, int(other.shape[-1]))


def _keeps_queries(index: Any) -> bool:
    """Whether an index does not slice the axis of queries, which has length 1 and stands for all queries."""
    entries = index if isinstance(index, tuple) else (index,)
    if any(entry is Ellipsis for entry in entries):
        return entries[0] is Ellipsis and (len(entries) < 3 or entries[-2] == slice(None)) and len(entries) < 4
    return len(entries) < 3 or entries[2] == slice(None)


def _reader() -> str:
    """The class of the layer that made the call; if there is none, the name of the calling function."""
    if torch.compiler.is_compiling():
        return "the model"
    frame: Any = sys._getframe(2)
    first = frame.f_code.co_name
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module):
            return type(owner).__name__
        frame = frame.f_back
    return f"the function {first}"


@dataclass(frozen=True)
class Visible:
    """Which keys a query may see.

    Attributes
    ----------
    key_mask : tensor of bool, shape (B, 1, s), or None
        True where a key is not padding; None if no key is padding.
    is_causal : bool
        Whether each of the queries, which are at the last n positions, sees only keys up to its own position.
    reach : (int, int) or None
        With a sliding window, how far before and after a query the visible keys reach; None without one.
    others : int
        The number of keys at the end that belong to another sequence, and that all queries see.
    """

    key_mask: Tensor
    is_causal: bool
    reach: Reach | None = None
    others: int = 0


def _padding_of(attention_mask: Tensor, start: int, stop: int) -> Tensor | None:
    """Which of the positions from `start` on and before `stop` are no padding; None if all of them are."""
    if attention_mask.shape[-1] < stop:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[-1]} positions; accepted: all {stop}, with those that the cache "
            "has seen"
        )
    padding = attention_mask[:, start:stop]
    return None if not torch.compiler.is_compiling() and bool(padding.all()) else padding


def compact_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor = None,
    device: Any = "cpu",
    use_vmap: bool = False,
    **keywords: Any,
) -> Tensor:
    """Make the mask of one forward pass, in the format above; transformers calls this for a registered name.

    Parameters
    ----------
    batch_size, q_length, kv_length, q_offset, kv_offset : int
        Queries are at positions q_offset .. q_offset + q_length - 1, and keys at kv_offset .. kv_offset + kv_length -
        1.
    mask_function : callable
        (batch, head, query position, key position) -> bool; the attention pattern of the model.
    attention_mask : tensor of bool, shape (B, positions), optional
        True where a position is not padding.
    use_vmap : bool
        Whether transformers evaluates the pattern by vmap, which it does if the model adds a pattern of its own.

    Returns
    -------
    CompactMask, or a tensor with more axes
        A mask for a pattern that is not bidirectional, causal or a sliding window raises an error only when a layer
        reads it, because some models make masks that none of their layers uses.

    Raises
    ------
    ValueError
        If the cache holds room for keys that do not exist yet, or a keyword is unknown.
    """
    unknown = [name for name, value in keywords.items() if name not in _HARMLESS and value is not None]
    if unknown:
        raise ValueError(
            f"transformers asks for a mask with {', '.join(unknown)}, which {_reader()} gives a meaning that is not "
            f"known here; accepted: {', '.join(sorted(_HARMLESS))}"
        )
    is_causal = mask_function is not bidirectional_mask_function
    if is_causal and not _same_end(q_offset, q_length, kv_offset, kv_length):
        raise ValueError(
            f"queries end at position {q_offset} + {q_length}, keys at {kv_offset} + {kv_length}: a static cache has "
            "room for later keys; accepted: favorsharp.transformers.StateCache, a DynamicCache, or no cache"
        )
    padding = None if attention_mask is None else _padding_of(attention_mask, kv_offset, kv_offset + kv_length)
    dtype, reach = kind_of(
        mask_function, attention_mask, batch_size, q_length, q_offset, kv_offset + kv_length, use_vmap, device, keywords
    )
    if padding is None:
        mask = torch.ones(1, dtype=dtype, device=device).as_strided((batch_size, 1, 1, kv_length), (0, 0, 0, 0))
    else:
        mask = padding[:, None, None, :].to(dtype).clone(memory_format=torch.contiguous_format)
    if torch.compiler.is_compiling() or type(mask) is not torch.Tensor:
        more = (*_RECORDED, *(length + 1 for length in reach or ()))
        return mask.reshape(*mask.shape, *(1 for _ in more)).expand(*mask.shape, *more)
    return mask.as_subclass(CompactMask).described(reach)


def read_mask(mask: Any, n: int, s: int, is_causal: bool) -> Visible:
    """Decode the mask that a layer receives.

    Parameters
    ----------
    mask : tensor or None
        The result of `compact_mask`, or a dense mask (B or 1, heads or 1, n or 1, s), either boolean or added to the
        scores.
    n, s : int
        The numbers of queries and keys in the call.
    is_causal : bool
        Whether the layer declares itself causal; this decides if there is no mask.

    Raises
    ------
    TypeError, ValueError
        If the mask is anything else.
    """
    if isinstance(mask, CompactMask):
        return _read_once(mask, n, s, is_causal)
    if isinstance(mask, torch.Tensor) and mask.ndim > 4 and mask.shape[4:6] == _RECORDED:
        reach = (mask.shape[6] - 1, mask.shape[7] - 1) if mask.ndim == 8 else None
        return _read_compact(mask[(..., *(0 for _ in mask.shape[4:]))], n, s, is_causal, reach)
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
    if mask.dtype is torch.bool and mask.shape[1] == 1 and mask.shape[2] == 1:
        # one row for all queries; a single query sees the same keys in causal and bidirectional layers
        return Visible(mask.expand(-1, -1, -1, s)[:, :, 0, :], is_causal and n == 1)
    return _read_dense(mask, n, s, is_causal)


def _read_once(mask: CompactMask, n: int, s: int, is_causal: bool) -> Visible:
    """As `_read_compact`, but layers that get the same mask share the result."""
    if mask.known is None:
        mask.known = {}
    seen = mask.known.get((n, s, is_causal))
    if seen is None:
        seen = replace(_read_compact(mask.plain(), n, s, is_causal, mask.reach), others=mask.others)
        mask.known[n, s, is_causal] = seen
    return seen


def _read_compact(mask: Tensor, n: int, s: int, is_causal: bool, reach: Reach | None = None) -> Visible:
    if mask.dtype in _REFUSED:
        raise ValueError(_REFUSED[mask.dtype])
    if mask.ndim != 4 or mask.shape[-1] != s:
        raise ValueError(
            f"attention mask is for {mask.shape[-1]} keys, and its layer has {s}; accepted: as many as the model's "
            "mask has, with those that its cache holds"
        )
    key_mask = None if mask.stride(-1) == 0 else mask[:, :1, 0, :].bool()
    if mask.dtype in (torch.int32, torch.int64):
        if reach is None or (mask.dtype is torch.int64 and n != s):
            raise ValueError(
                f"a sliding window with n={n} queries and s={s} keys: its length was lost, or its queries belong to "
                "another sequence; accepted: the mask as the model made it, in self-attention"
            )
        return Visible(key_mask, mask.dtype is torch.int32, reach)
    if mask.dtype is torch.int8:  # as in eager attention, the mask decides, and not the layer's attributes
        return Visible(key_mask, True)
    return Visible(key_mask, is_causal and n == 1)


def _read_dense(mask: Tensor, n: int, s: int, is_causal: bool) -> Visible:
    if torch.compiler.is_compiling():
        raise ValueError(
            "a dense attention mask cannot be decoded under torch.compile, where its values are not known; accepted: "
            "attention_mask of shape (B, s)"
        )
    if mask.dtype is not torch.bool:
        if not mask.dtype.is_floating_point:
            raise TypeError(f"attention mask has dtype {mask.dtype}; accepted: bool, or floats added to the scores")
        hidden = mask <= max(_HIDDEN, torch.finfo(mask.dtype).min / 2)
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
    """True where key j is not after query i; the queries are at the last n of s positions."""
    positions = torch.arange(s, device=device)
    return positions[None, :] <= positions[s - n :, None]


def _same_end(q_offset: Any, q_length: int, kv_offset: int, kv_length: int) -> bool:
    if isinstance(q_offset, torch.Tensor):  # a static cache, whose keys have a fixed length
        return False
    return bool(q_offset + q_length == kv_offset + kv_length)
