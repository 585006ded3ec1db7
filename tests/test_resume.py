"""A cell that was stopped, broken or damaged goes on to the same bits, and nothing is lost that was whole."""

import math
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cell_cases import (
    CONVENTIONAL,
    TRAINING,
    attention_of,
    metrics_of,
    outcome,
    run_tiny,
    state_of,
)
from torch import Tensor, nn

import results_folder
from experiment.stop_request import StoppedError
from results_folder import WriteError
from train_and_evaluate import TrainingSettings
from training.checkpoints import (
    LAST,
    PREVIOUS,
    CheckpointError,
    _serialized,
    read_checkpoint,
    write_checkpoint,
)
from training.training_progress import Progress

MECHANISMS: dict[str, Callable[[], nn.Module]] = {
    name: attention_of(name) for name in ("conventional", "gravitational_multi_timescale")
}
CHECKS = 3 * (5 + 3) + 3 + 1  # of a cell: after each step and batch of validation and test, and at the end


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By mechanism, the folder of a cell that ran without interruption."""
    folders = {name: tmp_path_factory.mktemp(name) for name in MECHANISMS}
    for name, folder in folders.items():
        assert run_tiny(folder, MECHANISMS[name]) == ("done", "")
    return folders


class Notes(Progress):
    """A watcher that remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def stop_at(number: int) -> Callable[[], None]:
    """A check that asks to stop when it is called for the `number`-th time."""
    calls = iter(range(1, 10_000))

    def check() -> None:
        if next(calls) == number:
            raise StoppedError("enough")

    return check


def run_until_stopped(folder: Path, number: int, attention: Callable[[], nn.Module] = CONVENTIONAL) -> None:
    with pytest.raises(StoppedError):
        run_tiny(folder, attention, check=stop_at(number))


# Stopped


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("number", [1, 8, 12, 25])
def test_a_cell_stopped_at_any_step_goes_on_to_the_same_bits(
    name: str, number: int, tmp_path: Path, whole: dict[str, Path]
) -> None:
    run_until_stopped(tmp_path, number, MECHANISMS[name])
    assert state_of(tmp_path) == ("interrupted", "enough")
    assert run_tiny(tmp_path, MECHANISMS[name]) == ("done", "")
    assert outcome(tmp_path) == outcome(whole[name])


@pytest.mark.slow
def test_a_cell_stopped_at_every_step_goes_on_to_the_same_bits(
    tmp_path: Path, whole: dict[str, Path]
) -> None:
    for number in range(1, CHECKS + 1):
        folder = tmp_path / str(number)
        run_until_stopped(folder, number)
        assert run_tiny(folder) == ("done", "")
        assert outcome(folder) == outcome(whole["conventional"])
    assert run_tiny(tmp_path / "whole", check=stop_at(CHECKS + 1)) == ("done", "")


def test_what_is_lost_of_a_stop_is_the_epoch_and_what_a_cell_resumes_from_is_said(tmp_path: Path) -> None:
    run_until_stopped(tmp_path, 8 + 2)
    assert len(metrics_of(tmp_path)) == read_checkpoint(tmp_path / LAST)["epoch"] == 1
    notes = Notes()
    run_tiny(tmp_path, progress=notes)
    assert notes.notes == ["resumes after epoch 1"]


def test_the_memory_of_earlier_processes_is_counted(tmp_path: Path) -> None:
    run_until_stopped(tmp_path, 12)
    saved = read_checkpoint(tmp_path / LAST)
    write_checkpoint(tmp_path, saved | {"peak": 2**50})
    run_tiny(tmp_path)
    assert metrics_of(tmp_path)[1]["peak_memory_bytes"] in (2**50, None)


# Checkpoints


@pytest.mark.parametrize("kept", [0.0, 0.99])
def test_a_truncated_checkpoint_is_set_aside_and_the_one_before_it_used_and_that_is_said_once(
    kept: float, tmp_path: Path, whole: dict[str, Path]
) -> None:
    run_until_stopped(tmp_path, 8 + 8 + 2)
    last = (tmp_path / LAST).read_bytes()
    (tmp_path / LAST).write_bytes(last[: int(kept * len(last))])
    notes = Notes()
    with pytest.raises(StoppedError):
        run_tiny(tmp_path, progress=notes, check=stop_at(1))
    assert len(notes.notes) == 2
    assert (
        "checkpoint_last.pt cannot be used and is set aside as checkpoint_last.pt.set_aside" in notes.notes[0]
    )
    assert notes.notes[1] == "resumes after epoch 1"
    assert (tmp_path / f"{LAST}.set_aside").read_bytes() == last[: int(kept * len(last))]
    again = Notes()
    run_tiny(tmp_path, progress=again)
    assert [note for note in again.notes if "set aside" in note] == []
    assert outcome(tmp_path) == outcome(whole["conventional"])


def test_where_no_checkpoint_can_be_used_the_cell_starts_anew_to_the_same_bits(
    tmp_path: Path, whole: dict[str, Path]
) -> None:
    run_until_stopped(tmp_path, 8 + 8 + 2)
    for name in (LAST, PREVIOUS):
        (tmp_path / name).write_bytes(b"PK")
    notes = Notes()
    assert run_tiny(tmp_path, progress=notes) == ("done", "")
    assert sum("set aside" in note for note in notes.notes) == 2
    assert outcome(tmp_path) == outcome(whole["conventional"])


def flipped_checkpoint(path: Path, draws: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("flips", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_is_found(flips: int, tmp_path: Path, whole: dict[str, Path]) -> None:
    draws = random.Random(flips)
    for _ in range(flips):
        path = tmp_path / LAST
        shutil.copy(whole["conventional"] / LAST, path)
        flipped_checkpoint(path, draws)
        with pytest.raises(CheckpointError, match="checksum"):
            read_checkpoint(path)


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_a_malicious_checkpoint_is_set_aside_and_nothing_in_it_is_executed(tmp_path: Path) -> None:
    run_until_stopped(tmp_path, 8 + 2)
    saved = read_checkpoint(tmp_path / LAST)
    payload = saved | {"rows": Payload(str(tmp_path / "hacked"))}
    (tmp_path / LAST).write_bytes(_serialized(payload))  # with a checksum that is right
    torch.save(payload, tmp_path / PREVIOUS)
    notes = Notes()
    run_tiny(tmp_path, progress=notes)
    assert "it is no checkpoint of ours (UnpicklingError" in notes.notes[0]
    assert "set aside" in notes.notes[1]
    assert not (tmp_path / "hacked").exists()


def test_a_checkpoint_of_the_version_before_is_told_plainly(tmp_path: Path) -> None:
    torch.save({"schema_version": 1, "epoch": 1, "model": {}, "optimizer": {}}, tmp_path / LAST)
    notes = Notes()
    assert run_tiny(tmp_path, progress=notes)[0] == "done"
    assert "no checksum at its end: it is truncated, or of an earlier version" in notes.notes[0]
    contents = _serialized({"checkpoint_version": 99})
    (tmp_path / LAST).write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"another version of this program \(format 99"):
        read_checkpoint(tmp_path / LAST)


@pytest.mark.parametrize(
    ("attention", "training", "message"),
    [
        (CONVENTIONAL, TrainingSettings(batch_size=8, learning_rate=2e-2, max_epochs=3), "of other settings"),
        (MECHANISMS["gravitational_multi_timescale"], TRAINING, "does not fit the model"),
    ],
)
def test_a_checkpoint_of_other_settings_or_another_model_is_never_gone_on_from(
    attention: Callable[[], nn.Module], training: TrainingSettings, message: str, tmp_path: Path
) -> None:
    run_until_stopped(tmp_path, 8 + 2)
    notes = Notes()
    assert run_tiny(tmp_path, attention, training, progress=notes) == ("done", "")
    assert message in notes.notes[0]
    run_tiny(tmp_path / "fresh", attention, training)
    assert outcome(tmp_path) == outcome(tmp_path / "fresh")


def test_a_checkpoint_that_cannot_be_read_back_never_replaces_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until_stopped(tmp_path, 8 + 8 + 2)
    before = {name: (tmp_path / name).read_bytes() for name in (LAST, PREVIOUS)}
    state = read_checkpoint(tmp_path / LAST)
    monkeypatch.setattr("training.checkpoints._serialized", lambda state: b"what a broken disk makes of it")
    with pytest.raises(WriteError, match="cannot be read back"):
        write_checkpoint(tmp_path, state)
    assert {name: (tmp_path / name).read_bytes() for name in (LAST, PREVIOUS)} == before
    assert not list(tmp_path.glob(".*"))


def test_without_hard_links_the_checkpoint_before_is_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Path]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    run_until_stopped(tmp_path, 8 + 8 + 2)
    assert read_checkpoint(tmp_path / PREVIOUS)["epoch"] == 1
    assert not list(tmp_path.glob(".*"))


# Broken: every write of a cell fails once


class Breaker:
    """Lets the `number`-th of all calls to open, write, fsync and replace fail as on a full disk."""

    def __init__(self, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number, self.calls = number, 0
        fsync, replace = os.fsync, Path.replace
        opened = Path.open

        def broken(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def instead(*args: Any, **options: Any) -> Any:
                self.count(name)
                return call(*args, **options)

            return instead

        def open_(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            file = opened(path, mode, *args, **options)
            if mode == "xb":
                try:
                    self.count("open")
                except OSError:
                    file.close()
                    raise
                return BrokenFile(file, self)
            return file

        monkeypatch.setattr(os, "fsync", broken("fsync", fsync))
        monkeypatch.setattr(Path, "replace", broken("replace", replace))
        monkeypatch.setattr(Path, "open", open_)

    def count(self, name: str) -> None:
        self.calls += 1
        if self.calls == self.number:
            raise OSError(28, f"No space left on device ({name})")


class BrokenFile:
    """A file whose writes are counted; the one that fails has written half of it."""

    def __init__(self, file: Any, breaker: Breaker) -> None:
        self.file, self.breaker = file, breaker

    def __enter__(self) -> "BrokenFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> Any:
        try:
            self.breaker.count("write")
        except OSError:
            self.file.write(memoryview(data)[: len(data) // 2])
            raise
        return self.file.write(data)


def check_broken_write(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> bool:
    """Break the cell's `number`-th write call, look at what is left, go on. Whether there was such a call."""
    with monkeypatch.context() as patch:
        breaker = Breaker(number, patch)
        try:
            state, _ = run_tiny(folder)
        except OSError as error:
            assert "No space left on device" in str(error)
        else:
            assert state == "done"
    for path in folder.iterdir():
        if path.suffix in (".json", ".jsonl"):
            results_folder.read_json(path) if path.suffix == ".json" else metrics_of(folder)
        elif path.suffix == ".pt" and "best" not in path.name:
            read_checkpoint(path)
        assert not path.name.startswith("."), path.name
    assert run_tiny(folder) == ("done", "")
    assert outcome(folder) == outcome(whole)
    return breaker.calls >= number


def test_a_write_that_fails_at_any_step_leaves_old_or_new_files_and_the_cell_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Path]
) -> None:
    for number in (9, 31, 42, 88):
        assert check_broken_write(number, tmp_path / str(number), monkeypatch, whole["conventional"])


@pytest.mark.slow
def test_every_single_write_call_of_a_cell_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Path]
) -> None:
    number = 1
    while check_broken_write(number, tmp_path / str(number), monkeypatch, whole["conventional"]):
        number += 1
    print(f"{number - 1} write calls")
    assert number > 60


# Diverged and failed


class NotFinite(nn.Module):
    """Adds nothing to the residual stream; its outputs in training are NaN from one call to another."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.calls, self.first, self.last = 0, first, last

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        self.calls += self.training
        bad = self.training and self.first <= self.calls <= self.last
        return (query.detach() * math.nan if bad else torch.zeros_like(query) * self.unused.sum()), None


@pytest.mark.parametrize("steps", [1, 3])
def test_a_diverged_cell_names_the_step_and_keeps_the_last_finite_checkpoint(
    steps: int, tmp_path: Path
) -> None:
    training = TrainingSettings(batch_size=8, learning_rate=1e-2, max_epochs=3, divergence_steps=steps)
    state, reason = run_tiny(tmp_path, partial(NotFinite, 7, 100), training)
    assert (state, reason) == ("diverged", "the training loss is nan in epoch 2, step 2")
    saved = read_checkpoint(tmp_path / LAST)
    assert saved["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_a_model_that_ends_the_program_ends_its_cell_only(tmp_path: Path) -> None:
    class Leaving(NotFinite):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
            raise SystemExit("bye")

    state, reason = run_tiny(tmp_path, partial(Leaving, 0, 0))
    assert (state, reason.startswith("SystemExit: bye")) == ("failed", True)
    assert "Traceback" in (tmp_path / "error.txt").read_text()
    assert run_tiny(tmp_path) == ("done", "")
    assert not (tmp_path / "error.txt").exists()


def test_a_message_that_no_file_can_hold_is_noted_all_the_same(tmp_path: Path) -> None:
    class Odd(NotFinite):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
            raise OSError("no file \udcff.txt " + "x" * 10_000)

    state, reason = run_tiny(tmp_path, partial(Odd, 0, 0))
    assert state == "failed" and reason.startswith(r"OSError: no file \udcff.txt xxx") and len(reason) < 1000
    assert state_of(tmp_path) == (state, reason)
    assert r"\udcff" in (tmp_path / "error.txt").read_text()


def test_leftovers_of_a_killed_writer_are_cleared_away(tmp_path: Path) -> None:
    litter = tmp_path / f".result.json.{'0' * 16}"
    litter.write_text("half")
    assert run_tiny(tmp_path) == ("done", "")
    assert not litter.exists()
