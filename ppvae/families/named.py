"""Families that have a name of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints, transforms

from ppvae.distributions import TruncatedNormal as _TruncatedNormal
from ppvae.distributions import Weibull as _Weibull
from ppvae.families.base import BUILT_IN, Family, GaussianFamily, innermost


class DiagonalGaussian(GaussianFamily):
    """λ = (μ, log σ)."""

    def gaussian(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and (diagonal) Cholesky factor of λ."""
        loc, log_scale = params.chunk(2, dim=-1)
        return loc, torch.diag_embed(torch.exp(log_scale))

    def from_gaussian(self, loc: Tensor, tril: Tensor) -> Tensor:
        """λ of a mean and a diagonal Cholesky factor."""
        return torch.cat([loc, torch.log(torch.diagonal(tril, dim1=-2, dim2=-1))], dim=-1)


class DiagonalNormal(DiagonalGaussian):
    r"""Mean-field Gaussian, :math:`q(z) = \prod_d N(z_d; \mu_d, \sigma_d^2)`.

    λ = (μ, log σ).

    Args:
        latent_dim: Size of a vector-valued latent, `None` for a scalar one.

    Example:
        >>> import torch
        >>> DiagonalNormal(20).num_params
        40
        >>> DiagonalNormal().distribution(torch.zeros(7, 2)).batch_shape
        torch.Size([7])
    """

    def _build(self, params: Tensor) -> Any:
        loc, log_scale = self._two(params)
        return self._event(dist.Normal(loc, torch.exp(log_scale)))

    def params_of(self, member: Any) -> Tensor:
        """λ of a normal distribution."""
        normal = innermost(member)
        return self._join(normal.loc, torch.log(normal.scale))


# Not held by the families, which may be saved on one machine and loaded on another.
_ON_DEVICE: dict[tuple[tuple[tuple[int, ...], ...], torch.device], tuple[Tensor, Tensor]] = {}


class BlockNormal(GaussianFamily):
    r"""Structured mean field: a Gaussian with independent blocks.

    .. math:: q(z) = \prod_b N(z_b; \mu_b, L_b L_b^\top)

    λ = (μ, log diag L, what is below the diagonal inside of the blocks, row by row). Elements of
    a block need not be neighbours: blocks of a series may be its time steps, or its coordinates
    over time (Saul & Jordan 1996).

    Args:
        latent_dim: Size of the latent.
        blocks: The elements of each block; together they are all elements, each once.

    Raises:
        ValueError: If the blocks are no partition of the elements.

    Example:
        >>> BlockNormal(4, [(0, 2), (1, 3)]).num_params
        10
    """

    support = constraints.real_vector

    def __init__(self, latent_dim: int, blocks: Sequence[Sequence[int]]) -> None:
        super().__init__(latent_dim)
        self.blocks = tuple(tuple(int(i) for i in block) for block in blocks)
        elements = [i for block in self.blocks for i in block]
        if sorted(elements) != list(range(self.size)) or () in self.blocks:
            raise ValueError(
                f"blocks: expected a partition of the elements 0 to {self.size - 1}, each in one "
                f"block; got {list(self.blocks)}."
            )
        rows, columns = torch.tril_indices(self.size, self.size, offset=-1)
        labels = self.block_labels
        inside = labels[rows] == labels[columns]
        self._rows, self._columns = rows[inside], columns[inside]

    @property
    def block_labels(self) -> Tensor:
        """For each element the number of its block."""
        labels = torch.empty(self.size, dtype=torch.long)
        for number, block in enumerate(self.blocks):
            labels[list(block)] = number
        return labels

    @property
    def num_params(self) -> int:
        """Size of a row of parameters."""
        return 2 * self.size + len(self._rows)

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and column of each element of the factor below its diagonal."""
        own = self._rows, self._columns
        if device.type == "cpu":
            return own
        # Copied once: a copy from the CPU waits for the device, and no CUDA graph can hold it.
        key = self.blocks, device
        found = _ON_DEVICE.get(key) or (own[0].to(device), own[1].to(device))
        if type(found[0]) is Tensor:  # Not one without data, in which a graph is captured.
            _ON_DEVICE[key] = found
        return found

    def _build(self, params: Tensor) -> Any:
        loc, tril = self.gaussian(params)
        return dist.MultivariateNormal(loc, scale_tril=tril)

    def params_of(self, member: Any) -> Tensor:
        """λ of a multivariate normal distribution; what joins two blocks is left out."""
        normal = innermost(member)
        return self.from_gaussian(normal.loc, normal.scale_tril)

    def gaussian(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and Cholesky factor of λ."""
        d = self.size
        loc, log_diagonal, rest = params.split([d, d, len(self._rows)], dim=-1)
        tril = torch.diag_embed(torch.exp(log_diagonal))
        below = torch.zeros_like(tril)
        rows, columns = self._places(params.device)
        below[..., rows, columns] = rest
        return loc, tril + below

    def from_gaussian(self, loc: Tensor, tril: Tensor) -> Tensor:
        """λ of a mean and a Cholesky factor."""
        diagonal = torch.diagonal(tril, dim1=-2, dim2=-1)
        rows, columns = self._places(tril.device)
        rest = tril[..., rows, columns]
        return torch.cat([loc, torch.log(diagonal), rest], dim=-1)

    def __repr__(self) -> str:
        return f"BlockNormal({self.size}, {list(self.blocks)})"


class FullRankNormal(BlockNormal):
    r"""Gaussian with a full covariance, :math:`q(z) = N(z; \mu, L L^\top)`.

    λ = (μ, log diag L, the rest of L row by row): d + d (d + 1) / 2 numbers.

    Args:
        latent_dim: Size of the latent.

    Example:
        >>> FullRankNormal(3).num_params
        9
    """

    def __init__(self, latent_dim: int) -> None:
        if latent_dim is None:
            raise ValueError("FullRankNormal needs a latent_dim; a scalar takes DiagonalNormal().")
        super().__init__(latent_dim, [range(latent_dim)] if latent_dim > 0 else [])

    def __repr__(self) -> str:
        return f"FullRankNormal({self.size})"


class LogNormal(DiagonalGaussian):
    r"""Mean-field log-normal on z > 0: :math:`\log z_d \sim N(\mu_d, \sigma_d^2)`.

    λ = (μ, log σ).

    Args:
        latent_dim: Size of a vector-valued latent, `None` for a scalar one.

    Example:
        >>> import torch
        >>> LogNormal().distribution(torch.zeros(2)).mean
        tensor(1.6487)
    """

    support = constraints.positive
    bijection = transforms.ExpTransform()

    def _build(self, params: Tensor) -> Any:
        loc, log_scale = self._two(params)
        return self._event(dist.LogNormal(loc, torch.exp(log_scale)))

    def params_of(self, member: Any) -> Tensor:
        """λ of a log-normal distribution."""
        log_normal = innermost(member)
        return self._join(log_normal.loc, torch.log(log_normal.scale))


class Gamma(Family):
    r"""Mean-field gamma on z > 0: :math:`q(z) \propto z^{\alpha - 1} e^{-\beta z}`.

    λ = (log α, log β). Draws are reparameterised implicitly (Figurnov et al. 2018).

    Args:
        latent_dim: Size of a vector-valued latent, `None` for a scalar one.

    Example:
        >>> import torch
        >>> Gamma().distribution(torch.zeros(2)).mean
        tensor(1.)
    """

    support = constraints.positive

    def _build(self, params: Tensor) -> Any:
        log_concentration, log_rate = self._two(params)
        return self._event(dist.Gamma(torch.exp(log_concentration), torch.exp(log_rate)))

    def params_of(self, member: Any) -> Tensor:
        """λ of a gamma distribution."""
        gamma = innermost(member)
        return self._join(torch.log(gamma.concentration), torch.log(gamma.rate))


class Weibull(Family):
    r"""Mean-field Weibull on z > 0: :math:`q(z > t) = e^{-(t / s)^k}`.

    λ = (log s, log k).

    Args:
        latent_dim: Size of a vector-valued latent, `None` for a scalar one.

    Example:
        >>> import torch
        >>> Weibull().distribution(torch.zeros(2)).mean
        tensor(1.)
    """

    support = constraints.positive

    def _build(self, params: Tensor) -> Any:
        log_scale, log_concentration = self._two(params)
        return self._event(_Weibull(torch.exp(log_scale), torch.exp(log_concentration)))

    def params_of(self, member: Any) -> Tensor:
        """λ of a Weibull distribution."""
        weibull = innermost(member)
        return self._join(torch.log(weibull.scale), torch.log(weibull.concentration))


class TruncatedNormal(Family):
    r"""Mean-field normal kept to z ≥ 0: :math:`q(z) \propto N(z; \mu, \sigma^2)`.

    λ = (μ, log σ), location and scale of the parent normal.

    Args:
        latent_dim: Size of a vector-valued latent, `None` for a scalar one.

    Example:
        >>> import torch
        >>> TruncatedNormal(3).distribution(torch.zeros(6)).event_shape
        torch.Size([3])
    """

    support = constraints.nonnegative

    def _build(self, params: Tensor) -> Any:
        loc, log_scale = self._two(params)
        return self._event(_TruncatedNormal(loc, torch.exp(log_scale)))

    def params_of(self, member: Any) -> Tensor:
        """λ of a truncated normal distribution."""
        truncated = innermost(member)
        return self._join(truncated.loc, torch.log(truncated.scale))


BUILT_IN.update(
    {
        dist.Normal: DiagonalNormal,
        dist.MultivariateNormal: FullRankNormal,
        dist.LogNormal: LogNormal,
        dist.Gamma: Gamma,
        dist.Weibull: Weibull,
        _Weibull: Weibull,
        _TruncatedNormal: TruncatedNormal,
    }
)
