"""What several test files use: one thread, a folder analysed once, runs that compare nothing, backends."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from results_fixture import HOLES, make_results, without_figures
from run_cases import Refused

import analyze_results
import attention_kernels
import run_experiment
from tasks import imdb

# Tiny tensors are computed faster by one thread than by several; processes that are started inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """What is imported by now is not gone through by each later collection of garbage, and each cell asks for
    one."""
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def holed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of four models; one cell diverged, and one model has none that is done. Analysed."""
    root = make_results(tmp_path_factory.mktemp("holed"), tasks=("listops",), states=HOLES)
    analyze_results.analyze(root)
    return root


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Call a script's main with what it must refuse by exit code 2 and one line on stderr: that."""

    def call(main: Callable[[list[str]], int], *argv: object) -> str:
        capsys.readouterr()
        try:
            code: int | str | None = main([str(word) for word in argv])
        except SystemExit as ended:  # argparse
            code = ended.code
        streams = capsys.readouterr()
        assert (code, streams.out, streams.err.count("\n")) == (2, "", 1), streams.err
        return streams.err.rstrip("\n")

    return call


@pytest.fixture
def real_reviews() -> Path:
    """IMDb's archive or its tree."""
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    places = [Path(os.environ.get("ATTENTION_IMDB_DIR") or shared), shared]
    source = next(filter(None, (imdb.find_source(place) for place in places if place.exists())), None)
    if source is None:
        pytest.skip("no IMDb here: set ATTENTION_IMDB_DIR to a folder with the archive or its tree")
    return source


@pytest.fixture
def texts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An analysis draws nothing: drawing takes nearly all of its time."""
    without_figures(monkeypatch)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which folders a run was to compare: it does not, since figures take longer than tiny cells."""
    folders: list[Path] = []

    def analyze_run(root: Path) -> bool:
        folders.append(root)
        return True

    monkeypatch.setattr(run_experiment, "analyze_run", analyze_run)
    return folders


FUSED = ("native", "sdpa and tiled")


def use_fused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What modules use where no weights are asked for: the compiled kernel, or what is used without it."""
    without = tuple(name for name in attention_kernels.AUTO_BACKENDS if name != "native")
    if name != "native":
        monkeypatch.setattr(attention_kernels, "AUTO_BACKENDS", without)


@pytest.fixture(params=FUSED)
def each_fused_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fused(request.param, monkeypatch)


@pytest.fixture(params=["weights", *FUSED])
def need_weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a module is asked for weights, which the dense formula makes: all ways to an output."""
    if request.param != "weights":
        use_fused(request.param, monkeypatch)
    return bool(request.param == "weights")
