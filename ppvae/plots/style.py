"""What all figures share: colours, a bare frame, and labels that keep clear of each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLACK, GREY = "#000000", "#7f7f7f"
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
PINK, SKY, YELLOW = "#CC79A7", "#56B4E9", "#E69F00"
MANY = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, BLACK)

_LABEL_SIZE = 8.0
# Of the size of a font: how wide its letters are on average, and how high a line of it.
_LETTER, _LINE = 0.58, 1.2
_MARKER, _STROKE = 7.0, 3.0


def axes_or_new(ax: Axes | None, width: float, height: float) -> Axes:
    """The axes that were given, or those of a new figure; in inches."""
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    return ax


def styled(ax: Axes, *, legend: bool = True, grid: str | None = "y") -> Axes:
    """The frame of every figure.

    Args:
        ax: The axes.
        legend: Whether to draw one, inside.
        grid: Across which axis the lines of the grid go; none for `None`.
    """
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    if grid:
        ax.grid(axis=grid, color="#dddddd", linewidth=0.6)  # type: ignore[arg-type]
    if legend:
        ax.legend(frameon=False, fontsize="small")
    return ax


@dataclass(frozen=True)
class PointLabel:
    """A text that belongs to a point, both in data coordinates."""

    x: float
    y: float
    text: str
    color: str


def settle(ax: Axes) -> None:
    """Give the axes the size that they will have, where a layout engine decides on it."""
    figure = ax.get_figure(root=True)
    engine = figure.get_layout_engine() if figure is not None else None
    if figure is not None and engine is not None:
        engine.execute(figure)


def label_points(ax: Axes, labels: Sequence[PointLabel], avoid: Sequence[Any] = ()) -> None:
    """Write each label beside its point, where it covers least of what is there.

    Limits, scales and size of the axes have to be final (`settle`). A place is found for one label
    after the other; the size of a text is estimated from its number of letters.

    Args:
        ax: The axes.
        labels: The labels, with their points.
        avoid: Lines that the labels should not lie on, each ``(corners, 2)`` in data coordinates.
    """
    to_points = 72 / ax.figure.dpi
    left, bottom, right, top = (to_points * side for side in ax.bbox.extents)
    at = to_points * ax.transData.transform([(label.x, label.y) for label in labels])
    obstacles = [_box(x, y, _MARKER, _MARKER) for x, y in at]
    for line in avoid:
        corners = to_points * ax.transData.transform(line)
        obstacles += [_box(x, y, _STROKE, _STROKE) for x, y in _along(corners)]
    for label, (x, y) in zip(labels, at, strict=True):
        width, height = _LETTER * _LABEL_SIZE * len(label.text), _LINE * _LABEL_SIZE
        best: tuple[float, float, float, _Box] | None = None
        for across, up, far in _PLACES:
            dx = across * (0.5 * width + 0.5 * _MARKER + far)
            dy = up * (0.5 * height + 0.5 * _MARKER + far)
            box = _box(x + dx, y + dy, width, height)
            outside = box[0] < left or box[1] < bottom or box[2] > right or box[3] > top
            cost = far + 1000 * outside + sum(_shared(box, other) for other in obstacles)
            if best is None or cost < best[0]:
                best = cost, dx, dy, box
        assert best is not None
        _, dx, dy, box = best
        # A text on a text is worse than a text on a line.
        obstacles += [box] * 3
        ax.annotate(
            label.text,
            (label.x, label.y),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_LABEL_SIZE,
            color=label.color,
        )


_Box = tuple[float, float, float, float]
# Directions in the order of preference, near ones first.
_PLACES = [
    (across, up, far)
    for far in (0.0, 4.0, 10.0, 18.0)
    for across, up in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
]


def _box(x: float, y: float, width: float, height: float) -> _Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _along(corners: Any) -> Any:
    """Points on the way from corner to corner, one for each stroke's width."""
    pieces = [corners[:1]]
    for one, other in itertools.pairwise(corners):
        count = max(2, int(np.hypot(*(other - one)) / _STROKE))
        pieces.append(np.linspace(one, other, count + 1)[1:])
    return np.concatenate(pieces)


def _shared(one: _Box, other: _Box) -> float:
    """The area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)
