"""Bars are seen where somebody looks on, are silent elsewhere, and change no figure."""

import math
import re
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

import ppvae
from ppvae import pairs
from ppvae.progress import SILENT, progress_bar


def look_on(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> None:
    """Stderr is a terminal, on which a bar is drawn every so many seconds."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("tqdm.auto.tqdm", partial(tqdm, mininterval=seconds, ncols=150))


def runs() -> dict[str, object]:
    """What takes long, on small pairs."""
    torch.manual_seed(0)
    linear, guide = pairs.factor_analysis()
    vae, encoder = pairs.vae(4, 3, [4])
    toy, positive = pairs.exponential_gaussian(hidden=[4])
    x, pixels, scalars = torch.randn(20, 6), torch.ones(6, 4), torch.rand(5)
    comparison = ppvae.compare(linear, guide, x, num_samples=50, progress=False)
    return {
        "fit": lambda p: ppvae.fit(linear, guide, x, steps=3, lr=1e-9, progress=p).losses,
        "q*": lambda p: ppvae.fit_per_datapoint(linear, None, x, init=guide, progress=p).elbo,
        "ELBO": lambda p: (
            ppvae.compare(vae, encoder, pixels, num_samples=50, progress=p)
            .dataset["inference_gap"]
            .values
        ),
        "log p(x)": lambda p: ppvae.log_evidence(vae, encoder, pixels, progress=p).value,
        "annealing": lambda p: ppvae.ais(toy, positive, scalars, num_steps=20, progress=p).value,
        "encoders": lambda p: (
            ppvae.explain(comparison, x.repeat(5, 1), steps=4, progress=p).dataset["gap"].values
        ),
        "gradients": lambda p: (
            ppvae.gradient_variance(toy, positive, scalars, num_draws=8, progress=p)
            .dataset["variance"]
            .values
        ),
    }


def test_all_that_takes_long_shows_a_bar_to_whoever_looks_and_stays_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    look_on(monkeypatch)
    for name, run in runs().items():
        without = run(False)
        assert capsys.readouterr() == ("", "")
        seen = run(True)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert f"{name}: " in captured.err
        torch.testing.assert_close(torch.as_tensor(seen), torch.as_tensor(without), equal_nan=True)


def test_a_log_gets_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model, guide = pairs.exponential_gaussian()
    ppvae.fit(model, guide, torch.rand(10), steps=2)
    ppvae.fit_per_datapoint(model, None, torch.rand(3), init=guide)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("config", "drawn"), [({"IPKernelApp": {}}, True), ({}, False)])
def test_a_notebook_is_no_terminal_and_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, object],
    drawn: bool,
) -> None:
    """A kernel has streams that are no terminals; IPython alone, its output in a file, too."""
    shell = SimpleNamespace(config=config)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    with progress_bar(2, "rows", "row", shown=True) as bar:
        assert bar.drawn is drawn
    with progress_bar(2, "rows", "row", shown=False) as bar:
        assert bar is SILENT
    assert ("rows" in capsys.readouterr().err) is drawn


def test_the_bar_says_where_the_run_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    look_on(monkeypatch)
    torch.manual_seed(0)
    model, guide = pairs.factor_analysis()
    x = torch.randn(40, 6)
    run = ppvae.fit(model, guide, x, steps=20)
    shown = re.findall(r"20/20 .*loss (-?\d+\.\d+) nats a datum", capsys.readouterr().err)
    assert float(shown[-1]) == pytest.approx(float(run.losses.mean()), abs=6e-4)
    best = ppvae.fit_per_datapoint(model, None, x, init=guide)
    shown = re.findall(r"40/40 .*amortization gap (-?\d+\.\d+) nats", capsys.readouterr().err)
    ours = ppvae.elbo(model, guide, x, 4000)
    # 16 common draws of 40 rows: their scatter is no larger than that of one guide's draws.
    single = ours.mean_stderr * math.sqrt(4000 / 16)
    assert abs(float(shown[-1]) - float((best.elbo - ours.value).mean())) < 5 * single
    assert float(shown[-1]) > 0


@pytest.mark.parametrize(("seconds", "times"), [(0.0, 10), (60.0, 0)])
def test_a_figure_is_asked_for_only_when_it_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seconds: float,
    times: int,
) -> None:
    look_on(monkeypatch, seconds)
    asked: list[int] = []
    with progress_bar(10, "rows", "row", shown=True) as bar:
        for _ in range(10):
            bar.advance(figure=lambda: f"{asked.append(1)}")
    assert len(asked) == times
    assert bool(capsys.readouterr().err)
