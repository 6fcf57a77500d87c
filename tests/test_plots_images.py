"""Pictures of results made by hand, pixel by pixel beside those that were looked at.

Text is left out, as its pixels hang on the version of the font renderer; `test_plots.py` reads
it. After a change that is meant, run this file as a script to draw the pictures anew, and look at
them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.style
import pytest
import torch
from byhand import ledger, sandwiches
from matplotlib.figure import Figure
from matplotlib.testing.compare import compare_images
from matplotlib.text import Text

from ppvae import plots
from ppvae.families import LogNormal
from ppvae.guides import Amortized, PerDatapoint
from ppvae.nn import MLP

PICTURES = Path(__file__).parent / "pictures"
# Root mean square over all pixels, of 255. Matplotlib 3.10.7 and 3.11.2 draw these alike, and the
# changes below come to 5 and more.
TOLERANCE = 2.0


def toy_posterior(ax: Any) -> None:
    guide, free = Amortized(LogNormal(), MLP(1, [1], 2)), PerDatapoint(LogNormal(), 1)
    with torch.no_grad():
        for param in guide.parameters():
            param.zero_()
        free.table("z").weight.copy_(torch.tensor([[0.3, -0.4]]))
    plots.toy_posterior(torch.tensor([1.5]), guide, free, ax=ax)


DRAWN: dict[str, Callable[[Any], Any]] = {
    "toy_posterior": toy_posterior,
    "gap_bars": lambda ax: plots.gap_bars(ledger(), ax=ax),
    "gap_sorted": lambda ax: plots.gap_sorted(ledger(), ax=ax),
    "break_even": lambda ax: plots.break_even(ledger(), ax=ax),
    "pareto_k_sorted": lambda ax: plots.pareto_k_sorted(ledger(), ax=ax),
    "sandwich": lambda ax: plots.sandwich(sandwiches(), exact=-3.0, ax=ax),
}


def picture(draw: Callable[[Any], Any], path: Path, change: Callable[[Any], Any] = id) -> Path:
    """A small picture without text, in matplotlib's own settings."""
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(3.2, 2.4), dpi=60)
        ax = figure.add_axes((0.08, 0.08, 0.88, 0.88))
        draw(ax)
        change(ax)
        ax.get_legend().remove()
        for text in figure.findobj(Text):
            text.set_visible(False)
        figure.savefig(path, metadata={"Software": None})
    return path


def difference(name: str, path: Path) -> str | None:
    return compare_images(str(PICTURES / f"{name}.png"), str(path), TOLERANCE)


@pytest.mark.parametrize("name", DRAWN)
def test_the_picture_is_the_one_that_was_looked_at(name: str, tmp_path: Path) -> None:
    assert difference(name, picture(DRAWN[name], tmp_path / "now.png")) is None


def move(ax: Any) -> None:
    """The last line up by a twentieth of the axis."""
    low, high = ax.get_ylim()
    line = ax.lines[-1] if len(ax.lines[-1].get_xdata()) > 2 else ax.lines[0]
    line.set_ydata([y + 0.05 * (high - low) for y in line.get_ydata()])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gap_sorted", move),
        ("pareto_k_sorted", lambda ax: ax.lines[0].set_linestyle(":")),
        ("gap_bars", lambda ax: ax.patches[1].set_hatch("xxx")),
        ("toy_posterior", lambda ax: ax.lines[3].set_color("green")),
        ("sandwich", lambda ax: ax.lines[0].set_marker("o")),
        ("break_even", lambda ax: ax.set_ylim(ax.get_ylim()[0], 2 * ax.get_ylim()[1])),
    ],
)
def test_a_visible_change_is_found(name: str, change: Callable[[Any], Any], tmp_path: Path) -> None:
    said = difference(name, picture(DRAWN[name], tmp_path / "now.png", change))
    assert said is not None
    assert "did not match" in said


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        print(picture(draw, PICTURES / f"{name}.png"))
