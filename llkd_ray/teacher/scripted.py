"""A teacher that is none: it scripts answers from a hash, to simulate scale. Never a result."""

import asyncio
import hashlib
import math
from collections.abc import Sequence

from llkd_ray.config import ScriptedTeacher, TaskSection
from llkd_ray.teacher.answers import Answer


class Script:
    """Answers that look like a teacher's and follow from nothing but the text's bytes."""

    way: str | None = None
    """Nothing is read."""

    def __init__(self, task: TaskSection, teacher: ScriptedTeacher) -> None:
        self._num_classes = len(task.labels)
        self._rows_per_s = teacher.rows_per_s
        self._turn = asyncio.Lock()

    async def read(self, texts: Sequence[str]) -> list[Answer]:
        """Return scripted answers, at the stated rate over all open calls."""
        if self._rows_per_s:
            async with self._turn:
                await asyncio.sleep(len(texts) / self._rows_per_s)
        return [self._answer(text) for text in texts]

    async def close(self) -> None:
        """Nothing is held."""

    def _answer(self, text: str) -> Answer:
        digest = hashlib.sha256(text.encode()).digest()
        scores = [1 + digest[position % len(digest)] for position in range(self._num_classes)]
        tokens = len(text.split())
        return Answer([math.log(score / sum(scores)) for score in scores], tokens, 0, 0)
