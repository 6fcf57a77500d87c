"""Networks, in torch alone: the parameter sources of guides and the decoders of models.

Every network accepts leading dimensions (Monte Carlo draws) before the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

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
