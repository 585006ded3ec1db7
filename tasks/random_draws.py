"""Random draws whose bytes never change: the same on every machine, Python, numpy version and hash seed.

numpy promises a fixed stream of raw 64-bit integers for a seeded `PCG64`, but not for the methods of
`Generator` (`integers`, `permutation`, `choice` and the like have changed and may again). So the raw
integers alone are taken, read in little-endian order, and turned into decisions here.

    draws = RandomDraws(seed, "listops", "train")     # one stream per (seed, purpose)
    draws.below(10, 4)                                # four integers of 0..9
"""

import hashlib

import numpy as np
from numpy.typing import NDArray


class RandomDraws:
    """A stream of draws made from a seed (at least 0) and a purpose (any strings or integers)."""

    def __init__(self, seed: int, *purpose: str | int) -> None:
        digest = hashlib.sha256(repr(purpose).encode()).digest()
        self._generator = np.random.PCG64([seed, int.from_bytes(digest[:8], "little")])

    def _raw(self, count: int, dtype: str) -> NDArray[np.generic]:
        """`count` unsigned integers of a little-endian dtype, cut from whole 64-bit draws."""
        words = -(-count * np.dtype(dtype).itemsize // 8)
        raw = np.asarray(self._generator.random_raw(words), dtype="<u8")
        return raw.view(dtype)[:count]

    def bytes(self, count: int) -> NDArray[np.uint8]:
        """`count` uniform integers of 0..255."""
        return self._raw(count, "<u1").astype(np.uint8, copy=False)

    def below(self, bound: int, count: int) -> NDArray[np.int64]:
        """`count` integers of 0..bound - 1 (bound at most 2^31), each uniform to within bound / 2^32."""
        wide = self._raw(count, "<u4").astype(np.int64)
        wide *= bound
        wide >>= 32
        return wide

    def order(self, count: int) -> NDArray[np.int64]:
        """A random order of 0..count - 1."""
        return np.argsort(self._raw(count, "<u8"), kind="stable")

    def distinct(self, bound: int, rows: int, count: int) -> NDArray[np.int64]:
        """(rows, count): in each row as many different integers of 0..bound - 1, in random order."""
        numbers = np.tile(np.arange(bound)[:, None], rows)  # (bound, rows): the first of a shuffle of each
        row = np.arange(rows)
        for place in range(count):
            other = place + self.below(bound - place, rows)
            numbers[place], numbers[other, row] = numbers[other, row], numbers[place].copy()
        return numbers[:count].T
