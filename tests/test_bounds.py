"""What the bounds are known for: plates that subsample, signal and noise as K grows, training."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, TraceMeanField_ELBO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ppvae
from ppvae import pairs
from ppvae.evidence import elbo_of, iwae_of
from ppvae.families import DiagonalNormal
from ppvae.guides import PerDatapoint
from ppvae.isolation import forked_rng
from ppvae.models import FactorAnalysis
from ppvae.objectives import IWAE, VIMCO, BetaELBO, DReG, ScoreFunctionELBO, StickingTheLanding

NUM_DATA, BATCH = 100, 10
BOUNDS = [IWAE(20), DReG(20), VIMCO(20)]
OBJECTIVES = [*BOUNDS, BetaELBO(), StickingTheLanding(3), ScoreFunctionELBO(3)]


# Plates that subsample


class Linear(nn.Module):
    """z ~ N(0, I), x | z ~ N(W z, I), and a guide that is somewhat off; rows by a plate's index.

    Args:
        plate: From the rows to a plate; what it yields are the rows' numbers.
    """

    def __init__(self, device, plate):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        loadings = torch.randn(4, 2, generator=generator, dtype=torch.float64)
        self.plate = plate
        self.seen = []
        self.noise_seed = None
        self.loadings = nn.Parameter(loadings.to(device))
        posterior = torch.linalg.inv(torch.eye(2).to(loadings) + loadings.mT @ loadings)
        self.encoder = nn.Parameter((0.9 * posterior @ loadings.mT).to(device))
        self.log_scale = nn.Parameter((0.5 * torch.diagonal(posterior).log() + 0.1).to(device))

    def model(self, x):
        zeros = torch.zeros(2).to(x)
        with self.plate(x) as index:
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.loadings.mT, 1.0).to_event(1), obs=x[index])

    def guide(self, x):
        with self.plate(x) as index:
            self.seen.append(index)
            if self.noise_seed is not None:  # The same draws, whatever chose the rows.
                torch.manual_seed(self.noise_seed)
            loc = x[index] @ self.encoder.mT
            pyro.sample("z", dist.Normal(loc, self.log_scale.exp()).to_event(1))

    def log_evidence(self, x):
        covariance = self.loadings @ self.loadings.mT + torch.eye(4).to(x)
        return dist.MultivariateNormal(torch.zeros(4).to(x), covariance).log_prob(x).detach()


def all_rows(x):
    return pyro.plate("data", len(x))


def some_rows(x):
    return pyro.plate("data", NUM_DATA, subsample_size=BATCH)


def given_rows(index):
    return lambda x: pyro.plate("data", NUM_DATA, subsample=index)


def rows_of_a_model(device):
    """Rows that `Linear` says have a density, with more spread than it gives them."""
    generator = torch.Generator().manual_seed(6)
    return 1.5 * torch.randn(NUM_DATA, 4, generator=generator, dtype=torch.float64).to(device)


def loss_and_gradients(objective, pair, x, seed=0):
    torch.manual_seed(seed)
    pair.noise_seed = seed + 1
    pair.zero_grad()
    loss = objective.loss_and_grads(pair.model, pair.guide, x)
    pair.noise_seed = None
    return loss, [p.grad.clone() for p in pair.parameters()]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("given", [False, True], ids=["subsample_size", "subsample"])
def test_a_plate_that_subsamples_multiplies_the_loss_and_its_gradient(objective, given, device):
    """N/B times those of the same rows and draws without a scale, to rounding."""
    x = rows_of_a_model(device)
    chosen = torch.arange(3, NUM_DATA, 7, device=device)[:BATCH]
    sub = Linear(device, given_rows(chosen) if given else some_rows)
    loss, gradients = loss_and_gradients(objective, sub, x)
    rows = x[sub.seen[0]]
    assert len(rows) == BATCH
    expected, plain = loss_and_gradients(objective, Linear(device, all_rows), rows)
    assert loss / NUM_DATA == pytest.approx(expected / BATCH, rel=1e-12)
    for one, other in zip(gradients, plain, strict=True):
        assert torch.allclose(one / NUM_DATA, other / BATCH, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", BOUNDS, ids=lambda o: type(o).__name__)
def test_minibatches_estimate_the_bound_of_all_rows_and_stay_below_the_evidence(objective, device):
    x = rows_of_a_model(device)
    sub, full = Linear(device, some_rows), Linear(device, all_rows)
    exact = full.log_evidence(x)
    runs = 200
    above, minibatch, whole = torch.empty(3, runs, dtype=torch.float64).unbind()
    for i in range(runs):
        value = -objective.loss(sub.model, sub.guide, x) / NUM_DATA
        # Which rows came is known, and so is their evidence: what is left is the draws' noise.
        above[i] = value - float(exact[sub.seen[-1]].mean())
        minibatch[i] = value
        whole[i] = -objective.loss(full.model, full.guide, x) / NUM_DATA

    def mean(values):
        return float(values.mean()), float(values.std()) / math.sqrt(runs)

    (part, part_error), (all_of_it, error) = mean(minibatch), mean(whole)
    assert abs(part - all_of_it) < 5 * math.hypot(part_error, error)
    assert part < float(exact.mean()) + 4 * part_error
    gap, gap_error = mean(above)
    whole_gap = all_of_it - float(exact.mean())
    # Far more precise, and so close to the evidence that a weight with a scale would be seen.
    assert abs(gap - whole_gap) < 5 * math.hypot(gap_error, error)
    assert -0.2 < gap < 4 * gap_error
    assert gap_error < 0.01


def test_pyros_renyi_elbo_exceeds_the_evidence_where_iwae_does_not(device):
    """The plate's N/B stands in its weights, whose log-mean-exp bounds nothing: pyro issue 3104."""
    x = rows_of_a_model(device)
    index = torch.arange(BATCH, device=device)
    pair = Linear(device, given_rows(index))
    with torch.no_grad():  # The prior: the weights vary, which is what a scale tells on.
        pair.encoder.zero_()
        pair.log_scale.zero_()
    exact = float(pair.log_evidence(x[index]).mean())
    theirs = RenyiELBO(alpha=0.0, num_particles=1000, vectorize_particles=True, max_plate_nesting=1)

    def estimate(objective):
        values = [-objective.loss(pair.model, pair.guide, x) / NUM_DATA for _ in range(20)]
        values = torch.tensor(values, dtype=torch.float64)
        return float(values.mean()), float(values.std()) / math.sqrt(len(values))

    value, error = estimate(theirs)
    assert value > exact + 1 + 4 * error
    value, error = estimate(IWAE(1000))
    assert exact - 0.1 < value < exact + 4 * error


@pytest.mark.parametrize("objective", BOUNDS, ids=lambda o: type(o).__name__)
def test_a_scale_around_model_and_guide_multiplies_each_row_s_bound(objective, device):
    x = rows_of_a_model(device)[:BATCH]
    pair = Linear(device, all_rows)

    def loss(scale):
        torch.manual_seed(0)
        model, guide = (poutine.scale(program, scale=scale) for program in (pair.model, pair.guide))
        return objective.loss(model, guide, x)

    once = loss(1.0)
    single = [loss(1.0 + row) - once for row in torch.eye(BATCH).to(x)]
    each = torch.tensor(single, dtype=torch.float64)
    assert float(each.sum()) == pytest.approx(once, rel=1e-9)
    assert loss(3.0) == pytest.approx(3 * once, rel=1e-12)
    weights = torch.arange(1.0, BATCH + 1)
    assert loss(weights.to(x)) == pytest.approx(float(weights.to(each) @ each), rel=1e-9)


@pytest.mark.parametrize("objective", BOUNDS, ids=lambda o: type(o).__name__)
def test_a_scale_that_not_all_sites_have_is_refused(objective, device):
    x = rows_of_a_model(device)[:BATCH]
    pair = Linear(device, all_rows)
    with pytest.raises(ValueError, match=r"'z' has the scale 2 and 'z' 1.*BetaELBO"):
        objective.loss(poutine.scale(pair.model, scale=2.0), pair.guide, x)

    def annealed(x):
        with pair.plate(x):
            with poutine.scale(scale=0.5):
                z = pyro.sample("z", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ pair.loadings.mT, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"'z' has the scale 0\.5 and 'x' 1"):
        objective.loss(annealed, pair.guide, x)
    # A guide that takes all rows beside a model that subsamples.
    sub = Linear(device, given_rows(torch.arange(BATCH, device=device)))
    with pytest.raises(ValueError, match=r"'z' has the scale 10 and 'z' 1"):
        objective.loss(sub.model, pair.guide, x)


# Guides that cannot run twice


class TwoSites(nn.Module):
    """z1 ~ N(0, 1), z2 | z1 ~ N(z1, 1), x | z2 ~ N(z2, 1), with dropout in the guide's encoder."""

    def __init__(self, rate):
        super().__init__()
        self.encoder = nn.Sequential(nn.Dropout(rate), nn.Linear(3, 3))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(3).to(x), 1.0).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z2, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(self.encoder(x), 1.0).to_event(1))
            pyro.sample("z1", dist.Normal(torch.sin(z2), 0.8).to_event(1))


@pytest.mark.parametrize("objective", [DReG(3), StickingTheLanding(2)], ids=repr)
def test_a_guide_of_several_sites_with_dropout_is_refused(objective):
    """The density would be that of another mask than the draws: no bound, and a biased gradient."""
    x = torch.randn(6, 3)
    pair = TwoSites(0.5)
    with pytest.raises(ValueError, match=r"Site 'z2': the guide runs twice.*dropout"):
        objective.loss(pair.model, pair.guide, x)
    pair.eval()
    torch.manual_seed(0)
    value = objective.loss(pair.model, pair.guide, x)
    torch.manual_seed(0)
    plain = {DReG: IWAE(3), StickingTheLanding: BetaELBO(weighs="log_q", num_particles=2)}
    assert value == pytest.approx(plain[type(objective)].loss(pair.model, pair.guide, x), rel=1e-5)


@pytest.mark.parametrize("objective", [DReG(3), StickingTheLanding()], ids=repr)
def test_a_flow_without_an_inverse_is_refused_where_iwae_takes_it(objective):
    flow = dist.transforms.Planar(2)
    loc = torch.zeros(2, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(loc.expand(len(x), 2), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"copies of its draws of \['z'\].*Use BetaELBO or IWAE"):
        objective.loss(model, guide, x)
    IWAE(3).loss_and_grads(model, guide, x)
    assert loc.grad is not None


# Signal and noise


def gradient_draws(objective, count, device):
    """Draws of the gradient for one mean of a guide, ``(count, 2)``.

    z ~ N(0, I), x | z ~ N(z, I), and q = N(x/2 + 0.3, 2/3 I), the toy of Rainforth et al. (2018),
    sec. 4: x/2 is the best mean. The rows are copies of one, each with parameters of its own, so
    that one call makes as many draws.
    """
    options = {"dtype": torch.float64, "device": device}
    model = FactorAnalysis(
        2,
        2,
        loadings=torch.eye(2, **options),
        noise=torch.ones(2, **options),
        loc=torch.zeros(2, **options),
    ).requires_grad_(False)
    x = torch.tensor([1.0, -0.5], **options)
    guide = PerDatapoint(DiagonalNormal(2), count).to(**options)
    table = guide.table("z").weight
    with torch.no_grad():
        table[:, :2] = x / 2 + 0.3
        table[:, 2:] = 0.5 * math.log(2 / 3)
    objective.loss_and_grads(model, guide, x.expand(count, 2))
    return -table.grad[:, :2]


class Measured:
    """Mean and noise of draws of a gradient, in the direction of the error of the guide's mean."""

    def __init__(self, draws):
        along = draws.mean(dim=1)
        count = len(along)
        self.mean, self.noise = float(along.mean()), float(along.std())
        self.mean_stderr = self.noise / math.sqrt(count)
        kurtosis = float(((along - self.mean) / self.noise).pow(4).mean())
        # Of log noise, by the delta method.
        self.log_noise_stderr = math.sqrt((kurtosis - 1) / 4 / count)

    def log_snr(self, signal):
        """log |signal| / noise and its error, the signal being another's where that is known."""
        relative = signal.mean_stderr / abs(signal.mean)
        value = math.log(abs(signal.mean) / self.noise)
        return value, math.hypot(relative, self.log_noise_stderr)


def slope(counts, points):
    """The slope of a line through values with errors, against log K, and its error."""
    t = torch.tensor(counts, dtype=torch.float64).log()
    values, errors = torch.tensor(points, dtype=torch.float64).unbind(1)
    t = t - (t / errors**2).sum() / (1 / errors**2).sum()
    precision = (t / errors).square().sum()
    return float((t * values / errors**2).sum() / precision), float(precision.rsqrt())


@pytest.mark.fills_store
def test_the_signal_of_dreg_rises_over_its_noise_where_that_of_iwae_falls(device):
    """As K^(-1/2) (Rainforth et al. 2018, theorem 1) and K^(1/2)."""
    counts = [1, 10, 100, 1000]
    draws = {IWAE: [20_000, 20_000, 20_000, 500], DReG: [4000, 4000, 4000, 500]}
    iwae, dreg = (
        [Measured(gradient_draws(kind(k), n, device)) for k, n in zip(counts, many, strict=True)]
        for kind, many in draws.items()
    )
    # Two estimators of one gradient.
    for one, other in zip(iwae, dreg, strict=True):
        assert abs(one.mean - other.mean) < 5 * math.hypot(one.mean_stderr, other.mean_stderr)
    # What each does by itself: at K = 1000 the signal of IWAE is not to be seen in so few draws.
    value, error = slope(counts[:3], [m.log_snr(m) for m in iwae[:3]])
    assert abs(value + 0.5) < 5 * error
    assert value < -5 * error
    rises = [m.log_snr(m) for m in dreg]
    for (low, low_error), (high, high_error) in itertools.pairwise(rises):
        assert high - low > 5 * math.hypot(low_error, high_error)
    # From K = 10 the power is that of large K. The signal is one, and DReG knows it well.
    value, error = slope(counts[1:], rises[1:])
    assert abs(value - 0.5) < 5 * error + 0.01
    value, error = slope(counts[1:], [m.log_snr(d) for m, d in zip(iwae, dreg, strict=True)][1:])
    assert abs(value + 0.5) < 5 * error + 0.01
    assert error < 0.02


# Training


class Judged:
    """The ELBO and the importance-weighted evidence of some rows, from the same draws."""

    def __init__(self, model, guide, x, num_samples):
        weights = [
            ppvae.log_weights(model, guide, rows, num_samples, seed=i)
            for i, rows in enumerate(x.split(100))
        ]
        self.elbo, self.iwae = (of(torch.cat(weights, dim=1)) for of in (elbo_of, iwae_of))


def difference(one, other):
    """The mean over rows, and its error: of the draws, and over rows had they been others."""
    rows = one.value - other.value
    monte_carlo = math.hypot(one.mean_stderr, other.mean_stderr)
    return float(rows.mean()), math.hypot(monte_carlo, float(rows.std()) / math.sqrt(len(rows)))


def digits_rows():
    """Training and held-out rows."""
    digits = ppvae.data.load("digits")
    return (rows.to(torch.get_default_dtype()) for rows in (digits.train, digits.test))


def trained(loss, x, hidden, steps, lr, seed=0):
    """A VAE from the same parameters on the same minibatches, whatever the loss."""
    with forked_rng(seed):
        model, guide = pairs.vae(64, 8, [hidden])
    # fit draws rows and latents from one generator; a loader has one of its own.
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(x), 100, shuffle=True, drop_last=True, generator=order)
    run = ppvae.fit(model, guide, loader, loss=loss, steps=steps, lr=lr, seed=seed, progress=False)
    assert run.completed
    return model, guide


def test_training_on_iwae_costs_elbo_and_brings_evidence():
    """After 27 epochs; the next test trains for a hundred."""
    train, _ = digits_rows()
    by_elbo, by_iwae = (
        Judged(*trained(loss, train, 32, 400, 5e-3), train[:300], 300)
        for loss in (TraceMeanField_ELBO(), IWAE(20))
    )
    lost, error = difference(by_iwae.elbo, by_elbo.elbo)
    assert lost < -4 * error
    won, error = difference(by_iwae.iwae, by_elbo.iwae)
    assert won > 4 * error


@pytest.mark.slow
def test_longer_training_on_iwae_costs_elbo_and_brings_evidence():
    """On rows trained on and on others; `benchmarks/README.md` has it for three seeds."""
    train, held_out = digits_rows()
    losses = {"elbo": TraceMeanField_ELBO(), "iwae": IWAE(50), "dreg": DReG(50)}
    fitted = {name: trained(loss, train, 100, 1500, 2e-3) for name, loss in losses.items()}

    def judged(x):
        return {name: Judged(*pair, x, 2000) for name, pair in fitted.items()}

    here = judged(train)
    for by in (here, judged(held_out)):
        for name in ("iwae", "dreg"):
            lost, error = difference(by[name].elbo, by["elbo"].elbo)
            assert lost < -4 * error
            won, error = difference(by[name].iwae, by["elbo"].iwae)
            assert won > 4 * error
        # The same bound, with an encoder that follows the model more closely.
        won, error = difference(by["dreg"].elbo, by["iwae"].elbo)
        assert won > 4 * error
    # And no worse a bound on the rows trained on; on others the two were not told apart.
    won, error = difference(here["dreg"].iwae, here["iwae"].iwae)
    assert won > -4 * error
