"""The teacher behind the same protocol: vLLM's engine, asked as in labelling.

Shape legend: N texts, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llkd_ray.config import Example, TaskSection, VLLMTeacher
from llkd_ray.serving.protocol import Classification, Floats, Refusal
from llkd_ray.teacher.answers import Answer, TeacherDiedError
from llkd_ray.teacher.calibration import Calibration, read_calibrations
from llkd_ray.teacher.engine import Engine
from llkd_ray.teacher.pretrained import teacher_folder


@dataclass(frozen=True)
class TeacherModel:
    """What decides a teacher's answers."""

    task: TaskSection
    teacher: VLLMTeacher
    pool: tuple[Example, ...]
    calibration: Calibration
    kind: str
    """Of this calibration."""
    cache: str
    """Folder for converted models, on the replica's node."""


def served_calibration(labels: Path, kind: str) -> tuple[str, Calibration]:
    """Return the calibration with which a teacher is served, and its kind.

    Args:
        labels: Folder of the labels artifact.
        kind: `calibration.kind`. What `stacked` adds to the teacher's answer is no part of the
            teacher: then it is served by `batch`, which the stacking stands on.
    """
    served = "batch" if kind == "stacked" else kind
    return served, read_calibrations(labels / "calibrations.json")[served]


class TeacherClassifier:
    """The labelling prompt and read-out, served. vLLM itself batches the requests."""

    def __init__(self, model: TeacherModel) -> None:
        """Start the engine, a child process of this one; takes half a minute on a CPU."""
        folder = teacher_folder(model.teacher.model, model.cache)
        self._engine = Engine(model.task, model.teacher, model.pool, folder)
        self._calibration = model.calibration

    async def classify(self, texts: list[str]) -> Classification:
        """Answer N texts with calibrated probabilities.

        Raises:
            Refusal: 422 for a text that the teacher does not read, 503 when its engine has died.
        """
        try:
            answers = await self._engine.read(texts)
        except TeacherDiedError as error:
            raise Refusal(503, f"{error}; ask again", {"Retry-After": "5"}) from error
        refuse_unread(answers)
        return Classification(self._probabilities(answers))

    async def answer(self, texts: list[str]) -> Floats:
        """Return the calibrated probabilities [N, C], NaN for a text that the engine refuses."""
        return self._probabilities(await self._engine.read(texts))

    def _probabilities(self, answers: Sequence[Answer]) -> Floats:
        unknown = [np.nan] * len(self._calibration.log_prior)
        logprobs = np.array([unknown if a.logprobs is None else a.logprobs for a in answers])
        return self._calibration.probabilities(logprobs)

    def check_health(self) -> None:
        """Raise if the engine's process has died."""
        self._engine.check_health()

    async def close(self) -> None:
        """End the engine's process."""
        await self._engine.close()


def refuse_unread(answers: Sequence[Answer]) -> None:
    """Refuse a request with a text that the teacher did not read.

    Raises:
        Refusal: 422, with the first such text's position and the reason.
    """
    for position, answer in enumerate(answers):
        if answer.error is not None:
            raise Refusal(422, f"texts[{position}]: {answer.error}")
