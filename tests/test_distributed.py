"""Two processes that train one cell: the result of one, written once, and no hang however they end."""

import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import distributed_cases
import pytest
import torch
from cell_cases import make_split, metrics_of, outcome, state_of
from test_resume import stop_at

import run_experiment
from experiment.distributed import dealt, shard
from experiment.stop_request import StoppedError
from tasks.token_dataset import pad_batch

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "run_experiment.py"
TOLERANCE = 1e-5
RUN = ["--preset", "smoke", "--tasks", "listops", "--device", "cpu", "--dropout", "0"]
# Of two cells one: so that no figures are drawn.
CELL = [*RUN, "--models", "fragile:Fragile", "--seeds", "0", "1", "--cell-index", "0"]
FRAGILE = """
import os, pathlib, signal, time
from torch import nn

class Fragile(nn.MultiheadAttention):
    '''Where asked to, kills rank 0 in the second epoch, raises on rank 1 after that; and can be slow.'''
    steps = 0
    def forward(self, query, *rest, **options):
        self.steps += self.training
        if os.environ.get("HARMED"):
            attempt_and_rank = os.environ["TORCHELASTIC_RESTART_COUNT"] + os.environ["RANK"]
            if attempt_and_rank == "00" and self.steps == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            if attempt_and_rank == "11" and self.steps == 2:
                raise RuntimeError("not today")
        time.sleep(float(os.environ.get("SLOW", 0)))
        return super().forward(query, *rest, **options)
"""


pytestmark = pytest.mark.usefixtures("one_thread")


def torchrun(folder: Path, script: Path, *argv: str, restarts: int = 0, **env: str) -> subprocess.Popen[str]:
    """Two ranks of a script, with the folder as working directory."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join(map(str, (folder, HERE, HERE.parent)))
    return subprocess.Popen(
        [*launcher, "--max-restarts", str(restarts), str(script), *argv],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code and output; a hang is a failure."""
    try:
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    return process.returncode, out, err


def exit_codes(err: str) -> list[str]:
    """Of the ranks that torchrun reports."""
    return re.findall(r"exitcode +: (-?\d+)", err)


def only(parent: Path) -> Path:
    [root] = parent.glob("results_*")
    return root


# Two ranks and one


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder that two ranks worked in, and what they found."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.raises(StoppedError):
        distributed_cases.run_tiny(folder / "begun by one", check=stop_at(8 + 2))
    code, _, err = ended(torchrun(folder, HERE / "distributed_cases.py", str(folder)))
    assert code == 0, err
    return folder, torch.load(folder / "found.pt", weights_only=True)


def largest_difference(one: Any, two: Any) -> float:
    """Of the numbers in two nested values that are else equal."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        return max((largest_difference(one[key], two[key]) for key in one), default=0.0)
    if isinstance(one, list):
        assert len(one) == len(two)
        return max((largest_difference(*pair) for pair in zip(one, two, strict=True)), default=0.0)
    if isinstance(one, float):
        return abs(one - two)
    assert one == two
    return 0.0


@functools.cache
def trained_by_one(name: str) -> dict[str, Any]:
    return distributed_cases.trained(distributed_cases.ATTENTIONS[name])


@pytest.mark.parametrize("name", distributed_cases.ATTENTIONS)
def test_two_ranks_take_the_steps_of_one_process(name: str, two: tuple[Path, dict[str, Any]]) -> None:
    one, both = trained_by_one(name), two[1][name]
    assert (len(one["losses"]), len(one["gradients"])) == (24, 2)
    losses = largest_difference(one["losses"], both["losses"])
    gradients = largest_difference(one["gradients"], both["gradients"])
    print(f"{name}: losses differ by at most {losses:.1e}, gradients by {gradients:.1e}")
    assert max(losses, gradients) < TOLERANCE


@pytest.mark.parametrize("name", distributed_cases.ATTENTIONS)
def test_two_ranks_evaluate_to_the_predictions_of_one_process(
    name: str, two: tuple[Path, dict[str, Any]]
) -> None:
    one, both = trained_by_one(name), two[1][name]
    assert both["before"] == one["before"]
    assert both["after"] == one["after"]


def test_a_cell_of_two_ranks_is_that_of_one_process(two: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, found = two
    assert found["cell"] == distributed_cases.run_tiny(tmp_path / "cell") == ("done", "")
    one, both = outcome(tmp_path / "cell"), outcome(folder / "cell")
    assert (one["result"].pop("processes"), both["result"].pop("processes")) == (1, 2)
    for part in ("metrics", "result"):
        assert largest_difference(one[part], both[part]) < TOLERANCE
    assert both["test_predictions"] == one["test_predictions"]


def test_ranks_agree_that_a_loss_on_one_of_them_is_not_finite(two: tuple[Path, dict[str, Any]]) -> None:
    folder, found = two
    expected = ("diverged", "the training loss is nan in epoch 2, step 2")
    assert found["diverged"] == [expected, expected]
    assert state_of(folder / "diverged") == expected


@pytest.mark.parametrize("where", ["in training", "in validation"])
def test_ranks_stopped_by_one_of_them_go_on_to_the_same_bits_also_with_dropout(
    where: str, two: tuple[Path, dict[str, Any]]
) -> None:
    folder, _ = two
    assert outcome(folder / f"wet, stopped {where}") == outcome(folder / "wet")


def test_what_two_ranks_began_one_process_finishes_and_vice_versa(
    two: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = two
    assert state_of(folder / "stopped") == ("interrupted", "enough")
    assert distributed_cases.run_tiny(folder / "stopped") == ("done", "")
    for finished in ("stopped", "begun by one"):
        one, both = outcome(folder / "cell")["metrics"], outcome(folder / finished)["metrics"]
        assert largest_difference(one, both) < TOLERANCE


# One rank


def test_one_process_has_all_of_a_batch_and_all_batches() -> None:
    split = make_split(5, 0)
    batch = pad_batch(split, torch.arange(5).numpy())
    assert shard(batch) is batch
    assert list(dealt("abc")) == ["a", "b", "c"]


# The whole run


@pytest.fixture
def fragile(tmp_path: Path) -> Path:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    return tmp_path


def test_where_a_rank_is_killed_or_fails_all_are_started_anew_and_go_on_to_the_same_result(
    fragile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = ended(torchrun(fragile, SCRIPT, *CELL, restarts=2, HARMED="1"))
    assert code == 0, err
    assert "exitcode: -9" in err and "RuntimeError: not today" in err
    assert out.count("goes on after epoch 1") == 2
    assert out.count("taken over") == 1  # the lock of the killed rank 0; else it was released
    assert len(re.findall("epoch 1/2", out)) == len(re.findall("epoch 2/2", out)) == 1
    [killed] = only(fragile).glob("*/*/seed0")

    (fragile / "one").mkdir()
    monkeypatch.syspath_prepend(fragile)
    assert run_experiment.main([*CELL, "--output-dir", str(fragile / "one")]) == 0
    [whole] = only(fragile / "one").glob("*/*/seed0")
    assert state_of(killed) == state_of(whole) == ("done", "")
    one, both = outcome(whole), outcome(killed)
    assert (one["result"].pop("processes"), both["result"].pop("processes")) == (1, 2)
    assert largest_difference([one["metrics"], one["result"]], [both["metrics"], both["result"]]) < TOLERANCE
    assert both["test_predictions"] == one["test_predictions"]


def test_ranks_stopped_by_a_signal_or_their_time_limit_end_in_order_and_go_on(fragile: Path) -> None:
    process = torchrun(fragile, SCRIPT, *CELL, "--max-epochs", "50", restarts=1, SLOW="0.05")
    assert process.stdout is not None
    for line in process.stdout:
        if "epoch 1/50" in line:
            break
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code != 0 and time.monotonic() - started < 20
    assert err.count("run_experiment.py: stopped by SIGTERM") == 1
    [cell] = only(fragile).glob("*/*/seed0")
    assert state_of(cell) == ("interrupted", "stopped by SIGTERM")
    assert not (cell / "lock.json").exists()

    again = ["--resume", str(only(fragile)), "--cell-index", "0", "--max-minutes", "0.0001"]
    code, out, err = ended(torchrun(fragile, SCRIPT, *again, restarts=1))
    assert code == 1 and set(exit_codes(err)) <= {"75", "-15"} and "75" in exit_codes(err)
    assert err.count("the time limit of 0.0001 minutes was reached") == 1  # a restart would say it again
    assert len(re.findall("goes on after epoch", out)) == 1
    assert state_of(cell)[0] == "interrupted"
    assert [row["epoch"] for row in metrics_of(cell)] == list(range(1, len(metrics_of(cell)) + 1))


def test_bad_arguments_are_one_line_and_exit_code_2_on_every_rank(tmp_path: Path) -> None:
    cases = {"--learning-rat ": ["--learning-rat", "1"], "nowhere": ["--resume", "nowhere"]}
    launched = {
        message: torchrun(tmp_path, SCRIPT, "--device", "cpu", *argv) for message, argv in cases.items()
    }
    for message, process in launched.items():
        code, out, err = ended(process)
        [line] = [line for line in err.splitlines() if line.startswith("run_experiment.py:")]
        assert message in line
        assert code == 1 and set(exit_codes(err)) <= {"2", "-15"} and "2" in exit_codes(err)
        assert out == "" and list(tmp_path.iterdir()) == []
