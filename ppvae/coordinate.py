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
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ppvae.configurations import MOST_CONFIGURATIONS, joint_table, num_configurations
from ppvae.density import Held, ModelSites, Program, draw_chunks, joint, prior_draws
from ppvae.families import DiscreteFamily, Family, GaussianFamily, Given, split_sites
from ppvae.fisher import LocalElbo
from ppvae.natural import GaussianElbo

Ends = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""λ, the gain still promised, its noise, steps, the start that won, the gain over the first."""

# A table of log densities has this many configurations at most; more are sampled.
MOST_IN_TABLE = MOST_CONFIGURATIONS
_SWEEPS = 200
_IMPOSSIBLE = 1e4
_LEAST_DRAWS = 16
_SAMPLED_SWEEPS = 30
_REPLICATES = 4
_JUDGES = 256
# Log odds of a start at a single configuration, and how many of the best have one.
_NARROW, _TOP = 20.0, 8
_PRIOR_DRAWS = 256


def all_discrete(families: Mapping[str, Family]) -> bool:
    """Whether every site has a discrete family."""
    return all(isinstance(family, DiscreteFamily) for family in families.values())


def clamped_site(families: Mapping[str, Family]) -> str | None:
    """The categorical site on which the families of all others hang, if there is one."""
    found = [name for name, f in families.items() if isinstance(f, DiscreteFamily)]
    others = [f for name, f in families.items() if name not in found]
    given = all(isinstance(f, Given) and f.given == found[0] for f in others) if found else False
    return found[0] if len(found) == 1 and others and given else None


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
    num_draws: int,
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
        num_draws: Draws for each expectation, where the configurations are too many to list.

    Returns:
        λ, the gain that a further sweep promises, what that figure would be at the optimum from
        noise alone, the sweeps of all starts, which start won, and what it brought over the first.
    """
    elements = Elements(families)
    climb: Enumerated | Sampled
    if num_configurations(sites) <= MOST_IN_TABLE:
        climb = Enumerated(elements, joint_table(model, x, sites).detach())
    else:
        climb = Sampled(elements, model, x, num_draws)
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


def _narrow(classes: Sequence[Tensor], table: Tensor) -> list[Tensor]:
    """Log probabilities near one configuration: ``(rows,)`` classes for each element."""
    return [
        (_NARROW * torch.nn.functional.one_hot(c, size).to(table.dtype)).log_softmax(dim=-1)
        for c, size in zip(classes, table.shape[:-1], strict=True)
    ]


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
        table = torch.nan_to_num(table.double(), nan=-torch.inf, neginf=-torch.inf)
        best = table.amax(dim=0)
        self.possible = torch.isfinite(best)
        best = torch.where(self.possible, best, 0.0)
        table = torch.maximum(table, best - _IMPOSSIBLE)
        self.dtype = table.dtype
        self.table = table.reshape(*elements.classes, self.rows)
        self.count = len(elements.classes)

    def further_starts(self) -> list[list[Tensor]]:
        """The exact marginals, and a start at each of the best configurations."""
        posterior = self.table.flatten(0, -2).log_softmax(dim=0).reshape(self.table.shape)
        axes = range(self.count)
        marginals = [
            posterior.logsumexp([a for a in axes if a != i]).mT if self.count > 1 else posterior.mT
            for i in axes
        ]
        flat = self.table.flatten(0, -2)
        top = flat.topk(min(_TOP, len(flat)), dim=0).indices
        classes = torch.unravel_index(top, self.table.shape[:-1])
        return [marginals, *(_narrow([c[k] for c in classes], self.table) for k in range(len(top)))]

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
        return torch.where(self.possible, gain, torch.inf), torch.zeros_like(gain)


class Sampled:
    """The local ELBO where the configurations are too many to list.

    Args:
        elements: The elements of the latent sites.
        model: A Pyro model.
        x: Rows.
        num_draws: Draws of the other elements for each expectation.
    """

    def __init__(self, elements: Elements, model: Program, x: Tensor, num_draws: int) -> None:
        self.elements, self.model, self.x = elements, model, x
        self.draws = max(_LEAST_DRAWS, num_draws // 8)

    def further_starts(self) -> list[list[Tensor]]:
        """A start at the best of some draws from the prior."""
        values = prior_draws(self.model, self.x, _PRIOR_DRAWS)
        classes = torch.cat(
            [
                values[name].reshape(_PRIOR_DRAWS, len(self.x), family.size).long()
                for name, family in self.elements.families.items()
            ],
            dim=-1,
        )
        best = self._joint(classes).argmax(dim=0)
        chosen = classes[best, torch.arange(len(self.x), device=self.x.device)]
        return [
            [
                (_NARROW * torch.nn.functional.one_hot(chosen[:, i], count))
                .to(self.x)
                .log_softmax(dim=-1)
                for i, count in enumerate(self.elements.classes)
            ]
        ]

    def _draw(self, log_q: Sequence[Tensor], draws: int) -> Tensor:
        """Classes ``(draws, rows, elements)``; all rows share their uniform numbers."""
        uniform = torch.rand(draws, 1, len(log_q)).to(self.x)
        classes = [self._classes(uniform[..., i : i + 1], part) for i, part in enumerate(log_q)]
        return torch.stack(classes, dim=-1)

    def _classes(self, uniform: Tensor, log_q: Tensor) -> Tensor:
        return (uniform > log_q.exp().cumsum(dim=-1)[:, :-1]).sum(dim=-1)

    def _joint(self, classes: Tensor) -> Tensor:
        sizes = draw_chunks(len(classes), self.x)
        value = torch.cat(
            [
                joint(self.model, self.x, self.elements.values(part, self.x))
                for part in classes.split(sizes)
            ]
        )
        # As in a table: what is impossible is far below what is not.
        value = torch.nan_to_num(value, nan=-torch.inf, neginf=-torch.inf)
        best = torch.nan_to_num(value.amax(dim=0), neginf=0.0)
        return torch.maximum(value, best - _IMPOSSIBLE)

    def _target(self, classes: Tensor, element: int) -> Tensor:
        """t of one element, ``(rows, classes)``, from draws of the others."""
        count = self.elements.classes[element]
        changed = classes.expand(count, *classes.shape).clone()
        changed[..., element] = torch.arange(count, device=classes.device)[:, None, None]
        log_p = self._joint(changed.flatten(0, 1)).reshape(count, len(classes), -1)
        return log_p.mean(dim=1).mT

    def ascend(
        self, begin: Sequence[Tensor], max_steps: int | None, tolerance: float
    ) -> tuple[list[Tensor], Tensor]:
        """Sweeps over the elements at a falling rate; the end, and the number of sweeps."""
        log_q = [part.to(self.x) for part in begin]
        count = max_steps or _SAMPLED_SWEEPS
        for t in range(count):
            # Full steps first; then the mean of many removes the noise of the draws.
            rate = min(1.0, 2 / max(1, t - 3))
            uniform = torch.rand(self.draws, 1, len(log_q)).to(self.x)
            parts = [self._classes(uniform[..., i : i + 1], p) for i, p in enumerate(log_q)]
            classes = torch.stack(parts, dim=-1)
            for i, part in enumerate(log_q):
                target = self._target(classes, i)
                log_q[i] = ((1 - rate) * part + rate * target).log_softmax(dim=-1)
                # The elements that follow see what this one has become.
                classes[..., i] = self._classes(uniform[..., i : i + 1], log_q[i])
        steps = torch.full((len(self.x),), count, dtype=torch.long, device=self.x.device)
        return log_q, steps

    def elbo(self, log_q: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The local ELBO, and its standard error."""
        log_p = self._joint(self._draw(log_q, _JUDGES))
        entropy = -sum(((part.exp() * part).sum(dim=-1) for part in log_q), torch.zeros(()))
        return log_p.mean(dim=0) + entropy, log_p.std(dim=0) / math.sqrt(_JUDGES)

    def promise(self, log_q: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What the steps of all elements promise, and the part of it that is noise."""
        samples = [self._draw(log_q, 4 * self.draws) for _ in range(_REPLICATES)]
        gain = torch.zeros(len(self.x)).to(self.x)
        noise = torch.zeros_like(gain)
        for i, part in enumerate(log_q):
            targets = torch.stack([self._target(classes, i) for classes in samples])
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
    values = [
        value_at(held(model, site, families, label, x), bases, x, end[0], num_draws)
        for label, end in enumerate(ends)
    ]
    value = torch.stack(values, dim=-1)
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


def value_at(
    model: Program, families: Mapping[str, Family], x: Tensor, params: Tensor, num_draws: int
) -> Tensor:
    """The local ELBO at λ ``(batch,)``, of Gaussians up to a constant; −∞ where it is none."""
    if all(isinstance(family, GaussianFamily) for family in families.values()):
        local = GaussianElbo(model, families, params)
        gaussian = local.gaussian(params)
        with torch.enable_grad():
            parts = [
                local.evaluate(x, *gaussian, local.nodes(num_draws, x)).value
                for _ in range(_REPLICATES)
            ]
    else:
        elbo = LocalElbo(model, families, num_draws)
        with torch.no_grad():
            parts = [
                elbo.log_weights(x, params, num_draws).mean(dim=0) for _ in range(4 * _REPLICATES)
            ]
    return torch.nan_to_num(torch.stack(parts).mean(dim=0), nan=-torch.inf)


def bases_of(families: Mapping[str, Family], site: str) -> dict[str, Family]:
    """The families of the other sites, with the value of ``site`` held."""
    return {n: f.base for n, f in families.items() if n != site and isinstance(f, Given)}


def held(
    model: Program, site: str, families: Mapping[str, Family], label: int, like: Tensor
) -> Program:
    """The model with ``site`` held at one of its values for all rows."""
    family = families[site]
    assert isinstance(family, DiscreteFamily)
    value = family.values(torch.tensor([label], device=like.device)).reshape(family.event_shape)
    return Held(model, {site: value.to(like.dtype) if value.is_floating_point() else value})


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
