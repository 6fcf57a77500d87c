r"""Stochastic natural-gradient ascent of the local ELBO for any family, many rows at once.

What the Gaussian method of `ppvae.natural` does not cover: Adam brings a row near its optimum, and
steps :math:`F^{-1} \nabla_\lambda L` with the family's own Fisher information F, estimated from
draws, bring it there. The gradients leave out the score of q, whose mean is zero (Roeder, Wu &
Duvenaud 2017), so that their noise vanishes with the gap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ppvae.configurations import MOST_CONFIGURATIONS, configurations
from ppvae.density import LatentSite, Program, joint
from ppvae.families import (
    Categorical,
    DiscreteFamily,
    DistributionFamily,
    Family,
    split_sites,
)
from ppvae.isolation import forked_rng
from ppvae.natural import GaussianElbo

_LEARNING_RATE = 0.05
_ADAM_DRAWS = 32
_ADAM_STEPS = 200
# Rows that promise less than this, in nats, need no Adam to come near.
_NEAR = 0.5
# The Fisher matrix costs P² per row: families with more parameters rely on Adam alone.
_MOST_FISHER = 64
# Beside other latents each costs an evaluation of the model at all draws.
_MOST_BESIDE_OTHERS = 256
# Directions of λ with less than this part of the largest information move the distribution not:
# in families that may have more parameters than they need, and in all, by rounding.
_IDLE, _ROUNDED = 1e-4, 1e-9
# Log probability below which a discrete value is none that q would draw.
NEVER = -69.0
_ROUND, _ROUNDS = 20, 3
_CHECK_PASSES = 8
# Nats that a natural-gradient step may lose on its draws: near the optimum that is noise.
_TOLERATED_LOSS = 1e-3


@dataclass(frozen=True)
class LocalElbo:
    """The local ELBO of a model, a function of the parameters λ of each row.

    Attributes:
        model: A Pyro model.
        families: The family of each latent site.
        num_draws: Draws per row and evaluation.
        rows: How many rows will be fitted in all, where that is known.
    """

    model: Program
    families: Mapping[str, Family]
    num_draws: int
    rows: int = 0
    _gaussian: list[GaussianElbo] = field(default_factory=list, init=False, repr=False)

    def gaussian(self, like: Tensor) -> GaussianElbo:
        """The same objective for Gaussian families, one object for all portions of the rows."""
        if not self._gaussian:
            self._gaussian.append(GaussianElbo(self.model, self.families, like, self.rows))
        return self._gaussian[0]

    def log_weights(
        self, x: Tensor, params: Tensor, num_draws: int, *, still: bool = False
    ) -> Tensor:
        """Log weights ``(num_draws, batch)`` for λ, differentiable in it.

        Args:
            x: Rows.
            params: ``(batch, P)``, or ``(num_draws, batch, P)`` with a λ for every draw.
            num_draws: Number of draws.
            still: Whether log q holds its λ constant, and follows the draws alone.
        """
        parts = split_sites(self.families, params)
        discrete = {n: f for n, f in self.families.items() if isinstance(f, DiscreteFamily)}
        if not discrete:
            return self._weigh(x, parts, {}, num_draws, still=still)
        # Discrete latents are summed over, so that what is left is differentiable in λ.
        alone = len(discrete) == len(self.families)
        most = MOST_CONFIGURATIONS if alone and params.dim() == 2 else _MOST_BESIDE_OTHERS
        table = _values_of(discrete, x, most)
        if alone:
            weight = self._at_all(x, parts, table, still=still)
            return weight.expand(num_draws, len(x))
        total = torch.zeros(()).to(x)
        for index in range(len(next(iter(table.values())))):
            shape = (num_draws, len(x))
            chosen = {
                name: value[index].expand(*shape, *value.shape[1:]) for name, value in table.items()
            }
            log_q = _log_prob(discrete, parts, chosen)
            weight = self._weigh(x, parts, chosen, num_draws, still=still)
            term = log_q.exp() * (weight - (log_q.detach() if still else log_q))
            total = total + torch.where(log_q > NEVER, term, 0.0)
        return total

    def _at_all(
        self,
        x: Tensor,
        parts: Mapping[str, Tensor],
        table: Mapping[str, Tensor],
        *,
        still: bool,
    ) -> Tensor:
        """The ELBO itself where all latents are discrete: nothing is drawn."""
        values = {
            name: value[:, None].expand(len(value), len(x), *value.shape[1:])
            for name, value in table.items()
        }
        log_p = joint(self.model, x, values)
        with_draws = next(iter(parts.values())).dim() == 3
        if with_draws:
            values = {name: value[:, None] for name, value in values.items()}
            log_p = log_p[:, None]
        families = {n: f for n, f in self.families.items() if isinstance(f, DiscreteFamily)}
        log_q = _log_prob(families, parts, values)
        term = log_q.exp() * (log_p - (log_q.detach() if still else log_q))
        # What q never draws counts for nothing, also where it is impossible.
        return torch.where(log_q > NEVER, term, 0.0).sum(dim=0)

    def _weigh(
        self,
        x: Tensor,
        parts: Mapping[str, Tensor],
        chosen: Mapping[str, Tensor],
        num_draws: int,
        *,
        still: bool,
    ) -> Tensor:
        """log p(x, z) − log q over the sites that are drawn, those chosen at their values."""
        values, log_q = dict(chosen), torch.zeros(())
        for name, family in self.families.items():
            if name in chosen:
                continue
            member = family.member(parts[name], values)
            # A λ for every draw, or a value that it hangs on, has brought the draws already.
            drawn = len(member.batch_shape) == 2
            values[name] = member.rsample(torch.Size([] if drawn else [num_draws]))
            if still:
                member = family.member(parts[name].detach(), values)
            log_q = log_q + member.log_prob(values[name])
        return joint(self.model, x, values) - log_q

    def difference(self, x: Tensor, one: Tensor, other: Tensor, draws: int) -> Tensor:
        """Log weights under ``one`` minus those under ``other`` on common draws.

        Returns:
            ``(draws, batch)``; +∞ in rows where only ``one`` has a finite ELBO, −∞ where it has
            none.
        """
        seed = int(torch.randint(2**31, ()))
        weights = []
        for params in (one, other):
            with torch.no_grad(), forked_rng(seed, x.device):
                weights.append(self.log_weights(x, params, draws))
        finite = [torch.isfinite(w.mean(dim=0)) for w in weights]
        difference = weights[0] - weights[1]
        difference = torch.where(finite[1], difference, torch.inf)
        return torch.where(finite[0], difference, -torch.inf)

    def gain_over(self, x: Tensor, one: Tensor, other: Tensor, *, sigmas: float = 2.0) -> Tensor:
        """Nats by which ``one`` beats ``other``, zero where that is below ``sigmas`` errors."""
        draws = 4 * self.num_draws
        difference = self.difference(x, one, other, draws)
        mean = difference.mean(dim=0)
        clearly = mean > sigmas * difference.std(dim=0) / math.sqrt(draws)
        return torch.where(clearly | torch.isposinf(mean), mean, 0.0)

    def draws_for(self, params: Tensor) -> int:
        """Draws of one gradient evaluation: enough of them for a covariance of P numbers."""
        return max(self.num_draws, 8 * params.shape[1])

    def gradients(self, x: Tensor, params: Tensor, draws: int | None = None) -> Tensor:
        """Gradients of the local ELBO in λ, one per draw: ``(draws, batch, P)``."""
        draws = draws or self.draws_for(params)
        copies = params.expand(draws, *params.shape).clone().requires_grad_(True)
        weights = self.log_weights(x, copies, draws, still=True)
        (gradients,) = torch.autograd.grad(weights.sum(), copies)
        return torch.nan_to_num(gradients, nan=0.0, posinf=0.0, neginf=0.0)

    def fisher(self, params: Tensor) -> Tensor:
        """Fisher information of λ, ``(batch, P, P)``, the second moment of the score, in double."""
        scores = self._scores(params).double()
        fisher = torch.einsum("snp,snq->npq", scores, scores) / len(scores)
        # A family may have more parameters than it needs (a rotation of a low-rank factor, say).
        # Along what changes nothing there is nothing to gain, and no step is to be taken.
        size = fisher.diagonal(dim1=-2, dim2=-1).clamp(min=1e-12).sqrt()
        scaled = fisher / size[:, :, None] / size[:, None, :]
        finite = torch.isfinite(scaled).all(-1).all(-1)[:, None, None]
        scaled = torch.where(finite, scaled, torch.eye(params.shape[1]).to(scaled))
        values, vectors = torch.linalg.eigh(scaled)
        least = _IDLE if any(map(_may_idle, self.families.values())) else _ROUNDED
        values = torch.where(values > least * values[:, -1:], values, 1 / _IDLE**2)
        scaled = vectors @ torch.diag_embed(values) @ vectors.mT
        return size[:, :, None] * scaled * size[:, None, :]

    def _scores(self, params: Tensor) -> Tensor:
        """Scores ∇ log q(z; λ) at draws of q, ``(draws, batch, P)``."""
        draws = self.draws_for(params)
        copies = params.expand(draws, *params.shape).clone().requires_grad_(True)
        total, values = torch.zeros(()), dict[str, Tensor]()
        for name, part in split_sites(self.families, copies).items():
            member = self.families[name].member(part, values)
            values[name] = member.sample()
            total = total + member.log_prob(values[name])
        (scores,) = torch.autograd.grad(total.sum(), copies)
        return scores

    def step(self, x: Tensor, params: Tensor, rate: Tensor | float) -> tuple[Tensor, Tensor]:
        """A natural-gradient step, and what it promises: ½ gᵀ F⁻¹ g less its noise, in nats.

        Args:
            x: Rows.
            params: λ.
            rate: Fraction of the step to take, at most 1 for each row.
        """
        gradients = self.gradients(x, params)
        gradient, fisher = gradients.mean(dim=0), self.fisher(params)
        step = _solve(fisher, gradient)
        centred = (gradients - gradient) / len(gradients)
        covariance = torch.einsum("snp,snq->npq", centred, centred)
        solved = torch.nan_to_num(torch.linalg.solve_ex(fisher, covariance.to(fisher))[0])
        noise = solved.diagonal(dim1=-2, dim2=-1).sum(dim=-1).to(params)
        # At most 1 in the Fisher metric, half a nat between the two distributions, and at most 2
        # in any parameter, where the Fisher matrix knows little of it.
        squared = (gradient * step).sum(dim=-1).clamp(min=0.0)
        longest = torch.maximum(squared.sqrt(), 0.5 * step.abs().amax(dim=-1)).clamp(min=1e-30)
        rate = rate * longest.reciprocal().clamp(max=1.0)
        return params + rate[:, None] * step, 0.5 * (squared - noise).clamp(min=0.0)

    def remaining_gain(
        self, x: Tensor, params: Tensor, passes: int = _CHECK_PASSES
    ) -> tuple[Tensor, Tensor]:
        r"""What one natural-gradient step still promises, :math:`\frac12 g^\top F^{-1} g`, per row.

        The second figure is what the first would be at the optimum, from Monte Carlo noise alone.
        """
        gradients = torch.cat([self.gradients(x, params) for _ in range(passes)])
        draws, mean = len(gradients), gradients.mean(dim=0)
        variance = gradients.var(dim=0) / draws
        if params.shape[1] > _MOST_FISHER:
            scale = self._scores(params).square().mean(dim=0).clamp(min=1e-12)
            return 0.5 * (mean**2 / scale).sum(-1), 0.5 * (variance / scale).sum(-1)
        fisher = self.fisher(params)
        centred = gradients - mean
        covariance = torch.einsum("snp,snq->npq", centred, centred) / (draws * (draws - 1))
        mean = mean.to(fisher)
        gain = 0.5 * (mean * torch.linalg.solve_ex(fisher, mean)[0]).sum(dim=-1).to(params)
        solved = torch.linalg.solve_ex(fisher, covariance.to(fisher))[0]
        noise = 0.5 * solved.diagonal(dim1=-2, dim2=-1).sum(dim=-1).to(params)
        # Where there is no figure, nothing is promised to be near the optimum.
        return torch.nan_to_num(gain, nan=torch.inf), torch.nan_to_num(noise, nan=torch.inf)


@dataclass(frozen=True)
class Table:
    """The local ELBO over a family on one latent element, with log p(x, z) listed on nodes.

    q counts on the nodes alone, made to sum to 1 there, so that the rest is exact arithmetic:
    value, gradient and second derivatives of what is left hold no noise.

    Attributes:
        family: The family.
        z: Nodes, ``(K, batch, *event)``.
        log_volume: ``(K, batch)``: log of the volume that each node stands for.
        log_p: log p(x, z) there, ``(K, batch)``.
    """

    family: Family
    z: Tensor
    log_volume: Tensor
    log_p: Tensor

    def rows(self, where: Tensor | slice) -> Table:
        """The rows ``where``."""
        parts = (self.z[:, where], self.log_volume[:, where], self.log_p[:, where])
        return Table(self.family, *parts)

    def coarse(self) -> Table:
        """Every second node."""
        volume = self.log_volume[::2] + math.log(2.0)
        return Table(self.family, self.z[::2], volume, self.log_p[::2])

    def value(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """The ELBO at λ, and the part of q that the nodes hold, ``(batch,)``."""
        log_q = self.family.distribution(params).log_prob(self.z)
        mass = torch.logsumexp(log_q + self.log_volume, dim=0)
        log_q = log_q - mass
        return ((log_q + self.log_volume).exp() * (self.log_p - log_q)).sum(dim=0), mass.exp()

    def moments(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value, gradient ``(batch, P)`` and second derivatives ``(batch, P, P)`` in λ."""
        params = params.detach().requires_grad_(True)
        value, _ = self.value(params)
        (gradient,) = torch.autograd.grad(value.sum(), params, create_graph=True)
        second = [
            torch.autograd.grad(g.sum(), params, retain_graph=True)[0] for g in gradient.unbind(-1)
        ]
        return value.detach(), gradient.detach(), torch.stack(second, dim=-2)


def tabulated_ascent(
    table: Table, start: Tensor, max_steps: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Newton's method in λ inside of a trust region; rows that have arrived leave the batch.

    Args:
        table: The objective.
        start: λ, ``(batch, P)``.
        max_steps: Most evaluations per row.
        tolerance: A row with less than this to gain, in nats, has arrived.

    Returns:
        λ, the value, the gain that a further step promises (infinite where the value is no
        maximum in λ), and the evaluations, each ``(batch, …)``.
    """
    params = start.clone()
    value, gradient, second = table.moments(params)
    steps = torch.ones(len(params), dtype=torch.long, device=params.device)
    radius = torch.ones_like(value)
    gain = torch.full_like(value, torch.inf)
    moving = torch.arange(len(params), device=params.device)
    while True:
        move, promise = _ascent(gradient[moving], second[moving], radius[moving])
        gain[moving] = promise
        chosen = ~(promise <= 1e-4 * tolerance)
        chosen &= (radius[moving] > 1e-3) & (steps[moving] < max_steps)
        if not bool(chosen.any()):
            return params, value, gain, steps
        moving = moving[chosen]
        new = params[moving] + move[chosen]
        there, slope, bend = table.rows(moving).moments(new)
        steps[moving] += 1
        rounding = 4 * torch.finfo(there.dtype).eps * there.abs()
        better = (there > value[moving] - rounding) | ~torch.isfinite(value[moving])
        better &= torch.isfinite(there + slope.sum(-1) + bend.sum((-1, -2)))
        taken = moving[better]
        params[taken], value[taken] = new[better], there[better]
        gradient[taken], second[taken] = slope[better], bend[better]
        radius[moving] = torch.where(better, 2 * radius[moving], 0.25 * radius[moving])


def _ascent(gradient: Tensor, second: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """A step uphill of length ``radius`` at most, and what Newton's promises at a maximum."""
    bad = ~torch.isfinite(gradient.sum(-1) + second.sum((-1, -2)))
    gradient = torch.where(bad[:, None], 0.0, gradient).double()
    second = torch.where(bad[:, None, None], 0.0, second).double()
    values, vectors = torch.linalg.eigh(-second)
    along = (vectors.mT @ gradient[..., None])[..., 0]
    size = values.abs().clamp(min=1e-4)
    step = along / size
    # What is flat as far as rounding tells neither bends up nor promises anything.
    concave = (values > -1e-4).all(dim=-1) & ~bad
    promise = torch.where(concave, 0.5 * (along * step).sum(-1), torch.inf)
    move = (vectors @ step[..., None])[..., 0]
    length = move.norm(dim=-1).clamp(min=1e-30)
    move = move * (radius / length).clamp(max=1.0)[:, None]
    return move.to(radius), promise.to(radius)


def adaptive_ascent(
    elbo: LocalElbo, x: Tensor, start: Tensor, max_steps: int | None, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Climb from ``start``; rows that have arrived leave the batch.

    Args:
        elbo: The objective.
        x: Rows.
        start: λ, ``(batch, P)``.
        max_steps: Most steps per row, 260 if left out.
        tolerance: A row with less than this to gain, in nats, has arrived.

    Returns:
        λ, the gain that a further step promises, what that figure would be at the optimum from
        noise alone, and the steps taken, each ``(batch, …)``.
    """
    with_fisher = start.shape[1] <= _MOST_FISHER
    rounds = _rounds(max_steps, with_fisher)
    params = start.clone()
    gain, noise = elbo.remaining_gain(x, params, passes=1)
    steps = torch.zeros(len(x), dtype=torch.long, device=x.device)
    far = torch.nonzero(~(gain <= _NEAR)).flatten()
    adam_steps = (max_steps or _ADAM_STEPS + _ROUND * _ROUNDS) - sum(rounds)
    if not with_fisher:
        far = torch.arange(len(x), device=x.device)
    if len(far) and adam_steps:
        params[far] = _adam(elbo, x[far], params[far], adam_steps)
        steps[far] += adam_steps
    moving = torch.arange(len(x), device=x.device)
    taken = 0
    for count in rounds:
        before = params[moving]
        after = _natural_steps(elbo, x[moving], before, count, taken)
        kept = elbo.gain_over(x[moving], before, after) > 0
        params[moving] = torch.where(kept[:, None], before, after)
        steps[moving] += count
        taken += count
        gain[moving], noise[moving] = elbo.remaining_gain(x[moving], params[moving])
        arrived = gain - noise <= noise.clamp(min=0.5 * tolerance)
        moving = moving[~arrived[moving]]
        if len(moving) == 0:
            break
    if not rounds:
        gain, noise = elbo.remaining_gain(x, params)
    return params, gain, noise, steps


def _rounds(max_steps: int | None, with_fisher: bool) -> list[int]:
    """How many natural-gradient steps each round has; Adam takes the rest of ``max_steps``."""
    if not with_fisher:
        return []
    if max_steps is None:
        return [_ROUND] * _ROUNDS
    natural = min(max(_ROUND * _ROUNDS, max_steps // 4), max_steps // 2)
    full, rest = divmod(natural, _ROUND)
    return [_ROUND] * full + ([rest] if rest else [])


def _adam(elbo: LocalElbo, x: Tensor, start: Tensor, steps: int) -> Tensor:
    """Adam with a cosine schedule, on few draws."""
    params = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([params], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        value = elbo.log_weights(x, params, _ADAM_DRAWS).mean(dim=0)
        (gradient,) = torch.autograd.grad(-value.sum(), params)
        # A row that strayed to where the density is no number stays where it is for this step.
        params.grad = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        optimizer.step()
        schedule.step()
    return params.detach()


def _natural_steps(elbo: LocalElbo, x: Tensor, params: Tensor, count: int, taken: int) -> Tensor:
    """Natural-gradient steps, each kept by a row only if its ELBO on common draws allows it."""
    reach = params.new_ones(len(params))
    path = []
    for t in range(taken, taken + count):
        proposal, _ = elbo.step(x, params, min(0.8, 8.0 / (t + 1)) * reach)
        change = elbo.difference(x, proposal, params, elbo.num_draws).mean(dim=0)
        kept = change > -_TOLERATED_LOSS
        params = torch.where(kept[:, None], proposal, params)
        reach = torch.where(kept, 2 * reach, 0.25 * reach).clamp(max=1.0)
        path.append(params)
    # The mean of the later half of the path has less of the draws' noise than its end, but in a
    # row that arrived late it is behind.
    mean = torch.stack(path[len(path) // 2 :]).mean(dim=0)
    ahead = elbo.difference(x, params, mean, 4 * elbo.num_draws).mean(dim=0) > 0
    return torch.where(ahead[:, None], params, mean)


def _solve(matrix: Tensor, vector: Tensor) -> Tensor:
    """The solution per row, zero where the matrix is singular or no number."""
    solution, _ = torch.linalg.solve_ex(matrix, vector.to(matrix))
    return torch.nan_to_num(solution, nan=0.0, posinf=0.0, neginf=0.0).to(vector)


def _may_idle(family: Family) -> bool:
    """Whether some directions of λ may change nothing, as a rotation of a low-rank factor."""
    base = getattr(family, "base", None)
    own = isinstance(family, (Categorical, DistributionFamily))
    return own or (isinstance(base, Family) and _may_idle(base))


def _log_prob(
    families: Mapping[str, DiscreteFamily],
    params: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
) -> Tensor:
    """log q of the values of all sites."""
    terms = [f.distribution(params[name]).log_prob(values[name]) for name, f in families.items()]
    return torch.stack(torch.broadcast_tensors(*terms)).sum(dim=0)


def _values_of(
    families: Mapping[str, DiscreteFamily], like: Tensor, most: int
) -> dict[str, Tensor]:
    """All values of the discrete latents together, by site.

    Raises:
        ValueError: If they are too many to sum over.
    """
    count = math.prod(family.num_classes**family.size for family in families.values())
    if count > most:
        raise ValueError(
            f"The discrete latents of sites {list(families)} have {count:.3g} values together; "
            f"this sum over them is limited to {most}. Models whose latents are all discrete have "
            f"no such limit in fit_per_datapoint and compare."
        )
    sites = [LatentSite(n, f.event_shape, f.support, repr(f)) for n, f in families.items()]
    return configurations(sites, like)
