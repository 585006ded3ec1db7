"""The findings of a comparison: sentences made from its numbers.

    for sentence in findings(analysis, "listops"):
        print(sentence)

How strongly a sentence is worded follows from the numbers: with one seed there is no interval, with less than
three no verdict, and only a difference that passes Holm's correction is called better or worse. Of another
it is said what its interval allows, and how many seeds would tell.
"""

import math
from statistics import fmean

from reporting.analysis import Analysis
from reporting.comparison_tables import LEARNED_WORDS, TIMED_METRICS
from reporting.lra_literature import comparable
from reporting.metrics import Metric
from reporting.run_results import BASELINE, TaskFacts
from reporting.seed_statistics import Estimate
from reporting.text_tables import p_is, short
from reporting.verdicts import LEAST_SEEDS, SIGNIFICANCE, Difference


def findings(analysis: Analysis, task: str) -> list[str]:
    """What a task's numbers say, a sentence or a few each."""
    if not any(analysis.quality(task, model).n for model in analysis.names):
        return ["No cell of this task is done: nothing can be said."]
    return [
        *_quality_findings(analysis, analysis.facts[task]),
        *_published_findings(analysis, task),
        *_difference_findings(analysis, task),
        *_cost_findings(analysis, task),
        *_speed_findings(analysis, task),
        *_length_findings(analysis, task),
        *_tuning_findings(analysis, task),
        *_learned_findings(analysis, task),
    ]


def _quality_findings(analysis: Analysis, facts: TaskFacts) -> list[str]:
    metric = facts.metric
    means = {name: analysis.quality(facts.name, model) for model, name in analysis.names.items()}
    found = sorted(
        ((name, mean) for name, mean in means.items() if mean.n), key=lambda one: -metric.gain(one[1].mean)
    )
    shown = "; ".join(f"{name} {_shown(metric, mean)}" for name, mean in found)
    first = "highest" if metric.more_is_better else "lowest, which is the best"
    sentences = [f"Test {metric.title}, from the {first}: {shown}."]
    if not metric.more_is_better:
        return sentences
    count = facts.test_predictions or facts.test_size
    if (near := guessing(analysis, facts.name)) and facts.majority is not None:
        names = ", ".join(analysis.names[model] for model in near)
        sentences.append(
            f"Not told apart from always naming the largest class ({100 * facts.majority:.1f} %; two "
            f"standard errors of the test set are {200 * _majority_error(facts):.1f} points): {names}."
        )
    if any(mean.n == 1 for _, mean in found) and count:
        typical = fmean(mean.mean for _, mean in found)
        error = math.sqrt(typical * (1 - typical) / count)
        # Predictions in one example are no independent draws.
        what, bound = ("examples", "about") if count == facts.test_size else ("predictions", "at least")
        sentences.append(
            f"The {count:,} test {what} alone leave each accuracy a standard error of {bound} "
            f"{100 * error:.1f} points."
        )
    return sentences


def guessing(analysis: Analysis, task: str) -> list[str]:
    """The models whose accuracy is within two standard errors of always naming the largest class."""
    facts = analysis.facts[task]
    if not facts.metric.more_is_better or facts.majority is None or not facts.test_size:
        return []
    level = facts.majority + 2 * _majority_error(facts)
    means = {model: analysis.quality(task, model) for model in analysis.names}
    return [model for model, mean in means.items() if mean.n and mean.mean <= level]


def _majority_error(facts: TaskFacts) -> float:
    """The standard error of the largest class's share on the test set; 0 where one of both is not known."""
    share, count = facts.majority or 0.0, facts.test_predictions or facts.test_size
    return math.sqrt(share * (1 - share) / count) if count else 0.0


def _shown(metric: Metric, mean: Estimate) -> str:
    if mean.n < 2:
        return f"{metric.shown(mean.mean)} (n = {mean.n}, no interval)"
    low, high = (f"{metric.scale * end:.{metric.digits}f}" for end in (mean.low, mean.high))
    return f"{metric.shown(mean.mean)} (n = {mean.n}, 95 % interval {low} to {high})"


def _difference_findings(analysis: Analysis, task: str) -> list[str]:
    sentences = []
    for row in analysis.differences:
        if row.task != task:
            continue
        name = f"{analysis.names[row.model]} against {analysis.baseline_name}"
        points = f"{row.metric.difference(row.mean.mean)} {row.metric.step} of test {row.metric.title}"
        if row.mean.n == 0:
            said = "no seed finished with both, so there is no comparison."
        elif row.mean.n == 1:
            luck = "one seed cannot tell the mechanism from the luck of the draw"
            said = f"{points} (n = 1: no interval; {luck})."
        else:
            said = f"{points} on average {_evidence(row)}"
        sentences.append(f"{name}: {said}")
    return sentences


def _evidence(row: Difference) -> str:
    n, _, low, high = row.mean
    metric = row.metric
    numbers = (
        f"(n = {n}, 95 % interval {metric.difference(low)} to {metric.difference(high)}, d_z = "
        f"{short(row.dz)}; paired t test {p_is(row.p_t)}, sign flips {p_is(row.p_sign_flip)}"
    )
    if row.shares is not None:
        numbers += f"; seeds that learned: {row.shares}, Fisher's exact {p_is(row.p_shares)}"
    numbers += f"; after Holm's correction {p_is(row.p_holm)})" if n >= LEAST_SEEDS else ")"
    if row.verdict == "too few seeds":
        return f"{numbers}: too few seeds to tell; {LEAST_SEEDS} are the least for a verdict."
    if row.decided:
        by_shares = "by the share of seeds that learn, " if row.shares is not None else ""
        level = f"at the {SIGNIFICANCE} level, for these settings and this data."
        alone = row.shares is None and row.p_sign_flip > SIGNIFICANCE
        caveat = f" Sign flips, which assume nothing, do not show it with {n} seeds." if alone else ""
        return f"{numbers}: {by_shares}{row.verdict} {level}{caveat}"
    if row.verdict == "no relevant difference":
        return f"{numbers}: no difference of more than {metric.margin}."
    if row.shares is not None:
        return f"{numbers}: a difference in the share of seeds that learn is not shown."
    ends = [
        f"a {word} of {abs(end):.{metric.digits}f}"
        for word, end in (("gain", max(row.gain.high, 0.0)), ("loss", min(row.gain.low, 0.0)))
        if end
    ]
    return (
        f"{numbers}: not told apart. The interval allows {' and '.join(ends)} {metric.step}; a difference of "
        f"{metric.margin} would need about {row.pairs_needed:,} seeds at this spread."
    )


def _published_findings(analysis: Analysis, task: str) -> list[str]:
    """Whether softmax attention is where published softmax attention is: the check of the whole pipeline."""
    transformers = [one for one in comparable(analysis.results, task) if one.name.startswith("Transformer")]
    mean = analysis.quality(task, BASELINE)
    if not transformers or not mean.n:
        return []
    low, high = (100 * pick(one.accuracy for one in transformers) for pick in (min, max))
    return [
        f"Published Transformers of the Long Range Arena reach {low:.1f} to {high:.1f} % on this task; "
        f"{analysis.names[BASELINE]} here {_shown(analysis.metric(task), mean)}."
    ]


def _cost_findings(analysis: Analysis, task: str) -> list[str]:
    """Time, memory and parameters as multiples of the baseline's, from the seeds that both have."""
    sentences = []
    for metric, what in (
        ("seconds_per_epoch", "Time per training epoch"),
        ("peak_memory_bytes", "Peak memory"),
        ("parameters", "Parameters"),
        ("forward_flops", "Matrix products of a forward pass"),
    ):
        multiples = {name: analysis.multiple(task, model, metric) for model, name in analysis.others.items()}
        ratios = [f"{name} {short(value)}" for name, value in multiples.items() if not math.isnan(value)]
        if ratios:
            timed, of = metric in TIMED_METRICS, f"{analysis.baseline_name}'s"
            if timed and analysis.mean(task, analysis.baseline, metric).n > 1:
                of += " (mean of the seeds' ratios)"
            if timed and (sharing := analysis.sharing(task)):
                of += f" ({sharing})"
            sentences.append(f"{what} as a multiple of {of}: {'; '.join(ratios)}.")
            if metric == "parameters":
                sentences[-1] += " A difference in quality may also come from a difference in size."
    return sentences


def _speed_findings(analysis: Analysis, task: str) -> list[str]:
    """What the target took each model, who never reached it, and who was told apart from the baseline."""
    speeds = [speed for speed in analysis.speeds if speed.task == task]
    if not speeds:
        return []
    parts, verdicts = [], []
    for speed in speeds:
        name = analysis.names[speed.model]
        some = f" ({speed.reached} of {speed.n} seeds)" if speed.reached < speed.n else ""
        if speed.reached:
            parts.append(f"{name} {speed.shown_median} {speed.unit}{some}")
        else:
            parts.append(f"{name} never in {short(speed.budget)} {speed.unit}")
        if speed.p_holm <= SIGNIFICANCE:
            word = "sooner" if speed.wins > speed.losses else "later"
            verdicts.append(
                f"{name} is there {word} than {analysis.baseline_name} in "
                f"{max(speed.wins, speed.losses)} of {speed.wins + speed.losses + speed.ties} pairs (sign "
                f"test, after Holm's correction {p_is(speed.p_holm)})."
            )
    metric = analysis.metric(task)
    target = f"a validation {metric.title} of {metric.shown(analysis.targets[task])}"
    return [f"To {target}, median over seeds: {'; '.join(parts)}.", *verdicts]


def _length_findings(analysis: Analysis, task: str) -> list[str]:
    """Quality at the longest examples beside that at the trained length."""
    lengths = analysis.lengths.get(task, [])
    if len(lengths) < 2:
        return []
    metric, parts = analysis.metric(task), []
    for model, name in analysis.names.items():
        ends = [analysis.mean(task, model, metric.at_length(length)) for length in (lengths[0], lengths[-1])]
        if all(mean.n for mean in ends):
            parts.append(f"{name} {' to '.join(metric.shown(mean.mean) for mean in ends)}")
    return [f"From {lengths[0]:,} tokens, the length trained on, to {lengths[-1]:,}: {'; '.join(parts)}."]


def _tuning_findings(analysis: Analysis, task: str) -> list[str]:
    """Whose best learning rate lies at an end of the grid."""
    ends = [
        f"{analysis.names[model]} {tuning.chosen:g}"
        for (of, model), tuning in analysis.tunings.items()
        if of == task and tuning.at_an_end
    ]
    warning = "The best learning rate lies at an end of the grid, so that one beyond it may be better still"
    return [f"{warning}: {'; '.join(ends)}."] if ends else []


def _learned_findings(analysis: Analysis, task: str) -> list[str]:
    """How far the learned scalars moved between the first epoch and the last."""
    learned = analysis.learned[analysis.learned["task"] == task]
    sentences = []
    for (scalar, model), lines in learned.groupby(["scalar", "model"], sort=False):
        epochs = lines.groupby("seed")["epoch"]
        start, end = (
            lines[lines["epoch"] == epochs.transform(which)].groupby("timescale")["value"].mean()
            for which in ("min", "max")
        )
        moves = ", ".join(f"{short(start[one])} to {short(end[one])}" for one in start.index)
        what = LEARNED_WORDS[str(scalar)]
        sentences.append(
            f"{analysis.names[str(model)]}: {what} from the end of the first epoch to that of the last, mean "
            f"over layers, heads and seeds{', by timescale' if len(start) > 1 else ''}: {moves}."
        )
    return sentences
