"""The public module `MapBuffers`, the base of `LinearAttention`: a feature map held as buffers of a module.

As buffers, the map is moved, saved and loaded together with the model that uses it.
"""

import copy
import math
from typing import Any, Self

import torch
from torch.nn import functional

from favorsharp._arrays import is_array, stamps_of, statistics_dtype
from favorsharp._autodiff import is_traced, is_traced_by_mode
from favorsharp._checks import check_choice, check_flag, check_integer
from favorsharp._values import map_arrays
from favorsharp.attention_moments import attention_moments
from favorsharp.draws import DRAWS, draw_rows
from favorsharp.exact import kernel_scale
from favorsharp.features import FeatureMap, feature_map
from favorsharp.fitting import fit
from favorsharp.landmarks.settings import Landmarks, landmarks
from favorsharp.landmarks.verbs import check_landmark_options
from favorsharp.methods import DENSE_EXPONENTIAL, LANDMARKS, MethodLike, check_method, method_of
from favorsharp.moments import Moments, moments
from favorsharp.parameters import Parameters

_PARAMETERS = ("a", "g1", "g2", "center_x", "center_y")
_NUMBERS = ("projection", *_PARAMETERS)
_ROUNDING = 1e-3
"""How far g1^T g2 may be from I, relative to |g1|^T |g2|; averaging a map with itself in float32 gives up to 6e-4."""
_ANGLE = 5e-3
"""The largest cosine of two rows that count as orthogonal; rounding rows to bfloat16 gives smaller cosines."""


class MapBuffers(torch.nn.Module):
    """A feature map held as buffers; the base of `LinearAttention`, and for modules of your own.

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
                raise TypeError("calibrate(moments) takes no k, masks or weighting: the moments have them in")
            data = q
        elif k is None:
            raise TypeError("calibrate takes queries and keys, or one Moments: k is missing")
        else:
            data = self._gathered(q, k, key_mask, query_mask, weighting, is_causal)
        fault = self._fault_of_rows() if _are_readable(self.projection) else None
        if fault is not None:
            raise RuntimeError(fault)
        parameters = fit(data, method=self.method, scale=self.scale, ridge=ridge)
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
        for name in _PARAMETERS:
            value = getattr(parameters, name)
            shape = self._shape(name)
            if tuple(value.shape) != shape:
                raise ValueError(f"parameters.{name} has shape {tuple(value.shape)}; accepted: {shape}")
            if value.device != self.projection.device:
                raise ValueError(
                    f"parameters.{name} is on {value.device}; accepted: the device of the module, "
                    f"{self.projection.device}"
                )
        if self.method in DENSE_EXPONENTIAL and _are_readable(parameters.g1, parameters.g2):
            distance = float(_distance_from_inverse(parameters.g1, parameters.g2))
            if not distance < _ROUNDING:
                raise ValueError(f"parameters.g1^T parameters.g2 differs from I by {distance:.2g}; accepted: rounding")
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
            rng = 0 if is_traced(seed) else int(seed)  # in a fake module the rows have no numbers, so any seed will do
        assert self.draw is not None
        return draw_rows(self.draw, self.num_features, self.size, rng)

    def _gathered(
        self, q: Any, k: Any, key_mask: Any, query_mask: Any, weighting: float | None, is_causal: bool
    ) -> Moments:
        for name, x in (("q", q), ("k", k)):
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"{name} must be a torch tensor, got {type(x).__name__}")
        if q.ndim != k.ndim or (self.heads is not None and (k.ndim < 3 or k.shape[-3] != self.heads)):
            h = self.heads
            accepted = "(*b, n, d) and (*b, s, d)" if h is None else f"(*b, g {h}, n, d) and (*b, {h}, s, d)"
            raise ValueError(f"q has shape {tuple(q.shape)}, k has shape {tuple(k.shape)}; accepted: {accepted}")
        if query_mask is None and q.shape[-2] == k.shape[-2] and not self.enable_gqa:
            query_mask = key_mask
        kept = (-3,) if self.heads is not None else ()
        axes = tuple(axis for axis in range(-k.ndim, -1) if axis not in kept)
        options = {"axis": axes, "mask_x": query_mask, "mask_y": key_mask, "enable_gqa": self.enable_gqa}
        if weighting is None:
            if is_causal:
                raise ValueError("is_causal=True says which pairs a weighting counts; accepted with weighting=...")
            return moments(q, k, **options)
        return attention_moments(q, k, weighting=weighting, scale=self.scale, is_causal=is_causal, **options)

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
        # the fault that was found last. Others (meta tensors, tensors in functorch transforms) are accepted unchecked.
        if not _are_readable(*held):
            return self._last_fault if is_traced_by_mode() or any(_is_subclass(x) for x in held) else None
        fault: str | None = self._fault_of_rows() or self._fault_of_parameters()
        self._last_fault = fault
        if fault is None and not any(is_traced(x) for x in held):
            with torch.inference_mode(False):
                self._held = (held, stamps_of(held), self._built())
        return fault

    @torch.compiler.assume_constant_result
    def _fault_while_compiling(self) -> str | None:
        """`_fault`, evaluated once when torch traces the call."""
        return self._fault()

    @torch.no_grad()
    def _fault_of_rows(self) -> str | None:
        """Why the random rows cannot be used, or None."""
        rows = self.projection.to(statistics_dtype(self.projection))
        square, cosine = torch.stack([rows.square().mean(), _largest_cosine(rows)]).tolist()
        name = type(self).__name__
        if not math.isfinite(square):
            return (
                f"{name} has no random rows: nobody filled its memory (to_empty, or a load without that key); call "
                "reset_parameters() or redraw(), or load a state dict"
            )
        if self.draw is None or (_may_be_normal(square, rows.numel()) and (cosine < _ANGLE or not self._orthogonal)):
            return None
        return (
            f"the rows of {name} are not those of any draw {self.draw!r} (mean square {square:.3g}, largest cosine "
            f"{cosine:.3g}): averages of different rows are like that, and memory that nobody filled. Average only "
            "copies that share their rows, and leave out buffers otherwise; call redraw() or load a state dict"
        )

    @torch.no_grad()
    def _fault_of_parameters(self) -> str | None:
        """Why the parameters cannot be used, or None."""
        values = [getattr(self, name).to(statistics_dtype(self.projection)) for name in _PARAMETERS]
        distance = _distance_from_inverse(values[1], values[2])
        flags = [torch.stack([test(x).all() for x in values]).all() for test in (torch.isnan, torch.isfinite)]
        blank, finite, distance = torch.stack([*(x.to(distance) for x in flags), distance]).tolist()
        if blank:
            return self._not_calibrated()
        if finite and (distance < _ROUNDING or self.method not in DENSE_EXPONENTIAL):
            return None
        return (
            f"the parameters of {type(self).__name__} are not those of one fit (g1^T g2 differs from I by "
            f"{distance:.2g}): averages of different calibrations are like that, numbers rounded to half precision, "
            "and memory that nobody filled. Average only copies that share one calibration, and leave out buffers "
            "otherwise; call calibrate(q, k) or load a state dict"
        )

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
        if _are_readable(*(self._buffers[name] for name in _NUMBERS)):
            self._orthogonal = self._orthogonal and float(_largest_cosine(self.projection)) < _ANGLE
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
    """The buffer x after a module conversion gave `moved`: on that device, but not rounded; NaN if x has no numbers."""
    if x is None or moved is None or moved is x or type(moved) is not type(x) or not x.is_floating_point():
        return moved
    dtype = x.dtype if moved.dtype in (torch.float16, torch.bfloat16) else moved.dtype
    with torch.inference_mode(False), torch.no_grad():
        if x.is_meta and not moved.is_meta:  # to_empty leaves its memory unset
            return torch.full(x.shape, torch.nan, dtype=dtype, device=moved.device)
        return x.to(device=moved.device, dtype=dtype, copy=True)


def _is_subclass(x: torch.Tensor) -> bool:
    """Whether x is a tensor subclass with operations of its own, such as a fake tensor."""
    return type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def _are_readable(*arrays: torch.Tensor) -> bool:
    """Whether the numbers of the tensors can be read here."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return not (is_traced_by_mode() or any(x.is_meta or _is_subclass(x) or wrapped(x) for x in arrays))


def _largest_cosine(rows: torch.Tensor) -> torch.Tensor:
    """The largest absolute cosine of two rows within a block of d rows."""
    m, d = rows.shape
    blocks = functional.pad(rows, (0, 0, 0, -m % d)).reshape(-1, d, d)
    units = functional.normalize(blocks, dim=-1)
    return (units @ units.mT).abs().triu(1).amax()


def _may_be_normal(square: float, count: int) -> bool:
    """Whether count / 2 independent normal numbers have this mean square with a probability above 1e-13.

    The count is halved, because rows may come in pairs w and -w. The bound is Chernoff's.
    """
    return square > 0 and 0.25 * count * (square - 1 - math.log(square)) < 30


def _distance_from_inverse(g1: torch.Tensor, g2: torch.Tensor) -> torch.Tensor:
    """The largest absolute entry of g1^T g2 - I; each entry is divided by that of |g1|^T |g2| if this is above 1."""
    identity = torch.eye(g1.shape[-1], dtype=g1.dtype, device=g1.device)
    return ((g1.mT @ g2 - identity).abs() / (g1.abs().mT @ g2.abs()).clamp(min=1)).amax()
