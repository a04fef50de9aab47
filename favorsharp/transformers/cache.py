"""The public class `StateCache`: a cache for generation that holds states of constant size instead of all keys.

transformers calls the cache in each layer; the attention function finds the layer's state by `layer_of`.
"""

import sys
import weakref
from dataclasses import replace
from functools import cache, partialmethod
from types import FrameType
from typing import Any

import torch
from transformers import AttentionMaskInterface, DynamicCache, cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin

from favorsharp._values import held_arrays, map_arrays
from favorsharp.landmarks.state import LandmarkState
from favorsharp.ops.state import State
from favorsharp.transformers.masks import compact_mask
from favorsharp.transformers.models import label
from favorsharp.transformers.windows import NearKeys

Tensor = Any

Memory = State | LandmarkState | NearKeys
"""What a layer of the cache holds."""

_MARK = "_favorsharp_layer"
"""Attribute of the keys that the cache returns; through it the attention function finds the layer of the cache."""

_INSTEAD = "accepted for such a layer: a DynamicCache, or no cache"


class StateLayer(CacheLayerMixin):
    """The memory of one layer: a state of constant size, and the number of positions it has seen.

    `update` marks the new keys and returns them with their values; the attention function then adds them to the state.
    For cross-attention, `keys` and `values` are empty after the first step, and these keys are marked too.

    The attention function must receive the tensors that `update` returned, or tensors for the same positions that the
    layer computed from them, as latent attention does. It must receive them only once, because a state cannot tell
    whether it already contains a key.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Memory | None = None
        self.seen = 0
        self._given: tuple[Tensor, Tensor] | None = None
        self._received = False
        self._keeps_one = False  # whether the model is known to keep no cross-attention in this cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate nothing: the first keys make the state."""
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, kwargs: Any = None, **unknown: Any
    ) -> tuple[Tensor, Tensor]:
        """Return new keys and values, marked for the attention function, which adds them to the state.

        The other arguments are for other kinds of caches and have no effect here: positions and rotations (`args`), and
        `kwargs`, which paged caches read.
        """
        if unknown:
            unknown = {name: value for name, value in unknown.items() if name != "cache_kwargs" and value is not None}
        caller = _caller()
        if unknown:
            raise ValueError(
                f"{_name_of(caller)} gives its cache {', '.join(unknown)}, which a StateCache does not serve; "
                f"{_INSTEAD}"
            )
        if caller is not None and not self._keeps_one:
            if getattr(_config_of(caller), "cross_attention_layers", None):
                raise ValueError(
                    f"{_name_of(caller)} belongs to a model that keeps self-attention and cross-attention in one cache "
                    f"and looks for the keys of an image there, which a StateCache does not hold; {_INSTEAD}"
                )
            self._keeps_one = True
        if self._given is not None:
            _hand_out(None, None)
            raise ValueError(self._why_not_taken(caller))
        self.is_initialized = True
        self._given = (key_states, value_states)
        setattr(key_states, _MARK, self)
        _hand_out(self, caller)
        return key_states, value_states

    def receive(self, module: Any, key: Tensor, value: Tensor) -> None:
        """Check that attention received what `update` returned last, or the empty keys of an earlier step."""
        given = self._given
        _hand_out(None, None)
        if key is self.keys and self.keys is not None:
            if value is not self.values:
                raise ValueError(f"{label(module)} changes the values of its cache in a later step; {_INSTEAD}")
        elif given is None or self._received:
            raise ValueError(_again(module))
        elif {key.shape[-2], value.shape[-2]} != {given[0].shape[-2]} or key.shape[0] != given[0].shape[0]:
            raise ValueError(
                f"{label(module)} changes its keys between cache and attention: the cache gave shape "
                f"{tuple(given[0].shape)}, and attention gets {tuple(key.shape)}, which are other positions; {_INSTEAD}"
            )
        self._received = given is not None

    def take(self, state: Memory, *, keep: tuple[Tensor, Tensor] | None = None) -> None:
        """Store the state that contains the last keys; `keep` holds empty keys and values to return in later steps."""
        self.state = _compact(state)
        if self._given is not None:
            self.seen += int(self._given[0].shape[-2])
        self._given, self._received = None, False
        if keep is not None:
            self.keys, self.values = keep
            setattr(self.keys, _MARK, self)

    def _why_not_taken(self, caller: FrameType | None) -> str:
        if self._received:
            return (
                "a StateCache was used again after a call that raised an error: some layers hold its tokens and others "
                "do not; accepted: reset() it, or a new one"
            )
        name = _name_of(caller)
        registered = getattr(None if caller is None else _config_of(caller), "_attn_implementation", None)
        if AttentionMaskInterface._global_mapping.get(registered) is not compact_mask:
            return (
                f"a StateCache was passed to a model whose attention is not favorsharp's: keys that {name} gave it "
                f"were never taken into its state, as its attn_implementation is {registered!r}; accepted: a name "
                "registered by favorsharp.transformers"
            )
        return (
            f"{name} did not pass the keys of its cache on to attention as they were (it repeats, splits or rebuilds "
            f"them, or calls update twice), so they were never taken into the state of a StateCache; {_INSTEAD}"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number and the offset of the keys that the mask of a call covers, which are the new ones."""
        return query_length, self.seen

    def get_seq_length(self) -> int:
        """The number of positions seen."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1, which means no limit."""
        return -1

    get_max_cache_shape = get_max_length  # the name until transformers 5.12

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.keys, self.values, self.seen = None, None, None, 0
        self._given, self._received, self._keeps_one = None, False, False
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
        """Raise an error, because keys cannot be removed from a state again."""
        if tokens_to_remove:
            raise NotImplementedError(
                "a StateCache cannot forget its last tokens; assisted decoding needs another cache"
            )

    def offload(self) -> None:
        """Do nothing: a state is small, and stays on its device."""

    def prefetch(self) -> None:
        """Do nothing: a state is small, and stays on its device."""

    def _rows(self, change: Any) -> None:
        if self.state is None:
            return
        self.state = map_arrays(self.state, change)
        if self.keys is not None:
            self.keys, self.values = change(self.keys), change(self.values)
            setattr(self.keys, _MARK, self)


class StateCache(Cache):
    """A cache of constant size for causal generation: `model.generate(..., cache=StateCache())`.

    Each layer keeps a `favorsharp.State` and, with a window, the keys and values of two blocks; it keeps no other keys.
    With landmarks it keeps a `favorsharp.LandmarkState`, whose size varies between m and 2 m keys and two blocks.
    An encoder-decoder model takes `EncoderDecoderCache(StateCache(), StateCache())`, with one cache for self-attention
    and one for cross-attention. The attention of the model must be registered by `register`, and calibrated unless its
    method needs no calibration. Beam search is supported; cropping is not. Use a cache for one generation only; `reset`
    empties it.

    Parameters
    ----------
    config : transformers.PreTrainedConfig, optional
        The config of the model. Only models that have convolutions or recurrences beside their attention need it: the
        cache then holds their states too, as a `DynamicCache` does.

    Examples
    --------
    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from favorsharp.transformers import StateCache, calibrate, register
    >>> register("favorsharp", num_features=64, rng=0)
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4)).eval()
    >>> model.set_attn_implementation("favorsharp")
    >>> maps = calibrate(model, [torch.randint(50, (2, 64))])
    >>> prompt = torch.randint(50, (1, 10))
    >>> out = model.generate(prompt, cache=StateCache(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    >>> out.shape[0], bool(out.shape[1] <= 13)
    (1, True)
    """

    def __init__(self, config: Any = None, **unknown: Any) -> None:
        if unknown:
            raise ValueError(
                f"{_name_of(_caller())} makes a StateCache with {', '.join(unknown)}; accepted: config alone, and for "
                "a model that makes its caches itself (T5Gemma 2) a DynamicCache"
            )
        if config is None:
            super().__init__(layer_class_to_replicate=StateLayer)
        else:
            super().__init__(layers=[_layer_for(layer) for layer in DynamicCache(config=config).layers])

    def _other_memory(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self.layer_class_to_replicate is not None or name == "update_indexer":
            raise ValueError(
                f"{_name_of(_caller())} keeps another memory than keys and values in its cache (of a convolution, a "
                "recurrence or an indexer), for which this StateCache has no place; accepted: "
                "StateCache(config=model.config) for convolutions and recurrences, a DynamicCache(config=model.config) "
                "for all"
            )
        return getattr(super(), name)(*args, **kwargs)

    has_previous_state = partialmethod(_other_memory, "has_previous_state")
    get_conv_state = partialmethod(_other_memory, "get_conv_state")
    update_conv_state = partialmethod(_other_memory, "update_conv_state")
    get_recurrent_state = partialmethod(_other_memory, "get_recurrent_state")
    update_recurrent_state = partialmethod(_other_memory, "update_recurrent_state")
    update_indexer = partialmethod(_other_memory, "update_indexer")

    @property
    def num_bytes(self) -> int:
        """The memory of all states in bytes, including recurrences and what is kept for the next tokens."""
        spans: list[tuple[int, int]] = []  # arrays of a state may share their memory
        beside = 0

        def measure(x: Tensor) -> None:
            storage = x.untyped_storage()
            spans.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))

        for layer in self.layers:
            if getattr(layer, "state", None) is not None:
                getattr(layer.state, "recent_k", None)  # makes the arrays of keys that are in a store
                for x in held_arrays(layer.state):
                    measure(x)
                kept = (getattr(layer.state, name, None) for name in ("single_tokens", "store"))
                beside += sum(getattr(x, "num_bytes", 0) for x in kept)
            for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
                for x in states.values():
                    if x is not None:
                        measure(x)
        return beside + _length(spans)


def _length(spans: list[tuple[int, int]]) -> int:
    """The length of the union of intervals."""
    total = end = 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def _layer_for(layer: Any) -> Any:
    """The layer of a StateCache in place of the layer of a DynamicCache."""
    recurrent = getattr(cache_utils, "LinearAttentionLayer", ())  # early versions lack this class and DummyLayer
    if isinstance(layer, cache_utils.DynamicLayer):
        return _recurrent_layers()[1](layer.number_of_states) if isinstance(layer, recurrent) else StateLayer()
    if isinstance(layer, recurrent):
        return _recurrent_layers()[0](layer.number_of_states)
    if isinstance(layer, getattr(cache_utils, "DummyLayer", ())):
        return layer
    raise ValueError(
        f"the model keeps a {type(layer).__name__} in its cache, for which a StateCache has no place; accepted: a "
        "DynamicCache(config=model.config), or no cache"
    )


@cache
def _recurrent_layers() -> tuple[Any, Any]:
    """Two classes of layers: with a recurrence alone, and with a recurrence beside keys."""

    class RecurrentLayer(cache_utils.LinearAttentionLayer):
        """The states of convolutions and recurrences; their rows can be repeated and chosen."""

        def _rows(self, change: Any) -> None:
            for states in (self.conv_states, self.recurrent_states):
                states.update({i: change(x) for i, x in states.items() if x is not None})

        batch_repeat_interleave = StateLayer.batch_repeat_interleave
        batch_select_indices = StateLayer.batch_select_indices

    class HybridStateLayer(RecurrentLayer, StateLayer):
        """A `StateLayer` with the states of convolutions and recurrences."""

        def __init__(self, number_of_states: int = 1) -> None:
            StateLayer.__init__(self)
            cache_utils.LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

        def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
            if not args:
                super().lazy_initialization(**kwargs)

        def reset(self) -> None:
            """Forget everything."""
            super().reset()
            StateLayer.reset(self)

        def _rows(self, change: Any) -> None:
            StateLayer._rows(self, change)
            super()._rows(change)

        reorder_cache = StateLayer.reorder_cache
        crop, get_max_length = StateLayer.crop, StateLayer.get_max_length
        offload, prefetch = StateLayer.offload, StateLayer.prefetch

    return RecurrentLayer, HybridStateLayer


def layer_of(module: Any, key: Tensor, value: Tensor) -> StateLayer | None:
    """The layer of a `StateCache` that returned these keys and values; None if they do not come from a `StateCache`.

    Raises
    ------
    ValueError
        If the module got keys and values from its cache, and then passed other ones to attention, or the same ones a
        second time.
    """
    global _spent
    layer: StateLayer | None = getattr(key, _MARK, None)
    if torch.compiler.is_compiling() or (layer is None and _handed_out is None and _spent is None):
        return layer
    before, _spent = _spent, None
    handed = _handed_out
    caller = None if handed is None else _running(id(handed[1]))
    if layer is None:
        if handed is not None and caller is not None:
            layer = handed[0]
        elif before is not None and before[0]() is module:
            same = _running(before[1])
            if same is not None and same > before[2]:
                raise ValueError(_again(module))
    if layer is not None:
        layer.receive(module, key, value)
        if handed is not None and caller is not None:
            _spent = weakref.ref(module), id(handed[1]), caller
    return layer


_spent: tuple[Any, int, tuple[int, ...]] | None = None
"""The attention module that got the keys of a cache last (a weak reference: another may get its address), the call of
the module that has them, by its id (a frame that is kept would keep its tensors), and how far that call had come: a
second call of attention comes later."""


def _again(module: Any) -> str:
    return (
        f"{label(module)} attends again to keys that its cache gave out before (in a second call, or shared by another "
        f"layer), and a StateCache would count them twice; {_INSTEAD}"
    )


_handed_out: tuple[StateLayer, FrameType] | None = None
"""The layer whose keys were returned and not yet attended to, and the running call of the module that has them."""


def _hand_out(layer: StateLayer | None, caller: FrameType | None) -> None:
    global _handed_out
    _handed_out = None if layer is None or caller is None else (layer, caller)


_OF_CACHES = vars(cache_utils)
"""The global names of frames that belong to caches of transformers; their local names need not be looked up."""


def _caller() -> FrameType | None:
    """The stack frame of the module that called the cache."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and (
        frame.f_globals is _OF_CACHES or not isinstance(frame.f_locals.get("self"), torch.nn.Module)
    ):
        frame = frame.f_back
    return frame


def _config_of(caller: FrameType) -> Any:
    return getattr(caller.f_locals["self"], "config", None)


def _name_of(caller: FrameType | None) -> str:
    return "the model" if caller is None else label(caller.f_locals["self"])


def _running(caller: int) -> tuple[int, ...] | None:
    """The instruction that the frame with this id has reached, and those of the frames that it called.

    Empty if not running.
    """
    places: list[int] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        places.append(frame.f_lasti)
        if id(frame) == caller:
            return tuple(reversed(places))
        frame = frame.f_back
    return None


def _compact(state: Memory) -> Memory:
    """A state whose recent keys are copies if they are views, which would keep the arrays of a whole prompt in memory.

    Only states with a window have recent keys. A state that needs no copy is returned itself, because a copy would lose
    what a step has attached to it for the next step. A state whose keys are in a store of two blocks is returned
    itself, too.
    """
    if not isinstance(state, State) or not state.window or state.store is not None:
        return state
    names = ("recent_k", "recent_v", "recent_mask")
    views = {name: x.clone() for name in names if _is_part(x := getattr(state, name))}
    return replace(state, **views) if views else state


def _is_part(x: Tensor) -> bool:
    """Whether the memory of a tensor is larger than the tensor, or holds its numbers more than once."""
    return bool(x.untyped_storage().nbytes() != x.numel() * x.element_size())
