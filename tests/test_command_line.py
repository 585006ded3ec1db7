"""Settings become options, and a user's mistake becomes one helpful line on stderr and exit code 2."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path
from typing import Any

import pytest
from run_cases import Refused

from command_line import (
    InputError,
    Parser,
    add_settings,
    check_settings,
    described,
    exit_code,
    given_path,
    given_settings,
    setting,
)


@dataclass(frozen=True)
class Cooking:
    """Cooking

    Not shown."""

    batch_size: int = setting(32, "loaves, 100% of the oven", minimum=1, maximum=64)
    salt: float = setting(0.1, "share of salt", minimum=0.0, below=1.0)
    heat: float = setting(2.0, "kilowatts", above=0.0)
    steam: bool = setting(True, "whether to steam")
    flour: str = setting("rye", "kind of flour", choices=("rye", "wheat", "spelt"))
    rests: tuple[float, ...] | None = setting(None, "hours of each rest", above=0.0, below=24.0)
    proofs: tuple[int, ...] = setting((1, 2), "minutes of each proof", minimum=0)
    offset: int = setting(0, "any whole number")

    def __post_init__(self) -> None:
        check_settings(self)


def parse(argv: list[str]) -> dict[str, Any]:
    parser = Parser(prog="bake.py", description="Bakes.")
    add_settings(parser, Cooking)
    return given_settings(parser.parse_args(argv), Cooking)


def paths(argv: list[str]) -> argparse.Namespace:
    """An option that is a path, and one of a sub-command."""
    parser = Parser(prog="bake.py")
    parser.add_argument("--oven", type=Path)
    bread = parser.add_subparsers().add_parser("bread")
    bread.add_argument("--tin", type=Path)
    return parser.parse_args(argv)


def ended_by(error: BaseException) -> Callable[[list[str]], int]:
    """A script whose work ends with an error."""

    def body() -> int:
        raise error

    return lambda argv: exit_code("bake.py", body)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", 0, "--batch-size must be at least 1 and at most 64, got 0"),
        ("batch_size", 65, "--batch-size must be at least 1 and at most 64, got 65"),
        ("salt", 1.0, "--salt must be at least 0.0 and below 1.0, got 1.0"),
        ("heat", 0.0, "--heat must be above 0.0, got 0.0"),
        ("heat", float("nan"), "--heat must be above 0.0, got nan"),
        ("heat", float("inf"), "--heat must be finite and above 0.0, got inf"),
        ("offset", float("-inf"), "--offset must be finite, got -inf"),
        ("rests", (1.0, 24.0), "--rests must be above 0.0 and below 24.0, got 24.0"),
        ("flour", "ry", "unknown --flour 'ry': did you mean 'rye'? (one of rye, wheat, spelt)"),
        ("flour", "Wheat", "unknown --flour 'Wheat': did you mean 'wheat'? (one of rye, wheat, spelt)"),
        ("flour", "", "unknown --flour '': (one of rye, wheat, spelt)"),
        # what no results folder may hold
        ("batch_size", 10**400, f"--batch-size must be at least 1 and at most 64, got {10**400}"),
        ("offset", -(10**18), f"--offset must be at most {10**18 - 1}, got {-(10**18)}"),
        ("heat", 1e300, "--heat must be at most 1e+40, got 1e+300"),
    ],
)
def test_an_illegal_value_is_refused_with_its_range(name: str, value: Any, message: str) -> None:
    with pytest.raises(InputError) as refused:
        Cooking(**{name: value})
    assert str(refused.value) == message


def test_each_field_is_an_option_of_its_type_and_what_is_not_given_leaves_no_trace() -> None:
    argv = "--batch-size 1 --salt 0 --heat 1e-9 --no-steam --flour rye --rests 1 23.9 --proofs 0 --offset -4"
    given = parse(argv.split())
    expected = {"batch_size": 1, "salt": 0.0, "heat": 1e-9, "steam": False, "flour": "rye"}
    assert given == expected | {"rests": (1.0, 23.9), "proofs": (0,), "offset": -4}
    assert isinstance(given["rests"][0], float) and asdict(Cooking(**given)) == given
    assert parse([]) == {} and parse(["--steam"]) == {"steam": True}
    assert make_dataclass("Free", [("note", float, -1e300)], bases=(Cooking,), frozen=True)().note == -1e300


def test_help_shows_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0 and "Not shown." not in shown
    texts = "loaves, 100% of the oven (default: 32)", "each rest (default: not set)", "rye|wheat|spelt"
    for part in (*texts, "minutes of each proof (default: 1 2)", "--steam, --no-steam"):
        assert part in shown
    parts = {"description": "Bakes.\n\nWell.", "epilog": "examples:\n    bake.py"}
    assert described("Bakes.\n\n    bake.py\n\nWell.") == parts
    Parser(**described(None)).format_help()  # an optimised interpreter has no docstring


def test_home_is_meant_by_a_tilde_however_a_path_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/baker")
    assert paths(["--oven=~/x"]).oven == paths(["bread", "--tin=~/x"]).tin == Path("/home/baker/x")
    assert given_path("a/~") == Path("a/~")


@pytest.mark.parametrize(
    ("path", "why"),
    [("~no-such-user/x", "Could not determine home directory."), ("x" * 300, "File name too long")],
)
def test_a_path_that_cannot_be_reached_is_told_with_its_option(path: str, why: str, refused: Refused) -> None:
    line = f"'{path}' cannot be reached: {why}"
    assert refused(paths, "--oven", path) == f"bake.py: error: argument --oven: {line}"
    with pytest.raises(InputError, match=f"^--tin {line}$"):
        given_path(path, "--tin")


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (("--batch-size", "many"), "--batch-size: invalid int value: 'many'"),
        (("--batch-size", "9" * 5000), "--batch-size: invalid int value"),
        (("--salt", "a\nb"), "--salt: invalid float value"),
        (("--rests", "1", "x"), "--rests: invalid float value: 'x'"),
        (("--two\nlines",), "unrecognized arguments: --two lines (see --help)"),
        (("--batch_size", "3"), "arguments: --batch_size 3 (did you mean '--batch-size'? see --help)"),
        (("--salt", "0.2", "--batch=3"), "arguments: --batch=3 (did you mean '--batch-size'? see --help)"),
        (("--no-stem",), "(did you mean '--no-steam'? see --help)"),
    ],
)
def test_a_malformed_command_line_is_one_line_that_names_the_nearest_option(
    argv: tuple[str, ...], part: str, refused: Refused
) -> None:
    assert part in refused(parse, *argv)


def test_an_input_error_is_one_line_an_interrupt_130_and_our_own_errors_are_not_taken_for_the_users(
    refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(ended_by(InputError("no file 'a\nb'"))) == "bake.py: error: no file 'a b'"
    assert ended_by(KeyboardInterrupt())([]) == 130
    assert capsys.readouterr().err == "bake.py: interrupted\n"
    with pytest.raises(ValueError, match="ours"):
        ended_by(ValueError("ours"))([])


PROGRAM = """
import sys
from command_line import exit_code
def body():
    print("caf\\xe9 " * 30000, flush=True)
    print("told", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write("worked")
    return 3
sys.exit(exit_code("bake.py", body))
"""


@pytest.mark.parametrize(
    "shell", ["{} 2>&-", "{} >&-", "{} <&- >&- 2>&-", "{} | true", "{} 2>&1 | true", "{} >/dev/full"]
)
def test_who_reads_changes_neither_work_nor_exit_code(shell: str, tmp_path: Path) -> None:
    (tmp_path / "bake.py").write_text(PROGRAM)
    program = f'{{ "{sys.executable}" "{tmp_path}/bake.py" "{tmp_path}/work"; echo $? > "{tmp_path}/code"; }}'
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "PYTHONIOENCODING": "ascii"}
    command = ["bash", "-c", shell.format(program)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (tmp_path / "work").read_text() == "worked"
    if "<&-" not in shell:  # then the shell's own echo goes elsewhere all the same
        assert (tmp_path / "code").read_text() == "3\n"
    assert "Traceback" not in ran.stderr and "BrokenPipe" not in ran.stderr
    assert ("not all could be printed: No space left on device" in ran.stderr) == ("full" in shell)
