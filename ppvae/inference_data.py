r"""Results as ArviZ's DataTree: draws, densities and data, with names for every dimension."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from ppvae.density import (
    Program,
    check_count,
    check_pair,
    distribution_name,
    draw_chunks,
    guided,
    judging,
    predicted,
    prior_draws,
    sample_sites,
    site_densities,
    unobserved,
)
from ppvae.diagnostics import pareto_k, pareto_k_threshold
from ppvae.files import DrawsFile
from ppvae.isolation import check_rows, forked_rng
from ppvae.ledger import Comparison
from ppvae.local import LocalFit
from ppvae.training import Fit

if TYPE_CHECKING:
    import xarray

_PREDICTIVE = ("prior_predictive", "posterior_predictive")
_VALUES = ("posterior", "prior", *_PREDICTIVE)
_DRAWN = (*_VALUES, "log_likelihood", "sample_stats")
GROUPS = (*_DRAWN, "observed_data", "constant_data")
"""The groups that `to_datatree` can make, by ArviZ's names."""

# What is said of each draw and each row; all in nats.
_DENSITIES = {
    "log_joint": "log p(x, z)",
    "log_guide": "log q(z | x)",
    "log_weight": "log p(x, z) - log q(z | x)",
}
_OF_LOCAL_FIT = ("converged", "steps", "elbo", "elbo_stderr", "predicted_gain", "restart_gain")

# Elements that are held before they are written: 64 MB in float32.
_HELD = 16_000_000
# Rows whose weights are smoothed together, in several copies in double precision.
_ROWS = 500

_Arrays = Mapping[str, Mapping[str, np.ndarray]]
"""By group and variable."""


@overload
def to_datatree(
    model: Comparison,
    guide: None = None,
    x: None = None,
    *,
    num_samples: int = ...,
    groups: Sequence[str] | None = ...,
    constant_data: Mapping[str, Any] | None = ...,
    dims: Mapping[str, Sequence[str]] | None = ...,
    coords: Mapping[str, Any] | None = ...,
    sample_dims: Sequence[str] = ...,
    path: str | os.PathLike[str] | None = ...,
    seed: int = ...,
) -> xarray.DataTree: ...


@overload
def to_datatree(
    model: Program,
    guide: Program | LocalFit,
    x: Tensor,
    *,
    num_samples: int = ...,
    groups: Sequence[str] | None = ...,
    fit: Fit | None = ...,
    constant_data: Mapping[str, Any] | None = ...,
    dims: Mapping[str, Sequence[str]] | None = ...,
    coords: Mapping[str, Any] | None = ...,
    sample_dims: Sequence[str] = ...,
    path: str | os.PathLike[str] | None = ...,
    seed: int = ...,
) -> xarray.DataTree: ...


def to_datatree(
    model: Program | Comparison,
    guide: Program | LocalFit | None = None,
    x: Tensor | None = None,
    *,
    num_samples: int = 500,
    groups: Sequence[str] | None = None,
    fit: Fit | None = None,
    constant_data: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    sample_dims: Sequence[str] = ("sample",),
    path: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> xarray.DataTree:
    r"""What a pair, a per-datapoint fit or a comparison says, for ArviZ.

    The draws :math:`z_{sn} \sim q(\cdot \mid x_n)` are those of the guide, as it is. What they
    weigh as draws from the posterior is beside them, so that ArviZ's PSIS works on each row:

    - ``posterior``: the latent sites. ``prior``: as many draws of p(z).
    - ``posterior_predictive``, ``prior_predictive``: rows drawn from p(x given z) for them.
    - ``log_likelihood``: log p(x_n given z_sn) of each observed site, nats.
    - ``sample_stats``: ``log_joint`` log p(x_n, z_sn), ``log_guide`` log q(z_sn given x_n) and
      ``log_weight``, their difference, nats; ``pareto_k`` of the weights of each row, NaN with
      fewer than 25 draws. Of a `LocalFit` also which rows ``converged``, in how many ``steps``,
      and their ``elbo``.
    - ``observed_data``; ``constant_data``: what is given as such, and the rows, as ``rows``, where
      the model observes something else.

    Dimensions are the draws, then the model's plate, then those of the event.

    Of a `Comparison` the tree has one such tree for each guide, ``tree["amortized"]`` and
    ``tree["per_datapoint"]`` or the names given, from common random numbers; each can be passed to
    ArviZ as it is. The ledger is in ``tree["comparison"]``.

    Args:
        model: A Pyro model with one local plate over the rows; or a `Comparison`, without ``guide``
            and ``x``.
        guide: A Pyro guide with the same latent sites, or what `fit_per_datapoint` gave for these
            rows.
        x: Rows, ``(batch, *event)``.
        num_samples: Draws per row.
        groups: Which of `GROUPS` are made; all if left out, but for predictive ones of a model
            with a ``pyro.factor``, which nothing can be drawn from. Naming those needed saves the
            time and the memory of the others: those of ``posterior_predictive`` are
            ``num_samples`` times those of the data.
        fit: How the pair was trained: its losses go to a group ``training``.
        constant_data: Arrays by name, such as covariates or labels; one whose first dimension is
            as long as the rows is taken to be over them.
        dims: Names of the event dimensions by site (or by name in ``constant_data``), such as
            ``{"z": ["factor"]}``; ``"z_dim_0"`` and so on if left out.
        coords: Values along any dimension by its name, such as ``{"data": labels}``.
        sample_dims: Names of the dimensions of the draws. ArviZ's own convention for variational
            fits is one, ``"sample"``; its ``loo`` and some of its plots (``plot_ppc_dist``,
            ``plot_prior_posterior``) want ``("chain", "draw")``, which gives one chain.
        path: Write to this file, ``.nc`` for netCDF or ``.zarr`` for Zarr (which needs the extra
            ``ppvae[zarr]``), some draws at a time, and open it: values are then read as they are
            asked for. In memory there are ``log_weight`` and some 64 MB of draws. Close the tree
            when done.
        seed: Seed of the draws; the caller's generators are left as they were. A group's draws do
            not hang on which other groups are made, nor on ``path``.

    Returns:
        The tree, with its settings in its attributes.

    Raises:
        ValueError: If the rows, the model or the guide are unfit (see
            `ppvae.density.check_pair`); a group, a dimension's name or a coordinate's length does
            not fit; or the path exists or is of no known kind.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> model, guide = pairs.factor_analysis(x_dim=6, z_dim=3)
        >>> x = torch.zeros(4, 6)
        >>> tree = to_datatree(model, guide, x, num_samples=10, dims={"z": ["factor"]})
        >>> dict(tree["posterior"].sizes)
        {'sample': 10, 'data': 4, 'factor': 3}
        >>> tree["sample_stats"]["log_weight"].dims
        ('sample', 'data')
    """
    program, entries, x = _entries(model, guide, x, fit)
    check_rows(x, program, *(entry.guide for entry in entries.values()))
    check_count("num_samples", num_samples)
    file = None if path is None else DrawsFile.at(Path(path))
    names = _Names(tuple(sample_dims), dict(dims or {}), dict(coords or {}))
    constants = {name: _as_array(value) for name, value in (constant_data or {}).items()}
    sources = {
        name: _Source(program, entry, x, num_samples, groups, constants, names, seed)
        for name, entry in entries.items()
    }
    further = {}
    if isinstance(model, Comparison):
        plate = next(iter(sources.values())).plate
        further["comparison"] = _ledger(model, names.coords.get(plate))
    if fit is not None:
        further["training"] = _training(fit)
    return _in_memory(sources, further) if file is None else _written(sources, further, file)


# --- What is asked for ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A guide, and what is known of each row beside its draws."""

    guide: Program
    of_rows: Mapping[str, Tensor] = field(default_factory=dict)


def _entries(
    model: Program | Comparison, guide: Program | LocalFit | None, x: Tensor | None, fit: Fit | None
) -> tuple[Program, dict[str, _Entry], Tensor]:
    """The model, the guides by the name of their part of the tree, and the rows."""
    if isinstance(model, Comparison):
        if guide is not None or x is not None or fit is not None:
            raise ValueError(
                "to_datatree: a comparison has its model, guides and rows: pass it alone, or pass "
                "a model, a guide and x."
            )
        fits = iter(model.local_fits.values())
        guides = model.dataset["guide"].values.tolist()
        _check_distinct("guide", guides)
        entries = {
            _flat(name): _Entry(model.guides[name])
            if name in model.guides
            else _of_local_fit(next(fits))
            for name in guides
        }
        if "comparison" in entries:
            raise ValueError("guide: the name 'comparison' is kept for the ledger; choose another.")
        return model.model, entries, model.x
    if guide is None or x is None:
        raise ValueError(
            f"{'guide' if guide is None else 'x'}: got none; expected to_datatree(model, guide, x) "
            f"or to_datatree(comparison)."
        )
    return model, {"": _of_local_fit(guide) if isinstance(guide, LocalFit) else _Entry(guide)}, x


def _of_local_fit(local: LocalFit) -> _Entry:
    return _Entry(local.guide, {name: getattr(local, name) for name in _OF_LOCAL_FIT})


def _as_array(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)


def _flat(name: str) -> str:
    """A name without what netCDF, Zarr and trees take for a folder."""
    return name.replace("/", ".")


def _check_distinct(what: str, names: Sequence[str]) -> None:
    """Refuse names that become one, of which the last alone would be left."""
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(_flat(name), name)
        if other != name:
            raise ValueError(
                f"{what}: {other!r} and {name!r} are both written as {_flat(name)!r}; rename one."
            )


def _described(program: Program) -> str:
    """A program in one line."""
    text = repr(program)
    if "\n" in text or " at 0x" in text:
        return str(getattr(program, "__name__", type(program).__name__))
    return text


# --- Names ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Names:
    """The names of dimensions, and what stands along them."""

    sample: tuple[str, ...]
    dims: Mapping[str, Sequence[str]]
    coords: Mapping[str, Any]

    def event(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """Names of the event dimensions of a variable."""
        return list(self.dims.get(name) or [f"{_flat(name)}_dim_{i}" for i in range(len(shape))])

    def check(self, plate: str, rows: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse names that do not fit.

        Args:
            plate: Name of the dimension of the rows.
            rows: Their number.
            shapes: Event shape of each site and constant.
        """
        if len(self.sample) not in (1, 2) or len({*self.sample, plate}) <= len(self.sample):
            raise ValueError(
                f'sample_dims: expected ("sample",) or ("chain", "draw"), one name or two, other '
                f"than that of the model's plate, {plate!r}; got {self.sample}."
            )
        for name, event in self.dims.items():
            if isinstance(event, str) or name not in shapes:
                raise ValueError(
                    f"dims: expected a list of names for some of {list(shapes)}; got "
                    f"{name!r}: {event!r}."
                )
            if len(event) != len(shapes[name]):
                raise ValueError(
                    f"dims: {name!r} has event shape {shapes[name]}, draws and rows apart, and "
                    f"takes {len(shapes[name])} names; got {list(event)}."
                )
        sizes = {plate: rows}
        for name, shape in shapes.items():
            for dim, size in zip(self.event(name, shape), shape, strict=True):
                if dim in self.sample or sizes.setdefault(dim, size) != size:
                    there = "for the draws" if dim in self.sample else f"{sizes[dim]} long"
                    raise ValueError(
                        f"dims: {dim!r} of {name!r}, whose event shape is {shape}, is {there} "
                        f"elsewhere; choose another name."
                    )
        for name in shapes:
            if _flat(name) in {*self.sample, *sizes}:
                raise ValueError(
                    f"{name!r} is the name of a dimension and of a variable, which would be taken "
                    f"for what stands along it: choose another in dims, sample_dims or "
                    f"constant_data, or rename the site or its plate. Labels go to coords."
                )
        for dim, values in self.coords.items():
            if dim not in sizes:
                raise ValueError(f"coords: expected some of {list(sizes)}; got {dim!r}.")
            if len(values) != sizes[dim]:
                raise ValueError(
                    f"coords: expected {sizes[dim]} values along {dim!r}; got {len(values)}."
                )

    def dataset(
        self,
        variables: Mapping[str, np.ndarray],
        dims: Mapping[str, list[str]],
        sample: Mapping[str, np.ndarray],
    ) -> xarray.Dataset:
        """Arrays under their names.

        Args:
            variables: The arrays by name.
            dims: Names of the dimensions of each but for those of the draws.
            sample: What stands along the dimensions of the draws, which come first.
        """
        from arviz_base import dict_to_dataset

        return dict_to_dataset(
            {_flat(name): value for name, value in variables.items()},
            sample_dims=list(sample),
            dims={_flat(name): own for name, own in dims.items()},
            coords={**self.coords, **sample},
        )


# --- What one guide gives ------------------------------------------------------------------------


class _Source:
    """The draws of one guide, portion by portion, and what goes with them."""

    def __init__(
        self,
        model: Program,
        entry: _Entry,
        x: Tensor,
        num_samples: int,
        groups: Sequence[str] | None,
        constants: Mapping[str, np.ndarray],
        names: _Names,
        seed: int,
    ) -> None:
        self._model, self._entry, self._x = model, entry, x
        self._num_samples, self._names, self._seed = num_samples, names, seed
        with judging(seed, x, model, entry.guide), torch.no_grad():
            self._sites = check_pair(model, entry.guide, x)
            trace = poutine.trace(model).get_trace(x)
        observed = {n: site for n, site in sample_sites(trace) if site["is_observed"]}
        factors = [n for n, site in observed.items() if distribution_name(site["fn"]) == "Unit"]
        self._groups = _wanted(groups, factors)
        self._likelihoods = list(observed)
        seen = {n: site["value"] for n, site in observed.items() if n not in factors}
        discrete = {n for n, site in observed.items() if _is_discrete(site["fn"])}
        self._discrete = discrete | {n for n, z in self._sites.latents.items() if z.is_discrete}
        self._observed = {n: _as_array(self._counted(n, value)) for n, value in seen.items()}
        self._constants = dict(constants)
        told = {n: v.shape[1:] if self._has_rows(v) else v.shape for n, v in constants.items()}
        self._factors = factors
        self._weights = torch.empty(0)
        shapes = {site.name: site.event_shape for site in self._sites.latents.values()}
        shapes |= {n: value.shape[1:] for n, value in self._observed.items()}
        known = any(_same(value, x) for value in seen.values())
        if not known and "rows" not in {*told, *shapes}:
            self._constants["rows"], told["rows"] = _as_array(x), tuple(x.shape[1:])
        _check_distinct("Sites", [*shapes, *factors])
        _check_distinct("constant_data", list(told))
        for name in told.keys() & shapes.keys():
            if told[name] != shapes[name]:
                raise ValueError(
                    f"constant_data: {name!r} has event shape {told[name]}, and the model's site "
                    f"of that name {shapes[name]}; choose another name."
                )
        self._shapes = shapes = shapes | told
        names.check(self.plate, len(x), shapes)

    @property
    def plate(self) -> str:
        """Name of the dimension of the rows."""
        return _flat(self._sites.plate)

    @property
    def settings(self) -> dict[str, Any]:
        """How the draws were made."""
        return {
            "inference_library": "ppvae",
            "inference_library_version": version("ppvae"),
            "model": _described(self._model),
            "guide": _described(self._entry.guide),
            "num_samples": self._num_samples,
            "seed": self._seed,
        }

    def _has_rows(self, value: np.ndarray) -> bool:
        return value.ndim > 0 and len(value) == len(self._x)

    def portions(self, elements: float) -> Iterator[tuple[int, int, _Arrays]]:
        """The number of the first draw, how many there are, and they by group and variable.

        Args:
            elements: How many may be held, at least; a portion is overwritten by the next.
        """
        if not set(self._groups) & set(_DRAWN):
            return
        start = filled = 0
        axis = len(self._names.sample) - 1
        room: dict[str, dict[str, np.ndarray]] = {}
        for drawn in self._drawn():
            count = _count(drawn, axis)
            if not room:
                # All room at once: small arrays that stay, between large ones that do not, leave
                # the heap with holes, and the process with gigabytes.
                size = sum(v.size for variables in drawn.values() for v in variables.values())
                most = min(
                    self._num_samples,
                    count * max(1, math.ceil(min(elements / size, self._num_samples))),
                )
                room = {
                    group: {
                        name: np.empty((*v.shape[:axis], most, *v.shape[axis + 1 :]), v.dtype)
                        for name, v in variables.items()
                    }
                    for group, variables in drawn.items()
                }
            slots = self.slots(filled, count)
            for group, variables in drawn.items():
                for name, value in variables.items():
                    room[group][name][slots] = value
            filled += count
            if filled == _count(room, axis) or start + filled == self._num_samples:
                full = self.slots(0, filled)
                yield (
                    start,
                    filled,
                    {g: {n: v[full] for n, v in vs.items()} for g, vs in room.items()},
                )
                start, filled = start + filled, 0

    def _drawn(self) -> Iterator[_Arrays]:
        """As many draws at a time as one evaluation of the pair has room for."""
        model, x, groups = self._model, self._x, set(self._groups)
        sizes = draw_chunks(self._num_samples, x)
        generator = torch.Generator().manual_seed(self._seed)
        seeds = torch.randint(2**31, (len(sizes), 2), generator=generator).tolist()
        lead = (None,) * (len(self._names.sample) - 1)
        start = 0
        with judging(self._seed, x, model, self._entry.guide), torch.no_grad():
            for size, (one, other) in zip(sizes, seeds, strict=True):
                latents, log_q = guided(self._entry.guide, x, size)
                drawn: dict[str, Mapping[str, Tensor]] = {"posterior": latents}
                if groups & {"log_likelihood", "sample_stats"}:
                    drawn |= self._densities(latents, log_q)
                    if start == 0:
                        self._weights = log_q.new_empty(self._num_samples, len(x))
                    self._weights[start : start + size] = drawn["sample_stats"]["log_weight"]
                    start += size
                if "posterior_predictive" in groups:
                    with forked_rng(one, x.device):
                        drawn["posterior_predictive"] = predicted(model, x, latents)
                if groups & {"prior", "prior_predictive"}:
                    with forked_rng(other, x.device):
                        drawn |= self._prior(size)
                yield {
                    group: {
                        name: _as_array(self._counted(name, v) if group in _VALUES else v)[lead]
                        for name, v in drawn[group].items()
                    }
                    for group in self._groups
                    if group in drawn
                }

    def _counted(self, name: str, value: Tensor) -> Tensor:
        """Values of a discrete site as whole numbers, which ArviZ's pictures of counts want."""
        return value.long() if name in self._discrete else value

    def _densities(
        self, latents: Mapping[str, Tensor], log_q: Tensor
    ) -> dict[str, Mapping[str, Tensor]]:
        terms = site_densities(self._model, self._x, latents)
        log_p = sum(terms.values(), torch.zeros_like(log_q))
        stats = dict(zip(_DENSITIES, (log_p, log_q, log_p - log_q), strict=True))
        return {"log_likelihood": {n: terms[n] for n in self._likelihoods}, "sample_stats": stats}

    def _prior(self, size: int) -> dict[str, Mapping[str, Tensor]]:
        # In both cases, so that the latents do not hang on whether rows are wanted.
        model = self._model if self._factors else unobserved(self._model)
        values = prior_draws(model, self._x, size)
        latents = {name: values[name] for name in self._sites.latents}
        rest = {name: value for name, value in values.items() if name not in latents}
        return {"prior": latents, "prior_predictive": rest}

    def slots(self, start: int, count: int) -> tuple[slice, ...]:
        """Where some draws belong, along the dimensions of the draws."""
        return (slice(None),) * (len(self._names.sample) - 1) + (slice(start, start + count),)

    def datasets(self, arrays: _Arrays, start: int) -> dict[str, xarray.Dataset]:
        """Draws as data sets, by group.

        Args:
            arrays: As from `portions`.
            start: Number of the first draw.
        """
        found = {}
        *chain, last = self._names.sample
        for group, variables in arrays.items():
            count = _count({group: variables}, len(chain))
            sample = {name: np.arange(1) for name in chain}
            sample[last] = np.arange(start, start + count)
            per_row = group in ("log_likelihood", "sample_stats")
            dims = {n: self._dims(n, rows=True, event=not per_row) for n in variables}
            found[group] = self._names.dataset(variables, dims, sample)
        for name, text in _DENSITIES.items() if "sample_stats" in found else ():
            found["sample_stats"][name].attrs = {"long_name": text, "units": "nats"}
        for value in found["log_likelihood"].values() if "log_likelihood" in found else ():
            value.attrs = {"long_name": "log p(x | z)", "units": "nats"}
        return found

    def _dims(self, name: str, *, rows: bool, event: bool = True) -> list[str]:
        own = self._names.event(name, self._shapes[name]) if event else []
        return [self.plate, *own] if rows else own

    def fixed(self) -> dict[str, xarray.Dataset]:
        """What has no draws, by group; once all of `portions` has been taken."""
        found = {}
        for group, variables in (
            ("observed_data", self._observed),
            ("constant_data", self._constants),
        ):
            if group in self._groups and variables:
                dims = {n: self._dims(n, rows=self._has_rows(v)) for n, v in variables.items()}
                found[group] = self._names.dataset(variables, dims, {})
        if "sample_stats" in self._groups:
            k = self._weights.new_full((len(self._x),), math.nan)
            if self._num_samples > 1:
                k = torch.cat([pareto_k(some) for some in self._weights.split(_ROWS, dim=1)])
            of_rows = {"pareto_k": k, **self._entry.of_rows}
            variables = {name: _as_array(value) for name, value in of_rows.items()}
            dims = {name: [self.plate] for name in variables}
            found["sample_stats"] = stats = self._names.dataset(variables, dims, {})
            if self._num_samples > 1:
                stats["pareto_k"].attrs["threshold"] = pareto_k_threshold(self._num_samples)
        return found


def _count(arrays: _Arrays, axis: int) -> int:
    """Number of draws."""
    return next(iter(next(iter(arrays.values())).values())).shape[axis]


def _wanted(groups: Sequence[str] | None, factors: Sequence[str]) -> list[str]:
    """The groups to make, in the order of `GROUPS`.

    Args:
        groups: Those asked for.
        factors: Sites of the model that nothing can be drawn from.
    """
    if groups is None:
        return [group for group in GROUPS if not (factors and group in _PREDICTIVE)]
    unknown = [group for group in groups if group not in GROUPS]
    if isinstance(groups, str) or unknown or not groups:
        raise ValueError(f"groups: expected a list of some of {list(GROUPS)}; got {groups!r}.")
    drawn = [group for group in _PREDICTIVE if group in groups]
    if factors and drawn:
        raise ValueError(
            f"Site {factors[0]!r}: nothing can be drawn from a pyro.factor, so that there is no "
            f"{drawn[0]}. Leave {drawn} out of groups, or write what the factor stands for as a "
            f"distribution with obs=."
        )
    return [group for group in GROUPS if group in groups]


def _ledger(comparison: Comparison, rows: Any) -> xarray.Dataset:
    """The figures of a comparison, with what the reader wants along the rows, if anything."""
    return comparison.dataset if rows is None else comparison.dataset.assign_coords(data=rows)


def _is_discrete(fn: Any) -> bool:
    return bool(getattr(getattr(fn, "support", None), "is_discrete", False))


def _same(value: Tensor, x: Tensor) -> bool:
    return value.numel() == x.numel() and torch.equal(value.reshape(x.shape).to(x.dtype), x)


def _training(fit: Fit) -> xarray.Dataset:
    import xarray

    return xarray.Dataset(
        {
            "loss": ("step", _as_array(fit.losses), {"units": "nats per datum"}),
            "elapsed": ("step", _as_array(fit.elapsed), {"units": "s"}),
        },
        coords={"step": np.arange(len(fit.losses))},
        attrs={"status": fit.status, "batch_size": fit.batch_size, "seconds": fit.seconds},
    )


# --- Where it goes -------------------------------------------------------------------------------


def _in_memory(
    sources: Mapping[str, _Source], further: Mapping[str, xarray.Dataset]
) -> xarray.DataTree:
    import xarray

    nodes: dict[str, xarray.Dataset] = {}
    for name, source in sources.items():
        found = {}
        for start, _, arrays in source.portions(math.inf):
            found = source.datasets(arrays, start)
        for group, fixed in source.fixed().items():
            found[group] = found[group].assign(fixed.variables) if group in found else fixed
        nodes[name] = xarray.Dataset(attrs=source.settings)
        nodes |= {_inside(name, group): dataset for group, dataset in found.items()}
    return xarray.DataTree.from_dict({**nodes, **further})


def _inside(name: str, group: str) -> str:
    """The path of a group; the name of the only guide is empty."""
    return f"{name}/{group}" if name else group


def _written(
    sources: Mapping[str, _Source], further: Mapping[str, xarray.Dataset], file: DrawsFile
) -> xarray.DataTree:
    import xarray

    with file.in_place() as partial:
        for name, source in sources.items():
            partial.put(name, xarray.Dataset(attrs=source.settings))
            for start, count, arrays in source.portions(_HELD):
                for group, dataset in source.datasets(arrays, start).items():
                    partial.append(_inside(name, group), dataset, source.slots(start, count))
            for group, dataset in source.fixed().items():
                partial.put(_inside(name, group), dataset)
        for name, dataset in further.items():
            partial.put(name, dataset)
    return file.open()
