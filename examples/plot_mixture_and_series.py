r"""A discrete latent, and a latent path
=====================================

Two models with exact answers that need more than a normal per datum: a mixture, whose latent is
one of three values, and a time series, whose latent is a path of states that hang on each other.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate

import ppvae
from ppvae import pairs
from ppvae.families import BlockNormal, DiagonalNormal, FullRankNormal
from ppvae.isolation import forked_rng, private_store
from ppvae.models import GaussianMixture, LinearStateSpace

# %%
# A mixture
# ---------
# Rows come from one of three components, and the guide is a network that says from which. A
# categorical draw has no derivative; with three values one can take the sum over all of them
# instead, which is what `TraceEnum_ELBO` does.

with forked_rng(0), private_store(), torch.no_grad():
    mixture = GaussianMixture(
        2,
        3,
        weights=torch.tensor([0.5, 0.3, 0.2]),
        loc=torch.tensor([[-1.5, 0.0], [1.5, 0.5], [0.0, 2.0]]),
        scale=torch.tensor([[1.0, 0.6], [0.7, 1.2], [0.9, 0.5]]),
    )
    x, x_test = mixture(size=500), mixture(size=500)
    _, guide = pairs.gaussian_mixture(2, 3)


def gap(rows):
    """KL(q ‖ p(z | x)) of each row: the inference gap, all of it amortization here."""
    log_q = guide.family.distribution(guide.params(rows)).logits.detach()
    return (log_q.exp() * (log_q - mixture.posterior(rows).logits)).sum(-1)


print(f"before training: inference gap {gap(x_test).mean():.4f} nats")
loss = TraceEnum_ELBO(max_plate_nesting=1)
for lr in (3e-2, 3e-3):
    ppvae.fit(
        mixture, config_enumerate(guide), x, loss=loss, steps=100, batch_size=250, lr=lr,
        progress=False,
    )  # fmt: skip
print(f"after it:        inference gap {gap(x_test).mean():.4f} nats")

# %%
# The gap is no more than what the encoder lacks. It is largest on the upper right, where two
# components meet and rows are few.

figure, ax = plt.subplots(figsize=(5.5, 4), layout="constrained")
points = ax.scatter(*x_test.T, c=gap(x_test).clamp(min=1e-6).log10(), cmap="Greys", ec="0.6", s=18)
figure.colorbar(points, label="log₁₀ of the inference gap (nats)")
ax.set(xlabel="x₁", ylabel="x₂", title="Where the encoder of the mixture falls short")

# %%
# A series
# --------
# Two states that turn into each other, seen through noise for six steps. The latent of a row is the
# path of all twelve numbers. Which of their correlations may q keep?

with forked_rng(1), private_store(), torch.no_grad():
    series = LinearStateSpace(
        6,
        2,
        2,
        initial_loc=torch.zeros(2),
        initial_tril=torch.eye(2),
        transition=torch.tensor([[0.9, 0.4], [-0.4, 0.9]]),
        transition_tril=torch.tensor([[0.4, 0.0], [0.0, 0.4]]),
        observation=torch.tensor([[1.0, 0.7], [0.0, 0.5]]),
        observation_tril=torch.tensor([[0.8, 0.0], [0.0, 0.8]]),
    )
    y = series(size=4)
    _, encoder = pairs.linear_state_space(6, 2, 2)

families = {
    "mean field": DiagonalNormal(12),
    "blocks per step": BlockNormal(12, [(t, t + 1) for t in range(0, 12, 2)]),
    "blocks per coordinate": BlockNormal(12, [range(0, 12, 2), range(1, 12, 2)]),
    "full rank": FullRankNormal(12),
}

# %%
# The posterior of the path is a normal with precision :math:`\Lambda`, and the best member with
# independent blocks b has a gap of
# :math:`\tfrac12 (\sum_b \log |\Lambda_{bb}| - \log |\Lambda|)`. `compare` does not know that
# formula: it fits each family to each series.

comparison = ppvae.compare(series, encoder, y, families=list(families.values())[1:])
precision = series.posterior(y).precision_matrix[0]
exact, measured = [], []
for name, family in families.items():
    blocks = precision * (family.block_labels[:, None] == family.block_labels)
    exact.append(0.5 * float(torch.logdet(blocks) - torch.logdet(precision)))
    column = comparison.dataset["approximation_gap"].sel(guide=f"per_datapoint {family!r}")
    measured.append(float(column.mean()))
    print(f"{name:<22} closed form {exact[-1]:.4f}   measured {measured[-1]:.4f} nats per series")

figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
place = np.arange(len(families))
ax.bar(place, exact, width=0.6, color="0.8", ec="k", label="closed form")
ax.plot(place, measured, "kx", ms=9, label="compare")
ax.set(xticks=place, xticklabels=families, ylabel="approximation gap (nats per series)")
ax.legend()

# %%
# Full rank is the exact smoother. Here what links the two coordinates within a step is worth
# little, and what links the steps of one coordinate is worth two thirds of the gap. With other
# matrices it may be the other way round.
