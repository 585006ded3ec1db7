"""Tokenizers, splits, made-up reviews and batches: exact, repeatable, nothing lost."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_cases import Refused

import data_pipeline
from command_line import InputError
from data_pipeline import (
    TASKS,
    Batch,
    DataSettings,
    TaskData,
    TokenDataset,
    evaluation_batches,
    load_task,
    main,
    training_batches,
)
from tasks.random_draws import RandomDraws
from tasks.text_tokenizers import (
    ByteTokenizer,
    ListOpsTokenizer,
    WordTokenizer,
    count_words,
    make_vocabulary,
    split_words,
)
from tasks.token_dataset import concatenate, offsets_of, stratified_choice

ROOT = Path(__file__).resolve().parent.parent
SMALL = DataSettings(train_size=60, val_size=12, test_size=13, max_length=150)


def make_dataset(count: int, longest: int = 50, seed: int = 0) -> TokenDataset:
    draws = RandomDraws(seed, "test data")
    lengths = 1 + draws.below(longest, count)
    tokens = (1 + draws.below(250, int(lengths.sum()))).astype(np.uint16)
    return TokenDataset(tokens, offsets_of(lengths), draws.below(3, count))


def texts_of(*texts: bytes) -> TokenDataset:
    tokens = np.frombuffer(b"".join(texts), np.uint8)
    return TokenDataset(tokens, offsets_of([len(text) for text in texts]), np.zeros(len(texts), np.int64))


def assert_equal(one: TokenDataset, other: TokenDataset) -> None:
    for field in dataclasses.fields(TokenDataset):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


# Draws


def test_draws_are_uniform_and_their_bytes_are_those_of_every_other_machine() -> None:
    draws = RandomDraws(7, "a purpose", 3)
    counts = np.bincount(draws.below(10, 100_000), minlength=10)
    assert np.abs(counts - 10_000).max() < 4 * (10_000 * 0.9) ** 0.5
    assert sorted(draws.order(9).tolist()) == list(range(9))
    assert draws.bytes(5).tolist() == [86, 175, 169, 9, 53]
    assert draws.below(1000, 3).tolist() == [728, 297, 14]
    assert draws.order(5).tolist() == [2, 4, 3, 1, 0]


def test_streams_of_other_seeds_and_purposes_differ() -> None:
    streams = [RandomDraws(0, "a"), RandomDraws(1, "a"), RandomDraws(0, "b"), RandomDraws(0, "a", 0)]
    assert len({stream.bytes(16).tobytes() for stream in streams}) == 4
    assert RandomDraws(0, "a").bytes(16).tobytes() == RandomDraws(0, "a").bytes(16).tobytes()


# Tokenizers


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=40))
def test_bytes_decode_to_the_text_they_came_from(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode("utf-8", "surrogatepass"))
    assert not len(ids) or (ids.min() >= 1 and ids.max() <= 256)


def test_each_byte_has_the_id_after_it_and_a_symbol_of_its_own() -> None:
    tokenizer = ByteTokenizer()
    every = tokenizer.encode_bytes(np.arange(256, dtype=np.uint8))
    assert every.tolist() == list(range(1, 257)) and tokenizer.vocab_size == 257
    symbols = [tokenizer.symbol(token) for token in range(257)]
    assert len(set(symbols)) == 257 and symbols[0] == "<pad>" and symbols[ord("a") + 1] == "a"


def test_a_character_cut_in_two_decodes_to_a_replacement() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("aÉ")[:2]) == "a\ufffd"


def test_words_are_lower_case_without_markup_and_marks() -> None:
    text = "It's GREAT!<br /><br />Don't miss 'Été 42'... snake_case, won''t"
    assert split_words(text) == ["it's", "great", "don't", "miss", "été", "42", "snake", "case", "won", "t"]


def test_the_vocabulary_is_of_the_training_words_most_frequent_first() -> None:
    counted, lexicon = count_words(texts_of(b"b b a c", b"the a c", b"unseen unseen unseen unseen", b"..."))
    train = counted.take(np.array([0, 1]))
    tokenizer, table = make_vocabulary(train, lexicon, size=3)
    assert tokenizer.words == ("a", "b", "c")  # twice each, in alphabetical order; "the" no longer fits
    assert table[counted.tokens].tolist() == [3, 3, 2, 4, 1, 2, 4, 1, 1, 1, 1, 1]
    assert tokenizer.vocab_size == 5
    assert make_vocabulary(train, lexicon, size=99)[0].words == ("a", "b", "c", "the")
    for index, text in enumerate(["b b a c", "the a c", "unseen unseen unseen unseen", "..."]):
        assert tokenizer.encode(text).tolist() == table[counted.example(index)].tolist()


def test_words_and_symbols_survive_encoding_and_unknown_ones_are_unk() -> None:
    words = WordTokenizer(("the", "film"))
    assert words.decode(words.encode("The film bored the crowd")) == "the film <unk> the <unk>"
    symbols = ListOpsTokenizer()
    ids = symbols.encode("( ( ( [MAX 2 ) 9 ) ] ) [AVG")
    assert ids.tolist() == [13, 4, 11, 16, 1]
    assert symbols.decode(ids) == "[MAX 2 9 ] <unk>"
    assert symbols.vocab_size == 17


# Splits


def test_a_stratified_choice_keeps_each_class_to_its_share() -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    for size in (0, 1, 7, 33, 99, 100):
        chosen = stratified_choice(labels, size, 0, "test")
        assert len(set(chosen.tolist())) == size and (np.diff(chosen) > 0).all()
        assert (np.abs(np.bincount(labels[chosen], minlength=3) - np.array([0.5, 0.3, 0.2]) * size) < 1).all()
    assert set(stratified_choice(labels, 10, 0, "a")) <= set(stratified_choice(labels, 50, 0, "a"))
    assert stratified_choice(labels, 10, 0, "a").tolist() != stratified_choice(labels, 10, 1, "a").tolist()
    assert stratified_choice(labels, 10, 0, "a").max() > 10 + 50  # not the first rows
    with pytest.raises(ValueError, match="101"):
        stratified_choice(labels, 101, 0, "a")


def test_taking_examples_cuts_them_and_keeps_their_order() -> None:
    dataset = texts_of(b"abcdef", b"", b"gh", b"ijk")
    taken = dataset.take(np.array([3, 0, 1]), max_length=4)
    assert [bytes(taken.example(index)) for index in range(3)] == [b"ijk", b"abcd", b""]
    assert_equal(dataset.take(np.arange(4)), dataset)
    assert len(dataset.take(np.zeros(0, np.int64))) == 0
    assert_equal(concatenate([dataset.take(np.arange(2)), dataset.take(np.arange(2, 4))]), dataset)


def test_offsets_that_do_not_fit_the_tokens_are_refused() -> None:
    for offsets in ([0, 2], [0, 3, 2], [1, 2, 3], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="offset"):
            TokenDataset(np.zeros(3, np.uint8), np.array(offsets), np.zeros(2, np.int64))


# Batches


def batches_of(kind: str, dataset: TokenDataset, size: int, **options: object) -> list[Batch]:
    if kind == "training":
        return list(training_batches(dataset, size, seed=4, epoch=2, **options))  # type: ignore[arg-type]
    return list(evaluation_batches(dataset, size, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["training", "evaluation"])
@pytest.mark.parametrize(("count", "size"), [(1, 4), (7, 7), (101, 8), (1000, 3)])
def test_batches_hold_each_example_once_padded_at_its_end(kind: str, count: int, size: int) -> None:
    dataset = make_dataset(count)
    batches = batches_of(kind, dataset, size)
    assert sorted(index for batch in batches for index in batch.index.tolist()) == list(range(count))
    assert sorted(len(batch.labels) for batch in batches)[1:] == [size] * (len(batches) - 1)
    for batch in batches:
        assert batch.tokens.dtype == batch.labels.dtype == batch.index.dtype == torch.int64
        assert batch.key_padding_mask.dtype == torch.bool
        for row, index in enumerate(batch.index.tolist()):
            example = dataset.example(index)
            assert batch.tokens[row, : len(example)].tolist() == example.tolist()
            assert not batch.key_padding_mask[row, : len(example)].any()
            assert batch.key_padding_mask[row, len(example) :].all()
            assert (batch.tokens[row, len(example) :] == 0).all()
            assert batch.labels[row] == dataset.labels[index]
        assert batch.tokens.shape[1] == max(len(dataset.example(index)) for index in batch.index.tolist())


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_batches_hold_the_same_whichever_length_they_are_padded_to(kind: str) -> None:
    dataset = make_dataset(90, longest=20)
    fixed = batches_of(kind, dataset, 8, pad_to=31)
    for short, long in zip(batches_of(kind, dataset, 8), fixed, strict=True):
        width = short.tokens.shape[1]
        assert long.tokens.shape[1] == 31
        assert torch.equal(short.tokens, long.tokens[:, :width]) and not long.tokens[:, width:].any()
        assert torch.equal(short.key_padding_mask, long.key_padding_mask[:, :width])
        assert long.key_padding_mask[:, width:].all()
        assert torch.equal(short.labels, long.labels) and torch.equal(short.index, long.index)


def order_of(batches: Iterator[Batch]) -> list[list[int]]:
    return [batch.index.tolist() for batch in batches]


def test_training_batches_follow_from_seed_and_epoch_alone() -> None:
    dataset = make_dataset(200)
    first = order_of(training_batches(dataset, 8, seed=0, epoch=1))
    torch.manual_seed(99)
    assert order_of(training_batches(dataset, 8, seed=0, epoch=1)) == first
    for seed, epoch in ((0, 2), (1, 1)):
        other = order_of(training_batches(dataset, 8, seed=seed, epoch=epoch))
        assert other != first
        assert {frozenset(batch) for batch in other} != {frozenset(batch) for batch in first}


def test_training_batches_are_of_similar_lengths_in_shuffled_order() -> None:
    dataset = make_dataset(5000, longest=400)
    batches = list(training_batches(dataset, 16, seed=0, epoch=0))
    cells = sum(batch.tokens.numel() for batch in batches)
    assert len(dataset.tokens) / cells > 0.95
    widths = np.array([batch.tokens.shape[1] for batch in batches])
    assert abs(np.corrcoef(widths[:-1], widths[1:])[0, 1]) < 0.2


def test_evaluation_batches_come_longest_first() -> None:
    widths = [batch.tokens.shape[1] for batch in evaluation_batches(make_dataset(100), 8)]
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]


@pytest.mark.parametrize(
    ("size", "pad_to", "message"), [(0, "longest", "batch_size"), (4, "max", "longest"), (4, 3, "at least")]
)
def test_batches_that_cannot_be_made_raise_before_the_first(
    size: int, pad_to: str | int, message: str
) -> None:
    dataset = make_dataset(10)
    with pytest.raises(ValueError, match=message):
        training_batches(dataset, size, seed=0, epoch=0, pad_to=pad_to)
    with pytest.raises(ValueError, match=message):
        evaluation_batches(dataset, size, pad_to=pad_to)


def test_batches_leave_the_data_as_they_are() -> None:
    dataset = make_dataset(40)
    before = dataset.tokens.copy(), dataset.labels.copy()
    for batch in training_batches(dataset, 8, seed=0, epoch=0):
        batch.tokens.zero_()
        batch.labels.fill_(9)
    np.testing.assert_array_equal(dataset.tokens, before[0])
    np.testing.assert_array_equal(dataset.labels, before[1])


# Tasks


def load_small(name: str, **changes: object) -> TaskData:
    changes |= {"min_length": 10} if name == "listops" else {}
    return load_task(name, dataclasses.replace(SMALL, **changes))  # type: ignore[arg-type]


def test_a_task_is_complete_and_its_provenance_is_json() -> None:
    name = "listops"
    task = load_small(name)
    assert task.name == name and len(task.class_names) == task.num_classes
    assert [len(split) for split in (task.train, task.val, task.test)] == [60, 12, 13]
    for split in (task.train, task.val, task.test):
        assert split.tokens.min() >= 1 and split.tokens.max() < task.vocab_size
        assert set(split.labels.tolist()) <= set(range(task.num_classes))
        assert split.lengths.min() >= 1 and split.lengths.max() <= 150
    assert all(isinstance(task.symbols(token), str) for token in range(task.vocab_size))
    assert json.loads(json.dumps(task.provenance, allow_nan=False)) == task.provenance
    assert len(task.provenance["sha256"]) == 64
    for split_name in ("train", "val", "test"):
        assert_equal(getattr(task, split_name), getattr(load_small(name), split_name))


@pytest.mark.parametrize(
    "arguments",
    [
        {"tokenizer": "character"},
        {"max_length": 0},
        {"train_size": 0},
        {"word_vocabulary": 0},
        {"data_seed": -1},
        {"min_length": -1},
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(InputError, match="--"):
        DataSettings(**arguments)  # type: ignore[arg-type]


def test_an_unknown_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean 'listops'"):
        load_task("list_ops", DataSettings())
    generated = {"recall", "hold", "latest", "nearest", "lookup"}
    assert {"imdb", "listops", "pathfinder", "image", "bytes", *generated} == set(TASKS)


@pytest.mark.parametrize(
    ("task", "settings", "option"),
    [
        ("imdb", {"min_length": 5}, "--min-length"),
        ("pathfinder", {"min_length": 5}, "--min-length"),
        ("pathfinder", {"max_length": 5}, "--max-length"),
        ("image", {"max_length": 5}, "--max-length"),
        ("bytes", {"tokenizer": "word"}, "--tokenizer"),
        ("bytes", {"min_length": 5}, "--min-length"),
    ],
)
def test_a_setting_that_means_nothing_to_a_task_is_refused(
    task: str, settings: dict[str, object], option: str
) -> None:
    with pytest.raises(InputError, match=f"{option} means nothing to {task}"):
        load_task(task, DataSettings(**settings))  # type: ignore[arg-type]


def test_stats_show_sizes_lengths_labels_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--train-size", "50", "--val-size", "8", "--test-size", "9"]
    assert main(["stats", "--task", "listops", "--min-length", "10", "--max-length", "40", *sizes]) == 0
    out = capsys.readouterr().out
    for part in ("ListOps, 11 to 39 tokens: 17 token ids", "train           50", "labels of test: 0 ", "[M"):
        assert part in out


def test_stats_of_tokens_join_the_ids_of_a_position(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--train-size", "50", "--val-size", "8", "--test-size", "9", "--max-length", "24"]
    assert main(["stats", "--task", "nearest", *sizes]) == 0
    out = capsys.readouterr().out
    for part in ("The nearest of 8 points: 266 token ids, 8 classes", "labels of val: 0 ", "+v", "+?"):
        assert part in out


@pytest.mark.parametrize(
    "argv",
    [
        ["stats", "--task", "imbd"],
        ["stats", "--task", "listops", "--min-length", "90", "--max-length", "30"],
        ["stats", "--task", "imdb", "--data-dir", "/nowhere/at/all"],
        ["stats", "--task", "listops", "--data-dir", "/nowhere/at/all"],
        ["stats", "--tsk", "listops"],
        ["statistics"],
        [],
    ],
)
def test_bad_commands_end_in_one_line_and_exit_code_2(argv: list[str], refused: Refused) -> None:
    assert refused(main, *argv)


def test_the_task_table_is_the_only_place_a_task_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_small("listops")
    monkeypatch.setitem(data_pipeline.TASKS, "mine", lambda settings: task)
    assert load_task("mine", DataSettings()) is task


def test_the_batches_of_a_seed_are_those_of_every_other_machine() -> None:
    digest = hashlib.sha256()
    for batch in training_batches(make_dataset(100), 8, seed=1, epoch=2):
        digest.update(batch.tokens.numpy().astype("<i8").tobytes())
    assert digest.hexdigest() == "01c3ebeb1397fae318aa02f93f83a84b6efb27c1d1691527e1481c532e8b575d"
