"""Generative processes against closed forms and against independent integration."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import integrate, stats

import ppvae
from ppvae.likelihoods import Bernoulli, Gaussian
from ppvae.models import PPCA, VAE, ExponentialGaussian, FactorAnalysis
from ppvae.nn import MLP, Table


@pytest.mark.parametrize("x", [-2.0, 0.0, 1.5, 5.0])
def test_the_toys_evidence_and_posterior_are_the_integrals(x):
    def joint(z):
        return math.exp(-z - 0.5 * (x - z) ** 2) / math.sqrt(2 * math.pi)

    total, _ = integrate.quad(joint, 0, 60, points=[max(x - 1, 0.1)], epsabs=1e-14)
    mean, _ = integrate.quad(lambda z: z * joint(z) / total, 0, 60, points=[max(x - 1, 0.1)])
    model, row = ExponentialGaussian(), torch.tensor([x]).double()
    assert abs(float(model.log_evidence(row)) - math.log(total)) < 1e-10
    assert abs(float(model.posterior(row).mean) - mean) < 1e-8


@pytest.mark.parametrize("kind", [FactorAnalysis, PPCA])
def test_linear_gaussian_evidence_and_posterior(kind):
    model = kind(5, 3).double()
    with torch.no_grad():
        model.loc.copy_(torch.randn(5))
        model.noise_unconstrained.copy_(0.3 * torch.randn_like(model.noise_unconstrained))
    x = torch.randn(8, 5).double()
    W, noise = model.loadings.detach(), model.noise.detach().expand(5)
    covariance = W @ W.mT + torch.diag(noise**2)
    marginal = stats.multivariate_normal(model.loc.detach().numpy(), covariance.numpy())
    np.testing.assert_allclose(model.log_evidence(x).detach(), marginal.logpdf(x), rtol=1e-10)
    # Bayes' rule at an arbitrary z: log p(x, z) − log p(z | x) = log p(x).
    z = torch.randn(8, 3).double()
    ratio = ppvae.log_joint(model, x, z) - model.posterior(x).log_prob(z)
    torch.testing.assert_close(ratio, model.log_evidence(x))


@pytest.mark.parametrize("kind", [FactorAnalysis, PPCA])
def test_given_parameters_are_held_fixed(kind):
    W = torch.randn(5, 2)
    noise = torch.full((5,) if kind is FactorAnalysis else (), 0.3)
    model = kind(5, 2, loadings=W, noise=noise, loc=torch.ones(5))
    torch.testing.assert_close(model.noise, noise)
    assert torch.equal(model.loadings, W)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in kind(5, 2).parameters())
    with pytest.raises(ValueError, match=r"loadings: expected shape \(5, 2\); got \(2, 5\)"):
        kind(5, 2, loadings=W.mT)
    with pytest.raises(ValueError, match="positive"):
        kind(5, 2, noise=-noise)


@pytest.mark.parametrize("kind", [FactorAnalysis, PPCA])
@pytest.mark.fills_store
def test_what_is_held_fixed_stays_so_when_the_model_runs(kind):
    """Pyro's store turns gradients on for what it is given, also outside of training."""
    noise = torch.full((5,) if kind is FactorAnalysis else (), 0.3)
    model = kind(5, 2, loadings=torch.randn(5, 2), noise=noise, loc=torch.ones(5))
    x = model(size=20)
    assert not x.requires_grad
    assert not any(p.requires_grad for p in model.parameters())
    before = [p.clone() for p in model.parameters()]
    _, guide = getattr(ppvae.pairs, "ppca" if kind is PPCA else "factor_analysis")(5, 2)
    ppvae.fit(model, guide, x, steps=3, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def simulated():
    torch.manual_seed(0)
    return {
        "toy": (ExponentialGaussian(), 1.0, 2.0),
        "fa": (FactorAnalysis(1, 1, loadings=torch.full((1, 1), 2.0)), 0.0, 5.0),
    }


@pytest.mark.parametrize("name", ["toy", "fa"])
@pytest.mark.fills_store
def test_draws_from_the_model_have_its_moments(name):
    model, mean, variance = simulated()[name]
    x = model(size=50_000).detach().flatten()
    assert abs(float(x.mean()) - mean) < 5 * (variance / 50_000) ** 0.5
    error = float((x - mean).square().std()) / 50_000**0.5
    assert abs(float(x.var()) - variance) < 5 * error


@pytest.mark.parametrize(
    ("likelihood", "x_dim"),
    [
        (Bernoulli(), 4),
        (Gaussian(0.3), 4),
        (Gaussian.learned(0.3), 4),
        (Gaussian.per_dimension(4, 0.3), 4),
        (Gaussian.network(), 4),
    ],
    ids=repr,
)
def test_a_vaes_joint_is_prior_plus_likelihood_with_all_constants(likelihood, x_dim):
    decoder = MLP(2, [6], likelihood.num_outputs(x_dim), torch.nn.Tanh)
    model = VAE(x_dim, 2, decoder, likelihood).double()
    x = torch.randint(0, 2, (5, x_dim)).double()
    z = torch.randn(3, 5, 2).double()
    output = decoder(z).detach().numpy()
    if isinstance(likelihood, Bernoulli):
        p = 1 / (1 + np.exp(-output))
        log_x = stats.bernoulli(p).logpmf(x.numpy())
    elif likelihood.kind == "network":
        mean, log_variance = output[..., :x_dim], output[..., x_dim:]
        log_x = stats.norm(mean, np.exp(0.5 * log_variance)).logpdf(x.numpy())
    else:
        log_x = stats.norm(output, 0.3).logpdf(x.numpy())
    expected = log_x.sum(-1) + stats.norm().logpdf(z.numpy()).sum(-1)
    ours = ppvae.log_joint(model, x, z).detach()
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_the_lectures_gaussian_network_is_one_configuration():
    """h = tanh(W₃ z + b₃), μ = W₄ h + b₄, log σ² = W₅ h + b₅."""
    model, _ = ppvae.pairs.vae(6, 2, [9], Gaussian.network(), activation=torch.nn.Tanh)
    z = torch.randn(4, 2)
    first, _, last = model.decoder.layers
    h = torch.tanh(z @ first.weight.mT + first.bias)
    mean = h @ last.weight[:6].mT + last.bias[:6]
    log_variance = h @ last.weight[6:].mT + last.bias[6:]
    member = model.likelihood.distribution(model.decoder(z))
    torch.testing.assert_close(member.mean, mean)
    torch.testing.assert_close(member.variance, log_variance.exp())


def test_learned_scales_are_parameters_and_fixed_ones_are_not():
    assert list(Gaussian(0.2).parameters()) == []
    assert [p.shape for p in Gaussian.learned().parameters()] == [()]
    assert [p.shape for p in Gaussian.per_dimension(7).parameters()] == [(7,)]
    assert list(Gaussian.network().parameters()) == []


@pytest.mark.fills_store
def test_a_bernoulli_likelihood_refuses_grey():
    model, _ = ppvae.pairs.vae(4, 2, [5])
    x = torch.tensor([[0.0, 1.0, 0.5, 1.0]])
    with pytest.raises(ValueError, match=r'"x".*0 and 1 alone.*0\.5.*[Bb]inarise'):
        model(x)
    with pytest.raises(ValueError, match="0 and 1 alone"):
        ppvae.elbo(*ppvae.pairs.vae(4, 2, [5]), x)
    gaussian, guide = ppvae.pairs.vae(4, 2, [5], "gaussian")
    assert torch.isfinite(ppvae.elbo(gaussian, guide, x).value).all()


def test_calls_without_rows_or_with_rows_of_another_shape_are_refused():
    model = FactorAnalysis(5, 2)
    for arguments in ({}, {"size": 0}):
        with pytest.raises(ValueError, match="FactorAnalysis.*size=n"):
            model(**arguments)
    with pytest.raises(ValueError, match=r"expected x of shape \(batch, 5\); got \(3, 4\)"):
        model(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="size=4 but x has 3 rows"):
        model(torch.zeros(3, 5), size=4)


def test_wrong_sizes_are_refused_at_construction():
    with pytest.raises(ValueError, match=r"decoder: expected outputs of shape \(batch, 4\)"):
        VAE(4, 2, MLP(2, [3], 5), Bernoulli())
    with pytest.raises(ValueError, match="likelihood: expected 'bernoulli'"):
        ppvae.pairs.vae(4, 2, likelihood="poisson")
    with pytest.raises(ValueError, match="positive"):
        FactorAnalysis(0, 2)
    with pytest.raises(ValueError, match="scale must be positive"):
        Gaussian(0.0)
    with pytest.raises(ValueError, match=r"rows of size 3.*\(5, 2\)"):
        MLP(3, [], 1)(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="MLP sizes"):
        MLP(3, [0], 1)
    with pytest.raises(ValueError, match="num_data"):
        Table(0, 2)


@pytest.mark.parametrize("pair", ["exponential_gaussian", "factor_analysis", "ppca", "vae"])
@pytest.mark.fills_store
def test_networks_accept_leading_dimensions(pair):
    kwargs = {"x_dim": 6, "z_dim": 2, "hidden": [5]} if pair == "vae" else {}
    model, _ = getattr(ppvae.pairs, pair)(**kwargs)
    with torch.no_grad():
        x = model(size=3)
        z = poutine.trace(model).get_trace(size=3).nodes["z"]["value"]
    many = ppvae.log_joint(model, x, torch.stack([z, 2 * z]))
    one_by_one = [ppvae.log_joint(model, x, z), ppvae.log_joint(model, x, 2 * z)]
    torch.testing.assert_close(many, torch.stack(one_by_one))


@pytest.mark.fills_store
def test_the_prior_is_standard_normal():
    model, _ = ppvae.pairs.vae(6, 2, [5])
    trace = poutine.trace(poutine.block(model, hide_types=["param"])).get_trace(size=3)
    prior = trace.nodes["z"]["fn"]
    z = torch.randn(3, 2)
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(prior.log_prob(z), expected)
