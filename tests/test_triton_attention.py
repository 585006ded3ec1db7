"""The Triton backend: its kernels against the dense formula, in Triton's interpreter and, where there is one,
on a GPU; that they compile for GPUs that are not there; and what the backend refuses, in words."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import make
from triton_cases import KINDS, MASKS, Case, Kind, beyond, errors, masks

import attention_kernels
from attention_engine.attention_scores import DotProduct, Mask
from attention_kernels import attend, cannot, fastest_backend, use_backend

HERE = Path(__file__).resolve().parent
LENGTHS = (1, 63, 64, 65, 127, 128, 129, 192, 704)
TOLERANCES = {torch.float32: (5e-6, 5e-5), torch.bfloat16: (2e-2, 6e-2)}  # of outputs, of gradients

each_kind = pytest.mark.parametrize("kind", KINDS)


def need_triton() -> Any:
    return pytest.importorskip("triton", reason="triton is not installed (requirements-dev.txt has it)")


def on_gpu(test: Any) -> Any:
    """Mark a test that runs the kernels themselves."""
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.gpu(no_gpu(test))


# --- without a GPU ----------------------------------------------------------------------------------------


def test_kernels_are_the_dense_formula_in_the_interpreter() -> None:
    version = [int(part) for part in need_triton().__version__.split(".")[:2]]
    if version < [3, 7]:
        pytest.skip("the interpreter of Triton before 3.7 does not run with numpy 2.4 (triton issue 9171)")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "interpreted_triton.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


class AbsentGpu:
    """What Triton asks of a driver before it compiles, for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """A kernel that is compiled where it would be run."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.code = kernel, ""

    def __getitem__(self, grid: Any) -> Any:
        def compile_(*args: Any, **kwargs: Any) -> None:
            self.code = self.kernel.warmup(*args, grid=grid, **kwargs).asm["ptx"]

        return compile_


MASKED = {"shared": True, "mask": masks(2, 1, 19, 35)["pairs, padding and causal"]}
REACHING = {"queries": 1, "keys": 64}  # reads no pairs, but a reach


@pytest.mark.parametrize(
    ("kind", "dtype", "capability", "changes"),
    [
        ("dot product", torch.float32, 80, MASKED),
        ("gravity", torch.bfloat16, 90, REACHING),
        ("force", torch.bfloat16, 80, MASKED),
    ],
)
def test_kernels_compile_for_a_gpu(
    kind: Kind,
    dtype: torch.dtype,
    capability: int,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The compiler refuses more than the interpreter does; it takes a while over large tiles."""
    triton = need_triton()
    from attention_engine import triton_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGpu(capability))
    names = [name for name in dir(kernels) if name.endswith("_kernel")]
    for name in names:
        monkeypatch.setattr(kernels, name, Compiled(getattr(kernels, name)))
    monkeypatch.setattr("attention_kernels._triton_cannot", lambda *args: "")
    monkeypatch.setattr("attention_engine.triton_attention.tile_shape", lambda q: (16, 16))
    Case(kind, dtype=dtype, **changes).evaluate("triton")
    for name in names:
        if name != "row_product_kernel":
            assert ".visible .entry" in getattr(kernels, name).code, name
    used = any("mma" in getattr(kernels, name).code for name in names)
    assert used == (dtype == torch.bfloat16)  # matrix units, and never TF32


def zeros(width: int = 4, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(1, 1, 1, 2, width, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("interpreted", "changes", "reason"),
    [
        ("0", {}, "CUDA"),
        ("0", {"q": zeros(dtype=torch.float64, device="meta")}, "CUDA"),
        ("1", {"dropout": 0.1}, "dropout"),
        ("1", {"need_weights": True}, "weights"),
        ("1", {"mask": Mask(pairs=torch.zeros(1, 1, 1, 2, 3, requires_grad=True))}, "gradient"),
        ("1", {"mask": Mask(query_offset=3)}, "first query at position 0: use 'tiled'"),
        ("1", {"q": zeros(dtype=torch.float64)}, "float64"),
        ("1", {"q": zeros(300)}, "300"),
    ],
)
def test_what_the_backend_cannot_do_it_says(
    interpreted: str, changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_triton()
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    asked: dict[str, Any] = {"q": zeros(), "mask": Mask(), "dropout": 0.0, "need_weights": False}
    assert reason in cannot("triton", score=DotProduct(1.0), **asked | changes)


def test_without_triton_the_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="backend 'triton' needs the package triton, which is not installed"):
        attend(zeros(), zeros(), zeros(), DotProduct(1.0), Mask(), backend="triton")


def test_where_there_is_a_mask_triton_goes_before_pytorchs_own_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need_triton()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    without_native = [name for name in attention_kernels.AUTO_BACKENDS if name != "native"]  # as on a GPU
    monkeypatch.setattr(attention_kernels, "AUTO_BACKENDS", without_native)
    masked = Mask(torch.zeros(1, 2, dtype=torch.bool))
    chosen = [fastest_backend(zeros(), DotProduct(1.0), mask, 0.0, False) for mask in (Mask(), masked)]
    assert chosen == ["sdpa", "triton"]


# --- on a GPU ---------------------------------------------------------------------------------------------


@on_gpu
@each_kind
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_on_a_gpu_kernels_are_the_dense_formula(kind: Kind, dtype: torch.dtype, length: int) -> None:
    need_triton()
    case = Case(kind, queries=length, keys=length, head_dim=32, heads=2, dtype=dtype, device="cuda")
    assert beyond(replace(case, shared=True), *TOLERANCES[dtype]) == {}
    assert beyond(replace(case, decay=None, mask=Mask(causal=True)), *TOLERANCES[dtype]) == {}


@on_gpu
@each_kind
@pytest.mark.parametrize(
    ("mask", "dtype"),
    [(mask, torch.float32) for mask in MASKS] + [("pairs, padding and causal", torch.bfloat16)],
)
def test_on_a_gpu_masks_are_those_of_the_dense_formula(kind: Kind, mask: str, dtype: torch.dtype) -> None:
    need_triton()
    chosen = masks(2, 1, 129, 192, "cuda")[mask]
    case = Case(kind, queries=129, keys=192, head_dim=48, mask=chosen, dtype=dtype, device="cuda")
    assert beyond(case, *TOLERANCES[dtype]) == {}


@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("kind", "head_dim"),
    [
        ("dot product", 100),
        ("gravity", 5),
        ("gravity", 64),
        ("gravity", 128),
        ("gravity", 256),
        ("force", 128),
    ],
)
def test_on_a_gpu_any_head_width(kind: Kind, dtype: torch.dtype, head_dim: int) -> None:
    need_triton()
    case = Case(kind, queries=130, keys=100, head_dim=head_dim, power=3.0, dtype=dtype, device="cuda")
    assert beyond(case, *TOLERANCES[dtype]) == {}


@on_gpu
@each_kind
def test_on_a_gpu_two_runs_are_the_same_and_skipping_changes_nothing(kind: Kind) -> None:
    need_triton()
    mask = masks(2, 1, 704, 704, "cuda")["padding"]
    case = Case(kind, queries=704, keys=704, head_dim=32, decay=(0.3, 0.6), mask=mask, device="cuda")
    first, second = case.evaluate("triton"), case.evaluate("triton")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert max(errors(first, case.evaluate("triton", skip_far_keys=False)).values()) < 2e-6


@on_gpu
@each_kind
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_on_a_gpu_nothing_waits_for_the_device(kind: Kind) -> None:
    need_triton()
    mask = masks(2, 1, 129, 192, "cuda")["padding"]
    case = Case(kind, queries=129, keys=192, mask=mask, dtype=torch.bfloat16, device="cuda")
    leaves = {name: x.detach().requires_grad_() for name, x in case.inputs().items()}
    q, k, v = leaves["q"], leaves["k"], leaves["v"]

    def step() -> None:
        output, _ = attend(q, k, v, case.score(leaves), mask, backend="triton")
        output.sum().backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()  # raises where it waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert q.grad is not None and bool(q.grad.isfinite().all())


@on_gpu
@each_kind
def test_on_a_gpu_memory_is_linear_in_the_length(kind: Kind) -> None:
    need_triton()
    peaks = []
    for length in (4096, 8192):
        case = Case(kind, queries=length, keys=length, head_dim=32, shared=True, device="cuda")
        leaves = {name: x.detach().requires_grad_() for name, x in case.inputs().items()}
        q, k, v = leaves["q"], leaves["k"], leaves["v"]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend(q, k, v, case.score(leaves), Mask(), backend="triton")[0].sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del leaves, q, k, v
    assert peaks[1] < 2.2 * peaks[0]
    assert peaks[1] < 2**27


@on_gpu
@pytest.mark.parametrize("name", ["gravitational", "gravitational multi-timescale force"])
def test_on_a_gpu_modules_train_the_same_by_either_backend(name: str) -> None:
    need_triton()
    module = make(name).cuda()
    x = torch.randn(2, 130, module.embed_dim, device="cuda")
    found = []
    for backend in ("tiled", "triton"):
        module.zero_grad()
        with use_backend(backend):
            module(x, x, x, need_weights=False)[0].square().sum().backward()
        found.append({key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None})
    assert max(errors(found[1], found[0]).values()) < 1e-4
