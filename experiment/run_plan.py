"""What a run will do, settled and checked before any work: presets, and the plan made from the command line.

plan = make_plan(arguments)               # InputError names the first thing that cannot work
plan, tasks = load_tasks(plan)            # the tasks whose data can be had
"""

import argparse
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from command_line import InputError, choose, given_settings, too_large
from data_pipeline import MEANINGLESS, TASKS, DataSettings, DataUnavailableError, TaskData, load_task
from experiment.models import COMPARED, Model, build, matched_settings
from results_folder import Cell, file_name
from train_and_evaluate import ModelSettings, TrainingSettings
from training.model_cost import count_parameters

DEVICE_TYPES = ("cpu", "cuda", "mps")
# With which learning rates are tried: no result may use them. One is too few where learning is sudden.
TUNING_SEEDS = (1_000_000, 1_000_001)
LONGEST_NAME = 200  # bytes: file systems take 255 for a folder's name
Settings = TypeVar("Settings", ModelSettings, TrainingSettings)


@dataclass(frozen=True)
class Preset:
    """Settings that differ from the defaults, those of the data by task.

    by_task: of a task, "seeds" and settings of model and training that differ from the preset's own.
    learning_rate of `training`: a number, or a tuple of those to choose from for each model and task.
    complete: whether a task whose data cannot be had ends the run before it begins; else it is left out.
    """

    summary: str
    tasks: tuple[str, ...] = ("imdb", "listops")
    models: tuple[str, ...] = COMPARED
    seeds: tuple[int, ...] = (0,)
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    by_task: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    complete: bool = False


SMALL: dict[str, Any] = {"embed_dim": 64, "feed_forward_dim": 128}
LRA_IN_SMALL: dict[str, dict[str, Any]] = {
    "imdb": {"tokenizer": "word", "max_length": 128, "train_size": 3000, "val_size": 1000, "test_size": 2000},
    "listops": {"min_length": 10, "max_length": 80, "train_size": 6000, "val_size": 1000, "test_size": 2000},
}
SHORT_TRAINING = {"max_epochs": 4, "patience": 4}
GENERATED_IN_SMALL: dict[str, dict[str, Any]] = {
    # So long that where it is learned suddenly, and late, a rate is not chosen by who was just before it.
    "recall": {"dropout": 0.0, "max_epochs": 18, "patience": 18},
    # One layer: with a second one softmax attention can tell positions, which hold is to be solved without.
    "hold": {"dropout": 0.0, "num_layers": 1, "batch_size": 16, "max_epochs": 6, "patience": 6},
}
MORE_GENERATED: dict[str, dict[str, Any]] = {
    "latest": {"dropout": 0.0, "batch_size": 16, "max_epochs": 5, "patience": 5},
    "nearest": {"dropout": 0.0, "num_layers": 1, "max_epochs": 8, "patience": 8},
    "lookup": {"dropout": 0.0, "num_layers": 1, "batch_size": 16, "max_epochs": 3, "patience": 3},
    "bytes": {"dropout": 0.0, "batch_size": 16, "max_epochs": 6, "patience": 6},
}

PRESETS = {
    "full": Preset(
        "the seed configuration on IMDb and ListOps, seeds 0 1 2; for a GPU", seeds=(0, 1, 2), complete=True
    ),
    "study": Preset(
        "the published comparison: with two controls, eight seeds and tuned learning rates; hours on a CPU",
        tasks=("recall", "hold", *MORE_GENERATED, "imdb", "listops"),
        models=(*COMPARED, "per_head_decay", "adaptive"),
        seeds=tuple(range(8)),
        model=SMALL,
        training={"learning_rate": (0.001, 0.003, 0.01)},
        by_task=GENERATED_IN_SMALL | MORE_GENERATED | dict.fromkeys(LRA_IN_SMALL, SHORT_TRAINING),
        data=LRA_IN_SMALL,
    ),
    "quick": Preset(
        "recall and hold with four seeds, short texts and expressions with one; 8 minutes on 2 cores",
        tasks=("recall", "hold", "imdb", "listops"),
        seeds=tuple(range(4)),
        model=SMALL,
        training={"learning_rate": 0.003},
        # Of recall so many steps as softmax attention needs.
        by_task=GENERATED_IN_SMALL
        | {"recall": GENERATED_IN_SMALL["recall"] | {"max_epochs": 8, "patience": 8}}
        | {task: SHORT_TRAINING | {"learning_rate": 0.001, "seeds": (0,)} for task in LRA_IN_SMALL},
        data={
            "imdb": LRA_IN_SMALL["imdb"] | {"train_size": 1600, "val_size": 500, "test_size": 1000},
            "listops": LRA_IN_SMALL["listops"] | {"train_size": 3200},
        },
    ),
    "smoke": Preset(
        "every step of a run once, tiny and offline; its figures mean nothing",
        tasks=("listops",),
        model={"embed_dim": 16, "num_heads": 2, "num_layers": 1, "feed_forward_dim": 32},
        training={"max_epochs": 2, "batch_size": 16, "learning_rate": 1e-3},
        data={
            "listops": {"min_length": 5, "max_length": 40}
            | {"train_size": 64, "val_size": 32, "test_size": 32}
        },
    ),
}


@dataclass(frozen=True)
class RunPlan:
    """A run with everything settled. data_settings: by task. unavailable: by task that was left out, why.
    by_task: of a task, "seeds" and settings of model and training that differ from the run's: `seeds_of`,
    `model_settings_of` and `training_settings_of` are what holds for it, `seeds` are those of any task.
    learning_rates: those to choose from, ascending, where there are several; training_settings has the
    first."""

    preset: str
    models: tuple[Model, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    model_settings: ModelSettings
    training_settings: TrainingSettings
    data_settings: dict[str, DataSettings]
    device: torch.device
    unavailable: dict[str, str] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()
    by_task: dict[str, dict[str, Any]] = field(default_factory=dict)

    def seeds_of(self, task: str) -> tuple[int, ...]:
        return tuple(self.by_task.get(task, {}).get("seeds", self.seeds))

    def model_settings_of(self, task: str) -> ModelSettings:
        return self._of(task, self.model_settings)

    def training_settings_of(self, task: str) -> TrainingSettings:
        return self._of(task, self.training_settings)

    def _of(self, task: str, settings: Settings) -> Settings:
        names = {one.name for one in fields(settings)}
        own = {name: value for name, value in self.by_task.get(task, {}).items() if name in names}
        return replace(settings, **own)

    @property
    def trials(self) -> list[Cell]:
        """The cells that try the learning rates, all for each task and model: the same budget for every
        model."""
        return [
            Cell(task, model.name, seed, rate)
            for task in self.tasks
            for model in self.models
            for rate in self.learning_rates
            for seed in TUNING_SEEDS
        ]

    def trials_for(self, cell: Cell) -> list[Cell]:
        """The trials that settle the learning rate of a result."""
        return [one for one in self.trials if (one.task, one.model) == (cell.task, cell.model)]

    @property
    def cells(self) -> list[Cell]:
        """Seeds outermost: a run that is cut off is still a comparison."""
        return [
            Cell(task, model.name, seed)
            for seed in self.seeds
            for task in self.tasks
            if seed in self.seeds_of(task)
            for model in self.models
        ]

    def model_of(self, cell: Cell) -> Model:
        return next(model for model in self.models if model.name == cell.model)


def make_plan(arguments: argparse.Namespace) -> RunPlan:
    """The plan of the command line's options over the preset's over the defaults.

    Raises InputError for unknown names, illegal values, a device that is not there, a model that cannot be
    built with these settings or that fails on three tokens."""
    device = find_device(arguments.device)
    preset_name = choose(arguments.preset, ("auto", *PRESETS), "preset")
    if preset_name == "auto":
        preset_name = "full" if device.type == "cuda" else "quick"
    preset = PRESETS[preset_name]
    models = tuple(map(Model.parse, _each_once(arguments.models or preset.models, "--models")))
    tasks = _each_once(arguments.tasks or preset.tasks, "--tasks")
    seeds = _each_once(arguments.seeds or preset.seeds, "--seeds")
    kinds = ModelSettings, TrainingSettings, DataSettings
    of_model, of_training, of_data = (given_settings(arguments, kind) for kind in kinds)
    overruled = {*of_model, *of_training, *(["seeds"] if arguments.seeds else [])}
    by_task = {
        task: {name: value for name, value in preset.by_task[task].items() if name not in overruled}
        for task in tasks
        if task in preset.by_task
    }
    for task in tasks:
        choose(task, TASKS, "task")
    if min(seeds) < 0:
        raise InputError(f"--seeds must be at least 0, got {min(seeds)}")
    if allowed := too_large(max(seeds)):
        raise InputError(f"--seeds must be {allowed}, got {max(seeds)}")
    for seed in TUNING_SEEDS:
        if seed in seeds:
            raise InputError(f"--seeds must not name {seed}: it is kept for choosing learning rates")
    training, rates = training_and_rates(preset.training | of_training)
    plan = RunPlan(
        preset=preset_name,
        models=models,
        tasks=tasks,
        seeds=seeds,
        model_settings=ModelSettings(**preset.model | of_model),
        training_settings=training,
        data_settings={task: _data_settings(task, preset.data.get(task, {}) | of_data) for task in tasks},
        device=device,
        learning_rates=rates,
        by_task=by_task,
    )
    for model in models:
        model.check(plan.model_settings)
    for one, other in itertools.combinations(models, 2):
        if (one.factory, one.arguments) == (other.factory, other.arguments):
            names = f"{one.name} and {other.name}"
            raise InputError(f"--models names one model twice: {names} have equal settings")
    return plan


def training_and_rates(values: dict[str, Any]) -> tuple[TrainingSettings, tuple[float, ...]]:
    """The settings of values whose learning_rate may be several, and these in ascending order; of one value
    there is nothing to choose. InputError where one is not legal or comes twice."""
    given = values.get("learning_rate", TrainingSettings().learning_rate)
    several = given if isinstance(given, tuple) else (given,)
    settings = [TrainingSettings(**values | {"learning_rate": rate}) for rate in sorted(several)]
    _each_once([f"{rate:g}" for rate in several], "--learning-rate")  # the names of the trials' folders
    return settings[0], tuple(one.learning_rate for one in settings) if len(settings) > 1 else ()


def _each_once(entries: Sequence[Any], option: str) -> tuple[Any, ...]:
    """The entries; InputError where one comes twice, also as a folder's name, or is too long for one."""
    names = [file_name(str(entry)) for entry in entries]
    for entry, name in zip(entries, names, strict=True):
        if names.count(name) > 1:
            raise InputError(f"{option} names {entry} twice; name each once")
        if len(name.encode()) > LONGEST_NAME:
            raise InputError(
                f"{option} names {entry[:40]}..., longer than the {LONGEST_NAME} bytes of a folder"
            )
    return tuple(entries)


def _data_settings(task: str, values: dict[str, Any]) -> DataSettings:
    """A task's data settings; an option that means nothing to the task is left out."""
    meaningless = MEANINGLESS.get(task, ())
    return DataSettings(**{name: value for name, value in values.items() if name not in meaningless})


def find_device(name: str) -> torch.device:
    """ "auto", or what torch.device takes; InputError where the device cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choose(name.split(":")[0], ("auto", *DEVICE_TYPES), "--device")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--device {name} cannot be used here: {reason}") from error
    return device


def existing_part(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def check_output_folder(parent: Path) -> None:
    """InputError where no folder can be made in `parent`; makes nothing."""
    existing = existing_part(parent)
    if not existing.is_dir():
        raise InputError(f"cannot write to {parent}: {existing} is no folder; choose another --output-dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {parent}: no permission; choose another --output-dir")


@cache
def load_once(task: str, settings: DataSettings) -> TaskData:
    """A task's data, which all its cells in this process share."""
    return load_task(task, settings)


def load_tasks(plan: RunPlan, leave_out: bool = False) -> tuple[RunPlan, dict[str, TaskData]]:
    """Each task's data. DataUnavailableError where one cannot be had; with `leave_out` it is left out of the
    plan, which is said, as long as a task remains."""
    tasks: dict[str, TaskData] = {}
    unavailable = dict(plan.unavailable)
    for number, task in enumerate(plan.tasks, 1):
        try:
            tasks[task] = load_once(task, plan.data_settings[task])
        except DataUnavailableError as error:
            if not leave_out or (number == len(plan.tasks) and not tasks):
                raise
            unavailable[task] = str(error)
            print(f"{task} is left out, its data are unavailable: {error}", flush=True)
    data = {task: plan.data_settings[task] for task in tasks}
    return replace(plan, tasks=tuple(tasks), data_settings=data, unavailable=unavailable), tasks


def settings_by_cell(plan: RunPlan, tasks: dict[str, TaskData]) -> dict[tuple[str, str], ModelSettings]:
    """The encoder's settings by (task, model): the plan's, with --match-parameters widened for each model.

    The largest is that of the models compared by default and the plan's own, so that a control that is run
    alone has the size of what it is a control for."""
    if not plan.model_settings.match_parameters:
        return {(task, model.name): plan.model_settings_of(task) for task in tasks for model in plan.models}
    models = (*map(Model.parse, COMPARED), *plan.models)
    found: dict[tuple[str, str], ModelSettings] = {}
    for name, task in tasks.items():
        own = plan.model_settings_of(name)
        matched = matched_settings(models, own, task.vocab_size, task.num_classes)
        found |= {(name, model.name): matched[model.name] for model in plan.models}
    return found


def parameter_counts(plan: RunPlan, tasks: dict[str, TaskData]) -> dict[tuple[str, str], int]:
    """The number of parameters by (task, model)."""
    models = {model.name: model for model in plan.models}
    return {
        (task, name): count_parameters(
            build(models[name], settings, tasks[task].vocab_size, tasks[task].num_classes)
        )
        for (task, name), settings in settings_by_cell(plan, tasks).items()
    }
