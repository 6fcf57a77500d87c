r"""Two gaps where the posterior is known
=====================================

The smallest model with everything in it: a latent that is positive, and one noisy observation of
it,

.. math:: z \sim \mathrm{Exponential}(1), \qquad x \mid z \sim N(z, 1).

Its posterior is a normal :math:`N(x - 1, 1)` cut off at zero, and its evidence has a closed form,
so nothing in the decomposition of the inference gap has to be bounded:

.. math::
    \underbrace{\log p(x) - L[q_\phi]}_{\text{inference gap}}
    = \underbrace{\log p(x) - L[q^*]}_{\text{approximation gap}}
    + \underbrace{L[q^*] - L[q_\phi]}_{\text{amortization gap}}.
"""

import os

import matplotlib.pyplot as plt
import torch

import ppvae
from ppvae import pairs, plots
from ppvae.families import Gamma, TruncatedNormal, Weibull
from ppvae.isolation import forked_rng

QUICK = bool(os.environ.get("PPVAE_QUICK"))
STEPS = 50 if QUICK else 2000

# %%
# A guide, and data to train it on
# --------------------------------
# The pair comes ready made: the model above, and a guide that draws z from a log-normal whose two
# parameters an encoder network reads off x. The model has nothing to learn, so that training
# moves the encoder alone.

with forked_rng(0), torch.no_grad():
    model, guide = pairs.exponential_gaussian()
    x_train, x_test = model(size=10_000), model(size=40 if QUICK else 200)
print(model)
print(guide)

fit = ppvae.fit(model, guide, x_train, steps=STEPS, batch_size=512, lr=3e-3, seed=0, progress=False)
print(fit)

# %%
# Two data, looked at closely
# ---------------------------
# `fit_per_datapoint` frees the guide: instead of the encoder's output each datum gets two
# parameters of its own, which are fitted until they cannot be bettered. That is the best which
# a log-normal can do, for these data.

x = torch.tensor([1.5, 0.0])
local = ppvae.fit_per_datapoint(model, None, x, init=guide)
print(local)

figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for row, ax in enumerate(axes):
    plots.toy_posterior(x, guide, local, row=row, ax=ax)

# %%
# A log-normal vanishes at z = 0, the posterior does not: no log-normal is the posterior, and
# between the solid line and the dashed one lies the approximation gap. Between the dashed line and
# the dash-dotted one lies the amortization gap. Both can be had in nats:

evidence = model.log_evidence(x)
amortized = ppvae.elbo(model, guide, x, num_samples=20_000)
best = ppvae.elbo(model, local.guide, x, num_samples=20_000)
for n, value in enumerate(x.tolist()):
    print(
        f"x = {value}: approximation gap {evidence[n] - best.value[n]:.4f} "
        f"± {best.stderr[n]:.4f}, amortization gap {best.value[n] - amortized.value[n]:.4f}"
    )

# %%
# The gap along the data
# ----------------------
# `compare` does this for every row, with draws that are common to both guides, so that the
# standard error of the difference between them is small.

comparison = ppvae.compare(model, guide, x_test, fit=fit)
print(comparison)

# %%
# In a notebook, and on this page, a comparison that ends a cell is shown as a table:

comparison

# %%
# Against x one sees where each gap comes from. The approximation gap belongs to the posterior's
# shape: it is large where the cut at zero goes through the bulk of the normal, and goes to zero
# where the posterior lies well inside. The amortization gap belongs to the encoder: it depends on
# how much the encoder has seen of such data.

plots.gap_against(comparison, x_test, label="x")

rare = x_test > x_train.quantile(0.99)
gap = torch.as_tensor(comparison.dataset["amortization_gap"].values)
print(f"amortization gap, mean over x beyond the 99th percentile: {gap[rare].mean():.4f} nats")
print(f"amortization gap, mean over the other data:               {gap[~rare].mean():.4f} nats")

# %%
# Other families
# --------------
# The family can be exchanged and everything else kept. Of these four one holds the posterior: the
# truncated normal.

comparisons = {"LogNormal": comparison}
for family in (Gamma(), Weibull(), TruncatedNormal()):
    with forked_rng(0):
        _, other = pairs.exponential_gaussian(family)
    ppvae.fit(model, other, x_train, steps=STEPS, batch_size=512, lr=3e-3, progress=False)
    comparisons[type(family).__name__] = ppvae.compare(model, other, x_test)

plots.gap_bars(comparisons)

for name, each in comparisons.items():
    approximation, amortization = each.mean("approximation_gap"), each.mean("amortization_gap")
    print(
        f"{name:<16} approximation {approximation[0]:7.4f} ± {approximation[1]:.4f}   "
        f"amortization {amortization[0]:7.4f} ± {amortization[1]:.4f}"
    )

# %%
# With a family that holds the posterior what remains is amortization, and a better encoder or a
# longer training is what helps. With one that does not, no encoder can close the gap.
