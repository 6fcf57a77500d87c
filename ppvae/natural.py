r"""Natural-gradient ascent of the local ELBO over Gaussians, many rows at once.

Row n has :math:`q_n = N(m_n, L_n L_n^\top)` over u, with :math:`z = T(u)` for a fixed bijection
T. With draws :math:`u_s = m + L \epsilon_s` and gradients :math:`g_s = \nabla_u \log p(x, T(u_s))
|T'(u_s)|`, everything is read in units of the current q:

.. math:: \tilde g = L^\top \mathrm{E}[g], \qquad
          M = -\mathrm{E}[L^\top g\, \epsilon^\top] \;=\; L^\top \mathrm{E}[-\nabla^2] L

by Stein's identity, so that the expected curvature costs no further evaluation. The mean moves by
:math:`L M^{-1} \tilde g`, and the covariance towards :math:`L M^{-1} L^\top`, or, in a mean-field
family, its diagonal precision. On a Gaussian posterior one evaluation is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from ppvae.density import Program, joint
from ppvae.families import Family, GaussianFamily
from ppvae.graphs import Repeated

# Search ends for a row when it promises less than this, in nats; polishing does the rest.
_SEARCH_GAIN = 1e-2
# Evaluations on fresh draws in a round of polishing: each is a check of the point that it is at.
_ROUND = 4
_LEAST_CURVATURE = 0.02
# Nodes per axis of the product rules: few to come near, many to be sure.
_FEW_NODES, _MANY_NODES = 12, 32
# Nats by which the two rules may differ.
_MISLED = 0.1
# Farther out the weights are below 1e-9, and a model may overflow.
_FARTHEST_NODE = 6.5
# Evaluations of a row, all told: what a graph of them may hope for.
_EXPECTED_STEPS = 8
# Numbers in a temporary of one evaluation: this many stay in a core's cache.
_CACHED = 2**20
# Fewer rows than this cost as much time in calls as in arithmetic.
_LEAST_ROWS = 16
# Steps of a point on its way to a mode, and the squared distance from the fit's own mode, in units
# of its curvature, below which it has come to the same one.
_MODE_STEPS, _SAME_MODE = 16, 0.1


def whitened_draws(num_draws: int, size: int, like: Tensor) -> Tensor:
    """Standard normal draws with mean exactly 0 and covariance exactly 1, ``(num_draws, size)``.

    Scrambled Sobol points through the normal quantile function, each with its negative where they
    are enough for that, then centred, whitened and rotated. With the negatives all odd moments are
    exactly 0 too. The rotation, and with it the randomness, comes from torch's generator.
    """
    seed = int(torch.randint(2**31, ()))
    sobol = torch.quasirandom.SobolEngine(size, scramble=True, seed=seed)
    paired = num_draws % 2 == 0 and num_draws >= 3 * size
    uniform = sobol.draw(num_draws // 2 if paired else num_draws, dtype=torch.float64)
    normal = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))
    normal = torch.cat([normal, -normal]) if paired else normal - normal.mean(dim=0)
    root = torch.linalg.cholesky(normal.mT @ normal / num_draws)
    white = torch.linalg.solve_triangular(root, normal.mT, upper=False).mT
    rotation, triangle = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    rotation = rotation * torch.sign(triangle.diagonal())
    return (white @ rotation).to(like)


Nodes = tuple[Tensor, Tensor]
"""Standard normal nodes ``(S, D)`` and their weights ``(S,)``, which sum to 1."""


def _product_rule(per_axis: int, size: int, like: Tensor) -> Nodes:
    """Gauss–Hermite nodes and weights for ``size`` dimensions."""
    node, weight = np.polynomial.hermite_e.hermegauss(per_axis)
    near = np.abs(node) < _FARTHEST_NODE
    node, weight = node[near], weight[near] / weight[near].sum()
    axes = np.stack(np.meshgrid(*[node] * size, indexing="ij"), axis=-1).reshape(-1, size)
    weights = np.prod(np.meshgrid(*[weight] * size, indexing="ij"), axis=0).reshape(-1)
    return torch.as_tensor(axes).to(like), torch.as_tensor(weights).to(like)


@dataclass
class GaussianState:
    """Gaussians for some rows, and what one evaluation told about them.

    Attributes:
        loc: Means, ``(rows, D)``.
        tril: Cholesky factors, ``(rows, D, D)``.
        value: The local ELBO up to a constant, ``(rows,)``.
        gradient: Its gradient in the mean, in units of the Gaussian, ``(rows, D)``.
        curvature: Expected curvature in those units, ``(rows, D, D)``.
        higher: Expected third and fourth derivatives in those units, ``(rows, 2)``, of a scalar
            latent; ``(rows, 0)`` of others.
    """

    loc: Tensor
    tril: Tensor
    value: Tensor
    gradient: Tensor
    curvature: Tensor
    higher: Tensor

    def put(self, where: Tensor, other: GaussianState, chosen: Tensor) -> None:
        """Overwrite the rows ``where`` by the chosen rows of ``other``."""
        for field in fields(self):
            getattr(self, field.name)[where] = getattr(other, field.name)[chosen]

    @classmethod
    def joined(cls, parts: Sequence[GaussianState]) -> GaussianState:
        """The rows of several, in order."""
        names = [field.name for field in fields(cls)]
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def rows(self, where: Tensor) -> GaussianState:
        """The rows ``where``."""
        return GaussianState(*(getattr(self, field.name)[where] for field in fields(self)))


class GaussianElbo:
    """The local ELBO of a model over Gaussians of a given structure.

    Args:
        model: A Pyro model, which stays as it is while this object is in use.
        families: `GaussianFamily` by latent site.
        like: A tensor of the dtype and device to work in.
        rows: How many rows it will be evaluated for in all; where they are many, evaluations run
            as a graph (`ppvae.graphs.Repeated`).
    """

    def __init__(
        self, model: Program, families: Mapping[str, Family], like: Tensor, rows: int = 0
    ) -> None:
        self.model = model
        self._rows = rows
        self._repeated: Repeated | None = None
        self.families: dict[str, GaussianFamily] = {}
        blocks: list[Tensor] = []
        for name, family in families.items():
            assert isinstance(family, GaussianFamily)
            self.families[name] = family
            blocks.append(family.block_labels + sum(len(b) for b in blocks))
        label = torch.cat(blocks)
        self.size = len(label)
        self.structure = (label[:, None] == label[None, :]).to(like)
        self.diagonal = int(self.structure.sum()) == self.size

    def gaussian(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and Cholesky factor over all sites."""
        locs, trils, at = [], [], 0
        for family in self.families.values():
            loc, tril = family.gaussian(params[:, at : at + family.num_params])
            locs.append(loc)
            trils.append(tril)
            at += family.num_params
        out = params.new_zeros(len(params), self.size, self.size)
        at = 0
        for tril in trils:
            d = tril.shape[-1]
            out[:, at : at + d, at : at + d] = tril
            at += d
        return torch.cat(locs, dim=-1), out

    def params(self, loc: Tensor, tril: Tensor) -> Tensor:
        """λ of all sites: the inverse of `gaussian`."""
        parts, at = [], 0
        for family in self.families.values():
            span = slice(at, at + family.size)
            parts.append(family.from_gaussian(loc[:, span], tril[:, span, span]))
            at += family.size
        return torch.cat(parts, dim=-1)

    def nodes(self, num_draws: int, like: Tensor) -> Nodes:
        """Draws for one evaluation, or in one or two dimensions the nodes of a product rule."""
        if self.size <= 2:
            return _product_rule(_MANY_NODES, self.size, like)
        return whitened_draws(num_draws, self.size, like), like.new_full(
            (num_draws,), 1 / num_draws
        )

    def log_density(self, x: Tensor, u: Tensor) -> Tensor:
        """Log density of z = T(u) and the log volume of T, at ``u`` ``(S, batch, D)``."""
        values, jacobian, at = {}, torch.zeros(()).to(u), 0
        for name, family in self.families.items():
            part = u[..., at : at + family.size]
            values[name], term = family.from_normal(part)
            jacobian = jacobian + term
            at += family.size
        return joint(self.model, x, values) + jacobian

    def moments(
        self, x: Tensor, loc: Tensor, tril: Tensor, noise: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arithmetic of `evaluate`, a function of tensors alone, without a choice by value.

        Args:
            x: Rows, ``(rows, *event)``.
            loc: Means, ``(rows, D)``.
            tril: Cholesky factors, ``(rows, D, D)``.
            noise: Nodes, ``(S, D)``.
            weight: Their weights, ``(S,)``.

        Returns:
            ``value``, ``gradient``, ``curvature`` and ``higher`` of `GaussianState`.
        """
        scale = tril.diagonal(dim1=-2, dim2=-1)
        if self.diagonal:
            u = loc + scale * noise[:, None]
        else:
            u = loc + torch.einsum("nij,sj->sni", tril, noise)
        u = u.detach().requires_grad_(True)
        log_p = self.log_density(x, u)
        (gradient,) = torch.autograd.grad(log_p.sum(), u)
        scaled = gradient * scale if self.diagonal else torch.einsum("sni,nij->snj", gradient, tril)
        # Mean and all products with the nodes in one product of matrices.
        columns = [torch.ones_like(noise[:, :1]), -noise]
        if self.size == 1:  # Hermite polynomials: by Stein's identity again.
            columns += [noise**2 - 1, noise**3 - 3 * noise]
        sides = weight[:, None] * torch.cat(columns, dim=1)
        sums = (scaled.reshape(len(noise), -1).mT @ sides).reshape(*loc.shape, -1)
        moment, higher = sums[..., 1 : 1 + self.size], sums[:, 0, 1 + self.size :]
        value = weight @ log_p.detach() + torch.log(scale).sum(-1)
        return value, sums[..., 0], 0.5 * (moment + moment.mT), higher

    def evaluate(self, x: Tensor, loc: Tensor, tril: Tensor, nodes: Nodes) -> GaussianState:
        """One evaluation of value, gradient and curvature; all rows share the nodes.

        Rows go through `moments` in chunks that fit the cache. Their sizes are few for a given
        number of nodes: a chunk is filled up with copies of its last row.
        """
        noise, weight = nodes
        most = self.chunk(x, len(noise))
        if self._repeated is None:
            self._repeated = Repeated(self.moments, _EXPECTED_STEPS * self._rows // most)
        parts = []
        for at in range(0, len(x), most):
            rows = slice(at, at + most)
            (own, mean, root), count = _filled((x[rows], loc[rows], tril[rows]), most)
            moments = self._repeated(own, mean, root, noise, weight)
            parts.append([part[:count] for part in moments])
        columns = parts[0] if len(parts) == 1 else [torch.cat(c) for c in zip(*parts, strict=True)]
        return GaussianState(loc, tril, *columns)

    def values(self, x: Tensor, loc: Tensor, tril: Tensor, nodes: Nodes) -> Tensor:
        """The value alone, as in `evaluate`."""
        noise, weight = nodes
        parts = []
        most = self.chunk(x, len(noise))
        with torch.no_grad():
            for at in range(0, len(x), most):
                rows = slice(at, at + most)
                u = loc[rows] + torch.einsum("nij,sj->sni", tril[rows], noise)
                log_det = torch.log(tril[rows].diagonal(dim1=-2, dim2=-1)).sum(-1)
                parts.append(weight @ self.log_density(x[rows], u) + log_det)
        return torch.cat(parts)

    def chunk(self, x: Tensor, draws: int) -> int:
        """Rows of one call of `moments`, a power of 2."""
        width = max(4, self.size, x[0].numel())
        return max(_LEAST_ROWS, 2 ** int(math.log2(max(1, _CACHED // (draws * width)))))

    def step(
        self,
        state: GaussianState,
        radius: Tensor,
        rate: float | Tensor,
        curvature: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Move mean and covariance by a natural-gradient step, no further than ``radius``.

        Args:
            state: Where to step from.
            radius: ``(rows,)``: most the mean may move, in units of the current Gaussian.
            rate: Fraction of the full step, one for all rows or ``(rows,)``.
            curvature: What to precondition the mean's step with, the state's own if left out.
        """
        if isinstance(rate, Tensor):
            rate = rate[:, None]
        move = rate * _newton(state.curvature if curvature is None else curvature, state.gradient)
        length = move.norm(dim=-1).clamp(min=1e-30)
        move = move * (radius / length).clamp(max=1.0)[:, None]
        loc = state.loc + (state.tril @ move[..., None])[..., 0]
        # Precision moves from 1 towards the curvature; its logarithm by no more than 2 × radius.
        most = radius.clamp(max=1.0)[:, None]
        within = state.curvature * self.structure
        if self.diagonal:
            precision = 1 - rate + rate * within.diagonal(dim1=-2, dim2=-1)
            precision = _between(precision, most)
            return loc, state.tril * torch.rsqrt(precision)[:, None, :]
        values, vectors = torch.linalg.eigh(_finite(within))
        precision = _between(1 - rate + rate * values, most)
        root = state.tril @ (vectors * torch.rsqrt(precision)[:, None, :])
        triangle = torch.linalg.qr(root.mT, mode="r").R.mT * self.structure
        return loc, triangle * torch.sign(triangle.diagonal(dim1=-2, dim2=-1))[:, None, :]

    def scalar_step(self, state: GaussianState, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Newton's step in mean and log scale of a scalar latent, no further than ``radius``.

        With :math:`a_k = \mathrm{E}[\sigma g\, \mathrm{He}_k(\epsilon)]` the local ELBO has the
        gradient :math:`(a_0, 1 + a_1)` in :math:`(\mu / \sigma, \log \sigma)` and the second
        derivatives :math:`a_1`, :math:`a_2` and :math:`2 a_1 + a_3`. Where these are not those of a
        maximum the step is the one of `step`.

        Returns:
            Mean, Cholesky factor, and the gain that is to be expected, ``(rows,)``.
        """
        slope, m = state.gradient[:, 0], state.curvature[:, 0, 0]
        third, fourth = state.higher.unbind(-1)
        twice = 2 * m - fourth
        det = m * twice - third**2
        convex = (m > 0) & (det > 1e-3 * m**2)
        det = torch.where(convex, det, 1.0)
        plain = slope / m.abs().clamp(min=_LEAST_CURVATURE)
        growth = -0.5 * torch.log(m.clamp(min=math.exp(-2)))
        move = torch.where(convex, (twice * slope + third * (1 - m)) / det, plain)
        grow = torch.where(convex, (m * (1 - m) + third * slope) / det, growth)
        newton = 0.5 * (slope * move + (1 - m) * grow)
        promise = self.promise(state.gradient, state.curvature)
        expected = torch.where(convex, torch.maximum(newton, promise), promise)
        scale = state.tril[:, 0, 0]
        loc = state.loc[:, 0] + scale * torch.clamp(move, -radius, radius)
        most = radius.clamp(max=1.0)
        scale = scale * torch.exp(torch.clamp(grow, -most, most))
        return loc[:, None], scale[:, None, None], expected

    def promise(self, gradient: Tensor, curvature: Tensor) -> Tensor:
        """What the full step would gain were the curvature constant, in nats."""
        mean = 0.5 * (gradient * _newton(curvature, gradient)).sum(-1)
        within = curvature * self.structure
        spectrum = (
            within.diagonal(dim1=-2, dim2=-1)
            if self.diagonal
            else torch.linalg.eigvalsh(_finite(within))
        )
        spectrum = spectrum.clamp(min=_LEAST_CURVATURE)
        return mean + 0.5 * (spectrum - 1 - torch.log(spectrum)).sum(-1)


def _filled(columns: Sequence[Tensor], most: int) -> tuple[list[Tensor], int]:
    """Rows filled up to a multiple of an eighth of ``most``, and how many there were."""
    count = len(columns[0])
    missing = -count % max(1, most // 8)
    if missing == 0:
        return list(columns), count
    return [torch.cat([c, c[-1:].expand(missing, *c.shape[1:])]) for c in columns], count


def _between(precision: Tensor, most: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(precision, torch.exp(-2 * most)), torch.exp(2 * most))


def _finite(matrix: Tensor) -> Tensor:
    """The identity in place of matrices that hold NaN or infinities."""
    finite = torch.isfinite(matrix).all(dim=-1).all(dim=-1)
    return torch.where(finite[:, None, None], matrix, _identity(matrix.shape[-1], matrix))


def _newton(curvature: Tensor, gradient: Tensor) -> Tensor:
    """The step M⁻¹ g; directions of negative or no curvature are taken as convex ones."""
    if gradient.shape[-1] == 1:
        size = curvature[..., 0].abs()
        return gradient / torch.where(curvature[..., 0] > 0, size, size.clamp(min=_LEAST_CURVATURE))
    matrix = _finite(curvature)
    root, failed = torch.linalg.cholesky_ex(matrix)
    out = torch.cholesky_solve(gradient[..., None], root)[..., 0]
    rows = torch.nonzero(failed).flatten()
    if len(rows):
        values, vectors = torch.linalg.eigh(matrix[rows])
        along = (vectors.mT @ gradient[rows][..., None])[..., 0]
        along = along / values.abs().clamp(min=_LEAST_CURVATURE)
        out[rows] = (vectors @ along[..., None])[..., 0]
    return out


@dataclass
class Climb:
    """Where a climb ended, for each row.

    Attributes:
        loc: Means, ``(batch, D)``.
        tril: Cholesky factors, ``(batch, D, D)``.
        curvature: Expected curvature there in units of the Gaussian, ``(batch, D, D)``.
        gain: What a further step promises, in nats, ``(batch,)``.
        noise: What ``gain`` would be at the optimum, from noise alone; 0 with a product rule.
        steps: Evaluations spent, ``(batch,)``.
        lost: Whether the row ended lower than it began.
    """

    loc: Tensor
    tril: Tensor
    curvature: Tensor
    gain: Tensor
    noise: Tensor
    steps: Tensor
    lost: Tensor


def natural_ascent(
    local: GaussianElbo,
    x: Tensor,
    loc: Tensor,
    tril: Tensor,
    num_draws: int,
    max_steps: int,
    tolerance: float,
) -> Climb:
    """Climb from a Gaussian for each row to the row's optimum.

    First a search on fixed draws, where a step is kept only if it improves the row and the trust
    region shrinks where it does not; then rounds of steps on fresh draws at a falling rate, which
    remove the bias of the fixed ones. An evaluation on fresh draws is a check of the point where it
    is made: rows for which a round has shown more to gain than noise, or more noise than the
    tolerance, have another round; the others leave the batch.

    Args:
        local: The objective.
        x: Rows.
        loc: Means to start from, ``(batch, D)``.
        tril: Cholesky factors to start from, ``(batch, D, D)``.
        num_draws: Draws per evaluation.
        max_steps: Most evaluations per row; the first round is always made.
        tolerance: A row with less than this to gain, in nats, has arrived.
    """
    steps = torch.zeros(len(x), dtype=torch.long, device=x.device)
    loc, tril = loc.clone(), tril.clone()  # The search writes over where it began.
    if local.size <= 2:
        # The nodes of a rule are the same every time: there is no bias for fresh ones to remove.
        few = _product_rule(_FEW_NODES, local.size, loc)
        state = local.evaluate(x, loc, tril, few)
        began = state.value.clone()
        _search(local, x, state, few, steps, max_steps // 2, 0.1 * _SEARCH_GAIN)
        coarse, many = state.value, local.nodes(num_draws, loc)
        state = local.evaluate(x, state.loc, state.tril, many)
        # Where few nodes have misled, the climb begins again with many.
        misled = ~((state.value >= began) & ((state.value - coarse).abs() < _MISLED))
        where = torch.nonzero(misled).flatten()
        if len(where):
            again = local.evaluate(x[where], loc[where], tril[where], many)
            state.put(where, again, torch.arange(len(where), device=x.device))
        steps += 2
        _search(local, x, state, many, steps, max_steps, 0.01 * tolerance)
        gain = local.promise(state.gradient, state.curvature)
        none = torch.zeros_like(gain)
        return Climb(state.loc, state.tril, state.curvature, gain, none, steps, none > 0)
    fixed = local.nodes(num_draws, loc)
    state = local.evaluate(x, loc, tril, fixed)
    steps += 1
    began = state.value.clone()
    _search(local, x, state, fixed, steps, max(1, max_steps - _ROUND), _SEARCH_GAIN)
    average = state.curvature.clone()
    gain, noise = torch.zeros_like(state.value), torch.zeros_like(state.value)
    lost = torch.zeros_like(gain) > 0
    moving = torch.arange(len(x), device=x.device)
    left, taken = 1.0, 0
    while len(moving):
        rates = [1.2 / (taken + t + 2) for t in range(_ROUND)]
        here, fresh = _polish(
            local, x[moving], state.rows(moving), average[moving], num_draws, rates
        )
        state.put(moving, here, torch.arange(len(moving), device=x.device))
        average[moving] = here.curvature
        in_gain, in_spread, left = _shares(rates, left)
        gain[moving], spread = _promised(local, fresh)
        single = spread / in_spread
        noise[moving] = in_gain * single
        value = torch.stack([f.value for f in fresh])
        fell = began[moving] - value.mean(dim=0) - 4 * value.std(dim=0)
        lost[moving] = fell > tolerance
        steps[moving] += _ROUND
        taken += _ROUND
        unsure = left * single > tolerance
        more = gain[moving] - noise[moving] > noise[moving].clamp(min=0.5 * tolerance)
        moving = moving[(unsure | more) & (steps[moving] + _ROUND <= max_steps)]
    return Climb(state.loc, state.tril, average, gain, noise, steps, lost)


def _shares(rates: Sequence[float], left: float) -> tuple[float, float, float]:
    """How the noise of single evaluations adds up over a round of steps at these rates.

    To first order each evaluation sees the optimum displaced by a noise of its own, and a step
    takes the iterate a part of the way there.

    Args:
        rates: Rates of the steps.
        left: Variance of the iterate before, in units of that of one evaluation's noise.

    Returns:
        In the same units: the mean square of the mean promised step, the mean squared deviation
        of the steps from it, and the variance of the iterate after.
    """
    scale = np.sqrt(np.array([left] + [1.0] * len(rates)))
    iterate = np.eye(len(rates) + 1)[0]
    steps = []
    for t, rate in enumerate(rates):
        target = np.eye(len(rates) + 1)[t + 1]
        steps.append((target - iterate) * scale)
        iterate = iterate + rate * (target - iterate)
    array = np.stack(steps)
    mean = array.mean(axis=0)
    deviation = ((array - mean) ** 2).sum() / len(rates)
    return float((mean**2).sum()), float(deviation), float(((iterate * scale) ** 2).sum())


def _polish(
    local: GaussianElbo,
    x: Tensor,
    state: GaussianState,
    average: Tensor,
    num_draws: int,
    rates: Sequence[float],
) -> tuple[GaussianState, list[GaussianState]]:
    """Steps on fresh draws, with a running mean of the curvature, and what was seen on the way."""
    seen = []
    for rate in rates:
        fresh = local.evaluate(x, state.loc, state.tril, local.nodes(num_draws, x))
        fresh = _usable(fresh, state)
        seen.append(fresh)
        average = average + max(rate, 0.2) * (fresh.curvature - average)
        loc, tril = local.step(fresh, x.new_ones(len(x)), rate, average)
        state = replace(fresh, loc=loc, tril=tril, curvature=average)
    return state, seen


def _promised(local: GaussianElbo, seen: Sequence[GaussianState]) -> tuple[Tensor, Tensor]:
    """What the mean of several evaluations promises, and their mean squared deviation from it."""
    gradients = torch.stack([s.gradient for s in seen])
    curvatures = torch.stack([s.curvature for s in seen])
    gradient, curvature = gradients.mean(dim=0), curvatures.mean(dim=0)
    gain = local.promise(gradient, curvature)
    apart = torch.stack([0.5 * (g * _newton(curvature, g)).sum(-1) for g in gradients - gradient])
    # Near its optimum, where the curvature is 1, the covariance's part of a promise is this.
    wander = 0.25 * ((curvatures - curvature) * local.structure).square().sum((-1, -2))
    return gain, (apart + wander).mean(dim=0)


def other_modes(
    local: GaussianElbo, x: Tensor, here: Climb, starts: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Whether points climb to other modes of the density of u than the mean of the fit does.

    The density is :math:`p(x, T(u)) |T'(u)|`. Points climb by their gradient in units of the fit's
    curvature, in which the basin of the fit's own mode is nearly round, so that some steps of
    single points tell what a fit of its own from there would cost tens of evaluations of many
    draws to tell.

    Args:
        local: The objective.
        x: Rows.
        here: The fit.
        starts: Points to start from, ``(K, batch, D)``.

    Returns:
        For each start whether it came elsewhere, or not to rest, ``(K, batch)``; and where.
    """
    root, failed = torch.linalg.cholesky_ex(_finite(here.curvature))
    root = torch.where((failed == 0)[:, None, None], root, _identity(local.size, root))
    # u = loc + B y, with B = L C⁻ᵀ and M = C Cᵀ.
    basis = torch.linalg.solve_triangular(root.mT, here.tril, upper=True, left=False)
    inverse = torch.linalg.solve_triangular(
        here.tril, (starts - here.loc).movedim(0, -1), upper=False
    )
    away = (root.mT @ inverse).movedim(-1, 0)
    y = torch.cat([torch.zeros_like(away[:1]), away])

    def climb(y: Tensor) -> tuple[Tensor, Tensor]:
        values, gradients = [], []
        most = local.chunk(x, len(y))
        for at in range(0, len(x), most):
            rows = slice(at, at + most)
            u = here.loc[rows] + torch.einsum("nij,knj->kni", basis[rows], y[:, rows])
            u = u.detach().requires_grad_(True)
            log_p = local.log_density(x[rows], u)
            (gradient,) = torch.autograd.grad(log_p.sum(), u)
            values.append(torch.nan_to_num(log_p.detach(), nan=-torch.inf))
            gradients.append(torch.einsum("nij,kni->knj", basis[rows], gradient))
        return torch.cat(values, dim=1), torch.nan_to_num(torch.cat(gradients, dim=1))

    value, gradient = climb(y)
    rate = torch.full_like(value, 0.7)
    longest = 2 * local.size**0.5
    for _ in range(_MODE_STEPS):
        move = rate[..., None] * gradient
        length = move.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        new = y + move * (longest / length).clamp(max=1.0)
        there, slope = climb(new)
        better = there > value
        y = torch.where(better[..., None], new, y)
        gradient = torch.where(better[..., None], slope, gradient)
        value = torch.where(better, there, value)
        rate = torch.where(better, 1.3 * rate, 0.4 * rate)
        apart = (y[1:] - y[:1]).square().sum(-1)
        if bool((apart < 0.1 * _SAME_MODE).all()):
            break
    end = here.loc + torch.einsum("nij,knj->kni", basis, y[1:])
    return ~(apart < _SAME_MODE), end


def best_of_draws(local: GaussianElbo, x: Tensor) -> Tensor:
    """For each row the best of some standard normal draws of u, ``(batch, D)``."""
    draws = 16 if local.size == 1 else 64
    u = torch.randn(draws, 1, local.size).to(x)
    most = local.chunk(x, draws)
    best = []
    with torch.no_grad():
        for at in range(0, len(x), most):
            rows = x[at : at + most]
            log_p = local.log_density(rows, u.expand(draws, len(rows), local.size))
            best.append(torch.nan_to_num(log_p, nan=-torch.inf).argmax(dim=0))
    return u[torch.cat(best), 0]


def _identity(size: int, x: Tensor) -> Tensor:
    return torch.eye(size).to(x)


def _usable(fresh: GaussianState, last: GaussianState) -> GaussianState:
    """Rows whose evaluation is no number keep what was known of them before."""
    bad = ~torch.isfinite(fresh.gradient.sum(-1) + fresh.curvature.sum((-1, -2)))
    if bool(bad.any()):
        where = torch.nonzero(bad).flatten()
        fresh.gradient[where] = 0.0
        fresh.curvature[where] = last.curvature[where]
    return fresh


def _search(
    local: GaussianElbo,
    x: Tensor,
    state: GaussianState,
    fixed: Nodes,
    steps: Tensor,
    most: int,
    enough: float,
) -> None:
    """Trust-region ascent on fixed draws, in place; finished rows leave the batch.

    Args:
        local: The objective.
        x: Rows.
        state: Where to start, evaluated on ``fixed``.
        fixed: The draws.
        steps: ``(batch,)``, evaluations spent; counted on.
        most: Rows that have spent this many stop.
        enough: Rows that promise less than this, in nats, have arrived.
    """
    radius = x.new_full((len(x),), float(local.size) ** 0.5)
    moving = torch.arange(len(x), device=x.device)
    while True:
        here = state.rows(moving)
        if local.size == 1:
            *step, promise = local.scalar_step(here, radius[moving])
        else:
            promise = local.promise(here.gradient, here.curvature)
        chosen = (promise > enough) & (radius[moving] > 1e-3) & (steps[moving] < most)
        if not bool(chosen.any()):
            return
        moving, here = moving[chosen], here.rows(chosen)
        if local.size == 1:
            loc, tril = (part[chosen] for part in step)
        else:
            loc, tril = local.step(here, radius[moving], 1.0)
        there = local.evaluate(x[moving], loc, tril, fixed)
        steps[moving] += 1
        finite = torch.isfinite(there.value) & torch.isfinite(there.curvature).all(-1).all(-1)
        better = finite & (there.value > here.value)
        accepted = torch.nonzero(better).flatten()
        state.put(moving[accepted], there, accepted)
        radius[moving] = torch.where(better, 2 * radius[moving], 0.25 * radius[moving])
