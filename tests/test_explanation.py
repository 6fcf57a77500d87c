"""The causes of an amortization gap, each against a guide that was built to have it."""

import math
from functools import cache
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

import ppvae
from ppvae import pairs
from ppvae.explanation import PARTS, EncoderTraining, determines, inputs_of
from ppvae.families import DiagonalNormal, FullRankNormal
from ppvae.guides import Amortized, PerDatapoint
from ppvae.isolation import evaluation_mode, forked_rng, modules_of, private_store
from ppvae.models import FactorAnalysis
from ppvae.nn import MLP


def parts_of(explanation):
    """The parts and their errors, by name."""
    return [explanation.dataset[name].to_series() for name in ("gap", "gap_stderr")]


class Columns(nn.Module):
    """An encoder that is given some columns of its rows."""

    def __init__(self, columns, net):
        super().__init__()
        self.columns, self.net = columns, net

    def forward(self, x):
        return self.net(x[:, self.columns])


class Shuffled(nn.Module):
    """An encoder that is given another row than it is to describe."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.flip(0))


# A linear model: the parts in closed form.


@cache
def linear_model():
    with forked_rng(0):
        model = FactorAnalysis(
            6, 2, loadings=torch.randn(6, 2), noise=0.8 * torch.ones(6), loc=torch.zeros(6)
        )
        model = model.double()
        # Drawing as such would free the given loadings: Pyro's store asks for their gradients.
        with torch.no_grad(), private_store(), evaluation_mode(model):
            return model, model(size=2400)


def exact_guide(model, bias=0.0):
    """The linear encoder whose output is the optimum for every row, its means moved by ``bias``."""
    precision = model.posterior(torch.zeros(1, 6).double()).precision_matrix[0].detach()
    net = MLP(6, [], 4).double()
    with torch.no_grad():
        slopes = torch.linalg.solve(precision, (model.loadings / model.noise[:, None] ** 2).mT)
        net.layers[0].weight.copy_(torch.cat([slopes, torch.zeros_like(slopes)]))
        log_scales = -0.5 * precision.diagonal().log()
        net.layers[0].bias.copy_(torch.cat([torch.zeros(2).double() + bias, log_scales]))
    return Amortized(DiagonalNormal(2), net), slopes.detach(), precision


def test_an_optimal_guide_has_nothing_to_explain():
    model, x = linear_model()
    guide, _, _ = exact_guide(model)
    comparison = ppvae.compare(model, guide, x[:50], num_samples=200)
    explanation = ppvae.explain(comparison, x[400:], steps=30)
    assert explanation.cause == "none"
    gap, _ = parts_of(explanation)
    assert float(gap.abs().max()) < 1e-3
    assert "there is no amortization gap to mend" in str(explanation)


def test_a_bias_that_training_mends_is_all_training():
    """Means that are off by b cost ½ bᵀ Λ b nats in every row."""
    model, x = linear_model()
    bias = torch.tensor([0.3, -0.2]).double()
    guide, _, precision = exact_guide(model, bias)
    exact = 0.5 * float(bias @ precision @ bias)
    comparison = ppvae.compare(model, guide, x[:50], num_samples=200)
    explanation = ppvae.explain(comparison, x[400:], steps=150, lr=1e-2)
    gap, stderr = parts_of(explanation)
    assert explanation.cause == "training"
    # What the training leaves is beyond the error of the gap itself, which is Monte Carlo alone.
    assert abs(gap["training"] - exact) < 4 * stderr["training"] + 0.01 * exact
    for part in ("generalisation", "capacity", "missing_inputs"):
        assert abs(gap[part]) < 4 * stderr[part] + 0.01 * exact


def test_missing_inputs_cost_what_the_closed_form_says():
    """An encoder of some columns S: ½ tr(Λ Cov(E[z | x] | x_S)), at its best.

    Its covariance is the posterior's optimum, its mean the regression of the posterior's mean.
    """
    model, x = linear_model()
    full, slopes, precision = exact_guide(model)
    covariance = (model.loadings @ model.loadings.mT + torch.diag(model.noise**2)).detach()
    given, rest = [0, 1, 2], [3, 4, 5]
    regression = torch.linalg.solve(covariance[given][:, given], covariance[given][:, rest]).mT
    of_rest = covariance[rest][:, rest] - regression @ covariance[given][:, rest]
    left = slopes[:, rest] @ of_rest @ slopes[:, rest].mT
    exact = 0.5 * float(torch.trace(precision @ left))
    net = MLP(3, [], 4).double()
    with torch.no_grad():
        net.layers[0].weight.zero_()
        net.layers[0].weight[:2] = slopes[:, given] + slopes[:, rest] @ regression
        net.layers[0].bias.copy_(full.encoder.layers[0].bias)
    guide = Amortized(DiagonalNormal(2), Columns(given, net))
    comparison = ppvae.compare(model, guide, x[:100], num_samples=50)
    explanation = ppvae.explain(comparison, x[400:], steps=100, num_rows=300)
    gap, stderr = parts_of(explanation)
    assert explanation.cause == "missing_inputs"
    assert exact > 10 * stderr["missing_inputs"]
    assert abs(gap["missing_inputs"] - exact) < 4 * stderr["missing_inputs"]
    # The best encoder of these columns is linear, so that no width helps.
    assert abs(gap["training"]) < 0.05 * exact
    assert abs(gap["capacity"]) < 0.05 * exact
    assert "give the encoder the inputs" in str(explanation)
    assert "is given all of x" not in explanation.status
    assert "  missing inputs " in str(explanation)


# A VAE of digits, its decoder shared, with encoders that fall short in different ways.


@cache
def digits():
    data = ppvae.data.load("digits")
    dtype = torch.get_default_dtype()
    train, test = data.train.to(dtype), data.test[:50].to(dtype)
    with forked_rng(0):
        model, guide = pairs.vae(64, 4, [50])
        ppvae.fit(model, guide, train, steps=600, lr=2e-3, progress=False)
    for param in model.parameters():
        param.requires_grad_(False)
    return SimpleNamespace(model=model, guide=guide, train=train, x=test)


def explained(encoder, trained_for, train=None, **arguments):
    """Train an encoder for the digits' frozen decoder, and ask what it lacks."""
    d = digits()
    train = d.train if train is None else train
    guide = Amortized(DiagonalNormal(4), encoder)
    ppvae.fit(d.model, guide, train, steps=trained_for, lr=2e-3, progress=False)
    comparison = ppvae.compare(d.model, guide, d.x, evidence_samples=10, num_samples=100)
    return ppvae.explain(comparison, train, **{"steps": 150, "lr": 3e-3} | arguments), comparison


def check_sum(explanation, comparison):
    gap, _ = parts_of(explanation)
    total = comparison.mean("amortization_gap")[0]
    assert float(gap.sum()) == pytest.approx(total, rel=1e-6, abs=1e-9)
    assert explanation.dataset.attrs["amortization_gap"] == pytest.approx(total, rel=1e-6)


@cache
def stopped_early():
    with forked_rng(1):
        return explained(MLP(64, [50], 8), trained_for=40)


def test_an_encoder_that_was_stopped_early_lacks_training():
    explanation, comparison = stopped_early()
    assert explanation.cause == "training"
    gap, stderr = parts_of(explanation)
    assert gap["training"] > 0.5 * gap.sum()
    assert gap["training"] > 4 * stderr["training"]
    check_sum(explanation, comparison)


def test_an_encoder_of_one_unit_lacks_capacity():
    explanation, comparison = explained(MLP(64, [1], 8), trained_for=500)
    assert explanation.cause == "capacity"
    gap, stderr = parts_of(explanation)
    assert gap["capacity"] > 0.5 * gap.sum()
    assert gap["capacity"] > 4 * stderr["capacity"]
    check_sum(explanation, comparison)


def test_an_encoder_of_shuffled_rows_lacks_inputs():
    explanation, comparison = explained(Shuffled(MLP(64, [50], 8)), trained_for=150)
    assert explanation.cause == "missing_inputs"
    gap, stderr = parts_of(explanation)
    assert gap["missing_inputs"] > 0.8 * gap.sum()
    assert gap["missing_inputs"] > 4 * stderr["missing_inputs"]
    check_sum(explanation, comparison)


@pytest.mark.slow
def test_an_encoder_trained_for_long_on_few_rows_does_not_generalise():
    few = digits().train[:120]
    explanation, comparison = explained(MLP(64, [50], 8), trained_for=800, train=few)
    assert explanation.cause == "generalisation"
    gap, stderr = parts_of(explanation)
    assert gap["generalisation"] > 4 * stderr["generalisation"]
    check_sum(explanation, comparison)


def test_an_encoder_of_all_of_x_is_not_said_to_lack_inputs():
    """After few steps the wide guide has most of the gap left, but not for want of inputs."""
    explanation, _ = explained(MLP(64, [50], 8), trained_for=300, lr=1e-6, batch_size=16)
    gap, stderr = parts_of(explanation)
    assert gap["missing_inputs"] == gap.max()
    assert gap["missing_inputs"] > 4 * stderr["missing_inputs"]
    assert explanation.cause != "missing_inputs"
    assert "The guide is given all of x, so no input is missing" in explanation.status
    assert "  not learned " in str(explanation)
    assert "  missing inputs " not in str(explanation)
    assert "Missing inputs counts" not in explanation.sentence()


@pytest.mark.parametrize(
    ("function", "everything"),
    [
        (torch.log1p, True),
        (torch.sqrt, True),
        (lambda x: (x - 5) / 5, True),
        (lambda x: -x.exp(), True),
        (lambda x: x.round(), False),
        (lambda x: (x - 2) ** 2, False),
        (lambda x: x.flip(-1).log1p() * 0 + x[..., :1], False),
        (lambda x: torch.cat([x[..., :2].log(), x[..., :1]], dim=-1), False),
    ],
    ids=["log1p", "sqrt", "scaled", "falling", "rounded", "folded", "one column", "two columns"],
)
def test_an_encoder_of_an_invertible_function_is_given_all_of_x(function, everything):
    x = torch.rand(200, 3) * 4 + 0.1
    assert determines(function(x), x) is everything


def test_the_curves_are_of_the_trainings_that_the_parts_are_read_from():
    explanation, _ = stopped_early()
    curves = explanation.dataset["elbo"]
    gap, stderr = parts_of(explanation)
    for stage in ("training", "capacity"):
        curve = curves.sel(stage=stage).dropna("step").values
        # On other held-out rows: what was best there brought the part, up to their spread.
        rise = curve.max() - curve[0]
        assert abs(rise - gap[stage]) < 4 * math.sqrt(2) * stderr[stage] + 0.1 * rise
    # The wide guide starts as the guide that was trained further.
    first = float(curves.sel(stage="capacity").isel(step=0))
    assert first == pytest.approx(float(curves.sel(stage="training").max()), abs=1e-4)


# What the guide is given.


def setting(guide, model=None, rows=40, size=3):
    x = torch.randn(rows, size)
    return EncoderTraining.of(model or line(size), guide, x, seed=0), x


def line(size):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).to(x), 1.0))
            mean = z[..., None] * torch.ones(size).to(x)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    return model


@pytest.mark.parametrize("hidden", [[], [4], [4, 4]], ids=str)
def test_the_inputs_of_an_encoder_of_some_columns(hidden):
    given = Amortized(DiagonalNormal(), Columns([2, 0], MLP(2, hidden, 2)))
    about, x = setting(given)
    assert torch.equal(inputs_of(about, x), x[:, [2, 0]])


def test_the_inputs_of_an_encoder_of_other_rows():
    about, x = setting(Amortized(DiagonalNormal(), Shuffled(MLP(3, [4], 2))))
    assert torch.equal(inputs_of(about, x), x.flip(0))


def test_the_inputs_of_functions_that_call_pyro_module():
    net, other = MLP(1, [4], 1), MLP(2, [], 1)

    def guide(x):
        pyro.module("net", net)
        pyro.module("other", other)
        loc, log_scale = net(x[:, :1] ** 2), other(x[:, 1:])
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc[:, 0], log_scale[:, 0].exp()))

    with private_store():
        about, x = setting(guide)
        assert torch.equal(inputs_of(about, x), torch.cat([x[:, :1] ** 2, x[:, 1:]], dim=-1))


@pytest.mark.parametrize("start", [0.0, 0.3])
def test_the_inputs_of_functions_with_bare_parameters(start):
    """The columns that move λ, also where their weight happens to be zero."""

    def guide(x):
        weights = pyro.param("weights", torch.tensor([start, 1.0]))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, [0, 2]] @ weights, 1.0))

    with private_store():
        guide(torch.zeros(1, 3))
        about, x = setting(guide)
        assert torch.equal(inputs_of(about, x), x[:, [0, 2]])


def test_the_inputs_past_a_network_count_too():
    net = MLP(1, [4], 1)

    def guide(x):
        pyro.module("net", net)
        weight = pyro.param("weight", torch.tensor(0.5))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(net(x[:, :1])[:, 0] + weight * x[:, 2], 1.0))

    with private_store():
        about, x = setting(guide)
        assert torch.equal(inputs_of(about, x), x[:, [0, 2]])


def test_a_summary_is_not_what_it_is_a_summary_of():
    net = MLP(1, [4], 1)

    def guide(x):
        pyro.module("net", net)
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(net(x.sum(dim=-1, keepdim=True))[:, 0], scale))

    with private_store():
        about, x = setting(guide)
        assert torch.equal(inputs_of(about, x), x.sum(dim=-1, keepdim=True))


def test_a_guide_without_inputs_is_given_nothing():
    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.2))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc.expand(len(x)), 1.0))

    with private_store():
        about, x = setting(guide)
        assert inputs_of(about, x).shape == (40, 0)
    x = torch.randn(300, 3)
    comparison = ppvae.compare(line(3), guide, x[:50], num_samples=100)
    explanation = ppvae.explain(comparison, x[50:], steps=150, lr=1e-2)
    # The posterior is N(Σx / 4, 1/4). Given nothing, ½ 4 Var(Σx / 4) = 3 / 8 nats are lost; that
    # this guide cannot change its scale of 1 costs it ½ (4 − 1 − log 4) on top.
    gap, stderr = parts_of(explanation)
    assert abs(gap["missing_inputs"] - 3 / 8) < 4 * stderr["missing_inputs"]
    assert abs(gap["capacity"] - 0.5 * (3 - math.log(4))) < 4 * stderr["capacity"] + 0.02


# The parts on guides of all kinds, and what is left alone.


class Whole(nn.Module):
    """Encoder and decoder in one module, as in Pyro's tutorial."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Softplus(), nn.Linear(8, 4))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, dim=-1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Tied(Whole):
    """The encoder's first layer is the decoder's last, turned round."""

    def guide(self, x):
        h = nn.functional.softplus(x @ self.decoder[2].weight)
        loc, log_scale = self.encoder[2](h).chunk(2, dim=-1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Owned(nn.Module):
    """A guide of the library for the same model."""

    model = Whole.model

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Softplus(), nn.Linear(8, 4))
        self.guide = Amortized(DiagonalNormal(2), MLP(4, [8], 4))


class Bare(Whole):
    """The encoder's weights are tensors of `pyro.param`, one of them constrained."""

    def guide(self, x):
        weights = pyro.param("weights", 0.1 * torch.eye(4, 2))
        scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x @ weights, scale.expand(len(x), 2)).to_event(1))


def everything(*programs):
    """Every tensor and flag of the programs and of the store, and which tensor it is."""
    found = {}
    for number, module in enumerate(modules_of(*programs)):
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            found[f"{number}.{name}"] = tensor
        for name, part in module.named_modules():
            found[f"{number}.{name}.training"] = part.training
    found |= {f"store.{k}": p for k, p in pyro.get_param_store().named_parameters()}
    return {
        key: (
            (id(v), v.detach().clone(), v.requires_grad, None if v.grad is None else v.grad.clone())
            if isinstance(v, torch.Tensor)
            else v
        )
        for key, v in found.items()
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, tuple):
            assert value[0] == after[key][0], key
            assert torch.equal(value[1], after[key][1]), key
            assert value[2] == after[key][2], key
            assert (value[3] is None) == (after[key][3] is None), key
            assert value[3] is None or torch.equal(value[3], after[key][3]), key
        else:
            assert value == after[key], key


@pytest.mark.fills_store
@pytest.mark.parametrize("kind", [Owned, Whole, Tied, Bare])
def test_explaining_leaves_everything_as_it_was(kind):
    pair = kind()
    x = torch.randn(160, 4)
    # A step of SVI, so that the store and the gradients hold something of the user's.
    svi = pyro.infer.SVI(
        pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO()
    )
    svi.step(x)
    frozen = next(p for p in pair.decoder.parameters())
    frozen.requires_grad_(False)
    frozen.grad = torch.ones_like(frozen)
    pair.decoder[1].eval()
    comparison = ppvae.compare(pair.model, pair.guide, x[:40], num_samples=50, evidence_samples=20)
    programs = (pair, pair.model, pair.guide)
    before, rng = everything(*programs), torch.get_rng_state()
    explanation = ppvae.explain(comparison, x[40:], steps=15, lr=1e-2)
    assert torch.equal(rng, torch.get_rng_state())
    assert_same(before, everything(*programs))
    check_sum(explanation, comparison)
    if kind is Bare:
        again = ppvae.explain(comparison, x[40:], steps=15, lr=1e-2)
        assert again.dataset.equals(explanation.dataset)


@pytest.mark.parametrize("kind", [Owned, Whole, Tied])
def test_the_models_parameters_do_not_move_while_the_guide_is_trained(kind):
    """Or else the parts would be of different models, and not gaps to one evidence."""
    pair = kind()
    x = torch.randn(160, 4)
    comparison = ppvae.compare(pair.model, pair.guide, x[:40], num_samples=50, evidence_samples=20)
    start = {k: p.detach().clone() for k, p in pair.named_parameters()}
    moved = set()

    def look(module, arguments):
        moved.update(k for k, p in pair.named_parameters() if not torch.equal(p, start[k]))

    hook = pair.decoder.register_forward_pre_hook(look)
    ppvae.explain(comparison, x[40:], steps=20, lr=1e-2)
    hook.remove()
    assert all(name.startswith(("encoder.", "guide.encoder.")) for name in moved)
    assert moved


def test_a_guide_among_several_is_explained_by_name():
    model, x = linear_model()
    good, _, _ = exact_guide(model)
    bad, _, _ = exact_guide(model, bias=torch.tensor([0.5, 0.5]).double())
    comparison = ppvae.compare(model, {"good": good, "bad": bad}, x[:60], num_samples=100)
    explanation = ppvae.explain(comparison, x[400:1000], guide="bad", steps=150, lr=1e-2)
    assert explanation.cause == "training"
    gap, _ = parts_of(explanation)
    total = comparison.mean("amortization_gap", "bad")[0]
    assert float(gap.sum()) == pytest.approx(total, rel=1e-6)
    for guide in (None, "ugly"):
        with pytest.raises(ValueError, match=r"guide: expected one of \['good', 'bad'\]"):
            ppvae.explain(comparison, x[400:], guide=guide, steps=5)


# What is printed.


def test_the_table_holds_the_parts_and_their_shares():
    explanation, comparison = stopped_early()
    gap, stderr = parts_of(explanation)
    total = comparison.mean("amortization_gap")[0]
    lines = str(explanation).splitlines()
    assert lines[0].startswith(f"Amortization gap of {total:.4f} nats a datum")
    labels = ["generalisation", "training", "capacity", "not learned"]  # It is given all of x.
    for part, label in zip(PARTS, labels, strict=True):
        [line] = [each for each in lines if each.startswith(f"  {label} ")]
        value, sign, error, share = line.removeprefix(f"  {label}").split()
        assert float(value) == pytest.approx(gap[part], abs=5.1e-5)
        assert sign == "±"
        assert float(error) == pytest.approx(stderr[part], abs=5.1e-5)
        assert float(share.rstrip("%")) == pytest.approx(100 * gap[part] / total, abs=0.51)
    assert "Measured on 50 training rows that the repairs did not see" in str(explanation)
    assert explanation.dataset.attrs["rows_measured"] == 50


# What is refused.


@pytest.mark.parametrize(
    ("x_train", "words"),
    [
        (torch.rand(100, 5), ["x_train", "(6,)", "(5,)"]),
        (torch.rand(100, 6, dtype=torch.float64), ["x_train", "float32", "float64"]),
        (torch.rand(29, 6), ["x_train", "30", "29"]),
        ((torch.rand(100, 6) > 0.5).float(), ["x_train", "binary", "binarisation"]),
        (torch.full((100, 6), torch.nan), ["x_train", "NaN"]),
        ([[0.0] * 6] * 100, ["x_train", "list"]),
    ],
)
def test_training_rows_of_another_kind_are_refused(x_train, words):
    model, guide = (each.float() for each in pairs.factor_analysis())
    comparison = ppvae.compare(model, guide, torch.rand(10, 6).float(), num_samples=20)
    with pytest.raises(ValueError) as error:
        ppvae.explain(comparison, x_train, steps=5)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("batch_size", 0)])
def test_counts_below_one_are_refused(name, value):
    model, guide = pairs.factor_analysis()
    comparison = ppvae.compare(model, guide, torch.rand(10, 6), num_samples=20)
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        ppvae.explain(comparison, torch.rand(100, 6), **{name: value})


def test_a_guide_that_keeps_parameters_for_each_datum_has_no_encoder():
    model, _ = pairs.factor_analysis()
    x = torch.randn(60, 6)
    guide = PerDatapoint(FullRankNormal(3), 60)
    comparison = ppvae.compare(model, guide, x, num_samples=20)
    with pytest.raises(ValueError, match="PerDatapoint.*no encoder"):
        ppvae.explain(comparison, x, steps=5)


@pytest.mark.fills_store
def test_auto_normal_is_refused_too():
    model = line(3)
    x = torch.randn(60, 3)
    guide = AutoNormal(model)
    guide(x)
    comparison = ppvae.compare(model, guide, x, num_samples=20)
    with pytest.raises(ValueError, match="datum"):
        ppvae.explain(comparison, torch.randn(90, 3), steps=5)
    # With as many training rows it runs, but its table belongs to the compared ones.
    with pytest.raises(ValueError, match="datum"):
        ppvae.explain(comparison, x, steps=5)
