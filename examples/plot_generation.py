r"""What a VAE generates: images and counts
========================================

A convolutional VAE of the 8x8 digits of scikit-learn: draws, reconstructions, the way from one
digit to another, and what each coordinate of the latent stands for. Then a VAE of counts, where
the likelihood decides how good the model can be.
"""

import os

import matplotlib.pyplot as plt
import torch

import ppvae
from ppvae import data, distributions, generation, pairs, plots
from ppvae.isolation import forked_rng
from ppvae.likelihoods import NegativeBinomial, Poisson

QUICK = bool(os.environ.get("PPVAE_QUICK"))
# sphinx_gallery_thumbnail_number = 4

# %%
# Images
# ------
# The rows are flat, 64 pixels each; ``image_shape`` says that they are images of one channel, and
# makes encoder and decoder convolutional.

digits = data.load("digits")
with forked_rng(0):
    model, guide = pairs.vae(
        x_dim=64, z_dim=6, hidden=[64], image_shape=(1, 8, 8), channels=[8, 16]
    )
print(guide.encoder)
print(model.decoder)
fit = ppvae.fit(
    model, guide, digits.train, steps=20 if QUICK else 400, batch_size=100, lr=3e-3, progress=False
)
print(fit)

# %%
# Draws of z from the prior, decoded: the probability of each pixel to be black.

plots.samples(model, digits.event_shape, rows=3)

# %%
# `reconstruct` averages the decoded draws of q(z | x); `plots.reconstructions` decodes its mean.
# The two differ where the decoder is far from linear on the scale of q.

plots.reconstructions(model, guide, digits.test[:12], digits.event_shape)

averaged = generation.reconstruct(model, guide, digits.test, num_samples=100)
at_the_mean = model.decode(generation.posterior_means(model, guide, digits.test))
for name, probability in (("averaged over draws", averaged), ("at the mean", at_the_mean)):
    right = ((probability > 0.5) == (digits.test > 0.5)).float().mean()
    print(f"{name}: {right:.1%} of the test pixels are on the right side of 1/2")
print(f"mean absolute difference: {(averaged - at_the_mean).abs().mean():.3f}")

# %%
# From one test image to another, on the straight line between the means of q(z | x):

plots.interpolation(model, guide, digits.test[:4], digits.test[4:8], digits.event_shape)

# %%
# One coordinate of z at a time, starting from the mean of q(z | x) of a test image. Where a row
# hardly changes the model makes little of that coordinate.

z = generation.posterior_means(model, guide, digits.test[:1])[0]
plots.traversals(model, z, digits.event_shape)

# %%
# Counts
# ------
# Simulated counts of 20 kinds, with two latent dimensions and a dispersion of 1/2: their variance
# given z is :math:`\mu + \mu^2 / 2`, where that of a Poisson would be μ.

with forked_rng(1):
    z = torch.randn(1500, 2)
    log_mean = 1.5 + z @ (0.5 * torch.randn(2, 20))
    counts = distributions.NegativeBinomial(log_mean, torch.tensor(0.5).log()).sample()
train, test = counts[:1000], counts[1000:]
print(f"mean count {counts.mean():.1f}, largest {counts.max():.0f}")

fitted = {}
for name, likelihood in (
    ("Poisson", Poisson()),
    ("negative binomial", NegativeBinomial.learned()),
):
    with forked_rng(0):
        pair = pairs.vae(x_dim=20, z_dim=2, hidden=[32], likelihood=likelihood)
    ppvae.fit(*pair, train, steps=20 if QUICK else 500, batch_size=100, lr=5e-3, progress=False)
    fitted[name] = pair
print(fitted["negative binomial"][0].likelihood)

# %%
# Both likelihoods are probabilities of the same counts, so that their evidences can be compared,
# here by the importance-weighted bound on rows that were held out. With two latent dimensions
# quadrature says how far the bound is from the evidence: of the Poisson it misses more, but little
# beside the difference of the two models.

evidence = {name: ppvae.iwae(*pair, test, num_samples=300) for name, pair in fitted.items()}
for name, (model, _) in fitted.items():
    short = ppvae.quadrature(model, test[:10]).value - evidence[name].value[:10]
    print(f"{name}: {evidence[name]}")
    print(f"  short of the evidence by {short.mean():.2f} nats for the first 10 rows")
gain = evidence["negative binomial"].value - evidence["Poisson"].value
print(f"the negative binomial is better for {(gain > 0).float().mean():.0%} of the held-out rows")

figure, ax = plt.subplots(figsize=(5.0, 3.6), layout="constrained")
one, other = evidence["Poisson"].value, evidence["negative binomial"].value
ends = [float(other.min()), float(other.max())]
ax.plot(ends, ends, color="0.6", linewidth=0.8, label="equal")
ax.scatter(one, other, s=8, color="0.2", label="a held-out row")
ax.set_xlabel("evidence under Poisson (nats)")
ax.set_ylabel("evidence under negative binomial (nats)")
ax.legend(frameon=False)
