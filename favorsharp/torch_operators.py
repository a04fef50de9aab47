"""Operators of torch that run the kernels of a backend; the part of the kit for backends that imports torch.

A backend declares an `Operator` once: the axes of its tensors and results, the functions that compute results and
gradients, and the reference. This module makes what torch needs:

- Eager calls that torch records go through an autograd Function that holds the feature map itself. If the gradients are
  to be differentiated again, the reference computes them.
- Traced calls (`torch.compile`, `torch.func`, fake tensors), and calls that a mode of torch follows, run custom
  operators, which take only tensors and numbers. They have a schema, a fake kernel, a rule for `vmap`, and an autograd
  Function of their own. Forward mode and second derivatives are refused. A backend that leaves traced calls to the
  references declares its operators without a `Library`.

The modules `torch_ops` of the bundled backends use this module; `favorsharp.backend` has the rest of the kit.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from favorsharp._arrays import broadcast_shapes
from favorsharp._autodiff import is_followed, recorded_gradients, recorded_or_followed
from favorsharp.features.dense_exponential import DenseExponentialMap
from favorsharp.features.map_gradients import arrays_of, with_arrays
from favorsharp.ops.exponential_features import exponential_features
from favorsharp.ops.kernel_matvec import kernel_matvec

__all__ = ["FEATURES", "MATVEC", "Coordinates", "Library", "Operator", "TensorMap", "Traced", "has_tangent", "recorded"]


class Coordinates(NamedTuple):
    """The fields of `favorsharp.Parameters` on which the coordinates of features depend."""

    kernel: str
    scale: float
    g1: Any
    g2: Any
    center_x: Any
    center_y: Any


class TensorMap:
    """A dense-exponential map as a custom operator takes it: the six tensors of `arrays_of`, and two settings.

    It has the attributes of `DenseExponentialMap` that kernels read, under the same names.
    """

    fingerprint = None
    column = DenseExponentialMap.column

    def __init__(self, arrays: Sequence[Any], scale: float, kernel: str) -> None:
        self.arrays = tuple(arrays)
        self.rows, self.log_weight, *others = arrays
        self.parameters = Coordinates(kernel, scale, *others)

    @property
    def num_features(self) -> int:
        """The number of features, m."""
        return int(self.rows.shape[-2])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes of the arrays."""
        return broadcast_shapes(*(tuple(x.shape[:-2]) for x in self.arrays))


class Library(NamedTuple):
    """Where a backend registers its custom operators.

    Attributes
    ----------
    namespace : str
    device : str
        The type of the devices that the kernels run on.
    kept : callable
        Takes a `TensorMap` and returns the same map, or an equal one of an earlier call whose packed form is known.
    """

    namespace: str
    device: str
    kept: Callable[[TensorMap], Any]


class _Tensor(NamedTuple):
    """The name of a tensor, the names of its last axes, and whether it may be missing."""

    name: str
    axes: tuple[str, ...]
    optional: bool


class Operator:
    """An operation on torch tensors and, unless `with_map` is False, a dense-exponential map.

    Parameters
    ----------
    name : str
    tensors : str
        Each tensor with its last axes, such as "q: n d, key_mask?: s". A question mark after the name marks a tensor
        that may be None. The axes before the named ones broadcast. The size of the axis m is the number of features of
        the map.
    results : str or callable
        The results in the same form. If it is a callable, `results(map, *tensors, **options)` returns the results of a
        fake call, and the operator is not differentiable.
    forward : callable
        `forward(map, *tensors, **options)` returns the results as a sequence, followed by further tensors for
        `backward`.
    backward : callable, optional
        `backward(gradients, made, map, *tensors, of_map, **options)` returns the gradients of all tensors that are
        neither None nor boolean and, with `of_map`, then those of the arrays of the map. `made` is the result of
        `forward`. If there are several results, a gradient may be None.
    reference : callable, optional
        `reference(map, *tensors, **options)` returns the results as a tuple, by functions that torch differentiates.
    kept : str
        The further tensors that `forward` of a custom operator returns after the results, in the same form; always
        wide.
    options : str
        The types and names of the options, such as "int window, bool causal".
    wide : bool
        Whether results have the dtype of the computation (float64 or float32) instead of that of the first tensor.
    with_map : bool
        Whether there is a map; if not, None stands for it.
    keeps_results : bool
        Whether `backward` needs the results; if not, it gets None in their places.
    library : Library, optional
        Where to register the custom operators; without it there are none.
    """

    def __init__(
        self, name: str, tensors: str, results: str | Callable[..., Any], *, forward: Callable[..., Any],
        backward: Callable[..., Any] | None = None, reference: Callable[..., Any] | None = None, kept: str = "",
        options: str = "", wide: bool = False, with_map: bool = True, keeps_results: bool = True,
        library: Library | None = None,
    ) -> None:  # fmt: skip
        self.name, self.tensors, self.options = name, _parsed(tensors), [x.split() for x in _parts(options)]
        self.results, self.kept = _parsed(results) if isinstance(results, str) else [], _parsed(kept)
        self.fake = self._fake if isinstance(results, str) else results
        self.forward, self.backward, self.reference = forward, backward, reference
        self.wide, self.with_map, self.keeps_results, self.library = wide, with_map, keeps_results, library
        self.count = len(self.tensors)
        if library is not None:
            self._register(library)

    def __call__(self, feature_map: Any, *tensors: Any, made: Sequence[Any] | None = None, **options: Any) -> Any:
        """The results as a tuple, recorded by torch; `made` is the result of `forward`, if that has run already."""
        arrays = arrays_of(feature_map) if self.with_map else ()
        if not is_followed(tensors[0]):
            return _Eager.apply(self, feature_map, options, made, *tensors, *arrays)
        if not recorded(*tensors, *arrays):
            return tuple(self.direct(feature_map, *tensors, **options)[: len(self.results)])
        return Traced.apply(self, self.numbers(feature_map, options), *tensors, *arrays)[: len(self.results)]

    def direct(self, feature_map: Any, *tensors: Any, **options: Any) -> Any:
        """The results of the custom operator and the further tensors, as a list; torch records nothing."""
        arrays = arrays_of(feature_map) if self.with_map else ()
        return self.op(*self.arguments(self.numbers(feature_map, options), (*tensors, *arrays)))

    # The custom operators ----------------------------------------------------------------------------------------

    def _register(self, library: Library) -> None:
        names = [f"Tensor{'?' if x.optional else ''} {x.name}" for x in self.tensors]
        names += ["Tensor[] map", "float scale", "str kernel"] if self.with_map else []
        names += [" ".join(option) for option in self.options]
        self.op = _defined(library, self.name, f"({', '.join(names)}) -> Tensor[]", self.run, self._fake_run)
        if self.backward is not None:
            before = [f"Tensor of_{x.name}" for x in self.results]
            after = [f"Tensor made_{x.name}" for x in self._made()]
            schema = f"({', '.join((*before, *names, *after))}, *, bool of_map) -> Tensor[]"
            name = f"{self.name}_backward"
            self.backward_op = _defined(library, name, schema, self.run_backward, self._fake_backward)

    def _made(self) -> list[_Tensor]:
        """The part of the result of `forward` that `backward` of a custom operator gets."""
        return [*(self.results if self.keeps_results else ()), *self.kept]

    def numbers(self, feature_map: Any, options: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of the custom operator after its tensors."""
        p = feature_map.parameters if self.with_map else None
        settings = () if p is None else (float(p.scale), p.kernel)
        return (*settings, *(options[name] for _, name in self.options))

    def arguments(self, numbers: Sequence[Any], flat: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of the custom operator, from numbers and from tensors followed by the arrays of the map."""
        of_map = (list(flat[self.count :]),) if self.with_map else ()
        return (*flat[: self.count], *of_map, *numbers)

    def _taken(self, given: Sequence[Any]) -> tuple[Sequence[Any], TensorMap | None, dict[str, Any]]:
        """The tensors, the map and the options, from the arguments of the custom operator."""
        tensors, rest = given[: self.count], given[self.count :]
        own = None
        if self.with_map:
            own, rest = TensorMap(*rest[:3]), rest[3:]
        return tensors, own, {name: x for (_, name), x in zip(self.options, rest, strict=True)}

    def _of_library(self, own: TensorMap | None) -> Any:
        return own if own is None or self.library is None else self.library.kept(own)

    def run(self, *given: Any) -> list[Any]:
        """The custom operator on tensors with numbers."""
        tensors, own, options = self._taken(given)
        return [_owned(x) for x in self.forward(self._of_library(own), *tensors, **options)]

    def run_backward(self, *given: Any, of_map: bool) -> list[Any]:
        """The custom operator of the gradients, on tensors with numbers."""
        assert self.backward is not None
        first, last = len(self.results), len(given) - len(self._made())
        tensors, own, options = self._taken(given[first:last])
        made = given[last:] if self.keeps_results else (*(None for _ in self.results), *given[last:])
        found = self.backward(given[:first], made, self._of_library(own), *tensors, of_map=of_map, **options)
        return [_owned(x) for x in found]

    def _fake_run(self, *given: Any) -> list[Any]:
        tensors, own, options = self._taken(given)
        return self.fake(own, *tensors, **options)

    def _fake(self, own: TensorMap | None, *tensors: Any, **options: Any) -> list[Any]:
        """New tensors with the shapes of the results and of the further tensors."""
        sizes: dict[str, Any] = {"1": 1, "2": 2}
        batches = [] if own is None else [own.batch_shape]
        for (_, axes, _), x in zip(self.tensors, tensors, strict=True):
            if x is not None:
                sizes |= dict(zip(axes, x.shape[-len(axes) :], strict=True)) | {"1": 1}
                batches.append(tuple(x.shape[: -len(axes)]))
        if own is not None:
            sizes["m"] = own.rows.shape[-2]
        batch, like = broadcast_shapes(*batches), tensors[0]
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        dtypes = [wide if self.wide else like.dtype] * len(self.results) + [wide] * len(self.kept)
        shapes = [(*batch, *(sizes[axis] for axis in x.axes)) for x in (*self.results, *self.kept)]
        return [like.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]

    def _fake_backward(self, *given: Any, of_map: bool) -> list[Any]:
        first = len(self.results)
        tensors, own, _ = self._taken(given[first : len(given) - len(self._made())])
        wanted = [x for x in tensors if _has_gradient(x)]
        return [x.new_empty(tuple(x.shape)) for x in (*wanted, *(own.arrays if own and of_map else ()))]

    # What both kinds of autograd Functions need -----------------------------------------------------------------

    def placed(self, found: Iterable[Any], flat: Sequence[Any]) -> list[Any]:
        """The result of `backward` with an entry for each tensor and each array of the map.

        None if it has no gradient.
        """
        each = iter(found)
        own = [next(each) if _has_gradient(x) else None for x in flat[: self.count]]
        return own + (list(each) or [None] * (len(flat) - self.count))

    def gradients_of_reference(
        self, gradients: Sequence[Any], feature_map: Any, options: dict[str, Any], flat: Sequence[Any]
    ) -> list[Any]:
        """Gradients that can be differentiated again."""

        def results(*flat: Any) -> Any:
            assert self.reference is not None
            own = with_arrays(feature_map, *flat[self.count :]) if self.with_map else None
            return self.reference(own, *flat[: self.count], **options)

        return recorded_gradients(results, flat, gradients)


class _Eager(torch.autograd.Function):
    """An operator that torch records in an eager call."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, feature_map: Any, options: Any, made: Any, *flat: Any) -> Any:
        if made is None:
            made = operator.forward(feature_map, *flat[: operator.count], **options)
        count = len(operator.results)
        results, kept = tuple(made[:count]), made[count:]
        held = [*(results if operator.keeps_results else [None] * count), *kept]
        ctx.set_materialize_grads(count == 1)
        ctx.save_for_backward(*flat, *(x if isinstance(x, torch.Tensor) else None for x in held))
        ctx.others = [None if isinstance(x, torch.Tensor) else x for x in held]
        ctx.call = operator, feature_map, options
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        operator, feature_map, options = ctx.call
        saved = ctx.saved_tensors
        count = len(saved) - len(ctx.others)
        flat = saved[:count]
        if recorded_or_followed(*gradients):
            found = operator.gradients_of_reference(gradients, feature_map, options, flat)
        else:
            made = [b if a is None else a for a, b in zip(saved[count:], ctx.others, strict=True)]
            of_map = any(ctx.needs_input_grad[4 + operator.count :])
            given = made, feature_map, *flat[: operator.count]
            found = operator.placed(operator.backward(gradients, *given, of_map=of_map, **options), flat)
        return None, None, None, None, *found


class Traced(torch.autograd.Function):
    """An operator that torch records in a traced call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Operator, numbers: Any, *flat: Any) -> Any:
        return tuple(operator.op(*operator.arguments(numbers, flat)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.operator, ctx.numbers, *flat = inputs
        results = len(ctx.operator.results)
        ctx.save_for_backward(*flat, *(output if ctx.operator.keeps_results else output[results:]))
        if len(output) > results:
            ctx.mark_non_differentiable(*output[results:])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        operator = ctx.operator
        first, count = 2 + operator.count, operator.count + (6 if operator.with_map else 0)
        flat, made = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        of_map = any(ctx.needs_input_grad[first:])
        given = (operator, ctx.numbers, of_map, *gradients[: len(operator.results)], *flat, *made)
        # compilers refuse second derivatives, and cannot trace a Function inside another Function
        found = _Once.forward(*given) if torch.compiler.is_compiling() else _Once.apply(*given)
        return None, None, *operator.placed(found, flat)


class _Once(torch.autograd.Function):
    """Runs the operator of the gradients, and raises an error if its results are differentiated.

    `torch.func` records backward passes, and would otherwise not notice that the operator has no derivative.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Operator, numbers: Any, of_map: bool, *given: Any) -> Any:
        first = len(operator.results)
        last = first + operator.count + (6 if operator.with_map else 0)
        arguments = operator.arguments(numbers, given[first:last])
        return tuple(operator.backward_op(*given[:first], *arguments, *given[last:], of_map=of_map))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.operator = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(
            f"the kernels of {ctx.operator.library.namespace} have no second derivatives; use('reference') has them"
        )


def recorded(*tensors: Any) -> bool:
    """Whether torch records operations on one of the tensors, for a backward pass or in forward mode.

    Entries that are None do not count.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return True
    return has_tangent(*tensors)


def has_tangent(*tensors: Any) -> bool:
    """Whether one of the tensors has a tangent (forward mode)."""
    level = forward_ad._current_level
    given = (x for x in tensors if x is not None) if level >= 0 else ()
    return any(forward_ad.unpack_dual(x, level=level).tangent is not None for x in given)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _parsed(text: str) -> list[_Tensor]:
    """The tensors that a text such as "q: n d, key_mask?: s" declares."""
    pairs = [part.split(":") for part in _parts(text)]
    return [_Tensor(name.rstrip("?"), tuple(axes.split()), name.endswith("?")) for name, axes in pairs]


def _has_gradient(x: Any) -> bool:
    return x is not None and x.dtype != torch.bool


def _owned(x: Any) -> Any:
    """The tensor, or a copy if it is a view or not contiguous: results of an operator must own their memory."""
    return x.clone(memory_format=torch.contiguous_format) if x._is_view() or not x.is_contiguous() else x


def _defined(library: Library, name: str, schema: str, run: Any, fake: Any) -> Any:
    """A custom operator with its fake kernel and its rule for `vmap`."""
    op = torch.library.custom_op(
        f"{library.namespace}::{name}", run, mutates_args=(), device_types=library.device, schema=schema
    )
    op.register_fake(fake)
    op.register_vmap(partial(_mapped, op))
    return op


def _mapped(op: Any, info: Any, dims: Any, *given: Any, **options: Any) -> Any:
    """The rule for `vmap`: a mapped axis becomes the first leading axis of every tensor.

    Tensors that are not mapped are expanded along it, so that gradients have an entry for each index.
    """
    flat, form = pytree.tree_flatten(given)
    at = pytree.tree_leaves(dims)
    tensors = [(x, dim) for x, dim in zip(flat, at, strict=True) if isinstance(x, torch.Tensor)]
    leading = max(_leading(x) - (dim is not None) for x, dim in tensors)
    front = [
        _fronted(x, dim, leading, info.batch_size) if isinstance(x, torch.Tensor) else x
        for x, dim in zip(flat, at, strict=True)
    ]
    found = op(*pytree.tree_unflatten(front, form), **options)
    return found, [0] * len(found)


def _fronted(x: Any, dim: int | None, leading: int, size: int) -> Any:
    """The tensor with the mapped axis first, padded to as many leading axes as the other tensors have."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.reshape(size, *(1,) * (leading + 1 - _leading(x)), *x.shape[1:])


def _leading(x: Any) -> int:
    return int(x.ndim) - (1 if x.dtype == torch.bool else 2)  # a mask has no columns


FEATURES = partial(
    Operator, "exponential_features", "u: n d, rows: m d, row: n 1, column: 1 m", "out: n m", with_map=False,
    keeps_results=False, reference=lambda _, *given: (exponential_features.reference(*given),),
)  # fmt: skip
"""The operator exp(u W^T + row + column); a backend adds `forward`, `backward` and `library`."""

MATVEC = partial(
    Operator, "kernel_matvec", "x: n d, y: s d, v: s e", "out: n e", keeps_results=False,
    reference=lambda own, x, y, v: (kernel_matvec.reference(x, y, v, own),),
)  # fmt: skip
"""The operator K(x, y) @ v; a backend adds `forward`, `backward` and `library`."""
