"""The report of a comparison: what was run, findings in sentences made from the numbers, tables, figures.

    text = report(analysis, figures)        # report.md; `figures`: the FigureNotes by task

How strongly a sentence is worded follows from the numbers: with one seed there is no interval and no
verdict, with too few seeds the smallest p value they can give is named, and only a difference that passes
Holm's correction is called better or worse. Text in, text out: nothing is drawn or written here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from comparison_tables import ACCURACY, BASELINE, NEAR, SIGNIFICANCE, Difference, TaskFacts, by_seed
from seed_statistics import Estimate
from summary_tables import Analysis, tables
from text_tables import code_block, markdown, markdown_table, one_line, short, short_p


@dataclass(frozen=True)
class FigureNote:
    """A figure in figures/, by the stem of its two files, and how to read it."""

    stem: str
    title: str
    caption: str


def report(analysis: Analysis, figures: dict[str, list[FigureNote]]) -> str:
    """report.md. `figures`: by task."""
    parts = ["# Comparison of attention mechanisms", *_notices(analysis), *_what_was_run(analysis)]
    parts += ["## Findings", *_findings(analysis), "## Tables"]
    parts += [markdown_table(table) for table in tables(analysis)] or ["There is nothing to tabulate."]
    parts.append("## Figures")
    for task, drawn in figures.items():
        parts += [f"### {markdown(task)}"]
        for note in drawn:
            image = f"![{markdown(note.title)}](figures/{note.stem}.png)"
            parts += [image, f"**{markdown(note.title)}.** {markdown(note.caption)}"]
    parts += _how_to_reproduce(analysis)
    return "\n\n".join(parts) + "\n"


def _notices(analysis: Analysis) -> list[str]:
    parts = []
    if analysis.results.config.get("preset") == "smoke":
        parts.append(
            "> **Smoke test.** This run only checks that every step works. Its numbers mean nothing."
        )
    for facts in analysis.facts.values():
        if facts.stand_in_for:
            task, wanted = markdown(facts.name), markdown(facts.stand_in_for)
            parts.append(
                f"> **Stand-in data.** {task} stands in for {wanted}, which was not to be had. "
                f"Nothing here is a result on {wanted}."
            )
    if not analysis.results.cells or len(analysis.unfinished()) == len(analysis.results.cells):
        parts.append("> **No cell is done.** There are no results to compare.")
    return parts


def _what_was_run(analysis: Analysis) -> list[str]:
    config, environment = analysis.results.config, analysis.results.environment
    seeds = sorted({record.cell.seed for record in analysis.results.cells})
    total, done = len(analysis.results.cells), len(analysis.results.cells) - len(analysis.unfinished())
    commit = environment.get("git_commit")
    if commit:
        commit = f"{commit}{' with uncommitted changes' if environment.get('git_dirty') else ''}"
    settings = config.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    facts = {
        "preset": config.get("preset"),
        "cells": f"{done} of {total} done",
        "models": ", ".join(analysis.names.values()),
        "seeds": ", ".join(map(str, seeds)) + (" (n = 1)" if len(seeds) == 1 else ""),
        "device": environment.get("device_name") or environment.get("device"),
        "processor": _joined(environment, ("cpu", "cores", "threads")),
        "software": _joined(environment, ("python", "torch", "numpy", "cuda", "platform")),
        "commit": commit,
        "arithmetic": _distinct(analysis, "precision"),
        "memory is that of the": _distinct(analysis, "memory_kind"),
        "started": config.get("created"),
        "model settings": _settings(settings.get("model")),
        "training settings": _settings(settings.get("training")),
    }
    lines = [f"- {key}: {markdown(_plain(value))}" for key, value in facts.items()]
    for task in analysis.facts.values():
        lines.append(f"- task {markdown(task.name)}: {markdown(_task_line(task))}")
    parts = ["## What was run", "\n".join(lines)]
    if analysis.unfinished():
        parts.append(f"**{total - done} of {total} cells are not done** and are in no mean:")
        parts.append(
            "\n".join(
                f"- {markdown(str(record.cell))}: {record.state}"
                + (f" ({markdown(record.reason)})" if record.reason else "")
                for record in analysis.unfinished()
            )
        )
    return parts


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


def _findings(analysis: Analysis) -> list[str]:
    parts = []
    for task, facts in analysis.facts.items():
        notice = analysis.notice(task)
        parts.append(
            f"### {markdown(task)} ({markdown(facts.title)})" + (f": {markdown(notice)}" if notice else "")
        )
        sentences = [
            *_accuracy_findings(analysis, facts),
            *_difference_findings(analysis, task),
            *_cost_findings(analysis, task),
            *_learned_findings(analysis, task),
        ]
        if not any(analysis.mean(task, model, ACCURACY).n for model in analysis.names):
            sentences = ["No cell of this task is done: nothing can be said."]
        parts.append("\n".join(f"- {markdown(sentence)}" for sentence in sentences))
    if analysis.no_patterns:
        reasons = "; ".join(f"{cell} ({reason})" for cell, reason in analysis.no_patterns.items())
        parts.append(f"Without attention patterns: {markdown(reasons)}.")
    return parts or ["No task was planned: nothing can be said."]


def _accuracy_findings(analysis: Analysis, facts: TaskFacts) -> list[str]:
    means = {model: analysis.mean(facts.name, model, ACCURACY) for model in analysis.names}
    means = {model: mean for model, mean in means.items() if mean.n}
    shown = "; ".join(
        f"{analysis.names[model]} {_percent(mean)}"
        for model, mean in sorted(means.items(), key=lambda item: -item[1].mean)
    )
    sentences = [f"Test accuracy, from the highest: {shown}."]
    if facts.test_size and facts.majority is not None:
        error = math.sqrt(facts.majority * (1 - facts.majority) / facts.test_size)
        near = [analysis.names[model] for model in means if means[model].mean <= facts.majority + 2 * error]
        if near:
            sentences.append(
                f"Not told apart from always naming the largest class ({100 * facts.majority:.1f} %; two "
                f"standard errors of the test set are {200 * error:.1f} points): {', '.join(near)}."
            )
    if any(mean.n == 1 for mean in means.values()) and facts.test_size:
        typical = sum(mean.mean for mean in means.values()) / len(means)
        error = math.sqrt(typical * (1 - typical) / facts.test_size)
        sentences.append(
            f"The {facts.test_size:,} test examples alone leave each accuracy a standard error of about "
            f"{100 * error:.1f} points."
        )
    return sentences


def _percent(mean: Estimate) -> str:
    if mean.n < 2:
        return f"{100 * mean.mean:.1f} % (n = {mean.n}, no interval)"
    return (
        f"{100 * mean.mean:.1f} % (n = {mean.n}, 95 % interval {100 * mean.low:.1f} to {100 * mean.high:.1f})"
    )


def _difference_findings(analysis: Analysis, task: str) -> list[str]:
    if BASELINE not in analysis.names:
        return [f"{BASELINE} was not among the models: there is no baseline to compare with."]
    sentences = []
    for row in analysis.differences:
        if row.task != task:
            continue
        name = f"{analysis.names[row.model]} against {analysis.names[BASELINE]}"
        points = f"{100 * row.mean.mean:+.1f} points of test accuracy"
        if row.mean.n == 0:
            sentences.append(f"{name}: no seed finished with both, so there is no comparison.")
        elif row.mean.n == 1:
            sentences.append(
                f"{name}: {points} (n = 1: no interval; one seed cannot tell the mechanism from the luck of "
                "the draw)."
            )
        else:
            sentences.append(f"{name}: {points} on average {_evidence(row)}")
    return sentences


def _evidence(row: Difference) -> str:
    n, _, low, high = row.mean
    numbers = (
        f"(n = {n}, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}, p = {short_p(row.p)}, "
        f"after Holm's correction {short_p(row.p_holm)})"
    )
    if row.verdict == "too few seeds":
        return (
            f"{numbers}. The smallest p value that {n} seeds can give is {short_p(row.smallest_p)}, "
            f"{short_p(row.smallest_p_holm)} after the correction: too few seeds to tell."
        )
    if row.verdict == "not shown":
        return f"{numbers}: a difference is not shown at the {SIGNIFICANCE} level."
    word = {"higher": "better", "lower": "worse"}[row.verdict]
    return f"{numbers}: {word} at the {SIGNIFICANCE} level, for these settings and this data."


def _cost_findings(analysis: Analysis, task: str) -> list[str]:
    """Time, memory and parameters as multiples of the baseline's, from the seeds that both have."""
    sentences = []
    for metric, what in (
        ("seconds_per_epoch", "Time per training epoch"),
        ("peak_memory_bytes", "Peak memory"),
        ("parameters", "Parameters"),
    ):
        base = by_seed(analysis.table, task, BASELINE, metric)
        ratios = []
        for model, name in analysis.names.items():
            values = by_seed(analysis.table, task, model, metric)
            shared = [seed for seed in values if base.get(seed, 0) > 0]
            if model != BASELINE and shared:
                ratio = sum(values[seed] / base[seed] for seed in shared) / len(shared)
                ratios.append(f"{name} {short(ratio)}")
        if ratios:
            mean = " (mean of the seeds' ratios)" if len(base) > 1 and metric != "parameters" else ""
            sentences.append(
                f"{what} as a multiple of {analysis.names[BASELINE]}'s{mean}: {'; '.join(ratios)}."
            )
    if sentences and sentences[-1].startswith("Parameters"):
        sentences[-1] += " A difference in accuracy may also come from a difference in size."
    return sentences


def _learned_findings(analysis: Analysis, task: str) -> list[str]:
    """How far the learned scalars moved between the first epoch and the last."""
    learned = analysis.learned[analysis.learned["task"] == task]
    sentences = []
    for (scalar, model), lines in learned.groupby(["scalar", "model"], sort=False):
        first = lines.groupby(["seed"])["epoch"].transform("min")
        last = lines.groupby(["seed"])["epoch"].transform("max")
        start = lines[lines["epoch"] == first].groupby("timescale")["value"].mean()
        end = lines[lines["epoch"] == last].groupby("timescale")["value"].mean()
        moves = ", ".join(f"{short(start[one])} to {short(end[one])}" for one in start.index)
        what = "horizons in tokens" if scalar == "horizon" else "strength of gravity G"
        sentences.append(
            f"{analysis.names[str(model)]}: {what} from the end of the first epoch to that of the last, mean "
            f"over layers, heads and seeds{', by timescale' if len(start) > 1 else ''}: {moves}."
        )
    return sentences


def _how_to_reproduce(analysis: Analysis) -> list[str]:
    command = one_line(str(analysis.results.config.get("command") or "python run_experiment.py"))
    folder = one_line(analysis.results.root.resolve().name)
    commit = analysis.results.environment.get("git_commit")
    where = f"At commit {markdown(str(commit))}, with" if commit else "With"
    definitions = [
        "Test accuracy is that of the weights of the best validation accuracy; the test set is read once.",
        "Epochs to 90 % of best: the first epoch whose validation accuracy reaches 90 % of its maximum; "
        "above chance: the first with (accuracy - chance) / (maximum - chance) of at least 0.9.",
        "Time per epoch is that of the training steps, without evaluation and without the first step.",
        "Peak memory is the CUDA allocator's on a GPU, the resident set of the process on a CPU.",
        f"Weight within {NEAR} tokens: the share of a query's weight at |i - j| < {NEAR}, in long examples.",
        "Entropy of a row: of a query's weights over the log of the number of tokens, mean over examples, "
        "layers and heads: 1 = even weights, 0 = one token.",
    ]
    return [
        "## Definitions",
        "\n".join(f"- {markdown(line)}" for line in definitions),
        "## How to reproduce",
        f"{where} the packages of requirements.txt:",
        code_block(f"{command}\npython analyze_results.py {folder}", "sh"),
        "The first command makes a new results folder; the second remakes this analysis from this one.",
    ]
