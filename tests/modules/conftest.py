"""What the tests of torch modules share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # torch_samples.py

if sys.modules.get("torch") is None:
    pytest.importorskip("torch")
import torch
from torch_samples import sample

from favorsharp.torch import LinearAttention


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def attention():
    q, k, _ = sample(2, 4, 50, 8)
    return LinearAttention(8, 4, num_features=16, rng=0).calibrate(q, k)
