"""Layers of continuous latents: closed forms of the linear and the conjugate cases."""

import math

import numpy as np
import pytest
import torch
from laws import sigmas
from pyro import poutine
from scipy import integrate, stats

import ppvae
from ppvae import families, pairs
from ppvae.distributions import Weibull
from ppvae.families import DiagonalNormal
from ppvae.guides import Amortized, TopDown
from ppvae.isolation import private_store
from ppvae.likelihoods import Bernoulli, Categorical, Gaussian
from ppvae.models import VAE, DeepExponentialFamily, DeepLatentGaussian, FactorAnalysis
from ppvae.nn import MLP, BottomUp

MEAN_FIELD = {"z_1": DiagonalNormal(2), "z_2": DiagonalNormal(2)}


# --- The linear deep latent Gaussian model ---------------------------------------------------


def linear_model(x_dim=5, noise=0.7, seed=0):
    """Two linear layers in float64, with W0 of orthogonal columns and W1 diagonal."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoders = [MLP(2, [], x_dim), MLP(2, [], 2)]
        model = DeepLatentGaussian(x_dim, (2, 2), decoders, Gaussian(noise)).double()
        w0, _ = torch.linalg.qr(torch.randn(x_dim, 2).double())
    scale = torch.tensor([1.5, 0.8]).double()
    with torch.no_grad():
        decoders[0].layers[0].weight.copy_(w0 * scale)
        decoders[1].layers[0].weight.copy_(torch.diag(torch.tensor([1.2, -0.6])))
        model.scale_1_unconstrained.copy_(torch.tensor([0.5, 0.9]).log())
    return model


def parts(model):
    """W0, b0, W1, b1, the standard deviations of z_1, and that of the noise."""
    first, second = (decoder.layers[0] for decoder in model.decoders)
    noise = torch.exp(model.likelihood._log_scale)
    with private_store():
        scale = model.scale_1
    found = (first.weight, first.bias, second.weight, second.bias, scale, noise)
    return [value.detach() for value in found]


def composite(model):
    """The factor analysis over (z_2, noise of z_1) that is the same distribution of x."""
    w0, b0, w1, b1, scale, noise = parts(model)
    loadings = torch.cat([w0 @ w1, w0 * scale], dim=1)
    x_dim, z_dim = loadings.shape
    return FactorAnalysis(
        x_dim, z_dim, loadings=loadings, noise=noise.expand(x_dim).double(), loc=b0 + w0 @ b1
    )


def rows(model, size, seed=1):
    with torch.no_grad(), ppvae.isolation.forked_rng(seed), private_store():
        return model(size=size)


def exact_ladder(model):
    """The top-down guide with the posterior of `linear_model` in its weights."""
    w0, b0, w1, b1, scale, noise = parts(model)
    precision = (w0**2).sum(0) / noise**2  # of the message about z_1 from x
    to_z1 = (w0 / noise**2 / precision).mT
    slope = w1.diagonal()
    spread = scale**2 + 1 / precision  # of that message about f_1(z_2)
    variance = 1 / (1 + slope**2 / spread)
    gain = variance * slope / spread
    guide = TopDown(["z_1", "z_2"], [2, 2], BottomUp(len(w0), [], [4, 4]), []).double()
    with torch.no_grad():
        for head, matrix, loc, var in (
            (guide.encoder.heads[0], to_z1, -to_z1 @ b0, 1 / precision),
            (guide.encoder.heads[1], gain[:, None] * to_z1, -gain * (to_z1 @ b0 + b1), variance),
        ):
            head.weight.copy_(torch.cat([matrix, torch.zeros_like(matrix)]))
            head.bias.copy_(torch.cat([loc, 0.5 * torch.log(var)]))
        guide.from_above[0].layers[0].weight.copy_(w1)
        guide.from_above[0].layers[0].bias.copy_(b1)
        guide.log_scales[0].copy_(scale.log())
    return guide


def mean_field_gap(model):
    """The least KL(q, p) of independent normals: half of log ∏ Λ_ii − log det Λ."""
    w0, _, w1, _, scale, noise = parts(model)
    within = torch.diag(1 / scale**2)
    top = torch.eye(2) + w1.mT @ within @ w1
    bottom = within + w0.mT @ w0 / noise**2
    precision = torch.cat(
        [torch.cat([top, -w1.mT @ within], 1), torch.cat([-within @ w1, bottom], 1)]
    )
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    return float(gap)


def test_the_top_down_guide_holds_the_linear_posterior():
    """All log weights equal the evidence of the factor analysis with the composite loadings."""
    model = linear_model()
    x = rows(model, 20)
    weights = ppvae.log_weights(model, exact_ladder(model), x, 50)
    evidence = composite(model).log_evidence(x).detach()
    torch.testing.assert_close(weights, evidence.expand(50, 20), rtol=0, atol=1e-11)


def test_the_linear_model_draws_the_composite_factor_analysis():
    model, size = linear_model(), 40_000
    x, other = rows(model, size), composite(model)
    covariance = other.loadings @ other.loadings.mT + torch.diag(other.noise.detach() ** 2)
    centred = x - other.loc
    assert sigmas(centred.mean(0), torch.zeros(5), centred.std(0) / math.sqrt(size)) < 5
    products = centred[:, :, None] * centred[:, None, :]
    assert sigmas(products.mean(0), covariance, products.std(0) / math.sqrt(size)) < 5


def test_importance_weights_of_the_bottom_up_guide_reach_the_composite_evidence():
    model = linear_model()
    x = rows(model, 10)
    local = ppvae.fit_per_datapoint(model, MEAN_FIELD, x)
    estimate = ppvae.iwae(model, local.guide, x, 20_000)
    truth = composite(model).log_evidence(x).detach()
    assert sigmas(estimate.value, truth, estimate.stderr) < 5


def test_compare_needs_a_named_family_for_a_top_down_guide():
    model = linear_model()
    x, guide = rows(model, 12), exact_ladder(model)
    with pytest.raises(ValueError, match=r"Site 'z_1': its distribution depends on another lat"):
        ppvae.compare(model, guide, x)
    with pytest.raises(ValueError, match="'z_1'"):
        ppvae.per_datapoint(guide, x)
    compared = ppvae.compare(model, guide, x, family=MEAN_FIELD, num_samples=2000)
    # The guide is exact: what the best member of the family loses, it gains.
    gap = mean_field_gap(model)
    amortization, error = compared.mean("amortization_gap")
    assert abs(amortization + gap) < 5 * error + 1e-3 < gap
    local = ppvae.fit_per_datapoint(model, MEAN_FIELD, x)
    truth = composite(model).log_evidence(x).detach()
    assert sigmas(truth - local.elbo, gap, local.elbo_stderr + 2e-4) < 5


def test_the_bottom_up_guide_can_be_freed():
    model, guide = pairs.deep_latent_gaussian(6, (3, 2), (8,))
    x = rows(model, 4)
    freed = ppvae.per_datapoint(guide, x, model=model)
    last, first = guide.encoder.outputs(x)[::-1]
    torch.testing.assert_close(freed.table("z_2").weight, last)
    torch.testing.assert_close(freed.table("z_1").weight, first)


def test_one_layer_is_a_vae():
    model, guide = pairs.deep_latent_gaussian(6, (2,), (8,), activation=torch.nn.ELU)
    other = VAE(6, 2, model.decoders[0], Bernoulli())
    x, z = rows(model, 5), torch.randn(3, 5, 2)
    torch.testing.assert_close(ppvae.log_joint(model, x, z), ppvae.log_joint(other, x, z))
    assert list(guide.families) == ["z"]
    ladder = pairs.deep_latent_gaussian(6, (2,), top_down=True)[1]
    assert isinstance(ladder, Amortized)  # There is nothing above the only layer.


def test_three_layers_are_named_from_x_upwards_and_drawn_from_the_top():
    model, guide = pairs.deep_latent_gaussian(6, (4, 3, 2), (8,), top_down=True)
    with private_store():
        trace = poutine.trace(model).get_trace(size=7)
        drawn = guide(trace.nodes["x"]["value"])
    shapes = {"z_3": (7, 2), "z_2": (7, 3), "z_1": (7, 4)}
    assert {name: tuple(z.shape) for name, z in drawn.items()} == shapes
    assert list(drawn) == [name for name in trace.nodes if name.startswith("z_")]


def test_categories_are_decoded_to_their_probabilities():
    model, _ = pairs.deep_latent_gaussian(4, (3, 2), [5], Categorical(3))
    z = torch.randn(6, 3)
    logits = model.decoders[0](z).detach().reshape(6, 3, 4)  # Category by category.
    torch.testing.assert_close(model.decode(z), torch.softmax(logits, dim=1).mT)


def test_activations_of_the_lecture():
    """f(z) = W σ(V z) + b."""
    model, _ = pairs.deep_latent_gaussian(6, (4, 2), (3,), activation=torch.nn.Sigmoid)
    inner, _, outer = model.decoders[1].layers
    z = torch.randn(5, 2)
    by_hand = torch.sigmoid(z @ inner.weight.mT + inner.bias) @ outer.weight.mT + outer.bias
    torch.testing.assert_close(model.decoders[1](z), by_hand)


def test_what_does_not_fit_is_refused():
    ok = [MLP(4, [], 6), MLP(2, [], 4)]
    for z_dims, decoders, match in (
        ((), [], "z_dims: expected the size of at least one layer"),
        ((4, 0), ok, "z_dims"),
        ((4, 2), ok[:1], r"a network for each of the 2 layers .* got 1"),
        ((4, 2), [ok[0], MLP(2, [], 3)], r"decoders\[1\]: expected outputs of shape \(batch, 4\)"),
    ):
        with pytest.raises(ValueError, match=match):
            DeepLatentGaussian(6, z_dims, decoders, Bernoulli())
    with pytest.raises(ValueError, match="x_dim"):
        DeepLatentGaussian(0, (4, 2), ok, Bernoulli())
    with pytest.raises(ValueError, match='Site "x": a Bernoulli'):
        DeepLatentGaussian(6, (4, 2), ok, Bernoulli())(torch.full((2, 6), 0.5))
    with pytest.raises(ValueError, match="likelihood: expected 'bernoulli'"):
        pairs.deep_latent_gaussian(6, likelihood="poisson")
    with pytest.raises(ValueError, match="a top-down guide has normal layers"):
        pairs.deep_latent_gaussian(6, (2, 2), family=MEAN_FIELD, top_down=True)
    with pytest.raises(ValueError, match=r"each of the latent sites \['z_2', 'z_1'\]"):
        pairs.deep_latent_gaussian(6, (2, 2), family={"z_1": DiagonalNormal(2)})
    with pytest.raises(ValueError, match="Site 'z_2'"):
        pairs.deep_latent_gaussian(6, (2, 3), family=MEAN_FIELD)
    with pytest.raises(ValueError, match="at least two layers"):
        TopDown(["z"], [2], BottomUp(6, [], [4]), [])
    with pytest.raises(ValueError, match=r"encoder: expected outputs \(4, 4\)"):
        TopDown(["z_1", "z_2"], [2, 2], BottomUp(6, [], [4, 2]), [])
    with pytest.raises(ValueError, match="needs the rows x"):
        TopDown(["z_1", "z_2"], [2, 2], BottomUp(6, [], [4, 4]), [])()
    with pytest.raises(ValueError, match="sizes must be positive"):
        BottomUp(6, [], [])
    with pytest.raises(ValueError, match=r"rows of size 6, .* got \(3, 5\)"):
        BottomUp(6, [], [4])(torch.zeros(3, 5))


# --- The deep exponential family -------------------------------------------------------------

SHAPE, RATE = 2.0, 0.5


def conjugate(weights=((1.5,), (0.4,)), shape=SHAPE, rate=RATE):
    """One gamma latent under Poisson counts: x | z ~ Poisson(w z)."""
    w = torch.tensor(weights, dtype=torch.float64)
    model = DeepExponentialFamily(len(w), (1,), shape=shape, rate=rate, weights=[w], background=0.0)
    return model.double()


class Exact(torch.nn.Module):
    """λ of the gamma posterior of `conjugate`."""

    def __init__(self, total):
        super().__init__()
        self.total = total

    def forward(self, x):
        concentration = SHAPE + x.sum(-1, keepdim=True)
        return torch.cat(
            [concentration, torch.full_like(concentration, RATE + self.total)], 1
        ).log()


COUNTS = torch.tensor([[0.0, 0.0], [3.0, 1.0], [12.0, 0.0], [40.0, 9.0]]).double()


def negative_binomial(x, weights):
    """log ∫ Gamma(z; α, β) ∏ Poisson(x_d; w_d z) dz, in closed form."""
    w, total = torch.tensor(weights, dtype=torch.float64)[:, 0], x.sum(-1)
    return (
        torch.lgamma(SHAPE + total)
        - math.lgamma(SHAPE)
        - torch.lgamma(x + 1).sum(-1)
        + SHAPE * math.log(RATE)
        + (x * w.log()).sum(-1)
        - (SHAPE + total) * torch.log(RATE + w.sum())
    )


def test_one_gamma_latent_gives_negative_binomial_counts():
    single = ((1.5,),)
    x = torch.arange(30.0)[:, None].double()
    scipys = stats.nbinom(SHAPE, RATE / (RATE + 1.5)).logpmf(x[:, 0].numpy())
    np.testing.assert_allclose(negative_binomial(x, single), scipys, rtol=1e-10)
    integral = ppvae.quadrature(conjugate(single), x)
    np.testing.assert_allclose(integral.value, scipys, atol=1e-6)


def test_the_gamma_posterior_of_counts_has_equal_weights():
    weights = ((1.5,), (0.4,))
    guide = Amortized(families.Gamma(1), Exact(1.9)).double()
    ours = ppvae.log_weights(conjugate(weights), guide, COUNTS, 50)
    truth = negative_binomial(COUNTS, weights)
    torch.testing.assert_close(ours, truth.expand(50, 4), rtol=0, atol=1e-10)


def test_two_layers_are_a_mixture_of_negative_binomials():
    """z_1 is integrated in closed form, z_2 by SciPy; ours integrates both."""
    w0, w1, a1, a2, b = 1.5, 0.8, 2.0, 1.3, 0.7
    model = DeepExponentialFamily(
        1,
        (1, 1),
        shape=(a1, a2),
        rate=b,
        weights=[torch.tensor([[w]], dtype=torch.float64) for w in (w0, w1)],
        background=0.0,
    ).double()

    def evidence(x):
        def integrand(z):
            rate = a1 / (w1 * z)
            return stats.nbinom.pmf(x, a1, rate / (rate + w0)) * stats.gamma.pdf(z, a2, scale=1 / b)

        return math.log(integrate.quad(integrand, 0, 60, epsabs=1e-13, limit=200)[0])

    x = torch.tensor([[0.0], [2.0], [9.0]]).double()
    weights = torch.tensor([evidence(int(v)) for v in x[:, 0]]).double()
    integral = ppvae.quadrature(model, x)
    torch.testing.assert_close(integral.value, weights, rtol=0, atol=1e-5)


def test_counts_have_the_mean_of_the_weights():
    model, size = DeepExponentialFamily(6, (4, 3), shape=0.7), 20_000
    x = rows(model, size)
    with private_store():
        mean = (model.weight_0 @ model.weight_1.sum(1)).detach()  # The deepest layer has mean 1.
    assert sigmas(x.mean(0), mean, x.std(0) / math.sqrt(size)) < 5


def test_large_counts_keep_their_probability_in_single_precision():
    model = DeepExponentialFamily(1, (1,), weights=[torch.ones(1, 1)], background=0.0)
    x = torch.logspace(0, 7, 15).round()[:, None]
    z, prior = x.clone(), stats.gamma(0.3, scale=1 / 0.3)
    ours = ppvae.log_joint(model, x, {"z": z}).detach()
    counts = x[:, 0].double().numpy()
    likelihood = stats.poisson(counts).logpmf(counts)
    # The prior's −0.3 z is of the size of the count; its own rounding is allowed for.
    np.testing.assert_allclose(ours, likelihood + prior.logpdf(counts), rtol=1e-6, atol=1e-4)


def draws_of(model, size):
    with torch.no_grad(), ppvae.isolation.forked_rng(0), private_store():
        trace = poutine.trace(model).get_trace(size=size)
    return {n: trace.nodes[n]["value"] for n in (*model.sites, "x")}


def test_sparse_draws_stay_numbers_with_their_distribution():
    """Of shape 0.1 some draws are too small for float32: these alone are at the least number."""
    # Torch bounds the draw of rate 1, before it divides by the rate, here 0.1.
    size, least = 200_000, 10 * float(torch.finfo(torch.float32).tiny)
    z = draws_of(DeepExponentialFamily(2, (3,), shape=0.1), size)["z"].flatten().double().numpy()
    exact = stats.gamma(0.1, scale=10.0)
    assert abs(z.min() / least - 1) < 1e-4
    for level in (least * 1.0001, 1e-30, 1e-20, 1e-10, 1e-3, 1.0, 10.0):
        p = exact.cdf(level)
        assert abs((z <= level).mean() - p) < 5 * math.sqrt(p * (1 - p) / len(z))


@pytest.mark.parametrize("background", [0.0, 1e-6])
def test_densities_of_sparse_draws_are_those_of_exact_arithmetic(background):
    model = DeepExponentialFamily(4, (3, 2), shape=0.1, background=background)
    drawn = draws_of(model, 50_000)
    x = drawn.pop("x")
    single = ppvae.log_joint(model, x, drawn).detach()
    double = {name: z.double() for name, z in drawn.items()}
    exact = ppvae.log_joint(model.double(), x.double(), double).detach()
    assert (torch.cat(list(drawn.values()), 1) <= 1.2e-38).any()
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-3)


def test_weights_of_the_prior_are_the_likelihood_also_at_the_least_number():
    """q = p: log p(x, z) − log q(z) = log p(x | z), however steep both densities are."""
    model = DeepExponentialFamily(1, (1,), shape=0.1, rate=0.1, weights=[torch.ones(1, 1)])
    guide = Amortized(families.Gamma(1), MLP(1, [], 2))
    with torch.no_grad():
        guide.encoder.layers[0].weight.zero_()
        guide.encoder.layers[0].bias.fill_(math.log(0.1))
    weights = ppvae.log_weights(model, guide, torch.zeros(1, 1), 100_000)
    assert float(weights.max()) < 1e-4  # log Poisson(0; z + ε) = −z − ε
    assert float(weights.min()) > -400.0
    # The mean of e^−z under Gamma(0.1, 0.1).
    estimate = torch.exp(weights)
    truth, error = (0.1 / 1.1) ** 0.1, float(estimate.std()) / math.sqrt(100_000)
    assert abs(float(estimate.mean()) - truth) < 5 * error


def test_weibull_draws_are_positive_and_have_a_density():
    k, size = 0.04, 100_000
    member = families.Weibull().distribution(torch.tensor([0.0, math.log(k)]))
    assert type(member) is Weibull
    z, least = member.sample((size,)), torch.finfo(torch.float32).tiny
    assert float(z.min()) == least  # Pyro's own gives 0, outside of its support.
    below = -math.expm1(-(least**k))
    share = float((z <= least).float().mean())
    assert abs(share - below) < 5 * math.sqrt(below * (1 - below) / size)
    u = k * torch.log(z.double())  # log of an exponential
    by_hand = math.log(k) + u - torch.exp(u) - torch.log(z.double())
    torch.testing.assert_close(member.log_prob(z).double(), by_hand, rtol=1e-4, atol=1e-3)
    freed = ppvae.per_datapoint(
        pairs.deep_exponential_family(3, (2,), family=families.Weibull)[1], torch.ones(2, 3)
    )
    assert repr(freed.families["z"]) == "Weibull(2)"


@pytest.mark.parametrize("value", [-1.0, 0.5])
def test_what_are_no_counts_is_refused(value):
    model, guide = pairs.deep_exponential_family(3, (2,))
    x = torch.tensor([[1.0, 2.0, value]])
    for run in (
        lambda: model(x),
        lambda: ppvae.fit(model, guide, x, steps=1, progress=False),
        lambda: ppvae.log_weights(model, guide, x),
    ):
        with pytest.raises(ValueError, match=rf'Site "x": .* got 1 other values .*{value:.4g}'):
            run()


def test_sizes_and_shapes_that_do_not_fit_are_refused():
    w = torch.ones(3, 2)
    for kwargs, match in (
        ({"x_dim": 0}, "x_dim"),
        ({"z_dims": ()}, "z_dims"),
        ({"shape": 0.0}, "shape: expected a positive number"),
        ({"shape": (1.0, 1.0)}, "one for each of the 1 layers"),
        ({"rate": -1.0}, "rate must be positive"),
        ({"background": -1.0}, "background"),
        ({"weights": [w.mT]}, r"weights: expected tensors of shapes \[\(3, 2\)\]"),
        ({"weights": [-w]}, r"weights\[0\]: expected positive"),
    ):
        with pytest.raises(ValueError, match=match):
            DeepExponentialFamily(**{"x_dim": 3, "z_dims": (2,), **kwargs})
    with pytest.raises(ValueError, match="family: expected the class of a family"):
        pairs.deep_exponential_family(family=families.Gamma(2))
    with pytest.raises(ValueError, match="support 'real'"):
        pairs.deep_exponential_family(3, (2,), family=DiagonalNormal)
