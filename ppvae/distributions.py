"""Distributions that Pyro lacks."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def _log_ndtr(y: Tensor) -> Tensor:
    out: Tensor = torch.special.log_ndtr(y)
    return out


def _inverse_mills(y: Tensor) -> Tensor:
    """The derivative of log Φ, φ(y)/Φ(y), without underflow in the left tail."""
    return torch.exp(-0.5 * y * y - _HALF_LOG_2PI - _log_ndtr(y))


def _ndtri_exp(v: Tensor) -> Tensor:
    """Solve log Φ(y) = v for y, at any v < 0 (torch's `ndtri` loses the left tail)."""
    with torch.no_grad():
        far = v.clamp(max=-2.0)
        tail = -torch.sqrt(-2 * far - 2 * _HALF_LOG_2PI - torch.log(-2 * far))
        y = torch.where(v > -2.0, torch.special.ndtri(torch.exp(v)), torch.nan_to_num(tail))
        for _ in range(4):
            # log Φ is concave, so Newton's method climbs to the root from the left.
            step = (_log_ndtr(y) - v) / _inverse_mills(y)
            y = torch.where(v < -2.0, y - step, y)
    # One more step, differentiable in v: dy/dv = Φ(y)/φ(y).
    return y - (_log_ndtr(y) - v) / _inverse_mills(y)


class TruncatedNormal(TorchDistribution):
    r"""A normal distribution kept to :math:`z \ge 0`.

    .. math:: \log p(z) = \log N(z; \mu, \sigma^2) - \log \Phi(\mu / \sigma)

    Draws are reparameterised through the inverse distribution function, which is evaluated on the
    log scale and so holds far in the tail (a location many scales below zero).

    Args:
        loc: Location of the parent normal, any real.
        scale: Scale of the parent normal, positive.

    Example:
        >>> import torch
        >>> q = TruncatedNormal(torch.tensor(0.0), torch.tensor(1.0))
        >>> round(float(q.mean), 4)  # sqrt(2 / pi)
        0.7979
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.nonnegative
    has_rsample = True

    def __init__(
        self, loc: Tensor | float, scale: Tensor | float, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TruncatedNormal:
        """A view with a larger batch shape."""
        new: TruncatedNormal = self._get_checked_instance(TruncatedNormal, _instance)
        shape = torch.Size(batch_shape)
        new.loc, new.scale = self.loc.expand(shape), self.scale.expand(shape)
        TorchDistribution.__init__(new, shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def _cut(self) -> Tensor:
        return self.loc / self.scale

    @property
    def mean(self) -> Tensor:
        """μ + σ φ(μ/σ)/Φ(μ/σ)."""
        # In double precision: far in the tail the two terms cancel.
        loc, scale = self.loc.double(), self.scale.double()
        return (loc + scale * _inverse_mills(loc / scale)).to(self.loc.dtype)

    @property
    def variance(self) -> Tensor:
        """σ² (1 − λ (λ + μ/σ)), λ = φ(μ/σ)/Φ(μ/σ)."""
        scale = self.scale.double()
        cut = self.loc.double() / scale
        mills = _inverse_mills(cut)
        return (scale**2 * (1 - mills * (mills + cut))).to(self.loc.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats."""
        if self._validate_args:
            self._validate_sample(value)
        standard = (value - self.loc) / self.scale
        normal = -0.5 * standard**2 - _HALF_LOG_2PI - torch.log(self.scale)
        return normal - _log_ndtr(self._cut)

    def cdf(self, value: Tensor) -> Tensor:
        """Distribution function, 1 − Φ((μ − z)/σ) / Φ(μ/σ)."""
        upper = _log_ndtr((self.loc - value) / self.scale) - _log_ndtr(self._cut)
        return -torch.expm1(upper)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile function."""
        tiny = torch.finfo(self.loc.dtype).tiny
        upper = torch.log1p(-value).clamp(min=math.log(tiny)) + _log_ndtr(self._cut)
        return (self.loc - self.scale * _ndtri_exp(upper)).clamp(min=0.0)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Reparameterised draws."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.icdf(torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device))

    def entropy(self) -> Tensor:
        """Differential entropy in nats."""
        cut = self._cut
        return (
            _HALF_LOG_2PI
            + 0.5
            + torch.log(self.scale)
            + _log_ndtr(cut)
            - 0.5 * cut * _inverse_mills(cut)
        )
