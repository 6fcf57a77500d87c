"""Variational autoencoders."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ppvae.families import DiagonalNormal, Family
from ppvae.guides import Amortized
from ppvae.likelihoods import Bernoulli, Gaussian, Likelihood
from ppvae.models import VAE
from ppvae.nn import MLP
from ppvae.pairs.building import amortized


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
    return model, amortized(model, family, MLP(x_dim, hidden, family.num_params, activation))
