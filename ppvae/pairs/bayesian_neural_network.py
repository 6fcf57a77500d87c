"""Bayesian neural networks, and networks with latent inputs."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.families import DiagonalNormal, DistributionFamily, Family
from ppvae.guides import Amortized
from ppvae.models import BayesianNeuralNetwork, LatentInputNetwork
from ppvae.nn import MLP
from ppvae.pairs.building import amortized
from ppvae.shared import Shared

# Of the prior's standard deviation: how far the guide's starts from its own mean.
_START = 0.1


def bayesian_neural_network(
    x_dim: int = 1,
    y_dim: int = 1,
    hidden: Sequence[int] = (20,),
    *,
    latent_dim: int = 0,
    rank: int | None = None,
    prior_scale: float = 1.0,
    noise: Tensor | float | None = None,
    num_data: int | None = None,
    activation: type[nn.Module] = nn.Tanh,
    encoder_hidden: Sequence[int] = (32,),
) -> tuple[BayesianNeuralNetwork, Shared]:
    r"""A network with a distribution over its weights, which all rows share.

    The guide is normal over all weights, :math:`N(\mu, \mathrm{diag}(d) + F F^\top)`: mean field,
    or with a factor F of some columns. It starts at a draw from the prior with a tenth of the
    prior's standard deviations. Train it with `ppvae.fit` or `pyro.infer.SVI`; there is nothing
    to amortize but the latent inputs, if there are any.

    Args:
        x_dim: Number of inputs.
        y_dim: Number of targets.
        hidden: Widths of the hidden layers.
        latent_dim: Size of the latent inputs of a row; their guide is amortized.
        rank: Number of columns of F; mean field if left out.
        prior_scale: Standard deviation of the weights times the root of their fan-in.
        noise: Standard deviations of the targets; learned from 1 if left out.
        num_data: Number of data, if they come in minibatches; all rows come at once if left out.
        activation: Class of the activation between layers.
        encoder_hidden: Widths of the hidden layers of the latent inputs' encoder.

    Raises:
        ValueError: If a size is out of range.

    Example:
        >>> model, guide = bayesian_neural_network(hidden=(8,))
        >>> guide
        Shared(DiagonalNormal(25), site='weights')
    """
    model = BayesianNeuralNetwork(
        x_dim,
        y_dim,
        hidden,
        latent_dim=latent_dim,
        prior_scale=prior_scale,
        noise=noise,
        num_data=num_data,
        activation=activation,
    )
    count, sd = model.num_weights, model.prior_sd
    loc, scale = sd * torch.randn(count), _START * sd
    family: Family
    if rank is None:
        family = DiagonalNormal(count)
        member = dist.Normal(loc, scale).to_event(1)
    else:
        if not 1 <= rank <= count:
            raise ValueError(f"rank must be between 1 and the {count} weights; got {rank}.")
        family = DistributionFamily(
            dist.LowRankMultivariateNormal,
            {"loc": (count,), "cov_factor": (count, rank), "cov_diag": (count,)},
        )
        # At F = 0 its gradient is 0 too.
        factor = _START * sd[:, None] * torch.randn(count, rank) / rank**0.5
        member = dist.LowRankMultivariateNormal(loc, factor, scale**2)
    local = None
    if latent_dim:
        latent = DiagonalNormal(latent_dim)
        local = Amortized(latent, MLP(x_dim + y_dim, encoder_hidden, latent.num_params))
    guide = Shared(family, local=local, num_data=num_data)
    with torch.no_grad():
        guide.params.copy_(family.params_of(member))
    return model, guide


def latent_input_network(
    x_dim: int = 1,
    y_dim: int = 1,
    latent_dim: int = 1,
    hidden: Sequence[int] = (20,),
    family: Family | None = None,
    *,
    noise: Tensor | float | None = None,
    activation: type[nn.Module] = nn.Tanh,
    encoder_hidden: Sequence[int] = (32,),
) -> tuple[LatentInputNetwork, Amortized]:
    """A network with latent inputs, its weights at one value, and an encoder of whole rows.

    Args:
        x_dim: Number of inputs.
        y_dim: Number of targets.
        latent_dim: Size of a row's latent.
        hidden: Widths of the network's hidden layers; none makes the evidence exact.
        family: `DiagonalNormal(latent_dim)` if left out.
        noise: Standard deviations of the targets; learned from 1 if left out.
        activation: Class of the activation between the network's layers.
        encoder_hidden: Widths of the encoder's hidden layers.

    Raises:
        ValueError: If a size is out of range, or the family's support or shape is not the model's.

    Example:
        >>> model, guide = latent_input_network()
        >>> guide
        Amortized(DiagonalNormal(1), MLP(2 -> 32 -> 2, ELU), site='z')
    """
    model = LatentInputNetwork(x_dim, y_dim, latent_dim, hidden, noise=noise, activation=activation)
    family = DiagonalNormal(latent_dim) if family is None else family
    encoder = MLP(x_dim + y_dim, encoder_hidden, family.num_params)
    return model, amortized(model, family, encoder)
