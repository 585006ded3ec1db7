"""The tasks: what is read or made, how it is split and turned into tokens, and the batches of it.

    task = load_task("listops", DataSettings(train_size=6000, min_length=10, max_length=80))
    for batch in training_batches(task.train, 32, seed=0, epoch=1):
        logits = model(batch.tokens, batch.key_padding_mask)   # (N, L), (N, L) True = pad

| task | examples | tokens |
|---|---|---|
| imdb | 22,500 / 2,500 / 25,000 film reviews (tasks/imdb.py), 2 classes | bytes or words |
| listops | 96,000 / 2,000 / 2,000 expressions (tasks/listops.py), 10 classes | 15 symbols |
| pathfinder | 40,000 / 4,000 / 4,000 pictures (tasks/pathfinder.py), 2 classes | 1,024 pixels |
| image | 45,000 / 5,000 / 10,000 pictures (tasks/cifar_images.py), 10 classes | 1,024 pixels |
| bytes | windows of the same reviews, drawn anew each epoch; the next byte, 256 classes | bytes |
| recall, hold, latest, nearest, lookup | drawn anew each epoch (tasks/generated_tasks.py) | ids |

The validation split of IMDb and CIFAR-10 is a stratified tenth of the training set, drawn by --data-seed
before any subset is taken; the test set is never used for it. Identical reviews stay on one side of it.
bytes and the generated tasks have a target at tokens, and tests at lengths beyond the trained one.
A new task is a function from DataSettings to TaskData in TASKS.
"""

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from command_line import (
    EXIT_DONE,
    InputError,
    Parser,
    add_settings,
    choose,
    exit_code,
    given_settings,
    option_name,
)
from tasks import cifar_images, imdb, listops, listops_tsv, pathfinder
from tasks.archives import DataUnavailableError, download_archive, holds_data
from tasks.byte_windows import bytes_task
from tasks.generated_tasks import GENERATED, load_generated
from tasks.task_data import DataSettings, TaskData
from tasks.text_tokenizers import BYTE_SYMBOLS, PIXEL_SYMBOLS, cached_words, encode_bytes, make_vocabulary
from tasks.token_dataset import (
    IGNORED,
    Batch,
    TokenDataset,
    concatenate,
    count_identical,
    evaluation_batches,
    stratified_choice,
    training_batches,
)

__all__ = [
    "MEANINGLESS",
    "TASKS",
    "Batch",
    "DataSettings",
    "DataUnavailableError",
    "TaskData",
    "TokenDataset",
    "evaluation_batches",
    "load_task",
    "training_batches",
]

TEXT_LENGTH = 4096
LISTOPS_SIZES = {"train": 96_000, "val": 2_000, "test": 2_000}
PATHFINDER_SIZES = {"train": 40_000, "val": 4_000, "test": 4_000}
NO_WORDS = ("min_length", "tokenizer", "word_vocabulary")
MEANINGLESS = {  # settings that a task has no use for
    "imdb": ("min_length",),
    "pathfinder": ("min_length", "max_length"),
    "image": ("min_length", "max_length"),
    "bytes": NO_WORDS,
    **dict.fromkeys(GENERATED, NO_WORDS),
}
CLASS_NAMES = ("negative", "positive")
Positions = dict[str, NDArray[np.int64]]  # of each split

PROG = "data_pipeline.py"
EXAMPLES = """examples:
  python data_pipeline.py listops --output-dir listops_data
  python data_pipeline.py listops --output-dir short --train 6000 --min-length 10 --max-length 80
  python data_pipeline.py imdb --data-dir downloads
  python data_pipeline.py stats --task imdb --data-dir downloads --tokenizer word"""
LISTOPS_HELP = {
    "min_length": "expressions are longer than this",
    "max_length": "expressions are shorter than this",
    "max_depth": "depth of the deepest digit, the whole expression being 1",
    "max_args": "most arguments of an operator",
}
PERCENTILES = (1, 10, 50, 90, 99)
SHOWN_TOKENS = 200
SHOWN_CLASSES = 32


def load_imdb(settings: DataSettings) -> TaskData:
    """Film reviews of IMDb, 0 negative, 1 positive. Raises DataUnavailableError where they cannot be had."""
    reviews, texts, chosen = _split_reviews(settings)
    length = settings.max_length or TEXT_LENGTH
    if settings.tokenizer == "byte":
        symbols = BYTE_SYMBOLS
        splits = _encoded({split: texts.take(index, length) for split, index in chosen.items()})
    else:
        counted, lexicon = cached_words(texts, settings.cache_folder, reviews.sha256)
        cut = {split: counted.take(index, length) for split, index in chosen.items()}
        symbols, table = make_vocabulary(cut["train"], lexicon, settings.word_vocabulary)
        splits = {split: replace(part, tokens=table[part.tokens]) for split, part in cut.items()}
    about = {
        "source": reviews.source,
        "sha256": reviews.sha256,
        "official_archive": reviews.official,
        "tokenizer": settings.tokenizer,
        "cut_at_tokens": length,
        "identical": count_identical({split: texts.take(index) for split, index in chosen.items()}),
    }
    title = f"IMDb, {settings.tokenizer}s" + (" (LRA Text)" if settings.tokenizer == "byte" else "")
    return _task("imdb", title, CLASS_NAMES, splits, symbols, settings, about)


def load_bytes(settings: DataSettings) -> TaskData:
    """The next byte of the same reviews. Raises DataUnavailableError where they cannot be had."""
    whole = replace(settings, train_size=None, val_size=None, test_size=None)
    reviews, texts, chosen = _split_reviews(whole)
    found = {split: [texts.example(i).tobytes() for i in positions] for split, positions in chosen.items()}
    about = {
        "source": reviews.source,
        "sha256_of_reviews": reviews.sha256,
        "official_archive": reviews.official,
    }
    return bytes_task(found, settings, about)


def _split_reviews(settings: DataSettings) -> tuple[imdb.Reviews, TokenDataset, Positions]:
    """IMDb's reviews, all of them as bytes, and the positions of each split among these."""
    reviews = imdb.load_reviews(settings.data_folder, settings.cache_folder)
    validation, rest = imdb.separate_copies(reviews.train, _validation(reviews.train, settings))
    texts = concatenate([reviews.train, reviews.test])
    return reviews, texts, _chosen(texts, rest, validation, settings)


def _validation(train: TokenDataset, settings: DataSettings) -> NDArray[np.int64]:
    """Positions of a stratified tenth of a training set."""
    return stratified_choice(train.labels, round(len(train) / 10), settings.data_seed, "validation")


def _chosen(
    examples: TokenDataset, train: NDArray[np.int64], val: NDArray[np.int64], settings: DataSettings
) -> Positions:
    """Positions of each split's subset: among the training examples and, behind them, the test set."""
    test = np.arange(len(train) + len(val), len(examples))
    pools = {"train": train, "val": val, "test": test}
    return {split: _subset(examples, pool, split, settings) for split, pool in pools.items()}


def _subset(
    examples: TokenDataset, pool: NDArray[np.int64], split: str, settings: DataSettings
) -> NDArray[np.int64]:
    """All positions of a pool, or a stratified choice of as many as --{split}-size says."""
    size = settings.given_sizes[split]
    if size is None:
        return pool
    if size > len(pool):
        raise InputError(f"--{split}-size {size} is more than the {len(pool)} examples there are")
    return pool[stratified_choice(examples.labels[pool], size, settings.data_seed, "subset", split)]


def _encoded(splits: dict[str, TokenDataset]) -> dict[str, TokenDataset]:
    """Of bytes or grey values their token ids."""
    return {split: replace(part, tokens=encode_bytes(part.tokens)) for split, part in splits.items()}


def load_listops(settings: DataSettings) -> TaskData:
    """Nested list operations and their value 0 to 9: LRA's files in --data-dir, or made here.

    Of files, the expressions of a length between --min-length and --max-length are kept."""
    defaults = listops.ListOpsSettings()
    lengths = listops.ListOpsSettings(
        min_length=defaults.min_length if settings.min_length is None else settings.min_length,
        max_length=settings.max_length or defaults.max_length,
    )
    files = _listops_files(settings.data_folder) if settings.data_folder else None
    if files:
        source = {"source": ", ".join(path.name for path in files.values())}
        splits = {}
        for split, path in files.items():
            read = listops_tsv.read_tsv(path)
            fitting = np.flatnonzero(lengths.fits(read.lengths))
            if not len(fitting):
                raise InputError(
                    f"{path} has no expression of more than {lengths.min_length} and less than "
                    f"{lengths.max_length} tokens; change --min-length and --max-length, or --data-dir"
                )
            splits[split] = read.take(_subset(read, fitting, split, settings))
    else:
        source = {"source": "listops.py"}
        splits = listops.generate_splits(lengths, settings.sizes(LISTOPS_SIZES), settings.data_seed)
    identical = count_identical(splits)
    for which, count in identical.items():
        if count:
            print(f"listops: {count} of the expressions of {which} too", file=sys.stderr)
    about: dict[str, Any] = source | {
        "identical": identical,
        "sha256": _sha256(*splits.values()),
        "tokenizer": "listops symbols",
        "longer_than": lengths.min_length,
        "shorter_than": lengths.max_length,
    }
    ours = f"ListOps, {lengths.min_length + 1} to {lengths.max_length - 1} tokens"
    title = "ListOps (LRA)" if lengths == defaults else ours
    return _task("listops", title, tuple("0123456789"), splits, listops.SYMBOLS, settings, about)


def _listops_files(folder: Path) -> dict[str, Path] | None:
    """LRA's files in a folder; None where it is there for another task, which is said. InputError where it
    holds neither: other data are never taken in silence."""
    files = listops_tsv.find_files(folder)
    if files is None:
        lacks = f"--data-dir {folder} holds no basic_train.tsv of ListOps"
        if not folder.is_dir() or not (imdb.find_source(folder) or holds_data(folder)):
            raise InputError(f"{lacks}; give the folder that does, or leave it out to have expressions made")
        print(f"{lacks}: its expressions are made here", file=sys.stderr)
    return files


def load_pathfinder(settings: DataSettings) -> TaskData:
    """Pictures made here: are two marked ends joined by a dashed path, 1, or not, 0."""
    sizes = settings.sizes(PATHFINDER_SIZES)
    splits = pathfinder.cached_splits(settings.cache_folder, sizes, settings.data_seed)
    about = {"source": "pathfinder.py", "sha256": _sha256(*splits.values()), "tokenizer": "grey pixels"}
    title, names = "Pathfinder, 32 x 32 pixels", pathfinder.CLASS_NAMES
    return _task("pathfinder", title, names, _encoded(splits), PIXEL_SYMBOLS, settings, about)


def load_image(settings: DataSettings) -> TaskData:
    """CIFAR-10 in grey. Raises DataUnavailableError where it cannot be had."""
    images = cifar_images.load_images(settings.data_folder, settings.cache_folder)
    validation = _validation(images.train, settings)
    rest = np.setdiff1d(np.arange(len(images.train)), validation)
    examples = concatenate([images.train, images.test])
    chosen = _chosen(examples, rest, validation, settings)
    splits = {split: examples.take(index) for split, index in chosen.items()}
    about = {
        "source": images.source,
        "sha256": images.sha256,
        "tokenizer": "grey pixels",
        "identical": count_identical(splits),
    }
    title, names = "CIFAR-10 in grey (LRA Image)", cifar_images.CLASS_NAMES
    return _task("image", title, names, _encoded(splits), PIXEL_SYMBOLS, settings, about)


def _sha256(*splits: TokenDataset) -> str:
    """Of tokens, lengths and labels, in little-endian order."""
    digest = hashlib.sha256()
    for split in splits:
        for array in (split.tokens, split.offsets, split.labels):
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def _task(
    name: str,
    title: str,
    class_names: tuple[str, ...],
    splits: dict[str, TokenDataset],
    symbols: tuple[str, ...],
    settings: DataSettings,
    about: dict[str, Any],
) -> TaskData:
    provenance = {
        "task": name,
        **about,
        "vocab_size": len(symbols),
        "data_seed": settings.data_seed,
        "sizes": {split: len(part) for split, part in splits.items()},
        "lengths": {
            split: {
                "mean": round(float(part.lengths.mean()), 1),
                "median": float(np.median(part.lengths)),
                "longest": int(part.lengths.max()),
            }
            for split, part in splits.items()
        },
    }
    return TaskData(
        name=name,
        title=title,
        vocab_size=len(symbols),
        num_classes=len(class_names),
        class_names=class_names,
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        symbols=symbols.__getitem__,
        provenance=provenance,
    )


def _loader(generated: str) -> Callable[[DataSettings], TaskData]:
    """Of a generated task, with what it asks for as its docstring."""
    load = partial(load_generated, generated)
    load.__doc__ = GENERATED[generated].summary
    return load


TASKS: dict[str, Callable[[DataSettings], TaskData]] = {
    "imdb": load_imdb,
    "listops": load_listops,
    "pathfinder": load_pathfinder,
    "image": load_image,
    "bytes": load_bytes,
    **{name: _loader(name) for name in GENERATED},
}


def load_task(name: str, settings: DataSettings) -> TaskData:
    """A task's data. Raises InputError for an unknown task, a setting that means nothing to it or data that
    cannot be used, and its subclass DataUnavailableError where an archive is not to be had."""
    for setting in MEANINGLESS.get(name, ()):
        if getattr(settings, setting) != getattr(DataSettings(), setting):
            raise InputError(f"{option_name(setting)} means nothing to {name}; leave it out")
    return TASKS[choose(name, TASKS, "task")](settings)


def make_parser() -> Parser:
    intro = (__doc__ or "").split("\n\n")[0]
    parser = Parser(prog=PROG, description=intro, epilog=EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="listops|imdb|stats")
    text = "make ListOps and write it as the Long Range Arena's basic_{train,val,test}.tsv"
    made = commands.add_parser("listops", help=text, description=text, epilog=EXAMPLES)
    made.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="where the files go")
    for name, size in LISTOPS_SIZES.items():
        made.add_argument(f"--{name}", type=int, default=size, help=f"expressions (default: {size})")
    made.add_argument("--seed", type=int, default=0, help="(default: 0)")
    for field in dataclasses.fields(listops.ListOpsSettings):
        help_text = f"{LISTOPS_HELP[field.name]} (default: {field.default})"
        made.add_argument(option_name(field.name), type=int, default=field.default, help=help_text)
    text = "fetch and verify IMDb: what the folder has is checked, what it has not is downloaded into it"
    fetch = commands.add_parser("imdb", help=text, description=text, epilog=EXAMPLES)
    fetch.add_argument("--data-dir", type=Path, required=True, metavar="DIR", help="the folder")
    text = "print a task's sizes, lengths, label shares and an example"
    stats = commands.add_parser("stats", help=text, description=text, epilog=EXAMPLES)
    stats.add_argument("--task", required=True, metavar="|".join(TASKS))
    add_settings(stats, DataSettings)
    return parser


def write_listops(arguments: argparse.Namespace) -> int:
    sizes = {name: getattr(arguments, name) for name in LISTOPS_SIZES}
    for name, value in (sizes | {"seed": arguments.seed}).items():
        least = 0 if name == "seed" else 1
        if value < least:
            raise InputError(f"--{name} must be at least {least}, got {value}")
    settings = listops.ListOpsSettings(**given_settings(arguments, listops.ListOpsSettings))
    listops_tsv.check_writable(arguments.output_dir)
    splits = listops.generate_splits(settings, sizes, arguments.seed)
    paths = listops_tsv.write_files(arguments.output_dir, splits)
    for path, size in zip(paths, sizes.values(), strict=True):
        print(f"{path}: {size} expressions")
    return EXIT_DONE


def fetch_imdb(arguments: argparse.Namespace) -> int:
    folder: Path = arguments.data_dir
    source = imdb.find_source(folder) or download_archive(imdb.OFFICIAL, folder)
    reviews = imdb.read_source(source, None)
    kind = "the official archive" if reviews.official else "not the official archive, but complete"
    print(f"{source}: {kind}, sha256 {reviews.sha256}")
    for name, split in (("train", reviews.train), ("test", reviews.test)):
        print(f"{name}: {len(split)} reviews, {int(split.labels.sum())} of them positive")
    return EXIT_DONE


def print_stats(arguments: argparse.Namespace) -> int:
    task = load_task(arguments.task, DataSettings(**given_settings(arguments, DataSettings)))
    print(f"{task.title}: {task.vocab_size} token ids, {task.num_classes} classes")
    print(f"source: {task.provenance['source']}, sha256 {task.provenance['sha256']}")
    print(
        f"{'split':8}{'examples':>10}{'mean':>9}" + "".join(f"{f'{p} %':>7}" for p in PERCENTILES) + "    max"
    )
    splits = {"train": task.train, "val": task.val, "test": task.test}
    for name, split in splits.items():
        percentiles = np.percentile(split.lengths, PERCENTILES)
        print(f"{name:8}{len(split):10,}{split.lengths.mean():9.1f}", end="")
        print("".join(f"{value:7.0f}" for value in percentiles) + f"{split.lengths.max():7}")
    for which, count in task.provenance.get("identical", {}).items():
        print(f"identical examples, {which}: {count}")
    for name, split in splits.items():
        asked = split.labels[split.labels != IGNORED]
        counts = np.bincount(asked, minlength=task.num_classes)
        most = np.sort(np.argsort(-counts, kind="stable")[:SHOWN_CLASSES])
        shares = "  ".join(f"{task.class_names[label]} {counts[label] / len(asked):.1%}" for label in most)
        which = f", the {SHOWN_CLASSES} most frequent" if len(counts) > SHOWN_CLASSES else ""
        print(f"labels of {name}{which}: {shares}")
    shown = task.train.example(0)[:SHOWN_TOKENS]
    tokens = ["+".join(task.symbols(int(i)) for i in np.atleast_1d(ids)) for ids in shown]
    label = "" if task.train.token_targets else f" ({task.class_names[task.train.labels[0]]})"
    print(f"first training example{label}, at most {SHOWN_TOKENS} tokens:")
    print(("" if task.provenance["tokenizer"] == "byte" else " ").join(tokens))
    return EXIT_DONE


def run(argv: list[str] | None) -> int:
    arguments = make_parser().parse_args(argv)
    command = {"listops": write_listops, "imdb": fetch_imdb, "stats": print_stats}[arguments.command]
    return command(arguments)


def main(argv: list[str] | None = None) -> int:
    return exit_code(PROG, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
