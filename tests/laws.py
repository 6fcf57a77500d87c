"""Named constructors and reference answers that several test modules share."""

import math

import numpy as np
import torch
from scipy import optimize

from ppvae import families

SCALAR_FAMILIES = {
    "DiagonalNormal": families.DiagonalNormal,
    "LogNormal": families.LogNormal,
    "Gamma": families.Gamma,
    "Weibull": families.Weibull,
    "TruncatedNormal": families.TruncatedNormal,
}
POSITIVE_FAMILIES = {n: f for n, f in SCALAR_FAMILIES.items() if n != "DiagonalNormal"}


def toy_elbo(family, params, x):
    """The toy's ELBO at λ by quadrature in u = log z, in float64: exact to about 1e-8."""
    u = torch.linspace(-60.0, 8.0, 20_001, dtype=torch.float64)
    z = u.exp()
    log_q = family.distribution(torch.as_tensor(params, dtype=torch.float64)).log_prob(z)
    log_p = -z - 0.5 * (x - z) ** 2 - 0.5 * math.log(2 * math.pi)
    inside = log_q > -700
    f = torch.where(inside, log_q.exp() * (log_p - log_q) * z, torch.zeros_like(z))
    return float(torch.trapezoid(f, u))


def toy_optimum(family, x):
    """The toy's best ELBO in a family, by optimisation over quadrature from two starts."""
    best = -math.inf
    for start in ((0.0, 0.0), (1.0, 1.0)):
        result = optimize.minimize(
            lambda v: -toy_elbo(family, v, x),
            np.array(start),
            method="Nelder-Mead",
            options={"xatol": 1e-5, "fatol": 1e-8, "maxiter": 400},
        )
        best = max(best, -float(result.fun))
    return best


def sigmas(estimate, truth, stderr):
    """The largest distance of an estimate from the truth, in its own standard errors."""
    return float(((estimate - truth).abs() / stderr).max())
