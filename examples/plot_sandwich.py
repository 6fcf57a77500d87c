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

import matplotlib.pyplot as plt
import torch

import ppvae
from ppvae.families import DiagonalNormal
from ppvae.isolation import forked_rng
from ppvae.models import FactorAnalysis

QUICK = bool(os.environ.get("PPVAE_QUICK"))
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7f7f7f"

# %%
# Twenty latents that are correlated, and a guide that takes them for independent
# -------------------------------------------------------------------------------
# The guide is the best diagonal normal of each row, found by `ppvae.fit_per_datapoint`.

with forked_rng(0):
    model = FactorAnalysis(x_dim=40, z_dim=20, loadings=torch.randn(40, 20))
    x = model(size=10 if QUICK else 25).detach()
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
temperatures = [10, 30] if QUICK else [10, 30, 100, 300]
evaluations = [chains * leapfrog * count for count in temperatures]


def annealed(start):
    """Annealing from a guide, or from the prior (`None`), for growing numbers of temperatures."""
    return [ppvae.ais(model, start, x, num_chains=chains, num_steps=t) for t in temperatures]


found = {
    "importance weighting": [ppvae.iwae(model, guide, x, draws) for draws in evaluations],
    "annealing from the guide": annealed(guide),
    "annealing from the prior": annealed(None),
}

figure, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
for (name, estimates), color, marker in zip(
    found.items(), (GREY, BLUE, ORANGE), ("s", "o", "^"), strict=True
):
    means = [each.mean - exact for each in estimates]
    errors = [2 * each.mean_stderr for each in estimates]
    ax.errorbar(evaluations, means, errors, label=name, color=color, marker=marker, capsize=3)
ax.axhline(0, color="black", linewidth=0.8)
ax.set_ylim(-1.4, 0.2)  # The shortest run from the prior is far below.
ax.set_xscale("log")
ax.set_xlabel("evaluations a row")
ax.set_ylabel("estimate less exact log p(x)\n± 2 standard errors (nats per datum)")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False, fontsize="small", loc="lower right")

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

counts = [20, 40] if QUICK else [25, 50, 100, 200]
both = [
    ppvae.sandwich(model, None, x.new_zeros(20 if QUICK else 150, 40), num_chains=4, num_steps=t)
    for t in counts
]
for each in both:
    print(each)

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
left.plot(counts, [each.upper.mean for each in both], color=ORANGE, marker="v", label="upper")
left.plot(counts, [each.lower.mean for each in both], color=BLUE, marker="^", label="lower")
truth = float(model.log_evidence(both[0].x).detach().mean())
left.axhline(truth, color=GREY, linestyle=":", label="exact")
left.set_ylabel("log p(x) of simulated data\n(nats per datum)")
widths = [each.width for each in both]
errors = [2 * each.width_stderr for each in both]
right.errorbar(counts, widths, errors, color=GREEN, marker="o", capsize=3, linestyle="none")
share = sum(widths) / sum(1 / t for t in counts)
right.plot(counts, [share / t for t in counts], color=GREY, linestyle="--", label="1/T")
right.axhline(0, color="black", linewidth=0.8)
right.set_ylabel("width ± 2 standard errors\n(nats per datum)")
for ax in (left, right):
    ax.set_xscale("log")
    ax.set_xticks(counts, [str(t) for t in counts])
    ax.minorticks_off()
    ax.set_xlabel("temperatures T")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)

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
