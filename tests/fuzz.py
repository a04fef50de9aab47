"""Random calls of the public functions with one or two spoiled arguments: `python tests/fuzz.py SEED CALLS`.

test_trust.py runs it in a separate process, under a time limit. It stops with a report after a crash, a hang, an
exception that does not refuse an argument, or a result whose shape or dtype is not the promised one.
"""

import faulthandler
import os
import sys
import traceback
import warnings

import numpy as np

import favorsharp as fs

N, S, D, E, M = 6, 7, 3, 2, 8
ANSWERS = (TypeError, ValueError, MemoryError, OverflowError)
"""Exceptions that a bad argument may raise; the last two if a number of features does not fit into memory."""


def arrays(rng):
    """Arrays that no argument accepts, and acceptable arrays in an unusual form."""
    x = rng.standard_normal((S, D))
    odd = [
        np.float64(2.0), np.array(1.0), np.zeros(0), np.zeros(D), np.zeros((0, D)), np.zeros((S, 0)), np.zeros((1, D)),
        np.zeros((2, S, D)), np.zeros((5, 1, 1, S, D)), np.zeros((S + 1, D)), np.zeros((S, D + 1)),
        x.astype(np.int32), x.astype(bool), x.astype(complex), x.astype(object), x.astype("U8"), x.astype(">f8"),
        x.astype(np.longdouble), x.astype(np.float16), x.astype(np.float32), np.asfortranarray(x), x[::-1, ::-1],
        np.broadcast_to(x[:1], (S, D)), np.ma.masked_less(x, 0), np.zeros((S, D), "M8[s]"), np.rec.array(x),
        np.full((S, D), np.nan), np.full((S, D), np.inf), np.full((S, D), 1e300), np.full((S, D), 1e-320), 1e4 * x,
        np.where(rng.random((S, D)) < 0.2, np.nan, x), np.ones(S, bool), np.zeros((S,), bool), np.array([0, 3, S]),
        np.array([0, 9, 2, S]), np.array([-1, S]), np.array([], int),
    ]  # fmt: skip
    if "torch" in sys.modules:
        import torch

        odd += [
            torch.zeros((S, D)), torch.zeros((S, D), requires_grad=True), torch.zeros((S, D), device="meta"),
            torch.eye(S).to_sparse(), torch.zeros((S, D), dtype=torch.bfloat16),
        ]  # fmt: skip
    return odd


PLAIN = [
    None, True, False, -1, 0, 1, 2, 3, M, 2**40, -(2**63), 1.5, 0.0, -0.5, float("nan"), float("inf"), 1j, np.int64(4),
    np.float32(0.5), "optimal", "trig", "relu", "", "gaussian", "softmax", "sobol", b"iid", "nothing of the kind", [],
    (), {}, [1.0], [[1.0]], (1, -2), (-2, -2), -2, object(), len, np.abs, range(3), slice(None),
    np.random.default_rng(0),
]  # fmt: skip


def problem(rng):
    """Valid arguments by name; each case takes those that it names."""
    dtype = rng.choice(["float32", "float64", "float16"])
    batch = [(), (2,), (2, 4)][rng.integers(3)]
    q, k, v = (rng.standard_normal((*batch, *shape)).astype(dtype) for shape in ((N, D), (S, D), (S, E)))
    method = str(rng.choice(["optimal", "posrf", "sderf", "relu", "trig", "poisson", "hyperbolic"]))
    p = fs.fit(q, k, method=method)
    fm = fs.feature_map(p, M, rng=0)
    optimal = fs.feature_map(fs.fit(q, k), M, rng=0)
    positive = fm if fm.positive else optimal
    state = fs.init_state(positive, E, like=k, window=int(rng.integers(3)))
    return {"q": q, "k": k, "v": v, "x": q, "y": k, "p": p, "fm": fm, "pm": positive, "om": optimal,
            "state": state,
            "mask": rng.random((*batch, S)) < 0.7, "moments": fs.moments(q, k)}  # fmt: skip


def cases(g):
    """For each name: a function, valid positional arguments, valid options, and the promised shape or None."""
    batch = g["q"].shape[:-2]
    out, square = (*batch, N, E), (*batch, S, E)
    fit = {"method": "optimal", "kernel": "gaussian", "scale": 0.5, "ridge": 1e-3, "axis": -2}
    lin = {"key_mask": g["mask"], "is_causal": False, "window": 0, "enable_gqa": False, "return_state": False}
    return {
        "moments": (fs.moments, [g["x"], g["y"]], {"axis": -2, "mask_y": g["mask"], "enable_gqa": False}, None),
        "fit": (fs.fit, [g["x"], g["y"]], fit, None),
        "fit_moments": (fs.fit, [g["moments"]], {"method": "aderf", "scale": 1.0}, None),
        "excess": (fs.excess, [g["om"].parameters, g["x"], g["y"]], {}, None),
        "log_second_moment": (fs.log_second_moment, [g["om"].parameters, g["x"], g["y"]], {}, None),
        "feature_map": (fs.feature_map, [g["p"], M], {"draw": "simplex", "rng": 3}, None),
        "query": (g["fm"].query, [g["x"]], {}, (*batch, N, M)),
        "log_key": (g["pm"].log_key, [g["y"]], {}, (*batch, S, M)),
        "attention": (fs.attention, [g["q"], g["k"], g["v"]],
                      {"num_features": M, "method": "sderf", "draw": "iid", "rng": 0, "key_mask": g["mask"],
                       "window": 0, "is_causal": False, "scale": 0.3}, out),
        "calibrated": (fs.attention, [g["k"], g["k"], g["v"]],
                       {"num_features": M, "is_causal": True, "window": 2, "calibration": (g["k"], g["k"])}, square),
        "linear_attention": (fs.linear_attention, [g["q"], g["k"], g["v"], g["pm"]], lin, out),
        "causal": (fs.linear_attention, [g["k"], g["k"], g["v"], g["pm"]], {"is_causal": True, "window": 3}, square),
        "packed": (fs.linear_attention, [g["k"], g["k"], g["v"], g["pm"]], {"cu_seqlens": np.array([0, 3, S])}, square),
        "softmax_attention": (fs.softmax_attention, [g["q"], g["k"], g["v"]],
                              {"scale": 0.4, "key_mask": g["mask"], "is_causal": False, "enable_gqa": False}, out),
        "init_state": (fs.init_state, [g["pm"], E], {"like": g["k"], "window": 2}, None),
        "update": (fs.update, [g["state"], g["k"], g["v"], g["pm"]], {"key_mask": g["mask"]}, None),
        "read": (fs.read, [g["state"], g["q"], g["pm"]], {}, None),
        "decode_step": (fs.decode_step, [g["q"][..., :1, :], g["k"][..., :1, :], g["v"][..., :1, :], g["state"],
                                         g["pm"]], {}, None),
        "combine": (fs.combine, [g["moments"], g["moments"]], {}, None),
        "kernel_matvec": (fs.kernel_matvec, [g["x"], g["y"], g["v"], g["fm"]], {}, out),
        "nadaraya_watson": (fs.nadaraya_watson, [g["x"], g["y"], g["v"], g["fm"]], {}, out),
        "leave_one_out": (fs.leave_one_out, [g["y"], g["v"], g["fm"]], {}, square),
        "kernel_matrix": (fs.kernel_matrix, [g["x"], g["y"]], {"kernel": "gaussian", "scale": 0.5}, (*batch, N, S)),
        "suggest": (fs.suggest, [g["x"], g["y"], g["v"]], {"target_error": 0.3, "kernel": "gaussian", "scale": 0.5},
                    None),
        "vjp": (lambda *a, **b: fs.vjp(fs.linear_attention, *a, **b)[0], [g["q"], g["k"], g["v"], g["om"]],
                {"key_mask": g["mask"]}, out),
        "explain": (fs.explain, ["attention"], {"like": g["q"]}, None),
    }  # fmt: skip


def described(value):
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__}{tuple(shape)} {value.dtype}" if shape is not None else repr(value)[:60]


def main(seed: int, calls: int) -> int:
    faulthandler.enable()
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(seed)
    odd = [*PLAIN, *arrays(rng)]
    answered = returned = 0
    for call in range(calls):
        if call % 16 == 0:
            g = problem(rng)
            table = cases(g)
            if os.environ.get("FAVORSHARP_BACKEND") == "reference":
                del table["vjp"]  # only kernels have gradients of NumPy's arrays
            values = [*odd, g["p"], g["fm"], g["state"], g["moments"], g["q"], g["v"]]
        name = list(table)[rng.integers(len(table))]
        function, positional, options, shape = table[name]
        positional, options = list(positional), dict(options)
        slots = [*range(len(positional)), *options]
        spoiled = {}
        for _ in range(rng.integers(3)):
            slot, value = slots[rng.integers(len(slots))], values[rng.integers(len(values))]
            (positional if isinstance(slot, int) else options)[slot] = value
            spoiled[slot] = described(value)
        try:
            with np.errstate(all="ignore"):
                result = function(*positional, **options)
        except ANSWERS as error:
            answered += 1
            if not spoiled or not str(error):
                print(f"call {call}: {name} {spoiled}: refused what is good, or without a word: {error!r}")
                return 1
            continue
        except Exception:
            print(f"call {call}: {name} {spoiled}")
            traceback.print_exc(file=sys.stdout)
            return 1
        returned += 1
        if shape is not None and not spoiled and (tuple(result.shape) != shape or result.dtype != g["q"].dtype):
            print(f"call {call}: {name}: {described(result)} where {shape} {g['q'].dtype} was promised")
            return 1
        if shape is not None and spoiled and hasattr(result, "shape"):
            wanted = promised(name, positional)
            if wanted is not None and tuple(result.shape) != wanted:
                print(f"call {call}: {name} {spoiled}: {described(result)} where {wanted} was promised")
                return 1
    print(f"{calls} calls: {answered} refused, {returned} served")
    return 0


def promised(name, positional):
    """The promised shape of the result for these arguments, if the function takes three arrays; else None."""
    if name not in ("attention", "linear_attention", "softmax_attention", "kernel_matvec", "nadaraya_watson", "vjp"):
        return None
    q, k, v = (tuple(x.shape) for x in positional[:3])
    batch = np.broadcast_shapes(q[:-2], k[:-2], v[:-2] if len(v) > 1 else ())
    if len(positional) > 3:
        batch = np.broadcast_shapes(batch, positional[3].batch_shape)
    return (*batch, q[-2], v[-1]) if len(v) > 1 else (*batch, q[-2])


if __name__ == "__main__":
    if "--torch" in sys.argv:
        import torch  # noqa: F401
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
