"""The price list of repairs: gains against closed forms, and a clock that is set by hand."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pytest
import torch
import xarray
from scipy import integrate

import ppvae
from ppvae import pairs, repairs
from ppvae.families import DiagonalNormal
from ppvae.isolation import forked_rng, private_store
from ppvae.models import FactorAnalysis
from ppvae.nn import MLP

STEPS = [f"{k} refinement step{'s' * (k > 1)}" for k in (1, 2, 4, 8, 16)]
RESAMPLINGS = {k: f"resampling among {k:,} draws" for k in (10, 100, 1000)}


def record_of_a_fit(seconds: float) -> ppvae.Fit:
    return ppvae.Fit(torch.zeros(1), torch.zeros(1), seconds, "completed 1 steps", True, 1, 1)


def off_guide(model: FactorAnalysis, shift: torch.Tensor, stretch: float) -> ppvae.Amortized:
    """A linear encoder with the best mean-field answer, shifted and with its scales stretched."""
    precision = model.posterior(torch.zeros(1, model.x_dim).double()).precision_matrix[0]
    sd = precision.diagonal().rsqrt()
    family = DiagonalNormal(model.z_dim)
    encoder = MLP(model.x_dim, [], family.num_params).double()
    W, noise = model.loadings.detach(), model.noise.detach()
    with torch.no_grad():
        encoder.layers[0].weight.zero_()
        encoder.layers[0].weight[: model.z_dim] = torch.linalg.solve(precision, W.mT / noise**2)
        params = family.from_gaussian((shift * sd)[None], torch.diag(stretch * sd)[None])
        encoder.layers[0].bias.copy_(params[0])
    return ppvae.Amortized(family, encoder)


def linear(z_dim: int, rows: int) -> SimpleNamespace:
    """Factor analysis with a guide that is off by known amounts, and rows from the model."""
    with forked_rng(0):
        loadings = torch.randn(6, z_dim)
        model = FactorAnalysis(6, z_dim, loadings=loadings, noise=0.6 * torch.ones(6)).double()
        with torch.no_grad(), private_store():
            x, x_train = model(size=rows).double(), model(size=1000).double()
    shift = torch.linspace(0.6, -0.4, z_dim).double()
    guide = off_guide(model, shift, stretch=1.3)
    precision = model.posterior(x[:1]).precision_matrix[0].detach()
    moved = shift * precision.diagonal().rsqrt()
    # KL(q ‖ p) − KL(q* ‖ p) of two normals, the posterior's precision being Λ.
    amortization = 0.5 * moved @ precision @ moved + z_dim * (0.5 * (1.3**2 - 1) - math.log(1.3))
    approximation = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    return SimpleNamespace(
        model=model,
        guide=guide,
        x=x,
        x_train=x_train,
        amortization=float(amortization),
        approximation=float(approximation),
    )


@pytest.fixture(scope="module")
def case() -> SimpleNamespace:
    out = linear(z_dim=3, rows=60)
    out.comparison = ppvae.compare(out.model, out.guide, out.x)
    out.before = {k: v.clone() for k, v in out.guide.state_dict().items()}
    out.rng = torch.get_rng_state()
    out.fit = record_of_a_fit(7.0)
    out.costs = ppvae.repair_costs(out.comparison, out.x_train, fit=out.fit, steps=200, lr=1e-2)
    out.rng_after = torch.get_rng_state()
    return out


def gain(costs: ppvae.RepairCosts, repair: str) -> tuple[float, float]:
    one = costs.dataset.sel(repair=repair)
    return float(one["gain"]), float(one["gain_stderr"])


# --- Gains ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", [*STEPS, "q* from the guide", "q* cold"])
def test_one_step_and_q_star_bring_back_the_amortization_gap(
    case: SimpleNamespace, repair: str
) -> None:
    """The posterior is normal, on which one natural-gradient step is exact."""
    value, stderr = gain(case.costs, repair)
    assert abs(value - case.amortization) < 4 * stderr
    assert stderr < 0.03 * case.amortization


def test_a_family_that_holds_the_posterior_brings_back_the_whole_gap(
    case: SimpleNamespace,
) -> None:
    value, stderr = gain(case.costs, "q* FullRankNormal(3)")
    assert abs(value - case.amortization - case.approximation) < 4 * stderr
    assert value - case.amortization > 10 * stderr


def test_resampling_gains_rise_with_the_draws_and_stay_below_the_gap(
    case: SimpleNamespace,
) -> None:
    """L_K rises with K, towards log p(x) (Burda et al. 2016, theorem 1)."""
    found = [gain(case.costs, name) for name in RESAMPLINGS.values()]
    for (fewer, its_error), (more, error) in itertools.pairwise(found):
        assert more > fewer - 4 * math.hypot(its_error, error)
    total = case.amortization + case.approximation
    assert all(value < total + 4 * stderr for value, stderr in found)
    assert found[-1][0] > 0.9 * total


def mean_log_mean(delta: float, count: int) -> float:
    r"""E log (1/K) Σ exp(−δ e_k − δ²/2) with e standard normal, by nested quadrature.

    With S the mean of K weights, :math:`E \log S = \int_0^\infty (e^{-t} - E e^{-tS}) / t\,dt`
    (Frullani), and :math:`E e^{-tS}` is the K-th power of one weight's integral.
    """
    e = np.linspace(-12, 12, 4001)
    density = np.exp(-(e**2) / 2) / math.sqrt(2 * math.pi)
    weight = np.exp(-delta * e - delta**2 / 2)
    # With t = exp(u), dt / t = du.
    u = np.linspace(-30, 30, 6001)
    t = np.exp(u)
    one = np.array([integrate.trapezoid(density * np.exp(-s * weight / count), e) for s in t])
    return float(integrate.trapezoid(np.exp(-t) - one**count, u))


def test_the_quadrature_of_the_bound_is_right_where_it_is_known() -> None:
    """One weight: E log w = −δ²/2."""
    for delta in (0.3, 1.0, 1.5):
        assert mean_log_mean(delta, 1) == pytest.approx(-(delta**2) / 2, abs=1e-6)


def test_resampling_from_a_shifted_normal_gains_what_quadrature_says() -> None:
    """Normal posterior, guide shifted by δ standard deviations: log w = log p(x) − δe − δ²/2."""
    delta = 1.5
    with forked_rng(0):
        model = FactorAnalysis(1, 1, loadings=torch.ones(1, 1), noise=torch.ones(1)).double()
        x = torch.randn(40, 1).double()
    guide = off_guide(model, torch.tensor([delta]).double(), stretch=1.0)
    comparison = ppvae.compare(model, guide, x, num_samples=100)
    costs = ppvae.repair_costs(comparison, families=[])
    for count, name in RESAMPLINGS.items():
        value, stderr = gain(costs, name)
        exact = mean_log_mean(delta, count) + delta**2 / 2
        assert abs(value - exact) < 4 * stderr, name
        assert stderr < 0.1 * exact
    # The first step ends where its trust region does, one standard deviation away.
    for name, left in (("1 refinement step", delta - 1), ("2 refinement steps", 0.0)):
        value, stderr = gain(costs, name)
        assert abs(value - (delta**2 - left**2) / 2) < 4 * stderr


def test_training_on_simulated_rows_brings_back_gain_and_pays_once(case: SimpleNamespace) -> None:
    """A linear encoder can reach every row's optimum, so that all of its gap is mendable."""
    ds = case.costs.dataset
    few, many = "50 steps of encoder training", "200 steps of encoder training"
    value, stderr = gain(case.costs, many)
    assert 0.5 * case.amortization < value < case.amortization + 4 * stderr
    assert gain(case.costs, few)[0] > 4 * gain(case.costs, few)[1]
    for name in (few, many):
        one = ds.sel(repair=name)
        assert float(one["seconds_fixed"]) > ds.attrs["seconds_encoding_fixed"]
        assert float(one["seconds_per_row"]) == ds.attrs["seconds_encoding_per_row"]
    fixed = ds["seconds_fixed"]
    assert float(fixed.sel(repair=many)) > float(fixed.sel(repair=few))


def test_of_several_guides_the_named_one_is_mended() -> None:
    it = linear(z_dim=2, rows=20)
    other = off_guide(it.model, torch.tensor([1.0, 1.0]).double(), stretch=1.0)
    comparison = ppvae.compare(it.model, {"one": it.guide, "two": other}, it.x)
    costs = ppvae.repair_costs(comparison, guide="two", families=[])
    value, stderr = gain(costs, "q* cold")
    measured, its_error = comparison.mean("amortization_gap", "two")
    assert costs.dataset.attrs["amortization_gap"] == measured
    assert abs(value - measured) < 4 * math.hypot(stderr, its_error)
    for wrong in (None, "three"):
        with pytest.raises(ValueError, match=r"expected one of \['one', 'two'\]; got"):
            ppvae.repair_costs(comparison, guide=wrong)


# --- What is in the table ------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_repair(case: SimpleNamespace) -> None:
    ds = case.costs.dataset
    kinds = dict(zip(ds["repair"].values.tolist(), ds["kind"].values.tolist(), strict=True))
    assert kinds == dict.fromkeys(STEPS, "refinement") | {
        "q* from the guide": "per datapoint",
        "q* cold": "per datapoint",
        "q* FullRankNormal(3)": "family",
        "50 steps of encoder training": "training",
        "200 steps of encoder training": "training",
    } | dict.fromkeys(RESAMPLINGS.values(), "resampling")
    assert {name: ds[name].attrs["units"] for name in ds if "units" in ds[name].attrs} == {
        "gain": "nats",
        "gain_stderr": "nats",
        "seconds_fixed": "s",
        "seconds_per_row": "s",
    }
    for gap in ("approximation_gap", "amortization_gap", "inference_gap"):
        assert ds.attrs[gap] == case.comparison.mean(gap)[0]
    assert ds.attrs["rows"] == len(case.x)


def test_nothing_of_the_callers_is_changed(case: SimpleNamespace) -> None:
    assert torch.equal(case.rng, case.rng_after)
    after = case.guide.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in case.before.items())
    assert all(p.requires_grad and p.grad is None for p in case.guide.parameters())
    assert all(part.training for part in (*case.guide.modules(), *case.model.modules()))


def test_the_store_is_left_alone() -> None:
    """A guide with a bare parameter of Pyro's store is trained, and then as it was."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
            pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", pyro.distributions.Normal(slope * x, 0.7))

    x = torch.randn(60)
    with private_store():
        mine = pyro.param("slope", torch.tensor(0.1))
        comparison = ppvae.compare(model, guide, x[:12], num_samples=50)
        costs = ppvae.repair_costs(comparison, x, steps=40, lr=0.05)
        assert list(pyro.get_param_store().keys()) == ["slope"]
        assert pyro.param("slope") is mine
        assert float(mine.detach()) == pytest.approx(0.1)
    # The posterior's mean is x / 2: the slope has some way to go.
    value, stderr = gain(costs, "40 steps of encoder training")
    assert value > 4 * stderr


# --- Seconds -------------------------------------------------------------------------------------


def test_the_break_even_solves_its_equation(case: SimpleNamespace) -> None:
    ds = case.costs.dataset
    cold = ds.sel(repair="q* cold")
    count = ds.attrs["break_even"]
    assert ds.attrs["seconds_training"] == case.fit.seconds
    if math.isinf(count):  # So few rows may take as long as one.
        assert float(cold["seconds_per_row"]) <= ds.attrs["seconds_encoding_per_row"]
        return
    encoding = ds.attrs["seconds_encoding_fixed"] + count * ds.attrs["seconds_encoding_per_row"]
    fitting = float(cold["seconds_fixed"]) + count * float(cold["seconds_per_row"])
    assert case.fit.seconds + encoding == pytest.approx(fitting, rel=1e-9)


@pytest.fixture(scope="module")
def small() -> SimpleNamespace:
    it = linear(z_dim=1, rows=12)
    it.comparison = ppvae.compare(it.model, it.guide, it.x, num_samples=50, max_steps=5)
    return it


Law = Callable[[int], float]


def set_clocks(monkeypatch: pytest.MonkeyPatch, refine: Law, fit: Law, encode: Law) -> None:
    """Let each repair take as many seconds as its law says for that number of rows."""

    def timed(name: str, law: Law, place: int) -> None:
        real = getattr(repairs, name)

        def run(*args: Any, **settings: Any) -> Any:
            return dataclasses.replace(real(*args, **settings), seconds=law(len(args[place])))

        monkeypatch.setattr(repairs, name, run)

    timed("refine", refine, 2)
    timed("fit_per_datapoint", fit, 2)
    monkeypatch.setattr(repairs, "seconds_to_encode", lambda guide, x: encode(len(x)))


@pytest.mark.parametrize(
    ("law", "fixed", "per_row"),
    [
        (lambda n: 2 + 0.5 * n, 2.0, 0.5),
        # More than linear: nothing is spent once.
        (lambda n: 0.25 * n**2, 0.0, 3.0),
        # The few took longer than all, as a busy machine may have it: nothing is per row.
        (lambda n: 6.0 if n == 12 else 8.0, 6.0, 0.0),
    ],
)
def test_both_parts_of_the_seconds_give_back_the_full_run(
    law: Law, fixed: float, per_row: float, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clocks(monkeypatch, refine=law, fit=law, encode=law)
    costs = ppvae.repair_costs(small.comparison, small.x_train, steps=4, families=[])
    ds, full = costs.dataset, costs.seconds(len(small.x))
    for name in (*STEPS, "q* from the guide", "q* cold"):
        assert full[name] == pytest.approx(law(12))
        assert float(ds["seconds_fixed"].sel(repair=name)) == pytest.approx(fixed)
        assert float(ds["seconds_per_row"].sel(repair=name)) == pytest.approx(per_row)
        assert costs.seconds(1000)[name] == pytest.approx(fixed + 1000 * per_row)
    assert ds.attrs["seconds_encoding_per_row"] == pytest.approx(per_row)
    assert bool((ds["seconds_fixed"] >= 0).all())
    assert math.isnan(ds.attrs["break_even"])
    assert math.isnan(ds.attrs["seconds_training"])


@pytest.mark.parametrize(
    ("encode", "even"),
    [
        (lambda n: 0.1 + 0.01 * n, (50 + 0.1 - 2) / (0.5 - 0.01)),
        (lambda n: 1.0 * n, math.inf),
    ],
)
def test_the_break_even_in_numbers(
    encode: Law, even: float, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = lambda n: 2 + 0.5 * n  # noqa: E731
    set_clocks(monkeypatch, refine=law, fit=law, encode=encode)
    fit = record_of_a_fit(50.0)
    costs = ppvae.repair_costs(small.comparison, fit=fit, families=[])
    assert costs.dataset.attrs["break_even"] == pytest.approx(even)
    said = "from 98 data on" in str(costs)
    assert said == math.isfinite(even)


def by_hand() -> ppvae.RepairCosts:
    ds = xarray.Dataset(
        {
            "gain": ("repair", [0.5, 0.95, 1.0, 0.9, 1.5]),
            "gain_stderr": ("repair", [0.01] * 5),
            "seconds_fixed": ("repair", [0.0, 0.0, 0.0, 100.0, 0.0]),
            "seconds_per_row": ("repair", [0.001, 0.01, 0.1, 0.0001, 0.00001]),
            "kind": (
                "repair",
                ["refinement", "refinement", "per datapoint", "training", "resampling"],
            ),
        },
        coords={"repair": ["a step", "steps", "q*", "training", "resampling"]},
        attrs={"amortization_gap": 1.0, "inference_gap": 2.0, "break_even": math.nan, "rows": 10},
    )
    return ppvae.RepairCosts(ds)


def test_the_cheapest_repair_depends_on_how_many_data_there_are() -> None:
    costs = by_hand()
    assert costs.cheapest(0.9, 1_000) == "steps"
    assert costs.cheapest(0.9, 1_000_000) == "training"
    assert costs.cheapest(0.4, 1_000) == "a step"
    # Resampling brings back more than all, and is no better q.
    assert costs.cheapest(1.0, 1) == "q*"
    # Nine seconds and ten are the same, as clocks go: the first of the two is named.
    costs.dataset["seconds_per_row"][2] = 0.009
    assert costs.cheapest(0.9, 1_000) == "steps"
    costs.dataset["seconds_per_row"][2] = 0.005
    assert costs.cheapest(0.9, 1_000) == "q*"
    costs.dataset["gain"][2] = 0.99
    assert costs.cheapest(1.0, 1) is None


def test_the_sentence_on_the_cheapest_names_a_lower_price_that_clocks_cannot_tell_from_it() -> None:
    costs = by_hand()
    first = "For 1,000 data the cheapest that brings back nine tenths of the amortization gap: "
    assert costs.sentences()[0] == f"{first}steps, 10 s."
    costs.dataset["seconds_per_row"][2] = 0.009
    assert costs.sentences()[0] == (
        f"{first}steps, 10 s; q*, 9 s, cannot be told from it, as clocks are no better than 25%."
    )
    costs.dataset["seconds_per_row"][2] = 0.0079
    assert costs.sentences()[0] == f"{first}q*, 7.9 s."


def test_the_sentences_say_how_figures_differ_from_those_of_other_calls() -> None:
    costs = by_hand()
    even, shares = "The figure of compare is another", "Those of explain are of"
    assert even not in str(costs)
    assert shares in str(costs)
    costs.dataset.attrs["break_even"] = 98.0
    assert even in str(costs)
    untrained = costs.dataset.sel(repair=costs.dataset["kind"] != "training")
    assert shares not in str(ppvae.RepairCosts(untrained))


def test_the_printed_table_holds_the_figures(case: SimpleNamespace) -> None:
    lines = str(case.costs).splitlines()
    ds = case.costs.dataset
    for name in ds["repair"].values.tolist():
        [line] = [line for line in lines if line.startswith(f"  {name} ")]
        value, _, error, share = line.removeprefix(f"  {name}").split()[:4]
        assert float(value) == pytest.approx(gain(case.costs, name)[0], abs=5.1e-5)
        assert float(error) == pytest.approx(gain(case.costs, name)[1], abs=5.1e-5)
        assert share == f"{gain(case.costs, name)[0] / ds.attrs['inference_gap']:.0%}"
    assert repr(case.costs) == str(case.costs)


# --- Refusals ------------------------------------------------------------------------------------


def test_unfit_input_is_refused_before_anything_is_measured(
    small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done for unfit input")

    for name in ("refine", "fit_per_datapoint", "seconds_to_encode", "weigh"):
        monkeypatch.setattr(repairs, name, never)
    good = small.comparison
    with pytest.raises(ValueError, match=r"x_train: expected rows of shape \(6,\)"):
        ppvae.repair_costs(good, small.x_train[:, :5])
    with pytest.raises(ValueError, match=r"x_train: expected rows .*float64.*got .*float32"):
        ppvae.repair_costs(good, small.x_train.float())
    with pytest.raises(ValueError, match="x_train has NaN"):
        ppvae.repair_costs(good, small.x_train * torch.nan)
    with pytest.raises(ValueError, match="at least 2 rows"):
        ppvae.repair_costs(good, small.x_train[:1])
    with pytest.raises(ValueError, match=r"expected one of \['amortized'\]; got 'other'"):
        ppvae.repair_costs(good, guide="other")
    with pytest.raises(ValueError, match="steps must be at least 4; got 3"):
        ppvae.repair_costs(good, small.x_train, steps=3)
    free = ppvae.per_datapoint(small.guide, small.x)
    with pytest.raises(ValueError, match="nothing is amortized"):
        ppvae.repair_costs(dataclasses.replace(good, guides={"amortized": free}))


def test_rows_of_another_binarisation_are_refused() -> None:
    model, guide = pairs.vae(x_dim=6, z_dim=2, hidden=[4])
    x = (torch.rand(8, 6) > 0.5).float()
    comparison = ppvae.compare(model, guide, x, num_samples=10, evidence_samples=10, max_steps=2)
    with pytest.raises(ValueError, match="x_train is not binary but the compared rows are"):
        ppvae.repair_costs(comparison, torch.rand(20, 6))


# --- On a VAE ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> SimpleNamespace:
    data = ppvae.data.load("digits")
    with forked_rng(0):
        model, guide = pairs.vae(x_dim=64, z_dim=8, hidden=[100])
    model, guide = model.float(), guide.float()
    ppvae.fit(model, guide, data.train.float(), steps=1500, lr=2e-3, progress=False)
    return SimpleNamespace(model=model, guide=guide, x=data.test.float(), train=data.train.float())


@pytest.mark.slow
def test_refinement_is_five_times_cheaper_than_a_cold_fit(digits: SimpleNamespace) -> None:
    refined, cold = [], []
    for _ in range(5):
        done = ppvae.refine(digits.model, digits.guide, digits.x, tolerance=1e-3, max_steps=8)
        refined.append(done.seconds)
        family = digits.guide.family
        fitted = ppvae.fit_per_datapoint(digits.model, family, digits.x, num_samples=2)
        cold.append(fitted.seconds)
    assert statistics.median(cold) > 5 * statistics.median(refined)


@pytest.mark.slow
def test_the_repairs_of_a_vae_keep_their_order(digits: SimpleNamespace) -> None:
    comparison = ppvae.compare(digits.model, digits.guide, digits.x)
    costs = ppvae.repair_costs(comparison, digits.train, steps=400)
    ds = costs.dataset
    stepwise = [gain(costs, name) for name in [*STEPS, "q* from the guide"]]
    for (less, its_error), (more, error) in itertools.pairwise(stepwise):
        assert more > less - 4 * math.hypot(its_error, error)
    gap, gap_error = comparison.mean("amortization_gap")
    value, error = gain(costs, "q* from the guide")
    # The fit stops where 1e-3 nats are left to gain.
    assert abs(value - gap) < 4 * math.hypot(error, gap_error) + 2e-3
    richer, its_error = gain(costs, "q* FullRankNormal(8)")
    assert richer - value > 4 * math.hypot(its_error, error)
    total, total_error = comparison.mean("inference_gap")
    for name in RESAMPLINGS.values():
        # log p(x) is bounded from below by 15,000 draws, more than any of these.
        assert gain(costs, name)[0] < total + 4 * math.hypot(total_error, gain(costs, name)[1])
    price = costs.seconds(len(digits.x))
    assert price["1 refinement step"] < price["q* cold"]
    assert bool((ds["seconds_per_row"] >= 0).all())
