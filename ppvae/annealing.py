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

from ppvae.configurations import MOST_CONFIGURATIONS, num_configurations
from ppvae.density import (
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
from ppvae.proposals import Prior, Proposal, proposal_of
from ppvae.simulation import Simulated, simulate

Schedule = Callable[[int], Tensor]
"""From a number of steps T to β_0 = 0 < … < β_T = 1, ``(T + 1,)`` in float64."""

# Acceptance that step sizes are led to, in the middle of what is best for HMC in any dimension.
_ACCEPTANCE = 0.8
# The pilot: chains, moves before it sets off, standard deviations of a log weight's increment that
# it goes at a time, and most steps as a share of those of the run, or at least.
_PILOT_CHAINS, _PILOT_WARMUP, _PILOT_STRIDE, _PILOT_SHARE, _PILOT_LEAST = 8, 20, 0.25, 0.5, 100
# How fast the pilot's step sizes and running moments follow, and how many degrees of freedom the
# other rows' variances count for.
_PILOT_RATE, _PILOT_MEMORY, _PILOT_SHARED = 0.3, 0.2, 4.0
# Moves between two looks at the curvature; latent elements up to which it is a full matrix, and
# random directions that find the diagonal of larger ones; the distance of a difference, and the
# least curvature that is believed, in units of the start's scale.
_LOOKS, _FULL, _DIRECTIONS, _APART, _LEAST_CURVATURE = 8, 64, 8, 0.02, 0.1
# Numbers in the roots of the curvature at one temperature.
_COURSES = 1_000_000
_LEAST_STEP = 1e-5
# The longest way of a proposal, in standard deviations: a quarter of a turn leaves of a Gaussian's
# place nothing, and of its square nothing, which sets the log density; half a turn leaves all.
_TRAJECTORY = math.pi / 2
_FIRST_BETA = 1e-9
# Step sizes are spread by this much, lest a trajectory come back to where it began.
_JITTER = 0.2
# Draws of the start from which its scale is found.
_SCALE_DRAWS = 64
# Beyond this the exponential of an unconstrained value is no number in float32.
_FARTHEST = 85.0


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
) -> Estimate:
    r"""Evidence per datum by annealed importance sampling.

    .. math:: \log \hat p(x_n) = \log \frac1C \sum_c w_{cn}, \qquad
              \log w_{cn} = \sum_{t=1}^{T} (\beta_t - \beta_{t-1})
              \bigl(\log p(x_n, z_{t-1}) - \log q_0(z_{t-1} \mid x_n)\bigr)

    The mean weight is unbiased for p(x), so that its log is a lower bound in expectation; it rises
    to log p(x) as the steps T do, by about 1/T. Chains start at the guide or at the prior and move
    by Hamiltonian Monte Carlo over the unconstrained latents, all rows and chains at once.

    A pilot run of 8 chains finds for each row how large steps may be at each temperature, led to an
    acceptance of 0.8, how the density is curved there, and, unless a ``schedule`` is
    given, where temperatures are wanted: as many per unit of :math:`\int \mathrm{sd}_\beta(\log
    p(x, z) - \log q_0)\, d\beta` everywhere, which makes the bound tightest (Grosse, Maddison &
    Salakhutdinov 2013). The chains that are weighted only follow it: chains that adapted to their
    own past would not be unbiased any more. Costs ``num_chains * num_steps * leapfrog_steps``
    gradients of the log joint density per row, and about a tenth of that for the pilot.

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
        return _estimate(*path.run(), x)


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
    return _estimate(*_Path(start, x, sites, None, num_steps, num_chains, leapfrog_steps).run(), x)


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
        width_stderr: Its standard error over the rows.
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
        lower = path.run()
        upper = path.run(drawn.latents)
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
        log_step: Log step sizes there, ``(rows, points)``.
        roots: A root of the inverse curvature, ``(looks, rows, D, D)``, or of its diagonal,
            ``(looks, rows, D)``; one for every few points.
    """

    betas: Tensor
    log_step: Tensor
    roots: Tensor

    def temperatures(self, count: int) -> Tensor:
        """``(rows, count + 1)``, equally many between any two that a row took to come to 1."""
        arrival = (self.betas >= 1).int().argmax(dim=1, keepdim=True)
        share = torch.linspace(0, 1, count + 1, dtype=torch.float64, device=self.betas.device)
        at = share * arrival
        low = at.floor().long().clamp(max=self.betas.shape[1] - 2)
        below, above = self.betas.gather(1, low), self.betas.gather(1, low + 1)
        return torch.lerp(below, above, at - low)

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
        self._sites = list(sites.latents.values())
        self._maps = [to_unconstrained(site) for site in self._sites]
        draws = self._flat(self._draw(slice(None), _SCALE_DRAWS))
        # Of one whose tails have no variance, something positive too.
        spread = torch.quantile(draws, 0.84, dim=0) - torch.quantile(draws, 0.16, dim=0)
        self._scale = (0.5 * spread).clamp(min=1e-6)
        self._most = max(_PILOT_LEAST, int(_PILOT_SHARE * num_steps))
        self._split(draws)
        calls = 2 * len(self._chains) * num_steps + self._most
        self.densities = Repeated(self._densities, leapfrog_steps * len(self._rows) * calls)
        self._courses: dict[int, _Course] = {}

    def _split(self, draws: Tensor) -> None:
        """Portions of the rows and of the chains that keep within the budget of memory."""
        x = self.x
        with forked_rng(0, x.device):
            largest = bytes_of_largest(lambda: self._densities(x, draws[:1], *self.start.params))
        each = max(1, largest // len(x))
        pairs = max(1, chunk_bytes(x) // each)
        rows = min(len(x), max(1, pairs // self.num_chains))
        # Bounds of a support that differ between rows are those of all rows together.
        if any(support_name(site.support).endswith("for each row") for site in self._sites):
            rows = len(x)
        chains = min(self.num_chains, max(1, pairs // rows))
        rows = min(rows, max(1, _COURSES // min(draws.shape[-1], _FULL) ** 2))
        rows = -(-len(x) // -(-len(x) // rows))
        chains = -(-self.num_chains // -(-self.num_chains // chains))
        self._rows = [slice(i, min(i + rows, len(x))) for i in range(0, len(x), rows)]
        self._chains = [min(chains, self.num_chains - i) for i in range(0, self.num_chains, chains)]

    def _draw(self, rows: slice, count: int) -> dict[str, Tensor]:
        params = [p[rows] for p in self.start.params]
        return self.start.draw(self.x[rows], params, count)

    def _flat(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Values on the reals, ``(draws, rows, D)``."""
        parts = []
        for site, transform in zip(self._sites, self._maps, strict=True):
            u = transform.inv(latents[site.name])
            parts.append(u.reshape(*u.shape[:2], -1))
        flat = torch.cat(parts, dim=-1)
        return torch.nan_to_num(flat, nan=0.0, posinf=_FARTHEST, neginf=-_FARTHEST)

    def _values(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Latents by site, and the log determinant of the map to them."""
        at, values = 0, {}
        jacobian = u.new_zeros(u.shape[:2])
        for site, transform in zip(self._sites, self._maps, strict=True):
            shape = tuple(transform.inverse_shape(torch.Size(site.event_shape)))
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
                torch.autograd.grad(part.sum(), u, retain_graph=part is start)[0]
                for part in (start, target)
            ]
        return [start.detach(), target.detach(), *slopes]

    def run(self, latents: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Log weights ``(num_chains, batch)`` and acceptance ``(batch,)``.

        Args:
            latents: Exact draws of the posteriors to run backwards from; `None` to run forwards.
        """
        weights, shares = [], []
        for rows in self._rows:
            if rows.start not in self._courses:
                self._courses[rows.start] = self._pilot(rows)
            found = [
                self._run(rows, count, self._courses[rows.start], latents) for count in self._chains
            ]
            weights.append(torch.cat([w for w, _ in found]))
            shares.append(torch.cat([a for _, a in found]).mean(dim=0))
        return torch.cat(weights, dim=1), torch.cat(shares)

    def _run(
        self, rows: slice, count: int, course: _Course, latents: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if self._betas is None:
            betas = course.temperatures(self._num_steps)
        else:
            betas = self._betas.expand(len(course.betas), -1)
        order = range(1, self._num_steps + 1)
        if latents is None:
            u = self._flat(self._draw(rows, count))
        else:
            order = order[::-1]
            exact = self._flat({name: z[None, rows] for name, z in latents.items()})
            u = exact.expand(count, *exact.shape[1:]).clone()
        chains = _Chains(self, rows, u)
        weights = torch.zeros(u.shape[:2], dtype=torch.float64, device=u.device)
        accepted = torch.zeros_like(weights)
        for number, t in enumerate(order):
            stride = betas[:, t] - betas[:, t - 1]
            weights += torch.where(stride > 0, stride * chains.log_ratio, 0.0)
            if number < len(order) - 1:
                # Forwards to the density at t, backwards to the one before it.
                beta = betas[:, t if latents is None else t - 1]
                accepted += chains.move(beta, *course.at(beta))
        return weights, accepted / (len(order) - 1)

    def _pilot(self, rows: slice) -> _Course:
        """Go once through the temperatures, learning of steps, curvature and strides on the way."""
        count = min(_PILOT_CHAINS, max(2, self._chains[0]))
        chains = _Chains(self, rows, self._flat(self._draw(rows, count)))
        scale = self._scale[rows]
        beta = scale.new_full((len(scale),), _FIRST_BETA, dtype=torch.float64)
        longest = _TRAJECTORY / self.leapfrog_steps
        log_step = torch.full_like(beta, math.log(longest))
        root = chains.root(beta, scale)
        spread = chains.log_ratio.clamp(min=-1e30).var(dim=0)

        def move() -> tuple[Tensor, Tensor]:
            """One proposal; what is known afterwards of the step size and of the log ratio."""
            chance = chains.move(beta, torch.exp(log_step), root).double().mean(dim=0)
            step = log_step + _PILOT_RATE * (chance - _ACCEPTANCE)
            seen = chains.log_ratio.clamp(min=-1e30).var(dim=0)
            step = step.clamp(math.log(_LEAST_STEP), math.log(longest))
            return step, torch.lerp(spread, seen, _PILOT_MEMORY)

        for _ in range(_PILOT_WARMUP):
            log_step, spread = move()
        betas, steps, roots = [], [], []
        for number in range(self._most):
            if number % _LOOKS == 0:
                root = chains.root(beta, scale)
                roots.append(root)
            betas.append(beta)
            steps.append(log_step)
            if bool((beta >= 1).all()):
                break
            stride = _PILOT_STRIDE / _pooled(spread, count).sqrt().clamp(min=1e-12)
            if number > self._most // 2:
                # What is left is gone in equal parts where the moves do not suffice.
                stride = torch.maximum(stride, (1 - beta) / (self._most - 1 - number))
            beta = (beta + stride).clamp(max=1.0)
            log_step, spread = move()
        betas[0], betas[-1] = torch.zeros_like(beta), torch.ones_like(beta)
        return _Course(torch.stack(betas, 1), torch.stack(steps, 1), torch.stack(roots))


def _pooled(variance: Tensor, count: int) -> Tensor:
    """Variances of rows, drawn towards their mean as their degrees of freedom demand."""
    own = count - 1
    return (own * variance + _PILOT_SHARED * variance.mean()) / (own + _PILOT_SHARED)
