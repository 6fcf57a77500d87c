"""What a variational family is."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints, transforms

from ppvae.density import LatentSite, support_name


class Family(ABC):
    """A set of distributions over the latent variable of one datum.

    Args:
        latent_dim: Size of a vector-valued latent, `None` for a scalar one.

    Attributes:
        latent_dim: As given.
        num_params: Size of a row λ.
        event_shape: ``()`` or ``(latent_dim,)``.
        support: torch's constraint on the values.
        given: Name of the latent site whose value the distribution hangs on, `None` where λ alone
            says it (see `Given`).
    """

    support: Any = constraints.real
    given: str | None = None
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

    def member(self, params: Tensor, values: Mapping[str, Tensor]) -> Any:
        """The member with these parameters, beside the values of latent sites drawn before it.

        Args:
            params: λ, ``(*batch, num_params)``.
            values: By site, what was drawn; the families of a guide stand in an order in which a
                site comes after the one that it is `given`.
        """
        return self.distribution(params)

    def hangs_on(self, other: Family | None) -> bool:
        """Whether this can be the family of a site that hangs on one of family ``other``."""
        return False

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
                f"{families_on(theirs)}."
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
    """

    bijection: Any = transforms.identity_transform

    @property
    def block_labels(self) -> Tensor:
        """For each element the number of its block, ``(size,)``: blocks are independent."""
        return torch.arange(self.size)

    @abstractmethod
    def gaussian(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(*batch, size)`` and Cholesky factor ``(*batch, size, size)`` of λ."""

    @abstractmethod
    def from_gaussian(self, loc: Tensor, tril: Tensor) -> Tensor:
        """λ of a mean and a Cholesky factor: the inverse of `gaussian`."""

    def from_normal(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The latent z at the value ``u`` of the Gaussian, and the log volume of the map.

        Args:
            u: ``(*batch, size)``.

        Returns:
            z ``(*batch, *event_shape)`` and the log determinant ``(*batch,)``.
        """
        z = self.bijection(u)
        jacobian: Tensor = self.bijection.log_abs_det_jacobian(u, z).sum(-1)
        return (z.squeeze(-1) if self.latent_dim is None else z), jacobian


def innermost(fn: Any) -> Any:
    """The distribution inside of `Independent`, `ExpandedDistribution` and masks."""
    while type(fn).__name__ in ("Independent", "ExpandedDistribution", "MaskedDistribution"):
        fn = fn.base_dist
    return fn


def weights_of(family: Family) -> list[nn.Module]:
    """The modules of a family whose weights all data share, those of what it is made of too.

    Example:
        >>> from ppvae.families import DiagonalNormal, Flow
        >>> weights_of(DiagonalNormal(2)), weights_of(Flow(2))
        ([], [Flow(2, transforms=2, hidden=(64,))])
    """
    own = [family] if isinstance(family, nn.Module) else []
    base = getattr(family, "base", None)
    return own + (weights_of(base) if isinstance(base, Family) else [])


def held_fixed(family: Family) -> Family:
    """The family as it is now: a copy with nothing left to train, where it has weights."""
    if not weights_of(family):
        return family
    fixed = copy.deepcopy(family)
    for module in weights_of(fixed):
        module.eval().requires_grad_(False)
    return fixed


BUILT_IN: dict[type, type[Family]] = {}
"""The family of each distribution class that has one of its own; filled where they are defined."""


def families_on(support: str) -> str:
    """The names of the families on a support, for messages."""
    names = [f.__name__ for f in BUILT_IN.values() if support_name(f.support) == support]
    names = list(dict.fromkeys(names))  # A family may have two distribution classes.
    return ", ".join(names) if names else "none is built in; see ppvae.families.DistributionFamily"


def split_sites(families: Mapping[str, Family], params: Tensor) -> dict[str, Tensor]:
    """λ of all sites, ``(*batch, num_params)``, site by site."""
    parts = params.split([family.num_params for family in families.values()], dim=-1)
    return dict(zip(families, parts, strict=True))


def in_order(families: Mapping[str, Family], names: Iterable[str]) -> dict[str, Family]:
    """The families of these sites, each after the one that it is given.

    Raises:
        ValueError: If a family is given a site that has no such categories.
    """
    named = [(name, families[name]) for name in names]
    for name, family in named:
        if family.given is not None and not family.hangs_on(families.get(family.given)):
            raise ValueError(
                f"Site {name!r}: {family!r} hangs on site {family.given!r}, which must have a "
                f"Categorical family with as many values; got {families.get(family.given)!r}."
            )
    return dict(sorted(named, key=lambda item: item[1].given is not None))
