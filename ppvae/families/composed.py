"""Families made from any distribution class, and families seen through a transform."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import biject_to, constraints, transforms
from torch.distributions.utils import tril_matrix_to_vec, vec_to_tril_matrix

from ppvae.density import LatentSite, support_name
from ppvae.families.base import Family, GaussianFamily, families_on, innermost
from ppvae.families.discrete import Given


class DistributionFamily(Family):
    r"""The members of a torch or Pyro distribution class, all its parameters free.

    λ holds every parameter mapped to the reals by torch's ``biject_to``, one after the other.
    λ = 0 is the member that this map gives: a Laplace(0, 1), a Beta(1, 1), a Dirichlet(1, …, 1).

    Args:
        kind: A distribution class whose draws are reparameterised.
        shapes: For each argument of ``kind``, its shape for one datum. Dimensions beyond those
            that the parameter itself has make independent elements.

    Raises:
        ValueError: If ``kind`` has no reparameterised draws, an argument is missing or unknown,
            or an argument's range depends on another's.

    Example:
        >>> import torch
        >>> family = DistributionFamily(dist.Laplace, {"loc": (3,), "scale": (3,)})
        >>> family
        DistributionFamily(Laplace, loc=(3,), scale=(3,))
        >>> family.distribution(torch.zeros(7, 6)).event_shape
        torch.Size([3])
    """

    def __init__(self, kind: type, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.kind = kind
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        if not getattr(kind, "has_rsample", False):
            raise ValueError(
                f"{kind.__name__} has no reparameterised draws, which fitting a datum needs."
            )
        unknown = set(_needed_arguments(kind)) - set(_constraints_of(kind))
        if unknown or not argument_names(kind):
            raise _without_ranges(kind, sorted(unknown))
        if set(self.shapes) != set(argument_names(kind)):
            raise ValueError(
                f"{kind.__name__}: expected shapes of {argument_names(kind)}; got "
                f"{list(self.shapes)}."
            )
        limits = _constraints_of(kind)
        self._maps = {}
        for name in self.shapes:
            try:
                self._maps[name] = _onto(limits[name])
            except NotImplementedError:
                raise _without_ranges(kind, [name]) from None
        self._free = {
            name: tuple(self._maps[name].inverse_shape(shape))
            for name, shape in self.shapes.items()
        }
        extra = {len(shape) - limits[name].event_dim for name, shape in self.shapes.items()}
        if len(extra) != 1:
            raise ValueError(f"{kind.__name__}: the shapes {self.shapes} do not go together.")
        (self._independent,) = extra
        neutral = self.distribution(torch.zeros(self.num_params))
        self._event_shape = tuple(neutral.event_shape)
        self.support = neutral.support

    @property
    def num_params(self) -> int:
        """Size of a row of parameters."""
        return sum(int(torch.Size(shape).numel()) for shape in self._free.values())

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of the latent variable of one datum."""
        return self._event_shape

    @property
    def size(self) -> int:
        """Number of latent elements of one datum."""
        return int(torch.Size(self._event_shape).numel())

    def _build(self, params: Tensor) -> Any:
        arguments, at = {}, 0
        for name, shape in self._free.items():
            count = int(torch.Size(shape).numel())
            part = params[..., at : at + count].reshape((*params.shape[:-1], *shape))
            arguments[name] = self._maps[name](part)
            at += count
        return self.kind(**arguments).to_event(self._independent)

    def params_of(self, member: Any) -> Tensor:
        """λ of a member."""
        inner = innermost(member)
        limits = _constraints_of(self.kind)
        parts = []
        for name, shape in self.shapes.items():
            value = getattr(inner, name)
            own = value.shape[value.dim() - limits[name].event_dim :]
            value = value.expand(*inner.batch_shape, *own)
            free = self._maps[name].inv(value)
            rows = value.shape[: value.dim() - len(shape)]
            parts.append(free.reshape((*rows, -1)))
        return torch.cat(parts, dim=-1)

    def check_site(self, site: LatentSite) -> None:
        """Refuse a latent site of another shape, or one that has no room for the draws."""
        _check_by_drawing(self, site)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={shape}" for name, shape in self.shapes.items())
        return f"DistributionFamily({self.kind.__name__}, {shapes})"


class Transformed(Family):
    r"""A family seen through a fixed transform, :math:`z = T(u), \; u \sim q`.

    λ is that of the base family; T has no parameters per datum. Use `transformed` to make one.

    Args:
        base: The family of u.
        transform: A torch transform that is the same for all data. A flow with parameters is
            copied as it is: later training does not change the family.
    """

    def __init__(self, base: Family, transform: Any) -> None:
        super().__init__()
        self.base, self.transform = base, _as_it_is(transform)
        try:
            # Without a cache, log q(z) would invert T, which loses digits or is impossible.
            self._cached = self.transform.with_cache(1)
        except NotImplementedError:
            self._cached = self.transform
        neutral = self.distribution(torch.zeros(base.num_params))
        self._event_shape = tuple(neutral.event_shape)
        self.support = neutral.support

    def __reduce__(self) -> Any:
        # The cache holds tensors that cannot be copied.
        _forget_draws(self.transform)
        return type(self), (self.base, self.transform)

    @property
    def num_params(self) -> int:
        """Size of a row of parameters."""
        return self.base.num_params

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of the latent variable of one datum."""
        return self._event_shape

    @property
    def size(self) -> int:
        """Number of elements of u for one datum."""
        return self.base.size

    def _build(self, params: Tensor) -> Any:
        return dist.TransformedDistribution(self.base.distribution(params), [self._cached])

    def params_of(self, member: Any) -> Tensor:
        """λ of a transformed distribution: that of its base."""
        return self.base.params_of(innermost(member).base_dist)

    def check_site(self, site: LatentSite) -> None:
        """Refuse a latent site of another shape, or one that has no room for the draws."""
        _check_by_drawing(self, site)

    def __repr__(self) -> str:
        return f"transformed({self.base!r}, {_transform_name(self.transform)})"


class TransformedGaussian(Transformed, GaussianFamily):
    """A Gaussian family seen through a fixed transform: natural gradients apply."""

    base: GaussianFamily

    @property
    def block_labels(self) -> Tensor:
        """For each element of the Gaussian the number of its block."""
        return self.base.block_labels

    def gaussian(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and Cholesky factor of λ."""
        return self.base.gaussian(params)

    def from_gaussian(self, loc: Tensor, tril: Tensor) -> Tensor:
        """λ of a mean and a Cholesky factor."""
        return self.base.from_gaussian(loc, tril)

    def from_normal(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The latent at the Gaussian's value ``u``, and the log determinant."""
        inner, jacobian = self.base.from_normal(u)
        z = self._cached(inner)
        term = self._cached.log_abs_det_jacobian(inner, z)
        # Some flows leave out the dimensions in which their term is constant.
        term = term.expand(inner.shape[: inner.dim() - self.transform.domain.event_dim])
        return z, jacobian + term.reshape(*jacobian.shape, -1).sum(-1)


def transformed(base: Family, transform: Any) -> Transformed:
    """A family seen through a fixed transform.

    Args:
        base: The family of the variable that is transformed.
        transform: A torch or Pyro transform with no parameters per datum.

    Example:
        >>> from torch.distributions import SigmoidTransform
        >>> from ppvae.families import DiagonalNormal
        >>> transformed(DiagonalNormal(2), SigmoidTransform())
        transformed(DiagonalNormal(2), SigmoidTransform())
    """
    kind = TransformedGaussian if isinstance(base, GaussianFamily) else Transformed
    return kind(base, transform)


def same_family(one: Family, other: Family) -> bool:
    """Whether two families are the same set of distributions.

    Example:
        >>> from ppvae.families import DiagonalNormal, Gamma, LogNormal
        >>> same_family(DiagonalNormal(2), DiagonalNormal(2)), same_family(LogNormal(), Gamma())
        (True, False)
    """
    if repr(one) != repr(other):
        return False
    held, others = _held_by(one), _held_by(other)
    if len(held) != len(others) or not all(map(_equal, held, others)):
        return False
    if isinstance(one, Given) and isinstance(other, Given):
        return same_family(one.base, other.base)
    if not isinstance(one, Transformed) or not isinstance(other, Transformed):
        return True
    # What a transform holds besides tensors shows in what it does.
    like = next((value for value in held if value.is_floating_point()), torch.zeros(()))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        drawn = []
        for family in (one, other):
            torch.default_generator.manual_seed(0)
            params = torch.randn(8, family.num_params).to(like)
            drawn.append(family.distribution(params).sample())
    return torch.allclose(drawn[0], drawn[1], equal_nan=True)


def _equal(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return alike and torch.equal(one, other)


def _held_by(family: Family) -> list[Tensor]:
    """What a family and its transforms hold: two flows of one kind are two families."""
    held = _tensors_in(family.transform) if isinstance(family, Transformed) else []
    if isinstance(family, nn.Module):
        held += family.state_dict().values()
    base = getattr(family, "base", None)
    return held + (_held_by(base) if isinstance(base, Family) else [])


def _check_by_drawing(family: Family, site: LatentSite, draws: int = 64) -> None:
    """The support of a composed family is best seen by its draws."""
    if tuple(site.event_shape) != family.event_shape:
        raise ValueError(
            f"Site {site.name!r}: expected a family with event shape {tuple(site.event_shape)}; "
            f"got {family!r} with {family.event_shape}."
        )
    # Where the transform and the support hold tensors, the draws must be of their kind. The
    # second dimension is that of the rows, which may have bounds of their own.
    held = [*_held_by(family), *_tensors_in(site.support)]
    like = next((value for value in held if value.is_floating_point()), torch.zeros(()))
    devices = [like.device] if like.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        params = torch.randn(draws, 1, family.num_params).to(like)
        drawn = family.distribution(torch.cat([torch.zeros_like(params), params])).sample()
    if not bool(site.support.check(drawn).all()):
        raise ValueError(
            f"Site {site.name!r}: {family!r} draws outside of the support of the model's prior, "
            f"{site.family} ({support_name(site.support)!r}). Choose a family on that support: "
            f"{families_on(support_name(site.support))}."
        )


def _pieces(*items: Any) -> list[Any]:
    """Transforms and constraints, and those that they are made of, each once."""
    found: dict[int, Any] = {}
    pending = list(items)
    while pending:
        item = pending.pop()
        if isinstance(item, (list, tuple)):
            pending += item
        elif id(item) not in found and isinstance(
            item, (transforms.Transform, constraints.Constraint)
        ):
            found[id(item)] = item
            pending += vars(item).values()
    return list(found.values())


def _tensors_in(*items: Any) -> list[Tensor]:
    """The tensors that transforms and constraints hold, what they remember of draws aside."""
    found: list[Tensor] = []
    for piece in _pieces(*items):
        held = [*piece.parameters(), *piece.buffers()] if isinstance(piece, nn.Module) else []
        own = [value for key, value in vars(piece).items() if "cache" not in key]
        found += [value for value in [*held, *own] if isinstance(value, Tensor)]
    return found


def _forget_draws(transform: Any) -> None:
    """Drop what flows remember of their last draw, which has a graph and cannot be copied."""
    for piece in _pieces(transform):
        for module in piece.modules() if isinstance(piece, nn.Module) else ():
            if isinstance(module, transforms.Transform):
                module._cached_x_y = None, None
                for key, value in vars(module).items():
                    if "cache" in key and isinstance(value, Tensor):
                        vars(module)[key] = None


def _as_it_is(transform: Any) -> Any:
    """The transform; a copy of it, with nothing left to train, where it has modules."""
    if not any(isinstance(piece, nn.Module) for piece in _pieces(transform)):
        return transform
    _forget_draws(transform)
    copied = copy.deepcopy(transform)
    for piece in _pieces(copied):
        if isinstance(piece, nn.Module):
            piece.eval().requires_grad_(False)
    return copied


def argument_names(kind: type) -> list[str]:
    """The arguments of a distribution class that are its parameters, one of each equivalent set."""
    names = [n for n in inspect.signature(kind).parameters if n in _constraints_of(kind)]
    redundant = {"logits": {"probs"}, "scale_tril": {"covariance_matrix", "precision_matrix"}}
    dropped = set().union(*(out for name, out in redundant.items() if name in names))
    return [name for name in names if name not in dropped]


def _without_ranges(kind: type, names: list[str]) -> ValueError:
    return ValueError(
        f"{kind.__name__}: the range of {', '.join(names) or 'its parameters'} is not stated, is "
        f"discrete or depends on other parameters, so that they cannot be freed one by one."
    )


def _needed_arguments(kind: type) -> list[str]:
    given = inspect.signature(kind).parameters.values()
    return [
        p.name
        for p in given
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"
    ]


class _FromTriangle(transforms.Transform):
    """From the elements of a lower triangle to a Cholesky factor: of the diagonal, logarithms."""

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return transforms.LowerCholeskyTransform()(vec_to_tril_matrix(x))

    def _inverse(self, y: Tensor) -> Tensor:
        return tril_matrix_to_vec(transforms.LowerCholeskyTransform().inv(y))

    def inverse_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


def _onto(limits: Any) -> Any:
    """The map from the reals onto the range of a parameter."""
    # Torch's own for this one takes a full matrix, half of which would have no meaning.
    return _FromTriangle() if limits is constraints.lower_cholesky else biject_to(limits)


def _constraints_of(kind: type) -> Mapping[str, Any]:
    limits = getattr(kind, "arg_constraints", {})
    return limits if isinstance(limits, Mapping) else {}


def _transform_name(transform: Any) -> str:
    if isinstance(transform, transforms.ComposeTransform):
        return " then ".join(_transform_name(part) for part in transform.parts)
    if isinstance(transform, transforms.IndependentTransform):
        return _transform_name(transform.base_transform)
    if isinstance(transform, transforms.AffineTransform):
        loc, scale = torch.as_tensor(transform.loc), torch.as_tensor(transform.scale)
        return f"AffineTransform({loc.tolist()}, {scale.tolist()})"
    return type(transform).__name__ + ("" if isinstance(transform, nn.Module) else "()")
