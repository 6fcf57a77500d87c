r"""Variational families: which distributions over z are allowed.

A family turns a row of unconstrained numbers λ into a distribution. Where λ comes from, a network
or a table, is the guide's business (`ppvae.guides`): swapping only the source isolates
amortization, swapping only the family isolates approximation.

λ = 0 is each family's neutral member, the cold start of per-datapoint fits: a standard normal, a
standard log-normal, an exponential with rate 1, the truncated standard normal, fair coins. Of a
`Flow` it is its map of the standard normal.
"""

from ppvae.families.base import (
    BUILT_IN,
    Family,
    GaussianFamily,
    held_fixed,
    in_order,
    innermost,
    split_sites,
    weights_of,
)
from ppvae.families.composed import (
    DistributionFamily,
    Transformed,
    TransformedGaussian,
    argument_names,
    same_family,
    transformed,
)
from ppvae.families.discrete import Bernoulli, Categorical, DiscreteFamily, Given
from ppvae.families.flow import ConditionalFlow, Flow
from ppvae.families.named import (
    BlockNormal,
    DiagonalNormal,
    FullRankNormal,
    Gamma,
    LogNormal,
    TruncatedNormal,
    Weibull,
)

__all__ = [
    "BUILT_IN",
    "Bernoulli",
    "BlockNormal",
    "Categorical",
    "ConditionalFlow",
    "DiagonalNormal",
    "DiscreteFamily",
    "DistributionFamily",
    "Family",
    "Flow",
    "FullRankNormal",
    "Gamma",
    "GaussianFamily",
    "Given",
    "LogNormal",
    "Transformed",
    "TransformedGaussian",
    "TruncatedNormal",
    "Weibull",
    "argument_names",
    "held_fixed",
    "in_order",
    "innermost",
    "same_family",
    "split_sites",
    "transformed",
    "weights_of",
]
