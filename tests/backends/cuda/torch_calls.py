"""What the tests of torch's side share: operators that run on the CPU, modes of calls, and states."""

import pytest
import torch

import favorsharp as fs
from favorsharp_cuda.torch import operators

RUN = {
    "attention": operators.attention,
    "attention_backward": operators.attention_backward_,
    "absorb": operators.absorb,
    "absorb_backward": operators.absorb_backward,
    "update": operators.update_,
    "read": operators.read_,
    "read_with_stats": operators.read_with_stats_,
    "read_backward": operators.read_backward_,
    "decode_step": operators.decode_step_,
    "kernel_matvec": operators.kernel_matvec_,
    "kernel_matvec_backward": operators.kernel_matvec_backward,
    "exponential_features": operators.exponential_features,
    "exponential_features_backward": operators.exponential_features_backward_,
}
OPS = {name: getattr(operators, f"{name}_op") for name in RUN}
for name, op in OPS.items():
    op.register_kernel("cpu")(RUN[name])  # the same functions, on the tensors that the shim can read

MODES = [(False, 0), (True, 4)]
"""is_causal and window."""
ALL_MODES = [*MODES, *(pytest.param(*mode, marks=pytest.mark.slow) for mode in ((True, 0), (False, 4)))]
NAMES = ("kv", "z", "c", "recent_k", "recent_v", "recent_mask")
STATES = ((0, 5), (4, 5), (2, 4))
"""A window, and how many keys came before: without, as none leaves, as two do."""


def leaves(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


def state_after(problem, window, before):
    _, k, v, mask, fm = problem
    state = fs.init_state(fm, 2, like=k, window=window)
    return fs.update(state, k[:, :before], v[:, :before], fm, key_mask=mask[:, :before])


def features_problem(dtype):
    """What `exponential_features` takes."""
    return tuple(torch.randn(shape, dtype=dtype) / 2 for shape in ((2, 5, 3), (1, 4, 3), (2, 5, 1), (1, 1, 4)))
