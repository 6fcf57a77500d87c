"""How far importance weights may be trusted: k-hat of each datum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ppvae.diagnostics import WeightDiagnostics
from ppvae.ledger import Comparison
from ppvae.plots.style import (
    BLACK,
    LINES,
    MANY,
    MARKS,
    SHADE,
    axes_or_new,
    legend_below,
    styled,
    whole_ranks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def pareto_k_sorted(
    result: Comparison | WeightDiagnostics, *, guide: str | None = None, ax: Axes | None = None
) -> Axes:
    r"""k-hat of all data, sorted, with the band above which importance weights do not vouch.

    The band begins at the threshold for the number of draws S,
    :math:`\min(1 - 1/\log_{10} S, 0.7)`. What k-hat is and where it misleads:
    `ppvae.weight_diagnostics`. Rows whose weights are all equal have no tail and rows with fewer
    than five weights none that is known: both are counted above the figure and not drawn.

    Args:
        result: A comparison, with a curve for each guide and each q*, each sorted on its own; or
            `ppvae.weight_diagnostics` of one guide.
        guide: One guide or q* of a comparison, where not all are wanted.
        ax: Where to draw; a new figure if left out.

    Raises:
        ValueError: If the guide is unknown (the known ones are named).

    Source: Vehtari et al. (2024), "Pareto smoothed importance sampling".

    Example:
        >>> import torch, ppvae
        >>> model, guide = ppvae.pairs.exponential_gaussian()
        >>> ax = pareto_k_sorted(ppvae.weight_diagnostics(model, guide, torch.zeros(4), 100))
        >>> ax.get_xlabel()
        'rank of the datum'
    """
    curves, threshold, draws = _curves(result, guide)
    ax = axes_or_new(ax, 5.5, 3.8)
    missing = []
    for at, (name, k) in enumerate(curves.items()):
        value = np.sort(k[np.isfinite(k)])
        missing.append(_missing(name if len(curves) > 1 else "", k))
        few = len(value) < 30
        ax.plot(
            np.arange(1, len(value) + 1),
            value,
            label=name.replace("per_datapoint", "q*, per datapoint"),
            color=MANY[at % len(MANY)],
            linestyle=LINES[at % len(LINES)],
            marker=MARKS[at % len(MARKS)] if few else None,
            markersize=4,
        )
    _finish(ax, [k for each in curves.values() for k in each], threshold, draws, missing)
    whole_ranks(ax)
    each = " (each curve sorted by itself)" if len(curves) > 1 else ""
    ax.set_xlabel(f"rank of the datum{each}")
    return legend_below(styled(ax, legend=False))


def pareto_k_against(
    comparison: Comparison, *, guide: str | None = None, ax: Axes | None = None
) -> Axes:
    """k-hat of each datum against the inference gap of the guide.

    Where both are large the guide misses much of the posterior. A large k-hat over a small gap is
    a thin tail that weights can still fall into. Rows without a finite k-hat or gap are counted
    above the figure and not drawn.

    Args:
        comparison: The comparison.
        guide: Whose, where the comparison has several guides.
        ax: Where to draw; a new figure if left out.

    Raises:
        ValueError: If the guide's name is unknown or missing (the known ones are named).

    Example:
        >>> import torch, ppvae
        >>> pair = ppvae.pairs.exponential_gaussian()
        >>> ax = pareto_k_against(ppvae.compare(*pair, torch.tensor([0.0, 1.5, 3.0])))
        >>> ax.get_xlabel()
        'inference gap ± 2 Monte Carlo errors (nats)'
    """
    name = comparison.guide_name(guide)
    curves, threshold, draws = _curves(comparison, name)
    (k,) = curves.values()
    ds = comparison.dataset.sel(guide=name) if comparison.several else comparison.dataset
    gap, error = ds["inference_gap"].values, ds["inference_gap_stderr"].values
    shown = np.isfinite(k) & np.isfinite(gap)
    ax = axes_or_new(ax, 5.5, 3.8)
    ax.errorbar(
        gap[shown],
        k[shown],
        xerr=2 * error[shown],
        color=MANY[0],
        marker="o",
        markersize=3.5,
        linestyle="none",
        elinewidth=0.7,
    )
    ax.axvline(0, color=BLACK, linewidth=0.8)
    rest = int((~np.isfinite(gap) & np.isfinite(k)).sum())
    missing = [_missing("", k), f"no finite gap in {rest}" if rest else ""]
    _finish(ax, k, threshold, draws, missing)
    ax.set_xlabel("inference gap ± 2 Monte Carlo errors (nats)")
    return legend_below(styled(ax, legend=False))


def _curves(
    result: Comparison | WeightDiagnostics, guide: str | None
) -> tuple[dict[str, Any], float, int]:
    """k-hat by guide, the threshold, and the draws that it is for."""
    if isinstance(result, WeightDiagnostics):
        if guide is not None:
            raise ValueError(
                f"guide: weight diagnostics are of one guide and name none; got {guide!r}."
            )
        k = result.pareto_k.detach().cpu().double().numpy()
        return {"guide": k}, result.threshold, result.num_samples
    ds, attrs = result.dataset, result.dataset.attrs
    known = ds["guide"].values.tolist()
    if guide is not None and guide not in known:
        raise ValueError(f"guide: expected one of {known}; got {guide!r}.")
    names = known if guide is None else [guide]
    curves = {name: ds["pareto_k"].sel(guide=name).values for name in names}
    return curves, attrs["pareto_k_threshold"], attrs["num_samples"]


def _missing(name: str, k: Any) -> str:
    """How many rows have no k-hat to draw, and why."""
    said = []
    if np.isneginf(k).any():
        said.append(f"equal weights in {np.isneginf(k).sum()}")
    if np.isnan(k).any():
        said.append(f"unknown in {np.isnan(k).sum()}")
    return ("" if not name or not said else f"{name}: ") + ", ".join(said)


def _finish(ax: Axes, values: Any, threshold: float, draws: int, missing: list[str]) -> None:
    values = np.asarray(values)
    finite = values[np.isfinite(values)]
    low, high = min(finite.min(initial=0.0), 0.0), max(finite.max(initial=1.0), 1.0)
    edge = 0.05 * (high - low)
    ax.axhspan(
        threshold,
        high + edge,
        color=SHADE,
        linewidth=0,
        zorder=0,
        label=f"above {threshold:.2f}: not reliable with {draws:,} draws",
    )
    ax.axhline(threshold, color=BLACK, linewidth=0.8, linestyle=(0, (6, 3)))
    ax.set_ylim(low - edge, high + edge)
    ax.set_ylabel("Pareto k-hat of the weights")
    said = "; ".join(part for part in missing if part)
    if said:
        ax.set_title(f"not drawn: {said}", fontsize="small")
