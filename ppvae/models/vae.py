r"""The decoder of a variational autoencoder as a generative process."""

from __future__ import annotations

import pyro
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from ppvae.isolation import OwnedModule, evaluation_mode, plate_size
from ppvae.likelihoods import Likelihood
from ppvae.priors import Prior, StandardNormal


class VAE(OwnedModule):
    r"""A latent decoded into the parameters of a likelihood.

    .. math:: z_n \sim p(z), \qquad x_n \mid z_n \sim p(x \mid \mathrm{NN}_\theta(z_n))

    Source: Kingma & Welling (2014).

    Args:
        x_dim: Size of a row.
        z_dim: Size of its latent.
        decoder: From ``(*, z_dim)`` to ``(*, likelihood.num_outputs(x_dim))``, any number of
            leading dimensions.
        likelihood: From the decoder's output to p(x | z).
        prior: p(z), the standard normal if left out; see `ppvae.priors`.

    Shapes:
        ``x``: ``(batch, x_dim)``; ``z``: ``(batch, z_dim)``.

    Raises:
        ValueError: On a call with rows of another size, or outside of the likelihood's support.

    Example:
        >>> from ppvae.likelihoods import Bernoulli
        >>> from ppvae.nn import MLP
        >>> model = VAE(64, 8, MLP(8, [100], 64), Bernoulli())
        >>> model(size=3).shape
        torch.Size([3, 64])
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        decoder: nn.Module,
        likelihood: Likelihood,
        prior: Prior | None = None,
    ) -> None:
        super().__init__()
        if x_dim < 1 or z_dim < 1:
            raise ValueError(f"x_dim and z_dim must be positive; got {x_dim} and {z_dim}.")
        self.x_dim, self.z_dim = x_dim, z_dim
        self.decoder = decoder
        self.likelihood = likelihood
        with evaluation_mode(decoder), torch.no_grad():
            start = next((p for p in decoder.parameters()), torch.zeros(()))
            self.prior = StandardNormal(z_dim).to(start) if prior is None else prior
            output = decoder(start.new_zeros(2, z_dim))
        if not isinstance(self.prior, Prior) or self.prior.z_dim != z_dim:
            raise ValueError(
                f"prior: expected a ppvae.priors.Prior over a latent of size {z_dim}; got "
                f"{prior!r}."
            )
        expected = (2, likelihood.num_outputs(x_dim))
        if tuple(output.shape) != expected:
            raise ValueError(
                f"decoder: expected outputs of shape (batch, {expected[1]}) for {likelihood!r} "
                f"and x_dim={x_dim}; got (batch, {', '.join(map(str, output.shape[1:]))})."
            )

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The generative process: rows ``x`` to condition on, or ``size`` rows to draw."""
        batch = plate_size(type(self).__name__, x, size, event_shape=(self.x_dim,))
        if x is not None and is_validation_enabled():
            self.likelihood.check(x)
        with pyro.plate("data", batch, dim=-1):
            z = pyro.sample("z", self.prior.distribution())
            return pyro.sample("x", self.likelihood.distribution(self.decoder(z)), obs=x)

    def decode(self, z: Tensor) -> Tensor:
        """The mean of x given z, ``(*, x_dim)``, without gradient.

        With a `Categorical` likelihood the probabilities of the categories, ``(*, x_dim, K)``.
        """
        with torch.no_grad():
            return self.likelihood.mean(self.decoder(z))

    def __repr__(self) -> str:
        prior = "" if isinstance(self.prior, StandardNormal) else f", prior={self.prior!r}"
        return (
            f"VAE(x_dim={self.x_dim}, z_dim={self.z_dim}, decoder={self.decoder!r}, "
            f"likelihood={self.likelihood!r}{prior})"
        )
