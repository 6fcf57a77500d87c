r"""A variational autoencoder of digits
===================================

A VAE with a two-dimensional latent on the 8x8 digits of scikit-learn. Two dimensions are few for
digits, but they can be drawn, and the evidence can be had by quadrature instead of a bound:

.. math:: z \sim N(0, I_2), \qquad x_d \mid z \sim \mathrm{Bernoulli}(\mathrm{NN}_\theta(z)_d).
"""

import os

import matplotlib.pyplot as plt
import torch

import ppvae
from ppvae import data, pairs, plots
from ppvae.isolation import forked_rng

QUICK = bool(os.environ.get("PPVAE_QUICK"))
# sphinx_gallery_thumbnail_number = 2

# %%
# Data
# ----
# A Bernoulli likelihood is a probability of pixels that are 0 or 1, so that the grey digits are
# thresholded, once and for all.

digits = data.load("digits")
print(digits)

# %%
# Training
# --------
# Encoder and decoder have one hidden layer each, and the guide is a normal with a diagonal
# covariance, as in Kingma & Welling (2014).

with forked_rng(0):
    model, guide = pairs.vae(x_dim=digits.x_dim, z_dim=2, hidden=[100])
fit = ppvae.fit(
    model, guide, digits.train, steps=80 if QUICK else 4000, lr=1e-3, seed=0, progress=False
)
print(fit)

# The loss, an estimate of −ELBO, of each minibatch and as a running mean.
plots.losses(fit)

# %%
# What the model draws
# --------------------
# Draws of z from the prior, decoded. What is shown is the mean of x given z, the probability of
# each pixel to be black.

plots.samples(model, digits.event_shape)

# %%
# The whole latent at a glance: a grid of z that is spaced evenly in the prior's probability.

plots.latent_grid(model, digits.event_shape)

# %%
# What the guide makes of the test images
# ---------------------------------------
# Above the images, below the mean of x at the mean of q(z | x).

plots.reconstructions(model, guide, digits.test[:12], digits.event_shape)

# %%
# The means of q(z | x) of all test images, each drawn as the digit that it is. The classes were
# not used in training.

plots.latent_scatter(guide, digits.test, digits.test_labels)

with torch.no_grad():
    means = guide.family.distribution(guide.params(digits.test)).mean
distance = torch.cdist(means, means).fill_diagonal_(torch.inf)
same = (digits.test_labels[distance.argmin(dim=1)] == digits.test_labels).float().mean()
shares = torch.bincount(digits.test_labels) / len(digits.test_labels)
print(f"the nearest neighbour is of the same class for {same:.0%} of the test images")
print(f"of a neighbour by chance it would be {(shares**2).sum():.0%}")

# %%
# Is the guide good enough?
# -------------------------
# The reconstructions look as they should, and say little about the guide. `compare` fits a normal
# to each of some test images on its own and takes the inference gap apart.

comparison = ppvae.compare(model, guide, digits.test[: 10 if QUICK else 60], fit=fit)
comparison

# %%
# The mean gaps, and those of each image, sorted:

figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", width_ratios=[1, 1.6])
plots.gap_bars(comparison, ax=axes[0])
plots.gap_sorted(comparison, ax=axes[1])

# %%
# The larger of the two bars is where an improvement should begin. If it is amortization, the
# family is not to blame: a normal that fits better exists for these images, and the encoder does
# not return it. The sorted gaps show whether that is so everywhere or for a few images.

share = comparison.mean("amortization_gap")[0] / comparison.mean("inference_gap")[0]
print(f"{share:.0%} of the mean inference gap is amortization")

gap = comparison.dataset["amortization_gap"].values
order = torch.as_tensor(gap).argsort(descending=True)
worst = order[: max(1, len(gap) // 10)]
print(f"the tenth of the images with the largest gaps has {gap[worst].sum() / gap.sum():.0%} of it")

# %%
# The images with the largest amortization gap, largest first:

plots.reconstructions(model, guide, digits.test[order[:6]], digits.event_shape)
