"""What a handful of seeds allow one to say: intervals of means, paired differences, p values.

    estimate([0.61, 0.64, 0.62])                       # Estimate(n=3, mean=0.6233, low=0.5854, high=0.6613)
    paired_t_p([0.02, 0.01, 0.03])                     # 0.0742
    sign_flip_p([0.02, 0.01, 0.03])                    # 0.25, the smallest that three seeds can give
    fisher_p(8, 8, 3, 8)                               # 0.0256: of 8 seeds 8 learned, of 8 others 3
    holm([0.01, 0.04, 0.03])                           # [0.03, 0.06, 0.06]

The seed is the unit: every function takes one number per seed. Two models that were trained
with the same seeds are compared by the differences within seeds. Needs numpy only.

Sources: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4 (Student's t for whole degrees of freedom);
Fisher 1935, The Design of Experiments, section 21 (sign flips) and Statistical Methods, 21.02 (shares);
Cohen 1988, 2.3.5 (d_z); Guenther 1981 (number of pairs); Holm 1979.
"""

import functools
import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """The mean of n numbers with its 95 % t interval; the ends are NaN for n < 2, the mean for n = 0."""

    n: int
    mean: float
    low: float
    high: float


def t_probability(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) * tan(angle)) for Student's T, 0 <= angle <= pi/2, whole degrees of freedom.

    A finite sum, so it is exact up to rounding."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for power in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@functools.cache
def t_quantile(confidence: float, freedom: int) -> float:
    """The t with P(|T| < t) = confidence, 0 < confidence < 1: 12.706 at 0.95 and one degree of freedom."""
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if t_probability(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of a sample, NaN for less than two values; 0 where they are equal up to
    rounding."""
    if len(values) < 2:
        return math.nan
    mean = fmean(values)
    found = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return found if found > 1e-12 * max(map(abs, values)) else 0.0


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of the values and its 95 % t interval, which takes them as independent draws from a normal."""
    n = len(values)
    mean = fmean(values) if n else math.nan
    if n < 2:
        return Estimate(n, mean, math.nan, math.nan)
    half = t_quantile(0.95, n - 1) * deviation(values) / math.sqrt(n)
    return Estimate(n, mean, mean - half, mean + half)


def paired_differences(values: dict[int, float], baseline: dict[int, float]) -> list[float]:
    """value - baseline, from numbers by seed, of the seeds that both have, in ascending order."""
    return [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]


def paired_t_p(differences: Sequence[float]) -> float:
    """The two-sided p value of Student's t test of "their mean is 0", for n >= 2, else NaN.

    Equal differences have no spread to test against: theirs is the p value of the sign-flip test."""
    spread, n = deviation(differences), len(differences)
    if math.isnan(spread):
        return math.nan
    if spread == 0:
        return sign_flip_p(differences)
    t = abs(fmean(differences)) / (spread / math.sqrt(n))
    return max(0.0, 1 - t_probability(math.atan(t / math.sqrt(n - 1)), n - 1))


def standardised(differences: Sequence[float]) -> float:
    """Cohen's d_z: the mean difference over the standard deviation of the differences; NaN without a
    spread."""
    spread = deviation(differences)
    return fmean(differences) / spread if spread > 0 else math.nan


def pairs_needed(spread: float, difference: float) -> int:
    """About how many pairs show a difference at the 0.05 level with a power of 80 %, from the standard
    deviation of the differences."""
    return max(3, math.ceil((1.96 + 0.84) ** 2 * (spread / difference) ** 2 + 1.96**2 / 2))


def fisher_p(successes: int, n: int, others: int, m: int) -> float:
    """Fisher's exact two-sided p value of "both shares are the same": `successes` of n against `others` of
    m."""
    total = successes + others
    ways = {k: math.comb(n, k) * math.comb(m, total - k) for k in range(max(0, total - m), min(n, total) + 1)}
    return sum(way for way in ways.values() if way <= ways[successes]) / sum(ways.values())


def sign_test_p(wins: int, losses: int) -> float:
    """The exact two-sided p value of "a win is a coin toss"; 1 where there is neither."""
    n, least = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)


def sign_flip_p(differences: Sequence[float]) -> float:
    """The exact two-sided p value of "the sign of each difference is a coin toss".

    It is the share of all 2^n sign patterns whose sum is at least as far from 0 as the one seen. The sums of
    the two halves are joined by a sorted search, so that 40 seeds are no more than 2^20 sums.
    NaN for no differences.
    """
    if not len(differences):
        return math.nan
    middle = (len(differences) + 1) // 2
    left, right = _signed_sums(differences[:middle]), np.sort(_signed_sums(differences[middle:]))
    rounding = 1e-12 * math.fsum(abs(difference) for difference in differences)
    bound = abs(math.fsum(differences)) - rounding
    if bound <= 0:
        return 1.0
    above = len(right) - np.searchsorted(right, bound - left, side="left")
    below = np.searchsorted(right, -bound - left, side="right")
    return float((above.sum() + below.sum()) / 2.0 ** len(differences))


def _signed_sums(values: Sequence[float]) -> np.ndarray:
    """The 2^n sums of +-values, (2^n,) float64."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for having looked at all of them (Holm's step-down), in the order given; NaN, of
    what was not tested, is not counted and stays."""
    tested = [index for index, p in enumerate(p_values) if not math.isnan(p)]
    adjusted, running = [math.nan] * len(p_values), 0.0
    for rank, index in enumerate(sorted(tested, key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(tested) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
