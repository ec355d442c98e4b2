"""From what an endpoint says to labels: by the likeliest first tokens, or by votes.

No tokenizer is at hand: a token is known by its text alone, and so are the labels' answers.

Shape legend: C classes, K likeliest first tokens.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# What a label is given at least, so that no label is ruled out by the end of a list.
_LEAST = 1e-12
# The least probability of all labels together that speaks for an answer.
_ANSWER = 0.01


def told_apart(answers: Sequence[str]) -> bool:
    """Whether no answer begins with the first word of another one, capitals aside.

    Where one does, a tokenizer is sure to begin both with the same token. Answers that this calls
    apart may still share a first piece of a word: only the endpoint's tokens show it.
    """
    folded = [answer.casefold() for answer in answers]
    return not any(
        other.startswith(answer.split()[0])
        for position, answer in enumerate(folded)
        for other in folded[:position] + folded[position + 1 :]
    )


@dataclass(frozen=True)
class FirstToken:
    """The probability of a first token, shared out over the labels."""

    mass: tuple[float, ...]
    """Of the tokens that begin this label's answer and no other one [C]."""
    unclear: float
    """Of the tokens that begin several answers."""
    unclear_token: str
    """The likeliest of these; empty if there is none."""
    floor: float
    """Given to a label that no token of the list begins."""
    likeliest: str
    """The likeliest token, whatever it begins."""

    @classmethod
    def of(
        cls, top: Sequence[tuple[str, float]], answers: Sequence[str], *, letters: bool
    ) -> "FirstToken":
        """Share out the likeliest first tokens.

        A token belongs to a label if its text, without white space around it, begins the label's
        answer: in any capitals, except where the answers are letters. That is not exact: a word
        of its own that happens to begin one answer, as "a" does with "acronym", counts for it.

        A label that no token of the list begins is less likely than the last of the list, and all
        such labels together have at most what the list leaves of 1: their floor is the smaller of
        that last probability and an equal share of the rest. It is the most that they may have.

        Args:
            top: Text and log-probability of the K likeliest tokens, none of them empty.
            answers: What stands for each label [C].
            letters: The answers are letters.
        """
        folded = [answer if letters else answer.casefold() for answer in answers]
        mass = [0.0] * len(answers)
        unclear: list[tuple[float, str]] = []
        for token, logprob in top:
            piece = token.strip() if letters else token.strip().casefold()
            begun = [label for label, answer in enumerate(folded) if answer.startswith(piece)]
            if not piece or not begun:
                continue
            if len(begun) == 1:
                mass[begun[0]] += math.exp(logprob)
            else:
                unclear.append((math.exp(logprob), piece))
        rest = max(0.0, 1.0 - sum(math.exp(logprob) for _, logprob in top))
        last = math.exp(min(logprob for _, logprob in top))
        return cls(
            mass=tuple(mass),
            unclear=sum(probability for probability, _ in unclear),
            unclear_token=max(unclear)[1] if unclear else "",
            floor=max(_LEAST, min(last, rest / max(1, mass.count(0.0)))),
            likeliest=max(top, key=lambda token: token[1])[0],
        )

    @property
    def is_answer(self) -> bool:
        """Whether a label can be read from it that is more than the tail of another answer."""
        return self.error is None and sum(self.mass) >= _ANSWER

    @property
    def is_clear(self) -> bool:
        """Whether no label is as likely as the tokens that may mean several of them."""
        return self.unclear == 0.0 or self.unclear < max(self.mass)

    @property
    def error(self) -> str | None:
        """Why no label can be read, if none can."""
        if not self.is_clear:
            return (
                f"the first token {self.unclear_token!r} begins several labels: set "
                'teacher.readout = "letters"'
            )
        if not any(self.mass):
            return "none of the likeliest first tokens begins a label"
        return None

    @property
    def logprobs(self) -> list[float]:
        """Log-probability of each label [C]."""
        return [math.log(probability or self.floor) for probability in self.mass]


def count_votes(said: Sequence[str], answers: Sequence[str], *, letters: bool) -> list[float] | str:
    """Turn sampled answers into the log-probability of each label [C], or say why there is none.

    Half a vote is added to each label (the Krichevsky-Trofimov estimate), so that none is ruled
    out by a few samples. Samples that name no label do not count.
    """
    votes = Counter(named(one, answers, letters=letters) for one in said)
    valid = len(said) - votes[None]
    if not valid:
        return f"none of {len(said)} answers names a label; the first was {said[0][:80]!r}"
    total = valid + 0.5 * len(answers)
    return [math.log((votes[label] + 0.5) / total) for label in range(len(answers))]


def named(said: str, answers: Sequence[str], *, letters: bool) -> int | None:
    """Return the label that a sampled answer begins with; the longest, if it is several.

    White space, capitals (except for letters) and marks in front, as in "**Good**.", are passed
    over. A label is named by whole words.
    """
    case = re.NOFLAG if letters else re.IGNORECASE
    line = " ".join(said.split())
    # As it stands first: a mark may be part of the answer, as in "-1".
    for start in (line, re.sub(r"^[\W_]+", "", line)):
        begun = [
            (len(answer), label)
            for label, answer in enumerate(answers)
            if re.match(re.escape(answer) + r"(?!\w)", start, case)
        ]
        if begun:
            return max(begun)[1]
    return None
