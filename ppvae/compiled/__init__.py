"""Steps of stochastic variational inference as one graph of tensor operations.

A Pyro pair stays the plain functions that it is. Pyro itself runs once under proxy tensors; what
it asked of torch, with the gradients and the optimizer's update, is then one graph, which needs
neither Pyro nor autograd from there on.
"""

from ppvae.compiled.reporting import CompileReport, CompileWarning, Signature
from ppvae.compiled.svi import SVI

__all__ = ["SVI", "CompileReport", "CompileWarning", "Signature"]
