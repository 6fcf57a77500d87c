r"""A faster step for the same pair
================================

A step of stochastic variational inference spends much of its time in Python: Pyro runs the guide
and the model, autograd goes back over what they did, and an optimizer visits each parameter.
None of that changes from step to step. `ppvae.SVI` has the interface of `pyro.infer.SVI`, writes
down the torch operations of a step once, and repeats those. The pair stays plain Pyro, and the
losses are the same numbers.
"""

import os
import time

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import Trace_ELBO

import ppvae
from ppvae import data, pairs
from ppvae.isolation import forked_rng

QUICK = bool(os.environ.get("PPVAE_QUICK"))
STEPS = 100 if QUICK else 1500

digits = data.load("digits")

# %%
# Two runs from the same seed
# ---------------------------
# Everything is the same in both but the class: the initial parameters, the minibatches, the draws.
# By default a graph is made once the steps to come are expected to pay for it. ``compile=True``
# compiles at the second step, and ``compile=False`` never.


def train(svi_class, steps=STEPS):
    """The losses of a run, in nats per datum, when each was known, and what ran the steps."""
    pyro.clear_param_store()
    with forked_rng(0):
        model, guide = pairs.vae(x_dim=64, z_dim=8, hidden=[100])
        optimizer = pyro.optim.Adam({"lr": 2e-3})
        svi = svi_class(model, guide, optimizer, Trace_ELBO())
        losses, seconds, began = [], [], time.perf_counter()
        for _ in range(steps):
            x = digits.train[torch.randint(len(digits.train), (64,))]
            losses.append(float(svi.step(x)) / len(x))
            seconds.append(time.perf_counter() - began)
    return torch.tensor(losses), torch.tensor(seconds), svi


train(pyro.infer.SVI, steps=1)  # The first step of a process loads code.
losses, seconds, svi = {}, {}, {}
for name, svi_class in (("pyro.infer.SVI", pyro.infer.SVI), ("ppvae.SVI", ppvae.SVI)):
    losses[name], seconds[name], svi[name] = train(svi_class)
pyro.clear_param_store()

apart = (losses["ppvae.SVI"] - losses["pyro.infer.SVI"]).abs().max()
print(f"largest difference of two losses: {float(apart):.1g} nats per datum")

# %%
# What ran, and why
# -----------------
# The first step of each signature, which is shapes and dtypes of the arguments, runs as Pyro runs
# it, with its validation. A graph is used once it has given the loss and the gradients of an eager
# step on the same draws. :doc:`/compiling` says what is noticed and what is not.

print(svi["ppvae.SVI"].compile_report())

# %%
# The same losses, sooner
# -----------------------

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
width = max(1, STEPS // 50)
kernel = torch.ones(1, 1, width) / width
for (name, values), look in zip(
    losses.items(),
    ({"color": "#D55E00"}, {"color": "#0072B2", "linestyle": (0, (4, 2))}),
    strict=True,
):
    mean = torch.conv1d(values[None, None], kernel)[0, 0]
    axes[0].plot(torch.arange(width, STEPS + 1), mean, label=name, **look)
    axes[1].plot(seconds[name][width - 1 :], mean, **look)
axes[0].set_xlabel("step")
axes[1].set_xlabel("seconds")
axes[0].set_ylabel(f"−ELBO, nats per datum, mean of {width} steps")
axes[0].legend(frameon=False, fontsize="small")
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)

# %%
# In `ppvae.fit` the same happens without a word; its record says what ran.

model, guide = pairs.vae(x_dim=64, z_dim=8, hidden=[100])
fit = ppvae.fit(model, guide, digits.train, steps=STEPS, progress=False)
print(fit.compile_report)
