"""The cells of a results folder, run one after the other, beside other processes that do the same.

    grid = Grid(root, plan, tasks, stop, Choice(retry_failed=True))
    outcome = grid.run()
    print(accuracy_table(plan, outcome.records))

Each cell is taken under its lock, looked at again, and run, unless it is done, was given up or is another
process's. What is said of a cell is what its folder holds.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from command_line import EXIT_DONE, EXIT_FAILED
from data_pipeline import TaskData
from experiment.cell_lock import CellLock, LockedError, LockLostError
from experiment.cell_runner import ERROR, follow_cell, run_cell, why_not_done
from experiment.distributed import agree, from_first, rank
from experiment.experiment_plan import Plan, attention_factory, settings_by_cell
from experiment.experiment_progress import RAN_ELSEWHERE, make_progress
from experiment.stop_request import EXIT_RUN_AGAIN, StopRequest
from experiment.tensorboard_log import TensorboardProgress
from experiment.training_progress import Progress
from results_folder import Cell, CellRecord, note_sharing, read_cell

GIVEN_UP = ("failed", "diverged")
SETTLED = ("done", *GIVEN_UP)


@dataclass(frozen=True)
class Choice:
    """Which cells to run. index: of the only one, None for all. retry_failed: also those that were given up.
    fail_fast: none after one that is given up. tensorboard: whether to write what TensorBoard shows.
    processes, since: where another process started this one, how many share the device, and when the last
    change of a cell's state before the start was, in nanoseconds."""

    index: int | None = None
    retry_failed: bool = False
    fail_fast: bool = False
    tensorboard: bool = False
    processes: int | None = None
    since: int | None = None


@dataclass
class Outcome:
    """What a process leaves: each planned cell as its folder has it, its own, and who has which it could not
    take. broken: whether a cell was left although nobody has it and nobody asked to stop."""

    records: list[CellRecord]
    own: list[CellRecord]
    elsewhere: dict[Cell, str]
    broken: bool = False

    @property
    def settled(self) -> bool:
        """Whether no planned cell is left to run."""
        return all(record.state in SETTLED for record in self.records)

    @property
    def exit_code(self) -> int:
        states = {record.state for record in self.own}
        if self.broken or states & set(GIVEN_UP):
            return EXIT_FAILED
        return EXIT_DONE if states <= {"done"} else EXIT_RUN_AGAIN


def verified_cell(root: Path, cell: Cell) -> CellRecord:
    """A cell as its folder has it, "done" only where its result is whole."""
    record = read_cell(root, cell)
    why = why_not_done(record) if record.state == "done" else ""
    return replace(record, state="failed", reason=why, result=None, damaged=True) if why else record


class Grid:
    """A run's cells, and what this process may do with them."""

    def __init__(
        self, root: Path, plan: Plan, tasks: dict[str, TaskData], stop: StopRequest, choice: Choice
    ) -> None:
        self.root, self.plan, self.tasks, self.stop, self.choice = root, plan, tasks, stop, choice
        self.cells = plan.cells if choice.index is None else [plan.cells[choice.index]]
        self.elsewhere: dict[Cell, str] = {}
        # Of cells that were given up before: one that another process gave up meanwhile is not tried again.
        self.given_up = {cell: self.noted(cell) for cell in self.cells}
        self.since = max(map(self.noted, plan.cells)) if choice.since is None else choice.since

    def noted(self, cell: Cell) -> int:
        """When the cell's state was last noted, in nanoseconds."""
        try:
            return (cell.folder(self.root) / "status.json").stat().st_mtime_ns
        except OSError:
            return 0

    def to_run(self) -> list[Cell]:
        """The cells that are neither done nor given up."""
        return [cell for cell in self.cells if self.is_open(verified_cell(self.root, cell))]

    def is_open(self, record: CellRecord) -> bool:
        if record.state in GIVEN_UP and not record.damaged:
            return self.choice.retry_failed and self.noted(record.cell) == self.given_up[record.cell]
        return record.state != "done"

    def some_gave_up(self) -> bool:
        """Whether a cell failed or diverged since the start, whichever process ran it."""
        return any(
            verified_cell(self.root, cell).state in GIVEN_UP and self.noted(cell) > self.since
            for cell in self.plan.cells
        )

    def run(self) -> Outcome:
        """Run the cells; an error ends its own cell only. StoppedError where that was asked for, WriteError
        where the folder cannot be written."""
        cells = from_first(self.to_run)
        progress = make_progress(cells, self.plan.training.max_epochs, self.choice.processes)
        try:
            for number, cell in enumerate(cells):
                if number:  # each process takes a step, so that the shortest time limit comes to an end
                    agree(self.stop.check)
                progress.cell_started(cell)
                state, outcome = self.run_one(cell, progress)
                progress.cell_ended(state, outcome)
                if self.choice.fail_fast and self.some_gave_up():
                    break
        finally:
            progress.close()
        return self.outcome()

    def outcome(self) -> Outcome:
        records = [verified_cell(self.root, cell) for cell in self.plan.cells]
        own = [record for record in records if record.cell in self.cells]
        return Outcome(records, own, self.elsewhere)

    def run_one(self, cell: Cell, progress: Progress) -> tuple[str, str]:
        """Run a cell under its lock, which is rank 0's. Its state, and its result or its reason."""
        held: list[CellLock] = []
        try:
            left = from_first(lambda: self.take(cell, held, progress))
            return left or self.train(cell, held, progress)
        except LockLostError as error:
            self.elsewhere[cell] = str(error)
            return "left", str(error)
        finally:
            for lock in held:
                lock.release()

    def take(self, cell: Cell, held: list[CellLock], progress: Progress) -> tuple[str, str] | None:
        """Put the cell's lock into `held`; where the cell is not to be run, its state and why."""
        try:
            held.append(CellLock.take(cell.folder(self.root)))
        except LockedError as error:
            self.elsewhere[cell] = str(error)
            return "left", str(error)
        if held[0].took_over:
            progress.note(f"taken over: {held[0].took_over}")
        record = verified_cell(self.root, cell)
        if not self.is_open(record):
            return record.state, RAN_ELSEWHERE
        if record.damaged:
            progress.note(f"run again: {record.reason}")
        return None

    def train(self, cell: Cell, held: list[CellLock], progress: Progress) -> tuple[str, str]:
        def check() -> None:
            for lock in held:
                lock.check()  # first: nothing is written into a folder that is another's
            self.stop.check()

        if self.choice.processes is not None:
            note_sharing(cell.folder(self.root), self.choice.processes)
        settings = settings_by_cell(self.plan, self.tasks)[cell.task, cell.model]
        watcher: Progress = progress
        if self.choice.tensorboard and rank() == 0:
            watcher = TensorboardProgress(progress, cell.folder(self.root))
        take_part = run_cell if rank() == 0 else follow_cell
        state, reason = take_part(
            attention_factory(cell.model, settings),
            self.tasks[cell.task],
            settings,
            self.plan.training,
            cell.seed,
            cell.folder(self.root),
            self.plan.device,
            watcher,
            lambda: agree(check),
        )
        if isinstance(watcher, TensorboardProgress):
            watcher.close()
        return state, reason or _result(verified_cell(self.root, cell))


def _result(record: CellRecord) -> str:
    result = record.result
    if result is None:
        return record.reason
    return f"test accuracy {result['test_accuracy_best']:.1%} (of epoch {result['best_epoch']})"


def accuracy_table(plan: Plan, records: list[CellRecord]) -> str:
    """Test accuracy by model and task, the mean over the seeds that are done, and the cells that are not."""
    width = max(len(model) for model in plan.models) + 2
    lines = ["test accuracy".ljust(width) + "".join(f"{task:>24}" for task in plan.tasks)]
    for model in plan.models:
        entries = []
        for task in plan.tasks:
            here = [record for record in records if (record.cell.task, record.cell.model) == (task, model)]
            done = [record.result["test_accuracy_best"] for record in here if record.result]
            entry = f"{np.mean(done):.1%}" if done else "-"
            if len(plan.seeds) > 1 and done:
                entry += f" (n = {len(done)})"
            lost = sorted({record.state for record in here if not record.result})
            entries.append(" ".join([entry, *lost]) if done or not lost else " ".join(lost))
        lines.append(model.ljust(width) + "".join(f"{entry:>24}" for entry in entries))
    return "\n".join(lines)


def failure_table(records: list[CellRecord]) -> str:
    """The cells that are not done, each with its reason and, where it has one, its traceback."""
    lines = []
    for record in records:
        if record.state != "done":
            lines.append(f"{record.state}: {record.cell}" + (f": {record.reason}" if record.reason else ""))
            if (record.folder / ERROR).exists():
                lines.append(f"  traceback: {record.folder / ERROR}")
    return "\n".join(lines)
