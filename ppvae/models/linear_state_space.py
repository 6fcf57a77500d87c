r"""A linear Gaussian state space: a time series whose smoother is exact."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ppvae.isolation import OwnedModule, plate_size
from ppvae.models.parameters import set_parameter


class LinearStateSpace(OwnedModule):
    r"""A linear Gaussian state space. A row is a whole series, its latent a whole path.

    .. math::
        z_1 \sim N(m, P), \qquad z_t = A z_{t-1} + N(0, Q), \qquad x_t = C z_t + N(0, R)

    The path is one Gaussian with a block-tridiagonal precision, so that evidence and posterior
    are those of a linear Gaussian model: what the Kalman filter and the Rauch–Tung–Striebel
    smoother compute step by step (Kalman 1960; Rauch, Tung & Striebel 1965). All covariances are
    given and learned as Cholesky factors. The cost grows with the third power of
    ``num_steps * z_dim``.

    Args:
        num_steps: Length T of a series.
        x_dim: Size of an observation.
        z_dim: Size of a state.
        initial_loc: m, ``(z_dim,)``; learned from 0 if left out. Given values are held fixed, as
            all those below.
        initial_tril: Cholesky factor of P, ``(z_dim, z_dim)``; learned from I.
        transition: A, ``(z_dim, z_dim)``; learned from 0.8 I.
        transition_tril: Cholesky factor of Q, ``(z_dim, z_dim)``; learned from 0.6 I, with which
            the start is stationary.
        observation: C, ``(x_dim, z_dim)``; learned from a random start.
        observation_tril: Cholesky factor of R, ``(x_dim, x_dim)``; learned from I.

    Shapes:
        ``x``: ``(batch, num_steps, x_dim)``; ``z``: ``(batch, num_steps * z_dim)``, step by step:
        ``z.reshape(-1, num_steps, z_dim)`` has the states.

    Raises:
        ValueError: If a size is below 1, or a given parameter has another shape or range.

    Example:
        >>> import torch
        >>> model = LinearStateSpace(num_steps=8, x_dim=2, z_dim=2)
        >>> smoother = model.posterior(torch.zeros(5, 8, 2))
        >>> smoother.mean.reshape(5, 8, 2)[0, -1].tolist()
        [0.0, 0.0]
    """

    initial_loc: Tensor
    initial_tril: Tensor
    transition: Tensor
    transition_tril: Tensor
    observation: Tensor
    observation_tril: Tensor

    def __init__(
        self,
        num_steps: int,
        x_dim: int,
        z_dim: int,
        *,
        initial_loc: Tensor | None = None,
        initial_tril: Tensor | None = None,
        transition: Tensor | None = None,
        transition_tril: Tensor | None = None,
        observation: Tensor | None = None,
        observation_tril: Tensor | None = None,
    ) -> None:
        super().__init__()
        if min(num_steps, x_dim, z_dim) < 1:
            raise ValueError(
                f"num_steps, x_dim and z_dim must be positive; got {num_steps}, {x_dim} and "
                f"{z_dim}."
            )
        self.num_steps, self.x_dim, self.z_dim = num_steps, x_dim, z_dim
        cholesky, eye = constraints.lower_cholesky, torch.eye(z_dim)
        random = torch.randn(x_dim, z_dim) / math.sqrt(z_dim)
        set_parameter(self, "initial_loc", initial_loc, torch.zeros(z_dim))
        set_parameter(self, "initial_tril", initial_tril, eye.clone(), cholesky)
        set_parameter(self, "transition", transition, 0.8 * eye)
        set_parameter(self, "transition_tril", transition_tril, 0.6 * eye, cholesky)
        set_parameter(self, "observation", observation, random)
        set_parameter(self, "observation_tril", observation_tril, torch.eye(x_dim), cholesky)

    def _path(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""The prior of the path z: its mean m, and K and D with :math:`K (z - m) = D \epsilon`.

        K is lower triangular with ones on its diagonal, and D has the Cholesky factors of P and Q
        in blocks: the path's Cholesky factor is K⁻¹ D, its precision (D⁻¹ K)ᵀ (D⁻¹ K).
        """
        steps, transition = self.num_steps, self.transition
        eye = torch.eye(steps * self.z_dim, dtype=transition.dtype, device=transition.device)
        before = torch.diag(transition.new_ones(steps - 1), -1)
        K = eye - torch.kron(before, transition)
        D = torch.block_diag(self.initial_tril, *[self.transition_tril] * (steps - 1))
        first = torch.cat([self.initial_loc, transition.new_zeros((steps - 1) * self.z_dim)])
        mean = torch.linalg.solve_triangular(K, first[:, None], upper=False, unitriangular=True)
        return mean[:, 0], K, D

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The generative process: series ``x`` to condition on, or ``size`` series to draw."""
        event = (self.num_steps, self.x_dim)
        batch = plate_size(type(self).__name__, x, size, event_shape=event)
        mean, K, D = self._path()
        tril = torch.linalg.solve_triangular(K, D, upper=False, unitriangular=True)
        observation, noise = self.observation, self.observation_tril
        with pyro.plate("data", batch, dim=-1):
            z = pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=tril))
            states = z.reshape(*z.shape[:-1], self.num_steps, self.z_dim)
            series = dist.MultivariateNormal(states @ observation.mT, scale_tril=noise)
            return pyro.sample("x", series.to_event(1), obs=x)

    def _given(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What evidence and posterior share.

        With the noise of path and series whitened, log p(x, z) is −½ (|F d|² + |e − G d|²) and a
        constant, where d is z less its prior mean.

        Returns:
            That prior mean; F and G; the residuals e of the rows at the prior mean, ``(batch,
            num_steps * x_dim)``; and the Cholesky factor of the posterior's precision FᵀF + GᵀG.
        """
        plate_size(f"{type(self).__name__}", x, None, event_shape=(self.num_steps, self.x_dim))
        mean, K, D = self._path()
        F = torch.linalg.solve_triangular(D, K, upper=False)
        noise = self.observation_tril
        C = torch.linalg.solve_triangular(noise, self.observation, upper=False).contiguous()
        steps = torch.eye(self.num_steps, dtype=C.dtype, device=C.device)
        G = torch.kron(steps, C)
        expected = mean.reshape(self.num_steps, self.z_dim) @ self.observation.mT
        e = torch.linalg.solve_triangular(noise, (x - expected).mT, upper=False).mT.flatten(-2)
        return mean, F, G, e, torch.linalg.cholesky(F.mT @ F + G.mT @ G)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) of whole series in nats, ``(batch,)``."""
        _, F, G, e, cholesky = self._given(x)
        # Bayes' rule at the posterior mean: sums of squares alone, so that nothing cancels.
        d = torch.cholesky_solve((e @ G).mT, cholesky).mT
        squares = (d @ F.mT).square().sum(-1) + (e - d @ G.mT).square().sum(-1)
        log_noise = self.num_steps * self.observation_tril.diagonal().log().sum()
        # F is lower triangular, its diagonal the inverse of that of D.
        log_volume = cholesky.diagonal().log().sum() - F.diagonal().log().sum() + log_noise
        return -0.5 * (squares + e.shape[-1] * math.log(2 * math.pi)) - log_volume

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """Exact p(z | x), the smoother: one Gaussian over the path, batch shape ``(batch,)``.

        Its precision is block-tridiagonal, and the same for every row.
        """
        mean, _, G, e, cholesky = self._given(x)
        d = torch.cholesky_solve((e @ G).mT, cholesky).mT
        return dist.MultivariateNormal(mean + d, precision_matrix=cholesky @ cholesky.mT)

    def __repr__(self) -> str:
        return (
            f"LinearStateSpace(num_steps={self.num_steps}, x_dim={self.x_dim}, z_dim={self.z_dim})"
        )
