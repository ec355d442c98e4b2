"""The student behind the protocol: a plain Hugging Face folder, torch, one batch at a time.

Shape legend: N texts, C classes.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from llkd_ray.config import ServeSection
from llkd_ray.errors import StudentError
from llkd_ray.serving.batching import Batcher
from llkd_ray.student.model import load_student, locate

Floats = npt.NDArray[np.float64]

# Requests share a call of up to this many forward passes, cut by length: texts of like length
# stand together, and little is computed for padding.
_PASSES_PER_CALL = 4


def student_labels(folder: Path) -> tuple[str, ...]:
    """Return the classes of an exported student, in the order of its outputs.

    Raises:
        StudentError: The folder holds none.
    """
    config = json.loads((locate(str(folder)) / "config.json").read_text(encoding="utf-8"))
    names = config.get("id2label")
    if not names:
        raise StudentError(f"{folder}: its config.json names no classes (id2label)")
    return tuple(names[str(index)] for index in range(len(names)))


class StudentClassifier:
    """A text classifier that shares its forward passes between requests."""

    def __init__(self, folder: Path, max_length: int, serve: ServeSection) -> None:
        """Load the model.

        Args:
            folder: Model and tokenizer.
            max_length: Tokens of a text that are read; the rest is cut.
            serve: Threads, device and batch size.
        """
        self._pass_texts = serve.max_batch_texts
        # Whatever computes does so in this one thread, loading included: OpenMP keeps a team of
        # threads per caller, and with more teams than cores they sleep between the layers, which
        # doubles the latency of a single text.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="student")
        self._thread.submit(self._load, folder, max_length, serve).result()
        self._batcher = Batcher(
            self.probabilities,
            self._thread,
            max_texts=_PASSES_PER_CALL * serve.max_batch_texts,
            wait_s=serve.batch_wait_ms / 1000,
        )

    def _load(self, folder: Path, max_length: int, serve: ServeSection) -> None:
        self._device = torch.device("cuda" if serve.gpus_per_replica else "cpu")
        if self._device.type == "cpu":
            torch.set_num_threads(serve.threads_per_replica)
        self._model, self._tokenizer = load_student(folder)
        self._model.to(self._device)
        self._max_length = min(max_length, self._tokenizer.model_max_length)
        # The first pass allocates and dispatches; better here than in somebody's request.
        self.probabilities(["warm-up"])

    async def classify(self, texts: list[str]) -> Floats:
        """Return the probabilities [N, C] of N texts."""
        return await self._batcher.submit(texts)

    def probabilities(self, texts: list[str]) -> Floats:
        """Compute the probabilities [N, C], in passes of texts of like length."""
        rows = self._tokenizer(texts, truncation=True, max_length=self._max_length)["input_ids"]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        with torch.inference_mode():
            ordered = torch.cat(
                [self._forward([rows[i] for i in part]) for part in self._cut(order)]
            )
        unsorted = np.empty(ordered.shape, dtype=np.float64)
        unsorted[order] = ordered.cpu().numpy()
        return unsorted

    def check_health(self) -> None:
        """Raise if the batcher has stopped."""
        self._batcher.check_health()

    async def close(self) -> None:
        """Stop the model's thread."""
        await self._batcher.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _forward(self, rows: list[list[int]]) -> torch.Tensor:
        """Return probabilities of one padded pass."""
        padded = self._tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self._device)
        logits: torch.Tensor = self._model(**padded).logits
        return logits.double().softmax(dim=-1)

    def _cut(self, order: list[int]) -> Iterator[list[int]]:
        for start in range(0, len(order), self._pass_texts):
            yield order[start : start + self._pass_texts]
