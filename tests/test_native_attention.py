"""The compiled kernel: precision over a table of cases, threads, what is not finite or denormal, and how it
is built and kept. Contract, formulas and masks of modules run on it in their files (`each_fused_backend`)."""

import functools
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_cases import KINDS, Case, Kind, beyond, errors, masks

import attention_kernels
from attention_engine import native_build
from attention_engine.attention_scores import DotProduct, Gravity, Mask, Score
from attention_kernels import attend, cannot

ROOT = Path(__file__).parents[1]
SHAPES: dict[str, dict[str, Any]] = {
    "a tile and a bit": {"queries": 61, "keys": 140, "head_dim": 16},
    "padded heads": {"queries": 19, "keys": 35, "head_dim": 5, "heads": 2},
    "parts of keys": {"batch": 1, "queries": 530, "keys": 590, "head_dim": 8, "timescales": 2},
}
SMALL, DECAYS = list(SHAPES)[:2], (None, (0.6, 0.95), (0.99, 0.999))
SCORES = [(kind, power) for kind in KINDS for power in ((2.0,) if kind == "dot product" else (1.0, 2.0, 4.0))]
each_score = pytest.mark.parametrize(("kind", "power"), SCORES)


def wrong(case: Case, output: float = 2e-6, gradient: float = 2e-5) -> dict[str, float]:
    return beyond(case, output, gradient, backend="native")


@each_score
@pytest.mark.parametrize(
    ("shape", "decay", "shared"),
    [(shape, decay, shape != SMALL[0]) for shape in SMALL for decay in DECAYS]
    + [("parts of keys", None, True), ("parts of keys", (0.6, 0.95), False)],
)
def test_outputs_and_gradients_are_those_of_the_formula(
    kind: Kind, power: float, shape: str, decay: tuple[float, float] | None, shared: bool
) -> None:
    for causal in (False, True):
        case = Case(kind, power=power, decay=decay, shared=shared, mask=Mask(causal=causal), **SHAPES[shape])
        assert wrong(case) == {}


@each_score
@pytest.mark.parametrize("shape", SHAPES)
def test_clocks_and_their_gradients_are_those_of_the_formula(kind: Kind, power: float, shape: str) -> None:
    for shared, causal in ((True, True), (False, False)):
        timing: dict[str, Any] = {"decay": None, "clock": True, "mask": Mask(causal=causal)}
        assert wrong(Case(kind, power=power, shared=shared, **timing, **SHAPES[shape])) == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clock", [False, True])
@pytest.mark.parametrize(
    "mask", ["padding", "an example of padding only", "causal, padding in front", "pairs"]
)
def test_masks_hold(kind: Kind, clock: bool, mask: str) -> None:
    decay = None if clock else (0.6, 0.95)
    assert wrong(Case(kind, heads=2, decay=decay, clock=clock, mask=masks(2, 2, 19, 35)[mask])) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_far_keys_are_skipped_and_nothing_changes(kind: Kind) -> None:
    case = Case(kind, batch=1, queries=900, keys=900, head_dim=8, decay=(0.5, 0.9))
    complete = case.evaluate("native", skip_far_keys=False)
    assert max(errors(case.evaluate("native"), complete).values()) < 1e-6


@pytest.mark.parametrize("kind", ["gravity", "force"])
def test_an_offset_of_q_and_k_is_no_distance(kind: Kind) -> None:
    """Of which the inputs themselves have lost two digits."""
    assert wrong(Case(kind, offset=100.0), 2e-5, 2e-4) == {}


@pytest.mark.parametrize("softening", [1e-6, 1e-3, 0.01])
@pytest.mark.parametrize("kind", ["gravity", "force"])
def test_coincident_pairs_go_where_float64_is(kind: Kind, softening: float) -> None:
    assert wrong(Case(kind, queries=35, duplicates=True, softening=softening), 2e-5, 1e-3) == {}


@pytest.mark.parametrize("kind", ["gravity", "force"])
@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize(("causal", "head_dim"), [(True, 16), (False, 12)])
def test_near_pairs_of_long_vectors_which_training_makes_stay_in_float32(
    kind: Kind, power: float, causal: bool, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernels, "tiled_attention", None)
    sizes: dict[str, Any] = {"queries": 150, "keys": 150, "head_dim": head_dim, "mask": Mask(causal=causal)}
    case = Case(kind, power=power, duplicates=True, apart=0.6, size=6.0, **sizes)
    assert wrong(case) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_those_of_any_number_of_threads(kind: Kind) -> None:
    found = []
    for threads in (1, 5):
        torch.set_num_threads(threads)
        found.append(Case(kind, batch=1, queries=530, keys=590).evaluate("native"))
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_finite_reaches_the_rows_that_it_reaches_in_the_formula(
    kind: Kind, value: float, name: str
) -> None:
    case = Case(kind, decay=None, mask=Mask(causal=True), queries=35)
    inputs = case.inputs()
    inputs[name][:, :, :, 20] = value
    results = []
    for backend in ("native", "dense"):
        q, k, v = (inputs[x] for x in "qkv")
        output, _ = attend(q, k, v, case.score(inputs), case.mask, backend=backend)
        results.append(output.isfinite().all(-1))
    late = torch.arange(35) >= 20
    if name != "v":  # 0 times a later value that is not finite: in the formula, for all rows
        assert torch.equal(results[0][..., ~late], results[1][..., ~late])
    same = results[0][..., late] == results[1][..., late]
    if (name, value) == ("k", float("inf")) and kind != "dot product":
        # Infinitely far there is no force; |q|^2 - 2 q . k + |k|^2 may make inf - inf of it.
        same |= results[0][..., late]
    assert bool(same.all())


def test_denormal_inputs_are_not_slow() -> None:
    def seconds(scale: float) -> float:
        x = torch.randn(1, 1, 2, 700, 16, generator=torch.Generator().manual_seed(2)) * scale
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            attend(x, x, x, DotProduct(0.25), Mask(), backend="native")
            best = min(best, time.perf_counter() - started)
        return best

    assert seconds(1e-40) < 4 * seconds(1.0)  # without care it is a hundred times


# --- how it is built --------------------------------------------------------------------------------------

# Compilers: one fails, one makes what the real one has made already, to where the last word says.
FAILS = "sh -c 'test $1 = --version || { echo x.cpp: error: no; exit 1; }' cxx"
COPIES = 'case "$1" in --version) echo 1;; *) for last; do :; done; {before} cp "{made}" "$last";; esac'


@pytest.fixture(scope="module")
def made() -> Path:
    """The library for heads of 16, as the compiler made it for whoever runs the tests."""
    native_build.library(16, 2)
    return native_build._cache_folder() / native_build._library_name(16, 2)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, in a process that has looked for nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_build, "_libraries", {})
    for name in ("_compiler", "_version"):
        monkeypatch.setattr(native_build, name, functools.cache(getattr(native_build, name).__wrapped__))
    return tmp_path


def compiler(folder: Path, script: str) -> str:
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def libraries(cache: Path) -> list[Path]:
    return sorted((cache / "attention-comparison" / "native").glob("*.so"))


def attended() -> str:
    """By what: "native", or why not."""
    x = torch.randn(1, 1, 2, 9, 16)
    for _ in range(2):
        assert bool(attend(x, x, x, DotProduct(0.25), Mask())[0].isfinite().all())
    return cannot("native", x, DotProduct(0.25), Mask(), 0.0, False) or "native"


def test_processes_that_start_together_build_it_once_and_the_next_finds_it(
    made: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = f'echo x >> "{fresh}/calls"; sleep 1; echo "warning: beware" >&2;'
    monkeypatch.setenv("CXX", compiler(fresh, COPIES.format(before=counts, made=made)))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    code, pipe = "import test_native_attention as tests; print(tests.attended())", subprocess.PIPE
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe) for _ in range(2)]
    told = [process.communicate() for process in processes]
    assert [output for output, _ in told] == ["native\n"] * 2
    assert sum(error.startswith("building the attention kernel") for _, error in told) == 1
    assert not any("beware" in error for _, error in told)
    assert (fresh / "calls").read_text().count("x") == len(libraries(fresh)) == 1
    assert (attended(), capsys.readouterr().err) == ("native", "")


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("ATTENTION_NATIVE", "0", "is switched off by ATTENTION_NATIVE=0"),
        ("CXX", "no-such-compiler", "needs a C++ compiler, and there is none (CXX=no-such-compiler)"),
        ("CXX", FAILS, "failed (x.cpp: error: no)"),
        ("CXX", "true", "made nothing"),
    ],
)
def test_without_it_attention_goes_on_and_says_why_once(
    variable: str,
    value: str,
    reason: str,
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, value)
    why = attended().removesuffix(": use 'tiled'")
    assert reason in why
    *building, told = capsys.readouterr().err.splitlines()
    assert told == f"backend 'native' {why}: attention goes on without, slower"
    assert len(building) == ("cannot be built" in why)
    assert libraries(fresh) == []


def test_a_compiler_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(native_build.UnavailableError, match="took more than 1 s"):
        native_build._output_of([compiler(tmp_path, "sleep 60")], tmp_path, 1.0)


def test_a_library_that_is_damaged_or_of_another_processor_is_not_used(
    made: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(fresh, COPIES.format(before="", made=made)))
    name = native_build._library_name(16, 2)
    library = fresh / "attention-comparison" / "native" / name
    library.parent.mkdir(mode=0o700, parents=True)
    library.write_bytes(b"no library")
    assert attended() == "native" and library.read_bytes() == made.read_bytes()  # built anew
    here = native_build._processor()
    monkeypatch.setattr(native_build, "_processor", lambda: here + "\nflags: another")
    assert native_build._library_name(16, 2) != name


def test_a_cache_that_cannot_be_written_is_done_without(
    made: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", compiler(fresh, COPIES.format(before="", made=made)))
    (fresh / "attention-comparison").write_text("a file where the folder would be")
    assert attended() == "native" and "for this process only" in capsys.readouterr().err


@pytest.mark.slow
def test_sanitizers_find_nothing_over_the_cases(tmp_path: Path) -> None:
    """The table of cases once more, with addresses and undefined behaviour watched."""
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libubsan.so")
    ]
    checks = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    watched = compiler(tmp_path, f'exec g++ -g {checks} "$@" -O1')  # -O3 would take minutes
    names = "outputs_and_gradients or clocks or near_pairs or masks_hold or far_keys or any_number"
    environment = os.environ | {
        "CXX": watched,
        "XDG_CACHE_HOME": str(tmp_path),
        "LD_PRELOAD": " ".join(map(str.strip, runtime)),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    alone = "-n", "0", "-x", "-p", "no:cacheprovider"
    command = [sys.executable, "-m", "pytest", *alone, __file__, "-k", names]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_score_or_a_tensor_that_is_not_its_own_is_refused_in_words() -> None:
    x, dot, mass = torch.zeros(1, 1, 2, 3, 16), DotProduct(0.25), torch.ones(1, 1, 2, 3)
    law = Gravity(mass, None, None, 0.1, normalization="force")
    cases: list[tuple[str, torch.Tensor, Score, float]] = [
        ("is for float32 on the CPU", x.double(), dot, 0.0),
        ("no dropout", x, dot, 0.1),
        ("no Manhattan distance", x, replace(law, distance="manhattan"), 0.0),
        ("no learned power and softening", x, replace(law, softening=torch.ones(1, 2)), 0.0),
        ("distance powers", x, replace(law, distance_power=3.0), 0.0),
        ("at most 256 wide", torch.zeros(1, 1, 1, 3, 300), dot, 0.0),
    ]
    for message, q, score, dropout in cases:
        with pytest.raises(ValueError, match=f"{message}.*use 'tiled'"):
            attend(q, q, q, score, Mask(), backend="native", dropout=dropout)
