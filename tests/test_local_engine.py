"""What the per-datapoint engine spends and what it reaches, against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import toy_elbo, toy_optimum

import ppvae
from ppvae.density import judging
from ppvae.families import DiagonalNormal, FullRankNormal, Gamma, LogNormal, TruncatedNormal
from ppvae.fisher import Table, tabulated_ascent
from ppvae.models import ExponentialGaussian, FactorAnalysis
from ppvae.natural import (
    GaussianElbo,
    _shares,
    best_of_draws,
    natural_ascent,
    other_modes,
    whitened_draws,
)


def strongly_correlated():
    torch.manual_seed(4)
    loadings, noise = torch.randn(12, 10), 0.5 * torch.ones(12)
    return FactorAnalysis(12, 10, loadings=loadings, noise=noise).double()


@pytest.mark.parametrize("full_rank", [False, True])
def test_a_linear_model_takes_few_evaluations_to_its_closed_form(full_rank):
    """Gaussian posteriors: log p − L = ½ (Σ log Λ_dd − log det Λ) of mean field, 0 of full rank."""
    model = strongly_correlated()
    x = (2 * torch.randn(60, 12)).double()
    family = (FullRankNormal if full_rank else DiagonalNormal)(10)
    fit = ppvae.fit_per_datapoint(model, family, x, num_samples=2)
    precision = model.posterior(x).precision_matrix
    loc, tril = family.gaussian(fit.guide.table("z").weight.detach())
    off = loc - model.posterior(x).mean
    # KL(q ‖ p(z | x)) of normals, which is log p(x) − L.
    spread = precision @ tril @ tril.mT
    kl = 0.5 * (
        torch.einsum("ni,nij,nj->n", off, precision, off)
        + spread.diagonal(dim1=-2, dim2=-1).sum(-1)
        - 10
        - torch.logdet(spread)
    )
    best = 0.5 * (precision.diagonal(dim1=-2, dim2=-1).log().sum(-1) - torch.logdet(precision))
    assert (kl - (0.0 if full_rank else best)).abs().max() < 1e-4
    assert fit.converged.all()
    assert fit.steps.max() <= 14


def worst_gap(family, x, fit):
    """Nats between a fit of the toy and the best of its family, over a few rows."""
    params = fit.guide.table("z").weight.detach()
    chosen = [int(x.argmin()), int(x.argmax()), *range(4)]
    return max(
        abs(toy_optimum(family, float(x[i])) - toy_elbo(family, params[i].double(), float(x[i])))
        for i in chosen
    )


@pytest.mark.parametrize("family", [LogNormal(), TruncatedNormal(), Gamma()], ids=repr)
def test_the_toy_is_at_its_optimum_after_as_many_evaluations_however_many_rows(family):
    model, spent = ExponentialGaussian(), []
    for size in (100, 3000):
        x = model(size=size)
        fit = ppvae.fit_per_datapoint(model, family, x, num_samples=2)
        assert fit.converged.all()
        spent.append(float(fit.steps.double().mean()))
    assert worst_gap(family, x, fit) < 1e-3
    assert max(spent) < 12
    assert abs(spent[0] - spent[1]) < 0.25 * spent[1]


def test_all_rows_of_the_toy_reach_the_evidence():
    """The posterior is a truncated normal: the worst row's gap is what the fit has left."""
    model = ExponentialGaussian()
    x = model(size=2000)
    fit = ppvae.fit_per_datapoint(model, TruncatedNormal(), x, num_samples=2)
    q = TruncatedNormal().distribution(fit.guide.table("z").weight.detach().double())
    log_p = -q.mean - 0.5 * ((x - q.mean) ** 2 + q.variance) - 0.5 * math.log(2 * math.pi)
    assert (model.log_evidence(x.double()) - log_p - q.entropy()).abs().max() < 1e-3


def test_draws_come_with_their_negatives():
    draws = whitened_draws(64, 20, torch.zeros(1).double())
    torch.testing.assert_close(draws[:32], -draws[32:])
    torch.testing.assert_close(draws.mT @ draws / 64, torch.eye(20).double(), rtol=0, atol=1e-12)


def test_the_scalar_step_is_newtons_of_the_quadrature():
    model, x = ExponentialGaussian(), torch.tensor([0.3, 2.0]).double()
    local = GaussianElbo(model, {"z": LogNormal()}, x)
    nodes = local.nodes(64, x)

    def objective(mean, log_scale):
        u = mean + torch.exp(log_scale) * nodes[0]
        log_p = local.log_density(x[:1], u[:, None])
        return (nodes[1] @ log_p)[0] + log_scale

    start = (torch.tensor(-0.3).double(), torch.tensor(-0.5).double())
    state = local.evaluate(x[:1], start[0].view(1, 1), start[1].exp().view(1, 1, 1), nodes)
    loc, tril, expected = local.scalar_step(state, torch.tensor([100.0]).double())
    slope = torch.stack(torch.autograd.functional.jacobian(objective, start))
    second = torch.tensor(torch.autograd.functional.hessian(objective, start)).double()
    assert (torch.linalg.eigvalsh(second) < 0).all()
    step = -torch.linalg.solve(second, slope)
    torch.testing.assert_close(loc[0, 0], start[0] + step[0], rtol=1e-4, atol=1e-6)
    grown = tril[0, 0, 0].log() - start[1]
    torch.testing.assert_close(grown, step[1].clamp(-1, 1), rtol=1e-4, atol=1e-6)
    assert expected[0] >= 0.5 * slope @ step - 1e-9


def test_the_shares_of_noise_are_those_of_a_simulation():
    rates, left = [0.6, 0.4, 0.3, 0.24], 0.5
    torch.manual_seed(0)
    count = 200_000
    iterate = left**0.5 * torch.randn(count).double()
    steps = []
    for rate in rates:
        steps.append(torch.randn(count).double() - iterate)
        iterate = iterate + rate * steps[-1]
    stacked = torch.stack(steps)
    mean = stacked.mean(dim=0)
    parts = [mean**2, ((stacked - mean) ** 2).mean(dim=0), iterate**2]
    for share, part in zip(_shares(rates, left), parts, strict=True):
        assert abs(share - float(part.mean())) < 5 * float(part.std()) / count**0.5


def squared(x):
    """z is seen through its square, in three dimensions: eight modes, or none where x is low."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z**2, 0.4).to_event(1), obs=x)


def test_single_points_find_the_modes_that_a_climb_stays_between():
    x = torch.tensor([[3.0, 3.0, 3.0], [-6.0, -6.0, -6.0]]).double()
    local = GaussianElbo(squared, {"z": DiagonalNormal(3)}, x)
    with judging(0, x):
        eye = torch.eye(3).double().expand(2, 3, 3)
        climb = natural_ascent(local, x, torch.zeros(2, 3).double(), eye, 128, 60, 1e-3)
        elsewhere, modes = other_modes(local, x, climb, best_of_draws(local, x)[None])
    # p ∝ exp(−½ z² − (z² − 3)² / 0.32): z² = 3 − 0.08 at the modes.
    assert elsewhere[0].tolist() == [True, False]
    torch.testing.assert_close(modes[0, 0] ** 2, torch.full((3,), 2.92).double(), rtol=0.1, atol=0)
    fit = ppvae.fit_per_datapoint(squared, DiagonalNormal(3), x)
    loc = fit.guide.table("z").weight.detach()[0, :3]
    assert ((loc**2 - 2.9).abs() < 0.2).all()


def test_a_tables_derivatives_are_those_of_its_value():
    """In float64, by central differences; the value is the closed form's."""
    u = torch.linspace(-20.0, 3.0, 201).double()[:, None]
    x, params = torch.tensor([1.2]).double(), torch.tensor([[0.3, -0.2]]).double()
    log_p = -u.exp() - 0.5 * (x - u.exp()) ** 2 - 0.5 * math.log(2 * math.pi)
    table = Table(TruncatedNormal(), u.exp(), u + math.log(23 / 200), log_p)
    value, gradient, second = table.moments(params)
    assert abs(float(value) - toy_elbo(TruncatedNormal(), params[0], 1.2)) < 1e-6
    for i, shift in enumerate(1e-5 * torch.eye(2).double()):
        above, below = table.moments(params + shift), table.moments(params - shift)
        torch.testing.assert_close((above[0] - below[0]) / 2e-5, gradient[:, i])
        torch.testing.assert_close((above[1] - below[1]) / 2e-5, second[:, i])
    end, reached, gain, _ = tabulated_ascent(table, params, 60, 1e-6)
    assert abs(float(reached - ExponentialGaussian().log_evidence(x))) < 1e-6
    assert float(gain) < 1e-6
    torch.testing.assert_close(end, torch.tensor([[0.2, 0.0]]).double(), rtol=0, atol=1e-3)
