"""Functions of tensors as graphs: captured once, replayed, compiled, checked.

Nothing here knows of Pyro. What runs a pair enters here as a function of tensors.
"""

from ppvae.graphs.capturing import Graph, NotCapturableError, capture, capturing
from ppvae.graphs.checking import far_apart, rounding_of
from ppvae.graphs.recording import not_recordable
from ppvae.graphs.repeating import Repeated
from ppvae.graphs.running import CompileError, Runner, compiled, cuda_graph, draws_kept, replayed
from ppvae.graphs.watching import Watch

__all__ = [
    "CompileError",
    "Graph",
    "NotCapturableError",
    "Repeated",
    "Runner",
    "Watch",
    "capture",
    "capturing",
    "compiled",
    "cuda_graph",
    "draws_kept",
    "far_apart",
    "not_recordable",
    "replayed",
    "rounding_of",
]
