"""A feature map as the buffers of a module: it moves, is saved and is loaded with the model it serves."""

from typing import Any, Self

import torch

from favorsharp._arrays import is_array, is_followed, is_traced, stamps_of
from favorsharp._checks import check_choice, check_flag, check_integer
from favorsharp.attention_moments import attention_moments
from favorsharp.draws import DRAWS, draw_rows
from favorsharp.exact import kernel_scale
from favorsharp.features import FeatureMap, feature_map
from favorsharp.moments import Moments, moments
from favorsharp.parameters import Method, Parameters, check_method, fit, is_fitted, map_arrays

_PARAMETERS = ("a", "g1", "g2", "center_x", "center_y")
_SIGNED = ("trig", "poisson", "geometric")


class MapBuffers(torch.nn.Module):
    """A feature map whose numbers are buffers; the base of `LinearAttention`, and of use to adapters.

    Buffers are `projection`, the random rows, and from calibration on `a`, `g1`, `g2`, `center_x`, `center_y`. They
    stay in float32 at least, whatever `half()` or `to(torch.bfloat16)` make of the rest of the model: a map that is
    rounded is not unbiased any more. What is kept is made outside `torch.inference_mode()`, whose tensors training
    refuses.

    Parameters
    ----------
    size : int
        d, of a query.
    heads : int, optional
        Heads of the keys that get a fit each; None: one fit for all heads.
    method : str or callable
        As in `favorsharp.fit`; a positive one. A method that reads no data needs no calibration.
    num_features : int
        m.
    draw : str or array, shape (m, d)
        As in `favorsharp.feature_map`. All heads share the rows.
    rng : None, int, SeedSequence or numpy Generator
        None: seeded by torch's global generator, as the weights of a module are.
    scale : float, optional
        Of the kernel exp(scale q.k); None means d**-0.5.
    enable_gqa : bool
        Queries have g times the heads of the keys.
    device, dtype : optional
        Of the buffers; float32 at least.
    """

    projection: torch.Tensor

    def __init__(
        self,
        size: int,
        heads: int | None = None,
        *,
        method: Method = "optimal",
        num_features: int = 256,
        draw: Any = "orthogonal",
        rng: Any = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_method(method)
        if method in _SIGNED:
            raise ValueError(f"method {method!r} has signed features, which attention refuses; accepted: positive ones")
        self.size = check_integer("size", size, 1)
        self.heads = None if heads is None else check_integer("heads", heads, 1)
        self.num_features = check_integer("num_features", num_features, 1)
        self.method = method
        self.scale = kernel_scale("softmax", scale, self.size)
        self.enable_gqa = check_flag("enable_gqa", enable_gqa)
        if isinstance(draw, str):
            check_choice("draw", draw, DRAWS, also=", or an (m, d) array of rows")
        elif not is_array(draw):
            raise TypeError(f"draw must be a name or an (m, d) array of rows, got {type(draw).__name__}")
        elif tuple(draw.shape) != (self.num_features, self.size):
            raise ValueError(f"draw has shape {tuple(draw.shape)}; accepted: (m, d) = {(self.num_features, self.size)}")
        self.draw = draw if isinstance(draw, str) else None
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        rows = self._rows(rng) if isinstance(draw, str) else draw
        self.register_buffer("projection", torch.as_tensor(rows, device=device).to(dtype))
        for name in _PARAMETERS:
            self.register_buffer(name, None)
        self._held: tuple[tuple[torch.Tensor, ...], Any, FeatureMap] | None = None
        if not is_fitted(method):
            none = torch.zeros((*self._batch, 0, self.size), device=self.projection.device, dtype=dtype)
            self.set_parameters(fit(none, none, method=method, scale=self.scale))

    @property
    def is_calibrated(self) -> bool:
        """Whether there are parameters: from calibration, from a state dict, or because the method reads no data."""
        return self.g1 is not None

    @property
    def feature_map(self) -> FeatureMap:
        """The map: a frozen value that every function of `favorsharp` takes."""
        if not self.is_calibrated:
            raise RuntimeError(
                f"{type(self).__name__} with the fitted method {self.method!r} is not calibrated: call calibrate(q, k) "
                "on sample data or load a state dict; or use method='posrf', which fits nothing"
            )
        if torch.compiler.is_compiling():
            return self._built()
        held = tuple(x for x in self._buffers.values() if x is not None)
        if any(is_followed(x) for x in held):
            return self._built()
        stamps = stamps_of(held)
        known = self._held
        if known is None or known[1] != stamps or any(a is not b for a, b in zip(known[0], held, strict=True)):
            with torch.inference_mode(False):
                self._held = known = (held, stamps, self._built())
        return known[2]

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
        """Fit the parameters to sample queries and keys, and keep them; the random rows stay.

        Works in training and in evaluation, records no gradient, and replaces an earlier fit. To fit to several
        batches, gather their `favorsharp.moments` with `favorsharp.combine` and pass these.

        Parameters
        ----------
        q : tensor, shape (*b, n, d), or Moments
            With `heads`, (*b, heads, n, d), or (*b, g heads, n, d) with `enable_gqa`.
        k : tensor, shape (*b, s, d)
            With `heads`, (*b, heads, s, d).
        key_mask, query_mask : boolean tensor, shape (*b, s) and (*b, n), optional
            True where a point counts. Where n == s, without grouped heads, key_mask holds for the queries too, unless
            query_mask is given.
        ridge, weighting, is_causal
            As in `favorsharp.fit`.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            If an argument is not as described, or holds values that are not finite.
        """
        if isinstance(q, Moments):
            if any(x is not None for x in (k, key_mask, query_mask, weighting)) or is_causal:
                raise TypeError("calibrate(moments) takes no k, masks or weighting: the moments have them in")
            data = q
        elif k is None:
            raise TypeError("calibrate takes queries and keys, or one Moments: k is missing")
        else:
            data = self._gathered(q, k, key_mask, query_mask, weighting, is_causal)
        parameters = fit(data, method=self.method, scale=self.scale, ridge=ridge)
        self.set_parameters(map_arrays(parameters, self._without_averaged_axes))
        return self

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_parameters(self, parameters: Parameters) -> Self:
        """Take over parameters, such as `refine` gives; the random rows stay.

        Raises
        ------
        ValueError
            If they are of another method, scale or shape.
        """
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
            setattr(self, name, value.detach().to(self.projection.dtype, copy=True))
        return self

    @torch.inference_mode(False)
    @torch.no_grad()
    def redraw(self, rng: Any = None) -> Self:
        """Draw new random rows for the same parameters. Never happens by itself.

        Parameters
        ----------
        rng : None, int, SeedSequence or numpy Generator
            None: seeded by torch's global generator. Under distributed training pass one seed on every process.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If the rows are the caller's own.
        """
        if self.draw is None:
            raise ValueError("redraw needs a draw by name, and this module was given its rows as an array")
        rows = torch.as_tensor(self._rows(rng), device=self.projection.device)
        self.projection = rows.to(self.projection.dtype)
        return self

    def extra_repr(self) -> str:
        """What `repr` shows."""
        method = self.method if isinstance(self.method, str) else getattr(self.method, "__name__", "callable")
        heads = "" if self.heads is None else f"heads={self.heads}, "
        state = "" if self.is_calibrated else ", not calibrated"
        return f"size={self.size}, {heads}method={method!r}, num_features={self.num_features}{state}"

    @property
    def _batch(self) -> tuple[int, ...]:
        return () if self.heads is None else (self.heads,)

    def _shape(self, name: str) -> tuple[int, ...]:
        return (*self._batch, self.size if name in ("g1", "g2") else 1, self.size)

    def _rows(self, rng: Any) -> Any:
        if rng is None:
            seed = torch.randint(0, 2**62, (), device="cpu")
            rng = 0 if is_traced(seed) else int(seed)  # rows of a fake module are fake
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
        """Drop the leading axes of length 1 that averaging has kept."""
        averaged = max(0, x.ndim - 2 - len(self._batch))
        if any(size != 1 for size in x.shape[:averaged]):
            raise ValueError(
                f"the moments have leading axes {tuple(x.shape[:-2])}; accepted: {self._batch}, averaged over others"
            )
        return x.reshape(x.shape[averaged:])

    def _built(self) -> FeatureMap:
        """The map of the buffers as they are."""
        values = {name: getattr(self, name) for name in _PARAMETERS}
        parameters = Parameters(method=self.method, kernel="softmax", scale=self.scale, **values)
        return feature_map(parameters, self.num_features, draw=self.projection)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = {name: x for name, x in self._buffers.items() if x is not None}
        super()._apply(fn, recurse)
        for name, x in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = x.to(device=moved.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in _PARAMETERS:  # NaN, so that a load that fails leaves nothing that works
            if prefix + name in state_dict and getattr(self, name) is None:
                setattr(self, name, self.projection.new_full(self._shape(name), torch.nan))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}
