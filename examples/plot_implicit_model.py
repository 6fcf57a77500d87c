r"""Explicit against implicit
=========================

A VAE and a generative adversarial network send the same z ~ N(0, I) through a network. The VAE adds
noise to what comes out, and so has a density,

.. math:: x \mid z \sim N(\mathrm{NN}(z), \sigma^2 I) \qquad \text{against} \qquad x = G(z),

which can be bounded, compared, and judged on data that it has not seen. The implicit model has
draws alone.
"""

import os

import matplotlib.pyplot as plt
import torch
from torch import nn

import ppvae
from ppvae import data, pairs, plots
from ppvae.isolation import forked_rng, private_store
from ppvae.models import ImplicitModel
from ppvae.nn import MLP

QUICK = bool(os.environ.get("PPVAE_QUICK"))
Z = 16
# sphinx_gallery_thumbnail_number = 2

# %%
# The same digits, in grey
# ------------------------

digits = data.load("digits", binarization=None)
with forked_rng(0):
    vae, guide = pairs.vae(64, Z, [100], "gaussian")
    gan = ImplicitModel(nn.Sequential(MLP(Z, [100], 64), nn.Sigmoid()), Z, 64)
    discriminator = MLP(64, [100], 1, nn.LeakyReLU)
fit = ppvae.fit(vae, guide, digits.train, steps=40 if QUICK else 1200, lr=2e-3, progress=False)
print(fit)
run = ppvae.fit_adversarial(
    gan, discriminator, digits.train, steps=40 if QUICK else 2000, lr=5e-4, progress=False
)
print(run)

# %%
# The VAE's loss falls, and says how good the model is. The two losses of the game are measured
# against each other: where one side gains the other loses.

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
axes[0].plot(fit.losses, color="0.3", linewidth=0.5)
axes[0].set_xlabel("step")
axes[0].set_ylabel("VAE, −ELBO (nats per datum)")
axes[1].plot(run.discriminator_losses, color="0.6", linewidth=0.5, label="discriminator")
axes[1].plot(run.generator_losses, color="black", linewidth=0.5, label="generator")
axes[1].set_xlabel("step")
axes[1].set_ylabel("loss (nats per row drawn)")
legend = axes[1].legend(frameon=False, fontsize="small")

# %%
# Draws
# -----
# Left the means of x that the VAE decodes, right the implicit model's rows.

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
plots.samples(vae, digits.event_shape, ax=axes[0])
plots.samples(gan, digits.event_shape, ax=axes[1])

# %%
# What can be asked of draws
# --------------------------
# How far a draw is from the nearest training digit says whether it looks like one; how far a test
# digit is from the nearest of the draws, whether the draws cover what there is. Means are taken of
# the VAE, as in the picture, 1,500 draws of each model, as many as there are training digits.

count = len(digits.train)
with forked_rng(1), torch.no_grad(), private_store():
    drawn = {"VAE, means": vae.decode(torch.randn(count, Z)), "implicit": gan(size=count)}


def nearest(images: torch.Tensor, among: torch.Tensor) -> float:
    """Root of the mean squared distance to the nearest of some images."""
    return float(torch.cdist(images, among).min(dim=1).values.square().mean().sqrt())


print("                draw to training   test to draw   (in units of a pixel's range)")
print(f"training digits {'':16s}   {nearest(digits.test, digits.train):12.2f}")
for name, images in drawn.items():
    there, back = nearest(images, digits.train), nearest(digits.test, images)
    print(f"{name:15s} {there:16.2f}   {back:12.2f}")

# %%
# By both distances this generator is behind this VAE, whose means are also smoother than any digit.
# That is a statement about two small networks and their training, and not about their kinds.
#
# What only a density can be asked
# --------------------------------
# Of the VAE: how probable are digits that it has not seen? Of the implicit model there is no such
# number, not even a bound, and the package says so.

test = digits.test[: 20 if QUICK else 200]
print(ppvae.iwae(vae, guide, test, 500))
try:
    ppvae.iwae(gan, guide, test)
except ValueError as error:
    print(error)
