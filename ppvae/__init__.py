r"""Is my amortized guide good enough, where does it fall short, what would a repair cost?

A guide is a variational family times a parameter source: an encoder network, or a table with a
row per datum. Swapping only the source isolates amortization; swapping only the family isolates
approximation. `compare` measures both, datum by datum, for any Pyro pair with one local plate.
"""

from importlib.metadata import version

from ppvae import (
    data,
    density,
    diagnostics,
    evidence,
    families,
    generation,
    guides,
    likelihoods,
    models,
    nn,
    pairs,
    plots,
)
from ppvae.adversarial import AdversarialFit, fit_adversarial
from ppvae.comparison import compare
from ppvae.density import log_joint, log_weights
from ppvae.evidence import Estimate, elbo, iwae, quadrature
from ppvae.explanation import Explanation, explain
from ppvae.guides import Amortized, PerDatapoint, per_datapoint
from ppvae.ledger import Comparison
from ppvae.local import LocalFit, fit_per_datapoint
from ppvae.reconstruction import fit_autoencoder
from ppvae.refinement import Refinement, refine
from ppvae.repairs import RepairCosts, repair_costs
from ppvae.training import Fit, fit

__version__ = version("ppvae")

__all__ = [
    "AdversarialFit",
    "Amortized",
    "Comparison",
    "Estimate",
    "Explanation",
    "Fit",
    "LocalFit",
    "PerDatapoint",
    "Refinement",
    "RepairCosts",
    "compare",
    "data",
    "density",
    "diagnostics",
    "elbo",
    "evidence",
    "explain",
    "families",
    "fit",
    "fit_adversarial",
    "fit_autoencoder",
    "fit_per_datapoint",
    "generation",
    "guides",
    "iwae",
    "likelihoods",
    "log_joint",
    "log_weights",
    "models",
    "nn",
    "pairs",
    "per_datapoint",
    "plots",
    "quadrature",
    "refine",
    "repair_costs",
]
