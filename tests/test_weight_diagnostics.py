"""Pareto smoothing and what it says per row, against ArviZ's own routine and exact evidence."""

import math

import numpy as np
import pyro
import pytest
import torch
from arviz_stats.base import array_stats
from laws import sigmas, toy_elbo
from scipy import stats
from scipy.special import logsumexp

import ppvae
from ppvae.diagnostics import Smoothed, WeightDiagnostics, pareto_k, psis, weight_diagnostics
from ppvae.families import Gamma, TruncatedNormal
from ppvae.guides import PerDatapoint
from ppvae.models import ExponentialGaussian


def pareto_weights(shape, draws, rows, seed=0):
    """Log weights with a generalised Pareto tail, whose mean is 1 / (1 - shape)."""
    found = stats.genpareto(shape).rvs((draws, rows), random_state=seed)
    return torch.as_tensor(found, device="cpu").log()


@pytest.mark.parametrize("draws", [25, 225, 226, 1000, 4000])
def test_k_hat_and_smoothed_evidence_are_arvizs_own(draws):
    """On heavy, light, far and partly vanishing weights; ArviZ gives normalised ones."""
    weights = torch.cat(
        [
            pareto_weights(0.9, draws, 2),
            torch.randn(draws, 2, dtype=torch.float64, device="cpu") - 1e4,
            torch.randn(draws, 1, dtype=torch.float64, device="cpu") * 30,
        ],
        dim=1,
    )
    weights[: draws // 2, 0] = -torch.inf
    found = psis(weights)
    for row, ours in enumerate(weights.T):
        raw = ours.numpy()
        own, k = array_stats.psislw(-raw.clip(min=-1e300))
        assert float(found.pareto_k[row]) == pytest.approx(float(k), abs=1e-6, nan_ok=True)
        # Its other routine takes the weights themselves: with log_weights=True it fits their logs.
        again = array_stats.pareto_khat(np.exp(raw - raw.max())[None], r_eff=1.0, tail="right")
        assert float(found.pareto_k[row]) == pytest.approx(float(again), abs=1e-6, nan_ok=True)
        # What is below the tail is as it was, so that the sum follows from normalised weights.
        below = raw.argsort()[draws - draws // 5 - 1]
        total = raw[below] - own[below]
        assert float(found.log_evidence[row]) == pytest.approx(total - math.log(draws), abs=1e-9)
        assert abs(logsumexp(own)) < 1e-9
    # Newer versions of ArviZ say of five weights in the tail that they are too few.
    torch.testing.assert_close(found.pareto_k, pareto_k(weights), rtol=0, atol=0, equal_nan=True)


def test_equal_weights_stay_as_they_are():
    weights = torch.tensor([[-3.0, 2.5]]).expand(400, 2)
    found = psis(weights)
    assert torch.equal(found.log_evidence, weights[0])
    assert torch.equal(found.stderr, torch.zeros_like(found.stderr))
    assert bool(torch.isneginf(found.pareto_k).all())


def test_a_constant_factor_of_the_weights_changes_the_evidence_by_it_alone():
    weights = pareto_weights(0.5, 500, 4)
    one, other = psis(weights), psis(weights + 700.0)
    torch.testing.assert_close(other.log_evidence, one.log_evidence + 700.0)
    torch.testing.assert_close(other.pareto_k, one.pareto_k)
    torch.testing.assert_close(other.stderr, one.stderr)


def test_few_draws_and_vanishing_rows_are_left_alone():
    weights = torch.randn(24, 2)
    found = psis(weights)
    torch.testing.assert_close(found.log_evidence, weights.logsumexp(dim=0) - math.log(24))
    assert bool(found.pareto_k.isnan().all())
    weights = torch.randn(400, 3)
    weights[:, 0] = -torch.inf
    weights[3, 1] = torch.nan
    alone = psis(weights[:, 2:])
    found = psis(weights)
    assert found.pareto_k.isnan().tolist() == [True, True, False]
    assert float(found.log_evidence[0]) == -math.inf
    assert bool(found.log_evidence[1].isnan())
    torch.testing.assert_close(found.log_evidence[2:], alone.log_evidence)


def test_weights_of_which_most_vanish_are_not_smoothed():
    """A tail of zeros has no shape; what is left is the plain mean."""
    weights = torch.randn(400, 2)
    weights[40:] = -torch.inf
    found = psis(weights)
    assert bool(found.pareto_k.isnan().all())
    torch.testing.assert_close(found.log_evidence, weights.logsumexp(dim=0) - math.log(400))


def test_smoothing_has_less_error_than_the_plain_mean_and_says_how_much():
    """Tails of shape 0.6, whose weights have no variance; 400 rows are 400 repetitions."""
    weights = pareto_weights(0.6, 1000, 400)
    truth = -math.log(1 - 0.6)
    found = psis(weights)
    smoothed = (found.log_evidence - truth).square()
    plain = (ppvae.evidence.iwae_of(weights).value - truth).square()
    assert float(smoothed.mean()) < float(plain.mean())
    # The bias is below the scatter, and the error within a third of it.
    scatter = float(found.log_evidence.std())
    assert abs(float(found.log_evidence.mean()) - truth) < scatter
    assert 0.67 < float(found.stderr.square().mean().sqrt()) / scatter < 1.5


def test_rows_of_the_toy_against_the_exact_evidence(device):
    """Guides of the posterior's shape: wider, with bounded weights, and with a tail of shape 1/2.

    Where the parent's variance is v times the posterior's, v < 1, the tail has the shape 1 - v.
    """
    model = ExponentialGaussian().to(device).double()
    x = torch.linspace(0.0, 4.0, 40, dtype=torch.float64, device=device)
    for variance, shape in ((1.7, None), (0.5, 0.5)):
        guide = PerDatapoint(TruncatedNormal(), len(x)).to(device)
        params = torch.stack([x - 1, torch.full_like(x, math.log(variance) / 2)], dim=-1)
        guide.table("z").weight = torch.nn.Parameter(params)
        found = weight_diagnostics(model, guide, x, 4000)
        truth = model.log_evidence(x)
        assert sigmas(found.evidence.value, truth, found.evidence.stderr) < 5
        assert sigmas(found.smoothed.log_evidence, truth, found.smoothed.stderr) < 5
        assert bool(found.reliable.all()) or shape is not None
        if shape is not None:
            # As in the tests of k-hat: single fits scatter by some 0.1.
            assert abs(float(found.pareto_k.mean()) - shape) < 0.1
        weights = ppvae.log_weights(model, guide, x, 4000)
        again = psis(weights)
        assert torch.equal(again.log_evidence, found.smoothed.log_evidence)
        share = weights.exp().mean(dim=0).square() / weights.exp().square().mean(dim=0)
        torch.testing.assert_close(found.effective_sample_size / 4000, share)


def test_the_exact_posterior_has_equal_weights(device):
    model = ExponentialGaussian().to(device).double()
    x = torch.linspace(-1.0, 3.0, 5, dtype=torch.float64, device=device)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", model.posterior(x))

    found = weight_diagnostics(model, guide, x, 100)
    torch.testing.assert_close(found.smoothed.log_evidence, model.log_evidence(x))
    torch.testing.assert_close(found.evidence.value, model.log_evidence(x))
    torch.testing.assert_close(found.effective_sample_size, torch.full_like(x, 100.0))
    assert bool(found.reliable.all())
    assert "k-hat at most 0.50 in 5 of 5 rows; effective sample size 100.0%" in repr(found)


@pytest.mark.parametrize("dim", [2, 3])
def test_a_maximum_inside_alone_has_the_shape_minus_two_over_the_dimension(dim):
    """A normal under a wider one. ArviZ draws the fitted shape of n towards 1/2 by ten draws."""
    generator = torch.Generator("cpu").manual_seed(0)
    z = torch.randn(4000, 50, dim, generator=generator, dtype=torch.float64, device="cpu") * 1.2
    k = pareto_k(-0.5 * (z.square() * (1 - 1 / 1.2**2)).sum(dim=-1))
    count = math.floor(3 * math.sqrt(4000))
    fitted = ((count + 10) * k - 5) / count
    assert float((fitted.mean() + 2 / dim).abs()) < 4 * float(fitted.std()) / math.sqrt(50) + 0.02


def test_a_maximum_inside_below_a_tail_deceives_k_hat(device):
    """The best gamma guide on the toy at x = -2, whose weights have a tail of shape 0.06."""
    model = ExponentialGaussian().to(device).double()
    concentration, rate = 1.0623, 3.7682
    params = torch.tensor([[concentration, rate]], dtype=torch.float64, device=device).log()
    guide = PerDatapoint(Gamma(), 1).to(device)
    guide.table("z").weight = torch.nn.Parameter(params)
    x = torch.full((1,), -2.0, dtype=torch.float64, device=device)
    gap = float(model.log_evidence(x)) - toy_elbo(Gamma(), params[0].cpu().tolist(), -2.0)
    assert gap == pytest.approx(0.0014, abs=5e-5)
    few = weight_diagnostics(model, guide, x, 10_000)
    assert float(few.pareto_k) > 3
    assert few.reliable.tolist() == [False]
    assert few.flat.tolist() == [True]
    assert float(few.effective_sample_size) / 10_000 == pytest.approx(0.998, abs=2e-3)
    assert sigmas(few.evidence.value, model.log_evidence(x), few.evidence.stderr) < 4
    assert "above with flat weights, where the effective sample size counts in 1 (0: " in repr(few)
    # Where the fitted tail lies beyond the maximum it has the tail's own shape.
    many = weight_diagnostics(model, guide, x, 40_000)
    assert many.reliable.tolist() == [True]
    assert float(many.pareto_k) == pytest.approx(1 - 1 / concentration, abs=0.2)


def test_the_words_count_the_rows_and_name_the_worst():
    k = torch.tensor([0.1, 0.9, torch.nan, 1.4, -torch.inf, 2.0])
    size = torch.tensor([900.0, 20.0, 1.0, 10.0, 1000.0, 950.0])
    value = torch.zeros(6)
    found = WeightDiagnostics(
        k,
        0.67,
        size,
        ppvae.Estimate(value, value, "lower", "iwae"),
        Smoothed(value, value, k),
        1000,
    )
    assert found.reliable.tolist() == [True, False, False, False, True, False]
    assert repr(found) == (
        "WeightDiagnostics(1000 draws a row: k-hat at most 0.67 in 2 of 6 rows; above in 2 "
        "(3: 1.40, 1: 0.90); above with flat weights, where the effective sample size counts in 1 "
        "(5: 2.00); unknown in 1 (2: nan); effective sample size 0.1% of the draws or more, 2.0% "
        "in the middle)"
    )


def test_what_is_refused(device):
    model, guide = ppvae.pairs.exponential_gaussian()
    x = torch.rand(5)
    with pytest.raises(ValueError, match="num_samples must be at least 25; got 24"):
        weight_diagnostics(model, guide, x, 24)
    for bad in (torch.zeros(10), torch.zeros(1, 3)):
        with pytest.raises(ValueError, match="weights: expected log weights of shape"):
            psis(bad)


def test_weights_that_differ_by_rounding_are_equal():
    noise = torch.randint(-1, 2, (2000, 1), generator=torch.Generator().manual_seed(0))
    unit = torch.finfo(torch.float32).eps * 4096  # of the last place between 4096 and 8192
    weights = -7500.0 + noise * unit
    assert float(weights.max() - weights.min()) > 1e-4
    assert float(ppvae.diagnostics.pareto_k(weights)) == -math.inf
    assert math.isfinite(float(ppvae.diagnostics.pareto_k(torch.randn(2000, 1) * 0.01)))
