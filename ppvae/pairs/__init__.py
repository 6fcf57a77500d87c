"""Ready-made (model, guide) pairs: what people import.

Each works with `pyro.infer.SVI` under `Trace_ELBO` and `TraceMeanField_ELBO`, with `Predictive`,
and with `ppvae.fit`.
"""

from ppvae.pairs.bayesian_neural_network import bayesian_neural_network, latent_input_network
from ppvae.pairs.sigmoid_belief_network import sigmoid_belief_network
from ppvae.pairs.tractable import exponential_gaussian, factor_analysis, ppca
from ppvae.pairs.vae import vae

__all__ = [
    "bayesian_neural_network",
    "exponential_gaussian",
    "factor_analysis",
    "latent_input_network",
    "ppca",
    "sigmoid_belief_network",
    "vae",
]
