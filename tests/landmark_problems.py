"""What the tests of landmarks share: problems, exact attention, and comparisons."""

import numpy as np
import oracle
from problems import attention_problem

from favorsharp.landmarks.state import landmark_map, log_weights, moments_of

KERNELS = ["softmax", "gaussian"]


def exact(q, k, v, kernel="softmax", mask=None, is_causal=False, scale=None):
    scale = (q.shape[-1] ** -0.5 if kernel == "softmax" else 1.0) if scale is None else scale
    return oracle.attention(oracle.log_kernel(q, k, kernel, scale), v, mask, is_causal)


def chosen_by(q, k, lm, mask=None):
    return landmark_map(k, log_weights(k, mask, k.dtype), moments_of(q, k, mask), lm)


def used_points(xp, chosen):
    return xp.back(chosen.points)[xp.back(chosen.used)[..., 0, :]]


def relative(a, b):
    return np.linalg.norm(a - b, axis=(-2, -1)) / np.linalg.norm(b, axis=(-2, -1))


WINDOWS = [0, 1, 5, 64]


def stream_problem(xp, n=60, batch=(2,), **kwargs):
    return [xp(x) for x in attention_problem(10, batch, n=n, **kwargs)]


def part(arrays, start, stop):
    return [x[..., start:stop, :] for x in arrays]


def assert_states(xp, a, b):
    assert (a.num_seen, a.window, a.settings) == (b.num_seen, b.window, b.settings)
    for name in ("keys", "log_weight", "values"):
        np.testing.assert_allclose(*(xp.back(getattr(s, name)) for s in (a, b)), rtol=1e-8, atol=1e-9, err_msg=name)
    for name in ("count_x", "mean_x", "covariance_x", "count_y", "mean_y", "covariance_y"):
        np.testing.assert_allclose(*(xp.back(getattr(s.moments, name)) for s in (a, b)), rtol=1e-8, atol=1e-9)
