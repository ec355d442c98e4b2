"""The cascade behind the protocol: the student answers, and asks the teacher where it is unsure.

Shape legend: N texts, M texts of them that the teacher is asked about, C classes.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np

from llkd_ray.metrics import Ints
from llkd_ray.serving.protocol import Answerer, Classification, Classifier, Floats

Ask = Callable[[list[str]], Awaitable[Floats]]
"""Takes M texts, M at least 1, and returns the teacher's probabilities [M, C]; a row of NaN where
the teacher has no answer."""


@dataclass(frozen=True)
class Handover:
    """Who answers which text."""

    threshold: float
    """The teacher is asked where the student's confidence is below this."""
    abstain_below: float
    """An answer of less confidence than this is withheld."""

    def unsure(self, student: Floats) -> Ints:
        """Return the positions of the M texts for the teacher.

        Args:
            student: Its probabilities [N, C].
        """
        return np.flatnonzero(student.max(axis=1) < self.threshold)

    def settle(self, student: Floats, asked: Ints, teacher: Floats) -> Classification:
        """Put both models' answers together.

        The student's stands where the teacher has none, or one that would be withheld.

        Args:
            student: Its probabilities [N, C].
            asked: [M], what `unsure` returned.
            teacher: Its probabilities of these texts [M, C], or NaN.
        """
        withheld = (teacher.max(axis=1, initial=0.0) < self.abstain_below) & (
            student[asked].max(axis=1, initial=0.0) >= self.abstain_below
        )
        told = ~np.isnan(teacher).any(axis=1) & ~withheld
        probabilities = student.copy()
        probabilities[asked[told]] = teacher[told]
        by: list[Answerer | None] = ["student"] * len(student)
        for position in asked[told]:
            by[position] = "teacher"
        for position in np.flatnonzero(probabilities.max(axis=1) < self.abstain_below):
            by[position] = None
        return Classification(probabilities, by)


class CascadeClassifier:
    """A student with a teacher to ask. The unsure texts of a request go to it in one call."""

    def __init__(self, student: Classifier, ask: Ask, handover: Handover) -> None:
        """Take both models.

        Args:
            student: Answers first; closed with this one.
            ask: Asks the teacher.
            handover: Who answers which text.
        """
        self._student = student
        self._ask = ask
        self._handover = handover

    async def classify(self, texts: list[str]) -> Classification:
        """Answer N texts, and say by whom.

        Raises:
            Refusal: The student, or the teacher where it is needed, takes no more requests.
        """
        found = await self._student.classify(texts)
        asked = self._handover.unsure(found.probabilities)
        teacher = np.empty((0, found.probabilities.shape[1]))
        if len(asked):
            teacher = await self._ask([texts[position] for position in asked])
        settled = self._handover.settle(found.probabilities, asked, teacher)
        return Classification(settled.probabilities, settled.by)

    def check_health(self) -> None:
        """Raise if the student can answer no more; Serve looks after the teacher's replicas."""
        self._student.check_health()

    async def close(self) -> None:
        """Stop the student."""
        await self._student.close()
