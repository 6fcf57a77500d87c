"""Objectives that change the weight of the KL term: β with its schedules, and free bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from ppvae.density import Program, distribution_name
from ppvae.divergence import Latent, check_no_auxiliary, latents
from ppvae.objectives.base import Objective, Rows
from ppvae.objectives.schedules import Schedule, check_weight
from ppvae.terms import Drawn, check_local, row_scale


class BetaELBO(Objective):
    r"""The ELBO with another weight on the KL term, fixed or on a schedule.

    .. math:: J_\beta = \sum_n E_{q(z \mid x_n)}[\log p(x_n \mid z)]
              - \beta\, \mathrm{KL}(q(z \mid x_n) \,\|\, p(z))

    (Higgins et al. 2017, eq. 4; with β rising from 0 to 1 the annealing of Bowman et al. 2016).
    For β ≥ 1 it bounds the ELBO from below, and so log p(x); for β < 1 it is no bound, and
    ``-loss`` no ELBO. For the ELBO of a trained pair take `ppvae.elbo`.

    The KL term is analytic for every site where torch knows a formula and where the formula is
    its expectation, which it is if the guide draws first what the site's prior hangs on: a guide
    from the bottom up has sampled terms, where `TraceMeanField_ELBO` would be wrong. Elsewhere
    :math:`\log q - \log p` is sampled. Draws with a path carry the gradient; for others, such as
    discrete ones, the score function does, with what the other draws of the row say as baseline
    if there are several.

    ``weighs="log_q"`` is another objective, which public code for Cremer et al. (2018) anneals:

    .. math:: J'_\beta = \sum_n E_{q(z \mid x_n)}[\log p(x_n, z) - \beta \log q(z \mid x_n)]

    It weighs the entropy of q alone. At β = 0 q goes to the mode of p(x, z), where above it goes
    to the largest likelihood. It has no side on which it bounds log p(x), whatever β but 1, as
    the entropy of a continuous q has no sign.

    Latents that all rows share, such as the weights of a network, are weighed by β too.

    Args:
        beta: The weight β, or a schedule from a step's number to it, such as `Linear` or
            `Cyclical`. A step is a call that asks for gradients by ``loss_and_grads``, as `fit`
            and ``SVI.step`` do; ``loss`` and ``differentiable_loss`` use the current weight and do
            not count. The attribute ``steps_taken`` has the number, and may be set.
        weighs: What β weighs, ``"kl"`` or ``"log_q"``.
        num_particles: Draws for every row.

    Raises:
        ValueError: If a weight is negative or not finite (that of a schedule when it comes up), or
            ``weighs`` unknown; on a call with a pair that is unfit.

    Example:
        >>> import torch
        >>> from ppvae import fit, pairs
        >>> from ppvae.objectives import BetaELBO, Linear
        >>> model, guide = pairs.vae(x_dim=6, z_dim=2, hidden=[8])
        >>> objective = BetaELBO(Linear(10))
        >>> run = fit(model, guide, torch.ones(20, 6), loss=objective, steps=5, progress=False)
        >>> objective.beta
        0.5
    """

    def __init__(
        self,
        beta: float | Schedule = 1.0,
        *,
        weighs: Literal["kl", "log_q"] = "kl",
        num_particles: int = 1,
    ) -> None:
        if weighs not in ("kl", "log_q"):
            raise ValueError(f'weighs must be "kl" or "log_q"; got {weighs!r}.')
        super().__init__(num_particles)
        if not callable(beta):
            check_weight("beta", beta)
        self.schedule, self.weighs = beta, weighs
        self.steps_taken = 0
        self._given: Tensor | None = None

    @property
    def beta(self) -> float:
        """The weight of the coming step."""
        if not callable(self.schedule):
            return float(self.schedule)
        value = float(self.schedule(self.steps_taken))
        check_weight(f"The schedule's weight at step {self.steps_taken}", value)
        return value

    @property
    def target(self) -> str:
        """What the gradient is one of."""
        if self.beta == 1:
            return "ELBO"
        which = "the KL term" if self.weighs == "kl" else "log q"
        return f"ELBO with {which} times {self.beta:.6g}"

    def count_step(self) -> None:
        """Note that a step was taken: the schedule goes on."""
        self.steps_taken += 1

    @property
    def moving(self) -> tuple[float, ...]:
        """The weight, where it is on a schedule."""
        return (self.beta,) if callable(self.schedule) else ()

    @contextmanager
    def again(self, moving: Tensor | None = None) -> Iterator[None]:
        """Inside, a step is run once more, and is not counted; with this weight, if given."""
        taken, given = self.steps_taken, self._given
        self._given = None if moving is None else moving[0]
        try:
            yield
        finally:
            self.steps_taken, self._given = taken, given

    def _evaluate(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        return self._averaged(self._of, model, guide, args, kwargs)

    def _of(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        log_q, log_p = drawn.log_q(), drawn.log_p()
        beta, rows = self.beta if self._given is None else self._given, Rows()
        for term in log_p:
            if term.is_observed or self.weighs == "log_q":
                rows.add(term.log_prob * term.scale, term.is_shared)
        if self.weighs == "kl":
            for latent in latents(log_p, log_q):
                rows.add(-beta * latent.scaled_kl(), latent.prior.is_shared)
        for term in log_q:
            if term.is_auxiliary or self.weighs == "log_q":
                rows.add(-beta * term.log_prob * term.scale, term.is_shared)
        return rows.estimate(drawn, log_q)

    def __repr__(self) -> str:
        weighs = "" if self.weighs == "kl" else f", weighs={self.weighs!r}"
        return f"BetaELBO({self.schedule!r}{weighs}, num_particles={self.num_particles})"


class FreeBitsELBO(Objective):
    r"""The ELBO with a floor under the KL of each latent element: free bits, in nats.

    .. math:: J_\lambda = \sum_n E_{q(z \mid x_n)}[\log p(x_n \mid z)]
              - N \sum_j \max\Bigl(\lambda,
                \frac{1}{N} \sum_n \mathrm{KL}(q(z_j \mid x_n) \,\|\, p(z_j))\Bigr)

    with the mean over the rows of the minibatch whose latents are not masked, N in number (Kingma
    et al. 2016, eq. 15). An element whose
    mean KL lies below λ is not pushed further down, so that it is not given up before it is of
    use. J never exceeds the ELBO, and falls short of it by up to Nλ for each element. For the
    ELBO of a trained pair take `ppvae.elbo`.

    With ``groups="elements"`` j runs over the elements of the latent sites; both the guide's and
    the model's distribution must then be products over elements with a KL that torch knows. With
    ``groups="sites"`` it runs over the sites, whose KL is sampled where there is no formula.

    Args:
        nats: λ, at least 0; with 0 this is the ELBO.
        groups: What has a floor of its own, ``"elements"`` or ``"sites"``.
        num_particles: Draws for every row.

    Raises:
        ValueError: If λ is negative or not finite, or ``groups`` unknown; on a call, if an
            element has no KL of its own or a latent is shared by all rows.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> from ppvae.objectives import FreeBitsELBO
        >>> model, guide = pairs.vae(x_dim=6, z_dim=2, hidden=[8])
        >>> loss = FreeBitsELBO(0.1)(model, guide)(torch.ones(20, 6))
        >>> loss.backward()
    """

    def __init__(
        self,
        nats: float,
        *,
        groups: Literal["elements", "sites"] = "elements",
        num_particles: int = 1,
    ) -> None:
        if groups not in ("elements", "sites"):
            raise ValueError(f'groups must be "elements" or "sites"; got {groups!r}.')
        super().__init__(num_particles)
        check_weight("nats", nats)
        self.nats, self.groups = float(nats), groups

    @property
    def target(self) -> str:
        """What the gradient is one of."""
        if self.nats == 0:
            return "ELBO"
        return f"ELBO with {self.nats:.6g} nats free for each of the {self.groups}"

    def _evaluate(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        drawn = Drawn(model, guide, args, kwargs, self.num_particles)
        check_local(drawn, "Free bits are a floor for the mean over rows: use BetaELBO.")
        log_q, log_p = drawn.log_q(), drawn.log_p()
        check_no_auxiliary(
            log_q,
            "Use BetaELBO, or a guide that draws the latents themselves, such as "
            "ppvae.guides.Amortized.",
        )
        like = log_p[0].log_prob
        scale = torch.as_tensor(row_scale(*log_p, *log_q), dtype=like.dtype, device=like.device)
        rows = Rows()
        for term in log_p:
            if term.is_observed:
                rows.add(term.log_prob * scale)
        scales = scale.expand(rows.local.shape[-1:])
        floor = rows.local.new_zeros(())
        for latent in latents(log_p, log_q):
            kl = scale[..., None] * self._kl(latent)
            # Masked rows say nothing, and have no floor.
            ones = torch.ones_like(latent.posterior.log_prob)
            count = (scales * scale_and_mask(ones, 1.0, latent.posterior.mask)).sum(dim=-1).mean()
            above = kl.detach().mean(dim=0).sum(dim=0) > self.nats * count
            if self.nats == 0:  # Below zero lies only the noise of a sampled KL.
                above = torch.ones_like(above)
            rows.add(-(kl * above).sum(dim=-1))
            floor = floor + self.nats * count * (~above).sum()
        value, surrogate = rows.estimate(drawn, log_q)
        return value - floor, surrogate

    def _kl(self, latent: Latent) -> Tensor:
        """The KL of the groups of a site, ``(num_draws, batch, groups)``, not scaled."""
        if self.groups == "sites":
            kl = latent.kl()
            value = latent.posterior.log_prob - latent.prior.log_prob if kl is None else kl
            return value[..., None]
        kl = latent.kl_of_elements()
        if kl is None:
            raise ValueError(
                f"Site {latent.prior.name!r}: its elements have no KL of their own from "
                f"{distribution_name(latent.posterior.fn)} to {distribution_name(latent.prior.fn)} "
                f"that torch knows, or the guide draws it before what its prior hangs on. Use "
                f'groups="sites", a floor for the whole site.'
            )
        return kl

    def __repr__(self) -> str:
        groups = "" if self.groups == "elements" else f", groups={self.groups!r}"
        return f"FreeBitsELBO({self.nats:g}{groups}, num_particles={self.num_particles})"
