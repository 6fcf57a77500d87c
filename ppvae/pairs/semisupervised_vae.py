"""Variational autoencoders with classes, some of which are known."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ppvae.classification import SemisupervisedEncoder
from ppvae.families import Categorical, DiagonalNormal, Family, Given
from ppvae.guides import Amortized
from ppvae.likelihoods import Likelihood
from ppvae.models import SemisupervisedVAE
from ppvae.nn import MLP, MLPByClass
from ppvae.pairs.building import amortized, likelihood_of


def semisupervised_vae(
    x_dim: int = 64,
    z_dim: int = 8,
    num_classes: int = 10,
    hidden: Sequence[int] = (100,),
    likelihood: str | Likelihood = "bernoulli",
    family: Family | None = None,
    *,
    labelled: float = 0.5,
    activation: type[nn.Module] = nn.ELU,
) -> tuple[SemisupervisedVAE, Amortized]:
    r"""Model M2 of Kingma, Rezende, Mohamed & Welling (2014), of multilayer perceptrons.

    The guide is :math:`q(y \mid x)\, q(z \mid x, y)`: a `Categorical` whose network is the
    classifier, and a normal for every class. A labelled row has the normal of its label.

    Args:
        x_dim: Number of pixels; a row has ``x_dim + 1`` columns, the last one for the label.
        z_dim: Size of the latent z.
        num_classes: Number of classes.
        hidden: Widths of the hidden layers of the classifier and of the encoder of z; the decoder
            has them in reverse.
        likelihood: ``"bernoulli"`` for pixels of 0 and 1, ``"gaussian"`` for real ones with one
            learned scale, or a `ppvae.likelihoods.Likelihood`.
        family: Family of z given y, `DiagonalNormal(z_dim)` if left out.
        labelled: Share of labelled rows among those that ``model(size=n)`` draws.
        activation: Class of the activation between layers.

    Raises:
        ValueError: If the family's support or shape is not that of z, or the likelihood is
            unknown.

    Example:
        >>> import torch, ppvae
        >>> from ppvae.objectives import SemisupervisedELBO
        >>> model, guide = semisupervised_vae(x_dim=6, z_dim=2, num_classes=3, hidden=[8])
        >>> x = model.rows(torch.ones(4, 6), torch.tensor([0, 2, -1, -1]))
        >>> loss = SemisupervisedELBO(alpha=1.0)
        >>> ppvae.fit(model, guide, x, loss=loss, steps=5, progress=False).status
        'completed 5 steps'
    """
    likelihood = likelihood_of(likelihood)
    outputs = likelihood.num_outputs(x_dim)
    decoder = MLP(num_classes + z_dim, list(hidden)[::-1], outputs, activation)
    model = SemisupervisedVAE(x_dim, z_dim, num_classes, decoder, likelihood, labelled=labelled)
    family = DiagonalNormal(z_dim) if family is None else family
    encoder = SemisupervisedEncoder(
        MLP(x_dim, hidden, num_classes, activation),
        MLPByClass(x_dim, num_classes, hidden, family.num_params, activation),
    )
    families = {"y": Categorical(num_classes), "z": Given("y", num_classes, family)}
    return model, amortized(model, families, encoder)
