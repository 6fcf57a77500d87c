"""The report of a comparison: one page of HTML with its figures in it.

`Comparison.to_html` and the command line write it. Nothing in the page asks for anything outside of
it, and its own policy forbids that.
"""

from __future__ import annotations

import io
import math
import platform
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppvae import plots
from ppvae.explanation import Explanation
from ppvae.generation import reconstruct
from ppvae.guides import Amortized
from ppvae.ledger import GAPS, Comparison, bound_sign
from ppvae.markup import Cell, TextTable, render
from ppvae.models import VAE
from ppvae.repairs import RepairCosts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Explanation | RepairCosts
"""What a report can hold beside the comparison."""

Drawing = Callable[["Axes"], Any]
"""Draws into the axes that it is given."""

# Dots per inch: twice those of a page, for sharp screens.
_DPI = 192
_WIDE, _HIGH = 4.4, 3.2
_LARGE = (5.6, 4.2)
_WORST = 5
_COST = "break_even"
_NAMES: dict[type, str] = {Explanation: "explanation", RepairCosts: "repairs"}
_NOT_MEASURED = {
    Explanation: "The causes of the amortization gap were not measured: ppvae.explain, or "
    "--explain on the command line.",
    RepairCosts: "What each repair brings back and costs was not measured: ppvae.repair_costs, or "
    "--repairs on the command line.",
}


# --- Pictures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A figure, drawn.

    Attributes:
        name: What its file is called, without an ending.
        title: What it shows.
        alt: The same in words, with its main figures, for those who do not see it.
        png: Its bytes.
        width: In inches.
    """

    name: str
    title: str
    alt: str
    png: bytes
    width: float

    @property
    def source(self) -> str:
        """The bytes as a page can hold them."""
        return _source(self.png)


def draw(
    name: str,
    title: str,
    alt: str,
    into: Drawing | Sequence[Drawing],
    size: tuple[float, float] = (_WIDE, _HIGH),
) -> Picture:
    """Draw a picture, without pyplot: no display is asked for.

    Args:
        name: As in `Picture`.
        title: As in `Picture`.
        alt: As in `Picture`.
        into: What draws it; of several each has axes of its own, below the one before.
        size: Width and height in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    parts = into if isinstance(into, Sequence) else [into]
    for row, part in enumerate(parts, start=1):
        part(figure.add_subplot(len(parts), 1, row))
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return Picture(name, title, alt, file.getvalue(), size[0])


def pictures(comparison: Comparison) -> list[Picture]:
    """The figures of a comparison, each of a guide's gaps for every guide.

    Gaps that are not finite cannot be drawn: a guide that has one is left out.

    Args:
        comparison: The comparison.
    """
    guides = [name for name in comparison.guides if _is_finite(comparison, name)]
    drawn = []
    if len(guides) == len(comparison.guides):
        drawn.append(
            draw(
                "gap_bars",
                "Mean gaps",
                _bars_in_words(comparison),
                lambda ax: plots.gap_bars(comparison, ax=ax),
                (max(_WIDE, 1.6 + 1.2 * len(guides)), _HIGH),
            )
        )
    for number, name in enumerate(guides):
        guide = name if comparison.several else None
        of = f" of {name}" if comparison.several else ""
        end = f"_{number}" if number else ""
        drawn.append(
            draw(
                f"gap_sorted{end}",
                f"Gaps{of}, sorted: where a curve turns up, few data carry much of the mean",
                _sorted_in_words(comparison, name),
                partial(_draw_sorted, comparison, guide),
            )
        )
        if comparison.x[0].numel() == 1:
            x = comparison.x.detach().flatten()
            drawn.append(
                draw(
                    f"gap_against_x{end}",
                    f"Gaps{of} against x",
                    _against_in_words(comparison, name, x),
                    partial(_draw_against, comparison, guide, x),
                )
            )
    drawn.append(
        draw(
            "pareto_k",
            f"k-hat of all data, sorted. {_use_of_weights(comparison)}",
            _k_hats_in_words(comparison),
            lambda ax: plots.pareto_k_sorted(comparison, ax=ax),
            _LARGE,
        )
    )
    if not math.isnan(comparison.dataset.attrs["break_even"]):
        drawn.append(
            draw(
                _COST,
                "Seconds in all against the number of data",
                f"Two lines that rise with the number of data: training once and encoding, and a "
                f"fit of q* to each. {_break_even_in_words(comparison)}",
                lambda ax: plots.break_even(comparison, ax=ax),
            )
        )
    return drawn


def _draw_sorted(comparison: Comparison, guide: str | None, ax: Axes) -> None:
    plots.gap_sorted(comparison, guide=guide, ax=ax)


def _draw_against(comparison: Comparison, guide: str | None, x: Tensor, ax: Axes) -> None:
    plots.gap_against(comparison, x, label="x", guide=guide, ax=ax)


def picture_of(result: Result) -> Picture:
    """The figure of an explanation, or of the prices of repairs."""
    if isinstance(result, Explanation):
        alt = f"Bars, one for each cause, with the figures of the table. {result.sentence()}"
        return draw(
            _NAMES[Explanation], "Causes", alt, lambda ax: plots.explanation(result, ax=ax), _LARGE
        )
    alt = "A point for each repair: its seconds against what it brings back, as in the table."
    return draw(
        _NAMES[RepairCosts], "Prices", alt, lambda ax: plots.repair_costs(result, ax=ax), _LARGE
    )


def _of_guide(comparison: Comparison, name: str) -> Any:
    ds = comparison.dataset
    return ds.sel(guide=name) if comparison.several else ds


def _is_finite(comparison: Comparison, name: str) -> bool:
    ds = _of_guide(comparison, name)
    return all(bool(np.isfinite(ds[gap]).all()) for gap in GAPS)


def _bars_in_words(comparison: Comparison) -> str:
    said = []
    for name in comparison.guides:
        parts = [f"{_words(gap)} {_mean_in_words(comparison, gap, name)}" for gap in GAPS[:2]]
        said.append(f"{name}: {', '.join(parts)}" if comparison.several else ", ".join(parts))
    return f"Bars of the mean gaps in nats a datum. {'; '.join(said)}."


def _sorted_in_words(comparison: Comparison, name: str) -> str:
    ds, said = _of_guide(comparison, name), []
    for gap in GAPS[:2]:
        least, middle, most = np.quantile(ds[gap].values, [0.0, 0.5, 1.0])
        said.append(f"{_words(gap)} from {least:.4f} to {most:.4f}, median {middle:.4f}")
    return f"Both gaps of {ds.sizes['data']} data, sorted, in nats. {'; '.join(said)}."


def _against_in_words(comparison: Comparison, name: str, x: Tensor) -> str:
    ds = _of_guide(comparison, name)
    at = int(np.argmax(ds["inference_gap"].values))
    return (
        f"Both gaps of each datum, in nats, against x from {float(x.min()):.4g} to "
        f"{float(x.max()):.4g}. The largest total gap, {float(ds['inference_gap'][at]):.4f}, is at "
        f"x = {float(x[at]):.4g}."
    )


def _k_hats_in_words(comparison: Comparison) -> str:
    ds, threshold = comparison.dataset, comparison.dataset.attrs["pareto_k_threshold"]
    above = [
        f"{name}: {int((ds['pareto_k'].sel(guide=name) > threshold).sum())}"
        for name in ds["guide"].values.tolist()
    ]
    return (
        f"A curve of k-hat for each guide and q*, sorted. Above {threshold:.2f} are, of "
        f"{ds.sizes['data']} data, {', '.join(above)}."
    )


def _use_of_weights(comparison: Comparison) -> str:
    """What k-hat judges, and which of the figures rest on that."""
    kind = comparison.dataset.attrs["evidence_kind"]
    judges = "k-hat is the shape of the upper tail of the importance weights of each guide's draws"
    above = "above the threshold what is estimated from them is not reliable"
    if kind == "iwae":
        return (
            f"{judges}: {above}. log p(x) is estimated from such weights here, and so may be short "
            f"by more than its error in rows where q* is above."
        )
    if kind == "pooled":
        return f"{judges}: {above}. log p(x) may rest on such weights in some rows."
    how = "annealed" if kind == "ais" else f"a {comparison.kind()}"
    return (
        f"{judges}. No gap on this page rests on them: log p(x) is {how}. Only where the draws "
        f"were to be reweighted would it matter: {above}."
    )


def _break_even_in_words(comparison: Comparison) -> str:
    even = comparison.dataset.attrs["break_even"]
    if not math.isfinite(even):
        return "The first is above for any number of data."
    return f"They cross at {even:,.0f} data."


def _words(gap: str) -> str:
    return gap.replace("_", " ")


# --- The worst rows -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Worst:
    """The worst rows of a guide: their figures, and each with its images."""

    guide: str
    table: TextTable
    images: list[tuple[str, list[tuple[str, str, str]]]]


def _worst(comparison: Comparison, name: str, shape: tuple[int, int] | None) -> _Worst:
    rows = comparison.worst(_WORST, name if comparison.several else None).tolist()
    ds = _of_guide(comparison, name)
    full = comparison.dataset
    family = str(ds["family"].item()) if comparison.several else full.attrs["family"]
    own = [g for g in full["guide"].values.tolist() if g not in comparison.guides]
    best = own[0] if len(own) == 1 else f"per_datapoint {family}"
    threshold = full.attrs["pareto_k_threshold"]

    def figure(variable: str, row: int, guide: str | None = None, sign: str = "") -> Cell:
        value, error = full[variable], full[f"{variable}_stderr"]
        if guide is not None and "guide" in value.dims:
            value, error = value.sel(guide=guide), error.sel(guide=guide)
        return Cell(f"{sign}{round(float(value[row]), 4) + 0.0:.4f}", f"± {float(error[row]):.4f}")

    def k_hat(row: int, guide: str) -> Cell:
        k = float(full["pareto_k"].sel(guide=guide)[row])
        if not math.isfinite(k):
            return Cell("–", "equal weights" if k < 0 else "")
        return Cell(f"{k:.2f}", f"above {threshold:.2f}" if k > threshold else "")

    table = TextTable(
        (
            *("row", "total gap", "approximation gap", "amortization gap", "log p(x)"),
            *("ELBO, guide", "ELBO, q*", "k-hat, guide", "k-hat, q*", "q* converged", "steps"),
        ),
        [
            (
                Cell(str(comparison.number(row))),
                *(
                    figure(gap, row, name, bound_sign(ds[f"{gap}_bound"].values[row]))
                    for gap in ("inference_gap", "approximation_gap", "amortization_gap")
                ),
                figure("log_evidence", row),
                figure("elbo", row, name),
                figure("elbo", row, best),
                k_hat(row, name),
                k_hat(row, best),
                Cell("yes" if bool(ds["converged"][row]) else "no"),
                Cell(str(int(ds["steps"][row]))),
            )
            for row in rows
        ],
    )
    return _Worst(name, table, _images(comparison, name, rows, shape))


def _images(
    comparison: Comparison, name: str, rows: list[int], shape: tuple[int, int] | None
) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """The caption of each row, and of each of its images what it is, its words and its source."""
    if shape is None:
        return []
    guide, x = comparison.guides[name], comparison.x[rows]
    shown = {"image": x}
    if isinstance(comparison.model, VAE) and isinstance(guide, Amortized):
        means = reconstruct(comparison.model, guide, x)
        if means.dim() == 2:  # Categories have no mean that could be drawn as grey.
            shown["reconstruction"] = means
    found = []
    for at, row in enumerate(rows):
        number = comparison.number(row)
        ds = _of_guide(comparison, name)
        gap, error = (float(ds[v][row]) for v in ("inference_gap", "inference_gap_stderr"))
        sign = bound_sign(ds["inference_gap_bound"].values[row])
        pieces = [
            (what, f"{what} of row {number}", _source(_grey(values[at].reshape(shape))))
            for what, values in shown.items()
        ]
        found.append((f"row {number}: {sign}{gap:.4f} ± {error:.4f}", pieces))
    return found


def _grey(image: Tensor) -> bytes:
    """An image as `ppvae.plots` draws it: 0 is white and 1 black."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    pixels = image.detach().cpu().double().numpy()
    imsave(file, pixels, format="png", cmap="gray_r", vmin=0, vmax=1)
    return file.getvalue()


def _source(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"


def _image_shape(x: Tensor, given: Sequence[int] | None) -> tuple[int, int] | None:
    """Height and width of the rows, where they are images."""
    event = tuple(x.shape[1:])
    if given is None:
        is_image = len(event) == 2 or (len(event) == 3 and event[0] == 1)
        return (event[-2], event[-1]) if is_image else None
    if len(given) != 2 or math.prod(given) != x[0].numel():
        raise ValueError(
            f"image_shape: expected the height and width of an image of {x[0].numel()} pixels, as "
            f"the rows have shape {event}; got {tuple(given)}."
        )
    return int(given[0]), int(given[1])


# --- The page -----------------------------------------------------------------------------------


def write_page(
    path: str | Path,
    comparison: Comparison,
    *,
    image_shape: Sequence[int] | None = None,
    results: Sequence[Result] = (),
    settings: Mapping[str, Any] | None = None,
    origin: str = "",
    figures: Sequence[Picture] | None = None,
) -> Path:
    """Write the report of a comparison.

    Args:
        path: Where to; a file that is there is replaced.
        comparison: The comparison.
        image_shape: As in `Comparison.to_html`.
        results: As in `Comparison.to_html`.
        settings: As in `Comparison.to_html`.
        origin: As in `Comparison.to_html`.
        figures: The figures; `pictures` of the comparison and `picture_of` each result if left
            out.

    Returns:
        The path.

    Raises:
        ValueError: If the rows do not have as many elements as ``image_shape`` says.
    """
    shape = _image_shape(comparison.x, image_shape)
    if figures is None:
        figures = [*pictures(comparison), *(picture_of(result) for result in results)]
    by_name = {picture.name: picture for picture in figures}
    sections = [
        (*_in_words(result), result.table(), by_name[_NAMES[type(result)]]) for result in results
    ]
    x, attrs = comparison.x, comparison.dataset.attrs
    of_rows = {
        "rows": len(x),
        "shape of a row": tuple(x.shape[1:]),
        "dtype": str(x.dtype).removeprefix("torch."),
        "device": x.device,
        "model": _model(comparison),
    }
    page = render(
        "report.html",
        comparison=comparison,
        subject=_subject(comparison, origin),
        losses=_losses(comparison),
        prices=_prices(comparison),
        figures=[each for each in figures if each.name not in (*_NAMES.values(), _COST)],
        cost=by_name.get(_COST),
        sections=sections,
        missing=[said for kind, said in _NOT_MEASURED.items() if kind not in map(type, results)],
        worst=[_worst(comparison, name, shape) for name in comparison.guides],
        settings=[
            ("Of the comparison", _listed(of_rows | attrs)),
            *([("Of the run", _listed(settings))] if settings else []),
            ("Versions", _listed(versions())),
        ],
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _model(comparison: Comparison) -> str:
    model = comparison.model
    return str(getattr(model, "__name__", type(model).__name__))


def _subject(comparison: Comparison, origin: str) -> list[tuple[str, str]]:
    """What was compared: the model, the guides, and which rows."""
    ds = comparison.dataset
    if comparison.several:
        guides = [f"{name}, {ds['family'].sel(guide=name).item()}" for name in comparison.guides]
    else:
        guides = [ds.attrs["guide_family"]]
    rows = f"{ds.sizes['data']:,}" + (f", {origin}" if origin else "")
    return [
        ("Model", _model(comparison)),
        ("Guides" if comparison.several else "Guide", "; ".join(guides)),
        ("Rows", rows),
    ]


def _in_words(result: Result) -> tuple[str, list[str]]:
    if isinstance(result, Explanation):
        return "Causes of the amortization gap", result.said()
    return "Repairs and their prices", result.sentences()


def _losses(comparison: Comparison) -> list[str]:
    """What each guide loses."""
    said = []
    for name in comparison.guides:
        of = f" {name}" if comparison.several else ""
        total, approximation, amortization = (
            _mean_in_words(comparison, gap, name)
            for gap in ("inference_gap", "approximation_gap", "amortization_gap")
        )
        said.append(
            f"The ELBO of the guide{of} is {total} nats a datum below log p(x): {approximation} by "
            f"approximation, {amortization} by amortization."
        )
    return said


def _prices(comparison: Comparison) -> list[str]:
    """What a fit of each datum in the place of each guide brings and costs."""
    said, count, attrs = [], len(comparison.x), comparison.dataset.attrs
    for name in comparison.guides:
        one = _of_guide(comparison, name)
        family = str(one["family"].item()) if comparison.several else attrs["family"]
        seconds = comparison.local_fits[family].seconds
        of = f" {name}" if comparison.several else ""
        said.append(
            f"A fit of q* ({family}) to each datum, in the place of the guide{of}, brings back "
            f"{_mean_in_words(comparison, 'amortization_gap', name)} nats a datum. It took "
            f"{1000 * seconds / count:.3g} ms a datum, {count} at a time."
        )
    return [*said, comparison.break_even()] if math.isfinite(attrs["break_even"]) else said


def _mean_in_words(comparison: Comparison, gap: str, name: str) -> str:
    mean, error = comparison.mean(gap, name if comparison.several else None)
    sign = bound_sign(_of_guide(comparison, name)[f"{gap}_bound"].values)
    return f"{sign}{round(mean, 4) + 0.0:.4f} ± {error:.4f}"


def versions() -> dict[str, str]:
    """The versions of what the figures come from."""
    return {
        "ppvae": version("ppvae"),
        "torch": torch.__version__,
        "pyro": version("pyro-ppl"),
        "python": platform.python_version(),
    }


def _listed(values: Mapping[str, Any]) -> TextTable:
    return TextTable(
        ("setting", "value"),
        [
            (str(key), f"{value:.6g}" if isinstance(value, float) else str(value))
            for key, value in values.items()
        ],
    )
