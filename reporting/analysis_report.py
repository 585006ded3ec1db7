"""The report of a comparison: the verdicts, a section for each task, what was run, how to reproduce it.

    for name, text in render_report(analysis, figures, folder).items():      # report.md, report.html
        write_text(root / name, text)

Both files are templates (templates/) filled from the same numbers and sentences, which are made in
first_screen.py and report_findings.py. Everything a folder's files say is escaped, and the page forbids
itself (Content-Security-Policy) to load anything.
"""

import base64
import shlex
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reporting.accuracy_against_cost import TARGET_SHARE
from reporting.analysis import Analysis, in_words
from reporting.attention_explorer import explorer_data, template_environment
from reporting.comparison_tables import NEAR
from reporting.first_screen import first_screen
from reporting.glossary import MODELS, TASKS, in_a_line
from reporting.metrics import METRICS
from reporting.report_findings import findings
from reporting.run_results import (
    BASELINE,
    MIXED,
    TaskFacts,
    as_object,
    default_baseline,
    folder_name,
    unavailable_tasks,
)
from reporting.summary_tables import difference_tables, run_tables, task_tables
from reporting.task_figures import DrawnFigure
from reporting.text_tables import code_block, markdown, markdown_table, single_line
from reporting.verdicts import LEARNED_GAP, LEARNED_SHARE, SIGNIFICANCE
from results_folder import Results

FIGURE_DPI, CSS_DPI = 150, 96  # of the PNG files (figure_style.py), and of a page
_RELEVANT = " or ".join(one.margin for one in METRICS.values())
DEFINITIONS = (
    "The test metric is that of the weights of the epoch that is best by it on validation; the test set is "
    "read once.",
    "Epochs to 90 % of best: the first epoch whose validation accuracy reaches 90 % of its maximum; "
    "above chance: the first with (accuracy - chance) / (maximum - chance) of at least 0.9.",
    "Time per epoch is that of the training steps, without evaluation and without the first step.",
    "FLOPs are those of the matrix products (2 for a multiplication and an addition) of one forward pass by "
    "the dense formula, mean over the test examples; exponentials and divisions are not counted.",
    f"Target: a validation metric {TARGET_SHARE:.0%} of the way from chance to the reachable, the best "
    "epoch of the best model (mean over its seeds); one for all models. A run that ended without it is "
    "censored there. How soon a model gets there depends on its learning rate, which was chosen for the best "
    "value, not for speed.",
    "Interval: 95 % t interval of the mean over seeds. A family of comparisons is each model with the "
    "baseline on one task; Holm's correction is over it. A paired t test decides; where all differences "
    "are equal, the sign-flip test. The latter, exact, assumes nothing and is 2 / 2^n at the least with n "
    "seeds.",
    f"A difference is not relevant where its interval holds none of {_RELEVANT}, has a direction where else "
    f"the corrected p is at most {SIGNIFICANCE}, and is else open: more seeds would tell.",
    f"A seed has learned where its test metric is at least {LEARNED_SHARE:.0%} of the way from chance to the "
    "task's best cell. Seeds either learn or do not where a model has both kinds, "
    f"{LEARNED_GAP:.0%} of that way or more apart: then the shares are compared, by Fisher's exact test.",
    "Bits per byte: the loss in nats over ln 2; fewer are a gain.",
    "Peak memory is the CUDA allocator's on a GPU, the resident set of the process on a CPU.",
    f"Weight within {NEAR} tokens: the share of a query's weight at |i - j| < {NEAR}, in long examples.",
    "Entropy of a row: of a query's weights over the log of the number of tokens, mean over examples, "
    "layers and heads: 1 = even weights, 0 = one token.",
)


def render_report(analysis: Analysis, figures: dict[str, list[DrawnFigure]], folder: Path) -> dict[str, str]:
    """report.md and report.html by file name. figures: by task, "" for those of all tasks; folder: where
    their PNG files are."""
    context = {
        "title": "Comparison of attention mechanisms",
        "notices": _notices(analysis),
        "facts": _facts(analysis),
        "screen": first_screen(analysis),
        "glossary": _glossary(analysis),
        "overview": figures.get("", []),
        "differences": difference_tables(analysis),
        "sections": [_section(analysis, task, figures.get(task, [])) for task in analysis.facts],
        "run_tables": run_tables(analysis),
        "no_patterns": _without_patterns(analysis),
        "explorer": explorer_data(analysis.patterns, analysis.names, analysis.facts),
        "definitions": DEFINITIONS,
        "reproduce": _how_to_reproduce(analysis),
    }
    environment = template_environment()
    environment.filters |= {"single_line": single_line, "markdown": markdown, "code_block": code_block}
    environment.globals |= {
        "png": lambda stem: _png(folder / f"{stem}.png"),
        "markdown_table": markdown_table,
    }
    names = ("report.md", "report.html")
    return {name: environment.get_template(f"{name}.jinja").render(context) for name in names}


def _glossary(analysis: Analysis) -> list[tuple[str, str]]:
    """The models and tasks by name, and what they are; without those of somebody's own."""
    models = [(name, in_a_line(MODELS, model)) for model, name in analysis.names.items()]
    tasks = [(task, in_a_line(TASKS, task)) for task in analysis.facts]
    return [(name, said) for name, said in models + tasks if said]


def _section(analysis: Analysis, task: str, figures: list[DrawnFigure]) -> dict[str, Any]:
    """A task's: its name and heading, what it asks, figures, what its numbers say, tables."""
    facts, notice = analysis.facts[task], analysis.notice(task)
    return {
        "name": task,
        "title": f"{task} ({facts.title})" + (f": {notice}" if notice else ""),
        "question": in_a_line(TASKS, task),
        "figures": figures,
        "sentences": findings(analysis, task),
        "tables": task_tables(analysis, facts),
    }


def _without_patterns(analysis: Analysis) -> list[str]:
    """The cells without attention patterns, and why, a reason each."""
    cells: dict[str, list[str]] = {}
    for cell, reason in analysis.no_patterns.items():
        cells.setdefault(reason, []).append(str(cell))
    return [f"{', '.join(of_reason)} ({reason})" for reason, of_reason in cells.items()]


def _png(path: Path) -> tuple[str, int, int]:
    """A figure as a data URL, and the width and height it was drawn for, in CSS pixels."""
    data = path.read_bytes()
    width, height = (round(size * CSS_DPI / FIGURE_DPI) for size in struct.unpack(">II", data[16:24]))
    return f"data:image/png;base64,{base64.b64encode(data).decode()}", width, height


def _notices(analysis: Analysis) -> list[tuple[str, str]]:
    """Warnings that must not be overlooked: first words, and how they go on."""
    notices = []
    if analysis.results.config.get("preset") == "smoke":
        text = "This run only checks that every step works. Its numbers mean nothing."
        notices.append(("Smoke test.", text))
    for task, why in unavailable_tasks(analysis.results).items():
        notices.append((f"Left out: {task}.", f"Its data were unavailable: {why}"))
    notices += [("Learning rates unknown.", why) for why in analysis.bad_tunings]
    if analysis.joined.differences:
        unlike = "; ".join(analysis.joined.differences)
        notices.append(("Unlike runs in one table.", f"{MIXED} was given, and {unlike}."))
    if len({_device(source) for source in analysis.joined.sources}) > 1:
        text = "Times and memory of different machines are in one mean; ratios are taken within a seed."
        notices.append(("Several machines.", text))
    most = analysis.on_a_device()
    shared = [one for one in most if one > 1]
    if shared and not analysis.one_core_a_cell:
        text = (
            f"{len(shared)} of {len(most)} cells were trained with others on the same device, up to "
            f"{max(shared)} at once. Their times are longer than those of a cell that is alone, "
            "and the memory is that of each process by itself: compare costs with care."
        )
        notices.append(("Shared devices.", text))
    cells, lost = analysis.results.cells, analysis.unfinished()
    if len(lost) == len(cells):
        notices.append(("No cell is done.", "There are no results to compare."))
    elif lost:
        text = f"{in_words(lost)}: they are in no mean, and are named with their reasons under What was run."
        notices.append((f"{len(lost)} of {len(cells)} cells are not done.", text))
    return notices


def _by_folder(analysis: Analysis, read: Callable[[Results], str]) -> str:
    """What the folders say: once where they agree, else each with its folder's name."""
    said = [(read(source), folder_name(source)) for source in analysis.joined.sources]
    if len({text for text, _ in said}) == 1:
        return said[0][0]
    return "; ".join(f"{_plain(text)} ({folder})" for text, folder in said)


def _device(source: Results) -> str:
    return str(source.environment.get("device_name") or source.environment.get("device") or "")


def _commit(source: Results) -> str:
    commit = str(source.environment.get("git_commit") or "")
    return f"{commit} with uncommitted changes" if commit and source.environment.get("git_dirty") else commit


def _facts(analysis: Analysis) -> list[tuple[str, str]]:
    """What was run, by name."""
    total, seeds = len(analysis.results.cells), _seeds(analysis.results)
    settings = as_object(analysis.results.config.get("settings"))
    processor, software = ("cpu", "cores", "threads"), ("python", "torch", "numpy", "cuda", "platform")
    facts = {
        "preset": analysis.results.config.get("preset"),
        "cells": f"{total - len(analysis.unfinished())} of {total} done",
        "models": ", ".join(analysis.names.values()),
        "baseline": _baseline(analysis),
        "seeds": f"{seeds} (n = 1)" if seeds and "," not in seeds else seeds,
        "side by side": _side_by_side(analysis),
        "device": _by_folder(analysis, _device),
        "processor": _by_folder(analysis, lambda source: _joined(source.environment, processor)),
        "software": _by_folder(analysis, lambda source: _joined(source.environment, software)),
        "commit": _by_folder(analysis, _commit),
        "arithmetic": _distinct(analysis, "precision"),
        "memory is that of the": _distinct(analysis, "memory_kind"),
        "started": _by_folder(analysis, lambda source: str(source.config.get("created") or "")),
        "model settings": _settings(settings.get("model")),
        "training settings": _settings(settings.get("training")),
    } | {f"of {task}": _settings(own) for task, own in as_object(settings.get("by_task")).items()}
    lines = [(key, _plain(value)) for key, value in facts.items()]
    if len(sources := analysis.joined.sources) > 1:
        seeds_of = [(folder_name(source), _seeds(source)) for source in sources]
        names = [f"{name} ({f'seeds {seeds}' if seeds else 'no cells'})" for name, seeds in seeds_of]
        lines.insert(1, ("results folders", "; ".join(names)))
    return lines + [(f"task {task.name}", _task_line(task)) for task in analysis.facts.values()]


def _side_by_side(analysis: Analysis) -> str:
    most = max(analysis.on_a_device(), default=1)
    if most > 1 and analysis.one_core_a_cell:
        return f"{most} cells at a time, each with one core of its own"
    return f"up to {most} cells on a device" if most > 1 else "one cell at a time on a device"


def _baseline(analysis: Analysis) -> str:
    """The model that differences are taken to, and why that one where conventional attention was not run."""
    if not analysis.names:
        return ""
    first = BASELINE not in analysis.names and analysis.baseline == default_baseline([*analysis.names])
    why = f" (the first model: {BASELINE} is not among them)" if first else ""
    return f"{analysis.baseline_name}{why}"


def _seeds(results: Results) -> str:
    return ", ".join(map(str, sorted({record.cell.seed for record in results.cells})))


def _distinct(analysis: Analysis, key: str) -> str:
    """What the finished cells say of `key`."""
    values = [str((record.result or {}).get(key) or "") for record in analysis.results.cells]
    return ", ".join(sorted(set(values) - {""}))


def _plain(value: Any) -> str:
    return "not recorded" if value in (None, "") else str(value)


def _joined(values: dict[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {values[key]}" for key in keys if values.get(key) is not None)


def _settings(values: Any) -> str:
    return ", ".join(f"{key} = {_said(value)}" for key, value in as_object(values).items())


def _task_line(facts: TaskFacts) -> str:
    parts = [facts.title]
    if facts.test_size:
        parts.append(f"{facts.test_size:,} test examples")
    if facts.test_predictions and facts.test_predictions != facts.test_size:
        parts.append(f"{facts.test_predictions:,} predictions in them")
    if facts.num_classes:
        parts.append(f"{facts.num_classes} classes")
    majority = facts.majority if facts.metric.more_is_better else None
    for name, level in (("chance", facts.level), ("largest class", majority)):
        if level is not None:
            parts.append(f"{name} {facts.metric.shown(level)}")
    # The task is in the line's name.
    parts += [f"{key} {_said(value)}" for key, value in facts.provenance.items() if key != "task"]
    return "; ".join(parts)


def _said(value: Any) -> str:
    """A JSON value in words: {"a": 1, "b": [2]} is "a 1, b (2)"."""
    if isinstance(value, dict):
        inner = {
            key: (f"({_said(one)})" if isinstance(one, dict) else _said(one)) for key, one in value.items()
        }
        return ", ".join(f"{key} {entry}" for key, entry in inner.items())
    if isinstance(value, list):
        return f"({', '.join(map(_said, value))})"
    return "none" if value is None else str(value)


def _how_to_reproduce(analysis: Analysis) -> dict[str, str]:
    """before, commands, after: a sentence, a block of shell commands, a sentence."""
    sources = analysis.joined.sources
    commands = [str(source.config.get("command") or "python run_experiment.py") for source in sources]
    words = [folder_name(source) for source in sources]
    words += [MIXED] if analysis.joined.differences else []
    if analysis.baseline != default_baseline([*analysis.names]):
        words += ["--baseline", analysis.baseline]
    commands.append(f"python analyze_results.py {' '.join(shlex.quote(single_line(word)) for word in words)}")
    commit = _by_folder(analysis, _commit)
    where = f"At commit {commit}, with" if commit else "With"
    others = "the first makes" if len(sources) == 1 else "each of those before it makes"
    return {
        "before": f"{where} the packages of requirements.txt:",
        "commands": "\n".join(map(single_line, commands)),
        "after": f"The last command remakes this analysis; {others} a new results folder.",
    }
