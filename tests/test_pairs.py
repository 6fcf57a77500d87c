"""Laws of the ready-made pairs: classic SVI, both ELBO classes, Predictive, fit."""

import math

import pyro
import pytest
import torch
from laws import sigmas
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.poutine.util import prune_subsample_sites

import ppvae
from ppvae import pairs
from ppvae.density import check_pair, read_model
from ppvae.families import (
    BlockNormal,
    ConditionalFlow,
    Flow,
    FullRankNormal,
    Gamma,
    TruncatedNormal,
    Weibull,
)
from ppvae.likelihoods import Categorical, Gaussian, NegativeBinomial, Poisson
from ppvae.priors import FlowPrior, NormalMixture

PAIRS = {
    "deep_exponential_family": lambda: pairs.deep_exponential_family(5, (4, 3), (8,)),
    "deep_exponential_family, Weibull": lambda: pairs.deep_exponential_family(
        5, (4, 3), (8,), Weibull
    ),
    "deep_latent_gaussian": lambda: pairs.deep_latent_gaussian(6, (3, 2), (8,)),
    "deep_latent_gaussian, top-down": lambda: pairs.deep_latent_gaussian(
        6, (3, 2), (8,), top_down=True
    ),
    "deep_latent_gaussian, one layer": lambda: pairs.deep_latent_gaussian(6, (2,), (8,)),
    "exponential_gaussian": pairs.exponential_gaussian,
    "exponential_gaussian, Gamma": lambda: pairs.exponential_gaussian(Gamma()),
    "exponential_gaussian, TruncatedNormal": lambda: pairs.exponential_gaussian(TruncatedNormal()),
    "factor_analysis": pairs.factor_analysis,
    "factor_analysis, FullRankNormal": lambda: pairs.factor_analysis(6, 3, FullRankNormal(3)),
    "latent_input_network": lambda: pairs.latent_input_network(2, 1, 2, (8,)),
    "latent_input_network, linear": lambda: pairs.latent_input_network(1, 2, 1, ()),
    "gaussian_mixture": pairs.gaussian_mixture,
    "linear_state_space": lambda: pairs.linear_state_space(4, 2, 2),
    "linear_state_space, BlockNormal": lambda: pairs.linear_state_space(
        3, 2, 2, BlockNormal(6, [(0, 1), (2, 3), (4, 5)])
    ),
    "ppca": pairs.ppca,
    "sigmoid_belief_network": lambda: pairs.sigmoid_belief_network(6, [3], [8]),
    "sigmoid_belief_network, two layers": lambda: pairs.sigmoid_belief_network(6, [3, 2], [8]),
    "semisupervised_vae": lambda: pairs.semisupervised_vae(6, 2, 3, [8]),
    "semisupervised_vae, unlabelled": lambda: pairs.semisupervised_vae(6, 2, 3, [8], labelled=0),
    "semisupervised_vae, Gaussian": lambda: pairs.semisupervised_vae(6, 2, 3, [8], "gaussian"),
    "vae": lambda: pairs.vae(6, 2, [8]),
    "vae, Gaussian network": lambda: pairs.vae(6, 2, [8], Gaussian.network()),
    "vae, Gaussian": lambda: pairs.vae(6, 2, [8], "gaussian"),
    "vae, Categorical": lambda: pairs.vae(6, 2, [8], Categorical(3)),
    "vae, Poisson": lambda: pairs.vae(6, 2, [8], Poisson()),
    "vae, NegativeBinomial": lambda: pairs.vae(6, 2, [8], NegativeBinomial.learned(0.5)),
    "vae, images": lambda: pairs.vae(16, 2, [8], image_shape=(1, 4, 4), channels=[3]),
    "vae, NormalMixture": lambda: pairs.vae(6, 2, [8], prior=NormalMixture(2, 3)),
    "vae, VampPrior": lambda: pairs.vae(6, 2, [8], pseudo_inputs=4),
    "vae, FlowPrior": lambda: pairs.vae(6, 2, [8], prior=FlowPrior(2, hidden=(8,))),
    "vae, Flow": lambda: pairs.vae(6, 2, [8], family=Flow(2, hidden=(8,))),
    "vae, ConditionalFlow": lambda: pairs.vae(6, 2, [8], family=ConditionalFlow(2, 3, hidden=(8,))),
}
every_pair = pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS.keys())
both_losses = pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])


def data(model, size=40, seed=0):
    with torch.no_grad(), ppvae.isolation.forked_rng(seed), ppvae.isolation.private_store():
        return model(size=size)


def sample_sites(program, *args, **kwargs):
    """The sample sites of one run, by name, without those of plates and deterministic ones."""
    with ppvae.isolation.private_store():
        trace = prune_subsample_sites(poutine.trace(program).get_trace(*args, **kwargs))
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["infer"].get("_deterministic", False)
    }


def latents_of(program, x):
    """The latent sites of a run on rows, and their values without gradient."""
    sites = {n: s for n, s in sample_sites(program, x).items() if not s["is_observed"]}
    return {name: site["value"].detach() for name, site in sites.items()}


def loss_for(guide, x):
    """An objective that trains the pair: the score function where draws have no gradient."""
    sites = [s for s in sample_sites(guide, x).values() if not s["is_observed"]]
    return TraceMeanField_ELBO if all(s["fn"].has_rsample for s in sites) else TraceGraph_ELBO


@every_pair
def test_the_model_draws_rows_that_it_takes(make):
    model, guide = make()
    x = data(model, size=7)
    assert len(x) == 7
    assert not x.requires_grad
    # `read_model` refuses rows outside of the support, and another shape than was declared.
    with ppvae.isolation.private_store():
        sites = read_model(model, x)
        assert check_pair(model, guide, x).latents.keys() == sites.latents.keys()
    observed = [s for s in sample_sites(model, x).values() if s["is_observed"]]
    for site in observed:
        assert bool(site["fn"].support.check(site["value"]).all())
        assert site["value"].shape == site["fn"].shape()
    for name, value in latents_of(guide, x).items():
        assert value.shape == latents_of(model, x)[name].shape
        assert bool(sites.latents[name].support.check(value).all())


@every_pair
def test_log_joint_is_pyros_log_probability(make):
    model, guide = make()
    model, guide = model.double(), guide.double()
    x = data(model, size=7).double()
    latents = latents_of(guide, x)
    with ppvae.isolation.private_store(), torch.no_grad():
        trace = poutine.trace(poutine.condition(model, data=latents)).get_trace(x)
        theirs = trace.log_prob_sum()
        ours = ppvae.log_joint(model, x, latents)
    torch.testing.assert_close(ours.sum(), theirs, rtol=1e-10, atol=1e-10)


@every_pair
def test_draws_and_rows_are_independent_of_their_company(make):
    """Leading dimensions of draws, and any part of the rows: each figure is a row's own."""
    model, guide = make()
    model, guide = model.double(), guide.double()
    x = data(model, size=6).double()
    draws = [latents_of(guide, x) for _ in range(3)]
    together = {name: torch.stack([d[name] for d in draws]) for name in draws[0]}
    with torch.no_grad():
        whole = ppvae.log_joint(model, x, together)
        assert whole.shape == (3, 6)
        for row, drawn in zip(whole, draws, strict=True):
            torch.testing.assert_close(row, ppvae.log_joint(model, x, drawn), rtol=1e-9, atol=1e-9)
        index = torch.tensor([4, 1])
        part = {name: value[:, index] for name, value in together.items()}
        some = ppvae.log_joint(model, x[index], part)
    torch.testing.assert_close(some, whole[:, index], rtol=1e-9, atol=1e-9)


@every_pair
def test_a_minibatch_estimates_the_whole(make):
    """The loss of a minibatch per row is that of all rows, in the mean over minibatches."""
    model, guide = make()
    x = data(model, size=6)
    whole = ppvae.elbo(model, guide, x, 3000)
    parts = [ppvae.elbo(model, guide, rows, 3000, seed=1 + i) for i, rows in enumerate(x.split(2))]
    value = torch.cat([part.value for part in parts])
    stderr = torch.cat([part.stderr for part in parts])
    assert sigmas(whole.value, value, torch.hypot(whole.stderr, stderr) + 1e-5) < 5


@every_pair
@both_losses
@pytest.mark.fills_store
def test_classic_svi_trains_every_parameter(make, loss):
    model, guide = make()
    x = data(model)
    if loss is TraceMeanField_ELBO and loss_for(guide, x) is not loss:
        pytest.skip("TraceMeanField_ELBO is for guides with reparameterised draws")
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
    for loss in {Trace_ELBO, loss_for(guide, x)}:
        estimator = loss(4000, vectorize_particles=True, max_plate_nesting=1)
        with ppvae.isolation.private_store(), torch.no_grad():
            theirs = -estimator.loss(model, guide, x)
        error = 5 * ours.mean_stderr
        assert abs(5 * ours.mean - theirs) < 4 * math.sqrt(2) * error + 1e-4


@every_pair
def test_a_fresh_pair_takes_the_state_of_another(make):
    pair, fresh = make(), make()
    x = data(pair[0], size=4)
    ppvae.fit(*pair, x, loss=loss_for(pair[1], x)(), steps=2, progress=False)
    for module, other in zip(pair, fresh, strict=True):
        other.load_state_dict(module.state_dict())
    for module, other in zip(pair, fresh, strict=True):
        state, theirs = module.state_dict(), other.state_dict()
        assert state.keys() == theirs.keys()
        assert all(torch.equal(state[key], theirs[key]) for key in state)
    torch.testing.assert_close(
        ppvae.log_weights(*pair, x, 8), ppvae.log_weights(*fresh, x, 8), rtol=1e-6, atol=1e-6
    )


@every_pair
def test_both_precisions_give_one_figure(make):
    model, guide = make()
    x = data(model, size=5)
    single = ppvae.elbo(model, guide, x, 2000)
    assert single.value.dtype == x.dtype == torch.get_default_dtype()
    double = ppvae.elbo(model.double(), guide.double(), x.double(), 2000, seed=1)
    assert double.value.dtype == torch.float64
    error = torch.hypot(single.stderr, double.stderr) + 1e-4
    assert sigmas(single.value, double.value, error) < 5


@every_pair
@pytest.mark.fills_store
def test_predictive_draws_posteriors_and_new_data(make):
    model, guide = make()
    x = data(model, size=5)
    latent = Predictive(model, guide=guide, num_samples=3)(x)
    for name in latents_of(model, x):
        assert latent[name].shape[:2] == (3, 5)
    new = Predictive(pyro.poutine.uncondition(model), guide=guide, num_samples=3)(x)["x"]
    assert new.shape[:2] == (3, 5)
    assert not torch.equal(new[0], new[1])
    prior = Predictive(model, num_samples=3)(size=4)
    assert prior["x"].shape[:2] == (3, 4)


@every_pair
def test_fit_lowers_the_loss_and_raises_the_elbo(make):
    model, guide = make()
    x = data(model, size=100)
    before = ppvae.elbo(model, guide, x)
    loss = loss_for(guide, x)()
    fit = ppvae.fit(model, guide, x, loss=loss, steps=150, batch_size=50, lr=1e-2, progress=False)
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
