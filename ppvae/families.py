r"""Variational families: which distributions over z are allowed.

A family turns a row of unconstrained numbers λ into a distribution. Where λ comes from, a network
or a table, is the guide's business (`ppvae.guides`): swapping only the source isolates
amortization, swapping only the family isolates approximation.

λ = 0 is each family's neutral member, the cold start of per-datapoint fits: a standard normal, a
standard log-normal, an exponential with rate 1, the truncated standard normal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints, transforms

from ppvae.density import LatentSite, support_name
from ppvae.distributions import TruncatedNormal as _TruncatedNormal


class Family(ABC):
    """A set of distributions over the latent variable of one datum.

    Args:
        latent_dim: Size of a vector-valued latent, `None` for a scalar one.

    Attributes:
        latent_dim: As given.
        num_params: Size of a row λ.
        event_shape: ``()`` or ``(latent_dim,)``.
        support: torch's constraint on the values.
    """

    support: Any = constraints.real
    _params_per_latent = 2

    def __init__(self, latent_dim: int | None = None) -> None:
        if latent_dim is not None and latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, or None; got {latent_dim}.")
        self.latent_dim = latent_dim

    @property
    def size(self) -> int:
        """Number of latent elements of one datum."""
        return 1 if self.latent_dim is None else self.latent_dim

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of the latent variable of one datum."""
        return () if self.latent_dim is None else (self.latent_dim,)

    @property
    def num_params(self) -> int:
        """Size of a row of parameters."""
        return self._params_per_latent * self.size

    def distribution(self, params: Tensor) -> Any:
        """The member with these parameters.

        Args:
            params: λ, ``(*batch, num_params)``.

        Returns:
            A Pyro distribution with batch shape ``batch`` and event shape `event_shape`.
        """
        if params.shape[-1] != self.num_params:
            raise ValueError(
                f"{self!r}: expected {self.num_params} parameters a row; got shape "
                f"{tuple(params.shape)}. Give the encoder family.num_params outputs."
            )
        return self._build(params)

    @abstractmethod
    def _build(self, params: Tensor) -> Any: ...

    @abstractmethod
    def params_of(self, member: Any) -> Tensor:
        """λ of a member given as a Pyro distribution: the inverse of `distribution`."""

    def _two(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves of λ, each in the latent's shape."""
        first, second = params.chunk(2, dim=-1)
        if self.latent_dim is None:
            return first.squeeze(-1), second.squeeze(-1)
        return first, second

    def _join(self, first: Tensor, second: Tensor) -> Tensor:
        if self.latent_dim is None:
            return torch.stack([first, second], dim=-1)
        return torch.cat([first, second], dim=-1)

    def _event(self, fn: Any) -> Any:
        return fn if self.latent_dim is None else fn.to_event(1)

    def check_site(self, site: LatentSite) -> None:
        """Refuse a latent site whose support or shape is not this family's.

        Raises:
            ValueError: Naming the family, the site and both supports or shapes.
        """
        ours, theirs = support_name(self.support), support_name(site.support)
        if ours != theirs:
            raise ValueError(
                f"Site {site.name!r}: {self!r} has support {ours!r} but the model's prior, "
                f"{site.family}, has support {theirs!r}. Choose a family on {theirs!r}: "
                f"{_families_on(theirs)}."
            )
        if tuple(site.event_shape) != self.event_shape:
            size = site.event_shape[0] if site.event_shape else None
            raise ValueError(
                f"Site {site.name!r}: expected a family with event shape "
                f"{tuple(site.event_shape)}; got {self!r} with {self.event_shape}. "
                f"Use {type(self).__name__}({'' if size is None else size})."
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'' if self.latent_dim is None else self.latent_dim})"


class GaussianFamily(Family):
    """A Gaussian over the reals, seen through a fixed bijection: what natural gradients need.

    Attributes:
        bijection: torch's transform from the reals onto the support, element by element.
        full_rank: Whether the Gaussian has a full covariance.
    """

    bijection: Any = transforms.identity_transform
    full_rank = False

    @abstractmethod
    def gaussian(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(*batch, size)`` and Cholesky factor ``(*batch, size, size)`` of λ."""

    @abstractmethod
    def from_gaussian(self, loc: Tensor, tril: Tensor) -> Tensor:
        """λ of a mean and a Cholesky factor: the inverse of `gaussian`."""


class _DiagonalGaussian(GaussianFamily):
    """λ = (μ, log σ)."""

    def gaussian(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and (diagonal) Cholesky factor of λ."""
        loc, log_scale = params.chunk(2, dim=-1)
        return loc, torch.diag_embed(torch.exp(log_scale))

    def from_gaussian(self, loc: Tensor, tril: Tensor) -> Tensor:
        """λ of a mean and a diagonal Cholesky factor."""
        return torch.cat([loc, torch.log(torch.diagonal(tril, dim1=-2, dim2=-1))], dim=-1)


class DiagonalNormal(_DiagonalGaussian):
    r"""Mean-field Gaussian, :math:`q(z) = \prod_d N(z_d; \mu_d, \sigma_d^2)`.

    λ = (μ, log σ).

    Args:
        latent_dim: Size of a vector-valued latent, `None` for a scalar one.

    Example:
        >>> import torch
        >>> DiagonalNormal(20).num_params
        40
        >>> DiagonalNormal().distribution(torch.zeros(7, 2)).batch_shape
        torch.Size([7])
    """

    def _build(self, params: Tensor) -> Any:
        loc, log_scale = self._two(params)
        return self._event(dist.Normal(loc, torch.exp(log_scale)))

    def params_of(self, member: Any) -> Tensor:
        """λ of a normal distribution."""
        normal = _innermost(member)
        return self._join(normal.loc, torch.log(normal.scale))


class FullRankNormal(GaussianFamily):
    r"""Gaussian with a full covariance, :math:`q(z) = N(z; \mu, L L^\top)`.

    λ = (μ, log diag L, the rest of L row by row): d + d (d + 1) / 2 numbers.

    Args:
        latent_dim: Size of the latent.

    Example:
        >>> FullRankNormal(3).num_params
        9
    """

    support = constraints.real_vector
    full_rank = True

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        if latent_dim is None:
            raise ValueError("FullRankNormal needs a latent_dim; a scalar takes DiagonalNormal().")

    @property
    def num_params(self) -> int:
        """Size of a row of parameters."""
        return self.size + self.size * (self.size + 1) // 2

    def _build(self, params: Tensor) -> Any:
        loc, tril = self.gaussian(params)
        return dist.MultivariateNormal(loc, scale_tril=tril)

    def params_of(self, member: Any) -> Tensor:
        """λ of a multivariate normal distribution."""
        normal = _innermost(member)
        return self.from_gaussian(normal.loc, normal.scale_tril)

    def gaussian(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and Cholesky factor of λ."""
        d = self.size
        loc, log_diagonal, rest = params.split([d, d, d * (d - 1) // 2], dim=-1)
        rows, columns = torch.tril_indices(d, d, offset=-1, device=params.device)
        tril = torch.diag_embed(torch.exp(log_diagonal))
        below = torch.zeros_like(tril)
        below[..., rows, columns] = rest
        return loc, tril + below

    def from_gaussian(self, loc: Tensor, tril: Tensor) -> Tensor:
        """λ of a mean and a Cholesky factor."""
        rows, columns = torch.tril_indices(self.size, self.size, offset=-1, device=loc.device)
        diagonal = torch.diagonal(tril, dim1=-2, dim2=-1)
        return torch.cat([loc, torch.log(diagonal), tril[..., rows, columns]], dim=-1)


class LogNormal(_DiagonalGaussian):
    r"""Mean-field log-normal on z > 0: :math:`\log z_d \sim N(\mu_d, \sigma_d^2)`.

    λ = (μ, log σ).

    Args:
        latent_dim: Size of a vector-valued latent, `None` for a scalar one.

    Example:
        >>> import torch
        >>> LogNormal().distribution(torch.zeros(2)).mean
        tensor(1.6487)
    """

    support = constraints.positive
    bijection = transforms.ExpTransform()

    def _build(self, params: Tensor) -> Any:
        loc, log_scale = self._two(params)
        return self._event(dist.LogNormal(loc, torch.exp(log_scale)))

    def params_of(self, member: Any) -> Tensor:
        """λ of a log-normal distribution."""
        log_normal = _innermost(member)
        return self._join(log_normal.loc, torch.log(log_normal.scale))


class Gamma(Family):
    r"""Mean-field gamma on z > 0: :math:`q(z) \propto z^{\alpha - 1} e^{-\beta z}`.

    λ = (log α, log β). Draws are reparameterised implicitly (Figurnov et al. 2018).

    Args:
        latent_dim: Size of a vector-valued latent, `None` for a scalar one.

    Example:
        >>> import torch
        >>> Gamma().distribution(torch.zeros(2)).mean
        tensor(1.)
    """

    support = constraints.positive

    def _build(self, params: Tensor) -> Any:
        log_concentration, log_rate = self._two(params)
        return self._event(dist.Gamma(torch.exp(log_concentration), torch.exp(log_rate)))

    def params_of(self, member: Any) -> Tensor:
        """λ of a gamma distribution."""
        gamma = _innermost(member)
        return self._join(torch.log(gamma.concentration), torch.log(gamma.rate))


class Weibull(Family):
    r"""Mean-field Weibull on z > 0: :math:`q(z > t) = e^{-(t / s)^k}`.

    λ = (log s, log k).

    Args:
        latent_dim: Size of a vector-valued latent, `None` for a scalar one.

    Example:
        >>> import torch
        >>> Weibull().distribution(torch.zeros(2)).mean
        tensor(1.)
    """

    support = constraints.positive

    def _build(self, params: Tensor) -> Any:
        log_scale, log_concentration = self._two(params)
        return self._event(dist.Weibull(torch.exp(log_scale), torch.exp(log_concentration)))

    def params_of(self, member: Any) -> Tensor:
        """λ of a Weibull distribution."""
        weibull = _innermost(member)
        return self._join(torch.log(weibull.scale), torch.log(weibull.concentration))


class TruncatedNormal(Family):
    r"""Mean-field normal kept to z ≥ 0: :math:`q(z) \propto N(z; \mu, \sigma^2)`.

    λ = (μ, log σ), location and scale of the parent normal.

    Args:
        latent_dim: Size of a vector-valued latent, `None` for a scalar one.

    Example:
        >>> import torch
        >>> TruncatedNormal(3).distribution(torch.zeros(6)).event_shape
        torch.Size([3])
    """

    support = constraints.nonnegative

    def _build(self, params: Tensor) -> Any:
        loc, log_scale = self._two(params)
        return self._event(_TruncatedNormal(loc, torch.exp(log_scale)))

    def params_of(self, member: Any) -> Tensor:
        """λ of a truncated normal distribution."""
        truncated = _innermost(member)
        return self._join(truncated.loc, torch.log(truncated.scale))


def _innermost(fn: Any) -> Any:
    """The distribution inside of `Independent`, `ExpandedDistribution` and masks."""
    while type(fn).__name__ in ("Independent", "ExpandedDistribution", "MaskedDistribution"):
        fn = fn.base_dist
    return fn


_MEMBERS: dict[type, type[Family]] = {
    dist.Normal: DiagonalNormal,
    dist.MultivariateNormal: FullRankNormal,
    dist.LogNormal: LogNormal,
    dist.Gamma: Gamma,
    dist.Weibull: Weibull,
    _TruncatedNormal: TruncatedNormal,
}


def _families_on(support: str) -> str:
    names = [f.__name__ for f in _MEMBERS.values() if support_name(f.support) == support]
    return ", ".join(names) if names else "none is built in; see ppvae.families.Family"


def read_member(name: str, fn: Any) -> tuple[Family, Tensor]:
    """The family that a guide's distribution belongs to, and its parameters there.

    Args:
        name: The guide's site, for messages.
        fn: The site's distribution, batch shape ``(batch,)``, event shape ``()`` or ``(d,)``.

    Returns:
        The family and λ, ``(batch, num_params)``.

    Raises:
        ValueError: If the distribution is none that can be freed; names the site.
    """
    kind = _MEMBERS.get(type(_innermost(fn)))
    if isinstance(_innermost(fn), dist.Delta):
        raise ValueError(
            f"Site {name!r} is drawn through a Delta, as in AutoNormal and its relatives. Such a "
            f"guide keeps parameters for each datum already and amortizes nothing. To see how far "
            f"it is from the optimum, name its family: family=DiagonalNormal(...) for latents on "
            f"the reals, LogNormal(...) for positive ones."
        )
    if kind is None or len(fn.event_shape) > 1:
        raise ValueError(
            f"Site {name!r}: a {type(_innermost(fn)).__name__} with event shape "
            f"{tuple(fn.event_shape)} cannot be freed per datum; known are "
            f"{', '.join(d.__name__ for d in _MEMBERS)} with event shape () or (d,). "
            f"Name a family on {support_name(fn.support)!r} to measure against instead, as "
            f"family=...: {_families_on(support_name(fn.support))}."
        )
    family = kind(fn.event_shape[0] if fn.event_shape else None)
    params = family.params_of(fn)
    shape = (*fn.batch_shape, family.num_params)
    return family, params.expand(shape).detach().clone()
