"""What a generated row must pass before a student sees it. Each that is dropped has a reason.

Shape legend: N generated rows, C classes.
"""

from dataclasses import dataclass

import numpy as np

from llkd_ray.config import ChecksSection
from llkd_ray.guided.duplicates import Seen
from llkd_ray.guided.form import Form
from llkd_ray.metrics import Floats
from llkd_ray.selection import uncertainty

GENERATED = "other generated rows"
NO_END = "no end"
"""The reason against a text that was longer than `guide.sampling.max_tokens`."""


@dataclass(frozen=True)
class Sample:
    """A text that the teacher wrote, and what it and the student say of it."""

    text: str
    label: int
    """That the teacher was asked to write about."""
    finished: bool
    """Whether the text came to its end."""
    error: str | None
    """Why there is no text, or no label of it."""
    teacher: Floats
    """The teacher's calibrated distribution [C]; NaN where there is none."""
    student: Floats
    """The student's [C]."""


@dataclass(frozen=True)
class Checks:
    """The checks of a round. They remember the rows they have let through."""

    section: ChecksSection
    form: Form
    seen: Seen

    def reason_against(self, sample: Sample) -> str | None:
        """Say why a row is dropped, or None: then the next rows must not repeat it."""
        reason = (
            self._of_format(sample)
            or self.form.problem(sample.text)
            or self.seen.find(sample.text)
            or self._of_teacher(sample)
            or self._of_student(sample)
        )
        if reason is None:
            self.seen.add(GENERATED, sample.text)
        return reason

    def _of_format(self, sample: Sample) -> str | None:
        if sample.error is not None:
            return sample.error
        if not sample.finished:
            return NO_END
        if not sample.text:
            return "no text"
        return None

    def _of_teacher(self, sample: Sample) -> str | None:
        least = self.section.min_confidence
        if not least:
            return None
        if np.isnan(sample.teacher).any() or int(sample.teacher.argmax()) != sample.label:
            return "the teacher reads another label"
        if sample.teacher.max() < least:
            return "the teacher is not sure"
        return None

    def _of_student(self, sample: Sample) -> str | None:
        if int(sample.student.argmax()) != sample.label:
            # However sure it is, it has something to learn, if the teacher is right.
            return "the student reads another label" if self.section.student_agrees else None
        if uncertainty(sample.student[np.newaxis])[0] < self.section.min_uncertainty:
            return "the student is sure"
        return None
