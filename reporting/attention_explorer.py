"""The explorer of attention: a page on which a reader asks where each token looks, and who looks at it.

    page = explorer_page("Gravitational on listops, seed 0", patterns, names, titles)
    data = explorer_data(patterns, names, facts)        # patterns by cell, names by model, facts by task

A page that includes templates/explorer.section.html.jinja needs `explorer` in its context: these data. They
hold one seed of each task, since only models of one seed show the same examples, and as many examples and
tokens as LARGEST allows; what was left out is said.

A weight is a byte, w = (byte / 255)^2: a square root scale keeps small weights apart. A mass, relative to the
mean of its example, is m = 2^((byte - 128) / 32). Arrays are deflated and in base64, examples first. Symbols:
see results_folder.AttentionPatterns.
"""

import base64
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from reporting.run_results import TaskFacts
from reporting.text_tables import single_line
from results_folder import AttentionPatterns, Cell

TEMPLATES = Path(__file__).resolve().parent / "templates"
LARGEST = 500_000  # letters in a page, of all tasks
SIZES = ((4, 64), (2, 64), (1, 64), (1, 48), (1, 32), (1, 16))  # examples, tokens: the first that fits
LONGEST_SYMBOL = 20


def explorer_data(
    patterns: Mapping[Cell, AttentionPatterns],
    names: Mapping[str, str],
    facts: Mapping[str, TaskFacts],
    largest: int = LARGEST,
) -> dict[str, Any] | None:
    """`tasks`, as explorer.js.jinja reads them, and what is left_out of each, a line a task; None where there
    are no patterns. names: by model, in the order shown. facts: by task."""
    tasks = dict.fromkeys(cell.task for cell in patterns)
    entries, left_out = [], []
    for task in tasks:
        mine = {cell: one for cell, one in patterns.items() if cell.task == task}
        entry, lacks = _task(facts[task], mine, names, largest // len(tasks))
        if entry["models"]:
            entries.append(entry)
        if lacks:
            left_out.append(f"{entry['title']}: {'; '.join(lacks)}")
    return {"tasks": entries, "left_out": left_out} if tasks else None


def _task(
    task: TaskFacts, patterns: Mapping[Cell, AttentionPatterns], names: Mapping[str, str], largest: int
) -> tuple[dict[str, Any], list[str]]:
    """What is shown of a task, as much as fits into `largest` letters, and what is not."""
    seed, by_model = of_one_seed(patterns, names)
    first = next(iter(by_model.values()))
    all_examples, all_tokens = first.tokens.shape
    for most_examples, most_tokens in SIZES:
        examples, tokens = min(all_examples, most_examples), min(all_tokens, most_tokens)
        models = [_model(names[name], one, examples, tokens) for name, one in by_model.items()]
        letters = np.cumsum([len(model["weights"] + model["masses"]) for model in models])
        if letters[-1] <= largest:
            break
    fitting = int((letters <= largest).sum())
    seeds = len({cell.seed for cell in patterns})
    lacking = {cell.model for cell in patterns} - set(by_model)
    other = [name for model, name in names.items() if model in lacking]
    facts = {
        f"{seeds - 1} of {seeds} seeds (seed {seed} is shown)": seeds > 1,
        f"{all_examples - examples} of {all_examples} examples": examples < all_examples,
        f"the tokens after the first {tokens}": tokens < all_tokens,
        f"{', '.join(other)} (no patterns of these examples with seed {seed})": other,
        f"{', '.join(model['name'] for model in models[fitting:])} (too large)": fitting < len(models),
    }
    entry = {
        "title": single_line(task.title),
        "classes": [single_line(name) or "blank" for name in task.class_names],
        "tokens": tokens,
        "examples": [_example(first, number, tokens) for number in range(examples)],
        "models": models[:fitting],
    }
    return entry, [fact for fact, holds in facts.items() if holds]


def of_one_seed(
    patterns: Mapping[Cell, AttentionPatterns], names: Iterable[str]
) -> tuple[int, dict[str, AttentionPatterns]]:
    """The seed that most models have, the first of several, and by model its patterns, where the examples are
    those of the first."""
    seed, _ = Counter(cell.seed for cell in patterns).most_common(1)[0]
    of_seed = {cell.model: one for cell, one in patterns.items() if cell.seed == seed}
    in_order = {name: of_seed[name] for name in names if name in of_seed}
    first = next(iter(in_order.values()))
    return seed, {name: one for name, one in in_order.items() if _same_examples(one, first)}


def _same_examples(one: AttentionPatterns, other: AttentionPatterns) -> bool:
    pairs = (one.symbols, other.symbols), (one.lengths, other.lengths), (one.labels, other.labels)
    return all(np.array_equal(mine, theirs) for mine, theirs in pairs)


def _example(patterns: AttentionPatterns, number: int, tokens: int) -> dict[str, Any]:
    length = int(patterns.lengths[number])
    symbols = [single_line(str(symbol)) or "blank" for symbol in patterns.symbols[number, :length][:tokens]]
    cut = [one if len(one) <= LONGEST_SYMBOL else f"{one[: LONGEST_SYMBOL - 1]}…" for one in symbols]
    return {"symbols": cut, "length": length, "label": int(patterns.labels[number])}


def _model(name: str, patterns: AttentionPatterns, examples: int, tokens: int) -> dict[str, Any]:
    layers, _, timescales, heads = patterns.maps.shape[:4]
    maps = patterns.maps[:, :examples, ..., :tokens, :tokens].astype(np.float32)
    weights = np.rint(255 * np.sqrt(np.clip(maps, 0, 1)))
    return {
        "name": single_line(name),
        "layers": layers,
        "timescales": timescales,
        "heads": heads,
        "predictions": patterns.predictions[:examples].tolist(),
        "reach": _reach(patterns),
        "weights": _packed(weights),
        "masses": _packed(_mass_bytes(patterns, examples, tokens)) if patterns.key_mass is not None else "",
    }


def _mass_bytes(patterns: AttentionPatterns, examples: int, tokens: int) -> np.ndarray:
    """(layers, K, T, H, M) of the key masses; the mean is over all tokens of an example, shown or not."""
    assert patterns.key_mass is not None
    mass = patterns.key_mass[:, :examples].astype(np.float64)
    lengths = patterns.lengths[:examples]
    true = np.arange(mass.shape[-1]) < lengths[:, None]
    mean = np.where(true[:, None, None], mass, 0).sum(-1) / lengths[:, None, None]
    relative = mass / np.maximum(mean, 1e-30)[..., None]
    return np.clip(np.rint(128 + 32 * np.log2(np.maximum(relative[..., :tokens], 1e-30))), 0, 255)


def _reach(patterns: AttentionPatterns) -> list[list[list[float]]]:
    """(layers, T, H): the distance below which half of a query's weight lies in long examples."""
    half = np.cumsum(patterns.distance_share, -1) >= 0.5 * patterns.distance_share.sum(-1, keepdims=True)
    reach: list[list[list[float]]] = patterns.distance_edges[1:][half.argmax(-1)].tolist()
    return reach


def _packed(values: np.ndarray) -> str:
    """(layers, K, ...) of whole numbers 0 to 255, with the examples before the layers."""
    return base64.b64encode(zlib.compress(values.swapaxes(0, 1).astype(np.uint8).tobytes(), 9)).decode()


def explorer_page(
    title: str,
    patterns: Mapping[Cell, AttentionPatterns],
    names: Mapping[str, str],
    facts: Mapping[str, TaskFacts],
) -> str:
    """The explorer as a page of its own."""
    context = {"title": single_line(title), "explorer": explorer_data(patterns, names, facts)}
    return template_environment().get_template("explorer.html.jinja").render(context)


def template_environment() -> jinja2.Environment:
    """Of the templates beside this file; what a page of HTML is filled with is escaped."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
