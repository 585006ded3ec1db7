"""Synthetic reviews: made-up documents whose sentiment has to be gathered from all over them.

    splits = generate_reviews({"train": 4000, "val": 500, "test": 1000}, max_bytes=1024, seed=0)

A stand-in for offline runs and tests, a task of its own: its accuracies say nothing about real reviews.

A document is a list of sentences. Some are evidence, each for or against the film:
    direct     "The acting was superb."
    negated    "The acting was never boring."                        counts as its opposite
    contrast   "Although the plot was awful, the acting was superb." the main clause alone counts
The others are not, though they may use the same words: distractors ("In one scene a boring king meets the
hero.", "My neighbour called the trailer superb.") and plain remarks. The number of pieces of evidence is
odd, and the label is their majority: 0 negative, 1 positive, half of the documents each.

Each good word has a bad one of the same length in its place, so that turning a document's evidence over
turns its label and leaves its length, its sentences and its other words as they are.
Lengths are log-uniform up to `LONGEST` bytes, at most `max_bytes`, so that no document needs to be cut.
Deterministic as described in random_draws.py; no document comes twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from command_line import InputError
from tasks.random_draws import RandomDraws
from tasks.token_dataset import TokenDataset, offsets_of

SHORTEST, LONGEST = 200, 3200  # bytes aimed at
LEAST_BYTES = 64  # a limit under which not enough different documents exist
AGREEING_SHARE = 75  # per cent of the evidence drawn for one side
FRUITLESS = 50  # documents in a row that were there before: there are not enough different ones

PAIRS = (
    ("good", "poor"),
    ("great", "awful"),
    ("superb", "boring"),
    ("moving", "clumsy"),
    ("clever", "stupid"),
    ("witty", "silly"),
    ("fresh", "stale"),
    ("elegant", "tedious"),
    ("charming", "dreadful"),
    ("brilliant", "laughable"),
)
ASPECTS = (
    *("acting", "plot", "dialogue", "music", "photography", "editing", "ending", "opening"),
    *("direction", "humour", "pacing", "cast", "script", "final act", "leading role", "camera work"),
)
VERBS = ("was", "is", "seemed", "felt")
NEGATIONS = ("was not", "was never", "was hardly", "did not seem", "never felt")
CONTRASTS = ("Although", "Even though", "While", "Though")
PERSONS = ("king", "detective", "teacher", "pilot", "stranger", "nurse", "painter", "sailor")
FRIENDS = ("My neighbour", "A colleague", "My sister", "The poster", "One critic", "A stranger")
THINGS = ("trailer", "book", "first film", "other films of the year", "stage play", "remake")
REMARKS = (
    "I saw it on a rainy afternoon.",
    "It runs for about two hours.",
    "The story takes place in a small town by the sea.",
    "The theatre was half full.",
    "It was shot in black and white.",
    "The hero comes home after many years.",
    "There is a long journey in the middle.",
    "The credits list more names than I could count.",
    "Some scenes were added after the first screening.",
    "We talked about it on the way home.",
)
BREAK = "<br /><br />"


@dataclass(frozen=True)
class Sentence:
    """A sentence with its words both ways. side: +1 or -1 where it is evidence, 0 where it is none.

    text: as drawn. turned: with the evidence turned over, of the same length."""

    side: int
    text: str
    turned: str


class _Dice:
    """Integers below a bound, one at a time, from a stream of draws."""

    def __init__(self, draws: RandomDraws) -> None:
        self._stream = self._words(draws)

    @staticmethod
    def _words(draws: RandomDraws) -> Iterator[int]:
        while True:
            yield from draws.below(1 << 31, 1 << 14).tolist()

    def below(self, bound: int) -> int:
        return (next(self._stream) * bound) >> 31

    def pick(self, words: tuple[str, ...]) -> str:
        return words[self.below(len(words))]


def generate_reviews(sizes: dict[str, int], max_bytes: int, seed: int) -> dict[str, TokenDataset]:
    """Documents as UTF-8 bytes (uint8) with labels, for each split as many as `sizes` says.

    Raises InputError where `max_bytes` leaves too few different documents."""
    if max_bytes < LEAST_BYTES:
        raise InputError(f"synthetic reviews need a length of at least {LEAST_BYTES} bytes, got {max_bytes}")
    seen: set[str] = set()
    made = {}
    for name in ("test", "val", "train"):  # a larger training set leaves the others as they are
        made[name] = _generate(sizes[name], max_bytes, RandomDraws(seed, "synthetic reviews", name), seen)
    return {name: made[name] for name in ("train", "val", "test")}


def _generate(size: int, max_bytes: int, draws: RandomDraws, seen: set[str]) -> TokenDataset:
    labels = draws.order(size) % 2
    dice = _Dice(draws)
    texts: list[str] = []
    fruitless = 0
    while len(texts) < size:
        text = _document(bool(labels[len(texts)]), max_bytes, dice)
        if text in seen:
            fruitless += 1
            if fruitless == FRUITLESS:
                raise InputError(
                    f"there are not enough different synthetic reviews of at most {max_bytes} bytes "
                    f"({len(seen)} made); ask for fewer or allow longer ones"
                )
            continue
        fruitless = 0
        seen.add(text)
        texts.append(text)
    contents = [text.encode() for text in texts]
    tokens = np.frombuffer(b"".join(contents), np.uint8)
    return TokenDataset(tokens, offsets_of([len(content) for content in contents]), labels)


def _document(positive: bool, max_bytes: int, dice: _Dice) -> str:
    """A document of this label and at most `max_bytes` bytes."""
    octaves = (LONGEST // SHORTEST).bit_length() - 1
    aim = min(max_bytes, (SHORTEST << dice.below(octaves)) * (256 + dice.below(256)) // 256)
    favour = 1 - 2 * dice.below(2)
    first = _direct(favour, dice)
    sentences, length = [first], len(first.text)
    while True:
        sentence = _sentence(favour, dice)
        gap = BREAK if dice.below(8) == 0 else " "
        if length + len(gap) + len(sentence.text) > aim:
            break
        length += len(gap) + len(sentence.text)
        sentences.append(Sentence(sentence.side, gap + sentence.text, gap + sentence.turned))
    evidence = [index for index, sentence in enumerate(sentences) if sentence.side]
    if len(evidence) % 2 == 0:  # no ties: the last piece of evidence goes
        del sentences[evidence[-1]]
    turn = (sum(sentence.side for sentence in sentences) > 0) != positive
    return "".join(sentence.turned if turn else sentence.text for sentence in sentences)


def _sentence(favour: int, dice: _Dice) -> Sentence:
    kind = dice.below(100)
    side = favour if dice.below(100) < AGREEING_SHARE else -favour
    if kind < 35:
        return _direct(side, dice)
    if kind < 47:
        return _negated(side, dice)
    if kind < 58:
        return _contrast(side, dice)
    if kind < 80:
        return _distractor(dice)
    remark = dice.pick(REMARKS)
    return Sentence(0, remark, remark)


def _words(side: int, dice: _Dice) -> tuple[str, str]:
    """A word of this side and its counterpart."""
    good, bad = PAIRS[dice.below(len(PAIRS))]
    return (good, bad) if side > 0 else (bad, good)


def _direct(side: int, dice: _Dice) -> Sentence:
    start = f"The {dice.pick(ASPECTS)} {dice.pick(VERBS)}"
    said, opposite = _words(side, dice)
    return Sentence(side, f"{start} {said}.", f"{start} {opposite}.")


def _negated(side: int, dice: _Dice) -> Sentence:
    start = f"The {dice.pick(ASPECTS)} {dice.pick(NEGATIONS)}"
    said, opposite = _words(-side, dice)
    return Sentence(side, f"{start} {said}.", f"{start} {opposite}.")


def _contrast(side: int, dice: _Dice) -> Sentence:
    start = f"{dice.pick(CONTRASTS)} the {dice.pick(ASPECTS)} {dice.pick(VERBS)}"
    middle = f"the {dice.pick(ASPECTS)} {dice.pick(VERBS)}"
    conceded, conceded_turned = _words(-side, dice)
    said, opposite = _words(side, dice)
    return Sentence(
        side, f"{start} {conceded}, {middle} {said}.", f"{start} {conceded_turned}, {middle} {opposite}."
    )


def _distractor(dice: _Dice) -> Sentence:
    word, _ = _words(1 - 2 * dice.below(2), dice)
    if dice.below(2):
        article = "an" if word[0] in "aeiou" else "a"
        text = f"In one scene {article} {word} {dice.pick(PERSONS)} meets the hero."
    else:
        text = f"{dice.pick(FRIENDS)} called the {dice.pick(THINGS)} {word}."
    return Sentence(0, text, text)
