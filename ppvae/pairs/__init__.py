"""Ready-made (model, guide) pairs: what people import.

Each works with `pyro.infer.SVI` under `Trace_ELBO` and `TraceMeanField_ELBO`, with `Predictive`,
and with `ppvae.fit`.
"""

from ppvae.pairs.bayesian_neural_network import bayesian_neural_network, latent_input_network
from ppvae.pairs.layered import deep_exponential_family, deep_latent_gaussian
from ppvae.pairs.semisupervised_vae import semisupervised_vae
from ppvae.pairs.sigmoid_belief_network import sigmoid_belief_network
from ppvae.pairs.tractable import (
    exponential_gaussian,
    factor_analysis,
    gaussian_mixture,
    linear_state_space,
    ppca,
)
from ppvae.pairs.vae import vae

__all__ = [
    "bayesian_neural_network",
    "deep_exponential_family",
    "deep_latent_gaussian",
    "exponential_gaussian",
    "factor_analysis",
    "gaussian_mixture",
    "latent_input_network",
    "linear_state_space",
    "ppca",
    "semisupervised_vae",
    "sigmoid_belief_network",
    "vae",
]
