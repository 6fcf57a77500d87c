r"""Evidence from both sides: annealing and the sandwich
=====================================================

Importance weighting bounds log p(x) from below, and does not say by how much it is short. Annealed
importance sampling (Neal 2001) spends its evaluations on chains that move from the guide, or from
the prior, to the posterior. For data that the model draws itself the chains can also run backwards
from an exact draw of the posterior, which bounds log p(x) from *above* (Grosse, Ghahramani & Adams
2015):

.. math:: E \log \hat p_{\text{forwards}} \;\le\; \log p(x) \;\le\; E \log \hat p_{\text{backwards}}

Here it is done for factor analysis, whose evidence is known: one sees what is true.
"""

import os

import torch

import ppvae
from ppvae import plots
from ppvae.families import DiagonalNormal
from ppvae.isolation import forked_rng
from ppvae.models import FactorAnalysis

QUICK = bool(os.environ.get("PPVAE_QUICK"))
# sphinx_gallery_thumbnail_number = 2

# %%
# Twenty latents that are correlated, and a guide that takes them for independent
# -------------------------------------------------------------------------------
# The guide is the best diagonal normal of each row, found by `ppvae.fit_per_datapoint`.

with forked_rng(0):
    model = FactorAnalysis(x_dim=40, z_dim=20, loadings=torch.randn(40, 20))
    x = model(size=4 if QUICK else 25).detach()
guide = ppvae.fit_per_datapoint(model, DiagonalNormal(20), x).guide
exact = float(model.log_evidence(x).detach().mean())
print(f"exact log p(x): {exact:.3f} nats a datum")
print(ppvae.elbo(model, guide, x))

# %%
# The same number of evaluations, spent in two ways
# -------------------------------------------------
# Sixteen chains with five leapfrog steps at each of T temperatures evaluate the model 80 T times a
# row. Importance weighting gets as many draws of the guide. (An evaluation with its gradient takes
# longer than one without, and a pilot run sets the temperatures; neither is counted.)

chains, leapfrog = 16, 5
temperatures = [5, 10] if QUICK else [10, 30, 100, 300]
evaluations = [chains * leapfrog * count for count in temperatures]


def annealed(start):
    """Annealing from a guide, or from the prior (`None`), for growing numbers of temperatures."""
    return [ppvae.ais(model, start, x, num_chains=chains, num_steps=t) for t in temperatures]


found = {
    "importance weighting": [ppvae.iwae(model, guide, x, draws) for draws in evaluations],
    "annealing from the guide": annealed(guide),
    "annealing from the prior": annealed(None),
}

ax = plots.evidence_bounds(
    {name: dict(zip(evaluations, each, strict=True)) for name, each in found.items()},
    label="evaluations a row",
    exact=exact,
)
ax.set_ylim(-1.4, 0.2)  # The shortest run from the prior is far below.

for name, estimates in found.items():
    short = exact - estimates[-1].mean
    print(f"{name}: {short:.3f} ± {estimates[-1].mean_stderr:.3f} short after {evaluations[-1]:,}")

# %%
# All three are lower bounds in expectation: of two figures that differ by more than their errors
# the higher one is nearer to the truth. Note the error bars of importance weighting: they say how
# much its draws differ, and nothing of the part of the posterior that no draw has reached.
#
# How near? The sandwich
# ----------------------
# Were the evidence not known, `ppvae.sandwich` would still say how far off one is: the distance of
# the two bounds, their *width*, is in expectation at least the error of either. It falls as 1/T.

counts = [5, 10] if QUICK else [25, 50, 100, 200]
both = {
    t: ppvae.sandwich(model, None, x.new_zeros(6 if QUICK else 150, 40), num_chains=4, num_steps=t)
    for t in counts
}
for t, each in both.items():
    print(f"T = {t:3}: {each}; T x width = {t * each.width:.3g} ± {t * each.width_stderr:.2g}")

truth = model.log_evidence(both[counts[0]].x)
plots.sandwich(both, exact=truth)

# %%
# The same row by row: which rows would need more temperatures than others?

plots.sandwich_widths(both)

# %%
# What to trust
# -------------
# - A lower bound that no longer rises when T is doubled, from the guide *and* from the prior. Two
#   starts that agree say more than one with a small error.
# - The standard error says how far the chains of one run are apart. Chains that have all missed the
#   same mode agree, and are wrong together. The width would show it, for data with such a mode.
# - The width is measured on the model's own data. It carries over to real data as far as these are
#   like the model's: rows that the model finds strange have posteriors far from the prior, and need
#   more temperatures.
