"""What several test files use: results folders analysed once, runs that compare nothing, one thread."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from results_fixture import HOLES, make_results

import attention_kernels
import run_experiment
from analyze_results import analyze


@pytest.fixture(scope="session")
def holed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of four models; one cell diverged, and one model has none that is done. Analysed."""
    root = make_results(tmp_path_factory.mktemp("holed"), tasks=("listops",), states=HOLES)
    analyze(root)
    return root


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models are trained faster by one thread than by several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which folders a run was to compare: it does not, since figures take longer than tiny cells."""
    folders: list[Path] = []

    def analyze_run(root: Path) -> bool:
        folders.append(root)
        return True

    monkeypatch.setattr(run_experiment, "analyze_run", analyze_run)
    return folders


@pytest.fixture(params=["native", "sdpa and tiled"])
def each_fused_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What modules use where no weights are asked for: the compiled kernel, and what is used without it."""
    without = tuple(name for name in attention_kernels.AUTO_BACKENDS if name != "native")
    if request.param != "native":
        monkeypatch.setattr(attention_kernels, "AUTO_BACKENDS", without)
