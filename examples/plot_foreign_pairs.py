r"""A pair of your own
==================

``compare`` takes any Pyro model and guide with a plate over the rows. Here the model has two latent
variables per datum, and the guides are written in four ways. None of them knows of ppvae.

A datum is a shop: how many people came on each of five days, and how many of them bought. Behind it
lie a rate of visitors and the share of them who buy,

.. math::
    \mathrm{rate} \sim \mathrm{Gamma}(2, 0.2), \quad \mathrm{share} \sim \mathrm{Beta}(2, 2), \quad
    \mathrm{came}_d \sim \mathrm{Poisson}(\mathrm{rate}), \quad
    \mathrm{bought}_d \sim \mathrm{Binomial}(\mathrm{came}_d, \mathrm{share}).

The posterior is again a gamma times a beta, so that we know what to expect.
"""

import os

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import ppvae
from ppvae import plots
from ppvae.families import DistributionFamily, Gamma

QUICK = bool(os.environ.get("PPVAE_QUICK"))
STEPS = 30 if QUICK else 400
pyro.set_rng_seed(0)
pyro.clear_param_store()


def model(x):
    """Visitors and buyers of some shops, a row each."""
    came, bought = x.chunk(2, dim=-1)
    with pyro.plate("shops", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.2))
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        pyro.sample(
            "came", dist.Poisson(rate[..., None].expand(*rate.shape, 5)).to_event(1), obs=came
        )
        pyro.sample("bought", dist.Binomial(came, share[..., None]).to_event(1), obs=bought)


def draw(count):
    """Shops from the model."""
    rate, share = dist.Gamma(2.0, 0.2).sample((count, 1)), dist.Beta(2.0, 2.0).sample((count, 1))
    came = torch.poisson(rate.expand(count, 5))
    return torch.cat([came, dist.Binomial(came, share).sample()], dim=-1)


train, test = draw(2000), draw(4 if QUICK else 16)


def learn(guide, x):
    """Pyro's own training; the model has nothing to learn."""
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(STEPS):
        svi.step(x[torch.randperm(len(x))[:64]] if len(x) > 64 else x)


# %%
# A guide written by hand
# -----------------------
# A network reads a gamma and a beta off each shop. To free it, ``compare`` looks at what each site
# is drawn from and gives every shop four parameters of its own.


def network(outputs):
    """From the counts of a shop to some numbers."""
    return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, outputs))


by_hand_net = network(4)


def by_hand(x):
    """A gamma and a beta for each shop."""
    pyro.module("by_hand", by_hand_net)
    a, b, c, d = by_hand_net(x.log1p()).exp().unbind(dim=-1)
    with pyro.plate("shops", len(x)):
        pyro.sample("rate", dist.Gamma(a, b))
        pyro.sample("share", dist.Beta(c, d))


learn(by_hand, train)
comparisons = {"by hand": ppvae.compare(model, by_hand, test)}
print(comparisons["by hand"])

# %%
# The approximation gap is zero, as it has to be: the family holds the posterior. All that is lost
# is lost by the network.
#
# Pyro's autoguides
# -----------------
# `AutoNormal` keeps a normal for each row, behind a map onto the site's support: a log-normal rate
# and a logit-normal share. It describes only the rows that it was made for, so it is trained on the
# test shops themselves. What is left of its amortization gap is training.

auto = AutoNormal(model)
learn(auto, test)
comparisons["AutoNormal"] = ppvae.compare(model, auto, test)
print(comparisons["AutoNormal"].dataset.attrs["family"])

# %%
# With `EasyGuide` the same family gets its parameters from a network.


class Easy(EasyGuide):
    """Normals for both sites, from a network."""

    def guide(self, x):
        """One draw, which EasyGuide cuts into the sites."""
        both = self.group(".*")
        loc, log_scale = self.net(x.log1p()).chunk(2, dim=-1)
        with self.plate("shops", len(x)):
            both.sample("both", dist.Normal(loc, log_scale.exp()).to_event(1))


easy = Easy(model)
easy.net = network(4)
learn(easy, train)
comparisons["EasyGuide"] = ppvae.compare(model, easy, test)

# %%
# A guide that cannot be freed
# ----------------------------
# Here the share's distribution depends on the rate that was drawn. No shop has *the* parameters of
# its share, so there is nothing to free, and ``compare`` says which site is in the way.

rate_net, share_net = network(2), nn.Linear(11, 2)


def chained(x):
    """A gamma, and a beta that looks at what was drawn from it."""
    pyro.module("rate_net", rate_net)
    pyro.module("share_net", share_net)
    a, b = rate_net(x.log1p()).exp().unbind(dim=-1)
    with pyro.plate("shops", len(x)):
        rate = pyro.sample("rate", dist.Gamma(a, b))
        seen = x.log1p().expand(*rate.shape, 10)
        c, d = share_net(torch.cat([seen, rate.log()[..., None]], dim=-1)).exp().unbind(dim=-1)
        pyro.sample("share", dist.Beta(c, d))


learn(chained, train)
try:
    ppvae.compare(model, chained, test)
except ValueError as error:
    print(error)

# %%
# The way out is to name what to measure against. Any class of distributions with reparameterised
# draws makes a family.

against = {
    "rate": Gamma(),
    "share": DistributionFamily(dist.Beta, {"concentration1": (), "concentration0": ()}),
}
comparisons["chained"] = ppvae.compare(model, chained, test, family=against)

# %%
# All four
# --------
# The two guides made of normals cannot reach the posterior, but what they miss is small: here the
# networks lose more than the family does.

for name, each in comparisons.items():
    for gap in ("approximation_gap", "amortization_gap"):
        value, stderr = each.mean(gap)
        print(f"{name:<12} {gap:<18} {round(value, 3) + 0.0:6.3f} ± {stderr:.3f}")

plots.gap_bars(comparisons)
