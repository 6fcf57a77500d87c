"""Pieces of HTML: tables, and what a notebook shows of a result.

The templates lie in ``ppvae/templates``. All text is escaped where it enters a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jinja2 import Environment


class Cell(NamedTuple):
    """The text of a cell, and a smaller line under it."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class TextTable:
    """A table of text, whose first column names its rows.

    Attributes:
        header: The names of the columns.
        rows: As many cells in each row as there are columns; a string is a cell without a note.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]

    def cells(self) -> list[list[Cell]]:
        """All cells, as such."""
        return [[Cell(c) if isinstance(c, str) else c for c in row] for row in self.rows]


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("ppvae"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """A template of the package, filled in.

    Args:
        template: Its file name.
        values: What it asks for; text is escaped.
    """
    return _environment().get_template(template).render(**values)


def card(title: str, lines: Sequence[str], table: TextTable) -> str:
    """What a notebook shows of a result: a title, what is said in words, and a table.

    It takes its colours from the notebook, light or dark.

    Args:
        title: What it is.
        lines: Each a paragraph; line breaks inside of one are kept.
        table: The figures.

    Example:
        >>> "a &lt; b" in card("a < b", [], TextTable(("", "mean"), [("loss", "1.0")]))
        True
    """
    return render("card.html", title=title, lines=lines, table=table)
