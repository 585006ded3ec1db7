"""What a run will do, settled and checked before any work: models, presets and the plan made from them.

    plan = make_plan(arguments)      # InputError names the first thing that cannot work
    plan, tasks = load_tasks(plan)

A model is a factory in MODELS, or any class with the interface of `nn.MultiheadAttention(batch_first=True)`,
named as `package.module:Class`. It is given those model settings that its constructor has arguments for.
Its name may go on with settings of its own: see model_variants.py.
"""

import argparse
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from command_line import InputError, choose, given_settings, nearest
from conventional_attention import ConventionalAttention
from data_pipeline import TASKS, DataSettings, MissingData, TaskData, load_task
from experiment.model_cost import matched_settings
from experiment.model_variants import OWN, variant, variant_settings
from experiment.transformer_classifier import ModelSettings, random_stream
from gravitational_attention import GravitationalAttention
from gravitational_multi_timescale_attention import GravitationalMultiTimescaleAttention
from multi_timescale_attention import MultiTimescaleAttention
from results_folder import Cell, file_name
from train_and_evaluate import TrainingSettings

MODELS: dict[str, Callable[..., nn.Module]] = {
    "conventional": ConventionalAttention,
    "gravitational": GravitationalAttention,
    "multi_timescale": MultiTimescaleAttention,
    "gravitational_multi_timescale": GravitationalMultiTimescaleAttention,
    # A control, on request: is it the several timescales, or would any relative position do?
    "discounted": functools.partial(MultiTimescaleAttention, num_timescales=1, gammas=None, decoder="linear"),
}
COMPARED = ("conventional", "gravitational", "multi_timescale", "gravitational_multi_timescale")
STAND_INS = {"imdb": "synthetic_reviews"}
DEVICE_TYPES = ("cpu", "cuda", "mps")
LONGEST_NAME = 200  # bytes: file systems take 255 for a folder's name


@dataclass(frozen=True)
class Preset:
    """Settings that differ from the defaults, those of the data by task.

    stands_in: whether a task whose data cannot be had is replaced by its stand-in.
    """

    summary: str
    tasks: tuple[str, ...] = ("imdb", "listops")
    seeds: tuple[int, ...] = (0,)
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    stands_in: bool = False


_SMALL_REVIEWS = {"max_length": 256, "train_size": 1500, "val_size": 500, "test_size": 1000}
PRESETS = {
    "full": Preset("the seed configuration on IMDb and ListOps, seeds 0 1 2; for a GPU", seeds=(0, 1, 2)),
    "quick": Preset(
        "the same models, short texts and expressions; at most 10 minutes on 2 cores",
        model={"embed_dim": 64, "feed_forward_dim": 128},
        training={"max_epochs": 4, "learning_rate": 1e-3, "patience": 4},
        data={
            "imdb": {"tokenizer": "word", "max_length": 128}
            | {"train_size": 3000, "val_size": 1000, "test_size": 2000},
            "synthetic_reviews": _SMALL_REVIEWS,
            "listops": {"min_length": 10, "max_length": 80}
            | {"train_size": 6000, "val_size": 1000, "test_size": 2000},
        },
        stands_in=True,
    ),
    "smoke": Preset(
        "every step of a run once, tiny and offline; its figures mean nothing",
        tasks=("synthetic_reviews", "listops"),
        model={"embed_dim": 16, "num_heads": 2, "num_layers": 1, "feed_forward_dim": 32},
        training={"max_epochs": 2, "batch_size": 16, "learning_rate": 1e-3},
        data={
            "synthetic_reviews": {"max_length": 64, "train_size": 64, "val_size": 32, "test_size": 32},
            "listops": {"min_length": 5, "max_length": 40}
            | {"train_size": 64, "val_size": 32, "test_size": 32},
        },
    ),
}


@dataclass(frozen=True)
class Plan:
    """A run with everything settled.

    data: by task. may_stand_in: whether a task that is missing may be replaced. stand_in_for: by task that
    came in, the task it replaces.
    """

    preset: str
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    model: ModelSettings
    training: TrainingSettings
    data: dict[str, DataSettings]
    device: torch.device
    may_stand_in: bool = False
    stand_in_for: dict[str, str] = field(default_factory=dict)

    @property
    def cells(self) -> list[Cell]:
        """Seeds outermost: a run that is cut off is still a comparison."""
        return [
            Cell(task, model, seed) for seed in self.seeds for task in self.tasks for model in self.models
        ]


def make_plan(arguments: argparse.Namespace) -> Plan:
    """The plan of the command line's options over the preset's over the defaults.

    Raises InputError for unknown names, illegal values, a device that is not there, a model that cannot be
    built with these settings or that fails on three tokens."""
    device = find_device(arguments.device)
    preset_name = choose(arguments.preset, ("auto", *PRESETS), "preset")
    if preset_name == "auto":
        preset_name = "full" if device.type == "cuda" else "quick"
    preset = PRESETS[preset_name]
    models = _unique(arguments.models or COMPARED, "--models")
    tasks = _unique(arguments.tasks or preset.tasks, "--tasks")
    seeds = _unique(arguments.seeds or preset.seeds, "--seeds")
    for task in tasks:
        choose(task, TASKS, "task")
    if min(seeds) < 0:
        raise InputError(f"--seeds must be at least 0, got {min(seeds)}")
    given = given_settings(arguments, ModelSettings)
    if given.get("gammas") and "num_timescales" not in given:
        given["num_timescales"] = len(given["gammas"])
    plan = Plan(
        preset=preset_name,
        models=models,
        tasks=tasks,
        seeds=seeds,
        model=ModelSettings(**preset.model | given),
        training=TrainingSettings(**preset.training | given_settings(arguments, TrainingSettings)),
        data={
            task: data_settings(preset, task, given_settings(arguments, DataSettings))
            for task in (*tasks, *(STAND_INS[task] for task in tasks if task in STAND_INS))
        },
        device=device,
        may_stand_in=preset.stands_in and not arguments.tasks,
    )
    for model in models:
        check_model(model, plan.model)
    _refuse_equal_models(models, plan.model)
    return plan


def _unique(entries: Sequence[Any], option: str) -> tuple[Any, ...]:
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


def _refuse_equal_models(models: tuple[str, ...], settings: ModelSettings) -> None:
    """InputError where two names are one model with the same settings."""
    seen: list[tuple[str, str, dict[str, Any]]] = []
    for name in models:
        base, arguments = variant(name)[0], attention_arguments(name, settings)
        for other, other_base, other_arguments in seen:
            if (base, arguments) == (other_base, other_arguments):
                raise InputError(f"--models names one model twice: {other} and {name} have equal settings")
        seen.append((name, base, arguments))


def data_settings(preset: Preset, task: str, given: dict[str, Any]) -> DataSettings:
    """A task's data settings; an option that means nothing to the task is left out."""
    values = preset.data.get(task, {}) | given
    if task != "listops":
        values.pop("min_length", None)
    return DataSettings(**values)


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


def find_model(name: str) -> Callable[..., nn.Module]:
    """The factory of a name in MODELS or of a class named as `package.module:Class`, settings left aside."""
    name, _ = variant(name)
    if ":" not in name:
        return MODELS[choose(name, MODELS, "model")]
    module_name, _, class_name = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(f"model {name}: {module_name} cannot be imported: {_one_line(error)}") from error
    factory = getattr(module, class_name, None)
    if not callable(factory):
        hint = nearest(class_name, dir(module))
        raise InputError(f"model {name}: {module_name} has no class {class_name}; {hint}".strip("; "))
    return factory


def attention_arguments(name: str, settings: ModelSettings) -> dict[str, Any]:
    """The keyword arguments a model's factory is called with: the settings it has arguments for.

    The dropout of the settings is the encoder's; attention weights are not dropped. Raises InputError where
    the name holds a setting that the factory has no argument for."""
    factory = find_model(name)
    fixed = factory.keywords if isinstance(factory, functools.partial) else {}
    parameters = inspect.signature(factory).parameters
    offered = asdict(variant_settings(name, settings)) | {"batch_first": True, "dropout": 0.0}
    taken = {key: value for key, value in offered.items() if key in parameters and key not in fixed}
    for key in variant(name)[1]:
        if key not in taken:
            has = [own for own in OWN if own in taken]
            why = "is fixed in this model" if key in fixed else "is no setting of this model"
            hint = f"{nearest(key, has)}(it has {', '.join(has) or 'none'})"
            raise InputError(f"model {name}: {key} {why}: {hint}")
    return taken


def attention_factory(name: str, settings: ModelSettings) -> functools.partial[nn.Module]:
    return functools.partial(find_model(name), **attention_arguments(name, settings))


def settings_by_cell(plan: Plan, tasks: dict[str, TaskData]) -> dict[tuple[str, str], ModelSettings]:
    """The model settings by (task, model): the plan's with the model's own, and with --match-parameters
    widened for each model.

    The largest is that of the models compared by default and the plan's own, so that a control that is run
    alone has the size of what it is a control for."""
    if not plan.model.match_parameters:
        own = {model: variant_settings(model, plan.model) for model in plan.models}
        return {(task, model): own[model] for task in plan.tasks for model in plan.models}
    models = tuple(dict.fromkeys((*plan.models, *COMPARED)))
    found: dict[tuple[str, str], ModelSettings] = {}
    for task in plan.tasks:
        sizes = tasks[task].vocab_size, tasks[task].num_classes
        try:
            matched = matched_settings(attention_factory, models, *sizes, plan.model)
        except ValueError as error:
            raise InputError(f"--match-parameters on {task}: {error}; choose a larger model") from error
        found |= {(task, model): variant_settings(model, matched[model]) for model in plan.models}
    return found


def model_class(name: str) -> str:
    """The full name of the class behind a model."""
    factory = find_model(name)
    target: Any = factory.func if isinstance(factory, functools.partial) else factory
    return f"{target.__module__}.{target.__qualname__}"


def check_model(name: str, settings: ModelSettings) -> None:
    """Build the model's attention and attend over three tokens; InputError where that does not work."""
    x = torch.zeros(2, 3, settings.embed_dim)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    try:
        with random_stream(torch.device("cpu"), "check"), torch.no_grad():
            attention = attention_factory(name, settings)()
            output, _ = attention(x, x, x, key_padding_mask=padding, need_weights=False)
            shape = tuple(output.shape)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"model {name}: {_one_line(error)}") from error
    if shape != tuple(x.shape):
        raise InputError(
            f"model {name}: its output must have the query's shape {tuple(x.shape)}, got {shape}"
        )


def check_output_folder(parent: Path) -> None:
    """InputError where no folder can be made in `parent`; makes nothing."""
    existing = next(folder for folder in (parent.absolute(), *parent.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise InputError(f"cannot write to {parent}: {existing} is no folder; choose another --output-dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {parent}: no permission; choose another --output-dir")


def load_tasks(plan: Plan) -> tuple[Plan, dict[str, TaskData]]:
    """Each task's data, loaded once; a missing task is replaced where the plan allows it, which is said."""
    tasks: dict[str, TaskData] = {}
    stand_in_for: dict[str, str] = {}
    for wanted in plan.tasks:
        try:
            tasks[wanted] = load_task(wanted, plan.data[wanted])
        except MissingData as error:
            name = STAND_INS.get(wanted)
            if not plan.may_stand_in or name is None:
                raise
            print(f"{wanted} is not to be had: {name} stands in for it, under its own name ({error})")
            tasks[name] = load_task(name, plan.data[name])
            stand_in_for[name] = wanted
    data = {name: plan.data[name] for name in tasks}
    return replace(plan, tasks=tuple(tasks), data=data, stand_in_for=stand_in_for), tasks


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
