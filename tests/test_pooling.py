"""Evidence to a wanted error: each method where it belongs, and pooling that is not biased."""

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppvae
from ppvae.density import judging
from ppvae.evidence import exact_evidence, iwae_of, mixture_of
from ppvae.families import DiagonalNormal
from ppvae.isolation import private_store
from ppvae.models import ExponentialGaussian, FactorAnalysis
from ppvae.proposals import Freed, mixture_weights
from ppvae.simulation import simulate


class Bare:
    """A model without its closed forms, as a reader's own would be."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        return self.model(x)


def factors(z_dim: int = 4, x_dim: int = 8, seed: int = 0) -> FactorAnalysis:
    generator = torch.Generator().manual_seed(seed)
    loadings = torch.randn(x_dim, z_dim, generator=generator)
    return FactorAnalysis(x_dim=x_dim, z_dim=z_dim, loadings=loadings)


def rows(model, count: int) -> Tensor:
    return simulate(model, torch.zeros(count, model.x_dim)).x


def exact_of(model, x: Tensor) -> Tensor:
    return exact_evidence(model, x).value


def posterior_times(model: FactorAnalysis, scale: float, shift: float = 0.0):
    """The exact posterior with all standard deviations scaled, and the mean shifted in them."""

    def guide(x: Tensor) -> None:
        exact = model.posterior(x)
        root = exact.scale_tril
        loc = exact.mean + shift * root.diagonal(dim1=-2, dim2=-1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale * root))

    return guide


def test_a_model_that_knows_its_evidence_is_asked():
    model, x = ExponentialGaussian(), torch.tensor([0.5, 2.0])
    found = ppvae.log_evidence(model, None, x)
    assert found.methods == ("exact", "exact")
    assert found.bound == "exact"
    assert torch.equal(found.value, exact_of(model, x))
    assert bool(found.reached.all())


def test_two_latent_elements_are_integrated():
    model = factors(z_dim=2)
    x = rows(model, 5)
    found = ppvae.log_evidence(Bare(model), None, x)
    assert set(found.methods) == {"quadrature"}
    assert torch.allclose(found.value, exact_of(model, x), atol=1e-4)


def test_few_discrete_values_are_enumerated():
    def coins(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    x = torch.tensor([1.0, -1.0])
    found = ppvae.log_evidence(coins, None, x)
    weights = torch.tensor([0.25, 0.5, 0.25])
    levels = dist.Normal(torch.arange(3.0), 1.0).log_prob(x[:, None])
    assert found.methods == ("enumeration", "enumeration")
    assert torch.allclose(found.value, torch.logsumexp(levels + weights.log(), -1))


def test_good_guides_are_weighted_and_bad_ones_annealed():
    model = factors()
    x = rows(model, 12)
    exact = exact_of(model, x)
    wide = ppvae.log_evidence(Bare(model), posterior_times(model, 1.2), x, target_stderr=0.02)
    narrow = ppvae.log_evidence(Bare(model), posterior_times(model, 0.4), x, target_stderr=0.1)
    assert set(wide.methods) == {"iwae"}
    assert narrow.methods.count("ais") >= 9  # k-hat of 1 − 0.4² = 0.84 is above the threshold.
    for found, target in ((wide, 0.02), (narrow, 0.1)):
        assert bool(found.reached.float().mean() > 0.8)
        assert bool((found.stderr[found.reached] <= target).all())
        z = (found.value - exact) / found.stderr
        assert float((z.abs() < 4).float().mean()) >= 0.97
        assert abs(float(z.mean())) < 4 / math.sqrt(len(x)) + 0.2  # A log is a little low.


def test_the_exact_posterior_leaves_nothing_to_weigh():
    model = factors()
    x = rows(model, 3)
    found = ppvae.log_evidence(Bare(model), posterior_times(model, 1.0), x)
    assert set(found.methods) == {"iwae"}
    assert torch.allclose(found.value, exact_of(model, x), atol=1e-3)
    assert bool((found.evaluations <= 4100).all())


def test_pooling_is_unbiased_where_one_proposal_has_the_wrong_tail():
    """The same row many times over: each a repetition of its own."""
    repetitions, draws = 4000, 10
    model = factors(z_dim=3)
    x = rows(model, 1).expand(repetitions, -1)
    exact = exact_of(model, x[:1])
    with private_store():
        posterior = model.posterior(x[:1])
    family, sd = DiagonalNormal(3), posterior.scale_tril.diagonal(dim1=-2, dim2=-1)

    def member(scale: float, shift: float) -> Freed:
        fn = dist.Normal(posterior.mean + shift * sd, scale * sd).to_event(1)
        params = family.params_of(fn).expand(repetitions, -1)
        return Freed(model, {"z": family}, {"z": params})

    narrow, wide = member(0.5, 1.0), member(2.0, 0.0)
    with judging(0, x, model), torch.no_grad():
        pooled = mixture_of(mixture_weights([narrow, wide], x, draws)).value
        alone = [iwae_of(mixture_weights([each], x, draws)[0]).value for each in (narrow, wide)]
        # The largest of two noisy estimates is drawn to their errors.
        second = iwae_of(mixture_weights([wide], x, draws)[0]).value

    def off(value: Tensor) -> tuple[float, float]:
        relative = torch.exp(value - exact).double() - 1
        return float(relative.mean()), float(relative.std()) / math.sqrt(repetitions)

    bias, error = off(pooled)
    assert abs(bias) < 4 * error
    assert error < 0.02  # Able to see a bias of a tenth.
    bias, error = off(torch.maximum(alone[1], second))
    assert bias > 10 * error
    assert bias > 0.1


def test_what_a_budget_does_not_reach_is_said():
    model = factors()
    x = rows(model, 5)
    found = ppvae.log_evidence(
        Bare(model), posterior_times(model, 0.4), x, target_stderr=1e-4, budget=20_000
    )
    assert not bool(found.reached.any())
    assert "5 rows have a standard error above 0.0001 nats: raise budget" in found.status
    assert found.status in repr(found)
    assert bool((found.evaluations <= 22_000).all())
    assert torch.allclose(found.value, exact_of(model, x), atol=1.0)


def test_discrete_latents_are_weighted_with_what_the_budget_allows():
    def many(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((20,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    x = torch.tensor([10.0, 2.0])
    found = ppvae.log_evidence(many, None, x, target_stderr=0.02)
    counts = torch.arange(21.0)
    binomial = dist.Binomial(20, torch.tensor(0.5)).log_prob(counts)
    exact = torch.logsumexp(dist.Normal(counts, 1.0).log_prob(x[:, None]) + binomial, -1)
    assert set(found.methods) == {"iwae"}
    assert bool(((found.value - exact).abs() < 4 * found.stderr).all())


def test_several_guides_share_the_draws():
    model = factors()
    x = rows(model, 4)
    one, other = posterior_times(model, 0.5), posterior_times(model, 1.3)
    both = ppvae.log_evidence(Bare(model), {"one": one, "other": other}, x, target_stderr=0.02)
    assert set(both.methods) == {"iwae"}
    assert bool(((both.value - exact_of(model, x)).abs() < 4 * both.stderr).all())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target_stderr": 0.0}, "target_stderr must be positive"),
        ({"budget": 10}, "budget must be at least"),
        ({"guides": []}, "at least one guide"),
    ],
)
def test_bad_arguments(arguments, words):
    given = {"guides": None, **arguments}
    with pytest.raises(ValueError, match=words):
        ppvae.log_evidence(ExponentialGaussian(), x=torch.ones(2), **given)


def test_the_callers_random_numbers_are_left_alone():
    model = factors()
    x = rows(model, 2)
    guide = posterior_times(model, 0.5)
    before = torch.get_rng_state()
    one = ppvae.log_evidence(Bare(model), guide, x, target_stderr=0.2, budget=20_000, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    again = ppvae.log_evidence(Bare(model), guide, x, target_stderr=0.2, budget=20_000, seed=3)
    assert torch.equal(one.value, again.value)


def test_a_comparison_takes_evidence_that_was_found_beforehand():
    model = factors()
    x = rows(model, 4)
    guide = posterior_times(model, 0.9)
    evidence = ppvae.log_evidence(Bare(model), guide, x, target_stderr=0.05)
    family = DiagonalNormal(4)
    found = ppvae.compare(Bare(model), guide, x, family=family, evidence=evidence, num_samples=200)
    assert torch.equal(torch.as_tensor(found.dataset["log_evidence"].values), evidence.value)
    gap = evidence.value - torch.as_tensor(found.dataset["elbo"].sel(guide="amortized").values)
    assert torch.allclose(torch.as_tensor(found.dataset["inference_gap"].values), gap, atol=1e-4)
    assert found.dataset.attrs["evidence_kind"] == "iwae"
    with pytest.raises(ValueError, match="a figure for each of the 3 rows"):
        ppvae.compare(Bare(model), guide, x[:3], family=family, evidence=evidence)
    upper = dataclasses.replace(evidence, bound="upper")
    with pytest.raises(ValueError, match="Give the lower bound"):
        ppvae.compare(Bare(model), guide, x, family=family, evidence=upper)
    annealed = ppvae.ais(Bare(model), guide, x, num_steps=20)
    words = str(ppvae.compare(Bare(model), guide, x, family=family, evidence=annealed))
    assert "annealed: a lower bound" in words


def test_weights_of_a_large_log_evidence_keep_their_error():
    weights = torch.randn(2, 500, 3, generator=torch.Generator().manual_seed(0))
    # Multiples of 32 are exact in float32 at 4e8, and their log-sum-exp is not.
    coarse = (weights * 3).round() * 32
    far = mixture_of(coarse - 2.0**28)
    near = mixture_of(coarse.double())
    assert torch.allclose(far.stderr.double(), near.stderr, rtol=1e-5)
    assert torch.allclose(far.value.double(), near.value - 2.0**28, rtol=1e-7)


def test_an_error_that_cannot_be_believed_is_not_reached():
    model = factors(z_dim=3)
    x = 1e3 * rows(model, 1)
    found = ppvae.log_evidence(Bare(model), None, x, target_stderr=5.0, budget=9_600)
    short = exact_of(model, x) - found.value
    assert bool((short > 100).all())
    assert bool((found.stderr < 5).all())
    assert not bool(found.reached.any())
    assert "1 row has a standard error above 0.5 nats, which is itself too small" in repr(found)


def test_what_float32_rounds_is_said():
    model = factors(z_dim=3)
    x = 1e4 * rows(model, 2)
    found = ppvae.log_evidence(model, None, x)
    assert not bool(found.reached.any())
    assert "float32 rounds by more than 0.01 nats" in found.status
    double = ppvae.log_evidence(model.double(), None, x.double())
    assert bool(double.reached.all())
    assert "every row" in double.status


def test_flat_weights_of_discrete_latents_are_believed():
    levels = torch.tensor([-3.0, 0.0, 4.0])

    def mixture(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(x.new_ones(len(x), 3)))
            z = pyro.sample("z", dist.Normal(levels.to(x)[k], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):  # Scales a tenth too large, and the categories a little too sure.
        logits = -(x[:, None] - levels.to(x)).square() / 2.2
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=logits))
            pyro.sample("z", dist.Normal((4 * x + levels.to(x)[k]) / 5, 1.1 / 5**0.5))

    x = torch.linspace(-4, 5, 40)
    found = ppvae.log_evidence(mixture, guide, x, target_stderr=0.02)
    parts = dist.Normal(levels, 1.25**0.5).log_prob(x[:, None])
    exact = torch.logsumexp(parts, dim=-1) - math.log(3)
    assert bool((found.pareto_k > 0.5).any())  # Weights with an interior maximum.
    assert bool(found.reached.all())
    assert "k-hat" not in found.status
    assert bool(((found.value - exact).abs() < 4.5 * found.stderr).all())


def test_annealing_does_not_replace_a_closer_integral():
    def funnel(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.HalfCauchy(x.new_ones(len(x))))
            u = pyro.sample("u", dist.Normal(x.new_zeros(len(x)), 1.0))
            both = u[..., None].expand(*u.shape, 2)
            pyro.sample("x", dist.Normal(both, s[..., None]).to_event(1), obs=x)

    x = torch.tensor([[0.0, 0.2]])
    integral = ppvae.quadrature(funnel, x, tolerance=1e-6)
    target = float(integral.stderr) / 10
    found = ppvae.log_evidence(funnel, None, x, target_stderr=target, budget=9_600)
    assert found.methods == ("quadrature",)
    assert not bool(found.reached.any())
    assert torch.equal(found.value, integral.value)


def funnel(x):
    """A scale far out in its prior's tail, beside a latent that has to shrink along with it."""
    with pyro.plate("data", len(x)):
        scale = pyro.sample("scale", dist.HalfCauchy(x.new_ones(len(x))))
        pyro.sample("z", dist.Normal(x.new_zeros(len(x)), scale))
        pyro.sample("x", dist.Normal(torch.zeros_like(x), scale[..., None]).to_event(1), obs=x)


def test_chains_whose_weights_are_far_apart_are_not_believed():
    x = torch.tensor([[0.0, 0.01]])
    found = ppvae.log_evidence(funnel, None, x, target_stderr=0.4, budget=20_000)
    assert found.methods == ("ais",)
    assert not bool(found.reached.any())
    assert "1 row has chains whose log weights spread by more than 1 nat" in found.status
    annealed = ppvae.ais(funnel, None, x, num_steps=20)
    assert float(annealed.spread) > 1
    assert "log weights of 1 spread by more than 1 nat" in repr(annealed)
    # Where they are near each other nothing is said.
    model = factors(z_dim=2)
    assert "spread" not in repr(ppvae.ais(model, None, rows(model, 2), num_steps=200))
