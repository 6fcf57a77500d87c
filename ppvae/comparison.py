"""Amortized against per-datapoint inference: the decomposition of the gap, datum by datum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppvae.density import (
    ModelSites,
    Program,
    check_count,
    check_pair,
    draw_chunks,
    judging,
    weigh,
)
from ppvae.diagnostics import pareto_k, pareto_k_threshold
from ppvae.evidence import Estimate, elbo_of, quadrature
from ppvae.families import Family
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


@dataclass(frozen=True)
class Comparison:
    """The ledger: what is lost against log p(x), where, and with what error.

    Attributes:
        dataset: An `xarray.Dataset` over ``data``: ``log_evidence``, ``elbo`` (over ``guide``
            too), ``approximation_gap``, ``amortization_gap``, ``inference_gap``, each with a
            ``…_stderr``, ``pareto_k`` (over ``guide``), ``converged``, ``steps``,
            ``predicted_gain``; the settings and the seconds in its attributes. All in nats.
        local: The per-datapoint fit.
    """

    dataset: xarray.Dataset
    local: LocalFit

    def mean(self, name: str) -> tuple[float, float]:
        """Mean over the data of a variable without further dimensions, and its standard error.

        The error is Monte Carlo error for these data; how they scatter is the variable's own
        spread.

        Args:
            name: Such as ``"amortization_gap"`` or ``"log_evidence"``.
        """
        value = self.dataset[name]
        stderr = self.dataset[f"{name}_stderr"]
        return float(value.mean()), float((stderr**2).sum()) ** 0.5 / value.sizes["data"]

    def __str__(self) -> str:
        ds, attrs = self.dataset, self.dataset.attrs
        count = ds.sizes["data"]
        kind = {
            "exact": "closed form",
            "quadrature": "numerical integral",
            "iwae": "importance-weighted: a lower bound, and so the approximation gap is one",
        }[attrs["evidence_kind"]]
        rows = [
            f"Inference gap of {count} data, in nats a datum:",
            "mean ± its Monte Carlo error, and the standard deviation (sd) over the data",
            "",
            f"  log p(x)                    {self._cell('log_evidence')}   {kind}",
        ]
        for guide, label in (("per_datapoint", "best per datum, q*"), ("amortized", "your guide")):
            rows.append(f"  ELBO, {label:<22}{self._cell('elbo', guide)}")
        rows.append("")
        for gap, label in zip(_GAPS, ("approximation", "amortization", "total"), strict=True):
            above = int((ds[gap] > (2 * ds[f"{gap}_stderr"]).clip(min=_NEGLIGIBLE)).sum())
            rows.append(
                f"  gap, {label:<23}{self._cell(gap)}   clearly above 0 in {above} of {count}"
            )
        return "\n".join([*rows, "", *self._checked()])

    def _cell(self, name: str, guide: str | None = None) -> str:
        value, stderr = self.dataset[name], self.dataset[f"{name}_stderr"]
        if guide is not None:
            value, stderr = value.sel(guide=guide), stderr.sel(guide=guide)
        error = float((stderr**2).sum()) ** 0.5 / value.sizes["data"]
        mean = round(float(value.mean()), 4) + 0.0  # No minus before a zero.
        with np.errstate(invalid="ignore"):  # A row without a finite ELBO leaves no sd.
            return f"{mean:10.4f} ± {error:.4f} (sd {float(value.std()):.3f})"

    def _checked(self) -> list[str]:
        ds, attrs = self.dataset, self.dataset.attrs
        converged = int(ds["converged"].sum())
        threshold = attrs["pareto_k_threshold"]
        k = ds["pareto_k"].sel(guide="per_datapoint").values
        heavy = np.flatnonzero(k > threshold)
        same = attrs["family"] == attrs["guide_family"]
        lines = [
            f"Checked: {'both guides ' + attrs['family'] if same else 'two families'}, one "
            f"estimator, {attrs['num_samples']} common draws, model in eval mode.",
            f"q* converged in {converged} of {ds.sizes['data']} rows.",
        ]
        if not same:
            lines.append(
                f"The guide is {attrs['guide_family']}, q* the best {attrs['family']}: the "
                f"amortization gap holds the difference between the families too."
            )
        empty = int((~np.isfinite(ds["elbo"].sel(guide="amortized"))).sum())
        if empty:
            lines.append(
                f"In {empty} row{'s' * (empty > 1)} the guide draws outside of the prior's support "
                f"or overflows: no finite ELBO, and no finite mean."
            )
        if converged < ds.sizes["data"]:
            lines.append(
                "Where q* has not converged the amortization gap is at least what is shown: "
                "raise max_steps."
            )
        if attrs["evidence_kind"] == "iwae" and len(heavy):
            which = ", ".join(str(row) for row in heavy[:5]) + (", …" if len(heavy) > 5 else "")
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
        seconds = {k: v for k, v in attrs.items() if k.startswith("seconds_")}
        spent = ", ".join(
            f"{k.removeprefix('seconds_').replace('_', ' ')} {v:.1f}" for k, v in seconds.items()
        )
        lines.append(f"Seconds: {spent}.")
        if math.isfinite(attrs["break_even"]):
            per_row = attrs["seconds_local_fit"] / ds.sizes["data"]
            lines.append(
                f"Fitting q* took {1000 * per_row:.3g} ms a datum, {ds.sizes['data']} at a time; "
                f"training the model and the guide took as long as {attrs['break_even']:,.0f} such "
                f"fits."
            )
        return lines

    __repr__ = __str__


def compare(
    model: Program,
    guide: Program,
    x: Tensor,
    *,
    family: Family | Mapping[str, Family] | None = None,
    fit: Fit | None = None,
    num_samples: int = 1000,
    evidence_samples: int = 5000,
    max_steps: int | None = None,
    seed: int = 0,
) -> Comparison:
    r"""Decompose the inference gap of a guide, datum by datum.

    .. math::
        \underbrace{\log p(x_n) - L_n[q]}_{\text{inference gap}} =
        \underbrace{\log p(x_n) - L_n[q^*_n]}_{\text{approximation gap}} +
        \underbrace{L_n[q^*_n] - L_n[q]}_{\text{amortization gap}}

    with :math:`q^*_n` the best member of the guide's own family for that datum (Cremer, Li &
    Duvenaud 2018, eq. 5). Both guides share family, site distribution, estimator and draws; the
    model is held fixed, in eval mode. The evidence is exact where the model has
    ``log_evidence(x)``, by quadrature where the latent has at most two dimensions, and otherwise
    importance weighted, with the weights of both guides pooled.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guide: A Pyro guide, called as ``guide(x)``.
        x: Rows, ``(batch, *event)``.
        family: A family to measure against, for guides that cannot be freed; the guide's own if
            left out. With another family the amortization gap also holds the difference between
            the families.
        fit: The record of the guide's training: its seconds give the break-even, the number of
            data from which on training and encoding cost less than fitting q* for each, at the
            speed per row of this call's batch.
        num_samples: Draws per row and guide for the ELBOs.
        evidence_samples: Draws per row and guide for an importance-weighted evidence.
        max_steps: As in `fit_per_datapoint`.
        seed: Seed of all draws; the caller's generators are left as they were.

    Returns:
        The comparison; print it for the table.

    Raises:
        ValueError: If the rows, the model or the guide are unfit, or the guide cannot be freed
            (the site is named).

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
    check_rows(x, model, guide)
    for name, value in (("num_samples", num_samples), ("evidence_samples", evidence_samples)):
        check_count(name, value, least=2)
    with judging(seed, x, model, guide):
        sites = check_pair(model, guide, x)
    own = _freed(model, guide, x, required=family is None)
    local = _fit_local(model, guide, x, family, own, max_steps, seed + 1)
    guides: dict[str, Program] = {"amortized": guide, "per_datapoint": local.guide}
    began = seconds_now(x.device)
    weights = _paired_weights(model, guides, x, num_samples, seed + 2)
    seconds_elbo = seconds_now(x.device) - began
    began = seconds_now(x.device)
    evidence = _evidence(model, sites, guides, x, evidence_samples, seed + 3)
    seconds_evidence = seconds_now(x.device) - began
    dataset = _ledger(weights, evidence, local)
    dataset.attrs = {
        "evidence_kind": evidence.method,
        "family": _family_name(local.guide),
        "guide_family": _family_name(own),
        "ignored_scales": ", ".join(sites.scaled),
        "num_samples": num_samples,
        "evidence_samples": evidence_samples if evidence.method == "iwae" else 0,
        "pareto_k_threshold": pareto_k_threshold(num_samples),
        "seed": seed,
        "status": local.status,
        "seconds_local_fit": local.seconds,
        "seconds_elbo": seconds_elbo,
        "seconds_evidence": seconds_evidence,
        "break_even": math.nan,
    }
    if fit is not None:
        per_row = local.seconds / len(x)
        encode = _seconds_to_encode(guide, x) / len(x)
        dataset.attrs["seconds_training"] = fit.seconds
        dataset.attrs["break_even"] = (
            fit.seconds / (per_row - encode) if per_row > encode else math.inf
        )
    return Comparison(dataset, local)


def _freed(model: Program, guide: Program, x: Tensor, *, required: bool) -> PerDatapoint | None:
    """The guide, freed; `None` if that cannot be done and is not required."""
    try:
        return per_datapoint(guide, x, model=model)
    except ValueError:
        if required:
            raise
        return None


def _fit_local(
    model: Program,
    guide: Program,
    x: Tensor,
    family: Family | Mapping[str, Family] | None,
    own: PerDatapoint | None,
    max_steps: int | None,
    seed: int,
) -> LocalFit:
    """q*, started at the guide's output too where that is of the wanted family."""
    if own is not None and family is not None:
        wanted = [family] if isinstance(family, Family) else [family[name] for name in own.families]
        if [repr(f) for f in wanted] != [repr(f) for f in own.families.values()]:
            own = None
    return fit_per_datapoint(model, family, x, init=own, max_steps=max_steps, seed=seed)


def _family_name(guide: PerDatapoint | None) -> str:
    if guide is None:
        return "unknown"
    if len(guide.families) == 1:
        return repr(next(iter(guide.families.values())))
    return ", ".join(f"{name}: {family!r}" for name, family in guide.families.items())


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
    guides: Mapping[str, Program],
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
    return _pooled(_paired_weights(model, guides, x, samples, seed))


def _pooled(weights: Mapping[str, Tensor]) -> Estimate:
    """Importance-weighted evidence with the weights of all guides pooled.

    Each guide's mean weight is unbiased for p(x), hence so is their mean: its log is a lower
    bound in expectation, which a maximum over the guides would not be.
    """
    stacked = torch.stack(list(weights.values()))
    guides, count, _ = stacked.shape
    value = torch.logsumexp(stacked.flatten(0, 1), dim=0) - math.log(guides * count)
    # Draws are common to the guides, so that a draw's contribution is the sum over them.
    per_draw = torch.exp(stacked - value).mean(dim=0)
    return Estimate(value, per_draw.std(dim=0) / math.sqrt(count), "lower", "iwae")


def _ledger(weights: Mapping[str, Tensor], evidence: Estimate, local: LocalFit) -> xarray.Dataset:
    import xarray

    names = list(weights)
    elbos = [elbo_of(weights[name]) for name in names]
    amortized, best = elbos[0], elbos[1]
    difference = elbo_of(weights["per_datapoint"] - weights["amortized"])
    gaps = {
        "approximation_gap": (
            evidence.value - best.value,
            torch.hypot(evidence.stderr, best.stderr),
        ),
        "amortization_gap": (difference.value, difference.stderr),
        "inference_gap": (
            evidence.value - amortized.value,
            torch.hypot(evidence.stderr, amortized.stderr),
        ),
    }
    per_row: dict[str, Tensor] = {
        "log_evidence": evidence.value,
        "log_evidence_stderr": evidence.stderr,
        "converged": local.converged,
        "steps": local.steps,
        "predicted_gain": local.predicted_gain,
    }
    for name, (value, stderr) in gaps.items():
        per_row |= {name: value, f"{name}_stderr": stderr}
    per_guide = {
        "elbo": torch.stack([e.value for e in elbos]),
        "elbo_stderr": torch.stack([e.stderr for e in elbos]),
        "pareto_k": torch.stack([pareto_k(weights[name]) for name in names]),
    }
    variables: dict[str, Any] = {k: ("data", _array(v)) for k, v in per_row.items()}
    variables |= {k: (("guide", "data"), _array(v)) for k, v in per_guide.items()}
    out = xarray.Dataset(variables, coords={"guide": names})
    for key, variable in out.data_vars.items():
        if key not in ("converged", "steps", "pareto_k"):
            variable.attrs["units"] = "nats"
    return out


def _array(value: Tensor) -> Any:
    return value.detach().cpu().numpy()


def _seconds_to_encode(guide: Program, x: Tensor) -> float:
    """Seconds for the guide to describe all rows: what amortization costs after training."""
    began = seconds_now(x.device)
    with judging(0, x, guide), torch.no_grad():
        guide.params(x) if isinstance(guide, Amortized) else guide(x)
    return seconds_now(x.device) - began
