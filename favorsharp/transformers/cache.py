"""Generation in constant memory: a transformers cache that holds states in place of keys and values."""

from dataclasses import fields, replace
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from favorsharp._arrays import is_array
from favorsharp.ops.state import State

Tensor = Any

_MARK = "_favorsharp_layer"
"""Attribute of the keys that a layer of the cache returns: how the attention function finds it."""


class StateLayer(CacheLayerMixin):
    """One layer's memory: a state whose size does not grow, and the number of positions it has seen.

    `update` passes the new keys and values on, marked; the attention function takes them into the state. For
    cross-attention, `keys` and `values` are empty after the first step, and marked too.
    """

    is_sliding = False

    def __init__(self, **unused: Any) -> None:
        super().__init__()
        self.state: State | None = None
        self.seen = 0
        self._awaited = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: a state is made by the first keys."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Pass new keys and values on to the attention function, which is to take them into the state."""
        if self._awaited:
            raise RuntimeError(
                "a StateCache was passed to a model whose attention is not favorsharp's: keys that it was given were "
                "never taken into its state; accepted: attn_implementation registered by favorsharp.transformers"
            )
        self.is_initialized = True
        self._awaited = int(key_states.shape[-2])
        setattr(key_states, _MARK, self)
        return key_states, value_states

    def take(self, state: State, *, keep: tuple[Tensor, Tensor] | None = None) -> None:
        """Keep a state in place of the keys handed out last; `keep` are empty keys and values that stand for them."""
        self.state = _compact(state)
        self.seen += self._awaited
        self._awaited = 0
        if keep is not None:
            self.keys, self.values = keep
            setattr(self.keys, _MARK, self)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys a call sees as keys: the new ones."""
        return query_length, self.seen

    def get_seq_length(self) -> int:
        """Positions seen."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: no bound."""
        return -1

    get_max_cache_shape = get_max_length  # its name until transformers 5.12

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.keys, self.values, self.seen, self._awaited = None, None, None, 0, 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of the batch in another order, as beam search does."""
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        self._rows(lambda x: x[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what has entered a sum cannot be told apart again."""
        if tokens_to_remove:
            raise NotImplementedError(
                "a StateCache cannot forget its last tokens; assisted decoding needs another cache"
            )

    def offload(self) -> None:
        """Nothing: a state is small, and stays where it is."""

    def prefetch(self) -> None:
        """Nothing: a state is small, and stays where it is."""

    def _rows(self, change: Any) -> None:
        if self.state is None:
            return
        values = {field.name: getattr(self.state, field.name) for field in fields(self.state)}
        self.state = replace(self.state, **{name: change(x) for name, x in values.items() if is_array(x)})
        if self.keys is not None:
            self.keys, self.values = change(self.keys), change(self.values)
            setattr(self.keys, _MARK, self)


class StateCache(Cache):
    """A cache of constant size for causal generation: `model.generate(..., cache=StateCache())`.

    Each layer keeps a `favorsharp.State` (with a window also the keys and values of two blocks) and no further keys.
    An encoder-decoder model takes `EncoderDecoderCache(StateCache(), StateCache())`, one for self- and one for
    cross-attention. The model's attention must be one that `register` named, and calibrated. Beam search reorders it;
    it cannot be cropped. One cache serves one generation; `reset` makes it empty again.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=StateLayer)

    @property
    def num_bytes(self) -> int:
        """Memory of all states, in bytes."""
        return sum(
            x.untyped_storage().nbytes()
            for layer in self.layers
            if layer.state is not None
            for x in (getattr(layer.state, field.name) for field in fields(layer.state))
            if isinstance(x, torch.Tensor)
        )


def layer_of(key: Tensor) -> StateLayer | None:
    """The layer of a `StateCache` that handed out these keys; None for keys from elsewhere."""
    return getattr(key, _MARK, None)


def _compact(state: State) -> State:
    """The state without views into longer arrays, which would keep the whole prompt in memory."""
    names = ("recent_k", "recent_v", "recent_mask")
    return replace(state, **{name: getattr(state, name).clone() for name in names})
