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
from ppvae import pairs, plots
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
SMALL, LARGE = 100, 2000 if QUICK else 10_000

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
# and independent between the layers. The alternation takes one natural-gradient step on each row
# of a minibatch before it moves the model.

FAMILY = {"z_1": DiagonalNormal(4), "z_2": DiagonalNormal(2)}
SETTINGS = {"batch_size": 50, "lr": 1e-2, "progress": False}


def amortized(size, steps):
    """A model trained together with an encoder, and the record."""
    with forked_rng(1):
        model, guide = pairs.deep_latent_gaussian(X_DIM, Z_DIMS, HIDDEN, activation=torch.nn.Tanh)
    return model, ppvae.fit(model, guide, x[:size], steps=steps, **SETTINGS)


def alternation(size, rounds):
    """The same untrained model, trained without an encoder, and the record."""
    with forked_rng(1):
        model, _ = pairs.deep_latent_gaussian(X_DIM, Z_DIMS, HIDDEN, activation=torch.nn.Tanh)
    return model, fit_alternating(model, FAMILY, x[:size], rounds=rounds, local_steps=1, **SETTINGS)


runs, models = {}, {}
for way, train, steps in (("amortized", amortized, 250), ("alternation", alternation, 150)):
    train(SMALL, 1)  # What only a first call costs is left out of the curves.
    for size in (SMALL, LARGE):
        models[way, size], run = train(size, 10 if QUICK else steps)
        runs[way, size] = run
        seconds, visits = float(run.elapsed[-1]), 50 * len(run.losses) / size
        print(
            f"{way:11s} N = {size:5d}: {1000 * seconds / len(run.losses):.0f} ms a step, "
            f"each row seen {visits:.2g} times"
        )

# %%
# The curves
# ----------
# The loss of each minibatch, an estimate of −ELBO, at the time of its step, as a mean over a tenth
# of the steps. For the alternation it is that after the local step.

figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
for ax, size in zip(axes, (SMALL, LARGE), strict=True):
    ways = {way: runs[way, size] for way in ("amortized", "alternation")}
    shortest = min(len(run.losses) for run in ways.values())
    plots.losses(ways, against="time", window=max(1, shortest // 10), ax=ax)
    ax.set_title(f"N = {size}")
plt.show()

# %%
# Of the small data set each row has a turn in every second round. The model has moved little since,
# the row's parameters are nearly right, and one step keeps them so: both ways climb alike. Of the
# large one a row waits 200 rounds, and in this run not all rows have had even one turn. A row comes
# to its turn with the parameters it started with, one step is not enough, and the model learns from
# a poor guess of z. The encoder pays no such price: what it learns from one row serves all others.
#
# More steps per turn would mend the guess and make each round slower by as much. The table of the
# alternation also grows with N, and a new row needs steps of its own.
#
# What the models have learned
# ----------------------------
# ELBOs of two guides say little of the two models. For these, each model is judged by the best
# normal for each of some rows that no run has seen, the same measure for all four.

new = new[: 5 if QUICK else 40]
best = {key: ppvae.fit_per_datapoint(model, FAMILY, new).elbo for key, model in models.items()}
for size in (SMALL, LARGE):
    one, other = best["amortized", size], best["alternation", size]
    difference = one - other
    error = float(difference.std()) / len(new) ** 0.5
    print(
        f"N = {size:5d}: amortized {float(one.mean()):.2f}, alternation {float(other.mean()):.2f} "
        f"nats per new row; difference {float(difference.mean()):+.2f} ± {error:.2f}"
    )

# %%
# For few rows the alternation is no worse: there is no second network to train, or to overfit. For
# many rows the amortized model is better after about the same time, beyond the error of the
# difference.
