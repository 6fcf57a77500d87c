r"""Annealed importance sampling: log p(x) per datum through a path of distributions.

From a start :math:`q_0`, the guide or the prior, chains move through

.. math:: \log f_t(z) = (1 - \beta_t) \log q_0(z \mid x) + \beta_t \log p(x, z),
          \qquad 0 = \beta_0 < \cdots < \beta_T = 1

by Hamiltonian Monte Carlo, and collect :math:`\log w = \sum_t (\beta_t - \beta_{t-1})
(\log p(x, z_{t-1}) - \log q_0(z_{t-1} \mid x))`, whose exponential is unbiased for p(x) (Neal 2001).
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
from ppvae.proposals import Prior, Proposal, proposal_of
from ppvae.simulation import Simulated, simulate

Schedule = Callable[[int], Tensor]
"""From a number of steps T to β_0 = 0 < … < β_T = 1, ``(T + 1,)`` in float64."""

# Acceptance that step sizes are led to, in the middle of what is best for HMC in any dimension.
_ACCEPTANCE = 0.65
# Chains and steps of the pilot run that finds the step sizes.
_PILOT_CHAINS, _PILOT_SHARE, _PILOT_LEAST = 4, 4, 50
_PILOT_WARMUP, _PILOT_RATE = 20, 0.3
_FIRST_STEP, _MOST_STEP, _LEAST_STEP = 0.5, 4.0, 1e-5
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
        tensor([0.0000, 0.1049, 0.5000, 0.8951, 1.0000], dtype=torch.float64)
    """
    raw = torch.sigmoid(4.0 * (2 * linear(num_steps) - 1))
    return (raw - raw[0]) / (raw[-1] - raw[0])


@dataclass(frozen=True, repr=False)
class AnnealedEstimate(Estimate):
    """A figure per datum from annealed chains.

    Attributes:
        log_weights: ``(num_chains, batch)``, nats; of an upper bound those of reversed chains.
        acceptance: Share of proposals that were accepted, ``(batch,)``. Far below 0.65 the chains
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
    schedule: Schedule = sigmoid,
    leapfrog_steps: int = 10,
    seed: int = 0,
) -> Estimate:
    r"""Evidence per datum by annealed importance sampling.

    .. math:: \log \hat p(x_n) = \log \frac1C \sum_c w_{cn}, \qquad
              \log w_{cn} = \sum_{t=1}^{T} (\beta_t - \beta_{t-1})
              \bigl(\log p(x_n, z_{t-1}) - \log q_0(z_{t-1} \mid x_n)\bigr)

    The mean weight is unbiased for p(x), so that its log is a lower bound in expectation; it rises
    to log p(x) as the steps T do, by about 1/T. Chains start at the guide or at the prior and move
    by Hamiltonian Monte Carlo over the unconstrained latents, all rows and chains at once.

    Step sizes are a row's own, one for each temperature, and come from a pilot run of 4 chains and
    a quarter of the steps that is led to an acceptance of 0.65. Chains that adapted to their own
    past would not be unbiased any more. Costs ``num_chains * num_steps * leapfrog_steps``
    gradients of the log joint density per row, and a sixteenth of that for the pilot.

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
        schedule: Their places: `sigmoid` or `linear` of ``ppvae.annealing``, or any function of T.
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
        path = _Path(model, guide, x, sites, betas, num_chains, leapfrog_steps)
        weights, acceptance = path.run()
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
    schedule: Schedule = sigmoid,
    leapfrog_steps: int = 10,
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
        schedule: Their places.
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
        path = _Path(model, guide, x, sites, betas, num_chains, leapfrog_steps)
        lower = path.run()
        upper = path.run(drawn.latents)
    return Sandwich(x, _estimate(*lower, x), _estimate(*upper, x, upper=True))


def _temperatures(
    num_chains: int, num_steps: int, leapfrog_steps: int, schedule: Schedule
) -> Tensor:
    check_count("num_chains", num_chains, least=2)
    check_count("num_steps", num_steps, least=2)
    check_count("leapfrog_steps", leapfrog_steps)
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


class _Chains:
    """Where the chains of some rows stand, and what the densities are there."""

    def __init__(self, path: _Path, rows: slice, u: Tensor) -> None:
        self._path = path
        self._x = path.x[rows]
        self._params = [p[rows] for p in path.start.params]
        self._scale = path.scale[rows]
        self.u = u
        self.start, self.target, self._slope_start, self._slope_target = self._at(u)

    def _at(self, u: Tensor) -> tuple[Tensor, ...]:
        start, target, slope_start, slope_target = self._path.densities(self._x, u, *self._params)
        return start, target, torch.nan_to_num(slope_start), torch.nan_to_num(slope_target)

    @property
    def log_ratio(self) -> Tensor:
        """log p(x, z) − log q_0(z), ``(chains, rows)``; −inf where both densities are 0."""
        return torch.nan_to_num((self.target - self.start).double(), nan=-torch.inf)

    def move(self, beta: Tensor, step: Tensor) -> Tensor:
        """One proposal at a temperature; gives the chance that it is accepted.

        Args:
            beta: The temperature, a scalar.
            step: Step sizes in units of the start's scale, ``(rows,)``.
        """
        shape = self.u.shape[:2]
        jitter = 1 + _JITTER * (2 * torch.rand(shape, device=self.u.device) - 1)
        size = (step * jitter).to(self.u.dtype)[..., None]
        momentum = torch.randn_like(self.u)
        beta = beta.to(self.u.dtype)
        before = self._energy(beta, self.start, self.target, momentum)
        u, slopes = self.u, (self._slope_start, self._slope_target)
        momentum = momentum + 0.5 * size * self._force(beta, *slopes)
        for step_number in range(self._path.leapfrog_steps):
            u = u + size * self._scale * momentum
            start, target, *slopes = self._at(u)
            last = step_number == self._path.leapfrog_steps - 1
            momentum = momentum + (0.5 if last else 1.0) * size * self._force(beta, *slopes)
        after = self._energy(beta, start, target, momentum)
        # What is no number is not accepted; from where the density is 0 anything is.
        log_chance = torch.nan_to_num(after - before, nan=-torch.inf).clamp(max=0.0)
        accepted = torch.log(torch.rand_like(log_chance)) < log_chance
        self.u = torch.where(accepted[..., None], u, self.u)
        self.start = torch.where(accepted, start, self.start)
        self.target = torch.where(accepted, target, self.target)
        self._slope_start = torch.where(accepted[..., None], slopes[0], self._slope_start)
        self._slope_target = torch.where(accepted[..., None], slopes[1], self._slope_target)
        return torch.exp(log_chance)

    def _force(self, beta: Tensor, start: Tensor, target: Tensor) -> Tensor:
        return self._scale * torch.lerp(start, target, beta)

    def _energy(self, beta: Tensor, start: Tensor, target: Tensor, momentum: Tensor) -> Tensor:
        """The log density of place and momentum."""
        return (1 - beta) * start + beta * target - 0.5 * momentum.square().sum(dim=-1)


class _Path:
    """The densities between the start and the posterior, for some rows."""

    def __init__(
        self,
        model: Program,
        guide: Program | None,
        x: Tensor,
        sites: ModelSites,
        betas: Tensor,
        num_chains: int,
        leapfrog_steps: int,
    ) -> None:
        check_density(model, x, sites)
        self.x, self.betas = x, betas.to(x.device)
        self.num_chains, self.leapfrog_steps = num_chains, leapfrog_steps
        self._sites = list(sites.latents.values())
        self._maps = [to_unconstrained(site) for site in self._sites]
        self.start = Prior(model) if guide is None else proposal_of(model, guide, x, sites)
        draws = self._flat(self._draw(slice(None), _SCALE_DRAWS))
        # Of draws without a spread, and of one whose tails have no variance, something positive.
        spread = torch.quantile(draws, 0.84, dim=0) - torch.quantile(draws, 0.16, dim=0)
        self.scale = (0.5 * spread).clamp(min=1e-6)
        self._pieces(draws)
        pilot = max(_PILOT_LEAST, len(betas) // _PILOT_SHARE)
        self._pilot_betas = _thinned(self.betas, min(pilot, len(betas) - 1))
        calls = len(self._rows) * leapfrog_steps
        calls *= 2 * (len(betas) * len(self._chains) + len(self._pilot_betas))
        self.densities = Repeated(self._densities, calls)
        self._steps: dict[int, Tensor] = {}

    def _pieces(self, draws: Tensor) -> None:
        """Portions of the rows and of the chains that keep within the budget of memory."""
        x = self.x
        with forked_rng(0, x.device):
            largest = bytes_of_largest(
                lambda: self._densities(x, draws[:1], *self.start.params)
            )
        each = max(1, largest // len(x))
        pairs = max(1, chunk_bytes(x) // each)
        rows = min(len(x), max(1, pairs // self.num_chains))
        # Bounds of a support that differ between rows are those of all rows together.
        if any(support_name(site.support).endswith("for each row") for site in self._sites):
            rows = len(x)
        chains = min(self.num_chains, max(1, pairs // rows))
        rows = -(-len(x) // -(-len(x) // rows))
        chains = -(-self.num_chains // -(-self.num_chains // chains))
        self._rows = [slice(i, min(i + rows, len(x))) for i in range(0, len(x), rows)]
        self._chains = [
            min(chains, self.num_chains - i) for i in range(0, self.num_chains, chains)
        ]

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
            jacobian = jacobian + term.reshape(*u.shape[:2], -1).sum(-1)
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
            if rows.start not in self._steps:
                self._steps[rows.start] = self._pilot(rows)
            steps = self._steps[rows.start]
            found = [self._run(rows, count, steps, latents) for count in self._chains]
            weights.append(torch.cat([w for w, _ in found]))
            shares.append(torch.cat([a for _, a in found]).mean(dim=0))
        return torch.cat(weights, dim=1), torch.cat(shares)

    def _run(
        self, rows: slice, count: int, steps: Tensor, latents: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        order = range(1, len(self.betas))
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
            weights += (self.betas[t] - self.betas[t - 1]) * chains.log_ratio
            # Forwards to the density at t, backwards to the one before it.
            at = t if latents is None else t - 1
            if number < len(order) - 1:
                accepted += chains.move(self.betas[at], steps[at - 1])
        return weights, accepted / (len(order) - 1)

    def _pilot(self, rows: slice) -> Tensor:
        """Step sizes for the temperatures between the ends, ``(T - 1, rows)``."""
        count = min(_PILOT_CHAINS, self._chains[0])
        chains = _Chains(self, rows, self._flat(self._draw(rows, count)))
        log_step = torch.full_like(chains.start[0], math.log(_FIRST_STEP), dtype=torch.float64)
        inner = self._pilot_betas[1:-1]
        if not len(inner):
            inner = self.betas[1:2]
        found = []
        for number in range(-_PILOT_WARMUP, len(inner)):
            chance = chains.move(inner[max(0, number)], torch.exp(log_step)).double().mean(dim=0)
            log_step = log_step + _PILOT_RATE * (chance - _ACCEPTANCE)
            log_step = log_step.clamp(math.log(_LEAST_STEP), math.log(_MOST_STEP))
            if number >= 0:
                found.append(log_step)
        known = torch.stack(found)
        wanted = self.betas[1:-1]
        right = torch.searchsorted(inner, wanted).clamp(1, max(1, len(inner) - 1))
        if len(inner) == 1:
            return torch.exp(known.expand(len(wanted), -1))
        low, high = inner[right - 1], inner[right]
        share = ((wanted - low) / (high - low)).clamp(0, 1)[:, None]
        return torch.exp(torch.lerp(known[right - 1], known[right], share))


def _thinned(betas: Tensor, count: int) -> Tensor:
    """As many temperatures, spread as these are."""
    index = torch.linspace(0, len(betas) - 1, count + 1, dtype=torch.float64).round().long()
    return betas[index.to(betas.device)]
