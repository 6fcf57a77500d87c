r"""Two layers of latents, with and without an encoder
==================================================

A deep latent Gaussian model has layers of normal latents, each the mean of the one below it
through a network:

.. math:: z_2 \sim N(0, I), \qquad z_1 \mid z_2 \sim N(f_1(z_2), \mathrm{diag}(\sigma_1^2)),
          \qquad x_d \mid z_1 \sim \mathrm{Bernoulli}(f_0(z_1)_d).

It can be trained in two ways. *Amortized* training has a network from x to the parameters of
q(z | x), trained together with the model. *Alternation* has none: it keeps parameters for each
datum, improves those of a minibatch, moves the model, and goes on to the next minibatch. This page
draws both against wall time, for a small and a large data set.
"""

import os

import matplotlib.pyplot as plt
import torch

import ppvae
from ppvae import pairs
from ppvae.alternating import fit_alternating
from ppvae.families import DiagonalNormal
from ppvae.isolation import forked_rng, private_store

QUICK = bool(os.environ.get("PPVAE_QUICK"))

# %%
# Data
# ----
# Rows of 40 binary elements are drawn from a model of the same kind, with larger weights than a
# network starts with, so that there is something to learn.

X_DIM, Z_DIMS, HIDDEN = 40, (4, 2), (20,)
SMALL, LARGE = 100, 2000 if QUICK else 20_000

with forked_rng(0), torch.no_grad(), private_store():
    truth, _ = pairs.deep_latent_gaussian(X_DIM, Z_DIMS, HIDDEN, activation=torch.nn.Tanh)
    for decoder in truth.decoders:
        for parameter in decoder.parameters():
            parameter.mul_(4.0)
    x = truth(size=LARGE)
    new = truth(size=100)
print(f"{LARGE} rows, {float(x.mean()):.0%} of their elements are 1")

# %%
# Four runs
# ---------
# Both ways see minibatches of 50 rows and have the same learning rate, and both guides are normal
# and independent between the layers. The alternation takes two natural-gradient steps on each row
# of a minibatch before it moves the model. Runs end by their number of steps, which is chosen for
# about the same wall time.

FAMILY = {"z_1": DiagonalNormal(4), "z_2": DiagonalNormal(2)}
STEPS, ROUNDS = (60, 20) if QUICK else (1000, 330)


def fresh():
    """An untrained pair, the same one each time."""
    with forked_rng(1):
        return pairs.deep_latent_gaussian(X_DIM, Z_DIMS, HIDDEN, activation=torch.nn.Tanh)


runs, models = {}, {}
for size in (SMALL, LARGE):
    model, guide = fresh()
    runs["amortized", size] = ppvae.fit(
        model, guide, x[:size], steps=STEPS, batch_size=50, lr=1e-2, progress=False
    )
    models["amortized", size] = model
    model, _ = fresh()
    runs["alternation", size] = fit_alternating(
        model, FAMILY, x[:size], rounds=ROUNDS, batch_size=50, lr=1e-2
    )
    models["alternation", size] = model
for (way, size), run in runs.items():
    print(f"{way:11s} N = {size:5d}: {len(run.losses):4d} steps in {run.seconds:4.1f} s")

# %%
# The curves
# ----------
# The ELBO of each minibatch at the time of its step, averaged over a tenth of the steps. For the
# alternation it is that after the local steps. The upper axis of the right figure has the passes
# over the data.


def smooth(values):
    """The mean of each tenth of the values, moving."""
    width = max(1, len(values) // 10)
    return values.unfold(0, width, 1).mean(dim=-1)


figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
for ax, size in zip(axes, (SMALL, LARGE), strict=True):
    for way, style in (("amortized", "0.0"), ("alternation", "0.6")):
        run = runs[way, size]
        curve = smooth(-run.losses)
        ax.plot(run.elapsed[-len(curve) :], curve, color=style, label=way)
    ax.set_title(f"N = {size}")
    ax.set_xlabel("wall time (s)")
axes[0].set_ylabel("ELBO (nats per datum)")
axes[0].legend(frameon=False, loc="lower right")
plt.show()

# %%
# What the models have learned
# ----------------------------
# ELBOs of two guides say little of the two models. For these, each model is judged by the best
# normal for each of 100 rows that no run has seen, the same measure for all four.

for (way, size), model in models.items():
    best = ppvae.fit_per_datapoint(model, FAMILY, new[: 10 if QUICK else 100])
    error = float(best.elbo.std() / len(best.elbo) ** 0.5)
    print(f"{way:11s} N = {size:5d}: {float(best.elbo.mean()):.2f} ± {error:.2f} nats per new row")
