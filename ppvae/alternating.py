r"""Training without an encoder: inference of each datum and updates of the model, in turn.

Each round takes a minibatch, improves the parameters :math:`\lambda_n` of its rows while the model
stands still, and then moves the model's parameters :math:`\theta` while these stand still. A row's
λ waits in a table until the row's next turn, :math:`N / B` rounds later; by then θ has moved on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ppvae.compiled.updates import RowAdam
from ppvae.density import Program, check_count, check_pair, read_model
from ppvae.families import Family, GaussianFamily
from ppvae.feeding import Batches, tensor_batches
from ppvae.fisher import LocalElbo
from ppvae.guides import PerDatapoint
from ppvae.isolation import (
    check_rows,
    evaluation_mode,
    forked_rng,
    private_store,
    seconds_now,
    unvalidated,
)
from ppvae.local import by_site
from ppvae.natural import GaussianElbo, whitened_draws
from ppvae.objectives import BetaELBO
from ppvae.training import Run, without_warnings

_DRAWS = 16
# The part of a full natural-gradient step that is taken: the rest averages over draws.
_RATE = 0.5
# Families that are not Gaussian: Adam on λ.
_LOCAL_LR = 0.05


@dataclass(frozen=True)
class Alternation:
    """What an alternating training run did.

    Attributes:
        guide: A guide for the rows that it was trained on, one row of parameters each.
        losses: ``(rounds,)``: in each round the loss per datum of the minibatch after its
            local steps, in nats (minus an ELBO estimate).
        elapsed: ``(rounds,)``: seconds from the call until the loss of each round was known.
        seconds: Wall time.
        status: What happened, in words.
        completed: Whether all rounds were taken with finite losses.
        rounds: Number of rounds taken.
        batch_size: Rows per round.
    """

    guide: PerDatapoint
    losses: Tensor
    elapsed: Tensor
    seconds: float
    status: str
    completed: bool
    rounds: int
    batch_size: int

    def __repr__(self) -> str:
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        last = f"{float(tail.mean()):.4f}" if len(tail) else "none"
        return (
            f"Alternation({self.guide!r}, {self.status}; loss over the last tenth {last} nats a "
            f"datum, {self.seconds:.1f} s)"
        )


def fit_alternating(
    model: Program,
    family: Family | Mapping[str, Family],
    x: Tensor,
    *,
    rounds: int = 1000,
    local_steps: int = 2,
    lr: float = 1e-2,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> Alternation:
    r"""Train a model without an encoder, by alternating inference and learning.

    .. math::
        \lambda_n \leftarrow \lambda_n + \text{steps up } L_n(\lambda_n; \theta)
            \quad (n \in B), \qquad
        \theta \leftarrow \theta + \text{Adam step up }
            \tfrac{1}{|B|} \sum_{n \in B} L_n(\lambda_n; \theta)

    With Gaussian families, also behind a fixed bijection, the local steps are natural-gradient
    ones, of half the full length, so that on a Gaussian posterior each halves what is left to the
    optimum; with other families they are Adam's. They take the model in eval mode, in which the
    guide is judged; the model's own step is in train mode. Each row starts at λ = 0, and later from
    where its last turn left it. After the last round every row takes its steps once more. The
    model's step is that of `ppvae.fit`, with its loss `BetaELBO`. With full batches,
    families that hold the posterior and many local steps this is stochastic EM (Neal & Hinton
    1998).

    The model is trained in place. What is said in `ppvae.fit` of parameters, Pyro's store and
    random generators holds here too.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        family: The variational family, or one per latent site by name.
        x: Rows, ``(num_data, *event)``.
        rounds: Number of rounds.
        local_steps: Steps of each row of the minibatch per round.
        lr: Adam's learning rate for the model.
        batch_size: Rows per round; at most all of them.
        seed: Seed of the order of the rows and of the draws.
        progress: Whether to show a progress bar, on a terminal or in a notebook.

    Returns:
        The record of the run, with the guide. A loss that is no longer finite, or an interrupt
        from the keyboard, ends it early with the model's last good parameters kept, and
        ``status`` says so; the guide's rows are then as their last local steps left them.

    Raises:
        ValueError: If the rows or the model are unfit, a family's support or shape is not its
            site's or its draws cannot be differentiated, an argument is out of range, or the
            model has nothing to train.

    Example:
        >>> from ppvae.families import DiagonalNormal
        >>> from ppvae.models import FactorAnalysis
        >>> model = FactorAnalysis(x_dim=4, z_dim=2)
        >>> fit_alternating(model, DiagonalNormal(2), model(size=50).detach(), rounds=5).status
        'completed 5 rounds'
    """
    for name, value in (
        ("rounds", rounds),
        ("local_steps", local_steps),
        ("batch_size", batch_size),
    ):
        check_count(name, value)
    if not lr > 0:
        raise ValueError(f"lr must be positive; got {lr}.")
    began = seconds_now()
    check_rows(x, model)
    x = x.detach()
    with private_store(keep_bare=True), forked_rng(seed, x.device), without_warnings():
        with evaluation_mode(model), torch.no_grad():
            sites = read_model(model, x[:batch_size])
            families = _families(by_site(family, sites), list(sites.latents))
            for name, site in sites.latents.items():
                families[name].check_site(site)
            guide = PerDatapoint(families, len(x), plate=sites.plate).to(x)
            with guide.rows(slice(0, batch_size)):
                check_pair(model, guide, x[:batch_size])
        for name in families:
            guide.table(name).weight.requires_grad_(False)
        inference = _Inference(model, guide, local_steps, x)
        run = Run(model, guide, BetaELBO(), lr)
        batches = inference.before(tensor_batches(x, batch_size))
        status, completed = run.train(batches, rounds, progress)
        if completed:
            for part in torch.arange(len(x), device=x.device).split(batch_size):
                inference.improve(x[part], part)
        for name in families:
            guide.table(name).weight.requires_grad_(True)
    return Alternation(
        guide=guide,
        losses=torch.tensor(run.losses),
        elapsed=torch.tensor(run.clock, dtype=torch.float64) - began,
        seconds=seconds_now(x.device) - began,
        status=status.replace("steps", "rounds").replace("at step", "in round"),
        completed=completed,
        rounds=len(run.losses),
        batch_size=min(batch_size, len(x)),
    )


def _families(given: Mapping[str, Family], order: list[str]) -> dict[str, Family]:
    """The families in the model's order."""
    if set(given) != set(order):
        raise ValueError(
            f"family: expected a family for each of the latent sites {order}; got {list(given)}."
        )
    for name, each in given.items():
        if getattr(each.support, "is_discrete", False) or each.given is not None:
            raise ValueError(
                f"Site {name!r}: the local steps need draws that can be differentiated in λ, "
                f"which {each!r} has not."
            )
    return {name: given[name] for name in order}


class _Inference:
    """Local steps on the rows of a table, the model held fixed."""

    def __init__(self, model: Program, guide: PerDatapoint, steps: int, like: Tensor) -> None:
        self.model, self.guide, self.steps = model, guide, steps
        families = guide.families
        self.weights = [guide.table(name).weight for name in families]
        size = sum(family.size for family in families.values())
        # Whitening needs more draws than dimensions; Sobol points come in powers of 2.
        self.num_draws = int(2 ** math.ceil(math.log2(max(_DRAWS, 2 * size))))
        self.local: GaussianElbo | LocalElbo
        if all(isinstance(family, GaussianFamily) for family in families.values()):
            self.local = GaussianElbo(model, families, like)
        else:
            self.local = LocalElbo(model, families, self.num_draws)
            self.adams = [RowAdam(weight, _LOCAL_LR) for weight in self.weights]

    def before(self, batches: Batches) -> Batches:
        """The same minibatches, each after its rows have taken their steps."""
        for x, rows in batches:
            assert rows is not None
            self.improve(x, rows)
            yield x, rows

    def improve(self, x: Tensor, rows: Tensor) -> None:
        """Steps of these rows of the table; a row whose step is no number stays where it is."""
        # Without validation: a row that strays must not stop the others.
        with evaluation_mode(self.model), unvalidated():
            for _ in range(self.steps):
                params = torch.cat([weight[rows] for weight in self.weights], dim=-1)
                if isinstance(self.local, GaussianElbo):
                    self._natural(self.local, x, rows, params)
                else:
                    self._adam(self.local, x, rows, params)

    def _put(self, rows: Tensor, params: Tensor) -> None:
        at = 0
        for weight in self.weights:
            weight.data[rows] = params[:, at : at + weight.shape[1]]
            at += weight.shape[1]

    def _natural(self, local: GaussianElbo, x: Tensor, rows: Tensor, params: Tensor) -> None:
        noise = whitened_draws(self.num_draws, local.size, params)
        nodes = noise, noise.new_full((len(noise),), 1 / len(noise))
        state = local.evaluate(x, *local.gaussian(params), nodes)
        new = local.params(*local.step(state, x.new_ones(len(x)), _RATE))
        finite = torch.isfinite(new).all(dim=-1, keepdim=True)
        self._put(rows, torch.where(finite, new, params))

    def _adam(self, local: LocalElbo, x: Tensor, rows: Tensor, params: Tensor) -> None:
        gradient = -local.gradients(x, params, self.num_draws).mean(dim=0)
        at = 0
        for weight, adam in zip(self.weights, self.adams, strict=True):
            weight.grad = torch.zeros_like(weight)
            weight.grad[rows] = gradient[:, at : at + weight.shape[1]]
            adam.step(rows)
            weight.grad = None
            at += weight.shape[1]
