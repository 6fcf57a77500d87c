r"""Several layers of sparse gamma latents under counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints

from ppvae.distributions import PoissonOfRate
from ppvae.isolation import OwnedModule, plate_size
from ppvae.models.deep_latent_gaussian import layer_sites


class DeepExponentialFamily(OwnedModule):
    r"""A sparse gamma deep exponential family with Poisson counts.

    .. math::
        z_{nL} \sim \mathrm{Gamma}(\alpha_L, \beta), \qquad
        z_{nl} \mid z_{n,l+1} \sim
            \mathrm{Gamma}(\alpha_l, \alpha_l / (W_l z_{n,l+1} + \epsilon)), \qquad
        x_n \mid z_{n1} \sim \mathrm{Poisson}(W_0 z_{n1} + \epsilon)

    Gamma distributions are given by shape and rate: layer l has mean :math:`W_l z_{l+1} +
    \epsilon`. A shape below 1 makes a latent sparse, most of it near zero. The weights are
    positive and learned. With one latent of one element and :math:`\epsilon = 0`, counts are
    negative binomial and the posterior is a gamma distribution. With up to two latent elements
    `ppvae.quadrature` has the evidence to the error that it reports, in float64; that error grows
    as the shape falls, and is infinite at small shapes.

    A gamma variable of shape 0.1 and rate 1 is below the smallest normal number of float32,
    1.2e-38, about twice in ten thousand draws. Torch puts such a draw at that number (divided by
    the rate, if that is larger), where all densities are finite. The share of these draws grows
    fast as the shape falls; in float64, with 2.2e-308, it is 1e-31 at shape 0.1, so that shapes
    below about 0.1 need float64.

    Source: Ranganath, Tang, Charlin & Blei (2015), section 3.1.

    Args:
        x_dim: Size of a row.
        z_dims: Sizes of the layers, the one nearest to x first.
        shape: α, one for all layers or one for each, the one nearest to x first.
        rate: β of the deepest layer; its shape if left out, so that its mean is 1.
        weights: :math:`W_0, \dots, W_{L-1}`, the first ``(x_dim, z_dims[0])``, the next
            ``(z_dims[0], z_dims[1])``, and so on. Learned from a random start, with rows that sum
            to about 1, if left out; given values are held fixed.
        background: ε, a small number that keeps all means away from zero.

    Shapes:
        ``x``: ``(batch, x_dim)``, counts as floating point numbers; site ``"z_l"``:
        ``(batch, z_dims[l - 1])``, from ``"z_1"`` nearest to x to ``"z_L"``. The only site of one
        layer is ``"z"``.

    Raises:
        ValueError: If a size, shape, rate or weight is out of range; on a call with rows of
            another size, or with negative or fractional counts.

    Example:
        >>> model = DeepExponentialFamily(20, (6, 3))
        >>> model
        DeepExponentialFamily(x_dim=20, z_dims=(6, 3), shape=(0.3, 0.3))
        >>> model(size=5).shape
        torch.Size([5, 20])
    """

    def __init__(
        self,
        x_dim: int,
        z_dims: Sequence[int],
        *,
        shape: float | Sequence[float] = 0.3,
        rate: float | None = None,
        weights: Sequence[Tensor] | None = None,
        background: float = 1e-6,
    ) -> None:
        super().__init__()
        self.x_dim, self.z_dims = x_dim, tuple(z_dims)
        self.sites = layer_sites(self.z_dims)
        layers = len(self.z_dims)
        self.shape = tuple(shape) if isinstance(shape, Sequence) else (float(shape),) * layers
        self.rate = self.shape[-1] if rate is None and self.shape else rate
        self.background = background
        if x_dim < 1:
            raise ValueError(f"x_dim must be positive; got {x_dim}.")
        if len(self.shape) != layers or not min(self.shape) > 0:
            raise ValueError(
                f"shape: expected a positive number, or one for each of the {layers} layers; got "
                f"{shape}."
            )
        if not self.rate or not self.rate > 0 or not background >= 0:
            raise ValueError(
                f"rate must be positive and background not negative; got {rate} and {background}."
            )
        sizes = list(zip((x_dim, *self.z_dims), self.z_dims, strict=False))
        if weights is not None and [tuple(w.shape) for w in weights] != sizes:
            raise ValueError(
                f"weights: expected tensors of shapes {sizes}, from x upwards; got "
                f"{[tuple(w.shape) for w in weights]}."
            )
        for number, (out, into) in enumerate(sizes):
            start = (torch.rand(out, into) + 0.5) / into
            given = start if weights is None else weights[number].detach().clone()
            if not bool((given > 0).all()):
                raise ValueError(f"weights[{number}]: expected positive numbers.")
            setattr(self, f"weight_{number}", PyroParam(given, constraints.positive))
            if weights is not None:
                unconstrained: Any = getattr(self, f"weight_{number}_unconstrained")
                unconstrained.requires_grad_(False)

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The generative process: rows ``x`` to condition on, or ``size`` rows to draw."""
        batch = plate_size(type(self).__name__, x, size, event_shape=(self.x_dim,))
        if x is not None and is_validation_enabled():
            _check_counts(x)
        weights = [getattr(self, f"weight_{n}") for n in range(len(self.z_dims))]
        top = weights[0].new_full((self.z_dims[-1],), self.shape[-1])
        prior = dist.Gamma(top, torch.full_like(top, float(self.rate or 1.0)))
        with pyro.plate("data", batch, dim=-1):
            for number in reversed(range(len(self.z_dims))):
                z = pyro.sample(self.sites[number], prior.to_event(1))
                mean = self._mean(z, weights[number])
                if number:
                    shape = torch.full_like(mean, self.shape[number - 1])
                    prior = dist.Gamma(shape, shape / mean)
            return pyro.sample("x", PoissonOfRate(mean).to_event(1), obs=x)

    def _mean(self, z: Tensor, weight: Tensor) -> Tensor:
        # Without a background the product of two small numbers may be no number but 0.
        least = torch.finfo(z.dtype).tiny * (1 + max(self.shape))
        mean: Tensor = (z @ weight.mT + self.background).clamp(min=least)
        return mean

    def decode(self, z: Tensor) -> Tensor:
        """The mean of x given the latent nearest to it, ``(*, x_dim)``, without gradient."""
        with torch.no_grad():
            return self._mean(z, self.weight_0)

    def __repr__(self) -> str:
        return (
            f"DeepExponentialFamily(x_dim={self.x_dim}, z_dims={self.z_dims}, shape={self.shape})"
        )


def _check_counts(x: Tensor) -> None:
    counts = (x >= 0) & (x == x.round())
    if not bool(counts.all()):
        raise ValueError(
            f'Site "x": a Poisson likelihood is a probability of counts 0, 1, 2, … alone; got '
            f"{int((~counts).sum())} other values of {x.numel()} (the first: "
            f"{float(x[~counts][0]):.4g}). Pass counts, as floating point numbers."
        )
