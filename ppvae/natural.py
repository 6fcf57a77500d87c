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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppvae.density import Program, joint
from ppvae.families import Family, GaussianFamily

# Search ends for a row when it promises less than this, in nats; polishing does the rest.
_SEARCH_GAIN = 1e-2
_POLISH = 14
_REPLICATES = 4
_LEAST_CURVATURE = 0.02
_NODES_PER_AXIS = 32
# Farther out the weights are below 1e-9, and a model may overflow.
_FARTHEST_NODE = 6.5


def whitened_draws(num_draws: int, size: int, like: Tensor) -> Tensor:
    """Standard normal draws with mean exactly 0 and covariance exactly 1, ``(num_draws, size)``.

    Scrambled Sobol points through the normal quantile function, then centred, whitened and
    rotated. The rotation, and with it the randomness, comes from torch's generator.
    """
    seed = int(torch.randint(2**31, ()))
    sobol = torch.quasirandom.SobolEngine(size, scramble=True, seed=seed)
    uniform = sobol.draw(num_draws, dtype=torch.float64)
    normal = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))
    normal = normal - normal.mean(dim=0)
    root = torch.linalg.cholesky(normal.mT @ normal / num_draws)
    white = torch.linalg.solve_triangular(root, normal.mT, upper=False).mT
    rotation, triangle = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    rotation = rotation * torch.sign(triangle.diagonal())
    return (white @ rotation).to(like)


Nodes = tuple[Tensor, Tensor]
"""Standard normal nodes ``(S, D)`` and their weights ``(S,)``, which sum to 1."""


def _product_rule(size: int, like: Tensor) -> Nodes:
    """Gauss–Hermite nodes and weights for ``size`` dimensions."""
    node, weight = np.polynomial.hermite_e.hermegauss(_NODES_PER_AXIS)
    near = np.abs(node) < _FARTHEST_NODE
    node, weight = node[near], weight[near] / weight[near].sum()
    axes = np.stack(np.meshgrid(*[node] * size, indexing="ij"), axis=-1).reshape(-1, size)
    weights = np.prod(np.meshgrid(*[weight] * size, indexing="ij"), axis=0).reshape(-1)
    return torch.as_tensor(axes).to(like), torch.as_tensor(weights).to(like)


@dataclass
class GaussianState:
    """Gaussians for some rows, and what one evaluation told about them."""

    loc: Tensor
    tril: Tensor
    value: Tensor
    gradient: Tensor
    curvature: Tensor

    def put(self, where: Tensor, other: GaussianState, chosen: Tensor) -> None:
        """Overwrite the rows ``where`` by the chosen rows of ``other``."""
        for name in ("loc", "tril", "value", "gradient", "curvature"):
            getattr(self, name)[where] = getattr(other, name)[chosen]

    @classmethod
    def joined(cls, parts: Sequence[GaussianState]) -> GaussianState:
        """The rows of several, in order."""
        names = ("loc", "tril", "value", "gradient", "curvature")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def rows(self, where: Tensor) -> GaussianState:
        """The rows ``where``."""
        return GaussianState(
            self.loc[where],
            self.tril[where],
            self.value[where],
            self.gradient[where],
            self.curvature[where],
        )


class GaussianElbo:
    """The local ELBO of a model over Gaussians of a given structure."""

    def __init__(self, model: Program, families: Mapping[str, Family], like: Tensor) -> None:
        self.model = model
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
            return _product_rule(self.size, like)
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

    def evaluate(self, x: Tensor, loc: Tensor, tril: Tensor, nodes: Nodes) -> GaussianState:
        """One evaluation of value, gradient and curvature; all rows share the nodes."""
        noise, weight = nodes
        shift = torch.einsum("nij,sj->sni", tril, noise)
        u = (loc + shift).detach().requires_grad_(True)
        log_p = self.log_density(x, u)
        (gradient,) = torch.autograd.grad(log_p.sum(), u)
        scaled = torch.einsum("sni,nij->snj", gradient, tril)
        moment = -torch.einsum("sni,sj->nij", scaled, noise * weight[:, None])
        log_det = torch.log(tril.diagonal(dim1=-2, dim2=-1)).sum(-1)
        state = GaussianState(
            loc,
            tril,
            weight @ log_p.detach() + log_det,
            torch.einsum("s,sni->ni", weight, scaled),
            0.5 * (moment + moment.mT),
        )
        return state

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


def _between(precision: Tensor, most: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(precision, torch.exp(-2 * most)), torch.exp(2 * most))


def _finite(matrix: Tensor) -> Tensor:
    """The identity in place of matrices that hold NaN or infinities."""
    finite = torch.isfinite(matrix).all(dim=-1).all(dim=-1)
    return torch.where(finite[:, None, None], matrix, _identity(matrix.shape[-1], matrix))


def _newton(curvature: Tensor, gradient: Tensor) -> Tensor:
    """The step M⁻¹ g; directions of negative or no curvature are taken as convex ones."""
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


def natural_ascent(
    model: Program,
    families: Mapping[str, Family],
    x: Tensor,
    start: Tensor,
    num_draws: int,
    max_steps: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Climb from ``start`` to each row's optimum.

    First a search on fixed draws, where a step is kept only if it improves the row and the trust
    region shrinks where it does not; then steps on fresh draws at a falling rate, which remove
    the bias of the fixed ones; then a check on further draws of what is left to gain. Rows with
    more to gain than that check's noise go on at a still lower rate; the others leave the batch.

    Args:
        model: A Pyro model.
        families: `GaussianFamily` by latent site.
        x: Rows.
        start: λ of all sites, ``(batch, P)``.
        num_draws: Draws per evaluation.
        max_steps: Most evaluations per row, the last check aside.
        tolerance: A row with less than this to gain, in nats, has arrived.

    Returns:
        λ ``(batch, P)``, the gain that a further step promises, what that figure would be at the
        optimum from noise alone, and the evaluations spent, each ``(batch,)``.
    """
    local = GaussianElbo(model, families, start)
    fixed = local.nodes(num_draws, start)
    # The nodes of a rule are the same every time: there is no bias for fresh ones to remove.
    deterministic = local.size <= 2
    polish = 0 if deterministic else min(_POLISH, max(1, max_steps // 2))
    enough = 1e-6 if deterministic else _SEARCH_GAIN
    state = local.evaluate(x, *local.gaussian(start), fixed)
    steps = torch.ones(len(x), dtype=torch.long, device=x.device)
    _search(local, x, state, fixed, steps, max_steps - polish, enough)
    if deterministic:
        gain = local.promise(state.gradient, state.curvature)
        return local.params(state.loc, state.tril), gain, torch.zeros_like(gain), steps
    average = state.curvature.clone()
    gain, noise = torch.zeros_like(state.value), torch.zeros_like(state.value)
    moving, taken = torch.arange(len(x), device=x.device), 0
    while len(moving):
        here, rows = state.rows(moving), x[moving]
        here, average[moving] = _polish(
            local, rows, here, average[moving], num_draws, polish, taken
        )
        gain[moving], noise[moving] = _check(local, rows, here, num_draws)
        state.put(moving, here, torch.arange(len(moving), device=x.device))
        steps[moving] += polish + _REPLICATES
        taken += polish
        # A row whose promise is small, or inside of its noise, has arrived.
        open_ = gain - noise > noise.clamp(min=0.5 * tolerance)
        moving = moving[open_[moving] & (steps[moving] + polish <= max_steps)]
    return local.params(state.loc, state.tril), gain, noise, steps


def _polish(
    local: GaussianElbo,
    x: Tensor,
    state: GaussianState,
    average: Tensor,
    num_draws: int,
    count: int,
    taken: int,
) -> tuple[GaussianState, Tensor]:
    """Steps on fresh draws at a falling rate, with a running mean of the curvature."""
    for t in range(taken + 1, taken + count + 1):
        fresh = local.evaluate(x, state.loc, state.tril, local.nodes(num_draws, x))
        fresh = _usable(fresh, state)
        rate = min(0.8, 2.4 / (t + 1))
        average = average + max(1 / (t + 1), 0.2) * (fresh.curvature - average)
        loc, tril = local.step(fresh, x.new_ones(len(x)), rate, average)
        state = GaussianState(loc, tril, fresh.value, fresh.gradient, fresh.curvature)
    return state, average


def _check(
    local: GaussianElbo, x: Tensor, state: GaussianState, num_draws: int
) -> tuple[Tensor, Tensor]:
    """What a further step promises, and what that figure would be at the optimum from noise."""
    checks = [
        local.evaluate(x, state.loc, state.tril, local.nodes(num_draws, x))
        for _ in range(_REPLICATES)
    ]
    gradients = torch.stack([c.gradient for c in checks])
    curvatures = torch.stack([c.curvature for c in checks])
    gain = local.promise(gradients.mean(dim=0), curvatures.mean(dim=0))
    # At the optimum each replicate promises only its noise, and their mean a fraction of that.
    spread = local.promise(gradients.std(dim=0), _identity(local.size, x) + _wander(curvatures))
    return gain, spread / _REPLICATES


def start_at_a_mode(
    model: Program, families: Mapping[str, Family], x: Tensor, like: Tensor, draws: int = 64
) -> Tensor:
    """A narrow start for each row, at the best of some standard normal draws of u.

    The neutral start lies between the modes of a symmetric posterior, where it can stay.
    """
    local = GaussianElbo(model, families, like)
    u = torch.randn(draws, 1, local.size).to(like).expand(draws, len(x), -1)
    with torch.no_grad():
        log_p = torch.nan_to_num(local.log_density(x, u), nan=-torch.inf)
    best = log_p.argmax(dim=0)
    loc = u[best, torch.arange(len(x), device=x.device)]
    tril = 0.3 * _identity(local.size, like).expand(len(x), -1, -1)
    return local.params(loc, tril)


def _identity(size: int, x: Tensor) -> Tensor:
    return torch.eye(size).to(x)


def _wander(curvatures: Tensor) -> Tensor:
    return torch.diag_embed(curvatures.std(dim=0).diagonal(dim1=-2, dim2=-1))


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
    """Trust-region ascent on fixed draws, in place; finished rows leave the batch."""
    radius = x.new_full((len(x),), float(local.size) ** 0.5)
    for _ in range(most):
        promise = local.promise(state.gradient, state.curvature)
        moving = torch.nonzero((promise > enough) & (radius > 1e-3)).flatten()
        if len(moving) == 0:
            break
        here = state.rows(moving)
        loc, tril = local.step(here, radius[moving], 1.0)
        there = local.evaluate(x[moving], loc, tril, fixed)
        steps[moving] += 1
        finite = torch.isfinite(there.value) & torch.isfinite(there.curvature).all(-1).all(-1)
        better = finite & (there.value > here.value)
        chosen = torch.nonzero(better).flatten()
        state.put(moving[chosen], there, chosen)
        radius[moving] = torch.where(better, 2 * radius[moving], 0.25 * radius[moving])
