"""Amortized against per-datapoint inference: the decomposition of the gap, datum by datum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppvae.density import (
    ModelSites,
    Program,
    check_count,
    check_density,
    check_pair,
    draw_chunks,
    judging,
    weigh,
)
from ppvae.diagnostics import active_units, pareto_k, pareto_k_threshold
from ppvae.evidence import Estimate, elbo_of, mixture_evidence, quadrature
from ppvae.families import Family, same_family
from ppvae.guides import Amortized, PerDatapoint, per_datapoint
from ppvae.isolation import check_rows, seconds_now
from ppvae.local import LocalFit, fit_per_datapoint
from ppvae.training import Fit

if TYPE_CHECKING:
    import xarray

# Nats: smaller gaps are rounding, and no reader's business.
_NEGLIGIBLE = 1e-4
# Nats: an integral that is less sure than this gives way to importance weighting.
_LARGEST_QUADRATURE_ERROR = 0.01
_GAPS = ("approximation_gap", "amortization_gap", "inference_gap")
_UNITS_SAMPLES = 200
_WORST = 5

Guides = Program | Mapping[str, Program]
"""A guide, or several by name."""


@dataclass(frozen=True)
class Comparison:
    """The ledger: what is lost against log p(x), where, and with what error.

    Attributes:
        dataset: An `xarray.Dataset` over ``data``, all in nats: ``log_evidence``; ``elbo`` and
            ``pareto_k`` over ``guide`` too; ``approximation_gap``, ``amortization_gap`` and
            ``inference_gap``; each with a ``…_stderr``. Each gap has a ``…_bound``:
            ``"estimate"``, or the side on which the figure lies of the gap (``"lower"``,
            ``"upper"``, ``"none"`` where neither is known), as where q* has not converged. Of q*:
            ``converged``, ``steps``, ``predicted_gain``, ``grad_snr``, ``restart_gain``. Of each
            guide: ``active_units``. The settings and the seconds are in its attributes. Where
            several guides or families were given, the gaps and what is said of q* are over
            ``guide`` too, whose coordinates ``family`` and ``source`` say what each is.
        model: The model.
        guides: The guides that were given, by name.
        x: The rows.
        local_fits: The per-datapoint fits, by the name of their family.
    """

    dataset: xarray.Dataset
    model: Program
    guides: Mapping[str, Program]
    x: Tensor
    local_fits: Mapping[str, LocalFit]
    _covariance: Mapping[tuple[str, str], Tensor] = field(repr=False)

    @property
    def local(self) -> LocalFit:
        """The per-datapoint fit in the first guide's family."""
        return next(iter(self.local_fits.values()))

    @property
    def several(self) -> bool:
        """Whether the gaps are over ``guide``."""
        return "guide" in self.dataset["amortization_gap"].dims

    def mean(self, name: str, guide: str | None = None) -> tuple[float, float]:
        """Mean over the data of a variable, and its standard error.

        The error is Monte Carlo error for these data; how they scatter is the variable's own
        spread.

        Args:
            name: Such as ``"amortization_gap"`` or ``"log_evidence"``.
            guide: Which guide, for a variable that is over ``guide``.

        Raises:
            ValueError: If a guide is needed or unknown (the known ones are named).
        """
        value, stderr = self.dataset[name], self.dataset[f"{name}_stderr"]
        if "guide" in value.dims:
            self._check_names(guide)
            value, stderr = value.sel(guide=guide), stderr.sel(guide=guide)
        return float(value.mean()), float((stderr**2).sum()) ** 0.5 / value.sizes["data"]

    def difference(self, one: str, other: str) -> Estimate:
        """ELBO of one guide minus that of another, per datum, with the error of the difference.

        Both were estimated with common random numbers, so that their noise cancels in part.

        Args:
            one: Name of a guide, a value of ``dataset["guide"]``.
            other: Name of another.

        Raises:
            ValueError: If a name is unknown.
        """
        self._check_names(one, other)
        first, second = (
            torch.as_tensor(self.dataset["elbo"].sel(guide=g).values) for g in (one, other)
        )
        return Estimate(first - second, self._covariance[one, other].sqrt(), "exact", "difference")

    def _check_names(self, *names: str | None) -> None:
        known = self.dataset["guide"].values.tolist()
        for name in names:
            if name not in known:
                raise ValueError(f"guide: expected one of {known}; got {name!r}.")

    def guide_name(self, guide: str | None) -> str:
        """The name of a given guide; of the only one if left out.

        Raises:
            ValueError: If the name is unknown, or left out where there are several.
        """
        names = list(self.guides)
        if guide is None and len(names) == 1:
            return names[0]
        if guide not in names:
            raise ValueError(f"guide: expected one of {names}; got {guide!r}.")
        return guide

    def worst(self, count: int = _WORST) -> Tensor:
        """The numbers of the rows with the largest inference gap, the largest first.

        Args:
            count: How many; of several guides the first is meant.
        """
        gap = self.dataset["inference_gap"]
        values = gap.isel(guide=0).values if self.several else gap.values
        return torch.as_tensor(np.argsort(-np.nan_to_num(values, nan=np.inf))[:count].copy())

    def verdict(self) -> str:
        """What dominates and which repair it calls for, in words."""
        if not self.several:
            return _verdict(self, "amortized", repairs=True)
        return "\n".join(f"{name}: {_verdict(self, name)}" for name in self.guides)

    def __str__(self) -> str:
        ds, attrs = self.dataset, self.dataset.attrs
        kind = {
            "exact": "closed form",
            "quadrature": "numerical integral",
            "iwae": "importance-weighted: a lower bound, and so the approximation gap is one",
        }[attrs["evidence_kind"]]
        head = [
            *self._collapse(),
            f"Inference gap of {ds.sizes['data']} data, in nats a datum:",
        ]
        table = self._wide(kind) if self.several else self._tall(kind)
        return "\n".join(
            [*head, *table, "", *self._checked(), "", *self._worst_rows(), self.verdict()]
        )

    def _collapse(self) -> list[str]:
        """A latent that nobody uses is said before any gap is praised."""
        units, lines = self.dataset["active_units"], []
        total = self.dataset.attrs["latent_units"]
        free = [n for n in units["guide"].values if n not in self.guides]
        most = max(float(units.sel(guide=n)) for n in free)
        for name in self.guides:
            if float(units.sel(guide=name)) == 0 and most == 0:
                lines.append(
                    f"COLLAPSED: no latent dimension of {total} is active, for q* neither: the "
                    f"model does not use its latent, and a small gap is no merit."
                )
                break
            if float(units.sel(guide=name)) == 0:
                which = f"the guide {name!r}" if self.several else "your guide"
                lines.append(
                    f"COLLAPSED: no latent dimension of {total} is active under {which}, which "
                    f"says the same of every datum; under q* {most:.0f} are."
                )
        return [*lines, ""] if lines else []

    def _tall(self, kind: str) -> list[str]:
        ds = self.dataset
        rows = [
            "mean ± its Monte Carlo error, and the standard deviation (sd) over the data",
            "",
            f"  log p(x)                    {self._cell('log_evidence')}   {kind}",
        ]
        for guide, label in (("per_datapoint", "best per datum, q*"), ("amortized", "your guide")):
            rows.append(f"  ELBO, {label:<22}{self._cell('elbo', guide)}")
        rows.append("")
        for gap, label in zip(_GAPS, ("approximation", "amortization", "total"), strict=True):
            count = _significant(ds[gap].values, ds[f"{gap}_stderr"].values)
            side = _side(ds[f"{gap}_bound"].values)
            rows.append(f"  gap, {label:<20}{side:>3}{self._cell(gap)}   {count}")
        return rows

    def _cell(self, name: str, guide: str | None = None) -> str:
        value = self.dataset[name]
        mean, error = self.mean(name, guide)
        if guide is not None:
            value = value.sel(guide=guide)
        mean = round(mean, 4) + 0.0  # No minus before a zero.
        with np.errstate(invalid="ignore"):  # A row without a finite ELBO leaves no sd.
            return f"{mean:10.4f} ± {error:.4f} (sd {float(value.std()):.3f})"

    def _wide(self, kind: str) -> list[str]:
        ds = self.dataset
        mean, error = self.mean("log_evidence")
        lines = [
            "mean ± its Monte Carlo error",
            "",
            f"  log p(x)  {mean:.4f} ± {error:.4f}   {kind}",
            "",
        ]
        header = ("guide", "family", "ELBO", "approximation", "amortization", "total", "active")
        rows = [header]
        for name in ds["guide"].values.tolist():
            cells = [name, str(ds["family"].sel(guide=name).item())]
            for column in ("elbo", *_GAPS):
                mean, error = self.mean(column, name)
                side = (
                    "" if column == "elbo" else _side(ds[f"{column}_bound"].sel(guide=name).values)
                )
                cells.append(f"{side}{round(mean, 4) + 0.0:.4f} ± {error:.4f}")
            cells[4] = cells[4] if name in self.guides else "–"
            units = float(ds["active_units"].sel(guide=name))
            cells.append(f"{units:.0f} of {ds.attrs['latent_units']}")
            rows.append(tuple(cells))
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines += [
            "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return lines

    def _number(self, row: int) -> int:
        """The number of a row, as its coordinate ``row`` has it where there is one."""
        return int(self.dataset["row"][row]) if "row" in self.dataset.coords else row

    def _worst_rows(self) -> list[str]:
        ds = self.dataset.isel(guide=0) if self.several else self.dataset
        rows = [
            f"{self._number(row)} ({float(ds['inference_gap'][row]):.2f} ± "
            f"{float(ds['inference_gap_stderr'][row]):.2f})"
            for row in self.worst().tolist()
        ]
        of = f" under {next(iter(self.guides))!r}" if self.several else ""
        return [f"Worst rows{of}, by total gap: {', '.join(rows)}."]

    def _checked(self) -> list[str]:
        attrs = self.dataset.attrs
        lines = [self._fairness()]
        for name, fit in self.local_fits.items():
            done, count = int(fit.converged.sum()), len(fit.converged)
            of = f" ({name})" if len(self.local_fits) > 1 else ""
            text = f"q*{of} converged in {done} of {count} rows"
            restarted = int((fit.restart_gain > _NEGLIGIBLE).sum())
            lines.append(f"{text}; another start was better than the first in {restarted}.")
            if done < count:
                lines.append(
                    "  In the others the amortization gap is at least what is shown, and the "
                    "approximation gap is not known so well: raise max_steps."
                )
        return [*lines, *self._warnings(), *self._costs(attrs)]

    def _fairness(self) -> str:
        attrs = self.dataset.attrs
        same = attrs["family"] == attrs["guide_family"]
        if self.several:
            which = "each guide and its q* of one family"
        else:
            which = f"both guides {attrs['family']}" if same else "two families"
        text = (
            f"Checked: {which}, one estimator, {attrs['num_samples']} common draws, the same rows, "
            f"model frozen in eval mode, its density not random and row by row."
        )
        if not same and not self.several:
            text += (
                f"\nThe guide is {attrs['guide_family']}, q* the best {attrs['family']}: the "
                f"amortization gap holds the difference between the families too."
            )
        return text

    def _warnings(self) -> list[str]:
        ds, attrs, lines = self.dataset, self.dataset.attrs, []
        for name in self.guides:
            empty = int((~np.isfinite(ds["elbo"].sel(guide=name))).sum())
            if empty:
                which = f"the guide {name!r}" if self.several else "the guide"
                lines.append(
                    f"In {empty} row{'s' * (empty > 1)} {which} draws outside of the prior's "
                    f"support or overflows: no finite ELBO, and no finite mean."
                )
        threshold = attrs["pareto_k_threshold"]
        free = [n for n in ds["guide"].values if n not in self.guides]
        heavy = np.flatnonzero(ds["pareto_k"].sel(guide=free).min("guide").values > threshold)
        if attrs["evidence_kind"] == "iwae" and len(heavy):
            which = ", ".join(str(self._number(row)) for row in heavy[:5]) + (
                ", …" if len(heavy) > 5 else ""
            )
            lines.append(
                f"Weights with heavy tails (Pareto k-hat above {threshold:.2f}) in {len(heavy)} of "
                f"{ds.sizes['data']} data ({which}): log p(x) may be short there by more than its "
                f"error. Compare with a run with more evidence_samples."
            )
        if attrs["ignored_scales"]:
            lines.append(
                f"The model scales the log density of {attrs['ignored_scales']}; the gaps are "
                f"those of the model without the scale."
            )
        return lines

    def _costs(self, attrs: Mapping[str, Any]) -> list[str]:
        seconds = {k: v for k, v in attrs.items() if k.startswith("seconds_")}
        spent = ", ".join(
            f"{k.removeprefix('seconds_').replace('_', ' ')} {v:.1f}" for k, v in seconds.items()
        )
        lines = [f"Seconds: {spent}."]
        if math.isfinite(attrs["break_even"]):
            count = self.dataset.sizes["data"]
            per_row = attrs["seconds_local_fit"] / count
            lines.append(
                f"Fitting q* took {1000 * per_row:.3g} ms a datum, {count} at a time; training the "
                f"model and the guide took as long as {attrs['break_even']:,.0f} such fits."
            )
        return lines

    __repr__ = __str__


def _significant(gap: Any, stderr: Any) -> str:
    """How many rows have a gap that is not noise."""
    beyond = np.maximum(2 * stderr, _NEGLIGIBLE)
    with np.errstate(invalid="ignore"):
        above, below = int((gap > beyond).sum()), int((gap < -beyond).sum())
    text = f"clearly above 0 in {above} of {len(gap)}"
    return text + (f", below in {below}" if below else "")


def _side(bounds: Any) -> str:
    """The sign before a mean of which some rows are bounds."""
    kinds = set(np.unique(bounds)) - {"estimate"}
    if kinds <= {"lower"}:
        return "≥ " if kinds else ""
    return "≤ " if kinds == {"upper"} else "~ "


def _verdict(comparison: Comparison, guide: str, *, repairs: bool = False) -> str:
    ds, attrs = comparison.dataset, comparison.dataset.attrs
    (approximation, its_error), (amortization, error), (total, total_error) = (
        comparison.mean(gap, guide) for gap in _GAPS
    )
    if not all(map(math.isfinite, (approximation, amortization, total))):
        return "Some rows have no finite ELBO: mend the guide's support there before all else."
    if amortization <= max(2 * error, _NEGLIGIBLE) and approximation <= max(
        2 * its_error, _NEGLIGIBLE
    ):
        return (
            f"No gap beyond its error: the guide is within {max(total, 0) + 2 * total_error:.2g} "
            f"nats a datum of log p(x)."
        )
    if total_error > 0.5 * abs(total):
        return (
            f"The gap of {total:.3g} nats is hardly told from its error of {total_error:.2g}: "
            f"raise num_samples. If that does not help the ELBO is infinite, as under a guide with tails "
            f"that the model cannot bear."
        )
    if amortization >= approximation:
        share = min(amortization / total, 1.0) if total > 0 else 1.0
        text = f"Amortization dominates, {share:.0%} of the gap"
        per_row = 1000 * attrs["seconds_local_fit"] / ds.sizes["data"]
        if repairs:
            text += (
                f": fitting q* brings back {amortization:.3g} nats a datum at {per_row:.3g} ms "
                f"each, or ppvae.refine mends the worst rows first; ppvae.explain tells whether "
                f"training, width or inputs are missing"
            )
        return f"{text}."
    text = f"The family dominates, {min(approximation / total, 1.0):.0%} of the gap"
    if repairs:
        text += (
            f": no encoder brings back these {approximation:.3g} nats a datum, a richer family "
            f"may; families=[...] measures it"
        )
    return f"{text}."


def compare(
    model: Program,
    guide: Guides,
    x: Tensor,
    *,
    family: Family | Mapping[str, Family] | None = None,
    families: Sequence[Family | Mapping[str, Family]] = (),
    fit: Fit | None = None,
    num_samples: int = 1000,
    evidence_samples: int = 5000,
    max_steps: int | None = None,
    seed: int = 0,
) -> Comparison:
    r"""Decompose the inference gap of a guide, or of several, datum by datum.

    .. math::
        \underbrace{\log p(x_n) - L_n[q]}_{\text{inference gap}} =
        \underbrace{\log p(x_n) - L_n[q^*_n]}_{\text{approximation gap}} +
        \underbrace{L_n[q^*_n] - L_n[q]}_{\text{amortization gap}}

    with :math:`q^*_n` the best member of the guide's own family for that datum (Cremer, Li &
    Duvenaud 2018, eq. 5). Both guides share family, site distribution, estimator and draws; the
    model is held fixed, in eval mode. The evidence is exact where the model has
    ``log_evidence(x)``, by quadrature where the latent has at most two dimensions, and otherwise
    importance weighted, with the mixture of all guides as proposal.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guide: A Pyro guide, called as ``guide(x)``; or several by name, which then share rows,
            draws and evidence in one ledger.
        x: Rows, ``(batch, *event)``.
        family: A family to measure against, for guides that cannot be freed; the guide's own if
            left out. With another family the amortization gap also holds the difference between
            the families.
        families: Further families whose q* is fitted and shown beside the guides; of several
            latent sites a mapping by site for each.
        fit: The record of a single guide's training: its seconds give the break-even, the number
            of data from which on training and encoding cost less than fitting q* for each, at the
            speed per row of this call's batch.
        num_samples: Draws per row and guide for the ELBOs.
        evidence_samples: Draws per row and guide for an importance-weighted evidence.
        max_steps: As in `fit_per_datapoint`.
        seed: Seed of all draws; the caller's generators are left as they were.

    Returns:
        The comparison; print it for the table.

    Raises:
        ValueError: If the rows, the model or a guide are unfit; a guide cannot be freed (the site
            is named); or the model's density of a row is random or hangs on the other rows, so
            that no two guides could be compared fairly.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> model, guide = pairs.exponential_gaussian()
        >>> comparison = compare(model, guide, torch.tensor([0.0, 1.5, 3.0]))
        >>> gap = comparison.dataset["inference_gap"]
        >>> parts = comparison.dataset["approximation_gap"] + comparison.dataset["amortization_gap"]
        >>> bool((abs(gap - parts) < 1e-4).all())
        True
    """
    several = isinstance(guide, Mapping) or bool(families)
    guides = dict(guide) if isinstance(guide, Mapping) else {"amortized": guide}
    _check_arguments(guides, several, fit)
    check_rows(x, model, *guides.values())
    for name, value in (("num_samples", num_samples), ("evidence_samples", evidence_samples)):
        check_count(name, value, least=2)
    for each in guides.values():
        with judging(seed, x, model, each):
            sites = check_pair(model, each, x)
    with judging(seed, x, model), torch.no_grad():
        check_density(model, x, sites)
    plan = _plan(model, guides, x, sites, family, families)
    fits = {
        name: fit_per_datapoint(
            model, wanted, x, init=starts or None, max_steps=max_steps, seed=seed + 1
        )
        for name, (wanted, starts) in plan.fits.items()
    }
    columns: dict[str, Program] = dict(guides)
    of = {g: plan.family_of[g] for g in guides}
    for name, local in fits.items():
        label = "per_datapoint" if len(fits) == 1 else f"per_datapoint {name}"
        columns[label], of[label] = local.guide, name
    began = seconds_now(x.device)
    weights = _paired_weights(model, columns, x, num_samples, seed + 2)
    seconds_elbo = seconds_now(x.device) - began
    began = seconds_now(x.device)
    proposals = [*plan.freed.values(), *(local.guide for local in fits.values())]
    evidence = _evidence(model, sites, proposals, x, evidence_samples, seed + 3)
    seconds_evidence = seconds_now(x.device) - began
    dataset = _ledger(weights, evidence, fits, of, list(guides))
    units = {name: _active(model, each, x, seed + 4) for name, each in columns.items()}
    dataset["active_units"] = ("guide", [count for count, _ in units.values()])
    own = [_family_name(plan.freed.get(name)) for name in guides]
    if not several:
        dataset = _for_one_guide(dataset)
    dataset.attrs = {
        "evidence_kind": evidence.method,
        "family": next(iter(fits)),
        "guide_family": own[0],
        "latent_units": next(iter(units.values()))[1],
        "ignored_scales": ", ".join(sites.scaled),
        "num_samples": num_samples,
        "evidence_samples": evidence_samples if evidence.method == "iwae" else 0,
        "pareto_k_threshold": pareto_k_threshold(num_samples),
        "seed": seed,
        "status": "; ".join(local.status for local in fits.values()),
        "seconds_local_fit": sum(local.seconds for local in fits.values()),
        "seconds_elbo": seconds_elbo,
        "seconds_evidence": seconds_evidence,
        "break_even": math.nan,
    }
    if fit is not None:
        per_row = dataset.attrs["seconds_local_fit"] / len(x)
        encode = seconds_to_encode(next(iter(guides.values())), x) / len(x)
        dataset.attrs["seconds_training"] = fit.seconds
        dataset.attrs["break_even"] = (
            fit.seconds / (per_row - encode) if per_row > encode else math.inf
        )
    pairs = _difference_variances(weights)
    return Comparison(dataset, model, guides, x, fits, pairs)


def _check_arguments(guides: Mapping[str, Program], several: bool, fit: Fit | None) -> None:
    if not guides:
        raise ValueError("guide: expected a guide, or at least one by name; got an empty mapping.")
    for name, guide in guides.items():
        if not callable(guide):
            raise ValueError(
                f"guide: expected a Pyro guide, called as guide(x), under {name!r}; got "
                f"{type(guide).__name__}."
            )
    reserved = [name for name in guides if str(name).startswith("per_datapoint")]
    if reserved:
        raise ValueError(
            f"guide: the name {reserved[0]!r} is kept for the per-datapoint optimum; choose "
            f"another."
        )
    if several and fit is not None:
        raise ValueError(
            "fit: the break-even is that of one guide in its own family; compare that guide alone, "
            "or see ppvae.repair_costs."
        )


@dataclass
class _Plan:
    """Which families are fitted, from which guides' outputs."""

    freed: dict[str, PerDatapoint]
    family_of: dict[str, str]
    fits: dict[str, tuple[dict[str, Family], list[Program]]]


def _plan(
    model: Program,
    guides: Mapping[str, Program],
    x: Tensor,
    sites: ModelSites,
    family: Family | Mapping[str, Family] | None,
    families: Sequence[Family | Mapping[str, Family]],
) -> _Plan:
    """The distinct families to fit: those of the guides, or ``family``, and the further ones."""
    plan = _Plan({}, {}, {})
    for name, guide in guides.items():
        try:
            plan.freed[name] = per_datapoint(guide, x, model=model)
        except ValueError:
            if family is None:
                raise
        wanted = plan.freed[name].families if family is None else _by_site(family, sites)
        key = _enter(plan, dict(wanted), name)
        plan.family_of[name] = key
        own = plan.freed.get(name)
        if own is not None and _same(own.families, wanted):
            plan.fits[key][1].append(own)
    for further in families:
        _enter(plan, _by_site(further, sites), "families")
    return plan


def _by_site(family: Family | Mapping[str, Family], sites: ModelSites) -> dict[str, Family]:
    if isinstance(family, Family):
        if len(sites.latents) > 1:
            raise ValueError(
                f"The model has latent sites {list(sites.latents)}: give a family for each, as a "
                f"dict by site name."
            )
        return dict.fromkeys(sites.latents, family)
    return dict(family)


def _same(one: Mapping[str, Family], other: Mapping[str, Family]) -> bool:
    return set(one) == set(other) and all(same_family(one[site], other[site]) for site in one)


def _enter(plan: _Plan, wanted: dict[str, Family], of: str) -> str:
    """The name under which a family is fitted, a new one if it is not yet planned."""
    name = _family_names(wanted)
    for known, (families, _) in plan.fits.items():
        if _same(families, wanted):
            return known
    if name in plan.fits:  # Two flows of one kind are two families.
        name = f"{name} of {of}"
    plan.fits[name] = (wanted, [])
    return name


def _family_name(guide: PerDatapoint | None) -> str:
    return "unknown" if guide is None else _family_names(guide.families)


def _family_names(families: Mapping[str, Family]) -> str:
    if len(families) == 1:
        return repr(next(iter(families.values())))
    return ", ".join(f"{name}: {family!r}" for name, family in families.items())


def _active(model: Program, guide: Program, x: Tensor, seed: int) -> tuple[float, int]:
    """Number of active units under a guide, NaN for a single row, and of all units."""
    if len(x) < 2:
        with judging(seed, x, model, guide), torch.no_grad():
            _, latents = weigh(model, guide, x, 1)
        return math.nan, sum(v[0, 0].numel() for v in latents.values())
    units = active_units(model, guide, x, num_samples=_UNITS_SAMPLES, seed=seed)
    return float(units.count), units.total


def _paired_weights(
    model: Program, guides: Mapping[str, Program], x: Tensor, num_samples: int, seed: int
) -> dict[str, Tensor]:
    """Log weights of several guides, ``(num_samples, batch)`` each, on common random numbers."""
    parts: dict[str, list[Tensor]] = {name: [] for name in guides}
    for chunk, size in enumerate(draw_chunks(num_samples, x)):
        for name, guide in guides.items():
            with judging(seed + 7919 * chunk, x, model, guide), torch.no_grad():
                parts[name].append(weigh(model, guide, x, size)[0])
    return {name: torch.cat(part) for name, part in parts.items()}


def _evidence(
    model: Program,
    sites: ModelSites,
    proposals: Sequence[PerDatapoint],
    x: Tensor,
    samples: int,
    seed: int,
) -> Estimate:
    exact = getattr(model, "log_evidence", None)
    if callable(exact):
        with judging(seed, x, model), torch.no_grad():
            value = exact(x)
        return Estimate(value, torch.zeros_like(value), "exact", "exact")
    continuous = not any(
        getattr(site.support, "is_discrete", False) for site in sites.latents.values()
    )
    if sites.size <= 2 and continuous:
        integral = quadrature(model, x)
        if bool((integral.stderr < _LARGEST_QUADRATURE_ERROR).all()):
            return integral
    return mixture_evidence(model, proposals, x, samples, seed=seed)


def _difference_variances(weights: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """Squared standard error of each difference between two guides' ELBOs, per datum."""
    return {
        (one, other): elbo_of(weights[one] - weights[other]).stderr.double().cpu() ** 2
        for one in weights
        for other in weights
    }


def _ledger(
    weights: Mapping[str, Tensor],
    evidence: Estimate,
    fits: Mapping[str, LocalFit],
    family_of: Mapping[str, str],
    given: Sequence[str],
) -> xarray.Dataset:
    """The ledger over all guides; each has the q* of its family beside it."""
    import xarray

    names = list(weights)
    best_of = {family_of[name]: name for name in names if name not in given}
    elbos = {name: elbo_of(weights[name]) for name in names}
    columns: dict[str, list[Any]] = {}

    def put(name: str, value: Any) -> None:
        columns.setdefault(name, []).append(_array(value))

    for name in names:
        best, local = best_of[family_of[name]], fits[family_of[name]]
        difference = elbo_of(weights[best] - weights[name])
        gaps = {
            "approximation_gap": _minus(evidence, elbos[best]),
            "amortization_gap": (difference.value, difference.stderr),
            "inference_gap": _minus(evidence, elbos[name]),
        }
        for gap, (value, stderr) in gaps.items():
            put(gap, value)
            put(f"{gap}_stderr", stderr)
            put(f"{gap}_bound", _bound(gap, evidence, local.converged, name in given))
        put("elbo", elbos[name].value)
        put("elbo_stderr", elbos[name].stderr)
        put("pareto_k", pareto_k(weights[name]))
        for figure in ("converged", "steps", "predicted_gain", "grad_snr", "restart_gain"):
            put(figure, getattr(local, figure))
    variables: dict[str, Any] = {
        name: (("guide", "data"), np.stack(values)) for name, values in columns.items()
    }
    variables["log_evidence"] = ("data", _array(evidence.value))
    variables["log_evidence_stderr"] = ("data", _array(evidence.stderr))
    coords = {
        "guide": names,
        "family": ("guide", [family_of[name] for name in names]),
        "source": ("guide", ["amortized" if n in given else "per_datapoint" for n in names]),
    }
    out = xarray.Dataset(variables, coords=coords)
    without = ("converged", "steps", "pareto_k", "grad_snr")
    for key, variable in out.data_vars.items():
        if key not in without and not str(key).endswith("_bound"):
            variable.attrs["units"] = "nats"
    return out


def _minus(evidence: Estimate, elbo: Estimate) -> tuple[Tensor, Tensor]:
    """Their draws are independent."""
    return evidence.value - elbo.value, torch.hypot(evidence.stderr, elbo.stderr)


def _bound(gap: str, evidence: Estimate, converged: Tensor, guide: bool) -> Any:
    """On which side of the gap each row's figure lies."""
    below = evidence.bound == "lower"
    if gap == "inference_gap":
        kinds = ("lower", "lower") if below else ("estimate", "estimate")
    elif gap == "approximation_gap":
        # An ELBO that can still rise makes the gap too large, an evidence from below too small.
        kinds = ("lower", "none") if below else ("estimate", "upper")
    else:
        kinds = ("estimate", "lower") if guide else ("estimate", "estimate")
    return np.where(converged.cpu().numpy(), *kinds)


_OF_ONE = (
    *_GAPS,
    *(f"{gap}_stderr" for gap in _GAPS),
    *(f"{gap}_bound" for gap in _GAPS),
    *("converged", "steps", "predicted_gain", "grad_snr", "restart_gain"),
)


def _for_one_guide(dataset: xarray.Dataset) -> xarray.Dataset:
    """Gaps over ``data`` alone: there is one guide whose they are."""
    one = (
        dataset[list(_OF_ONE)]
        .sel(guide="amortized", drop=True)
        .drop_vars(["family", "source"], errors="ignore")
    )
    return dataset.drop_vars(list(_OF_ONE)).assign(one.data_vars)


def _array(value: Tensor | Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def seconds_to_encode(guide: Program, x: Tensor) -> float:
    """Seconds for the guide to describe all rows: what amortization costs after training."""
    began = seconds_now(x.device)
    with judging(0, x, guide), torch.no_grad():
        guide.params(x) if isinstance(guide, Amortized) else guide(x)
    return seconds_now(x.device) - began
