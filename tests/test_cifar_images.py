"""CIFAR-10: read from the binary archive, whole or not at all; grey, with its labels."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from test_imdb import Files, small_and_offline, tar_bytes, write_archive

from command_line import InputError
from data_pipeline import DataSettings, load_task
from tasks import cifar_images
from tasks.cifar_images import EXAMPLE, FILES, OFFICIAL, PICKLED, TOP, load_images, luma

__all__ = ["small_and_offline"]  # a fixture for every test here
PER_FILE = 20


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar_images, "EXAMPLES_PER_FILE", PER_FILE)


def examples(name: str) -> NDArray[np.uint8]:
    """(20, 3073) two of each label, in an order of the file's own."""
    random = np.random.default_rng(len(name) + ord(name[-5]))
    rows = random.integers(0, 256, (PER_FILE, EXAMPLE), dtype=np.uint8)
    rows[:, 0] = random.permutation(PER_FILE) % 10
    return rows


def members() -> Files:
    """The files of a small archive, in an order that is not the one they are read in."""
    names = [*FILES["test"], *reversed(FILES["train"])]
    found = {f"{TOP}/{name}": examples(name).tobytes() for name in names}
    return {f"{TOP}/readme.html": b"<html>", **found, f"{TOP}/batches.meta.txt": b"airplane\n"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a small archive in it."""
    return write_archive(tmp_path, tar_bytes(members()), OFFICIAL.name).parent


def test_pictures_are_read_once_in_the_order_of_the_files_with_their_labels(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.concatenate([examples(name) for name in FILES["train"]])
    for data_dir in (folder, folder / OFFICIAL.name):  # the second time from the cache
        images = load_images(data_dir, folder / "cache")
        assert (len(images.train), len(images.test)) == (5 * PER_FILE, PER_FILE)
        assert images.train.labels.tolist() == rows[:, 0].tolist()
        assert images.test.labels.tolist() == examples(FILES["test"][0])[:, 0].tolist()
        np.testing.assert_array_equal(images.train.example(33), luma(rows[[33], 1:].reshape(1, 3, -1))[0])
        monkeypatch.setattr(cifar_images, "read_archive", lambda _: pytest.fail("read again"))


def test_grey_is_the_luma_of_the_colours() -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [9, 9, 9]], np.uint8)
    assert luma(colours[:, :, None])[:, 0].tolist() == [76, 150, 29, 255, 9]


def changed(place: str, content: bytes) -> Files:
    return members() | {f"{TOP}/{place}": content}


def relabelled() -> bytes:
    rows = examples("data_batch_3.bin")
    rows[6, 0] = 10
    return rows.tobytes()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (changed("data_batch_2.bin", examples("data_batch_2.bin").tobytes()[:-1]), "data_batch_2.bin has"),
        (changed("test_batch.bin", bytes(EXAMPLE * PER_FILE + 1)), "test_batch.bin' has more than 61,460"),
        ({k: v for k, v in members().items() if "batch_4" not in k}, "no cifar-10-batches-bin/data_batch_4"),
        (changed("data_batch_3.bin", relabelled()), "data_batch_3.bin has the label 10 at its example 7"),
        ({"cifar-10-batches-py/data_batch_1": b"\x80\x02."}, "a path outside cifar-10-batches-bin/"),
    ],
    ids=["short", "long", "missing", "label", "pickled content"],
)
def test_an_archive_that_is_not_as_published_is_refused(tmp_path: Path, files: Files, words: str) -> None:
    write_archive(tmp_path, tar_bytes(files), OFFICIAL.name)
    with pytest.raises(InputError) as caught:
        load_images(tmp_path, tmp_path / "cache")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*"))


def test_the_pickled_form_is_never_read(tmp_path: Path) -> None:
    pickled = write_archive(tmp_path, tar_bytes({"cifar-10-batches-py/data_batch_1": b"\x80\x02."}), PICKLED)
    for data_dir in (tmp_path, pickled):
        with pytest.raises(InputError, match="never read: a pickle may run any code"):
            load_images(data_dir, tmp_path / "cache")


def test_the_task_has_a_stratified_tenth_for_validation(folder: Path) -> None:
    task = load_task("image", DataSettings(data_dir=str(folder), cache_dir=str(folder / "cache")))
    assert [len(split) for split in (task.train, task.val, task.test)] == [90, 10, 20]
    assert np.bincount(task.val.labels).tolist() == [1] * 10
    assert (task.vocab_size, task.num_classes, task.class_names[9]) == (257, 10, "truck")
    assert (task.train.lengths == 1024).all() and task.train.tokens.min() >= 1
    assert task.provenance["identical"] == {"train in test": 0, "val in train": 0, "val in test": 0}
