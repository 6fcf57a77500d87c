r"""Regression with a neural network whose weights, or some of whose inputs, are latent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from ppvae.density import Program, check_count, draw_chunks, judging
from ppvae.isolation import OwnedModule, check_rows, plate_size


class TargetsGivenInputs(dist.TorchDistribution):
    r"""Rows of inputs and targets, of which the targets alone are random.

    .. math:: \log p(x) = \log p(\text{targets} \mid \text{inputs})

    A draw repeats the inputs and draws the targets. In the value of a row the inputs are not
    looked at: they are the ones that the distribution was made with.

    Args:
        inputs: ``(*batch, x_dim)``.
        targets: Their distribution, event shape ``(y_dim,)``, whose batch shape ends in ``batch``.

    Example:
        >>> import torch
        >>> targets = dist.Normal(torch.zeros(4, 1), 1.0).to_event(1)
        >>> rows = TargetsGivenInputs(torch.ones(4, 2), targets)
        >>> rows.sample()[0, :2], rows.log_prob(torch.zeros(4, 3))[0]
        (tensor([1., 1.]), tensor(-0.9189))
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  # a class attribute in torch
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, inputs: Tensor, targets: Any, validate_args: bool | None = None) -> None:
        self.inputs, self.targets = inputs, targets
        size = inputs.shape[-1] + targets.event_shape[0]
        super().__init__(targets.batch_shape, torch.Size([size]), validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> TargetsGivenInputs:
        """The same inputs and targets in a larger batch."""
        return TargetsGivenInputs(self.inputs, self.targets.expand(batch_shape))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Rows: the inputs, and targets drawn for them."""
        targets = self.targets.rsample(sample_shape)
        inputs = self.inputs.expand(*targets.shape[:-1], self.inputs.shape[-1])
        return torch.cat([inputs, targets], dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the targets in rows ``(*batch, x_dim + y_dim)``."""
        out: Tensor = self.targets.log_prob(value[..., self.inputs.shape[-1] :])
        return out


@dataclass(frozen=True)
class Prediction:
    """Targets predicted for inputs, each ``(batch, y_dim)``.

    Attributes:
        mean: Mean over noise and weights.
        noise_sd: Standard deviation that would remain if the weights were known.
        weight_sd: Standard deviation, over the weights, of the mean given the weights.
    """

    mean: Tensor
    noise_sd: Tensor
    weight_sd: Tensor

    @property
    def sd(self) -> Tensor:
        """Standard deviation in all; by the law of total variance the two squares add up."""
        return torch.sqrt(self.noise_sd**2 + self.weight_sd**2)


class _Network(OwnedModule):
    """What both models share: a network with given weights, the noise, and the shape of a row."""

    noise: Tensor

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        latent_dim: int,
        hidden: Sequence[int],
        prior_scale: float,
        noise: Tensor | float | None,
        activation: type[nn.Module],
    ) -> None:
        super().__init__()
        if min(x_dim, y_dim, *hidden) < 1 or latent_dim < 0:
            raise ValueError(
                f"x_dim, y_dim and hidden must be positive and latent_dim not negative; got "
                f"{x_dim}, {y_dim}, {tuple(hidden)} and {latent_dim}."
            )
        if not prior_scale > 0:
            raise ValueError(f"prior_scale must be positive; got {prior_scale}.")
        self.x_dim, self.y_dim, self.latent_dim = x_dim, y_dim, latent_dim
        self.hidden, self.activation = tuple(hidden), activation()
        self.sizes = (x_dim + latent_dim, *hidden, y_dim)
        layers = list(zip(self.sizes[:-1], self.sizes[1:], strict=True))
        parts = [
            torch.cat(
                [torch.full((o * i,), prior_scale / math.sqrt(i)), torch.full((o,), prior_scale)]
            )
            for i, o in layers
        ]
        self.register_buffer("prior_sd", torch.cat(parts))
        self.num_weights = sum(o * i + o for i, o in layers)
        start = torch.as_tensor(1.0 if noise is None else noise, dtype=torch.get_default_dtype())
        if start.dim() > 1 or (start.dim() == 1 and len(start) != y_dim):
            raise ValueError(
                f"noise: expected a number or shape ({y_dim},), one for each target; got "
                f"{tuple(start.shape)}."
            )
        if not bool((start > 0).all()):
            raise ValueError(f"noise: standard deviations must be positive; got {noise}.")
        self.noise = PyroParam(start.detach().expand(y_dim).clone(), constraints.positive)
        if noise is not None:
            unconstrained: Any = self.noise_unconstrained
            unconstrained.requires_grad_(False)

    def network(self, weights: Tensor, inputs: Tensor) -> Tensor:
        """The network's output.

        Args:
            weights: ``(*, num_weights)``; of each layer its matrix row by row, then its biases.
            inputs: ``(*, x_dim + latent_dim)``. The leading dimensions of both are broadcast, so
                that S draws of weights for n rows have shape ``(S, 1, num_weights)``.

        Returns:
            ``(*, y_dim)``.

        Raises:
            ValueError: If either has another size.
        """
        if weights.shape[-1:] != (self.num_weights,) or inputs.shape[-1:] != self.sizes[:1]:
            raise ValueError(
                f"expected weights of shape (*, {self.num_weights}) and inputs of shape "
                f"(*, {self.sizes[0]}) for layers {self.sizes}; got {tuple(weights.shape)} and "
                f"{tuple(inputs.shape)}."
            )
        out, at = inputs, 0
        for layer, (i, o) in enumerate(zip(self.sizes[:-1], self.sizes[1:], strict=True)):
            matrix = weights[..., at : at + o * i].reshape(*weights.shape[:-1], o, i)
            bias = weights[..., at + o * i : at + o * i + o]
            out = torch.einsum("...oi,...i->...o", matrix, self.activation(out) if layer else out)
            out, at = out + bias, at + o * i + o
        return out

    def _inputs(self, x: Tensor | None, batch: int) -> Tensor:
        if x is not None:
            return x[..., : self.x_dim]
        return torch.randn(batch, self.x_dim).to(self.prior_sd)

    def _latent(self) -> Tensor:
        zeros = self.prior_sd.new_zeros(self.latent_dim)
        z: Tensor = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
        return z

    def _score(self, weights: Tensor, inputs: Tensor, z: Tensor | None, x: Tensor | None) -> Tensor:
        mean = self.network(weights, inputs if z is None else _beside(inputs, z))
        targets = dist.Normal(mean, self.noise).to_event(1)
        return pyro.sample("x", TargetsGivenInputs(inputs, targets), obs=x)


def _beside(inputs: Tensor, z: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(inputs.shape[:-1], z.shape[:-1])
    return torch.cat([inputs.expand(*shape, -1), z.expand(*shape, -1)], dim=-1)


class LatentInputNetwork(_Network):
    r"""Regression on the inputs of a row and on a latent of its own.

    .. math:: z_n \sim N(0, I), \qquad
              y_n \mid u_n, z_n \sim N(f_w(u_n, z_n), \mathrm{diag}(\sigma^2))

    A row of ``x`` is its inputs u, then its targets y. The site ``"x"`` scores the targets given
    the inputs, so that every density is log p(y | u): the inputs have none. ``model(size=n)``
    draws standard normal inputs and targets for them.

    With z the noise may be of any shape and change with the inputs, as in bimodal and
    heteroscedastic data.

    Source: Depeweg, Hernández-Lobato, Doshi-Velez & Udluft (2016; 2018), with the weights at one
    value; `BayesianNeuralNetwork` has a distribution over them.

    Args:
        x_dim: Number of inputs.
        y_dim: Number of targets.
        latent_dim: Size of z, at least 1.
        hidden: Widths of the hidden layers; empty for a linear f, where the evidence is exact.
        weights: w, ``(num_weights,)`` as in `network`. Learned from a random start if left out;
            given values are held fixed.
        noise: Standard deviations σ of the targets, a number or ``(y_dim,)``; learned from 1 if
            left out, given values are held fixed.
        activation: Class of the activation between layers.

    Shapes:
        ``x``: ``(batch, x_dim + y_dim)``; ``z``: ``(batch, latent_dim)``.

    Raises:
        ValueError: If a size is out of range, or ``weights`` or ``noise`` has another shape.

    Example:
        >>> import torch
        >>> model = LatentInputNetwork(x_dim=1, y_dim=1, latent_dim=1, hidden=(8,))
        >>> model(size=5).shape
        torch.Size([5, 2])
        >>> LatentInputNetwork(hidden=()).log_evidence(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    weights: Tensor

    def __init__(
        self,
        x_dim: int = 1,
        y_dim: int = 1,
        latent_dim: int = 1,
        hidden: Sequence[int] = (20,),
        *,
        weights: Tensor | None = None,
        noise: Tensor | float | None = None,
        activation: type[nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__(x_dim, y_dim, latent_dim, hidden, 1.0, noise, activation)
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1; got {latent_dim}.")
        if weights is not None and tuple(weights.shape) != (self.num_weights,):
            raise ValueError(
                f"weights: expected shape ({self.num_weights},) for layers {self.sizes}; got "
                f"{tuple(weights.shape)}."
            )
        start = torch.randn(self.num_weights) * self.prior_sd if weights is None else weights
        self.weights = nn.Parameter(start.detach().clone(), requires_grad=weights is None)

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The generative process: rows ``x`` to condition on, or ``size`` rows to draw."""
        batch = plate_size(type(self).__name__, x, size, event_shape=(self.x_dim + self.y_dim,))
        with pyro.plate("data", batch, dim=-1):
            return self._score(self.weights, self._inputs(x, batch), self._latent(), x)

    @property
    def log_evidence(self) -> Callable[[Tensor], Tensor]:
        """Exact log p(y | u) in nats, from rows ``(batch, x_dim + y_dim)`` to ``(batch,)``.

        Of a linear f alone: without hidden layers y ~ N(f(u, 0), C Cᵀ + diag(σ²)), with C the
        columns of its matrix that belong to z. With hidden layers there is no such attribute.
        """
        if self.hidden:
            raise AttributeError("log_evidence")
        return self._log_evidence

    def __getattr__(self, name: str) -> Any:
        # Python asks here once the property has raised, and drops what the property said.
        if name == "log_evidence":
            raise AttributeError(
                f"log_evidence needs a linear network, hidden=(); this one has "
                f"hidden={self.hidden}. Use ppvae.quadrature or ppvae.iwae."
            )
        return super().__getattr__(name)

    def _log_evidence(self, x: Tensor) -> Tensor:
        offset, loadings = self._linear(x)
        out: Tensor = dist.LowRankMultivariateNormal(offset, loadings, self.noise**2).log_prob(
            x[..., self.x_dim :]
        )
        return out

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """Exact p(z | u, y) of a linear f, a multivariate normal with batch shape ``(batch,)``.

        Raises:
            ValueError: If the network has hidden layers.
        """
        if self.hidden:
            raise ValueError(
                f"posterior: z has a normal posterior in a linear network alone, hidden=(); this "
                f"one has hidden={self.hidden}. Use ppvae.fit_per_datapoint or ppvae.quadrature."
            )
        offset, loadings = self._linear(x)
        scaled = loadings / (self.noise**2)[:, None]
        eye = torch.eye(self.latent_dim).to(scaled)
        precision = eye + loadings.mT @ scaled
        mean = torch.linalg.solve(precision, ((x[..., self.x_dim :] - offset) @ scaled).mT).mT
        return dist.MultivariateNormal(mean, precision_matrix=precision)

    def _linear(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f(u, 0), ``(batch, y_dim)``, and C, ``(y_dim, latent_dim)``."""
        inputs = self._inputs(x, len(x))
        zeros = inputs.new_zeros(*inputs.shape[:-1], self.latent_dim)
        matrix = self.weights[: self.y_dim * self.sizes[0]].reshape(self.y_dim, self.sizes[0])
        return self.network(self.weights, _beside(inputs, zeros)), matrix[:, self.x_dim :]

    def __repr__(self) -> str:
        return (
            f"LatentInputNetwork(x_dim={self.x_dim}, y_dim={self.y_dim}, "
            f"latent_dim={self.latent_dim}, hidden={self.hidden})"
        )


class BayesianNeuralNetwork(_Network):
    r"""Regression with a normal prior over the weights of a network.

    .. math:: w_{lij} \sim N(0, s^2 / \text{fan-in}_l), \quad b_{li} \sim N(0, s^2), \qquad
              y_n \mid u_n, w \sim N(f_w(u_n), \mathrm{diag}(\sigma^2))

    A row of ``x`` is its inputs u, then its targets y. The site ``"x"`` scores the targets given
    the inputs; the inputs have no density. ``model(size=n)`` draws weights, standard normal
    inputs, and targets for them. All weights are one site, ``"weights"``, outside of the plate:
    all rows share it. So there is nothing to amortize, and whatever judges a guide row by row
    refuses the model; train it with `ppvae.fit` or `pyro.infer.SVI`.

    With ``latent_dim`` each row also has :math:`z_n \sim N(0, I)`, an input that was not observed
    (Depeweg et al. 2016), and :math:`f_w(u_n, z_n)` takes both. `at` holds the weights at a value,
    which leaves a model with z alone, and z can be amortized.

    Source: Neal (1996) for the prior; Blundell, Cornebise, Kavukcuoglu & Wierstra (2015) for its
    mean-field guide.

    Args:
        x_dim: Number of inputs.
        y_dim: Number of targets.
        hidden: Widths of the hidden layers; empty for Bayesian linear regression.
        latent_dim: Size of z; 0 for a network without latent inputs.
        prior_scale: s.
        noise: Standard deviations σ of the targets, a number or ``(y_dim,)``; learned from 1 if
            left out, given values are held fixed.
        num_data: Number N of data. Called with B rows each then weighs N/B, so that the loss of a
            minibatch estimates that of all data. The rows are all data if left out.
        activation: Class of the activation between layers.

    Shapes:
        ``x``: ``(batch, x_dim + y_dim)``; ``weights``: ``(num_weights,)``; ``z``:
        ``(batch, latent_dim)``.

    Raises:
        ValueError: If a size is out of range, or ``noise`` has another shape; on a call with more
            rows than ``num_data``.

    Example:
        >>> model = BayesianNeuralNetwork(x_dim=1, y_dim=1, hidden=(20,))
        >>> model.num_weights
        61
        >>> model(size=7).shape
        torch.Size([7, 2])
    """

    def __init__(
        self,
        x_dim: int = 1,
        y_dim: int = 1,
        hidden: Sequence[int] = (20,),
        *,
        latent_dim: int = 0,
        prior_scale: float = 1.0,
        noise: Tensor | float | None = None,
        num_data: int | None = None,
        activation: type[nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__(x_dim, y_dim, latent_dim, hidden, prior_scale, noise, activation)
        if num_data is not None:
            check_count("num_data", num_data)
        self.num_data = num_data

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The generative process: rows ``x`` to condition on, or ``size`` rows to draw."""
        batch = plate_size(type(self).__name__, x, size, event_shape=(self.x_dim + self.y_dim,))
        subsample: dict[str, Any] = {}
        if x is not None and self.num_data is not None:
            if batch > self.num_data:
                raise ValueError(
                    f"BayesianNeuralNetwork: x has {batch} rows but num_data={self.num_data}. "
                    f"num_data is the number of all data, of which x is a minibatch."
                )
            subsample = {"subsample": torch.arange(batch, device=x.device)}
        prior = dist.Normal(torch.zeros_like(self.prior_sd), self.prior_sd).to_event(1)
        weights = pyro.sample("weights", prior)
        count = self.num_data if subsample else batch
        with pyro.plate("data", count, dim=-1, **subsample):
            z = self._latent() if self.latent_dim else None
            return self._score(weights, self._inputs(x, batch), z, x)

    def at(self, weights: Tensor) -> LatentInputNetwork:
        """This model with the weights held at a value, such as their posterior mean or a draw.

        What is left is local: the pair of the result and an amortized guide for z goes through
        `ppvae.compare` and the rest.

        Args:
            weights: ``(num_weights,)``.

        Raises:
            ValueError: If the model has no latent inputs, or ``weights`` has another shape.

        Example:
            >>> import torch
            >>> model = BayesianNeuralNetwork(latent_dim=2, hidden=(8,))
            >>> model.at(torch.zeros(model.num_weights))
            LatentInputNetwork(x_dim=1, y_dim=1, latent_dim=2, hidden=(8,))
        """
        if not self.latent_dim:
            raise ValueError(
                "at: a network without latent inputs has no latent but its weights, so that "
                "nothing is left to infer once they are held. Build it with latent_dim >= 1."
            )
        held = LatentInputNetwork(
            self.x_dim,
            self.y_dim,
            self.latent_dim,
            self.hidden,
            weights=weights.to(self.prior_sd),
            noise=self.noise.detach(),
            activation=type(self.activation),
        ).to(self.prior_sd)
        # The constructor rounds to the default dtype.
        unconstrained: Any = held.noise_unconstrained
        unconstrained.data.copy_(self.noise_unconstrained)
        return held

    def predict(
        self,
        inputs: Tensor,
        guide: Program,
        num_samples: int = 500,
        *,
        num_latents: int = 50,
        seed: int = 0,
    ) -> Prediction:
        r"""Targets for new inputs, with their uncertainty split by its source.

        .. math:: \mathrm{Var}[y] =
            \underbrace{\mathrm{E}_w \mathrm{Var}[y \mid w]}_{\text{noise}} +
            \underbrace{\mathrm{Var}_w \mathrm{E}[y \mid w]}_{\text{weights}}

        More data shrink the second term alone (Depeweg et al. 2018, eq. 9). Latent inputs count
        as noise: those of new rows are drawn from their prior.

        Args:
            inputs: ``(batch, x_dim)``, without targets.
            guide: A guide with a site ``"weights"``; it is called with rows whose targets are 0.
            num_samples: Draws of the weights, at least 2.
            num_latents: Draws of z for each, at least 2; unused without latent inputs.
            seed: Seed of the draws; the caller's generators are left as they were.

        Returns:
            Mean and standard deviations, in the units of the targets, without gradient.

        Raises:
            ValueError: If the inputs or a number are unfit, or the guide has no such site.

        Example:
            >>> import torch, ppvae
            >>> model, guide = ppvae.pairs.bayesian_neural_network(noise=0.1)
            >>> model.predict(torch.zeros(3, 1), guide).noise_sd.flatten()
            tensor([0.1000, 0.1000, 0.1000])
        """
        check_rows(inputs, self, guide, name="inputs")
        if tuple(inputs.shape[1:]) != (self.x_dim,):
            raise ValueError(
                f"inputs: expected shape (batch, {self.x_dim}), without the targets; got "
                f"{tuple(inputs.shape)}."
            )
        check_count("num_samples", num_samples, least=2)
        check_count("num_latents", num_latents, least=2)
        latents = num_latents if self.latent_dim else 1
        means, within = [], []
        with judging(seed, inputs, self, guide), torch.no_grad():
            for size in draw_chunks(num_samples, inputs.repeat(1, latents)):
                weights = self._draw_weights(guide, inputs, size)
                if self.latent_dim:
                    z = inputs.new_empty(latents, size, len(inputs), self.latent_dim).normal_()
                    out = self.network(weights, _beside(inputs, z))
                    means.append(out.mean(dim=0))
                    within.append(out.var(dim=0))
                else:
                    means.append(self.network(weights, inputs))
        each = torch.cat(means)
        between, noise = each.var(dim=0), self.noise.detach() ** 2
        if self.latent_dim:
            spread = torch.cat(within).mean(dim=0)
            # The mean over a few z has an error of its own, which is not the weights'.
            between = (between - spread / latents).clamp(min=0)
            noise = noise + spread
        return Prediction(each.mean(dim=0), noise.expand(between.shape).sqrt(), between.sqrt())

    def _draw_weights(self, guide: Program, inputs: Tensor, count: int) -> Tensor:
        """``(count, 1, num_weights)``."""
        rows = torch.cat([inputs, inputs.new_zeros(len(inputs), self.y_dim)], dim=-1)[:1]
        with pyro.plate("ppvae.draws", count, dim=-2):
            trace = poutine.trace(guide).get_trace(rows)
        if "weights" not in trace.nodes:
            raise ValueError(
                f"guide: expected a site 'weights'; got {list(trace.nodes)}. Use the guide of "
                f"ppvae.pairs.bayesian_neural_network."
            )
        value: Tensor = trace.nodes["weights"]["value"]
        return value.expand(count, 1, self.num_weights)

    def _design(self, x: Tensor) -> Tensor:
        """Derivatives of a linear f in its weights, ``(batch, y_dim, num_weights)``."""
        if self.hidden or self.latent_dim:
            raise ValueError(
                f"The weights have a normal posterior in a linear network without latent inputs "
                f"alone; this one has hidden={self.hidden} and latent_dim={self.latent_dim}. "
                f"Build it with hidden=(), or train a guide."
            )
        plate_size(type(self).__name__, x, None, event_shape=(self.x_dim + self.y_dim,))
        units = torch.eye(self.num_weights).to(self.prior_sd)[:, None]
        return self.network(units, self._inputs(x, len(x))).permute(1, 2, 0)

    def weight_posterior(self, x: Tensor) -> dist.MultivariateNormal:
        r"""Exact p(w | x) of Bayesian linear regression, given all rows ``x``.

        Its precision is :math:`S^{-1} + \sum_n J_n^\top \Psi^{-1} J_n`, with S the prior's
        covariance, J the derivatives of the outputs and Ψ = diag(σ²) (Bishop 2006, eq. 3.51).

        Raises:
            ValueError: If the network has hidden layers or latent inputs.
        """
        design = self._design(x)
        scaled = design / (self.noise**2)[:, None]
        precision = torch.diag(self.prior_sd**-2) + torch.einsum("nyp,nyq->pq", design, scaled)
        moment = torch.einsum("nyp,ny->p", scaled, x[:, self.x_dim :])
        mean = torch.linalg.solve(precision, moment)
        return dist.MultivariateNormal(mean, precision_matrix=precision)

    def log_marginal(self, x: Tensor) -> Tensor:
        """Exact log p(y | u) of all rows together in nats, a scalar, for linear regression.

        The weights join the rows, so that it is no sum over them.

        Raises:
            ValueError: If the network has hidden layers or latent inputs.
        """
        design = self._design(x).flatten(0, 1)
        noise = (self.noise**2).expand(len(x), self.y_dim).flatten()
        targets = x[:, self.x_dim :].flatten()
        marginal = dist.LowRankMultivariateNormal(
            torch.zeros_like(targets), design * self.prior_sd, noise
        )
        out: Tensor = marginal.log_prob(targets)
        return out

    def __repr__(self) -> str:
        latent = f", latent_dim={self.latent_dim}" if self.latent_dim else ""
        return (
            f"BayesianNeuralNetwork(x_dim={self.x_dim}, y_dim={self.y_dim}, "
            f"hidden={self.hidden}{latent})"
        )
