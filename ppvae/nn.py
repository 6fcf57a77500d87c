"""Networks, in torch alone: the parameter sources of guides and the decoders of models.

Every network accepts leading dimensions (Monte Carlo draws) before the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    r"""A multilayer perceptron, :math:`h_l = a(W_l h_{l-1} + b_l)`, with a linear last layer.

    Args:
        in_features: Size of an input row.
        hidden: Widths of the hidden layers; empty for a linear map.
        out_features: Size of an output row.
        activation: Class of the activation between layers.

    Shapes:
        ``(*, in_features)`` to ``(*, out_features)``, any number of leading dimensions.

    Example:
        >>> import torch
        >>> net = MLP(784, [400], 40)
        >>> net
        MLP(784 -> 400 -> 40, ELU)
        >>> net(torch.zeros(5, 3, 784)).shape
        torch.Size([5, 3, 40])
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        activation: type[nn.Module] = nn.ELU,
    ) -> None:
        super().__init__()
        self.sizes = (in_features, *hidden, out_features)
        if min(self.sizes) < 1:
            raise ValueError(f"MLP sizes must be positive; got {self.sizes}.")
        self.activation = activation
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(self.sizes[:-2], self.sizes[1:-1], strict=True):
            layers += [nn.Linear(fan_in, fan_out), activation()]
        layers.append(nn.Linear(self.sizes[-2], self.sizes[-1]))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map rows of size `in_features` to rows of size `out_features`."""
        if x.dim() == 0 or x.shape[-1] != self.sizes[0]:
            raise ValueError(
                f"Expected rows of size {self.sizes[0]}, shape (*, {self.sizes[0]}); got "
                f"{tuple(x.shape)}. Flatten the rows, or build the MLP for that size."
            )
        out: Tensor = self.layers(x)
        return out

    def __repr__(self) -> str:
        sizes = " -> ".join(map(str, self.sizes))
        linear = len(self.sizes) == 2
        return f"MLP({sizes}, {'linear' if linear else self.activation.__name__})"


def _halved(image_shape: Sequence[int], channels: Sequence[int]) -> tuple[int, int]:
    """Height and width after one halving for each of the layers."""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(
            f"image_shape: expected (channels, height, width), each at least 1; got "
            f"{tuple(image_shape)}. A grey image of 28 x 28 pixels has the shape (1, 28, 28)."
        )
    if not channels or min(channels) < 1:
        raise ValueError(
            f"channels: expected the positive width of each layer, at least one; got "
            f"{tuple(channels)}. A network without such layers is an MLP."
        )
    factor = 2 ** len(channels)
    _, height, width = image_shape
    if height % factor or width % factor:
        raise ValueError(
            f"image_shape: {len(channels)} layers of stride 2 need a height and a width that are "
            f"multiples of {factor} ({factor}, {2 * factor}, {3 * factor}, …); got {height} x "
            f"{width}. Pad the images to {-(-height // factor) * factor} x "
            f"{-(-width // factor) * factor}, or give fewer channels."
        )
    return height // factor, width // factor


class ConvEncoder(nn.Module):
    r"""Convolutions of stride 2 and then an `MLP`: an encoder for images.

    Each layer halves height and width with windows of 4 x 4 pixels.

    Args:
        image_shape: Channels C, height H and width W of an image; H and W are multiples of
            ``2 ** len(channels)``.
        out_features: Size of an output row.
        channels: Number of channels after each of the convolutions.
        hidden: Widths of the hidden layers of the `MLP` behind them.
        activation: Class of the activation between layers.

    Shapes:
        ``(*, C * H * W)``, an image being flattened row by row and channel by channel, to
        ``(*, out_features)``; any number of leading dimensions.

    Raises:
        ValueError: If the image cannot be halved so often; on a call with rows of another size.

    Example:
        >>> import torch
        >>> net = ConvEncoder((1, 28, 28), 40, hidden=[64])
        >>> net
        ConvEncoder(1 x 28 x 28 -> 16 x 14 x 14 -> 32 x 7 x 7 -> 64 -> 40, ELU)
        >>> net(torch.zeros(5, 3, 784)).shape
        torch.Size([5, 3, 40])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        out_features: int,
        channels: Sequence[int] = (16, 32),
        hidden: Sequence[int] = (),
        activation: type[nn.Module] = nn.ELU,
    ) -> None:
        super().__init__()
        height, width = _halved(image_shape, channels)
        self.image_shape = tuple(image_shape)
        self.channels = tuple(channels)
        self.activation = activation
        layers: list[nn.Module] = []
        for before, after in pairwise((image_shape[0], *channels)):
            layers += [nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1), activation()]
        self.layers = nn.Sequential(*layers)
        self.dense = MLP(channels[-1] * height * width, hidden, out_features, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map flat images to rows of size `out_features`."""
        size = math.prod(self.image_shape)
        if x.dim() == 0 or x.shape[-1] != size:
            raise ValueError(
                f"Expected flat images of {size} = {_times(self.image_shape)} values, shape "
                f"(*, {size}); got {tuple(x.shape)}. Flatten the images, or build the ConvEncoder "
                f"for that image_shape."
            )
        leading = x.shape[:-1]
        images = self.layers(x.reshape(leading.numel(), *self.image_shape))
        out: Tensor = self.dense(images.reshape(*leading, self.dense.sizes[0]))
        return out

    def __repr__(self) -> str:
        steps = _steps(self.image_shape, self.channels)
        sizes = " -> ".join([*steps, *map(str, self.dense.sizes[1:])])
        return f"ConvEncoder({sizes}, {self.activation.__name__})"


class ConvDecoder(nn.Module):
    r"""An `MLP` and then transposed convolutions of stride 2: a decoder to images.

    The mirror image of `ConvEncoder`: each layer doubles height and width.

    Args:
        in_features: Size of an input row.
        image_shape: Channels C, height H and width W of an image; H and W are multiples of
            ``2 ** len(channels)``.
        outputs_per_pixel: Numbers P for each channel of each pixel, such as 2 for a mean and a
            log variance, or K for the logits of K categories.
        channels: Number of channels before each of the transposed convolutions.
        hidden: Widths of the hidden layers of the `MLP` before them.
        activation: Class of the activation between layers.

    Shapes:
        ``(*, in_features)`` to ``(*, P * C * H * W)``: P flat images one after the other, the
        order in which `ppvae.likelihoods` take them. Any number of leading dimensions.

    Raises:
        ValueError: If the image is not made by so many doublings.

    Example:
        >>> import torch
        >>> net = ConvDecoder(8, (1, 28, 28), outputs_per_pixel=2, hidden=[64])
        >>> net
        ConvDecoder(8 -> 64 -> 32 x 7 x 7 -> 16 x 14 x 14 -> 2 x 28 x 28, ELU)
        >>> net(torch.zeros(5, 3, 8)).shape
        torch.Size([5, 3, 1568])
    """

    def __init__(
        self,
        in_features: int,
        image_shape: Sequence[int],
        outputs_per_pixel: int = 1,
        channels: Sequence[int] = (32, 16),
        hidden: Sequence[int] = (),
        activation: type[nn.Module] = nn.ELU,
    ) -> None:
        super().__init__()
        height, width = _halved(image_shape, channels)
        if outputs_per_pixel < 1:
            raise ValueError(f"outputs_per_pixel must be at least 1; got {outputs_per_pixel}.")
        self.image_shape = tuple(image_shape)
        self.outputs_per_pixel = outputs_per_pixel
        self.channels = tuple(channels)
        self.activation = activation
        self.start = (channels[0], height, width)
        self.dense = MLP(in_features, hidden, math.prod(self.start), activation)
        layers: list[nn.Module] = []
        for before, after in pairwise((*channels, outputs_per_pixel * image_shape[0])):
            layers += [
                activation(),
                nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """Map rows of size `in_features` to flat images."""
        start = self.dense(z)
        leading = start.shape[:-1]
        images = self.layers(start.reshape(leading.numel(), *self.start))
        size = self.outputs_per_pixel * math.prod(self.image_shape)
        out: Tensor = images.reshape(*leading, size)
        return out

    def __repr__(self) -> str:
        colours, height, width = self.image_shape
        shape = (self.outputs_per_pixel * colours, height, width)
        steps = _steps(shape, self.channels[::-1])[::-1]
        sizes = " -> ".join([*map(str, self.dense.sizes[:-1]), *steps])
        return f"ConvDecoder({sizes}, {self.activation.__name__})"


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _steps(image_shape: Sequence[int], channels: Sequence[int]) -> list[str]:
    """The shapes of an image on its way through the convolutions."""
    _, height, width = image_shape
    halves = [(c, height >> i, width >> i) for i, c in enumerate(channels, start=1)]
    return [_times(shape) for shape in (image_shape, *halves)]


class LogCounts(nn.Module):
    """A network that reads log(1 + x) for counts x, so that a few large ones do not rule it.

    Args:
        network: What reads the logarithms.

    Example:
        >>> import torch
        >>> net = LogCounts(MLP(20, [64], 4))
        >>> net
        LogCounts(MLP(20 -> 64 -> 4, ELU))
        >>> net(torch.full((5, 20), 1e6)).shape
        torch.Size([5, 4])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """The network's output for log(1 + x)."""
        out: Tensor = self.network(torch.log1p(x))
        return out

    def __repr__(self) -> str:
        return f"LogCounts({self.network!r})"


class BottomUp(nn.Module):
    r"""A network with an output for each of several layers, each from deeper features of x.

    .. math:: d_0 = x, \qquad d_l = \mathrm{block}_l(d_{l-1}), \qquad o_l = A_l d_l + b_l

    A block is a hidden layer for each entry of ``hidden``; without any, all outputs are linear
    maps of x.

    Args:
        in_features: Size of an input row.
        hidden: Widths of the hidden layers of each block.
        out_features: Sizes of the outputs :math:`o_1, \dots, o_L`.
        activation: Class of the activation between layers.
        log_counts: Whether it reads log(1 + x) for counts x, as `LogCounts` does.

    Shapes:
        ``(*, in_features)`` to ``(*, sum(out_features))``: the outputs joined from the last to the
        first, in which order a model draws its layers.

    Example:
        >>> import torch
        >>> net = BottomUp(64, [32], [8, 4])
        >>> net
        BottomUp(64 -> 32 -> 32, outputs (8, 4), ELU)
        >>> net(torch.zeros(5, 64)).shape
        torch.Size([5, 12])
        >>> [o.shape[-1] for o in net.outputs(torch.zeros(5, 64))]
        [8, 4]
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: Sequence[int],
        activation: type[nn.Module] = nn.ELU,
        *,
        log_counts: bool = False,
    ) -> None:
        super().__init__()
        self.log_counts = log_counts
        self.in_features, self.hidden = in_features, tuple(hidden)
        self.out_features, self.activation = tuple(out_features), activation
        if min(in_features, *self.hidden, *self.out_features, len(self.out_features)) < 1:
            raise ValueError(
                f"BottomUp sizes must be positive; got in_features={in_features}, "
                f"hidden={self.hidden}, out_features={self.out_features}."
            )
        blocks, width = [], in_features
        for _ in self.out_features:
            layers: list[nn.Module] = []
            for size in self.hidden:
                layers += [nn.Linear(width, size), activation()]
                width = size
            blocks.append(nn.Sequential(*layers))
        self.blocks = nn.ModuleList(blocks)
        width = self.hidden[-1] if self.hidden else in_features
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in self.out_features)

    def outputs(self, x: Tensor) -> list[Tensor]:
        """The outputs one by one, the first first, each ``(*, out_features[l])``."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"Expected rows of size {self.in_features}, shape (*, {self.in_features}); got "
                f"{tuple(x.shape)}. Flatten the rows, or build the network for that size."
            )
        x, found = torch.log1p(x) if self.log_counts else x, []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x)
            found.append(head(x))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """All outputs in a row, from the last to the first."""
        return torch.cat(self.outputs(x)[::-1], dim=-1)

    def __repr__(self) -> str:
        sizes = " -> ".join(map(str, (self.in_features, *self.hidden * len(self.out_features))))
        kind = self.activation.__name__ if self.hidden else "linear"
        reads = ", of log(1 + x)" if self.log_counts else ""
        return f"BottomUp({sizes}, outputs {self.out_features}, {kind}{reads})"


class Table(nn.Module):
    """A row of free parameters per datum: the parameter source without amortization.

    Args:
        num_data: Number of rows.
        num_params: Size of a row.

    Example:
        >>> import torch
        >>> table = Table(100, 4)
        >>> table(torch.tensor([3, 5])).shape
        torch.Size([2, 4])
    """

    def __init__(self, num_data: int, num_params: int) -> None:
        super().__init__()
        if num_data < 1 or num_params < 1:
            raise ValueError(
                f"Table needs num_data >= 1 and num_params >= 1; got {num_data} and {num_params}."
            )
        self.weight = nn.Parameter(torch.zeros(num_data, num_params))

    def forward(self, rows: Tensor | None = None) -> Tensor:
        """The rows asked for, ``(len(rows), num_params)``; all of them without an argument."""
        return self.weight if rows is None else self.weight[rows]

    def __repr__(self) -> str:
        num_data, num_params = self.weight.shape
        return f"Table({num_data} rows x {num_params})"


class MLPByClass(nn.Module):
    r"""A multilayer perceptron of a row and a class, for all classes at once.

    It is the `MLP` of the row and the class as an indicator vector, side by side: the first layer
    is :math:`W x + U_k`, and what does not hang on the class is computed once.

    Args:
        in_features: Size of an input row.
        num_classes: Number of classes K.
        hidden: Widths of the hidden layers; empty for a linear map.
        out_features: Size of an output row.
        activation: Class of the activation between layers.

    Shapes:
        ``(*, in_features)`` to ``(*, num_classes, out_features)``.

    Example:
        >>> import torch
        >>> net = MLPByClass(784, 10, [400], 40)
        >>> net
        MLPByClass(784 + 10 classes -> 400 -> 40, ELU)
        >>> net(torch.zeros(5, 784)).shape
        torch.Size([5, 10, 40])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden: Sequence[int],
        out_features: int,
        activation: type[nn.Module] = nn.ELU,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive; got {num_classes}.")
        self.num_classes = num_classes
        self.mlp = MLP(in_features + num_classes, hidden, out_features, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map rows of size `in_features` to a row of size `out_features` for each class."""
        size = self.mlp.sizes[0] - self.num_classes
        if x.dim() == 0 or x.shape[-1] != size:
            raise ValueError(
                f"Expected rows of size {size}, shape (*, {size}); got {tuple(x.shape)}."
            )
        first, rest = self.mlp.layers[0], self.mlp.layers[1:]
        assert isinstance(first, nn.Linear)
        assert isinstance(rest, nn.Sequential)
        of_row, of_class = first.weight.split([size, self.num_classes], dim=1)
        out: Tensor = rest(nn.functional.linear(x, of_row, first.bias)[..., None, :] + of_class.mT)
        return out

    def __repr__(self) -> str:
        into, *sizes = self.mlp.sizes
        kind = self.mlp.activation.__name__ if len(sizes) > 1 else "linear"
        first = f"{into - self.num_classes} + {self.num_classes} classes"
        return f"MLPByClass({' -> '.join([first, *map(str, sizes)])}, {kind})"
