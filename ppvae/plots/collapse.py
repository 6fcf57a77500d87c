"""What becomes of the latents in training: the KL of each element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ppvae.diagnostics import ElementKL
from ppvae.plots.style import LINES, MANY, axes_or_new, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Nats: below this the axis is linear, so that a collapsed element ends at the bottom.
_LINEAR = 0.01


def element_kl(
    found: Sequence[ElementKL], steps: Sequence[float], *, ax: Axes | None = None
) -> Axes:
    """The KL of each latent element over training, a line for each, a colour for each site.

    The axis is logarithmic, and linear below a hundredth of a nat.

    Args:
        found: What `ppvae.diagnostics.element_kl` gave, one after the other.
        steps: When each was found, such as the number of steps taken.
        ax: Where to draw; a new figure if left out.

    Raises:
        ValueError: If there is nothing to draw, there is not one number for each result, or the
            results are of different latents.

    Example:
        >>> from ppvae import data, diagnostics, fit, pairs
        >>> model, guide = pairs.vae(x_dim=64, z_dim=4, hidden=[16])
        >>> x, found = data.load("digits").train[:50], []
        >>> for _ in range(3):
        ...     found.append(diagnostics.element_kl(model, guide, x, num_samples=2))
        ...     run = fit(model, guide, x, steps=5, progress=False)
        >>> ax = element_kl(found, [0, 5, 10])
        >>> len(ax.lines)
        4
    """
    if not found or len(found) != len(steps):
        raise ValueError(
            f"steps: expected a number for each of at least one result; got {len(steps)} for "
            f"{len(found)} results."
        )
    names = found[0].names
    other = next((f.names for f in found if f.names != names), None)
    if other is not None:
        raise ValueError(f"found: expected results of the same latents {names}; got {other}.")
    ax = axes_or_new(ax, 5.5, 3.4)
    values = np.stack([f.kl.detach().cpu().numpy() for f in found])
    sites = list(dict.fromkeys(name.split("[")[0] for name in names))
    for name, line in zip(names, values.T, strict=True):
        site = name.split("[")[0]
        at = sites.index(site)
        first = name == next(n for n in names if n.split("[")[0] == site)
        ax.plot(
            steps,
            line,
            color=MANY[at % len(MANY)],
            linestyle=LINES[at % len(LINES)],
            linewidth=1.2,
            label=site if first else None,
        )
    ax.set_yscale("symlog", linthresh=_LINEAR)
    # Also where the axis is shared with one that has its limits.
    top = max(ax.get_ylim()[1], 1.2 * values[np.isfinite(values)].max(initial=_LINEAR))
    ax.set_ylim(0 if values.min() >= 0 else None, top)
    ax.set_xlabel("step")
    ax.set_ylabel("KL (nats per datum)")
    return styled(ax)
