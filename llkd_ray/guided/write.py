"""Have the teacher write: Ray Data hands prompts to actors, each with an engine or connections.

All samples of a prompt are written down together before anything else is told, so a killed round
asks again about the prompts under way and no others. A sample's seed follows from experiment,
round, label and index: it is the same whoever draws it, and when.
"""

import asyncio
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy

from llkd_ray import schema, storage
from llkd_ray.config import SamplingSection
from llkd_ray.errors import TeacherError
from llkd_ray.guided.prompt import decoding, text_in
from llkd_ray.teacher.actor import Opening
from llkd_ray.teacher.answers import Answer, Continuation
from llkd_ray.teacher.engine import Engine
from llkd_ray.teacher.http import Endpoint
from llkd_ray.teacher.readouts import actor_resources
from llkd_ray.teacher.stream import data_context, tables

# A round of the rest would say little, and stay as it is for ever.
_MOST_ERRORS = 0.5


@dataclass(frozen=True)
class Round:
    """Which round, of which experiment."""

    number: int
    """From 1."""
    seed: int
    """The experiment's."""

    def sample_id(self, label: int, index: int) -> str:
        """Name a text: of the label at this position, the text's number from 0."""
        return f"{self.number:03d}-{label:04d}-{index:05d}"

    def seed_of(self, sample_id: str) -> int:
        """Return the seed of a text's sampling, 31 bits."""
        return int(hashlib.sha256(f"{self.seed} {sample_id}".encode()).hexdigest()[:8], 16) >> 1


def write(
    prompts: pa.Table, folder: Path, *, opening: Opening, sampling: SamplingSection, of: Round
) -> pa.Table:
    """Have every prompt's samples written and read, those that are in the folder aside.

    Needs a connection to Ray.

    Args:
        prompts: schema.PROMPTS.
        folder: For a file of schema.written for each prompt, by its id.
        opening: The teacher.
        sampling: How texts are drawn.
        of: The round.

    Returns:
        What was written (schema.written), in the order of the prompts.

    Raises:
        TeacherError: The teacher cannot write at all, its process died, or more than half of its
            texts came to nothing; these are asked for again next time.
    """
    folder.mkdir(exist_ok=True)
    ids = prompts.column("prompt_id").to_pylist()
    left = [at for at, id_ in enumerate(ids) if not _part(folder, id_).is_file()]
    if left:
        _ask([prompts.slice(at, 1) for at in left], folder.resolve(), opening, sampling, of)
        storage.here(folder)
    columns = schema.written(len(opening.task.labels))
    parts = {id_: pq.read_table(_part(folder, id_), schema=columns) for id_ in ids}
    written = pa.concat_tables(parts.values())
    errors = written.column("error").drop_null()
    if len(errors) > len(written) * _MOST_ERRORS:
        for id_, part in parts.items():
            if part.column("error").null_count < len(part):
                storage.remove(_part(folder, id_))
        [first] = errors.slice(length=1).to_pylist()
        raise TeacherError(
            f"{len(errors)} of {len(written)} texts could not be written, the first one since: "
            f"{first}; mend that and run the same command again, which asks for them anew"
        )
    return written


def _ask(
    prompts: list[pa.Table], folder: Path, opening: Opening, sampling: SamplingSection, of: Round
) -> None:
    data_context()
    actors = opening.teacher.actors
    done = ray.data.from_arrow(prompts).map_batches(
        Writer,
        fn_constructor_args=(opening, sampling, of, folder),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=actors.min,
            max_size=actors.max,
            max_concurrent_calls_per_actor=actors.batches_in_flight,
            max_tasks_in_flight_per_actor=2 * actors.batches_in_flight,
        ),
        **actor_resources(opening),
    )
    try:
        for _ in tables(done):
            pass
    except TeacherError as error:
        raise TeacherError(
            f"{error}; what is written is kept: run the same command again to go on"
        ) from None


class Writer:
    """A Ray Data actor with a teacher that writes texts, and then reads their labels."""

    def __init__(
        self, opening: Opening, sampling: SamplingSection, of: Round, folder: Path
    ) -> None:
        author = opening.start()
        assert isinstance(author, (Engine, Endpoint)), "no script writes"
        self._author = author
        self._task = opening.task
        self._form, self._decoding = sampling.form, decoding(sampling)
        self._round = of
        self._folder = folder

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """Write the samples of one prompt and return its id."""
        prompt = batch.to_pylist()[0]
        label = self._task.label_names.index(prompt["label"])
        ids = [
            self._round.sample_id(label, prompt["first"] + index)
            for index in range(prompt["samples"])
        ]
        # The first sample leaves the prompt in the cache for the others.
        samples = [await self._write(prompt["text"], ids[0])]
        samples += await asyncio.gather(*(self._write(prompt["text"], id_) for id_ in ids[1:]))
        texts = [text_in(sample.text, self._task, self._form) for sample in samples]
        readable = [at for at, text in enumerate(texts) if text]
        answers: dict[int, Answer] = {}
        if readable:
            read = await self._author.read([texts[at] for at in readable])
            answers = dict(zip(readable, read, strict=True))
        rows = [
            self._row(prompt, id_, texts[at], sample, answers.get(at))
            for at, (id_, sample) in enumerate(zip(ids, samples, strict=True))
        ]
        await asyncio.to_thread(self._keep, prompt["prompt_id"], rows)
        return batch.select(["prompt_id"])

    async def close(self) -> None:
        """Let go of processes and connections."""
        await self._author.close()

    async def _write(self, prompt: str, sample_id: str) -> Continuation:
        seed = self._round.seed_of(sample_id)
        return await self._author.write(prompt, **self._decoding, seed=seed)

    def _row(
        self,
        prompt: dict[str, Any],
        sample_id: str,
        text: str,
        sample: Continuation,
        answer: Answer | None,
    ) -> dict[str, Any]:
        return {
            "sample_id": sample_id,
            "prompt_id": prompt["prompt_id"],
            "label": prompt["label"],
            "seed": self._round.seed_of(sample_id),
            "text": text,
            "finished": sample.finished,
            "tokens": sample.tokens,
            "prompt_tokens": sample.prompt_tokens,
            "cached_tokens": sample.cached_tokens,
            "logprobs": answer.logprobs if answer else None,
            "readout_tokens": answer.prompt_tokens if answer else 0,
            "readout_cached_tokens": answer.cached_tokens if answer else 0,
            "error": sample.error or (answer.error if answer else None),
        }

    def _keep(self, prompt_id: str, rows: list[dict[str, Any]]) -> None:
        path = _part(self._folder, prompt_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        columns = schema.written(len(self._task.labels))
        pq.write_table(pa.Table.from_pylist(rows, columns), beside)
        os.replace(beside, path)
        storage.put(path)


def _part(folder: Path, prompt_id: str) -> Path:
    return folder / f"{prompt_id}.parquet"
