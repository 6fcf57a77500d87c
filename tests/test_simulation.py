"""Rows and latents from a model: their joint law against closed forms, and what is refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae import simulate
from ppvae.models import ExponentialGaussian, FactorAnalysis


def assert_mean(values, truth):
    """The mean of independent values, over the first dimension, within 5 of its own errors."""
    error = values.std(dim=0) / len(values) ** 0.5
    assert bool(((values.mean(dim=0) - truth).abs() < 5 * error).all())


def normal(x):
    return pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))


def test_a_deterministic_site_is_kept():
    def model(x):
        with pyro.plate("data", len(x)):
            # Its event is all of the value, plate included, where nothing else is said.
            twice = pyro.deterministic("twice", 2 * normal(x))
            pyro.sample("x", dist.Normal(twice, 0.5), obs=x)

    drawn = simulate(model, torch.zeros(2000))
    left = drawn.x - 2 * drawn.latents["z"]
    assert_mean(left, 0.0)
    assert_mean(left.square(), 0.25)


def test_toy_moments(device):
    drawn = simulate(ExponentialGaussian(), torch.zeros(20_000, device=device))
    x, z = drawn.x, drawn.latents["z"]
    assert_mean(z, 1.0)
    assert_mean((z - 1).square(), 1.0)
    assert_mean(x, 1.0)
    assert_mean((x - 1).square(), 2.0)
    # E[z x] = E[z²] = 2: the row belongs to its latent.
    assert_mean(z * x, 2.0)


def test_latents_are_draws_from_the_posterior_of_their_row(device):
    """The residual has mean 0 and the posterior's variance, whatever the row."""
    model = ExponentialGaussian()
    drawn = simulate(model, torch.zeros(20_000, device=device, dtype=torch.float64))
    posterior = model.posterior(drawn.x)
    residual = drawn.latents["z"] - posterior.mean
    for weight in (torch.ones_like(drawn.x), drawn.x, (drawn.x < 0).to(drawn.x)):
        assert_mean(weight * residual, 0.0)
        assert_mean(weight * (residual.square() - posterior.variance), 0.0)


def test_factor_analysis_has_the_loadings_as_its_cross_covariance(device):
    loadings = torch.tensor([[1.0, 0.0], [0.5, -1.0], [0.0, 2.0]])
    model = FactorAnalysis(3, 2, loadings=loadings).to(device)
    drawn = simulate(model, torch.zeros(20_000, 3, device=device))
    cross = (drawn.x - model.loc.detach())[:, :, None] * drawn.latents["z"][:, None]
    assert_mean(cross, loadings.to(device))


def test_seeds_shapes_and_the_callers_generators(device):
    model = ExponentialGaussian()
    before = torch.get_rng_state()
    one = simulate(model, torch.zeros(5, device=device), seed=1)
    same = simulate(model, torch.full((5,), 3.0, device=device), seed=1)
    other = simulate(model, torch.zeros(5, device=device), seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    # The values of the rows that are shown do not matter.
    assert torch.equal(one.x, same.x)
    assert torch.equal(one.latents["z"], same.latents["z"])
    assert not torch.equal(one.x, other.x)
    assert one.x.shape == one.latents["z"].shape == (5,)


def test_discrete_latents_and_rows_of_several_dimensions(device):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((len(x),), 0.3)))
            logits = (6 * z - 3)[:, None, None].expand(-1, 2, 3)
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(2), obs=x)

    drawn = simulate(model, torch.zeros(4000, 2, 3, device=device))
    assert drawn.x.shape == (4000, 2, 3)
    assert set(drawn.latents) == {"z"}
    assert_mean(drawn.latents["z"], 0.3)
    # P(x = z) is the same for every pixel.
    agree = (drawn.x == drawn.latents["z"][:, None, None]).to(drawn.x)
    assert_mean(agree.flatten(1), torch.sigmoid(torch.tensor(3.0)).item())


def test_a_model_in_another_dtype_than_its_rows(device):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(z, 1e-3), obs=x)

    drawn = simulate(model, torch.zeros(50, dtype=torch.float32, device=device))
    assert drawn.x.dtype == torch.float32
    assert drawn.latents["z"].dtype == torch.float64
    assert float((drawn.x - drawn.latents["z"]).abs().max()) < 0.01


def test_dropout_is_off_and_the_mode_restored(device):
    network = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Linear(1, 1, bias=False))
    torch.nn.init.ones_(network[1].weight)
    network.to(device).train()

    def model(x):
        with pyro.plate("data", len(x)):
            mean = network(normal(x)[:, None])[:, 0]
            pyro.sample("x", dist.Normal(mean, 1e-4), obs=x)

    drawn = simulate(model, torch.zeros(50, device=device))
    assert float((drawn.x - drawn.latents["z"]).abs().max()) < 1e-3
    assert network.training
    assert network[0].training


def with_factor(x):
    with pyro.plate("data", len(x)):
        z = normal(x)
        pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]), obs=x)
        pyro.factor("prefers_small", -z.square())


def with_two_sites(x):
    with pyro.plate("data", len(x)):
        z = normal(x)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(z, 1.0), obs=x)


def with_changed_rows(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(normal(x), 1.0), obs=x.exp())


def with_prior_of_the_rows(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def with_half_of_the_rows(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(normal(x[:, 0]), 1.0), obs=x[:, 0])


def picky(x):
    if bool((x < 0).any()):
        raise ValueError("negative rows")
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(normal(x), 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (with_factor, (4,), "'prefers_small': a model with a pyro.factor .* Write what it stands"),
        (with_two_sites, (4,), r"one observed site, whose value is x; got \['x', 'y'\]. Join them"),
        (with_changed_rows, (4,), "'x': given rows that it drew, the model observes others"),
        (with_prior_of_the_rows, (4,), "'z': what the model draws there hangs on the values of"),
        (with_half_of_the_rows, (4, 2), r"'x': expected .* its rows, \(4, 2\); it observes \(4,\)"),
        (picky, (20,), "does not run on rows that it drew: negative rows"),
    ],
)
def test_models_that_cannot_be_drawn_from(device, model, shape, message):
    with pytest.raises(ValueError, match=message):
        simulate(model, torch.ones(shape, device=device))
