"""Rows and latents drawn together from a model: data whose posterior has a known exact draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ppvae.density import (
    NoLikelihoodError,
    Program,
    distribution_name,
    judging,
    read_model,
    sample_sites,
    unobserved,
    without_trace,
)
from ppvae.isolation import check_rows, forked_rng, unvalidated


@dataclass(frozen=True)
class Simulated:
    """Rows that a model drew, with the latents that it drew them from.

    Given the rows, the latents are one exact draw from the posterior of each.

    Attributes:
        x: Rows, of the shape and type of those that the model was shown.
        latents: By site, ``(batch, *event)``.
    """

    x: Tensor
    latents: Mapping[str, Tensor]


def simulate(model: Program, x: Tensor, *, seed: int = 0) -> Simulated:
    r"""Draw rows from a model, together with their latents.

    .. math:: z_n \sim p(z), \qquad x_n \sim p(x \mid z_n)

    Args:
        model: A Pyro model with one local plate and one observed site, called as ``model(x)``.
        x: Rows that the likelihood allows: as many are drawn, and else their values do not matter.
        seed: Seed of the draws; the caller's generators are left as they were.

    Returns:
        The rows and their latents.

    Raises:
        ValueError: If the model observes several sites or something else than its rows, has a
            ``pyro.factor``, draws something else for other values of the rows, or the rows or the
            model are unfit.

    Example:
        >>> import torch
        >>> from ppvae.models import ExponentialGaussian
        >>> drawn = simulate(ExponentialGaussian(), torch.zeros(3))
        >>> drawn.x.shape, drawn.latents["z"].shape
        (torch.Size([3]), torch.Size([3]))
    """
    check_rows(x, model)
    with judging(seed, x, model), torch.no_grad():
        sites = read_model(model, x)
        trace = poutine.trace(model).get_trace(x)
        observed = {n: site for n, site in sample_sites(trace) if site["is_observed"]}
        factors = [n for n, site in observed.items() if distribution_name(site["fn"]) == "Unit"]
        if factors:
            raise ValueError(
                f"Site {factors[0]!r}: a model with a pyro.factor has a density but no way of "
                f"drawing from it. Write what it stands for as a distribution with obs=."
            )
        if len(observed) > 1:
            raise ValueError(
                f"model: expected one observed site, whose value is x; got {list(observed)}. Join "
                f"them into one event, or draw rows and latents yourself where they are asked for."
            )
        (name,) = observed
        drawn = _drawn(model, x, seed)
        value = drawn.nodes[name]["value"]
        seen = observed[name]["value"]
        if value.numel() != x.numel() or seen.shape != value.shape:
            raise ValueError(
                f"Site {name!r}: expected the model to observe its rows, {tuple(x.shape)}; it "
                f"observes {tuple(seen.shape)}. Pass rows and latents that you drew."
            )
        rows = value.to(x.dtype).reshape(x.shape).clone()
        try:
            with unvalidated():
                again = poutine.trace(model).get_trace(rows).nodes[name]["value"]
            other = _drawn(model, rows, seed)
        except NoLikelihoodError:
            raise
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"model: it does not run on rows that it drew: {without_trace(error)}"
            ) from error
        if not torch.equal(again.to(x.dtype).reshape(x.shape), rows):
            raise ValueError(
                f"Site {name!r}: given rows that it drew, the model observes others: it changes x "
                f"before. Do that to the data once, before the model, or pass rows and latents "
                f"that you drew."
            )
        for site in (*sites.latents, name):
            one, two = drawn.nodes[site]["value"], other.nodes[site]["value"]
            if one.shape != two.shape or not torch.allclose(one, two, rtol=1e-4, equal_nan=True):
                raise ValueError(
                    f"Site {site!r}: what the model draws there hangs on the values of the rows "
                    f"that it is called with, so that these are no draws of p(z) p(x | z). Keep "
                    f"covariates outside of x, or pass rows and latents that you drew."
                )
        latents = {
            site.name: drawn.nodes[site.name]["value"].expand(len(x), *site.event_shape).clone()
            for site in sites.latents.values()
        }
    return Simulated(rows, latents)


def _drawn(model: Program, x: Tensor, seed: int) -> Trace:
    """A run of the model in which nothing is observed; the same seed draws the same."""
    with forked_rng(seed, x.device), unvalidated():
        return poutine.trace(unobserved(model)).get_trace(x)
