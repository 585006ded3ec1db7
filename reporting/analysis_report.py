"""The report of a comparison as blocks: what was run, findings, tables, figures, how to reproduce it.

    blocks = report(analysis, figures)       # `figures`: the FigureNotes by task
    markdown_report(blocks), html_report(blocks, folder)

Both files are written from these blocks. The findings' sentences are made in report_findings.py. Text in,
blocks out: nothing is drawn or written here.
"""

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from reporting.accuracy_against_cost import TARGET_SHARE
from reporting.comparison_tables import (
    BASELINE,
    NEAR,
    TaskFacts,
    default_baseline,
    done_cells,
    most_on_a_device,
)
from reporting.joined_results import MIXED
from reporting.report_blocks import Block, Bullets, Code, Facts, FigureNote, Heading, Notice, Paragraph
from reporting.report_findings import findings
from reporting.summary_tables import Analysis, tables
from reporting.text_tables import one_line
from results_folder import Results

DEFINITIONS = (
    "Test accuracy is that of the weights of the best validation accuracy; the test set is read once.",
    "Epochs to 90 % of best: the first epoch whose validation accuracy reaches 90 % of its maximum; "
    "above chance: the first with (accuracy - chance) / (maximum - chance) of at least 0.9.",
    "Time per epoch is that of the training steps, without evaluation and without the first step.",
    "FLOPs are those of the matrix products (2 for a multiplication and an addition) of one forward pass by "
    "the dense formula, mean over the test examples; exponentials and divisions are not counted.",
    f"Target accuracy: a validation accuracy {TARGET_SHARE:.0%} of the way from chance to the best of the "
    "baseline (mean over its seeds), one for all models; a run that does not reach it is in no "
    "mean of the time to it.",
    "Interval: 95 % t interval of the mean over seeds. p: exact two-sided sign-flip test, paired by seed; "
    "with n seeds it is 2 / 2^n at the least. McNemar's test compares two trained models on the same test "
    "examples, and says nothing of other seeds.",
    "Peak memory is the CUDA allocator's on a GPU, the resident set of the process on a CPU.",
    f"Weight within {NEAR} tokens: the share of a query's weight at |i - j| < {NEAR}, in long examples.",
    "Entropy of a row: of a query's weights over the log of the number of tokens, mean over examples, "
    "layers and heads: 1 = even weights, 0 = one token.",
)


def report(analysis: Analysis, figures: dict[str, list[FigureNote]]) -> list[Block]:
    """`figures`: by task."""
    blocks: list[Block] = [Heading(1, "Comparison of attention mechanisms"), *_notices(analysis)]
    blocks += [Heading(2, "What was run"), *_what_was_run(analysis)]
    blocks += [Heading(2, "Findings"), *findings(analysis)]
    blocks += [Heading(2, "Tables"), *tables(analysis)]
    if isinstance(blocks[-1], Heading):
        blocks.append(Paragraph("There is nothing to tabulate."))
    blocks.append(Heading(2, "Figures"))
    for task, drawn in figures.items():
        blocks += [Heading(3, task), *drawn]
    blocks += [Heading(2, "Definitions"), Bullets(DEFINITIONS)]
    return [*blocks, Heading(2, "How to reproduce"), *_how_to_reproduce(analysis)]


def _notices(analysis: Analysis) -> list[Block]:
    blocks: list[Block] = []
    if analysis.results.config.get("preset") == "smoke":
        blocks.append(
            Notice("Smoke test.", "This run only checks that every step works. Its numbers mean nothing.")
        )
    for facts in analysis.facts.values():
        if facts.stand_in_for:
            text = (
                f"{facts.name} stands in for {facts.stand_in_for}, which was not to be had. "
                f"Nothing here is a result on {facts.stand_in_for}."
            )
            blocks.append(Notice("Stand-in data.", text))
    if analysis.joined.differences:
        unlike = "; ".join(analysis.joined.differences)
        blocks.append(Notice("Unlike runs in one table.", f"{MIXED} was given, and {unlike}."))
    if len(set(_per_folder(analysis, _device))) > 1:
        text = "Times and memory of different machines are in one mean; ratios are taken within a seed."
        blocks.append(Notice("Several machines.", text))
    on_a_device = [most_on_a_device(record) for record in done_cells(analysis.results)]
    if shared := [most for most in on_a_device if most > 1]:
        text = (
            f"{len(shared)} of {len(on_a_device)} cells were trained with others on the same device, up to "
            f"{max(shared)} at once. Their times are longer than those of a cell that is alone, and "
            "the memory is that of each process by itself: compare costs with care."
        )
        blocks.append(Notice("Shared devices.", text))
    if not analysis.results.cells or len(analysis.unfinished()) == len(analysis.results.cells):
        blocks.append(Notice("No cell is done.", "There are no results to compare."))
    return blocks


def _per_folder(analysis: Analysis, read: Callable[[Results], str]) -> list[str]:
    return [read(source) for source in analysis.joined.sources]


def _by_folder(analysis: Analysis, read: Callable[[Results], str]) -> str:
    """What the folders say: once where they agree, else each with its folder's name."""
    said = _per_folder(analysis, read)
    if len(set(said)) == 1:
        return said[0]
    folders = _per_folder(analysis, lambda source: source.root.resolve().name)
    pairs = zip(said, folders, strict=True)
    return "; ".join(f"{_plain(text)} ({folder})" for text, folder in pairs)


def _device(source: Results) -> str:
    return str(source.environment.get("device_name") or source.environment.get("device") or "")


def _commit(source: Results) -> str:
    commit = str(source.environment.get("git_commit") or "")
    return f"{commit} with uncommitted changes" if commit and source.environment.get("git_dirty") else commit


def _what_was_run(analysis: Analysis) -> list[Block]:
    seeds = sorted({record.cell.seed for record in analysis.results.cells})
    total, lost = len(analysis.results.cells), analysis.unfinished()
    settings = analysis.results.config.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    processor, software = ("cpu", "cores", "threads"), ("python", "torch", "numpy", "cuda", "platform")
    facts = {
        "preset": analysis.results.config.get("preset"),
        "cells": f"{total - len(lost)} of {total} done",
        "models": ", ".join(analysis.names.values()),
        "baseline": _baseline(analysis),
        "seeds": ", ".join(map(str, seeds)) + (" (n = 1)" if len(seeds) == 1 else ""),
        "device": _by_folder(analysis, _device),
        "processor": _by_folder(analysis, lambda source: _joined(source.environment, processor)),
        "software": _by_folder(analysis, lambda source: _joined(source.environment, software)),
        "commit": _by_folder(analysis, _commit),
        "arithmetic": _distinct(analysis, "precision"),
        "memory is that of the": _distinct(analysis, "memory_kind"),
        "started": _by_folder(analysis, lambda source: str(source.config.get("created") or "")),
        "model settings": _settings(settings.get("model")),
        "training settings": _settings(settings.get("training")),
    }
    lines = [(key, _plain(value)) for key, value in facts.items()]
    if len(analysis.joined.sources) > 1:
        names = _per_folder(analysis, lambda source: f"{source.root.resolve().name} {_seeds(source)}")
        lines.insert(1, ("results folders", "; ".join(names)))
    lines += [(f"task {task.name}", _plain(_task_line(task))) for task in analysis.facts.values()]
    blocks: list[Block] = [Facts(lines)]
    if lost:
        blocks.append(Paragraph("and are in no mean:", lead=f"{len(lost)} of {total} cells are not done"))
        reasons = (f" ({record.reason})" if record.reason else "" for record in lost)
        blocks.append(
            Bullets([f"{one.cell}: {one.state}{why}" for one, why in zip(lost, reasons, strict=True)])
        )
    return blocks


def _baseline(analysis: Analysis) -> str:
    """The model that differences are taken to, and why that one where conventional attention was not run."""
    if not analysis.names:
        return ""
    first = BASELINE not in analysis.names and analysis.baseline == default_baseline([*analysis.names])
    why = f" (the first model: {BASELINE} is not among them)" if first else ""
    return f"{analysis.baseline_name}{why}"


def _seeds(source: Results) -> str:
    seeds = sorted({record.cell.seed for record in source.cells})
    return f"(seeds {', '.join(map(str, seeds))})" if seeds else "(no cells)"


def _distinct(analysis: Analysis, key: str) -> str:
    """What the finished cells say of `key`."""
    values = [str((record.result or {}).get(key) or "") for record in analysis.results.cells]
    return ", ".join(sorted(set(values) - {""}))


def _plain(value: Any) -> str:
    return "not recorded" if value in (None, "") else str(value)


def _joined(values: dict[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {values[key]}" for key in keys if values.get(key) is not None)


def _settings(values: Any) -> str:
    if not isinstance(values, dict):
        return ""
    return ", ".join(f"{key} = {_said(value)}" for key, value in values.items())


def _task_line(facts: TaskFacts) -> str:
    parts = [facts.title]
    if facts.test_size:
        parts.append(f"{facts.test_size:,} test examples")
    if facts.num_classes:
        parts.append(f"{facts.num_classes} classes")
    for name, level in (("chance", facts.chance), ("largest class", facts.majority)):
        if level is not None:
            parts.append(f"{name} {100 * level:.1f} %")
    hidden = ("task", "stand_in_for")  # said already
    parts += [f"{key} {_said(value)}" for key, value in facts.provenance.items() if key not in hidden]
    return "; ".join(parts)


def _said(value: Any) -> str:
    """A JSON value in words: {"a": 1, "b": [2]} is "a 1, b (2)"."""
    if isinstance(value, dict):
        inner = (
            (key, f"({_said(entry)})" if isinstance(entry, dict) else _said(entry))
            for key, entry in value.items()
        )
        return ", ".join(f"{key} {entry}" for key, entry in inner)
    if isinstance(value, list):
        return f"({', '.join(map(_said, value))})"
    return "none" if value is None else str(value)


def _how_to_reproduce(analysis: Analysis) -> list[Block]:
    sources = analysis.joined.sources
    commands = [
        one_line(str(source.config.get("command") or "python run_experiment.py")) for source in sources
    ]
    folders = [shlex.quote(one_line(source.root.resolve().name)) for source in sources]
    mixed = [MIXED] if analysis.joined.differences else []
    own = (
        [] if analysis.baseline == default_baseline([*analysis.names]) else ["--baseline", analysis.baseline]
    )
    chosen = [shlex.quote(one_line(word)) for word in own]
    again = " ".join(["python analyze_results.py", *folders, *mixed, *chosen])
    commit = _by_folder(analysis, _commit)
    where = f"At commit {commit}, with" if commit else "With"
    made = (
        "The last command remakes this analysis; the first makes"
        if len(commands) == 1
        else ("The last command remakes this analysis; each of those before it makes")
    )
    return [
        Paragraph(f"{where} the packages of requirements.txt:"),
        Code("\n".join([*commands, again])),
        Paragraph(f"{made} a new results folder."),
    ]
