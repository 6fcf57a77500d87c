"""Reconstruction alone: what it reaches, and what it is not."""

import math

import pyro
import pytest
import torch
from torch import nn

import ppvae
from ppvae import pairs, plots
from ppvae.density import NoLikelihoodError
from ppvae.isolation import forked_rng
from ppvae.likelihoods import Bernoulli, Categorical, Gaussian
from ppvae.models import Autoencoder
from ppvae.nn import MLP


def linear(x_dim=5, z_dim=2, likelihood=None):
    return Autoencoder(MLP(x_dim, [], z_dim), MLP(z_dim, [], x_dim), likelihood or Gaussian())


def test_a_linear_autoencoder_reaches_the_error_of_principal_components():
    """Baldi & Hornik (1989): the least squared error is the sum of the smaller eigenvalues."""
    x = torch.randn(400, 5) @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5, 0.3])) + 1.0
    model = linear()
    for lr in (3e-2, 3e-3):
        fit = ppvae.fit_autoencoder(model, x, steps=400, batch_size=400, lr=lr, progress=False)
    assert fit.completed
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    least = float(values[:3].sum())
    reached = float((model.reconstruct(x) - x).square().sum(-1).mean())
    assert least * (1 - 1e-4) < reached < least * 1.01
    # The loss is half the squared error and the constant of five normals.
    best = 0.5 * least + 2.5 * math.log(2 * math.pi)
    assert float(fit.losses[-1]) == pytest.approx(best, rel=0.01)


def test_its_methods_are_the_two_networks():
    model, x = linear(likelihood=Bernoulli()), torch.bernoulli(torch.full((4, 5), 0.5))
    z = model.encoder(x)
    torch.testing.assert_close(model.code(x), z)
    torch.testing.assert_close(model.decode(z), torch.sigmoid(model.decoder(z)))
    torch.testing.assert_close(model.reconstruct(x), torch.sigmoid(model.decoder(z)))
    p = torch.sigmoid(model.decoder(z))
    by_hand = (x * p.log() + (1 - x) * (1 - p).log()).sum(-1)
    torch.testing.assert_close(model.log_likelihood(x), by_hand)
    assert not model.reconstruct(x).requires_grad
    assert model.log_likelihood(x).requires_grad


def test_categories_are_given_back_as_their_probabilities():
    model = Autoencoder(MLP(5, [], 2), MLP(2, [], 15), Categorical(3))
    x = torch.tensor([[0.0, 1.0, 2.0, 2.0, 1.0], [2.0, 0.0, 0.0, 1.0, 1.0]])
    probs = model.reconstruct(x)
    assert probs.shape == (2, 5, 3)
    chosen = probs.gather(-1, x.long()[..., None])[..., 0].log().sum(-1)
    torch.testing.assert_close(chosen, model.log_likelihood(x).detach())


def test_the_first_loss_is_minus_the_log_likelihood_of_the_rows():
    x = torch.randn(30, 5).double()
    model = linear(likelihood=Gaussian.learned()).double()
    expected = float(-model.log_likelihood(x).mean().detach())
    before = [p.detach().clone() for p in model.parameters()]
    state, store = torch.get_rng_state(), pyro.get_param_store().get_state()["params"]
    fit = ppvae.fit_autoencoder(model, x, steps=3, progress=False)
    assert float(fit.losses[0]) == pytest.approx(expected, rel=1e-6)
    assert (fit.steps, fit.batch_size, fit.status) == (3, 30, "completed 3 steps")
    assert torch.equal(torch.get_rng_state(), state)
    assert pyro.get_param_store().get_state()["params"].keys() == store.keys()
    after = list(model.parameters())
    assert len(after) == 5
    assert all(not torch.equal(p, value) for p, value in zip(after, before, strict=True))
    assert all(p.grad is None for p in after)


def test_the_same_seed_gives_the_same_run():
    x, losses = torch.randn(50, 5), []
    for seed in (1, 1, 2):
        with forked_rng(0):
            model = linear()
        fit = ppvae.fit_autoencoder(model, x, steps=8, batch_size=20, seed=seed, progress=False)
        losses.append(fit.losses)
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_a_run_that_diverges_keeps_the_last_good_parameters():
    class Late(nn.Linear):
        calls = 0

        def forward(self, rows):
            self.calls += 1
            return super().forward(rows) * (torch.nan if self.calls > 150 else 1.0)

    x, found = torch.randn(30, 5), []
    for steps in (100, 300):
        with forked_rng(5):
            model = Autoencoder(Late(5, 2), MLP(2, [], 5), Gaussian())
        fit = ppvae.fit_autoencoder(model, x, steps=steps, progress=False)
        found.append([p.detach() for p in model.parameters()])
    assert not fit.completed
    assert fit.status.startswith("diverged at step 151: the parameters after 100 steps were kept")
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_learning_rate_that_is_too_large_is_no_error_of_a_distribution():
    model, x = linear(likelihood=Gaussian.learned()), torch.randn(30, 5)
    fit = ppvae.fit_autoencoder(model, x, steps=50, lr=1e30, progress=False)
    assert not fit.completed
    assert "diverged" in fit.status
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("options", [{"x": torch.zeros(3, 5)}, {"size": 3}])
def test_it_is_no_generative_process(options):
    with pytest.raises(NoLikelihoodError, match=r"^no likelihood: .*no prior.*reconstruct"):
        linear()(**options)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: ppvae.fit_autoencoder(linear(), x, steps=0), "steps must be at least 1"),
        (lambda x: ppvae.fit_autoencoder(linear(), x, lr=0.0), "lr must be positive"),
        (lambda x: ppvae.fit_autoencoder(linear(6), x[:, :3]), "Expected rows of size 6"),
        (lambda x: ppvae.fit_autoencoder(linear(likelihood=Bernoulli()), x), "0 and 1"),
        (lambda x: ppvae.fit_autoencoder(pairs.vae(5, 2, [4])[0], x), "expected a ppvae.models"),
        (
            lambda x: Autoencoder(MLP(5, [], 2), MLP(2, [], 4), Gaussian()).log_likelihood(x),
            r"decoder: expected outputs of shape \(9, 5\).*\(9, 4\)",
        ),
        (lambda x: plots.samples(linear(), (1, 5)), "samples: an Autoencoder has no prior"),
        (lambda x: plots.latent_grid(linear(), (1, 5)), "latent_grid: an Autoencoder has no"),
        (
            lambda x: plots.reconstructions(pairs.vae(5, 2, [4])[0], None, x, (1, 5)),
            "expected a guide",
        ),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.randn(9, 5))


def test_rows_of_another_dtype_are_named():
    with pytest.raises(ValueError, match=r"torch.float64 but .* Autoencoder have torch.float32"):
        ppvae.fit_autoencoder(linear().float(), torch.randn(30, 5).double(), progress=False)


def test_nothing_to_train_is_named():
    model = linear()
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="model: nothing to train"):
        ppvae.fit_autoencoder(model, torch.randn(9, 5))


def test_the_picture_of_reconstructions_shows_them():
    model, x = linear(6, 2, Bernoulli()), torch.bernoulli(torch.full((4, 6), 0.5))
    ax = plots.reconstructions(model, None, x, (2, 3))
    shown = torch.as_tensor(ax.images[0].get_array().filled(0))
    torch.testing.assert_close(shown[:2, :3], x[0].reshape(2, 3).to(shown))
    torch.testing.assert_close(shown[3:5, :3], model.reconstruct(x)[0].reshape(2, 3).to(shown))
