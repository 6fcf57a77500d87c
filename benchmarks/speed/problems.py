"""The problems of the step benchmark, as arrays: the same data and first parameters for all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BATCHES = 16


@dataclass(frozen=True)
class Problem:
    """A pair, its data and its first parameters.

    Attributes:
        kind: ``"vae"`` or ``"toy"``.
        batches: ``(batches, rows, *event)``; steps go round them.
        params: First values, unconstrained; matrices as ``(out, in)``.
        lr: Adam's learning rate.
    """

    kind: str
    batches: np.ndarray
    params: dict[str, np.ndarray]
    lr: float

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return self.batches.shape[1]


def vae(rows: int, x_dim: int = 784, hidden: int = 400, z_dim: int = 20) -> Problem:
    """A VAE x_dim-hidden-z_dim with ReLU; its encoder gives means, then log variances.

    The images are draws from a logistic model of 10 factors: there is something to learn.
    """
    draw = np.random.default_rng(0)
    factors = draw.normal(size=(BATCHES, rows, 10)) @ draw.normal(size=(10, x_dim))
    x = draw.uniform(size=factors.shape) < 1 / (1 + np.exp(1.5 - factors))
    params = {}
    shapes = (
        ("encoder.0", x_dim, hidden),
        ("encoder.2", hidden, 2 * z_dim),
        ("decoder.0", z_dim, hidden),
        ("decoder.2", hidden, x_dim),
    )
    for name, given, out in shapes:
        bound = given**-0.5
        params[f"{name}.weight"] = draw.uniform(-bound, bound, (out, given)).astype("float32")
        params[f"{name}.bias"] = draw.uniform(-bound, bound, out).astype("float32")
    return Problem("vae", x.astype("float32"), params, 1e-3)


def toy(rows: int) -> Problem:
    """z ~ Exponential(1), x | z ~ Normal(z, 1), a LogNormal for each row, full batch."""
    draw = np.random.default_rng(0)
    x = draw.exponential(size=(1, rows)) + draw.normal(size=(1, rows))
    params = {
        "loc": np.zeros(rows, dtype="float32"),
        "log_scale": np.full(rows, -1.0, dtype="float32"),
    }
    return Problem("toy", x.astype("float32"), params, 1e-2)


def make(kind: str, rows: int, small: bool = False) -> Problem:
    """The problem of a name; ``small`` is for trying the benchmark out."""
    if kind == "toy":
        return toy(rows)
    return vae(rows, 30, 20, 3) if small else vae(rows)
