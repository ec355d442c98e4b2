"""Texts that stand somewhere already, exactly or nearly: in the seed, in what is held out."""

import unicodedata
from dataclasses import dataclass, field

from rapidfuzz import fuzz, process
from rapidfuzz.distance import Levenshtein

from llkd_ray.words import words_of

_CODES = 0x110000 - 0x10000


def normal_words(text: str) -> list[str]:
    """Return the words of a text (`words_of`) without case and punctuation.

    So `p.m.` is one word, and another in its place is one change.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = ("".join(filter(str.isalnum, word)) for word in words_of(folded))
    return [word for word in words if word]


@dataclass
class _Texts:
    """Texts from one place."""

    held_out: bool
    exact: set[str] = field(default_factory=set)
    """Without spaces: `city 's` is `city's`."""
    spaced: list[str] = field(default_factory=list)
    coded: list[str] = field(default_factory=list)
    """Each word as one character; of what is held out."""


class Seen:
    """All texts that a new one must not repeat."""

    def __init__(self, near: float) -> None:
        """Start with none.

        Args:
            near: Likeness by edits of characters, 0 to 1, from which two texts are near duplicates.
        """
        self._near = near
        self._places: dict[str, _Texts] = {}
        self._codes: dict[str, str] = {}

    def add(self, place: str, text: str, *, held_out: bool = False) -> None:
        """Remember a text.

        Args:
            place: Where it stands, for the reason.
            text: It.
            held_out: A student is judged by it: one word changed is a near duplicate, too, unless
                that was all of it.
        """
        texts = self._places.setdefault(place, _Texts(held_out))
        words = normal_words(text)
        texts.exact.add("".join(words))
        texts.spaced.append(" ".join(words))
        if held_out:
            texts.coded.append(self._coded(words))

    def find(self, text: str) -> str | None:
        """Say where a text stands already, None if nowhere."""
        words = normal_words(text)
        for place, texts in self._places.items():
            if "".join(words) in texts.exact:
                return f"the same as a text of {place}"
        for place, texts in self._places.items():
            if self._is_near(words, texts):
                return f"nearly the same as a text of {place}"
        return None

    def _is_near(self, words: list[str], texts: _Texts) -> bool:
        alike = process.extractOne(
            " ".join(words), texts.spaced, scorer=fuzz.ratio, score_cutoff=100 * self._near
        )
        if alike is None and texts.held_out:
            # Of two texts of a word each, one is no change of the other.
            longer = texts.coded if len(words) > 1 else [of for of in texts.coded if len(of) > 1]
            changed = process.extractOne(
                self._coded(words), longer, scorer=Levenshtein.distance, score_cutoff=1
            )
            return changed is not None
        return alike is not None

    def _coded(self, words: list[str]) -> str:
        """Write each word as one character, so that an edit of characters is one of words."""
        # Code points from 0x10000 on: none is half of a surrogate pair, and there are a million.
        # Past that two words share one, which can only drop a text too many.
        return "".join(
            self._codes.setdefault(word, chr(0x10000 + len(self._codes) % _CODES)) for word in words
        )
