r"""What does a repair cost?
========================

An amortized guide falls short of the best that its family can do for each datum. There are several
ways to mend that, and they differ in what they bring and in when they are paid for: a few steps of
refinement cost something for every datum, further training costs once, a richer family closes a
gap that no encoder closes. `repair_costs` measures all of them on the same data, in nats
recovered a datum and in seconds.

What an encoder costs is an old question with an answer in seconds, too: it has to be trained before
it is of any use, and then each further datum costs next to nothing. From some number of data on
that pays, and this number can be measured.
"""

import os

import numpy as np

import ppvae
from ppvae import data, pairs, plots
from ppvae.isolation import forked_rng

QUICK = bool(os.environ.get("PPVAE_QUICK"))

# %%
# A guide that is to be mended
# ----------------------------
# A VAE with eight latent dimensions on binary digits, and the decomposition of its inference gap
# on test images.

digits = data.load("digits")
with forked_rng(0):
    model, guide = pairs.vae(x_dim=digits.x_dim, z_dim=8, hidden=[100])
fit = ppvae.fit(
    model, guide, digits.train, steps=50 if QUICK else 1200, lr=2e-3, seed=0, progress=False
)
print(fit)

comparison = ppvae.compare(model, guide, digits.test[: 8 if QUICK else 60])
print(comparison)

# %%
# The price list
# --------------
# Each repair is carried out on all of these images and on a quarter of them. From the two times
# follow the seconds that it takes once and those that each datum adds.

costs = ppvae.repair_costs(comparison, digits.train, fit=fit, steps=10 if QUICK else 400)
print(costs)

# %%
# What lies further up brings more, what lies further left is cheaper. The lower of the two dashed
# lines is what amortization has lost; refinement and q* can bring back that much and no more. Above
# it is what the family has lost: only a richer family gets there, or resampling, which gives better
# draws but no better q.

plots.repair_costs(costs)

# %%
# For a million data the order by price is another one. What is paid once is now all but free, and
# what is paid for each datum has moved to the right.

plots.repair_costs(costs, num_data=1_000_000)

# %%
# When does amortization pay?
# ---------------------------
# Amortized: train the model and the guide, then encode each datum, and if that is not good enough
# take four steps of refinement from there. The other way: fit q* to each datum from a cold start.
# The comparison is a hard one for the encoder, as the second way gets the trained model for
# nothing.

attrs, refined, cold = costs.dataset.attrs, "4 refinement steps", "q* cold"
price = costs.dataset[["seconds_fixed", "seconds_per_row"]].to_dataframe()


def seconds(repair: str, count: np.ndarray) -> np.ndarray:
    """Seconds for so many data, without any training."""
    return price["seconds_fixed"][repair] + count * price["seconds_per_row"][repair]


ax = plots.break_even(costs)
count = np.geomspace(*ax.get_xlim(), 200)
ax.plot(
    count,
    attrs["seconds_training"] + seconds(refined, count),
    color="black",
    linestyle="-.",
    label="training, then 4 steps of refinement",
)
ax.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1))

# %%
# Below the break-even the encoder is not worth its training; far above it the price of amortization
# is that of the training alone. Refinement makes a datum dearer than encoding does, and stays far
# below the cold fit: the encoder's answer is a good place to start.

for name in (cold, refined):
    print(f"{name:<20} {1000 * price['seconds_per_row'][name]:8.3f} ms for each further datum")
print(f"{'encoding':<20} {1000 * attrs['seconds_encoding_per_row']:8.3f} ms")

# %%
# Which rows need it?
# -------------------
# Refinement does not have to be for all. One evaluation of the gradient at the encoder's output
# predicts how much each datum has to gain; `refine` takes the worst first, and leaves those alone
# that promise less than the tolerance. Here is what was predicted, against the gap that `compare`
# measured.

refinement = ppvae.refine(model, guide, comparison.x, tolerance=0.3)
print(refinement)
plots.refinement(refinement, comparison.dataset["amortization_gap"].values)
