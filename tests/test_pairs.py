"""Laws of the ready-made pairs: classic SVI, both ELBO classes, Predictive, fit."""

import math

import pyro
import pytest
import torch
from laws import sigmas
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO

import ppvae
from ppvae import pairs
from ppvae.families import FullRankNormal, Gamma, TruncatedNormal
from ppvae.likelihoods import Gaussian

PAIRS = {
    "exponential_gaussian": pairs.exponential_gaussian,
    "exponential_gaussian, Gamma": lambda: pairs.exponential_gaussian(Gamma()),
    "exponential_gaussian, TruncatedNormal": lambda: pairs.exponential_gaussian(TruncatedNormal()),
    "factor_analysis": pairs.factor_analysis,
    "factor_analysis, FullRankNormal": lambda: pairs.factor_analysis(6, 3, FullRankNormal(3)),
    "ppca": pairs.ppca,
    "semisupervised_vae": lambda: pairs.semisupervised_vae(6, 2, 3, [8]),
    "semisupervised_vae, labelled": lambda: pairs.semisupervised_vae(6, 2, 3, [8], labelled=1),
    "semisupervised_vae, unlabelled": lambda: pairs.semisupervised_vae(6, 2, 3, [8], labelled=0),
    "semisupervised_vae, Gaussian": lambda: pairs.semisupervised_vae(6, 2, 3, [8], "gaussian"),
    "vae": lambda: pairs.vae(6, 2, [8]),
    "vae, Gaussian network": lambda: pairs.vae(6, 2, [8], Gaussian.network()),
    "vae, Gaussian": lambda: pairs.vae(6, 2, [8], "gaussian"),
}
every_pair = pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS.keys())
both_losses = pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])


def data(model, size=40, seed=0):
    with torch.no_grad(), ppvae.isolation.forked_rng(seed), ppvae.isolation.private_store():
        return model(size=size)


@every_pair
@pytest.mark.fills_store
def test_the_model_draws_what_it_scores(make):
    model, guide = make()
    trace = poutine.trace(model).get_trace(size=7)
    x = trace.nodes["x"]["value"].detach()
    assert x.shape[0] == 7
    ours = ppvae.log_joint(model, x, trace.nodes["z"]["value"]).detach()
    torch.testing.assert_close(ours.sum(), trace.log_prob_sum().detach(), rtol=1e-5, atol=1e-4)
    assert guide(x).shape == trace.nodes["z"]["value"].shape


@every_pair
@both_losses
@pytest.mark.fills_store
def test_classic_svi_trains_every_parameter(make, loss):
    model, guide = make()
    x = data(model)
    before = [p.detach().clone() for m in (model, guide) for p in m.parameters()]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss())
    losses = [svi.step(x) for _ in range(3)]
    assert all(math.isfinite(value) for value in losses)
    after = [p.detach() for m in (model, guide) for p in m.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@every_pair
def test_both_elbo_classes_estimate_our_elbo(make):
    model, guide = make()
    x = data(model, size=5)
    ours = ppvae.elbo(model, guide, x, 4000)
    for loss in (
        Trace_ELBO(4000, vectorize_particles=True, max_plate_nesting=1),
        TraceMeanField_ELBO(4000, vectorize_particles=True, max_plate_nesting=1),
    ):
        with ppvae.isolation.private_store(), torch.no_grad():
            theirs = -loss.loss(model, guide, x)
        error = 5 * ours.mean_stderr
        assert abs(5 * ours.mean - theirs) < 4 * math.sqrt(2) * error + 1e-4


@every_pair
@pytest.mark.fills_store
def test_predictive_draws_posteriors_and_new_data(make):
    model, guide = make()
    x = data(model, size=5)
    latent = Predictive(model, guide=guide, num_samples=3)(x)
    assert latent["z"].shape[:2] == (3, 5)
    new = Predictive(pyro.poutine.uncondition(model), guide=guide, num_samples=3)(x)["x"]
    assert new.shape == (3, *x.shape)
    assert not torch.equal(new[0], new[1])
    prior = Predictive(model, num_samples=3)(size=4)
    assert prior["x"].shape[:2] == (3, 4)


@every_pair
def test_fit_lowers_the_loss_and_raises_the_elbo(make):
    model, guide = make()
    x = data(model, size=100)
    before = ppvae.elbo(model, guide, x)
    fit = ppvae.fit(model, guide, x, steps=150, batch_size=50, lr=1e-2, progress=False)
    after = ppvae.elbo(model, guide, x)
    assert fit.completed
    error = math.hypot(before.mean_stderr, after.mean_stderr)
    assert after.mean > before.mean + 4 * error


@pytest.mark.fills_store
def test_two_toy_pairs_train_in_one_process_without_clearing_the_store():
    """Pyro's store hands a second module of the same name the first one's tensors."""
    losses = []
    for _ in range(2):
        model, guide = pairs.exponential_gaussian()
        x = data(model, size=500)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), TraceMeanField_ELBO())
        before = ppvae.elbo(model, guide, x)
        for _ in range(400):
            svi.step(x)
        after = ppvae.elbo(model, guide, x)
        assert after.mean > before.mean + 0.2
        # Trained well: the family's own gap on this toy is about a tenth of a nat.
        gap = float(model.log_evidence(x).mean()) - after.mean
        assert gap < 0.2
        losses.append(after)
    state = pyro.get_param_store().get_state()["params"]
    fit_model, fit_guide = pairs.exponential_gaussian()
    rng = torch.get_rng_state()
    dtype, validation = torch.get_default_dtype(), pyro.settings.get()
    ppvae.fit(fit_model, fit_guide, x, steps=5, progress=False)
    assert torch.equal(rng, torch.get_rng_state())
    assert (torch.get_default_dtype(), pyro.settings.get()) == (dtype, validation)
    left = pyro.get_param_store().get_state()["params"]
    assert {k: id(v) for k, v in left.items()} == {k: id(v) for k, v in state.items()}


def test_a_pair_in_double_precision():
    model, guide = pairs.factor_analysis()
    model, guide = model.double(), guide.double()
    x = torch.randn(5, 6).double()
    assert ppvae.log_weights(model, guide, x).dtype == torch.float64
    estimate = ppvae.iwae(model, guide, x, 5000)
    assert sigmas(estimate.value, model.log_evidence(x).detach(), estimate.stderr + 0.05) < 5
