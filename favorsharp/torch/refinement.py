"""The public function `refine`: improves a fitted map by gradient descent on the error of the attention output."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from favorsharp._autodiff import is_traced
from favorsharp._checks import check_integer
from favorsharp._values import astype
from favorsharp.draws import draw_rows, generator
from favorsharp.exact import softmax_attention
from favorsharp.features import feature_map
from favorsharp.linear_attention import linear_attention
from favorsharp.methods import TAKES_PROPOSALS, method_of
from favorsharp.parameters import Parameters

_CHECKS = 10
"""How many times the held-out error is computed."""
_CHOOSING, _REPORTING = 8, 16
"""The number of draws used to choose the best step, and of other draws used to report errors."""


@dataclass(frozen=True, eq=False)
class Refinement:
    """The result of `refine`.

    Attributes
    ----------
    parameters : Parameters
        The refined parameters, for `favorsharp.feature_map` or for `set_parameters` of a module.
    before, after : tensor, in the shape of the map's leading axes
        Relative error of the attention output on the held-out batch. Both are means over the same draws, which were not
        used before. `after` is at most `before`, because a head that did not improve keeps its parameters.
    history : tuple of (int, float, float)
        For some steps, the number of the step, the training error and the held-out error, averaged over heads.

    Examples
    --------
    >>> import torch, favorsharp as fs
    >>> from favorsharp.torch import refine
    >>> q, k, v = torch.randn(3, 2, 64, 8)
    >>> found = refine(fs.fit(q, k), (q, k, v), steps=5, num_features=16, rng=0)
    >>> found.before.shape, found.parameters.method
    (torch.Size([2]), 'optimal')
    """

    parameters: Parameters
    before: torch.Tensor
    after: torch.Tensor
    history: tuple[tuple[int, float, float], ...]

    def __repr__(self) -> str:
        before, after = float(self.before.mean()), float(self.after.mean())
        return f"Refinement(held-out error {before:.3g} -> {after:.3g}, parameters={self.parameters!r})"


def refine(
    parameters: Parameters,
    batches: Any,
    *,
    held_out: Any = None,
    num_features: int = 128,
    steps: int = 300,
    learning_rate: float = 0.05,
    draw: str = "orthogonal",
    rng: Any = None,
    is_causal: bool = False,
    window: int = 0,
    enable_gqa: bool = False,
) -> Refinement:
    """Improve fitted parameters by gradient descent on the error of the attention output.

    The transforms, `a` and the centers of every head are trained. Each step uses one batch and newly drawn random rows.
    The rows are never trained, so the result can be used with any draw and any number of features. The steps use
    coordinates in which g1^T g2 = I always holds, so the result is as unbiased as the start.

    Parameters
    ----------
    parameters : Parameters
        The start: parameters of a dense-exponential method, as tensors. Their leading axes broadcast to those of q and
        k. For one map per head, with q of shape (batch, heads, n, d), the arrays have shape (heads, ., .).
    batches : tuple of tensors, or a sequence of such
        (q, k, v) or (q, k, v, key_mask), with shapes as in `favorsharp.linear_attention`. The steps use them in turn.
    held_out : tuple of tensors, optional
        The batch that decides which step is the best. None means the last of several batches. A single batch is split:
        its first half of positions is trained on, and its second half is held out.
    num_features : int
        m in training and in the reported errors. The parameters can be used with any other number.
    steps : int
        The number of gradient steps.
    learning_rate : float
        The learning rate of Adam at the start; it falls to zero along a half cosine.
    draw : str
        As in `favorsharp.feature_map`.
    rng : None, int, SeedSequence or numpy Generator
        The source of all draws.
    is_causal, window, enable_gqa
        As in `favorsharp.linear_attention`.

    Returns
    -------
    Refinement

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Examples
    --------
    >>> import torch, favorsharp as fs
    >>> from favorsharp.torch import refine
    >>> q, k, v = torch.randn(3, 2, 64, 8)
    >>> found = refine(fs.fit(q, k), (q, k, v), steps=10, num_features=16, rng=0)
    >>> bool((found.after <= found.before).all())
    True
    """
    _check_parameters(parameters)
    steps = check_integer("steps", steps, 0)
    m = check_integer("num_features", num_features, 1)
    if not (isinstance(learning_rate, int | float) and learning_rate > 0):
        raise ValueError(f"learning_rate must be a positive number, got {learning_rate!r}")
    options = {"is_causal": is_causal, "window": window, "enable_gqa": enable_gqa}
    training, held = _split(_batches("batches", batches), held_out)
    start = astype(parameters, torch.promote_types(training[0][0].dtype, torch.float32))
    training_problems = [_Problem(batch, start, options) for batch in training]
    held_problem = _Problem(held, start, options)
    random = generator(rng)

    def rows() -> torch.Tensor:
        return torch.from_numpy(draw_rows(draw, m, start.size, random)).to(start.g1)

    best, history = _trained(start, training_problems, held_problem, rows, steps, learning_rate)
    reporting = [rows() for _ in range(_REPORTING)]
    before, after = held_problem.error(start, reporting), held_problem.error(best, reporting)
    best, after = _chosen(after < before, best, start), torch.minimum(before, after)
    return Refinement(astype(best, parameters.g1.dtype), before, after, history)


def _trained(
    start: Parameters,
    problems: "Sequence[_Problem]",
    held: "_Problem",
    rows: Callable[[], torch.Tensor],
    steps: int,
    learning_rate: float,
) -> tuple[Parameters, tuple[tuple[int, float, float], ...]]:
    """The parameters with the smallest held-out error of each head among all that were checked, and the history."""
    choosing = [rows() for _ in range(_CHOOSING)]
    steps_taken = _Steps(start)
    optimizer = torch.optim.Adam(steps_taken.leaves, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    best, best_error = start, held.error(start, choosing)
    history = []
    recent: list[float] = []
    for step in range(steps):
        with torch.enable_grad():
            loss = problems[step % len(problems)].squared_error(steps_taken.parameters(), rows())
            optimizer.zero_grad()
            loss.sum().backward()
        optimizer.step()
        schedule.step()
        steps_taken.project()
        recent.append(float(loss.detach().sqrt().mean()))
        if (step + 1) % max(1, steps // _CHECKS) == 0 or step + 1 == steps:
            found = steps_taken.final()
            error = held.error(found, choosing)
            history.append((step + 1, sum(recent) / len(recent), float(error.mean())))
            recent = []
            best, best_error = _chosen(error < best_error, found, best), torch.fmin(error, best_error)
    return best, tuple(history)


class _Steps:
    """The trained tensors: coordinates relative to the start, in which all constraints hold.

    g1 = exp(E) g1_0 and g2 = exp(-E^T) g2_0, so g1^T g2 does not change; 1 - 4a = exp(r) with r >= 0; and the centers
    move in the coordinates of u and v, in which all directions have similar scales.
    """

    def __init__(self, start: Parameters) -> None:
        self.start = start
        self.turn = torch.zeros_like(start.g1).requires_grad_()
        self.spread = torch.log1p(-4 * start.a).detach().clone().requires_grad_()
        self.move_x, self.move_y = (torch.zeros_like(start.center_x).requires_grad_() for _ in range(2))
        self.leaves = [self.turn, self.spread, self.move_x, self.move_y]

    def parameters(self) -> Parameters:
        p = self.start
        return replace(
            p,
            a=-0.25 * torch.expm1(self.spread),
            g1=torch.linalg.matrix_exp(self.turn) @ p.g1,
            g2=torch.linalg.matrix_exp(-self.turn.mT) @ p.g2,
            center_x=p.center_x + self.move_x @ p.g2,
            center_y=p.center_y + self.move_y @ p.g1,
        )

    @torch.no_grad()
    def project(self) -> None:
        """Keep a at 0 or below, where the second moment of a feature is finite."""
        self.spread.clamp_(min=0)

    @torch.no_grad()
    def final(self) -> Parameters:
        """The current parameters, with g1^T g2 = I to rounding as after a fit."""
        found = self.parameters()
        g1 = torch.linalg.matrix_exp(self.turn.double()) @ self.start.g1.double()
        return replace(found, g1=g1.to(found.g1.dtype), g2=torch.linalg.inv(g1).mT.to(found.g2.dtype))


class _Problem:
    """A batch and its exact attention; computes errors of maps, one for each leading index of the parameters."""

    def __init__(self, batch: tuple[torch.Tensor, ...], like: Parameters, options: dict[str, Any]) -> None:
        self.arrays, self.options = batch[:3], options
        self.key_mask = batch[3] if len(batch) > 3 else None
        q, k, _ = self.arrays
        exact = {name: value for name, value in options.items() if name != "window"}
        with torch.no_grad():
            out = softmax_attention(*self.arrays, key_mask=self.key_mask, scale=like.scale, **exact)
        self.exact = out.to(like.g1.dtype)
        self.batch = tuple(like.g1.shape[:-2])
        self.group = q.shape[-3] // k.shape[-3] if options["enable_gqa"] else 1
        counts = torch.ones_like(self.exact[..., 0], dtype=torch.bool)
        if self.key_mask is not None and q.shape[-2] == k.shape[-2]:  # queries at padding are ignored
            mask = self.key_mask
            if self.group > 1 and mask.ndim > 1 and mask.shape[-2] > 1:
                mask = mask.repeat_interleave(self.group, -2)
            counts = counts & mask
        self.counts = counts[..., None]
        self.size = self._sums(self.exact)
        if not bool((self.size > 0).all()):
            raise ValueError("a batch has a head without any visible query or output: its relative error is undefined")

    def squared_error(self, parameters: Parameters, rows: torch.Tensor) -> torch.Tensor:
        """The squared relative error for the given rows."""
        fm = feature_map(parameters, rows.shape[0], draw=rows)
        q, k, v = self.arrays
        out = linear_attention(q, k, v, fm, key_mask=self.key_mask, **self.options)
        return self._sums(out.to(self.exact.dtype) - self.exact) / self.size

    @torch.no_grad()
    def error(self, parameters: Parameters, draws: Sequence[torch.Tensor]) -> torch.Tensor:
        """The relative error, averaged over draws."""
        return torch.stack([self.squared_error(parameters, rows).sqrt() for rows in draws]).mean(dim=0)

    def _sums(self, x: torch.Tensor) -> torch.Tensor:
        """Sums of squares over all entries that share one map."""
        sums = torch.where(self.counts, x, 0.0).square().sum(dim=(-2, -1))
        if self.group > 1:
            sums = sums.unflatten(-1, (-1, self.group)).sum(dim=-1)
        return sums.sum_to_size(self.batch) if self.batch else sums.sum()


def _chosen(better: torch.Tensor, one: Parameters, other: Parameters) -> Parameters:
    """The arrays of `one` for the heads where it is better, and of `other` for the rest."""
    better = better[..., None, None]
    names = ("a", "g1", "g2", "center_x", "center_y")
    return replace(other, **{name: torch.where(better, getattr(one, name), getattr(other, name)) for name in names})


def _check_parameters(parameters: Any) -> None:
    if not isinstance(parameters, Parameters):
        raise TypeError(f"parameters must be favorsharp.Parameters (from fit), got {type(parameters).__name__}")
    if not method_of(parameters.method).takes_proposals:
        raise ValueError(f"refine takes parameters of {', '.join(TAKES_PROPOSALS)}, got {parameters.method_name!r}")
    if parameters.kernel != "softmax":
        raise ValueError(f"refine takes parameters of the softmax kernel, got {parameters.kernel!r}")
    if not isinstance(parameters.g1, torch.Tensor):
        raise TypeError(f"parameters must hold tensors, got {type(parameters.g1).__name__}: fit to tensors")


def _batches(name: str, value: Any) -> list[tuple[torch.Tensor, ...]]:
    """Convert one batch or several to a list of tuples of tensors."""
    if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
        value = [value]
    if not isinstance(value, Iterable):
        raise TypeError(
            f"{name} must be a tuple (q, k, v) or (q, k, v, key_mask) or several, got {type(value).__name__}"
        )
    found = [tuple(batch) for batch in value]
    for batch in found:
        if len(batch) not in (3, 4) or not all(isinstance(x, torch.Tensor) for x in batch):
            kinds = ", ".join(type(x).__name__ for x in batch)
            raise TypeError(f"{name} must hold tuples of tensors (q, k, v) or (q, k, v, key_mask), got ({kinds})")
        if any(is_traced(x) for x in batch):
            raise TypeError(f"{name} must hold tensors with numbers, got traced, meta or fake tensors")
    if not found:
        raise ValueError(f"{name} holds no batch; accepted: one or more")
    return found


def _split(
    batches: list[tuple[torch.Tensor, ...]], held_out: Any
) -> tuple[list[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    """The batches to train on, and the held-out batch."""
    batches = [tuple(x.detach() for x in batch) for batch in batches]
    if held_out is not None:
        return batches, tuple(x.detach() for x in _batches("held_out", held_out)[0])
    if len(batches) > 1:
        return batches[:-1], batches[-1]
    q, k, v, *mask = batches[0]
    n, s = q.shape[-2] // 2, k.shape[-2] // 2
    if n < 1 or s < 1:
        raise ValueError(f"a single batch is cut in half, and has n={q.shape[-2]}, s={k.shape[-2]}: pass held_out")
    first = (q[..., :n, :], k[..., :s, :], v[..., :s, :], *(x[..., :s] for x in mask))
    second = (q[..., n:, :], k[..., s:, :], v[..., s:, :], *(x[..., s:] for x in mask))
    return [first], second
