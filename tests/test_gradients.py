"""Gradient estimators: their variances against closed forms, and what is left alone."""

import copy
import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoNormal
from torch import nn

import ppvae
from ppvae import pairs, plots
from ppvae.families import DiagonalNormal
from ppvae.gradients import PROGRAMS, gradient_variance
from ppvae.gradients.moments import Moments, block_sizes, statistics
from ppvae.guides import Amortized, PerDatapoint
from ppvae.isolation import forked_rng, private_store
from ppvae.nn import MLP
from ppvae.objectives import IWAE, BetaELBO, DReG, Linear, StickingTheLanding

PYROS = [Trace_ELBO(), TraceMeanField_ELBO(), TraceGraph_ELBO()]
M, S = 0.7, 0.8
ROWS = torch.tensor([1.5, -0.5, 2.0], dtype=torch.float64)


class ScoreNormal(dist.Normal):
    """A normal without reparameterised draws."""

    has_rsample = False


class Conjugate(pyro.nn.PyroModule):
    """z ~ N(0, 1), x | z ~ N(z, 1)."""

    def forward(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), torch.ones_like(x)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class OneNormal(pyro.nn.PyroModule):
    """q(z) = N(m, s²) for every row; m alone is trained."""

    def __init__(self, kind: Any, loc: float = M, scale: float = S) -> None:
        super().__init__(f"OneNormal_{kind.__name__}")
        self.kind, self.scale = kind, scale
        self.m = nn.Parameter(torch.tensor(loc, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.kind(self.m.expand(len(x)), torch.full_like(x, self.scale)))


def rows(model: Any, count: int) -> torch.Tensor:
    """Rows drawn from a model, which would leave its parameters in Pyro's store."""
    with private_store():
        return model(size=count).detach()


def figures(result: ppvae.GradientVariance, estimator: str, group: str, name: str) -> Any:
    one = result.dataset.sel(estimator=estimator, group=group)
    return float(one[name]), float(one[f"{name}_stderr"])


# With z = m + s e the log weight of a row is c + b e + a e², where
#   a = 1/2 − s²,  b = s (x − 2 m),  c = log s + ½ log 2π − … − m²/2 − (x − m)²/2;
# the exact gradient of its ELBO is x − 2 m.


def closed_form(kind: Any) -> float:
    """Variance of the gradient per datum with respect to m, a mean over independent rows."""
    variances = []
    for x in ROWS.tolist():
        a, b = 0.5 - S**2, S * (x - 2 * M)
        if kind is dist.Normal:
            # d/dm of log p(x, z) − log q(z; m, s) at z = m + s e: the entropy is free of m, and so
            # x − 2 z, whose variance is 4 s². Pyro's Trace_ELBO differentiates log q along z − m,
            # which does not move with m.
            variances.append(4 * S**2)
        else:
            # (e / s) (c + b e + a e²), moments of e: 1, 3, 15.
            c = math.log(S) - 0.5 * math.log(2 * math.pi) - 0.5 * M**2 - 0.5 * (x - M) ** 2
            second = c**2 + 3 * b**2 + 15 * a**2 + 6 * a * c
            variances.append(second / S**2 - (x - 2 * M) ** 2)
    return sum(variances) / len(variances) ** 2


@pytest.mark.parametrize("kind", [dist.Normal, ScoreNormal], ids=["reparameterised", "score"])
def test_variance_and_mean_are_those_of_the_closed_form(kind: Any) -> None:
    result = gradient_variance(
        Conjugate(), OneNormal(kind), ROWS, estimators=[Trace_ELBO()], num_draws=600
    )
    value, stderr = figures(result, "Trace_ELBO", "guide", "variance")
    exact = closed_form(kind)
    assert stderr < 0.25 * exact
    assert value == pytest.approx(exact, abs=5 * stderr)
    gradient = abs(float((ROWS - 2 * M).mean()))
    value, stderr = figures(result, "Trace_ELBO", "guide", "gradient_norm")
    assert 0 < stderr < 1.2 * math.sqrt(exact / 600)
    assert value == pytest.approx(gradient, abs=5 * stderr)
    value, stderr = figures(result, "Trace_ELBO", "guide", "snr")
    assert value == pytest.approx(gradient / math.sqrt(exact), abs=5 * stderr)


@pytest.mark.parametrize("scale", [0.25, math.sqrt(0.5), 1.0, 1.4])
def test_an_analytic_kl_and_sticking_the_landing_have_their_places(scale: float) -> None:
    """The posterior has precision P = 2 here; the slope in e of each gradient for m is known.

    Analytic beats sampled everywhere, as the likelihood is log-concave. Sticking the landing has no
    noise where q is as wide as the posterior, is level with analytic where it is as wide as the
    prior, and is the worst of the three where q is much too narrow.
    """
    precision = 2.0
    slopes = {
        "Trace_ELBO": precision,
        "BetaELBO": precision - 1,
        "StickingTheLanding": precision - 1 / scale**2,
    }
    result = gradient_variance(
        Conjugate(),
        OneNormal(dist.Normal, scale=scale),
        ROWS,
        estimators=[Trace_ELBO(), BetaELBO(), StickingTheLanding()],
        num_draws=300,
    )
    for name, slope in slopes.items():
        value, stderr = figures(result, name, "guide", "variance")
        exact = slope**2 * scale**2 / len(ROWS)
        assert stderr < 0.2 * exact + 1e-20
        assert value == pytest.approx(exact, abs=5 * stderr + 1e-20)


class Known(ELBO):
    """An estimator whose gradient is known: a normal vector about a mean."""

    target = "a known gradient"
    mean = torch.tensor([3.0, 0.0, -4.0], dtype=torch.float64)
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)

    def loss_and_grads(self, model: Any, guide: Any, x: torch.Tensor) -> float:
        draw = self.mean + self.scale * torch.randn(3, dtype=torch.float64)
        # The loss of all rows, whose negative gradient per datum is the draw.
        for p, part in zip(guide.parts, draw.split([1, 2]), strict=True):
            p.grad = -len(x) * part
        return 0.0

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


class TwoTensors(pyro.nn.PyroModule):
    def __init__(self) -> None:
        super().__init__("TwoTensors")
        self.parts = nn.ParameterList(
            [torch.zeros(1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
        )

    def forward(self, x: torch.Tensor) -> None:
        loc = self.parts[0] + self.parts[1].sum()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc.expand(len(x)), torch.ones_like(x)))


def test_standard_errors_cover_at_their_rate() -> None:
    repetitions, num_draws = 60, 40
    results = [
        gradient_variance(
            Conjugate(), TwoTensors(), ROWS, estimators=[Known()], num_draws=num_draws, seed=seed
        )
        for seed in range(repetitions)
    ]
    variance = float(Known.scale.square().sum())
    truth = {"variance": variance, "gradient_norm": 5.0, "snr": 5.0 / math.sqrt(variance)}
    for name, exact in truth.items():
        found = np.array([figures(r, "Known", "guide", name) for r in results])
        scores = (found[:, 0] - exact) / found[:, 1]
        # The standard deviation of 60 scores has a relative error of about 1/√118.
        assert abs(scores.std() - 1) < 4 / math.sqrt(2 * repetitions - 2), name
        assert abs(found[:, 0].mean() - exact) < 5 * found[:, 0].std() / math.sqrt(repetitions)


def test_statistics_are_those_of_all_draws_at_once() -> None:
    draws = torch.randn(45, 7, dtype=torch.float64) + torch.arange(7)
    blocks = block_sizes(45)
    assert (len(blocks), float(blocks.sum()), float(blocks.max())) == (32, 45, 2)
    moments = Moments(blocks, [3, 4])
    for draw in draws:
        moments.add(draw)
    found = statistics(moments, {"both": [0, 1], "last": [1]}, torch.float64)
    ends = torch.cumsum(blocks, 0).long().tolist()
    for name, part in (("both", draws), ("last", draws[:, 3:])):

        def directly(g: torch.Tensor) -> torch.Tensor:
            variance = g.var(dim=0).sum()
            square = g.mean(0).square().sum() - variance / len(g)
            return torch.stack([variance, square.sqrt(), (square / variance).sqrt()])

        whole = directly(part)
        left = [
            directly(torch.cat([part[: end - size], part[end:]]))
            for end, size in zip(ends, blocks.long().tolist(), strict=True)
        ]
        for i, key in enumerate(("variance", "gradient_norm", "snr")):
            assert found[name][key] == pytest.approx(float(whole[i]), rel=1e-12)
        # With equal weights for blocks of one and two draws the error is nearly the same.
        plain = torch.stack(left).var(dim=0, correction=0).mul(len(left) - 1).sqrt()
        assert found[name]["variance_stderr"] == pytest.approx(float(plain[0]), rel=0.2)


def test_leaving_out_single_draws_is_the_textbook_jackknife() -> None:
    draws = torch.randn(20, 3, dtype=torch.float64) + 2
    moments = Moments(block_sizes(20), [3])
    for draw in draws:
        moments.add(draw)
    found = statistics(moments, {"all": [0]}, torch.float64)["all"]
    left = torch.stack([torch.cat([draws[:i], draws[i + 1 :]]).var(dim=0).sum() for i in range(20)])
    expected = math.sqrt(19 / 20 * float((left - left.mean()).square().sum()))
    assert found["variance_stderr"] == pytest.approx(expected, rel=1e-10)


def test_a_large_mean_does_not_drown_a_small_variance() -> None:
    noise = torch.randn(50, 4, dtype=torch.float64)
    moments = Moments(block_sizes(50), [4])
    for draw in noise:
        moments.add(1e8 + 1e-4 * draw)
    found = statistics(moments, {"all": [0]}, torch.float64)["all"]
    # Of the draws themselves no more is left than 1e8 · 2⁻⁵² beside 1e-4.
    assert found["variance"] == pytest.approx(1e-8 * float(noise.var(dim=0).sum()), rel=1e-3)


# --- Pairs -------------------------------------------------------------------------------------


def discrete() -> Any:
    model, guide = pairs.sigmoid_belief_network(x_dim=4, z_dims=[2, 2], hidden=[5], baseline=[3])
    model, guide = model.double(), guide.double()
    return model, guide, rows(model, 4)


def test_enumeration_has_no_noise_and_the_mean_of_the_others() -> None:
    model, guide, x = discrete()
    estimators: list[ELBO] = [TraceEnum_ELBO(), TraceGraph_ELBO(), Trace_ELBO()]
    result = gradient_variance(model, guide, x, estimators=estimators, num_draws=40)
    ds = result.dataset
    assert (ds["variance"].sel(estimator="TraceEnum_ELBO", group=["model", "guide"]) == 0).all()
    assert (ds["snr"].sel(estimator="TraceEnum_ELBO") == np.inf).all()
    assert (ds["variance"].sel(estimator=["TraceGraph_ELBO", "Trace_ELBO"]) > 0).all()
    assert result.lowest("guide") == {"ELBO": "TraceEnum_ELBO"}
    for group in ("model", "guide"):
        exact, _ = figures(result, "TraceEnum_ELBO", group, "gradient_norm")
        for name in ("TraceGraph_ELBO", "Trace_ELBO"):
            value, stderr = figures(result, name, group, "gradient_norm")
            assert value == pytest.approx(exact, abs=5 * stderr)
    # What a baseline predicts is no part of q.
    assert not [group for group in ds["group"].values if "baseline" in group]
    # A guide that its author marked is taken as it is.
    marked = gradient_variance(
        model, config_enumerate(guide), x, estimators=[TraceEnum_ELBO()], num_draws=8
    )
    np.testing.assert_allclose(
        marked.dataset["gradient_norm"].sel(estimator="TraceEnum_ELBO", group="guide"),
        figures(result, "TraceEnum_ELBO", "guide", "gradient_norm")[0],
        rtol=1e-12,
    )


def test_an_estimator_without_noise_has_no_variance() -> None:
    """The analytic KL of a guide whose model does not read z is all of the gradient."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), torch.ones_like(x)))
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0), obs=x)

    result = gradient_variance(
        model,
        OneNormal(dist.Normal),
        ROWS,
        estimators=[TraceMeanField_ELBO(), Trace_ELBO()],
        num_draws=100,
    )
    variance, _ = figures(result, "TraceMeanField_ELBO", "guide", "variance")
    norm, _ = figures(result, "TraceMeanField_ELBO", "guide", "gradient_norm")
    assert norm == pytest.approx(M, rel=1e-12)
    assert variance <= 1e-20 * norm**2
    # Sampled, the gradient of −z²/2 at z = m + s e is −z.
    value, stderr = figures(result, "Trace_ELBO", "guide", "variance")
    assert value == pytest.approx(S**2 / len(ROWS), abs=5 * stderr)


def test_groups_are_what_the_densities_depend_on() -> None:
    model, guide = pairs.vae(x_dim=6, z_dim=2, hidden=[5], pseudo_inputs=3)
    x = rows(model, 4)
    frozen = guide.encoder.layers[0].bias
    frozen.requires_grad_(False)
    result = gradient_variance(model, guide, x, estimators=[Trace_ELBO()], num_draws=8)
    ds = result.dataset
    programs = dict(zip(ds["group"].values.tolist(), ds["program"].values.tolist(), strict=True))
    assert {p for g, p in programs.items() if g.startswith("guide.encoder")} == {"shared"}
    assert "guide.encoder.layers.0.bias" not in programs
    assert "guide" not in programs  # All of its parameters are the prior's too.
    own = {g for g, p in programs.items() if p == "model"} - {"model"}
    assert {g.split(".")[1] for g in own} == {"decoder", "prior"}
    sizes = dict(zip(ds["group"].values.tolist(), ds["num_elements"].values.tolist(), strict=True))
    encoder = sum(p.numel() for p in guide.parameters() if p.requires_grad)
    assert sizes["shared"] == encoder
    assert sizes["model"] == sum(p.numel() for p in model.parameters() if p.requires_grad) - encoder
    tensors = ds["variance"].sel(group=sorted(own)).sum("group")
    np.testing.assert_allclose(ds["variance"].sel(group="model"), tensors, rtol=1e-9)
    assert not frozen.requires_grad


def functions(x: torch.Tensor) -> tuple[Any, Any]:
    """A pair of plain functions with bare parameters, one of them of both."""

    def model(x: torch.Tensor) -> None:
        shift = pyro.param("shift", torch.zeros((), dtype=x.dtype))
        noise = pyro.param(
            "noise", torch.ones((), dtype=x.dtype), constraint=dist.constraints.positive
        )
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), torch.ones_like(x)))
            pyro.sample("x", dist.Normal(z + shift, noise), obs=x)

    def guide(x: torch.Tensor) -> None:
        shift = pyro.param("shift", torch.zeros((), dtype=x.dtype))
        slope = pyro.param("slope", torch.full((), 0.4, dtype=x.dtype))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(slope * (x - shift), torch.full_like(x, S)))

    return model, guide


def test_plain_functions_with_bare_parameters() -> None:
    model, guide = functions(ROWS)
    result = gradient_variance(model, guide, ROWS, estimators=PYROS, num_draws=200)
    ds = result.dataset
    programs = dict(zip(ds["group"].values.tolist(), ds["program"].values.tolist(), strict=True))
    tensors = {g: p for g, p in programs.items() if g not in PROGRAMS}
    assert tensors == {"shift": "shared", "noise": "model", "slope": "guide"}
    # d/d slope of the ELBO of a row with mean a = slope x: x (x − 2 a).
    exact = abs(float((ROWS * (ROWS - 0.8 * ROWS)).mean()))
    for name in ds["estimator"].values.tolist():
        value, stderr = figures(result, name, "slope", "gradient_norm")
        assert value == pytest.approx(exact, abs=5 * stderr)
    # With the analytic KL only the likelihood is drawn: x (x − z) instead of x (x − 2 z).
    half, error = figures(result, "TraceMeanField_ELBO", "slope", "variance")
    full, other = figures(result, "Trace_ELBO", "slope", "variance")
    assert full - 4 * half == pytest.approx(0, abs=5 * math.hypot(4 * error, other))


def test_rows_of_a_table_and_latents_of_all_rows() -> None:
    x = ROWS
    result = gradient_variance(
        Conjugate(), PerDatapoint(DiagonalNormal(), 3).double(), x, num_draws=8
    )
    ds = result.dataset
    assert ds["group"].values.tolist() == ["guide", "guide.tables.site_z.weight"]
    assert ds.attrs["num_data"] == 3
    model, guide = pairs.bayesian_neural_network(hidden=(2,), num_data=50)
    x = rows(model, 50)[:10]
    estimators = {"one": Trace_ELBO(), "all": RenyiELBO(alpha=0.0, num_particles=2)}
    result = gradient_variance(model, guide, x, estimators=estimators, num_draws=8)
    assert result.dataset.attrs["num_data"] == 50
    assert result.dataset["target"].values.tolist() == [
        "ELBO",
        "Rényi bound of all rows at once, α = 0, K = 2",
    ]
    twice = pyro.poutine.scale(model, 2.0)
    with pytest.raises(ValueError, match="weigh"):
        gradient_variance(twice, guide, x)


def test_renyis_weights_are_those_of_a_row_and_so_is_its_target() -> None:
    """Of a plate's rows Pyro weighs each by itself, as `IWAE` does; with a scale it does not."""
    model, guide = Conjugate(), OneNormal(dist.Normal)
    x = torch.full((20,), 1.5, dtype=torch.float64)
    renyi = RenyiELBO(alpha=0.0, num_particles=4, vectorize_particles=True)
    both: list[ELBO] = [renyi, IWAE(num_particles=4)]
    result = gradient_variance(model, guide, x, estimators=both, num_draws=150)
    assert result.dataset["target"].values.tolist() == ["IWAE bound, K = 4"] * 2
    for name in ("variance", "gradient_norm"):
        one, error = figures(result, "RenyiELBO(K=4)", "guide", name)
        two, other = figures(result, "IWAE(K=4)", "guide", name)
        assert one == pytest.approx(two, abs=5 * math.hypot(error, other))
    scaled = pyro.poutine.scale(model, 3.0)
    found = gradient_variance(scaled, guide, x, estimators=[renyi], num_draws=8)
    assert "the model's scale inside its weights" in str(found.dataset["target"].values[0])


# --- What is refused ----------------------------------------------------------------------------


class Broken(Trace_ELBO):
    def loss_and_grads(self, model: Any, guide: Any, x: torch.Tensor) -> float:
        raise KeyError("no such thing")


class Infinite(Trace_ELBO):
    def loss_and_grads(self, model: Any, guide: Any, x: torch.Tensor) -> float:
        super().loss_and_grads(model, guide, x)
        return math.inf


class Sometimes(Trace_ELBO):
    """Finite at first, and no longer for some of the draws."""

    def loss_and_grads(self, model: Any, guide: Any, x: torch.Tensor) -> float:
        loss = super().loss_and_grads(model, guide, x)
        return math.nan if pyro.infer.is_validation_enabled() and loss > Sometimes.most else loss

    most = math.inf


def test_estimators_that_do_not_apply_say_why() -> None:
    model, guide = Conjugate(), OneNormal(dist.Normal)
    estimators: list[ELBO] = [Trace_ELBO(), TraceEnum_ELBO(), JitTrace_ELBO(), TraceTMC_ELBO()]
    estimators += [Broken(), Infinite(), ReweightedWakeSleep(insomnia=0.5)]
    result = gradient_variance(model, guide, ROWS, estimators=estimators, num_draws=8)
    assert result.dataset["estimator"].values.tolist() == ["Trace_ELBO"]
    expected = {
        "TraceEnum_ELBO": "no site to enumerate, so that it would be Trace_ELBO",
        "JitTrace_ELBO": "Trace_ELBO draws the same gradients",
        "TraceTMC_ELBO": "no site of the guide is marked",
        "Broken": "KeyError: 'no such thing'",
        "Infinite": "not finite",
        "ReweightedWakeSleep(K=2)": "TypeError: .*observations",
    }
    assert set(result.refused) == set(expected)
    for name, words in expected.items():
        assert re.search(words, result.refused[name]), result.refused[name]
        assert f"does not apply: {name}: {result.refused[name]}" in str(result)
    with pytest.raises(ValueError, match="none applies to this pair. Broken: KeyError"):
        gradient_variance(model, guide, ROWS, estimators=[Broken()])


def test_an_estimator_that_overflows_later_is_refused_then(monkeypatch: Any) -> None:
    model, guide = Conjugate(), OneNormal(dist.Normal)
    with forked_rng(0), private_store():
        losses = [Trace_ELBO().loss(model, guide, ROWS) for _ in range(50)]
    monkeypatch.setattr(Sometimes, "most", float(np.quantile(losses, 0.9)))
    result = gradient_variance(model, guide, ROWS, estimators=[Sometimes(), Trace_ELBO()])
    assert "not finite, at draw" in result.refused["Sometimes"]
    assert result.dataset["relative_cost"].values.tolist() == [1.0]


def test_draws_without_gradient_are_refused_where_pyro_would_not_say() -> None:
    model, guide = Conjugate(), OneNormal(ScoreNormal)
    with pyro.settings.context(validate_infer=False):
        result = gradient_variance(
            model, guide, ROWS, estimators=[TraceMeanField_ELBO(), TraceGraph_ELBO()], num_draws=8
        )
    assert "reparameterized" in result.refused["TraceMeanField_ELBO"]
    renyi = gradient_variance(
        model, guide, ROWS, estimators=[RenyiELBO(alpha=0.0, num_particles=4)], num_draws=8
    )
    assert "infinitely many draws" in str(renyi.dataset["target"].values[0])
    assert figures(renyi, "RenyiELBO(K=4)", "guide", "gradient_norm") == (0, 0)


def test_an_analytic_kl_is_refused_where_sites_are_in_another_order() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            top = pyro.sample("top", dist.Normal(torch.zeros_like(x), 1.0))
            low = pyro.sample("low", dist.Normal(top, 1.0))
            pyro.sample("x", dist.Normal(low, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        m = pyro.param("m", torch.zeros((), dtype=x.dtype))
        with pyro.plate("data", len(x), dim=-1):
            low = pyro.sample("low", dist.Normal(m.expand(len(x)), 1.0))
            pyro.sample("top", dist.Normal(0.5 * low, 1.0))

    result = gradient_variance(model, guide, ROWS, estimators=PYROS, num_draws=8)
    assert (
        "the model draws top, low and the guide low, top" in result.refused["TraceMeanField_ELBO"]
    )
    assert result.dataset["estimator"].values.tolist() == ["Trace_ELBO", "TraceGraph_ELBO"]


def test_an_analytic_kl_is_refused_where_it_forgets_a_change_of_variables() -> None:
    """Of AutoNormal for z > 0 its loss is wrong; for real z it is right."""

    def positive(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.LogNormal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    result = gradient_variance(positive, AutoNormal(positive), ROWS, estimators=PYROS, num_draws=8)
    assert "leaves out the change of variables of z" in result.refused["TraceMeanField_ELBO"]
    assert result.dataset["estimator"].values.tolist() == ["Trace_ELBO", "TraceGraph_ELBO"]
    model = Conjugate()
    result = gradient_variance(model, AutoNormal(model), ROWS, estimators=PYROS, num_draws=8)
    assert not result.refused
    assert result.dataset["group"].values.tolist() == [
        "guide",
        "guide.locs.z_unconstrained",
        "guide.scales.z_unconstrained",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_draws": 7}, "num_draws must be at least 8; got 7"),
        ({"estimators": []}, "at least one Pyro ELBO"),
        ({"estimators": Trace_ELBO()}, "expected a sequence of Pyro ELBO objects"),
        ({"estimators": [Trace_ELBO]}, "Trace_ELBO is a class; pass an object, Trace_ELBO"),
        ({"estimators": {"mine": 3}}, "'mine' is no pyro.infer.ELBO object"),
        ({"estimators": [Trace_ELBO(), Trace_ELBO()]}, "several are called Trace_ELBO. Give them"),
        ({"x": torch.zeros(0)}, "x has no rows"),
        ({"guide": lambda x: pyro.sample("other", dist.Normal(x, 1.0))}, "latent sites"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"model": Conjugate(), "guide": OneNormal(dist.Normal), "x": ROWS} | arguments
    with pytest.raises(ValueError, match=message):
        gradient_variance(**given)


def test_nothing_to_measure_is_said() -> None:
    guide = OneNormal(dist.Normal)
    guide.m.requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing to measure"):
        gradient_variance(Conjugate(), guide, ROWS)


# --- What is left alone --------------------------------------------------------------------------


@pytest.mark.fills_store
def test_everything_of_the_callers_is_as_it_was() -> None:
    model, guide = pairs.factor_analysis(x_dim=3, z_dim=1)
    guide = Amortized(DiagonalNormal(1), nn.Sequential(MLP(3, [4], 2), nn.Dropout(0.5)))
    x = rows(model, 5)
    kept = torch.ones(3)
    first, *others = guide.parameters()
    first.grad = torch.full_like(first, 7.0)
    others[0].requires_grad_(False)
    bare = pyro.param("bare", kept)
    bare.unconstrained().grad = torch.full((3,), 2.0)
    guide.encoder[0].eval()
    estimator = TraceGraph_ELBO(vectorize_particles=True, num_particles=2)

    def used(x: torch.Tensor) -> Any:
        pyro.param("bare")
        pyro.param("new", torch.zeros(2))
        return guide(x)

    def state() -> Any:
        return SimpleNamespace(
            flags=[p.requires_grad for p in [*model.parameters(), *guide.parameters()]],
            training=[m.training for m in [*model.modules(), *guide.modules()]],
            values=[p.detach().clone() for p in [*model.parameters(), *guide.parameters()]],
            grads=[p.grad for p in [*model.parameters(), *guide.parameters()]],
            rng=torch.get_rng_state(),
            store={name: id(p) for name, p in pyro.get_param_store().named_parameters()},
            estimator=copy.copy(vars(estimator)),
        )

    before = state()
    with torch.no_grad():
        result = gradient_variance(model, used, x, estimators=[estimator], num_draws=8)
    after = state()
    for name in ("flags", "training", "store", "estimator"):
        assert getattr(before, name) == getattr(after, name), name
    assert all(one is other for one, other in zip(before.grads, after.grads, strict=True))
    assert float(first.grad.min()) == float(first.grad.max()) == 7
    assert bool((pyro.get_param_store()._params["bare"].grad == 2).all())
    assert all(map(torch.equal, before.values, after.values))
    assert torch.equal(before.rng, after.rng)
    # Dropout is off: with the analytic KL two draws of one seed are equal, and so are two runs.
    again = gradient_variance(model, used, x, estimators=[estimator], num_draws=8)
    for name in ("variance", "gradient_norm", "snr_stderr"):
        np.testing.assert_array_equal(result.dataset[name], again.dataset[name])


def test_a_schedule_stands_still() -> None:
    moving = BetaELBO(Linear(10))
    moving.steps_taken = 5
    estimators = {"scheduled": moving, "held": BetaELBO(0.5)}
    result = gradient_variance(
        Conjugate(), OneNormal(dist.Normal), ROWS, estimators=estimators, num_draws=20
    )
    assert moving.steps_taken == 5
    scheduled, held = result.dataset["variance"].sel(group="guide").values
    assert scheduled == held > 0
    targets = result.dataset["target"].values.tolist()
    assert targets == ["ELBO with the KL term times 0.5"] * 2


def test_sticking_the_landing_has_no_noise_at_the_posterior() -> None:
    x = torch.full((3,), 1.4, dtype=torch.float64)
    guide = OneNormal(dist.Normal, 0.7, 0.5**0.5)  # The posterior N(x / 2, 1 / 2).
    estimators: list[ELBO] = [StickingTheLanding(), DReG(4), IWAE(4), Trace_ELBO()]
    result = gradient_variance(Conjugate(), guide, x, estimators=estimators, num_draws=50)
    variance = {
        name: figures(result, name, "guide", "variance")
        for name in result.dataset["estimator"].values.tolist()
    }
    assert variance["StickingTheLanding"][0] < 1e-30
    assert variance["DReG(K=4)"][0] < 1e-30
    # At the posterior all weights are equal: the mean of four of what Trace_ELBO has one of.
    value, stderr = variance["IWAE(K=4)"]
    assert value == pytest.approx(4 * 0.5 / 3 / 4, abs=5 * stderr)
    value, stderr = variance["Trace_ELBO"]
    assert value == pytest.approx(4 * 0.5 / 3, abs=5 * stderr)
    # On a busy machine the costs may be too uncertain for a verdict, but never for the other one.
    best = {"ELBO": "StickingTheLanding", "IWAE bound, K = 4": "DReG(K=4)"}
    assert result.lowest("guide").items() <= best.items()


# --- Words and pictures --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> ppvae.GradientVariance:
    with forked_rng(3):
        model, guide, x = discrete()
    estimators = {
        "score": Trace_ELBO(),
        "with baseline": TraceGraph_ELBO(),
        "sum": TraceEnum_ELBO(),
        "wake-sleep": ReweightedWakeSleep(),
        "analytic": TraceMeanField_ELBO(),
    }
    return gradient_variance(model, guide, x, estimators=estimators, num_draws=20)


def test_the_table_has_a_line_for_each_estimator(measured: ppvae.GradientVariance) -> None:
    text = repr(measured)
    model, guide = text.split("parameters of the ")[1:]
    for block, group in ((model, "model"), (guide, "guide")):
        assert f"{group}, {int(measured.dataset['num_elements'].sel(group=group))} num" in block
        for name in measured.dataset["estimator"].values.tolist():
            (line,) = [each for each in block.splitlines() if each.startswith(f"  {name}  ")]
            assert ("lowest" in line) == (name == "sum")
            variance, _ = figures(measured, name, group, "variance")
            shown = line.split("  ELBO  " if "ELBO" in line else "at once")[1].split()[0]
            assert float(shown) == pytest.approx(variance, rel=0.05)
    assert "does not apply: analytic: All distributions in the guide must be fully" in text
    assert "Compare variances within one target only" in text


def test_the_table_says_where_some_have_more_particles() -> None:
    def table(*counts: int) -> str:
        estimators = {f"with {count}": Trace_ELBO(count) for count in counts}
        guide = OneNormal(dist.Normal, scale=0.5)
        return str(gradient_variance(Conjugate(), guide, ROWS, estimators=estimators, num_draws=8))

    assert "here up to 3: compare with as many for all" in table(1, 3)
    assert "compare with as many" not in table(3)


def test_the_lowest_is_only_named_where_it_is_certain(measured: ppvae.GradientVariance) -> None:
    ds = measured.dataset.sel(estimator=["score", "with baseline", "wake-sleep"]).copy(deep=True)
    ds["variance_cost"].loc[{"group": "guide"}] = [1.0, 1.2, 0.1]
    ds["variance_cost_stderr"].loc[{"group": "guide"}] = [0.06, 0.06, 0.0]
    result = ppvae.GradientVariance(ds, {})
    assert result.lowest("guide") == {"ELBO": "score"}  # 0.2 > 2 · 0.085
    ds["variance_cost_stderr"].loc[{"group": "guide"}] = [0.08, 0.08, 0.0]
    assert result.lowest("guide") == {}
    with pytest.raises(ValueError, match="group: expected one of .*; got 'nobody'"):
        result.lowest("nobody")


def test_the_figure_has_a_mark_and_a_name_for_each_estimator(
    measured: ppvae.GradientVariance,
) -> None:
    ax = plots.gradient_variance(measured, group="guide", ax=Figure().add_subplot())
    one = measured.dataset.sel(group="guide")
    names = one["estimator"].values.tolist()
    marks = {c.get_label(): c.lines[0] for c in ax.containers}
    assert list(marks) == names
    assert len({line.get_marker() for line in marks.values()}) == len(names)
    for name, line in marks.items():
        ((x, y),) = line.get_xydata()
        assert x == pytest.approx(float(one["relative_cost"].sel(estimator=name)))
        variance = float(one["variance"].sel(estimator=name))
        low, high = ax.get_ylim()
        assert low < y < high
        if name == "sum":
            others = one["variance"].sel(estimator=[n for n in names if n != "sum"])
            assert y < float(others.min())
        else:
            assert y == pytest.approx(variance)
    fills = {name: line.get_fillstyle() for name, line in marks.items()}
    assert fills["score"] == fills["sum"] != fills["wake-sleep"]
    texts = [a.get_text() for a in ax.texts if isinstance(a, Annotation) and a.get_text()]
    assert sorted(texts) == sorted([n if n != "sum" else "sum: no noise" for n in names])
    # Along a grey line the product is one number.
    for line in ax.lines:
        if line.get_label() not in names and len(line.get_xdata()) == 2:
            product = line.get_xdata() * line.get_ydata()
            assert product[0] == pytest.approx(product[1])
    with pytest.raises(ValueError, match="group: expected one of"):
        plots.gradient_variance(measured, group="nobody")
