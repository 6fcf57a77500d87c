"""Matrix products by the fastest of three ways, measured once for each shape.

Torch's own `mm` on a CPU goes to the BLAS it was built with, MKL as a rule, which on processors
of other makers may run at half the speed of oneDNN, which torch holds too. And of a few rows with
the transpose of a large matrix, as in every linear layer at a small batch, MKL may take three times
as long as for the transpose of the same product, (W xᵀ)ᵀ.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx

# Another way has to be this much faster: what is gained below that is lost in noise, and another
# choice makes another graph, which no earlier process has compiled.
_WORTHWHILE = 0.75
_SECONDS, _MOST_ROUNDS = 0.05, 50
# Multiplications below which a product takes some microseconds, whichever way.
_SMALL = 2**20


class Way(Enum):
    """How a product is computed."""

    GIVEN = "as the program has it"
    FLIPPED = "as the transpose of the product of the transposes"
    ONEDNN = "by oneDNN"


_fastest: dict[tuple[Any, ...], Way] = {}


def with_fastest_products(module: fx.GraphModule) -> tuple[fx.GraphModule, int]:
    """A copy of a graph in which products go other ways where these were measured to be faster.

    Returns:
        The graph, and how many of its products changed.
    """
    graph = copy.deepcopy(module.graph)
    changed = sum(_replaced(node) for node in list(graph.nodes))
    return fx.GraphModule(module, graph), changed


def _available() -> bool:
    """Whether torch holds oneDNN."""
    try:
        return bool(torch.backends.mkldnn.is_available()) and bool(
            torch.ops.mkldnn._linear_pointwise.default
        )
    except (AttributeError, RuntimeError):
        return False


def _replaced(node: fx.Node) -> bool:
    aten = torch.ops.aten
    if node.op != "call_function" or node.kwargs:
        return False
    if node.target is aten.mm.default:
        bias, (left, right) = None, node.args
    elif node.target is aten.addmm.default:
        bias, left, right = node.args
    else:
        return False
    a, b, c = (_shape_of(part) for part in (left, right, bias))
    if a is None or b is None:
        return False
    if bias is not None and (c is None or c.shape != b.shape[1:]):
        return False
    if a.numel() * b.shape[1] < _SMALL:
        return False
    way = fastest_way(a, b, bias is not None)
    if way is Way.ONEDNN:
        node.target, node.args = torch.ops.ppvae.onednn_product.default, (left, right, bias)
    elif way is Way.FLIPPED:
        graph = node.graph
        with graph.inserting_before(node):
            sides = [graph.call_function(aten.t.default, (side,)) for side in (right, left)]
            product = graph.call_function(aten.mm.default, tuple(sides))
            turned = graph.call_function(aten.t.default, (product,))
            if bias is not None:
                turned = graph.call_function(aten.add.Tensor, (turned, bias))
            whole = graph.call_function(
                aten.clone.default, (turned,), {"memory_format": torch.contiguous_format}
            )
        whole.meta = dict(node.meta)
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
    return way is not Way.GIVEN


def _shape_of(node: Any) -> Tensor | None:
    """The tensor without data that stands for a node, where other ways may take it."""
    tensor = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(tensor, Tensor) or 0 in tensor.shape:
        return None
    return tensor if tensor.device.type == "cpu" and tensor.dtype == torch.float32 else None


def fastest_way(a: Tensor, b: Tensor, bias: bool) -> Way:
    """Which way matrices of these shapes and strides are multiplied fastest, by a clear margin.

    Args:
        a: ``(m, k)``, of which shape and strides are read.
        b: ``(k, n)``, likewise.
        bias: Whether ``(n,)`` is added.
    """
    key = (*a.shape, *b.shape, *a.stride(), *b.stride(), bias, torch.get_num_threads())
    if key not in _fastest:
        left, right = (torch.empty_strided(tuple(t.shape), t.stride()).fill_(0.5) for t in (a, b))
        offset = torch.zeros(b.shape[1]) if bias else None

        ways = _ways(left, right, offset)
        seconds = dict(zip(ways, _race(*ways.values()), strict=True))
        best = Way.GIVEN
        for way in ways:
            if seconds[way] < _WORTHWHILE * seconds[best]:
                best = way
        _fastest[key] = best
    return _fastest[key]


def _ways(left: Tensor, right: Tensor, bias: Tensor | None) -> dict[Way, Callable[[], Tensor]]:
    """The product by each way that there is here."""

    def given() -> Tensor:
        return left @ right if bias is None else torch.addmm(bias, left, right)

    def flipped() -> Tensor:
        product = (right.t() @ left.t()).t()
        return (product if bias is None else product + bias).contiguous()

    def onednn() -> Tensor:
        product: Tensor = torch.ops.ppvae.onednn_product(left, right, bias)
        return product

    ways = {Way.GIVEN: given, Way.FLIPPED: flipped}
    return {**ways, Way.ONEDNN: onednn} if _available() else ways


def _race(*runs: Callable[[], Tensor]) -> list[float]:
    """The least time of each, taken in turns."""
    best = [math.inf] * len(runs)
    with torch.no_grad():
        for run in runs:
            run()
        began = time.perf_counter()
        for _ in range(_MOST_ROUNDS):
            for index, run in enumerate(runs):
                start = time.perf_counter()
                run()
                best[index] = min(best[index], time.perf_counter() - start)
            if time.perf_counter() - began > _SECONDS:
                break
    return best
