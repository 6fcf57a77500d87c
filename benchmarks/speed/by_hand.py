"""Hand-written torch: eager, compiled, and all of a step in one graph."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speed.arena import MissingError
from speed.steps import Steps

BETAS, EPS = (0.9, 0.999), 1e-8
Loss = Callable[[dict[str, Tensor], Tensor], Tensor]


def vae_loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """−ELBO, summed over rows, with the KL in closed form."""
    hidden = F.linear(x, p["encoder.0.weight"], p["encoder.0.bias"]).relu()
    loc, log_var = F.linear(hidden, p["encoder.2.weight"], p["encoder.2.bias"]).chunk(2, dim=-1)
    z = loc + (0.5 * log_var).exp() * torch.randn_like(loc)
    hidden = F.linear(z, p["decoder.0.weight"], p["decoder.0.bias"]).relu()
    logits = F.linear(hidden, p["decoder.2.weight"], p["decoder.2.bias"])
    nats = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    return nats + 0.5 * (loc**2 + log_var.exp() - 1 - log_var).sum()


def toy_loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """−ELBO, summed over rows: log q(z) − log p(x, z) at one draw."""
    noise = torch.randn_like(x)
    log_z = p["loc"] + p["log_scale"].exp() * noise
    z = log_z.exp()
    return (z + 0.5 * (x - z) ** 2 - 0.5 * noise**2 - log_z - p["log_scale"]).sum()


LOSSES: dict[str, Loss] = {"vae": vae_loss, "toy": toy_loss}


class ByHand(Steps):
    """What the contestants of this file share."""

    def setup(self) -> None:
        torch.manual_seed(1)
        self.loss = LOSSES[self.problem.kind]
        if self.device != "cpu" and not torch.cuda.is_available():
            raise MissingError("torch sees no GPU")

    def batches(self) -> list[Tensor]:
        return [torch.tensor(x, device=self.device) for x in self.problem.batches]

    def first(self) -> dict[str, Tensor]:
        """The first parameters."""
        return {n: torch.tensor(p, device=self.device) for n, p in self.problem.params.items()}


class Eager(ByHand):
    """The loop that everybody writes."""

    def start(self, lr: float) -> None:
        self.params = {n: p.requires_grad_() for n, p in self.first().items()}
        self.adam = torch.optim.Adam(self.params.values(), lr=lr)

    def step(self, x: Tensor) -> Tensor:
        self.adam.zero_grad()
        loss = self.loss(self.params, x)
        loss.backward()
        self.adam.step()
        return loss.detach()


class CompiledLoss(Eager):
    """`torch.compile` of the loss, with fused Adam."""

    def setup(self) -> None:
        super().setup()
        self.loss = torch.compile(self.loss, dynamic=False, fullgraph=True)

    def start(self, lr: float) -> None:
        super().start(lr)
        self.adam = torch.optim.Adam(self.params.values(), lr=lr, fused=True)


class OneGraph(ByHand):
    """Loss, gradients and Adam traced to one graph and compiled by Inductor.

    ``options["products"]`` puts the faster of torch's own and oneDNN's kernel for each matrix
    product. Without ``options["inductor"]`` the graph is replayed as it was traced.
    """

    def setup(self) -> None:
        super().setup()
        try:
            import torch._inductor
            from torch.fx.experimental.proxy_tensor import make_fx
        except ImportError as error:
            raise MissingError(f"this torch cannot trace to one graph: {error}") from None
        self.make_fx = make_fx
        self.compile = torch._inductor.compile
        self.replaced = (0, 0)
        self.graph: Callable[..., Any] | None = None
        if self.options.get("products") and (
            self.device != "cpu" or not torch.backends.mkldnn.is_available()
        ):
            raise MissingError("oneDNN is for processors, and this is none that it serves")

    def start(self, lr: float) -> None:
        first = self.first()
        self.names = list(first)
        self.state = [
            *first.values(),
            *(torch.zeros_like(p) for p in first.values()),
            *(torch.zeros_like(p) for p in first.values()),
        ]
        self.lr, self.count = lr, 0
        self.rates = torch.zeros(2, device=self.device)

    def whole(self, state: list[Tensor], x: Tensor, rates: Tensor) -> tuple[Tensor, ...]:
        """One step on tensors: the loss; parameters and moments are changed in place."""
        n = len(self.names)
        leaves = {
            name: p.detach().requires_grad_() for name, p in zip(self.names, state, strict=False)
        }
        loss = self.loss(leaves, x)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        for i, grad in enumerate(grads):
            first = BETAS[0] * state[n + i] + (1 - BETAS[0]) * grad
            second = BETAS[1] * state[2 * n + i] + (1 - BETAS[1]) * grad * grad
            state[2 * n + i].copy_(second)
            state[n + i].copy_(first)
            state[i].sub_(rates[0] * first / (second.sqrt() * rates[1] + EPS))
        return (loss.detach(),)

    def trace(self, x: Tensor) -> Callable[..., Any]:
        """The graph of a step."""
        state = [t.clone() for t in self.state]
        # make_fx counts the arguments of a function, and of a method one too many.
        whole = functools.partial(OneGraph.whole, self)
        graph = self.make_fx(whole)(state, x, self.rates)
        if self.options.get("products"):
            self.replaced = faster_products(graph)
        if not self.options.get("inductor", True):
            return graph
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {"fallback_random": True}
            flat = [*state, x, self.rates]
            plain = flatten(graph, len(state))
            return self.compile(plain, flat, options=options)

    def step(self, x: Tensor) -> Tensor:
        if self.graph is None:
            graph = self.trace(x)
            if self.options.get("inductor", True):
                self.graph = graph
            else:
                self.graph = lambda *flat: graph(list(flat[:-2]), *flat[-2:])
        self.count += 1
        t = self.count
        self.rates[0] = self.lr / (1 - BETAS[0] ** t)
        self.rates[1] = 1 / math.sqrt(1 - BETAS[1] ** t)
        with torch.no_grad():
            return self.graph(*self.state, x, self.rates)[0]

    def note(self) -> str:
        if not self.options.get("products"):
            return ""
        done, of = self.replaced
        return f"oneDNN was the faster in {done} of {of} matrix products"


def flatten(graph: torch.fx.GraphModule, count: int) -> torch.fx.GraphModule:
    """The graph with ``count`` tensors, x and rates as arguments, in place of a list."""
    graph.graph.set_codegen(torch.fx.CodeGen())
    graph.recompile()
    assert sum(n.op == "placeholder" for n in graph.graph.nodes) == count + 2
    return graph


def fastest(run: Callable[[], Any], repeats: int = 15) -> float:
    """The least seconds of some runs."""
    for _ in range(3):
        run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def faster_products(graph: torch.fx.GraphModule) -> tuple[int, int]:
    """Put oneDNN's kernel wherever it is faster by 5 %; how many of how many."""
    aten = torch.ops.aten
    linear = torch.ops.mkldnn._linear_pointwise.default
    chosen = found = 0
    for node in list(graph.graph.nodes):
        if node.target not in (aten.mm.default, aten.addmm.default):
            continue
        found += 1
        bias = node.args[0] if node.target is aten.addmm.default else None
        left, right = node.args[-2:]
        if bias is not None and bias.meta["val"].dim() != 1:
            continue
        like = [None if n is None else example(n.meta["val"]) for n in (bias, left, right)]
        b, a, w = like
        plain = fastest(lambda a=a, w=w, b=b: a @ w if b is None else torch.addmm(b, a, w))

        def other(a: Tensor = a, w: Tensor = w, b: Tensor | None = b) -> Tensor:
            return linear(a, w.t(), b, "none", [], "")

        if fastest(other) > 0.95 * plain:
            continue
        with graph.graph.inserting_before(node):
            turned = graph.graph.call_function(aten.t.default, (right,))
            new = graph.graph.call_function(linear, (left, turned, bias, "none", [], ""))
        turned.meta["val"] = right.meta["val"].t()
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
        chosen += 1
    graph.recompile()
    return chosen, found


def example(value: Tensor) -> Tensor:
    """A tensor with the same sizes and strides."""
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return made.fill_(0.5)


class CapturedGraph(Eager):
    """A CUDA graph of forward, backward and fused Adam, captured by hand."""

    def setup(self) -> None:
        super().setup()
        if self.device == "cpu":
            raise MissingError("a CUDA graph needs a GPU")
        if self.options.get("compiled"):
            self.loss = torch.compile(self.loss, dynamic=False, fullgraph=True)

    def start(self, lr: float) -> None:
        self.params = {n: p.requires_grad_() for n, p in self.first().items()}
        self.adam = torch.optim.Adam(
            self.params.values(), lr=torch.tensor(0.0), fused=True, capturable=True
        )
        self.x = self.batches()[0].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # Warm up; a rate of 0 leaves the parameters as they are.
            for _ in range(3):
                super().step(self.x)
        torch.cuda.current_stream().wait_stream(stream)
        for state in self.adam.state.values():
            for tensor in state.values():
                tensor.zero_()
        self.adam.param_groups[0]["lr"].fill_(lr)
        self.adam.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self.loss(self.params, self.x)
            self.out.backward()
            self.adam.step()
            self.out = self.out.detach()

    def step(self, x: Tensor) -> Tensor:
        self.x.copy_(x)
        self.graph.replay()
        return self.out
