"""Settings become options, and a user's mistake becomes one helpful line on stderr and exit code 2."""

import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from command_line import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    InputError,
    Parser,
    add_settings,
    check_settings,
    choose,
    described,
    exit_code,
    given_path,
    given_settings,
    nearest,
    setting,
)


@dataclass(frozen=True)
class Settings:
    """Cooking

    Not shown."""

    batch_size: int = setting(32, "loaves, 100% of the oven", minimum=1, maximum=64)
    salt: float = setting(0.1, "share of salt", minimum=0.0, below=1.0)
    heat: float = setting(2.0, "kilowatts", above=0.0)
    steam: bool = setting(True, "whether to steam")
    flour: str = setting("rye", "kind of flour", choices=("rye", "wheat", "spelt"))
    rests: tuple[float, ...] | None = setting(None, "hours of each rest", above=0.0, below=24.0)
    proofs: tuple[int, ...] = setting((1, 2), "minutes of each proof", minimum=0)
    oven: str | None = setting(None, "which oven")
    offset: int = setting(0, "any whole number")
    note: str = field(default="no limits at all")

    def __post_init__(self) -> None:
        check_settings(self)


def make_parser() -> Parser:
    parser = Parser(prog="bake.py", description="Bakes.")
    add_settings(parser, Cooking)
    return parser


@dataclass(frozen=True)
class Cooking(Settings):
    """Cooking

    Not shown."""

    note: str = setting("", "a note")


def parse(*argv: str) -> Cooking:
    return replace(Cooking(), **given_settings(make_parser().parse_args(argv), Cooking))


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The only line on stderr of a command line that is refused with exit code 2."""
    with pytest.raises(SystemExit) as left:
        make_parser().parse_args(argv)
    assert left.value.code == EXIT_BAD_INPUT
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.endswith("\n")
    return printed.err.strip()


# --- ranges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 1),
        ("batch_size", 64),
        ("salt", 0.0),
        ("salt", 0.999),
        ("heat", 1e-9),
        ("heat", 1e9),
        ("flour", "spelt"),
        ("rests", None),
        ("rests", (0.5, 23.9)),
        ("proofs", ()),
        ("proofs", (0,)),
        ("offset", -(10**17)),
        ("steam", False),
    ],
)
def test_a_legal_value_is_taken(name: str, value: Any) -> None:
    assert getattr(Settings(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", 0, "--batch-size must be at least 1 and at most 64, got 0"),
        ("batch_size", 65, "--batch-size must be at least 1 and at most 64, got 65"),
        ("batch_size", -1, "--batch-size must be at least 1 and at most 64, got -1"),
        ("salt", 1.0, "--salt must be at least 0.0 and below 1.0, got 1.0"),
        ("salt", -1e-9, "--salt must be at least 0.0 and below 1.0, got -1e-09"),
        ("heat", 0.0, "--heat must be above 0.0, got 0.0"),
        ("heat", float("nan"), "--heat must be above 0.0, got nan"),
        ("heat", float("inf"), "--heat must be finite and above 0.0, got inf"),
        ("offset", float("-inf"), "--offset must be finite, got -inf"),
        ("rests", (1.0, 24.0), "--rests must be above 0.0 and below 24.0, got 24.0"),
        ("proofs", (1, -2), "--proofs must be at least 0, got -2"),
        ("flour", "ry", "unknown --flour 'ry': did you mean 'rye'? (one of rye, wheat, spelt)"),
        ("flour", "", "unknown --flour '': (one of rye, wheat, spelt)"),
    ],
)
def test_an_illegal_value_is_refused_with_its_range(name: str, value: Any, message: str) -> None:
    with pytest.raises(InputError) as refused:
        Settings(**{name: value})
    assert str(refused.value) == message


def test_a_number_that_no_results_folder_may_hold_is_refused() -> None:
    with pytest.raises(InputError, match="--batch-size must be at least 1 and at most 64"):
        Settings(batch_size=10**400)
    for settings in ({"offset": -(10**400)}, {"heat": 1e300}):
        with pytest.raises(InputError, match="must be at most"):
            Settings(**settings)


# --- options ----------------------------------------------------------------------------------------------


def test_each_field_is_an_option_of_its_type() -> None:
    given = parse(
        *("--batch-size", "8", "--salt", "0.5", "--no-steam", "--flour", "wheat", "--oven", "left"),
        *("--rests", "1", "2.5", "--proofs", "3", "--offset", "-4"),
    )
    expected = Cooking(
        batch_size=8,
        salt=0.5,
        steam=False,
        flour="wheat",
        oven="left",
        rests=(1.0, 2.5),
        proofs=(3,),
        offset=-4,
    )
    assert given == expected
    assert isinstance(given.rests, tuple)
    assert isinstance(given.rests[0], float)


def test_what_is_not_given_leaves_no_trace() -> None:
    assert given_settings(make_parser().parse_args([]), Cooking) == {}
    assert given_settings(make_parser().parse_args(["--steam"]), Cooking) == {"steam": True}
    assert parse() == Cooking()


def test_help_shows_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        make_parser().parse_args(["--help"])
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "loaves, 100% of the oven (default: 32)" in shown
    assert "hours of each rest (default: not set)" in shown
    assert "minutes of each proof (default: 1 2)" in shown
    assert "--steam, --no-steam" in shown
    assert "rye|wheat|spelt" in shown
    assert "Not shown." not in shown


def test_home_is_meant_by_a_tilde_however_a_path_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/baker")
    parser = Parser(prog="bake.py")
    parser.add_argument("--oven", type=Path)
    parser.add_subparsers().add_parser("bread").add_argument("--tin", type=Path)
    assert parser.parse_args(["--oven=~/x"]).oven == Path("/home/baker/x")
    assert parser.parse_args(["bread", "--tin=~/x"]).tin == Path("/home/baker/x")
    assert given_path("a/~") == Path("a/~")


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("~nobody-of-that-name/x", "Could not determine home directory."),
        ("x" * 300, "File name too long"),
        ("loop/x", "Too many levels of symbolic links"),
    ],
)
def test_a_path_that_cannot_be_reached_is_one_line_with_its_option(
    path: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    parser = Parser(prog="bake.py")
    parser.add_argument("--oven", type=Path)
    with pytest.raises(SystemExit) as left:
        parser.parse_args(["--oven", path])
    assert left.value.code == EXIT_BAD_INPUT
    line = f"'{path}' cannot be reached: {why}"
    assert capsys.readouterr().err == f"bake.py: error: argument --oven: {line}\n"
    with pytest.raises(InputError) as refused:
        given_path(path, "--tin")
    assert str(refused.value) == f"--tin {line}"


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [
        ("--batchsize", "--batch-size"),
        ("--batch_size", "--batch-size"),
        ("--batch-size-", "--batch-size"),
        ("--batch", "--batch-size"),
        ("--flower", "--flour"),
        ("--no-stem", "--no-steam"),
    ],
)
def test_a_mistyped_option_names_the_nearest(
    capsys: pytest.CaptureFixture[str], mistyped: str, meant: str
) -> None:
    for argv in ((mistyped,), (mistyped, "3"), (f"{mistyped}=3",), ("--salt", "0.2", mistyped)):
        message = refusal(capsys, *argv)
        assert message.startswith(f"bake.py: error: unrecognized arguments: {mistyped}")
        assert f"did you mean '{meant}'? see --help" in message


def test_the_nearest_option_of_a_sub_command_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="bake.py")
    add_settings(parser.add_subparsers().add_parser("bread"), Cooking)
    with pytest.raises(SystemExit) as left:
        parser.parse_args(["bread", "--flower", "rye"])
    assert left.value.code == EXIT_BAD_INPUT
    assert "did you mean '--flour'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (("--batch-size", "many"), "--batch-size: invalid int value: 'many'"),
        (("--batch-size", "1.5"), "--batch-size: invalid int value: '1.5'"),
        (("--batch-size", "9" * 5000), "--batch-size: invalid int value"),
        (("--salt", "a\nb"), "--salt: invalid float value"),
        (("--batch-size",), "--batch-size: expected one argument"),
        (("--rests",), "--rests: expected at least one argument"),
        (("--rests", "1", "x"), "--rests: invalid float value: 'x'"),
        (("stray",), "unrecognized arguments: stray"),
        (("--two\nlines",), "unrecognized arguments: --two"),
    ],
)
def test_a_malformed_command_line_is_one_line(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], part: str
) -> None:
    assert part in refusal(capsys, *argv)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("the oven is cold; heat it", "bake.py: error: the oven is cold; heat it\n"),
        ("no file 'a\nb'", "bake.py: error: no file 'a b'\n"),
        ("", "bake.py: error: \n"),
    ],
)
def test_an_input_error_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], message: str, line: str
) -> None:
    def body() -> int:
        raise InputError(message)

    assert exit_code("bake.py", body) == EXIT_BAD_INPUT == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", line)


def test_an_interrupt_is_exit_code_130_and_a_result_is_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert exit_code("bake.py", interrupted) == EXIT_INTERRUPTED == 130
    assert capsys.readouterr().err == "bake.py: interrupted\n"
    assert exit_code("bake.py", lambda: 1) == 1
    assert exit_code("bake.py", lambda: EXIT_DONE) == 0
    assert capsys.readouterr().err == ""


def test_our_own_errors_are_not_taken_for_the_users() -> None:
    def body() -> int:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        exit_code("bake.py", body)


# --- streams ----------------------------------------------------------------------------------------------


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
    ("shell", "encoding"),
    [
        ("{} 2>&-", "utf-8"),
        ("{} >&-", "utf-8"),
        ("{} <&- >&- 2>&-", "utf-8"),
        ("{} | true", "utf-8"),
        ("{} 2>&1 | true", "utf-8"),
        ("{} >/dev/full", "utf-8"),
        ("{} >/dev/null", "ascii"),
        ("{} >/dev/null", "cp1252"),
    ],
)
def test_who_reads_what_is_printed_changes_neither_the_work_nor_its_exit_code(
    shell: str, encoding: str, tmp_path: Path
) -> None:
    (tmp_path / "bake.py").write_text(PROGRAM)
    program = f'{{ "{sys.executable}" "{tmp_path}/bake.py" "{tmp_path}/work"; echo $? > "{tmp_path}/code"; }}'
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "PYTHONIOENCODING": encoding}
    ran = subprocess.run(
        ["bash", "-c", shell.format(program)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (tmp_path / "work").read_text() == "worked"
    if "<&-" not in shell:  # then the shell's own echo goes elsewhere all the same
        assert (tmp_path / "code").read_text() == "3\n"
    assert "Traceback" not in ran.stderr
    assert "BrokenPipe" not in ran.stderr
    assert ("not all could be printed: No space left on device" in ran.stderr) == ("full" in shell)


def test_an_interpreter_without_docstrings_has_a_help_all_the_same() -> None:
    assert described("Bakes.\n\n    bake.py\n\nWell.") == {
        "description": "Bakes.\n\nWell.",
        "epilog": "examples:\n    bake.py",
    }
    Parser(**described(None)).format_help()


# --- names ------------------------------------------------------------------------------------------------


def test_a_known_name_is_returned_and_an_unknown_one_gets_the_nearest() -> None:
    known = ["conventional", "gravitational", "multi_timescale"]
    assert choose("gravitational", iter(known), "model") == "gravitational"
    with pytest.raises(InputError) as refused:
        choose("gravitatinal", iter(known), "model")
    assert str(refused.value) == (
        "unknown model 'gravitatinal': did you mean 'gravitational'? "
        "(one of conventional, gravitational, multi_timescale)"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("multi-timescale", "did you mean 'multi_timescale'? "),
        ("timescale", "did you mean 'multi_timescale'? "),
        ("Conventional", "did you mean 'conventional'? "),
        ("xyz", ""),
        ("", ""),
    ],
)
def test_only_a_close_name_is_proposed(name: str, expected: str) -> None:
    assert nearest(name, ["conventional", "gravitational", "multi_timescale"]) == expected
