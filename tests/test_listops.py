"""ListOps: right values, LRA's distribution, the same bytes everywhere, files that can be trusted."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from run_cases import Refused

from command_line import InputError
from data_pipeline import DataSettings, load_task, main
from tasks import listops
from tasks.listops import SYMBOLS, ListOpsSettings, generate_splits
from tasks.listops_tsv import count_arguments, read_tsv
from tasks.random_draws import RandomDraws
from tasks.token_dataset import TokenDataset

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ListOpsSettings()
SHORT = ListOpsSettings(min_length=10, max_length=80)

# LRA's own generator, 12,000 accepted samples (mean, and standard error or standard deviation of a sample).
LRA_SAMPLES, LRA_MEAN_LENGTH, LRA_LENGTH_DEVIATION = 12_000, 1033.1, 393.2
LRA_PERCENTILES = {1: 508, 5: 536, 10: 575, 25: 699, 50: 952, 75: 1311, 90: 1637, 95: 1793, 99: 1955}
LRA_LABELS = (17.5, 8.9, 7.9, 7.6, 8.9, 8.7, 7.7, 7.1, 8.7, 17.1)
LRA_EACH_OPERATOR, LRA_EACH_DIGIT, LRA_ACCEPTANCE = 36.8, 73.9, 0.083


def value_of(tokens: list[int]) -> int:
    """The value of an expression, by a stack over its token ids; nothing of the generator is used."""
    stack: list[list[int]] = [[]]
    operators: list[int] = []
    for token in tokens:
        if 2 <= token <= 11:
            stack[-1].append(token - 2)
        elif token <= 15:
            operators.append(token)
            stack.append([])
        else:
            operator, arguments = operators.pop(), sorted(stack.pop())
            middle = len(arguments) // 2
            if operator == 12:
                result = arguments[0]
            elif operator == 13:
                result = arguments[-1]
            elif operator == 15:
                result = sum(arguments) % 10
            elif len(arguments) % 2:
                result = arguments[middle]
            else:
                result = (arguments[middle - 1] + arguments[middle]) // 2
            stack[-1].append(result)
    assert len(stack) == 1 and len(stack[0]) == 1 and not operators
    return stack[0][0]


def text_of(tokens: list[int]) -> str:
    """LRA's text of an expression, from the tree of pairs that LRA builds."""
    stack: list[str] = []
    for token in tokens:
        symbol = SYMBOLS[token]
        if symbol.startswith("["):
            stack += ["<mark>", symbol]
            continue
        if symbol == "]":
            left = f"( {stack.pop()} ] )"
            assert stack.pop() == "<mark>"
            symbol = left
        stack.append(f"( {stack.pop()} {symbol} )" if stack else symbol)
    assert len(stack) == 1
    return stack[0]


def expressions(dataset: TokenDataset) -> list[bytes]:
    return [dataset.example(index).tobytes() for index in range(len(dataset))]


def assert_labels_are_values(splits: dict[str, TokenDataset]) -> None:
    for split in splits.values():
        values = [value_of(split.example(index).tolist()) for index in range(len(split))]
        np.testing.assert_array_equal(values, split.labels)


@pytest.fixture(scope="module")
def sample() -> TokenDataset:
    return generate_splits(DEFAULT, {"train": 12_000, "val": 0, "test": 0}, seed=3)["train"]


@pytest.fixture(scope="module")
def short_splits() -> dict[str, TokenDataset]:
    return generate_splits(SHORT, {"train": 3000, "val": 500, "test": 500}, seed=0)


def test_the_evaluator_of_these_tests_knows_each_operator() -> None:
    cases = {"[MIN 4 2 9 ]": 2, "[MAX 4 2 9 ]": 9, "[MED 9 1 4 ]": 4, "[MED 8 1 4 9 ]": 6, "[MED 1 2 ]": 1}
    cases |= {"[SM 9 9 5 ]": 3, "[MAX 2 9 [MIN 4 7 ] 0 ]": 9, "7": 7}
    for text, value in cases.items():
        assert value_of([SYMBOLS.index(symbol) for symbol in text.split()]) == value, text


def test_labels_are_the_values_of_3000_expressions() -> None:
    assert_labels_are_values(generate_splits(DEFAULT, {"train": 2800, "val": 100, "test": 100}, seed=1))


def test_labels_are_the_values_where_operators_have_up_to_23_arguments() -> None:
    wide = ListOpsSettings(min_length=20, max_length=400, max_depth=4, max_args=23)
    splits = generate_splits(wide, {"train": 300, "val": 20, "test": 20}, seed=1)
    assert max(int(count_arguments(split.tokens).max()) for split in splits.values()) == 23
    assert_labels_are_values(splits)


def test_lengths_are_distributed_as_in_lra(sample: TokenDataset) -> None:
    lengths = sample.lengths
    assert lengths.min() > 500 and lengths.max() < 2000
    # Two samples of 12,000: the difference has the standard errors of both.
    error = LRA_LENGTH_DEVIATION * (2 / LRA_SAMPLES) ** 0.5
    assert abs(lengths.mean() - LRA_MEAN_LENGTH) < 3 * error
    assert abs(lengths.std() - LRA_LENGTH_DEVIATION) < 3 * error / 2**0.5
    for percent, expected in LRA_PERCENTILES.items():
        below = np.mean(lengths <= expected)
        # The percentile lies where its share of our sample says; one token of rounding is allowed.
        rounding = np.mean(np.abs(lengths - expected) <= 1)
        share = percent / 100
        assert abs(below - share) < 3 * (2 * share * (1 - share) / LRA_SAMPLES) ** 0.5 + rounding, percent


def test_labels_are_distributed_as_in_lra(sample: TokenDataset) -> None:
    shares = np.bincount(sample.labels, minlength=10) / len(sample)
    expected = np.array(LRA_LABELS) / 100
    error = np.sqrt(2 * expected * (1 - expected) / LRA_SAMPLES)
    assert (np.abs(shares - expected) < 3 * error + 0.0005).all()  # 0.05 points: rounding


def test_operators_and_digits_are_as_many_as_in_lra(sample: TokenDataset) -> None:
    owner = np.repeat(np.arange(len(sample)), sample.lengths)
    for token in range(2, 16):
        counts = np.bincount(owner[sample.tokens == token], minlength=len(sample))
        expected = LRA_EACH_OPERATOR if token >= 12 else LRA_EACH_DIGIT
        error = counts.std() * (2 / LRA_SAMPLES) ** 0.5
        assert abs(counts.mean() - expected) < 3 * error + 0.05, SYMBOLS[token]


def test_roots_are_uniform_and_every_expression_uses_nine_operator_levels(sample: TokenDataset) -> None:
    roots = np.bincount(sample.tokens[sample.offsets[:-1]], minlength=17)[12:16] / len(sample)
    assert (np.abs(roots - 0.25) < 3 * (0.25 * 0.75 / len(sample)) ** 0.5).all()
    step = ((sample.tokens >= 12) & (sample.tokens < 16)).astype(int) - (sample.tokens == 16)
    open_operators = np.cumsum(step)  # each expression ends at 0
    deepest = np.maximum.reduceat(open_operators, sample.offsets[:-1])
    assert deepest.max() == 9
    assert np.mean(deepest == 9) > 0.999


def test_one_drawn_tree_in_twelve_fits() -> None:
    draws = RandomDraws(0, "acceptance")
    trees = 40_960
    found = sum(len(listops.draw_expressions(DEFAULT, 8192, draws)) for _ in range(trees // 8192))
    assert abs(found / trees - LRA_ACCEPTANCE) < 3 * (LRA_ACCEPTANCE / trees) ** 0.5 + 0.0005


def test_no_expression_comes_twice_within_or_across_splits() -> None:
    # So short that most draws have been there before.
    tiny = ListOpsSettings(min_length=3, max_length=6)
    splits = generate_splits(tiny, {"train": 3000, "val": 200, "test": 200}, seed=0)
    every = [expression for split in splits.values() for expression in expressions(split)]
    assert [len(split) for split in splits.values()] == [3000, 200, 200]
    assert len(set(every)) == 3400


def test_a_larger_training_set_begins_with_the_smaller_and_leaves_the_others_alone() -> None:
    small = generate_splits(SHORT, {"train": 40, "val": 30, "test": 20}, seed=5)
    large = generate_splits(SHORT, {"train": 90, "val": 30, "test": 20}, seed=5)
    assert expressions(large["train"])[:40] == expressions(small["train"])
    for name in ("val", "test"):
        np.testing.assert_array_equal(large[name].tokens, small[name].tokens)


def test_the_bytes_are_those_of_every_other_machine(short_splits: dict[str, TokenDataset]) -> None:
    digest = hashlib.sha256()
    for split in short_splits.values():
        digest.update(split.tokens.tobytes() + split.labels.astype("<i8").tobytes())
    assert digest.hexdigest() == "0ef9941545dc9e41093ea157636160fb465a46385abbb81c44902711615c2ea3"


@pytest.mark.parametrize(
    "arguments",
    [
        {"min_length": 80, "max_length": 81},
        {"min_length": -1},
        {"max_depth": 0},
        {"max_args": 1},
        {"min_length": 500, "max_depth": 3},  # at most 2 + 10 * 12 tokens
        {"min_length": 5, "max_length": 60, "max_depth": 1},
    ],
)
def test_settings_that_no_expression_meets_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(InputError):
        ListOpsSettings(**arguments)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (ListOpsSettings(min_length=4, max_length=6, max_args=2), 1),  # lengths are 1, 4, 7, ...
        (ListOpsSettings(min_length=3, max_length=5), 401),  # 4 operators with 2 digits: 400 expressions
        (ListOpsSettings(min_length=5000, max_length=5003), 100),
    ],
)
def test_a_range_that_hardly_any_tree_meets_ends_in_an_error(settings: ListOpsSettings, size: int) -> None:
    with pytest.raises(InputError, match="widen"):
        generate_splits(settings, {"train": size, "val": 0, "test": 0}, seed=0)


def test_files_are_as_lra_writes_them_and_read_back_the_same(tmp_path: Path) -> None:
    options = ["--train", "70", "--val", "7", "--test", "8", "--min-length", "0", "--max-length", "90"]
    assert main(["listops", "--output-dir", str(tmp_path), "--seed", "3", *options]) == 0
    made = generate_splits(ListOpsSettings(0, 90), {"train": 70, "val": 7, "test": 8}, seed=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "basic_test.tsv",
        "basic_train.tsv",
        "basic_val.tsv",
    ]
    for name, split in made.items():
        path = tmp_path / f"basic_{name}.tsv"
        lines = [
            f"{text_of(split.example(index).tolist())}\t{split.labels[index]}" for index in range(len(split))
        ]
        assert path.read_text() == "Source\tTarget\n" + "\n".join(lines) + "\n"
        back = read_tsv(path)
        for field in ("tokens", "offsets", "labels"):
            np.testing.assert_array_equal(getattr(back, field), getattr(split, field))


GOOD_LINE = b"( ( ( [MAX 2 ) 9 ) ] )\t9\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"( ( ( [MAX 2 ) 9 ) ] )\n", "2 fields"),
        (b"( ( ( [MAX 2 ) 9 ) ] )\t9\t9\n", "2 fields"),
        (b"\n", "2 fields"),
        (b"( ( ( [MAX 2 ) 9 ) ] )\t10\n", "0..9"),
        (b"( ( ( [MAX 2 ) 9 ) ] )\t-1\n", "0..9"),
        (b"( ( ( [MAX 2 ) 9 ) ] )\t\n", "0..9"),
        ("( ( ( [MAX 2 ) 9 ) ] )\t²\n".encode(), "0..9"),
        (b"( ( ( [FIRST 2 ) 9 ) ] )\t2\n", "unknown token '[FIRST'"),
        (b"( ( ( [MAX 2 ) 11 ) ] )\t2\n", "unknown token '11'"),
        (b"( ( ( [MAX 2 ) <unk> ) ] )\t2\n", "unknown token '<unk>'"),
        (b"( ( ( [MAX 2 ) 9 ) \0] )\t9\n", "NUL"),
        (b"( ( ( [MAX 2 ) 9 ) ] ) \xff\t9\n", "UTF-8"),
        (b"( ( ( [MAX 2 ) 9 ) ]\t9\n", "parentheses"),
        (b"( ( ( [MAX 2 ) 9 ) )\t9\n", "brackets"),
        (b"( [MAX ] )\t9\n", "no argument"),
        (b"( ( ( [MAX 2 ) 9 ) ] ) 4\t9\n", "brackets"),
        (b"\t9\n", "brackets"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "basic_train.tsv"
    path.write_bytes(b"Source\tTarget\n" + GOOD_LINE + line + GOOD_LINE)
    with pytest.raises(InputError) as caught:
        read_tsv(path)
    assert f"{path}, line 3: " in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value) and "\0" not in str(caught.value)


def test_a_value_that_is_not_the_expression_s_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "basic_train.tsv"
    path.write_bytes(b"Source\tTarget\n" + GOOD_LINE * 1500 + GOOD_LINE.replace(b"\t9", b"\t2") + GOOD_LINE)
    with pytest.raises(InputError) as caught:
        read_tsv(path)
    assert str(caught.value) == f"{path}, line 1502: the expression's value is 9, and the file says 2"


def test_expressions_that_files_share_are_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = b"( ( ( [MIN 2 ) 9 ) ] )\t2\n"
    for split, lines in {"train": GOOD_LINE * 3 + other, "val": other, "test": GOOD_LINE}.items():
        (tmp_path / f"basic_{split}.tsv").write_bytes(b"Source\tTarget\n" + lines)
    argv = ["stats", "--task", "listops", "--data-dir", str(tmp_path), "--min-length", "0"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "listops: 3 of the expressions of train in test too",
        "listops: 1 of the expressions of val in train too",
    ]
    assert "identical examples, val in test: 0" in captured.out


@pytest.mark.parametrize("content", [b"", b"Source,Target\n", GOOD_LINE, b"Source\tTarget\n"])
def test_a_file_without_header_or_lines_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "basic_train.tsv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"basic_train\.tsv"):
        read_tsv(path)


def test_the_task_reads_files_of_its_data_folder(tmp_path: Path) -> None:
    sizes = ["--train", "40", "--val", "9", "--test", "8"]
    main(["listops", "--output-dir", str(tmp_path), "--min-length", "10", "--max-length", "80", *sizes])
    settings = DataSettings(data_dir=str(tmp_path), min_length=10, max_length=80, train_size=25)
    task = load_task("listops", settings)
    assert [len(split) for split in (task.train, task.val, task.test)] == [25, 9, 8]
    assert task.provenance["source"] == "basic_train.tsv, basic_val.tsv, basic_test.tsv"
    assert_labels_are_values({"train": task.train})
    with pytest.raises(InputError, match="less than 2000"):
        load_task("listops", DataSettings(data_dir=str(tmp_path)))
    (tmp_path / "basic_val.tsv").unlink()
    with pytest.raises(InputError, match=r"not basic_val\.tsv"):
        load_task("listops", settings)


@pytest.mark.parametrize(
    "options",
    [
        ["--train", "-1"],
        ["--train", "0"],
        ["--test", "0"],
        ["--seed", "-1"],
        ["--min-length", "90", "--max-length", "50"],
        ["--min-length", "100000", "--max-length", "100000000", "--max-depth", "4"],
        ["--tran", "5"],
    ],
)
def test_bad_options_end_in_one_line_and_leave_nothing(
    tmp_path: Path, options: list[str], refused: Refused
) -> None:
    assert refused(main, "listops", "--output-dir", tmp_path / "new", *options)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_ends_in_one_line_before_any_work(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(listops, "generate_splits", lambda *_, **__: pytest.fail("worked before checking"))
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert refused(main, "listops", "--output-dir", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_midway_leaves_nothing(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tasks.listops_tsv.write_tsv", fail)
    options = ["--train", "3", "--val", "1", "--test", "1", "--min-length", "5", "--max-length", "50"]
    assert "No space left" in refused(main, "listops", "--output-dir", tmp_path, *options)
    assert list(tmp_path.iterdir()) == []
