r"""Mending the rows that need it
=============================

A guide that is good on average can be poor for some data. `ppvae.refine` predicts each row's
amortization gap from one evaluation of the gradient at the encoder's output, and spends its effort
on the rows that promise most:

.. math:: \text{predicted gap} = \tfrac12\, g^\top M^{-1} g
          + \tfrac12 \sum_d (M_{dd} - 1 - \log M_{dd}),

with g the gradient and M the expected curvature of the local ELBO, in units of the encoder's q.
"""

import os

import matplotlib.pyplot as plt

import ppvae
from ppvae import data, pairs, plots
from ppvae.isolation import forked_rng

QUICK = bool(os.environ.get("PPVAE_QUICK"))

# %%
# A guide to be mended
# --------------------
# A VAE of digits with eight latent dimensions. `compare` measures its gaps with care.

digits = data.load("digits")
with forked_rng(0):
    model, guide = pairs.vae(x_dim=digits.x_dim, z_dim=8, hidden=[100])
ppvae.fit(model, guide, digits.train, steps=60 if QUICK else 2000, lr=1e-3, seed=0, progress=False)
x = digits.test[: 10 if QUICK else 150]
comparison = ppvae.compare(model, guide, x, evidence_samples=1000)
print(comparison)

# %%
# Is the prediction any good?
# ---------------------------
# One look at each row, before anything is refined, against the gap that `compare` has measured.
# Rows on the dashed line were predicted exactly.

refined = ppvae.refine(model, guide, x)
print(refined)
plots.refinement(refined, comparison.dataset["amortization_gap"].values)

# %%
# What does it cost?
# ------------------
# A budget counts gradient evaluations: one draw for one row. The full fits behind `compare` climb
# until each row is within a thousandth of a nat of its optimum, and spend hundreds of evaluations
# on a row, more where another mode is found.

gap, _ = comparison.mean("amortization_gap")
full = float(refined.evaluations.double().mean())
budgets = [share * full for share in (0.5, 0.6, 0.7, 0.8, 0.9)]
done = [ppvae.refine(model, guide, x, budget=budget) for budget in budgets] + [refined]
spent = [float(each.evaluations.double().mean()) for each in done]
share = [float(each.gain.mean()) / gap for each in done]

figure, ax = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
ax.plot(spent, share, marker="o", color="#0072B2")
ax.axhline(1, color="0.5", linestyle=":", linewidth=1)
ax.annotate("all of the amortization gap", (spent[0], 1.01), fontsize="small", color="0.4")
ax.set_ylim(0, 1.12)
ax.set_xlabel("gradient evaluations a row")
ax.set_ylabel("share of the amortization gap\nbrought back")
ax.spines[["top", "right"]].set_visible(False)

engine = 128 * float(comparison.local.steps.double().mean())
print(f"Refinement of all rows: {full:.0f} gradient evaluations a row; full fits: {engine:.0f}.")

# %%
# Only the rows that need it
# --------------------------
# A tolerance says which gap can be borne. Rows that promise less stay as the encoder left them.

for tolerance in (0.5, 0.2):
    print(f"tolerance {tolerance} nats:")
    print(ppvae.refine(model, guide, x, tolerance=tolerance))
