r"""Normalizing flows: the one place in which zuko is used.

An autoregressive map moves element i by a shift and a scale that networks make from the elements
before it,

.. math:: y_i = x_i \, e^{s_i(x_{<i})} + t_i(x_{<i}),

so that :math:`y` is had from :math:`x` in one pass, and :math:`x` from :math:`y` in as many passes
as there are elements. A `FlowTransform` uses the quick direction for drawing (the inverse
autoregressive flow of Kingma et al. 2016) or for scoring (the masked autoregressive flow of
Papamakarios, Pavlakou & Murray 2017); the other direction is exact too.

Importing zuko turns off torch's validation of distributions for the whole process. Here it is
imported when the first flow is built or unpickled, and the settings are put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints


def _zuko_flows() -> Any:
    """``zuko.flows``, with torch's and Pyro's validation as they were."""
    settings = pyro.settings.get()
    validation = {name: on for name, on in settings.items() if name.startswith("validate_")}
    with pyro.settings.context(**validation):
        import zuko.flows
    return zuko.flows


class _Imported:
    """Unpickling this imports zuko, before the pickled layers behind it would on their own."""

    def __reduce__(self) -> Any:
        return _zuko_flows, ()


def check_flow(kind: str, size: int, transforms: int, hidden: Sequence[int], instead: str) -> None:
    """Refuse the sizes of which no flow can be made.

    Args:
        kind: What is built, for messages.
        size: Number of elements.
        transforms: Number of autoregressive layers.
        hidden: Widths of their networks.
        instead: What serves one element.

    Raises:
        ValueError: If there is nothing to mix, or a count is not positive.
    """
    if size < 2:
        raise ValueError(
            f"{kind}: a flow mixes the elements of a latent, so it needs at least 2 of them; got "
            f"{size}. For one element use {instead}."
        )
    if transforms < 1:
        raise ValueError(f"{kind}: transforms must be at least 1; got {transforms}.")
    if not hidden or min(hidden) < 1:
        raise ValueError(
            f"{kind}: hidden holds the widths of the hidden layers, at least one, all positive; "
            f"got {tuple(hidden)}."
        )


class Autoregressive(nn.Module):
    """Autoregressive layers one after the other, with the order of the elements reversed each time.

    Built by zuko. A new one is near the identity, and not equal to it.

    Args:
        size: Number of elements, at least 2.
        transforms: Number of layers.
        hidden: Widths of the hidden layers of each layer's network.
        context: Number of further inputs of the networks.

    Example:
        >>> import torch
        >>> flow = Autoregressive(3, 2, (16,))
        >>> flow
        Autoregressive(3 elements, 2 transforms of hidden (16,))
        >>> z, log_det = flow(torch.zeros(5, 3))
        >>> torch.allclose(flow.inverse(z)[0], torch.zeros(5, 3), atol=1e-5)
        True
    """

    def __init__(self, size: int, transforms: int, hidden: Sequence[int], context: int = 0) -> None:
        super().__init__()
        check_flow("Autoregressive", size, transforms, hidden, "a map of your own")
        self.size, self.hidden, self.context = size, tuple(hidden), context
        kind = _zuko_flows().MaskedAutoregressiveTransform
        forwards = torch.arange(size)
        self.layers = nn.ModuleList(
            kind(
                size,
                context,
                order=forwards if number % 2 == 0 else forwards.flip(0),
                hidden_features=self.hidden,
                # Smooth: densities are integrated, and their curvature is used.
                activation=nn.SiLU,
            )
            for number in range(transforms)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"_imported": _Imported(), **self.__dict__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rest = {key: value for key, value in state.items() if key != "_imported"}
        super().__setstate__(rest)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y and the log determinant of its derivative, in one pass.

        Args:
            x: ``(*batch, size)``.
            context: ``(*batch, context)``, where the flow was built with one.
        """
        total = x.new_zeros(())
        for layer in self.layers:
            x, log_det = layer(context).call_and_ladj(x)
            total = total + log_det
        return x, total

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, and the log determinant of y's derivative there: a pass for each element."""
        total = y.new_zeros(())
        for layer in reversed(self.layers):
            x = layer(context).inv(y)
            total = total + layer(context).log_abs_det_jacobian(x, y)
            y = x
        return y, total

    def __repr__(self) -> str:
        more = f", context of {self.context}" if self.context else ""
        return (
            f"Autoregressive({self.size} elements, {len(self.layers)} transforms of hidden "
            f"{self.hidden}{more})"
        )


class FlowTransform(TransformModule):
    r"""A flow as torch's transform from u to z, which remembers the last pair.

    Args:
        flow: The layers. They are not copied: their weights can be trained through this.
        context: Further inputs of the networks, ``(*batch, context)``.
        scores_fast: Whether the quick direction is that from z to u; if not, it is u to z.
        cache_size: 1 to remember the last pair, 0 not to.

    Example:
        >>> import torch
        >>> import pyro.distributions as dist
        >>> transform = FlowTransform(Autoregressive(2, 2, (16,)))
        >>> normal = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        >>> flow = dist.TransformedDistribution(normal, [transform])
        >>> flow.log_prob(flow.rsample((7,))).shape
        torch.Size([7])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(
        self,
        flow: Autoregressive,
        context: Tensor | None = None,
        *,
        scores_fast: bool = False,
        cache_size: int = 1,
    ) -> None:
        super().__init__(cache_size=cache_size)
        self.flow, self.context, self.scores_fast = flow, context, scores_fast
        self._cached_log_det: Tensor | None = None

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """The same transform, with a memory of its own."""
        if cache_size == self._cache_size:
            return self
        return FlowTransform(
            self.flow, self.context, scores_fast=self.scores_fast, cache_size=cache_size
        )

    def _inv_call(self, z: Tensor) -> Tensor:
        if torch.is_grad_enabled() and z.grad_fn is None:
            # A draw without a graph, which may have been told since to take a gradient: that of
            # the u behind it, which hangs on z, weights and context, has to be made.
            self._cached_x_y = None, None
        u: Tensor = super()._inv_call(z)
        return u

    def _call(self, u: Tensor) -> Tensor:
        z: Tensor
        if self.scores_fast:
            z, log_det = self.flow.inverse(u, self.context)
            self._cached_log_det = -log_det
        else:
            z, self._cached_log_det = self.flow(u, self.context)
        return z

    def _inverse(self, z: Tensor) -> Tensor:
        u: Tensor
        if self.scores_fast:
            u, log_det = self.flow(z, self.context)
            self._cached_log_det = -log_det
        else:
            u, self._cached_log_det = self.flow.inverse(z, self.context)
        return u

    def log_abs_det_jacobian(self, u: Tensor, z: Tensor) -> Tensor:
        """Log determinant of dz/du, ``(*batch,)``."""
        known_u, known_z = self._cached_x_y
        if self._cached_log_det is not None and u is known_u and z is known_z:
            return self._cached_log_det
        log_det: Tensor
        if self.scores_fast:
            return -self.flow(z, self.context)[1]
        log_det = self.flow(u, self.context)[1]
        return log_det
