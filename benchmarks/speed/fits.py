"""Contestants of the benchmark of per-datapoint fits, all but NumPyro."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import infer
from pyro.distributions import constraints
from torch import Tensor

from speed.frozen import LOSSES, Z_DIM, decode, tensors


class Fits:
    """Fits of every row of one problem, the model held fixed.

    Args:
        kind: ``"digits"`` or ``"toy"``.
        path: File with the decoder and the rows.
        device: Where it runs.
        options: What tells contestants of one class apart.
    """

    def __init__(self, kind: str, path: str, device: str = "cpu", **options: Any) -> None:
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        self.kind, self.options = kind, options
        held = tensors(path, device)
        self.x = held.pop("x")
        self.p = held
        self.shape = (len(self.x), Z_DIM) if kind == "digits" else (len(self.x),)
        pyro.enable_validation(False)

    def packed(self, loc: Tensor, log_sd: Tensor) -> np.ndarray:
        """What all return: ``(rows, 2 z_dim)``, means and log scales."""
        both = [t.detach().reshape(len(self.x), -1) for t in (loc, log_sd)]
        return torch.cat(both, dim=-1).cpu().numpy()

    def model(self, x: Tensor) -> None:
        """The pair's model in plain Pyro."""
        with pyro.plate("data", len(x)):
            if self.kind == "toy":
                z = pyro.sample("z", dist.Exponential(torch.ones_like(x)))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
                return
            zero = x.new_zeros(len(x), Z_DIM)
            z = pyro.sample("z", dist.Normal(zero, torch.ones_like(zero)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decode(self.p, z)).to_event(1), obs=x)

    def fit(self, steps: int, draws: int, lr: float, start: np.ndarray | None = None) -> np.ndarray:
        """Fit with Adam and a cosine schedule, all rows from the standard member or ``start``."""
        raise NotImplementedError


class ByHand(Fits):
    """Hand-written torch, eager, or with ``options["compiled"]`` a compiled loss and fused Adam."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.loss = LOSSES[self.kind]
        if options.get("compiled"):
            self.loss = torch.compile(self.loss, dynamic=False, fullgraph=True)

    def fit(self, steps: int, draws: int, lr: float, start: np.ndarray | None = None) -> np.ndarray:
        if start is None:
            loc, log_sd = (self.x.new_zeros(self.shape) for _ in range(2))
        else:
            loc, log_sd = torch.tensor(start).to(self.x).chunk(2, dim=-1)
        loc, log_sd = loc.clone().requires_grad_(), log_sd.clone().requires_grad_()
        fused = True if self.options.get("compiled") else None
        adam = torch.optim.Adam([loc, log_sd], lr=lr, fused=fused)
        for step in range(steps):
            adam.param_groups[0]["lr"] = 0.5 * lr * (1 + math.cos(math.pi * step / steps))
            adam.zero_grad()
            self.loss(self.p, self.x, loc, log_sd, draws).backward()
            adam.step()
        return self.packed(loc, log_sd)


class PyroSvi(Fits):
    """`pyro.infer.SVI` with a row of parameters for each datum, or with `AutoNormal`."""

    def guide(self, x: Tensor) -> None:
        """A row for each datum."""
        zero = x.new_zeros(len(x), *self.shape[1:])
        loc = pyro.param("loc", zero)
        scale = pyro.param("scale", torch.ones_like(zero), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            if self.kind == "toy":
                pyro.sample("z", dist.LogNormal(loc, scale))
            else:
                pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def run(self, x: Tensor, steps: int, draws: int, lr: float) -> tuple[Tensor, Tensor]:
        """Fit rows; means and scales."""
        pyro.clear_param_store()
        guide: Any = self.guide
        auto = self.options.get("auto")
        if auto:
            first = torch.full((len(x), *self.shape[1:]), float(self.kind == "toy")).to(x)
            guide = infer.autoguide.AutoNormal(
                self.model,
                init_loc_fn=infer.autoguide.init_to_value(values={"z": first}),
                init_scale=1.0,
            )
        mean_field = self.kind == "digits" and not auto
        elbo = infer.TraceMeanField_ELBO if mean_field else infer.Trace_ELBO
        schedule = pyro.optim.CosineAnnealingLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "T_max": steps}
        )
        many = {"num_particles": draws, "vectorize_particles": True} if draws > 1 else {}
        svi = infer.SVI(self.model, guide, schedule, elbo(max_plate_nesting=1, **many))
        for _ in range(steps):
            svi.step(x)
            schedule.step()
        if auto:
            return guide.locs.z, guide.scales.z
        return pyro.param("loc"), pyro.param("scale")

    def fit(self, steps: int, draws: int, lr: float, start: np.ndarray | None = None) -> np.ndarray:
        loc, scale = self.run(self.x, steps, draws, lr)
        return self.packed(loc, scale.log())

    def one_by_one(self, steps: int, draws: int, lr: float, rows: int) -> None:
        """A Python loop over the first ``rows`` rows."""
        for row in self.x[:rows].split(1):
            self.run(row, steps, draws, lr)


class Ours(Fits):
    """`ppvae.fit_per_datapoint` as it stands."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        import ppvae
        from ppvae import families

        self.engine = ppvae.fit_per_datapoint
        self.family = families.LogNormal() if self.kind == "toy" else families.DiagonalNormal(Z_DIM)
        self.seconds = math.nan

    def fit(self, steps: int, draws: int, lr: float, start: np.ndarray | None = None) -> np.ndarray:
        """Its defaults; the arguments are Adam's, and not for it."""
        found = self.engine(self.model, self.family, self.x)
        self.seconds = found.seconds
        return found.guide.table("z").weight.detach().cpu().numpy()

    def fit_seconds(self) -> float:
        """Of the last fit, without the draws for the reported ELBO."""
        return self.seconds
