"""Networks with latent weights and latent inputs: closed forms of the linear ones, and laws."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import sigmas
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from torch.utils.data import DataLoader

import ppvae
from ppvae import pairs
from ppvae.diagnostics import active_units
from ppvae.families import DiagonalNormal, FullRankNormal
from ppvae.guides import Amortized, PerDatapoint
from ppvae.isolation import forked_rng, private_store
from ppvae.models import BayesianNeuralNetwork, LatentInputNetwork, TargetsGivenInputs
from ppvae.nn import MLP
from ppvae.shared import Shared


def regression(count=30, seed=0):
    """Rows of two inputs and two targets of a linear function with noise 0.5 and 0.3."""
    with forked_rng(seed):
        u = torch.randn(count, 2).double()
        noise = torch.tensor([0.5, 0.3]).double()
        y = u @ torch.tensor([[1.0, -0.5], [0.3, 2.0]]).double() + 0.4
        return torch.cat([u, y + noise * torch.randn(count, 2)], dim=-1), noise


def linear_pair(count=30, prior_scale=1.3, **options):
    x, noise = regression(count)
    model, guide = pairs.bayesian_neural_network(
        2, 2, (), prior_scale=prior_scale, noise=noise, **options
    )
    return model.double(), guide.double(), x


def set_to(guide, member):
    with torch.no_grad():
        guide.params.copy_(guide.family.params_of(member))


def loss_of(model, guide, x, kind=Trace_ELBO, draws=1, seed=0):
    """Pyro's loss and its draws' standard error unknown: of ``draws`` particles."""
    with private_store(), forked_rng(seed), torch.no_grad():
        return kind(draws, vectorize_particles=draws > 1, max_plate_nesting=1).loss(model, guide, x)


def test_the_weight_posterior_is_the_normal_of_ridge_regression():
    """Bishop (2006), eq. 3.53 and 3.54, target by target."""
    model, _, x = linear_pair()
    posterior = model.weight_posterior(x)
    prior = 1.3 / torch.tensor([math.sqrt(2), math.sqrt(2), 1.0]).double()
    features = torch.cat([x[:, :2], torch.ones(30, 1).double()], dim=-1)
    for target, noise in enumerate((0.5, 0.3)):
        precision = torch.diag(prior**-2) + features.mT @ features / noise**2
        mean = torch.linalg.solve(precision, features.mT @ x[:, 2 + target]) / noise**2
        index = torch.tensor([2 * target, 2 * target + 1, 4 + target])
        torch.testing.assert_close(posterior.mean[index], mean)
        covariance = posterior.covariance_matrix[index][:, index]
        torch.testing.assert_close(covariance, torch.linalg.inv(precision))


def test_the_marginal_is_the_product_of_the_predictives():
    """log p(y_1..N) = Σ log p(y_n | y_<n), each from the posterior of the rows before it."""
    model, _, x = linear_pair(count=6)
    total = 0.0
    for n in range(6):
        design = model._design(x[n : n + 1])[0]
        if n:
            before = model.weight_posterior(x[:n])
            mean, covariance = before.mean, before.covariance_matrix
        else:
            mean, covariance = torch.zeros(6).double(), torch.diag(model.prior_sd**2)
        predictive = dist.MultivariateNormal(
            design @ mean, design @ covariance @ design.mT + torch.diag(model.noise.detach() ** 2)
        )
        total = total + predictive.log_prob(x[n, 2:])
    torch.testing.assert_close(model.log_marginal(x), total)


def test_with_the_exact_posterior_every_loss_is_the_marginal():
    model, _, x = linear_pair()
    guide = Shared(FullRankNormal(6)).double()
    set_to(guide, model.weight_posterior(x))
    exact = float(model.log_marginal(x))
    for seed in range(3):
        assert loss_of(model, guide, x, seed=seed) == pytest.approx(-exact, abs=1e-9)


def test_a_low_rank_guide_of_rank_one_less_than_the_weights_holds_the_posterior():
    """Σ = λ_min I + F Fᵀ, with F of rank P − 1."""
    model, guide, x = linear_pair(rank=5)
    posterior = model.weight_posterior(x)
    values, vectors = torch.linalg.eigh(posterior.covariance_matrix)
    factor = vectors[:, 1:] * (values[1:] - values[0]).sqrt()
    set_to(guide, dist.LowRankMultivariateNormal(posterior.mean, factor, values[0].expand(6)))
    for seed in range(3):
        loss = loss_of(model, guide, x, seed=seed)
        assert loss == pytest.approx(-float(model.log_marginal(x)), abs=1e-8)


def mean_field(model, x):
    """The best mean-field guide for a normal posterior, and its gap (Bishop 2006, section 10.1.2).

    Mean exact, precisions the diagonal of the posterior's precision Λ; the gap is
    KL = ½ (Σ log Λ_ii − log |Λ|).
    """
    posterior = model.weight_posterior(x)
    precision = torch.linalg.inv(posterior.covariance_matrix)
    diagonal = torch.diagonal(precision)
    gap = 0.5 * (diagonal.log().sum() - torch.linalg.slogdet(precision)[1])
    return dist.Normal(posterior.mean, diagonal**-0.5).to_event(1), float(gap)


def test_mean_field_meets_its_closed_form_gap():
    model, guide, x = linear_pair(count=8)
    member, gap = mean_field(model, x)
    assert gap > 0.1
    set_to(guide, member)
    losses = torch.tensor([loss_of(model, guide, x, seed=seed) for seed in range(400)])
    error = float(losses.std()) / 20
    assert abs(float(losses.mean()) - gap + float(model.log_marginal(x))) < 4 * error


def test_fit_finds_the_mean_field_optimum():
    model, guide, x = linear_pair(count=8, num_data=8)
    member, gap = mean_field(model, x)
    loss = TraceMeanField_ELBO(30, vectorize_particles=True, max_plate_nesting=1)
    for lr, steps in ((5e-2, 200), (5e-3, 150)):
        fit = ppvae.fit(
            model, guide, x, loss=loss, steps=steps, batch_size=8, lr=lr, progress=False
        )
    assert fit.completed
    found = guide.distribution()
    away = dist.kl.kl_divergence(found, member)
    assert float(away.detach()) < 0.02 * 6
    tail = fit.losses[-100:].double()
    best = (gap - float(model.log_marginal(x))) / 8
    assert abs(float(tail.mean()) - best) < 5 * float(tail.std()) / 10 + 0.015


@pytest.mark.parametrize("latent_dim", [0, 2])
@pytest.mark.parametrize("kind", [Trace_ELBO, TraceMeanField_ELBO])
def test_the_minibatches_of_a_pass_average_to_the_loss_and_gradient_of_all_data(latent_dim, kind):
    """With the same weights for every batch, exactly; their prior must count once for all data."""
    torch.manual_seed(1)
    model, guide = pairs.bayesian_neural_network(2, 1, (3,), latent_dim=latent_dim, num_data=12)
    model, guide = model.double(), guide.double()
    if guide.local is not None:
        # A narrow q(z | x): what remains of the draws' noise is far below the tolerance.
        with torch.no_grad():
            guide.local.encoder.layers[-1].bias[latent_dim:] = -18.0
            guide.local.encoder.layers[-1].weight[latent_dim:] = 0.0
    x = torch.randn(12, 3).double()
    parameters = [guide.params, model.noise_unconstrained]

    def loss_and_gradient(rows):
        for p in parameters:
            p.grad = None
        with private_store(), forked_rng(3):
            loss = kind().loss_and_grads(model, guide, rows)
        return torch.cat([torch.tensor([loss]), *[p.grad.flatten() for p in parameters]])

    whole = loss_and_gradient(x)
    parts = torch.stack([loss_and_gradient(x[i : i + 4]) for i in (0, 4, 8)])
    # Of q(z | x) the drawn log density is random however narrow it is; its gradient is not.
    start = 1 if latent_dim and kind is Trace_ELBO else 0
    torch.testing.assert_close(parts.mean(dim=0)[start:], whole[start:], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(parts[0], whole, rtol=1e-2)


def test_fit_counts_a_datum_and_not_a_minibatch():
    """The recorded loss of a step is that of all data over N, whatever the batch size."""
    losses = {}
    for batch_size in (10, 30):
        model, guide, x = linear_pair(num_data=30)
        set_to(guide, mean_field(model, x)[0])
        fit = ppvae.fit(model, guide, x, steps=100, batch_size=batch_size, lr=1e-12, progress=False)
        losses[batch_size] = fit.losses.double()
    _, gap = mean_field(model, x)
    best = (gap - float(model.log_marginal(x))) / 30
    for each in losses.values():
        assert abs(float(each.mean()) - best) < 4.5 * float(each.std()) / 10


def test_fit_refuses_minibatches_of_a_model_that_does_not_know_the_number_of_data():
    model, guide, x = linear_pair()
    with pytest.raises(ValueError, match=r"'weights'.*weigh 30/10.*num_data=30.*batch_size=30"):
        ppvae.fit(model, guide, x, steps=2, batch_size=10, progress=False)
    model, guide, x = linear_pair(num_data=29)
    with pytest.raises(ValueError, match=r"weigh 30/10.*num_data=30"):
        ppvae.fit(model, guide, x, steps=2, batch_size=10, progress=False)
    with pytest.raises(ValueError, match="x has 30 rows but num_data=29"):
        ppvae.fit(model, guide, x, steps=2, batch_size=30, progress=False)
    model, guide, x = linear_pair(num_data=30)
    with pytest.raises(ValueError, match="latent sites must be the model's"):
        ppvae.fit(model, Shared(DiagonalNormal(6), site="w").double(), x, progress=False)
    with pytest.raises(ValueError, match=r"'weights': expected latent shape \(6,\).*\(5,\)"):
        ppvae.fit(model, Shared(DiagonalNormal(5)).double(), x, progress=False)
    assert ppvae.fit(model, guide, x, steps=2, batch_size=10, progress=False).completed
    loader = DataLoader(x, batch_size=8, shuffle=False)
    assert ppvae.fit(model, guide, loader, steps=5, progress=False).completed


def test_fit_refuses_a_guide_whose_local_part_has_another_weight():
    model, _ = pairs.bayesian_neural_network(latent_dim=1, num_data=40)
    _, guide = pairs.bayesian_neural_network(latent_dim=1)
    with pytest.raises(ValueError, match=r"weigh differently.*'z': \(4\.0, 1\.0\)"):
        ppvae.fit(model, guide, torch.randn(40, 2), batch_size=10, steps=1, progress=False)


def test_fit_trains_a_model_of_ones_own_with_shared_latents():
    """A normal mean under a normal prior: posterior N(Σx / (N + 1), 1 / (N + 1))."""
    x = torch.randn(50).double() + 2

    def model(x):
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", 50, subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    guide = Shared(DiagonalNormal(), site="mean").double()
    loss = TraceMeanField_ELBO(30, vectorize_particles=True, max_plate_nesting=1)
    for lr, steps in ((0.1, 150), (5e-3, 150)):
        ppvae.fit(model, guide, x, loss=loss, steps=steps, batch_size=25, lr=lr, progress=False)
    loc, log_scale = guide.params.tolist()
    assert loc == pytest.approx(float(x.sum()) / 51, abs=0.05)
    assert log_scale == pytest.approx(-0.5 * math.log(51), abs=0.1)


@pytest.mark.fills_store
@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"latent_dim": 2}])
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_classic_svi_trains_every_parameter(options, loss):
    model, guide = pairs.bayesian_neural_network(2, 1, (4,), num_data=20, **options)
    x = torch.randn(20, 3)
    before = [p.detach().clone() for m in (model, guide) for p in m.parameters()]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss())
    for _ in range(2):
        for rows in (x[:10], x[10:]):
            assert math.isfinite(svi.step(rows))
    after = [p.detach() for m in (model, guide) for p in m.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    drawn = Predictive(poutine.uncondition(model), guide=guide, num_samples=3)(x)["x"]
    assert drawn.shape == (3, 20, 3)
    assert torch.equal(drawn[..., :2], x[:, :2].expand(3, 20, 2))
    assert not torch.equal(drawn[0, :, 2], drawn[1, :, 2])


def test_a_saved_guide_loads_into_a_fresh_one():
    _, guide = pairs.bayesian_neural_network(rank=2, latent_dim=1)
    _, other = pairs.bayesian_neural_network(rank=2, latent_dim=1)
    other.load_state_dict(guide.state_dict())
    assert torch.equal(
        other.distribution().covariance_matrix, guide.distribution().covariance_matrix
    )


def test_the_prior_of_the_weights_goes_by_the_fan_in():
    model = BayesianNeuralNetwork(4, 2, (9,), prior_scale=3.0)
    expected = [1.5] * 36 + [3.0] * 9 + [1.0] * 18 + [3.0] * 2
    torch.testing.assert_close(model.prior_sd, torch.tensor(expected))
    assert model.num_weights == len(expected)


def test_the_network_is_the_one_of_torch():
    net = MLP(3, [4, 5], 2, torch.nn.Tanh)
    model = BayesianNeuralNetwork(3, 2, (4, 5))
    weights = torch.cat([p.flatten() for p in net.parameters()])
    inputs = torch.randn(6, 3)
    torch.testing.assert_close(model.network(weights, inputs), net(inputs))
    many = torch.stack([weights, -weights])[:, None]
    out = model.network(many, inputs)
    torch.testing.assert_close(out[0], net(inputs))
    torch.testing.assert_close(out[1], model.network(-weights, inputs))


def test_predict_meets_the_closed_form_of_linear_regression():
    """Bishop (2006), eq. 3.58 and 3.59: variance σ² + J Σ Jᵀ."""
    model, _, x = linear_pair(count=8)
    guide = Shared(FullRankNormal(6)).double()
    posterior = model.weight_posterior(x)
    set_to(guide, posterior)
    new, count = torch.randn(5, 2).double(), 4000
    prediction = model.predict(new, guide, count)
    design = model._design(torch.cat([new, new], dim=-1))
    mean = design @ posterior.mean
    variance = torch.einsum("nyp,pq,nyq->ny", design, posterior.covariance_matrix, design)
    assert sigmas(prediction.mean, mean, (variance / count).sqrt()) < 5
    assert sigmas(prediction.weight_sd**2, variance, variance * math.sqrt(2 / count)) < 5
    torch.testing.assert_close(prediction.noise_sd, model.noise.detach().expand(5, 2))
    torch.testing.assert_close(prediction.sd**2, prediction.noise_sd**2 + prediction.weight_sd**2)


def test_predict_counts_latent_inputs_as_noise():
    """A linear network: Var[y | w] = σ² + |c(w)|², over z; the mean over weights is exact."""
    model = BayesianNeuralNetwork(1, 1, (), latent_dim=2, noise=0.3).double()
    guide = Shared(DiagonalNormal(4), local=None).double()
    loc, scale = torch.tensor([1.0, 2.0, -1.0, 0.5]).double(), torch.full((4,), 0.2).double()
    set_to(guide, dist.Normal(loc, scale).to_event(1))
    new, count = torch.tensor([[0.0], [2.0]]).double(), 4000
    prediction = model.predict(new, guide, count, num_latents=10)
    # E|c|² = |E c|² + 2 · 0.04; Var E[y | w] = 0.04 (u² + 1).
    noise = 0.3**2 + 5 + 0.08
    spread = math.sqrt(2 / 9) * 6 + 1  # of one w's estimate of |c|², from above
    assert sigmas(prediction.noise_sd**2, torch.tensor(noise), torch.tensor(spread / 63)) < 5
    between = 0.04 * (new**2 + 1)
    error = (between + (noise / 10)) * math.sqrt(2 / count)
    assert sigmas(prediction.weight_sd**2, between, error) < 5
    assert sigmas(prediction.mean, new + 0.5, ((between + noise / 10) / count).sqrt()) < 5


@pytest.mark.fills_store
@pytest.mark.parametrize("kind", [AutoNormal, AutoLowRankMultivariateNormal])
def test_guides_of_pyro_train_and_predict(kind):
    model, _, x = linear_pair()
    guide = kind(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(100):
        svi.step(x)
    prediction = model.predict(x[:, :2], guide, 50)
    residual = (x[:, 2:] - prediction.mean) / model.noise.detach()
    assert float(residual.square().mean()) < 2
    assert float(prediction.weight_sd.max()) < float(prediction.noise_sd.max())


def test_predict_leaves_the_generators_alone_and_names_what_is_wrong():
    model, guide = pairs.bayesian_neural_network()
    state = torch.get_rng_state()
    one, two = (model.predict(torch.zeros(2, 1), guide, 10, seed=4).mean for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"inputs: expected shape \(batch, 1\).*\(2, 2\)"):
        model.predict(torch.zeros(2, 2), guide)
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        model.predict(torch.zeros(2, 1), guide, 1)
    with pytest.raises(ValueError, match="expected a site 'weights'"):
        model.predict(torch.zeros(2, 1), Shared(DiagonalNormal(61), site="w"))


GLOBAL = {
    "log_joint": lambda m, g, x: ppvae.log_joint(m, x, torch.zeros(61)),
    "log_weights": ppvae.log_weights,
    "elbo": ppvae.elbo,
    "iwae": ppvae.iwae,
    "quadrature": lambda m, g, x: ppvae.quadrature(m, x),
    "compare": ppvae.compare,
    "fit_per_datapoint": lambda m, g, x: ppvae.fit_per_datapoint(m, DiagonalNormal(61), x),
    "per_datapoint": lambda m, g, x: ppvae.per_datapoint(
        Amortized(DiagonalNormal(1), MLP(2, [], 2)), x, model=m
    ),
    "refine": lambda m, g, x: ppvae.refine(m, Amortized(DiagonalNormal(1), MLP(2, [], 2)), x),
    "active_units": active_units,
}


@pytest.mark.parametrize("call", GLOBAL.values(), ids=GLOBAL.keys())
@pytest.mark.parametrize("latent_dim", [0, 1])
def test_whatever_judges_a_datum_says_that_weights_are_shared(call, latent_dim):
    hidden = (20,) if not latent_dim else (15,)
    model, guide = pairs.bayesian_neural_network(hidden=hidden, latent_dim=latent_dim)
    assert model.num_weights == 61
    with pytest.raises(ValueError) as error:
        call(model, guide, torch.zeros(5, 2))
    for words in ("'weights'", "nothing to amortize", "one posterior", "ppvae.fit", "at(weights)"):
        assert words in str(error.value)


def test_at_gives_a_model_that_compare_takes_apart():
    """A linear network with the weights held: evidence exact, and met by the ledger."""
    torch.manual_seed(2)
    model, guide = pairs.bayesian_neural_network(1, 3, (), latent_dim=2, noise=0.5, num_data=40)
    held = model.at(guide.distribution().mean)
    with torch.no_grad(), private_store():
        x = held(size=40)
    comparison = ppvae.compare(held, guide.local, x[:10], num_samples=500)
    assert comparison.dataset.attrs["evidence_kind"] == "exact"
    approximation, error = comparison.mean("approximation_gap")
    # A diagonal normal's gap under a normal posterior, the same for each row.
    covariance = held.posterior(x).covariance_matrix[0].detach()
    precision = torch.linalg.inv(covariance)
    gap = 0.5 * (torch.diagonal(precision).log().sum() - torch.linalg.slogdet(precision)[1])
    assert abs(approximation - float(gap)) < 5 * error + 0.01
    assert comparison.mean("amortization_gap")[0] > 0.05
    with pytest.raises(ValueError, match="latent_dim >= 1"):
        BayesianNeuralNetwork().at(torch.zeros(61))
    with pytest.raises(ValueError, match=r"weights: expected shape \(12,\).*\(11,\)"):
        model.at(torch.zeros(11))


def test_at_keeps_every_digit_of_the_noise():
    model = BayesianNeuralNetwork(1, 2, (3,), latent_dim=1).double()
    with torch.no_grad(), private_store():
        model.noise_unconstrained.copy_(torch.tensor([1 / 3, -1 / 7]).double() + 1e-12)
        held = model.at(torch.zeros(model.num_weights))
        assert held.noise.dtype == torch.float64
        assert torch.equal(held.noise, model.noise)
    assert not held.noise_unconstrained.requires_grad


def test_a_linear_network_with_latent_inputs_is_exact():
    model = LatentInputNetwork(2, 3, 2, (), noise=torch.tensor([0.5, 1.0, 0.2])).double()
    with torch.no_grad(), private_store():
        x = model(size=6)

    def exact(rows):
        with pyro.plate("data", len(rows)):
            pyro.sample("z", model.posterior(rows))

    weights = ppvae.log_weights(model, exact, x, 5)
    torch.testing.assert_close(weights, model.log_evidence(x).detach().expand(5, 6))
    quadrature = ppvae.quadrature(model, x)
    torch.testing.assert_close(quadrature.value, model.log_evidence(x).detach(), atol=1e-6, rtol=0)


def test_the_nonlinear_evidence_is_no_attribute_and_quadrature_bounds_the_elbo():
    model, guide = pairs.latent_input_network(1, 1, 1, (5,))
    assert getattr(model, "log_evidence", None) is None
    assert not hasattr(model, "log_evidence")
    with pytest.raises(AttributeError, match=r"needs a linear network.*hidden=\(5,\)"):
        model.log_evidence(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="hidden=\\(5,\\)"):
        model.posterior(torch.zeros(2, 2))
    with torch.no_grad(), private_store():
        x = model(size=8)
    exact, bound = ppvae.quadrature(model, x), ppvae.elbo(model, guide, x, 2000)
    assert bool((bound.value <= exact.value + 5 * bound.stderr + exact.stderr).all())
    tight = ppvae.iwae(model, guide, x, 20000)
    assert sigmas(tight.value, exact.value, tight.stderr + 0.01) < 5


def test_held_weights_are_held_and_free_ones_learned():
    weights = torch.randn(LatentInputNetwork().num_weights)
    assert not LatentInputNetwork(weights=weights, noise=1.0).weights.requires_grad
    assert LatentInputNetwork().weights.requires_grad
    free = {n for n, p in LatentInputNetwork(noise=0.2).named_parameters() if p.requires_grad}
    assert free == {"weights"}


def test_the_rows_of_a_latent_input_network_in_any_number_of_leading_dimensions():
    model = LatentInputNetwork(2, 1, 3, (4,)).double()
    x, z = torch.randn(5, 3).double(), torch.randn(7, 5, 3).double()
    whole = ppvae.log_joint(model, x, z)
    for s in (0, 6):
        torch.testing.assert_close(whole[s], ppvae.log_joint(model, x, z[s]))
    by_hand = dist.Normal(0, 1).log_prob(z).sum(-1)
    mean = model.network(model.weights, torch.cat([x[:, :2].expand(7, 5, 2), z], -1))
    by_hand = by_hand + dist.Normal(mean, model.noise).log_prob(x[:, 2:]).sum(-1)
    torch.testing.assert_close(whole, by_hand)


def test_targets_given_inputs_score_the_targets_alone():
    inputs, targets = torch.randn(4, 2), dist.Normal(torch.randn(4, 3), 0.5).to_event(1)
    rows = TargetsGivenInputs(inputs, targets)
    draw = rows.expand(torch.Size([6, 4])).sample()
    assert draw.shape == (6, 4, 5)
    assert torch.equal(draw[..., :2], inputs.expand(6, 4, 2))
    torch.testing.assert_close(rows.log_prob(draw), targets.log_prob(draw[..., 2:]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BayesianNeuralNetwork(0), "x_dim, y_dim and hidden must be positive"),
        (lambda: BayesianNeuralNetwork(hidden=(0,)), "must be positive"),
        (lambda: BayesianNeuralNetwork(prior_scale=0.0), "prior_scale must be positive"),
        (lambda: BayesianNeuralNetwork(noise=-1.0), "noise: standard deviations"),
        (lambda: BayesianNeuralNetwork(y_dim=2, noise=torch.ones(3)), "noise: expected"),
        (lambda: BayesianNeuralNetwork(num_data=0), "num_data must be at least 1"),
        (lambda: LatentInputNetwork(latent_dim=0), "latent_dim must be at least 1"),
        (lambda: LatentInputNetwork(weights=torch.zeros(3)), "weights: expected shape"),
        (lambda: pairs.bayesian_neural_network(rank=0), "rank must be between 1 and"),
        (lambda: BayesianNeuralNetwork()(torch.zeros(3)), "expected x of shape"),
        (lambda: BayesianNeuralNetwork().weight_posterior(torch.zeros(3, 2)), "hidden=\\(20,\\)"),
        (lambda: BayesianNeuralNetwork().network(torch.zeros(3), torch.zeros(2, 1)), "61"),
        (lambda: Shared(DiagonalNormal(1), local=PerDatapoint(DiagonalNormal(1), 2))(None), "rows"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with private_store(), pytest.raises(ValueError, match=words):
        make()
