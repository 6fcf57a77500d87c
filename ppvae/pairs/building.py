"""What the constructors of pairs share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pyro import poutine
from torch import nn

from ppvae.baselines import Baseline
from ppvae.density import judging, read_model
from ppvae.families import Family, in_order
from ppvae.guides import Amortized
from ppvae.likelihoods import Bernoulli, Gaussian, Likelihood


def amortized(
    model: nn.Module,
    family: Family | Mapping[str, Family],
    encoder: nn.Module,
    baseline: Baseline | None = None,
) -> Amortized:
    """A guide with this encoder, once its families are known to fit the model's latent sites.

    Raises:
        ValueError: If a family's support or shape is not its site's, or a site has no family.
    """
    drawn = torch.zeros(0)
    with judging(0, drawn, model), torch.no_grad():
        sites = read_model(model, poutine.block(model)(size=2)).latents
    if isinstance(family, Family):
        family = dict.fromkeys(sites, family)
    if set(family) != set(sites):
        raise ValueError(
            f"family: expected a family for each of the latent sites {list(sites)}; got "
            f"{list(family)}."
        )
    family = in_order(family, family)
    for name, each in family.items():
        each.check_site(sites[name])
    return Amortized(family, encoder, baseline=baseline)


def likelihood_of(given: str | Likelihood) -> Likelihood:
    """A likelihood, or one of the two that have a name.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(given, Likelihood):
        return given
    if given == "bernoulli":
        return Bernoulli()
    if given == "gaussian":
        return Gaussian.learned()
    raise ValueError(
        f"likelihood: expected 'bernoulli', 'gaussian' or a Likelihood; got {given!r}."
    )
