r"""How noisy is the gradient of an objective, and what does a draw of it cost?

Stochastic variational inference follows an estimate of the gradient. Estimators of the gradient of
one objective have the same mean, and differ in variance and in cost: `gradient_variance` measures
both, on given rows, for Pyro's objectives and those of `ppvae.objectives`.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)
from torch import Tensor, nn

from ppvae.density import (
    PairRun,
    Program,
    check_count,
    check_pair,
    check_shared_pair,
    run_pair,
    shared_latents,
)
from ppvae.isolation import (
    check_rows,
    evaluation_mode,
    forked_rng,
    modules_of,
    private_store,
    seconds_now,
)

if TYPE_CHECKING:
    import xarray

PROGRAMS = ("model", "guide", "shared")
"""The groups that hold all parameters of a program, or of both."""

# The errors come from leaving out one of this many blocks of draws.
_BLOCKS = 32
_LEAST_DRAWS = 8
_OF_THE_ELBO = (Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)
_COMPILED = (JitTrace_ELBO, JitTraceMeanField_ELBO, JitTraceGraph_ELBO, JitTraceEnum_ELBO)
# A relative standard deviation of so many machine epsilons is rounding, and no noise.
_ROUNDING = 16
# Letters of a reason, after which no further sentence begins.
_REASON = 240


@dataclass(frozen=True)
class GradientVariance:
    """What the gradient estimators of a pair are worth, on given rows.

    Variances compare only between estimators of one ``target``: others estimate another gradient.

    Attributes:
        dataset: An `xarray.Dataset` over ``estimator`` and ``group``: ``variance``,
            ``gradient_norm``, ``snr`` and ``variance_cost``; over ``estimator`` alone ``cost``, in
            seconds, and ``relative_cost``; each with a ``…_stderr``. Gradients are per datum, in
            nats per unit of the parameter. Coordinates: the ``target`` of each estimator; of each
            group its ``num_elements`` and the ``program`` that it belongs to. The settings are in
            the attributes.
        refused: Why an estimator does not apply, by its name.
    """

    dataset: xarray.Dataset
    refused: Mapping[str, str]

    def lowest(self, group: str) -> dict[str, str]:
        """By target, the estimator with the least variance × cost, where that is certain.

        It is lower than that of every other estimator of the target by more than two standard
        errors of the difference, taken as if the two were independent.

        Args:
            group: Name of a group, a value of ``dataset["group"]``.

        Raises:
            ValueError: If the group is unknown.
        """
        ds = self.dataset
        self.check_group(group)
        value = ds["variance_cost"].sel(group=group)
        stderr = ds["variance_cost_stderr"].sel(group=group)
        found = {}
        for target in dict.fromkeys(ds["target"].values.tolist()):
            own = np.flatnonzero(ds["target"].values == target)
            best, *others = own[np.argsort(value.values[own], kind="stable")].tolist()
            gaps = [float(value[other] - value[best]) for other in others]
            errors = [math.hypot(float(stderr[best]), float(stderr[other])) for other in others]
            if gaps and all(gap > 2 * error for gap, error in zip(gaps, errors, strict=True)):
                found[target] = str(ds["estimator"].values[best])
        return found

    def check_group(self, group: str) -> None:
        """Refuse a group that is not there, with a `ValueError`."""
        known = self.dataset["group"].values.tolist()
        if group not in known:
            raise ValueError(f"group: expected one of {known}; got {group!r}.")

    def __str__(self) -> str:
        ds, attrs = self.dataset, self.dataset.attrs
        targets = set(ds["target"].values.tolist())
        lines = [
            f"Gradient per datum of {attrs['num_data']} data: noise of a draw, from "
            f"{attrs['num_draws']} draws of each estimator.",
            "Variance: of all elements of the gradient together, ± its standard error. SNR: norm "
            "of the mean over the root of the variance.",
            f"Cost: time of a draw, that of {ds['estimator'].values[0]} being 1.",
        ]
        if len(targets) > 1:
            lines.append(
                "Compare variances within one target only: estimators of different targets "
                "estimate different gradients."
            )
        for group in [g for g in PROGRAMS if g in ds["group"].values]:
            lines += ["", *self._block(group)]
        if self.refused:
            lines.append("")
        lines += [f"does not apply: {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)

    def _block(self, group: str) -> list[str]:
        one = self.dataset.sel(group=group)
        lowest = self.lowest(group)
        what = "model and guide together" if group == "shared" else f"the {group}"
        rows = [("estimator", "target", "variance", "SNR", "cost", "variance × cost", "")]
        for name in one["estimator"].values.tolist():
            own = one.sel(estimator=name)
            target = str(own["target"].item())
            rows.append(
                (
                    name,
                    target,
                    *(_figure(own, v) for v in ("variance", "snr", "relative_cost")),
                    _figure(own, "variance_cost"),
                    "lowest" if lowest.get(target) == name else "",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = [
            "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        count = int(one["num_elements"])
        return [f"parameters of {what}, {count:,} number{'s' * (count > 1)}", *table]

    __repr__ = __str__


def _figure(one: xarray.Dataset, name: str) -> str:
    value, stderr = float(one[name]), float(one[f"{name}_stderr"])
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    if value == 0 and stderr == 0:
        return "0"
    if not math.isfinite(stderr):
        return f"{value:.3g} ± ?"
    # As many decimals as show two digits of the error.
    if stderr > 0 and 1e-3 <= abs(value) < 1e4:
        places = min(6, max(0, 1 - math.floor(math.log10(stderr))))
        return f"{value:.{places}f} ± {stderr:.{places}f}"
    return f"{value:.3g} ± {stderr:.1g}" if stderr > 0 else f"{value:.3g}"


def default_estimators(model: Program, guide: Program, x: Tensor) -> list[ELBO]:
    """The estimators that `gradient_variance` measures if none are named."""
    return [Trace_ELBO(), TraceMeanField_ELBO(), TraceGraph_ELBO()]


def gradient_variance(
    model: Program,
    guide: Program,
    x: Tensor,
    *,
    estimators: Sequence[ELBO] | Mapping[str, ELBO] | None = None,
    num_draws: int = 200,
    seed: int = 0,
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
            `Trace_ELBO`, `TraceMeanField_ELBO` and `TraceGraph_ELBO`.
        num_draws: Draws D of each estimator, at least 8. The errors are themselves estimates: those
            of fewer than about 40 draws are too small.
        seed: Seed of the draws.

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
        >>> result.dataset["estimator"].values.tolist()
        ['Trace_ELBO', 'TraceMeanField_ELBO', 'TraceGraph_ELBO']
    """
    check_rows(x, model, guide)
    check_count("num_draws", num_draws, _LEAST_DRAWS)
    named = _named(default_estimators(model, guide, x) if estimators is None else estimators)
    x = x.detach()
    with _measuring(model, guide, seed, x):
        with evaluation_mode(model, guide):
            shared = bool(shared_latents(model, x))
            if shared:
                count = check_shared_pair(model, guide, x, None)
            else:
                check_pair(model, guide, x)
                count = len(x)
        run = run_pair(model, guide, x)
        bench = _Bench(model, guide, x, run, count, shared)
        with bench.clean_gradients():
            applied, refused = _sort(named, bench)
            return _measure(bench, applied, refused, num_draws, seed)


@contextmanager
def _measuring(model: Program, guide: Program, seed: int, x: Tensor) -> Iterator[None]:
    """The contexts of a measurement; parameters keep their need of a gradient."""
    with (
        private_store(),
        forked_rng(seed, x.device),
        evaluation_mode(model, guide, freeze=False),
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        # Pyro's, of what is looked into here: orders of sites, enumeration, frozen parameters.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"pyro\.")
        warnings.filterwarnings("ignore", "Encountered (NaN|[+-]?inf)", UserWarning)
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
        if not isinstance(each, ELBO):
            raise ValueError(
                f"estimators: {name!r} is no pyro.infer.ELBO object but {each!r}. Pass one such "
                f"as Trace_ELBO()."
            )
    return named


def _name(estimator: Any) -> str:
    count = getattr(estimator, "num_particles", 1)
    return type(estimator).__name__ + (f"(K={count})" if count > 1 else "")


class _Bench:
    """A pair on some rows, whose gradients are measured.

    Args:
        model: The model.
        guide: The guide.
        x: The rows.
        run: One run of the pair, from which its parameters are read.
        count: Number of data that a loss stands for.
        shared: Whether the model has latents that all rows share.
    """

    def __init__(
        self, model: Program, guide: Program, x: Tensor, run: PairRun, count: int, shared: bool
    ) -> None:
        self.model, self.guide, self.x, self.run = model, guide, x, run
        self.count, self.shared = count, shared
        self.parameters, self.names, self.programs = _parameters(model, guide, run)
        owned = [p for module in modules_of(model, guide) for p in module.parameters()]
        self.everything = list({id(p): p for p in [*owned, *run.parameters.values()]}.values())
        # As each draw finds it: Pyro keeps moving averages of baselines there.
        self.store = pyro.get_param_store().get_state()

    @contextmanager
    def clean_gradients(self) -> Iterator[None]:
        """Use the parameters' ``grad``; afterwards it is what it was."""
        before = [(p, p.grad) for p in self.everything]
        try:
            yield
        finally:
            for p, grad in before:
                p.grad = grad

    def guide_for(self, estimator: ELBO) -> Program:
        """The guide, marked for enumeration where that is what the estimator is for."""
        if isinstance(estimator, TraceEnum_ELBO) and self.run.listable and not self.run.marked:
            return config_enumerate(self.guide)
        return self.guide

    def draw(self, estimator: ELBO, guide: Program, seed: int) -> tuple[Tensor, list[bool], float]:
        """One draw of the gradient.

        Returns:
            The gradient of all parameters one after the other, NaN if it or the loss is not
            finite; which parameters were given one; the seconds.
        """
        for p in self.everything:
            p.grad = None
        store = pyro.get_param_store()
        state: Any = {kind: dict(values) for kind, values in self.store.items()}
        with store.scope(state), forked_rng(seed, self.x.device):
            began = seconds_now(self.x.device)
            loss = estimator.loss_and_grads(self.model, guide, self.x)
            seconds = seconds_now(self.x.device) - began
        given = [p.grad is not None for p in self.parameters]
        parts = [
            torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in self.parameters
        ]
        # Downwards in the loss is upwards in the objective.
        gradient = -torch.cat([part.detach().reshape(-1) for part in parts]) / self.count
        losses = loss if isinstance(loss, tuple) else (loss,)
        if not all(math.isfinite(float(value)) for value in losses):
            gradient = torch.full_like(gradient, torch.nan)
        return gradient, given, seconds


def _parameters(
    model: Program, guide: Program, run: PairRun
) -> tuple[list[Tensor], list[str], list[str]]:
    """What is trained, with its name and the program that it belongs to."""
    roots = [
        (role, root)
        for role, program in (("model", model), ("guide", guide))
        if isinstance(root := poutine.unwrap(program), nn.Module)
    ]
    called = {
        role: {id(p): f"{role}.{name}" for name, p in root.named_parameters()}
        for role, root in roots
    }
    stored = {id(p): name for name, p in run.parameters.items()}
    owned = [p for _, root in roots for p in root.parameters()]
    unique = {id(p): p for p in [*owned, *run.parameters.values()]}
    candidates = [p for p in unique.values() if p.requires_grad and p.is_leaf]
    of_model = _depends(run.log_p, candidates)
    of_guide = _depends(run.guided, candidates)
    parameters, names, programs = [], [], []
    for p, modelled, guided in zip(candidates, of_model, of_guide, strict=True):
        if not modelled and not guided:
            continue
        program = "shared" if modelled and guided else "model" if modelled else "guide"
        order = ("model", "guide") if program == "model" else ("guide", "model")
        known = [called[role][id(p)] for role in order if id(p) in called.get(role, {})]
        parameters.append(p)
        names.append(known[0] if known else stored[id(p)])
        programs.append(program)
    if not parameters:
        raise ValueError(
            "Nothing to measure: no parameter of model or guide needs a gradient. Are all frozen "
            "(requires_grad=False)?"
        )
    return parameters, names, programs


def _depends(values: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[bool]:
    """Which parameters any of the values has a gradient of."""
    total = [value.sum() for value in values if value.requires_grad]
    if not total:
        return [False] * len(parameters)
    found = torch.autograd.grad(
        torch.stack(total).sum(), parameters, allow_unused=True, materialize_grads=False
    )
    return [gradient is not None for gradient in found]


def _target(estimator: ELBO, bench: _Bench) -> str:
    """The objective whose gradient an estimator estimates, in words."""
    own = getattr(estimator, "target", None)
    if isinstance(own, str):
        return own
    kind = type(estimator)
    if kind in _OF_THE_ELBO:
        return "ELBO"
    if kind is ReweightedWakeSleep:
        return f"wake-sleep, K = {estimator.num_particles}, weights of all rows at once"
    if kind is not RenyiELBO:
        return kind.__name__
    count, alpha = estimator.num_particles, estimator.alpha
    if alpha == 0 and bench.run.smooth and not bench.shared and not bench.run.scaled:
        return f"IWAE bound, K = {count}"
    parts = ["Rényi bound"]
    if bench.shared:
        parts.append("of all rows at once")
    elif bench.run.scaled:
        parts.append("with the model's scale inside its weights")
    if not bench.run.smooth:
        parts.append("of infinitely many draws, estimated")
    return f"{' '.join(parts)}, α = {alpha:g}, K = {count}"


def _sort(
    named: Mapping[str, ELBO], bench: _Bench
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


class _Moments:
    """Mean and scatter of the draws of one gradient, block by block and tensor by tensor.

    Within a block by Welford's recursion, and all relative to the first draw: a variance that is
    tiny beside the squared mean does not drown in it.

    Args:
        blocks: Number of draws in each block.
        sizes: Number of elements of each tensor.
    """

    def __init__(self, blocks: Tensor, sizes: Sequence[int]) -> None:
        self.blocks, self.sizes = blocks, list(sizes)
        self.first: Tensor | None = None
        self.means: list[Tensor] = []
        self.within = torch.zeros(len(blocks), len(self.sizes), dtype=torch.float64)
        self.seen = 0

    def add(self, gradient: Tensor) -> None:
        """Take in the next draw."""
        if self.first is None:
            self.first = gradient.double()
        if self.seen == 0:
            self.mean = torch.zeros_like(self.first)
            self.scatter = torch.zeros(len(self.sizes), dtype=torch.float64, device=gradient.device)
        block = len(self.means)
        self.seen += 1
        before = gradient.double() - self.first - self.mean
        self.mean += before / self.seen
        after = gradient.double() - self.first - self.mean
        self.scatter += self._by_tensor(before * after)
        if self.seen == int(self.blocks[block]):
            self.means.append(self.mean.to(gradient.dtype))
            self.within[block] = self.scatter.cpu()
            self.seen = 0

    def _by_tensor(self, values: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in values.split(self.sizes)])

    def products(self) -> tuple[Tensor, Tensor, Tensor]:
        """‖m‖² ``(tensors,)``, ⟨m, c_b⟩ and ‖c_b‖² ``(blocks, tensors)``, tensor by tensor.

        Here m is the mean, and c_b the mean of block b minus m.
        """
        assert self.first is not None
        weights = (self.blocks / self.blocks.sum()).tolist()
        middle = torch.zeros_like(self.first)
        for weight, mean in zip(weights, self.means, strict=True):
            middle += weight * mean.double()
        total = self.first + middle
        inner, square = [], []
        for mean in self.means:
            centred = mean.double() - middle
            inner.append(self._by_tensor(total * centred))
            square.append(self._by_tensor(centred.square()))
        norm = self._by_tensor(total.square())
        return norm.cpu(), torch.stack(inner).cpu(), torch.stack(square).cpu()


def _block_sizes(num_draws: int) -> Tensor:
    count = min(num_draws, _BLOCKS)
    each, rest = divmod(num_draws, count)
    return torch.tensor([each + (block < rest) for block in range(count)], dtype=torch.float64)


def _jackknife(whole: Tensor, without: Tensor, blocks: Tensor) -> Tensor:
    """Standard error of a statistic, from its values without each of the blocks.

    Of blocks that may differ in size (Busing, Meijer & van der Leeden 1999).
    """
    share = (blocks.sum() / blocks).reshape(-1, *[1] * whole.dim())
    pseudo = share * whole - (share - 1) * without
    estimate = len(blocks) * whole - ((1 - 1 / share) * without).sum(0)
    return ((pseudo - estimate).square() / (share - 1)).mean(0).sqrt()


@dataclass(frozen=True)
class _Products:
    """What the statistics of a group need: sums over its tensors of what `_Moments` holds."""

    blocks: Tensor
    within: Tensor
    norm: Tensor
    inner: Tensor
    square: Tensor

    def statistics(self) -> dict[str, float]:
        """Variance, norm of the gradient and signal-to-noise ratio, with their errors."""
        n, total = self.blocks, self.blocks.sum()
        scatter = self.within.sum() + (n * self.square).sum()
        whole = _triple(scatter, self.norm, total)
        rest = total - n
        # Without block b the mean moves by −n_b c_b / rest.
        moved = (n / rest).square() * self.square
        others = scatter - self.within - n * self.square - rest * moved
        norms = self.norm - 2 * n / rest * self.inner + moved
        without = _triple(others.clamp(min=0), norms, rest)
        errors = [_jackknife(w, o, n).item() for w, o in zip(whole, without, strict=True)]
        variance, square, ratio = (w.item() for w in whole)
        norm, norm_error = _root(square, errors[1])
        snr, snr_error = _root(ratio, errors[2])
        return {
            "variance": variance,
            "variance_stderr": errors[0],
            "gradient_norm": norm,
            "gradient_norm_stderr": norm_error,
            "snr": snr,
            "snr_stderr": snr_error,
        }


def _triple(scatter: Tensor, norm: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variance, squared norm of the expectation, and their ratio."""
    variance = scatter / (count - 1)
    square = norm - variance / count
    return variance, square, square / variance


def _root(square: float, stderr: float) -> tuple[float, float]:
    """The root of an estimate of a square, 0 where that is negative, and its error."""
    root = math.sqrt(max(square, 0.0))
    if not stderr > 0:
        return root, 0.0 if stderr == 0 else math.nan
    # Near 0 the delta method's error has no bound; |√a − √b| ≤ √|a − b|.
    return root, min(stderr / (2 * root) if root else math.inf, math.sqrt(stderr))


def _measure(
    bench: _Bench,
    applied: dict[str, tuple[ELBO, Program]],
    refused: dict[str, str],
    num_draws: int,
    seed: int,
) -> GradientVariance:
    sizes = [p.numel() for p in bench.parameters]
    blocks = _block_sizes(num_draws)
    moments = {name: _Moments(blocks, sizes) for name in applied}
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
    names = list(applied)
    reached = [any(given[name][i] for name in names) for i in range(len(sizes))]
    groups = _groups(bench, reached)
    figures = {
        name: _statistics(moments[name], groups, bench.parameters[0].dtype) for name in names
    }
    dataset = _dataset(bench, applied, groups, figures, seconds)
    dataset.attrs.update(
        num_draws=num_draws,
        num_data=bench.count,
        seed=seed,
        device=str(bench.x.device),
        dtype=str(bench.parameters[0].dtype).removeprefix("torch."),
    )
    return GradientVariance(dataset, refused)


def _groups(bench: _Bench, reached: Sequence[bool]) -> dict[str, list[int]]:
    """The numbers of the tensors of each group; without what no estimator has a gradient of."""
    tensors = [i for i, some in enumerate(reached) if some]
    groups = {which: [i for i in tensors if bench.programs[i] == which] for which in PROGRAMS}
    groups |= {bench.names[i]: [i] for i in tensors}
    return {name: own for name, own in groups.items() if own}


def _statistics(
    moments: _Moments, groups: Mapping[str, list[int]], dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    norm, inner, square = moments.products()
    out = {}
    for name, own in groups.items():
        parts = (moments.within, inner, square)
        within, across, apart = (part[:, own].sum(dim=1) for part in parts)
        figures = _Products(moments.blocks, within, norm[own].sum(), across, apart).statistics()
        least = (_ROUNDING * torch.finfo(dtype).eps) ** 2
        if figures["variance"] <= least * float(norm[own].sum()):
            some = figures["gradient_norm"] > 0
            figures["snr"] = math.inf if some else math.nan
            figures["snr_stderr"] = math.nan
        out[name] = figures
    return out


def _median(values: Sequence[float]) -> tuple[float, float]:
    r"""The median, and its error: half of the width of the order statistics about it.

    Those at ranks :math:`(n \mp \sqrt n) / 2` enclose the median of any distribution with about
    the probability of one standard error.
    """
    ordered, count = sorted(values), len(values)
    low = max(0, math.floor((count - math.sqrt(count)) / 2))
    return float(np.median(ordered)), (ordered[count - 1 - low] - ordered[low]) / 2


def _dataset(
    bench: _Bench,
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
    cost = np.array([_median(seconds[name]) for name in names])
    ratios = [
        [own / other for own, other in zip(seconds[name], seconds[first], strict=True)]
        for name in names
    ]
    relative = np.array([_median(each) for each in ratios])
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
            "target": ("estimator", [_target(applied[name][0], bench) for name in names]),
            "num_elements": (
                "group",
                [sum(bench.parameters[i].numel() for i in own) for own in groups.values()],
            ),
            "program": ("group", [bench.programs[own[0]] for own in groups.values()]),
        },
    )
