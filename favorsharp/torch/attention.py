"""The public module `LinearAttention`, which computes attention of queries, keys and values."""

from typing import Any

import torch

from favorsharp._checks import check_flag, check_integer
from favorsharp.linear_attention import linear_attention
from favorsharp.methods import MethodLike
from favorsharp.torch.buffers import MapBuffers


class LinearAttention(MapBuffers):
    """Attention through random features, with the feature map as buffers; or through landmarks, without buffers.

    Call `calibrate(q, k)` once on sample data, in training or in evaluation mode. From then on the map is frozen: only
    `calibrate`, `set_parameters`, `redraw(rng)` and `load_state_dict` change it, and calls are deterministic. Gradients
    flow to q, k and v.

    Parameters
    ----------
    size : int
        d, the size of a query.
    heads : int, optional
        Number of key heads; each has its own fit. None means one fit for all heads.
    method : str or callable
        As in `favorsharp.fit`; only methods whose features are positive. `posrf` needs no calibration. Or "landmarks",
        as in `favorsharp.attention`: they are biased, and there is nothing to calibrate, to set or to redraw.
    num_features : int
        m.
    draw : str or array, shape (m, d)
        As in `favorsharp.feature_map`. All heads share the rows. Landmarks take none.
    rng : None, int, SeedSequence or numpy Generator
        None means a seed from torch's global generator, as for the weights of a module; for landmarks, seed 0.
    is_causal : bool
        Query i sees keys 0 .. i.
    window : int
        Block length of exactly scored keys, as in `favorsharp.linear_attention`; 0 means none.
    scale : float, optional
        The scale of the kernel exp(scale q.k); None means d**-0.5.
    enable_gqa : bool
        Queries have g times the heads of keys and values.
    device, dtype : optional
        The device and the dtype of the buffers; the dtype is widened to at least float32.

    Examples
    --------
    >>> import torch
    >>> from favorsharp.torch import LinearAttention
    >>> q, k, v = torch.randn(3, 2, 4, 100, 16)
    >>> attention = LinearAttention(16, heads=4, num_features=64, rng=0).calibrate(q, k)
    >>> attention(q, k, v).shape
    torch.Size([2, 4, 100, 16])
    """

    def __init__(
        self,
        size: int,
        heads: int | None = None,
        *,
        method: MethodLike = "optimal",
        num_features: int = 256,
        draw: Any = "orthogonal",
        rng: Any = None,
        is_causal: bool = False,
        window: int = 0,
        scale: float | None = None,
        enable_gqa: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            size,
            heads,
            method=method,
            num_features=num_features,
            draw=draw,
            rng=rng,
            scale=scale,
            enable_gqa=enable_gqa,
            device=device,
            dtype=dtype,
        )
        self.is_causal = check_flag("is_causal", is_causal)
        self.window = check_integer("window", window, 0)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        *,
        is_causal: bool | None = None,
        cu_seqlens: Any = None,
        state: Any = None,
        return_state: bool = False,
    ) -> Any:
        """Compute attention as `favorsharp.linear_attention` does.

        Parameters
        ----------
        q : tensor, shape (*b, n, d)
        k : tensor, shape (*b, s, d)
        v : tensor, shape (*b, s, e)
        key_mask : tensor of bool, shape (*b, s), optional
            True where a key is visible.
        is_causal : bool, optional
            Overrides the option of the module.
        cu_seqlens, state, return_state
            As in `favorsharp.linear_attention`.

        Returns
        -------
        tensor, shape (*b, n, e)
            In the dtype that q, k and v promote to. It is computed in at least float32, also under autocast.
        state : State or LandmarkState
            Only with `return_state`.

        Raises
        ------
        RuntimeError
            If the method needs calibration and the module is not calibrated.
        TypeError, ValueError
            If an argument is not as described.
        """
        with without_autocast(q):
            return linear_attention(
                q,
                k,
                v,
                self.feature_map,
                is_causal=self.is_causal if is_causal is None else is_causal,
                window=self.window,
                key_mask=key_mask,
                enable_gqa=self.enable_gqa,
                cu_seqlens=cu_seqlens,
                state=state,
                return_state=return_state,
            )

    def extra_repr(self) -> str:
        """The part of `repr` inside the parentheses."""
        causal = ", is_causal=True" if self.is_causal else ""
        window = f", window={self.window}" if self.window else ""
        return super().extra_repr() + causal + window


def without_autocast(x: torch.Tensor) -> Any:
    """A context without autocast on the device of x: the exponents of features need more than half precision."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"q must be a torch tensor, got {type(x).__name__}")
    kind = x.device.type
    return torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False)
