"""Diagnostics: per datum from log weights, per latent element from draws and KL terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppvae.density import (
    LatentSite,
    Program,
    check_count,
    check_pair,
    draw_chunks,
    judging,
    prior_draws,
    weigh,
    weighed,
)
from ppvae.divergence import Latent, check_no_auxiliary, latents
from ppvae.evidence import Estimate, iwae_of
from ppvae.isolation import check_rows, unvalidated
from ppvae.terms import Drawn

# ArviZ needs five weights in the tail, which is a fifth of them.
_LEAST_DRAWS = 25
# Weights this close, in nats, are equal: what differs is rounding.
_EQUAL = 1e-4
# Nats below the largest weight of a row at which another one counts as zero.
_NOTHING = 700.0
# Share of the draws that an effective sample size takes at least for the weights to be flat.
FLAT = 0.9
# Rows that a text lists.
_LISTED = 5
# Draws of a latent element from which its prior's variance is found, to some 1.4 %.
_PRIOR_DRAWS = 20_000
# P(Z < 1) of a standard normal Z: between the quantiles at this and its complement lie two of
# its standard deviations.
_ONE_SIGMA = 0.8413447460685429


def pareto_k(weights: Tensor) -> Tensor:
    r"""Pareto k-hat of the importance weights of each row (Vehtari et al. 2024).

    The shape of a generalised Pareto distribution fitted to the largest weights, by ArviZ. Below
    :math:`\min(1 - 1/\log_{10} S, 0.7)` importance weighting is reliable with S draws. It speaks
    of the right tail alone, and misleads on one-dimensional latents; see `weight_diagnostics`.

    Args:
        weights: Log weights, ``(num_samples, batch)``, nats.

    Returns:
        ``(batch,)``; −inf where the weights of a row, or the largest of them, are equal; NaN
        where nearly all are zero or one is no number, and with fewer than 25 draws.

    Example:
        >>> import torch
        >>> levels = (torch.arange(1000) + 0.5) / 1000
        >>> heavy = -0.9 * torch.log1p(-levels)  # the weights have a Pareto tail of shape 0.9
        >>> bool(pareto_k(heavy[:, None]) > 0.7)
        True
    """
    return psis(weights).pareto_k


@dataclass(frozen=True)
class Smoothed:
    """Evidence per datum from weights whose largest ones are smoothed, and the tail's shape.

    Attributes:
        log_evidence: Log of the mean smoothed weight, ``(batch,)``, nats. It is biased, on a side
            that is not known: **neither a lower nor an upper bound** on log p(x).
        stderr: Standard error of ``log_evidence``, ``(batch,)``: that of the log of a mean of
            independent weights with the scatter of the smoothed ones. The bias is not in it; both
            hold while k-hat is below its threshold.
        pareto_k: k-hat, ``(batch,)``; see `pareto_k`.
    """

    log_evidence: Tensor
    stderr: Tensor
    pareto_k: Tensor


def psis(weights: Tensor) -> Smoothed:
    r"""Pareto-smoothed evidence of each row (Vehtari et al. 2024), by ArviZ's routine.

    .. math:: \log \hat p(x_n) = \log \frac1S \sum_s \tilde w_{sn}

    The :math:`3\sqrt S` largest of S weights, a fifth of them where S is at most 225, are replaced
    by the quantiles of a generalised Pareto distribution fitted to them, and none is left larger
    than the largest was. That lowers the variance which few large weights make, at the price of a
    bias. Where no distribution can be fitted, as to equal weights, they stay as they are.

    Args:
        weights: Log weights, ``(num_samples, batch)``, nats.

    Returns:
        Smoothed log evidence and k-hat per row. With fewer than 25 draws nothing is smoothed and
        k-hat is NaN.

    Raises:
        ValueError: If the weights have another number of dimensions, or there are fewer than 2.

    Example:
        >>> import torch
        >>> found = psis(torch.full((100, 1), -3.0))
        >>> found.log_evidence, found.pareto_k
        (tensor([-3.]), tensor([-inf], dtype=torch.float64))
    """
    if weights.dim() != 2 or len(weights) < 2:
        raise ValueError(
            f"weights: expected log weights of shape (num_samples, batch), at least 2 draws of "
            f"each row; got {tuple(weights.shape)}. See ppvae.log_weights."
        )
    smoothed = weights.detach().double().cpu()
    k = smoothed.new_full((smoothed.shape[1],), torch.nan)
    proper = torch.isfinite(smoothed.amax(dim=0)) & ~torch.isnan(smoothed).any(dim=0)
    if len(smoothed) >= _LEAST_DRAWS:
        smoothed = smoothed.clone()
        # Large ones were rounded when they were computed, to a few units in the last place.
        top = smoothed.amax(dim=0)
        rounding = torch.where(proper, 4 * torch.finfo(weights.dtype).eps * top.abs(), 0.0)
        equal = top - smoothed.amin(dim=0) <= rounding.clamp(min=_EQUAL)
        k[equal] = -torch.inf  # Equal weights have no tail; of infinite and NaN ones NaN is left.
        for index in torch.nonzero(proper & ~equal).flatten().tolist():
            smoothed[:, index], k[index] = _smoothed_row(smoothed[:, index])
    plain = iwae_of(smoothed)
    return Smoothed(plain.value.to(weights), plain.stderr.to(weights), k.to(weights.device))


def _smoothed_row(row: Tensor) -> tuple[Tensor, float]:
    """Log weights with their tail smoothed, and the tail's shape."""
    from arviz_stats.base import array_stats

    top = row.max()
    log_w = (row - top).clamp(min=-_NOTHING).numpy()
    try:
        with np.errstate(all="ignore"):
            # ArviZ smooths the tail of the negative of its argument.
            normalised, k = array_stats.psislw(-log_w)
    except ValueError:  # The largest weights are all the same.
        return row, -math.inf
    if np.isnan(normalised).any():  # Too many of them are zero for a fit.
        return row, math.nan
    # ArviZ divides by the sum, which is read off a weight below the tail of a fifth at most.
    body = np.argsort(log_w)[len(log_w) - len(log_w) // 5 - 1]
    return top + torch.from_numpy(normalised + (log_w[body] - normalised[body])), float(k)


def pareto_k_threshold(num_samples: int) -> float:
    """The k-hat up to which importance weighting is reliable with ``num_samples`` draws.

    Example:
        >>> pareto_k_threshold(100)
        0.5
    """
    return min(1 - 1 / math.log10(num_samples), 0.7)


def effective_sample_size(weights: Tensor) -> Tensor:
    r"""Effective sample size of the importance weights of each row.

    .. math:: \mathrm{ESS}_n = \frac{(\sum_s w_{sn})^2}{\sum_s w_{sn}^2}

    Args:
        weights: Log weights, ``(num_samples, batch)``, nats.

    Returns:
        ``(batch,)``, between 1 and ``num_samples``.

    Example:
        >>> import torch
        >>> effective_sample_size(torch.zeros(100, 2))
        tensor([100., 100.])
    """
    return torch.exp(2 * torch.logsumexp(weights, dim=0) - torch.logsumexp(2 * weights, dim=0))


@dataclass(frozen=True, repr=False)
class WeightDiagnostics:
    r"""What the importance weights of each row say of the evidence that is read off them.

    Attributes:
        pareto_k: k-hat per row, ``(batch,)``.
        threshold: The k-hat up to which it vouches for a row at this number of draws.
        effective_sample_size: Per row, ``(batch,)``, between 1 and ``num_samples``.
        evidence: The importance-weighted evidence: a lower bound on log p(x) in expectation.
        smoothed: The Pareto-smoothed evidence of the same weights: less noise, and no bound.
        num_samples: Draws per row.
    """

    pareto_k: Tensor
    threshold: float
    effective_sample_size: Tensor
    evidence: Estimate
    smoothed: Smoothed
    num_samples: int

    @property
    def reliable(self) -> Tensor:
        """Whether k-hat vouches for each row, boolean, ``(batch,)``."""
        return self.pareto_k <= self.threshold

    @property
    def flat(self) -> Tensor:
        """Rows with a k-hat above the threshold whose effective sample size is 0.9 of the draws.

        Weights with an interior maximum can be such, with a k-hat that says nothing of their
        tail; see `weight_diagnostics`.
        """
        share = self.effective_sample_size / self.num_samples
        return (self.pareto_k > self.threshold) & (share >= FLAT)

    def __repr__(self) -> str:
        good, count = int(self.reliable.sum()), len(self.pareto_k)
        share = self.effective_sample_size / self.num_samples
        text = (
            f"{self.num_samples} draws a row: k-hat at most {self.threshold:.2f} in {good} of "
            f"{count} rows"
        )
        for words, which in (
            ("above", (self.pareto_k > self.threshold) & ~self.flat),
            ("above with flat weights, where the effective sample size counts", self.flat),
            ("unknown", self.pareto_k.isnan()),
        ):
            if bool(which.any()):
                text += f"; {words} in {int(which.sum())} ({self._rows(which)})"
        return (
            f"WeightDiagnostics({text}; effective sample size {float(share.min()):.1%} of the "
            f"draws or more, {float(share.median()):.1%} in the middle)"
        )

    def _rows(self, which: Tensor) -> str:
        """Rows by number, the largest k-hat first."""
        order = self.pareto_k.nan_to_num(nan=torch.inf).argsort(descending=True, stable=True)
        rows = order[which[order]].tolist()
        named = [f"{row}: {float(self.pareto_k[row]):.2f}" for row in rows[:_LISTED]]
        return ", ".join(named) + (", …" if len(rows) > _LISTED else "")


def weight_diagnostics(
    model: Program, guide: Program, x: Tensor, num_samples: int = 1000, *, seed: int = 0
) -> WeightDiagnostics:
    r"""How far importance weights may be trusted, row by row.

    Each row has a k-hat of its own; one figure for a batch would speak of the product of all
    weights, which is of no use to anybody and grows with the batch.

    k-hat describes the largest weights, and two kinds of rows deceive it:

    - *Weights with an interior maximum, and a tail beyond it.* About a local maximum :math:`w_0`
      that lies inside of the latent's space of d dimensions weights pile up, with the density
      :math:`(w_0 - w)^{d/2 - 1}`. That alone is harmless: bounded weights have a Pareto tail of
      shape :math:`-2/d`. Where the fitted tail holds both the pile and larger weights beyond it,
      k-hat is large whatever the tail is. On the toy at x = −2 the best gamma guide has a
      concentration of 1.062, so that its weights have a tail of shape 1 − 1/1.062 = 0.06 towards
      z = 0, a gap of 0.0014 nats and an effective sample size of 99.8 % of the draws. Its k-hat,
      in the mean over 20 seeds, is 0.7 with 1,000 draws, 4.0 with 10,000, and 0.08 with 40,000,
      when the fitted tail lies beyond the pile. `WeightDiagnostics.flat` marks rows of this kind:
      read the effective sample size there, or take more draws.
    - *A mode that no draw has met* leaves no trace in any weight. k-hat and effective sample size
      are then those of the modes that were met.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guide: A Pyro guide with the same latent sites, called as ``guide(x)``.
        x: Rows, ``(batch, *event)``.
        num_samples: Draws S per row, at least 25. All weights are held, ``S * batch`` of them.
        seed: Seed of the draws; the caller's generators are left as they were.

    Returns:
        The figures per row; print it for their words.

    Raises:
        ValueError: If there are fewer than 25 draws, or the rows, the model or the guide are
            unfit; see `ppvae.density.check_pair`.

    Example:
        >>> import torch
        >>> from ppvae.families import TruncatedNormal
        >>> from ppvae.guides import PerDatapoint
        >>> from ppvae.models import ExponentialGaussian
        >>> guide = PerDatapoint(TruncatedNormal(), 1)  # untrained: its posterior is for x = 1
        >>> weight_diagnostics(ExponentialGaussian(), guide, torch.ones(1), 100)
        WeightDiagnostics(100 draws a row: k-hat at most 0.50 in 1 of 1 rows; effective sample
        size 100.0% of the draws or more, 100.0% in the middle)
    """
    check_rows(x, model, guide)
    check_count("num_samples", num_samples, least=_LEAST_DRAWS)
    with judging(seed, x, model, guide), torch.no_grad():
        check_pair(model, guide, x)
        weights = torch.cat(list(weighed(model, guide, x, num_samples)))
    smoothed = psis(weights)
    return WeightDiagnostics(
        pareto_k=smoothed.pareto_k,
        threshold=pareto_k_threshold(num_samples),
        effective_sample_size=effective_sample_size(weights),
        evidence=iwae_of(weights),
        smoothed=smoothed,
        num_samples=num_samples,
    )


@dataclass(frozen=True)
class ActiveUnits:
    """Which latent elements carry something of the data.

    Attributes:
        variance: Variance over the data of the guide's posterior mean, ``(elements,)``, in units
            of ``prior_variance``: 0 where the guide says the same of every datum, about 1 where
            it says all.
        stderr: Monte Carlo standard error of ``variance`` for these data, ``(elements,)``.
        prior_variance: Variance of each element under the model's prior, ``(elements,)``, in the
            latent's own units squared; see `active_units`.
        names: Site and index of each element, such as ``"z[0]"``; a scalar has the site's name.
        threshold: What the variance of an active element exceeds.
    """

    variance: Tensor
    stderr: Tensor
    prior_variance: Tensor
    names: tuple[str, ...]
    threshold: float

    @property
    def active(self) -> Tensor:
        """Whether each element is active, boolean, ``(elements,)``."""
        return self.variance > self.threshold

    @property
    def count(self) -> int:
        """Number of active elements."""
        return int(self.active.sum())

    @property
    def total(self) -> int:
        """Number of latent elements of a datum."""
        return len(self.names)

    def __repr__(self) -> str:
        close = (self.variance - self.threshold).abs() < 2 * self.stderr
        text = f"{self.count} of {self.total} active"
        for words, which in (
            ("inactive", ~self.active),
            ("within two standard errors of the threshold", close),
        ):
            if bool(which.any()):
                text += f"; {words}: {self._listed(which)}"
        return f"ActiveUnits({text})"

    def _listed(self, which: Tensor) -> str:
        names = [name for name, there in zip(self.names, which.tolist(), strict=True) if there]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return ", ".join(names[:8]) + more


def active_units(
    model: Program,
    guide: Program,
    x: Tensor,
    *,
    num_samples: int = 200,
    threshold: float = 0.01,
    seed: int = 0,
) -> ActiveUnits:
    r"""Latent elements whose posterior mean changes with the datum.

    .. math:: A_j = \frac{\mathrm{Var}_n\, E_{q(z \mid x_n)}[z_j]}{\mathrm{Var}_{p(z)}[z_j]},
              \qquad j \text{ is active if } A_j > \text{threshold}

    The measure of Burda, Grosse & Salakhutdinov (2015), whose priors have variance
    1; dividing by the prior's variance makes it free of the latent's units. An element that is
    not active has collapsed: a small gap says nothing of it. Only means are looked at, so an
    element of which x tells the spread alone counts as inactive.

    The variance is that of N rows, with divisor N − 1. A mean over S draws has noise of its own,
    whose variance, :math:`\mathrm{Var}_q / S` by its unbiased estimate, is subtracted; what is
    left is at least 0.

    The prior's variance comes from draws of the model's latents, pooled over the rows. For
    continuous latents it is :math:`((Q_{0.84} - Q_{0.16}) / 2)^2` with the quantiles Q at ±1
    standard deviation of a normal: the variance of a normal prior, and a finite number also for
    one without a variance, such as Cauchy's (for an exponential one it is 0.70 times the
    variance). For discrete latents, whose quantiles may coincide, it is the variance of the
    draws; the labels of a categorical are taken as numbers.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guide: A Pyro guide with the same latent sites, called as ``guide(x)``.
        x: Rows, ``(batch, *event)``, at least 2.
        num_samples: Draws S per row, at least 2.
        threshold: In units of the prior's variance.
        seed: Seed of the draws; the caller's generators are left as they were.

    Returns:
        A figure for each latent element, sites in the model's order, the elements of each
        flattened.

    Raises:
        ValueError: If there is one row only, a number is out of its range, or the rows, the model
            or the guide are unfit; see `ppvae.density.check_pair`.

    Example:
        >>> import pyro, torch
        >>> from ppvae.models import FactorAnalysis
        >>> loadings = torch.tensor([[1.0, 0.0], [2.0, 0.0]])  # z[1] reaches no x
        >>> model = FactorAnalysis(x_dim=2, z_dim=2, loadings=loadings)
        >>> def exact(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", model.posterior(x))
        >>> active_units(model, exact, torch.randn(100, 2))
        ActiveUnits(1 of 2 active; inactive: z[1])
    """
    check_rows(x, model, guide)
    if len(x) < 2:
        raise ValueError(
            f"x: a variance over the data takes at least 2 rows; got {len(x)}. Pass the data set, "
            f"or a few hundred rows of it."
        )
    check_count("num_samples", num_samples, least=2)
    if not threshold > 0:
        raise ValueError(
            f"threshold must be positive, in units of the prior's variance; got {threshold}."
        )
    with judging(seed, x, model, guide), torch.no_grad():
        sites = list(check_pair(model, guide, x).latents.values())
        mean, noise = _posterior_means(model, guide, x, num_samples, sites)
        prior, prior_stderr = prior_variances(model, x, sites)
    variance = (mean.var(dim=0) - noise.mean(dim=0)).clamp(min=0)
    # With independent errors of variance t_n the variance of the estimate is
    # 4 Σ (m_n − m)² t_n / (N − 1)² + 2 Σ t_n² / (N − 1)², m_n without error. The measured m_n
    # put in add another 4 Σ t_n² / (N − 1)² to the first term.
    spread = (mean - mean.mean(dim=0)).square()
    first = 4 * (spread * noise).sum(dim=0) / (len(x) - 1) ** 2
    second = 2 * noise.square().sum(dim=0) / (len(x) - 1) ** 2
    stderr = torch.maximum(first - second, second).sqrt()
    ratio = variance / prior
    return ActiveUnits(
        variance=ratio,
        stderr=torch.hypot(stderr / prior, ratio * prior_stderr / prior),
        prior_variance=prior,
        names=tuple(name for site in sites for name in element_names(site)),
        threshold=threshold,
    )


def element_names(site: LatentSite) -> list[str]:
    """Site and index of each element of a latent, such as ``"z[0]"``; a scalar has no index."""
    if not site.event_shape:
        return [site.name]
    return [f"{site.name}[{','.join(map(str, index))}]" for index in np.ndindex(*site.event_shape)]


def _posterior_means(
    model: Program, guide: Program, x: Tensor, num_samples: int, sites: Sequence[LatentSite]
) -> tuple[Tensor, Tensor]:
    """Mean over draws of each latent element, and that mean's variance; ``(batch, elements)``."""
    start = total = squares = torch.zeros((), dtype=torch.float64, device=x.device)
    for index, size in enumerate(draw_chunks(num_samples, x)):
        _, draws = weigh(model, guide, x, size)
        z = torch.cat([draws[site.name].reshape(size, len(x), -1) for site in sites], dim=-1)
        z = z.double()
        if index == 0:
            # Sums of distances from here do not lose a small variance beside a large mean.
            start = z.mean(dim=0)
        total = total + (z - start).sum(dim=0)
        squares = squares + (z - start).square().sum(dim=0)
    within = (squares - total.square() / num_samples).clamp(min=0) / (num_samples - 1)
    return start + total / num_samples, within / num_samples


def prior_variances(
    model: Program, x: Tensor, sites: Sequence[LatentSite]
) -> tuple[Tensor, Tensor]:
    """Variance of each latent element under the prior, and its standard error."""
    chunks = [prior_draws(model, x, n) for n in draw_chunks(-(-_PRIOR_DRAWS // len(x)), x)]
    found = []
    for site in sites:
        z = torch.cat([draws[site.name].reshape(-1, site.size) for draws in chunks]).double()
        found.append(_moment_variance(z) if site.is_discrete else _quantile_variance(z))
    variances, stderrs = zip(*found, strict=True)
    return torch.cat(variances), torch.cat(stderrs)


def _moment_variance(z: Tensor) -> tuple[Tensor, Tensor]:
    """Variance of the columns, and its standard error."""
    variance = z.var(dim=0)
    fourth = (z - z.mean(dim=0)).pow(4).mean(dim=0)
    return variance, ((fourth - variance.square()).clamp(min=0) / len(z)).sqrt()


def _quantile_variance(z: Tensor) -> tuple[Tensor, Tensor]:
    """Square of half the distance of the columns' quantiles at ±σ, and its standard error."""
    z = z.sort(dim=0).values

    def quantile(level: float) -> Tensor:
        return z[round(level * (len(z) - 1))]

    # The level of an empirical quantile has this standard error.
    error = math.sqrt(_ONE_SIGMA * (1 - _ONE_SIGMA) / len(z))
    scale = (quantile(_ONE_SIGMA) - quantile(1 - _ONE_SIGMA)) / 2
    high, low = (
        (quantile(level + error) - quantile(level - error)) / 2
        for level in (_ONE_SIGMA, 1 - _ONE_SIGMA)
    )
    return scale.square(), scale * torch.hypot(high, low)


@dataclass(frozen=True)
class ElementKL:
    """How far the guide's posterior of each latent element lies from the prior.

    Attributes:
        kl: Mean over the rows, ``(entries,)``, nats per datum: 0 where the guide says what the
            prior says.
        stderr: Monte Carlo standard error of ``kl`` for these rows, ``(entries,)``; 0 where it is
            analytic and hangs on no draw.
        names: Site and index of each element, such as ``"z[0]"``; a scalar, and a site whose
            elements have no KL of their own, has the site's name.
        total: KL(q(z | x) || p(z)) of all latents together, the sum of ``kl``.
        total_stderr: Its Monte Carlo standard error.
    """

    kl: Tensor
    stderr: Tensor
    names: tuple[str, ...]
    total: float
    total_stderr: float

    def __repr__(self) -> str:
        order = self.kl.argsort(descending=True, stable=True)[:4].tolist()
        largest = ", ".join(f"{self.names[at]} {float(self.kl[at]):.3g}" for at in order)
        return (
            f"ElementKL(total {self.total:.4g} ± {self.total_stderr:.2g} nats a datum; "
            f"largest: {largest})"
        )


def element_kl(
    model: Program, guide: Program, x: Tensor, *, num_samples: int = 64, seed: int = 0
) -> ElementKL:
    r"""The KL of each latent element from its prior, averaged over the rows.

    .. math:: \mathrm{KL}_j = \frac1N \sum_n
              E_{q(z \mid x_n)}\!\left[\log \frac{q(z_j \mid x_n)}{p(z_j)}\right]

    An element at 0 has collapsed onto its prior, and carries nothing of the data. Summed over the
    elements this is what the ELBO falls short of the mean log-likelihood of the draws,
    :math:`E_q[\log p(x \mid z)]`.

    Where torch knows the KL of two elements it is analytic; where it does not, and guide and
    prior are products over elements, the log ratio is averaged over the draws. Where one of them
    is no product (a full-rank normal, a flow, a mixture or a VampPrior as prior), there is one
    figure for the whole site, under its name.

    A site whose prior or posterior hangs on other latents, as in a model with layers, is averaged
    over the draws of those. Its figure is a mean KL if the guide draws before it what its prior
    hangs on. If not, as in a guide from the bottom up, it is :math:`E_q[\log q - \log p]` of that
    site, which can be negative; the sum over all sites is the KL of the pair either way.

    Masked rows count as 0; scales of plates and handlers are left out.

    Args:
        model: A Pyro model with one local plate over the rows, called as ``model(x)``.
        guide: A Pyro guide with the same latent sites, called as ``guide(x)``.
        x: Rows, ``(batch, *event)``.
        num_samples: Draws per row, at least 2.
        seed: Seed of the draws; the caller's generators are left as they were.

    Returns:
        A figure for each latent element, sites in the model's order, the elements of each
        flattened. It is infinite where the guide draws values that the prior excludes.

    Raises:
        ValueError: If the guide draws auxiliary variables of which the latents are functions, as
            `AutoNormal` does, ``num_samples`` is too small, or the rows, the model or the guide
            are unfit; see `ppvae.density.check_pair`.

    Example:
        >>> import pyro, torch
        >>> from ppvae import pairs
        >>> model, _ = pairs.vae(x_dim=6, z_dim=2, hidden=[8])
        >>> def guide(x):
        ...     loc = torch.tensor([1.0, 0.0]).expand(len(x), 2)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", pyro.distributions.Normal(loc, 1.0).to_event(1))
        >>> element_kl(model, guide, torch.ones(5, 6))
        ElementKL(total 0.5 ± 0 nats a datum; largest: z[0] 0.5, z[1] 0)
    """
    check_rows(x, model, guide)
    check_count("num_samples", num_samples, least=2)
    start = total = squares = torch.zeros((), dtype=torch.float64, device=x.device)
    names: list[str] = []
    with judging(seed, x, model, guide), torch.no_grad():
        sites = check_pair(model, guide, x).latents
        for index, size in enumerate(draw_chunks(num_samples, x)):
            with unvalidated():
                drawn = Drawn(model, guide, (x,), {}, size)
                log_q, log_p = drawn.log_q(), drawn.log_p()
                check_no_auxiliary(
                    log_q,
                    "Use a guide that draws the latents themselves, such as "
                    "ppvae.guides.Amortized or ppvae.guides.PerDatapoint.",
                )
                found = [(latent, _site_kl(latent)) for latent in latents(log_p, log_q)]
            parts = torch.cat([value for _, value in found], dim=-1).double()
            # The last column is the sum, whose draws hang together.
            parts = torch.cat([parts, parts.sum(dim=-1, keepdim=True)], dim=-1)
            if index == 0:
                # Distances from the first draw are exactly 0 where nothing hangs on the draws.
                start = parts[0].masked_fill(~parts[0].isfinite(), 0.0)
                names = [
                    name
                    for latent, value in found
                    for name in _entry_names(sites[latent.prior.name], value)
                ]
            total = total + (parts - start).sum(dim=0)
            squares = squares + (parts - start).square().sum(dim=0)
    mean = (start + total / num_samples).mean(dim=0)
    within = (squares - total.square() / num_samples).clamp(min=0) / (num_samples - 1)
    stderr = (within / num_samples).sum(dim=0).sqrt() / len(x)
    # Infinity less infinity is no number.
    stderr = stderr.masked_fill(mean.isinf(), torch.inf)
    return ElementKL(
        kl=mean[:-1],
        stderr=stderr[:-1],
        names=tuple(names),
        total=float(mean[-1]),
        total_stderr=float(stderr[-1]),
    )


def _site_kl(latent: Latent) -> Tensor:
    """The KL of a site's elements, or that of the site as one; ``(num_draws, batch, entries)``."""
    whole = latent.kl()
    elements = latent.log_ratio_of_elements() if whole is None else latent.kl_of_elements()
    if elements is not None:
        return elements
    return (latent.log_ratio() if whole is None else whole)[..., None]


def _entry_names(site: LatentSite, value: Tensor) -> list[str]:
    return [site.name] if value.shape[-1] != site.size else element_names(site)
