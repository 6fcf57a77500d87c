"""Sigmoid belief networks against sums over all their configurations."""

import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from scipy import optimize, stats
from torch import nn
from torch.nn.functional import logsigmoid, softplus

import ppvae
from ppvae import pairs
from ppvae.baselines import Baseline
from ppvae.distributions import BernoulliVector
from ppvae.families import Bernoulli
from ppvae.guides import Amortized, per_datapoint
from ppvae.models import SigmoidBeliefNetwork
from ppvae.nn import MLP

X_DIM = 4
LAYERS = {"one layer": [3], "two layers": [3, 2]}
each_depth = pytest.mark.parametrize("z_dims", LAYERS.values(), ids=LAYERS.keys())
with_and_without = pytest.mark.parametrize("baseline", [None, [8]], ids=["without", "with"])


def binary(width):
    """All rows of zeros and ones."""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=width)), dtype=torch.float64)


def small(z_dims, *, baseline=None, hidden=(), scale=1.5):
    """A pair of few units, in double precision, whose weights matter."""
    model, guide = pairs.sigmoid_belief_network(X_DIM, z_dims, hidden, baseline=baseline)
    model, guide = model.double(), guide.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn_like(p))
    return model, guide


def widths(model):
    """The width of each site, from the top down as in the guide."""
    return dict(list(zip(model.sites, model.z_dims, strict=True))[::-1])


def log_joints(model, x):
    """All configurations ``(K, units)``, and their log joint density ``(K, batch)``."""
    z = binary(sum(model.z_dims))
    parts = dict(zip(widths(model), z.split(list(widths(model).values()), dim=-1), strict=True))
    return z, ppvae.log_joint(
        model, x, {s: v[:, None].expand(-1, len(x), -1) for s, v in parts.items()}
    )


def exact_elbo(model, params, x):
    """The ELBO of logits ``(batch, units)``, summed over all configurations."""
    z, joint = log_joints(model, x)
    log_q = z @ params.mT - softplus(params).sum(-1)
    return (log_q.exp() * (joint - log_q)).sum(0)


def mean_field_optimum(model, x):
    """The best ELBO of each row, by L-BFGS on the exact one from ten starts."""
    z, joint = log_joints(model, x)
    best = np.full(len(x), -np.inf)
    for row, start in itertools.product(range(len(x)), range(10)):
        here = joint[:, row].detach()

        def loss(values, here=here):
            params = torch.tensor(values, requires_grad=True)
            log_q = z @ params - softplus(params).sum()
            value = (log_q.exp() * (log_q - here)).sum()
            (gradient,) = torch.autograd.grad(value, params)
            return value.item(), gradient.numpy()

        rng = np.random.default_rng(start)
        found = optimize.minimize(
            loss, 2 * rng.standard_normal(z.shape[1]), jac=True, method="L-BFGS-B"
        )
        best[row] = max(best[row], -found.fun)
    return torch.tensor(best)


class Repeated(nn.Module):
    """An encoder that has logits of its own for every row it is given: all start the same."""

    def __init__(self, params, count):
        super().__init__()
        self.rows = nn.Parameter(params.detach().repeat(count, 1))

    def forward(self, x):
        return self.rows


def single_gradients(model, params, x, count, baseline):
    """``count`` independent score-function gradients with respect to the logits of one row."""
    families = {site: Bernoulli(width) for site, width in widths(model).items()}
    guide = Amortized(families, Repeated(params, count), baseline=baseline)
    with ppvae.isolation.private_store():
        TraceGraph_ELBO().loss_and_grads(model, guide, x.expand(count, -1))
    return -guide.encoder.rows.grad


# The model.


def test_the_log_joint_is_that_of_the_formula():
    model, _ = small([3, 2])
    x, z_1, z_2 = (torch.bernoulli(torch.full((7, d), 0.5).double()) for d in (X_DIM, 3, 2))
    (W_0, b_0), (W_1, b_1) = ((p.weight.detach(), p.bias.detach()) for p in model.layers)

    def log_bernoulli(value, logits):
        return (value * logsigmoid(logits) + (1 - value) * logsigmoid(-logits)).sum(-1)

    expected = (
        log_bernoulli(x, z_1 @ W_0.T + b_0)
        + log_bernoulli(z_1, z_2 @ W_1.T + b_1)
        + log_bernoulli(z_2, model.prior["logits"].detach())
    )
    torch.testing.assert_close(ppvae.log_joint(model, x, {"z_1": z_1, "z_2": z_2}), expected)


@each_depth
def test_the_evidence_of_all_rows_sums_to_one_and_is_the_frequency_of_draws(z_dims):
    model, _ = small(z_dims)
    x = binary(X_DIM)
    evidence = log_joints(model, x)[1].logsumexp(0).exp().detach()
    assert abs(float(evidence.sum()) - 1) < 1e-12
    with torch.no_grad(), ppvae.isolation.private_store():
        drawn = model(size=20_000)
    cell = (drawn @ (2.0 ** torch.arange(X_DIM - 1, -1, -1)).double()).long()
    counts = torch.bincount(cell, minlength=len(x)).numpy()
    frequent = evidence.numpy() * 20_000 > 5
    observed = np.append(counts[frequent], counts[~frequent].sum())
    expected = np.append(evidence[frequent], evidence[~frequent].sum()) * 20_000
    kept = expected > 0
    assert stats.chisquare(observed[kept], expected[kept]).pvalue > 1e-6


# What may be listed.


def test_the_values_of_a_vector_of_bernoullis_are_all_there_is():
    logits = torch.randn(5, 3).double()
    q = BernoulliVector(logits)
    every = q.enumerate_support()
    assert every.shape == (8, 5, 3)
    assert q.enumerate_support(expand=False).shape == (8, 1, 3)
    assert len(every[:, 0].unique(dim=0)) == 8
    total = q.log_prob(every).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros_like(total))
    mean = (q.log_prob(every).exp()[..., None] * every).sum(0)
    torch.testing.assert_close(mean, q.mean)
    wide = q.expand([2, 5])
    assert (wide.batch_shape, wide.event_shape) == ((2, 5), (3,))
    torch.testing.assert_close(wide.log_prob(every[0]), q.log_prob(every[0]).expand(2, 5))


@each_depth
def test_enumeration_by_pyro_is_the_exact_elbo_with_its_exact_gradient(z_dims):
    model, guide = small(z_dims)
    x = binary(X_DIM)
    parameters = [*model.parameters(), *guide.parameters()]
    exact = exact_elbo(model, guide.params(x), x).sum()
    expected = torch.autograd.grad(exact, parameters)
    with ppvae.isolation.private_store():
        loss = TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(model, config_enumerate(guide), x)
    assert abs(loss + exact.item()) < 1e-10
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, -gradient)


# The score function and its baseline.


@each_depth
@with_and_without
def test_score_function_gradients_of_the_logits_are_unbiased(z_dims, baseline):
    model, guide = small(z_dims, baseline=baseline)
    x = binary(X_DIM)[5:6]
    params = torch.randn(1, sum(z_dims)).double().requires_grad_()
    (exact,) = torch.autograd.grad(exact_elbo(model, params, x).sum(), params)
    count = 20_000
    drawn = single_gradients(model, params, x, count, guide.baseline)
    distance = drawn.mean(0) - exact[0]
    covariance = torch.cov(drawn.T) / count
    squared = float(distance @ torch.linalg.solve(covariance, distance))
    # The probability beyond five sigma.
    assert stats.chi2.sf(squared, len(distance)) > 5.7e-7


@with_and_without
def test_score_function_gradients_are_unbiased_for_every_parameter(baseline):
    model, guide = small([3, 2], baseline=baseline)
    x = binary(X_DIM)
    parameters = [*model.parameters(), *guide.encoder.parameters()]
    exact = torch.autograd.grad(exact_elbo(model, guide.params(x), x).sum(), parameters)
    loss = TraceGraph_ELBO(200, vectorize_particles=True, max_plate_nesting=1)
    runs = []
    with ppvae.isolation.private_store():
        for _ in range(60):
            for parameter in parameters:
                parameter.grad = None
            loss.loss_and_grads(model, guide, x)
            runs.append(torch.cat([-p.grad.flatten() for p in parameters]))
    drawn = torch.stack(runs)
    distance = drawn.mean(0) - torch.cat([g.flatten() for g in exact])
    assert float((distance.abs() / (drawn.std(0) / math.sqrt(len(drawn)))).max()) < 5


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("vectorized", [True, False])
def test_the_baseline_learns_the_learning_signal_by_least_squares(rows, particles, vectorized):
    """With one layer the learning signals sum to the ELBO, and the residual is known."""
    model, guide = small([3], baseline=[])
    loss = TraceGraph_ELBO(particles, vectorize_particles=vectorized, max_plate_nesting=1)
    x = binary(X_DIM)[:rows]
    with ppvae.isolation.private_store():
        value = -loss.loss_and_grads(model, guide, x)
    residual = value - guide.baseline(x).sum().item()
    bias = guide.baseline.network.layers[-1].bias
    expected = -2 * float(guide.baseline.units) * residual
    assert float(bias.grad) == pytest.approx(expected, rel=1e-9)


@each_depth
def test_the_baseline_lowers_the_variance_and_no_more_than_it_should(z_dims):
    """Measured variances are those of the sum over configurations, each with its own baseline."""
    model, guide = small(z_dims, baseline=[16])
    x = binary(X_DIM)
    model.requires_grad_(False).train(False)
    guide.encoder.requires_grad_(False).train(False)
    ppvae.fit(model, guide, x, loss=TraceGraph_ELBO(), steps=80, lr=5e-2, progress=False)
    totals = []
    for row in range(2):
        here, params = x[row : row + 1], guide.params(x[row : row + 1]).detach()
        variances = []
        for baseline in (None, guide.baseline):
            drawn = single_gradients(model, params, here, 20_000, baseline)
            variance = drawn.var(0)
            if len(z_dims) == 1:
                z, joint = log_joints(model, here)
                log_q = z @ params[0] - softplus(params[0]).sum()
                predicted = 0.0 if baseline is None else float(baseline(here).detach())
                signal = joint[:, 0].detach() - log_q - predicted
                each = (z - torch.sigmoid(params[0])) * signal[:, None]
                mean = (log_q.exp()[:, None] * each).sum(0)
                exact = (log_q.exp()[:, None] * (each - mean) ** 2).sum(0)
                squares = (drawn - drawn.mean(0)) ** 2
                error = squares.std(0) / math.sqrt(len(drawn))
                assert float(((variance - exact).abs() / error).max()) < 5
            variances.append(float(variance.sum()))
        totals.append(variances)
    without, with_ = (sum(column) for column in zip(*totals, strict=True))
    assert with_ < 0.5 * without


@each_depth
def test_a_baseline_is_no_part_of_q(z_dims):
    model, guide = small(z_dims, baseline=[8])
    bare = Amortized(guide.families, guide.encoder)
    x = binary(X_DIM)
    assert torch.equal(
        ppvae.log_weights(model, guide, x, 50), ppvae.log_weights(model, bare, x, 50)
    )
    estimate = ppvae.elbo(model, guide, x, 4000)
    exact = exact_elbo(model, guide.params(x), x).detach()
    assert float(((estimate.value - exact) / estimate.stderr).abs().max()) < 5
    freed = per_datapoint(guide, x, model=model)
    for site, params in guide.by_site(guide.params(x)).items():
        assert torch.equal(freed.table(site).weight, params)


@pytest.mark.fills_store
def test_classic_svi_trains_model_encoder_and_baseline_and_stores_nothing_else():
    model, guide = small([3, 2], baseline=[8])
    x = binary(X_DIM)
    owned = {**dict(model.named_parameters()), **dict(guide.named_parameters())}
    before = {name: p.detach().clone() for name, p in owned.items()}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), TraceGraph_ELBO())
    for size in (16, 5, 1):  # Minibatches of any size.
        svi.step(x[:size])
    assert not any(torch.equal(p, before[name]) for name, p in owned.items())
    stored = pyro.get_param_store().get_state()["params"].values()
    assert {id(p) for p in stored} == {id(p) for p in owned.values()}


@pytest.mark.parametrize(
    "z_dims", [[3], pytest.param([3, 2], marks=pytest.mark.slow)], ids=LAYERS.keys()
)
def test_fit_with_a_baseline_reaches_the_mean_field_optimum(z_dims):
    """In the mean over all rows, within .02 nats of the best logits that each row could have."""
    model, guide = small(z_dims, baseline=[16], hidden=[32], scale=1.0)
    model.requires_grad_(False).train(False)
    x = binary(X_DIM)
    best = mean_field_optimum(model, x)
    loss = TraceGraph_ELBO(16, vectorize_particles=True, max_plate_nesting=1)
    for lr, steps in ((3e-2, 100), (3e-3, 40)):
        fit = ppvae.fit(model, guide, x, loss=loss, steps=steps, lr=lr, progress=False)
        assert fit.completed
    reached = exact_elbo(model, guide.params(x), x).detach()
    assert float((best - reached).min()) > -1e-9
    assert float((best - reached).mean()) < 0.02


@each_depth
def test_per_datapoint_fits_are_the_mean_field_optimum(z_dims):
    """Where coordinate ascent has local optima it may miss the best, but is never above it."""
    model, guide = small(z_dims)
    x = binary(X_DIM)
    best = mean_field_optimum(model, x)
    local = ppvae.fit_per_datapoint(model, guide.families, x)
    tables = [local.guide.table(site).weight for site in widths(model)]
    reached = exact_elbo(model, torch.cat(tables, dim=-1), x).detach()
    assert float((best - reached).min()) > -1e-6
    assert float((best - reached).max()) < 1e-3
    assert bool(local.converged.all())


@each_depth
def test_compare_has_the_exact_evidence_and_gaps_that_are_differences_of_it(z_dims):
    model, guide = small(z_dims, baseline=[8])
    x = binary(X_DIM)
    evidence = log_joints(model, x)[1].logsumexp(0).detach()
    torch.testing.assert_close(ppvae.evidence.enumeration(model, x).value, evidence)
    comparison = ppvae.compare(model, guide, x, num_samples=4000)
    measured = torch.as_tensor(comparison.dataset["log_evidence"].values)
    torch.testing.assert_close(measured, evidence)
    best = mean_field_optimum(model, x)
    own = exact_elbo(model, guide.params(x), x).detach()
    for name, exact in (
        ("approximation_gap", evidence - best),
        ("amortization_gap", best - own),
        ("inference_gap", evidence - own),
    ):
        value, error = comparison.mean(name)
        assert abs(value - float(exact.mean())) < 5 * error + 1e-3, name


def test_frozen_parameters_stay_as_they_are():
    model, guide = small([3])
    model.requires_grad_(False).train(False)
    before = [p.clone() for p in model.parameters()]
    x = binary(X_DIM)
    ppvae.log_joint(model, x, x[:, :3])
    ppvae.fit(model, guide, x, loss=TraceGraph_ELBO(), steps=3, progress=False)
    assert all(map(torch.equal, before, model.parameters()))


# Bad input.


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"x_dim and z_dims: .* got x_dim=4 and z_dims=\[\]"):
        SigmoidBeliefNetwork(4, [])
    with pytest.raises(ValueError, match=r"got x_dim=4 and z_dims=\[3, 0\]"):
        SigmoidBeliefNetwork(4, [3, 0])
    model, _ = small([3])
    with pytest.raises(ValueError, match=r"expected x of shape \(batch, 4\); got \(2, 5\)"):
        model(torch.zeros(2, 5))
    with pytest.raises(ValueError, match='Site "x": .* Binarise the data'):
        model(torch.full((2, 4), 0.5).double())


def test_baselines_that_are_refused():
    with pytest.raises(ValueError, match=r"nats: expected a positive number .* \{'z': 0.0\}"):
        Baseline(MLP(4, [], 1), {"z": 0.0})
    with pytest.raises(ValueError, match=r"network: expected outputs of shape \(2, 1\) .*\['z'\]"):
        Baseline(MLP(4, [], 3), {"z": 1.0})(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"baseline: expected .* \['z'\]; got \['y'\]"):
        Amortized(Bernoulli(3), MLP(4, [], 3), baseline=Baseline(MLP(4, [], 1), {"y": 1.0}))
