"""Reconstructions in closed form, ends of interpolations, coordinates of traversals."""

import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import ppvae
from ppvae import pairs
from ppvae.families import FullRankNormal, transformed
from ppvae.generation import interpolate, posterior_means, reconstruct, traverse
from ppvae.guides import Amortized
from ppvae.likelihoods import Bernoulli, Categorical, Gaussian
from ppvae.models import VAE, FactorAnalysis
from ppvae.nn import MLP


class Exact(torch.nn.Module):
    """λ of the exact posterior of factor analysis."""

    def __init__(self, truth):
        super().__init__()
        self.truth, self.family = truth, FullRankNormal(truth.z_dim)

    def forward(self, x):
        return self.family.params_of(self.truth.posterior(x))


def linear(x_dim=5, z_dim=3, noise=0.7):
    """Factor analysis as a VAE with a linear decoder, and its exact posterior as guide."""
    loadings, loc = torch.randn(x_dim, z_dim).double(), torch.randn(x_dim).double()
    scale = torch.full((x_dim,), noise).double()
    truth = FactorAnalysis(x_dim, z_dim, loadings=loadings, noise=scale, loc=loc).double()
    model = VAE(x_dim, z_dim, MLP(z_dim, [], x_dim), Gaussian(noise)).double()
    with torch.no_grad():
        model.decoder.layers[0].weight.copy_(loadings)
        model.decoder.layers[0].bias.copy_(loc)
    return truth, model, Amortized(FullRankNormal(z_dim), Exact(truth))


def test_the_guide_is_the_posterior():
    truth, model, guide = linear()
    x = torch.randn(4, 5).double()
    weights = ppvae.log_weights(model, guide, x, 6)
    torch.testing.assert_close(weights, truth.log_evidence(x).expand(6, 4), rtol=1e-6, atol=1e-6)


def test_a_linear_reconstruction_is_the_closed_form():
    truth, model, guide = linear()
    x = torch.randn(6, 5).double()
    posterior = truth.posterior(x)
    expected = posterior.mean @ truth.loadings.mT + truth.loc
    covariance = truth.loadings @ posterior.covariance_matrix @ truth.loadings.mT
    for draws in (50, 20_000):
        error = (covariance.diagonal(dim1=-2, dim2=-1) / draws).sqrt()
        ours = reconstruct(model, guide, x, num_samples=draws)
        assert float(((ours - expected).abs() / error).max()) < 4.5
    torch.testing.assert_close(posterior_means(model, guide, x), posterior.mean)


def test_a_reconstruction_is_the_mean_over_draws_and_not_at_the_mean():
    """One Bernoulli element, logit a z + b: E[σ(a z + b)] by quadrature."""
    model = VAE(1, 1, MLP(1, [], 1), Bernoulli()).double()
    guide = Amortized(FullRankNormal(1), MLP(1, [], 2)).double()
    with torch.no_grad():
        model.decoder.layers[0].weight.fill_(4.0)
        model.decoder.layers[0].bias.fill_(2.0)
    x = torch.tensor([[0.0], [1.0]]).double()
    q = guide.family.distribution(guide.params(x).detach())
    loc, scale = q.mean, q.variance.sqrt()
    u = torch.linspace(-10, 10, 20_001).double()
    density = torch.exp(-0.5 * u**2) / (2 * torch.pi) ** 0.5
    p = torch.sigmoid(4.0 * (loc + scale * u) + 2.0)
    mean = torch.trapezoid(p * density, u)
    error = ((torch.trapezoid(p**2 * density, u) - mean**2) / 40_000).sqrt()
    ours = reconstruct(model, guide, x, num_samples=40_000)[:, 0]
    assert float(((ours - mean).abs() / error).max()) < 4.5
    at_the_mean = model.decode(posterior_means(model, guide, x))[:, 0]
    assert float(((at_the_mean - mean).abs() / error).min()) > 10


def test_the_number_of_draws_at_once_does_not_matter(monkeypatch):
    _, model, guide = linear()
    x = torch.randn(3, 5).double()
    sizes = []
    decode = model.decode
    monkeypatch.setattr("ppvae.density._ELEMENTS", 3 * 64 * 40)
    monkeypatch.setattr(model, "decode", lambda z: sizes.append(z.shape[0]) or decode(z))
    many = reconstruct(model, guide, x, num_samples=100)
    assert sizes == [40, 40, 20]
    monkeypatch.undo()
    # Other draws, one mean: with 100 draws of a posterior of scale below one.
    once = reconstruct(model, guide, x, num_samples=100)
    spread = (model.decoder.layers[0].weight.detach().square().sum(dim=1) * 2 / 100).sqrt()
    assert bool(((many - once).abs() < 4.5 * spread).all())


def test_the_seed_says_which_draws():
    model, guide = pairs.vae(6, 2, [8])
    x = torch.ones(3, 6)
    before = torch.get_rng_state()
    one, again = (reconstruct(model, guide, x, num_samples=5, seed=4) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, reconstruct(model, guide, x, num_samples=5, seed=5))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_interpolation_ends_in_the_means_and_is_straight_between():
    truth, model, guide = linear()
    x, y = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    path = interpolate(model, guide, x, y, 5)
    assert path.shape == (5, 4, 5)
    # The decoder is linear, so that its image of the line is a line.
    start, end = (truth.posterior(r).mean @ truth.loadings.mT + truth.loc for r in (x, y))
    for step in range(5):
        torch.testing.assert_close(path[step], start + step / 4 * (end - start))
    curved, encoder = pairs.vae(6, 2, [8])
    ones, zeros = torch.ones(2, 6), torch.zeros(2, 6)
    path = interpolate(curved, encoder, ones, zeros, 4)
    for rows, at in ((ones, 0), (zeros, -1)):
        means = encoder.family.distribution(encoder.params(rows)).mean.detach()
        torch.testing.assert_close(posterior_means(curved, encoder, rows), means)
        torch.testing.assert_close(path[at], curved.decode(means))


def test_a_traversal_changes_one_coordinate_alone():
    _, model, _ = linear()
    z, values = torch.randn(4, 3).double(), [-2.0, 0.5, 3.0]
    kept = z.clone()
    for dimension in range(3):
        moved = traverse(model, z, dimension, values)
        assert moved.shape == (3, 4, 5)
        column = model.decoder.layers[0].weight[:, dimension].detach()
        for index, value in enumerate(values):
            # By how much the linear decoder's output moves, along the coordinate's loadings.
            expected = model.decode(z) + (value - z[:, dimension, None]) * column
            torch.testing.assert_close(moved[index], expected)
    assert torch.equal(z, kept)
    one = traverse(model, z[0], 1, torch.tensor(values))
    torch.testing.assert_close(one, traverse(model, z, 1, values)[:, 0])
    held = traverse(model, z[0], 1, [float(z[0, 1])])
    torch.testing.assert_close(held[0], model.decode(z[0]))


def test_categories_give_their_probabilities():
    model, guide = pairs.vae(4, 2, [3], Categorical(3))
    x = torch.tensor([[0.0, 1.0, 2.0, 0.0], [2.0, 2.0, 1.0, 0.0]])
    shapes = {
        (2, 4, 3): reconstruct(model, guide, x, num_samples=7),
        (5, 2, 4, 3): interpolate(model, guide, x, x.flip(0), 5),
        (6, 2, 4, 3): traverse(model, torch.zeros(2, 2), 0, torch.linspace(-1, 1, 6)),
    }
    for shape, probs in shapes.items():
        assert probs.shape == shape
        torch.testing.assert_close(probs.sum(dim=-1), torch.ones(shape[:-1]))


def test_dropout_is_off_and_nothing_needs_a_gradient():
    decoder = torch.nn.Sequential(torch.nn.Dropout(0.5), MLP(2, [8], 6))
    model = VAE(6, 2, decoder, Bernoulli())
    _, guide = pairs.vae(6, 2, [8])
    x, z = torch.ones(3, 6), torch.randn(3, 2, requires_grad=True)
    for call in (
        lambda: reconstruct(model, guide, x, num_samples=4),
        lambda: interpolate(model, guide, x, 1 - x, 3),
        lambda: traverse(model, z, 0, [0.0, 1.0]),
    ):
        first = call()
        assert torch.equal(first, call())
        assert not first.requires_grad
    assert decoder[0].training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.fills_store
def test_guides_of_other_kinds():
    truth, model, guide = linear()
    x = torch.randn(4, 5).double()
    rows = ppvae.per_datapoint(guide, x)
    torch.testing.assert_close(
        posterior_means(model, rows, x), truth.posterior(x).mean, rtol=1e-6, atol=1e-6
    )
    automatic = AutoNormal(model, init_scale=0.5)
    automatic(x)
    loc = automatic.locs.z.detach()
    torch.testing.assert_close(posterior_means(model, automatic, x), loc)
    ours = reconstruct(model, automatic, x, num_samples=10_000)
    error = 0.5 * model.decoder.layers[0].weight.detach().square().sum(dim=1).sqrt() / 100
    assert float(((ours - model.decode(loc)).abs() / error).max()) < 4.5


def test_models_with_other_sites_are_refused():
    x = torch.ones(3, 6)
    model, guide = pairs.deep_latent_gaussian(6, (3, 2), [4])
    for call in (reconstruct, posterior_means):
        with pytest.raises(ValueError, match=r"DeepLatentGaussian.*\['z_2', 'z_1'\]"):
            call(model, guide, x)
    model, guide = pairs.deep_latent_gaussian(6, (2,), [4])  # One layer is a VAE.
    decoder = model.decoders[0]
    vae = VAE(6, 2, decoder, Bernoulli())
    torch.testing.assert_close(reconstruct(model, guide, x), reconstruct(vae, guide, x))


def test_what_is_unfit_is_refused():
    model, guide = pairs.vae(6, 2, [8])
    x, z = torch.ones(3, 6), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="0 and 1 alone"):
        reconstruct(model, guide, 0.5 * x)
    with pytest.raises(ValueError, match="num_samples must be at least 1; got 0"):
        reconstruct(model, guide, x, num_samples=0)
    with pytest.raises(ValueError, match=r"one shape.*got \(3, 6\) and \(2, 6\)"):
        interpolate(model, guide, x, x[:2])
    with pytest.raises(ValueError, match="steps must be at least 2; got 1"):
        interpolate(model, guide, x, x, 1)
    with pytest.raises(ValueError, match="x_to must be a torch.Tensor"):
        interpolate(model, guide, x, [1.0])
    with pytest.raises(ValueError, match=r"z: expected latents of shape \(\*, 2\); got \(3, 6\)"):
        traverse(model, x, 0, [0.0])
    with pytest.raises(ValueError, match="z has NaN or infinite"):
        traverse(model, z / 0, 0, [0.0])
    for dimension in (-1, 2):
        with pytest.raises(ValueError, match=f"from 0 to 1; got {dimension}"):
            traverse(model, z, dimension, [0.0])
    for values in ([], torch.zeros(2, 2), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="values: expected a sequence"):
            traverse(model, z, 0, values)
    bent = transformed(guide.family, torch.distributions.transforms.AffineTransform(0.0, 2.0))
    other = Amortized(bent, guide.encoder)
    with pytest.raises(ValueError, match=r'Site "z".*no mean in closed form.*traverse'):
        posterior_means(model, other, x)
