"""Training a pair over a data set: stochastic variational inference with Adam."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.infer import ELBO, TraceGraph_ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ppvae.density import (
    Program,
    check_pair,
    check_shared_pair,
    read_guide,
    read_model,
    shared_latents,
)
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
from ppvae.objectives import BetaELBO

# A diverged run goes back to the last state kept; one is kept this often, in steps.
_KEEP_EVERY = 100


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
    """

    losses: Tensor
    elapsed: Tensor
    seconds: float
    status: str
    completed: bool
    steps: int
    batch_size: int

    def __repr__(self) -> str:
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        last = f"{float(tail.mean()):.4f}" if len(tail) else "none"
        return (
            f"Fit({self.status}; loss over the last tenth {last} nats a datum, "
            f"{self.seconds:.1f} s)"
        )


class RowAdam:
    """Adam on a table, for the rows of a minibatch alone (Kingma & Ba 2015).

    Torch's Adam moves every row at every step through its moments, the rows that are not in the
    minibatch too. Here a row's parameters, moments and step count change only with the row.

    Args:
        weight: The table, ``(num_data, num_params)``.
        lr: Learning rate.
    """

    def __init__(self, weight: nn.Parameter, lr: float) -> None:
        self.weight, self.lr = weight, lr
        self.first = torch.zeros_like(weight)
        self.second = torch.zeros_like(weight)
        self.count = torch.zeros(len(weight), 1, dtype=weight.dtype, device=weight.device)

    @torch.no_grad()
    def step(self, rows: Tensor) -> None:
        """Update these rows from ``weight.grad``."""
        assert self.weight.grad is not None
        gradient = self.weight.grad[rows]
        self.count[rows] += 1
        self.first[rows] = 0.9 * self.first[rows] + 0.1 * gradient
        self.second[rows] = 0.999 * self.second[rows] + 0.001 * gradient**2
        mean = self.first[rows] / (1 - 0.9 ** self.count[rows])
        scale = (self.second[rows] / (1 - 0.999 ** self.count[rows])).sqrt() + 1e-8
        self.weight[rows] -= self.lr * mean / scale


Batches = Iterator[tuple[Tensor, Tensor | None]]
"""Minibatches, each with the numbers of its rows where they are known."""


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
    compile: bool | Literal["auto"] = "auto",
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
        device: Where to train; where the modules are, if left out.
        dtype: Floating point type to train in; that of the modules, if left out.
        compile: ``"auto"`` and ``False`` run eagerly; this version has no compiled step.
        seed: Seed of the order of the rows and of the draws.
        progress: Whether to show a progress bar.

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
    if compile is True:
        raise ValueError("compile=True: this version has no compiled step; use compile='auto'.")
    modules = [m for m in (model, guide) if isinstance(m, nn.Module)]
    for module in modules:
        module.to(device=device, dtype=dtype)
    where = torch.device(device or device_of(*modules) or "cpu")
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
        run = Run(model, guide, loss, lr, num_data)
        status, completed = run.train(_chain(first, rows, batches), steps, progress)
    return Fit(
        losses=torch.tensor(run.losses),
        elapsed=torch.tensor(run.clock, dtype=torch.float64) - began,
        seconds=seconds_now(where) - began,
        status=status,
        completed=completed,
        steps=len(run.losses),
        batch_size=len(first),
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
    if isinstance(x, Tensor):
        # Rows drawn from a model may still hang on its parameters.
        x = x.detach() if device is None else x.detach().to(device)
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
    return _loader_batches(x, device, dtype, modules)


def tensor_batches(x: Tensor, batch_size: int) -> Batches:
    """Minibatches of rows without end, each with its rows' numbers, in a fresh order per pass."""
    size = min(batch_size, len(x))
    while True:
        order = torch.randperm(len(x)).to(x.device)
        for at in range(0, len(x) - size + 1, size):
            rows = order[at : at + size]
            yield x[rows], rows


def _loader_batches(
    loader: DataLoader[Any], device: Any, dtype: Any, modules: list[nn.Module]
) -> Batches:
    while True:
        empty = True
        for item in loader:
            empty = False
            rows = item[0] if isinstance(item, (tuple, list)) else item
            rows = rows.to(device=device) if device is not None else rows
            rows = rows.to(dtype) if dtype is not None and rows.is_floating_point() else rows
            check_rows(rows, *modules)
            yield rows, None
        if empty:
            raise ValueError("x is a DataLoader without batches: expected at least one.")


class Run:
    """The state of a training run.

    Args:
        model: A Pyro model.
        guide: A Pyro guide; what of both has a gradient is trained.
        loss: A Pyro ELBO object.
        lr: Adam's learning rate.
        num_data: Number of all rows where latents are shared by them, `None` elsewhere.
    """

    def __init__(
        self, model: Program, guide: Program, loss: ELBO, lr: float, num_data: int | None = None
    ) -> None:
        self.model, self.guide, self.loss, self.lr = model, guide, loss, lr
        # A minibatch's loss is then an estimate of that of all data.
        self.num_data = num_data
        self.losses: list[float] = []
        self.clock: list[float] = []
        self.params: list[Tensor] = []
        self.optimizers: list[Callable[[Tensor | None], Any]] = []
        self.good: list[Tensor] = []
        self.kept = 0

    def train(self, batches: Batches, steps: int, progress: bool) -> tuple[str, bool]:
        """Take the steps; say what happened, and whether all were taken."""
        from tqdm.auto import tqdm

        bar = tqdm(total=steps, disable=not progress, desc="fit", unit="step", leave=False)
        try:
            for step in range(steps):
                value = self._guarded(*next(batches))
                if value is None:
                    self._put(self.good)
                    return f"diverged at step {step + 1}: {self._advice()}", False
                if step % _KEEP_EVERY == 0:
                    bar.set_postfix(loss=f"{value:.3f}")
                bar.update()
            # No later loss has judged the last update.
            if not all(bool(torch.isfinite(p).all()) for p in self.params):
                self._put(self.good)
                return f"diverged at step {steps}: {self._advice()}", False
        except KeyboardInterrupt:
            return f"interrupted after {len(self.losses)} of {steps} steps", False
        finally:
            bar.close()
            for param in self.params:
                param.grad = None
        return f"completed {steps} steps", True

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
        return [tensor.detach().clone() for tensor in self._tensors()]

    def _put(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self._tensors(), values, strict=True):
                tensor.copy_(value)

    def _guarded(self, x: Tensor, rows: Tensor | None) -> float | None:
        """A step; `None` too where parameters went where Pyro refuses their distributions."""
        try:
            return self._step(x, rows)
        except ValueError:
            if not self.losses:
                raise
            reached = self._state()
            self._put(self.good)
            try:
                with torch.no_grad(), _on_rows(self.guide, rows):
                    self.loss.loss(self.model, self.guide, x)
            except ValueError:
                self._put(reached)  # Refused with good parameters too: the rows are at fault.
                raise
            return None

    def _step(self, x: Tensor, rows: Tensor | None) -> float | None:
        """One step; `None`, and nothing changed, if its loss or gradient is not finite."""
        for param in self.params:
            param.grad = None
        count = len(x) if self.num_data is None else self.num_data
        with _on_rows(self.guide, rows):
            if not self.params:
                self._collect(x)
            total = self.loss.loss_and_grads(self.model, self.guide, x)
        # Wake-sleep has two losses: that of the model is a bound.
        total = (total[0] if isinstance(total, tuple) else total) / count
        gradients = [p.grad for p in self.params if p.grad is not None]
        if not gradients:
            raise ValueError("Nothing to train: no parameter of model or guide has a gradient.")
        norm = sum(g.square().sum() for g in gradients)
        if not bool(torch.isfinite(torch.as_tensor(norm + total))):
            return None
        if len(self.losses) % _KEEP_EVERY == 0:
            # Known to be good only now, that their loss and gradient are finite.
            self.good = self._state()
            self.kept = len(self.losses)
        self.losses.append(float(total))
        torch._foreach_div_(gradients, float(count))
        self.clock.append(seconds_now())
        for update in self.optimizers:
            update(rows)
        return float(total)

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
        tables: list[nn.Parameter] = []
        owner = _table_of(self.guide)
        if owner is not None:
            tables = [owner.table(site).weight for site in owner.families]
        for table in tables:
            if table.requires_grad:
                self.optimizers.append(RowAdam(table, self.lr).step)  # type: ignore[arg-type]
        others = [p for p in self.params if not any(p is t for t in tables)]
        if others:
            adam = torch.optim.Adam(others, lr=self.lr)
            self.optimizers.append(lambda _: adam.step())
