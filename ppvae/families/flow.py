r"""Families bent by a flow: Gaussians per datum behind a map that all data share.

What belongs to a datum is λ alone. The weights of the map T belong to the family, as the number of
its dimensions does: `ppvae.guides.Amortized` trains them with its encoder, and once a guide is
freed they are a frozen copy. The best member q* of a datum, and with it the approximation and the
amortization gap, are therefore *for these weights*: the approximation gap is what the trained T
leaves when λ is the best there is for each datum, and the amortization gap is what the encoder
loses on λ. Another training of T gives another family.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ppvae.families.base import Family, innermost
from ppvae.families.named import DiagonalGaussian
from ppvae.flows import Autoregressive, FlowTransform, check_flow


def _sizes(latent_dim: int | None, flow: Autoregressive) -> str:
    return f"{latent_dim}, transforms={len(flow.layers)}, hidden={flow.hidden}"


class Flow(nn.Module, DiagonalGaussian):
    r"""A diagonal normal behind an inverse autoregressive flow with shared weights.

    .. math:: z = T_\phi(\mu + \sigma \odot \epsilon), \qquad \epsilon \sim N(0, I)

    λ = (μ, log σ) is per datum; the weights φ are the same for all data, and part of the family
    (see `ppvae.families.flow`). With φ held fixed this is a Gaussian behind a fixed bijection, so
    that q* is found by natural gradients.

    Drawing takes one pass; the density at values that it did not draw takes ``latent_dim`` passes.
    λ = 0 is :math:`T_\phi` of a standard normal.

    Source: Kingma et al. (2016), "Improved variational inference with inverse autoregressive
    flow", here with one map for all data.

    Args:
        latent_dim: Size of the latent, at least 2.
        transforms: Number of autoregressive layers.
        hidden: Widths of the hidden layers of their networks.

    Raises:
        ValueError: If the latent has one dimension, or a size is not positive.

    Example:
        >>> import torch
        >>> family = Flow(2)
        >>> family
        Flow(2, transforms=2, hidden=(64,))
        >>> family.num_params
        4
        >>> family.distribution(torch.zeros(7, 4)).event_shape
        torch.Size([2])
    """

    support = constraints.real_vector

    def __init__(self, latent_dim: int, transforms: int = 2, hidden: Sequence[int] = (64,)) -> None:
        _check("Flow", latent_dim, transforms, hidden)
        nn.Module.__init__(self)
        DiagonalGaussian.__init__(self, latent_dim)
        self.flow = Autoregressive(latent_dim, transforms, hidden)

    def _build(self, params: Tensor) -> Any:
        loc, log_scale = self._two(params)
        normal = self._event(dist.Normal(loc, torch.exp(log_scale)))
        return dist.TransformedDistribution(normal, [FlowTransform(self.flow)])

    def params_of(self, member: Any) -> Tensor:
        """λ of a member: that of the normal behind the flow."""
        normal = innermost(innermost(member).base_dist)
        return self._join(normal.loc, torch.log(normal.scale))

    def from_normal(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The latent at the Gaussian's value ``u``, and the log determinant of T there."""
        z, log_det = self.flow(u)
        return z, log_det

    def __repr__(self) -> str:
        return f"Flow({_sizes(self.latent_dim, self.flow)})"


class ConditionalFlow(nn.Module, Family):
    r"""A diagonal normal behind an inverse autoregressive flow that each datum steers.

    .. math:: z = T_\phi(\mu + \sigma \odot \epsilon; c), \qquad \epsilon \sim N(0, I)

    λ = (μ, log σ, c) is per datum: the context c is a further input of the networks of
    :math:`T_\phi`, whose weights φ are the same for all data, and part of the family (see
    `ppvae.families.flow`). The best λ is sought over c too, with φ held fixed; this is no Gaussian
    behind a fixed map, so the method for general families serves.

    Source: Kingma et al. (2016), whose context is the h of their algorithm 1.

    Args:
        latent_dim: Size of the latent, at least 2.
        context_dim: Size of c, at least 1.
        transforms: Number of autoregressive layers.
        hidden: Widths of the hidden layers of their networks.

    Raises:
        ValueError: If the latent has one dimension, or a size is not positive.

    Example:
        >>> ConditionalFlow(2, context_dim=3).num_params
        7
    """

    support = constraints.real_vector

    def __init__(
        self,
        latent_dim: int,
        context_dim: int,
        transforms: int = 2,
        hidden: Sequence[int] = (64,),
    ) -> None:
        _check("ConditionalFlow", latent_dim, transforms, hidden)
        if context_dim < 1:
            raise ValueError(
                f"ConditionalFlow: context_dim must be at least 1; got {context_dim}. Without a "
                f"context use Flow."
            )
        nn.Module.__init__(self)
        Family.__init__(self, latent_dim)
        self.context_dim = context_dim
        self.flow = Autoregressive(latent_dim, transforms, hidden, context_dim)

    @property
    def num_params(self) -> int:
        """Size of a row of parameters."""
        return 2 * self.size + self.context_dim

    def _build(self, params: Tensor) -> Any:
        gaussian, context = params.split([2 * self.size, self.context_dim], dim=-1)
        loc, log_scale = self._two(gaussian)
        normal = self._event(dist.Normal(loc, torch.exp(log_scale)))
        return dist.TransformedDistribution(normal, [FlowTransform(self.flow, context)])

    def params_of(self, member: Any) -> Tensor:
        """λ of a member: that of the normal behind the flow, and the flow's context."""
        inner = innermost(member)
        normal = innermost(inner.base_dist)
        gaussian = self._join(normal.loc, torch.log(normal.scale))
        context = inner.transforms[0].context
        return torch.cat([gaussian, context.expand(*gaussian.shape[:-1], -1)], dim=-1)

    def __repr__(self) -> str:
        sizes = _sizes(self.latent_dim, self.flow)
        return f"ConditionalFlow({sizes}, context_dim={self.context_dim})"


def _check(kind: str, latent_dim: int | None, transforms: int, hidden: Sequence[int]) -> None:
    normal = f"DiagonalNormal({'' if latent_dim is None else latent_dim})"
    instead = f"{normal}, or transformed({normal}, ...)"
    check_flow(kind, 1 if latent_dim is None else latent_dim, transforms, hidden, instead)
