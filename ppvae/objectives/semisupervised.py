"""The objective of the semi-supervised VAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor

from ppvae.classification import class_site
from ppvae.density import Program
from ppvae.objectives.base import Objective
from ppvae.objectives.schedules import check_weight


class SemisupervisedELBO(Objective):
    r"""The objective of model M2: the ELBO, and beside it a term that trains the classifier.

    .. math:: J^\alpha = \underbrace{\sum_{n \text{ labelled}} L(x_n, y_n)
              + \sum_{n \text{ not}} U(x_n)}_{\text{the ELBO}}
              + \underbrace{\alpha \sum_{n \text{ labelled}} \log q(y_n \mid x_n)
              }_{\text{no part of it}}

    with :math:`L(x, y) = E_{q(z \mid x, y)}[\log p(x, y, z) - \log q(z \mid x, y)]` and
    :math:`U(x) = \sum_y q(y \mid x) (L(x, y) - \log q(y \mid x))`, the sum over y taken exactly
    and the expectation over z by reparameterised draws (Kingma, Rezende, Mohamed & Welling 2014,
    eq. 6 to 9). The first two sums bound :math:`\sum \log p(x_n, y_n) + \sum \log p(x_n)` from
    below; with α = 0 they are all there is, as `TraceEnum_ELBO` has it. In them the classifier
    learns from rows without labels alone, hence the third, a negative cross-entropy. As that is
    never above 0, J never exceeds the ELBO: a lower bound still, but ``-loss`` is the ELBO for
    α = 0 only. For the ELBO of a trained pair take `ppvae.elbo`.

    What is minimised is :math:`-J^\alpha`, summed over the rows given, each with weight 1 (times
    the scale of a plate that subsamples). So minibatches of mixed rows, drawn at random, give
    unbiased gradients whatever the share of labels; `fit` divides by the number of rows. Where
    labels are so few that many minibatches have none, repeat the labelled rows in the data: m
    copies weigh both of their terms by m. The paper's choice, α = 0.1 N / N_labelled, is α = 1
    where a tenth of the rows are labelled.

    Args:
        alpha: Weight α of the classification term, at least 0.
        num_particles: Draws of z for every row and class.
        site: Name of the guide's categorical site for the class.

    Raises:
        ValueError: If alpha is negative; on a call, if the rows have no column for the label, or
            the guide no classifier, where α > 0.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> model, guide = pairs.semisupervised_vae(x_dim=6, z_dim=2, num_classes=3, hidden=[8])
        >>> x = model.rows(torch.ones(4, 6), torch.tensor([0, 2, -1, -1]))
        >>> loss = SemisupervisedELBO(alpha=1.0)(model, guide)(x)
        >>> loss.backward()
    """

    def __init__(self, alpha: float = 1.0, *, num_particles: int = 1, site: str = "y") -> None:
        check_weight("alpha", alpha)
        super().__init__(num_particles)
        self.alpha, self.site = alpha, site
        self._elbo = TraceEnum_ELBO(
            num_particles, max_plate_nesting=1, vectorize_particles=num_particles > 1
        )

    @property
    def target(self) -> str:
        """What the gradient is one of."""
        return "ELBO" if self.alpha == 0 else f"ELBO and {self.alpha:.6g} log q(labels | x)"

    def _evaluate(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        x = args[0]
        if x.dim() != 2:
            raise ValueError(
                f"x: expected rows whose last column is the label, (batch, x_dim + 1); got "
                f"{tuple(x.shape)}."
            )
        # Pyro's differentiable loss insists on a gradient.
        loss = self._elbo.differentiable_loss if torch.is_grad_enabled() else self._elbo.loss
        elbo = -torch.as_tensor(loss(model, config_enumerate(guide), *args, **kwargs))
        value = elbo + self._classification(guide, x)
        return value, value

    def _classification(self, guide: Program, x: Tensor) -> Tensor:
        """α Σ log q(label | x) over the labelled rows."""
        x = x[x[:, -1] >= 0]
        if self.alpha == 0 or len(x) == 0:
            return x.new_zeros(())
        found = class_site(guide, x, self.site)
        log_prob: Tensor = found["fn"].log_prob(x[:, -1].long())
        return self.alpha * (found["scale"] * log_prob).sum()

    def __repr__(self) -> str:
        return f"SemisupervisedELBO(alpha={self.alpha}, num_particles={self.num_particles})"
