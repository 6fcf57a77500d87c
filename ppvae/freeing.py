"""Reading a guide: which family each of its sites belongs to, and its parameters for each row.

This is what lets `compare` take a guide that it did not write. A site can be freed if its
distribution has parameters that are functions of the rows alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import transforms

from ppvae.density import GuideSite, ModelSites, Program, read_guide, support_name
from ppvae.families import (
    BUILT_IN,
    Bernoulli,
    Categorical,
    DiagonalNormal,
    DistributionFamily,
    Family,
    FullRankNormal,
    LogNormal,
    argument_names,
    innermost,
    same_family,
    transformed,
)


@dataclass(frozen=True)
class Reading:
    """A guide's families and their parameters for some rows.

    Attributes:
        plate: Name of the plate over the rows.
        families: By site.
        params: λ by site, ``(batch, num_params)``, differentiable in the guide's parameters.
    """

    plate: str
    families: Mapping[str, Family]
    params: Mapping[str, Tensor]


def read_families(guide: Program, x: Tensor, sites: ModelSites | None = None) -> Reading:
    """Run a guide once and read its families and parameters.

    Raises:
        ValueError: If a site cannot be freed (named).
    """
    plate, members = read_guide(guide, x, sites)
    read = {name: read_member(member) for name, member in members.items()}
    return Reading(
        plate,
        {name: family for name, (family, _) in read.items()},
        {name: params for name, (_, params) in read.items()},
    )


def read_free(guide: Program, x: Tensor, sites: ModelSites | None = None) -> Reading:
    """`read_families`, and a second run with other draws to see that nothing hangs on them.

    Raises:
        ValueError: If a site cannot be freed (named), also because its distribution depends on
            another latent variable or on a random number.
    """
    first = read_families(guide, x, sites)
    again = read_families(guide, x, sites)
    for name, family in first.families.items():
        same = same_family(family, again.families[name])
        if not same or not _equal(first.params[name], again.params[name]):
            ways = ", ".join(f"{site!r}: ..." for site in first.families)
            raise ValueError(
                f"Site {name!r}: its distribution depends on another latent variable, or on a "
                f"random number, so it has no parameters per datum to free. Name a family to "
                f"measure against instead: "
                f"family={'{' + ways + '}' if len(first.families) > 1 else '...'} "
                f"(see ppvae.families)."
            )
    return first


def _equal(one: Tensor, other: Tensor) -> bool:
    """Up to rounding: some operations of GPUs add in another order each time."""
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)


def read_member(site: GuideSite) -> tuple[Family, Tensor]:
    """The family that a site's distribution belongs to, and its parameters there.

    Args:
        site: The site, with a distribution of batch shape ``(batch,)``.

    Returns:
        The family and λ, ``(batch, num_params)``.

    Raises:
        ValueError: If the distribution is none that can be freed; names the site.
    """
    if site.mask is not None:
        raise ValueError(
            f"Site {site.name!r}: the guide's log density is masked, so that it is no density of z "
            f"to find the best member for. Put masks into the model, or name a family to measure "
            f"against: family=..."
        )
    if site.part is not None:
        family, params = _read_part(site)
    elif isinstance(innermost(site.fn), dist.Delta):
        raise ValueError(
            f"Site {site.name!r}: the guide puts all its mass on a point (a Delta), as AutoDelta "
            f"and map_estimate do. A point has no density over z, hence no ELBO. Use a guide with "
            f"a density; where the Delta is a transform of an auxiliary draw, pass the model too."
        )
    elif _is_masked(site.fn):
        raise _not_free(site.name, site.fn, "Its density is masked in some rows or elements.")
    else:
        family, params = _read(site.name, site.fn)
    return family, params.expand(*site.fn.batch_shape, family.num_params)


def _read(name: str, fn: Any) -> tuple[Family, Tensor]:
    inner = innermost(fn)
    # By name: other subclasses, such as LogNormal, have parameters of their own.
    if type(inner).__name__ in ("TransformedDistribution", "LogisticNormal"):
        return _read_transformed(name, fn, inner)
    its_class = type(inner)
    if its_class.__module__.startswith("torch.distributions."):
        its_class = getattr(dist, its_class.__name__, its_class)  # Pyro's of the same name.
    if its_class is dist.Categorical and len(fn.event_shape) <= 1:
        classes = inner.logits.shape[-1]
        categorical = Categorical(classes, fn.event_shape[0] if fn.event_shape else None)
        return categorical, categorical.params_of(fn)
    kind = BUILT_IN.get(its_class)
    if kind is not None and len(fn.event_shape) <= 1:
        family: Family = kind(fn.event_shape[0] if fn.event_shape else None)
        return family, family.params_of(fn)
    if kind is Bernoulli:
        raise _not_free(name, fn, "Declare a binary latent as a vector: reshape inside the model.")
    if kind is not None and kind is not FullRankNormal:
        # Matrices and the like: the family of the elements in a row, reshaped.
        return _read_array(kind, fn, inner)
    try:
        names = argument_names(its_class)
        limits = inner.arg_constraints
        batch = len(fn.batch_shape)
        shapes = {}
        for argument in names:
            value = getattr(inner, argument)
            own = value.shape[value.dim() - limits[argument].event_dim :]
            shapes[argument] = (*inner.batch_shape, *own)[batch:]
        family = DistributionFamily(its_class, shapes)
        params = family.params_of(fn)
        drawn = fn.sample()
        agree = torch.allclose(
            family.distribution(params).log_prob(drawn), fn.log_prob(drawn), atol=1e-3, rtol=1e-3
        )
    except (
        AssertionError,
        AttributeError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise _not_free(name, fn, str(error)) from error
    if not agree:
        raise _not_free(name, fn, "Built again from its parameters it has another density.")
    return family, params


def _not_free(name: str, fn: Any, why: str) -> ValueError:
    why = " ".join(why.split())
    # A mixture's own constraint stands in front of that of its components.
    support = getattr(fn.support, "base_constraint", fn.support)
    return ValueError(
        f"Site {name!r}: a {type(innermost(fn)).__name__} with event shape "
        f"{tuple(fn.event_shape)} cannot be freed per datum. {why} Name a family on "
        f"{support_name(support)!r} to measure against instead, as family=... (see "
        f"ppvae.families)."
    )


def _is_masked(fn: Any) -> bool:
    while fn is not innermost(fn):
        if isinstance(fn, dist.MaskedDistribution) and not torch.as_tensor(fn._mask).all():
            return True
        fn = fn.base_dist
    return False


def _read_array(kind: type[Family], fn: Any, inner: Any) -> tuple[Family, Tensor]:
    rows, shape = tuple(fn.batch_shape), tuple(fn.event_shape)
    count = int(torch.Size(shape).numel())
    base = kind(count)
    elements = {
        argument: getattr(inner, argument).expand(*rows, *shape).reshape(*rows, count)
        for argument in argument_names(type(inner))
    }
    reshape = transforms.ReshapeTransform(torch.Size((count,)), torch.Size(shape))
    return transformed(base, reshape), base.params_of(type(inner)(**elements))


def _read_transformed(name: str, fn: Any, inner: Any) -> tuple[Family, Tensor]:
    extra = len(inner.base_dist.batch_shape) - len(fn.batch_shape)
    base = dist.Independent(inner.base_dist, extra) if extra > 0 else inner.base_dist
    family, params = _read(name, base)
    parts, u = [], base.sample()
    for part in inner.transforms:
        parts.append(_fixed(name, part, u))
        u = part(u)
    whole = parts[0] if len(parts) == 1 else transforms.ComposeTransform(parts)
    return behind(family, whole), params


def behind(base: Family, transform: Any) -> Family:
    """``base`` seen through a transform, by its own name where it has one."""
    if _changes_nothing(transform):
        return base
    if isinstance(transform, transforms.IndependentTransform) and type(base) is DiagonalNormal:
        return behind(base, transform.base_transform)
    if isinstance(transform, transforms.ComposeTransform):
        parts = [part for part in transform.parts if not _changes_nothing(part)]
        transform = parts[0] if len(parts) == 1 else transforms.ComposeTransform(parts)
    if isinstance(transform, transforms.ExpTransform) and type(base) is DiagonalNormal:
        return LogNormal(base.latent_dim)
    return transformed(base, transform)


def _changes_nothing(transform: Any) -> bool:
    if isinstance(transform, transforms.IndependentTransform):
        return _changes_nothing(transform.base_transform)
    if isinstance(transform, transforms.AffineTransform):
        loc, scale = torch.as_tensor(transform.loc), torch.as_tensor(transform.scale)
        return bool((loc == 0).all() and (scale == 1).all())
    return isinstance(transform, transforms.ComposeTransform) and all(
        _changes_nothing(part) for part in transform.parts
    )


def _fixed(name: str, transform: Any, u: Tensor) -> Any:
    """The transform, with one row of what it holds for each row, if these are equal.

    Args:
        name: The site's name.
        transform: Any transform.
        u: What it is applied to, ``(batch, *event)``.

    Raises:
        ValueError: If it differs between rows.
    """
    for one in (_of_one_row(transform, len(u)), transform):
        if _acts_alike_on_all_rows(one, u, transform(u)):
            return one
    raise ValueError(
        f"Site {name!r}: {type(transform).__name__} is a transform that differs between rows, and "
        f"no fixed one. Put what depends on x into the parameters of the distribution that is "
        f"transformed, or name a family to measure against: family=..."
    )


def _acts_alike_on_all_rows(transform: Any, u: Tensor, value: Tensor) -> bool:
    """Whether the rows of ``u``, in another order and number, go to the same values."""
    try:
        moved = transform(torch.cat([u.roll(1, dims=0), u[:1]]))
    except (RuntimeError, ValueError):  # It holds something of another size.
        return False
    return torch.allclose(moved[:-1].roll(-1, dims=0), value, rtol=1e-4, atol=1e-5)


def _of_one_row(transform: Any, rows: int) -> Any:
    """The transform with only the first row of each tensor that has one for each row."""
    if isinstance(transform, transforms.ComposeTransform):
        return transforms.ComposeTransform([_of_one_row(part, rows) for part in transform.parts])
    if isinstance(transform, transforms.IndependentTransform):
        base = _of_one_row(transform.base_transform, rows)
        return transforms.IndependentTransform(base, transform.reinterpreted_batch_ndims)
    if isinstance(transform, nn.Module):
        return transform
    other = copy.copy(transform)
    for key, value in vars(transform).items():
        if isinstance(value, Tensor) and value.dim() and len(value) == rows:
            setattr(other, key, value[0])
    return other


def _read_part(site: GuideSite) -> tuple[Family, Tensor]:
    """A site that is a part of an auxiliary draw, behind the map onto its support."""
    fn, inner, part = site.fn, innermost(site.fn), site.part
    assert part is not None
    rows, event = tuple(fn.batch_shape), tuple(fn.event_shape)
    count = part.stop - part.start
    whole = count == torch.Size(event).numel()
    shape = torch.Size(site.transform.inverse_shape(site.value.shape))[1:]
    if isinstance(inner, dist.Normal):
        loc, scale = (
            getattr(inner, argument).expand(*rows, *event).reshape(*rows, -1)[..., part]
            for argument in ("loc", "scale")
        )
        base: Family = DiagonalNormal(count if shape else None)
        if not shape:
            loc, scale = loc[..., 0], scale[..., 0]
        params = base.params_of(dist.Normal(loc, scale))
    elif isinstance(inner, dist.MultivariateNormal) and whole:
        base = FullRankNormal(count)
        params = base.params_of(fn)
    else:
        what = type(inner).__name__
        raise ValueError(
            f"Site {site.name!r} is drawn from a {what} "
            f"{'that it shares with other sites' if not whole else 'of an auxiliary variable'}, so "
            f"that it has no parameters of its own to free. Name a family for each site to "
            f"measure against: family={{{site.name!r}: DiagonalNormal(...), ...}}."
        )
    if len(shape) > 1:
        base = transformed(
            base, transforms.ReshapeTransform(torch.Size((count,)), torch.Size(shape))
        )
    if isinstance(base, FullRankNormal) and not shape:
        base = transformed(base, transforms.ReshapeTransform(torch.Size((1,)), torch.Size(())))
    u = base.distribution(params).sample()
    return behind(base, _fixed(site.name, site.transform, u)), params
