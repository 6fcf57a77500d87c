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
# As many dashes and marks as colours: what has one of its own has the others too.
LINES: tuple[Any, ...] = (
    *("-", "--", "-.", ":"),
    *((0, (9, 2)), (0, (4, 1, 1, 1, 1, 1)), (0, (1, 5))),
)
MARKS = ("o", "x", "^", "s", "D", "+", "v")
# Behind the data: what is unreliable, or where all is as it should be.
SHADE = "#dddddd"

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
        ax.grid(axis=grid, color=SHADE, linewidth=0.6)  # type: ignore[arg-type]
    if legend:
        ax.legend(frameon=False, fontsize="small")
    return ax


def legend_above(ax: Axes, *, columns: int = 1) -> Axes:
    """A legend that hides nothing: above the axes, at their left end."""
    ax.legend(
        frameon=False,
        fontsize="small",
        ncols=columns,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        borderaxespad=0.2,
    )
    return ax


def legend_beside(ax: Axes) -> Axes:
    """A legend that hides nothing: beside the axes."""
    if ax.get_legend_handles_labels()[1]:
        ax.legend(
            frameon=False,
            fontsize="small",
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
            markerscale=1.6,
        )
    return ax


def legend_below(ax: Axes, *, title: str | None = None, columns: int = 2) -> Axes:
    """A legend under the axis label, at the same distance whatever the size of the axes."""
    from matplotlib.transforms import ScaledTranslation

    below = ScaledTranslation(0, -40 / 72, ax.figure.dpi_scale_trans)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(
            title=title,
            title_fontsize="small",
            frameon=False,
            fontsize="small",
            ncols=columns,
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            bbox_transform=ax.transAxes + below,
        )
    return ax


@dataclass(frozen=True)
class PointLabel:
    """A text that belongs to a point, both in data coordinates."""

    x: float
    y: float
    text: str


def whole_ranks(ax: Axes) -> None:
    """Ticks of a horizontal axis of ranks: there is no half of a datum."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def settle(ax: Axes) -> None:
    """Give the axes the size that they will have, where a layout engine decides on it."""
    figure = ax.get_figure(root=True)
    engine = figure.get_layout_engine() if figure is not None else None
    if figure is not None and engine is not None:
        engine.execute(figure)


class Labels:
    """Writes labels one after the other, each where it covers least of what is there.

    Limits, scales and size of the axes have to be final (`settle`). The size of a text is
    estimated from its number of letters.

    Args:
        ax: The axes.
        points: All points that are drawn, ``(count, 2)`` in data coordinates.
        lines: The lines that are drawn, each ``(corners, 2)``.
    """

    def __init__(self, ax: Axes, points: Any, lines: Sequence[Any]) -> None:
        self.ax = ax
        self.obstacles = [_box(x, y, _MARKER - 1, _MARKER - 1) for x, y in self._at(points)]
        for line in lines:
            self.obstacles += [_box(x, y, _STROKE, _STROKE) for x, y in _along(self._at(line))]

    def beside(self, labels: Sequence[PointLabel], *, lead: bool = False) -> None:
        """Write each label beside its point.

        Args:
            labels: The labels.
            lead: Whether a thin line leads from a label that found no place near to its point.
        """
        at = self._at([(label.x, label.y) for label in labels])
        for label, (x, y) in zip(labels, at, strict=True):
            width, height = _size(label.text)
            places = []
            for across, up, far in _PLACES:
                dx = across * (0.5 * width + 0.5 * _MARKER + far)
                dy = up * (0.5 * height + 0.5 * _MARKER + far)
                box = _box(x + dx, y + dy, width, height)
                # A label that is nearer to another's point would be read as that one's.
                apart = _distance(box, x, y)
                astray = sum(_distance(box, *other) < apart - 1 for other in at)
                places.append((far + 20 * astray, dx, dy, box))
            self._write(label, places, "black", lead=lead)

    def on_line(self, height: float, text: str) -> None:
        """Write the name of a horizontal line above or below it, at the left if there is room."""
        left, right = self.ax.get_xlim()
        (start, y), (end, _) = self._at([(left, height), (right, height)])
        size = _size(text)
        places = []
        for share in np.linspace(0, 1, 9).tolist():
            dx = 3 + 0.5 * size[0] + share * (end - start - size[0] - 6)
            for dy in (0.5 * size[1] + 2, -0.5 * size[1] - 2):
                box = _box(start + dx, y + dy, *size)
                places.append((4 * share, dx, dy, box))
        self._write(PointLabel(left, height, text), places, "#555555")

    def _at(self, points: Any) -> Any:
        """Where points lie, in points of 72 to the inch."""
        return self.ax.transData.transform(points) * 72 / self.ax.figure.dpi

    def _write(
        self,
        label: PointLabel,
        places: Sequence[tuple[float, float, float, _Box]],
        color: str,
        *,
        lead: bool = False,
    ) -> None:
        """Write a label at the best of some places: (cost, dx, dy, box)."""
        axes: Any = np.asarray(self.ax.bbox.extents) * 72 / self.ax.figure.dpi

        def cost(place: tuple[float, float, float, _Box]) -> float:
            extra, _, _, box = place
            outside = (axes[:2] > box[:2]).any() or (axes[2:] < box[2:]).any()
            covered = sum(_shared(box, other) for other in self.obstacles)
            # Rounded, so that of equal places the first is taken.
            return round(extra + 1000 * bool(outside) + covered, 1)

        _, dx, dy, box = min(places, key=cost)
        ((x, y),) = self._at([(label.x, label.y)])
        apart = _distance(box, x, y) > _MARKER
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        # A text on a text is worse than a text on a line.
        self.obstacles += [box] * 3
        self.ax.annotate(
            label.text,
            (label.x, label.y),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_LABEL_SIZE,
            color=color,
            arrowprops=line if lead and apart else None,
        )


_Box = tuple[float, float, float, float]
# Directions in the order of preference, near ones first.
_PLACES = [
    (across, up, far)
    for far in (0.0, 4.0, 10.0, 18.0)
    for across, up in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
]


def _size(text: str) -> tuple[float, float]:
    """Width and height of a text, in points, as far as one knows before it is drawn."""
    return _LETTER * _LABEL_SIZE * len(text), _LINE * _LABEL_SIZE


def _box(x: float, y: float, width: float, height: float) -> _Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _along(corners: Any) -> Any:
    """Points on the way from corner to corner, one for each stroke's width."""
    pieces = [corners[:1]]
    for one, other in itertools.pairwise(corners):
        count = max(2, int(np.hypot(*(other - one)) / _STROKE))
        pieces.append(np.linspace(one, other, count + 1)[1:])
    return np.concatenate(pieces)


def _distance(box: _Box, x: float, y: float) -> float:
    """How far a point lies outside of a box."""
    across, up = max(box[0] - x, x - box[2], 0.0), max(box[1] - y, y - box[3], 0.0)
    return float(np.hypot(across, up))


def _shared(one: _Box, other: _Box) -> float:
    """The area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)
