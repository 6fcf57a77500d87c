"""Ready-made (model, guide) pairs: what people import.

Each works with `pyro.infer.SVI` under `Trace_ELBO` and `TraceMeanField_ELBO`, with `Predictive`,
and with `ppvae.fit`.
"""

from ppvae.pairs.layered import deep_exponential_family, deep_latent_gaussian
from ppvae.pairs.tractable import exponential_gaussian, factor_analysis, ppca
from ppvae.pairs.vae import vae

__all__ = [
    "deep_exponential_family",
    "deep_latent_gaussian",
    "exponential_gaussian",
    "factor_analysis",
    "ppca",
    "vae",
]
