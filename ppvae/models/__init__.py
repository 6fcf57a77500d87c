"""Generative processes, written as Pyro models: a file each.

A model is called with rows, ``model(x)``, to condition on them, or with a number of rows,
``model(size=n)``, to draw from it. A tractable model also has ``log_evidence(x)`` and
``posterior(x)``.
"""

from ppvae.models.autoencoder import Autoencoder
from ppvae.models.bayesian_neural_network import (
    BayesianNeuralNetwork,
    LatentInputNetwork,
    Prediction,
    TargetsGivenInputs,
)
from ppvae.models.deep_exponential_family import DeepExponentialFamily
from ppvae.models.deep_latent_gaussian import DeepLatentGaussian
from ppvae.models.exponential_gaussian import ExponentialGaussian
from ppvae.models.gaussian_mixture import GaussianMixture
from ppvae.models.implicit import ImplicitModel
from ppvae.models.linear_gaussian import PPCA, FactorAnalysis
from ppvae.models.linear_state_space import LinearStateSpace
from ppvae.models.semisupervised_vae import SemisupervisedVAE
from ppvae.models.sigmoid_belief_network import SigmoidBeliefNetwork
from ppvae.models.vae import VAE

__all__ = [
    "PPCA",
    "VAE",
    "Autoencoder",
    "BayesianNeuralNetwork",
    "DeepExponentialFamily",
    "DeepLatentGaussian",
    "ExponentialGaussian",
    "FactorAnalysis",
    "GaussianMixture",
    "ImplicitModel",
    "LatentInputNetwork",
    "LinearStateSpace",
    "Prediction",
    "SemisupervisedVAE",
    "SigmoidBeliefNetwork",
    "TargetsGivenInputs",
]
