"""A guide for latents that all rows share, such as the weights of a Bayesian neural network."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from ppvae.families import Family
from ppvae.guides import Amortized
from ppvae.isolation import OwnedModule


class Shared(OwnedModule):
    r"""A guide whose parameters are one row λ, the same for all data.

    .. math:: q(w) \prod_n q(z_n \mid x_n)

    The site w lies outside of the plate over the rows. Its family is any that the package has;
    its parameters are there from the start, so that a ``state_dict`` of one guide loads into
    another. Latents that belong to a row, if the model has them, come from an amortized guide.

    Args:
        family: The variational family of the shared site.
        site: Name of the shared site.
        local: A guide for the sites of the rows.
        num_data: Number N of data, as in the model: with a minibatch of B rows the local guide
            weighs N/B. The rows are all data if left out.

    Example:
        >>> from ppvae.families import DiagonalNormal
        >>> Shared(DiagonalNormal(61))
        Shared(DiagonalNormal(61), site='weights')
    """

    def __init__(
        self,
        family: Family,
        *,
        site: str = "weights",
        local: Amortized | None = None,
        num_data: int | None = None,
    ) -> None:
        super().__init__()
        self.family, self.site, self.num_data = family, site, num_data
        self.local = local
        self.params = nn.Parameter(torch.zeros(family.num_params))

    def distribution(self) -> Any:
        """q(w), a Pyro distribution without batch dimensions."""
        return self.family.distribution(self.params)

    def forward(self, x: Tensor | None = None, size: int | None = None) -> dict[str, Tensor]:
        """The guide as a Pyro program: draws the shared latent, and those of rows ``x``, by site.

        Raises:
            ValueError: If there is a local guide and no rows.
        """
        values = {self.site: pyro.sample(self.site, self.distribution())}
        if self.local is None:
            return values
        weight = 1.0 if x is None or self.num_data is None else self.num_data / len(x)
        with poutine.scale(scale=weight):
            drawn = self.local(x)
        return values | (
            drawn if isinstance(drawn, dict) else {next(iter(self.local.families)): drawn}
        )

    def __repr__(self) -> str:
        local = "" if self.local is None else f", local={self.local!r}"
        return f"Shared({self.family!r}, site={self.site!r}{local})"
