"""The report's page works in a real browser: no errors, figures load, tables sort, nothing overflows a phone.

The page is opened in a frame of 400 pixels, with a script added that clicks and measures, and tells the page
around it what it saw. Skipped where there is no Chromium.
"""

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=20000"),
)
CATCH = """<script>
const errors = [];
addEventListener("error", event => errors.push(event.message), true);
addEventListener("securitypolicyviolation", event => errors.push(event.violatedDirective));
console.error = (...words) => errors.push(words.join(" "));
</script>"""
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
AROUND = """<!DOCTYPE html><title>outside</title><iframe src="inside.html" width="400" height="800"
style="border: 0"></iframe><pre></pre><script>
addEventListener("message", event => { document.querySelector("pre").textContent = event.data; });
</script>"""


@pytest.fixture(scope="module")
def seen(holed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the added script saw."""
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    folder = tmp_path_factory.mktemp("browser")
    page = (holed / "analysis" / "report.html").read_text(encoding="utf-8")
    page = page.replace("<head>", f"<head>{CATCH}", 1).replace("</body>", f"{LOOK}</body>", 1)
    (folder / "inside.html").write_text(page, encoding="utf-8")
    (folder / "outside.html").write_text(AROUND, encoding="utf-8")
    profile = f"--user-data-dir={folder / 'profile'}"
    address = (folder / "outside.html").as_uri()
    command = [BROWSER, *FLAGS, profile, "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<pre>(.+)</pre>", done.stdout, re.DOTALL)
    assert found, f"the page said nothing: {done.stderr[-2000:]}"
    told: dict[str, Any] = json.loads(html.unescape(found[1]))
    return told


def first_number(text: str) -> float:
    found = re.search(r"[-+]?\d+(\.\d+)?", text.replace(",", ""))
    return float(found[0]) if found else math.nan


def test_nothing_goes_wrong_on_the_page(seen: dict[str, Any]) -> None:
    assert seen["errors"] == []


def test_every_figure_loads(seen: dict[str, Any], holed: Path) -> None:
    assert len(seen["images"]) == len(list((holed / "analysis" / "figures").glob("*.png")))
    assert all(seen["images"])


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
