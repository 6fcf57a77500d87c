r"""Are the posteriors as wide as they should be?
=============================================

For real data nobody knows the latent that a row came from. For data that the model draws itself
it is known: a latent :math:`z^* \sim p(z)` and its row :math:`x \sim p(x \mid z^*)` make
:math:`z^*` one exact draw from the posterior :math:`p(z \mid x)`. If the guide is that posterior,
then :math:`z^*` is like any of the guide's own draws, and its rank among S of them is uniform on
0, …, S. That is simulation-based calibration (Talts et al. 2018), and `ppvae.calibrate` does it.
"""

import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import ppvae
from ppvae import data, pairs, plots
from ppvae.isolation import forked_rng

QUICK = bool(os.environ.get("PPVAE_QUICK"))
ROWS = 40 if QUICK else 500

# %%
# A posterior that is known
# -------------------------
# In factor analysis the posterior is a normal in closed form. Beside it, as guides: the same normal
# with half its scale, the same a little too high, and the prior.

loadings = torch.tensor([[1.0, 0.0], [0.5, -1.0], [-1.0, 0.6], [0.2, 0.4]])
model = ppvae.models.FactorAnalysis(x_dim=4, z_dim=2, loadings=loadings)


def normal(factor=1.0, shift=0.0):
    """The exact posterior, with another scale or place."""

    def guide(x):
        exact = model.posterior(x)
        with pyro.plate("data", len(x)):
            scale_tril = factor * exact.scale_tril
            pyro.sample("z", dist.MultivariateNormal(exact.loc + shift, scale_tril=scale_tril))

    return guide


def prior(x):
    """Looks at no row."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))


guides = {
    "exact": normal(),
    "half the scale": normal(factor=0.5),
    "too high": normal(shift=0.3),
    "prior": prior,
}
found = ppvae.calibrate(model, guides, torch.zeros(ROWS, 4))
print(found)

# %%
# The rows that are passed give shape and number alone; others are drawn in their place.
#
# The picture of the ranks is their distribution function less that of uniform ones. In the grey
# band all curves of exact guides stay together (Säilynoja, Bürkner & Vehtari 2022). A guide that is
# too narrow has the truth at both ends of its draws too often: its curve rises at once, and falls
# later on. One that is too high has it below too often, so that its curve lies above 0.

plots.rank_ecdf(found)

# %%
# The same in the terms in which intervals are reported: how many 95 % intervals hold the truth?

plots.coverage(found)
for name, part in found.guides.items():
    share, error = part.coverage(0.95)
    print(f"{name:15} {100 * share.mean():.0f} % of the 95 % intervals hold the truth")

# %%
# **The prior passes.** It knows nothing of x, and its ranks are uniform: it is calibrated, and of
# no use. What tells it from the posterior is the contraction, 1 less the ratio of the posterior's
# variance to the prior's. It should always be looked at beside the ranks.

plots.z_scores(found)

# %%
# Uniformity and symmetry
# -----------------------
# SBC asks whether the ranks are uniform, and so sees width, place and shape. VSBC (Yao et al. 2018)
# asks less: are they symmetric? Variational posteriors are often too narrow, and may still be
# wanted to be in the right place. Of two elements a smallest p-value of 0.025 is nothing special.

for name, part in found.guides.items():
    print(
        f"{name:15} smallest p of uniformity {float(part.p_values.min()):.1g}, "
        f"of symmetry {float(part.symmetry_p_values.min()):.1g}"
    )

# %%
# An amortized guide and its family
# ---------------------------------
# A VAE of the 8x8 digits, whose guide is a normal with a diagonal covariance. Data are simulated
# from the fitted model, and ``per_datapoint=True`` fits a normal to each simulated row too. What is
# off with both is the family's fault; what is off with the amortized guide alone is the encoder's.

digits = data.load("digits")
with forked_rng(0):
    vae, guide = pairs.vae(x_dim=digits.x_dim, z_dim=2, hidden=[50])
ppvae.fit(vae, guide, digits.train, steps=50 if QUICK else 2000, seed=0, progress=False)

found = ppvae.calibrate(vae, guide, digits.train[:ROWS], per_datapoint=True)
print(found)

# %%
# Both at once:

figure, axes = plt.subplots(2, 1, figsize=(6.5, 6.5), layout="constrained")
plots.rank_ecdf(found, ax=axes[0])
plots.z_scores(found, ax=axes[1])

# %%
# The ranks speak of the average over data that the *model* draws. Real data on which the model is
# wrong are not among these, and rows on which the guide is too narrow can hide rows on which it is
# too wide. `ppvae.compare` looks at each real row instead, at the price of an estimate of its
# log p(x).
