"""A mistake on the command line of an experiment is one line and exit code 2, before any work."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import SMOKE, Refused

import run_experiment
from data_pipeline import TaskData
from experiment import run_plan
from experiment.run_plan import TUNING_SEEDS

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the package ray is not installed (requirements-ray.txt)"
)
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
MISTAKES = [
    # what is run
    ("--preset smok", "unknown preset 'smok': did you mean 'smoke'?"),
    ("--tasks lstops", "unknown task 'lstops': did you mean 'listops'?"),
    ("--modls conventional", "did you mean '--models'?"),
    ("--models user_models:not_a_class", "user_models has no class not_a_class"),
    ("--models user_models:Narrow", "must have the query's shape (2, 3, 16), got (2, 3, 1)"),
    ("--models user_models:Lazy", "its lazy layers have no parameters to count and train"),
    ("--models conventional conventional", "--models names conventional twice"),
    ("--seeds -1", "--seeds must be at least 0, got -1"),
    ("--seeds 1 1", "--seeds names 1 twice"),
    (f"--seeds {TUNING_SEEDS[1]}", "kept for choosing learning rates"),
    ("--output-dir a_file/below", "a_file is no folder; choose another --output-dir"),
    ("--device gpu", "unknown --device 'gpu': did you mean 'cpu'?"),
    pytest.param("--device cuda", "--device cuda cannot be used here", marks=no_cuda),
    # settings
    ("--embed-dim 10 --num-heads 4", "embed_dim must be a positive multiple of num_heads"),
    ("--batch-size 0", "--batch-size must be at least 1, got 0"),
    ("--learning-rate nan", "--learning-rate must be above 0, got nan"),
    ("--learning-rate 0.01 1e-2", "--learning-rate names 0.01 twice; name each once"),
    ("--learning-rate 0.01 0", "--learning-rate must be above 0, got 0.0"),
    # how it goes on
    ("--max-minutes 0", "--max-minutes must be above 0"),
    ("--max-minutes nan", "--max-minutes must be above 0"),
    ("--retry-failed", "--retry-failed needs --resume"),
    ("--resume absent", "absent is not a results folder"),
    # where it is run
    ("--workers 0", "--workers must be 1 to 1024, got 0"),
    ("--workers -2", "--workers must be 1 to 1024, got -2"),
    ("--workers many", "--workers must be 1 to 1024, got many"),
    ("--threads 0", "--threads must be 1 to 1024, got 0"),
    ("--workers 2 --cell-index 0", "--workers is for many cells, so it cannot go with --cell-index"),
    ("--workers 2 --prepare", "so it cannot go with --prepare"),
    ("--workers 2 --ray", "--ray and --workers exclude each other"),
    ("--ray --cell-index 0", "--ray is for many cells, so it cannot go with --cell-index"),
    ("--cpus-per-cell 1", "--cpus-per-cell needs --ray"),
    ("--gpus-per-cell 0.5", "--gpus-per-cell needs --ray"),
    ("--ray --cpus-per-cell 0", "--cpus-per-cell must be above 0 and finite, got 0.0"),
    ("--ray --gpus-per-cell nan", "--gpus-per-cell must be above 0 and finite, got nan"),
    ("--ray --gpus-per-cell 2", "--gpus-per-cell must be at most 1, got 2.0"),
    ("--ray --gpus-per-cell 1", "--gpus-per-cell needs a run on CUDA"),
    pytest.param("--ray nowhere", "--ray takes HOST:PORT, auto or nothing, got 'nowhere'", marks=needs_ray),
    pytest.param("--ray 127.0.0.1:1", "--ray 127.0.0.1:1: no cluster answers there", marks=needs_ray),
    pytest.param("--ray 127.0.0.1:99999", "--ray 127.0.0.1:99999: no cluster answers there", marks=needs_ray),
    pytest.param("--ray auto", "--ray auto: Could not find any running Ray", marks=needs_ray),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the call, in which nothing may be made; data cannot be had."""

    def no_data(name: str, settings: Any) -> TaskData:
        raise AssertionError("work was begun")

    monkeypatch.setattr(run_plan, "load_task", no_data)
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("")
    return tmp_path


def made(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != "__pycache__"]


@pytest.mark.filterwarnings("ignore")  # of Ray's own
@pytest.mark.parametrize(("argv", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2_before_any_work(
    argv: str, message: str, here: Path, refused: Refused
) -> None:
    assert message in refused(run_experiment.main, *SMOKE, "--output-dir", "out", *argv.split())
    assert made(here) == ["a_file"]


@pytest.mark.parametrize("option", ["ray", "tensorboard"])
def test_without_its_package_an_option_is_refused_with_what_to_install(
    option: str, here: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = refused(run_experiment.main, *SMOKE, f"--{option}", "--output-dir", "out")
    assert f"requirements-{option}.txt" in said and made(here) == ["a_file"]


def test_too_little_space_is_told_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    space = shutil._ntuple_diskusage(2**30, 2**30 - 2**20, 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: space)
    assert "too little space" in refused(run_experiment.main, *SMOKE, "--output-dir", str(tmp_path))
    assert made(tmp_path) == []
