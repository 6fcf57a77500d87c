"""What was measured of gradient estimators, and how it is said."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import xarray

PROGRAMS = ("model", "guide", "shared")
"""The groups that hold all parameters of a program, or of both."""


@dataclass(frozen=True)
class GradientVariance:
    """What the gradient estimators of a pair are worth, on given rows.

    Variances compare only between estimators of one ``target``: others estimate another gradient.

    Attributes:
        dataset: An `xarray.Dataset` over ``estimator`` and ``group``: ``variance``,
            ``gradient_norm``, ``snr`` and ``variance_cost``; over ``estimator`` alone ``cost``, in
            seconds, and ``relative_cost``; each with a ``…_stderr``. Gradients are per datum, in
            nats per unit of the parameter. Coordinates: the ``target`` of each estimator and its
            ``num_particles``; of each group its ``num_elements`` and the ``program`` that it
            belongs to. The settings are in the attributes.
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
        particles = ds["num_particles"].values.tolist()
        if len(set(zip(ds["target"].values.tolist(), particles, strict=True))) > len(targets):
            lines.append(
                "Some average more particles than others, here up to "
                f"{max(particles)}: compare with as many for all before you choose."
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
