"""Guides: a variational family times a parameter source.

`Amortized` reads the parameters of q(z_n) off an encoder network; `PerDatapoint` keeps a row of
them for every datum; `per_datapoint` turns any guide into the latter, starting from its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.baselines import Baseline
from ppvae.density import ModelSites, Program, check_pair, judging
from ppvae.families import Family, held_fixed, in_order, split_sites, weights_of
from ppvae.freeing import Reading, read_families, read_free
from ppvae.isolation import OwnedModule, check_rows, device_of
from ppvae.nn import MLP, BottomUp, Table


def _need_rows(guide: OwnedModule, x: Tensor | None) -> Tensor:
    if x is None:
        raise ValueError(
            f"{type(guide).__name__} needs the rows x that it is to describe, shape "
            f"(batch, *event); got None. Call guide(x)."
        )
    return x


class Amortized(OwnedModule):
    r"""A guide whose parameters come from a network: :math:`\lambda_n = \mathrm{NN}(x_n)`.

    Args:
        family: The variational family, or one for each latent site by name; a `Given` stands
            after the site that it hangs on.
        encoder: From rows ``(batch, *event)`` to ``(batch, num_params)``, the parameters of all
            sites one after the other; rows that are scalars reach it as ``(batch, 1)``.
        site: Name of the latent site, where one family is given.
        plate: Name of the plate over the rows.
        baseline: What `TraceGraph_ELBO` subtracts from the learning signal of latents whose draws
            are not reparameterised. It is trained by that loss, and is no part of q.

    Raises:
        ValueError: If there is no family, or the baseline is for other sites; on a call whose
            encoder output is not ``(batch, num_params)``.

    Example:
        >>> from ppvae.families import LogNormal
        >>> from ppvae.nn import MLP
        >>> Amortized(LogNormal(), MLP(1, [32, 32], LogNormal().num_params))
        Amortized(LogNormal(), MLP(1 -> 32 -> 32 -> 2, ELU), site='z')
    """

    def __init__(
        self,
        family: Family | Mapping[str, Family],
        encoder: nn.Module,
        *,
        site: str = "z",
        plate: str = "data",
        baseline: Baseline | None = None,
    ) -> None:
        super().__init__()
        self.families = _by_name(family, site)
        if baseline is not None and set(baseline.sites) != set(self.families):
            raise ValueError(
                f"baseline: expected predictions for the latent sites {list(self.families)}; got "
                f"{list(baseline.sites)}."
            )
        self.encoder = encoder
        self.baseline = baseline
        self.plate = plate
        # Flows have weights of their own, which are trained with the encoder.
        self.trained_families = _weights(self.families)

    @property
    def family(self) -> Family:
        """The family of the only latent site.

        Raises:
            ValueError: If there are several sites; see `families`.
        """
        if len(self.families) > 1:
            raise ValueError(
                f"The guide has a family for each of the sites {list(self.families)}: use "
                f"guide.families."
            )
        return next(iter(self.families.values()))

    def params(self, x: Tensor) -> Tensor:
        """λ of all sites for these rows, ``(batch, num_params)``."""
        out: Tensor = self.encoder(x[:, None] if x.dim() == 1 else x)
        expected = (x.shape[0], sum(f.num_params for f in self.families.values()))
        if tuple(out.shape) != expected:
            raise ValueError(
                f"encoder: expected outputs of shape {expected} for {_described(self.families)}; "
                f"got {tuple(out.shape)}. Give it family.num_params = {expected[1]} outputs."
            )
        return out

    def by_site(self, params: Tensor) -> dict[str, Tensor]:
        """λ of all sites, ``(batch, num_params)``, site by site."""
        return split_sites(self.families, params)

    def forward(
        self, x: Tensor | None = None, size: int | None = None
    ) -> Tensor | dict[str, Tensor]:
        """The guide as a Pyro program: draws z for every row, or by site where there are more."""
        x = _need_rows(self, x)
        params, baseline = self.params(x), self.baseline
        values: dict[str, Tensor] = {}
        infer = {
            name: baseline.infer(name, len(family.event_shape), x, values)
            for name, family in self.families.items()
            if baseline is not None
        }
        _ = self.trained_families  # Reading it is what tells Pyro of the parameters.
        with pyro.plate(self.plate, params.shape[0], dim=-1):
            _draw(self.families, self.by_site(params), values, infer)
        return next(iter(values.values())) if len(values) == 1 else values

    def __repr__(self) -> str:
        if len(self.families) == 1:
            ((site, family),) = self.families.items()
            return f"Amortized({family!r}, {self.encoder!r}, site={site!r})"
        return f"Amortized({_described(self.families)}, {self.encoder!r})"


def _by_name(family: Family | Mapping[str, Family], site: str) -> dict[str, Family]:
    families = {site: family} if isinstance(family, Family) else dict(family)
    if not families:
        raise ValueError("family: expected at least one latent site with its family; got none.")
    if list(in_order(families, families)) != list(families):
        raise ValueError(
            f"family: a Given stands after the site that it hangs on; got {list(families)}."
        )
    return families


def _weights(families: Mapping[str, Family]) -> nn.ModuleList:
    """What families share between all data, for a guide to own."""
    return nn.ModuleList(part for family in families.values() for part in weights_of(family))


def _trains(families: Mapping[str, Family]) -> bool:
    modules = [part for family in families.values() for part in weights_of(family)]
    return any(p.requires_grad for part in modules for p in part.parameters())


def _described(families: Mapping[str, Family]) -> str:
    if len(families) == 1:
        return repr(next(iter(families.values())))
    return "{" + ", ".join(f"{name!r}: {family!r}" for name, family in families.items()) + "}"


def _draw(
    families: Mapping[str, Family],
    params: Mapping[str, Tensor],
    values: dict[str, Tensor],
    infer: Mapping[str, dict[str, Any]],
) -> dict[str, Tensor]:
    """Draw the sites one after the other into ``values``, with ``infer`` by site for Pyro."""
    for name, family in families.items():
        member = family.member(params[name], values)
        values[name] = pyro.sample(name, member, infer=infer.get(name))
    return values


class PerDatapoint(OwnedModule):
    r"""A guide with free parameters for every datum: :math:`\lambda_n` is a row of a table.

    Trained on all rows it is called as ``guide(x)``; on a minibatch inside `rows`, which says
    which of its rows are meant. A row of the table belongs to one datum: with other data of the
    same number the guide runs, but describes the data that it was fitted to.

    Args:
        family: The variational family, or one for each latent site by name.
        num_data: Number of rows of the table.
        site: Name of the latent site, where one family is given.
        plate: Name of the plate over the rows.

    Example:
        >>> from ppvae.families import LogNormal
        >>> PerDatapoint(LogNormal(), num_data=100)
        PerDatapoint(LogNormal(), Table(100 rows x 2), site='z')
    """

    def __init__(
        self,
        family: Family | Mapping[str, Family],
        num_data: int,
        *,
        site: str = "z",
        plate: str = "data",
    ) -> None:
        super().__init__()
        self.families = _by_name(family, site)
        self.num_data, self.plate = num_data, plate
        self.tables = nn.ModuleDict(
            {_key(name): Table(num_data, f.num_params) for name, f in self.families.items()}
        )
        # Of a freed guide they are frozen.
        self.shared_weights = _weights(self.families)
        self._rows: Tensor | None = None

    def table(self, site: str) -> Table:
        """The table of a latent site."""
        table = self.tables[_key(site)]
        assert isinstance(table, Table)
        return table

    @contextmanager
    def rows(self, index: Tensor | slice) -> Iterator[PerDatapoint]:
        """Inside, calls are about the rows ``index`` of the table, in that order.

        Example:
            >>> import torch
            >>> from ppvae.families import LogNormal
            >>> guide = PerDatapoint(LogNormal(), num_data=100)
            >>> with guide.rows(torch.tensor([7, 3])):
            ...     guide(torch.zeros(2))["z"].shape
            torch.Size([2])
        """
        before = self._rows
        everything = torch.arange(self.num_data, device=device_of(self))
        self._rows = everything[index]
        try:
            yield self
        finally:
            self._rows = before

    def params(self, x: Tensor) -> dict[str, Tensor]:
        """λ by site, ``(batch, num_params)``, for the current rows."""
        expected = self.num_data if self._rows is None else len(self._rows)
        if x.shape[0] != expected:
            raise ValueError(
                f"PerDatapoint: expected x with {expected} rows, one for each row of the table; "
                f"got {tuple(x.shape)}. For a minibatch say which rows it holds: "
                f"`with guide.rows(index): ...`. New data need a fit of their own: "
                f"ppvae.fit_per_datapoint."
            )
        return {name: self.table(name)(self._rows) for name in self.families}

    def forward(self, x: Tensor | None = None, size: int | None = None) -> dict[str, Tensor]:
        """The guide as a Pyro program: draws the latents of every row, by site."""
        params = self.params(_need_rows(self, x))
        if _trains(self.families):
            _ = self.shared_weights  # As in `Amortized`; Pyro would warn of frozen ones.
        with pyro.plate(self.plate, len(next(iter(params.values()))), dim=-1):
            return _draw(self.families, params, {}, {})

    def __repr__(self) -> str:
        parts = [f"{f!r}, {self.table(n)!r}, site={n!r}" for n, f in self.families.items()]
        return f"PerDatapoint({'; '.join(parts)})"


class TopDown(OwnedModule):
    r"""A guide for layers of normal latents that keeps what ties them together.

    .. math:: q(z \mid x) = q(z_L \mid x)\, q(z_{L-1} \mid x, z_L) \cdots q(z_1 \mid x, z_2)

    A bottom-up network gives a message :math:`N(\hat\mu_l(x), \hat\sigma_l^2(x))` for each
    layer, and a network from the layer above another, :math:`N(\mu_l(z_{l+1}), s_l^2)`. The two
    are multiplied:

    .. math::
        q(z_l \mid x, z_{l+1}) = N(m, v), \qquad
        v^{-1} = \hat\sigma_l^{-2} + s_l^{-2}, \qquad
        m = v\,(\hat\mu_l / \hat\sigma_l^2 + \mu_l(z_{l+1}) / s_l^2)

    The deepest layer has the bottom-up message alone. The parameters of a layer hang on the draw
    of the layer above, so that no row of a table could hold them: `per_datapoint` refuses this
    guide, and `ppvae.compare` measures it against a family that is named,
    ``family={"z_1": ..., "z_2": ...}``. It may beat the best member of such a family.

    Source: Sønderby et al. (2016), eq. 9 to 12. There the messages from above are the generative
    model's own; here they have weights of their own, and model and guide share no parameters.

    Args:
        sites: Names of the latent sites, the one nearest to x first; at least two.
        z_dims: Their sizes.
        encoder: The bottom-up network, with ``2 * z_dims[l]`` outputs for layer l: means and log
            standard deviations.
        hidden: Widths of the hidden layers of the networks from above.
        activation: Class of the activation between their layers.
        plate: Name of the plate over the rows.

    Raises:
        ValueError: If names, sizes and the encoder's outputs do not go together.

    Example:
        >>> from ppvae.nn import BottomUp
        >>> TopDown(["z_1", "z_2"], [4, 2], BottomUp(64, [16], [8, 4]), [16])
        TopDown(BottomUp(64 -> 16 -> 16, outputs (8, 4), ELU), sites=('z_1', 'z_2'))
    """

    def __init__(
        self,
        sites: Sequence[str],
        z_dims: Sequence[int],
        encoder: BottomUp,
        hidden: Sequence[int],
        activation: type[nn.Module] = nn.ELU,
        *,
        plate: str = "data",
    ) -> None:
        super().__init__()
        self.sites, self.plate = tuple(sites), plate
        wanted = tuple(2 * size for size in z_dims)
        if len(self.sites) < 2 or len(self.sites) != len(wanted):
            raise ValueError(
                f"TopDown: expected the names and sizes of at least two layers; got sites "
                f"{self.sites} and z_dims {tuple(z_dims)}. For one layer use Amortized."
            )
        if encoder.out_features != wanted:
            raise ValueError(
                f"encoder: expected outputs {wanted}, a mean and a log standard deviation for "
                f"each element of the sites {self.sites}; got {encoder.out_features}."
            )
        self.encoder = encoder
        self.from_above = nn.ModuleList(
            MLP(above, hidden, size, activation) for size, above in pairwise(z_dims)
        )
        self.log_scales = nn.ParameterList(torch.zeros(size) for size in z_dims[:-1])

    def forward(self, x: Tensor | None = None, size: int | None = None) -> dict[str, Tensor]:
        """The guide as a Pyro program: draws the latents of every row, by site."""
        x = _need_rows(self, x)
        messages = [output.chunk(2, dim=-1) for output in self.encoder.outputs(x)]
        values: dict[str, Tensor] = {}
        with pyro.plate(self.plate, x.shape[0], dim=-1):
            for layer in reversed(range(len(self.sites))):
                loc, log_scale = messages[layer]
                if values:
                    above = self.from_above[layer](values[self.sites[layer + 1]])
                    # The share of the message from below in the sum of the precisions.
                    log_ratio = 2 * (self.log_scales[layer] - log_scale)
                    loc = above + torch.sigmoid(log_ratio) * (loc - above)
                    log_scale = log_scale + 0.5 * nn.functional.logsigmoid(log_ratio)
                fn = dist.Normal(loc, torch.exp(log_scale).expand(loc.shape)).to_event(1)
                values[self.sites[layer]] = pyro.sample(self.sites[layer], fn)
        return values

    def __repr__(self) -> str:
        return f"TopDown({self.encoder!r}, sites={self.sites})"


def _key(site: str) -> str:
    # Torch allows no dots in the names of submodules; Pyro's sites often have them.
    return "site_" + site.replace(".", "__")


def per_datapoint(guide: Program, x: Tensor, *, model: Program | None = None) -> PerDatapoint:
    """Free a guide: a row of parameters per datum, starting from the guide's output for it.

    Args:
        guide: `Amortized`, `PerDatapoint`, or any Pyro guide whose latent sites are drawn from
            distributions with parameters that depend on x alone: reparameterised ones of torch
            and Pyro, also behind fixed transforms, and those of `AutoNormal` and `EasyGuide`.
        x: Rows, ``(batch, *event)``.
        model: If given, the guide's sites are checked against it. Guides that make their sites
            from auxiliary draws, as `AutoNormal` does, need it.

    Returns:
        A guide for these rows with the same site distributions, whose table holds the guide's
        parameters for them. The guide that was given is not changed. The weights of a family such
        as `Flow` are copied and held fixed: training the guide does not change the freed one.

    Raises:
        ValueError: If a site cannot be freed (named): its distribution depends on another latent
            variable, has no reparameterised draws, shares parameters with another site's, or is
            behind a transform that differs between rows.

    Example:
        >>> import torch
        >>> from ppvae import pairs
        >>> model, guide = pairs.exponential_gaussian()
        >>> per_datapoint(guide, torch.tensor([0.5, 1.5]))
        PerDatapoint(LogNormal(), Table(2 rows x 2), site='z')
    """
    check_rows(x, guide)
    with judging(0, x, guide, model), torch.no_grad():
        sites = None if model is None else check_pair(model, guide, x)
        reading = read_params(guide, x, sites)
    families = {name: held_fixed(family) for name, family in reading.families.items()}
    freed = PerDatapoint(families, x.shape[0], plate=reading.plate)
    for name, value in reading.params.items():
        freed.table(name).weight = nn.Parameter(value.detach().clone())
    return freed


def read_params(
    guide: Program, x: Tensor, sites: ModelSites | None = None, *, once: bool = False
) -> Reading:
    """A guide's families and its λ for these rows, differentiable in the guide's parameters.

    For code that provides the contexts of `ppvae.density.judging` itself.

    Args:
        guide: The guide.
        x: Rows.
        sites: What is known of the model.
        once: Whether to leave out the check that λ does not hang on random numbers.
    """
    if isinstance(guide, Amortized):
        params = guide.params(x)
        if not once and not torch.allclose(params, guide.params(x), rtol=1e-5, atol=1e-6):
            raise ValueError(
                f"Site {', '.join(map(repr, guide.families))}: the encoder's output for the same "
                f"rows is another one at each call, in eval mode too. Use layers that heed eval "
                f"mode."
            )
        return Reading(guide.plate, guide.families, guide.by_site(params))
    if isinstance(guide, PerDatapoint):
        return Reading(guide.plate, guide.families, guide.params(x))
    return read_families(guide, x, sites) if once else read_free(guide, x, sites)
