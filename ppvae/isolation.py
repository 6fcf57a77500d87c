"""What the library leaves alone, and how modules come to own their parameters.

Pyro keeps three things in the process: a parameter store, torch's random number
generators and the validation defaults. Code of this package that runs somebody's model does so
inside the contexts of this module, so that all three are afterwards as they were before.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

_serial = itertools.count(1)


class OwnedModule(PyroModule):
    """A `PyroModule` whose parameters keep a name of their own in Pyro's parameter store.

    Pyro names the parameters of a top-level `PyroModule` by attribute alone, so that two modules
    of one kind that are trained in one process share a store entry and the second silently does
    not train. An `OwnedModule` has a process-wide serial number in its name. Copies and unpickled
    modules get a number of their own. ``state_dict`` keys do not contain it.

    A parameter that needs no gradient stays so: Pyro's store would turn it on at its first use.
    """

    def __init__(self) -> None:
        super().__init__(f"{type(self).__name__}_{next(_serial)}")

    def __getattr__(self, name: str) -> Any:
        parameter = self.__dict__.get("_parameters", {}).get(name)
        held = parameter is not None and not parameter.requires_grad
        value = super().__getattr__(name)
        if held:
            parameter.requires_grad_(False)
        return value

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        name = f"{type(self).__name__}_{next(_serial)}"
        self._pyro_set_supermodule(name, self._pyro_context)


@contextmanager
def private_store(*, keep_bare: bool = False) -> Iterator[None]:
    """Run with a parameter store of one's own; the caller's is afterwards what it was.

    Inside, the store starts with the caller's *bare* parameters (those made by ``pyro.param``
    with a plain tensor, which have no other home). Parameters that belong to a module are left
    out: the module itself holds them, and an entry of the same name may be another module's.

    Args:
        keep_bare: Whether bare parameters that are created inside stay in the caller's store, as
            training a function that calls ``pyro.param`` needs. Otherwise they vanish.
    """
    store = pyro.get_param_store()
    caller = store.get_state()
    bare = {name: p for name, p in caller["params"].items() if not isinstance(p, nn.Parameter)}
    inside: Any = {
        "params": dict(bare),
        "constraints": {name: caller["constraints"][name] for name in bare},
    }
    with store.scope(inside):
        yield
    if keep_bare:
        created = {
            name: p
            for name, p in inside["params"].items()
            if name not in caller["params"] and not isinstance(p, nn.Parameter)
        }
        constraints = {name: inside["constraints"][name] for name in created}
        store.set_state({"params": created, "constraints": constraints})


@contextmanager
def forked_rng(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run with torch's generators seeded; afterwards their state is what it was.

    Args:
        seed: A non-negative integer.
        device: The device whose generator is used beside the CPU's.
    """
    device = torch.device(device)
    cuda = []
    if device.type == "cuda":
        cuda = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices=cuda):
        # torch.manual_seed would queue a seed for every CUDA device, in use or not.
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


@contextmanager
def unvalidated() -> Iterator[None]:
    """Run without Pyro's and torch's validation; each setting is restored by itself.

    `pyro.validation_enabled` would set torch's default to what Pyro's own was.
    """
    names = ("distributions_pyro", "distributions_torch", "infer", "poutine")
    with pyro.settings.context(**{f"validate_{name}": False for name in names}):
        yield


def modules_of(*programs: Any) -> list[nn.Module]:
    """The modules that programs are or use, each once.

    A program is a module, a function, or a method or a callable object of any class. The modules
    of a function are those in its closure, its defaults and the global names that it uses, also
    behind `functools.partial` and Pyro's handlers; those of an object are in its attributes.
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    pending = list(programs)
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found[id(item)] = item
        elif isinstance(item, (list, tuple, set)):
            pending += item
        elif isinstance(item, dict):
            pending += item.values()
        elif inspect.ismethod(item):
            pending += [item.__self__, item.__func__]
        elif inspect.isfunction(item):
            names = inspect.getclosurevars(item)
            pending += [*names.nonlocals.values(), *(item.__defaults__ or ())]
            pending += [v for v in names.globals.values() if isinstance(v, (nn.Module, list, dict))]
            pending += [v for v in names.globals.values() if inspect.isfunction(v)]
            pending += [v for v in names.globals.values() if _holds_things(v)]
            # `nets.encoder(x)`: what the code names of a module of the user's.
            used = [v for v in names.globals.values() if inspect.ismodule(v)]
            pending += [
                part
                for module in used
                for name in item.__code__.co_names
                if isinstance(part := vars(module).get(name), nn.Module)
            ]
        elif isinstance(item, functools.partial):
            pending += [item.func, *item.args, *item.keywords.values()]
        elif _holds_things(item):
            pending += vars(item).values()
    return list(found.values())


def _holds_things(item: Any) -> bool:
    """Whether an object may hold the modules of a program: an instance of somebody's class."""
    kind = type(item)
    if inspect.isclass(item) or inspect.ismodule(item) or inspect.isroutine(item):
        return False
    foreign = kind.__module__.split(".")[0] in ("builtins", "torch", "numpy", "xarray", "pandas")
    return hasattr(item, "__dict__") and not foreign


@contextmanager
def evaluation_mode(*programs: Any, freeze: bool = True) -> Iterator[None]:
    """Put the modules of the programs into eval mode (dropout, batch norm) for a while.

    Both settings are restored, submodule by submodule.

    Args:
        *programs: Models, guides and the like.
        freeze: Whether their parameters need no gradient inside.
    """
    owned = [part for module in modules_of(*programs) for part in module.modules()]
    training = [(part, part.training) for part in owned]
    frozen = [(p, p.requires_grad) for part in owned for p in part.parameters(recurse=False)]
    try:
        for part, _ in training:
            part.training = False
        for p, needed in frozen:
            p.requires_grad_(needed and not freeze)
        yield
    finally:
        for part, flag in training:
            part.training = flag
        for p, needed in frozen:
            p.requires_grad_(needed)


def device_of(*programs: Any) -> torch.device | None:
    """The device of the first parameter or buffer found, `None` where there is none."""
    for module in modules_of(*programs):
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            return tensor.device
    return None


def seconds_now(device: torch.device | str | None = None) -> float:
    """A clock that waits for the work in flight on a CUDA device."""
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def check_rows(x: Tensor, *modules: Any, name: str = "x") -> None:
    """Refuse what cannot be data: the one place in which rows are validated.

    Args:
        x: The rows, ``(batch, *event)``.
        *modules: Models and guides, whose device the rows must share.
        name: How the caller calls the argument.

    Raises:
        ValueError: If ``x`` is no tensor, has no rows, is not floating point, holds NaN or
            infinite values, or lies on another device than the modules' parameters.
    """
    if not isinstance(x, Tensor):
        raise ValueError(
            f"{name} must be a torch.Tensor of shape (batch, *event); got {type(x).__name__}. "
            f"Convert it with torch.as_tensor."
        )
    if x.dim() == 0 or x.shape[0] == 0:
        raise ValueError(
            f"{name} has no rows: expected shape (batch, *event) with batch >= 1; "
            f"got {tuple(x.shape)}."
        )
    if not x.is_floating_point():
        raise ValueError(
            f"{name} has dtype {x.dtype}, expected a floating point tensor. "
            f"Convert it with {name}.float(), and scale or binarise it as the likelihood expects."
        )
    device = device_of(*modules)
    if device is not None and device != x.device:
        raise ValueError(
            f"{name} is on {x.device} but the parameters are on {device}. "
            f"Move one of them: {name}.to({str(device)!r}) or model.to({str(x.device)!r})."
        )
    finite = torch.isfinite(x).reshape(x.shape[0], -1).all(dim=-1)
    if not bool(finite.all()):
        bad = torch.nonzero(~finite).flatten()
        raise ValueError(
            f"{name} has NaN or infinite values in {len(bad)} of {x.shape[0]} rows "
            f"(the first: row {int(bad[0])}). Remove or impute these rows first."
        )


def plate_size(
    program: str, x: Tensor | None, size: int | None, event_shape: tuple[int, ...]
) -> int:
    """The number of rows of a program that is called with rows ``x`` or with ``size``.

    Raises:
        ValueError: If neither is given, they disagree, or a row has another event shape.
    """
    if x is None:
        if size is None or size < 1:
            raise ValueError(
                f"{program} needs rows x of shape {('batch', *event_shape)} to condition on, or "
                f"size=n (n >= 1) to draw n rows; got x=None, size={size}."
            )
        return size
    expected = str(("batch", *event_shape)).replace("'", "")
    if x.dim() == 0 or tuple(x.shape[1:]) != event_shape:
        raise ValueError(
            f"{program}: expected x of shape {expected}; got {tuple(x.shape)}. "
            f"Reshape the rows, or build the model for that size."
        )
    if size is not None and size != x.shape[0]:
        raise ValueError(f"{program}: size={size} but x has {x.shape[0]} rows; pass one of them.")
    return int(x.shape[0])
