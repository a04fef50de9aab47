"""Fitting a model's feature maps on sample text, and keeping them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from favorsharp.features import FeatureMap, feature_map
from favorsharp.moments import Moments, combine, moments
from favorsharp.parameters import fit
from favorsharp.storage import load, save
from favorsharp.transformers.attention import (
    CALIBRATED,
    CHILD,
    EXACT,
    REGISTERED,
    FrozenMaps,
    Registration,
    is_cross,
    set_collector,
)
from favorsharp.transformers.masks import Visible
from favorsharp.transformers.models import label

Tensor = Any


@dataclass
class _Layer:
    """What the calls of one layer have told so far."""

    registration: Registration
    module: Any
    scaling: float
    moments: Moments
    like: Tensor


@dataclass
class _Collector:
    """Gathers the moments of every layer of one model while it runs with exact attention."""

    modules: frozenset[int]
    layers: dict[int, _Layer] = field(default_factory=dict)
    query_mask: Tensor = None

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
        if registration.method == EXACT:
            raise ValueError(f"attn_implementation={registration.name!r} is exact: there is nothing to calibrate")
        mask_x = seen.key_mask
        if is_cross(module) or query.shape[-2] != key.shape[-2]:
            # the padding of its queries is that of the decoder's self-attention before it
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


@torch.inference_mode(False)  # training refuses maps made in that mode
def calibrate(model: Any, batches: Iterable[Any]) -> dict[str, FeatureMap]:
    """Fit the feature maps of every attention layer on sample inputs, and freeze them.

    The model runs over the batches with exact attention, without gradients and in evaluation mode; each layer, self-
    and cross-attention, gets one map a key head, fitted to all positions that are no padding. From then on the layer
    uses it on every input. Causal and cross-attention need it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With an `attn_implementation` that `register` named; before `torch.compile`.
    batches : iterable
        Of what the model is called with: mappings (`model(**batch)`), or tensors (`model(batch)`). A few thousand
        tokens like those to come are enough.

    Returns
    -------
    dict
        The maps by the names of the modules.

    Raises
    ------
    TypeError
        If batches are one batch in place of several.
    ValueError
        If no layer calls a registered attention, or the batches are empty.
    """
    if isinstance(batches, Mapping | torch.Tensor | str):
        raise TypeError(f"batches must be an iterable of batches, got {type(batches).__name__}; accepted: [batch]")
    model = getattr(model, "_orig_mod", model)
    named = dict(model.named_modules())
    collector = _Collector(frozenset(map(id, named.values())))
    training = [module for module in named.values() if module.training]
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
    if count == 0:
        raise ValueError("batches must hold at least one batch, got none")
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


def save_maps(model: Any, directory: str | Path) -> None:
    """Write the maps that `calibrate` fitted to a directory, one file a layer.

    `save_pretrained` does not write them; a calibrated model that is loaded again asks for them.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    directory : str or Path
        Made where it is missing.

    Raises
    ------
    ValueError
        If the model has no maps.
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
        Of the architecture that was saved.
    directory : str or Path

    Returns
    -------
    dict
        The maps by the names of the modules.

    Raises
    ------
    ValueError
        If the directory has no maps, or maps of modules that the model lacks.
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
    """Leave a map on a module, and word of it in the model's config."""
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
    """Parameters fitted over the batch, (1, heads, ., .) -> (heads, ., .): what serves batches of any size."""
    from favorsharp.parameters import map_arrays

    return map_arrays(parameters, lambda x: x[0] if x.ndim > 3 else x)
