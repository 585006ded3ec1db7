"""One or several results folders as read for a comparison, and what they say of their tasks and cells.

    joined = read_joined([Path("results_a"), Path("results_b")])      # more seeds, models, another machine
    joined.results, joined.sources, joined.differences
    task_facts(joined.results, "listops").chance

What would make one mean of unlike numbers is refused, in one line that names the first difference: another
preset, other settings of model, training or data, other data, other arithmetic (bf16 against fp32), or a cell
that is done in two folders. Machines, commits, models and seeds may differ: the report names them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from command_line import InputError
from reporting.metrics import PERCENT, Metric, metric_named, number
from results_folder import (
    PATTERNS,
    SHARED_BY,
    AttentionPatterns,
    Cell,
    CellRecord,
    Results,
    read_attention_patterns,
    read_results,
)

BASELINE = "conventional"
PLACES = ("data_dir", "cache_dir")  # where the data lay: not what they are
MIXED = "--allow-differences"


# What a folder says


@dataclass(frozen=True)
class TaskFacts:
    """What config.json says of a task; None where it does not."""

    name: str
    title: str
    chance: float | None
    majority: float | None
    test_size: int | None
    num_classes: int | None
    provenance: dict[str, Any]
    metric: Metric = PERCENT
    test_predictions: int | None = None  # one an example, or more where tokens have targets
    class_names: tuple[str, ...] = ()

    @property
    def level(self) -> float | None:
        """The metric of guessing evenly."""
        return self.metric.chance_level(self.chance)


def as_object(value: Any) -> dict[str, Any]:
    """A JSON object; an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}


def _share(value: Any) -> float | None:
    found = number(value)
    return found if found is not None and 0 <= found <= 1 else None


def _count(value: Any) -> int | None:
    found = number(value)
    return int(found) if found is not None and found >= 1 else None


def usable(results: Results) -> Results:
    """The results with each cell once, and with a "done" cell that lacks its task's metric named as failed.

    Raises InputError where a task's metric is not known."""
    metrics = {task: task_facts(results, task).metric for task in tasks_of(results)}
    cells = []
    for record in {record.cell: record for record in results.cells}.values():
        metric, result = metrics[record.cell.task], record.result or {}
        lacks = ""
        if (said := result.get("metric", metric.name)) != metric.name:
            lacks = f"is of the metric {said!s:.40}"
        elif metric.read(result, "test_{}_best") is None:
            lacks = f"has no test_{metric.source}_best"
        if lacks and record.state == "done":
            record = replace(record, state="failed", reason=f"unusable: result.json {lacks}")
        cells.append(record)
    return replace(results, cells=cells)


def metric_of(record: CellRecord) -> Metric:
    """What a cell's result is measured by: accuracy where it does not say."""
    return metric_named((record.result or {}).get("metric", PERCENT.name))


def task_facts(results: Results, task: str) -> TaskFacts:
    facts = as_object(as_object(results.config.get("task_info")).get(task))
    names = facts.get("class_names")
    try:
        metric = metric_named(facts.get("metric", PERCENT.name))
    except InputError as error:
        raise InputError(f"{results.root}: task {task}: {error}; it needs a newer version") from error
    return TaskFacts(
        name=task,
        title=str(facts.get("title") or task),
        chance=_share(facts.get("chance")),
        majority=_share(facts.get("majority")),
        test_size=_count(facts.get("test_size")),
        num_classes=_count(facts.get("num_classes")),
        provenance=as_object(facts.get("provenance")),
        metric=metric,
        test_predictions=_count(facts.get("test_predictions")),
        class_names=tuple(map(str, names)) if isinstance(names, list) else (),
    )


def tasks_of(results: Results) -> list[str]:
    return list(dict.fromkeys(record.cell.task for record in results.cells))


def models_of(results: Results) -> list[str]:
    return list(dict.fromkeys(record.cell.model for record in results.cells))


def default_baseline(models: Sequence[str]) -> str:
    """What differences are taken to: softmax attention, or the first model where that was not run."""
    return BASELINE if BASELINE in models or not models else models[0]


def done_cells(results: Results) -> list[CellRecord]:
    return [record for record in results.cells if record.state == "done"]


def most_on_a_device(record: CellRecord) -> int:
    """How many cells were on the cell's device at a time, itself included; 1 where nothing is noted."""
    return int(number(record.config.get(SHARED_BY)) or 1)


def read_patterns(results: Results) -> tuple[dict[Cell, AttentionPatterns], dict[Cell, str]]:
    """The attention patterns of the finished cells, and why a cell has none."""
    patterns, reasons = {}, {}
    for record in done_cells(results):
        try:
            patterns[record.cell] = read_attention_patterns(record.folder / PATTERNS)
        except ValueError as error:
            given = (record.result or {}).get("attention_patterns_reason")
            reasons[record.cell] = str(given or error)
    return patterns, reasons


# Several folders as one


@dataclass(frozen=True)
class JoinedResults:
    """results: all cells, with the first folder's settings. sources: the folders as read, in order.
    differences: what was let pass although it differs, a line each."""

    results: Results
    sources: tuple[Results, ...]
    differences: tuple[str, ...] = ()


def read_joined(folders: Sequence[Path], *, allow_differences: bool = False) -> JoinedResults:
    """Read the folders as one. Raises InputError where one is no results folder or two must not be mixed;
    with `allow_differences` the latter is noted, and of a cell that is done twice the first one counts."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a results folder is named twice; name each once")
    sources = tuple(usable(read_results(folder)) for folder in folders)
    differences = []
    for other in sources[1:]:
        found = [*_differences(sources[0], other)]
        if found and not allow_differences:
            raise InputError(f"{found[0]}; {MIXED} compares them all the same, and says so in the report")
        differences += found
    cells: dict[Cell, tuple[CellRecord, Results]] = {}
    for source in sources:
        for record in source.cells:
            held = cells.get(record.cell)
            if held and held[0].state == record.state == "done":
                twice = f"{record.cell} is done in {folder_name(held[1])} and in {folder_name(source)}"
                if not allow_differences:
                    raise InputError(f"{twice}; give it once, or {MIXED} to take the first")
                differences.append(f"{twice}: the first counts")
            elif held is None or record.state == "done":
                cells[record.cell] = record, source
    results = replace(sources[0], config=_joined_config(sources), cells=[one for one, _ in cells.values()])
    return JoinedResults(results, sources, tuple(differences))


def folder_name(source: Results) -> str:
    return source.root.resolve().name


def _joined_config(sources: Sequence[Results]) -> dict[str, Any]:
    """The first folder's config, with the tasks of all, and those that none of them has as unavailable."""
    infos: dict[str, Any] = {}
    unavailable: dict[str, Any] = {}
    for source in reversed(sources):
        infos |= as_object(source.config.get("task_info"))
        unavailable |= as_object(source.config.get("unavailable"))
    missing = {task: why for task, why in unavailable.items() if task not in infos}
    return sources[0].config | {"task_info": infos, "unavailable": missing}


def unavailable_tasks(results: Results) -> dict[str, str]:
    """By task that was left out, why."""
    return {str(task): str(why) for task, why in as_object(results.config.get("unavailable")).items()}


def _differences(one: Results, other: Results) -> Iterator[str]:
    """What keeps two folders from being one run, each as "training.batch_size is 32 in A and 64 in B"."""
    mine, theirs = dict(_comparable(one)), dict(_comparable(other))
    # A task or a model that only one of them has is an addition, not a difference.
    shared = {key.split(" ")[0] for key in mine} & {key.split(" ")[0] for key in theirs}
    for key in mine | theirs:
        values = mine.get(key), theirs.get(key)
        if key.split(" ")[0] in shared and values[0] != values[1]:
            here, there = ("not set" if value is None else value for value in values)
            yield f"{key} is {here} in {folder_name(one)} and {there} in {folder_name(other)}"


def _comparable(results: Results) -> Iterator[tuple[str, Any]]:
    """What must be equal, by name; the first word of a name says whether both folders must have it."""
    config = results.config
    yield "preset", config.get("preset")
    settings = as_object(config.get("settings"))
    of_models = {group: settings.get(group) for group in ("model", "training")}
    for part in (of_models, as_object(settings.get("by_task")), as_object(settings.get("data"))):
        for group, values in part.items():
            named = as_object(values).items()
            yield from ((f"{group} setting {name}", value) for name, value in named if name not in PLACES)
    for task, facts in as_object(config.get("task_info")).items():
        for name in ("num_classes", "test_size", "metric"):
            yield f"{task} {name}", as_object(facts).get(name)
        yield f"{task} data sha256", as_object(as_object(facts).get("provenance")).get("sha256")
    arithmetic = {str(record.result.get("precision")) for record in results.cells if record.result}
    if arithmetic:
        yield "arithmetic", " and ".join(sorted(arithmetic))
