"""What an optimizer does to the parameters, as tensor operations of the same graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

# What of Adam's options a graph has frozen. Others say how it is computed.
_OPTIONS = ("betas", "eps", "weight_decay", "amsgrad", "maximize")


class Update(ABC):
    """The update of some parameters from their gradients."""

    @property
    @abstractmethod
    def places(self) -> list[tuple[Mapping[Any, Any], Any]]:
        """Where options and state of the optimizer are: what the graph has frozen, or holds."""

    @abstractmethod
    def numbers(self) -> list[float]:
        """What changes from step to step, such as learning rates, for the coming step."""

    @abstractmethod
    def apply(self, gradients: Sequence[Tensor | None], numbers: Tensor, go: Tensor) -> None:
        """Change parameters and state in place, or leave them where ``go`` is false.

        Args:
            gradients: One for each parameter; what has none stays.
            numbers: Those of `numbers`, as a tensor.
            go: ``()``, bool.
        """

    @abstractmethod
    def gradients(self, before: Mapping[int, Tensor], has: Sequence[bool]) -> list[Tensor]:
        """The gradients that the last update was made from, for its check.

        Args:
            before: What the tensors of the state held before it, by their ``id``.
            has: Which parameters had one.
        """

    @abstractmethod
    def count(self, has: Sequence[bool]) -> None:
        """Count a step of the parameters that had a gradient."""


class AdamUpdate(Update):
    """Torch's own Adam, with its own state: `torch.optim.Adam` can go on from there, and back.

    Args:
        params: The parameters, in the order of the gradients.
        optimizers: The optimizer of each, with a state from at least one step.
    """

    def __init__(self, params: Sequence[Tensor], optimizers: Sequence[Adam]) -> None:
        self._params, self._optimizers = list(params), list(optimizers)
        self._groups = [_group_of(o, p) for o, p in zip(optimizers, params, strict=True)]
        self._states = [o.state[p] for o, p in zip(optimizers, params, strict=True)]
        # Views of numbers in memory, which are read and written without a call of torch.
        self._steps = [memoryview(state["step"].numpy()) for state in self._states]

    @staticmethod
    def refusal(param: Tensor, optimizer: Any) -> str | None:
        """Why an update of torch's cannot be part of the graph; `None` where it can."""
        if type(optimizer) is not Adam:
            return f"{type(optimizer).__name__} is not torch.optim.Adam"
        group = _group_of(optimizer, param)
        if group["weight_decay"] or group["amsgrad"] or group["maximize"]:
            return "of Adam's options only lr, betas and eps are known here"
        if isinstance(group["lr"], Tensor) or any(isinstance(b, Tensor) for b in group["betas"]):
            return "Adam's learning rate is a tensor"
        state = optimizer.state.get(param)
        if not state or state["step"].device.type != "cpu":
            return "Adam keeps its count of steps on the device"
        return None

    @property
    def places(self) -> list[tuple[Mapping[Any, Any], Any]]:
        """The options but for the learning rates, and the moments."""
        out: list[tuple[Mapping[Any, Any], Any]] = []
        for optimizer, group, state in zip(
            self._optimizers, self._groups, self._states, strict=True
        ):
            out += [(vars(optimizer), "state"), (vars(optimizer), "param_groups")]
            out += [(group, key) for key in _OPTIONS]
            out += [(state, key) for key in ("exp_avg", "exp_avg_sq", "step")]
        return list({(id(place), key): (place, key) for place, key in out}.values())

    def numbers(self) -> list[float]:
        """For each parameter −lr/(1 − β₁ᵗ) and the root of 1 − β₂ᵗ."""
        out: list[float] = []
        for group, step in zip(self._groups, self._steps, strict=True):
            count = step[()] + 1
            first, second = group["betas"]
            out += [-group["lr"] / (1 - first**count), (1 - second**count) ** 0.5]
        return out

    def apply(self, gradients: Sequence[Tensor | None], numbers: Tensor, go: Tensor) -> None:
        """Kingma & Ba 2015, algorithm 1, in the order of torch's operations."""
        for at, (param, gradient) in enumerate(zip(self._params, gradients, strict=True)):
            if gradient is None:
                continue
            state, (first, second) = self._states[at], self._groups[at]["betas"]
            rate, root = numbers[2 * at], numbers[2 * at + 1]
            gradient = torch.where(go, gradient, 0.0)
            one = go.to(gradient.dtype)
            state["exp_avg"].copy_(
                _without_dust(torch.lerp(state["exp_avg"], gradient, one * (1 - first)))
            )
            state["exp_avg_sq"].mul_(1 - one * (1 - second))
            state["exp_avg_sq"].addcmul_(gradient, gradient, value=1 - second)
            scale = state["exp_avg_sq"].sqrt() / root.to(param.dtype) + self._groups[at]["eps"]
            param.add_(state["exp_avg"] / scale * (one * rate.to(param.dtype)))

    def count(self, has: Sequence[bool]) -> None:
        """Count a step of the parameters that had a gradient."""
        for step, had in zip(self._steps, has, strict=True):
            if had:
                step[()] = step[()] + 1

    def gradients(self, before: Mapping[int, Tensor], has: Sequence[bool]) -> list[Tensor]:
        """From the change of the first moment."""
        out = []
        for group, state, had in zip(self._groups, self._states, has, strict=True):
            if had:
                moment, first = state["exp_avg"], group["betas"][0]
                out.append((moment - first * before[id(moment)]) / (1 - first))
        return out


class RowAdam(Update):
    """Adam on a table, for the rows of a minibatch alone (Kingma & Ba 2015).

    Torch's Adam moves every row at every step through its moments, the rows that are not in the
    minibatch too. Here a row's parameters, moments and step count change only with the row.

    Args:
        weight: The table, ``(num_data, num_params)``.
        lr: Learning rate.

    Attributes:
        rows: Which rows the gradient of the current step is about.
    """

    def __init__(self, weight: Tensor, lr: float) -> None:
        self.weight, self.lr = weight, lr
        self.first = torch.zeros_like(weight)
        self.second = torch.zeros_like(weight)
        self._count = torch.zeros(len(weight), 1, dtype=weight.dtype, device=weight.device)
        self.rows = torch.zeros(0, dtype=torch.long, device=weight.device)

    def step(self, rows: Tensor) -> None:
        """Update these rows from ``weight.grad``."""
        self.rows = rows
        go = torch.ones((), dtype=torch.bool, device=self.weight.device)
        with torch.no_grad():
            self.apply([self.weight.grad], self.weight.new_zeros(1), go)

    @property
    def places(self) -> list[tuple[Mapping[Any, Any], Any]]:
        """The learning rate and the moments."""
        return [(vars(self), key) for key in ("weight", "lr", "first", "second", "_count")]

    def numbers(self) -> list[float]:
        """None: the rows have counts of their own."""
        return []

    def apply(self, gradients: Sequence[Tensor | None], numbers: Tensor, go: Tensor) -> None:
        """Change the rows alone."""
        (gradient,), rows = gradients, self.rows
        assert gradient is not None
        gradient, one = torch.where(go, gradient[rows], 0.0), go.to(gradient.dtype)
        count = self._count[rows] + one
        first = _without_dust((1 - 0.1 * one) * self.first[rows] + 0.1 * gradient)
        second = (1 - 0.001 * one) * self.second[rows] + 0.001 * gradient**2
        # A row that never went has a count of 0.
        past = count.clamp(min=1)
        scale = (second / (1 - 0.999**past)).sqrt() + 1e-8
        move = one * self.lr * first / (1 - 0.9**past) / scale
        self._count[rows], self.first[rows], self.second[rows] = count, first, second
        self.weight[rows] = self.weight[rows] - move

    def count(self, has: Sequence[bool]) -> None:
        """Nothing: rows count themselves."""

    def gradients(self, before: Mapping[int, Tensor], has: Sequence[bool]) -> list[Tensor]:
        """From the change of the first moment."""
        out = torch.zeros_like(self.weight)
        known = before[id(self.first)]
        out[self.rows] = (self.first[self.rows] - 0.9 * known[self.rows]) / 0.1
        return [out.detach()]


class Updates(Update):
    """Several updates, one after the other.

    Args:
        parts: Each with the numbers of its parameters among all.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[int], Update]]) -> None:
        self._parts = parts

    @property
    def places(self) -> list[tuple[Mapping[Any, Any], Any]]:
        """Those of the parts."""
        return [place for _, part in self._parts for place in part.places]

    def numbers(self) -> list[float]:
        """Those of the parts."""
        return [number for _, part in self._parts for number in part.numbers()]

    def apply(self, gradients: Sequence[Tensor | None], numbers: Tensor, go: Tensor) -> None:
        """Each part's."""
        at = 0
        for own, part in self._parts:
            part.apply([gradients[i] for i in own], numbers[at:], go)
            at += len(part.numbers())

    def count(self, has: Sequence[bool]) -> None:
        """Each part's."""
        for own, part in self._parts:
            part.count([has[i] for i in own])

    def gradients(self, before: Mapping[int, Tensor], has: Sequence[bool]) -> list[Tensor]:
        """Those of the parts, in the order of the parameters."""
        found: dict[int, Tensor] = {}
        for own, part in self._parts:
            with_one = [i for i in own if has[i]]
            values = part.gradients(before, [has[i] for i in own])
            found.update(zip(with_one, values, strict=True))
        return [found[i] for i in sorted(found)]


def _without_dust(moment: Tensor) -> Tensor:
    """A first moment, 0 where it is about to leave the normal floating point numbers.

    The moment of a weight whose gradient stays at 0, as that of a unit that is never on, halves
    every seven steps. Below the normal numbers a CPU takes a hundred times as long for each
    operation: after a thousand steps a small VAE's step took twice its time. What is dropped has a
    square of 0 itself, and moves no weight.
    """
    if moment.device.type != "cpu":
        return moment
    return torch.nn.functional.hardshrink(moment, torch.finfo(moment.dtype).tiny * 2**20)


def _group_of(optimizer: Any, param: Tensor) -> dict[str, Any]:
    group: dict[str, Any] = next(
        g for g in optimizer.param_groups if any(p is param for p in g["params"])
    )
    return group
