"""How models take parameters that may be given: learned ones, and given ones that are held."""

from __future__ import annotations

from typing import Any

from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

_WANTED = {
    constraints.positive: "positive values",
    constraints.lower_cholesky: "lower triangular matrices with a positive diagonal",
}


def set_parameter(
    module: PyroModule, name: str, given: Tensor | None, start: Tensor, constraint: Any = None
) -> None:
    """Give a module a parameter: learned from ``start``, or ``given`` and held fixed.

    Args:
        module: The module.
        name: The attribute's name.
        given: The value to hold, `None` for a learned parameter.
        start: Where a learned one starts; a given one must have its shape.
        constraint: Torch's positive or lower_cholesky, `None` for real parameters.

    Raises:
        ValueError: If the given value has another shape, or lies outside of the constraint.
    """
    if given is not None and tuple(given.shape) != tuple(start.shape):
        raise ValueError(f"{name}: expected shape {tuple(start.shape)}; got {tuple(given.shape)}.")
    value = start if given is None else given.detach().clone()
    if constraint is None:
        setattr(module, name, nn.Parameter(value, requires_grad=given is None))
        return
    if not bool(constraint.check(value).all()):
        raise ValueError(f"{name}: expected {_WANTED[constraint]}; got {value.tolist()}.")
    setattr(module, name, PyroParam(value, constraint))
    getattr(module, f"{name}_unconstrained").requires_grad_(given is None)
