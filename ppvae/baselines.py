r"""Baselines: a prediction of the learning signal, which score-function gradients subtract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Baseline(nn.Module):
    r"""A network that predicts from x the learning signal of each latent site.

    The score-function gradient of a site's parameters is :math:`\nabla \log q(z \mid x)` times the
    site's learning signal: the terms of :math:`\log p(x, z) - \log q(z \mid x)` that the site has
    a part in. As :math:`E_q[\nabla \log q] = 0`, a number that hangs on x alone may be subtracted
    from the signal. The gradient stays unbiased, and has less noise the better the number
    predicts the signal (Mnih & Gregor 2014, sec. 2.3):

    .. math:: b_s(x) = c_s (\mathrm{NN}(x)_s - 1)

    Give it to `ppvae.guides.Amortized`, which hands it to `TraceGraph_ELBO` with each draw; that
    loss trains it, by least squares, with everything else. Other losses do not use it. It is
    stateless: Pyro's decaying average keeps an average for each place of a minibatch in the
    parameter store, under the site's name; here the centre is the network's business, and the
    units :math:`c_s` let Adam's steps of a fixed size reach it.

    Args:
        network: From rows ``(batch, *event)`` to ``(batch, number of sites)``; rows that are
            scalars reach it as ``(batch, 1)``.
        nats: By site :math:`c_s`, about how far below zero the learning signal starts: of
            binary rows that start as fair coins the number of their elements times log 2.

    Raises:
        ValueError: If a value of ``nats`` is not positive; on a call whose network's output is
            not ``(batch, number of sites)``.

    Example:
        >>> from ppvae.nn import MLP
        >>> Baseline(MLP(64, [32], 1), {"z": 44.0})(torch.zeros(5, 64)).shape
        torch.Size([5, 1])
    """

    units: Tensor

    def __init__(self, network: nn.Module, nats: Mapping[str, float]) -> None:
        super().__init__()
        wrong = {site: value for site, value in nats.items() if not value > 0}
        if wrong or not nats:
            raise ValueError(
                f"nats: expected a positive number for each latent site; got {dict(nats)}."
            )
        self.network = network
        self.sites = tuple(nats)
        self.register_buffer("units", torch.tensor([float(value) for value in nats.values()]))

    def forward(self, x: Tensor) -> Tensor:
        """Predictions in nats, ``(batch, number of sites)``."""
        out: Tensor = self.network(x[:, None] if x.dim() == 1 else x)
        expected = (x.shape[0], len(self.sites))
        if tuple(out.shape) != expected:
            raise ValueError(
                f"network: expected outputs of shape {expected} for the sites {list(self.sites)}; "
                f"got {tuple(out.shape)}. Give it {expected[1]} outputs."
            )
        return self.units * (out - 1)

    def infer(
        self, site: str, event_dim: int, x: Tensor, values: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """What Pyro is to be told of a site: the argument ``infer`` of `pyro.sample`.

        Args:
            site: The latent site.
            event_dim: Number of dimensions of its value for one datum.
            x: The rows.
            values: Where the draw of the site will be found once it is made: the baseline is
                evaluated later, by the loss, and must have the shape of the draw's density.
        """

        def predict(rows: Tensor) -> Tensor:
            # Pyro drops leading dimensions of size 1 from the learning signal.
            value = values[site]
            shape = list(value.shape[: value.dim() - event_dim])
            while shape and shape[0] == 1:
                del shape[0]
            column = self(rows)[:, self.sites.index(site)]
            return column.expand(shape) if shape else column[0]

        return {"baseline": {"nn_baseline": predict, "nn_baseline_input": x}}

    def __repr__(self) -> str:
        units = ", ".join(
            f"{s}: {float(c):.4g}" for s, c in zip(self.sites, self.units, strict=True)
        )
        return f"Baseline({self.network!r}, nats={{{units}}})"
