"""The encoder and one cell's training: fair, repeatable, exact in its sums, honest about failures."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from cell_cases import (
    CLASSES,
    CONVENTIONAL,
    CPU,
    SETTINGS,
    TRAINING,
    VOCABULARY,
    attention_of,
    make_task,
    metrics_of,
    run_tiny,
    state_of,
)
from torch import Tensor, nn

import train_and_evaluate as trainer_module
from data_pipeline import Batch, TokenDataset, evaluation_batches
from experiment.models import MODELS
from results_folder import read_json
from train_and_evaluate import (
    Evaluation,
    ModelSettings,
    Trainer,
    TrainingSettings,
    TransformerClassifier,
    sinusoidal_positions,
    train_and_evaluate,
)
from training import training_progress
from training.checkpoints import LAST, read_checkpoint
from training.random_stream import random_stream
from training.training_progress import DivergedError, Progress, StepMeter

SHORT = replace(TRAINING, max_epochs=2)


def make_classifier(
    attention: Callable[[], nn.Module] = CONVENTIONAL, **changes: Any
) -> TransformerClassifier:
    settings = ModelSettings(**{"embed_dim": 8, "num_heads": 2, "feed_forward_dim": 12} | changes)
    return TransformerClassifier(attention, VOCABULARY, CLASSES, settings).eval()


def train_cell(folder: Path, *arguments: Any, **options: Any) -> dict[str, Any]:
    """Run a cell, as `run_tiny` does, that must succeed; its result."""
    assert run_tiny(folder, *arguments, **options) == ("done", "")
    return read_json(folder / "result.json")


class SilentAttention(nn.Module):
    """Adds nothing to the residual stream, but draws `extra` random numbers when it is built."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.randn(extra))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(query) * self.unused.sum(), None


class TroubledAttention(SilentAttention):
    """Silent until its `call`-th forward pass in training, when `trouble` happens."""

    def __init__(self, call: int, trouble: Callable[[Tensor], Tensor]) -> None:
        super().__init__(1)
        self.call, self.trouble = call, trouble

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        self.call -= self.training
        return (self.trouble(query) if self.call == 0 else super().forward(query, key, value)[0]), None


# Equal starts


@pytest.mark.parametrize("name", MODELS)
def test_all_models_start_from_the_same_weights_outside_attention_and_equal_shaped_first_draws_in_it(
    name: str,
) -> None:
    one = make_classifier().state_dict()
    other = make_classifier(attention_of(name)).state_dict()
    shared = [key for key in one if ".attention." not in key]
    assert len(shared) == 21 and shared == [key for key in other if ".attention." not in key]
    first_draws = [key for key in other if "in_proj_weight" in key and other[key].shape == one[key].shape]
    assert all(torch.equal(one[key], other[key]) for key in (*shared, *first_draws))


def test_layers_and_seeds_start_from_different_weights() -> None:
    one, other = (
        TransformerClassifier(CONVENTIONAL, VOCABULARY, CLASSES, SETTINGS, seed).state_dict()
        for seed in (0, 1)
    )
    drawn = [key for key in one if key.endswith("weight") and "norm" not in key]
    assert len(drawn) == 10 and not any(torch.equal(one[key], other[key]) for key in drawn)
    for key in [key for key in drawn if key.startswith("layers.0")]:
        assert not torch.equal(one[key], one[key.replace("layers.0", "layers.1")])


def test_a_random_stream_depends_on_its_purpose_alone_and_leaves_the_callers_numbers_alone() -> None:
    def draw(*purpose: object) -> Tensor:
        with random_stream(CPU, *purpose):
            return torch.rand(4)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(draw(0, "dropout", 1), draw(0, "dropout", 1))
    assert not torch.equal(draw(0, "dropout", 1), draw(0, "dropout", 2))
    assert not torch.equal(draw(0, "dropout", 1), draw(1, "dropout", 1))
    make_classifier()
    with contextlib.suppress(KeyError), random_stream(CPU, "dropout"):
        torch.rand(7)
        raise KeyError
    assert torch.equal(torch.rand(3), expected)


def test_models_of_a_seed_see_the_same_batches_and_the_same_dropout(tmp_path: Path) -> None:
    train_cell(tmp_path / "a", partial(SilentAttention, 3), SHORT)
    train_cell(tmp_path / "b", partial(SilentAttention, 1000), SHORT)
    keys = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
    one, other = ([[row[key] for key in keys] for row in metrics_of(tmp_path / name)] for name in "ab")
    assert one == other


# The encoder


@pytest.mark.parametrize("name", ["conventional", "gravitational_multi_timescale"])
def test_neither_the_amount_nor_the_content_of_padding_changes_the_logits(name: str) -> None:
    model = make_classifier(attention_of(name))
    tokens = torch.randint(1, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([7, 4, 1])
    with torch.no_grad():
        alone = [
            model(row[None, :length], torch.zeros(1, int(length), dtype=torch.bool))
            for row, length in zip(tokens, lengths, strict=True)
        ]
        padded = nn.functional.pad(tokens, (0, 6), value=VOCABULARY - 1)
        together = model(padded, torch.arange(13) >= lengths[:, None])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_logits_are_the_classifier_of_the_mean_over_true_tokens() -> None:
    model = make_classifier(partial(SilentAttention, 1), num_layers=1)
    tokens, padding = torch.tensor([[4, 9, 2]]), torch.tensor([[False, False, True]])
    seen: list[Tensor] = []
    model.final_norm.register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model(tokens, padding)
    expected = model.classifier((seen[0][0, 0] + seen[0][0, 1]) / 2)
    torch.testing.assert_close(logits[0], expected)


def test_positions_are_sines_and_cosines_of_the_2017_wavelengths() -> None:
    positions, angle = sinusoidal_positions(4, 5, CPU), 3 / 10000 ** (2 / 5)
    torch.testing.assert_close(positions[0], torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(positions[3, 2:4], torch.tensor([math.sin(angle), math.cos(angle)]))


def test_logits_are_float32_under_bf16_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = make_classifier()(torch.ones(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.bool))
    assert logits.dtype == torch.float32


# Sums and selection


def trainer_of(
    model: TransformerClassifier | None = None, training: TrainingSettings = TRAINING, **options: Any
) -> Trainer:
    return Trainer(model or make_classifier(), make_task(), training, 0, CPU, Progress(), **options)


@pytest.mark.parametrize("pad_to", ["longest", "max"])
def test_an_evaluation_is_the_mean_over_examples_with_a_ragged_last_batch_however_padded(pad_to: str) -> None:
    trainer = trainer_of(training=replace(TRAINING, pad_to=pad_to))
    task, split = trainer.task, trainer.task.test
    longest = max(int(split.lengths.max()) for split in (task.train, task.val, task.test))
    assert trainer.pad_to == (longest if pad_to == "max" else pad_to)
    found = trainer.evaluate(trainer.model, split)
    padding = [torch.zeros(1, int(length), dtype=torch.bool) for length in split.lengths]
    tokens = [torch.from_numpy(split.example(i).astype(np.int64))[None] for i in range(len(split))]
    logits = torch.cat([trainer.model(*example) for example in zip(tokens, padding, strict=True)])
    labels = torch.from_numpy(split.labels)
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found.accuracy == (logits.argmax(-1) == labels).double().mean().item()


def test_a_training_epoch_counts_each_example_once_however_often_its_losses_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    still = TrainingSettings(batch_size=8, learning_rate=1e-30)
    trainer = trainer_of(make_classifier(dropout=0.0), still)
    expected, row = trainer.evaluate(trainer.model, trainer.task.train), trainer.train_epoch(1)
    assert row["train_loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert row["train_accuracy"] == pytest.approx(expected.accuracy, abs=1e-12)
    assert (row["train_examples"], row["train_tokens"]) == (37, int(trainer.task.train.lengths.sum()))
    monkeypatch.setattr(training_progress, "READ_EVERY_SECONDS", 0.0)
    again = trainer_of(make_classifier(dropout=0.0), still).train_epoch(1)
    assert (again["train_loss"], again["train_accuracy"]) == (row["train_loss"], row["train_accuracy"])


@pytest.mark.parametrize(
    ("accuracies", "best", "epochs"),
    [([0.2, 0.6, 0.6, 0.5], 2, 4), ([0.5, 0.4, 0.5, 0.9], 1, 3), ([0.1, 0.2, 0.3, 0.4], 4, 4)],
    ids=["at the end", "early", "last is best"],
)
def test_the_first_best_epoch_is_selected_patience_waits_for_a_better_one_and_the_test_split_is_read_last(
    accuracies: list[float], best: int, epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, validate = make_task(), Trainer.validate
    read: list[str] = []

    def spy(split: TokenDataset, *args: Any, **options: Any) -> Iterator[Batch]:
        read.append("test" if split is task.test else "val")
        return evaluation_batches(split, *args, **options)

    def scripted(trainer: Trainer, epoch: int) -> dict[str, Any]:
        return validate(trainer, epoch) | {"val_accuracy": accuracies[epoch - 1]}

    monkeypatch.setattr(trainer_module, "evaluation_batches", spy)
    monkeypatch.setattr(Trainer, "validate", scripted)
    training = TrainingSettings(batch_size=8, learning_rate=5e-2, max_epochs=4, patience=2)
    result = train_cell(tmp_path, training=training, task=task)
    # Once for the best and once for the last weights, if these are others.
    assert read == ["val"] * epochs + ["test"] * (1 if best == epochs else 2)
    assert (result["best_epoch"], result["best_val_accuracy"]) == (best, accuracies[best - 1])
    assert (result["epochs_run"], result["stopped_early"]) == (epochs, epochs < 4)
    for which, epoch in (("best", best), ("last", epochs)):
        saved = torch.load(tmp_path / f"checkpoint_{which}.pt", weights_only=True)
        model = make_classifier()
        model.load_state_dict(saved["model"])
        expected = trainer_of(model).evaluate(model, task.test)
        assert saved["epoch"] == epoch and result[f"test_accuracy_{which}"] == expected.accuracy
        assert result[f"test_loss_{which}"] == pytest.approx(expected.loss, rel=1e-6)


# What is recorded


def test_metrics_and_result_hold_what_a_reader_needs_in_bf16_where_asked_for(tmp_path: Path) -> None:
    attention = attention_of("gravitational_multi_timescale")
    result = train_cell(tmp_path, attention, replace(SHORT, precision="bf16"))
    rows = metrics_of(tmp_path)
    assert [row["epoch"] for row in rows] == [1, 2] and result["precision"] == "bf16"
    assert all(row["train_seconds"] > 0 and row["tokens_per_second"] > 0 for row in rows)
    assert np.shape(rows[0]["learned"]["layer1"]["gamma"]) == (3, 2)
    assert np.shape(rows[0]["learned"]["layer0"]["gravity"]) == (3, 2)
    assert result["seconds_per_epoch"] == pytest.approx(np.mean([row["train_seconds"] for row in rows]))
    assert result["parameters"] == sum(p.numel() for p in make_classifier(attention).parameters())
    assert result["attention_parameters"] == 2 * sum(p.numel() for p in attention().parameters())
    assert result["memory_kind"] == "resident set" or result["memory_reason"]


def test_the_warm_up_step_is_in_no_rate(tmp_path: Path) -> None:
    train_cell(tmp_path, training=TrainingSettings(batch_size=64, max_epochs=2))
    first, second = metrics_of(tmp_path)
    assert (first["train_seconds"], first["tokens_per_second"]) == (None, None)  # one step: only warm-up
    tokens = int(make_task().train.lengths.sum())
    assert second["tokens_per_second"] == pytest.approx(tokens / second["train_seconds"])


# Failures


@pytest.mark.parametrize(("losses", "ends_at"), [("1nn1nn1", 0), ("1nnn", 2), ("nn1inn", 4)])
def test_losses_that_are_not_finite_end_a_cell_when_three_come_in_a_row(losses: str, ends_at: int) -> None:
    values = {"1": 1.0, "n": math.nan, "i": math.inf}
    meter = StepMeter(7, 1, Progress(), divergence_steps=3)
    for loss in losses:
        meter.add(torch.tensor([values[loss], 0.0]), 1, 1)
    end = pytest.raises(DivergedError, match=rf"is (nan|inf) in epoch 7, step {ends_at}$")
    expected: contextlib.AbstractContextManager[Any] = end if ends_at else contextlib.nullcontext()
    with expected:
        meter.means()
    assert ends_at or meter.steps == len(losses)


def test_a_diverged_cell_names_its_step_and_keeps_its_last_finite_checkpoint(tmp_path: Path) -> None:
    # With 5 steps an epoch the 7th call of a layer is step 2 of epoch 2.
    nan = partial(TroubledAttention, 7, lambda query: query * math.nan)
    assert run_tiny(tmp_path, nan) == ("diverged", "the training loss is nan in epoch 2, step 2")
    saved = read_checkpoint(tmp_path / LAST)
    assert saved["epoch"] == len(metrics_of(tmp_path)) == 1
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_weights_broken_by_the_last_step_are_found_by_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: Evaluation(math.nan, 0.0))
    assert run_tiny(tmp_path) == ("diverged", "the validation loss is nan after epoch 1")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SystemExit("bye\nwith details"), "SystemExit: bye ("),
        (OSError("no file \udcff.txt " + "x" * 10_000), r"OSError: no file \udcff.txt " + "x" * 400),
    ],
)
def test_an_error_ends_its_cell_only_and_is_recorded_until_the_cell_runs_again(
    error: BaseException, reason: str, tmp_path: Path
) -> None:
    def fail(query: Tensor) -> Tensor:
        raise error

    state, found = run_tiny(tmp_path, partial(TroubledAttention, 3, fail))
    assert found.startswith(reason) and len(found) < 1000 and " (test_train_and_evaluate.py:" in found
    assert state_of(tmp_path) == (state, found) == ("failed", found)
    assert "Traceback" in (tmp_path / "error.txt").read_text()
    assert not (tmp_path / "result.json").exists()
    train_cell(tmp_path, training=replace(TRAINING, max_epochs=1))
    assert not (tmp_path / "error.txt").exists()


def test_an_interrupt_is_noted_and_passed_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path, partial(TroubledAttention, 7, Mock(side_effect=KeyboardInterrupt)))
    assert state_of(tmp_path)[0] == "interrupted"
    assert read_checkpoint(tmp_path / LAST)["epoch"] == 1


# On a GPU


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("name", MODELS)
def test_on_cuda_a_cell_trains_in_bf16_and_counts_the_allocators_memory(name: str, tmp_path: Path) -> None:
    settings = ModelSettings(embed_dim=64, num_heads=2)
    cell = attention_of(name, settings), make_task(), settings, TRAINING, 0, tmp_path
    result = train_and_evaluate(*cell, torch.device("cuda"))
    assert (result["precision"], result["memory_kind"]) == ("bf16", "cuda allocator")
    assert result["peak_memory_bytes"] > 4 * result["parameters"]


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("name", MODELS)
def test_on_cuda_a_training_step_does_not_wait_for_the_device(name: str) -> None:
    device = torch.device("cuda")
    settings = ModelSettings(embed_dim=64, num_heads=2)
    model = TransformerClassifier(attention_of(name, settings), VOCABULARY, CLASSES, settings)
    trainer = Trainer(model, make_task(), TRAINING, 0, device, Progress())
    batch = next(evaluation_batches(trainer.task.train, 8, device=device))
    trainer.step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = trainer.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums.isfinite().all()
