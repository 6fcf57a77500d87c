"""Variational autoencoders."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ppvae.families import DiagonalNormal, Family
from ppvae.guides import Amortized
from ppvae.likelihoods import Bernoulli, Gaussian, Likelihood
from ppvae.models import VAE
from ppvae.nn import MLP, ConvDecoder, ConvEncoder, LogCounts
from ppvae.pairs.building import amortized, likelihood_of
from ppvae.priors import Prior, VampPrior


def vae(
    x_dim: int = 784,
    z_dim: int = 20,
    hidden: Sequence[int] = (400,),
    likelihood: str | Likelihood = "bernoulli",
    family: Family | None = None,
    *,
    activation: type[nn.Module] = nn.ELU,
    image_shape: tuple[int, int, int] | None = None,
    channels: Sequence[int] | None = None,
    prior: Prior | None = None,
    pseudo_inputs: int | Tensor | None = None,
) -> tuple[VAE, Amortized]:
    """A variational autoencoder of multilayer perceptrons (Kingma & Welling 2014), or of images.

    Args:
        x_dim: Size of a row.
        z_dim: Size of its latent.
        hidden: Widths of the encoder's hidden layers; the decoder has them in reverse.
        likelihood: ``"bernoulli"`` for rows of 0 and 1, ``"gaussian"`` for real rows with one
            learned scale, or a `ppvae.likelihoods.Likelihood`. Where that is one of counts, the
            encoder reads log(1 + x).
        family: `DiagonalNormal(z_dim)` if left out.
        activation: Class of the activation between layers. ``torch.nn.Tanh`` with
            ``Gaussian.network()`` is the Gaussian MLP of that paper's appendix C.2.
        image_shape: Channels, height and width of an image, whose product is ``x_dim``, for
            convolutional networks (`ConvEncoder`, `ConvDecoder`); the rows stay flat. Height and
            width are multiples of ``2 ** len(channels)``.
        channels: Number of channels after each of the encoder's convolutions, (16, 32) if left
            out; the decoder has them in reverse.
        prior: p(z), the standard normal if left out; see `ppvae.priors`.
        pseudo_inputs: For a `VampPrior` with the guide's own encoder and family: the rows at
            which its pseudo-inputs start, ``(K, x_dim)``, such as some of the data; or a number of
            them, which start at random. They are kept in [0, 1] for a Bernoulli likelihood.

    Raises:
        ValueError: If the family's support or shape is not the model's, the likelihood is
            unknown, ``image_shape`` is not that of rows of size ``x_dim`` or cannot be halved so
            often, ``channels`` come without it, the prior is over another latent, both ``prior``
            and ``pseudo_inputs`` are given, or the latter with a likelihood that is neither
            Bernoulli nor Gaussian.

    Example:
        >>> model, guide = vae(x_dim=64, z_dim=8, hidden=[100])
        >>> guide
        Amortized(DiagonalNormal(8), MLP(64 -> 100 -> 16, ELU), site='z')
        >>> model, guide = vae(64, 8, [100], image_shape=(1, 8, 8), channels=[4, 8])
        >>> guide.encoder
        ConvEncoder(1 x 8 x 8 -> 4 x 4 x 4 -> 8 x 2 x 2 -> 100 -> 16, ELU)
    """
    likelihood = likelihood_of(likelihood)
    if prior is not None and pseudo_inputs is not None:
        raise ValueError(
            f"prior: pseudo_inputs make a VampPrior, but prior is {prior!r}. Give one of them."
        )
    family = DiagonalNormal(z_dim) if family is None else family
    outputs, back = likelihood.num_outputs(x_dim), list(hidden)[::-1]
    decoder: nn.Module
    encoder: nn.Module
    if image_shape is None:
        if channels is not None:
            raise ValueError(
                f"channels={tuple(channels)} are those of convolutions, which need image_shape; "
                f"got None. Give image_shape=(channels, height, width), or leave channels out."
            )
        decoder = MLP(z_dim, back, outputs, activation)
        encoder = MLP(x_dim, hidden, family.num_params, activation)
    else:
        _check_image(image_shape, x_dim, outputs)
        channels = (16, 32) if channels is None else tuple(channels)
        per_pixel = outputs // x_dim
        decoder = ConvDecoder(z_dim, image_shape, per_pixel, channels[::-1], back, activation)
        encoder = ConvEncoder(image_shape, family.num_params, channels, hidden, activation)
    if likelihood.of_counts:
        encoder = LogCounts(encoder)
    if pseudo_inputs is not None:
        if not isinstance(likelihood, Bernoulli | Gaussian):
            raise ValueError(
                f"pseudo_inputs: expected a Bernoulli or a Gaussian likelihood, whose rows can be "
                f"moved smoothly; got {likelihood!r}. Use another prior, such as NormalMixture."
            )
        binary = isinstance(likelihood, Bernoulli)
        rows = _rows(pseudo_inputs, x_dim, binary)
        prior = VampPrior(encoder, family, rows, unit_interval=binary)
    model = VAE(x_dim, z_dim, decoder, likelihood, prior)
    return model, amortized(model, family, encoder)


def _check_image(image_shape: tuple[int, int, int], x_dim: int, outputs: int) -> None:
    size = math.prod(image_shape)
    if size != x_dim:
        raise ValueError(
            f"image_shape: {tuple(image_shape)} is an image of {size} values; got x_dim={x_dim}. "
            f"Give x_dim={size}, or the shape of the rows."
        )
    if outputs % x_dim:
        raise ValueError(
            f"likelihood: convolutions put out equally many values for each element; got "
            f"num_outputs({x_dim}) = {outputs}, no multiple of {x_dim}."
        )


def _rows(pseudo_inputs: int | Tensor, x_dim: int, binary: bool) -> Tensor:
    """Where the pseudo-inputs start."""
    if isinstance(pseudo_inputs, Tensor):
        if pseudo_inputs.dim() != 2 or pseudo_inputs.shape[1] != x_dim:
            raise ValueError(
                f"pseudo_inputs: expected rows of shape (K, {x_dim}), or their number; got "
                f"{tuple(pseudo_inputs.shape)}."
            )
        return pseudo_inputs
    if pseudo_inputs < 1:
        raise ValueError(f"pseudo_inputs must be at least 1; got {pseudo_inputs}.")
    shape = (pseudo_inputs, x_dim)
    return torch.rand(shape) if binary else torch.randn(shape)
