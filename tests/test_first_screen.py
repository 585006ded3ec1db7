"""The first screen of a report says what the numbers allow, of every kind of folder, and nothing more."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from results_fixture import HOLES, MODELS, make_results, without_figures, write

from analyze_results import analyze
from reporting.analysis import make_analysis
from reporting.first_screen import FirstScreen, first_screen
from reporting.metrics import ACCURACY
from reporting.run_results import read_joined
from results_folder import Cell, note_sharing

TEN = tuple(range(10))
CLAIM = re.compile(r"\b(better|worse|ahead|behind|sooner|later)\b")


def screen_of(root: Path) -> FirstScreen:
    return first_screen(make_analysis(read_joined([root])))


def said(screen: FirstScreen) -> list[str]:
    return [str(verdict) for verdict in screen.verdicts]


def entries(screen: FirstScreen) -> dict[str, list[str]]:
    """The rows of the matrix in words, by model."""
    assert screen.matrix
    return {name: [str(entry) for entry in row] for name, row in screen.matrix.rows}


def rewrite(path: Path, **values: Any) -> None:
    write(path, json.loads(path.read_text()) | values)


def folder(root: Path, gains: dict[str, list[float]], task: str = "listops", **options: Any) -> Path:
    """Ten seeds of a task, or as many as given: conventional at 40 % and a bit, the others with a gain."""
    seeds = options.pop("seeds", TEN)
    models = ("conventional", *gains)
    make_results(root, tasks=(task,), models=models, seeds=seeds, patterns=False, epochs=2, **options)
    for seed in seeds:
        for model in models:
            path = Cell(task, model, seed).folder(root) / "result.json"
            gain = gains[model][seed % len(gains[model])] if model in gains else 0.0
            if path.exists():
                rewrite(path, **{ACCURACY: 0.4 + 0.001 * seed + gain, "seconds_per_epoch": 10.0})
    return root


def test_ten_seeds_are_given_the_verdicts_of_their_numbers(tmp_path: Path) -> None:
    gains = {MODELS[1]: [0.031, 0.029], MODELS[2]: [0.02, -0.02], MODELS[3]: [-0.021, -0.019]}
    screen = screen_of(folder(tmp_path, gains | {"discounted": [0.001, -0.001]}))
    base, gravity, scales, both, discounted = said(screen)
    assert base == "Conventional is what the others are compared with: 40.4 % on listops."
    assert gravity.startswith("Gravitational is better than Conventional on listops (+3.0 points). It ")
    assert gravity.endswith("It takes as much time per epoch and 1.17 times the parameters.")
    assert scales.startswith("Multi-timescale is not told apart from Conventional on listops. It reaches")
    assert both.startswith(
        "Gravitational multi-timescale is worse than Conventional on listops (-2.0 points)."
    )
    assert "has no relevant difference to Conventional on listops. It" in discounted
    rows = entries(screen)
    assert rows["Conventional (baseline)"] == ["40.4 %: n = 10"]
    assert rows["Gravitational"] == ["better: +3.0 [+2.9, +3.1], n = 10"]
    kinds = [row[0].kind for _, row in screen.matrix.rows] if screen.matrix else []
    assert kinds == ["baseline", "better", "open", "worse", "no relevant difference"]
    legend = screen.matrix.legend if screen.matrix else ""
    assert [part.split(":")[0] for part in legend.split("; ")[:2]] == ["better", "worse"]
    assert "too few seeds" not in legend  # what does not occur is not explained


@pytest.mark.parametrize("seeds", [(4,), (0, 1)])
def test_one_or_two_seeds_have_numbers_and_no_verdict(seeds: tuple[int, ...], tmp_path: Path) -> None:
    gains = {"gravitational": [0.3, 0.31], "multi_timescale": [-0.3, -0.31]}
    screen = screen_of(folder(tmp_path, gains, seeds=seeds))
    n = len(seeds)
    for sentence in said(screen)[1:]:
        assert "has no verdict, for too few seeds (3 pairs are the least), on listops (" in sentence
        assert f"points, n = {n})" in sentence
    assert not CLAIM.search(str(screen))
    for [entry] in list(entries(screen).values())[1:]:
        assert entry.startswith("too few seeds: ") and ("[" in entry) == (n > 1)


def test_what_is_not_done_is_named_beside_every_number_and_flatters_nobody(tmp_path: Path) -> None:
    states = {Cell("listops", "gravitational", seed): "diverged" for seed in (1, 2)}
    states |= {Cell("listops", "multi_timescale", seed): "failed" for seed in TEN[:9]}
    states[Cell("listops", "multi_timescale", 9)] = "missing"
    screen = screen_of(folder(tmp_path, {MODELS[1]: [0.031, 0.029], MODELS[2]: [0.1]}, states=states))
    _, gravity, scales = said(screen)
    assert "is better than Conventional on listops (+3.0 points, 2 diverged)." in gravity
    assert "Seeds that diverged are in no mean, which flatters it." in gravity
    assert scales == "Multi-timescale has nothing to compare on listops."
    rows = entries(screen)
    assert rows["Gravitational"] == ["better: +3.0 [+2.9, +3.1], n = 8; 2 diverged"]
    assert rows["Multi-timescale"] == ["no result (9 failed, 1 missing)"]


def test_without_a_result_of_the_baseline_nothing_is_compared(tmp_path: Path) -> None:
    states = {Cell("listops", "conventional", seed): "failed" for seed in TEN}
    screen = screen_of(folder(tmp_path, {"gravitational": [0.3]}, states=states))
    assert said(screen) == [
        "Conventional is what the others are compared with. It has no result on listops: nothing is compared "
        "there.",
        "Gravitational has nothing to compare on listops.",
    ]
    assert list(entries(screen).values()) == [["no result (10 failed)"], ["no pair"]]
    assert screen.matrix and screen.matrix.tasks == ["listops (points of accuracy)"]


def test_holes_of_a_real_looking_folder_are_in_the_report(holed: Path) -> None:
    text = (holed / "analysis" / "report.md").read_text(encoding="utf-8").replace("\\", "")
    top = text.split("## Verdict")[1].split("\n## ")[0]
    assert "- **Gravitational** has nothing to compare on listops.\n" in top
    assert "too few seeds: " in top and "n = 2; 1 diverged |" in top
    assert len(HOLES) == 4 and "no result (2 failed, 1 missing)" in top


def test_a_task_that_nobody_knows_is_compared_and_nothing_is_said_of_guessing(tmp_path: Path) -> None:
    root = folder(tmp_path, {"gravitational": [0.031, 0.029]}, task="mystery")
    rewrite(root / "config.json", task_info={})
    screen = screen_of(root)
    assert screen.matrix and screen.matrix.tasks == ["mystery (points of accuracy)"]
    assert "is better than Conventional on mystery (+3.0 points)" in said(screen)[1]


def test_a_task_that_no_model_can_do_is_said_to_be_one(tmp_path: Path) -> None:
    root = folder(tmp_path, {"gravitational": [0.001, -0.001]})
    for model in MODELS[:2]:
        for seed in TEN:
            rewrite(Cell("listops", model, seed).folder(root) / "result.json", **{ACCURACY: 0.17})
    screen = screen_of(root)
    assert screen.matrix
    assert screen.matrix.tasks == ["listops (points of accuracy; no model is told apart from guessing)"]


def test_fewer_bits_are_a_gain(tmp_path: Path) -> None:
    root = folder(tmp_path, {"gravitational": [0.0]}, task="bytes")
    config = json.loads((root / "config.json").read_text())
    info = config["task_info"]["bytes"] | {"metric": "bits_per_byte", "chance": 1 / 256}
    rewrite(root / "config.json", task_info={"bytes": info})
    for model, bits in (("conventional", 3.0), ("gravitational", 2.8)):
        for seed in TEN:
            loss = (bits + 0.001 * seed * (seed % 3 + len(model))) * math.log(2)
            path = Cell("bytes", model, seed).folder(root) / "result.json"
            rewrite(path, metric="bits_per_byte", test_loss_best=loss)
    screen = screen_of(root)
    assert screen.matrix and screen.matrix.tasks == ["bytes (bits per byte, fewer are a gain)"]
    assert re.search(r"is better than Conventional on bytes \(-0\.19\d bits\)", said(screen)[1])


def test_seeds_that_learn_or_do_not_are_counted(tmp_path: Path) -> None:
    screen = screen_of(folder(tmp_path, {"gravitational": [0.5] * 9 + [-0.3]}))
    learned = "seeds that learn: 9 of 10 against 0 of 10"
    assert f"is better than Conventional on listops ({learned})" in said(screen)[1]
    assert entries(screen)["Gravitational"][0].endswith(f"; {learned}")


def test_who_learns_sooner_is_said_and_at_what_cost_with_its_caution(tmp_path: Path) -> None:
    root = folder(tmp_path, {"gravitational": [0.0]})
    for model, curve in (("conventional", (0.1, 0.4)), ("gravitational", (0.4, 0.4))):
        for seed in TEN:
            place = Cell("listops", model, seed).folder(root)
            rows = [
                {"epoch": epoch, "steps": 50 * epoch, "val_accuracy": value, "train_seconds": 1.0}
                for epoch, value in enumerate(curve, 1)
            ]
            (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            note_sharing(place, 2)
    [_, sentence] = said(screen_of(root))
    assert sentence.endswith(
        "It reaches the target sooner on listops. It takes as much time per epoch and 1.17 times the "
        "parameters (times and memory: 2 cells on a device)."
    )


@pytest.mark.parametrize("preset", ["smoke", "quick"])
def test_a_smoke_test_and_a_folder_without_a_result_say_nothing_of_any_model(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_figures(monkeypatch)
    states = {Cell("listops", "conventional", 0): "pending"} if preset == "quick" else {}
    options: dict[str, Any] = {"models": MODELS[:1], "seeds": (0,), "preset": preset, "states": states}
    root = make_results(tmp_path, tasks=("listops",), **options)
    screen = screen_of(root)
    expected = {
        "smoke": "A smoke test says nothing of any model.",
        "quick": "No cell is done, so nothing can be said of any model.",
    }
    assert said(screen) == [expected[preset]] and screen.matrix is None
    analyze(root)
    text = (root / "analysis" / "report.md").read_text(encoding="utf-8")
    assert expected[preset] in text.replace("*", "")


def test_the_report_goes_from_the_verdict_over_the_tasks_to_the_settings(tmp_path: Path) -> None:
    root = make_results(tmp_path, patterns=False, epochs=2, models=MODELS[:2])
    analyze(root)
    headings = re.findall(r"^## (.*)$", (root / "analysis" / "report.md").read_text("utf-8"), re.MULTILINE)
    tasks = [r"listops (ListOps (LRA))", r"imdb (IMDb bytes (LRA Text))"]
    assert headings == ["Verdict", *tasks, "What was run", "Definitions", "How to reproduce"]
    page = (root / "analysis" / "report.html").read_text(encoding="utf-8")
    places = [
        page.index(mark) for mark in ("Gain over Conventional against cost.", 'id="task-1"', "<details>")
    ]
    assert places == sorted(places) and page.index('alt="Test accuracy, listops"') < page.index("<details>")
    assert len(page) < 3_000_000
