r"""A sigmoid belief network: gradients where draws have none
==========================================================

Binary latents cannot be reparameterised. An encoder for them is trained by the score function,
whose gradients are noisy, by the score function less a learned baseline, or, where there are few
latents, by a sum over all their values. Here all three train the same network on 8x8 digits:

.. math:: z_k \sim \mathrm{Bernoulli}(\sigma(b_k)), \qquad
          x \mid z \sim \mathrm{Bernoulli}(\sigma(W z + c)), \qquad k = 1, \dots, 8.
"""

import copy
import os

import matplotlib.pyplot as plt
import torch
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate

import ppvae
from ppvae import data, pairs, plots
from ppvae.guides import Amortized
from ppvae.isolation import forked_rng, private_store

QUICK = bool(os.environ.get("PPVAE_QUICK"))
digits = data.load("digits")
print(digits)

# %%
# Three ways to train
# -------------------
# All start at the same weights and meet the same minibatches. `config_enumerate` asks Pyro to sum
# over the 256 configurations of the eight latents.

with forked_rng(0):
    start = pairs.sigmoid_belief_network(64, [8], [100], baseline=[50])


def score_function():
    """Model, guide without a baseline, loss."""
    model, guide = copy.deepcopy(start)
    return model, Amortized(guide.families, guide.encoder), TraceGraph_ELBO()


def with_baseline():
    """Model, guide, loss."""
    return *copy.deepcopy(start), TraceGraph_ELBO()


def enumerated():
    """Model, guide, loss."""
    return *copy.deepcopy(start), TraceEnum_ELBO(max_plate_nesting=1)


def exact_elbo(model, guide, x):
    """In nats a datum, summed over all configurations."""
    with private_store(), torch.no_grad():
        loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, config_enumerate(guide), x)
    return -loss / len(x)


trained, fits = {}, {}
for name, make in {
    "score function": score_function,
    "with baseline": with_baseline,
    "exact sum": enumerated,
}.items():
    model, guide, loss = make()
    program = config_enumerate(guide) if name == "exact sum" else guide
    fits[name] = ppvae.fit(
        model,
        program,
        digits.train,
        loss=loss,
        steps=20 if QUICK else 300,
        batch_size=64,
        lr=1e-2,
        progress=False,
    )
    trained[name] = model, guide
    seconds = 1000 * fits[name].seconds / fits[name].steps
    print(
        f"{name:15s} ELBO {exact_elbo(model, guide, digits.test):7.2f} nats per test datum, "
        f"{seconds:5.1f} ms a step"
    )

plots.losses(fits, window=20)

# %%
# Without a baseline the encoder wanders. With one, training follows the exact sum at a distance of
# about one nat, at a cost that does not grow with the number of configurations.

# %%
# How noisy are the gradients?
# ----------------------------
# The encoder's gradient on one minibatch, drawn anew many times, at the start and at the end of
# the training with a baseline: with none, with the baseline's mean over the rows, and with the
# baseline itself. Subtracting one number for all rows does most of it, as the signal lies far below
# zero.


def gradient_variance(model, guide, x, draws):
    """Of the gradient per datum, in nats squared."""
    parameters = list(guide.encoder.parameters())
    gradients = []
    for _ in range(draws):
        for parameter in parameters:
            parameter.grad = None
        TraceGraph_ELBO().loss_and_grads(model, guide, x)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]) / len(x))
    return float(torch.stack(gradients).var(dim=0).sum())


x = digits.train[:64]
print("variance of the gradient, summed over the encoder's parameters (nats squared)")
with private_store(), forked_rng(1):
    for when, (model, guide) in {"start": start, "end": trained["with baseline"]}.items():
        flat = copy.deepcopy(guide.baseline)
        with torch.no_grad():
            flat.network = torch.nn.Linear(64, 1)
            flat.network.weight.zero_()
            flat.network.bias.fill_(guide.baseline.network(x).mean())
        variances = {
            name: gradient_variance(
                model,
                Amortized(guide.families, guide.encoder, baseline=baseline),
                x,
                5 if QUICK else 30,
            )
            for name, baseline in (("none", None), ("its mean", flat), ("b(x)", guide.baseline))
        }
        print(f"{when:6s}" + "".join(f"{name}: {v:8.2f}   " for name, v in variances.items()))

# %%
# What the units draw
# -------------------
# The weights of each latent, dark where the unit turns pixels on.

model, guide = trained["with baseline"]
weights = model.layers[0].weight.detach().T.reshape(-1, 8, 8)
limit = float(weights.abs().max())
figure, axes = plt.subplots(1, 8, figsize=(9, 1.9), layout="constrained")
for number, (ax, weight) in enumerate(zip(axes, weights, strict=True)):
    image = ax.imshow(weight, cmap="gray_r", vmin=-limit, vmax=limit)
    ax.set_title(f"unit {number + 1}", fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
figure.colorbar(image, ax=axes, label="weight (logit)")

# %%
# The gap of the encoder
# ----------------------
# `compare` sums over all configurations for log p(x), and fits the best mean field to each row by
# coordinate ascent.
# What is left to the encoder, the amortization gap, is the larger part here: binary units that are
# independent given x describe these posteriors to about a tenth of a nat.

comparison = ppvae.compare(model, guide, digits.test[: 10 if QUICK else 60])
print(comparison)

figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", width_ratios=[1, 1.6])
plots.gap_bars(comparison, ax=axes[0])
plots.gap_sorted(comparison, ax=axes[1])
