"""A function of tensors that is called again and again, as a graph where that pays."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae.graphs.capturing import Graph, NotCapturableError, capture, capture_pays
from ppvae.graphs.checking import far_apart, rounding_of
from ppvae.graphs.running import CompileError, Runner, compiled, cuda_graph, draws_kept, replayed

# What is expected before it is measured. A replayed graph saves Python, which is a part of a call
# and no more than a millisecond; a compiled one saves a part of the rest.
_REPLAY_SAVES, _PYTHON_SECONDS = 0.4, 1e-3
_COMPILE_SAVES, _COMPILE_SECONDS = 0.4, 10.0
# Calls of a tier that are timed before the next is decided on.
_TIMED = 3


@dataclass
class _Plan:
    """How calls of one signature run."""

    tier: str = "eager"
    why: str = "Too few calls are left for a graph to pay."
    runner: Runner | None = None
    graph: Graph | None = None
    final: bool = False
    calls: int = 0
    seconds: float = 0.0
    timed: int = 0

    def adopt(self, tier: str, runner: Runner, why: str) -> None:
        self.tier, self.runner, self.why = tier, runner, why
        self.calls, self.seconds, self.timed = 0, 0.0, 0

    def stay(self, why: str) -> None:
        self.why, self.final = why, True


class Repeated:
    """Calls a function eagerly, and as a replayed or compiled graph once the calls left pay for it.

    What the function does besides torch operations on tensors (the numbers and flags that it reads)
    must not change while this object is in use, and it must change no tensor in place. Each graph
    is compared with the function, on the same inputs and random numbers, before it is used; what
    cannot be captured or differs is called eagerly, without a warning.

    Args:
        function: From tensors to a sequence of tensors, without gradients.
        calls: How many calls are expected in all.

    Example:
        >>> import torch
        >>> double = Repeated(lambda x: [2 * x], calls=1)
        >>> double(torch.ones(2))[0], double.tiers
        (tensor([2., 2.]), {'eager': 1})
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], calls: int) -> None:
        self._function, self._left = function, calls
        self._plans: dict[Hashable, _Plan] = {}
        self.tiers: dict[str, int] = {}

    @property
    def why(self) -> tuple[str, ...]:
        """For each signature, in words, why its calls run as they do."""
        return tuple(plan.why for plan in self._plans.values())

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The function's outputs."""
        plan = self._plans.setdefault(_signature(inputs), _Plan())
        if not plan.final and plan.timed >= _TIMED:
            self._advance(plan, inputs)
        run = self._function if plan.runner is None else plan.runner
        # The first call of a tier warms caches up.
        timing = not plan.final and plan.calls > 0
        began = _now(inputs) if timing else 0.0
        out = run(*inputs)
        if timing:
            plan.seconds += _now(inputs) - began
            plan.timed += 1
        plan.calls += 1
        self._left = max(0, self._left - 1)
        self.tiers[plan.tier] = self.tiers.get(plan.tier, 0) + 1
        return out

    def _advance(self, plan: _Plan, inputs: Sequence[Tensor]) -> None:
        each = plan.seconds / plan.timed
        compiles = self._left * each * _COMPILE_SAVES > _COMPILE_SECONDS
        if plan.graph is None:
            saved = min(each * _REPLAY_SAVES, _PYTHON_SECONDS)
            if not compiles and not capture_pays(self._left * saved, saved):
                return
            try:
                plan.graph = capture(self._function, inputs)
            except NotCapturableError as reason:
                plan.stay(f"No graph of it: {reason}.")
                return
            self._try(plan, "replayed graph", replayed(plan.graph), inputs)
        if compiles and not plan.final:
            try:
                runner, _ = compiled(plan.graph, inputs)
            except CompileError as reason:
                plan.stay(f"Torch's compiler did not take the graph: {reason}.")
                return
            self._try(plan, "compiled", runner, inputs)
            plan.final = True

    def _try(self, plan: _Plan, tier: str, runner: Runner, inputs: Sequence[Tensor]) -> None:
        """Use a runner if it gives what the function does on the same random numbers."""
        assert plan.graph is not None
        why = "Its first outputs were those of the function."
        if inputs[0].device.type == "cuda":
            try:
                runner = cuda_graph(runner, plan.graph, inputs)
                tier += " in a CUDA graph"
            except CompileError as reason:
                why += f" Its kernels are launched one by one: {reason}."
        with draws_kept(inputs):
            expected = self._function(*inputs)
        with draws_kept(inputs):
            found = runner(*inputs)
        gap = far_apart(expected, found, rounding_of(plan.graph))
        if gap is None:
            plan.adopt(tier, runner, why)
        else:
            plan.stay(f"Outputs of the {tier} differ from the function's by {gap:.2g} of the norm.")


def _signature(inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    described = tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
    modes = (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    return (*described, *modes, torch.get_default_dtype())


def _now(inputs: Sequence[Tensor]) -> float:
    """A clock that waits for the work in flight on a CUDA device."""
    if inputs[0].device.type == "cuda":
        torch.cuda.synchronize(inputs[0].device)
    return time.perf_counter()
