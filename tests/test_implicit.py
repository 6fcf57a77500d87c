"""A model without a density: it draws, it is trained by a game, and it is refused elsewhere."""

import dataclasses
import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import nn

import ppvae
from ppvae import pairs, plots
from ppvae.density import NoLikelihoodError
from ppvae.diagnostics import active_units
from ppvae.evidence import mixture_evidence
from ppvae.families import DiagonalNormal
from ppvae.isolation import forked_rng
from ppvae.likelihoods import Gaussian
from ppvae.models import Autoencoder, ImplicitModel
from ppvae.nn import MLP


def implicit(x_dim=6, z_dim=3):
    return ImplicitModel(MLP(z_dim, [8], x_dim), z_dim, x_dim)


@pytest.mark.fills_store
def test_draws_are_the_generator_of_a_normal_z():
    model = implicit()
    trace = poutine.trace(model).get_trace(size=5)
    z, x = trace.nodes["z"]["value"], trace.nodes["x"]["value"]
    torch.testing.assert_close(x, model.generator(z))
    assert x.shape == (5, 6)
    prior = torch.distributions.Normal(0, 1).log_prob(z).sum()
    torch.testing.assert_close(trace.log_prob_sum(), prior)


@pytest.mark.fills_store
def test_predictive_draws_rows():
    draws = Predictive(implicit(), num_samples=4, return_sites=("x",))(size=5)["x"]
    assert draws.shape == (4, 5, 6)
    assert not torch.equal(draws[0], draws[1])


@pytest.fixture(scope="module")
def judged():
    """A pair of the same rows that has a density, and its comparison."""
    with forked_rng(0):
        model, guide = pairs.factor_analysis()
        x = torch.randn(20, 6)
    model, guide = model.float(), guide.float()
    return guide, x, ppvae.compare(model, guide, x, num_samples=20)


NEED_A_DENSITY = {
    "log_joint": lambda m, g, x, c: ppvae.log_joint(m, x, torch.zeros(20, 3)),
    "log_weights": lambda m, g, x, c: ppvae.log_weights(m, g, x),
    "elbo": lambda m, g, x, c: ppvae.elbo(m, g, x),
    "iwae": lambda m, g, x, c: ppvae.iwae(m, g, x),
    "quadrature": lambda m, g, x, c: ppvae.quadrature(m, x),
    "mixture_evidence": lambda m, g, x, c: mixture_evidence(m, [ppvae.per_datapoint(g, x)], x, 9),
    "compare": lambda m, g, x, c: ppvae.compare(m, g, x),
    "compare, several": lambda m, g, x, c: ppvae.compare(m, {"one": g, "two": g}, x),
    "fit": lambda m, g, x, c: ppvae.fit(m, g, x, progress=False),
    "fit_per_datapoint": lambda m, g, x, c: ppvae.fit_per_datapoint(m, DiagonalNormal(3), x),
    "per_datapoint": lambda m, g, x, c: ppvae.per_datapoint(g, x, model=m),
    "refine": lambda m, g, x, c: ppvae.refine(m, g, x),
    "active_units": lambda m, g, x, c: active_units(m, g, x),
    # compare makes no comparison of such a model; with one of another model it is met here.
    "explain": lambda m, g, x, c: ppvae.explain(dataclasses.replace(c, model=m), x.repeat(9, 1)),
    "repair_costs": lambda m, g, x, c: ppvae.repair_costs(dataclasses.replace(c, model=m)),
}
WITHOUT_DENSITY = {
    "ImplicitModel": (implicit, ("fit_adversarial", "model(size=n)")),
    "Autoencoder": (
        lambda: Autoencoder(MLP(6, [], 3), MLP(3, [], 6), Gaussian()),
        ("fit_autoencoder", "model.reconstruct(x)"),
    ),
}


@pytest.mark.parametrize("kind", WITHOUT_DENSITY)
@pytest.mark.parametrize("name", NEED_A_DENSITY)
def test_what_needs_a_density_says_that_there_is_none(kind, name, judged):
    guide, x, comparison = judged
    make, works = WITHOUT_DENSITY[kind]
    with pytest.raises(ValueError) as error:
        NEED_A_DENSITY[name](make().float(), guide, x, comparison)
    message = str(error.value)
    assert "no likelihood: " in message
    assert kind in message
    assert all(words in message for words in works)


def test_the_refusal_is_a_class_of_its_own_and_comes_through_unwrapped(judged):
    guide, x, _ = judged
    for call in (
        lambda: implicit()(x),
        lambda: ppvae.elbo(implicit().float(), guide, x),
        lambda: ppvae.evidence.joint(implicit().float(), x, {"z": torch.zeros(2, 20, 3)}),
    ):
        with pytest.raises(NoLikelihoodError, match=r"^no likelihood: "):
            call()


def test_rows_of_another_dtype_than_either_network_are_named():
    x, single, double = torch.randn(20, 6), implicit().float(), MLP(6, [], 1).double()
    with pytest.raises(
        ValueError, match=r"x has dtype torch.float32 but .* MLP have torch.float64"
    ):
        ppvae.fit_adversarial(single, double, x.float(), progress=False)
    with pytest.raises(ValueError, match=r"float64 but .* ImplicitModel have torch.float32"):
        ppvae.fit_adversarial(single, double, x.double(), progress=False)


def test_a_normal_is_found_by_a_linear_discriminator():
    """G(z) = z + b against data of mean 3: a linear D sees the mean alone, and is blind at b = 3.

    There D = ½, so that the losses are log 2 and 2 log 2.
    """

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Parameter(torch.zeros(1))

        def forward(self, z):
            return z + self.b

    x = torch.randn(4000, 1) + 3
    model, discriminator = ImplicitModel(Shift(), 1, 1), nn.Linear(1, 1)
    run = ppvae.fit_adversarial(
        model, discriminator, x, steps=600, batch_size=256, lr=2e-2, progress=False
    )
    assert run.completed
    assert run.generator_losses.shape == run.discriminator_losses.shape == (600,)
    assert float(model.generator.b.detach()) == pytest.approx(float(x.mean()), abs=0.15)
    assert float(run.generator_losses[-200:].mean()) == pytest.approx(math.log(2), abs=0.03)
    assert float(run.discriminator_losses[-200:].mean()) == pytest.approx(math.log(4), abs=0.01)


def test_the_best_discriminator_of_a_held_generator_measures_the_divergence():
    """L_D = 2 log 2 − 2 JSD (Goodfellow et al. 2014, theorem 1), for N(0, 1) against N(2, 1).

    The best logit is linear, 2 x − 2.
    """
    x = torch.randn(20_000, 1) + 2
    model = ImplicitModel(nn.Linear(1, 1), 1, 1)
    with torch.no_grad():
        model.generator.weight.fill_(1.0)
        model.generator.bias.zero_()
    discriminator = nn.Linear(1, 1)
    for rate in (0.05, 0.002):
        run = ppvae.fit_adversarial(
            model,
            discriminator,
            x,
            steps=200,
            batch_size=1000,
            lr=1e-12,
            discriminator_lr=rate,
            progress=False,
        )
    grid = torch.linspace(-10, 12, 20_001).double()
    p, q = (torch.distributions.Normal(m, 1.0).log_prob(grid).exp() for m in (2.0, 0.0))
    middle = (p + q) / 2
    jsd = 0.5 * torch.trapezoid(p * (p / middle).log() + q * (q / middle).log(), grid)
    tail = run.discriminator_losses[-150:].double()
    error = float(tail.std()) / math.sqrt(150)
    assert abs(float(tail.mean()) - math.log(4) + 2 * float(jsd)) < 5 * error + 0.003
    assert float(discriminator.weight.detach()) == pytest.approx(2.0, abs=0.1)


def test_the_first_losses_are_those_of_a_blind_discriminator():
    class Blind(nn.Linear):
        """Logit 0 for every row; its gradient is 0 too, so that it stays so."""

        def forward(self, rows):
            return 0 * super().forward(rows)

    run = ppvae.fit_adversarial(
        implicit(), Blind(6, 1), torch.randn(30, 6), steps=3, progress=False
    )
    torch.testing.assert_close(run.discriminator_losses, torch.full((3,), math.log(4.0)))
    torch.testing.assert_close(run.generator_losses, torch.full((3,), math.log(2.0)))


def test_both_are_trained_alone_and_nothing_else_is_touched():
    model, discriminator, x = implicit(), MLP(6, [4], 1), torch.randn(30, 6)
    before = [p.detach().clone() for m in (model, discriminator) for p in m.parameters()]
    state, store = torch.get_rng_state(), pyro.get_param_store().get_state()["params"]
    runs = []
    for _ in range(2):
        with torch.no_grad():
            after = [p for m in (model, discriminator) for p in m.parameters()]
            for p, value in zip(after, before, strict=True):
                p.copy_(value)
        runs.append(ppvae.fit_adversarial(model, discriminator, x, steps=4, progress=False))
    assert torch.equal(runs[0].generator_losses, runs[1].generator_losses)
    assert torch.equal(torch.get_rng_state(), state)
    assert pyro.get_param_store().get_state()["params"].keys() == store.keys()
    assert all(not torch.equal(p, value) for p, value in zip(after, before, strict=True))
    assert all(p.grad is None for p in after)


def test_a_run_that_diverges_keeps_the_parameters_of_a_shorter_run():
    class Late(nn.Linear):
        calls = 0

        def forward(self, rows):
            self.calls += 1
            return super().forward(rows) * (torch.nan if self.calls > 3 * 120 else 1.0)

    x, found = torch.randn(30, 6), []
    for steps in (100, 200):
        with forked_rng(5):
            model, discriminator = implicit(), Late(6, 1)
        run = ppvae.fit_adversarial(model, discriminator, x, steps=steps, progress=False)
        found.append([p.detach() for m in (model, discriminator) for p in m.parameters()])
    assert not run.completed
    assert run.status.startswith("diverged at step 121: the parameters after 100 steps were kept")
    assert run.steps == 120
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: ImplicitModel(MLP(2, [], 5), 2, 6),
            r"generator: expected.*\(batch, 6\).*\(2, 5\)",
        ),
        (lambda: ImplicitModel(MLP(2, [], 5), 0, 5), "x_dim and z_dim must be positive"),
        (implicit(), "size=n"),
        (lambda: adversarial(x=torch.randn(9, 5)), r"x: expected rows.*6.*\(9, 5\)"),
        (lambda: adversarial(discriminator=MLP(6, [], 2)), r"logit for each row.*\(9, 2\)"),
        (lambda: adversarial(discriminator=nn.Flatten()), "discriminator: nothing to train"),
        (lambda: adversarial(model=pairs.vae(6, 2, [4])[0]), "expected a ppvae.models.Implicit"),
        (lambda: adversarial(steps=0), "steps must be at least 1"),
        (lambda: adversarial(discriminator_lr=0.0), "discriminator_lr must be positive"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def adversarial(model=None, discriminator=None, x=None, **options):
    return ppvae.fit_adversarial(
        implicit() if model is None else model,
        MLP(6, [], 1) if discriminator is None else discriminator,
        torch.randn(9, 6) if x is None else x,
        progress=False,
        **options,
    )


def test_the_pictures_that_need_draws_alone():
    model = implicit(6, 2)
    ax = plots.samples(model, (2, 3), rows=2, columns=2, seed=3)
    with forked_rng(3):
        images = model.decode(torch.randn(4, 2)).clamp(0, 1)
    shown = torch.as_tensor(ax.images[0].get_array().filled(0)).clamp(0, 1)
    torch.testing.assert_close(shown[:2, :3], images[0].reshape(2, 3).to(shown))
    assert ax.get_title() == "draws of x for draws of z from the prior"
    assert plots.latent_grid(model, (2, 3), size=3).get_xlabel() == "$z_1$"
    with pytest.raises(ValueError, match="no posterior"):
        plots.reconstructions(model, None, torch.rand(2, 6), (2, 3))
