"""Diagnostics per datum, read from log weights."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# ArviZ needs five weights in the tail, which is a fifth of them.
_LEAST_DRAWS = 25
# Weights this close, in nats, are equal: what differs is rounding.
_EQUAL = 1e-4


def pareto_k(weights: Tensor) -> Tensor:
    r"""Pareto k-hat of the importance weights of each row (Vehtari et al. 2024).

    The shape of a generalised Pareto distribution fitted to the largest weights, by ArviZ. Below
    :math:`\min(1 - 1/\log_{10} S, 0.7)` importance weighting is reliable with S draws. It speaks
    of the right tail alone: weights with an interior maximum, as one-dimensional toys have them,
    can show a large value where the gap is tiny.

    Args:
        weights: Log weights, ``(num_samples, batch)``, nats.

    Returns:
        ``(batch,)``; −inf where the weights of a row, or the largest of them, are equal; NaN
        where all are zero or one is no number, and with fewer than 25 draws.

    Example:
        >>> import torch
        >>> levels = (torch.arange(1000) + 0.5) / 1000
        >>> heavy = -0.9 * torch.log1p(-levels)  # the weights have a Pareto tail of shape 0.9
        >>> bool(pareto_k(heavy[:, None]) > 0.7)
        True
    """
    from arviz_stats.base import array_stats

    rows = weights.detach().double().cpu()
    out = torch.full((rows.shape[1],), torch.nan, dtype=torch.float64)
    if len(rows) < _LEAST_DRAWS:
        return out.to(weights.device)
    # Infinite and NaN weights leave NaN; equal ones have no tail.
    out[rows.amax(dim=0) - rows.amin(dim=0) <= _EQUAL] = -torch.inf
    proper = torch.isfinite(rows.amax(dim=0)) & ~torch.isnan(rows).any(dim=0)
    for index in torch.nonzero(proper & torch.isnan(out)).flatten().tolist():
        row = rows[:, index].clamp(min=-1e300).numpy()
        try:
            with np.errstate(all="ignore"):
                # ArviZ smooths the tail of the negative of its argument.
                _, k = array_stats.psislw(-row)
        except ValueError:  # The largest weights are all the same.
            k = -np.inf
        out[index] = float(k)
    return out.to(weights.device)


def pareto_k_threshold(num_samples: int) -> float:
    """The k-hat up to which importance weighting is reliable with ``num_samples`` draws.

    Example:
        >>> pareto_k_threshold(100)
        0.5
    """
    return min(1 - 1 / math.log10(num_samples), 0.7)


def effective_sample_size(weights: Tensor) -> Tensor:
    r"""Effective sample size of the importance weights of each row.

    .. math:: \mathrm{ESS}_n = \frac{(\sum_s w_{sn})^2}{\sum_s w_{sn}^2}

    Args:
        weights: Log weights, ``(num_samples, batch)``, nats.

    Returns:
        ``(batch,)``, between 1 and ``num_samples``.

    Example:
        >>> import torch
        >>> effective_sample_size(torch.zeros(100, 2))
        tensor([100., 100.])
    """
    return torch.exp(2 * torch.logsumexp(weights, dim=0) - torch.logsumexp(2 * weights, dim=0))
