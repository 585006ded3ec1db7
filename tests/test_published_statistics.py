"""The statistics give what is printed for known data, and hold what they promise in a simulation."""

import math

import numpy as np
import pytest

from reporting.seed_statistics import estimate, holm, sign_flip_p

# Darwin's maize, cross- minus self-fertilised heights in eighths of an inch; Fisher 1935, section 17.
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
# Hours of sleep gained with the second drug minus those with the first; Student 1908, table on page 20.
STUDENT = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]


def test_fishers_count_of_sign_patterns_of_darwins_maize() -> None:
    # Fisher 1935, section 21: 863 of the 2^15 patterns reach the observed sum of 314 on either side
    assert sum(DARWIN) == 314
    assert sign_flip_p(DARWIN) == 2 * 863 / 2**15


def test_the_interval_of_students_sleep_data() -> None:
    # R's help page of `sleep`: t.test(..., paired = TRUE) gives 0.7001142 to 2.4598858 around 1.58
    assert estimate(STUDENT) == pytest.approx((10, 1.58, 0.7001142, 2.4598858), abs=1e-7)


def test_holms_correction_of_a_printed_example() -> None:
    # Wikipedia, "Holm-Bonferroni method": of these at the level 0.05, the first and the last are rejected
    adjusted = holm([0.01, 0.04, 0.03, 0.005])
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [p <= 0.05 for p in adjusted] == [True, False, False, True]


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_t_intervals_hold_the_mean_as_often_as_they_promise(n: int) -> None:
    repeats = 4000
    draws = np.random.default_rng(n).normal(0.6, 0.02, (repeats, n))
    found = [estimate(row) for row in draws.tolist()]
    held = sum(one.low <= 0.6 <= one.high for one in found) / repeats
    assert held == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / repeats))


def test_without_a_difference_the_sign_flip_test_finds_one_no_oftener_than_its_level() -> None:
    repeats = 2000
    draws = np.random.default_rng(0).normal(0, 0.02, (repeats, 6))
    p_values = np.array([sign_flip_p(row) for row in draws.tolist()])
    for level in (0.05, 0.25, 0.5):
        error = math.sqrt(level * (1 - level) / repeats)
        assert (p_values <= level).mean() <= level + 4 * error
