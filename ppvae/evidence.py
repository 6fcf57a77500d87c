r"""Estimates of log p(x) per datum, each with its error and the side that it bounds.

Everything here is in nats, higher is better, one figure per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ppvae.density import (
    LatentSite,
    Program,
    check_count,
    joint,
    judging,
    log_weights,
    read_model,
    row_chunks,
    to_unconstrained,
)
from ppvae.isolation import check_rows

Bound = Literal["lower", "upper", "exact"]


@dataclass(frozen=True)
class Estimate:
    """A figure per datum, in nats, that knows its error.

    Attributes:
        value: ``(batch,)``.
        stderr: ``(batch,)``: the standard error of ``value``, or for a deterministic method a
            bound on its numerical error.
        bound: Which side of log p(x) the figure lies on, in expectation.
        method: How it was found, in a word.
    """

    value: Tensor
    stderr: Tensor
    bound: Bound
    method: str

    @property
    def mean(self) -> float:
        """Mean over the data, in nats per datum."""
        return float(self.value.double().mean())

    @property
    def mean_stderr(self) -> float:
        """Standard error of `mean` for these data (not for others of their kind)."""
        return float(self.stderr.double().square().sum().sqrt()) / len(self.stderr)

    def __repr__(self) -> str:
        side = {"lower": "lower bound", "upper": "upper bound", "exact": "exact"}[self.bound]
        return (
            f"Estimate({self.method}, {side}: {self.mean:.4f} ± {self.mean_stderr:.2g} nats a "
            f"datum over {len(self.value)} data)"
        )


def elbo(
    model: Program, guide: Program, x: Tensor, num_samples: int = 1000, *, seed: int = 0
) -> Estimate:
    r"""Evidence lower bound per datum, the mean of the log weights.

    .. math:: L_n = \frac1S \sum_s \log p(x_n, z_{sn}) - \log q(z_{sn} \mid x_n)

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guide: A Pyro guide with the same latent sites, called as ``guide(x)``.
        x: Rows, ``(batch, *event)``.
        num_samples: Draws S per row, at least 2.
        seed: Seed of the draws; the caller's generators are left as they were.

    Returns:
        The ELBO with its Monte Carlo standard error: a lower bound on log p(x).

    Raises:
        ValueError: If the rows, the model or the guide are unfit.

    Example:
        >>> import torch
        >>> from ppvae.models import ExponentialGaussian
        >>> from ppvae.guides import PerDatapoint
        >>> from ppvae.families import TruncatedNormal
        >>> guide = PerDatapoint(TruncatedNormal(), 1)  # untrained: its posterior is for x = 1
        >>> elbo(ExponentialGaussian(), guide, torch.tensor([1.0])).value
        tensor([-1.1931])
    """
    check_count("num_samples", num_samples, least=2)
    return elbo_of(log_weights(model, guide, x, num_samples, seed=seed))


def iwae(
    model: Program, guide: Program, x: Tensor, num_samples: int = 1000, *, seed: int = 0
) -> Estimate:
    r"""Importance-weighted evidence per datum, the log of the mean weight.

    .. math:: L_{S,n} = \log \frac1S \sum_s w_{sn}

    A lower bound on log p(x) in expectation, for every number of draws S, that rises with S
    (Burda, Grosse & Salakhutdinov 2015, theorem 1). A guide with lighter tails than the posterior
    leaves it short by more than its standard error says: look at k-hat beside it.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guide: A Pyro guide with the same latent sites, called as ``guide(x)``.
        x: Rows, ``(batch, *event)``.
        num_samples: Draws S per row, at least 2.
        seed: Seed of the draws; the caller's generators are left as they were.

    Returns:
        The bound with the standard error of the log mean weight (delta method).

    Raises:
        ValueError: If the rows, the model or the guide are unfit.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> model, guide = pairs.exponential_gaussian()
        >>> iwae(model, guide, torch.tensor([0.5, 1.5]), num_samples=100).bound
        'lower'
    """
    check_count("num_samples", num_samples, least=2)
    return iwae_of(log_weights(model, guide, x, num_samples, seed=seed))


def elbo_of(weights: Tensor) -> Estimate:
    """The ELBO of log weights ``(num_samples, batch)``."""
    stderr = weights.std(dim=0) / math.sqrt(weights.shape[0])
    return Estimate(weights.mean(dim=0), stderr, "lower", "elbo")


def iwae_of(weights: Tensor) -> Estimate:
    """The importance-weighted evidence of log weights ``(num_samples, batch)``."""
    count = weights.shape[0]
    value = torch.logsumexp(weights, dim=0) - math.log(count)
    relative = torch.exp(weights - value)
    return Estimate(value, relative.std(dim=0) / math.sqrt(count), "lower", "iwae")


# Log densities this far below the peak are left out of an integral: e⁻⁴⁵ < 1e-19.
_DEPTH = 45.0
_START = 129
_MOST_NODES = {1: 65_537, 2: 1_025}


def quadrature(model: Program, x: Tensor, *, tolerance: float = 1e-6) -> Estimate:
    r"""Evidence by numerical integration, for latents of at most two dimensions.

    .. math:: \log p(x_n) = \log \int p(x_n, T(u))\, |\det T'(u)| \, du

    The latent is mapped to the reals by T; each row's window follows its integrand until the log
    density has fallen by 45 nats, and the trapezoidal rule, which converges geometrically there,
    is refined until two levels agree. A second mode that is narrower than the grid and far from
    the first can be missed.

    Args:
        model: A Pyro model with one local plate and at most two latent elements per datum.
        x: Rows, ``(batch, *event)``.
        tolerance: Wanted agreement between two levels, in nats; where rounding in the rows'
            floating point type is larger than that, agreement up to rounding.

    Returns:
        log p(x) with the last difference between two levels as its ``stderr``; ``bound`` is
        ``"exact"``.

    Raises:
        ValueError: If the latent has more than two elements, is discrete, or the rows or the
            model are unfit.

    Example:
        >>> import torch
        >>> from ppvae.models import ExponentialGaussian
        >>> quadrature(ExponentialGaussian(), torch.tensor([1.5])).value
        tensor([-1.3689])
    """
    check_rows(x, model)
    with judging(0, x, model), torch.no_grad():
        sites = read_model(model, x)
        if sites.size > 2:
            shapes = {s.name: s.event_shape for s in sites.latents.values()}
            raise ValueError(
                f"quadrature integrates at most 2 latent dimensions per datum; the model has "
                f"{sites.size}, in sites {shapes}. Use ppvae.iwae."
            )
        latents = list(sites.latents.values())
        nodes = _MOST_NODES[sites.size] ** sites.size // 16
        parts = [
            _integrate(model, x[rows], latents, sites.size, tolerance)
            for rows in row_chunks(x, min(nodes, 4096))
        ]
    value, error = (torch.cat(column) for column in zip(*parts, strict=True))
    return Estimate(value, error, "exact", "quadrature")


def _integrate(
    model: Program, x: Tensor, latents: list[LatentSite], dims: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    low = x.new_full((len(x), dims), -10.0, dtype=torch.float64)
    high = -low
    for _ in range(60):
        grid, log_f = _on_grid(model, x, latents, low, high, _START if dims == 1 else 65)
        new_low, new_high = _window(grid, log_f, low, high)
        width = high - low
        settled = ((new_low - low).abs() < 0.1 * width) & ((new_high - high).abs() < 0.1 * width)
        low, high = new_low, new_high
        if bool(settled.all()):
            break
    count = _START if dims == 1 else 65
    value = _trapezoid(model, x, latents, low, high, count)
    error = torch.full_like(value, torch.inf)
    # No finer grid removes the rounding of the model's own arithmetic.
    enough = (16 * torch.finfo(x.dtype).eps * value.abs()).clamp(min=tolerance)
    while count < _MOST_NODES[dims] and bool((error > enough).any()):
        count = 2 * count - 1
        rows = torch.nonzero(error > enough).flatten()
        finer = _trapezoid(model, x[rows], latents, low[rows], high[rows], count)
        error[rows] = (finer - value[rows]).abs()
        value[rows] = finer
    return value.to(x.dtype), error.to(x.dtype)


def _on_grid(
    model: Program, x: Tensor, latents: list[LatentSite], low: Tensor, high: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Nodes ``(count, batch, dims)`` per axis, and log f ``(count, [count,] batch)``."""
    unit = torch.linspace(0, 1, count, dtype=low.dtype, device=low.device)
    grid = low + unit[:, None, None] * (high - low)
    if low.shape[1] == 1:
        return grid, _log_f(model, x, latents, grid)
    first, second = grid[:, None, :, 0], grid[None, :, :, 1]
    u = torch.stack(torch.broadcast_tensors(first, second), dim=-1)
    flat = _log_f(model, x, latents, u.reshape(-1, *u.shape[2:]))
    return grid, flat.reshape(count, count, -1)


def _log_f(model: Program, x: Tensor, latents: list[LatentSite], u: Tensor) -> Tensor:
    """The log integrand at u ``(draws, batch, dims)``, in float64."""
    values, jacobian, at = {}, 0.0, 0
    for site in latents:
        part = u[..., at : at + site.size].to(x.dtype)
        part = part.reshape(*part.shape[:-1], *site.event_shape)
        transform = to_unconstrained(site)
        values[site.name] = transform(part)
        term = transform.log_abs_det_jacobian(part, values[site.name])
        extra = term.dim() - 2
        jacobian = jacobian + (term.flatten(-extra).sum(-1) if extra > 0 else term).double()
        at += site.size
    total = joint(model, x, values).double() + jacobian
    return torch.nan_to_num(total, nan=-torch.inf, posinf=-torch.inf)


def _window(grid: Tensor, log_f: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Per row and axis, the span on which log f is near its peak, one node wider on each side."""
    dims, count = grid.shape[-1], grid.shape[0]
    step = (high - low) / (count - 1)
    lows, highs = [], []
    for axis in range(dims):
        profile = log_f if dims == 1 else log_f.amax(dim=1 - axis)
        near = profile > profile.amax(dim=0) - _DEPTH
        position = torch.arange(count, device=grid.device)[:, None]
        first = torch.where(near, position, count).amin(dim=0)
        last = torch.where(near, position, -1).amax(dim=0)
        # A span that touches the window's end may go on beyond it, perhaps far.
        beyond = 2 * (high - low)[:, axis]
        left = torch.where(
            first == 0, low[:, axis] - beyond, low[:, axis] + (first - 1) * step[:, axis]
        )
        right = torch.where(
            last == count - 1, high[:, axis] + beyond, low[:, axis] + (last + 1) * step[:, axis]
        )
        lows.append(left)
        highs.append(right)
    return torch.stack(lows, dim=-1), torch.stack(highs, dim=-1)


def _trapezoid(
    model: Program, x: Tensor, latents: list[LatentSite], low: Tensor, high: Tensor, count: int
) -> Tensor:
    _, log_f = _on_grid(model, x, latents, low, high, count)
    log_cell = torch.log((high - low) / (count - 1)).sum(dim=-1)
    # The integrand vanishes at the ends, so that their half weights do not matter.
    return torch.logsumexp(log_f.flatten(0, -2), dim=0) + log_cell
