"""What the documentation offers for copying keeps the laws that the package's own parts keep."""

import doctest
import importlib.util
import inspect
import math
from pathlib import Path

import laws
import pyro
import pyro.distributions as dist
import pytest
import test_families
import test_objectives
import test_pairs
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import ppvae
from ppvae.evidence import Estimate
from ppvae.families import BUILT_IN, LogNormal
from ppvae.guides import PerDatapoint
from ppvae.models import ExponentialGaussian

# Objectives and the pairs' laws of classic SVI leave parameters in Pyro's store.
pytestmark = pytest.mark.fills_store

FOLDER = Path(__file__).parents[1] / "docs" / "skeletons"


def load(name):
    """A skeleton as a module."""
    spec = importlib.util.spec_from_file_location(f"skeleton_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


model, family, objective, estimator = (
    load(name) for name in ("model", "family", "objective", "estimator")
)


def arguments(law):
    return set(inspect.signature(law).parameters)


def laws_of(module, *given):
    """The tests of a module that ask for these arguments, each by its name."""
    tests = [test for name, test in vars(module).items() if name.startswith("test_")]
    return pytest.mark.parametrize(
        "law", [t for t in tests if arguments(t) == set(given)], ids=lambda law: law.__name__
    )


@pytest.mark.parametrize("module", [model, family, objective, estimator], ids=lambda m: m.__name__)
def test_the_examples_of_the_docstrings(module):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    found = doctest.testmod(module, optionflags=flags)
    assert found.attempted
    assert not found.failed


def counts(size=30):
    counted = model.GammaPoisson(4).double()
    with torch.no_grad():
        counted.log_rates.copy_(torch.linspace(-1.0, 1.0, 4))
        return counted, counted(size=size)


@laws_of(test_pairs, "make")
def test_the_model_keeps_the_laws_of_pairs(law):
    law(model.gamma_poisson)


@laws_of(test_pairs, "make", "loss")
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_the_model_keeps_the_laws_of_pairs_under_both_losses(law, loss):
    law(model.gamma_poisson, loss)


def test_the_models_evidence_is_the_integral():
    counted, x = counts()
    integral = ppvae.quadrature(counted, x, tolerance=1e-9)
    torch.testing.assert_close(integral.value, counted.log_evidence(x).detach(), rtol=0, atol=1e-8)


def test_the_models_posterior_has_equal_weights():
    """log p(x, z) − log p(z | x) is log p(x), whatever z."""
    counted, x = counts()
    z = torch.rand(5, len(x)).double() + 0.1
    with torch.no_grad():
        weights = ppvae.log_joint(counted, x, {"z": z}) - counted.posterior(x).log_prob(z)
        torch.testing.assert_close(weights, counted.log_evidence(x).expand(5, -1))


@pytest.fixture
def registered(monkeypatch):
    """The family among those that are read off a guide."""
    monkeypatch.setitem(BUILT_IN, dist.Laplace, family.Laplace)


@laws_of(test_families, "family")
@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.usefixtures("registered")
def test_the_family_keeps_the_laws_of_families(law, size):
    if law is test_families.test_gaussian_families_are_gaussians_behind_their_bijection:
        pytest.skip("not a Gaussian family")
    law(family.Laplace(size))


@pytest.mark.parametrize(
    "law",
    [test_families.test_the_density_integrates_to_one, test_families.test_draws_follow_the_density],
)
def test_the_familys_density_is_one(law, monkeypatch):
    monkeypatch.setitem(laws.SCALAR_FAMILIES, "Laplace", family.Laplace)
    law("Laplace")


def test_the_family_has_no_gap_on_a_posterior_inside_of_it():
    """A Laplace prior that the data say nothing against is its own posterior."""

    def unheard(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Laplace(x.new_full((len(x),), 0.3), 0.7))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    x = torch.tensor([0.5, 2.0])
    comparison = ppvae.compare(unheard, PerDatapoint(family.Laplace(), 2), x)
    gap, stderr = comparison.mean("approximation_gap")
    assert abs(gap) < 5 * stderr + 1e-3


@pytest.mark.parametrize("case", [test_objectives.toy, test_objectives.factor_analysis])
@pytest.mark.parametrize("power", [1.0, 0.4])
def test_the_objective_keeps_the_law_of_objectives(case, power, monkeypatch):
    def bound(likelihood, prior, q):
        return (test_objectives.WEIGHTS * (power * likelihood + prior - q)).sum()

    entry = (objective.TemperedELBO(power), bound)
    monkeypatch.setitem(test_objectives.ESTIMATORS, "TemperedELBO", entry)
    test_objectives.test_value_and_gradient_are_those_of_the_bound(case, "TemperedELBO")


def test_the_objective_is_a_rescaled_beta_elbo():
    pair = ppvae.pairs.exponential_gaussian()
    x = torch.tensor([0.5, 2.0]).repeat(4000)
    with torch.no_grad():
        ours = objective.TemperedELBO(0.5).loss(*pair, x) / len(x)
        theirs = 0.5 * ppvae.objectives.BetaELBO(2.0).loss(*pair, x) / len(x)
    spread = ppvae.log_weights(*pair, x[:2], 1000).std(0).max()
    assert abs(ours - theirs) < 5 * float(spread) * math.sqrt(2 / len(x))


def test_the_objective_refuses():
    with pytest.raises(ValueError, match=r"power must be positive; got 0\."):
        objective.TemperedELBO(0)
    pair = ppvae.pairs.sigmoid_belief_network(6, [3], [8])
    with pytest.raises(ValueError, match="Use BetaELBO"):
        objective.TemperedELBO().loss(*pair, torch.ones(2, 6))


def test_the_estimator_is_a_bound_with_its_error():
    toy, x = ExponentialGaussian(), torch.tensor([0.3, 1.5, 4.0])
    guide = PerDatapoint(LogNormal(), 3)
    exact, one = toy.log_evidence(x), ppvae.elbo(toy, guide, x, 20_000)
    runs = [estimator.grouped_iwae(toy, guide, x, 5, 40, seed=100 * s) for s in range(60)]
    values = torch.stack([r.value for r in runs])
    mean, error = values.mean(0), values.std(0) / math.sqrt(60)
    assert isinstance(runs[0], Estimate)
    assert (mean < exact + 5 * error).all()  # below the evidence
    assert (mean > one.value - 5 * torch.hypot(error, one.stderr.double())).all()  # above L_1
    # The error that one run claims is the spread of many, known to 1 / √120 = 9 %.
    claimed = torch.stack([r.stderr for r in runs]).square().mean(0).sqrt()
    torch.testing.assert_close(claimed, values.std(0), rtol=5 * 0.095, atol=0)


def test_the_estimator_is_exact_at_the_posterior():
    toy, x = ppvae.models.FactorAnalysis(3, 2).double(), torch.randn(4, 3).double()
    with torch.no_grad():
        guide = PerDatapoint(ppvae.families.FullRankNormal(2), 4).double()
        guide.table("z").weight.copy_(guide.families["z"].params_of(toy.posterior(x)))
        found = estimator.grouped_iwae(toy, guide, x, 3, 4)
        torch.testing.assert_close(found.value, toy.log_evidence(x))
    assert found.stderr.max() < 1e-10


def test_the_estimators_error_falls_with_the_work():
    toy, x = ExponentialGaussian(), torch.rand(20)
    guide = PerDatapoint(LogNormal(), 20)
    few, many = (estimator.grouped_iwae(toy, guide, x, 5, g).stderr.mean() for g in (30, 480))
    assert abs(float(few / many) - 4) < 1
