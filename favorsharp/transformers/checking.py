"""The public function `check`: which attention layers of a model a registered approximation will reach."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from favorsharp.methods import method_of
from favorsharp.transformers.maps import frozen_map, is_cross
from favorsharp.transformers.models import attention_layers, reaches
from favorsharp.transformers.registrations import EXACT, REGISTERED, WITHOUT_MAPS, Registration


class LayerCheck(NamedTuple):
    """Whether and how one attention layer is approximated.

    Attributes
    ----------
    name : str
        The name of the module in its model.
    kind : str
        The name of its class.
    attention : {"approximated", "exact", "unchanged"}
        "exact" is softmax attention by the method "exact", or within a sliding window with any method; "unchanged" is
        the model's own attention.
    why : str
        The method and what the layer still needs, or the reason why it is unchanged.
    """

    name: str
    kind: str
    attention: Literal["approximated", "exact", "unchanged"]
    why: str


@dataclass(frozen=True, repr=False)
class ModelCheck:
    """What `check` found; printing it gives one line for layers that are alike.

    Attributes
    ----------
    model : str
        The name of the model's class.
    layers : tuple of LayerCheck
        In the order of the model's modules.
    """

    model: str
    layers: tuple[LayerCheck, ...]

    def names(self, attention: str) -> tuple[str, ...]:
        """The names of the modules of one kind of attention: "approximated", "exact" or "unchanged"."""
        return tuple(layer.name for layer in self.layers if layer.attention == attention)

    def __repr__(self) -> str:
        count = len(self.names("approximated"))
        lines = [f"{self.model}: {count} of {len(self.layers)} attention layers are approximated"]
        alike = Counter((re.sub(r"\d+", "*", layer.name), *layer[1:]) for layer in self.layers)
        lines += [f"  {n} x {name} ({kind}): {what}, {why}" for (name, kind, what, why), n in alike.items()]
        return "\n".join(lines)


def check(model: Any) -> ModelCheck:
    """Say which attention layers of a model will be approximated, before it has seen any input.

    It reads the names in the model's config and the source of its layers. A later call may still refuse a mask, a
    keyword or a cache, with an error that names the layer.

    Parameters
    ----------
    model : transformers.PreTrainedModel

    Returns
    -------
    ModelCheck

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from favorsharp.transformers import check, register
    >>> register("favorsharp", num_features=64, rng=0)
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4))
    >>> model.set_attn_implementation("favorsharp")
    >>> check(model)
    GPT2LMHeadModel: 2 of 2 attention layers are approximated
      2 x transformer.h.*.attn (GPT2Attention): approximated, optimal with 64 features, calibrate it first
    """
    model = getattr(model, "_orig_mod", model)
    layers = tuple(_checked(*found) for found in attention_layers(model))
    return ModelCheck(type(model).__name__, layers)


def _checked(name: str, module: Any, config: Any) -> LayerCheck:
    kind = type(module).__name__
    if not reaches(type(module)):
        return LayerCheck(name, kind, "unchanged", "it does not go through transformers' attention interface")
    asked = getattr(config, "_attn_implementation", None)
    registration = REGISTERED.get(asked) if isinstance(asked, str) else None
    if registration is None:
        return LayerCheck(name, kind, "unchanged", f"its attn_implementation is {asked!r}")
    if registration.method == EXACT:
        return LayerCheck(name, kind, "exact", "softmax attention")
    if isinstance(size := _window_of(module, config), int):
        return LayerCheck(name, kind, "exact", f"a sliding window of {size} positions")
    return LayerCheck(name, kind, "approximated", _approximation(registration, module))


def _window_of(module: Any, config: Any) -> Any:
    """The sliding window that a layer says it has, or that its config has for all layers."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    of_all = getattr(config, "layer_types", None) is None and not getattr(module, "is_cross_attention", False)
    return getattr(config, "sliding_window", None) if of_all and getattr(config, "use_sliding_window", True) else None


def _approximation(registration: Registration, module: Any) -> str:
    """The method of a layer, its size, and what the layer needs before its first call."""
    m = registration.num_features
    if registration.method in WITHOUT_MAPS:
        return f"{m} landmarks" + ("" if registration.per == "head" else f" a {registration.per}")
    method = method_of(registration.method)
    label = registration.method if isinstance(registration.method, str) else "a method of the caller's"
    what = f"{label} with {m} features"
    if frozen_map(module, registration) is not None:
        return f"{what}, calibrated"
    bound = registration.calibration == "frozen" or is_cross(module) or getattr(module, "is_causal", True)
    return f"{what}, calibrate it first" if method.is_fitted and bound else what
