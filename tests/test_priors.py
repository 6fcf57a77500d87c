"""Priors: densities and draws, and a VampPrior's encoder that model and guide share."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import sigmas
from pyro.infer import SVI, TraceMeanField_ELBO

import ppvae
from ppvae import pairs
from ppvae.distributions import Mixture
from ppvae.families import DiagonalNormal, Flow, FullRankNormal, Given
from ppvae.guides import per_datapoint
from ppvae.isolation import forked_rng, private_store
from ppvae.likelihoods import Bernoulli, Gaussian
from ppvae.models import VAE, DeepLatentGaussian, ImplicitModel
from ppvae.nn import MLP
from ppvae.priors import FlowPrior, NormalMixture, StandardNormal, VampPrior


def vamp(family=None, count=4):
    family = DiagonalNormal(2) if family is None else family
    return VampPrior(MLP(6, [8], family.num_params), family, torch.randn(count, 6))


PRIORS = {
    "StandardNormal": lambda: StandardNormal(2),
    "NormalMixture": lambda: NormalMixture(2, 5),
    "VampPrior": vamp,
    "VampPrior, FullRankNormal": lambda: vamp(FullRankNormal(2)),
    "VampPrior, Flow": lambda: vamp(Flow(2, hidden=(8,))),
    "FlowPrior": lambda: FlowPrior(2, hidden=(16,)),
}
every_prior = pytest.mark.parametrize("make", PRIORS.values(), ids=PRIORS.keys())


@every_prior
def test_the_density_integrates_to_one_and_draws_have_its_moments(make):
    prior = make().double()
    axis = torch.linspace(-12, 12, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    cell = float(axis[1] - axis[0]) ** 2
    member = prior.distribution()
    with torch.no_grad():
        weight = member.log_prob(grid).exp() * cell
        draws = member.sample((20_000,))
    assert abs(float(weight.sum()) - 1) < 1e-4
    for statistic in (lambda z: z, lambda z: z**2, lambda z: z[:, :1] * z[:, 1:], torch.tanh):
        mean, values = weight @ statistic(grid), statistic(draws)
        assert sigmas(values.mean(0), mean, values.std(0) / len(values) ** 0.5) < 5


@every_prior
def test_shapes_of_a_batch_and_of_draws(make):
    member = make().distribution()
    assert (member.batch_shape, member.event_shape) == ((), (2,))
    wide = member.expand((3,))
    assert wide.sample((7,)).shape == (7, 3, 2)
    z = torch.randn(7, 3, 2)
    with torch.no_grad():
        torch.testing.assert_close(wide.log_prob(z), member.log_prob(z))
        assert wide.log_prob(z[0, 0]).shape == (3,)
        assert member.log_prob(z[0, 0]).shape == ()


def test_a_mixture_of_normals_is_the_sum_of_its_components():
    prior = NormalMixture(3, 7).double()
    with torch.no_grad():
        prior.logits.copy_(torch.randn(7))
        prior.log_scales.sub_(3.0)  # Narrow ones, far out: what cancellation would spoil.
    z = 10 * torch.randn(5, 4, 3).double()
    components = dist.Normal(prior.locs, prior.log_scales.exp()).to_event(1)
    each = components.log_prob(z[..., None, :]) + torch.log_softmax(prior.logits, 0)
    truth = torch.logsumexp(each, dim=-1)
    torch.testing.assert_close(prior.distribution().log_prob(z), truth)
    single = prior.float().distribution().log_prob(z.float())
    torch.testing.assert_close(single, truth.float(), rtol=1e-5, atol=1e-4)


def test_a_mixture_is_the_same_in_blocks(monkeypatch):
    for family in (DiagonalNormal(2), FullRankNormal(2)):
        prior = vamp(family).double()
        z = torch.randn(50, 2).double()
        whole = prior.distribution().log_prob(z)
        with monkeypatch.context() as patch:
            patch.setattr("ppvae.distributions._BLOCK", 30)
            torch.testing.assert_close(prior.distribution().log_prob(z), whole)


def test_the_shares_of_a_mixture_are_its_weights():
    logits = torch.tensor([0.0, 1.0, 2.0])
    places = torch.tensor([[-9.0], [0.0], [9.0]])
    mixture = Mixture(lambda loc: dist.Normal(loc, 0.1).to_event(1), places, logits)
    drawn = mixture.sample((10_000,))
    share = torch.stack([((drawn - place).abs() < 1).float().mean() for place in places[:, 0]])
    wanted = torch.softmax(logits, 0)
    assert sigmas(share, wanted, (wanted * (1 - wanted) / 10_000).sqrt()) < 5
    with pytest.raises(ValueError, match="support"):
        Mixture(
            lambda loc: dist.Normal(loc, 0.1).to_event(1), places, logits, validate_args=True
        ).log_prob(torch.tensor([math.nan]))


def test_a_vamp_prior_is_the_mean_of_the_guides_densities_at_the_pseudo_inputs():
    model, guide = pairs.vae(6, 2, [8], pseudo_inputs=torch.rand(4, 6))
    rows = model.prior.pseudo_inputs
    z = torch.randn(5, 2)
    with torch.no_grad():
        each = guide.family.distribution(guide.params(rows)).log_prob(z[:, None])
        truth = torch.logsumexp(each, dim=-1) - math.log(4)
        torch.testing.assert_close(model.prior.distribution().log_prob(z), truth)


def test_pseudo_inputs_start_where_they_are_told_and_stay_in_the_datas_range():
    start = torch.rand(4, 6)
    model, guide = pairs.vae(6, 2, [8], pseudo_inputs=start)
    assert model.prior.encoder is guide.encoder
    torch.testing.assert_close(model.prior.pseudo_inputs, start.clamp(0.02, 0.98))
    with torch.no_grad():
        for p in model.prior.parameters():
            p.add_(50 * torch.randn_like(p))
    rows = model.prior.pseudo_inputs
    assert ((rows >= 0) & (rows <= 1)).all()
    real, _ = pairs.vae(6, 2, [8], "gaussian", pseudo_inputs=10 * start)
    torch.testing.assert_close(real.prior.pseudo_inputs, 10 * start)
    assert pairs.vae(6, 2, [8], pseudo_inputs=3)[0].prior.pseudo_inputs.shape == (3, 6)


def shared(rate):
    """A pair with a VampPrior, its rows, and what gradient descent makes of it in a step."""
    with forked_rng(0):
        model, guide = pairs.vae(6, 2, [8], pseudo_inputs=4)
        with private_store(), torch.no_grad():
            x = model(size=20)
    unique = {id(p): p for m in (model, guide) for p in m.parameters()}
    before = [p.detach().clone() for p in unique.values()]
    return model, guide, x, list(unique.values()), before


@pytest.mark.fills_store
@pytest.mark.parametrize("way", ["classic", "fit"])
def test_the_shared_encoder_is_trained_once_a_step(way):
    """Adam's first step moves every parameter by its learning rate, twice that if taken twice."""
    rate = 1e-3
    model, guide, x, params, before = shared(rate)
    assert len(params) == len(list(model.parameters()))  # The guide has no other.
    if way == "classic":
        SVI(model, guide, pyro.optim.Adam({"lr": rate}), TraceMeanField_ELBO()).step(x)
    else:
        ppvae.fit(model, guide, x, steps=1, batch_size=20, lr=rate, progress=False)
    for old, new in zip(before, params, strict=True):
        moved = (new.detach() - old).abs()
        assert float(moved.max()) < 1.01 * rate
        assert float(moved.max()) > 0.9 * rate


def test_the_gradient_of_the_shared_encoder_is_that_of_guide_and_prior_together():
    model, guide, x, _, _ = shared(0.0)
    apart = copy.deepcopy(model)
    weight = guide.encoder.layers[0].weight

    def gradients(model, wanted):
        with private_store(), forked_rng(3):
            loss = TraceMeanField_ELBO().differentiable_loss(model, guide, x)
        return torch.autograd.grad(loss, wanted)

    (whole,) = gradients(model, [weight])
    parts = gradients(apart, [weight, apart.prior.encoder.layers[0].weight])
    torch.testing.assert_close(whole, parts[0] + parts[1])
    assert parts[1].abs().max() > 0


def test_freeing_and_comparing_leave_the_models_density_as_it_was():
    model, guide, x, params, before = shared(0.0)
    z = torch.randn(20, 2)
    density = ppvae.log_joint(model, x, z).detach()
    freed = per_datapoint(guide, x, model=model)
    freed.table("z").weight.data.add_(1.0)
    torch.testing.assert_close(ppvae.log_joint(model, x, z).detach(), density)
    comparison = ppvae.compare(model, guide, x[:4], num_samples=200)
    ds = comparison.dataset
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    parts = ds["approximation_gap"] + ds["amortization_gap"]
    assert abs(parts - ds["inference_gap"]).max() < 1e-4


@pytest.mark.fills_store
def test_explaining_a_gap_trains_the_guide_beside_a_model_that_stays():
    """The encoder that the prior shares must not be moved under the model's feet."""
    from ppvae.explanation import EncoderTraining

    model, guide, x, params, before = shared(0.0)
    setting = EncoderTraining.of(model, guide, x, seed=0)
    still = setting.elbo.model
    assert still is not model
    trainable = {id(p) for p in setting._trainable(x)}
    assert trainable == {id(p) for p in guide.encoder.parameters()}
    with setting.restored(), torch.no_grad():
        z = torch.randn(20, 2)
        density = ppvae.log_joint(still, x, z)
        guide.encoder.layers[0].weight.add_(1.0)
        torch.testing.assert_close(ppvae.log_joint(still, x, z), density)
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    plain = pairs.vae(6, 2, [8])
    assert EncoderTraining.of(*plain, x, seed=0).elbo.model is plain[0]


@pytest.mark.fills_store
def test_copied_together_model_and_guide_go_on_sharing():
    model, guide = copy.deepcopy(pairs.vae(6, 2, [8], pseudo_inputs=4))
    assert model.prior.encoder is guide.encoder
    model, guide = model.double(), guide.double()
    assert model.prior.encoder is guide.encoder
    assert model(size=3).dtype == torch.float64


def cross_entropy(prior, z, steps=200):
    """That of a prior that is fitted to draws by maximum likelihood."""
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -prior.distribution().log_prob(z).mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def entropies(draws, log_density):
    """The truth's own entropy, and the cross entropy of the best normal."""
    normal = dist.MultivariateNormal(draws.mean(0), torch.cov(draws.mT))
    return float(-log_density.mean()), float(-normal.log_prob(draws).mean())


def test_a_mixture_learns_two_clusters():
    with forked_rng(0):
        truth = Mixture(
            lambda loc: dist.Normal(loc, torch.tensor([0.3, 0.5])).to_event(1),
            torch.tensor([[-1.0, 0.0], [1.0, 0.0]]),
            torch.zeros(2),
        )
        z = truth.sample((1000,))
        fitted = cross_entropy(NormalMixture(2, 5), z)
    own, normal = entropies(z, truth.log_prob(z))
    assert normal > own + 0.5
    assert fitted < own + 0.02


def test_a_flow_learns_a_bent_density():
    with forked_rng(0):
        first, noise = torch.randn(2, 1000, 1)
        z = torch.cat([first, first**2 + 0.3 * noise], dim=-1)
        fitted = cross_entropy(FlowPrior(2, hidden=(32,)), z)
    log_density = dist.Normal(0.0, 1.0).log_prob(first) + dist.Normal(0.0, 0.3).log_prob(
        0.3 * noise
    )
    own, normal = entropies(z, log_density[:, 0])
    assert normal > own + 1.0
    assert fitted < own + 0.15


def test_networks_are_tried_out_without_a_trace():
    """Neither running statistics, the caller's generator nor the mode: and one row is enough."""

    def network(out):
        parts = (torch.nn.BatchNorm1d(2), torch.nn.Dropout(0.5), torch.nn.Linear(2, out))
        return torch.nn.Sequential(*parts)

    family = DiagonalNormal(2)
    tried = {
        "VAE": (network(6), lambda net: VAE(6, 2, net, Bernoulli())),
        "VampPrior": (network(4), lambda net: VampPrior(net, family, torch.ones(1, 2))),
        "DeepLatentGaussian": (
            network(6),
            lambda net: DeepLatentGaussian(6, (2,), [net], Bernoulli()),
        ),
        "ImplicitModel": (network(6), lambda net: ImplicitModel(net, 2, 6)),
    }
    for net, make in tried.values():
        kept = copy.deepcopy(net.state_dict())
        state = torch.get_rng_state()
        make(net)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(kept[name], value) for name, value in net.state_dict().items())
        assert all(part.training for part in net.modules())
        assert all(p.requires_grad for p in net.parameters())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"FlowPrior: .*at least 2.*got 1.*NormalMixture\(1, 10\)"):
        FlowPrior(1)
    with pytest.raises(ValueError, match="num_components must be at least 1; got 0"):
        NormalMixture(2, 0)
    with pytest.raises(ValueError, match="z_dim must be at least 1; got 0"):
        StandardNormal(0)
    with pytest.raises(ValueError, match=r"prior: .*size 3; got StandardNormal\(2\)"):
        VAE(6, 3, MLP(3, [], 6), Bernoulli(), StandardNormal(2))
    with pytest.raises(ValueError, match="prior: pseudo_inputs make a VampPrior"):
        pairs.vae(6, 2, [4], prior=StandardNormal(2), pseudo_inputs=3)
    with pytest.raises(ValueError, match=r"pseudo_inputs: .*\(K, 6\).*got \(4, 5\)"):
        pairs.vae(6, 2, [4], pseudo_inputs=torch.rand(4, 5))
    with pytest.raises(ValueError, match="pseudo_inputs must be at least 1; got 0"):
        pairs.vae(6, 2, [4], pseudo_inputs=0)
    with pytest.raises(ValueError, match=r"pseudo_inputs: .*\[0, 1\]; got 0 to 2"):
        pairs.vae(6, 2, [4], pseudo_inputs=torch.tensor([[0.0, 1, 2, 0, 0, 0]]))
    family = DiagonalNormal(2)
    with pytest.raises(ValueError, match=r"pseudo_inputs: .*rows.*got \(6,\)"):
        VampPrior(MLP(6, [], 4), family, torch.randn(6))
    with pytest.raises(ValueError, match=r"encoder: .*\(batch, 4\).*got \(batch, 3\)"):
        VampPrior(MLP(6, [], 3), family, torch.randn(2, 6))
    for wrong in (DiagonalNormal(), Given("y", 2, family)):
        with pytest.raises(ValueError, match="family: a VampPrior needs a family over a vector"):
            VampPrior(MLP(6, [], wrong.num_params), wrong, torch.randn(2, 6))


def test_a_grid_of_quantiles_needs_the_standard_normal():
    model, _ = pairs.vae(4, 2, [4], prior=NormalMixture(2, 3))
    with pytest.raises(ValueError, match=r"latent_grid.*NormalMixture\(2, 3\).*samples"):
        ppvae.plots.latent_grid(model, (2, 2))
    assert "prior=NormalMixture(2, 3)" in repr(model)
    assert "prior" not in repr(VAE(6, 2, MLP(2, [], 6), Gaussian()))
