"""A page in a headless Chromium: in a frame of 400 pixels, with a script that acts and tells what it saw."""

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
</script>"""
AROUND = """<!DOCTYPE html><title>outside</title><iframe src="inside.html" width="400" height="800"
style="border: 0"></iframe><pre></pre><script>
addEventListener("message", event => { document.querySelector("pre").textContent = event.data; });
</script>"""


def told_by(page: str, script: str, folder: Path) -> dict[str, Any]:
    """What `script` posts to the page around it, as JSON; it has `errors`, what went wrong so far. Skips the
    test where there is no Chromium."""
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    page = page.replace("<head>", f"<head>{CATCH}", 1).replace("</body>", f"{script}</body>", 1)
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
