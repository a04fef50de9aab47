"""The options of each registered name, and the settings of a layer that follow from them."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from favorsharp.landmarks.settings import Landmarks
from favorsharp.methods import LANDMARKS, MethodLike
from favorsharp.transformers.models import label

Tensor = Any

EXACT = "exact"
"""The name of the method that computes softmax attention, for comparison."""

WITHOUT_MAPS = {EXACT: "is exact", LANDMARKS: "chooses landmarks anew in each call"}
"""The methods that have no feature map, and the reasons for error messages."""


@dataclass(frozen=True, eq=False)
class Registration:
    """The options of one registered name.

    Attributes
    ----------
    name : str
    method, num_features, window, draw, calibration
        As in `register`.
    seed : int
        The seed of every draw.
    landmarks : Landmarks or None
        The settings of the method "landmarks".
    room : int or None
    per, dropout : str
        As in `register`.
    """

    name: str
    method: MethodLike
    num_features: int
    window: int
    draw: Any
    seed: int
    calibration: str
    landmarks: Landmarks | None
    room: int | None = None
    per: str = "head"
    dropout: str = "ignore"

    def landmarks_for(self, module: Any, heads: int, scaling: float | None) -> Landmarks:
        """The settings of landmarks for each key head of a layer."""
        assert self.landmarks is not None
        shares = 1 if self.per == "head" else heads
        if self.per == "model":
            layers = getattr(getattr(module, "config", None), "num_hidden_layers", None)
            if not isinstance(layers, int):
                raise ValueError(
                    f"per='model' needs the number of layers, and the config of {label(module)} has no "
                    "num_hidden_layers; accepted: per='layer' or 'head'"
                )
            shares *= layers
        if self.num_features < shares:
            raise ValueError(
                f"num_features={self.num_features} for a whole {self.per} is less than one landmark for each of "
                f"{shares} heads of {label(module)}; accepted: {shares} or more"
            )
        m, scale = self.num_features // shares, None if scaling is None else float(scaling)
        return _settings(self.landmarks, m, m if self.room is None else self.room, scale)

    def draw_for(self, size: int, like: Tensor) -> Any:
        """The random rows for heads of this size, on the device of `like`; all layers use the same draw."""
        if not isinstance(self.draw, str):
            return self.draw
        return _rows(self.draw, self.num_features, size, self.seed, like.device)


@lru_cache(maxsize=256)
def _settings(settings: Landmarks, m: int, room: int, scale: float | None) -> Landmarks:
    return replace(settings, num_landmarks=m, room=room, scale=scale)


REGISTERED: dict[str, Registration] = {}
"""All registrations by name."""


@lru_cache(maxsize=64)
def _drawn(draw: str, num_rows: int, size: int, seed: int, device: torch.device) -> Tensor:
    from favorsharp.draws import draw_rows

    return torch.asarray(draw_rows(draw, num_rows, size, seed), device=device)


@torch.library.custom_op("favorsharp::transformers_rows", mutates_args=())
def _rows(draw: str, num_rows: int, size: int, seed: int, device: torch.device) -> torch.Tensor:
    """Random rows as a custom op of torch, so that torch.compile does not trace the code that draws them."""
    return _drawn(draw, num_rows, size, seed, device).clone()


@_rows.register_fake
def _(draw: str, num_rows: int, size: int, seed: int, device: torch.device) -> torch.Tensor:
    return torch.empty((num_rows, size), dtype=torch.float64, device=device)
