"""An objective's loss and gradients as a function that can be captured."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.util
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ppvae.isolation import unvalidated

Gradients = list[Tensor | None]


def loss_and_gradients(
    loss_and_grads: Callable[..., Any],
    params: Sequence[Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[list[Tensor], Gradients]:
    """What ``loss_and_grads`` returns, and the gradients that it adds to those of the parameters.

    Nothing is added to ``grad``: the calls of ``backward`` are kept, and answered here.

    Args:
        loss_and_grads: The method of a Pyro ELBO.
        params: Leaves.
        args: Its arguments, with model and guide.
        kwargs: Its named arguments.

    Returns:
        The losses (one, but for wake-sleep), and a gradient for each parameter, `None` where it
        has none.
    """
    with _Roots() as roots:
        out = loss_and_grads(*args, **kwargs)
    losses = as_losses(out, params)
    total: Gradients = [None] * len(params)
    for at, root in enumerate(roots.found):
        found = torch.autograd.grad(
            root, list(params), allow_unused=True, retain_graph=at + 1 < len(roots.found)
        )
        total = [
            b if a is None else a if b is None else a + b for a, b in zip(total, found, strict=True)
        ]
    return losses, total


def as_losses(out: Any, params: Sequence[Tensor]) -> list[Tensor]:
    """What an ELBO of Pyro's returns, a number or two, as tensors of the precision of the pair."""
    kinds = [param.dtype for param in params if param.is_floating_point()]
    kind = functools.reduce(torch.promote_types, kinds) if kinds else None
    return [
        v.detach() if isinstance(v, Tensor) else torch.tensor(v, dtype=kind)
        for v in (out if isinstance(out, tuple) else (out,))
    ]


class _Roots(TorchFunctionMode):
    """Keeps the tensors that ``backward`` is called of."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            if len(args) > 1 and args[1] is not None:
                raise NotImplementedError("a loss that is no scalar")
            self.found.append(args[0])
            return None
        return func(*args, **(kwargs or {}))


@contextmanager
def capturable() -> Iterator[None]:
    """Let Pyro run without looking at values: no validation, no warnings of NaN.

    The parameter store keeps what it has: a parameter that is made while a graph is captured
    would be a proxy.
    """
    store = pyro.get_param_store()
    before = store.get_state()
    known = set(before["params"])
    looks = pyro.util.torch_isnan
    # A copy of a distribution, such as `expand` makes, takes torch's default for its own: off, and
    # still not the `False` of a model that says so.
    with unvalidated(), pyro.settings.context(validate_distributions_torch=0):
        pyro.util.torch_isnan = _is_nan
        try:
            yield
        finally:
            pyro.util.torch_isnan = looks
            if set(store.keys()) != known:
                store.set_state(before)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


class Supported(Messenger):
    """Collects whether observed values lie where their distributions allow them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if not msg["is_observed"] or not isinstance(fn, TorchDistributionMixin):
            return
        part: Any = fn
        while part is not None:
            if vars(part).get("_validate_args") is False:
                return  # The model says so, as one does that scores grey pixels as Bernoulli.
            part = getattr(part, "base_dist", None)
        try:
            inside = fn.support.check(msg["value"])
        except (NotImplementedError, AttributeError):
            return
        if isinstance(msg["mask"], Tensor):
            inside = inside | ~msg["mask"]
        elif msg["mask"] is False:
            return
        self.found.append(inside.all())

    def all(self) -> Tensor | None:
        """Whether all are; `None` where nothing was observed that can be judged."""
        out = None
        for each in self.found:
            out = each if out is None else out & each.to(out.device)
        return out
