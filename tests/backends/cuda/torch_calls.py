"""What the tests with torch share: operators that run on the CPU, ways to call them, and states."""

import pytest
import torch

import favorsharp as fs
from favorsharp.backend import arrays_of
from favorsharp_cuda.torch import operators

OPERATORS = (
    operators.ATTENTION,
    operators.ABSORB,
    operators.READ,
    operators.UPDATE,
    operators.DECODE_STEP,
    operators.KERNEL_MATVEC,
    operators.EXPONENTIAL_FEATURES,
)
for operator in OPERATORS:  # the same functions, on the tensors that the shim can read
    operator.op.register_kernel("cpu")(operator.run)
    if operator.backward is not None:
        operator.backward_op.register_kernel("cpu")(operator.run_backward)

MODES = [(False, 0), (True, 4)]
"""is_causal and window."""
ALL_MODES = [*MODES, *(pytest.param(*mode, marks=pytest.mark.slow) for mode in ((True, 0), (False, 4)))]
NAMES = ("kv", "z", "c", "recent_k", "recent_v", "recent_mask")
STATES = ((0, 5), (4, 5), (2, 4))
"""A window, and how many keys came before: without, as none leaves, as two do."""


def arguments(operator, fm, *tensors, **options):
    """The arguments of the custom operator."""
    of_map = arrays_of(fm) if operator.with_map else ()
    return operator.arguments(operator.numbers(fm, options), (*tensors, *of_map))


def leaves(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


def state_after(problem, window, before):
    _, k, v, mask, fm = problem
    state = fs.init_state(fm, 2, like=k, window=window)
    return fs.update(state, k[:, :before], v[:, :before], fm, key_mask=mask[:, :before])


def features_problem(dtype):
    """The arguments of `exponential_features`."""
    return tuple(torch.randn(shape, dtype=dtype) / 2 for shape in ((2, 5, 3), (1, 4, 3), (2, 5, 1), (1, 1, 4)))
