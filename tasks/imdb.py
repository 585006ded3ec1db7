"""IMDb: the Large Movie Review Dataset v1.0 (Maas et al., ACL 2011), 25,000 + 25,000 labelled reviews.

    reviews = load_reviews(data_dir=Path("downloads"), cache_dir=default_cache_folder())

The reviews are looked for in `data_dir` (a folder with the official archive aclImdb_v1.tar.gz, with another
aclImdb*.tar.gz such as one of the labelled half, or with the unpacked tree aclImdb/{train,test}/{pos,neg}),
then in the cache, then downloaded into the cache. What was read is kept in the cache as bytes in one array,
under the sha256 of its source.

Archives are streamed, never extracted (archives.py). Reviews are taken in the order of their names, raw.
Labels: 0 negative, 1 positive. Some reviews come twice, also in both halves: `separate_copies`.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from command_line import InputError
from tasks.archives import Archive, download_archive, find_given, read_members, sha256_of_file
from tasks.array_cache import Arrays, cached_arrays, read_cached
from tasks.token_dataset import TokenDataset, offsets_of

OFFICIAL = Archive(
    title="IMDb",
    name="aclImdb_v1.tar.gz",
    url="http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
    sha256="c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
)
TREE = "aclImdb"
SPLITS = ("train", "test")
FOLDERS = ("neg", "pos")  # their positions are the labels
REVIEWS_PER_FOLDER = 12_500
LONGEST_REVIEW = 1 << 20  # bytes; the longest of the real ones has 13,704
CACHE_VERSION = 1

PLACES = tuple(itertools.product(SPLITS, FOLDERS))

Place = tuple[str, str]  # split and sentiment
Texts = dict[Place, dict[str, bytes]]


@dataclass(frozen=True)
class Reviews:
    """The labelled reviews as bytes (uint8). source: where they were found. sha256: of the archive, or of the
    names and contents of the files of a tree."""

    train: TokenDataset
    test: TokenDataset
    source: str
    sha256: str
    official: bool


def find_source(folder: Path) -> Path | None:
    """The archive or the tree in a folder; `folder` may also be the archive or the tree itself."""
    if folder.is_file():
        return folder
    archives = [folder / OFFICIAL.name, *sorted(folder.glob("aclImdb*.tar.gz"))]
    trees = [folder / TREE] + [folder] * (folder / SPLITS[0] / FOLDERS[0]).is_dir()
    found = [path for path in archives if path.is_file()] + [path for path in trees if path.is_dir()]
    return found[0] if found else None


def load_reviews(data_dir: Path | None, cache_dir: Path) -> Reviews:
    """The reviews from `data_dir`, else from the cache, else from the network.

    Raises InputError where `data_dir` does not exist or what is found cannot be used, and its subclass
    DataUnavailableError where nothing is found and the download fails."""
    what = f"IMDb ({OFFICIAL.name}, another aclImdb*.tar.gz or {TREE}/)"
    source = find_given(data_dir, OFFICIAL, find_source, what)
    if source is None:
        kept = read_cached(cache_dir, _entry(OFFICIAL.sha256))
        if kept is not None:
            return _from_arrays(kept, f"cache of {OFFICIAL.name}")
        source = download_archive(OFFICIAL, cache_dir, looked_in=data_dir)
    return read_source(source, cache_dir)


def read_source(source: Path, cache_dir: Path | None) -> Reviews:
    """The reviews of an archive or a tree, or what the cache has of it; with no cache they are read anew."""
    is_archive = source.is_file()
    try:
        key = sha256_of_file(source) if is_archive else _state_of_tree(source)
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}") from error

    def make() -> Arrays:
        texts = read_archive(source) if is_archive else read_tree(source)
        check_reviews(texts, source)
        return _to_arrays(texts, key if is_archive else _sha256_of_texts(texts))

    return _from_arrays(cached_arrays(cache_dir, _entry(key), make) if cache_dir else make(), source.name)


def _entry(key: str) -> str:
    return f"imdb-{key[:32]}-v{CACHE_VERSION}"


def read_archive(path: Path) -> Texts:
    """The reviews of an archive by (split, sentiment) and file name."""
    texts: Texts = {place: {} for place in PLACES}

    def is_wanted(member: PurePosixPath) -> bool:
        parts = member.parts
        return len(parts) == 4 and parts[1:3] in PLACES and _is_review(parts[3])

    for member, content in read_members(path, TREE, is_wanted, LONGEST_REVIEW):
        _, split, sentiment, name = member.parts
        if name in texts[split, sentiment]:
            raise InputError(f"{path}: {str(member)!r} comes twice; refused")
        texts[split, sentiment][name] = content
    return texts


def _is_review(name: str) -> bool:
    return name.endswith(".txt") and not name.startswith(".")


def _files_of_tree(tree: Path) -> Iterator[tuple[Place, Path]]:
    for split, sentiment in PLACES:
        folder = tree / split / sentiment
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if _is_review(path.name):
                yield (split, sentiment), path


def read_tree(tree: Path) -> Texts:
    """The reviews of an unpacked tree by (split, sentiment) and file name."""
    texts: Texts = {place: {} for place in PLACES}
    for place, path in tqdm(_files_of_tree(tree), desc=str(tree), unit=" files", disable=None, leave=False):
        try:
            with path.open("rb") as file:
                content = file.read(LONGEST_REVIEW + 1)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        if len(content) > LONGEST_REVIEW:
            raise InputError(f"{path} is no review: longer than {LONGEST_REVIEW} bytes")
        texts[place][path.name] = content
    return texts


def check_reviews(texts: Texts, source: Path) -> None:
    """InputError where a folder has more or fewer reviews than it should, or a review is empty."""
    for (split, sentiment), reviews in texts.items():
        folder = f"{TREE}/{split}/{sentiment}"
        if len(reviews) != REVIEWS_PER_FOLDER:
            wrong = f"{folder} has {len(reviews)} reviews instead of {REVIEWS_PER_FOLDER}"
            raise InputError(f"{source}: {wrong}; get {OFFICIAL.name} again")
        for name in sorted(reviews):
            if not reviews[name].strip():
                wrong = f"the review {folder}/{name} is empty"
                raise InputError(f"{source}: {wrong}; get {OFFICIAL.name} again")


def _sha256_of_texts(texts: Texts) -> str:
    digest = hashlib.sha256()
    for (split, sentiment), reviews in sorted(texts.items()):
        for name in sorted(reviews):
            digest.update(f"{split}/{sentiment}/{name} {len(reviews[name])}\n".encode())
            digest.update(reviews[name])
    return digest.hexdigest()


def _state_of_tree(tree: Path) -> str:
    """A key that changes when a file of the tree does: names, sizes and times, no contents."""
    digest = hashlib.sha256(str(tree.resolve()).encode())
    for _, path in _files_of_tree(tree):
        state = path.stat()
        digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _to_arrays(texts: Texts, sha256: str) -> Arrays:
    about = json.dumps({"sha256": sha256, "official": sha256 == OFFICIAL.sha256})
    arrays: Arrays = {"about": np.frombuffer(about.encode(), np.uint8)}
    for split in SPLITS:
        reviews = [texts[split, sentiment] for sentiment in FOLDERS]
        contents = [part[name] for part in reviews for name in sorted(part)]
        arrays[f"{split}_tokens"] = np.frombuffer(b"".join(contents), np.uint8)
        arrays[f"{split}_offsets"] = offsets_of([len(content) for content in contents])
        arrays[f"{split}_labels"] = np.repeat(np.arange(2), [len(part) for part in reviews])
    return arrays


def _from_arrays(arrays: Arrays, source: str) -> Reviews:
    about = json.loads(arrays["about"].tobytes())
    train, test = (
        TokenDataset(arrays[f"{split}_tokens"], arrays[f"{split}_offsets"], arrays[f"{split}_labels"])
        for split in SPLITS
    )
    return Reviews(train, test, source, about["sha256"], about["official"])


def separate_copies(
    train: TokenDataset, validation: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The positions of a drawn validation sample and of the rest, with identical texts on one side of them.

    A text of the sample that has a copy in the rest goes there, and the next text of its class that has no
    copy comes in its place: all others, and the order of both, stay as drawn."""
    rest = np.setdiff1d(np.arange(len(train)), validation)
    validation = validation.copy()
    texts = [text.tobytes() for text in map(train.example, range(len(train)))]
    place_of = {texts[position]: place for place, position in enumerate(rest.tolist())}
    counts = Counter(texts)
    alone = np.array([counts[texts[position]] == 1 for position in rest.tolist()], np.bool_)
    for place, position in enumerate(validation.tolist()):
        if texts[position] in place_of:
            free = np.flatnonzero(alone & (train.labels[rest] == train.labels[position]))
            if not len(free):
                raise InputError("IMDb has too few different reviews to keep identical ones on one side")
            other = free[np.searchsorted(rest[free], position) % len(free)]
            validation[place], rest[other], alone[other] = rest[other], position, False
    return validation, rest
