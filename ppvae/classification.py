"""Classes of rows: an encoder that reads labels where there are any, and what it predicts."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from ppvae.density import Program, judging
from ppvae.guides import PerDatapoint
from ppvae.isolation import check_rows
from ppvae.models.semisupervised_vae import check_labels


class SemisupervisedEncoder(nn.Module):
    r"""From rows with labels to λ of ``Categorical(K)`` and ``Given("y", K, family)``.

    Without a label, the logits of y are the classifier's and each class k has the encoder's
    parameters of z for (x, k). With the label c, y has its prior, logits 0, and all classes have
    the parameters for (x, c): the latent y of such a row is a class that nothing hangs on, and
    costs 0 nats.

    Args:
        classifier: From pixels ``(batch, x_dim)`` to logits ``(batch, K)``.
        encoder: From pixels to the parameters of z for every class, ``(batch, K, num_params)``.

    Shapes:
        Rows ``(batch, x_dim + 1)`` to ``(batch, K + K · num_params)``.

    Raises:
        ValueError: If a label is no class and not −1, or the outputs do not fit together.

    Example:
        >>> import torch
        >>> from ppvae.nn import MLP, MLPByClass
        >>> encoder = SemisupervisedEncoder(MLP(6, [], 3), MLPByClass(6, 3, [8], 4))
        >>> encoder(torch.zeros(5, 7)).shape
        torch.Size([5, 15])
    """

    def __init__(self, classifier: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.classifier, self.encoder = classifier, encoder

    def forward(self, x: Tensor) -> Tensor:
        """λ of y and then of z given each class."""
        pixels, label = x[:, :-1], x[:, -1]
        logits, params = self.classifier(pixels), self.encoder(pixels)
        if params.dim() != 3 or params.shape[:2] != logits.shape:
            raise ValueError(
                f"encoder: expected parameters of z for every class, shape "
                f"({', '.join(map(str, logits.shape))}, num_params); got {tuple(params.shape)}."
            )
        if is_validation_enabled():
            check_labels(label, logits.shape[1], "The last column of argument x")
        labelled = (label >= 0)[:, None]
        index = label.clamp(min=0).long()[:, None, None].expand(-1, 1, params.shape[2])
        params = torch.where(labelled[..., None], params.gather(1, index), params)
        logits = torch.where(labelled, torch.zeros_like(logits), logits)
        return torch.cat([logits, params.flatten(1)], dim=1)

    def __repr__(self) -> str:
        return f"SemisupervisedEncoder({self.classifier!r}, {self.encoder!r})"


def classify(guide: Program, x: Tensor, *, site: str = "y") -> Tensor:
    """Class probabilities q(y | x) by the guide's classifier, whatever the labels say.

    Args:
        guide: A guide with a categorical site for the class, called as ``guide(x)``.
        x: Rows, ``(batch, x_dim + 1)``; their last column is not used.
        site: Name of the categorical site.

    Returns:
        ``(batch, num_classes)``, without gradient.

    Raises:
        ValueError: If the guide has no such site, or is a `PerDatapoint`, which keeps no
            classifier for labelled rows.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> model, guide = pairs.semisupervised_vae(x_dim=6, num_classes=3)
        >>> classify(guide, model.rows(torch.ones(4, 6))).shape
        torch.Size([4, 3])
    """
    check_rows(x, guide)
    with judging(0, x, guide), torch.no_grad():
        probs: Tensor = class_site(guide, x, site)["fn"].probs
    return probs


def class_site(guide: Program, x: Tensor, site: str) -> Any:
    """Pyro's record of the guide's categorical site for these rows, their labels left out."""
    if isinstance(guide, PerDatapoint) and bool((x[:, -1] >= 0).any()):
        raise ValueError(
            f"guide: a {type(guide).__name__} has a row of parameters for each datum and no "
            f"classifier; for labelled rows it knows the prior of site {site!r} alone. Pass the "
            f"guide with the encoder, or rows without labels."
        )
    missing = torch.cat([x[:, :-1], torch.full_like(x[:, -1:], -1)], dim=1)
    found = poutine.trace(guide).get_trace(missing).nodes.get(site)
    if found is None or not hasattr(found["fn"], "logits") or found["fn"].event_shape:
        raise ValueError(
            f"guide: expected a categorical site {site!r} for the class; got "
            f"{'no such site' if found is None else found['fn']}."
        )
    return found
