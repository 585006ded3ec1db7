"""The statistics give what is found by hand or in print."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reporting import seed_statistics as stats

# Darwin's maize, cross- minus self-fertilised heights in eighths of an inch; Fisher 1935, section 17.
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
# Hours of sleep gained with the second drug minus those with the first; Student 1908, table on page 20.
STUDENT = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]


@pytest.mark.parametrize(
    ("confidence", "freedom", "published"),
    [
        *[(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 3, 3.182), (0.95, 4, 2.776), (0.95, 9, 2.262)],
        *[(0.95, 30, 2.042), (0.95, 120, 1.980), (0.99, 1, 63.657), (0.99, 7, 3.499), (0.999, 3, 12.924)],
    ],
)
def test_t_quantiles_are_those_of_published_tables(confidence: float, freedom: int, published: float) -> None:
    assert stats.t_quantile(confidence, freedom) == pytest.approx(published, abs=5e-4)


@pytest.mark.parametrize(
    ("values", "n", "mean", "low", "high"),
    [
        ([1.0, 2.0, 3.0], 3, 2.0, 2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)),  # deviation 1
        # R's help page of `sleep`: t.test(..., paired = TRUE)
        (STUDENT, 10, 1.58, 0.7001142, 2.4598858),
        ([0.4], 1, 0.4, math.nan, math.nan),
        ([], 0, math.nan, math.nan, math.nan),
    ],
)
def test_a_mean_and_its_interval(values: list[float], n: int, mean: float, low: float, high: float) -> None:
    assert stats.estimate(values) == pytest.approx((n, mean, low, high), abs=1e-5, nan_ok=True)


def test_differences_are_paired_by_seed_and_leave_out_seeds_that_one_of_them_lacks() -> None:
    differences = stats.paired_differences({2: 0.5, 0: 0.3, 7: 0.9}, {0: 0.1, 2: 0.6, 1: 0.2})
    assert differences == pytest.approx([0.2, -0.1])


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        # all point one way: of 2^n patterns, +++ and ---
        *[([0.5 + seed for seed in range(n)], 2 / 2**n) for n in (1, 2, 3, 5, 6)],
        ([-1.0, 2.0, 3.0], 0.5),  # |sum| 4: +++ and --- 6, -++ and +-- 4
        ([1.0, 1.0, -1.0], 1.0),  # |sum| 1: every pattern
        ([0.0, 0.0], 1.0),
        # Fisher 1935, section 21: 863 of the 2^15 patterns reach the observed sum of 314 on either side
        (DARWIN, 2 * 863 / 2**15),
    ],
)
def test_sign_flip_p_values_by_hand(differences: list[float], p: float) -> None:
    assert stats.sign_flip_p(differences) == p


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=8))
def test_the_sorted_search_counts_what_trying_every_sign_pattern_counts(differences: list[int]) -> None:
    patterns = itertools.product([1, -1], repeat=len(differences))
    sums = [abs(sum(map(int.__mul__, signs, differences))) for signs in patterns]
    expected = sum(found >= abs(sum(differences)) for found in sums) / len(sums)
    assert stats.sign_flip_p([value / 10 for value in differences]) == expected


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        (STUDENT, 0.002833),  # R: t.test(extra ~ group, paired = TRUE), t = -4.0621
        (DARWIN, 0.0497),  # Fisher 1935, section 17: t = 2.148 with 14 degrees of freedom
        ([1.0, 3.0], 2 / math.pi * math.atan(1 / 2)),  # t = 2; one degree of freedom is Cauchy's distribution
        ([1.0, -1.0, 0.5, -0.5], 1.0),
        ([0.3] * 8, 2 / 2**8),  # no spread: the sign flips
        ([0.1 + 0.2, 0.3, 0.3], 0.25),  # equal up to rounding
        ([0.0, 0.0, 0.0], 1.0),
        *[([0.3], math.nan), ([], math.nan)],
    ],
)
def test_paired_t_p_values_are_those_in_print(differences: list[float], p: float) -> None:
    assert stats.paired_t_p(differences) == pytest.approx(p, abs=6e-5, nan_ok=True)


def test_an_effect_is_in_standard_deviations_of_the_differences() -> None:
    assert stats.standardised([1.0, 2.0, 3.0]) == 2.0
    assert stats.standardised(STUDENT) == pytest.approx(1.284558, abs=1e-6)  # t / sqrt(10)
    assert all(math.isnan(stats.standardised(one)) for one in ([], [1.0], [0.2, 0.2]))


def test_the_number_of_pairs_is_that_of_published_tables() -> None:
    # Cohen 1988 (t test of one mean, two-sided 0.05, power 0.80) has 199, 34, 15, 10
    found = [stats.pairs_needed(1.0, effect) for effect in (0.2, 0.5, 0.8, 1.0, 9.0)]
    assert found == pytest.approx([198, 34, 15, 10, 3], abs=1)


@pytest.mark.parametrize(
    ("table", "p"),
    [
        ((3, 4, 1, 4), 0.485714),  # Fisher's tea, R: fisher.test(matrix(c(3, 1, 1, 3), 2))
        ((10, 13, 2, 17), 0.000537),  # Fisher's twins, two-sided, R: ?fisher.test (Convictions)
        *[((8, 8, 0, 8), 2 / math.comb(16, 8)), ((8, 8, 8, 8), 1.0), ((0, 3, 0, 5), 1.0)],
    ],
)
def test_p_values_of_shares_are_those_in_print(table: tuple[int, int, int, int], p: float) -> None:
    assert stats.fisher_p(*table) == pytest.approx(p, abs=1e-6)


def test_sign_test_p_values_by_hand() -> None:
    found = [stats.sign_test_p(*counts) for counts in ((8, 0), (0, 8), (7, 1), (3, 3), (0, 0))]
    assert found == [2 / 256, 2 / 256, 18 / 256, 1, 1]


def test_holms_correction_by_hand() -> None:
    # Wikipedia, "Holm-Bonferroni": 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1 but not below the one before
    found = stats.holm([0.01, math.nan, 0.04, 0.03, 0.005])
    assert found == pytest.approx([0.03, math.nan, 0.06, 0.06, 0.02], nan_ok=True)
    assert stats.holm([0.5, 0.6]) == [1.0, 1.0] and stats.holm([]) == []
