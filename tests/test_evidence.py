"""Estimates of the evidence against exact answers."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import sigmas
from scipy import stats

import ppvae
from ppvae import pairs
from ppvae.diagnostics import effective_sample_size, pareto_k, pareto_k_threshold
from ppvae.families import DiagonalNormal, TruncatedNormal
from ppvae.models import VAE, ExponentialGaussian, FactorAnalysis
from ppvae.nn import MLP

TOY = torch.tensor([-20.0, -2.0, 0.0, 0.5, 1.5, 3.0, 5.0, 100.0]).double()


def test_the_importance_weighted_bound_rises_to_the_evidence_and_stays_below():
    torch.manual_seed(0)
    model = FactorAnalysis(6, 3, loadings=torch.randn(6, 3), noise=0.7 * torch.ones(6)).double()
    x = 1.5 * torch.randn(100, 6).double()
    fit = ppvae.fit_per_datapoint(model, DiagonalNormal(3), x)
    exact = model.log_evidence(x)
    means, errors = [], []
    for count in (1, 4, 16, 64, 256):
        # The bound of `count` draws is an expectation: estimated over 100 independent groups.
        weights = ppvae.log_weights(model, fit.guide, x, 100 * count).reshape(100, count, -1)
        groups = torch.logsumexp(weights, dim=1) - math.log(count)
        means.append(groups.mean())
        errors.append(groups.std(0).square().mean().div(100 * len(x)).sqrt())
    for low, high, a, b in zip(means[:-1], means[1:], errors[:-1], errors[1:], strict=True):
        assert high - low > -4 * torch.hypot(a, b)
    assert means[2] - means[0] > 4 * torch.hypot(errors[0], errors[2])
    assert (torch.stack(means) < exact.mean() + 4 * torch.stack(errors)).all()


def test_the_errors_of_elbo_and_iwae_are_the_spread_of_repetitions():
    model, guide = pairs.exponential_gaussian(TruncatedNormal())
    x = torch.tensor([0.5, 2.0])
    for estimator in (ppvae.elbo, ppvae.iwae):
        runs = [estimator(model, guide, x, 500, seed=seed) for seed in range(200)]
        spread = torch.stack([r.value for r in runs]).std(0)
        claimed = torch.stack([r.stderr for r in runs]).mean(0)
        # The sd of 200 repetitions is known to 5 %.
        torch.testing.assert_close(claimed, spread, rtol=0.25, atol=0)


def test_monte_carlo_error_falls_with_the_root_of_the_draws():
    model, guide = pairs.exponential_gaussian(TruncatedNormal())
    x = torch.rand(20) * 3
    few, many = (ppvae.elbo(model, guide, x, count).stderr.mean() for count in (400, 40_000))
    assert abs(float(few / many) - 10) < 1


def test_quadrature_is_the_toys_evidence():
    estimate = ppvae.quadrature(ExponentialGaussian(), TOY, tolerance=1e-10)
    torch.testing.assert_close(
        estimate.value, ExponentialGaussian().log_evidence(TOY), rtol=0, atol=1e-10
    )
    assert estimate.bound == "exact"
    assert estimate.stderr.max() < 1e-10


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("noise", [0.02, 1.0])
def test_quadrature_is_factor_analysis_evidence(dims, noise):
    torch.manual_seed(2)
    model = FactorAnalysis(
        4, dims, loadings=torch.randn(4, dims), noise=noise * torch.ones(4)
    ).double()
    x = 3 * torch.randn(12, 4).double()
    estimate = ppvae.quadrature(model, x, tolerance=1e-9)
    exact = model.log_evidence(x)
    assert ((estimate.value - exact).abs() < 1e-9 * exact.abs().clamp(min=1.0)).all()


def test_quadrature_finds_posteriors_far_from_the_prior_and_two_modes():
    def far(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 0.001), obs=x)

    x = torch.tensor([40.0, -7.0]).double()
    exact = stats.norm(0, math.sqrt(1 + 1e-6)).logpdf(x.numpy())
    torch.testing.assert_close(
        ppvae.quadrature(far, x).value, torch.as_tensor(exact), rtol=0, atol=1e-6
    )

    def bimodal(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z**2, 0.3), obs=x)

    u = torch.linspace(-8, 8, 100_001).double()
    grid = dist.Normal(0.0, 1.0).log_prob(u) + dist.Normal(u**2, 0.3).log_prob(x[:, None] / 10)
    direct = torch.trapezoid(grid.exp(), u).log()
    torch.testing.assert_close(
        ppvae.quadrature(bimodal, x / 10, tolerance=1e-8).value, direct, rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize(
    "prior",
    [dist.Beta(2.0, 3.0), dist.Gamma(3.0, 2.0), dist.HalfCauchy(1.0), dist.Uniform(-1.0, 3.0)],
    ids=["Beta", "Gamma", "HalfCauchy", "Uniform"],
)
def test_quadrature_follows_any_support(prior):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.tensor([0.3, 2.0]).double()
    draws = prior.sample((400_000,)).double()
    weights = dist.Normal(draws[:, None], 0.5).log_prob(x).exp()
    error = weights.std(0) / weights.mean(0) / 400_000**0.5
    value = ppvae.quadrature(model, x).value
    assert ((value - weights.mean(0).log()).abs() < 5 * error).all()


def test_quadrature_agrees_with_importance_weighting_on_a_decoder():
    torch.manual_seed(0)
    model = VAE(20, 2, MLP(2, [16], 20), ppvae.likelihoods.Bernoulli())
    x = (torch.rand(6, 20) > 0.5).float()
    fit = ppvae.fit_per_datapoint(model, DiagonalNormal(2), x)
    weighted = ppvae.iwae(model, fit.guide, x, 20_000)
    exact = ppvae.quadrature(model, x)
    assert sigmas(weighted.value, exact.value, weighted.stderr) < 5
    assert exact.stderr.max() < 1e-4


def test_quadrature_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="at most 2 latent dimensions.*has 3.*iwae"):
        ppvae.quadrature(FactorAnalysis(6, 3), torch.zeros(2, 6))

    def discrete(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Poisson(3.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="'z'.*Poisson.*discrete"):
        ppvae.quadrature(discrete, torch.zeros(2))


def test_an_estimate_speaks_of_its_error_and_side():
    model, guide = pairs.exponential_gaussian()
    estimate = ppvae.iwae(model, guide, torch.rand(5), 50)
    assert "lower bound" in repr(estimate)
    assert "5 data" in repr(estimate)
    by_hand = float(estimate.stderr.square().sum().sqrt() / 5)
    assert math.isclose(estimate.mean_stderr, by_hand, rel_tol=1e-5)
    with pytest.raises(ValueError, match="num_samples must be at least 2; got 1"):
        ppvae.elbo(model, guide, torch.rand(5), 1)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_pareto_k_is_the_tail_of_the_weights(k):
    """Weights from a generalised Pareto distribution of shape k, column by column."""
    torch.manual_seed(0)
    weights = torch.as_tensor(stats.genpareto(k).rvs((20_000, 8), random_state=1)).log()
    estimate = pareto_k(weights)
    assert (estimate - k).abs().max() < 0.2
    assert abs(float(estimate.mean()) - k) < 0.06


def test_pareto_k_is_per_row_and_knows_constant_weights():
    """Pyro's own diagnostic gives one figure for a batch, that grows with the batch."""
    model = ExponentialGaussian()
    x = torch.tensor([0.0, 1.0, 2.0])

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", model.posterior(x))

    assert torch.isneginf(pareto_k(ppvae.log_weights(model.double(), guide, x.double(), 500))).all()
    weights = torch.randn(500, 3)
    alone = torch.cat([pareto_k(weights[:, [row]]) for row in range(3)])
    assert torch.equal(pareto_k(weights), alone)
    weights[:, 1] = -torch.inf
    assert torch.isnan(pareto_k(weights)).tolist() == [False, True, False]
    assert pareto_k_threshold(10_000) == 0.7
    assert pareto_k_threshold(100) == 0.5


def test_effective_sample_size_counts_the_draws_that_matter():
    weights = torch.full((100, 2), -torch.inf)
    weights[:25, 0] = 3.0
    weights[0, 1] = -1.0
    torch.testing.assert_close(effective_sample_size(weights), torch.tensor([25.0, 1.0]))
