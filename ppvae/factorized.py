"""Log densities of products of normals or Bernoullis, in fewer passes over memory than torch's.

torch's `Normal.log_prob` goes over the values six times and makes a tensor each time; for thousands
of draws this costs more than the draws themselves.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributions.utils import broadcast_all

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_NORMALS = (dist.Normal, torch.distributions.Normal)
_BERNOULLIS = (dist.Bernoulli, torch.distributions.Bernoulli)
_INDEPENDENTS = (dist.Independent, torch.distributions.Independent)
# torch's norm adds up in single precision one by one: exact enough for so many elements.
_MOST_OF_A_NORM = 1024


def log_prob(fn: Any, value: Tensor) -> Tensor:
    """``fn.log_prob(value)``, without validation.

    Args:
        fn: A distribution. Its class itself must be the one that is known here: a derived one may
            have a density of its own.
        value: Where, with the leading dimensions of draws and rows.

    Returns:
        The log density, equal to ``fn.log_prob(value)`` but for rounding.

    Example:
        >>> import pyro.distributions as dist
        >>> log_prob(dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.zeros(3, 2)).shape
        torch.Size([3])
    """
    if _transformed():
        return torch.as_tensor(fn.log_prob(value))
    base, event_dims = fn, 0
    while type(base) in _INDEPENDENTS:
        event_dims += base.reinterpreted_batch_ndims
        base = base.base_dist
    if type(base) in _NORMALS:
        return _normal(base, value, event_dims)
    if type(base) in _BERNOULLIS and event_dims:
        logits, value = broadcast_all(base.logits, value)
        return -_sum(
            F.binary_cross_entropy_with_logits(logits, value, reduction="none"), event_dims
        )
    return torch.as_tensor(fn.log_prob(value))


def _normal(fn: Any, value: Tensor, event_dims: int) -> Tensor:
    shape = value.shape
    if shape[-fn.loc.dim() :] != fn.loc.shape:
        shape = torch.broadcast_shapes(shape, fn.loc.shape)
    loc, scale = _shrunk(fn.loc), _shrunk(fn.scale)
    log_scale = torch.log(scale)
    apart = value - loc
    if event_dims == 0:
        return (-0.5 * (apart / scale).square() - log_scale - _HALF_LOG_2PI).expand(shape)
    # Along the event there is one term for each element, along draws and rows one for all.
    event = shape[len(shape) - event_dims :]
    log_scale = log_scale.expand(*log_scale.shape[: log_scale.dim() - event_dims], *event)
    if torch.is_grad_enabled() or apart.shape != shape or not apart.is_floating_point():
        squares = _sum((apart / scale).square().expand(shape), event_dims)
    elif event.numel() > _MOST_OF_A_NORM:
        squares = _sum(apart.div_(scale).square_(), event_dims)
    else:
        # In place, and squared and summed in one pass: a third of the time.
        dims = tuple(range(-event_dims, 0))
        squares = torch.linalg.vector_norm(apart.div_(scale), dim=dims).square_()
    return -0.5 * squares - (_sum(log_scale, event_dims) + event.numel() * _HALF_LOG_2PI)


def _sum(values: Tensor, event_dims: int) -> Tensor:
    return values.sum(dim=tuple(range(-event_dims, 0)))


def _shrunk(parameter: Tensor) -> Tensor:
    """One element along dimensions that the parameter was only expanded to.

    Not of one that is differentiated, whose elements may each have a derivative.
    """
    if torch.is_grad_enabled() and parameter.requires_grad:
        return parameter
    for dim, stride in enumerate(parameter.stride()):
        if stride == 0 and parameter.shape[dim] > 1:
            parameter = parameter.narrow(dim, 0, 1)
    return parameter


def _transformed() -> bool:
    """Whether forward-mode differentiation or a transform of `torch.func` is at work."""
    interpreters = torch._C._functorch.peek_interpreter_stack()
    return interpreters is not None or forward_ad._current_level >= 0
