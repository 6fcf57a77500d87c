r"""Where an amortization gap comes from: measured by mending one cause after the other.

With the model frozen, the guide is trained further, then given a wide network beside its own. What
these repairs bring is measured on rows of the training data that they have not seen, so that what
they learn by heart does not count; what then remains to q* on rows that they have seen, no encoder
of these inputs delivers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn

from ppvae.comparison import check_current
from ppvae.density import (
    ModelSites,
    Program,
    check_count,
    check_pair,
    draw_chunks,
    judging,
    row_chunks,
)
from ppvae.families import Family, in_order
from ppvae.fisher import LocalElbo
from ppvae.guides import PerDatapoint, read_params
from ppvae.isolation import check_rows, forked_rng, modules_of, seconds_now, unvalidated
from ppvae.ledger import Comparison
from ppvae.local import fit_per_datapoint, flat_params
from ppvae.markup import TextTable
from ppvae.nn import MLP
from ppvae.progress import SILENT, Bar, progress_bar

if TYPE_CHECKING:
    import xarray

PARTS = ("generalisation", "training", "capacity", "missing_inputs")
_TRAINING_DRAWS = 4
_CHECKPOINTS = 20
_SELECTION_DRAWS = 64
_MEASURE_DRAWS = 500
_LEAST_ROWS = 30
_WIDTH = 256
# A relation that holds in fewer rows than this may be chance.
_FEW_ROWS = 10
# Of a column's range: values of x that are closer are one, but for rounding, and then so are those
# of a function of x, which may be steep there.
_ROUNDING, _STEEP = 1e-5, 1e-3
# Adam's first steps move all weights of a layer alike: so wide a network leaps with more.
_WIDE_LR = 3e-3

_MEANING = {
    "generalisation": (
        "encoders do worse on rows that they were not trained on: train on more rows, such as "
        "rows drawn from the model"
    ),
    "training": "the guide was not trained to the end: train it longer",
    "capacity": "the guide's network is too small: make it wider or deeper",
    "missing_inputs": (
        "what the guide is given does not determine the posterior: give the encoder the inputs "
        "that the model's density uses"
    ),
}


@dataclass(frozen=True)
class Explanation:
    """The parts of an amortization gap, each with its error.

    Attributes:
        dataset: An `xarray.Dataset` over ``part``: ``gap`` and ``gap_stderr`` in nats a datum.
            The parts add up to the amortization gap of the comparison. The errors are those of
            means over rows, for other rows of the same kind, Monte Carlo noise included. Over
            ``step`` and ``stage``: ``elbo``, the ELBO on held-out rows during each training.
        cause: The largest part that is beyond twice its error, or ``"none"``.
        status: What limits the answer, in words.
        seconds: Wall time.
    """

    dataset: xarray.Dataset
    cause: str
    status: str
    seconds: float

    def __str__(self) -> str:
        total = float(self.dataset.attrs["amortization_gap"])
        rows = [f"  {label:<15} {gap:>18}  {share:>5}" for label, gap, share in self._rows()]
        return "\n".join(
            [
                f"Amortization gap of {total:.4f} nats a datum, by cause (± standard error over "
                f"rows):",
                "",
                *(row.rstrip() for row in rows),
                "",
                *self.said(),
            ]
        )

    def table(self) -> TextTable:
        """The parts, their errors and their shares, in cells."""
        return TextTable(("cause", "nats a datum", "of the gap"), self._rows())

    def _rows(self) -> list[tuple[str, str, str]]:
        ds, total, rows = self.dataset, float(self.dataset.attrs["amortization_gap"]), []
        for part in PARTS:
            value, error = (float(ds[v].sel(part=part)) for v in ("gap", "gap_stderr"))
            share = f"{value / total:.0%}" if total > 0 else ""
            label, value = part.replace("_", " "), round(value, 4) + 0.0
            if part == "missing_inputs" and ds.attrs["sees_all_inputs"]:
                label = "not learned"
            rows.append((label, f"{value:.4f} ± {error:.4f}", share))
        return rows

    def said(self) -> list[str]:
        """The cause and its repair, what limits the answer, and what it was measured on."""
        return [
            self.sentence(),
            *([self.status] if self.status else []),
            f"Measured on {self.dataset.attrs['rows_measured']} training rows that the repairs did "
            f"not see, and as many that they saw; {self.seconds:.0f} s.",
        ]

    def sentence(self) -> str:
        """The cause and its repair in words."""
        if self.cause == "none":
            return "No part is beyond its error: there is no amortization gap to mend."
        label = self.cause.replace("_", " ")
        said = f"Main cause: {label}; {_MEANING[self.cause]}."
        value, error = (self.dataset[v].to_series() for v in ("gap", "gap_stderr"))
        for part in PARTS:
            margin = 2 * math.hypot(error[part], error[self.cause])
            if part == "missing_inputs" and self.dataset.attrs["sees_all_inputs"]:
                continue
            if part != self.cause and value[part] > value[self.cause] - margin:
                said += f" {part.replace('_', ' ').capitalize()} counts for as much within errors."
        return said

    __repr__ = __str__


def explain(
    comparison: Comparison,
    x_train: Tensor,
    *,
    guide: str | None = None,
    steps: int = 2000,
    batch_size: int = 128,
    lr: float = 1e-3,
    num_rows: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Explanation:
    r"""Split an amortization gap into its causes.

    The model is frozen throughout. Of the training rows a part V is held back from the two
    repairs, which train on the rest T. With :math:`A` the mean amortization gap on a set of rows:

    - *training*: :math:`A_V[\text{guide}] - A_V[\text{longer}]`, with the guide trained for
      further ``steps``,
    - *capacity*: :math:`A_V[\text{longer}] - A_V[\text{wide}]`, where the wide guide adds to the
      guide's output a network of two hidden layers of 256 units that is given what the guide's
      own first layers are given,
    - *missing inputs*: :math:`A_T[\text{wide}]`, what remains on rows that the repairs have seen.
      Where the guide is given all of x nothing is missing: this part is then what the repairs had
      not learned when their steps ended. It is printed as such, and not named as the cause,
    - *generalisation*: :math:`A_X[\text{guide}] - A_V[\text{guide}]`, with the compared rows X and
      V among the rows that the guide was trained on, plus
      :math:`A_V[\text{wide}] - A_T[\text{wide}]`, the same of the repairs.

    They add up to the amortization gap. Both trainings keep the state that was best on further
    rows that are held back, so that a repair that only learns rows by heart counts for nothing.

    Args:
        comparison: The comparison whose amortization gap is in question.
        x_train: The rows that the guide was trained on, ``(num_train, *event)``.
        guide: Which guide, where the comparison has several.
        steps: Steps of each of the two trainings.
        batch_size: Rows per step.
        lr: Adam's learning rate, for the wide network at most 0.003; it falls to zero along a
            cosine.
        num_rows: Rows of V; as many as were compared if left out, at most a fifth of ``x_train``.
        seed: Seed of all draws; the caller's generators are left as they were.
        progress: Whether to show progress bars, on a terminal or in a notebook.

    Returns:
        The parts. The guide and the model are afterwards what they were.

    Raises:
        ValueError: If the training rows are too few or of another shape or kind than the compared
            ones, the guide's name is unknown, the guide has changed since the comparison or was
            compared with another family, or it keeps parameters for each datum, so that nothing
            is amortized.

    Example:
        >>> from ppvae import compare, pairs
        >>> model, guide = pairs.factor_analysis()
        >>> x = model(size=400).detach()
        >>> explanation = explain(compare(model, guide, x[300:]), x[:300], steps=200)
        >>> explanation.cause  # the encoder was never trained
        'training'
    """
    began = seconds_now(comparison.x.device)
    name = comparison.guide_name(guide)
    program = comparison.guides[name]
    check_count("steps", steps)
    check_count("batch_size", batch_size)
    if num_rows is not None:
        check_count("num_rows", num_rows, least=2)
    check_same_kind(comparison.x, x_train, comparison.model, program)
    rows = _split(x_train, num_rows or len(comparison.x), seed)
    setting = EncoderTraining.of(comparison.model, program, x_train, seed)
    check_current(comparison, name)
    fits = [
        fit_per_datapoint(
            comparison.model, None, part, init=program, seed=seed + 1, progress=progress
        )
        for part in (rows.measured, rows.seen)
    ]
    optimum, optimum_seen = (flat_params(best.guide, setting.elbo.families) for best in fits)
    with setting.restored(), progress_bar(2 * steps, "encoders", "step", shown=progress) as bar:
        before = setting.encode(rows.measured)
        longer = setting.train(setting.encode, rows, steps, batch_size, lr, bar=bar)
        further = setting.encode(rows.measured)
        wide = _Widened(setting, rows.fitted)
        wide_lr = min(lr, _WIDE_LR)
        wider = setting.train(wide, rows, steps, batch_size, wide_lr, wide.network, bar)
        widened, widened_seen = wide(rows.measured), wide(rows.seen)
    elbos = setting.elbos(rows.measured, [before, further, widened, optimum], seed + 2)
    seen = setting.elbos(rows.seen, [widened_seen, optimum_seen], seed + 3)
    name_gap = comparison.dataset["amortization_gap"]
    gap = torch.as_tensor((name_gap.sel(guide=name) if comparison.several else name_gap).values)
    on_training, of_wide, remaining = elbos[3] - elbos[0], elbos[3] - elbos[2], seen[1] - seen[0]
    values = {
        "generalisation": (
            float(gap.mean() - (on_training - of_wide).mean() - remaining.mean()),
            math.hypot(_error(gap), _error(on_training - of_wide), _error(remaining)),
        ),
        "training": _mean(elbos[1] - elbos[0]),
        "capacity": _mean(elbos[2] - elbos[1]),
        "missing_inputs": _mean(remaining),
    }
    total = _mean(gap)
    dataset = _dataset(values, longer, wider, total[0], len(rows.measured))
    # A number: netCDF has no truth values for attributes.
    dataset.attrs["sees_all_inputs"] = int(wide.sees_everything)
    return Explanation(
        dataset=dataset,
        cause=_cause(values, total, wide.sees_everything),
        status=_status(
            longer,
            wider,
            all(bool(best.converged.all()) for best in fits),
            wide.sees_everything and float(remaining.mean()) > 2 * _error(remaining),
        ),
        seconds=seconds_now(comparison.x.device) - began,
    )


def _cause(
    values: Mapping[str, tuple[float, float]], total: tuple[float, float], sees_everything: bool
) -> str:
    """The largest part beyond twice its error."""
    clear = {part: value for part, (value, error) in values.items() if value > 2 * error}
    if not clear or total[0] <= 2 * total[1]:
        return "none"
    if sees_everything and clear.pop("missing_inputs", 0.0) and not clear:
        # Nothing is missing: a wide network that is trained for long enough delivers it.
        return "training"
    return max(clear, key=lambda part: clear[part])


def check_same_kind(x: Tensor, x_train: Tensor, *programs: Any) -> None:
    """Refuse training rows of another shape, type or binarisation than the compared rows.

    Raises:
        ValueError: Naming what differs.
    """
    check_rows(x_train, *programs, name="x_train")
    if x_train.shape[1:] != x.shape[1:] or x_train.dtype != x.dtype:
        raise ValueError(
            f"x_train: expected rows of shape {tuple(x.shape[1:])}, {x.dtype}, as in the "
            f"comparison; got {tuple(x_train.shape[1:])}, {x_train.dtype}."
        )
    binary, train_binary = (bool(((v == 0) | (v == 1)).all()) for v in (x, x_train))
    # Counts of which the few compared ones happen to be 0 and 1 are no other binarisation.
    grey = bool((x_train != x_train.round()).any() or (x != x.round()).any())
    if binary != train_binary and grey:
        raise ValueError(
            f"x_train is {'binary' if train_binary else 'not binary'} but the compared rows are "
            f"{'binary' if binary else 'not'}: evidences are comparable only within one "
            f"binarisation. Binarise both in the same way."
        )


@dataclass(frozen=True)
class TrainingRows:
    """Rows to train on, to choose the best state on, and to measure on.

    Attributes:
        fitted: What the repairs are trained on.
        chosen_on: Held back, to choose the best state.
        measured: Held back, to measure on.
        seen: Some of ``fitted``, to measure on.
    """

    fitted: Tensor
    chosen_on: Tensor
    measured: Tensor
    seen: Tensor


def _split(x_train: Tensor, wanted: int, seed: int) -> TrainingRows:
    if len(x_train) < _LEAST_ROWS:
        raise ValueError(
            f"x_train: expected at least {_LEAST_ROWS} rows, of which two fifths are held back; "
            f"got {len(x_train)}."
        )
    held = min(wanted, len(x_train) // 5)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x_train), generator=generator).to(x_train.device)
    fitted = x_train[order[2 * held :]]
    return TrainingRows(
        fitted, x_train[order[:held]], x_train[order[held : 2 * held]], fitted[:held]
    )


@dataclass(frozen=True)
class Curve:
    """The ELBO on held-out rows during a training, in nats a datum."""

    steps: list[int]
    elbo: list[float]
    seconds: list[float]
    improving: bool


@dataclass(frozen=True)
class EncoderTraining:
    """Trains guides of a frozen model through the local ELBO of their families.

    Attributes:
        program: The guide.
        sites: The model's sites.
        elbo: The local ELBO.
        seed: Seed of all draws.
        probe: A few rows.
    """

    program: Program
    sites: ModelSites
    elbo: LocalElbo
    seed: int
    probe: Tensor

    @classmethod
    def of(cls, model: Program, program: Program, x: Tensor, seed: int) -> EncoderTraining:
        """Read the pair on some rows.

        Raises:
            ValueError: If nothing is amortized, or the guide cannot be freed.
        """
        if isinstance(program, PerDatapoint):
            raise ValueError(
                "guide: a PerDatapoint guide keeps parameters for each datum, so that nothing is "
                "amortized and there is no encoder to explain."
            )
        few = x[: min(len(x), 64)]
        with judging(seed, few, model, program), torch.no_grad():
            sites = check_pair(model, program, few)
            families: Mapping[str, Family] = read_params(program, few, sites).families
        ordered = in_order(families, sites.latents)
        still = _apart(model, program)
        return cls(program, sites, LocalElbo(still, ordered, _TRAINING_DRAWS), seed, few)

    def encode(self, x: Tensor) -> Tensor:
        """λ of the guide for rows, differentiable in its parameters."""
        params = read_params(self.program, x, self.sites, once=True).params
        return torch.cat([params[name] for name in self.elbo.families], dim=-1)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the guide may be trained; afterwards it is what it was."""
        modules = (self.elbo.model, self.program)
        with judging(self.seed, self.probe, *modules), unvalidated():
            with torch.no_grad():
                self.encode(self.probe)  # Now all parameters are known to Pyro's store.
            kept = [(t, t.detach().clone(), t.requires_grad, t.grad) for t in _tensors(*modules)]
            try:
                yield
            finally:
                with torch.no_grad():
                    for tensor, value, needed, gradient in kept:
                        tensor.copy_(value)
                        tensor.requires_grad_(needed)
                        tensor.grad = gradient

    def elbos(self, x: Tensor, params: list[Tensor], seed: int) -> list[Tensor]:
        """ELBO per row under several λ, on common draws."""
        totals = [torch.zeros(len(x), dtype=torch.float64, device=x.device) for _ in params]
        with judging(seed, x, self.elbo.model, self.program), unvalidated(), torch.no_grad():
            for chunk, size in enumerate(draw_chunks(_MEASURE_DRAWS, x)):
                for total, each in zip(totals, params, strict=True):
                    with forked_rng(seed + 7919 * chunk, x.device):
                        total += self.elbo.log_weights(x, each, size).double().sum(dim=0)
        return [total / _MEASURE_DRAWS for total in totals]

    def train(
        self,
        encode: Callable[[Tensor], Tensor],
        rows: TrainingRows,
        steps: int,
        batch_size: int,
        lr: float,
        network: nn.Module | None = None,
        bar: Bar = SILENT,
    ) -> Curve:
        """Adam on the local ELBO; keeps the state that is best on the rows to choose on.

        Args:
            encode: From rows to λ.
            rows: The rows.
            steps: Number of steps.
            batch_size: Rows per step.
            lr: Learning rate at the start of a cosine.
            network: What is trained; if left out, those parameters of the guide that move λ.
            bar: Told of each step.
        """
        began = seconds_now(rows.fitted.device)
        few = rows.fitted[: min(len(rows.fitted), 16)]
        params = list(network.parameters()) if network is not None else self._trainable(few)
        if not params:
            elbo = self._judge(encode, rows.chosen_on)
            return Curve([0], [elbo], [0.0], False)
        for param in params:
            param.requires_grad_(True)
        optimizer = torch.optim.Adam(params, lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        best, at = self._judge(encode, rows.chosen_on), [0]
        values, seconds = [best], [0.0]
        kept = [p.detach().clone() for p in params]
        every = max(1, steps // _CHECKPOINTS)
        size = min(batch_size, len(rows.fitted))
        for step in range(1, steps + 1):
            batch = rows.fitted[torch.randint(len(rows.fitted), (size,)).to(few.device)]
            value = self.elbo.log_weights(batch, encode(batch), _TRAINING_DRAWS, still=True)
            gradients = torch.autograd.grad(-value.mean(), params, allow_unused=True)
            for param, gradient in zip(params, gradients, strict=True):
                finite = gradient is not None and bool(torch.isfinite(gradient).all())
                param.grad = gradient if finite else None
            optimizer.step()
            schedule.step()
            if step % every == 0 or step == steps:
                now = self._judge(encode, rows.chosen_on)
                at.append(step)
                values.append(now)
                seconds.append(seconds_now(few.device) - began)
                if now > best:
                    best, kept = now, [p.detach().clone() for p in params]
            bar.advance(figure=partial("ELBO {:.3f} nats".format, best))
        with torch.no_grad():
            for param, value in zip(params, kept, strict=True):
                param.copy_(value)
                param.requires_grad_(False)
                param.grad = None
        # The cosine has gone through four fifths of its learning at half of the steps.
        half = values[len(values) // 2]
        improving = values[-1] == max(values) and values[-1] - half > 0.05 * (
            values[-1] - values[0]
        )
        return Curve(at, values, seconds, improving)

    def _judge(self, encode: Callable[[Tensor], Tensor], x: Tensor) -> float:
        with torch.no_grad(), forked_rng(self.seed + 11, x.device):
            weights = self.elbo.log_weights(x, encode(x), _SELECTION_DRAWS)
        value = float(weights.mean())
        return value if math.isfinite(value) else -math.inf

    def _trainable(self, x: Tensor) -> list[Tensor]:
        """The parameters that move λ and not the model: the encoder's, also in a shared module."""
        candidates = _parameters(self.program)
        if not candidates:
            return []
        for param in candidates:
            param.requires_grad_(True)
        with torch.enable_grad():
            params = self.encode(x)
            # With λ held fixed, log w moves with the model's parameters alone.
            density = self.elbo.log_weights(x, params.detach(), 1)
            found, the_models = (
                torch.autograd.grad(value.sum(), candidates, allow_unused=True)
                if value.requires_grad
                else [None] * len(candidates)
                for value in (params, density)
            )
        for param in candidates:
            param.requires_grad_(False)
        return [
            param
            for param, gradient, shared in zip(candidates, found, the_models, strict=True)
            if gradient is not None and shared is None
        ]


def _parameters(*programs: Program) -> list[Tensor]:
    """Parameters of modules, and bare ones of Pyro's store."""
    found: dict[int, Tensor] = {}
    for module in modules_of(*programs):
        found |= {id(p): p for p in module.parameters()}
    found |= {id(p): p for _, p in pyro.get_param_store().named_parameters()}
    return [p for p in found.values() if p.is_leaf and p.is_floating_point()]


def _apart(model: Program, program: Program) -> Program:
    """A model that stays as it is while the guide is trained, which may own its encoder.

    That of a `ppvae.priors.VampPrior` is the guide's.
    """
    theirs, its = (
        {id(p) for module in modules_of(each) for p in module.parameters()}
        for each in (program, model)
    )
    return copy.deepcopy(model) if theirs & its and isinstance(model, nn.Module) else model


def _tensors(*programs: Program) -> list[Tensor]:
    buffers = {id(b): b for m in modules_of(*programs) for b in m.buffers()}
    return [*_parameters(*programs), *buffers.values()]


class _Widened:
    """The guide's output plus what a wide network makes of the guide's inputs."""

    def __init__(self, setting: EncoderTraining, x: Tensor) -> None:
        self.setting = setting
        self.past = columns_past_layers(setting, x[: row_chunks(x, 1)[0].stop])
        seen = self._inputs(x)
        self.mean = seen.mean(dim=0)
        self.scale = seen.std(dim=0) if seen.shape[1] else self.mean
        # What never changes, or hardly, carries nothing.
        self.used = self.scale > 1e-6 * seen.abs().amax(dim=0).clamp(min=1e-12)
        size = sum(f.num_params for f in setting.elbo.families.values())
        self.sees_everything = determines(seen, x.reshape(len(x), -1))
        inputs = max(1, int(self.used.sum()))
        self.network = MLP(inputs, [_WIDTH, _WIDTH], size).to(x)
        with torch.no_grad():
            # It starts as the guide itself.
            for param in self.network.layers[-1].parameters():
                param.zero_()

    def __call__(self, x: Tensor) -> Tensor:
        seen = (self._inputs(x) - self.mean) / self.scale
        seen = seen[:, self.used]
        if seen.shape[1] == 0:
            seen = x.new_ones(len(x), 1)
        correction: Tensor = self.network(seen)
        return self.setting.encode(x).detach() + correction

    def _inputs(self, x: Tensor) -> Tensor:
        return torch.cat([inputs_of(self.setting, x[s], self.past) for s in row_chunks(x, 1)])


def inputs_of(setting: EncoderTraining, x: Tensor, past: Tensor | None = None) -> Tensor:
    """What the guide's network is given for these rows, ``(batch, numbers)``.

    Those are the inputs of its first layers, the ones that no parameter has touched, and the
    columns of x that move λ past these layers, as in functions that call ``pyro.param``.

    Args:
        setting: The guide.
        x: Rows.
        past: What `columns_past_layers` found, where it is known.
    """
    given, _ = _first_layers(setting, x)
    if past is None:
        past = columns_past_layers(setting, x)
    parts = [value.reshape(len(x), -1).to(x) for value in given]
    return torch.cat([*parts, x.reshape(len(x), -1)[:, past]], dim=-1)


def _first_layers(setting: EncoderTraining, x: Tensor) -> tuple[list[Tensor], list[nn.Module]]:
    """What the first layers are given, and the layers that are given nothing else."""
    found: dict[int, Tensor] = {}
    first: list[nn.Module] = []

    def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        values = [value for value in arguments if isinstance(value, Tensor)]
        untouched = [
            value
            for value in values
            if value.dim() > 0 and value.shape[0] == len(x) and not value.requires_grad
        ]
        found.update({id(value): value for value in untouched})
        if untouched and len(untouched) == len(values):
            first.append(module)

    with _needing_gradients(_parameters(setting.program)):
        hooks = [layer.register_forward_pre_hook(look) for layer in _layers(setting.program)]
        try:
            setting.encode(x)
        finally:
            for hook in hooks:
                hook.remove()
    return [value.detach() for value in found.values()], list(dict.fromkeys(first))


def columns_past_layers(setting: EncoderTraining, x: Tensor) -> Tensor:
    """The columns of x that move λ in some row by another way than through a first layer."""

    def cut(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        return output.detach() if isinstance(output, Tensor) else output

    _, first = _first_layers(setting, x)
    leaf = x.detach().clone().requires_grad_(True)
    candidates = _parameters(setting.program)
    kept = [param.detach().clone() for param in candidates]
    with _needing_gradients(candidates), forked_rng(setting.seed, x.device):
        hooks = [layer.register_forward_hook(cut) for layer in first]
        try:
            with torch.no_grad():
                for param in candidates:
                    # A weight that happens to be zero would hide its input.
                    param.add_(0.1 * torch.randn_like(param))
            params = setting.encode(leaf)
            if params.requires_grad:
                value = (params * torch.randn_like(params)).sum()
                (slope,) = torch.autograd.grad(value, leaf, allow_unused=True)
            else:
                slope = None
        finally:
            for hook in hooks:
                hook.remove()
            with torch.no_grad():
                for param, value in zip(candidates, kept, strict=True):
                    param.copy_(value)
    slope = torch.zeros_like(leaf) if slope is None else slope
    return (slope.reshape(len(x), -1) != 0).any(dim=0)


def _layers(program: Program) -> list[nn.Module]:
    """The modules with parameters of their own; a guide itself is given all of x."""
    parts = [part for module in modules_of(program) for part in module.modules()]
    return [
        part
        for part in dict.fromkeys(parts)
        if part is not program and list(part.parameters(recurse=False))
    ]


@contextmanager
def _needing_gradients(params: list[Tensor]) -> Iterator[None]:
    """Inside, gradients in these parameters are recorded."""
    flags = [param.requires_grad for param in params]
    try:
        for param in params:
            param.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for param, flag in zip(params, flags, strict=True):
            param.requires_grad_(flag)


def determines(seen: Tensor, x: Tensor) -> bool:
    """Whether what the guide is given has all of x in it.

    That is seen where x is a linear map of it, such as x itself, centred or scaled, or where each
    of its columns goes up or down with the same one of x, as logarithms do.
    """
    if seen.shape == x.shape and (torch.equal(seen, x) or _goes_with(seen, x)):
        return True
    if len(x) < 2 * (seen.shape[1] + 1):  # A fit to few rows says nothing.
        return False
    design = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=-1).double().cpu()
    wanted = x.double().cpu()
    left = wanted - design @ torch.linalg.lstsq(design, wanted, driver="gelsd").solution
    return bool((left.square().sum(dim=0) <= 1e-6 * wanted.square().sum(dim=0)).all())


def _goes_with(seen: Tensor, x: Tensor) -> bool:
    """Whether each column of one is strictly monotone in the same column of the other."""
    if len(x) < _FEW_ROWS:
        return False
    ordered, order = x.double().sort(dim=0)
    aligned = seen.double().gather(0, order)
    run, step = ordered.diff(dim=0), aligned.diff(dim=0)
    apart = run > _ROUNDING * (ordered[-1] - ordered[0])
    # Equal values of x are equal to the guide too, or it is given something else besides.
    same = step.abs() <= _STEEP * (aligned.amax(dim=0) - aligned.amin(dim=0))
    rises, falls = (torch.where(apart, sign * step > 0, same).all(dim=0) for sign in (1, -1))
    return bool((rises | falls).all())


def _mean(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), _error(values)


def _error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def _status(longer: Curve, wider: Curve, converged: bool, not_learned: bool) -> str:
    said = []
    last = "what is not learned" if not_learned else "what inputs are missing"
    if not_learned:
        said.append(
            "The guide is given all of x, so no input is missing: what is called not learned is "
            "what remained of the gap when the wide guide's steps ended. Raise steps."
        )
    if longer.improving:
        said.append(
            "The guide was still improving when its steps ended: training counts for more than is "
            "shown, and the parts below it for less. Raise steps."
        )
    elif wider.improving:
        said.append(
            "The wide guide was still improving when its steps ended: capacity counts for more "
            f"than is shown, and {last} for less. Raise steps."
        )
    if not converged:
        said.append(f"q* has not converged in some training rows: {last} would count for more.")
    return " ".join(said)


def _dataset(
    values: Mapping[str, tuple[float, float]], longer: Curve, wider: Curve, total: float, rows: int
) -> xarray.Dataset:
    import xarray

    curves = {"training": longer, "capacity": wider}
    steps = sorted({step for curve in curves.values() for step in curve.steps})
    elbo = [
        [dict(zip(c.steps, c.elbo, strict=True)).get(step, math.nan) for step in steps]
        for c in curves.values()
    ]
    out = xarray.Dataset(
        {
            "gap": ("part", [values[part][0] for part in PARTS]),
            "gap_stderr": ("part", [values[part][1] for part in PARTS]),
            "elbo": (("stage", "step"), elbo),
        },
        coords={"part": list(PARTS), "stage": list(curves), "step": steps},
        attrs={"amortization_gap": total, "rows_measured": rows},
    )
    for variable in out.data_vars.values():
        variable.attrs["units"] = "nats"
    return out
