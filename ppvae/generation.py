"""What a fitted VAE makes of rows and latents: reconstructions, interpolations, traversals.

Each function runs in eval mode, without gradient, and leaves the caller's generators alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ppvae.density import (
    ModelSites,
    Program,
    check_count,
    check_pair,
    draw_chunks,
    judging,
    weigh,
)
from ppvae.guides import read_params
from ppvae.isolation import check_rows
from ppvae.models import VAE


def posterior_means(model: VAE, guide: Program, x: Tensor) -> Tensor:
    """The means of q(z | x).

    Args:
        model: The VAE.
        guide: Its guide.
        x: Rows, ``(batch, x_dim)``.

    Returns:
        ``(batch, z_dim)``.

    Raises:
        ValueError: If the rows or the pair are unfit, the model has other latent sites than
            ``"z"``, or the guide's distribution has no mean in closed form.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> model, guide = pairs.vae(x_dim=64, z_dim=8, hidden=[16])
        >>> posterior_means(model, guide, torch.zeros(5, 64)).shape
        torch.Size([5, 8])
    """
    check_rows(x, model, guide)
    with judging(0, x, model, guide), torch.no_grad():
        sites = check_pair(model, guide, x)
        _check_site(model, sites)
        reading = read_params(guide, x, sites)
        family = reading.families["z"]
        try:
            means: Tensor = family.distribution(reading.params["z"]).mean
        except NotImplementedError:
            raise ValueError(
                f'Site "z": {family!r} has no mean in closed form. Draw from the guide, or give '
                f"the latents themselves (model.decode, ppvae.generation.traverse)."
            ) from None
    return means


def _check_site(model: VAE, sites: ModelSites) -> None:
    if list(sites.latents) != ["z"] or not hasattr(model, "decode"):
        raise ValueError(
            f"model: expected a VAE, with a decode method and the one latent site 'z'; got "
            f"{type(model).__name__} with the sites {list(sites.latents)}. Draw the latents from "
            f"the guide, and decode them as the model does."
        )


def reconstruct(
    model: VAE, guide: Program, x: Tensor, *, num_samples: int = 100, seed: int = 0
) -> Tensor:
    r"""What the model expects in the place of x, given what the guide says of z.

    .. math:: \hat x_n = \frac1S \sum_s E[x \mid z_{sn}], \qquad z_{sn} \sim q(z \mid x_n)

    This is the mean of the posterior predictive, over draws of z; the mean of x at the posterior
    mean, ``model.decode(posterior_means(model, guide, x))``, is another figure where the decoder
    is not linear.

    Args:
        model: The VAE.
        guide: Its guide.
        x: Rows, ``(batch, x_dim)``.
        num_samples: Draws S per row.
        seed: Seed of the draws; the caller's generators are left as they were.

    Returns:
        ``(batch, x_dim)``; with a `Categorical` likelihood of K categories ``(batch, x_dim, K)``,
        the probability of each.

    Raises:
        ValueError: If the rows or the pair are unfit, the model is no VAE with the one latent site
            ``"z"``, or ``num_samples`` is below 1.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> model, guide = pairs.vae(x_dim=64, z_dim=8, hidden=[16])
        >>> reconstruct(model, guide, torch.zeros(5, 64)).shape
        torch.Size([5, 64])
    """
    check_rows(x, model, guide)
    check_count("num_samples", num_samples)
    with judging(seed, x, model, guide), torch.no_grad():
        _check_site(model, check_pair(model, guide, x))
        parts = [
            model.decode(weigh(model, guide, x, size)[1]["z"]).sum(dim=0)
            for size in draw_chunks(num_samples, x)
        ]
        return torch.stack(parts).sum(dim=0) / num_samples


def interpolate(model: VAE, guide: Program, x_from: Tensor, x_to: Tensor, steps: int = 9) -> Tensor:
    r"""Means of x on the straight line between two posterior means.

    .. math:: E[x \mid (1 - t)\, m(x) + t\, m(x')], \qquad
              t = 0, \tfrac{1}{\mathrm{steps} - 1}, \ldots, 1

    where m(x) is the mean of q(z | x).

    Args:
        model: The VAE.
        guide: Its guide, which must describe both sets of rows.
        x_from: Rows at which the lines begin, ``(batch, x_dim)``.
        x_to: Rows at which they end, as many.
        steps: Number of points on a line, both ends among them.

    Returns:
        ``(steps, batch, x_dim)``; with a `Categorical` likelihood of K categories
        ``(steps, batch, x_dim, K)``.

    Raises:
        ValueError: If the rows or the pair are unfit, the shapes differ, ``steps`` is below 2, or
            the guide's distribution has no mean in closed form.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> model, guide = pairs.vae(x_dim=64, z_dim=8, hidden=[16])
        >>> interpolate(model, guide, torch.zeros(2, 64), torch.ones(2, 64), steps=5).shape
        torch.Size([5, 2, 64])
    """
    check_rows(x_from, model, guide, name="x_from")
    check_rows(x_to, model, guide, name="x_to")
    check_count("steps", steps, least=2)
    if x_from.shape != x_to.shape:
        raise ValueError(
            f"x_from and x_to: expected rows of one shape, one end of each line in each; got "
            f"{tuple(x_from.shape)} and {tuple(x_to.shape)}."
        )
    start, end = (posterior_means(model, guide, x) for x in (x_from, x_to))
    share = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device)
    # lerp gives both ends as they are, to the last bit.
    z = torch.lerp(start, end, share[:, None, None])
    with judging(0, x_from, model):
        return model.decode(z)


def traverse(model: VAE, z: Tensor, dimension: int, values: Sequence[float] | Tensor) -> Tensor:
    """Means of x as one coordinate of z takes other values, the others being held.

    Args:
        model: The VAE.
        z: Latents, ``(*, z_dim)``.
        dimension: Which coordinate, from 0 to ``z_dim - 1``.
        values: What it is set to; its own value does not matter. The standard normal prior has
            99.7 % of its mass between −3 and 3.

    Returns:
        ``(len(values), *, x_dim)``; with a `Categorical` likelihood of K categories
        ``(len(values), *, x_dim, K)``.

    Raises:
        ValueError: If ``z`` has another size or is not finite, there is no such dimension, or
            ``values`` is no sequence of numbers.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> model, _ = pairs.vae(x_dim=64, z_dim=8, hidden=[16])
        >>> traverse(model, torch.zeros(3, 8), 5, [-2.0, 0.0, 2.0]).shape
        torch.Size([3, 3, 64])
    """
    if z.dim() == 0 or z.shape[-1] != model.z_dim:
        raise ValueError(f"z: expected latents of shape (*, {model.z_dim}); got {tuple(z.shape)}.")
    check_rows(z.reshape(-1, model.z_dim), model, name="z")
    if not 0 <= dimension < model.z_dim:
        raise ValueError(
            f"dimension: expected a coordinate of z from 0 to {model.z_dim - 1}; got {dimension}."
        )
    levels = torch.as_tensor(values, dtype=z.dtype, device=z.device)
    if levels.dim() != 1 or levels.numel() == 0:
        raise ValueError(
            f"values: expected a sequence of at least one number; got shape {tuple(levels.shape)}."
        )
    moved = z.detach().expand(len(levels), *z.shape).clone()
    moved[..., dimension] = levels.reshape(-1, *[1] * (z.dim() - 1))
    with judging(0, z, model):
        return model.decode(moved)
