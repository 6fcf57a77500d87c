"""Ready-made (model, guide) pairs: what people import.

Each works with `pyro.infer.SVI` under `Trace_ELBO` and `TraceMeanField_ELBO`, with `Predictive`,
and with `ppvae.fit`.
"""

from ppvae.pairs.bayesian_neural_network import bayesian_neural_network, latent_input_network
from ppvae.pairs.semisupervised_vae import (
    SemisupervisedEncoder,
    classify,
    semisupervised_vae,
)
from ppvae.pairs.tractable import exponential_gaussian, factor_analysis, ppca
from ppvae.pairs.vae import vae

__all__ = [
    "SemisupervisedEncoder",
    "bayesian_neural_network",
    "classify",
    "exponential_gaussian",
    "factor_analysis",
    "latent_input_network",
    "ppca",
    "semisupervised_vae",
    "vae",
]
