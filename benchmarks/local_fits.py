"""How long does a fit of every row take, against everybody else's?

Runs ours and every peer on 1,000 digits with a frozen decoder, and on the toy, and writes tables of
the gap to a known or a long run's optimum against wall time:

    pip install -e ".[bench]"
    python benchmarks/local_fits.py --output fits.md

A peer that is not installed is left out, in words. `--quick` tries it all out.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from speed.arena import BrokenError, Caches, MissingError, Worker, machine, say, write
from speed.frozen import toy_elbo, toy_optimum

EAGER = "hand-written torch, eager"
PYRO = "`pyro.infer.SVI`, a row for each datum"
OURS = "**`ppvae.fit_per_datapoint`**"
ENTRIES: dict[str, tuple[str, dict[str, Any]]] = {
    EAGER: ("fits:ByHand", {}),
    "hand-written torch, compiled loss, fused Adam": ("fits:ByHand", {"compiled": True}),
    PYRO: ("fits:PyroSvi", {}),
    "`pyro.infer.SVI`, `AutoNormal`": ("fits:PyroSvi", {"auto": True}),
    "NumPyro, `lax.scan`": ("fits_numpyro:Scan", {}),
    OURS: ("fits:Ours", {}),
}
# The gap that Adam has to reach, in nats a datum, and the draws and rates that are tried.
TARGET = {"digits": 0.02, "toy": 1e-3}
SETTINGS = {"digits": ((1, 0.03), (8, 0.03), (8, 0.1)), "toy": ((1, 0.03), (8, 0.03), (8, 0.1))}
MOST_STEPS = {"digits": 3200, "toy": 25600}


@dataclass(frozen=True)
class Gap:
    """Nats by which fits are short of the optimum: mean, its Monte Carlo error, worst row."""

    mean: float
    stderr: float
    worst: float

    def __str__(self) -> str:
        error = "" if self.stderr == 0 else f" ± {self.stderr:.1g}"
        return f"{self.mean:.2g}{error} | {self.worst:.2g}"


class Digits:
    """Gaps on the digits, judged on common draws against a long run."""

    def __init__(self, path: str, options: argparse.Namespace) -> None:
        self.judge = Worker("frozen:Judge", threads=options.threads, path=path)
        steps, draws = (60, 8) if options.quick else (2000, 16)
        runner = Worker(
            "fits:ByHand", threads=options.threads, kind="digits", path=path, device=options.device
        )
        try:
            encoded = self.judge.call("encoder")[0]
            starts = [None, encoded]
            shorter = [runner.call("fit", steps // 2, draws, 0.05, start)[0] for start in starts]
            longer = [runner.call("fit", steps, draws, 0.05, start)[0] for start in starts]
        finally:
            runner.close()
        ends = [self.judge.call("elbo", end)[0] for end in longer]
        # The better of two starts, chosen row by row on other points than it is judged on.
        first = ends[0][::2].mean(0) >= ends[1][::2].mean(0)
        best = np.where(first[:, None], longer[0], longer[1])
        self.gold = self.judge.call("elbo", best)[0]
        half = self.of(np.where(first[:, None], shorter[0], shorter[1]))
        self.words = (
            f"The optimum is the better end for each row of two runs of Adam (from the standard "
            f"normal, and from the encoder's output) with {steps:,} steps of {draws} draws and a "
            f"cosine schedule; with half as many steps the same is {half.mean:.2g} ± "
            f"{half.stderr:.1g} nats short of it. "
            f"The encoder's output is {self.of(encoded).mean:.3f} nats short."
        )

    def of(self, found: np.ndarray) -> Gap:
        """How far fits are from it."""
        short = self.gold - self.judge.call("elbo", found)[0]
        if not np.isfinite(short).all():
            return Gap(math.inf, 0.0, math.inf)
        error = short.mean(1).std(ddof=1) / math.sqrt(len(short))
        return Gap(float(short.mean()), float(error), float(short.mean(0).max()))


class Toy:
    """Gaps on the toy, in closed form."""

    words = "The optimum is known in closed form but for one equation, and so are all gaps."

    def __init__(self, path: str) -> None:
        with np.load(path) as held:
            self.x = held["x"].astype("float64")
        self.best = toy_elbo(self.x, toy_optimum(self.x))

    def of(self, found: np.ndarray) -> Gap:
        """How far fits are from it."""
        short = self.best - toy_elbo(self.x, found)
        if not np.isfinite(short).all():
            return Gap(math.inf, 0.0, math.inf)
        return Gap(float(short.mean()), 0.0, float(short.max()))


@dataclass
class Row:
    """What is known of one contestant."""

    worker: Worker | None = None
    words: str = ""
    steps: int | None = None
    ladder: list[tuple[int, float, Gap]] = field(default_factory=list)
    first: float = math.nan
    seconds: float = math.nan
    gap: Gap | None = None
    extra: float | None = None
    broken: bool = False


class Study:
    """One problem, all contestants."""

    def __init__(
        self, kind: str, path: str, judge: Digits | Toy, caches: Caches, options: Any
    ) -> None:
        self.kind, self.path, self.judge, self.options = kind, path, judge, options
        self.caches = caches
        self.table: dict[str, Row] = {}
        self.setting = SETTINGS[kind][0]
        self.loop: tuple[float, int] | None = None

    def worker(self, name: str) -> Worker:
        """A contestant's process."""
        target, extra = ENTRIES[name]
        return Worker(
            target,
            threads=self.options.threads,
            cache=self.caches.folder(name),
            kind=self.kind,
            path=self.path,
            device=self.options.device,
            **extra,
        )

    def climb(
        self, worker: Worker, draws: int, lr: float, compiles: bool = False
    ) -> list[tuple[int, float, Gap]]:
        """Fits with more and more steps until the target is reached: steps, seconds, gap."""
        steps, found = 25, []
        most = 50 if self.options.quick else MOST_STEPS[self.kind]
        while True:
            end, seconds, _ = worker.call("fit", steps, draws, lr)
            if compiles:  # Each number of steps is a program of its own.
                _, seconds, _ = worker.call("fit", steps, draws, lr)
            found.append((steps, seconds, self.judge.of(end)))
            if found[-1][2].mean <= TARGET[self.kind] or 2 * steps > most:
                return found
            steps *= 2

    def choose(self) -> None:
        """The draws and the rate with which eager Adam is first at the target."""
        worker = self.worker(EAGER)
        try:
            best = math.inf
            for draws, lr in SETTINGS[self.kind]:
                _, seconds, gap = self.climb(worker, draws, lr)[-1]
                say(
                    f"{self.kind}: {draws} draws, rate {lr}: {gap.mean:.4f} nats in {seconds:.2f} s"
                )
                if gap.mean <= TARGET[self.kind] and seconds < best:
                    best, self.setting = seconds, (draws, lr)
        finally:
            worker.close()

    def enter(self, name: str) -> Row:
        """Let one contestant find out how many steps it needs."""
        row = Row()
        say(f"{self.kind}: {name}")
        try:
            row.worker = self.worker(name)
            if name == OURS:
                end, row.first, _ = row.worker.call("fit", 0, 0, 0.0)
                row.gap = self.judge.of(end)
                return row
            row.first = row.worker.call("fit", 25, *self.setting)[1]
            row.ladder = self.climb(row.worker, *self.setting, "numpyro" in ENTRIES[name][0])
            row.steps, _, row.gap = row.ladder[-1]
        except MissingError as error:
            row.words = f"left out: {error}"
        except BrokenError as error:
            row.words = f"failed: {str(error).strip().splitlines()[-1]}"
            row.broken = True
            say(str(error))
        if row.words and row.worker is not None:
            row.worker.close()
            row.worker = None
        return row

    def run(self) -> None:
        """All of it: the ladders, then repeated fits in turn."""
        self.choose()
        for name in ENTRIES:
            self.table[name] = self.enter(name)
        racing = {name: row for name, row in self.table.items() if row.worker is not None}
        seconds: dict[str, list[float]] = {name: [] for name in racing}
        fit_only: list[float] = []
        for _ in range(self.options.rounds):
            for name, row in racing.items():
                seconds[name].append(row.worker.call("fit", row.steps or 0, *self.setting)[1])
                if name == OURS:
                    fit_only.append(row.worker.call("fit_seconds")[0])
        for name, row in racing.items():
            row.seconds = statistics.median(seconds[name])
        if OURS in racing:
            racing[OURS].extra = statistics.median(fit_only)
        pyro = self.table[PYRO]
        if pyro.worker is not None and pyro.steps is not None:
            rows = 1 if self.options.quick else 3
            pyro.worker.call("one_by_one", min(pyro.steps, 25), *self.setting, 1)
            taken = pyro.worker.call("one_by_one", pyro.steps, *self.setting, rows)[1]
            self.loop = (taken / rows, rows)
        for row in racing.values():
            row.worker.close()

    def markdown(self, title: str, rows: int) -> list[str]:
        """The table."""
        base = self.table[PYRO].seconds
        if not math.isfinite(base):
            raise SystemExit(f"{PYRO} {self.table[PYRO].words}")
        draws, lr = self.setting
        target = TARGET[self.kind]
        lines = [
            f"### {title}",
            "",
            f"{self.judge.words} Adam with {draws} draw{'s' * (draws > 1)} and a rate of {lr} that "
            f"falls as a cosine, with as few steps (25, 50, 100, …) as bring the mean gap to "
            f"{target:g} nats. Times relative to Pyro's SVI, {base:.3g} s here.",
            "",
            "| fit | time | steps | mean gap, nats | worst row |",
            "|---|---|---|---|---|",
        ]
        notes = []
        for name, row in self.table.items():
            if row.words:
                notes.append(f"{name}: {row.words}.")
                continue
            assert row.gap is not None
            missed = row.steps is not None and row.gap.mean > target
            steps = "" if row.steps is None else f"{row.steps:,}{' (not there)' if missed else ''}"
            seconds = row.seconds if row.extra is None else row.extra
            lines.append(f"| {name} | {seconds / base:.3g} | {steps} | {row.gap} |")
            if row.extra is not None:
                lines.append(
                    f"| the same call with its 1,000 draws for the reported ELBO | "
                    f"{row.seconds / base:.3g} | | | |"
                )
                notes.append(f"{name}: its first call in a process took {row.first / base:.3g}.")
        if self.loop is not None:
            each, of = self.loop
            lines.append(
                f"| `pyro.infer.SVI`, a Python loop over data | {each * rows / base:,.0f} | "
                f"{self.table[PYRO].steps:,} | | |"
            )
            notes.append(
                f"The loop over data is the time of {of} row{'s' * (of > 1)}, times {rows:,}: "
                f"extrapolated."
            )
        points = [(name, row.ladder) for name, row in self.table.items() if row.ladder]
        lines += ["", "Mean gap against time, on the way there:", "", "| fit | |", "|---|---|"]
        for name, ladder in points:
            way = ", ".join(f"{gap.mean:.2g} ({s / base:.2g})" for _, s, gap in ladder)
            lines.append(f"| {name} | {way} |")
        return [*lines, "", *(f"- {note}" for note in notes), ""]


def scaling(study: Study, path: Path, caches: Caches, options: Any) -> tuple[list[str], bool]:
    """The toy with more rows: ours in full, eager Pyro's by the time of a few steps."""
    draws, lr = study.setting
    needed = study.table[PYRO].steps
    assert needed is not None
    lines = [
        "### Toy, more rows",
        "",
        f"Pyro's time is that of 50 steps less that of 25, times the {needed:,} steps that it took "
        f"with {options.toy[0]:,} rows: extrapolated. Ours relative to it, and for each row "
        f"relative to its own time with {options.toy[0]:,} rows.",
        "",
        "| rows | ours, relative to Pyro | ours, for each row | mean gap | worst row |",
        "|---|---|---|---|---|",
    ]
    each_first = math.nan
    for rows in options.toy:
        np.savez(path, x=toy_rows(rows))
        judge = Toy(str(path))
        workers = {}
        try:
            for name in (PYRO, OURS):
                target, extra = ENTRIES[name]
                workers[name] = Worker(
                    target,
                    threads=options.threads,
                    cache=caches.folder(name),
                    kind="toy",
                    path=str(path),
                    device=options.device,
                    **extra,
                )
            gap = judge.of(workers[OURS].call("fit", 0, 0, 0.0)[0])
            workers[PYRO].call("fit", 2, draws, lr)
            steps, fits = [], []
            for _ in range(options.rounds):
                short, long = (workers[PYRO].call("fit", n, draws, lr)[1] for n in (25, 50))
                steps.append((long - short) / 25)
                workers[OURS].call("fit", 0, 0, 0.0)
                fits.append(workers[OURS].call("fit_seconds")[0])
        except (MissingError, BrokenError) as error:
            say(str(error))
            return [*lines, f"| {rows:,} | failed | | | |", ""], False
        finally:
            for worker in workers.values():
                worker.close()
        fit, step = statistics.median(fits), statistics.median(steps)
        each_first = fit / rows if math.isnan(each_first) else each_first
        lines.append(
            f"| {rows:,} | {fit / (step * needed):.3g} | {fit / rows / each_first:.2f} | {gap} |"
        )
    return [*lines, ""], True


def toy_rows(rows: int) -> np.ndarray:
    """Rows of the toy's own model."""
    draw = np.random.default_rng(0)
    return (draw.exponential(size=rows) + draw.normal(size=rows)).astype("float32")


def main() -> int:
    """Run, write, and say by the exit status whether nothing failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="cores for each contestant")
    parser.add_argument("--digits", type=int, default=1000, help="rows of digits")
    parser.add_argument("--toy", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--problems", nargs="+", choices=["digits", "toy"], default=["digits", "toy"]
    )
    parser.add_argument("--only", nargs="*", help="contestants whose name holds one of these")
    parser.add_argument("--output", help="write the Markdown here, too")
    parser.add_argument("--quick", action="store_true", help="few rows and steps")
    options = parser.parse_args()
    if options.quick:
        options.digits, options.toy, options.rounds = 20, [50, 100], 1
    if options.only is not None:
        for name in list(ENTRIES):
            if name not in (EAGER, PYRO, OURS) and not any(part in name for part in options.only):
                del ENTRIES[name]
    lines = ["## Per-datapoint fits", "", machine(options.threads, options.device), ""]
    sound = True
    with Caches() as caches:
        path = Path(caches.folder("rows")) / "rows.npz"
        if "digits" in options.problems:
            trainer = Worker("frozen:Train", threads=options.threads)
            try:
                held = trainer.call("run", options.digits, 20 if options.quick else 4000)[0]
            finally:
                trainer.close()
            np.savez(path, **held)
            judge = Digits(str(path), options)
            study = Study("digits", str(path), judge, caches, options)
            study.run()
            judge.judge.close()
            title = f"{options.digits:,} digits, 64 pixels, 20 latents, a frozen decoder 20-100-64"
            lines += study.markdown(title, options.digits)
            sound = sound and not any(row.broken for row in study.table.values())
        if "toy" in options.problems:
            rows = options.toy[0]
            np.savez(path, x=toy_rows(rows))
            study = Study("toy", str(path), Toy(str(path)), caches, options)
            study.run()
            lines += study.markdown(f"Toy, {rows:,} rows", rows)
            more, fine = scaling(study, path, caches, options)
            lines += more
            sound = sound and fine and not any(row.broken for row in study.table.values())
    write("\n".join(lines), options.output)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
