"""The teacher behind the same protocol: vLLM's engine, asked as in labelling.

Shape legend: N texts, C classes.
"""

from dataclasses import dataclass

import numpy as np

from llkd_ray.config import Example, TaskSection, VLLMTeacher
from llkd_ray.errors import TeacherError
from llkd_ray.serving.protocol import Classification
from llkd_ray.teacher.calibration import Calibration
from llkd_ray.teacher.engine import Engine
from llkd_ray.teacher.pretrained import teacher_folder


@dataclass(frozen=True)
class TeacherModel:
    """What decides a teacher's answers."""

    task: TaskSection
    teacher: VLLMTeacher
    pool: tuple[Example, ...]
    calibration: Calibration
    cache: str
    """Folder for converted models, on the replica's node."""


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
            TeacherError: The engine refuses a text.
        """
        answers = await self._engine.read(texts)
        for answer in answers:
            if answer.error is not None:
                raise TeacherError(f"the teacher cannot answer: {answer.error}")
        logprobs = np.array([answer.logprobs for answer in answers], dtype=np.float64)
        return Classification(self._calibration.probabilities(logprobs))

    def check_health(self) -> None:
        """Raise if the engine's process has died."""
        self._engine.check_health()

    async def close(self) -> None:
        """End the engine's process."""
        await self._engine.close()
