"""Each benchmark runs at tiny sizes, writes what it says, and compares like with like."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import Refused

from benchmarks import attention_speed, training_step
from benchmarks.attention_speed import MECHANISMS, Case, SpeedSettings, make_attention
from benchmarks.benchmarking import take_turns

CPU = torch.device("cpu")


def read_results(folder: Path, benchmark: str) -> dict[str, Any]:
    [path] = folder.glob(f"*_{benchmark}.json")
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d_cpu-\d+-threads_{benchmark}", path.stem)
    results: dict[str, Any] = json.loads(path.read_text())
    assert results["environment"]["torch"]
    assert results["environment"]["threads"] >= 1
    return results


def test_attention_speed_writes_a_table_a_figure_and_ratios(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--lengths", "16", "24", "--head-dim", "4", "--batch-heads", "2"]
    arguments = [*sizes, "--repeats", "1", "--no-memory", "--device", "cpu"]
    assert attention_speed.main([*arguments, "--output-dir", str(tmp_path)]) == 0
    rows = read_results(tmp_path, "attention_speed")["results"]
    measured = {(row["mechanism"], row["backend"]) for row in rows}
    assert {(name, backend) for name in MECHANISMS for backend in ("dense", "tiled")} < measured
    assert ("gravitational softmax", "differences") in measured
    assert {row["length"] for row in rows} == {16, 24}
    assert all(
        row["both"]["ratio"] > 0 and row["both"]["seconds"] > row["forward"]["seconds"] for row in rows
    )
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png", ".pdf"}
    assert "combined force, tiled | 24" in capsys.readouterr().out


def test_peak_memory_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    arguments = ["--lengths", "32", "--batch-size", "2", "--repeats", "1", "--models", "gravitational"]
    arguments += ["--backends", "auto", "--threads", "1", "--device", "cpu"]
    sizes = ["--embed-dim", "16", "--num-layers", "1", "--feed-forward-dim", "16"]
    assert training_step.main([*arguments, *sizes, "--output-dir", str(tmp_path)]) == 0
    [row] = read_results(tmp_path, "training_step")["results"]
    assert row["model"] == "gravitational"
    assert row["tokens_per_second"] == pytest.approx(64 / row["step"]["seconds"])
    assert row["peak_bytes"] is None or 5e7 < row["peak_bytes"] < 5e9


def test_the_making_of_listops_is_timed(tmp_path: Path) -> None:
    """In a process of its own, which binds itself to one core."""
    script = Path(training_step.__file__).with_name("listops_generation.py")
    command = [sys.executable, str(script), "--expressions", "60", "--write"]
    done = subprocess.run([*command, "--json", "found.json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["expressions"] == 60 and found["tokens"] > 60 * 500
    assert found["seconds"] > 0 and found["seconds_to_write"] > 0


@pytest.mark.parametrize("mechanism", list(MECHANISMS))
def test_every_backend_is_given_the_same_attention(mechanism: str) -> None:
    settings = SpeedSettings(head_dim=4)
    backends = ["dense", "tiled"] + ["differences"] * (mechanism == "gravitational softmax")
    outputs = [make_attention(Case(mechanism, backend, 20), settings, CPU)[1]() for backend in backends]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


def test_each_case_is_compared_with_the_anchor_just_before_it() -> None:
    """The machine halves its speed at every turn: neighbours still tell that a case takes twice the time."""
    turn = {"anchor": 1.0}

    def anchor() -> dict[str, float]:
        turn["anchor"] *= 2
        return {"both": turn["anchor"]}

    found = take_turns(anchor, {"case": lambda: {"both": 2 * turn["anchor"]}}, repeats=3)
    assert found["case"]["both"]["ratio"] == 2.0
    assert found["case"]["both"]["ratio_of_least"] == 2.0


@pytest.mark.parametrize("script", [attention_speed, training_step])
@pytest.mark.parametrize(
    "wrong", [["--backends", "denes"], ["--repeats", "0"], ["--device", "nowhere"], ["--lengths", "-1"]]
)
def test_a_mistake_is_one_line_and_exit_code_2(script: Any, wrong: list[str], refused: Refused) -> None:
    assert refused(script.main, *wrong)


def test_kernels_for_a_gpu_are_refused_on_the_cpu_before_anything_is_measured(
    tmp_path: Path, refused: Refused
) -> None:
    new = tmp_path / "new"
    assert refused(attention_speed.main, "--device", "cpu", "--backends", "triton", "--output-dir", new)
    assert not new.exists()
