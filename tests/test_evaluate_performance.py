"""The numbers of one run are those a person gets by hand, and files that hold none are refused."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from results_fixture import make_results, pattern_arrays
from run_cases import Refused

from evaluate_performance import main
from reporting.attention_numbers import attention_entropy, share_within, token_masses
from results_folder import AttentionPatterns, Cell, read_attention_patterns, write_arrays


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
    arrays = pattern_arrays("gravitational", np.random.default_rng(0))
    write_arrays(tmp_path / "patterns.npz", arrays)
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


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tokens", b"not an array")


def write_damaged(path: Path) -> None:
    write_arrays(path, pattern_arrays("conventional", np.random.default_rng(0)))
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes(2800) + content[3000:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"there is no attention_patterns\.npz"),
        (lambda path: path.symlink_to("/dev/zero"), "cannot be used: it is a link"),
        (os.mkfifo, "cannot be used: it is not a file"),
        (lambda path: np.savez_compressed(path, maps=np.zeros(2**20 + 100)), "it would unpack to"),
        (lambda path: np.savez(path, labels=np.array([object()] * 3)), "cannot be used: Object arrays"),
        (lambda path: np.savez(path, tokens=np.zeros((2, 2), int)), "cannot be used: .*missing"),
        (write_zip, "no array"),
        (write_damaged, "cannot be used"),
        (lambda path: path.write_bytes(b"no zip"), "cannot be used"),
    ],
)
def test_a_file_that_is_no_patterns_file_is_refused_and_nothing_in_it_is_run(
    make: Callable[[Path], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("results_folder.LARGEST_ARRAYS", 2**23)
    make(tmp_path / "attention_patterns.npz")
    with pytest.raises(ValueError, match=message):
        read_attention_patterns(tmp_path / "attention_patterns.npz")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    models = ("gravitational", "conventional")
    pending = {Cell("listops", "conventional", 0): "pending"}
    return make_results(root, models=models, seeds=(0,), epochs=1, states=pending)


def test_numbers_are_printed_and_figures_drawn(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = results / "listops" / "gravitational" / "seed0"
    assert main([str(folder), "--pdf"]) == 0
    printed = capsys.readouterr().out
    accuracy = json.loads((folder / "result.json").read_text())["test_accuracy_best"]
    assert f"test_accuracy_best              {accuracy:.6g}" in printed
    assert "attention_entropy" in printed and "heaviest_tokens" in printed
    drawn = results / "analysis" / "listops_gravitational_seed0"
    figures = ("learning_curves", "learned", "attention_distance", "masses")
    stems = (*figures, "attention_layer1", "attention_layer2")
    expected = {f"{stem}.{suffix}" for stem in stems for suffix in ("png", "pdf")}
    assert {path.name for path in drawn.iterdir()} == expected | {"explorer.html"}


def test_it_is_said_that_there_is_nothing_to_draw(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(results / "listops" / "conventional" / "seed0")]) == 0
    printed = capsys.readouterr().out
    for part in ("pending", "there is no attention_patterns.npz", "nothing to draw"):
        assert part in printed


def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(results: Path, refused: Refused) -> None:
    for folder in (results, results / "listops" / "conventional" / "seed9", Path("/")):
        assert refused(main, folder).startswith("evaluate_performance.py: error:")
