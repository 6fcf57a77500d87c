"""Discrete latents: exact sums, coordinate ascent, and families that hang on a category."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import sigmas
from pyro.infer import TraceGraph_ELBO

import ppvae
from ppvae import coordinate
from ppvae.density import judging, read_model
from ppvae.evidence import enumeration, mixture_evidence
from ppvae.families import (
    Bernoulli,
    BlockNormal,
    Categorical,
    DiagonalNormal,
    FullRankNormal,
    Gamma,
    Given,
    same_family,
)
from ppvae.fisher import LocalElbo
from ppvae.guides import Amortized, PerDatapoint, per_datapoint
from ppvae.models import FactorAnalysis
from ppvae.nn import MLP


def binary_factors(weights, prior=0.3):
    """Binary causes with normal noise: explaining away makes the posterior dependent."""

    def model(x):
        w = weights.to(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((len(w),), prior)).to_event(1))
            pyro.sample("x", dist.Normal(z.to(x) @ w, 1.0).to_event(1), obs=x)

    return model


def exact_table(weights, x, prior=0.3):
    """All binary vectors ``(2^d, d)`` and log p(x, z) ``(2^d, batch)``, by hand."""
    d = len(weights)
    z = torch.tensor([[(c >> i) & 1 for i in range(d)] for c in range(2**d)]).to(x)
    log_prior = (z * math.log(prior) + (1 - z) * math.log(1 - prior)).sum(-1)
    squared = (x[None] - (z @ weights.to(x))[:, None]).square().sum(-1)
    return z, log_prior[:, None] - 0.5 * squared - 0.5 * x.shape[1] * math.log(2 * math.pi)


def best_mean_field(weights, x, starts=12):
    """The best mean-field ELBO of each row by L-BFGS on the exact ELBO from many starts."""
    z, log_p = exact_table(weights, x)
    log_p = log_p.repeat(1, starts)
    logits = 2.0 * torch.randn(starts, len(x), len(weights)).to(x)
    logits[0] = 0.0
    logits = logits.flatten(0, 1).requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = -exact_elbo(Bernoulli(len(weights)), logits, z, log_p).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    reached = exact_elbo(Bernoulli(len(weights)), logits.detach(), z, log_p)
    return reached.reshape(starts, len(x)).amax(dim=0)


@pytest.fixture
def causes(device):
    weights = 1.2 * torch.randn(4, 5, dtype=torch.float64, device=device)
    z = torch.bernoulli(torch.full((12, 4), 0.3, dtype=torch.float64, device=device))
    return weights, z @ weights + torch.randn(12, 5).to(weights)


def exact_elbo(family, params, z, log_p):
    log_q = family.distribution(params).log_prob(z[:, None])
    return (log_q.exp() * (log_p - log_q)).sum(0)


def test_enumeration_is_the_sum_over_all_values(causes):
    weights, x = causes
    _, log_p = exact_table(weights, x)
    estimate = enumeration(binary_factors(weights), x)
    torch.testing.assert_close(estimate.value, log_p.logsumexp(0))
    assert (estimate.bound, estimate.method) == ("exact", "enumeration")


def test_enumeration_takes_several_sites_and_categories(device):
    means = torch.randn(3, 2, dtype=torch.float64, device=device)
    x = torch.randn(6, dtype=torch.float64, device=device)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(means.new_tensor([0.2, 0.3, 0.5])))
            b = pyro.sample("b", dist.Bernoulli(means.new_tensor(0.4)))
            pyro.sample("x", dist.Normal(means[a.long(), b.long()], 1.0), obs=x)

    by_hand = torch.stack(
        [
            dist.Normal(means[a, b], 1.0).log_prob(x) + math.log(p_a * p_b)
            for a, p_a in enumerate((0.2, 0.3, 0.5))
            for b, p_b in enumerate((0.6, 0.4))
        ]
    )
    torch.testing.assert_close(enumeration(model, x).value, by_hand.logsumexp(0))


def test_enumeration_refuses_what_it_cannot_sum():
    x = torch.zeros(2, 20)
    with pytest.raises(ValueError, match=r"16384 values.*1\.05e\+06.*'z'.*ppvae.iwae"):
        enumeration(binary_factors(torch.zeros(20, 20)), x)
    with pytest.raises(ValueError, match=r"'z' \(Normal\) has infinitely many values"):
        enumeration(FactorAnalysis(20, 2), x)

    def counts(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(torch.tensor(2.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="'z'.*Poisson.*infinitely many"):
        enumeration(counts, torch.zeros(3))


def test_listed_coordinate_ascent_finds_the_best_mean_field(causes):
    weights, x = causes
    fit = ppvae.fit_per_datapoint(binary_factors(weights), Bernoulli(4), x)
    z, log_p = exact_table(weights, x)
    reached = exact_elbo(Bernoulli(4), fit.guide.params(x)["z"].detach(), z, log_p)
    assert bool(fit.converged.all())
    # No worse than the best of twenty starts of another method, in any row.
    assert float((best_mean_field(weights, x) - reached).max()) < 1e-5
    # The reported ELBO is an estimate of that exact figure.
    assert sigmas(fit.elbo, reached, fit.elbo_stderr + 1e-12) < 5


def test_a_factorising_posterior_leaves_no_gap(device):
    weights = 2 * torch.eye(3, 5, dtype=torch.float64, device=device)
    x = torch.randn(6, 5, dtype=torch.float64, device=device)
    model = binary_factors(weights)
    fit = ppvae.fit_per_datapoint(model, Bernoulli(3), x)
    torch.testing.assert_close(fit.elbo, enumeration(model, x).value, rtol=0, atol=1e-8)
    # With the exact posterior as guide all log weights are log p(x).
    weights = ppvae.log_weights(model, fit.guide, x, 50)
    assert float(weights.std(dim=0).max()) < 1e-6


def test_sampled_coordinate_ascent_meets_the_listed_one(causes, monkeypatch):
    weights, x = causes
    model = binary_factors(weights)
    listed = ppvae.fit_per_datapoint(model, Bernoulli(4), x)
    monkeypatch.setattr(coordinate, "MOST_IN_TABLE", 1)
    sampled = ppvae.fit_per_datapoint(model, Bernoulli(4), x, init=listed.guide)
    z, log_p = exact_table(weights, x)
    gaps = exact_elbo(Bernoulli(4), listed.guide.params(x)["z"].detach(), z, log_p) - exact_elbo(
        Bernoulli(4), sampled.guide.params(x)["z"].detach(), z, log_p
    )
    # From the optimum it stays there, up to the noise that it reports itself.
    assert float(gaps.max()) < 0.02
    cold = ppvae.fit_per_datapoint(model, Bernoulli(4), x)
    found = exact_elbo(Bernoulli(4), cold.guide.params(x)["z"].detach(), z, log_p)
    # A single cold start may end at another optimum in some rows; in most it does not.
    short = exact_elbo(Bernoulli(4), listed.guide.params(x)["z"].detach(), z, log_p) - found
    assert float(short.median()) < 0.01
    assert int((short < 0.05).sum()) >= 9


def test_wide_binary_latents_are_sampled(device):
    """Thirty units cannot be listed; where they do not interact the optimum is known."""
    weights = 1.5 * torch.eye(30, dtype=torch.float64, device=device)
    x = torch.randn(3, 30, dtype=torch.float64, device=device)
    model = binary_factors(weights)
    fit = ppvae.fit_per_datapoint(model, Bernoulli(30), x)
    exact = torch.stack(
        [
            math.log(0.7) + dist.Normal(0.0, 1.0).log_prob(x),
            math.log(0.3) + dist.Normal(1.5, 1.0).log_prob(x),
        ]
    ).logsumexp(0)
    assert float((exact.sum(-1) - fit.elbo).abs().max()) < 0.02
    assert bool(fit.converged.all())
    evidence = mixture_evidence(model, [fit.guide], x, 500)
    assert sigmas(evidence.value, exact.sum(-1), evidence.stderr + 1e-3) < 5


def test_compare_decomposes_a_discrete_pair(causes):
    weights, x = causes
    model = binary_factors(weights)
    guide = Amortized(Bernoulli(4), MLP(5, [], 4)).to(x)
    comparison = ppvae.compare(model, guide, x)
    ds = comparison.dataset
    z, log_p = exact_table(weights, x)
    with torch.no_grad():
        amortized = exact_elbo(Bernoulli(4), guide.params(x), z, log_p)
    best = best_mean_field(weights, x)
    assert ds.attrs["evidence_kind"] == "enumeration"
    for gap, exact in (
        ("approximation_gap", log_p.logsumexp(0) - best),
        ("amortization_gap", best - amortized),
    ):
        error = torch.as_tensor(ds[f"{gap}_stderr"].values)
        off = (torch.as_tensor(ds[gap].values) - exact.cpu()).abs()
        assert float((off / (error + 1e-6)).max()) < 5
    assert "sum over all values" in str(comparison)


def test_refine_sweeps_over_discrete_latents(causes):
    weights, x = causes
    model = binary_factors(weights)
    guide = Amortized(Bernoulli(4), MLP(5, [], 4)).to(x)
    refined = ppvae.refine(model, guide, x)
    assert refined.count("given up") == 0
    z, log_p = exact_table(weights, x)
    before, after = (
        exact_elbo(Bernoulli(4), params.detach(), z, log_p)
        for params in (guide.params(x), refined.guide.params(x)["z"])
    )
    torch.testing.assert_close(refined.gain, after - before, rtol=1e-6, atol=1e-6)
    # Nothing is left that a change of one element would bring.
    elements = coordinate.Elements({"z": Bernoulli(4)})
    with judging(0, x), torch.no_grad():
        table = coordinate.joint_table(model, x, read_model(model, x))
    left, _ = coordinate.Enumerated(elements, table).promise(
        elements.log_probs(refined.guide.params(x)["z"].detach())
    )
    assert float(left.max()) < 0.01
    many, wide = binary_factors(torch.zeros(20, 20)), Amortized(Bernoulli(20), MLP(20, [], 20))
    with pytest.raises(ValueError, match=r"1\.05e\+06 values.*fit_per_datapoint"):
        ppvae.refine(many, wide, torch.zeros(2, 20))


def test_several_guides_of_many_units_share_a_ledger(device):
    """Nine units have 512 values: listed for q*, and for what a refinement measures."""
    weights = torch.randn(9, 5, dtype=torch.float64, device=device)
    x = torch.randn(4, 5, dtype=torch.float64, device=device)
    model = binary_factors(weights)
    guides = {name: Amortized(Bernoulli(9), MLP(5, [], 9)).to(x) for name in ("one", "other")}
    comparison = ppvae.compare(model, guides, x)
    gaps = comparison.dataset["amortization_gap"].sel(guide=["one", "other"])
    stderr = comparison.dataset["amortization_gap_stderr"].sel(guide=["one", "other"])
    z, log_p = exact_table(weights, x)
    with torch.no_grad():
        own = [exact_elbo(Bernoulli(9), g.params(x), z, log_p) for g in guides.values()]
    exact = best_mean_field(weights, x) - torch.stack(own)
    off = (torch.as_tensor(gaps.transpose("guide", "data").values).to(x) - exact).abs()
    error = torch.as_tensor(stderr.transpose("guide", "data").values).to(x)
    assert float((off / (error + 1e-6)).max()) < 5
    refined = ppvae.refine(model, guides["one"], x)
    after = exact_elbo(Bernoulli(9), refined.guide.params(x)["z"].detach(), z, log_p)
    torch.testing.assert_close(refined.gain, after - own[0], rtol=1e-6, atol=1e-6)


def test_an_encoder_of_binary_latents_trains_by_score_function(causes):
    weights, _ = causes
    weights = weights.float()
    z = torch.bernoulli(torch.full((400, 4), 0.3)).to(weights)
    x = z @ weights + torch.randn(400, 5).to(weights)
    model = binary_factors(weights)
    guide = Amortized(Bernoulli(4), MLP(5, [16], 4)).to(x)
    before = ppvae.elbo(model, guide, x)
    ppvae.fit(model, guide, x, loss=TraceGraph_ELBO(), steps=300, lr=0.02, progress=False)
    after = ppvae.elbo(model, guide, x)
    assert after.mean > before.mean + 5 * math.hypot(before.mean_stderr, after.mean_stderr)


# --- a category, and what hangs on it ---------------------------------------------------------

PRIOR = (0.2, 0.3, 0.5)


def mixture_of_factors(means, loadings, *, z_first=False):
    """y picks a mean, z spreads around it: given y the posterior of z is normal."""

    def model(x):
        m, w = means.to(x), loadings.to(x)
        with pyro.plate("data", len(x)):
            if z_first:
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            y = pyro.sample("y", dist.Categorical(x.new_tensor(PRIOR)))
            if not z_first:
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(m[y.long()] + z @ w, 1.0).to_event(1), obs=x)

    return model


def joint_with_class(means, loadings, x):
    """log p(x, y), ``(batch, classes)``."""
    covariance = torch.eye(x.shape[1]).to(x) + loadings.mT @ loadings
    return torch.stack(
        [
            dist.MultivariateNormal(m, covariance).log_prob(x) + math.log(p)
            for m, p in zip(means, PRIOR, strict=True)
        ],
        dim=-1,
    )


@pytest.fixture
def classes(device):
    means = 1.5 * torch.randn(3, 4, dtype=torch.float64, device=device)
    loadings = torch.randn(2, 4, dtype=torch.float64, device=device)
    return means, loadings, torch.randn(8, 4, dtype=torch.float64, device=device)


@pytest.mark.parametrize("z_first", [False, True])
def test_a_normal_for_each_category_holds_the_posterior(classes, z_first):
    means, loadings, x = classes
    model = mixture_of_factors(means, loadings, z_first=z_first)
    family = {"y": Categorical(3), "z": Given("y", 3, FullRankNormal(2))}
    fit = ppvae.fit_per_datapoint(model, family, x)
    exact = joint_with_class(means, loadings, x)
    assert bool(fit.converged.all())
    torch.testing.assert_close(fit.elbo, exact.logsumexp(-1), rtol=0, atol=1e-6)
    log_q = Categorical(3).log_probs(fit.guide.params(x)["y"])[:, 0]
    torch.testing.assert_close(log_q, exact.log_softmax(-1), rtol=0, atol=1e-4)
    assert float(ppvae.log_weights(model, fit.guide, x, 64).std(dim=0).max()) < 1e-3
    evidence = mixture_evidence(model, [fit.guide, fit.guide], x, 64)
    torch.testing.assert_close(evidence.value, exact.logsumexp(-1), rtol=0, atol=1e-3)


def test_a_diagonal_normal_for_each_category_has_its_closed_form(classes):
    """Given y the mean-field gap is ½ (Σ log Λ_dd − log |Λ|), the same for all y."""
    means, loadings, x = classes
    model = mixture_of_factors(means, loadings)
    family = {"y": Categorical(3), "z": Given("y", 3, DiagonalNormal(2))}
    fit = ppvae.fit_per_datapoint(model, family, x)
    precision = torch.eye(2).to(x) + loadings @ loadings.mT
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    exact = joint_with_class(means, loadings, x).logsumexp(-1) - gap
    assert sigmas(fit.elbo, exact, fit.elbo_stderr) < 5


def test_independent_category_and_normal_take_the_best_category(classes):
    """Mean field of y and z: with one category far ahead its optimum is that of that category."""
    means, loadings, x = classes
    means = 4 * means
    x = (x + means[torch.arange(8, device=x.device) % 3])[:5]
    model = mixture_of_factors(means, loadings)
    family = {"y": Categorical(3), "z": FullRankNormal(2)}
    fit = ppvae.fit_per_datapoint(model, family, x)
    joint = joint_with_class(means, loadings, x)
    ahead = (joint.topk(2).values[:, 0] - joint.topk(2).values[:, 1]) > 12
    assert int(ahead.sum()) >= 2
    off = (joint.amax(-1) - fit.elbo)[ahead]
    assert float(off.abs().max()) < 0.02


def test_compare_frees_a_guide_whose_normal_hangs_on_a_category(classes):
    means, loadings, x = classes
    model = mixture_of_factors(means, loadings)
    families = {"y": Categorical(3), "z": Given("y", 3, FullRankNormal(2))}
    count = sum(f.num_params for f in families.values())
    guide = Amortized(families, MLP(4, [8], count)).to(x)
    comparison = ppvae.compare(model, guide, x)
    ds = comparison.dataset
    log_p = joint_with_class(means, loadings, x).logsumexp(-1).cpu()
    evidence = torch.as_tensor(ds["log_evidence"].values)
    stderr = torch.as_tensor(ds["log_evidence_stderr"].values)
    # q* is the posterior, so that half of the mixture's draws have log weights near log p(x).
    assert sigmas(evidence, log_p, stderr + 1e-6) < 5
    gap = torch.as_tensor(ds["approximation_gap"].values)
    assert sigmas(gap, 0 * gap, torch.as_tensor(ds["approximation_gap_stderr"].values) + 1e-6) < 5
    elbo = ppvae.elbo(model, guide, x, 4000, seed=5)
    amortized = log_p - elbo.value.cpu()
    error = torch.hypot(
        elbo.stderr.cpu(), torch.as_tensor(ds["amortization_gap_stderr"].values).to(x.cpu())
    )
    assert sigmas(torch.as_tensor(ds["amortization_gap"].values), amortized, error) < 5


def test_the_summed_gradient_is_that_of_enumeration(causes):
    weights, x = causes
    elbo = LocalElbo(binary_factors(weights), {"z": Bernoulli(4)}, 4)
    params = torch.randn(len(x), 4).to(x).requires_grad_(True)
    z, log_p = exact_table(weights, x)
    (exact,) = torch.autograd.grad(exact_elbo(Bernoulli(4), params, z, log_p).sum(), params)
    torch.testing.assert_close(elbo.gradients(x, params.detach()).mean(0), exact)


def test_mixed_gradients_are_unbiased(classes):
    """One normal for all categories: the sum over y is exact, z is drawn."""
    means, loadings, x = classes
    x = x[:2]
    model = mixture_of_factors(means, loadings)
    family = {"y": Categorical(3), "z": DiagonalNormal(2)}
    elbo = LocalElbo(model, family, 64)
    params = torch.randn(2, 7).to(x)
    gradients = elbo.gradients(x, params, 4000)
    # The exact ELBO: E_q(z) of a quadratic form, in closed form for each y.
    free = params.clone().requires_grad_(True)
    logits, loc, log_scale = free.split([3, 2, 2], dim=-1)
    log_q = logits.log_softmax(-1)
    residual = x[:, None] - means - (loc @ loadings)[:, None]
    spread = (log_scale.exp().square() * loadings.square().sum(-1)).sum(-1, keepdim=True)
    log_lik = -0.5 * (residual.square().sum(-1) + spread) - 2 * math.log(2 * math.pi)
    prior = -0.5 * (loc.square() + log_scale.exp().square()).sum(-1) - math.log(2 * math.pi)
    entropy = (log_scale + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
    log_prior = torch.log(x.new_tensor(PRIOR))
    value = (log_q.exp() * (log_prior + log_lik - log_q)).sum(-1) + prior + entropy
    (exact,) = torch.autograd.grad(value.sum(), free)
    error = gradients.std(0) / math.sqrt(len(gradients))
    assert sigmas(gradients.mean(0), exact, error + 1e-9) < 5
    assert (
        sigmas(
            elbo.log_weights(x, params, 4000).mean(0), value.detach(), 0.2 * value.detach().abs()
        )
        < 1
    )


# --- the families themselves --------------------------------------------------------------------


@pytest.mark.parametrize("family", [Bernoulli(3), Bernoulli(), Categorical(4), Categorical(3, 2)])
def test_log_probabilities_are_those_of_the_distribution(family):
    params = torch.randn(5, family.num_params).double()
    log_probs = family.log_probs(params)
    assert log_probs.shape == (5, family.size, family.num_classes)
    torch.testing.assert_close(log_probs.logsumexp(-1), torch.zeros(5, family.size).double())
    classes = torch.randint(family.num_classes, (5, family.size))
    by_hand = log_probs.gather(-1, classes[..., None]).sum((-1, -2))
    member = family.distribution(params)
    torch.testing.assert_close(member.log_prob(family.values(classes).to(params)), by_hand)
    again = family.distribution(family.from_log_probs(log_probs))
    torch.testing.assert_close(again.log_prob(family.values(classes).to(params)), by_hand)
    torch.testing.assert_close(
        family.distribution(family.params_of(member)).log_prob(family.values(classes).to(params)),
        by_hand,
    )


def test_discrete_guides_of_others_are_freed():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Categorical(logits=torch.stack([x, -x, 0 * x], -1)))
            pyro.sample("b", dist.Bernoulli(torch.sigmoid(x)))

    x = torch.randn(4)
    freed = per_datapoint(guide, x)
    assert repr(freed.families["a"]) == "Categorical(3)"
    assert repr(freed.families["b"]) == "Bernoulli()"
    torch.testing.assert_close(freed.params(x)["b"][:, 0], x, rtol=1e-4, atol=1e-5)


def test_given_follows_its_category_through_draws_and_enumeration():
    family = Given("y", 3, DiagonalNormal(2))
    params = torch.randn(5, family.num_params)
    own = family.by_class(params)
    y = torch.tensor([0, 2, 1, 0, 2])
    member = family.member(params, {"y": y})
    torch.testing.assert_close(member.mean, own[torch.arange(5), y, :2])
    drawn = torch.randint(3, (7, 5))
    member = family.member(params, {"y": drawn})
    torch.testing.assert_close(member.mean[3], own[torch.arange(5), drawn[3], :2])
    everything = family.member(params, {"y": torch.arange(3)[:, None]})
    assert everything.batch_shape == (3, 5)
    torch.testing.assert_close(everything.mean, own[..., :2].transpose(0, 1))


def test_given_says_what_it_lacks():
    family = Given("y", 3, DiagonalNormal(2))
    with pytest.raises(ValueError, match="site 'y' has no value yet"):
        family.member(torch.zeros(2, 12), {"z": torch.zeros(2)})
    with pytest.raises(ValueError, match="beside a value of site 'y'"):
        family.distribution(torch.zeros(2, 12))
    with pytest.raises(ValueError, match="base: expected a family over continuous"):
        Given("y", 3, Bernoulli(2))
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        Given("y", 1, DiagonalNormal(2))
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        Categorical(1)
    assert not same_family(family, Given("y", 3, Gamma(2)))


def test_a_family_with_another_number_of_categories_is_refused(classes):
    means, loadings, x = classes
    family = {"y": Categorical(4), "z": FullRankNormal(2)}
    with pytest.raises(ValueError, match=r"'y': Categorical\(4\).*support.*Categorical"):
        ppvae.fit_per_datapoint(mixture_of_factors(means, loadings), family, x)


# --- blocks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [[(0, 2), (1, 3)], [(0, 1, 3), (2,)], [(3, 0), (1,), (2,)]])
def test_blocks_leave_the_closed_form_gap(blocks, device):
    """The best member has the posterior's mean, and its precision inside of the blocks."""
    model = FactorAnalysis(6, 4).double().to(device)
    x = torch.randn(5, 6, dtype=torch.float64, device=device)
    comparison = ppvae.compare(
        model,
        PerDatapoint(DiagonalNormal(4), 5).to(x),
        x,
        families=[BlockNormal(4, blocks)],
    )
    precision = model.posterior(x).precision_matrix[0].detach()
    inside = sum(torch.logdet(precision[list(b)][:, list(b)]) for b in blocks)
    gap = 0.5 * float(inside - torch.logdet(precision))
    name = f"per_datapoint {BlockNormal(4, blocks)!r}"
    ds = comparison.dataset.sel(guide=name)
    off = abs(ds["approximation_gap"].values - gap)
    assert float((off / (ds["approximation_gap_stderr"].values + 1e-9)).max()) < 5


def test_blocks_are_a_partition():
    for blocks in ([(0, 1)], [(0, 1), (1, 2)], [(0, 1), (2,), ()], [(0, 3), (1, 2)]):
        with pytest.raises(ValueError, match="blocks: expected a partition of the elements 0 to 2"):
            BlockNormal(3, blocks)


# --- hard cases -----------------------------------------------------------------------------------


class Constant(torch.nn.Module):
    """An encoder that says the same of every row."""

    def __init__(self, params):
        super().__init__()
        self.params = params

    def forward(self, x):
        return self.params.to(x).expand(len(x), -1)


def two_means(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(x.new_tensor([0.5, 0.5])))
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal((2 * y - 1) * 1.5 + 0.1 * z.sum(-1), 0.5), obs=x)


@pytest.mark.parametrize("odds", [1.5, 8.0])
def test_refine_sees_what_the_other_category_has_to_offer(odds, device):
    """A guide that is sure of the wrong category: its own gradient there says nothing is wrong."""
    families = {"y": Categorical(2), "z": Given("y", 2, FullRankNormal(2))}
    x = torch.full((3,), 1.5, dtype=torch.float64, device=device)
    params = torch.cat([torch.tensor([odds, -odds]), torch.zeros(10)])
    guide = Amortized(families, Constant(params))
    refined = ppvae.refine(two_means, guide, x)
    variance = 0.5**2 + 2 * 0.1**2
    exact = torch.stack(
        [dist.Normal(m, variance**0.5).log_prob(x) + math.log(0.5) for m in (-1.5, 1.5)]
    ).logsumexp(0)
    after = ppvae.elbo(two_means, refined.guide, x)
    assert refined.count("refined") == 3
    # The tolerance of `refine` is .01 nats.
    assert float((exact - after.value - 5 * after.stderr).max()) < 0.01
    before = ppvae.elbo(two_means, guide, x, 20_000)
    assert sigmas(refined.predicted_gap, exact - before.value, before.stderr + 0.05) < 5


def test_a_gamma_for_each_category_is_fitted_category_by_category(device):
    """|x| given z is nearly z, so the sign of x decides y; the classes' own fits add up."""

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(x.new_tensor([0.5, 0.5])))
            z = pyro.sample("z", dist.Gamma(x.new_tensor(3.0), 1.0))
            pyro.sample("x", dist.Normal((2 * y - 1) * z, 0.3), obs=x)

    x = torch.tensor([3.0, -3.0, 1.0, 6.0], dtype=torch.float64, device=device)
    fit = ppvae.fit_per_datapoint(model, {"y": Categorical(2), "z": Given("y", 2, Gamma())}, x)
    parts = []
    for sign in (-1.0, 1.0):

        def held(x, sign=sign):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Gamma(x.new_tensor(3.0), 1.0))
                pyro.sample("x", dist.Normal(sign * z, 0.3), obs=x)

        parts.append(ppvae.fit_per_datapoint(held, Gamma(), x).elbo + math.log(0.5))
    joined = torch.stack(parts).logsumexp(0)
    assert float((joined - fit.elbo).abs().max()) < 0.02
    assert bool(fit.converged.all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_values_are_left_out(dtype, device):
    """At most one unit on: the best member holds two of the five values, whichever is best."""
    steps = 0.3 * torch.arange(1.0, 5.0, dtype=dtype, device=device)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((4,), 0.5)).to_event(1))
            pyro.factor("only", torch.where(z.sum(-1) <= 1, 0.0, -torch.inf))
            pyro.sample("x", dist.Normal(z.to(x) @ steps, 1.0), obs=x)

    x = torch.tensor([0.1, 0.5, 1.0], dtype=dtype, device=device)
    fit = ppvae.fit_per_datapoint(model, Bernoulli(4), x)
    zero = dist.Normal(0.0, 1.0).log_prob(x)
    ones = torch.stack([dist.Normal(s, 1.0).log_prob(x) for s in steps])
    best = torch.logaddexp(zero, ones.amax(0)) + 4 * math.log(0.5)
    assert sigmas(fit.elbo, best, fit.elbo_stderr + 1e-4) < 5
    refined = ppvae.refine(model, fit.guide, x)
    assert refined.count("accepted") == 3


def test_several_discrete_sites_beside_a_normal_take_their_best_values(device):
    """Values so far apart that each row is of one of them; then nothing is left to mean field."""

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(x.new_ones(3) / 3))
            w = pyro.sample("w", dist.Bernoulli(x.new_tensor(0.5)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(20 * y + 9 * w + 0.5 * z, 0.3), obs=x)

    x = torch.tensor([0.1, 20.2, 49.1, 28.5], dtype=torch.float64, device=device)
    families = {"y": Categorical(3), "w": Bernoulli(), "z": DiagonalNormal()}
    fit = ppvae.fit_per_datapoint(model, families, x)
    centres = torch.tensor([0.0, 20.0, 49.0, 29.0]).to(x)
    exact = dist.Normal(centres, math.hypot(0.5, 0.3)).log_prob(x) - math.log(6)
    assert float((exact - fit.elbo).abs().max()) < 0.01


def test_a_network_may_join_a_category_to_a_normal(device):
    net = torch.nn.Linear(4, 3).to(device)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(x.new_ones(2) / 2))
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            code = torch.cat([torch.nn.functional.one_hot(y.long(), 2).to(x), z], dim=-1)
            pyro.sample("x", dist.Normal(net(code), 1.0).to_event(1), obs=x)

    x = torch.randn(4, 3, device=device)
    w, m = net.weight.detach()[:, 2:], net.weight.detach()[:, :2].mT + net.bias.detach()
    covariance = torch.eye(3).to(x) + w @ w.mT
    exact = torch.stack([dist.MultivariateNormal(k, covariance).log_prob(x) for k in m])
    family = {"y": Categorical(2), "z": Given("y", 2, FullRankNormal(2))}
    fit = ppvae.fit_per_datapoint(model, family, x)
    torch.testing.assert_close(fit.elbo, exact.logsumexp(0) - math.log(2), rtol=0, atol=1e-3)


def test_given_hangs_on_a_category_of_its_size(classes):
    means, loadings, x = classes
    model = mixture_of_factors(means, loadings)
    for families in (
        {"y": Categorical(3), "z": Given("y", 2, DiagonalNormal(2))},
        {"y": Categorical(3), "z": Given("w", 3, DiagonalNormal(2))},
    ):
        with pytest.raises(ValueError, match=r"'z': Given.*must have a Categorical family"):
            ppvae.fit_per_datapoint(model, families, x)
        with pytest.raises(ValueError, match=r"'z': Given.*must have a Categorical family"):
            Amortized(families, MLP(4, [], 11))
    with pytest.raises(ValueError, match="a Given stands after the site"):
        Amortized({"z": Given("y", 3, DiagonalNormal(2)), "y": Categorical(3)}, MLP(4, [], 15))


def test_a_row_that_is_impossible_has_not_converged():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1))
            pyro.factor("f", torch.where(x > 0, 0.0, -torch.inf))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    fit = ppvae.fit_per_datapoint(model, Bernoulli(2), torch.tensor([1.0, -1.0]))
    assert fit.converged.tolist() == [True, False]
