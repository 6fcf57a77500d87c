r"""Why a random code does not decode to a digit
=============================================

An autoencoder and a VAE have the same two networks. The VAE also says how codes are distributed,
z ~ N(0, I), and is trained so that they are; the autoencoder is trained for reconstruction alone.
Its decoder is as good, but nobody knows where to send a z.
"""

import os

import matplotlib.pyplot as plt
import torch
from pyro.distributions import LowRankMultivariateNormal

import ppvae
from ppvae import data, pairs, plots
from ppvae.isolation import forked_rng
from ppvae.likelihoods import Bernoulli
from ppvae.models import Autoencoder
from ppvae.nn import MLP

QUICK = bool(os.environ.get("PPVAE_QUICK"))
STEPS = 100 if QUICK else 1200
Z = 16
# sphinx_gallery_thumbnail_number = 2

# %%
# Two models of one shape
# -----------------------
# Digits of 8x8 pixels that are 0 or 1, sixteen dimensions of z, a hidden layer of a hundred units
# on each side.

digits = data.load("digits")
with forked_rng(0):
    vae, guide = pairs.vae(64, Z, [100])
    autoencoder = Autoencoder(MLP(64, [100], Z), MLP(Z, [100], 64), Bernoulli())
print(ppvae.fit(vae, guide, digits.train, steps=STEPS, lr=2e-3, progress=False))
print(ppvae.fit_autoencoder(autoencoder, digits.train, steps=STEPS, lr=2e-3, progress=False))

# %%
# The second loss is lower, and is not to be compared with the first: it is minus the log likelihood
# of rows whose codes have seen them, and bounds nothing. It does say that the autoencoder gives
# images back better. Above the images, below what each model makes of them:

figure, axes = plt.subplots(2, 1, figsize=(7, 3.6), layout="constrained")
for ax, model, its_guide in ((axes[0], vae, guide), (axes[1], autoencoder, None)):
    plots.reconstructions(model, its_guide, digits.test[:12], digits.event_shape, ax=ax)
    ax.set_title(type(model).__name__, fontsize="medium")

# %%
# From a random z
# ---------------
# The same draws of N(0, I) through both decoders; and for the autoencoder also draws of a normal
# with the mean and the covariance of its codes, which is a prior made up afterwards.

codes = autoencoder.code(digits.train)
with forked_rng(1):
    z = torch.randn(297, Z)
    matched = codes.mean(dim=0) + z @ torch.linalg.cholesky(torch.cov(codes.T)).mT
    means = {
        "VAE, z from N(0, I)": vae.decode(z),
        "autoencoder, z from N(0, I)": autoencoder.decode(z),
        "autoencoder, z from a normal of its codes": autoencoder.decode(matched),
    }
    drawn = {name: torch.bernoulli(mean) for name, mean in means.items()}
spread = codes.std(dim=0)
print(f"standard deviations of the codes: {float(spread.min()):.1f} to {float(spread.max()):.1f}")

figure, axes = plt.subplots(3, 1, figsize=(7, 3.6), layout="constrained")
for ax, (name, images) in zip(axes, means.items(), strict=True):
    sheet = torch.full((8, 14 * 9 - 1), torch.nan)
    for index, image in enumerate(images[:14]):
        sheet[:, 9 * index : 9 * index + 8] = image.reshape(8, 8)
    ax.imshow(sheet, cmap="gray_r", vmin=0, vmax=1)
    ax.set_title(name, fontsize="medium")
    ax.set_axis_off()

# %%
# A number for what the eye sees
# ------------------------------
# Probabilistic PCA with twenty components, fitted to the training digits in closed form (Tipping &
# Bishop 1999), knows neither model. It gives a log density to any image: to test digits, and to the
# drawn ones.

values, vectors = torch.linalg.eigh(torch.cov(digits.train.T))
noise = values[:-20].mean()
loadings = vectors[:, -20:] * (values[-20:] - noise).sqrt()
judge = LowRankMultivariateNormal(digits.train.mean(dim=0), loadings, noise.expand(64))

scores = {
    name: judge.log_prob(images) for name, images in {"test digits": digits.test, **drawn}.items()
}
for name, score in scores.items():
    error = float(score.std()) / len(score) ** 0.5
    print(f"{name:42s} {float(score.mean()):7.1f} ± {error:.1f} nats an image")

# %%
# The codes spread far wider than N(0, I), so that a z from there lies where the decoder was never
# shown one, and the image is nothing like a digit. With a normal that was fitted to the codes the
# autoencoder draws about as well as the VAE: what it lacks is not a decoder but a prior. Such a
# patch does not bring a log p(x), and the autoencoder is refused wherever one is needed.

try:
    ppvae.elbo(autoencoder, guide, digits.test)
except ValueError as error:
    print(error)
