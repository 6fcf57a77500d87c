"""Amortized against per-datapoint inference: the decomposition of the gap, datum by datum."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppvae.configurations import MOST_CONFIGURATIONS, num_configurations
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
from ppvae.evidence import (
    Estimate,
    elbo_of,
    enumeration,
    exact_evidence,
    mixture_evidence,
    quadrature,
)
from ppvae.families import Family, same_family
from ppvae.guides import Amortized, PerDatapoint, per_datapoint
from ppvae.isolation import (
    check_rows,
    evaluation_mode,
    forked_rng,
    private_store,
    seconds_now,
)
from ppvae.ledger import GAPS, Comparison
from ppvae.local import LocalFit, by_site, fit_per_datapoint
from ppvae.progress import SILENT, Bar, progress_bar
from ppvae.training import Fit

if TYPE_CHECKING:
    import xarray

# Nats: an integral that is less sure than this gives way to importance weighting.
_LARGEST_QUADRATURE_ERROR = 0.01
_UNITS_SAMPLES = 200
# Times that the encoding is timed.
_REPEATS = 3

Guides = Program | Mapping[str, Program]
"""A guide, or several by name."""


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
    evidence: Estimate | None = None,
    max_steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    r"""Decompose the inference gap of a guide, or of several, datum by datum.

    .. math::
        \underbrace{\log p(x_n) - L_n[q]}_{\text{inference gap}} =
        \underbrace{\log p(x_n) - L_n[q^*_n]}_{\text{approximation gap}} +
        \underbrace{L_n[q^*_n] - L_n[q]}_{\text{amortization gap}}

    with :math:`q^*_n` the best member of the guide's own family for that datum (Cremer, Li &
    Duvenaud 2018, eq. 5). Both guides share family, site distribution, estimator and draws; the
    model is held fixed, in eval mode. The evidence is exact where the model has
    ``log_evidence(x)``, by enumeration where its latents have few values, by quadrature where they
    have at most two dimensions, and otherwise importance weighted, with the mixture of all guides
    as proposal.

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
            speed per row of this call's batch (``seconds_encoding`` and ``seconds_local_fit`` are
            those of all rows).
        num_samples: Draws per row and guide for the ELBOs.
        evidence_samples: Draws per row and guide for an importance-weighted evidence.
        evidence: log p(x) of these rows under this model, found beforehand, as by
            `ppvae.log_evidence` or `ppvae.ais`; found here if left out.
        max_steps: As in `fit_per_datapoint`.
        seed: Seed of all draws; the caller's generators are left as they were.
        progress: Whether to show progress bars, on a terminal or in a notebook.

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
    # A module that happens to be a mapping is a guide.
    named = isinstance(guide, Mapping) and not callable(guide)
    guides: dict[str, Program] = dict(guide) if named else {"amortized": guide}  # type: ignore[arg-type, dict-item]
    _check_families(family, families)
    several = named or bool(families)
    _check_arguments(guides, several, fit)
    check_rows(x, model, *guides.values())
    for name, value in (("num_samples", num_samples), ("evidence_samples", evidence_samples)):
        check_count(name, value, least=2)
    if evidence is not None and evidence.value.shape != (len(x),):
        raise ValueError(
            f"evidence: expected a figure for each of the {len(x)} rows; got shape "
            f"{tuple(evidence.value.shape)}. Estimate it for the rows that are compared."
        )
    if evidence is not None and evidence.bound == "upper":
        raise ValueError(
            "evidence: a gap against an upper bound says nothing of which side it lies on; got "
            "one. Give the lower bound, or an exact figure."
        )
    with private_store():
        # Bare parameters that nobody has made yet are made once: each stage would draw its own.
        with forked_rng(seed, x.device), evaluation_mode(model, *guides.values()):
            _make_parameters(x, model, *guides.values())
        return _compare(
            model,
            guides,
            x,
            several,
            family,
            families,
            fit,
            num_samples,
            evidence_samples,
            evidence,
            max_steps,
            seed,
            progress,
        )


def _make_parameters(x: Tensor, *programs: Program) -> None:
    for program in programs:
        # What is wrong with a program is said where it is read.
        with torch.no_grad(), suppress(Exception):
            program(x)


def _check_families(family: Any, families: Any) -> None:
    for name, value in (("family", family), ("families", families)):
        if isinstance(value, type):
            raise ValueError(
                f"{name}: expected a family such as DiagonalNormal(2), with its size; got the "
                f"class {value.__name__}."
            )
    if isinstance(families, (Family, Mapping)):
        raise ValueError(
            f"families: expected a list, families=[{families!r}]; got {type(families).__name__}."
        )


def _compare(
    model: Program,
    guides: Mapping[str, Program],
    x: Tensor,
    several: bool,
    family: Family | Mapping[str, Family] | None,
    families: Sequence[Family | Mapping[str, Family]],
    fit: Fit | None,
    num_samples: int,
    evidence_samples: int,
    evidence: Estimate | None,
    max_steps: int | None,
    seed: int,
    progress: bool,
) -> Comparison:
    for name, each in guides.items():
        with judging(seed, x, model, each), _named(name, several):
            sites = check_pair(model, each, x)
    with judging(seed, x, model), torch.no_grad():
        check_density(model, x, sites)
    plan = _plan(model, guides, x, sites, family, families)
    fits = {
        name: fit_per_datapoint(
            model,
            wanted,
            x,
            init=starts or None,
            max_steps=max_steps,
            seed=seed + 1,
            progress=progress,
        )
        for name, (wanted, starts) in plan.fits.items()
    }
    columns: dict[str, Program] = dict(guides)
    of = {g: plan.family_of[g] for g in guides}
    for name, local in fits.items():
        label = "per_datapoint" if len(fits) == 1 else f"per_datapoint {name}"
        columns[label], of[label] = local.guide, name
    began = seconds_now(x.device)
    with progress_bar(len(columns) * num_samples, "ELBO", "draw", shown=progress) as bar:
        weights = paired_weights(model, columns, x, num_samples, seed + 2, bar)
    seconds_elbo = seconds_now(x.device) - began
    began = seconds_now(x.device)
    proposals = [*plan.freed.values(), *(local.guide for local in fits.values())]
    found_here = evidence is None
    if evidence is None:
        evidence = _evidence(model, sites, proposals, x, evidence_samples, seed + 3, progress)
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
        "evidence_samples": evidence_samples if found_here and evidence.method == "iwae" else 0,
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
        # What else the machine does only ever adds to the time.
        encoding = min(seconds_to_encode(next(iter(guides.values())), x) for _ in range(_REPEATS))
        encode = encoding / len(x)
        dataset.attrs["training_status"] = fit.status
        dataset.attrs["training_steps"] = fit.steps
        # An integer: netCDF has no booleans.
        dataset.attrs["training_completed"] = int(fit.completed)
        dataset.attrs["seconds_training"] = fit.seconds
        dataset.attrs["seconds_encoding"] = encoding
        dataset.attrs["break_even"] = (
            fit.seconds / (per_row - encode) if per_row > encode else math.inf
        )
    pairs = _difference_variances(weights)
    return Comparison(dataset, model, guides, x, fits, pairs)


def _check_arguments(guides: Mapping[str, Program], several: bool, fit: Fit | None) -> None:
    if not guides:
        raise ValueError("guide: expected a guide, or at least one by name; got an empty mapping.")
    for name, guide in guides.items():
        if not isinstance(name, str):
            raise ValueError(f"guide: expected names that are text; got {name!r}.")
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


@contextmanager
def _named(name: str, several: bool) -> Iterator[None]:
    """Say which of several guides an error is about."""
    try:
        yield
    except ValueError as error:
        if several:
            raise ValueError(f"guide {name!r}: {error}") from error
        raise


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
            with _named(name, len(guides) > 1):
                plan.freed[name] = per_datapoint(guide, x, model=model)
        except ValueError:
            if family is None:
                raise
        wanted = plan.freed[name].families if family is None else by_site(family, sites)
        key = _enter(plan, dict(wanted), name)
        plan.family_of[name] = key
        own = plan.freed.get(name)
        if own is not None and _same(own.families, wanted):
            plan.fits[key][1].append(own)
    for further in families:
        _enter(plan, by_site(further, sites), "families")
    return plan


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
    first, count = name, 2
    while name in plan.fits:
        name, count = f"{first} ({count})", count + 1
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


def paired_weights(
    model: Program,
    guides: Mapping[str, Program],
    x: Tensor,
    num_samples: int,
    seed: int,
    bar: Bar = SILENT,
) -> dict[str, Tensor]:
    """Log weights of several guides, ``(num_samples, batch)`` each, on common random numbers.

    ``bar`` is told of each draw of all rows.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in guides}
    for chunk, size in enumerate(draw_chunks(num_samples, x)):
        for name, guide in guides.items():
            with judging(seed + 7919 * chunk, x, model, guide), torch.no_grad():
                parts[name].append(weigh(model, guide, x, size)[0])
            bar.advance(size)
    return {name: torch.cat(part) for name, part in parts.items()}


def _evidence(
    model: Program,
    sites: ModelSites,
    proposals: Sequence[PerDatapoint],
    x: Tensor,
    samples: int,
    seed: int,
    progress: bool,
) -> Estimate:
    exact = exact_evidence(model, x)
    if exact is not None:
        return exact
    if num_configurations(sites) <= MOST_CONFIGURATIONS:
        return enumeration(model, x)
    if sites.size <= 2 and not any(s.is_discrete for s in sites.latents.values()):
        integral = quadrature(model, x, progress=progress)
        if bool((integral.stderr < _LARGEST_QUADRATURE_ERROR).all()):
            return integral
    return mixture_evidence(model, proposals, x, samples, seed=seed, progress=progress)


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
    *GAPS,
    *(f"{gap}_stderr" for gap in GAPS),
    *(f"{gap}_bound" for gap in GAPS),
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


def check_current(comparison: Comparison, guide: str) -> None:
    """Refuse a comparison that no longer speaks of the guide as it is, or never did of its family.

    Raises:
        ValueError: If the guide or the model has changed since, or q* is of another family than
            the guide.
    """
    ds, model, program = comparison.dataset, comparison.model, comparison.guides[guide]
    x, attrs = comparison.x, comparison.dataset.attrs
    own = per_datapoint(program, x, model=model).families
    against = str(ds["family"].sel(guide=guide).item()) if comparison.several else attrs["family"]
    if not _same(own, comparison.local_fits[against].guide.families):
        raise ValueError(
            f"comparison: its amortization gap is against the best {against} but the guide is "
            f"{_family_names(own)}, so that it holds the difference between the families "
            f"too. Compare again without family=."
        )
    check_unchanged(comparison, guide)


def check_unchanged(comparison: Comparison, guide: str) -> None:
    """Refuse a comparison whose guide or model has another ELBO than when it was made.

    Raises:
        ValueError: If the guide or the model has changed since.
    """
    ds, attrs = comparison.dataset, comparison.dataset.attrs
    program = {guide: comparison.guides[guide]}
    weights = paired_weights(
        comparison.model, program, comparison.x, attrs["num_samples"], attrs["seed"] + 2
    )
    now = elbo_of(weights[guide]).value.double().cpu()
    then = torch.as_tensor(ds["elbo"].sel(guide=guide).values).double()
    if bool(((now - then).abs() > 1e-3 * then.abs().clamp(min=1.0)).any()):
        raise ValueError(
            "comparison: the model or the guide has changed since it was made. Compare again."
        )


def seconds_to_encode(guide: Program, x: Tensor) -> float:
    """Seconds for the guide to describe all rows: what amortization costs after training."""
    began = seconds_now(x.device)
    with judging(0, x, guide), torch.no_grad():
        guide.params(x) if isinstance(guide, Amortized) else guide(x)
    return seconds_now(x.device) - began
