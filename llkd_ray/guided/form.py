"""Whether a generated text has the form of the seed's: length, characters, no noise.

Source: the noise and length filters of SELF-GUIDE, arXiv 2407.12874, in our reading.
"""

import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from llkd_ray.config import ChecksSection
from llkd_ray.words import words_of

# Of a text of so many words, fewer than half distinct ones are the mark of a model in a loop.
_LOOP_WORDS, _LEAST_DISTINCT = 8, 0.5
# Numbers, punctuation and spaces of any kind, by Unicode category: no sign of another language.
_PLAIN = frozenset("NPZ")


@dataclass(frozen=True)
class Form:
    """What the seed's texts look like."""

    words: tuple[int, int]
    """Of the shortest and the longest text, scaled."""
    kinds: frozenset[str]
    """Of its characters: scripts, such as LATIN, and kinds of signs."""
    prompt_parts: tuple[str, ...]
    """What only a prompt says."""
    noise: bool

    @classmethod
    def of(
        cls, texts: Sequence[str], section: ChecksSection, prompt_parts: Collection[str]
    ) -> "Form":
        """Learn the form of the seed.

        Args:
            texts: Of the seed, at least one.
            section: How far from it a text may be.
            prompt_parts: Such as prefixes of text and label; those that stand in the seed itself
                are no sign of anything.
        """
        lengths = [len(words_of(text)) for text in texts]
        shorter, longer = section.length
        joined = "\n".join(texts)
        return cls(
            words=(max(1, round(min(lengths) * shorter)), round(max(lengths) * longer)),
            kinds=_kinds(joined) | _PLAIN,
            prompt_parts=tuple(part for part in prompt_parts if part and part not in joined),
            noise=section.noise,
        )

    def problem(self, text: str) -> str | None:
        """Say what is wrong with a text, None if nothing is."""
        length = len(words_of(text))
        if length < self.words[0]:
            return "too short"
        if length > self.words[1]:
            return "too long"
        if not self.noise:
            return None
        if _kinds(text) - self.kinds:
            return "characters that are foreign to the seed"
        words = text.split()
        distinct = {word.casefold() for word in words}
        if len(words) >= _LOOP_WORDS and len(distinct) < _LEAST_DISTINCT * len(words):
            return "words over and over"
        if any(part in text for part in self.prompt_parts):
            return "a part of the prompt"
        return None


def _kinds(text: str) -> frozenset[str]:
    """Return the scripts of a text's letters, and the Unicode categories of its other signs.

    ASCII's symbols count as punctuation: a small seed does not hold all of them.
    """
    return frozenset(
        unicodedata.name(sign, "?").split()[0]
        if sign.isalpha()
        else "P"
        if "!" <= sign <= "~"
        else unicodedata.category(sign)[0]
        for sign in set(text)
    )
