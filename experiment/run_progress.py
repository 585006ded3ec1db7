"""How a run is watched: a line per epoch and cell, on a terminal with tqdm bars below them.

progress = make_progress(cells, max_epochs, side_by_side=2)
run_cell(job, progress.of(cell), check)           # a Progress for the trainer of one cell
progress.cell_ended(cell, "done", "test accuracy 73.3%")
"""

import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from results_folder import Cell
from training.training_progress import Progress


class RunProgress:
    """Lines on standard output. side_by_side: how many cells run at a time."""

    def __init__(self, cells: Sequence[Cell], max_epochs: int, side_by_side: int = 1) -> None:
        self.max_epochs, self.side_by_side = max_epochs, side_by_side
        self.epochs_left = dict.fromkeys(cells, max_epochs)
        self.cells_ended = self.epochs_done = 0
        self.seconds = 0.0

    def of(self, cell: Cell) -> Progress:
        """What the trainer of a cell tells its news to."""
        return CellProgress(self, cell)

    def say(self, line: str) -> None:
        print(line, flush=True)

    def note(self, cell: Cell, text: str) -> None:
        self.say(f"{cell}: {text}")

    def epoch_started(self, cell: Cell, epoch: int, steps: int) -> None:
        """`steps` optimizer steps are to come."""

    def steps_done(self, steps: int, loss: float | None, accuracy: float | None) -> None:
        """Steps since the last call; the epoch's loss and accuracy so far, where they were just read."""

    def epoch_ended(self, cell: Cell, row: dict[str, Any]) -> None:
        """`row`: the epoch's line of metrics.jsonl."""
        seconds = (row["train_seconds"] or 0.0) + row["eval_seconds"]
        self.seconds += seconds
        self.epochs_done += 1
        self.epochs_left[cell] = self.max_epochs - row["epoch"]
        # If every epoch to come is run, at the mean time of those that were.
        to_come = sum(self.epochs_left.values()) * self.seconds / self.epochs_done / self.side_by_side
        self.note(
            cell,
            f"epoch {row['epoch']}/{self.max_epochs}: "
            f"training loss {row['train_loss']:.3f}, accuracy {row['train_accuracy']:.1%}; "
            f"validation loss {row['val_loss']:.3f}, accuracy {row['val_accuracy']:.1%}; "
            f"{seconds:.1f} s, at most about {duration(to_come)} left",
        )

    def cell_ended(self, cell: Cell, state: str, outcome: str) -> None:
        """`outcome`: the result of a cell that is done, the reason of one that is not."""
        self.cells_ended += 1
        self.epochs_left[cell] = 0
        self.say(f"[{self.cells_ended}/{len(self.epochs_left)}] {cell}: {state}: {outcome}")

    def close(self) -> None:
        """No more is to come."""


class TerminalProgress(RunProgress):
    """The same lines above bars: cells and, where one runs at a time, the steps of its epoch."""

    def __init__(self, cells: Sequence[Cell], max_epochs: int, side_by_side: int = 1) -> None:
        super().__init__(cells, max_epochs, side_by_side)
        self.cell_bar = tqdm(total=len(cells), unit="cell", position=0, dynamic_ncols=True)
        self.step_bar: tqdm[Any] | None = None

    def say(self, line: str) -> None:
        tqdm.write(line)

    def epoch_started(self, cell: Cell, epoch: int, steps: int) -> None:
        text = f"{cell}, epoch {epoch}"
        self.step_bar = tqdm(total=steps, desc=text, unit="step", position=1, leave=False, dynamic_ncols=True)

    def steps_done(self, steps: int, loss: float | None, accuracy: float | None) -> None:
        assert self.step_bar is not None
        if loss is not None and accuracy is not None:
            self.step_bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}", refresh=False)
        self.step_bar.update(steps)

    def epoch_ended(self, cell: Cell, row: dict[str, Any]) -> None:
        self._close_step_bar()
        super().epoch_ended(cell, row)

    def cell_ended(self, cell: Cell, state: str, outcome: str) -> None:
        self._close_step_bar()
        super().cell_ended(cell, state, outcome)
        self.cell_bar.update(1)

    def close(self) -> None:
        self._close_step_bar()
        self.cell_bar.close()

    def _close_step_bar(self) -> None:
        if self.step_bar is not None:
            self.step_bar.close()
            self.step_bar = None


class CellProgress(Progress):
    """Hands on what the trainer of one cell tells, with the cell's name."""

    def __init__(self, run: RunProgress, cell: Cell) -> None:
        self.run, self.cell = run, cell

    def epoch_started(self, epoch: int, steps: int) -> None:
        self.run.epoch_started(self.cell, epoch, steps)

    def steps_done(self, steps: int, loss: float | None, accuracy: float | None) -> None:
        self.run.steps_done(steps, loss, accuracy)

    def epoch_ended(self, row: dict[str, Any]) -> None:
        self.run.epoch_ended(self.cell, row)

    def note(self, text: str) -> None:
        self.run.note(self.cell, text)


def make_progress(cells: Sequence[Cell], max_epochs: int, side_by_side: int) -> RunProgress:
    """Bars where standard error, which they are drawn on, is a terminal."""
    kind = TerminalProgress if sys.stderr.isatty() else RunProgress
    return kind(cells, max_epochs, side_by_side)


def duration(seconds: float) -> str:
    """A rounded length of time: 0.4 s, 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
