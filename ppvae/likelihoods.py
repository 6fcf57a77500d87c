"""From a decoder's output to p(x | z), constants included."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae import distributions


class Likelihood(nn.Module, ABC):
    """A distribution of one row x given the decoder's output for it.

    Where the decoder puts out several numbers per element, they come in blocks of ``x_dim``: the
    first number of every element, then the second of every element, and so on.

    Attributes:
        of_counts: Whether rows are counts without a bound, which an encoder does well to read as
            log(1 + x).
    """

    of_counts = False

    @abstractmethod
    def num_outputs(self, x_dim: int) -> int:
        """How many numbers the decoder must put out for a row of size ``x_dim``."""

    @abstractmethod
    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """The distribution over rows, event shape ``(x_dim,)``."""

    def mean(self, output: Tensor) -> Tensor:
        """The mean of x, ``(*, x_dim)``; of categories, their probabilities."""
        mean: Tensor = self.distribution(output).mean
        return mean

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
        _refuse(
            "Bernoulli",
            "values 0 and 1",
            x,
            (x == 0) | (x == 1),
            "Binarise the data (ppvae.data.load(..., binarization=...)), or use "
            "likelihoods.Gaussian.",
        )


def _refuse(kind: str, values: str, x: Tensor, allowed: Tensor, advice: str) -> None:
    """Raise `ValueError` where elements of rows are not among the allowed ones."""
    if not bool(allowed.all()):
        first = float(x[~allowed][0])
        raise ValueError(
            f'Site "x": a {kind} likelihood is a probability of {values} alone; got '
            f"{int((~allowed).sum())} other values of {x.numel()} (the first: {first:.4g}). "
            f"{advice}"
        )


def _check_elements(likelihood: Likelihood, parameter: Tensor, x_dim: int) -> None:
    """Refuse rows of another size than that of a parameter with a value per element."""
    if parameter.dim() and parameter.numel() != x_dim:
        raise ValueError(
            f"likelihood: {likelihood!r} was made for rows of size {parameter.numel()}; got "
            f"x_dim={x_dim}. Make it with per_dimension({x_dim})."
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
        _check_elements(self, self._log_scale, x_dim)
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


class Categorical(Likelihood):
    r"""Rows of categories: :math:`p(x_d = k) \propto \exp o_{kd}`, the softmax of logits.

    Each element of a row is one of the categories 0, …, K − 1, as a floating point number. With a
    decoder whose last layer is linear, the logits are :math:`W \varphi(z; u)`.

    Args:
        num_classes: Number K of categories, at least 2.

    Shapes:
        The output of the decoder, ``(*, K * x_dim)``, has the logits of category 0 for all
        elements first, then those of category 1, …; `mean` gives the probabilities of the
        categories, ``(*, x_dim, K)``.

    Example:
        >>> import torch
        >>> likelihood = Categorical(3)
        >>> likelihood.num_outputs(4)
        12
        >>> likelihood.distribution(torch.zeros(2, 12)).log_prob(torch.ones(2, 4))  # 4 log(1/3)
        tensor([-4.3944, -4.3944])
        >>> likelihood.mean(torch.zeros(2, 12)).shape
        torch.Size([2, 4, 3])
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2; got {num_classes}.")
        self.num_classes = num_classes

    def num_outputs(self, x_dim: int) -> int:
        """A logit per category and element."""
        return self.num_classes * x_dim

    def _by_element(self, output: Tensor) -> distributions.FloatCategorical:
        logits = output.unflatten(-1, (self.num_classes, -1)).mT
        return distributions.FloatCategorical(logits=logits)

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Independent categorical distributions, whose draws are floating point."""
        return self._by_element(output).to_event(1)

    def mean(self, output: Tensor) -> Tensor:
        """The probabilities of the categories, ``(*, x_dim, K)``: categories have no mean."""
        probs: Tensor = self._by_element(output).probs
        return probs

    def check(self, x: Tensor) -> None:
        """Refuse values other than 0, …, K − 1, fractions among them."""
        _refuse(
            f"Categorical({self.num_classes})",
            f"the categories 0, 1, …, {self.num_classes - 1}",
            x,
            (x >= 0) & (x < self.num_classes) & (x == x.floor()),
            "Number the categories from 0, and give num_classes how many there are.",
        )

    def __repr__(self) -> str:
        return f"Categorical({self.num_classes})"


_COUNTS = (
    "Give it the counts as they were counted, neither scaled nor centred, or use "
    "likelihoods.Gaussian."
)


class Poisson(Likelihood):
    r"""Rows of counts: :math:`x_d \sim \mathrm{Poisson}(e^{o_d})`, log rates from the decoder.

    Example:
        >>> import torch
        >>> Poisson().distribution(torch.zeros(2, 4)).log_prob(torch.ones(2, 4))
        tensor([-4., -4.])
    """

    of_counts = True

    def num_outputs(self, x_dim: int) -> int:
        """One log rate per element."""
        return x_dim

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Independent Poisson distributions with these log rates."""
        return distributions.Poisson(output).to_event(1)

    def check(self, x: Tensor) -> None:
        """Refuse negative values and fractions."""
        _refuse("Poisson", "counts 0, 1, 2, …", x, (x >= 0) & (x == x.floor()), _COUNTS)


class NegativeBinomial(Likelihood):
    r"""Rows of counts that spread wider than Poisson counts.

    .. math:: x_d \sim \mathrm{Poisson}(g_d\, e^{o_d}), \qquad
              g_d \sim \mathrm{Gamma}(1/\alpha, 1/\alpha)

    with g integrated out: the mean is :math:`\mu_d = e^{o_d}`, whose logarithm comes from the
    decoder, and the variance :math:`\mu_d + \alpha \mu_d^2`. The dispersion α is fixed
    (``NegativeBinomial(dispersion)``), learned and shared by all elements
    (`NegativeBinomial.learned`), or learned per element (`NegativeBinomial.per_dimension`). As α
    goes to 0 it becomes `Poisson`.

    Args:
        dispersion: α, positive.

    Example:
        >>> import torch
        >>> member = NegativeBinomial(0.5).distribution(torch.zeros(4))
        >>> member.mean, member.variance
        (tensor([1., 1., 1., 1.]), tensor([1.5000, 1.5000, 1.5000, 1.5000]))
    """

    of_counts = True
    _log_dispersion: Tensor

    def __init__(self, dispersion: float = 1.0) -> None:
        super().__init__()
        if not 0 < dispersion < math.inf:
            raise ValueError(f"dispersion must be positive and finite; got {dispersion}.")
        self.kind = "fixed"
        self.register_buffer("_log_dispersion", torch.tensor(math.log(dispersion)))

    @classmethod
    def learned(cls, dispersion: float = 1.0) -> NegativeBinomial:
        """One learned dispersion for all elements, starting at ``dispersion``."""
        return cls(dispersion)._with_parameter("learned", ())

    @classmethod
    def per_dimension(cls, x_dim: int, dispersion: float = 1.0) -> NegativeBinomial:
        """A learned dispersion per element, each starting at ``dispersion``."""
        return cls(dispersion)._with_parameter("per_dimension", (x_dim,))

    def _with_parameter(self, kind: str, shape: tuple[int, ...]) -> NegativeBinomial:
        start = self._log_dispersion.expand(shape).clone()
        del self._log_dispersion
        self._log_dispersion = nn.Parameter(start)
        self.kind = kind
        return self

    @property
    def dispersion(self) -> Tensor:
        """α as it is now, ``()`` or ``(x_dim,)``."""
        return torch.exp(self._log_dispersion)

    def num_outputs(self, x_dim: int) -> int:
        """One log mean per element."""
        _check_elements(self, self._log_dispersion, x_dim)
        return x_dim

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Independent negative binomial distributions with these log means."""
        log_dispersion = self._log_dispersion.to(output.dtype).expand(output.shape)
        return distributions.NegativeBinomial(output, log_dispersion).to_event(1)

    def check(self, x: Tensor) -> None:
        """Refuse negative values and fractions."""
        _refuse("NegativeBinomial", "counts 0, 1, 2, …", x, (x >= 0) & (x == x.floor()), _COUNTS)

    def __repr__(self) -> str:
        if self.kind == "per_dimension":
            return f"NegativeBinomial(learned dispersion x {self._log_dispersion.numel()})"
        value = f"{float(self.dispersion.detach()):.4g}"
        word = "learned dispersion, now " if self.kind == "learned" else "dispersion="
        return f"NegativeBinomial({word}{value})"
