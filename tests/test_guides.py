"""Guides: a family times a parameter source, and freeing any guide into a table."""

import copy
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import POSITIVE_FAMILIES
from pyro.infer.autoguide import AutoNormal

import ppvae
from ppvae import pairs
from ppvae.families import DiagonalNormal, FullRankNormal, LogNormal
from ppvae.guides import Amortized, PerDatapoint, per_datapoint
from ppvae.models import ExponentialGaussian
from ppvae.nn import MLP


@pytest.mark.parametrize("name", POSITIVE_FAMILIES)
def test_a_freed_guide_is_the_guide(name):
    model, guide = pairs.exponential_gaussian(POSITIVE_FAMILIES[name]())
    x = torch.rand(5)
    freed = per_datapoint(guide, x, model=model)
    ours = ppvae.log_weights(model, guide, x, 100)
    assert torch.equal(ours, ppvae.log_weights(model, freed, x, 100))
    before = [p.clone() for p in guide.parameters()]
    with torch.no_grad():
        freed.table("z").weight += 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))
    assert not torch.equal(ours, ppvae.log_weights(model, freed, x, 100))
    again = per_datapoint(freed, x)
    assert torch.equal(again.table("z").weight, freed.table("z").weight)
    assert again.table("z").weight is not freed.table("z").weight


FOREIGN = {
    "Normal": (lambda x: dist.Normal(x.sum(-1), 0.7), (), "DiagonalNormal()"),
    "Normal, event": (lambda x: dist.Normal(2 * x, 0.7).to_event(1), (2,), "DiagonalNormal(2)"),
    "MultivariateNormal": (
        lambda x: dist.MultivariateNormal(x, torch.eye(2) + 0.3),
        (2,),
        "FullRankNormal(2)",
    ),
    "LogNormal": (lambda x: dist.LogNormal(x[:, 0], 0.5), (), "LogNormal()"),
    "Gamma": (lambda x: dist.Gamma(x.exp(), 2.0).to_event(1), (2,), "Gamma(2)"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_guide_written_by_hand_is_freed_by_its_distribution(name):
    member, event, family = FOREIGN[name]

    def guide(x):
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("latent.z", member(x))

    def model(x):
        positive = family.startswith(("LogNormal", "Gamma"))
        prior = dist.Exponential(1.0) if positive else dist.Normal(0.0, 1.0)
        with pyro.plate("rows", len(x), dim=-1):
            z = pyro.sample("latent.z", prior.expand(event).to_event(len(event)))
            mean = z[..., None] if not event else z
            pyro.sample("x", dist.Normal(mean.expand(*mean.shape[:-1], 2), 1.0).to_event(1), obs=x)

    x = torch.randn(6, 2)
    freed = per_datapoint(guide, x, model=model)
    assert repr(freed.families["latent.z"]) == family
    torch.testing.assert_close(
        ppvae.log_weights(model, guide, x, 50), ppvae.log_weights(model, freed, x, 50)
    )


def test_a_guide_whose_sites_depend_on_each_other_is_refused_by_name():
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(x, 1.0))
            pyro.sample("b", dist.Normal(a, 1.0))

    with pytest.raises(ValueError, match="'b'.*depends on another latent.*family="):
        per_datapoint(guide, torch.randn(4))


def test_an_autonormal_is_freed_with_the_model_and_refused_without():
    model = ExponentialGaussian()
    x = torch.rand(4)
    auto = AutoNormal(model)
    with ppvae.isolation.private_store():
        auto(x)
    freed = per_datapoint(auto, x, model=model)
    # The bijection onto the half-line is exp: log z is normal.
    assert repr(freed.families["z"]) == "LogNormal()"
    expected = torch.stack([auto.locs.z, auto.scales.z.log()], dim=-1)
    torch.testing.assert_close(freed.table("z").weight, expected)
    with pytest.raises(ValueError, match="'z'.*Delta.*pass the model too"):
        per_datapoint(auto, x)


def test_rows_pick_rows_of_the_table():
    guide = PerDatapoint(LogNormal(), 10)
    with torch.no_grad():
        guide.table("z").weight.copy_(torch.arange(20.0).reshape(10, 2))
    x = torch.rand(3)
    with guide.rows(torch.tensor([7, 2, 2])):
        assert guide.params(x)["z"].tolist() == [[14, 15], [4, 5], [4, 5]]
        with guide.rows(slice(1, 4)):
            assert guide.params(x)["z"].tolist() == [[2, 3], [4, 5], [6, 7]]
        assert guide.params(x)["z"].tolist() == [[14, 15], [4, 5], [4, 5]]
    with pytest.raises(ValueError, match=r"10 rows.*\(3,\).*guide.rows.*fit_per_datapoint"):
        guide.params(x)


@pytest.mark.fills_store
def test_rows_make_classic_svi_touch_only_their_gradients():
    model, guide = ExponentialGaussian(), PerDatapoint(LogNormal(), 10)
    loss = pyro.infer.Trace_ELBO()
    with guide.rows(torch.tensor([4, 8])):
        loss.loss_and_grads(model, guide, torch.rand(2))
    moved = guide.table("z").weight.grad.abs().sum(-1) > 0
    assert moved.nonzero().flatten().tolist() == [4, 8]


def test_representations():
    assert repr(pairs.vae(64, 8, [100])[1]) == (
        "Amortized(DiagonalNormal(8), MLP(64 -> 100 -> 16, ELU), site='z')"
    )
    assert repr(Amortized(FullRankNormal(2), MLP(3, [], 5), site="w")) == (
        "Amortized(FullRankNormal(2), MLP(3 -> 5, linear), site='w')"
    )
    assert repr(PerDatapoint({"a": LogNormal(), "b": DiagonalNormal(2)}, 7)) == (
        "PerDatapoint(LogNormal(), Table(7 rows x 2), site='a'; "
        "DiagonalNormal(2), Table(7 rows x 4), site='b')"
    )
    assert repr(pairs.vae(6, 2, [5])[0]) == (
        "VAE(x_dim=6, z_dim=2, decoder=MLP(2 -> 5 -> 6, ELU), likelihood=Bernoulli())"
    )


@pytest.mark.fills_store
def test_guides_need_rows_and_encoders_need_the_families_size():
    with pytest.raises(ValueError, match="Amortized needs the rows x"):
        pairs.exponential_gaussian()[1]()
    with pytest.raises(ValueError, match="PerDatapoint needs the rows x"):
        PerDatapoint(LogNormal(), 3)()
    short = Amortized(DiagonalNormal(3), MLP(4, [], 5))
    with pytest.raises(ValueError, match=r"\(2, 6\).*DiagonalNormal\(3\).*\(2, 5\).*num_params"):
        short(torch.zeros(2, 4))


@pytest.mark.parametrize("source", ["amortized", "per_datapoint"])
@pytest.mark.fills_store
def test_copies_and_pickles_are_guides_of_their_own(source):
    model, guide = pairs.exponential_gaussian()
    x = torch.rand(4)
    if source == "per_datapoint":
        guide = per_datapoint(guide, x)
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    for other in (copy.deepcopy(guide), torch.load(file, weights_only=False)):
        expected = ppvae.log_weights(model, guide, x)
        assert torch.equal(ppvae.log_weights(model, other, x), expected)
        svi = pyro.infer.SVI(model, other, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
        pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), pyro.infer.Trace_ELBO()).step(x)
        svi.step(x)
        assert torch.equal(ppvae.log_weights(model, guide, x), expected)
        assert not torch.equal(ppvae.log_weights(model, other, x), expected)


def test_state_dicts_go_into_a_fresh_guide():
    model, guide = pairs.factor_analysis()
    _, fresh = pairs.factor_analysis()
    x = torch.randn(4, 6)
    assert not torch.equal(ppvae.log_weights(model, guide, x), ppvae.log_weights(model, fresh, x))
    fresh.load_state_dict(guide.state_dict())
    assert torch.equal(ppvae.log_weights(model, guide, x), ppvae.log_weights(model, fresh, x))
