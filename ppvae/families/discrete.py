"""Families over finitely many values, and families that hang on such a value."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from ppvae.density import LatentSite
from ppvae.distributions import BernoulliVector
from ppvae.families.base import BUILT_IN, Family, innermost

# What has no probability to speak of: e⁻¹⁰⁰ is a number in float32 arithmetic of logarithms.
_FARTHEST = 100.0


class DiscreteFamily(Family):
    """Independent elements with finitely many values each: what exact sums need.

    Attributes:
        num_classes: Number of values of an element.
    """

    num_classes: int

    @abstractmethod
    def log_probs(self, params: Tensor) -> Tensor:
        """Log probabilities of λ, ``(*batch, size, num_classes)``."""

    @abstractmethod
    def from_log_probs(self, log_probs: Tensor) -> Tensor:
        """λ of log probabilities: the inverse of `log_probs`."""

    @abstractmethod
    def values(self, classes: Tensor) -> Tensor:
        """The latent whose elements have these classes.

        Args:
            classes: ``(*batch, size)``, integers from 0 to ``num_classes − 1``.
        """


class Bernoulli(DiscreteFamily):
    r"""Mean field over binary latents.

    .. math:: q(z) = \prod_d \sigma(\lambda_d)^{z_d} (1 - \sigma(\lambda_d))^{1 - z_d}

    λ holds a logit for each element. Draws are not reparameterised: train an encoder by
    `TraceGraph_ELBO`, or by `TraceEnum_ELBO` where there are few of them.

    Args:
        latent_dim: Size of a vector-valued latent, `None` for a scalar one.

    Example:
        >>> import torch
        >>> Bernoulli(3).distribution(torch.zeros(3)).mean
        tensor([0.5000, 0.5000, 0.5000])
    """

    support = constraints.boolean
    num_classes = 2
    _params_per_latent = 1

    def _build(self, params: Tensor) -> Any:
        if self.latent_dim is None:
            return dist.Bernoulli(logits=params.squeeze(-1))
        return BernoulliVector(params)

    def params_of(self, member: Any) -> Tensor:
        """λ of a Bernoulli distribution."""
        logits: Tensor = innermost(member).logits
        return logits[..., None] if self.latent_dim is None else logits

    def log_probs(self, params: Tensor) -> Tensor:
        """Log probabilities of 0 and 1, ``(*batch, size, 2)``."""
        return torch.stack([logsigmoid(-params), logsigmoid(params)], dim=-1)

    def from_log_probs(self, log_probs: Tensor) -> Tensor:
        """λ of log probabilities."""
        zero, one = log_probs.clamp(min=-_FARTHEST).unbind(-1)
        return one - zero

    def values(self, classes: Tensor) -> Tensor:
        """Zeros and ones of torch's default floating point type."""
        out = classes.to(torch.get_default_dtype())
        return out.squeeze(-1) if self.latent_dim is None else out


class Categorical(DiscreteFamily):
    r"""Mean field over categories, :math:`q(z = k) = \mathrm{softmax}(\lambda)_k`.

    λ holds a logit for each category, of each element in turn; adding a number to all of an
    element changes nothing.

    Args:
        num_classes: Number of categories.
        latent_dim: Number of elements of a vector-valued latent, `None` for a scalar one.

    Example:
        >>> import torch
        >>> Categorical(4).distribution(torch.zeros(4)).probs
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    def __init__(self, num_classes: int, latent_dim: int | None = None) -> None:
        super().__init__(latent_dim)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2; got {num_classes}.")
        self.num_classes = num_classes
        self.support = constraints.integer_interval(0, num_classes - 1)
        self._params_per_latent = num_classes

    def _logits(self, params: Tensor) -> Tensor:
        return params.reshape(*params.shape[:-1], self.size, self.num_classes)

    def _build(self, params: Tensor) -> Any:
        logits = self._logits(params)
        return self._event(
            dist.Categorical(logits=logits.squeeze(-2) if self.latent_dim is None else logits)
        )

    def params_of(self, member: Any) -> Tensor:
        """λ of a categorical distribution: its normalised logits."""
        logits: Tensor = innermost(member).logits
        return logits if self.latent_dim is None else logits.flatten(-2)

    def log_probs(self, params: Tensor) -> Tensor:
        """Log probabilities of the categories, ``(*batch, size, num_classes)``."""
        return self._logits(params).log_softmax(dim=-1)

    def from_log_probs(self, log_probs: Tensor) -> Tensor:
        """λ of log probabilities."""
        return log_probs.clamp(min=-_FARTHEST).flatten(-2)

    def values(self, classes: Tensor) -> Tensor:
        """The categories as they are."""
        return classes.squeeze(-1) if self.latent_dim is None else classes

    def __repr__(self) -> str:
        size = "" if self.latent_dim is None else f", {self.latent_dim}"
        return f"Categorical({self.num_classes}{size})"


class Given(Family):
    r"""A member of a family for each value of a categorical site.

    .. math:: q(z \mid y = k) = q_{\lambda_k}(z)

    Together with a `Categorical` over y this is the family :math:`q(y)\, q(z \mid y)`, in which
    the two are not independent. λ holds the parameters for y = 0, then those for y = 1, and so on.

    Args:
        site: Name of the categorical latent site.
        num_classes: Its number of categories.
        base: The family of z.

    Example:
        >>> from ppvae.families import DiagonalNormal
        >>> Given("y", 10, DiagonalNormal(2)).num_params
        40
    """

    def __init__(self, site: str, num_classes: int, base: Family) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2; got {num_classes}.")
        if isinstance(base, (DiscreteFamily, Given)):
            raise ValueError(f"base: expected a family over continuous values; got {base!r}.")
        self.given: str = site
        self.num_classes, self.base = num_classes, base
        self.support = base.support

    @property
    def num_params(self) -> int:
        """Size of a row of parameters."""
        return self.num_classes * self.base.num_params

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of the latent variable of one datum."""
        return self.base.event_shape

    @property
    def size(self) -> int:
        """Number of latent elements of one datum."""
        return self.base.size

    def by_class(self, params: Tensor) -> Tensor:
        """λ by value of the site that is given, ``(*batch, num_classes, base.num_params)``."""
        return params.reshape(*params.shape[:-1], self.num_classes, self.base.num_params)

    def member(self, params: Tensor, values: Mapping[str, Tensor]) -> Any:
        """The member for the values of the site that is given.

        Raises:
            ValueError: If that site has not been drawn.
        """
        if self.given not in values:
            raise ValueError(
                f"{self!r}: site {self.given!r} has no value yet; got {list(values)}. Put its "
                f"family before this one."
            )
        value = values[self.given].long()
        shape = torch.broadcast_shapes(value.shape, params.shape[:-1])
        table = self.by_class(params).expand(*shape, self.num_classes, self.base.num_params)
        index = value.expand(shape)[..., None, None].expand(*shape, 1, self.base.num_params)
        return self.base.distribution(table.gather(-2, index).squeeze(-2))

    def _build(self, params: Tensor) -> Any:
        raise ValueError(
            f"{self!r} is a distribution only beside a value of site {self.given!r}: use member."
        )

    def params_of(self, member: Any) -> Tensor:
        """λ cannot be told from one member, which speaks of one value of the site."""
        raise ValueError(f"{self!r}: one member holds the parameters of one value only.")

    def check_site(self, site: LatentSite) -> None:
        """Refuse a latent site that the base family does not fit."""
        self.base.check_site(site)

    def hangs_on(self, other: Family | None) -> bool:
        """Whether the other family is over the categories of this one."""
        if not isinstance(other, Categorical) or other.latent_dim is not None:
            return False
        return other.num_classes == self.num_classes

    def __repr__(self) -> str:
        return f"Given({self.given!r}, {self.num_classes}, {self.base!r})"


BUILT_IN.update({dist.Bernoulli: Bernoulli, BernoulliVector: Bernoulli})
