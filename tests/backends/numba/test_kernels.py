"""The kernels against the references, op by op; and what concerns kernels only: memory layouts, tops and totals."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from problems import attention_problem, key_mask

import favorsharp as fs
from favorsharp._values import astype, map_arrays
from favorsharp.dispatch import watch
from favorsharp.ops.exponential_features import exponential_features
from favorsharp.testing import check_backend

pytestmark = [pytest.mark.own_backend, pytest.mark.kernels]
pytest.importorskip("numba")

OPS = ["exponential_features", "attention", "causal_attention", "update", "read", "decode_step", "kernel_matvec"]
OPS += ["choose_landmarks", "condense", "point_moments", "weighted_attention", "landmark_stream"]
OPS += ["landmark_window", "landmark_keys"]


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("op", OPS)
def test_every_case_of_every_op_equals_the_reference(op, library):
    if library == "torch":
        pytest.importorskip("torch")
    dtypes = {row.dtype for row in check_backend("numba", ops=[op], libraries=[library])}
    assert {"float16", "float32", "float64"} <= dtypes


def test_numpy_and_torch_run_it_without_being_told():
    torch = pytest.importorskip("torch")
    q, k, v = attention_problem(0)
    for to in (np.asarray, torch.asarray):
        fm = fs.feature_map(fs.fit(to(q), to(k)), 16, rng=0)
        with watch() as calls:
            fs.linear_attention(to(q), to(k), to(v), fm)
            fs.linear_attention(to(q), to(k), to(v), fm, is_causal=True)
        assert calls == [("attention", "numba"), ("causal_attention", "numba")]


def both(q, k, v, feature_map, **options):
    with fs.use("numba"):
        got = fs.linear_attention(q, k, v, feature_map, **options)
    with fs.use("reference"):
        want = fs.linear_attention(*(x.astype(np.float64) for x in (q, k, v)), feature_map, **options)
    return got, want


@pytest.mark.parametrize("scale", [1e-12, 1.0, 30.0, 1e3])
@pytest.mark.parametrize(("is_causal", "window"), [(False, 0), (True, 0), (False, 16), (True, 16)])
def test_no_scale_of_the_inputs_overflows_or_vanishes(scale, is_causal, window):
    """Log features reach 1e6 here.

    In float64, kernel and reference still agree up to the rounding of such logarithms.
    """
    q, k, v = attention_problem(1, (2,), n=150)
    fm = fs.feature_map(fs.fit(q, k, method="posrf"), 24, rng=0)
    mask = key_mask(2, k.shape[:-1], "holes")
    got, want = both(q * scale, k * scale, v, fm, is_causal=is_causal, window=window, key_mask=mask)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, atol=1e-9 if scale < 100 else 1e-6)


@pytest.mark.parametrize("window", [0, 1, 8, 10])
def test_a_causal_row_is_not_washed_out_by_a_key_it_cannot_see(window):
    """Features grow by 2**200 within a tile. With one top for the tile, the features of early rows would be 0."""
    rng = np.random.default_rng(0)
    n, d = 64, 4
    growing = np.linspace(0, 40, n)[:, None] * np.ones(d)
    q, k, v = rng.standard_normal((n, d)), rng.standard_normal((n, d)) + growing, rng.standard_normal((n, 3))
    for dtype, error in ((np.float64, 1e-10), (np.float32, 1e-3)):
        fm = fs.feature_map(fs.fit(q, k, method="posrf"), 8, rng=0)
        fm = astype(fm, dtype)
        for keys in (k, k[::-1], rng.permutation(k)):
            arrays = (np.ascontiguousarray(x, dtype) for x in (q, keys, v))
            got, want = both(*arrays, astype(fm, np.float64), is_causal=True, window=window)
            np.testing.assert_allclose(got, want, atol=error)


@pytest.mark.parametrize("group", [1, 3, 6])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [1, 10, 16, 32, 33, 48, 64, 100, 128])
def test_blocks_of_any_length_lie_in_tiles_as_they_may(window, is_causal, group):
    """A tile has several blocks, or a block several tiles.

    The query heads of a key head fit into the workspace, or do not.
    """
    for n in (1, 2 * window, 2 * window + 1, 64, 65, 3 * max(64, window) - 1):
        q, k, v = attention_problem(n, (2, 6), n=n)
        k, v = k[:, : 6 // group], v[:, : 6 // group]
        fm = fs.feature_map(fs.fit(*attention_problem(0, ())[:2]), 19, rng=0)
        mask = key_mask(n, k.shape[:-1], "holes") if n % 2 else None
        got, want = both(q, k, v, fm, is_causal=is_causal, window=window, key_mask=mask, enable_gqa=True)
        np.testing.assert_allclose(got, want, atol=1e-11)


@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize("window", [0, 4])
def test_a_batch_without_entries_has_results_without_entries(of_batch, window):
    """Of the points alone, or of the map too."""
    q, k, v = attention_problem(0, (2,), n=9)
    fm = fs.feature_map(fs.fit(q, k, axis=-2 if of_batch else (0, -2)), 16, rng=0)
    if of_batch:
        fm = fs.feature_map(map_arrays(fm.parameters, lambda x: x[:0]), 16, rng=0)
    q, k, v = q[:0], k[:0], v[:0]
    with fs.use("numba"):
        for given in (fm, fs.landmarks(4)):
            assert fs.linear_attention(q, k, v, given, window=window).shape == v.shape
            out, state = fs.linear_attention(q, k, v, given, is_causal=True, window=window, return_state=True)
            token, _ = fs.decode_step(q[:, :1], k[:, :1], v[:, :1], state, given)
            assert (out.shape, token.shape) == (v.shape, v[:, :1].shape)
        for is_causal in (False, True):
            _, pullback = fs.vjp(fs.linear_attention, q, k, v, fm, is_causal=is_causal, window=window)
            assert [x.shape for x in pullback(v)] == [x.shape for x in (q, k, v)]


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize(("is_causal", "window"), [(c, w) for c in (False, True) for w in (0, 7, 16)])
def test_what_is_not_finite_reaches_the_rows_that_the_reference_says(where, poison, is_causal, window):
    q, k, v = attention_problem(3, (2,), n=90)
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    {"q": q, "k": k, "v": v}[where][0, 50, 1] = poison
    with np.errstate(all="ignore"):
        got, want = both(q, k, v, fm, is_causal=is_causal, window=window)
    finite = np.isfinite(want).all(axis=-1)
    np.testing.assert_array_equal(np.isfinite(got).all(axis=-1), finite)
    np.testing.assert_allclose(got[finite], want[finite], atol=1e-10)


LAYOUTS = {
    "transposed": lambda x: np.ascontiguousarray(np.swapaxes(x, -1, -2)).swapaxes(-1, -2),
    "reversed": lambda x: np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1],
    "every other": lambda x: np.repeat(x, 2, axis=-2)[..., ::2, :],
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "unaligned": lambda x: np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_layouts_do_not_change_results(layout, is_causal):
    q, k, v = attention_problem(4, (2, 3), n=70)
    q, k, v = (np.broadcast_to(x[:1], x.shape) for x in (q, k, v))
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    with fs.use("numba"):
        want = fs.linear_attention(*(x.copy() for x in (q, k, v)), fm, is_causal=is_causal)
        given = [LAYOUTS[layout](x.copy()) for x in (q, k, v)]
        got = fs.linear_attention(*given, fm, is_causal=is_causal)
    np.testing.assert_array_equal(got, want)


OUTS = {
    "whole": np.empty_like,
    "every other item": lambda x: np.empty((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)[..., ::2],
    "backwards": lambda x: np.empty_like(x)[..., ::-1, :],
    "not aligned": lambda x: np.frombuffer(bytearray(x.nbytes + 1), x.dtype, offset=1).reshape(x.shape),
}
CALLS = {
    "bidirectional": {},
    "window": {"window": 16},
    "causal": {"is_causal": True},
    "causal window": {"is_causal": True, "window": 16},
    "packed": {"is_causal": True, "cu_seqlens": [0, 30, 100]},
    "of a state": {"is_causal": True, "state": True},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("call", CALLS)
def test_results_written_to_out_equal_fresh_ones(call, dtype):
    q, k, v = (x.astype(dtype) for x in attention_problem(4, (4,), n=100))
    options = dict(CALLS[call])
    if call == "grouped":
        k, v = k[:2], v[:2]
    fm = fs.feature_map(fs.fit(q, k, enable_gqa=call == "grouped"), 16, rng=0)
    if "state" in options:
        options["state"] = fs.update(fs.init_state(fm, v.shape[-1], like=k), k, v, fm)
    with fs.use("numba"):
        want = fs.linear_attention(q, k, v, fm, **options)
        for kind, made in OUTS.items():
            out = made(want)
            assert fs.linear_attention(q, k, v, fm, out=out, **options) is out
            np.testing.assert_array_equal(out, want, err_msg=kind)


@pytest.mark.parametrize("call", ["bidirectional", "causal", "causal window"])
def test_out_may_share_memory_with_the_inputs(call):
    q, k, v = attention_problem(4, (2,), n=200)
    memory = np.concatenate([v, v], axis=-2)
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    with fs.use("numba"):
        want = fs.linear_attention(q, k, v, fm, **CALLS[call])
        for shift in (0, 1, 64, 200):
            memory[:, :200] = v
            out = memory[:, shift : shift + 200]
            np.testing.assert_array_equal(
                fs.linear_attention(q, k, memory[:, :200], fm, out=out, **CALLS[call]), want, err_msg=str(shift)
            )


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_kernel_writes_to_an_array_that_repeats_its_items(is_causal):
    """Torch refuses to; a kernel would leave what one of its threads wrote last."""
    torch = pytest.importorskip("torch")
    q, k, v = (torch.asarray(x) for x in attention_problem(4, n=20))
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    out = torch.zeros(1, 5, dtype=torch.float64).expand(20, 5)
    with fs.use("numba"), pytest.raises(RuntimeError, match="single memory location"):
        fs.linear_attention(q, k, v, fm, is_causal=is_causal, out=out)
    assert not out.any()


def test_features_may_be_written_over_their_points():
    rng = np.random.default_rng(0)
    memory, rows = rng.standard_normal((300, 16)) / 2, rng.standard_normal((16, 16))
    row, column, u = np.zeros((200, 1)), np.zeros((1, 16)), memory[:200].copy()
    with fs.use("numba"):
        want = exponential_features(u, rows, row, column)
        for shift in (0, 1, 64):
            memory[:200] = u
            out = memory[shift : shift + 200]
            np.testing.assert_array_equal(exponential_features(memory[:200], rows, row, column, out=out), want)


@pytest.mark.thread_unsafe(reason="tracemalloc counts what every thread allocates")
@pytest.mark.parametrize("call", CALLS)
def test_out_is_written_without_an_array_of_its_size(call):
    q, k, v = np.random.default_rng(0).standard_normal((3, 4, 16384, 32)).astype(np.float32)
    options = {name: x for name, x in CALLS[call].items() if name != "state"}
    if "cu_seqlens" in options:
        options["cu_seqlens"] = [0, 1000, 16384]
    if call == "grouped":
        k, v = k[:2], v[:2]
    fm = fs.feature_map(fs.fit(q, k, method="posrf", enable_gqa=call == "grouped"), 32, rng=0)
    out = np.empty_like(q)
    with fs.use("numba"):
        fs.linear_attention(q, k, v, fm, out=out, **options)
        tracemalloc.start()
        fs.linear_attention(q, k, v, fm, out=out, **options)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # a bidirectional window keeps what queries have read of one side while it reads the other
    assert most < (2 * out.nbytes if call == "window" else out.nbytes / 2)


@pytest.mark.parametrize("m", [1, 15, 16, 64, 100])
@pytest.mark.parametrize("n", [0, 1, 65, 40_000])
def test_features_written_to_out_equal_fresh_ones(n, m):
    """The result of 40,000 rows is so large that it is stored past the caches."""
    rng = np.random.default_rng(0)
    u, rows, row, column = (
        rng.standard_normal(shape).astype(np.float32) / 2 for shape in ((n, 8), (m, 8), (n, 1), (1, m))
    )
    with fs.use("numba"):
        fresh = exponential_features(u, rows, row, column)
        whole = np.full((n + 2, m + 3), 7, np.float32)
        for target in (np.empty((n, m), np.float32), whole[1:-1, 1:-2], np.empty((n, 2 * m), np.float32)[:, ::2]):
            got = exponential_features(u, rows, row, column, out=target)
            assert got is target
            np.testing.assert_array_equal(got, fresh)
    assert (whole[[0, -1]] == 7).all()
    assert (whole[:, [0, -1, -2]] == 7).all()
    np.testing.assert_allclose(fresh, np.exp(u @ rows.T + row + column), rtol=2e-6)


def test_features_keep_the_range_of_the_dtype():
    for dtype in (np.float32, np.float64):
        info = np.finfo(dtype)
        logs = np.log(np.array([float(info.tiny) * 2, 1, float(info.max) / 2], dtype=np.longdouble)).astype(dtype)
        logs = np.append(logs, [np.inf, -np.inf, np.nan]).astype(dtype)[:, None]
        none = np.zeros((6, 1), dtype)
        with fs.use("numba"), np.errstate(over="ignore"):
            got = exponential_features(none, np.zeros((5, 1), dtype), logs, np.zeros((1, 5), dtype))
            np.testing.assert_allclose(got, np.broadcast_to(np.exp(logs), got.shape), rtol=300 * info.eps)


def test_grouped_heads_read_the_keys_of_their_group():
    q, k, v = attention_problem(5, (2, 6), n=80)
    k, v = k[:, ::3], v[:, ::3]
    fm = fs.feature_map(fs.fit(q.reshape(-1, 8), k.reshape(-1, 8)), 16, rng=0)
    repeated = [np.repeat(x, 3, axis=1) for x in (k, v)]
    with fs.use("numba"):
        for options in ({}, {"is_causal": True}, {"window": 16}, {"is_causal": True, "window": 16}):
            got = fs.linear_attention(q, k, v, fm, enable_gqa=True, **options)
            np.testing.assert_allclose(got, fs.linear_attention(q, *repeated, fm, **options), atol=1e-12)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_are_one_call_and_do_not_see_each_other(is_causal, grouped):
    q, k, v = attention_problem(6, (2, 6), n=230)
    if grouped:
        k, v = k[:, ::3], v[:, ::3]
    fm = fs.feature_map(fs.fit(q.reshape(-1, 8), k.reshape(-1, 8)), 19, rng=0)
    bounds = [0, 1, 1, 70, 75, 140, 141, 230]
    mask = key_mask(7, k.shape[:-1], "holes")
    for window in (0, 5, 16, 64):
        options = {"is_causal": is_causal, "window": window, "enable_gqa": grouped}
        with fs.use("numba"):
            with watch() as calls:
                got = fs.linear_attention(q, k, v, fm, cu_seqlens=bounds, key_mask=mask, **options)
            assert len(calls) == 1
            pieces = [
                fs.linear_attention(*(x[..., a:b, :] for x in (q, k, v)), fm, key_mask=mask[..., a:b], **options)
                for a, b in pairwise(bounds)
                if a < b
            ]
        np.testing.assert_allclose(got, np.concatenate(pieces, axis=-2), atol=1e-12)


@pytest.mark.parametrize("n", [1, 64, 65, 129, 512, 700])
@pytest.mark.parametrize("window", [16, 33, 64, 70, 200])
def test_a_window_in_both_directions_in_one_pass(window, n):
    """Blocks and groups of blocks that end within the sequence; a block that is hidden; heads that share keys."""
    q, k, v = attention_problem(21, (1, 2), n=n, e=6)
    mask = key_mask(3, k.shape[:-1], "holes")
    mask[..., 64 : min(n, 3 * window)] = False
    fm = fs.feature_map(fs.fit(q, k), 20, rng=0)
    for dtype, error in ((np.float64, 1e-12), (np.float32, 2e-5)):
        a = [x.astype(dtype) for x in (q, k, v)]
        for options in ({}, {"key_mask": mask}):
            got, want = both(*a, fm, window=window, **options)
            np.testing.assert_allclose(got, want, atol=error)
    many = np.concatenate([q, q[:, ::-1], 2 * q], axis=1)
    got, want = both(
        many, k, v, fs.feature_map(fs.fit(q, k, axis=(0, 1, -2)), 20, rng=0), window=window, enable_gqa=True
    )
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_a_stream_of_repeated_keys_takes_the_candidates_of_the_reference():
    """There are more different keys than candidates, and each key occurs three times."""
    q, k, v = attention_problem(23, (2,), n=120)
    k = np.repeat(k[:, :40], 3, axis=1)
    got, want = both(q, k, v, fs.landmarks(4, room=100), is_causal=True)
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)


def test_streams_compress_more_keys_than_their_kernel_holds_distances_of():
    """From 1,025 keys on, the steps run one by one.

    A stream in one call equals a stream in parts, with such compressions.
    """
    q, k, v = attention_problem(24, (2,), n=1400)
    lm, mask = fs.landmarks(4, room=1030), key_mask(5, (2, 1400), "holes")
    got, want = both(q, k, v, lm, is_causal=True, key_mask=mask)
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("n", [63, 64, 130, 330])
def test_streams_are_those_of_the_reference(n, steps):
    """Both dtypes, with incomplete tiles of keys, landmarks without keys, and weights of very different size."""
    q, k, v = attention_problem(25, (2,), n=n)
    k[0, 20:50] *= 1e-3
    for m, window in ((1, 0), (7, 0), (20, 5), (64, 16)):
        lm = fs.landmarks(m, steps=steps)
        for scale in (1.0, 6.0):
            got, want = both(scale * q, scale * k, v, lm, is_causal=True, window=window)
            np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)
        with fs.use("numba"):
            single = fs.linear_attention(*(x.astype(np.float32) for x in (q, k, v)), lm, is_causal=True, window=window)
            double = fs.linear_attention(q, k, v, lm, is_causal=True, window=window)
        assert np.linalg.norm(single - double) < 0.05 * np.linalg.norm(double)


def test_only_queries_that_see_a_key_that_is_not_finite_lose_their_result():
    q, k, v = attention_problem(22, n=500)
    k[250, 0] = np.nan
    got, want = both(q, k, v, fs.feature_map(fs.fit(q, np.nan_to_num(k)), 20, rng=0), window=64)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))


def test_packed_and_whole_sequences_share_kernels():
    """In compiled code a constant has a type of its own, so a constant argument would compile the called kernel once
    more. The test can see this only if kernels are compiled, as after an edit of the package, and not loaded from the
    cache.
    """
    from favorsharp_numba.kernels import (
        attention,
        attention_gradients,
        causal_attention,
        window_gradients,
        windowed_attention,
    )

    torch = pytest.importorskip("torch")
    q, k, v = (torch.asarray(x).requires_grad_() for x in attention_problem(20, n=40))
    fm = fs.feature_map(fs.fit(q.detach(), k.detach()), 8, rng=0)
    for is_causal, window in ((False, 0), (True, 0), (False, 4), (True, 4)):
        for bounds in (None, [0, 10, 40]):
            fs.linear_attention(q, k, v, fm, is_causal=is_causal, window=window, cu_seqlens=bounds).sum().backward()
    kernels = (
        attention.gather_keys, attention.read_queries, causal_attention.causal,
        windowed_attention.windowed, attention_gradients.sweep, window_gradients.near_gradients,
    )  # fmt: skip
    for kernel in kernels:
        dtypes = [str(signature[0]) for signature in kernel.signatures]
        assert len(dtypes) == len(set(dtypes)), (kernel.__name__, kernel.signatures)


@pytest.mark.parametrize("before", [0, 5, 16, 40])
def test_a_state_with_a_window_holds_no_memory_of_the_whole_sequence(before):
    """Its recent keys are a view neither of a copy of all keys nor of the caller's array."""
    w, n = 16, 300
    q, k, v = attention_problem(1, (2,), n=n)
    fm = fs.feature_map(fs.fit(q, k), 8, rng=0)
    state = fs.update(fs.init_state(fm, 5, like=k, window=w), k[:, :before], v[:, :before], fm)
    arrays = (x[:, before:] for x in (q, k, v))
    _, state = fs.linear_attention(*arrays, fm, is_causal=True, window=w, state=state, return_state=True)
    for name, whole in (("recent_k", k), ("recent_v", v)):
        kept = getattr(state, name)
        np.testing.assert_array_equal(kept, whole[:, n - kept.shape[-2] :])
        owner = kept if kept.base is None else kept.base
        assert owner.size <= 2 * 4 * w * whole.shape[-1]


@pytest.mark.parametrize("e", [1, 5, 16, 80])
def test_tokens_one_by_one_equal_the_sequence(e):
    """The first token makes the plan; the arrays of later tokens may be elsewhere in memory."""
    q, k, v = attention_problem(8, (2, 3), n=12, e=e)
    fm = fs.feature_map(fs.fit(q, k), 19, rng=0)
    for dtype, error in ((np.float64, 1e-12), (np.float32, 1e-5)):
        a = [np.asarray(x, dtype) for x in (q, k, v)]
        want = fs.linear_attention(*a, astype(fm, dtype), is_causal=True)
        state = fs.init_state(fm, e, like=a[1])
        with fs.use("numba"):
            for t in range(12):
                token = [x[..., t : t + 1, :] if t % 2 else x[..., t : t + 1, :].copy() for x in a]
                out, state = fs.decode_step(*token, state, fm)
                np.testing.assert_allclose(out, want[..., t : t + 1, :], atol=error)


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("layout", ["whole", "heads last"])
def test_tokens_of_grouped_heads_equal_the_sequence(layout, window):
    """Several queries read a key head; a query that is NaN affects its own result only."""
    q, k, v = attention_problem(8, (2, 3), n=6, e=5)
    q = np.concatenate([q, -q, 0.5 * q], axis=1)
    fm = fs.feature_map(fs.fit(k, k), 19, rng=0)
    if layout == "heads last":
        q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v))
    with fs.use("reference"):
        want = fs.linear_attention(q, k, v, fm, is_causal=True, enable_gqa=True, window=window)
    state = fs.init_state(fm, 5, like=k, window=window)
    for t in range(6):
        token = [x[..., t : t + 1, :] for x in (q, k, v)]
        out, state = fs.decode_step(*token, state, fm, enable_gqa=True)
        np.testing.assert_allclose(out, want[..., t : t + 1, :], atol=1e-12)
    token[0][:, 4] = np.nan
    for backend in ("numba", "reference"):
        with fs.use(backend):
            out, _ = fs.decode_step(*token, state, fm, enable_gqa=True)
        assert np.array_equal(np.isnan(out).all(axis=-1)[0, :, 0], np.arange(9) == 4)


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("name", ["kv", "z", "c"])
def test_a_state_that_begins_to_need_gradients_is_looked_at_again(name, recording):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.asarray(x) for x in attention_problem(9, (2,), n=3))
    fm = fs.feature_map(fs.fit(q, k), 16, rng=0)
    state = fs.init_state(fm, 5, like=k)
    with torch.set_grad_enabled(recording):
        for t in (0, 1):
            _, state = fs.decode_step(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], state, fm)
    getattr(state, name).requires_grad_()
    with watch() as calls:
        fs.decode_step(q[:, 2:], k[:, 2:], v[:, 2:], state, fm)
    out, _ = fs.decode_step(q[:, 2:], k[:, 2:], v[:, 2:], state, fm)
    assert calls == [("decode_step", "reference")]
    assert out.requires_grad


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
@pytest.mark.parametrize(("n", "s", "m"), [(1, 1, 1), (65, 130, 3), (130, 65, 17), (200, 700, 70), (3, 0, 5)])
def test_values_of_one_column(n, s, m, spread, dtype):
    """With a wide spread, log features differ by hundreds, so that tops rise and references are computed again."""
    rng = np.random.default_rng(0)
    q, k = (spread * rng.standard_normal((2, size, 6)).astype(dtype) for size in (n, s))
    k = k[:, np.argsort(np.sum(k[0] ** 2, axis=-1))]  # norms grow, and tops with them
    v = rng.standard_normal((2, s, 1)).astype(dtype)
    mask = key_mask(1, k.shape[:-1], "holes")
    for kernel in ("softmax", "gaussian"):
        parameters = fs.fit(*(spread * rng.standard_normal((2, 40, 6))), method="posrf", kernel=kernel)
        fm = astype(fs.feature_map(parameters, m, rng=0), dtype)
        tolerance = 1e-9 if dtype == np.float64 else 1e-3 if spread > 1 else 1e-4
        got, want = both(q, k, v, astype(fm, np.float64), key_mask=mask) if dtype == np.float64 else both(q, k, v, fm)
        np.testing.assert_allclose(got, want, atol=tolerance)
        with fs.use("numba"), np.errstate(over="ignore"):
            got = fs.kernel_matvec(q, k, v, fm)
        with fs.use("reference"):
            want = fs.kernel_matvec(*(x.astype(np.float64) for x in (q, k, v)), astype(fm, np.float64))
        in_range = np.abs(want) < 0.1 * np.finfo(dtype).max
        size = np.max(np.abs(want), axis=-2, keepdims=True, where=in_range, initial=1e-30)
        np.testing.assert_allclose((got / size)[in_range], (want / size)[in_range], atol=tolerance)
        assert not np.isfinite(got[np.abs(want) / 2 > np.finfo(dtype).max]).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e4, 1e7, 1e12])
def test_one_column_of_points_whose_logarithms_cannot_be_told_apart(scale, dtype):
    """Rounding errors exceed every limit for features; results must still lie between the values."""
    q, k, v = (x.astype(dtype) for x in attention_problem(4, (2,), n=90))
    fm = astype(fs.feature_map(fs.fit(q, k, method="posrf"), 20, rng=0), dtype)
    v = v[..., :1]
    with fs.use("numba"):
        got = fs.linear_attention(q * dtype(scale), k * dtype(scale), v, fm)
    assert np.isfinite(got).all()
    span = np.max(v, axis=-2, keepdims=True) - np.min(v, axis=-2, keepdims=True)
    slack = 1e-5 * span
    assert (got >= np.min(v, axis=-2, keepdims=True) - slack).all()
    assert (got <= np.max(v, axis=-2, keepdims=True) + slack).all()


def test_sums_of_one_column_keep_the_range_of_the_dtype():
    """Points at which features are largest: 2**reference leaves the range of float32, but the result does not."""
    x = np.random.default_rng(1).standard_normal((40, 128))
    fm = fs.feature_map(fs.fit(x, x, method="posrf"), 8, rng=0)
    peaks = (np.asarray(fm.rows) / fm.parameters.scale**0.5).astype(np.float32)
    v = np.full((8, 1), 1e-36, np.float32)
    with fs.use("numba"):
        got = fs.kernel_matvec(peaks, peaks, v, astype(fm, np.float32))
    with fs.use("reference"):
        want = fs.kernel_matvec(*(a.astype(np.float64) for a in (peaks, peaks, v)), fm)
    assert want.max() > 1e10  # 1e46 times a value
    np.testing.assert_allclose(got, want, rtol=1e-3)


@pytest.mark.parametrize("window", [16, 70])  # units of several blocks, and of one
def test_windows_around_landmarks_over_several_groups_of_units(window):
    """Sums of prefixes are kept before every eighth unit, and two query heads read the same keys."""
    q, k, v = attention_problem(5, (2,), n=1300)
    mask = key_mask(6, k.shape[:-1], "holes")
    k[~mask], v[~mask] = np.nan, np.inf
    queries = np.concatenate([q, -q])
    with watch() as calls:
        got, want = both(queries, k, v, fs.landmarks(40), window=window, key_mask=mask, enable_gqa=True)
    assert calls[-1][0] == "landmark_window"
    assert ("landmark_window", "numba") in calls
    np.testing.assert_allclose(got, want, atol=1e-11)
