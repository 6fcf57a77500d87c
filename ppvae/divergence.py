r"""How far a latent's posterior lies from its prior: log q/p and its expectation, the KL.

For a site as a whole and for each of its elements; analytic where torch knows a formula and the
formula is the expectation, at the guide's draws elsewhere. Objectives weigh these terms, and
`ppvae.diagnostics.element_kl` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from ppvae.density import distribution_name, log_density
from ppvae.terms import Term, same_mask, same_scale


@dataclass(frozen=True)
class Latent:
    """A latent site in the model and in the guide.

    Attributes:
        prior: Its term in the model.
        posterior: Its term in the guide.
        in_order: Whether the guide draws before it all that the model draws before it.
    """

    prior: Term
    posterior: Term
    in_order: bool

    def scaled_kl(self) -> Tensor:
        """KL(q || p), analytic where that is right, sampled elsewhere; with the scale."""
        prior, posterior = self.prior, self.posterior
        value = self.kl()
        if value is None or not same_scale(prior, posterior):
            return posterior.log_prob * posterior.scale - prior.log_prob * prior.scale
        return value * posterior.scale

    def kl(self) -> Tensor | None:
        """KL(q || p) given the draws that both hang on, of the shape of the terms.

        `None` where torch knows no formula, or where it would not be the expectation.
        """
        # The formula averages over z with the prior held: wrong if the prior hangs on a draw that
        # hangs on z. Of a Delta, Pyro's formula leaves out the density that it carries.
        fits = self.in_order and same_mask(self.posterior, self.prior)
        if not fits or distribution_name(self.posterior.fn) == "Delta":
            return None
        try:
            value = _divergence(self.posterior.fn, self.prior.fn)
        except NotImplementedError:
            return None
        shaped = value.expand(self.posterior.log_prob.shape)
        masked: Tensor = scale_and_mask(shaped, 1.0, self.posterior.mask)
        return masked

    def kl_of_elements(self) -> Tensor | None:
        """The KL of each element, ``(num_draws, batch, elements)``; `None` where there is none."""
        q, p = _of_an_element(self.posterior.fn), _of_an_element(self.prior.fn)
        if q is None or p is None or self.kl() is None:
            return None
        return self._elements(_divergence(q, p), self.posterior)

    def log_ratio(self) -> Tensor:
        r"""log q − log p at the draws, ``(num_draws, batch)``; ∞ outside of the prior's support."""
        q, p = self.posterior, self.prior
        log_q, log_p = (log_density(term.fn, q.value) for term in (q, p))
        value: Tensor = scale_and_mask(log_q, 1.0, q.mask) - scale_and_mask(log_p, 1.0, p.mask)
        return value.expand(q.log_prob.shape)

    def log_ratio_of_elements(self) -> Tensor | None:
        """`log_ratio` of each element, ``(num_draws, batch, elements)``.

        `None` where the posterior or the prior is no product over elements.
        """
        q, p = _of_an_element(self.posterior.fn), _of_an_element(self.prior.fn)
        if q is None or p is None or distribution_name(q) == "Delta":
            return None
        z = self.posterior.value
        log_q = self._elements(log_density(q, z), self.posterior)
        return log_q - self._elements(log_density(p, z), self.prior)

    def _elements(self, value: Tensor, term: Term) -> Tensor:
        """What a site says of its elements, flattened and masked as the site is."""
        event = term.fn.event_shape
        shape = self.posterior.log_prob.shape
        elements = value.expand(*shape, *event).reshape(*shape, -1)
        mask = term.mask[..., None] if isinstance(term.mask, Tensor) else term.mask
        masked: Tensor = scale_and_mask(elements, 1.0, mask)
        return masked


def _of_an_element(fn: Any) -> Any | None:
    """The distribution of an element, with the elements as last dimensions of its batch.

    `None` where the distribution is no product of such.
    """
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return None if fn.event_shape else fn


def _divergence(q: Any, p: Any) -> Tensor:
    """KL(q || p); some of torch's formulas need the same batch shape on both sides.

    Raises:
        NotImplementedError: If torch knows no formula, or one that does not hold.
    """
    if any(distribution_name(fn) == "FoldedDistribution" for fn in (q, p)):
        # Torch gives that of what is folded, as if a fold had an inverse.
        raise NotImplementedError
    if q.batch_shape != p.batch_shape:
        shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
        q, p = q.expand(shape), p.expand(shape)
    return torch.as_tensor(kl_divergence(q, p))


def latents(log_p: list[Term], log_q: list[Term]) -> list[Latent]:
    """The latent sites, in the model's order.

    Args:
        log_p: The model's terms.
        log_q: The guide's.
    """
    posteriors = {t.name: t for t in log_q}
    order = [t.name for t in log_q]
    found: list[Latent] = []
    before: set[str] = set()
    for term in log_p:
        if not term.is_observed:
            earlier = set(order[: order.index(term.name)])
            found.append(Latent(term, posteriors[term.name], before <= earlier))
            before.add(term.name)
    return found


def check_no_auxiliary(log_q: list[Term], instead: str) -> None:
    """Refuse a guide in which the latents are functions of other draws.

    Args:
        log_q: The guide's terms.
        instead: What to use in its case, for the message.

    Raises:
        ValueError: If the guide has a draw of its own.
    """
    for term in log_q:
        if term.is_auxiliary:
            raise ValueError(
                f"Site {term.name!r} is a draw of the guide's own, of which the latents are "
                f"functions, so that no latent has a KL of its own. {instead}"
            )
