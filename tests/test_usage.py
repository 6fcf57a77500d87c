"""What the latents carry: mutual information and exchanged elements, against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import sigmas

from ppvae import density, pairs
from ppvae.diagnostics import element_kl
from ppvae.families import FullRankNormal
from ppvae.guides import PerDatapoint
from ppvae.isolation import private_store
from ppvae.models import FactorAnalysis
from ppvae.usage import element_use, mutual_information


def normal_pair(loc, scale):
    """A standard normal latent and the guide N(loc(x), scale(x)); rows are numbers."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc(x), scale(x)))

    return model, guide


def narrow(x):
    return torch.full_like(x, 0.5)


def test_two_clusters_far_apart_carry_log_two(device):
    model, guide = normal_pair(lambda x: 20 * x.sign(), torch.ones_like)
    x = torch.tensor([1.0, 2.0, -1.0, -3.0], dtype=torch.float64, device=device)
    found = mutual_information(model, guide, x)
    assert found.information == pytest.approx(math.log(2), abs=1e-12)
    # The mean KL is 20² / 2, whatever the cluster.
    assert abs(found.kl - 200.0) < 4 * found.kl_stderr
    assert abs(found.marginal_kl - (200.0 - math.log(2))) < 4 * found.marginal_kl_stderr
    assert found.num_rows == 4
    assert found.ceiling == math.log(4)


def test_rows_that_are_alike_carry_nothing(device):
    model, guide = normal_pair(lambda x: x, narrow)
    x = torch.full((7,), 1.5, dtype=torch.float64, device=device)
    found = mutual_information(model, guide, x)
    assert abs(found.information) < 1e-12
    assert found.information_stderr < 1e-12
    truth = 0.5 * (0.25 + 1.5**2 - 1) + math.log(2)
    assert abs(found.marginal_kl - truth) < 4 * found.marginal_kl_stderr


def test_the_guide_that_says_the_prior_carries_nothing_and_costs_nothing(device):
    model, guide = normal_pair(torch.zeros_like, torch.ones_like)
    found = mutual_information(model, guide, torch.randn(9, device=device))
    assert max(abs(found.information), abs(found.marginal_kl), abs(found.kl)) < 1e-6


def integrals(loc, scale):
    """I and KL(q(z) || p(z)) of normals in a row, by quadrature."""
    z = torch.linspace(-15, 15, 20_001, dtype=torch.float64, device=loc.device)
    log_q = dist.Normal(loc[:, None], scale[:, None]).log_prob(z)
    aggregate = torch.logsumexp(log_q, dim=0) - math.log(len(loc))
    log_p = dist.Normal(torch.zeros_like(z), 1.0).log_prob(z)
    information = torch.trapezoid(log_q.exp() * (log_q - aggregate), z).mean()
    return float(information), float(torch.trapezoid(aggregate.exp() * (aggregate - log_p), z))


def test_overlapping_normals_have_the_figures_of_the_integral(device):
    """Also that the errors are those of repetitions, and all is an identity on the same draws."""
    model, guide = normal_pair(lambda x: 2 * x, lambda x: 0.3 + x.abs())
    x = torch.tensor([-1.0, -0.2, 0.0, 0.5, 0.6], dtype=torch.float64, device=device)
    information, marginal = integrals(2 * x, 0.3 + x.abs())
    found = [mutual_information(model, guide, x, num_samples=20, seed=s) for s in range(100)]
    for got, error, truth in (
        ("information", "information_stderr", information),
        ("marginal_kl", "marginal_kl_stderr", marginal),
        ("kl", "kl_stderr", information + marginal),
    ):
        z = torch.tensor([(getattr(f, got) - truth) / getattr(f, error) for f in found])
        assert abs(float(z.mean())) < 4 / math.sqrt(100)
        assert abs(float(z.std()) - 1) < 4 / math.sqrt(200)
    assert all(abs(f.information + f.marginal_kl - f.kl) < 1e-12 for f in found)
    assert all(f.information <= f.ceiling for f in found)
    own = element_kl(model, guide, x)
    assert abs(found[0].kl - own.total) < 4 * found[0].kl_stderr


def test_of_few_rows_the_information_is_short_and_the_marginal_kl_long(device):
    """x ~ N(0, 1) and q(z | x) = N(x, 1/4): I = log(5) / 2, and q(z) = N(0, 5/4)."""
    model, guide = normal_pair(lambda x: x, narrow)
    truth = 0.5 * math.log(5)
    marginal = 0.5 * (1.25 - 1 - math.log(1.25))
    sets = torch.randn(60, 5, dtype=torch.float64, device=device)
    found = [mutual_information(model, guide, x) for x in sets]
    values = torch.tensor([[f.information - truth, f.marginal_kl - marginal] for f in found])
    short, long = values.mean(dim=0) / (values.std(dim=0) / math.sqrt(len(sets)))
    assert float(short) < -4
    assert float(long) > 4
    many = mutual_information(
        model, guide, torch.randn(1500, dtype=torch.float64, device=device), num_samples=2
    )
    # (The information of 1,500 rows scatters by that of log q(z | x) - log q(z), at most.)
    assert abs(many.information - truth) < 4 * 0.7 / math.sqrt(1500) + 0.01


def test_discrete_latents(device):
    """I is the entropy of the mean probability less the mean entropy."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        p = torch.stack([torch.sigmoid(x), torch.full_like(x, 0.2)], dim=-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(p).to_event(1))

    def entropy(p):
        return -(p * p.log() + (1 - p) * (1 - p).log())

    x = torch.linspace(-3, 3, 11, dtype=torch.float64, device=device)
    p = torch.sigmoid(x)
    truth = float(entropy(p.mean()) - entropy(p).mean())
    found = mutual_information(model, guide, x, num_samples=400)
    assert abs(found.information - truth) < 4 * found.information_stderr
    assert found.information_stderr < 0.1 * truth


@pytest.mark.parametrize("kind", ["full rank", "top down"])
def test_guides_of_other_kinds(kind, device):
    """A row of full-rank normals far apart is known; a guide with sites that hang together runs
    to the same sum that the mean log ratio has.
    """
    if kind == "full rank":
        model, _ = pairs.vae(x_dim=4, z_dim=2, hidden=[8])
        model.to(device)
        guide = PerDatapoint(FullRankNormal(2), 5).to(device)
        weight = guide.table("z").weight.detach().clone()
        weight[:, 0] = 30 * torch.arange(5, device=device)
        guide.table("z").weight = torch.nn.Parameter(weight)
        x = torch.ones(5, 4, device=device)
        assert mutual_information(model, guide, x).information == pytest.approx(math.log(5), 1e-5)
        return
    model, guide = pairs.deep_latent_gaussian(4, z_dims=(3, 2), hidden=[8], top_down=True)
    model.to(device), guide.to(device)
    x = torch.rand(6, 4, device=device).round()
    found = mutual_information(model, guide, x, num_samples=200)
    own = element_kl(model, guide, x, num_samples=200)
    assert abs(found.kl - own.total) < 4 * math.hypot(found.kl_stderr, own.total_stderr)
    assert 0 < found.information < found.ceiling


def test_portions_of_draws_give_the_same(device, monkeypatch):
    model, guide = normal_pair(lambda x: x, narrow)
    x = torch.randn(30, device=device, dtype=torch.float64)
    information, marginal = integrals(x, narrow(x))
    monkeypatch.setattr(density, "_ELEMENTS", 30 * 64 * 7)
    found = mutual_information(model, guide, x, num_samples=40)
    assert abs(found.information - information) < 4 * found.information_stderr
    assert abs(found.marginal_kl - marginal) < 4 * found.marginal_kl_stderr
    use = element_use(model, guide, x, num_samples=400)
    # With x | z ~ N(z, 1) and means x: E (z' - z)² / 2 less the residual's part, as below.
    truth = 0.5 * torch.stack([(x - x[n]).square().sum() / 29 for n in range(30)])
    assert sigmas(use.rows[:, 0], truth, use.rows_stderr[:, 0]) < 4.5


def test_words(device):
    model, guide = normal_pair(lambda x: 20 * x, torch.ones_like)
    far = torch.arange(4.0, device=device)
    text = repr(mutual_information(model, guide, far))
    assert text.startswith("MutualInformation(1.386 ± ")
    assert (
        " nats of at most 1.386 between 4 rows and their latents, near the ceiling: with more rows "
        "it would be larger; marginal KL "
    ) in text
    assert "ceiling" not in repr(mutual_information(model, guide, far / 40))


def linear(device):
    """A linear Gaussian model, its normal guide with other moments, and what the drops are."""
    loadings = torch.tensor([[1.0, 0.0, 0.5], [0.5, 0.0, -0.3], [-1.0, 0.0, 0.1]])
    model = FactorAnalysis(3, 3, loadings=loadings, noise=torch.full((3,), 0.5))
    model.to(device).double()
    weight = torch.tensor([[0.6, 0.1, -0.5], [0.3, 1.0, -0.7], [0.0, 0.0, 0.0]]).double()
    spread = torch.tensor([0.4, 0.7, 0.9], dtype=torch.float64, device=device)

    def mean(x):
        return x @ weight.to(x).T + x.new_tensor([0.0, 0.0, 1.5])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean(x), spread).to_event(1))

    with private_store(), torch.no_grad():
        x = model(size=25)
        W, noise = loadings.double().to(device), 0.25
        m = mean(x)
        others = (m.sum(dim=0) - m) / (len(x) - 1)
        residual = x - m @ W.T  # The model has no mean.
        length = W.square().sum(dim=0)
        # |x - Wz + w_j (z_j - z'_j)|² - |x - Wz|², in expectation.
        cross = 2 * ((residual @ W) * (m - others) - length * spread.square())
        far = (m[:, None] - m[None]).square().sum(dim=1) / (len(x) - 1)
        drop = (cross + length * (far + 2 * spread.square())) / (2 * noise)
        # With all elements of another row: its mean in place of the row's own.
        apart = (x[:, None] - (m @ W.T)[None]).square().sum(dim=-1)
        apart = (apart.sum(dim=1) - apart.diagonal()) / (len(x) - 1)
        together = (apart - residual.square().sum(dim=-1)) / (2 * noise)
    return model, guide, x, drop, together


def test_drops_of_a_linear_model_are_the_closed_form(device):
    model, guide, x, drop, together = linear(device)
    found = element_use(model, guide, x, num_samples=400)
    assert found.names == ("z[0]", "z[1]", "z[2]")
    # No loading: exactly nothing is lost, for any row.
    assert torch.equal(found.rows[:, 1], torch.zeros_like(found.rows[:, 1]))
    used = [0, 2]
    assert sigmas(found.rows[:, used], drop[:, used], found.rows_stderr[:, used]) < 4.5
    assert sigmas(found.drop[used], drop.mean(dim=0)[used], found.stderr[used]) < 4
    assert float(found.stderr[0]) < 0.1 * float(drop[:, 0].mean())
    assert abs(found.together - float(together.mean())) < 4 * found.together_stderr


def test_an_element_that_says_the_same_of_all_rows_is_of_no_use(device):
    """z[2] lies 1.5 from the prior in every row, and reaches x: a draw of the prior would tell."""
    model, guide, x, drop, _ = linear(device)
    torch.testing.assert_close(drop[:, 2], torch.zeros_like(drop[:, 2]))
    assert float(element_kl(model, guide, x).kl[2]) > 1
    found = element_use(model, guide, x, num_samples=400)
    assert float(found.drop[2].abs() / found.stderr[2]) < 4
    assert "no drop beyond two standard errors in 2 of 3)" in repr(found)
    assert repr(found).startswith("ElementUse(reconstruction -")


def test_the_standard_errors_are_those_of_repetitions(device):
    model, guide, x, drop, together = linear(device)
    found = [element_use(model, guide, x, num_samples=20, seed=s) for s in range(100)]
    mean = drop.mean(dim=0)
    errors = torch.stack([(f.drop - mean) / f.stderr for f in found])[:, [0, 2]]
    whole = torch.tensor([(f.together - float(together.mean())) / f.together_stderr for f in found])
    for z in (*errors.T, whole):
        # Student's t with 19 degrees of freedom.
        assert abs(float(z.mean())) < 4 * math.sqrt(19 / 17 / 100)
        assert abs(float(z.std()) - math.sqrt(19 / 17)) < 0.3


def test_an_upper_layer_reaches_x_through_the_lower_one_alone(device):
    model, guide = pairs.deep_latent_gaussian(4, z_dims=(3, 2), hidden=[8])
    model.to(device), guide.to(device)
    found = element_use(model, guide, torch.rand(6, 4, device=device).round())
    drops = dict(zip(found.names, found.drop.tolist(), strict=True))
    assert [drops["z_2[0]"], drops["z_2[1]"]] == [0.0, 0.0]
    assert all(drops[f"z_1[{j}]"] != 0 for j in range(3))


def test_what_a_support_ties_together_is_exchanged_as_one(device):
    def model(x):
        with pyro.plate("data", len(x)):
            share = pyro.sample("share", dist.Dirichlet(x.new_ones(3)))
            level = pyro.sample("level", dist.Gamma(x.new_full((2,), 2.0), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(share[..., 0] + level[..., 0], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("share", dist.Dirichlet(x[:, None].exp().expand(len(x), 3)))
            pyro.sample("level", dist.Gamma(x.new_full((len(x), 2), 2.0), 1.0).to_event(1))

    found = element_use(model, guide, torch.randn(8, device=device))
    assert found.names == ("share", "level[0]", "level[1]")
    assert float(found.drop[2]) == 0.0


def test_a_seed_gives_the_figures_and_leaves_the_generators_alone(device):
    model, guide, x, _, _ = linear(device)
    before = torch.get_rng_state()
    for function in (mutual_information, element_use):
        one, same, other = (repr(function(model, guide, x, seed=seed)) for seed in (3, 3, 4))
        assert one == same
        assert one != other
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_refused(device):
    model, guide, x, _, _ = linear(device)
    with pytest.raises(ValueError, match="x: an element's value is taken from another row"):
        element_use(model, guide, x[:1])
    for function in (mutual_information, element_use):
        with pytest.raises(ValueError, match="num_samples must be at least 2; got 1"):
            function(model, guide, x, num_samples=1)
    planar = dist.transforms.Planar(3).to(device).double()

    def one_way(x):
        with pyro.plate("data", len(x)):
            start = dist.Normal(x, 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(start, [planar]))

    with pytest.raises(ValueError, match="guide: the aggregate posterior takes the density"):
        mutual_information(model, one_way, x)

    def tied(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="model: its prior of the latents differs between rows"):
        mutual_information(tied, normal_pair(lambda x: x, narrow)[1], x[:, 0])
