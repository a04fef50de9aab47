"""Finds out why buffers hold no feature map: memory that was not filled, or averages of different maps.

`MapBuffers` calls this module when its buffers have changed.
"""

import math

import torch
from torch.nn import functional

from favorsharp._arrays import statistics_dtype
from favorsharp._autodiff import is_traced_by_mode
from favorsharp.methods import DENSE_EXPONENTIAL
from favorsharp.parameters import Parameters

ROUNDING = 1e-3
"""How far g1^T g2 may be from I, relative to |g1|^T |g2|; averaging a map with itself in float32 gives up to 6e-4."""
ANGLE = 5e-3
"""The largest cosine of two rows that count as orthogonal; rounding rows to bfloat16 gives smaller cosines."""


def check_values(parameters: Parameters, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
    """Raise an error if parameters do not have these shapes by name, if they are elsewhere, or if g1^T g2 is not I."""
    for name, shape in shapes.items():
        value = getattr(parameters, name)
        if tuple(value.shape) != shape:
            raise ValueError(f"parameters.{name} has shape {tuple(value.shape)}; accepted: {shape}")
        if value.device != device:
            raise ValueError(f"parameters.{name} is on {value.device}; accepted: the device of the module, {device}")
    if parameters.method in DENSE_EXPONENTIAL and are_readable(parameters.g1, parameters.g2):
        distance = float(distance_from_inverse(parameters.g1, parameters.g2))
        if not distance < ROUNDING:
            raise ValueError(f"parameters.g1^T parameters.g2 differs from I by {distance:.2g}; accepted: rounding")


def fault_of_rows(name: str, projection: torch.Tensor, draw: str | None, orthogonal: bool) -> str | None:
    """Why random rows cannot be used by the module class `name`, or None. Rows of the caller (no draw) may be any."""
    rows = projection.to(statistics_dtype(projection))
    square, cosine = torch.stack([rows.square().mean(), largest_cosine(rows)]).tolist()
    if not math.isfinite(square):
        return (
            f"{name} has no random rows: its memory was not filled (to_empty, or a load without that key); call "
            "reset_parameters() or redraw(), or load a state dict"
        )
    if draw is None or (may_be_normal(square, rows.numel()) and (cosine < ANGLE or not orthogonal)):
        return None
    return (
        f"the rows of {name} are not those of any draw {draw!r} (mean square {square:.3g}, largest cosine "
        f"{cosine:.3g}): they are averages of different rows, or memory that was not filled. Average only copies that "
        "share their rows, or leave buffers out of averages; call redraw() or load a state dict"
    )


def numbers_of_parameters(values: list[torch.Tensor]) -> tuple[float, float, float]:
    """Of a, g1, g2, center_x, center_y: whether all are NaN, whether all are finite, and how far g1^T g2 is from I."""
    distance = distance_from_inverse(values[1], values[2])
    flags = [torch.stack([test(x).all() for x in values]).all() for test in (torch.isnan, torch.isfinite)]
    blank, finite, distance = torch.stack([*(x.to(distance) for x in flags), distance]).tolist()
    return blank, finite, distance


def fault_of_mixed_parameters(name: str, distance: float) -> str:
    """What is wrong with parameters in which g1^T g2 differs from I."""
    return (
        f"the parameters of {name} are not those of one fit (g1^T g2 differs from I by {distance:.2g}): they are "
        "averages of different calibrations, were rounded to half precision, or their memory was not filled. Average "
        "only copies that share one calibration, or leave buffers out of averages; call calibrate(q, k) or load a "
        "state dict"
    )


def is_subclass(x: torch.Tensor) -> bool:
    """Whether x is a tensor subclass with operations of its own, such as a fake tensor."""
    return type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def are_readable(*arrays: torch.Tensor) -> bool:
    """Whether the numbers of the tensors can be read here."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return not (is_traced_by_mode() or any(x.is_meta or is_subclass(x) or wrapped(x) for x in arrays))


def largest_cosine(rows: torch.Tensor) -> torch.Tensor:
    """The largest absolute cosine of two rows within a block of d rows."""
    m, d = rows.shape
    blocks = functional.pad(rows, (0, 0, 0, -m % d)).reshape(-1, d, d)
    units = functional.normalize(blocks, dim=-1)
    return (units @ units.mT).abs().triu(1).amax()


def may_be_normal(square: float, count: int) -> bool:
    """Whether count / 2 independent normal numbers have this mean square with a probability above 1e-13.

    The count is halved, because rows may come in pairs w and -w. The bound is Chernoff's.
    """
    return square > 0 and 0.25 * count * (square - 1 - math.log(square)) < 30


def distance_from_inverse(g1: torch.Tensor, g2: torch.Tensor) -> torch.Tensor:
    """The largest absolute entry of g1^T g2 - I; each entry is divided by that of |g1|^T |g2| if this is above 1."""
    identity = torch.eye(g1.shape[-1], dtype=g1.dtype, device=g1.device)
    return ((g1.mT @ g2 - identity).abs() / (g1.abs().mT @ g2.abs()).clamp(min=1)).amax()
