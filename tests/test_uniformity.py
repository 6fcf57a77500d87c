"""Exact p-values of uniformity and of symmetry, against enumeration and ArviZ's bands."""

import itertools
from functools import partial

import numpy as np
import pytest
from scipy.stats import binom, ks_2samp

from ppvae import uniformity as tests
from ppvae.uniformity import ecdf_band, grid, holm, symmetry, uniformity


def inside_by_binomials(lower, upper, num_data, num_points):
    """The probability of staying within bounds, from binomial steps between the points."""
    ends = np.concatenate([[0.0], grid(num_points)])
    state = np.zeros(num_data + 1)
    state[0] = 1.0
    for k in range(1, num_points):
        share = (ends[k] - ends[k - 1]) / (1 - ends[k - 1])
        new = np.zeros(num_data + 1)
        for count in range(num_data + 1):
            rest = num_data - count
            new[count:] += state[count] * binom.pmf(np.arange(rest + 1), rest, share)
        new[: lower[k - 1]] = 0
        new[upper[k - 1] + 1 :] = 0
        state = new
    return float(state.sum())


@pytest.mark.parametrize(("num_data", "num_points", "tail"), [(30, 10, 0.01), (60, 25, 0.002)])
def test_the_recursion_is_that_of_binomial_steps(num_data, num_points, tail):
    bounds = tests._band(tail, num_data, grid(num_points))
    found = tests._inside(*bounds, num_data, num_points)
    assert abs(found - inside_by_binomials(*bounds, num_data, num_points)) < 1e-12


def test_one_point_is_a_binomial_test():
    # Three values below 1/2 of three: each tail has 1/8, and there are two.
    assert abs(uniformity([0.1, 0.2, 0.3], num_points=2) - 0.25) < 1e-12
    assert uniformity([0.1, 0.2, 0.7], num_points=2) == 1.0


@pytest.mark.parametrize("test", [partial(uniformity, num_points=40), symmetry])
def test_p_values_hold_their_level(test):
    """P(p ≤ a) is at most a, and not far below it."""
    rng, repetitions = np.random.default_rng(1), 1000
    found = np.array([test(rng.uniform(size=100)) for _ in range(repetitions)])
    for level in (0.01, 0.05, 0.2, 0.5):
        error = (level * (1 - level) / repetitions) ** 0.5
        assert -0.2 * level - 4 * error < (found <= level).mean() - level < 4 * error


def test_small_p_values_are_bounds_and_not_rounding():
    """All values in the first cell: the true p-value is below 1e-100, and so is the bound."""
    assert 0 < uniformity(np.full(100, 0.005)) < 1e-100


def test_the_band_is_that_of_arviz():
    """ArviZ finds its band by simulation: it holds 95 % by our law, to the simulation's error."""
    from arviz_stats.ecdf_utils import get_pointwise_confidence_band, simulate_confidence_bands

    count, simulations = 100, 4000
    points = grid(count)
    tail = simulate_confidence_bands(count, 1, points, 0.95, simulations, np.random.default_rng(2))
    lower, upper = get_pointwise_confidence_band(tail, count, points)
    bounds = (np.rint(count * edge).astype(int) for edge in (lower, upper))
    inside = tests._inside(*bounds, count, count)
    assert abs(inside - 0.95) < 4 * (0.05 * 0.95 / simulations) ** 0.5 + 0.002
    ours = ecdf_band(count, 0.05, count)
    assert np.abs(ours[0] - lower).max() < 1.01 / count
    assert np.abs(ours[1] - upper).max() < 1.01 / count


@pytest.mark.parametrize("level", [0.05, 0.003])
def test_the_band_decides_as_the_p_value_does(level):
    rng = np.random.default_rng(3)
    lower, upper = ecdf_band(150, level)
    outside, rejected = [], []
    for _ in range(300):
        values = rng.beta(0.8, 1.0, size=150)
        shares = np.searchsorted(np.sort(values), grid(), side="right") / 150
        outside.append(bool(((shares < lower) | (shares > upper)).any()))
        rejected.append(uniformity(values) <= level)
    assert outside == rejected
    assert 30 < sum(rejected) < 270


def test_symmetry_is_the_share_of_sign_flips_with_a_larger_distance():
    """The statistic is the two-sample distance of p and 1 − p; its law is that of all flips."""
    values = np.array([0.03, 0.11, 0.2, 0.32, 0.35, 0.41, 0.55, 0.74])

    def distance(p):
        return ks_2samp(p, 1 - p, method="asymp").statistic

    flips = [
        distance(0.5 + np.array(signs) * (values - 0.5))
        for signs in itertools.product((-1, 1), repeat=len(values))
    ]
    for shown in (values, np.where(np.arange(8) % 2, values, 1 - values)):
        expected = np.mean(np.array(flips) >= distance(shown) - 1e-9)
        assert abs(symmetry(shown) - expected) < 1e-12


def test_the_two_sample_test_of_p_and_its_mirror_image_rejects_too_often():
    """They are no independent samples, which is why `symmetry` has a law of its own."""
    rng, repetitions = np.random.default_rng(4), 500
    samples = rng.uniform(size=(repetitions, 200))
    naive = np.mean([ks_2samp(p, 1 - p, method="asymp").pvalue <= 0.05 for p in samples])
    ours = np.mean([symmetry(p) <= 0.05 for p in samples])
    error = (0.05 * 0.95 / repetitions) ** 0.5
    assert naive > 0.05 + 4 * error
    assert ours < 0.05 + 4 * error


def test_holm_is_bonferroni_for_the_smallest_and_never_more_for_the_others():
    raw = np.random.default_rng(5).uniform(size=20) ** 3
    adjusted = holm(raw)
    assert abs(adjusted.min() - min(1, 20 * raw.min())) < 1e-12
    assert (adjusted <= np.minimum(20 * raw, 1) + 1e-12).all()
    assert (adjusted >= raw).all()
    assert (np.diff(adjusted[np.argsort(raw)]) >= 0).all()
