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
from ppvae.models.exponential_gaussian import ExponentialGaussian
from ppvae.models.implicit import ImplicitModel
from ppvae.models.linear_gaussian import PPCA, FactorAnalysis
from ppvae.models.semisupervised_vae import SemisupervisedVAE
from ppvae.models.vae import VAE

__all__ = [
    "PPCA",
    "VAE",
    "Autoencoder",
    "BayesianNeuralNetwork",
    "ExponentialGaussian",
    "FactorAnalysis",
    "ImplicitModel",
    "LatentInputNetwork",
    "Prediction",
    "SemisupervisedVAE",
    "TargetsGivenInputs",
]
