"""Time: from how many data on an encoder pays, and what an ELBO takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ppvae.ledger import Comparison
from ppvae.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Labels,
    axes_or_new,
    legend_above,
    settle,
    styled,
)
from ppvae.repairs import RepairCosts
from ppvae.timing import ElboAgainstTime

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MODES: dict[str, dict[str, Any]] = {
    "amortized": {
        "label": "amortized, while it trains",
        "color": BLUE,
        "linestyle": "--",
        "marker": "o",
    },
    "per datapoint": {
        "label": "per datapoint, cold",
        "color": ORANGE,
        "linestyle": "-",
        "marker": "s",
        "markerfacecolor": "white",
    },
    "from the encoder": {
        "label": "per datapoint, from the trained encoder",
        "color": GREEN,
        "linestyle": ":",
        "marker": "^",
    },
}
# How far down the axis goes, in distances of the worst end from the best one; and at least, nats.
_DOWN, _LEAST = 8.0, 0.5


def break_even(costs: Comparison | RepairCosts, *, ax: Axes | None = None) -> Axes:
    r"""Seconds for N data, amortized and datum by datum, and the N from which on amortizing pays.

    Amortized are counted the training of model and guide, once, and the encoding of each datum;
    datum by datum the fit of q* to each, for which the model comes for nothing.

    - Of a `ppvae.Comparison` that was given ``fit``, both are at the speed per row of its batch,
      and q* is fitted as `ppvae.compare` does, from the guide's output:
      :math:`\text{training} + N \cdot \text{encoding} = N \cdot \text{fit}`.
    - Of `ppvae.repair_costs` with ``fit``, q* is fitted cold, and what is spent once is told from
      what is spent for each row.

    Seconds are those of the machine on which they were measured.

    Args:
        costs: A comparison or a price list, with the record of the training.
        ax: Where to draw; a new figure if left out.

    Raises:
        ValueError: If the seconds of the training are not known.

    Example:
        >>> import ppvae
        >>> model, guide = ppvae.pairs.exponential_gaussian()
        >>> x = model(size=30)
        >>> fit = ppvae.fit(model, guide, x, steps=20, progress=False)
        >>> ax = break_even(ppvae.compare(model, guide, x, fit=fit))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('number of data', 'seconds in all')
    """
    attrs = costs.dataset.attrs
    if math.isnan(attrs["break_even"]):
        how = "ppvae.compare" if isinstance(costs, Comparison) else "ppvae.repair_costs"
        raise ValueError(
            f"costs: the seconds of the training are not known. Give its record: "
            f"{how}(..., fit=ppvae.fit(...))."
        )
    encode_once, encode, local_once, local = _seconds(costs)
    training, even = attrs["seconds_training"] + encode_once, attrs["break_even"]
    crosses = math.isfinite(even) and even > 1
    last = max(10 * even if crosses else 1.0, 1e4)
    count = np.geomspace(1, 10 ** math.ceil(math.log10(last)), 300)
    ax = axes_or_new(ax, 5.5, 3.8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    lines = {
        "amortized: training once, then encoding": (training + encode * count, BLUE, "--"),
        "q* of each datum": (local_once + local * count, ORANGE, "-"),
    }
    for label, (seconds, color, style) in lines.items():
        ax.plot(count, seconds, label=label, color=color, linestyle=style, linewidth=1.6)
    if crosses:
        ax.plot(even, training + encode * even, "o", color=BLACK, markersize=6, zorder=3)
        ax.annotate(
            f"break-even: {even:,.0f} data",
            (even, training + encode * even),
            xytext=(-4, 6),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize="small",
        )
    else:
        never = "q* is the cheaper for any number of data"
        ax.set_title(
            never if even > 1 else "amortized is the cheaper for any number of data",
            fontsize="small",
        )
    ax.set_xlim(count[0], count[-1])
    ax.set_xlabel("number of data")
    ax.set_ylabel("seconds in all")
    return legend_above(styled(ax, legend=False, grid="both"))


def _seconds(costs: Comparison | RepairCosts) -> tuple[float, float, float, float]:
    """Of encoding and of q*, what is spent once and for each row."""
    ds, attrs = costs.dataset, costs.dataset.attrs
    if isinstance(costs, Comparison):
        rows = ds.sizes["data"]
        return 0.0, attrs["seconds_encoding"] / rows, 0.0, attrs["seconds_local_fit"] / rows
    cold = ds.sel(repair="q* cold")
    return (
        attrs["seconds_encoding_fixed"],
        attrs["seconds_encoding_per_row"],
        float(cold["seconds_fixed"]),
        float(cold["seconds_per_row"]),
    )


def elbo_against_time(result: ElboAgainstTime, *, ax: Axes | None = None) -> Axes:
    """The ELBO of held-out rows against the seconds that it takes, in three ways.

    A mark for each training and each fit, with two Monte Carlo errors. A line joins those marks
    that are above all of their kind that took less time. The axis holds the ends of all ways and
    eight times the distance between them; marks further down are not shown, and lines come from
    them.

    Args:
        result: What `ppvae.elbo_against_time` measured.
        ax: Where to draw; a new figure if left out.

    Raises:
        ValueError: If no ELBO is finite.

    Example:
        >>> import ppvae
        >>> model, guide = ppvae.pairs.factor_analysis(x_dim=3, z_dim=1)
        >>> x = model(size=120).detach()
        >>> found = ppvae.elbo_against_time(model, guide, x[:100], x[100:], steps=4)
        >>> ax = elbo_against_time(found)
        >>> ax.get_xlabel(), ax.get_xscale()
        ('wall time (s)', 'log')
    """
    ds, attrs = result.dataset, result.dataset.attrs
    finite = np.isfinite(ds["elbo"].values)
    if not finite.any():
        raise ValueError(
            "result: no ELBO is finite; the guide draws outside of the prior's support."
        )
    ax = axes_or_new(ax, 5.8, 4.2)
    ax.set_xscale("log")
    for mode, style in _MODES.items():
        own = ds.isel(point=(ds["mode"].values == mode) & finite)
        seconds, elbo, error = (own[name].values for name in ("seconds", "elbo", "elbo_stderr"))
        ax.errorbar(
            seconds,
            elbo,
            yerr=2 * error,
            elinewidth=1,
            markersize=4.5,
            **(style | {"linestyle": "none", "label": None}),
        )
        rising = _rising(seconds, elbo)
        ax.plot(seconds[rising], elbo[rising], markersize=4.5, linewidth=1.4, **style)
    last = {mode: float(ds["elbo"].values[ds["mode"].values == mode][-1]) for mode in _MODES}
    ends = [value for value in last.values() if math.isfinite(value)]
    reached = last["per datapoint"]
    done = attrs["converged"] == 1
    star = "L[q*]" if done else f"L[q*], converged in {attrs['converged']:.0%} of the rows"
    levels = {star: reached} if math.isfinite(reached) else {}
    if math.isfinite(attrs["evidence"]):
        exact = attrs["evidence_bound"] == "exact"
        evidence = "log p(x)" if exact else f"{attrs['evidence_bound']} bound on log p(x)"
        levels[evidence] = attrs["evidence"]
    for name, height in levels.items():
        best = name == star
        dash: Any = (0, (6, 3)) if best else "-"
        color = GREY if best else BLACK
        ax.axhline(height, linewidth=1, zorder=0, color=color, linestyle=dash)
    shown = ds.isel(point=finite)
    _upper_part(ax, shown["seconds"].values, shown["elbo"].values, [*ends, *levels.values()])
    ax.set_xlabel("wall time (s)")
    ax.set_ylabel(
        f"ELBO of {attrs['rows']:,} held-out rows\n± 2 Monte Carlo errors (nats per datum)"
    )
    styled(ax, legend=False)
    legend_above(ax)
    settle(ax)
    points = np.column_stack([shown["seconds"].values, shown["elbo"].values])
    labels = Labels(ax, points, [np.column_stack([ax.get_xlim(), (h, h)]) for h in levels.values()])
    for name, height in levels.items():
        labels.on_line(height, name)
    return ax


def _rising(seconds: Any, elbo: Any) -> Any:
    """The numbers of the points that are above all that took less time, in order of time."""
    order = np.argsort(seconds, kind="stable")
    best = np.maximum.accumulate(elbo[order])
    return order[elbo[order] >= best]


def _upper_part(ax: Axes, seconds: Any, elbo: Any, ends: list[float]) -> None:
    """Limits that hold all ends, and of the way to them what still tells them apart."""
    top = max([*ends, float(elbo.max())])
    span = max(top - min(ends, default=top), _LEAST / _DOWN)
    low = max(float(elbo.min()), top - _DOWN * span)
    ax.set_ylim(low - 0.05 * (top - low), top + 0.12 * (top - low))
    ax.set_xlim(seconds[elbo >= low].min() / 2, seconds[elbo >= low].max() * 2)
