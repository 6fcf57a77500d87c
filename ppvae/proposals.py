"""Distributions over the latents that estimates of log p(x) start from: a guide, or the prior.

A proposal draws latents and knows its density at any value, also at one that it did not draw. What
it says of the rows stands in tensors with a row for each, so that rows can be taken in portions.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from ppvae.density import (
    ModelSites,
    Program,
    draw_chunks,
    guided,
    joint,
    log_density,
    log_guide,
    prior_and_likelihood,
    prior_draws,
    without_trace,
)
from ppvae.families import Family
from ppvae.guides import read_params
from ppvae.progress import SILENT, Bar


class Proposal(ABC):
    """Where draws of the latents come from.

    For code that provides the contexts of `ppvae.density.judging` itself.

    Attributes:
        model: The model.
        params: What is known of the rows, ``(batch, …)`` each.
    """

    def __init__(self, model: Program, params: Sequence[Tensor] = ()) -> None:
        self.model, self.params = model, tuple(params)

    def of_rows(self, rows: Tensor) -> Self:
        """The proposal for some of the rows."""
        own = copy.copy(self)
        own.params = tuple(p[rows] for p in self.params)
        return own

    @abstractmethod
    def draw(self, x: Tensor, params: Sequence[Tensor], num_samples: int) -> dict[str, Tensor]:
        """Draws by site, ``(num_samples, batch, *event)``, for rows and their ``params``."""

    @abstractmethod
    def log_prob(
        self, x: Tensor, params: Sequence[Tensor], latents: Mapping[str, Tensor]
    ) -> Tensor:
        """Log density of any draws, ``(num_samples, batch)``."""

    def log_densities(
        self, x: Tensor, params: Sequence[Tensor], latents: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Log density of draws here, and their log joint density with the rows."""
        return self.log_prob(x, params, latents), joint(self.model, x, latents)


class Prior(Proposal):
    """The model's own p(z)."""

    def draw(self, x: Tensor, params: Sequence[Tensor], num_samples: int) -> dict[str, Tensor]:
        """Draws of the prior."""
        return prior_draws(self.model, x, num_samples)

    def log_prob(
        self, x: Tensor, params: Sequence[Tensor], latents: Mapping[str, Tensor]
    ) -> Tensor:
        """log p(z)."""
        return prior_and_likelihood(self.model, x, latents)[0]

    def log_densities(
        self, x: Tensor, params: Sequence[Tensor], latents: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """log p(z), and log p(x, z)."""
        prior, likelihood = prior_and_likelihood(self.model, x, latents)
        return prior, prior + likelihood


class Freed(Proposal):
    """Members of families with parameters for each row; the encoder has run once."""

    def __init__(
        self, model: Program, families: Mapping[str, Family], params: Mapping[str, Tensor]
    ) -> None:
        super().__init__(model, [params[site].detach() for site in families])
        self.families = dict(families)

    def draw(self, x: Tensor, params: Sequence[Tensor], num_samples: int) -> dict[str, Tensor]:
        """Draws of the members."""
        z: dict[str, Tensor] = {}
        for (site, family), own in zip(self.families.items(), params, strict=True):
            # A member that hangs on a draw has the draws among its rows already.
            drawn = torch.Size([] if family.given else [num_samples])
            z[site] = family.member(own, z).sample(drawn)
        return z

    def log_prob(
        self, x: Tensor, params: Sequence[Tensor], latents: Mapping[str, Tensor]
    ) -> Tensor:
        """The sum of the members' log densities; −inf outside of their support."""
        parts = [
            log_density(family.member(own, latents), latents[site])
            for (site, family), own in zip(self.families.items(), params, strict=True)
        ]
        return torch.stack(parts).sum(dim=0)


class Conditioned(Proposal):
    """A guide whose sites hang on each other: it runs anew for every value."""

    def __init__(self, model: Program, guide: Program) -> None:
        super().__init__(model)
        self._guide = guide

    def draw(self, x: Tensor, params: Sequence[Tensor], num_samples: int) -> dict[str, Tensor]:
        """Draws of the guide."""
        return guided(self._guide, x, num_samples)[0]

    def log_prob(
        self, x: Tensor, params: Sequence[Tensor], latents: Mapping[str, Tensor]
    ) -> Tensor:
        """log q(z | x)."""
        return log_guide(self._guide, x, latents)


def mixture_weights(
    proposals: Sequence[Proposal], x: Tensor, num_samples: int, bar: Bar = SILENT
) -> Tensor:
    r"""Log weights of draws of several proposals against the mixture of all.

    .. math:: \log w_{ksn} = \log p(x_n, z_{ksn}) - \log \tfrac1K \sum_j q_j(z_{ksn}),
              \qquad z_{ksn} \sim q_k

    The balance heuristic of Veach & Guibas (1995).

    Args:
        proposals: K proposals for the same model. A single one may be a flow without an inverse.
        x: Rows.
        num_samples: Draws S of each.
        bar: Told of each draw of all rows.

    Returns:
        ``(K, S, batch)``.
    """
    found = []
    for proposal in proposals:
        parts = []
        for size in draw_chunks(num_samples, x):
            z = proposal.draw(x, proposal.params, size)
            own, target = proposal.log_densities(x, proposal.params, z)
            terms = [own if p is proposal else p.log_prob(x, p.params, z) for p in proposals]
            mixture = torch.logsumexp(torch.stack(terms), dim=0) - math.log(len(proposals))
            parts.append(target - mixture)
            bar.advance(size)
        found.append(torch.cat(parts))
    return torch.stack(found)


def knows_any_value(proposal: Proposal, x: Tensor) -> bool:
    """Whether a proposal's density can be had at values that it did not draw itself."""
    try:
        values = proposal.draw(x, proposal.params, 1)
        proposal.log_prob(x, proposal.params, {name: z.clone() for name, z in values.items()})
    except (KeyError, NotImplementedError, RuntimeError, ValueError):
        return False
    return True


def proposal_of(model: Program, guide: Program, x: Tensor, sites: ModelSites) -> Proposal:
    """A guide as a proposal.

    Raises:
        ValueError: If its density at values that it did not draw is not known: it has auxiliary
            draws, or is a flow without an inverse.
    """
    found: Proposal
    try:
        reading = read_params(guide, x, sites)
        found = Freed(model, reading.families, reading.params)
    except ValueError:
        found = Conditioned(model, guide)
    latents, own = guided(guide, x, 2)
    # A copy, as a flow without an inverse knows the very tensor that it drew.
    copies = {name: z.clone() for name, z in latents.items()}
    try:
        density = found.log_prob(x, found.params, copies)
    except (KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        raise _unknown_density(without_trace(error)) from error
    if not torch.allclose(density, own, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise _unknown_density(
            "conditioned on its own draws it has another density than when it drew them"
        )
    return found


def _unknown_density(why: str) -> ValueError:
    return ValueError(
        f"guide: its density is wanted at values that it did not draw, and is not known there: "
        f"{why} Guides with auxiliary draws and flows without an inverse are such. Start from the "
        f"prior (guide=None), or from ppvae.fit_per_datapoint(...).guide in a family that has a "
        f"density everywhere."
    )
