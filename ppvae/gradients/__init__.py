r"""How noisy is the gradient of an objective, and what does a draw of it cost?

Stochastic variational inference follows an estimate of the gradient. Estimators of the gradient of
one objective have the same mean, and differ in variance and in cost: `gradient_variance` measures
both, on given rows, for Pyro's objectives and those of `ppvae.objectives`.
"""

from ppvae.gradients.measuring import gradient_variance
from ppvae.gradients.result import PROGRAMS, GradientVariance

__all__ = ["PROGRAMS", "GradientVariance", "gradient_variance"]
