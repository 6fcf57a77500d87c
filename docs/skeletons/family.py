r"""A variational family, to copy."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ppvae.families.base import Family, innermost


class Laplace(Family):
    r"""Laplace distributions over the reals, :math:`q(z) = \prod_d \mathrm{Laplace}(\mu_d, b_d)`.

    λ = (μ, log b). Draws can be reparameterised.

    Args:
        latent_dim: Size of a vector-valued latent, `None` for a scalar one.

    Example:
        >>> import torch
        >>> Laplace().distribution(torch.zeros(2)).entropy()  # 1 + log 2
        tensor(1.6931)
    """

    def _build(self, params: Tensor) -> Any:
        # Any real numbers are allowed parameters: the scale goes through an exponential.
        loc, log_scale = self._two(params)
        return self._event(dist.Laplace(loc, torch.exp(log_scale)))

    def params_of(self, member: Any) -> Tensor:
        """λ of a Laplace distribution."""
        laplace = innermost(member)
        return self._join(laplace.loc, torch.log(laplace.scale))
