r"""Is my amortized guide good enough, where does it fall short, what would a repair cost?

A guide is a variational family times a parameter source: an encoder network, or a table with a
row per datum. Swapping only the source isolates amortization; swapping only the family isolates
approximation. `compare` measures both, datum by datum, for any Pyro pair with one local plate.
"""

from importlib.metadata import version

from ppvae import (
    annealing,
    classical,
    data,
    density,
    diagnostics,
    evidence,
    families,
    generation,
    gradients,
    guides,
    likelihoods,
    models,
    nn,
    objectives,
    pairs,
    plots,
)
from ppvae.adversarial import AdversarialFit, fit_adversarial
from ppvae.alternating import Alternation, fit_alternating
from ppvae.annealing import AnnealedEstimate, Sandwich, ais, sandwich
from ppvae.calibration import Calibration, calibrate
from ppvae.classification import classify
from ppvae.comparison import compare
from ppvae.compiled import SVI, CompileReport, CompileWarning
from ppvae.consequences import Consequences, consequences
from ppvae.density import log_joint, log_weights
from ppvae.diagnostics import WeightDiagnostics, weight_diagnostics
from ppvae.evidence import Estimate, elbo, enumeration, iwae, quadrature
from ppvae.explanation import Explanation, explain
from ppvae.gradients import GradientVariance, gradient_variance
from ppvae.guides import Amortized, PerDatapoint, per_datapoint
from ppvae.inference_data import to_datatree
from ppvae.ledger import Comparison
from ppvae.local import LocalFit, fit_per_datapoint
from ppvae.pooling import PooledEstimate, log_evidence
from ppvae.reconstruction import fit_autoencoder
from ppvae.refinement import Refinement, refine
from ppvae.repairs import RepairCosts, repair_costs
from ppvae.simulation import Simulated, simulate
from ppvae.timing import ElboAgainstTime, elbo_against_time
from ppvae.training import Fit, fit
from ppvae.usage import ElementUse, MutualInformation, element_use, mutual_information

__version__ = version("ppvae")

__all__ = [
    "SVI",
    "AdversarialFit",
    "Alternation",
    "Amortized",
    "AnnealedEstimate",
    "Calibration",
    "Comparison",
    "CompileReport",
    "CompileWarning",
    "Consequences",
    "ElboAgainstTime",
    "ElementUse",
    "Estimate",
    "Explanation",
    "Fit",
    "GradientVariance",
    "LocalFit",
    "MutualInformation",
    "PerDatapoint",
    "PooledEstimate",
    "Refinement",
    "RepairCosts",
    "Sandwich",
    "Simulated",
    "WeightDiagnostics",
    "ais",
    "annealing",
    "calibrate",
    "classical",
    "classify",
    "compare",
    "consequences",
    "data",
    "density",
    "diagnostics",
    "elbo",
    "elbo_against_time",
    "element_use",
    "enumeration",
    "evidence",
    "explain",
    "families",
    "fit",
    "fit_adversarial",
    "fit_alternating",
    "fit_autoencoder",
    "fit_per_datapoint",
    "generation",
    "gradient_variance",
    "gradients",
    "guides",
    "iwae",
    "likelihoods",
    "log_evidence",
    "log_joint",
    "log_weights",
    "models",
    "mutual_information",
    "nn",
    "objectives",
    "pairs",
    "per_datapoint",
    "plots",
    "quadrature",
    "refine",
    "repair_costs",
    "sandwich",
    "simulate",
    "to_datatree",
    "weight_diagnostics",
]
