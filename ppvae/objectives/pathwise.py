"""The ELBO with the gradient through the draws alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ppvae.density import Program
from ppvae.objectives.base import Objective, Rows
from ppvae.objectives.importance import detached
from ppvae.terms import Drawn, check_pathwise


class StickingTheLanding(Objective):
    r"""The ELBO, with a gradient whose noise vanishes where q is the posterior.

    The gradient for parameters φ of the guide leaves out the score, whose mean is zero:

    .. math:: \nabla_\phi J = \sum_n s_n\, E\Bigl[
              \frac{\partial}{\partial z} \bigl(\log p(x_n, z) - \log q(z \mid x_n)\bigr)
              \frac{d z}{d \phi}\Bigr]

    (Roeder, Wu & Duvenaud 2017). If :math:`q(z \mid x_n) = p(z \mid x_n)` then
    :math:`\log p - \log q` is constant in z, and each draw gives zero. Far from there what is
    left out may have been of use, as a control variate, and the noise is the larger for it:
    `ppvae.gradient_variance` says which is the case for a pair.

    Args:
        num_particles: Draws for every row.

    Raises:
        ValueError: On a call, if a draw of the guide has no path for the gradient, or the guide
            has its density at its own draws alone or, with several sites, noise such as dropout.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> from ppvae.objectives import StickingTheLanding
        >>> model, guide = pairs.exponential_gaussian()
        >>> loss = StickingTheLanding()(model, guide)(torch.tensor([0.5, 2.0]))
        >>> loss.backward()
    """

    @property
    def target(self) -> str:
        """What the gradient is one of."""
        return "ELBO"

    def _evaluate(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        return self._averaged(_of, model, guide, args, kwargs)


def _of(drawn: Drawn) -> tuple[Tensor, Tensor]:
    check_pathwise(drawn, "Use ScoreFunctionELBO, or pyro.infer.TraceGraph_ELBO.")
    log_q, log_p = drawn.log_q(), drawn.log_p()
    rows, score = Rows(), Rows()
    for term in log_p:
        rows.add(term.log_prob * term.scale, term.is_shared)
    for term in log_q:
        rows.add(-term.log_prob * term.scale, term.is_shared)
    # What φ does to log q at fixed z cancels.
    for term in drawn.log_q(detached(drawn)):
        score.add(term.log_prob * term.scale, term.is_shared)
    value = rows.mean(drawn.num_draws)
    return value, value + score.mean(drawn.num_draws)
