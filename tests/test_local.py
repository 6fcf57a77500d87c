"""The per-datapoint engine against optima known in closed form or by quadrature."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import POSITIVE_FAMILIES, toy_elbo, toy_optimum

import ppvae
from ppvae import pairs
from ppvae.families import DiagonalNormal, FullRankNormal, Gamma, LogNormal, TruncatedNormal
from ppvae.models import PPCA, VAE, ExponentialGaussian, FactorAnalysis
from ppvae.natural import whitened_draws

XS = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.5, 3.0, 5.0]).double()


@pytest.mark.parametrize("name", POSITIVE_FAMILIES)
def test_the_toys_optimum_in_every_family(name):
    family = POSITIVE_FAMILIES[name]()
    fit = ppvae.fit_per_datapoint(ExponentialGaussian(), family, XS)
    assert fit.converged.all()
    params = fit.guide.table("z").weight.detach()
    for row, x in enumerate(XS.tolist()):
        reached = toy_elbo(family, params[row], x)
        assert abs(reached - toy_optimum(family, x)) < 2e-3
        assert abs(float(fit.elbo[row]) - reached) < 4 * float(fit.elbo_stderr[row]) + 1e-6


def test_a_truncated_normal_closes_the_toys_gap():
    model = ExponentialGaussian()
    fit = ppvae.fit_per_datapoint(model, TruncatedNormal(), XS)
    params = fit.guide.table("z").weight.detach()
    gaps = [
        float(model.log_evidence(XS[row]))
        - toy_elbo(TruncatedNormal(), params[row], float(XS[row]))
        for row in range(len(XS))
    ]
    assert max(map(abs, gaps)) < 1e-4


def log_normal_elbo(params, x):
    """The toy's ELBO at a log-normal, in closed form through its first two moments."""
    loc, log_scale = params.T
    first = torch.exp(loc + torch.exp(2 * log_scale) / 2)
    second = torch.exp(2 * loc + 2 * torch.exp(2 * log_scale))
    entropy = loc + log_scale + 0.5 * math.log(2 * math.pi * math.e)
    return -first - 0.5 * (x**2 - 2 * x * first + second) - 0.5 * math.log(2 * math.pi) + entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_row_of_many_is_left_behind(dtype):
    x = (torch.rand(2000) * 9 - 4).to(dtype)
    fit = ppvae.fit_per_datapoint(ExponentialGaussian(), LogNormal(), x, num_samples=100)
    assert fit.converged.all()
    params = fit.guide.table("z").weight.detach().double()
    reached = log_normal_elbo(params, x.double())
    best = params.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([best], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for _ in range(1000):
        optimizer.zero_grad()
        (-log_normal_elbo(best, x.double()).sum()).backward()
        optimizer.step()
        schedule.step()
    assert (log_normal_elbo(best, x.double()).detach() - reached).max() < 5e-4


def linear_models():
    torch.manual_seed(4)
    return [
        FactorAnalysis(12, 3, loadings=torch.randn(12, 3), noise=0.3 + torch.rand(12)).double(),
        # Random loadings of many latents: strongly correlated posteriors, where a diagonal
        # natural-gradient step crawls.
        FactorAnalysis(12, 10, loadings=torch.randn(12, 10), noise=0.5 * torch.ones(12)).double(),
        PPCA(8, 4, loadings=torch.randn(8, 4), noise=torch.tensor(0.4)).double(),
    ]


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("full_rank", [False, True])
def test_linear_gaussian_optima_are_the_closed_form(case, full_rank):
    """Full rank: the posterior. Mean field: its mean, and its precision's diagonal inverted."""
    model = linear_models()[case]
    x = (2 * torch.randn(40, model.x_dim)).double()
    family = (FullRankNormal if full_rank else DiagonalNormal)(model.z_dim)
    fit = ppvae.fit_per_datapoint(model, family, x)
    assert fit.converged.all()
    loc, tril = family.gaussian(fit.guide.table("z").weight.detach())
    posterior = model.posterior(x)
    torch.testing.assert_close(loc, posterior.mean, rtol=1e-5, atol=1e-5)
    precision = posterior.precision_matrix[0]
    best = torch.linalg.inv(precision) if full_rank else torch.diag(1 / precision.diagonal())
    torch.testing.assert_close(tril @ tril.mT, best.expand(40, -1, -1), rtol=1e-3, atol=1e-5)


def linear_elbo(model, x, loc, tril):
    """The ELBO of a linear-Gaussian model at N(loc, tril trilᵀ), in closed form."""
    W, noise = model.loadings, model.noise
    covariance = tril @ tril.mT
    residual = (x - model.loc - loc @ W.mT) / noise
    spread = torch.einsum("xi,nij,xj,x->n", W, covariance, W, 1 / noise**2)
    log_x = -0.5 * ((residual**2).sum(-1) + spread + (2 * math.pi * noise**2).log().sum())
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    d = W.shape[1]
    log_z = -0.5 * ((loc**2).sum(-1) + trace + d * math.log(2 * math.pi))
    entropy = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * d * math.log(
        2 * math.pi * math.e
    )
    return log_x + log_z + entropy


def test_the_mean_field_gap_of_factor_analysis_is_the_closed_form():
    """log p − L[q*] = ½ (Σ log Λ_dd − log det Λ), with Λ the posterior's precision."""
    model = linear_models()[0]
    x = (2 * torch.randn(400, 12)).double()
    precision = model.posterior(x).precision_matrix[0]
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    family = DiagonalNormal(3)
    fit = ppvae.fit_per_datapoint(model, family, x)
    reached = linear_elbo(model, x, *family.gaussian(fit.guide.table("z").weight.detach())).detach()
    assert (model.log_evidence(x) - reached - gap).abs().max() < 1e-6
    error = float(fit.elbo_stderr.square().sum().sqrt()) / len(x)
    assert abs(float((fit.elbo - reached).mean())) < 4 * error
    full = ppvae.fit_per_datapoint(model, FullRankNormal(3), x[:50])
    assert (model.log_evidence(x[:50]) - full.elbo).abs().max() < 1e-3


def test_from_a_far_start_each_row_finds_its_way():
    """Rows whose posteriors lie tens of prior deviations away, and narrow."""
    model = FactorAnalysis(
        3, 3, loadings=torch.eye(3), noise=torch.tensor([0.01, 0.1, 1.0])
    ).double()
    x = torch.tensor([[40.0, -40.0, 5.0], [0.0, 0.0, 0.0], [-3.0, 90.0, 1.0]]).double()
    for family in (DiagonalNormal(3), FullRankNormal(3)):
        fit = ppvae.fit_per_datapoint(model, family, x)
        assert fit.converged.all()
        torch.testing.assert_close(
            family.gaussian(fit.guide.table("z").weight.detach())[0], model.posterior(x).mean
        )


class Bent(torch.nn.Module):
    """A decoder under which the posterior is curved, and for some rows has two modes."""

    def forward(self, z):
        return torch.stack([z[..., 0] ** 2, z[..., 0] + z[..., 1], z[..., 1].sin()], dim=-1)


def exact_objective(model, x, family, params):
    """The ELBO over a two-dimensional Gaussian by a product rule of 60 nodes an axis."""
    node, weight = np.polynomial.hermite_e.hermegauss(60)
    grid = torch.as_tensor(np.stack(np.meshgrid(node, node), -1).reshape(-1, 2))
    weights = torch.as_tensor(np.outer(weight, weight).reshape(-1) / weight.sum() ** 2)
    loc, tril = family.gaussian(params)
    z = loc + torch.einsum("nij,sj->sni", tril, grid)
    log_p = ppvae.density.joint(model, x, {"z": z})
    return weights @ log_p + family.distribution(params).entropy()


@pytest.mark.parametrize("full_rank", [False, True])
@pytest.mark.fills_store
def test_nothing_is_left_to_climb_on_a_bent_posterior(full_rank):
    torch.manual_seed(0)
    model = VAE(3, 2, Bent(), ppvae.likelihoods.Gaussian(0.7)).double()
    x = (torch.randn(10, 3) * 1.5).double()
    family = (FullRankNormal if full_rank else DiagonalNormal)(2)
    fit = ppvae.fit_per_datapoint(model, family, x)
    assert fit.converged.all()
    params = fit.guide.table("z").weight.detach().clone().requires_grad_(True)
    end = exact_objective(model, x, family, params).detach()
    optimizer = torch.optim.Adam([params], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        optimizer.zero_grad()
        (-exact_objective(model, x, family, params).sum()).backward()
        optimizer.step()
        schedule.step()
    assert (exact_objective(model, x, family, params).detach() - end).max() < 1e-3
    drawn = fit.elbo - end
    assert (drawn.abs() < 5 * fit.elbo_stderr).all()


def trained_digits_vae():
    digits = ppvae.data.load("digits")
    torch.manual_seed(0)
    model, guide = pairs.vae(64, 8, [64])
    ppvae.fit(model, guide, digits.train, steps=600, lr=3e-3, progress=False)
    return model, guide, digits.test[:60]


def test_a_warm_and_a_cold_start_agree_and_beat_the_encoder():
    model, guide, x = trained_digits_vae()
    warm = ppvae.fit_per_datapoint(model, None, x, init=guide)
    cold = ppvae.fit_per_datapoint(model, DiagonalNormal(8), x, seed=9)
    common = [ppvae.log_weights(model, g, x, 2000) for g in (warm.guide, cold.guide, guide)]
    difference = common[0] - common[1]
    error = difference.std(0) / 2000**0.5
    assert (difference.mean(0) > -4 * error - 5e-3).all()
    assert abs(float(difference.mean())) < 0.02
    gain = common[0] - common[2]
    assert (gain.mean(0) > -4 * gain.std(0) / 2000**0.5).all()
    assert set(warm.start.tolist()) <= {0, 1, 2}
    assert set(cold.start.tolist()) <= {1, 2}
    assert warm.converged.double().mean() > 0.9
    # The Gaussian optimum does not depend on the draws that found it.
    other = ppvae.fit_per_datapoint(model, None, x, init=guide, seed=77)
    again = ppvae.log_weights(model, other.guide, x, 2000) - common[0]
    assert abs(float(again.mean())) < 2e-3


def test_chunks_of_rows_do_not_change_the_answer(monkeypatch):
    model = linear_models()[0]
    x = torch.randn(50, 12).double()
    whole = ppvae.fit_per_datapoint(model, DiagonalNormal(3), x)
    monkeypatch.setattr(ppvae.density, "_ELEMENTS", 5_000)
    chunked = ppvae.fit_per_datapoint(model, DiagonalNormal(3), x)
    assert len(ppvae.density.row_chunks(x, 64)) > 1
    for name in ("elbo", "predicted_gain", "converged", "steps"):
        assert getattr(chunked, name).shape == (50,)
    torch.testing.assert_close(
        chunked.guide.table("z").weight, whole.guide.table("z").weight, rtol=1e-4, atol=1e-4
    )


def test_a_row_that_had_too_few_steps_is_not_called_converged():
    model = FactorAnalysis(2, 2, loadings=torch.eye(2), noise=0.01 * torch.ones(2))
    x = torch.tensor([[50.0, -50.0], [0.0, 0.0]])
    fit = ppvae.fit_per_datapoint(model, DiagonalNormal(2), x, max_steps=2)
    assert not fit.converged[0]
    assert "did not converge: raise max_steps" in fit.status
    short = ppvae.fit_per_datapoint(
        ExponentialGaussian(), Gamma(), torch.tensor([200.0]), max_steps=1
    )
    assert not short.converged[0]


@pytest.mark.parametrize("family", [LogNormal(), Gamma()], ids=repr)
def test_a_start_that_overflows_is_left_for_the_cold_one(family):
    model, x = ExponentialGaussian(), torch.tensor([1.0, 2.0])
    bad = ppvae.PerDatapoint(family, 2)
    with torch.no_grad():
        bad.table("z").weight[0] = 200.0
    fit = ppvae.fit_per_datapoint(model, None, x, init=bad)
    cold = ppvae.fit_per_datapoint(model, family, x)
    assert fit.start[0] > 0
    assert fit.converged[0]
    torch.testing.assert_close(fit.elbo, cold.elbo, rtol=0, atol=0.05)


def test_several_sites_are_fitted_together():
    def model(x):
        with pyro.plate("rows", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            mean = torch.stack([a + b[..., 0], b[..., 0] - b[..., 1], a], dim=-1)
            pyro.sample("x", dist.Normal(mean, 0.8).to_event(1), obs=x)

    x = torch.randn(6, 3).double()
    A = torch.tensor([[1.0, 1, 0], [0, 1, -1], [1, 0, 0]]).double()
    precision = torch.eye(3).double() + A.mT @ A / 0.64
    mean = torch.linalg.solve(precision, A.mT @ x.mT / 0.64).mT
    fit = ppvae.fit_per_datapoint(model, {"a": DiagonalNormal(), "b": FullRankNormal(2)}, x)
    loc_a, tril_a = fit.guide.families["a"].gaussian(fit.guide.table("a").weight.detach())
    loc_b, tril_b = fit.guide.families["b"].gaussian(fit.guide.table("b").weight.detach())
    torch.testing.assert_close(torch.cat([loc_a, loc_b], -1), mean)
    # The optimum of a block structure inverts the blocks of the precision.
    torch.testing.assert_close((tril_a**2)[0, 0], 1 / precision[:1, 0])
    torch.testing.assert_close((tril_b @ tril_b.mT)[0], torch.linalg.inv(precision[1:, 1:]))


def test_draws_are_whitened():
    draws = whitened_draws(64, 5, torch.zeros(1).double())
    torch.testing.assert_close(draws.mean(0), torch.zeros(5).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(draws.mT @ draws / 64, torch.eye(5).double(), rtol=0, atol=1e-12)
    assert not torch.equal(draws, whitened_draws(64, 5, torch.zeros(1).double()))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: ppvae.fit_per_datapoint(m, None, x), ["Give a family"]),
        (lambda m, x: ppvae.fit_per_datapoint(m, DiagonalNormal(), x), ["'real'", "'positive'"]),
        (lambda m, x: ppvae.fit_per_datapoint(m, {"w": Gamma()}, x), ["['z']", "['w']"]),
        (lambda m, x: ppvae.fit_per_datapoint(m, Gamma(), x, num_draws=2), ["num_draws", "2"]),
        (lambda m, x: ppvae.fit_per_datapoint(m, Gamma(), x, max_steps=0), ["max_steps"]),
        (
            lambda m, x: ppvae.fit_per_datapoint(
                m, Gamma(), x, init=pairs.exponential_gaussian(LogNormal())[1]
            ),
            ["'z'", "LogNormal()", "Gamma()", "init"],
        ),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError) as error:
        call(ExponentialGaussian(), torch.rand(4))
    for word in words:
        assert word in str(error.value)


def test_a_gamma_with_a_large_concentration_is_not_called_done_too_early():
    """Its two parameters are nearly one direction there, which is no direction of no effect."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), 0.2))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    x = torch.tensor([5.0, 20.0, 60.0], dtype=torch.float64)
    fit = ppvae.fit_per_datapoint(model, Gamma(), x)
    exact = ppvae.quadrature(model, x).value
    assert bool(fit.converged.all())
    # A posterior this narrow is nearly normal, and so is a gamma of large concentration.
    assert float((exact - fit.elbo).abs().max()) < 0.005
