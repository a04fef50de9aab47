"""The geometry and the marginals of each draw, and that one seed gives one draw."""

import numpy as np
import pytest
from scipy import stats

import favorsharp as fs
from favorsharp.draws import DRAWS, discrete_rows, draw_rows


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize(("m", "d"), [(1, 1), (7, 1), (1, 5), (12, 5), (64, 8), (33, 16)])
def test_shape_and_seed(draw, m, d):
    rows = draw_rows(draw, m, d, 3)
    assert rows.shape == (m, d)
    assert rows.dtype == np.float64
    assert np.isfinite(rows).all()
    np.testing.assert_array_equal(rows, draw_rows(draw, m, d, np.random.default_rng(3)))
    np.testing.assert_array_equal(rows, draw_rows(draw, m, d, np.random.SeedSequence(3)))
    assert not np.array_equal(rows, draw_rows(draw, m, d, 4))


@pytest.mark.parametrize("draw", DRAWS)
def test_every_row_is_standard_normal(draw):
    d = 3
    first_and_last = np.concatenate([draw_rows(draw, 5, d, seed)[[0, -1]] for seed in range(1500)])
    direction = np.array([1.0, 1.0, -1.0]) / 3**0.5
    for sample in (first_and_last[:, 0], first_and_last @ direction):
        assert stats.kstest(sample, "norm").pvalue > 1e-4
    assert stats.kstest((first_and_last**2).sum(-1), "chi2", args=(d,)).pvalue > 1e-4


def test_fewer_orthogonal_rows_than_columns():
    """They are the first columns of a Haar matrix, drawn without the others.

    The test would notice signs as LAPACK chooses them.
    """
    pairs = np.stack([draw_rows("orthogonal", 2, 3, seed) for seed in range(3000)])
    np.testing.assert_allclose((pairs[:, 0] * pairs[:, 1]).sum(-1), 0, atol=1e-12)
    direction = np.array([1.0, 1.0, -1.0]) / 3**0.5
    for sample in (pairs[:, 0, 0], pairs[:, 1, 2], pairs[:, 1] @ direction):
        assert stats.kstest(sample, "norm").pvalue > 1e-4
    assert stats.kstest((pairs**2).sum(-1)[:, 1], "chi2", args=(3,)).pvalue > 1e-4


def test_orthogonal_blocks():
    rows = draw_rows("orthogonal", 20, 8, 0)
    for block in (rows[:8], rows[8:16], rows[16:]):
        gram = block @ block.T
        np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0, atol=1e-12)


def test_simplex_blocks_have_equal_angles():
    unit = draw_rows("simplex", 6, 6, 0)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    cosines = (unit @ unit.T)[~np.eye(6, dtype=bool)]
    np.testing.assert_allclose(cosines, -1 / 5, atol=1e-12)


def test_antithetic_rows_cancel():
    rows = draw_rows("antithetic", 10, 4, 0)
    np.testing.assert_allclose(rows[:5], -rows[5:])


def test_sobol_is_more_even_than_chance():
    levels = stats.norm.cdf(draw_rows("sobol", 256, 4, 0))
    counts = np.stack([np.histogram(column, bins=16, range=(0, 1))[0] for column in levels.T])
    assert (counts == 16).all()  # a scrambled net is exactly stratified


def test_a_row_whose_level_rounds_to_one_has_a_finite_count():
    """That of the largest level below 1."""
    counts, log_density = discrete_rows("geometric", np.array([[9.0], [np.inf]]), np.full((1, 1), 0.3))
    assert (0.7 ** (counts + 1) < 2.0**-53).all()
    assert (0.7**counts >= 2.0**-53).all()
    assert np.isfinite(log_density).all()


def test_generator_moves_on():
    rng = np.random.default_rng(0)
    assert not np.array_equal(draw_rows("iid", 4, 3, rng), draw_rows("iid", 4, 3, rng))


@pytest.mark.parametrize("rng", ["0", 1.5, True, np.random.RandomState(0)])
def test_other_sources_of_randomness_are_refused(rng):
    with pytest.raises(TypeError, match="rng must be None, an int"):
        draw_rows("iid", 4, 3, rng)


def test_one_seed_one_projection(xp):
    host = np.random.default_rng(0).standard_normal((20, 6))
    parameters = fs.fit(xp(host), xp(host + 1))
    projection = fs.feature_map(parameters, 16, rng=5).projection
    assert xp.is_like(projection, xp(host))
    np.testing.assert_array_equal(xp.back(projection), draw_rows("orthogonal", 16, 6, 5))
