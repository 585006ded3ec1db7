"""The README tells the truth of today: its snippets run, its files, options and shapes are the code's."""

import re
from pathlib import Path
from typing import Any

import torch

from experiment.models import MODELS
from experiment.run_plan import PRESETS
from run_experiment import make_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README + METHOD, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"^    (?:pip .*&& )?(python .*?)(?:  #.*)?$", README, re.MULTILINE)


def test_each_snippet_runs_and_has_the_shapes_that_its_comments_say() -> None:
    checked = 0
    for snippet in SNIPPETS:
        torch.manual_seed(0)
        names: dict[str, Any] = {}
        exec(compile(snippet, "README.md", "exec"), names)
        assert bool(names["output"].isfinite().all())
        for line in snippet.splitlines():
            found = re.match(r"(\w+(?:, \w+)*) = .*?# ((?:\(\d+(?:, \d+)*\)(?:, )?)+)", line)
            if found:
                shapes = [str(tuple(names[name].shape)) for name in found[1].split(", ")]
                assert shapes == re.findall(r"\(.*?\)", found[2]), line
                checked += len(shapes)
    assert checked >= 5


def test_every_file_of_the_top_level_is_in_the_file_map_and_every_named_file_exists() -> None:
    files = {path.name for path in ROOT.glob("*.py")}
    file_map = README.split("## Files")[1].split("\n## ")[0]
    named = set(re.findall(r"`([\w/.]+\.py)`", file_map))
    assert files - named == set()
    assert [name for name in named if not any(ROOT.rglob(name))] == []
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders - set(re.findall(r"`(\w+)/`", file_map)) == set()


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_commands_name_scripts_and_options_that_exist() -> None:
    options = set(make_parser().options())
    assert len(COMMANDS) >= 8
    for command in COMMANDS:
        script = command.split()[1]
        assert script == "-m" or (ROOT / script).is_file(), command
        if script == "run_experiment.py":
            assert set(re.findall(r"--[\w-]+", command)) <= options, command


def test_every_preset_and_model_is_described() -> None:
    assert [name for name in (*PRESETS, *MODELS) if f"`{name}`" not in README] == []
