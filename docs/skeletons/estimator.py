r"""An estimator of the evidence, to copy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppvae.density import Program, check_count, log_weights
from ppvae.evidence import Estimate


def grouped_iwae(
    model: Program,
    guide: Program,
    x: Tensor,
    group: int = 10,
    num_groups: int = 100,
    *,
    seed: int = 0,
) -> Estimate:
    r"""The importance-weighted bound of K draws, as a mean over G groups of them.

    .. math:: \frac1G \sum_g \log \frac1K \sum_k w_{gk}, \qquad
              w = \frac{p(x, z)}{q(z \mid x)}

    Each group's term has the expectation :math:`L_K \le \log p(x)` (Burda, Grosse & Salakhutdinov
    2015, theorem 1), so that the mean is unbiased for :math:`L_K` and its error is that of a mean
    of independent terms. `iwae` spends the same draws on one group, which is the tighter bound.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guide: A Pyro guide with the same latent sites, called as ``guide(x)``.
        x: Rows, ``(batch, *event)``.
        group: Draws K of a group.
        num_groups: Number of groups G, at least 2.
        seed: Seed of the draws; the caller's generators are left as they were.

    Returns:
        The bound with its standard error, ``(batch,)`` each: a lower bound on log p(x).

    Raises:
        ValueError: If a count is too small, or the rows, the model or the guide are unfit.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> model, guide = pairs.exponential_gaussian()
        >>> grouped_iwae(model, guide, torch.tensor([0.5, 1.5])).bound
        'lower'
    """
    check_count("group", group)
    check_count("num_groups", num_groups, least=2)
    # A hundred groups at a time: memory does not grow with their number.
    terms = []
    for start in range(0, num_groups, 100):
        count = min(100, num_groups - start)
        log_w = log_weights(model, guide, x, count * group, seed=seed + start)
        terms.append(torch.logsumexp(log_w.double().reshape(count, group, -1), dim=1))
    each = torch.cat(terms) - math.log(group)
    stderr = each.std(dim=0) / math.sqrt(num_groups)
    return Estimate(each.mean(dim=0), stderr, "lower", "grouped importance weighting")
