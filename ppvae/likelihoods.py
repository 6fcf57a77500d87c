"""From a decoder's output to p(x | z), constants included."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import pyro.distributions as dist
import torch
from torch import Tensor, nn


class Likelihood(nn.Module, ABC):
    """A distribution of one row x given the decoder's output for it."""

    @abstractmethod
    def num_outputs(self, x_dim: int) -> int:
        """How many numbers the decoder must put out for a row of size ``x_dim``."""

    @abstractmethod
    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """The distribution over rows, event shape ``(x_dim,)``."""

    @abstractmethod
    def check(self, x: Tensor) -> None:
        """Raise `ValueError` where a row lies outside of the support."""


class Bernoulli(Likelihood):
    r"""Binary rows: :math:`x_d \sim \mathrm{Bernoulli}(\sigma(o_d))`, logits from the decoder.

    Example:
        >>> import torch
        >>> Bernoulli().distribution(torch.zeros(2, 4)).log_prob(torch.ones(2, 4))
        tensor([-2.7726, -2.7726])
    """

    def num_outputs(self, x_dim: int) -> int:
        """One logit per element."""
        return x_dim

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Independent Bernoulli distributions with these logits."""
        return dist.Bernoulli(logits=output).to_event(1)

    def check(self, x: Tensor) -> None:
        """Refuse values other than 0 and 1, grey pixels among them."""
        binary = (x == 0) | (x == 1)
        if not bool(binary.all()):
            first = float(x[~binary][0])
            raise ValueError(
                f'Site "x": a Bernoulli likelihood is a density of values 0 and 1 alone; got '
                f"{int((~binary).sum())} other values of {x.numel()} (the first: {first:.4g}). "
                f"Binarise the data (ppvae.data.load(..., binarization=...)), or use "
                f"likelihoods.Gaussian."
            )


class Gaussian(Likelihood):
    r"""Real rows: :math:`x_d \sim N(\mu_d, \sigma_d^2)`.

    The mean comes from the decoder. The scale is fixed (``Gaussian(scale)``), learned and shared
    by all elements (`Gaussian.learned`), learned per element (`Gaussian.per_dimension`), or put
    out by the decoder as log variance (`Gaussian.network`): with a tanh layer before it that is
    the Gaussian MLP of Kingma & Welling (2014, appendix C.2),
    :math:`h = \tanh(W_3 z + b_3)`, :math:`\mu = W_4 h + b_4`, :math:`\log\sigma^2 = W_5 h + b_5`.

    Args:
        scale: Standard deviation, positive, in the units of x.

    Example:
        >>> import torch
        >>> Gaussian.network().num_outputs(560)
        1120
        >>> Gaussian(0.1)
        Gaussian(scale=0.1)
    """

    _log_scale: Tensor

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale must be positive; got {scale}.")
        self.kind = "fixed"
        self.register_buffer("_log_scale", torch.tensor(math.log(scale)))

    @classmethod
    def learned(cls, scale: float = 1.0) -> Gaussian:
        """One learned standard deviation for all elements, starting at ``scale``."""
        return cls(scale)._with_parameter("learned", ())

    @classmethod
    def per_dimension(cls, x_dim: int, scale: float = 1.0) -> Gaussian:
        """A learned standard deviation per element, each starting at ``scale``."""
        return cls(scale)._with_parameter("per_dimension", (x_dim,))

    @classmethod
    def network(cls) -> Gaussian:
        """Log variances from the decoder, beside the means."""
        new = cls()
        new.kind = "network"
        return new

    def _with_parameter(self, kind: str, shape: tuple[int, ...]) -> Gaussian:
        start = self._log_scale.expand(shape).clone()
        del self._log_scale
        self._log_scale = nn.Parameter(start)
        self.kind = kind
        return self

    def num_outputs(self, x_dim: int) -> int:
        """A mean per element, and with `network` a log variance too."""
        return 2 * x_dim if self.kind == "network" else x_dim

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Independent normal distributions with these means."""
        if self.kind == "network":
            mean, log_variance = output.chunk(2, dim=-1)
            return dist.Normal(mean, torch.exp(0.5 * log_variance)).to_event(1)
        scale = torch.exp(self._log_scale.to(output.dtype))
        return dist.Normal(output, scale.expand(output.shape)).to_event(1)

    def check(self, x: Tensor) -> None:
        """Every finite row is in the support."""

    def __repr__(self) -> str:
        if self.kind == "network":
            return "Gaussian(scale from the decoder)"
        if self.kind == "per_dimension":
            return f"Gaussian(learned scale x {self._log_scale.numel()})"
        value = f"{float(torch.exp(self._log_scale.detach())):.4g}"
        return f"Gaussian({'learned scale, now ' if self.kind == 'learned' else 'scale='}{value})"
