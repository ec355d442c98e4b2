"""The student behind the protocol: one batch at a time, in ONNX Runtime or torch.

Shape legend: N texts, C classes.
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from llkd_ray import storage
from llkd_ray.config import ServeSection
from llkd_ray.errors import StudentError
from llkd_ray.serving.batching import Batcher, Call, Pace
from llkd_ray.serving.protocol import Classification
from llkd_ray.student.batches import tokenize
from llkd_ray.student.model import load_tokenizer
from llkd_ray.student.runtime import (
    Floats,
    cut_passes,
    onnx_file,
    onnx_network,
    probabilities,
    torch_network,
)
from llkd_ray.student.temperature import read_temperature

# Requests share a call of up to this many forward passes, cut by length: texts of like length
# stand together, and little is computed for padding.
_PASSES_PER_CALL = 4
# How batches are measured before they are tokenized: subword tokenizers make a token of about
# four letters, and put one before and one behind the text. Where that is wrong, so is the time
# that a call is seen to take for a token, and their product is right again.
_CHARS_PER_TOKEN = 4
_MARKS = 2
_ORDINARY = "Which words stand in a question of this length ?"


def student_labels(folder: Path) -> tuple[str, ...]:
    """Return the classes of an exported student, in the order of its outputs.

    Raises:
        StudentError: The folder holds none.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise StudentError(f"{folder}: no student is in this folder (no config.json)")
    names = json.loads(file.read_text(encoding="utf-8")).get("id2label")
    if not names:
        raise StudentError(f"{folder}: its config.json names no classes (id2label)")
    return tuple(names[str(index)] for index in range(len(names)))


def student_calibration(folder: Path) -> str:
    """Return what the model card says of an exported student's confidence."""
    temperature = read_temperature(folder)
    if temperature is None or temperature.fitted_on == "nothing":
        return "none"
    return f"temperature {temperature.value:g} on {temperature.fitted_on}"


class StudentClassifier:
    """A text classifier that shares its forward passes between requests."""

    def __init__(
        self,
        folder: Path,
        max_length: int,
        serve: ServeSection,
        observe: Callable[[Call], None] | None = None,
    ) -> None:
        """Load the model.

        Args:
            folder: Model and tokenizer: a plain student, or one for ONNX Runtime.
            max_length: Tokens of a text that are read; the rest is cut.
            serve: Backend, threads, device, sizes of batches and the longest wait.
            observe: Told of each call of the model, in the event loop.

        Raises:
            StudentError: It cannot be loaded, or is not there in the form of `serve.backend`.
        """
        self._max_texts, self._max_tokens = serve.max_batch_texts, serve.max_batch_tokens
        # Whatever computes does so in this one thread, loading included: OpenMP keeps a team of
        # threads per caller, and with more teams than cores they sleep between the layers, which
        # doubles the latency of a single text.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="student")
        pace = self._thread.submit(self._load, folder, max_length, serve).result()
        self._batcher = Batcher(
            self.probabilities,
            self._thread,
            tokens=self._estimate,
            max_tokens=_PASSES_PER_CALL * self._max_tokens,
            gather_s=serve.batch_wait_ms / 1000,
            max_wait_s=serve.max_queue_ms / 1000,
            pace=pace,
            observe=observe,
        )

    def _load(self, folder: Path, max_length: int, serve: ServeSection) -> Pace:
        storage.here(folder)
        file = onnx_file(folder, serve.backend)
        if file is not None:
            self._network = onnx_network(file, serve.threads)
        elif serve.gpus_per_replica:
            self._network = torch_network(folder, torch.device("cuda"))
        else:
            torch.set_num_threads(serve.threads)
            self._network = torch_network(folder)
        self._tokenizer = load_tokenizer(folder)
        self._max_length: int = min(max_length, self._tokenizer.model_max_length)
        # The first pass allocates and dispatches; better here than in somebody's request.
        self._seconds(1)
        return self._measure()

    def _measure(self) -> Pace:
        """Time a small call and a large one."""
        tokens = self._estimate(_ORDINARY)
        small_s, large_s = self._seconds(1), self._seconds(self._max_texts)
        # However the two came out, a text more is not for nothing.
        token_s = max(large_s / 2, large_s - small_s) / (tokens * self._max_texts)
        return Pace(max(0.0, small_s - tokens * token_s), token_s)

    def _seconds(self, texts: int) -> float:
        began = time.perf_counter()
        self.probabilities([_ORDINARY] * texts)
        return time.perf_counter() - began

    def _estimate(self, text: str) -> int:
        """Return about how many tokens are read of a text."""
        tokens = _MARKS + len(text) // _CHARS_PER_TOKEN
        return min(tokens, self._max_length)

    async def classify(self, texts: list[str]) -> Classification:
        """Answer N texts.

        Raises:
            Refusal: 429, they would wait for longer than `serve.max_queue_ms`.
        """
        return Classification(await self._batcher.submit(texts))

    def probabilities(self, texts: list[str]) -> Floats:
        """Compute the probabilities [N, C], in passes of texts of like length."""
        tokens = tokenize(self._tokenizer, texts, self._max_length)
        passes = cut_passes(tokens.lengths, self._max_texts, self._max_tokens)
        return probabilities(self._network, tokens, self._tokenizer.pad_token_id, passes)

    def check_health(self) -> None:
        """Raise if the batcher has stopped."""
        self._batcher.check_health()

    async def close(self) -> None:
        """Stop the model's thread."""
        await self._batcher.close()
        self._thread.shutdown(wait=False, cancel_futures=True)
