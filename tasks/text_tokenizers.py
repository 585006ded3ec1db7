"""Tokenizers: bytes and words of texts, symbols of ListOps expressions, pixels. Pad is id 0 everywhere.

    ByteTokenizer().encode("a<br />")            # each byte of the UTF-8 text plus 1; 257 ids
    WordTokenizer(("the", "film")).encode(...)   # lower-cased words; pad 0, unknown 1, the words from 2
    ListOpsTokenizer().encode("[MAX 2 9 ]")      # 15 symbols from 2; parentheses are left out

For whole data sets of words, `count_words` reads each text once into ids of a lexicon of all its words; a
vocabulary of the most frequent words of any part of it, and the ids in it, are then array look-ups.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from command_line import InputError
from tasks.listops import SYMBOLS
from tasks.token_dataset import PAD_ID, TokenDataset, offsets_of

WORD_UNK, FIRST_WORD = 1, 2
WORD_VERSION = 1  # part of the cache's keys: to be raised when words are told apart differently
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_MARKUP = re.compile(r"<br\s*/?>", re.IGNORECASE)

Ids = NDArray[Any]


class ByteTokenizer:
    """Id = byte + 1 of the UTF-8 text as it is: `decode(encode(text)) == text` for every str."""

    vocab_size = 257

    def encode(self, text: str) -> Ids:
        """(L,) uint16."""
        return self.encode_bytes(np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8))

    def encode_bytes(self, data: NDArray[np.uint8]) -> Ids:
        return data.astype(np.uint16) + np.uint16(1)

    def decode(self, ids: Ids) -> str:
        """The text; pads are left out, bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        kept = np.asarray(ids)
        data = (kept[kept != PAD_ID] - 1).astype(np.uint8).tobytes()
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

    def symbol(self, token: int) -> str:
        if token == PAD_ID:
            return "<pad>"
        if token == ord(" ") + 1:
            return "␣"
        byte = token - 1
        return chr(byte) if 32 < byte < 127 else f"\\x{byte:02x}"


def split_words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits, with inner apostrophes; line breaks in HTML are none."""
    return _WORD.findall(_MARKUP.sub(" ", text).lower())


@dataclass(frozen=True)
class WordTokenizer:
    """Lower-cased words; `words[i]` has id i + 2."""

    words: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        return FIRST_WORD + len(self.words)

    def encode(self, text: str) -> Ids:
        """(L,) int32; a text without words is one unknown word."""
        ids = {word: FIRST_WORD + index for index, word in enumerate(self.words)}
        found = [ids.get(word, WORD_UNK) for word in split_words(text)]
        return np.array(found or [WORD_UNK], np.int32)

    def decode(self, ids: Ids) -> str:
        return " ".join(self.symbol(int(token)) for token in ids if token != PAD_ID)

    def symbol(self, token: int) -> str:
        return self.words[token - FIRST_WORD] if token >= FIRST_WORD else ("<pad>", "<unk>")[token]


class ListOpsTokenizer:
    """The symbols of ListOps in their fixed order; an unknown one is <unk>."""

    vocab_size = len(SYMBOLS)

    def encode(self, text: str) -> Ids:
        """(L,) uint8."""
        ids = {symbol: index for index, symbol in enumerate(SYMBOLS) if index > WORD_UNK}
        plain = text.replace("(", " ").replace(")", " ")
        return np.array([ids.get(symbol, WORD_UNK) for symbol in plain.split()], np.uint8)

    def decode(self, ids: Ids) -> str:
        return " ".join(SYMBOLS[int(token)] for token in ids if token != PAD_ID)

    def symbol(self, token: int) -> str:
        return SYMBOLS[token]


class PixelTokenizer:
    """Id = grey value 0..255 plus 1."""

    vocab_size = 257

    def encode(self, grey: NDArray[np.uint8]) -> Ids:
        return grey.astype(np.uint16) + np.uint16(1)

    def symbol(self, token: int) -> str:
        return "<pad>" if token == PAD_ID else str(token - 1)


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
) -> tuple[WordTokenizer, NDArray[np.int32]]:
    """The `size` most frequent words of the training texts, ties in alphabetical order, and the table
    (lexicon,) from ids of the lexicon to ids of the vocabulary."""
    if size < 1:
        raise InputError(f"--word-vocabulary must be at least 1, got {size}")
    counts = np.bincount(train.tokens, minlength=len(lexicon))
    counts[0] = 0
    most_frequent = np.argsort(-counts, kind="stable")[:size]  # the lexicon is sorted
    most_frequent = most_frequent[counts[most_frequent] > 0]
    table = np.full(len(lexicon), WORD_UNK, np.int32)
    table[most_frequent] = np.arange(FIRST_WORD, FIRST_WORD + len(most_frequent), dtype=np.int32)
    return WordTokenizer(tuple(lexicon[index] for index in most_frequent)), table
