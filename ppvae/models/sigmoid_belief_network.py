r"""A directed network of binary units."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from ppvae.isolation import OwnedModule, plate_size
from ppvae.likelihoods import Bernoulli


class SigmoidBeliefNetwork(OwnedModule):
    r"""Layers of binary latents, each drawn given the one above it.

    .. math::

        z_L \sim \mathrm{Bernoulli}(\sigma(b_L)), \quad
        z_l \mid z_{l+1} \sim \mathrm{Bernoulli}(\sigma(W_l z_{l+1} + b_l)), \quad
        x \mid z_1 \sim \mathrm{Bernoulli}(\sigma(W_0 z_1 + b_0))

    The weights start as those of `torch.nn.Linear`, :math:`b_L` at 0. The sites are ``z_1``, next
    to x, to ``z_L``; with one layer the site is ``z``. The evidence is a sum over
    :math:`2^{\sum_l d_l}` configurations, for networks of a dozen units or so.

    Sources: Neal (1992), Connectionist learning of belief networks; Mnih & Gregor (2014), Neural
    variational inference and learning in belief networks.

    Args:
        x_dim: Size of a row.
        z_dims: Widths of the layers, from the one next to x upwards.

    Shapes:
        ``x``: ``(batch, x_dim)``, zeros and ones; ``z_l``: ``(batch, z_dims[l − 1])``.

    Attributes:
        layers: :math:`W_l, b_l` for l = 0 to L − 1, linear layers.
        prior: :math:`b_L`, as ``prior["logits"]``.

    Raises:
        ValueError: If a width is below 1 or there is no layer; on a call with rows of another
            size, or with values other than 0 and 1.

    Example:
        >>> model = SigmoidBeliefNetwork(64, [10, 5])
        >>> model(size=3).shape
        torch.Size([3, 64])
        >>> model.sites
        ('z_1', 'z_2')
    """

    def __init__(self, x_dim: int, z_dims: Sequence[int]) -> None:
        super().__init__()
        self.x_dim, self.z_dims = x_dim, tuple(z_dims)
        if not self.z_dims or min(x_dim, *self.z_dims) < 1:
            raise ValueError(
                f"x_dim and z_dims: expected a positive width, and at least one of them for the "
                f"latents; got x_dim={x_dim} and z_dims={list(self.z_dims)}."
            )
        below = (x_dim, *self.z_dims[:-1])
        self.layers = nn.ModuleList(
            nn.Linear(above, width) for above, width in zip(self.z_dims, below, strict=True)
        )
        # Pyro's store thaws frozen parameters that are attributes of a model of its own kind; those
        # of torch's modules it leaves alone.
        self.prior = nn.ParameterDict({"logits": nn.Parameter(torch.zeros(self.z_dims[-1]))})
        self.likelihood = Bernoulli()

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the latent sites, from the one next to x upwards."""
        count = len(self.z_dims)
        return ("z",) if count == 1 else tuple(f"z_{number + 1}" for number in range(count))

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The generative process: rows ``x`` to condition on, or ``size`` rows to draw."""
        batch = plate_size(type(self).__name__, x, size, event_shape=(self.x_dim,))
        if x is not None and is_validation_enabled():
            self.likelihood.check(x)
        logits, layers = self.prior["logits"], self.layers
        with pyro.plate("data", batch, dim=-1):
            for site, layer in zip(reversed(self.sites), reversed(layers), strict=True):
                z = pyro.sample(site, dist.Bernoulli(logits=logits).to_event(1))
                # Configurations that somebody lists may be of another floating point type.
                logits = layer(z.to(logits.dtype))
            return pyro.sample("x", self.likelihood.distribution(logits), obs=x)

    def __repr__(self) -> str:
        return f"SigmoidBeliefNetwork(x_dim={self.x_dim}, z_dims={list(self.z_dims)})"
