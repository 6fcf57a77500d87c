r"""What it costs to mend a gap: nats recovered a datum against seconds, for each kind of repair."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppvae.comparison import check_current, paired_weights, seconds_to_encode
from ppvae.density import Program, check_count, draw_chunks, judging, weigh
from ppvae.explanation import EncoderTraining, TrainingRows, check_same_kind
from ppvae.families import DiagonalNormal, Family, FullRankNormal
from ppvae.guides import PerDatapoint, per_datapoint
from ppvae.isolation import seconds_now
from ppvae.ledger import Comparison
from ppvae.local import LocalFit, fit_per_datapoint
from ppvae.markup import TextTable
from ppvae.progress import progress_bar
from ppvae.refinement import Refinement, refine
from ppvae.training import Fit

if TYPE_CHECKING:
    import xarray

_STEPS = (1, 2, 4, 8, 16)
_RESAMPLED = (10, 100, 1000)
# A full covariance beyond this many dimensions is no cheap repair.
_LARGEST_FULL_RANK = 64
_REFINE_TOLERANCE = 1e-3
_REPEATS = 3
_ALIKE = 1.25
_DRAWS = 1000
_HEADER = ("repair", "nats a datum", "of the gap", "s once", "ms a datum")


@dataclass(frozen=True)
class RepairCosts:
    """The price list of repairs.

    Attributes:
        dataset: An `xarray.Dataset` over ``repair``: ``gain`` and ``gain_stderr``, nats a datum
            by which the ELBO rises (for importance resampling a lower bound of that), with Monte
            Carlo errors for these data; ``seconds_fixed``, once, whatever the number of data, and
            ``seconds_per_row``; ``kind``. Its attributes have the comparison's gaps, the seconds
            of training and encoding and the ``break_even``: the number of data from which on
            amortization, training included, is cheaper than a cold fit of each datum; NaN where
            the training's record was not given.
    """

    dataset: xarray.Dataset

    def seconds(self, num_data: int) -> dict[str, float]:
        """Seconds of each repair for so many data."""
        ds = self.dataset
        total = ds["seconds_fixed"] + num_data * ds["seconds_per_row"]
        return dict(zip(ds["repair"].values.tolist(), total.values.tolist(), strict=True))

    def cheapest(self, share: float, num_data: int) -> str | None:
        """The cheapest repair that brings back a share of the amortization gap, if one does.

        Of repairs whose seconds differ by less than a quarter the first of the table is named, as
        clocks are no better than that. Resampling is left out: it gives better draws, at its price
        for each of them, and no better q.

        Args:
            share: Between 0 and 1.
            num_data: For how many data.
        """
        price = self._able(share, num_data)
        least = min(price.values(), default=math.inf)
        return next((r for r in price if price[r] <= _ALIKE * least), None)

    def _able(self, share: float, num_data: int) -> dict[str, float]:
        """Seconds of the repairs that bring back a share of the amortization gap."""
        ds = self.dataset
        wanted = share * ds.attrs["amortization_gap"]
        return {
            r: seconds
            for r, seconds in self.seconds(num_data).items()
            if float(ds["gain"].sel(repair=r)) >= wanted
            and ds["kind"].sel(repair=r).item() != "resampling"
        }

    def __str__(self) -> str:
        attrs = self.dataset.attrs
        rows = [_HEADER, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = [
            "  "
            + row[0].ljust(widths[0])
            + "  "
            + "  ".join(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        return "\n".join(
            [
                f"What each repair brings back of {attrs['inference_gap']:.4f} nats a datum "
                f"(amortization {attrs['amortization_gap']:.4f}):",
                "",
                *table,
                "",
                *self.sentences(),
            ]
        )

    def table(self) -> TextTable:
        """The price list, in cells."""
        return TextTable(_HEADER, self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        ds, attrs = self.dataset, self.dataset.attrs
        rows: list[tuple[str, ...]] = []
        for name in ds["repair"].values.tolist():
            one = ds.sel(repair=name)
            gain, error = float(one["gain"]), float(one["gain_stderr"])
            share = gain / attrs["inference_gap"] if attrs["inference_gap"] > 0 else math.nan
            rows.append(
                (
                    name,
                    f"{gain:8.4f} ± {error:.4f}",
                    f"{share:.0%}" if math.isfinite(share) else "–",
                    f"{float(one['seconds_fixed']):.3g}",
                    f"{1000 * float(one['seconds_per_row']):.3g}",
                )
            )
        return rows

    def sentences(self) -> list[str]:
        """Which repair pays, and from how many data on amortization does."""
        attrs, said = self.dataset.attrs, []
        for num_data in (1_000, 1_000_000):
            best, price = self.cheapest(0.9, num_data), self._able(0.9, num_data)
            if best is not None:
                least = min(price, key=lambda name: price[name])
                alike = (
                    f"; {least}, {_duration(price[least])}, cannot be told from it, as clocks are "
                    f"no better than {_ALIKE - 1:.0%}"
                )
                said.append(
                    f"For {num_data:,} data the cheapest that brings back nine tenths of the "
                    f"amortization gap: {best}, {_duration(price[best])}"
                    f"{alike if price[least] < price[best] else ''}."
                )
        even = attrs["break_even"]
        if math.isfinite(even):
            said.append(
                f"Training and encoding cost less than a cold fit of each datum from "
                f"{max(even, 0):,.0f} data on, had the model come for nothing. The "
                f"figure of compare is another: its fits start from the guide's output, and what "
                f"they spend once is counted by row."
            )
        if "training" in self.dataset["kind"].values:
            said.append(
                "Gains are on the compared rows, shares of the inference gap. Those of explain are "
                "of the amortization gap, and its part for training is on training rows held back."
            )
        return said

    __repr__ = __str__


def _duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def repair_costs(
    comparison: Comparison,
    x_train: Tensor | None = None,
    *,
    fit: Fit | None = None,
    guide: str | None = None,
    families: Sequence[Family] | None = None,
    steps: int = 2000,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> RepairCosts:
    r"""Measure what each repair of a guide brings and what it costs, on the compared rows.

    - *k steps* of refinement from the guide's output (`ppvae.refine` on all rows),
    - *q\** from the guide's output, and *q\* cold*, from λ = 0, both to convergence,
    - *encoder training*: ``steps`` further steps, and a quarter of them, on ``x_train``, the model
      frozen; it pays once for all data,
    - *q\* in a richer family*,
    - *importance resampling*: one of K draws of the guide, chosen by its weight, has an ELBO of at
      least :math:`L_K`, the K-draw importance-weighted bound (Cremer, Morris & Duvenaud 2017,
      "Reinterpreting importance-weighted autoencoders"); what is shown is :math:`L_K - L_1`.

    Seconds are split into those spent once and those per row by a second run on a quarter of the
    rows. They are of this machine, this batch size and this moment: compare them with each other.

    Args:
        comparison: The comparison of the guide.
        x_train: Rows to train the encoder on; without them that repair is left out.
        fit: The record of the guide's training, for the break-even.
        guide: Which guide, where the comparison has several.
        families: Richer families; `FullRankNormal` for a guide of `DiagonalNormal` if left out.
        steps: Steps of the longer encoder training.
        lr: Its learning rate.
        seed: Seed of all draws; the caller's generators are left as they were.
        progress: Whether to show a progress bar, on a terminal or in a notebook.

    Returns:
        The table; print it.

    Raises:
        ValueError: If the training rows are of another shape or kind than the compared ones, the
            guide's name is unknown, or the guide keeps parameters for each datum.

    Example:
        >>> from ppvae import compare, pairs
        >>> model, guide = pairs.factor_analysis()
        >>> costs = repair_costs(compare(model, guide, model(size=40).detach()))
        >>> float(costs.dataset["gain"].sel(repair="q* from the guide")) > 0
        True
    """
    check_count("steps", steps, least=4)
    name = comparison.guide_name(guide)
    check_current(comparison, name)
    _check(comparison, name, x_train)
    bench = _Bench(comparison, name, seed)
    if families is None:
        families = bench.richer()
    kinds: list[Iterable[_Row]] = [bench.refinements(), bench.fits(), map(bench.family, families)]
    if x_train is not None:
        kinds.append(bench.trainings(x_train, steps, lr))
    kinds.append(bench.resamplings())
    count = len(_STEPS) + 2 + len(families) + 2 * (x_train is not None) + len(_RESAMPLED)
    rows = []
    with progress_bar(count, "repairs", "repair", shown=progress) as bar:
        for row in chain.from_iterable(kinds):
            rows.append(row)
            bar.advance()
    return RepairCosts(_dataset(bench, rows, fit))


def _check(comparison: Comparison, name: str, x_train: Tensor | None) -> None:
    """Refuse what is unfit before minutes are spent."""
    program = comparison.guides[name]
    if isinstance(program, PerDatapoint):
        raise ValueError(
            "guide: a PerDatapoint guide keeps parameters for each datum, so that nothing is "
            "amortized and nothing is to be mended. Compare the amortized guide."
        )
    if x_train is None:
        return
    check_same_kind(comparison.x, x_train, comparison.model, program)
    if len(x_train) < 2:
        raise ValueError("x_train: expected at least 2 rows, of which one is held back; got 1.")


@dataclass(frozen=True)
class _Row:
    name: str
    kind: str
    gain: float
    stderr: float
    fixed: float
    per_row: float


class _Bench:
    """Repairs of one guide, timed on all rows and on a quarter of them."""

    def __init__(self, comparison: Comparison, name: str, seed: int) -> None:
        self.model, self.guide = comparison.model, comparison.guides[name]
        self.x, self.seed = comparison.x, seed
        self.name, self.comparison = name, comparison
        self.few = self.x[: max(1, len(self.x) // 4)]
        self.before = self._weights(self.guide)
        self.encode = self._timed(lambda x: seconds_to_encode(self.guide, x))

    def _timed(self, run: Callable[[Tensor], float]) -> tuple[float, float]:
        """Seconds spent once and seconds per row, from the fastest of some runs.

        What else the machine does only ever adds to the time.
        """
        runs = [(run(self.x), run(self.few)) for _ in range(_REPEATS)]
        return self._two_parts(min(whole for whole, _ in runs), min(part for _, part in runs))

    def _two_parts(self, whole: float, part: float) -> tuple[float, float]:
        """Split the seconds of all rows by those of a few: neither part is negative."""
        rows, few = len(self.x), len(self.few)
        if few == rows:
            return 0.0, whole / rows
        per_row = min(max((whole - part) / (rows - few), 0.0), whole / rows)
        return max(whole - per_row * rows, 0.0), per_row

    def _weights(self, guide: Program) -> Tensor:
        """Log weights of all rows, on draws that are common to all guides."""
        weights = paired_weights(self.model, {"": guide}, self.x, _DRAWS, self.seed + 1)
        return weights[""].double()

    def _draws(self, x: Tensor, count: int) -> Tensor:
        """Log weights of further draws from the guide, in portions that fit into memory."""
        parts = [weigh(self.model, self.guide, x, size)[0] for size in draw_chunks(count, x)]
        return torch.cat(parts).double()

    def _row(self, name: str, kind: str, guide: Program, fixed: float, per_row: float) -> _Row:
        difference = self._weights(guide) - self.before
        return _Row(name, kind, *_mean(difference), fixed, per_row)

    def refinements(self) -> Iterator[_Row]:
        for count in _STEPS:
            done = self._refined(count, self.x)
            timed = self._timed(partial(self._seconds_to_refine, count))
            label = f"{count} refinement step{'s' * (count > 1)}"
            yield self._row(label, "refinement", done.guide, *timed)

    def _refined(self, count: int, x: Tensor) -> Refinement:
        return refine(
            self.model,
            self.guide,
            x,
            tolerance=_REFINE_TOLERANCE,
            max_steps=count,
            seed=self.seed,
        )

    def _seconds_to_refine(self, count: int, x: Tensor) -> float:
        return self._refined(count, x).seconds

    def fits(self) -> Iterator[_Row]:
        yield self._fit("q* from the guide", "per datapoint", None, self.guide)
        yield self._fit("q* cold", "per datapoint", self._families(), None)

    def family(self, family: Family) -> _Row:
        return self._fit(f"q* {family!r}", "family", family, None)

    def _fit(
        self,
        name: str,
        kind: str,
        family: Family | Mapping[str, Family] | None,
        init: Program | None,
    ) -> _Row:
        def run(x: Tensor) -> LocalFit:
            return fit_per_datapoint(
                self.model,
                family,
                x,
                init=init,
                num_samples=2,
                seed=self.seed,
                progress=False,
            )

        whole = run(self.x)
        timed = self._two_parts(whole.seconds, run(self.few).seconds)
        return self._row(name, kind, whole.guide, *timed)

    def _families(self) -> dict[str, Family]:
        return dict(per_datapoint(self.guide, self.x, model=self.model).families)

    def richer(self) -> list[Family]:
        """The full covariance where the guide has a diagonal one."""
        families = list(self._families().values())
        only = families[0]
        small = only.latent_dim is not None and 1 < only.latent_dim <= _LARGEST_FULL_RANK
        if len(families) == 1 and isinstance(only, DiagonalNormal) and small:
            assert only.latent_dim is not None
            return [FullRankNormal(only.latent_dim)]
        return []

    def trainings(self, x_train: Tensor, steps: int, lr: float) -> Iterator[_Row]:
        setting = EncoderTraining.of(self.model, self.guide, x_train, self.seed)
        held = max(1, len(x_train) // 10)
        order = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(self.seed)).to(
            x_train.device
        )
        rows = TrainingRows(x_train[order[held:]], x_train[order[:held]], x_train[:0], x_train[:0])
        with setting.restored():
            # Torch loads parts of itself when its first optimizer is made.
            setting.train(setting.encode, rows, 1, 128, lr)
        for count in (steps // 4, steps):
            with setting.restored():
                began = seconds_now(self.x.device)
                setting.train(setting.encode, rows, count, 128, lr)
                spent = seconds_now(self.x.device) - began
                trained = per_datapoint(self.guide, self.x, model=self.model)
            fixed, per_row = self.encode
            yield self._row(
                f"{count:,} step{'s' * (count > 1)} of encoder training",
                "training",
                trained,
                fixed + spent,
                per_row,
            )

    def resamplings(self) -> Iterator[_Row]:
        for count in _RESAMPLED:
            groups = max(20, _DRAWS // count)

            def draw(x: Tensor, size: int = count) -> float:
                began = seconds_now(x.device)
                with judging(self.seed, x, self.model, self.guide), torch.no_grad():
                    self._draws(x, size)
                return seconds_now(x.device) - began

            with judging(self.seed + 2, self.x, self.model, self.guide), torch.no_grad():
                found = []
                for _ in range(groups):
                    weights = self._draws(self.x, count)
                    bound = torch.logsumexp(weights, dim=0) - math.log(count)
                    found.append(bound - weights.mean(dim=0))
            timed = self._timed(draw)
            yield _Row(
                f"resampling among {count:,} draws",
                "resampling",
                *_mean(torch.stack(found)),
                *timed,
            )


def _mean(differences: Tensor) -> tuple[float, float]:
    """Mean over draws and rows, and its Monte Carlo error for these rows."""
    draws, rows = differences.shape
    error = differences.var(dim=0).sum().sqrt() / math.sqrt(draws) / rows
    return float(differences.mean()), float(error)


def _dataset(bench: _Bench, rows: list[_Row], fit: Fit | None) -> xarray.Dataset:
    import xarray

    cold = next(row for row in rows if row.name == "q* cold")
    even = math.nan
    if fit is not None:
        fixed, per_row = bench.encode
        saved = cold.per_row - per_row
        even = (fit.seconds + fixed - cold.fixed) / saved if saved > 0 else math.inf
    fields = {
        "gain": "gain",
        "gain_stderr": "stderr",
        "seconds_fixed": "fixed",
        "seconds_per_row": "per_row",
        "kind": "kind",
    }
    means = {
        gap: bench.comparison.mean(gap, bench.name if bench.comparison.several else None)[0]
        for gap in ("approximation_gap", "amortization_gap", "inference_gap")
    }
    out = xarray.Dataset(
        {key: ("repair", [getattr(row, field) for row in rows]) for key, field in fields.items()},
        coords={"repair": [row.name for row in rows]},
        attrs=means
        | {
            "seconds_training": math.nan if fit is None else fit.seconds,
            "seconds_encoding_fixed": bench.encode[0],
            "seconds_encoding_per_row": bench.encode[1],
            "rows": len(bench.x),
            "break_even": even,
        },
    )
    for key in ("gain", "gain_stderr"):
        out[key].attrs["units"] = "nats"
    for key in ("seconds_fixed", "seconds_per_row"):
        out[key].attrs["units"] = "s"
    return out
