r"""How the weight β of the KL term goes from step to step: functions of the step, without state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]
"""The weight of a step, the first being 0."""


@dataclass(frozen=True)
class Linear:
    r"""From one weight to another in equal steps, and that other from then on.

    .. math:: \beta_t = \beta_0 + (\beta_1 - \beta_0) \min(t / T, 1), \qquad t = 0, 1, \ldots

    KL annealing, or warm-up (Bowman et al. 2016; Sønderby et al. 2016).

    Args:
        steps: T, the steps that the way takes.
        start: :math:`\beta_0`.
        stop: :math:`\beta_1`.

    Raises:
        ValueError: If ``steps`` is less than 1, or a weight negative or not finite.

    Example:
        >>> warm_up = Linear(100)
        >>> warm_up(0), warm_up(25), warm_up(100), warm_up(1000)
        (0.0, 0.25, 1.0, 1.0)
    """

    steps: int
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}.")
        check_weight("start", self.start)
        check_weight("stop", self.stop)

    def __call__(self, step: int) -> float:
        """The weight of a step."""
        return self.start + (self.stop - self.start) * min(step / self.steps, 1.0)


@dataclass(frozen=True)
class Cyclical:
    r"""Up and held, again and again: M cycles of equal length, each a warm-up of its own.

    With T steps in all, cycles of length :math:`L = T / M` and
    :math:`\tau_t = (t \bmod L) / L`,

    .. math:: \beta_t = \beta_0 + (\beta_1 - \beta_0) \min(\tau_t / R, 1)

    and :math:`\beta_1` after T steps (Fu et al. 2019, whose M = 4 and R = 0.5 are the defaults).

    Args:
        steps: T.
        cycles: M.
        rise: R, the part of a cycle in which the weight rises, in (0, 1].
        start: :math:`\beta_0`, with which each cycle begins.
        stop: :math:`\beta_1`.

    Raises:
        ValueError: If there is no cycle, or more of them than steps, ``rise`` is out of range,
            or a weight negative or not finite.

    Example:
        >>> waves = Cyclical(400, cycles=4)
        >>> [waves(t) for t in (0, 25, 50, 99, 100, 125, 400)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0]
    """

    steps: int
    cycles: int = 4
    rise: float = 0.5
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if self.cycles < 1 or self.steps < self.cycles:
            raise ValueError(
                f"Expected at least one cycle, and a step for each; got steps={self.steps}, "
                f"cycles={self.cycles}."
            )
        if not 0 < self.rise <= 1:
            raise ValueError(f"rise must be in (0, 1]; got {self.rise}.")
        check_weight("start", self.start)
        check_weight("stop", self.stop)

    def __call__(self, step: int) -> float:
        """The weight of a step."""
        if step >= self.steps:
            return self.stop
        # In whole numbers, so that a cycle begins where it should.
        part = (step * self.cycles % self.steps) / self.steps
        return self.start + (self.stop - self.start) * min(part / self.rise, 1.0)


def check_weight(name: str, value: float) -> None:
    """Refuse a weight that is negative or not finite."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite weight of at least 0; got {value}.")
