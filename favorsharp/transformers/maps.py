"""The feature map of a layer: the frozen one that is stored on its module, or one that is fitted to its input."""

from typing import Any

import torch

from favorsharp._values import map_arrays
from favorsharp.features import FeatureMap, feature_map
from favorsharp.fitting import fit
from favorsharp.methods import method_of
from favorsharp.transformers.masks import Visible
from favorsharp.transformers.models import label
from favorsharp.transformers.registrations import Registration

Tensor = Any

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
        def moved(x: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=x.device)).device
            return x if device == x.device else x.to(device)

        self.by_name = {name: map_arrays(fm, moved) for name, fm in self.by_name.items()}
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """One line for each map."""
        return "\n".join(f"({name}): {fm!r}" for name, fm in self.by_name.items())


def frozen_map(module: Any, registration: Registration) -> FeatureMap | None:
    """The map that `calibrate` or `load_maps` stored on a layer for this registration; None if there is none."""
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


def map_for(
    registration: Registration,
    module: Any,
    query: Tensor,
    key: Tensor,
    seen: Visible,
    scaling: float | None,
    grouped: bool,
) -> FeatureMap:
    """The frozen map of the layer; or a map fitted to this input, if the fit does not show a query later keys."""
    frozen = frozen_map(module, registration)
    if frozen is not None:
        expected = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        if abs(frozen.parameters.scale - expected) > 1e-6 * expected:
            raise ValueError(
                f"{label(module)} was calibrated with scaling {frozen.parameters.scale}, and called with {expected}"
            )
        return frozen
    if not method_of(registration.method).is_fitted:  # one map for all heads and rows, so that rows may leave the batch
        points = query.new_zeros((1, query.shape[-1]))
        return _drawn(registration, fit(points, points, method=registration.method, scale=scaling), query)
    why = _why_not_fitted(registration, module, query.shape[-2], key.shape[-2], seen)
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
    return _drawn(registration, parameters, query)


def _drawn(registration: Registration, parameters: Any, query: Tensor) -> FeatureMap:
    return feature_map(parameters, registration.num_features, draw=registration.draw_for(query.shape[-1], query))


def _why_not_fitted(registration: Registration, module: Any, n: int, s: int, seen: Visible) -> str | None:
    """Why a layer without a map is not fitted to its input, or None."""
    if registration.name in (getattr(getattr(module, "config", None), CALIBRATED, None) or ()):
        return "the model was calibrated before it was saved, and its maps are not in the checkpoint: call load_maps"
    if registration.calibration == "frozen":
        return "it was registered with calibration='frozen'"
    if seen.is_causal:
        return "it is causal: a fit to the sequence itself would show it its own future"
    if crosses(module, n, s, seen):
        return "its queries come from another sequence; if that is causal, a fit would show it its own future"
    return None


def is_cross(module: Any) -> bool:
    """Whether the queries of a layer come from another sequence than its keys, judged by its class and attributes."""
    if getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__:
        return True
    # decoders of encoder-decoder models use one class for both, and mark only their self-attention as causal
    return bool(getattr(module, "is_decoder", False)) and not getattr(module, "is_causal", True)


def crosses(module: Any, n: int, s: int, seen: Visible) -> bool:
    """Whether the queries of a call come from another sequence than its keys.

    A call with a causal mask is never such a call, even if its layer does not declare that it is causal, as in some
    decoders.
    """
    return not seen.is_causal and (is_cross(module) or n != s)
