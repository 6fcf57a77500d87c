"""The decomposition against closed forms, on real images and on hand-written pairs."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import POSITIVE_FAMILIES
from torch import nn

import ppvae
from ppvae import pairs
from ppvae.families import DiagonalNormal, FullRankNormal, LogNormal
from ppvae.guides import Amortized
from ppvae.models import ExponentialGaussian, FactorAnalysis
from ppvae.nn import MLP

GAPS = ("approximation_gap", "amortization_gap")


def not_below_zero(comparison):
    ds = comparison.dataset
    for gap in GAPS:
        lowest = (ds[gap] + 4 * ds[f"{gap}_stderr"] + 1e-5).values.min()  # Float32 rounds at 1e-6.
        assert lowest >= 0, (gap, float(lowest))


def linear(z_dim=3, rows=200, seed=0):
    torch.manual_seed(seed)
    model = FactorAnalysis(
        6, z_dim, loadings=torch.randn(6, z_dim), noise=0.6 * torch.ones(6)
    ).double()
    return model, (1.5 * torch.randn(rows, 6)).double()


@pytest.mark.parametrize("name", POSITIVE_FAMILIES)
def test_the_toys_gaps(name):
    torch.manual_seed(0)
    model, guide = pairs.exponential_gaussian(POSITIVE_FAMILIES[name]())
    with torch.no_grad(), ppvae.isolation.private_store():
        train = model(size=500)
    fit = ppvae.fit(model, guide, train, steps=300, lr=3e-3, progress=False)
    x = torch.linspace(-2, 5, 15)
    comparison = ppvae.compare(model, guide, x, fit=fit)
    ds = comparison.dataset
    assert ds.attrs["evidence_kind"] == "exact"
    np.testing.assert_allclose(ds["log_evidence"], model.log_evidence(x), rtol=1e-6)
    parts = ds["approximation_gap"] + ds["amortization_gap"]
    np.testing.assert_allclose(ds["inference_gap"], parts, atol=1e-5)
    not_below_zero(comparison)
    assert bool(ds["converged"].all())
    assert float(ds["amortization_gap"].mean()) > 0
    if name == "TruncatedNormal":
        assert float(abs(ds["approximation_gap"]).max()) < 1e-4
    else:
        value, stderr = comparison.mean("approximation_gap")
        assert value > 4 * stderr


def test_a_linear_encoder_with_the_exact_answer_has_no_amortization_gap():
    model, x = linear()
    posterior = model.posterior(x)
    precision = posterior.precision_matrix[0]
    for family in (DiagonalNormal(3), FullRankNormal(3)):
        tril = (
            posterior.scale_tril[0]
            if isinstance(family, FullRankNormal)
            else torch.diag(precision.diagonal().rsqrt())
        )
        encoder = MLP(6, [], family.num_params).double()
        W, noise = model.loadings.detach(), model.noise.detach()
        with torch.no_grad():
            encoder.layers[0].weight.zero_()
            encoder.layers[0].weight[:3] = torch.linalg.solve(precision, W.mT / noise**2)
            zeros = torch.zeros(1, 3).double()
            encoder.layers[0].bias.copy_(family.from_gaussian(zeros, tril[None])[0])
        comparison = ppvae.compare(model, Amortized(family, encoder), x)
        gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
        value, stderr = comparison.mean("approximation_gap")
        exact = 0.0 if isinstance(family, FullRankNormal) else float(gap)
        assert abs(value - exact) < 4 * stderr + 1e-6
        # Both guides are the same distribution up to the fit's precision, on common draws.
        assert float(abs(comparison.dataset["amortization_gap"]).max()) < 1e-3
        not_below_zero(comparison)


def test_an_encoder_that_is_off_by_a_known_amount_has_the_known_gap():
    """Shifting q's mean by s costs ½ sᵀ Λ s nats, with Λ the posterior's precision."""
    model, x = linear(z_dim=2)
    posterior = model.posterior(x)
    precision = posterior.precision_matrix[0]
    sd = precision.diagonal().rsqrt()
    delta = torch.tensor([0.5, -0.3]).double()

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            loc = model.posterior(x).mean + delta * sd
            pyro.sample("z", dist.Normal(loc, sd).to_event(1))

    shift = delta * sd
    exact = 0.5 * float(shift @ precision @ shift)
    comparison = ppvae.compare(model, guide, x, num_samples=2000)
    value, stderr = comparison.mean("amortization_gap")
    assert abs(value - exact) < 4 * stderr
    assert stderr < 0.01


def test_the_interval_of_the_mean_gap_covers_the_exact_value():
    """60 repetitions on other data and draws: more than 9 misses of a 95 % interval are rare."""
    model, _ = linear(z_dim=2)
    precision = model.posterior(torch.zeros(1, 6).double()).precision_matrix[0]
    exact = 0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))
    covered = 0
    for seed in range(60):
        x = linear(z_dim=2, rows=20, seed=seed + 1)[1]
        comparison = ppvae.compare(
            model, pairs.factor_analysis(6, 2)[1].double(), x, num_samples=200, seed=seed
        )
        value, stderr = comparison.mean("approximation_gap")
        covered += abs(value - exact) < 1.96 * stderr
    assert covered >= 51


def digits_pair(z_dim, steps):
    digits = ppvae.data.load("digits")
    torch.manual_seed(0)
    model, guide = pairs.vae(64, z_dim, [64])
    fit = ppvae.fit(model, guide, digits.train, steps=steps, lr=2e-3, progress=False)
    return model, guide, digits.test, fit


def test_the_digits_vae_has_both_gaps():
    model, guide, test, fit = digits_pair(z_dim=8, steps=1000)
    comparison = ppvae.compare(model, guide, test, fit=fit)
    ds = comparison.dataset
    assert ds.attrs["evidence_kind"] == "iwae"
    for gap in GAPS:
        value, stderr = comparison.mean(gap)
        assert value > 4 * stderr
    not_below_zero(comparison)
    assert float(ds["converged"].mean()) > 0.95
    assert float(ds["log_evidence"].mean()) > -25  # An independent-pixel model has about −30.
    a = ds.attrs
    saved = a["seconds_local_fit"] - a["seconds_encoding"]
    assert a["break_even"] == pytest.approx(a["seconds_training"] * len(test) / saved)
    text = str(comparison)
    for words in ("297 data", "approximation", "amortization", "a lower bound", "q* converged in"):
        assert words in text


def test_a_two_dimensional_vae_is_integrated():
    model, guide, test, _ = digits_pair(z_dim=2, steps=300)
    comparison = ppvae.compare(model, guide, test[:40])
    assert comparison.dataset.attrs["evidence_kind"] == "quadrature"
    not_below_zero(comparison)
    assert float(comparison.dataset["log_evidence_stderr"].max()) < 1e-3


class PyroTutorialVAE(nn.Module):
    """The architecture of Pyro's own VAE tutorial: functions that call `pyro.module`."""

    def __init__(self, z_dim, hidden, x_dim):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(x_dim, hidden), nn.Softplus())
        self.heads = nn.ModuleList([nn.Linear(hidden, z_dim), nn.Linear(hidden, z_dim)])
        self.decoder = nn.Sequential(
            nn.Linear(z_dim, hidden), nn.Softplus(), nn.Linear(hidden, x_dim), nn.Sigmoid()
        )
        self.z_dim = z_dim

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            loc = torch.zeros(x.shape[0], self.z_dim)
            z = pyro.sample("latent", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            image = self.decoder(z)
            pyro.sample("obs", dist.Bernoulli(image).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        pyro.module("heads", self.heads)
        with pyro.plate("data", x.shape[0]):
            h = self.encoder(x)
            loc, scale = self.heads[0](h), torch.exp(self.heads[1](h))
            pyro.sample("latent", dist.Normal(loc, scale).to_event(1))


def test_pyros_tutorial_vae_goes_through_unchanged():
    torch.manual_seed(0)
    digits = ppvae.data.load("digits")
    vae = PyroTutorialVAE(5, 40, 64)
    fit = ppvae.fit(vae.model, vae.guide, digits.train, steps=300, lr=3e-3, progress=False)
    assert len(pyro.get_param_store()) == 0
    comparison = ppvae.compare(vae.model, vae.guide, digits.test[:50], fit=fit)
    assert comparison.dataset.attrs["family"] == "DiagonalNormal(5)"
    not_below_zero(comparison)
    assert comparison.mean("amortization_gap")[0] > 0
    assert len(pyro.get_param_store()) == 0


def test_a_guide_that_cannot_be_freed_is_measured_against_a_named_family():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("s", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            s = pyro.sample("s", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("z", dist.Laplace(0.5 * x, 0.5 * torch.exp(0.25 * s)))

    x = torch.randn(30)
    with pytest.raises(ValueError, match="'z'.*another latent.*family="):
        ppvae.compare(model, guide, x)
    each = {"s": DiagonalNormal(), "z": DiagonalNormal()}
    comparison = ppvae.compare(model, guide, x, family=each)
    # The posterior is Normal(x/2, √½), so that q* is exact and the whole gap is the guide's:
    # KL(Laplace(b) ‖ N(σ)) = log(σ √(2π) / (2 b e)) + b²/σ², with σ² = ½ and b = ½ exp(s/4), of
    # which E log b = log ½ and E b² = ¼ exp(⅛).
    exact = 0.5 * math.log(2 * math.pi * 0.5) - math.log(2 * 0.5) - 1 + 0.5 * math.exp(1 / 8)
    value, stderr = comparison.mean("amortization_gap")
    assert abs(value - exact) < 4 * stderr
    assert abs(comparison.mean("approximation_gap")[0]) < 1e-5


def test_comparing_changes_nothing_of_the_callers():
    model, guide = pairs.vae(6, 3, [5])
    guide.encoder.layers[0].weight.requires_grad_(False)
    x = (torch.rand(7, 6) > 0.5).float()
    before = {k: v.clone() for m in (model, guide) for k, v in m.state_dict().items()}
    rng = torch.get_rng_state()
    ppvae.compare(model, guide, x, num_samples=20, evidence_samples=20, max_steps=3)
    assert torch.equal(rng, torch.get_rng_state())
    after = {k: v for m in (model, guide) for k, v in m.state_dict().items()}
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert model.training
    assert guide.training
    assert not guide.encoder.layers[0].weight.requires_grad
    assert guide.encoder.layers[0].bias.requires_grad


def test_the_same_seed_gives_the_same_ledger():
    model, guide = pairs.exponential_gaussian()
    x = torch.rand(5)
    one, two, other = (ppvae.compare(model, guide, x, seed=s).dataset for s in (0, 0, 1))
    assert one.equals(two)
    assert not one.equals(other)


def test_the_ledger_has_the_names_of_the_contract():
    model, guide = pairs.exponential_gaussian(LogNormal())
    ds = ppvae.compare(model, guide, torch.rand(4), num_samples=50).dataset
    assert dict(ds.sizes) == {"data": 4, "guide": 2}
    assert ds["guide"].values.tolist() == ["amortized", "per_datapoint"]
    for name in ("log_evidence", *GAPS, "inference_gap"):
        assert ds[name].dims == ds[f"{name}_stderr"].dims == ("data",)
        assert ds[name].attrs["units"] == "nats"
    assert ds["elbo"].dims == ds["elbo_stderr"].dims == ds["pareto_k"].dims == ("guide", "data")
    assert ds["converged"].dtype == bool
    assert {"evidence_kind", "family", "break_even", "seconds_local_fit"} <= set(ds.attrs)


def test_the_table_prints_what_the_ledger_holds():
    model, guide = pairs.exponential_gaussian()
    comparison = ppvae.compare(model, guide, torch.rand(20) * 3)
    lines = str(comparison).splitlines()
    for label, name in (
        ("log p(x)", "log_evidence"),
        ("gap, approximation", "approximation_gap"),
        ("gap, amortization", "amortization_gap"),
        ("gap, total", "inference_gap"),
    ):
        value, stderr = comparison.mean(name)
        [line] = [line for line in lines if line.startswith(f"  {label} ")]
        printed = line.removeprefix(f"  {label}").split()
        assert float(printed[0]) == pytest.approx(value, abs=5.1e-5)
        assert float(printed[2]) == pytest.approx(stderr, abs=5.1e-5)
    sd = float(comparison.dataset["inference_gap"].std())
    assert f"(sd {sd:.3f})" in line


def test_scales_that_are_left_out_are_named():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            with pyro.poutine.scale(scale=0.1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.4 * x, 0.8))

    comparison = ppvae.compare(model, guide, torch.randn(5), num_samples=50)
    assert "scales the log density of z" in str(comparison)


def test_a_row_without_weight_is_reported_and_the_others_are_right():
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.tensor([-50.0, 1.0]), 0.1))

    comparison = ppvae.compare(
        ExponentialGaussian(), guide, torch.tensor([1.0, 2.0]), family=LogNormal()
    )
    ds = comparison.dataset
    assert np.isneginf(ds["elbo"].sel(guide="amortized").values[0])
    assert np.isposinf(ds["inference_gap"].values[0])
    assert np.isfinite(ds["inference_gap"].values[1])
    assert float(ds["approximation_gap"].values.max()) < 0.5
    assert "In 1 row the guide draws outside" in str(comparison)
