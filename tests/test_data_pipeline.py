"""Draws, tokenizers, splits and batches: exact, repeatable, nothing lost; tasks and commands that say no."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from run_cases import Refused

from data_pipeline import Batch, DataSettings, evaluation_batches, load_task, main
from tasks.random_draws import RandomDraws
from tasks.text_tokenizers import BYTE_SYMBOLS, count_words, encode_bytes, make_vocabulary, split_words
from tasks.token_dataset import TokenDataset, concatenate, offsets_of, stratified_choice, training_batches

SMALL = DataSettings(train_size=60, val_size=12, test_size=13, min_length=10, max_length=150)


def make_dataset(count: int, longest: int = 50) -> TokenDataset:
    draws = RandomDraws(0, "test data")
    lengths = 1 + draws.below(longest, count)
    tokens = (1 + draws.below(250, int(lengths.sum()))).astype(np.uint16)
    return TokenDataset(tokens, offsets_of(lengths), draws.below(3, count))


def texts_of(*texts: bytes) -> TokenDataset:
    tokens = np.frombuffer(b"".join(texts), np.uint8)
    return TokenDataset(tokens, offsets_of([len(text) for text in texts]), np.zeros(len(texts), np.int64))


def assert_equal(one: TokenDataset, other: TokenDataset) -> None:
    for field in dataclasses.fields(TokenDataset):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


# Draws, bytes and words


def test_draws_are_uniform_of_seed_and_purpose_and_those_of_every_other_machine() -> None:
    draws = RandomDraws(7, "a purpose", 3)
    counts = np.bincount(draws.below(10, 100_000), minlength=10)
    assert np.abs(counts - 10_000).max() < 4 * (10_000 * 0.9) ** 0.5
    assert sorted(draws.order(9).tolist()) == list(range(9))
    assert draws.bytes(5).tolist() == [86, 175, 169, 9, 53]
    assert draws.below(1000, 3).tolist() == [728, 297, 14]
    assert draws.order(5).tolist() == [2, 4, 3, 1, 0]
    streams = [RandomDraws(0, "a"), RandomDraws(1, "a"), RandomDraws(0, "b"), RandomDraws(0, "a", 0)]
    assert len({stream.bytes(16).tobytes() for stream in streams}) == 4


def test_each_byte_has_the_id_after_it_and_a_symbol_of_its_own() -> None:
    assert encode_bytes(np.arange(256, dtype=np.uint8)).tolist() == list(range(1, 257))
    assert len(set(BYTE_SYMBOLS)) == 257 and [BYTE_SYMBOLS[i] for i in (0, ord("a") + 1)] == ["<pad>", "a"]


def test_words_are_lower_case_without_markup_and_marks() -> None:
    text = "It's GREAT!<br /><br />Don't miss 'Été 42'... snake_case, won''t"
    assert split_words(text) == ["it's", "great", "don't", "miss", "été", "42", "snake", "case", "won", "t"]


def test_the_vocabulary_is_of_the_training_words_most_frequent_first_and_others_are_unknown() -> None:
    texts = [b"b b a c", b"the a c", b"unseen unseen unseen unseen", b"..."]
    counted, lexicon = count_words(texts_of(*texts))
    train = counted.take(np.array([0, 1]))
    symbols, table = make_vocabulary(train, lexicon, size=3)
    assert symbols == ("<pad>", "<unk>", "a", "b", "c")  # twice each, by the alphabet; "the" no longer fits
    assert table[counted.tokens].tolist() == [3, 3, 2, 4, 1, 2, 4, 1, 1, 1, 1, 1]
    assert make_vocabulary(train, lexicon, size=99)[0][2:] == ("a", "b", "c", "the")


# Splits


def test_a_stratified_choice_keeps_each_class_to_its_share() -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    for size in (0, 1, 7, 33, 99, 100):
        chosen = stratified_choice(labels, size, 0, "test")
        assert len(set(chosen.tolist())) == size and (np.diff(chosen) > 0).all()
        assert (np.abs(np.bincount(labels[chosen], minlength=3) - np.array([0.5, 0.3, 0.2]) * size) < 1).all()
    ten = stratified_choice(labels, 10, 0, "a").tolist()
    assert set(ten) <= set(stratified_choice(labels, 50, 0, "a"))
    assert ten != stratified_choice(labels, 10, 1, "a").tolist()
    assert max(ten) > 10 + 50  # not the first rows
    with pytest.raises(ValueError, match="cannot choose 101 of 100"):
        stratified_choice(labels, 101, 0, "a")


def test_taking_examples_cuts_them_and_keeps_their_order() -> None:
    dataset = texts_of(b"abcdef", b"", b"gh", b"ijk")
    taken = dataset.take(np.array([3, 0, 1]), max_length=4)
    assert [bytes(taken.example(index)) for index in range(3)] == [b"ijk", b"abcd", b""]
    assert len(dataset.take(np.zeros(0, np.int64))) == 0
    assert_equal(concatenate([dataset.take(np.arange(2)), dataset.take(np.arange(2, 4))]), dataset)


@pytest.mark.parametrize("offsets", [[0, 2], [0, 3, 2], [1, 2, 3], [0, 1, 2, 3]])
def test_offsets_that_do_not_fit_the_tokens_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="offset"):
        TokenDataset(np.zeros(3, np.uint8), np.array(offsets), np.zeros(2, np.int64))


# Batches


def batches_of(kind: str, dataset: TokenDataset, size: int, pad_to: str | int = "longest") -> Iterator[Batch]:
    if kind == "training":
        return training_batches(dataset, size, seed=4, epoch=2, pad_to=pad_to)
    return evaluation_batches(dataset, size, pad_to=pad_to)


@pytest.mark.parametrize("kind", ["training", "evaluation"])
@pytest.mark.parametrize(("count", "size"), [(1, 4), (400, 3)])
def test_batches_hold_each_example_once_padded_at_its_end_to_any_length_and_leave_the_data_alone(
    kind: str, count: int, size: int
) -> None:
    dataset = make_dataset(count)
    before, orders = dataset.take(np.arange(count)), []
    for pad_to in (None, 60):
        batches = list(batches_of(kind, dataset, size, pad_to or "longest"))
        assert sorted(len(batch.labels) for batch in batches)[1:] == [size] * (len(batches) - 1)
        orders.append([index for batch in batches for index in batch.index.tolist()])
        for batch in batches:
            assert batch.tokens.dtype == batch.labels.dtype == batch.index.dtype == torch.int64
            index = batch.index.numpy()
            examples = [before.example(i).tolist() for i in index]
            width = pad_to or max(map(len, examples))
            assert batch.tokens.tolist() == [one + [0] * (width - len(one)) for one in examples]
            padding = [[place >= len(one) for place in range(width)] for one in examples]
            assert torch.equal(batch.key_padding_mask, torch.tensor(padding))
            assert batch.labels.tolist() == before.labels[index].tolist()
            batch.tokens.zero_()
            batch.labels.fill_(9)
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(count))
    assert_equal(dataset, before)


def test_training_batches_follow_from_seed_and_epoch_alone_on_every_machine() -> None:
    dataset = make_dataset(100)

    def batches(seed: int, epoch: int) -> list[Batch]:
        return list(training_batches(dataset, 8, seed=seed, epoch=epoch))

    digest = hashlib.sha256()
    for batch in batches(1, 2):
        digest.update(batch.tokens.numpy().astype("<i8").tobytes())
    assert digest.hexdigest() == "01c3ebeb1397fae318aa02f93f83a84b6efb27c1d1691527e1481c532e8b575d"
    made_up = [{frozenset(batch.index.tolist()) for batch in batches(*of)} for of in ((1, 2), (1, 1), (0, 2))]
    assert made_up[0] != made_up[1] and made_up[0] != made_up[2]


def test_training_batches_are_of_similar_lengths_in_any_order_and_evaluation_goes_longest_first() -> None:
    dataset = make_dataset(5000, longest=400)
    batches = list(training_batches(dataset, 16, seed=0, epoch=0))
    assert len(dataset.tokens) / sum(batch.tokens.numel() for batch in batches) > 0.95
    widths = np.array([batch.tokens.shape[1] for batch in batches])
    assert abs(np.corrcoef(widths[:-1], widths[1:])[0, 1]) < 0.2
    widths = np.array([batch.tokens.shape[1] for batch in evaluation_batches(dataset, 16)])
    assert (np.diff(widths) <= 0).all() and widths[0] > widths[-1]


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_batches_that_cannot_be_made_raise_before_the_first(kind: str) -> None:
    for size, pad_to, message in (
        (0, "longest", "batch_size must be at least 1, got 0"),
        (4, "max", "pad_to must be 'longest'.*'max'"),
        (4, 3, "pad_to must be at least .*got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            batches_of(kind, make_dataset(10), size, pad_to)


# Tasks


def test_a_task_is_complete_and_made_again_the_same_with_provenance_as_json() -> None:
    task, again = (load_task("listops", SMALL) for _ in range(2))
    for name, size in (("train", 60), ("val", 12), ("test", 13)):
        split = getattr(task, name)
        assert len(split) == size and split.lengths.min() > 10 and split.lengths.max() < 150
        assert split.tokens.min() >= 1 and split.tokens.max() < task.vocab_size
        assert_equal(split, getattr(again, name))
    assert task.name == "listops" and len(task.class_names) == task.num_classes
    assert all(isinstance(task.symbols(token), str) for token in range(task.vocab_size))
    assert json.loads(json.dumps(task.provenance, allow_nan=False)) == task.provenance
    assert len(task.provenance["sha256"]) == 64


LISTOPS_STATS = ["ListOps, 11 to 39 tokens: 17 token ids", "train           50", "labels of test: 0 ", "[M"]
NEAREST_STATS = ["The nearest of 8 points: 266 token ids, 8 classes", "labels of val: 0 ", "+v", "+?"]


@pytest.mark.parametrize(
    ("task", "parts"),
    [("listops --min-length 10 --max-length 40", LISTOPS_STATS), ("nearest --max-length 24", NEAREST_STATS)],
)
def test_stats_show_sizes_lengths_labels_and_an_example(
    task: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(f"stats --train-size 50 --val-size 8 --test-size 9 --task {task}".split()) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in parts), out


LEAST = {"data-seed": 0, "min-length": 0, "max-length": 1, "train-size": 1, "word-vocabulary": 1}
MEANINGLESS = [
    *("imdb --min-length 5", "pathfinder --min-length 5", "image --max-length 5"),
    *("bytes --tokenizer word", "hold --min-length 3", "nearest --word-vocabulary 9"),
]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        *[(f"stats --task listops --{name} {low - 1}", f"--{name} must be") for name, low in LEAST.items()],
        *[(f"stats --task {words}", f"means nothing to {words.split()[0]}") for words in MEANINGLESS],
        ("stats --task listops --tokenizer character", "unknown --tokenizer 'character'"),
        ("stats --task imbd", "unknown task 'imbd': did you mean 'imdb'?"),
        ("stats --task listops --min-length 80 --max-length 81", "got --min-length 80 and --max-length 81"),
        ("stats --task listops --data-dir /nowhere", "--data-dir /nowhere does not exist"),
        ("stats --tsk listops", "required: --task"),
        ("statistics", "invalid choice: 'statistics'"),
        ("", "required: listops|imdb|stats"),
        ("listops --output-dir new --train 0", "--train must be at least 1, got 0"),
        ("listops --output-dir new --seed -1", "--seed must be at least 0, got -1"),
        ("listops --output-dir new --min-length -1", "got --min-length -1"),
        ("listops --output-dir new --max-depth 0", "a depth of 1..100 and 2..1000 arguments, got depth 0"),
        ("listops --output-dir new --max-args 1", "and 1 arguments"),
        ("listops --output-dir new --max-depth 3", "no expression is longer than 122 tokens"),  # 2 + 10 * 12
        ("listops --output-dir new --tran 5", "did you mean '--train'?"),
    ],
)
def test_bad_commands_end_in_one_line_and_leave_nothing(
    argv: str, said: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(main, *argv.split())
    assert not list(tmp_path.iterdir())
