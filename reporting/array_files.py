"""Arrays from a file of somebody else's results folder, read without trusting it.

    arrays = read_arrays(folder / "test_predictions.npz", {"predictions", "labels"})

Nothing in the file is executed, and one that would unpack to more than we write is refused.
"""

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

LARGEST = 2**30  # bytes when unpacked: a larger file is not one of ours
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    EOFError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that the .npz file has; ValueError says why it cannot be used."""
    try:
        if path.is_symlink():
            raise ValueError("it is a link, which may lead out of the folder")
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > LARGEST:
            raise ValueError(f"it would unpack to {size:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in set(names) & set(arrays.files)}
        if not all(isinstance(array, np.ndarray) for array in found.values()):
            raise ValueError("it holds something that is no array")
        return found
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path.name}") from error
    except UNREADABLE as error:
        raise ValueError(f"{path.name} cannot be used: {error}") from error
