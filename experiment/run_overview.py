"""What a run tells of itself beside its progress: --list, --dry-run, and the tables at its end.

How long a cell would take is measured on a few real steps, on two batches of the task's own training
examples, at the quartiles of their lengths, so that a cost that grows faster than the length is seen.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from command_line import EXIT_DONE, EXIT_FAILED, first_line
from data_pipeline import TASKS, TaskData, TokenDataset, evaluation_batches
from experiment.cells import ERROR, verified_cell
from experiment.models import COMPARED, MODELS, SYNTAX, Model, build, mechanism_settings
from experiment.run_plan import PRESETS, RunPlan, parameter_counts, settings_by_cell
from experiment.run_progress import duration
from reporting.metrics import PERCENT
from reporting.run_results import metric_of
from results_folder import Cell, CellRecord
from train_and_evaluate import ModelSettings, Trainer, TrainingSettings
from training.model_cost import count_parameters
from training.training_progress import Progress

QUARTILES = (0.25, 0.75)


def listing(plan: RunPlan, root: Path | None) -> str:
    """Presets, models with their settings, tasks, and the cells of the plan or of the results folder."""
    lines = ["presets:"]
    lines += [f"  {name:32}{preset.summary}" for name, preset in PRESETS.items()]
    lines += [f"models (* compared by default), parameters in a layer as of preset {plan.preset}, settings:"]
    for name, factory in MODELS.items():
        count = count_parameters(Model.parse(name).attention(plan.model_settings)())
        lines.append(f"{'*' if name in COMPARED else ' ':>2}{name:32}{count:>9,}")
        for own, setting in mechanism_settings(factory).items():
            lines.append(f"      {f'{own}={_shown(setting.default)}':28}{setting.help}".rstrip())
    lines += [f"  {'package.module:Class':32}any class with the interface of nn.MultiheadAttention"]
    lines += [f"  {SYNTAX:32}a model with settings, as gravitational,softening=0.01"]
    lines += ["tasks:"]
    for task, load in TASKS.items():
        lines.append(f"  {task:32}{' '.join((load.__doc__ or '').split('.')[0].split())}")
    if plan.learning_rates:
        rates = " ".join(f"{rate:g}" for rate in plan.learning_rates)
        lines += [f"learning rates that each model and task first tries, {len(plan.trials)} cells: {rates}"]
    lines += [f"cells of {root or f'preset {plan.preset}'}, by the number that --cell-index takes:"]
    for index, cell in enumerate(plan.cells):
        lines.append(f"{index:6}  {cell}" + (f"  {verified_cell(root, cell).state}" if root else ""))
    return "\n".join(lines)


def _shown(value: object) -> str:
    """A setting's value as a model's name has it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return ":".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def dry_run(plan: RunPlan, tasks: dict[str, TaskData]) -> int:
    """Print what would be run and how long it would take; EXIT_FAILED where a model cannot take a step."""
    parameters, settings = parameter_counts(plan, tasks), settings_by_cell(plan, tasks)
    models = {model.name: model for model in plan.models}
    print(f"preset {plan.preset} on {plan.device}: {len(plan.cells)} cells, seeds {plan.seeds}")
    if plan.learning_rates:
        print(f"and before them {len(plan.trials)} cells that try the learning rates {plan.learning_rates}")
    width = max(48, *(len(f"{task}/{name}") + 2 for task, name in parameters))
    print(f"{'task/model':{width}}{'parameters':>12}{'step':>11}{'epoch':>9}{'cell, at most':>15}")
    total, failed = 0.0, False
    for (task, name), count in parameters.items():
        cell = f"{f'{task}/{name}':{width}}{count:12,}"
        try:
            estimate = estimate_time(models[name], tasks[task], settings[task, name], plan)
        except Exception as error:
            failed = True
            print(f"{cell}  fails: {first_line(error)}", flush=True)
            continue
        trials = len(plan.trials_for(Cell(task, name, 0)))
        total += estimate.cell * (len(plan.seeds_of(task)) + trials)
        times = f"{estimate.step * 1000:8,.0f} ms{duration(estimate.epoch):>9}{duration(estimate.cell):>15}"
        print(f"{cell}{times}", flush=True)
    print(f"in all at most about {duration(total)}, one cell after the other; nothing was written")
    return EXIT_FAILED if failed else EXIT_DONE


class TimeEstimate(NamedTuple):
    """Seconds: of an optimizer step, of an epoch with its validation, of a cell with all its epochs."""

    step: float
    epoch: float
    cell: float


def estimate_time(model: Model, task: TaskData, settings: ModelSettings, plan: RunPlan) -> TimeEstimate:
    """Time one training step and one evaluation step on each of two batches, after one to warm up."""
    training: TrainingSettings = plan.training_settings_of(task.name)
    encoder = build(model, settings, task.vocab_size, task.num_classes, task.form)
    trainer = Trainer(encoder, task, training, 0, plan.device, Progress())
    parts = [examples_at(task.train, quantile, training.batch_size) for quantile in QUARTILES]

    def train(part: TokenDataset) -> None:
        encoder.train()
        [batch] = evaluation_batches(part, len(part), pad_to=trainer.pad_to, device=trainer.device)
        trainer.step(batch).tolist()  # waits for the device

    def evaluate(part: TokenDataset) -> None:
        trainer.evaluate(trainer.forward, part)

    def seconds(act: Callable[[TokenDataset], None], parts: list[TokenDataset]) -> float:
        started = time.perf_counter()
        for part in parts:
            act(part)
        return (time.perf_counter() - started) / len(parts)

    def steps(split: TokenDataset) -> int:
        return math.ceil(len(split) / training.batch_size)

    train(parts[0])
    step, evaluation_step = seconds(train, parts), seconds(evaluate, parts)
    epoch = step * steps(task.train) + evaluation_step * steps(task.val)
    # The test split is read with the best and with the last epoch's weights.
    cell = epoch * training.max_epochs + 2 * evaluation_step * steps(task.test)
    for longer in task.longer_tests.values():
        cell += seconds(evaluate, [examples_at(longer, 0.5, training.batch_size)]) * steps(longer)
    return TimeEstimate(step, epoch, cell)


def examples_at(dataset: TokenDataset, quantile: float, count: int) -> TokenDataset:
    """Up to `count` examples whose lengths lie around a quantile of the data set's lengths."""
    order = np.argsort(dataset.lengths, kind="stable")
    start = int(np.clip(round(quantile * len(order)) - count // 2, 0, max(0, len(order) - count)))
    return dataset.take(order[start : start + count])


def results_table(plan: RunPlan, records: list[CellRecord]) -> str:
    """The test metric by model and task, the mean of the seeds that are done, and the cells that are not."""
    width = max(len(model.name) for model in plan.models) + 2
    metrics = {record.cell.task: metric_of(record) for record in records if record.result}
    titles = list(dict.fromkeys(metric.title for metric in metrics.values())) or [PERCENT.title]
    head = f"test {' or '.join(titles)}".ljust(width)
    lines = [head + "".join(f"  {task:>22}" for task in plan.tasks)]
    for model in plan.models:
        entries = []
        for task in plan.tasks:
            here = [
                record for record in records if (record.cell.task, record.cell.model) == (task, model.name)
            ]
            read = [metrics[task].read(record.result, "test_{}_best") for record in here if record.result]
            done = [value for value in read if value is not None]
            entry = metrics[task].shown(float(np.mean(done))) if done else "-"
            if len(plan.seeds_of(task)) > 1 and done:
                entry += f" (n = {len(done)})"
            lost = sorted({record.state for record in here if not record.result})
            entries.append(" ".join([entry, *lost]) if done or not lost else " ".join(lost))
        lines.append(model.name.ljust(len(head)) + "".join(f"  {entry:>22}" for entry in entries))
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
