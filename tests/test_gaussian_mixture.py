"""A mixture of Gaussians, whose evidence and posterior are sums over the components."""

import itertools

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from scipy import integrate, stats

import ppvae
from ppvae import pairs
from ppvae.families import Categorical
from ppvae.guides import PerDatapoint
from ppvae.isolation import forked_rng, private_store
from ppvae.models import GaussianMixture

LOC = torch.tensor([[-1.5, 0.0], [1.5, 0.5], [0.0, 2.0]])
SCALE = torch.tensor([[1.0, 0.6], [0.7, 1.2], [0.9, 0.5]])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
TRIL = torch.tensor([[[1.0, 0.0], [0.5, 0.6]], [[0.7, 0.0], [-0.8, 1.2]], [[0.9, 0.0], [0.1, 0.5]]])


def given(full_covariance=False):
    scale = TRIL if full_covariance else SCALE
    return GaussianMixture(
        2, 3, full_covariance=full_covariance, weights=WEIGHTS, loc=LOC, scale=scale
    )


def rows(model, size, seed=0):
    with forked_rng(seed), private_store(), torch.no_grad():
        return model(size=size)


def exact_elbo(model, x, log_q):
    """Σ_k q_k (log p(x, k) − log q_k), from the model's evidence and posterior."""
    log_joint = model.posterior(x).logits + model.log_evidence(x)[:, None]
    return (log_q.exp() * (log_joint - log_q)).sum(-1)


kinds = pytest.mark.parametrize("full_covariance", [False, True], ids=["diagonal", "full"])


@kinds
def test_evidence_and_posterior_against_scipy(full_covariance):
    model = given(full_covariance).double()
    x = rows(model, 20)
    covariances = (
        (TRIL @ TRIL.mT).double().numpy()
        if full_covariance
        else np.stack([np.diag(s) for s in SCALE.double().numpy() ** 2])
    )
    shares = np.stack(
        [
            w * stats.multivariate_normal(m, c).pdf(x.numpy())
            for w, m, c in zip(WEIGHTS.numpy(), LOC.numpy(), covariances, strict=True)
        ],
        axis=-1,
    )
    np.testing.assert_allclose(model.log_evidence(x), np.log(shares.sum(-1)), rtol=1e-6)
    posterior = shares / shares.sum(-1, keepdims=True)
    np.testing.assert_allclose(model.posterior(x).probs, posterior, rtol=1e-5, atol=1e-12)


@kinds
def test_bayes_rule_holds_at_every_component(full_covariance):
    """log p(x, z) − log p(z | x) = log p(x), with draws of z of any leading shape."""
    model = given(full_covariance).double()
    x = rows(model, 7)
    z = torch.arange(3)[:, None].expand(3, 7)
    joint = ppvae.log_joint(model, x, z)
    torch.testing.assert_close(
        joint - model.posterior(x).log_prob(z), model.log_evidence(x).expand(3, 7)
    )


def test_the_evidence_integrates_to_one():
    model = GaussianMixture(
        1, 2, weights=WEIGHTS[1:] / 0.5, loc=torch.tensor([[-2.0], [1.0]]), scale=SCALE[:2, :1]
    ).double()
    total, _ = integrate.quad(
        lambda v: float(model.log_evidence(torch.tensor([[v]]).double()).exp()), -15, 15
    )
    assert abs(total - 1) < 1e-8


@kinds
def test_draws_have_the_mixtures_moments(full_covariance):
    model = given(full_covariance)
    x = rows(model, 40_000).double()
    covariances = TRIL @ TRIL.mT if full_covariance else (SCALE**2).diag_embed()
    mean = WEIGHTS @ LOC
    second = torch.einsum("k,kij->ij", WEIGHTS, covariances + LOC[:, :, None] * LOC[:, None, :])
    products = x[:, :, None] * x[:, None, :]
    for draws, expected in ((x, mean), (products, second)):
        error = draws.std(dim=0) / len(x) ** 0.5
        assert float(((draws.mean(dim=0) - expected).abs() / error).max()) < 5


@kinds
def test_given_parameters_are_held_fixed(full_covariance):
    model = given(full_covariance)
    torch.testing.assert_close(model.weights, WEIGHTS)
    torch.testing.assert_close(model.scale, TRIL if full_covariance else SCALE)
    assert not any(p.requires_grad for p in model.parameters())
    learned = GaussianMixture(2, 3, full_covariance=full_covariance)
    assert all(p.requires_grad for p in learned.parameters())
    assert len(list(learned.parameters())) == 3


def test_unfit_arguments_are_refused():
    with pytest.raises(ValueError, match="num_components at least 2; got 2 and 1"):
        GaussianMixture(2, 1)
    with pytest.raises(ValueError, match="weights: expected positive values with sum 1"):
        GaussianMixture(2, 3, weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"logits: expected shape \(3,\)|weights.*\(3,\)"):
        GaussianMixture(2, 3, weights=torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match=r"loc: expected shape \(3, 2\); got \(2, 3\)"):
        GaussianMixture(2, 3, loc=LOC.mT)
    with pytest.raises(ValueError, match="scale: expected positive values"):
        GaussianMixture(2, 3, scale=-SCALE)
    with pytest.raises(ValueError, match="lower triangular matrices with a positive diagonal"):
        GaussianMixture(2, 3, full_covariance=True, scale=TRIL.mT)
    with pytest.raises(ValueError, match=r"expected x of shape \(batch, 2\)"):
        given()(torch.zeros(3, 4))


# The guide.


def test_with_the_exact_posterior_as_guide_all_weights_are_the_evidence():
    model = given().double()
    x = rows(model, 9)
    guide = PerDatapoint(Categorical(3), 9).double()
    with torch.no_grad():
        guide.table("z").weight.copy_(model.posterior(x).logits)
    weights = ppvae.log_weights(model, guide, x, 50)
    torch.testing.assert_close(weights, model.log_evidence(x).expand(50, 9))


@pytest.mark.parametrize(
    "loss", ["TraceEnum_ELBO", pytest.param("TraceGraph_ELBO", marks=pytest.mark.slow)]
)
def test_an_amortized_guide_comes_within_two_hundredths_of_a_nat(loss):
    """The family holds the posterior, so that the whole gap is amortization."""
    model = given()
    train, test = rows(model, 1000), rows(model, 500, seed=1)
    with forked_rng(0):
        _, guide = pairs.gaussian_mixture(2, 3)
    before = exact_elbo(model, test, guide.family.log_probs(guide.params(test))[:, 0]).detach()
    if loss == "TraceEnum_ELBO":
        fitted, objective, steps = config_enumerate(guide), TraceEnum_ELBO(max_plate_nesting=1), 100
    else:
        fitted, objective, steps = guide, TraceGraph_ELBO(), 400
    for lr in (3e-2, 3e-3):
        fit = ppvae.fit(
            model, fitted, train, loss=objective, steps=steps, batch_size=250, lr=lr, progress=False
        )
        assert fit.completed
    log_q = guide.family.log_probs(guide.params(test))[:, 0]
    gap = (model.log_evidence(test) - exact_elbo(model, test, log_q)).detach()
    assert float(gap.min()) > -1e-4  # A KL divergence.
    assert 0 < float(gap.mean()) < 0.02
    assert float((model.log_evidence(test) - before).mean()) > 0.2


def test_the_per_row_optimum_by_svi_with_enumeration_is_the_posterior():
    """Free logits for each row, trained by TraceEnum_ELBO: no gap is left."""
    model = given().double()
    x = rows(model, 30)
    guide = PerDatapoint(Categorical(3), 30).double()
    with private_store():
        svi = SVI(
            model,
            config_enumerate(guide),
            pyro.optim.Adam({"lr": 0.3}),
            TraceEnum_ELBO(max_plate_nesting=1),
        )
        for _ in range(150):
            svi.step(x)
    log_q = guide.families["z"].log_probs(guide.params(x)["z"])[:, 0].detach()
    gap = model.log_evidence(x) - exact_elbo(model, x, log_q)
    assert float(gap.min()) > -1e-10
    assert float(gap.max()) < 0.02


def test_the_engines_per_row_optimum_is_the_posterior():
    model = given().double()
    x = rows(model, 30)
    fit = ppvae.fit_per_datapoint(model, Categorical(3), x)
    log_q = fit.guide.families["z"].log_probs(fit.guide.params(x)["z"])[:, 0].detach()
    torch.testing.assert_close(log_q, model.posterior(x).logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(exact_elbo(model, x, log_q), model.log_evidence(x))


def test_compare_puts_the_whole_gap_on_amortization():
    model = given()
    x = rows(model, 40)
    with forked_rng(0):
        _, guide = pairs.gaussian_mixture(2, 3)
    comparison = ppvae.compare(model, guide, x)
    assert comparison.dataset.attrs["evidence_kind"] == "exact"
    log_q = guide.family.log_probs(guide.params(x).detach())[:, 0]
    gap = float((model.log_evidence(x) - exact_elbo(model, x, log_q)).mean())
    value, stderr = comparison.mean("amortization_gap")
    assert abs(value - gap) < 5 * stderr
    assert abs(comparison.mean("approximation_gap")[0]) < 1e-4
    assert gap > 1


# The gradient.


def gradients(model, x, loss, guide, wrap):
    with private_store(), forked_rng(0):
        loss.loss_and_grads(model, wrap(guide), x)
    return -guide.table("z").weight.grad


def test_the_score_function_gradient_is_unbiased():
    """Of 8000 copies of a row each has a draw of its own: their mean is the exact gradient."""
    model, copies = given().double(), 8000
    x = rows(model, 2)
    logits = torch.tensor([[0.5, -0.3, 0.1], [0.0, 1.0, -0.5]], dtype=torch.float64)
    free = logits.clone().requires_grad_()
    exact_elbo(model, x, free.log_softmax(-1)).sum().backward()

    def table(repeats):
        guide = PerDatapoint(Categorical(3), 2 * repeats).double()
        with torch.no_grad():
            guide.table("z").weight.copy_(logits.repeat_interleave(repeats, 0))
        return guide

    enumerated = gradients(
        model, x, TraceEnum_ELBO(max_plate_nesting=1), table(1), config_enumerate
    )
    torch.testing.assert_close(enumerated, free.grad)
    many = x.repeat_interleave(copies, 0)
    drawn = gradients(model, many, TraceGraph_ELBO(), table(copies), lambda guide: guide)
    drawn = drawn.reshape(2, copies, 3)
    error = drawn.std(dim=1) / copies**0.5
    assert float(error.max()) < 0.1  # Sharp enough to see a bias.
    assert float(((drawn.mean(dim=1) - free.grad).abs() / error).max()) < 5


@kinds
def test_at_the_posterior_the_models_gradient_is_that_of_its_evidence(full_covariance):
    """Fisher's identity, with the sum over components that TraceEnum_ELBO takes."""
    with forked_rng(0):
        model = GaussianMixture(2, 3, full_covariance=full_covariance).double()
    x = torch.randn(20, 2).double()
    model.log_evidence(x).sum().backward()
    exact = [p.grad.clone() for p in model.parameters()]
    guide = PerDatapoint(Categorical(3), 20).double()
    with torch.no_grad():
        guide.table("z").weight.copy_(model.posterior(x).logits)
    model.zero_grad()
    with private_store():
        TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(model, config_enumerate(guide), x)
    for parameter, gradient in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(-parameter.grad, gradient)
        assert float(gradient.abs().max()) > 0.1


def test_the_mixture_is_symmetric_in_the_order_of_its_components():
    """Relabelling the components permutes the posterior and leaves the evidence."""
    x = rows(given(), 5)
    for order in itertools.permutations(range(3)):
        index = list(order)
        other = GaussianMixture(2, 3, weights=WEIGHTS[index], loc=LOC[index], scale=SCALE[index])
        torch.testing.assert_close(other.log_evidence(x), given().log_evidence(x))
        torch.testing.assert_close(other.posterior(x).probs, given().posterior(x).probs[:, index])
