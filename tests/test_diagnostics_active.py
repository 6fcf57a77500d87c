"""Active units: the variance of the posterior mean, against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import sigmas

from ppvae import density
from ppvae.diagnostics import ActiveUnits, active_units
from ppvae.isolation import private_store
from ppvae.models import FactorAnalysis


def linear(device):
    """A linear Gaussian model whose second latent element reaches no x, its posterior as guide,
    rows, and the variance over them of the posterior's mean.
    """
    loadings = torch.tensor([[1.0, 0.0, 0.2], [0.5, 0.0, -0.3], [-1.0, 0.0, 0.1]])
    model = FactorAnalysis(3, 3, loadings=loadings, noise=torch.full((3,), 0.5)).to(device)

    def exact(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", model.posterior(x))

    with private_store(), torch.no_grad():
        x = model(size=40)
        return model, exact, x, model.posterior(x).mean.var(dim=0)


def normal_pair(loc, scale, prior):
    """A scalar latent with the prior that is made from a zero, and a normal guide around loc(x)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(x.new_zeros(())))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc(x), scale))

    return model, guide


def test_active_elements_have_the_variance_of_the_posterior_mean(device):
    model, exact, x, truth = linear(device)
    units = active_units(model, exact, x)
    assert units.active.tolist() == [True, False, True]
    assert (units.count, units.total, units.threshold) == (2, 3, 0.01)
    assert sigmas(units.variance, truth, units.stderr) < 4
    # The error is small enough for this to say something.
    assert bool((units.stderr < 0.1 * truth)[[0, 2]].all())


@pytest.mark.parametrize("num_samples", [5, 50])
def test_the_standard_error_is_that_of_repetitions(device, num_samples):
    """Over seeds the mean hits the truth, so that the noise of few draws is subtracted."""
    model, exact, x, truth = linear(device)
    found = [active_units(model, exact, x, num_samples=num_samples, seed=s) for s in range(100)]
    errors = torch.stack([(f.variance - truth) / f.stderr for f in found])
    # The second element is at its bound of 0, where errors are not normal.
    assert float(errors.mean(dim=0)[[0, 2]].abs().max()) < 4 / math.sqrt(100)
    spread = errors.square().mean(dim=0).sqrt()[[0, 2]]
    assert float((spread - 1).abs().max()) < 4 / math.sqrt(2 * 100)
    assert float(errors[:, 1].abs().max()) < 4


@pytest.mark.parametrize("scale", [1e-3, 1.0, 3.0])
def test_a_constant_guide_has_no_active_units(device, scale):
    model, guide = normal_pair(torch.zeros_like, scale, lambda zero: dist.Normal(zero, 1.0))
    units = active_units(model, guide, torch.randn(400, device=device))
    assert units.count == 0
    assert float(units.variance / units.stderr) < 4


def test_units_of_the_latent_do_not_matter(device):
    """An exponential latent that is ten times as large, and its model and guide with it."""
    x = torch.rand(100, device=device) * 3

    def scaled(by, weight):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Exponential(x.new_tensor(1.0 / by)))
                pyro.sample("x", dist.Normal(z / by, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.LogNormal(weight * x + math.log(by), 0.1))

        return active_units(model, guide, x)

    for weight, active in ((0.3, True), (0.04, False)):
        one, ten = scaled(1.0, weight), scaled(10.0, weight)
        torch.testing.assert_close(one.variance, ten.variance, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.stderr, ten.stderr, rtol=1e-3, atol=1e-6)
        assert one.active.tolist() == ten.active.tolist() == [active]
        # In its own units the larger latent varies by more than the threshold either way.
        assert float(ten.variance * ten.prior_variance) > 0.01


@pytest.mark.parametrize(
    ("prior", "truth"),
    [
        (lambda zero: dist.Normal(zero + 2.0, 3.0), 9.0),
        # The quantile of a Cauchy distribution, which has no variance.
        (lambda zero: dist.Cauchy(zero, 1.0), math.tan(math.pi * (0.8413447 - 0.5)) ** 2),
        (lambda zero: dist.Exponential(zero + 1.0), (math.log(0.8413447 / 0.1586553) / 2) ** 2),
    ],
    ids=["normal", "cauchy", "exponential"],
)
def test_the_unit_is_the_priors_variance_by_its_quantiles(device, prior, truth):
    model, guide = normal_pair(torch.exp, 0.1, prior)
    x = torch.linspace(0, 1, 50, device=device)
    units = active_units(model, guide, x)
    # What is left of the error when the mean is known this well is that of the unit.
    scaled = x.exp().double().var() / truth
    assert sigmas(units.variance, scaled, units.stderr) < 4
    assert float(units.prior_variance) == pytest.approx(truth, rel=0.15)
    assert float(units.stderr / units.variance) < 0.05


def test_a_rare_discrete_latent_has_a_unit(device):
    """Both quantiles of a Bernoulli(0.1) are 0; its variance is not."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.1)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.sigmoid(x)))

    x = torch.linspace(-3, 0, 60, device=device)
    units = active_units(model, guide, x)
    truth = torch.sigmoid(x).var() / (0.1 * 0.9)
    assert sigmas(units.variance, truth, units.stderr) < 4
    assert units.count == 1


def test_elements_stand_in_the_models_order(device):
    """Sites of a scalar, a vector and a matrix; the guide draws them in another order."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(x.new_zeros(2), 10.0).to_event(1))
            pyro.sample("c", dist.Normal(x.new_zeros(2, 2), a[..., None, None].exp()).to_event(2))
            pyro.sample("x", dist.Normal(a + b.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            weights = torch.tensor([[0.0, 1.0], [0.0, 0.0]], device=x.device)
            c = dist.Normal(x[:, None, None] * weights, 0.1)
            pyro.sample("c", c.to_event(2))
            b = dist.Normal(x[:, None] * torch.tensor([0.0, 20.0], device=x.device), 0.1)
            pyro.sample("b", b.to_event(1))
            pyro.sample("a", dist.Normal(2 * x, 0.1))

    x = torch.randn(50, device=device)
    units = active_units(model, guide, x)
    assert units.names == ("a", "b[0]", "b[1]", "c[0,0]", "c[0,1]", "c[1,0]", "c[1,1]")
    assert units.active.tolist() == [True, False, True, False, True, False, False]
    assert sigmas(units.variance[:3], x.var() * x.new_tensor([4, 0, 4]), units.stderr[:3]) < 4


def test_work_in_chunks_around_a_far_mean_gives_the_same(device, monkeypatch):
    model, guide = normal_pair(lambda x: 1e9 + x, 0.5, lambda zero: dist.Normal(zero + 1e9, 1.0))
    x = torch.randn(30, device=device, dtype=torch.float64)
    whole = active_units(model, guide, x)
    monkeypatch.setattr(density, "_ELEMENTS", 30 * 7)
    parts = active_units(model, guide, x)
    for units in (whole, parts):
        assert sigmas(units.variance, x.var(), units.stderr) < 4
    assert float(whole.stderr / parts.stderr) == pytest.approx(1, rel=0.2)


def test_a_seed_gives_the_figures_and_leaves_the_generators_alone(device):
    model, exact, x, _ = linear(device)
    before = torch.get_rng_state()
    one, same, other = (active_units(model, exact, x, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.variance, same.variance)
    assert not torch.equal(one.variance, other.variance)


def test_what_is_refused(device):
    model, exact, x, _ = linear(device)
    with pytest.raises(ValueError, match="x: a variance over the data takes at least 2 rows"):
        active_units(model, exact, x[:1])
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        active_units(model, exact, x, num_samples=1)
    for threshold in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="threshold must be positive"):
            active_units(model, exact, x, threshold=threshold)


def test_the_record_says_which_are_inactive_and_which_are_close():
    def record(*variance):
        figures = torch.tensor(variance)
        names = tuple(f"z[{index}]" for index in range(len(variance)))
        one = torch.ones_like(figures)
        return ActiveUnits(figures, 0.002 * one, one, names, 0.01)

    assert repr(record(0.5, 0.7)) == "ActiveUnits(2 of 2 active)"
    assert repr(record(0.5, 0.001, 0.012)) == (
        "ActiveUnits(2 of 3 active; inactive: z[1]; within two standard errors of the threshold: "
        "z[2])"
    )
    assert "inactive: z[0], z[1], " in repr(record(*[0.0] * 20))
    assert repr(record(*[0.0] * 20)).endswith("z[7] and 12 more)")
