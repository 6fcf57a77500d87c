r"""What one did before stochastic gradients: EM and coordinate ascent, for linear Gaussian models.

Factor analysis and probabilistic PCA are conjugate given their parameters, so that every step has
a closed form: `em` climbs the exact evidence, `coordinate_ascent` the exact ELBO of the mean
field. Neither draws a random number. They work in float64 alone, in which an ascent is one to
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from ppvae.families import DiagonalNormal
from ppvae.guides import PerDatapoint
from ppvae.isolation import check_rows, seconds_now
from ppvae.models import PPCA, FactorAnalysis

# A noise variance below this share of its column's variance is on its way to zero.
_SMALLEST_NOISE = 1e-10
# Gains that are no larger than the evidence's own rounding.
_ROUNDING = 1e-13


@dataclass(frozen=True)
class EMFit:
    """What a run of EM did.

    Attributes:
        log_evidence: ``(steps + 1,)``: the exact log p(x) per datum before the first step and
            after each, in nats.
        steps: Number of steps taken.
        converged: Whether what is still to be gained is predicted to be below the tolerance.
        status: What happened, in words.
        seconds: Wall time.
    """

    log_evidence: Tensor
    steps: int
    converged: bool
    status: str
    seconds: float

    def __repr__(self) -> str:
        last = float(self.log_evidence[-1])
        return f"EMFit({self.status}; log evidence {last:.4f} nats a datum, {self.seconds:.1f} s)"


@dataclass(frozen=True)
class CoordinateAscent:
    """What a run of coordinate ascent did.

    Attributes:
        guide: The mean field of each row: its `DiagonalNormal` parameters in a table.
        elbo: ``(steps + 1,)``: the exact ELBO per datum before the first sweep and after each,
            in nats.
        row_elbo: ``(batch,)``: the exact ELBO of each row at the end.
        steps: Number of sweeps taken.
        converged: Whether what is still to be gained is predicted to be below the tolerance.
        status: What happened, in words.
        seconds: Wall time.
    """

    guide: PerDatapoint
    elbo: Tensor
    row_elbo: Tensor
    steps: int
    converged: bool
    status: str
    seconds: float

    def __repr__(self) -> str:
        last = float(self.elbo[-1])
        return (
            f"CoordinateAscent({self.status}; ELBO {last:.4f} nats a datum, {self.seconds:.1f} s)"
        )


def em(
    model: FactorAnalysis | PPCA, x: Tensor, *, max_steps: int = 2000, tolerance: float = 1e-6
) -> EMFit:
    r"""Maximum likelihood by expectation maximization, in place on the model's parameters.

    With S the covariance of the rows about μ, which is set to their mean, a step is

    .. math::
        \beta = (I + W^\top \Psi^{-1} W)^{-1} W^\top \Psi^{-1}, \quad
        E = I - \beta W + \beta S \beta^\top, \quad
        W' = S \beta^\top E^{-1}, \quad \Psi' = \mathrm{diag}(S - W' \beta S),

    with the mean of that diagonal for PPCA (Rubin & Thayer 1982; Tipping & Bishop 1999,
    appendix B). No step lowers the evidence. A step costs nothing that grows with the number of
    rows. Parameters that are held fixed stay as they are.

    Args:
        model: The model, in float64.
        x: Rows, ``(batch, x_dim)``, in float64.
        max_steps: Most steps.
        tolerance: Nats per datum: the run ends when Aitken's extrapolation of the last gains
            predicts less than this until the limit.

    Returns:
        The record of the run. In factor analysis the noise of a column may go to zero (a Heywood
        case); then the run ends, and ``status`` names the column.

    Raises:
        ValueError: If the rows or the model are unfit or not float64, an argument is out of
            range, all parameters are held fixed, or a column of ``x`` does not vary.

    Example:
        >>> import torch
        >>> from ppvae.models import PPCA
        >>> x = torch.randn(100, 4, dtype=torch.float64) @ torch.diag(torch.arange(1.0, 5)).double()
        >>> model = PPCA(4, 2).double()
        >>> fit = em(model, x)
        >>> best = PPCA.maximum_likelihood(x, z_dim=2).log_evidence(x).mean()
        >>> bool((fit.log_evidence[-1] - best).abs() < 1e-5)
        True
    """
    _check(model, x, max_steps, tolerance)
    if not _free(model):
        raise ValueError(
            "model: all its parameters are held fixed, so that EM has nothing to learn; "
            "model.requires_grad_() frees them."
        )
    _check_variation(model, x)
    began = seconds_now(x.device)
    x = x.detach()
    with torch.no_grad():
        covariance = _about(x, model.loc)
        values = [_evidence(model, covariance)]

        def step() -> float:
            nonlocal covariance
            if model.loc.requires_grad:
                model.loc.copy_(x.mean(dim=0))
                covariance = _about(x, model.loc)
            beta, precision = _regression(model)
            xz = covariance @ beta.mT
            zz = torch.linalg.inv(precision) + beta @ xz
            _maximize(model, covariance.diagonal(), xz, zz)
            values.append(_evidence(model, covariance))
            return values[-1]

        steps, converged, status = _climb(
            step, values[0], max_steps, tolerance, lambda: _vanishing(model, x)
        )
    return EMFit(
        log_evidence=torch.tensor(values, dtype=torch.float64),
        steps=steps,
        converged=converged,
        status=status,
        seconds=seconds_now(x.device) - began,
    )


def coordinate_ascent(
    model: FactorAnalysis | PPCA,
    x: Tensor,
    *,
    learn_model: bool = False,
    max_steps: int = 2000,
    tolerance: float = 1e-6,
) -> CoordinateAscent:
    r"""Mean-field inference by coordinate ascent, all rows at once.

    With :math:`\Lambda = I + W^\top \Psi^{-1} W` and :math:`h_n = W^\top \Psi^{-1} (x_n - \mu)`
    the factor of coordinate d that is best given the others is

    .. math::
        q(z_{nd}) = N\Big(\frac{h_{nd} - \sum_{e \ne d} \Lambda_{de} m_{ne}}{\Lambda_{dd}},
        \frac{1}{\Lambda_{dd}}\Big)

    (Bishop 2006, section 10.1.2). A sweep updates all coordinates in turn, from the prior on. With
    the model fixed its limit has the exact posterior means, and variances that are too small.

    Args:
        model: The model, in float64.
        x: Rows, ``(batch, x_dim)``, in float64.
        learn_model: Whether each sweep is followed by the maximization of the ELBO over the
            model's free parameters, in place: variational EM. The ELBO then climbs to the same
            maximum as the evidence, as a rotation of W makes the posterior mean-field.
        max_steps: Most sweeps.
        tolerance: As in `em`, of the ELBO.

    Returns:
        The record of the run, with a guide for these rows.

    Raises:
        ValueError: As `em`; all parameters may be held fixed unless ``learn_model``.

    Example:
        >>> import torch
        >>> from ppvae.models import FactorAnalysis
        >>> model = FactorAnalysis(6, 3).double()
        >>> x = torch.randn(20, 6, dtype=torch.float64)
        >>> fit = coordinate_ascent(model, x, tolerance=1e-12)
        >>> mean = fit.guide.params(x)["z"][:, :3]
        >>> bool((mean - model.posterior(x).mean).abs().max() < 1e-5)
        True
    """
    _check(model, x, max_steps, tolerance)
    if learn_model and not _free(model):
        raise ValueError(
            "learn_model=True: all parameters of the model are held fixed; "
            "model.requires_grad_() frees them."
        )
    if learn_model:
        _check_variation(model, x)
    began = seconds_now(x.device)
    x = x.detach()
    with torch.no_grad():
        mean = x.new_zeros(len(x), model.z_dim)
        variance = x.new_ones(model.z_dim)
        values = [float(_row_elbo(model, x, mean, variance).mean())]

        def step() -> float:
            scaled = model.loadings / _variance(model)[:, None]
            precision = _precision(model)
            linear = (x - model.loc) @ scaled
            variance.copy_(1 / precision.diagonal())
            for d in range(model.z_dim):
                # The coordinate's own term, which the sum has too, is added back.
                rest = linear[:, d] - mean @ precision[d] + mean[:, d] * precision[d, d]
                mean[:, d] = rest * variance[d]
            if learn_model:
                if model.loc.requires_grad:
                    model.loc.copy_((x - mean @ model.loadings.mT).mean(dim=0))
                centred = x - model.loc
                zz = variance.diag() + mean.mT @ mean / len(x)
                _maximize(model, centred.square().mean(dim=0), centred.mT @ mean / len(x), zz)
            values.append(float(_row_elbo(model, x, mean, variance).mean()))
            return values[-1]

        stop = (lambda: _vanishing(model, x)) if learn_model else (lambda: None)
        steps, converged, status = _climb(step, values[0], max_steps, tolerance, stop)
        row_elbo = _row_elbo(model, x, mean, variance)
        guide = PerDatapoint(DiagonalNormal(model.z_dim), len(x)).to(x)
        log_scale = 0.5 * variance.log().expand_as(mean)
        guide.table("z").weight.copy_(torch.cat([mean, log_scale], dim=-1))
    return CoordinateAscent(
        guide=guide,
        elbo=torch.tensor(values, dtype=torch.float64),
        row_elbo=row_elbo,
        steps=steps,
        converged=converged,
        status=status,
        seconds=seconds_now(x.device) - began,
    )


def _check(model: Any, x: Tensor, max_steps: int, tolerance: float) -> None:
    if not isinstance(model, (FactorAnalysis, PPCA)):
        raise ValueError(
            f"model: expected FactorAnalysis or PPCA, whose steps have a closed form; got "
            f"{type(model).__name__}."
        )
    check_rows(x, model)
    if x.dtype != torch.float64 or model.loadings.dtype != torch.float64:
        raise ValueError(
            f"Expected float64, in which an ascent is one to rounding; got x in {x.dtype} and the "
            f"model in {model.loadings.dtype}. Convert them: x.double(), model.double()."
        )
    if tuple(x.shape[1:]) != (model.x_dim,):
        raise ValueError(
            f"x: expected shape (batch, {model.x_dim}) for {model!r}; got {tuple(x.shape)}."
        )
    if max_steps < 1 or not tolerance > 0:
        raise ValueError(
            f"max_steps must be at least 1 and tolerance positive; got {max_steps} and {tolerance}."
        )


def _check_variation(model: FactorAnalysis | PPCA, x: Tensor) -> None:
    """Refuse columns that would take their noise to zero, and the evidence to infinity."""
    constant = (x == x[:1]).all(dim=0)
    if bool(constant.all() if isinstance(model, PPCA) else constant.any()):
        raise ValueError(
            f"x: columns {constant.nonzero().flatten().tolist()} do not vary over the {len(x)} "
            f"rows, so that the evidence has no maximum. Leave them out, or give more rows."
        )


def _free(model: FactorAnalysis | PPCA) -> bool:
    return any(p.requires_grad for p in model.parameters())


def _about(x: Tensor, loc: Tensor) -> Tensor:
    """The covariance of the rows about ``loc``, ``(x_dim, x_dim)``."""
    centred = x - loc
    return centred.mT @ centred / len(x)


def _variance(model: FactorAnalysis | PPCA) -> Tensor:
    """The diagonal of Ψ, ``(x_dim,)``."""
    return (model.noise**2).expand(model.x_dim)


def _precision(model: FactorAnalysis | PPCA) -> Tensor:
    """The posterior's precision I + Wᵀ Ψ⁻¹ W."""
    scaled = model.loadings / _variance(model)[:, None]
    eye = torch.eye(model.z_dim, dtype=scaled.dtype, device=scaled.device)
    return eye + model.loadings.mT @ scaled


def _regression(model: FactorAnalysis | PPCA) -> tuple[Tensor, Tensor]:
    """β of E[z | x] = β (x − μ), and the posterior's precision."""
    precision = _precision(model)
    scaled = model.loadings / _variance(model)[:, None]
    return torch.linalg.solve(precision, scaled.mT), precision


def _evidence(model: FactorAnalysis | PPCA, covariance: Tensor) -> float:
    """The mean of log p(x) over rows with this covariance about μ."""
    variance = _variance(model)
    beta, precision = _regression(model)
    # tr (W Wᵀ + Ψ)⁻¹ S, with the inverse as Ψ⁻¹ (I − W β).
    unexplained = covariance - model.loadings @ (beta @ covariance)
    trace = (unexplained.diagonal() / variance).sum()
    log_volume = torch.linalg.slogdet(precision).logabsdet + variance.log().sum()
    return float(-0.5 * (model.x_dim * math.log(2 * math.pi) + log_volume + trace))


def _row_elbo(model: FactorAnalysis | PPCA, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """E log p(x | z) − KL(q ‖ N(0, I)) of each row, ``(batch,)``."""
    noise = _variance(model)
    residual = (x - model.loc - mean @ model.loadings.mT).square()
    spread = model.loadings.square() @ variance
    log_likelihood = -0.5 * ((residual + spread) / noise + (2 * math.pi * noise).log()).sum(-1)
    divergence = 0.5 * (mean.square() + variance - variance.log() - 1).sum(-1)
    return log_likelihood - divergence


def _maximize(model: FactorAnalysis | PPCA, xx: Tensor, xz: Tensor, zz: Tensor) -> None:
    """The M-step: W, then Ψ, from moments under q about μ.

    Args:
        model: The model; what is held fixed in it stays.
        xx: Mean of the squares (x − μ)², ``(x_dim,)``.
        xz: Mean of (x − μ) E[z]ᵀ, ``(x_dim, z_dim)``.
        zz: Mean of E[z zᵀ], ``(z_dim, z_dim)``.
    """
    if model.loadings.requires_grad:
        model.loadings.copy_(torch.linalg.solve(zz, xz.mT).mT)
    unconstrained: Any = model.noise_unconstrained
    if unconstrained.requires_grad:
        W = model.loadings
        variance = xx + ((W @ zz - 2 * xz) * W).sum(dim=-1)
        if isinstance(model, PPCA):
            variance = variance.mean()
        # Positive but for rounding, where it vanishes.
        variance = variance.clamp(min=torch.finfo(variance.dtype).tiny)
        unconstrained.copy_(biject_to(constraints.positive).inv(variance.sqrt()))


def _vanishing(model: FactorAnalysis | PPCA, x: Tensor) -> str | None:
    """What to say where the noise goes to zero, and the evidence perhaps to infinity."""
    share = _variance(model) / x.var(dim=0, correction=0)
    if isinstance(model, PPCA):
        share = _variance(model)[:1] / x.var(dim=0, correction=0).mean()
    if not bool((share < _SMALLEST_NOISE).any()):
        return None
    where = "" if isinstance(model, PPCA) else f" of column {int(share.argmin())} of x"
    return f"the noise{where} goes to zero: lower z_dim, or give more rows"


def _climb(
    step: Callable[[], float],
    start: float,
    max_steps: int,
    tolerance: float,
    stop: Callable[[], str | None],
) -> tuple[int, bool, str]:
    """Take steps until what is left to gain is below the tolerance.

    The gains of a linearly convergent ascent fall by a factor r a step, so that gain · r / (1 − r)
    is left (Aitken's extrapolation; Böhning et al. 1994). A small gain alone may be a slow ascent.

    Returns:
        The steps taken, whether the ascent has converged, and a status in words.
    """
    before, last = start, math.inf
    for count in range(1, max_steps + 1):
        value = step()
        gain = value - before
        if (reason := stop()) is not None:
            return count, False, f"stopped at step {count}: {reason}"
        if abs(gain) <= _ROUNDING * max(1.0, abs(value)):
            return count, True, f"converged after {count} steps"
        ratio = gain / last
        if 0 < ratio < 1 and count > 2 and gain * ratio / (1 - ratio) < tolerance:
            return count, True, f"converged after {count} steps"
        before, last = value, gain
    return max_steps, False, f"not converged after {max_steps} steps: raise max_steps"
