r"""What KL annealing and free bits do to the latents
==================================================

A model with two layers of latents on the 8x8 digits,

.. math:: z_2 \sim N(0, I_4), \qquad z_1 \mid z_2 \sim N(f_1(z_2), \mathrm{diag}(\sigma^2)), \qquad
          x_d \mid z_1 \sim \mathrm{Bernoulli}(f_0(z_1)_d),

with eight latents in the lower layer. It is the usual place to meet *posterior collapse*: the
lower layer can do without the upper one, and then :math:`q(z_2 \mid x)` is the prior, whatever x.
Five objectives train the same pair, and two figures say what becomes of each latent: whether the
posterior's mean changes with the datum (`ppvae.diagnostics.active_units`), and the KL from the
prior (`ppvae.diagnostics.element_kl`).
"""

import os

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import SVI

import ppvae
from ppvae import data, diagnostics, pairs, plots
from ppvae.isolation import forked_rng
from ppvae.objectives import BetaELBO, Cyclical, FreeBitsELBO, Linear

QUICK = bool(os.environ.get("PPVAE_QUICK"))
STEPS = 40 if QUICK else 250

# %%
# The objectives
# --------------
# With J the objective that is maximised, :math:`\beta` the weight of the KL term:
#
# - *ELBO*: :math:`\beta = 1`;
# - *warm-up*: β rises from 0 to 1 over the first half of the steps (Bowman et al. 2016, Sønderby et
#   al. 2016);
# - *cyclical*: four times from 0 to 1 (Fu et al. 2019);
# - *free bits*: each latent has a tenth of a nat for nothing (Kingma et al. 2016);
# - :math:`\beta = 4` (Higgins et al. 2017).


def objectives():
    """New objectives, whose schedules begin at step 0."""
    return {
        "ELBO": BetaELBO(),
        "warm-up": BetaELBO(Linear(STEPS // 2)),
        "cyclical": BetaELBO(Cyclical(STEPS)),
        "free bits": FreeBitsELBO(0.1),
        "β = 4": BetaELBO(4.0),
    }


# %%
# Training, by Pyro's own `SVI`
# -----------------------------
# Every run starts from the same parameters and sees the same minibatches. What is recorded is for
# the test digits.

digits = data.load("digits")
test = digits.test[: 60 if QUICK else None]


def train(objective, seed=0):
    """A trained pair, and the record of its latents over training."""
    with forked_rng(seed):
        model, guide = pairs.deep_latent_gaussian(64, z_dims=(8, 4), hidden=[50])
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-3}), objective)
        steps, units, kl = [], [], []
        for step in range(STEPS + 1):
            if step % (STEPS // (4 if QUICK else 5)) == 0:
                steps.append(step)
                # With few draws the noise of a collapsed unit's mean comes near the threshold.
                units.append(diagnostics.active_units(model, guide, test, num_samples=100))
                kl.append(diagnostics.element_kl(model, guide, test, num_samples=10))
            svi.step(digits.train[torch.randint(len(digits.train), (128,))])
    return {"model": model, "guide": guide, "steps": steps, "units": units, "kl": kl}


runs = {name: train(objective) for name, objective in objectives().items()}

# %%
# The KL of each latent
# ---------------------
# A line for each latent element.

figure, axes = plt.subplots(1, 5, figsize=(12, 3.2), layout="constrained", sharey=True)
for ax, (name, run) in zip(axes, runs.items(), strict=True):
    plots.element_kl(run["kl"], run["steps"], ax=ax)
    ax.set_title(name)
    ax.label_outer()
    if name != "ELBO":
        ax.get_legend().remove()

# %%
# Active units, and the weight of the KL term
# -------------------------------------------

figure, axes = plt.subplots(
    2, 1, figsize=(6.5, 5), layout="constrained", sharex=True, height_ratios=[2, 1]
)
styles = ["-", "--", "-.", ":", (0, (6, 1, 1, 1))]
colors = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7"]
for (name, objective), style, color in zip(objectives().items(), styles, colors, strict=True):
    run, look = runs[name], {"linestyle": style, "color": color, "label": name}
    axes[0].plot(run["steps"], [u.count for u in run["units"]], **look)
    if isinstance(objective, BetaELBO):
        beta = objective.schedule
        weights = [beta(t) if callable(beta) else beta for t in range(STEPS)]
        axes[1].plot(range(STEPS), weights, **look)
axes[0].set_ylabel("active units of 12")
axes[1].set_ylabel("β")
axes[1].set_xlabel("step")
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)
axes[0].legend(
    frameon=False, fontsize="small", ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1)
)

# %%
# What it costs
# -------------
# The trained pairs on the test digits, in nats per datum, with Monte Carlo errors. The ELBO and the
# importance-weighted bound are those of the model: no β, no free bits. In brackets stands how many
# of the upper layer were active at most while training.


def row(run):
    """The figures of a trained pair."""
    model, guide = run["model"], run["guide"]
    units, kl = run["units"][-1], run["kl"][-1]
    upper = torch.tensor([name.startswith("z_2") for name in units.names])
    return {
        "elbo": ppvae.elbo(model, guide, test, 50 if QUICK else 200),
        "iwae": ppvae.iwae(model, guide, test, 50 if QUICK else 200),
        "lower": int(units.active[~upper].sum()),
        "upper": int(units.active[upper].sum()),
        "most": max(int(u.active[upper].sum()) for u in run["units"]),
        "kl": kl.total,
        "kl_stderr": kl.total_stderr,
        "kl_upper": float(kl.kl[upper].sum()),
    }


table = {name: row(run) for name, run in runs.items()}
print(f"{'':10}{'ELBO':>17}{'IWAE, 200 draws':>18}  active z_1  z_2 (most){'KL':>16}  of it z_2")
for name, r in table.items():
    print(
        f"{name:10}{r['elbo'].mean:9.3f} ± {r['elbo'].mean_stderr:.3f}"
        f"{r['iwae'].mean:10.3f} ± {r['iwae'].mean_stderr:.3f}"
        f"{r['lower']:12}{r['upper']:5} ({r['most']})   "
        f"{r['kl']:8.3f} ± {r['kl_stderr']:.3f}{r['kl_upper']:11.3f}"
    )

# %%
# In this run the plain ELBO leaves the upper layer at its prior, and so does β = 4. Warm-up
# ends with one of its elements active; free bits hold all of it, at about the tenth of a nat that
# is free. That a latent is active does not yet mean that the model is better for it: the bounds in
# the table are those of one seed, and seeds differ by more than the Monte Carlo errors.
# :doc:`/annealing` has the figures of five, trained for longer, and what each objective is.
