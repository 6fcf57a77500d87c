"""A VAE of digits that is trained once and then held fixed, and what hand-written code needs of it.

Arrays come and go as NumPy's, under the names of the step benchmark's parameters.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from speed.arena import MissingError

Z_DIM, HIDDEN = 20, 100


def tensors(path: str, device: str) -> dict[str, Tensor]:
    """The arrays of a file.

    Raises:
        MissingError: If the device is not there.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise MissingError("torch sees no GPU")
    with np.load(path) as held:
        return {name: torch.tensor(held[name], device=device) for name in held.files}


def decode(p: dict[str, Tensor], z: Tensor) -> Tensor:
    """Logits."""
    hidden = F.linear(z, p["decoder.0.weight"], p["decoder.0.bias"]).relu()
    return F.linear(hidden, p["decoder.2.weight"], p["decoder.2.bias"])


def encode(p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log scale."""
    hidden = F.linear(x, p["encoder.0.weight"], p["encoder.0.bias"]).relu()
    loc, log_var = F.linear(hidden, p["encoder.2.weight"], p["encoder.2.bias"]).chunk(2, dim=-1)
    return loc, 0.5 * log_var


def digits_loss(p: dict[str, Tensor], x: Tensor, loc: Tensor, log_sd: Tensor, s: int) -> Tensor:
    """−ELBO, summed over rows, with ``s`` draws and the KL in closed form."""
    z = loc + log_sd.exp() * torch.randn(s, *loc.shape, dtype=loc.dtype, device=loc.device)
    logits = decode(p, z)
    nats = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="sum") / s
    return nats + 0.5 * (loc**2 + (2 * log_sd).exp() - 1 - 2 * log_sd).sum()


def toy_loss(p: dict[str, Tensor], x: Tensor, loc: Tensor, log_sd: Tensor, s: int) -> Tensor:
    """−ELBO, summed over rows, with ``s`` draws."""
    noise = torch.randn(s, *loc.shape, dtype=loc.dtype, device=loc.device)
    log_z = loc + log_sd.exp() * noise
    z = log_z.exp()
    return (z + 0.5 * (x - z) ** 2 - 0.5 * noise**2 - log_z - log_sd).sum() / s


LOSSES = {"digits": digits_loss, "toy": toy_loss}


class Train:
    """Trains the VAE on the training digits, by hand-written Adam."""

    def run(self, rows: int, steps: int) -> dict[str, Any]:
        """Parameters, and the rows to be judged, ``x``."""
        import ppvae

        torch.manual_seed(0)
        try:
            data = ppvae.data.load("digits").train
        except ImportError as error:
            raise MissingError(str(error)) from None
        p = {}
        for name, given, out in (
            ("encoder.0", data.shape[1], HIDDEN),
            ("encoder.2", HIDDEN, 2 * Z_DIM),
            ("decoder.0", Z_DIM, HIDDEN),
            ("decoder.2", HIDDEN, data.shape[1]),
        ):
            layer = torch.nn.Linear(given, out)
            p[f"{name}.weight"], p[f"{name}.bias"] = layer.weight, layer.bias
        adam = torch.optim.Adam(p.values(), lr=2e-3)
        for _ in range(steps):
            x = data[torch.randint(len(data), (100,))]
            adam.zero_grad()
            digits_loss(p, x, *encode(p, x), 1).backward()
            adam.step()
        held = {name: value.detach().numpy() for name, value in p.items()}
        return {**held, "x": data[:rows].numpy()}


class Judge:
    """ELBOs of given normals on common draws: scrambled Sobol points, some sets of them."""

    SETS, POINTS = 8, 256

    def __init__(self, path: str) -> None:
        self.p = {name: t.double() for name, t in tensors(path, "cpu").items()}

    def encoder(self) -> np.ndarray:
        """The encoder's output, ``(rows, 2 z_dim)``."""
        return torch.cat(encode(self.p, self.p["x"]), dim=-1).numpy()

    def elbo(self, found: np.ndarray) -> np.ndarray:
        """``(sets, rows)``."""
        loc, log_sd = torch.tensor(found).double().chunk(2, dim=-1)
        x, values = self.p["x"], []
        kl = 0.5 * (loc**2 + (2 * log_sd).exp() - 1 - 2 * log_sd).sum(-1)
        for seed in range(self.SETS):
            sobol = torch.quasirandom.SobolEngine(Z_DIM, scramble=True, seed=seed)
            uniform = sobol.draw(self.POINTS, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
            noise = math.sqrt(2) * torch.erfinv(2 * uniform - 1)
            total = torch.zeros(len(x), dtype=torch.float64)
            for part in noise.split(16):
                logits = decode(self.p, loc + log_sd.exp() * part[:, None])
                nats = F.binary_cross_entropy_with_logits(
                    logits, x.expand_as(logits), reduction="none"
                )
                total -= nats.sum(dim=(0, -1))
            values.append(total / self.POINTS - kl)
        return torch.stack(values).numpy()


def toy_elbo(x: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The toy's ELBO for each row in closed form, of log-normals ``(rows, 2)``: loc, log scale."""
    loc, log_sd = found.astype("float64").T
    var = np.exp(2 * log_sd)
    mean, square = np.exp(loc + var / 2), np.exp(2 * loc + 2 * var)
    return -mean - 0.5 * (x**2 - 2 * x * mean + square) + loc + log_sd + 0.5


def toy_optimum(x: np.ndarray) -> np.ndarray:
    """The best log-normal for each row: ``(rows, 2)``.

    With a = E z, b = E z² and v the variance of log z, both derivatives vanish where
    b = (x − 1) a + 1 and v = 1 / (1 + b); as b = a² exp(v), that is one equation in v.
    """
    x = x.astype("float64")

    def mean(v: np.ndarray) -> np.ndarray:
        root = np.sqrt((x - 1) ** 2 + 4 * np.exp(v))
        # Without cancellation on either side of x = 1.
        return np.where(x > 1, (x - 1 + root) / (2 * np.exp(v)), 2 / (root - (x - 1)))

    low, high = np.zeros_like(x), np.ones_like(x)
    for _ in range(60):
        middle = (low + high) / 2
        above = middle * (1 + mean(middle) ** 2 * np.exp(middle)) > 1
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    v = (low + high) / 2
    return np.stack([np.log(mean(v)) - v / 2, 0.5 * np.log(v)], axis=-1)
