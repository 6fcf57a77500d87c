"""Operations that torch's compiler calls as they are, and does not look into.

Its own version of some is another one: it draws Bernoulli variables from uniform ones, which is
another stream of random numbers than torch's, and takes oneDNN's products for constant weights
alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.library import Library

_library = Library("ppvae", "DEF")
_library.define("onednn_product(Tensor left, Tensor right, Tensor? bias) -> Tensor")
_library.define("bernoulli(Tensor probs) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def _onednn_product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
    return out


def _bernoulli(probs: Tensor) -> Tensor:
    return torch.bernoulli(probs)


_library.impl("onednn_product", _onednn_product, "CompositeExplicitAutograd")
_library.impl("bernoulli", _bernoulli, "CompositeExplicitAutograd")


@torch.library.register_fake("ppvae::onednn_product", lib=_library)
def _(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


@torch.library.register_fake("ppvae::bernoulli", lib=_library)
def _(probs: Tensor) -> Tensor:
    return torch.empty_like(probs)


def keep_draws(graph: fx.Graph) -> None:
    """Let the compiler leave draws alone that it would make of other random numbers."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.bernoulli.default:
            if node.kwargs:
                continue  # A generator of the program's own.
            node.target = torch.ops.ppvae.bernoulli.default
