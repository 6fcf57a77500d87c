r"""Linear models with Gaussian noise, where evidence and posterior are exact."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ppvae.isolation import OwnedModule, check_rows, plate_size
from ppvae.models.parameters import set_parameter


class _LinearGaussian(OwnedModule):
    """What factor analysis and probabilistic PCA share: all but the shape of the noise."""

    loadings: Tensor
    loc: Tensor
    noise: Tensor

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        noise_shape: tuple[int, ...],
        loadings: Tensor | None,
        noise: Tensor | None,
        loc: Tensor | None,
    ) -> None:
        super().__init__()
        if x_dim < 1 or z_dim < 1:
            raise ValueError(f"x_dim and z_dim must be positive; got {x_dim} and {z_dim}.")
        self.x_dim, self.z_dim = x_dim, z_dim
        random = torch.randn(x_dim, z_dim) / math.sqrt(z_dim)
        set_parameter(self, "loadings", loadings, random)
        set_parameter(self, "loc", loc, torch.zeros(x_dim))
        set_parameter(self, "noise", noise, torch.ones(noise_shape), constraints.positive)

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The generative process: rows ``x`` to condition on, or ``size`` rows to draw."""
        batch = plate_size(type(self).__name__, x, size, event_shape=(self.x_dim,))
        loadings, loc, noise = self.loadings, self.loc, self.noise
        zeros = loadings.new_zeros(self.z_dim)
        with pyro.plate("data", batch, dim=-1):
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            mean = z @ loadings.mT + loc
            return pyro.sample("x", dist.Normal(mean, noise.expand(self.x_dim)).to_event(1), obs=x)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) in nats, ``(batch,)``: x ~ N(loc, W Wᵀ + Ψ)."""
        variance = (self.noise**2).expand(self.x_dim)
        out: Tensor = dist.LowRankMultivariateNormal(self.loc, self.loadings, variance).log_prob(x)
        return out

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """Exact p(z | x), a multivariate normal with batch shape ``(batch,)``.

        Its precision is I + Wᵀ Ψ⁻¹ W, the same for every row, and its mean is the covariance
        times Wᵀ Ψ⁻¹ (x − loc) (Bishop 2006, eq. 12.42 and 12.48).
        """
        scaled = self.loadings / (self.noise**2).expand(self.x_dim)[:, None]
        eye = torch.eye(self.z_dim, dtype=scaled.dtype, device=scaled.device)
        precision = eye + self.loadings.mT @ scaled
        mean = torch.linalg.solve(precision, ((x - self.loc) @ scaled).mT).mT
        return dist.MultivariateNormal(mean, precision_matrix=precision)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(x_dim={self.x_dim}, z_dim={self.z_dim})"


class FactorAnalysis(_LinearGaussian):
    r"""Factor analysis: a linear map of a normal latent, with noise per dimension.

    .. math:: z_n \sim N(0, I), \qquad x_n \mid z_n \sim N(W z_n + \mu, \mathrm{diag}(\psi^2))

    Args:
        x_dim: Size of a row.
        z_dim: Size of its latent.
        loadings: W, ``(x_dim, z_dim)``. Learned from a random start if left out; given values
            are held fixed (``model.loadings.requires_grad_()`` frees them).
        noise: Standard deviations ψ, ``(x_dim,)``; learned from 1 if left out.
        loc: μ, ``(x_dim,)``; learned from 0 if left out.

    Shapes:
        ``x``: ``(batch, x_dim)``; ``z``: ``(batch, z_dim)``.

    Example:
        >>> import torch
        >>> model = FactorAnalysis(x_dim=6, z_dim=3)
        >>> model.posterior(torch.zeros(10, 6)).batch_shape
        torch.Size([10])
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        *,
        loadings: Tensor | None = None,
        noise: Tensor | None = None,
        loc: Tensor | None = None,
    ) -> None:
        super().__init__(x_dim, z_dim, (x_dim,), loadings, noise, loc)


class PPCA(_LinearGaussian):
    r"""Probabilistic PCA: factor analysis with one noise scale for all dimensions.

    .. math:: z_n \sim N(0, I), \qquad x_n \mid z_n \sim N(W z_n + \mu, \sigma^2 I)

    Source: Tipping & Bishop (1999).

    Args:
        x_dim: Size of a row.
        z_dim: Size of its latent.
        loadings: W, ``(x_dim, z_dim)``. Learned from a random start if left out; given values
            are held fixed (``model.loadings.requires_grad_()`` frees them).
        noise: Standard deviation σ, a scalar tensor; learned from 1 if left out.
        loc: μ, ``(x_dim,)``; learned from 0 if left out.

    Shapes:
        ``x``: ``(batch, x_dim)``; ``z``: ``(batch, z_dim)``.

    Example:
        >>> import torch
        >>> PPCA(x_dim=5, z_dim=2).log_evidence(torch.zeros(4, 5)).shape
        torch.Size([4])
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        *,
        loadings: Tensor | None = None,
        noise: Tensor | None = None,
        loc: Tensor | None = None,
    ) -> None:
        super().__init__(x_dim, z_dim, (), loadings, noise, loc)

    @classmethod
    def maximum_likelihood(cls, x: Tensor, z_dim: int) -> PPCA:
        r"""The model under which these rows have the largest evidence, in closed form.

        .. math::
            W = U_d (\Lambda_d - \sigma^2 I)^{1/2}, \qquad
            \sigma^2 = \frac{1}{D - d} \sum_{j > d} \lambda_j, \qquad \mu = \bar x

        with eigenvalues and eigenvectors of the sample covariance, of which the d largest are
        kept (Tipping & Bishop 1999, eq. 7 and 8). W is unique up to a rotation of z; this one has
        orthogonal columns, so that the posterior is mean-field.

        Args:
            x: Rows, ``(batch, x_dim)``.
            z_dim: Size of the latent, less than ``x_dim``.

        Returns:
            A model in the rows' dtype, its parameters free (``model.requires_grad_(False)`` holds
            them).

        Raises:
            ValueError: If the rows are unfit, ``z_dim`` is not below ``x_dim``, or the rows lie
                in ``z_dim`` dimensions, so that the evidence has no maximum.

        Example:
            >>> import torch
            >>> x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
            >>> model = PPCA.maximum_likelihood(x, z_dim=1)
            >>> float(model.noise.detach() ** 2)
            0.5
        """
        check_rows(x)
        if x.dim() != 2 or not 1 <= z_dim < x.shape[-1]:
            raise ValueError(
                f"PPCA.maximum_likelihood: expected x of shape (batch, x_dim) and "
                f"1 <= z_dim < x_dim; got x {tuple(x.shape)} and z_dim={z_dim}."
            )
        rows = x.detach().double()
        loc = rows.mean(dim=0)
        eigenvalues, vectors = torch.linalg.eigh((rows - loc).mT @ (rows - loc) / len(rows))
        discarded, kept = eigenvalues[:-z_dim], eigenvalues[-z_dim:]
        variance = discarded.mean()
        if not bool(variance > 1e-12 * eigenvalues[-1]):
            raise ValueError(
                f"PPCA.maximum_likelihood: the {len(x)} rows of x lie in a space of z_dim={z_dim} "
                f"dimensions, so that the noise is 0 and the evidence infinite. Lower z_dim, or "
                f"give more rows."
            )
        loadings = vectors[:, -z_dim:] * (kept - variance).clamp(min=0.0).sqrt()
        model = cls(
            x.shape[-1], z_dim, loadings=loadings.to(x), noise=variance.sqrt().to(x), loc=loc.to(x)
        )
        return model.requires_grad_(True)
