"""Figures: one function each, which draws a result into an axes and gives that axes back.

A figure is as wide as its axes and has no title of its own where the caller can say more. Lines
differ in style and marks in shape, so that nothing rests on colour alone; the colours are those of
Okabe & Ito (2008), which colour-blind readers can tell apart. Matplotlib's settings stay as they
are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppvae.density import judging
from ppvae.guides import Amortized, PerDatapoint
from ppvae.isolation import check_rows
from ppvae.local import LocalFit
from ppvae.models import VAE, ExponentialGaussian

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ppvae.comparison import Comparison

_BLACK, _GREY = "#000000", "#7f7f7f"
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_MANY = (_BLUE, _ORANGE, _GREEN, "#CC79A7", "#56B4E9", "#E69F00", _BLACK)

_GAPS: dict[str, dict[str, Any]] = {
    "approximation": {"color": _ORANGE, "marker": "s", "linestyle": "-", "hatch": ""},
    "amortization": {"color": _BLUE, "marker": "o", "linestyle": "--", "hatch": "///"},
}


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    """The axes that were given, or those of a new figure; in inches."""
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    return ax


def _styled(ax: Axes, *, legend: bool = True) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    if legend:
        ax.legend(frameon=False, fontsize="small")
    return ax


def toy_posterior(
    x: Tensor,
    amortized: Amortized,
    per_datapoint: LocalFit | PerDatapoint,
    *,
    row: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """What the toy's family can say of one datum, and what its encoder does say.

    Draws five densities over z ≥ 0 for `ExponentialGaussian`: prior, likelihood (as a function of
    z, not normalised, on the same axis), exact posterior, the amortized q(z | x), and the
    per-datapoint optimum q*(z) of the family.

    Args:
        x: Rows of the toy, ``(batch,)``.
        amortized: The trained guide.
        per_datapoint: The per-datapoint fit of these rows: its row n belongs to ``x[n]``.
        row: Which of the rows is drawn.
        ax: Where to draw; a new figure if left out.

    Raises:
        ValueError: If ``x`` has no such row or is not one number a row, or the fit is of other
            rows.

    Example:
        >>> import torch, ppvae
        >>> model, guide = ppvae.pairs.exponential_gaussian()
        >>> x = torch.tensor([1.5, 0.0])
        >>> local = ppvae.fit_per_datapoint(model, None, x, init=guide)
        >>> ax = toy_posterior(x, guide, local, row=1)
        >>> len(ax.lines)
        5
    """
    check_rows(x, amortized)
    if x.dim() != 1:
        raise ValueError(f"Expected rows of the toy, shape (batch,); got {tuple(x.shape)}.")
    if not -len(x) <= row < len(x):
        raise ValueError(f"row: expected a row of the {len(x)} in x; got {row}.")
    free = per_datapoint.guide if isinstance(per_datapoint, LocalFit) else per_datapoint
    family = next(iter(free.families.values()))
    model = ExponentialGaussian()
    with judging(0, x, amortized, free), torch.no_grad():
        guided = amortized.family.distribution(amortized.params(x)[row].detach().cpu().double())
        best = family.distribution(next(iter(free.params(x).values()))[row].detach().cpu().double())
    value = x[row].double().cpu()
    posterior = model.posterior(value)
    z = torch.linspace(0, _reach(posterior, guided, best), 1001, dtype=torch.float64)
    # Some families have no density at z = 0 itself.
    z[0] = 1e-3 * z[1]
    name = type(family).__name__
    lines = {
        "prior p(z)": (torch.exp(-z), _GREY, ":", 1.4),
        "likelihood p(x | z), as a function of z": (
            torch.exp(torch.distributions.Normal(z, 1.0).log_prob(value)),
            _GREY,
            (0, (5, 1, 1, 1, 1, 1)),
            1.4,
        ),
        "exact posterior p(z | x)": (torch.exp(posterior.log_prob(z)), _BLACK, "-", 2.4),
        f"per-datapoint q*(z), {name}": (torch.exp(best.log_prob(z)), _ORANGE, "--", 1.8),
        f"amortized q(z | x), {type(amortized.family).__name__}": (
            torch.exp(guided.log_prob(z)),
            _BLUE,
            "-.",
            1.8,
        ),
    }
    ax = _axes(ax, 5.5, 3.8)
    for label, (density, color, style, width) in lines.items():
        ax.plot(z.numpy(), density.numpy(), label=label, color=color, ls=style, lw=width)
    # A pole at z = 0 would leave no room for the rest.
    highest = max(float(density[z > 0.02 * z[-1]].max()) for density, *_ in lines.values())
    ax.set_xlim(0, float(z[-1]))
    ax.set_ylim(0, 1.08 * max(highest, float(torch.exp(posterior.log_prob(z)).max())))
    ax.set_title(f"x = {float(value):g}", fontsize="medium")
    ax.set_xlabel("latent z")
    ax.set_ylabel("density")
    return _styled(ax)


def _reach(posterior: Any, *others: Any) -> float:
    """How far the z axis goes: all of the posterior, and of the guides what fits beside it."""
    needed = float(posterior.icdf(torch.tensor(0.99999, dtype=torch.float64)))
    wanted = max(float(q.mean + 2 * q.stddev) for q in others)
    return max(needed, min(wanted, 3 * needed) if math.isfinite(wanted) else needed)


def gap_bars(comparison: Comparison | Mapping[str, Comparison], *, ax: Axes | None = None) -> Axes:
    """Mean approximation and amortization gap, in nats, with two standard errors.

    Args:
        comparison: A comparison, or several by name, which stand side by side.
        ax: Where to draw; a new figure if left out.

    Example:
        >>> import torch, ppvae
        >>> pair = ppvae.pairs.exponential_gaussian()
        >>> comparison = ppvae.compare(*pair, torch.tensor([0.0, 1.5]))
        >>> ax = gap_bars(comparison)
        >>> len(ax.patches)
        2
    """
    several: Mapping[str, Comparison] = (
        comparison
        if isinstance(comparison, Mapping)
        else {comparison.dataset.attrs["family"]: comparison}
    )
    if not several:
        raise ValueError("comparison: expected at least one; got an empty mapping.")
    ax = _axes(ax, max(3.6, 1.6 + 1.2 * len(several)), 3.4)
    at = np.arange(len(several), dtype=float)
    for shift, (gap, style) in zip((-0.2, 0.2), _GAPS.items(), strict=True):
        means = [each.mean(f"{gap}_gap") for each in several.values()]
        ax.bar(
            at + shift,
            [value for value, _ in means],
            width=0.36,
            yerr=[2 * stderr for _, stderr in means],
            label=f"{gap} gap",
            color="white" if style["hatch"] else style["color"],
            edgecolor=style["color"],
            hatch=style["hatch"],
            error_kw={"ecolor": _BLACK, "capsize": 3, "elinewidth": 1},
        )
    ax.axhline(0, color=_BLACK, linewidth=0.8)
    ax.set_xticks(at, list(several))
    ax.set_xlim(-0.6, len(several) - 0.4)
    ax.margins(y=0.15)
    ax.set_ylabel("mean gap ± 2 Monte Carlo errors\n(nats per datum)")
    return _styled(ax)


def gap_against(
    comparison: Comparison,
    covariate: Tensor | Sequence[float],
    *,
    label: str,
    ax: Axes | None = None,
) -> Axes:
    """Both gaps of each datum against something known of it, with two standard errors.

    Args:
        comparison: The comparison.
        covariate: ``(batch,)``, a number for each datum, in the order of the comparison's rows.
        label: What it is, with its unit: the label of the axis.
        ax: Where to draw; a new figure if left out.

    Raises:
        ValueError: If there is not one number for each datum.

    Example:
        >>> import torch, ppvae
        >>> model, guide = ppvae.pairs.exponential_gaussian()
        >>> x = torch.linspace(-1, 4, 11)
        >>> ax = gap_against(ppvae.compare(model, guide, x), x, label="x")
        >>> ax.get_ylabel()
        'gap ± 2 Monte Carlo errors (nats)'
    """
    where = torch.as_tensor(covariate).detach().cpu().double().numpy()
    expected = (comparison.dataset.sizes["data"],)
    if where.shape != expected:
        raise ValueError(
            f"covariate: expected shape {expected}, a number for each datum; got {where.shape}."
        )
    ax = _axes(ax, 5.5, 3.8)
    order = np.argsort(where)
    for gap, style in _GAPS.items():
        ax.errorbar(
            where[order],
            comparison.dataset[f"{gap}_gap"].values[order],
            yerr=2 * comparison.dataset[f"{gap}_gap_stderr"].values[order],
            label=f"{gap} gap",
            color=style["color"],
            marker=style["marker"],
            markerfacecolor="white" if style["hatch"] else style["color"],
            markersize=3.5,
            linestyle="none",
            elinewidth=0.7,
        )
    ax.axhline(0, color=_BLACK, linewidth=0.8)
    ax.set_xlabel(label)
    ax.set_ylabel("gap ± 2 Monte Carlo errors (nats)")
    return _styled(ax)


def gap_sorted(comparison: Comparison, *, ax: Axes | None = None) -> Axes:
    """Both gaps of all data, each sorted on its own, with a band of two standard errors.

    Where a curve turns up at its right end, few data carry much of the mean.

    Args:
        comparison: The comparison.
        ax: Where to draw; a new figure if left out.

    Example:
        >>> import torch, ppvae
        >>> pair = ppvae.pairs.exponential_gaussian()
        >>> ax = gap_sorted(ppvae.compare(*pair, torch.tensor([0.0, 1.5, 3.0])))
        >>> len(ax.lines[0].get_xdata())
        3
    """
    ax = _axes(ax, 5.5, 3.8)
    for gap, style in _GAPS.items():
        value = comparison.dataset[f"{gap}_gap"].values
        order = np.argsort(value)
        value = value[order]
        band = 2 * comparison.dataset[f"{gap}_gap_stderr"].values[order]
        rank = np.arange(1, len(value) + 1)
        ax.plot(
            rank,
            value,
            label=f"{gap} gap",
            color=style["color"],
            linestyle=style["linestyle"],
            marker=style["marker"] if len(value) < 30 else None,
        )
        ax.fill_between(rank, value - band, value + band, color=style["color"], alpha=0.25, lw=0)
    ax.axhline(0, color=_BLACK, linewidth=0.8)
    ax.set_xlabel("rank of the datum (each gap sorted by itself)")
    ax.set_ylabel("gap ± 2 Monte Carlo errors (nats)")
    return _styled(ax)


def samples(
    model: VAE,
    event_shape: Sequence[int],
    *,
    rows: int = 6,
    columns: int = 10,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Means of x for draws of z from the prior, as a sheet of images.

    Args:
        model: A trained model.
        event_shape: Height and width of an image.
        rows: Number of images in a column of the sheet.
        columns: Number of images in a row of the sheet.
        seed: Seed of the draws; the caller's generators are left as they were.
        ax: Where to draw; a new figure if left out. Pixels outside of [0, 1] are drawn as the
            nearer of the two.

    Raises:
        ValueError: If ``event_shape`` is not that of the model's rows.

    Example:
        >>> import ppvae
        >>> model, _ = ppvae.pairs.vae(x_dim=64, z_dim=8, hidden=[16])
        >>> ax = samples(model, (8, 8), rows=2, columns=3)
        >>> ax.get_title()
        'means of x for draws of z from the prior'
    """
    shape = _image_shape(event_shape, model.x_dim)
    if rows < 1 or columns < 1:
        raise ValueError(f"rows and columns must be at least 1; got {rows} and {columns}.")
    like = _like(model)
    with judging(seed, like, model):
        images = model.decode(torch.randn(rows * columns, model.z_dim).to(like))
    ax = _sheet(_axes(ax, 0.5 * columns, 0.5 * rows + 0.3), images, shape, columns)
    ax.set_title("means of x for draws of z from the prior", fontsize="medium")
    return ax


def reconstructions(
    model: VAE,
    guide: Amortized,
    x: Tensor,
    event_shape: Sequence[int],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Images above their reconstructions: the mean of x at the mean of q(z | x).

    Args:
        model: A trained model.
        guide: Its guide.
        x: The images, ``(batch, x_dim)``; a column for each.
        event_shape: Height and width of an image.
        ax: Where to draw; a new figure if left out. Pixels outside of [0, 1] are drawn as the
            nearer of the two.

    Raises:
        ValueError: If the rows are unfit, or ``event_shape`` is not theirs.

    Example:
        >>> import torch, ppvae
        >>> model, guide = ppvae.pairs.vae(x_dim=64, z_dim=8, hidden=[16])
        >>> ax = reconstructions(model, guide, torch.zeros(5, 64), (8, 8))
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['image', 'reconstruction']
    """
    check_rows(x, model, guide)
    shape = _image_shape(event_shape, x[0].numel())
    with judging(0, x, model, guide), torch.no_grad():
        means = model.decode(_posterior_means(guide, x))
    both = torch.cat([x, means])
    ax = _sheet(_axes(ax, 0.5 * len(x) + 1, 1.4), both, shape, len(x))
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
    ax = _axes(ax, 5.0, 5.0)
    if labels is None:
        ax.scatter(means[:, 0], means[:, 1], s=10, color=_BLUE)
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
                color=_MANY[index % len(_MANY)],
                label=str(label),
            )
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_xlabel("mean of $z_1$")
    ax.set_ylabel("mean of $z_2$")
    return _styled(ax, legend=False)


def latent_grid(
    model: VAE, event_shape: Sequence[int], *, size: int = 11, ax: Axes | None = None
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
        ValueError: If the latent is not two-dimensional, or ``event_shape`` is not that of the
            model's rows.

    Example:
        >>> import ppvae
        >>> model, _ = ppvae.pairs.vae(x_dim=64, z_dim=2, hidden=[16])
        >>> ax = latent_grid(model, (8, 8), size=4)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('$z_1$', '$z_2$')
    """
    if model.z_dim != 2:
        raise ValueError(
            f"latent_grid draws a two-dimensional latent; the model has z_dim={model.z_dim}. "
            f"Build the pair with z_dim=2."
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
    ax = _sheet(_axes(ax, 5.0, 5.0), images, shape, size)
    shown = sorted({0, size // 4, size // 2, (3 * size) // 4, size - 1})
    names = [f"{float(quantiles[i]):.1f}" for i in shown]
    height, width = shape[0] + 1, shape[1] + 1
    ax.set_xticks([i * width + 0.5 * shape[1] for i in shown], names)
    ax.set_yticks([(size - 1 - i) * height + 0.5 * shape[0] for i in shown], names)
    ax.set_xlabel("$z_1$")
    ax.set_ylabel("$z_2$")
    return ax


def _like(model: VAE) -> Tensor:
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


def _sheet(ax: Axes, images: Tensor, shape: tuple[int, int], columns: int) -> Axes:
    """Draw images side by side, ``columns`` to a row, with a line of one pixel between them."""
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
