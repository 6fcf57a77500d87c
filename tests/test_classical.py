"""EM, coordinate ascent and SVI against closed forms, in float64: three roads to one figure."""

import math

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from scipy import stats

import ppvae
from ppvae import pairs
from ppvae.classical import coordinate_ascent, em
from ppvae.families import DiagonalNormal, FullRankNormal
from ppvae.isolation import forked_rng, private_store
from ppvae.models import PPCA, ExponentialGaussian, FactorAnalysis

both = pytest.mark.parametrize("kind", [PPCA, FactorAnalysis])


def rows(size=300, x_dim=6, z_dim=2, seed=0):
    """Rows of a factor analysis with scales that differ, away from zero."""
    with forked_rng(seed), private_store(), torch.no_grad():
        noise = torch.linspace(0.4, 0.9, x_dim).double()
        model = FactorAnalysis(x_dim, z_dim, noise=noise).double()
        model.loc.copy_(torch.randn(x_dim))
        return model(size=size)


def start(kind, z_dim, x_dim=6, seed=1):
    with forked_rng(seed):
        return kind(x_dim, z_dim).double()


def evidence(model, x):
    return float(model.log_evidence(x).detach().mean())


def saturated(x):
    """The evidence per datum of the Gaussian whose covariance is the sample's: the ceiling."""
    covariance = torch.cov(x.mT, correction=0)
    return -0.5 * (x.shape[1] * (1 + math.log(2 * math.pi)) + float(torch.logdet(covariance)))


def best_mean_field(model, x):
    """The closed form: exact mean, variances 1 / diag(precision), KL = ½ log ∏Λ_dd / |Λ|."""
    precision = model.posterior(x).precision_matrix[0]
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    return (model.log_evidence(x) - gap).detach()


def elbo_by_kl(model, x, q):
    """log p(x) − KL(q ‖ p(z | x)), by torch's KL of two multivariate normals."""
    covariance = getattr(q, "covariance_matrix", q.variance.diag_embed())
    full = torch.distributions.MultivariateNormal(q.mean, covariance)
    return (
        model.log_evidence(x) - torch.distributions.kl_divergence(full, model.posterior(x))
    ).detach()


# The closed form.


def test_the_closed_forms_covariance_has_the_samples_leading_eigenvalues():
    x = rows()
    model = PPCA.maximum_likelihood(x, 2)
    ours = torch.linalg.eigvalsh(model.loadings @ model.loadings.mT + model.noise**2 * torch.eye(6))
    sample = torch.linalg.eigvalsh(torch.cov(x.mT, correction=0))
    torch.testing.assert_close(ours[-2:].detach(), sample[-2:])
    torch.testing.assert_close(ours[:4].detach(), sample[:4].mean().expand(4))
    # Tipping & Bishop's eq. 6 at the maximum: tr C⁻¹ S = D.
    volume = 2 * sample[-2:].log().sum() / 2 + 4 * sample[:4].mean().log()
    expected = -0.5 * (6 * math.log(2 * math.pi) + float(volume) + 6)
    assert abs(evidence(model, x) - expected) < 1e-10


def test_the_closed_form_is_a_maximum():
    """No gradient, and nothing better near by."""
    x = rows()
    model = PPCA.maximum_likelihood(x, 2)
    best = model.log_evidence(x).mean()
    best.backward()
    for parameter in model.parameters():
        assert float(parameter.grad.abs().max()) < 1e-10
        with torch.no_grad():
            kept = parameter.clone()
            for _ in range(20):
                parameter.copy_(kept + 0.05 * torch.randn_like(kept))
                assert evidence(model, x) <= float(best)
            parameter.copy_(kept)
    assert not any(p.requires_grad for p in model.requires_grad_(False).parameters())


def test_with_all_dimensions_but_one_the_closed_form_is_the_samples_gaussian():
    x = rows()
    assert abs(evidence(PPCA.maximum_likelihood(x, 5), x) - saturated(x)) < 1e-10


def test_the_closed_form_keeps_the_rows_dtype():
    model = PPCA.maximum_likelihood(rows().float(), 2)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# EM.


@both
def test_em_never_lowers_the_evidence(kind):
    x, model = rows(), start(kind, 2)
    before = evidence(model, x)
    fit = em(model, x, tolerance=1e-10)
    assert fit.converged
    assert fit.status == f"converged after {fit.steps} steps"
    assert len(fit.log_evidence) == fit.steps + 1
    assert float(fit.log_evidence.diff().min()) > -1e-12
    # What it reports is the model's own evidence, before and after.
    assert abs(float(fit.log_evidence[0]) - before) < 1e-10
    assert abs(float(fit.log_evidence[-1]) - evidence(model, x)) < 1e-10


@pytest.mark.parametrize("z_dim", [1, 2, 3])
def test_em_for_ppca_meets_the_closed_form(z_dim):
    x, model = rows(), start(PPCA, z_dim)
    fit = em(model, x, max_steps=20_000, tolerance=1e-7)
    best = PPCA.maximum_likelihood(x, z_dim)
    assert fit.converged
    assert abs(evidence(model, x) - evidence(best, x)) < 1e-6
    torch.testing.assert_close(
        (model.loadings @ model.loadings.mT).detach(),
        (best.loadings @ best.loadings.mT).detach(),
        atol=0.02,
        rtol=0,
    )


def test_em_starts_at_the_closed_form_and_stays():
    x = rows()
    model = PPCA.maximum_likelihood(x, 2)
    fit = em(model, x)
    assert fit.converged
    assert float((fit.log_evidence - fit.log_evidence[0]).abs().max()) < 1e-12


def test_em_for_factor_analysis_ends_where_the_likelihood_equations_hold():
    """diag(C) = diag(S) and no gradient: Rubin & Thayer's stationary point (Lawley & Maxwell)."""
    x, model = rows(), start(FactorAnalysis, 2)
    fit = em(model, x, max_steps=20_000, tolerance=1e-12)
    assert fit.converged
    covariance = model.loadings @ model.loadings.mT + (model.noise**2).diag()
    sample = torch.cov(x.mT, correction=0)
    torch.testing.assert_close(covariance.diagonal().detach(), sample.diagonal(), atol=1e-5, rtol=0)
    model.log_evidence(x).mean().backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-5
    # Between probabilistic PCA, which is a special case, and the Gaussian without structure.
    assert evidence(PPCA.maximum_likelihood(x, 2), x) < evidence(model, x) < saturated(x)


def test_em_agrees_with_scikit_learn():
    from sklearn.decomposition import FactorAnalysis as Theirs

    x, model = rows(), start(FactorAnalysis, 2)
    em(model, x, max_steps=20_000, tolerance=1e-10)
    theirs = Theirs(2, tol=1e-12, max_iter=20_000, svd_method="lapack").fit(x.numpy())
    assert abs(theirs.score(x.numpy()) - evidence(model, x)) < 1e-6


@pytest.mark.parametrize("held", ["loadings", "noise_unconstrained", "loc"])
@both
def test_em_leaves_alone_what_is_held_fixed(kind, held):
    """And finds the maximum over the rest: no gradient is left there."""
    x, model = rows(), start(kind, 2)
    getattr(model, held).requires_grad_(False)
    before = getattr(model, held).clone()
    fit = em(model, x, max_steps=50_000, tolerance=1e-12)
    assert float(fit.log_evidence.diff().min()) > -1e-12
    assert torch.equal(getattr(model, held), before)
    model.log_evidence(x).mean().backward()
    free = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(free) == 2
    assert max(float(g.abs().max()) for g in free) < 1e-4


def test_a_column_without_noise_is_a_heywood_case_and_is_named():
    x = rows()
    x[:, 4] = x[:, 1] + x[:, 3]  # Two factors take these over, without noise.
    x = x[:, [1, 3, 4]]
    model = start(FactorAnalysis, 2, x_dim=3)
    fit = em(model, x, max_steps=200_000, tolerance=1e-14)
    assert not fit.converged
    assert "goes to zero" in fit.status
    assert "column" in fit.status


# Coordinate ascent.


@both
def test_coordinate_ascent_meets_the_best_mean_field_row_by_row(kind):
    x, model = rows(), start(kind, 3)
    before = [p.clone() for p in model.parameters()]
    fit = coordinate_ascent(model, x, tolerance=1e-10)
    best = best_mean_field(model, x)
    assert fit.converged
    assert float((fit.row_elbo - best).abs().max()) < 1e-4
    assert float(fit.elbo.diff().min()) > -1e-12
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    # Mean exact, variances 1 / diag Λ.
    q, posterior = (
        fit.guide.families["z"].distribution(fit.guide.params(x)["z"]),
        model.posterior(x),
    )
    torch.testing.assert_close(q.mean.detach(), posterior.mean.detach(), atol=1e-4, rtol=0)
    exact = 1 / posterior.precision_matrix.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(q.variance.detach(), exact.detach())
    # The reported ELBO is that of the guide, by an independent formula.
    torch.testing.assert_close(fit.row_elbo, elbo_by_kl(model, x, q))


def test_the_first_sweep_starts_from_the_prior():
    """With z at its prior: log p(x) − KL(prior ‖ posterior)."""
    x, model = rows(), start(FactorAnalysis, 3)
    fit = coordinate_ascent(model, x, max_steps=1)
    prior = DiagonalNormal(3).distribution(torch.zeros(len(x), 6).double())
    assert abs(float(fit.elbo[0]) - float(elbo_by_kl(model, x, prior).mean())) < 1e-10
    assert not fit.converged
    assert fit.status == "not converged after 1 steps: raise max_steps"


def test_monte_carlo_agrees_with_the_guide_that_coordinate_ascent_returns():
    x, model = rows(size=20), start(FactorAnalysis, 3)
    fit = coordinate_ascent(model, x)
    estimate = ppvae.elbo(model, fit.guide, x, 4000)
    assert float(((estimate.value - fit.row_elbo).abs() / estimate.stderr).max()) < 5


def test_the_per_datapoint_engine_agrees_with_coordinate_ascent():
    x, model = rows(size=20), start(FactorAnalysis, 3)
    fit = coordinate_ascent(model, x, tolerance=1e-10)
    local = ppvae.fit_per_datapoint(model, DiagonalNormal(3), x)
    params = local.guide.params(x)["z"]
    engine = elbo_by_kl(model, x, DiagonalNormal(3).distribution(params))
    # The engine promises a thousandth of a nat.
    assert float((engine - fit.row_elbo).abs().max()) < 1e-3


@both
def test_variational_em_climbs_to_the_same_maximum_as_em(kind):
    """A rotation of W makes the posterior mean-field: the best ELBO is the best evidence."""
    x, model = rows(), start(kind, 2)
    fit = coordinate_ascent(model, x, learn_model=True, max_steps=50_000, tolerance=1e-6)
    exact = start(kind, 2)
    em(exact, x, max_steps=20_000, tolerance=1e-10)
    assert float(fit.elbo.diff().min()) > -1e-12
    assert abs(float(fit.elbo[-1]) - evidence(exact, x)) < 1e-4
    if kind is PPCA:
        assert abs(float(fit.elbo[-1]) - evidence(PPCA.maximum_likelihood(x, 2), x)) < 1e-4


@pytest.mark.parametrize("held", ["loadings", "noise_unconstrained", "loc"])
def test_variational_em_leaves_alone_what_is_held_fixed(held):
    x, model = rows(), start(FactorAnalysis, 2)
    getattr(model, held).requires_grad_(False)
    before = getattr(model, held).clone()
    fit = coordinate_ascent(model, x, learn_model=True, max_steps=200)
    assert float(fit.elbo.diff().min()) > -1e-12
    assert torch.equal(getattr(model, held), before)


# SVI, the third road.


STAGES = (
    (5e-2, 300, 2),
    (2e-2, 300, 4),
    (5e-3, 300, 8),
    (1e-3, 300, 16),
    (2e-4, 500, 32),
    (2e-4, 200, 64),
    (3e-5, 300, 64),
)


def svi(model, guide, x):
    """Learning rates lowered in stages, and more draws in the last, where noise is what is left."""
    for stage, (lr, steps, draws) in enumerate(STAGES):
        loss = TraceMeanField_ELBO(draws, vectorize_particles=True, max_plate_nesting=1)
        fit = ppvae.fit(
            model,
            guide,
            x,
            loss=loss,
            steps=steps,
            batch_size=len(x),
            lr=lr,
            seed=stage,
            progress=False,
        )
        assert fit.completed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ppca", "factor_analysis"])
def test_svi_learns_the_model_that_em_learns(kind):
    """The evidence of the model, and the ELBO of the full-rank guide beside it."""
    x = rows(size=100)
    with forked_rng(2):
        model, guide = getattr(pairs, kind)(6, 2, FullRankNormal(2))
        model, guide = model.double(), guide.double()
    svi(model, guide, x)
    if kind == "ppca":
        best = evidence(PPCA.maximum_likelihood(x, 2), x)
    else:
        best = float(
            em(start(FactorAnalysis, 2), x, max_steps=20_000, tolerance=1e-10).log_evidence[-1]
        )
    reached = elbo_by_kl(model, x, guide.family.distribution(guide.params(x)))
    assert 0 <= best - evidence(model, x) + 1e-9 < 1e-4
    assert best - float(reached.mean()) < 1e-4


@pytest.mark.slow
def test_svi_meets_the_best_mean_field():
    x = rows(size=100)
    with forked_rng(2):
        model, guide = pairs.factor_analysis(6, 3)
        model, guide = model.double().requires_grad_(False), guide.double()
    svi(model, guide, x)
    reached = elbo_by_kl(model, x, guide.family.distribution(guide.params(x)))
    best = best_mean_field(model, x)
    assert -1e-9 < float((best - reached).mean()) < 1e-4


# What is refused.


def test_unfit_arguments_are_refused():
    x = rows(size=20)
    for call in (em, coordinate_ascent):
        with pytest.raises(
            ValueError, match="expected FactorAnalysis or PPCA.*ExponentialGaussian"
        ):
            call(ExponentialGaussian(), x)
        with pytest.raises(ValueError, match=r"float64.*x in torch.float32.*x.double\(\)"):
            call(start(PPCA, 2), x.float())
        with pytest.raises(ValueError, match="float64.*the model in torch.float32"):
            call(PPCA(6, 2).float(), x)
        with pytest.raises(ValueError, match=r"expected shape \(batch, 6\).*got \(20, 5\)"):
            call(start(PPCA, 2), x[:, :5])
        with pytest.raises(ValueError, match="max_steps must be at least 1"):
            call(start(PPCA, 2), x, max_steps=0)
        with pytest.raises(ValueError, match="tolerance positive"):
            call(start(PPCA, 2), x, tolerance=0.0)
    fixed = start(PPCA, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="held fixed.*nothing to learn"):
        em(fixed, x)
    with pytest.raises(ValueError, match="learn_model=True: all parameters"):
        coordinate_ascent(fixed, x, learn_model=True)
    constant = x.clone()
    constant[:, 3] = 1.0
    with pytest.raises(ValueError, match=r"columns \[3\] do not vary over the 20 rows"):
        em(start(FactorAnalysis, 2), constant)
    with pytest.raises(ValueError, match=r"columns \[3\] do not vary"):
        coordinate_ascent(start(FactorAnalysis, 2), constant, learn_model=True)
    assert em(start(PPCA, 2), constant).converged  # Its noise is that of the other columns too.


def test_a_closed_form_that_does_not_exist_is_refused():
    x = rows(size=20)
    for z_dim in (0, 6):
        with pytest.raises(ValueError, match=r"1 <= z_dim < x_dim; got x \(20, 6\)"):
            PPCA.maximum_likelihood(x, z_dim)
    with pytest.raises(ValueError, match="the 3 rows of x lie in a space of z_dim=2"):
        PPCA.maximum_likelihood(x[:3], 2)


@pytest.mark.parametrize("z_dim", [1, 3])
def test_the_evidence_of_the_closed_form_against_scipy(z_dim):
    x = rows(size=50)
    model = PPCA.maximum_likelihood(x, z_dim).requires_grad_(False)
    covariance = model.loadings @ model.loadings.mT + model.noise**2 * torch.eye(6)
    theirs = stats.multivariate_normal(x.mean(0).numpy(), covariance.numpy()).logpdf(x.numpy())
    assert abs(evidence(model, x) - theirs.mean()) < 1e-10
