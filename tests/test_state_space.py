"""A linear state space against Kalman's filter, the RTS smoother and Pyro's GaussianHMM."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import ppvae
from ppvae import pairs
from ppvae.families import BlockNormal, DiagonalNormal, FullRankNormal
from ppvae.isolation import forked_rng, private_store
from ppvae.models import LinearStateSpace

STEPS, X_DIM, Z_DIM = 5, 3, 2


def given(steps=STEPS):
    return LinearStateSpace(
        steps,
        X_DIM,
        Z_DIM,
        initial_loc=torch.tensor([1.0, -0.5]),
        initial_tril=torch.tensor([[1.5, 0.0], [0.4, 0.8]]),
        transition=torch.tensor([[0.9, 0.3], [-0.4, 0.7]]),
        transition_tril=torch.tensor([[0.6, 0.0], [-0.2, 0.3]]),
        observation=torch.tensor([[1.0, 0.0], [0.5, -1.0], [0.2, 0.8]]),
        observation_tril=torch.tensor([[0.5, 0.0, 0.0], [0.1, 0.7, 0.0], [-0.2, 0.3, 0.4]]),
    ).double()


def rows(model, size, seed=0):
    with forked_rng(seed), private_store(), torch.no_grad():
        return model(size=size)


def kalman(model, series):
    """Log evidence of one series, and the smoothed means and covariances: filter, then RTS."""
    A, C = model.transition.numpy(), model.observation.numpy()
    Q, R, P = (
        (tril @ tril.mT).numpy()
        for tril in (model.transition_tril, model.observation_tril, model.initial_tril)
    )
    mean, log_evidence = model.initial_loc.numpy(), 0.0
    predicted, filtered = [], []
    for x in series.numpy():
        predicted.append((mean, P))
        S = C @ P @ C.T + R
        residual = x - C @ mean
        log_evidence -= 0.5 * (
            residual @ np.linalg.solve(S, residual)
            + np.linalg.slogdet(S)[1]
            + len(x) * math.log(2 * math.pi)
        )
        gain = P @ C.T @ np.linalg.inv(S)
        mean, P = mean + gain @ residual, P - gain @ S @ gain.T
        filtered.append((mean, P))
        mean, P = A @ mean, A @ P @ A.T + Q
    smoothed = [filtered[-1]]
    for (m, V), (ahead_m, ahead_V) in zip(filtered[-2::-1], predicted[:0:-1], strict=True):
        back = V @ A.T @ np.linalg.inv(ahead_V)
        next_m, next_V = smoothed[0]
        smoothed.insert(0, (m + back @ (next_m - ahead_m), V + back @ (next_V - ahead_V) @ back.T))
    means, covariances = zip(*smoothed, strict=True)
    return log_evidence, np.stack(means), np.stack(covariances)


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_evidence_and_smoother_against_kalman_and_rts(steps):
    model = given(steps)
    x = rows(model, 4)
    posterior, evidence = model.posterior(x), model.log_evidence(x)
    blocks = posterior.covariance_matrix.reshape(4, steps, Z_DIM, steps, Z_DIM)
    for n in range(4):
        expected, means, covariances = kalman(model, x[n])
        assert abs(float(evidence[n]) - expected) < 1e-9 * steps
        np.testing.assert_allclose(posterior.mean[n].reshape(steps, Z_DIM), means, atol=1e-9)
        ours = torch.stack([blocks[n, t, :, t] for t in range(steps)])
        np.testing.assert_allclose(ours, covariances, atol=1e-9)


def gaussian_hmm(model):
    """Pyro's, in which rows multiply from the left and a transition precedes the first step."""
    transition = model.transition.mT.repeat(model.num_steps, 1, 1)
    transition[0] = 0.0  # The first state does not hang on one before it.
    loc = torch.zeros(model.num_steps, Z_DIM).double()
    loc[0] = model.initial_loc
    tril = model.transition_tril.repeat(model.num_steps, 1, 1)
    tril[0] = model.initial_tril
    zeros = torch.zeros(X_DIM).double()
    return dist.GaussianHMM(
        dist.MultivariateNormal(torch.zeros(Z_DIM).double(), scale_tril=torch.eye(Z_DIM).double()),
        transition,
        dist.MultivariateNormal(loc, scale_tril=tril),
        model.observation.mT,
        dist.MultivariateNormal(zeros, scale_tril=model.observation_tril),
        duration=model.num_steps,
    )


def test_evidence_and_last_state_against_pyros_gaussian_hmm():
    model = given()
    x = rows(model, 6)
    theirs = gaussian_hmm(model)
    torch.testing.assert_close(model.log_evidence(x), theirs.log_prob(x))
    last = theirs.filter(x)
    posterior = model.posterior(x)
    torch.testing.assert_close(posterior.mean[:, -Z_DIM:], last.mean)
    ours = posterior.covariance_matrix[:, -Z_DIM:, -Z_DIM:]
    torch.testing.assert_close(ours, last.covariance_matrix.expand_as(ours))


def test_bayes_rule_holds_along_any_path():
    model = given()
    x, z = rows(model, 4), torch.randn(3, 4, STEPS * Z_DIM).double()
    ratio = ppvae.log_joint(model, x, z) - model.posterior(x).log_prob(z)
    torch.testing.assert_close(ratio, model.log_evidence(x).expand(3, 4))


def test_the_joint_is_the_product_of_the_steps():
    """log p(x, z), term by term as the model is written in its docstring."""
    model = given()
    x, z = rows(model, 4), torch.randn(4, STEPS * Z_DIM).double()
    states = z.reshape(4, STEPS, Z_DIM)
    normal = dist.MultivariateNormal
    total = normal(model.initial_loc, scale_tril=model.initial_tril).log_prob(states[:, 0])
    for t in range(STEPS):
        if t:
            mean = states[:, t - 1] @ model.transition.mT
            total = total + normal(mean, scale_tril=model.transition_tril).log_prob(states[:, t])
        mean = states[:, t] @ model.observation.mT
        total = total + normal(mean, scale_tril=model.observation_tril).log_prob(x[:, t])
    torch.testing.assert_close(ppvae.log_joint(model, x, z), total)


def test_draws_have_the_series_moments():
    model = given()
    x = rows(model, 40_000)[:, -1]
    mean, P = model.initial_loc, model.initial_tril @ model.initial_tril.mT
    for _ in range(STEPS - 1):
        mean = model.transition @ mean
        P = model.transition @ P @ model.transition.mT
        P = P + model.transition_tril @ model.transition_tril.mT
    mean = model.observation @ mean
    R = model.observation_tril @ model.observation_tril.mT
    second = model.observation @ P @ model.observation.mT + R + mean[:, None] * mean
    for draws, expected in ((x, mean), (x[:, :, None] * x[:, None, :], second)):
        error = draws.std(dim=0) / len(x) ** 0.5
        assert float(((draws.mean(dim=0) - expected).abs() / error).max()) < 5


def test_the_posteriors_precision_is_block_tridiagonal():
    model = given()
    precision = model.posterior(rows(model, 1)).precision_matrix[0]
    step = torch.arange(STEPS * Z_DIM) // Z_DIM
    far = (step[:, None] - step).abs() > 1
    assert float(precision[far].abs().max()) < 1e-10
    assert float(precision[~far].abs().min()) > 1e-3


def test_the_learned_start_is_stationary():
    model, _ = pairs.linear_state_space(num_steps=6)
    mean, K, D = model._path()
    covariance = torch.linalg.solve(K, D @ D.mT @ torch.linalg.inv(K).mT)
    torch.testing.assert_close(covariance.diagonal().detach(), torch.ones(12))
    assert not mean.any()


def test_given_parameters_are_held_fixed():
    assert not any(p.requires_grad for p in given().parameters())
    learned = LinearStateSpace(STEPS, X_DIM, Z_DIM)
    assert len(list(learned.parameters())) == 6
    assert all(p.requires_grad for p in learned.parameters())


def test_unfit_arguments_are_refused():
    with pytest.raises(ValueError, match="must be positive; got 0, 2 and 2"):
        LinearStateSpace(0, 2, 2)
    with pytest.raises(ValueError, match=r"transition: expected shape \(2, 2\); got \(2, 3\)"):
        LinearStateSpace(4, 2, 2, transition=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="initial_tril: expected lower triangular matrices"):
        LinearStateSpace(4, 2, 2, initial_tril=torch.ones(2, 2))
    model = given()
    for call in (model, model.log_evidence, model.posterior):
        with pytest.raises(ValueError, match=r"expected x of shape \(batch, 5, 3\); got \(4, 15\)"):
            call(torch.zeros(4, 15).double())
    with pytest.raises(ValueError, match=r"Site 'z'.*event shape \(16,\)"):
        pairs.linear_state_space(8, 2, 2, DiagonalNormal(8))


# What independence in q costs.

PER_STEP = BlockNormal(STEPS * Z_DIM, [range(t, t + Z_DIM) for t in range(0, STEPS * Z_DIM, Z_DIM)])
PER_COORDINATE = BlockNormal(STEPS * Z_DIM, [range(i, STEPS * Z_DIM, Z_DIM) for i in range(Z_DIM)])
FAMILIES = [DiagonalNormal(STEPS * Z_DIM), PER_STEP, PER_COORDINATE, FullRankNormal(STEPS * Z_DIM)]


def closed_form_gap(model, family):
    """½ (Σ_b log |Λ_bb| − log |Λ|): the best member has the diagonal blocks of the precision."""
    precision = model.posterior(torch.zeros(1, STEPS, X_DIM).double()).precision_matrix[0]
    labels = family.block_labels
    blocks = precision * (labels[:, None] == labels)
    return 0.5 * float(torch.logdet(blocks) - torch.logdet(precision))


def test_the_closed_form_is_the_smallest_kl_divergence():
    """By gradient descent on the KL divergence of torch, over the covariance in each structure."""
    model = given()
    posterior = model.posterior(torch.zeros(1, STEPS, X_DIM).double())
    for family in FAMILIES:
        tril = torch.linalg.cholesky(
            torch.linalg.inv(
                posterior.precision_matrix * (family.block_labels[:, None] == family.block_labels)
            )
        )
        params = family.from_gaussian(posterior.mean, tril).detach().requires_grad_()

        def divergence(params, family=family):
            loc, tril = family.gaussian(params)
            q = torch.distributions.MultivariateNormal(loc, scale_tril=tril)
            return torch.distributions.kl_divergence(q, posterior).sum()

        best = divergence(params)
        best.backward()
        assert float(params.grad.abs().max()) < 1e-10
        assert abs(float(best.detach()) - closed_form_gap(model, family)) < 1e-10


def test_compare_measures_the_closed_form_gap_of_each_structure():
    model = given()
    x = rows(model, 4)
    with forked_rng(0):
        _, guide = pairs.linear_state_space(STEPS, X_DIM, Z_DIM)
    comparison = ppvae.compare(model, guide.double(), x, families=FAMILIES[1:])
    assert comparison.dataset.attrs["evidence_kind"] == "exact"
    gaps = {}
    for family in FAMILIES:
        column = f"per_datapoint {family!r}"
        one = comparison.dataset.sel(guide=column)
        gap = one["approximation_gap"].values
        error = one["approximation_gap_stderr"].values
        exact = gaps[family] = closed_form_gap(model, family)
        # The engine stops within a thousandth of a nat of the optimum.
        assert np.all(np.abs(gap - exact) < 5 * error + 2e-3)
    mean_field, per_step, per_coordinate, full = gaps.values()
    assert mean_field > max(per_step, per_coordinate) + 0.1
    assert min(per_step, per_coordinate) > 0.1
    assert abs(full) < 1e-10


def test_a_linear_encoder_can_hold_the_smoother():
    """The posterior's mean is linear in the series, its covariance one for all: no gap is left."""
    model = given()
    with forked_rng(0):
        _, guide = pairs.linear_state_space(STEPS, X_DIM, Z_DIM, FullRankNormal(STEPS * Z_DIM))
    guide = guide.double()
    basis = torch.eye(STEPS * X_DIM).double().reshape(-1, STEPS, X_DIM)
    family, linear = guide.family, guide.encoder[1].layers[0]
    zero = model.posterior(torch.zeros(1, STEPS, X_DIM).double())
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[: STEPS * Z_DIM] = (model.posterior(basis).mean - zero.mean).mT
        linear.bias.copy_(family.from_gaussian(zero.mean, zero.scale_tril)[0])
    x = rows(model, 20)
    weights = ppvae.log_weights(model, guide, x, 30)
    torch.testing.assert_close(weights, model.log_evidence(x).expand(30, 20))
