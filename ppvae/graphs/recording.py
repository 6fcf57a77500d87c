"""What of a graph a CUDA graph would freeze: values that are computed on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ppvae.graphs.capturing import Graph


def not_recordable(graph: Graph) -> str | None:
    """Why a CUDA graph would not do what a graph does; `None` where nothing speaks against it.

    A CUDA graph repeats work of the device alone. Whatever the CPU computes is as it was when it
    was recorded, which is right of constants, and wrong of draws, inputs and tensors that may be
    changed in place between calls.
    """
    nodes = list(graph.module.graph.nodes)
    places = [node for node in nodes if node.op == "placeholder"]
    given, held = places[: graph.num_inputs], places[graph.num_inputs :]
    moving = {node for node in given if _on_cpu(node)}
    moving |= {
        node
        for node, tensor, is_constant in zip(held, graph.held, graph.fresh, strict=True)
        if tensor.device.type == "cpu" and not is_constant
    }
    for node in nodes:
        if node.op != "call_function":
            continue
        used = [part for part in node.all_input_nodes if part in moving]
        if used:
            return (
                f"{node.target} uses a tensor on the CPU that may change between calls: move it "
                f"to the device"
            )
        if not _on_cpu(node):
            continue
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return f"{node.target} draws on the CPU"
        if any(_tensors(part) and not _on_cpu(part) for part in node.all_input_nodes):
            return f"{node.target} waits for the device, as its result is on the CPU"
    return None


def _tensors(node: fx.Node) -> list[Tensor]:
    """The tensors without data that stand for what a node gives."""
    value: Any = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return [each for each in values if isinstance(each, Tensor)]


def _on_cpu(node: fx.Node) -> bool:
    return any(each.device.type == "cpu" for each in _tensors(node))
