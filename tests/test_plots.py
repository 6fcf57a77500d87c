"""Figures: what is drawn is the result that was given, and nothing else is touched."""

import itertools
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pytest
import torch
import xarray
from byhand import annealed, ledger, sandwiches
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation, Text

import ppvae
from ppvae import generation, pairs, plots
from ppvae.diagnostics import ElementKL, Smoothed
from ppvae.explanation import PARTS
from ppvae.families import Gamma, LogNormal
from ppvae.isolation import forked_rng, private_store
from ppvae.likelihoods import Categorical

ROWS = [1.5, 0.0, 3.0, -1.0, 6.0]


@pytest.fixture(scope="module")
def toy() -> SimpleNamespace:
    with forked_rng(0):
        model, guide = pairs.exponential_gaussian()
    x = torch.tensor(ROWS, dtype=torch.float32)
    guide, model = guide.float(), model.float()
    comparison = ppvae.compare(model, guide, x, num_samples=200)
    with forked_rng(1):
        other = pairs.exponential_gaussian(Gamma())[1].float()
    several = ppvae.compare(model, {"one": guide, "other": other}, x, num_samples=200)
    return SimpleNamespace(model=model, guide=guide, x=x, comparison=comparison, several=several)


@pytest.fixture(scope="module")
def vae() -> SimpleNamespace:
    with forked_rng(0):
        model, guide = pairs.vae(x_dim=12, z_dim=2, hidden=[16])
        x = torch.bernoulli(torch.full((7, 12), 0.4))
    return SimpleNamespace(
        model=model.float(),
        guide=guide.float(),
        x=x.float(),
        shape=(3, 4),
        labels=[0, 1, 0, 2, 1, 0, 2],
    )


EXPLANATION = ppvae.Explanation(
    xarray.Dataset(
        {
            "gap": ("part", [0.3, 0.1, -0.01, 0.08]),
            "gap_stderr": ("part", [0.02, 0.01, 0.006, np.inf]),
        },
        coords={"part": list(PARTS)},
        attrs={"amortization_gap": 0.47, "rows_measured": 1},
    ),
    cause="generalisation",
    status="",
    seconds=1.0,
)
# Name, kind, nats, their error, seconds once, seconds a row: much as for a VAE of the digits.
REPAIRS = [
    ("1 refinement step", "refinement", 0.44, 0.002, 0.03, 8e-4),
    ("2 refinement steps", "refinement", 0.472, 0.002, 0.03, 8.3e-4),
    ("4 refinement steps", "refinement", 0.477, 0.002, 0.04, 8.6e-4),
    ("8 refinement steps", "refinement", 0.478, 0.002, 0.05, 9e-4),
    ("16 refinement steps", "refinement", 0.478, 0.002, 0.05, 9.2e-4),
    ("q* from the guide", "per datapoint", 0.487, 0.002, 0.35, 0.039),
    ("q* cold", "per datapoint", 0.486, 0.002, 0.2, 0.026),
    ("q* FullRankNormal(8)", "family", 0.71, 0.003, 0.36, 0.029),
    ("500 steps of encoder training", "training", 0.13, 0.001, 2.6, 7e-7),
    ("2,000 steps of encoder training", "training", 0.18, 0.001, 9.3, 7e-7),
    ("resampling among 10 draws", "resampling", 0.635, 0.003, 2e-3, 1.3e-5),
    ("resampling among 100 draws", "resampling", 0.77, 0.003, 3e-3, 1.2e-4),
    ("resampling among 1,000 draws", "resampling", 0.796, 0.002, 4e-3, 2e-3),
]
COSTS = ppvae.RepairCosts(
    xarray.Dataset(
        {
            name: ("repair", list(column))
            for name, column in zip(
                ("kind", "gain", "gain_stderr", "seconds_fixed", "seconds_per_row"),
                list(zip(*REPAIRS, strict=True))[1:],
                strict=True,
            )
        },
        coords={"repair": [name for name, *_ in REPAIRS]},
        attrs={"amortization_gap": 0.49, "inference_gap": 0.81, "rows": 300},
    )
)
OUTCOMES = ("accepted", "refined", "refined", "given up", "refined")
PREDICTED = [0.004, 0.3, 0.1, 2.5, 0.9]
MEASURED = [0.006, 0.2, 0.25, 1.5, 1.1]


def refined(predicted: list[float] = PREDICTED) -> ppvae.Refinement:
    rows = torch.zeros(5)
    return ppvae.Refinement(
        guide=ppvae.PerDatapoint(LogNormal(), 5),
        outcome=OUTCOMES,
        reason=("",) * 5,
        predicted_gap=torch.tensor(predicted, dtype=torch.float64),
        remaining=rows,
        gain=rows,
        gain_stderr=rows,
        evaluations=rows.long(),
        seconds=1.0,
    )


def axes() -> Any:
    return Figure().add_subplot()


def curves(ax: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {line.get_label().split("(")[0].strip(): line.get_data() for line in ax.lines}


def tiles(ax: Any, shape: tuple[int, int], columns: int) -> torch.Tensor:
    """The images of a sheet, row by row; between them it holds no numbers."""
    (image,) = ax.images
    sheet = np.ma.filled(image.get_array(), np.nan)
    height, width = shape
    out = [
        sheet[top : top + height, left : left + width].reshape(-1)
        for top in range(0, sheet.shape[0], height + 1)
        for left in range(0, sheet.shape[1], width + 1)
    ]
    assert sheet.shape[1] == columns * (width + 1) - 1
    between = sheet.size - sum(tile.size for tile in out)
    assert np.isnan(sheet).sum() == between
    return torch.as_tensor(np.array(out))


# --- The toy's posterior -----------------------------------------------------------------------


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_the_drawn_posterior_is_the_models_and_integrates_to_one(
    toy: SimpleNamespace, row: int
) -> None:
    ax = plots.toy_posterior(toy.x, toy.guide, toy.comparison.local, row=row, ax=axes())
    z, density = curves(ax)["exact posterior p"]
    exact = torch.exp(toy.model.posterior(toy.x[row].double()).log_prob(torch.as_tensor(z)))
    np.testing.assert_allclose(density, exact, rtol=1e-10)
    # The trapezoidal rule's error is of the order of the cell squared, the tail left out is 1e-5.
    assert np.trapezoid(density, z) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_prior_times_likelihood_over_evidence_is_the_drawn_posterior(
    toy: SimpleNamespace, row: int
) -> None:
    drawn = curves(plots.toy_posterior(toy.x, toy.guide, toy.comparison.local, row=row, ax=axes()))
    joint = drawn["prior p"][1] * drawn["likelihood p"][1]
    evidence = float(torch.exp(toy.model.log_evidence(toy.x[row].double())))
    np.testing.assert_allclose(joint / evidence, drawn["exact posterior p"][1], rtol=1e-6)


@pytest.mark.parametrize("row", [0, 1, -1])
def test_both_guides_are_drawn_at_the_parameters_of_that_row(
    toy: SimpleNamespace, row: int
) -> None:
    ax = plots.toy_posterior(toy.x, toy.guide, toy.comparison.local, row=row, ax=axes())
    assert ax.get_title() == f"x = {ROWS[row]:g}"
    drawn = curves(ax)
    wanted = {
        "amortized q": toy.guide.params(toy.x)[row].detach(),
        "per-datapoint q*": toy.comparison.local.guide.table("z").weight[row].detach(),
    }
    for label, params in wanted.items():
        z, density = drawn[label]
        member = LogNormal().distribution(params.double())
        np.testing.assert_allclose(density, member.log_prob(torch.as_tensor(z)).exp())


def test_the_better_fit_is_drawn_nearer_to_the_posterior(toy: SimpleNamespace) -> None:
    """KL(q | posterior) of the drawn curves: that of q* is the smaller, and is the gap."""
    ax = plots.toy_posterior(toy.x, toy.guide, toy.comparison.local, row=2, ax=axes())
    drawn = curves(ax)
    z, posterior = drawn["exact posterior p"]

    def divergence(name: str) -> float:
        q = drawn[name][1]
        inside = q > 1e-12
        integrand = np.zeros_like(q)
        integrand[inside] = q[inside] * np.log(q[inside] / posterior[inside])
        return float(np.trapezoid(integrand, z))

    best = divergence("per-datapoint q*")
    assert best < divergence("amortized q")
    gap = float(toy.comparison.dataset["approximation_gap"][2])
    stderr = float(toy.comparison.dataset["approximation_gap_stderr"][2])
    # The window holds all of the posterior; of a log-normal's tail it leaves some out.
    assert best == pytest.approx(gap, abs=5 * stderr)


def test_a_density_without_bound_at_zero_leaves_room_for_the_rest(toy: SimpleNamespace) -> None:
    free = ppvae.PerDatapoint(Gamma(), 1)
    with torch.no_grad():
        free.table("z").weight.copy_(torch.tensor([[-1.5, 0.0]]))
    ax = plots.toy_posterior(toy.x[:1], toy.guide, free, ax=axes())
    drawn = curves(ax)
    assert drawn["per-datapoint q*"][1].max() > ax.get_ylim()[1]
    assert drawn["exact posterior p"][1].max() > 0.1 * ax.get_ylim()[1]


def test_toy_posterior_refuses_rows_that_do_not_fit(toy: SimpleNamespace) -> None:
    local = toy.comparison.local
    with pytest.raises(ValueError, match=r"shape \(batch,\); got \(5, 1\)"):
        plots.toy_posterior(toy.x[:, None], toy.guide, local)
    with pytest.raises(ValueError, match="a row of the 5 in x; got 5"):
        plots.toy_posterior(toy.x, toy.guide, local, row=5)
    with pytest.raises(ValueError, match="expected x with 5 rows"):
        plots.toy_posterior(toy.x[:2], toy.guide, local)


# --- Gaps --------------------------------------------------------------------------------------


def test_bars_are_the_means_and_their_whiskers_two_standard_errors(toy: SimpleNamespace) -> None:
    ax = plots.gap_bars(toy.comparison, ax=axes())
    for container, gap in zip(ax.containers[1::2], ("approximation", "amortization"), strict=True):
        mean, stderr = toy.comparison.mean(f"{gap}_gap")
        assert container.get_label() == f"{gap} gap"
        (bar,) = container
        assert bar.get_height() == pytest.approx(mean)
        ((low, high),) = container.errorbar.lines[2][0].get_segments()
        assert (low[1], high[1]) == pytest.approx((mean - 2 * stderr, mean + 2 * stderr))
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["LogNormal()"]


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        (["lower", "estimate", "lower", "lower"], " (a lower bound)"),
        (["upper", "estimate", "lower", "lower"], " (side not known)"),
    ],
)
def test_a_gap_that_is_a_bound_is_called_one(bounds: list[str], said: str) -> None:
    comparison = ledger()
    comparison.dataset["approximation_gap_bound"] = ("data", bounds)
    x = torch.arange(4.0)
    for ax in (
        plots.gap_bars(comparison, ax=axes()),
        plots.gap_sorted(comparison, ax=axes()),
        plots.gap_against(comparison, x, label="x", ax=axes()),
    ):
        labels = ax.get_legend_handles_labels()[1]
        assert labels == [f"approximation gap{said}", "amortization gap"]


def test_bars_of_several_comparisons_stand_under_their_names(toy: SimpleNamespace) -> None:
    other = ppvae.compare(toy.model, toy.guide, toy.x, family=Gamma(), num_samples=200)
    ax = plots.gap_bars({"one": toy.comparison, "two": other}, ax=axes())
    heights = [bar.get_height() for bar in ax.containers[1]]
    expected = [each.mean("approximation_gap")[0] for each in (toy.comparison, other)]
    assert heights == pytest.approx(expected)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["one", "two"]
    with pytest.raises(ValueError, match="at least one"):
        plots.gap_bars({})


def test_bars_of_several_guides_stand_under_their_names(toy: SimpleNamespace) -> None:
    ax = plots.gap_bars(toy.several, ax=axes())
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["one", "other"]
    for container, gap in zip(ax.containers[1::2], ("approximation", "amortization"), strict=True):
        means = [toy.several.mean(f"{gap}_gap", guide) for guide in ("one", "other")]
        assert [bar.get_height() for bar in container] == pytest.approx([m for m, _ in means])
        for bar, (_, stderr), whisker in zip(
            container, means, container.errorbar.lines[2][0].get_segments(), strict=True
        ):
            middle = bar.get_x() + bar.get_width() / 2
            assert whisker[:, 0] == pytest.approx([middle, middle])
            assert whisker[1, 1] - whisker[0, 1] == pytest.approx(4 * stderr)
    together = plots.gap_bars({"new": toy.several, "LogNormal()": toy.comparison}, ax=axes())
    names = [tick.get_text() for tick in together.get_xticklabels()]
    assert names == ["new\none", "new\nother", "LogNormal()"]


@pytest.mark.parametrize("guide", ["one", "other"])
def test_gaps_of_one_of_several_guides_are_its_own(toy: SimpleNamespace, guide: str) -> None:
    own = toy.several.dataset.sel(guide=guide)
    against = plots.gap_against(toy.several, toy.x, label="x", guide=guide, ax=axes())
    in_order = plots.gap_sorted(toy.several, guide=guide, ax=axes())
    for place, gap in enumerate(("approximation", "amortization")):
        values = own[f"{gap}_gap"].values
        x, drawn = against.containers[place].lines[0].get_data()
        assert dict(zip(x.tolist(), drawn.tolist(), strict=True)) == pytest.approx(
            dict(zip(ROWS, values, strict=True))
        )
        assert in_order.lines[place].get_ydata() == pytest.approx(np.sort(values))


@pytest.mark.parametrize("guide", [None, "per_datapoint", "third"])
def test_a_guide_has_to_be_one_of_those_given(toy: SimpleNamespace, guide: str | None) -> None:
    known = r"expected one of \['one', 'other'\]; got"
    with pytest.raises(ValueError, match=known):
        plots.gap_against(toy.several, toy.x, label="x", guide=guide)
    with pytest.raises(ValueError, match=known):
        plots.gap_sorted(toy.several, guide=guide)
    if guide is not None:
        with pytest.raises(ValueError, match="expected one of"):
            plots.gap_sorted(toy.comparison, guide=guide)


def test_gaps_stand_above_the_covariate_of_their_datum(toy: SimpleNamespace) -> None:
    ax = plots.gap_against(toy.comparison, toy.x, label="x", ax=axes())
    dataset = toy.comparison.dataset
    for container, gap in zip(ax.containers, ("approximation", "amortization"), strict=True):
        x, value = container.lines[0].get_data()
        drawn = dict(zip(x.tolist(), value.tolist(), strict=True))
        assert drawn == pytest.approx(dict(zip(ROWS, dataset[f"{gap}_gap"].values, strict=True)))
        lengths = {
            float(low[0]): float(high[1] - low[1])
            for low, high in container.lines[2][0].get_segments()
        }
        stderr = dataset[f"{gap}_gap_stderr"].values
        assert lengths == pytest.approx(dict(zip(ROWS, 4 * stderr, strict=True)), abs=1e-7)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "gap ± 2 Monte Carlo errors (nats)")
    with pytest.raises(ValueError, match=r"expected shape \(5,\)"):
        plots.gap_against(toy.comparison, toy.x[:3], label="x")


def test_sorted_gaps_are_the_gaps_with_their_own_bands(toy: SimpleNamespace) -> None:
    ax = plots.gap_sorted(toy.comparison, ax=axes())
    dataset = toy.comparison.dataset
    for line, band, gap in zip(
        ax.lines[:2], ax.collections, ("approximation", "amortization"), strict=True
    ):
        rank, value = line.get_data()
        assert (np.diff(value) >= 0).all()
        assert sorted(dataset[f"{gap}_gap"].values) == pytest.approx(list(value))
        stderr = dict(
            zip(dataset[f"{gap}_gap"].values, dataset[f"{gap}_gap_stderr"].values, strict=True)
        )
        corners = band.get_paths()[0].vertices
        for at, middle in zip(rank, value, strict=True):
            edge = corners[corners[:, 0] == at, 1]
            width = 4 * stderr[middle]
            assert edge.max() - edge.min() == pytest.approx(width, abs=1e-6)


def test_the_two_gaps_differ_in_more_than_colour(toy: SimpleNamespace) -> None:
    bars = plots.gap_bars(toy.comparison, ax=axes())
    assert len({bar.get_hatch() for bar in bars.patches}) == 2
    marks = plots.gap_against(toy.comparison, toy.x, label="x", ax=axes())
    assert len({c.lines[0].get_marker() for c in marks.containers}) == 2
    styles = plots.gap_sorted(toy.comparison, ax=axes())
    assert len({line.get_linestyle() for line in styles.lines[:2]}) == 2


# --- What mends a gap ----------------------------------------------------------------------------


def test_bars_of_an_explanation_are_its_parts() -> None:
    ax = plots.explanation(EXPLANATION, ax=axes())
    bars = ax.containers[-1]
    ds = EXPLANATION.dataset
    assert [bar.get_width() for bar in bars] == pytest.approx(ds["gap"].values)
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    for part, label in zip(PARTS, labels, strict=True):
        assert label.startswith(part.replace("_", " ") + "\n")
    # The first part is at the top.
    assert ax.yaxis_inverted()
    whiskers = bars.errorbar.lines[2][0].get_segments()
    for whisker, value, stderr in zip(
        whiskers, ds["gap"].values, ds["gap_stderr"].values, strict=True
    ):
        # An error that is not known has no whisker.
        ends = [value - 2 * stderr, value + 2 * stderr] if np.isfinite(stderr) else []
        assert [x for x, _ in whisker] == pytest.approx(ends)
    assert "standard errors\n(nats per datum)" in ax.get_xlabel()
    # The main cause alone is solid.
    assert [bool(bar.get_hatch()) for bar in bars] == [False, True, True, True]


@pytest.mark.parametrize("num_data", [None, 1, 1_000_000])
def test_repairs_stand_at_their_seconds_and_nats(num_data: int | None) -> None:
    ax = plots.repair_costs(COSTS, num_data=num_data, ax=axes())
    count = num_data or 300
    assert ax.get_xlabel() == f"seconds for {count:,} data"
    assert ax.get_xscale() == "log"
    kinds = list(dict.fromkeys(kind for _, kind, *_ in REPAIRS))
    for container, kind in zip(ax.containers, kinds, strict=True):
        own = [row for row in REPAIRS if row[1] == kind]
        seconds, gain = container.lines[0].get_data()
        assert seconds == pytest.approx([fixed + count * each for *_, fixed, each in own])
        assert gain == pytest.approx([row[2] for row in own])
        for whisker, row in zip(container.lines[2][0].get_segments(), own, strict=True):
            assert whisker[1, 1] - whisker[0, 1] == pytest.approx(4 * row[3])
    styles = [(c.lines[0].get_marker(), c.lines[0].get_color()) for c in ax.containers]
    assert len({m for m, _ in styles}) == len({c for _, c in styles}) == len(kinds)
    joined = [c.lines[0].get_linestyle() != "None" for c in ax.containers]
    assert joined == [kind in ("refinement", "training", "resampling") for kind in kinds]


def test_the_gaps_are_lines_with_names() -> None:
    ax = plots.repair_costs(COSTS, ax=axes())
    level = {line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1}
    assert {0.0, 0.49, 0.81} <= level
    named = {t.get_text(): t.xy[1] for t in ax.texts if isinstance(t, Annotation)}
    assert (named["amortization gap"], named["total gap"]) == (0.49, 0.81)


@pytest.mark.parametrize("num_data", [None, 1_000_000])
@pytest.mark.parametrize("size", [(6.5, 4.6), (6.5, 4.2), (9, 6)])
def test_labels_of_repairs_keep_clear_of_each_other(
    size: tuple[float, float], num_data: int | None
) -> None:
    ax = Figure(figsize=size, layout="constrained").add_subplot()
    plots.repair_costs(COSTS, num_data=num_data, ax=ax)
    ax.figure.canvas.draw()
    frames = {text.get_text(): text.get_window_extent() for text in ax.texts}
    assert len(frames) == len(ax.texts)
    for name, frame in frames.items():
        assert frame.x0 > ax.bbox.x0 - 1, name
        assert frame.x1 < ax.bbox.x1 + 1, name
        for other, its_frame in frames.items():
            assert name == other or not frame.overlaps(its_frame), (name, other)
    # Every repair is named: by its count, or by what q* it is.
    shown = {part for name in frames for part in name.split(", ")}
    assert shown == {
        *("1", "2", "4", "8", "16", "500", "2,000", "10", "100", "1,000"),
        *("from the guide", "cold", "FullRankNormal(8)", "amortization gap", "total gap"),
    }
    # Nothing lies under the legend, and the legend on nothing.
    assert ax.get_legend().get_window_extent().y1 < ax.xaxis.label.get_window_extent().y0 + 1


def test_repairs_without_a_finite_gain_are_not_drawn() -> None:
    ds = COSTS.dataset.copy(deep=True)
    ds["gain"][:5] = np.inf
    ds.attrs["amortization_gap"] = ds.attrs["inference_gap"] = np.inf
    ax = plots.repair_costs(ppvae.RepairCosts(ds), ax=axes())
    assert len(ax.containers) == 4
    assert "total gap" not in [text.get_text() for text in ax.texts]
    ds["gain"][:] = np.inf
    nothing = plots.repair_costs(ppvae.RepairCosts(ds), ax=axes())
    assert not nothing.containers
    assert not nothing.texts


def test_repair_costs_need_data() -> None:
    with pytest.raises(ValueError, match="num_data must be at least 1; got 0"):
        plots.repair_costs(COSTS, num_data=0)


@pytest.mark.parametrize("measured", [MEASURED, torch.tensor(MEASURED), np.array(MEASURED)])
def test_predicted_gaps_stand_over_measured_ones(measured: Any) -> None:
    ax = plots.refinement(refined(), measured, ax=axes())
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("measured gap (nats)", "predicted gap (nats)")
    labels = ["accepted: 1 row", "refined: 3 rows", "given up: 1 row"]
    for points, label in zip(ax.collections, labels, strict=True):
        own = [row for row, outcome in enumerate(OUTCOMES) if label.startswith(outcome)]
        assert points.get_label() == label
        wanted = [(MEASURED[row], PREDICTED[row]) for row in own]
        np.testing.assert_allclose(points.get_offsets(), wanted, rtol=1e-6)
    (diagonal,) = ax.lines
    assert (diagonal.get_xdata() == diagonal.get_ydata()).all()
    assert ax.get_xlim() == ax.get_ylim()
    # Ranks 0 2 1 4 3 against 0 1 2 4 3: ρ = 1 − 6 Σd² / (n (n² − 1)) = 1 − 12 / 120.
    assert ax.get_legend().get_title().get_text() == "rank correlation 0.90"


def test_gaps_that_are_not_positive_or_not_finite() -> None:
    measured = [-0.002, 0.2, 0.0, np.nan, 1.1]
    ax = plots.refinement(refined(), measured, ax=axes())
    assert ax.get_xscale() == ax.get_yscale() == "symlog"
    low, high = ax.get_xlim()
    assert low < -0.002
    assert high > 1.1
    title = ax.get_legend().get_title().get_text()
    assert title == "rank correlation 1.00\nleft out, not finite: 1 of 5 rows"
    ax.figure.canvas.draw()
    alike = plots.refinement(refined([0.5] * 5), [0.1] * 5, ax=axes())
    assert alike.get_legend().get_title().get_text() == ""
    with pytest.raises(ValueError, match=r"expected shape \(5,\), a gap for each row; got \(2,\)"):
        plots.refinement(refined(), [0.1, 0.2])
    with pytest.raises(ValueError, match="no row has both"):
        plots.refinement(refined([np.inf] * 5), MEASURED)


# --- Time --------------------------------------------------------------------------------------


def price_list() -> ppvae.RepairCosts:
    """The costs above, with a training of 60 s; q* cold costs 0.2 s and 26 ms a row."""
    ds = COSTS.dataset.assign_attrs(
        seconds_training=60.0,
        seconds_encoding_fixed=0.01,
        seconds_encoding_per_row=1e-3,
        break_even=(60.0 + 0.01 - 0.2) / (0.026 - 1e-3),
    )
    return ppvae.RepairCosts(ds)


@pytest.mark.parametrize("make", [ledger, price_list])
def test_the_lines_of_the_break_even_cross_at_its_mark(make: Callable[[], Any]) -> None:
    costs = make()
    even = costs.dataset.attrs["break_even"]
    ax = plots.break_even(costs, ax=axes())
    amortized, each, (mark) = ax.lines
    (x,), (y,) = mark.get_data()
    assert x == pytest.approx(even)
    assert ax.get_xlim()[0] == 1
    assert ax.get_xlim()[1] >= 10 * even
    count, seconds = amortized.get_data()
    fits = each.get_ydata()
    # Both are straight in N.
    for line in (seconds, fits):
        assert line == pytest.approx(np.poly1d(np.polyfit(count, line, 1))(count), rel=1e-4)
    for line in (seconds, fits):
        assert np.interp(even, count, line) == pytest.approx(y, rel=1e-9)
    assert (seconds[count < even] > fits[count < even]).all()
    assert (seconds[count > even] < fits[count > even]).all()
    (text,) = ax.texts
    assert text.get_text() == f"break-even: {even:,.0f} data"


def test_seconds_of_the_break_even_are_those_that_were_measured() -> None:
    one, other = plots.break_even(ledger(), ax=axes()).lines[:2]
    assert (one.get_ydata()[0], other.get_ydata()[0]) == pytest.approx((30.01, 0.5))
    one, other = plots.break_even(price_list(), ax=axes()).lines[:2]
    assert (one.get_ydata()[0], other.get_ydata()[0]) == pytest.approx((60.011, 0.226))


@pytest.mark.parametrize(
    ("even", "said"),
    [(np.inf, "q* is the cheaper for any"), (-3.0, "amortized is the cheaper for any")],
)
def test_where_nothing_crosses_it_is_said(even: float, said: str) -> None:
    ax = plots.break_even(ledger(even=even), ax=axes())
    assert ax.get_title().startswith(said)
    assert len(ax.lines) == 2


@pytest.mark.parametrize(("make", "call"), [(ledger, "compare"), (price_list, "repair_costs")])
def test_a_break_even_needs_the_training(make: Callable[[], Any], call: str) -> None:
    costs = make()
    costs.dataset.attrs["break_even"] = np.nan
    with pytest.raises(ValueError, match=rf"training are not known.*ppvae\.{call}\(\.\.\., fit="):
        plots.break_even(costs)


# Mode, nats, their error, seconds.
POINTS = [
    *(("amortized", -40.0, 0.1, 0.001), ("amortized", -3.0, 0.1, 1.0)),
    *(("amortized", -2.5, 0.1, 3.0), ("amortized", -2.4, 0.1, 2.0)),
    *(("per datapoint", -4.0, 0.05, 0.5), ("per datapoint", -2.0, 0.01, 0.4)),
    *(("from the encoder", -2.1, 0.02, 2.5), ("from the encoder", -2.0, 0.01, 2.6)),
]


def timed(
    evidence: float = -1.5, bound: str = "exact", converged: float = 1.0
) -> ppvae.ElboAgainstTime:
    columns = zip(*POINTS, strict=True)
    return ppvae.ElboAgainstTime(
        xarray.Dataset(
            {
                name: ("point", list(values))
                for name, values in zip(
                    ("mode", "elbo", "elbo_stderr", "seconds"), columns, strict=True
                )
            },
            attrs={
                "rows": 60,
                "evidence": evidence,
                "evidence_bound": bound,
                "converged": converged,
            },
        )
    )


def test_elbos_stand_at_their_seconds() -> None:
    ax = plots.elbo_against_time(timed(), ax=axes())
    assert ax.get_xscale() == "log"
    for container, mode in zip(ax.containers, dict.fromkeys(p[0] for p in POINTS), strict=True):
        own = [point for point in POINTS if point[0] == mode]
        seconds, elbo = container.lines[0].get_data()
        assert elbo == pytest.approx([point[1] for point in own])
        assert seconds == pytest.approx([point[3] for point in own])
        for whisker, point in zip(container.lines[2][0].get_segments(), own, strict=True):
            assert whisker[1, 1] - whisker[0, 1] == pytest.approx(4 * point[2])
    joined = {line.get_label(): line.get_data() for line in ax.lines if line.get_label()[0] != "_"}
    # A training that took longer and was worse is not on the line.
    assert joined["amortized, while it trains"][1].tolist() == [-40.0, -3.0, -2.4]
    assert joined["per datapoint, cold"][1].tolist() == [-2.0]
    assert {text.get_text(): text.xy[1] for text in ax.texts} == {"L[q*]": -2.0, "log p(x)": -1.5}
    bounded = plots.elbo_against_time(timed(bound="lower"), ax=axes())
    assert {text.get_text() for text in bounded.texts} == {"L[q*]", "lower bound on log p(x)"}
    part = plots.elbo_against_time(timed(converged=0.9), ax=axes())
    assert part.texts[0].get_text() == "L[q*], converged in 90% of the rows"
    # Eight times the distance of the ends from the best: that of an untrained encoder is beyond.
    low, high = ax.get_ylim()
    assert -40 < low < -1.5 - 8 * 0.9
    assert high > -1.5
    assert ax.get_xlim()[0] > 0.1


def test_elbos_that_are_not_finite() -> None:
    found = timed(np.nan)
    found.dataset["elbo"][:4] = -np.inf
    ax = plots.elbo_against_time(found, ax=axes())
    assert [text.get_text() for text in ax.texts] == ["L[q*]"]
    assert ax.get_ylim()[0] < -2.1
    ax.figure.canvas.draw()
    found.dataset["elbo"][:] = -np.inf
    with pytest.raises(ValueError, match="no ELBO is finite"):
        plots.elbo_against_time(found)


def run_of(values: list[float], start: float = 0.0) -> ppvae.Fit:
    return ppvae.Fit(
        losses=torch.tensor(values),
        elapsed=start + torch.arange(1, len(values) + 1, dtype=torch.float64) / 10,
        seconds=1.0,
        status="",
        completed=True,
        steps=len(values),
        batch_size=1,
    )


def test_losses_are_means_over_the_steps_before() -> None:
    run = run_of([5.0, 3.0, 4.0, 2.0])
    mean, behind = plots.losses(run, window=2, ax=axes()).lines
    assert mean.get_data()[0].tolist() == [2, 3, 4]
    assert mean.get_ydata() == pytest.approx([4.0, 3.5, 3.0])
    assert behind.get_ydata().tolist() == [5, 3, 4, 2]
    ax = plots.losses({"one": run, "other": run_of([1.0] * 5, 7.0)}, against="time", ax=axes())
    assert ax.get_xlabel() == "wall time (s)"
    assert ax.get_ylabel() == "loss (nats per datum)"
    one, other = ax.lines
    assert one.get_xdata() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert other.get_xdata() == pytest.approx([7.1, 7.2, 7.3, 7.4, 7.5])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["one", "other"]
    for unfit in ({}, run_of([])):
        with pytest.raises(ValueError, match="at least one run"):
            plots.losses(unfit)
    with pytest.raises(ValueError, match="window: expected 1 to 4 steps.*got 5"):
        plots.losses(run, window=5)
    with pytest.raises(ValueError, match='against: expected "step" or "time"; got .epoch'):
        plots.losses(run, against="epoch")  # type: ignore[arg-type]


# --- Weights -----------------------------------------------------------------------------------


def judged(k: list[float]) -> ppvae.WeightDiagnostics:
    values = torch.tensor(k, dtype=torch.float64)
    nothing = ppvae.Estimate(values, values, "lower", "iwae")
    smoothed = Smoothed(values, values, values)
    return ppvae.WeightDiagnostics(values, 0.5, values, nothing, smoothed, 100)


def test_sorted_k_hats_are_those_of_each_guide() -> None:
    ax = plots.pareto_k_sorted(ledger(), ax=axes())
    drawn = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
    assert drawn["amortized"] == [0.2, 0.6, 0.9]
    assert drawn["q*, per datapoint"] == [-0.2, 0.1, 0.5]
    assert ax.get_title() == (
        "not drawn: amortized: unknown in 1; per_datapoint: equal weights in 1"
    )
    (band,) = ax.patches
    assert band.get_label() == "above 0.67: not reliable with 1,000 draws"
    low, high = band.get_extents().transformed(ax.transData.inverted()).intervaly
    assert low == pytest.approx(2 / 3)
    assert high >= 1
    one = plots.pareto_k_sorted(ledger(), guide="per_datapoint", ax=axes())
    assert one.lines[0].get_ydata().tolist() == [-0.2, 0.1, 0.5]
    assert one.get_title() == "not drawn: equal weights in 1"
    alone = plots.pareto_k_sorted(judged([0.7, 0.1, 3.0]), ax=axes())
    assert alone.lines[0].get_ydata().tolist() == [0.1, 0.7, 3.0]
    assert alone.patches[0].get_label() == "above 0.50: not reliable with 100 draws"
    assert alone.get_title() == ""
    plots.pareto_k_sorted(judged([-np.inf, np.nan]), ax=axes())


def test_k_hats_stand_above_the_gap_of_their_row() -> None:
    ax = plots.pareto_k_against(ledger(), ax=axes())
    (container,) = ax.containers
    gap, k = container.lines[0].get_data()
    assert (gap.tolist(), k.tolist()) == ([0.32, 0.45, 0.11], [0.9, 0.2, 0.6])
    lengths = [whisker[1, 0] - whisker[0, 0] for whisker in container.lines[2][0].get_segments()]
    assert lengths == pytest.approx([0.08, 0.2, 0.08])
    assert ax.get_title() == "not drawn: unknown in 1"
    without = ledger()
    without.dataset["inference_gap"][0] = np.inf
    ax = plots.pareto_k_against(without, ax=axes())
    assert ax.get_title() == "not drawn: unknown in 1; no finite gap in 1"


def test_k_hats_need_a_known_guide(toy: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"expected one of \['amortized', 'per_datapoint'\]; got"):
        plots.pareto_k_sorted(ledger(), guide="third")
    with pytest.raises(ValueError, match="are of one guide and name none; got 'one'"):
        plots.pareto_k_sorted(judged([0.1]), guide="one")
    with pytest.raises(ValueError, match=r"expected one of \['one', 'other'\]; got None"):
        plots.pareto_k_against(toy.several)


# --- Bounds ------------------------------------------------------------------------------------


def test_the_bounds_of_a_sandwich_stand_at_their_temperatures() -> None:
    found = sandwiches()
    ax = plots.sandwich(found, exact=torch.tensor([-3.0, -2.0, -4.0]), ax=axes())
    for container, side in zip(ax.containers, ("upper", "lower"), strict=True):
        assert container.get_label() == f"{side} bound"
        count, mean = container.lines[0].get_data()
        assert count.tolist() == [10, 20, 80]
        wanted = [getattr(found[n], side) for n in (10, 20, 80)]
        assert mean == pytest.approx([each.mean for each in wanted])
        for whisker, each in zip(container.lines[2][0].get_segments(), wanted, strict=True):
            assert whisker[1, 1] - whisker[0, 1] == pytest.approx(4 * each.mean_stderr)
    assert ax.lines[-1].get_ydata()[0] == pytest.approx(-3.0)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["10", "20", "80"]
    assert len(plots.sandwich(found, ax=axes()).get_legend().get_texts()) == 2


def test_widths_are_those_of_the_rows_in_order() -> None:
    found = sandwiches()
    ax = plots.sandwich_widths(found, ax=axes())
    for line, count in zip(ax.lines, (10, 20, 80), strict=False):
        widths = line.get_ydata()
        assert (np.diff(widths) >= 0).all()
        assert widths.mean() == pytest.approx(found[count].width)
        assert line.get_label().startswith(f"{count}: ")
    assert ax.lines[2].get_ydata() == pytest.approx([-0.03, 0.15, 0.45])


def test_whiskers_of_a_sandwich_are_said_to_be_those_of_the_chains() -> None:
    # The draw of the posterior that the upper chains share scatters too, by an unknown amount.
    label = plots.sandwich(sandwiches(), ax=axes()).get_ylabel()
    assert "± 2 chain errors" in label


def test_the_width_of_a_single_row_has_no_error() -> None:
    found = ppvae.Sandwich(torch.zeros(1, 2), annealed([-3.5]), annealed([-2.0], "upper"))
    ax = plots.sandwich_widths({10: found}, ax=axes())
    assert ax.get_legend().get_texts()[0].get_text() == "10: 1.5 ± unknown"


def test_bounds_against_the_work_are_measured_from_the_exact_evidence() -> None:
    lower = {name: each.lower for name, each in sandwiches().items()}
    exact = torch.tensor([-3.0, -2.0, -4.0], requires_grad=True)
    known = plots.evidence_bounds({"ais": lower}, label="T", exact=exact, ax=axes())
    unknown = plots.evidence_bounds({"ais": lower}, label="T", ax=axes())
    for ax, off in ((known, -3.0), (unknown, 0.0)):
        (container,) = ax.containers
        count, mean = container.lines[0].get_data()
        assert count.tolist() == [10, 20, 80]
        assert mean == pytest.approx([lower[n].mean - off for n in (10, 20, 80)])
        for whisker, n in zip(container.lines[2][0].get_segments(), (10, 20, 80), strict=True):
            assert whisker[1, 1] - whisker[0, 1] == pytest.approx(4 * lower[n].mean_stderr)
    assert known.get_ylabel().startswith("estimate less exact log p(x)")
    assert unknown.get_ylabel().startswith("log p(x)")


def test_bounds_that_do_not_go_together_are_refused() -> None:
    found = sandwiches()
    other = ppvae.Sandwich(torch.ones(3, 2), found[10].lower, found[10].upper)
    for draw in (plots.sandwich, plots.sandwich_widths):
        with pytest.raises(ValueError, match="of the same simulated rows"):
            draw(found | {5: other})
        with pytest.raises(ValueError, match="results: expected at least one result; got none"):
            draw({})
        with pytest.raises(ValueError, match="results: expected positive numbers as keys; got 0"):
            draw({0: found[10]})
    with pytest.raises(ValueError, match="estimates: expected at least one"):
        plots.evidence_bounds({"ais": {}}, label="T")
    with pytest.raises(ValueError, match=r"of the same rows; got \[2, 3\] rows"):
        plots.evidence_bounds(
            {"a": {1: found[10].lower}, "b": {1: annealed([0.0, 1.0])}}, label="T"
        )


# --- Images ------------------------------------------------------------------------------------


def test_samples_are_decoded_draws_from_the_prior(vae: SimpleNamespace) -> None:
    ax = plots.samples(vae.model, vae.shape, rows=2, columns=3, seed=5, ax=axes())
    with forked_rng(5):
        z = torch.randn(6, 2, dtype=torch.get_default_dtype())
    wanted = vae.model.decode(z.float())
    torch.testing.assert_close(tiles(ax, vae.shape, 3).float(), wanted)
    other = plots.samples(vae.model, vae.shape, rows=2, columns=3, seed=6, ax=axes())
    assert not torch.allclose(tiles(ax, vae.shape, 3), tiles(other, vae.shape, 3))


def test_reconstructions_stand_under_their_images(vae: SimpleNamespace) -> None:
    ax = plots.reconstructions(vae.model, vae.guide, vae.x, vae.shape, ax=axes())
    above, below = tiles(ax, vae.shape, 7).float().split(7)
    torch.testing.assert_close(above, vae.x)
    with torch.no_grad():
        loc = vae.guide.params(vae.x)[:, :2]
    torch.testing.assert_close(below, vae.model.decode(loc))


def test_scattered_points_are_the_means_of_q_under_their_labels(vae: SimpleNamespace) -> None:
    ax = plots.latent_scatter(vae.guide, vae.x, vae.labels, ax=axes())
    with torch.no_grad():
        loc = vae.guide.params(vae.x)[:, :2].numpy()
    for label, points in zip([0, 1, 2], ax.collections, strict=True):
        chosen = [row for row, own in enumerate(vae.labels) if own == label]
        assert points.get_label() == str(label)
        np.testing.assert_allclose(points.get_offsets(), loc[chosen], rtol=1e-6)
    (points,) = plots.latent_scatter(vae.guide, vae.x, ax=axes()).collections
    np.testing.assert_allclose(points.get_offsets(), loc, rtol=1e-6)


def test_the_latent_grid_decodes_the_quantiles_of_the_prior(vae: SimpleNamespace) -> None:
    size = 4
    ax = plots.latent_grid(vae.model, vae.shape, size=size, ax=axes())
    drawn = tiles(ax, vae.shape, size).float().reshape(size, size, -1)
    normal = torch.distributions.Normal(0.0, 1.0)
    share = (torch.arange(size) + 0.5) / size
    for row in range(size):
        for column in range(size):
            # z₁ rises to the right, z₂ upwards.
            z = normal.icdf(torch.stack([share[column], share[size - 1 - row]])).float()
            torch.testing.assert_close(drawn[row, column], vae.model.decode(z), atol=1e-5, rtol=0)


def test_an_interpolation_is_a_row_from_one_mean_to_the_other(vae: SimpleNamespace) -> None:
    ax = plots.interpolation(
        vae.model, vae.guide, vae.x[:2], vae.x[2:4], vae.shape, steps=5, ax=axes()
    )
    drawn = tiles(ax, vae.shape, 5).float().reshape(2, 5, -1)
    means = generation.posterior_means(vae.model, vae.guide, vae.x[:4])
    for row in range(2):
        for column in range(5):
            z = means[row] + column / 4 * (means[row + 2] - means[row])
            torch.testing.assert_close(drawn[row, column], vae.model.decode(z), atol=1e-5, rtol=0)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "0.5", "1"]


def test_a_traversal_has_a_row_for_each_coordinate(vae: SimpleNamespace) -> None:
    z, values = vae.x.new_tensor([0.3, -0.7]), [-2.0, 0.5, 1.5]
    ax = plots.traversals(vae.model, z, vae.shape, values=values, ax=axes())
    drawn = tiles(ax, vae.shape, 3).float().reshape(2, 3, -1)
    for column, value in enumerate(values):
        first, second = z.new_tensor([value, -0.7]), z.new_tensor([0.3, value])
        torch.testing.assert_close(drawn[0, column], vae.model.decode(first), atol=1e-5, rtol=0)
        torch.testing.assert_close(drawn[1, column], vae.model.decode(second), atol=1e-5, rtol=0)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["-2", "0.5", "1.5"]
    other = plots.traversals(vae.model, z, vae.shape, dimensions=[1], values=values, ax=axes())
    torch.testing.assert_close(tiles(other, vae.shape, 3).float(), drawn[1])
    with pytest.raises(ValueError, match=r"latent of one datum, shape \(2,\); got \(1, 2\)"):
        plots.traversals(vae.model, z[None], vae.shape)
    with pytest.raises(ValueError, match="at least one coordinate"):
        plots.traversals(vae.model, z, vae.shape, dimensions=[])


def test_categories_have_no_grey() -> None:
    model, guide = pairs.vae(12, 2, [4], Categorical(3))
    for draw in (
        lambda: plots.samples(model, (3, 4)),
        lambda: plots.reconstructions(model, guide, torch.zeros(2, 12), (3, 4)),
        lambda: plots.traversals(model, torch.zeros(2), (3, 4)),
    ):
        with pytest.raises(ValueError, match=r"3 probabilities each.*\[\.\.\., k\]"):
            draw()


def test_latent_figures_need_two_dimensions() -> None:
    model, guide = pairs.vae(x_dim=12, z_dim=3, hidden=[4])
    x = torch.zeros(2, 12)
    with pytest.raises(ValueError, match=r"two-dimensional latent; DiagonalNormal\(3\).*z_dim=2"):
        plots.latent_scatter(guide, x)
    with pytest.raises(ValueError, match="two-dimensional latent; the model has z_dim=3"):
        plots.latent_grid(model, (3, 4))


@pytest.mark.parametrize("shape", [(12,), (4, 4), (3, 2, 2)])
def test_images_need_their_height_and_width(vae: SimpleNamespace, shape: tuple[int, ...]) -> None:
    for draw in (
        lambda: plots.samples(vae.model, shape),
        lambda: plots.reconstructions(vae.model, vae.guide, vae.x, shape),
        lambda: plots.latent_grid(vae.model, shape),
        lambda: plots.interpolation(vae.model, vae.guide, vae.x, vae.x, shape),
        lambda: plots.traversals(vae.model, torch.zeros(2), shape),
    ):
        with pytest.raises(ValueError, match="height and width of an image of 12 pixels"):
            draw()


def test_sizes_and_labels_are_checked(vae: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="at least 1; got 0 and 10"):
        plots.samples(vae.model, vae.shape, rows=0)
    with pytest.raises(ValueError, match="size must be at least 1"):
        plots.latent_grid(vae.model, vae.shape, size=0)
    with pytest.raises(ValueError, match=r"expected shape \(7,\)"):
        plots.latent_scatter(vae.guide, vae.x, [1, 2])


# --- All of them -------------------------------------------------------------------------------

RUN = run_of([5.0, 3.0, 4.0, 2.0])
EVERY: dict[str, Callable[[SimpleNamespace, SimpleNamespace, Any], Any]] = {
    "toy_posterior": lambda t, v, ax: plots.toy_posterior(t.x, t.guide, t.comparison.local, ax=ax),
    "gap_against": lambda t, v, ax: plots.gap_against(t.comparison, t.x, label="x", ax=ax),
    "gap_bars": lambda t, v, ax: plots.gap_bars(t.comparison, ax=ax),
    "gap_sorted": lambda t, v, ax: plots.gap_sorted(t.comparison, ax=ax),
    "break_even": lambda t, v, ax: plots.break_even(ledger(), ax=ax),
    "elbo_against_time": lambda t, v, ax: plots.elbo_against_time(timed(), ax=ax),
    "losses": lambda t, v, ax: plots.losses({"one": RUN, "other": RUN}, ax=ax),
    "pareto_k_sorted": lambda t, v, ax: plots.pareto_k_sorted(t.several, ax=ax),
    "pareto_k_against": lambda t, v, ax: plots.pareto_k_against(t.comparison, ax=ax),
    "evidence_bounds": lambda t, v, ax: plots.evidence_bounds(
        {"ais": {n: each.lower for n, each in sandwiches().items()}}, label="temperatures", ax=ax
    ),
    "sandwich": lambda t, v, ax: plots.sandwich(sandwiches(), ax=ax),
    "sandwich_widths": lambda t, v, ax: plots.sandwich_widths(sandwiches(), ax=ax),
    "explanation": lambda t, v, ax: plots.explanation(EXPLANATION, ax=ax),
    "repair_costs": lambda t, v, ax: plots.repair_costs(COSTS, ax=ax),
    "refinement": lambda t, v, ax: plots.refinement(refined(), MEASURED, ax=ax),
    "element_kl": lambda t, v, ax: plots.element_kl([kl_of([1.0, 2.0, 3.0])] * 2, [0, 1], ax=ax),
    "samples": lambda t, v, ax: plots.samples(v.model, v.shape, ax=ax),
    "reconstructions": lambda t, v, ax: plots.reconstructions(
        v.model, v.guide, v.x, v.shape, ax=ax
    ),
    "interpolation": lambda t, v, ax: plots.interpolation(
        v.model, v.guide, v.x[:3], v.x[3:6], v.shape, ax=ax
    ),
    "traversals": lambda t, v, ax: plots.traversals(v.model, v.x.new_zeros(2), v.shape, ax=ax),
    "latent_scatter": lambda t, v, ax: plots.latent_scatter(v.guide, v.x, v.labels, ax=ax),
    "latent_grid": lambda t, v, ax: plots.latent_grid(v.model, v.shape, ax=ax),
    "gradient_variance": lambda t, v, ax: plots.gradient_variance(
        ppvae.gradient_variance(t.model, t.guide, t.x, num_draws=8), ax=ax
    ),
    "rank_ecdf": lambda t, v, ax: plots.rank_ecdf(ppvae.calibrate(t.model, t.guide, t.x), ax=ax),
    "coverage": lambda t, v, ax: plots.coverage(ppvae.calibrate(t.model, t.guide, t.x), ax=ax),
    "z_scores": lambda t, v, ax: plots.z_scores(ppvae.calibrate(t.model, t.guide, t.x), ax=ax),
}
each_plot = pytest.mark.parametrize("draw", EVERY.values(), ids=EVERY.keys())


def test_every_public_function_is_in_the_list() -> None:
    rooms = (
        *("bounds", "calibration", "collapse", "costs", "fitting", "gaps", "gradients"),
        *("images", "mending", "toy", "weights"),
    )
    drawing = [getattr(plots, room) for room in rooms]
    public = {
        name
        for room in drawing
        for name, value in vars(room).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__module__", "") == room.__name__
    }
    assert public == set(plots.__all__)
    assert public == set(EVERY)


# Drawn on a sheet, whose axes count pixels.
SHEETS = ("samples", "reconstructions", "interpolation", "traversals", "latent_grid")
# What is measured or counted, and numbers without a unit.
UNIT = re.compile(r"nats|\(s\)|seconds|%|share|number of data|posterior sd|step|rank|temperatures")
PURE = {
    *("x", "latent z", "density", "mean of $z_1$", "mean of $z_2$", "Pareto k-hat of the weights"),
    "contraction (1 − posterior variance / prior variance)",
    "cost of a draw (Trace_ELBO: 1)",
    "variance of the gradient, guide\n(± 2 standard errors)",  # that of each parameter, squared
}


def are_names(axis: Any) -> bool:
    """Whether an axis has words for ticks, which say what it holds."""
    texts = [tick.get_text() for tick in axis.get_ticklabels()]
    return any(re.search("[a-zA-Z]{2}", text) for text in texts if "math" not in text)


def looks(ax: Any) -> list[tuple[Any, Any]]:
    """Colour of each line, set of points and bar, and all else that tells it apart."""
    out = []
    for line in ax.lines:
        marker = line.get_marker()
        if marker in ("_", "|") or (len(line.get_xdata()) < 2 and marker == "None"):
            continue  # the end of a whisker
        # Of a custom dash the public name is that of a plain one.
        dash = None if line.get_linestyle() == "None" else repr(line._unscaled_dash_pattern)
        if line.get_linewidth() <= 1 and (marker == "None" or not marker):
            continue  # an axis or a level, which has its name beside it
        fill = line.get_fillstyle(), line.get_markerfacecolor() == "white"
        out.append((to_hex(line.get_color()), (dash, marker, fill)))
    for points in ax.collections:
        if isinstance(points, PathCollection):
            filled = bool(len(points.get_facecolor()))
            colour = points.get_facecolor() if filled else points.get_edgecolor()
            shape = points.get_paths()[0].vertices.tobytes()
            out.append((to_hex(colour[0]), (shape, filled)))
    for bar in ax.patches:
        if isinstance(bar, Rectangle) and bar.get_width() * bar.get_height():
            out.append((to_hex(bar.get_edgecolor()), bar.get_hatch()))
    return out


def covered(ax: Any, frame: Any) -> list[Any]:
    """Lines, points and bars that a frame lies upon."""

    def within(at: Any, box: Any) -> Any:
        return ((at > box.min) & (at < box.max)).all(axis=1)

    out = []
    for line in ax.lines:
        path = line.get_transform().transform_path(line.get_path())
        at = (path if len(path) > 100 else path.interpolated(50)).vertices
        if (within(at, frame) & within(at, ax.bbox)).any():
            out.append(line)
    for points in ax.collections:
        if isinstance(points, PathCollection):
            at = points.get_offset_transform().transform(points.get_offsets())
            if within(np.asarray(at), frame).any():
                out.append(points)
    return out + [bar for bar in ax.patches if frame.overlaps(bar.get_window_extent())]


def check_look(name: str, ax: Any) -> None:
    """Axes with units, nothing told apart by colour alone, and no text on data or cut off."""
    ax.figure.canvas.draw()
    for axis in (ax.xaxis, ax.yaxis):
        label = axis.label.get_text()
        if name not in SHEETS and not are_names(axis):
            assert label in PURE or UNIT.search(label), (name, label)
    found = looks(ax)
    for (one, look), (other, its_look) in itertools.combinations(found, 2):
        assert one == other or look != its_look, (name, look)
    legend = ax.get_legend()
    if legend is not None:
        assert not covered(ax, legend.get_window_extent()), name
    page = ax.figure.bbox
    for text in ax.figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text.get_in_layout():
            assert text.get_fontsize() >= 8, (name, text)
    # In pixels, of which the edges of letters take some, more or less by matplotlib's version.
    frame = ax.get_tightbbox().padded(-3)
    assert (frame.min > page.min).all(), name
    assert (frame.max < page.max).all(), name


def test_the_check_of_the_look_finds_what_it_looks_for() -> None:
    def drawn(**other: Any) -> Any:
        ax = plt.subplots(figsize=(3, 2), layout="constrained")[1]
        ax.plot([0, 1, 2], color="red", linewidth=2, label="one")
        ax.plot([1, 2, 3], color="blue", linewidth=2, label="other", **other)
        ax.set_xlabel("step")
        ax.set_ylabel("ELBO (nats per datum)")
        return ax

    check_look("", drawn(linestyle="--"))
    with pytest.raises(AssertionError, match="None"):  # the marker that both have
        check_look("", drawn())
    for change in (
        lambda ax: ax.set_ylabel("ELBO"),
        lambda ax: ax.set_xlabel("step", fontsize=6),
        lambda ax: ax.legend(loc="upper right", borderpad=4),
        lambda ax: ax.annotate("cut off", (1, 1), xytext=(3, 1), textcoords="axes fraction"),
    ):
        ax = drawn(linestyle="--")
        change(ax)
        ax.figure.set_layout_engine("none")
        with pytest.raises(AssertionError):
            check_look("", ax)


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_the_legend_of_the_toy_covers_no_density(toy: SimpleNamespace, row: int) -> None:
    ax = plt.subplots(figsize=(4.5, 3.8), layout="constrained")[1]  # half of a wide figure
    plots.toy_posterior(toy.x, toy.guide, toy.comparison.local, row=row, ax=ax)
    check_look("toy_posterior", ax)


def test_seven_sites_are_told_apart_without_colour() -> None:
    names = tuple("abcdefg")
    kl = [kl_of([float(i + t) for i in range(7)], names) for t in range(1, 4)]
    ax = plots.element_kl(kl, [0, 1, 2])
    assert len({look for _, look in looks(ax)}) == 7
    check_look("element_kl", ax)


@each_plot
def test_a_plot_draws_into_the_axes_given_and_into_no_other(
    draw: Any, toy: SimpleNamespace, vae: SimpleNamespace
) -> None:
    ax = axes()
    open_figures = plt.get_fignums()
    assert draw(toy, vae, ax) is ax
    assert plt.get_fignums() == open_figures
    ax.figure.canvas.draw()  # warnings, of missing glyphs say, are errors here


@pytest.mark.parametrize("name", EVERY)
def test_a_plot_without_axes_makes_one_figure_and_all_have_one_look(
    name: str, toy: SimpleNamespace, vae: SimpleNamespace
) -> None:
    ax = EVERY[name](toy, vae, None)
    assert [ax.figure.number] == plt.get_fignums()
    check_look(name, ax)


@each_plot
def test_a_plot_leaves_everything_else_alone(
    draw: Any, toy: SimpleNamespace, vae: SimpleNamespace
) -> None:
    with private_store():
        pyro.param("mine", torch.ones(1))
        before = (dict(mpl.rcParams), torch.get_rng_state(), np.random.get_state()[1].copy())
        modules = [toy.model, toy.guide, vae.model, vae.guide]
        for module in modules:
            module.train()
        draw(toy, vae, axes())
        assert dict(mpl.rcParams) == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
        assert (np.random.get_state()[1] == before[2]).all()
        assert list(pyro.get_param_store().keys()) == ["mine"]
        assert all(part.training for module in modules for part in module.modules())
        assert all(p.requires_grad for module in modules for p in module.parameters())


# --- Collapse ----------------------------------------------------------------------------------


def kl_of(values: list[float], names: tuple[str, ...] = ("a[0]", "a[1]", "b")) -> ElementKL:
    zeros = torch.zeros(len(values), dtype=torch.float64)
    kl = torch.tensor(values, dtype=torch.float64)
    return ElementKL(kl, zeros, names, float(kl.sum()), 0.0)


def test_each_element_is_a_line_and_each_site_a_colour() -> None:
    found = [kl_of([0.0, 0.0, 0.0]), kl_of([2.0, 0.004, 0.5]), kl_of([3.0, 0.0, 0.4])]
    ax = plots.element_kl(found, [0, 10, 25], ax=axes())
    drawn = [line.get_ydata().tolist() for line in ax.lines]
    assert drawn == [[0, 2, 3], [0, 0.004, 0], [0, 0.5, 0.4]]
    assert all(line.get_xdata().tolist() == [0, 10, 25] for line in ax.lines)
    looks = [(line.get_color(), line.get_linestyle()) for line in ax.lines]
    assert looks[0] == looks[1]
    assert all(one != other for one, other in zip(looks[0], looks[2], strict=True))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    assert ax.get_ylim()[0] == 0
    # Out of order a site's figure can be negative, and is then shown.
    low = plots.element_kl([kl_of([0.1, -0.2, 0.3])] * 2, [0, 1], ax=axes())
    assert low.get_ylim()[0] < -0.2
    # A second figure on shared axes is not cut off by the first one's limits.
    _, (left, right) = plt.subplots(1, 2, sharey=True)
    plots.element_kl([kl_of([0.1, 0.2, 0.3])] * 2, [0, 1], ax=left)
    plots.element_kl([kl_of([0.1, 0.2, 9.0])] * 2, [0, 1], ax=right)
    assert right.get_ylim()[1] > 9


def test_element_kl_refuses_what_does_not_go_together() -> None:
    one = kl_of([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="steps: .* got 2 for 1 results"):
        plots.element_kl([one], [0, 1])
    with pytest.raises(ValueError, match="at least one result; got 0"):
        plots.element_kl([], [])
    with pytest.raises(ValueError, match=r"found: .*\('a\[0\]', 'a\[1\]', 'b'\); got \('z',\)"):
        plots.element_kl([one, kl_of([1.0], ("z",))], [0, 1])
