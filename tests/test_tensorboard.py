"""What TensorBoard is shown is what metrics.jsonl holds; without the package the option is refused."""

import importlib.util
import json
from pathlib import Path

import pytest

import run_experiment
from experiment.tensorboard_log import FOLDER, scalars
from results_folder import Cell

ARGV = ["--preset", "smoke", "--tasks", "listops", "--models", "gravitational_multi_timescale"]


@pytest.mark.filterwarnings("ignore")  # of TensorBoard's own imports
def test_tensorboard_is_shown_the_numbers_of_every_epoch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = [*ARGV, "--tensorboard", "--device", "cpu", "--output-dir", str(tmp_path)]
    assert run_experiment.main(argv) == 0
    [root] = tmp_path.iterdir()
    folder = Cell("listops", "gravitational_multi_timescale", 0).folder(root)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(folder / FOLDER))
    events.Reload()
    shown = {
        (event.step, tag): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)
    }
    written = {(row["epoch"], name): value for row in rows for name, value in scalars(row) if name != "epoch"}
    assert shown == pytest.approx(written, rel=1e-6)
    assert len(rows) == 2 and (2, "learned/layer0/gamma/0/0") in shown and (1, "val_accuracy") in shown


def test_without_the_package_the_option_is_one_line_and_exit_code_2_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_experiment.main([*ARGV, "--tensorboard", "--output-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "requirements-tensorboard.txt" in error
    assert list(tmp_path.iterdir()) == []
