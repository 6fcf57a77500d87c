r"""Several layers of normal latents, each the mean of the one below through a network."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from ppvae.isolation import OwnedModule, evaluation_mode, plate_size
from ppvae.likelihoods import Likelihood


class DeepLatentGaussian(OwnedModule):
    r"""A deep latent Gaussian model: layers of normal latents, the deepest a standard normal.

    .. math::
        z_{nL} \sim N(0, I), \qquad
        z_{nl} \mid z_{n,l+1} \sim N(f_l(z_{n,l+1}), \mathrm{diag}(\sigma_l^2)), \qquad
        x_n \mid z_{n1} \sim p(x \mid f_0(z_{n1}))

    The networks :math:`f_l` and the standard deviations :math:`\sigma_l` are learned. With one
    layer this is a VAE. With linear networks and a Gaussian likelihood all is normal: x is then a
    factor analysis with the composite loadings :math:`W_0 W_1 \cdots` and correlated noise.

    Source: Rezende, Mohamed & Wierstra (2014), eq. 1 to 4.

    Args:
        x_dim: Size of a row.
        z_dims: Sizes of the layers, the one nearest to x first.
        decoders: The networks :math:`f_0, \dots, f_{L-1}`, one per layer: the first from
            ``(*, z_dims[0])`` to ``(*, likelihood.num_outputs(x_dim))``, the next from
            ``(*, z_dims[1])`` to ``(*, z_dims[0])``, and so on.
        likelihood: From the first network's output to p(x | z_1).

    Shapes:
        ``x``: ``(batch, x_dim)``; site ``"z_l"``: ``(batch, z_dims[l - 1])``, from ``"z_1"``
        nearest to x to ``"z_L"``. The only site of one layer is ``"z"``.

    Raises:
        ValueError: If sizes and networks do not go together; on a call with rows of another size,
            or outside of the likelihood's support.

    Example:
        >>> from ppvae.likelihoods import Bernoulli
        >>> from ppvae.nn import MLP
        >>> decoders = [MLP(4, [16], 64), MLP(2, [16], 4)]
        >>> model = DeepLatentGaussian(64, (4, 2), decoders, Bernoulli())
        >>> model.sites
        ('z_1', 'z_2')
        >>> model(size=3).shape
        torch.Size([3, 64])
    """

    def __init__(
        self,
        x_dim: int,
        z_dims: Sequence[int],
        decoders: Sequence[nn.Module],
        likelihood: Likelihood,
    ) -> None:
        super().__init__()
        self.x_dim, self.z_dims = x_dim, tuple(z_dims)
        self.sites = layer_sites(self.z_dims)
        if x_dim < 1:
            raise ValueError(f"x_dim must be positive; got {x_dim}.")
        if len(decoders) != len(self.z_dims):
            raise ValueError(
                f"decoders: expected a network for each of the {len(self.z_dims)} layers of "
                f"z_dims={self.z_dims}; got {len(decoders)}."
            )
        self.likelihood = likelihood
        self.decoders = nn.ModuleList(decoders)
        outputs = (likelihood.num_outputs(x_dim), *self.z_dims[:-1])
        for number, (decoder, size, expected) in enumerate(
            zip(decoders, self.z_dims, outputs, strict=True)
        ):
            _check_decoder(decoder, number, size, expected)
        for number, size in enumerate(self.z_dims[:-1], start=1):
            scale = self._zeros(size) + 1.0
            setattr(self, f"scale_{number}", PyroParam(scale, constraints.positive))

    def _zeros(self, size: int) -> Tensor:
        start = next(self.decoders.parameters(), torch.zeros(()))
        return start.new_zeros(size)

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The generative process: rows ``x`` to condition on, or ``size`` rows to draw."""
        batch = plate_size(type(self).__name__, x, size, event_shape=(self.x_dim,))
        if x is not None and is_validation_enabled():
            self.likelihood.check(x)
        loc = self._zeros(self.z_dims[-1])
        scales = [getattr(self, f"scale_{n}") for n in range(1, len(self.z_dims))]
        with pyro.plate("data", batch, dim=-1):
            for number in reversed(range(len(self.z_dims))):
                top = number == len(self.z_dims) - 1
                scale = torch.ones_like(loc) if top else scales[number]
                prior = dist.Normal(loc, scale.expand(loc.shape)).to_event(1)
                loc = self.decoders[number](pyro.sample(self.sites[number], prior))
            return pyro.sample("x", self.likelihood.distribution(loc), obs=x)

    def decode(self, z: Tensor) -> Tensor:
        """The mean of x given the latent nearest to it, ``(*, x_dim)``, without gradient.

        With a `Categorical` likelihood the probabilities of the categories, ``(*, x_dim, K)``.
        """
        with torch.no_grad():
            return self.likelihood.mean(self.decoders[0](z))

    def __repr__(self) -> str:
        return (
            f"DeepLatentGaussian(x_dim={self.x_dim}, z_dims={self.z_dims}, "
            f"decoders={list(self.decoders)}, likelihood={self.likelihood!r})"
        )


def layer_sites(z_dims: Sequence[int]) -> tuple[str, ...]:
    """The latent sites of layers with these sizes, the one nearest to x first.

    Raises:
        ValueError: If there is no layer, or a size is not positive.

    Example:
        >>> layer_sites((4, 2)), layer_sites((3,))
        (('z_1', 'z_2'), ('z',))
    """
    if len(z_dims) < 1 or min(z_dims) < 1:
        raise ValueError(
            f"z_dims: expected the size of at least one layer, each positive; got {tuple(z_dims)}."
        )
    if len(z_dims) == 1:
        return ("z",)
    return tuple(f"z_{number}" for number in range(1, len(z_dims) + 1))


def _check_decoder(decoder: nn.Module, number: int, size: int, expected: int) -> None:
    with evaluation_mode(decoder), torch.no_grad():
        start = next(decoder.parameters(), torch.zeros(()))
        output = decoder(start.new_zeros(2, size))
    if tuple(output.shape) != (2, expected):
        raise ValueError(
            f"decoders[{number}]: expected outputs of shape (batch, {expected}) for inputs of "
            f"shape (batch, {size}); got (batch, {', '.join(map(str, output.shape[1:]))})."
        )
