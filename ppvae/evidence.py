r"""Estimates of log p(x) per datum, each with its error and the side that it bounds.

Everything here is in nats, higher is better, one figure per row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ppvae.configurations import (
    MOST_CONFIGURATIONS,
    joint_table,
    num_classes,
    num_configurations,
)
from ppvae.density import (
    LatentSite,
    Program,
    check_count,
    check_pair,
    draw_chunks,
    joint,
    judging,
    read_model,
    to_unconstrained,
    weighed,
)
from ppvae.guides import PerDatapoint
from ppvae.isolation import check_rows, unvalidated
from ppvae.progress import progress_bar
from ppvae.proposals import Freed, knows_any_value, mixture_weights

Bound = Literal["lower", "upper", "exact"]


@dataclass(frozen=True)
class Estimate:
    """A figure per datum, in nats, that knows its error.

    Attributes:
        value: ``(batch,)``.
        stderr: ``(batch,)``: the standard error of ``value``, or for a deterministic method a
            bound on its numerical error.
        bound: Which side of log p(x) the figure lies on, in expectation.
        method: How it was found, in a word.
    """

    value: Tensor
    stderr: Tensor
    bound: Bound
    method: str

    @property
    def mean(self) -> float:
        """Mean over the data, in nats per datum."""
        return float(self.value.double().mean())

    @property
    def mean_stderr(self) -> float:
        """Standard error of `mean` for these data (not for others of their kind)."""
        return float(self.stderr.double().square().sum().sqrt()) / len(self.stderr)

    def __repr__(self) -> str:
        side = {"lower": "lower bound", "upper": "upper bound", "exact": "exact"}[self.bound]
        return (
            f"Estimate({self.method}, {side}: {self.mean:.4f} ± {self.mean_stderr:.2g} nats a "
            f"datum over {len(self.value)} data)"
        )


def elbo(
    model: Program, guide: Program, x: Tensor, num_samples: int = 1000, *, seed: int = 0
) -> Estimate:
    r"""Evidence lower bound per datum, the mean of the log weights.

    .. math:: L_n = \frac1S \sum_s \log p(x_n, z_{sn}) - \log q(z_{sn} \mid x_n)

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guide: A Pyro guide with the same latent sites, called as ``guide(x)``.
        x: Rows, ``(batch, *event)``.
        num_samples: Draws S per row, at least 2.
        seed: Seed of the draws; the caller's generators are left as they were.

    Returns:
        The ELBO with its Monte Carlo standard error, a lower bound on log p(x).

    Raises:
        ValueError: If the rows, the model or the guide are unfit.

    Example:
        >>> import torch
        >>> from ppvae.models import ExponentialGaussian
        >>> from ppvae.guides import PerDatapoint
        >>> from ppvae.families import TruncatedNormal
        >>> guide = PerDatapoint(TruncatedNormal(), 1)  # untrained: its posterior is for x = 1
        >>> elbo(ExponentialGaussian(), guide, torch.tensor([1.0])).value
        tensor([-1.1931])
    """
    check_count("num_samples", num_samples, least=2)
    check_rows(x, model, guide)
    with judging(seed, x, model, guide), torch.no_grad():
        check_pair(model, guide, x)
        return _elbo(weighed(model, guide, x, num_samples))


def iwae(
    model: Program, guide: Program, x: Tensor, num_samples: int = 1000, *, seed: int = 0
) -> Estimate:
    r"""Importance-weighted evidence per datum, the log of the mean weight.

    .. math:: L_{S,n} = \log \frac1S \sum_s w_{sn}

    A lower bound on log p(x) in expectation, for every number of draws S, that rises with S
    (Burda, Grosse & Salakhutdinov 2015, theorem 1). A guide with lighter tails than the posterior
    leaves it short by more than its standard error says: look at k-hat beside it.

    Memory does not grow with the number of draws: the model is evaluated on a few draws of all rows
    at a time, so that its largest tensor takes 6.4 MB on a CPU and 256 MB on a GPU, and half a
    dozen such tensors are held. Many draws run as a graph, compiled where that is expected to pay,
    which may change the last digits from one run to the next.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guide: A Pyro guide with the same latent sites, called as ``guide(x)``.
        x: Rows, ``(batch, *event)``.
        num_samples: Draws S per row, at least 2.
        seed: Seed of the draws; the caller's generators are left as they were.

    Returns:
        The bound with the standard error of the log mean weight (delta method).

    Raises:
        ValueError: If the rows, the model or the guide are unfit.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> model, guide = pairs.exponential_gaussian()
        >>> iwae(model, guide, torch.tensor([0.5, 1.5]), num_samples=100).bound
        'lower'
    """
    check_count("num_samples", num_samples, least=2)
    check_rows(x, model, guide)
    with judging(seed, x, model, guide), torch.no_grad():
        check_pair(model, guide, x)
        return iwae_from(weighed(model, guide, x, num_samples))


def elbo_of(weights: Tensor) -> Estimate:
    """The ELBO of log weights ``(num_samples, batch)``."""
    return _elbo([weights])


def iwae_of(weights: Tensor) -> Estimate:
    """The importance-weighted evidence of log weights ``(num_samples, batch)``."""
    return iwae_from([weights])


class _Moments:
    """Sum and centred sum of squares per datum of draws that come in parts, in float64.

    Parts are merged as in Chan, Golub & LeVeque (1983): no digits are lost where the draws hardly
    differ.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0
        self._square: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        """Take further draws ``(draws, batch)`` in."""
        count, total = len(values), values.sum(dim=0, dtype=torch.float64)
        centred = values - (total / count).to(values.dtype)
        square = centred.square().sum(dim=0, dtype=torch.float64)
        if self.count:
            between = total / count - self.total / self.count
            square += between.square() * (self.count * count / (self.count + count))
        self.count += count
        self.total = self.total + total
        self._square = self._square + square

    def scale(self, factor: Tensor) -> None:
        """Multiply all draws until now."""
        self.total = self.total * factor
        self._square = self._square * factor.square()

    @property
    def stderr(self) -> Tensor:
        """The standard error of the mean, NaN for a single draw."""
        square = torch.as_tensor(self._square)
        return (square / (self.count - 1 or math.nan) / self.count).sqrt()


def _elbo(parts: Iterable[Tensor]) -> Estimate:
    moments = _Moments()
    for weights in parts:
        moments.add(weights)
        dtype = weights.dtype
    value = torch.as_tensor(moments.total) / moments.count
    return Estimate(value.to(dtype), moments.stderr.to(dtype), "lower", "elbo")


def iwae_from(parts: Iterable[Tensor]) -> Estimate:
    """The importance-weighted evidence of log weights that come in parts ``(draws, batch)``."""
    # The weights are summed relative to the largest one until now.
    moments = _Moments()
    top: Tensor | None = None
    for weights in parts:
        highest = weights.amax(dim=0)
        if top is not None:
            highest = torch.maximum(top, highest)
            moments.scale(torch.where(top == highest, 1.0, torch.exp((top - highest).double())))
        top = highest
        # Of weights that are all 0, or infinite, nothing is taken off.
        moments.add(torch.exp(weights - torch.where(torch.isinf(top), 0.0, top)))
    assert top is not None
    total = torch.as_tensor(moments.total)
    value = torch.where(torch.isinf(top), 0.0, top) + torch.log(total / moments.count)
    stderr = moments.stderr / (total / moments.count)
    return Estimate(value.to(top.dtype), stderr.to(top.dtype), "lower", "iwae")


def mixture_evidence(
    model: Program,
    guides: Sequence[PerDatapoint],
    x: Tensor,
    num_samples: int,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Estimate:
    r"""Importance-weighted evidence per datum, with the mixture of several guides as proposal.

    .. math:: \log \frac1{KS} \sum_{k,s} \frac{p(x_n, z_{ksn})}
              {\frac1K \sum_j q_j(z_{ksn})}, \qquad z_{ksn} \sim q_k

    S draws come from each of the K guides (the balance heuristic of Veach & Guibas 1995). The
    mean is unbiased for p(x) whatever the guides are, so its log is a lower bound in expectation,
    which a maximum over the guides would not be; and a guide that is far off spoils nothing, as
    the mixture is never less than a K-th of the best of them.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guides: Guides for these rows with the model's latent sites; see `per_datapoint`. If one
            of them is a flow without an inverse the last one alone is used.
        x: Rows, ``(batch, *event)``.
        num_samples: Draws S per row and guide, at least 2.
        seed: Seed of the draws; the caller's generators are left as they were.
        progress: Whether to show a progress bar, on a terminal or in a notebook.

    Returns:
        The bound with the standard error of the log mean weight (delta method).

    Raises:
        ValueError: If there is no guide, or the rows or the model are unfit.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> from ppvae.guides import per_datapoint
        >>> model, guide = pairs.exponential_gaussian()
        >>> x = torch.tensor([0.5, 1.5])
        >>> mixture_evidence(model, [per_datapoint(guide, x)], x, 100).bound
        'lower'
    """
    check_rows(x, model, *guides)
    check_count("num_samples", num_samples, least=2)
    if not guides:
        raise ValueError("guides: expected at least one guide; got none.")
    with judging(seed, x, model, *guides), unvalidated(), torch.no_grad():
        proposals = [Freed(model, guide.families, guide.params(x)) for guide in guides]
        if len(proposals) > 1 and not all(knows_any_value(each, x) for each in proposals):
            # A flow without an inverse knows the density of its own draws alone.
            proposals = proposals[-1:]
        total = len(proposals) * num_samples
        with progress_bar(total, "log p(x)", "draw", shown=progress) as bar:
            return mixture_of(mixture_weights(proposals, x, num_samples, bar))


def mixture_of(weights: Tensor) -> Estimate:
    """The importance-weighted evidence of log weights ``(K, S, batch)`` against a mixture."""
    count, num_samples = weights.shape[:2]
    # Relative to the largest one: next to a log p(x) of millions float32 rounds nats away.
    top = weights.amax(dim=(0, 1))
    relative = torch.exp(weights - torch.where(torch.isinf(top), 0.0, top))
    mean = relative.mean(dim=(0, 1))
    # Each proposal's draws are a sample of their own.
    variance = (relative / mean).var(dim=1).sum(dim=0) / num_samples
    value = torch.where(torch.isinf(top), 0.0, top) + torch.log(mean)
    return Estimate(value, variance.sqrt() / count, "lower", "iwae")


def exact_evidence(model: Program, x: Tensor) -> Estimate | None:
    """What the model's own ``log_evidence(x)`` says; `None` where it has none.

    Raises:
        ValueError: If that is no figure for each row.
    """
    exact = getattr(model, "log_evidence", None)
    if not callable(exact):
        return None
    with judging(0, x, model), torch.no_grad():
        value = exact(x)
    if not isinstance(value, Tensor) or value.shape != (len(x),):
        raise ValueError(
            f"model.log_evidence(x): expected a tensor of shape ({len(x)},), a figure for each "
            f"row; got {tuple(value.shape) if isinstance(value, Tensor) else value!r}."
        )
    return Estimate(value, torch.zeros_like(value), "exact", "exact")


def enumeration(model: Program, x: Tensor) -> Estimate:
    r"""Evidence by a sum over all values of the latent variables, where these are discrete.

    .. math:: \log p(x_n) = \log \sum_z p(x_n, z)

    Args:
        model: A Pyro model with one local plate, called as ``model(x)``, whose latent sites are
            discrete with at most 16,384 values together: 14 binary units, say.
        x: Rows, ``(batch, *event)``.

    Returns:
        log p(x), exact up to rounding; ``stderr`` is zero.

    Raises:
        ValueError: If a latent is continuous or has infinitely many values, there are too many
            values, or the rows or the model are unfit.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def coins(x):  # two fair coins, their sum observed with noise
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)
        >>> enumeration(coins, torch.tensor([1.0])).value
        tensor([-1.1380])
    """
    check_rows(x, model)
    with judging(0, x, model), torch.no_grad():
        sites = read_model(model, x)
        for site in sites.latents.values():
            if num_classes(site) is None:
                raise ValueError(
                    f"Site {site.name!r} ({site.family}) has infinitely many values, so there is "
                    f"no sum over them. Use ppvae.quadrature or ppvae.iwae."
                )
        count = num_configurations(sites)
        if count > MOST_CONFIGURATIONS:
            sizes = {s.name: s.event_shape for s in sites.latents.values()}
            raise ValueError(
                f"enumeration sums over at most {MOST_CONFIGURATIONS} values of the latent "
                f"variables; the model has {count:.3g}, in sites {sizes}. Use ppvae.iwae."
            )
        value = torch.logsumexp(joint_table(model, x, sites).double(), dim=0).to(x.dtype)
    return Estimate(value, torch.zeros_like(value), "exact", "enumeration")


# Log densities this far below the peak are left out of an integral: e⁻⁴⁵ < 1e-19.
_DEPTH = 45.0
# What is nearer to the peak than this must not touch the end of what can be integrated.
_EDGE = 25.0
_START = {1: 129, 2: 65}
_MOST_NODES = {1: 65_537, 2: 513}
_MOST_ROWS = {1: 4096, 2: 64}


def quadrature(
    model: Program, x: Tensor, *, tolerance: float = 1e-6, progress: bool = True
) -> Estimate:
    r"""Evidence by numerical integration, for latents of at most two dimensions.

    .. math:: \log p(x_n) = \log \int p(x_n, T(u))\, |\det T'(u)| \, du

    The latent is mapped to the reals by T. Each row has a window of its own, in two dimensions
    along the axes of its posterior, that grows until the log density has fallen by 45 nats; the
    trapezoidal rule, which converges geometrically there, is refined until two levels agree. A
    second mode that is narrower than the grid and far from the first can be missed.

    Args:
        model: A Pyro model with one local plate and at most two latent elements per datum.
        x: Rows, ``(batch, *event)``.
        tolerance: Wanted agreement between two levels, in nats; where rounding in the rows'
            floating point type is larger than that, agreement up to rounding.
        progress: Whether to show a progress bar, on a terminal or in a notebook.

    Returns:
        log p(x) with the last difference between two levels as its ``stderr``; ``bound`` is
        ``"exact"``. The ``stderr`` is infinite where the integrand does not end inside of what
        floating point numbers can reach, as with a Beta(0.02, 0.02) prior.

    Raises:
        ValueError: If the latent has more than two elements, is discrete, or the rows or the
            model are unfit.

    Example:
        >>> import torch
        >>> from ppvae.models import ExponentialGaussian
        >>> quadrature(ExponentialGaussian(), torch.tensor([1.5])).value
        tensor([-1.3689])
    """
    check_rows(x, model)
    with judging(0, x, model), torch.no_grad():
        sites = read_model(model, x)
        if sites.size > 2:
            shapes = {s.name: s.event_shape for s in sites.latents.values()}
            raise ValueError(
                f"quadrature integrates at most 2 latent dimensions per datum; the model has "
                f"{sites.size}, in sites {shapes}. Use ppvae.iwae."
            )
        dims = sites.size
        integrand = _Integrand(model, list(sites.latents.values()), dims)
        parts = []
        with progress_bar(len(x), "log p(x)", "row", shown=progress) as bar:
            for rows in x.split(_MOST_ROWS[dims]):
                parts.append(_integrate(integrand, rows, tolerance))
                bar.advance(len(rows))
    value, error = (torch.cat(column) for column in zip(*parts, strict=True))
    return Estimate(value, error, "exact", "quadrature")


@dataclass(frozen=True)
class _Integrand:
    """log p(x, T(u)) + log |det T'(u)| over the reals."""

    model: Program
    latents: list[LatentSite]
    dims: int

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        """Values ``(draws, batch)`` at ``u`` ``(draws, batch, dims)``, in float64.

        NaN where T has run out of numbers: z no longer moves with u, or is infinite.
        """
        sizes = draw_chunks(len(u), x)
        return torch.cat([self._evaluate(x, part) for part in u.split(sizes)])

    def _evaluate(self, x: Tensor, u: Tensor) -> Tensor:
        values: dict[str, Tensor] = {}
        jacobian = torch.zeros(u.shape[:2], dtype=torch.float64, device=u.device)
        spent = torch.zeros(u.shape[:2], dtype=torch.bool, device=u.device)
        at = 0
        for site in self.latents:
            part = u[..., at : at + site.size].to(x.dtype)
            part = part.reshape(*part.shape[:2], *site.event_shape)
            transform = to_unconstrained(site)
            z = transform(part)
            term = transform.log_abs_det_jacobian(part, z).double()
            jacobian = jacobian + term.reshape(*term.shape[:2], -1).sum(-1)
            moved = transform(part + part.abs().clamp(min=1.0) * 0.01)
            stuck = (moved == z) | ~torch.isfinite(z)
            spent = spent | stuck.reshape(*stuck.shape[:2], -1).any(-1)
            values[site.name] = z
            at += site.size
        total = joint(self.model, x, values).double() + jacobian
        return total.masked_fill(spent | torch.isnan(total) | torch.isposinf(total), torch.nan)


@dataclass
class _Frame:
    """Per row an affine map u = centre + axes v, and a window in v."""

    centre: Tensor
    axes: Tensor
    low: Tensor
    high: Tensor

    def __getitem__(self, rows: Tensor) -> _Frame:
        return _Frame(self.centre[rows], self.axes[rows], self.low[rows], self.high[rows])

    def grid(self, count: int) -> Tensor:
        """Nodes in u, ``(count ** dims, batch, dims)``, the first axis slowest."""
        dims = self.low.shape[1]
        unit = torch.linspace(0, 1, count, dtype=self.low.dtype, device=self.low.device)
        axes = torch.meshgrid(*[unit] * dims, indexing="ij")
        unit = torch.stack([axis.flatten() for axis in axes], dim=-1)[:, None, :]
        v = self.low + unit * (self.high - self.low)
        return self.centre + torch.einsum("nij,snj->sni", self.axes, v)

    def log_cell(self, count: int) -> Tensor:
        """Log volume of a grid cell in u."""
        volume = torch.log((self.high - self.low) / (count - 1)).sum(dim=-1)
        return volume + torch.log(self.axes.diagonal(dim1=-2, dim2=-1)).sum(dim=-1)


def _integrate(integrand: _Integrand, x: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    dims = integrand.dims
    low = x.new_full((len(x), dims), -10.0, dtype=torch.float64)
    eye = torch.eye(dims, dtype=torch.float64, device=x.device).expand(len(x), dims, dims)
    frame = _Frame(torch.zeros_like(low), eye.clone(), low, -low)
    if dims == 2:
        frame = _along_the_posterior(integrand, x, frame)
    count = _START[dims]
    for _ in range(60):
        log_f = integrand(x, frame.grid(count))
        new_low, new_high = _window(frame, log_f, count)
        width = frame.high - frame.low
        settled = ((new_low - frame.low).abs() < 0.1 * width).all(-1)
        settled &= ((new_high - frame.high).abs() < 0.1 * width).all(-1)
        frame = _Frame(frame.centre, frame.axes, new_low, new_high)
        if bool(settled.all()):
            break
    log_f = integrand(x, frame.grid(count))
    # What is left out there is below the rounding of the rows' own arithmetic.
    edge = min(_EDGE, -math.log(torch.finfo(x.dtype).eps) - 2)
    whole = settled & _ends_inside(log_f, count, dims, edge)
    value = _sum(log_f) + frame.log_cell(count)
    error = torch.full_like(value, torch.inf)
    # No finer grid removes the rounding of the model's own arithmetic.
    enough = (16 * torch.finfo(x.dtype).eps * value.abs()).clamp(min=tolerance)
    while count < _MOST_NODES[dims] and bool((whole & (error > enough)).any()):
        count = 2 * count - 1
        rows = torch.nonzero(whole & (error > enough)).flatten()
        finer = _sum(integrand(x[rows], frame[rows].grid(count))) + frame[rows].log_cell(count)
        error[rows] = (finer - value[rows]).abs()
        value[rows] = finer
    return value.to(x.dtype), error.to(x.dtype)


def _sum(log_f: Tensor) -> Tensor:
    """Log of the trapezoidal sum: the integrand vanishes at the ends, whose half weights do."""
    return torch.logsumexp(torch.nan_to_num(log_f, nan=-torch.inf), dim=0)


def _along_the_posterior(integrand: _Integrand, x: Tensor, frame: _Frame) -> _Frame:
    """Turn and scale the axes to the posterior's covariance, found coarse to fine.

    Moments are taken under the density to a power below one, low enough for a ridge that is
    narrower than the grid to cover some nodes of it; the next grid, in the new axes, needs less.
    """
    count = _START[2]
    for _ in range(40):
        u = frame.grid(count)
        log_f = torch.nan_to_num(integrand(x, u), nan=-torch.inf)
        heat = _heat(log_f)
        weight = torch.softmax(log_f / heat, dim=0)
        mean = torch.einsum("sn,sni->ni", weight, u)
        offset = u - mean
        covariance = torch.einsum("sn,sni,snj->nij", weight, offset, offset) / heat[:, None, None]
        # A fraction of a cell is the finest that a grid can tell.
        cell = (frame.high - frame.low) / (count - 1)
        least = torch.einsum("nij,nj,nkj->nik", frame.axes, (0.1 * cell) ** 2, frame.axes)
        axes = torch.linalg.cholesky(covariance + least)
        change = torch.linalg.solve_triangular(frame.axes, axes, upper=False)
        eye = torch.eye(2, dtype=axes.dtype, device=axes.device)
        frame = _Frame(mean, axes, torch.full_like(mean, -10.0), torch.full_like(mean, 10.0))
        if bool(((change - eye).abs().amax((-1, -2)) < 0.2).all()) and bool((heat <= 1).all()):
            break
    return frame


def _heat(log_f: Tensor, nodes: float = 30.0) -> Tensor:
    """The least temperature, at least 1, at which about ``nodes`` nodes share the weight."""
    low = torch.zeros(log_f.shape[1], dtype=log_f.dtype, device=log_f.device)
    high = low + 30.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        log_w = log_f / torch.exp(middle)
        effective = 2 * torch.logsumexp(log_w, 0) - torch.logsumexp(2 * log_w, 0)
        few = effective < math.log(nodes)
        low, high = torch.where(few, middle, low), torch.where(few, high, middle)
    heat = torch.exp(high)
    return torch.where(heat < 1.01, torch.ones_like(heat), heat)


def _window(frame: _Frame, log_f: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Per row and axis, the span on which log f is near its peak, one node wider on each side."""
    dims = frame.low.shape[1]
    log_f = torch.nan_to_num(log_f, nan=-torch.inf).reshape(*[count] * dims, -1)
    step = (frame.high - frame.low) / (count - 1)
    lows, highs = [], []
    for axis in range(dims):
        profile = log_f if dims == 1 else log_f.amax(dim=1 - axis)
        near = profile > profile.amax(dim=0) - _DEPTH
        position = torch.arange(count, device=log_f.device)[:, None]
        first = torch.where(near, position, count).amin(dim=0)
        last = torch.where(near, position, -1).amax(dim=0)
        low, high, width = frame.low[:, axis], frame.high[:, axis], step[:, axis]
        # A span that touches the window's end may go on beyond it, perhaps far.
        beyond = 2 * (high - low)
        lows.append(torch.where(first == 0, low - beyond, low + (first - 1) * width))
        highs.append(torch.where(last == count - 1, high + beyond, low + (last + 1) * width))
    return torch.stack(lows, dim=-1), torch.stack(highs, dim=-1)


def _ends_inside(log_f: Tensor, count: int, dims: int, edge: float) -> Tensor:
    """Rows whose integrand is negligible at the window's ends and where numbers run out."""
    shaped = log_f.reshape(*[count] * dims, -1)
    spent = torch.isnan(shaped)
    known = torch.nan_to_num(shaped, nan=-torch.inf)
    peak = known.flatten(0, dims - 1).amax(dim=0)
    out = torch.isfinite(peak)
    for axis in range(dims):
        ends = torch.maximum(known.select(axis, 0), known.select(axis, count - 1))
        before, after = known.narrow(axis, 0, count - 1), known.narrow(axis, 1, count - 1)
        next_spent = spent.narrow(axis, 1, count - 1)
        last_spent = spent.narrow(axis, 0, count - 1)
        beside = torch.maximum(
            before.masked_fill(~next_spent, -torch.inf), after.masked_fill(~last_spent, -torch.inf)
        )
        for part in (ends, beside):
            out &= part.reshape(-1, part.shape[-1]).amax(dim=0) < peak - edge
    return out
