"""Alternating training: where it ends is where the likelihood has its maximum."""

import math

import pyro
import pytest
import torch

import ppvae
from ppvae import families, pairs
from ppvae.alternating import fit_alternating
from ppvae.distributions import TruncatedNormal
from ppvae.families import DiagonalNormal, FullRankNormal
from ppvae.isolation import private_store
from ppvae.likelihoods import Gaussian
from ppvae.models import PPCA, VAE, DeepExponentialFamily, FactorAnalysis
from ppvae.nn import MLP
from ppvae.priors import Prior, StandardNormal


class HalfNormal(Prior):
    """Standard normals kept to z ≥ 0."""

    def __init__(self, z_dim):
        super().__init__(z_dim)
        self.register_buffer("zeros", torch.zeros(z_dim))

    def distribution(self):
        return TruncatedNormal(self.zeros, self.zeros + 1).to_event(1)


def factors(size=400, x_dim=5, z_dim=1, seed=3):
    with ppvae.isolation.forked_rng(seed):
        loadings = torch.randn(x_dim, z_dim)
        x = torch.randn(size, z_dim) @ loadings.mT
        return x + torch.tensor([0.5, 0.7, 0.9, 1.1, 1.3]) * torch.randn(size, x_dim)


def best_factor_analysis(x, z_dim=1):
    """The maximum of the likelihood by EM in float64, nats per datum (Rubin & Thayer 1982)."""
    x = x.double() - x.double().mean(0)
    covariance = x.mT @ x / len(x)
    values, vectors = torch.linalg.eigh(covariance)
    w, psi = vectors[:, -z_dim:] * values[-z_dim:].sqrt(), covariance.diagonal().clone()
    for _ in range(500):
        beta = w.mT @ torch.linalg.inv(w @ w.mT + torch.diag(psi))
        second = torch.eye(z_dim) - beta @ w + beta @ covariance @ beta.mT
        w = covariance @ beta.mT @ torch.linalg.inv(second)
        psi = (covariance - w @ beta @ covariance).diagonal()
    model = FactorAnalysis(x.shape[1], z_dim, loadings=w, noise=psi.sqrt()).double()
    return float(model.log_evidence(x).mean().detach())


def evidence(model, x):
    return float(model.log_evidence(x).mean().detach())


def test_alternation_and_amortization_reach_the_maximum_of_the_likelihood():
    """A linear encoder reaches every row's optimum of factor analysis, and a table too."""
    x = factors()
    maximum = best_factor_analysis(x)
    model = FactorAnalysis(5, 1)
    run = fit_alternating(model, DiagonalNormal(1), x, rounds=200, lr=3e-2, batch_size=400)
    assert run.completed
    assert run.rounds == 200
    assert run.status == "completed 200 rounds"
    assert maximum - 0.01 < evidence(model, x) <= maximum + 1e-5
    # A normal holds the posterior of one factor: the guide has no gap left.
    gap = evidence(model, x) - ppvae.elbo(model, run.guide, x).mean
    assert abs(gap) < 0.005
    other, guide = pairs.factor_analysis(5, 1)
    ppvae.fit(other, guide, x, steps=350, batch_size=400, lr=3e-2, progress=False)
    assert maximum - 0.01 < evidence(other, x) <= maximum + 1e-5


@pytest.mark.slow
def test_minibatches_reach_it_too():
    x = factors()
    model = FactorAnalysis(5, 1)
    run = fit_alternating(model, DiagonalNormal(1), x, rounds=400, lr=1e-2, batch_size=100)
    assert run.batch_size == 100
    maximum = best_factor_analysis(x)
    assert maximum - 0.02 < evidence(model, x) <= maximum + 1e-5


@pytest.mark.parametrize("family", [FullRankNormal(2), families.TruncatedNormal(2)])
def test_inference_is_in_eval_mode(family):
    """The model stands still, and its dropout is off: rows go where `fit_per_datapoint` puts them.

    With the decoder linear, a full-rank normal's optimum is the posterior.
    """
    prior, kind = StandardNormal(2), type(family).__name__
    if kind != "FullRankNormal":
        prior = HalfNormal(2)
    decoder = torch.nn.Sequential(torch.nn.Dropout(0.5), MLP(2, [], 4))
    model = VAE(4, 2, decoder, Gaussian(1.0), prior)
    with torch.no_grad(), private_store():
        x = model(size=6)
    run = fit_alternating(
        model, family, x, rounds=1, local_steps=200, lr=1e-12, batch_size=4, seed=1
    )
    assert run.completed
    assert decoder[0].training
    assert all(p.requires_grad for p in model.decoder.parameters())
    ours = ppvae.elbo(model, run.guide, x, num_samples=4000)
    best = ppvae.fit_per_datapoint(model, family, x).guide
    theirs = ppvae.elbo(model, best, x, num_samples=4000)
    error = (ours.stderr**2 + theirs.stderr**2).sqrt()
    assert bool(((ours.value - theirs.value).abs() < 5 * error + 0.01).all())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_local_step_halves_the_way_to_a_gaussian_posterior(steps):
    """From λ = 0, without a move of the model; near enough for the trust region not to bind."""
    model = PPCA(3, 2, noise=torch.tensor(4.0))  # A posterior not far from the prior.
    x = 0.1 * torch.randn(7, 3)
    run = fit_alternating(
        model, FullRankNormal(2), x, rounds=1, local_steps=steps, lr=1e-12, batch_size=7
    )
    with private_store(), torch.no_grad():
        exact = model.posterior(x)
        # The steps of the round, and those at the end.
        member = run.guide.families["z"].distribution(run.guide.table("z").weight)
        left = (exact.mean - member.mean) / exact.mean
    torch.testing.assert_close(left, torch.full_like(left, 0.5 ** (2 * steps)), atol=1e-3, rtol=0)


def test_gamma_rows_reach_the_maximum_of_negative_binomial_counts():
    """x ~ ∫ Poisson(w z) Gamma(z; α, β) dz has its maximum at w = mean(x) β / α."""
    truth = DeepExponentialFamily(
        1, (1,), shape=2.0, rate=1.0, weights=[torch.full((1, 1), 3.0)], background=0.0
    )
    with torch.no_grad(), private_store():
        x = truth(size=200)
    model = DeepExponentialFamily(1, (1,), shape=2.0, rate=1.0, background=0.0)
    run = fit_alternating(
        model, families.Gamma(1), x, rounds=120, local_steps=2, lr=5e-2, batch_size=200
    )
    with private_store():
        found = float(model.weight_0.detach())
    best = float(x.mean()) / 2
    # The log likelihood falls by ½ I (log w − log ŵ)² a datum, I = α (x̄ / α) / (1 + x̄ / α).
    information = 2 * best / (1 + best)
    assert 0.5 * information * math.log(found / best) ** 2 < 0.005
    exact = torch.cat([(2 + x).log(), torch.full_like(x, math.log(1 + found))], 1)
    gamma = families.Gamma(1)
    kl = torch.distributions.kl_divergence(
        gamma.distribution(run.guide.table("z").weight).base_dist,
        gamma.distribution(exact).base_dist,
    )
    assert float(kl.detach().mean()) < 0.05


def test_several_sites_and_their_families():
    model, _ = pairs.deep_latent_gaussian(6, (3, 2), (8,))
    with torch.no_grad(), private_store():
        x = model(size=60)
    own = {"z_1": DiagonalNormal(3), "z_2": FullRankNormal(2)}
    fresh, _ = pairs.deep_latent_gaussian(6, (3, 2), (8,))
    first = fit_alternating(fresh, own, x, rounds=1, local_steps=8, batch_size=60)
    before = ppvae.elbo(fresh, first.guide, x)
    run = fit_alternating(fresh, own, x, rounds=40, batch_size=30)
    after = ppvae.elbo(fresh, run.guide, x)
    assert list(run.guide.families) == ["z_2", "z_1"]
    assert after.mean > before.mean + 4 * math.hypot(before.mean_stderr, after.mean_stderr)
    # The guide is trainable afterwards, and near to the best of its family.
    assert all(p.requires_grad for p in run.guide.parameters())
    best = ppvae.fit_per_datapoint(fresh, own, x)
    gap = best.elbo - ppvae.elbo(fresh, run.guide, x, 1000).value
    assert float(gap.mean()) < 0.1


def test_the_recorded_loss_is_minus_the_elbo_of_the_minibatch():
    model = PPCA(3, 2)
    x = torch.randn(50, 3)
    run = fit_alternating(model, FullRankNormal(2), x, rounds=25, lr=1e-12, batch_size=50)
    late = run.losses[20:]  # With the rows at the exact posterior, where no draw brings noise.
    torch.testing.assert_close(late, torch.full_like(late, -evidence(model, x)))


def test_time_stamps_of_both_kinds_of_training():
    model, guide = pairs.factor_analysis()
    x = torch.randn(60, 6)
    fit = ppvae.fit(model, guide, x, steps=7, progress=False)
    run = fit_alternating(model, DiagonalNormal(3), x, rounds=7)
    for record in (fit, run):
        assert record.elapsed.shape == record.losses.shape == (7,)
        stamps = torch.cat([torch.zeros(1), record.elapsed, torch.tensor([record.seconds])])
        assert bool((stamps.diff() > 0).all())


@pytest.mark.fills_store
def test_the_same_seed_gives_the_same_run_and_state_is_left_alone():
    x = torch.randn(40, 3)
    pyro.param("mine", torch.ones(()))
    tables, store = [], dict(pyro.get_param_store().get_state()["params"])
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = PPCA(3, 1)
        state = torch.get_rng_state()
        run = fit_alternating(model, DiagonalNormal(1), x, rounds=3, batch_size=16, seed=seed)
        assert torch.equal(state, torch.get_rng_state())
        tables.append(run.guide.table("z").weight.detach())
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    after = pyro.get_param_store().get_state()["params"]
    assert {k: id(v) for k, v in after.items()} == {k: id(v) for k, v in store.items()}


def test_a_run_that_diverges_says_so_and_keeps_good_parameters():
    model = PPCA(3, 1)
    run = fit_alternating(model, DiagonalNormal(1), torch.randn(20, 3), rounds=50, lr=1e30)
    assert not run.completed
    assert run.status.startswith("diverged in round")
    assert "diverged in round" in repr(run)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_what_is_unfit_is_refused():
    model, x = PPCA(3, 2), torch.randn(5, 3)
    for kwargs, match in (
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"local_steps": 0}, "local_steps must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"lr": 0.0}, "lr must be positive"),
    ):
        with pytest.raises(ValueError, match=match):
            fit_alternating(model, DiagonalNormal(2), x, **kwargs)
    with pytest.raises(ValueError, match=r"Site 'z': .*event shape"):
        fit_alternating(model, DiagonalNormal(3), x)
    with pytest.raises(ValueError, match=r"each of the latent sites \['z'\]; got \['y'\]"):
        fit_alternating(model, {"y": DiagonalNormal(2)}, x)
    with pytest.raises(ValueError, match="Site 'z': the local steps need draws"):
        fit_alternating(model, families.Bernoulli(2), x)
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_alternating(model, DiagonalNormal(2), torch.full((5, 3), torch.nan))
    fixed = PPCA(3, 2, loadings=torch.ones(3, 2), noise=torch.ones(()), loc=torch.zeros(3))
    with pytest.raises(ValueError, match="Nothing to train"):
        fit_alternating(fixed, DiagonalNormal(2), x)
