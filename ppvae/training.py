"""Training a pair over a data set: stochastic variational inference with Adam."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, TraceGraph_ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ppvae.compiled.captured import Job
from ppvae.compiled.evaluating import as_losses
from ppvae.compiled.reporting import CompileReport
from ppvae.compiled.stepping import Mode, Stepper, Work
from ppvae.compiled.updates import AdamUpdate, RowAdam, Update, Updates
from ppvae.density import (
    Program,
    check_pair,
    check_shared_pair,
    read_guide,
    read_model,
    shared_latents,
)
from ppvae.feeding import Batches, CudaTransfer, fits, loader_batches, tensor_batches
from ppvae.graphs import Watch
from ppvae.guides import Amortized, PerDatapoint
from ppvae.isolation import (
    check_rows,
    device_of,
    evaluation_mode,
    forked_rng,
    modules_of,
    private_store,
    seconds_now,
)
from ppvae.markup import Cell, TextTable, card
from ppvae.objectives import BetaELBO, Objective
from ppvae.precision import Precision, check_precision, lowered
from ppvae.progress import Bar, progress_bar

# A diverged run goes back to the last state kept; one is kept this often, in steps.
_KEEP_EVERY = 100
# So many steps are "of late".
_OF_LATE = 100


@dataclass(frozen=True)
class Fit:
    """What a training run did.

    Attributes:
        losses: ``(steps,)``: the loss per datum at each step, in nats: minus an estimate of the
            objective, such as the ELBO.
        elapsed: ``(steps,)``: seconds from the call of `fit` until the loss of each step was known.
        seconds: Wall time.
        status: What happened, in words.
        completed: Whether all steps were taken with finite losses.
        steps: Number of steps taken.
        batch_size: Rows per step.
        compile_report: Which way the steps ran, and why.
    """

    losses: Tensor
    elapsed: Tensor
    seconds: float
    status: str
    completed: bool
    steps: int
    batch_size: int
    compile_report: CompileReport = field(default_factory=CompileReport, repr=False)

    def __repr__(self) -> str:
        return (
            f"Fit({self.status}; loss over the last tenth {self._last()} nats a datum, "
            f"{self.seconds:.1f} s)"
        )

    def _repr_html_(self) -> str:
        header = ("steps", "rows a step", "loss over the last tenth", "seconds")
        row = (
            f"{self.steps:,}",
            f"{self.batch_size:,}",
            Cell(self._last(), "nats a datum"),
            f"{self.seconds:.1f}",
        )
        return card(f"Fit: {self.status}", [], TextTable(header, [row]))

    def _last(self) -> str:
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return f"{float(tail.mean()):.4f}" if len(tail) else "none"


def fit(
    model: Program,
    guide: Program,
    x: Tensor | Dataset[Any] | DataLoader[Any],
    *,
    loss: ELBO | None = None,
    steps: int = 2000,
    batch_size: int = 128,
    lr: float = 1e-3,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    precision: Precision | None = None,
    compile: Mode = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Fit:
    r"""Train a pair by stochastic variational inference.

    Each step takes the gradient of ``loss`` on a minibatch, divided by the number of its rows,
    and an Adam step on the parameters of model and guide. Rows come in a fresh random order in
    every pass.

    A model may have latents that all rows share, such as the weights of a Bayesian neural
    network. Its rows in a minibatch then have to stand for all N data (``pyro.plate("data", N,
    subsample=...)``, or ``num_data`` of the models of this package), and the loss is divided by N.

    The modules are trained in place and left on ``device``. Pyro's parameter store is left as it
    was, except that bare ``pyro.param`` statements of hand-written functions keep their values
    there, as they have no other home. The caller's random generators are left as they were.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guide: A Pyro guide, called as ``guide(x)``.
        x: The data: rows ``(num_data, *event)``; or a `Dataset` or `DataLoader` whose items are
            rows, or tuples that begin with one (what follows, such as labels, is not used). Every
            batch of a `DataLoader` has the same weight, a short one too.
        loss: A Pyro ELBO object, Pyro's own or one of `ppvae.objectives`. If left out
            ``BetaELBO()``, the ELBO with an analytic KL where that is right, or
            `TraceGraph_ELBO()` for a guide with draws that have no gradient, such as discrete
            ones. With Pyro's `ReweightedWakeSleep` the loss that is recorded is its first.
        steps: Number of steps.
        batch_size: Rows per step; at most all of them. A `DataLoader` brings its own.
        lr: Adam's learning rate.
        device: Where to train; where the modules are, if left out. On a CUDA device the rows of
            a tensor stay there all along if they take no more than half of its free memory;
            otherwise, and those of a `DataLoader`, they are copied from pinned memory while the
            step before is running. The order of rows and the draws are the same.
        dtype: Floating point type to train in; that of the modules, if left out.
        precision: How matrices are multiplied while training. ``"tf32"``: float32 ones by the
            TF32 of CUDA devices. ``"bf16"``: the linear layers and convolutions of the networks
            in bfloat16, each of which hands back float32, so that latents, densities and their
            sums are in float32; flows are left alone. `None` changes nothing. Torch's settings
            are afterwards what they were, and the modules are in float32 all along.
        compile: Whether a step runs as one graph, as in `ppvae.SVI`: `True` from the second
            on, compiled; ``"auto"`` once the steps to come pay for it; `False` never. The result
            is the same, to rounding.
        seed: Seed of the order of the rows and of the draws.
        progress: Whether to show a progress bar, on a terminal or in a notebook.

    Returns:
        The record of the run. A loss that is no longer finite, or an interrupt from the
        keyboard, ends it early with the last good parameters kept, and ``status`` says so.

    Raises:
        ValueError: If the data, the model or the guide are unfit, an argument is out of range,
            or nothing is there to train.

    Example:
        >>> from ppvae import pairs
        >>> model, guide = pairs.exponential_gaussian()
        >>> fit(model, guide, model(size=200), steps=20, progress=False).status
        'completed 20 steps'
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
    if not lr > 0:
        raise ValueError(f"lr must be positive; got {lr}.")
    if compile not in (True, False, "auto"):
        raise ValueError(f'compile must be True, False or "auto"; got {compile!r}.')
    modules = [m for m in (model, guide) if isinstance(m, nn.Module)]
    for module in modules:
        module.to(device=device, dtype=dtype)
    where = torch.device(device or device_of(*modules) or "cpu")
    check_precision(precision, where)
    _check_loss(loss)
    began = seconds_now(where)
    with private_store(keep_bare=True), forked_rng(seed, where), without_warnings():
        batches = _batches(x, batch_size, device, dtype, modules, guide)
        first, rows = next(batches)
        # In eval mode: reading the pair must not move the running statistics of batch norm.
        with _on_rows(guide, rows), evaluation_mode(model, guide):
            num_data = None
            if shared_latents(model, first):
                num_data = check_shared_pair(model, guide, first, _count(x))
            else:
                check_pair(model, guide, first)
                _check_families(model, guide, first)
            loss = _default_loss(guide, first) if loss is None else loss
        run = Run(model, guide, loss, lr, num_data, compile)
        with lowered(precision, where, model, guide):
            status, completed = run.train(_chain(first, rows, batches), steps, progress)
    return Fit(
        losses=torch.tensor(run.losses),
        elapsed=torch.tensor(run.clock, dtype=torch.float64) - began,
        seconds=seconds_now(where) - began,
        status=status,
        completed=completed,
        steps=len(run.losses),
        batch_size=len(first),
        compile_report=run.report,
    )


def _chain(first: Tensor, rows: Tensor | None, rest: Batches) -> Batches:
    yield first, rows
    yield from rest


def _count(x: Any) -> int | None:
    """The number of data, where it is known."""
    data = x.dataset if isinstance(x, DataLoader) else x
    return len(data) if hasattr(data, "__len__") else None


def _check_families(model: Program, guide: Program, x: Tensor) -> None:
    if isinstance(guide, (Amortized, PerDatapoint)):
        sites = read_model(model, x)
        for name, family in guide.families.items():
            family.check_site(sites.latents[name])


@contextmanager
def without_warnings() -> Iterator[None]:
    """Run without Pyro's warnings of what a run answers for itself."""
    with warnings.catch_warnings():
        # Of every frozen parameter, where freezing one is a choice.
        warnings.filterwarnings("ignore", ".* because requires_grad=False", UserWarning)
        # Of a loss that is no number: the run ends there, and its status says so.
        warnings.filterwarnings("ignore", "Encountered (NaN|[+-]?inf)", UserWarning)
        yield


def _check_loss(loss: Any) -> None:
    if isinstance(loss, type):
        raise ValueError(f"loss: {loss.__name__} is a class; pass an object, {loss.__name__}(...).")
    if loss is not None and not hasattr(loss, "loss_and_grads"):
        raise ValueError(
            f"loss: expected a Pyro ELBO object, such as Trace_ELBO() or one of "
            f"ppvae.objectives; got {loss!r}."
        )


def _default_loss(guide: Program, x: Tensor) -> ELBO:
    """The analytic KL where all draws have a gradient, the score function elsewhere.

    Of `TraceMeanField_ELBO` the analytic KL is wrong for an `AutoNormal` of a constrained latent,
    whose change of variables it leaves out, and for a guide from the bottom up.
    """
    with torch.no_grad(), forked_rng(0, x.device):
        _, sites = read_guide(guide, x)
    smooth = all(site.fn.has_rsample for site in sites.values())
    return BetaELBO() if smooth else TraceGraph_ELBO()


def _table_of(guide: Program) -> PerDatapoint | None:
    """The guide with a row for each datum that this is, or that a handler of Pyro's stands before.

    `config_enumerate` and `poutine` handlers wrap a guide; its rows are those of the data still.
    """
    return next((m for m in modules_of(guide) if isinstance(m, PerDatapoint)), None)


def _on_rows(guide: Program, rows: Tensor | None) -> Any:
    table = _table_of(guide)
    return nullcontext() if table is None or rows is None else table.rows(rows)


def _batches(
    x: Any,
    batch_size: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    modules: list[nn.Module],
    guide: Program,
) -> Batches:
    """Minibatches without end, each with the numbers of its rows where they are known."""
    target = None if device is None else torch.device(device)
    if isinstance(x, Tensor):
        # Rows drawn from a model may still hang on its parameters.
        x = x.detach()
        if target is not None and not fits(x, target):
            x = x.to(dtype) if dtype is not None and x.is_floating_point() else x
            check_rows(x)
            return tensor_batches(x, batch_size, CudaTransfer(target))
        x = x if target is None else x.to(target)
        x = x.to(dtype) if dtype is not None and x.is_floating_point() else x
        check_rows(x, *modules)
        return tensor_batches(x, batch_size)
    if _table_of(guide) is not None:
        raise ValueError(
            "A PerDatapoint guide has a row of parameters for each datum, so fit has to know "
            "which rows a minibatch holds: pass x as one tensor."
        )
    if not isinstance(x, DataLoader):
        if len(x) == 0:
            raise ValueError("x is a data set without items: expected at least one row.")
        # A short last batch would weigh its rows more than the others.
        x = DataLoader(x, batch_size=min(batch_size, len(x)), shuffle=True, drop_last=True)
    streams = target is not None and target.type == "cuda"
    transfer = CudaTransfer(target) if target is not None and streams else None
    return loader_batches(x, target, dtype, modules, transfer)


class _DivergedError(Exception):
    """A loss or a gradient is no longer a finite number."""


class Run(Work):
    """The state of a training run.

    Args:
        model: A Pyro model.
        guide: A Pyro guide; what of both has a gradient is trained.
        loss: A Pyro ELBO object.
        lr: Adam's learning rate.
        num_data: Number of all rows where latents are shared by them, `None` elsewhere.
        compile: Whether steps are compiled, as in `fit`.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        loss: ELBO,
        lr: float,
        num_data: int | None = None,
        compile: Mode = "auto",
    ) -> None:
        super().__init__()
        self.model, self.guide, self.loss, self.lr = model, guide, loss, lr
        # A minibatch's loss is then an estimate of that of all data.
        self.num_data = num_data
        self.compile: Mode = compile
        self.losses: list[float] = []
        self.clock: list[float] = []
        self.report = CompileReport()
        self.tables: list[RowAdam] = []
        self.adam: torch.optim.Adam | None = None
        self.good: list[Tensor] = []
        self.kept = 0

    def train(self, batches: Batches, steps: int, progress: bool) -> tuple[str, bool]:
        """Take the steps; say what happened, and whether all were taken."""
        with progress_bar(steps, "fit", "step", shown=progress) as bar:
            return self._train(batches, steps, bar)

    def _train(self, batches: Batches, steps: int, bar: Bar) -> tuple[str, bool]:
        stepper = Stepper(self, self.compile, steps)
        waiting: list[Tensor] = []
        try:
            for step in range(steps):
                if step % _KEEP_EVERY == 0:
                    self._note(waiting)
                    before = self._state()
                x, rows = next(batches)
                waiting.append(self._guarded(stepper, x, rows))
                if x.device.type == "cpu":
                    self._note(waiting)
                if step % _KEEP_EVERY == 0:
                    self._note(waiting)
                    # Known to be good only now, that their loss is finite.
                    self.good, self.kept = before or self.good, step
                bar.advance(figure=self._of_late)
            self._judge(waiting)
        except _DivergedError:
            self._put(self.good)
            at = min(len(self.losses) + 1, steps)
            return f"diverged at step {at}: {self._advice()}", False
        except KeyboardInterrupt:
            return self._interrupted(waiting, steps), False
        finally:
            self.report = stepper.report()
            for param in self.params:
                param.grad = None
        return f"completed {steps} steps", True

    def _judge(self, waiting: list[Tensor]) -> None:
        """Read the last losses, and the parameters, whose last update no later loss has judged."""
        self._note(waiting)
        if not all(bool(torch.isfinite(p).all()) for p in self.params):
            raise _DivergedError

    def _interrupted(self, waiting: list[Tensor], steps: int) -> str:
        """What is said of a run that was interrupted; it keeps what it has, where that is good."""
        try:
            self._judge(waiting)
            kept = ""
        except _DivergedError:
            self._put(self.good)
            kept = f", and diverged: {self._advice()}"
        return f"interrupted after {len(self.losses)} of {steps} steps{kept}"

    def _of_late(self) -> str:
        """The mean of the last losses that are known."""
        last = self.losses[-_OF_LATE:]
        return f"loss {sum(last) / len(last):.3f} nats a datum" if last else ""

    def _note(self, waiting: list[Tensor]) -> None:
        """Read the losses of steps that have been launched.

        Raises:
            _DivergedError: If one is not finite.
        """
        if not waiting:
            return
        values = [float(waiting[0])] if len(waiting) == 1 else torch.stack(waiting).tolist()
        waiting.clear()
        now = seconds_now()
        for value in values:
            if not math.isfinite(value):
                raise _DivergedError
            self.losses.append(value)
            self.clock.append(now)

    def _advice(self) -> str:
        return (
            f"the parameters after {self.kept} steps were kept; lower lr, or check the data's scale"
        )

    def _tensors(self) -> list[Tensor]:
        """All that training changes: parameters, and buffers such as running statistics."""
        modules = modules_of(self.model, self.guide)
        buffers = {id(b): b for module in modules for b in module.buffers()}
        return [*self.params, *buffers.values()]

    def _state(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self._tensors()] if self.params else []

    def _put(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self._tensors(), values, strict=True):
                tensor.copy_(value)

    def _guarded(self, stepper: Stepper, x: Tensor, rows: Tensor | None) -> Tensor:
        """A step; diverged too where parameters went where Pyro refuses their distributions."""
        try:
            return stepper(x, rows)[0]
        except ValueError:
            if not self.good:
                raise
            reached = self._state()
            self._put(self.good)
            try:
                with torch.no_grad(), _on_rows(self.guide, rows):
                    self.loss.loss(self.model, self.guide, x)
            except ValueError:
                self._put(reached)  # Refused with good parameters too: the rows are at fault.
                raise
            raise _DivergedError from None

    def _loss_and_grads(self, x: Tensor, rows: Tensor | None) -> Any:
        for table in self.tables:
            table.rows = self._all_rows(table) if rows is None else rows
        with _on_rows(self.guide, rows):
            out = self.loss.loss_and_grads(self.model, self.guide, x)
        # Wake-sleep has two losses: that of the model is a bound.
        return out[0] if isinstance(out, tuple) else out

    @staticmethod
    def _all_rows(table: RowAdam) -> Tensor:
        return torch.arange(len(table.weight), device=table.weight.device)

    def _per(self, x: Tensor) -> float:
        return float(len(x) if self.num_data is None else self.num_data)

    def eager(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Tensor]:
        """A step as Pyro takes it.

        Raises:
            ValueError: What Pyro says of unfit rows; or if nothing is there to train.
            _DivergedError: If its loss or gradient is not finite; nothing is changed then.
        """
        x, rows = args
        if not self.params:
            with _on_rows(self.guide, rows):
                self._collect(x)
        for param in self.params:
            param.grad = None
        total = as_losses(self._loss_and_grads(x, rows), self.params)[0] / self._per(x)
        gradients = [p.grad for p in self.params if p.grad is not None]
        if not gradients:
            raise ValueError("Nothing to train: no parameter of model or guide has a gradient.")
        norm = sum(g.square().sum() for g in gradients)
        if not bool(torch.isfinite(norm + total.to(gradients[0]))):
            raise _DivergedError
        torch._foreach_div_(gradients, self._per(x))
        for table in self.tables:
            table.step(table.rows)
        if self.adam is not None:
            self.adam.step()
        return [total.detach()]

    def job(self, params: Sequence[Tensor]) -> Job:
        """The parts of that step."""
        numbers = {id(p): at for at, p in enumerate(params)}
        parts: list[tuple[list[int], Update]] = [([numbers[id(t.weight)]], t) for t in self.tables]
        others = [p for p in params if not any(p is t.weight for t in self.tables)]
        if self.adam is not None:
            trained = [p for p in others if self.adam.state.get(p)]
            own = [numbers[id(p)] for p in trained]
            parts.append((own, AdamUpdate(trained, [self.adam] * len(trained))))
        update = Updates(parts)
        watch = Watch(
            [self.model, self.guide, self.loss],
            update.places,
            ignoring=("_rows", *Objective.counters),
        )
        return Job(
            loss=self.loss,
            loss_and_grads=self._loss_and_grads,
            params=params,
            update=update,
            per=self._per,
            watch=watch,
        )

    def _collect(self, x: Tensor) -> None:
        """Find all parameters, as Pyro's own SVI does, and give each an optimizer."""
        with poutine.trace(param_only=True) as capture, torch.no_grad():
            self.loss.loss(self.model, self.guide, x)
        # Under `module_local_params` the value of a site is the parameter itself.
        values = [site["value"] for site in capture.trace.nodes.values()]
        found = [v.unconstrained() if hasattr(v, "unconstrained") else v for v in values]
        for module in (self.model, self.guide):
            if isinstance(module, nn.Module):
                found += list(module.parameters())
        unique = {id(p): p for p in found if p.requires_grad and p.is_leaf}
        self.params = list(unique.values())
        self.good = self._state()
        owner = _table_of(self.guide)
        weights = [] if owner is None else [owner.table(site).weight for site in owner.families]
        self.tables = [RowAdam(weight, self.lr) for weight in weights if weight.requires_grad]
        others = [p for p in self.params if not any(p is weight for weight in weights)]
        if others:
            self.adam = torch.optim.Adam(others, lr=self.lr)
