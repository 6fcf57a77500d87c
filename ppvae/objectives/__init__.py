r"""Objectives for `ppvae.fit` and classic `SVI` that Pyro does not have, as Pyro `ELBO` objects.

Each is maximised; what is minimised is its negative, in nats, summed over the rows. They differ
in what they estimate, the target, and in how they estimate its gradient;
`ppvae.gradient_variance` measures the second on a pair.
"""

from ppvae.objectives.annealed import BetaELBO, FreeBitsELBO
from ppvae.objectives.base import Objective
from ppvae.objectives.importance import IWAE, DReG
from ppvae.objectives.pathwise import StickingTheLanding
from ppvae.objectives.schedules import Cyclical, Linear
from ppvae.objectives.score import VIMCO, ScoreFunctionELBO
from ppvae.objectives.semisupervised import SemisupervisedELBO

__all__ = [
    "IWAE",
    "VIMCO",
    "BetaELBO",
    "Cyclical",
    "DReG",
    "FreeBitsELBO",
    "Linear",
    "Objective",
    "ScoreFunctionELBO",
    "SemisupervisedELBO",
    "StickingTheLanding",
]
