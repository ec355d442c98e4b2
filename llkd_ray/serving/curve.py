"""The cascade's choice: how accurate it is at each threshold, and which threshold a target takes.

Pure: what student and teacher answered to rows with gold in, a threshold out.

Shape legend: N rows with gold, K thresholds.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llkd_ray.config import CascadeSection
from llkd_ray.metrics import Floats, Ints

Bools = npt.NDArray[np.bool_]

EVERYTHING = 2.0
"""A threshold that no confidence reaches: the teacher answers all texts."""
# Deviations of a normal distribution. One test would do with 1.96; where every threshold is tried,
# a teacher no better than the student passes at one of them in 1 of 10 runs with that, and in 2 of
# 100 with this (500 rows, simulated; 4 of 100 with 10,000).
_SURELY = 2.8


@dataclass(frozen=True)
class Answers:
    """What one model answers to rows with gold."""

    right: Bools
    """[N]"""
    confidence: Floats
    """[N], calibrated, 0 to 1."""

    def __getitem__(self, rows: Ints) -> "Answers":
        return Answers(self.right[rows], self.confidence[rows])


@dataclass(frozen=True)
class Curve:
    """The cascade at every threshold that tells rows apart, from the student alone on."""

    threshold: Floats
    """[K], rising from 0; the teacher is asked where the student's confidence is below it."""
    teacher_fraction: Floats
    """[K], share of the rows that the teacher is asked about."""
    answered_fraction: Floats
    """[K], share of the rows with an answer that is sure enough."""
    accuracy: Floats
    """[K], share of right answers among these; 0 where there is none."""
    helps: Bools
    """[K], whether the teacher is measurably right more often than the student on the rows it is
    asked about; not where it is asked about none."""


@dataclass(frozen=True)
class Choice:
    """The threshold that a target takes."""

    position: int
    """On the curve."""
    threshold: float
    reached: bool
    """Whether the target is met on the rows of the curve."""
    reason: str
    """One sentence."""


def trace(student: Answers, teacher: Answers, abstain_below: float) -> Curve:
    """Return the curve of N rows, N at least 1.

    Whether the teacher helps is McNemar's test on the rows where only one of both is right, with
    Edwards' correction, and so strict that trying every threshold leaves chance less than 5 %:
    without it a few lucky rows would choose the threshold.

    Source: McNemar 1947, Psychometrika 12(2); Edwards 1948, Psychometrika 13(3).

    Args:
        student: Its answers.
        teacher: Its answers to the same rows.
        abstain_below: `cascade.abstain_below`.
    """
    order = np.argsort(student.confidence, kind="stable")
    student, teacher = student[order], teacher[order]
    # The teacher is asked about the first k rows, and rows of equal confidence stay together.
    told_apart = np.flatnonzero(np.diff(student.confidence) > 0) + 1
    asked = np.concatenate([[0], told_apart, [len(order)]])
    # Halfway between two rows, so that rounding sends neither to the other side.
    halfway = (student.confidence[told_apart - 1] + student.confidence[told_apart]) / 2
    of_student, of_teacher = (answers.confidence >= abstain_below for answers in (student, teacher))

    def of_both(by_both: Bools, by_student: Bools) -> Floats:
        """Count rows, both models' of the first k and the student's of the others, [K]."""
        first, others = _sums(by_both), _sums(by_student)
        counted: Floats = (first[asked] + others[-1] - others[asked]).astype(np.float64)
        return counted

    # The student's answer stands where the teacher's would be withheld, and its own would not.
    right_of_both = np.where(of_teacher, teacher.right, of_student & student.right)
    answered = of_both(of_student | of_teacher, of_student)
    right = of_both(right_of_both, of_student & student.right)
    mended = _sums(teacher.right & ~student.right)[asked]
    spoilt = _sums(student.right & ~teacher.right)[asked]
    return Curve(
        threshold=np.concatenate([[0.0], halfway, [EVERYTHING]]),
        teacher_fraction=asked / len(order),
        answered_fraction=answered / len(order),
        accuracy=np.divide(right, answered, out=np.zeros(len(asked)), where=answered > 0),
        helps=mended - spoilt - 1 >= _SURELY * np.sqrt(np.maximum(mended + spoilt, 1)),
    )


def choose(curve: Curve, target: CascadeSection) -> Choice:
    """Return the threshold of a target, among the student alone and where the teacher helps.

    Without `cascade.accuracy` it is the one at which the most rows get a right answer: the most
    accurate of answers would be those of a model that hardly answers.
    """
    able = np.flatnonzero(curve.helps | (curve.teacher_fraction == 0))
    accuracy = curve.accuracy[able]
    if target.accuracy is not None:
        reaching = able[accuracy >= target.accuracy]
        if len(reaching):
            at = int(reaching[0])
            why = (
                f"the student alone reaches cascade.accuracy = {target.accuracy:g}"
                if at == 0
                else f"the fewest texts to the teacher that reach cascade.accuracy = "
                f"{target.accuracy:g}"
            )
            return _chosen(curve, at, why)
        # The most accurate, and of several the cheapest.
        at = int(able[accuracy.argmax()])
        return _chosen(
            curve,
            at,
            f"cascade.accuracy = {target.accuracy:g} is not reached: {_most(able, at)}",
            reached=False,
        )
    most = 1.0 if target.max_teacher_fraction is None else target.max_teacher_fraction
    within = able[curve.teacher_fraction[able] <= most]
    rightly_answered = curve.accuracy[within] * curve.answered_fraction[within]
    at = int(within[rightly_answered.argmax()])
    limit = "" if most == 1 else f" with at most {most:.1%} of the texts to the teacher"
    return _chosen(curve, at, f"{_most(able, at)}{limit}")


def _most(able: Ints, at: int) -> str:
    """Say why nothing is better than the position chosen."""
    if len(able) == 1:
        return (
            "the teacher is not asked, since on no share of the rows that the student is least "
            "sure of is it measurably right more often"
        )
    return "the student alone is best" if at == 0 else "the best threshold"


def _chosen(curve: Curve, at: int, reason: str, *, reached: bool = True) -> Choice:
    return Choice(at, float(curve.threshold[at]), reached, reason)


def _sums(rows: Bools) -> Ints:
    """Return how many of the first 0, 1, ... N rows hold, [N + 1]."""
    return np.concatenate([[0], np.cumsum(rows)])
