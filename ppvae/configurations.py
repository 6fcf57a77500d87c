"""The values that finitely many discrete latent variables can have together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from ppvae.density import LatentSite, ModelSites, Program, draw_chunks, joint

MOST_CONFIGURATIONS = 2**14
"""Above this, sums over all configurations give way to sampling."""


def num_classes(site: LatentSite) -> int | None:
    """How many values an element of the site has; `None` if infinitely many.

    Example:
        >>> import pyro.distributions as dist
        >>> num_classes(LatentSite("z", (3,), dist.Bernoulli(0.5).support, "Bernoulli"))
        2
    """
    first, last = _limits(site)
    return None if first is None or last is None else last - first + 1


def _base(site: LatentSite) -> Any:
    support = site.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def _limits(site: LatentSite) -> tuple[int | None, int | None]:
    support = _base(site)
    if not site.is_discrete:
        return None, None
    if support is constraints.boolean:
        return 0, 1
    lower, upper = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    bounds = [torch.as_tensor(b) for b in (lower, upper) if b is not None]
    if len(bounds) < 2 or any(b.numel() > 1 and bool((b != b.flatten()[0]).any()) for b in bounds):
        return None, None
    first, last = (int(b.flatten()[0]) for b in bounds)
    return first, last


def num_configurations(sites: ModelSites) -> float:
    """How many values all latent sites have together; infinite where one is not finite."""
    classes = [(num_classes(site), site.size) for site in sites.latents.values()]
    if any(count is None for count, _ in classes):
        return math.inf
    return float(math.prod(count**size for count, size in classes if count is not None))


def configurations(sites: Sequence[LatentSite], like: Tensor) -> dict[str, Tensor]:
    """All values of these sites, ``(configurations, *event_shape)`` by site.

    Args:
        sites: Discrete sites with finitely many values. The elements of the first vary slowest.
        like: A tensor on the device, and with the floating point type, of binary values.
    """
    classes: list[int] = []
    for site in sites:
        count = num_classes(site)
        assert count is not None
        classes += [count] * site.size
    axes = [torch.arange(count, device=like.device) for count in classes]
    table = torch.cartesian_prod(*axes) if len(axes) > 1 else axes[0][:, None]
    out, at = {}, 0
    for site in sites:
        first, _ = _limits(site)
        value = table[:, at : at + site.size] + (first or 0)
        value = value.reshape(len(table), *site.event_shape)
        # Binary variables are numbers to decoders; categories are indices.
        out[site.name] = value.to(like.dtype) if _base(site) is constraints.boolean else value
        at += site.size
    return out


def joint_table(model: Program, x: Tensor, sites: ModelSites) -> Tensor:
    """Log joint density at all configurations, ``(configurations, batch)``.

    For code that provides the contexts of `ppvae.density.judging` itself.
    """
    values: Mapping[str, Tensor] = configurations(list(sites.latents.values()), x)
    count = len(next(iter(values.values())))
    parts, at = [], 0
    for size in draw_chunks(count, x):
        here = {
            name: value[at : at + size, None].expand(size, len(x), *value.shape[1:])
            for name, value in values.items()
        }
        parts.append(joint(model, x, here))
        at += size
    return torch.cat(parts)
