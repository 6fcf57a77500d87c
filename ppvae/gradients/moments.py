"""Mean, variance and signal-to-noise ratio of vectors that come one at a time, with errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# The errors come from leaving out one of this many blocks of draws.
_BLOCKS = 32
# A relative standard deviation of so many machine epsilons is rounding, and no noise.
_ROUNDING = 16


class Moments:
    """Mean and scatter of the draws of one gradient, block by block and tensor by tensor.

    Within a block by Welford's recursion, and all relative to the first draw: a variance that is
    tiny beside the squared mean does not drown in it.

    Args:
        blocks: Number of draws in each block.
        sizes: Number of elements of each tensor.
    """

    def __init__(self, blocks: Tensor, sizes: Sequence[int]) -> None:
        self.blocks, self.sizes = blocks, list(sizes)
        self.first: Tensor | None = None
        self.means: list[Tensor] = []
        self.within = torch.zeros(len(blocks), len(self.sizes), dtype=torch.float64)
        self.seen = 0

    def add(self, gradient: Tensor) -> None:
        """Take in the next draw."""
        if self.first is None:
            self.first = gradient.double()
        if self.seen == 0:
            self.mean = torch.zeros_like(self.first)
            self.scatter = torch.zeros(len(self.sizes), dtype=torch.float64, device=gradient.device)
        block = len(self.means)
        self.seen += 1
        before = gradient.double() - self.first - self.mean
        self.mean += before / self.seen
        after = gradient.double() - self.first - self.mean
        self.scatter += self._by_tensor(before * after)
        if self.seen == int(self.blocks[block]):
            self.means.append(self.mean.to(gradient.dtype))
            self.within[block] = self.scatter.cpu()
            self.seen = 0

    def _by_tensor(self, values: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in values.split(self.sizes)])

    def products(self) -> tuple[Tensor, Tensor, Tensor]:
        """‖m‖² ``(tensors,)``, ⟨m, c_b⟩ and ‖c_b‖² ``(blocks, tensors)``, tensor by tensor.

        Here m is the mean, and c_b the mean of block b minus m.
        """
        assert self.first is not None
        weights = (self.blocks / self.blocks.sum()).tolist()
        middle = torch.zeros_like(self.first)
        for weight, mean in zip(weights, self.means, strict=True):
            middle += weight * mean.double()
        total = self.first + middle
        inner, square = [], []
        for mean in self.means:
            centred = mean.double() - middle
            inner.append(self._by_tensor(total * centred))
            square.append(self._by_tensor(centred.square()))
        norm = self._by_tensor(total.square())
        return norm.cpu(), torch.stack(inner).cpu(), torch.stack(square).cpu()


def block_sizes(num_draws: int) -> Tensor:
    """The number of draws in each block."""
    count = min(num_draws, _BLOCKS)
    each, rest = divmod(num_draws, count)
    return torch.tensor([each + (block < rest) for block in range(count)], dtype=torch.float64)


def _jackknife(whole: Tensor, without: Tensor, blocks: Tensor) -> Tensor:
    """Standard error of a statistic, from its values without each of the blocks.

    Of blocks that may differ in size (Busing, Meijer & van der Leeden 1999).
    """
    share = (blocks.sum() / blocks).reshape(-1, *[1] * whole.dim())
    pseudo = share * whole - (share - 1) * without
    estimate = len(blocks) * whole - ((1 - 1 / share) * without).sum(0)
    return ((pseudo - estimate).square() / (share - 1)).mean(0).sqrt()


@dataclass(frozen=True)
class _Products:
    """What the statistics of a group need: sums over its tensors of what `Moments` holds."""

    blocks: Tensor
    within: Tensor
    norm: Tensor
    inner: Tensor
    square: Tensor

    def statistics(self) -> dict[str, float]:
        """Variance, norm of the gradient and signal-to-noise ratio, with their errors."""
        n, total = self.blocks, self.blocks.sum()
        scatter = self.within.sum() + (n * self.square).sum()
        whole = _triple(scatter, self.norm, total)
        rest = total - n
        # Without block b the mean moves by −n_b c_b / rest.
        moved = (n / rest).square() * self.square
        others = scatter - self.within - n * self.square - rest * moved
        norms = self.norm - 2 * n / rest * self.inner + moved
        without = _triple(others.clamp(min=0), norms, rest)
        errors = [_jackknife(w, o, n).item() for w, o in zip(whole, without, strict=True)]
        variance, square, ratio = (w.item() for w in whole)
        norm, norm_error = _root(square, errors[1])
        snr, snr_error = _root(ratio, errors[2])
        return {
            "variance": variance,
            "variance_stderr": errors[0],
            "gradient_norm": norm,
            "gradient_norm_stderr": norm_error,
            "snr": snr,
            "snr_stderr": snr_error,
        }


def _triple(scatter: Tensor, norm: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variance, squared norm of the expectation, and their ratio."""
    variance = scatter / (count - 1)
    square = norm - variance / count
    return variance, square, square / variance


def _root(square: float, stderr: float) -> tuple[float, float]:
    """The root of an estimate of a square, 0 where that is negative, and its error."""
    root = math.sqrt(max(square, 0.0))
    if not stderr > 0:
        return root, 0.0 if stderr == 0 else math.nan
    # Near 0 the delta method's error has no bound; |√a − √b| ≤ √|a − b|.
    return root, min(stderr / (2 * root) if root else math.inf, math.sqrt(stderr))


def statistics(
    moments: Moments, groups: Mapping[str, list[int]], dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """Variance, norm of the mean and signal-to-noise ratio of each group of tensors.

    Args:
        moments: What was gathered.
        groups: By group, the numbers of its tensors.
        dtype: What the draws were computed in; noise below its rounding is none.
    """
    norm, inner, square = moments.products()
    out = {}
    for name, own in groups.items():
        parts = (moments.within, inner, square)
        within, across, apart = (part[:, own].sum(dim=1) for part in parts)
        figures = _Products(moments.blocks, within, norm[own].sum(), across, apart).statistics()
        least = (_ROUNDING * torch.finfo(dtype).eps) ** 2
        if figures["variance"] <= least * float(norm[own].sum()):
            some = figures["gradient_norm"] > 0
            figures["snr"] = math.inf if some else math.nan
            figures["snr_stderr"] = math.nan
        out[name] = figures
    return out


def median(values: Sequence[float]) -> tuple[float, float]:
    r"""The median, and its error: half of the width of the order statistics about it.

    Those at ranks :math:`(n \mp \sqrt n) / 2` enclose the median of any distribution with about
    the probability of one standard error.
    """
    ordered, count = sorted(values), len(values)
    low = max(0, math.floor((count - math.sqrt(count)) / 2))
    return float(np.median(ordered)), (ordered[count - 1 - low] - ordered[low]) / 2
