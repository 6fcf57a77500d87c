r"""The seam between Pyro and everything that judges a fit.

This module alone reads Pyro traces. It turns a model and a guide, written as any Pyro functions
with one local plate, into tensors in nats:

.. math:: \log w_{sn} = \log p(x_n, z_{sn}) - \log q(z_{sn} \mid x_n),
          \qquad z_{sn} \sim q(\cdot \mid x_n)

of shape ``(num_samples, batch)``. Plate scales (``subsample_size``, ``poutine.scale``) never
enter: a scale inside a log-sum-exp is no bound on anything. Masks do enter.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.overrides import TorchFunctionMode

from ppvae import factorized
from ppvae.graphs import Repeated, capturing
from ppvae.isolation import check_rows, evaluation_mode, forked_rng, private_store, unvalidated

Program = Callable[..., Any]
"""A Pyro model or guide, a function or module that is called with the rows ``x``."""

_PARTICLES = "ppvae.particles"

# Elements of the largest tensor that one evaluation may make: 16 MB in float32. The layers of
# a network are taken to be no wider than a row, or than a few hundred units.
_ELEMENTS = 4_000_000

# Bytes of the largest tensor that one evaluation of a model makes where draws are worked off in
# portions: `ChunkedJoint`. Half a dozen of that size are held at once. On a CPU larger ones leave
# the cache, and from some 16 MB on the allocator returns their memory at every operation, which
# doubles the time; a GPU is kept busy by larger ones alone.
_CHUNK_BYTES = {"cpu": 6_400_000, "cuda": 256_000_000}


class NoLikelihoodError(ValueError):
    """A model that has no log p(x) to be conditioned on: it draws rows, or only maps them.

    A model raises it when it is called with rows. The message begins with "no likelihood:" and
    says what works instead; every function that needs a density passes it on as it is.
    """


@dataclass(frozen=True)
class LatentSite:
    """What the model says of one local latent variable.

    Attributes:
        name: The site's name.
        event_shape: Shape of the variable of one datum.
        support: torch's constraint on its values.
        family: Name of its prior's distribution, for messages.
    """

    name: str
    event_shape: tuple[int, ...]
    support: Any
    family: str

    @property
    def is_discrete(self) -> bool:
        """Whether the variable's values are discrete."""
        return bool(getattr(self.support, "is_discrete", False))

    @property
    def size(self) -> int:
        """Number of elements of the variable of one datum."""
        return int(torch.Size(self.event_shape).numel())


@dataclass(frozen=True)
class ModelSites:
    """What was read off one run of a model.

    Attributes:
        plate: Name of the local plate.
        latents: The local latent sites, in the order of the model.
        scaled: Sites whose log density the model scales; here the scales are left out.
    """

    plate: str
    latents: Mapping[str, LatentSite]
    scaled: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of latent elements of one datum, over all sites."""
        return sum(site.size for site in self.latents.values())


def support_name(support: Any) -> str:
    """A word for a constraint: two sites match if their words do.

    Closed and open half-lines are one support here, as they differ by a set of measure zero.

    Example:
        >>> import pyro.distributions as dist
        >>> support_name(dist.Exponential(1.0).support), support_name(dist.LogNormal(0, 1).support)
        ('positive', 'positive')
    """
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support in (constraints.real, constraints.real_vector):
        return "real"
    lower = getattr(support, "lower_bound", None)
    upper = getattr(support, "upper_bound", None)
    if lower is not None and upper is None and bool((torch.as_tensor(lower) == 0).all()):
        return "positive"
    if any(isinstance(bound, Tensor) and bound.dim() for bound in (lower, upper)):
        return f"{type(support).__name__} with bounds of its own for each row"
    return str(support).removesuffix("()")


def sample_sites(trace: Trace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The random variables of a trace by name: no plates' indices, no deterministic values."""
    for name, site in prune_subsample_sites(trace).nodes.items():
        if site["type"] == "sample" and not site["infer"].get("_deterministic", False):
            yield name, site


def latent_sites(trace: Trace) -> dict[str, dict[str, Any]]:
    """The latent variables of a guide's trace: draws of the guide's own are left out."""
    return {
        name: site
        for name, site in sample_sites(trace)
        if not site["is_observed"] and not site["infer"].get("is_auxiliary", False)
    }


def local_frames(site: dict[str, Any]) -> list[Any]:
    """The plates that a site is in, that of the draws apart."""
    return [f for f in site["cond_indep_stack"] if f.vectorized and f.name != _PARTICLES]


def is_scaled(site: dict[str, Any]) -> bool:
    """Whether plates or handlers scale a site's log density; a scale may differ between rows."""
    return bool((torch.as_tensor(site["scale"]) != 1).any())


def distribution_name(fn: Any) -> str:
    """The name of a distribution without what is wrapped around it."""
    while hasattr(fn, "base_dist") and type(fn).__name__ in (
        "Independent",
        "ExpandedDistribution",
        "MaskedDistribution",
    ):
        fn = fn.base_dist
    return type(fn).__name__


def read_model(model: Program, x: Tensor) -> ModelSites:
    """Run the model once and read its plate and its latent sites.

    Args:
        model: A Pyro model that is called as ``model(x)``.
        x: Rows, ``(batch, *event)``.

    Returns:
        The plate's name and the latent sites.

    Raises:
        ValueError: If the model has no plate, several plates, a global latent or a global
            observation (named), no latent site, no observation, a plate of another size than
            ``x`` has rows, or an observation outside of its support.
    """
    trace = _plain_run("model", model, x)
    plates: dict[str, Any] = {}
    latents: dict[str, LatentSite] = {}
    scaled: list[str] = []
    observed = 0
    for name, site in sample_sites(trace):
        kind = "observation" if site["is_observed"] else "latent"
        frames = local_frames(site)
        if not frames:
            raise _shared_by_all(name, kind)
        plates.update({f.name: f for f in frames})
        if is_scaled(site):
            scaled.append(name)
        if site["is_observed"]:
            observed += 1
            _check_observed(name, site)
        else:
            event = tuple(site["fn"].event_shape)
            latents[name] = LatentSite(
                name, event, site["fn"].support, distribution_name(site["fn"])
            )
    if not latents or not observed:
        missing = "latent site (pyro.sample without obs)" if not latents else "site with obs=x"
        raise ValueError(
            f"The model has no {missing} in a plate; got sites "
            f"{[name for name, _ in sample_sites(trace)]}. Is the guide in the model's place?"
        )
    if len(plates) > 1 or any(f.dim != -1 for f in plates.values()):
        raise ValueError(
            f"Expected one plate over the rows, at dim=-1; got "
            f"{ {f.name: f.dim for f in plates.values()} }. Declare inner dimensions as event "
            f"dimensions with .to_event."
        )
    (plate,) = plates.values()
    if plate.size != x.shape[0]:
        raise ValueError(
            f"Plate {plate.name!r} has {plate.size} rows but x has shape {tuple(x.shape)}. "
            f"Size the plate by the rows that the model is given, "
            f'pyro.plate({plate.name!r}, len(x), dim=-1); for a model that subsamples, pass "'
            f'subsample=" or the rows alone.'
        )
    return ModelSites(plate.name, latents, tuple(scaled))


def _shared_by_all(name: str, kind: str) -> ValueError:
    inside = 'put it inside pyro.plate("data", len(x), dim=-1)'
    if kind == "observation":
        return ValueError(
            f"Site {name!r}: an observation outside of any plate is shared by all rows, so that "
            f"log p(x_n) is not defined per row: {inside}."
        )
    return ValueError(
        f"Site {name!r}: a latent outside of any plate is shared by all rows, as the weights of "
        f"a Bayesian neural network are. log p(x_n) is then not defined per row, and there is "
        f"nothing to amortize: one posterior serves all rows. Train such a pair with ppvae.fit or "
        f"pyro.infer.SVI, whose loss is its figure of merit. To judge what is local, hold the "
        f"site at a value: make it a parameter of the model (pyro.param), or use model.at(weights) "
        f"where the model has it (BayesianNeuralNetwork with latent_dim >= 1). If {name!r} belongs "
        f"to a row, {inside}."
    )


def shared_latents(model: Program, x: Tensor) -> tuple[str, ...]:
    """The names of the latent sites that all rows share, those outside of any plate.

    For code that provides the contexts of `judging` itself; no random number of theirs is used up.
    """
    with forked_rng(0, x.device):
        trace = _plain_run("model", model, x)
    return tuple(
        name
        for name, site in sample_sites(trace)
        if not site["is_observed"] and not local_frames(site)
    )


def check_shared_pair(model: Program, guide: Program, x: Tensor, num_data: int | None) -> int:
    """Refuse a pair with shared latents whose loss is not that of all data; give their number.

    With N data and a minibatch of B rows, what is local must weigh N/B and what is shared 1, in
    the model and in the guide: then the loss is an unbiased estimate of that of all data.

    For code that provides the contexts of `judging` itself.

    Args:
        model: A model with a latent site outside of any plate.
        guide: A guide with the same latent sites.
        x: Rows, ``(batch, *event)``, a minibatch as training uses it.
        num_data: Number of data N, `None` where it is not known.

    Returns:
        N.

    Raises:
        ValueError: If the sites of model and guide differ in name, shape or weight, a site has a
            plate of another size than ``x`` has rows, nothing is observed, an observation lies
            outside of its support, or the weights are not those of ``num_data`` data.
    """
    of_model = dict(sample_sites(_plain_run("model", model, x)))
    latents = {name: site for name, site in of_model.items() if not site["is_observed"]}
    observed = {name: site for name, site in of_model.items() if site["is_observed"]}
    if not observed:
        raise ValueError(
            f"The model has no site with obs=x; got sites {list(of_model)}. Is the guide in the "
            f"model's place?"
        )
    for name, site in of_model.items():
        frames = local_frames(site)
        if not frames and site["is_observed"]:
            raise _shared_by_all(name, "observation")
        if frames and ([f.dim for f in frames] != [-1] or frames[0].size != len(x)):
            raise ValueError(
                f"Site {name!r}: expected one plate over the {len(x)} rows, at dim=-1; got "
                f"{ {f.name: (f.size, f.dim) for f in frames} }, size and dim of each."
            )
        if site["is_observed"]:
            _check_observed(name, site)
    guided = latent_sites(_plain_run("guide", guide, x))
    if set(guided) != set(latents):
        raise ValueError(
            f"The guide's latent sites must be the model's, {list(latents)}; got {list(guided)}."
        )
    for name, site in guided.items():
        ours, theirs = tuple(site["value"].shape), tuple(latents[name]["value"].shape)
        if ours != theirs:
            raise ValueError(
                f"Site {name!r}: expected latent shape {theirs} as in the model; got {ours} from "
                f"the guide."
            )
    weights = {name: _one_scale(name, site) for name, site in of_model.items()}
    unequal = {
        name: (weights[name], _one_scale(name, site))
        for name, site in guided.items()
        if _one_scale(name, site) != weights[name]
    }
    if unequal:
        raise ValueError(
            f"Sites weigh differently in model and guide: {unequal} (model, guide). Give both the "
            f"same plates, pyro.plate(..., size=N, subsample=...), or both the same num_data=N."
        )
    shared = [name for name in latents if not local_frames(of_model[name])]
    counts = {round(weights[name] * len(x)) for name in of_model if name not in shared}
    total = max(counts)
    if len(counts) > 1 or any(weights[n] != 1 for n in shared) or num_data not in (None, total):
        expected = "N/B" if num_data is None else f"{num_data}/{len(x)}"
        raise ValueError(
            f"All rows share the latents {shared} of the model. In a minibatch what is local must "
            f"then weigh {expected} and what is shared 1, so that the prior counts once for all "
            f"data; the weights of the sites are {weights}. Tell the model the number of data, "
            f"num_data={num_data} (in your own: pyro.plate('data', N, subsample=...)); or train "
            f"on all rows at once, batch_size={num_data}."
        )
    return total


def _one_scale(name: str, site: dict[str, Any]) -> float:
    scale = torch.as_tensor(site["scale"])
    if not bool((scale == scale.flatten()[0]).all()):
        raise ValueError(
            f"Site {name!r}: its scale, of shape {tuple(scale.shape)}, differs between rows, where "
            f"the rows of a model with latents that all share have to weigh N/B each."
        )
    return float(scale.flatten()[0])


def _plain_run(kind: str, program: Program, x: Tensor) -> Trace:
    """Run a program once as its author would, with an error that says what was run."""
    try:
        with torch.no_grad():
            return poutine.trace(program).get_trace(x)
    except NoLikelihoodError as error:
        raise NoLikelihoodError(without_trace(error)) from None
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"The {kind} does not run on x of shape {tuple(x.shape)}, {x.dtype}: "
            f"{without_trace(error)}"
        ) from error


@contextmanager
def _with_draws(shape: torch.Size) -> Iterator[None]:
    """Name the usual cause where a program runs on rows but not on draws of them."""
    try:
        yield
    except NoLikelihoodError as error:
        raise NoLikelihoodError(without_trace(error)) from None
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"A program that runs on rows does not run on draws for rows, where latents have the "
            f"leading dimensions {tuple(shape)}: {without_trace(error)} Networks must accept "
            f"leading dimensions: reshape only the last ones, z.reshape(-1, d) before such a "
            f"network and out.reshape(*z.shape[:-1], -1) after it."
        ) from error


def without_trace(error: Exception) -> str:
    """The message without the trace shapes that Pyro appends."""
    text = str(error).split("Trace Shapes:")[0].strip()
    return text if text.endswith(".") else text + "."


def _check_observed(name: str, site: dict[str, Any]) -> None:
    fn = site["fn"]
    if distribution_name(fn) in ("Delta", "Unit") or not hasattr(fn, "support"):
        return
    expected = (*fn.batch_shape, *fn.event_shape)
    if tuple(site["value"].shape) != expected:
        raise ValueError(
            f"Site {name!r}: expected observed rows of shape {expected}, batch and event; got "
            f"{tuple(site['value'].shape)}, which broadcasting would repeat. A single datum needs "
            f"its batch dimension: x[None]."
        )
    inside = fn.support.check(site["value"])
    if not bool(inside.all()):
        raise ValueError(
            f"Site {name!r}: {int((~inside).sum())} of {inside.numel()} observed rows lie outside "
            f"of the support of {distribution_name(fn)} ({support_name(fn.support)}). Transform "
            f"the data (binarise, scale or round it), or choose a likelihood that covers it."
        )


def check_pair(model: Program, guide: Program, x: Tensor) -> ModelSites:
    """Read the model, and refuse a guide whose latent sites are not the model's.

    Raises:
        ValueError: As `read_model`; and if the guide lacks a site, has one that the model does
            not know (auxiliary sites aside), or one of another event shape or outside the plate.
    """
    sites = read_model(model, x)
    trace = _plain_run("guide", guide, x)
    guided = latent_sites(trace)
    missing = [name for name in sites.latents if name not in guided]
    extra = [name for name in guided if name not in sites.latents]
    if missing or extra:
        raise ValueError(
            f"The guide's latent sites must be the model's, {list(sites.latents)}; got "
            f"{list(guided)} (missing: {missing}, extra: {extra}). Rename or add sites, or mark "
            f'a helper site with infer={{"is_auxiliary": True}}.'
        )
    for name, site in sample_sites(trace):
        batch = tuple(site["fn"].batch_shape)
        if len(batch) == 1 and batch != (x.shape[0],) and batch[0] > 1:
            raise ValueError(
                f"Site {name!r} of the guide has {batch[0]} rows but x has {x.shape[0]}: a guide "
                f"that keeps parameters for each datum, as AutoNormal does, describes only the "
                f"rows that it was made for."
            )
        if batch != (x.shape[0],):
            raise ValueError(
                f"Site {name!r} of the guide: expected a draw for each row, batch shape "
                f"({x.shape[0]},); got {batch}, so that q(z_n | x_n) is "
                f"not defined per row (AutoDiagonalNormal and AutoMultivariateNormal are such "
                f"guides). Use AutoNormal, or ppvae.guides.PerDatapoint with a family."
            )
    points = [n for n, site in guided.items() if distribution_name(site["fn"]) == "Delta"]
    if points:
        with forked_rng(1, x.device):
            again = _plain_run("guide", guide, x)
        for name in points:
            if torch.equal(again.nodes[name]["value"], guided[name]["value"]):
                raise ValueError(
                    f"Site {name!r}: the guide puts all its mass on a point (a Delta), as "
                    f"AutoDelta and map_estimate do. A point has no density over z, hence no "
                    f"ELBO. Use a guide with a density, such as AutoNormal."
                )
    for name, site in guided.items():
        event = tuple(site["value"].shape[1:])
        if event != sites.latents[name].event_shape:
            raise ValueError(
                f"Site {name!r}: expected latent shape "
                f"{(x.shape[0], *sites.latents[name].event_shape)} as in the model; got "
                f"{tuple(site['value'].shape)} from the guide. Match the guide's sizes and its "
                f".to_event to the model's."
            )
    return sites


@dataclass(frozen=True)
class GuideSite:
    """What one latent site of a guide was drawn from.

    Guides such as `AutoNormal` and `EasyGuide` draw an auxiliary variable and put a Delta at a
    transform of it, or of a part of it: then ``fn`` is the auxiliary variable's distribution.

    Attributes:
        name: The site's name.
        fn: The distribution.
        value: The draw, ``(batch, *event)``.
        mask: The mask on its log density, `None` if there is none.
        part: Which elements of the auxiliary variable of a datum the site has; `None` where the
            site was drawn from ``fn`` itself.
        transform: From that part to the site's values.
    """

    name: str
    fn: Any
    value: Tensor
    mask: Any = None
    part: slice | None = None
    transform: Any = None


def read_guide(
    guide: Program, x: Tensor, sites: ModelSites | None = None
) -> tuple[str, dict[str, GuideSite]]:
    """Run a guide once; give its plate's name and what each latent site was drawn from.

    Args:
        guide: A Pyro guide.
        x: Rows.
        sites: What is known of the model, whose supports say how a Delta came about.
    """
    trace = poutine.trace(guide).get_trace(x)
    auxiliary, found, plate = [], {}, "data"
    for name, site in sample_sites(trace):
        if site["is_observed"]:
            continue
        if site["infer"].get("is_auxiliary", False):
            auxiliary.append(site)
            continue
        found[name] = GuideSite(name, site["fn"], site["value"], site["mask"])
        if distribution_name(site["fn"]) == "Delta" and sites is not None:
            found[name] = _behind_a_delta(found[name], sites.latents[name], auxiliary)
        plate = next((f.name for f in local_frames(site)), plate)
    return plate, found


def _behind_a_delta(
    site: GuideSite, latent: LatentSite, auxiliary: list[dict[str, Any]]
) -> GuideSite:
    """The auxiliary draw that a Delta is a transform of; the site as it is if there is none."""
    if latent.is_discrete:
        return site
    transform = to_unconstrained(latent)
    # Of the value's shape: bounds may differ between rows.
    shape = torch.Size(transform.inverse_shape(site.value.shape)[1:])
    count, rows = shape.numel(), site.value.shape[0]
    for other in auxiliary:
        if tuple(other["fn"].batch_shape) != (rows,):
            continue
        flat = other["value"].reshape(rows, -1)
        for at in range(flat.shape[1] - count + 1):
            part = slice(at, at + count)
            # Draws are continuous: only their own transform is equal to them.
            if torch.equal(transform(flat[:, part].reshape(rows, *shape)), site.value):
                return GuideSite(site.name, other["fn"], site.value, other["mask"], part, transform)
    return site


def _site_log_prob(site: dict[str, Any], *, observed: bool) -> Tensor:
    """Unscaled log density of a site, −inf where a latent value lies outside of the support."""
    fn, value = site["fn"], site["value"]
    log_prob = factorized.log_prob(fn, value) if observed else log_density(fn, value)
    return scale_and_mask(log_prob, 1.0, site["mask"])


def log_density(fn: Any, value: Tensor) -> Tensor:
    """The log density of a distribution, −inf where a value lies outside of its support."""
    if not hasattr(fn, "support") or _is_everywhere(fn.support):
        return factorized.log_prob(fn, value)
    inside = fn.support.check(value)
    if not capturing() and bool(inside.all()):
        return factorized.log_prob(fn, value)
    where = inside.reshape(inside.shape + (1,) * (value.dim() - inside.dim()))
    safe = torch.where(where, value, _anywhere_inside(fn, value))
    return factorized.log_prob(fn, safe).masked_fill(~inside, -torch.inf)


def _is_everywhere(support: Any) -> bool:
    """Whether a support holds all real numbers, so that there is nothing to check."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def _anywhere_inside(fn: Any, value: Tensor) -> Tensor:
    """A value, broadcast to the shape of ``value``, at which the density can be evaluated.

    Nothing is drawn for it: a graph, which evaluates it always, uses up no random numbers then.
    """
    if bool(getattr(fn.support, "is_discrete", False)):
        return torch.zeros_like(value)
    try:
        transform = biject_to(fn.support)
    except NotImplementedError:
        if capturing():
            raise
        return torch.as_tensor(fn.sample()).expand_as(value)
    return transform(value.new_zeros(transform.inverse_shape(value.shape))).expand_as(value)


def _sum_sites(
    trace: Trace,
    shape: torch.Size,
    given: Mapping[str, Tensor] | None,
    counts: Callable[[str], bool] = lambda name: True,
) -> Tensor:
    total: Tensor | float = 0.0
    for name, site in sample_sites(trace):
        if not counts(name):
            continue
        if given is None and site["is_observed"] and distribution_name(site["fn"]) != "Unit":
            # `AutoNormalMessenger` runs the model, whose observations are no part of q; a
            # pyro.factor of the guide is.
            continue
        latent = name in given if given is not None else True
        term = _site_log_prob(site, observed=not latent)
        if term.dim() > len(shape) or (term.dim() and term.shape[-1] != shape[-1]):
            raise ValueError(
                f"Site {name!r}: expected a log density of shape {tuple(shape)} (draws, batch); "
                f"got {tuple(term.shape)}. Networks must accept leading dimensions of draws: "
                f"reshape only the last dimensions, x.reshape(*x.shape[:-1], ...)."
            )
        total = total + term
    if not isinstance(total, Tensor):
        raise ValueError("The program has no sample site.")
    return total.expand(shape)


def particles(num_samples: int) -> Any:
    """The plate of the draws, at dim=-2."""
    return pyro.plate(_PARTICLES, num_samples, dim=-2)


@dataclass(frozen=True)
class Held:
    """A model with some of its latent sites held at one value for all rows and draws.

    Attributes:
        model: A Pyro model.
        values: By site, ``event_shape``.
    """

    model: Program
    values: Mapping[str, Tensor]

    def __call__(self, x: Tensor) -> Any:
        """Run the model with the values for every row."""
        rows = {name: v.expand(len(x), *v.shape) for name, v in self.values.items()}
        return poutine.condition(self.model, data=rows)(x)


def joint(model: Program, x: Tensor, latents: Mapping[str, Tensor]) -> Tensor:
    """`log_joint` without its checks and contexts, for code that calls it in a loop.

    Pyro's validation is off inside: one row whose draws overflow must not end a study of many,
    and `read_model` has checked the program before.

    Args:
        model: A Pyro model.
        x: Rows.
        latents: By site, draws of shape ``(num_samples, batch, *event)``.

    Returns:
        ``(num_samples, batch)``, differentiable.
    """
    first = next(iter(latents.values()))
    if isinstance(model, Held):
        # Of the draws' shape, as models may join them to what was drawn.
        shape = first.shape[:2]
        values = {name: v.expand(*shape, *v.shape) for name, v in model.values.items()}
        return joint(model.model, x, {**values, **latents})
    conditioned = poutine.condition(model, data=dict(latents))
    with unvalidated(), _with_draws(first.shape[:2]), particles(first.shape[0]):
        trace = poutine.trace(conditioned).get_trace(x)
        return _sum_sites(trace, first.shape[:2], latents)


def site_densities(model: Program, x: Tensor, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The terms of `joint` by site, latent and observed, each ``(num_samples, batch)``."""
    shape = next(iter(latents.values())).shape[:2]
    conditioned = poutine.condition(model, data=dict(latents))
    with unvalidated(), _with_draws(shape), particles(shape[0]):
        trace = poutine.trace(conditioned).get_trace(x)
        return {
            site: _sum_sites(trace, shape, latents, partial(operator.eq, site))
            for site, _ in sample_sites(trace)
        }


def prior_and_likelihood(
    model: Program, x: Tensor, latents: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The two terms of `joint`: log p(z), and log p(x given z), each ``(num_samples, batch)``."""
    terms = site_densities(model, x, latents)
    prior = [term for name, term in terms.items() if name in latents]
    likelihood = [term for name, term in terms.items() if name not in latents]
    return sum(prior[1:], prior[0]), sum(likelihood[1:], likelihood[0])


def log_guide(guide: Program, x: Tensor, latents: Mapping[str, Tensor]) -> Tensor:
    """A guide's log density of values that it may not have drawn, ``(num_samples, batch)``.

    For guides without auxiliary draws, whose density of the latents alone is not known.
    """
    shape = next(iter(latents.values())).shape[:2]
    conditioned = poutine.condition(guide, data=dict(latents))
    with unvalidated(), _with_draws(shape), particles(shape[0]):
        trace = poutine.trace(conditioned).get_trace(x)
        factors = {n for n, s in sample_sites(trace) if distribution_name(s["fn"]) == "Unit"}
        return _sum_sites(trace, shape, latents, lambda name: name in latents or name in factors)


def weigh(
    model: Program, guide: Program, x: Tensor, num_samples: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """`log_weights` without its checks and contexts; gives the draws of the latent sites too."""
    latents, log_q = guided(guide, x, num_samples)
    return joint(model, x, latents) - log_q, latents


def bytes_of_largest(function: Callable[[], Any]) -> int:
    """Bytes of the largest tensor that a call makes, views left out."""
    with _Largest() as largest:
        function()
    return largest.bytes


def guided(guide: Program, x: Tensor, num_samples: int) -> tuple[dict[str, Tensor], Tensor]:
    """Draws of the latent sites, and their log density ``(num_samples, batch)``."""
    shape = torch.Size((num_samples, x.shape[0]))
    with unvalidated(), _with_draws(shape):
        with particles(num_samples):
            trace = poutine.trace(guide).get_trace(x)
        log_q = _sum_sites(trace, shape, None)
    latents = {}
    for name, site in latent_sites(trace).items():
        value, event = site["value"], site["fn"].event_shape
        latents[name] = value.expand(num_samples, x.shape[0], *event)
    return latents, log_q


class _Largest(TorchFunctionMode):
    """Notes the bytes of the largest tensor that is made inside, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
            memory = out.untyped_storage()
            if memory.data_ptr() not in given:
                self.bytes = max(self.bytes, memory.nbytes())
        return out


class ChunkedJoint:
    """`joint` for many draws, in portions that stay within a budget of memory and in the cache.

    The size of a portion follows from the largest tensor that the model makes for one draw of all
    rows. Where that one is beyond the budget itself, portions of the rows are taken, if the model
    is seen to give the same for them. The same portions come again and again: they are run as a
    graph where that pays, see `ppvae.graphs.Repeated`.

    For code that provides the contexts of `judging` itself, without gradients.

    Args:
        model: A Pyro model.
        x: Rows.
        draws: One draw or more of the latent sites, ``(num_samples, batch, *event)`` by site, of
            the kind that it will be called with.
        num_samples: How many draws will come in all.
    """

    def __init__(
        self, model: Program, x: Tensor, draws: Mapping[str, Tensor], num_samples: int
    ) -> None:
        self._model, self._x, self._names = model, x, list(draws)
        first = {name: z[:1] for name, z in draws.items()}
        with forked_rng(0, x.device), _Largest() as largest:
            whole = joint(model, x, first)
        budget = chunk_bytes(x)
        self.draws = max(1, budget // largest.bytes)
        pieces = min(len(x), -(-largest.bytes // budget))
        self.rows = self._row_portions(first, whole, -(-len(x) // pieces))
        calls = -(-num_samples // self.draws) * len(self.rows)
        self._evaluate = Repeated(self._portion, calls)

    def _row_portions(
        self, first: Mapping[str, Tensor], whole: Tensor, most: int
    ) -> list[slice | None]:
        """Portions of the rows; `None` for all, where a model has to have them together."""
        if most >= len(self._x):
            return [None]
        portions = [slice(i, i + most) for i in range(0, len(self._x), most)]
        try:
            with forked_rng(0, self._x.device):
                parts = [
                    joint(self._model, self._x[rows], {n: z[:, rows] for n, z in first.items()})
                    for rows in portions
                ]
        except (RuntimeError, ValueError, IndexError):
            return [None]
        return [None] if bool(_far(whole, torch.cat(parts, dim=1)).any()) else [*portions]

    def _portion(self, x: Tensor, *values: Tensor) -> list[Tensor]:
        return [joint(self._model, x, dict(zip(self._names, values, strict=True)))]

    def __call__(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Log joint densities ``(num_samples, batch)`` of draws of all latent sites."""
        count = len(next(iter(latents.values())))
        parts = []
        for start in range(0, count, self.draws):
            values = [latents[name][start : start + self.draws] for name in self._names]
            across = [
                self._evaluate(self._x, *values)[0]
                if rows is None
                else self._evaluate(self._x[rows], *(v[:, rows] for v in values))[0]
                for rows in self.rows
            ]
            parts.append(across[0] if len(across) == 1 else torch.cat(across, dim=1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def weighed(model: Program, guide: Program, x: Tensor, num_samples: int) -> Iterator[Tensor]:
    """`log_weights` without its checks and contexts, some draws at a time.

    Yields:
        ``(draws, batch)``; the draws add up to ``num_samples``. However many these are, memory is
        that of a few evaluations of the pair, within a budget.
    """
    small = num_samples * len(x) * max(64, x[0].numel()) * x.element_size()
    if small <= chunk_bytes(x):
        yield weigh(model, guide, x, num_samples)[0]
        return
    with forked_rng(0, x.device), _Largest() as largest:
        some, _ = guided(guide, x, 2)
    density = ChunkedJoint(model, x, some, num_samples)
    del some
    # Draws of a guide are small beside what the model makes of them: its networks run seldom.
    budget = max(4 * _ELEMENTS, chunk_bytes(x))
    most = max(
        1, min(max(draw_chunks(num_samples, x)[0], density.draws), 2 * budget // largest.bytes)
    )
    if most > density.draws:
        most -= most % density.draws
    for start in range(0, num_samples, most):
        latents, log_q = guided(guide, x, min(most, num_samples - start))
        yield density(latents) - log_q


def prior_draws(model: Program, x: Tensor, num_samples: int) -> dict[str, Tensor]:
    """Draws of the model's latent sites, by site ``(num_samples, batch, *event)``.

    For code that provides the contexts of `judging` itself.
    """
    shape = torch.Size((num_samples, x.shape[0]))
    with unvalidated(), _with_draws(shape), particles(num_samples):
        trace = poutine.trace(model).get_trace(x)
    return {
        name: site["value"].expand(*shape, *site["fn"].event_shape)
        for name, site in sample_sites(trace)
        if not site["is_observed"]
    }


class _Unobserved(UnconditionMessenger):
    """Pyro's handler but for deterministic sites, which it would draw in a wrong shape.

    Their event is all of their value unless their author says otherwise, plates and draws included.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic", False):
            super()._pyro_sample(msg)


def unobserved(model: Program) -> Program:
    """The model without its observations: it draws what it would observe."""
    return _Unobserved()(model)


def predicted(model: Program, x: Tensor, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Draws of the observed sites given draws of the latents, ``(num_samples, batch, *event)``.

    For code that provides the contexts of `judging` itself.
    """
    shape = next(iter(latents.values())).shape[:2]
    unseen = poutine.condition(unobserved(model), data=dict(latents))
    with unvalidated(), _with_draws(shape), particles(shape[0]):
        trace = poutine.trace(unseen).get_trace(x)
    return {
        name: site["value"].expand(*shape, *site["fn"].event_shape)
        for name, site in sample_sites(trace)
        if name not in latents
    }


def check_density(model: Program, x: Tensor, sites: ModelSites) -> None:
    """Refuse a model whose log p(x_n, z_n) is no function of x_n and z_n alone.

    For code that provides the contexts of `judging` itself.

    Raises:
        ValueError: If the density is random given its arguments, or that of a row changes with
            the other rows.
    """
    latents = {name: z for name, z in prior_draws(model, x, 2).items() if name in sites.latents}
    value = joint(model, x, latents)
    if _far(value, joint(model, x, latents)).any():
        raise ValueError(
            "model: its log density of the same x and z is another one at each call, in eval mode "
            "too, so that no two guides meet the same model. Dropout that ignores eval mode, and "
            "a binarisation that is drawn inside of the model, are the usual causes: binarise x "
            "once, before."
        )
    count = len(x)
    rows = torch.arange(count, device=x.device)
    half = rows[: (count + 1) // 2]
    # Other company, another place, and fewer rows: the engine evaluates any rows in any order.
    for index in (torch.cat([half, rows[: count - len(half)]]), rows.flip(0), half):
        part = {name: z[:, index] for name, z in latents.items()}
        try:
            again = joint(model, x[index], part)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"model: it runs on {count} rows but not on {len(index)} of them, as q* takes: "
                f"{without_trace(error)} Size its plate and all that it holds by the rows that "
                f"it is given."
            ) from error
        far = _far(value[:, index], again).any(dim=0)
        if bool(far.any()):
            raise ValueError(
                f"model: its log density of row {int(index[far.nonzero()[0]])} changes with the "
                f"other rows or with its place among them, so that log p(x_n) is not defined per "
                f"row. Batch norm without running statistics, layers that mix rows, and values "
                f"that are kept outside of x for each row are the usual causes; put the latter "
                f"into the columns of x."
            )


def _far(one: Tensor, other: Tensor) -> Tensor:
    """Where two log densities differ by more than rounding."""
    both = torch.isfinite(one) & torch.isfinite(other)
    far = (one - other).abs() > 1e-3 * one.abs().clamp(min=1.0)
    return (far & both) | (torch.isfinite(one) != torch.isfinite(other))


@contextmanager
def judging(seed: int, x: Tensor, *modules: Any) -> Iterator[None]:
    """The context in which a fit is judged.

    Private parameter store, seeded and restored generators, eval mode, frozen parameters.
    """
    with private_store(), forked_rng(seed, x.device), evaluation_mode(*modules):
        yield


def log_joint(model: Program, x: Tensor, latents: Mapping[str, Tensor] | Tensor) -> Tensor:
    r"""Log joint density :math:`\log p(x_n, z_{sn})` per draw and row, in nats.

    Args:
        model: A Pyro model with one local plate, called as ``model(x)``.
        x: Rows, ``(batch, *event)``.
        latents: Values of the latent sites, ``(num_samples, batch, *event)`` or
            ``(batch, *event)``, by site name; a bare tensor for a model with one latent site.

    Returns:
        ``(num_samples, batch)`` or ``(batch,)``; −inf where a latent value lies outside of its
        prior's support. Differentiable in the latents and in the model's parameters.

    Raises:
        ValueError: If the rows or the model are unfit (see `read_model`), or if a site is
            missing, unknown or of another shape.

    Example:
        >>> import torch
        >>> from ppvae.models import ExponentialGaussian
        >>> log_joint(ExponentialGaussian(), torch.tensor([1.0]), torch.tensor([0.5]))
        tensor([-1.5439])
    """
    check_rows(x, model)
    with private_store(), forked_rng(0, x.device):
        sites = read_model(model, x)
    given = {next(iter(sites.latents)): latents} if isinstance(latents, Tensor) else dict(latents)
    if set(given) != set(sites.latents):
        raise ValueError(
            f"Expected values of the latent sites {list(sites.latents)}; got {list(given)}."
        )
    drawn = False
    for name, value in given.items():
        expected = (x.shape[0], *sites.latents[name].event_shape)
        drawn = value.dim() == len(expected) + 1
        if tuple(value.shape[-len(expected) :]) != expected or value.dim() > len(expected) + 1:
            raise ValueError(
                f"Site {name!r}: expected latent shape {expected}, or (num_samples, ...) before "
                f"it; got {tuple(value.shape)}."
            )
    with private_store():
        if drawn:
            return joint(model, x, given)
        return joint(model, x, {name: value[None] for name, value in given.items()})[0]


def log_weights(
    model: Program, guide: Program, x: Tensor, num_samples: int = 64, *, seed: int = 0
) -> Tensor:
    r"""Log importance weights, the one tensor from which every figure of a fit is read.

    .. math:: \log w_{sn} = \log p(x_n, z_{sn}) - \log q(z_{sn} \mid x_n)

    Their mean over draws is the ELBO, the log of the mean weight is the importance-weighted
    evidence (Burda et al. 2015, eq. 8); with the exact posterior as guide all are log p(x_n).

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guide: A Pyro guide with the same latent sites, called as ``guide(x)``.
        x: Rows, ``(batch, *event)``.
        num_samples: Draws per row.
        seed: Seed of the draws. The same seed gives the same draws; the caller's generators are
            left as they were.

    Returns:
        ``(num_samples, batch)`` in nats, without gradient. −inf where a draw lies outside of the
        prior's support.

    Raises:
        ValueError: If the rows, the model or the guide are unfit; see `check_pair`.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> model, guide = pairs.exponential_gaussian()
        >>> log_weights(model, guide, torch.tensor([0.5, 1.5, 3.0]), num_samples=8).shape
        torch.Size([8, 3])
    """
    check_rows(x, model, guide)
    check_count("num_samples", num_samples)
    with judging(seed, x, model, guide), torch.no_grad():
        check_pair(model, guide, x)
        return torch.cat(list(weighed(model, guide, x, num_samples)))


def check_count(name: str, value: int, least: int = 1) -> None:
    """Refuse a count below ``least``."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}.")


def chunk_bytes(x: Tensor) -> int:
    """Bytes that the largest tensor of one evaluation may take on the device of the rows."""
    return _CHUNK_BYTES.get(x.device.type, _CHUNK_BYTES["cpu"])


def draw_chunks(num_samples: int, x: Tensor) -> list[int]:
    """Split draws so that the largest tensor of one evaluation stays within the memory budget."""
    most = max(1, _ELEMENTS // (len(x) * max(64, x[0].numel())))
    full, rest = divmod(num_samples, most)
    return [most] * full + ([rest] if rest else [])


def row_chunks(x: Tensor, draws: int) -> list[slice]:
    """Split rows so that ``draws`` draws for each stay within the memory budget."""
    most = max(1, 4 * _ELEMENTS // (draws * max(256, x[0].numel())))
    return [slice(i, min(i + most, len(x))) for i in range(0, len(x), most)]


def to_unconstrained(site: LatentSite) -> Any:
    """The transform from the reals onto the site's support.

    Raises:
        ValueError: If the support is discrete or unknown to torch.
    """
    if site.is_discrete:
        raise ValueError(
            f"Site {site.name!r} ({site.family}) is discrete, so it has no density on the reals."
        )
    try:
        return biject_to(site.support)
    except NotImplementedError:
        raise ValueError(
            f"Site {site.name!r} ({site.family}): torch knows no map from the reals to its "
            f"support {site.support}."
        ) from None
