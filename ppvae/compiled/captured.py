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
from ppvae.compiled.evaluating import Gradients, Supported, capturable, loss_and_gradients
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
            losses, gradients = loss_and_gradients(self.loss_and_grads, self.params, args, kwargs)
        if self.per is not None:
            per = self.per(args[0])
            losses = [loss / per for loss in losses]
            gradients = [None if g is None else g / per for g in gradients]
        return losses, gradients


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

    Raises:
        NotCapturableError: If there is no graph of it.
    """

    def __init__(
        self, job: Job, tensors: Sequence[Tensor], rebuild: Callable[[Sequence[Tensor]], Arguments]
    ) -> None:
        self.job = job
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
        except NotCapturableError as error:
            for kind, why in _EAGER.items():
                if isinstance(job.loss, kind):
                    raise UnsupportedObjectiveError(f"{kind.__name__}: {why}") from error
            raise
        name = job.watch.changed()
        if name is not None:
            raise NotCapturableError(f"{name} changes at every call, which a graph would freeze")
        self._pointers = [t.data_ptr() for t in self.graph.held]

    @property
    def device(self) -> torch.device:
        """Where the step runs."""
        return self._numbers.device

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inputs of the graph."""
        return [self._numbers, *tensors]

    def changed(self) -> str | None:
        """What is no longer as the graph has it, `None` where all is."""
        name = self.job.watch.changed()
        if name is None and [t.data_ptr() for t in self.graph.held] != self._pointers:
            name = "the memory of a parameter"
        return name

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
        devices = sorted({t.device.index or 0 for t in held if t.device.type == "cuda"})
        try:
            with torch.random.fork_rng(devices=devices):
                began = seconds_now(self.device)
                losses, expected = job.evaluate(arguments)
                self.eager_seconds = min(self.eager_seconds, seconds_now(self.device) - began)
            _put(held, kept)
            with torch.random.fork_rng(devices=devices):
                found, go, handed = self.launch(runner, tensors)
            if job.update is None:
                gradients = [g for g in handed if g is not None]
            else:
                gradients = job.update.gradients(before, self.has_gradient)
        finally:
            _put(held, kept)
        if not bool(go):
            return None  # The eager step that follows is for Pyro to judge.
        return graphs.far_apart(
            [*losses, *(g for g in expected if g is not None)],
            [*found, *gradients],
            graphs.rounding_of(self.graph),
        )


def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
