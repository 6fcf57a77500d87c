"""A step's parts, the graph that is captured from them, and its check against Pyro."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO
from torch import Tensor

from ppvae import graphs
from ppvae.compiled.evaluating import (
    Gradients,
    Supported,
    as_losses,
    capturable,
    loss_and_gradients,
)
from ppvae.compiled.updates import Update
from ppvae.graphs import Graph, NotCapturableError, Runner, Watch
from ppvae.isolation import seconds_now
from ppvae.objectives import Objective

Arguments = tuple[Sequence[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Job:
    """A step, in the parts that a graph is made of.

    Attributes:
        loss: The objective.
        loss_and_grads: Its method with model and guide bound, which may run in a context.
        params: What is trained.
        update: What the graph does to the parameters; `None` where gradients are handed out.
        per: What loss and gradients are divided by, given the first argument.
        watch: What the graph freezes.
        finish: What is left to do after a step, with the gradients, where they are handed out.
    """

    loss: Any
    loss_and_grads: Callable[..., Any]
    params: Sequence[Tensor]
    update: Update | None
    per: Callable[[Any], float] | None
    watch: Watch
    finish: Callable[[Sequence[Tensor | None]], None] | None = None

    def numbers(self) -> list[float]:
        """What changes from step to step."""
        own = [] if self.update is None else self.update.numbers()
        return own + list(self._moving())

    def _moving(self) -> tuple[float, ...]:
        return self.loss.moving if isinstance(self.loss, Objective) else ()

    def again(self, numbers: Tensor | None) -> AbstractContextManager[None]:
        """Inside, the objective takes its numbers from a tensor, and counts no step."""
        if not isinstance(self.loss, Objective):
            return nullcontext()
        count = len(self._moving())
        return self.loss.again(None if numbers is None or not count else numbers[-count:])

    def evaluate(
        self, arguments: Arguments, numbers: Tensor | None = None
    ) -> tuple[list[Tensor], Gradients]:
        """Losses and gradients, with nothing changed but running statistics."""
        args, kwargs = arguments
        with self.again(numbers):
            found = loss_and_gradients(self.loss_and_grads, self.params, args, kwargs)
        return self._divided(*found, args)

    def reference(self, arguments: Arguments) -> tuple[list[Tensor], Gradients]:
        """What `evaluate` returns, in the way that Pyro goes: from the ``grad`` of the leaves."""
        args, kwargs = arguments
        kept = [param.grad for param in self.params]
        try:
            for param in self.params:
                param.grad = None
            with self.again(None):
                out = self.loss_and_grads(*args, **kwargs)
            gradients = [param.grad for param in self.params]
        finally:
            for param, grad in zip(self.params, kept, strict=True):
                param.grad = grad
        return self._divided(as_losses(out, self.params), gradients, args)

    def _divided(
        self, losses: list[Tensor], gradients: Gradients, args: Sequence[Any]
    ) -> tuple[list[Tensor], Gradients]:
        if self.per is None:
            return losses, gradients
        per = self.per(args[0])
        return [v / per for v in losses], [None if g is None else g / per for g in gradients]


class UnsupportedObjectiveError(NotCapturableError):
    """An objective of Pyro's that looks at values, whatever the pair is."""


# Pyro's own that compute with the values or the history of draws in Python.
_EAGER = {
    TraceEnum_ELBO: "it looks for draws of probability 0",
    TraceGraph_ELBO: "it follows draws that have no gradient through Python objects; "
    "ppvae.objectives.ScoreFunctionELBO can be a graph",
}


class Captured:
    """The graph of a step, and what it needs to run.

    Args:
        job: The step.
        tensors: Those among its arguments.
        rebuild: From such tensors to the arguments.
        others: The arguments that are no tensors.

    Raises:
        NotCapturableError: If there is no graph of it.
    """

    def __init__(
        self,
        job: Job,
        tensors: Sequence[Tensor],
        rebuild: Callable[[Sequence[Tensor]], Arguments],
        others: Sequence[Any] = (),
    ) -> None:
        self.job = job
        self._others = Watch(others)
        self.has_gradient: list[bool] = []
        self.eager_seconds = math.inf  # Of loss and gradients without a graph.
        device = next((t.device for t in job.params), torch.device("cpu"))
        count = max(1, len(job.numbers()))
        self._numbers = torch.zeros(count, dtype=torch.float64, device=device)
        # Written without a call of torch.
        self._view = self._numbers.numpy() if device.type == "cpu" else None
        judged = pyro.settings.get("validate_distributions_pyro")

        def function(numbers: Tensor, *inputs: Tensor) -> list[Tensor]:
            with capturable(), Supported() as observed:
                losses, gradients = job.evaluate(rebuild(inputs), numbers)
            self.has_gradient = [g is not None for g in gradients]
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

        if "Jit" in type(job.loss).__name__:
            said = f"{type(job.loss).__name__} makes a graph of its own"
            raise UnsupportedObjectiveError(said)
        try:
            self.graph: Graph = graphs.capture(function, self.inputs(tensors))
            name = job.watch.changed() or self._others.changed()
        except NotCapturableError as error:
            for kind, why in _EAGER.items():
                if isinstance(job.loss, kind):
                    raise UnsupportedObjectiveError(f"{kind.__name__}: {why}") from error
            raise
        finally:
            job.watch.put_back()
            self._others.put_back()
        if name is not None:
            raise NotCapturableError(f"{name} changes at every call, which a graph would freeze")
        held = self.graph.held
        self._pointers = [t.data_ptr() for t in held]
        self._trained = [t.requires_grad for t in held]
        self._hooks = [_hooks(p) for p in job.params]
        if any(after for _, after in self._hooks):
            raise NotCapturableError("a parameter has a hook for its accumulated gradient")
        own = {id(t) for t in held}
        named = pyro.get_param_store().named_parameters()
        self._stored = [(name, param) for name, param in named if id(param) in own]
        # What a run changes beside the parameters, such as running statistics.
        self._running: list[Tensor] = []
        self._undo: tuple[list[Tensor], Tensor | None] = ([], None)

    @property
    def device(self) -> torch.device:
        """Where the step runs."""
        return self._numbers.device

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inputs of the graph."""
        return [self._numbers, *tensors]

    def changed(self) -> str | None:
        """What is no longer as the graph has it, `None` where all is."""
        name = self.job.watch.changed() or (self._others.changed() if self._others else None)
        if name is not None:
            return name
        held = self.graph.held
        if [t.data_ptr() for t in held] != self._pointers:
            return "the memory of a parameter"
        if [t.requires_grad for t in held] != self._trained:
            return "whether a parameter needs a gradient"
        if [_hooks(p) for p in self.job.params] != self._hooks:
            return "a hook of a parameter"
        if self._stored:
            stored = dict(pyro.get_param_store().named_parameters())
            for name, param in self._stored:
                if stored.get(name) is not param:
                    return f"{name} in Pyro's parameter store"
        return None

    def launch(
        self, runner: Runner, tensors: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Tensor, list[Tensor | None]]:
        """Run the graph.

        Returns:
            The losses; whether the step was taken, or left all as it was since the loss is no
            number or an observed value impossible; and the gradients, if they are handed out.
        """
        numbers = self.job.numbers()
        if self._view is not None:
            self._undo = [t.clone() for t in self._running], torch.get_rng_state()
            self._view[: len(numbers)] = numbers
        elif numbers:
            # From memory that is not pinned: CUDA copies it before it returns.
            fresh = torch.tensor(numbers, dtype=torch.float64)
            self._numbers[: len(numbers)].copy_(fresh, non_blocking=True)
        out = runner(self._numbers, *tensors)
        if self.job.update is not None:
            return out[:-1], out[-1], []
        split = len(out) - sum(self.has_gradient)
        found = iter(out[split:])
        gradients = [next(found) if has else None for has in self.has_gradient]
        return out[: split - 1], out[split - 1], gradients

    def undo(self) -> None:
        """Put back what a launch that took no step has changed; on a CPU, where that is seen."""
        values, state = self._undo
        _put(self._running, values)
        if state is not None:
            torch.set_rng_state(state)

    def trial(
        self, runner: Runner, tensors: Sequence[Tensor], arguments: Arguments
    ) -> float | None:
        """How far a runner is from eager Pyro on the same draws; all is put back afterwards.

        Returns:
            The relative difference of losses and gradients, `None` where it is rounding.
        """
        job, held = self.job, self.graph.held
        kept = [tensor.detach().clone() for tensor in held]
        before = {id(tensor): value for tensor, value in zip(held, kept, strict=True)}
        try:
            with graphs.draws_kept(held):
                began = seconds_now(self.device)
                losses, expected = job.reference(arguments)
                self.eager_seconds = min(self.eager_seconds, seconds_now(self.device) - began)
            ran = [t.detach().clone() for t in held]
            self._running = [
                t for t, a, b in zip(held, ran, kept, strict=True) if not _identical(a, b)
            ]
            _put(held, kept)
            with graphs.draws_kept(held):
                found, go, handed = self.launch(runner, tensors)
            if job.update is None:
                gradients = [g for g in handed if g is not None]
            else:
                gradients = job.update.gradients(before, self.has_gradient)
        finally:
            _put(held, kept)
        if not bool(go):
            return None  # The eager step that follows is for Pyro to judge.
        if [g is not None for g in expected] != self.has_gradient:
            return float("inf")
        return graphs.far_apart(
            [*losses, *(g for g in expected if g is not None)],
            [*found, *gradients],
            graphs.rounding_of(self.graph),
        )


def _hooks(param: Tensor) -> tuple[int, int]:
    """How many hooks a parameter has for its gradient, and for that after it was added up."""
    return len(param._backward_hooks or ()), len(param._post_accumulate_grad_hooks or ())


def _identical(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or torch.allclose(one, other, 0.0, 0.0, equal_nan=True)


def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            # A constant that is expanded in memory cannot be written to, and never changes.
            if not _identical(tensor, value):
                tensor.copy_(value)
