"""The public functions `calibrate`, `save_maps` and `load_maps`: fit the maps of a model, save them and load them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from favorsharp.features import FeatureMap, feature_map
from favorsharp.fitting import fit
from favorsharp.moments import Moments, combine, moments
from favorsharp.storage import load, save
from favorsharp.transformers.attention import set_collector
from favorsharp.transformers.maps import CALIBRATED, CHILD, FrozenMaps, crosses
from favorsharp.transformers.masks import Visible
from favorsharp.transformers.models import label
from favorsharp.transformers.registrations import REGISTERED, WITHOUT_MAPS, Registration

Tensor = Any


@dataclass
class _Layer:
    """The moments and options gathered from the calls of one layer."""

    registration: Registration
    module: Any
    scaling: float
    moments: Moments
    like: Tensor


@dataclass
class _Collector:
    """Gathers the moments of every layer of a model while the model runs with exact attention."""

    modules: frozenset[int]
    layers: dict[int, _Layer] = field(default_factory=dict)
    query_mask: Tensor = None
    windows: int = 0
    """The number of calls of layers with a sliding window, which need no map."""

    def wants(self, module: Any) -> bool:
        return id(module) in self.modules

    def collect(
        self,
        registration: Registration,
        module: Any,
        query: Tensor,
        key: Tensor,
        seen: Visible,
        scaling: float | None,
        grouped: bool,
    ) -> None:
        if registration.method in WITHOUT_MAPS:
            why = WITHOUT_MAPS[registration.method]
            raise ValueError(f"attn_implementation={registration.name!r} {why}: there is nothing to calibrate")
        mask_x = seen.key_mask
        if crosses(module, query.shape[-2], key.shape[-2], seen) or query.shape[-2] != key.shape[-2]:
            # the padding of the queries is known from the self-attention before this layer
            fits = self.query_mask is not None and self.query_mask.shape[-1] == query.shape[-2]
            mask_x = self.query_mask if fits and self.query_mask.shape[0] in (1, query.shape[0]) else None
        else:
            self.query_mask = seen.key_mask
        found = moments(
            query.detach(), key.detach(), axis=(0, -2), mask_x=mask_x, mask_y=seen.key_mask, enable_gqa=grouped
        )
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        known = self.layers.get(id(module))
        if known is None:
            self.layers[id(module)] = _Layer(registration, module, scale, found, query.new_empty(0))
            return
        if known.scaling != scale:
            raise ValueError(f"{label(module)} was called with scaling {known.scaling} and {scale}: no map serves both")
        known.moments = combine(known.moments, found)


@torch.inference_mode(False)  # training cannot use tensors that were made in inference mode
def calibrate(model: Any, batches: Iterable[Any]) -> dict[str, FeatureMap]:
    """Fit the feature maps of all attention layers on sample inputs, and freeze them.

    The model runs over the batches with exact attention, without gradients and in evaluation mode. Each layer of self-
    or cross-attention gets one map for each key head, fitted to all positions that are not padding. From then on the
    layer uses this map for every input. Causal attention and cross-attention need calibration.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model whose `attn_implementation` was registered by `register`. Calibrate it before `torch.compile`.
    batches : iterable
        Inputs of the model: mappings (called as `model(**batch)`) or tensors (called as `model(batch)`). A few thousand
        tokens, similar to those of later use, are enough.

    Returns
    -------
    dict
        The maps, with the names of the modules as keys.

    Raises
    ------
    TypeError
        If `batches` is a single batch and not an iterable of batches.
    ValueError
        If no layer calls a registered attention, or there are no batches.

    Examples
    --------
    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from favorsharp.transformers import calibrate, register
    >>> register("favorsharp", num_features=64, rng=0)
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4)).eval()
    >>> model.set_attn_implementation("favorsharp")
    >>> maps = calibrate(model, [torch.randint(50, (2, 64))])
    >>> list(maps)
    ['transformer.h.0.attn']
    """
    if isinstance(batches, Mapping | torch.Tensor | str):
        raise TypeError(f"batches must be an iterable of batches, got {type(batches).__name__}; accepted: [batch]")
    model = getattr(model, "_orig_mod", model)
    named = dict(model.named_modules())
    collector = _Collector(frozenset(map(id, named.values())))
    if _run(model, named.values(), batches, collector) == 0:
        raise ValueError("batches must hold at least one batch, got none")
    if not collector.layers and collector.windows:
        raise ValueError(
            f"every attention layer of {type(model).__name__} has a sliding window, which is exact with every method: "
            "there is nothing to calibrate"
        )
    if not collector.layers:
        raise ValueError(
            f"no attention layer of {type(model).__name__} called a registered attention: its attn_implementation is "
            f"{getattr(model.config, '_attn_implementation', None)!r}; accepted: {', '.join(REGISTERED) or 'none yet'}"
        )
    names = {id(module): name for name, module in named.items()}
    found: dict[str, FeatureMap] = {}
    for key, layer in collector.layers.items():
        registration = layer.registration
        parameters = fit(layer.moments, method=registration.method, scale=layer.scaling)
        parameters = _without_batch(parameters)
        draw = registration.draw_for(parameters.size, layer.like)
        found[names[key]] = _freeze(
            layer.module, registration.name, feature_map(parameters, registration.num_features, draw=draw)
        )
    return found


def _run(model: Any, modules: Iterable[Any], batches: Iterable[Any], collector: _Collector) -> int:
    """Run the model in evaluation mode while the collector records the calls of its layers; the number of batches."""
    training = [module for module in modules if module.training]
    before = set_collector(collector)
    count = 0
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                count += 1
                collector.query_mask = None
                _ = model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        set_collector(before)
        for module in training:
            module.training = True
    return count


def save_maps(model: Any, directory: str | Path) -> None:
    """Write the maps that `calibrate` fitted to a directory, with one file for each layer.

    `save_pretrained` does not write them. After a calibrated model was loaded again, calls raise an error until
    `load_maps` has loaded its maps.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    directory : str or Path
        It is created if it does not exist.

    Raises
    ------
    ValueError
        If the model has no maps.

    Examples
    --------
    >>> import tempfile
    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from favorsharp.transformers import calibrate, load_maps, register, save_maps
    >>> register("favorsharp", num_features=64, rng=0)
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4)).eval()
    >>> model.set_attn_implementation("favorsharp")
    >>> maps = calibrate(model, [torch.randint(50, (2, 64))])
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_maps(model, directory)
    ...     loaded = load_maps(model, directory)
    >>> list(loaded)
    ['transformer.h.0.attn']
    """
    holders = [(name, _child(m)) for name, m in model.named_modules() if isinstance(_child(m), FrozenMaps)]
    if not holders:
        raise ValueError("the model has no maps to save: calibrate it first")
    for name, holder in holders:
        for registration, fm in holder.by_name.items():
            folder = Path(directory) / registration
            folder.mkdir(parents=True, exist_ok=True)
            save(folder / f"{name}.npz", fm)


@torch.inference_mode(False)
def load_maps(model: Any, directory: str | Path) -> dict[str, FeatureMap]:
    """Give a model the maps that `save_maps` wrote.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model with the architecture of the one that was saved.
    directory : str or Path

    Returns
    -------
    dict
        The maps, with the names of the modules as keys.

    Raises
    ------
    ValueError
        If the directory has no maps, or maps for modules that the model does not have.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM
    >>> from favorsharp.transformers import load_maps, register
    >>> register("favorsharp")
    >>> model = AutoModelForCausalLM.from_pretrained(  # doctest: +SKIP
    ...     "path", attn_implementation="favorsharp"
    ... )
    >>> maps = load_maps(model, "path")  # doctest: +SKIP
    """
    files = sorted(Path(directory).glob("*/*.npz"))
    if not files:
        raise ValueError(f"directory {str(directory)!r} has no maps: accepted is what save_maps wrote")
    named = dict(model.named_modules())
    missing = [file.stem for file in files if file.stem not in named]
    if missing:
        raise ValueError(f"{type(model).__name__} has no module {missing[0]!r}; accepted: a model like the one saved")
    like = next(model.parameters())
    return {file.stem: _freeze(named[file.stem], file.parent.name, load(file, like=like)) for file in files}


def _child(module: Any) -> Any:
    return getattr(module, CHILD, None)


def _freeze(module: Any, name: str, fm: FeatureMap) -> FeatureMap:
    """Store a map on a module, and record the calibration in the config of the model."""
    if _child(module) is None:
        module.add_module(CHILD, FrozenMaps())
    holder = _child(module)
    if not isinstance(holder, FrozenMaps):
        raise ValueError(f"{label(module)} has an attribute {CHILD!r} of its own, of type {type(holder).__name__}")
    holder.by_name = {**holder.by_name, name: fm}
    names = getattr(module.config, CALIBRATED, None) or ()
    setattr(module.config, CALIBRATED, sorted({*names, name}))
    return fm


def _without_batch(parameters: Any) -> Any:
    """Drop the batch axis of length 1, (1, heads, ., .) -> (heads, ., .), so that any batch size is accepted."""
    from favorsharp._values import map_arrays

    return map_arrays(parameters, lambda x: x[0] if x.ndim > 3 else x)
