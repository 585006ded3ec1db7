"""ListOps: right values, LRA's distribution, the same bytes everywhere, files that can be trusted."""

import hashlib
from functools import reduce
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from run_cases import Refused

from command_line import InputError
from data_pipeline import DataSettings, load_task, main
from tasks import listops
from tasks.listops import SYMBOLS, ListOpsSettings, generate_splits
from tasks.listops_tsv import count_arguments, read_tsv, value_of
from tasks.token_dataset import TokenDataset

DEFAULT, SHORT = ListOpsSettings(), ListOpsSettings(min_length=10, max_length=80)

# LRA's own generator, 12,000 accepted samples: means, standard deviation, percentiles and shares in %.
LRA_SAMPLES, LRA_MEAN_LENGTH, LRA_LENGTH_DEVIATION = 12_000, 1033.1, 393.2
LRA_PERCENTILES = {1: 508, 5: 536, 10: 575, 25: 699, 50: 952, 75: 1311, 90: 1637, 95: 1793, 99: 1955}
LRA_LABELS = (17.5, 8.9, 7.9, 7.6, 8.9, 8.7, 7.7, 7.1, 8.7, 17.1)
LRA_EACH = 73.9, 36.8  # digit, operator
SAMPLES = 4000  # of ours
OF_TWO = (1 / LRA_SAMPLES + 1 / SAMPLES) ** 0.5  # the standard error of two samples' difference


def text_of(tokens: list[int]) -> str:
    """LRA's text of an expression: what stands in brackets is joined from the left in pairs."""
    stack: list[list[str]] = [[]]
    for symbol in map(SYMBOLS.__getitem__, tokens):
        if symbol.startswith("["):
            stack.append([])
        stack[-1].append(symbol)
        if symbol == "]":
            joined = reduce("( {} {} )".format, stack.pop())
            stack[-1].append(joined)
    [[text]] = stack
    return text


def make(
    settings: ListOpsSettings, train: int, val: int = 0, test: int = 0, seed: int = 0
) -> dict[str, TokenDataset]:
    return generate_splits(settings, {"train": train, "val": val, "test": test}, seed)


def expressions(dataset: TokenDataset) -> list[bytes]:
    return [dataset.example(index).tobytes() for index in range(len(dataset))]


def assert_labels_are_values(dataset: TokenDataset) -> None:
    assert [value_of(expression) for expression in expressions(dataset)] == dataset.labels.tolist()


@pytest.fixture(scope="module")
def sample() -> TokenDataset:
    return make(DEFAULT, SAMPLES, seed=3)["train"]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        *(("7", 7), ("[MIN 4 2 9 ]", 2), ("[MAX 4 2 9 ]", 9), ("[SM 9 9 5 ]", 3)),
        *(("[MED 9 2 4 ]", 4), ("[MED 9 2 5 0 ]", 3), ("[MED 3 ]", 3)),  # the floor of 3.5
        ("[SM 1 [MAX 2 [MIN 9 3 ] ] [MED 5 5 ] 6 ]", 5),
    ],
)
def test_the_value_of_an_expression(expression: str, value: int) -> None:
    assert value_of(bytes(map(SYMBOLS.index, expression.split()))) == value


def test_labels_are_the_values_also_where_operators_have_23_arguments(sample: TokenDataset) -> None:
    assert_labels_are_values(sample.take(np.arange(1000)))
    wide = make(ListOpsSettings(min_length=20, max_length=400, max_depth=4, max_args=23), 340)["train"]
    assert count_arguments(wide.tokens).max() == 23
    assert_labels_are_values(wide)


def errors(shares: np.ndarray) -> np.ndarray:
    """Three standard errors of the difference of a share in two samples."""
    return 3 * OF_TWO * np.sqrt(shares * (1 - shares))


def test_lengths_are_distributed_as_in_lra(sample: TokenDataset) -> None:
    lengths = sample.lengths
    assert lengths.min() > 500 and lengths.max() < 2000
    error = LRA_LENGTH_DEVIATION * OF_TWO
    assert abs(lengths.mean() - LRA_MEAN_LENGTH) < 3 * error
    assert abs(lengths.std() - LRA_LENGTH_DEVIATION) < 3 * error / 2**0.5
    shares, expected = np.array(list(LRA_PERCENTILES)) / 100, np.array(list(LRA_PERCENTILES.values()))
    below = (lengths[:, None] <= expected).mean(0)
    rounding = (np.abs(lengths[:, None] - expected) <= 1).mean(0)  # one token
    assert (np.abs(below - shares) < errors(shares) + rounding).all()


def test_labels_operators_and_digits_are_distributed_as_in_lra_roots_evenly_over_nine_levels(
    sample: TokenDataset,
) -> None:
    shares, expected = np.bincount(sample.labels, minlength=10) / len(sample), np.array(LRA_LABELS) / 100
    assert (np.abs(shares - expected) < errors(expected) + 0.0005).all()  # 0.05 points: rounding
    owner = np.repeat(np.arange(len(sample)), sample.lengths)
    for token in range(2, 16):
        counts = np.bincount(owner[sample.tokens == token], minlength=len(sample))
        mean, error = LRA_EACH[token >= 12], counts.std() * OF_TWO
        assert abs(counts.mean() - mean) < 3 * error + 0.05, SYMBOLS[token]
    roots = np.bincount(sample.tokens[sample.offsets[:-1]], minlength=17)[12:16] / len(sample)
    assert (np.abs(roots - 0.25) < 3 * (0.25 * 0.75 / len(sample)) ** 0.5).all()
    step = ((sample.tokens >= 12) & (sample.tokens < 16)).astype(int) - (sample.tokens == 16)
    deepest = np.maximum.reduceat(np.cumsum(step), sample.offsets[:-1])  # each expression ends at 0
    assert deepest.max() == 9 and np.mean(deepest == 9) > 0.999


def test_no_expression_comes_twice_within_or_across_splits() -> None:
    tiny = make(ListOpsSettings(min_length=3, max_length=6), 3000, 200, 200)  # most draws were there before
    every = [expression for split in tiny.values() for expression in expressions(split)]
    assert len(set(every)) == len(every) == 3400


def test_bytes_are_those_of_every_other_machine_and_of_another_training_size() -> None:
    splits, smaller = make(SHORT, 3000, 500, 500), make(SHORT, 40, 500, 500)
    digest = hashlib.sha256()
    for split in splits.values():
        digest.update(split.tokens.tobytes() + split.labels.astype("<i8").tobytes())
    assert digest.hexdigest() == "0ef9941545dc9e41093ea157636160fb465a46385abbb81c44902711615c2ea3"
    assert expressions(splits["train"])[:40] == expressions(smaller["train"])
    assert all(expressions(splits[name]) == expressions(smaller[name]) for name in ("val", "test"))


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (ListOpsSettings(min_length=4, max_length=6, max_args=2), 1),  # lengths are 1, 4, 7, ...
        (ListOpsSettings(min_length=3, max_length=5), 401),  # 4 operators with 2 digits: 400 expressions
    ],
)
def test_a_range_that_hardly_any_tree_meets_ends_in_an_error(settings: ListOpsSettings, size: int) -> None:
    with pytest.raises(InputError, match="widen --min-length and --max-length"):
        make(settings, size)


def test_files_are_as_lra_writes_them_and_read_back_the_same(tmp_path: Path) -> None:
    options = "--seed 3 --train 70 --val 7 --test 8 --min-length 0 --max-length 90"
    assert main(["listops", "--output-dir", str(tmp_path), *options.split()]) == 0
    for name, split in make(ListOpsSettings(0, 90), 70, 7, 8, seed=3).items():
        path = tmp_path / f"basic_{name}.tsv"
        texts = [text_of(split.example(index).tolist()) for index in range(len(split))]
        lines = [f"{text}\t{label}\n" for text, label in zip(texts, split.labels, strict=True)]
        assert path.read_text() == "Source\tTarget\n" + "".join(lines)
        back = read_tsv(path)
        for field in ("tokens", "offsets", "labels"):
            np.testing.assert_array_equal(getattr(back, field), getattr(split, field))
    assert len(list(tmp_path.iterdir())) == 3


HEADER, GOOD = b"Source\tTarget\n", b"( ( ( [MAX 2 ) 9 ) ] )\t9\n"
BAD_LINES = [
    (b"( ( ( [MAX 2 ) 9 ) ] )", "expected 2 fields"),
    (b"( ( ( [MAX 2 ) 9 ) ] )\t9\t9", "expected 2 fields"),
    (b"( ( ( [MAX 2 ) 9 ) ] )\t10", "expected a value of 0..9, got '10'"),
    (b"( ( ( [MAX 2 ) 9 ) ] )\tx", "expected a value of 0..9, got 'x'"),
    (b"( ( ( [FIRST 2 ) 9 ) ] )\t2", "unknown token '[FIRST'"),
    (b"( ( ( [MAX 2 ) <unk> ) ] )\t2", "unknown token '<unk>'"),
    (b"( ( ( [MAX 2 ) 9 ) \0] )\t9", "a NUL byte"),
    (b"( ( ( [MAX 2 ) 9 ) ] ) \xff\t9", "not UTF-8"),
    (b"( ( ( [MAX 2 ) 9 ) ]\t9", "parentheses"),
    (b"( ( ( [MAX 2 ) 9 ) )\t9", "brackets"),
    (b"( ( [MAX 2 ) )\t2", "brackets"),
    (b"( [MAX ] )\t9", "brackets do not match, or an operator has no argument"),
    (b"( ( ( [MAX 2 ) 9 ) ] ) 4\t9", "brackets"),
    (b"\t9", "brackets"),
]
BAD_FILES = [
    (b"", "line 1: expected the header"),
    (GOOD, "line 1: expected the header"),
    (HEADER, "has no expressions"),
    (HEADER + GOOD * 1500 + GOOD.replace(b"\t9", b"\t2") + GOOD, "line 1502: the expression's value is 9"),
    *((HEADER + GOOD + line + b"\n" + GOOD, f"line 3: {said}") for line, said in BAD_LINES),
]


@pytest.mark.parametrize(("content", "said"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_what_is_malformed_or_wrong_is_named_by_file_and_line(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "basic_train.tsv"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_tsv(path)
    message = str(caught.value)
    assert str(path) in message and said in message and message.isprintable()


def test_expressions_that_files_share_are_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = b"( ( ( [MIN 2 ) 9 ) ] )\t2\n"
    for split, lines in {"train": GOOD * 3 + other, "val": other, "test": GOOD}.items():
        (tmp_path / f"basic_{split}.tsv").write_bytes(HEADER + lines)
    assert main(["stats", "--task", "listops", "--data-dir", str(tmp_path), "--min-length", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "listops: 3 of the expressions of train in test too",
        "listops: 1 of the expressions of val in train too",
    ]
    assert "identical examples, val in test: 0" in captured.out


def test_the_task_reads_files_of_its_data_folder(tmp_path: Path) -> None:
    options = "--min-length 10 --max-length 80 --train 40 --val 9 --test 8"
    main(["listops", "--output-dir", str(tmp_path), *options.split()])
    settings = DataSettings(data_dir=str(tmp_path), min_length=10, max_length=80, train_size=25)
    task = load_task("listops", settings)
    assert [len(split) for split in (task.train, task.val, task.test)] == [25, 9, 8]
    assert task.provenance["source"] == "basic_train.tsv, basic_val.tsv, basic_test.tsv"
    assert_labels_are_values(task.train)
    with pytest.raises(InputError, match="less than 2000"):
        load_task("listops", DataSettings(data_dir=str(tmp_path)))
    (tmp_path / "basic_val.tsv").unlink()
    with pytest.raises(InputError, match=r"not basic_val\.tsv"):
        load_task("listops", settings)


def test_a_folder_that_cannot_be_written_ends_in_one_line_before_any_work_and_a_failed_write_leaves_nothing(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr("tasks.listops_tsv.write_tsv", Mock(side_effect=OSError(28, "No space left")))
    options = "--train 3 --val 1 --test 1 --min-length 5 --max-length 50"
    assert "No space left" in refused(main, "listops", "--output-dir", tmp_path, *options.split())
    monkeypatch.setattr(listops, "generate_splits", lambda *_, **__: pytest.fail("worked before checking"))
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"cannot write to {folder}" in refused(main, "listops", "--output-dir", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
