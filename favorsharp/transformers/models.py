"""Which models call the attention that is registered with transformers; the others are refused before they run.

A model of transformers takes any registered name as its `attn_implementation`, also where its layers never look the
name up. So the methods by which a model takes the name are wrapped once: they raise for such a model.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, partial, wraps
from typing import Any

from transformers import PreTrainedModel

_INTERFACE = re.compile(r"ALL_ATTENTION_FUNCTIONS|get_interface\(|AttentionInterface")
"""How the source of a layer says that it looks its attention up by name."""

_BUILDS_OTHERS = re.compile(r"\bAuto(Model|Backbone)|\bload_backbone")
"""How the source of a model says that it is built of models of other files."""

_GUARDED = "_favorsharp_guarded"
"""Attribute of a wrapped method."""


def label(module: Any) -> str:
    """A layer as messages call it."""
    index = getattr(module, "layer_idx", None)
    return type(module).__name__ + ("" if index is None else f" (layer {index})")


def guard(names: Any) -> None:
    """Have transformers' models refuse a registered name that none of their layers would look up.

    Parameters
    ----------
    names : collection of str
        The registered names; asked again at every check.
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
    """Before a model is built, when there is its class alone: all attention of its file is of another kind."""
    if requested in names and not getattr(model.config, "sub_configs", None) and not _inside_another(model):
        layers, reaching = _layers_of_file(type(model).__module__)
        if layers and not reaching:
            raise ValueError(_message(model, requested, layers[0]))


def _check_built(names: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    """When a model has been built: none of its layers looks the name up."""
    requested = next((name for name in _names_of(model.config) if name in names), None)
    if requested is not None and not _inside_another(model):
        _check_layers(model, requested)


def _check_set(names: Any, model: Any, requested: Any = None, *args: Any, **kwargs: Any) -> None:
    """Before a model takes another name, or one for each of its parts."""
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
    """The names of a config and its parts."""
    yield getattr(config, "_attn_implementation", None)
    for key in getattr(config, "sub_configs", None) or ():
        part = getattr(config, key, None)
        if part is not None:
            yield from _names_of(part)


def _check_layers(model: Any, requested: str) -> None:
    kinds = dict.fromkeys(type(module) for module in model.modules())
    if not any(_reaches(kind) for kind in kinds):
        layers = [kind.__name__ for kind in kinds if "Attention" in kind.__name__ and not _is_of_torch(kind)]
        raise ValueError(_message(model, requested, layers[0] if layers else None))


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


def _is_of_torch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def _reaches(kind: type) -> bool:
    """Whether a layer of this class may look its attention up; True where its source does not tell."""
    for base in kind.__mro__:
        package = base.__module__.partition(".")[0]
        if package == "transformers":
            if base.__name__ in _layers_of_file(base.__module__)[1]:
                return True
        elif package not in ("torch", "favorsharp", "builtins") and _may_reach(base):
            return True
    return False


def _may_reach(kind: type) -> bool:
    """Whether a class that is not of transformers may look its attention up: a layer may, by way of other files."""
    try:
        return not issubclass(kind, PreTrainedModel) or bool(_INTERFACE.search(inspect.getsource(kind)))
    except (OSError, TypeError):
        return True


@lru_cache(maxsize=1024)
def _layers_of_file(module: str) -> tuple[tuple[str, ...], frozenset[str]]:
    """The attention classes of a file of transformers' models, and those of all its classes that use the interface.

    A class also uses the interface where it calls a function of the file that does. A file that builds models of other
    files has no attention classes here, as theirs count.
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
    """Whether a model is being built as a part of another one, which is checked as a whole."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__init__":
            owner = frame.f_locals.get("self")
            if isinstance(owner, PreTrainedModel) and owner is not model:
                return True
        frame = frame.f_back
    return False
