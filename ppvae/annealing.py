r"""Annealed importance sampling: log p(x) per datum through a path of distributions.

From a start :math:`q_0`, the guide or the prior, chains move through

.. math:: \log f_t(z) = (1 - \beta_t) \log q_0(z \mid x) + \beta_t \log p(x, z),
          \qquad 0 = \beta_0 < \cdots < \beta_T = 1

by Hamiltonian Monte Carlo, and collect :math:`\log w = \sum_t (\beta_t - \beta_{t-1})
(\log p(x, z_{t-1}) - \log q_0(z_{t-1} \mid x))`, whose exponential is unbiased for p(x) (Neal
2001).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from ppvae.configurations import MOST_CONFIGURATIONS, num_configurations
from ppvae.density import (
    LatentSite,
    ModelSites,
    Program,
    bytes_of_largest,
    check_count,
    check_density,
    check_pair,
    chunk_bytes,
    draw_chunks,
    judging,
    read_model,
    support_name,
    to_unconstrained,
    weighed,
)
from ppvae.evidence import Estimate, enumeration, iwae_from
from ppvae.graphs import Repeated
from ppvae.isolation import check_rows, forked_rng
from ppvae.progress import Bar, progress_bar
from ppvae.proposals import Prior, Proposal, proposal_of
from ppvae.simulation import Simulated, simulate

Schedule = Callable[[int], Tensor]
"""From a number of steps T to β_0 = 0 < … < β_T = 1, ``(T + 1,)`` in float64."""

# Acceptance that step sizes are led to, in the middle of what is best for HMC in any dimension.
_ACCEPTANCE = 0.8
# The pilot: chains, moves before it sets off, and most steps as a share of those of the run, or at
# least; standard deviations of a log weight's increment that it goes at a time, and how many times
# farther at its last step.
_PILOT_CHAINS, _PILOT_WARMUP, _PILOT_SHARE, _PILOT_LEAST = 8, 20, 0.5, 100
_PILOT_STRIDE, _PILOT_GROWTH = 0.1, 16.0
# How fast the pilot's step sizes and running moments follow, and how many degrees of freedom the
# other rows' variances count for; the least standard deviation of a log ratio.
_PILOT_RATE, _PILOT_MEMORY, _PILOT_SHARED, _LEAST_SPREAD = 0.3, 0.2, 4.0, 1e-6
# Moves between two looks at the curvature; latent elements up to which it is a full matrix, and
# random directions that find the diagonal of larger ones; the distance of a difference, and the
# least curvature that is believed, in units of the start's scale.
_LOOKS, _FULL, _DIRECTIONS, _APART, _LEAST_CURVATURE = 8, 64, 8, 0.02, 0.1
# The roots of the curvature at all temperatures, in units of the largest tensor.
_COURSES = 8
_LEAST_STEP = 1e-5
# The longest way of a proposal, in standard deviations: a quarter of a turn leaves of a Gaussian's
# place nothing, and of its square nothing, which sets the log density; half a turn leaves all.
_TRAJECTORY = math.pi / 2
_FIRST_BETA = 1e-9
# Step sizes are spread by this much, lest a trajectory come back to where it began.
_JITTER = 0.2
# Draws of the start from which its scale is found.
_SCALE_DRAWS = 64
# Standard deviation of log weights, in nats, up to which a mean over 16 chains tells its own error.
MOST_SPREAD = 1.0
# Beyond this the exponential of an unconstrained value is no number in float32.
_FARTHEST = 85.0
# How near a value comes to itself on the way to the reals and back.
_ROUND_TRIP = 1e-5


def linear(num_steps: int) -> Tensor:
    r"""Temperatures at equal distances, :math:`\beta_t = t / T`.

    Example:
        >>> linear(4)
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    return torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)


def sigmoid(num_steps: int) -> Tensor:
    r"""Temperatures that lie closer at both ends.

    .. math:: \beta_t = \frac{\sigma(\delta (2t/T - 1)) - \sigma(-\delta)}
                             {\sigma(\delta) - \sigma(-\delta)}, \qquad \delta = 4

    Source: Wu et al. (2017), section 4.2, after Grosse, Ghahramani & Adams (2015).

    Example:
        >>> sigmoid(4)
        tensor([0.0000, 0.1050, 0.5000, 0.8950, 1.0000], dtype=torch.float64)
    """
    raw = torch.sigmoid(4.0 * (2 * linear(num_steps) - 1))
    return (raw - raw[0]) / (raw[-1] - raw[0])


@dataclass(frozen=True, repr=False)
class AnnealedEstimate(Estimate):
    """A figure per datum from annealed chains.

    Attributes:
        log_weights: ``(num_chains, batch)``, nats; of an upper bound those of reversed chains.
        acceptance: Share of proposals that were accepted, ``(batch,)``. Far below 0.8 the chains
            hardly move, and the bound is loose.
    """

    log_weights: Tensor
    acceptance: Tensor

    @property
    def spread(self) -> Tensor:
        """Standard deviation of the log weights over chains, nats, ``(batch,)``.

        Above 1 a few chains have nearly all the weight, and ``stderr`` is too small.
        """
        return self.log_weights.std(dim=0)

    def __repr__(self) -> str:
        wide = int((~(self.spread <= MOST_SPREAD)).sum())
        words = (
            f"; log weights of {wide} spread by more than {MOST_SPREAD:g} nat, so that their "
            f"errors are too small: raise num_steps"
        )
        return super().__repr__()[:-1] + (words if wide else "") + ")"


def ais(
    model: Program,
    guide: Program | None,
    x: Tensor,
    *,
    num_chains: int = 16,
    num_steps: int = 500,
    schedule: Schedule | None = None,
    leapfrog_steps: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> Estimate:
    r"""Evidence per datum by annealed importance sampling.

    .. math:: \log \hat p(x_n) = \log \frac1C \sum_c w_{cn}, \qquad
              \log w_{cn} = \sum_{t=1}^{T} (\beta_t - \beta_{t-1})
              \bigl(\log p(x_n, z_{t-1}) - \log q_0(z_{t-1} \mid x_n)\bigr)

    The mean weight is unbiased for p(x), so that its log is a lower bound in expectation; it rises
    to log p(x) as the steps T do, by about 1/T. The standard error speaks of the chains that were
    run: where all miss the same part of the posterior it is too small. Chains start at the guide or
    at the prior and move by Hamiltonian Monte Carlo over the unconstrained latents, all rows and
    chains at once.

    A pilot run of 8 chains finds for each row how large steps may be at each temperature, led to an
    acceptance of 0.8, how the density is curved there, and, unless a ``schedule`` is
    given, where temperatures are wanted: as many per unit of :math:`\int \mathrm{sd}_\beta(\log
    p(x, z) - \log q_0)\, d\beta` everywhere, which makes the bound tightest (Grosse, Maddison &
    Salakhutdinov 2013). The chains that are weighted only follow it: chains that adapted to their
    own past would not be unbiased any more. Costs ``num_chains * num_steps * leapfrog_steps``
    gradients of the log joint density per row. The pilot takes at most half as many temperatures,
    or 100, with a look at the curvature at every eighth: little beside 500 temperatures and few
    latents, up to as much as the run itself beside 100 and dozens of them.

    Where a guide rules out a part of the posterior, the figure is the evidence of the rest, and
    still a lower bound; draws of a guide outside of the prior's support have weight 0.

    Discrete latents have no gradient: a model with few values of them is enumerated, and any other
    is weighted by importance with ``num_chains * num_steps`` draws of the guide or the prior. The
    result's ``method`` says so.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guide: Where chains start: a Pyro guide with the same latent sites, called as
            ``guide(x)``, whose density is known everywhere. `None` for the prior.
        x: Rows, ``(batch, *event)``.
        num_chains: Chains per row, at least 2.
        num_steps: Temperatures T after the first, at least 2.
        schedule: Their places: `sigmoid` or `linear` of ``ppvae.annealing``, or any function of T;
            `None` for those that the pilot run finds, each row's own.
        leapfrog_steps: Leapfrog steps of a proposal.
        seed: Seed of the chains; the caller's generators are left as they were.
        progress: Whether to show a progress bar, on a terminal or in a notebook.

    Returns:
        The bound, an `AnnealedEstimate`, with the standard error of the log mean weight over
        chains (delta method).

    Raises:
        ValueError: If the density of the model or of the guide is not known, a latent's support
            has no map from the reals, or an argument is unfit.

    Source: Neal (2001), section 3; Wu, Burda, Salakhutdinov & Grosse (2017), section 3.

    Example:
        >>> import torch
        >>> from ppvae.models import ExponentialGaussian
        >>> model, x = ExponentialGaussian(), torch.tensor([0.5, 1.5])
        >>> found = ais(model, None, x, num_steps=100)
        >>> bool(((found.value - model.log_evidence(x)).abs() < 4 * found.stderr).all())
        True
    """
    betas = _temperatures(num_chains, num_steps, leapfrog_steps, schedule)
    check_rows(x, model, guide)
    with judging(seed, x, model, guide), torch.no_grad():
        sites = read_model(model, x) if guide is None else check_pair(model, guide, x)
        if any(site.is_discrete for site in sites.latents.values()):
            return _without_gradient(model, guide, x, sites, num_chains * num_steps)
        start = Prior(model) if guide is None else proposal_of(model, guide, x, sites)
        path = _Path(start, x, sites, betas, num_steps, num_chains, leapfrog_steps)
        ((weights, acceptance),) = path.run(None, shown=progress)
    return _estimate(weights, acceptance, x)


def annealed(
    start: Proposal,
    x: Tensor,
    sites: ModelSites,
    *,
    num_chains: int,
    num_steps: int,
    leapfrog_steps: int,
) -> AnnealedEstimate:
    """`ais` from any proposal, for code that provides the contexts of `judging` itself."""
    path = _Path(start, x, sites, None, num_steps, num_chains, leapfrog_steps)
    ((weights, acceptance),) = path.run(None)
    return _estimate(weights, acceptance, x)


@dataclass(frozen=True)
class Sandwich:
    r"""Bounds on log p(x) from both sides, for data that the model drew itself.

    Attributes:
        x: The rows, ``(batch, *event)``.
        lower: Chains from the start to the posterior.
        upper: Chains from an exact draw of the posterior back to the start. All chains of a row
            share that draw, whose error is not in ``upper.stderr``; it is in `width_stderr`.
        width: Mean over the rows of upper less lower, in nats per datum: in expectation the sum
            of what the two are off, and so a bound on either error.
        width_stderr: Its standard error over the rows; NaN for a single one.
    """

    x: Tensor
    lower: AnnealedEstimate
    upper: AnnealedEstimate

    @property
    def _widths(self) -> Tensor:
        return (self.upper.value - self.lower.value).double()

    @property
    def width(self) -> float:
        """Mean of upper less lower, nats per datum."""
        return float(self._widths.mean())

    @property
    def width_stderr(self) -> float:
        """Standard error of `width` over the rows."""
        if len(self.x) < 2:
            return math.nan
        return float(self._widths.std()) / math.sqrt(len(self.x))

    def __repr__(self) -> str:
        return (
            f"Sandwich({self.lower.mean:.4f} to {self.upper.mean:.4f} nats a datum, width "
            f"{self.width:.2g} ± {self.width_stderr:.1g}, over {len(self.x)} simulated data)"
        )


def sandwich(
    model: Program,
    guide: Program | None,
    x: Tensor,
    latents: Mapping[str, Tensor] | None = None,
    *,
    num_chains: int = 16,
    num_steps: int = 500,
    schedule: Schedule | None = None,
    leapfrog_steps: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> Sandwich:
    r"""Lower and upper bounds on log p(x) for simulated data: how far off is `ais` here?

    .. math:: \log \frac1C \sum_c w_{cn} \;\le\; \log p(x_n) \;\le\;
              -\log \frac1C \sum_c \frac1{\tilde w_{cn}} \qquad \text{(in expectation)}

    Data are simulated from the model, so that the latents they came from are exact draws from
    their posteriors. Chains that start there and run the path backwards have weights
    :math:`\tilde w` whose inverse is unbiased for 1 / p(x). For real data there is no such draw
    and no upper bound; the width measures the method, for this model and these settings, and
    carries over to real data as far as those are like the model's own.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guide: Where chains start, as in `ais`; `None` for the prior.
        x: Rows whose shape and number the simulated ones take. With ``latents``: simulated rows.
        latents: By site, what ``x`` was simulated from, ``(batch, *event)``, for models that
            `ppvae.simulation.simulate` cannot draw from. By default rows are drawn anew.
        num_chains: Chains per row and direction, at least 2.
        num_steps: Temperatures T after the first, at least 2.
        schedule: Their places, as in `ais`.
        leapfrog_steps: Leapfrog steps of a proposal.
        seed: Seed of data and chains; the caller's generators are left as they were.
        progress: Whether to show a progress bar, on a terminal or in a notebook.

    Returns:
        Both bounds and their distance.

    Raises:
        ValueError: As `ais` and `ppvae.simulation.simulate`; for a model with discrete latents.

    Source: Grosse, Ghahramani & Adams (2015), bidirectional Monte Carlo.

    Example:
        >>> import torch
        >>> from ppvae.models import ExponentialGaussian
        >>> found = sandwich(ExponentialGaussian(), None, torch.zeros(200), num_steps=100)
        >>> bool(abs(found.width) < 0.05)
        True
    """
    betas = _temperatures(num_chains, num_steps, leapfrog_steps, schedule)
    check_rows(x, model, guide)
    if latents is not None and not isinstance(latents, Mapping):
        raise ValueError(
            f"latents: expected a mapping from sites to tensors, {{'z': ...}}; got "
            f"{type(latents).__name__}."
        )
    drawn = simulate(model, x, seed=seed) if latents is None else Simulated(x, dict(latents))
    x = drawn.x
    with judging(seed + 1, x, model, guide), torch.no_grad():
        sites = read_model(model, x) if guide is None else check_pair(model, guide, x)
        for name, site in sites.latents.items():
            if site.is_discrete:
                raise ValueError(
                    f"Site {name!r} ({site.family}) is discrete, and chains need gradients. Use "
                    f"ppvae.enumeration, or ppvae.iwae, which bounds from below alone."
                )
            value, wanted = drawn.latents.get(name), (len(x), *site.event_shape)
            if value is None or tuple(value.shape) != wanted:
                raise ValueError(
                    f"latents: expected for site {name!r} a draw for each row, {wanted}; got "
                    f"{None if value is None else tuple(value.shape)}."
                )
        start = Prior(model) if guide is None else proposal_of(model, guide, x, sites)
        path = _Path(start, x, sites, betas, num_steps, num_chains, leapfrog_steps)
        lower, upper = path.run(None, drawn.latents, shown=progress)
    return Sandwich(x, _estimate(*lower, x), _estimate(*upper, x, upper=True))


def _temperatures(
    num_chains: int, num_steps: int, leapfrog_steps: int, schedule: Schedule | None
) -> Tensor | None:
    """Check what was asked for; the temperatures of a schedule."""
    check_count("num_chains", num_chains, least=2)
    check_count("num_steps", num_steps, least=2)
    check_count("leapfrog_steps", leapfrog_steps)
    if schedule is None:
        return None
    betas = torch.as_tensor(schedule(num_steps), dtype=torch.float64)
    proper = betas.shape == (num_steps + 1,) and bool((betas.diff() > 0).all())
    if not proper or float(betas[0]) != 0 or abs(float(betas[-1]) - 1) > 1e-12:
        raise ValueError(
            f"schedule: expected {num_steps + 1} rising temperatures from 0 to 1; got shape "
            f"{tuple(betas.shape)}. Use ppvae.annealing.sigmoid or ppvae.annealing.linear."
        )
    return betas


def _estimate(
    weights: Tensor, acceptance: Tensor, x: Tensor, *, upper: bool = False
) -> AnnealedEstimate:
    found = iwae_from([-weights if upper else weights])
    return AnnealedEstimate(
        value=(-found.value if upper else found.value).to(x.dtype),
        stderr=found.stderr.to(x.dtype),
        bound="upper" if upper else "lower",
        method="ais",
        log_weights=weights,
        acceptance=acceptance,
    )


def _without_gradient(
    model: Program, guide: Program | None, x: Tensor, sites: ModelSites, num_samples: int
) -> Estimate:
    """What stands in for annealing where a latent is discrete."""
    discrete = all(site.is_discrete for site in sites.latents.values())
    if discrete and num_configurations(sites) <= MOST_CONFIGURATIONS:
        return enumeration(model, x)
    if guide is not None:
        return iwae_from(weighed(model, guide, x, num_samples))
    prior = Prior(model)

    def parts() -> Any:
        for size in draw_chunks(num_samples, x):
            start, target = prior.log_densities(x, (), prior.draw(x, (), size))
            yield target - start

    return iwae_from(parts())


@dataclass(frozen=True)
class _Course:
    """What a pilot run found for some rows, at temperatures of their own.

    Attributes:
        betas: Rising from 0 to 1, ``(rows, points)``.
        spread: Standard deviation of the log ratio there, ``(rows, points)``.
        log_step: Log step sizes there, ``(rows, points)``.
        roots: A root of the inverse curvature, ``(looks, rows, D, D)``, or of its diagonal,
            ``(looks, rows, D)``; one for every few points.
    """

    betas: Tensor
    spread: Tensor
    log_step: Tensor
    roots: Tensor

    def temperatures(self, count: int) -> Tensor:
        """``(rows, count + 1)``, at equal distances in units of the log ratio's spread."""
        between = 0.5 * (self.spread[:, 1:] + self.spread[:, :-1]) + _LEAST_SPREAD
        way = torch.cumsum(between * self.betas.diff(dim=1), dim=1)
        way = torch.cat([torch.zeros_like(way[:, :1]), way], dim=1) / way[:, -1:]
        at = torch.linspace(0, 1, count + 1, dtype=torch.float64, device=way.device)
        at = at.expand(len(way), -1).contiguous()
        right = torch.searchsorted(way, at).clamp(1, way.shape[1] - 1)
        low, high = way.gather(1, right - 1), way.gather(1, right)
        share = ((at - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
        found = torch.lerp(self.betas.gather(1, right - 1), self.betas.gather(1, right), share)
        found[:, 0], found[:, -1] = 0.0, 1.0
        return found

    def at(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Step sizes ``(rows,)`` and roots at a temperature of each row."""
        column = beta[:, None].contiguous()
        right = torch.searchsorted(self.betas, column).clamp(1, self.betas.shape[1] - 1)
        low, high = self.betas.gather(1, right - 1), self.betas.gather(1, right)
        share = ((column - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
        step = torch.lerp(self.log_step.gather(1, right - 1), self.log_step.gather(1, right), share)
        look = (right[:, 0] - 1) // _LOOKS
        return torch.exp(step[:, 0]), self.roots[look, torch.arange(len(beta), device=beta.device)]


def _turned(root: Tensor, vectors: Tensor) -> Tensor:
    """``root`` times vectors ``(chains, rows, D)``."""
    if root.dim() == 2:
        return root * vectors
    return torch.einsum("rij,crj->cri", root, vectors)


class _Chains:
    """Where the chains of some rows stand, and what the densities are there."""

    def __init__(self, path: _Path, rows: slice, u: Tensor) -> None:
        self._path = path
        self._x = path.x[rows]
        self._params = [p[rows] for p in path.start.params]
        self.u = u
        self.start, self.target, self._slope_start, self._slope_target = self._at(u)

    def _at(self, u: Tensor) -> tuple[Tensor, ...]:
        start, target, slope_start, slope_target = self._path.densities(self._x, u, *self._params)
        return start, target, torch.nan_to_num(slope_start), torch.nan_to_num(slope_target)

    @property
    def log_ratio(self) -> Tensor:
        """log p(x, z) − log q_0(z), ``(chains, rows)``; −inf where both densities are 0."""
        return torch.nan_to_num((self.target - self.start).double(), nan=-torch.inf)

    def move(self, beta: Tensor, step: Tensor, root: Tensor) -> Tensor:
        """One proposal at a temperature; gives the chance that it is accepted.

        Args:
            beta: Temperatures, ``(rows,)``.
            step: Step sizes in units of ``root``, ``(rows,)``.
            root: A root of the inverse mass, ``(rows, D, D)`` or ``(rows, D)``.
        """
        shape = self.u.shape[:2]
        jitter = 1 + _JITTER * (2 * torch.rand(shape, device=self.u.device) - 1)
        size = (step * jitter).to(self.u.dtype)[..., None]
        momentum = torch.randn_like(self.u)
        beta = beta.to(self.u.dtype)
        back = root.mT if root.dim() == 3 else root

        def force(start: Tensor, target: Tensor) -> Tensor:
            return _turned(back, torch.lerp(start, target, beta[:, None]))

        def energy(start: Tensor, target: Tensor) -> Tensor:
            return (1 - beta) * start + beta * target - 0.5 * momentum.square().sum(dim=-1)

        before = energy(self.start, self.target)
        u, slopes = self.u, (self._slope_start, self._slope_target)
        momentum = momentum + 0.5 * size * force(*slopes)
        for left in reversed(range(self._path.leapfrog_steps)):
            u = u + size * _turned(root, momentum)
            start, target, *both = self._at(u)
            slopes = both[0], both[1]
            momentum = momentum + (1.0 if left else 0.5) * size * force(*slopes)
        # What is no number is not accepted; from where the density is 0 anything is.
        log_chance = torch.nan_to_num(energy(start, target) - before, nan=-torch.inf).clamp(max=0.0)
        accepted = torch.log(torch.rand_like(log_chance)) < log_chance
        self.start = torch.where(accepted, start, self.start)
        self.target = torch.where(accepted, target, self.target)
        everywhere = accepted[..., None]
        self.u = torch.where(everywhere, u, self.u)
        self._slope_start = torch.where(everywhere, slopes[0], self._slope_start)
        self._slope_target = torch.where(everywhere, slopes[1], self._slope_target)
        return torch.exp(log_chance)

    def root(self, beta: Tensor, scale: Tensor) -> Tensor:
        r"""A root of the inverse of :math:`-\nabla^2 \log f_\beta`, averaged over the chains.

        From differences of gradients: the whole matrix, or its diagonal in random directions
        (Bekas, Kokiopoulou & Saad 2007).

        Args:
            beta: Temperatures, ``(rows,)``.
            scale: Units of each element, ``(rows, D)``.
        """
        beta = beta.to(self.u.dtype)[:, None]
        size = self.u.shape[-1]
        here = torch.lerp(self._slope_start, self._slope_target, beta)

        def change(direction: Tensor) -> Tensor:
            _, _, start, target = self._at(self.u + _APART * scale * direction)
            there = torch.lerp(start, target, beta)
            return -scale * (there - here) / _APART

        if size > _FULL:
            total = torch.zeros_like(here[0])
            for _ in range(_DIRECTIONS):
                signs = 2.0 * torch.randint_like(self.u, 2) - 1.0
                total += (signs * change(signs)).mean(dim=0)
            diagonal = torch.nan_to_num(total / _DIRECTIONS).clamp(min=_LEAST_CURVATURE)
            return scale * torch.rsqrt(diagonal)
        eye = torch.eye(size, dtype=self.u.dtype, device=self.u.device)
        matrix = torch.stack([change(axis).mean(dim=0) for axis in eye], dim=-1)
        matrix = torch.nan_to_num(0.5 * (matrix + matrix.mT))
        values, vectors = torch.linalg.eigh(matrix)
        return scale[..., None] * vectors * torch.rsqrt(values.clamp(min=_LEAST_CURVATURE))[:, None]


class _Path:
    """The densities between the start and the posterior, for some rows."""

    def __init__(
        self,
        start: Proposal,
        x: Tensor,
        sites: ModelSites,
        betas: Tensor | None,
        num_steps: int,
        num_chains: int,
        leapfrog_steps: int,
    ) -> None:
        check_density(start.model, x, sites)
        self.start = start
        self.x, self._num_steps = x, num_steps
        self._betas = None if betas is None else betas.to(x.device)
        self.num_chains, self.leapfrog_steps = num_chains, leapfrog_steps
        self._sites = _fixed_supports(start.model, x, sites)
        self._maps = [to_unconstrained(site) for site in self._sites]
        some = self._draw(slice(None), 1)
        # Of the shapes of draws, as bounds may differ between rows.
        self._shapes = [
            tuple(transform.inverse_shape(some[site.name].shape)[2:])
            for site, transform in zip(self._sites, self._maps, strict=True)
        ]
        self._most = max(_PILOT_LEAST, int(_PILOT_SHARE * num_steps))
        self._split(self._flat(some)[0])
        calls = 2 * len(self._chains) * num_steps + self._most
        self.densities = Repeated(self._densities, leapfrog_steps * len(self._rows) * calls)

    def _split(self, u: Tensor) -> None:
        """Portions of the rows and of the chains that keep within the budget of memory."""
        x, budget = self.x, chunk_bytes(self.x)
        with forked_rng(0, x.device):
            largest = bytes_of_largest(lambda: self._densities(x, u, *self.start.params))
        pairs = max(1, budget // max(1, largest // len(x)))
        rows = min(len(x), max(1, pairs // self.num_chains))
        size = u.shape[-1]
        roots = (self._most // _LOOKS + 1) * u.element_size() * (size * min(size, _FULL))
        rows = min(rows, max(1, _COURSES * budget // roots))
        rows = -(-len(x) // -(-len(x) // rows))
        if rows < len(x) and not self._row_by_row(u, slice(len(x) - rows, len(x))):
            rows = len(x)
        chains = min(self.num_chains, max(1, pairs // rows))
        chains = -(-self.num_chains // -(-self.num_chains // chains))
        self._rows = [slice(i, min(i + rows, len(x))) for i in range(0, len(x), rows)]
        self._chains = [min(chains, self.num_chains - i) for i in range(0, self.num_chains, chains)]

    def _row_by_row(self, u: Tensor, rows: slice) -> bool:
        """Whether some rows alone are what they are among all."""
        if any(support_name(site.support).endswith("for each row") for site in self._sites):
            return False
        params = self.start.params
        whole = self._densities(self.x, u, *params)
        try:
            part = self._densities(self.x[rows], u[:, rows], *(p[rows] for p in params))
        except (IndexError, RuntimeError, ValueError):
            return False
        return all(
            torch.allclose(one[:, rows], other, rtol=1e-3, atol=1e-3, equal_nan=True)
            for one, other in zip(whole[:2], part[:2], strict=True)
        )

    def _draw(self, rows: slice, count: int) -> dict[str, Tensor]:
        params = [p[rows] for p in self.start.params]
        return self.start.draw(self.x[rows], params, count)

    def _flat(self, latents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Values on the reals, ``(draws, rows, D)``, and which lie in the model's support."""
        parts = []
        inside = torch.ones((), dtype=torch.bool, device=self.x.device)
        for site, transform in zip(self._sites, self._maps, strict=True):
            value = latents[site.name]
            u = transform.inv(value)
            u = torch.nan_to_num(u, nan=torch.nan, posinf=_FARTHEST, neginf=-_FARTHEST)
            # Maps clamp what lies outside; what they give back for it is something else.
            back = transform(u)
            near = (back - value).abs() <= _ROUND_TRIP * (1 + value.abs())
            inside = inside & near.reshape(*near.shape[:2], -1).all(dim=-1)
            parts.append(u.reshape(*u.shape[:2], -1))
        return torch.nan_to_num(torch.cat(parts, dim=-1)), inside

    def _values(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Latents by site, and the log determinant of the map to them."""
        at, values = 0, {}
        jacobian = u.new_zeros(u.shape[:2])
        for site, transform, shape in zip(self._sites, self._maps, self._shapes, strict=True):
            count = math.prod(shape)
            part = u[..., at : at + count].reshape(*u.shape[:2], *shape)
            z = transform(part)
            term = transform.log_abs_det_jacobian(part, z)
            jacobian = jacobian + term.reshape(*term.shape[:2], -1).sum(-1)
            values[site.name] = z
            at += count
        return values, jacobian

    def _densities(self, x: Tensor, u: Tensor, *params: Tensor) -> list[Tensor]:
        """Log densities of start and target over the reals, and their gradients."""
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            values, jacobian = self._values(u)
            start, target = self.start.log_densities(x, params, values)
            start, target = start + jacobian, target + jacobian
            slopes = [
                # A density that is the same everywhere, as of a uniform guide, has no graph.
                torch.autograd.grad(part.sum() + 0.0 * u.sum(), u, retain_graph=part is start)[0]
                for part in (start, target)
            ]
        return [start.detach(), target.detach(), *slopes]

    def run(
        self, *exact: Mapping[str, Tensor] | None, shown: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """Log weights ``(num_chains, batch)`` and acceptance ``(batch,)``, for each argument.

        Args:
            *exact: Exact draws of the posteriors to run backwards from; `None` to run forwards.
            shown: Whether to show a progress bar.
        """
        weights: list[list[Tensor]] = [[] for _ in exact]
        shares: list[list[Tensor]] = [[] for _ in exact]
        total = len(self._rows) * len(exact) * len(self._chains) * self._num_steps
        with progress_bar(total, "annealing", "step", shown=shown) as bar:
            for rows in self._rows:
                course = self._pilot(rows)
                for number, latents in enumerate(exact):
                    found = [self._run(rows, count, course, latents, bar) for count in self._chains]
                    weights[number].append(torch.cat([w for w, _ in found]))
                    shares[number].append(torch.cat([a for _, a in found]).mean(dim=0))
        return [(torch.cat(w, dim=1), torch.cat(a)) for w, a in zip(weights, shares, strict=True)]

    def _run(
        self,
        rows: slice,
        count: int,
        course: _Course,
        latents: Mapping[str, Tensor] | None,
        bar: Bar,
    ) -> tuple[Tensor, Tensor]:
        if self._betas is None:
            betas = course.temperatures(self._num_steps)
        else:
            betas = self._betas.expand(len(course.betas), -1)
        order = range(1, self._num_steps + 1)
        if latents is None:
            u, inside = self._flat(self._draw(rows, count))
        else:
            order = order[::-1]
            exact, inside = self._flat({name: z[None, rows] for name, z in latents.items()})
            if not bool(inside.all()):
                row = int((~inside[0]).nonzero()[0]) + rows.start
                raise ValueError(
                    f"latents: those of row {row} lie outside of the support of the model's prior, "
                    f"so that the model cannot have drawn them. Pass x and latents of one run."
                )
            u = exact.expand(count, *exact.shape[1:]).clone()
        chains = _Chains(self, rows, u)
        weights = torch.zeros(u.shape[:2], dtype=torch.float64, device=u.device)
        # A guide may draw what the prior rules out.
        weights = weights.masked_fill(~inside, -torch.inf)
        accepted = torch.zeros_like(weights)
        for number, t in enumerate(order):
            stride = betas[:, t] - betas[:, t - 1]
            weights += torch.where(stride > 0, stride * chains.log_ratio, 0.0)
            if number < len(order) - 1:
                # Forwards to the density at t, backwards to the one before it.
                beta = betas[:, t if latents is None else t - 1]
                accepted += chains.move(beta, *course.at(beta))
            bar.advance()
        return weights, accepted / (len(order) - 1)

    def _pilot(self, rows: slice) -> _Course:
        """Go once through the temperatures, learning of steps, curvature and strides on the way."""
        count = min(_PILOT_CHAINS, max(2, self._chains[0]))
        draws = [self._flat(self._draw(rows, count)) for _ in range(-(-_SCALE_DRAWS // count))]
        among = torch.cat([torch.where(i[..., None], u, torch.nan) for u, i in draws])
        # Of one whose tails have no variance, something positive too.
        spread = torch.nanquantile(among, 0.84, dim=0) - torch.nanquantile(among, 0.16, dim=0)
        scale = torch.nan_to_num(0.5 * spread, nan=1.0).clamp(min=1e-6)
        chains = _Chains(self, rows, draws[0][0])
        beta = scale.new_full((len(scale),), _FIRST_BETA, dtype=torch.float64)
        longest = _TRAJECTORY / self.leapfrog_steps
        log_step = torch.full_like(beta, math.log(longest))
        root = chains.root(beta, scale)
        variance = self._variance(chains)

        def move() -> tuple[Tensor, Tensor]:
            """One proposal; what is known afterwards of the step size and of the log ratio."""
            chance = chains.move(beta, torch.exp(log_step), root).double().mean(dim=0)
            step = log_step + _PILOT_RATE * (chance - _ACCEPTANCE)
            step = step.clamp(math.log(_LEAST_STEP), math.log(longest))
            return step, torch.lerp(variance, self._variance(chains), _PILOT_MEMORY)

        for _ in range(_PILOT_WARMUP):
            log_step, variance = move()
        betas, spreads, steps, roots = [], [], [], []
        for number in range(self._most):
            if number % _LOOKS == 0:
                root = chains.root(beta, scale)
                roots.append(root)
            betas.append(beta)
            spreads.append(_pooled(variance, count).sqrt())
            steps.append(log_step)
            if bool((beta >= 1).all()):
                break
            # As far as the spread allows, and farther where the moves that are left, in equal
            # parts of log beta, would not suffice.
            least = beta ** (1 - 1 / (self._most - 1 - number))
            stride = _PILOT_STRIDE * _PILOT_GROWTH ** (number / (self._most - 1))
            stride = stride / spreads[-1].clamp(min=_LEAST_SPREAD)
            beta = torch.maximum(beta + stride, least).clamp(max=1.0)
            log_step, variance = move()
        betas[0] = torch.zeros_like(beta)
        points, spread, log_steps = (torch.stack(each, dim=1) for each in (betas, spreads, steps))
        return _Course(points, spread, log_steps, torch.stack(roots))

    @staticmethod
    def _variance(chains: _Chains) -> Tensor:
        """Of the log ratio over the chains, ``(rows,)``."""
        return chains.log_ratio.clamp(-1e30, 1e30).var(dim=0)


def _fixed_supports(model: Program, x: Tensor, sites: ModelSites) -> list[LatentSite]:
    """The latent sites; refuses a support that is another one at another run of the model."""
    again = read_model(model, x).latents
    for name, site in sites.latents.items():
        for bound in ("lower_bound", "upper_bound"):
            one, other = (
                torch.as_tensor(_bound(each[name].support, bound))
                for each in (sites.latents, again)
            )
            if not torch.equal(one, other):
                raise ValueError(
                    f"Site {name!r} ({site.family}): its support hangs on another latent, so that "
                    f"no map from the reals leads to it. Draw a variable on a fixed support, such "
                    f"as (0, 1), and scale it inside of the model."
                )
    return list(sites.latents.values())


def _bound(support: Any, name: str) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return getattr(support, name, 0.0)


def _pooled(variance: Tensor, count: int) -> Tensor:
    """Variances of rows, drawn towards their median as their degrees of freedom demand.

    A row that is far off the others hardly moves them.
    """
    own = count - 1
    return (own * variance + _PILOT_SHARED * variance.median()) / (own + _PILOT_SHARED)
