"""What `ppvae.pairs` has ready made, in a table."""

from __future__ import annotations

from dataclasses import dataclass

_NORMALS = ("DiagonalNormal", "BlockNormal", "FullRankNormal")
_UP_TO_TWO = "quadrature up to 2 dimensions"


@dataclass(frozen=True)
class PairDescription:
    """A function of `ppvae.pairs`.

    Attributes:
        name: Its name.
        latent: Its latent variables.
        likelihood: How data come from them.
        families: Variational families of its guide, or in words what stands in their place.
        evidence: How log p(x) is found without an error from sampling.
    """

    name: str
    latent: str
    likelihood: str
    families: tuple[str, ...]
    evidence: str

    @property
    def page(self) -> str:
        """Its page in the documentation."""
        return f"docs/models/{self.name}.md"


PAIRS: tuple[PairDescription, ...] = (
    PairDescription(
        "exponential_gaussian",
        "one, positive",
        "normal, fixed",
        ("LogNormal", "Gamma", "Weibull", "TruncatedNormal"),
        "closed form",
    ),
    PairDescription(
        "factor_analysis", "real vector", "normal, per dimension", _NORMALS, "closed form"
    ),
    PairDescription("ppca", "real vector", "normal, one scale", _NORMALS, "closed form"),
    PairDescription(
        "gaussian_mixture", "a category", "normal, per component", ("Categorical",), "closed form"
    ),
    PairDescription("linear_state_space", "a path", "normal", _NORMALS, "closed form"),
    PairDescription(
        "vae",
        "real vector",
        "Bernoulli, Gaussian, Categorical, Poisson, NegativeBinomial",
        (*_NORMALS, "Flow", "ConditionalFlow"),
        _UP_TO_TWO,
    ),
    PairDescription(
        "deep_latent_gaussian", "layers of real vectors", "those of vae", _NORMALS, _UP_TO_TWO
    ),
    PairDescription(
        "sigmoid_belief_network",
        "layers of binary vectors",
        "Bernoulli",
        ("Bernoulli",),
        "enumeration up to 14 units",
    ),
    PairDescription(
        "deep_exponential_family",
        "layers of positive vectors",
        "Poisson",
        ("Gamma", "Weibull", "LogNormal"),
        _UP_TO_TWO,
    ),
    PairDescription(
        "bayesian_neural_network",
        "weights shared by all rows",
        "normal",
        ("over all weights: mean field or low rank",),
        "none per row; of a linear network in closed form",
    ),
    PairDescription(
        "latent_input_network",
        "real vector",
        "normal",
        _NORMALS,
        f"{_UP_TO_TWO}; closed form of a linear network",
    ),
    PairDescription(
        "semisupervised_vae",
        "a category and a real vector",
        "those of vae",
        ("Categorical", "Given"),
        "importance weighted only",
    ),
)
"""The ready-made pairs, in the order of the documentation's table."""
