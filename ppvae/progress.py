"""Progress bars of long runs: drawn where somebody looks on, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Bar:
    """What a run tells of how far it is.

    Attributes:
        drawn: Whether there is a bar to be seen. A figure that costs something is found only then.
    """

    def __init__(self, bar: Any = None) -> None:
        self._bar = bar
        self.drawn = bar is not None

    def advance(self, count: int = 1, figure: Callable[[], str] | None = None) -> None:
        """Go on by some units.

        Args:
            count: How many.
            figure: Says how the run stands, in a word or two; asked only where the bar is drawn
                anew, some times a second at most.
        """
        # `update` says whether the bar was drawn anew.
        if self._bar is not None and self._bar.update(count) and figure is not None:
            self._bar.set_postfix_str(figure())


SILENT = Bar()
"""A bar that nobody sees."""


@contextmanager
def progress_bar(total: int, name: str, unit: str, *, shown: bool) -> Iterator[Bar]:
    """A bar with rate and time left while the context lasts; it leaves no line behind.

    It is drawn on a terminal and in a notebook. Where stderr goes to a file, a pipe or a log
    nothing is written.

    Args:
        total: Number of units.
        name: What is done.
        unit: What is counted, such as ``"row"``.
        shown: Whether the caller wants it.

    Example:
        >>> with progress_bar(3, "rows", "row", shown=True) as bar:
        ...     for _ in range(3):
        ...         bar.advance()
    """
    if not (shown and _is_watched()):
        yield SILENT
        return
    from tqdm.auto import tqdm

    bar = tqdm(total=total, desc=name, unit=unit, leave=False)
    try:
        yield Bar(bar)
    finally:
        bar.close()


def _is_watched() -> bool:
    """Whether stderr is a terminal, or this is a notebook, whose streams say that they are none.

    tqdm's own ``disable=None`` asks for a terminal alone, and so is silent in notebooks.
    """
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if "IPKernelApp" in getattr(shell, "config", {}):
        return True
    return sys.stderr is not None and sys.stderr.isatty()
