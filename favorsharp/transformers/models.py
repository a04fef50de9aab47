"""Refuses models that would accept a registered name and never use it; `register` calls `guard` here.

A model of transformers accepts any registered name as its `attn_implementation`, even if its layers never look up their
attention function by name. So `guard` wraps, once, the methods of transformers that set the name; the wrapped methods
raise an error for such a model.
"""

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial, wraps
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from transformers import PreTrainedModel

_INTERFACE = re.compile(r"ALL_ATTENTION_FUNCTIONS|get_interface\(|AttentionInterface")
"""Matches the source of a layer that looks up its attention by name."""

_BUILDS_OTHERS = re.compile(r"\bAuto(Model|Backbone)|\bload_backbone")
"""Matches the source of a model that contains models from other files."""

_GUARDED = "_favorsharp_guarded"
"""Attribute that marks a wrapped method."""


def label(module: Any) -> str:
    """The name of a layer in error messages."""
    index = getattr(module, "layer_idx", None)
    return type(module).__name__ + ("" if index is None else f" (layer {index})")


_warned: dict[tuple[int, str], Any] = {}
"""The configs of models that were warned, weakly, by their ids and by what they were warned of."""


def warn_once(module: Any, of: str, message: str) -> None:
    """Warn once for all layers that share a config, which are those of a model or of a part of it."""
    if torch.compiler.is_compiling():
        return
    config = getattr(module, "config", module)
    known = _warned.get((id(config), of))
    if known is None or known() is not config:
        _warned[id(config), of] = ref(config)
        warnings.warn(f"{label(module)}: {message}", stacklevel=4)


def guard(names: Any) -> None:
    """Make the models of transformers refuse a registered name that none of their layers would look up.

    Parameters
    ----------
    names : collection of str
        The registered names; every check reads the collection again.
    """
    _wrap("get_correct_attn_implementation", partial(_check_class, names), after=False)
    _wrap("post_init", partial(_check_built, names), after=True)
    _wrap("set_attn_implementation", partial(_check_set, names), after=False)


def _wrap(method: str, check: Callable[..., None], *, after: bool) -> None:
    original = getattr(PreTrainedModel, method, None)
    if original is None or getattr(original, _GUARDED, False):
        return

    @wraps(original)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not after:
            check(self, *args, **kwargs)
        found = original(self, *args, **kwargs)
        if after:
            check(self, *args, **kwargs)
        return found

    setattr(guarded, _GUARDED, True)
    setattr(PreTrainedModel, method, guarded)


def _check_class(names: Any, model: Any, requested: Any = None, *args: Any, **kwargs: Any) -> None:
    """Before a model is built, refuse the name if no attention class in the model's file looks it up."""
    if requested in names and not getattr(model.config, "sub_configs", None) and not _inside_another(model):
        layers, reaching = _layers_of_file(type(model).__module__)
        if layers and not reaching:
            raise ValueError(_message(model, requested, layers[0]))


def _check_built(names: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    """After a model is built, refuse the name if none of its layers looks it up."""
    requested = next((name for name in _names_of(model.config) if name in names), None)
    if requested is not None and not _inside_another(model):
        _check_layers(model, requested)


def _check_set(names: Any, model: Any, requested: Any = None, *args: Any, **kwargs: Any) -> None:
    """Before the name of a model or of its parts is changed, refuse the new name if no layer looks it up."""
    name = next((name for name in _leaves(requested) if name in names), None)
    if name is not None:
        _check_layers(model, name)


def _leaves(requested: Any) -> Iterator[Any]:
    if isinstance(requested, dict):
        for part in requested.values():
            yield from _leaves(part)
    else:
        yield requested


def _names_of(config: Any) -> Iterator[Any]:
    """The attention names in a config and in its parts."""
    yield getattr(config, "_attn_implementation", None)
    for key in getattr(config, "sub_configs", None) or ():
        part = getattr(config, key, None)
        if part is not None:
            yield from _names_of(part)


def attention_layers(model: Any) -> Iterator[tuple[str, Any, Any]]:
    """The attention layers of a model with their names and configs; of nested ones only the innermost."""
    configs: dict[str, Any] = {}
    kept: list[tuple[str, Any, Any]] = []
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        config = getattr(module, "config", None)
        configs[name] = config if hasattr(config, "_attn_implementation") else configs.get(parent)
        kind = type(module)
        if not isinstance(module, PreTrainedModel) and ("Attention" in kind.__name__ or _asks(kind)):
            kept = [entry for entry in kept if not name.startswith(f"{entry[0]}.")]
            kept.append((name, module, configs[name]))
    yield from kept


def _asks(kind: type) -> bool:
    """Whether the source of a class of transformers looks up an attention function."""
    return any(
        base.__name__ in _layers_of_file(base.__module__)[1]
        for base in kind.__mro__
        if base.__module__.startswith("transformers.models.")
    )


def _check_layers(model: Any, requested: str) -> None:
    kinds = dict.fromkeys(type(module) for module in model.modules())
    if not any(reaches(kind) for kind in kinds):
        layers = [kind.__name__ for kind in kinds if "Attention" in kind.__name__ and not _is_of_torch(kind)]
        raise ValueError(_message(model, requested, layers[0] if layers else None))
    # layers from outside transformers, and whether all layers have sliding windows, are known only after a call
    if not any(map(_asks, kinds)) or _may_slide(model):
        _listen(model, requested)


_listening: WeakSet[Any] = WeakSet()
"""Models that run for the first time and of which no layer has been approximated (or been exact, if so registered)."""


def heard() -> None:
    """Record that a registered attention approximated a layer."""
    if not torch.compiler.is_compiling() and _listening:
        _listening.clear()


_hooks: WeakKeyDictionary[Any, tuple[str, list[Any]]] = WeakKeyDictionary()
"""The registered name of such a model, and its hooks, until its first call ends.

Copies of the model are not included.
"""


def _listen(model: Any, requested: str) -> None:
    """Warn after the first call of a model if none of its layers was approximated."""
    _forget(model)
    _hooks[model] = requested, [model.register_forward_pre_hook(_begin), model.register_forward_hook(_end)]


def _forget(model: Any) -> None:
    for hook in _hooks.pop(model, ("", []))[1]:
        hook.remove()


def _begin(model: Any, args: Any) -> None:
    if not torch.compiler.is_compiling() and model in _hooks:
        _listening.add(model)


def _end(model: Any, args: Any, out: Any) -> None:
    if torch.compiler.is_compiling() or model not in _hooks:
        return
    requested, _ = _hooks[model]
    _forget(model)
    if model in _listening:
        _listening.discard(model)
        warnings.warn(
            f"no attention layer of {type(model).__name__} was approximated by attn_implementation={requested!r}: "
            "favorsharp.transformers.check(model) lists its layers and says why",
            stacklevel=3,
        )


def _may_slide(model: Any) -> bool:
    """Whether a layer or a config of a model has an attribute for a sliding window."""
    parts = [part for module in model.modules() for part in (module, getattr(module, "config", None))]
    try:
        return any(getattr(part, "sliding_window", None) for part in parts)
    except RuntimeError:  # transformers raises it if layers of the model have different windows
        return True


def _message(model: Any, requested: str, layer: str | None) -> str:
    what = (
        "it has no attention layers"
        if layer is None
        else f"its attention ({layer}) does not go through transformers' attention interface"
    )
    return (
        f"{type(model).__name__} would never use attn_implementation={requested!r}: {what}; accepted: models whose "
        "attention does, and 'eager' for this one"
    )


def adds_masks_only(module: Any) -> bool:
    """Whether a layer belongs to a model of transformers with eager attention only, where a missing mask hides no key.

    In other models, a missing mask means that the layer decides whether attention is causal, as in torch's attention.
    """
    return not torch.compiler.is_compiling() and _has_eager_only(type(module).__module__)


@lru_cache(maxsize=1024)
def _has_eager_only(module: str) -> bool:
    if not module.startswith("transformers.models."):
        return False
    try:
        return not re.search(r"_supports_(sdpa|flash_attn) = True", inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError):
        return False


def _is_of_torch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def reaches(kind: type) -> bool:
    """Whether a layer of this class may look up its attention by name; True if its source is not known."""
    for base in kind.__mro__:
        package = base.__module__.partition(".")[0]
        if package == "transformers":
            if base.__name__ in _layers_of_file(base.__module__)[1]:
                return True
        elif package not in ("torch", "favorsharp", "builtins") and _may_reach(base):
            return True
    return False


def _may_reach(kind: type) -> bool:
    """Whether a class from outside transformers may look up its attention; True for layers, whose helpers may do so."""
    try:
        return not issubclass(kind, PreTrainedModel) or bool(_INTERFACE.search(inspect.getsource(kind)))
    except (OSError, TypeError):
        return True


@lru_cache(maxsize=1024)
def _layers_of_file(module: str) -> tuple[tuple[str, ...], frozenset[str]]:
    """The attention classes in a model file of transformers, and the classes in it that use the attention interface.

    A class also uses the interface if it calls a function of the file that does. For a file that builds models from
    other files the first result is empty, because the attention classes of those files count.
    """
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return (), frozenset()
    if not module.startswith("transformers.models."):
        return (), frozenset()
    pieces = re.split(r"^(?=class |def )", source, flags=re.MULTILINE)
    named = [(m[1], m[2], piece) for piece in pieces if (m := re.match(r"(class|def) (\w+)", piece))]
    helpers = [name for kind, name, piece in named if kind == "def" and _INTERFACE.search(piece)]
    uses = re.compile("|".join([_INTERFACE.pattern, *(rf"\b{name}\b" for name in helpers)]))
    reaching = frozenset(name for kind, name, piece in named if kind == "class" and uses.search(piece))
    own = tuple(name for _, name, piece in named if re.match(r"class \w*Attention\w*\(.*nn\.Module", piece))
    return (() if _BUILDS_OTHERS.search(source) else own), reaching


def _inside_another(model: Any) -> bool:
    """Whether a model is being built as part of another model, which is then checked as a whole."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__init__":
            owner = frame.f_locals.get("self")
            if isinstance(owner, PreTrainedModel) and owner is not model:
                return True
        frame = frame.f_back
    return False
