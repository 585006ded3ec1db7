"""What two ranks are asked to do by test_distributed.py, which does the same in one process.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/distributed_cases.py FOLDER
"""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cell_cases import CLASSES, CPU, SETTINGS, TRAINING, VOCABULARY, make_split, make_task
from torch import Tensor, nn

from data_pipeline import training_batches
from experiment.cell_runner import follow_cell, run_cell
from experiment.distributed import agree, as_one, gathered, join, rank, summed
from experiment.experiment_plan import attention_factory
from experiment.stop_request import StoppedError
from experiment.training_progress import Progress
from train_and_evaluate import ModelSettings, Trainer, TrainingSettings, TransformerClassifier

DRY = replace(SETTINGS, dropout=0.0)
TRAIN_SIZE = 41  # a prime: 5 batches of 8, and one of a single example
EPOCHS = 4


class PartlyUsed(nn.Module):
    """One parameter takes no part, one is frozen, as gammas may be."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(8, 8)
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, query: Tensor, *rest: Tensor, **options: Any) -> tuple[Tensor, None]:
        return self.used(query) * self.frozen, None


class NotFiniteOnOneRank(PartlyUsed):
    """Its outputs are NaN on rank 1 from the 7th training step on."""

    calls = 0

    def forward(self, query: Tensor, *rest: Tensor, **options: Any) -> tuple[Tensor, None]:
        self.calls += self.training
        output, _ = super().forward(query)
        return output * (math.nan if self.training and self.calls >= 7 and rank() == 1 else 1), None


ATTENTIONS: dict[str, Callable[[], nn.Module]] = {
    "conventional": attention_factory("conventional", DRY),
    "gravitational": attention_factory("gravitational", DRY),
    "gravitational_multi_timescale": attention_factory("gravitational_multi_timescale", DRY),
    "frozen gammas": attention_factory("multi_timescale", replace(DRY, learn_gammas=False)),
    "partly used": PartlyUsed,
}


def trained(make_attention: Callable[[], nn.Module]) -> dict[str, Any]:
    """The loss of each of 24 steps, the gradients of the first and of that of a single example, and
    evaluations before and after."""
    task = replace(make_task(), train=make_split(TRAIN_SIZE, 1))
    model = TransformerClassifier(make_attention, VOCABULARY, CLASSES, DRY, 0)
    trainer = Trainer(model, task, TRAINING, 0, CPU, Progress())
    [before] = trainer.evaluate([trainer.forward], task.test)
    losses, gradients = [], []
    trainer.model.train()
    for epoch in range(1, EPOCHS + 1):
        for batch in training_batches(task.train, 8, seed=0, epoch=epoch):
            losses.append(summed(trainer.step(batch))[0].item() / len(batch.labels))
            if epoch == 1 and (len(losses) == 1 or len(batch.labels) == 1):
                named = model.named_parameters()
                gradients.append({name: p.grad.tolist() for name, p in named if p.grad is not None})
    [after] = trainer.evaluate([trainer.forward], task.test)
    return {
        "losses": losses,
        "gradients": gradients,
        "before": (before.loss, before.accuracy, before.predictions.tolist()),
        "after": (after.accuracy, after.predictions.tolist()),
    }


def run_tiny(
    folder: Path,
    make_attention: Callable[[], nn.Module] = ATTENTIONS["conventional"],
    settings: ModelSettings = DRY,
    training: TrainingSettings = TRAINING,
    check: Callable[[], None] = lambda: None,
) -> tuple[str, str]:
    """A cell of `cell_cases.make_task`, as the grid runs it on each rank."""
    if rank() == 0:
        folder.mkdir(exist_ok=True)
    take_part = run_cell if rank() == 0 else follow_cell
    task, progress = make_task(), Progress()
    return take_part(make_attention, task, settings, training, 0, folder, CPU, progress, lambda: agree(check))


def run_until_rank_1_stops(folder: Path, number: int, settings: ModelSettings) -> None:
    """Rank 1 alone asks to stop, when it is asked for the `number`-th time."""
    calls = iter(range(1, 10_000))

    def check() -> None:
        if next(calls) == number and rank() == 1:
            raise StoppedError("enough")

    try:
        run_tiny(folder, settings=settings, check=check)
    except StoppedError as stopped:
        assert str(stopped) == "enough"
    else:
        raise AssertionError("it was not stopped")


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    join(CPU)
    found: dict[str, Any] = {name: trained(attention) for name, attention in ATTENTIONS.items()}
    found["cell"] = run_tiny(folder / "cell")
    found["diverged"] = gathered([run_tiny(folder / "diverged", NotFiniteOnOneRank)])
    wet = SETTINGS
    run_tiny(folder / "wet", settings=wet)
    for name, stop in (("in training", 8 + 2), ("in validation", 8 + 7)):
        run_until_rank_1_stops(folder / f"wet, stopped {name}", stop, wet)
        run_tiny(folder / f"wet, stopped {name}", settings=wet)
    run_until_rank_1_stops(folder / "stopped", 8 + 2, DRY)
    run_tiny(folder / "begun by one")
    if rank() == 0:
        torch.save(found, folder / "found.pt")
    return 0


if __name__ == "__main__":
    sys.exit(as_one(lambda: main(Path(sys.argv[1]))))
