"""Archives of data sets: downloaded, verified by sha256 before they get their name, and never extracted.

    path = download_archive(OFFICIAL, folder)
    for place, content in read_members(path, "aclImdb", is_review, largest=1 << 20): ...

An archive is streamed, and only what is wanted of it is read. One that holds a path outside its own folder,
a link or a device, or unpacks to a senseless amount, is refused.
"""

import gzip
import hashlib
import shlex
import socket
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from tqdm import tqdm

from command_line import InputError

TIMEOUT = 10.0  # seconds without an answer or without a byte
MOST_MEMBERS = 1_000_000  # of an archive; IMDb's has 100,000
LARGEST_UNPACKED = 1 << 32  # bytes; IMDb's has 0.5 GB
NAMES = ("aclImdb*", "basic_*.tsv", "cifar-10-*.tar.gz")  # of IMDb, ListOps and CIFAR-10


class DataUnavailableError(InputError):
    """A task's data are neither on this machine nor downloadable. The message says how to get them."""


@dataclass(frozen=True)
class Archive:
    """An official archive. title: of what is in it. name: of the file."""

    title: str
    name: str
    url: str
    sha256: str


def holds_data(folder: Path) -> bool:
    """Whether a folder looks as if it held the data of some task."""
    return any(True for name in NAMES for _ in folder.glob(name))


def find_given(
    data_dir: Path | None, archive: Archive, find: Callable[[Path], Path | None], what: str
) -> Path | None:
    """What `find` finds in --data-dir; None where none is given, or one for another task, which is said.

    what: as the user would call it. Raises InputError for a folder that is not there or holds no data."""
    if data_dir is None:
        return None
    if not data_dir.exists():
        raise InputError(f"--data-dir {data_dir} does not exist; give the folder that holds {archive.name}")
    source = find(data_dir)
    if source is None:
        lacks = f"--data-dir {data_dir} holds no {what}"
        if not holds_data(data_dir):
            raise InputError(f"{lacks}; give the folder that does, or leave it out to have it downloaded")
        print(f"{lacks}: it is taken from the cache, or downloaded", file=sys.stderr)
    return source


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download_archive(archive: Archive, folder: Path, *, looked_in: Path | None = None) -> Path:
    """The official archive in `folder`, downloaded and verified where it is not there yet.

    looked_in: where else it was looked for. Raises DataUnavailableError where it cannot be had; what arrived
    till then is removed."""
    path, is_new = folder / archive.name, not folder.exists()
    if path.is_file():
        return path
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torch's download has no limit of its own, and may wait for ever
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            archive.url,
            str(path),
            hash_prefix=archive.sha256,
            progress=sys.stderr is not None and sys.stderr.isatty(),
        )
    except (OSError, RuntimeError) as error:  # RuntimeError: another sha256, as of a page of HTML
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        places = " or ".join(str(place) for place in (looked_in, folder) if place)
        target = shlex.quote(str((looked_in or folder) / archive.name))
        raise DataUnavailableError(
            f"{archive.title} is not in {places}, and cannot be downloaded ({error}); get it by: curl -L "
            f"--create-dirs --output {target} {archive.url} (any folder will do: give it as --data-dir)"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return path


def read_members(
    path: Path, top: str, is_wanted: Callable[[PurePosixPath], bool], largest: int
) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Places and contents of the wanted files of a gzipped tar file, all of which lies in the folder `top`.

    Raises InputError for a damaged or truncated file, for members that have no business in it, and for a
    wanted one of more than `largest` bytes."""
    try:
        with gzip.open(path) as unzipped, tarfile.open(fileobj=unzipped, mode="r|") as archive:
            files = tqdm(archive, desc=path.name, unit=" files", disable=None, leave=False)
            for number, member in enumerate(files, 1):
                place = PurePosixPath(member.name)
                _check_member(path, top, number, member, place)
                archive.members = []  # type: ignore[attr-defined] # else all of them are kept
                if not member.isreg() or not is_wanted(place):
                    continue
                content = archive.extractfile(member)
                if content is None or member.size > largest:
                    raise InputError(f"{path}: {member.name!r} has more than {largest:,} bytes: refused")
                yield place, content.read()
            while unzipped.read(1 << 20):  # to the end, where the checksum is compared
                if unzipped.tell() > LARGEST_UNPACKED:
                    raise InputError(f"{path} unpacks to more than {LARGEST_UNPACKED:,} bytes: refused")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged or truncated ({error}); download it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _check_member(path: Path, top: str, number: int, member: tarfile.TarInfo, place: PurePosixPath) -> None:
    """InputError for a member that is not harmless, and for a senseless amount: what is passed over costs
    time too."""
    if number > MOST_MEMBERS:
        raise InputError(f"{path} has more than {MOST_MEMBERS:,} members: refused")
    if member.offset_data + member.size > LARGEST_UNPACKED:
        raise InputError(f"{path} unpacks to more than {LARGEST_UNPACKED:,} bytes: refused")
    parts = place.parts
    inside = not parts or (parts[0] == top and ".." not in parts)  # no parts: the folder "./" itself
    if not inside or not (member.isreg() or member.isdir()):
        kind = "a link or a device" if inside else f"a path outside {top}/"
        raise InputError(f"{path} holds {kind} ({member.name!r}): refused")
