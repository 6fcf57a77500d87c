"""Figures: one function each, which draws a result into an axes and gives that axes back.

A figure is as wide as its axes and has no title of its own where the caller can say more. Lines
differ in style and marks in shape, so that nothing rests on colour alone; the colours are those of
Okabe & Ito (2008), which colour-blind readers can tell apart. Matplotlib's settings stay as they
are.

- *What inference loses*: `gap_bars`, `gap_sorted`, `gap_against`, `explanation`; for the toy model
  `toy_posterior`.
- *What it costs*: `break_even`, `elbo_against_time`, `repair_costs`, `refinement`, `losses`,
  `gradient_variance`.
- *How far to trust it*: `pareto_k_sorted`, `pareto_k_against`, `evidence_bounds`, `sandwich`,
  `sandwich_widths`, `rank_ecdf`, `coverage`, `z_scores`.
- *What the latents hold*: `element_kl`, `latent_scatter`, `latent_grid`, `traversals`,
  `interpolation`, `reconstructions`, `samples`.
"""

from ppvae.plots.bounds import evidence_bounds, sandwich, sandwich_widths
from ppvae.plots.calibration import coverage, rank_ecdf, z_scores
from ppvae.plots.collapse import element_kl
from ppvae.plots.costs import break_even, elbo_against_time
from ppvae.plots.fitting import losses
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
from ppvae.plots.weights import pareto_k_against, pareto_k_sorted

__all__ = [
    "break_even",
    "coverage",
    "elbo_against_time",
    "element_kl",
    "evidence_bounds",
    "explanation",
    "gap_against",
    "gap_bars",
    "gap_sorted",
    "gradient_variance",
    "interpolation",
    "latent_grid",
    "latent_scatter",
    "losses",
    "pareto_k_against",
    "pareto_k_sorted",
    "rank_ecdf",
    "reconstructions",
    "refinement",
    "repair_costs",
    "samples",
    "sandwich",
    "sandwich_widths",
    "toy_posterior",
    "traversals",
    "z_scores",
]
