"""The floors of the house: a file imports only from floors below its own, and at its top.

The packages' floors are checked by import-linter too (pyproject.toml), which knows no scripts.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ATTENTION = ("conventional_attention", "gravitational_attention", "multi_timescale_attention")
FLOORS = (
    {"run_experiment"},
    {"experiment"},
    {"train_and_evaluate"},
    {"training"},
    {"analyze_results", "evaluate_performance"},
    {"reporting"},
    {"data_pipeline"},
    {"tasks"},
    {"gravitational_multi_timescale_attention"},
    {*ATTENTION},
    {"attention_module", "timescales"},
    {"attention_kernels"},
    {"attention_engine"},
    {"results_folder"},
    {"command_line"},
)
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}
SOURCES = sorted([*ROOT.glob("*.py"), *(path for name in FLOOR_OF for path in (ROOT / name).glob("*.py"))])
# Imports within functions, each with its reason: an extra, or what is too slow for every worker.
LATE = {
    "run_experiment.py": {"analyze_results"},
    "experiment/executors.py": {"ray"},
    "experiment/tensorboard_log.py": {"torch.utils.tensorboard"},
    "attention_kernels.py": {"attention_engine.triton_attention"},
    "reporting/__init__.py": {"matplotlib"},
}
TORCH_ALONE = {
    "gravitational_multi_timescale_attention",
    *ATTENTION,
    "attention_module",
    "timescales",
    "attention_kernels",
}
STANDARD = {"collections", "contextlib", "dataclasses", "functools", "importlib", "math", "os", "typing"}


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def place(path: Path) -> str:
    """The floor's own name: of a script its stem, of a module its package."""
    return path.stem if path.parent == ROOT else path.parent.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_from_the_floors_below_its_own_at_its_top(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    here, late = place(path), set()
    for node in ast.walk(tree):
        for module in imported(node):
            if node not in tree.body:
                late.add(module)
            other = module.split(".")[0]
            if other in FLOOR_OF and other != here:
                assert FLOOR_OF[other] > FLOOR_OF[here], f"{here} imports {module} from above"
            if here in TORCH_ALONE and other not in FLOOR_OF:
                assert other in {"torch", *STANDARD}, f"{here} needs {module}"
    assert late == LATE.get(str(path.relative_to(ROOT)), set())


def test_every_script_has_its_floor() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} <= set(FLOOR_OF)
