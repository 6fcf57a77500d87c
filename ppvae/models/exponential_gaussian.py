r"""The toy whose posterior is known: an exponential latent under normal noise."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ppvae.distributions import TruncatedNormal
from ppvae.isolation import OwnedModule, plate_size


class ExponentialGaussian(OwnedModule):
    r"""An exponential latent, observed with normal noise.

    .. math:: z_n \sim \mathrm{Exponential}(1), \qquad x_n \mid z_n \sim N(z_n, 1)

    The posterior is the normal :math:`N(x - 1, 1)` kept to :math:`z \ge 0`, and

    .. math:: \log p(x) = \tfrac12 - x + \log \Phi(x - 1).

    Both follow by completing the square in :math:`-z - (x - z)^2 / 2`.

    Shapes:
        ``x``: ``(batch,)``; ``z``: ``(batch,)``.

    Example:
        >>> import torch
        >>> ExponentialGaussian().log_evidence(torch.tensor([1.5]))
        tensor([-1.3689])
    """

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The generative process: rows ``x`` to condition on, or ``size`` rows to draw."""
        batch = plate_size(type(self).__name__, x, size, event_shape=())
        with pyro.plate("data", batch, dim=-1):
            one = torch.ones(()) if x is None else x.new_ones(())
            z = pyro.sample("z", dist.Exponential(one))
            return pyro.sample("x", dist.Normal(z, one), obs=x)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) in nats, ``(batch,)``."""
        out: Tensor = 0.5 - x + torch.special.log_ndtr(x - 1)
        return out

    def posterior(self, x: Tensor) -> TruncatedNormal:
        """Exact p(z | x), batch shape ``(batch,)``."""
        return TruncatedNormal(x - 1, torch.ones_like(x))

    def __repr__(self) -> str:
        return "ExponentialGaussian(z ~ Exponential(1), x | z ~ Normal(z, 1))"
