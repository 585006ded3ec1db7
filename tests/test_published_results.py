"""What docs/findings.md says in tables is what `analyze_results.py` makes of published_results/."""

import functools
import itertools
import re
from pathlib import Path

import pytest

from reporting.analysis import make_analysis
from reporting.run_results import read_joined
from reporting.summary_tables import tables
from reporting.text_tables import markdown_table
from results_folder import read_results

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "published_results"
# A table stands behind a comment that names its folders and, where it is not the default, the baseline:
# <!-- quick ablations_listops; baseline gravitational -->
TABLE = re.compile(r"<!-- ([\w ]+?)(?:; baseline ([\w,=.:]+))? -->\n\n((?:\|.*\n)+)")
QUOTED = [match.groups() for match in TABLE.finditer((ROOT / "docs" / "findings.md").read_text())]
FOLDERS = sorted(path.parent.name for path in PUBLISHED.glob("*/config.json"))


@functools.cache
def lines_of(folders: tuple[str, ...], baseline: str | None) -> set[str]:
    """All lines of the tables of an analysis."""
    analysis = make_analysis(read_joined([PUBLISHED / name for name in folders]), baseline)
    return {line for table in tables(analysis) for line in markdown_table(table).splitlines()}


@pytest.mark.parametrize(("folders", "baseline", "rows"), QUOTED, ids=itertools.count(1))
def test_each_table_of_the_findings_is_made_by_the_analysis(folders: str, baseline: str, rows: str) -> None:
    made = lines_of(tuple(folders.split()), baseline or None)
    assert [row for row in rows.splitlines() if row not in made] == []


def test_every_published_folder_is_quoted_and_none_that_is_not_there() -> None:
    assert FOLDERS
    assert {name for folders, *_ in QUOTED for name in folders.split()} == set(FOLDERS)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_published_folder_says_where_it_comes_from_and_holds_no_weights(name: str) -> None:
    results = read_results(PUBLISHED / name)
    assert results.config["command"].startswith("python run_experiment.py")
    assert re.fullmatch(r"[0-9a-f]{40}", results.environment["git_commit"])
    assert results.environment["git_dirty"] is False
    assert not list((PUBLISHED / name).rglob("*.pt"))
