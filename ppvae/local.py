r"""The per-datapoint engine: the best member of a family for each datum, all rows at once.

Three methods share one interface. Where every latent site has a Gaussian family, also behind a
fixed bijection, natural-gradient steps with quasi-Monte Carlo draws find the optimum in tens of
evaluations (`ppvae.natural`); discrete latents take coordinate ascent, exact where their values can
be listed (`ppvae.coordinate`); other families take Adam with a cosine schedule and natural-gradient
steps with an estimated Fisher matrix (`ppvae.fisher`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ppvae.configurations import configurations
from ppvae.coordinate import (
    Ends,
    all_discrete,
    bases_of,
    clamped_site,
    combine_classes,
    coordinate_ascent,
    held,
    split_classes,
    value_at,
)
from ppvae.density import (
    Held,
    ModelSites,
    Program,
    check_count,
    joint,
    judging,
    read_model,
    row_chunks,
    weighed,
)
from ppvae.families import (
    DiscreteFamily,
    Family,
    Gamma,
    GaussianFamily,
    LogNormal,
    TruncatedNormal,
    Weibull,
    held_fixed,
    in_order,
    same_family,
    split_sites,
)
from ppvae.fisher import LocalElbo, Table, adaptive_ascent, tabulated_ascent
from ppvae.guides import PerDatapoint, per_datapoint
from ppvae.isolation import check_rows, forked_rng, seconds_now, unvalidated
from ppvae.markup import Cell, TextTable, card
from ppvae.natural import Climb, GaussianElbo, best_of_draws, natural_ascent, other_modes
from ppvae.progress import progress_bar


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
        grad_snr: ``(batch,)``: signal-to-noise ratio of the natural gradient at the end; about 1
            where it is noise alone, NaN where the method has no Monte Carlo noise (one or two
            latent dimensions).
        restart_gain: ``(batch,)``: nats that the other starts brought beyond the first, zero
            where they ended no higher than its own noise.
        steps: ``(batch,)``: evaluations of the model's gradient, over all starts; of discrete
            latents, sweeps over their elements.
        start: ``(batch,)``: which start won, 0 for ``init``'s output, 1 for the cold start, 2
            for a narrow one at the best of some draws; of discrete latents whose values can be
            listed 2 for the posterior's marginals, 3 and on for its likeliest values.
        seconds: Wall time of the fit, without the draws for ``elbo``.
        status: What happened, in words.
    """

    guide: PerDatapoint
    elbo: Tensor
    elbo_stderr: Tensor
    converged: Tensor
    predicted_gain: Tensor
    grad_snr: Tensor
    restart_gain: Tensor
    steps: Tensor
    start: Tensor
    seconds: float
    status: str

    def __repr__(self) -> str:
        return (
            f"LocalFit({self.guide!r}, elbo={float(self.elbo.mean()):.4f} nats a datum, "
            f"{self.status})"
        )

    def _repr_html_(self) -> str:
        rows, steps = len(self.elbo), self.steps
        error = float(self.elbo_stderr.square().sum()) ** 0.5 / rows
        header = ("rows", "converged", "mean ELBO ± error", "steps of a row", "seconds")
        row = (
            f"{rows:,}",
            f"{int(self.converged.sum()):,}",
            Cell(f"{float(self.elbo.mean()):.4f} ± {error:.4f}", "nats a datum"),
            f"{int(steps.min())} to {int(steps.max())}",
            f"{self.seconds:.1f}",
        )
        title = f"q* for each datum, {', '.join(map(repr, self.guide.families.values()))}"
        return card(title, [self.status], TextTable(header, [row]))


def fit_per_datapoint(
    model: Program,
    family: Family | Mapping[str, Family] | None,
    x: Tensor,
    *,
    init: Program | Sequence[Program] | None = None,
    max_steps: int | None = None,
    num_draws: int = 64,
    num_samples: int = 1000,
    tolerance: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> LocalFit:
    r"""Find :math:`q^*_n = \arg\max_{q \in Q} L_n[q]` for each row, the model held fixed.

    All rows are fitted in one batch (in chunks, so that memory stays bounded), each with a trust
    region and a stop of its own. With Gaussian families a row makes one climb, from the output of
    ``init`` or else cold, at λ = 0. Single points then look for other modes: the cold start, and
    the best of 64 standard normal draws, go up log p(x, u) from where they are. A row of which one
    arrives elsewhere climbs from there too, narrow, and cold, and so does a row that has not
    arrived. With other families each row starts cold, and with ``init`` also at that guide's
    output. The best end is kept. Of a posterior with several modes it is the best optimum that was
    found.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        family: The variational family, or one per latent site by name; `None` takes them from
            ``init``. The weights of a `Flow` are held fixed, as a copy.
        x: Rows, ``(batch, *event)``.
        init: A guide to start from, or several: each row starts at the best of their outputs.
            Their families must be ``family``, where both are given.
        max_steps: Most evaluations per row and start: by default 60 for Gaussian families,
            260 for others, and 200 sweeps for discrete ones.
        num_draws: Draws per row and evaluation with Gaussian families, others take twice as many;
            raised where a latent's dimension needs more.
        num_samples: Fresh draws for the reported ELBO.
        tolerance: A row has converged when it has less than this to gain, in nats.
        seed: Seed of all draws; the caller's generators are left as they were.
        progress: Whether to show a progress bar, on a terminal or in a notebook.
            It says how many rows are done and, with ``init``, what they gained on it: their mean
            amortization gap so far.

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
    inits = [] if init is None else list(init) if isinstance(init, Sequence) else [init]
    check_rows(x, model, *inits)
    for name, value, least in (("num_draws", num_draws, 8), ("num_samples", num_samples, 2)):
        check_count(name, value, least)
    if max_steps is not None:
        check_count("max_steps", max_steps)
    began = seconds_now(x.device)
    if not inits and family is None:
        raise ValueError("Give a family, or init (a guide whose family is taken), or both.")
    freed = [per_datapoint(guide, x, model=model) for guide in inits]
    with judging(seed, x, model):
        with torch.no_grad():
            sites = read_model(model, x)
        families = _families(family, freed, sites)
        cold = torch.zeros(len(x), sum(f.num_params for f in families.values())).to(x)
        guide = PerDatapoint(families, len(x), plate=sites.plate).to(x)
        warm = [flat_params(guide, families) for guide in freed]
        size = sum(f.size for f in families.values())
        gaussian = all(isinstance(f, GaussianFamily) for f in families.values())
        wanted = num_draws if gaussian else 2 * num_draws
        elbo = LocalElbo(model, families, _enough_draws(wanted, size), len(x))
        parts = []
        gap = _GapSoFar(elbo)
        with (
            progress_bar(len(x), "q*", "row", shown=progress) as bar,
            unvalidated(),  # A row that strays must not stop the others.
        ):
            small = gaussian or _is_scalar(families)
            for rows in row_chunks(x, min(size, _MOST_AT_ONCE) if small else elbo.num_draws):
                begins = [start[rows] for start in warm]
                if not all_discrete(families):  # Where sweeps cost little, each start has its own.
                    begins = _best(elbo, x[rows], begins)
                starts = [*begins, cold[rows]]
                *end, winner, gained = _fit_rows(elbo, sites, x[rows], starts, max_steps, tolerance)
                parts.append((*end, (winner - len(begins) + 1).clamp(min=0), gained))
                if bar.drawn and warm:
                    gap.add(x[rows], end[0], warm[0][rows])
                bar.advance(len(x[rows]), gap.__str__)
        params, gain, noise, steps, start, restart = (
            torch.cat(column) for column in zip(*parts, strict=True)
        )
        fill_tables(guide, params)
    seconds = seconds_now(x.device) - began - gap.seconds
    with judging(seed + 1, x, model, guide), torch.no_grad():
        weights = torch.cat(list(weighed(model, guide, x, num_samples)))
    snr = torch.where(noise > 0, (gain / noise).sqrt(), torch.nan)
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
        grad_snr=snr,
        restart_gain=restart,
        steps=steps,
        start=start,
        seconds=seconds,
        status=_status(converged),
    )


class _GapSoFar:
    """The mean amortization gap of the rows that are done, for somebody who looks on.

    Its draws and its seconds are no part of the fit.
    """

    def __init__(self, elbo: LocalElbo) -> None:
        self.elbo, self.total, self.count, self.seconds = elbo, 0.0, 0, 0.0

    def add(self, x: Tensor, best: Tensor, start: Tensor) -> None:
        began = seconds_now(x.device)
        with forked_rng(0, x.device):
            for rows in row_chunks(x, _SHOWN_DRAWS):
                gap = self.elbo.difference(x[rows], best[rows], start[rows], _SHOWN_DRAWS)
                self.total += float(gap.mean(dim=0).sum())
        self.count += len(x)
        self.seconds += seconds_now(x.device) - began

    def __str__(self) -> str:
        return f"amortization gap {self.total / self.count:.3f} nats" if self.count else ""


def _status(converged: Tensor) -> str:
    done, count = int(converged.sum()), len(converged)
    if done == count:
        return f"all {count} rows converged"
    return f"{count - done} of {count} rows did not converge: raise max_steps or num_draws"


def _families(
    family: Family | Mapping[str, Family] | None, freed: Sequence[PerDatapoint], sites: ModelSites
) -> dict[str, Family]:
    """The family of each of the model's latent sites, in an order in which they can be drawn."""
    given = dict(freed[0].families) if family is None else by_site(family, sites)
    if set(given) != set(sites.latents):
        raise ValueError(
            f"Expected families for the latent sites {list(sites.latents)}; got {list(given)}."
        )
    for name, site in sites.latents.items():
        given[name].check_site(site)
        for started in [guide.families[name] for guide in freed]:
            if not same_family(started, given[name]):
                raise ValueError(
                    f"Site {name!r}: init is of family {started!r} but family is {given[name]!r}; "
                    f"a start has to be of the family that is fitted. Leave init out for a cold "
                    f"start."
                )
    return {name: held_fixed(each) for name, each in in_order(given, sites.latents).items()}


def by_site(family: Family | Mapping[str, Family], sites: ModelSites) -> dict[str, Family]:
    """Families by latent site, where one may be given for a model with one site.

    Raises:
        ValueError: If one family is given for several sites.
    """
    if isinstance(family, Family):
        if len(sites.latents) > 1:
            raise ValueError(
                f"The model has latent sites {list(sites.latents)}: give a family for each, as a "
                f"dict by site name."
            )
        return dict.fromkeys(sites.latents, family)
    return dict(family)


def flat_params(guide: PerDatapoint, order: Iterable[str]) -> Tensor:
    """λ of all sites in a row; the guide's own order may differ from the model's."""
    return torch.cat([guide.table(name).weight.detach() for name in order], dim=-1)


def fill_tables(guide: PerDatapoint, params: Tensor) -> None:
    """Put λ of all sites, in the guide's order, into its tables: the inverse of `flat_params`."""
    at = 0
    for name, family in guide.families.items():
        part = params[:, at : at + family.num_params].clone()
        guide.table(name).weight = nn.Parameter(part)
        at += family.num_params


def _best(elbo: LocalElbo, x: Tensor, starts: list[Tensor]) -> list[Tensor]:
    """The best of several starts for each row, if there is any."""
    if not starts:
        return []
    best = starts[0].clone()
    for other in starts[1:]:
        for rows in row_chunks(x, elbo.num_draws):
            better = elbo.gain_over(x[rows], other[rows], best[rows]) > 0
            best[rows] = torch.where(better[:, None], other[rows], best[rows])
    return [best]


def _enough_draws(wanted: int, size: int) -> int:
    # Whitened pairs need three times as many draws as dimensions, and Sobol points come in powers
    # of 2. In few dimensions further draws are cheap, and skewed families need them.
    return int(2 ** math.ceil(math.log2(max(wanted, 3 * size, 512 // size))))


_GAUSSIAN_STEPS = 60
# Scalar latents of other families: nodes, the nats below the peak that count for nothing, and how
# far the nodes may reach in units of a Gaussian's scale.
_TABLE, _NEGLIGIBLE = 65, 25.0
_EXTENTS = (3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 13.0, 17.0, 22.0, 30.0)
# Gaussians have chunks of their own for the draws: what all rows keep grows with the latent's size.
_MOST_AT_ONCE = 32
# A narrow start has this scale, or half of the first fit's where that is less.
_NARROW = 0.3
# Evaluations on common draws that compare two ends.
_COMPARED = 4
# Draws for the gap that a progress bar shows.
_SHOWN_DRAWS = 16
# Values of discrete sites that each have a fit of the other sites, and the log odds of the best in
# the start that is made of them.
_MOST_HELD, _NEAR_ONE_VALUE = 32, 5.0


def _fit_rows(
    elbo: LocalElbo,
    sites: ModelSites,
    x: Tensor,
    starts: list[Tensor],
    max_steps: int | None,
    tolerance: float,
) -> Ends:
    """The best end for a chunk of rows: (params, gain, noise, steps, start, restart gain)."""
    clamped = clamped_site(elbo.families)
    if all_discrete(elbo.families):
        with torch.no_grad():
            return coordinate_ascent(
                elbo.model, elbo.families, sites, x, starts, max_steps, tolerance, elbo.num_draws
            )
    if clamped is not None:
        return _fit_by_class(elbo, sites, clamped, x, starts, max_steps, tolerance)
    if all(isinstance(f, GaussianFamily) for f in elbo.families.values()):
        return _fit_gaussians(elbo, x, starts, max_steps or _GAUSSIAN_STEPS, tolerance)
    if _is_scalar(elbo.families):
        return _fit_scalars(elbo, sites, x, starts, max_steps, tolerance)
    return _fit_any(elbo, sites, x, starts, max_steps, tolerance)


def _fit_any(
    elbo: LocalElbo,
    sites: ModelSites,
    x: Tensor,
    starts: list[Tensor],
    max_steps: int | None,
    tolerance: float,
) -> Ends:
    """Adam and natural-gradient steps with an estimated Fisher matrix, from each start."""
    starts = [*starts, *_starts_by_value(elbo, sites, x, starts, max_steps, tolerance)]
    ends = [adaptive_ascent(elbo, x, start, max_steps, tolerance) for start in starts]
    params, gain, noise, steps = ends[0]
    winner = torch.zeros(len(x), dtype=torch.long, device=x.device)
    restart = torch.zeros_like(gain)
    for index, other in enumerate(ends[1:], start=1):
        more = elbo.gain_over(x, other[0], params)
        better = more > 0
        params = torch.where(better[:, None], other[0], params)
        gain = torch.where(better, other[1], gain)
        noise = torch.where(better, other[2], noise)
        winner = torch.where(better, index, winner)
        restart = restart + more
        steps = steps + other[3]
    # A row that the fit made worse, as a bad chunk of draws may, goes back to where it began.
    # Of thousands of rows, some exceed two or three errors by chance.
    lost = elbo.gain_over(x, starts[0], params, sigmas=4.0)
    params = torch.where((lost > 0)[:, None], starts[0], params)
    gain = torch.where(lost > tolerance, torch.inf, gain)
    return params, gain, noise, steps, winner, restart


def _is_scalar(families: Mapping[str, Family]) -> bool:
    """Whether there is one latent element, positive, of a family with smooth derivatives in λ."""
    family = next(iter(families.values()))
    return (
        len(families) == 1
        and family.size == 1
        and isinstance(family, (Gamma, TruncatedNormal, Weibull))
    )


def _fit_scalars(
    elbo: LocalElbo,
    sites: ModelSites,
    x: Tensor,
    starts: list[Tensor],
    max_steps: int | None,
    tolerance: float,
) -> Ends:
    """Newton's method over nodes that cover the posterior, where they are shown to be enough.

    A Gaussian on the line that the support maps to says where the posterior lies. Rows whose q is
    not all on the nodes, or whose value changes when every second node is left out, go the general
    way.
    """
    table = _tabulated(elbo, x, tolerance)
    most = max_steps or _GAUSSIAN_STEPS
    ends = [tabulated_ascent(table, start, most, tolerance) for start in starts]
    params, value, gain, steps = ends[0]
    first = value
    winner = torch.zeros_like(steps)
    for index, end in enumerate(ends[1:], start=1):
        better = (end[1] > value + 1e-2 * tolerance) | ~torch.isfinite(value + gain)
        params = torch.where(better[:, None], end[0], params)
        value, gain = torch.where(better, end[1], value), torch.where(better, end[2], gain)
        winner, steps = torch.where(better, index, winner), steps + end[3]
    restart = torch.where(winner > 0, value - first, 0.0)
    with torch.no_grad():
        value, mass = table.value(params)
        coarse, _ = table.coarse().value(params)
    # Of an analytic integrand the trapezoidal rule's error is about squared with twice the nodes.
    sure = (value - coarse).square() < 0.02 * tolerance
    sure &= (mass - 1).abs() < 0.1 * tolerance
    noise = torch.zeros_like(gain)
    columns = [params, gain, noise, steps, winner, restart]
    unsure = torch.nonzero(~(sure & (gain <= tolerance))).flatten()
    if len(unsure):
        for part in row_chunks(unsure, elbo.num_draws):
            rows = unsure[part]
            own = [start[rows] for start in starts]
            other = _fit_any(elbo, sites, x[rows], own, max_steps, tolerance)
            for column, new in zip(columns, other, strict=True):
                column[rows] = new.to(column)
    return columns[0], columns[1], columns[2], columns[3], columns[4], columns[5]


def _tabulated(elbo: LocalElbo, x: Tensor, tolerance: float) -> Table:
    """log p(x, z) on nodes over the posterior of one latent element."""
    name, family = next(iter(elbo.families.items()))
    surrogate = LogNormal(family.latent_dim)
    families: dict[str, Family] = {name: surrogate}
    cold = x.new_zeros(len(x), surrogate.num_params)
    normal = LocalElbo(elbo.model, families, elbo.num_draws)
    params = _fit_gaussians(normal, x, [cold], _GAUSSIAN_STEPS, tolerance)[0]
    local = GaussianElbo(elbo.model, families, params)
    loc, tril = local.gaussian(params)
    scale = tril[:, 0]
    with torch.no_grad():
        offsets = torch.tensor(_EXTENTS).to(x)[:, None, None]
        peak = local.log_density(x, loc[None])
        ends = []
        for sign in (-1.0, 1.0):
            low = local.log_density(x, loc + sign * scale * offsets) < peak - _NEGLIGIBLE
            # The first offset from which on the density stays low, or the last one.
            within = (~low).flip(0).cumsum(0).flip(0) > 0
            index = within.sum(dim=0).clamp(max=len(_EXTENTS) - 1)
            ends.append(loc + sign * scale * offsets[index, 0])
        share = torch.linspace(0.0, 1.0, _TABLE).to(x)[:, None, None]
        u = ends[0] + share * (ends[1] - ends[0])
        z, jacobian = surrogate.from_normal(u)
        log_p = joint(elbo.model, x, {name: z})
        volume = jacobian + torch.log(ends[1] - ends[0])[:, 0] - math.log(_TABLE - 1)
    return Table(family, z, volume, torch.nan_to_num(log_p, nan=-torch.inf, neginf=-1e30))


def _fit_gaussians(
    elbo: LocalElbo, x: Tensor, starts: list[Tensor], max_steps: int, tolerance: float
) -> Ends:
    """One climb for each row, and others where a look at single points finds other modes."""
    local = elbo.gaussian(starts[0])

    def climb(rows: Tensor, loc: Tensor, tril: Tensor) -> Climb:
        return natural_ascent(local, x[rows], loc, tril, elbo.num_draws, max_steps, tolerance)

    everything = torch.arange(len(x), device=x.device)
    begins = [local.gaussian(start) for start in starts]
    first = climb(everything, *begins[0])
    # A row that the fit made worse, as bad draws may, goes back to where it began.
    lost = first.lost
    loc = torch.where(lost[:, None], begins[0][0], first.loc)
    tril = torch.where(lost[:, None, None], begins[0][1], first.tril)
    gain = torch.where(lost, torch.inf, first.gain)
    noise, steps = first.noise, first.steps
    winner, restart = torch.zeros_like(steps), torch.zeros_like(gain)
    points = torch.stack([*(other for other, _ in begins[1:]), best_of_draws(local, x)])
    elsewhere, modes = other_modes(local, x, first, points)
    open_ = elsewhere.any(dim=0) | ~torch.isfinite(gain) | (gain - noise > tolerance + 4 * noise)
    rows = torch.nonzero(open_).flatten()
    if len(rows):
        # The last start is narrow, at the mode that was found from the best draw, or another one.
        which = elsewhere.long().cumsum(dim=0).argmax(dim=0)
        scale = tril[rows].diagonal(dim1=-2, dim2=-1)
        scale = torch.nan_to_num(0.5 * scale, nan=_NARROW).clamp(max=_NARROW)
        narrow = torch.nan_to_num(modes[which, everything])[rows], torch.diag_embed(scale)
        others = [(other[rows], root[rows]) for other, root in begins[1:]]
        for index, begin in enumerate([*others, narrow], start=1):
            end = climb(rows, *begin)
            more = _gain_over(local, x[rows], (end.loc, end.tril), (loc[rows], tril[rows]), elbo)
            better = more > 0
            taken = rows[better]
            loc[taken], tril[taken] = end.loc[better], end.tril[better]
            gain[taken], noise[taken] = end.gain[better], end.noise[better]
            winner[taken] = index
            restart[rows] += more
            steps[rows] += end.steps
    return local.params(loc, tril), gain, noise, steps, winner, restart


def _gain_over(
    local: GaussianElbo,
    x: Tensor,
    one: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    elbo: LocalElbo,
) -> Tensor:
    """As `LocalElbo.gain_over`, by means and Cholesky factors."""
    differences = []
    for _ in range(_COMPARED):
        nodes = local.nodes(elbo.num_draws, x)
        ours, theirs = (local.values(x, *gaussian, nodes) for gaussian in (one, other))
        difference = torch.where(torch.isfinite(theirs), ours - theirs, torch.inf)
        differences.append(torch.where(torch.isfinite(ours), difference, -torch.inf))
    stacked = torch.stack(differences)
    mean, spread = stacked.mean(dim=0), stacked.std(dim=0)
    clearly = mean > 2 * spread / math.sqrt(_COMPARED) + 1e-6 * ours.abs()
    return torch.where(clearly | torch.isposinf(mean), mean, 0.0)


def _fit_by_class(
    elbo: LocalElbo,
    sites: ModelSites,
    site: str,
    x: Tensor,
    starts: list[Tensor],
    max_steps: int | None,
    tolerance: float,
) -> Ends:
    """Fit the other sites with ``site`` held at each of its values in turn."""
    bases = bases_of(elbo.families, site)
    by_class = zip(*(split_classes(elbo.families, site, start) for start in starts), strict=True)
    ends = []
    for label, own in enumerate(by_class):
        model = held(elbo.model, site, elbo.families, label, x)
        clamped = LocalElbo(model, bases, elbo.num_draws)
        ends.append(_fit_rows(clamped, sites, x, list(own), max_steps, tolerance))
    return combine_classes(elbo.model, site, elbo.families, x, ends, elbo.num_draws)


def _starts_by_value(
    elbo: LocalElbo,
    sites: ModelSites,
    x: Tensor,
    starts: list[Tensor],
    max_steps: int | None,
    tolerance: float,
) -> list[Tensor]:
    """A start at the best value of the discrete sites, with the other members that fit that value.

    With the other sites independent of them, each value has an optimum of its own, and ascent
    stays with the one that it meets first.
    """
    discrete = {n: f for n, f in elbo.families.items() if isinstance(f, DiscreteFamily)}
    others = {n: f for n, f in elbo.families.items() if n not in discrete}
    count = math.prod(f.num_classes**f.size for f in discrete.values())
    if not discrete or count > _MOST_HELD or any(f.given for f in others.values()):
        return []
    begins = []
    for start in starts:
        parts = split_sites(elbo.families, start)
        begins.append(torch.cat([parts[name] for name in others], dim=-1))
    table = configurations([sites.latents[name] for name in discrete], x)
    ends, values = [], []
    for index in range(count):
        model = Held(elbo.model, {name: value[index] for name, value in table.items()})
        fit = LocalElbo(model, others, elbo.num_draws)
        ends.append(_fit_rows(fit, sites, x, begins, max_steps, tolerance)[0])
        values.append(value_at(model, others, x, ends[-1], elbo.num_draws))
    best = torch.stack(values).argmax(dim=0)
    rows = torch.arange(len(x), device=x.device)
    chosen = split_sites(others, torch.stack(ends)[best, rows])
    for name, family in discrete.items():
        member = table[name][best].reshape(len(x), family.size).long()
        classes = torch.nn.functional.one_hot(member, family.num_classes).to(x)
        chosen[name] = family.from_log_probs((_NEAR_ONE_VALUE * classes).log_softmax(dim=-1))
    return [torch.cat([chosen[name] for name in elbo.families], dim=-1)]
