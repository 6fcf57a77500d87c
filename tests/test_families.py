"""Laws that every variational family obeys."""

import pyro.distributions as dist
import pytest
import torch
from laws import SCALAR_FAMILIES
from scipy import stats

from ppvae import families, pairs
from ppvae.density import GuideSite, LatentSite, support_name
from ppvae.freeing import read_member

ALL = {
    **{name: f() for name, f in SCALAR_FAMILIES.items()},
    **{f"{name}(3)": f(3) for name, f in SCALAR_FAMILIES.items()},
    "FullRankNormal(3)": families.FullRankNormal(3),
    "FullRankNormal(1)": families.FullRankNormal(1),
}
every_family = pytest.mark.parametrize("family", ALL.values(), ids=ALL.keys())
every_scalar = pytest.mark.parametrize("name", SCALAR_FAMILIES)


def some_params(family, rows=4):
    return 0.5 * torch.randn(rows, family.num_params).double()


@every_scalar
def test_the_density_integrates_to_one(name):
    family = SCALAR_FAMILIES[name]()
    member = family.distribution(some_params(family))
    u = torch.linspace(-80, 30, 400_001).double()
    if support_name(family.support) == "positive":
        z, jacobian = u.exp(), u
    else:
        z, jacobian = u, torch.zeros_like(u)
    total = torch.trapezoid((member.log_prob(z[:, None]) + jacobian[:, None]).exp(), u, dim=0)
    torch.testing.assert_close(total, torch.ones(4).double(), rtol=1e-6, atol=1e-6)


@every_scalar
def test_draws_follow_the_density(name):
    family = SCALAR_FAMILIES[name]()
    member = family.distribution(some_params(family, rows=1))
    draws, _ = member.rsample((20_000,))[:, 0].sort()
    # The distribution function by integration of the density between the draws' quantiles.
    u = torch.linspace(-60, 30, 400_001).double()
    positive = support_name(family.support) == "positive"
    z = u.exp() if positive else u
    density = (member.log_prob(z[:, None])[:, 0] + (u if positive else 0)).exp()
    cdf = torch.cumulative_trapezoid(density, u)
    at = draws.log() if positive else draws
    levels = cdf[torch.searchsorted(u, at).clamp(max=len(cdf) - 1)]
    assert stats.kstest(levels.numpy(), "uniform").pvalue > 1e-5


@every_family
def test_shapes_and_leading_dimensions(family):
    params = some_params(family)
    member = family.distribution(params)
    assert member.batch_shape == (4,)
    assert member.event_shape == family.event_shape
    assert member.has_rsample
    many = family.distribution(params.expand(7, 4, -1))
    assert many.rsample().shape == (7, 4, *family.event_shape)


@every_family
def test_parameters_are_read_back_from_a_member(family):
    params = some_params(family)
    member = family.distribution(params)
    kind, back = read_member(GuideSite("z", member, member.sample()))
    assert repr(kind) == repr(family)
    torch.testing.assert_close(back, params)


@every_family
def test_every_parameter_moves_the_density_and_the_draws(family):
    params = some_params(family).requires_grad_(True)
    member = family.distribution(params)
    z = member.rsample()
    (through_draws,) = torch.autograd.grad(z.sum() + (z**2).sum(), params, retain_graph=True)
    (through_density,) = torch.autograd.grad(member.log_prob(z.detach()).sum(), params)
    assert (through_draws != 0).all()
    assert (through_density != 0).all()


@every_family
def test_the_score_has_mean_zero(family):
    """E[∇ log q] = 0: parameters and density agree, to five standard errors."""
    params = some_params(family, rows=1)
    copies = params.expand(20_000, 1, -1).clone().requires_grad_(True)
    member = family.distribution(copies)
    (score,) = torch.autograd.grad(member.log_prob(member.sample()).sum(), copies)
    score = score[:, 0]
    assert (score.mean(0).abs() < 5 * score.std(0) / 20_000**0.5).all()


@pytest.mark.parametrize("family", [f for f in ALL.values() if hasattr(f, "gaussian")], ids=repr)
def test_gaussian_families_are_gaussians_behind_their_bijection(family):
    params = some_params(family)
    loc, tril = family.gaussian(params)
    torch.testing.assert_close(family.from_gaussian(loc, tril), params)
    u = torch.randn(9, 4, family.size).double()
    z = family.bijection(u)
    jacobian = family.bijection.log_abs_det_jacobian(u, z).sum(-1)
    behind = dist.MultivariateNormal(loc, scale_tril=tril).log_prob(u) - jacobian
    value = z if family.latent_dim else z[..., 0]
    torch.testing.assert_close(family.distribution(params).log_prob(value), behind)


def test_zero_is_the_neutral_member():
    zero = torch.zeros(2).double()
    torch.testing.assert_close(
        families.Gamma().distribution(zero).log_prob(torch.tensor(0.7).double()),
        torch.tensor(-0.7).double(),
    )
    torch.testing.assert_close(families.Weibull().distribution(zero).mean, torch.ones(()).double())
    assert families.DiagonalNormal().distribution(zero).stddev == 1


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (families.DiagonalNormal(), ["'z'", "DiagonalNormal()", "'real'", "Exponential", "Gamma"]),
        (families.Gamma(2), ["'z'", "Gamma(2)", "()", "(2,)", "Use Gamma()"]),
    ],
)
def test_a_family_that_does_not_fit_the_latent_is_refused(family, words):
    with pytest.raises(ValueError) as error:
        pairs.exponential_gaussian(family)
    for word in words:
        assert word in str(error.value)


def test_a_family_on_the_half_line_is_refused_for_a_normal_latent():
    with pytest.raises(ValueError, match="LogNormal.*'positive'.*Normal.*'real'.*FullRankNormal"):
        pairs.factor_analysis(6, 3, families.LogNormal(3))


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="4 parameters a row.*num_params"):
        families.DiagonalNormal(2).distribution(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="latent_dim"):
        families.Gamma(0)
    with pytest.raises(ValueError, match="FullRankNormal needs"):
        families.FullRankNormal(None)


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (dist.Uniform(torch.zeros(3), 1.0), "Uniform.*range of (high, )?low is not stated"),
        (dist.Poisson(torch.ones(3)), "Poisson.*no reparameterised draws"),
        (dist.VonMises(torch.zeros(3), 1.0), "VonMises.*no reparameterised draws"),
        (dist.Delta(torch.zeros(3)), "point .*Delta"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_distribution_that_is_no_family_is_refused_by_name(member, words):
    with pytest.raises(ValueError, match=f"'w'.*{words}"):
        read_member(GuideSite("w", member, torch.zeros(3)))


def test_supports_have_names():
    assert support_name(dist.MultivariateNormal(torch.zeros(2), torch.eye(2)).support) == "real"
    assert support_name(dist.Exponential(1.0).expand([3]).to_event(1).support) == "positive"
    assert support_name(dist.Beta(1.0, 1.0).support) != "positive"
    site = LatentSite("z", (), dist.Beta(1.0, 1.0).support, "Beta")
    with pytest.raises(ValueError, match="Beta"):
        families.Gamma().check_site(site)
