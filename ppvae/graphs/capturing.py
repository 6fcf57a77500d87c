"""From a Python function of tensors to a graph of torch operations.

The function runs under proxy tensors that hold no data, so that nothing is computed, drawn or
changed while it is captured, and whatever asks for a value is found out. It may call
``torch.autograd.grad``, and may change tensors that it did not create in place: the graph does
the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode


class NotCapturableError(Exception):
    """A function whose run does not consist of the same torch operations each time."""


@dataclass(frozen=True)
class Graph:
    """A function of tensors as a graph.

    Attributes:
        module: Called as ``module(*inputs, *held)``; returns a tuple of tensors.
        held: The tensors that the function used and was not given: parameters, buffers, constants.
            They are read at each call, so that changes in place are seen.
        num_inputs: How many inputs come before them.
        fresh: Which of ``held`` the function makes anew, the same at each call: its constants.
    """

    module: fx.GraphModule
    held: tuple[Tensor, ...]
    num_inputs: int
    fresh: tuple[bool, ...]

    @property
    def num_nodes(self) -> int:
        """How many operations it has."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)


class _State:
    active = False
    # Seconds that graphs would have saved in this process so far; None once the tools are loaded.
    forgone: float | None = 0.0


# What a capture takes, and the first one in a process, for which much of torch has to be loaded.
_CAPTURE_SECONDS, _LOADING_SECONDS = 0.2, 1.5


def capture_pays(coming: float, each: float) -> bool:
    """Whether to capture a function now, where it is not known who else will ask in this process.

    For the first capture, what has been lost by waiting counts as if it were to come again.

    Args:
        coming: Seconds that the graph is expected to save.
        each: Seconds that it would have saved at this call.
    """
    if _State.forgone is None:
        return coming > _CAPTURE_SECONDS
    _State.forgone += each
    return coming > _CAPTURE_SECONDS and coming + _State.forgone > _LOADING_SECONDS


def capturing() -> bool:
    """Whether a function is being captured: checks of values are then for others to make."""
    return _State.active


def capture(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Graph:
    """The graph of a function, at inputs of these shapes.

    The function is captured twice; what differs between the two, such as a number drawn by
    Python's `random`, would be frozen in the graph, and is refused.

    Args:
        function: From tensors to a sequence of tensors.
        inputs: Tensors of the shapes, strides, dtypes and devices that it will be called with.

    Raises:
        NotCapturableError: If its operations depend on the values of tensors, or on what is not a
            tensor and changes from call to call.
    """
    state = _python_random()
    one = _lifted(_traced(function, inputs), len(inputs))
    if _python_random() != state:
        raise NotCapturableError(
            "it draws from the random generators of Python or NumPy, whose draws a graph would "
            "freeze: draw with torch"
        )
    other = _lifted(_traced(function, inputs), len(inputs))
    if one.module.code != other.module.code:
        raise NotCapturableError("two runs of it consist of different operations")
    if not all(_same(a, b) for a, b in zip(one.held, other.held, strict=True)):
        raise NotCapturableError(
            "it uses tensors made outside of torch that differ from run to run"
        )
    fresh = tuple(a is not b for a, b in zip(one.held, other.held, strict=True))
    return replace(one, fresh=fresh)


def _python_random() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), kind, np.asarray(keys).tobytes(), *rest


def _same(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False  # Such as one without data, that the first capture has left behind.
    alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return alike and torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def _traced(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    if _State.active:
        raise NotCapturableError("it captures a function itself")

    def plain(*own: Tensor) -> Sequence[Tensor]:  # Of a method torch would count `self` too.
        return function(*own)

    _State.active = True
    values = _Values()
    try:
        with values, _quiet():
            return make_fx(plain, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    except NotCapturableError:
        raise
    except Exception as error:
        # Torch raises a dozen kinds, some private, for what hangs on the value of a tensor.
        raise NotCapturableError(_reason(error)) from error
    finally:
        _State.active, _State.forgone = False, None
        values.put_back()


def _reason(error: Exception) -> str:
    kind, said = type(error).__name__, str(error).strip()
    first = said.splitlines()[0] if said else kind
    if "DataDependent" in kind or "data-dependent" in first:
        return f"it needs the value of a tensor in Python, as an if or a loop on data does ({kind})"
    return f"{kind}: {first}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's log of where a value was asked for: the reason is said by the caller."""
    import logging

    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


class _Values(TorchFunctionMode):
    """What asks for values while a function is captured.

    ``item`` gives the detached tensor, of which sums and products are what they are of the
    number. Whatever needs the number itself goes through that tensor too, and fails there, also
    for parameters, which torch would take for constants.
    """

    # Without torch's dispatcher seeing them.
    _lost = ("numpy", "tolist", "__array__", "data_ptr")
    _numbers = ("__bool__", "__float__", "__int__", "__index__", "__complex__")

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def put_back(self) -> None:
        """Undo what was changed in place: torch does it where only real tensors take part."""
        with torch.no_grad():
            for tensor, value in self._kept.values():
                tensor.copy_(value)

    def _keep(self, tensor: Any) -> None:
        from torch.utils._python_dispatch import _disable_current_modes

        # Of other types are those without data.
        if type(tensor) in (Tensor, nn.Parameter) and id(tensor) not in self._kept:
            with _disable_current_modes():
                self._kept[id(tensor)] = tensor, tensor.detach().clone()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and (name[:2] != "__" or name[:3] == "__i")
        if args and (in_place or name == "__setitem__"):
            self._keep(args[0])
        if kwargs and kwargs.get("out") is not None:
            self._keep(kwargs["out"])
        if func is Tensor.item:
            return args[0].detach()
        if name in self._lost and args and isinstance(args[0], Tensor):
            raise NotCapturableError(
                f"it takes a tensor out of torch with .{name}(), whose values a graph would freeze"
            )
        if name in self._numbers and isinstance(args[0], Tensor):
            return func(args[0].detach())
        return func(*args, **(kwargs or {}))


def _has_effect(node: fx.Node) -> bool:
    """Whether a node changes a tensor or a random generator, so that it stays though unused."""
    if node.op != "call_function":
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags


def _lifted(module: fx.GraphModule, num_inputs: int) -> Graph:
    """Make what the graph holds its last inputs."""
    graph = module.graph
    after = [node for node in graph.nodes if node.op == "placeholder"]
    last = after[-1] if after else None
    held: list[Tensor] = []
    nodes: dict[int, fx.Node] = {}
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        tensor = getattr(module, str(node.target))
        if not isinstance(tensor, Tensor):
            continue
        if id(tensor) not in nodes:
            with graph.inserting_after(last) if last else graph.inserting_before(None):
                last = graph.placeholder(f"held_{len(held)}")
            last.meta["val"] = node.meta.get("val", tensor)
            nodes[id(tensor)] = last
            held.append(tensor)
        node.replace_all_uses_with(nodes[id(tensor)])
        graph.erase_node(node)
    graph.eliminate_dead_code(_has_effect)
    used = []
    for tensor in held:
        if nodes[id(tensor)].users:
            used.append(tensor)
        else:
            graph.erase_node(nodes[id(tensor)])
    module.recompile()
    return Graph(module, tuple(used), num_inputs, (False,) * len(used))
