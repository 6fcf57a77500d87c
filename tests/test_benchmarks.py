"""The harness of the speed benchmarks: what it rejects and calls different, and that it runs."""

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppvae import families, fit_per_datapoint
from ppvae.models import ExponentialGaussian

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import svi_steps
    from speed import arena, by_hand, frozen, problems

    return type(
        "Speed",
        (),
        dict(arena=arena, steps=svi_steps, hand=by_hand, frozen=frozen, problems=problems),
    )


def test_disturbed_turns_do_not_count(speed: Any) -> None:
    quiet, loud = [1.0, 1.1, 0.9, 1.0], [5.0, 6.0]
    times = speed.arena.Times(quiet + loud, [0.0] * 4 + [0.9] * 2)
    assert times.kept == quiet
    assert times.median == 1.0
    assert not times.disturbed


def test_the_quieter_half_counts_where_all_is_disturbed(speed: Any) -> None:
    times = speed.arena.Times([1.0, 9.0, 2.0, 8.0], [0.3, 0.9, 0.4, 0.8])
    assert sorted(times.kept) == [1.0, 2.0]
    assert times.disturbed


def losses(speed: Any, weight: float, count: int = 192, seed: int = 0) -> list[float]:
    """Of the small VAE at its first parameters, with the KL weighed."""
    problem = speed.problems.make("vae", 16, small=True)
    params = {name: torch.tensor(value) for name, value in problem.params.items()}
    params["encoder.2.bias"][3:] -= 3.0  # A KL of about 3 nats.
    torch.manual_seed(seed)
    found = []
    for batch in itertools.islice(itertools.cycle(problem.batches), count):
        x = torch.tensor(batch)
        loss = speed.hand.vae_loss(params, x)
        hidden = torch.nn.functional.linear(x, params["encoder.0.weight"], params["encoder.0.bias"])
        loc, log_var = torch.nn.functional.linear(
            hidden.relu(), params["encoder.2.weight"], params["encoder.2.bias"]
        ).chunk(2, dim=-1)
        kl = 0.5 * (loc**2 + log_var.exp() - 1 - log_var).sum()
        found.append(float(loss + (weight - 1) * kl) / len(x))
    return found


def test_the_check_tells_another_objective(speed: Any) -> None:
    """The same objective with other draws agrees; a KL that weighs a tenth more does not."""
    reference = [losses(speed, 1.0)]
    same = speed.steps.compared(losses(speed, 1.0, seed=1), reference)
    other = speed.steps.compared(losses(speed, 1.1, seed=1), reference)
    assert same.agrees
    assert not other.agrees
    assert other.difference == pytest.approx(0.3, abs=0.1)


def test_a_loss_that_is_not_finite_is_refused(speed: Any) -> None:
    with pytest.raises(ValueError, match="not finite"):
        speed.steps.compared([1.0, math.nan], [[1.0, 1.0]])


def test_one_graph_is_eager_adam(speed: Any) -> None:
    """With the same random numbers the traced step gives eager's losses, step after step."""
    eager = speed.hand.Eager("vae", 8, small=True)
    graph = speed.hand.OneGraph("vae", 8, small=True, inductor=False)
    for contestant in (eager, graph):
        contestant.begin(0.01)
    graph.losses(1)  # Traces, which takes draws of its own.
    graph.begin(0.01)
    found = []
    for contestant in (eager, graph):
        torch.manual_seed(0)
        found.append(contestant.losses(48))
    # It learns: of 16 batches each, the last round is better than the first.
    assert np.mean(found[0][:16]) - np.mean(found[0][-16:]) > 0.3
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_onednn_products_leave_the_step_as_it_is(
    speed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    turn = itertools.count()
    # Each product is timed twice; oneDNN is made to win every time.
    monkeypatch.setattr(speed.hand, "fastest", lambda run: float(next(turn) % 2 == 0))
    eager = speed.hand.Eager("vae", 8, small=True)
    graph = speed.hand.OneGraph("vae", 8, small=True, inductor=False, products=True)
    for contestant in (eager, graph):
        contestant.begin()
    graph.losses(1)
    graph.begin()
    assert graph.replaced[0] == graph.replaced[1] > 0
    found = []
    for contestant in (eager, graph):
        torch.manual_seed(0)
        found.append(contestant.losses(10))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_the_optimum_of_the_toy(speed: Any) -> None:
    """No log-normal near it is better, and the engine's fit ends there."""
    x = np.array([-6.0, -1.0, 0.0, 1.0, 1.5, 4.0, 30.0])
    best = speed.frozen.toy_optimum(x)
    top = speed.frozen.toy_elbo(x, best)
    for move in ([1e-3, 0], [-1e-3, 0], [0, 1e-3], [0, -1e-3]):
        assert (speed.frozen.toy_elbo(x, best + np.array(move)) < top).all()
    rows = torch.tensor(x[1:6])
    fit = fit_per_datapoint(ExponentialGaussian(), families.LogNormal(), rows)
    found = fit.guide.table("z").weight.detach().numpy()
    short = top[1:6] - speed.frozen.toy_elbo(x[1:6], found)
    assert (np.abs(short) < 1e-3).all()
    error = fit.elbo_stderr.numpy()
    assert (np.abs(fit.elbo.numpy() - top[1:6]) < 5 * error + 1e-3).all()
    evidence = ExponentialGaussian().log_evidence(rows).numpy()
    assert (evidence > top[1:6]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "rows"),
    [
        ("svi_steps.py", ["--only", "replayed", "Trace_ELBO"], 10),
        ("local_fits.py", ["--problems", "toy", "--only"], 5),
        ("iwae.py", ["--only", "Pyro,", "ppvae.iwae"], 3),
    ],
)
def test_the_command_writes_its_table(
    script: str, arguments: list[str], rows: int, tmp_path: Path
) -> None:
    """Every contestant in it, none that failed or differs."""
    output = tmp_path / "table.md"
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--threads", "1", *arguments]
    done = subprocess.run(
        [*command, "--output", str(output)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = output.read_text(encoding="utf-8")
    assert "failed" not in text
    assert "differs" not in text
    assert len(re.findall(r"^\| .*\d", text, flags=re.MULTILINE)) >= rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_benchmark_of_devices_says_that_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu.main()
    assert "no CUDA device here: nothing was run" in capsys.readouterr().out
