"""Train every model on every task with every seed, then compare them.

    python run_experiment.py                      # the full comparison on a GPU, a quick one without
    python run_experiment.py --preset smoke       # every step once, tiny, in under a minute, offline
    python run_experiment.py --preset full --dry-run
    python run_experiment.py --models conventional my_package.my_module:MyAttention --tasks listops

Results go to a new folder `results_YYYYmmdd_HHMMSS` (see results_folder.py), the comparison into its
`analysis/`. Exit codes: 0 all cells done; 1 some cell failed or diverged, the others ran; 2 bad arguments
or input, found before any work; 130 or 143 interrupted.
"""

import contextlib
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from command_line import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    Parser,
    add_settings,
    exit_code,
)
from data_pipeline import TASKS, DataSettings, TaskData
from experiment_plan import (
    COMPARED,
    MODELS,
    PRESETS,
    Plan,
    attention_factory,
    check_output_folder,
    load_tasks,
    make_plan,
    model_class,
)
from experiment_progress import duration, make_progress
from results_folder import (
    SCHEMA_VERSION,
    CellRecord,
    create_results_folder,
    read_cell,
    write_json,
    write_status,
)
from run_environment import describe_environment
from time_estimate import estimate_time
from train_and_evaluate import TrainingSettings, as_json, run_cell
from transformer_classifier import ModelSettings, TransformerClassifier

__all__ = ["MODELS", "PRESETS", "main"]

PROG = "run_experiment.py"
EXIT_TERMINATED = 143


class TerminatedError(KeyboardInterrupt):
    """The system asked the process to end (SIGTERM)."""


def make_parser() -> Parser:
    intro, examples, rest = (__doc__ or "").split("\n\n", 2)
    parser = Parser(prog=PROG, description=f"{intro}\n\n{rest}", epilog=f"examples:\n{examples}")
    run = parser.add_argument_group("Run")
    run.add_argument(
        "--preset",
        default="auto",
        metavar="|".join(("auto", *PRESETS)),
        help="settings to start from; auto: full on a GPU, else quick (default: auto)",
    )
    run.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help=f"names from --list or package.module:Class (default: {' '.join(COMPARED)})",
    )
    run.add_argument("--tasks", nargs="+", metavar="TASK", help="names from --list (default: the preset's)")
    run.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="(default: the preset's)")
    run.add_argument(
        "--output-dir",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where the results folder is made (default: .)",
    )
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    run.add_argument("--list", action="store_true", help="show presets, models and tasks, and end")
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="show cells, parameters and times measured on a few steps, write nothing, and end",
    )
    for settings in (ModelSettings, TrainingSettings, DataSettings):
        add_settings(parser, settings)
    return parser


def listing() -> str:
    lines = ["presets:"]
    lines += [f"  {name:32}{preset.summary}" for name, preset in PRESETS.items()]
    lines += ["models (* compared by default):"]
    for name in MODELS:
        lines.append(f"{'*' if name in COMPARED else ' ':>2}{name:32}{model_class(name)}".rstrip())
    lines += ["  package.module:Class".ljust(34) + "any class with the interface of nn.MultiheadAttention"]
    lines += ["tasks:", *(f"  {name}" for name in TASKS)]
    return "\n".join(lines)


def parameter_counts(plan: Plan, tasks: dict[str, TaskData]) -> dict[tuple[str, str], int]:
    """The number of parameters by (task, model)."""
    counts = {}
    for task in plan.tasks:
        for name in plan.models:
            sizes = tasks[task].vocab_size, tasks[task].num_classes
            model = TransformerClassifier(attention_factory(name, plan.model), *sizes, plan.model)
            counts[task, name] = sum(parameter.numel() for parameter in model.parameters())
    return counts


def dry_run(plan: Plan, tasks: dict[str, TaskData]) -> int:
    """Print what would be run and how long it would take; EXIT_FAILED where a model cannot take a step."""
    parameters = parameter_counts(plan, tasks)
    print(f"preset {plan.preset} on {plan.device}: {len(plan.cells)} cells, seeds {plan.seeds}")
    print(f"{'task/model':48}{'parameters':>12}{'step':>11}{'epoch':>9}{'cell, at most':>15}")
    total, failed = 0.0, False
    for (task, name), count in parameters.items():
        factory = attention_factory(name, plan.model)
        try:
            estimate = estimate_time(factory, tasks[task], plan.model, plan.training, plan.device)
        except Exception as error:
            failed = True
            print(
                f"{f'{task}/{name}':48}{count:12,}  fails: {(str(error).splitlines() or [''])[0]}", flush=True
            )
            continue
        total += estimate.cell * len(plan.seeds)
        times = f"{estimate.step * 1000:8,.0f} ms{duration(estimate.epoch):>9}{duration(estimate.cell):>15}"
        print(f"{f'{task}/{name}':48}{count:12,}{times}", flush=True)
    print(f"in all at most about {duration(total)}; nothing was written")
    return EXIT_FAILED if failed else EXIT_DONE


def task_info(task: TaskData, stand_in_for: str | None) -> dict[str, Any]:
    counts = np.bincount(np.asarray(task.test.labels), minlength=task.num_classes)
    return {
        "title": task.title,
        "num_classes": task.num_classes,
        "chance": 1 / task.num_classes,
        "majority": float(counts.max() / counts.sum()),
        "test_size": len(task.test),
        "class_names": list(task.class_names),
        "provenance": task.provenance | ({"stand_in_for": stand_in_for} if stand_in_for else {}),
        "stand_in_for": stand_in_for,
    }


def write_plan(root: Path, plan: Plan, tasks: dict[str, TaskData], argv: list[str]) -> None:
    """The run's config.json and environment.json, and each cell's config.json with the state "pending"."""
    model, training = asdict(plan.model), asdict(plan.training)
    data = {name: asdict(settings) for name, settings in plan.data.items()}
    info = {name: task_info(task, plan.stand_in_for.get(name)) for name, task in tasks.items()}
    config = {
        "schema_version": SCHEMA_VERSION,
        "preset": plan.preset,
        "argv": argv,
        "command": shlex.join(["python", PROG, *argv]),
        "settings": {"model": model, "training": training, "data": data, "device": str(plan.device)},
        "models": list(plan.models),
        "tasks": list(plan.tasks),
        "seeds": list(plan.seeds),
        "task_info": info,
        "cells": [asdict(cell) for cell in plan.cells],
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    sums = {name: task.provenance.get("sha256") for name, task in tasks.items()}
    write_json(root / "environment.json", describe_environment(plan.device) | {"data_sha256": sums})
    write_json(root / "config.json", as_json(config))
    parameters = parameter_counts(plan, tasks)
    arguments = {name: attention_factory(name, plan.model).keywords for name in plan.models}
    for cell in plan.cells:
        folder = cell.folder(root)
        folder.mkdir(parents=True)
        cell_config = {
            "schema_version": SCHEMA_VERSION,
            **asdict(cell),
            "model_class": model_class(cell.model),
            "attention_arguments": arguments[cell.model],
            "model_settings": model,
            "training_settings": training,
            "data_settings": data[cell.task],
            "parameters": parameters[cell.task, cell.model],
        }
        write_json(folder / "config.json", cell_config)
        write_status(folder, "pending")


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the cell in progress as Ctrl-C does, so that its state is noted."""

    def stop(signum: int, frame: object) -> None:
        raise TerminatedError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_cells(root: Path, plan: Plan, tasks: dict[str, TaskData]) -> list[CellRecord]:
    """Run the cells one after the other; an error ends its own cell only. Returns what the folders hold."""
    progress = make_progress(plan.cells, plan.training.max_epochs)
    records = []
    try:
        for cell in plan.cells:
            progress.cell_started(cell)
            _, reason = run_cell(
                attention_factory(cell.model, plan.model),
                tasks[cell.task],
                plan.model,
                plan.training,
                cell.seed,
                cell.folder(root),
                plan.device,
                progress,
            )
            record = read_cell(root, cell)
            records.append(record)
            progress.cell_ended(record.state, reason or _outcome(record))
    finally:
        progress.close()
    return records


def _outcome(record: CellRecord) -> str:
    result = record.result or {}
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
    lines += [f"{record.state}: {record.cell}: {record.reason}" for record in records if not record.result]
    return "\n".join(lines)


def analyze_run(root: Path) -> bool:
    """Compare the cells; a failure here loses no result. Returns whether it worked."""
    from analyze_results import analyze  # needs the figure libraries: not before they are needed

    try:
        analyze(root)
    except Exception as error:
        print(f"{PROG}: the analysis failed: {type(error).__name__}: {error}", file=sys.stderr)
        print(f"the results are whole: python analyze_results.py {root}", file=sys.stderr)
        return False
    print(f"analysis: {root / 'analysis' / 'report.html'}")
    return True


def run(argv: list[str]) -> int:
    arguments = make_parser().parse_args(argv)
    if arguments.list:
        print(listing())
        return EXIT_DONE
    plan = make_plan(arguments)
    check_output_folder(arguments.output_dir)
    if arguments.preset == "auto":
        on_gpu = plan.device.type == "cuda"
        why = "a GPU is in use" if on_gpu else "no GPU is in use; --preset full is the whole comparison"
        print(f"preset {plan.preset}: {why}", flush=True)
    plan, tasks = load_tasks(plan)
    if arguments.dry_run:
        return dry_run(plan, tasks)
    root = create_results_folder(arguments.output_dir)
    write_plan(root, plan, tasks, argv)
    print(f"results: {root} ({len(plan.cells)} cells, preset {plan.preset}, {plan.device})", flush=True)
    if plan.preset == "smoke":
        print("smoke: a test that everything runs; its figures mean nothing")
    try:
        with termination_as_interrupt():
            records = run_cells(root, plan, tasks)
    except KeyboardInterrupt as interrupt:
        print(f"{PROG}: interrupted; what is done is kept: python analyze_results.py {root}", file=sys.stderr)
        return EXIT_TERMINATED if isinstance(interrupt, TerminatedError) else EXIT_INTERRUPTED
    analyzed = analyze_run(root)
    print(accuracy_table(plan, records))
    return EXIT_DONE if analyzed and all(record.state == "done" for record in records) else EXIT_FAILED


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    try:
        return exit_code(PROG, lambda: run(given))
    except OSError as error:
        print(f"{PROG}: error: the results cannot be written: {error}", file=sys.stderr)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
