"""Score-function gradients with the other draws of a row as baseline: for any latents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppvae.density import Program
from ppvae.objectives.base import Objective, leave_one_out
from ppvae.objectives.importance import bound_name, log_mean_weight
from ppvae.terms import Drawn, check_local, check_no_points, row_scale, total

_POINTS = "Use BetaELBO, whose gradient goes through the point."
_LOCAL = "Use pyro.infer.TraceGraph_ELBO, or BetaELBO where the latents can be reparameterised."


class ScoreFunctionELBO(Objective):
    r"""The ELBO with the score-function gradient for all latents, discrete or not.

    .. math:: \nabla_\phi J = \sum_n s_n\, E\Bigl[\frac{1}{K} \sum_k (f_{kn} - b_{kn})\,
              \nabla_\phi \log q(z_{kn} \mid x_n)\Bigr], \qquad
              f_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n)

    (REINFORCE; Ranganath, Gerrish & Blei 2014), and
    :math:`\frac{1}{K} \sum_k \nabla_\theta \log p(x, z_k)` for parameters of the model. It asks
    nothing of the model's derivatives in z. With one draw :math:`b = 0`; with more the baseline is
    the mean over the row's other draws, :math:`b_k = \frac{1}{K-1} \sum_{j \ne k} f_j` (Kool, van
    Hoof & Welling 2019), which leaves the gradient unbiased as they are independent of draw k.

    Draws that could be reparameterised are not: to see what that is worth, compare this with
    `BetaELBO` or `StickingTheLanding` in `ppvae.gradient_variance`. For a pair with latents of
    both kinds use `BetaELBO`, which takes each as it can.

    Args:
        num_particles: K.

    Raises:
        ValueError: If K is less than 1; on a call, if a latent is shared by all rows, a site lies
            outside of the plate, sites are scaled differently, or the guide has a Delta at a point
            that is trained.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> from ppvae.objectives import ScoreFunctionELBO
        >>> model, guide = pairs.sigmoid_belief_network(x_dim=6, z_dims=[3])
        >>> loss = ScoreFunctionELBO(num_particles=4)(model, guide)(torch.ones(5, 6))
        >>> loss.backward()
    """

    @property
    def target(self) -> str:
        """What the gradient is one of."""
        return "ELBO"

    def _evaluate(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        log_p, log_q, scale = _at_detached(model, guide, args, kwargs, self.num_particles)
        log_w = (log_p - log_q).detach()
        value = (scale * log_w.mean(dim=0)).sum()
        return value, (scale * (leave_one_out(log_w) * log_q + log_p).mean(dim=0)).sum()


class VIMCO(Objective):
    r"""The importance-weighted bound with a score-function gradient, for discrete latents.

    The bound is that of `IWAE`, :math:`\hat L = \log \frac{1}{K} \sum_k w_k` for each row. Its
    gradient is

    .. math:: \nabla J = \sum_n s_n\, E\Bigl[\sum_k (\hat L - \hat L_{-k})\,
              \nabla \log q(z_k \mid x_n) + \sum_k \tilde w_k \nabla \log w_k\Bigr], \qquad
              \hat L_{-k} = \log \frac{1}{K} \Bigl(\sum_{j \ne k} w_j + \hat w_k\Bigr)

    where :math:`\hat w_k = \exp(\frac{1}{K-1} \sum_{j \ne k} \log w_j)` stands for the weight
    left out (Mnih & Rezende 2016). Each draw has its own signal, and
    the others are its baseline: nothing is learned, and the gradient is unbiased. Where all others
    have weight 0 the baseline is 0.

    Draws that could be reparameterised are not; where all can be, `DReG` has less noise.

    Args:
        num_particles: K, at least 2.

    Raises:
        ValueError: If K is less than 2; on a call, if a latent is shared by all rows, a site lies
            outside of the plate, sites are scaled differently, or the guide has a Delta at a point
            that is trained.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> from ppvae.objectives import VIMCO
        >>> model, guide = pairs.sigmoid_belief_network(x_dim=6, z_dims=[3])
        >>> loss = VIMCO(num_particles=4)(model, guide)(torch.ones(5, 6))
        >>> loss.backward()
    """

    _least = 2

    def __init__(self, num_particles: int = 5) -> None:
        super().__init__(num_particles)

    @property
    def target(self) -> str:
        """What the gradient is one of."""
        return bound_name(self.num_particles)

    def _evaluate(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        count = self.num_particles
        log_p, log_q, scale = _at_detached(model, guide, args, kwargs, count)
        log_w = (log_p - log_q).detach()
        bound = log_mean_weight(log_w)
        left_out = torch.eye(count, dtype=torch.bool, device=log_w.device)[..., None]
        # A difference of sums would be no number where a weight is 0.
        others = log_w.expand(count, -1, -1).masked_fill(left_out, 0.0).sum(dim=1) / (count - 1)
        # By draw left out: the weights with the one left out replaced.
        replaced = torch.where(left_out, others, log_w)
        without = torch.logsumexp(replaced, dim=1) - math.log(count)
        # Where all others have weight 0; any number that hangs on them alone is a baseline.
        without = without.masked_fill(without == -torch.inf, 0.0)
        weights = torch.softmax(log_w, dim=0)
        # A draw of weight 0 has no part in the gradient of log w, whatever log w is.
        log_ratio = torch.where(weights > 0, log_p - log_q, 0.0)
        surrogate = (bound - without) * log_q + weights * log_ratio
        return (scale * bound).sum(), (scale * surrogate.sum(dim=0)).sum()


def _at_detached(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_draws: int,
) -> tuple[Tensor, Tensor, float | Tensor]:
    """log p(x, z) and log q(z | x) at draws without a path, and the scale of the rows."""
    drawn = Drawn(model, guide, args, kwargs, num_draws, detached=True)
    check_local(drawn, _LOCAL)
    check_no_points(drawn, _POINTS)
    log_q, log_p = drawn.log_q(), drawn.log_p()
    return total(log_p), total(log_q), row_scale(*log_p, *log_q)
