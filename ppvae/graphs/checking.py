"""Whether two runs of the same computation gave the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ppvae.graphs.capturing import Graph

# Relative to the Euclidean norm. Another order of summation costs a few units of rounding.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_LOW_PRECISION = 2e-2
# Of 10 bits of mantissa, in products and, unless told otherwise, convolutions of cuDNN.
_TF32 = 2e-3


def tolerance_of(dtype: torch.dtype) -> float:
    """The relative difference that rounding may make."""
    return _TOLERANCE.get(dtype, _LOW_PRECISION)


def rounding_of(graph: Graph) -> float:
    """The relative difference that the rounding inside of a graph may make to float32 results.

    0 where all is in float32: the tolerance is then that of the results themselves.
    """
    nodes = [node for node in graph.module.graph.nodes if node.op == "call_function"]
    values = [node.meta.get("val") for node in nodes]
    tensors = [value for value in values if isinstance(value, Tensor)]
    if any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in tensors):
        return _LOW_PRECISION
    if any(tensor.device.type == "cuda" for tensor in tensors) and _tf32():
        return _TF32
    return 0.0


def _tf32() -> bool:
    try:
        allowed = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # Set under torch's other names, which it then refuses to compare.
        return True
    return any(allowed)


def far_apart(
    one: Sequence[Tensor], other: Sequence[Tensor], rounding: float = 0.0
) -> float | None:
    """How far two results differ, where that is more than rounding can explain.

    Each tensor may differ by 1e-4 of its norm in single precision and by 1e-8 in double, or by
    that fraction of a thousandth of the largest norm of all, as small differences of large
    numbers do. NaN equals NaN.

    Args:
        one: What is expected.
        other: What is compared with it.
        rounding: A relative difference that is allowed in any case, as `rounding_of` says.

    Returns:
        The largest relative difference, or `None` where all are within the tolerance.
    """
    pairs = [(a.detach(), b.detach()) for a, b in zip(one, other, strict=True)]
    finite = [
        (torch.nan_to_num(a), torch.nan_to_num(b))
        if a.is_floating_point()
        else (a.float(), b.float())
        for a, b in pairs
    ]
    norms = [float(torch.linalg.vector_norm(a)) for a, _ in finite]
    floor = 1e-3 * max(norms, default=0.0)
    worst = 0.0
    for (a, b), (left, right), norm in zip(pairs, finite, norms, strict=True):
        if a.shape != b.shape or bool((torch.isnan(a) != torch.isnan(b)).any()):
            return float("inf")
        gap = float(torch.linalg.vector_norm(left - right))
        if gap > max(tolerance_of(a.dtype), rounding) * max(norm, floor):
            worst = max(worst, gap / max(norm, floor, 1e-300))
    return worst or None
