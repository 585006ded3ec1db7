"""Download of the official IMDb archive: with a progress bar, resumed where it broke off, and verified.

What has arrived lies beside the archive as `aclImdb_v1.tar.gz.part`, locked against a second process, until
its size and sha256 are right; only then is it moved to its name.
"""

import contextlib
import errno
import fcntl
import hashlib
import http.client
import os
import shlex
import time
import urllib.error
import urllib.request
from io import BufferedRandom
from pathlib import Path
from typing import IO

from tqdm import tqdm

from command_line import InputError

URL = "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
# The same official host by another way: a network may block or alter the one and not the other. There is no
# other official copy of these bytes, and from where they come does not matter: the sha256 is compared.
SECOND_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
ARCHIVE = "aclImdb_v1.tar.gz"
SIZE = 84_125_825
SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
GZIP_START = b"\x1f\x8b"
TIMEOUT = 5.0  # seconds without an answer or without a byte
ATTEMPTS = 3  # at each source; each resumes the one before
BACK_OFF = 1.0  # seconds before the second attempt, doubled for each one after it
SLOWEST, SLOW_SECONDS = 1000, 30.0  # bytes a second, over so many seconds, below which a source is given up
CHUNK = 1 << 16
BUSY = (408, 425, 429, 500, 502, 503, 504)  # what a server answers that is to be asked again


class WrongContentError(OSError):
    """What the server sends is not the archive."""


class MissingData(InputError):  # noqa: N818 - named for what the user reads: no fault of the program
    """IMDb is neither in --data-dir, nor in the cache, nor downloadable. The message says how to get it."""


def download_archive(folder: Path, *, looked_in: Path | None = None) -> Path:
    """The official archive in `folder`, downloaded and verified.

    looked_in: where else it was looked for, for the message. Raises MissingData where it cannot be had."""
    part = folder / f"{ARCHIVE}.part"
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part.open("ab+") as file:
            _lock(file)
            try:
                _fetch_verified(file)
            finally:
                if file.seek(0, 2) == 0:
                    part.unlink()
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


def _fetch_verified(file: BufferedRandom) -> None:
    """Fetch the archive from the first source that has it; the first one's error where none does."""
    failed: Exception | None = None
    for url in (URL, SECOND_URL):
        try:
            _fetch_patiently(url, file)
            return _verify(file)
        except (OSError, http.client.HTTPException) as error:
            failed = failed or error
            if _is_full(error):
                break
    assert failed is not None
    try:
        raise failed
    finally:
        del failed  # else it and this frame hold each other, and with them its connection


def _fetch_patiently(url: str, file: BufferedRandom) -> None:
    """Fetch; after a pause again, from where it broke off, where another attempt may help."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _fetch(url, file)
        except (OSError, http.client.HTTPException) as error:
            if attempt == ATTEMPTS or not _may_pass(error):
                raise
            time.sleep(BACK_OFF * 2 ** (attempt - 1))


def _may_pass(error: Exception) -> bool:
    """Whether another attempt makes sense: not without a network, and not where the answer was final."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in BUSY
    if isinstance(error, WrongContentError) or _is_full(error):
        return False
    return not (isinstance(error, urllib.error.URLError) and not isinstance(error.reason, TimeoutError))


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _fetch(url: str, file: BufferedRandom) -> None:
    """Append what is missing; OSError where the connection or the server fails."""
    have = file.seek(0, 2)
    if have >= SIZE:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with contextlib.closing(urllib.request.urlopen(request, timeout=TIMEOUT)) as response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise WrongContentError("the server sent another part than asked for")
        _check_length(response, have if resumed else 0)
        if not resumed:
            # Looked at before what was there is thrown away.
            start = response.read(len(GZIP_START))
            if start != GZIP_START:
                raise WrongContentError("the server sent something else than an archive, as a page of HTML")
            file.truncate(0)
            file.write(start)
            have = len(start)
        with tqdm(
            total=SIZE, initial=have, desc=f"downloading {ARCHIVE}", unit="B", unit_scale=True, disable=None
        ) as progress:
            first, started = have, time.monotonic()
            while have < SIZE and (chunk := response.read1(min(CHUNK, SIZE - have))):
                file.write(chunk)
                have += len(chunk)
                progress.update(len(chunk))
                seconds = time.monotonic() - started
                if seconds > SLOW_SECONDS:
                    if have - first < SLOWEST * seconds:
                        raise TimeoutError(f"less than {SLOWEST} bytes a second came; run again to resume")
                    first, started = have, time.monotonic()
    file.flush()
    if have < SIZE:
        raise OSError(f"the connection ended after {have} of {SIZE} bytes; run again to resume")


def _check_length(response: http.client.HTTPResponse, start: int) -> None:
    """WrongContentError where the server announces another number of bytes; many announce none."""
    announced = response.headers.get("Content-Length", "")
    if announced.isdecimal() and int(announced) + start != SIZE:
        raise WrongContentError(f"the server offers {int(announced) + start} bytes instead of {SIZE}")


def _verify(file: BufferedRandom) -> None:
    """OSError, and an empty file, where the size or the sha256 is wrong."""
    size = file.seek(0, 2)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if size != SIZE or digest != SHA256:
        file.truncate(0)
        raise OSError(
            f"{size} bytes with sha256 {digest[:12]}... came instead of {SIZE} with {SHA256[:12]}..."
        )
    os.fsync(file.fileno())


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code}"
    if isinstance(error, urllib.error.URLError):
        return f"no connection: {error.reason}"
    return str(error) or type(error).__name__
