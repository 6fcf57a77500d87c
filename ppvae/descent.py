"""Minibatch descent on losses that are no ELBO: what `reconstruction` and `adversarial` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ppvae.isolation import (
    check_rows,
    device_of,
    forked_rng,
    private_store,
    seconds_now,
    unvalidated,
)
from ppvae.progress import progress_bar

# A diverged run goes back to the last state kept; one is kept this often, in steps.
_KEEP_EVERY = 100
# So many steps are "of late".
_OF_LATE = 100


@dataclass(frozen=True)
class Player:
    """A loss, and what it trains.

    Attributes:
        loss: From a minibatch to the loss per datum, a scalar.
        params: The parameters that this loss moves; those of others stay as they are.
        optimizer: Over ``params``.
    """

    loss: Callable[[Tensor], Tensor]
    params: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Descent:
    """What a run did.

    Attributes:
        losses: ``(steps, players)``.
        elapsed: ``(steps,)``: seconds until the losses of each step were known.
        seconds: Wall time.
        status: What happened, in words.
        completed: Whether all steps were taken with finite losses.
        batch_size: Rows per step.
    """

    losses: Tensor
    elapsed: Tensor
    seconds: float
    status: str
    completed: bool
    batch_size: int


def trained(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of a module that are to be trained.

    Raises:
        ValueError: If there is none.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    if not params:
        raise ValueError(f"{name}: nothing to train, no parameter requires a gradient.")
    return params


def check_training(steps: int, batch_size: int, **rates: float) -> None:
    """Refuse numbers of steps and rows below 1, and learning rates that are not positive."""
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
    for name, rate in rates.items():
        if not rate > 0:
            raise ValueError(f"{name} must be positive; got {rate}.")


def _check_dtype(x: Tensor, modules: Sequence[nn.Module]) -> None:
    for module in modules:
        kind = next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype)
        if kind != x.dtype:
            raise ValueError(
                f"x has dtype {x.dtype} but the parameters of {type(module).__name__} have {kind}. "
                f"Convert one of them: x.to({kind}) or module.to({x.dtype})."
            )


def descend(
    players: Sequence[Player],
    modules: Sequence[nn.Module],
    x: Tensor,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    progress: bool,
    name: str,
) -> Descent:
    """Let each player take a step on every minibatch, one after the other.

    Rows come in a fresh random order in every pass. Where a loss or a gradient is not finite the
    run ends, with the last state put back whose losses and gradients were.

    Args:
        players: Who moves, in this order.
        modules: Whose parameters and buffers are put back.
        x: Rows, ``(num_data, *event)``.
        steps: Number of minibatches.
        batch_size: Rows of each; at most all.
        seed: Seed of the order of the rows and of all draws.
        progress: Whether to show a progress bar.
        name: What the bar is called.

    Raises:
        ValueError: If the rows are unfit, or have another dtype than the modules.
    """
    x = x.detach()
    check_rows(x, *modules)
    _check_dtype(x, modules)
    where = device_of(*modules) or x.device
    size = min(batch_size, len(x))
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    good, kept = _copy(tensors), 0
    losses: list[list[float]] = []
    clock: list[float] = []
    began = seconds_now(where)
    status, completed = f"completed {steps} steps", True

    def of_late() -> str:
        last = torch.tensor(losses[-_OF_LATE:]).mean(dim=0).tolist()
        return f"loss {' '.join(f'{value:.3f}' for value in last)}"

    try:
        # Without validation a network that has run away gives a loss of NaN, not an error.
        with (
            progress_bar(steps, name, "step", shown=progress) as bar,
            private_store(),
            forked_rng(seed, where),
            unvalidated(),
        ):
            for rows in _minibatches(x, size, steps):
                before = _copy(tensors) if len(losses) % _KEEP_EVERY == 0 else None
                values = _round(players, rows)
                if values is None:
                    break
                if before is not None:
                    good, kept = before, len(losses)
                losses.append(values)
                clock.append(seconds_now() - began)
                bar.advance(figure=of_late)
        if len(losses) < steps or not all(bool(torch.isfinite(t).all()) for t in tensors):
            _put(tensors, good)
            at = min(len(losses) + 1, steps)
            status, completed = (
                f"diverged at step {at}: the parameters after {kept} steps were kept; lower lr, "
                f"or check the data's scale",
                False,
            )
    except KeyboardInterrupt:
        status, completed = f"interrupted after {len(losses)} of {steps} steps", False
        if not all(bool(torch.isfinite(t).all()) for t in tensors):
            _put(tensors, good)
            status += f", and diverged: the parameters after {kept} steps were kept"
    finally:
        for module in modules:
            for param in module.parameters():
                param.grad = None
    return Descent(
        torch.tensor(losses).reshape(-1, len(players)),
        torch.tensor(clock, dtype=torch.float64),
        seconds_now(where) - began,
        status,
        completed,
        size,
    )


def _round(players: Sequence[Player], rows: Tensor) -> list[float] | None:
    """Each player's step; `None` where a loss or a gradient is not finite."""
    values = []
    for player in players:
        loss = player.loss(rows)
        gradients = torch.autograd.grad(loss, list(player.params), allow_unused=True)
        norm = sum(g.square().sum() for g in gradients if g is not None)
        if not bool(torch.isfinite(torch.as_tensor(norm + loss.detach()))):
            return None
        for param, gradient in zip(player.params, gradients, strict=True):
            param.grad = gradient
        player.optimizer.step()
        values.append(float(loss.detach()))
    return values


def _minibatches(x: Tensor, size: int, steps: int) -> Iterator[Tensor]:
    taken = 0
    while taken < steps:
        order = torch.randperm(len(x)).to(x.device)
        for at in range(0, len(x) - size + 1, size):
            if taken < steps:
                yield x[order[at : at + size]]
                taken += 1


def _copy(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
