"""The command line: what it writes is what the library returned, and mistakes take one line."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib.metadata import entry_points, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
import torch
import xarray

import ppvae
from ppvae import cli, pairs, reporting
from ppvae.catalogue import PAIRS
from ppvae.data import NAMES
from ppvae.ledger import GAPS as GAP_NAMES
from ppvae.models import ExponentialGaussian
from ppvae.preparing import FAMILIES
from ppvae.summaries import amortization_gap_at_most, as_json

SMALL = ["--steps", "30", "--num-data", "8", "--num-samples", "100", "--no-progress"]
GAPS = {"gap_bars.png", "gap_sorted.png", "pareto_k.png", "break_even.png"}
TOY = {"toy_posterior.png", "gap_against_x.png"}
PAGE = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text(encoding="utf-8")
RECORDS = {"ledger.nc", "settings.json", "report.html", "trained.pt"}

PAIR = """
import os
import time

import torch
from torch import nn

import pyro
import pyro.distributions as dist

from ppvae.families import DiagonalNormal
from ppvae.guides import Amortized
from ppvae.nn import MLP
from pyro.nn import PyroModule


class Model(PyroModule):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(1, 3)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)


def build():
    return Model(), Amortized(DiagonalNormal(1), MLP(3, [], 2))


def correlated(x):
    with pyro.plate("data", len(x)):
        scale = pyro.sample("s", dist.LogNormal(x.new_zeros(len(x)), 1.0))
        pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), scale[..., None]).to_event(1))


def scaled(x):
    with pyro.plate("data", len(x)):
        scale = pyro.sample("s", dist.LogNormal(x.new_zeros(len(x)), 1.0))
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), scale[..., None]).to_event(1))
        pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], 3), 0.5).to_event(1), obs=x)


class Stubborn(Model):
    # Says how far it is, and once it is trained it never ends.
    calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.training and self.calls == 20:
            print("training", flush=True)
        if not self.training and self.calls >= 20 and len(x) > 2:
            print("comparing", flush=True)
            time.sleep(600)
        return super().forward(x)


def stubborn():
    model, guide = build()
    return Stubborn() if "STUBBORN" in os.environ else model, guide


def bare_model(x):
    weight = pyro.param("weight", torch.ones(3))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(z * weight, scale).to_event(1), obs=x)


def bare_guide(x):
    weight = pyro.param("guide_weight", torch.zeros(3, 1))
    scale = pyro.param("guide_scale", torch.ones(1), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ weight, scale.expand(len(x), 1)).to_event(1))


bare = (bare_model, bare_guide)


def overflowing(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
        mean = torch.exp(1000 * z).expand(*z.shape[:-1], 3)
        return pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


def wide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))


encoder = nn.Linear(3, 2)


def of_a_function(x):
    pyro.module("encoder", encoder)
    loc, log_scale = encoder(x).chunk(2, -1)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


mixed = (Model(), of_a_function)
infinite = (overflowing, wide)
my_pair = build
made = build()
bound = (scaled, correlated)
three = (1, 2, 3)


def fails():
    raise RuntimeError("first line\\nsecond line")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a pair of one's own, and its rows."""
    (here / "my_module.py").write_text(PAIR, encoding="utf-8")
    (here / "broken_module.py").write_text("1 / 0\n", encoding="utf-8")
    generator = np.random.default_rng(0)
    np.save(here / "rows.npy", generator.normal(size=(60, 3)))
    np.save(here / "wide.npy", generator.normal(size=(60, 5)))
    np.save(here / "one.npy", generator.normal(size=(1, 3)))
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    return here


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the command handed to the library, and what it got back."""
    out = SimpleNamespace(comparison=None, train=None, test=None, fits=0)

    def fit(model: Any, guide: Any, x: Any, **options: Any) -> Any:
        out.train, out.fits = x, out.fits + 1
        return real_fit(model, guide, x, **options)

    def compare(model: Any, guide: Any, x: Any, **options: Any) -> Any:
        out.test = x
        out.comparison = real_compare(model, guide, x, **options)
        return out.comparison

    real_fit, real_compare = cli.fit, cli.compare
    monkeypatch.setattr(cli, "fit", fit)
    monkeypatch.setattr(cli, "compare", compare)
    return out


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures, which take most of the time of a short run."""
    monkeypatch.setattr(reporting, "_write_figures", lambda *_: [])


def example(command: str) -> list[str]:
    """The arguments of a command that --help shows; see the test that all of them are run."""
    assert command in cli.EXAMPLES
    return shlex.split(command)[1:]


def table(printed: str) -> list[str]:
    """The lines of the output that hold no measured times."""
    printed = re.sub(r"^Training the model and the guide,[^.]*\.$", "", printed, flags=re.M)
    timed = ("Trained on", "Seconds", "Fitting q* took", "Wrote")
    lines = [line for line in printed.splitlines() if not line.startswith(timed)]
    return [re.sub(r"\S+ ms each", "", line) for line in lines]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def ledger(folder: Path) -> xarray.Dataset:
    return xarray.load_dataset(folder / "ledger.nc", engine="h5netcdf")


# --- A run -------------------------------------------------------------------------------------


def test_the_ledger_reads_back_as_it_was_and_as_it_was_printed(
    here: Path, seen: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*example("ppvae compare"), *SMALL]) == 0
    printed = capsys.readouterr().out
    assert files(here / "ppvae-out") == RECORDS | GAPS | TOY
    read = ledger(here / "ppvae-out")
    assert read["converged"].dtype == bool
    xarray.testing.assert_identical(read.drop_vars("row"), seen.comparison.dataset)
    # The numbers of the rows are those of the file, in what is printed too.
    assert str(replace(seen.comparison, dataset=read)) in printed
    assert "Worst rows" in printed
    assert re.search(r"ppvae\.refine on these rows: -?\d\.\d+ ± \d\.\d+ nats a datum", printed)


@pytest.mark.usefixtures("undrawn")
def test_a_pooled_evidence_is_that_of_the_library(
    here: Path,
    seen: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def lower(model: Any, guide: Any, x: Any, **options: Any) -> Any:
        """Not what `compare` would find by itself."""
        found = ppvae.log_evidence(model, guide, x, **options)
        time.sleep(0.05)
        return replace(found, value=found.value - 1, bound="lower", method="pooled")

    monkeypatch.setattr(cli, "log_evidence", lower)
    assert cli.main(["compare", "--model", "ppca", *SMALL, "--evidence", "pooled"]) == 0
    assert "log p(x): Estimate(pooled, lower bound" in capsys.readouterr().out
    read = ledger(here / "ppvae-out")
    exact = seen.comparison.model.log_evidence(seen.test)
    np.testing.assert_allclose(read["log_evidence"], exact.detach() - 1, atol=1e-4)
    assert (read.attrs["evidence_kind"], read.attrs["evidence_samples"]) == ("pooled", 0)
    # Its seconds count, although it was found before the comparison.
    assert read.attrs["seconds_evidence"] >= 0.05


def test_the_figures_are_images(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import matplotlib.image

    assert cli.main(["compare", *SMALL, "--out", "deep/er"]) == 0
    for name in GAPS | TOY:
        pixels = matplotlib.image.imread(here / "deep" / "er" / name)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.01
    assert "deep/er" in capsys.readouterr().out


def test_the_settings_are_all_there(here: Path) -> None:
    options = [*SMALL, "--seed", "3", "--hidden", "8, 4", "--lr", "0.01"]
    options += ["--max-steps", "7", "--evidence-samples", "300"]
    assert cli.main([*example("ppvae compare --guide-family gamma --out gamma"), *options]) == 0
    settings = json.loads((here / "gamma" / "settings.json").read_text(encoding="utf-8"))
    wanted = {
        "model": "exponential-gaussian",
        "pair": None,
        "guide_family": "gamma",
        "hidden": [8, 4],
        "steps": 30,
        "lr": 0.01,
        "num_data": 8,
        "num_samples": 100,
        "evidence_samples": 300,
        "max_steps": 7,
        "device": "cpu",
        "seed": 3,
        "rows_compared": 8,
    }
    assert {name: settings[name] for name in wanted} == wanted
    assert settings["batch_size"] >= 1
    assert settings["versions"]["ppvae"] == version("ppvae")
    assert settings["versions"]["torch"] == torch.__version__
    assert ledger(here / "gamma").attrs["family"] == "Gamma()"


@pytest.mark.usefixtures("undrawn")
def test_the_same_seed_gives_the_same_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for state, seed in ((1, "0"), (2, "0"), (2, "1")):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        assert cli.main(["compare", *SMALL, "--seed", seed]) == 0
        assert torch.equal(torch.get_rng_state(), before)
        tables.append(table(capsys.readouterr().out))
    assert tables[0] == tables[1] != tables[2]


def test_causes_and_prices_on_demand(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both tables are printed, and the files hold what they show."""
    command = example("ppvae compare --explain --repairs")
    assert cli.main([*command, *SMALL, "--num-data", "12"]) == 0
    printed = capsys.readouterr().out
    added = {f"{name}.{kind}" for name in ("explanation", "repairs") for kind in ("nc", "png")}
    assert added <= files(here / "ppvae-out")
    parts = xarray.load_dataset(here / "ppvae-out" / "explanation.nc", engine="h5netcdf")
    gap = float(ledger(here / "ppvae-out")["amortization_gap"].mean())
    assert float(parts["gap"].sum()) == pytest.approx(gap, abs=1e-5)
    prices = xarray.load_dataset(here / "ppvae-out" / "repairs.nc", engine="h5netcdf")
    # The toy's encoder is given all of x, so that no part is called missing inputs.
    shown = {"generalisation", "training", "capacity", "not learned", *prices["repair"].values}
    assert all(f"  {name} " in printed for name in shown)
    page = (here / "ppvae-out" / "report.html").read_text(encoding="utf-8")
    assert all(f'<span class="text">{name}</span>' in page for name in shown)
    assert "data:image/png" in page
    assert "12, drawn from the model, held out</p>" in page
    assert cli.main(["compare", *SMALL]) == 0
    assert not added & files(here / "ppvae-out")


def test_each_row_of_the_ledger_says_which_row_of_the_file_it_is(
    here: Path, seen: SimpleNamespace
) -> None:
    rows = np.linspace(-1, 4, 41)
    np.save(here / "rows.npy", rows)
    assert cli.main(["compare", *SMALL, "--data", "rows.npy"]) == 0
    read = ledger(here / "ppvae-out")
    exact = ExponentialGaussian().log_evidence(torch.as_tensor(rows))
    np.testing.assert_allclose(read["log_evidence"], exact[read["row"].values], atol=1e-5)
    # Compared are rows that were not trained on, and none is left out.
    together = torch.cat([seen.train, seen.test]).sort().values
    np.testing.assert_allclose(together, rows, atol=1e-6)
    assert len(seen.test) == 8


def test_without_training_all_rows_may_be_compared(here: Path, seen: SimpleNamespace) -> None:
    np.save(here / "rows.npy", np.linspace(-1, 4, 5))
    options = ["--num-samples", "100", "--no-progress", "--steps", "0"]
    assert cli.main(["compare", *options, "--data", "rows.npy"]) == 0
    assert seen.fits == 0
    assert ledger(here / "ppvae-out")["row"].values.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("model", ["factor-analysis", "ppca"])
def test_linear_models_reach_their_posterior(here: Path, model: str) -> None:
    """With a full-rank family the approximation gap is zero, whatever the loadings."""
    options = [*SMALL, "--guide-family", "full-rank-normal", "--z-dim", "2"]
    assert cli.main(["compare", "--model", model, *options]) == 0
    assert files(here / "ppvae-out") == RECORDS | GAPS
    read = ledger(here / "ppvae-out")
    assert read.attrs["evidence_kind"] == "exact"
    assert float(abs(read["approximation_gap"]).max()) < 1e-3


def test_a_vae_on_digits_with_a_latent_that_can_be_drawn(here: Path, seen: SimpleNamespace) -> None:
    command = example("ppvae compare --model vae --z-dim 2 --out digits")
    assert cli.main([*command, *SMALL, "--hidden", "16"]) == 0
    images = {"samples.png", "reconstructions.png", "latent_scatter.png", "latent_grid.png"}
    assert files(here / "digits") == RECORDS | GAPS | images
    settings = json.loads((here / "digits" / "settings.json").read_text(encoding="utf-8"))
    assert (settings["data"], settings["likelihood"]) == ("digits", "bernoulli")
    assert seen.train.shape == (1500, 64)
    assert set(seen.test.unique().tolist()) == {0.0, 1.0}


def test_a_gaussian_vae_on_images_of_a_file(here: Path, seen: SimpleNamespace) -> None:
    np.save(here / "images.npy", np.random.default_rng(0).random((50, 4, 3)))
    options = [*SMALL, "--data", "images.npy", "--likelihood", "gaussian", "--z-dim", "3"]
    assert cli.main(["compare", "--model", "vae", *options]) == 0
    assert files(here / "ppvae-out") == RECORDS | GAPS | {"samples.png", "reconstructions.png"}
    assert seen.train.shape == (42, 12)


def test_grey_digits_go_with_a_gaussian_likelihood(here: Path, seen: SimpleNamespace) -> None:
    options = [*SMALL, "--likelihood", "gaussian", "--hidden", ""]
    assert cli.main(["compare", "--model", "vae", *options]) == 0
    assert len(seen.train.unique()) == 17


@pytest.mark.parametrize("name", ["my_module:my_pair", "my_module:made"])
def test_a_pair_of_ones_own(
    own: Path, name: str, seen: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    path = list(sys.path)
    command = example("ppvae compare my_module:my_pair --data rows.npy")
    command[1] = name
    assert cli.main([*command, *SMALL]) == 0
    assert files(own / "ppvae-out") == RECORDS | GAPS
    assert sys.path == path
    assert seen.fits == 1
    assert "Trained on 52 rows" in capsys.readouterr().out
    read = ledger(own / "ppvae-out")
    # Its posterior is normal and its latent has one dimension: the family holds it.
    assert read.attrs["evidence_kind"] == "quadrature"
    assert float(abs(read["approximation_gap"]).max()) < 1e-3


@pytest.mark.usefixtures("undrawn")
def test_progress_bars_are_shown_on_a_terminal_unless_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for refused in ("--no-progress", "--quiet"):
        assert cli.main(["compare", *SMALL[:-1], refused]) == 0
        assert capsys.readouterr().err == ""
    assert cli.main(["compare", *SMALL[:-1]]) == 0
    captured = capsys.readouterr()
    for stage in ("fit", "q*", "ELBO"):
        assert f"{stage}: " in captured.err
    assert "\r" not in captured.out


# --- For machines ------------------------------------------------------------------------------


def no_constant(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def test_the_document_says_what_the_ledger_says_and_nothing_else_is_printed(
    here: Path, seen: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*example("ppvae compare --json --quiet"), *SMALL]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    said = json.loads(captured.out, parse_constant=no_constant)
    read = replace(seen.comparison, dataset=ledger(here / "ppvae-out"))
    for name in ("amortized", "per_datapoint"):
        elbo = said["guides"][name]["elbo"]
        assert (elbo["mean"], elbo["stderr"]) == read.mean("elbo", name)
    for gap in GAP_NAMES:
        assert (said["gaps"][gap]["mean"], said["gaps"][gap]["stderr"]) == read.mean(gap)
        assert sum(said["gaps"][gap]["rows_by_bound"].values()) == 8
    assert said["log_evidence"]["mean"] == read.mean("log_evidence")[0]
    assert said["verdict"] == read.verdict()
    assert said["q_star"]["converged"] == int(read.dataset["converged"].sum())
    assert said["worst_rows"][0]["inference_gap"] == float(read.dataset["inference_gap"].max())
    assert said["seconds"]["local_fit"] == read.dataset.attrs["seconds_local_fit"]
    settings = json.loads((here / "ppvae-out" / "settings.json").read_text(encoding="utf-8"))
    assert said["settings"] == settings
    assert {*said["files"]} == files(here / "ppvae-out")
    # The keys that the documentation lists.
    rows = re.findall(r"^\| (`.+?`) \|", PAGE.split("## For scripts")[1], flags=re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(rows)) == list(said)


MODES = """
import math

import pyro
import pyro.distributions as dist
import torch

PHASES = torch.linspace(0, 6, 8)


def model(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 2.0))
        mean = torch.sin(PHASES + z[..., None])
        pyro.sample("x", dist.Normal(mean, 0.4).to_event(1), obs=x)


def guide(x):
    late = 2 * math.pi * (x[:, 0] > 0.3)
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(late + 0.3, 0.2))


def build():
    return model, guide
"""


@pytest.mark.usefixtures("undrawn")
def test_rows_refined_in_a_poorer_mode_are_counted_against_q_star(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of five rows begin a turn of 2π away, where the prior alone differs.

    That costs E_q*[(z + 2π)² − z²] / 8 = (π² + π m) / 2 nats at a mean m of q*, of 0.1 to 0.6.
    """
    monkeypatch.delitem(sys.modules, "two_modes", raising=False)
    (here / "two_modes.py").write_text(MODES, encoding="utf-8")
    phases, late = np.linspace(0, 6, 8), np.array([0.1, 0.15, 0.2, 0.4, 0.6])
    np.save(here / "x.npy", np.sin(phases + late[:, None]).astype("float32"))
    command = ["compare", "two_modes:build", "--data", "x.npy", "--steps", "0", "--num-data", "5"]
    assert cli.main([*command, "--num-samples", "100", "--no-progress"]) == 0
    printed = capsys.readouterr().out
    [most, error] = re.findall(
        r"In 2 of the rows accepted or refined q\* is still higher, by up to (\S+) ± (\S+) nats\.",
        printed,
    )[0]
    assert "0 given up." in printed
    # The prior shrinks the phase a little, and the other mode's optimum is a little better yet.
    exact = (np.pi**2 + np.pi * late[-1]) / 2
    assert abs(float(most) - exact) < 4 * float(error) + 0.1
    assert cli.main([*command, "--num-samples", "100", "--json"]) == 0
    below = json.loads(capsys.readouterr().out)["refine"]["below_q_star"]
    assert below["rows"] == 2
    assert float(most) == pytest.approx(below["most"], rel=0.01)
    np.save(here / "x.npy", np.sin(phases + late[:3, None]).astype("float32"))
    assert cli.main([*command, "--num-samples", "100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["refine"]["below_q_star"]["rows"] == 0


@pytest.mark.usefixtures("undrawn")
@pytest.mark.filterwarnings("ignore:.*invalid value:RuntimeWarning")
def test_what_is_no_number_is_null_with_a_reason(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "my_module:infinite", "--data", "rows.npy", "--json", "--steps", "0"]
    assert cli.main([*command, "--num-data", "4", "--num-samples", "100"]) == 0
    said = json.loads(capsys.readouterr().out, parse_constant=no_constant)
    assert said["guides"]["amortized"]["elbo"]["mean"] is None
    assert said["why_null"]["guides.amortized.elbo.mean"] == "minus infinite"
    assert said["gaps"]["inference_gap"]["mean"] is None
    assert said["why_null"]["gaps.inference_gap.mean"] == "infinite"
    assert said["why_null"]["break_even"] == "nothing was trained"
    assert said["log_evidence"]["mean"] < 0


def test_every_null_of_a_figure_has_its_reason() -> None:
    values = {"a": [1.0, float("nan")], "b": {"c": float("-inf"), "d": None}}
    assert json.loads(as_json(values)) == {
        "a": [1.0, None],
        "b": {"c": None, "d": None},
        "why_null": {"a.1": "not a number", "b.c": "minus infinite"},
    }


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("allowed", "status"), [("100", 0), ("0", 3)])
def test_a_gap_above_what_is_allowed_has_an_exit_status(
    here: Path, capsys: pytest.CaptureFixture[str], allowed: str, status: int
) -> None:
    command = example("ppvae compare --max-amortization-gap 0.5")
    assert cli.main([*command[:-1], allowed, *SMALL, "--json", "--steps", "5"]) == status
    captured = capsys.readouterr()
    check = json.loads(captured.out)["check"]
    assert check["passed"] is (status == 0)
    assert ("above --max-amortization-gap" in captured.err) is (status == 3)
    assert {"ledger.nc"} < files(here / "ppvae-out")


def test_rows_that_have_not_converged_count_with_what_they_have_to_gain() -> None:
    torch.manual_seed(0)
    model, guide = pairs.exponential_gaussian()
    done = ppvae.compare(model, guide, torch.rand(4), num_samples=100)
    mean, error = done.mean("amortization_gap")
    assert bool(done.dataset["converged"].all())
    assert amortization_gap_at_most(done) == mean + 2 * error
    open_ = done.dataset.assign(
        converged=("data", np.array([True, False, True, False])),
        predicted_gain=("data", np.array([9.0, 1.0, 9.0, 3.0])),
    )
    found = amortization_gap_at_most(replace(done, dataset=open_))
    assert found == pytest.approx(mean + 2 * error + 1.0)


def complete(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shell: str,
    words: str,
) -> list[str]:
    """What a shell is told of the last of these words."""
    parts = words.split(" ")
    monkeypatch.setenv("_PPVAE_COMPLETE", f"{shell}_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    fish = shell == "fish"
    monkeypatch.setenv("COMP_CWORD", parts[-1] if fish else str(len(parts) - 1))
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_data_sets_models_families_and_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    def of(words: str) -> str:
        return " ".join(complete(monkeypatch, capsys, shell, words))

    assert all(name in of("ppvae compare --data ") for name in NAMES)
    found = of("ppvae compare --data fa")
    assert "fashion-mnist" in found
    assert "digits" not in found
    # Any other file, and folders.
    assert "file" in found
    assert "dir" in of("ppvae compare --resume ")
    assert all(model in of("ppvae compare --model ") for model in cli._MODELS)
    assert all(family in of("ppvae compare --guide-family ") for family in FAMILIES)
    assert "--max-amortization-gap" in of("ppvae compare --max-a")
    assert "completion" in of("ppvae comp")
    assert "list" in of("ppvae data l")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_asks_this_command(
    capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_PPVAE_COMPLETE={shell}_complete" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_list_of_data_sets_says_what_loading_gives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "freyfaces.npy").touch()
    assert cli.main(["data", "list", "--json", "--root", str(tmp_path)]) == 0
    said = {row["name"]: row for row in json.loads(capsys.readouterr().out)["data_sets"]}
    assert tuple(said) == NAMES
    digits, loaded = said["digits"], ppvae.data.load("digits")
    assert (digits["num_train"], digits["num_test"]) == (len(loaded.train), len(loaded.test))
    assert tuple(digits["event_shape"]) == loaded.event_shape
    assert digits["binarization"] == loaded.binarization
    assert digits["missing"] == said["frey"]["missing"] == []
    # What is said to be missing is what loading misses.
    for name in ("mnist", "binarized-mnist"):
        with pytest.raises(FileNotFoundError, match=re.escape(said[name]["missing"][0])):
            ppvae.data.load(name, root=tmp_path)
    # The rows, shapes and pixels that the module's text speaks of.
    for name, row in said.items():
        pixels = f'"{row["binarization"]}"' if row["binarization"] else "grey (`None`)"
        shape = "x".join(map(str, row["event_shape"]))
        text = " ".join(str(ppvae.data.__doc__).split())
        pattern = rf"`{name}`: {row['num_train']:,} \+ {row['num_test']:,} [^;]*of {shape}, [^;]*"
        assert pixels in re.search(pattern, text)[0]
    assert cli.main(["data", "list", "--root", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{printed}" for name in NAMES)
    assert max(map(len, printed.splitlines())) < 80


def test_the_list_of_models_is_the_documentation_s_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["models", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["pairs"]
    assert sorted(row["name"] for row in said) == sorted(pairs.__all__)
    root = Path(__file__).parents[1]
    text = (root / "docs" / "models" / "index.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| [")]
    for row, pair in zip(rows, PAIRS, strict=True):
        name, latent, likelihood, families, exact = (cell.replace("`", "") for cell in row)
        assert name == f"[{pair.name}]({Path(pair.page).name})"
        assert (latent, likelihood, exact) == (pair.latent, pair.likelihood, pair.evidence)
        assert families == ", ".join(pair.families)
        assert (root / pair.page).is_file()
    assert {row["compare_model"] for row in said} - {None} == set(cli._MODELS)
    assert cli.main(["models"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{printed}" for name in pairs.__all__)
    assert max(map(len, printed.splitlines())) < 80


# --- Interrupted, and gone on with -------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_goes_on_is_the_same_and_does_not_train(
    here: Path, seen: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", *SMALL, "--seed", "4"]) == 0
    first, before = table(capsys.readouterr().out), ledger(here / "ppvae-out")
    assert cli.main(["compare", "--resume", "ppvae-out", "--out", "again", "--no-progress"]) == 0
    printed = capsys.readouterr().out
    assert seen.fits == 1
    assert "completed 30 steps" in printed
    assert table(printed)[1:] == first
    after = ledger(here / "again")
    xarray.testing.assert_identical(after.drop_attrs(), before.drop_attrs())
    kept = ("seconds_training", "training_status", "training_steps", "training_completed")
    assert all(after.attrs[name] == before.attrs[name] for name in kept)
    assert after.attrs["training_status"] == "completed 30 steps"
    assert "Training not completed" not in printed
    command = example("ppvae compare --resume ppvae-out --num-samples 5000")
    assert cli.main([*command, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    more = ledger(here / "ppvae-out")
    ratio = float((before["elbo_stderr"] / more["elbo_stderr"]).mean())
    # The error falls as the root of the draws: 100 before.
    assert ratio == pytest.approx(50**0.5, rel=0.5)
    settings = json.loads((here / "ppvae-out" / "settings.json").read_text(encoding="utf-8"))
    assert (settings["seed"], settings["num_samples"]) == (4, 5000)


@pytest.mark.usefixtures("undrawn")
def test_the_trained_pair_can_be_loaded(here: Path, seen: SimpleNamespace) -> None:
    assert cli.main(["compare", *SMALL]) == 0
    state = torch.load(here / "ppvae-out" / "trained.pt", weights_only=True)
    model, guide = pairs.exponential_gaussian()
    guide.load_state_dict(state["modules"]["guide"])
    weights = ppvae.log_weights(model, guide, seen.test, num_samples=3)
    trained = seen.comparison.guides["amortized"]
    assert torch.equal(weights, ppvae.log_weights(model, trained, seen.test, num_samples=3))


@pytest.mark.usefixtures("undrawn")
def test_modules_of_a_function_are_kept_by_the_names_that_the_page_has(
    own: Path, seen: SimpleNamespace
) -> None:
    command = ["compare", "my_module:mixed", "--data", "rows.npy", *SMALL]
    assert cli.main(command) == 0
    saved = torch.load(own / "ppvae-out" / "trained.pt", weights_only=True)
    assert set(saved["modules"]) == {"model", "module 0"}
    assert all(f'`"{name}"`' in PAGE for name in saved["modules"])
    model, guide = seen.comparison.model, seen.comparison.guides["amortized"]
    before = ppvae.log_weights(model, guide, seen.test, num_samples=3)
    encoder = sys.modules["my_module"].encoder
    encoder.requires_grad_(False).weight.zero_()
    assert not torch.equal(ppvae.log_weights(model, guide, seen.test, num_samples=3), before)
    encoder.load_state_dict(saved["modules"]["module 0"])
    assert torch.equal(ppvae.log_weights(model, guide, seen.test, num_samples=3), before)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.fills_store
def test_parameters_that_have_no_module_are_kept_too(own: Path) -> None:
    command = ["compare", "my_module:bare", "--data", "rows.npy", *SMALL, "--lr", "0.1"]
    assert cli.main(command) == 0
    before = ledger(own / "ppvae-out")
    store = ppvae.isolation.pyro.get_param_store()
    for name in ("weight", "scale", "guide_weight", "guide_scale"):
        del store[name]
    assert cli.main(["compare", "--resume", "ppvae-out"]) == 0
    xarray.testing.assert_identical(ledger(own / "ppvae-out").drop_attrs(), before.drop_attrs())


@pytest.mark.usefixtures("undrawn")
def test_what_does_not_go_on_is_refused_in_one_line(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "my_module:build", "--data", "rows.npy", *SMALL]
    assert cli.main([*command, "--quiet"]) == 0

    def refused(*options: str) -> str:
        assert cli.main(["compare", "--resume", *options]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err

    assert "--lr does not go with --resume" in refused("ppvae-out", "--lr", "1")
    assert "PAIR does not go with --resume" in refused("ppvae-out", "my_module:made")
    assert "no trained.pt" in refused("elsewhere")
    # In another folder: what it misses was given to the run before.
    (own / "deep").mkdir()
    monkeypatch.chdir(own / "deep")
    said = refused("../ppvae-out")
    assert "a run of my_module:build --data rows.npy: --data: there is no file rows.npy." in said
    assert "Go on in the folder in which it was begun" in said
    monkeypatch.chdir(own)
    kept = ledger(own / "ppvae-out")
    rows = np.load("rows.npy")
    np.save("rows.npy", rows + 1)
    assert "rows" in refused("ppvae-out")
    np.save("rows.npy", rows)
    text = PAIR.replace("nn.Linear(1, 3)", "nn.Linear(1, 3, bias=False)")
    (own / "my_module.py").write_text(text, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "my_module")
    assert "decoder.bias" in refused("ppvae-out")
    (own / "ppvae-out" / "trained.pt").write_bytes(b"nothing")
    assert "damaged" in refused("ppvae-out")
    xarray.testing.assert_identical(ledger(own / "ppvae-out"), kept)


def test_an_interrupt_after_the_comparison_leaves_it_written(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "repair_costs", interrupted)
    assert cli.main(["compare", *SMALL, "--repairs", "--out", "cut"]) == 130
    captured = capsys.readouterr()
    assert "ppvae compare --resume cut" in captured.err
    assert captured.err.count("\n") == 1
    assert files(here / "cut") == RECORDS | GAPS | TOY
    # While nothing has been trained there is nothing to go on with.
    monkeypatch.setattr(cli, "fit", interrupted)
    assert cli.main(["compare", *SMALL, "--out", "none"]) == 130
    assert capsys.readouterr().err.split() == ["ppvae:", "interrupted"]
    assert files(here / "none") == set()


@pytest.mark.usefixtures("undrawn")
def test_results_stay_until_others_of_the_same_pair_are_whole(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def interrupted_while_writing(*arguments: Any) -> list[str]:
        signal.raise_signal(signal.SIGINT)
        return real_write(*arguments)

    assert cli.main(["compare", *SMALL, "--out", "kept", "--quiet"]) == 0
    results = [here / "kept" / name for name in RECORDS - {"trained.pt"}]
    before = [path.read_bytes() for path in results]
    real_compare, real_write = cli.compare, cli.write
    monkeypatch.setattr(cli, "compare", interrupted)
    again = ["compare", "--resume", "kept", "--num-samples", "150", "--quiet"]
    assert cli.main(again) == 130
    assert [path.read_bytes() for path in results] == before
    # Results of another pair do not stay beside this one.
    (here / "other").mkdir()
    (here / "other" / "ledger.nc").touch()
    assert cli.main([*again, "--out", "other"]) == 130
    assert files(here / "other") == {"settings.json", "trained.pt"}
    # What is being written gets written.
    monkeypatch.setattr(cli, "compare", real_compare)
    monkeypatch.setattr(cli, "write", interrupted_while_writing)
    assert cli.main(again) == 130
    assert files(here / "kept") == RECORDS
    settings = json.loads((here / "kept" / "settings.json").read_text(encoding="utf-8"))
    assert settings["num_samples"] == ledger(here / "kept").attrs["num_samples"] == 150


# What a shell runs in the background ignores interrupts, and so would its children.
INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from ppvae.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.usefixtures("undrawn")
def test_ctrl_c_ends_the_training_and_then_the_run_which_goes_on_later(
    own: Path, seen: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["compare", "my_module:stubborn", "--data", "rows.npy", *SMALL]
    options += ["--steps", "100000000"]
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"STUBBORN": "1", "PYTHONPATH": str(Path(ppvae.__file__).parents[1])},
    ) as process:
        assert process.stdout is not None
        # Nothing is waited for without end.
        guard = threading.Timer(120, process.kill)
        guard.start()
        try:
            for line in process.stdout:
                # Each of the two ends where it was when the line was written, or soon after.
                if line in ("training\n", "comparing\n"):
                    process.send_signal(signal.SIGINT)
            said = process.stderr.read() if process.stderr else ""
            # To a shell both are 130: Python may end itself by the signal that it has seen.
            assert process.wait() in (130, -signal.SIGINT), said
        finally:
            guard.cancel()
            process.kill()
    first, last = [line for line in said.splitlines() if line.startswith("ppvae: ")]
    steps = re.search(r"interrupted after (\d+) of 100000000 steps; going on", first)
    assert "ppvae compare --resume ppvae-out" in last
    assert files(own / "ppvae-out") == {"settings.json", "trained.pt"}
    assert cli.main(["compare", "--resume", "ppvae-out"]) == 0
    assert seen.fits == 0
    status = f"interrupted after {steps[1]} of 100000000 steps"
    printed = capsys.readouterr().out
    assert f"Training not completed ({status})" in printed
    # The record says so wherever it is read.
    settings = json.loads((own / "ppvae-out" / "settings.json").read_text(encoding="utf-8"))
    attrs = ledger(own / "ppvae-out").attrs
    for known in (settings, attrs):
        assert (known["training_status"], known["training_steps"]) == (status, int(steps[1]))
    page = (own / "ppvae-out" / "report.html").read_text(encoding="utf-8")
    assert f"Training not completed ({status})" in page.split('<div class="said alarm">')[1]
    saved = torch.load(own / "ppvae-out" / "trained.pt", weights_only=True)["modules"]["guide"]
    guide = seen.comparison.guides["amortized"]
    assert all(torch.equal(value, saved[name]) for name, value in guide.state_dict().items())
    assert files(own / "ppvae-out") == RECORDS


# --- Mistakes ----------------------------------------------------------------------------------

MISTAKES = {
    "unknown command": (["cmpare"], "cmpare"),
    "unknown option": (["compare", "--speps", "3"], "--speps"),
    "unknown model": (["compare", "--model", "gan"], "exponential-gaussian"),
    "unknown family": (["compare", "--guide-family", "cauchy"], "log-normal"),
    "unknown data": (["compare", "--model", "vae", "--data", "cifar"], "digits"),
    "unknown likelihood": (["compare", "--model", "vae", "--likelihood", "poisson"], "bernoulli"),
    "support": (["compare", "--guide-family", "diagonal-normal"], "has support 'real'"),
    "scalar": (["compare", "--guide-family", "full-rank-normal"], "latent_dim"),
    "positive": (["compare", "--model", "ppca", "--guide-family", "gamma"], "'positive'"),
    "steps": (["compare", "--steps", "-1"], "--steps"),
    "no number": (["compare", "--steps", "many"], "--steps"),
    "lr": (["compare", "--lr", "0"], "--lr"),
    "lr nan": (["compare", "--lr", "nan"], "--lr"),
    "lr inf": (["compare", "--lr", "inf"], "--lr"),
    "batch size": (["compare", "--batch-size", "0"], "--batch-size"),
    "num data": (["compare", "--num-data", "0"], "--num-data"),
    "num samples": (["compare", "--num-samples", "3"], "--num-samples"),
    "evidence samples": (["compare", "--evidence-samples", "1"], "--evidence-samples"),
    "max steps": (["compare", "--max-steps", "0"], "--max-steps"),
    "seed": (["compare", "--seed", "-1"], "--seed"),
    "hidden": (["compare", "--hidden", "10,x"], "10,x"),
    "hidden zero": (["compare", "--hidden", "10,0"], "10,0"),
    "z dim": (["compare", "--model", "vae", "--z-dim", "0"], "--z-dim"),
    "z dim of a scalar": (["compare", "--z-dim", "2"], "scalar"),
    "likelihood of the toy": (["compare", "--likelihood", "gaussian"], "--likelihood"),
    "root of the toy": (["compare", "--root", "."], "--root"),
    "root of a file": (
        ["compare", "--model", "vae", "--data", "rows.npy", "--root", "."],
        "--root",
    ),
    "device": (["compare", "--device", "abacus"], "abacus"),
    "no such device": (["compare", "--device", "cuda:99"], "--device cpu"),
    "no file": (["compare", "--data", "missing.npy"], "missing.npy"),
    "no array": (["compare", "--data", "my_module.py"], "not a readable .npy file"),
    "shape": (["compare", "--data", "rows.npy"], "(60, 3)"),
    "grey": (["compare", "--model", "vae", "--data", "rows.npy"], "Bernoulli"),
    "no data set": (
        ["compare", "--model", "vae", "--data", "frey", "--root", "."],
        "freyfaces.npy",
    ),
    "data set elsewhere": (
        ["compare", "--model", "vae", "--data", "frey", "--root", "."],
        "pass the folder that holds the files as --root",
    ),
    "data set to fetch": (
        ["compare", "--model", "vae", "--data", "mnist", "--root", "."],
        "as --root, or --download to fetch",
    ),
    "out is a file": (["compare", "--out", "rows.npy"], "rows.npy"),
    "pair without rows": (["compare", "my_module:made"], "--data"),
    "pair and model": (
        ["compare", "my_module:made", "--data", "rows.npy", "--model", "vae"],
        "--model",
    ),
    "pair form": (["compare", "my_module", "--data", "rows.npy"], "my_module:my_pair"),
    "no module": (["compare", "no_module:pair", "--data", "rows.npy"], "no_module"),
    "broken module": (["compare", "broken_module:pair", "--data", "rows.npy"], "ZeroDivisionError"),
    "no attribute": (["compare", "my_module:pear", "--data", "rows.npy"], "'pear'"),
    "no pair": (["compare", "my_module:three", "--data", "rows.npy"], "(model, guide)"),
    "failing builder": (["compare", "my_module:fails", "--data", "rows.npy"], "second line"),
    "other rows": (["compare", "my_module:made", "--data", "wide.npy"], "5"),
    "too few rows": (["compare", "my_module:made", "--data", "one.npy"], "--steps 0"),
    "guide that cannot be freed": (
        ["compare", "my_module:bound", "--data", "rows.npy"],
        "Site 'z'",
    ),
}


@pytest.mark.parametrize(("arguments", "named"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_takes_one_line_before_anything_is_trained(
    own: Path,
    arguments: list[str],
    named: str,
    seen: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = files(own)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ppvae: error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert named in captured.err
    assert seen.fits == 0
    assert files(own) - {"__pycache__"} == before


def test_rows_that_are_no_numbers_are_refused(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("words.npy", np.array(["a", "b"]))
    np.save("objects.npy", np.array([{}, {}]), allow_pickle=True)
    np.save("empty.npy", np.zeros((0, 3)))
    holes = np.load("rows.npy")
    holes[17] = np.nan
    np.save("holes.npy", holes)
    for name, said in {
        "words": "array of numbers",
        "objects": "not a readable",
        "empty": "at least 2 rows",
        "holes": "NaN",
    }.items():
        assert cli.main(["compare", "my_module:made", "--data", f"{name}.npy"]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    assert not (own / "ppvae-out").exists()


# --- The entry ---------------------------------------------------------------------------------


def test_help_names_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--help"]) == 0
    said = capsys.readouterr().out
    for word in [*NAMES, *cli._MODELS, *FAMILIES, "PAIR", "--no-progress", "ledger.nc"]:
        assert word in said.replace("\n", " ") or word in " ".join(said.split())
    assert cli.main([]) == 0
    assert "compare" in capsys.readouterr().out


def test_help_fits_a_terminal_and_names_examples_and_statuses(
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = [["compare"], [], ["data"], ["data", "list"], ["models"], ["completion"]]
    for command in commands:
        assert cli.main([*command, "--help"]) == 0
        said = capsys.readouterr().out
        assert max(map(len, said.splitlines())) <= 80
        if command in ([], ["compare"]):
            assert all(f"  {status} " in said for status in ("0", "2", "3", "130"))
            assert "\n  ppvae compare --model vae --z-dim 2 --out digits\n" in said
    assert cli.main(["compare", "--help"]) == 0
    said = capsys.readouterr().out
    for option in cli.cli.commands["compare"].params:
        if isinstance(option, click.Option):
            assert said.count(f"\n  {option.opts[0]}") + said.count(", --help") >= 1


def test_all_examples_of_help_and_of_the_documentation_are_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert set(re.findall(r'example\("([^"]+)"\)', source)) == set(cli.EXAMPLES)
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    shown = {line.split(" > ")[0] for block in blocks for line in block.splitlines()}
    assert shown - {"ppvae completion bash"} <= set(cli.EXAMPLES)
    statuses = re.findall(r"^\| (\d+) \|", PAGE, flags=re.MULTILINE)
    assert statuses == list(cli._STATUSES)


def test_help_says_what_each_model_takes_by_default(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert cli.main(["compare", *SMALL]) == 0
    settings = json.loads((here / "ppvae-out" / "settings.json").read_text(encoding="utf-8"))
    toy = said.split("Defaults of exponential-gaussian: ")[1].split("Defaults of")[0]
    assert f"--guide-family {settings['guide_family']} " in toy
    assert f"--batch-size {settings['batch_size']} --lr {settings['lr']} " in toy


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert version("ppvae") in capsys.readouterr().out


def test_the_console_script_is_main() -> None:
    (script,) = entry_points(group="console_scripts", name="ppvae")
    assert script.load() is cli.main


def test_a_process_ends_with_the_status_and_without_a_traceback(own: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "ppvae.cli", "compare", "my_module:fails", "--data", "rows.npy"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("ppvae: error: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "limit"),
    [([], 60), (["--model", "vae", "--data", "digits"], 180)],
    ids=["toy", "digits"],
)
def test_a_run_with_the_defaults_keeps_to_its_time(
    here: Path, arguments: list[str], limit: float
) -> None:
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "ppvae.cli", "compare", *arguments],
        check=True,
        capture_output=True,
        env=os.environ | {"MPLBACKEND": "Agg"},
    )
    assert time.perf_counter() - began < limit
    read = ledger(here / "ppvae-out")
    # Training got somewhere: the encoder is within a nat of the best that it could be.
    assert 0 < float(read["amortization_gap"].mean()) < 1
    assert float(read["approximation_gap"].mean()) > 0
