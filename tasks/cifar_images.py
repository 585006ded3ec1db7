"""CIFAR-10 (Krizhevsky 2009) in grey: 50,000 + 10,000 pictures of 32 x 32 pixels in 10 classes, as in the
Image task of the Long Range Arena.

    images = load_images(data_dir=Path("downloads"), cache_dir=default_cache_folder())
    images.test.example(0).reshape(32, 32)         # grey values 0..255

Looked for in `data_dir` (a folder with the official cifar-10-binary.tar.gz, or that file), then in the cache,
then downloaded into the cache; kept in the cache as arrays under the sha256 of the archive. The pickled form
(cifar-10-python.tar.gz) is never read: a pickle may run any code.

An example of a file is a byte of its label, then 1,024 bytes each of red, green and blue, row by row.
Grey is the luma of ITU-R BT.601, as in PIL's "L": (19595 R + 38470 G + 7471 B) / 65536, rounded.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from command_line import InputError
from tasks.archives import Archive, download_archive, find_given, read_members, sha256_of_file
from tasks.array_cache import Arrays, cached_arrays, read_cached
from tasks.token_dataset import TokenDataset, offsets_of

OFFICIAL = Archive(
    title="CIFAR-10",
    name="cifar-10-binary.tar.gz",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
PICKLED = "cifar-10-python.tar.gz"
TOP = "cifar-10-batches-bin"
FILES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PIXELS = 1024
EXAMPLE = 1 + 3 * PIXELS  # bytes
EXAMPLES_PER_FILE = 10_000
CACHE_VERSION = 1


@dataclass(frozen=True)
class Images:
    """Grey values (uint8) with their labels. source: where they were found. sha256: of the archive."""

    train: TokenDataset
    test: TokenDataset
    source: str
    sha256: str


def find_source(folder: Path) -> Path | None:
    """The archive in a folder; `folder` may also be the archive itself. InputError for the pickled form."""
    path = folder if folder.is_file() else folder / OFFICIAL.name
    if path.name == PICKLED or (not path.is_file() and (folder / PICKLED).is_file()):
        raise InputError(
            f"{folder} holds {PICKLED}, the pickled form, which is never read: a pickle may run any code; "
            f"get {OFFICIAL.name} from {OFFICIAL.url}"
        )
    return path if path.is_file() else None


def load_images(data_dir: Path | None, cache_dir: Path) -> Images:
    """The pictures from `data_dir`, else from the cache, else from the network.

    Raises InputError where `data_dir` does not exist or what is found cannot be used, and its subclass
    DataUnavailableError where nothing is found and the download fails."""
    source = find_given(data_dir, OFFICIAL, find_source, OFFICIAL.name)
    if source is None:
        kept = read_cached(cache_dir, _entry(OFFICIAL.sha256))
        if kept is not None:
            return _from_arrays(kept, f"cache of {OFFICIAL.name}", OFFICIAL.sha256)
        source = download_archive(OFFICIAL, cache_dir, looked_in=data_dir)
    try:
        sha256 = sha256_of_file(source)
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}") from error
    arrays = cached_arrays(cache_dir, _entry(sha256), lambda: read_archive(source))
    return _from_arrays(arrays, source.name, sha256)


def _entry(sha256: str) -> str:
    return f"cifar10-{sha256[:32]}-v{CACHE_VERSION}"


def read_archive(path: Path) -> Arrays:
    """Grey values (examples, 1024) and labels (examples,) of both splits, in the order of the files.

    Raises InputError for a file that is missing, comes twice or has another size, and for labels beyond 9."""
    wanted = {name for names in FILES.values() for name in names}
    size = EXAMPLES_PER_FILE * EXAMPLE
    found: dict[str, bytes] = {}

    def is_wanted(place: PurePosixPath) -> bool:
        return len(place.parts) == 2 and place.name in wanted

    for place, content in read_members(path, TOP, is_wanted, largest=size):
        if place.name in found:
            raise InputError(f"{path}: {str(place)!r} comes twice; refused")
        if len(content) != size:
            raise InputError(
                f"{path}: {place} has {len(content):,} bytes instead of {size:,}; get {OFFICIAL.name} again"
            )
        found[place.name] = content
    missing = sorted(wanted - found.keys())
    if missing:
        raise InputError(f"{path} has no {TOP}/{missing[0]}; get {OFFICIAL.name} again")
    arrays: Arrays = {}
    for split, names in FILES.items():
        rows = np.frombuffer(b"".join(found[name] for name in names), np.uint8).reshape(-1, EXAMPLE)
        if rows[:, 0].max() >= len(CLASS_NAMES):
            example = int(rows[:, 0].argmax())
            raise InputError(
                f"{path}: {names[example // EXAMPLES_PER_FILE]} has the label {rows[example, 0]} at its "
                f"example {example % EXAMPLES_PER_FILE + 1}; expected 0 to 9; get {OFFICIAL.name} again"
            )
        arrays[f"{split}_grey"] = luma(rows[:, 1:].reshape(-1, 3, PIXELS))
        arrays[f"{split}_labels"] = rows[:, 0].astype(np.int64)
    return arrays


def luma(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, pixels) grey values of (n, 3, pixels) red, green and blue."""
    red, green, blue = (colours[:, channel].astype(np.uint32) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16).astype(np.uint8)


def _from_arrays(arrays: Arrays, source: str, sha256: str) -> Images:
    train, test = (
        TokenDataset(
            arrays[f"{split}_grey"].ravel(),
            offsets_of([PIXELS] * len(arrays[f"{split}_labels"])),
            arrays[f"{split}_labels"],
        )
        for split in FILES
    )
    return Images(train, test, source, sha256)
