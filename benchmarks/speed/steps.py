"""What every contestant of the step benchmark answers to."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from speed import problems


class Steps(ABC):
    """Optimisation steps on one problem.

    Args:
        kind: Name of the problem.
        rows: Rows of a batch.
        small: Whether the networks are small, for trying out.
        device: Where it runs.
        options: What tells contestants of one class apart.
    """

    def __init__(
        self, kind: str, rows: int, small: bool = False, device: str = "cpu", **options: Any
    ) -> None:
        self.problem = problems.make(kind, rows, small)
        self.device = device
        self.options = options
        self.setup()

    def setup(self) -> None:  # noqa: B027
        """Import what it needs, so that imports are not counted as compilation."""

    @abstractmethod
    def start(self, lr: float) -> None:
        """Begin from the first parameters, with this learning rate."""

    @abstractmethod
    def step(self, x: Any) -> Any:
        """One step; the sum of the loss over rows, as the library gives it."""

    @abstractmethod
    def batches(self) -> list[Any]:
        """The data, as the library takes them."""

    def begin(self, lr: float | None = None) -> None:
        """Start afresh, with the first batch next."""
        self._stream: Iterator[Any] = itertools.cycle(self.batches())
        self.start(self.problem.lr if lr is None else lr)

    def steps(self, count: int) -> int:
        """At least so many steps, the last one waited for; how many they were."""
        for _ in range(count):
            loss = self.step(next(self._stream))
        float(loss)
        return count

    def losses(self, count: int) -> list[float]:
        """Steps, and the loss of each in nats a datum."""
        return [float(self.step(next(self._stream))) / self.problem.rows for _ in range(count)]

    def note(self) -> str:
        """What there is to say of how it ran."""
        return ""
