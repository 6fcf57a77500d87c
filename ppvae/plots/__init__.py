"""Figures: one function each, which draws a result into an axes and gives that axes back.

A figure is as wide as its axes and has no title of its own where the caller can say more. Lines
differ in style and marks in shape, so that nothing rests on colour alone; the colours are those of
Okabe & Ito (2008), which colour-blind readers can tell apart. Matplotlib's settings stay as they
are.
"""

from ppvae.plots.calibration import coverage, rank_ecdf, z_scores
from ppvae.plots.collapse import element_kl
from ppvae.plots.gaps import gap_against, gap_bars, gap_sorted
from ppvae.plots.gradients import gradient_variance
from ppvae.plots.images import (
    interpolation,
    latent_grid,
    latent_scatter,
    reconstructions,
    samples,
    traversals,
)
from ppvae.plots.mending import explanation, refinement, repair_costs
from ppvae.plots.toy import toy_posterior

__all__ = [
    "coverage",
    "element_kl",
    "explanation",
    "gap_against",
    "gap_bars",
    "gap_sorted",
    "gradient_variance",
    "interpolation",
    "latent_grid",
    "latent_scatter",
    "rank_ecdf",
    "reconstructions",
    "refinement",
    "repair_costs",
    "samples",
    "toy_posterior",
    "traversals",
    "z_scores",
]
