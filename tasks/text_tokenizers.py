"""Token ids of bytes and words, and the printable form of each id. Pad is id 0 everywhere.

encode_bytes(np.frombuffer(b"a<br />", np.uint8))    # each byte plus 1: 257 ids; grey values of pixels too
counted, lexicon = count_words(texts)                # each text read once, as ids of all words there are
symbols, table = make_vocabulary(counted.take(training), lexicon, 20_000)
ids = table[counted.tokens]                          # lower-cased words; pad 0, unknown 1, the words from 2
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from command_line import InputError
from tasks.array_cache import Arrays, cached_arrays
from tasks.token_dataset import TokenDataset, offsets_of

WORD_UNK, FIRST_WORD = 1, 2
WORD_VERSION = 1  # part of the cache's keys: to be raised when words are told apart differently
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_MARKUP = re.compile(r"<br\s*/?>", re.IGNORECASE)


def _symbol_of_byte(byte: int) -> str:
    if byte == ord(" "):
        return "␣"
    return chr(byte) if 32 < byte < 127 else f"\\x{byte:02x}"


BYTE_SYMBOLS = ("<pad>", *map(_symbol_of_byte, range(256)))
PIXEL_SYMBOLS = ("<pad>", *map(str, range(256)))


def encode_bytes(data: NDArray[np.uint8]) -> NDArray[Any]:
    return data.astype(np.uint16) + np.uint16(1)


def split_words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits, with inner apostrophes; line breaks in HTML are none."""
    return _WORD.findall(_MARKUP.sub(" ", text).lower())


def cached_words(texts: TokenDataset, cache: Path, sha256: str) -> tuple[TokenDataset, tuple[str, ...]]:
    """`count_words`, which takes some seconds for all of IMDb, kept in the cache. sha256: of the texts."""

    def make() -> Arrays:
        counted, lexicon = count_words(texts)
        listed = np.frombuffer("\n".join(lexicon).encode(), np.uint8)
        return {"ids": counted.tokens, "offsets": counted.offsets, "lexicon": listed}

    kept = cached_arrays(cache, f"imdb-words-{sha256[:32]}-v{WORD_VERSION}", make)
    lexicon = tuple(kept["lexicon"].tobytes().decode().split("\n"))
    return TokenDataset(kept["ids"], kept["offsets"], texts.labels), lexicon


def count_words(texts: TokenDataset) -> tuple[TokenDataset, tuple[str, ...]]:
    """Texts of UTF-8 bytes as ids (int32) into the lexicon of all their words, sorted. Id 0 is no word: it
    stands alone in a text that has none."""
    lexicon: dict[str, int] = {"": 0}
    ids: list[int] = []
    lengths = []
    data, offsets = texts.tokens.astype(np.uint8).tobytes(), texts.offsets.tolist()
    for start, end in pairwise(offsets):
        words = split_words(data[start:end].decode("utf-8", "replace")) or [""]
        ids += [lexicon.setdefault(word, len(lexicon)) for word in words]
        lengths.append(len(words))
    words_found = list(lexicon)
    order = sorted(range(len(words_found)), key=words_found.__getitem__)
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return (
        TokenDataset(rank[np.array(ids, np.int64)], offsets_of(lengths), texts.labels),
        tuple(words_found[index] for index in order),
    )


def make_vocabulary(
    train: TokenDataset, lexicon: Sequence[str], size: int
) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """Pad, unknown and the `size` most frequent words of the training texts, ties in alphabetical order; and
    the table (lexicon,) from ids of the lexicon to ids of this vocabulary."""
    if size < 1:
        raise InputError(f"--word-vocabulary must be at least 1, got {size}")
    counts = np.bincount(train.tokens, minlength=len(lexicon))
    counts[0] = 0
    most_frequent = np.argsort(-counts, kind="stable")[:size]  # the lexicon is sorted
    most_frequent = most_frequent[counts[most_frequent] > 0]
    table = np.full(len(lexicon), WORD_UNK, np.int32)
    table[most_frequent] = np.arange(FIRST_WORD, FIRST_WORD + len(most_frequent), dtype=np.int32)
    return ("<pad>", "<unk>", *(lexicon[index] for index in most_frequent)), table
