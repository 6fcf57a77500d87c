"""Approximation and amortization gaps: their means, against a covariate, and sorted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppvae.ledger import bound_of_mean
from ppvae.plots.style import BLACK, BLUE, ORANGE, axes_or_new, legend_above, styled, whole_ranks

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

    from ppvae.ledger import Comparison

_GAPS: dict[str, dict[str, Any]] = {
    "approximation": {"color": ORANGE, "marker": "s", "linestyle": "-", "hatch": ""},
    "amortization": {"color": BLUE, "marker": "o", "linestyle": "--", "hatch": "///"},
}


def _of_guide(comparison: Comparison, guide: str | None) -> xarray.Dataset:
    """The ledger of one guide: its gaps over ``data`` alone."""
    name = comparison.guide_name(guide)
    return comparison.dataset.sel(guide=name) if comparison.several else comparison.dataset


def _groups(comparison: Comparison | Mapping[str, Comparison]) -> dict[str, dict[str, Any]]:
    """Mean and error of each gap, by what stands under its bars."""
    if isinstance(comparison, Mapping):
        return {
            name if label == own else f"{name}\n{label}": means
            for name, each in comparison.items()
            for own in [each.dataset.attrs["family"]]
            for label, means in _groups(each).items()
        }
    if comparison.several:
        return {
            name: {gap: comparison.mean(f"{gap}_gap", name) for gap in _GAPS}
            for name in comparison.guides
        }
    means = {gap: comparison.mean(f"{gap}_gap") for gap in _GAPS}
    return {comparison.dataset.attrs["family"]: means}


_SIDES = {
    "estimate": "",
    "lower": " (a lower bound)",
    "upper": " (an upper bound)",
    "none": " (side not known)",
}


def _label(gap: str, *comparisons: Comparison, guide: str | None = None) -> str:
    """The name of a gap, and on which side of the truth its figures lie."""
    bounds = []
    for each in comparisons:
        dataset = each.dataset if guide is None else _of_guide(each, guide)
        # Of several guides q* has columns of its own, whose amortization gap nobody draws.
        known = dataset[f"{gap}_gap_bound"]
        bounds.append(known.sel(guide=list(each.guides)) if "guide" in known.dims else known)
    sides = np.concatenate([np.ravel(each.values) for each in bounds])
    return f"{gap} gap{_SIDES[bound_of_mean(sides)]}"


def gap_bars(comparison: Comparison | Mapping[str, Comparison], *, ax: Axes | None = None) -> Axes:
    """Mean approximation and amortization gap, in nats, with two standard errors.

    Args:
        comparison: A comparison, with a group of bars for each of its guides; or several by name,
            which stand side by side.
        ax: Where to draw; a new figure if left out.

    Example:
        >>> import torch, ppvae
        >>> pair = ppvae.pairs.exponential_gaussian()
        >>> comparison = ppvae.compare(*pair, torch.tensor([0.0, 1.5]))
        >>> ax = gap_bars(comparison)
        >>> len(ax.patches)
        2
    """
    groups = _groups(comparison)
    if not groups:
        raise ValueError("comparison: expected at least one; got an empty mapping.")
    of = comparison.values() if isinstance(comparison, Mapping) else [comparison]
    ax = axes_or_new(ax, max(3.6, 1.6 + 1.2 * len(groups)), 3.4)
    at = np.arange(len(groups), dtype=float)
    for shift, (gap, style) in zip((-0.2, 0.2), _GAPS.items(), strict=True):
        means = [each[gap] for each in groups.values()]
        ax.bar(
            at + shift,
            [value for value, _ in means],
            width=0.36,
            yerr=[2 * stderr for _, stderr in means],
            label=_label(gap, *of),
            color="white" if style["hatch"] else style["color"],
            edgecolor=style["color"],
            hatch=style["hatch"],
            error_kw={"ecolor": BLACK, "capsize": 3, "elinewidth": 1},
        )
    ax.axhline(0, color=BLACK, linewidth=0.8)
    ax.set_xticks(at, list(groups))
    ax.set_xlim(-0.6, len(groups) - 0.4)
    ax.margins(y=0.15)
    ax.set_ylabel("mean gap ± 2 Monte Carlo errors\n(nats per datum)")
    return legend_above(styled(ax, legend=False))


def gap_against(
    comparison: Comparison,
    covariate: Tensor | Sequence[float],
    *,
    label: str,
    guide: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Both gaps of each datum against something known of it, with two standard errors.

    Args:
        comparison: The comparison.
        covariate: ``(batch,)``, a number for each datum, in the order of the comparison's rows.
        label: What it is, with its unit: the label of the axis.
        guide: Whose gaps, where the comparison has several guides.
        ax: Where to draw; a new figure if left out.

    Raises:
        ValueError: If there is not one number for each datum, or the guide's name is unknown or
            missing (the known ones are named).

    Example:
        >>> import torch, ppvae
        >>> model, guide = ppvae.pairs.exponential_gaussian()
        >>> x = torch.linspace(-1, 4, 11)
        >>> ax = gap_against(ppvae.compare(model, guide, x), x, label="x")
        >>> ax.get_ylabel()
        'gap ± 2 Monte Carlo errors (nats)'
    """
    dataset = _of_guide(comparison, guide)
    where = torch.as_tensor(covariate).detach().cpu().double().numpy()
    expected = (dataset.sizes["data"],)
    if where.shape != expected:
        raise ValueError(
            f"covariate: expected shape {expected}, a number for each datum; got {where.shape}."
        )
    ax = axes_or_new(ax, 5.5, 3.8)
    order = np.argsort(where)
    for gap, style in _GAPS.items():
        ax.errorbar(
            where[order],
            dataset[f"{gap}_gap"].values[order],
            yerr=2 * dataset[f"{gap}_gap_stderr"].values[order],
            label=_label(gap, comparison, guide=guide),
            color=style["color"],
            marker=style["marker"],
            markerfacecolor="white" if style["hatch"] else style["color"],
            markersize=3.5,
            linestyle="none",
            elinewidth=0.7,
        )
    ax.axhline(0, color=BLACK, linewidth=0.8)
    ax.set_xlabel(label)
    ax.set_ylabel("gap ± 2 Monte Carlo errors (nats)")
    return legend_above(styled(ax, legend=False))


def gap_sorted(comparison: Comparison, *, guide: str | None = None, ax: Axes | None = None) -> Axes:
    """Both gaps of all data, each sorted on its own, with a band of two standard errors.

    Where a curve turns up at its right end, few data carry much of the mean.

    Args:
        comparison: The comparison.
        guide: Whose gaps, where the comparison has several guides.
        ax: Where to draw; a new figure if left out.

    Raises:
        ValueError: If the guide's name is unknown or missing (the known ones are named).

    Example:
        >>> import torch, ppvae
        >>> pair = ppvae.pairs.exponential_gaussian()
        >>> ax = gap_sorted(ppvae.compare(*pair, torch.tensor([0.0, 1.5, 3.0])))
        >>> len(ax.lines[0].get_xdata())
        3
    """
    dataset = _of_guide(comparison, guide)
    ax = axes_or_new(ax, 5.5, 3.8)
    for gap, style in _GAPS.items():
        value = dataset[f"{gap}_gap"].values
        order = np.argsort(value)
        value = value[order]
        band = 2 * dataset[f"{gap}_gap_stderr"].values[order]
        rank = np.arange(1, len(value) + 1)
        ax.plot(
            rank,
            value,
            label=_label(gap, comparison, guide=guide),
            color=style["color"],
            linestyle=style["linestyle"],
            marker=style["marker"] if len(value) < 30 else None,
        )
        ax.fill_between(rank, value - band, value + band, color=style["color"], alpha=0.25, lw=0)
    ax.axhline(0, color=BLACK, linewidth=0.8)
    whole_ranks(ax)
    ax.set_xlabel("rank of the datum (each gap sorted by itself)")
    ax.set_ylabel("gap ± 2 Monte Carlo errors (nats)")
    return legend_above(styled(ax, legend=False))
