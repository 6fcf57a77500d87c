"""The command line: what it writes is what the library returned, and mistakes take one line."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import entry_points, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray

from ppvae import cli
from ppvae.data import NAMES
from ppvae.models import ExponentialGaussian
from ppvae.preparing import FAMILIES

SMALL = ["--steps", "30", "--num-data", "8", "--num-samples", "100", "--no-progress"]
GAPS = {"gap_bars.png", "gap_sorted.png", "pareto_k.png", "break_even.png"}
TOY = {"toy_posterior.png", "gap_against_x.png"}
RECORDS = {"ledger.nc", "settings.json", "report.html"}

PAIR = """
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


def table(printed: str) -> list[str]:
    """The lines of the output that hold no measured times."""
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
    assert cli.main(["compare", *SMALL]) == 0
    printed = capsys.readouterr().out
    assert files(here / "ppvae-out") == RECORDS | GAPS | TOY
    read = ledger(here / "ppvae-out")
    assert read["converged"].dtype == bool
    xarray.testing.assert_identical(read.drop_vars("row"), seen.comparison.dataset)
    # The numbers of the rows are those of the file, in what is printed too.
    assert str(replace(seen.comparison, dataset=read)) in printed
    assert "Worst rows" in printed
    assert re.search(r"ppvae\.refine on these rows: -?\d\.\d+ ± \d\.\d+ nats a datum", printed)


def test_the_figures_are_images(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import matplotlib.image

    assert cli.main(["compare", *SMALL, "--out", "deep/er"]) == 0
    for name in GAPS | TOY:
        pixels = matplotlib.image.imread(here / "deep" / "er" / name)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.01
    assert "deep/er" in capsys.readouterr().out


def test_the_settings_are_all_there(here: Path) -> None:
    options = [*SMALL, "--seed", "3", "--hidden", "8, 4", "--guide-family", "gamma", "--lr", "0.01"]
    options += ["--max-steps", "7", "--evidence-samples", "300"]
    assert cli.main(["compare", *options]) == 0
    settings = json.loads((here / "ppvae-out" / "settings.json").read_text(encoding="utf-8"))
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
    assert ledger(here / "ppvae-out").attrs["family"] == "Gamma()"


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
    options = ["compare", *SMALL, "--num-data", "12", "--explain", "--repairs"]
    assert cli.main(options) == 0
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
    assert cli.main(["compare", "--model", "vae", *SMALL, "--z-dim", "2", "--hidden", "16"]) == 0
    images = {"samples.png", "reconstructions.png", "latent_scatter.png", "latent_grid.png"}
    assert files(here / "ppvae-out") == RECORDS | GAPS | images
    settings = json.loads((here / "ppvae-out" / "settings.json").read_text(encoding="utf-8"))
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


@pytest.mark.parametrize("name", ["my_module:build", "my_module:made"])
def test_a_pair_of_ones_own(
    own: Path, name: str, seen: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    path = list(sys.path)
    assert cli.main(["compare", name, "--data", "rows.npy", *SMALL]) == 0
    assert files(own / "ppvae-out") == RECORDS | GAPS
    assert sys.path == path
    assert seen.fits == 1
    assert "Trained on 52 rows" in capsys.readouterr().out
    read = ledger(own / "ppvae-out")
    # Its posterior is normal and its latent has one dimension: the family holds it.
    assert read.attrs["evidence_kind"] == "quadrature"
    assert float(abs(read["approximation_gap"]).max()) < 1e-3


def test_a_progress_bar_is_shown_on_stderr_unless_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", *SMALL]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main(["compare", *SMALL[:-1]]) == 0
    captured = capsys.readouterr()
    assert "30" in captured.err
    assert "\r" not in captured.out


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
