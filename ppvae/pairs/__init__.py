"""Ready-made (model, guide) pairs: what people import.

Each works with `pyro.infer.SVI` under `Trace_ELBO` and `TraceMeanField_ELBO`, with `Predictive`,
and with `ppvae.fit`.
"""

from ppvae.pairs.tractable import (
    exponential_gaussian,
    factor_analysis,
    gaussian_mixture,
    linear_state_space,
    ppca,
)
from ppvae.pairs.vae import vae

__all__ = [
    "exponential_gaussian",
    "factor_analysis",
    "gaussian_mixture",
    "linear_state_space",
    "ppca",
    "vae",
]
