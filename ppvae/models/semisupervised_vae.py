r"""A variational autoencoder with a class beside its latent, some of the classes being known."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import constraints

from ppvae.isolation import OwnedModule, plate_size
from ppvae.likelihoods import Likelihood


class SemisupervisedVAE(OwnedModule):
    r"""A class and a normal latent, decoded together into the parameters of a likelihood.

    .. math::
        y_n \sim \mathrm{Categorical}(1/K, \dots, 1/K), \qquad z_n \sim N(0, I), \qquad
        x_n \mid y_n, z_n \sim p(x \mid \mathrm{NN}_\theta(y_n, z_n))

    Model M2 of Kingma, Rezende, Mohamed & Welling (2014, eq. 2). A row holds the pixels and, in its
    last column, the label: the class 0 to K − 1 where it is known, −1 where it is missing. Given
    which rows are labelled,

    .. math:: p(\text{row}) = \begin{cases} p(x, y) & \text{labelled} \\
              p(x) = \sum_y p(x, y) & \text{not labelled.} \end{cases}

    Every row has the latent sites ``"y"`` and ``"z"``. In a labelled row the label is decoded and
    the latent y is a class that nothing hangs on: its posterior is its prior, and it adds 0 nats.
    The observed site ``"x"`` has the whole row, label and all; unconditioned, as in `Predictive`,
    a row keeps its label and gets new pixels.

    Args:
        x_dim: Number of pixels, the label not counted.
        z_dim: Size of the latent z.
        num_classes: Number of classes K, at least 2.
        decoder: From ``(*, num_classes + z_dim)``, y as an indicator vector and then z, to
            ``(*, likelihood.num_outputs(x_dim))``, any number of leading dimensions.
        likelihood: From the decoder's output to p(x | y, z).
        labelled: Share of labelled rows, evenly spread, among those that ``model(size=n)`` draws.
            No density depends on it.

    Shapes:
        Rows: ``(batch, x_dim + 1)``; ``y``: ``(batch,)``; ``z``: ``(batch, z_dim)``.

    Raises:
        ValueError: On a call with rows of another size, pixels outside of the likelihood's
            support, or a label that is no class and not −1.

    Example:
        >>> from ppvae.likelihoods import Bernoulli
        >>> from ppvae.nn import MLP
        >>> model = SemisupervisedVAE(64, 8, 10, MLP(10 + 8, [100], 64), Bernoulli())
        >>> model(size=3).shape
        torch.Size([3, 65])
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        num_classes: int,
        decoder: nn.Module,
        likelihood: Likelihood,
        *,
        labelled: float = 0.5,
    ) -> None:
        super().__init__()
        if x_dim < 1 or z_dim < 1:
            raise ValueError(f"x_dim and z_dim must be positive; got {x_dim} and {z_dim}.")
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2; got {num_classes}.")
        if not 0 <= labelled <= 1:
            raise ValueError(f"labelled: expected a share from 0 to 1; got {labelled}.")
        self.x_dim, self.z_dim, self.num_classes = x_dim, z_dim, num_classes
        self.labelled = labelled
        self.decoder = decoder
        self.likelihood = likelihood
        with torch.no_grad():
            output = decoder(self._like().new_zeros(2, num_classes + z_dim))
        expected = (2, likelihood.num_outputs(x_dim))
        if tuple(output.shape) != expected:
            raise ValueError(
                f"decoder: expected outputs of shape (batch, {expected[1]}) for {likelihood!r} "
                f"and x_dim={x_dim}; got (batch, {', '.join(map(str, output.shape[1:]))})."
            )

    def _like(self) -> Tensor:
        return next((p for p in self.decoder.parameters()), torch.zeros(()))

    def rows(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Rows of this model: pixels with their labels beside them.

        Args:
            x: Pixels, ``(batch, x_dim)``.
            labels: Classes 0 to ``num_classes − 1``, −1 where they are missing, ``(batch,)``; all
                are missing if left out.

        Returns:
            ``(batch, x_dim + 1)``, of the dtype and on the device of ``x``.

        Raises:
            ValueError: If the shapes do not fit, or a label is no class and not −1.

        Example:
            >>> import torch
            >>> from ppvae import pairs
            >>> model, guide = pairs.semisupervised_vae(x_dim=3, num_classes=5)
            >>> model.rows(torch.zeros(2, 3), torch.tensor([4, -1]))
            tensor([[ 0.,  0.,  0.,  4.],
                    [ 0.,  0.,  0., -1.]])
        """
        if x.dim() != 2 or x.shape[1] != self.x_dim:
            raise ValueError(
                f"x: expected pixels of shape (batch, {self.x_dim}), without labels; got "
                f"{tuple(x.shape)}."
            )
        labels = x.new_full((len(x),), -1) if labels is None else torch.as_tensor(labels)
        if tuple(labels.shape) != (len(x),):
            raise ValueError(
                f"labels: expected one for each row of x, shape ({len(x)},); got "
                f"{tuple(labels.shape)}."
            )
        check_labels(labels, self.num_classes, "labels")
        return torch.cat([x, labels.to(x)[:, None]], dim=1)

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The generative process: rows ``x`` to condition on, or ``size`` rows to draw."""
        batch = plate_size(type(self).__name__, x, size, event_shape=(self.x_dim + 1,))
        like = self._like()
        if x is not None and is_validation_enabled():
            check_labels(x[:, -1], self.num_classes, 'Site "x", the last column of argument x')
            self.likelihood.check(x[:, :-1])
        zeros = like.new_zeros(self.z_dim)
        with pyro.plate("data", batch, dim=-1):
            y = pyro.sample("y", dist.Categorical(logits=like.new_zeros(self.num_classes)))
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            label = self._draw_labels(y).to(z) if x is None else x[:, -1]
            pixels = self._pixels(torch.where(label >= 0, label.to(y), y), z)
            return pyro.sample("x", PixelsAndLabel(pixels, label, self.num_classes), obs=x)

    def _draw_labels(self, y: Tensor) -> Tensor:
        """Labels for as many rows as y has, some of them missing."""
        # Evenly spread: known where the running share passes a whole number and a half.
        share = torch.arange(y.shape[-1] + 1, device=y.device) * self.labelled
        known = (share + 0.5).floor().diff() > 0
        return torch.where(known, torch.randint_like(y, self.num_classes), -1)

    def _pixels(self, y: Tensor, z: Tensor) -> Any:
        """p(x | y, z)."""
        shape = torch.broadcast_shapes(y.shape, z.shape[:-1])
        one_hot = nn.functional.one_hot(y.long(), self.num_classes).to(z)
        parts = [part.expand(*shape, part.shape[-1]) for part in (one_hot, z)]
        return self.likelihood.distribution(self.decoder(torch.cat(parts, dim=-1)))

    def decode(self, y: Tensor, z: Tensor) -> Tensor:
        """The mean of the pixels given y and z, ``(*, x_dim)``, without gradient.

        Args:
            y: Classes, ``(*)``.
            z: ``(*, z_dim)``; the leading dimensions are broadcast with those of y.
        """
        with torch.no_grad():
            mean: Tensor = self._pixels(y, z).mean
        return mean

    def __repr__(self) -> str:
        return (
            f"SemisupervisedVAE(x_dim={self.x_dim}, z_dim={self.z_dim}, "
            f"num_classes={self.num_classes}, decoder={self.decoder!r}, "
            f"likelihood={self.likelihood!r})"
        )


def check_labels(labels: Tensor, num_classes: int, name: str) -> None:
    """Refuse labels that are neither a class nor −1.

    Args:
        labels: The labels, as whole numbers of any dtype.
        num_classes: Number of classes.
        name: What the caller calls them.

    Raises:
        ValueError: Naming the first such label and its row.
    """
    good = (labels == labels.floor()) & (labels >= -1) & (labels < num_classes)
    if not bool(good.all()):
        first = int((~good).nonzero()[0])
        raise ValueError(
            f"{name}: expected whole numbers from 0 to {num_classes - 1}, or −1 for a missing "
            f"label; got {float(labels[first]):.6g} in row {first} ({int((~good).sum())} of "
            f"{len(labels)} rows are unfit). Build rows with model.rows(x, labels)."
        )


class PixelsAndLabel(dist.TorchDistribution):
    """Pixels with a label beside them: density of the pixels times probability of the label.

    Args:
        pixels: The distribution of the pixels, event shape ``(x_dim,)``.
        label: −1, or the class that the pixels are of, ``(batch,)`` or more; the last column.
        num_classes: Number of classes, of which each has the same probability.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, pixels: Any, label: Tensor, num_classes: int) -> None:
        shape = torch.broadcast_shapes(pixels.batch_shape, label.shape)
        self.pixels, self.label, self.num_classes = pixels.expand(shape), label, num_classes
        event = torch.Size([pixels.event_shape[0] + 1])
        super().__init__(shape, event, validate_args=False)

    @property
    def support(self) -> Any:
        """The pixels' support, and in the last column the label."""
        return _RowSupport(self.pixels.support, self.label)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PixelsAndLabel:
        """The same rows, more of them."""
        return PixelsAndLabel(self.pixels.expand(batch_shape), self.label, self.num_classes)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of the pixels; the label stays."""
        with torch.no_grad():
            pixels = self.pixels.sample(torch.Size(sample_shape))
            label = self.label.to(pixels).expand(pixels.shape[:-1])
            return torch.cat([pixels, label[..., None]], dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x, label) or log p(x); −inf for another label."""
        out: Tensor = self.pixels.log_prob(value[..., :-1])
        prior = (self.label >= 0).to(out) * -math.log(self.num_classes)
        return (out + prior).masked_fill(value[..., -1] != self.label, -torch.inf)


class _RowSupport(constraints.Constraint):
    event_dim = 1

    def __init__(self, pixels: Any, label: Tensor) -> None:
        self.pixels, self.label = pixels, label

    def check(self, value: Tensor) -> Tensor:
        """Whether pixels and label are possible."""
        good: Tensor = self.pixels.check(value[..., :-1]) & (value[..., -1] == self.label)
        return good
