"""A cache of numpy arrays in a folder: one uncompressed .npz without pickles per entry, written atomically.

    arrays = cached_arrays(Path("~/.cache/x").expanduser(), "imdb-3f2a", make)   # make() once, then from disk

An entry that is damaged is made anew. A folder that cannot be written costs time, not the run:
one line on stderr says so.
"""

import os
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from results_folder import write_atomic

Arrays = dict[str, NDArray[Any]]


def default_cache_folder() -> Path:
    """$XDG_CACHE_HOME/attention-comparison, or ~/.cache/attention-comparison."""
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "attention-comparison"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / "attention-comparison"


def read_cached(folder: Path, name: str) -> Arrays | None:
    """The arrays of an entry, or None where there is none that can be read."""
    try:
        with (folder / f"{name}.npz").open("rb") as file, np.load(file, allow_pickle=False) as entry:
            return {key: entry[key] for key in entry.files}
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def cached_arrays(folder: Path, name: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays of an entry; made where it is not there yet."""
    kept = read_cached(folder, name)
    if kept is not None:
        return kept
    arrays = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{name}.npz", lambda file: np.savez(file, allow_pickle=False, **arrays))
    except OSError as error:
        print(f"the cache {folder} cannot be written ({error.strerror}): going on without", file=sys.stderr)
    return arrays
