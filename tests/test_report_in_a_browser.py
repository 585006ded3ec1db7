"""The report's page works in a real browser: no errors, figures load, tables sort, nothing overflows a phone.

A script is added to the page that clicks and measures; see browser.py.
"""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from browser import told_by

LOOK = """<script>
addEventListener("load", () => {
  const column = (table, place) => Array.from(table.tBodies[0].rows, row => row.cells[place].textContent);
  const sorted = [];
  for (const table of document.querySelectorAll("table:has(th button)"))
    for (const heading of table.tHead.rows[0].cells) {
      const button = heading.querySelector("button"), seen = { numeric: heading.className === "number" };
      for (const order of ["ascending", "descending"]) {
        button.click();
        if (heading.ariaSort !== order) errors.push(`${heading.textContent} is not ${order}`);
        seen[order] = column(table, heading.cellIndex);
      }
      sorted.push(seen);
    }
  const images = Array.from(document.images, image => image.complete && image.naturalWidth > 0);
  const root = document.documentElement, width = innerWidth, needed = root.scrollWidth;
  parent.postMessage(JSON.stringify({ errors, sorted, images, width, needed }), "*");
});
</script>"""


@pytest.fixture(scope="module")
def seen(holed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the added script saw."""
    page = (holed / "analysis" / "report.html").read_text(encoding="utf-8")
    return told_by(page, LOOK, tmp_path_factory.mktemp("browser"))


def first_number(text: str) -> float:
    found = re.search(r"[-+]?\d+(\.\d+)?", text.replace(",", ""))
    return float(found[0]) if found else math.nan


def test_nothing_goes_wrong_on_the_page(seen: dict[str, Any]) -> None:
    assert seen["errors"] == []


def test_every_figure_loads_or_is_led_to(seen: dict[str, Any], holed: Path) -> None:
    analysis = holed / "analysis"
    led_to = re.findall(r'<a href="(figures/[^"]+)">', (analysis / "report.html").read_text(encoding="utf-8"))
    figures = {str(path.relative_to(analysis)) for path in (analysis / "figures").glob("*.png")}
    assert {*led_to} < figures and len(led_to) == 4
    assert len(seen["images"]) == len(figures) - len(led_to) and all(seen["images"])


def test_each_column_of_numbers_sorts_both_ways_with_what_is_missing_last(seen: dict[str, Any]) -> None:
    columns = [column for column in seen["sorted"] if column["numeric"]]
    assert len(columns) > 20
    for column in columns:
        for order in ("ascending", "descending"):
            numbers = [first_number(text) for text in column[order]]
            there = [number for number in numbers if not math.isnan(number)]
            assert there == sorted(there, reverse=order == "descending")
            assert numbers[: len(there)] == there
    names = next(column for column in seen["sorted"] if not column["numeric"])
    assert names["ascending"] == sorted(names["ascending"]) == names["descending"][::-1]


def test_the_page_fits_a_phone_of_400_pixels(seen: dict[str, Any]) -> None:
    assert seen["needed"] <= seen["width"] == 400
