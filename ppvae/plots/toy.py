"""The toy model, where the exact posterior can be drawn beside its approximations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppvae.density import judging
from ppvae.guides import Amortized, PerDatapoint
from ppvae.isolation import check_rows
from ppvae.local import LocalFit
from ppvae.models import ExponentialGaussian
from ppvae.plots.style import BLACK, BLUE, GREY, ORANGE, axes_or_new, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
        "prior p(z)": (torch.exp(-z), GREY, ":", 1.4),
        "likelihood p(x | z), as a function of z": (
            torch.exp(torch.distributions.Normal(z, 1.0).log_prob(value)),
            GREY,
            (0, (5, 1, 1, 1, 1, 1)),
            1.4,
        ),
        "exact posterior p(z | x)": (torch.exp(posterior.log_prob(z)), BLACK, "-", 2.4),
        f"per-datapoint q*(z), {name}": (torch.exp(best.log_prob(z)), ORANGE, "--", 1.8),
        f"amortized q(z | x), {type(amortized.family).__name__}": (
            torch.exp(guided.log_prob(z)),
            BLUE,
            "-.",
            1.8,
        ),
    }
    ax = axes_or_new(ax, 5.5, 3.8)
    for label, (density, color, style, width) in lines.items():
        ax.plot(z.numpy(), density.numpy(), label=label, color=color, ls=style, lw=width)
    # A pole at z = 0 would leave no room for the rest.
    highest = max(float(density[z > 0.02 * z[-1]].max()) for density, *_ in lines.values())
    ax.set_xlim(0, float(z[-1]))
    ax.set_ylim(0, 1.08 * max(highest, float(torch.exp(posterior.log_prob(z)).max())))
    ax.set_title(f"x = {float(value):g}", fontsize="medium")
    ax.set_xlabel("latent z")
    ax.set_ylabel("density")
    return styled(ax)


def _reach(posterior: Any, *others: Any) -> float:
    """How far the z axis goes: all of the posterior, and of the guides what fits beside it."""
    needed = float(posterior.icdf(torch.tensor(0.99999, dtype=torch.float64)))
    wanted = max(float(q.mean + 2 * q.stddev) for q in others)
    return max(needed, min(wanted, 3 * needed) if math.isfinite(wanted) else needed)
