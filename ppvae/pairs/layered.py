"""Pairs with several layers of continuous latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ppvae.families import DiagonalNormal, Family, Gamma
from ppvae.guides import Amortized, TopDown
from ppvae.likelihoods import Likelihood
from ppvae.models import DeepExponentialFamily, DeepLatentGaussian
from ppvae.models.deep_latent_gaussian import layer_sites
from ppvae.nn import MLP, BottomUp
from ppvae.pairs.building import amortized, likelihood_of


def deep_latent_gaussian(
    x_dim: int = 64,
    z_dims: Sequence[int] = (4, 2),
    hidden: Sequence[int] = (16,),
    likelihood: str | Likelihood = "bernoulli",
    family: Mapping[str, Family] | None = None,
    *,
    top_down: bool = False,
    activation: type[nn.Module] = nn.ReLU,
) -> tuple[DeepLatentGaussian, Amortized | TopDown]:
    """A deep latent Gaussian model (Rezende, Mohamed & Wierstra 2014) with a layered guide.

    The default guide is bottom-up: the parameters of all layers are functions of x alone, given
    by a deterministic network whose deeper features serve the deeper layers, and the layers are
    independent under q. The top-down guide (`ppvae.guides.TopDown`, Sønderby et al. 2016) draws
    each layer given the one above.

    Args:
        x_dim: Size of a row.
        z_dims: Sizes of the layers, the one nearest to x first.
        hidden: Widths of the hidden layers between two layers of latents, in the model and (from
            x upwards) in the guide; empty for linear maps.
        likelihood: ``"bernoulli"`` for rows of 0 and 1, ``"gaussian"`` for real rows with one
            learned scale, or a `ppvae.likelihoods.Likelihood`. Where that is one of counts, the
            encoder reads log(1 + x).
        family: A family for each latent site, `DiagonalNormal` if left out; of the bottom-up
            guide alone.
        top_down: Whether the guide is top-down; that of one layer is not.
        activation: Class of the activation between layers: ``torch.nn.ReLU``, or
            ``torch.nn.Sigmoid`` for networks W σ(V z).

    Raises:
        ValueError: If the likelihood is unknown, a family's support or shape is not its site's,
            or a family is given to a top-down guide.

    Example:
        >>> model, guide = deep_latent_gaussian(x_dim=64, z_dims=(4, 2))
        >>> guide.families
        {'z_2': DiagonalNormal(2), 'z_1': DiagonalNormal(4)}
        >>> _, ladder = deep_latent_gaussian(x_dim=64, z_dims=(4, 2), top_down=True)
        >>> ladder
        TopDown(BottomUp(64 -> 16 -> 16, outputs (8, 4), ReLU), sites=('z_1', 'z_2'))
    """
    likelihood = likelihood_of(likelihood)
    sites = layer_sites(z_dims)
    outputs = (likelihood.num_outputs(x_dim), *z_dims[:-1])
    decoders = [
        MLP(size, list(hidden)[::-1], out, activation)
        for size, out in zip(z_dims, outputs, strict=True)
    ]
    model = DeepLatentGaussian(x_dim, z_dims, decoders, likelihood)
    if top_down and len(sites) > 1:
        if family is not None:
            raise ValueError(
                f"family: a top-down guide has normal layers; got {dict(family)}. Leave it out, or "
                f"name it where the guide is measured: ppvae.compare(..., family=...)."
            )
        sizes = [2 * size for size in z_dims]
        counts = likelihood.of_counts
        encoder = BottomUp(x_dim, hidden, sizes, activation, log_counts=counts)
        return model, TopDown(sites, z_dims, encoder, hidden, activation)
    if family is None:
        family = {site: DiagonalNormal(size) for site, size in zip(sites, z_dims, strict=True)}
    guide = _bottom_up(
        model, sites, family, x_dim, hidden, activation, log_counts=likelihood.of_counts
    )
    return model, guide


def _bottom_up(
    model: nn.Module,
    sites: Sequence[str],
    family: Mapping[str, Family],
    x_dim: int,
    hidden: Sequence[int],
    activation: type[nn.Module],
    *,
    log_counts: bool,
) -> Amortized:
    """A guide with independent layers, which it draws in the model's order."""
    sizes = [family[site].num_params if site in family else 1 for site in sites]
    encoder = BottomUp(x_dim, hidden, sizes, activation, log_counts=log_counts)
    ordered = dict(family)
    if set(family) == set(sites):
        ordered = {site: family[site] for site in reversed(sites)}
    return amortized(model, ordered, encoder)


def deep_exponential_family(
    x_dim: int = 20,
    z_dims: Sequence[int] = (6, 3),
    hidden: Sequence[int] = (32,),
    family: type[Family] = Gamma,
    *,
    shape: float | Sequence[float] = 0.3,
    activation: type[nn.Module] = nn.ELU,
) -> tuple[DeepExponentialFamily, Amortized]:
    """A sparse gamma deep exponential family (Ranganath et al. 2015) with a bottom-up guide.

    Args:
        x_dim: Size of a row of counts.
        z_dims: Sizes of the layers, the one nearest to x first.
        hidden: Widths of the hidden layers of the encoder's blocks, which see log(1 + x).
        family: The class of the family of all layers: `Gamma`, `Weibull` or `LogNormal`.
        shape: The gamma priors' shape, one for all layers or one for each.
        activation: Class of the activation between the encoder's layers.

    Raises:
        ValueError: If the family is no class, or its support is not that of the latents.

    Example:
        >>> from ppvae.families import Weibull
        >>> model, guide = deep_exponential_family(x_dim=20, z_dims=(6, 3), family=Weibull)
        >>> guide.families
        {'z_2': Weibull(3), 'z_1': Weibull(6)}
    """
    if not isinstance(family, type):
        raise ValueError(
            f"family: expected the class of a family on z > 0, such as Gamma, as each layer has "
            f"its own size; got {family!r}."
        )
    model = DeepExponentialFamily(x_dim, z_dims, shape=shape)
    families = {site: family(size) for site, size in zip(model.sites, z_dims, strict=True)}
    guide = _bottom_up(model, model.sites, families, x_dim, hidden, activation, log_counts=True)
    return model, guide
