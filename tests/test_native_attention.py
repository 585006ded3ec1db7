"""The compiled kernel: precision over a table of cases, threads, what is not finite or denormal, and how it
is built and kept. Contract, formulas and masks of modules run on it in their files (`each_fused_backend`)."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_cases import KINDS, Case, Kind, errors, masks

from attention_engine import native_build
from attention_engine.attention_scores import DotProduct, Gravity, Mask
from attention_kernels import attend

ROOT = Path(__file__).parents[1]
SHAPES: dict[str, dict[str, Any]] = {
    "a tile and a bit": {"queries": 61, "keys": 140, "head_dim": 16},
    "padded heads": {"queries": 19, "keys": 35, "head_dim": 5, "heads": 2},
    "parts of keys": {"batch": 1, "queries": 530, "keys": 590, "head_dim": 8, "timescales": 2},
}
SCORES = [(kind, power) for kind in KINDS for power in ((2.0,) if kind == "dot product" else (1.0, 2.0, 4.0))]
each_score = pytest.mark.parametrize(("kind", "power"), SCORES)


def beyond(case: Case, output: float = 2e-6, gradient: float = 2e-5) -> dict[str, float]:
    """What "native" gets wrong by more than the tolerances. The gradient of a single number is a sum that
    cancels, and may err by a digit more."""
    found = errors(case.evaluate("native"), case.evaluate("dense"))
    allowed = {name: 10 * gradient if "log_" in name else gradient for name in found} | {"output": output}
    return {name: error for name, error in found.items() if not error <= allowed[name]}


@each_score
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("decay", [None, (0.6, 0.95), (0.99, 0.999)])
@pytest.mark.parametrize("shared", [True, False])
def test_outputs_and_gradients_are_those_of_the_formula(
    kind: Kind, power: float, shape: str, decay: tuple[float, float] | None, shared: bool
) -> None:
    for causal in (False, True):
        case = Case(kind, power=power, decay=decay, shared=shared, mask=Mask(causal=causal), **SHAPES[shape])
        assert beyond(case) == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "mask", ["padding", "an example of padding only", "causal, padding in front", "pairs"]
)
def test_masks_hold(kind: Kind, mask: str) -> None:
    assert beyond(Case(kind, heads=2, mask=masks(2, 2, 19, 35)[mask])) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_far_keys_are_skipped_and_nothing_changes(kind: Kind) -> None:
    case = Case(kind, batch=1, queries=1300, keys=1300, head_dim=8, decay=(0.5, 0.9))
    complete = case.evaluate("native", skip_far_keys=False)
    assert max(errors(case.evaluate("native"), complete).values()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_an_offset_of_q_and_k_is_no_distance(kind: Kind) -> None:
    if kind != "dot product":
        assert (
            beyond(Case(kind, offset=100.0), 2e-5, 2e-4) == {}
        )  # the inputs themselves have lost two digits


@pytest.mark.parametrize("softening", [1e-6, 1e-3, 0.01])
@pytest.mark.parametrize("kind", ["gravity", "force"])
def test_coincident_pairs_go_where_float64_is(kind: Kind, softening: float) -> None:
    assert beyond(Case(kind, queries=35, duplicates=True, softening=softening), 2e-5, 1e-3) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_those_of_any_number_of_threads(kind: Kind) -> None:
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(Case(kind, batch=1, queries=530, keys=590).evaluate("native"))
    torch.set_num_threads(before)
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

ATTEND = """
import torch
from attention_engine.attention_scores import DotProduct, Mask
from attention_kernels import attend, cannot
x = torch.randn(1, 1, 2, 9, 16)
print(attend(x, x, x, DotProduct(0.25), Mask())[0].isfinite().all().item())
print(cannot("native", x, DotProduct(0.25), Mask(), 0.0, False) or "native")
"""


def start(cache: Path, **environment: str) -> subprocess.Popen[str]:
    own = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)} | environment
    command, pipe = [sys.executable, "-c", ATTEND], subprocess.PIPE
    return subprocess.Popen(command, env=own, text=True, stdout=pipe, stderr=pipe)


def attended(cache: Path, **environment: str) -> tuple[str, str]:
    """Whether it is native or why not, and stderr, of a process of its own."""
    process = start(cache, **environment)
    output, error = process.communicate()
    finite, backend = output.splitlines()
    assert (process.returncode, finite) == (0, "True")
    return backend, error


def compiler(folder: Path, script: str) -> str:
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def libraries(cache: Path) -> list[Path]:
    return sorted((cache / "attention-comparison" / "native").glob("*.so"))


def test_processes_that_start_together_build_it_once_and_the_next_finds_it(tmp_path: Path) -> None:
    counted = compiler(tmp_path, f'echo x >> "{tmp_path}/calls"; exec c++ "$@"')
    processes = [start(tmp_path, CXX=counted) for _ in range(8)]
    told = [process.communicate() for process in processes]
    assert [output.splitlines()[1] for output, _ in told] == ["native"] * 8
    assert sum("building the attention kernel" in error for _, error in told) == 1
    asked_for_its_version = 8
    assert (tmp_path / "calls").read_text().count("x") == asked_for_its_version + 1
    assert len(libraries(tmp_path)) == 1
    assert attended(tmp_path, CXX=counted) == ("native", "")


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"ATTENTION_NATIVE": "0"}, "is switched off by ATTENTION_NATIVE=0"),
        ({"CXX": "no-such-compiler"}, "needs a C++ compiler, and there is none (CXX=no-such-compiler)"),
    ],
)
def test_without_it_attention_goes_on_and_says_why_once(
    environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    backend, error = attended(tmp_path, **environment)
    assert reason in backend and error == f"backend 'native' {reason}: attention goes on without, slower\n"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ('case "$1" in --version) echo 1;; *) echo "x.cpp: error: no" >&2; exit 1;; esac', "error: no"),
        ('case "$1" in --version) echo 1;; esac', "made nothing"),
    ],
)
def test_a_compiler_that_fails_is_told(script: str, reason: str, tmp_path: Path) -> None:
    backend, error = attended(tmp_path, CXX=compiler(tmp_path, script))
    assert "cannot be built" in backend and reason in backend and reason in error
    assert libraries(tmp_path) == []


def test_a_compiler_that_warns_is_heard_by_nobody(tmp_path: Path) -> None:
    warns = compiler(tmp_path, 'echo "warning: beware" >&2; exec c++ "$@"')
    backend, error = attended(tmp_path, CXX=warns)
    assert backend == "native" and "beware" not in error


def test_a_compiler_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = compiler(tmp_path, "sleep 60")
    with pytest.raises(native_build.UnavailableError, match="took more than 1 s"):
        native_build._output_of([hangs], tmp_path, 1.0)


def test_a_library_that_is_damaged_or_of_another_processor_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attended(tmp_path)[0] == "native"
    [library] = libraries(tmp_path)
    library.write_bytes(b"no library")
    assert attended(tmp_path)[0] == "native" and library.stat().st_size > 1000  # built anew
    here = native_build._processor()
    name = native_build._library_name(16, 2)
    monkeypatch.setattr(native_build, "_processor", lambda: here + "\nflags: another")
    assert native_build._library_name(16, 2) != name == library.name


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self").exists(), reason="needs /proc")
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.write_text("a file where the folder would be")
    backend, error = attended(cache)
    assert backend == "native" and "for this process only" in error


@pytest.mark.slow
def test_sanitizers_find_nothing_over_the_cases(tmp_path: Path) -> None:
    """The table of cases once more, with addresses and undefined behaviour watched."""
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libubsan.so")
    ]
    watched = compiler(tmp_path, 'exec g++ -g -fsanitize=address,undefined -fno-sanitize-recover=all "$@"')
    names = "outputs_and_gradients or masks_hold or far_keys or any_number"
    environment = os.environ | {
        "CXX": watched,
        "XDG_CACHE_HOME": str(tmp_path),
        "LD_PRELOAD": " ".join(map(str.strip, runtime)),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(Path(__file__)),
        "-k",
        names,
        "-x",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_score_or_a_tensor_that_is_not_its_own_is_refused_in_words() -> None:
    x = torch.zeros(1, 1, 2, 3, 16)
    gravity, force = Case("gravity", power=3.0), Case("force")
    law = force.score(force.inputs())
    assert isinstance(law, Gravity)
    learned = replace(law, softening=torch.ones(3, 1))
    cases: list[tuple[str, torch.Tensor, Any, dict[str, Any]]] = [
        ("is for float32 on the CPU", x.double(), DotProduct(0.25), {}),
        ("no dropout", x, DotProduct(0.25), {"dropout": 0.1}),
        ("no Manhattan distance", force.inputs()["q"], replace(law, distance="manhattan"), {}),
        ("no learned power and softening", force.inputs()["q"], learned, {}),
        ("distance powers", gravity.inputs()["q"], gravity.score(gravity.inputs()), {}),
        ("at most 256 wide", torch.zeros(1, 1, 1, 3, 300), DotProduct(0.25), {}),
    ]
    for message, q, score, kwargs in cases:
        with pytest.raises(ValueError, match=f"{message}.*use 'tiled'"):
            attend(q, q, q, score, Mask(), backend="native", **kwargs)
