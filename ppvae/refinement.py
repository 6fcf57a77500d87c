r"""Repairing the rows that need it: encode all, predict each row's gap, refine the worst first.

One evaluation at the guide's output predicts what a row has to gain, the Newton decrement of its
local ELBO with the curvature that the same draws give (`ppvae.natural`), or
:math:`\frac12 g^\top F^{-1} g` for families without a Gaussian (`ppvae.fisher`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ppvae.configurations import joint_table, num_configurations
from ppvae.coordinate import (
    MOST_IN_TABLE,
    Elements,
    Enumerated,
    all_discrete,
    bases_of,
    clamped_site,
    held,
    join_classes,
    split_classes,
)
from ppvae.density import ModelSites, Program, check_count, judging, read_model, row_chunks
from ppvae.families import DiscreteFamily, Family, GaussianFamily, in_order, split_sites
from ppvae.fisher import NEVER, LocalElbo
from ppvae.guides import PerDatapoint, per_datapoint
from ppvae.isolation import check_rows, seconds_now, unvalidated
from ppvae.local import fill_tables, flat_params
from ppvae.natural import GaussianElbo, GaussianState, Nodes

_LEAST_DRAWS = 32
_POLISH_DRAWS = 128
_FISHER_DRAWS = 64
_SMALLEST_RADIUS = 1e-3
# Of the rows that are open, those that promise at least this part of the most go first.
_WORST_FIRST = 0.25
_MEASURE_DRAWS = 100
# Of many rows that gain little, some measure a loss of two or three errors by chance.
_CLEARLY_WORSE = 4

ACCEPTED, REFINED, GIVEN_UP = "accepted", "refined", "given up"


@dataclass(frozen=True)
class Refinement:
    """A guide whose worst rows were mended, and what was done to each row.

    Attributes:
        guide: A guide for these rows.
        outcome: For each row ``"accepted"`` (the guide's output was left as it is), ``"refined"``
            or ``"given up"``.
        reason: For each row, why, in words.
        predicted_gap: ``(batch,)``: what one evaluation at the guide's output predicted, in nats.
        remaining: ``(batch,)``: the same figure at the end: to first order, in the mode that the
            row is in. A mode elsewhere may be higher by any number of nats.
        gain: ``(batch,)``: nats by which the ELBO rose, measured on draws of its own, common to
            before and after; zero in rows that were left as they are.
        gain_stderr: ``(batch,)``: its standard error, NaN where the gain is infinite.
        evaluations: ``(batch,)``: draws at which the gradient of log p(x, z) was evaluated.
        seconds: Wall time, without the measurement of ``gain``.
    """

    guide: PerDatapoint
    outcome: tuple[str, ...]
    reason: tuple[str, ...]
    predicted_gap: Tensor
    remaining: Tensor
    gain: Tensor
    gain_stderr: Tensor
    evaluations: Tensor
    seconds: float

    def count(self, outcome: str) -> int:
        """Number of rows with this outcome."""
        return self.outcome.count(outcome)

    def mean_gain(self) -> tuple[float, float]:
        """Nats a datum brought back, and the error; rows with an infinite gain count as zero."""
        rows, finite = len(self.outcome), torch.isfinite(self.gain)
        error = self.gain_stderr[finite].double().square().sum().sqrt()
        return float(self.gain[finite].double().sum()) / rows, float(error) / rows

    def __repr__(self) -> str:
        rows = len(self.outcome)
        finite = torch.isfinite(self.gain)
        mean, error = self.mean_gain()
        lines = [
            f"Refinement of {rows} rows: {self.count(ACCEPTED)} accepted as they are, "
            f"{self.count(REFINED)} refined, {self.count(GIVEN_UP)} given up.",
            f"Recovered {mean:.4f} ± {error:.4f} nats a datum with "
            f"{float(self.evaluations.double().mean()):.0f} gradient evaluations a datum, "
            f"{self.seconds:.1f} s.",
        ]
        if not bool(finite.all()):
            lines.append(
                f"In {int((~finite).sum())} rows, not counted there, the guide had no finite ELBO "
                f"and has one now."
            )
        if self.count(REFINED):
            lines.append(
                "What a refined row still promises is below the tolerance to first order, in the "
                "mode that the row is in; other modes were not looked for."
            )
        given_up = [
            why for why, what in zip(self.reason, self.outcome, strict=True) if what == GIVEN_UP
        ]
        for why in sorted(set(given_up)):
            lines.append(f"Given up in {given_up.count(why)} rows: {why}.")
        return "\n".join(lines)


def refine(
    model: Program,
    guide: Program,
    x: Tensor,
    *,
    budget: float | None = None,
    tolerance: float = 0.01,
    max_steps: int = 30,
    seed: int = 0,
) -> Refinement:
    r"""Mend the rows of an amortized guide that need it, the worst first.

    All rows are encoded, and one evaluation of the gradient at the guide's output predicts each
    row's amortization gap. Rows that promise less than ``tolerance`` are accepted as they are. The
    others take natural-gradient steps inside of a trust region, those that promise most first,
    until every row promises less than the tolerance or the budget is spent.

    A promise is to first order, and speaks of the mode that the row is in. Where log p(x, z) has
    several modes and the guide's output lies in a poor one, the row is mended within that mode, or
    accepted in it, however far below q* it stays. `fit_per_datapoint` with ``init=guide`` looks for
    other modes; `ppvae.compare` has q* beside the guide.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guide: A Pyro guide that can be freed; see `ppvae.per_datapoint`.
        x: Rows, ``(batch, *event)``.
        budget: Gradient evaluations of log p(x, z) to spend, on average for a row (a row and a
            draw is one); without end if left out. The prediction takes some of them: 32
            for a Gaussian family of 3 to 16 dimensions; in one and two the 22 and 484 nodes of
            a product rule.
        tolerance: Nats that a row may promise and still be left as it is.
        max_steps: Most steps for a row.
        seed: Seed of all draws; the caller's generators are left as they were.

    Returns:
        The guide for these rows, which rows were accepted, refined or given up, and why.

    Raises:
        ValueError: If the rows, the model or the guide are unfit, the guide cannot be freed (the
            site is named), discrete latents have too many values to list, or the budget does not
            pay for the prediction.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> model, guide = pairs.factor_analysis()
        >>> refine(model, guide, torch.randn(8, 6)).count("refined")
        8
    """
    check_rows(x, model, guide)
    check_count("max_steps", max_steps)
    if budget is not None and not budget > 0:
        raise ValueError(f"budget must be a positive number of evaluations; got {budget}.")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, in nats; got {tolerance}.")
    began = seconds_now(x.device)
    freed = per_datapoint(guide, x, model=model)
    with judging(seed, x, model), unvalidated():
        with torch.no_grad():
            sites = read_model(model, x)
            families = in_order(freed.families, sites.latents)
            start = flat_params(freed, families)
        climb: _Climb
        if all(isinstance(f, GaussianFamily) for f in families.values()):
            climb = _GaussianClimb(GaussianElbo(model, families, start), x, start, tolerance)
        elif all_discrete(families):
            climb = _SweepClimb(model, families, sites, x, start, tolerance)
        elif any(isinstance(f, DiscreteFamily) for f in families.values()):
            climb = _ClassClimb(model, families, x, start, tolerance)
        else:
            climb = _FisherClimb(LocalElbo(model, families, _FISHER_DRAWS), x, start, tolerance)
        least = climb.first_cost
        if budget is not None and budget < least:
            raise ValueError(
                f"budget: predicting the gaps takes {least} gradient evaluations a row; got "
                f"{budget}. Give more, or leave the budget out."
            )
        run = _Run(climb, len(x), budget, tolerance, max_steps)
        run.go()
        params = climb.params
        seconds = seconds_now(x.device) - began
        moved = torch.nonzero((params != start).any(dim=-1)).flatten()
        gain, stderr = torch.zeros_like(climb.promise), torch.zeros_like(climb.promise)
        elbo = LocalElbo(model, families, _MEASURE_DRAWS)
        for part in _parts(moved, x, _MEASURE_DRAWS):
            difference = elbo.difference(x[part], params[part], start[part], _MEASURE_DRAWS)
            gain[part] = difference.mean(dim=0)
            stderr[part] = difference.std(dim=0) / math.sqrt(_MEASURE_DRAWS)
        # Steps on few draws may harm a row that had little to gain.
        worse = (gain < -_CLEARLY_WORSE * stderr) | torch.isneginf(gain)
        params = torch.where(worse[:, None], start, params)
        gain, stderr = gain.masked_fill(worse, 0.0), stderr.masked_fill(worse, 0.0)
    outcome, reason = run.outcomes(worse)
    out = PerDatapoint(families, len(x), plate=freed.plate).to(x)
    fill_tables(out, params)
    return Refinement(
        guide=out,
        outcome=outcome,
        reason=reason,
        predicted_gap=run.predicted,
        remaining=torch.where(worse, run.predicted, climb.promise),
        gain=gain,
        gain_stderr=stderr,
        evaluations=climb.spent,
        seconds=seconds,
    )


def _parts(rows: Tensor, x: Tensor, draws: int) -> Iterator[Tensor]:
    """Rows in portions that fit into memory with so many draws each."""
    if len(rows):
        for span in row_chunks(x[:1].expand(len(rows), *x.shape[1:]), draws):
            yield rows[span]


class _Climb(Protocol):
    """Some rows' way up: where they are and what they still promise."""

    promise: Tensor
    spent: Tensor
    first_cost: int

    @property
    def params(self) -> Tensor:
        """λ of all rows."""

    @property
    def stuck(self) -> Tensor:
        """Rows whose trust region has collapsed."""

    def cost(self, rows: Tensor) -> Tensor:
        """Gradient evaluations that the next step of each row takes."""

    def advance(self, rows: Tensor) -> None:
        """One step of these rows."""

    def settled(self) -> Tensor:
        """Rows whose promise needs no further look."""


class _GaussianClimb:
    """Trust-region steps on a few fixed draws, then steps on more and fresh ones."""

    def __init__(self, elbo: GaussianElbo, x: Tensor, start: Tensor, tolerance: float) -> None:
        self.elbo, self.x, self.tolerance = elbo, x, tolerance
        self.start = start
        self.moved = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        few = 2 ** math.ceil(math.log2(max(_LEAST_DRAWS, 2 * elbo.size)))
        self.fixed: Nodes = elbo.nodes(few, start)
        self.more = max(_POLISH_DRAWS, few)
        # A product rule has the same nodes every time: fresh ones would say nothing new.
        self.deterministic = elbo.size <= 2
        self.first_cost = len(self.fixed[1])
        self.radius = x.new_full((len(x),), float(elbo.size) ** 0.5)
        self.polished = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.spent = torch.zeros(len(x), dtype=torch.long, device=x.device)
        loc, tril = elbo.gaussian(start)
        everything = torch.arange(len(x), device=x.device)
        parts = [
            elbo.evaluate(x[part], loc[part], tril[part], self.fixed)
            for part in _parts(everything, x, self.first_cost)
        ]
        self.state = GaussianState.joined(parts)
        self.spent += self.first_cost
        promise = elbo.promise(self.state.gradient, self.state.curvature)
        finite = torch.isfinite(self.state.value) & torch.isfinite(promise)
        self.promise = torch.where(finite, promise, torch.inf)
        self.began = self.promise

    @property
    def params(self) -> Tensor:
        # Where nothing moved, the way through scales and back would cost the last digit.
        reached = self.elbo.params(self.state.loc, self.state.tril)
        return torch.where(self.moved[:, None], reached, self.start)

    @property
    def stuck(self) -> Tensor:
        return self.radius <= _SMALLEST_RADIUS

    def settled(self) -> Tensor:
        untouched = self.began <= self.tolerance
        return untouched | (self.polished > 0) | self.deterministic

    def _searching(self, rows: Tensor) -> Tensor:
        return (self.polished[rows] == 0) & (self.promise[rows] > self.tolerance)

    def cost(self, rows: Tensor) -> Tensor:
        return torch.where(self._searching(rows) | self.deterministic, self.first_cost, self.more)

    def advance(self, rows: Tensor) -> None:
        searching = self._searching(rows) | self.deterministic
        for part in _parts(rows[searching], self.x, self.first_cost):
            self._search(part)
        for part in _parts(rows[~searching], self.x, self.more):
            self._polish(part)

    def _search(self, rows: Tensor) -> None:
        here = self.state.rows(rows)
        loc, tril = self.elbo.step(here, self.radius[rows], 1.0)
        there = self.elbo.evaluate(self.x[rows], loc, tril, self.fixed)
        self.spent[rows] += self.first_cost
        promise = self.elbo.promise(there.gradient, there.curvature)
        finite = torch.isfinite(there.value) & torch.isfinite(promise)
        better = finite & ((there.value > here.value) | ~torch.isfinite(here.value))
        chosen = torch.nonzero(better).flatten()
        self.state.put(rows[chosen], there, chosen)
        self.moved[rows[chosen]] = True
        self.promise[rows[chosen]] = promise[chosen]
        self.radius[rows] = torch.where(better, 2 * self.radius[rows], 0.25 * self.radius[rows])

    def _polish(self, rows: Tensor) -> None:
        here = self.state.rows(rows)
        nodes = self.elbo.nodes(self.more, self.x)
        fresh = self.elbo.evaluate(self.x[rows], here.loc, here.tril, nodes)
        self.spent[rows] += self.more
        self.polished[rows] += 1
        promise = self.elbo.promise(fresh.gradient, fresh.curvature)
        finite = torch.isfinite(promise)
        self.promise[rows] = torch.where(finite, promise, self.promise[rows])
        self.radius[rows] = torch.where(finite, self.radius[rows], 0.0)
        rate = (2.4 / (self.polished[rows] + 2)).clamp(max=0.8)
        moving = torch.nonzero(finite & (promise > self.tolerance)).flatten()
        if len(moving):
            self.moved[rows[moving]] = True
            part = fresh.rows(moving)
            radius = torch.ones_like(rate[moving])
            loc, tril = self.elbo.step(part, radius, rate[moving])
            self.state.put(
                rows[moving],
                replace(part, loc=loc, tril=tril),
                torch.arange(len(moving), device=self.x.device),
            )


class _FisherClimb:
    """Natural-gradient steps with an estimated Fisher matrix, kept only where they gain."""

    def __init__(self, elbo: LocalElbo, x: Tensor, start: Tensor, tolerance: float) -> None:
        self.elbo, self.x, self.tolerance = elbo, x, tolerance
        # Of many looks, each on a few draws of its own, some are small by luck: a row that took
        # steps has arrived when a look on more draws finds it so.
        self.sharp = LocalElbo(elbo.model, elbo.families, _POLISH_DRAWS)
        self.reached = start.clone()
        self.first_cost = elbo.draws_for(start)
        self.reach = x.new_ones(len(x))
        self.spent = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.promise = x.new_zeros(len(x))
        self.proposal = start.clone()
        # Where the density is no number its gradient counts as zero, which promises nothing.
        everything = torch.arange(len(x), device=x.device)
        parts = [
            elbo.log_weights(x[part], start[part], elbo.num_draws).mean(dim=0)
            for part in _parts(everything, x, elbo.num_draws)
        ]
        self.alive = torch.isfinite(torch.cat(parts).detach())
        self._look(everything, elbo)
        self.confirmed = self.promise <= tolerance

    @property
    def params(self) -> Tensor:
        return self.reached

    @property
    def stuck(self) -> Tensor:
        return self.reach <= _SMALLEST_RADIUS

    def settled(self) -> Tensor:
        return self.confirmed

    def _small(self, rows: Tensor) -> Tensor:
        return self.promise[rows] <= self.tolerance

    def cost(self, rows: Tensor) -> Tensor:
        confirming = self.sharp.draws_for(self.reached)
        return torch.where(self._small(rows), confirming, self.first_cost)

    def _look(self, rows: Tensor, elbo: LocalElbo) -> None:
        cost = elbo.draws_for(self.reached)
        for part in _parts(rows, self.x, cost):
            rate = 0.8 * self.reach[part]
            proposal, promise = elbo.step(self.x[part], self.reached[part], rate)
            self.proposal[part] = proposal
            promise = torch.where(self.alive[part], promise, torch.inf)
            self.promise[part] = torch.nan_to_num(promise, nan=torch.inf, posinf=torch.inf)
            self.spent[part] += cost

    def advance(self, rows: Tensor) -> None:
        small = self._small(rows)
        self._look(rows[small], self.sharp)
        self.confirmed[rows[small]] = self._small(rows[small])
        rows = rows[~small]
        for part in _parts(rows, self.x, 2 * self.elbo.num_draws):
            difference = self.elbo.difference(
                self.x[part], self.proposal[part], self.reached[part], self.elbo.num_draws
            )
            kept = difference.mean(dim=0) > 0
            self.alive[part] |= kept
            self.reached[part] = torch.where(kept[:, None], self.proposal[part], self.reached[part])
            wider = torch.where(kept, 2 * self.reach[part], 0.25 * self.reach[part])
            self.reach[part] = wider.clamp(max=1.0)
        self._look(rows, self.elbo)


class _SweepClimb:
    """Sweeps of coordinate ascent over discrete latents whose values can be listed."""

    def __init__(
        self,
        model: Program,
        families: Mapping[str, Family],
        sites: ModelSites,
        x: Tensor,
        start: Tensor,
        tolerance: float,
    ) -> None:
        count = num_configurations(sites)
        if count > MOST_IN_TABLE:
            raise ValueError(
                f"The model's latents have {count:.3g} values together; refine lists them, up to "
                f"{MOST_IN_TABLE}. Use ppvae.fit_per_datapoint(model, None, x, init=guide)."
            )
        self.elements, self.tolerance, self.like = Elements(families), tolerance, x
        with torch.no_grad():
            self.all = Enumerated(self.elements, joint_table(model, x, sites))
        self.start = start
        self.log_q = [part.to(self.all.dtype) for part in self.elements.log_probs(start)]
        self.moved = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.first_cost = int(count)
        self.spent = torch.full((len(x),), self.first_cost, dtype=torch.long, device=x.device)
        self.promise = self.all.promise(self.log_q)[0].to(x)

    @property
    def params(self) -> Tensor:
        reached = self.elements.params(self.log_q).to(self.start)
        return torch.where(self.moved[:, None], reached, self.start)

    @property
    def stuck(self) -> Tensor:
        return torch.zeros_like(self.moved)

    def settled(self) -> Tensor:
        return torch.ones_like(self.moved)

    def cost(self, rows: Tensor) -> Tensor:
        # All values of log p(x, z) are at hand.
        return torch.zeros_like(rows)

    def advance(self, rows: Tensor) -> None:
        some = self.all.of_rows(rows)
        end, _ = some.ascend([part[rows] for part in self.log_q], 1, self.tolerance)
        for part, value in zip(self.log_q, end, strict=True):
            part[rows] = value
        self.moved[rows] = True
        self.promise[rows] = some.promise(end)[0].to(self.like)


class _ClassClimb:
    """A climb of the Gaussians for each value of a categorical site, and q(k) ∝ exp L_k."""

    def __init__(
        self,
        model: Program,
        families: Mapping[str, Family],
        x: Tensor,
        start: Tensor,
        tolerance: float,
    ) -> None:
        site = clamped_site(families)
        bases = {} if site is None else bases_of(families, site)
        if site is None or not all(isinstance(f, GaussianFamily) for f in bases.values()):
            raise ValueError(
                f"refine climbs from where a row is, which says little of other values of a "
                f"discrete latent: beside one it takes Given families of Gaussians; got "
                f"{dict(families)}. Use ppvae.fit_per_datapoint(model, None, x, init=guide), which "
                f"starts at the other values too."
            )
        self.families, self.site, self.start = families, site, start
        own = families[site]
        assert isinstance(own, DiscreteFamily)
        self.log_q = own.log_probs(split_sites(families, start)[site])[:, 0]
        self.climbs = [
            _GaussianClimb(
                GaussianElbo(held(model, site, families, k, x), bases, part), x, part, tolerance
            )
            for k, part in enumerate(split_classes(families, site, start))
        ]
        self.moved = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.first_cost = sum(climb.first_cost for climb in self.climbs)
        self._look()

    def _look(self) -> None:
        """The values of all classes, and what the best q(k) over their optima promises."""
        columns = [[c.state.value, c.promise, c.spent] for c in self.climbs]
        value, gain, spent = (torch.stack(parts, dim=-1) for parts in zip(*columns, strict=True))
        value = torch.nan_to_num(value, nan=-torch.inf)
        entropy_free = torch.where(self.log_q > NEVER, self.log_q.exp() * (value - self.log_q), 0)
        self.value, self.spent = value, spent.sum(dim=-1)
        promise = torch.logsumexp(value + gain, dim=-1) - entropy_free.sum(dim=-1)
        self.promise = torch.nan_to_num(promise, nan=torch.inf).clamp(min=0.0)

    @property
    def params(self) -> Tensor:
        joined = join_classes(
            self.families, self.site, self.log_q, [climb.params for climb in self.climbs]
        )
        return torch.where(self.moved[:, None], joined, self.start)

    @property
    def stuck(self) -> Tensor:
        return torch.stack([climb.stuck for climb in self.climbs]).all(dim=0)

    def settled(self) -> Tensor:
        # Of classes that no member would hold nothing is to be made sure.
        idle = (self.value - self.value.amax(dim=-1, keepdim=True)) < NEVER / 4
        done = torch.stack([climb.settled() for climb in self.climbs], dim=-1)
        return (done | idle).all(dim=-1)

    def cost(self, rows: Tensor) -> Tensor:
        return torch.stack([climb.cost(rows) for climb in self.climbs]).sum(dim=0)

    def advance(self, rows: Tensor) -> None:
        for climb in self.climbs:
            open_ = (climb.promise[rows] > climb.tolerance) | ~climb.settled()[rows]
            chosen = rows[open_ & ~climb.stuck[rows]]
            if len(chosen):
                climb.advance(chosen)
        self._look()
        self.log_q[rows] = self.value[rows].log_softmax(dim=-1)
        self.moved[rows] = True
        self._look()


class _Run:
    """Which rows go next, and why a row stopped."""

    def __init__(
        self, climb: _Climb, rows: int, budget: float | None, tolerance: float, max_steps: int
    ) -> None:
        self.climb, self.tolerance, self.max_steps = climb, tolerance, max_steps
        self.most = math.inf if budget is None else budget * rows
        self.predicted = climb.promise.clone()
        self.steps = torch.zeros(rows, dtype=torch.long, device=climb.promise.device)

    def _open(self) -> Tensor:
        """Rows that have something to gain, or to be sure of, and may go on."""
        climb = self.climb
        wanting = (climb.promise > self.tolerance) | ~climb.settled()
        return wanting & ~climb.stuck & (self.steps < self.max_steps)

    def go(self) -> None:
        while True:
            rows = torch.nonzero(self._open()).flatten()
            if len(rows) == 0:
                return
            if math.isfinite(self.most):
                rows = self._affordable(rows)
                if len(rows) == 0:
                    return
            self.steps[rows] += 1
            self.climb.advance(rows)

    def _affordable(self, rows: Tensor) -> Tensor:
        """The worst of the rows, as far as the budget goes."""
        promise = self.climb.promise[rows]
        order = promise.argsort(descending=True)
        rows, promise = rows[order], promise[order]
        rows = rows[promise >= _WORST_FIRST * promise[0].clamp(max=1e30)]
        left = self.most - float(self.climb.spent.sum())
        return rows[self.climb.cost(rows).cumsum(0) <= left]

    def outcomes(self, worse: Tensor) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Outcome and reason of each row."""
        outcome, reason = [], []
        climb = self.climb
        for row in range(len(worse)):
            predicted, promise = float(self.predicted[row]), float(climb.promise[row])
            if bool(worse[row]):
                outcome.append(GIVEN_UP)
                reason.append("the steps did not raise the ELBO, so the guide's output was kept")
            elif predicted <= self.tolerance:
                outcome.append(ACCEPTED)
                reason.append(f"promised {predicted:.2g} nats, below the tolerance")
            elif promise <= self.tolerance:
                outcome.append(REFINED)
                reason.append(f"promised {predicted:.2g} nats, now {promise:.2g}")
            else:
                outcome.append(GIVEN_UP)
                if not math.isfinite(promise):
                    reason.append("no finite density around the guide's output")
                elif bool(climb.stuck[row]):
                    reason.append("no further step raised the ELBO")
                elif int(self.steps[row]) >= self.max_steps:
                    reason.append("the step limit was reached")
                else:
                    reason.append("the budget was spent on rows that promised more")
        return tuple(outcome), tuple(reason)
