"""IMDb: the Large Movie Review Dataset v1.0 (Maas et al., ACL 2011), 25,000 + 25,000 labelled reviews.

    reviews = load_reviews(data_dir=Path("downloads"), cache_dir=default_cache_folder())

The reviews are looked for in `data_dir` (a folder with the official archive aclImdb_v1.tar.gz, with another
aclImdb*.tar.gz such as one of the labelled half, or with the unpacked tree aclImdb/{train,test}/{pos,neg}),
then in the cache, then downloaded into the cache. What was read is kept in the cache as bytes in one array,
under the sha256 of its source.

An archive is never extracted: it is streamed, and only the reviews in it are read. One that holds a path
outside aclImdb/, a link or a device is refused. Reviews are taken in the order of their names, raw.
Labels: 0 negative, 1 positive.
"""

import gzip
import hashlib
import json
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from command_line import InputError
from tasks.array_cache import Arrays, cached_arrays, read_cached
from tasks.imdb_download import ARCHIVE, SHA256, download_archive
from tasks.listops_tsv import find_files
from tasks.token_dataset import TokenDataset, offsets_of

TREE = "aclImdb"
SPLITS = ("train", "test")
FOLDERS = ("neg", "pos")  # their positions are the labels
REVIEWS_PER_FOLDER = 12_500
MOST_MEMBERS = 1_000_000  # of an archive; the official one has 100,000
LARGEST_UNPACKED = 1 << 32  # bytes; the official one has 0.5 GB
LONGEST_REVIEW = 1 << 20  # bytes; the longest of the real ones has 13,704
CACHE_VERSION = 1

Texts = dict[tuple[str, str], dict[str, bytes]]


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
    archives = [folder / ARCHIVE, *sorted(folder.glob("aclImdb*.tar.gz"))]
    trees = [folder / TREE] + [folder] * (folder / SPLITS[0] / FOLDERS[0]).is_dir()
    found = [path for path in archives if path.is_file()] + [path for path in trees if path.is_dir()]
    return found[0] if found else None


def load_reviews(data_dir: Path | None, cache_dir: Path) -> Reviews:
    """The reviews from `data_dir`, else from the cache, else from the network.

    Raises InputError where `data_dir` does not exist or what is found cannot be used, and its subclass
    DataUnavailableError where nothing is found and the download fails."""
    if data_dir is not None and not data_dir.exists():
        raise InputError(f"--data-dir {data_dir} does not exist; give the folder that holds {ARCHIVE}")
    source = find_source(data_dir) if data_dir else None
    if source is None:
        if data_dir is not None:
            lacks = f"--data-dir {data_dir} holds no IMDb ({ARCHIVE}, another aclImdb*.tar.gz or {TREE}/)"
            if find_files(data_dir) is None:
                raise InputError(f"{lacks}; give the folder that does, or leave it out to have it downloaded")
            print(f"{lacks}: it is taken from the cache, or downloaded", file=sys.stderr)
        kept = read_cached(cache_dir, _entry(SHA256))
        if kept is not None:
            return _from_arrays(kept, f"cache of {ARCHIVE}")
        source = cache_dir / ARCHIVE
        if not source.is_file():
            download_archive(cache_dir, looked_in=data_dir)
    return read_source(source, cache_dir)


def read_source(source: Path, cache_dir: Path | None) -> Reviews:
    """The reviews of an archive or a tree, or what the cache has of it; with no cache they are read anew."""
    is_archive = source.is_file()
    try:
        key = _sha256_of_file(source) if is_archive else _state_of_tree(source)
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}") from error

    def make() -> Arrays:
        texts = read_archive(source) if is_archive else read_tree(source)
        check_reviews(texts, source, REVIEWS_PER_FOLDER)
        return _to_arrays(texts, key if is_archive else _sha256_of_texts(texts))

    return _from_arrays(cached_arrays(cache_dir, _entry(key), make) if cache_dir else make(), source.name)


def _entry(key: str) -> str:
    return f"imdb-{key[:32]}-v{CACHE_VERSION}"


def read_archive(path: Path) -> Texts:
    """The reviews of a gzipped tar file by (split, sentiment) and file name.

    Raises InputError for a damaged or truncated file and for members that have no business in it."""
    texts: Texts = {(split, sentiment): {} for split in SPLITS for sentiment in FOLDERS}
    try:
        with gzip.open(path) as unzipped, tarfile.open(fileobj=unzipped, mode="r|") as archive:
            files = tqdm(archive, desc=path.name, unit=" files", disable=None, leave=False)
            for number, member in enumerate(files, 1):
                _check_amount(path, number, member)
                folder = _folder_of(member, path)
                archive.members = []  # type: ignore[attr-defined] # else all of them are kept
                if folder is None:
                    continue
                name = PurePosixPath(member.name).name
                content = archive.extractfile(member)
                if content is None or member.size > LONGEST_REVIEW or name in texts[folder]:
                    raise InputError(f"{path}: {member.name!r} is no review, or comes twice; refused")
                texts[folder][name] = content.read()
            while unzipped.read(1 << 20):  # to the end, where the checksum is compared
                if unzipped.tell() > LARGEST_UNPACKED:
                    raise InputError(f"{path} unpacks to more than {LARGEST_UNPACKED:,} bytes: refused")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged or truncated ({error}); download it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return texts


def _check_amount(path: Path, number: int, member: tarfile.TarInfo) -> None:
    """InputError where an archive unpacks to a senseless amount: also what is passed over costs time."""
    if number > MOST_MEMBERS:
        raise InputError(f"{path} has more than {MOST_MEMBERS:,} members: refused")
    if member.offset_data + member.size > LARGEST_UNPACKED:
        raise InputError(f"{path} unpacks to more than {LARGEST_UNPACKED:,} bytes: refused")


def _folder_of(member: tarfile.TarInfo, path: Path) -> tuple[str, str] | None:
    """The (split, sentiment) of a review, None for anything else; InputError for what is not harmless."""
    parts = PurePosixPath(member.name).parts
    inside = not parts or (parts[0] == TREE and ".." not in parts)  # no parts: the folder "./" itself
    if not inside or not (member.isreg() or member.isdir()):
        kind = "a link or a device" if inside else "a path outside aclImdb/"
        raise InputError(f"{path} holds {kind} ({member.name!r}): refused")
    if not member.isreg() or len(parts) != 4 or not _is_review(parts[3]):
        return None
    return (parts[1], parts[2]) if parts[1] in SPLITS and parts[2] in FOLDERS else None


def _is_review(name: str) -> bool:
    return name.endswith(".txt") and not name.startswith(".")


def _files_of_tree(tree: Path) -> Iterator[tuple[tuple[str, str], Path]]:
    for split in SPLITS:
        for sentiment in FOLDERS:
            folder = tree / split / sentiment
            if folder.is_dir():
                for path in sorted(folder.iterdir()):
                    if _is_review(path.name):
                        yield (split, sentiment), path


def read_tree(tree: Path) -> Texts:
    """The reviews of an unpacked tree by (split, sentiment) and file name."""
    texts: Texts = {(split, sentiment): {} for split in SPLITS for sentiment in FOLDERS}
    files = tqdm(_files_of_tree(tree), desc=str(tree), unit=" files", disable=None, leave=False)
    for folder, path in files:
        try:
            with path.open("rb") as file:
                content = file.read(LONGEST_REVIEW + 1)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        if len(content) > LONGEST_REVIEW:
            raise InputError(f"{path} is no review: longer than {LONGEST_REVIEW} bytes")
        texts[folder][path.name] = content
    return texts


def check_reviews(texts: Texts, source: Path, per_folder: int) -> None:
    """InputError where a folder has not `per_folder` reviews or a review is empty."""
    for (split, sentiment), reviews in texts.items():
        if len(reviews) != per_folder:
            raise InputError(
                f"{source}: {TREE}/{split}/{sentiment} has {len(reviews)} reviews instead of {per_folder}; "
                f"get {ARCHIVE} again"
            )
        for name in sorted(reviews):
            if not reviews[name].strip():
                raise InputError(
                    f"{source}: the review {TREE}/{split}/{sentiment}/{name} is empty; get {ARCHIVE} again"
                )


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    arrays: Arrays = {"about": _json_array({"sha256": sha256, "official": sha256 == SHA256})}
    for split in SPLITS:
        reviews = [texts[split, sentiment] for sentiment in FOLDERS]
        contents = [part[name] for part in reviews for name in sorted(part)]
        arrays[f"{split}_tokens"] = np.frombuffer(b"".join(contents), np.uint8)
        arrays[f"{split}_offsets"] = offsets_of([len(content) for content in contents])
        arrays[f"{split}_labels"] = np.repeat(np.arange(2), [len(part) for part in reviews])
    return arrays


def _json_array(value: dict[str, Any]) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(value, allow_nan=False).encode(), np.uint8)


def _from_arrays(arrays: Arrays, source: str) -> Reviews:
    about = json.loads(arrays["about"].tobytes())
    train, test = (
        TokenDataset(arrays[f"{split}_tokens"], arrays[f"{split}_offsets"], arrays[f"{split}_labels"])
        for split in SPLITS
    )
    return Reviews(train, test, source, about["sha256"], about["official"])
