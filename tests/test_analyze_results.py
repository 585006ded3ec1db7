"""The comparison says what the results folder holds, no more and no less, and says it twice the same."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import matplotlib
import pandas as pd
import pytest
from results_fixture import HOLES, MODELS, make_results, report_of, rewrite, snapshot, write, write_rows
from run_cases import Refused

import analyze_results
from analyze_results import analyze, main
from reporting.comparison_tables import CONVERGENCE, convergence_epoch, learned_table
from reporting.metrics import ACCURACY
from reporting.run_results import read_patterns, usable
from reporting.text_tables import latex, markdown, short
from results_folder import Cell, note_sharing, read_results

REPOSITORY = Path(analyze_results.__file__).parent
HOSTILE = "my_pkg.x:A$|*_<b>&%#{\\`[n](u)\u0001\u6f22" + "y" * 60


def test_an_analysis_has_a_report_with_every_figure_and_three_tables(holed: Path) -> None:
    analysis = holed / "analysis"
    names = {path.name for path in analysis.iterdir()}
    assert names == {"report.html", "report.md", "summary.csv", "summary.md", "summary.tex", "figures"}
    kinds = ["accuracy", "learning_curves", "attention", "attention_distance", "masses", "learned"]
    stems = ["gain_at_cost", "differences", *(f"{kind}_listops" for kind in kinds)]
    figures = {path.name for path in (analysis / "figures").iterdir()}
    assert figures == {f"{stem}.png" for stem in stems}
    shown = re.findall(r"\(figures/(.+?)\.png\)", report_of(holed))
    assert set(shown) == set(stems)


def test_another_process_makes_the_same_bytes_elsewhere_with_several_and_without_torch(
    tmp_path: Path,
) -> None:
    tasks = "listops", "imdb", "image"
    root = make_results(tmp_path / "a" / "run", tasks=tasks, models=MODELS[:1], seeds=(0,), epochs=2)
    for path in [*root.glob("imdb/**/*.npz"), *root.glob("image/**/*.npz")]:
        path.unlink()
    moved = Path(shutil.copytree(root, tmp_path / "b" / "run"))
    analyze(root, pdf=True)
    assert {path.suffix for path in (root / "analysis" / "figures").iterdir()} == {".png", ".pdf"}
    code = (
        "import sys, pathlib, analyze_results, evaluate_performance\n"
        f"analyze_results.analyze(pathlib.Path({str(moved)!r}), processes=2, pdf=True)\n"
        "assert 'torch' not in sys.modules\n"
        "assert sys.modules['matplotlib.pyplot'].get_fignums() == []\n"  # seaborn imports it
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "PYTHONWARNINGS": "error"}
    environment["MPLBACKEND"] = "none that there is"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert snapshot(moved) == snapshot(root)


@pytest.mark.usefixtures("texts_alone")
def test_a_failure_leaves_the_old_analysis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_results(tmp_path, models=MODELS[:1], seeds=(0,), patterns=False)
    write(root / "analysis" / "old.json", "old")
    before = snapshot(root)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="no ink"):
        patched.setattr(analyze_results, "render_report", Mock(side_effect=RuntimeError("no ink")))
        analyze(root)
    assert snapshot(root) == before  # and so no scraps
    analyze(root)
    assert not (root / "analysis" / "old.json").exists()


@pytest.mark.parametrize("called", ["mkdtemp", "fsync"])
def test_a_folder_that_cannot_be_written_is_refused(
    called: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    root = make_results(tmp_path, models=MODELS[:1], seeds=())
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr({"mkdtemp": tempfile, "fsync": os}[called], called, full)
    assert "No space left on device" in refused(main, root)
    assert not (root / "analysis").exists()


@pytest.mark.parametrize("seeds", [(0,), ()])
def test_a_folder_without_a_done_cell_has_a_report_that_says_so(
    tmp_path: Path, seeds: tuple[int, ...]
) -> None:
    states = {Cell("listops", "conventional", 0): "pending"}
    root = make_results(tmp_path, models=MODELS[:1], seeds=seeds, states=states)
    assert main([str(root)]) == 0
    text = report_of(root)
    assert "**No cell is done.**" in text and "nothing can be said" in text
    assert ("| listops/conventional/seed0 | pending |" in text) == bool(seeds)
    assert not list((root / "analysis" / "figures").iterdir())


def test_missing_failed_and_diverged_cells_are_named_with_their_reasons(holed: Path) -> None:
    for name in ("report.md", "summary.md"):
        text = (holed / "analysis" / name).read_text(encoding="utf-8")
        for cell, state in HOLES.items():
            line = next(line for line in text.splitlines() if markdown(str(cell)) in line)
            assert state in line
        assert "out of memory" in text and "the loss is nan in epoch 3" in text
    text = report_of(holed)
    top = text.split("\n## ")[0]
    assert "**4 of 12 cells are not done.** 2 failed, 1 missing, 1 diverged: they are in no mean" in top
    assert re.search(r"from the highest: .*Multi-timescale [\d.]+ % \(n = 2, 95 % interval", text)
    assert text.count("| Gravitational | 0 | – | – |") == 4  # noqa: RUF001 (a row in each table of means)
    assert "Smoke" not in text and "Left out" not in text
    table = pd.read_csv(holed / "analysis" / "summary.csv")
    done = table[table["metric"] == "done"].set_index(["model", "seed"])["value"]
    assert len(done) == 12 and not done["gravitational"].any()


@pytest.mark.usefixtures("texts_alone")
def test_a_smoke_run_and_a_task_left_out_are_said_at_the_top_and_cells_with_a_core_each_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {"preset": "smoke", "epochs": 1, "unavailable": {"imdb": "no network"}}
    root = make_results(tmp_path, models=MODELS[:2], seeds=(0,), **given)
    rewrite(root / "environment.json", threads=1, cores=2)
    for record in read_results(root).cells:
        note_sharing(record.folder, 2)
    assert main([str(root)]) == 0
    assert capsys.readouterr().out == f"report: {root / 'analysis' / 'report.html'}\n"
    text, notice = report_of(root), "smoke test: its numbers mean nothing"
    top = text.split("\n## ")[0]
    assert "**Smoke test.**" in top
    assert "**Left out: imdb.** Its data were unavailable: no network" in top
    assert "- side by side: 2 cells at a time, each with one core of its own" in text
    assert "Shared devices" not in text and "cells on a device" not in text
    assert set(pd.read_csv(root / "analysis" / "summary.csv")["notice"]) == {notice}
    written, tex = ((root / "analysis" / f"summary.{kind}").read_text("utf-8") for kind in ("md", "tex"))
    tables = written.count("\n\n**") + 1
    assert written.count(markdown(notice)) == tables == 5  # the last is of all tasks, and says it in each row
    assert tex.count(latex(notice)) == tex.count(r"\begin{tabular}") == 5


@pytest.mark.usefixtures("texts_alone")
def test_cells_that_shared_a_device_are_told_at_the_top_and_wherever_times_are_shown(tmp_path: Path) -> None:
    tasks = ("listops", "imdb")
    root = make_results(tmp_path, tasks=tasks, models=MODELS[:2], seeds=(0,), patterns=False)
    for model, processes in zip(MODELS, (2, 3), strict=False):
        note_sharing(Cell("listops", model, 0).folder(root), processes)
    analyze(root)
    text, notice = report_of(root), "times and memory: 3 cells on a device"
    assert "**Shared devices.** 2 of 4 cells were trained with others" in text.split("\n## ")[0]
    assert text.count(f"multiple of Conventional's ({notice})") == 2
    written = (root / "analysis" / "summary.md").read_text(encoding="utf-8")
    cost, time = [line for line in written.splitlines() if line.startswith("**") and notice in line]
    assert cost.startswith("**listops") and ": cost (" in cost
    assert time.startswith("**listops") and ": time to an accuracy" in time
    table = pd.read_csv(root / "analysis" / "summary.csv")
    marked = table[table["notice"] == notice]
    assert set(marked["task"]) == {"listops"} and table["notice"].isna().sum() == len(table) - len(marked)
    timed = set(marked["metric"])
    assert {"seconds_per_epoch", "peak_memory_bytes"} <= timed and ACCURACY not in timed


def test_the_report_says_what_was_run_how_to_repeat_it_and_how_far_scalars_moved(holed: Path) -> None:
    text = report_of(holed)
    for fact in (
        *("preset: full", "seeds: 0, 1, 2", "device: A CPU", "c0ffee", "largest class 17.5 %"),
        *("python run_experiment.py --preset full", f"python analyze_results.py {holed.name}"),
    ):
        assert fact in text
    learned = learned_table(usable(read_results(holed)))
    mine = learned[(learned["model"] == "multi_timescale") & (learned["scalar"] == "horizon")]
    ends = mine[mine["epoch"].isin([1, 6])].groupby(["timescale", "epoch"])["value"].mean()
    moves = ", ".join(f"{short(ends[scale, 1])} to {short(ends[scale, 6])}" for scale in range(3))
    assert "Multi-timescale: horizons in tokens" in text and moves in text
    for moved in ("power of the distance p", "softening"):
        assert f"Gravitational multi-timescale: {moved} from the end of the first epoch" in text


def test_hostile_names_are_escaped_and_nothing_is_written_outside_analysis(tmp_path: Path) -> None:
    root, models = tmp_path / "results", ("conventional", HOSTILE)
    make_results(root, tasks=("../up|<script>",), models=models, seeds=(0,), epochs=1)
    before, settings = snapshot(tmp_path), dict(matplotlib.rcParams)
    analyze(root)
    after = snapshot(tmp_path)
    assert {path: after[path] for path in before} == before
    assert all(path.startswith("results/analysis") for path in after.keys() - before.keys())
    assert [path.name for path in root.glob(".*")] == [] and dict(matplotlib.rcParams) == settings
    text = report_of(root)
    tex = (root / "analysis" / "summary.tex").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)[$%#_]", tex.split("\n", 1)[1])
    assert "\u0001" not in text + tex
    assert set(pd.read_csv(root / "analysis" / "summary.csv")["model"]) == {"conventional", HOSTILE}


def test_a_done_cell_without_a_usable_result_or_pattern_is_named(tmp_path: Path) -> None:
    root = make_results(tmp_path, models=MODELS[:3], seeds=(0,), epochs=1)
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
    root = make_results(tmp_path, models=("conventional",), seeds=(0,), patterns=False)
    folder = Cell("listops", "conventional", 0).folder(root)
    learned = {"layer0": {"gamma": [[1.0, "x"], 3]}, "y": 5}
    write_rows(folder, [{"epoch": 1, "val_accuracy": "high", "learned": learned}])
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
