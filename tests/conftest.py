"""What several test files use: results folders that are analysed once, and a single thread."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from results_fixture import HOLES, make_results

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
