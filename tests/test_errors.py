"""A bad argument raises ValueError or TypeError before any work; the message names it and says what is accepted."""

from types import SimpleNamespace

import numpy as np
import pytest
from problems import attention_problem

import favorsharp as fs


@pytest.fixture
def given(xp):
    """Good arguments of one library; each test spoils one of them."""
    q, k, v = (xp(x) for x in attention_problem(0, (2, 4), n=6))
    p = fs.fit(q, k)
    fm = fs.feature_map(p, 8, rng=0)
    return SimpleNamespace(xp=xp, q=q, k=k, v=v, p=p, fm=fm, state=fs.init_state(fm, 5, like=k))


def attend(g, **changes):
    values = {"q": g.q, "k": g.k, "v": g.v, "fm": g.fm} | {
        n: changes.pop(n) for n in list(changes) if n in ("q", "k", "v", "fm")
    }
    return fs.linear_attention(values["q"], values["k"], values["v"], values["fm"], **changes)


CASES = {
    # dtypes
    "integer q": (lambda g: attend(g, q=g.xp(np.ones((2, 4, 6, 8)), "int64")), TypeError, r"q has dtype int64; accepted: float16"),
    "complex k": (lambda g: attend(g, k=g.xp(np.ones((2, 4, 6, 8)), "complex128")), TypeError, r"k has dtype complex128; accepted"),
    "boolean v": (lambda g: attend(g, v=g.xp(np.ones((2, 4, 6, 5)), "bool")), TypeError, r"v has dtype bool; accepted"),
    "a list": (lambda g: attend(g, q=[[1.0]]), TypeError, r"q must be an array .* got list"),
    "None": (lambda g: fs.softmax_attention(g.q, g.k, 3.0), TypeError, r"v must be an array .* got float"),
    # shapes
    "one axis": (lambda g: attend(g, q=g.q[0, 0, 0, :]), ValueError, r"q has shape \(8,\); accepted: \(\*b, n, d\)"),
    "d differs": (lambda g: attend(g, k=g.k[..., :7]), ValueError, r"q has d=8, k has d=7"),
    "s differs": (lambda g: attend(g, v=g.v[..., :5, :]), ValueError, r"k has s=6, v has s=5"),
    "batch differs": (lambda g: attend(g, k=g.k[:, :3, ...]), ValueError, r"leading axes \*b must broadcast .*k: \(2, 3\)"),
    "map of another size": (
        lambda g: attend(g, q=g.q[..., :4], k=g.k[..., :4]),
        ValueError,
        r"q has d=4, feature_map has d=8",
    ),
    "map of another batch": (
        lambda g: attend(g, fm=fs.feature_map(fs.fit(g.q[:, :3, ...], g.k[:, :3, ...]), 8, rng=0)),
        ValueError,
        r"leading axes .*feature_map: \(2, 3\)",
    ),
    "causal and unequal": (lambda g: attend(g, q=g.q[..., :3, :], is_causal=True), ValueError, r"is_causal .* n=3, k has s=6; .*state"),
    "window and unequal": (lambda g: attend(g, q=g.q[..., :3, :], window=2), ValueError, r"window needs .* n=3, k has s=6"),
    "no coordinates": (lambda g: fs.fit(g.q[..., :0], g.k[..., :0]), ValueError, r"x has shape \(2, 4, 6, 0\)"),
    # masks
    "float mask": (lambda g: attend(g, key_mask=g.xp(np.ones((2, 4, 6)))), TypeError, r"key_mask has dtype float64; accepted: bool"),
    "short mask": (lambda g: attend(g, key_mask=g.xp(np.ones((2, 4, 5)), "bool")), ValueError, r"key_mask has shape \(2, 4, 5\); accepted: \(\*b, s\)"),
    "mask of another batch": (lambda g: attend(g, key_mask=g.xp(np.ones((3, 6)), "bool")), ValueError, r"key_mask: \(3,\)"),
    "mask as a list": (lambda g: attend(g, key_mask=[True] * 6), TypeError, r"key_mask must be an array"),
    "float mask in a fit": (lambda g: fs.fit(g.q, g.k, mask_y=g.xp(np.ones(6))), TypeError, r"mask_y has dtype float64; accepted: bool"),
    # options
    "window below 0": (lambda g: attend(g, window=-1), ValueError, r"window must be an integer of 0 or more, got -1"),
    "window not whole": (lambda g: attend(g, window=2.5), TypeError, r"window must be an integer of 0 or more, got float"),
    "window a flag": (lambda g: attend(g, window=True), TypeError, r"window must be an integer"),
    "is_causal a mask": (lambda g: attend(g, is_causal=g.xp(np.ones(6), "bool")), TypeError, r"is_causal must be True or False"),
    "no features": (lambda g: fs.feature_map(g.p, 0), ValueError, r"num_features must be an integer of 1 or more, got 0"),
    "half a feature": (lambda g: fs.feature_map(g.p, 1.5), TypeError, r"num_features must be an integer of 1 or more"),
    "no features in one call": (lambda g: fs.attention(g.q, g.k, g.v, num_features=-3), ValueError, r"num_features .* got -3"),
    "unknown method": (lambda g: fs.fit(g.q, g.k, method="favor"), ValueError, r"method 'favor' is unknown; accepted: posrf, oprf.*callable"),
    "method not a name": (lambda g: fs.fit(g.q, g.k, method=3), TypeError, r"method must be one of posrf.*got int"),
    "unknown method in one call": (lambda g: fs.attention(g.q, g.k, g.v, method="x"), ValueError, r"method 'x' is unknown"),
    "unknown kernel": (lambda g: fs.fit(g.q, g.k, kernel="rbf"), ValueError, r"kernel 'rbf' is unknown; accepted: softmax, gaussian"),
    "unknown kernel in kernel_matrix": (lambda g: fs.kernel_matrix(g.q, g.k, kernel="rbf"), ValueError, r"kernel 'rbf' is unknown"),
    "unknown draw": (lambda g: fs.feature_map(g.p, 8, draw="qmc"), ValueError, r"draw 'qmc' is unknown; accepted: iid, orthogonal, simplex, sobol, antithetic"),
    "draw not a name": (lambda g: fs.feature_map(g.p, 8, draw=3), TypeError, r"draw must be a name, an \(m, d\) array"),
    "unknown backend": (lambda g: fs.use("triton").__enter__(), ValueError, r"triton.*reference"),
    "scale 0": (lambda g: fs.fit(g.q, g.k, scale=0), ValueError, r"scale must be a positive finite number, got 0"),
    "scale negative": (lambda g: fs.softmax_attention(g.q, g.k, g.v, scale=-1.0), ValueError, r"scale .* got -1"),
    "scale infinite": (lambda g: fs.attention(g.q, g.k, g.v, scale=float("inf")), ValueError, r"scale .* got inf"),
    "scale NaN": (lambda g: fs.kernel_matrix(g.q, g.k, scale=float("nan")), ValueError, r"scale .* got nan"),
    "scale a word": (lambda g: fs.fit(g.q, g.k, scale="auto"), TypeError, r"scale must be a positive finite number"),
    "ridge negative": (lambda g: fs.fit(g.q, g.k, ridge=-1e-3), ValueError, r"ridge must be .* got -0.001"),
    "rng a word": (lambda g: fs.feature_map(g.p, 8, rng="0"), TypeError, r"rng must be None, an int"),
    "rng negative": (lambda g: fs.feature_map(g.p, 8, rng=-1), ValueError, r"rng must be a non-negative int"),
    # projections
    "projection too short": (lambda g: fs.feature_map(g.p, 8, draw=g.xp(np.ones((7, 8)))), ValueError, r"draw has shape \(7, 8\); accepted: \(m, d\) = \(8, 8\)"),
    "projection turned": (lambda g: fs.feature_map(g.p, 4, draw=g.xp(np.ones((8, 4)))), ValueError, r"draw has shape \(8, 4\); accepted: \(m, d\) = \(4, 8\)"),
    "weights too few": (lambda g: fs.feature_map(g.p, 8, draw=(g.xp(np.ones((8, 8))), g.xp(np.ones(7)))), ValueError, r"log_weight.* has shape \(7,\)"),
    "proposal for relu": (
        lambda g: fs.feature_map(fs.fit(g.q, g.k, method="relu"), 8, draw=(g.xp(np.ones((8, 8))), g.xp(np.ones(8)))),
        ValueError,
        r"dense-exponential",
    ),
    # maps and states
    "signed map": (lambda g: attend(g, fm=fs.feature_map(fs.fit(g.q, g.k, method="trig"), 8, rng=0)), ValueError, r"feature_map of method 'trig' is signed: its denominators can vanish"),
    "signed method in one call": (lambda g: fs.attention(g.q, g.k, g.v, method="poisson", rng=0), ValueError, r"signed"),
    "parameters for a map": (lambda g: attend(g, fm=g.p), TypeError, r"feature_map must be a favorsharp.FeatureMap, got Parameters"),
    "arrays for parameters": (lambda g: fs.feature_map(g.q, 8), TypeError, r"parameters must be favorsharp.Parameters"),
    "a state from another map": (
        lambda g: attend(g, fm=fs.feature_map(g.p, 8, rng=1), state=g.state, is_causal=True),
        ValueError,
        r"state comes from another feature map",
    ),
    "a tuple for a state": (lambda g: attend(g, state=(1, 2)), TypeError, r"state must be a favorsharp.State, got tuple"),
    "a state of other values": (lambda g: attend(g, v=g.v[..., :3], state=g.state), ValueError, r"state has e=5, v has e=3"),
    "a state of another window": (lambda g: attend(g, state=g.state, window=2, is_causal=True), ValueError, r"window must be that of the state, 0, got 2"),
    "two tokens in a step": (lambda g: fs.decode_step(g.q, g.k, g.v, g.state, g.fm), ValueError, r"decode_step takes one token: q has n=6"),
    "combine of unlikes": (lambda g: fs.combine(g.state, fs.moments(g.q, g.k)), TypeError, r"combine takes two Moments or two States"),
    "combine of moments of other batches": (lambda g: fs.combine(fs.moments(g.q, g.k), fs.moments(g.q[:, :3, ...], g.k[:, :3, ...])), ValueError, r"leading axes .*a: \(2, 4\), b: \(2, 3\)"),
    "combine of arrays": (lambda g: fs.combine(g.q, g.q), TypeError, r"combine takes two Moments or two States"),
    # packed sequences
    "not from 0": (lambda g: attend(g, cu_seqlens=[1, 6]), ValueError, r"cu_seqlens must start at 0, end at n=6 and ascend, got \[1, 6\]"),
    "not to n": (lambda g: attend(g, cu_seqlens=[0, 5]), ValueError, r"cu_seqlens must start at 0, end at n=6"),
    "descending": (lambda g: attend(g, cu_seqlens=[0, 4, 2, 6]), ValueError, r"cu_seqlens must .* ascend"),
    "boundaries not whole": (lambda g: attend(g, cu_seqlens=g.xp(np.array([0.0, 6.0]))), TypeError, r"cu_seqlens must hold integers, got dtype float64"),
    "boundaries in two axes": (lambda g: attend(g, cu_seqlens=g.xp(np.array([[0, 6]]), "int64")), ValueError, r"cu_seqlens must have one axis"),
    # grouped heads
    "heads do not divide": (lambda g: attend(g, k=g.k[:, :3, ...], v=g.v[:, :3, ...], enable_gqa=True), ValueError, r"q has 4 heads, k has 3"),
    "no head axis": (lambda g: attend(g, q=g.q[0, 0, ...], k=g.k[0, 0, ...], v=g.v[0, 0, ...], enable_gqa=True), ValueError, r"enable_gqa needs a head axis"),
    # causal calls
    "causal fit": (lambda g: fs.attention(g.q, g.k, g.v, is_causal=True), ValueError, r"calibration=\(q0, k0\)"),
    "calibration not a pair": (lambda g: fs.attention(g.q, g.k, g.v, calibration=g.q), TypeError, r"calibration must be a pair"),
    # fits
    "NaN in a fit": (lambda g: fs.fit(g.q * float("nan"), g.k), ValueError, r"x holds values that are not finite"),
    "infinity in a fit": (lambda g: fs.fit(g.q, g.k + float("inf")), ValueError, r"y holds values that are not finite"),
    "NaN in one call": (lambda g: fs.attention(g.q, g.k * float("nan"), g.v), ValueError, r"k holds values that are not finite"),
    "keys missing": (lambda g: fs.fit(g.q), TypeError, r"y is missing"),
    "moments and keys": (lambda g: fs.fit(fs.moments(g.q, g.k), g.k), TypeError, r"fit\(moments\) takes no y"),
    "moments and a mask": (lambda g: fs.fit(fs.moments(g.q, g.k), mask_x=g.q), TypeError, r"fit\(moments\) takes no mask_x"),
    "excess of relu": (lambda g: fs.excess(fs.fit(g.q, g.k, method="relu"), g.q, g.k), ValueError, r"excess is known .* got method 'relu'"),
    "second moment of elu": (lambda g: fs.log_second_moment(fs.fit(g.q, g.k, method="elu"), g.q, g.k), ValueError, r"'elu' does not estimate"),
    # regression
    "values too few": (lambda g: fs.kernel_matvec(g.q, g.k, g.v[..., :2, :], g.fm), ValueError, r"y has s=6, v has s=2"),
    "regression without a map": (lambda g: fs.nadaraya_watson(g.q, g.k, g.v, "optimal"), TypeError, r"feature_map must be a favorsharp.FeatureMap"),
    # out
    "out of another shape": (lambda g: attend(g, out=g.v[..., :3] * 1), (ValueError, TypeError), r"out "),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", CASES)
def test_refused_with_a_reason(given, name):
    call, kind, message = CASES[name]
    with pytest.raises(kind, match=message) as caught:
        call(given)
    assert isinstance(caught.value, TypeError | ValueError)


def test_libraries_are_not_mixed(xp):
    import array_api_strict
    import torch

    q, k, v = attention_problem(1)
    other = torch.asarray(q) if xp.name != "torch" else array_api_strict.asarray(q)
    fm = fs.feature_map(fs.fit(xp(q), xp(k)), 8, rng=0)
    for call in (
        lambda: fs.linear_attention(other, xp(k), xp(v), fm),
        lambda: fs.attention(xp(q), other, xp(v)),
        lambda: fs.fit(xp(q), other),
        lambda: fm.query(other),
        lambda: fs.kernel_matrix(xp(q), other),
        lambda: fs.excess(fm.parameters, other, other),
        lambda: fs.linear_attention(xp(q), xp(k), xp(v), fm, key_mask=other[..., 0] > 0),
        lambda: fs.fit(xp(q), xp(k), mask_y=other[..., 0] > 0),
    ):
        with pytest.raises(TypeError, match=r"all arrays must come from one library, got .*(torch|array_api_strict)"):
            call()


def test_devices_are_not_mixed():
    strict = pytest.importorskip("array_api_strict")
    q, k, v = (strict.asarray(x) for x in attention_problem(2))
    elsewhere = strict.asarray(attention_problem(2)[1], device=strict.Device("device1"))
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    for call in (
        lambda: fs.linear_attention(q, elsewhere, v, fm),
        lambda: fs.fit(q, elsewhere),
        lambda: fm.key(elsewhere),
        lambda: fs.update(fs.init_state(fm, 5, like=k), elsewhere, v, fm),
        lambda: fs.softmax_attention(q, k, v, key_mask=elsewhere[..., 0] > 0),
    ):
        with pytest.raises(ValueError, match="all arrays must be on one device, got .*device1"):
            call()


def test_arrays_that_mean_something_else():
    q, k, v = attention_problem(3)
    with pytest.raises(TypeError, match="q has dtype object"):
        fs.softmax_attention(q.astype(object), k, v)
    with pytest.raises(TypeError, match="k must be a plain array, got numpy.ma.*MaskedArray"):
        fs.softmax_attention(q, np.ma.masked_array(k), v)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with pytest.raises(TypeError, match="v has dtype bfloat16"):
        fs.softmax_attention(q, k, v.astype(ml_dtypes.bfloat16))


def test_states_of_other_batches_are_not_combined(xp):
    q, k = (xp(x) for x in attention_problem(5, (2,), n=6)[:2])
    one_map = fs.feature_map(fs.fit(q, k, axis=(0, -2)), 8, rng=0)
    two, three = (fs.init_state(one_map, 5, like=xp(np.ones((b, 6, 8)))) for b in (2, 3))
    with pytest.raises(ValueError, match=r"leading axes .*a: \(2,\), b: \(3,\)"):
        fs.combine(two, three)


def test_out_must_be_writable():
    q, k, v = attention_problem(4)
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    out = np.zeros_like(v)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out must be an array that can be written to"):
        fs.linear_attention(q, k, v, fm, out=out)
    jnp = pytest.importorskip("jax.numpy")
    arrays = [jnp.asarray(x) for x in (q, k, v)]
    with pytest.raises(TypeError, match="JAX arrays cannot"):
        fs.linear_attention(*arrays, fs.feature_map(fs.fit(*arrays[:2]), 8, rng=0), out=arrays[2])
