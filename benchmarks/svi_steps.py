"""How long does an SVI step take, against everybody else's?

Runs ours and every peer in turn, checks that all optimise the same objective to the same value,
and writes a table of ratios:

    pip install -e ".[bench]"
    python benchmarks/svi_steps.py --output steps.md
    python benchmarks/svi_steps.py --device cuda --output steps_cuda.md

A peer that is not installed is left out, in words. `--quick` tries it all out on small networks.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import dataclass

from speed.arena import BrokenError, Caches, MissingError, Times, Worker, machine, race, say, write

REFERENCE = "hand-written, eager, Adam"
ALL = ("vae", "toy")


@dataclass(frozen=True)
class Entry:
    """A contestant: where it is, what it is made with, for which problems, whether it compiles."""

    target: str
    options: dict[str, object]
    kinds: tuple[str, ...] = ALL
    compiles: bool = False


def svi(elbo: str, validation: bool, kinds: tuple[str, ...] = ALL) -> Entry:
    """An entry of Pyro's own SVI."""
    return Entry("in_pyro:Svi", {"elbo": elbo, "validation": validation}, kinds)


def ours(elbo: str, compiled: bool, kinds: tuple[str, ...] = ALL) -> Entry:
    """An entry of `ppvae.SVI`."""
    return Entry("in_pyro:Ours", {"elbo": elbo, "compile": compiled}, kinds, compiled)


VAE = ("vae",)
ENTRIES = {
    REFERENCE: Entry("by_hand:Eager", {}),
    "hand-written, `torch.compile`d loss, fused Adam": Entry(
        "by_hand:CompiledLoss", {}, compiles=True
    ),
    "hand-written, one graph, replayed": Entry("by_hand:OneGraph", {"inductor": False}),
    "hand-written, one graph, Inductor": Entry("by_hand:OneGraph", {}, compiles=True),
    "the same, the faster of torch's and oneDNN's products": Entry(
        "by_hand:OneGraph", {"products": True}, VAE, compiles=True
    ),
    "hand-written, captured CUDA graph": Entry("by_hand:CapturedGraph", {}),
    "hand-written, `torch.compile`d loss, captured CUDA graph": Entry(
        "by_hand:CapturedGraph", {"compiled": True}, compiles=True
    ),
    "`pyro.infer.SVI`, `Trace_ELBO`": svi("trace", True),
    "the same, validation off": svi("trace", False),
    "`pyro.infer.SVI`, `TraceMeanField_ELBO`": svi("mean_field", True, VAE),
    "`TraceMeanField_ELBO`, validation off": svi("mean_field", False, VAE),
    "`JitTrace_ELBO`, validation off": Entry("in_pyro:Svi", {"elbo": "jit"}, compiles=True),
    "`torch.compile` of `ELBOModule`, validation off": Entry(
        "in_pyro:CompiledElbo", {"elbo": "trace"}, compiles=True
    ),
    "NumPyro, jitted step": Entry("in_numpyro:Step", {}, compiles=True),
    "NumPyro, `lax.scan`": Entry("in_numpyro:Scan", {}, compiles=True),
    "pythae, `train_step` on ready batches": Entry("in_pythae:Trainer", {}, VAE),
    "pythae, `train_step` on its own loader": Entry("in_pythae:Trainer", {"loader": True}, VAE),
    "**`ppvae.SVI`, `Trace_ELBO`, eager**": ours("trace", False),
    "**`ppvae.SVI`, `Trace_ELBO`, compiled**": ours("trace", True),
    "**`ppvae.SVI`, `TraceMeanField_ELBO`, compiled**": ours("mean_field", True, VAE),
}


@dataclass(frozen=True)
class Check:
    """Whether two lists of losses have the same mean: the paired difference and its error."""

    difference: float
    stderr: float

    @property
    def agrees(self) -> bool:
        """Within five standard errors, and what float32 leaves."""
        return abs(self.difference) <= 5 * self.stderr + 1e-4

    def __str__(self) -> str:
        return f"{self.difference:+.3f} ± {self.stderr:.3f}"


def compared(losses: list[float], references: list[list[float]], block: int = 1) -> Check:
    """The mean difference of losses from those of one or more reference runs, same batches.

    Its error is that of paired differences, from means of blocks, together with the spread of the
    reference runs where there are several: runs with other random numbers drift apart.
    """
    mean = [statistics.fmean(column) for column in zip(*references, strict=True)]
    pairs = [a - b for a, b in zip(losses, mean, strict=True)]
    if not all(math.isfinite(pair) for pair in pairs):
        raise ValueError("a loss is not finite")
    means = [statistics.fmean(pairs[i : i + block]) for i in range(0, len(pairs), block)]
    error = statistics.stdev(means) / math.sqrt(len(means))
    if len(references) > 1:
        spread = statistics.stdev([statistics.fmean(each) for each in references])
        error = math.hypot(error, spread * math.sqrt(1 + 1 / len(references)))
    return Check(statistics.fmean(pairs), error)


@dataclass
class Row:
    """What is known of one contestant on one problem."""

    worker: Worker | None = None
    words: str = ""
    cold: float | None = None
    warm: float | None = None
    start: Check | None = None
    later: Check | None = None
    note: str = ""
    broken: bool = False


class Study:
    """One problem, all contestants."""

    def __init__(self, kind: str, rows: int, options: argparse.Namespace) -> None:
        self.kind, self.rows, self.options = kind, rows, options
        self.table: dict[str, Row] = {}
        quick = options.quick
        self.draws, self.train, self.skip, self.block = (
            (64, 100, 40, 5) if quick else (192, 400, 80, 20)
        )
        self.repeats = 4 if quick else 6

    def enter(self, name: str, entry: Entry, cache: str) -> tuple[Worker, float]:
        """A worker after three steps, by when all have compiled, and the seconds that took."""
        worker = Worker(
            entry.target,
            threads=self.options.threads,
            cache=cache,
            kind=self.kind,
            rows=self.rows,
            small=self.options.quick,
            device=self.options.device,
            **entry.options,
        )
        try:
            _, first, _ = worker.call("begin")
            _, second, _ = worker.call("losses", 3)
        except (MissingError, BrokenError):
            worker.close()
            raise
        return worker, first + second

    def run(self) -> dict[str, Times]:
        """Check all, then race all that can."""
        at_start: list[list[float]] = []
        along: list[list[float]] = []
        with Caches() as caches:
            for name, entry in ENTRIES.items():
                if self.kind not in entry.kinds:
                    continue
                row = self.table[name] = Row()
                say(f"{self.kind} {self.rows}: {name}")
                try:
                    row.worker, row.cold = self.enter(name, entry, caches.folder(name))
                    if entry.compiles and not self.options.quick:
                        row.worker.close()
                        row.worker, row.warm = self.enter(name, entry, caches.folder(name))
                    row.worker.call("begin", 0.0)
                    start = row.worker.call("losses", self.draws)[0]
                    for _ in range(self.repeats if name == REFERENCE else 1):
                        row.worker.call("begin")
                        later = row.worker.call("losses", self.train)[0][self.skip :]
                        if name == REFERENCE:
                            along.append(later)
                    if name == REFERENCE:
                        at_start.append(start)
                    else:
                        row.start = compared(start, at_start)
                        row.later = compared(later, along, self.block)
                    row.note = row.worker.call("note")[0]
                    if not entry.compiles:
                        row.cold = None
                except MissingError as error:
                    row.words = f"left out: {error}"
                except (BrokenError, ValueError) as error:
                    row.words = f"failed: {str(error).strip().splitlines()[-1]}"
                    row.broken = True
                    say(str(error))
                if row.words and row.worker is not None:
                    row.worker.close()
                    row.worker = None
            workers = {name: row.worker for name, row in self.table.items() if row.worker}
            try:
                return race(workers, rounds=self.options.rounds, turn=self.options.turn)
            finally:
                for worker in workers.values():
                    worker.close()

    def markdown(self, times: dict[str, Times]) -> list[str]:
        """The table of ratios."""
        base = times[REFERENCE].median
        what = "VAE 784-400-20, batches of" if self.kind == "vae" else "Toy, rows"
        if self.options.quick and self.kind == "vae":
            what = "VAE 30-20-3, batches of"
        lines = [
            f"### {what} {self.rows:,}",
            "",
            f"Relative to hand-written eager torch, whose step takes {1e6 * base:.0f} µs here.",
            "",
            "| step | time | quartiles | turns | compile, cold / warm | loss at the start | "
            "loss later |",
            "|---|---|---|---|---|---|---|",
        ]
        notes = []
        for name, row in self.table.items():
            if row.words:
                notes.append(f"{name}: {row.words}.")
                continue
            one = times[name]
            ratio = one.median / base
            quiet = f"{len(one.kept)}" + ("\\*" if one.disturbed else "")
            compiling = " / ".join(
                "–" if t is None else f"{t / base:,.0f}" for t in (row.cold, row.warm)
            )
            checks = [
                "–" if c is None else f"{c}{'' if c.agrees else ' **differs**'}"
                for c in (row.start, row.later)
            ]
            spread = "–" if math.isnan(one.spread) else f"± {one.spread:.0%}"
            lines.append(
                f"| {name} | {ratio:.3g} | {spread} | {quiet} | {compiling} | "
                f"{checks[0]} | {checks[1]} |"
            )
            if row.note:
                notes.append(f"{name}: {row.note}.")
        if any(times[name].disturbed for name in times):
            notes.append(
                "\\* More than half of the turns were disturbed by other processes; the quieter "
                "half of them counts."
            )
        return [*lines, "", *(f"- {note}" for note in notes), ""]

    @property
    def sound(self) -> bool:
        """Whether nothing failed and all agree."""
        checks = [c for row in self.table.values() for c in (row.start, row.later) if c is not None]
        return not any(row.broken for row in self.table.values()) and all(c.agrees for c in checks)


ABOUT = """\
Medians of turns taken one after another, each contestant in a process of its own; turns in which
other processes took more than 15 % of a core are left out. "Compile" is the time of the first three
steps, by when all have compiled, in steps of hand-written eager torch: cold with an empty cache of
kernels, warm with a filled one, imports not counted. "Loss" is the difference to hand-written eager
torch, nats a datum: at the first parameters, averaged over draws; and along training on the same
batches, steps {first} to {last}. All must agree within five standard errors.
"""


def main() -> int:
    """Run, write, and say by the exit status whether all agreed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="cores for each contestant")
    parser.add_argument("--batches", type=int, nargs="*", default=[20, 128, 512])
    parser.add_argument("--toy", type=int, nargs="*", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--turn", type=float, default=0.2, help="seconds of a turn")
    parser.add_argument("--only", nargs="*", help="contestants whose name holds one of these")
    parser.add_argument("--output", help="write the Markdown here, too")
    parser.add_argument("--quick", action="store_true", help="small networks, few turns")
    options = parser.parse_args()
    if options.quick:
        options.batches, options.toy = [16], [500]
        options.rounds, options.turn = 3, 0.02
    if options.only is not None:
        for name in list(ENTRIES):
            if name != REFERENCE and not any(part in name for part in options.only):
                del ENTRIES[name]
    lines = ["## SVI steps", "", machine(options.threads, options.device), ""]
    sound = True
    studies = [("vae", n) for n in options.batches] + [("toy", n) for n in options.toy]
    for kind, rows in studies:
        study = Study(kind, rows, options)
        times = study.run()
        lines += study.markdown(times)
        sound = sound and study.sound
        span = ABOUT.format(first=study.skip + 1, last=study.train)
    write("\n".join([*lines, span]), options.output)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
