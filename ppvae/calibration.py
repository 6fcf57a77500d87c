r"""Calibration of guides on data that the model simulates, where the true latents are known.

A latent :math:`z^* \sim p(z)` and its row :math:`x \sim p(x \mid z^*)` make :math:`z^*` one exact
draw from :math:`p(z \mid x)`. If the guide is that posterior, nothing tells :math:`z^*` from the
guide's own draws; what does tell it is the guide's error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppvae.density import (
    ModelSites,
    Program,
    check_count,
    check_pair,
    draw_chunks,
    guided,
    judging,
    prior_draws,
    read_model,
    sample_sites,
)
from ppvae.diagnostics import element_names
from ppvae.guides import PerDatapoint
from ppvae.isolation import check_rows, evaluation_mode, forked_rng, private_store
from ppvae.local import LocalFit, fit_per_datapoint
from ppvae.simulation import Simulated, simulate
from ppvae.uniformity import holm, symmetry, uniformity

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""The levels of intervals that are looked at."""

# With fewer draws a 90 % interval has less than one draw outside of it at each end.
_LEAST_DRAWS = 19
# Draws of the prior from which its variance is found, to some 1 %.
_PRIOR_DRAWS = 20_000
# The streams of random numbers of one call. They lie far from each other and from the seeds that
# a caller counts up: draws from the stream that made the data would be no independent draws.
_DRAWS_STREAM, _TIES_STREAM, _PRIOR_STREAM = 271_828_183, 314_159_265, 141_421_356
_FIT_STREAM = 173_205_080
# What an element is called off by, in standard errors, once it is known to be off.
_OFF = 3.0
_TABLE = (
    "is a table with a row for each datum that it was fitted to, and the rows here are drawn anew. "
    "Pass the guide that it started from, with per_datapoint=True; or draw rows by ppvae.simulate, "
    "fit to them, and pass these rows as x and their latents as latents."
)


@dataclass(frozen=True)
class GuideCalibration:
    r"""How one guide's posteriors stand to the latents that the rows were simulated from.

    Attributes:
        names: Site and index of each latent element, such as ``"z[0]"``.
        ranks: How many of the guide's draws lie below the true value, ``(batch, elements)``,
            integers from 0 to S. Ties, which discrete latents have, are broken at random.
        pit: Where the true value lies in the guide's distribution, ``(batch, elements)``, between
            0 and 1: the rank plus a uniform number, over S + 1. Uniform if the guide is the exact
            posterior.
        z_scores: :math:`(E_q[z] - z^*) / \mathrm{sd}_q(z)`, ``(batch, elements)``. Above 0 the
            guide is too high. Of S draws of an exact normal posterior its variance is
            :math:`(1 + 1/S)(S - 1)/(S - 3)`. Where all draws are equal it is 0 or infinite.
        contraction: :math:`1 - \mathrm{Var}_q(z) / \mathrm{Var}_p(z)`, ``(batch, elements)``: 0
            where the guide is as wide as the prior, 1 where it is a point.
        num_samples: Draws S per row.
    """

    names: tuple[str, ...]
    ranks: Tensor
    pit: Tensor
    z_scores: Tensor
    contraction: Tensor
    num_samples: int

    @cached_property
    def p_values(self) -> Tensor:
        """p-values of uniform ranks (SBC), ``(elements,)``; see `ppvae.uniformity.uniformity`.

        Small where the guide is off in any way: in place, in width or in shape.
        """
        return self._by_element([uniformity(u) for u in self._columns()])

    @cached_property
    def symmetry_p_values(self) -> Tensor:
        """p-values of symmetric ranks (VSBC), ``(elements,)``; see `ppvae.uniformity.symmetry`.

        Small where the guide is biased to one side. One that is too narrow, or too wide, at the
        right place is symmetric.
        """
        return self._by_element([symmetry(u) for u in self._columns()])

    def coverage(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Share of the true values in the guide's central intervals, and its standard error.

        The interval is that of the draws, with both ends at random between two of them, so that
        an exact posterior covers at ``level`` for any number of draws and of discrete latents.

        Args:
            level: Probability that the guide gives to the interval, between 0 and 1.

        Returns:
            ``(elements,)`` each. The binomial error is taken at a share with one more row inside
            and one more outside, so that it is not 0 for a share of 0 or 1.

        Raises:
            ValueError: If the level is not between 0 and 1.
        """
        _check_level(level)
        count, rows = ((self.pit - 0.5).abs() <= level / 2).double().sum(dim=0), len(self.pit)
        smooth = (count + 1) / (rows + 2)
        return count / rows, (smooth * (1 - smooth) / rows).sqrt()

    def rejected(self, level: float = 0.05) -> tuple[str, ...]:
        """The elements whose ranks are not uniform, by Holm's correction for their number.

        Args:
            level: Probability of one or more wrong rejections, at most.
        """
        _check_level(level)
        wrong = holm(self.p_values.cpu().numpy()) <= level
        return tuple(name for name, off in zip(self.names, wrong.tolist(), strict=True) if off)

    def passes(self, level: float = 0.05) -> bool:
        """Whether the ranks of no element are rejected."""
        return not self.rejected(level)

    def _columns(self) -> list[Any]:
        return list(self.pit.T.cpu().numpy())

    def _by_element(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.pit.device)

    def _misfit(self, name: str) -> str:
        """What is off with an element, in words."""
        at, rows = self.names.index(name), len(self.pit)
        u = self.pit[:, at]
        labels, facts = [], []
        below = float((u < 0.5).double().mean())
        if abs(below - 0.5) > _OFF * 0.5 / rows**0.5:
            side, truth = ("high", "below") if below > 0.5 else ("low", "above")
            share = max(below, 1 - below)
            labels.append(f"too {side}")
            error = (share * (1 - share) / rows) ** 0.5
            facts.append(f"the truth is {truth} its median in {_percent(share, error)}")
        # Intervals of the right width at the wrong place hold too little, so that the width is
        # told by the spread about the middle, in units of a standard normal.
        spread = float(torch.special.ndtri(u).std())
        if abs(spread - 1) > _OFF / (2 * rows) ** 0.5:
            labels.append("too narrow" if spread > 1 else "too wide")
        held = {level: [float(part[at]) for part in self.coverage(level)] for level in LEVELS}
        off = {
            level: abs(share - level) / (level * (1 - level) / rows) ** 0.5
            for level, (share, _) in held.items()
        }
        # The level that readers know best, unless another one shows more.
        told = LEVELS[-1] if off[LEVELS[-1]] > _OFF else max(LEVELS, key=off.__getitem__)
        if off[told] > _OFF:
            facts.append(f"{100 * told:.0f} % intervals hold {_percent(*held[told])}")
        words = ", ".join(labels) or "off in shape, or in other ways from row to row"
        return f"{name} {words}" + (f": {', '.join(facts)}" if facts else "")

    def __repr__(self) -> str:
        low, high = (float(end) for end in self.contraction.mean(dim=0).aminmax())
        learnt = f"contraction {low + 0.0:.2f}" + (
            f" to {high + 0.0:.2f}" if len(self.names) > 1 else ""
        )
        total = f"{len(self.names)} element{'s' if len(self.names) > 1 else ''}"
        off = self.rejected()
        if not off:
            least = float(self.p_values.min())
            return f"ranks are uniform in {total} (smallest p {least:.2g}; {learnt})"
        shown = [self._misfit(name) for name in off[:4]]
        more = f"; and {len(off) - 4} more" if len(off) > 4 else ""
        return f"off in {len(off)} of {total}: {'; '.join(shown)}{more} ({learnt})"


@dataclass(frozen=True)
class Calibration:
    """How guides stand to the latents that rows were simulated from.

    Attributes:
        x: The simulated rows.
        latents: What they were simulated from, by site, ``(batch, *event)``.
        guides: What was found, by the name of the guide.
        prior_variance: Variance of each latent element under the prior, ``(elements,)``.
        local_fits: The fits behind the per-datapoint guides, by their names.
    """

    x: Tensor
    latents: Mapping[str, Tensor]
    guides: Mapping[str, GuideCalibration]
    prior_variance: Tensor
    local_fits: Mapping[str, LocalFit] = field(default_factory=dict)

    def __getitem__(self, guide: str) -> GuideCalibration:
        """What was found of one guide.

        Raises:
            ValueError: If there is none of that name.
        """
        if guide not in self.guides:
            raise ValueError(f"guide: expected one of {list(self.guides)}; got {guide!r}.")
        return self.guides[guide]

    def passes(self, level: float = 0.05) -> bool:
        """Whether the ranks of no element of any guide are rejected.

        Corrected for the number of elements and guides: if all guides are exact, this is so with
        probability ``1 - level`` or more. Of one guide alone, ask ``self[name].passes()``.

        Args:
            level: Probability of one or more wrong rejections, at most.

        Raises:
            ValueError: If the level is not between 0 and 1.
        """
        _check_level(level)
        everything = torch.cat([guide.p_values for guide in self.guides.values()])
        return bool((holm(everything.cpu().numpy()) > level).all())

    def __repr__(self) -> str:
        draws = next(iter(self.guides.values())).num_samples
        lines = [f"Calibration({len(self.x)} simulated rows, {draws} draws of each posterior"]
        for name, guide in self.guides.items():
            fit = self.local_fits.get(name)
            done = (
                ""
                if fit is None or bool(fit.converged.all())
                else f" (converged in {int(fit.converged.sum())} rows)"
            )
            lines.append(f"{name}{done}: {guide!r}")
        return "\n  ".join(lines) + ")"


def calibrate(
    model: Program,
    guides: Program | Mapping[str, Program],
    x: Tensor,
    latents: Mapping[str, Tensor] | None = None,
    *,
    per_datapoint: bool = False,
    num_samples: int = 99,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    r"""Are the guide's posteriors as wide as they should be, and in the right place?

    .. math:: z^*_n \sim p(z), \qquad x_n \sim p(x \mid z^*_n), \qquad
              r_{nj} = \#\{s : z_{snj} < z^*_{nj}\}, \quad z_{sn} \sim q(\cdot \mid x_n)

    With the exact posterior as guide every rank is uniform on 0, …, S, whatever the model: given
    x, the true value and the S draws are independent and of one law, so that each place among them
    is as probable. Simulation-based calibration (SBC) tests for that, element by element, with an
    exact p-value; `Calibration.passes` corrects for their number. A guide that is too narrow has
    too many ranks at both ends, one that is too high too many small ones. Beside the ranks there
    are the coverage of central intervals, z-scores and contraction.

    It holds on the average over the model's own data, and says nothing of other data: a guide
    trained on real ones is judged where the fitted model believes the data to be. And it is
    necessary only: the prior as guide passes, as its ranks are uniform too. Look at the contraction
    beside it, and at `ppvae.compare`.

    Costs ``num_samples`` draws of the guide a row; with ``per_datapoint`` also a fit for every
    row. Memory is bounded in the number of draws: these are worked off a few at a time.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guides: A Pyro guide with the same latent sites, called as ``guide(x)``; or several by
            name, which then share rows and random numbers. One alone is called ``"amortized"``.
        x: Rows whose shape and number the simulated ones take. With ``latents``: simulated rows.
        latents: By site, what ``x`` was simulated from, ``(batch, *event)``, for models that
            `ppvae.simulation.simulate` cannot draw from, and for guides fitted to rows that were
            simulated before. By default rows are drawn anew.
        per_datapoint: Whether to fit each guide's family to each simulated row too
            (`ppvae.fit_per_datapoint`), and to judge that guide on the same rows with the same
            random numbers: what is off there as well is the family's fault. It is called
            ``"per_datapoint"``, or ``"per_datapoint of …"`` where there are several guides.
        num_samples: Draws S per row, at least 19.
        seed: Seed of data, draws and ties; the caller's generators are left as they were.
        progress: Whether to show a progress bar of the fits, on a terminal or in a notebook.

    Returns:
        Ranks, z-scores and contraction per row and element, and what they come to.

    Raises:
        ValueError: If the model cannot be simulated (see `ppvae.simulation.simulate`), there is
            one row only, too few draws, a guide is unfit or is a table for other rows, or cannot
            be freed.

    Source: Talts et al. (2018); Säilynoja, Bürkner & Vehtari (2022) for the test; Yao et al. (2018)
    for `GuideCalibration.symmetry_p_values`; Schad, Betancourt & Vasishth (2021) for z-score and
    contraction.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from ppvae.models import FactorAnalysis
        >>> loadings = torch.tensor([[1.0], [1.0]])
        >>> model = FactorAnalysis(x_dim=2, z_dim=1, loadings=loadings)
        >>> def narrow(x):
        ...     exact = model.posterior(x)
        ...     scale = 0.5 * exact.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(exact.mean, scale).to_event(1))
        >>> found = calibrate(model, narrow, torch.zeros(1000, 2))
        >>> found.passes()
        False
        >>> found
        Calibration(1000 simulated rows, 99 draws of each posterior
          amortized: off in 1 of 1 element: z[0] too narrow: 95 % intervals hold ... %...)
    """
    # A module that happens to be a mapping is a guide.
    named = isinstance(guides, Mapping) and not callable(guides)
    given: dict[str, Program] = dict(guides) if named else {"amortized": guides}  # type: ignore[arg-type, dict-item]
    _check_guides(given, latents)
    check_rows(x, model, *given.values())
    check_count("num_samples", num_samples, _LEAST_DRAWS)
    if len(x) < 2:
        raise ValueError(
            f"x: a distribution of ranks takes at least 2 rows, and a hundred or more to say "
            f"anything; got {len(x)}. Only shape and number of the rows matter: pass "
            f"x[:1].expand(200, *x.shape[1:]), say."
        )
    with private_store():
        drawn = simulate(model, x, seed=seed) if latents is None else Simulated(x, dict(latents))
        x = drawn.x
        with forked_rng(seed, x.device), evaluation_mode(model, *given.values()), torch.no_grad():
            sites = read_model(model, x)
            _check_latents(drawn, sites)
            for name, guide in given.items():
                with _named(name):
                    # Bare parameters that nobody has made yet are made here, once.
                    check_pair(model, guide, x)
                    if latents is None and _is_table(guide, x):
                        raise ValueError(f"it {_TABLE}")
        fits = {}
        if per_datapoint:
            for name, guide in given.items():
                key = f"per_datapoint of {name}" if len(given) > 1 else "per_datapoint"
                with _named(name):
                    stream = (seed + _FIT_STREAM) % 2**32
                    fits[key] = fit_per_datapoint(
                        model, None, x, init=guide, seed=stream, progress=progress
                    )
        with judging((seed + _PRIOR_STREAM) % 2**32, x, model), torch.no_grad():
            variance = _prior_variance(model, x, sites)
        truth = _flat(drawn.latents, sites, ()).double()
        with forked_rng((seed + _TIES_STREAM) % 2**32, x.device):
            noise = torch.rand(2, *truth.shape, dtype=torch.float64, device=x.device)
        found = {}
        everything: dict[str, Program] = {**given, **{name: f.guide for name, f in fits.items()}}
        for name, guide in everything.items():
            with (
                judging((seed + _DRAWS_STREAM) % 2**32, x, model, guide),
                torch.no_grad(),
                _named(name),
            ):
                found[name] = _calibration(guide, x, sites, truth, noise, variance, num_samples)
    return Calibration(x, drawn.latents, found, variance, fits)


def _calibration(
    guide: Program,
    x: Tensor,
    sites: ModelSites,
    truth: Tensor,
    noise: Tensor,
    variance: Tensor,
    num_samples: int,
) -> GuideCalibration:
    below, ties = (torch.zeros_like(truth, dtype=torch.int64) for _ in range(2))
    total, squares = torch.zeros_like(truth), torch.zeros_like(truth)
    for size in draw_chunks(num_samples, x):
        z = _flat(guided(guide, x, size)[0], sites, (size,)).double()
        if not bool(torch.isfinite(z).all()):
            raise ValueError(
                f"it draws values that are not finite, first for row "
                f"{int((~torch.isfinite(z)).any(dim=0).any(dim=-1).nonzero()[0])}."
            )
        below += (z < truth).sum(dim=0)
        ties += (z == truth).sum(dim=0)
        # Sums of distances from the truth do not lose a small variance beside a large mean.
        total += (z - truth).sum(dim=0)
        squares += (z - truth).square().sum(dim=0)
    ranks = below + (noise[0] * (ties + 1)).floor().long()
    mean = total / num_samples
    spread = (squares - total * mean).clamp(min=0) / (num_samples - 1)
    # Without a spread the score is infinite, or 0 if the guide is right.
    scores = torch.where(mean == 0, 0.0, mean / spread.sqrt())
    return GuideCalibration(
        names=tuple(name for site in sites.latents.values() for name in element_names(site)),
        ranks=ranks,
        pit=(ranks + noise[1]) / (num_samples + 1),
        z_scores=scores,
        contraction=1 - spread / variance,
        num_samples=num_samples,
    )


def _flat(latents: Mapping[str, Tensor], sites: ModelSites, shape: tuple[int, ...]) -> Tensor:
    """All latent elements beside each other, ``(*shape, batch, elements)``."""
    columns = []
    for name, site in sites.latents.items():
        value = latents[name]
        columns.append(value.reshape(*shape, value.shape[len(shape)], site.size))
    return torch.cat(columns, dim=-1)


def _prior_variance(model: Program, x: Tensor, sites: ModelSites) -> Tensor:
    """Variance of each latent element under the prior, over draws for all rows."""
    chunks = draw_chunks(-(-_PRIOR_DRAWS // len(x)), x)
    draws = [_flat(prior_draws(model, x, size), sites, (size,)) for size in chunks]
    return torch.cat(draws).double().flatten(0, 1).var(dim=0)


def _check_guides(guides: Mapping[str, Program], latents: Mapping[str, Tensor] | None) -> None:
    if not guides:
        raise ValueError("guides: expected a guide, or at least one by name; got none.")
    for name, guide in guides.items():
        if not callable(guide):
            raise ValueError(
                f"guides: expected a Pyro guide, called as guide(x), under {name!r}; got "
                f"{type(guide).__name__}."
            )
        if str(name).startswith("per_datapoint"):
            raise ValueError(
                f"guides: the name {name!r} is kept for guides that are fitted here; choose "
                f"another."
            )
        if isinstance(guide, PerDatapoint) and latents is None:
            raise ValueError(f"guides: {name!r} {_TABLE}")


def _is_table(guide: Program, x: Tensor) -> bool:
    """Whether a guide draws for as many rows as it was made for, however many it is given."""
    try:
        drawn = poutine.trace(guide).get_trace(x[:-1])
    except Exception:  # It takes this number of rows only: nothing is known.
        return False
    return any(tuple(site["fn"].batch_shape) == (len(x),) for _, site in sample_sites(drawn))


def _check_latents(drawn: Simulated, sites: ModelSites) -> None:
    for name, site in sites.latents.items():
        value, wanted = drawn.latents.get(name), (len(drawn.x), *site.event_shape)
        if value is None or tuple(value.shape) != wanted:
            raise ValueError(
                f"latents: expected for site {name!r} a draw for each row, {wanted}; got "
                f"{None if value is None else tuple(value.shape)}."
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"latents: those of site {name!r} are not all finite.")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1; got {level}.")


def _percent(share: float, error: float) -> str:
    digits = 0 if error >= 0.005 else 1
    return f"{100 * share:.{digits}f} ± {100 * error:.{digits}f} %"


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say which guide an error is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"guide {name!r}: {error}") from error
