"""Distributions that Pyro lacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import Independent, Normal, TorchDistribution
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


class FloatCategorical(dist.Categorical):
    r"""A categorical distribution whose draws 0, …, K − 1 are floating point, as rows are.

    Args:
        probs: Class probabilities, ``(*, K)``.
        logits: Their logarithms, up to a constant, in place of them.

    Example:
        >>> import torch
        >>> FloatCategorical(logits=torch.tensor([0.0, -torch.inf])).sample()
        tensor(0.)
    """

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws in the dtype of the logits."""
        classes: Tensor = super().sample(sample_shape)
        return classes.to(self.logits.dtype)


class Poisson(TorchDistribution):
    r"""Counts of a given log rate: :math:`\log p(x) = x \eta - e^\eta - \log x!`.

    torch's own takes the rate, whose logarithm is lost where it underflows and whose density is
    not a number where it overflows. The three terms are each far larger than what is left of them
    where counts are large; they are summed in double precision, whatever the dtype.

    Args:
        log_rate: η, any real.

    Example:
        >>> import torch
        >>> Poisson(torch.tensor(-200.0)).log_prob(torch.tensor(1.0))
        tensor(-200.)
    """

    arg_constraints = {"log_rate": constraints.real}
    support = constraints.nonnegative_integer

    def __init__(self, log_rate: Tensor, validate_args: bool | None = None) -> None:
        self.log_rate = log_rate
        super().__init__(self.log_rate.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Poisson:
        """A view with a larger batch shape."""
        new: Poisson = self._get_checked_instance(Poisson, _instance)
        shape = torch.Size(batch_shape)
        new.log_rate = self.log_rate.expand(shape)
        TorchDistribution.__init__(new, shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """The rate."""
        return torch.exp(self.log_rate)

    @property
    def variance(self) -> Tensor:
        """The rate."""
        return self.mean

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability in nats."""
        if self._validate_args:
            self._validate_sample(value)
        x, log_rate = value.double(), self.log_rate.double()
        log_prob = x * log_rate - torch.exp(log_rate) - torch.lgamma(x + 1)
        return log_prob.to(torch.promote_types(value.dtype, self.log_rate.dtype))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws."""
        with torch.no_grad():
            return torch.poisson(self.mean.expand(self._extended_shape(torch.Size(sample_shape))))


class PoissonOfRate(dist.Poisson):
    r"""Pyro's Poisson distribution of a given rate, with its density summed in double precision.

    The terms :math:`x \log \lambda`, λ and :math:`\log x!` cancel where counts are large.

    Example:
        >>> import torch
        >>> PoissonOfRate(torch.tensor(1e6)).log_prob(torch.tensor(1e6))
        tensor(-7.8267)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability in nats."""
        if self._validate_args:
            self._validate_sample(value)
        x, rate = value.double(), self.rate.double()
        log_prob = torch.xlogy(x, rate) - rate - torch.lgamma(x + 1)
        return log_prob.to(torch.promote_types(value.dtype, self.rate.dtype))


# From here on the first terms of Stirling's series give log Γ to 1e-14.
_LARGE = 16.0
# The largest |log α| of a negative binomial.
_MOST = 30.0


def _stirling(y: Tensor) -> Tensor:
    """log Γ(y) − (y − ½) log y + y − ½ log 2π for y of at least `_LARGE`."""
    w = 1 / (y * y)
    return (1 / 12 - w * (1 / 360 - w * (1 / 1260 - w / 1680))) / y


class NegativeBinomial(TorchDistribution):
    r"""Counts whose variance exceeds their mean: :math:`\mathrm{Var}\,x = \mu + \alpha \mu^2`.

    A Poisson whose rate is the mean μ times a Gamma variable of mean 1 and variance α. With
    r = 1/α,

    .. math:: p(x) = \frac{\Gamma(r + x)}{\Gamma(r)\, x!}
              \left(\frac{r}{r + \mu}\right)^{r} \left(\frac{\mu}{r + \mu}\right)^{x}

    torch's own takes r, and loses its digits where r is large: log Γ(r + x) − log Γ(r) cancels.
    Here it is the Poisson distribution in the limit α → 0. The terms are summed in double
    precision, whatever the dtype: with large counts they are far larger than their sum.

    Args:
        log_mean: log μ, any real.
        log_dispersion: log α, any real. Beyond ±30 it counts as ±30, without a gradient: by then
            the distribution is the Poisson, or a point at 0, in all but the rarest counts.

    Example:
        >>> import torch
        >>> p = NegativeBinomial(torch.tensor(0.0), torch.tensor(0.0))
        >>> p.log_prob(torch.tensor(0.0))  # μ = α = 1: geometric
        tensor(-0.6931)
    """

    arg_constraints = {"log_mean": constraints.real, "log_dispersion": constraints.real}
    support = constraints.nonnegative_integer

    def __init__(
        self,
        log_mean: Tensor | float,
        log_dispersion: Tensor | float,
        validate_args: bool | None = None,
    ) -> None:
        self.log_mean, self.log_dispersion = broadcast_all(log_mean, log_dispersion)
        super().__init__(self.log_mean.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> NegativeBinomial:
        """A view with a larger batch shape."""
        new: NegativeBinomial = self._get_checked_instance(NegativeBinomial, _instance)
        shape = torch.Size(batch_shape)
        new.log_mean = self.log_mean.expand(shape)
        new.log_dispersion = self.log_dispersion.expand(shape)
        TorchDistribution.__init__(new, shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """μ."""
        return torch.exp(self.log_mean)

    @property
    def variance(self) -> Tensor:
        """μ + α μ²."""
        return self.mean * (1 + torch.exp(self._bounded + self.log_mean))

    @property
    def _bounded(self) -> Tensor:
        """log α where r = 1/α and its derivatives are numbers."""
        return self.log_dispersion.clamp(-_MOST, _MOST)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability in nats."""
        if self._validate_args:
            self._validate_sample(value)
        x, log_mean, log_dispersion = value.double(), self.log_mean.double(), self._bounded.double()
        r = torch.exp(-log_dispersion)
        # log1p(α μ), also where α μ overflows.
        spread = torch.nn.functional.softplus(log_mean + log_dispersion)
        # log Γ(r + x) − log Γ(r) − x log r, each way with an r for which it is exact and its
        # derivatives are finite.
        near, far = r.clamp(max=_LARGE), r.clamp(min=_LARGE)
        small = torch.lgamma(near + x) - torch.lgamma(near) + x * log_dispersion
        large = (far + x - 0.5) * torch.log1p(x / far) - x
        large = large + _stirling(far + x) - _stirling(far)
        rising = torch.where(r < _LARGE, small, large)
        log_prob = x * log_mean - torch.lgamma(x + 1) + rising - (r + x) * spread
        return log_prob.to(torch.promote_types(value.dtype, self.log_mean.dtype))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws, by way of the Gamma variable."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            r = torch.exp(-self._bounded).expand(shape)
            return torch.poisson(self.mean * torch.distributions.Gamma(r, r).sample())


class Weibull(dist.Weibull):
    r"""Pyro's Weibull distribution with draws that are positive numbers.

    A draw :math:`s E^{1/k}` with a small concentration k may be 0 in floating point arithmetic,
    where no density is finite. Such a draw is put at the smallest normal number, as torch does
    with a gamma distribution's.

    Example:
        >>> import torch
        >>> q = Weibull(torch.tensor(1.0), torch.tensor(0.01))
        >>> bool((q.sample((1000,)) > 0).all())
        True
    """

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draws, differentiable where they are not at the smallest number."""
        z: Tensor = super().rsample(torch.Size(sample_shape))
        return z.clamp(min=torch.finfo(z.dtype).tiny)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draws without gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)


class BernoulliVector(dist.Independent):
    r"""Independent binary elements.

    .. math:: p(z) = \prod_d \sigma(o_d)^{z_d} (1 - \sigma(o_d))^{1 - z_d}

    Pyro's ``Bernoulli(logits).to_event(1)``, which in addition lists its :math:`2^d` values.
    Pyro's own cannot, and `pyro.infer.config_enumerate` passes over it without a word, so that
    `TraceEnum_ELBO` would draw where it was to sum.

    Args:
        logits: :math:`o`, ``(*batch, d)``.

    Example:
        >>> import torch
        >>> BernoulliVector(torch.zeros(3)).enumerate_support().shape
        torch.Size([8, 3])
    """

    has_enumerate_support = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        base = dist.Bernoulli(logits=logits, validate_args=validate_args)
        super().__init__(base, 1, validate_args=validate_args)

    @property
    def logits(self) -> Tensor:
        """Log odds, ``(*batch, d)``."""
        out: Tensor = self.base_dist.logits
        return out

    def expand(self, batch_shape: Any, _instance: Any = None) -> BernoulliVector:
        """The same distribution with a larger batch shape."""
        return BernoulliVector(self.logits.expand(*batch_shape, *self.event_shape))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All values, ``(2**d, *batch, d)``, or with batch dimensions of size 1."""
        (size,) = self.event_shape
        logits = self.logits
        bits = torch.arange(2**size, device=logits.device)[:, None] >> torch.arange(
            size, device=logits.device
        )
        values = (bits & 1).to(logits.dtype)
        values = values.reshape(-1, *(1 for _ in self.batch_shape), size)
        return values.expand(-1, *self.batch_shape, size) if expand else values


# Elements of the largest tensor that a mixture makes at once: small enough for a cache.
_BLOCK = 500_000


class Mixture(TorchDistribution):
    r"""A finite mixture whose components are rows of a table of parameters.

    .. math:: p(z) = \sum_k \pi_k \, p(z; \lambda_k)

    Torch's own mixture draws from all components to keep one, and holds its density over all
    components and draws at once; with hundreds of components neither is practical.

    Args:
        member: From parameters ``(*batch, P)`` to a distribution of that batch shape.
        params: :math:`\lambda_k`, ``(K, P)``.
        logits: :math:`\log \pi_k` up to a constant, ``(K,)``.

    Example:
        >>> import torch
        >>> import pyro.distributions as dist
        >>> two = Mixture(
        ...     lambda loc: dist.Normal(loc, 1.0).to_event(1),
        ...     torch.tensor([[-3.0], [3.0]]),
        ...     torch.zeros(2),
        ... )
        >>> two.sample((5,)).shape
        torch.Size([5, 1])
        >>> two.log_prob(torch.zeros(1))
        tensor(-5.4189)
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self,
        member: Callable[[Tensor], Any],
        params: Tensor,
        logits: Tensor,
        *,
        batch_shape: Any = (),
        validate_args: bool | None = None,
    ) -> None:
        self.member, self.params, self.logits = member, params, logits
        self.components = member(params)
        event_shape = self.components.event_shape
        super().__init__(torch.Size(batch_shape), event_shape, validate_args=validate_args)

    @property
    def support(self) -> Any:
        """That of the components."""
        return self.components.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Mixture:
        """The same mixture for every element of a batch."""
        return Mixture(
            self.member, self.params, self.logits, batch_shape=batch_shape, validate_args=False
        )

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw components, then from them."""
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape
            weights = torch.softmax(self.logits, dim=0)
            chosen = torch.multinomial(weights, max(1, shape.numel()), replacement=True)
            params = self.params[chosen[: shape.numel()].reshape(shape)]
            drawn: Tensor = self.member(params).sample()
        return drawn

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, ``(*batch,)``; of many values in blocks."""
        if self._validate_args:
            self._validate_sample(value)
        event = value.dim() - len(self.event_shape)
        rows = torch.broadcast_shapes(value.shape[:event], self.batch_shape)
        flat = value.expand(*rows, *self.event_shape).reshape(-1, 1, *self.event_shape)
        log_weights = torch.log_softmax(self.logits, dim=0)
        normal = _elements_of_normal(self.components)
        each = len(self.params) * (1 if normal else max(1, self.event_shape.numel()))
        terms = []
        for block in flat.split(max(1, _BLOCK // each)):
            if normal is None:
                log_probs = self.components.log_prob(block)
            else:
                log_probs = _all_normals(normal.loc, normal.scale, block[:, 0])
            terms.append(torch.logsumexp(log_probs + log_weights, dim=-1))
        return torch.cat(terms).reshape(rows)


def _elements_of_normal(fn: Any) -> Any:
    """The normals that a vector is independently drawn from; `None` of another distribution."""
    independent = isinstance(fn, Independent) and fn.reinterpreted_batch_ndims == 1
    return fn.base_dist if independent and type(fn.base_dist) is Normal else None


def _all_normals(loc: Tensor, scale: Tensor, value: Tensor) -> Tensor:
    """Log densities of diagonal normals ``(K, D)`` at values ``(S, D)``: ``(S, K)``.

    As a product of matrices, which needs no tensor of all three dimensions. The squares that are
    subtracted from each other are far larger than the result, hence double precision.
    """
    loc, precision, z = loc.double(), scale.double() ** -2, value.double()
    slopes = torch.cat([-0.5 * precision, loc * precision], dim=-1)
    constant = -0.5 * (loc**2 * precision).sum(-1) + 0.5 * torch.log(precision).sum(-1)
    constant = constant - loc.shape[-1] * _HALF_LOG_2PI
    return (torch.cat([z**2, z], dim=-1) @ slopes.mT + constant).to(value.dtype)
