"""What a run of the command line leaves in its folder: the ledger, the report, the figures."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppvae import plots
from ppvae.explanation import Explanation
from ppvae.ledger import Comparison
from ppvae.local import LocalFit, fit_per_datapoint
from ppvae.pages import Drawing, Picture, draw, picture_of, pictures, versions, write_page
from ppvae.preparing import Rows, Settings
from ppvae.repairs import RepairCosts
from ppvae.training import Fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What any run writes: an earlier run's files must not stand beside this one's.
_WRITTEN = (
    *("ledger.nc", "settings.json", "report.html", "toy_posterior.png", "gap_against_x.png"),
    *("pareto_k.png", "break_even.png"),
    *("gap_bars.png", "gap_sorted.png", "samples.png", "reconstructions.png", "latent_scatter.png"),
    *("latent_grid.png", "explanation.png", "explanation.nc", "repairs.png", "repairs.nc"),
)


def make_folder(out: Path) -> None:
    """Make the folder, or say in one line why it cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out {out}: cannot write into this folder ({error.strerror})."
        ) from error


def clear(out: Path) -> None:
    """Remove what an earlier run has written; its results are not those of this one."""
    for name in _WRITTEN:
        (out / name).unlink(missing_ok=True)


def write(
    settings: Settings,
    model: Any,
    guide: Any,
    rows: Rows,
    training: Fit | None,
    comparison: Comparison,
    results: Mapping[str, Explanation | RepairCosts],
    out: Path,
) -> list[str]:
    """Write all that a run leaves behind, in the place of an earlier run's files.

    Returns:
        The names of the files.
    """
    clear(out)
    written = [_write_ledger(comparison, out), write_settings(settings, rows, training, out)]
    figures = _write_figures(settings, model, guide, rows, comparison, out)
    for name, result in results.items():
        path = out / f"{name}.nc"
        result.dataset.to_netcdf(path, engine="h5netcdf")
        written.append(path)
        figures.append(_write_picture(picture_of(result), out))
    written += [_path(figure, out) for figure in figures]
    known = record(settings, rows, training)
    page = write_page(
        out / "report.html",
        comparison,
        image_shape=rows.event_shape,
        results=list(results.values()),
        settings={k: v for k, v in known.items() if k != "versions"},
        origin=rows.origin,
        figures=figures,
    )
    return [path.name for path in (page, *written)]


def _write_ledger(comparison: Comparison, out: Path) -> Path:
    path = out / "ledger.nc"
    comparison.dataset.to_netcdf(path, engine="h5netcdf")
    return path


def record(settings: Settings, rows: Rows, training: Fit | None) -> dict[str, Any]:
    """The settings with the rows, the training, the device and the versions that they met."""
    device = torch.device(settings.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return asdict(settings) | {
        "rows_trained_on": len(rows.train) if settings.steps else 0,
        "rows_compared": len(rows.test),
        "training_status": "not trained" if training is None else training.status,
        "training_steps": 0 if training is None else training.steps,
        "device_name": name or platform.machine(),
        "versions": versions(),
    }


def write_settings(settings: Settings, rows: Rows, training: Fit | None, out: Path) -> Path:
    """Write `record` as settings.json."""
    path = out / "settings.json"
    path.write_text(json.dumps(record(settings, rows, training), indent=2) + "\n", encoding="utf-8")
    return path


def _write_figures(
    settings: Settings, model: Any, guide: Any, rows: Rows, comparison: Comparison, out: Path
) -> list[Picture]:
    """Draw the comparison and the model, each figure into a file of its own, and give them back."""
    figures = [*pictures(comparison), *_figures_of_model(settings, model, guide, rows)]
    return [_write_picture(figure, out) for figure in figures]


def _write_picture(picture: Picture, out: Path) -> Picture:
    _path(picture, out).write_bytes(picture.png)
    return picture


def _path(picture: Picture, out: Path) -> Path:
    return out / f"{picture.name}.png"


def _figures_of_model(settings: Settings, model: Any, guide: Any, rows: Rows) -> list[Picture]:
    if settings.model == "exponential-gaussian":
        return [_toy(model, guide, settings)]
    return _vae_figures(model, guide, rows) if settings.model == "vae" else []


def _vae_figures(model: Any, guide: Any, rows: Rows) -> list[Picture]:
    drawn = []
    shape, test = rows.event_shape, rows.all_test
    assert test is not None

    def add(name: str, title: str, alt: str, size: tuple[float, float], into: Drawing) -> None:
        drawn.append(draw(name, title, alt, into, size))

    if shape is not None:
        add(
            "samples",
            "What the model draws",
            "A sheet of images: means of x for draws of z from the prior.",
            (5.0, 3.4),
            lambda ax: plots.samples(model, shape, ax=ax),
        )
        add(
            "reconstructions",
            "The first rows, and what the model makes of them",
            f"The first {len(rows.test[:10])} images above their reconstructions.",
            (6.0, 1.4),
            lambda ax: plots.reconstructions(model, guide, rows.test[:10], shape, ax=ax),
        )
    if model.z_dim == 2:
        add(
            "latent_scatter",
            "Means of q(z | x)",
            "The means of q(z | x) of the test rows in the plane of the latent.",
            (5.0, 5.0),
            lambda ax: plots.latent_scatter(guide, test, rows.labels, ax=ax),
        )
        if shape is not None:
            add(
                "latent_grid",
                "The latent, decoded",
                "Means of x over a grid of the latent, spaced evenly in the prior.",
                (5.0, 5.0),
                lambda ax: plots.latent_grid(model, shape, ax=ax),
            )
    return drawn


def _draw_toy(x: Tensor, guide: Any, local: LocalFit, row: int, ax: Axes) -> None:
    plots.toy_posterior(x, guide, local, row=row, ax=ax)


def _toy(model: Any, guide: Any, settings: Settings) -> Picture:
    x = torch.tensor([1.5, 0.0], device=settings.device)
    local = fit_per_datapoint(
        model,
        None,
        x,
        init=guide,
        max_steps=settings.max_steps,
        seed=settings.seed,
        progress=False,
    )
    return draw(
        "toy_posterior",
        "Guide, best per datum and exact posterior",
        "Densities of z for x = 1.5, above, and x = 0, below: the exact posterior, the "
        "guide, and the best member of its family for that datum.",
        [partial(_draw_toy, x, guide, local, row) for row in range(len(x))],
        (4.4, 6.2),
    )
