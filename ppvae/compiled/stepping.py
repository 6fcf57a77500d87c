"""Which way a step runs: eagerly, as a replayed graph, compiled; and the check of each."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ppvae import graphs
from ppvae.compiled.evaluating import Gradients, Supported, capturable, loss_and_gradients
from ppvae.compiled.reporting import CompileReport, CompileWarning, Signature
from ppvae.compiled.updates import Update
from ppvae.graphs import CompileError, NotCapturable, Runner, Watch
from ppvae.objectives import Objective

Mode = bool | Literal["auto"]

# What "auto" expects before it has measured: that a replayed graph saves this part of an eager
# step and a compiled one this part of a replayed, and what getting there costs, in seconds.
_REPLAY_SAVES, _CAPTURE_SECONDS = 0.4, 1.0
_COMPILE_SAVES, _COMPILE_SECONDS, _SECONDS_PER_OPERATION = 0.5, 8.0, 0.02
# Steps of a tier that are timed before one decides on the next; the first of each is not.
_TIMED = 5
# A program that changes what a graph has frozen at every step is left alone after so many graphs.
_MOST_GRAPHS = 3


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
            NotCapturable: If it is known that there is none.
        """


@dataclass(frozen=True)
class Job:
    """A step, in the parts that a graph is made of.

    Attributes:
        loss: The objective.
        loss_and_grads: Its method with model and guide bound, which may run in a context.
        params: What is trained.
        update: What the graph does to the parameters; `None` where gradients are handed out.
        per: What loss and gradients are divided by.
        watch: What the graph freezes.
        finish: What is left to do after a step, with the gradients, where they are handed out.
    """

    loss: Any
    loss_and_grads: Callable[..., Any]
    params: Sequence[Tensor]
    update: Update | None
    per: float
    watch: Watch
    finish: Callable[[Sequence[Tensor | None]], None] | None = None

    def numbers(self) -> list[float]:
        """What changes from step to step."""
        own = [] if self.update is None else self.update.numbers()
        return own + list(self._moving())

    def _moving(self) -> tuple[float, ...]:
        return self.loss.moving if isinstance(self.loss, Objective) else ()

    def again(self, numbers: Tensor | None) -> Any:
        """Inside, the objective takes its numbers from a tensor, and counts no step."""
        if not isinstance(self.loss, Objective):
            return nullcontext()
        count = len(self._moving())
        return self.loss.again(None if numbers is None or not count else numbers[-count:])

    def evaluate(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], numbers: Tensor | None = None
    ) -> tuple[list[Tensor], Gradients]:
        """Losses and gradients, with nothing changed but running statistics."""
        with self.again(numbers):
            losses, gradients = loss_and_gradients(self.loss_and_grads, self.params, args, kwargs)
        if self.per != 1:
            losses = [loss / self.per for loss in losses]
            gradients = [None if g is None else g / self.per for g in gradients]
        return losses, gradients


@dataclass
class _Plan:
    """How steps of one signature run, and what is known of it."""

    arguments: str
    tier: str = "eager"
    why: str = "The first step of a signature runs eagerly, with Pyro's validation."
    params: list[Tensor] = field(default_factory=list)
    job: Job | None = None
    graph: graphs.Graph | None = None
    runner: Runner | None = None
    pointers: list[int] = field(default_factory=list)
    has_gradient: list[bool] = field(default_factory=list)
    buffer: Tensor | None = None
    final: bool = False
    graphs_made: int = 0
    capture_seconds: float = 0.0
    compile_seconds: float = 0.0
    products: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    timed: dict[str, int] = field(default_factory=dict)

    def mean_seconds(self, tier: str) -> float | None:
        return self.seconds[tier] / self.timed[tier] if self.timed.get(tier) else None

    def leave_eager(self, why: str) -> None:
        self.tier, self.runner, self.why, self.final = "eager", None, why, True

    def report(self) -> Signature:
        means = {tier: self.seconds[tier] / n for tier, n in self.timed.items() if n}
        return Signature(
            arguments=self.arguments,
            tier=self.tier,
            why=self.why,
            steps=dict(self.steps),
            step_seconds=means,
            capture_seconds=self.capture_seconds,
            compile_seconds=self.compile_seconds,
            operations=0 if self.graph is None else self.graph.num_nodes,
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
    """

    def __init__(self, work: Work, mode: Mode, steps: int | None = None) -> None:
        if mode not in (True, False, "auto"):
            raise ValueError(f'compile must be True, False or "auto"; got {mode!r}.')
        self._work, self._mode, self._total = work, mode, steps
        self._plans: dict[Hashable, _Plan] = {}
        self._taken = 0
        self._warned: set[str] = set()

    def report(self) -> CompileReport:
        """How steps ran until now."""
        return CompileReport(tuple(plan.report() for plan in self._plans.values()))

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Tensor]:
        """Take a step and return its losses, tensors without dimensions.

        Raises:
            ValueError: What Pyro says of a pair that is unfit, or of rows that are.
        """
        self._taken += 1
        key, tensors, rebuild = _signature(args, kwargs)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = _Plan(_in_words(args, kwargs))
            if self._mode is False:
                plan.leave_eager("compile=False.")
            elif rebuild is None:
                plan.leave_eager("An argument that is no tensor has no hash to know it again by.")
            return self._eager(plan, args, kwargs, timed=False)
        if plan.runner is not None and self._is_stale(plan):
            return self._eager(plan, args, kwargs, timed=False)
        if not plan.final:
            self._advance(plan, tensors, rebuild, args, kwargs)
        if plan.runner is None:
            return self._eager(plan, args, kwargs, timed=True)
        return self._run(plan, tensors, args, kwargs)

    def _eager(
        self, plan: _Plan, args: Sequence[Any], kwargs: Mapping[str, Any], *, timed: bool
    ) -> Sequence[Tensor]:
        began = time.perf_counter()
        losses = self._work.eager(args, kwargs)
        plan.params = self._work.params
        _count(plan, "eager", began if timed else None)
        return losses

    def _run(
        self, plan: _Plan, tensors: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        began = time.perf_counter()
        losses, go, gradients = _launch(plan, tensors)
        if go.device.type == "cpu" and not go.item():
            # Nothing was changed: Pyro says what is wrong, or takes the step that it would.
            return self._eager(plan, args, kwargs, timed=False)
        assert plan.job is not None
        if plan.job.update is not None:
            plan.job.update.count(plan.has_gradient)
        if plan.job.finish is not None:
            plan.job.finish(gradients)
        if isinstance(plan.job.loss, Objective):
            plan.job.loss.count_step()
        _count(plan, plan.tier, began)
        return losses

    def _is_stale(self, plan: _Plan) -> bool:
        """Whether the graph is one of how things were; then it is dropped."""
        assert plan.job is not None and plan.graph is not None
        name = plan.job.watch.changed()
        if name is None:
            if [t.data_ptr() for t in plan.graph.held] == plan.pointers:
                return False
            name = "the memory of a parameter"
        plan.runner, plan.tier, plan.final = None, "eager", False
        plan.why = f"{name} has changed since the graph was captured: another will be."
        if plan.graphs_made >= _MOST_GRAPHS:
            plan.leave_eager(f"{name} changes again and again, which a graph would freeze.")
            self._warn(plan.why)
        return True

    def _advance(
        self,
        plan: _Plan,
        tensors: Sequence[Tensor],
        rebuild: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Go to a faster tier, if it is time to."""
        if plan.runner is None and self._pays(plan, "eager"):
            began = time.perf_counter()
            try:
                self._capture(plan, tensors, rebuild, args, kwargs)
            except NotCapturable as reason:
                plan.leave_eager(f"No graph of this step: {reason}.")
                self._warn(plan.why)
            plan.capture_seconds += time.perf_counter() - began
        if plan.tier == "replayed graph" and self._pays(plan, "replayed graph"):
            began = time.perf_counter()
            self._compile(plan, tensors, args, kwargs)
            plan.compile_seconds += time.perf_counter() - began

    def _pays(self, plan: _Plan, tier: str) -> bool:
        if self._mode is True:
            return True
        each = plan.mean_seconds(tier)
        if each is None or plan.timed[tier] < _TIMED:
            return False
        own = sum(plan.steps.values()) / max(self._taken - 1, 1)
        coming = self._taken if self._total is None else max(self._total - self._taken, 0)
        if tier == "eager":
            return coming * own * each * _REPLAY_SAVES > _CAPTURE_SECONDS
        assert plan.graph is not None
        cost = _COMPILE_SECONDS + _SECONDS_PER_OPERATION * plan.graph.num_nodes
        return coming * own * each * _COMPILE_SAVES > cost

    def _capture(
        self,
        plan: _Plan,
        tensors: Sequence[Tensor],
        rebuild: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        job = self._work.job(plan.params)
        plan.job, plan.graphs_made = job, plan.graphs_made + 1
        plan.buffer = torch.zeros(max(1, len(job.numbers())), dtype=torch.float64)
        device = next((t.device for t in job.params), torch.device("cpu"))
        judged = pyro.settings.get("validate_distributions_pyro")

        def function(numbers: Tensor, *inputs: Tensor) -> list[Tensor]:
            own_args, own_kwargs = rebuild(inputs)
            with capturable(), Supported() as observed:
                losses, gradients = job.evaluate(own_args, own_kwargs, numbers)
            plan.has_gradient = [g is not None for g in gradients]
            go = torch.isfinite(losses[0])
            supported = observed.all() if judged else None
            if supported is not None:
                go = go & supported
            losses = [torch.where(go, loss, torch.nan) for loss in losses]
            if job.update is None:
                return [*losses, go, *(g for g in gradients if g is not None)]
            with torch.no_grad():
                job.update.apply(gradients, numbers, go)
            return [*losses, go]

        plan.buffer = plan.buffer.to(device)
        plan.graph = graphs.capture(function, [plan.buffer, *tensors])
        name = job.watch.changed()
        if name is not None:
            raise NotCapturable(f"{name} changes at every call, which a graph would freeze")
        plan.pointers = [t.data_ptr() for t in plan.graph.held]
        self._adopt(plan, "replayed graph", graphs.replayed(plan.graph), tensors, args, kwargs)
        if device.type == "cuda" and plan.runner is not None:
            self._record(plan, tensors)

    def _compile(
        self, plan: _Plan, tensors: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        assert plan.graph is not None and plan.buffer is not None
        plan.final = True
        try:
            runner, plan.products = graphs.compiled(plan.graph, [plan.buffer, *tensors])
        except CompileError as reason:
            plan.why = f"Torch's compiler did not take the graph, which is replayed: {reason}."
            self._warn(plan.why)
            return
        self._adopt(plan, "compiled", runner, tensors, args, kwargs)
        if plan.buffer.device.type == "cuda" and plan.runner is not None:
            self._record(plan, tensors)

    def _record(self, plan: _Plan, tensors: Sequence[Tensor]) -> None:
        assert plan.graph is not None and plan.runner is not None and plan.buffer is not None
        inputs = [plan.buffer, *tensors]
        try:
            plan.runner = graphs.cuda_graph(plan.runner, inputs, plan.graph.held)
            plan.tier += " in a CUDA graph"
        except CompileError as reason:
            plan.why += f" Launched one by one: {reason}."

    def _adopt(
        self,
        plan: _Plan,
        tier: str,
        runner: Runner,
        tensors: Sequence[Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Take a runner if loss and gradients are those of an eager step on the same draws."""
        gap = _trial(plan, runner, tensors, args, kwargs)
        if gap is None:
            plan.tier, plan.runner = tier, runner
            plan.why = "Its first step gave the loss and the gradients of an eager one."
            return
        plan.leave_eager(
            f"The first {tier} step differs from an eager one on the same draws, by {gap:.2g} of "
            f"the norm."
        )
        self._warn(plan.why)

    def _warn(self, why: str) -> None:
        if why not in self._warned:
            self._warned.add(why)
            warnings.warn(
                f"Steps run eagerly. {why} Pass compile=False to say that this is as it should be.",
                CompileWarning,
                stacklevel=4,
            )


def _launch(
    plan: _Plan, tensors: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Tensor, list[Tensor | None]]:
    """Run a plan's graph: its losses, whether it changed anything, gradients handed out."""
    assert plan.job is not None and plan.runner is not None and plan.buffer is not None
    numbers = plan.job.numbers()
    if numbers:
        fresh = torch.tensor(numbers, dtype=torch.float64)
        plan.buffer.copy_(fresh, non_blocking=True)
    out = list(plan.runner(plan.buffer, *tensors))
    handed = 0 if plan.job.update is not None else sum(plan.has_gradient)
    split = len(out) - handed
    found = iter(out[split:])
    gradients = [
        next(found) if handed and has else None for has in plan.has_gradient
    ]
    return out[: split - 1], out[split - 1], gradients


def _trial(
    plan: _Plan,
    runner: Runner,
    tensors: Sequence[Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> float | None:
    """How far a runner is from eager Pyro on the same draws; all is put back afterwards."""
    job, graph = plan.job, plan.graph
    assert job is not None and graph is not None
    tried = _Plan("", job=job, graph=graph, runner=runner, buffer=plan.buffer)
    tried.has_gradient = plan.has_gradient
    held = graph.held
    kept = [tensor.detach().clone() for tensor in held]
    before = {id(tensor): value for tensor, value in zip(held, kept, strict=True)}
    devices = sorted({t.device.index or 0 for t in held if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        start = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
        losses, expected = job.evaluate(args, kwargs)
        _put(held, kept)
        torch.set_rng_state(start[0])
        for device, state in zip(devices, start[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
        found, go, handed = _launch(tried, tensors)
        if job.update is None:
            gradients = [g for g in handed if g is not None]
        else:
            gradients = job.update.gradients(before, plan.has_gradient)
        _put(held, kept)
    if not bool(go):
        return None  # A loss that is no number: the eager step that follows is for Pyro to judge.
    return graphs.far_apart(
        [*losses, *(g for g in expected if g is not None)], [*found, *gradients]
    )


def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def _count(plan: _Plan, tier: str, began: float | None) -> None:
    done = plan.steps.get(tier, 0)
    plan.steps[tier] = done + 1
    # The first step of a tier warms caches up.
    if began is not None and (done or tier == "eager"):
        plan.seconds[tier] = plan.seconds.get(tier, 0.0) + time.perf_counter() - began
        plan.timed[tier] = plan.timed.get(tier, 0) + 1


def _signature(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Hashable, list[Tensor], Callable[..., Any] | None]:
    """A key that equal graphs share, the tensors, and how to make arguments of tensors again."""
    leaves, spec = (list(args), None) if not kwargs and all(map(_is_tensor, args)) else _flat(args, kwargs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    key = (
        spec,
        tuple(map(_described, leaves)),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )
    try:
        hash(key)
    except TypeError:
        return (spec, "without a hash"), tensors, None
    return key, tensors, lambda inputs: _rebuilt(leaves, spec, inputs)


def _is_tensor(value: Any) -> bool:
    return type(value) is Tensor


def _flat(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], TreeSpec]:
    return tree_flatten((tuple(args), dict(kwargs)))


def _described(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    return type(leaf), leaf


def _rebuilt(
    leaves: Sequence[Any], spec: TreeSpec | None, inputs: Sequence[Tensor]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
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
        return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__

    said = [say(a) for a in args] + [f"{k}={say(v)}" for k, v in kwargs.items()]
    return "(" + ", ".join(said) + ")"
