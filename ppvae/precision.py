"""Matrix products in lower precision while a pair is trained; densities stay in single."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from pyro.distributions import TransformModule
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppvae.families import Family
from ppvae.flows import Autoregressive
from ppvae.isolation import modules_of

Precision = Literal["tf32", "bf16"]

_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
# What belongs to a density: its maps are inverted, and their volumes are summed.
_DENSITIES = (Family, TransformModule, Autoregressive)


def check_precision(precision: Any, device: torch.device) -> None:
    """Refuse a precision that is unknown, or that the device does not have.

    Raises:
        ValueError: Naming what there is.
    """
    if precision not in (None, "tf32", "bf16"):
        raise ValueError(f'precision must be None, "tf32" or "bf16"; got {precision!r}.')
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(
            f'precision: "tf32" is a way in which CUDA devices multiply; this runs on {device}. '
            f'Leave precision out, or pass device="cuda".'
        )


def lowered(
    precision: Precision | None, device: torch.device, *programs: Any
) -> AbstractContextManager[None]:
    """Inside, the networks of the programs multiply in a lower precision.

    Args:
        precision: ``"bf16"`` for `bfloat16_layers`, ``"tf32"`` for `tensor_float32`.
        device: Where the programs run.
        *programs: A model and a guide.

    Raises:
        ValueError: If the precision is unknown, or does not fit the device or the programs.
    """
    check_precision(precision, device)
    if precision == "bf16":
        return bfloat16_layers(device, *programs)
    return tensor_float32() if precision == "tf32" else nullcontext()


@contextmanager
def tensor_float32() -> Iterator[None]:
    """Inside, CUDA multiplies float32 matrices, and convolves, with 10 bits of mantissa."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    # Torch has two sets of names for this, and refuses to read one after the other was written.
    parts: list[Any] = [matmul, getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None)]
    places = [part for part in parts if hasattr(part, "fp32_precision")]
    named = [(place, place.fp32_precision) for place in places]
    flags = [(place, _flag(place)) for place in (matmul, cudnn)]
    try:
        for place, _ in flags:
            place.allow_tf32 = True
        yield
    finally:
        for place, flag in flags:
            place.allow_tf32 = flag
        for place, name in named:
            place.fp32_precision = name


def _flag(place: Any) -> bool:
    try:
        return bool(place.allow_tf32)
    except RuntimeError:  # Written under the other name.
        return False


@contextmanager
def bfloat16_layers(device: torch.device, *programs: Any) -> Iterator[None]:
    """Inside, linear layers and convolutions multiply in bfloat16 and hand back float32.

    Each runs under torch's autocast by itself, so that what is between layers and behind the
    last, and all densities, are in float32, whoever wrote the program. Layers of flows and
    other densities stay in float32, as do those of classes with a ``forward`` of their own and
    products that are no layers.

    Args:
        device: Where the programs run.
        *programs: A model and a guide.

    Raises:
        ValueError: If there is no such layer, or if its weights are not in float32.
    """
    layers = layers_of(*programs)
    if not layers:
        raise ValueError(
            'precision: "bf16" is for linear layers and convolutions of torch.nn; model and '
            "guide have none. Leave precision out."
        )
    others = {p.dtype for layer in layers for p in layer.parameters()} - {torch.float32}
    if others:
        raise ValueError(
            f'precision: "bf16" lowers layers in float32; got some in {others.pop()}. Leave '
            f"precision out, or pass dtype=torch.float32."
        )
    for layer in layers:
        vars(layer)["forward"] = functools.partial(_lower, layer.forward, device.type)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _lower(forward: Callable[..., Tensor], device_type: str, x: Tensor, *rest: Any) -> Tensor:
    # A cache of weights would outlive an update that a graph makes.
    with torch.autocast(device_type, torch.bfloat16, cache_enabled=False):
        return forward(x, *rest).to(x.dtype)


def layers_of(*programs: Any) -> list[nn.Module]:
    """The linear layers and convolutions of the networks that programs use, each once."""
    modules = modules_of(*programs)
    densities = [m for top in modules for m in top.modules() if _is_density(m)]
    excluded = {id(part) for density in densities for part in density.modules()}
    every = {id(part): part for top in modules for part in top.modules()}
    return [m for key, m in every.items() if key not in excluded and _is_layer(m)]


def _is_density(module: nn.Module) -> bool:
    return isinstance(module, _DENSITIES) or type(module).__module__.split(".")[0] == "zuko"


def _is_layer(module: nn.Module) -> bool:
    # The weights of a PyroModule may be latents, which are drawn when they are read.
    if isinstance(module, PyroModule) or "forward" in vars(module):
        return False
    return any(
        isinstance(module, kind) and type(module).forward is kind.forward for kind in _LAYERS
    )
