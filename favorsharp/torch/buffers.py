"""The public module `MapBuffers`, the base of `LinearAttention`: it holds a feature map as buffers.

As buffers, the map is moved, saved and loaded together with the model that uses it.
"""

import copy
from typing import Any, Self

import torch

from favorsharp._arrays import is_array, stamps_of, statistics_dtype
from favorsharp._autodiff import constant_while_compiling, is_traced, is_traced_by_mode
from favorsharp._checks import check_choice, check_flag, check_integer
from favorsharp._values import map_arrays
from favorsharp.draws import DRAWS, draw_rows
from favorsharp.exact import kernel_scale
from favorsharp.features import FeatureMap, feature_map
from favorsharp.fitting import fit, fit_named
from favorsharp.landmarks.settings import Landmarks, landmarks
from favorsharp.landmarks.verbs import check_landmark_options
from favorsharp.methods import DENSE_EXPONENTIAL, LANDMARKS, MethodLike, check_method, method_of
from favorsharp.moments import Moments
from favorsharp.parameters import Parameters
from favorsharp.torch.map_faults import (
    ANGLE,
    ROUNDING,
    are_readable,
    check_values,
    fault_of_mixed_parameters,
    fault_of_rows,
    is_subclass,
    largest_cosine,
    numbers_of_parameters,
)

_PARAMETERS = ("a", "g1", "g2", "center_x", "center_y")
_NUMBERS = ("projection", *_PARAMETERS)


class MapBuffers(torch.nn.Module):
    """A module that holds a feature map as buffers; the base of `LinearAttention` and of modules of your own.

    The buffers are `projection`, which holds the random rows, and the parameters `a`, `g1`, `g2`, `center_x` and
    `center_y`, which are NaN before calibration. They have their final shapes from the start, so loading checkpoints
    and broadcasting work before calibration too. They stay in at least float32 when `half()` or `to(torch.bfloat16)`
    changes the rest of the model, because a rounded map is no longer unbiased. Buffers are always made outside
    `torch.inference_mode()`, because training cannot use tensors made inside it.

    When buffers have changed, they are checked before they are used: a call refuses parameters that are not
    calibrated, memory that was not filled, and averages of different maps.

    With the method "landmarks" there are no buffers, and `feature_map` gives the settings of the landmarks, which every
    call chooses anew.

    Parameters
    ----------
    size : int
        d, the size of a query.
    heads : int, optional
        Number of key heads; each has its own fit. None means one fit for all heads.
    method : str or callable
        As in `favorsharp.fit`; only methods whose features are positive. A method that reads no data needs no
        calibration. Or "landmarks", as in `favorsharp.attention`.
    num_features : int
        m.
    draw : str or array, shape (m, d)
        As in `favorsharp.feature_map`. All heads share the rows. Landmarks take none.
    rng : None, int, SeedSequence or numpy Generator
        None means a seed from torch's global generator, as for the weights of a module; for landmarks, seed 0.
    scale : float, optional
        The scale of the kernel exp(scale q.k); None means d**-0.5.
    enable_gqa : bool
        Queries have g times the heads of the keys.
    device, dtype : optional
        The device and the dtype of the buffers; the dtype is widened to at least float32. On "meta" the buffers have no
        memory until `to_empty` followed by `reset_parameters`, or loading a state dict, fills it.

    Examples
    --------
    >>> import torch
    >>> from favorsharp.torch import MapBuffers
    >>> q, k = torch.randn(2, 4, 100, 16)
    >>> buffers = MapBuffers(16, num_features=64, rng=0).calibrate(q, k)
    >>> buffers.feature_map.query(q).shape
    torch.Size([4, 100, 64])
    """

    projection: torch.Tensor
    a: torch.Tensor
    g1: torch.Tensor
    g2: torch.Tensor
    center_x: torch.Tensor
    center_y: torch.Tensor
    _last_fault: str | None

    def __init__(
        self,
        size: int,
        heads: int | None = None,
        *,
        method: MethodLike = "optimal",
        num_features: int = 256,
        draw: Any = "orthogonal",
        rng: Any = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_method(method, also=(LANDMARKS,))
        if method != LANDMARKS and method_of(method).signed:
            raise ValueError(f"method {method!r} has signed features, which attention refuses; accepted: positive ones")
        self.size = check_integer("size", size, 1)
        self.heads = None if heads is None else check_integer("heads", heads, 1)
        self.num_features = check_integer("num_features", num_features, 1)
        self.method = method
        self.scale = kernel_scale("softmax", scale, self.size)
        self.enable_gqa = check_flag("enable_gqa", enable_gqa)
        self._landmarks: Landmarks | None = None
        self._held: tuple[tuple[torch.Tensor, ...], Any, FeatureMap] | None = None
        for name in _NUMBERS:
            self.register_buffer(name, None)
        if method == LANDMARKS:
            check_landmark_options(draw)
            self._landmarks = landmarks(self.num_features, scale=self.scale, rng=rng)
        else:
            self._make_rows(draw, rng, device, dtype)
            self._set_initial_parameters()

    def _make_rows(self, draw: Any, rng: Any, device: Any, dtype: torch.dtype | None) -> None:
        """Check the draw, and fill the buffer of the random rows."""
        if isinstance(draw, str):
            check_choice("draw", draw, DRAWS, also=", or an (m, d) array of rows")
        elif not is_array(draw):
            raise TypeError(f"draw must be a name or an (m, d) array of rows, got {type(draw).__name__}")
        elif tuple(draw.shape) != (self.num_features, self.size):
            raise ValueError(f"draw has shape {tuple(draw.shape)}; accepted: (m, d) = {(self.num_features, self.size)}")
        self.draw = draw if isinstance(draw, str) else None
        self._source = copy.deepcopy(rng) if isinstance(draw, str) else _own(draw)
        self._orthogonal = self.draw == "orthogonal"
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        rows = self._rows(rng) if isinstance(draw, str) else draw
        self.projection = torch.as_tensor(rows, device=device).to(dtype)

    @property
    def is_calibrated(self) -> bool:
        """Whether the buffers hold a map: they are calibrated or loaded, or the method needs no calibration."""
        if self._landmarks is not None:
            return True
        if torch.compiler.is_compiling():
            return self._fault_while_compiling() is None
        return not self.projection.is_meta and self._fault() is None

    @property
    def feature_map(self) -> FeatureMap | Landmarks:
        """The map as a frozen value, which every function of `favorsharp` accepts; the settings of landmarks.

        Raises
        ------
        RuntimeError
            If the buffers hold no map; the message gives the reason and the remedy.
        """
        if self._landmarks is not None:
            return self._landmarks
        if torch.compiler.is_compiling():
            fault = self._fault_while_compiling()
        else:
            known = self._current()
            if known is not None:
                return known
            fault = self._fault()
        if fault is not None:
            raise RuntimeError(fault)
        return self._built()

    @torch.inference_mode(False)
    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Restore the state in which the module was made, before calibration.

        With a seed, the same random rows are drawn again; without one, new rows are drawn. If the caller passed an
        array of rows, these rows are restored. This fills the memory of a module that was made on the "meta" device.
        With landmarks there is nothing to restore.

        Raises
        ------
        RuntimeError
            If the rows that the caller passed were on the "meta" device.
        """
        if self._landmarks is not None:
            return
        if self.draw is None and self._source.is_meta:
            raise RuntimeError(
                f"draw was an array on the 'meta' device, so {type(self).__name__} has no rows to go back to; "
                "accepted: an array with numbers, a draw by name, or a state dict"
            )
        rows = self._source if self.draw is None else self._rows(copy.deepcopy(self._source))
        self._orthogonal = self.draw == "orthogonal"
        self.projection = torch.as_tensor(rows, device="cpu").to(self.projection, copy=True)
        self._set_initial_parameters()

    @torch.no_grad()
    def calibrate(
        self,
        q: torch.Tensor | Moments,
        k: torch.Tensor | None = None,
        *,
        key_mask: torch.Tensor | None = None,
        query_mask: torch.Tensor | None = None,
        ridge: float | None = None,
        weighting: float | None = None,
        is_causal: bool = False,
    ) -> Self:
        """Fit the parameters to sample queries and keys, and store them in the buffers; the random rows do not change.

        It works in training and in evaluation mode, records no gradient, and replaces an earlier fit. To fit to several
        batches, join their `favorsharp.moments` with `favorsharp.combine` and pass the result.

        Parameters
        ----------
        q : tensor, shape (*b, n, d), or Moments
            With `heads`, (*b, heads, n, d), or (*b, g heads, n, d) with `enable_gqa`.
        k : tensor, shape (*b, s, d)
            With `heads`, (*b, heads, s, d).
        key_mask, query_mask : tensor of bool, shape (*b, s) and (*b, n), optional
            True where a point enters the fit. If n == s and heads are not grouped, key_mask applies to the queries too,
            unless query_mask is given.
        ridge, weighting, is_causal
            As in `favorsharp.fit`.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            If an argument is not as described, or holds values that are not finite.
        RuntimeError
            If the module has no random rows yet.
        """
        self._refuse_landmarks("calibrate")
        if isinstance(q, Moments):
            if any(x is not None for x in (k, key_mask, query_mask, weighting)) or is_causal:
                raise TypeError("calibrate(moments) takes no k, masks or weighting: pass these to moments(...) instead")
            sample: dict[str, Any] = {}
        elif k is None:
            raise TypeError("calibrate takes queries and keys, or one Moments: k is missing")
        else:
            masks = {"mask_x": query_mask, "mask_y": key_mask}
            sample = {**self._averaged(q, k, masks), "weighting": weighting, "is_causal": is_causal}
        fault = self._fault_of_rows() if are_readable(self.projection) else None
        if fault is not None:
            raise RuntimeError(fault)
        names = ("q", "k")
        parameters = fit_named(
            names, q, k, method=self.method, kernel="softmax", scale=self.scale, ridge=ridge, **sample
        )
        self.set_parameters(map_arrays(parameters, self._without_averaged_axes))
        return self

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_parameters(self, parameters: Parameters) -> Self:
        """Replace the parameters, for example by those that `refine` returns; the random rows do not change.

        Raises
        ------
        ValueError
            If the parameters have another method, scale, shape or device, or if g1^T g2 is not I.
        """
        self._refuse_landmarks("set_parameters")
        if parameters.method != self.method or parameters.kernel != "softmax" or parameters.scale != self.scale:
            raise ValueError(
                f"parameters are {parameters!r}; accepted: method {self.method!r}, kernel 'softmax', "
                f"scale {self.scale:g}"
            )
        check_values(parameters, {name: self._shape(name) for name in _PARAMETERS}, self.projection.device)
        for name in _PARAMETERS:
            setattr(self, name, getattr(parameters, name).detach().to(self.projection.dtype, copy=True))
        self._last_fault = None
        return self

    @torch.inference_mode(False)
    @torch.no_grad()
    def redraw(self, rng: Any = None) -> Self:
        """Draw new random rows for the same parameters. The module never does this automatically.

        Parameters
        ----------
        rng : None, int, SeedSequence or numpy Generator
            None means a seed from torch's global generator. In distributed training, pass the same seed on every
            process.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If the module was given its rows as an array, or has landmarks.
        """
        self._refuse_landmarks("redraw")
        if self.draw is None:
            raise ValueError("redraw needs a draw by name, and this module was given its rows as an array")
        self._orthogonal = self.draw == "orthogonal"
        self.projection = torch.as_tensor(self._rows(rng), device="cpu").to(self.projection)
        return self

    def extra_repr(self) -> str:
        """The part of `repr` inside the parentheses."""
        method = self.method if isinstance(self.method, str) else getattr(self.method, "__name__", "callable")
        heads = "" if self.heads is None else f"heads={self.heads}, "
        state = "" if self.is_calibrated else ", not calibrated"
        return f"size={self.size}, {heads}method={method!r}, num_features={self.num_features}{state}"

    def _refuse_landmarks(self, name: str) -> None:
        if self._landmarks is not None:
            raise ValueError(
                f"{name} changes a map, and {type(self).__name__} with method 'landmarks' has none: they are chosen "
                "anew in each call"
            )

    @property
    def _batch(self) -> tuple[int, ...]:
        return () if self.heads is None else (self.heads,)

    def _shape(self, name: str) -> tuple[int, ...]:
        return (*self._batch, self.size if name in ("g1", "g2") else 1, self.size)

    def _rows(self, rng: Any) -> Any:
        if rng is None:
            seed = torch.randint(0, 2**62, (), device="cpu")
            rng = 0 if is_traced(seed) else int(seed)  # a fake module has no rows, so any seed will do
        assert self.draw is not None
        return draw_rows(self.draw, self.num_features, self.size, rng)

    def _averaged(self, q: Any, k: Any, masks: dict[str, Any]) -> dict[str, Any]:
        """The axes, masks and grouping of a fit to these queries and keys."""
        for name, x in (("q", q), ("k", k)):
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"{name} must be a torch tensor, got {type(x).__name__}")
        if q.ndim != k.ndim or (self.heads is not None and (k.ndim < 3 or k.shape[-3] != self.heads)):
            h = self.heads
            accepted = "(*b, n, d) and (*b, s, d)" if h is None else f"(*b, g {h}, n, d) and (*b, {h}, s, d)"
            raise ValueError(f"q has shape {tuple(q.shape)}, k has shape {tuple(k.shape)}; accepted: {accepted}")
        if masks["mask_x"] is None and q.shape[-2] == k.shape[-2] and not self.enable_gqa:
            masks = {**masks, "mask_x": masks["mask_y"]}
        kept = (-3,) if self.heads is not None else ()
        axes = tuple(axis for axis in range(-k.ndim, -1) if axis not in kept)
        return {"axis": axes, "enable_gqa": self.enable_gqa, **masks}

    def _without_averaged_axes(self, x: torch.Tensor) -> torch.Tensor:
        """Drop the leading axes of length 1 that averaging has left."""
        averaged = max(0, x.ndim - 2 - len(self._batch))
        if any(size != 1 for size in x.shape[:averaged]):
            raise ValueError(
                f"the moments have leading axes {tuple(x.shape[:-2])}; accepted: {self._batch}, averaged over others"
            )
        return x.reshape(x.shape[averaged:])

    def _set_initial_parameters(self) -> None:
        """Set the parameters to NaN, or, if the method needs no calibration, to those of the method."""
        if method_of(self.method).is_fitted:
            for name in _PARAMETERS:
                setattr(self, name, self.projection.new_full(self._shape(name), torch.nan))
            self._last_fault = None if self.projection.is_meta else self._not_calibrated()
        else:
            none = self.projection.new_zeros((*self._batch, 0, self.size))
            self.set_parameters(fit(none, none, method=self.method, scale=self.scale))

    def _not_calibrated(self) -> str:
        return (
            f"{type(self).__name__} with the fitted method {self.method!r} is not calibrated: call calibrate(q, k) on "
            "sample data or load a state dict; or use method='posrf' or 'landmarks', which fit nothing"
        )

    def _built(self) -> FeatureMap:
        """A map made from the current buffers."""
        values = {name: getattr(self, name) for name in _PARAMETERS}
        parameters = Parameters(method=self.method, kernel="softmax", scale=self.scale, **values)
        return feature_map(parameters, self.num_features, draw=self.projection)

    def _current(self) -> FeatureMap | None:
        """The cached map, if the buffers are still the tensors it was made from and were not written to since."""
        held = tuple(self._buffers[name] for name in _NUMBERS)
        known = self._held
        if known is None or any(is_traced(x) for x in held) or known[1] != stamps_of(held):
            return None
        return known[2] if all(a is b for a, b in zip(known[0], held, strict=True)) else None

    def _fault(self) -> str | None:
        """Why the buffers hold no map, or None. The host waits for the device only if they changed."""
        if self._current() is not None:
            return None
        held = tuple(self._buffers[name] for name in _NUMBERS)
        # Unreadable buffers cannot be checked. In a mode that traces or fakes, and for tensor subclasses, the result is
        # the fault that was found last. Other unreadable buffers (meta tensors, tensors in functorch transforms) are
        # accepted unchecked.
        if not are_readable(*held):
            return self._last_fault if is_traced_by_mode() or any(is_subclass(x) for x in held) else None
        fault: str | None = self._fault_of_rows() or self._fault_of_parameters()
        self._last_fault = fault
        if fault is None and not any(is_traced(x) for x in held):
            with torch.inference_mode(False):
                self._held = (held, stamps_of(held), self._built())
        return fault

    @constant_while_compiling
    def _fault_while_compiling(self) -> str | None:
        """`_fault`, evaluated once when torch traces the call."""
        return self._fault()

    @torch.no_grad()
    def _fault_of_rows(self) -> str | None:
        """Why the random rows cannot be used, or None."""
        return fault_of_rows(type(self).__name__, self.projection, self.draw, self._orthogonal)

    @torch.no_grad()
    def _fault_of_parameters(self) -> str | None:
        """Why the parameters cannot be used, or None."""
        wide = statistics_dtype(self.projection)
        values = [getattr(self, name).to(wide) for name in _PARAMETERS]
        blank, finite, distance = numbers_of_parameters(values)
        if blank:
            return self._not_calibrated()
        if finite and (distance < ROUNDING or self.method not in DENSE_EXPONENTIAL):
            return None
        return fault_of_mixed_parameters(type(self).__name__, distance)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, x in before.items():
            self._buffers[name] = _moved(x, self._buffers[name])
        if any(x is not None and x.is_meta for x in before.values()):
            self._last_fault = None
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        rows = state_dict.get(prefix + "projection")
        parameters = [prefix + name for name in _PARAMETERS]
        if rows is not None and not any(name in state_dict for name in parameters) and not self.is_calibrated:
            # a state dict of an earlier version, which stored no parameters for modules that were not calibrated
            state_dict.update({prefix + name: rows.new_full(self._shape(name), torch.nan) for name in _PARAMETERS})
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self._landmarks is not None:
            return
        self._last_fault = None
        if are_readable(*(self._buffers[name] for name in _NUMBERS)):
            self._orthogonal = self._orthogonal and float(largest_cosine(self.projection)) < ANGLE
            self._fault()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._landmarks = state.get("_landmarks")
        if "_source" not in state and self._landmarks is None:  # pickled by an earlier version
            self._source = None if self.draw is not None else _own(self.projection)
            self._orthogonal, self._last_fault = False, None
            for name in _PARAMETERS:
                if self._buffers[name] is None:
                    self._buffers[name] = self.projection.new_full(self._shape(name), torch.nan)


def _own(rows: Any) -> torch.Tensor:
    """A copy of the rows that the caller passed; arrays of other libraries become tensors on the CPU."""
    rows = rows if isinstance(rows, torch.Tensor) else torch.as_tensor(rows, device="cpu")
    return rows.detach().clone()


def _moved(x: torch.Tensor | None, moved: torch.Tensor | None) -> torch.Tensor | None:
    """The buffer x after a conversion of the module to `moved`: on its device, but not rounded.

    NaN if x has no numbers.
    """
    if x is None or moved is None or moved is x or type(moved) is not type(x) or not x.is_floating_point():
        return moved
    dtype = x.dtype if moved.dtype in (torch.float16, torch.bfloat16) else moved.dtype
    with torch.inference_mode(False), torch.no_grad():
        if x.is_meta and not moved.is_meta:  # to_empty does not fill its memory
            return torch.full(x.shape, torch.nan, dtype=dtype, device=moved.device)
        return x.to(device=moved.device, dtype=dtype, copy=True)
