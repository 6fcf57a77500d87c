"""Objectives: unbiased for the gradient of their bound, and the numbers that evaluation gives."""

import math
from contextlib import nullcontext

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoNormal
from test_pairs import data, every_pair

import ppvae
from ppvae import pairs
from ppvae.configurations import configurations, joint_table
from ppvae.density import joint, read_model
from ppvae.families import DiagonalNormal, FullRankNormal, LogNormal, TruncatedNormal
from ppvae.guides import PerDatapoint
from ppvae.isolation import forked_rng, private_store
from ppvae.models import ExponentialGaussian, FactorAnalysis
from ppvae.objectives import (
    IWAE,
    VIMCO,
    BetaELBO,
    Cyclical,
    DReG,
    FreeBitsELBO,
    Linear,
    ScoreFunctionELBO,
    StickingTheLanding,
)

# Losses are asked for directly, as classic Pyro code does, which fills the parameter store.
pytestmark = pytest.mark.fills_store

NODES, LOG_WEIGHTS = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(60))
WEIGHTS = LOG_WEIGHTS / math.sqrt(2 * math.pi)


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Case:
    """A pair with one scalar latent a datum, all rows alike, and its bounds by quadrature.

    One evaluation on N equal rows has N independent draws of the gradient of one.
    """

    def __init__(self, model, family, x, params, rows=1500):
        self.model, self.family, self.rows = model.double(), family, rows
        self.guide = PerDatapoint(family, rows).double()
        self.params = torch.tensor(params, dtype=torch.float64)
        self.guide.table("z").weight.data[:] = self.params
        self.row = torch.tensor(x, dtype=torch.float64)[None]
        self.x = self.row.expand(rows, *self.row.shape[1:])

    def tensors(self):
        return [*self.model.parameters()]

    def terms(self, params):
        """log p(x | z), log p(z) and log q(z), at the nodes."""
        loc, scale = params[0], params[1].exp()
        e = loc + scale * NODES
        log_q = dist.Normal(loc, scale).log_prob(e)
        z = e
        if isinstance(self.family, LogNormal):
            z, log_q = e.exp(), log_q - e
        shape = (-1, 1) if self.row.dim() == 1 else (-1, 1, 1)
        log_joint = joint(self.model, self.row, {"z": z.reshape(shape)})[:, 0]
        prior = dist.Exponential if isinstance(self.family, LogNormal) else dist.Normal
        at = (torch.ones(()),) if prior is dist.Exponential else (torch.zeros(()), torch.ones(()))
        log_prior = prior(*(a.double() for a in at)).log_prob(z)
        return log_joint - log_prior, log_prior, log_q

    def exact(self, bound):
        """A bound of one row, and its gradient: λ first, then the model's parameters."""
        params = self.params.clone().requires_grad_()
        value = bound(*self.terms(params))
        tensors = [params, *self.tensors()]
        grads = torch.autograd.grad(value, tensors, allow_unused=True)
        return value.detach(), flat(tensors, grads)

    def estimates(self, objective, count=60):
        """Values and gradients per row of ``count`` evaluations."""
        table = self.guide.table("z").weight
        values, gradients = [], []
        for _ in range(count):
            for tensor in (table, *self.tensors()):
                tensor.grad = None
            loss = objective.loss_and_grads(self.model, self.guide, self.x)
            of_model = [torch.zeros_like(t) if t.grad is None else t.grad for t in self.tensors()]
            parts = [table.grad.sum(dim=0), *(g.flatten() for g in of_model)]
            values.append(-loss / self.rows)
            gradients.append(-torch.cat(parts) / self.rows)
        return torch.tensor(values, dtype=torch.float64), torch.stack(gradients)


def toy():
    return Case(ExponentialGaussian(), LogNormal(), 1.3, [0.1, -0.4])


def factor_analysis():
    model = FactorAnalysis(
        2, 1, loadings=torch.tensor([[1.0], [-0.6]]), noise=torch.tensor([0.8, 1.1])
    )
    return Case(model.requires_grad_(True), DiagonalNormal(1), [0.7, 0.4], [0.3, -0.2])


def elbo(beta=1.0):
    return lambda lik, prior, q: (WEIGHTS * (lik + beta * (prior - q))).sum()


def log_q_times(beta):
    return lambda lik, prior, q: (WEIGHTS * (lik + prior - beta * q)).sum()


def two_draws(lik, prior, q):
    log_w = lik + prior - q
    pair = torch.logaddexp(log_w[:, None], log_w) - math.log(2)
    return (WEIGHTS[:, None] * WEIGHTS * pair).sum()


def free(nats):
    def bound(lik, prior, q):
        return (WEIGHTS * lik).sum() - (WEIGHTS * (q - prior)).sum().clamp(min=nats)

    return bound


ESTIMATORS = {
    "Trace_ELBO": (Trace_ELBO(), elbo()),
    "TraceMeanField_ELBO": (TraceMeanField_ELBO(), elbo()),
    "BetaELBO": (BetaELBO(), elbo()),
    "BetaELBO, three draws": (BetaELBO(num_particles=3), elbo()),
    "BetaELBO, 0.3": (BetaELBO(0.3), elbo(0.3)),
    "BetaELBO, 3": (BetaELBO(3.0), elbo(3.0)),
    "BetaELBO, log q": (BetaELBO(0.3, weighs="log_q"), log_q_times(0.3)),
    "FreeBitsELBO, below": (FreeBitsELBO(3.0, groups="sites"), free(3.0)),
    "FreeBitsELBO, above": (FreeBitsELBO(0.01, groups="sites"), free(0.01)),
    "StickingTheLanding": (StickingTheLanding(), elbo()),
    "StickingTheLanding, three draws": (StickingTheLanding(3), elbo()),
    "ScoreFunctionELBO": (ScoreFunctionELBO(), elbo()),
    "ScoreFunctionELBO, three draws": (ScoreFunctionELBO(3), elbo()),
    "IWAE, one draw": (IWAE(1), elbo()),
    "IWAE": (IWAE(2), two_draws),
    "DReG, one draw": (DReG(1), elbo()),
    "DReG": (DReG(2), two_draws),
    "VIMCO": (VIMCO(2), two_draws),
}


@pytest.mark.parametrize("case", [toy, factor_analysis])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_value_and_gradient_are_those_of_the_bound(case, name):
    objective, bound = ESTIMATORS[name]
    case = case()
    value, gradient = case.exact(bound)
    values, gradients = case.estimates(objective)
    for found, exact in ((values[:, None], value), (gradients, gradient)):
        stderr = found.std(dim=0) / math.sqrt(len(found))
        # What has no noise has rounding.
        assert ((found.mean(dim=0) - exact).abs() <= 5 * stderr + 1e-9).all()


def test_the_cases_tell_the_bounds_apart():
    """The test above could not fail if all bounds had one gradient within its errors."""
    for case in (toy(), factor_analysis()):
        exact = [case.exact(b)[1] for b in (elbo(), elbo(0.3), log_q_times(0.3), two_draws)]
        noise = case.estimates(IWAE(2))[1].std(dim=0) / math.sqrt(60)
        for i, one in enumerate(exact):
            for other in exact[:i]:
                assert ((one - other).abs() > 10 * noise).any()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "objective", [StickingTheLanding(), StickingTheLanding(3), DReG(5), ScoreFunctionELBO(3)]
)
def test_no_noise_where_q_is_the_posterior(objective):
    fa = FactorAnalysis(5, 3)
    toy_model, rows = ExponentialGaussian(), torch.tensor([-1.0, 0.5, 3.0])
    for model, x, family in (
        (fa, data(fa, size=20), FullRankNormal(3)),
        (toy_model, rows, TruncatedNormal()),
    ):
        guide = PerDatapoint(family, len(x))
        weight = guide.table("z").weight
        weight.data = family.params_of(model.posterior(x)).detach()
        objective.loss_and_grads(model, guide, x)
        assert weight.grad.abs().max() < 1e-8
        weight.grad = None
        Trace_ELBO().loss_and_grads(model, guide, x)
        assert weight.grad.abs().max() > 1e-2


# Evaluation gives the number of training


def smooth(guide, x):
    with private_store(), torch.no_grad():
        sites = poutine.trace(guide).get_trace(x).nodes.values()
    return all(s["fn"].has_rsample for s in sites if s["type"] == "sample" and s["name"] != "data")


@pytest.mark.usefixtures("double")
@every_pair
def test_losses_are_the_numbers_of_elbo_and_iwae(make):
    model, guide = (m.double() for m in make())
    x = data(model, size=5)
    weights = []
    sampled = [ScoreFunctionELBO(4), VIMCO(4)]
    if smooth(guide, x):
        sampled += [StickingTheLanding(4), IWAE(4), DReG(4)]
    for objective in sampled:
        # Of the same draws, so equal to rounding.
        with private_store(), forked_rng(3):
            loss = objective.loss(model, guide, x)
        with private_store(), forked_rng(3), torch.no_grad():
            log_w, _ = ppvae.density.weigh(model, guide, x, 4)
        of = ppvae.evidence.elbo_of if objective.target == "ELBO" else ppvae.evidence.iwae_of
        assert -loss == pytest.approx(float(of(log_w).value.sum()), rel=1e-9)
        weights.append(log_w)
    estimate = ppvae.elbo(model, guide, x, num_samples=2000)
    with private_store(), forked_rng(4):
        losses = torch.tensor([BetaELBO(num_particles=20).loss(model, guide, x) for _ in range(50)])
    stderr = math.hypot(float(losses.std()) / 50**0.5, float(estimate.stderr.norm()))
    assert abs(float(losses.mean() + estimate.value.sum())) < 5 * stderr + 1e-9


# Discrete latents


def by_listing(model, guide, x, two):
    """The bound with one or two draws, summed over all values of binary latents."""
    sites = read_model(model, x)
    log_p = joint_table(model, x, sites)
    (z,) = configurations(list(sites.latents.values()), x).values()
    (family,) = guide.families.values()
    log_q = family.distribution(guide.params(x)).log_prob(z[:, None])
    log_w = log_p - log_q
    if not two:
        return (log_q.exp() * log_w).sum()
    mean = torch.logaddexp(log_w[:, None], log_w) - math.log(2)
    return ((log_q[:, None] + log_q).exp() * mean).sum()


def flat(params, grads):
    """Gradients in one vector, zero where there is none."""
    pairs = zip(params, grads, strict=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in pairs]
    )


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("objective", "two"),
    [
        (ScoreFunctionELBO(), False),
        (ScoreFunctionELBO(4), False),
        (BetaELBO(), False),
        (BetaELBO(num_particles=4), False),
        (TraceGraph_ELBO(), False),
        (VIMCO(2), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_gradients_of_binary_latents_are_those_of_the_sum(objective, two):
    model, guide = pairs.sigmoid_belief_network(4, [3], [6])
    # Rows cost little, and their noise averages out as that of calls does.
    x = data(model, size=3).repeat(8, 1)
    params = [*model.parameters(), *guide.parameters()]
    exact = by_listing(model, guide, x, two)
    grads = torch.autograd.grad(exact, params, allow_unused=True)
    expected = flat(params, grads)
    found, losses = [], []
    for _ in range(100):
        for p in params:
            p.grad = None
        losses.append(objective.loss_and_grads(model, guide, x))
        found.append(-flat(params, [p.grad for p in params]))
    found, losses = torch.stack(found), torch.tensor(losses)
    assert abs(float(losses.mean() + exact.detach())) < 5 * float(losses.std()) / 10
    stderr = found.std(dim=0) / 10
    assert ((found.mean(dim=0) - expected).abs() <= 5 * stderr + 1e-9).all()


@pytest.mark.usefixtures("double")
def test_latents_of_both_kinds_take_each_gradient_that_they_can():
    """Model M2: the class by the score function, z given the class through its draws."""
    model, guide = pairs.semisupervised_vae(4, 2, 3, [5], labelled=0)
    x = data(model, size=4).repeat(8, 1)
    params = [p for p in guide.parameters() if p.requires_grad]

    def gradients(objective, guide, count):
        found = []
        for _ in range(count):
            for p in params:
                p.grad = None
            objective.loss_and_grads(model, guide, x)
            found.append(torch.cat([p.grad.flatten() for p in params if p.grad is not None]))
        return torch.stack(found)

    one = gradients(BetaELBO(num_particles=4), guide, 100)
    other = gradients(TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(guide), 100)
    stderr = ((one.var(dim=0) + other.var(dim=0)) / 100).sqrt()
    assert ((one.mean(dim=0) - other.mean(dim=0)).abs() <= 5 * stderr + 1e-9).all()
    assert stderr.max() < 0.1 * one.mean(dim=0).abs().max()


# Where TraceMeanField_ELBO's analytic KL is another number


def mean_loss(objective, model, guide, x, count=50):
    losses = torch.tensor([objective.loss(model, guide, x) for _ in range(count)])
    return float(losses.mean()), float(losses.std()) / count**0.5


def test_the_kl_of_a_guide_from_the_bottom_up_is_sampled():
    model, guide = pairs.deep_latent_gaussian(6, (3, 2), (8,))
    with torch.no_grad():
        for p in [*model.parameters(), *guide.parameters()]:
            p.mul_(3)
    x = data(model, size=30)
    value, stderr = mean_loss(BetaELBO(num_particles=40), model, guide, x)
    sampled, error = mean_loss(ScoreFunctionELBO(40), model, guide, x)
    assert abs(value - sampled) < 5 * math.hypot(stderr, error)


def test_the_change_of_variables_of_an_autoguide_counts():
    """Pyro's analytic KL of a Delta leaves its density out: two nats here."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide, x = AutoNormal(model), torch.tensor([0.5, 2.0])
    guide(x)
    guide.locs.z.data += 1.0
    exact = -float(ppvae.elbo(model, guide, x, num_samples=100_000).value.sum())
    value, stderr = mean_loss(BetaELBO(num_particles=400), model, guide, x)
    assert abs(value - exact) < 5 * stderr + 0.05
    wrong = mean_loss(
        TraceMeanField_ELBO(400, vectorize_particles=True, max_plate_nesting=1), model, guide, x
    )
    assert abs(wrong[0] - exact) > 1.5
    for objective in (StickingTheLanding(200), IWAE(1)):
        value, stderr = mean_loss(objective, model, guide, x, 100)
        assert abs(value - exact) < 5 * stderr + 0.05
    with pytest.raises(ValueError, match="'_?.*' is a draw of the guide's own"):
        FreeBitsELBO(0.1).loss(model, guide, x)


# Schedules and free bits


def test_a_schedule_counts_the_steps_that_ask_for_gradients():
    model, guide = pairs.factor_analysis(4, 2)
    x = data(model, size=6)
    seen = []
    objective = BetaELBO(lambda step: seen.append(step) or 0.5)
    for _ in range(3):
        objective.loss(model, guide, x)
        objective.differentiable_loss(model, guide, x)
        objective.loss_and_grads(model, guide, x)
    assert sorted(set(seen)) == [0, 1, 2]
    assert objective.steps_taken == 3


def test_the_weight_of_a_step_is_the_schedule_s():
    """The loss is linear in β: reconstruction and KL follow from two fixed weights."""
    model, guide = pairs.vae(6, 2, [8])
    x = data(model, size=6)

    def loss(objective):
        with forked_rng(5):
            return objective.loss_and_grads(model, guide, x)

    none, one = loss(BetaELBO(0.0)), loss(BetaELBO(1.0))
    objective = BetaELBO(Linear(4))
    for weight in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0):
        assert loss(objective) == pytest.approx(none + weight * (one - none), rel=1e-5)
    waves = Cyclical(8, cycles=2, start=0.2)
    assert [round(waves(t), 6) for t in range(10)] == [
        0.2, 0.6, 1.0, 1.0, 0.2, 0.6, 1.0, 1.0, 1.0, 1.0,
    ]  # fmt: skip


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("nats", [0.0, 0.2, 0.6, 100.0])
def test_free_bits_are_a_floor_for_the_mean_over_rows(nats):
    model, guide = pairs.vae(6, 3, [8])
    with torch.no_grad():
        for p in guide.parameters():
            p.mul_(2)
    x = data(model, size=20)
    loc, log_scale = guide.params(x).detach().chunk(2, dim=-1)
    kl = 0.5 * (loc**2 + (2 * log_scale).exp() - 1) - log_scale
    expected = float((kl.mean(dim=0) - kl.mean(dim=0).clamp(min=nats)).sum() * 20)
    with forked_rng(6):
        elbo_loss = BetaELBO().loss(model, guide, x)
    with forked_rng(6):
        loss = FreeBitsELBO(nats).loss(model, guide, x)
    assert elbo_loss - loss == pytest.approx(expected, rel=1e-9, abs=1e-9)
    # An element below its floor is left alone by the KL: what moves its λ is the reconstruction.
    below = kl.mean(dim=0) <= nats
    gradients = []
    for objective in (FreeBitsELBO(nats), BetaELBO(0.0), BetaELBO(1.0)):
        table = PerDatapoint(DiagonalNormal(3), 20)
        table.table("z").weight.data = guide.params(x).detach()
        with forked_rng(7):
            objective.loss_and_grads(model, table, x)
        gradients.append(table.table("z").weight.grad)
    flags = torch.cat([below, below])
    torch.testing.assert_close(gradients[0], torch.where(flags, gradients[1], gradients[2]))


def test_nothing_free_is_the_elbo_where_a_sampled_kl_is_negative():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.StudentT(5.0, 0.1, 1.0))

    x, losses = torch.zeros(1), []
    for objective in (FreeBitsELBO(0.0, groups="sites"), BetaELBO(), BetaELBO(0.0)):
        with forked_rng(3):
            losses.append([objective.loss(model, guide, x) for _ in range(10)])
    free, elbo, without = losses
    assert any(one < other for one, other in zip(elbo, without, strict=True))
    assert free == pytest.approx(elbo, rel=1e-5)


@pytest.mark.parametrize("which", ["guide", "model"])
@pytest.mark.parametrize(
    "objective", [BetaELBO(), StickingTheLanding(3), IWAE(3), ScoreFunctionELBO(), FreeBitsELBO(0)]
)
def test_rows_without_a_plate_are_told_to_have_one(objective, which):
    x = torch.ones(5, 2)

    def model(x):
        with pyro.plate("data", len(x)) if which == "guide" else nullcontext():
            z = pyro.sample("z", dist.Normal(torch.zeros(5, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)) if which == "model" else nullcontext():
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    expected = rf"Site 'z' of the {which} lies outside of any plate.*5,?\).*pyro.plate"
    with pytest.raises(ValueError, match=expected):
        objective.loss(model, guide, x)


def test_particles_are_counted_in_whole_numbers():
    with pytest.raises(ValueError, match="num_particles must be at least 1, and whole; got 2.5"):
        IWAE(2.5)


def test_free_bits_keep_the_precision_and_the_device_of_the_pair(device):
    """With nothing free this is the ELBO, also where the scale is no float32 number."""
    model, guide = (m.double().to(device) for m in pairs.vae(6, 3, [8]))
    x = data(model, size=3)
    losses = []
    for objective in (FreeBitsELBO(0.0), BetaELBO()):
        with forked_rng(6, device):
            thirds = [poutine.scale(program, 100 / 3) for program in (model, guide)]
            losses.append(objective.loss(*thirds, x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


# Dropping in


@pytest.mark.parametrize(
    "objective",
    [
        BetaELBO(Linear(50, start=0.5)),
        FreeBitsELBO(0.01, groups="sites"),
        IWAE(5),
        DReG(5),
        StickingTheLanding(),
        ScoreFunctionELBO(8),
        VIMCO(8),
    ],
    ids=repr,
)
def test_classic_svi_trains_with_it(objective):
    model = FactorAnalysis(4, 2, loadings=torch.randn(4, 2))
    guide = PerDatapoint(DiagonalNormal(2), 50)
    x = data(model, size=50)
    before = ppvae.elbo(model, guide, x, num_samples=500)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), objective)
    for _ in range(150):
        svi.step(x)
    assert isinstance(svi.evaluate_loss(x), float)
    after = ppvae.elbo(model, guide, x, num_samples=500)
    gain = (after.value - before.value).sum()
    assert gain > 5 * torch.cat([after.stderr, before.stderr]).norm()


@pytest.mark.parametrize(
    "loss",
    [
        TraceGraph_ELBO,
        lambda: TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
        lambda: RenyiELBO(0.5, num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        lambda: ReweightedWakeSleep(4, max_plate_nesting=1),
    ],
)
def test_pyros_own_keep_working(loss):
    model, guide = pairs.factor_analysis(4, 2)
    x = 2 * data(model, size=4)
    before = ppvae.elbo(model, guide, x)
    fit = ppvae.fit(model, guide, x, loss=loss(), steps=100, lr=0.02, progress=False)
    assert fit.completed
    assert fit.losses.shape == (100,)
    after = ppvae.elbo(model, guide, x)
    gain = (after.value - before.value).sum()
    assert gain > 5 * torch.cat([after.stderr, before.stderr]).norm()


def test_latents_that_all_rows_share():
    model, guide = pairs.bayesian_neural_network(1, 1, [4])
    x = data(model, size=12)
    expected, error = mean_loss(Trace_ELBO(), model, guide, x, 200)
    for objective in (BetaELBO(), BetaELBO(num_particles=3), StickingTheLanding(3)):
        value, stderr = mean_loss(objective, model, guide, x, 100)
        assert abs(value - expected) < 5 * math.hypot(error, stderr)
    for objective in (IWAE(2), DReG(2), VIMCO(2), ScoreFunctionELBO(), FreeBitsELBO(0.1)):
        with pytest.raises(ValueError, match="shared by all rows"):
            objective.loss(model, guide, x)


# What is refused


def test_draws_without_a_path_are_named():
    model, guide = pairs.sigmoid_belief_network(4, [3], [6])
    x = data(model, size=3)
    for objective, instead in (
        (IWAE(3), "VIMCO"),
        (DReG(3), "VIMCO"),
        (StickingTheLanding(), "ScoreFunctionELBO"),
    ):
        with pytest.raises(ValueError, match=rf"'z.*cannot be reparameterised.*{instead}"):
            objective.loss(model, guide, x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BetaELBO(-1.0), "beta must be a finite weight"),
        (lambda: BetaELBO(math.nan), "beta must be a finite weight"),
        (lambda: BetaELBO(weighs="prior"), 'weighs must be "kl" or "log_q"'),
        (lambda: FreeBitsELBO(-0.1), "nats must be a finite weight"),
        (lambda: FreeBitsELBO(0.1, groups="rows"), 'groups must be "elements" or "sites"'),
        (lambda: IWAE(0), "num_particles must be at least 1"),
        (lambda: VIMCO(1), "num_particles must be at least 2"),
        (lambda: Linear(0), "steps must be at least 1"),
        (lambda: Linear(5, stop=-1.0), "stop must be a finite weight"),
        (lambda: Cyclical(3, cycles=4), "at least one cycle"),
        (lambda: Cyclical(30, rise=0.0), r"rise must be in \(0, 1\]"),
        (lambda: Cyclical(30, start=math.inf), "start must be a finite weight"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_that_goes_negative_says_when():
    objective = BetaELBO(lambda step: 1.0 - step)
    objective.steps_taken = 2
    with pytest.raises(ValueError, match="at step 2 must be a finite weight"):
        _ = objective.beta


def test_elements_without_a_kl_of_their_own():
    model, guide = pairs.vae(6, 2, [8], pseudo_inputs=4)
    x = data(model, size=3)
    with pytest.raises(ValueError, match="Site 'z': its elements have no KL.*groups=\"sites\""):
        FreeBitsELBO(0.1).loss(model, guide, x)
    FreeBitsELBO(0.1, groups="sites").loss(model, guide, x)


def test_sites_that_do_not_match():
    model, _ = pairs.vae(6, 2, [8])
    _, guide = pairs.deep_latent_gaussian(6, (3, 2), (8,))
    with pytest.raises(ValueError, match="latent sites must be the model's"):
        IWAE(2).loss(model, guide, torch.ones(3, 6))


def test_networks_that_take_no_draws():
    net = torch.nn.Linear(2, 6)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            logits = net(z.reshape(len(x), 2))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    x = torch.ones(3, 6)
    value, stderr = mean_loss(StickingTheLanding(), model, guide, x, 200)
    expected, error = mean_loss(Trace_ELBO(), model, guide, x, 200)
    assert abs(value - expected) < 5 * math.hypot(stderr, error)
    with pytest.raises(ValueError, match=r"4 draws at once[\s\S]*leading dimensions"):
        IWAE(4).loss(model, guide, x)


# Programs that Pyro allows


def normal_pair(before=lambda x: None, plate="data", **options):
    """z ~ N(0, 1), x | z ~ N(z, 1); the guide may name its plate in another way."""

    def model(x):
        before(x)
        with pyro.plate("data", len(x), **options) as rows:
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        with pyro.plate(plate, len(x), **options) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, 0.8))

    return model, guide


WEIGHED = [
    IWAE(1),
    IWAE(3),
    DReG(3),
    VIMCO(3),
    ScoreFunctionELBO(2),
    FreeBitsELBO(0.1),
]
ALL = [*WEIGHED, BetaELBO(), BetaELBO(num_particles=2), StickingTheLanding(2)]


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_a_factor_outside_of_the_plate_counts_once_or_is_refused(objective):
    """It is no part of one row's weight, where broadcasting would count it once for each row."""
    x = torch.tensor([0.5, -1.0, 2.0])
    model, guide = normal_pair(lambda x: pyro.factor("penalty", x.new_tensor(-7.0)))
    if objective in WEIGHED:
        with pytest.raises(ValueError, match="Site 'penalty' lies outside of any plate"):
            objective.loss(model, guide, x)
    else:
        with forked_rng(1):
            loss = objective.loss(model, guide, x)
        with forked_rng(1):
            assert loss - objective.loss(*normal_pair(), x) == pytest.approx(7.0, rel=1e-5)


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_a_density_of_rows_without_a_plate_is_named(objective):
    model, guide = normal_pair(lambda x: pyro.factor("penalty", -x.square()))
    with pytest.raises(ValueError, match=r"Site 'penalty' .*outside of any plate.*\.to_event"):
        objective.loss(model, guide, torch.tensor([0.5, -1.0, 2.0]))


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_model_and_guide_that_choose_rows_apart_are_refused(objective):
    """Pyro draws other rows for a plate of another name: q(z | x_1) would meet p(x_2 | z)."""
    x = torch.linspace(-3, 3, 20)
    model, guide = normal_pair(plate="rows", subsample_size=4)
    with pytest.raises(ValueError, match="Site 'z': plate 'data' of the model draws rows of its"):
        objective.loss(model, guide, x)
    # Without choice there is nothing to be at odds about.
    assert math.isfinite(objective.loss(*normal_pair(plate="rows"), x))


@pytest.mark.usefixtures("double")
def test_a_factor_on_discrete_draws_reaches_their_gradient_from_outside_of_the_plate():
    logits, x = torch.zeros(3, requires_grad=True), torch.tensor([1.0, -1.0, 0.5])

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)
        pyro.factor("penalty", -2 * k.sum(dim=-1, keepdim=k.dim() > 1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(logits=logits))

    q = logits.sigmoid()
    likelihood = q * (dist.Normal(1.0, 1.0).log_prob(x) - 2)
    likelihood = likelihood + (1 - q) * dist.Normal(0.0, 1.0).log_prob(x)
    entropy = -q * q.log() - (1 - q) * (1 - q).log()
    (exact,) = torch.autograd.grad((likelihood + entropy).sum(), logits)
    found = []
    for _ in range(300):
        logits.grad = None
        BetaELBO(num_particles=4).loss_and_grads(model, guide, x)
        found.append(-logits.grad)
    found = torch.stack(found)
    stderr = found.std(dim=0) / math.sqrt(len(found))
    assert ((found.mean(dim=0) - exact).abs() < 5 * stderr).all()
    assert stderr.max() < 0.05  # Of what the factor adds, half a nat.


@pytest.mark.usefixtures("double")
def test_a_scale_of_its_own_for_each_row_multiplies_the_loss_of_fit_and_not_the_evidence():
    x = torch.tensor([0.5, -1.0, 2.0])
    shift = torch.nn.Linear(1, 1)

    def guide(x):
        pyro.module("shift", shift)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(shift(x[:, None])[:, 0], 0.8))

    model, _ = normal_pair()

    def weighed(program):
        def run(x):
            with poutine.scale(scale=2 + x):
                program(x)

        return run

    scaled = weighed(model), weighed(guide)
    found, plain = ppvae.elbo(*scaled, x, 8), ppvae.elbo(model, guide, x, 8)
    torch.testing.assert_close(found.value, plain.value, rtol=1e-12, atol=0)
    with torch.no_grad():
        mean = shift(x[:, None])[:, 0]
    kl = 0.5 * (mean**2 + 0.64 - 1) - math.log(0.8)
    expected = 0.5 * math.log(2 * math.pi) + 0.5 * ((x - mean) ** 2 + 0.64) + kl
    objective = BetaELBO(num_particles=4000)
    value = objective.loss(*scaled, x)
    assert value == pytest.approx(float(((2 + x) * expected).sum()), abs=0.2)
    # One step of nearly no length.
    fit = ppvae.fit(*scaled, x, loss=objective, steps=1, lr=1e-9, progress=False)
    assert float(fit.losses[0]) == pytest.approx(float(((2 + x) * expected).sum()) / 3, abs=0.07)
    measured = ppvae.gradient_variance(*scaled, x, estimators=[IWAE(2)], num_draws=8)
    assert measured.dataset["target"].values.tolist() == ["IWAE bound, K = 2"]


def test_rows_of_unequal_scale_are_refused_where_they_share_latents():
    model, guide = pairs.bayesian_neural_network(1, 1, [2])
    x = data(model, size=4)
    scaled = poutine.scale(model, scale=torch.arange(1.0, 5.0))
    with pytest.raises(ValueError, match=r"its scale, of shape \(4,\), differs between rows"):
        ppvae.fit(scaled, guide, x, steps=1, progress=False)


# Weights of zero, points, masks


def impossible(x):
    """The last of three values has no probability."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(logits=x.new_tensor([0.0, 0.4, -math.inf])))
        pyro.sample("x", dist.Normal(k.to(x), 1.0), obs=x)


@pytest.mark.usefixtures("double")
def test_draws_of_weight_zero_leave_the_gradient_of_vimco_a_number():
    """Term by term, as the docstring has it; of the two possible values one may be alone."""
    logits, x = torch.tensor([0.2, 0.0, 0.5], requires_grad=True), torch.tensor([0.3])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=logits))

    alone = 0
    for seed in range(30):
        with forked_rng(seed):
            draws = dist.Categorical(logits=logits).expand([3, 1]).sample()[:, 0]
        log_q = logits.log_softmax(0)[draws]
        log_p = torch.tensor([0.0, 0.4, -math.inf]).log_softmax(0)[draws]
        log_w = (log_p + dist.Normal(draws.to(x), 1.0).log_prob(x) - log_q).detach()
        if (log_w == -math.inf).all():
            continue
        bound, expected = log_w.exp().mean().log(), 0.0
        for k in range(3):
            others = [float(log_w[j]) for j in range(3) if j != k]
            without = (sum(map(math.exp, others)) + math.exp(sum(others) / 2)) / 3
            alone += without == 0
            signal = bound - math.log(without) if without else bound
            weight = float(log_w[k].exp() / log_w.exp().sum())
            (score,) = torch.autograd.grad(log_q[k], logits, retain_graph=True)
            expected = expected + (signal - weight) * score
        for ask in ("loss_and_grads", "differentiable_loss"):
            logits.grad = None
            with forked_rng(seed):
                loss = getattr(VIMCO(3), ask)(impossible, guide, x)
            if ask == "differentiable_loss":
                loss.backward()
            assert float(torch.as_tensor(loss).detach()) == pytest.approx(-float(bound), rel=1e-10)
            torch.testing.assert_close(-logits.grad, expected, rtol=1e-9, atol=1e-12)
    assert alone > 0


@pytest.mark.parametrize(
    "objective", [DReG(2), StickingTheLanding(), VIMCO(2), ScoreFunctionELBO()]
)
def test_a_density_that_a_point_carries_is_not_taken_for_a_constant(objective):
    """A Delta at a draw of torch's own: the score cannot be told from the path."""
    loc = torch.zeros((), requires_grad=True)

    def guide(x):
        q = dist.Normal(loc, 0.8)
        z = q.rsample((len(x),))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(z, log_density=q.log_prob(z)))

    model, _ = normal_pair()
    with pytest.raises(ValueError, match="Site 'z': the guide.*BetaELBO"):
        objective.loss_and_grads(model, guide, torch.tensor([0.5, -1.0]))


@pytest.mark.parametrize("objective", [VIMCO(2), ScoreFunctionELBO()], ids=repr)
def test_points_that_are_trained_are_refused_where_they_would_stand_still(objective):
    model, _ = normal_pair()
    guide, x = AutoDelta(model), torch.tensor([0.5, -1.0])
    guide(x)
    with pytest.raises(ValueError, match=r"Site 'z': the guide puts a Delta.*Use BetaELBO"):
        objective.loss_and_grads(model, guide, x)
    # The slope of −x² / 2 − (z − x)² / 2.
    BetaELBO().loss_and_grads(model, guide, x)
    torch.testing.assert_close(guide.z.grad, 2 * guide.z.detach() - x)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("nats", [0.0, 0.05, 0.3, 10.0])
def test_free_bits_of_masked_rows_are_those_of_the_rows_that_are_left(nats):
    x, mask = torch.linspace(-2, 2, 8), torch.arange(8) < 5
    model, guide = normal_pair()

    def masked(program):
        def run(x):
            # A tensor of its own, as where each program computes its mask.
            with poutine.mask(mask=mask.clone()):
                program(x)

        return run

    objective = FreeBitsELBO(nats, num_particles=20_000)
    found = objective.loss(masked(model), masked(guide), x)
    left = objective.loss(model, guide, x[:5])
    # Of the likelihood of five rows, (x − z)² / 2 with a spread of at most 2 each.
    assert found == pytest.approx(left, abs=5 * math.sqrt(2 * 5 * 4 / 20_000))


def test_the_kl_of_what_is_folded_is_not_that_of_the_fold():
    """|N(1, 1)| and |N(−1, 1)| are one; what torch has for them is the KL of the normals, 2."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.FoldedDistribution(dist.Normal(-1.0, 1.0)))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.FoldedDistribution(dist.Normal(1.0, 1.0)))

    x = torch.tensor([0.5])
    exact = -float(dist.Normal(0.0, 1.0).log_prob(x))
    assert BetaELBO().loss(model, guide, x) == pytest.approx(exact, rel=1e-5)
