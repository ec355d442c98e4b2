"""Which gold rows the teacher is shown: some that the student gets right, some wrong, hard ones.

Shape legend: N rows, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llkd_ray.config import ShownSection
from llkd_ray.metrics import Ints
from llkd_ray.selection import Probabilities


@dataclass(frozen=True)
class Answered:
    """Gold rows and what the student says of them."""

    texts: tuple[str, ...]
    """N."""
    gold: Ints
    """[N]"""
    probabilities: Probabilities
    """[N, C]"""

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class OfLabel:
    """The rows of one label, by how the student does on them; positions in the rows."""

    correct: Ints
    wrong: Ints
    hard: Ints
    """Hard negatives, the one with the most confidence in a wrong label first."""


@dataclass(frozen=True)
class Shown:
    """Texts of one label for one prompt."""

    correct: tuple[str, ...]
    wrong: tuple[str, ...]
    hard: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.correct) + len(self.wrong) + len(self.hard)


def sort_rows(rows: Answered, section: ShownSection) -> list[OfLabel]:
    """Sort the rows of each label, so that no label's hard negatives crowd out another's.

    Returns:
        One for each of the C classes.
    """
    predicted = rows.probabilities.argmax(axis=1)
    confidence = rows.probabilities.max(axis=1)
    sorted_rows = []
    for label in range(rows.probabilities.shape[1]):
        own = np.flatnonzero(rows.gold == label)
        mistaken = own[predicted[own] != label]
        ranked = mistaken[np.argsort(-confidence[mistaken], kind="stable")]
        cut = section.hard_of_label
        hard = cut if isinstance(cut, int) else int(np.ceil(cut * len(ranked)))
        sorted_rows.append(
            OfLabel(
                correct=own[predicted[own] == label],
                wrong=ranked[hard:],
                hard=ranked[:hard],
            )
        )
    return sorted_rows


def draw(rows: Answered, of_label: OfLabel, section: ShownSection, seed: Sequence[int]) -> Shown:
    """Draw the rows for one prompt of a label.

    Where there are fewer wrong rows than asked for, more correct ones stand in, and the other way
    round.

    Args:
        rows: All of them.
        of_label: Those of the label.
        section: How many of each kind.
        seed: Of the draw.
    """
    rng = np.random.default_rng(list(seed))
    # Hard negatives are ranked: the first of them are shown in every prompt.
    hard = of_label.hard[: section.hard]
    wrong = rng.permutation(of_label.wrong)
    correct = rng.permutation(of_label.correct)
    asked = section.correct + section.wrong + section.hard
    wrong_number = max(section.wrong, asked - len(hard) - len(correct)) if section.wrong else 0
    wrong = wrong[:wrong_number]
    correct = correct[: asked - len(hard) - len(wrong)] if section.correct else correct[:0]

    def texts(positions: Ints) -> tuple[str, ...]:
        return tuple(rows.texts[at] for at in positions)

    return Shown(texts(correct), texts(wrong), texts(hard))
