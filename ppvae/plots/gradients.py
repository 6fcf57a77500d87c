"""Gradient estimators: their noise against their price."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ppvae.gradients import GradientVariance
from ppvae.plots.style import GREY, MANY, Labels, PointLabel, axes_or_new, settle, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKS = "osD^vPX<>ph*"
# How much of a mark is filled, and its colour, say its target.
_FILLS = ("full", "none", "bottom", "left", "top", "right")


def gradient_variance(
    result: GradientVariance, *, group: str = "guide", ax: Axes | None = None
) -> Axes:
    r"""The variance of each gradient estimator against what a draw of it costs.

    Both axes are logarithmic. Along a grey line variance × cost is the same, and so is the noise
    that is left for a given computing time: of two estimators of one target, the one below the
    other's line is the better. Targets differ in colour and in how much of a mark is filled;
    estimators of different targets do not compare. Whiskers are two standard errors. Estimators
    without noise stand at the lower edge with an arrow, as zero has no place on the axis.

    Args:
        result: What `ppvae.gradient_variance` measured.
        group: Which parameters: ``"model"``, ``"guide"``, ``"shared"`` or the name of a tensor.
        ax: Where to draw; a new figure if left out.

    Raises:
        ValueError: If the group is unknown.

    Example:
        >>> import ppvae
        >>> model, guide = ppvae.pairs.exponential_gaussian(hidden=[4])
        >>> result = ppvae.gradient_variance(model, guide, model(size=5), num_draws=20)
        >>> ax = gradient_variance(result, group="guide")
        >>> ax.get_xscale(), ax.get_yscale()
        ('log', 'log')
    """
    result.check_group(group)
    ds = result.dataset
    one = ds.sel(group=group)
    names, targets = ds["estimator"].values.tolist(), one["target"].values.tolist()
    cost, cost_error = one["relative_cost"].values, one["relative_cost_stderr"].values
    variance, error = one["variance"].values, one["variance_stderr"].values
    silent = (variance <= 0) | ~np.isfinite(one["snr"].values)
    ax = axes_or_new(ax, 6.5, 4.6)
    ax.set_xscale("log")
    ax.set_yscale("log")
    bottom = _limits(ax, cost, variance[~silent], bool(silent.any()))
    height = np.where(silent, bottom, variance)
    styles = _styles(targets)
    for i in range(len(names)):
        ax.errorbar(
            cost[i],
            height[i],
            xerr=2 * cost_error[i],
            # What would reach below zero ends where the axis does.
            yerr=None if silent[i] else [[min(2 * error[i], 0.999 * height[i])], [2 * error[i]]],
            marker=_MARKS[i % len(_MARKS)],
            markersize=7,
            elinewidth=1,
            linestyle="none",
            label=names[i],
            **styles[targets[i]],
        )
        if silent[i]:
            ax.annotate(
                "",
                (cost[i], ax.get_ylim()[0]),
                (cost[i], height[i]),
                arrowprops={"arrowstyle": "->", "color": styles[targets[i]]["color"]},
            )
    lines = _equal_worth(ax)
    reach = np.where(silent, height - ax.get_ylim()[0], np.minimum(2 * error, 0.999 * height))
    for x, y, e in zip(cost, height, reach, strict=True):
        if e > 0:
            lines.append(np.array([(x, max(y - e, ax.get_ylim()[0])), (x, y)]))
    for x, y, e in zip(cost, height, 2 * cost_error, strict=True):
        lines.append(np.array([(max(x - e, ax.get_xlim()[0]), y), (x + e, y)]))
    _plain_ticks(ax)
    ax.set_xlabel(f"cost of a draw ({names[0]}: 1)")
    ax.set_ylabel(f"variance of the gradient, {group}\n(± 2 standard errors)")
    styled(ax, legend=False, grid=None)
    _legend_of_targets(ax, styles)
    settle(ax)
    points = np.column_stack([cost, height])
    labels = Labels(ax, points, lines)
    labels.beside(
        [
            PointLabel(float(x), float(y), name + suffix)
            for x, y, name, suffix in zip(cost, height, names, _suffixes(one, silent), strict=True)
        ],
        lead=True,
    )
    return ax


def _suffixes(one: Any, silent: Any) -> list[str]:
    """What is said of estimators that have no variance."""
    nothing = one["gradient_norm"].values == 0
    return [
        "" if not none else ": no gradient" if zero else ": no noise"
        for none, zero in zip(silent, nothing, strict=True)
    ]


def _plain_ticks(ax: Axes) -> None:
    """Costs as plain numbers: the axis may hold no power of ten but 1."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())


def _limits(ax: Axes, cost: Any, variance: Any, below: bool) -> float:
    """Set the limits of both axes; give the height of what has no variance."""
    ax.set_xlim(cost.min() / 1.8, cost.max() * 1.8)
    low, high = (variance.min(), variance.max()) if len(variance) else (1.0, 1.0)
    span = max(high / low, 10.0)
    high *= span**0.12
    low /= span**0.12
    bottom = low / span**0.1
    ax.set_ylim(bottom / span**0.12 if below else low, high)
    if not len(variance):
        ax.set_yticks([], minor=False)
        ax.set_yticks([], minor=True)
    return float(bottom)


def _styles(targets: list[str]) -> dict[str, dict[str, Any]]:
    """Colour and filling of the marks of each target."""
    return {
        target: {
            "color": MANY[i % len(MANY)],
            "fillstyle": _FILLS[i % len(_FILLS)],
            "markerfacecoloralt": "white",
        }
        for i, target in enumerate(dict.fromkeys(targets))
    }


def _equal_worth(ax: Axes) -> list[Any]:
    """Lines of equal variance × cost, a power of ten apart or less; gives their corners."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    first, last = np.log10(left * low), np.log10(right * high)
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50) if (last - first) / s <= 12 or s == 50)
    lines = []
    for level in 10 ** np.arange(np.ceil(first / step) * step, last, step):
        line = np.array([(left, level / left), (right, level / right)])
        ax.plot(*line.T, color=GREY, linewidth=0.6, alpha=0.6, zorder=0)
        lines.append(line)
    return lines


def _legend_of_targets(ax: Axes, styles: dict[str, dict[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    # A mark stands for a target: what it looks like otherwise is the estimator's.
    marks = [
        Line2D([], [], marker="o", linestyle="none", label=target, **style)
        for target, style in styles.items()
        if len(styles) > 1
    ]
    worth = Line2D([], [], color=GREY, linewidth=0.6, label="equal variance × cost")
    ax.legend(
        handles=[*marks, worth],
        title="filling of a mark: whose gradient" if marks else None,
        title_fontsize="small",
        alignment="left",
        frameon=False,
        fontsize="small",
        loc="upper left",
        bbox_to_anchor=(0, -0.14),
    )
