"""What an amortization gap does to what is read off a posterior, in the reader's units."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppvae.comparison import check_unchanged
from ppvae.density import (
    LatentSite,
    Program,
    check_count,
    check_pair,
    draw_chunks,
    guided,
    judging,
    prior_and_likelihood,
    read_model,
    without_trace,
)
from ppvae.diagnostics import element_names, prior_variances
from ppvae.isolation import check_rows
from ppvae.ledger import Comparison

if TYPE_CHECKING:
    import xarray

Function = Callable[[Any], Tensor]
"""From draws ``(num_samples, batch, *event)``, by site where there are several, to
``(num_samples, batch)``."""

_WORST = 3


@dataclass(frozen=True, repr=False)
class Consequences:
    """What changes where a guide stands in for the per-datapoint optimum q*.

    Attributes:
        dataset: An `xarray.Dataset`; each figure has a ``…_stderr``, and each shift is the guide's
            figure less that of q*. Over ``data`` and ``element``, in units of the prior's standard
            deviation: ``mean_shift`` and ``sd_shift`` of the posterior. Over ``guide`` (the guide
            and ``"per_datapoint"``), ``data`` and ``function``: ``expectation``, the reader's
            E[f(z)]; ``expectation_shift`` is its difference. Over ``guide`` and ``data``, in nats:
            ``predictive``, log E[p(x_new | z)]; ``predictive_shift`` is its difference. Over
            ``element``: ``prior_sd``, in the latent's units.
    """

    dataset: xarray.Dataset

    def worst(self, name: str, count: int = 5) -> Tensor:
        """The numbers of the rows with the largest shift in either direction, largest first.

        Args:
            name: ``"mean_shift"``, ``"sd_shift"``, ``"predictive_shift"`` or a function's name.
            count: How many.

        Raises:
            ValueError: If there is no such shift (the known ones are named).
        """
        value, _ = self._shift(name)
        return torch.as_tensor(_order(value)[:count].copy())

    def _shift(self, name: str) -> tuple[Any, Any]:
        """Shifts ``(data, entries)``, and their errors."""
        ds = self.dataset
        functions = ds["function"].values.tolist() if "function" in ds.coords else []
        if name in functions:
            both = [ds[v].sel(function=name).values for v in _with_error("expectation_shift")]
        elif name in ("mean_shift", "sd_shift", "predictive_shift"):
            both = [ds[v].values for v in _with_error(name)]
        else:
            known = ["mean_shift", "sd_shift", "predictive_shift", *functions]
            raise ValueError(f"name: expected one of {known}; got {name!r}.")
        value, stderr = (v.reshape(len(v), -1) for v in both)
        return value, stderr

    def __repr__(self) -> str:
        ds, attrs = self.dataset, self.dataset.attrs
        what = {"mean_shift": "posterior mean, prior sd", "sd_shift": "posterior sd, prior sd"}
        if "function" in ds.coords:
            what |= {name: f"E[{name}]" for name in ds["function"].values.tolist()}
        of = "x_new" if attrs["predictive_of"] == "x_new" else "the x that was read"
        what["predictive_shift"] = f"log E[p({of} | z)], nats"
        width = max(map(len, what.values()))
        lines = [
            f"Consequences of {attrs['guide']!r} in place of q* ({attrs['family']}), "
            f"{ds.sizes['data']} data, {attrs['num_samples']} common draws",
            "guide less q*: root mean square without its noise; worst rows",
            *(f"  {text:<{width}}  {self._line(name)}" for name, text in what.items()),
        ]
        if attrs["not_converged"]:
            lines.append(
                f"q* has not converged in {attrs['not_converged']} rows: shifts are against what "
                f"it had reached there."
            )
        return "\n".join(lines)

    def _line(self, name: str) -> str:
        value, stderr = self._shift(name)
        with np.errstate(invalid="ignore"):
            square = float((value**2 - stderr**2).mean())
            beyond = int((np.abs(value) > 2 * stderr).sum())
        size = math.sqrt(max(square, 0.0)) if not math.isnan(square) else math.nan
        ds = self.dataset
        rows = []
        for row in _order(value)[:_WORST]:
            at = int(np.argmax(np.nan_to_num(np.abs(value[row]), nan=np.inf)))
            number = int(ds["row"][row]) if "row" in ds.coords else int(row)
            element = f" {ds['element'].values[at]}" if name in ("mean_shift", "sd_shift") else ""
            rows.append(f"{number}{element} ({value[row, at]:+.3g} ± {stderr[row, at]:.2g})")
        return (
            f"{size:.3g}, beyond two standard errors in {beyond} of {value.size}; worst: "
            f"{', '.join(rows)}"
        )


def _with_error(name: str) -> tuple[str, str]:
    return name, f"{name}_stderr"


def _order(value: Any) -> Any:
    """Rows by the largest of their entries' sizes."""
    return np.argsort(-np.nan_to_num(np.abs(value), nan=np.inf).max(axis=1), kind="stable")


def consequences(
    comparison: Comparison,
    functions: Mapping[str, Function] | None = None,
    *,
    x_new: Tensor | None = None,
    guide: str | None = None,
    num_samples: int = 1000,
    seed: int = 0,
) -> Consequences:
    r"""What the guide's posterior gets wrong of what a reader takes from it, row by row.

    A gap in nats says that q differs from the best member q* of its family, and not in what. Here
    both are asked the same questions on common random numbers, S draws each:

    - shift of the posterior's mean and standard deviation, for each latent element, in units of
      the prior's standard deviation (found as `ppvae.diagnostics.active_units` finds it);
    - shift of the reader's own :math:`E_q[f(z)]`;
    - shift of the predictive log density :math:`\log E_{q(z \mid x_n)}[p(x^{new}_n \mid z)]`.

    The standard errors are those of paired differences, by the delta method where a figure is no
    mean. They hold the error of the prior's standard deviation, which all rows share.

    The predictive density is that of further rows ``x_new``, each a second observation from the
    latents of its row of x. Without them it is that of the rows themselves, **which the guides have
    read**: the density of an exact repetition of the row, by which a posterior that is too narrow
    may come out ahead of the exact one. It is the log of a mean of S likelihoods, below its
    expectation by about half the square of its standard error; where one draw has most of the
    likelihood, the error is no guide either.

    q* is the best of a family, and not the posterior: a shift of 0 says that the encoder loses
    nothing. What the family loses, the approximation gap, is not in it.

    It costs 2 S evaluations for a row, and those of one ELBO of the comparison, which is drawn
    again to see that nothing has changed.

    Args:
        comparison: What `ppvae.compare` returned.
        functions: By name, functions of the latents' draws ``(num_samples, batch, *event)``, by
            site where the model has several, that return ``(num_samples, batch)``. For example
            ``{"tail": lambda z: z[..., 0] > 2}``.
        x_new: Rows, of the shape of the comparison's x and matched to them; the rows themselves if
            left out.
        guide: Which guide, where the comparison has several.
        num_samples: Draws S per row, at least 2.
        seed: Seed of the draws; the caller's generators are left as they were.

    Returns:
        The shifts, guide less q*; print it for their sizes and the worst rows.

    Raises:
        ValueError: If the model or the guide has changed since the comparison, its name is unknown
            or left out where there are several, a function is none, fails or returns another
            shape, or ``x_new`` or ``num_samples`` is unfit.

    Example:
        >>> import torch
        >>> import ppvae
        >>> from ppvae import pairs
        >>> model, guide = pairs.exponential_gaussian()
        >>> comparison = ppvae.compare(model, guide, torch.tensor([0.5, 1.5, 3.0]))
        >>> found = consequences(comparison, {"beyond 2": lambda z: z > 2}, num_samples=100)
        >>> found.dataset["expectation_shift"].dims
        ('data', 'function')
        >>> found.dataset["mean_shift"].sizes["element"]
        1
    """
    name = comparison.guide_name(guide)
    check_count("num_samples", num_samples, least=2)
    functions = _checked_functions(functions)
    model, x = comparison.model, comparison.x
    new = x if x_new is None else x_new
    if x_new is not None:
        check_rows(x_new, model, name="x_new")
        if x_new.shape != x.shape:
            raise ValueError(
                f"x_new: expected a row for each row of the comparison's x, {tuple(x.shape)}; got "
                f"{tuple(x_new.shape)}."
            )
        with judging(seed, x_new, model):
            read_model(model, x_new)
    check_unchanged(comparison, name)
    attrs = comparison.dataset.attrs
    family = (
        str(comparison.dataset["family"].sel(guide=name).item())
        if comparison.several
        else attrs["family"]
    )
    local = comparison.local_fits[family]
    programs: list[Program] = [comparison.guides[name], local.guide]
    with judging(seed, x, model, *programs), torch.no_grad():
        sites = list(check_pair(model, programs[0], x).latents.values())
        variance, error = prior_variances(model, x, sites)
    prior_sd = variance.sqrt()
    prior_error = error / (2 * prior_sd)
    draws = _draw(model, programs, x, new, functions, sites, prior_sd, num_samples, seed)
    dataset = _dataset(draws, sites, list(functions), [name, "per_datapoint"])
    for shift in ("mean_shift", "sd_shift"):
        shared = dataset[shift].values * (prior_error / prior_sd).cpu().numpy()
        dataset[f"{shift}_stderr"].values = np.hypot(dataset[f"{shift}_stderr"].values, shared)
    dataset["prior_sd"] = ("element", prior_sd.cpu().numpy())
    dataset["prior_sd_stderr"] = ("element", prior_error.cpu().numpy())
    if "row" in comparison.dataset.coords:
        dataset = dataset.assign_coords(row=comparison.dataset["row"])
    dataset.attrs = {
        "guide": name,
        "family": family,
        "num_samples": num_samples,
        "predictive_of": "x" if x_new is None else "x_new",
        "not_converged": int((~local.converged).sum()),
        "seed": seed,
    }
    return Consequences(dataset)


def _checked_functions(functions: Mapping[str, Function] | None) -> dict[str, Function]:
    if functions is None:
        return {}
    if not isinstance(functions, Mapping) or not all(map(callable, functions.values())):
        raise ValueError(
            f"functions: expected functions by name, such as {{'square': lambda z: z**2}}; got "
            f"{functions!r}."
        )
    reserved = {"mean_shift", "sd_shift", "predictive_shift"} & set(functions)
    if reserved:
        raise ValueError(
            f"functions: {sorted(reserved)} are names of other figures; choose others."
        )
    return dict(functions)


class _Covariance:
    """Mean and covariance of the entries on the last dimension, from draws that come in parts."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Any = 0.0
        self._outer: Any = 0.0

    def add(self, values: Tensor) -> None:
        """Take draws ``(draws, …, entries)`` in, which lie about 0."""
        self.count += len(values)
        self._sum = self._sum + values.sum(dim=0)
        self._outer = self._outer + torch.einsum("s...i,s...j->...ij", values, values)

    @property
    def mean(self) -> Tensor:
        """``(…, entries)``."""
        return torch.as_tensor(self._sum / self.count)

    def stderr(self, gradient: Tensor) -> Tensor:
        """Standard error of a function of the mean, by its gradient ``(…, entries)``."""
        mean = self.mean
        outer = self._outer / self.count - mean[..., :, None] * mean[..., None, :]
        variance = torch.einsum("...i,...ij,...j->...", gradient, outer, gradient)
        return (variance.clamp(min=0) / (self.count - 1)).sqrt()


@dataclass
class _Draws:
    """What was found: elements in prior sds, and by guide the draws of all else."""

    centre: list[Tensor]
    elements: _Covariance
    functions: list[Tensor]
    log_likelihood: list[Tensor]


def _draw(
    model: Program,
    programs: Sequence[Program],
    x: Tensor,
    new: Tensor,
    functions: Mapping[str, Function],
    sites: Sequence[LatentSite],
    prior_sd: Tensor,
    num_samples: int,
    seed: int,
) -> _Draws:
    centre: list[Tensor] = []
    elements = _Covariance()
    values: list[list[Tensor]] = [[] for _ in programs]
    likelihoods: list[list[Tensor]] = [[] for _ in programs]
    for chunk, size in enumerate(draw_chunks(num_samples, x)):
        columns = []
        for index, program in enumerate(programs):
            # The same seed: what is common to both guides cancels in their difference.
            with judging(seed + 7919 * chunk, x, model, program), torch.no_grad():
                latents, _ = guided(program, x, size)
                parts = [latents[site.name].reshape(size, len(x), -1) for site in sites]
                z = torch.cat(parts, dim=-1).double() / prior_sd
                if chunk == 0:
                    centre.append(z.mean(dim=0))
                z = z - centre[index]
                columns += [z, z.square()]
                values[index].append(_evaluated(functions, latents, size, x))
                likelihoods[index].append(prior_and_likelihood(model, new, latents)[1].double())
        elements.add(torch.stack(columns, dim=-1))
    return _Draws(
        centre, elements, [torch.cat(v) for v in values], [torch.cat(v) for v in likelihoods]
    )


def _evaluated(
    functions: Mapping[str, Function], latents: Mapping[str, Tensor], num_samples: int, x: Tensor
) -> Tensor:
    """``(num_samples, batch, functions)``."""
    given = next(iter(latents.values())) if len(latents) == 1 else dict(latents)
    columns = []
    for name, function in functions.items():
        shapes = {site: tuple(z.shape) for site, z in latents.items()}
        expected = (num_samples, len(x))
        try:
            value = function(given)
        except Exception as error:
            what = "the draws" if len(latents) == 1 else "a dictionary with the draws by site"
            how = "" if len(latents) == 1 else f", as in z[{next(iter(latents))!r}]"
            raise ValueError(
                f"functions[{name!r}] fails on its one argument, {what}{how}, of shapes {shapes}: "
                f"{without_trace(error)}"
            ) from error
        if not isinstance(value, Tensor) or tuple(value.shape) != expected:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"functions[{name!r}]: expected a figure for each draw and row, a tensor of shape "
                f"{expected}, of draws {shapes}; got {got}. Reduce the last dimensions, as in "
                f"z[..., 0] or z.sum(-1)."
            )
        columns.append(value.double())
    if not columns:
        return x.new_zeros((num_samples, len(x), 0), dtype=torch.float64)
    return torch.stack(columns, dim=-1)


def _dataset(
    draws: _Draws, sites: Sequence[LatentSite], functions: list[str], guides: list[str]
) -> xarray.Dataset:
    import xarray

    found: dict[str, Any] = {}

    def put(name: str, dims: tuple[str, ...], value: Tensor, stderr: Tensor) -> None:
        for key, figure in zip(_with_error(name), (value, stderr), strict=True):
            found[key] = (dims, figure.cpu().numpy())

    over = ("data", "element")
    for name, (value, gradient) in {
        "mean_shift": _mean_shift(draws),
        "sd_shift": _sd_shift(draws),
    }.items():
        put(name, over, value, draws.elements.stderr(gradient))
    if functions:
        own, best = draws.functions
        by_guide = torch.stack([own, best])
        put(
            "expectation", ("guide", "data", "function"), by_guide.mean(dim=1), _stderr(by_guide, 1)
        )
        shift = own - best
        put("expectation_shift", ("data", "function"), shift.mean(dim=0), _stderr(shift, 0))
    # Likelihoods relative to their mean: the derivative of the log of the mean.
    log_mean = [torch.logsumexp(part, dim=0) - math.log(len(part)) for part in draws.log_likelihood]
    relative = torch.stack(
        [torch.exp(p - m) for p, m in zip(draws.log_likelihood, log_mean, strict=True)]
    )
    put("predictive", ("guide", "data"), torch.stack(log_mean), _stderr(relative, 1))
    difference = _stderr(relative[0] - relative[1], 0)
    put("predictive_shift", ("data",), log_mean[0] - log_mean[1], difference)
    names = [name for site in sites for name in element_names(site)]
    coords: dict[str, Any] = {"element": names, "guide": guides}
    dataset = xarray.Dataset(found, coords=coords)
    return dataset.assign_coords(function=functions) if functions else dataset


def _stderr(values: Tensor, dim: int) -> Tensor:
    return values.std(dim=dim) / math.sqrt(values.shape[dim])


def _mean_shift(draws: _Draws) -> tuple[Tensor, Tensor]:
    mean = draws.elements.mean
    value = draws.centre[0] - draws.centre[1] + mean[..., 0] - mean[..., 2]
    return value, mean.new_tensor([1.0, 0.0, -1.0, 0.0]).expand(mean.shape)


def _sd_shift(draws: _Draws) -> tuple[Tensor, Tensor]:
    """Difference of the standard deviations, and its gradient in the first two moments of both."""
    own, gradient = _sd(draws.elements.mean[..., :2], draws.elements.count)
    best, other = _sd(draws.elements.mean[..., 2:], draws.elements.count)
    return own - best, torch.cat([gradient, -other], dim=-1)


def _sd(moments: Tensor, count: int) -> tuple[Tensor, Tensor]:
    first, second = moments.unbind(dim=-1)
    sd = ((second - first.square()).clamp(min=0) * (count / (count - 1))).sqrt()
    # Draws that are all the same have no gradient, and no error either.
    inverse = torch.where(sd > 0, 1 / sd, 0.0)
    return sd, torch.stack([-first * inverse, inverse / 2], dim=-1)
