"""Which way a step runs: eagerly, as a replayed graph, or compiled."""

from __future__ import annotations

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import FunctionType
from typing import Any, Literal

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ppvae import graphs
from ppvae.compiled.captured import Arguments, Captured, Job, UnsupportedObjectiveError
from ppvae.compiled.reporting import CompileReport, CompileWarning, Signature
from ppvae.graphs import CompileError, NotCapturableError, Runner
from ppvae.objectives import Objective

Mode = bool | Literal["auto"]

# What "auto" expects before it has measured: that a replayed graph saves this part of an eager
# step and a compiled one this part of a replayed, and what getting there costs, in seconds.
_REPLAY_SAVES, _CAPTURE_SECONDS = 0.4, 1.0
_COMPILE_SAVES, _COMPILE_SECONDS, _SECONDS_PER_OPERATION = 0.5, 8.0, 0.02
# Steps of a tier that are timed before one decides on the next.
_TIMED = 5
# A program that changes what a graph has frozen at every step is left alone after so many graphs.
_MOST_GRAPHS = 3
_KINDS = ("cpu", "cuda")
# Arguments that are equal if they are the same, or of the same value.
_KNOWN_AGAIN: tuple[type, ...] = (Tensor, bool, int, float, str, type(None), Enum)
_KNOWN_AGAIN += (torch.dtype, torch.device, nn.Module, FunctionType)


class Work(ABC):
    """What a step does, to whoever decides how it runs.

    Attributes:
        params: What the last eager step trained.
    """

    def __init__(self) -> None:
        self.params: list[Tensor] = []

    @abstractmethod
    def eager(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Take a step as Pyro does, and return its losses."""

    @abstractmethod
    def job(self, params: Sequence[Tensor]) -> Job:
        """What a graph of the step has to do.

        Args:
            params: What an eager step with such arguments trained.

        Raises:
            NotCapturableError: If it is known that there is none.
        """


@dataclass
class _Plan:
    """How steps of one signature run, and what is known of it."""

    arguments: str
    tier: str = "eager"
    why: str = "The first step of a signature runs eagerly, with Pyro's validation."
    params: list[Tensor] = field(default_factory=list)
    captured: Captured | None = None
    runner: Runner | None = None
    final: bool = False
    graphs_made: int = 0
    capture_seconds: float = 0.0
    compile_seconds: float = 0.0
    products: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    timed: dict[str, int] = field(default_factory=dict)

    def count(self, tier: str, began: float | None) -> None:
        done = self.steps.get(tier, 0)
        self.steps[tier] = done + 1
        # The first step of a tier warms caches up.
        if began is not None and (done or tier == "eager"):
            self.seconds[tier] = self.seconds.get(tier, 0.0) + time.perf_counter() - began
            self.timed[tier] = self.timed.get(tier, 0) + 1

    def leave_eager(self, why: str) -> None:
        self.tier, self.runner, self.why, self.final = "eager", None, why, True

    def report(self) -> Signature:
        seconds = {tier: self.seconds[tier] / n for tier, n in self.timed.items()}
        if self.captured is not None and math.isfinite(self.captured.eager_seconds):
            seconds.setdefault("eager", self.captured.eager_seconds)
        return Signature(
            arguments=self.arguments,
            tier=self.tier,
            why=self.why,
            steps=dict(self.steps),
            step_seconds=seconds,
            capture_seconds=self.capture_seconds,
            compile_seconds=self.compile_seconds,
            operations=0 if self.captured is None else self.captured.graph.num_nodes,
            products=self.products,
        )


class Stepper:
    """Takes steps, each in the fastest way that is known to be right.

    Args:
        work: What a step does.
        mode: `True` compiles at the second step of a signature, `False` never, ``"auto"`` once
            the steps that are expected to come pay for it.
        steps: How many steps will be taken in all; if left out as many are expected to come as
            were taken.

    Raises:
        ValueError: If the mode is another.
    """

    def __init__(self, work: Work, mode: Mode, steps: int | None = None) -> None:
        if mode not in (True, False, "auto"):
            raise ValueError(f'compile must be True, False or "auto"; got {mode!r}.')
        self._work, self._mode, self._total = work, mode, steps
        self._plans: dict[Hashable, _Plan] = {}
        self._taken = 0
        self._warned: set[str] = set()

    @property
    def params(self) -> list[Tensor]:
        """What the last eager step trained."""
        return self._work.params

    def report(self) -> CompileReport:
        """How steps ran until now."""
        return CompileReport(tuple(plan.report() for plan in self._plans.values()))

    def __call__(self, *args: Any, **kwargs: Any) -> Sequence[Tensor]:
        """Take a step and return its losses, tensors without dimensions.

        Raises:
            ValueError: What Pyro says of a pair that is unfit, or of rows that are.
        """
        self._taken += 1
        arguments = (args, kwargs)
        key, tensors, rebuild = _signature(args, kwargs)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = _Plan(_in_words(args, kwargs))
            if self._mode is False:
                plan.leave_eager("compile=False.")
            elif rebuild is None:
                plan.leave_eager(
                    "It runs inside of a handler of Pyro's."
                    if _PYRO_STACK
                    else "An argument is no tensor, number, word or module, so that a change of it "
                    "would not be noticed."
                )
                if self._mode is True:
                    self._warn(plan.why)
            return self._eager(plan, arguments, timed=False)
        if plan.captured is not None and plan.runner is not None:
            changed = plan.captured.changed()
            if changed is not None:
                self._drop(plan, changed)
                return self._eager(plan, arguments, timed=False)
        if not plan.final and rebuild is not None:
            self._advance(plan, tensors, rebuild, arguments)
        if plan.runner is None:
            return self._eager(plan, arguments, timed=True)
        return self._run(plan, tensors, arguments)

    def _eager(self, plan: _Plan, arguments: Arguments, *, timed: bool) -> Sequence[Tensor]:
        began = time.perf_counter()
        losses = self._work.eager(*arguments)
        plan.params = self._work.params
        plan.count("eager", began if timed else None)
        return losses

    def _run(
        self, plan: _Plan, tensors: Sequence[Tensor], arguments: Arguments
    ) -> Sequence[Tensor]:
        captured = plan.captured
        assert captured is not None
        assert plan.runner is not None
        began = time.perf_counter()
        try:
            losses, taken, gradients = captured.launch(plan.runner, tensors)
            refused = taken.device.type == "cpu" and not taken.item()
        except RuntimeError:  # Such as of a matrix that is not positive definite.
            refused = True
        if refused:
            # No parameter was changed: Pyro says what is wrong, or takes the step that it would.
            captured.undo()
            return self._eager(plan, arguments, timed=False)
        job = captured.job
        if job.update is not None:
            job.update.count(captured.has_gradient)
        if job.finish is not None:
            job.finish(gradients)
        if isinstance(job.loss, Objective):
            job.loss.count_step()
        plan.count(plan.tier, began)
        return losses

    def _drop(self, plan: _Plan, changed: str) -> None:
        """Forget a graph of how things were."""
        plan.runner, plan.tier, plan.final = None, "eager", False
        plan.why = f"{changed} has changed since the graph was captured: another will be."
        if plan.graphs_made >= _MOST_GRAPHS:
            plan.leave_eager(f"{changed} changes again and again, which a graph would freeze.")
            self._warn(plan.why)

    def _advance(
        self,
        plan: _Plan,
        tensors: Sequence[Tensor],
        rebuild: Callable[[Sequence[Tensor]], Arguments],
        arguments: Arguments,
    ) -> None:
        """Go to a faster tier, if it is time to."""
        if plan.runner is None and self._pays(plan, "eager"):
            began = time.perf_counter()
            try:
                plan.graphs_made += 1
                job = self._work.job(plan.params)
                others = [v for v in tree_leaves(arguments) if not isinstance(v, Tensor)]
                captured = plan.captured = Captured(job, tensors, rebuild, others)
                self._adopt(
                    plan, "replayed graph", graphs.replayed(captured.graph), tensors, arguments
                )
            except NotCapturableError as reason:
                plan.leave_eager(f"No graph of this step: {reason}.")
                # Of an objective that is always eager, only who asked for a graph has to hear.
                if self._mode is True or not isinstance(reason, UnsupportedObjectiveError):
                    self._warn(plan.why)
            plan.capture_seconds += time.perf_counter() - began
        if plan.runner is not None and not plan.final and self._pays(plan, plan.tier):
            began = time.perf_counter()
            plan.final = True
            assert plan.captured is not None
            graph, inputs = plan.captured.graph, plan.captured.inputs(tensors)
            try:
                runner, plan.products = graphs.compiled(graph, inputs)
                self._adopt(plan, "compiled", runner, tensors, arguments)
            except CompileError as reason:
                plan.why = f"Torch's compiler did not take the graph, which is replayed: {reason}."
                if self._mode is True:
                    self._warn(plan.why, "Steps are not compiled.")
            plan.compile_seconds += time.perf_counter() - began

    def _pays(self, plan: _Plan, tier: str) -> bool:
        if self._mode is True:
            return True
        if plan.timed.get(tier, 0) < _TIMED:
            return False
        each = plan.seconds[tier] / plan.timed[tier]
        share = sum(plan.steps.values()) / max(self._taken - 1, 1)
        coming = self._taken if self._total is None else max(self._total - self._taken, 0)
        if tier == "eager":
            return coming * share * each * _REPLAY_SAVES > _CAPTURE_SECONDS
        assert plan.captured is not None
        cost = _COMPILE_SECONDS + _SECONDS_PER_OPERATION * plan.captured.graph.num_nodes
        return coming * share * each * _COMPILE_SAVES > cost

    def _adopt(
        self,
        plan: _Plan,
        tier: str,
        runner: Runner,
        tensors: Sequence[Tensor],
        arguments: Arguments,
    ) -> None:
        """Take a runner if loss and gradients are those of an eager step on the same draws."""
        captured = plan.captured
        assert captured is not None
        why = "Its first step gave the loss and the gradients of an eager one."
        if captured.device.type == "cuda":
            try:
                runner = graphs.cuda_graph(runner, captured.graph, captured.inputs(tensors))
                tier += " in a CUDA graph"
            except CompileError as reason:
                why += f" Its kernels are launched one by one: {reason}."
        gap = captured.trial(runner, tensors, arguments)
        if gap is None:
            plan.tier, plan.runner, plan.why = tier, runner, why
            return
        said = (
            f"The first {tier} step differs from an eager one on the same draws, by {gap:.2g} of "
            f"the norm"
        )
        if plan.runner is not None:  # The graph as it was captured has passed.
            plan.why = f"{said}, so that the graph is replayed."
            self._warn(plan.why, "Steps are not compiled.")
        else:
            plan.leave_eager(f"{said}.")
            self._warn(plan.why)

    def _warn(self, why: str, what: str = "Steps run eagerly.") -> None:
        if why not in self._warned:
            self._warned.add(why)
            said = "Pass compile=False to say that this is as it should be."
            warnings.warn(f"{what} {why} {said}", CompileWarning, stacklevel=5)


def _signature(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Hashable, list[Tensor], Callable[[Sequence[Tensor]], Arguments] | None]:
    """A key that equal graphs share, the tensors, and how to make arguments of tensors again."""
    leaves, spec = (
        (list(args), None) if not kwargs and all(map(_is_tensor, args)) else _flat(args, kwargs)
    )
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    structure = None if spec is None else repr(spec)  # Not all versions of torch can hash it.
    key = (
        structure,
        tuple(map(_described, leaves)),
        torch.get_default_dtype(),
        *(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in _KINDS),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        # A default device, among others.
        torch._C._len_torch_function_stack(),
        pyro.settings.get("validate_distributions_pyro"),
        bool(_PYRO_STACK),
    )
    if _PYRO_STACK:
        return key, tensors, None
    if not all(isinstance(leaf, _KNOWN_AGAIN) for leaf in leaves):
        return (structure, "not known again"), tensors, None
    return key, tensors, lambda inputs: _rebuilt(leaves, spec, inputs)


def _is_tensor(value: Any) -> bool:
    return type(value) is Tensor


def _flat(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], TreeSpec]:
    return tree_flatten((tuple(args), dict(kwargs)))


def _described(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    return type(leaf), leaf


def _rebuilt(leaves: Sequence[Any], spec: TreeSpec | None, inputs: Sequence[Tensor]) -> Arguments:
    if spec is None:
        return inputs, {}
    given = iter(inputs)
    args, kwargs = tree_unflatten(
        [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
    )
    return args, kwargs


def _in_words(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    def say(value: Any) -> str:
        if isinstance(value, Tensor):
            kind = str(value.dtype).removeprefix("torch.")
            return f"{kind}{list(value.shape)}" + (
                "" if value.device.type == "cpu" else f" on {value.device}"
            )
        return (
            repr(value)
            if isinstance(value, (int, float, str, bool, type(None)))
            else type(value).__name__
        )

    said = [say(a) for a in args] + [f"{k}={say(v)}" for k, v in kwargs.items()]
    return "(" + ", ".join(said) + ")"
