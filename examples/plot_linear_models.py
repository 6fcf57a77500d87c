r"""Three roads to one optimum
===========================

In a linear model with normal noise nothing has to be estimated: evidence, posterior and the best
mean field have closed forms, and for probabilistic PCA the maximum of the likelihood has one too.
That makes it the place to see how far a method is from where it should end, in nats.

.. math:: z_n \sim N(0, I), \qquad x_n \mid z_n \sim N(W z_n + \mu, \Psi)

Three methods go there. **EM** climbs the exact evidence, **coordinate ascent** the exact ELBO of
the mean field, and **stochastic variational inference** follows a noisy gradient of that ELBO. The
first two need a model whose steps can be worked out by hand; the third needs a model that can be
run.
"""

import os
import time

import matplotlib.pyplot as plt
import torch
from pyro.infer import TraceMeanField_ELBO

import ppvae
from ppvae import classical, pairs
from ppvae.families import DiagonalNormal
from ppvae.isolation import forked_rng, private_store
from ppvae.models import PPCA, FactorAnalysis

STEPS = 10 if os.environ.get("PPVAE_QUICK") else 100

with forked_rng(0), private_store(), torch.no_grad():
    truth = FactorAnalysis(6, 2, noise=torch.linspace(0.4, 0.9, 6)).double()
    x = truth(size=200)

# %%
# Learning the model
# ------------------
# The largest evidence that probabilistic PCA with two dimensions can have on these rows, from the
# eigenvalues of their covariance (Tipping & Bishop 1999):

best = PPCA.maximum_likelihood(x, z_dim=2)
best_evidence = float(best.log_evidence(x).detach().mean())
print(f"closed form: {best_evidence:.6f} nats per datum")

# %%
# EM, and variational EM (coordinate ascent for q, then the same M-step), from one random start. The
# mean field costs nothing in the end: it rotates W until the posterior has no correlations.


def start():
    """The same random start for each method that learns the model."""
    with forked_rng(1):
        return PPCA(6, 2).double()


em = classical.em(start(), x, tolerance=1e-10)
variational = classical.coordinate_ascent(start(), x, learn_model=True, tolerance=1e-10)
print(em)
print(variational)

# %%
# SVI trains the ready-made pair, mean field and linear encoder, with a learning rate that is
# lowered in stages. Its own losses are noisy; the distance that is drawn below is exact,
# :math:`\log p(x) - \mathrm{KL}(q \,\|\, p(z \mid x))`.


def exact_elbo(model, guide):
    """The mean ELBO over rows, without a draw."""
    q = guide.family.distribution(guide.params(x)).base_dist
    full = torch.distributions.MultivariateNormal(q.loc, q.variance.diag_embed())
    divergence = torch.distributions.kl_divergence(full, model.posterior(x))
    return float((model.log_evidence(x) - divergence).detach().mean())


def svi(model, guide, stages):
    """Steps, seconds and exact ELBO after each part of the run."""
    loss = TraceMeanField_ELBO(8, vectorize_particles=True, max_plate_nesting=1)
    record = [(0, 0.0, exact_elbo(model, guide))]
    for part, lr in enumerate(stages):
        fit = ppvae.fit(
            model,
            guide,
            x,
            loss=loss,
            steps=STEPS,
            batch_size=len(x),
            lr=lr,
            seed=part,
            progress=False,
        )
        steps, seconds, _ = record[-1]
        record.append((steps + STEPS, seconds + fit.seconds, exact_elbo(model, guide)))
    return record


with forked_rng(1):
    model, guide = (part.double() for part in pairs.ppca(6, 2))
learned = svi(model, guide, [5e-2, 5e-2, 2e-2, 5e-3, 1e-3])
print(f"SVI: {learned[-1][2]:.6f} nats per datum after {learned[-1][0]} steps")

# %%
# The posterior in a fixed model
# ------------------------------
# Now the model is held, with three factors, and only q is sought. The best mean field has the exact
# mean and variances :math:`1 / \Lambda_{dd}`, with :math:`\Lambda` the posterior's precision; it
# falls short of the evidence by
# :math:`\tfrac12 (\sum_d \log \Lambda_{dd} - \log |\Lambda|)`.

with forked_rng(2):
    fixed, encoder = (part.double() for part in pairs.factor_analysis(6, 3, DiagonalNormal(3)))
fixed.requires_grad_(False)
precision = fixed.posterior(x).precision_matrix[0]
gap = 0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))
best_elbo = float(fixed.log_evidence(x).mean()) - gap
began = time.perf_counter()
sweeps = classical.coordinate_ascent(fixed, x, tolerance=1e-12)
print(f"approximation gap of the mean field: {gap:.4f} nats")
print(f"closed form:       {best_elbo:.6f} nats per datum")
print(f"coordinate ascent: {float(sweeps.elbo[-1]):.6f} after {sweeps.steps} sweeps")
amortized = svi(fixed, encoder, [3e-2, 3e-2, 5e-3, 1e-3])
print(f"SVI:               {amortized[-1][2]:.6f} after {amortized[-1][0]} steps")

# %%
# Distance to the optimum
# -----------------------

figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
for ax, optimum, traces, record in (
    (axes[0], best_evidence, {"EM": em.log_evidence, "variational EM": variational.elbo}, learned),
    (axes[1], best_elbo, {"coordinate ascent": sweeps.elbo}, amortized),
):
    for (label, values), line in zip(traces.items(), ("-", "--"), strict=False):
        ax.plot(
            range(1, len(values)), (optimum - values[1:]).clamp(min=1e-9), line, c="k", label=label
        )
    steps, _, values = zip(*record[1:], strict=True)
    ax.plot(steps, [max(optimum - v, 1e-9) for v in values], "o:", c="0.5", label="SVI")
    ax.axhline(1e-4, c="0.8", lw=1)
    ax.set(xscale="log", yscale="log", xlabel="steps or sweeps", ylim=(1e-7, 20))
    ax.legend()
axes[0].set(ylabel="distance to the closed form (nats per datum)", title="model and posterior")
axes[1].set(title="posterior in a fixed model")

for name, seconds in (
    ("EM", em.seconds),
    ("variational EM", variational.seconds),
    ("SVI of the model", learned[-1][1]),
    ("coordinate ascent", sweeps.seconds),
    ("SVI in the fixed model", amortized[-1][1]),
):
    print(f"{name:<24}{seconds:8.2f} s")

# %%
# EM and coordinate ascent go on to the last digits, in steps whose number hangs on the model: few
# where the coordinates hardly depend on each other. SVI comes within a small part of a nat, at more
# cost by far, and what is left there shrinks with the learning rate. Where the steps can be worked
# out they are the better road. SVI asks for none of it, and takes the same code to models in which
# nothing is known; here one can see that it goes to the right place.
