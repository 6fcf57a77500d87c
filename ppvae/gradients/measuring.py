"""Taking draws of the gradient from each estimator in turn."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
)
from torch import Tensor

from ppvae.configurations import num_configurations
from ppvae.density import (
    ModelSites,
    Program,
    check_count,
    check_pair,
    check_shared_pair,
    shared_latents,
)
from ppvae.gradients.bench import Bench, target_of
from ppvae.gradients.moments import Moments, block_sizes, median, statistics
from ppvae.gradients.result import PROGRAMS, GradientVariance
from ppvae.isolation import (
    check_rows,
    evaluation_mode,
    forked_rng,
    private_store,
)
from ppvae.objectives import BetaELBO, ScoreFunctionELBO, StickingTheLanding
from ppvae.progress import Bar, progress_bar
from ppvae.terms import PairRun, run_pair
from ppvae.training import without_warnings

if TYPE_CHECKING:
    import xarray

_LEAST_DRAWS = 8
# Values of all discrete latents together, up to which summing over them is tried unasked.
_MOST_LISTED = 256
_COMPILED = (JitTrace_ELBO, JitTraceMeanField_ELBO, JitTraceGraph_ELBO, JitTraceEnum_ELBO)
# Letters of a reason, after which no further sentence begins.
_REASON = 240


def default_estimators(run: PairRun, sites: ModelSites | None) -> list[ELBO]:
    """The estimators that are measured if none are named: all of the ELBO.

    Args:
        run: A run of the pair.
        sites: The model's latent sites; `None` where all rows share some.
    """
    found: list[ELBO] = [Trace_ELBO(), BetaELBO()]
    if run.smooth:
        found.append(StickingTheLanding())
    if sites is None:
        return found
    found += [ScoreFunctionELBO(), ScoreFunctionELBO(4)]
    if not run.smooth:
        found.append(TraceGraph_ELBO())
    if run.listable and num_configurations(sites) <= _MOST_LISTED:
        found.append(TraceEnum_ELBO(max_plate_nesting=1))
    return found


def gradient_variance(
    model: Program,
    guide: Program,
    x: Tensor,
    *,
    estimators: Sequence[ELBO] | Mapping[str, ELBO] | None = None,
    num_draws: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> GradientVariance:
    r"""Measure the variance, the signal-to-noise ratio and the cost of gradient estimators.

    A draw is one call of an estimator's ``loss_and_grads(model, guide, x)``. Its gradient g is
    that of the objective, which is maximised: minus the loss, divided by the number of rows (of
    all data N, for a model with latents that all rows share), in nats per unit of the parameter.
    Of the D draws of the gradient :math:`g \in R^P` of a group of parameters

    .. math::
        v = \operatorname{tr} \operatorname{Cov} g
          = \frac{1}{D - 1} \sum_d \lVert g_d - \bar g \rVert^2, \qquad
        \lVert E g \rVert^2 \approx \lVert \bar g \rVert^2 - v / D, \qquad
        \mathrm{SNR} = \lVert E g \rVert / \sqrt{v}

    the first two without bias. As steps are paid for in time, and averaging c draws divides the
    variance by c, estimators of one gradient compare by variance × cost. Standard errors are
    those of a jackknife that leaves out one of up to 32 blocks of draws at a time (Busing, Meijer
    & van der Leeden 1999), and the delta method's. A score function's gradient may have tails so
    heavy that the variance itself is poorly known; the error says so only roughly, as the rare
    large draws that it should count may not have come. Raise ``num_draws`` and see.

    Only the noise of the latents is measured: the rows are the same for all draws, and modules are
    in eval mode. Draw d of every estimator starts from the same seed and from the estimator as it
    was given, so that schedules and moving averages stand still. The estimators take turns,
    and a cost is the median over draws of the ratio to the time of the first estimator that
    applies; what a machine does beside it slows both.

    A draw of an estimator with K particles is a mean over K. On small networks several cost little
    more than one, whatever the estimator: one with more particles than the others may be the
    lowest for that alone. Give all as many, ``num_particles=K``, to compare how they work.

    Variances compare only between estimators of one ``target``: estimators of other bounds
    estimate other gradients. Of Pyro's own, `RenyiELBO` weighs each row by itself where all sites
    lie in the plate over the rows, and all rows at once where latents are shared by all rows; of
    draws without a gradient it estimates, with a bias, the gradient of the bound of infinitely
    many draws, which of α = 0 is log p(x) and does not depend on the guide.
    `ReweightedWakeSleep` weighs all rows at once, and what it follows is the gradient of no one
    function. An estimator of your own may have a property ``target``; else it is its
    class's name.

    The groups of parameters are those that log p(x, z) depends on at given z, ``"model"``; those
    that q depends on, ``"guide"``; those of both, such as the encoder of a `VampPrior`,
    ``"shared"``; and each tensor by itself, ``"guide.encoder.layers.0.weight"`` or its name in
    Pyro's parameter store. Frozen parameters are left out, and so is what neither p nor q depends
    on, such as a baseline, whose gradient is another loss's.

    An estimator that does not apply is no error: ``refused`` says why. `TraceEnum_ELBO` is given
    ``config_enumerate(guide)`` where the guide has discrete sites and none is marked.

    Memory: 34 times the parameters for each estimator.

    Args:
        model: A Pyro model, called as ``model(x)``; see `ppvae.fit`.
        guide: A Pyro guide, called as ``guide(x)``. `PerDatapoint` guides need all their rows.
        x: Rows, ``(batch, *event)``.
        estimators: Objectives, by name or in a sequence, where a name is that of the class, with
            the number of particles, as ``RenyiELBO(K=2)``, if there are several. If left out
            those of the ELBO: `Trace_ELBO`, `BetaELBO`, the score function with one and with four
            draws and, where they apply, `StickingTheLanding`, `TraceGraph_ELBO` and
            `TraceEnum_ELBO`.
        num_draws: Draws D of each estimator, at least 8. The errors are themselves estimates: those
            of fewer than about 40 draws are too small.
        seed: Seed of the draws.
        progress: Whether to show a progress bar, on a terminal or in a notebook.

    Returns:
        The figures, with their errors. The parameters, their ``grad``, all settings, the
        parameter store and the generators are as they were.

    Raises:
        ValueError: If the rows or the pair are unfit (see `ppvae.fit`), nothing in them needs a
            gradient, an argument is out of range, names are equal, or no estimator applies.

    Example:
        >>> from ppvae import pairs
        >>> model, guide = pairs.exponential_gaussian(hidden=[4])
        >>> result = gradient_variance(model, guide, model(size=5), num_draws=20)
        >>> result.dataset["variance"].sel(group="guide").dims
        ('estimator',)
        >>> result.dataset["estimator"].values.tolist()[:3]
        ['Trace_ELBO', 'BetaELBO', 'StickingTheLanding']
    """
    check_rows(x, model, guide)
    check_count("num_draws", num_draws, _LEAST_DRAWS)
    given = None if estimators is None else _named(estimators)
    x = x.detach()
    with _measuring(model, guide, seed, x):
        sites = None
        with evaluation_mode(model, guide):
            if shared_latents(model, x):
                count = check_shared_pair(model, guide, x, None)
            else:
                sites, count = check_pair(model, guide, x), len(x)
        run = run_pair(model, guide, x)
        named = _named(default_estimators(run, sites)) if given is None else given
        bench = Bench(model, guide, x, run, count, sites is None)
        with bench.clean_gradients():
            applied, refused = _sort(named, bench)
            with progress_bar(num_draws, "gradients", "draw", shown=progress) as bar:
                return _measure(bench, applied, refused, num_draws, seed, bar)


@contextmanager
def _measuring(model: Program, guide: Program, seed: int, x: Tensor) -> Iterator[None]:
    """The contexts of a measurement; parameters keep their need of a gradient."""
    with (
        private_store(),
        forked_rng(seed, x.device),
        evaluation_mode(model, guide, freeze=False),
        torch.enable_grad(),
        without_warnings(),
    ):
        # Pyro's, of what is looked into here: orders of sites, enumeration.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"pyro\.")
        yield


def _named(estimators: Sequence[ELBO] | Mapping[str, ELBO]) -> dict[str, ELBO]:
    if isinstance(estimators, Mapping):
        named = dict(estimators)
    elif isinstance(estimators, Sequence):
        names = [_name(each) for each in estimators]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"estimators: several are called {', '.join(twice)}. Give them names: "
                f"estimators={{'one': ..., 'other': ...}}."
            )
        named = dict(zip(names, estimators, strict=True))
    else:
        raise ValueError(
            f"estimators: expected a sequence of Pyro ELBO objects, or a mapping of names to "
            f"them; got {type(estimators).__name__}."
        )
    if not named:
        raise ValueError("estimators: expected at least one Pyro ELBO object; got none.")
    for name, each in named.items():
        if isinstance(each, type):
            raise ValueError(
                f"estimators: {each.__name__} is a class; pass an object, {each.__name__}(...)."
            )
        if not isinstance(each, ELBO):
            raise ValueError(
                f"estimators: {name!r} is no pyro.infer.ELBO object but {each!r}. Pass one such "
                f"as Trace_ELBO()."
            )
    return named


def _name(estimator: Any) -> str:
    count = getattr(estimator, "num_particles", 1)
    return type(estimator).__name__ + (f"(K={count})" if count > 1 else "")


def _sort(
    named: Mapping[str, ELBO], bench: Bench
) -> tuple[dict[str, tuple[ELBO, Program]], dict[str, str]]:
    """The estimators that apply, ready for use and each with its guide; why others do not."""
    applied: dict[str, tuple[ELBO, Program]] = {}
    refused: dict[str, str] = {}
    for name, estimator in named.items():
        guide = bench.guide_for(estimator)
        reason = _unfit(estimator, bench.run)
        if reason is None:
            try:
                ready = _ready(estimator)
                # Without validation Pyro gives some wrong gradients instead of an error.
                with pyro.settings.context(validate_infer=True):
                    gradient, _, _ = bench.draw(copy.deepcopy(ready), guide, 0)
                if not bool(torch.isfinite(gradient).all()):
                    reason = "its loss or gradient on these rows is not finite"
            except Exception as error:  # Whatever it is, the others are measured.
                reason = _said(error, estimator)
        if reason is None:
            applied[name] = ready, guide
        else:
            refused[name] = reason
    if not applied:
        _refuse_all(refused)
    return applied, refused


def _ready(estimator: ELBO) -> ELBO:
    """A copy that need not run the pair to find out how deep its plates are nested."""
    ready = copy.deepcopy(estimator)
    vectorized = ready.vectorize_particles and ready.num_particles > 1
    guesses = vectorized or isinstance(ready, (TraceEnum_ELBO, TraceTMC_ELBO))
    if guesses and ready.max_plate_nesting == math.inf:
        ready.max_plate_nesting = 1 + vectorized
    return ready


def _refuse_all(refused: Mapping[str, str]) -> None:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    raise ValueError(f"estimators: none applies to this pair. {reasons}.")


def _unfit(estimator: ELBO, run: PairRun) -> str | None:
    """Why an estimator is not even tried."""
    if isinstance(estimator, _COMPILED):
        eager = type(estimator).__name__.removeprefix("Jit")
        return (
            f"it compiles the pair at its first call and keeps what it compiled; {eager} draws "
            f"the same gradients"
        )
    if isinstance(estimator, TraceMeanField_ELBO) and run.model_order != run.guide_order:
        return (
            f"its analytic KL is known to be right only where model and guide draw their sites in "
            f"one order, but the model draws {_listed(run.model_order)} and the guide "
            f"{_listed(run.guide_order)}; reorder the guide, or use Trace_ELBO"
        )
    if isinstance(estimator, TraceMeanField_ELBO) and run.points:
        return (
            f"its KL leaves out the change of variables of {_listed(run.points)}, which the guide "
            f"draws on another space, as AutoNormal does; use Trace_ELBO"
        )
    if type(estimator) is TraceEnum_ELBO and not run.listable and not run.marked:
        return (
            "the guide has no site to enumerate, so that it would be Trace_ELBO (mark a discrete "
            'site of your own with infer={"enumerate": "parallel"})'
        )
    if isinstance(estimator, TraceTMC_ELBO) and not run.marked:
        return (
            "no site of the guide is marked for it; give "
            "pyro.infer.config_enumerate(guide, num_samples=...) as the guide"
        )
    return None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _said(error: Exception, estimator: ELBO) -> str:
    """The first sentences of a message."""
    text = " ".join(str(error).split("Trace Shapes:")[0].split())
    if not text:
        return f"{type(estimator).__name__} raises {type(error).__name__} without a message"
    first, *rest = re.split(r"(?<=[.!?])\s+", text)
    for sentence in rest:
        if len(first) + len(sentence) > _REASON:
            break
        first += " " + sentence
    first = first.rstrip(".")
    known = isinstance(error, (ValueError, NotImplementedError, RuntimeError))
    return first if known else f"{type(error).__name__}: {first}"


def _measure(
    bench: Bench,
    applied: dict[str, tuple[ELBO, Program]],
    refused: dict[str, str],
    num_draws: int,
    seed: int,
    bar: Bar,
) -> GradientVariance:
    sizes = [p.numel() for p in bench.parameters]
    blocks = block_sizes(num_draws)
    moments = {name: Moments(blocks, sizes) for name in applied}
    given = {name: [False] * len(sizes) for name in applied}
    seconds: dict[str, list[float]] = {name: [] for name in applied}
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (num_draws,), generator=generator).tolist()
    for draw, start in enumerate(seeds):
        # In turns, and each of them first in turn.
        names = list(applied)
        for name in names[draw % len(names) :] + names[: draw % len(names)]:
            estimator, guide = applied[name]
            gradient, got, took = bench.draw(copy.deepcopy(estimator), guide, start)
            if not bool(torch.isfinite(gradient).all()):
                refused[name] = (
                    f"its loss or gradient is not finite, at draw {draw + 1} of {num_draws}"
                )
                del applied[name]
                continue
            moments[name].add(gradient)
            seconds[name].append(took)
            given[name] = [one or other for one, other in zip(given[name], got, strict=True)]
        if not applied:
            _refuse_all(refused)
        bar.advance()
    names = list(applied)
    reached = [any(given[name][i] for name in names) for i in range(len(sizes))]
    groups = _groups(bench, reached)
    figures = {name: statistics(moments[name], groups, bench.parameters[0].dtype) for name in names}
    dataset = _dataset(bench, applied, groups, figures, seconds)
    dataset.attrs.update(
        num_draws=num_draws,
        num_data=bench.count,
        seed=seed,
        device=str(bench.x.device),
        dtype=str(bench.parameters[0].dtype).removeprefix("torch."),
    )
    return GradientVariance(dataset, refused)


def _groups(bench: Bench, reached: Sequence[bool]) -> dict[str, list[int]]:
    """The numbers of the tensors of each group; without what no estimator has a gradient of."""
    tensors = [i for i, some in enumerate(reached) if some]
    groups = {which: [i for i in tensors if bench.programs[i] == which] for which in PROGRAMS}
    groups |= {bench.names[i]: [i] for i in tensors}
    return {name: own for name, own in groups.items() if own}


def _dataset(
    bench: Bench,
    applied: Mapping[str, tuple[ELBO, Program]],
    groups: Mapping[str, list[int]],
    figures: Mapping[str, Mapping[str, Mapping[str, float]]],
    seconds: Mapping[str, list[float]],
) -> xarray.Dataset:
    import xarray

    names, first = list(applied), next(iter(applied))
    table = {
        key: np.array([[figures[name][group][key] for group in groups] for name in names])
        for key in next(iter(figures[first].values()))
    }
    cost = np.array([median(seconds[name]) for name in names])
    ratios = [
        [own / other for own, other in zip(seconds[name], seconds[first], strict=True)]
        for name in names
    ]
    relative = np.array([median(each) for each in ratios])
    price, price_error = relative[:, :1], relative[:, 1:]
    table["variance_cost"] = table["variance"] * price
    table["variance_cost_stderr"] = np.hypot(
        table["variance_stderr"] * price, table["variance"] * price_error
    )
    both = ("estimator", "group")
    return xarray.Dataset(
        {key: (both, values) for key, values in table.items()}
        | {
            "cost": ("estimator", cost[:, 0]),
            "cost_stderr": ("estimator", cost[:, 1]),
            "relative_cost": ("estimator", relative[:, 0]),
            "relative_cost_stderr": ("estimator", relative[:, 1]),
        },
        coords={
            "estimator": names,
            "group": list(groups),
            "target": ("estimator", [target_of(applied[name][0], bench) for name in names]),
            "num_particles": (
                "estimator",
                [int(getattr(applied[name][0], "num_particles", 1)) for name in names],
            ),
            "num_elements": (
                "group",
                [sum(bench.parameters[i].numel() for i in own) for own in groups.values()],
            ),
            "program": ("group", [bench.programs[own[0]] for own in groups.values()]),
        },
    )
