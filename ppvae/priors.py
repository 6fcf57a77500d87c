r"""Priors over the latent z: the standard normal, and ones that are learned with the model.

A `Prior` is a module whose `distribution` gives :math:`p_\theta(z)` as a Pyro distribution, shared
by all data. Models take one, `ppvae.models.VAE` for instance.

The best prior for given guides is the aggregate posterior :math:`\frac1N \sum_n q(z \mid x_n)`
(Hoffman & Johnson 2016); a mixture, a VampPrior and a flow can come nearer to it than the standard
normal can. With any of them :math:`D(q \,\|\, p)` has no closed form, and is estimated from the
draws.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.distributions import Mixture
from ppvae.flows import Autoregressive, FlowTransform, check_flow
from ppvae.isolation import evaluation_mode


class Prior(nn.Module, ABC):
    """A distribution over the latent variable of a datum, the same for all data.

    Args:
        z_dim: Size of the latent.

    Attributes:
        z_dim: As given.
    """

    def __init__(self, z_dim: int) -> None:
        super().__init__()
        if z_dim < 1:
            raise ValueError(f"z_dim must be at least 1; got {z_dim}.")
        self.z_dim = z_dim

    @abstractmethod
    def distribution(self) -> dist.TorchDistribution:
        """p(z), with batch shape ``()`` and event shape ``(z_dim,)``."""


class StandardNormal(Prior):
    r"""The standard normal, :math:`p(z) = N(z; 0, I)`.

    Example:
        >>> StandardNormal(8).distribution().event_shape
        torch.Size([8])
    """

    _zeros: Tensor

    def __init__(self, z_dim: int) -> None:
        super().__init__(z_dim)
        # What says the dtype and device; no part of the state that is saved.
        self.register_buffer("_zeros", torch.zeros(z_dim), persistent=False)

    def distribution(self) -> dist.TorchDistribution:
        """p(z)."""
        return dist.Normal(self._zeros, torch.ones_like(self._zeros)).to_event(1)

    def __repr__(self) -> str:
        return f"StandardNormal({self.z_dim})"


class NormalMixture(Prior):
    r"""A mixture of diagonal normals, all of it learned.

    .. math:: p(z) = \sum_k \pi_k \prod_d N(z_d; \mu_{kd}, \sigma_{kd}^2)

    It starts with equal weights, at means drawn from :math:`N(0, I / 2)` and variances of one half.

    Args:
        z_dim: Size of the latent.
        num_components: Number of components.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> NormalMixture(2, 10).distribution().sample((7,)).shape
        torch.Size([7, 2])
    """

    def __init__(self, z_dim: int, num_components: int) -> None:
        super().__init__(z_dim)
        if num_components < 1:
            raise ValueError(f"num_components must be at least 1; got {num_components}.")
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.locs = nn.Parameter(0.5**0.5 * torch.randn(num_components, z_dim))
        self.log_scales = nn.Parameter(torch.full((num_components, z_dim), 0.5).log() / 2)

    def distribution(self) -> Mixture:
        """p(z)."""
        params = torch.cat([self.locs, self.log_scales], dim=-1)
        return Mixture(_diagonal_normal, params, self.logits)

    def __repr__(self) -> str:
        return f"NormalMixture({self.z_dim}, {len(self.logits)})"


def _diagonal_normal(params: Tensor) -> Any:
    loc, log_scale = params.chunk(2, dim=-1)
    return dist.Normal(loc, torch.exp(log_scale)).to_event(1)


class _Family(Protocol):
    """What a VampPrior asks of a variational family; see `ppvae.families.Family`."""

    given: str | None

    @property
    def event_shape(self) -> tuple[int, ...]: ...

    @property
    def num_params(self) -> int: ...

    def distribution(self, params: Tensor) -> Any: ...


# How far from the ends of the unit interval a pseudo-input starts at least.
_INSIDE = 0.02


class VampPrior(Prior):
    r"""The variational mixture of posteriors: what the guide says of some learned rows.

    .. math:: p(z) = \frac1K \sum_k q_\phi(z \mid u_k)

    The pseudo-inputs :math:`u_k` are rows of data's shape, learned with the model. The encoder is
    the guide's own, so that prior and guide share its parameters, which training updates once a
    step. What follows from the sharing:

    - Freeing a guide (`ppvae.guides.per_datapoint`, `ppvae.compare`) leaves the model as it is;
      training the guide by itself changes the model with it.
    - Freezing the model's parameters freezes the encoder.
    - Copy or pickle model and guide together, ``copy.deepcopy((model, guide))``: apart, each gets
      an encoder of its own.

    Source: Tomczak & Welling (2018), "VAE with a VampPrior".

    Args:
        encoder: The guide's: from rows to λ.
        family: The guide's: from λ to q(z).
        pseudo_inputs: Where they start, ``(K, *event)``; rows of the data are a good choice.
        unit_interval: Whether to keep them in [0, 1], as data for a Bernoulli likelihood are, by a
            logistic map. Starts nearer than 0.02 to an end are moved to there.

    Raises:
        ValueError: If the latent is no vector, or the pseudo-inputs are no rows for the encoder,
            or outside of the unit interval where they are to be kept in it.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> model, guide = pairs.vae(x_dim=64, z_dim=2, hidden=[100], pseudo_inputs=50)
        >>> model.prior
        VampPrior(2, 50 pseudo-inputs in [0, 1])
        >>> model.prior.encoder is guide.encoder
        True
    """

    def __init__(
        self,
        encoder: nn.Module,
        family: _Family,
        pseudo_inputs: Tensor,
        *,
        unit_interval: bool = False,
    ) -> None:
        if len(family.event_shape) != 1 or family.given is not None:
            raise ValueError(
                f"family: a VampPrior needs a family over a vector that hangs on no other site; "
                f"got {family!r}. Give it a latent_dim."
            )
        super().__init__(family.event_shape[0])
        if pseudo_inputs.dim() < 2 or len(pseudo_inputs) < 1:
            raise ValueError(
                f"pseudo_inputs: expected rows, shape (K, *event); got "
                f"{tuple(pseudo_inputs.shape)}."
            )
        self.encoder, self.family, self.unit_interval = encoder, family, unit_interval
        start = pseudo_inputs.detach().clone()
        if unit_interval:
            if not bool(((start >= 0) & (start <= 1)).all()):
                raise ValueError(
                    f"pseudo_inputs: expected values in [0, 1]; got {float(start.min()):.4g} to "
                    f"{float(start.max()):.4g}. Scale them, or leave out unit_interval."
                )
            start = torch.logit(start, eps=_INSIDE)
        self._free_pseudo_inputs = nn.Parameter(start)
        with evaluation_mode(encoder), torch.no_grad():
            params = encoder(self.pseudo_inputs[:1])
        if tuple(params.shape) != (1, family.num_params):
            raise ValueError(
                f"encoder: expected outputs of shape (batch, {family.num_params}) for {family!r}; "
                f"got (batch, {', '.join(map(str, params.shape[1:]))})."
            )

    @property
    def pseudo_inputs(self) -> Tensor:
        """The rows :math:`u_k`, ``(K, *event)``."""
        free = self._free_pseudo_inputs
        return torch.sigmoid(free) if self.unit_interval else free

    def distribution(self) -> Mixture:
        """p(z), by the encoder as it is now."""
        rows = self.pseudo_inputs
        return Mixture(self.family.distribution, self.encoder(rows), rows.new_zeros(len(rows)))

    def __repr__(self) -> str:
        where = " in [0, 1]" if self.unit_interval else ""
        return f"VampPrior({self.z_dim}, {len(self._free_pseudo_inputs)} pseudo-inputs{where})"


class FlowPrior(Prior):
    r"""A standard normal behind a masked autoregressive flow, quick to score.

    .. math:: z = T_\theta(u), \qquad u \sim N(0, I)

    Its density takes one pass, a draw ``z_dim`` passes. It starts near the standard normal.

    Source: Papamakarios, Pavlakou & Murray (2017), "Masked autoregressive flow for density
    estimation"; as a prior, Chen et al. (2017), "Variational lossy autoencoder", section 3.2.

    Args:
        z_dim: Size of the latent, at least 2.
        transforms: Number of autoregressive layers.
        hidden: Widths of the hidden layers of their networks.

    Raises:
        ValueError: If the latent has one dimension, or a size is not positive.

    Example:
        >>> FlowPrior(2)
        FlowPrior(2, transforms=2, hidden=(64,))
    """

    _zeros: Tensor

    def __init__(self, z_dim: int, transforms: int = 2, hidden: Sequence[int] = (64,)) -> None:
        super().__init__(z_dim)
        check_flow("FlowPrior", z_dim, transforms, hidden, f"NormalMixture({z_dim}, 10)")
        self.flow = Autoregressive(z_dim, transforms, hidden)
        self.register_buffer("_zeros", torch.zeros(z_dim), persistent=False)

    def distribution(self) -> dist.TransformedDistribution:
        """p(z)."""
        normal = dist.Normal(self._zeros, torch.ones_like(self._zeros)).to_event(1)
        return dist.TransformedDistribution(normal, [FlowTransform(self.flow, scores_fast=True)])

    def __repr__(self) -> str:
        return (
            f"FlowPrior({self.z_dim}, transforms={len(self.flow.layers)}, "
            f"hidden={self.flow.hidden})"
        )
