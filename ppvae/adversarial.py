"""Training an implicit model against a discriminator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppvae.descent import Player, check_training, descend, trained
from ppvae.isolation import check_rows
from ppvae.models import ImplicitModel

# The usual setting of Adam in a game (Radford, Metz & Chintala 2016): little momentum.
_BETAS = (0.5, 0.999)


@dataclass(frozen=True)
class AdversarialFit:
    """What an adversarial training run did.

    Neither loss says how good the model is: each is measured against an opponent that moves. Where
    the discriminator can tell nothing apart they are 2 log 2 and log 2; but so they are where the
    discriminator is too weak to see a difference.

    Attributes:
        generator_losses: ``(steps,)``, in nats per drawn row.
        discriminator_losses: ``(steps,)``, in nats per pair of a datum and a drawn row.
        seconds: Wall time.
        status: What happened, in words.
        completed: Whether all steps were taken with finite losses.
        steps: Number of steps taken.
        batch_size: Rows per step.
    """

    generator_losses: Tensor
    discriminator_losses: Tensor
    seconds: float
    status: str
    completed: bool
    steps: int
    batch_size: int

    def __repr__(self) -> str:
        tail = max(1, self.steps // 10)
        parts = [
            f"{float(losses[-tail:].mean()):.4f}" if len(losses) else "none"
            for losses in (self.generator_losses, self.discriminator_losses)
        ]
        return (
            f"AdversarialFit({self.status}; over the last tenth the generator's loss {parts[0]}, "
            f"the discriminator's {parts[1]} (log 2 and 2 log 2 where it is deceived), "
            f"{self.seconds:.1f} s)"
        )


def fit_adversarial(
    model: ImplicitModel,
    discriminator: nn.Module,
    x: Tensor,
    *,
    steps: int = 2000,
    batch_size: int = 128,
    lr: float = 2e-4,
    discriminator_lr: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> AdversarialFit:
    r"""Train a generator to draw rows that a discriminator takes for data.

    With the discriminator's output a logit, :math:`D = \sigma(d)`, each step lowers

    .. math::
        L_D = -\mathrm{E}_x \log D(x) - \mathrm{E}_z \log(1 - D(G(z))), \qquad
        L_G = -\mathrm{E}_z \log D(G(z)),

    first in D, then in G with the new D and fresh draws: the non-saturating game of Goodfellow
    et al. (2014). For a given G the best D has :math:`L_D = 2 \log 2 - 2\, \mathrm{JSD}(p_x, p_G)`
    (theorem 1 there), so that :math:`2 \log 2 - L_D` bounds twice the Jensen-Shannon divergence
    from below, up to the noise of a minibatch. :math:`L_G` is no divergence. The run may circle
    or collapse onto few modes with losses that look as they should: look at draws.

    Args:
        model: The implicit model, trained in place.
        discriminator: From rows ``(batch, x_dim)`` to logits ``(batch,)`` or ``(batch, 1)``;
            trained in place.
        x: Rows, ``(num_data, x_dim)``.
        steps: Number of steps, each one of D and one of G.
        batch_size: Rows per step, and draws; at most all rows.
        lr: Learning rate of the generator's Adam (β = 0.5, 0.999).
        discriminator_lr: That of the discriminator's own; ``lr`` if left out.
        seed: Seed of the order of the rows and of the draws; the caller's generators are left as
            they were.
        progress: Whether to show a progress bar, on a terminal or in a notebook.

    Returns:
        The record of the run, with both losses. A loss that is no longer finite, or an interrupt
        from the keyboard, ends it early with the last good parameters kept.

    Raises:
        ValueError: If the rows are unfit or of another size than the model's, the discriminator
            has another output, a number is out of range, the model is no `ImplicitModel`, or one
            of both has nothing to train.

    Example:
        >>> import torch
        >>> from ppvae.nn import MLP
        >>> model = ImplicitModel(MLP(1, [], 2), z_dim=1, x_dim=2)
        >>> run = fit_adversarial(
        ...     model, MLP(2, [8], 1), torch.randn(40, 2), steps=5, progress=False
        ... )
        >>> run.status, run.generator_losses.shape
        ('completed 5 steps', torch.Size([5]))
    """
    if not isinstance(model, ImplicitModel):
        raise ValueError(
            f"model: expected a ppvae.models.ImplicitModel; got {type(model).__name__}. A model "
            f"with a density is trained by ppvae.fit."
        )
    rate = lr if discriminator_lr is None else discriminator_lr
    check_training(steps, batch_size, lr=lr, discriminator_lr=rate)
    check_rows(x, model, discriminator)
    if tuple(x.shape[1:]) != (model.x_dim,):
        raise ValueError(
            f"x: expected rows of shape (num_data, {model.x_dim}), those of the model; got "
            f"{tuple(x.shape)}."
        )
    ours, theirs = trained(model, "model"), trained(discriminator, "discriminator")

    def draw(rows: Tensor) -> Tensor:
        z = torch.randn(len(rows), model.z_dim).to(rows)
        out: Tensor = model.generator(z)
        return out

    def logits(rows: Tensor) -> Tensor:
        out: Tensor = discriminator(rows)
        if tuple(out.shape) not in ((len(rows),), (len(rows), 1)):
            raise ValueError(
                f"discriminator: expected a logit for each row, shape ({len(rows)},) or "
                f"({len(rows)}, 1); got {tuple(out.shape)}."
            )
        return out

    def discriminator_loss(rows: Tensor) -> Tensor:
        with torch.no_grad():
            drawn = draw(rows)
        return softplus(-logits(rows)).mean() + softplus(logits(drawn)).mean()

    def generator_loss(rows: Tensor) -> Tensor:
        return softplus(-logits(draw(rows))).mean()

    run = descend(
        [
            Player(discriminator_loss, theirs, torch.optim.Adam(theirs, lr=rate, betas=_BETAS)),
            Player(generator_loss, ours, torch.optim.Adam(ours, lr=lr, betas=_BETAS)),
        ],
        [model, discriminator],
        x,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        name="fit_adversarial",
    )
    return AdversarialFit(
        generator_losses=run.losses[:, 1],
        discriminator_losses=run.losses[:, 0],
        seconds=run.seconds,
        status=run.status,
        completed=run.completed,
        steps=len(run.losses),
        batch_size=run.batch_size,
    )
