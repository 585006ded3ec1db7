"""Download of the official IMDb archive: with a progress bar, resumed where it broke off, and verified.

What has arrived lies beside the archive as `aclImdb_v1.tar.gz.part` until its size and sha256 are right; only
then is it moved to its name.
"""

import contextlib
import fcntl
import hashlib
import http.client
import shlex
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from tqdm import tqdm

from command_line import InputError

URL = "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
ARCHIVE = "aclImdb_v1.tar.gz"
SIZE = 84_125_825
SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
TIMEOUT = 5.0  # seconds without an answer or without a byte
ATTEMPTS = 3  # each resumes the one before
CHUNK = 1 << 16


class MissingData(InputError):  # noqa: N818 - named for what the user reads: no fault of the program
    """IMDb is neither in --data-dir, nor in the cache, nor downloadable. The message says how to get it."""


def download_archive(folder: Path, *, looked_in: Path | None = None) -> Path:
    """The official archive in `folder`, downloaded and verified.

    looked_in: where else it was looked for, for the message. Raises MissingData where it cannot be had."""
    part = folder / f"{ARCHIVE}.part"
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            _lock(file)
            try:
                _fetch_patiently(file)
            finally:
                if file.tell() == 0:
                    part.unlink()
        _verify(part)
        return part.replace(folder / ARCHIVE)
    except (OSError, http.client.HTTPException) as error:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only where nothing arrived
        places = [str(place) for place in (looked_in, folder) if place]
        target = shlex.quote(str((looked_in or folder) / ARCHIVE))
        raise MissingData(
            f"IMDb is not in {' or '.join(places)}, and cannot be downloaded ({_reason(error)}); get it by: "
            f"curl -L --create-dirs --output {target} {URL} (any folder will do: give it as --data-dir)"
        ) from error


def _lock(file: IO[bytes]) -> None:
    """Hold the file against a second process; OSError where another holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError("another process is downloading it; wait for it") from error


def _fetch_patiently(file: IO[bytes]) -> None:
    """Fetch; again, from where it broke off, as long as each attempt brings something."""
    for attempt in range(1, ATTEMPTS + 1):
        before = file.seek(0, 2)
        try:
            return _fetch(file)
        except (OSError, http.client.HTTPException):
            if file.seek(0, 2) <= before or attempt == ATTEMPTS:
                raise


def _fetch(file: IO[bytes]) -> None:
    """Append what is missing; OSError where the connection or the server fails."""
    have = file.seek(0, 2)
    if have >= SIZE:
        return
    request = urllib.request.Request(URL, headers={"Range": f"bytes={have}-"} if have else {})
    with contextlib.closing(urllib.request.urlopen(request, timeout=TIMEOUT)) as response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise OSError("the server sent another part than asked for")
        if not resumed:
            file.truncate(0)
            have = 0
        with tqdm(
            total=SIZE, initial=have, desc=f"downloading {ARCHIVE}", unit="B", unit_scale=True, disable=None
        ) as progress:
            while have < SIZE and (chunk := response.read(min(CHUNK, SIZE - have))):
                file.write(chunk)
                have += len(chunk)
                progress.update(len(chunk))
    file.flush()
    if have < SIZE:
        raise OSError(f"the connection ended after {have} of {SIZE} bytes; run again to resume")


def _verify(part: Path) -> None:
    """OSError, and no file left, where the size or the sha256 is wrong."""
    size = part.stat().st_size
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if size != SIZE or digest != SHA256:
        part.unlink()
        raise OSError(
            f"{size} bytes with sha256 {digest[:12]}... came instead of {SIZE} with {SHA256[:12]}..."
        )


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code}"
    if isinstance(error, urllib.error.URLError):
        return f"no connection: {error.reason}"
    return str(error) or type(error).__name__
