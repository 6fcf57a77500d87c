r"""An objective for training, to copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ppvae.density import Program
from ppvae.objectives.base import Objective, Rows
from ppvae.terms import Drawn, check_pathwise


class TemperedELBO(Objective):
    r"""The ELBO with a power of the likelihood, as if each row had been seen t times.

    .. math:: J_t = \sum_n E_{q(z \mid x_n)}\bigl[t \log p(x_n \mid z) + \log p(z)
              - \log q(z \mid x_n)\bigr]

    It is t times `BetaELBO(1 / t)`, without the analytic KL, and bounds
    :math:`\log \int p(z)\, p(x \mid z)^t dz` from below; for t other than 1 it is no bound on
    log p(x). The gradient goes through the draws.

    Args:
        power: t, positive.
        num_particles: Draws for every row.

    Raises:
        ValueError: If the power is not positive; on a call, if a draw of the guide has no path
            for the gradient.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> model, guide = pairs.exponential_gaussian()
        >>> TemperedELBO(0.5)(model, guide)(torch.tensor([0.5, 2.0])).backward()
    """

    def __init__(self, power: float = 1.0, *, num_particles: int = 1) -> None:
        if not power > 0:
            raise ValueError(f"power must be positive; got {power}.")
        super().__init__(num_particles)
        self.power = power

    @property
    def target(self) -> str:
        """What the gradient is one of; objectives with equal targets can be compared."""
        return "ELBO" if self.power == 1 else f"ELBO with the likelihood to the {self.power:.6g}"

    def _evaluate(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        return self._averaged(self._of, model, guide, args, kwargs)

    def _of(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        check_pathwise(drawn, "Use BetaELBO, whose score function needs no path.")
        rows = Rows()
        for term in drawn.log_p():
            weight = self.power if term.is_observed else 1.0
            # The densities of a row are weighed first, and the plate's scale comes last.
            rows.add(weight * term.log_prob * term.scale, term.is_shared)
        for term in drawn.log_q():
            rows.add(-term.log_prob * term.scale, term.is_shared)
        value = rows.mean(drawn.num_draws)
        # The value, and a tensor whose gradient is the estimate: here they are one.
        return value, value
