r"""Which gradient estimator?
=========================

The gradient of an ELBO can be had from draws in many ways. All have the same mean; they differ in
noise, and in what a draw costs. The usual rules are that the score function is noisy, that
reparameterisation tames it, and that an analytic KL tames it further. How much of that holds is a
property of the pair and of where its parameters are: `ppvae.gradient_variance` measures it.
"""

import os

import matplotlib.pyplot as plt
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO

import ppvae
from ppvae import data, pairs, plots
from ppvae.isolation import forked_rng
from ppvae.objectives import (
    IWAE,
    BetaELBO,
    DReG,
    ScoreFunctionELBO,
    StickingTheLanding,
)

QUICK = bool(os.environ.get("PPVAE_QUICK"))
DRAWS = 8 if QUICK else 50

# %%
# At the start of training
# ------------------------
# A VAE of the 8x8 digits, untrained. ``BetaELBO()`` is the ELBO with an analytic KL, what ``fit``
# uses; ``ScoreFunctionELBO(4)`` has four draws a row, each with the others as its baseline.

digits = data.load("digits")
x = digits.train[:100]
with forked_rng(0):
    model, guide = pairs.vae(x_dim=digits.x_dim, z_dim=8, hidden=[64])

OF_THE_ELBO = {
    "score function": ScoreFunctionELBO(),
    "score function, 4 draws": ScoreFunctionELBO(4),
    "reparameterised": Trace_ELBO(),
    "analytic KL": BetaELBO(),
    "sticking the landing": StickingTheLanding(),
}
start = ppvae.gradient_variance(model, guide, x, estimators=OF_THE_ELBO, num_draws=DRAWS)
print(start)

# %%
# The rules hold here. For the guide the score function's variance is above a thousand times that of
# the reparameterised gradient, and its mean cannot be told from zero with these draws. The other
# draws of the row are a baseline that takes away nearly all of that. An analytic KL lowers the
# variance of the reparameterised gradient by another factor of more than ten.
#
# For the model there is nothing to choose: once z is drawn, all are the gradient of log p(x, z).
#
# After training
# --------------

ppvae.fit(model, guide, digits.train, steps=30 if QUICK else 700, lr=5e-3, seed=0, progress=False)
end = ppvae.gradient_variance(model, guide, x, estimators=OF_THE_ELBO, num_draws=DRAWS)
print(end)

figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
for ax, result, title in zip(axes, (start, end), ("untrained", "trained"), strict=True):
    plots.gradient_variance(result, group="guide", ax=ax).set_title(title)
plt.show()

# %%
# Now the order is another one. Near its optimum q is close to the posterior, log p(x, z) − log q is
# close to constant in z, and sticking the landing, which follows its slope alone, has a fifth of
# the variance of the analytic KL. The score function with a baseline profits for the same reason:
# four nearly equal signals cancel, and it has less noise than the reparameterised gradient of one
# draw.
# (Of one: the others would gain by four draws too. Give all as many ``num_particles`` to choose.)
#
# For a normal q with standard deviation σ and a normal posterior with precision P this can be had
# in closed form. The gradient for the mean of q has the variance
#
# .. math:: P^2 \sigma^2, \qquad (P - 1)^2 \sigma^2, \qquad (P - 1 / \sigma^2)^2 \sigma^2
#
# if it is reparameterised, with an analytic KL to the prior N(0, 1), and sticking the landing. The
# last vanishes at the optimum, where P = 1/σ²; but where q is much too narrow it is the largest of
# the three.
#
# Bounds with several draws
# -------------------------
# The importance-weighted bound is another objective, so that its estimators compare among
# themselves. IWAE's signal falls behind its noise as K grows, in the end as the root of K
# (Rainforth et al. 2018, theorem 1). The doubly reparameterised gradient has three times the
# ratio or more at each K. That its ratio does not fall holds for large K, and nearer to the optimum
# than this guide is.

OF_THE_BOUNDS = {
    f"{kind.__name__}, K = {count}": kind(count)
    for count in ((2, 8) if QUICK else (2, 8, 32))
    for kind in (IWAE, DReG)
}
bounds = ppvae.gradient_variance(model, guide, x, estimators=OF_THE_BOUNDS, num_draws=DRAWS)
table = bounds.dataset.sel(group="guide").to_dataframe()
print(table[["snr", "snr_stderr", "relative_cost"]].round(3).to_string())

# %%
# Discrete latents
# ----------------
# Nothing can be reparameterised in a sigmoid belief network, and the result says so. With eight
# binary units all values can be summed over, which leaves no noise, at a price.

with forked_rng(1):
    model, guide = pairs.sigmoid_belief_network(digits.x_dim, z_dims=[8], baseline=[32])
ppvae.fit(model, guide, digits.train, steps=20 if QUICK else 250, lr=5e-3, seed=0, progress=False)
discrete = ppvae.gradient_variance(
    model,
    guide,
    x,
    estimators={
        "score function": ScoreFunctionELBO(),
        "leave-one-out, 4 draws": ScoreFunctionELBO(4),
        "learned baseline": TraceGraph_ELBO(),
        "sum over all values": TraceEnum_ELBO(max_plate_nesting=1),
        "sticking the landing": StickingTheLanding(),
    },
    num_draws=8 if QUICK else 40,
)
print(discrete)

plots.gradient_variance(discrete, group="guide")
plt.show()
