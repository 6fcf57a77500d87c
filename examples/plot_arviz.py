r"""Results in ArviZ
================

`ppvae.to_datatree` hands what a pair says to `ArviZ <https://python.arviz.org>`_: draws,
densities and data, in ArviZ's groups and under names of the reader's own. Here a factor model of
13 measurements on wines, trained on one cultivar and then shown the two others. What the model
says of them is exact here, as its posterior is known; what the guide says is another matter.
"""

import os
import tempfile
from pathlib import Path

import arviz_plots
import arviz_stats
import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray
from sklearn.datasets import load_wine

import ppvae
from ppvae import pairs
from ppvae.isolation import forked_rng

STEPS = 300 if os.environ.get("PPVAE_QUICK") else 2000

wine = load_wine()
measured = torch.tensor(wine.data, dtype=torch.float32)
measured = (measured - measured.mean(0)) / measured.std(0)
cultivar = torch.tensor(wine.target)
known = measured[cultivar == 1]

with forked_rng(0):
    model, guide = pairs.factor_analysis(x_dim=13, z_dim=2, hidden=[32])
fit = ppvae.fit(model, guide, known, steps=STEPS, batch_size=65, lr=1e-2, progress=False)
print(fit)

# %%
# Two wines of each cultivar
# --------------------------
# The comparison fits the best member of the guide's family to each wine.

rows = [0, 1, 60, 61, 130, 131]
names = [f"cultivar {int(cultivar[row])}, no. {row}" for row in rows]
comparison = ppvae.compare(model, guide, measured[rows], fit=fit)
print(comparison)

# %%
# The tree
# --------
# A comparison becomes a tree with a part for each guide, and the ledger beside them. Each part is
# what ArviZ expects of a fit. ``dims`` names the dimensions of an event, ``coords`` what stands
# along them; the model's plate, here ``"data"``, is a dimension too.

tree = ppvae.to_datatree(
    comparison,
    num_samples=1000,
    dims={"z": ["factor"], "x": ["measurement"]},
    coords={"factor": ["first", "second"], "measurement": wine.feature_names, "data": names},
)
print(list(tree.children))
print(tree["amortized"]["posterior"])

# %%
# Posteriors side by side
# -----------------------
# ArviZ's forest plot, with the guide's intervals beside those of the per-datapoint optimum.
# The two differ most for cultivar 0, which the encoder has never seen.

guides = {name: tree[name] for name in ("amortized", "per_datapoint")}
collection = arviz_plots.plot_forest(guides, sample_dims="sample", backend="matplotlib")
collection.add_legend("model")
plt.show()

# %%
# Numbers go the same way. These are ArviZ's summaries of the first factor, and the gaps of the
# ledger for the same wines.

for name, part in guides.items():
    print(name)
    first = {"factor": "first"}
    print(arviz_stats.summary(part, coords=first, sample_dims="sample", kind="stats"))
print(tree["comparison"]["amortization_gap"].to_series().round(3).to_string())

# %%
# Importance weights, row by row
# ------------------------------
# ``sample_stats`` has log p(x, z), log q(z | x) and their difference, the log weight, of each draw,
# and Pareto k-hat of each row: how far draws of this guide can be reweighted to the posterior.
# ArviZ smooths the weights; the mean under them is the posterior mean, which is known here.

stats = tree["amortized"]["sample_stats"]
log_weights, k = (-stats["log_weight"]).azstats.psislw(dim="sample")
first = tree["amortized"]["posterior"]["z"].sel(factor="first", drop=True)
exact = model.posterior(measured[rows]).mean[:, 0].detach()
table = xarray.Dataset(
    {
        "k_hat": k,
        "guide": first.mean("sample"),
        "reweighted": (np.exp(log_weights) * first).sum("sample"),
        "exact": ("data", exact.numpy()),
    }
)
print(table.to_dataframe().round(2))

# %%
# ArviZ's checks of the model
# ---------------------------
# Some of ArviZ's functions want draws in ``chain`` and ``draw``; so can the tree have them. A model
# of one cultivar, shown all wines: each line is a set of measurements that it draws for these
# wines, by the guide's posteriors.

predictive = ppvae.to_datatree(
    model,
    guide,
    measured,
    num_samples=100,
    groups=["posterior_predictive", "observed_data"],
    dims={"x": ["measurement"]},
    coords={"measurement": wine.feature_names},
    sample_dims=("chain", "draw"),
)
arviz_plots.plot_ppc_dist(predictive, num_samples=30, backend="matplotlib")
plt.show()

# %%
# ``arviz_stats.loo`` works on such a tree. What it estimates for a pair of this kind is log p(x_n)
# itself: the model is fixed, so that without x_n its latent goes back to the prior. The docs page
# on ArviZ says when to trust that, and `ppvae.log_evidence` gives the same figure with less noise.

# %%
# Large ones go to a file
# -----------------------
# With ``path`` the draws are written as they are made, to netCDF or Zarr, and read back as they are
# asked for. Neither 10,000 rows nor 1,000 draws of each have to fit into memory together.

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "wines.nc"
    with ppvae.to_datatree(model, guide, measured, num_samples=200, path=path) as stored:
        print(stored["posterior_predictive"]["x"].sizes, f"{path.stat().st_size / 1e6:.1f} MB")
        print(stored["posterior"]["z"][:, 42].mean("sample").values)
