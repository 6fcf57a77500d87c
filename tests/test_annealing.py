"""Annealed importance sampling against known evidence."""

import math
from types import MappingProxyType

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import Planar
from scipy import integrate, stats
from torch.distributions import constraints

import ppvae
from ppvae import annealing, density
from ppvae.annealing import linear, sigmoid
from ppvae.evidence import enumeration
from ppvae.isolation import private_store
from ppvae.models import PPCA, ExponentialGaussian, FactorAnalysis

TOY = torch.tensor([-2.0, 0.0, 0.5, 1.5, 3.0]).double()


def factor_analysis(x_dim, z_dim, scale=1.0, kind=FactorAnalysis, rows=200):
    """A model of random loadings, or of the class's own, and rows that it drew."""
    loadings = None if scale is None else scale * torch.randn(x_dim, z_dim)
    model = kind(x_dim, z_dim, loadings=loadings)
    with private_store():
        return model.requires_grad_(False), model(size=rows)


def exact_guide(model):
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", model.posterior(x))

    return guide


def wide_guide(model, widen):
    """The exact posterior's mean, and its standard deviations made wider."""

    def guide(x):
        posterior = model.posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            scale = widen * posterior.variance.sqrt()
            pyro.sample("z", dist.Normal(posterior.mean, scale).to_event(1))

    return guide


def check(found, exact, mean_error=None):
    """Within four standard errors for 99 % of the rows; the mean within its own four, or so."""
    error = (found.value - exact).detach().double()
    assert float(((error.abs() < 4 * found.stderr).double()).mean()) >= 0.99
    if mean_error is None:
        # Half of the weights' variance over the chains is what a log mean is short in the mean.
        short = 0.5 * found.stderr.double().square().mean()
        assert abs(float(error.mean() + short)) < 4 * found.mean_stderr
    else:
        assert abs(float(error.mean())) < mean_error


def spread_along_the_path(model, x):
    r"""∫ sd_β(log p(x | z)) dβ of each row, in closed form for a linear Gaussian model."""
    w = model.loadings.detach().double() / model.noise.detach().double().expand(len(x[0]))[:, None]
    gram, pull = w.mT @ w, (x.double() / model.noise.detach().double()) @ w
    betas = torch.logspace(-7, 0, 1500, dtype=torch.float64)
    deviations = []
    for beta in betas:
        covariance = torch.linalg.inv(torch.eye(len(gram)).double() + beta * gram)
        slope = pull - beta * pull @ covariance @ gram
        trace = torch.trace(gram @ covariance @ gram @ covariance)
        deviations.append((0.5 * trace + ((slope @ covariance) * slope).sum(-1)).sqrt())
    return torch.trapezoid(torch.stack(deviations), betas, dim=0)


# The numbers


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_the_toys_evidence_is_found(start):
    model, x = ExponentialGaussian(), 4 * torch.rand(200) - 1
    guide = None
    if start == "guide":

        def guide(x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.LogNormal(0.3 * x - 0.5, 1.0))

    # Standard errors of 64 chains are better known than those of 16.
    check(ppvae.ais(model, guide, x, num_chains=64, num_steps=40), model.log_evidence(x))


@pytest.mark.parametrize("kind", [FactorAnalysis, PPCA])
def test_the_evidence_of_linear_models_is_found(kind):
    model, x = factor_analysis(6, 3, 0.8, kind, rows=100)
    check(ppvae.ais(model, None, x, num_chains=64, num_steps=40), model.log_evidence(x))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [None, 0.4, 1.0])
@pytest.mark.parametrize("z_dim", [1, 3, 20])
@pytest.mark.parametrize("kind", [FactorAnalysis, PPCA])
def test_the_error_of_500_temperatures_is_below_two_hundredths_of_a_nat(kind, z_dim, scale):
    model, x = factor_analysis(2 * z_dim + 2, z_dim, scale, kind)
    # What the estimate is short of on average, plus four errors of the mean over the rows.
    best = spread_along_the_path(model, x).square().mean() / 500 / 16
    allowed = max(0.02, float(0.5 * 1.3 * best + 4 * (1.3 * best / len(x)).sqrt()))
    check(ppvae.ais(model, None, x), model.log_evidence(x), mean_error=allowed)


def test_the_spread_of_the_weights_is_near_the_least_that_any_temperatures_give():
    model, x = factor_analysis(16, 8, rows=50)
    least = spread_along_the_path(model, x).square() / 100
    own, even = (
        (ppvae.ais(model, None, x, num_steps=100, schedule=s).log_weights.var(0) / least).mean()
        for s in (None, linear)
    )
    # The variance of 50 rows of 16 chains is known to 5 %.
    assert float(own) < 1.3 * (1 + 4 * math.sqrt(2 / (50 * 15)))
    assert float(even) > 2 * float(own)


@pytest.mark.parametrize("schedule", [None, linear, sigmoid], ids=["own", "linear", "sigmoid"])
def test_the_mean_weight_is_unbiased_with_any_temperatures(schedule):
    model = ExponentialGaussian().double()
    found = ppvae.ais(model, None, TOY, num_chains=20_000, num_steps=3, schedule=schedule)
    relative = torch.exp(found.log_weights - model.log_evidence(TOY))
    assert ((relative.mean(0) - 1).abs() < 4.5 * relative.std(0) / math.sqrt(20_000)).all()


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_a_few_chains_with_their_own_pilot_are_unbiased_over_repetitions(start):
    model = ExponentialGaussian().double()

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Gamma(2.0 * torch.ones_like(x), 1.0))

    # Rows are independent of each other: a thousand of one kind are as many repetitions.
    x = TOY[1:4].repeat(1000)
    found = ppvae.ais(model, guide if start == "guide" else None, x, num_chains=2, num_steps=4)
    relative = torch.exp(found.value - model.log_evidence(x)).reshape(1000, 3)
    assert ((relative.mean(0) - 1).abs() < 4.5 * relative.std(0) / math.sqrt(1000)).all()


def test_the_inverse_weight_of_reversed_chains_is_unbiased():
    model = ExponentialGaussian().double()
    x = TOY[1:4].repeat(1000)
    exact = {"z": model.posterior(x).sample()}
    found = ppvae.sandwich(model, None, x, exact, num_chains=2, num_steps=4)
    relative = torch.exp(model.log_evidence(x) - found.upper.value).reshape(1000, 3)
    assert ((relative.mean(0) - 1).abs() < 4.5 * relative.std(0) / math.sqrt(1000)).all()


@pytest.mark.parametrize("num_steps", [2, 20])
def test_draws_of_a_guide_that_the_prior_rules_out_count_as_nothing(num_steps):
    model = ExponentialGaussian().double()

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.clamp(min=0.1), 1.5))

    found = ppvae.ais(model, guide, TOY, num_chains=2000, num_steps=num_steps)
    relative = torch.exp(found.log_weights - model.log_evidence(TOY))
    assert ((relative.mean(0) - 1).abs() < 4.5 * relative.std(0) / math.sqrt(2000)).all()
    # A start at x = 0.1, sd 1.5, lies below 0 in 47 % of the cases.
    dead = torch.isinf(found.log_weights[:, 0]).double().mean()
    assert abs(float(dead) - stats.norm.cdf(-0.1 / 1.5)) < 4 * 0.5 / math.sqrt(2000)


def test_from_the_exact_posterior_all_weights_are_the_evidence():
    model, x = factor_analysis(6, 3, rows=20)
    model, x = model.double(), x.double()
    found = ppvae.sandwich(model, exact_guide(model), x, num_chains=4, num_steps=5)
    exact = model.log_evidence(found.x)
    for bound in (found.lower, found.upper):
        torch.testing.assert_close(bound.log_weights, exact.expand(4, -1), rtol=0, atol=1e-9)
        assert bound.stderr.max() < 1e-9


def test_a_good_guide_is_a_better_start_than_the_prior():
    model, x = factor_analysis(12, 6, rows=50)
    guide = wide_guide(model, 1.2)
    near, far = (
        ppvae.ais(model, g, x, num_steps=20).log_weights.var(0).mean() for g in (guide, None)
    )
    assert near < 0.2 * far


def test_the_sandwich_holds_the_evidence_and_closes_as_one_over_the_temperatures():
    model, x = factor_analysis(8, 4, rows=400)
    widths, errors = [], []
    for num_steps in (30, 60):
        found = ppvae.sandwich(model, None, x, num_chains=4, num_steps=num_steps)
        exact = model.log_evidence(found.x).double()
        for bound, side in ((found.lower, 1), (found.upper, -1)):
            gap = side * (exact - bound.value)
            assert float(gap.mean()) > -4 * float(gap.std()) / math.sqrt(len(x))
        # The gap of single chains, which is wider by their number and known much better.
        single = (found.upper.log_weights - found.lower.log_weights).mean(0)
        widths.append(float(single.mean()))
        assert 0 < found.width < widths[-1]
        errors.append(float(single.std()) / math.sqrt(len(x)) / widths[-1])
    ratio = widths[0] / widths[1]
    assert abs(ratio - 2) < 4 * ratio * math.hypot(*errors)
    assert math.hypot(*errors) < 0.1


def test_one_datum_that_is_far_off_spoils_no_other():
    model = ExponentialGaussian()
    x = torch.cat([3 * torch.rand(40), torch.tensor([-1000.0, 20.0])])
    alone, beside = (
        ppvae.ais(model, None, rows, num_chains=64, num_steps=60) for rows in (x[:40], x)
    )
    assert (beside.log_weights[:, :40].var(0).mean()) < 1.6 * alone.log_weights.var(0).mean()
    error = (beside.value - model.log_evidence(x)).abs() / beside.stderr
    assert error.max() < 5


# Models of all kinds


def quadrature_of(density_at, low, high):
    return math.log(integrate.quad(density_at, low, high, epsabs=0, epsrel=1e-10, limit=200)[0])


def dirichlet():
    alpha = torch.tensor([0.7, 1.5, 2.0, 3.0]).double()
    x = torch.tensor([[5.0, 1, 2, 2], [0, 0, 10, 0], [3, 3, 2, 2]]).double()

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Dirichlet(alpha))
            pyro.sample("x", dist.Multinomial(10, z), obs=x)

    return model, x, dist.DirichletMultinomial(alpha, total_count=10).log_prob(x)


def beta():
    x = torch.tensor([0.0, 3, 10]).double()

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Beta(torch.tensor(0.5).double(), 2.0))
            pyro.sample("x", dist.Binomial(10, z), obs=x)

    return model, x, dist.BetaBinomial(torch.tensor(0.5).double(), 2.0, 10).log_prob(x)


def gamma():
    x = torch.tensor([0.0, 3, 30]).double()

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Gamma(torch.tensor(1.5).double(), 0.5))
            pyro.sample("x", dist.Poisson(z), obs=x)

    return model, x, dist.GammaPoisson(torch.tensor(1.5).double(), 0.5).log_prob(x)


def log_normal():
    x = torch.tensor([-2.0, 0, 3]).double()

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.LogNormal(torch.tensor(0.3).double(), 0.8))
            pyro.sample("x", dist.Normal(z.log(), 0.5), obs=x)

    return model, x, dist.Normal(0.3, math.sqrt(0.64 + 0.25)).log_prob(x)


def half_cauchy():
    x = torch.tensor([0.1, 1.0, 10.0]).double()

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.HalfCauchy(torch.tensor(1.0).double()))
            pyro.sample("x", dist.Normal(0.0, z), obs=x)

    def at(value):
        return lambda u: (
            stats.halfcauchy.pdf(math.exp(u)) * stats.norm.pdf(value, 0, math.exp(u)) * math.exp(u)
        )

    return model, x, torch.tensor([quadrature_of(at(v), -8.0, 20.0) for v in x.tolist()])


def bounds_of_each_row():
    x = torch.tensor([[0.3, 1.0], [2.0, 4.0], [-1.0, 2.0]]).double()

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Uniform(-x[:, 1], 2 * x[:, 1]))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x[:, 0])

    value, half = x.unbind(-1)
    noise = dist.Normal(0.0, 1.0)
    inside = noise.cdf((2 * half - value) / 0.7) - noise.cdf((-half - value) / 0.7)
    return model, x, torch.log(inside / (3 * half))


def sites_that_hang_on_each_other():
    x = torch.tensor([-3.0, 0.0, 1.0]).double()

    def model(x):
        zero = x.new_zeros(2)
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(zero, 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(a.sum(-1), 0.5))
            c = pyro.sample("c", dist.LogNormal(zero[0], 0.5))
            pyro.sample("x", dist.Normal(b + c.log(), 0.3), obs=x)

    return model, x, dist.Normal(0.0, math.sqrt(2 + 0.25 + 0.25 + 0.09)).log_prob(x)


def with_a_factor():
    x = torch.tensor([-1.0, 2.0]).double()

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("x", dist.Normal(z, 1.0).log_prob(x))

    return model, x, dist.Normal(0.0, math.sqrt(2)).log_prob(x)


KINDS = [
    dirichlet,
    beta,
    gamma,
    log_normal,
    half_cauchy,
    bounds_of_each_row,
    sites_that_hang_on_each_other,
    with_a_factor,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_supports_are_mapped_to_the_reals(kind):
    model, x, exact = kind()
    found = ppvae.ais(model, None, x, num_chains=64, num_steps=40)
    assert found.value.dtype == torch.float64
    assert ((found.value - exact).abs() < 4.5 * found.stderr).all()
    assert found.stderr.max() < 0.2


def test_a_mask_leaves_out_what_was_not_observed():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            seen = torch.arange(len(x)) < 2
            pyro.sample("x", dist.Normal(z, 1.0).mask(seen), obs=x)

    x = torch.tensor([0.5, -1.0, 7.0])
    # Of a row alone the mask would be another one: rows have to stay together.
    with pytest.raises(ValueError, match="changes with the"):
        ppvae.ais(model, None, x, num_steps=5)


def test_a_uniform_guide_has_no_gradient_and_serves_all_the_same():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Uniform(x / 2 - 6, x / 2 + 6))

    x = torch.tensor([-1.0, 0.0, 2.0]).double()
    found = ppvae.ais(model, guide, x, num_chains=64, num_steps=40)
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(x)
    assert ((found.value - exact).abs() < 4.5 * found.stderr).all()


def test_a_guide_that_covers_a_part_gives_the_evidence_of_that_part():
    model = ExponentialGaussian().double()

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Uniform(torch.zeros_like(x), 1.0))

    x = TOY[1:4]
    found = ppvae.ais(model, guide, x, num_chains=64, num_steps=40)
    part = model.posterior(x).cdf(torch.ones_like(x)).log()
    assert ((found.value - model.log_evidence(x) - part).abs() < 4.5 * found.stderr).all()


# Discrete latents


def coins(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.4)).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def test_few_discrete_values_are_enumerated():
    x = torch.tensor([0.0, 1.0, 2.5])
    found = ppvae.ais(coins, None, x)
    assert (found.method, found.bound) == ("enumeration", "exact")
    assert torch.equal(found.value, enumeration(coins, x).value)


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_other_discrete_latents_are_weighted_by_importance(start):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Poisson(torch.tensor(2.0)))
            u = pyro.sample("u", dist.Normal(z, 0.5))
            pyro.sample("x", dist.Normal(u, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Poisson(x.clamp(min=0.5)))
            pyro.sample("u", dist.Normal((x + z) / 2, 0.5))

    x = torch.tensor([0.0, 1.0, 4.0])
    values = torch.arange(60.0)[:, None]
    exact = torch.logsumexp(
        dist.Poisson(2.0).log_prob(values) + dist.Normal(values, math.sqrt(0.5)).log_prob(x), 0
    )
    found = ppvae.ais(model, guide if start == "guide" else None, x, num_steps=200)
    assert (found.method, found.bound) == ("iwae", "lower")
    assert ((found.value - exact).abs() < 4.5 * found.stderr).all()
    assert found.stderr.max() < 0.1


# Memory, graphs, global state


def test_portions_of_rows_and_chains_have_the_same_law(monkeypatch):
    portions = []
    split = annealing._Path._split

    def seen(path, *args):
        split(path, *args)
        portions.append((len(path._rows), len(path._chains)))

    monkeypatch.setattr(annealing._Path, "_split", seen)
    monkeypatch.setattr(annealing, "_PILOT_LEAST", 10)
    model, x = factor_analysis(6, 3, 0.8, rows=4)
    exact = model.log_evidence(x)
    for budget in (6 * 4 * 32, 6 * 4 * 8):
        monkeypatch.setattr(density, "_CHUNK_BYTES", {"cpu": budget, "cuda": budget})
        found = ppvae.ais(model, None, x, num_steps=8)
        assert found.log_weights.shape == (16, 4)
        assert ((found.value - exact).abs() < 4.5 * found.stderr).all()
    assert portions[0][0] > 1
    assert portions[1] == (4, 2)


def test_rows_that_a_guide_knows_only_together_stay_together(monkeypatch):
    model, x = factor_analysis(6, 3, 0.8, rows=12)
    loc = model.posterior(x).mean.detach()

    def guide(x):
        # Kept outside of x, and too odd to be read: the scale of the second hangs on the first.
        with pyro.plate("data", len(x), dim=-1):
            free = pyro.sample("z", _Shifted(loc[: len(x)]))
        return free

    monkeypatch.setattr(density, "_CHUNK_BYTES", {"cpu": 2000, "cuda": 2000})
    found = ppvae.ais(model, guide, x, num_steps=20)
    assert ((found.value - model.log_evidence(x)).abs() < 4.5 * found.stderr).all()


class _Shifted(dist.TorchDistribution):
    """A normal of a class that nobody knows."""

    arg_constraints = MappingProxyType({})
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc):
        self._normal = dist.Normal(loc, 0.8).to_event(1)
        super().__init__(self._normal.batch_shape, self._normal.event_shape)

    def expand(self, shape, _instance=None):
        return _Shifted(self._normal.mean.expand(*shape, *self.event_shape))

    def rsample(self, sample_shape=torch.Size()):
        return self._normal.rsample(sample_shape)

    def log_prob(self, value):
        return self._normal.log_prob(value)


@pytest.mark.slow
def test_a_graph_gives_what_eager_calls_give(monkeypatch):
    made = []

    class Seen(annealing.Repeated):
        def __init__(self, function, calls):
            super().__init__(function, calls)
            made.append(self)

    class Eager(Seen):
        def __init__(self, function, calls):
            super().__init__(function, 1)

    model = ExponentialGaussian().double()
    values = []
    for kind in (Seen, Eager):
        monkeypatch.setattr(annealing, "Repeated", kind)
        values.append(ppvae.ais(model, None, TOY, num_steps=200).log_weights)
    assert set(made[0].tiers) - {"eager"}, made[0].why
    assert set(made[1].tiers) == {"eager"}
    torch.testing.assert_close(*values, rtol=0, atol=1e-6)


@pytest.mark.fills_store
def test_generators_and_the_parameter_store_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(annealing, "_PILOT_LEAST", 10)
    model, x = factor_analysis(4, 2, rows=5)
    pyro.param("mine", torch.ones(2))
    state, store = torch.get_rng_state(), dict(pyro.get_param_store().items())
    one = ppvae.ais(model, None, x, num_steps=5, seed=3)
    bounds = ppvae.sandwich(model, None, x, num_steps=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(pyro.get_param_store().items()).keys() == store.keys()
    assert torch.equal(ppvae.ais(model, None, x, num_steps=5, seed=3).value, one.value)
    assert not torch.equal(ppvae.ais(model, None, x, num_steps=5, seed=4).value, one.value)
    assert "simulated data" in repr(bounds)
    assert bounds.x.shape == x.shape


# Bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_chains": 1}, "num_chains must be at least 2"),
        ({"num_steps": 1}, "num_steps must be at least 2"),
        ({"leapfrog_steps": 0}, "leapfrog_steps must be at least 1"),
        ({"schedule": lambda n: torch.linspace(0, 0.9, n + 1)}, "rising temperatures from 0 to 1"),
        ({"schedule": lambda n: torch.linspace(0, 1, n)}, "expected 501 rising"),
        ({"schedule": lambda n: linear(n).flip(0)}, "annealing.sigmoid or"),
    ],
)
def test_unfit_arguments_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        ppvae.ais(ExponentialGaussian(), None, torch.ones(2), **options)


def test_a_guide_whose_density_is_not_known_everywhere_is_refused():
    model, x = factor_analysis(4, 2, rows=3)

    planar = Planar(2)

    def flow(x):
        with pyro.plate("data", len(x), dim=-1):
            base = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [planar]))

    def auxiliary(x):
        with pyro.plate("data", len(x), dim=-1):
            s = pyro.sample("s", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            loc = s[..., None].expand(*s.shape, 2)
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    for guide in (flow, auxiliary):
        with pytest.raises(ValueError, match=r"density is wanted at values .* \(guide=None\)"):
            ppvae.ais(model, guide, x, num_steps=5)


def test_a_support_that_hangs_on_another_latent_is_refused():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            top = pyro.sample("top", dist.Gamma(2 * torch.ones(len(x)), 1.0))
            z = pyro.sample("z", dist.Uniform(0.0, top))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"'z' \(Uniform\): its support hangs on another latent"):
        ppvae.ais(model, None, torch.ones(3), num_steps=5)


def test_latents_that_are_no_draw_for_each_row_are_refused():
    model, x = ExponentialGaussian(), torch.ones(3)
    for latents, said in (
        ({"z": torch.ones(2)}, r"'z' a draw for each row, \(3,\); got \(2,\)"),
        ({"y": torch.ones(3)}, "got None"),
        ({"z": torch.tensor([1.0, -1.0, 1.0])}, "those of row 1 lie outside of the support"),
        (torch.ones(3), "a mapping"),
    ):
        with pytest.raises(ValueError, match=said):
            ppvae.sandwich(model, None, x, latents, num_steps=5)


def test_there_is_no_sandwich_for_discrete_latents():
    with pytest.raises(ValueError, match=r"'z' \(Bernoulli\) is discrete.*enumeration"):
        ppvae.sandwich(coins, None, torch.ones(3))


def test_a_model_without_a_density_is_refused():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            noisy = z + torch.randn_like(z)
            pyro.sample("x", dist.Normal(noisy, 1.0), obs=x)

    with pytest.raises(ValueError, match="another one at each call"):
        ppvae.ais(model, None, torch.ones(3), num_steps=5)
