"""Matrix products by the faster of two libraries, measured once for each shape.

Torch's own `mm` on a CPU goes to the BLAS it was built with, MKL as a rule, which on processors
of other makers may run at half the speed of oneDNN, which torch holds too.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor, fx

# oneDNN has to be this much faster: what is gained below that is lost in noise, and another choice
# makes another graph, which no earlier process has compiled.
_WORTHWHILE = 0.75
_SECONDS, _MOST_ROUNDS = 0.02, 20

_faster: dict[tuple[Any, ...], bool] = {}


def with_fastest_products(module: fx.GraphModule) -> tuple[fx.GraphModule, int]:
    """A copy of a graph in which products go to oneDNN where it was measured to be faster.

    Returns:
        The graph, and how many of its products changed.
    """
    graph = copy.deepcopy(module.graph)
    changed = sum(_replaced(node) for node in graph.nodes) if _available() else 0
    return fx.GraphModule(module, graph), changed


def _available() -> bool:
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
    if a is None or b is None or (bias is not None and (c is None or c.dim() != 1)):
        return False
    if not onednn_is_faster(a, b, bias is not None):
        return False
    node.target, node.args = torch.ops.ppvae.onednn_product.default, (left, right, bias)
    return True


def _shape_of(node: Any) -> Tensor | None:
    """The tensor without data that stands for a node, where oneDNN may take it."""
    tensor = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(tensor, Tensor) or 0 in tensor.shape:
        return None
    return tensor if tensor.device.type == "cpu" and tensor.dtype == torch.float32 else None


def onednn_is_faster(a: Tensor, b: Tensor, bias: bool) -> bool:
    """Whether oneDNN multiplies matrices of these shapes and strides clearly faster.

    Args:
        a: ``(m, k)``, of which shape and strides are read.
        b: ``(k, n)``, likewise.
        bias: Whether ``(n,)`` is added.
    """
    key = (*a.shape, *b.shape, *a.stride(), *b.stride(), bias, torch.get_num_threads())
    if key not in _faster:
        left, right = (torch.empty_strided(tuple(t.shape), t.stride()).fill_(0.5) for t in (a, b))
        offset = torch.zeros(b.shape[1]) if bias else None

        def default() -> Tensor:
            return left @ right if offset is None else torch.addmm(offset, left, right)

        def other() -> Tensor:
            product: Tensor = torch.ops.ppvae.onednn_product(left, right, offset)
            return product

        _faster[key] = _race(other, default) < _WORTHWHILE
    return _faster[key]


def _race(one: Any, other: Any) -> float:
    """The least time of the one over that of the other, taken in turns."""
    with torch.no_grad():
        one(), other()
        best = [float("inf"), float("inf")]
        began = time.perf_counter()
        for _ in range(_MOST_ROUNDS):
            for index, run in enumerate((one, other)):
                start = time.perf_counter()
                run()
                best[index] = min(best[index], time.perf_counter() - start)
            if time.perf_counter() - began > _SECONDS:
                break
    return best[0] / best[1]
