"""What stands in a Ray Data actor: a teacher, and the ledger that it writes its answers into."""

import asyncio
import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.util.metrics import Counter

from llkd_ray.config import (
    Example,
    Experiment,
    HTTPTeacher,
    ScriptedTeacher,
    TaskSection,
    VLLMTeacher,
)
from llkd_ray.corpus import example_pool
from llkd_ray.errors import TeacherError
from llkd_ray.teacher.answers import Answer, Teacher, TeacherDiedError
from llkd_ray.teacher.ledger import Ledger

if TYPE_CHECKING:
    from llkd_ray.teacher.prompt import Prompt

# A batch over which this many teachers died is not the fault of the machine.
_MAX_TEACHERS = 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opening:
    """All that it takes to start a teacher, on whichever node."""

    task: TaskSection
    teacher: VLLMTeacher | HTTPTeacher | ScriptedTeacher
    pool: tuple[Example, ...]
    cache: str
    """Folder for converted models, on that node."""

    @classmethod
    def of(cls, experiment: Experiment) -> "Opening":
        """Take what concerns the teacher from an experiment; reads the gold pool if it is shown."""
        pool = pool_of(experiment)
        return cls(experiment.task, experiment.teacher, pool, experiment.cache)

    @property
    def num_gpus(self) -> float:
        """GPUs that one actor reserves."""
        ranks = (
            self.teacher.engine.tensor_parallel_size if isinstance(self.teacher, VLLMTeacher) else 1
        )
        return self.teacher.actors.num_gpus * ranks

    def prompt(self) -> "Prompt | None":
        """Return the prompt of a teacher that runs here, built without its weights.

        Raises:
            TeacherError: It has no tokenizer, or the labels or the prompt do not suit it.
        """
        if not isinstance(self.teacher, VLLMTeacher):
            return None
        from transformers import AutoTokenizer

        from llkd_ray.teacher.pretrained import no_tokenizer, teacher_folder
        from llkd_ray.teacher.prompt import Prompt

        folder = teacher_folder(self.teacher.model, self.cache)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise TeacherError(no_tokenizer(f"teacher.model = {folder}", error)) from None
        return Prompt.of(tokenizer, self.task, self.teacher, self.pool)

    def start(self) -> Teacher:
        """Start the teacher."""
        match self.teacher:
            case VLLMTeacher() as teacher:
                from llkd_ray.teacher.engine import Engine
                from llkd_ray.teacher.pretrained import teacher_folder

                model = teacher_folder(teacher.model, self.cache)
                return Engine(self.task, teacher, self.pool, model, export_metrics=True)
            case HTTPTeacher() as teacher:
                from llkd_ray.teacher.http import Endpoint

                return Endpoint(self.task, teacher, self.pool)
            case ScriptedTeacher() as teacher:
                from llkd_ray.teacher.scripted import Script

                return Script(self.task, teacher)


def pool_of(experiment: Experiment) -> tuple[Example, ...]:
    """Return the gold examples that the prompt may choose from, besides task.examples."""
    if experiment.teacher.shots.kind == "fixed":
        return ()
    return example_pool(experiment.corpus, experiment.task)


class TeacherActor:
    """Ask about batches of rows and write the answers down before anything else is told.

    Several batches are under way at once: while the engine computes one, others are tokenized or
    written.
    """

    def __init__(self, opening: Opening, ledger: Ledger) -> None:
        self._started = time.perf_counter()
        self._name = uuid.uuid4().hex
        self._opening = opening
        self._teacher = opening.start()
        self._replacing = asyncio.Lock()
        self._ledger = ledger
        self._counters = {
            name: Counter(f"llkd_label_{name}", description=description)
            for name, description in (
                ("rows", "Rows that the teacher was asked about"),
                ("rejected", "Rows without an answer"),
                ("prompt_tokens", "Prompt tokens, cached ones included"),
                ("cached_tokens", "Prompt tokens from the prefix cache"),
            )
        }

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """Answer a batch; the table returned only counts them (`count`)."""
        written = await asyncio.to_thread(self._written, batch)
        counts = await self._ask(batch) if written is None else self._count(written)
        return counts.append_column("actor", pa.array([self._name])).append_column(
            "alive_s", pa.array([time.perf_counter() - self._started])
        )

    async def _ask(self, batch: pa.Table) -> pa.Table:
        """Ask about a batch, write the answers down, tell Prometheus; return their counts."""
        answers = await self._read(batch.column("text").to_pylist())
        if self._teacher.way is not None:
            await asyncio.to_thread(self._ledger.agree, self._teacher.way)
        entries = self._entries(batch, answers)
        await asyncio.to_thread(self._write, entries, batch.column("parts"))
        counts = self._count(entries)
        for name, counter in self._counters.items():
            if value := counts.column(name)[0].as_py():
                counter.inc(value)
        return counts

    def _count(self, entries: pa.Table) -> pa.Table:
        return count(entries, self._ledger.num_classes)

    async def _read(self, texts: list[str]) -> list[Answer]:
        """Ask the teacher, and when it dies of something, a new one."""
        teacher = self._teacher
        for deaths in range(_MAX_TEACHERS):
            if deaths:
                await self._replace(teacher)
                teacher = self._teacher
            try:
                return await teacher.read(texts)
            except TeacherDiedError as error:
                _log.warning("%s", error)
        raise TeacherError(
            f"the teacher died {_MAX_TEACHERS} times over the same {len(texts)} rows, its last "
            "words are in Ray's logs. What is answered is kept: run the same command again to go on"
        )

    async def _replace(self, dead: Teacher) -> None:
        """Start another teacher; of several batches that saw one die, the first does it."""
        async with self._replacing:
            if self._teacher is dead:
                await dead.close()
                self._teacher = await asyncio.to_thread(self._opening.start)

    def _entries(self, batch: pa.Table, answers: list[Answer]) -> pa.Table:
        columns = {
            "row_id": batch.column("row_id"),
            "attempt": batch.column("attempt"),
            "logprobs": [answer.logprobs for answer in answers],
            "prompt_tokens": [answer.prompt_tokens for answer in answers],
            "cached_tokens": [answer.cached_tokens for answer in answers],
            "cut_tokens": [answer.cut_tokens for answer in answers],
            "error": [answer.error for answer in answers],
        }
        schema = self._ledger.columns
        arrays: list[Any] = [
            column if isinstance(column, pa.ChunkedArray) else pa.array(column, field.type)
            for field in schema
            for column in [columns[field.name]]
        ]
        return pa.Table.from_arrays(arrays, schema=schema)

    def _write(self, entries: pa.Table, parts: pa.ChunkedArray) -> None:
        for name, part in _by_part(entries, parts):
            self._ledger.write(name, part)

    def _written(self, batch: pa.Table) -> pa.Table | None:
        """Return a batch's entries where an actor that died had written them all.

        Ray gives the next one the whole block, of which most batches may have been answered.
        """
        found = []
        for name, rows in _by_part(batch, batch.column("parts")):
            entries = self._ledger.written(name, rows)
            if entries is None:
                return None
            found.append(entries)
        return pa.concat_tables(found)


def _by_part(rows: pa.Table, parts: pa.ChunkedArray) -> Iterator[tuple[str, pa.Table]]:
    """Yield the folders of parts in the ledger, and which rows belong into each."""
    for name in pc.unique(parts).to_pylist():
        yield name, rows.filter(pc.equal(parts, name))


def count(entries: pa.Table, num_classes: int) -> pa.Table:
    """Count what a batch of entries holds, as one row.

    `labels` counts rows by the label with the highest log-probability, before any calibration.
    """
    answered = entries.column("logprobs").drop_null().combine_chunks()
    logprobs = answered.flatten().to_numpy().reshape(-1, num_classes)
    labels = np.bincount(logprobs.argmax(axis=1), minlength=num_classes)
    return pa.table(
        {
            "rows": [len(entries)],
            "rejected": [len(entries) - len(answered)],
            "prompt_tokens": [pc.sum(entries.column("prompt_tokens")).as_py()],
            "cached_tokens": [pc.sum(entries.column("cached_tokens")).as_py()],
            "cut_rows": [pc.sum(pc.greater(entries.column("cut_tokens"), 0)).as_py()],
            "labels": [labels.tolist()],
        }
    )
