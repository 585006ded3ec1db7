"""A plan as the files of a results folder: written before the first cell, read back by whoever resumes.

    write_plan(root, plan, tasks, argv, workers)
    plan = read_plan(root)                       # InputError where it is no folder of ours
    refuse_changes(root, plan, arguments)        # InputError where the command line asks for something else
    check_data(root, tasks)                      # InputError where the data are not those of the folder

What is read back holds for the whole folder. Places may differ, the folders of data and cache and a GPU's
number, since a folder may be worked on by several machines.
"""

import argparse
import shlex
import shutil
import time
import typing
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from command_line import InputError, given_settings, option_name, shown
from data_pipeline import MEANINGLESS, TASKS, DataSettings, TaskData
from experiment.models import Model
from experiment.run_plan import (
    RunPlan,
    existing_part,
    find_device,
    parameter_counts,
    settings_by_cell,
    training_and_rates,
)
from reporting.run_results import task_facts
from results_folder import (
    SCHEMA_VERSION,
    Cell,
    as_json,
    inside,
    read_cell,
    read_results,
    write_json,
    write_status,
)
from tasks.token_dataset import IGNORED
from train_and_evaluate import ModelSettings, TrainingSettings
from training.run_environment import describe_environment

PROG = "run_experiment.py"
PLACES = ("data_dir", "cache_dir")
SAME_ENVIRONMENT = ("torch", "threads", "git_commit", "device_name")
# Float32 copies of the weights that a cell holds at its fullest: weights, the best weights and two moments in
# each of three checkpoints (last, previous, the one being written), and checkpoint_best.pt.
CHECKPOINT_COPIES = 3 * 4 + 1
OTHER_BYTES = 2**21  # of a cell's attention patterns and metrics
SPARE_BYTES = 2**26  # for the analysis, and for whoever else writes


def check_space(folder: Path, plan: RunPlan, tasks: dict[str, TaskData], cells: Iterable[Cell]) -> None:
    """InputError where the cells' files would not fit on the disk that `folder` is, or is to be, on."""
    counts = parameter_counts(plan, tasks)
    needed = SPARE_BYTES + sum(
        4 * CHECKPOINT_COPIES * counts[cell.task, cell.model] + OTHER_BYTES for cell in cells
    )
    free = shutil.disk_usage(existing_part(folder)).free
    if free < needed:
        raise InputError(
            f"too little space in {folder}: the cells need about {needed / 1e6:,.0f} MB, and "
            f"{free / 1e6:,.0f} MB are free; make room, or choose another --output-dir"
        )


def _task_info(task: TaskData) -> dict[str, Any]:
    labels = task.test.labels[task.test.labels != IGNORED]
    counts = np.bincount(labels, minlength=task.num_classes)
    return {
        "title": task.title,
        "metric": task.form.metric,
        "target": task.form.target,
        "causal": task.form.causal,
        "num_classes": task.num_classes,
        "chance": 1 / task.num_classes,
        "majority": float(counts.max() / counts.sum()),
        "test_size": len(task.test),
        "test_predictions": len(labels),
        "class_names": list(task.class_names),
        "provenance": task.provenance,
    }


def write_plan(root: Path, plan: RunPlan, tasks: dict[str, TaskData], argv: list[str], workers: int) -> None:
    """The run's config.json and environment.json, and the cells' folders. workers: cells side by side."""
    config = {
        "schema_version": SCHEMA_VERSION,
        "preset": plan.preset,
        "argv": argv,
        "command": shlex.join(["python", PROG, *argv]),
        "settings": {
            "model": asdict(plan.model_settings),
            "training": training_values(plan, plan.training_settings),
            "by_task": plan.by_task,
            "data": {name: asdict(settings) for name, settings in plan.data_settings.items()},
            "device": str(plan.device),
        },
        "models": [model.name for model in plan.models],
        "tasks": list(plan.tasks),
        "unavailable": plan.unavailable,
        "seeds": list(plan.seeds),
        "workers": workers,
        "task_info": {name: _task_info(task) for name, task in tasks.items()},
        "cells": [cell.named() for cell in plan.cells],
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    sums = {name: task.provenance.get("sha256") for name, task in tasks.items()}
    write_json(root / "environment.json", describe_environment(plan.device) | {"data_sha256": sums})
    write_json(root / "config.json", as_json(config))
    write_cells(root, plan, tasks)


def write_cells(root: Path, plan: RunPlan, tasks: dict[str, TaskData]) -> None:
    """Each cell's config.json with the state "pending", where there is none yet; a damaged one is mended.

    Raises InputError where a cell's folder is a link that leads out of the results folder."""
    parameters, settings = parameter_counts(plan, tasks), settings_by_cell(plan, tasks)
    for cell in [*plan.trials, *plan.cells]:
        folder = cell.folder(root)
        if not inside(folder, root):
            raise InputError(f"{folder} is a link that leads out of {root}; nothing is written through it")
        folder.mkdir(parents=True, exist_ok=True)
        model = plan.model_of(cell)
        cell_config = {
            "schema_version": SCHEMA_VERSION,
            **cell.named(),
            "model_class": model.class_name,
            "attention_arguments": model.attention(settings[cell.task, cell.model]).keywords,
            "model_settings": asdict(settings[cell.task, cell.model]),
            "training_settings": training_values(plan, plan.training_settings_of(cell.task)),
            "data_settings": asdict(plan.data_settings[cell.task]),
            "parameters": parameters[cell.task, cell.model],
        }
        record = read_cell(root, cell)
        if record.state == "missing" or record.damaged:
            write_json(folder / "config.json", as_json(cell_config))
        if record.state == "missing":
            write_status(folder, "pending")


def read_plan(root: Path) -> RunPlan:
    """The plan of a results folder. Raises InputError where `root` is none of this program's, and where a
    model or the device is not to be had here."""
    config = read_results(root).config
    try:
        settings = config["settings"]
        training, rates = _training(settings["training"])
        plan = RunPlan(
            preset=str(config["preset"]),
            models=tuple(Model.parse(str(name)) for name in config["models"]),
            tasks=tuple(map(str, config["tasks"])),
            seeds=tuple(map(int, config["seeds"])),
            model_settings=_settings(ModelSettings, settings["model"]),
            training_settings=training,
            data_settings={
                str(task): _settings(DataSettings, data) for task, data in settings["data"].items()
            },
            device=find_device(str(settings["device"])),
            unavailable={str(task): str(why) for task, why in config.get("unavailable", {}).items()},
            learning_rates=rates,
            by_task=dict(settings.get("by_task", {})),
        )
        own_settings = {one.name for kind in (ModelSettings, TrainingSettings) for one in fields(kind)}
        for task in plan.tasks:  # what is no setting, or not its value, is refused
            if unknown := plan.by_task.get(task, {}).keys() - own_settings - {"seeds"}:
                raise ValueError(f"unknown settings {sorted(unknown)} of {task}")
            _settings(ModelSettings, asdict(plan.model_settings_of(task)))
            _settings(TrainingSettings, asdict(plan.training_settings_of(task)))
        known = [cell.named() for cell in plan.cells]
        complete = set(plan.tasks) <= set(plan.data_settings) and set(plan.tasks) <= set(TASKS)
        if known != config["cells"] or not complete:
            raise ValueError("its cells are not those of its tasks, models and seeds")
    except InputError as error:
        raise InputError(f"{root} cannot be resumed: {error}") from error
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(f"{root} cannot be resumed: its config.json is another's ({error})") from error
    return plan


def training_values(plan: RunPlan, settings: TrainingSettings) -> dict[str, Any]:
    """Training settings as JSON, with all learning rates where there are several to choose from."""
    values = asdict(settings)
    return values | {"learning_rate": list(plan.learning_rates)} if plan.learning_rates else values


def _training(values: dict[str, Any]) -> tuple[TrainingSettings, tuple[float, ...]]:
    """The inverse of `training_values`: the settings, and the rates where there are several."""
    rates = values.get("learning_rate")
    if not isinstance(rates, list):
        return _settings(TrainingSettings, values), ()
    for rate in rates:
        _settings(TrainingSettings, values | {"learning_rate": rate})
    return training_and_rates(values | {"learning_rate": tuple(rates)})


def _settings(kind: type, values: dict[str, Any]) -> Any:
    """The settings in a JSON object; what a folder of an older version lacks has its default."""
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"unknown setting {name!r}")
        if not _has_type(value, hints[name]):
            raise TypeError(f"{name} is {value!r}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _has_type(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        entry = typing.get_args(hint)[0]
        return isinstance(value, list) and all(_has_type(part, entry) for part in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def placed(plan: RunPlan, places: dict[str, Any], device: str) -> RunPlan:
    """The plan with this machine's places: folders by PLACES, and a device's name, or auto for the plan's."""
    data = {task: replace(settings, **places) for task, settings in plan.data_settings.items()}
    return replace(plan, data_settings=data, device=plan.device if device == "auto" else find_device(device))


def given_places(arguments: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in given_settings(arguments, DataSettings).items() if key in PLACES}


def refuse_changes(root: Path, plan: RunPlan, arguments: argparse.Namespace) -> None:
    """InputError with every difference between the folder's settings and those given."""
    found: list[tuple[str, Any, Any]] = []  # option, its value in the folder, the one given
    known = {"models": tuple(model.name for model in plan.models), "tasks": plan.tasks, "seeds": plan.seeds}
    for option, there in known.items():
        if (given := getattr(arguments, option)) is not None:
            here = tuple(entry for entry in given if entry not in plan.unavailable)
            found.append((f"--{option}", there, here))
    if arguments.preset != "auto":
        found.append(("--preset", plan.preset, arguments.preset))
    if arguments.device != "auto":
        found.append(("--device", plan.device.type, find_device(arguments.device).type))
    of_tasks = [of(task) for task in plan.tasks for of in (plan.model_settings_of, plan.training_settings_of)]
    for part in of_tasks:
        for name, value in given_settings(arguments, type(part)).items():
            there = getattr(part, name)
            if name == "learning_rate":
                there, value = plan.learning_rates or (there,), tuple(sorted(value))
            found.append((option_name(name), there, value))
    for name, value in given_settings(arguments, DataSettings).items():
        for task in plan.tasks:
            if name not in (*PLACES, *MEANINGLESS.get(task, ())):
                found.append((option_name(name), getattr(plan.data_settings[task], name), value))
    differences = [
        f"{option} is {shown(there)} there and {shown(here)} here"
        for option, there, here in dict.fromkeys(found)
        if there != here
    ]
    if differences:
        raise InputError(
            f"{root} was made with other settings: {'; '.join(differences)}; leave them out to resume with "
            "the folder's, or start a run of its own without --resume"
        )


def check_data(root: Path, tasks: dict[str, TaskData]) -> None:
    """InputError where a task's data are not those that the folder's cells were trained on."""
    results = read_results(root)
    for name, task in tasks.items():
        there, here = task_facts(results, name).provenance.get("sha256"), task.provenance.get("sha256")
        if there != here:
            raise InputError(
                f"the data of {name} are not those that {root} was made with: sha256 {str(there)[:12]}... "
                f"there, {str(here)[:12]}... here"
            )


def environment_changes(root: Path, plan: RunPlan) -> str:
    """How this place differs from the one the folder was made in; empty where it does not."""
    there, here = read_results(root).environment, describe_environment(plan.device)
    changed = [name for name in SAME_ENVIRONMENT if there.get(name) != here[name]]
    return ", ".join(f"{name} {there.get(name)} -> {here[name]}" for name in changed)
