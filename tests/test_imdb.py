"""IMDb: read from archives, trees, cache and network, whole or not at all."""

import dataclasses
import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_cases import Refused

from command_line import InputError
from data_pipeline import DataSettings, load_task, main
from tasks import cifar_images, imdb
from tasks.imdb import Reviews, load_reviews, separate_copies
from tasks.token_dataset import TokenDataset, concatenate, offsets_of

FOLDERS = ("train/neg", "train/pos", "test/neg", "test/pos")
Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def small_and_offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Three short reviews a folder, a cache of the test's own, and addresses that nobody answers at."""
    monkeypatch.setattr(imdb, "REVIEWS_PER_FOLDER", 3)
    monkeypatch.setattr(imdb, "LONGEST_REVIEW", 98)
    for module in (imdb, cifar_images):
        url = f"http://127.0.0.1:9/{module.OFFICIAL.name}"
        monkeypatch.setattr(module, "OFFICIAL", dataclasses.replace(module.OFFICIAL, url=url))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache_home")))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def members() -> Files:
    """The files of a small archive, in an order that is not the sorted one, with files that are not read."""
    found: Files = {"aclImdb/README": b"read me", "aclImdb/train/unsup/0_0.txt": b"unlabelled"}
    for name in names_of((10, 2, 1)):
        found[name] = f"{name}<br />Ça alors! \x80".encode("latin-1")
    return found


def names_of(numbers: Iterable[int]) -> list[str]:
    rated = [(place, 7 if place.endswith("pos") else 3) for place in FOLDERS]
    return [f"aclImdb/{place}/{number}_{rating}.txt" for place, rating in rated for number in numbers]


Thirty = tuple[Files, DataSettings]


@pytest.fixture
def thirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Thirty:
    """An archive with 30 reviews a folder, in which a training review comes in the test set too, and the
    settings that find it."""
    monkeypatch.setattr(imdb, "REVIEWS_PER_FOLDER", 30)
    files = {name: f"{name} <br /> É".encode() for name in names_of(range(30))}
    files["aclImdb/train/neg/4_3.txt"] = files["aclImdb/test/neg/7_3.txt"]
    write_archive(tmp_path, tar_bytes(files))
    return files, DataSettings(data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))


def tar_bytes(files: Files, extra: str = "", kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    """The files, then an extra member of the kind, where it has a name."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if extra:
            info = tarfile.TarInfo(extra)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    return out.getvalue()


def write_archive(folder: Path, content: bytes, name: str = "aclImdb_v1.tar.gz") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(gzip.compress(content, compresslevel=1, mtime=0))
    return folder / name


def write_tree(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder / "aclImdb"


def texts_of(split: TokenDataset, added: int = 0) -> list[bytes]:
    return [bytes((split.example(i) - added).astype(np.uint8)) for i in range(len(split))]


def contents(reviews: Reviews) -> list[tuple[bytes, int]]:
    splits = (reviews.train, reviews.test)
    return [pair for part in splits for pair in zip(texts_of(part), part.labels.tolist(), strict=True)]


def expected_contents() -> list[tuple[bytes, int]]:
    names = names_of((10, 1, 2))  # by name: "10_3.txt" < "1_3.txt"
    return [(members()[name], int("/pos/" in name)) for name in names]


def assert_refused(folder: Path, refused: Refused, *words: str) -> None:
    """The command names the fault in one line, exits with 2, and leaves no file that was not there."""
    before = sorted(folder.rglob("*"))
    said = refused(main, "imdb", "--data-dir", folder)
    assert all(word in said for word in words), said
    cache = folder.parent / "cache_of_refused"
    with pytest.raises(InputError):
        load_task("imdb", DataSettings(data_dir=str(folder), cache_dir=str(cache)))
    assert sorted(folder.rglob("*")) == before
    assert not list(cache.rglob("*"))


def test_archives_and_trees_are_read_in_sorted_order_with_their_labels(tmp_path: Path) -> None:
    dotted = tar_bytes({f"./{name}": content for name, content in members().items()})
    archive = write_archive(tmp_path / "1", tar_bytes(members()))
    others = [write_archive(tmp_path / name, dotted, f"aclImdb_{name}.tar.gz") for name in ("v1", "labeled")]
    tree = write_tree(tmp_path / "tree", members())
    for source in (archive, archive.parent, *(other.parent for other in others), tree, tree.parent):
        assert contents(load_reviews(source, tmp_path / f"cache_{source.name}")) == expected_contents()
    reviews = load_reviews(archive, tmp_path / "cache")
    assert reviews.sha256 == hashlib.sha256(archive.read_bytes()).hexdigest() and not reviews.official


def test_the_second_read_comes_from_the_cache_and_a_damaged_one_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(tmp_path, tar_bytes(members()))
    load_reviews(tmp_path, tmp_path / "cache")
    [entry] = (tmp_path / "cache").iterdir()
    whole = entry.read_bytes()
    for damaged in (b"", b"no archive", whole[:-200], whole.replace(b"train", b"brain")):
        entry.write_bytes(damaged)
        assert contents(load_reviews(tmp_path, tmp_path / "cache")) == expected_contents()
    monkeypatch.setattr(imdb, "read_archive", lambda path: pytest.fail("read again"))
    assert contents(load_reviews(tmp_path, tmp_path / "cache")) == expected_contents()


def test_another_archive_or_a_changed_tree_is_read_anew(tmp_path: Path) -> None:
    write_archive(tmp_path, tar_bytes(members()))
    tree = write_tree(tmp_path / "unpacked", members())
    for source in (tmp_path, tree):
        load_reviews(source, tmp_path / "cache")
    write_archive(tmp_path, tar_bytes(members() | {"aclImdb/train/neg/10_3.txt": b"changed"}))
    (tree / "train/neg/10_3.txt").write_bytes(b"changed too")
    assert contents(load_reviews(tmp_path, tmp_path / "cache"))[0] == (b"changed", 0)
    assert contents(load_reviews(tree, tmp_path / "cache"))[0] == (b"changed too", 0)


def test_a_cache_that_cannot_be_written_costs_nothing_but_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_archive(tmp_path, tar_bytes(members()))
    (tmp_path / "file").write_text("no folder")
    assert contents(load_reviews(tmp_path, tmp_path / "file" / "cache")) == expected_contents()
    [line] = capsys.readouterr().err.splitlines()
    assert f"the cache {tmp_path / 'file' / 'cache'} cannot be written" in line


EVIL = ("../evil.txt", "/etc/evil.txt", "aclImdb/../../evil.txt", "elsewhere/evil.txt")


@pytest.mark.parametrize(
    "member",
    [
        *[(name, tarfile.REGTYPE) for name in EVIL],
        ("aclImdb/train/pos/9_9.txt", tarfile.SYMTYPE, "/etc/passwd"),
        ("aclImdb/train/pos/9_9.txt", tarfile.LNKTYPE, "aclImdb/train/pos/1_7.txt"),
        *[("aclImdb/device", kind) for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)],
    ],
)
def test_an_archive_with_a_member_that_has_no_business_in_it_is_refused(
    tmp_path: Path, member: tuple[Any, ...], refused: Refused
) -> None:
    write_archive(tmp_path / "data", tar_bytes(members(), *member))
    assert_refused(tmp_path / "data", refused, "refused", member[0])
    assert not list(tmp_path.rglob("evil*"))


def test_an_archive_that_is_cut_anywhere_or_has_a_review_twice_is_refused(
    tmp_path: Path, refused: Refused
) -> None:
    path = write_archive(tmp_path / "data", tar_bytes(members()))
    whole = path.read_bytes()
    for kept in (0.0, 0.02, 0.5, 0.999):
        path.write_bytes(whole[: int(kept * len(whole))])
        assert_refused(path.parent, refused, "aclImdb_v1.tar.gz is damaged or truncated")
    write_archive(path.parent, tar_bytes(members())[: 1024 * 8])  # between two members
    assert_refused(path.parent, refused, "aclImdb/test/neg has 0 ")
    write_archive(path.parent, tar_bytes(members(), "aclImdb/test/pos/1_7.txt"))
    assert_refused(path.parent, refused, "'aclImdb/test/pos/1_7.txt' comes twice")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("test/neg/2_3.txt", None, "aclImdb/test/neg has 2 reviews instead of 3"),
        ("train/pos/4_9.txt", b"x", "aclImdb/train/pos has 4 reviews instead of 3"),
        ("train/pos/2_7.txt", b" \n", "aclImdb/train/pos/2_7.txt is empty"),
        ("train/pos/2_7.txt", b"x" * 99, "than 98 bytes"),
    ],
)
def test_wrong_counts_and_empty_or_endless_reviews_are_refused_in_archives_and_trees(
    tmp_path: Path, name: str, content: bytes | None, words: str, refused: Refused
) -> None:
    files = members() | {f"aclImdb/{name}": content or b""}
    if content is None:
        del files[f"aclImdb/{name}"]
    write_archive(tmp_path / "packed", tar_bytes(files))
    write_tree(tmp_path / "unpacked", files)
    for folder in ("packed", "unpacked"):
        assert_refused(tmp_path / folder, refused, words)


def test_the_task_has_a_stratified_tenth_for_validation_and_raw_bytes(thirty: Thirty) -> None:
    files, settings = thirty
    task = load_task("imdb", settings)
    parts = (task.train, task.val, task.test)
    assert [(len(part), int(part.labels.sum())) for part in parts] == [(54, 27), (6, 3), (60, 30)]
    train, val, test = (texts_of(part, 1) for part in parts)
    assert sorted(train + val) == sorted(text for name, text in files.items() if "/train/" in name)
    assert sorted(test) == sorted(text for name, text in files.items() if "/test/" in name)
    for part, found in zip(parts, (train, val, test), strict=True):
        assert [int(b"pos" in text) for text in found] == part.labels.tolist()
    assert (task.vocab_size, task.num_classes, task.name) == (257, 2, "imdb")
    identical = task.provenance["identical"]
    assert identical["train in test"] + identical["val in test"] == 1 and identical["val in train"] == 0


def test_the_task_of_bytes_reads_the_same_splits_as_windows(
    thirty: Thirty, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(thirty[1], train_size=500, val_size=90, test_size=800, max_length=32)
    reviews, task = load_task("imdb", thirty[1]), load_task("bytes", settings)
    for name in ("train", "val", "test"):
        texts = texts_of(getattr(reviews, name), 1)
        stream = b"\0".join(text for text in texts if name == "test" or b"test" not in text)
        found = set(texts_of(getattr(task, name), 1))
        assert all(window in stream for window in found) and len(found) > 30
    argv = f"stats --task bytes --data-dir {settings.data_dir} --max-length 32"
    assert main(argv.split()) == 0
    assert "labels of test, the 32 most frequent: \\x00 " in capsys.readouterr().out


def test_identical_reviews_stay_on_one_side_of_the_split_and_all_others_as_drawn() -> None:
    texts = [b"%d" % number for number in range(40)]
    texts[5] = texts[21] = b"twice"  # drawn 5, not 21; 21 is of the other class
    texts[8] = texts[9] = b"both drawn"
    tokens = np.frombuffer(b"".join(texts), np.uint8)
    drawn = np.array([2, 5, 8, 9, 30, 31])
    train = TokenDataset(tokens, offsets_of(list(map(len, texts))), np.arange(40) // 20)
    validation, rest = separate_copies(train, drawn)
    assert validation.tolist() == [2, 6, 8, 9, 30, 31]  # 6: the next of its class that has no copy
    assert rest.tolist() == [0, 1, 3, 4, 5, 7, *range(10, 30), *range(32, 40)]
    assert drawn.tolist() == [2, 5, 8, 9, 30, 31]


def test_the_real_reviews_have_the_known_lengths_and_copies(
    real_reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imdb, "REVIEWS_PER_FOLDER", 12_500)
    monkeypatch.setattr(imdb, "LONGEST_REVIEW", 1 << 20)
    settings = DataSettings(data_dir=str(real_reviews), cache_dir=str(tmp_path), max_length=1 << 20)
    task = load_task("imdb", settings)
    training = concatenate([task.train, task.val])
    known = {training: (1325.2, 979, 13_704, 0.0291), task.test: (1293.9, 963, 12_988, 0.0267)}
    for split, (mean, median, longest, cut) in known.items():
        assert len(split) == 25_000 and split.labels.sum() == 12_500
        assert round(float(split.lengths.mean()), 1) == mean and np.median(split.lengths) == median
        assert split.lengths.max() == longest and round(float(np.mean(split.lengths > 4096)), 4) == cut
    found = task.provenance["identical"]
    assert found["val in train"] == 0 and found["train in test"] + found["val in test"] == 105 + 18
