"""The comparison says what the results folder holds, no more and no less, and says it twice the same."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
from results_fixture import HOLES, MODELS, make_results, report_of, rewrite, snapshot, write
from run_cases import Refused

import analyze_results
from analyze_results import analyze, main
from reporting.analysis_report import render_report
from reporting.comparison_tables import CONVERGENCE, convergence_epoch, learned_table
from reporting.metrics import ACCURACY
from reporting.run_results import read_patterns, usable
from reporting.text_tables import latex, markdown, short
from results_folder import Cell, note_sharing, read_results

REPOSITORY = Path(analyze_results.__file__).parent
HOSTILE = "my_pkg.x:A$|*_<b>&%#{\\`[n](u)\u0001\u6f22" + "y" * 60


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One seed of two models in the smoke preset. Analysed."""
    root = tmp_path_factory.mktemp("smoke")
    make_results(root, tasks=("listops",), models=MODELS[:2], seeds=(0,), preset="smoke")
    analyze(root)
    return root


# The whole analysis


def test_an_analysis_has_a_report_three_tables_and_each_figure_as_png_and_pdf(holed: Path) -> None:
    analysis = holed / "analysis"
    names = {path.name for path in analysis.iterdir()}
    assert names == {"report.html", "report.md", "summary.csv", "summary.md", "summary.tex", "figures"}
    kinds = ["accuracy", "learning_curves", "attention_distance", "masses", "learned"]
    kinds += [f"attention_{model}" for model in MODELS if model != "gravitational"]
    stems = ["gain_at_cost", "differences", *(f"{kind}_listops" for kind in kinds)]
    figures = {path.name for path in (analysis / "figures").iterdir()}
    assert figures == {f"{stem}.{suffix}" for stem in stems for suffix in ("png", "pdf")}


def test_every_figure_is_in_the_report_and_every_figure_of_the_report_is_there(holed: Path) -> None:
    shown = set(re.findall(r"\(figures/(.+?)\.png\)", report_of(holed)))
    assert shown == {path.stem for path in (holed / "analysis" / "figures").glob("*.png")}


def test_another_process_makes_the_same_bytes_of_a_moved_folder_and_needs_no_torch(
    smoke: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(smoke, tmp_path / smoke.name, ignore=shutil.ignore_patterns("analysis")))
    code = (
        "import sys, analyze_results, evaluate_performance\n"
        f"assert analyze_results.main([{str(moved)!r}]) == 0\n"
        "assert 'torch' not in sys.modules\n"
        "assert sys.modules['matplotlib.pyplot'].get_fignums() == []\n"  # seaborn imports it
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "PYTHONWARNINGS": "error"}
    environment["MPLBACKEND"] = "none that there is"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"report: {moved / 'analysis' / 'report.html'}\n"
    assert snapshot(moved) == snapshot(smoke)


@pytest.mark.usefixtures("texts_alone")
def test_a_failure_leaves_the_old_analysis_and_no_scraps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_results(tmp_path, tasks=("listops",), models=MODELS[:1], seeds=(0,), patterns=False)
    (root / "analysis").mkdir()
    (root / "analysis" / "old.txt").write_text("old")
    before = snapshot(root)

    def fail(*_: object) -> str:
        raise RuntimeError("no ink")

    monkeypatch.setattr(analyze_results, "render_report", fail)
    with pytest.raises(RuntimeError, match="no ink"):
        analyze(root)
    assert snapshot(root) == before
    assert not list(root.glob(".analysis*"))
    monkeypatch.setattr(analyze_results, "render_report", render_report)
    analyze(root)
    assert not (root / "analysis" / "old.txt").exists()


def test_a_folder_that_is_no_results_folder_is_refused(tmp_path: Path, refused: Refused) -> None:
    write(tmp_path / "other" / "config.json", {"cells": [{"task": "x"}]})
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "other"):
        said = refused(main, folder)
        assert said.startswith("analyze_results.py: error:") and "is not a results folder" in said


@pytest.mark.parametrize("called", ["mkdtemp", "fsync"])
def test_a_folder_that_cannot_be_written_is_refused(
    called: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    root = make_results(tmp_path, tasks=("listops",), models=MODELS[:1], seeds=())

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr({"mkdtemp": tempfile, "fsync": os}[called], called, refuse)
    assert "No space left on device" in refused(main, root)
    assert not (root / "analysis").exists()


@pytest.mark.parametrize("seeds", [(0,), ()])
def test_a_folder_without_a_done_cell_still_gets_a_report_that_says_so(
    tmp_path: Path, seeds: tuple[int, ...]
) -> None:
    states = {Cell("listops", "conventional", 0): "pending", Cell("listops", "gravitational", 0): "missing"}
    root = make_results(tmp_path, tasks=("listops",), models=MODELS[:2], seeds=seeds, states=states)
    assert main([str(root)]) == 0
    text = report_of(root)
    assert "**No cell is done.**" in text
    assert "nothing can be said" in text
    assert ("listops/conventional/seed0: pending" in text) == bool(seeds)
    assert not list((root / "analysis" / "figures").iterdir())


# What the report says


def test_missing_failed_and_diverged_cells_are_named_with_their_reasons(holed: Path) -> None:
    for name in ("report.md", "summary.md"):
        text = (holed / "analysis" / name).read_text(encoding="utf-8")
        for cell, state in HOLES.items():
            line = next(line for line in text.splitlines() if markdown(str(cell)) in line)
            assert state in line
        assert "out of memory" in text and "the loss is nan in epoch 3" in text
    text = report_of(holed)
    top = text.split("\n## ")[0]
    assert "**4 of 12 cells are not done.** 1 diverged, 2 failed, 1 missing: they are in no mean" in top
    assert "8 of 12 done" in text and "**4 of 12 cells are not done** and are in no mean:" in text
    assert re.search(r"from the highest: .*Multi-timescale [\d.]+ % \(n = 2, 95 % interval", text)
    assert "too few seeds to tell; 3 are the least for a verdict" in text
    assert text.count("| Gravitational | 0 | – | – |") == 4  # noqa: RUF001 (a row in each table of means)
    assert "Smoke" not in text and "Left out" not in text
    table = pd.read_csv(holed / "analysis" / "summary.csv")
    done = table[table["metric"] == "done"].set_index(["model", "seed"])["value"]
    assert len(done) == 12 and not done["gravitational"].any()


def test_smoke_runs_are_said_at_the_top_and_in_every_table(smoke: Path) -> None:
    analysis = smoke / "analysis"
    top = report_of(smoke).split("\n## ")[0]
    assert "**Smoke test.**" in top
    notice = "smoke test: its numbers mean nothing"
    assert set(pd.read_csv(analysis / "summary.csv")["notice"]) == {notice}
    written = (analysis / "summary.md").read_text(encoding="utf-8")
    titles = [line for line in written.splitlines() if line.startswith("**")]
    assert len(titles) == 5  # the last is of all tasks, and says it in each row
    assert all("listops" in line for line in titles[:4]) and written.count(markdown(notice)) == 5
    tex = (analysis / "summary.tex").read_text(encoding="utf-8")
    assert tex.count(latex(notice)) == tex.count(r"\begin{tabular}") == 5


@pytest.mark.usefixtures("texts_alone")
def test_a_task_that_was_left_out_is_said_at_the_top(tmp_path: Path) -> None:
    analyze(make_results(tmp_path, tasks=("listops",), seeds=(0,), unavailable={"imdb": "no network"}))
    top = report_of(tmp_path).split("\n## ")[0]
    assert "**Left out: imdb.** Its data were unavailable: no network" in top


@pytest.mark.usefixtures("texts_alone")
def test_cells_with_a_core_each_are_said_once_and_their_costs_are_compared(tmp_path: Path) -> None:
    root = make_results(tmp_path, tasks=("listops",), models=MODELS[:2], seeds=(0,))
    rewrite(root / "environment.json", threads=1, cores=2)
    for model in MODELS[:2]:
        note_sharing(Cell("listops", model, 0).folder(root), 2)
    analyze(root)
    text = report_of(root)
    assert "- side by side: 2 cells at a time, each with one core of its own" in text
    assert "Shared devices" not in text and "cells on a device" not in text


@pytest.mark.usefixtures("texts_alone")
def test_cells_that_shared_a_device_are_told_at_the_top_and_wherever_times_are_shown(tmp_path: Path) -> None:
    root = make_results(tmp_path / "shared", tasks=("listops", "imdb"), models=MODELS[:2], seeds=(0,))
    for model, processes in zip(MODELS, (2, 3), strict=False):
        note_sharing(Cell("listops", model, 0).folder(root), processes)
    analyze(root)
    text, notice = report_of(root), "times and memory: 3 cells on a device"
    assert "**Shared devices.** 2 of 4 cells were trained with others" in text.split("## What was run")[0]
    assert text.count(f"multiple of Conventional's ({notice})") == 2
    written = (root / "analysis" / "summary.md").read_text(encoding="utf-8")
    titled = [line for line in written.splitlines() if line.startswith("**") and notice in line]
    assert len(titled) == 2 and all("listops" in line for line in titled)
    assert "cost" in titled[0] and "time to an accuracy" in titled[1]
    table = pd.read_csv(root / "analysis" / "summary.csv")
    marked = table[table["notice"] == notice]
    assert set(marked["task"]) == {"listops"} and table["notice"].isna().sum() == len(table) - len(marked)
    assert {"seconds_per_epoch", "peak_memory_bytes"} <= set(marked["metric"])
    assert ACCURACY not in set(marked["metric"])


def test_the_report_says_what_was_run_where_and_how_to_repeat_it(holed: Path) -> None:
    text = report_of(holed)
    for fact in (
        *("preset: full", "seeds: 0, 1, 2", "device: A CPU", "c0ffee", "largest class 17.5 %"),
        *("python run_experiment.py --preset full", f"python analyze_results.py {holed.name}"),
    ):
        assert fact in text


def test_how_far_horizons_and_gravity_moved_is_told_in_numbers(holed: Path) -> None:
    learned = learned_table(usable(read_results(holed)))
    mine = learned[(learned["model"] == "multi_timescale") & (learned["scalar"] == "horizon")]
    ends = mine[mine["epoch"].isin([1, 6])].groupby(["timescale", "epoch"])["value"].mean()
    moves = ", ".join(f"{short(ends[scale, 1])} to {short(ends[scale, 6])}" for scale in range(3))
    assert "Multi-timescale: horizons in tokens" in report_of(holed) and moves in report_of(holed)
    for moved in ("power of the distance p", "softening"):
        assert f"Gravitational multi-timescale: {moved} from the end of the first epoch" in report_of(holed)


def test_hostile_names_are_escaped_in_every_file_and_nothing_is_written_outside_analysis(
    tmp_path: Path,
) -> None:
    root, models = tmp_path / "results", ("conventional", HOSTILE)
    make_results(root, tasks=("../up|<script>",), models=models, seeds=(0,), epochs=1)
    before, settings = snapshot(tmp_path), dict(matplotlib.rcParams)
    analyze(root)
    after = snapshot(tmp_path)
    assert {path: after[path] for path in before} == before
    assert all(path.startswith("results/analysis") for path in after.keys() - before.keys())
    assert [path.name for path in root.glob(".*")] == [] and dict(matplotlib.rcParams) == settings
    text = report_of(root)
    assert "<script>" not in text and "<b>" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert widths <= {3, 5, 8, 9, 12}  # no name adds a column
    tex = (root / "analysis" / "summary.tex").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)[$%#_]", tex.split("\n", 1)[1])
    assert "\u0001" not in text + tex
    assert set(pd.read_csv(root / "analysis" / "summary.csv")["model"]) == {"conventional", HOSTILE}


def test_a_done_cell_without_a_usable_result_or_pattern_is_named(tmp_path: Path) -> None:
    models = ("conventional", "gravitational", "multi_timescale")
    root = make_results(tmp_path, tasks=("listops",), models=models, seeds=(0,))
    write(Cell("listops", "gravitational", 0).folder(root) / "result.json", {ACCURACY: None})
    (Cell("listops", "multi_timescale", 0).folder(root) / "attention_patterns.npz").write_bytes(b"PK")
    results = usable(read_results(root))
    patterns, reasons = read_patterns(results)
    assert [record.state for record in results.cells] == ["done", "failed", "done"]
    assert results.cells[1].reason == "unusable: result.json has no test_accuracy_best"
    assert [cell.model for cell in patterns] == ["conventional"]
    assert [cell.model for cell in reasons] == ["multi_timescale"]


@pytest.mark.usefixtures("texts_alone")
@pytest.mark.parametrize("info", [7, {"listops": "x"}, {"listops": {"chance": 7, "majority": "x"}}])
def test_strange_values_in_the_files_break_no_table(info: object, tmp_path: Path) -> None:
    root = make_results(tmp_path, tasks=("listops",), models=("conventional",), seeds=(0,), patterns=False)
    folder = Cell("listops", "conventional", 0).folder(root)
    row = {"epoch": 1, "val_accuracy": "high", "learned": {"layer0": {"gamma": [[1.0, "x"], 3]}, "y": 5}}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    write(folder / "result.json", {ACCURACY: 0.5, "parameters": "many", "seconds_per_epoch": None})
    rewrite(root / "config.json", task_info=info, settings=3, unavailable=[1])
    (root / "environment.json").unlink()
    assert main([str(root)]) == 0
    assert "Conventional 50.0 % (n = 1, no interval)" in report_of(root)
    assert len(learned_table(usable(read_results(root)))) == 0


def test_the_summary_table_holds_every_result_of_the_folder(holed: Path) -> None:
    table = pd.read_csv(holed / "analysis" / "summary.csv", float_precision="round_trip")
    assert list(table.columns) == ["task", "model", "seed", "metric", "value", "notice"]
    assert table["notice"].isna().all()
    for record in read_results(holed).cells:
        mine = table[(table["model"] == record.cell.model) & (table["seed"] == record.cell.seed)]
        values = dict(zip(mine["metric"], mine["value"], strict=True))
        for metric in (ACCURACY, "peak_memory_bytes", "parameters"):
            assert values.get(metric) == (record.result or {}).get(metric)
        if record.state == "done":  # of the epochs, whatever an old result.json says
            accuracies = [row["val_accuracy"] for row in record.metrics]
            assert values["convergence_epoch"] == convergence_epoch(accuracies)
            assert values[CONVERGENCE] == convergence_epoch(accuracies, 0.1)
