"""What a run of the command line leaves in its folder: the ledger, the settings, the figures."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ppvae import plots
from ppvae.explanation import Explanation
from ppvae.ledger import Comparison
from ppvae.local import fit_per_datapoint
from ppvae.preparing import Rows, Settings
from ppvae.repairs import RepairCosts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What any run writes: an earlier run's files must not stand beside this one's.
_WRITTEN = (
    *("ledger.nc", "settings.json", "toy_posterior.png", "gap_against_x.png", "gap_bars.png"),
    *("gap_sorted.png", "samples.png", "reconstructions.png", "latent_scatter.png"),
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
    comparison: Comparison,
    results: Mapping[str, Explanation | RepairCosts],
    out: Path,
) -> list[str]:
    """Write all that a run leaves behind, in the place of an earlier run's files.

    Returns:
        The names of the files.
    """
    clear(out)
    written = [_write_ledger(comparison, out), write_settings(settings, rows, out)]
    written += _write_figures(settings, model, guide, rows, comparison, out)
    for name, result in results.items():
        written += _write_result(name, result, out)
    return [path.name for path in written]


def _write_result(name: str, result: Explanation | RepairCosts, out: Path) -> list[Path]:
    """The figures behind a table as a data set and as a picture."""
    path = out / f"{name}.nc"
    result.dataset.to_netcdf(path, engine="h5netcdf")
    figure, (ax,) = _figure((6.5, 4.2))
    if isinstance(result, Explanation):
        plots.explanation(result, ax=ax)
    else:
        plots.repair_costs(result, ax=ax)
    return [path, _save(figure, out / f"{name}.png")]


def _write_ledger(comparison: Comparison, out: Path) -> Path:
    path = out / "ledger.nc"
    comparison.dataset.to_netcdf(path, engine="h5netcdf")
    return path


def record(settings: Settings, rows: Rows) -> dict[str, Any]:
    """The settings with the rows, the device and the versions that they met."""
    device = torch.device(settings.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return asdict(settings) | {
        "rows_trained_on": len(rows.train) if settings.steps else 0,
        "rows_compared": len(rows.test),
        "device_name": name or platform.machine(),
        "versions": {
            "ppvae": version("ppvae"),
            "torch": torch.__version__,
            "pyro": version("pyro-ppl"),
            "python": platform.python_version(),
        },
    }


def write_settings(settings: Settings, rows: Rows, out: Path) -> Path:
    """Write `record` as settings.json."""
    path = out / "settings.json"
    path.write_text(json.dumps(record(settings, rows), indent=2) + "\n", encoding="utf-8")
    return path


def _write_figures(
    settings: Settings, model: Any, guide: Any, rows: Rows, comparison: Comparison, out: Path
) -> list[Path]:
    draw: dict[str, tuple[tuple[float, float], Callable[[Axes], Axes]]] = {
        "gap_bars": ((3.6, 3.4), lambda ax: plots.gap_bars(comparison, ax=ax)),
        "gap_sorted": ((5.5, 3.8), lambda ax: plots.gap_sorted(comparison, ax=ax)),
    }
    written = []
    if settings.model == "exponential-gaussian":
        draw["gap_against_x"] = (
            (5.5, 3.8),
            lambda ax: plots.gap_against(comparison, rows.test, label="x", ax=ax),
        )
        written.append(_write_toy(model, guide, settings, out))
    if settings.model == "vae":
        draw |= _vae_figures(model, guide, rows)
    for name, (size, into) in draw.items():
        figure, (ax,) = _figure(size)
        into(ax)
        written.append(_save(figure, out / f"{name}.png"))
    return written


def _vae_figures(
    model: Any, guide: Any, rows: Rows
) -> dict[str, tuple[tuple[float, float], Callable[[Axes], Axes]]]:
    draw: dict[str, tuple[tuple[float, float], Callable[[Axes], Axes]]] = {}
    shape, test = rows.event_shape, rows.all_test
    assert test is not None
    if shape is not None:
        draw["samples"] = ((5, 3.4), lambda ax: plots.samples(model, shape, ax=ax))
        draw["reconstructions"] = (
            (6, 1.4),
            lambda ax: plots.reconstructions(model, guide, rows.test[:10], shape, ax=ax),
        )
    if model.z_dim == 2:
        draw["latent_scatter"] = (
            (5, 5),
            lambda ax: plots.latent_scatter(guide, test, rows.labels, ax=ax),
        )
        if shape is not None:
            draw["latent_grid"] = ((5, 5), lambda ax: plots.latent_grid(model, shape, ax=ax))
    return draw


def _write_toy(model: Any, guide: Any, settings: Settings, out: Path) -> Path:
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

    figure, axes = _figure((9, 3.8), columns=2)
    for row, ax in enumerate(axes):
        plots.toy_posterior(x, guide, local, row=row, ax=ax)
    return _save(figure, out / "toy_posterior.png")


def _figure(size: tuple[float, float], columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    # A figure of its own, without pyplot: no display is asked for.
    figure = Figure(figsize=size, layout="constrained")
    return figure, [figure.add_subplot(1, columns, 1 + index) for index in range(columns)]


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
