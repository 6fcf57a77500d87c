r"""Ten labels a class
==================

Labels are dear, images are not: of 1,500 digits, 100 have a label. Model M2 of Kingma, Rezende,
Mohamed & Welling (2014) takes the class y as a latent variable that is observed in some rows,

.. math:: y \sim \mathrm{Categorical}(1/10, \dots), \qquad z \sim N(0, I), \qquad
          x_d \mid y, z \sim \mathrm{Bernoulli}(\mathrm{NN}_\theta(y, z)_d),

and its guide q(y | x) q(z | x, y) holds a classifier. Does it learn from the 1,400 images without
labels? What is left for z to say, once y has said which digit it is?
"""

import math
import os
import statistics

import matplotlib.pyplot as plt
import torch

import ppvae
from ppvae import data, pairs
from ppvae.isolation import forked_rng
from ppvae.nn import MLP
from ppvae.objectives import SemisupervisedELBO

QUICK = bool(os.environ.get("PPVAE_QUICK"))
SEEDS = 1 if QUICK else 3
HIDDEN = [100]
FIRST_STEPS, STEPS = (20, 20) if QUICK else (100, 200)

digits = data.load("digits")
# sphinx_gallery_thumbnail_number = 2

# %%
# Rows with and without labels
# ----------------------------
# A row holds the pixels and, in its last column, the label, or −1 where it is missing.


def some_labels(seed, per_class=10):
    """Labels of ten training images of each class, −1 for the others."""
    order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(seed))
    ranked = digits.train_labels[order]
    kept = torch.cat([order[ranked == k][:per_class] for k in range(10)])
    labels = torch.full_like(digits.train_labels, -1)
    labels[kept] = digits.train_labels[kept]
    return labels


with forked_rng(0):
    model, guide = pairs.semisupervised_vae(digits.x_dim, 8, 10, HIDDEN)
x = model.rows(digits.train, some_labels(0))
print(f"{tuple(x.shape)}, of which {int((x[:, -1] >= 0).sum())} rows have a label")

# %%
# Training
# --------
# In a row with a label the ELBO is a bound on log p(x, y), in one without on log p(x), the sum over
# the ten classes being exact. Neither trains the classifier on a label, so that the objective has
# a term α log q(y | x) beside the ELBO. Here α = 1.5 is what the paper takes, a tenth of the number
# of rows over the number of labels.
#
# Training starts from the labelled rows alone. With all rows from the start the classes may first
# become clusters of their own making, which a hundred labels can hardly put right.


def accuracy(classes):
    """Share of the test images that are classed rightly."""
    return float((classes == digits.test_labels).double().mean())


def semisupervised(seed):
    """Train M2 on all rows; the pair and its test accuracy."""
    with forked_rng(seed):
        model, guide = pairs.semisupervised_vae(digits.x_dim, 8, 10, HIDDEN)
    x = model.rows(digits.train, some_labels(seed))
    for rows, alpha, steps in ((x[x[:, -1] >= 0], 10.0, FIRST_STEPS), (x, 1.5, STEPS)):
        loss = SemisupervisedELBO(alpha=alpha)
        ppvae.fit(
            *(model, guide, rows), loss=loss, steps=steps, batch_size=100, lr=5e-3, progress=False
        )
    return model, guide, accuracy(ppvae.classify(guide, model.rows(digits.test)).argmax(dim=1))


def supervised(seed, steps=300):
    """Train the guide's classifier network on the labelled rows alone; its test accuracy."""
    labels = some_labels(seed)
    known = labels >= 0
    with forked_rng(seed):
        net = MLP(digits.x_dim, HIDDEN, 10)
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(steps):
        adam.zero_grad()
        logits = net(digits.train[known])
        torch.nn.functional.cross_entropy(logits, labels[known]).backward()
        adam.step()
    with torch.no_grad():
        return accuracy(net(digits.test).argmax(dim=1))


# %%
# Each seed is a draw of the labels and of the initial weights.

alone = [supervised(seed) for seed in range(SEEDS)]
runs = [semisupervised(seed) for seed in range(SEEDS)]
reached = [accuracy for _, _, accuracy in runs]
for one, other in zip(alone, reached, strict=True):
    print(f"labels alone: {one:.1%}   M2: {other:.1%}")
gains = [other - one for one, other in zip(alone, reached, strict=True)]
if SEEDS > 1:
    error = statistics.stdev(gains) / math.sqrt(SEEDS)
    print(f"gain: {statistics.mean(gains):.1%} ± {error:.1%} over {SEEDS} seeds")

figure, ax = plt.subplots(figsize=(4, 3.4), layout="constrained")
for one, other in zip(alone, reached, strict=True):
    ax.plot([0, 1], [100 * one, 100 * other], color="0.3", marker="o", markersize=5)
ax.set_xticks([0, 1], ["labels alone", "M2, all rows"])
ax.set_xlim(-0.4, 1.4)
ax.set_xlabel("training data, a line for each draw of the labels")
ax.set_ylabel("test accuracy (%)")

# %%
# Beside the accuracy stands the ELBO on the test images, whose labels it does not see. It says how
# good a model of the images M2 is, which the accuracy does not.

model, guide, _ = runs[0]
test = model.rows(digits.test)
print(ppvae.elbo(model, guide, test, 100))

# %%
# Style and content
# -----------------
# The mean of z of a test image given its class, decoded with each of the ten classes. On the left
# the image itself; along a row z is the same and y goes from 0 to 9.

chosen = torch.cat([(digits.test_labels == k).nonzero()[:1, 0] for k in range(0, 10, 2)])
rows = model.rows(digits.test[chosen], digits.test_labels[chosen])
with torch.no_grad():
    lam = guide.by_site(guide.params(rows))["z"]
family = guide.families["z"]
style = family.base.distribution(family.by_class(lam)[:, 0]).mean
images = model.decode(torch.arange(10), style[:, None].expand(-1, 10, -1))

figure, axes = plt.subplots(len(chosen), 11, figsize=(7.7, 3.9), layout="constrained")
for line, image, decoded in zip(axes, digits.test[chosen], images, strict=True):
    for ax, pixels in zip(line, [image, *decoded], strict=True):
        ax.imshow(pixels.reshape(digits.event_shape), cmap="gray_r", vmin=0, vmax=1)
        ax.set_xticks([])
        ax.set_yticks([])
axes[0, 0].set_title("image", fontsize="medium")
for k, ax in enumerate(axes[0, 1:]):
    ax.set_title(f"y = {k}", fontsize="medium")

# %%
# How sure is the guide of the class?
# -----------------------------------
# `compare` frees the whole guide for some test images: the probabilities of the ten classes and a
# normal for each. What it finds is the amortization gap of classifier and encoder together.

comparison = ppvae.compare(
    model, guide, test[: 5 if QUICK else 10], num_samples=200, evidence_samples=500
)
print(comparison)
