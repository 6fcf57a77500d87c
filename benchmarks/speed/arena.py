"""Contestants in processes of their own, run in turn.

Each contestant lives in a worker process, so that the thread pools of torch and JAX are strangers
to each other. The parent lets one of them run at a time; the others sleep on a pipe. A turn in
which other processes took the processor is a disturbed one, and counts only where there are not
enough quiet ones.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# A turn is disturbed where others used more than this share of one core.
MOST_FOREIGN = 0.15


class MissingError(Exception):
    """A contestant cannot run here; the message says why, in words."""


class BrokenError(Exception):
    """A contestant failed; the message is its traceback."""


def _busy_seconds() -> float | None:
    """Processor seconds that anything on this machine has used, stolen ones included."""
    try:
        fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:  # Not Linux: no turn is rejected.
        return None
    user, nice, system, _, _, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _serve(pipe: Any, target: str, kwargs: dict[str, Any], threads: int) -> None:
    """What a worker does: make the contestant, then answer calls of its methods."""
    sys.path.insert(0, str(ROOT))
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.sched_setaffinity(0, cores)
    try:
        module, name = target.split(":")
        contestant = getattr(importlib.import_module(f"speed.{module}"), name)(**kwargs)
        pipe.send(("done", None, 0.0, 0.0))
    except MissingError as error:
        pipe.send(("missing", str(error), 0.0, 0.0))
        return
    except ModuleNotFoundError as error:
        pipe.send(("missing", f"{error.name} is not installed", 0.0, 0.0))
        return
    except Exception:
        pipe.send(("broken", traceback.format_exc(), 0.0, 0.0))
        return
    while True:
        order = pipe.recv()
        if order is None:
            return
        method, args = order
        busy, own, began = _busy_seconds(), time.process_time(), time.perf_counter()
        try:
            result = getattr(contestant, method)(*args)
        except MissingError as error:
            pipe.send(("missing", str(error), 0.0, 0.0))
            continue
        except Exception:
            pipe.send(("broken", traceback.format_exc(), 0.0, 0.0))
            continue
        seconds, own = time.perf_counter() - began, time.process_time() - own
        after = _busy_seconds()
        foreign = 0.0 if busy is None or after is None else (after - busy - own) / seconds
        pipe.send(("done", result, seconds, foreign))


def _serve_until_left(*args: Any) -> None:
    """Serve, and end in silence where the parent is gone."""
    with contextlib.suppress(EOFError, BrokenPipeError):
        _serve(*args)


class Worker:
    """A contestant in its own process.

    Args:
        target: ``"module:Class"`` in this package.
        threads: Cores that it may use.
        cache: Folder of compiled kernels; an empty one makes a cold start.
        **kwargs: What the class is made with.

    Raises:
        MissingError: If it cannot run here.
        BrokenError: If making it failed.
    """

    def __init__(
        self, target: str, *, threads: int, cache: str | None = None, **kwargs: Any
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        before = dict(os.environ)
        os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        if cache is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        try:
            self._process = context.Process(
                target=_serve_until_left, args=(theirs, target, kwargs, threads), daemon=True
            )
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        try:
            self._answer()
        except (MissingError, BrokenError):
            self.close()
            raise

    def call(self, method: str, *args: Any) -> tuple[Any, float, float]:
        """The result of a method, its seconds, and the cores that others used meanwhile."""
        self._pipe.send((method, args))
        return self._answer()

    def _answer(self) -> tuple[Any, float, float]:
        try:
            kind, result, seconds, foreign = self._pipe.recv()
        except EOFError:
            raise BrokenError("the worker process died") from None
        if kind == "missing":
            raise MissingError(result)
        if kind == "broken":
            raise BrokenError(result)
        return result, seconds, foreign

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive():
            with contextlib.suppress(OSError):
                self._pipe.send(None)
            self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()
        self._pipe.close()


@dataclass
class Times:
    """Seconds of the turns of one contestant, each for one unit of work."""

    seconds: list[float] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)

    @property
    def kept(self) -> list[float]:
        """The quiet turns; where these are less than half of them, the quieter half."""
        quiet = [s for s, f in zip(self.seconds, self.foreign, strict=True) if f <= MOST_FOREIGN]
        half = math.ceil(len(self.seconds) / 2)
        if len(quiet) >= half:
            return quiet
        order = sorted(range(len(self.seconds)), key=self.foreign.__getitem__)
        return [self.seconds[i] for i in order[:half]]

    @property
    def disturbed(self) -> bool:
        """Whether disturbed turns had to be counted."""
        quiet = sum(f <= MOST_FOREIGN for f in self.foreign)
        return quiet < math.ceil(len(self.seconds) / 2)

    @property
    def median(self) -> float:
        """Of the turns that count."""
        return statistics.median(self.kept)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        if len(self.kept) < 4:
            return math.nan
        low, _, high = statistics.quantiles(self.kept, n=4)
        return (high - low) / 2 / self.median


def race(
    workers: dict[str, Worker], *, rounds: int, turn: float, seed: int = 0
) -> dict[str, Times]:
    """Let all take ``rounds`` turns of about ``turn`` seconds each, in a new order every round.

    Returns:
        For each contestant, seconds for one of its steps.
    """
    order = random.Random(seed)
    counts = {}
    for name, worker in workers.items():
        count = 1
        while True:
            count, seconds, _ = worker.call("steps", count)
            if seconds >= turn / 2:
                break
            count = max(count + 1, min(10 * count, int(count * turn / max(seconds, 1e-6))))
        counts[name] = count
    times = {name: Times() for name in workers}
    for _ in range(rounds):
        for name in order.sample(sorted(workers), len(workers)):
            count, seconds, foreign = workers[name].call("steps", counts[name])
            times[name].seconds.append(seconds / count)
            times[name].foreign.append(foreign)
    return times


class Caches:
    """Folders of compiled kernels, one for each key, removed at the end."""

    def __init__(self) -> None:
        self._base = tempfile.mkdtemp(prefix="speed-")

    def __enter__(self) -> Caches:
        return self

    def __exit__(self, *error: Any) -> None:
        shutil.rmtree(self._base, ignore_errors=True)

    def folder(self, key: str) -> str:
        """The folder of a key; it is empty at first."""
        path = Path(self._base) / "".join(c if c.isalnum() else "_" for c in key)
        path.mkdir(exist_ok=True)
        return str(path)


def machine(threads: int, device: str) -> str:
    """The machine, the libraries and the threads, in one line."""
    from importlib import metadata

    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    versions = []
    for package in ("torch", "pyro-ppl", "numpyro", "jax", "pythae"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    extra = ""
    if device != "cpu":
        import torch

        extra = f", {torch.cuda.get_device_name(device)}"
    cores = "core" if os.cpu_count() == 1 else "cores"
    return (
        f"{cpu}, {os.cpu_count()} {cores}{extra}; {threads} thread{'s' * (threads != 1)}; "
        f"Python {platform.python_version()}, {', '.join(versions)}."
    )


def write(text: str, path: str | None) -> None:
    """Print a table, and put it in a file where one is named."""
    print(text, flush=True)
    if path is not None:
        Path(path).write_text(text + "\n", encoding="utf-8")


def say(text: str) -> None:
    """A line on how far it is, apart from the table."""
    print(text, file=sys.stderr, flush=True)
