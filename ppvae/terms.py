r"""The seam of training: a pair's log densities with the scales of plates kept apart.

`density` judges rows that it is given and never sees a scale. Training sees them: in
``pyro.plate("data", N, subsample_size=B)`` a row stands for N/B rows. Here each site's log density
is read without its scale, and the scale beside it, so that what is weighed per datum can be
weighed first and scaled afterwards: a scale inside a log-sum-exp is no bound on anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ppvae.density import (
    Program,
    distribution_name,
    is_scaled,
    latent_sites,
    local_frames,
    particles,
    sample_sites,
    without_trace,
)
from ppvae.graphs import capturing


@dataclass(frozen=True)
class Term:
    """The log density of one site.

    Attributes:
        name: The site.
        fn: Its distribution.
        value: What was drawn or observed, with the draws and the rows in front.
        log_prob: ``(num_draws, batch)``, or ``(num_draws, 1)`` for a site that all rows share; in
            nats, masked, not scaled.
        scale: What the plates and handlers around the site multiply it by: a number, or one for
            each row.
        mask: What they mask it with.
        is_observed: Whether it is an observation (a `pyro.factor` counts as one).
        is_auxiliary: Whether it is a draw of the guide's own, which the model does not have.
        is_shared: Whether it lies outside of all plates.
    """

    name: str
    fn: Any
    value: Tensor
    log_prob: Tensor
    scale: float | Tensor
    mask: Any
    is_observed: bool
    is_auxiliary: bool
    is_shared: bool


class _Detached(Messenger):
    """Draws without a path for the gradient; must be entered before whatever records them."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


class Drawn:
    """Draws from a guide, and the log densities of pair and draws.

    Args:
        model: A Pyro model.
        guide: A Pyro guide with the same latent sites.
        args: What both are called with.
        kwargs: What both are called with, by name.
        num_draws: Number of draws K. With one, both programs run as they are; with more, inside a
            plate of the draws at dim −2, so that networks must accept a leading dimension.
        detached: Whether the draws are cut from the parameters they came from.

    Raises:
        ValueError: If the programs do not run with draws in front, or sites and plates are unfit.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        num_draws: int,
        *,
        detached: bool = False,
    ) -> None:
        self.model, self.guide = model, guide
        self.args, self.kwargs = args, dict(kwargs)
        self.num_draws = num_draws
        with _Detached() if detached else nullcontext():
            self.trace = self._run(guide)
        self._check_plates(self.trace)
        self.values = {
            name: site["value"]
            for name, site in sample_sites(self.trace)
            if not site["is_observed"]
        }

    def log_q(self, values: Mapping[str, Tensor] | None = None) -> list[Term]:
        """The guide's terms at its own draws.

        Args:
            values: The same draws with other gradients behind them. For them the guide runs again,
                unless it has one site with a distribution that is the same whatever is drawn.

        Raises:
            ValueError: If the guide gives other densities when it runs again, or a density that
                it has for the draws themselves alone.
        """
        if values is None:
            return self._own_terms
        trace = _replaced(self.trace, values)
        try:
            if len(self.values) == 1 and not self._hangs_on_draws:
                return self._terms(trace, of_guide=True)
            again = self._terms(self._run(poutine.replay(self.guide, trace=trace)), of_guide=True)
        except (KeyError, NotImplementedError) as error:
            raise ValueError(
                f"The guide's density at copies of its draws of {sorted(values)} is not known, as "
                f"with a flow that has no inverse: {error} Use BetaELBO or IWAE, which take it at "
                f"the draws themselves."
            ) from error
        self._check_repeats(again)
        return again

    def log_p(self, values: Mapping[str, Tensor] | None = None) -> list[Term]:
        """The model's terms at the guide's draws, or at other values of the same sites.

        Raises:
            ValueError: If the latent sites are not those of the guide.
        """
        trace = self.trace if values is None else _replaced(self.trace, values)
        run = self._run(poutine.replay(self.model, trace=trace))
        self._check_plates(run)
        self._check_rows(run)
        terms = self._terms(run, of_guide=False)
        self._check_sites(terms)
        return terms

    @cached_property
    def _own_terms(self) -> list[Term]:
        return self._terms(self.trace, of_guide=True)

    @property
    def shared(self) -> list[str]:
        """The guide's sites that all rows share."""
        return [
            name
            for name, site in sample_sites(self.trace)
            if not site["is_observed"] and not local_frames(site)
        ]

    @property
    def _hangs_on_draws(self) -> bool:
        """Whether a factor, or a Delta that carries a density, may be a function of the draw."""
        return any(
            distribution_name(site["fn"]) in ("Unit", "Delta")
            for _, site in sample_sites(self.trace)
        )

    def _run(self, program: Callable[..., Any]) -> Trace:
        if self.num_draws == 1:
            return poutine.trace(program).get_trace(*self.args, **self.kwargs)
        with _leading(self.num_draws), particles(self.num_draws):
            return poutine.trace(program).get_trace(*self.args, **self.kwargs)

    def _terms(self, trace: Trace, *, of_guide: bool) -> list[Term]:
        found = []
        for name, site in sample_sites(trace):
            fn, observed = site["fn"], site["is_observed"]
            if of_guide and observed and distribution_name(fn) != "Unit":
                continue  # A guide that runs the model: its observations are no part of q.
            found.append(
                Term(
                    name=name,
                    fn=fn,
                    value=site["value"],
                    log_prob=self._shaped(name, site, _log_prob(site)),
                    scale=site["scale"],
                    mask=site["mask"],
                    is_observed=observed,
                    is_auxiliary=bool(site["infer"].get("is_auxiliary", False)),
                    is_shared=not local_frames(site),
                )
            )
        return found

    def _shaped(self, name: str, site: dict[str, Any], value: Tensor) -> Tensor:
        """A site's log density, ``(num_draws, batch)``."""
        frames = local_frames(site)
        if any(f.dim != -1 for f in frames) or len(frames) > 1:
            raise ValueError(
                f"Site {name!r}: expected one plate over the rows, at dim=-1; got "
                f"{ {f.name: f.dim for f in frames} }. Declare inner dimensions as event "
                f"dimensions with .to_event."
            )
        shape = (self.num_draws, frames[0].size if frames else 1)
        if value.dim() > 2 or (value.dim() == 2 and value.shape[0] not in (1, self.num_draws)):
            raise ValueError(
                f"Site {name!r}: expected a log density of shape {shape} (draws, batch); got "
                f"{tuple(value.shape)}. Networks must accept leading dimensions of draws: reshape "
                f"only the last dimensions, x.reshape(*x.shape[:-1], ...)."
            )
        return value.expand(shape)

    def _check_plates(self, trace: Trace) -> None:
        """Refuse sites that have a value for each row, and no plate that says so."""
        for name, site in sample_sites(trace):
            shape = tuple(site["fn"].batch_shape)
            if not local_frames(site) and shape and shape[-1] != 1:
                which = "guide" if trace is self.trace else "model"
                raise ValueError(
                    f"Site {name!r} of the {which} lies outside of any plate, but has batch shape "
                    f"{shape}. If that is one for each row, put it into pyro.plate('data', "
                    f"len(x)); if not, declare its dimensions with .to_event, or sum them where it "
                    f"is a factor."
                )

    def _check_repeats(self, again: list[Term]) -> None:
        """Refuse a guide with noise of its own, such as dropout: q is then another each time."""
        if capturing():
            return  # The eager step before has looked.
        for one, other in zip(self._own_terms, again, strict=True):
            before = one.log_prob.detach()
            change = (other.log_prob.detach() - before).abs().mean()
            # Far above rounding, also that of a flow that is inverted.
            if bool(change > 1e-3 * (1 + before.abs().mean())):
                raise ValueError(
                    f"Site {one.name!r}: the guide runs twice, and the second time the log density "
                    f"of the same draws differs by {float(change):.3g} nats. Switch off what is "
                    f"random in it beside its sample sites, such as dropout (guide.eval()), or use "
                    f"BetaELBO or IWAE, for which it runs once."
                )

    def _check_rows(self, of_model: Trace) -> None:
        """Refuse a model that draws other rows of the data than the guide did."""
        for latent, site in sample_sites(of_model):
            frames = () if site["is_observed"] else local_frames(site)
            # Where the guide has the plate, the model has its rows from there.
            for name in (f.name for f in frames if f.name not in self.trace.nodes):
                plate = of_model.nodes[name]["fn"] if name in of_model.nodes else None
                if getattr(plate, "subsample_size", None) not in (None, getattr(plate, "size", 0)):
                    raise ValueError(
                        f"Site {latent!r}: plate {name!r} of the model draws rows of its own, as "
                        f"the guide has no plate of that name: the guide's draws would be for "
                        f"other rows. Give the plates of both one name and one subsample_size."
                    )

    def _check_sites(self, terms: list[Term]) -> None:
        ours = {t.name for t in terms if not t.is_observed}
        theirs = set(latent_sites(self.trace))
        if ours != theirs:
            raise ValueError(
                f"The guide's latent sites must be the model's, {sorted(ours)}; got "
                f"{sorted(theirs)}. Mark a draw of the guide's own with "
                f'infer={{"is_auxiliary": True}}.'
            )


def _log_prob(site: dict[str, Any]) -> Tensor:
    """A site's log density, masked and not scaled."""
    value: Tensor = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
    return value


@contextmanager
def _leading(num_draws: int) -> Iterator[None]:
    """Name the usual cause where a program does not run with several draws."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"A program does not run on {num_draws} draws at once, which are a leading dimension "
            f"of its latents: {without_trace(error)} Networks must accept leading dimensions: "
            f"reshape only the last ones, z.reshape(-1, d) before such a network and "
            f"out.reshape(*z.shape[:-1], -1) after it."
        ) from error


def _replaced(trace: Trace, values: Mapping[str, Tensor]) -> Trace:
    """A copy of a trace with other values at some sites."""
    copy = trace.copy()
    for name, value in values.items():
        copy.nodes[name] = {**copy.nodes[name], "value": value}
    return copy


def check_pathwise(drawn: Drawn, instead: str) -> None:
    """Refuse draws that have no path for the gradient.

    Args:
        drawn: The draws.
        instead: What to use in their case, for the message.

    Raises:
        ValueError: If a site's distribution has no reparameterised draws.
    """
    for name, site in sample_sites(drawn.trace):
        if not site["is_observed"] and not getattr(site["fn"], "has_rsample", False):
            raise ValueError(
                f"Site {name!r}: draws of {distribution_name(site['fn'])} cannot be "
                f"reparameterised, so no gradient goes through them. {instead}"
            )


def check_no_points(drawn: Drawn, instead: str) -> None:
    """Refuse points that are trained, where a gradient goes through log densities alone.

    Args:
        drawn: Draws that are cut from the parameters they came from.
        instead: What to use in their case, for the message.

    Raises:
        ValueError: If a Delta of the guide lies at a point that has a gradient of its own.
    """
    for name, site in sample_sites(drawn.trace):
        if distribution_name(site["fn"]) == "Delta" and site["fn"].mean.requires_grad:
            raise ValueError(
                f"Site {name!r}: the guide puts a Delta at a point that hangs on parameters, as "
                f"AutoDelta does, and log q has no gradient for them there. {instead}"
            )


def check_local(drawn: Drawn, instead: str) -> None:
    """Refuse latents that all rows share, where something is weighed for each datum.

    Args:
        drawn: The draws.
        instead: What to use in their case, for the message.

    Raises:
        ValueError: If a site lies outside of all plates.
    """
    if drawn.shared:
        raise ValueError(
            f"Site {drawn.shared[0]!r} is shared by all rows (it lies outside of any plate), so "
            f"that a datum has no weight of its own. {instead}"
        )


def log_weights(log_p: list[Term], log_q: list[Term]) -> Tensor:
    r"""Log weights without any scale, :math:`\log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n)`.

    Args:
        log_p: The model's terms, all local.
        log_q: The guide's.

    Returns:
        ``(num_draws, batch)``, nats.
    """
    return total(log_p) - total(log_q)


def total(terms: list[Term]) -> Tensor:
    """The sum of the terms, without scales, ``(num_draws, batch)``."""
    value: Tensor | float = 0.0
    for term in terms:
        value = value + term.log_prob
    return torch.as_tensor(value)


def row_scale(*terms: Term) -> float | Tensor:
    """What each row counts for: the scale that all sites of model and guide have.

    Args:
        *terms: Local terms of the model and of the guide.

    Returns:
        A number, or one for each row.

    Raises:
        ValueError: If they differ, or a term is that of all rows, as a row has then no weight of
            its own.
    """
    first = terms[0]
    for term in terms:
        if term.is_shared:
            raise ValueError(
                f"Site {term.name!r} lies outside of any plate: its log density is that of all "
                f"rows together, and no part of the weight of one. Put it inside of the plate over "
                f"the rows, or use BetaELBO, which adds it once."
            )
        if not same_scale(term, first):
            raise ValueError(
                f"Sites weigh differently: {first.name!r} has the scale {_said(first.scale)} and "
                f"{term.name!r} {_said(term.scale)}, so that the weight of a datum, "
                f"p(x, z)/q(z | x), is not defined. Scale all sites of model and guide alike; to "
                f"weigh the KL term, use ppvae.objectives.BetaELBO."
            )
    return first.scale


def same_scale(one: Term, other: Term) -> bool:
    """Whether two terms are scaled alike."""
    if one.scale is other.scale:
        return True
    if isinstance(one.scale, Tensor) or isinstance(other.scale, Tensor):
        return bool((torch.as_tensor(one.scale) == torch.as_tensor(other.scale)).all())
    return one.scale == other.scale


def same_mask(one: Term, other: Term) -> bool:
    """Whether two terms are masked alike."""
    if one.mask is other.mask:
        return True
    if isinstance(one.mask, Tensor) and isinstance(other.mask, Tensor):
        return torch.equal(one.mask, other.mask)
    return False


def _said(scale: float | Tensor) -> str:
    if isinstance(scale, Tensor) and scale.numel() > 1:
        return f"of shape {tuple(scale.shape)}"
    return f"{float(scale):.6g}"


@dataclass(frozen=True)
class PairRun:
    """One run of a guide, and one of the model at its draws, with their gradients.

    Attributes:
        log_p: log p(x, z) over all rows, site by site, at draws that are held: it depends on the
            parameters of the model alone.
        guided: log q(z | x) over all rows, site by site, and the draws.
        parameters: What `pyro.param` gave to either, by its name in the store: the tensors that
            an optimizer changes.
        model_order: The latent sites, in the order in which the model draws them.
        guide_order: The same of the guide.
        listable: The guide's sites whose values can be enumerated.
        marked: Those that somebody marked for it, ``infer={"enumerate": ...}``.
        smooth: Whether all of the guide's draws have a gradient.
        points: The guide's sites that are a transform of another draw, a Delta that carries the
            density of the change of variables.
        scaled: Whether the model scales a log density.
    """

    log_p: tuple[Tensor, ...]
    guided: tuple[Tensor, ...]
    parameters: Mapping[str, Tensor]
    model_order: tuple[str, ...]
    guide_order: tuple[str, ...]
    listable: tuple[str, ...]
    marked: tuple[str, ...]
    smooth: bool
    points: tuple[str, ...]
    scaled: bool


def run_pair(model: Program, guide: Program, x: Tensor) -> PairRun:
    """Run a pair once; it may have latents that all rows share.

    For code that provides the contexts of `ppvae.density.judging` itself, and has checked the pair.
    """
    of_guide = poutine.trace(guide).get_trace(x)
    guided = dict(sample_sites(of_guide))
    own = latent_sites(of_guide)
    held = {name: site["value"].detach() for name, site in own.items()}
    of_model = poutine.trace(poutine.condition(model, data=held)).get_trace(x)
    modelled = dict(sample_sites(of_model))
    # Under `module_local_params` the value of a site is the parameter itself.
    values = {
        name: site["value"]
        for trace in (of_guide, of_model)
        for name, site in trace.nodes.items()
        if site["type"] == "param"
    }
    log_q = [_log_prob(site).sum() for site in guided.values()]
    return PairRun(
        log_p=tuple(_log_prob(site).sum() for site in modelled.values()),
        guided=(*log_q, *(site["value"] for site in own.values())),
        parameters={
            name: v.unconstrained() if hasattr(v, "unconstrained") else v
            for name, v in values.items()
        },
        model_order=tuple(name for name in modelled if name in own),
        guide_order=tuple(own),
        listable=tuple(
            n for n, s in own.items() if getattr(s["fn"], "has_enumerate_support", False)
        ),
        marked=tuple(name for name, site in own.items() if site["infer"].get("enumerate")),
        smooth=all(s["fn"].has_rsample for s in guided.values() if not s["is_observed"]),
        points=tuple(name for name, site in own.items() if _carries_density(site)),
        scaled=any(is_scaled(site) for site in modelled.values()),
    )


def _carries_density(site: dict[str, Any]) -> bool:
    """Whether a site is a Delta whose log density at its point is not 0."""
    if distribution_name(site["fn"]) != "Delta":
        return False
    return bool((site["fn"].log_prob(site["value"]) != 0).any())
