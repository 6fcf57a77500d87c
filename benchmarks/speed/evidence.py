"""Contestants of the benchmark of importance-weighted evidence, all but NumPyro."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor

from speed.arena import MissingError
from speed.frozen import Z_DIM, decode, encode, tensors


class Evidence:
    """log p(x) of every row by importance weights, the pair held fixed.

    Args:
        path: File with the parameters and the rows.
        draws: Draws for each row.
        device: Where it runs.
        options: What tells contestants of one class apart.
    """

    def __init__(self, path: str, draws: int, device: str = "cpu", **options: Any) -> None:
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        pyro.enable_validation(False)
        self.p = tensors(path, device)
        self.x, self.draws, self.device, self.options = self.p.pop("x"), draws, device, options

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """The bound for each row, and its standard error."""
        weights = self.log_weights()
        value = torch.logsumexp(weights, dim=0) - math.log(self.draws)
        spread = torch.exp(weights - value).std(dim=0) / math.sqrt(self.draws)
        return value.cpu().numpy(), spread.cpu().numpy()

    def log_weights(self) -> Tensor:
        """``(draws, rows)``."""
        raise NotImplementedError

    def peak(self) -> float | None:
        """MiB that a run takes beyond what was held before, `None` where that cannot be had."""
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.run()
            return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20
        if not sys.platform.startswith("linux"):
            return None
        return resident_peak(self.run)


def resident_peak(run: Any) -> float:
    """MiB by which resident memory rises at most during a call (Linux)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # What was freed before must not be there to be used again.
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # The high-water mark starts anew.
    before = status("VmRSS")
    run()
    return (status("VmHWM") - before) / 1024


def status(name: str) -> int:
    """A figure of this process, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise KeyError(name)


# Draws times rows at once of `ppvae.iwae` here: 6.4 MB for the widest layer, which has 100 units.
OURS = 16_000


def chunks(x: Tensor, draws: int, most: int | None) -> list[tuple[slice, int]]:
    """Rows and draws of each evaluation: ``most`` of both together, or as many as ppvae takes."""
    most = OURS if most is None else most
    rows = min(len(x), most)
    each = max(1, most // rows)
    full, rest = divmod(draws, each)
    sizes = [each] * full + [rest] * (rest > 0)
    return [(slice(i, i + rows), size) for i in range(0, len(x), rows) for size in sizes]


class ByHand(Evidence):
    """A hand-written loop over chunks, eager or compiled.

    ``options["chunk"]`` is how many draws times rows are decoded at once; without it the chunks
    are those that ppvae takes.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.part = self.weights
        if options.get("compiled"):
            self.part = torch.compile(self.weights, dynamic=False, fullgraph=True)

    @staticmethod
    def weights(p: dict[str, Tensor], x: Tensor, loc: Tensor, log_sd: Tensor, s: int) -> Tensor:
        """``(s, rows)``."""
        noise = torch.randn(s, *loc.shape, dtype=loc.dtype, device=loc.device)
        z = loc + log_sd.exp() * noise
        logits = decode(p, z)
        nats = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        return (0.5 * (noise**2 - z**2) + log_sd).sum(-1) - nats.sum(-1)

    @torch.no_grad()
    def log_weights(self) -> Tensor:
        loc, log_sd = encode(self.p, self.x)
        out = torch.empty(self.draws, len(self.x), dtype=loc.dtype, device=loc.device)
        done: dict[int, int] = {}
        for rows, size in chunks(self.x, self.draws, self.options.get("chunk")):
            at = done.get(rows.start, 0)
            out[at : at + size, rows] = self.part(
                self.p, self.x[rows], loc[rows], log_sd[rows], size
            )
            done[rows.start] = at + size
        return out


class Pair(Evidence):
    """The pair in plain Pyro."""

    def model(self, x: Tensor) -> None:
        """The model."""
        with pyro.plate("data", len(x), dim=-1):
            zero = x.new_zeros(len(x), Z_DIM)
            z = pyro.sample("z", dist.Normal(zero, torch.ones_like(zero)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decode(self.p, z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The guide."""
        with pyro.plate("data", len(x), dim=-1):
            loc, log_sd = encode(self.p, x)
            pyro.sample("z", dist.Normal(loc, log_sd.exp()).to_event(1))


class InPyro(Pair):
    """Pyro's traces under a plate of draws, in the same chunks."""

    @torch.no_grad()
    def log_weights(self) -> Tensor:
        parts = []
        for _, size in chunks(self.x, self.draws, None):
            with pyro.plate("draws", size, dim=-2):
                guide = poutine.trace(self.guide).get_trace(self.x)
                model = poutine.trace(poutine.replay(self.model, guide)).get_trace(self.x)
            guide.compute_log_prob()
            model.compute_log_prob()
            nodes = model.nodes
            joint = nodes["z"]["log_prob"] + nodes["x"]["log_prob"]
            parts.append(joint - guide.nodes["z"]["log_prob"])
        return torch.cat(parts)


class Ours(Pair):
    """`ppvae.iwae` as it stands."""

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        import ppvae

        found = ppvae.iwae(self.model, self.guide, self.x, self.draws)
        return found.value.cpu().numpy(), found.stderr.cpu().numpy()


class Pythae(Evidence):
    """pythae's `VAE.get_nll`, on the first ``options["rows"]`` rows; for all its name, log p."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.device != "cpu":
            raise MissingError("pythae's get_nll is run on processors only here")
        from speed.in_pythae import vae
        from speed.problems import Problem

        params = {name: t.numpy() for name, t in self.p.items()}
        self.vae = vae(Problem("vae", self.x.numpy()[None], params, 0.0)).eval()

    @torch.no_grad()
    def run(self) -> tuple[np.ndarray, None]:
        rows = self.x[: self.options["rows"]]
        # It takes whole batches of draws alone.
        each = math.gcd(self.draws, 1000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = [self.vae.get_nll(row[None], self.draws, batch_size=each) for row in rows]
        return np.array(values), None
