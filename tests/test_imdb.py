"""IMDb: read from archives, trees, cache and network, whole or not at all."""

import dataclasses
import gzip
import hashlib
import io
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_cases import Refused

from command_line import InputError
from data_pipeline import DataSettings, DataUnavailableError, load_task, main
from tasks import imdb
from tasks.imdb import Reviews, load_reviews, read_source, separate_copies
from tasks.token_dataset import TokenDataset, offsets_of

PER_FOLDER = 3
ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [(split, sentiment) for split in ("train", "test") for sentiment in ("neg", "pos")]

Members = dict[str, bytes]


@pytest.fixture(autouse=True)
def small_and_offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Three reviews a folder, a cache of the test's own, and an address that nobody answers at."""
    monkeypatch.setattr(imdb, "REVIEWS_PER_FOLDER", PER_FOLDER)
    nowhere = dataclasses.replace(imdb.OFFICIAL, url="http://127.0.0.1:9/aclImdb_v1.tar.gz")
    monkeypatch.setattr(imdb, "OFFICIAL", nowhere)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache_home")))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def members() -> Members:
    """The files of a small archive, in an order that is not the sorted one, with files that are not read."""
    found: Members = {"aclImdb/README": b"read me", "aclImdb/train/unsup/0_0.txt": b"unlabelled"}
    for split, sentiment in FOLDERS:
        for number in (10, 2, 1):
            name = f"aclImdb/{split}/{sentiment}/{number}_{7 if sentiment == 'pos' else 3}.txt"
            found[name] = f"{split} {sentiment} {number}<br />Ça alors! \x80".encode("latin-1")
    return found


def tar_bytes(files: Members, extra: tarfile.TarInfo | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if extra is not None:
            archive.addfile(extra)
    return out.getvalue()


def write_archive(folder: Path, content: bytes, name: str = "aclImdb_v1.tar.gz") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(gzip.compress(content, mtime=0))
    return path


def write_tree(folder: Path, files: Members) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder / "aclImdb"


def contents(reviews: Reviews) -> list[tuple[bytes, int]]:
    return [
        (split.example(index).tobytes(), int(split.labels[index]))
        for split in (reviews.train, reviews.test)
        for index in range(len(split))
    ]


def expected_contents() -> list[tuple[bytes, int]]:
    files = members()
    names = [
        f"aclImdb/{split}/{sentiment}/{number}_{7 if sentiment == 'pos' else 3}.txt"
        for split, sentiment in FOLDERS
        for number in (10, 1, 2)  # by name: "10_3.txt" < "1_3.txt"
    ]
    return [(files[name], int("/pos/" in name)) for name in names]


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


@pytest.mark.parametrize("name", ["aclImdb_v1.tar.gz", "aclImdb_labeled.tar.gz"])
def test_an_archive_is_read_in_sorted_order_with_its_labels(tmp_path: Path, name: str) -> None:
    write_archive(tmp_path, tar_bytes(members()), name)
    reviews = load_reviews(tmp_path, tmp_path / "cache")
    assert contents(reviews) == expected_contents()
    assert reviews.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert not reviews.official


@pytest.mark.parametrize("inside", [True, False])
def test_an_unpacked_tree_gives_the_same(tmp_path: Path, inside: bool) -> None:
    tree = write_tree(tmp_path, members())
    reviews = load_reviews(tree if inside else tmp_path, tmp_path / "cache")
    assert contents(reviews) == expected_contents()


def test_an_archive_with_a_leading_dot_in_its_paths_is_read(tmp_path: Path) -> None:
    files = {f"./{name}": content for name, content in members().items()}
    root = tarfile.TarInfo("./")
    root.type = tarfile.DIRTYPE
    write_archive(tmp_path, tar_bytes(files, root))
    assert contents(load_reviews(tmp_path, tmp_path / "cache")) == expected_contents()


def test_the_second_read_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path, tar_bytes(members()))
    first = load_reviews(tmp_path, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr(imdb, "read_archive", lambda path: pytest.fail("read again"))
    assert contents(load_reviews(tmp_path, tmp_path / "cache")) == contents(first)


def test_another_archive_or_a_changed_tree_is_read_anew(tmp_path: Path) -> None:
    write_archive(tmp_path, tar_bytes(members()))
    load_reviews(tmp_path, tmp_path / "cache")
    changed = members() | {"aclImdb/train/neg/10_3.txt": b"changed"}
    write_archive(tmp_path, tar_bytes(changed))
    assert contents(load_reviews(tmp_path, tmp_path / "cache"))[0] == (b"changed", 0)
    tree = write_tree(tmp_path / "unpacked", members())
    load_reviews(tree, tmp_path / "cache")
    (tree / "train/neg/10_3.txt").write_bytes(b"changed too")
    assert contents(load_reviews(tree, tmp_path / "cache"))[0] == (b"changed too", 0)


def test_a_damaged_cache_is_made_anew(tmp_path: Path) -> None:
    write_archive(tmp_path, tar_bytes(members()))
    load_reviews(tmp_path, tmp_path / "cache")
    [entry] = (tmp_path / "cache").iterdir()
    for damaged in (
        b"",
        b"no archive",
        entry.read_bytes()[:-200],
        entry.read_bytes().replace(b"train", b"brain"),
    ):
        entry.write_bytes(damaged)
        assert contents(load_reviews(tmp_path, tmp_path / "cache")) == expected_contents()


def test_a_cache_that_cannot_be_written_costs_nothing_but_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_archive(tmp_path, tar_bytes(members()))
    (tmp_path / "file").write_text("no folder")
    assert contents(load_reviews(tmp_path, tmp_path / "file" / "cache")) == expected_contents()
    assert capsys.readouterr().err.count("\n") == 1


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member",
    [
        special("../evil.txt", tarfile.REGTYPE),
        special("/etc/evil.txt", tarfile.REGTYPE),
        special("aclImdb/../../evil.txt", tarfile.REGTYPE),
        special("elsewhere/evil.txt", tarfile.REGTYPE),
        special("aclImdb/train/pos/9_9.txt", tarfile.SYMTYPE, "/etc/passwd"),
        special("aclImdb/train/pos/9_9.txt", tarfile.LNKTYPE, "aclImdb/train/pos/1_7.txt"),
        special("aclImdb/tape", tarfile.CHRTYPE),
        special("aclImdb/disk", tarfile.BLKTYPE),
        special("aclImdb/pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda member: f"{member.name}-{member.type.decode()}",
)
def test_an_archive_with_a_member_that_has_no_business_in_it_is_refused(
    tmp_path: Path, member: tarfile.TarInfo, refused: Refused
) -> None:
    write_archive(tmp_path / "data", tar_bytes(members(), member))
    assert_refused(tmp_path / "data", refused, "refused", member.name)
    assert not list(tmp_path.rglob("evil*"))


def test_a_review_that_comes_twice_or_is_too_long_is_refused(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(
        tmp_path / "data", tar_bytes(members(), special("aclImdb/test/pos/1_7.txt", tarfile.REGTYPE))
    )
    assert_refused(tmp_path / "data", refused, "aclImdb/test/pos/1_7.txt", "twice")
    write_archive(tmp_path / "data", tar_bytes(members()))
    write_tree(tmp_path / "tree", members())
    monkeypatch.setattr(imdb, "LONGEST_REVIEW", 10)
    assert_refused(tmp_path / "data", refused, "more than 10 bytes")
    assert_refused(tmp_path / "tree", refused, "no review")


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9, 0.999])
def test_a_truncated_archive_is_refused(tmp_path: Path, kept: float, refused: Refused) -> None:
    path = write_archive(tmp_path / "data", tar_bytes(members()))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert_refused(tmp_path / "data", refused, "aclImdb_v1.tar.gz")


def test_a_tar_file_that_is_cut_between_two_members_is_refused(tmp_path: Path, refused: Refused) -> None:
    content = tar_bytes(members())
    write_archive(tmp_path / "data", content[: 1024 * 8])
    assert_refused(tmp_path / "data", refused, "aclImdb/test/neg has 0 ")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda files: files.pop("aclImdb/test/neg/2_3.txt"), ("aclImdb/test/neg", "2 reviews instead of 3")),
        (lambda files: files.update({"aclImdb/train/pos/4_9.txt": b"x"}), ("train/pos", "4 reviews")),
        (lambda files: files.update({"aclImdb/train/pos/2_7.txt": b""}), ("train/pos/2_7.txt is empty",)),
        (lambda files: files.update({"aclImdb/train/pos/2_7.txt": b" \n"}), ("train/pos/2_7.txt is empty",)),
    ],
)
def test_wrong_counts_and_empty_reviews_are_refused(
    tmp_path: Path,
    packed: bool,
    change: Callable[[Members], object],
    words: tuple[str, ...],
    refused: Refused,
) -> None:
    files = members()
    change(files)
    if packed:
        write_archive(tmp_path / "data", tar_bytes(files))
    else:
        write_tree(tmp_path / "data", files)
    assert_refused(tmp_path / "data", refused, *words)


def test_a_data_folder_that_does_not_exist_is_an_error_and_not_missing_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist") as caught:
        load_task("imdb", DataSettings(data_dir=str(tmp_path / "none"), cache_dir=str(tmp_path)))
    assert not isinstance(caught.value, DataUnavailableError)


def test_the_task_has_a_stratified_tenth_for_validation_and_raw_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imdb, "REVIEWS_PER_FOLDER", 30)
    files = {
        f"aclImdb/{split}/{sentiment}/{number}_1.txt": f"{split}-{sentiment}-{number} <br /> É".encode()
        for split, sentiment in FOLDERS
        for number in range(30)
    }
    write_archive(tmp_path, tar_bytes(files))
    settings = DataSettings(data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    task = load_task("imdb", settings)
    assert [len(part) for part in (task.train, task.val, task.test)] == [54, 6, 60]
    assert [int(part.labels.sum()) for part in (task.train, task.val, task.test)] == [27, 3, 30]
    texts = [
        [bytes((part.example(index) - 1).astype(np.uint8)) for index in range(len(part))]
        for part in (task.train, task.val, task.test)
    ]
    assert set(texts[0]) | set(texts[1]) == {text for name, text in files.items() if "/train/" in name}
    assert set(texts[2]) == {text for name, text in files.items() if "/test/" in name}
    for part, found in zip((task.train, task.val, task.test), texts, strict=True):
        assert [int(b"pos" in text) for text in found] == part.labels.tolist()
    assert (task.vocab_size, task.num_classes, task.name) == (257, 2, "imdb")


def test_the_task_of_bytes_reads_the_same_splits_as_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(imdb, "REVIEWS_PER_FOLDER", 30)
    files = {
        f"aclImdb/{split}/{sentiment}/{number}_1.txt": f"{split}-{sentiment}-{number}".encode()
        for split, sentiment in FOLDERS
        for number in range(30)
    }
    files["aclImdb/train/neg/4_1.txt"] = files["aclImdb/test/pos/7_1.txt"]
    write_archive(tmp_path, tar_bytes(files))
    places: dict[str, Any] = {"data_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    reviews = load_task("imdb", DataSettings(**places))
    task = load_task(
        "bytes", DataSettings(**places, max_length=32, train_size=500, val_size=90, test_size=800)
    )
    for name in ("train", "val", "test"):
        part = getattr(reviews, name)
        texts = [bytes((part.example(index) - 1).astype(np.uint8)) for index in range(len(part))]
        stream = b"\0".join(text for text in texts if name == "test" or b"test" not in text)
        windows = getattr(task, name)
        found = {bytes((windows.example(index) - 1).astype(np.uint8)) for index in range(len(windows))}
        assert all(window in stream for window in found) and len(found) > 30
    argv = ["stats", "--task", "bytes", "--data-dir", str(tmp_path), "--max-length", "32"]
    assert main([*argv, "--cache-dir", str(tmp_path / "cache")]) == 0
    assert "labels of test, the 32 most frequent: \\x00 " in capsys.readouterr().out


def test_reviews_that_cannot_be_had_are_the_same_line_for_both_tasks(tmp_path: Path) -> None:
    said = []
    for name in ("imdb", "bytes"):
        with pytest.raises(DataUnavailableError) as caught:
            load_task(name, DataSettings(cache_dir=str(tmp_path)))
        said.append(str(caught.value))
    assert said[0] == said[1] and "\n" not in said[0]


def test_identical_reviews_stay_on_one_side_of_the_split_and_all_others_as_drawn() -> None:
    texts = [b"%d" % number for number in range(40)]
    texts[5] = texts[21] = b"twice"  # drawn 5, not 21; 21 is of the other class
    texts[8] = texts[9] = b"both drawn"
    train = TokenDataset(
        np.frombuffer(b"".join(texts), np.uint8), offsets_of(list(map(len, texts))), np.arange(40) // 20
    )
    drawn = np.array([2, 5, 8, 9, 30, 31])
    validation, rest = separate_copies(train, drawn)
    assert validation.tolist() == [2, 6, 8, 9, 30, 31]  # 6: the next of its class that has no copy
    assert rest.tolist() == [0, 1, 3, 4, 5, *range(7, 8), *range(10, 30), *range(32, 40)]
    sides = [{train.example(index).tobytes() for index in side} for side in (validation, rest)]
    assert not sides[0] & sides[1] and drawn.tolist() == [2, 5, 8, 9, 30, 31]


def test_reviews_that_both_halves_have_are_in_the_provenance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = members()
    files["aclImdb/test/neg/1_3.txt"] = files["aclImdb/train/neg/1_3.txt"]
    write_archive(tmp_path, tar_bytes(files))
    task = load_task("imdb", DataSettings(data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache")))
    found = task.provenance["identical"]
    assert found["train in test"] + found["val in test"] == 1 and found["val in train"] == 0


def real_archive() -> Path | None:
    places = [os.environ.get("ATTENTION_IMDB_DIR"), ROOT.parent / "shared" / "data"]
    sources = [imdb.find_source(Path(place)) for place in places if place and Path(place).exists()]
    return next((source for source in sources if source), None)


def test_the_real_reviews_have_the_known_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = real_archive()
    if source is None:
        pytest.skip("no IMDb here: set ATTENTION_IMDB_DIR to a folder with the archive or its tree")
    monkeypatch.setattr(imdb, "REVIEWS_PER_FOLDER", 12_500)
    reviews = read_source(source, tmp_path)
    known = {"train": (1325.2, 979, 13_704, 0.0291), "test": (1293.9, 963, 12_988, 0.0267)}
    for split, (mean, median, longest, cut) in known.items():
        lengths = getattr(reviews, split).lengths
        assert len(lengths) == 25_000 and getattr(reviews, split).labels.sum() == 12_500
        assert round(float(lengths.mean()), 1) == mean
        assert (np.median(lengths), lengths.max()) == (median, longest)
        assert round(float(np.mean(lengths > 4096)), 4) == cut
    everywhere = DataSettings(data_dir=str(source), cache_dir=str(tmp_path))
    found = load_task("imdb", everywhere).provenance["identical"]
    assert found["val in train"] == 0 and found["train in test"] + found["val in test"] == 105 + 18
    started = time.monotonic()
    assert contents(read_source(source, tmp_path))[:5] == contents(reviews)[:5]
    assert time.monotonic() - started < 2


def test_a_data_folder_without_the_reviews_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no IMDb.*or leave it out"):
        load_reviews(tmp_path, tmp_path / "cache")
