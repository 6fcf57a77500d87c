"""Proposals: log densities of any values, against what they are by hand."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import ppvae
from ppvae import pairs
from ppvae.density import check_pair, judging, read_model, weigh
from ppvae.families import LogNormal
from ppvae.guides import PerDatapoint
from ppvae.models import ExponentialGaussian
from ppvae.proposals import (
    Conditioned,
    Freed,
    Prior,
    Proposal,
    knows_any_value,
    mixture_weights,
    proposal_of,
)

X = torch.tensor([0.5, 1.5, 3.0]).double()


def proposed(model, guide, x) -> Proposal:
    """As `ppvae.ais` makes it."""
    return proposal_of(model, guide, x, check_pair(model, guide, x))


def two_layers(x):
    with pyro.plate("data", len(x), dim=-1):
        top = pyro.sample("top", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        z = pyro.sample("z", dist.LogNormal(top.sum(-1), 0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def independent(x):
    with pyro.plate("data", len(x), dim=-1):
        loc = torch.stack([x, -x], dim=-1)
        pyro.sample("top", dist.Normal(loc, 0.7).to_event(1))
        pyro.sample("z", dist.LogNormal(0.1 * x, 0.4))


def one_after_the_other(x):
    with pyro.plate("data", len(x), dim=-1):
        loc = torch.stack([x, -x], dim=-1)
        top = pyro.sample("top", dist.Normal(loc, 0.7).to_event(1))
        pyro.sample("z", dist.LogNormal(0.1 * x + top[..., 0], 0.4))


VALUES = {
    "top": torch.linspace(-2, 2, 24).double().reshape(4, 3, 2),
    "z": torch.linspace(0.1, 4, 12).double().reshape(4, 3),
}


@pytest.mark.parametrize(
    ("guide", "kind", "pull"), [(independent, Freed, 0.0), (one_after_the_other, Conditioned, 1.0)]
)
def test_the_density_of_any_value_is_the_guides(guide, kind, pull):
    with judging(0, X, guide), torch.no_grad():
        found = proposed(two_layers, guide, X)
        density = found.log_prob(X, found.params, VALUES)
        start, target = found.log_densities(X, found.params, VALUES)
    top, z = VALUES["top"], VALUES["z"]
    by_hand = dist.Normal(torch.stack([X, -X], dim=-1), 0.7).log_prob(top).sum(-1)
    by_hand = by_hand + dist.LogNormal(0.1 * X + pull * top[..., 0], 0.4).log_prob(z)
    joint = dist.Normal(0.0, 1.0).log_prob(top).sum(-1)
    joint = joint + dist.LogNormal(top.sum(-1), 0.5).log_prob(z) + dist.Normal(z, 1.0).log_prob(X)
    assert isinstance(found, kind)
    torch.testing.assert_close(density, by_hand)
    torch.testing.assert_close(start, by_hand)
    torch.testing.assert_close(target, joint)


def test_a_guide_that_is_read_and_one_that_is_run_agree():
    with judging(0, X, independent), torch.no_grad():
        read, run = proposed(two_layers, independent, X), Conditioned(two_layers, independent)
        assert isinstance(read, Freed)
        torch.testing.assert_close(
            read.log_prob(X, read.params, VALUES), run.log_prob(X, (), VALUES)
        )


def test_a_top_down_guide_is_run_for_every_value():
    torch.manual_seed(0)
    model, guide = pairs.deep_latent_gaussian(x_dim=6, z_dims=[3, 2], hidden=[5], top_down=True)
    x = torch.bernoulli(torch.full((4, 6), 0.5))
    with judging(0, x, model, guide), torch.no_grad():
        found = proposed(model, guide, x)
        assert isinstance(found, Conditioned)
        # The weights of its own draws are those of the seam.
        with judging(1, x, model, guide):
            weights, latents = weigh(model, guide, x, 7)
        values = {name: z.clone() for name, z in latents.items()}
        start, target = found.log_densities(x, found.params, values)
    torch.testing.assert_close(target - start, weights, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guide", [independent, one_after_the_other])
def test_rows_can_be_taken_in_portions(guide):
    with judging(0, X, guide), torch.no_grad():
        found = proposed(two_layers, guide, X)
        whole = found.log_prob(X, found.params, VALUES)
        part = found.log_prob(
            X[1:], [p[1:] for p in found.params], {n: v[:, 1:] for n, v in VALUES.items()}
        )
        draws = found.draw(X[1:], [p[1:] for p in found.params], 5)
    torch.testing.assert_close(part, whole[:, 1:])
    assert draws["top"].shape == (5, 2, 2)
    assert draws["z"].shape == (5, 2)


@pytest.mark.parametrize("guide", [None, independent, one_after_the_other])
def test_draws_have_the_density_that_is_said_of_them(guide):
    # With q the density of its own draws, E_q[r / q] is 1 for any other density r.
    with judging(3, X), torch.no_grad():
        found = Prior(two_layers) if guide is None else proposed(two_layers, guide, X)
        draws = found.draw(X, found.params, 20_000)
        log_q = found.log_prob(X, found.params, draws)
    middle = torch.stack([X, -X], dim=-1) if guide else torch.zeros(3, 2).double()
    log_r = dist.Normal(middle, 0.5).log_prob(draws["top"]).sum(-1)
    pull = {None: draws["top"].sum(-1), independent: 0.1 * X}.get(
        guide, 0.1 * X + draws["top"][..., 0]
    )
    log_r = log_r + dist.LogNormal(pull, 0.3).log_prob(draws["z"])
    ratio = torch.exp(log_r - log_q)
    assert ((ratio.mean(0) - 1).abs() < 4.5 * ratio.std(0) / 20_000**0.5).all()


def test_the_prior_is_the_models():
    with judging(0, X), torch.no_grad():
        prior = Prior(two_layers)
        start, target = prior.log_densities(X, (), VALUES)
        alone = prior.log_prob(X, (), VALUES)
    top, z = VALUES["top"], VALUES["z"]
    by_hand = dist.Normal(0.0, 1.0).log_prob(top).sum(-1)
    by_hand = by_hand + dist.LogNormal(top.sum(-1), 0.5).log_prob(z)
    torch.testing.assert_close(start, by_hand)
    torch.testing.assert_close(alone, by_hand)
    torch.testing.assert_close(target - start, dist.Normal(z, 1.0).log_prob(X))


def test_a_value_outside_of_the_support_has_no_density():
    model = ExponentialGaussian().double()
    guide = PerDatapoint(LogNormal(), 3).double()
    outside = {"z": torch.tensor([[-1.0, 0.5, 1.0]]).double()}
    with judging(0, X, model, guide), torch.no_grad():
        found = proposed(model, guide, X)
        for proposal in (found, Conditioned(model, guide), Prior(model)):
            density = proposal.log_prob(X, proposal.params, outside)
            assert torch.isneginf(density[0, 0])
            assert torch.isfinite(density[0, 1:]).all()


@pytest.mark.fills_store
def test_an_auto_guide_is_read_through_its_deltas():
    model = ExponentialGaussian()
    x = X.float()
    guide = AutoNormal(model, init_scale=0.3)
    guide(x)
    with judging(0, x, model, guide), torch.no_grad():
        found = proposed(model, guide, x)
        z = torch.tensor([[0.2, 1.0, 2.0]])
        density = found.log_prob(x, found.params, {"z": z})
    loc = guide.locs.z
    by_hand = dist.LogNormal(loc, guide.scales.z).log_prob(z)
    assert isinstance(found, Freed)
    torch.testing.assert_close(density, by_hand.detach(), rtol=1e-4, atol=1e-4)
    exact = model.log_evidence(x)
    annealed = ppvae.ais(model, guide, x, num_chains=64, num_steps=30)
    assert ((annealed.value - exact).abs() < 4.5 * annealed.stderr).all()


def test_a_guide_with_a_factor_is_not_read_without_it():
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("top", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("z", dist.LogNormal(0.1 * x, 0.4))
            pyro.factor("extra", 0.5 * x)

    with judging(0, X), torch.no_grad(), pytest.raises(ValueError, match="another density"):
        proposed(two_layers, guide, X)


def test_a_guide_that_says_something_else_at_each_call_is_refused():
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("top", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("z", dist.LogNormal(torch.randn(()), 0.4))

    with judging(0, X), torch.no_grad(), pytest.raises(ValueError, match="another density"):
        proposed(two_layers, guide, X)


def test_the_mixture_of_proposals_is_unbiased_where_one_is_far_off():
    model = ExponentialGaussian().double()
    sites = read_model(model, X)

    def narrow(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.LogNormal(1.5 * torch.ones_like(x), 0.1))

    with judging(0, X, model), torch.no_grad():
        both = [Prior(model), proposal_of(model, narrow, X, sites)]
        assert all(knows_any_value(p, X) for p in both)
        weights = mixture_weights(both, X, 20_000)
        rows = torch.tensor([2, 0])
        part = mixture_weights([p.of_rows(rows) for p in both], X[rows], 10)
    relative = torch.exp(weights - model.log_evidence(X)).mean(0)
    error = torch.exp(weights - model.log_evidence(X)).std(1).square().sum(0).sqrt() / 2
    assert ((relative.mean(0) - 1).abs() < 4.5 * error / 20_000**0.5).all()
    assert part.shape == (2, 10, 2)
