"""The report, and what notebooks show: the data set's own figures, and no request for more."""

import io
import math
import re
import shutil
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppvae
from ppvae import pages, pairs
from ppvae.families import DiagonalNormal, Gamma
from ppvae.generation import reconstruct
from ppvae.guides import Amortized
from ppvae.isolation import forked_rng

GAPS = ("approximation_gap", "amortization_gap", "inference_gap")
ODD = '<b>&"x"</b>'
# A colour map has 256 of them, and so has a picture.
SHADES = 2 / 255
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Page(HTMLParser):
    """Tables as text, images, and every tag with its attributes; unclosed tags are errors."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.text = source, ""
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            row = self.tables[-1][-1]
            row[-1] = " ".join(row[-1].split())

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def table(self, *names: str) -> dict[str, list[str]]:
        """Rows of the only table whose header has these columns, by the text of the first cell."""
        (found,) = [t for t in self.tables if set(names) <= set(t[0])]
        return {row[0]: row[1:] for row in found[1:]}

    def images(self) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == "img"]


def numbers(cell: str) -> list[float]:
    return [float(n) for n in re.findall(r"-?\d+\.\d+|-?inf|nan", cell)]


def mean(ds: Any, name: str) -> tuple[float, float]:
    value, stderr = ds[name].values.astype(float), ds[f"{name}_stderr"].values.astype(float)
    return value.mean(), math.sqrt((stderr**2).sum()) / len(value)


def assert_shown(cell: str, *expected: float) -> None:
    """The first figures of a cell are these, to the digits that it shows and float32 has."""
    assert numbers(cell)[: len(expected)] == pytest.approx(expected, abs=5.1e-5, rel=2e-6)


def numbered(comparison: ppvae.Comparison) -> ppvae.Comparison:
    """With rows numbered from 100 on, as those of a file might be."""
    named = comparison.dataset.assign_coords(row=("data", np.arange(100, 109)))
    return replace(comparison, dataset=named)


@pytest.fixture(scope="module")
def toy() -> ppvae.Comparison:
    with forked_rng(0):
        model, guide = pairs.exponential_gaussian()
    return numbered(ppvae.compare(model, guide, torch.linspace(-1, 4, 9), num_samples=100))


@pytest.fixture(scope="module")
def several() -> ppvae.Comparison:
    with forked_rng(1):
        model, guide = pairs.exponential_gaussian()
        guides = {ODD: guide, "other": pairs.exponential_gaussian(Gamma())[1]}
    return numbered(ppvae.compare(model, guides, torch.linspace(-1, 4, 9), num_samples=100))


@pytest.fixture(scope="module")
def vae() -> ppvae.Comparison:
    """Of one evaluation a row, so that some have not converged, and of a bounded evidence."""
    with forked_rng(2):
        model, guide = pairs.vae(x_dim=12, z_dim=3, hidden=[8])
        x = (torch.rand(9, 12) > 0.5).to(torch.get_default_dtype())
    comparison = ppvae.compare(
        model, guide, x, num_samples=100, evidence_samples=200, max_steps=1, seed=1
    )
    return numbered(comparison)


@pytest.fixture(scope="module")
def paths(
    toy: ppvae.Comparison,
    several: ppvae.Comparison,
    vae: ppvae.Comparison,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """The report of each."""
    folder = tmp_path_factory.mktemp("reports")
    return {
        "toy": toy.to_html(
            folder / "toy.html", settings={"learning rate": 0.25}, origin="of a ramp"
        ),
        "several": several.to_html(folder / "several.html", settings={ODD: "a" * 80}),
        "vae": vae.to_html(folder / "vae.html", image_shape=(4, 3)),
    }


@pytest.fixture(scope="module")
def shown(paths: dict[str, Path]) -> dict[str, Page]:
    return {name: Page(path.read_text(encoding="utf-8")) for name, path in paths.items()}


# --- Figures -----------------------------------------------------------------------------------


def test_the_table_of_one_guide_has_the_means_errors_and_spreads(
    toy: ppvae.Comparison, shown: dict[str, Page]
) -> None:
    page, ds = shown["toy"], toy.dataset
    table = page.table("mean ± error", "sd")
    rows = {
        "log p(x)": (ds, "log_evidence"),
        "ELBO, best per datum, q*": (ds.sel(guide="per_datapoint"), "elbo"),
        "ELBO, your guide": (ds.sel(guide="amortized"), "elbo"),
        "gap, approximation": (ds, "approximation_gap"),
        "gap, amortization": (ds, "amortization_gap"),
        "gap, total": (ds, "inference_gap"),
    }
    assert list(table) == list(rows)
    for label, (of, name) in rows.items():
        assert_shown(table[label][0], *mean(of, name))
        assert float(table[label][1]) == pytest.approx(float(of[name].std()), abs=5.1e-4)
        if name in GAPS:
            beyond = np.maximum(2 * of[f"{name}_stderr"].values, 1e-4)
            above = int((of[name].values > beyond).sum())
            note = table[label][0].partition(" ± ")[2].partition(" ")[2]
            assert note.startswith(f"clearly above 0 in {above} of 9")
            assert note in str(toy)
    assert toy.verdict() in page.text
    # The same figures stand beside the verdict and in the words of the picture.
    total, error = mean(ds, "inference_gap")
    assert f"is {total:.4f} ± {error:.4f} nats a datum below log p(x)" in page.text
    bars = next(str(i["alt"]) for i in page.images() if "Bars" in str(i["alt"]))
    assert_shown(bars, *mean(ds, "approximation_gap"), *mean(ds, "amortization_gap"))


def test_the_table_of_several_guides(several: ppvae.Comparison, shown: dict[str, Page]) -> None:
    page, ds = shown["several"], several.dataset
    table = page.table("approximation", "amortization", "total", "active")
    assert list(table) == ["log p(x) closed form", *ds["guide"].values]
    for name in ds["guide"].values:
        one, (family, elbo, *gaps, units) = ds.sel(guide=name), table[name]
        assert family == one["family"].item()
        assert_shown(elbo, *mean(one, "elbo"))
        assert units == f"{float(one['active_units']):.0f} of 1"
        for gap, cell in zip(GAPS, gaps, strict=True):
            if gap == "amortization_gap" and one["source"] == "per_datapoint":
                assert cell == "–"
            else:
                assert_shown(cell, *mean(one, gap))
                assert f"sd {float(one[gap].std()):.3f}" in cell
    assert several.verdict() in page.text


@pytest.mark.parametrize("kind", ["toy", "vae", "several"])
def test_the_worst_rows_have_their_own_figures(
    kind: str, shown: dict[str, Page], request: pytest.FixtureRequest
) -> None:
    comparison = request.getfixturevalue(kind)
    tables = [t for t in shown[kind].tables if "steps" in t[0]]
    assert len(tables) == len(comparison.guides)
    signs = {"estimate": "", "lower": "≥", "upper": "≤", "none": "~"}
    for name, (_, *rows) in zip(comparison.guides, tables, strict=True):
        full = comparison.dataset
        ds = full.sel(guide=name) if comparison.several else full
        best = f"per_datapoint {ds['family'].item()}" if comparison.several else "per_datapoint"
        worst = np.argsort(-ds["inference_gap"].values)[:5]
        assert [int(row[0]) for row in rows] == (100 + worst).tolist()
        for at, (_, total, approximation, amortization, *others) in zip(worst, rows, strict=True):
            for gap, cell in zip(GAPS, (approximation, amortization, total), strict=True):
                assert_shown(cell, float(ds[gap][at]), float(ds[f"{gap}_stderr"][at]))
                assert re.match(r"[≥≤~]?", cell)[0] == signs[str(ds[f"{gap}_bound"].values[at])]
            evidence, of_guide, of_best, k_guide, k_best, converged, steps = others
            assert_shown(evidence, float(full["log_evidence"][at]))
            assert_shown(of_guide, float(full["elbo"].sel(guide=name)[at]))
            assert_shown(of_best, float(full["elbo"].sel(guide=best)[at]))
            for cell, guide in ((k_guide, name), (k_best, best)):
                k = float(full["pareto_k"].sel(guide=guide)[at])
                assert numbers(cell)[0] == pytest.approx(k, abs=5.1e-3)
                assert ("above" in cell) == (k > full.attrs["pareto_k_threshold"])
            assert converged == ("yes" if ds["converged"][at] else "no")
            assert int(steps) == int(ds["steps"][at])


def test_k_hats_above_the_threshold_are_counted(
    several: ppvae.Comparison, shown: dict[str, Page]
) -> None:
    ds = several.dataset
    above = (ds["pareto_k"] > ds.attrs["pareto_k_threshold"]).sum("data").to_series()
    (alt,) = [str(i["alt"]) for i in shown["several"].images() if "k-hat" in str(i["alt"])]
    assert all(f"{name}: {count}" in alt for name, count in above.items())


def test_the_caption_of_k_hat_says_whether_anything_rests_on_weights(
    toy: ppvae.Comparison, shown: dict[str, Page]
) -> None:
    none = "No gap on this page rests on them: log p(x) is a closed form."
    some = "log p(x) is estimated from such weights here"
    assert none in shown["toy"].text
    assert some not in shown["toy"].text
    assert some in shown["vae"].text
    assert none not in shown["vae"].text
    for kind in ("iwae", "pooled"):
        ds = toy.dataset.assign_attrs(evidence_kind=kind)
        assert "No gap" not in pages._use_of_weights(replace(toy, dataset=ds))
    ds = toy.dataset.assign_attrs(evidence_kind="ais")
    assert "log p(x) is annealed" in pages._use_of_weights(replace(toy, dataset=ds))


def test_bounds_are_marked(vae: ppvae.Comparison, shown: dict[str, Page]) -> None:
    assert not vae.dataset["converged"].all()
    table = shown["vae"].table("mean ± error", "sd")
    signs = [table[f"gap, {gap}"][0][0] for gap in ("approximation", "amortization", "total")]
    assert signs == ["~", "≥", "≥"]


def test_what_was_compared_stands_under_the_title(shown: dict[str, Page]) -> None:
    def subject(page: Page) -> str:
        said = " ".join(page.text.split())
        return said[: said.index("Is the guide good enough?")]

    said = "Model: ExponentialGaussian Guide: LogNormal() Rows: 9, of a ramp"
    assert said in subject(shown["toy"])
    guides = f"Guides: {ODD}, LogNormal(); other, Gamma() Rows: 9 "
    assert guides in subject(shown["several"])


def test_settings_and_versions_are_listed(toy: ppvae.Comparison, shown: dict[str, Page]) -> None:
    tables = [t for t in shown["toy"].tables if t[0] == ["setting", "value"]]
    of_comparison, of_run, versions = ({k: v for k, v in t[1:]} for t in tables)
    for key, value in toy.dataset.attrs.items():
        if isinstance(value, float):
            assert float(of_comparison[key]) == pytest.approx(value, rel=1e-5, nan_ok=True)
        else:
            assert of_comparison[key] == str(value)
    assert of_run == {"learning rate": "0.25"}
    assert versions["torch"] == torch.__version__


def test_a_gap_without_end_is_said_and_not_drawn(toy: ppvae.Comparison, tmp_path: Path) -> None:
    ds = toy.dataset.copy(deep=True)
    for name in ("amortization_gap", "inference_gap"):
        ds[name][3], ds[f"{name}_stderr"][3] = np.inf, np.nan
    ds["elbo"].loc[{"guide": "amortized", "data": 3}] = -np.inf
    ds["active_units"][:] = 0
    path = replace(toy, dataset=ds).to_html(tmp_path / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    # A collapsed latent is said before all else.
    assert 0 < page.text.index("COLLAPSED") < page.text.index("Some rows have no finite ELBO")
    assert [str(image["alt"])[:16] for image in page.images()] == ["A curve of k-hat"]
    (worst,) = [t for t in page.tables if "steps" in t[0]]
    assert worst[1][:2] == ["103", "inf ± nan"]


# --- Images ------------------------------------------------------------------------------------


def pixels(image: dict[str, Any]) -> Any:
    """The grey values of an image of a page: 0 where it is white, 1 where it is black."""
    import matplotlib.image

    kind, data = image["src"].split(",")
    assert kind == "data:image/png;base64"
    return 1 - matplotlib.image.imread(io.BytesIO(b64decode(data)))[..., 0]


def test_the_worst_images_and_what_the_model_makes_of_them(
    vae: ppvae.Comparison, shown: dict[str, Page]
) -> None:
    found = [i for i in shown["vae"].images() if " of row " in str(i["alt"])]
    images = {str(i["alt"]): pixels(i) for i in found}
    worst = vae.worst()
    means = reconstruct(vae.model, vae.guides["amortized"], vae.x[worst])
    assert len(images) == 2 * len(worst)
    for row, mean in zip(worst.tolist(), means, strict=True):
        gap, error = (float(vae.dataset[f"inference_gap{end}"][row]) for end in ("", "_stderr"))
        assert f"row {100 + row}: ≥ {gap:.4f} ± {error:.4f}" in shown["vae"].text
        expected = {"image": vae.x[row], "reconstruction": mean}
        for what, values in expected.items():
            values = values.reshape(4, 3).cpu().numpy()
            np.testing.assert_allclose(images[f"{what} of row {100 + row}"], values, atol=SHADES)


@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3)])
def test_rows_of_the_shape_of_an_image_are_images(shape: tuple[int, ...], tmp_path: Path) -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
            loc = z.reshape(*z.shape[:-1], *[1] * len(shape)).expand(*z.shape[:-1], *shape)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(len(shape)), obs=x)

    guide = Amortized(DiagonalNormal(1), nn.Sequential(nn.Flatten(-len(shape)), nn.Linear(6, 2)))
    x = torch.rand(3, *shape)
    comparison = ppvae.compare(model, guide, x, num_samples=100)
    page = Page(comparison.to_html(tmp_path / "report.html").read_text(encoding="utf-8"))
    images = [i for i in page.images() if " of row " in str(i["alt"])]
    # The pair is no VAE: nothing stands beside them.
    assert [i["alt"] for i in images] == [f"image of row {n}" for n in comparison.worst().tolist()]
    for image, row in zip(images, comparison.worst(), strict=True):
        np.testing.assert_allclose(pixels(image), x[row].reshape(2, 3).cpu(), atol=SHADES)


@pytest.mark.parametrize("shape", [(5, 3), (12,), (2, 2, 3)])
def test_an_image_shape_that_is_not_the_rows(
    shape: tuple[int, ...], vae: ppvae.Comparison, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"image_shape: .* 12 pixels.*\(12,\); got \("):
        vae.to_html(tmp_path / "report.html", image_shape=shape)
    assert not list(tmp_path.iterdir())


# --- Safe to open ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["toy", "vae", "several"])
def test_nothing_is_asked_of_the_network_and_names_are_text(
    kind: str, shown: dict[str, Page]
) -> None:
    page = shown[kind]
    assert ODD not in page.source
    assert not [tag for tag, _ in page.tags if tag in ("b", "script", "iframe", "object")]
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attrs.get(name) or "data:").startswith("data:"), (tag, name)
        assert "url(" not in (attrs.get("style") or "")
    assert not re.search(r"url\(|@import", page.source)
    policy = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert all(image["alt"] for image in page.images())
    if kind == "several":
        assert page.tables[-2] == [["setting", "value"], [ODD, "a" * 80]]
        assert any(f"{ODD}: approximation gap" in str(image["alt"]) for image in page.images())


# --- Notebooks ---------------------------------------------------------------------------------


def test_what_a_notebook_shows_of_a_comparison(
    toy: ppvae.Comparison, several: ppvae.Comparison
) -> None:
    shown = Page(toy._repr_html_())
    table = shown.table("mean ± error", "sd")
    assert_shown(table["gap, total"][0], *mean(toy.dataset, "inference_gap"))
    assert toy.verdict() in shown.text
    assert ODD not in several._repr_html_()
    assert ODD in Page(several._repr_html_()).table("total", "active")


def test_what_a_notebook_shows_of_fits(toy: ppvae.Comparison) -> None:
    local = toy.local
    shown = Page(local._repr_html_())
    ((rows, converged, elbo, steps, _),) = [r for t in shown.tables for r in t[1:]]
    assert (int(rows), int(converged)) == (9, int(local.converged.sum()))
    error = float(local.elbo_stderr.square().sum().sqrt()) / 9
    assert_shown(elbo, float(local.elbo.mean()), error)
    assert steps == f"{int(local.steps.min())} to {int(local.steps.max())}"
    assert local.status in shown.text
    model, guide = pairs.exponential_gaussian()
    fit = ppvae.fit(model, guide, torch.rand(20), steps=10, batch_size=10, progress=False)
    shown = Page(fit._repr_html_())
    (row,) = [r for t in shown.tables for r in t[1:]]
    assert row[:2] == ["10", "10"]
    assert "eager" not in shown.text  # How the steps ran is for `compile_report` to say.
    assert_shown(row[2], float(fit.losses[-1:].mean()))
    odd = Page(replace(fit, status=ODD, losses=fit.losses[:0])._repr_html_())
    assert ODD in odd.text
    assert odd.tables[0][1][2] == "none nats a datum"


# --- In a browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser on PATH: looked for {', '.join(BROWSERS)}")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


# What sticks out of the viewport to the right, and lies in no box that scrolls.
STICKS_OUT = """() => [...document.body.querySelectorAll("*")]
    .filter(e => !e.closest(".box") && e.getBoundingClientRect().right > innerWidth + 0.5)
    .map(e => e.outerHTML.slice(0, 80))"""
# The contrast ratio of text to its background, by the formula of WCAG 2.
CONTRAST = """() => {
    const light = c => {
        const [r, g, b] = c.match(/\\d+/g).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const paper = light(getComputedStyle(document.body).backgroundColor);
    return [...document.querySelectorAll("p, h1, h2, h3, td, th, small, figcaption")].map(e => {
        const ink = light(getComputedStyle(e).color);
        return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    });
}"""


def test_a_browser_opens_it_on_a_desk_and_on_a_phone(browser: Any, paths: dict[str, Path]) -> None:
    for width, height, scheme in ((1280, 900, "light"), (390, 844, "dark")):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        for path in paths.values():
            said, asked = [], []
            view = context.new_page()
            view.on("console", lambda message, said=said: said.append(message.text))
            view.on("pageerror", lambda error, said=said: said.append(str(error)))
            view.on("request", lambda request, asked=asked: asked.append(request.url))
            view.goto(path.as_uri())
            assert said == []
            assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
            assert view.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
            assert view.evaluate(STICKS_OUT) == []
            if path.stem == "toy":  # The main table of a single guide needs no scrolling.
                width = "e => e.scrollWidth - e.clientWidth"
                assert view.locator(".box").first.evaluate(width) <= 0
            widths = view.evaluate("[...document.images].map(i => i.naturalWidth)")
            assert widths
            assert min(widths) > 0
            assert min(view.evaluate(CONTRAST)) > 4.5
        context.close()


def test_the_break_even_counts_the_encoding(tmp_path):
    x = torch.linspace(-1, 3, 10)
    found = ppvae.compare(*pairs.exponential_gaussian(), x)
    # 100 s + N · 0.4 s = N · 0.6 s: 500 data, while 167 such fits last as long as the training.
    seconds = {"seconds_training": 100.0, "seconds_encoding": 4.0, "seconds_local_fit": 6.0}
    found = replace(found, dataset=found.dataset.assign_attrs(seconds, break_even=500.0))
    said = "encoding each datum, takes less time than such fits from 500 data on."
    assert said in " ".join(str(found).split())
    assert said in Page(found.to_html(tmp_path / "report.html").read_text(encoding="utf-8")).text
