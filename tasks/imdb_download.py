"""Download of the official IMDb archive, verified by its sha256 before it gets its name."""

import shlex
import socket
import sys
from pathlib import Path

import torch

from command_line import InputError

URL = "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
ARCHIVE = "aclImdb_v1.tar.gz"
SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
TIMEOUT = 10.0  # seconds without an answer or without a byte


class DataUnavailableError(InputError):
    """A task's data are neither on this machine nor downloadable. The message says how to get them."""


def download_archive(folder: Path, *, looked_in: Path | None = None) -> Path:
    """The official archive in `folder`, downloaded and verified.

    looked_in: where else it was looked for. Raises DataUnavailableError where it cannot be had; what arrived
    till then is removed."""
    is_new = not folder.exists()
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torch's download has no limit of its own, and may wait for ever
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            URL, str(folder / ARCHIVE), hash_prefix=SHA256, progress=sys.stderr.isatty()
        )
    except (OSError, RuntimeError) as error:  # RuntimeError: another sha256, as of a page of HTML
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        places = " or ".join(str(place) for place in (looked_in, folder) if place)
        target = shlex.quote(str((looked_in or folder) / ARCHIVE))
        raise DataUnavailableError(
            f"IMDb is not in {places}, and cannot be downloaded ({error}); get it by: "
            f"curl -L --create-dirs --output {target} {URL} (any folder will do: give it as --data-dir)"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return folder / ARCHIVE
