"""What mends a gap: its causes, the price of each repair, and how well a row's gap is predicted."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppvae.density import check_count
from ppvae.explanation import PARTS, Explanation
from ppvae.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    Labels,
    PointLabel,
    axes_or_new,
    legend_below,
    settle,
    styled,
)
from ppvae.refinement import ACCEPTED, GIVEN_UP, REFINED, Refinement
from ppvae.repairs import RepairCosts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CAUSES = {
    "generalisation": "generalisation\n(rows not trained on)",
    "training": "training\n(stopped too early)",
    "capacity": "capacity\n(network too small)",
    "missing_inputs": "missing inputs\n(not given to the encoder)",
}

_KINDS: dict[str, dict[str, Any]] = {
    "refinement": {
        "label": "refinement, number of steps",
        "color": BLUE,
        "marker": "o",
        "linestyle": "-",
    },
    "per datapoint": {
        "label": "q* in the guide's family",
        "color": ORANGE,
        "marker": "s",
        "linestyle": "none",
    },
    "family": {
        "label": "q* in a richer family",
        "color": GREEN,
        "marker": "D",
        "linestyle": "none",
    },
    "training": {
        "label": "encoder training, number of steps",
        "color": PINK,
        "marker": "^",
        "linestyle": "--",
    },
    "resampling": {
        "label": "resampling, number of draws",
        "color": BLACK,
        "marker": "X",
        "linestyle": ":",
    },
}
# In points: labels of points that are nearer to each other become one.
_NEAR = 14.0

_OUTCOMES: dict[str, dict[str, Any]] = {
    ACCEPTED: {"color": ORANGE, "marker": "o", "facecolors": "none"},
    REFINED: {"color": BLUE, "marker": "o"},
    GIVEN_UP: {"color": BLACK, "marker": "x"},
}
# Nats: below this, and below zero, the axes are linear.
_LINEAR = 1e-3


def explanation(explanation: Explanation, *, ax: Axes | None = None) -> Axes:
    """The parts of an amortization gap, in nats, with two standard errors.

    The bar of the main cause is solid.

    Args:
        explanation: What `ppvae.explain` found.
        ax: Where to draw; a new figure if left out.

    Example:
        >>> import ppvae
        >>> model, guide = ppvae.pairs.factor_analysis(x_dim=3, z_dim=1)
        >>> x = model(size=120).detach()
        >>> found = ppvae.explain(ppvae.compare(model, guide, x[100:]), x[:100], steps=20)
        >>> ax = explanation(found)
        >>> len(ax.patches)
        4
    """
    ds = explanation.dataset
    values = ds["gap"].sel(part=list(PARTS)).values
    errors = 2 * ds["gap_stderr"].sel(part=list(PARTS)).values
    ax = axes_or_new(ax, 5.5, 3.0)
    at = np.arange(len(PARTS))
    solid = [part == explanation.cause for part in PARTS]
    ax.barh(
        at,
        values,
        height=0.6,
        # An infinite error, of a single row, has no whisker.
        xerr=np.where(np.isfinite(errors), errors, np.nan),
        color=[BLUE if s else "white" for s in solid],
        edgecolor=BLUE,
        hatch=["" if s else "///" for s in solid],
        error_kw={"ecolor": BLACK, "capsize": 3, "elinewidth": 1},
    )
    ax.axvline(0, color=BLACK, linewidth=0.8)
    causes = dict(_CAUSES)
    if ds.attrs.get("sees_all_inputs"):
        causes["missing_inputs"] = "not learned\n(nothing is missing)"
    ax.set_yticks(at, [causes[part] for part in PARTS])
    ax.invert_yaxis()
    ax.margins(x=0.1)
    ax.locator_params(axis="x", nbins=6)  # Negative ones have long labels.
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("part of the amortization gap ± 2 standard errors\n(nats per datum)")
    return styled(ax, legend=False, grid="x")


def repair_costs(
    costs: RepairCosts, *, num_data: int | None = None, ax: Axes | None = None
) -> Axes:
    """What each repair of a guide brings, in nats, against the seconds that it takes.

    The upper a repair is, the more it brings; the further left, the cheaper it is. A whisker is
    two Monte Carlo errors. Repairs of the same kind and of growing effort are joined. Those without
    a finite gain are left out: where the guide has no finite ELBO, any repair gains infinitely.

    Args:
        costs: The price list.
        num_data: For how many data the seconds are, with what is spent once; the number of compared
            rows if left out.
        ax: Where to draw, with room below for the legend; a new figure if left out.

    Raises:
        ValueError: If ``num_data`` is not positive.

    Example:
        >>> import ppvae
        >>> model, guide = ppvae.pairs.factor_analysis(x_dim=3, z_dim=1)
        >>> comparison = ppvae.compare(model, guide, model(size=20).detach())
        >>> ax = repair_costs(ppvae.repair_costs(comparison), num_data=1000)
        >>> ax.get_xlabel()
        'seconds for 1,000 data'
    """
    ds = costs.dataset
    num_data = int(ds.attrs["rows"]) if num_data is None else num_data
    check_count("num_data", num_data)
    gain, kinds = ds["gain"].values, ds["kind"].values
    seconds = np.array([costs.seconds(num_data)[name] for name in ds["repair"].values.tolist()])
    rows = {kind: np.flatnonzero((kinds == kind) & np.isfinite(gain)) for kind in _KINDS}
    gaps = {"amortization gap": "amortization_gap", "total gap": "inference_gap"}
    heights = {name: ds.attrs[gap] for name, gap in gaps.items() if math.isfinite(ds.attrs[gap])}
    ax = axes_or_new(ax, 6.5, 4.6)
    ax.set_xscale("log")
    for kind, own in rows.items():
        if len(own):
            ax.errorbar(
                seconds[own],
                gain[own],
                yerr=2 * ds["gain_stderr"].values[own],
                markersize=6,
                linewidth=1.2,
                elinewidth=1,
                **_KINDS[kind],
            )
    ax.axhline(0, color=BLACK, linewidth=0.8)
    for height in heights.values():
        ax.axhline(height, color=GREY, linewidth=1, linestyle=(0, (6, 3)))
    ax.margins(x=0.12, y=0.1)
    ax.set_xlabel(f"seconds for {num_data:,} data")
    ax.set_ylabel("recovered ± 2 Monte Carlo errors\n(nats per datum)")
    styled(ax, legend=False)
    shown = np.concatenate(list(rows.values()))
    if not len(shown):
        return ax
    legend_below(ax)
    settle(ax)
    lines = [np.column_stack([ax.get_xlim(), (h, h)]) for h in (0.0, *heights.values())]
    for kind, own in rows.items():
        if len(own) and _KINDS[kind]["linestyle"] != "none":
            lines.append(np.column_stack([seconds[own], gain[own]]))
    points = np.column_stack([seconds[shown], gain[shown]])
    labels = Labels(ax, points, lines)
    labels.beside(_repair_labels(ax, costs, seconds, rows))
    for name, height in heights.items():
        labels.on_line(height, name)
    return ax


def _repair_labels(
    ax: Axes, costs: RepairCosts, seconds: Any, rows: dict[str, Any]
) -> list[PointLabel]:
    """A short label for each repair, near ones in one; the legend says of what kind each is."""
    names, gain = costs.dataset["repair"].values.tolist(), costs.dataset["gain"].values
    at = ax.transData.transform(np.column_stack([seconds, gain])) * 72 / ax.figure.dpi
    out = []
    for kind, style in _KINDS.items():
        own = rows[kind].tolist()
        if style["linestyle"] == "none":
            own.sort(key=seconds.__getitem__)
        groups: list[list[int]] = []
        for row in own:
            if groups and math.dist(at[groups[-1][0]], at[row]) < _NEAR:
                groups[-1].append(row)
            else:
                groups.append([row])
        for group in groups:
            text = ", ".join(_short(names[row]) for row in group)
            # On a logarithmic axis the middle is the geometric mean.
            middle = float(np.exp(np.log(seconds[group]).mean()))
            out.append(PointLabel(middle, float(gain[group].mean()), text))
    return out


def _short(repair: str) -> str:
    """The count in a repair's name, or what comes after the q*."""
    if repair.startswith("q* "):
        return repair.removeprefix("q* ")
    count = re.search(r"\d[\d,]*", repair)
    return count[0] if count else repair


def refinement(
    refinement: Refinement, measured: Tensor | Sequence[float], *, ax: Axes | None = None
) -> Axes:
    r"""The gap that one evaluation predicted for each row, against the one that was measured.

    In the corner stands Spearman's rank correlation: 1 where the prediction puts the rows in the
    right order, which is what refining the worst first needs. The axes are logarithmic, and linear
    below a thousandth of a nat where some gaps are not positive. Rows without a finite figure are
    left out, and their number is said.

    Args:
        refinement: What `ppvae.refine` did.
        measured: ``(batch,)``, the amortization gap of each row, in nats, such as that of
            `ppvae.compare`.
        ax: Where to draw; a new figure if left out.

    Raises:
        ValueError: If there is not one number for each row, or none is finite.

    Example:
        >>> import ppvae
        >>> model, guide = ppvae.pairs.factor_analysis()
        >>> x = model(size=20).detach()
        >>> gap = ppvae.compare(model, guide, x).dataset["amortization_gap"].values
        >>> ax = refinement(ppvae.refine(model, guide, x), gap)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('measured gap (nats)', 'predicted gap (nats)')
    """
    predicted = refinement.predicted_gap.detach().cpu().double().numpy()
    actual = torch.as_tensor(measured).detach().cpu().double().numpy()
    if actual.shape != predicted.shape:
        raise ValueError(
            f"measured: expected shape {predicted.shape}, a gap for each row; got {actual.shape}."
        )
    finite = np.isfinite(predicted) & np.isfinite(actual)
    if not finite.any():
        raise ValueError("measured: no row has both a finite measured and a finite predicted gap.")
    outcome = np.array(refinement.outcome)
    ax = axes_or_new(ax, 4.6, 4.6)
    for name, style in _OUTCOMES.items():
        own = finite & (outcome == name)
        if own.any():
            label = f"{name}: {own.sum()} row{'' if own.sum() == 1 else 's'}"
            ax.scatter(actual[own], predicted[own], s=16, linewidths=1, label=label, **style)
    everything = np.concatenate([actual[finite], predicted[finite]])
    low, high = _limits(ax, everything)
    ax.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle="--", zorder=0)
    ax.set_xlim(low, high)
    ax.set_ylim(low, high)
    ax.set_box_aspect(1)
    said = [_rank_correlation(actual[finite], predicted[finite])]
    if not finite.all():
        said.append(f"left out, not finite: {(~finite).sum()} of {len(finite)} rows")
    ax.set_xlabel("measured gap (nats)")
    ax.set_ylabel("predicted gap (nats)")
    styled(ax, legend=False, grid="both")
    on_axes = ax.transAxes.inverted().transform(
        ax.transData.transform(np.column_stack([actual[finite], predicted[finite]]))
    )
    upper_left = (on_axes[:, 0] < 0.5) & (on_axes[:, 1] > 0.7)
    lower_right = (on_axes[:, 0] > 0.5) & (on_axes[:, 1] < 0.3)
    ax.legend(
        title="\n".join(line for line in said if line),
        title_fontsize="small",
        alignment="left",
        frameon=False,
        fontsize="small",
        loc="upper left" if upper_left.sum() <= lower_right.sum() else "lower right",
    )
    return ax


def _limits(ax: Axes, values: Any) -> tuple[float, float]:
    """Set the scale of both axes, and give the limits that hold all values."""
    low, high = float(values.min()), float(values.max())
    if low > 0:
        ax.set_xscale("log")
        ax.set_yscale("log")
        return low / 1.5, high * 1.5
    ax.set_xscale("symlog", linthresh=_LINEAR)
    ax.set_yscale("symlog", linthresh=_LINEAR)
    return min(3 * low, -_LINEAR), max(2 * high, _LINEAR)


def _rank_correlation(one: Any, other: Any) -> str:
    """Spearman's, in words; nothing where all rows are alike."""
    if len(np.unique(one)) < 2 or len(np.unique(other)) < 2:
        return ""
    from scipy.stats import spearmanr

    return f"rank correlation {float(spearmanr(one, other).statistic):.2f}"
