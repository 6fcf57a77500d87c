"""Calibration on simulated data: ranks, coverage, and z-scores against contraction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ppvae.calibration import LEVELS, Calibration
from ppvae.plots.style import (
    BLACK,
    GREY,
    LINES,
    MANY,
    MARKS,
    SHADE,
    axes_or_new,
    legend_beside,
    styled,
)
from ppvae.uniformity import NUM_POINTS, ecdf_band, grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Curves beyond which whiskers would cover them.
_WHISKERS = 6


def rank_ecdf(calibration: Calibration, *, level: float = 0.05, ax: Axes | None = None) -> Axes:
    """The distribution of the ranks less that of a uniform one, with a simultaneous band.

    A curve for each latent element. All of them stay within the band with probability
    ``1 - level`` if the guides are exact, and a curve that leaves it is what makes
    ``calibration.passes(level)`` fail. A curve that is first above and then below 0 says too
    narrow, one that is only above too high.

    Args:
        calibration: What `ppvae.calibrate` found.
        level: Probability that any curve leaves the band, at most.
        ax: Where to draw; a new figure if left out.

    Source: Säilynoja, Bürkner & Vehtari (2022).

    Example:
        >>> import torch, ppvae
        >>> model, guide = ppvae.pairs.exponential_gaussian()
        >>> ax = rank_ecdf(ppvae.calibrate(model, guide, torch.zeros(100)))
        >>> ax.get_xlabel()
        'rank of the true latent among the draws, as a share'
    """
    ax = axes_or_new(ax, 5.5, 3.6)
    curves = list(_curves(calibration))
    ends = np.concatenate([[0.0], grid(), [1.0]])
    lower, upper = ecdf_band(len(calibration.x), level / len(curves), NUM_POINTS)
    ax.fill_between(
        ends,
        np.concatenate([[0.0], lower - grid(), [0.0]]),
        np.concatenate([[0.0], upper - grid(), [0.0]]),
        color=SHADE,
        linewidth=0,
        label=f"all curves of exact guides\nare inside in {100 * (1 - level):.0f} % of cases",
    )
    ax.axhline(0, color=BLACK, linewidth=0.8)
    for label, look, _, pit in curves:
        shares = np.searchsorted(np.sort(pit), ends, side="right") / len(pit)
        ax.plot(ends, shares - ends, label=label, linewidth=1.2, **look)
    ax.set_xlim(0, 1)
    ax.set_xlabel("rank of the true latent among the draws, as a share")
    ax.set_ylabel("share of rows up to there,\nless that of uniform ranks")
    return legend_beside(styled(ax, legend=False))


def coverage(calibration: Calibration, *, ax: Axes | None = None) -> Axes:
    """The share of true latents in central intervals, against the level of the interval.

    A curve for each latent element: below the diagonal the guide is too narrow. Whiskers are two
    standard errors, at the usual levels, where there are no more than six curves.

    Args:
        calibration: What `ppvae.calibrate` found.
        ax: Where to draw; a new figure if left out.

    Example:
        >>> import torch, ppvae
        >>> model, guide = ppvae.pairs.exponential_gaussian()
        >>> ax = coverage(ppvae.calibrate(model, guide, torch.zeros(100)))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('level of the interval (%)', 'true latents inside (%)')
    """
    ax = axes_or_new(ax, 4.2, 4.2)
    curves = list(_curves(calibration))
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=1, zorder=0)
    for at, (label, look, (guide, element), pit) in enumerate(curves):
        widths = np.sort(2 * np.abs(pit - 0.5))
        levels = np.linspace(0, 1, NUM_POINTS + 1)
        shares = np.searchsorted(widths, levels, side="right") / len(widths)
        ax.plot(levels, shares, label=label, linewidth=1.2, **look)
        if len(curves) > _WHISKERS:
            continue
        for level in LEVELS:
            share, error = (
                float(part[element]) for part in calibration.guides[guide].coverage(level)
            )
            # Beside each other, so that whiskers of several curves can be told apart.
            place = level + 0.006 * (at - (len(curves) - 1) / 2)
            ax.errorbar(place, share, yerr=2 * error, color=look["color"], elinewidth=1, capsize=2)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.02)
    ax.set_box_aspect(1)
    ax.set_xticks([0, 0.5, 0.8, 0.95], ["0", "50", "80", "95"])
    ax.set_yticks([0, 0.5, 0.8, 0.95], ["0", "50", "80", "95"])
    ax.set_xlabel("level of the interval (%)")
    ax.set_ylabel("true latents inside (%)")
    return legend_beside(styled(ax, legend=False, grid="both"))


def z_scores(calibration: Calibration, *, ax: Axes | None = None) -> Axes:
    """The z-score of each row and latent element, against the contraction of its posterior.

    Points spread about 0, most of them within ±2, say that the posteriors are in the right place
    and of the right width; how far right they are says how much the guide learns from x. At 0 it
    learns nothing, and left of it it is wider than the prior. Infinite scores, of rows whose
    draws are all equal, are left out, and their number is said.

    Args:
        calibration: What `ppvae.calibrate` found.
        ax: Where to draw; a new figure if left out.

    Source: Schad, Betancourt & Vasishth (2021).

    Example:
        >>> import torch, ppvae
        >>> model, guide = ppvae.pairs.exponential_gaussian()
        >>> ax = z_scores(ppvae.calibrate(model, guide, torch.zeros(100)))
        >>> ax.get_ylabel()
        'z-score (posterior sd)'
    """
    ax = axes_or_new(ax, 5.5, 3.6)
    ax.axhline(0, color=BLACK, linewidth=0.8)
    for end in (-2, 2):
        ax.axhline(end, color=GREY, linewidth=1, linestyle=(0, (6, 3)))
    left_out = total = 0
    for at, (label, look, (guide, element), _) in enumerate(_curves(calibration)):
        found = calibration.guides[guide]
        x = found.contraction[:, element].cpu().numpy()
        y = found.z_scores[:, element].cpu().numpy()
        finite = np.isfinite(x) & np.isfinite(y)
        left_out, total = left_out + int((~finite).sum()), total + len(y)
        mark = MARKS[list(calibration.guides).index(guide) % len(MARKS)]
        if len(calibration.guides) == 1 and label:
            mark = MARKS[at % len(MARKS)]
        open_mark = {} if mark in "x+" else {"facecolors": "none"}
        ax.scatter(
            x[finite],
            y[finite],
            s=10,
            marker=mark,
            linewidths=0.7,
            alpha=0.6,
            label=label,
            **({"color": look["color"]} | open_mark),
        )
    if left_out:
        ax.set_title(f"left out, not finite: {left_out} of {total}", fontsize="small")
    ax.set_xlabel("contraction (1 − posterior variance / prior variance)")
    ax.set_ylabel("z-score (posterior sd)")
    return legend_beside(styled(ax, legend=False))


def _curves(calibration: Calibration) -> Iterator[tuple[str | None, Any, tuple[str, int], Any]]:
    """Label, look, guide and element, and places of the true latents, for each curve.

    One guide's elements are told apart if there are few of them; of several guides, the guides.
    """
    several = len(calibration.guides) > 1
    for number, (name, found) in enumerate(calibration.guides.items()):
        few = len(found.names) <= len(MANY)
        for element, part in enumerate(found.names):
            at = number if several else element if few else 0
            label: str | None = name.replace("per_datapoint", "per datapoint") if several else part
            if (several and element) or (not several and not few):
                label = None
            look = {"color": MANY[at % len(MANY)], "linestyle": LINES[at % len(LINES)]}
            yield label, look, (name, element), found.pit[:, element].cpu().numpy()
