r"""Reconstruction alone: a code for every row, and no distribution over codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ppvae.density import NoLikelihoodError
from ppvae.isolation import OwnedModule
from ppvae.likelihoods import Likelihood


class Autoencoder(OwnedModule):
    r"""An encoder and a decoder that are trained to give a row back.

    .. math:: z_n = e(x_n), \qquad \max \; \sum_n \log p(x_n \mid d(z_n))

    There is no prior over the code z, hence no log p(x), nothing to draw from, and no posterior:
    with `ppvae.models.VAE` the same two networks have all three. Train it with
    `ppvae.fit_autoencoder`.

    Source: Rumelhart, Hinton & Williams (1986); Hinton & Salakhutdinov (2006).

    Args:
        encoder: e, from rows ``(*, x_dim)`` to codes ``(*, z_dim)``.
        decoder: d, from codes to ``(*, likelihood.num_outputs(x_dim))``.
        likelihood: From the decoder's output to a density of the row, which measures the
            reconstruction. ``Gaussian(1.0)`` is half the squared error and a constant.

    Raises:
        NoLikelihoodError: On a call as a Pyro program; it is a `ValueError`.

    Example:
        >>> import torch
        >>> from ppvae.likelihoods import Bernoulli
        >>> from ppvae.nn import MLP
        >>> model = Autoencoder(MLP(64, [32], 2), MLP(2, [32], 64), Bernoulli())
        >>> x = torch.zeros(5, 64)
        >>> model.code(x).shape, model.reconstruct(x).shape
        (torch.Size([5, 2]), torch.Size([5, 64]))
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, likelihood: Likelihood) -> None:
        super().__init__()
        self.encoder, self.decoder, self.likelihood = encoder, decoder, likelihood

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Refused: an autoencoder is no generative process."""
        raise NoLikelihoodError(
            "no likelihood: an Autoencoder has no prior over its code, hence no log p(x), nothing "
            "to draw from and no ELBO or gap. What works: model.code(x), model.decode(z), "
            "model.reconstruct(x), model.log_likelihood(x), and ppvae.fit_autoencoder to train "
            "it. For a density give the same networks to ppvae.models.VAE and "
            "ppvae.guides.Amortized, or use ppvae.pairs.vae."
        )

    def log_likelihood(self, x: Tensor) -> Tensor:
        """How well rows are given back, log p(x | d(e(x))) in nats, ``(batch,)``.

        Differentiable. It is no bound on anything: a code that copies its row has the best.

        Raises:
            ValueError: If decoder's output is not what the likelihood needs for these rows.
        """
        out = self.decoder(self.encoder(x))
        expected = (*x.shape[:-1], self.likelihood.num_outputs(x.shape[-1]))
        if tuple(out.shape) != expected:
            raise ValueError(
                f"decoder: expected outputs of shape {expected} for {self.likelihood!r} and rows "
                f"of shape {tuple(x.shape)}; got {tuple(out.shape)}."
            )
        log_prob: Tensor = self.likelihood.distribution(out).log_prob(x)
        return log_prob

    def code(self, x: Tensor) -> Tensor:
        """The codes of rows, ``(batch, z_dim)``, without gradient."""
        with torch.no_grad():
            z: Tensor = self.encoder(x)
        return z

    def decode(self, z: Tensor) -> Tensor:
        """The mean of x given codes, ``(*, x_dim)``, without gradient.

        With a `Categorical` likelihood the probabilities of the categories, ``(*, x_dim, K)``.
        """
        with torch.no_grad():
            return self.likelihood.mean(self.decoder(z))

    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of x given the codes of rows, as `decode` gives it, without gradient."""
        return self.decode(self.code(x))

    def __repr__(self) -> str:
        return f"Autoencoder({self.encoder!r}, {self.decoder!r}, {self.likelihood!r})"
