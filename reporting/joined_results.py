"""Several results folders as one: more seeds, more models, another machine.

    joined = read_joined([Path("results_a"), Path("results_b")])
    joined.results, joined.sources, joined.differences

What would make one mean of unlike numbers is refused, in one line that names the first difference: another
preset, other settings of model, training or data, other data, other arithmetic (bf16 against fp32), or a cell
that is done in two folders. Machines, commits, models and seeds may differ: the report names them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from command_line import InputError
from reporting.comparison_tables import usable
from results_folder import Cell, CellRecord, Results, read_results

PLACES = ("data_dir", "cache_dir")  # where the data lay: not what they are
MIXED = "--allow-differences"
# Settings that folders of an older version lack, and what held there.
YOUNGER = {"model": {"discount": "weights"}}


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
                twice = f"{record.cell} is done in {_name(held[1])} and in {_name(source)}"
                if not allow_differences:
                    raise InputError(f"{twice}; give it once, or {MIXED} to take the first")
                differences.append(f"{twice}: the first counts")
            elif held is None or record.state == "done":
                cells[record.cell] = record, source
    results = replace(sources[0], config=_joined_config(sources), cells=[one for one, _ in cells.values()])
    return JoinedResults(results, sources, tuple(differences))


def _name(source: Results) -> str:
    return source.root.resolve().name


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _joined_config(sources: Sequence[Results]) -> dict[str, Any]:
    """The first folder's config, with the tasks of all."""
    infos: dict[str, Any] = {}
    for source in reversed(sources):
        infos |= _object(source.config.get("task_info"))
    return sources[0].config | {"task_info": infos}


def _differences(one: Results, other: Results) -> Iterator[str]:
    """What keeps two folders from being one run, each as "training.batch_size is 32 in A and 64 in B"."""
    mine, theirs = dict(_comparable(one)), dict(_comparable(other))
    for key in [*mine, *(key for key in theirs if key not in mine)]:
        # A task or a model that only one of them has is an addition, not a difference.
        part = key.split(" ", 1)[0]
        shared = any(name.split(" ", 1)[0] == part for name in mine) and any(
            name.split(" ", 1)[0] == part for name in theirs
        )
        if shared and mine.get(key) != theirs.get(key):
            values = f"{_said(mine.get(key))} in {_name(one)} and {_said(theirs.get(key))} in {_name(other)}"
            yield f"{key} is {values}"


def _said(value: Any) -> str:
    return "not set" if value is None else str(value)


def _comparable(results: Results) -> Iterator[tuple[str, Any]]:
    """What must be equal, by name; the first word of a name says whether both folders must have it."""
    config = results.config
    yield "preset", config.get("preset")
    settings = _object(config.get("settings"))
    for group in ("model", "training"):
        for name, value in (YOUNGER.get(group, {}) | _object(settings.get(group))).items():
            yield f"{group} setting {name}", value
    for task, values in _object(settings.get("data")).items():
        yield from ((f"{task} setting {name}", value) for name, value in values.items() if name not in PLACES)
    for task, facts in _object(config.get("task_info")).items():
        for name in ("num_classes", "test_size", "stand_in_for"):
            yield f"{task} {name}", _object(facts).get(name)
        yield f"{task} data sha256", _object(_object(facts).get("provenance")).get("sha256")
    arithmetic = sorted(
        {str((record.result or {}).get("precision")) for record in results.cells if record.result}
    )
    if arithmetic:
        yield "arithmetic", " and ".join(arithmetic)
