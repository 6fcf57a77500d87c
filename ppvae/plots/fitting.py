"""A training run, step by step or second by second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ppvae.alternating import Alternation
from ppvae.plots.style import LINES, MANY, axes_or_new, legend_below, styled
from ppvae.training import Fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Steps over which a mean is taken, as a share of the shortest run.
_SMOOTHED = 0.02


def losses(
    fits: Fit | Alternation | Mapping[str, Fit | Alternation],
    *,
    against: Literal["step", "time"] = "step",
    window: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The loss of one training run or of several, as a running mean.

    A mean over some steps stands at the last of them. A single run has the losses of its steps
    behind it, as far as they lie within the limits of the mean.

    Args:
        fits: What `ppvae.fit` or `ppvae.fit_alternating` gave; or several by name.
        against: Steps, or seconds since the call.
        window: Steps of the mean; a fiftieth of the shortest run if left out.
        ax: Where to draw; a new figure if left out.

    Raises:
        ValueError: If there is nothing to draw, or the window is longer than a run.

    Example:
        >>> import ppvae
        >>> model, guide = ppvae.pairs.exponential_gaussian()
        >>> fit = ppvae.fit(model, guide, model(size=50), steps=40, progress=False)
        >>> ax = losses(fit, window=10)
        >>> ax.get_ylabel()
        'loss, mean of 10 steps (nats per datum)'
    """
    runs = dict(fits) if isinstance(fits, Mapping) else {"": fits}
    if not runs or not all(len(run.losses) for run in runs.values()):
        raise ValueError("fits: expected at least one run, each with at least one step.")
    if against not in ("step", "time"):
        raise ValueError(f'against: expected "step" or "time"; got {against!r}.')
    shortest = min(len(run.losses) for run in runs.values())
    width = max(1, int(_SMOOTHED * shortest)) if window is None else window
    if not 1 <= width <= shortest:
        raise ValueError(
            f"window: expected 1 to {shortest} steps, as the shortest run; got {width}."
        )
    ax = axes_or_new(ax, 5.5, 3.6)
    for at, (name, run) in enumerate(runs.items()):
        values: Any = run.losses.double().numpy()
        where = np.arange(1, len(values) + 1) if against == "step" else run.elapsed.numpy()
        mean = np.convolve(values, np.full(width, 1 / width), mode="valid")
        color = MANY[at % len(MANY)]
        ax.plot(
            where[width - 1 :],
            mean,
            label=name or None,
            color=color,
            linestyle=LINES[at % len(LINES)],
            linewidth=1.4,
        )
        if len(runs) == 1 and width > 1:
            limits = ax.get_ylim()
            ax.plot(where, values, color="#bbbbbb", linewidth=0.4, zorder=1)
            ax.set_ylim(limits)
    ax.set_xlabel("step" if against == "step" else "wall time (s)")
    smoothed = f", mean of {width:,} steps" if width > 1 else ""
    ax.set_ylabel(f"loss{smoothed} (nats per datum)")
    return legend_below(styled(ax, legend=False))
