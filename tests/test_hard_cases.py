"""Cases that once gave a wrong number or ended a run."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import ppvae
from ppvae import pairs
from ppvae.families import DiagonalNormal, FullRankNormal, Gamma, TruncatedNormal
from ppvae.guides import Amortized
from ppvae.isolation import modules_of
from ppvae.models import PPCA, ExponentialGaussian, FactorAnalysis
from ppvae.nn import MLP


def test_sites_in_another_order_than_the_models_keep_their_parameters():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(5.0, 0.1))
            pyro.sample("x", dist.Normal(a + 50 * b, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("b", dist.Normal(x / 50, 0.01))
            pyro.sample("a", dist.Normal(0.0 * x, 0.4))

    x = 250 + torch.randn(5)
    before = ppvae.elbo(model, guide, x)
    fit = ppvae.fit_per_datapoint(model, None, x, init=guide, max_steps=1)
    error = torch.hypot(before.stderr, fit.elbo_stderr)
    assert (fit.elbo > before.value - 4 * error).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_the_truncated_normals_tail_is_reached(dtype, seed):
    """There location and scale are all but confounded, and the Fisher matrix all but singular."""
    x = torch.tensor([-10.0, -6.0, -5.0, -3.0, 1.0], dtype=dtype)
    model = ExponentialGaussian()
    fit = ppvae.fit_per_datapoint(model, TruncatedNormal(), x, seed=seed)
    assert ((model.log_evidence(x) - fit.elbo).abs() < 2e-3 + 4 * fit.elbo_stderr).all()


def test_a_row_that_is_far_from_done_is_not_called_converged():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Gamma(torch.ones(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1e-4), obs=x)

    for seed in range(4):
        fit = ppvae.fit_per_datapoint(model, TruncatedNormal(), torch.tensor([1e4]), seed=seed)
        reached = fit.elbo > -100 - 1e4  # The evidence is about −1e4.
        assert not (fit.converged & ~reached).any()


def test_parameters_beyond_all_numbers_do_not_end_the_run():
    guide = ppvae.PerDatapoint(Gamma(), 2)
    with torch.no_grad():
        guide.table("z").weight[0] = 70.0
    x = torch.tensor([1.0, 2.0])
    fit = ppvae.fit_per_datapoint(ExponentialGaussian(), None, x, init=guide)
    assert ((ExponentialGaussian().log_evidence(x) - fit.elbo) < 0.3).all()


@pytest.mark.parametrize("x", [1.0, 2.0, 4.0])
def test_a_posterior_with_two_modes_is_not_answered_from_between_them(x):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z**2, 0.3), obs=x)

    x = torch.tensor([x]).double()
    fit = ppvae.fit_per_datapoint(model, DiagonalNormal(), x)
    # A normal on one of two equal modes is log 2 short, and a little for the mode's shape.
    gap = ppvae.quadrature(model, x).value - fit.elbo
    assert 0.5 < float(gap) < 0.9


@pytest.mark.parametrize("noise", [0.1, 0.01, 1e-3, 1e-4])
def test_quadrature_follows_a_narrow_ridge(noise):
    torch.manual_seed(0)
    ridge = PPCA(1, 2, loadings=torch.tensor([[1.0, 0.7]]), noise=torch.tensor(noise)).double()
    loadings = torch.tensor([[1.0, 0.7], [2.0, 1.4], [0.5, 0.35]])
    collinear = FactorAnalysis(3, 2, loadings=loadings, noise=noise * torch.ones(3)).double()
    for model in (ridge, collinear):
        z = torch.randn(5, 2).double()
        x = z @ model.loadings.mT + noise * torch.randn(5, model.x_dim).double()
        estimate = ppvae.quadrature(model, x)
        assert (estimate.value - model.log_evidence(x)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("a", [3.0, 0.5, 0.1, 0.05, 0.02])
def test_quadrature_is_right_or_says_that_it_is_not(a, dtype):
    def beta(x):
        with pyro.plate("data", len(x), dim=-1):
            prior = dist.Beta(torch.tensor(a, dtype=dtype), torch.tensor(a, dtype=dtype))
            pyro.sample("x", dist.Bernoulli(pyro.sample("z", prior)), obs=x)

    def gamma(x):
        with pyro.plate("data", len(x), dim=-1):
            prior = dist.Gamma(torch.tensor(a, dtype=dtype), torch.ones((), dtype=dtype))
            pyro.sample("x", dist.Poisson(pyro.sample("z", prior)), obs=x)

    for model, x in ((beta, 1.0), (gamma, 0.0)):
        exact = torch.tensor(0.5).log() if model is beta else -a * torch.tensor(2.0).log()
        estimate = ppvae.quadrature(model, torch.tensor([x], dtype=dtype))
        assert (estimate.value - exact).abs() < estimate.stderr + 1e-5


def test_an_integral_that_is_not_sure_gives_way_to_importance_weighting():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Gamma(torch.tensor(0.02), 1.0))
            pyro.sample("x", dist.Poisson(z + 1e-3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Gamma(torch.full((len(x),), 0.02), 1.0))

    comparison = ppvae.compare(model, guide, torch.zeros(2), num_samples=50, max_steps=4)
    assert comparison.dataset.attrs["evidence_kind"] == "iwae"


def test_quadrature_keeps_its_memory_bound(monkeypatch):
    model, _ = pairs.vae(30, 2, [4])
    x = (torch.rand(3, 30) > 0.5).float()
    whole = ppvae.quadrature(model, x)
    monkeypatch.setattr(ppvae.density, "_ELEMENTS", 9_000)
    largest = []
    decode = model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda z: largest.append(z.shape) or decode(z))
    bounded = ppvae.quadrature(model, x)
    torch.testing.assert_close(bounded.value, whole.value)
    assert max(shape[0] * shape[1] * 30 for shape in largest if len(shape) == 3) <= 9_000


def closed_over():
    decoder = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
    encoder = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))

    def decode(z):
        return decoder(z.reshape(-1, 2)).reshape(*z.shape[:-1], 4)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, dim=-1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return decoder, encoder, model, guide


def test_networks_that_functions_close_over_are_judged_in_eval_mode():
    torch.manual_seed(0)
    decoder, encoder, model, guide = closed_over()
    assert {id(m) for m in modules_of(model, guide)} == {id(decoder), id(encoder)}
    x = torch.randn(30, 4)
    ppvae.fit(model, guide, x, steps=20, batch_size=10, progress=False)
    before = {k: v.clone() for m in (decoder, encoder) for k, v in m.state_dict().items()}
    together = ppvae.log_weights(model, guide, x[:1].repeat(3, 1), 4000)
    alone = ppvae.log_weights(model, guide, x[:1], 4000)
    error = alone.std() / 4000**0.5
    assert (together.mean(0) - alone.mean()).abs().max() < 6 * error
    ppvae.compare(model, guide, x, num_samples=30, evidence_samples=30, max_steps=3)
    after = {k: v for m in (decoder, encoder) for k, v in m.state_dict().items()}
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert decoder.training
    assert encoder.training


def test_a_diverged_run_restores_running_statistics_too():
    encoder = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6))
    model, _ = pairs.factor_analysis(6, 3)
    guide = Amortized(DiagonalNormal(3), encoder)
    x = torch.randn(40, 6)
    fit = ppvae.fit(model, guide, x, steps=10, lr=1e30, progress=False)
    assert not fit.completed
    assert all(torch.isfinite(value).all() for value in guide.state_dict().values())
    # Adam multiplies the gradient by its step size first, which overflows for gradients like these.
    steep = FactorAnalysis(6, 3, noise=1e-3 * torch.ones(6))
    beyond = ppvae.fit(steep, guide, x, steps=1, lr=3e37, progress=False)
    assert beyond.status.startswith("diverged at step 1")
    assert all(torch.isfinite(value).all() for value in guide.state_dict().values())
    last = ppvae.fit(model, guide, x, steps=1, lr=3e37, progress=False)
    assert last.completed == all(bool(torch.isfinite(p).all()) for p in guide.parameters())


def test_a_data_set_whose_last_batch_has_one_row():
    model, _ = pairs.factor_analysis(6, 3)
    guide = Amortized(DiagonalNormal(3), nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6)))
    fit = ppvae.fit(
        model, guide, TensorDataset(torch.randn(65, 6)), steps=6, batch_size=32, progress=False
    )
    assert fit.completed


def test_fit_under_module_local_params():
    x = torch.randn(50, 6)
    # Pyro's modules have to be made under the setting that they are used under.
    with pyro.settings.context(module_local_params=True):
        model, guide = pairs.factor_analysis()
        before = ppvae.elbo(model, guide, x).mean
        ppvae.fit(model, guide, x, steps=100, lr=1e-2, progress=False)
        assert ppvae.elbo(model, guide, x).mean > before + 0.1


def test_a_comparison_across_families_says_so():
    torch.manual_seed(0)
    model = FactorAnalysis(6, 3, loadings=torch.randn(6, 3), noise=torch.ones(6))
    guide = Amortized(DiagonalNormal(3), MLP(6, [], 6))
    x = torch.randn(20, 6)
    across = ppvae.compare(model, guide, x, family=FullRankNormal(3))
    assert across.dataset.attrs["guide_family"] == "DiagonalNormal(3)"
    assert "both guides" not in str(across)
    assert "The guide is DiagonalNormal(3), q* the best FullRankNormal(3)" in str(across)
    # Named or not, the guide's own family is started at the guide's output.
    named = ppvae.compare(model, guide, x, family=DiagonalNormal(3))
    assert "both guides DiagonalNormal(3)" in str(named)
    assert named.dataset.equals(ppvae.compare(model, guide, x).dataset)
