"""The KL of latent elements: closed forms, its share of the ELBO, and what has no elements."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import sigmas
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from test_pairs import data
from torch.distributions import kl_divergence

import ppvae
from ppvae import pairs
from ppvae.diagnostics import ElementKL, element_kl
from ppvae.families import FullRankNormal
from ppvae.isolation import private_store


def likelihood(model, guide, x, num_samples):
    """E log p(x | z) of a row and its standard error, by the observed site's own density."""
    with private_store(), torch.no_grad(), pyro.plate("draws", num_samples, dim=-2):
        draws = poutine.trace(guide).get_trace(x)
        site = poutine.trace(poutine.replay(model, trace=draws)).get_trace(x).nodes["x"]
        value = site["fn"].log_prob(site["value"])
    return value.mean(), value.var(dim=0).sum().div(num_samples).sqrt() / len(x)


def two_normals(loc, scale, prior, sizes=(3,)):
    """A latent with a prior, and a guide of independent normals that looks at no x."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            mean = z.reshape(*z.shape[: z.dim() - len(sizes)], -1).sum(dim=-1)
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).expand(sizes).to_event(len(sizes)))

    return model, guide


def test_it_is_the_mean_over_rows_of_the_closed_form(device):
    model, guide = pairs.vae(6, 3, [8])
    model, guide = model.to(device), guide.to(device)
    x = data(model, size=20)
    found = element_kl(model, guide, x, num_samples=2)
    with torch.no_grad():
        loc, log_scale = guide.params(x).double().chunk(2, dim=-1)
    kl = (0.5 * (loc**2 + (2 * log_scale).exp() - 1) - log_scale).mean(dim=0)
    torch.testing.assert_close(found.kl, kl, rtol=1e-5, atol=1e-6)
    assert found.names == ("z[0]", "z[1]", "z[2]")
    assert found.stderr.tolist() == [0, 0, 0]
    assert found.total == pytest.approx(float(kl.sum()), rel=1e-5)
    assert found.total_stderr == 0


def test_elements_of_a_matrix_and_a_scalar_have_their_names():
    ones = torch.ones(2, 2)
    model, guide = two_normals(ones, ones, dist.Normal(0 * ones, ones).to_event(2), (2, 2))
    found = element_kl(model, guide, torch.zeros(3), num_samples=2)
    assert found.names == ("z[0,0]", "z[0,1]", "z[1,0]", "z[1,1]")
    assert found.kl.tolist() == [0.5] * 4
    model, guide = pairs.exponential_gaussian()
    assert element_kl(model, guide, torch.ones(2), num_samples=2).names == ("z",)


def test_where_torch_has_no_formula_the_log_ratio_of_an_element_is_sampled():
    """A normal against Student's t: torch has no formula, quadrature does."""
    loc, scale = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([1.0, 0.5, 0.2])
    prior = dist.StudentT(3.0, torch.zeros(3), 1.0)
    model, guide = two_normals(loc, scale, prior.to_event(1))
    found = element_kl(model, guide, torch.zeros(4), num_samples=2000)
    nodes = torch.linspace(-10, 10, 20_001, dtype=torch.float64)[:, None]
    q = dist.Normal(loc.double(), scale.double())
    ratio = q.log_prob(nodes) - dist.StudentT(3.0, torch.zeros(3).double(), 1.0).log_prob(nodes)
    exact = torch.trapezoid(q.log_prob(nodes).exp() * ratio, nodes[:, 0], dim=0)
    assert found.names == ("z[0]", "z[1]", "z[2]")
    assert sigmas(found.kl, exact, found.stderr) < 4
    # Each of the 8000 draws has a log ratio of a spread of order 1.
    assert bool(((found.stderr > 0.001) & (found.stderr < 0.02)).all())
    # The elements are independent, and so are their errors.
    assert found.total_stderr == pytest.approx(float(found.stderr.norm()), rel=0.1)


@pytest.mark.parametrize("num_samples", [4, 40])
def test_the_standard_error_is_that_of_repetitions(num_samples):
    """A log-normal against an exponential: torch has no formula, the moments do."""
    loc, scale = torch.tensor(0.3), torch.tensor(0.5)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Exponential(1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(loc, scale))

    exact = math.exp(0.3 + 0.125) - 0.3 - 0.5 * math.log(2 * math.pi * math.e * 0.25)
    x = torch.zeros(30)
    found = [element_kl(model, guide, x, num_samples=num_samples, seed=s) for s in range(100)]
    errors = torch.tensor([(f.total - exact) / f.total_stderr for f in found])
    assert abs(float(errors.mean())) < 4 / math.sqrt(100)
    assert abs(float(errors.square().mean().sqrt()) - 1) < 4 / math.sqrt(2 * 100)


@pytest.mark.parametrize(
    "make",
    [
        lambda: pairs.vae(6, 3, [8]),
        lambda: pairs.vae(6, 2, [8], family=FullRankNormal(2)),
        lambda: pairs.vae(6, 2, [8], pseudo_inputs=4),
        pairs.exponential_gaussian,
        lambda: pairs.deep_latent_gaussian(6, (3, 2), (8,)),
        lambda: pairs.deep_latent_gaussian(6, (3, 2), (8,), top_down=True),
        lambda: pairs.sigmoid_belief_network(6, (3, 2)),
    ],
    ids=["vae", "full rank", "vamp", "toy", "bottom-up", "top-down", "discrete"],
)
def test_the_total_is_what_the_elbo_falls_short_of_the_likelihood(make):
    model, guide = make()
    with torch.no_grad():
        for p in guide.parameters():
            p.mul_(1.5)
    x = data(model, size=12)
    found = element_kl(model, guide, x, num_samples=500, seed=1)
    assert float(found.kl.sum()) == pytest.approx(found.total, rel=1e-9)
    fit = likelihood(model, guide, x, 500)
    bound = ppvae.elbo(model, guide, x, 500, seed=2)
    error = math.hypot(found.total_stderr, float(fit[1]), bound.mean_stderr)
    assert abs(float(fit[0]) - found.total - bound.mean) < 5 * error


def test_a_site_that_is_no_product_has_one_figure():
    loc, scale = torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.5])
    prior = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.6], [0.6, 1.0]]))
    exact = kl_divergence(dist.MultivariateNormal(loc, torch.diag(scale**2)), prior)
    found = element_kl(*two_normals(loc, scale, prior, (2,)), torch.zeros(3), num_samples=2)
    assert (found.names, found.stderr.tolist()) == (("z",), [0])
    assert found.total == pytest.approx(float(exact), rel=1e-6)
    for pair in (
        pairs.vae(6, 2, [8], family=FullRankNormal(2)),
        pairs.vae(6, 2, [8], pseudo_inputs=4),
    ):
        sampled = element_kl(*pair, data(pair[0], size=3), num_samples=9)
        assert sampled.names == ("z",)
        assert sampled.total_stderr > 0


@pytest.mark.parametrize("bottom_up", [False, True])
def test_a_prior_that_hangs_on_another_latent(bottom_up):
    r"""p = N(a; 0, 1) N(b; a, 1), in closed form for q = N(a; 1, 1/4) N(b; 2, 1/9)."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        sites = {"a": dist.Normal(1.0, 0.5), "b": dist.Normal(2.0, 1 / 3)}
        with pyro.plate("data", len(x)):
            for name in sorted(sites, reverse=bottom_up):
                pyro.sample(name, sites[name])

    def kl(square, scale):
        """KL of N(m, scale²) from a unit normal whose mean is at this mean square from m."""
        return 0.5 * (square + scale**2 - 1) - math.log(scale)

    found = element_kl(model, guide, torch.zeros(40), num_samples=500)
    exact = torch.tensor([kl(1.0, 0.5), kl(1.0 + 0.25, 1 / 3)], dtype=torch.float64)
    assert found.names == ("a", "b")
    assert found.kl[0] == pytest.approx(float(exact[0]), rel=1e-6)
    assert found.stderr[0] == 0
    assert sigmas(found.kl[1:], exact[1:], found.stderr[1:]) < 4
    # Given a, the KL of b varies with (2 − a)² / 2, of variance 0.28; without the formula (b is
    # drawn before a) the log ratio varies more.
    analytic = math.sqrt((2 * 0.25**2 + 4 * 0.25) / 4 / (40 * 500))
    assert bool(found.stderr[1] > 1.05 * analytic) == bottom_up
    assert bottom_up or float(found.stderr[1]) == pytest.approx(analytic, rel=0.1)


def test_discrete_latents():
    logits, prior = torch.tensor([2.0, -1.0]), torch.tensor([0.0, 0.5])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=prior).to_event(1))
            kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.5, 0.25, 0.25])))
            pyro.sample("x", dist.Normal(z.sum(dim=-1) + kind, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))
            pyro.sample("kind", dist.Categorical(torch.tensor([0.0, 0.5, 0.5])))

    found = element_kl(model, guide, torch.zeros(3), num_samples=2)
    q, p = logits.sigmoid(), prior.sigmoid()
    expected = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    assert found.names == ("z[0]", "z[1]", "kind")
    torch.testing.assert_close(
        found.kl, torch.cat([expected, torch.tensor([math.log(2)])]).double(), rtol=1e-5, atol=0
    )
    assert found.stderr.tolist() == [0, 0, 0]


def test_draws_that_the_prior_excludes_make_it_infinite():
    """Half of the guide's draws of the second element lie outside of a half-normal's support."""
    loc, scale = torch.tensor([20.0, 0.0]), torch.ones(2)
    model, guide = two_normals(loc, scale, dist.HalfNormal(torch.full((2,), 9.0)).to_event(1), (2,))
    found = element_kl(model, guide, torch.zeros(5), num_samples=20)
    assert found.kl.isinf().tolist() == [False, True]
    assert found.stderr.isinf().tolist() == [False, True]
    assert found.total == found.total_stderr == math.inf


def test_masked_rows_count_as_nothing_and_scales_do_not_count():
    loc, scale = torch.tensor([1.0, 3.0]), torch.ones(2)
    for prior in (dist.Normal(torch.zeros(2), 1.0), dist.StudentT(50.0, torch.zeros(2), 1.0)):
        model, guide = two_normals(loc, scale, prior.to_event(1), (2,))
        x = torch.zeros(6)
        mask = torch.tensor([True, False] * 3)
        half = element_kl(poutine.mask(model, mask), poutine.mask(guide, mask), x)
        large = element_kl(poutine.scale(model, 7.0), poutine.scale(guide, 7.0), x)
        plain = element_kl(model, guide, x)
        torch.testing.assert_close(large.kl, plain.kl)
        error = (half.stderr**2 + plain.stderr**2 / 4).sqrt()
        assert ((half.kl - plain.kl / 2).abs() <= 4 * error + 1e-6).all()


def test_chunks_add_up(monkeypatch):
    """Whatever the memory budget cuts, the sums are of all draws."""
    model, guide = pairs.vae(6, 2, [8], family=FullRankNormal(2))
    x = data(model, size=5)
    whole = element_kl(model, guide, x, num_samples=30)
    monkeypatch.setattr("ppvae.density._ELEMENTS", 5 * 64 * 7)
    parts = element_kl(model, guide, x, num_samples=30)
    assert abs(whole.total - parts.total) < 4 * math.hypot(whole.total_stderr, parts.total_stderr)
    assert parts.total_stderr == pytest.approx(whole.total_stderr, rel=0.3)


def test_it_says_what_is_largest():
    kl = torch.tensor([0.0, 2.0, 0.5], dtype=torch.float64)
    found = ElementKL(kl, torch.zeros(3), ("a", "b", "c"), 2.5, 0.01)
    assert repr(found) == ("ElementKL(total 2.5 ± 0.01 nats a datum; largest: b 2, c 0.5, a 0)")


def test_bad_input():
    model, guide = pairs.vae(6, 2, [8])
    x = data(model, size=4)
    with pytest.raises(ValueError, match="num_samples must be at least 2; got 1"):
        element_kl(model, guide, x, num_samples=1)
    with pytest.raises(ValueError, match="latent sites must be the model's"):
        element_kl(model, pairs.deep_latent_gaussian(6, (3, 2), (8,))[1], x)
    with pytest.raises(ValueError, match="x has NaN"):
        element_kl(model, guide, x * torch.nan)


def test_a_guide_that_transforms_draws_of_its_own_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormal(model)
    x = torch.zeros(3)
    with private_store():
        guide(x)
    with pytest.raises(ValueError, match="is a draw of the guide's own.*ppvae.guides.Amortized"):
        element_kl(model, guide, x)
