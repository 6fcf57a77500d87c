r"""A model that is known by its draws alone."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.density import NoLikelihoodError
from ppvae.isolation import OwnedModule, evaluation_mode, plate_size


class ImplicitModel(OwnedModule):
    r"""Rows that a network makes of noise; they have draws but no density.

    .. math:: z_n \sim N(0, I), \qquad x_n = G(z_n)

    Nothing is added to G(z), so that p(x | z) is a point and log p(x) is not defined: where
    ``x_dim > z_dim`` the rows fill a surface of volume zero. The model is called with
    ``model(size=n)`` alone, and trained by `ppvae.fit_adversarial`.

    Source: Goodfellow et al. (2014); Mohamed & Lakshminarayanan (2016) for the name.

    Args:
        generator: G, from ``(*, z_dim)`` to ``(*, x_dim)``.
        z_dim: Size of the noise.
        x_dim: Size of a row.

    Shapes:
        ``x``: ``(batch, x_dim)``; ``z``: ``(batch, z_dim)``.

    Raises:
        ValueError: If the generator's output has another size.
        NoLikelihoodError: On a call with rows; it is a `ValueError`.

    Example:
        >>> from ppvae.nn import MLP
        >>> ImplicitModel(MLP(2, [16], 5), z_dim=2, x_dim=5)(size=3).shape
        torch.Size([3, 5])
    """

    def __init__(self, generator: nn.Module, z_dim: int, x_dim: int) -> None:
        super().__init__()
        if x_dim < 1 or z_dim < 1:
            raise ValueError(f"x_dim and z_dim must be positive; got {x_dim} and {z_dim}.")
        self.z_dim, self.x_dim = z_dim, x_dim
        self.generator = generator
        with evaluation_mode(generator):
            shape = tuple(self.decode(self._like().new_zeros(2, z_dim)).shape)
        if shape != (2, x_dim):
            raise ValueError(
                f"generator: expected outputs of shape (batch, {x_dim}) for x_dim={x_dim}; got "
                f"{shape} for a batch of 2."
            )

    def _like(self) -> Tensor:
        return next((p for p in self.generator.parameters()), torch.zeros(()))

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The generative process: ``size`` rows to draw."""
        if x is not None:
            raise NoLikelihoodError(
                "no likelihood: an ImplicitModel draws rows x = G(z) and has no density p(x | z), "
                "so that nothing can be conditioned on rows and no log p(x), ELBO or gap exists. "
                "What works: model(size=n) to draw, ppvae.fit_adversarial to train, "
                "ppvae.plots.samples to look at it. For a density give the same network to "
                "ppvae.models.VAE as its decoder."
            )
        batch = plate_size(type(self).__name__, None, size, event_shape=(self.x_dim,))
        zeros = self._like().new_zeros(self.z_dim)
        with pyro.plate("data", batch, dim=-1):
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            return pyro.deterministic("x", self.generator(z), event_dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """G(z), ``(*, x_dim)``, without gradient."""
        with torch.no_grad():
            out: Tensor = self.generator(z)
        return out

    def __repr__(self) -> str:
        return f"ImplicitModel({self.generator!r}, z_dim={self.z_dim}, x_dim={self.x_dim})"
