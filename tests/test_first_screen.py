"""The first screen of a report says what the numbers allow, of every kind of folder, and nothing more."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from results_fixture import MODELS, make_results, put, report_of, rewrite, write_rows

from reporting.analysis import Analysis, make_analysis
from reporting.first_screen import first_screen
from reporting.metrics import ACCURACY
from reporting.report_findings import findings
from reporting.run_results import read_joined
from reporting.summary_tables import difference_tables
from results_folder import Cell, note_sharing, read_results

TEN = tuple(range(10))
CLAIM = re.compile(r"\b(better|worse|significant|ahead|behind|fewer|more)\b")


def analysed(root: Path) -> Analysis:
    return make_analysis(read_joined([root]))


def seen(root: Path) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """The sentences, the matrix's rows in words by model, and its headings."""
    screen = first_screen(analysed(root))
    rows = {str(name): [str(entry) for entry in row] for name, *row in screen.matrices[0].rows}
    return [" ".join(verdict) for verdict in screen.verdicts], rows, [*screen.matrices[0].header[1:]]


def folder(root: Path, gains: dict[str, list[float]], **options: Any) -> Path:
    """Ten seeds of ListOps, or what is given: conventional at 40 % and a bit, the others with a gain."""
    given: dict[str, Any] = {"seeds": TEN, "patterns": False, "epochs": 2} | options
    make_results(root, models=("conventional", *gains), **given)
    for cell, path in results_of(root):
        gain = gains.get(cell.model, [0.0])
        accuracy = 0.4 + 0.001 * cell.seed + gain[cell.seed % len(gain)]
        rewrite(path, **{ACCURACY: accuracy, "seconds_per_epoch": 10.0})
    return root


def results_of(root: Path) -> list[tuple[Cell, Path]]:
    """The cells that are done, and where their results are."""
    cells = [record for record in read_results(root).cells if record.state == "done"]
    return [(record.cell, record.folder / "result.json") for record in cells]


def test_what_is_decided_beyond_the_trained_length_is_said_and_in_a_table(tmp_path: Path) -> None:
    root = folder(tmp_path, {MODELS[1]: [0.01, -0.01], MODELS[2]: [0.01, -0.01]})
    for cell, path in results_of(root):
        far = {"conventional": 0.3, MODELS[1]: 0.2, MODELS[2]: 0.3}[cell.model] + 0.001 * cell.seed
        by_length = {str(n): {"loss": 1.0, "accuracy": value} for n, value in ((40, 0.4), (2048, far))}
        rewrite(path, test_by_length=by_length)
    analysis = analysed(root)
    _, beyond = first_screen(analysis).matrices
    assert beyond.header == ["model", "listops at 2,048 tokens (51.2 times the trained length)"]
    base, worse, same = (str(entry) for _, entry in beyond.rows)
    assert base == "30.4 %" and worse.startswith("worse: -10.0 [")
    assert same == "no relevant difference: 0.0 [0.0, 0.0]"
    assert [row[1] for row in difference_tables(analysis)[1].rows] == ["listops at 2,048"] * 2


def test_ten_seeds_are_given_the_verdicts_of_their_numbers(tmp_path: Path) -> None:
    gains = {MODELS[1]: [0.031, 0.029], MODELS[2]: [0.02, -0.02], MODELS[3]: [-0.021, -0.019]}
    root = folder(tmp_path, gains | {"discounted": [0.001, -0.001]})
    (base, gravity, scales, both, discounted), rows, _ = seen(root)
    assert base == "Conventional is what the others are compared with: 40.4 % on listops."
    assert gravity.startswith("Gravitational is better than Conventional on listops (+3.0 points). It ")
    assert gravity.endswith("It takes as much time per epoch and 1.17 times the parameters.")
    assert scales.startswith("Multi-timescale is not told apart from Conventional on listops. It reaches")
    assert " multi-timescale is worse than Conventional on listops (-2.0 points)." in both
    assert "has no relevant difference to Conventional on listops. It" in discounted
    assert rows["Conventional (baseline)"] == ["40.4 %: n = 10"]
    assert rows["Gravitational"] == ["better: +3.0 [+2.9, +3.1]"]
    analysis = analysed(root)
    matrix = first_screen(analysis).matrices[0]
    kinds = [getattr(entry, "kind", None) for _, entry in matrix.rows]
    assert kinds == ["baseline", "better", "open", "worse", "no relevant difference"]
    words = [part.split(":")[0] for part in matrix.note.split("; ")]
    assert words[:2] == ["better", "worse"] and "too few seeds" not in words  # it does not occur
    text = "\n".join(findings(analysis, "listops"))
    for name, said in {
        "Gravitational": r"\+3\.0 points.* p = 0\.00195.*better at the 0\.05 level, for these settings",
        "Multi-timescale": r"not told apart\. The interval allows a gain of 1\.5 and a loss of 1\.5 points; "
        r"a difference of 1 point would need about \d+ seeds",
        "Gravitational multi-timescale": r"worse at the 0\.05 level",
    }.items():
        assert re.search(f"^{name} against .*{said}", text, re.MULTILINE)


@pytest.mark.parametrize("seeds", [(4,), (0, 1)])
def test_one_or_two_seeds_have_numbers_and_no_verdict(seeds: tuple[int, ...], tmp_path: Path) -> None:
    gains = {"gravitational": [0.3, 0.31], "multi_timescale": [-0.3, -0.31]}
    sentences, rows, _ = seen(folder(tmp_path, gains, seeds=seeds))
    for sentence in sentences[1:]:
        assert "has no verdict, for too few seeds (3 pairs are the least), on listops (" in sentence
        assert f"points, n = {len(seeds)})" in sentence
    for [entry] in list(rows.values())[1:]:
        assert entry.startswith("too few seeds: ") and ("[" in entry) == (len(seeds) > 1)
    told = "\n".join(findings(analysed(tmp_path), "listops"))
    word = "too few seeds to tell; 3 are the least" if len(seeds) > 1 else "(n = 1: no interval"
    assert told.count(word) == 2 and ("95 % interval" in told) == (len(seeds) > 1)
    assert not CLAIM.search(f"{sentences} {rows}") and not re.search("better|worse|significant", told)


def test_what_is_not_done_is_named_beside_every_number_and_flatters_nobody(tmp_path: Path) -> None:
    states = {Cell("imdb", "conventional", seed): "failed" for seed in TEN}
    states |= {Cell("listops", "gravitational", seed): "diverged" for seed in (1, 2)}
    states |= {Cell("listops", "multi_timescale", seed): "failed" for seed in TEN[:9]}
    states[Cell("listops", "multi_timescale", 9)] = "missing"
    gains = {MODELS[1]: [0.031, 0.029], MODELS[2]: [0.1]}
    (base, gravity, scales), rows, _ = seen(folder(tmp_path, gains, tasks=("listops", "imdb"), states=states))
    assert base.endswith("% on listops. It has no result on imdb: nothing is compared there.")
    start = (
        "is better than Conventional on listops (+3.0 points, 2 diverged); has nothing to compare on imdb."
    )
    assert f"{start} Seeds that diverged are in no mean, which flatters it." in gravity
    assert scales == "Multi-timescale has nothing to compare on listops and imdb."
    assert list(rows.values()) == [
        ["40.4 %: n = 10", "no result (10 failed)"],
        ["better: +3.0 [+2.9, +3.1], n = 8; 2 diverged", "no pair"],
        ["no result (9 failed, 1 missing)", "no pair"],
    ]


def test_a_task_is_said_to_be_one_that_no_model_can_do_where_guessing_is_known(tmp_path: Path) -> None:
    root = folder(tmp_path, {"gravitational": [0.031, 0.029]})
    for _, path in results_of(root):
        rewrite(path, **{ACCURACY: 0.17})
    assert "; no model is told apart from guessing)" in seen(root)[2][0]
    put(root / "config.json", "task_info listops majority", None)
    assert seen(root)[2] == ["listops (points of accuracy)"]


def test_fewer_bits_are_a_gain(tmp_path: Path) -> None:
    root = folder(tmp_path, {"gravitational": [0.0]}, tasks=("bytes",))
    put(root / "config.json", "task_info bytes metric", "bits_per_byte")
    put(root / "config.json", "task_info bytes chance", 1 / 256)
    for cell, path in results_of(root):
        bits = 3.0 if cell.model == "conventional" else 2.8
        loss = (bits + 0.001 * cell.seed * (cell.seed % 3 + len(cell.model))) * math.log(2)
        rewrite(path, metric="bits_per_byte", test_loss_best=loss)
    sentences, _, tasks = seen(root)
    assert tasks == ["bytes (bits per byte, fewer are a gain)"]
    assert re.search(r"is better than Conventional on bytes \(-0\.19\d bits\)", sentences[1])


def test_who_learns_at_all_and_sooner_is_said_and_at_what_cost_with_its_caution(tmp_path: Path) -> None:
    root = folder(tmp_path, {"gravitational": [0.5] * 9 + [-0.3]})
    for cell, path in results_of(root):
        curve = (0.1, 0.4) if cell.model == "conventional" else (0.4, 0.4)
        rows = [{"epoch": n, "steps": 50 * n, "val_accuracy": value} for n, value in enumerate(curve, 1)]
        write_rows(path.parent, (row | {"train_seconds": 1.0} for row in rows))
        note_sharing(path.parent, 2)
    (_, sentence), table, _ = seen(root)
    learned = "seeds that learn: 9 of 10 against 0 of 10"
    assert f"is better than Conventional on listops ({learned})" in sentence
    assert table["Gravitational"][0].endswith(f"; {learned}")
    costs = "as much time per epoch and 1.17 times the parameters (times and memory: 2 cells on a device)."
    assert sentence.endswith(f"It reaches the target in fewer steps on listops. It takes {costs}")


@pytest.mark.parametrize(
    ("preset", "state", "expected"),
    [
        ("smoke", "done", ("A smoke test", "says nothing of any model.")),
        ("quick", "pending", ("No cell is done,", "so nothing can be said of any model.")),
    ],
)
def test_without_results_nothing_is_said(
    preset: str, state: str, expected: tuple[str, str], tmp_path: Path
) -> None:
    states = {Cell("listops", "conventional", 0): state}
    root = make_results(tmp_path, models=MODELS[:1], seeds=(0,), preset=preset, states=states)
    assert first_screen(analysed(root)) == ([expected], (), ())


def test_the_report_goes_from_the_verdict_over_the_tasks_to_the_settings(holed: Path) -> None:
    text = report_of(holed)
    tasks = "listops (ListOps (LRA))"
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["Verdict", tasks, "What was run", "Definitions", "How to reproduce"]
    top = text.replace("\\", "").split("## Verdict")[1].split("\n## ")[0]
    assert "- **Gravitational** has nothing to compare on listops.\n" in top
    assert re.search(r"too few seeds: .* n = 2; 1 diverged \|", top)
    page = (holed / "analysis" / "report.html").read_text(encoding="utf-8")
    marks = ("Gain over Conventional against", 'id="task-1"', 'alt="Test accuracy, listops"')
    places = [page.index(mark) for mark in (*marks, "What the numbers say")]
    assert places == sorted(places) and len(page) < 3_000_000
