"""The teacher behind the same protocol: vLLM's engine, one forward pass per text.

Shape legend: N texts, C classes.
"""

import asyncio
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llkd_ray.config import TaskSection, TeacherSection
from llkd_ray.teacher.calibration import Calibration
from llkd_ray.teacher.engine import engine_arguments, sampling_arguments
from llkd_ray.teacher.pretrained import teacher_folder
from llkd_ray.teacher.prompt import Prompt
from llkd_ray.teacher.verbalizer import label_token_ids

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TeacherModel:
    """What decides a teacher's answers."""

    task: TaskSection
    teacher: TeacherSection
    calibration: Calibration
    cache: str
    """Folder for converted models, on the replica's node."""


class TeacherClassifier:
    """The labelling prompt and read-out, served. vLLM itself batches the requests."""

    def __init__(self, model: TeacherModel) -> None:
        """Start the engine, a child process of this one; takes half a minute on a CPU."""
        # Imported in the replica alone: it reads its environment when imported, and takes long.
        from vllm import SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        folder = str(teacher_folder(model.teacher.model, model.cache))
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(model=folder, **engine_arguments(model.teacher.engine))
        )
        self._tokenizer: Any = self._engine.get_tokenizer()
        self._prompt = Prompt.of(model.task)
        self._max_tokens = model.teacher.engine.max_model_len - 1
        self._token_ids = label_token_ids(self._tokenizer, model.task)
        self._sampling = SamplingParams(**sampling_arguments(self._token_ids))
        self._calibration = model.calibration
        self._numbers = itertools.count()

    async def classify(self, texts: list[str]) -> Floats:
        """Return the calibrated probabilities [N, C] of N texts."""
        logprobs = await asyncio.gather(*(self._logprobs(text) for text in texts))
        return self._calibration.probabilities(np.array(logprobs, dtype=np.float64))

    def check_health(self) -> None:
        """Raise if the engine's process has died."""
        if self._engine.errored:
            raise self._engine.dead_error

    async def close(self) -> None:
        """End the engine's process."""
        self._engine.shutdown()

    async def _logprobs(self, text: str) -> list[float]:
        """Return the log-probability of each label's token [C]."""
        ids = self._prompt.token_ids(self._tokenizer, text, self._max_tokens)
        answers = self._engine.generate(
            {"prompt_token_ids": ids}, self._sampling, f"text-{next(self._numbers)}"
        )
        *_, last = [output async for output in answers]
        read = last.outputs[0].logprobs[0]
        return [read[token].logprob for token in self._token_ids]
