"""Results folders that are analysed once and read by several test files."""

from pathlib import Path

import pytest
from results_fixture import HOLES, make_results

from analyze_results import analyze


@pytest.fixture(scope="session")
def holed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of four models; one cell diverged, and one model has none that is done. Analysed."""
    root = make_results(tmp_path_factory.mktemp("holed"), tasks=("listops",), states=HOLES)
    analyze(root)
    return root
