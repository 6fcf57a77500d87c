r"""What it costs, and how far to trust it: further pictures
=========================================================

A VAE of binary digits with eight latent dimensions, and pictures that the other examples do not
have: of a training run, of the time that amortized and per-datapoint inference take, and of the
importance weights that stand behind an estimate of log p(x). Each is one line,
``plots.name(result)``, takes an ``ax`` if you have one, and gives it back. Curves differ in their
dashes or marks, so that all of it can be read in grey.
"""

import os

import matplotlib.pyplot as plt

import ppvae
from ppvae import data, pairs, plots
from ppvae.isolation import forked_rng

QUICK = bool(os.environ.get("PPVAE_QUICK"))
STEPS = 100 if QUICK else 600

digits = data.load("digits")
test = digits.test[: 20 if QUICK else 60]

# %%
# A training run
# --------------
# The loss is what is minimised: here an estimate of −ELBO, from one minibatch in each step. Grey
# are the single steps, and the curve is a running mean.


def new_pair(seed):
    """A pair that has not been trained."""
    with forked_rng(seed):
        return pairs.vae(x_dim=digits.x_dim, z_dim=8, hidden=[100])


model, guide = new_pair(0)
fit = ppvae.fit(model, guide, digits.train, steps=STEPS, lr=2e-3, progress=False)
print(fit)
plots.losses(fit)

# %%
# From how many data on does an encoder pay?
# ------------------------------------------
# Given the record of the training `compare` has all that it takes to say so. Amortized inference
# pays for the training once and for next to nothing afterwards; fitting q* costs the same for each
# datum. Where the lines cross, both cost the same. (Seconds are those of the machine that made this
# page. The model, which training also made, comes for nothing to those who fit q*.)

comparison = ppvae.compare(model, guide, test, fit=fit)
print(comparison)
plots.break_even(comparison)

# %%
# What is an ELBO to be had for?
# ------------------------------
# The model is held fixed now. A new encoder trains for it, and after 1, 2, 4, 8, … steps it is
# asked for the posteriors of the test images, whose ELBO is then estimated while the clock stands
# still. Beside it `fit_per_datapoint` works on the test images alone, from a cold start and from
# what the trained encoder says. Higher is better, and further left is sooner.

timed = ppvae.elbo_against_time(
    model,
    new_pair(1)[1],
    digits.train,
    test,
    steps=STEPS // 2,
    lr=2e-3,
    evidence=ppvae.iwae(model, comparison.local.guide, test, 1000),
)
print(timed)
plots.elbo_against_time(timed)

# %%
# For so few images the fits are done before the encoder is. What the picture does not show is the
# next thousand images: the encoder has them at once, and the fits begin again. That is the picture
# before this one.
#
# Which weights may be trusted?
# -----------------------------
# An importance-weighted estimate of log p(x) is as good as its largest weights, and Pareto k-hat
# says how heavy their tail is, row by row. Rows in the grey band need more draws, another proposal
# or annealing. On the right stands k-hat of the encoder's weights over what its rows have lost.

figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
plots.pareto_k_sorted(comparison, ax=axes[0])
plots.pareto_k_against(comparison, ax=axes[1])

good = comparison.dataset["pareto_k"] <= comparison.dataset.attrs["pareto_k_threshold"]
for name in good["guide"].values:
    print(f"{name}: {int(good.sel(guide=name).sum())} of {len(test)} rows below the threshold")

# %%
# The two pictures are of different things. The gap is a mean over what q draws, and k-hat speaks of
# what it draws hardly ever: a row with a small gap can have heavy weights, from a thin part of the
# posterior that q is too narrow to visit.
