r"""A mixture of Gaussians: a discrete latent whose posterior is a sum over few values."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ppvae.isolation import OwnedModule, plate_size
from ppvae.models.parameters import set_parameter


class GaussianMixture(OwnedModule):
    r"""A mixture of Gaussians: the latent says which component a row comes from.

    .. math::
        z_n \sim \mathrm{Categorical}(\pi), \qquad x_n \mid z_n \sim N(\mu_{z_n}, \Sigma_{z_n})

    The evidence is a sum over the K components, and the posterior their shares of it
    (Bishop 2006, eq. 9.12 and 9.13).

    Args:
        x_dim: Size of a row.
        num_components: Number of components K.
        full_covariance: Whether Σ are full matrices; diagonal ones by default.
        weights: π, ``(num_components,)``, positive, with sum 1; learned from equal weights if
            left out. Given values are held fixed (``model.logits.requires_grad_()`` frees them).
        loc: μ, ``(num_components, x_dim)``; learned from random means of standard deviation 2 if
            left out.
        scale: Standard deviations ``(num_components, x_dim)``, or with ``full_covariance``
            Cholesky factors of Σ, ``(num_components, x_dim, x_dim)``; learned from 1 if left out.

    Shapes:
        ``x``: ``(batch, x_dim)``; ``z``: ``(batch,)``, integers from 0 to K − 1.

    Raises:
        ValueError: If a size is too small, or a given parameter has another shape or range.

    Example:
        >>> import torch
        >>> model = GaussianMixture(1, 2, loc=torch.tensor([[-1.0], [1.0]]))
        >>> model.posterior(torch.zeros(1, 1)).probs.tolist()
        [[0.5, 0.5]]
    """

    logits: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        x_dim: int,
        num_components: int,
        *,
        full_covariance: bool = False,
        weights: Tensor | None = None,
        loc: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        if x_dim < 1 or num_components < 2:
            raise ValueError(
                f"x_dim must be at least 1 and num_components at least 2; got {x_dim} and "
                f"{num_components}."
            )
        self.x_dim, self.num_components = x_dim, num_components
        self.full_covariance = full_covariance
        if weights is not None and not (
            bool((weights > 0).all()) and abs(float(weights.sum()) - 1) < 1e-4
        ):
            raise ValueError(
                f"weights: expected positive values with sum 1; got {weights.tolist()}."
            )
        # As logits, which need no constraint; the sum over components normalises them.
        logits = None if weights is None else weights.log()
        set_parameter(self, "logits", logits, torch.zeros(num_components))
        set_parameter(self, "loc", loc, 2.0 * torch.randn(num_components, x_dim))
        if full_covariance:
            start = torch.eye(x_dim).repeat(num_components, 1, 1)
            set_parameter(self, "scale", scale, start, constraints.lower_cholesky)
        else:
            start = torch.ones(num_components, x_dim)
            set_parameter(self, "scale", scale, start, constraints.positive)

    @property
    def weights(self) -> Tensor:
        """π, ``(num_components,)``."""
        return self.logits.softmax(dim=-1)

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The generative process: rows ``x`` to condition on, or ``size`` rows to draw."""
        batch = plate_size(type(self).__name__, x, size, event_shape=(self.x_dim,))
        logits, loc, scale = self.logits, self.loc, self.scale
        with pyro.plate("data", batch, dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=logits))
            return pyro.sample("x", self._component(loc[z], scale[z]), obs=x)

    def _component(self, loc: Tensor, scale: Tensor) -> Any:
        if self.full_covariance:
            return dist.MultivariateNormal(loc, scale_tril=scale)
        return dist.Normal(loc, scale).to_event(1)

    def _log_joint(self, x: Tensor) -> Tensor:
        """log p(x, z = k) for each component, ``(batch, num_components)``."""
        log_likelihood: Tensor = self._component(self.loc, self.scale).log_prob(x[..., None, :])
        return self.logits.log_softmax(dim=-1) + log_likelihood

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) in nats, ``(batch,)``: the log of the sum over components."""
        return self._log_joint(x).logsumexp(dim=-1)

    def posterior(self, x: Tensor) -> dist.Categorical:
        """Exact p(z | x), a categorical distribution with batch shape ``(batch,)``."""
        return dist.Categorical(logits=self._log_joint(x))

    def __repr__(self) -> str:
        full = ", full_covariance=True" if self.full_covariance else ""
        return f"GaussianMixture(x_dim={self.x_dim}, num_components={self.num_components}{full})"
