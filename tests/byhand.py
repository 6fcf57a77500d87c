"""Results whose every figure is known, made without any fit."""

from typing import Any

import numpy as np
import torch
import xarray

import ppvae
from ppvae.families import LogNormal
from ppvae.guides import PerDatapoint


def ledger(*, training: float = 30.0, even: float | None = None) -> ppvae.Comparison:
    """A comparison of four rows in which everything is known."""
    local, encoding = 2.0, 0.04
    ds = xarray.Dataset(
        {
            "approximation_gap": ("data", [0.3, 0.05, 0.1, 0.2]),
            "amortization_gap": ("data", [0.02, 0.4, 0.01, 0.9]),
            "inference_gap": ("data", [0.32, 0.45, 0.11, 1.1]),
            "approximation_gap_stderr": ("data", [0.02, 0.01, 0.02, 0.03]),
            "amortization_gap_stderr": ("data", [0.01, 0.05, 0.01, 0.04]),
            "inference_gap_stderr": ("data", [0.02, 0.05, 0.02, 0.05]),
            "approximation_gap_bound": ("data", ["estimate"] * 4),
            "amortization_gap_bound": ("data", ["estimate"] * 4),
            "pareto_k": (("guide", "data"), [[0.9, 0.2, 0.6, np.nan], [0.1, -np.inf, 0.5, -0.2]]),
        },
        coords={"guide": ["amortized", "per_datapoint"]},
        attrs={
            "family": "LogNormal()",
            "num_samples": 1000,
            "pareto_k_threshold": 2 / 3,
            "seconds_local_fit": local,
            "seconds_training": training,
            "seconds_encoding": encoding,
            "break_even": training / (local / 4 - encoding / 4) if even is None else even,
        },
    )
    guide = PerDatapoint(LogNormal(), 4)
    return ppvae.Comparison(ds, guide, {"amortized": guide}, torch.zeros(4), {}, {})


def annealed(value: list[float], bound: Any = "lower") -> ppvae.AnnealedEstimate:
    found = torch.tensor(value, dtype=torch.float64)
    return ppvae.AnnealedEstimate(
        found, 0.1 * torch.ones_like(found), bound, "ais", found[None], torch.ones_like(found)
    )


def sandwiches() -> dict[int, ppvae.Sandwich]:
    """Bounds on the evidences −3, −2 and −4, of three numbers of temperatures."""
    x, exact = torch.zeros(3, 2), np.array([-3.0, -2.0, -4.0])
    below = {20: [0.5, 0.1, 0.9], 10: [1.0, 0.4, 1.5], 80: [0.1, -0.02, 0.3]}
    return {
        count: ppvae.Sandwich(
            x,
            annealed((exact - apart).tolist()),
            annealed((exact + 0.5 * np.array(apart)).tolist(), "upper"),
        )
        for count, apart in below.items()
    }
