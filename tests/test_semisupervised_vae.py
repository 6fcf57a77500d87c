"""M2: rows with and without labels, exact evidences, the objective and its gradient."""

import math

import pyro
import pytest
import torch
from laws import sigmas
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import nn

import ppvae
from ppvae import data, pairs
from ppvae.classification import SemisupervisedEncoder
from ppvae.families import Categorical, DiagonalNormal, FullRankNormal, Given
from ppvae.guides import Amortized
from ppvae.isolation import forked_rng, private_store
from ppvae.likelihoods import Bernoulli, Gaussian
from ppvae.models import SemisupervisedVAE
from ppvae.nn import MLP, MLPByClass
from ppvae.objectives import SemisupervisedELBO

K, X_DIM, Z_DIM = 3, 4, 2
NOISE = 1.0  # whose logarithm is exact in single precision


class LinearByClass(nn.Module):
    """W_y z + μ_y: with normal noise, a mixture of factor analysers."""

    def __init__(self, loadings, loc):
        super().__init__()
        self.loadings, self.loc = nn.Parameter(loadings), nn.Parameter(loc)

    def forward(self, y_and_z):
        y, z = y_and_z.split([len(self.loc), self.loadings.shape[-1]], dim=-1)
        loadings = torch.einsum("...k,kxz->...xz", y, self.loadings)
        return (loadings @ z[..., None]).squeeze(-1) + y @ self.loc


def mixture(labelled=0.5):
    decoder = LinearByClass(torch.randn(K, X_DIM, Z_DIM), torch.randn(K, X_DIM))
    return SemisupervisedVAE(X_DIM, Z_DIM, K, decoder, Gaussian(NOISE), labelled=labelled).double()


def log_joint_of_classes(model, pixels):
    """log p(x, y) for each y, (batch, K), in closed form."""
    loadings, loc = model.decoder.loadings.detach(), model.decoder.loc.detach()
    covariance = loadings @ loadings.mT + NOISE**2 * torch.eye(X_DIM, dtype=loadings.dtype)
    marginal = torch.distributions.MultivariateNormal(loc, covariance)
    return marginal.log_prob(pixels[:, None]) - math.log(K)


def evidence(model, rows):
    joint, label = log_joint_of_classes(model, rows[:, :-1]), rows[:, -1].long()
    labelled = joint.gather(1, label.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(label >= 0, labelled, joint.logsumexp(dim=1))


class ExactEncoder(nn.Module):
    """λ of p(y | x) and of p(z | x, y) for every y; in labelled rows of 1/K and p(z | x, label)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        pixels, label = x[:, :-1], x[:, -1].long()
        loadings, loc = self.model.decoder.loadings.detach(), self.model.decoder.loc.detach()
        precision = loadings.mT @ loadings / NOISE**2 + torch.eye(Z_DIM, dtype=x.dtype)
        scaled = torch.einsum("kxz,bkx->bkz", loadings, pixels[:, None] - loc) / NOISE**2
        mean = torch.linalg.solve(precision, scaled[..., None]).squeeze(-1)
        # Of the same value of y in every class, where it is known.
        own = torch.where(label[:, None] >= 0, label[:, None], torch.arange(K))
        member = pyro.distributions.MultivariateNormal(
            mean.gather(1, own[..., None].expand(-1, -1, Z_DIM)), precision_matrix=precision[own]
        )
        logits = log_joint_of_classes(self.model, pixels)
        logits = torch.where(label[:, None] >= 0, torch.zeros_like(logits), logits)
        return torch.cat([logits, FullRankNormal(Z_DIM).params_of(member).flatten(1)], dim=1)


def exact_guide(model):
    families = {"y": Categorical(K), "z": Given("y", K, FullRankNormal(Z_DIM))}
    return Amortized(families, ExactEncoder(model))


def draw(model, size, seed=0):
    with torch.no_grad(), forked_rng(seed), private_store():
        return model(size=size)


def losses_of(loss, model, guide, x, repeats):
    """Values of a loss, each from fresh draws."""
    with private_store(), torch.no_grad():
        return torch.tensor([loss.loss(model, guide, x) for _ in range(repeats)])


def small(**settings):
    """A pair with mixed rows."""
    model, guide = pairs.semisupervised_vae(6, 2, 3, [8], **settings)
    return model, guide, draw(model, 6)


@pytest.mark.parametrize("labelled", [0.0, 0.5, 1.0])
def test_with_the_exact_posterior_all_log_weights_are_the_evidence(labelled):
    model = mixture(labelled)
    x = draw(model, 8)
    assert int((x[:, -1] >= 0).sum()) == round(8 * labelled)
    weights = ppvae.log_weights(model, exact_guide(model), x, 50)
    torch.testing.assert_close(weights, evidence(model, x).expand(50, 8), rtol=0, atol=1e-9)


def test_with_the_exact_posterior_the_objective_without_its_last_term_is_the_evidence():
    model = mixture()
    x = draw(model, 8)
    value = losses_of(SemisupervisedELBO(alpha=0), model, exact_guide(model), x, 3).double()
    expected = -evidence(model, x).sum().expand(3)
    torch.testing.assert_close(value, expected.to(value), rtol=1e-6, atol=0)


def test_the_evidence_of_a_row_without_a_label_sums_those_with_one():
    """For one latent dimension by quadrature of the joint density, y being summed."""
    decoder = LinearByClass(torch.randn(K, X_DIM, 1), torch.randn(K, X_DIM))
    model = SemisupervisedVAE(X_DIM, 1, K, decoder, Gaussian(NOISE)).double()
    pixels = draw(model, 1)[:, :-1]
    z = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    y = torch.arange(K).repeat_interleave(len(z))

    def integral(row):
        sites = {"y": y[:, None], "z": z.repeat(K)[:, None, None]}
        joint = ppvae.log_joint(model, row, sites).detach().squeeze(1)
        return torch.logsumexp(joint, dim=0) + torch.log(z[1] - z[0])

    each = torch.stack([integral(model.rows(pixels, torch.tensor([k]))) for k in range(K)])
    torch.testing.assert_close(each, log_joint_of_classes(model, pixels)[0])
    torch.testing.assert_close(integral(model.rows(pixels)), each.logsumexp(dim=0))


def test_the_latent_class_of_a_labelled_row_touches_nothing():
    model, guide, x = small(labelled=1.0)
    model, guide, x = model.double(), guide.double(), x.double()
    z = torch.randn(K, 6, 2, dtype=torch.float64)
    y = torch.arange(K)[:, None].expand(K, 6)
    pixels = model.likelihood.distribution(
        model.decoder(torch.cat([nn.functional.one_hot(x[:, -1].long(), K).expand(K, 6, K), z], -1))
    )
    prior = torch.distributions.Normal(0, 1).log_prob(z).sum(-1)
    # p(y) of the latent and p(label), of 1 / K each.
    expected = prior + pixels.log_prob(x[:, :-1]) - 2 * math.log(K)
    torch.testing.assert_close(ppvae.log_joint(model, x, {"y": y, "z": z}), expected)
    logits, params = guide.by_site(guide.params(x)).values()
    assert torch.equal(logits, torch.zeros(6, K, dtype=torch.float64))
    blocks = params.reshape(6, K, -1)
    assert torch.equal(blocks, blocks[:, :1].expand_as(blocks))
    # The ELBO is that of a model in which the label is data and y is no site.
    only_z = torch.distributions.Independent(
        DiagonalNormal(2).distribution(blocks[:, 0]).base_dist, 1
    )
    draws = only_z.sample((4000,))
    inputs = torch.cat([nn.functional.one_hot(x[:, -1].long(), K).expand(4000, 6, K), draws], -1)
    weights = (
        torch.distributions.Normal(0, 1).log_prob(draws).sum(-1)
        + model.likelihood.distribution(model.decoder(inputs)).log_prob(x[:, :-1])
        - math.log(K)
        - only_z.log_prob(draws)
    ).detach()
    ours = ppvae.elbo(model, guide, x, 4000)
    stderr = (ours.stderr**2 + weights.var(0) / 4000).sqrt()
    assert sigmas(ours.value, weights.mean(0), stderr) < 4.5


def test_a_row_without_a_label_hangs_on_its_latent_class():
    model, _, _ = small()
    x = model.rows(torch.ones(1, 6))
    joint = ppvae.log_joint(model, x, {"y": torch.arange(K)[:, None], "z": torch.zeros(K, 1, 2)})
    assert len(joint.unique()) == K


def test_drawn_pixels_are_of_the_label_or_of_the_latent_class():
    decoder = LinearByClass(torch.zeros(K, 1, 1), 10.0 * torch.arange(K)[:, None])
    model = SemisupervisedVAE(1, 1, K, decoder, Gaussian(0.1), labelled=1 / 3)
    with private_store():
        trace = pyro.poutine.trace(model).get_trace(size=900)
    x, y = trace.nodes["x"]["value"], trace.nodes["y"]["value"]
    label, seen = x[:, -1].long(), (x[:, 0] / 10).round().long()
    known = label >= 0
    assert int(known.sum()) == 300
    assert torch.equal(seen, torch.where(known, label, y))
    assert not torch.equal(label[known], y[known])
    # Each label has probability 1/K: a chi-squared statistic with K − 1 = 2 degrees of freedom.
    counts = torch.bincount(label[known], minlength=K)
    assert float(((counts - 100) ** 2 / 100).sum()) < 25


def test_without_alpha_the_objective_is_pyros_with_y_enumerated():
    model, guide, x = small()
    theirs = TraceEnum_ELBO(max_plate_nesting=1)
    with private_store(), forked_rng(1), torch.no_grad():
        expected = theirs.loss(model, config_enumerate(guide), x)
    with private_store(), forked_rng(1):
        assert SemisupervisedELBO(alpha=0).loss(model, guide, x) == expected


def test_without_alpha_the_objective_estimates_the_elbo_as_sampling_does():
    model, guide, x = small()
    ours = losses_of(SemisupervisedELBO(alpha=0, num_particles=100), model, guide, x, 20)
    sampled = Trace_ELBO(4000, vectorize_particles=True, max_plate_nesting=1)
    with private_store(), torch.no_grad():
        theirs = sampled.loss(model, guide, x)
    estimate = ppvae.elbo(model, guide, x, 4000)
    error = math.hypot(float(ours.std()) / math.sqrt(20), 6 * estimate.mean_stderr)
    assert abs(float(ours.mean()) - theirs) < 4.5 * error
    assert abs(float(ours.mean()) + 6 * estimate.mean) < 4.5 * error


def test_the_last_term_is_the_cross_entropy_of_the_labelled_rows():
    model, guide, x = small()
    values = []
    for alpha in (0.0, 2.5):
        with private_store(), forked_rng(1):
            values.append(SemisupervisedELBO(alpha=alpha).loss(model, guide, x))
    known = x[:, -1] >= 0
    logits = guide.encoder.classifier(x[known, :-1]).detach()
    expected = nn.functional.cross_entropy(logits, x[known, -1].long(), reduction="sum")
    assert values[1] - values[0] == pytest.approx(2.5 * float(expected), rel=1e-4)
    unlabelled = x[~known]
    with private_store(), forked_rng(1):
        one = SemisupervisedELBO(alpha=2.5).loss(model, guide, unlabelled)
    with private_store(), forked_rng(1):
        assert SemisupervisedELBO(alpha=0.0).loss(model, guide, unlabelled) == one


class Constant(nn.Module):
    """λ as a parameter: the gradient can be had in closed form."""

    def __init__(self, rows, labels):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(rows, K))
        self.z = nn.Parameter(0.3 * torch.randn(rows, K, 2 * Z_DIM))
        self.labels = labels

    def forward(self, x):
        if len(x) < len(self.labels):  # the classifier, asked for labelled rows
            return torch.cat([self.logits, self.z.flatten(1)], dim=1)[self.labels >= 0]
        known = (self.labels >= 0)[:, None]
        own = torch.where(known, self.labels[:, None], torch.arange(K))
        z = self.z.gather(1, own[..., None].expand_as(self.z))
        logits = torch.where(known, torch.zeros_like(self.logits), self.logits)
        return torch.cat([logits, z.flatten(1)], dim=1)


def exact_objective(model, encoder, x, alpha):
    """J^α of a mixture of factor analysers, expectations over z in closed form."""
    mean, log_scale = encoder.z.chunk(2, dim=-1)
    variance = torch.exp(2 * log_scale)
    loadings, loc = model.decoder.loadings, model.decoder.loc
    residual = x[:, None, :-1] - loc - torch.einsum("kxz,bkz->bkx", loadings, mean)
    spread = torch.einsum("kxz,bkz->bk", loadings**2, variance)
    fit = -(residual.square().sum(-1) + spread) / (2 * NOISE**2)
    fit = fit - X_DIM / 2 * math.log(2 * math.pi * NOISE**2)
    kl = 0.5 * (variance + mean**2 - 1 - 2 * log_scale).sum(-1)
    by_class = fit - kl - math.log(K)  # L(x, y)
    label, log_q = x[:, -1].long(), encoder.logits.log_softmax(dim=-1)
    known = label >= 0
    own = label.clamp(min=0)[:, None]
    unlabelled = (log_q.exp() * (by_class - log_q)).sum(-1)
    labelled = (by_class + alpha * log_q).gather(1, own).squeeze(1)
    return torch.where(known, labelled, unlabelled).sum()


def test_the_gradient_of_the_objective_is_unbiased():
    model = mixture()
    x = draw(model, 6)
    encoder = Constant(6, x[:, -1].long()).double()
    guide = Amortized({"y": Categorical(K), "z": Given("y", K, DiagonalNormal(Z_DIM))}, encoder)
    parameters = [*encoder.parameters(), *model.decoder.parameters()]

    def flat(scalar):
        grads = torch.autograd.grad(scalar, parameters)
        return torch.cat([g.flatten() for g in grads])

    exact = flat(-exact_objective(model, encoder, x, alpha=1.5))
    loss = SemisupervisedELBO(alpha=1.5, num_particles=20)
    with private_store():
        estimates = torch.stack(
            [flat(loss.differentiable_loss(model, guide, x)) for _ in range(60)]
        )
    stderr = estimates.std(dim=0) / math.sqrt(len(estimates))
    assert sigmas(estimates.mean(dim=0), exact, stderr + 1e-10) < 5


@pytest.mark.fills_store
def test_classic_svi_and_fit_train_every_parameter_of_the_pair():
    for train in ("svi", "fit"):
        model, guide, x = small()
        before = [p.detach().clone() for m in (model, guide) for p in m.parameters()]
        loss = SemisupervisedELBO(alpha=1.0)
        if train == "svi":
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss)
            for _ in range(3):
                svi.step(x)
        else:
            fit = ppvae.fit(model, guide, x, loss=loss, steps=3, lr=1e-2, progress=False)
            assert fit.completed
        after = [p.detach() for m in (model, guide) for p in m.parameters()]
        assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("labelled", [0.0, 0.5, 1.0])
@pytest.mark.fills_store
def test_the_model_draws_what_it_scores(labelled):
    model, guide, _ = small(labelled=labelled)
    trace = pyro.poutine.trace(model).get_trace(size=7)
    x, y, z = (trace.nodes[name]["value"].detach() for name in ("x", "y", "z"))
    ours = ppvae.log_joint(model, x, {"y": y, "z": z}).detach()
    torch.testing.assert_close(ours.sum(), trace.log_prob_sum().detach())
    new = Predictive(pyro.poutine.uncondition(model), guide=guide, num_samples=3)(x)["x"]
    assert new.shape == (3, *x.shape)
    assert torch.equal(new[..., -1], x[:, -1].expand(3, 7))
    assert not torch.equal(new[0], new[1])


def test_a_subsampling_plate_scales_all_terms():
    model, guide, x = small()

    def scaled(program):
        return pyro.poutine.scale(program, scale=3.0)

    for alpha in (0.0, 1.0):
        loss = SemisupervisedELBO(alpha=alpha)
        with private_store(), forked_rng(1):
            plain = loss.loss(model, guide, x)
        with private_store(), forked_rng(1):
            assert loss.loss(scaled(model), scaled(guide), x) == pytest.approx(3 * plain, rel=1e-5)


def test_a_freed_guide_is_the_guide_and_each_class_of_a_labelled_row_is_free():
    model, guide, x = small()
    freed = ppvae.per_datapoint(guide, x, model=model)
    ours = ppvae.log_weights(model, guide, x, 20, seed=3)
    torch.testing.assert_close(ppvae.log_weights(model, freed, x, 20, seed=3), ours)
    assert freed.table("y").weight.shape == (6, K)
    assert freed.table("z").weight.shape == (6, K * 4)


def test_the_best_guide_of_each_row_is_the_exact_posterior():
    model = mixture()
    x = draw(model, 6)
    found = ppvae.fit_per_datapoint(model, exact_guide(model).families, x)
    torch.testing.assert_close(found.elbo, evidence(model, x), rtol=0, atol=1e-6)
    comparison = ppvae.compare(model, exact_guide(model), x, num_samples=100, evidence_samples=100)
    for gap in ("approximation_gap", "amortization_gap"):
        assert abs(comparison.mean(gap)[0]) < 1e-6


def test_class_probabilities_are_the_classifiers_whatever_the_labels_say():
    model, guide, x = small()
    expected = guide.encoder.classifier(x[:, :-1]).softmax(dim=-1).detach()
    torch.testing.assert_close(ppvae.classify(guide, x), expected)
    other = model.rows(x[:, :-1], torch.full((6,), 2))
    assert torch.equal(ppvae.classify(guide, other), ppvae.classify(guide, x))
    freed = ppvae.per_datapoint(guide, x)
    with pytest.raises(ValueError, match=r"guide: a PerDatapoint .* site 'y'"):
        ppvae.classify(freed, x)
    unlabelled = model.rows(x[:, :-1])
    freed = ppvae.per_datapoint(guide, unlabelled)
    torch.testing.assert_close(ppvae.classify(freed, unlabelled), expected)
    with pytest.raises(ValueError, match="guide: expected a categorical site 'c'"):
        ppvae.classify(guide, x, site="c")
    with pytest.raises(ValueError, match="guide: expected a categorical site 'z'"):
        ppvae.classify(guide, x, site="z")


def test_the_network_by_class_is_that_of_the_row_and_the_indicator_side_by_side():
    for hidden in ([], [7], [7, 5]):
        net = MLPByClass(6, K, hidden, 4)
        x = torch.randn(2, 5, 6)
        beside = torch.eye(K).expand(2, 5, K, K)
        inputs = torch.cat([x[:, :, None].expand(2, 5, K, 6), beside], dim=-1)
        torch.testing.assert_close(net(x), net.mlp(inputs))
    with pytest.raises(ValueError, match=r"rows of size 6.*got \(2, 7\)"):
        net(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="num_classes must be positive; got 0"):
        MLPByClass(6, 0, [], 4)


@pytest.mark.parametrize(
    ("bad", "said"), [(3.0, "got 3 in row 1"), (0.5, "got 0.5"), (-2.0, "got -2"), (-0.5, "-0.5")]
)
def test_labels_that_are_no_class_are_refused(bad, said):
    model, guide, x = small()
    x[1, -1] = bad
    message = (
        rf'Site "x", the last column of argument x: expected whole numbers from 0 to 2.*{said}'
    )
    for call in (lambda: model(x), lambda: ppvae.elbo(model, guide, x)):
        with private_store(), pytest.raises(ValueError, match=message):
            call()
    with private_store(), pytest.raises(ValueError, match="last column of argument x"):
        guide(x)
    with pytest.raises(ValueError, match=rf"labels: expected whole numbers.*{said}"):
        model.rows(x[:, :-1], x[:, -1])


def test_unfit_rows_and_arguments_are_refused():
    model, _, x = small()
    with private_store():
        with pytest.raises(ValueError, match=r"expected x of shape \(batch, 7\); got \(6, 6\)"):
            model(x[:, :-1])
        with pytest.raises(ValueError, match='Site "x": a Bernoulli likelihood'):
            model(x + torch.tensor([0.5] + 6 * [0.0]))
    with pytest.raises(ValueError, match=r"x: expected pixels of shape \(batch, 6\).*\(6, 7\)"):
        model.rows(x)
    with pytest.raises(ValueError, match=r"labels: expected one for each row.*\(6,\); got \(5,\)"):
        model.rows(x[:, :-1], torch.zeros(5))
    with pytest.raises(ValueError, match=r"decoder: expected outputs of shape \(batch, 6\)"):
        SemisupervisedVAE(6, 2, 3, MLP(5, [], 7), Bernoulli())
    with pytest.raises(ValueError, match="labelled: expected a share from 0 to 1; got 2"):
        SemisupervisedVAE(6, 2, 3, MLP(5, [], 6), Bernoulli(), labelled=2)
    with pytest.raises(ValueError, match="num_classes must be at least 2; got 1"):
        pairs.semisupervised_vae(6, 2, 1)
    with pytest.raises(ValueError, match="x_dim and z_dim must be positive; got 6 and 0"):
        SemisupervisedVAE(6, 0, 3, MLP(3, [], 6), Bernoulli())
    with pytest.raises(ValueError, match="likelihood: expected 'bernoulli'"):
        pairs.semisupervised_vae(likelihood="poisson")
    with pytest.raises(ValueError, match=r"encoder: .*for every class.*\(6, 3, num_params\)"):
        SemisupervisedEncoder(MLP(6, [], 3), MLP(6, [], 12))(x)
    with pytest.raises(ValueError, match="alpha must be a finite weight of at least 0; got -1"):
        SemisupervisedELBO(alpha=-1)
    with pytest.raises(ValueError, match=r"whose last column is the label, .*got \(5,\)"):
        SemisupervisedELBO().differentiable_loss(*pairs.exponential_gaussian(), torch.ones(5))


def test_another_label_than_the_rows_own_has_no_density():
    model, _, x = small(labelled=1.0)
    with private_store():
        trace = pyro.poutine.trace(model).get_trace(x)
    fn = trace.nodes["x"]["fn"]
    other = model.rows(x[:, :-1], (x[:, -1] + 1) % 3)
    assert bool((fn.log_prob(other) == -torch.inf).all())
    assert not bool(fn.support.check(other).any())
    assert bool(fn.support.check(x).all())


def few_labels(labels, per_class):
    """Labels of the first so many rows of each class, −1 elsewhere."""
    kept = torch.cat([(labels == k).nonzero().squeeze(1)[:per_class] for k in labels.unique()])
    out = torch.full_like(labels, -1)
    out[kept] = labels[kept]
    return out


def trained_on_labels_alone(net, pixels, labels, steps):
    known = labels >= 0
    adam = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(steps):
        adam.zero_grad()
        nn.functional.cross_entropy(net(pixels[known]), labels[known]).backward()
        adam.step()
    return net


def right(probs, labels):
    return int((probs.argmax(dim=-1) == labels).sum())


def test_rows_without_labels_help():
    """Two noisy patterns that differ in half of the pixels, two labels for each."""
    labels = torch.arange(200) % 2
    pattern = labels[:, None] * (torch.arange(30) % 2)
    pixels = (pattern - (torch.rand(200, 30) < 0.25).float()).abs()
    known = few_labels(labels, 2)
    model, guide = pairs.semisupervised_vae(30, 1, 2, [])
    x = model.rows(pixels, known)
    loss = SemisupervisedELBO(alpha=20.0)
    ppvae.fit(model, guide, x, loss=loss, steps=60, batch_size=200, lr=5e-2, progress=False)
    ours = right(ppvae.classify(guide, x), labels)
    alone = right(trained_on_labels_alone(MLP(30, [], 2), pixels, known, 60)(pixels), labels)
    assert ours > alone


@pytest.mark.slow
def test_ten_labels_a_class_beat_a_classifier_of_those_alone_on_digits():
    digits = data.load("digits")
    labels = few_labels(digits.train_labels, 10)
    model, guide = pairs.semisupervised_vae(64, 8, 10, [100])
    x = model.rows(digits.train, labels)
    for rows, alpha, steps in ((x[labels >= 0], 10.0, 100), (x, 1.5, 300)):
        loss = SemisupervisedELBO(alpha=alpha)
        ppvae.fit(model, guide, rows, loss=loss, steps=steps, lr=5e-3, progress=False)
    net = trained_on_labels_alone(MLP(64, [100], 10), digits.train, labels, 200)
    truth = digits.test_labels
    ours = ppvae.classify(guide, model.rows(digits.test)).argmax(dim=-1) == truth
    alone = net(digits.test).argmax(dim=-1) == truth
    # Paired: of the images on which they differ, ours is right on more than chance allows.
    wins, losses = int((ours & ~alone).sum()), int((~ours & alone).sum())
    assert wins - losses > 2 * math.sqrt(wins + losses)
