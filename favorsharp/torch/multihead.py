"""The public module `MultiheadAttention`: linear attention with the signature and the weights of torch's own module."""

import math
from typing import Any, Self

import torch
from torch.nn import functional

from favorsharp._checks import check_array, check_flag, check_integer
from favorsharp.exact import softmax_attention
from favorsharp.methods import MethodLike
from favorsharp.torch.attention import LinearAttention, without_autocast


class MultiheadAttention(torch.nn.Module):
    """`torch.nn.MultiheadAttention` in linear time, with the same signature and the same weights.

    A state dict of torch's module loads with `strict=True`. The buffers of the feature map, whose names begin with
    `attention.`, keep their values then. Attention weights are never computed, so `need_weights` is False by default,
    and `dropout`, which acts on them, must be 0.

    Parameters
    ----------
    embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        As in `torch.nn.MultiheadAttention`; `dropout` must be 0. A module on the "meta" device gets its memory from
        `to_empty` followed by `reset_parameters`, or from loading a state dict.
    method : str or callable
        As in `favorsharp.fit`, with one fit for each head; only methods whose features are positive. Fitted methods
        need `calibrate` before the first call. "landmarks" is as in `LinearAttention`. "exact" means softmax attention,
        for comparison.
    num_features, draw, rng, window
        As in `LinearAttention`.

    Examples
    --------
    >>> import torch
    >>> from favorsharp.torch import MultiheadAttention
    >>> exact = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    >>> linear = MultiheadAttention.from_torch(exact, num_features=64, rng=0)
    >>> x = torch.randn(2, 100, 32)
    >>> out, _ = linear.calibrate(x)(x, x, x)
    >>> out.shape
    torch.Size([2, 100, 32])
    """

    # torch.nn.TransformerEncoderLayer has a fast path that computes exact attention from the weights and does not call
    # this module. It reads this attribute, and takes that path only if the attribute is True.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        method: MethodLike = "optimal",
        num_features: int = 256,
        draw: Any = "orthogonal",
        rng: Any = None,
        window: int = 0,
    ) -> None:
        super().__init__()
        self.embed_dim = check_integer("embed_dim", embed_dim, 1)
        self.num_heads = check_integer("num_heads", num_heads, 1)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        if dropout != 0:
            raise ValueError(
                f"dropout must be 0.0, got {dropout}: it acts on attention weights, which are never computed"
            )
        self.dropout = 0.0
        self.kdim = embed_dim if kdim is None else check_integer("kdim", kdim, 1)
        self.vdim = embed_dim if vdim is None else check_integer("vdim", vdim, 1)
        self.head_dim = embed_dim // num_heads
        self.batch_first = check_flag("batch_first", batch_first)
        self.add_zero_attn = check_flag("add_zero_attn", add_zero_attn)
        self.method = method
        self.window = check_integer("window", window, 0)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self._make_weights(check_flag("bias", bias), check_flag("add_bias_kv", add_bias_kv), made)
        options: dict[str, Any] = {"num_features": num_features, "draw": draw, "rng": rng, "window": self.window}
        self.attention: LinearAttention | None = None
        if method != "exact":
            self.attention = LinearAttention(self.head_dim, self.num_heads, method=method, **options, **made)
        elif self.window:
            raise ValueError(f"window is for features, and method 'exact' has none: got {window}; accepted: 0")
        self.register_load_state_dict_pre_hook(_keep_own_map)

    def _make_weights(self, bias: bool, add_bias_kv: bool, made: dict[str, Any]) -> None:
        """Register the parameters of torch's module, under its names, and draw their values."""
        size = self.embed_dim
        joined = self.kdim == self.vdim == size
        for name, shape in {
            "in_proj_weight": (3 * size, size) if joined else None,
            "q_proj_weight": None if joined else (size, size),
            "k_proj_weight": None if joined else (size, self.kdim),
            "v_proj_weight": None if joined else (size, self.vdim),
            "in_proj_bias": (3 * size,) if bias else None,
            "bias_k": (1, 1, size) if add_bias_kv else None,
            "bias_v": (1, 1, size) if add_bias_kv else None,
        }.items():
            parameter = None if shape is None else torch.nn.Parameter(torch.empty(shape, **made))
            self.register_parameter(name, parameter)
        self.out_proj = torch.nn.Linear(size, size, bias=bias, **made)
        self._reset_weights()

    @classmethod
    def from_torch(cls, module: torch.nn.MultiheadAttention, **options: Any) -> Self:
        """Make a module with the sizes, the device, the dtype and a copy of the weights of torch's module.

        Parameters
        ----------
        module : torch.nn.MultiheadAttention
        **options
            method, num_features, draw, rng, window. If torch's module has dropout of attention weights, pass
            `dropout=0.0` to drop this option.
        """
        if not isinstance(module, torch.nn.MultiheadAttention):
            raise TypeError(f"module must be a torch.nn.MultiheadAttention, got {type(module).__name__}")
        weight = module.out_proj.weight
        made: Self = cls(
            module.embed_dim,
            module.num_heads,
            dropout=options.pop("dropout", module.dropout),
            bias=module.in_proj_bias is not None,
            add_bias_kv=module.bias_k is not None,
            add_zero_attn=module.add_zero_attn,
            kdim=module.kdim,
            vdim=module.vdim,
            batch_first=module.batch_first,
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        made.load_state_dict(module.state_dict())
        made.train(module.training)
        return made

    def reset_parameters(self) -> None:
        """Initialise the weights as torch's module does, and the map as `LinearAttention.reset_parameters` does."""
        self.out_proj.reset_parameters()
        self._reset_weights()
        if self.attention is not None:
            self.attention.reset_parameters()

    def _reset_weights(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if name in ("bias_k", "bias_v"):
                torch.nn.init.xavier_normal_(parameter)
            elif name == "in_proj_bias":
                torch.nn.init.zeros_(parameter)
            else:
                torch.nn.init.xavier_uniform_(parameter)
        if self.out_proj.bias is not None:
            torch.nn.init.zeros_(self.out_proj.bias)

    @torch.no_grad()
    def calibrate(
        self, query: torch.Tensor, key: torch.Tensor | None = None, *, key_padding_mask: torch.Tensor | None = None
    ) -> Self:
        """Fit the map of every head to sample inputs, in the layout of a call. Does nothing if method is "exact".

        Parameters
        ----------
        query : tensor
        key : tensor, optional
            None means the query, as in self-attention.
        key_padding_mask : tensor, optional
            As in a call. If there are as many queries as keys, it applies to the queries too.

        Returns
        -------
        self
        """
        if self.attention is None:
            return self
        key = query if key is None else key
        query, key = (self._batch_first(x) for x in (query, key))
        mask = _visible_keys(key_padding_mask, (key.shape[0], key.shape[1]))
        q, k, _ = self._projected(query, key, None)
        self.attention.calibrate(q, k, key_mask=None if mask is None else mask[:, None, :])
        return self

    def redraw(self, rng: Any = None) -> Self:
        """Draw new random rows, as in `LinearAttention`."""
        if self.attention is not None:
            self.attention.redraw(rng)
        return self

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, None]:
        """Compute attention of the projected queries to the projected keys.

        Parameters
        ----------
        query, key, value : tensor
            Shapes (n, batch, embed_dim), (s, batch, kdim) and (s, batch, vdim). With `batch_first` the batch axis is
            the first; it may also be missing.
        key_padding_mask : tensor, shape (batch, s) or (s,), optional
            Boolean, True where a key is to be ignored; or floating, with 0 and -inf.
        need_weights : bool
            Must be False, because attention weights are never computed.
        attn_mask : tensor, shape (n, s) or (batch num_heads, n, s), optional
            A causal mask, or one that hides nothing; any other mask is refused. It is boolean, True where hidden, or
            floating, with 0 and -inf.
        average_attn_weights : bool
            Has no effect, because there are no weights.
        is_causal : bool
            Query i sees keys 0 .. i; attn_mask may be given too. Under a compiler or exporter the values of attn_mask
            are not known, so pass this instead.

        Returns
        -------
        output : tensor
            In the layout of `query`. The attention of a query that sees no key is zero; torch's module gives NaN.
        None
            Instead of the weights.

        Raises
        ------
        RuntimeError
            If the method needs calibration and the module is not calibrated.
        TypeError, ValueError
            If an argument is not as described.
        """
        if need_weights:
            raise ValueError("need_weights must be False, got True: attention weights are never computed")
        named = {"query": query, "key": key, "value": value}
        unbatched = query.ndim == 2
        query, key, value = (self._batch_first(self._checked(name, x)) for name, x in named.items())
        n, (batch, s) = query.shape[1], key.shape[:2]
        mask = _visible_keys(key_padding_mask, (batch, s))
        is_causal = _asks_causal(attn_mask, check_flag("is_causal", is_causal), (n, s), batch * self.num_heads)
        q, k, v = self._projected(query, key, value)
        extra = (self.bias_k is not None) + self.add_zero_attn
        if extra:
            if is_causal or self.window:
                raise ValueError(
                    "add_bias_kv and add_zero_attn add keys without a position; accepted: no causal mask and no window"
                )
            k, v = self._extended(k, v)
            mask = None if mask is None else functional.pad(mask, (0, extra), value=True)
        mask = None if mask is None else mask[:, None, :]
        if self.attention is not None:
            out = self.attention(q, k, v, mask, is_causal=is_causal)
        else:
            with without_autocast(q):
                out = softmax_attention(q, k, v, is_causal=is_causal, key_mask=mask)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if unbatched:
            return out[0], None
        return out if self.batch_first else out.transpose(0, 1), None

    def extra_repr(self) -> str:
        """The part of `repr` inside the parentheses."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"

    def _checked(self, name: str, x: Any) -> torch.Tensor:
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(x).__name__}")
        if x.is_nested:
            raise TypeError(f"{name} is a nested tensor; accepted: padded ones with key_padding_mask")
        check_array(name, x)
        width = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}[name]
        if x.ndim not in (2, 3) or x.shape[-1] != width:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; accepted: two or three axes, the last of {width}")
        return x

    def _batch_first(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _projected(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None) -> list[Any]:
        """The queries, keys and values of all heads, each of shape (batch, heads, n, head_dim)."""
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [
            None if x is None else self._heads(functional.linear(x, weight, bias))
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _extended(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, with the trained ones (`add_bias_kv`) and zeros (`add_zero_attn`) appended."""
        keys, values = [k], [v]
        shape = (k.shape[0], self.num_heads, 1, self.head_dim)
        if self.bias_k is not None and self.bias_v is not None:
            keys.append(self._heads(self.bias_k).to(k.dtype).expand(shape))
            values.append(self._heads(self.bias_v).to(v.dtype).expand(shape))
        if self.add_zero_attn:
            keys.append(k.new_zeros(shape))
            values.append(v.new_zeros(shape))
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


def _keep_own_map(module: torch.nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    """Add the module's own map to a state dict without a map, such as torch's, so that loading keeps the map."""
    inner = f"{prefix}attention."
    if isinstance(module.attention, LinearAttention) and not any(name.startswith(inner) for name in state_dict):
        state_dict.update({inner + name: x for name, x in module.attention.state_dict().items()})


def _hidden(name: str, mask: Any) -> torch.Tensor:
    """Convert a mask as torch defines it to a boolean mask that is True where hidden."""
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(mask).__name__}")
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise TypeError(f"{name} has dtype {mask.dtype}; accepted: torch.bool, or floating with 0 and -inf")
    hidden = mask == -math.inf
    _require((hidden | (mask == 0)).all(), f"{name} holds numbers other than 0 and -inf, which features cannot add")
    return hidden


def _visible_keys(mask: Any, shape: tuple[int, int]) -> torch.Tensor | None:
    """Convert key_padding_mask to favorsharp's key_mask, which is True where visible."""
    if mask is None:
        return None
    hidden = _hidden("key_padding_mask", mask)
    hidden = hidden[None] if hidden.ndim == 1 else hidden
    if tuple(hidden.shape) != shape:
        raise ValueError(f"key_padding_mask has shape {tuple(mask.shape)}; accepted: (batch, s) = {shape}")
    return ~hidden


def _asks_causal(mask: Any, is_causal: bool, points: tuple[int, int], heads: int) -> bool:
    """Whether attention is causal; a mask that is neither causal nor empty is refused."""
    if mask is None:
        return is_causal
    hidden = _hidden("attn_mask", mask)
    if tuple(hidden.shape) not in (points, (heads, *points)):
        raise ValueError(
            f"attn_mask has shape {tuple(mask.shape)}; accepted: (n, s) = {points} or (batch num_heads, n, s)"
        )
    future = torch.ones(points, dtype=torch.bool, device=hidden.device).triu(1)
    refusal = "attn_mask is neither causal nor empty, and features cannot hide single pairs; accepted: a causal mask"
    if is_causal:
        _require((hidden == future).all(), refusal)
        return True
    if torch.compiler.is_compiling():
        raise ValueError("attn_mask cannot be read while compiling: pass is_causal=True for a causal mask, or no mask")
    if not bool(hidden.any()):
        return False
    if bool((hidden == future).all()):
        return True
    raise ValueError(refusal)


def _require(condition: torch.Tensor, message: str) -> None:
    """Raise unless a condition holds; under a compiler, the check is made when the compiled code runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise ValueError(message)
