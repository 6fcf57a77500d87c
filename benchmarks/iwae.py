"""How long does the importance-weighted evidence of 1,000 digits take, with 5,000 draws?

Runs ours, a hand-written loop over the same chunks and others in turn, checks that all find the
same value, and writes a table of ratios and of peak memory:

    pip install -e ".[bench]"
    python benchmarks/iwae.py --output iwae.md

A peer that is not installed is left out, in words. `--quick` tries it all out.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from speed.arena import BrokenError, Caches, MissingError, Times, Worker, machine, say, write

REFERENCE = "hand-written, ppvae's chunks"
FEW = 5
ENTRIES: dict[str, tuple[str, dict[str, Any]]] = {
    REFERENCE: ("evidence:ByHand", {}),
    "hand-written, 4,000 rows at once": ("evidence:ByHand", {"chunk": 4000}),
    "the same, compiled": ("evidence:ByHand", {"chunk": 4000, "compiled": True}),
    "Pyro, plate and replay, ppvae's chunks": ("evidence:InPyro", {}),
    "NumPyro's densities, `lax.map`, 4,000 rows at once": (
        "evidence_numpyro:Mapped",
        {"chunk": 4000},
    ),
    "pythae, `get_nll`": ("evidence:Pythae", {"rows": FEW}),
    "**`ppvae.iwae`**": ("evidence:Ours", {}),
}


def agreement(
    found: tuple[np.ndarray, np.ndarray | None], base: tuple[np.ndarray, np.ndarray]
) -> tuple[float, float]:
    """The mean difference on common rows, and its error."""
    count = len(found[0])
    error = base[1][:count] if found[1] is None else found[1]
    both = np.hypot(error.astype("float64"), base[1][:count].astype("float64"))
    difference = (found[0].astype("float64") - base[0][:count]).mean()
    return float(difference), float(np.sqrt((both**2).sum()) / count)


def main() -> int:
    """Run, write, and say by the exit status whether all agreed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="cores for each contestant")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="contestants whose name holds one of these")
    parser.add_argument("--output", help="write the Markdown here, too")
    parser.add_argument("--quick", action="store_true", help="few rows and draws")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.draws, options.rounds = 20, 200, 1
    if options.only is not None:
        for name in list(ENTRIES):
            if name != REFERENCE and not any(part in name for part in options.only):
                del ENTRIES[name]
    workers: dict[str, Worker] = {}
    notes, checks, peaks, firsts = [], {}, {}, {}
    base: Any = None
    sound = True
    with Caches() as caches:
        path = Path(caches.folder("rows")) / "rows.npz"
        trainer = Worker("frozen:Train", threads=options.threads)
        try:
            steps = 20 if options.quick else 4000
            np.savez(path, **trainer.call("run", options.rows, steps)[0])
        finally:
            trainer.close()
        try:
            for name, (target, extra) in ENTRIES.items():
                say(name)
                try:
                    workers[name] = Worker(
                        target,
                        threads=options.threads,
                        cache=caches.folder(name),
                        path=str(path),
                        draws=options.draws,
                        device=options.device,
                        **extra,
                    )
                    found, firsts[name], _ = workers[name].call("run")
                    base = found if name == REFERENCE else base
                    checks[name] = agreement(found, base)
                    peaks[name] = workers[name].call("peak")[0]
                except MissingError as error:
                    notes.append(f"{name}: left out: {error}.")
                except BrokenError as error:
                    notes.append(f"{name}: failed: {str(error).strip().splitlines()[-1]}.")
                    say(str(error))
                    sound = False
                if name not in peaks and name in workers:
                    workers.pop(name).close()
            times = {name: Times() for name in workers}
            for _ in range(options.rounds):
                for name, worker in workers.items():
                    _, seconds, foreign = worker.call("run")
                    times[name].seconds.append(seconds)
                    times[name].foreign.append(foreign)
        finally:
            for worker in workers.values():
                worker.close()
    scale = {name: 1.0 for name in workers}
    for name in workers:
        if "pythae" in name:
            scale[name] = options.rows / min(FEW, options.rows)
            notes.append(f"{name}: the time of {FEW} rows, times {scale[name]:,.0f}: extrapolated.")
    unit = times[REFERENCE].median
    lines = [
        "## Importance-weighted evidence",
        "",
        machine(options.threads, options.device),
        "",
        f"{options.rows:,} digits, 64 pixels, 64-100-20-100-64, {options.draws:,} draws each. "
        f"Relative to a hand-written eager loop over the chunks that ppvae takes: "
        f"{1e3 * unit / options.rows:.3g} ms a datum here. Memory is what a run takes beyond what "
        f"was resident before; the weights alone are "
        f"{options.rows * options.draws * 4 / 2**20:.0f} MiB.",
        "",
        "| | time | first call | peak memory, MiB | difference, nats a datum |",
        "|---|---|---|---|---|",
    ]
    for name in workers:
        difference, error = checks[name]
        fine = abs(difference) <= 5 * error + 1e-4
        sound = sound and fine
        shown = "–" if name == REFERENCE else f"{difference:+.4f} ± {error:.4f}"
        peak = "–" if peaks[name] is None else f"{peaks[name]:.0f}"
        mark = "\\*" if times[name].disturbed else ""
        lines.append(
            f"| {name} | {scale[name] * times[name].median / unit:.3g}{mark} | "
            f"{scale[name] * firsts[name] / unit:.3g} | {peak} | "
            f"{shown}{'' if fine else ' **differs**'} |"
        )
    if any(each.disturbed for each in times.values()):
        notes.append("\\* More than half of the turns were disturbed by other processes.")
    write("\n".join([*lines, "", *(f"- {note}" for note in notes), ""]), options.output)
    assert math.isfinite(statistics.fmean(each.median for each in times.values()))
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
