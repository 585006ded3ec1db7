"""What tuning found: the learning rates that a model tried on a task, and the one its results are trained
with.

    tuning = read_tuning(root, "listops", "gravitational")       # None where nothing was tuned, or not yet
    tuning.chosen, tuning.at_an_end

`<task>/<model>/learning_rate.json` holds each rate of the grid with how its cells ended (in `tuning/`
beside it) and their best validation value by the task's metric, the mean of seeds that no result uses.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from command_line import InputError
from reporting.metrics import Metric, metric_named, number
from results_folder import SCHEMA_VERSION, CellRecord, file_name, read_json, write_json

LEARNING_RATE = "learning_rate.json"


@dataclass(frozen=True)
class Trial:
    """One rate of the grid: how its cells ended; if all are done, the mean over seeds of the best validation
    metric and of the loss of its epoch."""

    learning_rate: float
    state: str
    value: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Tuning:
    """The grid in ascending order, its metric's name, the tuning seeds and the rate chosen."""

    metric: str
    seeds: tuple[int, ...]
    trials: tuple[Trial, ...]
    chosen: float

    @property
    def at_an_end(self) -> bool:
        """Whether the best lies at an end of the grid, so that a rate beyond it may be better still."""
        return self.chosen in (self.trials[0].learning_rate, self.trials[-1].learning_rate)


def trial_of(records: Sequence[CellRecord], rate: float, metric: Metric) -> Trial:
    """What a rate's cells, one a seed, came to: of those that are not done the state of the first."""
    best = []
    for record in records:
        rows = [(value, row) for row in record.metrics if (value := metric.read(row, "val_{}")) is not None]
        if record.state != "done" or not rows:
            return Trial(rate, "failed" if record.state == "done" else record.state)
        value, row = max(rows, key=lambda entry: metric.gain(entry[0]))
        best.append((value, number(row.get("val_loss")) or 0.0))
    values, losses = zip(*best, strict=True)
    return Trial(rate, "done", fmean(values), fmean(losses))


def best_of(trials: Sequence[Trial], metric: Metric) -> float | None:
    """The rate of the best value; of equal ones that of the lower loss, then the lower rate. None where no
    trial was finished."""
    done = [
        (metric.gain(one.value), -(one.loss or 0.0), -one.learning_rate)
        for one in trials
        if one.value is not None
    ]
    return -max(done)[2] if done else None


def tuning_file(root: Path, task: str, model: str) -> Path:
    return root / file_name(task) / file_name(model) / LEARNING_RATE


def write_tuning(root: Path, task: str, model: str, tuning: Tuning) -> None:
    write_json(tuning_file(root, task, model), {"schema_version": SCHEMA_VERSION, **asdict(tuning)})


def read_tuning(root: Path, task: str, model: str) -> Tuning | None:
    """None where there is no such file; InputError names the file where it is not as expected."""
    path = tuning_file(root, task, model)
    if not path.is_symlink() and not path.exists():
        return None
    try:
        value = read_json(path, root)
        trials = tuple(
            Trial(float(one["learning_rate"]), str(one["state"]), number(one["value"]), number(one["loss"]))
            for one in value["trials"]
        )
        seeds = tuple(int(seed) for seed in value["seeds"])
        found = Tuning(metric_named(value["metric"]).name, seeds, trials, float(value["chosen"]))
        if found.chosen not in {one.learning_rate for one in trials if one.value is not None}:
            raise ValueError(f"it chose {found.chosen}, which is no finished rate of its grid")
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no outcome of a tuning; remove it to choose anew ({error})") from error
    return found
