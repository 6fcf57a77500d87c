"""A VAE's images and latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppvae.density import Program, judging
from ppvae.generation import interpolate, traverse
from ppvae.guides import Amortized
from ppvae.isolation import check_rows
from ppvae.models import VAE, Autoencoder, ImplicitModel
from ppvae.plots.style import BLUE, MANY, axes_or_new, styled
from ppvae.priors import StandardNormal

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def samples(
    model: VAE | ImplicitModel,
    event_shape: Sequence[int],
    *,
    rows: int = 6,
    columns: int = 10,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Means of x for draws of z from the prior, as a sheet of images.

    Args:
        model: A trained model; of an `ImplicitModel` the images are draws of x itself.
        event_shape: Height and width of an image.
        rows: Number of images in a column of the sheet.
        columns: Number of images in a row of the sheet.
        seed: Seed of the draws; the caller's generators are left as they were.
        ax: Where to draw; a new figure if left out. Pixels outside of [0, 1] are drawn as the
            nearer of the two.

    Raises:
        ValueError: If ``event_shape`` is not that of the model's rows, or the model has no prior
            to draw from, as an `Autoencoder`.

    Example:
        >>> import ppvae
        >>> model, _ = ppvae.pairs.vae(x_dim=64, z_dim=8, hidden=[16])
        >>> ax = samples(model, (8, 8), rows=2, columns=3)
        >>> ax.get_title()
        'means of x for draws of z from the prior'
    """
    _need_prior(model, "samples")
    shape = _image_shape(event_shape, model.x_dim)
    if rows < 1 or columns < 1:
        raise ValueError(f"rows and columns must be at least 1; got {rows} and {columns}.")
    like = _like(model)
    with judging(seed, like, model):
        prior = model.prior if isinstance(model, VAE) else StandardNormal(model.z_dim).to(like)
        images = model.decode(prior.distribution().sample(torch.Size([rows * columns])))
    ax = _sheet(axes_or_new(ax, 0.5 * columns, 0.5 * rows + 0.3), images, shape, columns)
    what = "draws of x" if isinstance(model, ImplicitModel) else "means of x"
    ax.set_title(f"{what} for draws of z from the prior", fontsize="medium")
    return ax


def reconstructions(
    model: VAE | Autoencoder,
    guide: Amortized | None,
    x: Tensor,
    event_shape: Sequence[int],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Images above their reconstructions: the mean of x at the mean of q(z | x).

    Args:
        model: A trained model; an `Autoencoder` reconstructs from its code.
        guide: Its guide; `None` for an `Autoencoder`, which has none.
        x: The images, ``(batch, x_dim)``; a column for each.
        event_shape: Height and width of an image.
        ax: Where to draw; a new figure if left out. Pixels outside of [0, 1] are drawn as the
            nearer of the two.

    Raises:
        ValueError: If the rows are unfit, ``event_shape`` is not theirs, or the guide is missing.

    Example:
        >>> import torch, ppvae
        >>> model, guide = ppvae.pairs.vae(x_dim=64, z_dim=8, hidden=[16])
        >>> ax = reconstructions(model, guide, torch.zeros(5, 64), (8, 8))
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['image', 'reconstruction']
    """
    check_rows(x, model, guide)
    shape = _image_shape(event_shape, x[0].numel())
    if isinstance(model, ImplicitModel):
        raise ValueError(
            "reconstructions: an ImplicitModel has no posterior over z to reconstruct from. Use "
            "ppvae.plots.samples."
        )
    if (guide is None) != isinstance(model, Autoencoder):
        raise ValueError(
            f"reconstructions: expected a guide, or None with an Autoencoder alone; got "
            f"{type(guide).__name__} with {type(model).__name__}."
        )
    with judging(0, x, model, guide), torch.no_grad():
        z = model.code(x) if guide is None else _posterior_means(guide, x)
        means = model.decode(z)
    _check_grey(means)
    both = torch.cat([x, means])
    ax = _sheet(axes_or_new(ax, 0.5 * len(x) + 1, 1.4), both, shape, len(x))
    ax.set_yticks([0.5 * shape[0], 1.5 * shape[0] + 1], ["image", "reconstruction"])
    ax.tick_params(length=0)
    return ax


def latent_scatter(
    guide: Amortized,
    x: Tensor,
    labels: Tensor | Sequence[Any] | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Means of q(z | x) of a two-dimensional latent, each drawn as its label.

    Args:
        guide: The trained guide.
        x: Rows, ``(batch, *event)``.
        labels: ``(batch,)``, such as classes; a dot for each row if left out.
        ax: Where to draw; a new figure if left out.

    Raises:
        ValueError: If the latent is not two-dimensional, or there is not a label for each row.

    Example:
        >>> import torch, ppvae
        >>> _, guide = ppvae.pairs.vae(x_dim=64, z_dim=2, hidden=[16])
        >>> ax = latent_scatter(guide, torch.zeros(4, 64), labels=[0, 1, 0, 2])
        >>> len(ax.collections)
        3
    """
    if guide.family.event_shape != (2,):
        raise ValueError(
            f"latent_scatter draws a two-dimensional latent; {guide.family!r} has event shape "
            f"{guide.family.event_shape}. Build the pair with z_dim=2."
        )
    check_rows(x, guide)
    with judging(0, x, guide), torch.no_grad():
        means = _posterior_means(guide, x).cpu().numpy()
    ax = axes_or_new(ax, 5.0, 5.0)
    if labels is None:
        ax.scatter(means[:, 0], means[:, 1], s=10, color=BLUE)
    else:
        classes = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
        if classes.shape != (len(x),):
            raise ValueError(
                f"labels: expected shape {(len(x),)}, one for each row; got {classes.shape}."
            )
        for index, label in enumerate(np.unique(classes)):
            ax.scatter(
                means[classes == label, 0],
                means[classes == label, 1],
                marker=f"${label}$",
                s=36,
                linewidths=0.3,
                color=MANY[index % len(MANY)],
                label=str(label),
            )
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_xlabel("mean of $z_1$")
    ax.set_ylabel("mean of $z_2$")
    return styled(ax, legend=False)


def latent_grid(
    model: VAE | ImplicitModel,
    event_shape: Sequence[int],
    *,
    size: int = 11,
    ax: Axes | None = None,
) -> Axes:
    r"""Means of x over a grid of a two-dimensional latent, spaced evenly in the prior.

    The grid's coordinates are the quantiles :math:`\Phi^{-1}((i + \frac12) / n)` of the standard
    normal prior, so that each image stands for the same share of it; z₁ rises to the right and z₂
    upwards.

    Args:
        model: A trained model.
        event_shape: Height and width of an image.
        size: Number n of images on a side.
        ax: Where to draw; a new figure if left out. Pixels outside of [0, 1] are drawn as the
            nearer of the two.

    Raises:
        ValueError: If the latent is not two-dimensional, ``event_shape`` is not that of the
            model's rows, the prior is not the standard normal, or there is none, as in an
            `Autoencoder`.

    Example:
        >>> import ppvae
        >>> model, _ = ppvae.pairs.vae(x_dim=64, z_dim=2, hidden=[16])
        >>> ax = latent_grid(model, (8, 8), size=4)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('$z_1$', '$z_2$')
    """
    _need_prior(model, "latent_grid")
    if model.z_dim != 2:
        raise ValueError(
            f"latent_grid draws a two-dimensional latent; the model has z_dim={model.z_dim}. "
            f"Build the pair with z_dim=2."
        )
    if isinstance(model, VAE) and not isinstance(model.prior, StandardNormal):
        raise ValueError(
            f"latent_grid is spaced by the quantiles of the standard normal; the model has the "
            f"prior {model.prior!r}. Draw from it instead: ppvae.plots.samples."
        )
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}.")
    shape = _image_shape(event_shape, model.x_dim)
    like = _like(model)
    share = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    quantiles = torch.special.ndtri(share)
    down, right = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    with judging(0, like, model):
        images = model.decode(torch.stack([right, down], dim=-1).reshape(-1, 2).to(like))
    ax = _sheet(axes_or_new(ax, 5.0, 5.0), images, shape, size)
    shown = sorted({0, size // 4, size // 2, (3 * size) // 4, size - 1})
    names = [f"{float(quantiles[i]):.1f}" for i in shown]
    height, width = shape[0] + 1, shape[1] + 1
    ax.set_xticks([i * width + 0.5 * shape[1] for i in shown], names)
    ax.set_yticks([(size - 1 - i) * height + 0.5 * shape[0] for i in shown], names)
    ax.set_xlabel("$z_1$")
    ax.set_ylabel("$z_2$")
    return ax


def interpolation(
    model: VAE,
    guide: Program,
    x_from: Tensor,
    x_to: Tensor,
    event_shape: Sequence[int],
    *,
    steps: int = 9,
    ax: Axes | None = None,
) -> Axes:
    """Means of x on the straight line between two posterior means, a line to a row of the sheet.

    Args:
        model: A trained model.
        guide: Its guide.
        x_from: The images at which the lines begin, ``(batch, x_dim)``.
        x_to: The images at which they end, as many.
        event_shape: Height and width of an image.
        steps: Number of images on a line, both ends among them.
        ax: Where to draw; a new figure if left out. Pixels outside of [0, 1] are drawn as the
            nearer of the two.

    Raises:
        ValueError: As `ppvae.generation.interpolate`; and if ``event_shape`` is not that of the
            rows.

    Example:
        >>> import torch, ppvae
        >>> model, guide = ppvae.pairs.vae(x_dim=64, z_dim=8, hidden=[16])
        >>> ax = interpolation(model, guide, torch.zeros(2, 64), torch.ones(2, 64), (8, 8))
        >>> ax.get_xlabel()
        'share of the way from one posterior mean to the other'
    """
    shape = _image_shape(event_shape, model.x_dim)
    images = interpolate(model, guide, x_from, x_to, steps).transpose(0, 1).flatten(0, 1)
    ax = _sheet(axes_or_new(ax, 0.5 * steps, 0.5 * len(x_from) + 0.4), images, shape, steps)
    middle = [(steps - 1) // 2] if steps % 2 else []
    _name_columns(ax, shape, {i: f"{i / (steps - 1):g}" for i in [0, *middle, steps - 1]})
    ax.set_xlabel("share of the way from one posterior mean to the other")
    return ax


def traversals(
    model: VAE,
    z: Tensor,
    event_shape: Sequence[int],
    *,
    dimensions: Sequence[int] | None = None,
    values: Sequence[float] = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0),
    ax: Axes | None = None,
) -> Axes:
    """Means of x as one coordinate of z changes and the others are held, a coordinate to a row.

    A coordinate that the model does not use gives a row of equal images.

    Args:
        model: A trained model.
        z: The latent of one datum, ``(z_dim,)``, such as zeros or a posterior mean.
        event_shape: Height and width of an image.
        dimensions: Which coordinates, from 0 to ``z_dim - 1``; all if left out. The label
            :math:`z_1` is that of coordinate 0.
        values: What the coordinate is set to.
        ax: Where to draw; a new figure if left out. Pixels outside of [0, 1] are drawn as the
            nearer of the two.

    Raises:
        ValueError: As `ppvae.generation.traverse`; and if ``z`` is not of one datum, no dimension
            is named, or ``event_shape`` is not that of the model's rows.

    Example:
        >>> import torch, ppvae
        >>> model, _ = ppvae.pairs.vae(x_dim=64, z_dim=8, hidden=[16])
        >>> ax = traversals(model, torch.zeros(8), (8, 8), dimensions=[0, 5])
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['$z_{1}$', '$z_{6}$']
    """
    shape = _image_shape(event_shape, model.x_dim)
    if z.dim() != 1:
        raise ValueError(
            f"z: expected the latent of one datum, shape ({model.z_dim},); got {tuple(z.shape)}."
        )
    chosen = range(model.z_dim) if dimensions is None else dimensions
    if len(chosen) == 0:
        raise ValueError("dimensions: expected at least one coordinate of z; got none.")
    images = torch.cat([traverse(model, z, dimension, values) for dimension in chosen])
    count = len(values)
    ax = _sheet(axes_or_new(ax, 0.5 * count + 0.5, 0.5 * len(chosen) + 0.4), images, shape, count)
    _name_columns(ax, shape, {i: f"{value:g}" for i, value in enumerate(values)})
    middles = [i * (shape[0] + 1) + 0.5 * shape[0] for i in range(len(chosen))]
    ax.set_yticks(middles, [f"$z_{{{dimension + 1}}}$" for dimension in chosen])
    ax.tick_params(length=0)
    ax.set_xlabel("value of the coordinate")
    return ax


def _name_columns(ax: Axes, shape: tuple[int, int], names: Mapping[int, str]) -> None:
    """Label columns of a sheet under their middles."""
    middles = [column * (shape[1] + 1) + 0.5 * shape[1] for column in names]
    ax.set_xticks(middles, list(names.values()))


def _need_prior(model: Any, name: str) -> None:
    if isinstance(model, Autoencoder):
        raise ValueError(
            f"{name}: an Autoencoder has no prior over its code to draw from. Use "
            f"ppvae.plots.reconstructions(model, None, x, event_shape), or a VAE."
        )


def _like(model: VAE | ImplicitModel) -> Tensor:
    """A tensor of the model's dtype and device."""
    return next((p.detach() for p in model.parameters()), torch.zeros(()))


def _posterior_means(guide: Amortized, x: Tensor) -> Tensor:
    means: Tensor = guide.family.distribution(guide.params(x)).mean
    return means


def _image_shape(event_shape: Sequence[int], x_dim: int) -> tuple[int, int]:
    if len(event_shape) != 2 or math.prod(event_shape) != x_dim:
        raise ValueError(
            f"event_shape: expected the height and width of an image of {x_dim} pixels; got "
            f"{tuple(event_shape)}."
        )
    return int(event_shape[0]), int(event_shape[1])


def _check_grey(means: Tensor) -> None:
    if means.dim() != 2:
        raise ValueError(
            f"The pixels of this model are categories, with {means.shape[-1]} probabilities each "
            f"and no mean to draw as grey. Draw those of one category, model.decode(z)[..., k]."
        )


def _sheet(ax: Axes, images: Tensor, shape: tuple[int, int], columns: int) -> Axes:
    """Draw images side by side, ``columns`` to a row, with a line of one pixel between them."""
    _check_grey(images)
    height, width = shape
    rows = math.ceil(len(images) / columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), np.nan)
    for index, image in enumerate(images.cpu().double().numpy()):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image.reshape(height, width)
    extent = (0, sheet.shape[1], sheet.shape[0], 0)
    ax.set_facecolor("#b5d0e6")
    ax.imshow(sheet, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest", extent=extent)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    return ax
