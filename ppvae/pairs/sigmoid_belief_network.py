"""Networks of binary units."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ppvae.baselines import Baseline
from ppvae.families import Bernoulli
from ppvae.guides import Amortized
from ppvae.models import SigmoidBeliefNetwork
from ppvae.nn import MLP
from ppvae.pairs.building import amortized


def sigmoid_belief_network(
    x_dim: int = 64,
    z_dims: Sequence[int] = (8,),
    hidden: Sequence[int] = (100,),
    *,
    baseline: Sequence[int] | None = None,
) -> tuple[SigmoidBeliefNetwork, Amortized]:
    r"""A sigmoid belief network, with an encoder that puts out the logits of all layers.

    .. math:: q(z_1, \dots, z_L \mid x) = \prod_l \mathrm{Bernoulli}(z_l; \sigma(\lambda_l(x)))

    Given x the layers are independent, so that a row can be freed from the encoder. (The encoder
    of Mnih & Gregor (2014) is a chain, :math:`q(z_1 \mid x)\, q(z_2 \mid z_1)`.) Draws are not
    reparameterised: train with `TraceGraph_ELBO` and a baseline, or where a layer has a few units
    exactly, with ``TraceEnum_ELBO(max_plate_nesting=1)`` on ``config_enumerate(guide)``.

    Args:
        x_dim: Size of a row.
        z_dims: Widths of the layers, from the one next to x upwards.
        hidden: Widths of the encoder's hidden layers.
        baseline: Widths of the hidden layers of a network that predicts each layer's learning
            signal from x, which `TraceGraph_ELBO` subtracts and trains; no baseline if left out.

    Raises:
        ValueError: If a width is below 1 or there is no layer.

    Example:
        >>> model, guide = sigmoid_belief_network(x_dim=9, z_dims=[3, 2], hidden=[16])
        >>> guide
        Amortized({'z_2': Bernoulli(2), 'z_1': Bernoulli(3)}, MLP(9 -> 16 -> 5, ELU))
    """
    model = SigmoidBeliefNetwork(x_dim, z_dims)
    # In the model's order, from the top down.
    layers = list(zip(model.sites, model.z_dims, strict=True))[::-1]
    families = {site: Bernoulli(width) for site, width in layers}
    encoder = MLP(x_dim, hidden, sum(model.z_dims))
    subtracted = None
    if baseline is not None:
        # What a layer has a part in is the layer below it, which starts as fair coins or nearly so.
        below = (x_dim, *model.z_dims[:-1])
        nats = {site: width * math.log(2) for site, width in zip(model.sites, below, strict=True)}
        subtracted = Baseline(MLP(x_dim, baseline, len(nats)), nats)
    return model, amortized(model, families, encoder, subtracted)
