"""Training an autoencoder: a loss of reconstruction, without a latent variable."""

from __future__ import annotations

import torch
from torch import Tensor

from ppvae.descent import Player, check_training, descend, trained
from ppvae.isolation import check_rows
from ppvae.models import Autoencoder
from ppvae.training import Fit


def fit_autoencoder(
    model: Autoencoder,
    x: Tensor,
    *,
    steps: int = 2000,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> Fit:
    r"""Train an autoencoder by Adam on minibatches.

    .. math:: -\frac1B \sum_{n} \log p(x_n \mid d(e(x_n)))

    The loss is in nats per datum, but it is minus a log likelihood of rows given codes that saw
    them: no evidence and no bound, and not to be set beside a VAE's ELBO.

    Args:
        model: The autoencoder, trained in place.
        x: Rows, ``(num_data, x_dim)``.
        steps: Number of steps.
        batch_size: Rows per step; at most all of them.
        lr: Adam's learning rate.
        seed: Seed of the order of the rows; the caller's generators are left as they were.
        progress: Whether to show a progress bar, on a terminal or in a notebook.

    Returns:
        The record of the run. A loss that is no longer finite, or an interrupt from the
        keyboard, ends it early with the last good parameters kept, and ``status`` says so.

    Raises:
        ValueError: If the rows are unfit or outside of the likelihood's support, a number is out
            of range, the model is no `Autoencoder`, or it has nothing to train.

    Example:
        >>> import torch
        >>> from ppvae.likelihoods import Gaussian
        >>> from ppvae.nn import MLP
        >>> model = Autoencoder(MLP(3, [], 1), MLP(1, [], 3), Gaussian())
        >>> fit_autoencoder(model, torch.randn(50, 3), steps=20, progress=False).status
        'completed 20 steps'
    """
    if not isinstance(model, Autoencoder):
        raise ValueError(
            f"model: expected a ppvae.models.Autoencoder; got {type(model).__name__}. "
            f"ppvae.fit trains a model and its guide."
        )
    check_training(steps, batch_size, lr=lr)
    check_rows(x, model)
    model.likelihood.check(x)
    params = trained(model, "model")
    player = Player(
        lambda rows: -model.log_likelihood(rows).mean(), params, torch.optim.Adam(params, lr=lr)
    )
    run = descend(
        [player],
        [model],
        x,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        name="fit_autoencoder",
    )
    return Fit(
        losses=run.losses[:, 0],
        elapsed=run.elapsed,
        seconds=run.seconds,
        status=run.status,
        completed=run.completed,
        steps=len(run.losses),
        batch_size=run.batch_size,
    )
