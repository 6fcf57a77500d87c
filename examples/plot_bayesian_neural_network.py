r"""Weights have nothing to amortize, latent inputs do
==================================================

Two kinds of latent variables in one network. The weights of a Bayesian neural network are shared by
all rows: one posterior serves them all, and there is nothing to amortize. An input that was not
observed belongs to its row, and an encoder can infer it:

.. math:: w \sim N(0, S), \quad z_n \sim N(0, 1), \quad y_n \sim N(f_w(u_n, z_n), \sigma^2).
"""

import math
import os

import matplotlib.pyplot as plt
import torch
from pyro.infer import TraceMeanField_ELBO

import ppvae
from ppvae import pairs
from ppvae.isolation import forked_rng, private_store

QUICK = bool(os.environ.get("PPVAE_QUICK"))

# %%
# Latent weights
# --------------
# Sixty rows of a sine with noise 0.1, in two clusters. A row holds its input, then its target.

with forked_rng(0):
    u = torch.cat([torch.rand(30, 1) - 2.0, torch.rand(30, 1) + 1.0])
    x = torch.cat([u, torch.sin(2 * u) + 0.1 * torch.randn(60, 1)], dim=1)
with forked_rng(1):
    model, guide = pairs.bayesian_neural_network(
        hidden=(20,), prior_scale=2.0, noise=0.1, num_data=60
    )
for lr, steps in ((2e-2, 700), (3e-3, 300)):
    fit = ppvae.fit(
        model, guide, x, steps=50 if QUICK else steps, batch_size=60, lr=lr, progress=False
    )
print(guide)
print(fit)

# %%
# The variance of a prediction has two sources: noise, which would remain if the weights were known,
# and the weights.

grid = torch.linspace(-3.5, 3.5, 141)[:, None]
prediction = model.predict(grid, guide)
mean, noise, weights = (
    values.flatten() for values in (prediction.mean, prediction.noise_sd, prediction.weight_sd)
)
figure, ax = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
at, all_sd = grid.flatten(), prediction.sd.flatten()
ax.fill_between(
    at, mean - 2 * all_sd, mean + 2 * all_sd, color="0.87", label="2 sd, noise and weights"
)
ax.fill_between(at, mean - 2 * weights, mean + 2 * weights, color="0.7", label="2 sd, weights")
ax.plot(at, mean, color="black", label="mean")
ax.plot(at, torch.sin(2 * at), color="black", linestyle=":", label="truth")
ax.plot(x[:, 0], x[:, 1], ".", color="#D55E00", markersize=4, label="data")
ax.set_xlabel("input u (in units of its own)")
ax.set_ylabel("target y (in units of its own)")
ax.legend(frameon=False, fontsize="small", ncols=2)

print("   u   mean  truth  sd of noise  sd of weights")
for index in (0, 35, 70, 105, 140):
    truth = math.sin(2 * float(at[index]))
    print(
        f"{at[index]:4.1f}  {mean[index]:5.2f}  {truth:5.2f}  {noise[index]:11.2f}  "
        f"{weights[index]:13.2f}"
    )

# %%
# Between the clusters the weights' share grows, as it should. Beyond them it does not: at both ends
# the mean is off by many of its standard deviations. Latent weights under a mean-field guide do not
# warn of every question that the data cannot answer.
#
# Where the answer is known
# -------------------------
# Without a hidden layer the posterior of the weights is a normal, and so is that of the slope.

with forked_rng(2):
    v = torch.randn(8, 1) + 2.0
    line = torch.cat([v, 0.5 * v + 0.3 * torch.randn(8, 1)], dim=1)
    straight, free = pairs.bayesian_neural_network(hidden=(), noise=0.3, num_data=8)
for lr, steps in ((3e-2, 400), (3e-3, 200)):
    ppvae.fit(
        straight, free, line, steps=50 if QUICK else steps, batch_size=8, lr=lr, progress=False
    )
with torch.no_grad():
    exact, found = straight.weight_posterior(line), free.distribution()
    best = torch.diagonal(exact.precision_matrix) ** -0.5
    evidence = straight.log_marginal(line)
print(f"sd of the slope: {exact.stddev[0]:.3f} exactly, {found.stddev[0]:.3f} by the guide")
print(f"of the best mean-field guide, in closed form: {best[0]:.3f}")
gap = 0.5 * (2 * torch.log(best**-1).sum() - torch.logdet(exact.precision_matrix))
print(f"its ELBO, in closed form: {evidence - gap:.2f} nats")
loss = TraceMeanField_ELBO(2000, vectorize_particles=True, max_plate_nesting=1)
with forked_rng(5), torch.no_grad(), private_store():
    elbo = -loss.loss(straight, free, line)
print(f"log p(y | u) of all rows {evidence:.2f}, ELBO of the guide {elbo:.2f} nats")

# %%
# The slope and the intercept hang together, which independent ones cannot say: the guide is too
# sure of each. That gap is one of approximation. Of amortization there is none, and `compare` says
# so:

try:
    ppvae.compare(model, guide, x)
except ValueError as error:
    print(error)

# %%
# Latent inputs
# -------------
# Now each row is on one of two branches, and which one was not recorded. No function of u has two
# values; a function of u and z has.

with forked_rng(2):
    u = 4 * torch.rand(300, 1) - 2
    side = torch.where(torch.rand(300, 1) < 0.5, -1.0, 1.0)
    y = side * (1 + 0.5 * torch.sin(2 * u)) + 0.1 * torch.randn(300, 1)
    rows = torch.cat([u, y], dim=1)
with forked_rng(3):
    latent, encoder = pairs.latent_input_network(hidden=(20,))
for lr, steps in ((1e-2, 1000), (2e-3, 300)):
    fit = ppvae.fit(
        latent, encoder, rows, steps=50 if QUICK else steps, batch_size=100, lr=lr, progress=False
    )
print(f"standard deviation of the noise: {float(latent.noise.detach()):.3f}, where it was 0.1")

with forked_rng(4), torch.no_grad(), private_store():
    z = torch.randn(300, 1)
    drawn = latent.network(latent.weights, torch.cat([u, z], dim=1))
    drawn = drawn + latent.noise * torch.randn(300, 1)
figure, ax = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
ax.plot(u, y, "o", markersize=4, markerfacecolor="none", color="0.6", label="data")
ax.plot(u, drawn, ".", markersize=4, color="black", label="draws for the same inputs")
ax.set_xlabel("input u (in units of its own)")
ax.set_ylabel("target y (in units of its own)")
ax.legend(frameon=False, fontsize="small", ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))

# %%
# The network's weights are parameters here; those of a `BayesianNeuralNetwork` are held by
# ``model.at(weights)``. What is latent is local, and the gap can be taken apart:

comparison = ppvae.compare(latent, encoder, rows[: 10 if QUICK else 40], num_samples=300)
print(comparison)

# %%
# The prior of z is cut in two by the branches, so that p(z | u, y) is half of a normal: a normal
# guide misses it by the approximation gap. The encoder adds its own share, which a better trained
# one could win back.
