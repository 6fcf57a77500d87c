"""What the ELBO is after which time: an encoder that trains, and fits to each datum."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from ppvae.comparison import paired_weights, seconds_to_encode
from ppvae.density import Program, check_count, check_pair, judging
from ppvae.evidence import Estimate, elbo_of, exact_evidence
from ppvae.explanation import check_same_kind
from ppvae.families import Family
from ppvae.guides import PerDatapoint, per_datapoint
from ppvae.isolation import evaluation_mode, private_store
from ppvae.local import LocalFit, fit_per_datapoint
from ppvae.training import fit

if TYPE_CHECKING:
    import xarray

MODES = ("amortized", "per datapoint", "from the encoder")
# A clock is read this often where what it times takes next to no time.
_REPEATS = 3


@dataclass(frozen=True)
class ElboAgainstTime:
    """ELBOs of the same rows after growing times, for amortized and per-datapoint inference.

    Attributes:
        dataset: An `xarray.Dataset` over ``point``: ``elbo`` and its Monte Carlo error
            ``elbo_stderr``, means over the rows in nats per datum, all on common random numbers;
            ``seconds`` until these rows had that ELBO, without the time that it took to estimate
            it; ``effort``, training steps or the most evaluations that a row took; and ``mode``:
            ``"amortized"``, ``"per datapoint"`` (cold) and ``"from the encoder"`` (per datapoint,
            after the whole training). Attributes: ``rows``, ``rows_trained_on``,
            ``seconds_encoding`` of all rows, ``evidence`` and ``evidence_stderr`` (NaN where it is
            not known), ``evidence_bound`` (``"exact"``, or its side), ``converged`` (the share of
            rows in which the last cold fit was), ``family``, ``num_samples``, ``seed`` and
            ``status``.
    """

    dataset: xarray.Dataset

    def __repr__(self) -> str:
        ds = self.dataset
        lines = [f"ELBO of {ds.attrs['rows']} rows, in nats a datum, and the seconds until then:"]
        for mode in MODES:
            last = ds.isel(point=ds["mode"].values == mode).isel(point=-1)
            lines.append(
                f"  {mode:<18}{float(last['elbo']):10.4f} ± {float(last['elbo_stderr']):.4f} after "
                f"{float(last['seconds']):.3g} s"
            )
        if math.isfinite(ds.attrs["evidence"]):
            side = {"lower": " ≥", "upper": " ≤"}.get(ds.attrs["evidence_bound"], "")
            lines.append(f"  {'log p(x)' + side:<18}{ds.attrs['evidence']:10.4f}")
        return "\n".join([*lines, ds.attrs["status"]])


@dataclass(frozen=True)
class _Point:
    """A guide, which ELBO is to be estimated, and what it cost to come by it."""

    mode: str
    effort: int
    seconds: float
    guide: Program


def elbo_against_time(
    model: Program,
    guide: Program,
    x_train: Tensor,
    x: Tensor,
    *,
    loss: ELBO | None = None,
    steps: int = 2000,
    batch_size: int = 128,
    lr: float = 1e-3,
    evidence: Estimate | None = None,
    num_samples: int = 200,
    seed: int = 0,
) -> ElboAgainstTime:
    r"""The ELBO of held-out rows against wall time, amortized and datum by datum.

    Both modes maximise the same ELBO of the same model, which is held fixed in eval mode, in the
    guide's own family:

    - *amortized*: a copy of the guide trains on ``x_train`` and then encodes ``x``. Each point is a
      `ppvae.fit` of its own of 0, 1, 2, 4, … and ``steps`` steps, all with the same start and
      seed, so that they lie on one way of training. Seconds: of that fit, and of encoding ``x``.
    - *per datapoint*: `ppvae.fit_per_datapoint` on all of ``x`` at once, cold, with a budget of
      1, 2, 4, … evaluations for a row and climb, and without a budget last. Each point is a fit of
      its own. Seconds: of that fit.
    - *from the encoder*: the same, begun at the output of the trained copy. Seconds: of the whole
      training, and of that fit.

    Seconds are those of this machine, with nothing counted for estimating ELBOs. Per datapoint they
    grow with the number of rows, and amortized they hardly do: `ppvae.plots.break_even` draws that.
    Training the model is not counted, as both modes need it.

    Args:
        model: A trained Pyro model with one local plate over the rows, called as ``model(x)``.
        guide: A module that is a Pyro guide, as it is before its training. Neither it nor the model
            is changed.
        x_train: The rows that the guide is trained on, ``(num_train, *event)``.
        x: Other rows, ``(batch, *event)``, on which all ELBOs are estimated.
        loss: The objective of the training, as in `ppvae.fit`.
        steps: Steps of the longest training.
        batch_size: Rows per step.
        lr: Adam's learning rate.
        evidence: log p(x) of the rows ``x``, for comparison; where the model has a closed form,
            that is taken if left out.
        num_samples: Draws per row for each ELBO.
        seed: Seed of all draws; the caller's generators are left as they were.

    Returns:
        The points; `ppvae.plots.elbo_against_time` draws them.

    Raises:
        ValueError: If the rows or the pair are unfit, the rows of the two sets differ in kind, the
            guide is no module, keeps parameters for each datum or cannot be freed (the site is
            named), or a program keeps parameters of its own in Pyro's store.

    Example:
        >>> from ppvae import pairs
        >>> model, guide = pairs.factor_analysis(x_dim=3, z_dim=1)
        >>> x = model(size=120).detach()
        >>> found = elbo_against_time(model, guide, x[:100], x[100:], steps=4)
        >>> found.dataset["effort"].values[:4]  # training steps
        array([0, 1, 2, 4])
    """
    check_count("steps", steps)
    check_count("num_samples", num_samples, least=2)
    check_same_kind(x, x_train, model, guide)
    _check(model, guide, x, evidence, seed)
    points: list[_Point] = []
    status: list[str] = []
    converged: dict[str, float] = {}
    fresh = copy.deepcopy(guide)  # Before the model, which may hold the encoder too, is frozen.
    with private_store(), evaluation_mode(model):

        def train(count: int) -> tuple[Program, float]:
            copied, seconds = copy.deepcopy(fresh), 0.0
            if count:
                run = fit(
                    model,
                    copied,
                    x_train,
                    loss=loss,
                    steps=count,
                    batch_size=batch_size,
                    lr=lr,
                    seed=seed,
                    progress=False,
                )
                seconds = run.seconds
                if not run.completed:
                    status.append(f"training of {count} steps: {run.status}")
            return copied, seconds

        train(1)  # The first run of a process loads parts of torch.
        status.clear()
        for count in (0, *_growing(steps), steps):
            trained, seconds = train(count)
            encoding = min(seconds_to_encode(trained, x) for _ in range(_REPEATS))
            points.append(_Point("amortized", count, seconds + encoding, trained))
        families = per_datapoint(trained, x, model=model).families
        for mode, init, before in (
            ("per datapoint", None, 0.0),
            ("from the encoder", trained, seconds),
        ):
            for done in _fits(model, families, x, seed, init):
                spent = before + done.seconds
                points.append(_Point(mode, int(done.steps.max()), spent, done.guide))
            status.append(f"{mode}: {done.status}")
            converged[mode] = float(done.converged.double().mean())
    weights = paired_weights(
        model, {str(i): point.guide for i, point in enumerate(points)}, x, num_samples, seed + 2
    )
    elbos = [elbo_of(weights[str(i)]) for i in range(len(points))]
    if evidence is None:
        with judging(seed, x, model), torch.no_grad():
            evidence = exact_evidence(model, x)
    return ElboAgainstTime(
        _dataset(
            points,
            elbos,
            evidence,
            {
                "rows": len(x),
                "rows_trained_on": len(x_train),
                "seconds_encoding": encoding,
                "converged": converged["per datapoint"],
                "family": ", ".join(repr(family) for family in families.values()),
                "num_samples": num_samples,
                "seed": seed,
                "status": "; ".join(status),
            },
        )
    )


def _check(model: Program, guide: Program, x: Tensor, evidence: Estimate | None, seed: int) -> None:
    if not isinstance(guide, nn.Module):
        raise ValueError(
            f"guide: expected a module, of which a copy can be trained; got "
            f"{type(guide).__name__}. Make it a PyroModule."
        )
    if isinstance(guide, PerDatapoint):
        raise ValueError(
            "guide: a PerDatapoint guide keeps parameters for each datum, so that nothing is "
            "amortized. Give a guide with an encoder."
        )
    if evidence is not None and evidence.value.shape != (len(x),):
        raise ValueError(
            f"evidence: expected a figure for each of the {len(x)} rows of x; got shape "
            f"{tuple(evidence.value.shape)}."
        )
    per_datapoint(guide, x, model=model)
    with judging(seed, x, model, guide), torch.no_grad():
        check_pair(model, guide, x)
        # A parameter that no module holds would be trained in its place in the store.
        store = pyro.get_param_store()
        store.clear()
        for program in (model, guide):
            program(x)
        kept = store.get_state()["params"]
        bare = [name for name, p in kept.items() if not isinstance(p, nn.Parameter)]
    if bare:
        raise ValueError(
            f"model, guide: expected parameters in modules, of which copies can be trained; got "
            f"{bare} in Pyro's store. Make them attributes of a PyroModule."
        )


def _growing(most: int) -> Iterator[int]:
    """The powers of 2 below a number."""
    count = 1
    while count < most:
        yield count
        count *= 2


def _fits(
    model: Program, families: Mapping[str, Family], x: Tensor, seed: int, init: Program | None
) -> Iterator[LocalFit]:
    """Fits with growing budgets, the last one without."""

    def run(most: int | None) -> LocalFit:
        return fit_per_datapoint(
            model, families, x, init=init, max_steps=most, num_samples=2, seed=seed
        )

    # It also loads what the first fit of a process loads.
    whole = run(None)
    before = torch.zeros_like(whole.steps)
    for most in _growing(int(whole.steps.max())):
        done = run(most)
        if bool((done.steps >= whole.steps).all()):
            break
        if not torch.equal(done.steps, before):  # The first round is made at any budget.
            yield done
        before = done.steps
    yield run(None)


def _dataset(
    points: Sequence[_Point],
    elbos: Sequence[Estimate],
    evidence: Estimate | None,
    attrs: Mapping[str, Any],
) -> xarray.Dataset:
    import xarray

    known = (
        {"evidence": math.nan, "evidence_stderr": math.nan, "evidence_bound": "unknown"}
        if evidence is None
        else {
            "evidence": evidence.mean,
            "evidence_stderr": evidence.mean_stderr,
            "evidence_bound": evidence.bound,
        }
    )
    out = xarray.Dataset(
        {
            "elbo": ("point", [each.mean for each in elbos]),
            "elbo_stderr": ("point", [each.mean_stderr for each in elbos]),
            "seconds": ("point", [point.seconds for point in points]),
            "effort": ("point", [point.effort for point in points]),
            "mode": ("point", [point.mode for point in points]),
        },
        attrs=known | dict(attrs),
    )
    for name, unit in (("elbo", "nats"), ("elbo_stderr", "nats"), ("seconds", "s")):
        out[name].attrs["units"] = unit
    return out
