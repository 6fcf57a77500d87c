r"""Coordinate ascent of the local ELBO over discrete latents, many rows at once.

A mean-field family over elements with finitely many values has, for each element i, the optimum

.. math:: q_i(k) \propto \exp t_i(k), \qquad
          t_i(k) = \mathrm{E}_{q_{-i}}[\log p(x, z_{-i}, z_i = k)]

given the others, and the ELBO rises by :math:`\mathrm{KL}(q_i \,\|\, \mathrm{softmax}\, t_i)` with
the step to it (Bishop 2006, eq. 10.9). Where all configurations can be listed, the expectation is a
sum; elsewhere it is a mean over draws of the other elements, each value of element i put in turn
(local expectation gradients: Titsias & Lázaro-Gredilla 2015), and the steps are damped.

A family that holds a Gaussian for each value of one categorical site needs no more: with that value
held, each Gaussian is a problem of its own, and :math:`q(k) \propto \exp L_k` at their optima.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from pyro import poutine
from torch import Tensor

from ppvae.configurations import joint_table, num_configurations
from ppvae.density import ModelSites, Program, draw_chunks, joint
from ppvae.families import DiscreteFamily, Family, GaussianFamily, Given, split_sites
from ppvae.natural import GaussianElbo

Ends = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""λ, the gain still promised, its noise, steps, the start that won, the gain over the first."""

# A table of log densities has this many configurations at most; more are sampled.
MOST_IN_TABLE = 2**12
_SWEEPS = 200
_IMPOSSIBLE = 1e4
_DRAWS = 16
_DAMPED_STEPS = 40
_REPLICATES = 4
_JUDGES = 256
# Log odds of a start at a single configuration.
_NARROW = 2.0


def all_discrete(families: Mapping[str, Family]) -> bool:
    """Whether every site has a discrete family."""
    return all(isinstance(family, DiscreteFamily) for family in families.values())


def clamped_site(families: Mapping[str, Family]) -> str | None:
    """The scalar discrete site on which Gaussian families for all others hang, if there is one."""
    found = [name for name, f in families.items() if isinstance(f, DiscreteFamily) and f.size == 1]
    others = [f for name, f in families.items() if [name] != found]
    if len(found) != 1 or not others:
        return None
    given = all(
        isinstance(f, Given) and f.given == found[0] and isinstance(f.base, GaussianFamily)
        for f in others
    )
    return found[0] if given else None


class Elements:
    """The elements of all sites in a row, and λ as their log probabilities.

    Args:
        families: `DiscreteFamily` by latent site.
    """

    def __init__(self, families: Mapping[str, Family]) -> None:
        self.families: dict[str, DiscreteFamily] = {}
        self.classes: list[int] = []
        for name, family in families.items():
            assert isinstance(family, DiscreteFamily)
            self.families[name] = family
            self.classes += [family.num_classes] * family.size

    def log_probs(self, params: Tensor) -> list[Tensor]:
        """Log probabilities by element, each ``(*batch, classes)``."""
        parts = split_sites(self.families, params)
        return [
            element
            for name, family in self.families.items()
            for element in family.log_probs(parts[name]).unbind(-2)
        ]

    def params(self, log_probs: Sequence[Tensor]) -> Tensor:
        """λ of log probabilities by element: the inverse of `log_probs`."""
        parts, at = [], 0
        for family in self.families.values():
            part = torch.stack(list(log_probs[at : at + family.size]), dim=-2)
            parts.append(family.from_log_probs(part))
            at += family.size
        return torch.cat(parts, dim=-1)

    def values(self, classes: Tensor, like: Tensor) -> dict[str, Tensor]:
        """Latents by site of classes ``(*batch, elements)``."""
        out, at = {}, 0
        for name, family in self.families.items():
            value = family.values(classes[..., at : at + family.size])
            out[name] = value.to(like.dtype) if value.is_floating_point() else value
            at += family.size
        return out


def coordinate_ascent(
    model: Program,
    families: Mapping[str, Family],
    sites: ModelSites,
    x: Tensor,
    starts: Sequence[Tensor],
    max_steps: int | None,
    tolerance: float,
) -> Ends:
    """Climb from several starts to each row's best end; one step is a sweep over all elements.

    Args:
        model: A Pyro model.
        families: `DiscreteFamily` by latent site.
        sites: The model's latent sites; their order is that of ``families``.
        x: Rows.
        starts: λ of all sites, ``(batch, P)`` each.
        max_steps: Most sweeps per start.
        tolerance: A row with less than this to gain, in nats, has arrived.

    Returns:
        λ, the gain that a further sweep promises, what that figure would be at the optimum from
        noise alone, the sweeps of all starts, which start won, and what it brought over the first.
    """
    elements = Elements(families)
    climb: Enumerated | Sampled
    if num_configurations(sites) <= MOST_IN_TABLE:
        climb = Enumerated(elements, joint_table(model, x, sites).detach())
    else:
        climb = Sampled(elements, model, x)
    begins = [elements.log_probs(start) for start in starts] + climb.further_starts()
    best: list[Tensor] = []
    for number, begin in enumerate(begins):
        end, steps = climb.ascend(begin, max_steps, tolerance)
        value, error = climb.elbo(end)
        if not best:
            best, high, uncertain, total = end, value, error, steps
            winner = torch.zeros_like(steps)
            restart = torch.zeros_like(value)
            continue
        gain = value - high
        better = gain > 2 * torch.hypot(error, uncertain)
        best = [torch.where(better[:, None], e, b) for e, b in zip(end, best, strict=True)]
        high, uncertain = torch.where(better, value, high), torch.where(better, error, uncertain)
        winner = torch.where(better, number, winner)
        restart = restart + torch.where(better, gain, 0.0)
        total = total + steps
    gain, noise = climb.promise(best)
    params, gain, noise, restart = (
        part.to(x) for part in (elements.params(best), gain, noise, restart)
    )
    return params, gain, noise, total, winner, restart


def _rise(log_q: Tensor, target: Tensor) -> Tensor:
    """KL(q ‖ softmax target): what the step to the target brings, with the others held."""
    return (log_q.exp() * (log_q - target.log_softmax(dim=-1))).sum(dim=-1)


class Enumerated:
    """The local ELBO where log p(x, z) is known at every z.

    Args:
        elements: The elements of the latent sites.
        table: log p(x, z), ``(configurations, batch)``; see `ppvae.configurations.joint_table`.
    """

    def __init__(self, elements: Elements, table: Tensor) -> None:
        self.elements = elements
        self.rows = table.shape[1]
        # A configuration of density zero must not make 0 · ∞.
        table = torch.nan_to_num(table.double(), nan=-torch.inf)
        table = torch.maximum(table, table.amax(dim=0) - _IMPOSSIBLE)
        self.dtype = table.dtype
        self.table = table.reshape(*elements.classes, self.rows)
        self.count = len(elements.classes)

    def further_starts(self) -> list[list[Tensor]]:
        """The exact marginals, and a start near the best configuration."""
        posterior = self.table.flatten(0, -2).log_softmax(dim=0).reshape(self.table.shape)
        axes = range(self.count)
        marginals = [
            posterior.logsumexp([a for a in axes if a != i]).mT if self.count > 1 else posterior.mT
            for i in axes
        ]
        narrow = []
        for i in axes:
            others = [a for a in axes if a != i]
            profile = self.table.amax(others) if others else self.table
            best = torch.nn.functional.one_hot(profile.argmax(dim=0), profile.shape[0])
            narrow.append((_NARROW * best.to(self.dtype)).log_softmax(dim=-1))
        return [marginals, narrow]

    def of_rows(self, rows: Tensor) -> Enumerated:
        """The same for some of the rows."""
        return Enumerated(self.elements, self.table[..., rows].flatten(0, -2))

    def _target(self, log_q: Sequence[Tensor], element: int) -> Tensor:
        """t for one element, ``(rows, classes)``."""
        out = self.table
        for axis in range(self.count - 1, -1, -1):
            if axis != element:
                weight = log_q[axis].exp().mT
                shape = [1] * (out.dim() - 1)
                shape[axis] = len(weight)
                out = (out * weight.reshape(*shape, self.rows)).sum(dim=axis, keepdim=True)
        return out.reshape(-1, self.rows).mT

    def ascend(
        self, begin: Sequence[Tensor], max_steps: int | None, tolerance: float
    ) -> tuple[list[Tensor], Tensor]:
        """Sweep until no row has more to gain; the end, and the sweeps of each row."""
        log_q = [part.to(self.dtype) for part in begin]
        steps = torch.zeros(self.rows, dtype=torch.long, device=self.table.device)
        moving = torch.ones(self.rows, dtype=torch.bool, device=self.table.device)
        for _ in range(max_steps or _SWEEPS):
            steps += moving
            rise = torch.zeros(self.rows, dtype=self.dtype, device=self.table.device)
            for i in range(self.count):
                target = self._target(log_q, i).log_softmax(dim=-1)
                rise += _rise(log_q[i], target)
                log_q[i] = target
            moving = rise > 1e-3 * tolerance
            if not bool(moving.any()):
                break
        return log_q, steps

    def elbo(self, log_q: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The local ELBO, and what is not to be told apart from it."""
        target = self._target(log_q, 0)
        entropy = -sum(((part.exp() * part).sum(dim=-1) for part in log_q), torch.zeros(()))
        value = (log_q[0].exp() * target).sum(dim=-1) + entropy
        # Two ends of one optimum differ by what the sweeps left.
        return value, torch.full_like(value, 1e-6)

    def promise(self, log_q: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What the steps of all elements promise, one by one; there is no noise."""
        rises = [_rise(log_q[i], self._target(log_q, i)) for i in range(self.count)]
        gain = torch.stack(rises).sum(dim=0)
        return gain, torch.zeros_like(gain)


class Sampled:
    """The local ELBO where the configurations are too many to list.

    Args:
        elements: The elements of the latent sites.
        model: A Pyro model.
        x: Rows.
    """

    def __init__(self, elements: Elements, model: Program, x: Tensor) -> None:
        self.elements, self.model, self.x = elements, model, x

    def further_starts(self) -> list[list[Tensor]]:
        """None: there is no list of configurations to choose from."""
        return []

    def _draw(self, log_q: Sequence[Tensor], draws: int) -> Tensor:
        """Classes ``(draws, rows, elements)``; all rows share their uniform numbers."""
        uniform = torch.rand(draws, 1, len(log_q)).to(self.x)
        classes = [
            (uniform[..., i : i + 1] > part.exp().cumsum(dim=-1)[:, :-1]).sum(dim=-1)
            for i, part in enumerate(log_q)
        ]
        return torch.stack(classes, dim=-1)

    def _joint(self, classes: Tensor) -> Tensor:
        sizes = draw_chunks(len(classes), self.x)
        return torch.cat(
            [
                joint(self.model, self.x, self.elements.values(part, self.x))
                for part in classes.split(sizes)
            ]
        )

    def _targets(self, log_q: Sequence[Tensor], draws: int) -> Iterator[Tensor]:
        """t of each element, ``(rows, classes)``, from common draws of the others."""
        classes = self._draw(log_q, draws)
        for i, count in enumerate(self.elements.classes):
            changed = classes.expand(count, *classes.shape).clone()
            changed[..., i] = torch.arange(count, device=classes.device)[:, None, None]
            log_p = self._joint(changed.flatten(0, 1)).reshape(count, draws, -1)
            yield log_p.mean(dim=1).mT

    def ascend(
        self, begin: Sequence[Tensor], max_steps: int | None, tolerance: float
    ) -> tuple[list[Tensor], Tensor]:
        """Damped steps at a falling rate; the end, and the number of steps."""
        log_q = list(begin)
        count = max_steps or _DAMPED_STEPS
        for t in range(count):
            # All elements move at once, which full steps would make swing.
            rate = min(0.5, 4 / (t + 1))
            targets = list(self._targets(log_q, _DRAWS))
            log_q = [
                ((1 - rate) * part + rate * target).log_softmax(dim=-1)
                for part, target in zip(log_q, targets, strict=True)
            ]
        steps = torch.full((len(self.x),), count, dtype=torch.long, device=self.x.device)
        return log_q, steps

    def elbo(self, log_q: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The local ELBO, and its standard error."""
        log_p = self._joint(self._draw(log_q, _JUDGES))
        entropy = -sum(((part.exp() * part).sum(dim=-1) for part in log_q), torch.zeros(()))
        return log_p.mean(dim=0) + entropy, log_p.std(dim=0) / math.sqrt(_JUDGES)

    def promise(self, log_q: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What the steps of all elements promise, and the part of it that is noise."""
        replicates = [list(self._targets(log_q, 4 * _DRAWS)) for _ in range(_REPLICATES)]
        gain = torch.zeros(len(self.x)).to(self.x)
        noise = torch.zeros_like(gain)
        for i, part in enumerate(log_q):
            targets = torch.stack([replicate[i] for replicate in replicates])
            gain = gain + _rise(part, targets.mean(dim=0))
            # Near the optimum the rise is half the variance under q of the target's error.
            error = targets - targets.mean(dim=0)
            centred = error - (part.exp() * error).sum(dim=-1, keepdim=True)
            variance = (part.exp() * centred.square()).sum(dim=-1).sum(dim=0) / (_REPLICATES - 1)
            noise = noise + 0.5 * variance / _REPLICATES
        return gain, noise


def combine_classes(
    model: Program,
    site: str,
    families: Mapping[str, Family],
    x: Tensor,
    ends: Sequence[Ends],
    num_draws: int,
) -> Ends:
    """Put the optima with ``site`` held at each of its values together: q(k) ∝ exp L_k.

    Args:
        model: A Pyro model.
        site: The discrete site.
        families: By site, the families that hang on it are `Given`.
        x: Rows.
        ends: For each value of the site, the end with that value held; λ of the other sites.
        num_draws: Draws per row for each L_k.
    """
    bases = bases_of(families, site)
    local = GaussianElbo(model, bases, x)
    values = []
    for label, end in enumerate(ends):
        local.model = held(model, site, families, label, x)
        gaussian = local.gaussian(end[0])
        with torch.enable_grad():
            states = [
                local.evaluate(x, *gaussian, local.nodes(num_draws, x)) for _ in range(_REPLICATES)
            ]
        values.append(torch.stack([state.value for state in states]).mean(dim=0))
    # The entropy's constant is the same for all values of the site.
    value = torch.stack(values, dim=-1)
    value = torch.nan_to_num(value, nan=-torch.inf)
    log_q = (value - value.amax(dim=-1, keepdim=True)).log_softmax(dim=-1)
    q = log_q.exp()

    def average(column: int) -> Tensor:
        stacked = torch.stack([end[column] for end in ends], dim=-1)
        return torch.where(q > 0, q * stacked, 0.0).sum(dim=-1)

    likeliest = q.argmax(dim=-1)
    winner = torch.stack([end[4] for end in ends], dim=-1).gather(-1, likeliest[:, None])[:, 0]
    steps = torch.stack([end[3] for end in ends]).sum(dim=0)
    params = join_classes(families, site, log_q, [end[0] for end in ends])
    return params, average(1), average(2), steps, winner, average(5)


def bases_of(families: Mapping[str, Family], site: str) -> dict[str, Family]:
    """The families of the other sites, with the value of ``site`` held."""
    return {n: f.base for n, f in families.items() if n != site and isinstance(f, Given)}


def held(
    model: Program, site: str, families: Mapping[str, Family], label: int, like: Tensor
) -> Program:
    """The model with ``site`` held at one of its values for all rows."""
    family = families[site]
    assert isinstance(family, DiscreteFamily)
    value = family.values(torch.tensor([label], device=like.device))
    value = value.reshape(family.event_shape)
    value = value.to(like.dtype) if value.is_floating_point() else value
    return poutine.condition(model, data={site: value})


def split_classes(families: Mapping[str, Family], site: str, params: Tensor) -> list[Tensor]:
    """λ of the other sites for each value of ``site``."""
    by_site = split_sites(families, params)
    parts = [f.by_class(by_site[n]) for n, f in families.items() if isinstance(f, Given)]
    return list(torch.cat(parts, dim=-1).unbind(-2))


def join_classes(
    families: Mapping[str, Family], site: str, log_q: Tensor, params: Sequence[Tensor]
) -> Tensor:
    """λ of all sites: the inverse of `split_classes`."""
    stacked, at, parts = torch.stack(list(params), dim=-2), 0, []
    for name, family in families.items():
        if name == site:
            assert isinstance(family, DiscreteFamily)
            parts.append(family.from_log_probs(log_q[..., None, :]))
        else:
            assert isinstance(family, Given)
            count = family.base.num_params
            parts.append(stacked[..., at : at + count].flatten(-2))
            at += count
    return torch.cat(parts, dim=-1)
