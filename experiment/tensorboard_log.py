"""TensorBoard's view of a run, on request: the numbers of metrics.jsonl, epoch by epoch, beside them.

    progress = TensorboardProgress(progress, cell_folder)     # hands everything on to the watcher there was
    tensorboard --logdir results_20260101_120000              # in a shell

Needs the package tensorboard (requirements-tensorboard.txt), which nothing else does.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.training_progress import Progress

FOLDER = "tensorboard"


def scalars(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of an epoch's line by name; those in dictionaries and lists as `name/key` and `name/0`."""
    for name, value in row.items():
        if isinstance(value, list):
            value = {str(index): entry for index, entry in enumerate(value)}
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, float(value)


class TensorboardProgress(Progress):
    """A watcher that writes each epoch to `folder`/tensorboard and tells another watcher everything."""

    def __init__(self, inner: Progress, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # needs tensorboard

        self.inner = inner
        self.writer = SummaryWriter(str(folder / FOLDER))

    def epoch_started(self, epoch: int, steps: int) -> None:
        self.inner.epoch_started(epoch, steps)

    def steps_done(self, steps: int, loss: float | None, accuracy: float | None) -> None:
        self.inner.steps_done(steps, loss, accuracy)

    def note(self, text: str) -> None:
        self.inner.note(text)

    def epoch_ended(self, row: dict[str, Any]) -> None:
        self.inner.epoch_ended(row)
        for name, value in scalars(row):
            if name != "epoch":
                self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()

    def __enter__(self) -> "TensorboardProgress":
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.close()
