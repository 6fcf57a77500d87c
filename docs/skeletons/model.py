r"""A model and its pair, to copy: counts with a common intensity."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.families import Family, Gamma
from ppvae.guides import Amortized
from ppvae.isolation import OwnedModule, plate_size
from ppvae.likelihoods import Poisson
from ppvae.nn import MLP
from ppvae.pairs.building import amortized


class GammaPoisson(OwnedModule):
    r"""Counts that share an intensity.

    .. math:: z_n \sim \mathrm{Gamma}(a, 1), \qquad x_{nd} \mid z_n \sim \mathrm{Poisson}(r_d z_n)

    With :math:`S_n = \sum_d x_{nd}` and :math:`R = \sum_d r_d` the posterior is
    :math:`\mathrm{Gamma}(a + S_n, 1 + R)`, and

    .. math::
        \log p(x_n) = \sum_d (x_{nd} \log r_d - \log x_{nd}!)
        + \log \Gamma(a + S_n) - \log \Gamma(a) - (a + S_n) \log(1 + R).

    Both follow from the gamma distribution being conjugate to the Poisson (Gelman et al. 2013,
    section 2.6).

    Args:
        x_dim: Number of counts of a row.
        concentration: a; held fixed.

    Shapes:
        ``x``: ``(batch, x_dim)``, counts; ``z``: ``(batch,)``, positive.

    Raises:
        ValueError: If a size or the concentration is not positive.

    Example:
        >>> import torch
        >>> GammaPoisson(2).log_evidence(torch.tensor([[0.0, 0.0]]))
        tensor([-2.1972], grad_fn=<SubBackward0>)
    """

    def __init__(self, x_dim: int, concentration: float = 2.0) -> None:
        super().__init__()
        if x_dim < 1 or concentration <= 0:
            raise ValueError(
                f"x_dim must be at least 1 and concentration positive; got {x_dim} and "
                f"{concentration}."
            )
        self.x_dim, self.concentration = x_dim, concentration
        self.likelihood = Poisson()
        self.log_rates = nn.Parameter(torch.zeros(x_dim))

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The generative process: rows ``x`` to condition on, or ``size`` rows to draw."""
        batch = plate_size(type(self).__name__, x, size, event_shape=(self.x_dim,))
        # New tensors take dtype and device from the parameters.
        one = self.log_rates.new_ones(())
        with pyro.plate("data", batch, dim=-1):
            z = pyro.sample("z", dist.Gamma(self.concentration * one, one))
            # z has further dimensions on its left when many draws are made at once.
            log_rates = z.log()[..., None] + self.log_rates
            return pyro.sample("x", self.likelihood.distribution(log_rates), obs=x)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) in nats, ``(batch,)``."""
        a = self.concentration + x.sum(-1)
        of_counts = (x * self.log_rates - torch.lgamma(x + 1)).sum(-1)
        prior = torch.lgamma(self.log_rates.new_tensor(self.concentration))
        return of_counts + torch.lgamma(a) - prior - a * self.log_rates.exp().sum().log1p()

    def posterior(self, x: Tensor) -> dist.Gamma:
        """Exact p(z | x), batch shape ``(batch,)``."""
        rate = 1 + self.log_rates.exp().sum()
        return dist.Gamma(self.concentration + x.sum(-1), rate.expand(len(x)))

    def __repr__(self) -> str:
        return f"GammaPoisson(x_dim={self.x_dim}, concentration={self.concentration:g})"


def gamma_poisson(
    x_dim: int = 4, family: Family | None = None, *, hidden: Sequence[int] = (16,)
) -> tuple[GammaPoisson, Amortized]:
    """`GammaPoisson` with an encoder.

    Args:
        x_dim: Number of counts of a row.
        family: A family on z > 0 for a scalar latent; `Gamma` if left out, which holds the
            posterior.
        hidden: Widths of the encoder's hidden layers.

    Raises:
        ValueError: If the family's support or shape is not the model's.

    Example:
        >>> model, guide = gamma_poisson()
        >>> guide
        Amortized(Gamma(), MLP(4 -> 16 -> 2, ELU), site='z')
    """
    model = GammaPoisson(x_dim)
    family = Gamma() if family is None else family
    return model, amortized(model, family, MLP(x_dim, hidden, family.num_params))
