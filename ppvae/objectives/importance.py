"""The importance-weighted bound, and two gradients of it for draws that have a path."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppvae.density import Program
from ppvae.objectives.base import Objective
from ppvae.terms import Drawn, check_local, check_pathwise, log_weights, row_scale, total

_LOCAL = "Use BetaELBO, or pyro.infer.RenyiELBO, which weighs all rows at once."
_PATH = "Use VIMCO, which has the same bound."


class _ImportanceWeighted(Objective):
    """An objective that is the importance-weighted bound."""

    def __init__(self, num_particles: int = 5) -> None:
        super().__init__(num_particles)

    @property
    def target(self) -> str:
        """What the gradient is one of."""
        return bound_name(self.num_particles)

    def _draw(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Drawn:
        """Draws that the gradient goes through, and that belong to a datum each."""
        drawn = Drawn(model, guide, args, kwargs, self.num_particles)
        check_pathwise(drawn, _PATH)
        check_local(drawn, _LOCAL)
        return drawn


class IWAE(_ImportanceWeighted):
    r"""The importance-weighted bound of every datum, with the reparameterised gradient.

    .. math:: J = \sum_n s_n\, E\Bigl[\log \frac{1}{K} \sum_{k=1}^K w_{kn}\Bigr], \qquad
              w_{kn} = \frac{p(x_n, z_{kn})}{q(z_{kn} \mid x_n)}, \quad
              z_{kn} \sim q(\cdot \mid x_n)

    (Burda, Grosse & Salakhutdinov 2015, eq. 8, and its gradient.) Each term bounds
    :math:`\log p(x_n)` from below, the closer the larger K; K = 1 is the ELBO. With
    :math:`\tilde w_k = w_k / \sum_j w_j` the gradient is
    :math:`\sum_k \tilde w_k \nabla \log w_k`, all of it, through the draws too.

    The scale :math:`s_n` of a plate that subsamples multiplies the bound and never a weight, so
    that ``-loss / N`` estimates the same number whatever the minibatch. In `pyro.infer.RenyiELBO`
    it is in the weights, whose log-mean-exp is then no bound.

    For the guide's parameters the signal of this gradient falls behind its noise as K grows, as
    :math:`K^{-1/2}` (Rainforth et al. 2018, theorem 1): see `DReG`.

    Args:
        num_particles: K.

    Raises:
        ValueError: If K is less than 1; on a call, if a draw of the guide has no path for the
            gradient, a latent is shared by all rows, or sites are scaled differently.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> from ppvae.objectives import IWAE
        >>> model, guide = pairs.exponential_gaussian()
        >>> loss = IWAE(num_particles=5)(model, guide)(torch.tensor([0.5, 2.0]))
        >>> loss.backward()
    """

    def _evaluate(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        drawn = self._draw(model, guide, args, kwargs)
        log_q, log_p = drawn.log_q(), drawn.log_p()
        bound = log_mean_weight(log_weights(log_p, log_q))
        value = (row_scale(*log_p, *log_q) * bound).sum()
        return value, value


class DReG(_ImportanceWeighted):
    r"""The importance-weighted bound, with the doubly reparameterised gradient.

    The bound is that of `IWAE`. Its gradient for parameters φ of the guide is written so that it
    goes through the draws alone,

    .. math:: \nabla_\phi J = \sum_n s_n\, E\Bigl[\sum_k \tilde w_{kn}^2\,
              \frac{\partial \log w_{kn}}{\partial z_{kn}} \frac{d z_{kn}}{d \phi}\Bigr]

    and for those of the model it stays :math:`\sum_k \tilde w_k \nabla_\theta \log p(x, z_k)`
    (Tucker et al. 2019). It is unbiased, and it vanishes where q is the posterior. As K grows its
    noise falls faster than its signal, so that their ratio rises as :math:`K^{1/2}` where that of
    `IWAE` falls as :math:`K^{-1/2}`. With K = 1 it is `StickingTheLanding`.

    What is a parameter of the model and what of the guide is decided by where it acts, not by its
    name: one that acts in both gets both parts.

    Args:
        num_particles: K.

    Raises:
        ValueError: If K is less than 1; on a call, if a draw of the guide has no path for the
            gradient, a latent is shared by all rows, sites are scaled differently, or the guide
            has its density at its own draws alone or, with several sites, noise such as dropout.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> from ppvae.objectives import DReG
        >>> model, guide = pairs.exponential_gaussian()
        >>> loss = DReG(num_particles=5)(model, guide)(torch.tensor([0.5, 2.0]))
        >>> loss.backward()
    """

    def _evaluate(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        drawn = self._draw(model, guide, args, kwargs)
        # The gradient that reaches a draw is weighed once more on its way to φ.
        weights = _Weights()
        values = {name: weights.on_the_way_back(z) for name, z in drawn.values.items()}
        log_q, log_p = drawn.log_q(values), drawn.log_p(values)
        log_w = log_weights(log_p, log_q)
        weights.value = torch.softmax(log_w.detach(), dim=0)
        scale = row_scale(*log_p, *log_q)
        value = (scale * log_mean_weight(log_w.detach())).sum()
        # What φ does to log q at fixed z cancels.
        path = log_w + total(drawn.log_q(detached(drawn)))
        # A draw of weight 0 has no part in the gradient, whatever its log weight is.
        path = torch.where(weights.value > 0, path, 0.0)
        return value, (scale * weights.value * path).sum()


class _Weights:
    """Normalised weights, known only once the draws that they multiply have been used."""

    def __init__(self) -> None:
        self.value = torch.zeros(())

    def on_the_way_back(self, z: Tensor) -> Tensor:
        """The same draws; gradients that come to them are multiplied by the weights.

        Args:
            z: ``(num_draws, batch, *event)``, or without the first with one draw.
        """
        if not z.requires_grad:
            return z
        same = z.clone()
        same.register_hook(self._weighed)
        return same

    def _weighed(self, gradient: Tensor) -> Tensor:
        if len(self.value) == 1:
            return gradient  # One weight, which is 1.
        return gradient * self.value.reshape(
            *self.value.shape, *[1] * (gradient.dim() - self.value.dim())
        )


def detached(drawn: Drawn) -> dict[str, Tensor]:
    """The draws, cut from the parameters that they came from."""
    return {name: z.detach() for name, z in drawn.values.items()}


def log_mean_weight(log_w: Tensor) -> Tensor:
    """The log of the mean weight of each row, ``(batch,)``, from ``(num_draws, batch)``."""
    return torch.logsumexp(log_w, dim=0) - math.log(len(log_w))


def bound_name(num_particles: int) -> str:
    """What the bound with K draws is called; one draw has the ELBO."""
    return "ELBO" if num_particles == 1 else f"IWAE bound, K = {num_particles}"
