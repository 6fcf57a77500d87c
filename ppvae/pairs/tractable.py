"""Pairs whose model has an exact evidence and posterior."""

from __future__ import annotations

from collections.abc import Sequence

from ppvae.families import DiagonalNormal, Family, LogNormal
from ppvae.guides import Amortized
from ppvae.models import PPCA, ExponentialGaussian, FactorAnalysis
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
