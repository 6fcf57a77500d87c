"""Guides that somebody else wrote: freed by their distributions, or refused with a way out."""

import copy
import io
import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as flows
import pytest
import torch
from laws import sigmas
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro.nn import PyroModule, PyroParam
from scipy import optimize
from torch import nn
from torch.distributions import kl_divergence, transforms

import ppvae
from ppvae.families import DiagonalNormal, DistributionFamily, FullRankNormal
from ppvae.guides import per_datapoint

# What the fit of a row may leave, in nats: `fit_per_datapoint`'s tolerance.
TOLERANCE = 1e-3


@pytest.fixture(autouse=True)
def double():
    """The claims are exact, and so made in float64; conftest.py puts the default back."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def single(double):
    """For the test of a network of full size."""
    torch.set_default_dtype(torch.float32)


def a_model(prior, observe):
    """A model with one latent z for each row."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            observe(x, pyro.sample("z", prior))

    return model


def a_guide(member):
    """A guide whose z is drawn from what a function of the rows gives."""

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", member(x))

    return guide


def spread(z, event_dim):
    """A sum over the elements of each datum, with weights that tell them apart."""
    flat = z.reshape(*z.shape[: z.dim() - event_dim], -1)
    return flat @ torch.linspace(1.0, 2.0, flat.shape[-1]).to(z)


def seen_in_noise(prior):
    """Observe the weighted sum of the elements: any latent will do."""
    return a_model(
        prior,
        lambda x, z: pyro.sample("x", dist.Normal(spread(z, prior.event_dim), 1.0), obs=x[:, 0]),
    )


def behind(base, *through):
    return dist.TransformedDistribution(base, list(through))


REAL, REAL_2 = dist.Normal(0.0, 1.0), dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)
REAL_3 = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
POSITIVE, UNIT = dist.Exponential(1.0), dist.Beta(2.0, 3.0)
POSITIVE_2 = dist.Exponential(torch.ones(2).double()).to_event(1)
UNIT_2 = dist.Beta(2.0 * torch.ones(2).double(), 3.0).to_event(1)
SIMPLEX = dist.Dirichlet(torch.ones(3).double())
MATRIX = dist.Normal(torch.zeros(3, 2).double(), 1.0).to_event(2)


def made(flow):
    """A flow from Pyro, the same at every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return flow().double()


PLANAR = made(lambda: flows.Planar(2))
AUTOREGRESSIVE = made(lambda: flows.affine_autoregressive(2, [8]))
SPLINE = made(lambda: flows.Spline(2, count_bins=4))
BATCH_NORM = made(lambda: flows.BatchNorm(2))

# The prior, the guide's distribution for rows (batch, 2), and the family that it must be.
FREED = {
    "Laplace": (
        REAL_2,
        lambda x: dist.Laplace(x, 0.5 + x.abs()).to_event(1),
        "DistributionFamily(Laplace, loc=(2,), scale=(2,))",
    ),
    "Laplace, constant": (
        REAL,
        lambda x: dist.Laplace(0.0, 1.0),
        "DistributionFamily(Laplace, loc=(), scale=())",
    ),
    "StudentT": (
        REAL,
        lambda x: dist.StudentT(5.0, x[:, 0], 0.5 + x[:, 1].abs()),
        "DistributionFamily(StudentT, df=(), loc=(), scale=())",
    ),
    "Gumbel": (
        REAL,
        lambda x: dist.Gumbel(x[:, 0], 0.5 + x[:, 1].abs()),
        "DistributionFamily(Gumbel, loc=(), scale=())",
    ),
    "Beta": (
        UNIT,
        lambda x: dist.Beta(1 + x[:, 0] ** 2, x[:, 1].exp()),
        "DistributionFamily(Beta, concentration1=(), concentration0=())",
    ),
    "Beta, event": (
        UNIT_2,
        lambda x: dist.Beta(x.exp(), 2.0).to_event(1),
        "DistributionFamily(Beta, concentration1=(2,), concentration0=(2,))",
    ),
    "Beta under a Uniform prior": (
        dist.Uniform(0.0, 1.0),
        lambda x: dist.Beta(1 + x[:, 0] ** 2, x[:, 1].exp()),
        "DistributionFamily(Beta, concentration1=(), concentration0=())",
    ),
    "Dirichlet": (
        SIMPLEX,
        lambda x: dist.Dirichlet(torch.cat([x, x[:, :1]], dim=-1).exp()),
        "DistributionFamily(Dirichlet, concentration=(3,))",
    ),
    "Dirichlet, rows of": (
        dist.Dirichlet(torch.ones(3, 2).double()).to_event(1),
        lambda x: dist.Dirichlet(x[:, None].expand(-1, 3, 2).exp()).to_event(1),
        "DistributionFamily(Dirichlet, concentration=(3, 2))",
    ),
    "HalfNormal": (
        POSITIVE,
        lambda x: dist.HalfNormal(x[:, 0].exp()),
        "DistributionFamily(HalfNormal, scale=())",
    ),
    "Chi2": (POSITIVE, lambda x: dist.Chi2(1 + x[:, 0].exp()), "DistributionFamily(Chi2, df=())"),
    "InverseGamma": (
        POSITIVE,
        lambda x: dist.InverseGamma(3 + x[:, 0].exp(), 1.0),
        "DistributionFamily(InverseGamma, concentration=(), rate=())",
    ),
    "LowRankMultivariateNormal": (
        REAL_2,
        lambda x: dist.LowRankMultivariateNormal(x, x[..., None] + 1, torch.ones_like(x)),
        "DistributionFamily(LowRankMultivariateNormal, loc=(2,), cov_factor=(2, 1), cov_diag=(2,))",
    ),
    "MultivariateStudentT": (
        REAL_2,
        lambda x: dist.MultivariateStudentT(torch.tensor(4.0), x, torch.eye(2)),
        "DistributionFamily(MultivariateStudentT, df=(), loc=(2,), scale_tril=(2, 2))",
    ),
    "MultivariateNormal by its precision": (
        REAL_2,
        lambda x: dist.MultivariateNormal(x, precision_matrix=torch.eye(2) + 0.3),
        "FullRankNormal(2)",
    ),
    "MultivariateNormal, rows of": (
        MATRIX,
        lambda x: dist.MultivariateNormal(
            x[:, None] * torch.ones(3, 1), torch.eye(2) + 0.3
        ).to_event(1),
        "DistributionFamily(MultivariateNormal, loc=(3, 2), scale_tril=(3, 2, 2))",
    ),
    "Normal, matrix": (
        MATRIX,
        lambda x: dist.Normal(x[:, None] + torch.ones(3, 1), 0.5).to_event(2),
        "transformed(DiagonalNormal(6), ReshapeTransform())",
    ),
    "Gamma, matrix": (
        dist.Gamma(torch.ones(3, 2).double(), 1.0).to_event(2),
        lambda x: dist.Gamma((x[:, None] + torch.ones(3, 1)).exp(), 0.5).to_event(2),
        "transformed(Gamma(6), ReshapeTransform())",
    ),
    "LogisticNormal": (
        SIMPLEX,
        lambda x: dist.LogisticNormal(x, x.exp()),
        "transformed(DiagonalNormal(2), StickBreakingTransform())",
    ),
    "logit-normal": (
        UNIT_2,
        lambda x: behind(dist.Normal(x, 0.7), transforms.SigmoidTransform()).to_event(1),
        "transformed(DiagonalNormal(2), SigmoidTransform())",
    ),
    "exp of a Normal": (
        POSITIVE_2,
        lambda x: behind(dist.Normal(x, 0.3).to_event(1), transforms.ExpTransform()),
        "LogNormal(2)",
    ),
    "exp of a MultivariateNormal": (
        POSITIVE_2,
        lambda x: behind(dist.MultivariateNormal(x, 0.1 * torch.eye(2)), transforms.ExpTransform()),
        "transformed(FullRankNormal(2), ExpTransform())",
    ),
    "affine of a Gamma": (
        POSITIVE_2,
        lambda x: behind(
            dist.Gamma(x.exp(), 1.0).to_event(1), transforms.AffineTransform(0.0, 0.5)
        ),
        "transformed(Gamma(2), AffineTransform(0.0, 0.5))",
    ),
    "affine, repeated for each row": (
        REAL_2,
        lambda x: behind(
            dist.Normal(x, 1.0).to_event(1),
            transforms.AffineTransform(torch.tensor([1.0, 2.0]).expand(len(x), 2), 0.5, 1),
        ),
        "transformed(DiagonalNormal(2), AffineTransform([1.0, 2.0], 0.5))",
    ),
    "power, repeated for each row": (
        POSITIVE,
        lambda x: behind(
            dist.Gamma(x[:, 0].exp(), 1.0),
            transforms.PowerTransform(torch.full((len(x),), 2.0)),
        ),
        "transformed(Gamma(), PowerTransform())",
    ),
    "a Cholesky factor that all rows share": (
        REAL_2,
        lambda x: behind(
            dist.Normal(x, 1.0).to_event(1),
            flows.LowerCholeskyAffine(torch.zeros(2), torch.tensor([[1.0, 0.0], [0.5, 2.0]])),
        ),
        "transformed(DiagonalNormal(2), LowerCholeskyAffine())",
    ),
    "Planar": (
        REAL_2,
        lambda x: behind(dist.Normal(x, 1.0).to_event(1), PLANAR),
        "transformed(DiagonalNormal(2), Planar)",
    ),
    "two flows": (
        REAL_2,
        lambda x: behind(dist.Normal(x, 1.0).to_event(1), AUTOREGRESSIVE, SPLINE),
        "transformed(DiagonalNormal(2), AffineAutoregressive then Spline)",
    ),
    "BatchNorm": (
        REAL_2,
        lambda x: behind(dist.Normal(x, 1.0).to_event(1), BATCH_NORM),
        "transformed(DiagonalNormal(2), BatchNorm)",
    ),
}


@pytest.mark.parametrize("name", FREED)
def test_a_freed_guide_has_the_guides_draws_and_density(name):
    prior, member, family = FREED[name]
    model, guide, x = seen_in_noise(prior), a_guide(member), torch.randn(6, 2)
    freed = per_datapoint(guide, x, model=model)
    assert repr(freed.families["z"]) == family
    freed.families["z"].check_site(ppvae.density.read_model(model, x).latents["z"])
    torch.testing.assert_close(
        ppvae.log_weights(model, freed, x, 50), ppvae.log_weights(model, guide, x, 50)
    )
    again = per_datapoint(freed, x)
    assert torch.equal(again.table("z").weight, freed.table("z").weight)


@pytest.mark.parametrize("name", FREED)
def test_copies_of_a_freed_guide_work_after_use(name):
    prior, member, _ = FREED[name]
    model, x = seen_in_noise(prior), torch.randn(3, 2)
    freed = per_datapoint(a_guide(member), x, model=model)
    weights = ppvae.log_weights(model, freed, x, 5)
    with ppvae.isolation.private_store():
        freed(x)["z"].sum().backward()  # Caches now hold tensors that have a graph.
    file = io.BytesIO()
    torch.save(freed, file)
    file.seek(0)
    for other in (copy.deepcopy(freed), torch.load(file, weights_only=False)):
        assert torch.equal(ppvae.log_weights(model, other, x, 5), weights)
        with torch.no_grad():
            other.table("z").weight += 0.1
        assert torch.equal(ppvae.log_weights(model, freed, x, 5), weights)
        assert not torch.equal(ppvae.log_weights(model, other, x, 5), weights)


def test_training_a_flow_on_leaves_what_was_freed_as_it_was():
    flow = copy.deepcopy(AUTOREGRESSIVE)
    model, x = seen_in_noise(REAL_2), torch.randn(3, 2)
    guide = a_guide(lambda x: behind(dist.Normal(x, 1.0).to_event(1), flow))
    freed = per_datapoint(guide, x, model=model)
    before = ppvae.log_weights(model, freed, x, 5)
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.1
    assert torch.equal(ppvae.log_weights(model, freed, x, 5), before)
    assert not torch.equal(ppvae.log_weights(model, guide, x, 5), before)
    other = per_datapoint(guide, x, model=model).families["z"]
    assert not ppvae.families.same_family(freed.families["z"], other)


# --- Guides from Pyro's library ---------------------------------------------------------------


def four_sites(x):
    with pyro.plate("data", len(x), dim=-1):
        rate = pyro.sample("rate", dist.Exponential(1.0))
        matrix = pyro.sample("matrix", MATRIX)
        shares = pyro.sample("shares", SIMPLEX)
        level = pyro.sample("level.0", UNIT)
        loc = matrix.sum(-1) * rate[..., None] + shares + level[..., None]
        pyro.sample("x", dist.Normal(loc[..., :2], 1.0).to_event(1), obs=x)


def auto_list(model):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["rate", "level.0"])))
    guide.append(AutoNormal(poutine.block(model, expose=["matrix", "shares"])))
    return guide


@pytest.mark.parametrize("kind", [AutoNormal, AutoNormalMessenger, auto_list])
def test_mean_field_autoguides_are_freed_behind_their_bijections(kind):
    x = torch.randn(5, 2)
    guide = kind(four_sites)
    freed = per_datapoint(guide, x, model=four_sites)
    assert {name: repr(family) for name, family in freed.families.items()} == {
        "rate": "LogNormal()",
        "matrix": "transformed(DiagonalNormal(6), ReshapeTransform())",
        "shares": "transformed(DiagonalNormal(2), StickBreakingTransform())",
        "level.0": "transformed(DiagonalNormal(), SigmoidTransform())",
    }
    torch.testing.assert_close(
        ppvae.log_weights(four_sites, freed, x, 50), ppvae.log_weights(four_sites, guide, x, 50)
    )


class Grouped(EasyGuide):
    """One normal draw for all sites, cut into pieces."""

    def guide(self, x):
        group = self.group(".*")
        mean = x @ torch.linspace(-0.5, 0.5, 2 * 8).reshape(2, 8)
        with self.plate("data", len(x), dim=-1):
            group.sample("all", dist.Normal(mean, 0.5).to_event(1))


def three_sites(x):
    with pyro.plate("data", len(x), dim=-1):
        rate = pyro.sample("rate", POSITIVE)
        matrix = pyro.sample("matrix", MATRIX)
        level = pyro.sample("level", UNIT)
        loc = matrix.sum(-1) * rate[..., None] + level[..., None]
        pyro.sample("x", dist.Normal(loc[..., :2], 1.0).to_event(1), obs=x)


def test_the_sites_of_an_easyguide_group_get_their_elements_of_the_draw():
    x = torch.randn(4, 2)
    guide = Grouped(three_sites)
    freed = per_datapoint(guide, x, model=three_sites)
    mean = x @ torch.linspace(-0.5, 0.5, 2 * 8).reshape(2, 8)
    log_scale = torch.full((len(x), 8), math.log(0.5))
    for name, part in {"rate": [0], "matrix": [1, 2, 3, 4, 5, 6], "level": [7]}.items():
        expected = torch.cat([mean[:, part], log_scale[:, part]], dim=-1)
        torch.testing.assert_close(freed.table(name).weight.detach(), expected)
    # One draw for all sites and one for each take other random numbers.
    one, other = (ppvae.log_weights(three_sites, g, x, 4000) for g in (guide, freed))
    error = ((one.var(dim=0) + other.var(dim=0)) / 4000).sqrt()
    assert sigmas(one.mean(dim=0), other.mean(dim=0), error) < 5


# --- The optimum per datum against closed forms ------------------------------------------------


def bernoulli(x, z):
    each = z[..., None].expand(*z.shape, x.shape[-1])
    pyro.sample("x", dist.Bernoulli(each).to_event(1), obs=x)


def poisson(x, z):
    each = z[..., None].expand(*z.shape, x.shape[-1])
    pyro.sample("x", dist.Poisson(each).to_event(1), obs=x)


def variance(x, z):
    each = z[..., None].expand(*z.shape, x.shape[-1]).sqrt()
    pyro.sample("x", dist.Normal(0.0, each).to_event(1), obs=x)


def multinomial(x, z):
    pyro.sample("x", dist.Multinomial(12, z), obs=x)


LOADINGS = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [1.0, 1.0]]).double()
PRECISION = torch.eye(2).double() + LOADINGS.mT @ LOADINGS


def linear(x, z):
    pyro.sample("x", dist.Normal(z @ LOADINGS.mT, 1.0).to_event(1), obs=x)


# One factor and a diagonal: a covariance that a low-rank normal of rank 1 can have.
ONE_FACTOR = 0.4 * torch.eye(3).double() + 0.09
INTO_ONE_FACTOR = torch.linalg.cholesky(torch.linalg.inv(ONE_FACTOR) - torch.eye(3).double()).mT


def linear_in_three(x, z):
    pyro.sample("x", dist.Normal(z @ INTO_ONE_FACTOR.mT, 1.0).to_event(1), obs=x)


def linear_posterior(x):
    loc = torch.linalg.solve(PRECISION, (x @ LOADINGS)[..., None])[..., 0]
    return dist.MultivariateNormal(loc, precision_matrix=PRECISION)


# Prior, likelihood, rows, the guide's distribution and the posterior, which is of its class.
CONJUGATE = {
    "Beta, Bernoulli": (
        UNIT,
        bernoulli,
        lambda: torch.bernoulli(torch.rand(12, 1).expand(12, 8)),
        lambda x: dist.Beta(1 + x.mean(-1), 2.0),
        lambda x: dist.Beta(2 + x.sum(-1), 3 + (1 - x).sum(-1)),
    ),
    "Dirichlet, Multinomial": (
        SIMPLEX,
        multinomial,
        lambda: dist.Multinomial(12, SIMPLEX.sample((12,))).sample(),
        lambda x: dist.Dirichlet(1.5 + 0.3 * x),
        lambda x: dist.Dirichlet(1 + x),
    ),
    "Gamma, Poisson": (
        dist.Gamma(2.0, 1.0),
        poisson,
        lambda: torch.poisson(2.0 * torch.rand(12, 1).expand(12, 5)),
        lambda x: dist.Gamma(2 + x.mean(-1), 1.5),
        lambda x: dist.Gamma(2 + x.sum(-1), torch.tensor(6.0)),
    ),
    "InverseGamma, variance of a Normal": (
        dist.InverseGamma(3.0, 2.0),
        variance,
        lambda: torch.randn(12, 6),
        lambda x: dist.InverseGamma(4.0, 1 + 0.5 * (x**2).sum(-1)),
        lambda x: dist.InverseGamma(torch.tensor(6.0), 2 + 0.5 * (x**2).sum(-1)),
    ),
    "MultivariateNormal, linear": (
        REAL_2,
        linear,
        lambda: torch.randn(12, 3),
        lambda x: dist.MultivariateNormal(0.5 * x[:, :2], 0.3 * torch.eye(2) + 0.1),
        linear_posterior,
    ),
    "LowRankMultivariateNormal, linear": (
        REAL_3,
        linear_in_three,
        lambda: torch.randn(12, 3),
        lambda x: dist.LowRankMultivariateNormal(
            0.5 * x, 0.5 * torch.ones(len(x), 3, 1), 0.2 * torch.ones(len(x), 3)
        ),
        lambda x: dist.MultivariateNormal(x @ INTO_ONE_FACTOR @ ONE_FACTOR, ONE_FACTOR),
    ),
}


def divergence(q, p):
    """KL(q ‖ p) in closed form."""
    if isinstance(q, dist.InverseGamma):  # That of the reciprocals.
        q, p = (dist.Gamma(d.concentration, d.rate) for d in (q, p))
    return kl_divergence(q, p)


def evidence_by_bayes(model, x, posterior):
    """log p(x) = log p(x, z) − log p(z | x), at any z."""
    z = posterior.sample()
    return ppvae.density.log_joint(model, x, z) - posterior.log_prob(z)


def value_of(comparison, name, **at):
    """A column of the ledger and its standard errors, as tensors."""
    ds = comparison.dataset
    return tuple(torch.as_tensor(ds[n].sel(**at).values) for n in (name, f"{name}_stderr"))


@pytest.mark.parametrize("name", CONJUGATE)
def test_a_guide_of_the_conjugate_family_has_an_amortization_gap_only(name):
    prior, observe, rows, member, posterior = CONJUGATE[name]
    model, guide, x = a_model(prior, observe), a_guide(member), rows()
    exact = posterior(x)
    comparison = ppvae.compare(model, guide, x)
    evidence, stderr = value_of(comparison, "log_evidence")
    truth = evidence_by_bayes(model, x, exact)
    assert ((evidence - truth).abs() < 4 * stderr + 1e-6).all()
    gap, stderr = value_of(comparison, "approximation_gap")
    assert (gap.abs() < TOLERANCE + 4 * stderr).all()
    gap, stderr = value_of(comparison, "amortization_gap")
    lost, error = divergence(member(x), exact), stderr.square().sum().sqrt() / len(x)
    assert (gap - lost).mean().abs() < TOLERANCE + 4 * error
    assert lost.mean() > 20 * error  # Else the line before says little.
    fit = ppvae.fit_per_datapoint(model, None, x, init=guide)
    freed = fit.guide.families["z"].distribution(fit.guide.table("z").weight.detach())
    assert divergence(freed, exact).max() < TOLERANCE
    assert bool(fit.converged.all())


def test_a_kumaraswamy_that_is_a_beta_has_no_approximation_gap():
    """k successes of k under a uniform prior leave Beta(1 + k, 1), a Kumaraswamy(1 + k, 1)."""
    x = torch.arange(1.0, 9.0)
    model = a_model(
        dist.Uniform(0.0, 1.0),
        lambda x, z: pyro.sample("x", dist.Binomial(x, z), obs=x),
    )
    guide = a_guide(lambda x: dist.Kumaraswamy(1 + 0.5 * x, 2.0))
    fit = ppvae.fit_per_datapoint(model, None, x, init=guide)
    short = -torch.log(1 + x) - fit.elbo  # The evidence is ∫ z^k dz = 1 / (1 + k).
    assert (short.abs() < TOLERANCE + 4 * fit.elbo_stderr).all()


def test_the_best_laplace_for_a_normal_posterior():
    r"""Of the Laplaces, b = s/√2 is nearest to a normal of scale s, and ½ log π − ½ nats off.

    KL = log(s √(2π) / (2 b e)) + b²/s², whose second derivative in log b is 4 b²/s² = 2 there.
    """
    x = torch.randn(10)
    model = a_model(REAL, lambda x, z: pyro.sample("x", dist.Normal(z, 1.0), obs=x))
    guide = a_guide(lambda x: dist.Laplace(0.3 * x, 1.0))
    comparison = ppvae.compare(model, guide, x)
    gap, stderr = value_of(comparison, "approximation_gap")
    exact = 0.5 * math.log(math.pi) - 0.5
    assert ((gap - exact).abs() < TOLERANCE + 4 * stderr).all()
    fit = ppvae.fit_per_datapoint(model, None, x, init=guide)
    best = fit.guide.families["z"].distribution(fit.guide.table("z").weight.detach())
    off = torch.log(best.scale / 0.5)  # The posterior is Normal(x/2, √½).
    assert off.abs().max() < math.sqrt(TOLERANCE)


def test_the_best_half_normal_for_a_gamma_posterior():
    r"""Gamma(a, b) has L(s) = a log s − b s √(2/π) + …, so that s = (a/b) √(π/2).

    The second derivative in log s is −a.
    """
    x = torch.poisson(2.0 * torch.rand(10, 1).expand(10, 5))
    a, b = 2 + x.sum(-1), torch.tensor(6.0)
    model = a_model(dist.Gamma(2.0, 1.0), poisson)
    guide = a_guide(lambda x: dist.HalfNormal(1 + x.mean(-1)))
    best = a / b * math.sqrt(math.pi / 2)
    mean_log = best.log() - 0.5 * (np.euler_gamma + math.log(2))
    cross = a * b.log() - torch.lgamma(a) + (a - 1) * mean_log - a  # E[b z] = a there.
    exact = -dist.HalfNormal(best).entropy() - cross
    comparison = ppvae.compare(model, guide, x)
    gap, stderr = value_of(comparison, "approximation_gap")
    assert ((gap - exact).abs() < TOLERANCE + 4 * stderr).all()
    fit = ppvae.fit_per_datapoint(model, None, x, init=guide)
    scale = fit.guide.families["z"].distribution(fit.guide.table("z").weight.detach()).scale
    # A row has converged with up to a tolerance left, which it may underestimate.
    assert (torch.log(scale / best).abs() < torch.sqrt(4 * TOLERANCE / a)).all()


def test_the_best_logit_normal_for_a_beta_posterior():
    """By Gauss–Hermite quadrature and scipy's optimiser, in u = logit z."""
    x = torch.bernoulli(torch.rand(6, 1).expand(6, 8))
    a, b = (2 + x.sum(-1)).numpy(), (3 + (1 - x).sum(-1)).numpy()
    node, weight = np.polynomial.hermite_e.hermegauss(60)
    weight = weight / weight.sum()

    def short(v, a, b):
        u = v[0] + math.exp(v[1]) * node
        entropy = v[1] + 0.5 * math.log(2 * math.pi * math.e)
        log_p = -a * np.logaddexp(0, -u) - b * np.logaddexp(0, u)
        beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        return beta - weight @ log_p - entropy

    exact = torch.tensor([optimize.minimize(short, [0, 0], (a[n], b[n])).fun for n in range(6)])
    guide = a_guide(lambda x: behind(dist.Normal(x.mean(-1), 1.0), transforms.SigmoidTransform()))
    comparison = ppvae.compare(a_model(UNIT, bernoulli), guide, x, num_samples=40_000)
    gap, stderr = value_of(comparison, "approximation_gap")
    assert sigmas(gap, exact, stderr) < 4
    assert (exact > 4 * stderr).all()


TRANSFORMS = {
    "sigmoid": ((), [transforms.SigmoidTransform()]),
    "exp": ((2,), [transforms.ExpTransform()]),
    "affine after tanh": (
        (),
        [transforms.TanhTransform(), transforms.AffineTransform(1.0, 2.0)],
    ),
    "stick breaking": ((2,), [transforms.StickBreakingTransform()]),
    "reshape": ((6,), [transforms.ReshapeTransform((6,), (3, 2))]),
    "autoregressive flow": ((2,), [AUTOREGRESSIVE]),
    "spline flow": ((2,), [SPLINE]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_posterior_that_is_normal_behind_the_guides_transform_is_found(name):
    """With z = T(u), u ~ N(0, 1) and x ~ N(u, 1) the posterior is T of N(x/2, √½)."""
    shape, through = TRANSFORMS[name]
    base = dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))
    whole = transforms.ComposeTransform(through)

    def observe(x, z):
        pyro.sample("x", dist.Normal(whole.inv(z), 1.0).to_event(len(shape)), obs=x)

    def member(x):
        return behind(dist.Normal(0.2 * x, 1.0).to_event(len(shape)), *through)

    x = torch.randn(7, *shape)
    fit = ppvae.fit_per_datapoint(
        a_model(behind(base, *through), observe), None, x, init=a_guide(member)
    )
    evidence = dist.Normal(torch.zeros(shape), math.sqrt(2.0)).to_event(len(shape)).log_prob(x)
    # At the exact posterior all weights are p(x): what is left is the rounding of T's inverse.
    torch.testing.assert_close(fit.elbo, evidence, rtol=0, atol=1e-5)
    size = x[0].numel()
    loc, log_scale = fit.guide.table("z").weight.detach().split(size, dim=-1)
    torch.testing.assert_close(loc, x.reshape(7, size) / 2, rtol=0, atol=1e-3)
    assert (log_scale - 0.5 * math.log(0.5)).abs().max() < 1e-3


# --- Guides of all ways of writing, through compare --------------------------------------------


class Linear(PyroModule):
    """A guide of Pyro modules, with a parameter under a constraint."""

    def __init__(self):
        super().__init__()
        self.loc = PyroModule[nn.Linear](3, 2)
        self.scale = PyroParam(torch.tensor([0.4, 0.7]), dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.loc(x), self.scale).to_event(1))


def written_in_many_ways(net):
    """One guide, Normal(net(x), (0.4, 0.7)), for the linear model."""
    scale = torch.tensor([0.4, 0.7])

    def with_a_module(x):
        used = pyro.module("net", net)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(used(x), scale).to_event(1))

    def with_params(x):
        weight = pyro.param("weight", net.weight.detach().clone())
        with pyro.plate("data", len(x), dim=-1):
            loc = x @ weight.mT + pyro.param("bias", net.bias.detach().clone())
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    class Easy(EasyGuide):
        def guide(self, x):
            group = self.group("z")
            with self.plate("data", len(x), dim=-1):
                group.sample("u", dist.Normal(self.net(x), scale).to_event(1))

    of_modules = Linear()
    of_modules.loc.load_state_dict(net.state_dict())
    model = a_model(REAL_2, linear)
    easy = Easy(model)
    easy.net = net
    return model, [with_a_module, with_params, of_modules, easy]


def test_it_does_not_matter_how_a_guide_is_written():
    net, x = nn.Linear(3, 2), torch.randn(15, 3)
    model, guides = written_in_many_ways(net)
    ledgers = [ppvae.compare(model, guide, x) for guide in guides]
    q = dist.MultivariateNormal(net(x).detach(), torch.diag(torch.tensor([0.4, 0.7]) ** 2))
    total, stderr = value_of(ledgers[0], "inference_gap")
    assert sigmas(total, kl_divergence(q, linear_posterior(x)), stderr) < 4
    # A mean-field normal has the conditional precisions, and loses what they leave out.
    approximation, stderr = value_of(ledgers[0], "approximation_gap")
    exact = 0.5 * (PRECISION.diagonal().log().sum() - torch.logdet(PRECISION))
    assert sigmas(approximation, exact, stderr) < 4
    assert {each.dataset.attrs["family"] for each in ledgers} == {"DiagonalNormal(2)"}
    for other in ledgers[1:]:
        for gap in ("approximation_gap", "amortization_gap"):
            ours, theirs = (value_of(each, gap)[0] for each in (ledgers[0], other))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


class FullRank(EasyGuide):
    def guide(self, x):
        group = self.group("z")
        with self.plate("data", len(x), dim=-1):
            group.sample("u", dist.MultivariateNormal(x[:, :2], torch.eye(2)))


def test_an_easyguide_with_a_full_covariance_holds_a_correlated_posterior():
    x, model = torch.randn(9, 3), a_model(REAL_2, linear)
    comparison = ppvae.compare(model, FullRank(model), x)
    assert comparison.dataset.attrs["family"] == "FullRankNormal(2)"
    gap, _ = value_of(comparison, "approximation_gap")
    assert gap.abs().max() < 1e-6
    lost, stderr = value_of(comparison, "amortization_gap")
    q = dist.MultivariateNormal(x[:, :2], torch.eye(2))
    assert sigmas(lost, kl_divergence(q, linear_posterior(x)), stderr) < 4


def independent(x, z):
    pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


@pytest.mark.fills_store
@pytest.mark.parametrize("kind", [AutoNormal, AutoNormalMessenger])
def test_the_gap_of_a_badly_trained_autonormal_is_its_divergence_from_the_posterior(kind):
    """With independent elements q* is the posterior, Normal(0.8 x, √0.2)."""
    x, model = torch.randn(25, 2), a_model(REAL_2, independent)
    auto = kind(model)
    svi = SVI(model, auto, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(5):
        svi.step(x)
    freed = per_datapoint(auto, x, model=model)
    loc, log_scale = freed.table("z").weight.detach().chunk(2, dim=-1)
    if kind is AutoNormal:
        assert torch.equal(loc, auto.locs.z)
        torch.testing.assert_close(log_scale.exp(), auto.scales.z)
    exact = kl_divergence(
        dist.Normal(loc, log_scale.exp()), dist.Normal(0.8 * x, math.sqrt(0.2))
    ).sum(-1)
    comparison = ppvae.compare(model, auto, x)
    gap, stderr = value_of(comparison, "amortization_gap")
    assert sigmas(gap, exact.detach(), stderr) < 4
    assert (exact > 10 * stderr).all()


def test_a_list_of_autonormals_has_the_gaps_of_its_parts():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", REAL_2)
            pyro.sample("x", dist.Normal(a, 1.0), obs=x[:, 0])
            pyro.sample("y", dist.Normal(b, 1.0).to_event(1), obs=x[:, 1:])

    x = torch.randn(12, 3)
    auto = AutoGuideList(model)
    auto.append(AutoNormal(poutine.block(model, expose=["a"]), init_scale=0.3))
    auto.append(AutoNormal(poutine.block(model, expose=["b"]), init_scale=0.5))
    comparison = ppvae.compare(model, auto, x)
    first, second = (part.locs for part in auto)
    posterior = dist.Normal(x / 2, math.sqrt(0.5))
    loc = torch.cat([first.a[:, None], second.b], dim=-1)
    scale = torch.tensor([0.3, 0.5, 0.5])
    exact = kl_divergence(dist.Normal(loc, scale), posterior).sum(-1).detach()
    gap, stderr = value_of(comparison, "amortization_gap")
    assert sigmas(gap, exact, stderr) < 4


# --- What is refused, and the way out -----------------------------------------------------------

NORMAL = a_model(REAL, lambda x, z: pyro.sample("x", dist.Normal(z, 1.0), obs=x))
NORMAL_2 = a_model(REAL_2, lambda x, z: pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x))
COIN = a_model(dist.Uniform(0.0, 1.0), lambda x, z: pyro.sample("x", dist.Normal(z, 1.0), obs=x))
CONDITIONAL = made(lambda: flows.conditional_planar(2, 1, [4]))


class Points(EasyGuide):
    def guide(self, x):
        with self.plate("data", len(x), dim=-1):
            self.map_estimate("z")


def auxiliary(x):
    """A guide whose scale is random."""
    with pyro.plate("data", len(x), dim=-1):
        s = pyro.sample("s", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(x, torch.exp(s)))


REFUSED = {
    "a random number": (
        NORMAL,
        a_guide(lambda x: dist.Normal(x + 0.1 * torch.randn(len(x)), 1.0)),
        "'z'.*random number.*family=\\.\\.\\.",
    ),
    "an auxiliary variable": (NORMAL, auxiliary, "'z'.*another latent.*family=\\.\\.\\."),
    "Uniform": (
        COIN,
        a_guide(lambda x: dist.Uniform(0.0, torch.sigmoid(x))),
        "'z'.*Uniform.*range of (high, )?low.*family=",
    ),
    "a support that moves with the parameters": (
        COIN,
        a_guide(lambda x: dist.AffineBeta(2.0, 2.0, 0.0, torch.sigmoid(x))),
        "'z'.*AffineBeta.*outside of the support.*Uniform",
    ),
    "RelaxedBernoulli": (
        COIN,
        a_guide(lambda x: dist.RelaxedBernoulli(torch.tensor(0.5), logits=x)),
        "'z'.*RelaxedBernoulli.*temperature.*family=",
    ),
    "VonMises": (
        a_model(dist.VonMises(0.0, 1.0), lambda x, z: pyro.sample("x", REAL, obs=x)),
        a_guide(lambda x: dist.VonMises(x, 1.0)),
        "'z'.*VonMises has no reparameterised draws.*family=",
    ),
    "Poisson": (
        a_model(dist.Poisson(2.0), lambda x, z: pyro.sample("x", dist.Normal(z, 1.0), obs=x)),
        a_guide(lambda x: dist.Poisson(x.exp())),
        "'z'.*Poisson has no reparameterised draws",
    ),
    "mixture": (
        NORMAL,
        a_guide(
            lambda x: dist.MixtureSameFamily(
                dist.Categorical(torch.ones(len(x), 2)),
                dist.Normal(torch.stack([x, 0 * x], dim=-1), 0.5),
            )
        ),
        "'z'.*MixtureSameFamily.*'real'.*family=",
    ),
    "mask": (
        NORMAL,
        a_guide(lambda x: dist.Normal(x, 1.0).mask(x > 0)),
        "'z'.*Normal.*masked.*family=",
    ),
    "affine by rows": (
        NORMAL,
        a_guide(lambda x: behind(dist.Normal(0 * x, 1.0), transforms.AffineTransform(x, 0.5))),
        "'z'.*AffineTransform.*differs between rows.*family=",
    ),
    "affine by rows, inside of others": (
        NORMAL_2,
        a_guide(
            lambda x: behind(
                dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1),
                transforms.ComposeTransform(
                    [transforms.TanhTransform(), transforms.AffineTransform(x[:, None], 0.5)]
                ),
            )
        ),
        "'z'.*ComposeTransform.*differs between rows.*family=",
    ),
    "a flow by rows": (
        NORMAL_2,
        a_guide(
            lambda x: behind(
                dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1),
                CONDITIONAL.condition(x[:, None]),
            )
        ),
        "'z'.*ConditionedPlanar.*differs between rows.*family=",
    ),
    "AutoDelta": (NORMAL, AutoDelta(NORMAL), "'z'.*point .a Delta.*Use a guide with a density"),
    "map_estimate": (NORMAL, Points(NORMAL), "'z'.*point .a Delta.*Use a guide with a density"),
    "AutoDiagonalNormal": (
        NORMAL,
        AutoDiagonalNormal(NORMAL),
        "_AutoDiagonalNormal_latent.*draw for each row.*Use AutoNormal",
    ),
    "AutoMultivariateNormal": (
        NORMAL,
        AutoMultivariateNormal(NORMAL),
        "_AutoMultivariateNormal_latent.*draw for each row.*Use AutoNormal",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_freed_is_refused_with_a_way_out(name):
    model, guide, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        ppvae.compare(model, guide, torch.linspace(-1.0, 1.5, 5), num_samples=50)


def lost_by(guide, x):
    """KL(q ‖ posterior) in the normal model, by integration over z."""
    z = torch.linspace(-12.0, 12.0, 200_001)[:, None]
    with pyro.plate("draws", len(z), dim=-2):
        q = poutine.trace(guide).get_trace(x).nodes["z"]["fn"].log_prob(z)
    integrand = q.exp() * (q - dist.Normal(x / 2, math.sqrt(0.5)).log_prob(z))
    return torch.trapezoid(integrand, z, dim=0)


@pytest.mark.parametrize("name", ["mixture", "affine by rows"])
def test_a_named_family_is_the_way_out(name):
    model, guide, _ = REFUSED[name]
    x = torch.linspace(-1.0, 1.5, 8)
    comparison = ppvae.compare(model, guide, x, family=DiagonalNormal())
    # The posterior is normal, so that the approximation gap is zero and the guide loses the rest.
    # A climb ends a hundredth of the tolerance of 0.001 nats below its end.
    assert value_of(comparison, "approximation_gap")[0].abs().max() < 1e-5
    gap, stderr = value_of(comparison, "amortization_gap")
    assert sigmas(gap, lost_by(guide, x), stderr) < 4


def test_a_uniform_guide_is_measured_against_the_betas():
    x = torch.bernoulli(torch.rand(6, 1).expand(6, 8))
    model = a_model(dist.Beta(1.0, 1.0), bernoulli)
    guide = a_guide(lambda x: dist.Uniform(0.0, 0.5 + 0.5 * x.mean(-1)))
    with pytest.raises(ValueError, match="'z'.*Uniform"):
        ppvae.compare(model, guide, x)
    betas = DistributionFamily(dist.Beta, {"concentration1": (), "concentration0": ()})
    comparison = ppvae.compare(model, guide, x, family=betas)
    posterior = dist.Beta(1 + x.sum(-1), 1 + (1 - x).sum(-1))
    gap, stderr = value_of(comparison, "approximation_gap")
    assert (gap.abs() < TOLERANCE + 4 * stderr).all()
    gap, stderr = value_of(comparison, "inference_gap")
    c = 0.5 + 0.5 * x.mean(-1)
    of_zero, of_one = c.log() - 1, -torch.xlogy(1 - c, 1 - c) / c - 1  # E log z, E log (1 − z)
    alpha, beta = posterior.concentration1, posterior.concentration0
    log_beta = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    exact = -c.log() - (alpha - 1) * of_zero - (beta - 1) * of_one + log_beta
    assert sigmas(gap, exact, stderr) < 4


def two_sites(x):
    with pyro.plate("data", len(x), dim=-1):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def chained(x):
    with pyro.plate("data", len(x), dim=-1):
        a = pyro.sample("a", dist.Normal(0.3 * x, 0.5))
        pyro.sample("b", dist.Normal(a, 0.5))


class Joint(EasyGuide):
    def guide(self, x):
        group = self.group(".*")
        covariance = torch.tensor([[0.25, 0.25], [0.25, 0.5]])
        with self.plate("data", len(x), dim=-1):
            loc = 0.3 * torch.stack([x, x], dim=-1)
            group.sample("both", dist.MultivariateNormal(loc, covariance))


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (chained, "'b'.*another latent variable.*family=.'a': ..., 'b': ...."),
        (Joint(two_sites), "'a'.*MultivariateNormal that it shares.*family=.*'a'"),
    ],
    ids=["one site on another", "an EasyGuide group"],
)
def test_sites_that_hang_together_are_measured_against_families_for_each(guide, words):
    """Both guides are N((0.3 x, 0.3 x), [[¼, ¼], [¼, ½]]); the posterior's precision is P."""
    x = torch.linspace(-2.0, 2.0, 9)
    with pytest.raises(ValueError, match=words):
        ppvae.compare(two_sites, guide, x)
    each = {"a": DiagonalNormal(), "b": DiagonalNormal()}
    comparison = ppvae.compare(two_sites, guide, x, family=each)
    precision = torch.tensor([[2.0, -1.0], [-1.0, 2.0]])
    posterior = dist.MultivariateNormal(
        torch.stack([x, 2 * x], dim=-1) / 3, precision_matrix=precision
    )
    mean_field = 0.5 * (2 * math.log(2.0) - torch.logdet(precision))
    gap, stderr = value_of(comparison, "approximation_gap")
    assert sigmas(gap, mean_field, stderr) < 4
    q = dist.MultivariateNormal(
        0.3 * torch.stack([x, x], dim=-1), torch.tensor([[0.25, 0.25], [0.25, 0.5]])
    )
    gap, stderr = value_of(comparison, "inference_gap")
    assert sigmas(gap, kl_divergence(q, posterior), stderr) < 4


def test_a_transform_of_one_row_is_a_fixed_one():
    """With a single row nothing differs between rows, and no shape tells a row from an element."""
    model, guide, _ = REFUSED["affine by rows"]
    freed = per_datapoint(guide, torch.tensor([0.7]), model=model)
    assert repr(freed.families["z"]) == "transformed(DiagonalNormal(), AffineTransform(0.7, 0.5))"


# --- What is the caller's stays as it was -------------------------------------------------------


@pytest.mark.parametrize("kind", ["AutoNormal", "Linear", "BatchNorm"])
def test_comparing_leaves_a_foreign_guide_and_all_generators_as_they_were(kind):
    model, x = a_model(REAL_2, linear), torch.randn(6, 3)
    flow = copy.deepcopy(BATCH_NORM)
    guide = {
        "AutoNormal": AutoNormal(model),
        "Linear": Linear(),
        "BatchNorm": a_guide(lambda x: behind(dist.Normal(x[:, :2], 1.0).to_event(1), flow)),
    }[kind]
    if kind == "AutoNormal":
        with ppvae.isolation.private_store():
            guide(x)  # An AutoNormal makes its parameters at its first call.
    owner = flow if kind == "BatchNorm" else guide
    state = {k: v.clone() for k, v in owner.state_dict().items()}
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    ppvae.compare(model, guide, x, num_samples=20, evidence_samples=20)
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1] == random.getstate()
    assert (generators[2] == np.random.get_state()[1]).all()
    assert all(torch.equal(state[k], v) for k, v in owner.state_dict().items())
    assert owner.training
    assert all(p.requires_grad and p.grad is None for p in owner.parameters())


@pytest.mark.fills_store
def test_comparing_leaves_the_store_of_a_trained_pair_as_it_was():
    model, guides = written_in_many_ways(nn.Linear(3, 2))
    x = torch.randn(6, 3)
    for guide in (*guides, AutoNormal(model)):
        pyro.clear_param_store()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
        svi.step(x)
        before = {name: (id(p), p.clone()) for name, p in pyro.get_param_store().named_parameters()}
        held = pyro.get_param_store().get_state()  # Else another tensor could take an id.
        ppvae.compare(model, guide, x, num_samples=20, evidence_samples=20)
        after = dict(pyro.get_param_store().named_parameters())
        assert before.keys() == after.keys()
        assert all(id(after[k]) == ident for k, (ident, _) in before.items())
        assert all(torch.equal(after[k], value) for k, (_, value) in before.items())
        svi.step(x)  # The optimiser's tensors are still those that the guide uses.
        moved = dict(pyro.get_param_store().named_parameters())
        assert any(not torch.equal(moved[k], value) for k, (_, value) in before.items())
        del held


# --- Pyro's own tutorial -------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(784, 400)
        self.loc, self.log_scale = nn.Linear(400, 50), nn.Linear(400, 50)
        self.softplus = nn.Softplus()

    def forward(self, x):
        h = self.softplus(self.hidden(x.reshape(-1, 784)))
        return self.loc(h), torch.exp(self.log_scale(h))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.pixels = nn.Linear(50, 400), nn.Linear(400, 784)
        self.softplus, self.sigmoid = nn.Softplus(), nn.Sigmoid()

    def forward(self, z):
        return self.sigmoid(self.pixels(self.softplus(self.hidden(z))))


class TutorialVAE(nn.Module):
    """The architecture of https://pyro.ai/examples/vae.html, for images of 28 × 28 pixels."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            loc = x.new_zeros(x.shape[0], 50)
            scale = x.new_ones(x.shape[0], 50)
            z = pyro.sample("latent", dist.Normal(loc, scale).to_event(1))
            image = self.decoder(z)
            pixels = dist.Bernoulli(image, validate_args=False).to_event(1)
            pyro.sample("obs", pixels, obs=x.reshape(-1, 784))
            return image

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = self.encoder(x)
            pyro.sample("latent", dist.Normal(loc, scale).to_event(1))


@pytest.mark.slow
@pytest.mark.fills_store
@pytest.mark.usefixtures("single")
def test_pyros_tutorial_at_its_full_size_goes_through_unchanged():
    digits = ppvae.data.load("digits").train.reshape(-1, 1, 8, 8)
    images = (nn.functional.interpolate(digits, size=28, mode="bilinear") > 0.5).float()
    torch.manual_seed(0)
    vae = TutorialVAE()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    losses = [svi.step(images[torch.randint(len(images), (64,))]) / 64 for _ in range(100)]
    store = {name: (id(p), p.clone()) for name, p in pyro.get_param_store().named_parameters()}
    held = pyro.get_param_store().get_state()
    x = images[:20]
    comparison = ppvae.compare(vae.model, vae.guide, x, num_samples=200, evidence_samples=500)
    ds = comparison.dataset
    assert ds.attrs["family"] == "DiagonalNormal(50)"
    for gap in ("approximation_gap", "amortization_gap"):
        assert float((ds[gap] + 4 * ds[f"{gap}_stderr"]).min()) > 0
    assert bool(ds["converged"].all())
    # The ledger's ELBO is Pyro's, on the same rows.
    with torch.no_grad():
        theirs = -Trace_ELBO(num_particles=200).loss(vae.model, vae.guide, x) / len(x)
    elbo, stderr = value_of(comparison, "elbo", guide="amortized")
    error = math.sqrt(2 * float((stderr**2).sum())) / len(x)
    assert abs(float(elbo.mean()) - theirs) < 4 * error
    assert losses[-1] < losses[0]
    after = dict(pyro.get_param_store().named_parameters())
    assert after.keys() == store.keys()
    assert all(id(after[k]) == i and torch.equal(after[k], v) for k, (i, v) in store.items())
    del held


def test_a_full_covariance_of_its_own_is_a_family_too():
    """A hand-made precision matrix, held against `FullRankNormal`: both hold the posterior."""
    x, model = torch.randn(5, 3), a_model(REAL_2, linear)
    guide = a_guide(lambda x: dist.MultivariateNormal(x[:, :2], torch.eye(2)))
    named = ppvae.compare(model, guide, x, family=FullRankNormal(2))
    own = ppvae.compare(model, guide, x)
    torch.testing.assert_close(
        value_of(named, "amortization_gap")[0], value_of(own, "amortization_gap")[0]
    )
