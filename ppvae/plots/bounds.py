"""Bounds on log p(x): what work makes of them, and how far they are apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppvae.annealing import Sandwich
from ppvae.evidence import Estimate
from ppvae.plots.style import (
    BLACK,
    BLUE,
    LINES,
    MANY,
    MARKS,
    ORANGE,
    axes_or_new,
    legend_below,
    styled,
    whole_ranks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Numbers on the axis up to which each has a tick of its own.
_TICKS = 8
# The least ratio of two numbers whose ticks do not run into each other.
_APART = 1.4


def evidence_bounds(
    estimates: Mapping[str, Mapping[int, Estimate]],
    *,
    label: str,
    exact: float | Tensor | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Mean estimates of log p(x) against the work that was put into them, with two errors.

    Of lower bounds the higher is the nearer to the truth, beyond their errors.

    Args:
        estimates: By name, and by what was spent: such as `ppvae.iwae` by its number of draws and
            `ppvae.ais` by its number of temperatures, all of the same rows.
        label: What was spent: the label of the axis.
        exact: log p(x) where it is known, per row ``(batch,)`` or its mean: what is drawn is then
            the distance from it.
        ax: Where to draw; a new figure if left out.

    Raises:
        ValueError: If there is nothing to draw, or the estimates differ in their number of rows.

    Example:
        >>> import torch, ppvae
        >>> model, guide = ppvae.pairs.exponential_gaussian()
        >>> x = torch.tensor([0.0, 1.5])
        >>> found = {draws: ppvae.iwae(model, guide, x, draws) for draws in (10, 100)}
        >>> ax = evidence_bounds({"iwae": found}, label="draws a row", exact=model.log_evidence(x))
        >>> ax.get_xlabel()
        'draws a row'
    """
    _check_numbers("estimates", [n for each in estimates.values() for n in each])
    rows = {len(found.value) for each in estimates.values() for found in each.values()}
    if len(rows) > 1:
        raise ValueError(f"estimates: expected all of the same rows; got {sorted(rows)} rows.")
    mean = 0.0 if exact is None else _mean(exact)
    ax = axes_or_new(ax, 5.8, 3.8)
    for at, (name, each) in enumerate(estimates.items()):
        numbers = sorted(each)
        ax.errorbar(
            numbers,
            [each[n].mean - mean for n in numbers],
            [2 * each[n].mean_stderr for n in numbers],
            label=name,
            color=MANY[at % len(MANY)],
            linestyle=LINES[at % len(LINES)],
            marker=MARKS[at % len(MARKS)],
            markersize=5,
            elinewidth=1,
            capsize=3,
        )
    if exact is not None:
        ax.axhline(0, color=BLACK, linewidth=0.8)
    _log_numbers(ax, [n for each in estimates.values() for n in each])
    ax.set_xlabel(label)
    what = "log p(x)" if exact is None else "estimate less exact log p(x)"
    ax.set_ylabel(f"{what}\n± 2 standard errors (nats per datum)")
    return legend_below(styled(ax, legend=False))


def sandwich(
    results: Mapping[int, Sandwich],
    *,
    exact: float | Tensor | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Lower and upper bound on log p(x) of simulated data against the number of temperatures.

    Means over the rows, with two standard errors of the chains. The chains of an upper bound share
    an exact draw of the posterior, whose error is not in its whiskers.

    Args:
        results: What `ppvae.sandwich` found, by its number of temperatures, all with one seed and
            so of the same rows.
        exact: log p(x) of these rows where it is known, per row ``(batch,)`` or its mean.
        ax: Where to draw; a new figure if left out.

    Raises:
        ValueError: If there is nothing to draw, or the results are of different rows.

    Source: Grosse, Ghahramani & Adams (2015).

    Example:
        >>> import ppvae
        >>> model, _ = ppvae.pairs.exponential_gaussian()
        >>> x = model(size=4)
        >>> found = {5: ppvae.sandwich(model, None, x, num_chains=2, num_steps=5)}
        >>> ax = sandwich(found, exact=model.log_evidence(found[5].x))
        >>> ax.get_xlabel()
        'temperatures'
    """
    numbers = _check_rows(results)
    ax = axes_or_new(ax, 5.0, 3.6)
    looks: dict[str, dict[str, Any]] = {
        "upper": {"color": ORANGE, "marker": "v", "linestyle": "--"},
        "lower": {"color": BLUE, "marker": "^", "linestyle": "-"},
    }
    for side, look in looks.items():
        found = [getattr(results[n], side) for n in numbers]
        ax.errorbar(
            numbers,
            [each.mean for each in found],
            [2 * each.mean_stderr for each in found],
            label=f"{side} bound",
            markersize=5,
            elinewidth=1,
            capsize=3,
            **look,
        )
    if exact is not None:
        level = _mean(exact)
        ax.axhline(level, color=BLACK, linewidth=1, linestyle=":", label="exact")
    _log_numbers(ax, numbers)
    ax.set_xlabel("temperatures")
    ax.set_ylabel("log p(x) of simulated data\n± 2 chain errors (nats per datum)")
    return legend_below(styled(ax, legend=False))


def sandwich_widths(results: Mapping[int, Sandwich], *, ax: Axes | None = None) -> Axes:
    """The distance of the two bounds of each row, sorted, for each number of temperatures.

    Its mean bounds the error of either bound, in expectation; in a row it may be negative by
    chance. Where a curve turns up at its right end, few rows need more temperatures than others.

    Args:
        results: What `ppvae.sandwich` found, by its number of temperatures.
        ax: Where to draw; a new figure if left out.

    Raises:
        ValueError: If there is nothing to draw, or the results are of different rows.

    Example:
        >>> import ppvae
        >>> model, _ = ppvae.pairs.exponential_gaussian()
        >>> found = ppvae.sandwich(model, None, model(size=4), num_chains=2, num_steps=5)
        >>> ax = sandwich_widths({5: found})
        >>> ax.get_ylabel()
        'upper less lower bound (nats)'
    """
    numbers = _check_rows(results)
    ax = axes_or_new(ax, 5.5, 3.8)
    for at, n in enumerate(numbers):
        found = results[n]
        widths = (found.upper.value - found.lower.value).detach().cpu().double().numpy()
        ax.plot(
            np.arange(1, len(widths) + 1),
            np.sort(widths),
            label=f"{n:,}: {_width(found)}",
            color=MANY[at % len(MANY)],
            linestyle=LINES[at % len(LINES)],
            marker=MARKS[at % len(MARKS)] if len(widths) < 30 else None,
            markersize=4,
        )
    ax.axhline(0, color=BLACK, linewidth=0.8)
    whole_ranks(ax)
    several = " (each curve sorted by itself)" if len(numbers) > 1 else ""
    ax.set_xlabel(f"rank of the simulated datum{several}")
    ax.set_ylabel("upper less lower bound (nats)")
    return legend_below(
        styled(ax, legend=False), title="temperatures: mean width ± 2 standard errors (nats)"
    )


def _mean(exact: float | Tensor) -> float:
    return float(torch.as_tensor(exact).detach().double().mean())


def _width(found: Sandwich) -> str:
    """Mean width and two standard errors; one row has none that is known."""
    error = 2 * found.width_stderr
    return f"{found.width:.2g} ± " + ("unknown" if math.isnan(error) else f"{error:.1g}")


def _check_numbers(name: str, numbers: list[int]) -> None:
    if not numbers:
        raise ValueError(f"{name}: expected at least one result; got none.")
    if min(numbers) <= 0:
        raise ValueError(f"{name}: expected positive numbers as keys; got {min(numbers)}.")


def _check_rows(results: Mapping[int, Sandwich]) -> list[int]:
    """The numbers of temperatures in order."""
    numbers = sorted(results)
    _check_numbers("results", numbers)
    first = results[numbers[0]].x
    if not all(torch.equal(results[n].x, first) for n in numbers):
        raise ValueError(
            "results: expected sandwiches of the same simulated rows, so that only the "
            "temperatures differ. Make all of them with one seed."
        )
    return numbers


def _log_numbers(ax: Axes, numbers: list[int]) -> None:
    """A logarithmic axis of counts, each with a tick where they are few."""
    ax.set_xscale("log")
    distinct = sorted(set(numbers))
    apart = min((b / a for a, b in itertools.pairwise(distinct)), default=math.inf)
    if len(distinct) <= _TICKS and apart > _APART:
        ax.set_xticks(distinct, [f"{n:,}" for n in distinct])
        ax.minorticks_off()
