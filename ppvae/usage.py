"""What the latents carry of the data: mutual information, and what each element is worth to x."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from ppvae.density import (
    LatentSite,
    Program,
    check_count,
    check_pair,
    draw_chunks,
    guided,
    judging,
    prior_and_likelihood,
)
from ppvae.diagnostics import element_names
from ppvae.isolation import check_rows
from ppvae.proposals import Proposal, proposal_of


@dataclass(frozen=True)
class MutualInformation:
    r"""The two parts of the mean KL term of the ELBO, in nats per datum, with their errors.

    The errors are Monte Carlo errors for these rows.

    Attributes:
        information: :math:`I_q(x; z)` for these rows, at most ``log(num_rows)``. For the
            distribution that the rows came from it is a lower bound in expectation.
        information_stderr: Its standard error.
        marginal_kl: :math:`\mathrm{KL}(q(z) \,\|\, p(z))` for these rows. For the distribution that
            the rows came from it is an upper bound in expectation.
        marginal_kl_stderr: Its standard error.
        kl: Their sum, the mean of :math:`\mathrm{KL}(q(z \mid x_n) \,\|\, p(z))`.
        kl_stderr: Its standard error.
        num_rows: Number of rows N.
    """

    information: float
    information_stderr: float
    marginal_kl: float
    marginal_kl_stderr: float
    kl: float
    kl_stderr: float
    num_rows: int

    @property
    def ceiling(self) -> float:
        """log N, the most that the latent of N rows can say of which row it is."""
        return math.log(self.num_rows)

    def __repr__(self) -> str:
        near = self.information > 0.9 * self.ceiling and self.num_rows > 1
        return (
            f"MutualInformation({self.information:.3f} ± {self.information_stderr:.2g} nats of at "
            f"most {self.ceiling:.3f} between {self.num_rows} rows and their latents"
            f"{', near the ceiling: with more rows it would be larger' if near else ''}; "
            f"marginal KL {self.marginal_kl:.3f} ± {self.marginal_kl_stderr:.2g}; "
            f"mean KL {self.kl:.3f} ± {self.kl_stderr:.2g})"
        )


def mutual_information(
    model: Program, guide: Program, x: Tensor, *, num_samples: int = 16, seed: int = 0
) -> MutualInformation:
    r"""How much the latents say of the row that they belong to.

    With the aggregate posterior :math:`q(z) = \frac1N \sum_m q(z \mid x_m)` of the N given rows,

    .. math::
        \underbrace{\frac1N \sum_n \mathrm{KL}(q(z \mid x_n) \,\|\, p(z))}_{\text{mean KL}} =
        \underbrace{\frac1N \sum_n \mathrm{KL}(q(z \mid x_n) \,\|\, q(z))}_{I_q(x;\, z)} +
        \underbrace{\mathrm{KL}(q(z) \,\|\, p(z))}_{\text{marginal KL}}

    (Hoffman & Johnson 2016). The first part on the right is what the latents carry. The second is
    paid for nothing: it is what the draws of all rows together miss of the prior, and with it
    of what the model generates. All three are averages over the same draws
    :math:`z_{sn} \sim q(z \mid x_n)`, and the identity holds for them exactly.

    Nothing is left out of the mixture, so that for these N rows, taken as the whole population,
    the estimates are unbiased, and :math:`I_q \le \log N`. For the distribution that the rows were
    drawn from, :math:`I_q` of N rows lies below in expectation and the marginal KL above: the
    first is concave and the second convex in the distribution of x. An information near its
    ceiling says that N is too small to see more.

    It costs :math:`S N^2` densities of the guide and :math:`S N` of the prior; the decoder runs
    :math:`S N` times too. Draws are worked off in portions, each against all N rows.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guide: A Pyro guide with the same latent sites, called as ``guide(x)``, whose density is
            known at values that it did not draw.
        x: Rows, ``(batch, *event)``.
        num_samples: Draws S per row, at least 2.
        seed: Seed of the draws; the caller's generators are left as they were.

    Returns:
        Both parts and their sum. The marginal KL and the sum are infinite where the guide draws
        values that the prior excludes.

    Raises:
        ValueError: If the guide's density is known at its own draws alone (it has auxiliary draws,
            or is a flow without an inverse), the prior differs between rows, ``num_samples`` is
            too small, or the rows, the model or the guide are unfit; see
            `ppvae.density.check_pair`.

    Example:
        >>> import pyro, torch
        >>> from ppvae import pairs
        >>> model, _ = pairs.vae(x_dim=2, z_dim=1, hidden=[8])
        >>> def guide(x):  # one bit: on which side of zero x[0] is
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample(
        ...             "z", pyro.distributions.Normal(9 * x[:, :1].sign(), 1.0).to_event(1)
        ...         )
        >>> found = mutual_information(model, guide, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> round(found.information, 3)  # log 2
        0.693
    """
    check_rows(x, model, guide)
    check_count("num_samples", num_samples, least=2)
    with judging(seed, x, model, guide), torch.no_grad():
        sites = check_pair(model, guide, x)
        try:
            proposal = proposal_of(model, guide, x, sites)
        except ValueError as error:
            raise ValueError(
                "guide: the aggregate posterior takes the density of each row's guide at the draws "
                "of all others, and this guide knows that of its own draws alone, as guides with "
                "auxiliary draws and flows without an inverse do. For the mean KL see "
                "ppvae.diagnostics.element_kl; for both parts take a guide in a family with a "
                "density everywhere, such as ppvae.fit_per_datapoint(...).guide."
            ) from error
        _check_one_prior(model, guide, x)
        parts = [_parts(proposal, model, guide, x, size) for size in draw_chunks(num_samples, x)]
    information, marginal = (torch.cat(part) for part in zip(*parts, strict=True))
    values = [_mean_of_rows(part) for part in (information, marginal, information + marginal)]
    (one, one_error), (other, other_error), (total, total_error) = values
    return MutualInformation(
        one, one_error, other, other_error, total, total_error, num_rows=len(x)
    )


def _check_one_prior(model: Program, guide: Program, x: Tensor) -> None:
    latents, _ = guided(guide, x, 1)
    own = prior_and_likelihood(model, x, latents)[0]
    rolled = {name: z.roll(1, dims=1) for name, z in latents.items()}
    again = prior_and_likelihood(model, x, rolled)[0]
    if not torch.allclose(again, own.roll(1, dims=1), rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ValueError(
            "model: its prior of the latents differs between rows, so that the rows have no "
            "aggregate KL(q(z) || p(z)). See ppvae.diagnostics.element_kl for the mean of their "
            "KLs."
        )


def _parts(
    proposal: Proposal, model: Program, guide: Program, x: Tensor, num_samples: int
) -> tuple[Tensor, Tensor]:
    """log q(z | x_n) − log q(z), and log q(z) − log p(z), at draws of each row."""
    latents, _ = guided(guide, x, num_samples)
    log_p = prior_and_likelihood(model, x, latents)[0].double()
    count = num_samples * len(x)
    flat = {name: z.reshape(count, 1, *z.shape[2:]) for name, z in latents.items()}
    own, aggregate = [], []
    start = 0
    for size in draw_chunks(count, x):
        # Each draw before every row.
        some = {
            name: z[start : start + size].expand(size, len(x), *z.shape[2:])
            for name, z in flat.items()
        }
        density = proposal.log_prob(x, proposal.params, some).double()
        row = torch.arange(start, start + size, device=x.device) % len(x)
        own.append(density.gather(1, row[:, None])[:, 0])
        aggregate.append(torch.logsumexp(density, dim=1) - math.log(len(x)))
        start += size
    shape = (num_samples, len(x))
    log_own, log_q = torch.cat(own).reshape(shape), torch.cat(aggregate).reshape(shape)
    return log_own - log_q, log_q - log_p


def _mean_of_rows(values: Tensor) -> tuple[float, float]:
    """Mean of ``(num_samples, batch)`` with independent draws, and its standard error."""
    mean = float(values.mean())
    if math.isinf(mean):
        return mean, math.inf
    error = (values.var(dim=0) / len(values)).sum().sqrt() / values.shape[1]
    return mean, float(error)


@dataclass(frozen=True)
class ElementUse:
    """What the model's reconstruction of x loses without each latent element, nats per datum.

    Attributes:
        drop: Mean over the rows, ``(elements,)``.
        stderr: Monte Carlo standard error of ``drop`` for these rows, ``(elements,)``.
        rows: The drop of each row, ``(batch, elements)``.
        rows_stderr: Its standard error, ``(batch, elements)``.
        names: Site and index of each element, such as ``"z[0]"``; a scalar, and a site whose
            elements cannot be exchanged one by one, has the site's name.
        together: The drop with all elements of another row at once; the others need not add up
            to it.
        together_stderr: Its Monte Carlo standard error.
        reconstruction: Mean over the rows of E_q[log p(x | z)], from which all drops are.
        reconstruction_stderr: Its Monte Carlo standard error.
    """

    drop: Tensor
    stderr: Tensor
    rows: Tensor
    rows_stderr: Tensor
    names: tuple[str, ...]
    together: float
    together_stderr: float
    reconstruction: float
    reconstruction_stderr: float

    def __repr__(self) -> str:
        order = self.drop.argsort(descending=True, stable=True)[:4].tolist()
        largest = ", ".join(
            f"{self.names[at]} {float(self.drop[at]):.3g} ± {float(self.stderr[at]):.2g}"
            for at in order
        )
        unused = int((self.drop <= 2 * self.stderr).sum())
        return (
            f"ElementUse(reconstruction {self.reconstruction:.4g} ± "
            f"{self.reconstruction_stderr:.2g} nats a datum, {self.together:.3g} ± "
            f"{self.together_stderr:.2g} less with another row's latents; of one element alone: "
            f"{largest}; "
            f"no drop beyond two standard errors in {unused} of {len(self.names)})"
        )


def element_use(
    model: Program, guide: Program, x: Tensor, *, num_samples: int = 64, seed: int = 0
) -> ElementUse:
    r"""What the reconstruction of each row loses when one latent element is another row's.

    .. math:: D_{nj} = E\bigl[\log p(x_n \mid z) - \log p(x_n \mid z_{-j}, z'_j)\bigr],
              \qquad z \sim q(\cdot \mid x_n), \quad z' \sim q(\cdot \mid x_m), \quad m \ne n

    with m any other row, all equally likely. The element's values are those that it takes on these
    data, in another order: what is lost is lost by being told of the wrong row. A draw from the
    prior in its place would ask the decoder about values that it may never have met, and an
    element that says the same of every row, at a distance from the prior, would seem to be of
    use; here its drop is 0 in expectation. (Shuffling one input of a predictor is the permutation
    importance of Breiman 2001.)

    All terms are on the same draws. For each draw the rows are shifted by one random number, so
    that no row meets itself; the standard error of the mean is that over the draws.

    The reconstruction term is the log density of what is observed given *all* latents. Of layers,
    one that reaches x through another latent alone has a drop of exactly 0: see
    `ppvae.diagnostics.element_kl` for it. Drops do not add up: where elements balance each other,
    one of them alone may cost more than both.

    It costs S evaluations of the decoder per row for each element, and two times S more.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guide: A Pyro guide with the same latent sites, called as ``guide(x)``.
        x: Rows, ``(batch, *event)``, at least 2.
        num_samples: Draws S per row, at least 2.
        seed: Seed of the draws; the caller's generators are left as they were.

    Returns:
        A figure for each latent element, sites in the model's order, the elements of each
        flattened. A site whose support ties its elements (a simplex, a one-hot vector) is one.

    Raises:
        ValueError: If there is one row only, ``num_samples`` is too small, or the rows, the model
            or the guide are unfit; see `ppvae.density.check_pair`.

    Example:
        >>> import pyro, torch
        >>> from ppvae.models import FactorAnalysis
        >>> loadings = torch.tensor([[1.0, 0.0], [2.0, 0.0]])  # z[1] reaches no x
        >>> model = FactorAnalysis(x_dim=2, z_dim=2, loadings=loadings)
        >>> def exact(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", model.posterior(x))
        >>> found = element_use(model, exact, torch.randn(100, 2))
        >>> bool(found.drop[0] > 0.1), float(found.drop[1])
        (True, 0.0)
    """
    check_rows(x, model, guide)
    if len(x) < 2:
        raise ValueError(
            f"x: an element's value is taken from another row, so at least 2 rows are needed; got "
            f"{len(x)}. Pass the data set, or a few hundred rows of it."
        )
    check_count("num_samples", num_samples, least=2)
    with judging(seed, x, model, guide), torch.no_grad():
        sites = list(check_pair(model, guide, x).latents.values())
        parts = [_drops(model, guide, x, size, sites) for size in draw_chunks(num_samples, x)]
    # The first column is the reconstruction itself, the last the drop without all elements.
    columns = torch.cat(parts)
    mean, stderr = columns.mean(dim=0), _stderr(columns)
    total, total_stderr = mean.mean(dim=0), _stderr(columns.mean(dim=1))
    return ElementUse(
        drop=total[1:-1],
        stderr=total_stderr[1:-1],
        rows=mean[:, 1:-1],
        rows_stderr=stderr[:, 1:-1],
        names=tuple(name for site in sites for name in _names(site)),
        together=float(total[-1]),
        together_stderr=float(total_stderr[-1]),
        reconstruction=float(total[0]),
        reconstruction_stderr=float(total_stderr[0]),
    )


def _stderr(values: Tensor) -> Tensor:
    return values.std(dim=0) / math.sqrt(len(values))


def _drops(
    model: Program, guide: Program, x: Tensor, num_samples: int, sites: Sequence[LatentSite]
) -> Tensor:
    """``(num_samples, batch, 1 + elements + 1)``: see `element_use`."""
    latents, _ = guided(guide, x, num_samples)
    count = len(x)
    shift = torch.randint(1, count, (num_samples, 1), device=x.device)
    rows = (torch.arange(count, device=x.device) + shift) % count
    draws = torch.arange(num_samples, device=x.device)[:, None]
    others = {name: z[draws, rows] for name, z in latents.items()}

    def reconstruction(values: Mapping[str, Tensor]) -> Tensor:
        return prior_and_likelihood(model, x, values)[1].double()

    own = reconstruction(latents)
    columns = [own]
    for site in sites:
        z, other = latents[site.name], others[site.name]
        if not _is_of_elements(site):
            columns.append(own - reconstruction({**latents, site.name: other}))
            continue
        flat = other.reshape(num_samples, count, -1)
        for element in range(site.size):
            mixed = z.reshape(num_samples, count, -1).clone()
            mixed[..., element] = flat[..., element]
            columns.append(own - reconstruction({**latents, site.name: mixed.reshape(z.shape)}))
    columns.append(own - reconstruction(others))
    return torch.stack(columns, dim=-1)


def _names(site: LatentSite) -> list[str]:
    return element_names(site) if _is_of_elements(site) else [site.name]


def _is_of_elements(site: LatentSite) -> bool:
    """Whether an element may take any of its values whatever the others are."""
    support: Any = site.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return int(support.event_dim) == 0
