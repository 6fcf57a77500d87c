"""Ready-made (model, guide) pairs: what people import.

Each works with `pyro.infer.SVI` under `Trace_ELBO` and `TraceMeanField_ELBO`, with `Predictive`,
and with `ppvae.fit`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro import poutine
from torch import nn

from ppvae.density import judging, read_model
from ppvae.families import DiagonalNormal, Family, LogNormal
from ppvae.guides import Amortized
from ppvae.likelihoods import Bernoulli, Gaussian, Likelihood
from ppvae.models import PPCA, VAE, ExponentialGaussian, FactorAnalysis
from ppvae.nn import MLP


def _checked(model: nn.Module, family: Family) -> None:
    """Refuse a family that does not fit the model's latent, before anything is trained."""
    drawn = torch.zeros(0)
    with judging(0, drawn, model), torch.no_grad():
        sites = read_model(model, poutine.block(model)(size=2))
    (site,) = sites.latents.values()
    family.check_site(site)


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
    _checked(model, family)
    return model, Amortized(family, MLP(1, hidden, family.num_params))


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
    _checked(model, family)
    return model, Amortized(family, MLP(x_dim, hidden, family.num_params))


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
    _checked(model, family)
    return model, Amortized(family, MLP(x_dim, hidden, family.num_params))


def vae(
    x_dim: int = 784,
    z_dim: int = 20,
    hidden: Sequence[int] = (400,),
    likelihood: str | Likelihood = "bernoulli",
    family: Family | None = None,
    *,
    activation: type[nn.Module] = nn.ELU,
) -> tuple[VAE, Amortized]:
    """A variational autoencoder of multilayer perceptrons (Kingma & Welling 2014).

    Args:
        x_dim: Size of a row.
        z_dim: Size of its latent.
        hidden: Widths of the encoder's hidden layers; the decoder has them in reverse.
        likelihood: ``"bernoulli"`` for rows of 0 and 1, ``"gaussian"`` for real rows with one
            learned scale, or a `ppvae.likelihoods.Likelihood`.
        family: `DiagonalNormal(z_dim)` if left out.
        activation: Class of the activation between layers. ``torch.nn.Tanh`` with
            ``Gaussian.network()`` is the Gaussian MLP of that paper's appendix C.2.

    Raises:
        ValueError: If the family's support or shape is not the model's, or the likelihood is
            unknown.

    Example:
        >>> model, guide = vae(x_dim=64, z_dim=8, hidden=[100])
        >>> guide
        Amortized(DiagonalNormal(8), MLP(64 -> 100 -> 16, ELU), site='z')
    """
    if isinstance(likelihood, str):
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(
                f"likelihood: expected 'bernoulli', 'gaussian' or a Likelihood; got {likelihood!r}."
            )
        likelihood = Bernoulli() if likelihood == "bernoulli" else Gaussian.learned()
    decoder = MLP(z_dim, list(hidden)[::-1], likelihood.num_outputs(x_dim), activation)
    model = VAE(x_dim, z_dim, decoder, likelihood)
    family = DiagonalNormal(z_dim) if family is None else family
    _checked(model, family)
    return model, Amortized(family, MLP(x_dim, hidden, family.num_params, activation))
