"""Whether two runs of the same computation gave the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Relative to the Euclidean norm. Another order of summation costs a few units of rounding.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_LOW_PRECISION = 2e-2


def tolerance_of(dtype: torch.dtype) -> float:
    """The relative difference that rounding may make."""
    return _TOLERANCE.get(dtype, _LOW_PRECISION)


def far_apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float | None:
    """How far two results differ, where that is more than rounding can explain.

    Each tensor may differ by 1e-4 of its norm in single precision and by 1e-8 in double, or by
    that fraction of a thousandth of the largest norm of all, as small differences of large
    numbers do. NaN equals NaN.

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
        if gap > tolerance_of(a.dtype) * max(norm, floor):
            worst = max(worst, gap / max(norm, floor, 1e-300))
    return worst or None
