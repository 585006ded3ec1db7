"""Several folders are one run where nothing but seeds, models and machines differs, and are refused else."""

from pathlib import Path
from typing import Any

import pytest
from results_fixture import make_results, put, rewrite
from run_cases import Refused

from analyze_results import main
from command_line import InputError
from reporting.run_results import read_joined
from results_folder import Cell

MODELS = ("conventional", "gravitational")
pytestmark = pytest.mark.usefixtures("texts_alone")


def folder(root: Path, seeds: tuple[int, ...], **options: Any) -> Path:
    given: dict[str, Any] = {"models": MODELS, "patterns": False, "epochs": 1}
    return make_results(root, seeds=seeds, **given | options)


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return folder(tmp_path / "one", (0,))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return folder(tmp_path / "two", (1,))


def test_seeds_of_two_folders_are_analysed_as_one_and_both_are_named(tmp_path: Path, two: Path) -> None:
    one = folder(tmp_path / "one", (0, 2))
    rewrite(two / "environment.json", device_name="Another CPU")
    before = set(two.rglob("*"))
    assert main([str(one), str(two)]) == 0
    text = (one / "analysis_joined" / "report.md").read_text(encoding="utf-8")
    for part in (
        *("- results folders: one (seeds 0, 2); two (seeds 1)", "- seeds: 0, 1, 2", "(n = 3, 95 % interval"),
        *("A CPU (one); Another CPU (two)", "**Several machines.**", "python analyze_results.py one two"),
    ):
        assert part in text
    assert set(two.rglob("*")) == before and not (one / "analysis").exists()


def test_an_output_replaces_nothing_but_an_analysis(one: Path, tmp_path: Path, refused: Refused) -> None:
    target = tmp_path / "out"
    for _ in range(2):
        assert main([str(one), "--output-dir", str(target)]) == 0
    assert (target / "report.html").is_file() and not (one / "analysis").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for other in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        assert "choose another --output-dir" in refused(main, one, "--output-dir", other)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


UNLIKE = [
    ("preset", "quick", "preset is full in one and quick"),
    ("settings training learning_rate", 0.01, "training setting learning_rate is 0.0001 in one and 0.01"),
    ("settings data listops max_length", 80, "listops setting max_length is not set in one and 80"),
    ("task_info listops provenance sha256", "1", f"listops data sha256 is {'0' * 64} in one and 1"),
    ("settings model softening", 0.5, "model setting softening is not set in one and 0.5"),
]


@pytest.mark.parametrize(("place", "value", "difference"), UNLIKE)
def test_unlike_folders_are_refused_in_one_line(
    place: str, value: Any, difference: str, one: Path, two: Path, refused: Refused
) -> None:
    put(two / "config.json", place, value)
    said = refused(main, one, two)
    assert said.startswith(f"analyze_results.py: error: {difference} in two; --allow-differences")
    assert not (one / "analysis_joined").exists()


def test_a_report_of_unlike_folders_says_so_first(one: Path, two: Path) -> None:
    for place, value, _ in UNLIKE:
        put(two / "config.json", place, value)
    assert main([str(one), str(two), "--allow-differences"]) == 0
    text = (one / "analysis_joined" / "report.md").read_text(encoding="utf-8").replace("\\", "")
    unlike = "; ".join(f"{difference} in two" for *_, difference in UNLIKE)
    top = f"> **Unlike runs in one table.** --allow-differences was given, and {unlike}.\n"
    assert top in text.split("\n## ")[0]
    assert "python analyze_results.py one two --allow-differences" in text


def test_other_arithmetic_is_a_difference_and_a_place_of_the_data_is_none(one: Path, two: Path) -> None:
    put(two / "config.json", "settings data listops data_dir", "elsewhere")
    assert len(read_joined([one, two]).results.cells) == 4
    rewrite(Cell("listops", "conventional", 1).folder(two) / "result.json", precision="bf16")
    with pytest.raises(InputError, match="arithmetic is None in one and None and bf16 in two"):
        read_joined([one, two])


def test_a_cell_is_taken_from_the_folder_that_finished_it_and_never_twice(tmp_path: Path) -> None:
    states = {Cell("listops", "gravitational", 0): "failed"}
    one = folder(tmp_path / "one", (0,), states=states)
    two = folder(tmp_path / "two", (0,), models=MODELS[1:])
    cells = {record.cell.model: record for record in read_joined([one, two]).results.cells}
    assert cells["gravitational"].state == "done" and two in cells["gravitational"].folder.parents
    three = folder(tmp_path / "three", (0,))
    with pytest.raises(InputError, match="listops/conventional/seed0 is done in one and in three"):
        read_joined([one, three])
    joined = read_joined([one, three], allow_differences=True)
    assert [one in record.folder.parents for record in joined.results.cells] == [True, False]
    with pytest.raises(InputError, match="named twice"):
        read_joined([one, tmp_path / "two" / ".." / "one"])


def test_further_tasks_and_models_are_an_addition(one: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"tasks": ("imdb",), "models": ("multi_timescale",)}
    two = folder(tmp_path / "two", (0,), **more, unavailable={"listops": "offline", "image": "offline"})
    joined = read_joined([one, two])
    assert joined.results.config["unavailable"] == {"image": "offline"}
    assert set(joined.results.config["task_info"]) == {"listops", "imdb"}
    assert [record.cell.task for record in joined.results.cells] == ["listops", "listops", "imdb"]
