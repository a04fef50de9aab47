"""The work of a repeated call besides its kernels; it is counted, not timed."""

import tracemalloc

import numpy as np
import pytest

import favorsharp as fs

pytestmark = pytest.mark.own_backend
pytest.importorskip("numba")

HEADS, N, D, M = 4, 1000, 32, 32


@pytest.fixture
def counts(monkeypatch):
    """The counts of folded maps, packed maps and woken worker threads; two threads may work."""
    from favorsharp_numba.host import arguments, threads

    found = {"fold": 0, "pack": 0, "wake": 0}

    def counted(owner, name, label):
        inner = getattr(owner, name)

        def call(*args, **kwargs):
            found[label] += 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(arguments, "fold", "fold")
    counted(arguments.Packed, "constants", "pack")
    counted(threads, "_call_workers", "wake")
    monkeypatch.setattr(threads, "num_threads", lambda: 2)
    return found


def calls(library, map_dtype, n=N):
    """For each public function: a call, how often it needs worker threads, and the MiB of its result."""
    to = np.asarray if library == "numpy" else pytest.importorskip("torch").asarray
    rng = np.random.default_rng(0)
    q, k, v, more = (to(x) for x in rng.standard_normal((4, HEADS, n, D)))
    twice = to(rng.standard_normal((2 * HEADS, n, D)))
    fm = fs.feature_map(fs.fit(*(to(x) for x in rng.standard_normal((2, HEADS, 99, D)).astype(map_dtype))), M, rng=0)
    state = fs.update(fs.init_state(fm, D, like=k), k, v, fm)
    token = [x[:, :1] for x in (q, k, v)]
    after, near = [state], [fs.update(fs.init_state(fm, D, like=k, window=16), k, v, fm)]

    def step(states):
        states[0] = fs.decode_step(*token, states[0], fm)[1]

    attend = fs.linear_attention
    yield "attention", lambda: attend(q, k, v, fm), 2, 1
    yield "out", lambda: attend(q, k, v, fm, out=more), 2, 0
    yield "causal", lambda: attend(q, k, v, fm, is_causal=True), 1, 1
    yield "window", lambda: attend(q, k, v, fm, is_causal=True, window=16), 1, 1
    yield "state", lambda: attend(q, k, v, fm, is_causal=True, state=state, return_state=True), 1, 1
    yield "groups", lambda: attend(twice, k, v, fm, enable_gqa=True), 2, 2
    yield "packed", lambda: attend(q, k, v, fm, cu_seqlens=[0, 100, n]), 1, 1
    yield "update", lambda: fs.update(state, k, v, fm), 1, 0
    yield "read", lambda: fs.read(state, q, fm), 1, 1
    yield "decode_step", lambda: step(after), 0, 0
    yield "decode_step with a window", lambda: step(near), 0, 0
    yield "kernel_matvec", lambda: fs.kernel_matvec(q, k, v, fm), 2, 1
    yield "query", lambda: fm.query(q), 1, 1
    yield "log_key", lambda: fm.log_key(k), 1, 1
    yield "combine", lambda: fs.combine(state, state), 0, 0
    if library == "numpy":
        estimators, points = pytest.importorskip("favorsharp.sklearn"), q.reshape(-1, D)
        features = estimators.RandomFeatures(method="optimal", n_components=M, random_state=0).fit(points[:99])
        yield "transform", lambda: features.transform(points), 1, 1
    yield "vjp", lambda: fs.vjp(attend, q, k, v, fm)[1](v), 4, None


@pytest.mark.parametrize("map_dtype", ["float32", "float64"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_call_like_one_before_derives_nothing_anew(counts, library, map_dtype):
    for name, call, wakes, _ in calls(library, map_dtype):
        call()
        call()
        counts.update(fold=0, pack=0, wake=0)
        call()
        assert counts["fold"] == counts["pack"] == 0, (name, counts)
        assert counts["wake"] <= wakes, (name, counts)


def test_a_call_copies_no_array_of_points():
    """An array of points has 4 MiB.

    Apart from the result, a call needs only the workspaces of two threads, which are much smaller.
    """
    tracemalloc.start()
    try:
        for name, call, _, results in calls("numpy", "float64", 4 * N):
            if results is not None:
                call()
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                call()
                taken = (tracemalloc.get_traced_memory()[1] - before) / (1 << 20)
                assert taken < 4 * results + 1.4, (name, taken)
    finally:
        tracemalloc.stop()
