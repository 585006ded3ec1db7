"""What the scripts share at their command line: settings, one-line errors and exit codes.

Settings are frozen dataclasses whose fields are made by `setting`, which keeps a field's help text
and legal range beside its default. The options of a script are derived from them::

    @dataclass(frozen=True)
    class Training:
        \"\"\"Training\"\"\"
        batch_size: int = setting(32, "examples per optimizer step", minimum=1)

        def __post_init__(self) -> None:
            check_settings(self)

    parser = Parser(description=...)
    add_settings(parser, Training)
    training = replace(Training(), **given_settings(parser.parse_args(argv), Training))

A script's work does not depend on who reads what it prints: see `KeptStream`.

Needs the standard library only.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import importlib.util
import math
import operator
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130
# What a results folder may hold, and so what may be asked for.
LARGEST_WHOLE = 10**18 - 1  # an int64 holds it
LARGEST_NUMBER = 1e40  # no float32 is as large
LIMITS = {  # of a setting's value: in words, and what it is to be
    "minimum": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "maximum": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def usable_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class InputError(ValueError):
    """A user's mistake. The message is one line: what was wrong, what was expected, what to do."""


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    several: bool = False,
) -> Any:
    """A dataclass field with its help text and its legal values, ends included (`minimum`, `maximum`)
    or not (`above`, `below`); for a tuple the range holds for each entry. several: whether the option takes
    more than one value, each of which could be the field's."""
    limits = {"minimum": minimum, "above": above, "maximum": maximum, "below": below, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, "several": several, **limits})


def option_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def check_settings(settings: Any) -> None:
    """Raise InputError for the first field of a settings dataclass that is outside its legal values."""
    for field in dataclasses.fields(settings):
        value, limits = getattr(settings, field.name), field.metadata
        if value is None or not limits:
            continue
        if limits["choices"]:
            choose(value, limits["choices"], option_name(field.name))
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float):
                _check_number(number, limits, option_name(field.name))


def _check_number(number: int | float, limits: typing.Mapping[str, Any], name: str) -> None:
    given = {key: limit for key in LIMITS if (limit := limits[key]) is not None}
    finite = isinstance(number, int) or math.isfinite(number)  # an int may be too large for a float
    allowed = too_large(number)
    if not finite or not all(LIMITS[key][1](number, limit) for key, limit in given.items()):
        allowed = " and ".join(f"{LIMITS[key][0]} {limit}" for key, limit in given.items()) or "finite"
        if number in (math.inf, -math.inf) and given:
            allowed = f"finite and {allowed}"
    if allowed:
        raise InputError(f"{name} must be {allowed}, got {number}")


def too_large(value: object) -> str:
    """Of a number that no results folder may hold, what it may be; empty for all else."""
    if isinstance(value, int) and abs(value) > LARGEST_WHOLE:
        return f"at most {LARGEST_WHOLE}"
    if isinstance(value, float) and math.isfinite(value) and abs(value) > LARGEST_NUMBER:
        return f"at most {LARGEST_NUMBER:g}"
    return ""


def check_package(name: str) -> None:
    """InputError where the package that the option of its name needs is not installed."""
    if importlib.util.find_spec(name) is None:
        raise InputError(f"--{name} needs the package {name}: pip install -r requirements-{name}.txt")


def nearest(name: str, known: Iterable[str]) -> str:
    """ "did you mean 'x'? " for the closest known name, or nothing."""
    bare = {entry.lstrip("-"): entry for entry in known}  # the dashes of options are no likeness
    close = difflib.get_close_matches(name.lstrip("-"), bare, n=1, cutoff=0.5)
    return f"did you mean '{bare[close[0]]}'? " if close else ""


def one_line(text: object) -> str:
    """The text without line breaks, which a file name may have."""
    return " ".join(str(text).splitlines())


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def choose(name: str, known: Iterable[str], what: str) -> str:
    """`name` if it is known, else InputError with the nearest known name and all of them."""
    known = list(known)
    if name not in known:
        raise InputError(f"unknown {what} '{name}': {nearest(name, known)}(one of {', '.join(known)})")
    return name


def described(documentation: str | None) -> dict[str, str]:
    """A Parser's texts from a script's docstring: what it does, its examples, the rest. An optimised
    interpreter has no docstring."""
    intro, _, more = (documentation or "").partition("\n\n")
    examples, _, rest = more.partition("\n\n")
    return {"description": f"{intro}\n\n{rest}", "epilog": f"examples:\n{examples}"}


def given_path(text: str, option: str = "") -> Path:
    """The path that a user means: `~` is home also where no shell has seen it (`--output-dir=~/x`).

    InputError where nobody can tell what is there: the name is too long, a folder may not be entered."""
    try:
        path = Path(text).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{option} '{text}' cannot be reached: {why}".strip()) from error
    return path


def _path_option(text: str) -> Path:
    try:
        return given_path(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with the nearest option for a mistyped one."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self.register("type", Path, _path_option)

    def options(self) -> list[str]:
        """Every option of this parser and of its sub-commands."""
        found = []
        for action in self._actions:
            found += [option for option in action.option_strings if option.startswith("--")]
            if isinstance(action, argparse._SubParsersAction):
                for sub in action.choices.values():
                    found += sub.options()
        return found

    def error(self, message: str) -> NoReturn:
        hint = ""
        unknown = re.match(r"unrecognized arguments: .*?(--[\w-]+)", message)
        if unknown:
            hint = f" ({nearest(unknown[1], self.options())}see --help)"
        print(f"{self.prog}: error: {one_line(message)}{hint}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


def add_settings(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add an option for each field of a settings dataclass, in a group named by its docstring's first line.

    An option that is not given leaves no trace in the namespace, so that presets can be told from wishes."""
    group = parser.add_argument_group((settings.__doc__ or settings.__name__).strip().splitlines()[0])
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        text = field.metadata["help"].replace("%", "%%")
        default = "not set" if field.default is None else shown(field.default)
        kind = _argument_kind(hints[field.name], field)
        help = f"{text} (default: {default})"
        group.add_argument(option_name(field.name), default=argparse.SUPPRESS, help=help, **kind)


def shown(value: Any) -> str:
    """A setting's value as it is given on the command line."""
    return " ".join(str(entry) for entry in value) if isinstance(value, tuple) else str(value)


def _argument_kind(hint: Any, field: dataclasses.Field[Any]) -> dict[str, Any]:
    """The argparse keywords of a field: bool, int, float, str, tuple[X, ...], each also as optional."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    several = field.metadata["several"]
    if typing.get_origin(hint) is tuple:
        hint, several = typing.get_args(hint)[0], True
    metavar = "|".join(field.metadata["choices"] or ()) or hint.__name__.upper()
    return {"type": hint, "metavar": metavar} | ({"nargs": "+"} if several else {})


def given_settings(namespace: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The fields of a settings dataclass that were given on the command line."""
    given = vars(namespace)
    names = [field.name for field in dataclasses.fields(settings) if field.name in given]
    return {name: tuple(given[name]) if isinstance(given[name], list) else given[name] for name in names}


class KeptStream:
    """A standard stream that never fails: once its reader has left or its disk is full, what is written is
    lost. A character that its encoding has not is written as an escape.

    lost: the first error that was no reader's leaving."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        with self._kept():
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._kept():
            self.stream.flush()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != errno.EPIPE:
                self.lost = self.lost or error
            with contextlib.suppress(OSError, ValueError):  # else the interpreter tries once more at its end
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


def keep_streams() -> None:
    """Make the standard streams of this process such that printing never fails, also where it has none."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - kept, in the free descriptor
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
        if mode == "w" and not isinstance(getattr(sys, name), KeptStream):
            setattr(sys, name, KeptStream(getattr(sys, name)))


def exit_code(prog: str, body: Callable[[], int]) -> int:
    """Run a script's body, with streams that are kept; a user's mistake becomes one line on stderr and exit
    code 2."""
    before = sys.stdout, sys.stderr
    keep_streams()
    try:
        return body()
    except InputError as error:
        print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        sys.stdout.flush()
        if isinstance(sys.stdout, KeptStream) and sys.stdout.lost:
            print(f"{prog}: not all could be printed: {sys.stdout.lost.strerror}", file=sys.stderr)
        sys.stderr.flush()
        if None not in before:
            sys.stdout, sys.stderr = before
