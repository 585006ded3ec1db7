"""How a run is watched: tqdm bars on a terminal, else one line per epoch with the time left.

progress = make_progress(cells, max_epochs)
progress.cell_started(cell)
run_cell(..., progress=progress)
progress.cell_ended(state, reason)
"""

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from experiment.training_progress import Progress
from results_folder import Cell

RAN_ELSEWHERE = "another process ran it"


class RunProgress(Progress):
    """One line per cell and per epoch, on standard output."""

    def __init__(self, cells: Sequence[Cell], max_epochs: int) -> None:
        self.cells, self.max_epochs = cells, max_epochs
        self.cells_started = self.epochs_done = 0
        self.seconds = 0.0

    def say(self, line: str) -> None:
        # A pipe that was closed, or a log on a full disk, is no failure of the cell in training.
        with contextlib.suppress(OSError):
            print(line, flush=True)

    def cell_started(self, cell: Cell) -> None:
        self.cells_started += 1
        self.say(f"[{self.cells_started}/{len(self.cells)}] {cell}")

    def note(self, text: str) -> None:
        self.say(f"  {text}")

    def epoch_ended(self, row: dict[str, Any]) -> None:
        seconds = (row["train_seconds"] or 0.0) + row["eval_seconds"]
        self.seconds += seconds
        self.epochs_done += 1
        self.say(
            f"  epoch {row['epoch']}/{self.max_epochs}: "
            f"training loss {row['train_loss']:.3f}, accuracy {row['train_accuracy']:.1%}; "
            f"validation loss {row['val_loss']:.3f}, accuracy {row['val_accuracy']:.1%}; "
            f"{seconds:.1f} s, at most about {duration(self.seconds_left(row['epoch']))} left"
        )

    def seconds_left(self, epoch: int) -> float:
        """If every epoch to come is run, at the mean time of those that were."""
        cells_to_come = len(self.cells) - self.cells_started
        epochs = cells_to_come * self.max_epochs + self.max_epochs - epoch
        return epochs * self.seconds / self.epochs_done

    def cell_ended(self, state: str, outcome: str) -> None:
        """`outcome`: the result of a cell that is done, the reason of one that is not."""
        self.say(f"  {state}: {outcome}")

    def close(self) -> None:
        """No more is to come."""


class TerminalProgress(RunProgress):
    """The same lines above two bars: cells, and the steps of the epoch with its loss and accuracy so far."""

    def __init__(self, cells: Sequence[Cell], max_epochs: int) -> None:
        super().__init__(cells, max_epochs)
        self.cell_bar = tqdm(total=len(cells), unit="cell", position=0, dynamic_ncols=True)
        self.step_bar: tqdm[Any] | None = None

    def say(self, line: str) -> None:
        tqdm.write(line)

    def cell_started(self, cell: Cell) -> None:
        super().cell_started(cell)
        self.cell_bar.set_description(str(cell))

    def epoch_started(self, epoch: int, steps: int) -> None:
        self.step_bar = tqdm(
            total=steps, desc=f"epoch {epoch}", unit="step", position=1, leave=False, dynamic_ncols=True
        )

    def steps_done(self, steps: int, loss: float | None, accuracy: float | None) -> None:
        assert self.step_bar is not None
        if loss is not None and accuracy is not None:
            self.step_bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}", refresh=False)
        self.step_bar.update(steps)

    def epoch_ended(self, row: dict[str, Any]) -> None:
        self._close_step_bar()
        super().epoch_ended(row)

    def cell_ended(self, state: str, outcome: str) -> None:
        self._close_step_bar()
        super().cell_ended(state, outcome)
        self.cell_bar.update(1)

    def close(self) -> None:
        self._close_step_bar()
        self.cell_bar.close()

    def _close_step_bar(self) -> None:
        if self.step_bar is not None:
            self.step_bar.close()
            self.step_bar = None


class WorkerProgress(RunProgress):
    """The same lines, each with its cell's name: they are shown among those of other processes."""

    def __init__(self, cells: Sequence[Cell], max_epochs: int, processes: int) -> None:
        super().__init__(cells, max_epochs)
        self.processes = processes

    def cell_started(self, cell: Cell) -> None:
        self.cell = cell
        self.cells_started += 1

    def say(self, line: str) -> None:
        super().say(f"{self.cell}: {line.strip()}")

    def seconds_left(self, epoch: int) -> float:
        """As if the cells to come were shared out evenly."""
        this_cell = (self.max_epochs - epoch) * self.seconds / self.epochs_done
        return this_cell + (super().seconds_left(epoch) - this_cell) / self.processes

    def cell_ended(self, state: str, outcome: str) -> None:
        if state != "left" and outcome != RAN_ELSEWHERE:
            super().cell_ended(state, outcome)


def make_progress(cells: Sequence[Cell], max_epochs: int, processes: int | None = None) -> RunProgress:
    """Bars where standard error, which they are drawn on, is a terminal.

    processes: how many share the work, where this one was started by another that shows its lines."""
    if processes is not None:
        return WorkerProgress(cells, max_epochs, processes)
    kind = TerminalProgress if sys.stderr.isatty() else RunProgress
    return kind(cells, max_epochs)


def duration(seconds: float) -> str:
    """A rounded length of time: 0.4 s, 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
