"""Ways to run a graph: replayed operation by operation, compiled, as one launch on a GPU."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from ppvae.graphs.capturing import Graph
from ppvae.graphs.opaque import keep_draws
from ppvae.graphs.products import with_fastest_products
from ppvae.graphs.recording import not_recordable

Runner = Callable[..., Sequence[Tensor]]
"""Takes the inputs of a graph, and returns its outputs, without gradients."""

# Runs before recording, in which libraries set themselves up.
_WARM_UP = 3


class CompileError(Exception):
    """The compiler did not take a graph, or is not there."""


def replayed(graph: Graph) -> Runner:
    """Run the operations one by one, without the Python that made them."""
    forward, held = graph.module.forward, graph.held

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            out: Sequence[Tensor] = forward(*inputs, *held)
        return out

    return run


def compiled(graph: Graph, inputs: Sequence[Tensor]) -> tuple[Runner, int]:
    """Compile a graph by torch's Inductor.

    Random numbers are drawn by torch's own generators, in the same order as without compilation.

    Args:
        graph: What to compile.
        inputs: Inputs as it will be called with.

    Returns:
        What runs it, and how many of its matrix products go another way than the program's.

    Raises:
        CompileError: If there is no compiler, or it fails.
    """
    held = graph.held
    with _undisturbed(inputs, held):
        try:
            from torch import _inductor

            every: list[Any] = [*inputs, *held]
            options: dict[str, Any] = {"fallback_random": True}
            module, products = with_fastest_products(graph.module)
            keep_draws(module.graph)
            module.recompile()
            try:
                with _remembered():
                    call = _inductor.compile(copy.deepcopy(module), every, options=options)
            except Exception:  # Of older versions, for which there is nothing to look up.
                call = _inductor.compile(module, every, options=options)
        except Exception as error:
            said = str(error).strip().splitlines()
            raise CompileError(f"{type(error).__name__}: {said[0] if said else ''}") from error

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            out: Sequence[Tensor] = call(*inputs, *held)
        return out

    return run, products


@contextmanager
def _remembered() -> Iterator[None]:
    """Let the compiler look a graph up among those that it has compiled in earlier processes.

    It refuses to without a place for symbolic shapes, though there are none here.
    """
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv()))):
        yield


def cuda_graph(runner: Runner, graph: Graph, inputs: Sequence[Tensor]) -> Runner:
    """Record what a runner does on a CUDA device, and replay it with a single launch.

    Args:
        runner: A runner of the graph.
        graph: What it runs; the tensors that it may change are put back after the runs that warm
            it up.
        inputs: Inputs as it will be called with, the first of them on the device.

    Raises:
        CompileError: If something in it cannot be recorded, or would be frozen by that.
    """
    reason = not_recordable(graph)
    fixed = [tensor.clone() for tensor in inputs]
    if any(own.stride() != given.stride() for own, given in zip(fixed, inputs, strict=True)):
        reason = "an input has elements that share memory"
    if reason is not None:
        raise CompileError(f"no CUDA graph: {reason}")
    held = graph.held
    kept = [tensor.detach().clone() for tensor in held]
    record = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(inputs[0].device), _undisturbed(inputs, held):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    runner(*fixed)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(record):
                outputs = runner(*fixed)
    except RuntimeError as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise CompileError(f"no CUDA graph: {said[0]}") from error
    finally:
        with torch.no_grad():
            for tensor, value in zip(held, kept, strict=True):
                if not torch.equal(tensor, value):
                    tensor.copy_(value)

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            for own, given in zip(fixed, inputs, strict=True):
                own.copy_(given, non_blocking=True)
            record.replay()
            # The next replay writes to the same memory.
            return [out.clone() for out in outputs]

    return run


def draws_kept(*tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Put the generators of the CPU and of the devices of tensors back afterwards."""
    devices = {t.device.index or 0 for group in tensors for t in group if t.device.type == "cuda"}
    return torch.random.fork_rng(devices=sorted(devices))


@contextmanager
def _undisturbed(*tensors: Sequence[Tensor]) -> Iterator[None]:
    """Keep the random generators as they are, and the compiler's remarks to itself."""
    level = logging.root.manager.disable
    with draws_kept(*tensors), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
