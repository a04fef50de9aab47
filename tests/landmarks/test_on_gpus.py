"""Landmarks on GPUs: a call neither reads a number back nor copies one from the host, because the host would have to
wait.

Tensors on torch's device `meta` stand for those on a GPU. They have no numbers, so reading one raises an error.
"""

import sys

import numpy as np
import pytest

import favorsharp as fs
from favorsharp import _arrays
from favorsharp.ops import landmark_seeds

torch = pytest.importorskip("torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

pytestmark = pytest.mark.own_backend

N, M = 48, 8


class Waits(TorchDispatchMode):
    """Collects the names of operations for which the host waits for a GPU, and counts all operations."""

    def __init__(self):
        super().__init__()
        self.found, self.count = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        self.count += 1
        devices = {x.device.type for x in args if isinstance(x, torch.Tensor) and x.ndim}
        moved = str(kwargs.get("device", "meta")) != "meta" or (name != "lift_fresh" and "cpu" in devices)
        if moved or name in ("_linalg_check_errors", "nonzero", "masked_select", "equal", "_unique2"):
            self.found.append(name)
        return function(*args, **kwargs)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Make tensors without numbers, and operations that a mode counts, take the code path of tensors on a GPU."""
    for name, module in list(sys.modules.items()):
        if name.startswith("favorsharp."):
            for question in ("is_traced", "is_followed"):
                if hasattr(module, question):
                    monkeypatch.setattr(module, question, lambda x: False)


def tensors(heads=4, n=N):
    shapes = (2, 4, n, 16), (2, heads, n, 16), (2, heads, n, 12)
    return [torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in shapes]


def waits(call):
    """The operations for which the host waits in a second call; the first call copies random numbers."""
    call()
    with Waits() as found:
        call()
    assert found.count
    return found.found


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize(("heads", "steps"), [(4, 3), (2, 0)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_whole_calls_and_causal_ones_wait_for_nothing(as_on_a_gpu, is_causal, heads, steps, window):
    q, k, v = tensors(heads)
    mask = torch.empty((2, 1, N), device="meta", dtype=torch.bool) if steps else None
    options = {"is_causal": is_causal, "window": window, "key_mask": mask, "enable_gqa": heads < 4}
    options["return_state"] = is_causal
    assert waits(lambda: fs.linear_attention(q, k, v, fs.landmarks(M, steps=steps), **options)) == []


@pytest.mark.parametrize("window", [0, 8])
def test_states_wait_for_nothing(as_on_a_gpu, window):
    q, k, v = tensors()
    lm = fs.landmarks(M, room=4)

    def stream():
        state = fs.update(fs.init_state(lm, 12, like=k, window=window), k, v, lm)
        for i in range(2 * M):
            _, state = fs.decode_step(*(x[:, :, i : i + 1] for x in (q, k, v)), state, lm)
        return fs.read(state, q, lm)

    assert waits(stream) == []


def test_attention_by_name_and_smoothing_wait_for_nothing(as_on_a_gpu):
    q, k, v = tensors()
    assert waits(lambda: fs.attention(q, k, v, num_features=8, method="landmarks")) == []
    assert waits(lambda: fs.nadaraya_watson(q, k, v, fs.landmarks(M, kernel="gaussian"))) == []


def test_what_waits_is_seen(as_on_a_gpu):
    x = torch.empty((3, 3), device="meta")
    assert waits(lambda: torch.linalg.cholesky(x)) == ["_linalg_check_errors"]
    assert waits(lambda: torch.asarray([[1.0]]).to("meta")) == ["_to_copy"]
    with pytest.raises((RuntimeError, NotImplementedError)):
        waits(lambda: float(x[0, 0]))


def test_numbers_are_those_of_a_cpu(monkeypatch):
    """This includes the code for GPUs only: factors that are not checked, long tiles, and random numbers that are
    kept."""
    q, k, v = torch.randn((3, 2, 300, 16), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def results():
        lm = fs.landmarks(M)
        out, state = fs.linear_attention(q, k, v, lm, is_causal=True, return_state=True)
        gaussian = fs.landmarks(M, kernel="gaussian", scale=0.05)
        return fs.linear_attention(q, k, v, lm), out, state.keys, fs.nadaraya_watson(q, k, v, gaussian)

    with fs.use("reference"):
        want = results()
        for name, module in list(sys.modules.items()):
            if name.startswith("favorsharp.") and hasattr(module, "is_on_gpu"):
                monkeypatch.setattr(module, "is_on_gpu", lambda x: True)
        got = results()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_each_stream_has_random_numbers_of_its_own(monkeypatch):
    """A copy that another stream has begun may not be there yet."""
    noise, copies = landmark_seeds.noise_of(0, 0, M, 3), []
    monkeypatch.setattr(landmark_seeds, "is_on_gpu", lambda x: True)
    for stream in (1, 2, 1):
        monkeypatch.setattr(landmark_seeds, "stream_label", lambda x, stream=stream: stream)
        copies.append(noise.beside(np.zeros(1), "offsets", np.float64, M))
    assert copies[0] is copies[2]
    assert copies[0] is not copies[1]


def test_a_matrix_without_a_factor_gives_nan(monkeypatch):
    monkeypatch.setattr(_arrays, "is_on_gpu", lambda x: True)
    pair = torch.stack([torch.eye(2), -torch.eye(2)])
    assert torch.isfinite(_arrays.cholesky(pair)[0]).all()
    assert _arrays.cholesky(pair)[1].isnan().all()
