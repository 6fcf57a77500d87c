r"""Tests whether numbers between 0 and 1 are uniform, or symmetric about 1/2, with exact p-values.

Both look at a curve and ask how far it ever strays from what it should be, and both know the law of
that distance for the number of data at hand; nothing here is asymptotic or simulated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

# Points at which a distribution function is looked at.
NUM_POINTS = 100
# Probabilities that differ by less than this, relatively, differ by rounding.
_ROUNDING = 1e-9
# A p-value below this is bounded, as the difference of 1 and a probability has few digits left.
_SURE = 1e-10


def uniformity(values: ArrayLike, num_points: int = NUM_POINTS) -> float:
    r"""P-value of the simultaneous test of uniformity, of independent values.

    At :math:`u_k = k / K` the count of values up to there, :math:`c_k`, is binomial. The statistic
    is the smallest tail probability of all these counts,

    .. math:: T = \min_k \min\{P(C_k \le c_k), P(C_k \ge c_k)\},
              \qquad C_k \sim \mathrm{Binomial}(N, u_k)

    and the p-value is the probability that uniform values have a smaller one or the same. It is
    exact: the counts are those of a Poisson process given its total, so that one convolution for
    each point gives the probability that they all stay within the band.

    Args:
        values: N independent values between 0 and 1.
        num_points: K.

    Returns:
        The p-value; below 1e-10 an upper bound on it.

    Source: Säilynoja, Bürkner & Vehtari (2022).

    Example:
        >>> uniformity((np.arange(50) + 0.5) / 50) > 0.99
        True
        >>> uniformity(np.linspace(0.2, 0.8, 50)) < 0.001
        True
    """
    from scipy.stats import binom

    sample = np.sort(np.asarray(values, dtype=np.float64))
    points = grid(num_points)
    counts = np.searchsorted(sample, points, side="right")
    tails = np.minimum(
        binom.cdf(counts, len(sample), points), binom.sf(counts - 1, len(sample), points)
    )
    least = float(tails.min())
    # All tails together are no more probable than their sum.
    most = 2 * len(points) * least
    if most < _SURE:
        return most
    outside = 1 - _inside(*_band(least, len(sample), points), len(sample), num_points)
    return float(min(max(outside, least), most, 1.0))


def grid(num_points: int = NUM_POINTS) -> Floats:
    """The points at which distribution functions are compared, ``(num_points - 1,)``."""
    return np.arange(1, num_points) / num_points


def ecdf_band(
    num_data: int, level: float = 0.05, num_points: int = NUM_POINTS
) -> tuple[Floats, Floats]:
    r"""Simultaneous band for the distribution function of uniform values.

    The empirical distribution function leaves it at some point with probability at most ``level``,
    which is when `uniformity` is at most ``level``.

    Args:
        num_data: Number of values N.
        level: Between 0 and 1.
        num_points: Number of points, less one.

    Returns:
        The least and the largest value inside, at `grid`.

    Source: Säilynoja, Bürkner & Vehtari (2022).

    Example:
        >>> lower, upper = ecdf_band(200)
        >>> float(lower[49]), float(upper[49])  # at 1/2
        (0.395, 0.605)
    """
    points = grid(num_points)
    low, high = np.log(level / (4 * len(points))), np.log(level)
    for _ in range(40):
        middle = (low + high) / 2
        band = _band(float(np.exp(middle)), num_data, points)
        if 1 - _inside(*band, num_data, num_points) <= level:
            low = middle
        else:
            high = middle
    lower, upper = _band(float(np.exp(low)), num_data, points)
    return lower / num_data, upper / num_data


def _band(tail: float, num_data: int, points: Floats) -> tuple[Any, Any]:
    """The least and the largest count both of whose tails are more probable than ``tail``."""
    from scipy.stats import binom

    tail = tail * (1 + _ROUNDING)
    lower = binom.ppf(tail, num_data, points).clip(0)
    lower += binom.cdf(lower, num_data, points) <= tail
    upper = binom.isf(tail, num_data, points).clip(0, num_data)
    upper += binom.sf(upper, num_data, points) > tail
    upper -= binom.sf(upper - 1, num_data, points) <= tail
    return lower.astype(int), upper.astype(int)


def _inside(lower: Any, upper: Any, num_data: int, num_points: int) -> float:
    """Probability that the counts of uniform values lie between two bounds at all points."""
    from scipy.stats import poisson

    # Given the total, the increments of a Poisson process are those of uniform values.
    steps = poisson.pmf(np.arange(num_data + 1), num_data / num_points)
    state, start = np.ones(1), 0
    for least, most in zip(lower.tolist(), upper.tolist(), strict=True):
        state = np.convolve(state, steps[: most - start + 1])[least - start : most - start + 1]
        start = least
    last = steps[num_data - start - np.arange(len(state))]
    return float(state @ last / poisson.pmf(num_data, num_data))


def symmetry(values: ArrayLike) -> float:
    r"""P-value of a test of symmetry about 1/2, of independent values.

    The statistic is the Kolmogorov–Smirnov distance between the values :math:`p` and
    :math:`1 - p`, the one that VSBC looks at. The two samples hang together, so that the law of the
    two-sample test is not that of this distance, and rejects too often. Its own: in the order of
    their distance from 1/2, the largest first, the sides on which the values lie are a fair
    random walk if their law is symmetric, and the distance is how far that walk ever comes from 0,
    divided by N. The p-value follows from the reflection principle.

    Args:
        values: N independent values between 0 and 1, no two at the same distance from 1/2.

    Returns:
        The p-value; below 1e-10 an upper bound on it.

    Source: Yao, Vehtari, Simpson & Gelman (2018) for the diagnostic; Butler (1969) for the test.

    Example:
        >>> symmetry([0.1, 0.2, 0.6, 0.7])  # the walk goes to -2 and back
        0.75
        >>> symmetry(np.linspace(0, 0.7, 50)) < 0.05
        True
    """
    from scipy.stats import binom

    sides = np.asarray(values, dtype=np.float64) - 0.5
    order = np.argsort(-np.abs(sides), kind="stable")
    farthest = int(np.abs(np.cumsum(np.sign(sides[order]))).max())
    if farthest == 0:
        return 1.0
    # To reach b is at most twice as probable as to end there or beyond, on either side.
    most = 4 * float(binom.sf((len(sides) + farthest - 1) // 2, len(sides), 0.5))
    if most < _SURE:
        return most
    # Ends of the walk, counted once in each strip of width 2b around 0, with alternating sign, add
    # up to the probability that it never came as far as b.
    ups = np.arange(len(sides) + 1)
    ends = 2 * ups - len(sides)
    strip, at = np.divmod(ends + farthest, 2 * farthest)
    signs = np.where(at == 0, 0, np.where(strip % 2 == 0, 1, -1))
    return float(np.clip(1 - signs @ binom.pmf(ups, len(sides), 0.5), 0.0, 1.0))


def holm(p_values: ArrayLike) -> Floats:
    r"""P-values adjusted for their number, by Holm (1979).

    With :math:`p_{(1)} \le \cdots \le p_{(m)}` the adjusted :math:`\tilde p_{(j)} = \max_{i \le j}
    \min\{1, (m - i + 1)\, p_{(i)}\}`: those at most α are rejected, and the probability of one or
    more wrong rejections is at most α, however the tests hang together.

    Args:
        p_values: ``(m,)``.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        array([0.03, 0.06, 0.06])
    """
    raw = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(raw, kind="stable")
    scaled = raw[order] * np.arange(len(raw), 0, -1)
    out = np.empty_like(raw)
    out[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return out
