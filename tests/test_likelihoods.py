"""Likelihoods against SciPy's densities and direct formulas; what they refuse."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

import ppvae
from ppvae import distributions
from ppvae.likelihoods import Bernoulli, Categorical, Gaussian, NegativeBinomial, Poisson

COUNTS = torch.tensor([0.0, 1.0, 2.0, 7.0, 40.0, 300.0]).double()


def spread_counts(dispersion, log_mean):
    """SciPy's negative binomial of this mean and variance μ + α μ²."""
    r = 1 / dispersion
    return stats.nbinom(r, r / (r + np.exp(log_mean)))


def test_categories_have_the_softmax_of_their_logits():
    likelihood = Categorical(3)
    output = torch.randn(4, 5, 3 * 2).double()  # draws, rows, categories x elements
    x = torch.randint(0, 3, (5, 2)).double()
    logits = output.numpy().reshape(4, 5, 3, 2)  # category by category
    log_p = special.log_softmax(logits, axis=2)
    expected = np.zeros((4, 5))
    for row in range(5):
        for element in range(2):
            expected[:, row] += log_p[:, row, int(x[row, element]), element]
    np.testing.assert_allclose(likelihood.distribution(output).log_prob(x), expected, rtol=1e-12)
    probs = likelihood.mean(output)
    assert probs.shape == (4, 5, 2, 3)
    np.testing.assert_allclose(probs, np.exp(log_p).swapaxes(2, 3), rtol=1e-12)


def test_two_categories_are_a_bernoulli():
    output, x = torch.randn(6, 4).double(), torch.randint(0, 2, (6, 4)).double()
    both = torch.cat([torch.zeros_like(output), output], dim=-1)
    torch.testing.assert_close(
        Categorical(2).distribution(both).log_prob(x), Bernoulli().distribution(output).log_prob(x)
    )
    torch.testing.assert_close(Categorical(2).mean(both)[..., 1], Bernoulli().mean(output))


def test_draws_of_categories_are_floating_point_and_as_frequent_as_said():
    output = torch.tensor([0.0, 1.0, -1.0, 0.5, 0.3, -2.0])
    member = Categorical(3).distribution(output)
    x = member.sample((40_000,))
    assert x.dtype == output.dtype
    assert member.expand((7,)).sample().dtype == output.dtype
    probs = Categorical(3).mean(output)
    for k in range(3):
        share = (x == k).double().mean(dim=0)
        error = (probs[:, k] * (1 - probs[:, k]) / 40_000).sqrt()
        assert float(((share - probs[:, k]).abs() / error).max()) < 4.5


@pytest.mark.parametrize("log_rate", [-3.0, 0.0, 2.5, 5.0])
def test_a_poisson_is_scipys(log_rate):
    output = torch.full((6, 1), log_rate).double()
    ours = Poisson().distribution(output).log_prob(COUNTS[:, None])
    np.testing.assert_allclose(ours, stats.poisson(math.exp(log_rate)).logpmf(COUNTS), rtol=1e-11)
    np.testing.assert_allclose(Poisson().mean(output), math.exp(log_rate), rtol=1e-12)


@pytest.mark.parametrize("dispersion", [None, 1e-6, 0.5])
def test_counts_of_extreme_log_means_keep_their_probability(dispersion):
    """In float32 the mean itself underflows at −104 and overflows at 89."""
    likelihood = Poisson() if dispersion is None else NegativeBinomial(dispersion)
    output = torch.tensor([-200.0, -200.0]).float()
    x = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    log_p = likelihood.float().distribution(output).log_prob(x)
    rise = 0.0 if dispersion is None else rising(dispersion, 3)
    torch.testing.assert_close(log_p, torch.tensor([0.0, -600 - math.log(6) + rise]).float())
    above = likelihood.distribution(torch.tensor([100.0]).float()).log_prob(x[:, :1])
    if dispersion is None:
        assert bool((above == -math.inf).all())
    elif dispersion == 0.5:
        # With r = 2, (x + 1) (r / (r + μ))² to rounding, as μ / (r + μ) is 1.
        tail = 2 * (math.log(2) - 100)
        torch.testing.assert_close(above, torch.tensor([tail, tail + math.log(4)]).float())


# Dispersions on both sides of where the two expansions meet, 1/16.
@pytest.mark.parametrize("dispersion", [5.0, 0.7, 0.0626, 0.0625, 0.0624, 0.01])
@pytest.mark.parametrize("log_mean", [-3.0, 0.0, 4.0])
def test_a_negative_binomial_is_scipys(dispersion, log_mean):
    likelihood = NegativeBinomial(dispersion).double()
    output = torch.full((6, 1), log_mean).double()
    member = likelihood.distribution(output)
    theirs = spread_counts(float(likelihood.dispersion), log_mean)
    np.testing.assert_allclose(
        member.log_prob(COUNTS[:, None]), theirs.logpmf(COUNTS), rtol=2e-10, atol=1e-12
    )
    np.testing.assert_allclose(likelihood.mean(output), theirs.mean(), rtol=1e-12)
    np.testing.assert_allclose(member.variance, theirs.var(), rtol=1e-12)


def rising(dispersion, x):
    """Σ_j log(1 + α j) over j < x, in float64: log Γ(r + x) − log Γ(r) − x log r."""
    return np.log1p(dispersion * np.arange(x)).sum()


@pytest.mark.parametrize("dispersion", [2.0, 1e-1, 1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_negative_binomial_holds_its_digits_down_to_the_poisson(dispersion, dtype):
    """log Γ(r + x) − log Γ(r) as it stands is wrong by whole nats in float32 at r = 10⁷."""
    log_mean = math.log(9.0)
    expected = [
        x * log_mean
        - math.lgamma(x + 1)
        + rising(dispersion, int(x))
        - (1 / dispersion + x) * math.log1p(dispersion * 9.0)
        for x in COUNTS.tolist()
    ]
    p = distributions.NegativeBinomial(
        torch.tensor(log_mean, dtype=dtype), torch.tensor(math.log(dispersion), dtype=dtype)
    )
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5}[dtype]
    ours = p.log_prob(COUNTS.to(dtype)).double()
    np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance)
    if dispersion <= 1e-9:
        poisson = stats.poisson(9.0).logpmf(COUNTS)
        np.testing.assert_allclose(ours, poisson, rtol=3 * tolerance, atol=1e-4)


def test_a_negative_binomials_probabilities_add_up_to_one():
    x = torch.arange(4000).double()
    p = distributions.NegativeBinomial(torch.tensor(2.0).double(), torch.tensor(0.3).double())
    assert abs(float(p.log_prob(x).exp().sum()) - 1) < 1e-12


@pytest.mark.parametrize("dispersion", [3.0, 0.0625, 1e-4])
def test_a_negative_binomials_gradient(dispersion):
    log_mean = torch.tensor([-1.0, 0.5, 3.0]).double().requires_grad_()
    log_dispersion = torch.tensor(math.log(dispersion) + 1e-3).double().requires_grad_()

    def density(one, other):
        return distributions.NegativeBinomial(one, other).log_prob(COUNTS[:, None])

    assert torch.autograd.gradcheck(density, (log_mean, log_dispersion))


def test_large_counts_keep_their_probability_in_single_precision():
    """x η, e^η and log x! are 10⁸ where log p(x) is −9; inputs are rounded alike on both sides."""
    x = torch.logspace(0, 7, 29).round()
    for shift in (0.0, 3.0):  # In standard deviations, off the mode.
        log_rate = (x + shift * x.sqrt()).log().requires_grad_()
        eta, counts = log_rate.detach().double().numpy(), x.double().numpy()
        ours = distributions.Poisson(log_rate).log_prob(x)
        assert ours.dtype == torch.float32
        expected = counts * eta - np.exp(eta)
        expected -= special.gammaln(counts + 1)
        np.testing.assert_allclose(ours.detach(), expected, rtol=1e-6, atol=1e-6)
        (slope,) = torch.autograd.grad(ours.sum(), log_rate)
        np.testing.assert_allclose(slope, counts - np.exp(eta), rtol=1e-6, atol=1e-6)
        rate = log_rate.detach().exp()
        ours = distributions.PoissonOfRate(rate).log_prob(x)
        theirs = stats.poisson(rate.double().numpy()).logpmf(counts)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
        ours = distributions.NegativeBinomial(log_rate.detach(), torch.tensor(-1.0)).log_prob(x)
        r, mean = math.e, np.exp(eta)
        theirs = stats.nbinom(r, r / (r + mean)).logpmf(counts)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("log_dispersion", [-1000.0, -100.0, -88.0, 88.0, 90.0, 1000.0])
def test_a_negative_binomial_of_extreme_dispersion_is_that_of_the_bound(log_dispersion):
    bound = math.copysign(30.0, log_dispersion)
    log_mean = torch.tensor(1.0, requires_grad=True)
    given = torch.tensor(log_dispersion, requires_grad=True)
    ours = distributions.NegativeBinomial(log_mean, given).log_prob(COUNTS.float())
    alpha = math.exp(bound)
    expected = [
        x
        - math.lgamma(x + 1)
        + rising(alpha, int(x))
        - (1 / alpha + x) * math.log1p(alpha * math.e)
        for x in COUNTS.tolist()
    ]
    np.testing.assert_allclose(ours.detach(), expected, rtol=1e-6, atol=1e-6)
    slopes = torch.autograd.grad(ours.sum(), (log_mean, given))
    # d log p / d log μ = (x − μ) / (1 + α μ).
    expected = float(((COUNTS - math.e) / (1 + alpha * math.e)).sum())
    assert float(slopes[0]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert float(slopes[1]) == 0.0
    if bound < 0:
        np.testing.assert_allclose(
            ours.detach(), stats.poisson(math.e).logpmf(COUNTS), rtol=1e-6, atol=1e-6
        )


def test_draws_of_counts_have_their_moments():
    output = torch.tensor([-0.5, 1.0, 3.0]).double()
    for likelihood in (Poisson(), NegativeBinomial(0.4).double(), NegativeBinomial(1e-3).double()):
        member = likelihood.distribution(output)
        x = member.sample((40_000,))
        assert x.dtype == output.dtype
        error = (member.variance / 40_000).sqrt()
        assert float(((x.mean(dim=0) - member.mean).abs() / error).max()) < 4.5
        squares = (x - member.mean).square()
        error = squares.std(dim=0) / 200
        assert float(((squares.mean(dim=0) - member.variance).abs() / error).max()) < 4.5


@pytest.mark.parametrize(
    ("likelihood", "x_dim"),
    [
        (Categorical(3), 4),
        (Poisson(), 4),
        (NegativeBinomial(0.3), 4),
        (NegativeBinomial.learned(0.3), 4),
        (NegativeBinomial.per_dimension(4, 0.3), 4),
    ],
    ids=repr,
)
def test_a_vaes_joint_is_prior_plus_likelihood(likelihood, x_dim):
    model, _ = ppvae.pairs.vae(x_dim, 2, [6], likelihood)
    model = model.double()
    x = torch.randint(0, 3, (5, x_dim)).double()
    z = torch.randn(3, 5, 2).double()
    output = model.decoder(z).detach().numpy()
    if isinstance(likelihood, Categorical):
        log_p = special.log_softmax(output.reshape(3, 5, 3, x_dim), axis=2)
        classes = np.broadcast_to(x.numpy().astype(int)[None, :, None], (3, 5, 1, x_dim))
        log_x = np.take_along_axis(log_p, classes, axis=2)[:, :, 0]
    elif isinstance(likelihood, Poisson):
        log_x = stats.poisson(np.exp(output)).logpmf(x.numpy())
    else:
        log_x = spread_counts(0.3, output).logpmf(x.numpy())
    expected = log_x.sum(-1) + stats.norm().logpdf(z.numpy()).sum(-1)
    ours = ppvae.log_joint(model, x, z).detach()
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_the_mean_is_the_distributions_and_decode_gives_it():
    for likelihood in (
        Bernoulli(),
        Gaussian(0.3),
        Gaussian.network(),
        Poisson(),
        NegativeBinomial(0.5),
    ):
        output = torch.randn(5, likelihood.num_outputs(4))
        expected = likelihood.distribution(output).mean
        torch.testing.assert_close(likelihood.mean(output), expected)
    model, _ = ppvae.pairs.vae(4, 2, [3], Categorical(3))
    probs = model.decode(torch.randn(6, 5, 2))
    assert probs.shape == (6, 5, 4, 3)
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones(6, 5, 4))


def test_a_learned_dispersion_is_a_parameter_and_a_fixed_one_is_not():
    assert list(NegativeBinomial(0.2).parameters()) == []
    assert [p.shape for p in NegativeBinomial.learned().parameters()] == [()]
    assert [p.shape for p in NegativeBinomial.per_dimension(7).parameters()] == [(7,)]
    for likelihood in (NegativeBinomial(0.2), NegativeBinomial.per_dimension(3, 0.2)):
        torch.testing.assert_close(
            likelihood.dispersion.detach(), torch.full(likelihood.dispersion.shape, 0.2)
        )
    assert repr(NegativeBinomial(0.2)) == "NegativeBinomial(dispersion=0.2)"
    assert repr(NegativeBinomial.learned(0.2)) == "NegativeBinomial(learned dispersion, now 0.2)"
    assert repr(NegativeBinomial.per_dimension(7)) == "NegativeBinomial(learned dispersion x 7)"


def test_the_most_likely_dispersions_are_those_that_were_simulated():
    true = torch.tensor([0.05, 0.5, 2.0]).double()
    count = 20_000
    output = torch.full((count, 3), 2.0).double()
    x = distributions.NegativeBinomial(output, true.log().expand(count, 3)).sample()
    likelihood = NegativeBinomial.per_dimension(3).double()
    optimizer = torch.optim.LBFGS(
        likelihood.parameters(), tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = -likelihood.distribution(output).log_prob(x).mean()
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(loss)
    (log_dispersion,) = likelihood.parameters()
    assert float(log_dispersion.grad.abs().max()) < 1e-6
    # The error of α by the method of moments, which is no better than the most likely one.
    error = (x - x.mean(dim=0)).square().std(dim=0) / math.sqrt(count) / math.exp(4.0)
    assert bool(((likelihood.dispersion.detach() - true).abs() < 4.5 * error).all())


BAD = {
    "Categorical, above": (Categorical(3), 3.0, r"the categories 0, 1, …, 2 alone.*first: 3\)"),
    "Categorical, below": (Categorical(3), -1.0, r"Categorical\(3\).*first: -1\)"),
    "Categorical, fraction": (Categorical(3), 1.5, r"first: 1\.5\).*num_classes"),
    "Poisson, negative": (Poisson(), -1.0, r"Poisson.*counts 0, 1, 2, … alone.*first: -1\)"),
    "Poisson, fraction": (Poisson(), 0.5, r"counts 0, 1, 2, … alone.*first: 0\.5\).*Gaussian"),
    "NegativeBinomial, negative": (NegativeBinomial(), -2.0, r"NegativeBinomial.*first: -2\)"),
    "NegativeBinomial, fraction": (NegativeBinomial(), 2.25, r"first: 2\.25\)"),
}


@pytest.mark.parametrize(("likelihood", "value", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.fills_store
def test_rows_outside_of_the_support_are_refused(likelihood, value, message):
    x = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    likelihood.check(x)
    x[1, 1] = value
    with pytest.raises(ValueError, match=r'Site "x": .*got 1 other values of 4'):
        likelihood.check(x)
    model, guide = ppvae.pairs.vae(2, 1, [3], likelihood)
    for call in (model, lambda rows: ppvae.elbo(model, guide, rows)):
        with pytest.raises(ValueError, match=message):
            call(x)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="num_classes must be at least 2; got 1"):
        Categorical(1)
    for dispersion in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="dispersion must be positive and finite"):
            NegativeBinomial(dispersion)
    for likelihood in (NegativeBinomial.per_dimension(5), Gaussian.per_dimension(5)):
        with pytest.raises(ValueError, match=r"rows of size 5; got x_dim=4.*per_dimension\(4\)"):
            ppvae.pairs.vae(4, 2, [3], likelihood)
