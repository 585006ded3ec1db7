"""What `pip install .` installs: the attention modules and their engine, and nothing with a common name."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/method.md"))
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
MODULES = (
    *("attention_kernels", "attention_module", "conventional_attention", "gravitational_attention"),
    *("gravitational_multi_timescale_attention", "multi_timescale_attention", "timescales"),
)
ENGINE = [path for path in (ROOT / "attention_engine").iterdir() if path.is_file()]  # kernels' sources too


def run(*command: object, cwd: Path, **environment: str) -> str:
    words, env = [str(word) for word in command], os.environ | environment
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of all sources, so that nothing is written beside them."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    scripts, packages = ROOT.glob("*.py"), ROOT.glob("*/*.py")
    for source in (*scripts, *packages, *ENGINE, ROOT / "pyproject.toml", ROOT / "README.md"):
        target = copy / source.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(source, target)
    build = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", out, ".")
    run(sys.executable, *build, cwd=copy)
    [found] = out.glob("*.whl")
    return found


def test_the_wheel_holds_the_modules_and_the_engine_and_needs_torch_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        [metadata] = [name for name in archive.namelist() if name.endswith("METADATA")]
        needed = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist")
    engine = {path.relative_to(ROOT).as_posix() for path in ENGINE}
    assert names == {f"{module}.py" for module in MODULES} | engine
    assert needed == ["torch>=2.6"]


def test_the_readmes_snippets_run_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    """Without the clone on the path."""
    place = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    assert len(SNIPPETS) == 2
    script = tmp_path / "snippets.py"
    parts = [f"exec({snippet!r}, {{}})\n" for snippet in SNIPPETS]
    script.write_text("".join(parts) + "import attention_module\nprint(attention_module.__file__)\n")
    assert run(sys.executable, script, cwd=tmp_path, PYTHONPATH=str(place)).startswith(str(place))
