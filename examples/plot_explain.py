r"""Where an amortization gap comes from
====================================

An encoder can fall short because it was not trained to the end, because its network is too small,
because it is not given what it needs, or because it has seen too few rows. The gap looks the same.
`ppvae.explain` mends one cause after the other, the model frozen, and measures what each brings.

The first case is the saw of Margossian & Blei (2023): a time series in which

.. math:: z_n \sim N(x_{n-1}, 1), \qquad x_n \mid z_n \sim N(a (z_n + \theta), 1),

so that the posterior of :math:`z_n` hangs on :math:`x_n` and on the value before it.
"""

import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import ppvae
from ppvae import data, pairs, plots
from ppvae.families import DiagonalNormal
from ppvae.guides import Amortized
from ppvae.isolation import forked_rng
from ppvae.nn import MLP

QUICK = bool(os.environ.get("PPVAE_QUICK"))
A, THETA = 0.75, 3.4159

# %%
# The saw
# -------
# Rows are pairs :math:`(x_{n-1}, x_n)`. One encoder is given both, the other only :math:`x_n`.


def series(count, seed):
    """Rows of a series that begins at zero, by the authors' rule."""
    with forked_rng(seed):
        x = [torch.zeros(())]
        for noise in torch.randn(count):
            x.append(noise + A * (THETA + x[-1]))
    x = torch.stack(x)
    return torch.stack([x[:-1], x[1:]], dim=-1)


def saw(rows):
    """The model: z_n hangs on the value before, x_n on z_n."""
    with pyro.plate("data", len(rows), dim=-1):
        z = pyro.sample("z", dist.Normal(rows[:, 0], 1.0))
        pyro.sample("x", dist.Normal(A * (z + THETA), 1.0), obs=rows[:, 1])


class Columns(nn.Module):
    """An encoder that is given some columns of the rows."""

    def __init__(self, columns, width):
        super().__init__()
        self.columns = columns
        self.network = MLP(len(columns), [width], 2)

    def forward(self, rows):
        """λ from these columns alone."""
        return self.network(rows[:, self.columns])


train, test = series(300 if QUICK else 2000, 1), series(50 if QUICK else 300, 2)
steps = 30 if QUICK else 500
with forked_rng(0):
    blind = Amortized(DiagonalNormal(), Columns([1], 64))
    seeing = Amortized(DiagonalNormal(), Columns([0, 1], 8))
for guide in (blind, seeing):
    ppvae.fit(saw, guide, train, steps=steps, lr=5e-3, progress=False)
ledger = ppvae.compare(saw, {"x_n": blind, "both": seeing}, test)
print(ledger)

# %%
# Eight units that see both values beat sixty-four that see one. Width is no cure here, and
# `explain` says so: it widens the encoder on what it is given, and most of the gap remains.

saw_parts = ppvae.explain(ledger, train, guide="x_n", steps=steps)
print(saw_parts)

# %%
# Three encoders for one decoder
# ------------------------------
# A VAE of digits is trained and its decoder frozen. Then come a guide that was stopped early and a
# guide with a single hidden unit. All three are given the whole image, so that no input can be
# missing: what would be called so is what the repairs had not learned when their steps ended.

digits = data.load("digits")
with forked_rng(0):
    model, guide = pairs.vae(x_dim=digits.x_dim, z_dim=8, hidden=[100])
    family = DiagonalNormal(8)
    stopped = Amortized(family, MLP(64, [100], 16))
    narrow = Amortized(family, MLP(64, [1], 16))
ppvae.fit(model, guide, digits.train, steps=50 if QUICK else 1000, lr=2e-3, progress=False)
for parameter in model.parameters():
    parameter.requires_grad_(False)
ppvae.fit(model, stopped, digits.train, steps=20 if QUICK else 50, lr=1e-3, progress=False)
ppvae.fit(model, narrow, digits.train, steps=20 if QUICK else 600, lr=2e-3, progress=False)

several = ppvae.compare(
    model,
    {"as trained": guide, "stopped early": stopped, "one unit": narrow},
    digits.test[: 10 if QUICK else 60],
    evidence_samples=100,
)
parts = {
    name: ppvae.explain(several, digits.train, guide=name, steps=20 if QUICK else 250)
    for name in several.guides
}
for name, each in parts.items():
    print(f"--- {name}\n{each}\n")

# %%
# The same in pictures. Bars are the parts, with two standard errors over rows.

shown = {"saw, sees x_n": saw_parts, **parts}
figure, axes = plt.subplots(2, 2, figsize=(10.5, 5.2), layout="constrained")
for ax, (name, each) in zip(axes.flat, shown.items(), strict=True):
    plots.explanation(each, ax=ax)
    ax.set_title(name, fontsize="medium")
    ax.set_xlabel("nats per datum")
