"""The numbers of one run, and of a handful of seeds, are those a person gets by hand or finds in a book."""

import itertools
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import results_fixture
from hypothesis import given
from hypothesis import strategies as st

from evaluate_performance import main
from reporting.attention_numbers import attention_entropy, share_within, token_masses
from reporting.comparison_tables import convergence_epoch
from reporting.seed_statistics import (
    estimate,
    holm,
    paired_differences,
    sign_flip_p,
    smallest_sign_flip_p,
    t_quantile,
)
from results_folder import AttentionPatterns, Cell, read_attention_patterns

# Convergence


@pytest.mark.parametrize(
    ("accuracies", "chance", "epoch"),
    [
        ([0.2, 0.5, 0.9, 1.0], 0.0, 3),
        ([0.2, 0.5, 0.89, 1.0], 0.0, 4),
        ([0.52, 0.55, 0.6], 0.0, 2),  # guessing is 83 % of the best already
        ([0.52, 0.55, 0.6], 0.5, 3),  # (0.55 - 0.5) / 0.1 = 0.5
        ([0.7, 0.95, 1.0], 0.5, 2),  # exactly 0.9, which rounds to just below it
        ([0.8, 0.3, 0.2], 0.1, 1),
        ([0.5], 0.1, 1),
        ([0.5, 0.45], 0.5, None),
        ([0.0, 0.0], 0.0, None),
        ([], 0.0, None),
    ],
)
def test_convergence_is_the_first_epoch_at_90_percent_of_the_way_from_chance_to_the_best(
    accuracies: list[float], chance: float, epoch: int | None
) -> None:
    assert convergence_epoch(accuracies, chance) == epoch


# Intervals and tests over seeds


@pytest.mark.parametrize(
    ("confidence", "freedom", "published"),
    [
        (0.95, 1, 12.706),
        (0.95, 2, 4.303),
        (0.95, 3, 3.182),
        (0.95, 4, 2.776),
        (0.95, 5, 2.571),
        (0.95, 9, 2.262),
        (0.95, 10, 2.228),
        (0.95, 30, 2.042),
        (0.95, 120, 1.980),
        (0.99, 1, 63.657),
        (0.99, 4, 4.604),
        (0.99, 7, 3.499),
        (0.90, 2, 2.920),
        (0.80, 6, 1.440),
        (0.999, 3, 12.924),
    ],
)
def test_t_quantiles_are_those_of_published_tables(confidence: float, freedom: int, published: float) -> None:
    assert t_quantile(confidence, freedom) == pytest.approx(published, abs=5e-4)


@pytest.mark.parametrize(("confidence", "freedom"), [(0.0, 3), (1.0, 3), (0.95, 0)])
def test_a_t_quantile_outside_its_range_is_refused(confidence: float, freedom: int) -> None:
    with pytest.raises(ValueError, match="expected 0 < confidence < 1"):
        t_quantile(confidence, freedom)


def test_the_interval_of_three_seeds_by_hand() -> None:
    # mean 2, standard deviation 1, so half = 4.303 / sqrt(3)
    found = estimate([1.0, 2.0, 3.0])
    assert found == pytest.approx((3, 2.0, 2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), abs=1e-4)


def test_one_seed_has_a_mean_and_no_interval_and_none_has_nothing() -> None:
    one, none = estimate([0.4]), estimate([])
    assert (one.n, one.mean) == (1, 0.4) and math.isnan(one.low) and math.isnan(one.high)
    assert none.n == 0 and math.isnan(none.mean)


def test_differences_are_paired_by_seed_and_leave_out_seeds_that_one_of_them_lacks() -> None:
    differences = paired_differences({2: 0.5, 0: 0.3, 7: 0.9}, {0: 0.1, 2: 0.6, 1: 0.2})
    assert list(differences) == [0, 2]
    assert list(differences.values()) == pytest.approx([0.2, -0.1])


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([3.0], 1.0),
        ([1.0, 2.0], 0.5),
        ([1.0, 2.0, 3.0], 0.25),  # of 8 patterns, +++ and ---
        ([-1.0, 2.0, 3.0], 0.5),  # |sum| 4: +++ and --- 6, -++ and +-- 4
        ([1.0, 1.0, -1.0], 1.0),  # |sum| 1: every pattern
        ([0.01, 0.02, 0.03, 0.01, 0.02], 0.0625),
        ([0.0, 0.0], 1.0),
    ],
)
def test_sign_flip_p_values_by_hand(differences: list[float], p: float) -> None:
    assert sign_flip_p(differences) == p


@pytest.mark.parametrize(("n", "p"), [(1, 1.0), (2, 0.5), (3, 0.25), (5, 0.0625), (6, 0.03125)])
def test_the_smallest_p_is_that_of_seeds_which_all_point_one_way(n: int, p: float) -> None:
    assert smallest_sign_flip_p(n) == p == sign_flip_p([0.5 + seed for seed in range(n)])


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=8))
def test_the_sorted_search_counts_what_trying_every_sign_pattern_counts(differences: list[int]) -> None:
    patterns = list(itertools.product([1, -1], repeat=len(differences)))
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True))) for signs in patterns
    ]
    expected = sum(found >= abs(sum(differences)) for found in sums) / len(patterns)
    assert sign_flip_p([value / 10 for value in differences]) == expected


def test_holm_by_hand() -> None:
    # sorted 0.01 x 3, 0.03 x 2, 0.04 x 1 but not below the one before it
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


# Attention


def patterns_with(**changes: np.ndarray) -> AttentionPatterns:
    """Two tokens, one layer, timescale and head, two examples of lengths 2 and 1."""
    arrays = {
        "tokens": np.array([[5, 6], [5, 0]], np.int32),
        "symbols": np.array([["a", "b"], ["a", ""]]),
        "lengths": np.array([2, 1]),
        "labels": np.array([0, 1]),
        "predictions": np.array([0, 0]),
        "maps": np.array([[[0.5, 0.5], [1, 0]], [[1, 0], [0, 0]]], np.float16).reshape(1, 2, 1, 1, 2, 2),
        "distance_edges": np.array([0, 1, 2, 4]),
        "distance_share": np.array([0.5, 0.2, 0.3]).reshape(1, 1, 1, 3),
    }
    return AttentionPatterns(**(arrays | changes))


def test_entropy_is_1_for_even_weights_and_0_for_one_token() -> None:
    # the first query is even, the second looks at one token; an example of one token says nothing
    np.testing.assert_allclose(attention_entropy(patterns_with()), [[[0.5]]])


def test_entropy_is_unknown_where_every_example_has_one_token() -> None:
    assert np.isnan(attention_entropy(patterns_with(lengths=np.array([1, 1])))).all()


def test_the_share_within_a_distance_adds_the_bins_below_it() -> None:
    shares = [share_within(patterns_with(), distance).item() for distance in (1, 2, 4)]
    assert shares == pytest.approx([0.5, 0.7, 1.0])


def test_masses_are_relative_to_their_example_and_sorted_from_the_heaviest() -> None:
    mass = np.array([[1.0, 3.0], [8.0, 0.0]], np.float32).reshape(1, 2, 1, 1, 2)
    # a: 1 / 2 in the first, 8 / 8 in the second; b: 3 / 2
    assert token_masses([patterns_with(key_mass=mass)]) == [("b", 1.5, 1), ("a", 0.75, 2)]
    assert token_masses([patterns_with()]) == []


def test_patterns_come_back_from_a_file(tmp_path: Path) -> None:
    arrays = results_fixture.pattern_arrays("gravitational", np.random.default_rng(0))
    np.savez_compressed(tmp_path / "patterns.npz", allow_pickle=False, **arrays)
    found = read_attention_patterns(tmp_path / "patterns.npz")
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(found, name), array)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": np.array([2, 3])}, "lengths must be 1 to 2"),
        ({"lengths": np.array([2])}, "lengths is int64"),
        ({"maps": np.zeros((1, 2, 1, 1, 2, 3))}, "maps is float64"),
        ({"maps": np.full((1, 2, 1, 1, 2, 2), np.nan)}, "not finite"),
        ({"symbols": np.array([[1, 2], [3, 4]])}, "symbols is int64"),
        ({"tokens": np.array(5)}, "tokens is int64"),
        ({"distance_edges": np.array([0, 2, 1, 4])}, "ascend"),
        ({"key_mass": np.zeros((1, 2, 1, 1, 3))}, "key_mass is float64"),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(changes: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patterns_with(**changes)


def test_a_file_that_is_no_patterns_file_is_refused_and_nothing_in_it_is_run(tmp_path: Path) -> None:
    path = tmp_path / "attention_patterns.npz"
    with pytest.raises(ValueError, match=r"there is no attention_patterns\.npz"):
        read_attention_patterns(path)
    arrays = results_fixture.pattern_arrays("conventional", np.random.default_rng(0))
    np.savez(path, labels=np.array([object()] * 3))
    with pytest.raises(ValueError, match="cannot be used: Object arrays"):
        read_attention_patterns(path)
    np.savez(path, tokens=arrays["tokens"])
    with pytest.raises(ValueError, match="cannot be used"):
        read_attention_patterns(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tokens", b"not an array")
    with pytest.raises(ValueError, match="no array"):
        read_attention_patterns(path)
    np.savez_compressed(path, allow_pickle=False, **arrays)
    damaged = bytearray(path.read_bytes())
    damaged[200:3000] = bytes(2800)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="cannot be used"):
        read_attention_patterns(path)
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="cannot be used"):
        read_attention_patterns(path)


# The script


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    models = ("gravitational_multi_timescale", "conventional")
    failed = Cell("listops", "conventional", 0)
    return results_fixture.make_results(
        root, tasks=("listops",), models=models, seeds=(0,), states={failed: "pending"}
    )


def test_the_script_prints_a_runs_numbers_and_draws_its_figures(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = results / "listops" / "gravitational_multi_timescale" / "seed0"
    assert main([str(folder)]) == 0
    printed = capsys.readouterr().out
    accuracy = json.loads((folder / "result.json").read_text())["test_accuracy_best"]
    assert f"test_accuracy_best              {accuracy:.6g}" in printed
    assert "attention_entropy" in printed and "heaviest_tokens" in printed
    drawn = results / "analysis" / "listops_gravitational_multi_timescale_seed0"
    maps = {"attention_layer1", "attention_layer2"}
    expected = {"learning_curves", "learned", "attention_distance", "masses", *maps}
    assert {path.stem for path in drawn.iterdir()} == expected
    assert {path.suffix for path in drawn.iterdir()} == {".png", ".pdf"}


def test_the_script_says_so_where_there_is_nothing_to_draw(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(results / "listops" / "conventional" / "seed0")]) == 0
    printed = capsys.readouterr().out
    assert "pending" in printed and "there is no attention_patterns.npz" in printed
    assert "nothing to draw" in printed


def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (results, results / "listops" / "conventional" / "seed9", Path("/")):
        assert main([str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("evaluate_performance.py: error:") and error.count("\n") == 1
