"""Evidence to a wanted error, each row by the method that it takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppvae.annealing import MOST_SPREAD, AnnealedEstimate, annealed
from ppvae.configurations import MOST_CONFIGURATIONS, num_configurations
from ppvae.density import ModelSites, Program, check_pair, judging, read_model, row_chunks
from ppvae.diagnostics import FLAT, effective_sample_size, pareto_k
from ppvae.evidence import Estimate, enumeration, exact_evidence, mixture_of, quadrature
from ppvae.isolation import check_rows, unvalidated
from ppvae.progress import Bar, progress_bar
from ppvae.proposals import Prior, Proposal, mixture_weights, proposal_of

# Draws of all proposals together that tell how many a row needs, and the spare that they leave;
# more of it for what 16 chains tell of their own spread.
_PILOT_DRAWS, _SPARE, _CHAINS_SPARE = 2000, 1.5, 2.0
# Below it the variance of the weights is finite, and so their standard error can be believed.
_SURE_K = 0.5
# Two levels of an integral that are farther apart than this, in nats, may both be far off.
_AGREED = 0.01
# Above it a few draws or chains have all the weight. With one alone the error is 1, whatever the
# figure is short of.
_VAGUE = 0.5
# Chains, temperatures of a first short run, and leapfrog steps of annealing, and how many
# evaluations a gradient costs; with one more temperature for all chains it comes to `_EACH`.
_CHAINS, _LEAST_STEPS, _LEAPFROGS, _GRADIENT = 16, 20, 5, 3
_EACH = _CHAINS * _LEAPFROGS * _GRADIENT


@dataclass(frozen=True, repr=False)
class PooledEstimate(Estimate):
    """A figure per datum, each by the method that it took.

    Attributes:
        methods: By row, ``"exact"``, ``"enumeration"``, ``"quadrature"``, ``"iwae"`` or ``"ais"``.
        reached: Whether the standard error is what was asked for, and to be believed: at most half
            a nat, no smaller than what the dtype rounds, and of importance weights with a k-hat
            below a half, or, for models with discrete latents, with an effective sample size of
            0.9 of the draws; ``(batch,)``.
        pareto_k: k-hat of the row's pilot draws; NaN where none were drawn; ``(batch,)``.
        evaluations: Evaluations of the joint density that the row took, a gradient counted as
            three, without those of the pilot run of `ais`; ``(batch,)``.
        status: In words, what was not reached, and the way out.
    """

    methods: tuple[str, ...]
    reached: Tensor
    pareto_k: Tensor
    evaluations: Tensor
    status: str

    def __repr__(self) -> str:
        counts = ", ".join(f"{n} by {name}" for name, n in Counter(self.methods).items())
        return f"{super().__repr__()[:-1]}; {counts}; {self.status})"


def log_evidence(
    model: Program,
    guides: Program | Sequence[Program] | Mapping[str, Program] | None,
    x: Tensor,
    *,
    target_stderr: float = 0.01,
    budget: int = 100_000,
    seed: int = 0,
    progress: bool = True,
) -> PooledEstimate:
    r"""log p(x) per datum to a wanted standard error, by whatever takes least.

    In this order, each for the rows that are left:

    1. the model's own ``log_evidence(x)``, where it has one;
    2. enumeration, where all latents are discrete and have few values;
    3. quadrature, where there are at most two continuous latent elements; a figure that misses the
       target is kept where what follows has a larger standard error;
    4. importance weighting with the mixture of all guides as proposal, where a pilot's k-hat is
       below a half, so that the weights have a variance, and the draws that the wanted error takes
       are within the budget;
    5. annealed importance sampling from the guide that did best in the pilot, with as many
       temperatures as the wanted error takes, or as the budget allows;
    6. for models with discrete latents, which have no gradient, importance weighting with what the
       budget allows.

    Guides are pooled, never compared: draws come from each, and every weight is taken against the
    mixture of all, :math:`\log \frac1{KS} \sum_{ks} p(x, z_{ks}) / \frac1K \sum_j q_j(z_{ks})`,
    which is unbiased for p(x). A maximum over estimates is not: it picks the luckiest. Pilot draws
    say how much work a row takes and are then thrown away: stopping when the error looks small
    would prefer rows whose large weights have not come up yet.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guides: A Pyro guide with the same latent sites, or several, whose densities are known
            everywhere. `None` for the prior alone.
        x: Rows, ``(batch, *event)``.
        target_stderr: Wanted standard error for each row, in nats.
        budget: Most evaluations of the joint density for a row, without those of pilot runs; a
            gradient counts as three. A row that takes more gets what the budget allows.
        seed: Seed of the draws; the caller's generators are left as they were.
        progress: Whether to show a progress bar, on a terminal or in a notebook.
            It counts the rows whose figure is final.

    Returns:
        The figures, with the method, the evaluations and whether the error was reached for each
        row. Sampled figures are lower bounds in expectation.

    Raises:
        ValueError: If there is no guide in a list, a density is not known, a number is out of its
            range, or the rows, the model or a guide are unfit.

    Source: Veach & Guibas (1995), section 3.2, for the mixture; Neal (2001) for annealing.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> _ = torch.manual_seed(1)
        >>> model, guide = pairs.vae(x_dim=16, z_dim=4, hidden=[8])
        >>> found = log_evidence(model, guide, torch.zeros(3, 16), target_stderr=0.05)
        >>> found.methods, bool(found.reached.all())
        (('iwae', 'iwae', 'iwae'), True)
    """
    if not target_stderr > 0:
        raise ValueError(f"target_stderr must be positive, in nats; got {target_stderr}.")
    least = 2 * _EACH * _LEAST_STEPS
    if budget < least:
        raise ValueError(f"budget must be at least {least:,} evaluations for a row; got {budget}.")
    programs = _listed(guides)
    check_rows(x, model, *programs)
    ledger = _Rows(x)
    with (
        progress_bar(len(x), "log p(x)", "row", shown=progress) as bar,
        judging(seed, x, model, *programs),
        torch.no_grad(),
    ):
        sites = read_model(model, x)
        for guide in programs:
            check_pair(model, guide, x)
        left = _without_draws(model, sites, x, target_stderr, ledger)
        bar.advance(len(x) - len(left))
        if len(left):
            with unvalidated():
                proposals: list[Proposal] = [
                    proposal_of(model, guide, x, sites) for guide in programs
                ] or [Prior(model)]
                left, best = _weighted(
                    proposals, sites, x, left, target_stderr, budget, ledger, bar
                )
            for which, start in enumerate(proposals):
                rows = left[best == which]
                if len(rows):
                    _annealed(start, x, rows, target_stderr, budget, ledger, bar)
    return ledger.result(target_stderr)


def _listed(
    guides: Program | Sequence[Program] | Mapping[str, Program] | None,
) -> list[Program]:
    if guides is None:
        return []
    if isinstance(guides, Mapping):
        guides = list(guides.values())
    elif callable(guides):
        return [guides]
    if not guides:
        raise ValueError("guides: expected at least one guide, or None for the prior; got none.")
    return list(guides)


class _Rows:
    """What is known of each row until now."""

    def __init__(self, x: Tensor) -> None:
        self.value = x.new_full((len(x),), torch.nan)
        self.stderr = torch.full_like(self.value, torch.inf)
        self.k = torch.full_like(self.value, torch.nan)
        self.evaluations = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.methods = [""] * len(x)
        self.trusted = torch.ones(len(x), dtype=torch.bool, device=x.device)
        self.scattered = torch.zeros_like(self.trusted)

    def put(self, rows: Tensor, found: Estimate, method: str, evaluations: int = 0) -> None:
        """Enter figures."""
        self.value[rows] = found.value.to(self.value)
        self.stderr[rows] = found.stderr.to(self.stderr)
        self.evaluations[rows] += evaluations
        for row in rows.tolist():
            self.methods[row] = method

    def result(self, target: float) -> PooledEstimate:
        """All of it, in words too."""
        exact = all(m in ("exact", "enumeration", "quadrature") for m in self.methods)
        close = self.stderr <= target
        vague = self.stderr > _VAGUE
        rounded = torch.finfo(self.value.dtype).eps * self.value.abs() > target
        reached = close & self.trusted & ~self.scattered & ~vague & ~rounded
        words = []
        if not bool(close.all()):
            words.append(
                f"{_rows_have(~close)} a standard error above {target:g} nats: raise "
                f"budget or target_stderr, or give a guide that is nearer to the posterior"
            )
        if not bool(self.trusted.all()):
            words.append(
                f"{_rows_have(~self.trusted)} a k-hat that speaks against their "
                f"standard error: give a guide with wider tails"
            )
        if bool(self.scattered.any()):
            words.append(
                f"{_rows_have(self.scattered)} chains whose log weights spread by more than "
                f"{MOST_SPREAD:g} nat, so that the standard error is too small: raise budget"
            )
        if bool(vague.any()):
            words.append(
                f"{_rows_have(vague)} a standard error above {_VAGUE:g} nats, which is "
                f"itself too small: few draws have all the weight, and log p(x) may be far higher"
            )
        if bool(rounded.any()):
            words.append(
                f"{_rows_have(rounded)} a log p(x) that "
                f"{str(self.value.dtype).removeprefix('torch.')} rounds by more than {target:g} "
                f"nats: give model, guides and x in float64, or scale x"
            )
        distinct = set(self.methods)
        return PooledEstimate(
            value=self.value,
            stderr=self.stderr,
            bound="exact" if exact else "lower",
            method=distinct.pop() if len(distinct) == 1 else "pooled",
            methods=tuple(self.methods),
            reached=reached,
            pareto_k=self.k,
            evaluations=self.evaluations,
            status="; ".join(words) or f"every row within {target:g} nats",
        )


def _without_draws(
    model: Program, sites: ModelSites, x: Tensor, target: float, ledger: _Rows
) -> Tensor:
    """Rows for which a method without random numbers gave a figure are entered; the others left."""
    everything = torch.arange(len(x), device=x.device)
    exact = exact_evidence(model, x)
    if exact is not None:
        ledger.put(everything, exact, "exact", 0)
        return everything[:0]
    discrete = [site.is_discrete for site in sites.latents.values()]
    if all(discrete) and num_configurations(sites) <= MOST_CONFIGURATIONS:
        count = int(num_configurations(sites))
        ledger.put(everything, enumeration(model, x), "enumeration", count)
        return everything[:0]
    if any(discrete) or sites.size > 2:
        return everything
    found = quadrature(model, x, tolerance=min(1e-6, target), progress=False)
    # Annealing may come no closer to a row than the integral did.
    known = torch.isfinite(found.value) & (found.stderr <= max(target, _AGREED))
    ledger.put(everything[known], _some(found, known), "quadrature", 0)
    return everything[~(known & (found.stderr <= target))]


def _rows_have(which: Tensor) -> str:
    count = int(which.sum())
    return "1 row has" if count == 1 else f"{count} rows have"


def _some(found: Estimate, which: Tensor) -> Estimate:
    return Estimate(found.value[which], found.stderr[which], found.bound, found.method)


def _weighted(
    proposals: Sequence[Proposal],
    sites: ModelSites,
    x: Tensor,
    rows: Tensor,
    target: float,
    budget: int,
    ledger: _Rows,
    bar: Bar,
) -> tuple[Tensor, Tensor]:
    """Importance weighting where it does; gives the rows left, and the best proposal of each."""
    pilot = -(-_PILOT_DRAWS // len(proposals))
    parts = [
        mixture_weights([p.of_rows(rows[part]) for p in proposals], x[rows[part]], pilot)
        for part in row_chunks(x[rows], pilot)
    ]
    weights = torch.cat(parts, dim=-1)
    count, _, batch = weights.shape
    ledger.k[rows] = pareto_k(weights.reshape(-1, batch)).to(ledger.k)
    ledger.evaluations[rows] += count * pilot
    gradients = not any(site.is_discrete for site in sites.latents.values())
    reliable = ledger.k[rows] < _SURE_K
    if not gradients:
        # k-hat may take an interior maximum of the weights for a tail, and annealing is no way out.
        share = effective_sample_size(weights.reshape(-1, batch)) / (count * pilot)
        reliable |= share >= FLAT
    # Draws of each proposal for the wanted error: the delta method's variance is that of one
    # draw of each, over their number.
    single = mixture_of(weights).stderr.double().square() * pilot
    wanted = torch.nan_to_num(_SPARE * single / target**2, nan=torch.inf, posinf=torch.inf)
    most = budget // count
    here = reliable & (wanted <= most) if gradients else torch.ones_like(reliable)
    ledger.trusted[rows[here & ~reliable]] = False
    # A few sizes only: rows of one size share their evaluations.
    size = 2.0 ** torch.ceil(torch.log2(wanted.clamp(min=pilot)))
    size = torch.where(wanted > most / 2, float(most), size.clamp(max=float(most)))
    for draws in size[here].unique().tolist():
        chosen = rows[here & (size == draws)]
        for part in row_chunks(x[chosen], min(int(draws), 4 * pilot)):
            own = chosen[part]
            some = [p.of_rows(own) for p in proposals]
            found = mixture_of(mixture_weights(some, x[own], int(draws)))
            ledger.put(own, found, "iwae", count * int(draws))
            bar.advance(len(own))
    # The best start is the one whose own draws weigh most in the mean of the mixture's ELBO.
    best = weights.mean(dim=1).argmax(dim=0)
    return rows[~here], best[~here]


def _annealed(
    start: Proposal,
    x: Tensor,
    rows: Tensor,
    target: float,
    budget: int,
    ledger: _Rows,
    bar: Bar,
) -> None:
    """Annealing, with the temperatures that a short run asks for."""

    def run(chosen: Tensor, steps: int) -> AnnealedEstimate:
        ledger.evaluations[chosen] += _EACH * steps
        return annealed(
            start.of_rows(chosen),
            x[chosen],
            # Bounds of a support may be a row's own.
            read_model(start.model, x[chosen]),
            num_chains=_CHAINS,
            num_steps=steps,
            leapfrog_steps=_LEAPFROGS,
        )

    most = max(_LEAST_STEPS, budget // _EACH - _LEAST_STEPS)
    # The variance of a log weight falls as 1 / T. Their spread tells more of it than their mean
    # weight's error, which is too small where a few have nearly all of the weight.
    off = run(rows, _LEAST_STEPS).spread / (math.sqrt(_CHAINS) * target)
    wanted = _CHAINS_SPARE * _LEAST_STEPS * off.square()
    wanted = torch.nan_to_num(wanted, nan=float(most), posinf=float(most))
    size = 4.0 ** torch.ceil(torch.log2(wanted.clamp(min=_LEAST_STEPS)) / 2)
    size = size.clamp(max=float(most))
    for steps in size.unique().tolist():
        chosen = rows[size == steps]
        found = run(chosen, int(steps))
        closer = ~(found.stderr >= ledger.stderr[chosen])
        ledger.put(chosen[closer], _some(found, closer), "ais")
        ledger.scattered[chosen[closer]] = ~(found.spread[closer] <= MOST_SPREAD)
        bar.advance(len(chosen))
