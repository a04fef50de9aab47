"""Random problems with random options, compared with full matrices; so all pairs of options are tested."""

from itertools import pairwise

import numpy as np
import oracle
import pytest

import favorsharp as fs

METHODS = ["optimal", "posrf", "oprf", "saderf", "aderf", "sderf", "hyperbolic", "elu"]
LENGTHS = [0, 1, 2, 3, 16, 37, 64, 127, 128, 129, 150]
WINDOWS = [0, 0, 1, 2, 3, 7, 16, 64, 100, 1000]


def thinned(rng, batch):
    """A random shape that broadcasts to the batch."""
    shape = [size if rng.random() < 0.7 else 1 for size in batch]
    while shape and rng.random() < 0.25:
        shape = shape[1:]
    return tuple(shape)


def drawn(seed):
    """Arrays and options of one problem."""
    rng = np.random.default_rng(seed)
    options = {"is_causal": bool(rng.random() < 0.5), "window": int(rng.choice(WINDOWS))}
    n = int(rng.choice(LENGTHS))
    s = n if options["is_causal"] or options["window"] else int(rng.choice(LENGTHS))
    batch = tuple(int(size) for size in rng.integers(1, 4, rng.integers(0, 3)))
    group = int(rng.integers(1, 4)) if batch and rng.random() < 0.4 else 1
    options["enable_gqa"] = group > 1
    d, e = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    q_batch, k_batch, v_batch, mask_batch, map_batch = (thinned(rng, batch) for _ in range(5))
    if group > 1:  # heads are counted, not broadcast
        q_batch, k_batch, v_batch = (*batch[:-1], batch[-1] * group), batch, batch
        mask_batch, map_batch = (batch if rng.random() < 0.7 else () for _ in range(2))
    scale = float(rng.choice([0.1, 1, 3, 10]))
    q = scale * rng.standard_normal((*q_batch, n, d)) + rng.standard_normal(d)
    k = scale * rng.standard_normal((*k_batch, s, d)) + 3 * rng.standard_normal(d)
    v = rng.standard_normal((*v_batch, s, e))
    mask = None
    if rng.random() < 0.7:
        mask = rng.random((*mask_batch, s)) < rng.choice([0.0, 0.3, 0.9])
    fitted = [rng.standard_normal((*map_batch, 20, d)) for _ in range(2)]
    how = {"method": str(rng.choice(METHODS)), "kernel": str(rng.choice(["softmax", "gaussian"])), "scale": 0.5}
    m = int(rng.choice([1, 2, 3, 8, 17]))
    return q, k, v, mask, group, options, lambda to: fs.feature_map(fs.fit(*map(to, fitted), **how), m, rng=seed)


def brute_force(q, k, v, mask, group, options, fm):
    """Full matrices, with the keys of grouped heads repeated."""
    lk, mask_rows = fm.log_key(k), mask
    if group > 1:
        heads = fm.log_query(q.reshape((*k.shape[:-2], group * q.shape[-2], q.shape[-1])))
        lq = heads.reshape((*q.shape[:-1], heads.shape[-1]))
        lk, k, v = (np.repeat(x, group, axis=-3) for x in (lk, k, v))
        mask_rows = mask if mask is None or mask.ndim == 1 else np.repeat(mask, group, axis=-2)
    else:
        lq = fm.log_query(q)
    p = fm.parameters
    exact = oracle.log_kernel(q, k, p.kernel, p.scale) if options["window"] else None
    scores = oracle.log_scores(lq, lk, exact, options["window"], options["is_causal"])
    return oracle.attention(scores, v, mask_rows, options["is_causal"])


@pytest.mark.parametrize("block", range(12))
def test_drawn_problems(few_xp, block):
    xp = few_xp
    for seed in range(100 * block, 100 * block + 10):
        q, k, v, mask, group, options, make = drawn(seed)
        want = brute_force(q, k, v, mask, group, options, make(np.asarray))
        arrays, fm = [xp(x) for x in (q, k, v)], make(xp)
        where = None if mask is None else xp(mask)
        got = xp.back(fs.linear_attention(*arrays, fm, key_mask=where, **options))
        where_from = f"seed {seed}: {options}, q {q.shape}, k {k.shape}, v {v.shape}"
        assert got.shape[-2:] == want.shape[-2:], where_from
        want = np.broadcast_to(want, got.shape)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-9, err_msg=where_from)
        if not options["is_causal"]:
            continue
        cuts = np.sort(np.random.default_rng(seed).integers(0, q.shape[-2] + 1, 3))
        state, pieces = None, []
        for a, b in pairwise([0, *(int(cut) for cut in cuts), q.shape[-2]]):
            piece = [x[..., a:b, :] for x in arrays]
            out, state = fs.linear_attention(
                *piece,
                fm,
                key_mask=None if mask is None else where[..., a:b],
                state=state,
                return_state=True,
                **options,
            )
            pieces.append(np.broadcast_to(xp.back(out), (*want.shape[:-2], b - a, want.shape[-1])))
        np.testing.assert_allclose(np.concatenate(pieces, axis=-2), want, rtol=0, atol=1e-9, err_msg=where_from)
