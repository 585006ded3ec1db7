"""What TensorBoard is shown is what metrics.jsonl holds; without the package the option is refused."""

import json
from pathlib import Path

import pytest
from run_cases import HERE

import run_experiment
from experiment.tensorboard_log import FOLDER, scalars
from results_folder import Cell

ARGV = [*HERE, "--models", "gravitational_multi_timescale"]


@pytest.mark.usefixtures("compared")
@pytest.mark.filterwarnings("ignore")  # of TensorBoard's own imports
def test_tensorboard_is_shown_the_numbers_of_every_epoch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = [*ARGV, "--tensorboard", "--output-dir", str(tmp_path)]
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
