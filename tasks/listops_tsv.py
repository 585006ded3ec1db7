r"""ListOps in the files of the Long Range Arena: basic_train.tsv, basic_val.tsv, basic_test.tsv.

    Source\tTarget
    ( ( ( [MAX 2 ) 9 ) ] )\t9

A line is an expression and its value. Each operator, argument and closing bracket is joined to what stands
on its left by a pair of parentheses; they repeat the brackets' structure and are left out when read.
"""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import IO

import numpy as np
from numpy.typing import NDArray

from command_line import InputError
from tasks.listops import CLOSE, DIGIT_0, FIRST_OPERATOR, SYMBOLS
from tasks.token_dataset import TokenDataset, offsets_of

HEADER = b"Source\tTarget"
SPLITS = ("train", "val", "test")
EXPRESSIONS_AT_ONCE = 1000
OPERATORS: dict[int, Callable[[list[int]], int]] = {
    SYMBOLS.index("[MIN"): min,
    SYMBOLS.index("[MAX"): max,
    SYMBOLS.index("[MED"): lambda digits: int(median(digits)),
    SYMBOLS.index("[SM"): lambda digits: sum(digits) % 10,
}
UNBALANCED = "brackets do not match, or an operator has no argument; is the line cut off?"
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
    for start in range(0, len(dataset), EXPRESSIONS_AT_ONCE):
        part = dataset.take(np.arange(start, min(start + EXPRESSIONS_AT_ONCE, len(dataset))))
        pieces = np.array(_pieces(int(count_arguments(part.tokens).max(initial=1))), object)
        texts = pieces[_piece_of_each_token(part)].tolist()
        bounds = part.offsets.tolist()
        for begin, end, label in zip(bounds[:-1], bounds[1:], part.labels.tolist(), strict=True):
            file.write(b"".join(texts[begin:end])[:-1] + b"\t%d\n" % label)


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
    piece[operator] = 2 * len(SYMBOLS) + tokens[operator] - FIRST_OPERATOR
    piece[operator] += len(OPERATORS) * count_arguments(part.tokens)
    return piece


def is_operator(tokens: NDArray[np.integer]) -> NDArray[np.bool_]:
    return (tokens >= FIRST_OPERATOR) & (tokens < CLOSE)


def count_arguments(tokens: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(operators,) the number of arguments of each operator of balanced expressions laid end to end.

    Sorted by depth, and within a depth by place, each operator is followed by the ends of its arguments."""
    operator = is_operator(tokens)
    depth = np.cumsum(operator.astype(np.int16) - (tokens == CLOSE), dtype=np.int16)  # open behind each token
    # Of an operator its own depth, of a digit or a bracket that of the operator whose argument ends there.
    order = np.argsort(depth, kind="stable")
    places = np.flatnonzero(operator[order])
    arguments = np.empty(len(tokens), np.int64)
    arguments[order[places]] = np.diff(np.append(places, len(tokens))) - 1
    return arguments[operator]


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
    return TokenDataset(
        np.frombuffer(b"".join(parts), np.uint8), offsets_of(lengths), np.array(labels, np.int64)
    )


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
        raise ValueError(f"expected a value of 0..9, got {_shown(target)}")
    if source.count(b"(") != source.count(b")"):
        raise ValueError("parentheses do not match")
    symbols = source.translate(None, b"()").split()
    try:
        tokens = bytes(map(_IDS.__getitem__, symbols))
    except KeyError as error:
        raise ValueError(f"unknown token {_shown(error.args[0])}") from error
    value = value_of(tokens)
    if value != int(target):
        raise ValueError(f"the expression's value is {value}, and the file says {target.decode()}")
    return tokens, value


def _shown(text: bytes) -> str:
    return repr(text[:20].decode(errors="replace"))


def value_of(tokens: bytes) -> int:
    """The value of an expression, by a stack, independent of the generator that it checks."""
    opened: list[tuple[int, list[int]]] = []  # operators, each with the arguments that stand before it
    arguments: list[int] = []  # so far, of the operator opened last
    for token in tokens:
        if token < FIRST_OPERATOR:
            arguments.append(token - DIGIT_0)
        elif token < CLOSE:
            opened.append((token, arguments))
            arguments = []
        elif opened and arguments:
            operator, before = opened.pop()
            before.append(OPERATORS[operator](arguments))
            arguments = before
        else:
            raise ValueError(UNBALANCED)
    if opened or len(arguments) != 1:
        raise ValueError(UNBALANCED)
    return arguments[0]
