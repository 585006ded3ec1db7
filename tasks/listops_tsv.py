r"""ListOps in the files of the Long Range Arena: basic_train.tsv, basic_val.tsv, basic_test.tsv.

    Source\tTarget
    ( ( ( [MAX 2 ) 9 ) ] )\t9

A line is an expression and its value. Each operator, argument and closing bracket is joined to what stands
on its left by a pair of parentheses; they repeat the brackets' structure and are left out when read.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from command_line import InputError
from tasks.listops import CLOSE, DIGIT_0, FIRST_OPERATOR, NUM_CLASSES, SYMBOLS, apply_operators
from tasks.token_dataset import TokenDataset, offsets_of

HEADER = b"Source\tTarget"
SPLITS = ("train", "val", "test")
EXPRESSIONS_AT_ONCE = 1000
_IDS = {symbol.encode(): index for index, symbol in enumerate(SYMBOLS) if index >= DIGIT_0}


def file_of(folder: Path, split: str) -> Path:
    return folder / f"basic_{split}.tsv"


def find_files(folder: Path) -> dict[str, Path] | None:
    """The three files of a folder, or None where it has none; InputError where some are missing."""
    if not folder.exists():
        raise InputError(f"--data-dir {folder} does not exist")
    files = {split: file_of(folder, split) for split in SPLITS}
    missing = [path.name for path in files.values() if not path.is_file()]
    if len(missing) == len(files):
        return None
    if missing:
        raise InputError(f"{folder} has ListOps files, but not {' and '.join(missing)}")
    return files


def write_files(folder: Path, splits: dict[str, TokenDataset]) -> list[Path]:
    """Write the three files; they come to their names together when all are whole.

    Raises InputError where the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished_") as unfinished:
            for split, dataset in splits.items():
                with file_of(Path(unfinished), split).open("wb") as file:
                    write_tsv(file, dataset)
            return [file_of(Path(unfinished), split).replace(file_of(folder, split)) for split in splits]
    except OSError as error:
        raise _cannot_write(folder, error) from error


def check_writable(folder: Path) -> None:
    """InputError where `write_files` could not write, before the work is done; leaves nothing behind."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(folder: Path, error: OSError) -> InputError:
    return InputError(f"cannot write to {folder}: {error.strerror}; choose another --output-dir")


def write_tsv(file: IO[bytes], dataset: TokenDataset) -> None:
    """Write a header and a line for each expression."""
    file.write(HEADER + b"\n")
    for part in _parts(dataset):
        pieces = np.array(_pieces(int(count_arguments(part.tokens).max(initial=1))), object)
        texts = pieces[_piece_of_each_token(part)].tolist()
        bounds = part.offsets.tolist()
        for begin, end, label in zip(bounds[:-1], bounds[1:], part.labels.tolist(), strict=True):
            file.write(b"".join(texts[begin:end])[:-1] + b"\t%d\n" % label)


def _parts(dataset: TokenDataset) -> Iterator[TokenDataset]:
    for start in range(0, len(dataset), EXPRESSIONS_AT_ONCE):
        yield dataset.take(np.arange(start, min(start + EXPRESSIONS_AT_ONCE, len(dataset))))


def _pieces(most_arguments: int) -> list[bytes]:
    """Texts of tokens: each symbol as the whole, each symbol as an argument, then for each number of
    arguments 0, 1, ... the four operators with as many parentheses and one for the bracket."""
    symbols = [symbol.encode() for symbol in SYMBOLS]
    whole = [symbol + (b" ) " if symbol == b"]" else b" ") for symbol in symbols]
    argument = [text + b") " for text in whole]
    opening = [
        b"( " * (count + 1) + symbol + b" "
        for count in range(most_arguments + 1)
        for symbol in symbols[FIRST_OPERATOR:CLOSE]
    ]
    return whole + argument + opening


def _piece_of_each_token(part: TokenDataset) -> NDArray[np.int64]:
    tokens = part.tokens.astype(np.int64)
    last = np.zeros(len(tokens), np.bool_)
    last[part.offsets[1:] - 1] = True  # the end of an expression is nobody's argument
    piece = tokens + np.where(last, 0, len(SYMBOLS))
    operator = is_operator(tokens)
    piece[operator] = 2 * len(SYMBOLS) + tokens[operator] - FIRST_OPERATOR + 4 * count_arguments(part.tokens)
    return piece


def is_operator(tokens: NDArray[np.integer]) -> NDArray[np.bool_]:
    return (tokens >= FIRST_OPERATOR) & (tokens < CLOSE)


def count_arguments(tokens: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(operators,) the number of arguments of each operator of balanced expressions laid end to end.

    Sorted by depth, and within a depth by place, each operator is followed by the ends of its arguments."""
    operator = is_operator(tokens)
    # Of an operator its own depth, of a digit or a bracket that of the operator whose argument ends there.
    order = np.argsort(_open_operators(tokens), kind="stable")
    places = np.flatnonzero(operator[order])
    arguments = np.empty(len(tokens), np.int64)
    arguments[order[places]] = np.diff(np.append(places, len(tokens))) - 1
    return arguments[operator]


def values_of(tokens: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(expressions,) the values of expressions laid end to end, computed from the deepest level up."""
    operator = is_operator(tokens)
    arity = np.zeros(len(tokens), np.int64)
    arity[operator] = count_arguments(tokens)
    depth = _open_operators(tokens) - operator  # of a node, the root having 0
    depth[tokens == CLOSE] = -1
    value = tokens - np.uint8(DIGIT_0)
    for level in range(int(depth.max(initial=0)), 0, -1):
        above = np.flatnonzero((depth == level - 1) & operator)
        symbols = tokens[above] - np.uint8(FIRST_OPERATOR)
        value[above] = apply_operators(symbols, arity[above], value[depth == level])
    return value[depth == 0]


def _open_operators(tokens: NDArray[np.uint8]) -> NDArray[np.int16]:
    """(total,) how many operators are open behind each token."""
    return np.cumsum(is_operator(tokens).astype(np.int16) - (tokens == CLOSE), dtype=np.int16)


def read_tsv(path: Path) -> TokenDataset:
    """The expressions of a file and their values; parentheses are left out.

    Raises InputError, naming file and line, for anything that is not as the Long Range Arena writes it, and
    for a value that is not the expression's."""
    try:
        with path.open("rb") as file:
            return _read_lines(path, file)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _read_lines(path: Path, lines: Iterable[bytes]) -> TokenDataset:
    numbered = enumerate(lines, 1)
    _, header = next(numbered, (1, b""))
    if header.rstrip(b"\r\n") != HEADER:
        raise InputError(f"{path}, line 1: expected the header 'Source<tab>Target'")
    parts, lengths, labels = [], [], []
    for number, line in numbered:
        try:
            tokens, label = _parse(line.rstrip(b"\r\n"))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
        parts.append(tokens)
        lengths.append(len(tokens))
        labels.append(label)
    if not labels:
        raise InputError(f"{path} has no expressions")
    dataset = TokenDataset(
        np.frombuffer(b"".join(parts), np.uint8), offsets_of(lengths), np.array(labels, np.int64)
    )
    values = np.concatenate([values_of(part.tokens) for part in _parts(dataset)])
    wrong = np.flatnonzero(values != dataset.labels)
    if len(wrong):
        raise InputError(
            f"{path}, line {wrong[0] + 2}: the expression's value is {values[wrong[0]]}, "
            f"and the file says {dataset.labels[wrong[0]]}"
        )
    return dataset


def _parse(line: bytes) -> tuple[bytes, int]:
    """The token ids, a byte each, and the value of a line; ValueError says what is wrong with it."""
    if b"\0" in line:
        raise ValueError("a NUL byte; the file is damaged")
    try:
        line.decode()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    fields = line.split(b"\t")
    if len(fields) != 2:
        raise ValueError(f"expected 2 fields with a tab between them, got {len(fields)}")
    source, target = fields
    if len(target) != 1 or not target.isdigit():
        raise ValueError(f"expected a value of 0..{NUM_CLASSES - 1}, got {_shown(target)}")
    if source.count(b"(") != source.count(b")"):
        raise ValueError("parentheses do not match")
    symbols = source.translate(None, b"()").split()
    try:
        tokens = bytes(map(_IDS.__getitem__, symbols))
    except KeyError as error:
        raise ValueError(f"unknown token {_shown(error.args[0])}") from error
    if not _is_one_expression(np.frombuffer(tokens, np.uint8)):
        raise ValueError("brackets do not match, or an operator has no argument; is the line cut off?")
    return tokens, int(target)


def _shown(text: bytes) -> str:
    return repr(text[:20].decode(errors="replace"))


def _is_one_expression(tokens: NDArray[np.uint8]) -> bool:
    """Whether only the last token leaves no operator open, and no operator is closed at once."""
    behind = _open_operators(tokens)
    at_once = is_operator(tokens[:-1]) & (tokens[1:] == CLOSE)
    return len(tokens) > 0 and bool(behind[-1] == 0 and (behind[:-1] > 0).all() and not at_once.any())
