"""Pages in a headless Chromium: in frames of 400 pixels, each with a script that tells what it saw."""

import html
import json
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
addEventListener("unhandledrejection", event => errors.push(String(event.reason)));
addEventListener("securitypolicyviolation", event => errors.push(event.violatedDirective));
console.error = (...words) => errors.push(words.join(" "));
const tell = seen => {
  const images = Array.from(document.images, image => image.complete && image.naturalWidth > 0);
  const room = { width: innerWidth, needed: document.documentElement.scrollWidth };
  parent.postMessage({ [location.pathname.split("/").pop()]: { errors, images, ...room, ...seen } }, "*");
};
</script>"""
AROUND = """<!DOCTYPE html><title>outside</title><pre></pre><script>
const told = {};
addEventListener("message", event => {
  document.querySelector("pre").textContent = JSON.stringify(Object.assign(told, event.data));
});
</script>"""


def told_by(pages: dict[str, tuple[str, str]], folder: Path) -> dict[str, Any]:
    """By name of a page and a script, what the script tells, with errors: what went wrong so far; images:
    whether each was loaded; width, needed: of the page. Skips the test where there is no Chromium."""
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    around = AROUND
    for name, (page, script) in pages.items():
        page = page.replace("<head>", f"<head>{CATCH}", 1)
        page = page.replace("</body>", f"<script>{script}</script></body>", 1)
        (folder / name).write_text(page, encoding="utf-8")
        around += f'<iframe src="{name}" width="400" height="800" style="border: 0"></iframe>'
    (folder / "outside.html").write_text(around, encoding="utf-8")
    address = (folder / "outside.html").as_uri()
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<pre>(.+)</pre>", done.stdout, re.DOTALL)
    told: dict[str, Any] = json.loads(html.unescape(found[1])) if found else {}
    assert set(told) == set(pages), f"a page said nothing: {done.stderr[-2000:]}"
    return told
