"""Pairs whose model has an exact evidence and posterior."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ppvae.families import Categorical, DiagonalNormal, Family, LogNormal
from ppvae.guides import Amortized
from ppvae.models import (
    PPCA,
    ExponentialGaussian,
    FactorAnalysis,
    GaussianMixture,
    LinearStateSpace,
)
from ppvae.nn import MLP
from ppvae.pairs.building import amortized


def exponential_gaussian(
    family: Family | None = None, *, hidden: Sequence[int] = (32, 32)
) -> tuple[ExponentialGaussian, Amortized]:
    """z ~ Exponential(1), x | z ~ Normal(z, 1), with a small encoder.

    Args:
        family: A family on z > 0 for a scalar latent, `LogNormal` if left out.
        hidden: Widths of the encoder's hidden layers.

    Raises:
        ValueError: If the family's support or shape is not the model's.

    Example:
        >>> model, guide = exponential_gaussian()
        >>> guide
        Amortized(LogNormal(), MLP(1 -> 32 -> 32 -> 2, ELU), site='z')
    """
    model = ExponentialGaussian()
    family = LogNormal() if family is None else family
    return model, amortized(model, family, MLP(1, hidden, family.num_params))


def factor_analysis(
    x_dim: int = 6, z_dim: int = 3, family: Family | None = None, *, hidden: Sequence[int] = ()
) -> tuple[FactorAnalysis, Amortized]:
    """Factor analysis with a linear encoder, which can reach every row's optimum.

    Args:
        x_dim: Size of a row.
        z_dim: Size of its latent.
        family: `DiagonalNormal(z_dim)` if left out; `FullRankNormal(z_dim)` holds the posterior.
        hidden: Widths of the encoder's hidden layers, none by default.

    Raises:
        ValueError: If the family's support or shape is not the model's.

    Example:
        >>> model, guide = factor_analysis(x_dim=6, z_dim=3)
        >>> model
        FactorAnalysis(x_dim=6, z_dim=3)
    """
    model = FactorAnalysis(x_dim, z_dim)
    family = DiagonalNormal(z_dim) if family is None else family
    return model, amortized(model, family, MLP(x_dim, hidden, family.num_params))


def ppca(
    x_dim: int = 6, z_dim: int = 3, family: Family | None = None, *, hidden: Sequence[int] = ()
) -> tuple[PPCA, Amortized]:
    """Probabilistic PCA with a linear encoder, which can reach every row's optimum.

    Args:
        x_dim: Size of a row.
        z_dim: Size of its latent.
        family: `DiagonalNormal(z_dim)` if left out; `FullRankNormal(z_dim)` holds the posterior.
        hidden: Widths of the encoder's hidden layers, none by default.

    Raises:
        ValueError: If the family's support or shape is not the model's.

    Example:
        >>> model, guide = ppca(x_dim=5, z_dim=2)
        >>> guide.family
        DiagonalNormal(2)
    """
    model = PPCA(x_dim, z_dim)
    family = DiagonalNormal(z_dim) if family is None else family
    return model, amortized(model, family, MLP(x_dim, hidden, family.num_params))


def gaussian_mixture(
    x_dim: int = 2,
    num_components: int = 3,
    *,
    full_covariance: bool = False,
    hidden: Sequence[int] = (32,),
) -> tuple[GaussianMixture, Amortized]:
    """A mixture of Gaussians, with an encoder that puts out a logit for each component.

    A categorical latent has no reparameterised draws: train the pair with
    ``loss=TraceEnum_ELBO(max_plate_nesting=1)`` and the guide ``config_enumerate(guide)``, which
    sums over the components, or with ``loss=TraceGraph_ELBO()``, which draws them.

    Args:
        x_dim: Size of a row.
        num_components: Number of components.
        full_covariance: Whether the components have full covariances.
        hidden: Widths of the encoder's hidden layers.

    Raises:
        ValueError: If a size is too small.

    Example:
        >>> from pyro.infer import TraceEnum_ELBO, config_enumerate
        >>> import ppvae
        >>> model, guide = gaussian_mixture()
        >>> x, loss = model(size=100), TraceEnum_ELBO(max_plate_nesting=1)
        >>> enumerated = config_enumerate(guide)
        >>> ppvae.fit(model, enumerated, x, loss=loss, steps=5, progress=False).status
        'completed 5 steps'
    """
    model = GaussianMixture(x_dim, num_components, full_covariance=full_covariance)
    return model, amortized(model, Categorical(num_components), MLP(x_dim, hidden, num_components))


def linear_state_space(
    num_steps: int = 8,
    x_dim: int = 2,
    z_dim: int = 2,
    family: Family | None = None,
    *,
    hidden: Sequence[int] = (),
) -> tuple[LinearStateSpace, Amortized]:
    """A linear Gaussian state space with a linear encoder of the whole series.

    The mean of the posterior is linear in the series and its covariance is the same for all, so
    that the encoder can reach every row's optimum.

    Args:
        num_steps: Length of a series.
        x_dim: Size of an observation.
        z_dim: Size of a state.
        family: A family over the path, of size ``num_steps * z_dim``: `DiagonalNormal` if left
            out. `BlockNormal` keeps what is inside of its blocks, such as one per step;
            `FullRankNormal` holds the posterior.
        hidden: Widths of the encoder's hidden layers, none by default.

    Raises:
        ValueError: If a size is too small, or the family's support or shape is not the model's.

    Example:
        >>> model, guide = linear_state_space(num_steps=4, x_dim=3, z_dim=2)
        >>> guide.family
        DiagonalNormal(8)
    """
    model = LinearStateSpace(num_steps, x_dim, z_dim)
    family = DiagonalNormal(num_steps * z_dim) if family is None else family
    encoder = nn.Sequential(nn.Flatten(), MLP(num_steps * x_dim, hidden, family.num_params))
    return model, amortized(model, family, encoder)
