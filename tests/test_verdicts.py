"""A verdict needs enough seeds and a small corrected p, and says by how much, of both kinds of metric."""

import math

import pandas as pd
import pytest
from results_fixture import tidy

from reporting.metrics import METRICS, PERCENT, Metric
from reporting.verdicts import Shares, Speed, compare, compare_speed

BITS = METRICS["bits_per_byte"]
BASE = [0.5 + 0.01 * seed for seed in range(8)]
NOISE = [0.004, -0.003, 0.001, 0.002, -0.005, 0.003, -0.002, 0.0]


def test_differences_are_compared_by_hand() -> None:
    table = tidy({"conventional": [0.5, 0.6, 0.4], "a": [0.6, 0.8, 0.7], "b": [0.5, 0.5, 0.5]})
    first, second = compare(table)
    # a: 0.1, 0.2, 0.3; b: 0, -0.1, 0.1
    assert first.mean == pytest.approx((3, 0.2, 0.2 - 0.248414, 0.2 + 0.248414), abs=1e-5)
    # t = 0.2 / (0.1 / sqrt(3)) = 3.4641; with two degrees of freedom p = 1 - t / sqrt(t^2 + 2)
    assert first.dz == pytest.approx(2) and first.p_t == pytest.approx(1 - math.sqrt(12 / 14))
    assert first.p_sign_flip == 0.25 and first.p_holm == pytest.approx(2 * first.p_t)
    assert (second.dz, second.p_t, second.p_holm) == pytest.approx((0, 1, 1))
    assert (first.verdict, second.verdict) == ("open", "open")


@pytest.mark.parametrize(
    ("shift", "noise", "verdict"),
    [
        *[(0.1, NOISE, "better"), (-0.1, NOISE, "worse")],
        (0.001, NOISE, "no relevant difference"),  # within a point
        (0.005, [one / 10 for one in NOISE], "no relevant difference"),  # sure, and too small to matter
        (0.01, [10 * one for one in NOISE], "open"),
        *[(0.1, NOISE[:2], "too few seeds"), (0.1, NOISE[:1], "too few seeds")],
        (0.1, [0.0] * 8, "better"),  # all differences equal: the sign flips decide
        (0.1, [0.0] * 5, "open"),  # they cannot with five seeds
        (0.0, [0.0] * 5, "no relevant difference"),
    ],
)
@pytest.mark.parametrize("metric", [PERCENT, BITS])
def test_verdicts_follow_from_numbers(shift: float, noise: list[float], verdict: str, metric: Metric) -> None:
    scale = 1 if metric is PERCENT else -2  # fewer bits are better, a relevant difference is twice as large
    mine = [BASE[seed] + scale * (shift + one) for seed, one in enumerate(noise)]
    [row] = compare(tidy({"conventional": BASE, "a": mine}, metric.best))
    assert row.verdict == verdict and row.metric is metric


def test_at_another_length_the_tests_of_that_length_are_compared_and_without_a_pair_nothing() -> None:
    of_length = tidy({"conventional": BASE, "a": [one - 0.2 for one in BASE]}, PERCENT.at_length(96))
    table = pd.concat([tidy({"conventional": BASE, "a": BASE}), of_length])
    [row] = compare(table, at={"listops": 96})
    assert (row.length, row.verdict) == (96, "worse") and row.mean.mean == pytest.approx(-0.2)
    assert [row.length for row in compare(table)] == [None] and compare(table, at={}) == []
    assert [row.verdict for row in compare(tidy({"a": [0.1, 0.2]}))] == ["no pair"]  # without the baseline


def test_the_family_of_a_correction_is_one_task() -> None:
    up = [value + 0.004 + one for value, one in zip(BASE, NOISE, strict=True)]
    models = {"conventional": BASE, "a": up, "b": BASE[:2]}
    one = compare(tidy(models))
    two = compare(pd.concat([tidy(models), tidy(models | {"c": BASE}, task="u")]))
    assert one[0].p_holm == one[0].p_t == two[0].p_holm  # b has too few seeds to be tested
    assert math.isnan(one[1].p_holm)
    assert two[2].p_holm == pytest.approx(2 * two[2].p_t)


@pytest.mark.parametrize(
    ("mine", "base", "shares", "verdict"),
    [
        ([0.1] * 5 + [0.99] * 3, [0.99] * 8, Shares(3, 8, 8, 8), "worse"),
        ([0.1] * 4 + [0.99] * 4, [0.99] * 8, Shares(4, 8, 8, 8), "open"),  # p = 0.077
        ([0.99] * 8, [0.1] * 6 + [0.99] * 2, Shares(8, 8, 2, 8), "better"),
        ([0.56] * 8, [0.99, 0.98, 0.97] + [0.5] * 5, Shares(8, 8, 3, 8), "better"),  # though less in the mean
        ([0.1] * 8, [0.99] * 8, None, "worse"),  # none learns: of one kind, and of no spread
        (BASE, [0.99] * 8, None, "worse"),  # on both sides, without a gap
    ],
)
def test_where_seeds_either_learn_or_do_not_the_shares_decide(
    mine: list[float], base: list[float], shares: Shares | None, verdict: str
) -> None:
    table = tidy({"conventional": base, "a": mine})
    [row] = compare(table, levels={"listops": 0.1})
    assert (row.shares, row.verdict) == (shares, verdict)
    assert row.p == (row.p_t if shares is None else row.p_shares)
    assert compare(table)[0].shares is None  # nobody knows what guessing is


def curves(times: dict[str, list[int | None]], epochs: int = 5, steps: bool = True) -> pd.DataFrame:
    """Progress of seeds that reach 0.9 at an epoch, or never."""
    rows = [
        (model, seed, epoch, 10.0 * epoch if steps else math.nan, 0.9 if at and epoch >= at else 0.1)
        for model, found in times.items()
        for seed, at in enumerate(found)
        for epoch in range(1, epochs + 1)
    ]
    table = pd.DataFrame(rows, columns=["model", "seed", "epoch", "steps", "quality"])
    return table.assign(task="t", state="done")


def speeds(progress: pd.DataFrame) -> dict[str, Speed]:
    return {one.model: one for one in compare_speed(progress, {"t": 0.9}, {"t": PERCENT})}


def test_speed_is_compared_with_those_who_never_arrived_as_the_slowest() -> None:
    never: list[int | None] = [None] * 6
    found = speeds(curves({"conventional": never, "a": [1, 2, 3, 4, 5, None], "b": never}))
    assert found["a"][2:] == ("steps", 5, 6, 30, 50, 5, 0, 1, 2 / 32, 4 / 32)
    assert found["b"][2:] == ("steps", 0, 6, math.inf, 50, 0, 0, 6, 1.0, 1.0)
    assert found["conventional"][2:9] == ("steps", 0, 6, math.inf, 50, 0, 0)
    assert math.isnan(found["conventional"].p) and math.isnan(found["conventional"].p_holm)


def test_a_run_that_ended_before_the_other_arrived_is_a_tie_and_without_steps_epochs_are_counted() -> None:
    progress = curves({"conventional": [4, 2, 2, 3], "a": [None, None, 2, 3]}, steps=False)
    short = progress[(progress["model"] != "a") | (progress["epoch"] <= 3)]
    assert speeds(short)["a"][2:9] == ("epochs", 2, 4, 3, 3, 0, 1) and speeds(short)["a"].ties == 3
    assert compare_speed(curves({}), {"t": 0.9}, {"t": PERCENT}) == []
