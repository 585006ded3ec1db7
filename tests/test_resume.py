"""A cell that was stopped, broken or damaged resumes to the same bits, and nothing is lost that was whole."""

import itertools
import os
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from cell_cases import CONVENTIONAL, TRAINING, attention_of, metrics_of, outcome, run_tiny, state_of
from torch import nn

from experiment.stop_request import StoppedError
from gravitational_attention import GravitationalAttention
from results_folder import WriteError, read_json
from train_and_evaluate import TrainingSettings
from training.checkpoints import BEST, LAST, PREVIOUS, CheckpointError, read_checkpoint, write_checkpoint
from training.checkpoints import _serialized as serialized
from training.training_progress import Progress

RICHEST = attention_of("gravitational_multi_timescale")  # has most kinds of parameters
GRAVITATIONAL = partial(GravitationalAttention, 8, 2)
SHORT = replace(TRAINING, max_epochs=2)
EPOCH = 5 + 3  # checks of an epoch: after each step and each batch of its validation


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of a cell that ran without interruption."""
    torch.set_num_threads(1)  # as each test does, but only after this
    folder = tmp_path_factory.mktemp("whole")
    assert run_tiny(folder, RICHEST, SHORT) == ("done", "")
    return outcome(folder)


def run_until_stopped(folder: Path, number: int, attention: Callable[[], nn.Module] = RICHEST) -> None:
    """Run a cell until its check, asked for the `number`-th time, asks to stop."""
    check = Mock(side_effect=[*[None] * (number - 1), StoppedError("enough")])
    with pytest.raises(StoppedError):
        run_tiny(folder, attention, SHORT, check=check)


def resumed(folder: Path, attention: Any = RICHEST, training: TrainingSettings = SHORT) -> list[str]:
    """Run a cell, which must succeed, in a folder as it was left; what it notes."""
    progress = Mock(spec=Progress)
    assert run_tiny(folder, attention, training, progress=progress) == ("done", "")
    return [call.args[0] for call in progress.note.call_args_list]


# Stopped


@pytest.mark.parametrize(
    ("number", "epochs"), [(EPOCH, 0), (2 * EPOCH + 2, 2)], ids=["in validation", "in the test"]
)
def test_a_stopped_cell_loses_its_epoch_and_resumes_to_the_same_bits(
    number: int, epochs: int, tmp_path: Path, whole: dict[str, Any]
) -> None:
    run_until_stopped(tmp_path, number)
    assert state_of(tmp_path) == ("interrupted", "enough")
    assert resumed(tmp_path) == ([f"resumes after epoch {epochs}"] if epochs else [])
    assert outcome(tmp_path) == whole


def test_a_cell_stopped_in_its_second_epoch_counts_the_time_and_the_memory_of_earlier_processes(
    tmp_path: Path, whole: dict[str, Any]
) -> None:
    run_until_stopped(tmp_path, EPOCH + 4)
    saved = read_checkpoint(tmp_path / LAST)
    write_checkpoint(tmp_path, saved | {"peak": 2**50, "seconds": 1000.0})
    assert resumed(tmp_path) == ["resumes after epoch 1"]
    assert outcome(tmp_path) == whole
    assert metrics_of(tmp_path)[1]["peak_memory_bytes"] in (2**50, None)
    assert read_json(tmp_path / "result.json")["wall_seconds"] > 1000


# Damaged


class Payload:
    """Makes a folder where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


MALICIOUS = serialized({"rows": Payload()})


@pytest.mark.parametrize(
    ("contents", "why"),
    [
        (serialized({})[:-7], "it has no checksum at its end: it is truncated, or of an earlier version"),
        (serialized({"checkpoint_version": 99}), r"another version .*\(format 99, this"),
        (MALICIOUS, r"no checkpoint of ours \(UnpicklingError"),
    ],
    ids=["cut", "later", "malicious"],
)
def test_a_checkpoint_that_cannot_be_used_is_refused_with_the_reason_and_not_executed(
    contents: bytes, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a payload would leave its trace
    (tmp_path / LAST).write_bytes(contents)
    with pytest.raises(CheckpointError, match=why):
        read_checkpoint(tmp_path / LAST)
    assert [path.name for path in tmp_path.iterdir()] == [LAST]


@pytest.mark.parametrize("flips", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_is_found(flips: int, tmp_path: Path) -> None:
    path, draws = tmp_path / LAST, random.Random(flips)
    contents = serialized({"checkpoint_version": 99, "weights": torch.arange(100.0)})
    for _ in range(flips):
        changed = bytearray(contents)
        changed[draws.randrange(len(changed))] ^= 1 << draws.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match="checksum"):
            read_checkpoint(path)


@pytest.mark.parametrize("damaged", [(LAST,), (LAST, PREVIOUS)], ids=len)
def test_where_checkpoints_are_damaged_the_one_before_or_the_start_is_gone_on_from_to_the_same_bits(
    damaged: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cell"
    run_until_stopped(folder, 2 * EPOCH + 2)
    for name in damaged:
        (folder / name).write_bytes(MALICIOUS)
    said = resumed(folder)
    for name, note in zip(damaged, said, strict=False):
        assert f"{name} cannot be used and is set aside as {name}.set_aside" in note
        assert (folder / f"{name}.set_aside").read_bytes() == MALICIOUS
    assert said[len(damaged) :] == ["resumes after epoch 1"][len(damaged) - 1 :]
    assert [note for note in resumed(folder) if "set aside" in note] == []  # that is said once
    assert outcome(folder) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["cell"]


@pytest.mark.parametrize(
    ("before", "after", "rate", "why"),
    [
        (CONVENTIONAL, CONVENTIONAL, 2e-2, "of other settings"),
        (GRAVITATIONAL, partial(GRAVITATIONAL, softening=0.2), 1e-2, "of other settings"),
        (CONVENTIONAL, GRAVITATIONAL, 1e-2, "does not fit the model"),
    ],
)
def test_a_checkpoint_of_other_settings_or_another_model_is_never_resumed_from(
    before: partial[nn.Module], after: partial[nn.Module], rate: float, why: str, tmp_path: Path
) -> None:
    training = replace(SHORT, learning_rate=rate)
    run_until_stopped(tmp_path, EPOCH + 2, before)
    assert why in resumed(tmp_path, after, training)[0]
    resumed(tmp_path / "fresh", after, training)
    assert outcome(tmp_path) == outcome(tmp_path / "fresh")


# Broken


def test_a_checkpoint_that_cannot_be_read_back_never_replaces_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for epoch in (1, 2):
        write_checkpoint(tmp_path, {"epoch": epoch})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("training.checkpoints._serialized", lambda state: b"what a broken disk makes of it")
    with pytest.raises(WriteError, match="cannot be read back"):
        write_checkpoint(tmp_path, {"epoch": 3})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert before.keys() == {LAST, PREVIOUS}


@pytest.mark.parametrize(
    ("file", "time"), [(BEST, 1), (PREVIOUS, 1), (LAST, 2), ("metrics.jsonl", 2), ("result.json", 1)]
)
def test_a_write_that_fails_leaves_old_or_new_files_and_the_cell_resumes_to_the_same_bits(
    file: str, time: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    times, move = itertools.count(1), Path.replace

    def full_disk(path: Path, target: Path) -> Path:
        if target.name == file and next(times) == time:
            raise OSError(28, "No space left on device")
        return move(path, target)

    with monkeypatch.context() as patch, pytest.raises(WriteError, match="No space left on device"):
        patch.setattr(Path, "replace", full_disk)
        run_tiny(tmp_path, RICHEST, SHORT)
    names = [path.name for path in tmp_path.iterdir()]
    assert not [name for name in names if name.startswith(".")]
    assert all(read_checkpoint(tmp_path / name) for name in (LAST, PREVIOUS) if name in names)
    assert "metrics.jsonl" not in names or metrics_of(tmp_path)
    (tmp_path / f".result.json.{'0' * 16}").write_text("left over by a killed writer, and cleared away")
    resumed(tmp_path)
    assert outcome(tmp_path) == whole and not list(tmp_path.glob(".*"))
