"""A run in one document for machines: the figures of the ledger, and what was said in words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ppvae.comparison import paired_weights
from ppvae.explanation import Explanation
from ppvae.ledger import GAPS, Comparison, bound_of_mean
from ppvae.refinement import GIVEN_UP, Refinement
from ppvae.repairs import RepairCosts
from ppvae.training import Fit

_PAIRED_DRAWS = 1000


@dataclass(frozen=True)
class Missing:
    """In the place of a figure that there is none of, with the reason."""

    why: str


def as_json(document: Mapping[str, Any]) -> str:
    """A document as JSON, in which what is no finite number is ``null``.

    An entry ``why_null`` says of each of them, by its path, what it was or why it is missing.

    Example:
        >>> print(as_json({"gap": {"mean": float("inf")}}))
        {
          "gap": {
            "mean": null
          },
          "why_null": {
            "gap.mean": "infinite"
          }
        }
    """
    reasons: dict[str, str] = {}
    plain = _plain(document, (), reasons)
    return json.dumps(plain | {"why_null": reasons}, indent=2, allow_nan=False)


def _plain(value: Any, path: tuple[str, ...], reasons: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v, (*path, str(key)), reasons) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, (*path, str(at)), reasons) for at, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        sign = "minus " if value < 0 else ""
        value = Missing("not a number" if math.isnan(value) else f"{sign}infinite")
    if isinstance(value, Missing):
        reasons[".".join(path)] = value.why
        return None
    return value


def amortization_gap_at_most(comparison: Comparison) -> float:
    """An upper end of the mean amortization gap, in nats a datum.

    The mean, two of its standard errors, and what q* has still to gain, to first order, in the
    rows where it has not converged.
    """
    ds = comparison.dataset
    mean, stderr = comparison.mean("amortization_gap")
    left = np.where(ds["converged"].values, 0.0, ds["predicted_gain"].values)
    return mean + 2 * stderr + float(left.mean())


@dataclass(frozen=True)
class BelowBest:
    """Mended rows whose ELBO is clearly below that of q*.

    Attributes:
        rows: Their number.
        most: The largest difference, in nats; 0 without such rows.
        stderr: Its Monte Carlo standard error.
    """

    rows: int
    most: float
    stderr: float


def below_best(refined: Refinement, comparison: Comparison, tolerance: float) -> BelowBest:
    """Of the rows that were accepted or refined, those that are short of the comparison's q*.

    A row counts where q* is higher by more than the tolerance and four standard errors, on common
    draws.

    Args:
        refined: What `ppvae.refine` did on the compared rows.
        comparison: The comparison of the same rows.
        tolerance: The tolerance of the refinement, in nats.
    """
    best = comparison.local.guide
    both = {"best": best, "mended": refined.guide}
    seed = int(comparison.dataset.attrs["seed"]) + 3
    weights = paired_weights(comparison.model, both, comparison.x, _PAIRED_DRAWS, seed)
    difference = (weights["best"] - weights["mended"]).double()
    mean, stderr = difference.mean(dim=0), difference.std(dim=0) / math.sqrt(_PAIRED_DRAWS)
    done = torch.tensor([what != GIVEN_UP for what in refined.outcome]).to(mean.device)
    # Infinitely far below has no error.
    short = torch.nonzero(done & (mean > tolerance + 4 * stderr.nan_to_num(0.0))).flatten()
    if len(short) == 0:
        return BelowBest(0, 0.0, 0.0)
    row = short[mean[short].argmax()]
    return BelowBest(len(short), float(mean[row]), float(stderr[row]))


def summary(
    comparison: Comparison,
    record: Mapping[str, Any],
    origin: str,
    training: Fit | None,
    refined: Refinement,
    below: BelowBest,
    results: Mapping[str, Explanation | RepairCosts],
    folder: str,
    files: Sequence[str],
    limit: float | None,
) -> dict[str, Any]:
    """All that a run of one guide has found.

    Args:
        comparison: The comparison, whose rows may carry a coordinate ``row``.
        record: The settings, with versions and device.
        origin: Where the compared rows come from, in words.
        training: The record of the training, if there was one.
        refined: What `ppvae.refine` did on the same rows.
        below: Which of its rows q* is above.
        results: Causes and prices, where they were asked for.
        folder: Where the files lie.
        files: Their names.
        limit: The most that the amortization gap may be, in nats, if that was asked.
    """
    ds, attrs = comparison.dataset, comparison.dataset.attrs
    names = ds["guide"].values.tolist()
    seconds = {k.removeprefix("seconds_"): v for k, v in attrs.items() if k.startswith("seconds_")}
    document: dict[str, Any] = {
        "settings": dict(record),
        "rows": {"count": ds.sizes["data"], "origin": origin},
        "training": None if training is None else _training(training),
        "log_evidence": {
            **_figure(comparison, "log_evidence"),
            "bound": "estimate" if attrs["evidence_kind"] in _EXACT else "lower",
            "kind": attrs["evidence_kind"],
        },
        "guides": {name: _guide(comparison, name) for name in names},
        "gaps": {gap: _gap(comparison, gap) for gap in GAPS},
        "q_star": {
            "family": attrs["family"],
            "converged": int(ds["converged"].sum()),
            "rows": ds.sizes["data"],
            "status": attrs["status"],
        },
        "latent_units": int(attrs["latent_units"]),
        "worst_rows": [_row(comparison, row) for row in comparison.worst().tolist()],
        "refine": _refined(refined, below),
        "verdict": comparison.verdict(),
        "break_even": _break_even(attrs["break_even"], training),
        "seconds": {name: float(value) for name, value in seconds.items()},
    }
    for name, result in results.items():
        document[name] = _explained(result) if isinstance(result, Explanation) else _costs(result)
    if limit is not None:
        most = amortization_gap_at_most(comparison)
        document["check"] = {
            "max_amortization_gap": limit,
            "amortization_gap_at_most": most,
            "passed": most <= limit,
        }
    return document | {"folder": folder, "files": list(files)}


_EXACT = ("exact", "quadrature", "enumeration")


def _training(fit: Fit) -> dict[str, Any]:
    last = fit.losses[-max(1, len(fit.losses) // 10) :]
    return {
        "status": fit.status,
        "completed": fit.completed,
        "steps": fit.steps,
        "batch_size": fit.batch_size,
        "loss_over_the_last_tenth": float(last.mean()) if len(last) else Missing("no steps"),
        "seconds": fit.seconds,
    }


def _figure(comparison: Comparison, name: str, guide: str | None = None) -> dict[str, float]:
    mean, stderr = comparison.mean(name, guide)
    value = comparison.dataset[name]
    value = value if guide is None else value.sel(guide=guide)
    with np.errstate(invalid="ignore"):  # A row without a finite ELBO leaves no sd.
        return {"mean": mean, "stderr": stderr, "sd": float(value.std(skipna=False))}


def _guide(comparison: Comparison, name: str) -> dict[str, Any]:
    ds = comparison.dataset
    k = ds["pareto_k"].sel(guide=name).values
    active = float(ds["active_units"].sel(guide=name))
    return {
        "elbo": _figure(comparison, "elbo", name) | {"bound": "lower"},
        "active_units": Missing("one row tells nothing") if math.isnan(active) else active,
        "rows_with_heavy_tails": int((k > ds.attrs["pareto_k_threshold"]).sum()),
        "pareto_k_threshold": float(ds.attrs["pareto_k_threshold"]),
    }


def _gap(comparison: Comparison, gap: str) -> dict[str, Any]:
    bounds = comparison.dataset[f"{gap}_bound"].values
    kinds, counts = np.unique(bounds, return_counts=True)
    return {
        **_figure(comparison, gap),
        "bound": bound_of_mean(bounds),
        "rows_by_bound": dict(zip(kinds.tolist(), counts.tolist(), strict=True)),
    }


def _row(comparison: Comparison, row: int) -> dict[str, Any]:
    ds = comparison.dataset
    return {
        "row": int(ds["row"][row]) if "row" in ds.coords else row,
        "inference_gap": float(ds["inference_gap"][row]),
        "stderr": float(ds["inference_gap_stderr"][row]),
    }


def _refined(done: Refinement, below: BelowBest) -> dict[str, Any]:
    mean, stderr = done.mean_gain()
    counts = {name: done.count(name) for name in ("accepted", "refined", "given up")}
    return {
        "gain": {"mean": mean, "stderr": stderr},
        "rows": counts,
        "below_q_star": {"rows": below.rows, "most": below.most, "stderr": below.stderr},
        "seconds": done.seconds,
    }


def _break_even(rows: float, training: Fit | None) -> float | Missing:
    if training is None:
        return Missing("nothing was trained")
    if math.isinf(rows):
        return Missing("encoding a row took no less time than fitting its q*")
    return rows


def _explained(result: Explanation) -> dict[str, Any]:
    ds = result.dataset
    parts = {
        str(part): {"mean": float(gap), "stderr": float(error)}
        for part, gap, error in zip(
            ds["part"].values, ds["gap"].values, ds["gap_stderr"].values, strict=True
        )
    }
    return {"parts": parts, "cause": result.cause, "status": result.status}


def _costs(result: RepairCosts) -> list[dict[str, Any]]:
    ds = result.dataset
    columns = ("gain", "gain_stderr", "seconds_fixed", "seconds_per_row")
    return [
        {"repair": str(name)} | {column: float(ds[column][at]) for column in columns}
        for at, name in enumerate(ds["repair"].values)
    ]
