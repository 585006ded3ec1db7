"""Cells of tasks with a target at tokens: counted by prediction, selected by bits, tested at longer lengths,
resumed to the same bits."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from cell_cases import CONVENTIONAL, CPU, SETTINGS, TRAINING, attention_of, metrics_of, outcome, run_tiny
from test_byte_windows import make_task as make_bytes

from data_pipeline import DataSettings, load_task
from experiment.stop_request import StoppedError
from tasks.task_data import TaskData, TaskForm
from tasks.token_dataset import IGNORED, TokenDataset
from train_and_evaluate import Trainer, TrainingSettings, TransformerClassifier
from training.training_progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")


def make_hold() -> TaskData:
    return load_task("hold", DataSettings(max_length=12, train_size=19, val_size=5, test_size=16))


def trainer_of(task: TaskData, training: TrainingSettings = TRAINING) -> Trainer:
    settings = replace(SETTINGS, dropout=0.0)
    model = TransformerClassifier(CONVENTIONAL, task.vocab_size, task.num_classes, settings, form=task.form)
    return Trainer(model, task, training, 0, CPU, Progress())


def test_an_epoch_counts_examples_predictions_and_tokens_apart() -> None:
    task = make_hold()
    trainer = trainer_of(task, replace(TRAINING, learning_rate=1e-30))
    row, drawn = trainer.train_epoch(1), task.train_of(0, 1)
    asked = drawn.labels != IGNORED
    counts = (row["train_examples"], row["train_predictions"], row["train_tokens"])
    assert counts == (19, int(asked.sum()), 19 * 12) and asked.sum() < 19 * 12
    expected = trainer.evaluate(trainer.model, drawn)
    assert row["train_loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert row["train_accuracy"] == pytest.approx(expected.accuracy, abs=1e-12)


def test_an_evaluation_is_the_mean_over_what_is_asked_for() -> None:
    task = make_hold()
    trainer = trainer_of(task)
    found = trainer.evaluate(trainer.model, task.val)
    tokens = torch.from_numpy(task.val.tokens.astype(np.int64)).reshape(5, 12, 2)
    labels = torch.from_numpy(task.val.labels)
    logits = trainer.model(tokens, torch.zeros(5, 12, dtype=torch.bool)).flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, labels)
    right = (logits.argmax(-1) == labels)[labels != IGNORED]
    assert found.loss == pytest.approx(losses.item(), rel=1e-5)
    assert found.accuracy == pytest.approx(right.double().mean().item(), abs=1e-12)


def test_a_batch_in_which_nothing_is_asked_for_changes_no_weight() -> None:
    task = make_hold()
    silent = replace(task.val, labels=np.full_like(task.val.labels, IGNORED))
    trainer = trainer_of(replace(task, train=silent, drawn=None), replace(TRAINING, weight_decay=0.0))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    row = trainer.train_epoch(1)
    assert (row["train_loss"], row["train_predictions"]) == (0.0, 0)
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


def test_bits_per_byte_select_the_epoch_of_the_lowest_loss_whose_weights_are_tested_at_16_times_the_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.validate

    def validate(trainer: Trainer, epoch: int) -> dict[str, Any]:  # accuracies say the contrary
        loss = (3.0, 2.0, 2.0, 2.5, 1.0)[epoch - 1]
        return original(trainer, epoch) | {"val_loss": loss, "val_accuracy": loss / 5}

    monkeypatch.setattr(Trainer, "validate", validate)
    task, training = make_bytes(), replace(TRAINING, max_epochs=5, patience=2)
    assert run_tiny(tmp_path, training=training, task=task) == ("done", "")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["best_epoch"], result["epochs_run"], result["metric"]) == (2, 4, "bits_per_byte")
    assert result["stopped_early"]
    saved = torch.load(tmp_path / "checkpoint_best.pt", weights_only=True)
    assert saved["epoch"] == 2
    found = result["test_by_length"]
    assert list(found) == ["20", "40", "320"] and found["20"]["accuracy"] == result["test_accuracy_best"]
    trainer = trainer_of(task, training)
    trainer.model.load_state_dict(saved["model"])
    expected = trainer.evaluate(trainer.model, task.longer_tests["320"])
    assert found["320"] == {"loss": expected.loss, "accuracy": expected.accuracy}


def test_a_stopped_cell_of_a_token_task_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    arguments = attention_of("adaptive"), replace(TRAINING, max_epochs=2)
    assert run_tiny(whole, *arguments, task=make_bytes()) == ("done", "")
    for epochs_done in (1, 2):  # of 7 checks each: stopped in the second epoch, then in the tests at the end
        check = Mock(side_effect=[None] * 8 + [StoppedError("enough")])
        with pytest.raises(StoppedError):
            run_tiny(stopped, *arguments, task=make_bytes(), check=check)
        assert len(metrics_of(stopped)) == epochs_done
    assert run_tiny(stopped, *arguments, task=make_bytes()) == ("done", "")
    assert outcome(stopped) == outcome(whole)


def split_of(label: int, form: str) -> TokenDataset:
    labels = np.array([0, IGNORED, label]) if form == "token" else np.array([label])
    return TokenDataset(np.ones(3, np.uint8), np.array([0, 3]), labels, form == "token")


def task_of(split: TokenDataset, form: str, **parts: Any) -> TaskData:
    splits: dict[str, Any] = dict.fromkeys(("train", "val"), split_of(1, form)) | {"test": split} | parts
    return TaskData("t", "T", 4, 3, tuple("abc"), symbols=str, provenance={}, form=TaskForm(form), **splits)


@pytest.mark.parametrize(
    ("split", "target", "message"),
    [
        (split_of(3, "token"), "token", "task t: targets must be 0 to 2, got 3"),
        (split_of(-1, "token"), "token", "task t: targets must be 0 to 2, got -1"),
        (split_of(IGNORED, "sequence"), "sequence", "task t: targets must be 0 to 2, got -100"),
        (split_of(1, "token"), "sequence", "task t: sequence targets expected, got token targets"),
        (split_of(1, "sequence"), "token", "task t: token targets expected, got sequence targets"),
    ],
)
def test_a_target_outside_the_classes_or_of_another_kind_is_refused(
    split: TokenDataset, target: str, message: str
) -> None:
    good = split_of(1, target)
    for wrong in ({"split": split}, {"split": good, "longer_tests": {"9": split}}):
        with pytest.raises(ValueError, match=message):
            task_of(**wrong, form=target)
    drawn = task_of(good, target, drawn=lambda seed, epoch: split)
    with pytest.raises(ValueError, match=message):
        drawn.train_of(0, 1)
