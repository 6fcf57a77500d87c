"""Plain Pyro pairs as users write them, under Pyro's ways of running them and under ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import infer
from pyro.distributions import constraints
from torch import Tensor, nn

from speed.arena import MissingError
from speed.problems import Problem
from speed.steps import Steps

Program = Callable[[Tensor], Any]


def network(problem: Problem, name: str, device: str) -> nn.Module:
    """Two layers with a ReLU between them, with the problem's first parameters."""
    first = {
        key.removeprefix(f"{name}."): torch.tensor(value)
        for key, value in problem.params.items()
        if key.startswith(name)
    }
    sizes = [*first["0.weight"].shape[::-1], *first["2.weight"].shape[:1]]
    net = nn.Sequential(nn.Linear(*sizes[:2]), nn.ReLU(), nn.Linear(*sizes[1:]))
    net.load_state_dict(first)
    return net.to(device)


def vae_pair(problem: Problem, device: str) -> tuple[Program, Program]:
    """The VAE as two functions."""
    encoder, decoder = (network(problem, name, device) for name in ("encoder", "decoder"))
    z_dim = decoder[0].in_features

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            zero = x.new_zeros(len(x), z_dim)
            z = pyro.sample("z", dist.Normal(zero, torch.ones_like(zero)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_var = encoder(x).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, (0.5 * log_var).exp()).to_event(1))

    return model, guide


def toy_pair(problem: Problem, device: str) -> tuple[Program, Program]:
    """The toy as two functions."""
    loc0 = torch.tensor(problem.params["loc"], device=device)
    scale0 = torch.tensor(problem.params["log_scale"], device=device).exp()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(torch.ones_like(x)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = pyro.param("loc", loc0)
            scale = pyro.param("scale", scale0, constraint=constraints.positive)
            pyro.sample("z", dist.LogNormal(loc, scale))

    return model, guide


PAIRS = {"vae": vae_pair, "toy": toy_pair}
ELBOS = {
    "trace": infer.Trace_ELBO,
    "mean_field": infer.TraceMeanField_ELBO,
    "jit": lambda: infer.JitTrace_ELBO(ignore_jit_warnings=True),
}


class InPyro(Steps):
    """What the contestants of this file share."""

    def setup(self) -> None:
        torch.manual_seed(1)
        warnings.simplefilter("ignore")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise MissingError("torch sees no GPU")
        pyro.enable_validation(self.options.get("validation", False))

    def batches(self) -> list[Tensor]:
        return [torch.tensor(x, device=self.device) for x in self.problem.batches]

    def start(self, lr: float) -> None:
        pyro.clear_param_store()
        self.model, self.guide = PAIRS[self.problem.kind](self.problem, self.device)
        self.begin_svi(lr)

    def loss(self) -> Any:
        """An objective of the kind that was asked for."""
        return ELBOS[self.options["elbo"]]()

    def begin_svi(self, lr: float) -> None:
        """Make what steps."""
        raise NotImplementedError


class Svi(InPyro):
    """`pyro.infer.SVI`."""

    def begin_svi(self, lr: float) -> None:
        self.svi = infer.SVI(self.model, self.guide, pyro.optim.Adam({"lr": lr}), self.loss())

    def step(self, x: Tensor) -> Any:
        return self.svi.step(x)


class CompiledElbo(InPyro):
    """`torch.compile` of Pyro's `ELBOModule`, with torch's Adam."""

    def begin_svi(self, lr: float) -> None:
        with pyro.poutine.trace(param_only=True) as found:  # Parameters are made at first use.
            self.guide(self.batches()[0])
            self.model(self.batches()[0])
        params = [site["value"].unconstrained() for site in found.trace.nodes.values()]
        self.adam = torch.optim.Adam(params, lr=lr)
        self.elbo = torch.compile(Both(self.loss(), self.model, self.guide))

    def step(self, x: Tensor) -> Tensor:
        self.adam.zero_grad()
        loss = self.elbo(x)
        loss.backward()
        self.adam.step()
        return loss.detach()


class Both(nn.Module):
    """Pyro's `ELBOModule` of two functions; their parameters stay in the store."""

    def __init__(self, elbo: Any, model: Program, guide: Program) -> None:
        super().__init__()
        self.elbo = elbo(AsModule(model), AsModule(guide))

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        return self.elbo(x)


class AsModule(nn.Module):
    """A function as a module."""

    def __init__(self, function: Program) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        """Call it."""
        return self.function(x)


class Ours(InPyro):
    """`ppvae.SVI`, on the same pair."""

    def setup(self) -> None:
        super().setup()
        import ppvae

        if not hasattr(ppvae, "SVI"):
            raise MissingError("this version of ppvae has no SVI")
        self.kind = ppvae.SVI

    def begin_svi(self, lr: float) -> None:
        self.svi = self.kind(
            self.model,
            self.guide,
            pyro.optim.Adam({"lr": lr}),
            self.loss(),
            compile=self.options["compile"],
        )

    def step(self, x: Tensor) -> Any:
        return self.svi.step(x)

    def note(self) -> str:
        report = getattr(self.svi, "compile_report", None)
        return "" if report is None else " ".join(str(report()).split())
