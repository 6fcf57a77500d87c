"""Pyro's SVI, with steps that run as one graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import pyro.infer
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import zero_grads
from pyro.optim import PyroOptim
from torch import Tensor

from ppvae.compiled.captured import Job
from ppvae.compiled.evaluating import as_losses
from ppvae.compiled.reporting import CompileReport
from ppvae.compiled.stepping import Mode, Stepper, Work
from ppvae.compiled.updates import AdamUpdate
from ppvae.graphs import Watch
from ppvae.objectives import Objective


class SVI(pyro.infer.SVI):
    r"""Stochastic variational inference with the interface of `pyro.infer.SVI`, compiled.

    The pair stays plain Pyro. The first step with arguments of some shape and dtype runs as
    Pyro's own does, with its validation. Then Pyro runs once more under proxy tensors, and the
    torch operations that it issued, the gradients and Adam's update become one graph, which later
    steps replay or, once that pays, run compiled; on a GPU as one launch. Each way is tried
    against Pyro on the same random draws before it is used: losses and gradients have to agree to
    1e-4 of the norm in single and 1e-8 in double precision. Draws are those of torch's own
    generators, in the order in which Pyro would make them, so that a seed gives the same run.

    What cannot be a graph runs as Pyro runs it, with one `CompileWarning` that says why: control
    flow that depends on data, draws by Python's or NumPy's generators, an attribute that the
    programs change at every call. A change of a number or a flag that model, guide or objective
    hold, ``model.eval()`` too, is noticed and means a new graph. Adam (`pyro.optim.Adam`, also
    below a `PyroLRScheduler`) is part of the graph, in the state that torch's own keeps; any other
    optimizer gets its gradients from the graph and runs as ever.

    Whether observed values are possible is judged at every step; other validation is that of the
    first step.

    Args:
        model: A Pyro model.
        guide: A Pyro guide.
        optim: An optimizer of `pyro.optim`.
        loss: A Pyro ELBO object, Pyro's own or one of `ppvae.objectives`.
        compile: `True` compiles at the second step with arguments of a signature, ``"auto"``
            once the steps to come are expected to pay for it, `False` never.

    Raises:
        ValueError: If ``compile`` is something else, or ``optim`` no optimizer of Pyro's.

    Example:
        >>> import pyro, torch
        >>> from pyro.infer import Trace_ELBO
        >>> import ppvae
        >>> from ppvae import pairs
        >>> model, guide = pairs.exponential_gaussian()
        >>> svi = ppvae.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        >>> x = torch.tensor([0.3, 2.0])
        >>> losses = [svi.step(x) for _ in range(3)]
        >>> losses[0].shape
        torch.Size([])
        >>> print(svi.compile_report())  # doctest: +ELLIPSIS
        (float32[2]): eager. The first step of a signature runs eagerly, with Pyro's validation.
        ...
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        loss: ELBO,
        compile: Mode = "auto",
    ) -> None:
        super().__init__(model, guide, optim, loss)
        self._stepper = Stepper(_Step(self, loss), compile)

    def step(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """Take a gradient step.

        Args:
            *args: Arguments of model and guide.
            **kwargs: Their named arguments.

        Returns:
            The loss before the step, a tensor without dimensions, which waits for the device only
            when its number is asked for; a tuple of two for `ReweightedWakeSleep`.
        """
        losses = self._stepper(*args, **kwargs)
        return losses[0] if len(losses) == 1 else tuple(losses)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """The loss at these arguments, without a step, as `step` returns it."""
        with torch.no_grad():
            loss = self.loss(self.model, self.guide, *args, **kwargs)
        losses = as_losses(loss, self._stepper.params)
        return losses[0] if len(losses) == 1 else tuple(losses)

    def compile_report(self) -> CompileReport:
        """Which way steps ran until now, for each signature of their arguments, and why."""
        return self._stepper.report()


# What a step takes from its SVI.
_PARTS = ("model", "guide", "optim", "loss", "loss_and_grads")


class _Step(Work):
    """A step of `pyro.infer.SVI`."""

    def __init__(self, svi: SVI, loss: ELBO) -> None:
        super().__init__()
        self._svi, self._loss = svi, loss

    def eager(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Tensor]:
        """The step as Pyro takes it."""
        svi = self._svi
        with poutine.trace(param_only=True) as capture:
            loss = svi.loss_and_grads(svi.model, svi.guide, *args, **kwargs)
        values = [site["value"].unconstrained() for site in capture.trace.nodes.values()]
        params = list({id(value): value for value in values}.values())
        svi.optim(params)
        zero_grads(params)
        self.params = [param for param in params if param.requires_grad]
        return as_losses(loss, params)

    def job(self, params: Sequence[Tensor]) -> Job:
        """The parts of that step."""
        svi, optim = self._svi, self._svi.optim
        optimizers = [_behind(optim.optim_objs.get(p)) for p in params]
        clipped = any(optim.grad_clip.get(p) is not None for p in params)
        refused = clipped or any(
            AdamUpdate.refusal(p, o) is not None for p, o in zip(params, optimizers, strict=True)
        )
        update = None if refused else AdamUpdate(params, optimizers)
        own: list[tuple[Mapping[Any, Any], Any]] = [(vars(svi), name) for name in _PARTS]
        own += [(optim.optim_objs, p) for p in params]
        watch = Watch(
            [svi.model, svi.guide, self._loss],
            [*own, *([] if update is None else update.places)],
            ignoring=Objective.counters,
        )

        def outside(gradients: Sequence[Tensor | None]) -> None:
            moved = [(p, g) for p, g in zip(params, gradients, strict=True) if g is not None]
            for param, gradient in moved:
                param.grad = gradient.clone()
            optim([param for param, _ in moved])
            zero_grads(params)

        def loss_and_grads(*args: Any, **kwargs: Any) -> Any:
            return svi.loss_and_grads(svi.model, svi.guide, *args, **kwargs)

        return Job(
            loss=self._loss,
            loss_and_grads=loss_and_grads,
            params=params,
            update=update,
            per=None,
            watch=watch,
            finish=outside if update is None else None,
        )


def _behind(optimizer: Any) -> Any:
    """The optimizer behind a scheduler of learning rates."""
    return getattr(optimizer, "optimizer", optimizer)
