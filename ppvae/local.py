r"""The per-datapoint engine: the best member of a family for each datum, all rows at once.

Two methods share one interface. Where every latent site has a Gaussian family, also behind a
fixed bijection, natural-gradient steps with quasi-Monte Carlo draws find the optimum in tens of
evaluations; other families take Adam with a cosine schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ppvae.density import (
    ModelSites,
    Program,
    check_count,
    draw_chunks,
    joint,
    judging,
    read_model,
    row_chunks,
    weigh,
)
from ppvae.families import Family, GaussianFamily
from ppvae.guides import PerDatapoint, per_datapoint
from ppvae.isolation import check_rows, forked_rng, seconds_now, unvalidated
from ppvae.natural import natural_ascent, start_at_a_mode


@dataclass(frozen=True)
class LocalFit:
    """The best member found for each datum, and how good it is.

    Attributes:
        guide: A guide for these rows, one row of parameters each.
        elbo: ``(batch,)``, nats, estimated with draws that the fit has not seen.
        elbo_stderr: ``(batch,)``, its Monte Carlo standard error.
        converged: ``(batch,)``: whether what is still to be gained, to first order, is below the
            tolerance or inside the Monte Carlo noise of the gradient.
        predicted_gain: ``(batch,)``: that remaining gain, in nats.
        steps: ``(batch,)``: evaluations of the model's gradient, over all starts.
        start: ``(batch,)``: which start won, 0 for ``init``'s output, 1 for the cold start, 2
            for a narrow one at the best of some draws.
        seconds: Wall time of the fit, without the draws for ``elbo``.
        status: What happened, in words.
    """

    guide: PerDatapoint
    elbo: Tensor
    elbo_stderr: Tensor
    converged: Tensor
    predicted_gain: Tensor
    steps: Tensor
    start: Tensor
    seconds: float
    status: str

    def __repr__(self) -> str:
        return (
            f"LocalFit({self.guide!r}, elbo={float(self.elbo.mean()):.4f} nats a datum, "
            f"{self.status})"
        )


def fit_per_datapoint(
    model: Program,
    family: Family | Mapping[str, Family] | None,
    x: Tensor,
    *,
    init: Program | None = None,
    max_steps: int | None = None,
    num_draws: int = 128,
    num_samples: int = 1000,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> LocalFit:
    r"""Find :math:`q^*_n = \arg\max_{q \in Q} L_n[q]` for each row, the model held fixed.

    All rows are fitted in one batch (in chunks, so that memory stays bounded), each with a trust
    region and a stop of its own. Each row starts cold, at λ = 0; with ``init`` also at that
    guide's output; with Gaussian families also narrow, at the best of 64 standard normal draws. The
    best end is kept. Of a posterior with several modes it is the best optimum that was found.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        family: The variational family, or one per latent site by name; `None` takes them from
            ``init``.
        x: Rows, ``(batch, *event)``.
        init: A guide to start from. Its families must be ``family``, where both are given.
        max_steps: Most evaluations per row and start: by default 60 for Gaussian families
            and 260 for others.
        num_draws: Draws per row and evaluation; raised where a latent's dimension needs more.
        num_samples: Fresh draws for the reported ELBO.
        tolerance: A row has converged when it has less than this to gain, in nats.
        seed: Seed of all draws; the caller's generators are left as they were.

    Returns:
        The fit, with a guide for these rows.

    Raises:
        ValueError: If the rows or the model are unfit, or a family's support or shape is not its
            site's.

    Example:
        >>> import torch
        >>> from ppvae.families import TruncatedNormal
        >>> from ppvae.models import ExponentialGaussian
        >>> x = torch.tensor([0.0, 1.5])
        >>> fit = fit_per_datapoint(ExponentialGaussian(), TruncatedNormal(), x)
        >>> bool(((fit.elbo - ExponentialGaussian().log_evidence(x)).abs() < 0.01).all())
        True
    """
    check_rows(x, model, init)
    for name, value, least in (("num_draws", num_draws, 8), ("num_samples", num_samples, 2)):
        check_count(name, value, least)
    if max_steps is not None:
        check_count("max_steps", max_steps)
    began = seconds_now(x.device)
    if init is None and family is None:
        raise ValueError("Give a family, or init (a guide whose family is taken), or both.")
    freed = None if init is None else per_datapoint(init, x, model=model)
    with judging(seed, x, model):
        with torch.no_grad():
            sites = read_model(model, x)
        families = _families(family, freed, sites)
        guide = PerDatapoint(families, len(x), plate=sites.plate).to(x)
        cold = torch.zeros(len(x), sum(f.num_params for f in families.values())).to(x)
        starts = [cold] if freed is None else [_flat(freed, families), cold]
        problem = _Problem(model, families, num_draws, max_steps)
        parts = []
        with unvalidated():  # A row that strays must not stop the others.
            for rows in row_chunks(x, problem.num_draws):
                parts.append(_fit_rows(problem, x[rows], [s[rows] for s in starts]))
        params, gain, noise, steps, start = (
            torch.cat(column) for column in zip(*parts, strict=True)
        )
        if freed is None:
            start = start + 1  # There was no start at a guide's output.
        _fill(guide, params)
    seconds = seconds_now(x.device) - began
    with judging(seed + 1, x, model, guide), torch.no_grad():
        weights = torch.cat(
            [weigh(model, guide, x, size)[0] for size in draw_chunks(num_samples, x)]
        )
    # A squared gradient holds its noise. What is left at the optimum is noise alone, and exceeds
    # five times its mean in one row of a hundred or so.
    gain = (gain - noise).clamp(min=0.0)
    certain = noise <= 10 * tolerance  # With more noise than that the check says nothing.
    converged = (gain <= tolerance) | ((gain <= 4 * noise) & certain)
    return LocalFit(
        guide=guide,
        elbo=weights.mean(dim=0),
        elbo_stderr=weights.std(dim=0) / math.sqrt(num_samples),
        converged=converged,
        predicted_gain=gain,
        steps=steps,
        start=start,
        seconds=seconds,
        status=_status(converged),
    )


def _status(converged: Tensor) -> str:
    done, count = int(converged.sum()), len(converged)
    if done == count:
        return f"all {count} rows converged"
    return f"{count - done} of {count} rows did not converge: raise max_steps or num_draws"


def _families(
    family: Family | Mapping[str, Family] | None, freed: PerDatapoint | None, sites: ModelSites
) -> dict[str, Family]:
    """The family of each of the model's latent sites, in the model's order."""
    if family is None:
        assert freed is not None
        given = dict(freed.families)
    elif isinstance(family, Family):
        if len(sites.latents) > 1:
            raise ValueError(
                f"The model has latent sites {list(sites.latents)}: give a family for each, "
                f"as a dict by site name."
            )
        given = dict.fromkeys(sites.latents, family)
    else:
        given = dict(family)
    if set(given) != set(sites.latents):
        raise ValueError(
            f"Expected families for the latent sites {list(sites.latents)}; got {list(given)}."
        )
    for name, site in sites.latents.items():
        given[name].check_site(site)
        started = given[name] if freed is None else freed.families[name]
        if repr(started) != repr(given[name]):
            raise ValueError(
                f"Site {name!r}: init is of family {started!r} but family is {given[name]!r}; a "
                f"start has to be of the family that is fitted. Leave init out for a cold start."
            )
    return {name: given[name] for name in sites.latents}


def _flat(guide: PerDatapoint, order: Iterable[str]) -> Tensor:
    """λ of all sites in a row; the guide's own order may differ from the model's."""
    return torch.cat([guide.table(name).weight.detach() for name in order], dim=-1)


def _fill(guide: PerDatapoint, params: Tensor) -> None:
    at = 0
    for name, family in guide.families.items():
        part = params[:, at : at + family.num_params].clone()
        guide.table(name).weight = nn.Parameter(part)
        at += family.num_params


@dataclass(frozen=True)
class _Problem:
    """A model, the families of its sites and the effort to spend."""

    model: Program
    families: Mapping[str, Family]
    wanted_draws: int
    max_steps: int | None

    @property
    def num_draws(self) -> int:
        # Whitening needs twice as many draws as dimensions, and Sobol points come in powers of 2.
        # In few dimensions further draws are cheap, and skewed families need them.
        size = sum(f.size for f in self.families.values())
        return int(2 ** math.ceil(math.log2(max(self.wanted_draws, 2 * size, 512 // size))))

    @property
    def gaussian(self) -> bool:
        return all(isinstance(f, GaussianFamily) for f in self.families.values())

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
        values, log_q, at = {}, torch.zeros(()), 0
        for name, family in self.families.items():
            part = params[..., at : at + family.num_params]
            member = family.distribution(part)
            shape = torch.Size() if params.dim() == 3 else torch.Size([num_draws])
            values[name] = member.rsample(shape)
            if still:
                member = family.distribution(part.detach())
            log_q = log_q + member.log_prob(values[name])
            at += family.num_params
        return joint(self.model, x, values) - log_q


_Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _fit_rows(problem: _Problem, x: Tensor, starts: list[Tensor]) -> _Rows:
    """The best end for a chunk of rows: (params, gain, noise, steps, start)."""
    if problem.gaussian:
        narrow = start_at_a_mode(problem.model, problem.families, x, starts[0])
        ends = [
            natural_ascent(
                problem.model,
                problem.families,
                x,
                start,
                problem.num_draws,
                problem.max_steps or 60,
            )
            for start in [*starts, narrow]
        ]
    else:
        ends = [_adam(problem, x, start) for start in starts]
    params, gain, noise, steps = ends[0]
    winner = torch.zeros(len(x), dtype=torch.long, device=x.device)
    # A row that the fit made worse, as a bad chunk of draws may, goes back to where it began.
    for index, other in enumerate([*ends[1:], (starts[0], *ends[0][1:3], steps * 0)]):
        better = _clearly_better(problem, x, other[0], params)
        params = torch.where(better[:, None], other[0], params)
        if index < len(ends) - 1:
            gain = torch.where(better, other[1], gain)
            noise = torch.where(better, other[2], noise)
            winner = torch.where(better, index + 1, winner)
        else:
            gain = torch.where(better, torch.inf, gain)
        steps = steps + other[3]
    return params, gain, noise, steps, winner


def _clearly_better(problem: _Problem, x: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Rows whose ELBO under ``one`` exceeds that under ``other`` by two standard errors.

    A finite ELBO exceeds one that is not.
    """
    draws = 4 * problem.num_draws
    difference = _difference(problem, x, one, other, draws)
    clearly = difference.mean(dim=0) > 2 * difference.std(dim=0) / math.sqrt(draws)
    return clearly | torch.isposinf(difference.mean(dim=0))


def _difference(problem: _Problem, x: Tensor, one: Tensor, other: Tensor, draws: int) -> Tensor:
    """Log weights under ``one`` minus those under ``other`` on common draws, ``(draws, batch)``.

    +∞ in rows where only ``one`` has a finite ELBO, −∞ where it has none.
    """
    seed = int(torch.randint(2**31, ()))
    weights = []
    for params in (one, other):
        with torch.no_grad(), forked_rng(seed, x.device):
            weights.append(problem.log_weights(x, params, draws))
    finite = [torch.isfinite(w.mean(dim=0)) for w in weights]
    difference = weights[0] - weights[1]
    difference = torch.where(finite[1], difference, torch.inf)
    return torch.where(finite[0], difference, -torch.inf)


_LEARNING_RATE = 0.05
_ADAM_DRAWS = 32
# The Fisher matrix costs P² per row: families with more parameters rely on Adam alone.
_MOST_FISHER = 64
_NATURAL_STEPS = 60
_CHECK_PASSES = 8
# Nats that a natural-gradient step may lose on its draws: near the optimum that is noise.
_TOLERATED_LOSS = 1e-3


def _adam(problem: _Problem, x: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adam with a cosine schedule brings a row near, natural-gradient steps to its optimum."""
    natural = _NATURAL_STEPS if start.shape[1] <= _MOST_FISHER else 0
    steps = problem.max_steps or 200 + natural
    natural = min(max(natural, steps // 4 if natural else 0), steps // 2)
    adam_steps = steps - natural
    params = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([params], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, adam_steps)
    for _ in range(adam_steps):
        value = problem.log_weights(x, params, _ADAM_DRAWS).mean(dim=0)
        (gradient,) = torch.autograd.grad(-value.sum(), params)
        # A row that strayed to where the density is no number stays where it is for this step.
        params.grad = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        optimizer.step()
        schedule.step()
    end = params.detach()
    if natural:
        improved = _natural_ascent(problem, x, end, natural)
        better = _clearly_better(problem, x, end, improved)
        end = torch.where(better[:, None], end, improved)
    gain, noise = _remaining_gain(problem, x, end)
    return end, gain, noise, torch.full((len(x),), steps, device=x.device)


def _gradients(problem: _Problem, x: Tensor, params: Tensor) -> Tensor:
    """Gradients of the local ELBO in λ, one per draw: ``(draws, batch, P)``.

    The score of q, whose mean is zero, is left out (Roeder et al. 2017), so that the noise
    vanishes with the gap.
    """
    draws = max(problem.num_draws, 8 * params.shape[1])
    copies = params.expand(draws, *params.shape).clone().requires_grad_(True)
    weights = problem.log_weights(x, copies, draws, still=True)
    (gradients,) = torch.autograd.grad(weights.sum(), copies)
    return torch.nan_to_num(gradients, nan=0.0, posinf=0.0, neginf=0.0)


def _natural_ascent(problem: _Problem, x: Tensor, params: Tensor, steps: int) -> Tensor:
    """Natural-gradient steps, each kept by a row only if its ELBO on common draws allows it."""
    reach = params.new_ones(len(params))
    path = []
    for t in range(steps):
        gradient = _gradients(problem, x, params).mean(dim=0)
        step = _solve(_fisher(problem, params), gradient)
        # At most 1 in the Fisher metric, half a nat between the two distributions, and at most 2
        # in any parameter, where the Fisher matrix knows little of it.
        length = (gradient * step).sum(dim=-1).clamp(min=0.0).sqrt()
        longest = torch.maximum(length, 0.5 * step.abs().amax(dim=-1)).clamp(min=1e-30)
        rate = min(0.8, 8.0 / (t + 1)) * reach * longest.reciprocal().clamp(max=1.0)
        proposal = params + rate[:, None] * step
        change = _difference(problem, x, proposal, params, problem.num_draws).mean(dim=0)
        kept = change > -_TOLERATED_LOSS
        params = torch.where(kept[:, None], proposal, params)
        reach = torch.where(kept, 2 * reach, 0.25 * reach).clamp(max=1.0)
        path.append(params)
    # The mean of the later half of the path has less of the draws' noise than its end, but in a
    # row that arrived late it is behind.
    mean = torch.stack(path[len(path) // 2 :]).mean(dim=0)
    ahead = _difference(problem, x, params, mean, 4 * problem.num_draws).mean(dim=0) > 0
    return torch.where(ahead[:, None], params, mean)


def _solve(matrix: Tensor, vector: Tensor) -> Tensor:
    """The solution per row, zero where the matrix is singular or no number."""
    solution, _ = torch.linalg.solve_ex(matrix, vector)
    return torch.nan_to_num(solution, nan=0.0, posinf=0.0, neginf=0.0)


def _remaining_gain(problem: _Problem, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    r"""What one natural-gradient step still promises, :math:`\frac12 g^\top F^{-1} g`, per row.

    The second figure is what the first would be at the optimum, from Monte Carlo noise alone.
    """
    passes = [_gradients(problem, x, params) for _ in range(_CHECK_PASSES)]
    gradients = torch.cat(passes)
    draws, mean = len(gradients), gradients.mean(dim=0)
    variance = gradients.var(dim=0) / draws
    if params.shape[1] > _MOST_FISHER:
        scale = _scores(problem, params).square().mean(dim=0).clamp(min=1e-12)
        return 0.5 * (mean**2 / scale).sum(-1), 0.5 * (variance / scale).sum(-1)
    fisher = _fisher(problem, params)
    centred = gradients - mean
    covariance = torch.einsum("snp,snq->npq", centred, centred) / (draws * (draws - 1))
    gain = 0.5 * (mean * torch.linalg.solve_ex(fisher, mean)[0]).sum(dim=-1)
    solved = torch.linalg.solve_ex(fisher, covariance)[0]
    noise = 0.5 * solved.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    # Where there is no figure, nothing is promised to be near the optimum.
    return torch.nan_to_num(gain, nan=torch.inf), torch.nan_to_num(noise, nan=torch.inf)


def _scores(problem: _Problem, params: Tensor) -> Tensor:
    """Scores ∇ log q(z; λ) at draws of q, ``(draws, batch, P)``."""
    draws = max(problem.num_draws, 8 * params.shape[1])
    copies = params.expand(draws, *params.shape).clone().requires_grad_(True)
    total, at = torch.zeros(()), 0
    for family in problem.families.values():
        member = family.distribution(copies[..., at : at + family.num_params])
        total = total + member.log_prob(member.sample())
        at += family.num_params
    (scores,) = torch.autograd.grad(total.sum(), copies)
    return scores


def _fisher(problem: _Problem, params: Tensor) -> Tensor:
    """Fisher information of λ, ``(batch, P, P)``, the second moment of the score."""
    scores = _scores(problem, params)
    fisher = torch.einsum("snp,snq->npq", scores, scores) / len(scores)
    ridge = 1e-6 * fisher.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None] + 1e-12
    return fisher + ridge * torch.eye(params.shape[1]).to(fisher)
