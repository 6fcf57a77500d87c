"""A pair on some rows, set up so that draws of its gradient can be taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import (
    ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from torch import Tensor, nn

from ppvae.density import Program
from ppvae.isolation import forked_rng, modules_of, seconds_now
from ppvae.terms import PairRun

_OF_THE_ELBO = (Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)


class Bench:
    """A pair on some rows, whose gradients are measured.

    Args:
        model: The model.
        guide: The guide.
        x: The rows.
        run: One run of the pair, from which its parameters are read.
        count: Number of data that a loss stands for.
        shared: Whether the model has latents that all rows share.
    """

    def __init__(
        self, model: Program, guide: Program, x: Tensor, run: PairRun, count: int, shared: bool
    ) -> None:
        self.model, self.guide, self.x, self.run = model, guide, x, run
        self.count, self.shared = count, shared
        self.parameters, self.names, self.programs = _parameters(model, guide, run)
        owned = [p for module in modules_of(model, guide) for p in module.parameters()]
        self.everything = list({id(p): p for p in [*owned, *run.parameters.values()]}.values())
        # As each draw finds it: Pyro keeps moving averages of baselines there.
        self.store = pyro.get_param_store().get_state()

    @contextmanager
    def clean_gradients(self) -> Iterator[None]:
        """Use the parameters' ``grad``; afterwards it is what it was."""
        before = [(p, p.grad) for p in self.everything]
        try:
            yield
        finally:
            for p, grad in before:
                p.grad = grad

    def guide_for(self, estimator: ELBO) -> Program:
        """The guide, marked for enumeration where that is what the estimator is for."""
        if isinstance(estimator, TraceEnum_ELBO) and self.run.listable and not self.run.marked:
            return config_enumerate(self.guide)
        return self.guide

    def draw(self, estimator: ELBO, guide: Program, seed: int) -> tuple[Tensor, list[bool], float]:
        """One draw of the gradient.

        Returns:
            The gradient of all parameters one after the other, NaN if it or the loss is not
            finite; which parameters were given one; the seconds.
        """
        for p in self.everything:
            p.grad = None
        store = pyro.get_param_store()
        state: Any = {kind: dict(values) for kind, values in self.store.items()}
        with store.scope(state), forked_rng(seed, self.x.device):
            began = seconds_now(self.x.device)
            loss = estimator.loss_and_grads(self.model, guide, self.x)
            seconds = seconds_now(self.x.device) - began
        given = [p.grad is not None for p in self.parameters]
        parts = [
            torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in self.parameters
        ]
        # Downwards in the loss is upwards in the objective.
        gradient = -torch.cat([part.detach().reshape(-1) for part in parts]) / self.count
        losses = loss if isinstance(loss, tuple) else (loss,)
        if not all(math.isfinite(float(value)) for value in losses):
            gradient = torch.full_like(gradient, torch.nan)
        return gradient, given, seconds


def _parameters(
    model: Program, guide: Program, run: PairRun
) -> tuple[list[Tensor], list[str], list[str]]:
    """What is trained, with its name and the program that it belongs to."""
    roots = [
        (role, root)
        for role, program in (("model", model), ("guide", guide))
        if isinstance(root := poutine.unwrap(program), nn.Module)
    ]
    called = {
        role: {id(p): f"{role}.{name}" for name, p in root.named_parameters()}
        for role, root in roots
    }
    stored = {id(p): name for name, p in run.parameters.items()}
    owned = [p for _, root in roots for p in root.parameters()]
    unique = {id(p): p for p in [*owned, *run.parameters.values()]}
    candidates = [p for p in unique.values() if p.requires_grad and p.is_leaf]
    of_model = _depends(run.log_p, candidates)
    of_guide = _depends(run.guided, candidates)
    parameters, names, programs = [], [], []
    for p, modelled, guided in zip(candidates, of_model, of_guide, strict=True):
        if not modelled and not guided:
            continue
        program = "shared" if modelled and guided else "model" if modelled else "guide"
        order = ("model", "guide") if program == "model" else ("guide", "model")
        known = [called[role][id(p)] for role in order if id(p) in called.get(role, {})]
        parameters.append(p)
        names.append(known[0] if known else stored[id(p)])
        programs.append(program)
    if not parameters:
        raise ValueError(
            "Nothing to measure: no parameter of model or guide needs a gradient. Are all frozen "
            "(requires_grad=False)?"
        )
    return parameters, names, programs


def _depends(values: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[bool]:
    """Which parameters any of the values has a gradient of."""
    total = [value.sum() for value in values if value.requires_grad]
    if not total:
        return [False] * len(parameters)
    found = torch.autograd.grad(
        torch.stack(total).sum(), parameters, allow_unused=True, materialize_grads=False
    )
    return [gradient is not None for gradient in found]


def target_of(estimator: ELBO, bench: Bench) -> str:
    """The objective whose gradient an estimator estimates, in words."""
    own = getattr(estimator, "target", None)
    if isinstance(own, str):
        return own
    kind = type(estimator)
    if kind in _OF_THE_ELBO:
        return "ELBO"
    if kind is ReweightedWakeSleep:
        return f"wake-sleep, K = {estimator.num_particles}, weights of all rows at once"
    if kind is not RenyiELBO:
        return kind.__name__
    count, alpha = estimator.num_particles, estimator.alpha
    if alpha == 0 and bench.run.smooth and not bench.shared and not bench.run.scaled:
        return f"IWAE bound, K = {count}"
    parts = ["Rényi bound"]
    if bench.shared:
        parts.append("of all rows at once")
    elif bench.run.scaled:
        parts.append("with the model's scale inside its weights")
    if not bench.run.smooth:
        parts.append("of infinitely many draws, estimated")
    return f"{' '.join(parts)}, α = {alpha:g}, K = {count}"
