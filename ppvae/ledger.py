"""The ledger of a comparison: its figures, and what they say in words."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppvae.density import Program
from ppvae.evidence import Estimate
from ppvae.local import LocalFit
from ppvae.markup import Cell, TextTable, card

if TYPE_CHECKING:
    import xarray

    from ppvae.pages import Result

GAPS = ("approximation_gap", "amortization_gap", "inference_gap")
# Nats: smaller gaps are rounding, and no reader's business.
_NEGLIGIBLE = 1e-4
_WORST = 5
# Sentences are broken after so many characters: the documentation's columns hold no more.
_COLUMNS = 84
_WIDE = ("guide", "family", "ELBO", "approximation", "amortization", "total", "active")


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
        if f"{name}_stderr" not in self.dataset:
            known = [v for v in self.dataset.data_vars if f"{v}_stderr" in self.dataset]
            raise ValueError(f"name: expected a variable with an error, {known}; got {name!r}.")
        value, stderr = self.dataset[name], self.dataset[f"{name}_stderr"]
        if "guide" in value.dims:
            self._check_names(guide)
            value, stderr = value.sel(guide=guide), stderr.sel(guide=guide)
        total = (stderr**2).sum(skipna=False)
        return float(value.mean(skipna=False)), float(total) ** 0.5 / value.sizes["data"]

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

    def worst(self, count: int = _WORST, guide: str | None = None) -> Tensor:
        """The numbers of the rows with the largest inference gap, the largest first.

        Args:
            count: How many.
            guide: Under which guide, a value of ``dataset["guide"]`` where the gaps are over it;
                the first if left out.

        Raises:
            ValueError: If the name is unknown.
        """
        gap = self.dataset["inference_gap"]
        if guide is not None:
            self._check_names(guide)
        if self.several:
            gap = gap.isel(guide=0) if guide is None else gap.sel(guide=guide)
        values = gap.values
        return torch.as_tensor(np.argsort(-np.nan_to_num(values, nan=np.inf))[:count].copy())

    def verdict(self) -> str:
        """What dominates and which repair it calls for, in words."""
        if not self.several:
            return _verdict(self, "amortized", repairs=True)
        return "\n".join(f"{name}: {_verdict(self, name)}" for name in self.guides)

    def to_html(
        self,
        path: str | Path,
        *,
        image_shape: Sequence[int] | None = None,
        results: Sequence[Result] = (),
        settings: Mapping[str, Any] | None = None,
        origin: str = "",
    ) -> Path:
        """Write a report: one page, with its figures in it, that asks nothing of the network.

        It has the verdict, the table, figures of the gaps, the worst rows of each guide with their
        own figures, what was checked, the settings and the seconds.

        Args:
            path: Where to write the page; a file that is there is replaced.
            image_shape: Height and width, where each row is an image: the worst rows are then
                shown, beside what a `VAE` makes of them where the guide is `Amortized`. Left out,
                rows of shape ``(height, width)`` or ``(1, height, width)`` are images.
            results: What was found of the causes and the prices: what `ppvae.explain` and
                `ppvae.repair_costs` returned.
            settings: Further settings that the page shall name.
            origin: Where the rows come from, in words; it stands under the title, with the model
                and the guide.

        Returns:
            The path.

        Raises:
            ValueError: If the rows do not have as many elements as ``image_shape`` says.

        Example:
            >>> import tempfile, torch, ppvae
            >>> comparison = ppvae.compare(*ppvae.pairs.exponential_gaussian(), torch.ones(3))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     comparison.to_html(f"{folder}/report.html").name
            'report.html'
        """
        from ppvae.pages import write_page

        return write_page(
            path,
            self,
            image_shape=image_shape,
            results=results,
            settings=settings,
            origin=origin,
        )

    def _repr_html_(self) -> str:
        return card(
            self.heading(), [*self.alarms(), self.verdict(), *self.warnings()], self.table()
        )

    def heading(self) -> str:
        """What the table is of, and in which unit."""
        return f"Inference gap of {self.dataset.sizes['data']} data, in nats a datum"

    def table(self) -> TextTable:
        """The printed table, in cells: means ± Monte Carlo errors, and what is said of them."""
        if self.several:
            name, figures = self._evidence_cells()
            first = [Cell(name.text, self.kind()), Cell(""), figures, *[Cell("")] * 4]
            return TextTable(_WIDE, [first, *self._wide_rows()])
        rows = [
            (label, Cell(f"{side}{mean} ± {error}", note), sd)
            for label, side, mean, error, sd, note in self._tall_rows()
        ]
        return TextTable(("", "mean ± error", "sd"), rows)

    def __str__(self) -> str:
        table = self._wide() if self.several else self._tall()
        alarms = _broken(self.alarms())
        return "\n".join(
            [
                *alarms,
                *([""] if alarms else []),
                f"{self.heading()}:",
                *table,
                "",
                *_broken(self._checked()),
                "",
                *_broken([*self._worst_rows(), self.verdict()]),
            ]
        )

    def kind(self) -> str:
        """How log p(x) was found, and what follows from that for the gaps."""
        return {
            "exact": "closed form",
            "quadrature": "numerical integral",
            "enumeration": "sum over all values of the latent variables",
            "iwae": "importance-weighted: a lower bound, and so the approximation gap is one",
            "ais": "annealed: a lower bound, and so the approximation gap is one",
            "pooled": "each row as it takes: a lower bound, and so the approximation gap is one",
        }[self.dataset.attrs["evidence_kind"]]

    def alarms(self) -> list[str]:
        """What makes a small gap no merit: a latent that nobody uses."""
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
        return lines

    def _tall(self) -> list[str]:
        lines = [
            "mean ± its Monte Carlo error, and the standard deviation (sd) over the data",
            "",
        ]
        for label, side, mean, error, sd, note in self._tall_rows():
            line = f"  {label:<25}{side:>3}{mean:>10} ± {error} (sd {sd})"
            lines.append(f"{line}   {note}" if note else line)
        return [*lines[:5], "", *lines[5:]]

    def _tall_rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """Label, sign of a bound, mean, error, sd and note of each line."""
        ds = self.dataset
        rows = [("log p(x)", "", *self._figures("log_evidence"), self.kind())]
        for guide, label in (("per_datapoint", "best per datum, q*"), ("amortized", "your guide")):
            rows.append((f"ELBO, {label}", "", *self._figures("elbo", guide), ""))
        for gap, label in zip(GAPS, ("approximation", "amortization", "total"), strict=True):
            count = _significant(ds[gap].values, ds[f"{gap}_stderr"].values)
            side = bound_sign(ds[f"{gap}_bound"].values)
            rows.append((f"gap, {label}", side, *self._figures(gap), count))
        return rows

    def _figures(self, name: str, guide: str | None = None) -> tuple[str, str, str]:
        """Mean, its error, and the standard deviation over the data."""
        value = self.dataset[name]
        mean, error = self.mean(name, guide)
        if "guide" in value.dims:
            value = value.sel(guide=guide)
        mean = round(mean, 4) + 0.0  # No minus before a zero.
        with np.errstate(invalid="ignore"):  # A row without a finite ELBO leaves no sd.
            return f"{mean:.4f}", f"{error:.4f}", f"{float(value.std(skipna=False)):.3f}"

    def _wide(self) -> list[str]:
        evidence = self._evidence_cells()
        rows = [_WIDE, *([cell.text for cell in row] for row in self._wide_rows())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_WIDE))]
        return [
            "mean ± its Monte Carlo error",
            "",
            f"  {evidence[0].text}  {evidence[1].text}   {self.kind()}",
            "",
            *(
                "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
                for row in rows
            ),
        ]

    def _wide_rows(self) -> list[list[Cell]]:
        """The line of each guide, with the spread over the data in the notes of its cells."""
        ds, rows = self.dataset, []
        for name in ds["guide"].values.tolist():
            one = ds.sel(guide=name)
            cells = [Cell(name), Cell(str(one["family"].item()))]
            for column in ("elbo", *GAPS):
                mean, error, sd = self._figures(column, name)
                if column == "elbo":
                    cells.append(Cell(f"{mean} ± {error}", f"sd {sd}"))
                elif column == "amortization_gap" and name not in self.guides:
                    cells.append(Cell("–"))
                else:
                    side = bound_sign(one[f"{column}_bound"].values)
                    count = _significant(one[column].values, one[f"{column}_stderr"].values)
                    cells.append(Cell(f"{side}{mean} ± {error}", f"sd {sd}; {count}"))
            units = float(one["active_units"])
            cells.append(Cell(f"{units:.0f} of {ds.attrs['latent_units']}"))
            rows.append(cells)
        return rows

    def _evidence_cells(self) -> tuple[Cell, Cell]:
        mean, error, sd = self._figures("log_evidence")
        return Cell("log p(x)"), Cell(f"{mean} ± {error}", f"sd {sd}")

    def number(self, row: int) -> int:
        """The number of a row, as the data set's coordinate ``row`` has it where there is one."""
        return int(self.dataset["row"][row]) if "row" in self.dataset.coords else row

    def _worst_rows(self) -> list[str]:
        ds = self.dataset.isel(guide=0) if self.several else self.dataset
        rows = [
            f"{self.number(row)} ({float(ds['inference_gap'][row]):.2f} ± "
            f"{float(ds['inference_gap_stderr'][row]):.2f})"
            for row in self.worst().tolist()
        ]
        of = f" under {next(iter(self.guides))!r}" if self.several else ""
        return [f"Worst rows{of}, by total gap: {', '.join(rows)}."]

    def _checked(self) -> list[str]:
        return [*self.checks(), *self.warnings(), *self.costs()]

    def checks(self) -> list[str]:
        """What makes the guides comparable, and whether q* was found."""
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
        return lines

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

    def warnings(self) -> list[str]:
        """Where the figures are not what they seem."""
        ds, attrs, lines = self.dataset, self.dataset.attrs, []
        if not attrs.get("training_completed", True):
            lines.append(
                f"Training not completed ({attrs['training_status']}): the figures are those of "
                f"the pair as it was then."
            )
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
            which = ", ".join(str(self.number(row)) for row in heavy[:5]) + (
                ", …" if len(heavy) > 5 else ""
            )
            lines.append(
                f"Weights with heavy tails (Pareto k-hat above {threshold:.2f}) in {len(heavy)} of "
                f"{ds.sizes['data']} data ({which}): log p(x) may be short there by more than its "
                f"error. Pass evidence=ppvae.log_evidence(model, guide, x): it anneals such rows."
            )
        if attrs["ignored_scales"]:
            lines.append(
                f"The model scales the log density of {attrs['ignored_scales']}; the gaps are "
                f"those of the model without the scale."
            )
        return lines

    def costs(self) -> list[str]:
        """The seconds that were spent, and what q* costs beside the training."""
        attrs = self.dataset.attrs
        seconds = {k: v for k, v in attrs.items() if k.startswith("seconds_")}
        spent = ", ".join(
            f"{k.removeprefix('seconds_').replace('_', ' ')} {v:.1f}" for k, v in seconds.items()
        )
        lines = [f"Seconds: {spent}."]
        if math.isfinite(attrs["break_even"]):
            count = self.dataset.sizes["data"]
            per_row = attrs["seconds_local_fit"] / count
            lines.append(
                f"Fitting q* took {1000 * per_row:.3g} ms a datum, {count} at a time.\n"
                f"{self.break_even()}"
            )
        return lines

    def break_even(self) -> str:
        """From how many data on amortization has paid for its training; empty if never or unknown.

        It takes fewer such fits to last as long as the training: encoding takes time too.
        """
        even = self.dataset.attrs["break_even"]
        if not math.isfinite(even):
            return ""
        return (
            f"Training the model and the guide, and encoding each datum, takes less time than such "
            f"fits from {even:,.0f} data on."
        )

    __repr__ = __str__


def _broken(sentences: Sequence[str]) -> list[str]:
    """Lines of at most `_COLUMNS` characters, where words allow it; an indent is kept."""
    lines = []
    for line in "\n".join(sentences).splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        lines += textwrap.wrap(
            line,
            _COLUMNS,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _significant(gap: Any, stderr: Any) -> str:
    """How many rows have a gap that is not noise."""
    # A gap without end has no error.
    beyond = np.maximum(2 * np.where(np.isinf(gap), 0.0, stderr), _NEGLIGIBLE)
    with np.errstate(invalid="ignore"):
        above, below = int((gap > beyond).sum()), int((gap < -beyond).sum())
    text = f"clearly above 0 in {above} of {len(gap)}"
    return text + (f", below in {below}" if below else "")


def bound_of_mean(bounds: Any) -> str:
    """On which side of the truth the mean over rows lies whose own sides are these."""
    kinds = set(np.unique(bounds)) - {"estimate"}
    if not kinds:
        return "estimate"
    return kinds.pop() if len(kinds) == 1 else "none"


def bound_sign(bounds: Any) -> str:
    """The sign before a figure of which some rows are bounds, by their values of ``…_bound``."""
    return {"estimate": "", "lower": "≥ ", "upper": "≤ ", "none": "~ "}[bound_of_mean(bounds)]


def _verdict(comparison: Comparison, guide: str, *, repairs: bool = False) -> str:
    ds, attrs = comparison.dataset, comparison.dataset.attrs
    (approximation, its_error), (amortization, error), (total, total_error) = (
        comparison.mean(gap, guide) for gap in GAPS
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
            f"raise num_samples. If that does not help the ELBO is infinite, as under a guide with "
            f"tails that the model cannot bear."
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
