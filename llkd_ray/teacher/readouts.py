"""Run the teacher over the corpus, once: Ray Data streams shards through vLLM actors.

Each answered batch is at once written as a part beside its shard, so what is answered stays
answered whatever is killed. A run that goes on reads which rows the parts hold and asks for the
others only. When every row has its answer, the parts of a shard become one file, checked row by
row against the corpus.
"""

import functools
import hashlib
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from llkd_ray import schema
from llkd_ray.config import TaskSection, TeacherSection
from llkd_ray.corpus import read_shards
from llkd_ray.errors import TooManyRejectedError
from llkd_ray.progress import progress
from llkd_ray.teacher.engine import engine_arguments, engine_environment, sampling_arguments
from llkd_ray.teacher.engine_stage import CountingEngine
from llkd_ray.teacher.prompt import Prompt
from llkd_ray.teacher.verbalizer import label_token_ids

_log = logging.getLogger(__name__)

# A reader or writer needs little; with whole CPUs a pool of teachers could starve them.
_TASK_CPUS = 0.25


@dataclass(frozen=True)
class Shard:
    """A shard of the corpus and where its read-outs go."""

    corpus: str
    readouts: str
    """Without suffix: PATH/ holds the parts, PATH.parquet is the sealed shard."""
    take: int
    """Rows to label, from the first."""

    @property
    def sealed(self) -> Path:
        """The finished shard."""
        return Path(f"{self.readouts}.parquet")


@dataclass(frozen=True)
class Answered:
    """What a call of `read_out` did, and what the sealed shards hold."""

    taken: int
    """Rows that were up for labelling."""
    rejected: int
    """Of these, rows without an answer."""
    answered_now: int
    """Rows answered by this call."""
    rows_per_s: float
    """Rate of this call between its first and its last batch; 0 when it had nothing to ask."""
    prompt_tokens: int
    cached_tokens: int
    duplicates: int


def plan(corpus: Path, folder: Path, teacher: TeacherSection) -> list[Shard]:
    """List the shards to label, with the label budget spread over the first of them."""
    shards = []
    for split in teacher.splits:
        left = teacher.max_unlabeled_rows if split == "unlabeled" else None
        for path in read_shards(corpus / split):
            rows = pq.read_metadata(path).num_rows
            take = rows if left is None else min(left, rows)
            left = None if left is None else left - take
            if take:
                shards.append(Shard(str(path), str(folder / split / path.stem), take))
    return shards


def read_out(
    corpus: Path, folder: Path, task: TaskSection, teacher: TeacherSection, model: Path
) -> Answered:
    """Ask the teacher about every row that has no answer yet, then seal the shards.

    Args:
        corpus: The corpus artifact's folder.
        folder: The read-outs' unfinished folder; what it holds already is kept.
        task: Labels, examples and wording.
        teacher: Engine and actors.
        model: Folder of the teacher's weights.

    Reads:
        `SPLIT/shard-*.parquet` (schema.TEXT).

    Writes:
        `SPLIT/shard-*.parquet` (schema.readouts), one row per row asked about, in the corpus's
        order, and `rejected.parquet`.

    Raises:
        TeacherError: The labels or the prompt do not suit the teacher's tokenizer.
        TooManyRejectedError: More than `max_rejected_fraction` of the rows got no answer.
    """
    tokenizer = _tokenizer(str(model))
    token_ids = label_token_ids(tokenizer, task)
    Prompt.of(task).token_ids(tokenizer, "a text", teacher.engine.max_model_len - 1)
    shards = plan(corpus, folder, teacher)
    for shard in shards:
        Path(shard.readouts).mkdir(parents=True, exist_ok=True)
    open_shards = [shard for shard in shards if not shard.sealed.is_file()]
    taken = sum(shard.take for shard in shards)
    done = taken - sum(len(_pending(shard)) for shard in open_shards)
    answered, rows_per_s = 0, 0.0
    if done < taken:
        parts = _answers(open_shards, task, teacher, model, token_ids)
        answered, rows_per_s = _follow(parts, taken, done)
    counts = Counter[str]()
    for shard in shards:
        counts.update(_seal(shard, len(token_ids)))
    rejected = _write_rejected(shards, folder / "rejected.parquet")
    if rejected > teacher.max_rejected_fraction * taken:
        raise TooManyRejectedError(
            f"the teacher gave no answer for {rejected} of {taken} rows, more than "
            f"teacher.max_rejected_fraction = {teacher.max_rejected_fraction}; the reasons are in "
            f"{folder / 'rejected.parquet'}"
        )
    for shard in shards:
        shutil.rmtree(shard.readouts, ignore_errors=True)
    return Answered(
        taken=taken,
        rejected=rejected,
        answered_now=answered,
        rows_per_s=rows_per_s,
        prompt_tokens=counts["prompt_tokens"],
        cached_tokens=counts["cached_tokens"],
        duplicates=counts["duplicates"],
    )


def _answers(
    shards: list[Shard],
    task: TaskSection,
    teacher: TeacherSection,
    model: Path,
    token_ids: list[int],
) -> Any:
    """Put the streaming pipeline together; its rows are counts of written parts."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    actors = teacher.actors
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=str(model),
            engine_kwargs=engine_arguments(teacher.engine),
            batch_size=teacher.batch_size,
            concurrency=(actors.min, actors.max),
            placement_group_config={
                "bundles": [_bundle(teacher)] * teacher.engine.tensor_parallel_size
            },
            runtime_env={"env_vars": engine_environment(teacher.engine, actors.threads)},
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
            should_continue_on_error=True,
            log_engine_metrics=False,
        ),
        preprocess=functools.partial(
            _ask,
            prompt=Prompt.of(task),
            model=str(model),
            max_tokens=teacher.engine.max_model_len - 1,
            sampling=sampling_arguments(token_ids),
        ),
        postprocess=functools.partial(_answer, token_ids=token_ids),
        preprocess_map_kwargs={"num_cpus": _TASK_CPUS},
        postprocess_map_kwargs={"num_cpus": _TASK_CPUS},
    )
    # A copy, since assigning to the stage would run its validators again, and the second time they
    # find no placement group and ask for a GPU.
    stage = processor.get_stage_by_name("vLLMEngineStage")
    processor.stages["vLLMEngineStage"] = stage.model_copy(update={"fn": CountingEngine})
    rows = ray.data.from_items(
        [asdict(shard) for shard in shards], override_num_blocks=len(shards)
    ).map_batches(_read_pending, batch_size=1, batch_format="numpy", num_cpus=_TASK_CPUS)
    batches = rows.repartition(target_num_rows_per_block=teacher.batch_size)
    return processor(batches).map_batches(
        functools.partial(_write_parts, num_classes=len(token_ids)),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=_TASK_CPUS,
    )


def _bundle(teacher: TeacherSection) -> dict[str, float]:
    bundle = {"CPU": teacher.actors.num_cpus}
    if teacher.actors.num_gpus:
        bundle["GPU"] = teacher.actors.num_gpus
    return bundle


def _follow(parts: Any, taken: int, done: int) -> tuple[int, float]:
    """Run the pipeline and show its progress; return rows answered and rows per second."""
    answered = first_batch = 0
    first = last = 0.0
    with progress("label", "rows", taken, done) as bar:
        for batch in parts.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            rows = int(batch["rows"].sum())
            last = time.perf_counter()
            if not answered:
                first, first_batch = last, rows
            answered += rows
            bar.update(rows)
    # The first batch ends the start-up of the engine; the rate is of what came after it.
    return answered, (answered - first_batch) / (last - first) if last > first else 0.0


@functools.cache
def _tokenizer(model: str) -> Any:
    """Load the teacher's tokenizer, once per process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def _pending(shard: Shard) -> pa.Table:
    """Return the rows of a shard that no part answers yet."""
    rows = pq.read_table(shard.corpus, columns=["row_id", "text"]).slice(0, shard.take)
    done = [
        pq.read_table(part, columns=["row_id"]).column("row_id")
        for part in Path(shard.readouts).glob("*.parquet")
    ]
    if not done:
        return rows
    answered = pa.chunked_array([chunk for column in done for chunk in column.chunks], pa.string())
    return rows.filter(pc.invert(pc.is_in(rows.column("row_id"), value_set=answered)))


def _read_pending(batch: dict[str, Any]) -> Iterator[pa.Table]:
    for corpus, readouts, take in zip(
        batch["corpus"], batch["readouts"], batch["take"], strict=True
    ):
        shard = Shard(str(corpus), str(readouts), int(take))
        rows = _pending(shard)
        yield rows.append_column("part_of", pa.array([shard.readouts] * len(rows), pa.string()))


def _ask(
    row: dict[str, Any], *, prompt: Prompt, model: str, max_tokens: int, sampling: dict[str, Any]
) -> dict[str, Any]:
    return {
        "tokenized_prompt": prompt.token_ids(_tokenizer(model), row["text"], max_tokens),
        "sampling_params": sampling,
    }


def _answer(row: dict[str, Any], *, token_ids: list[int]) -> dict[str, Any]:
    """Take from the engine's output what is stored, as flat columns."""
    logprobs = row["logprobs"][0]
    return {
        "row_id": row["row_id"],
        "part_of": row["part_of"],
        "logprobs": [logprobs[token]["logprob"] for token in token_ids],
        "prompt_tokens": row["num_input_tokens"],
        "cached_tokens": row["metrics"]["num_cached_tokens"],
    }


def _write_parts(table: pa.Table, *, num_classes: int) -> pa.Table:
    """Write a block of answers beside its shards and return how many there were.

    A part is named by its rows, so that a task which Ray runs again writes the same file again.
    """
    columns = schema.readouts(num_classes)
    for readouts in pc.unique(table.column("part_of")).to_pylist():
        rows = table.filter(pc.equal(table.column("part_of"), readouts))
        records = [
            {**row, "prompt_tokens": 0, "cached_tokens": 0, "logprobs": None, "error": error}
            if (error := row.get("__inference_error__"))
            else row
            for row in rows.to_pylist()
        ]
        part = pa.Table.from_pylist(records, columns)
        digest = hashlib.sha256("".join(part.column("row_id").to_pylist()).encode())
        path = Path(readouts) / f"{digest.hexdigest()[:16]}.parquet"
        beside = path.with_suffix(f".{os.getpid()}")
        pq.write_table(part, beside)
        os.replace(beside, path)
    return pa.table({"rows": [len(table)]})


def _seal(shard: Shard, num_classes: int) -> Counter[str]:
    """Join the parts of a shard in the corpus's order, prove that no row is lost, count tokens."""
    if not shard.sealed.is_file():
        asked = pq.read_table(shard.corpus, columns=["row_id"]).slice(0, shard.take)
        parts = [pq.read_table(part) for part in sorted(Path(shard.readouts).glob("*.parquet"))]
        answers = pa.concat_tables(parts) if parts else schema.readouts(num_classes).empty_table()
        # A block that Ray ran again with other neighbours can answer a row a second time; the
        # read-out is deterministic, so the first found stands.
        found = pc.index_in(asked.column("row_id"), value_set=answers.column("row_id"))
        assert found.null_count == 0, f"{shard.corpus}: {found.null_count} rows have no answer"
        sealed = answers.take(found)
        beside = shard.sealed.with_suffix(".making")
        pq.write_table(sealed, beside)
        os.replace(beside, shard.sealed)
    sealed = pq.read_table(shard.sealed)
    distinct = pc.count_distinct(sealed.column("row_id")).as_py()
    return Counter(
        prompt_tokens=pc.sum(sealed.column("prompt_tokens")).as_py(),
        cached_tokens=pc.sum(sealed.column("cached_tokens")).as_py(),
        duplicates=len(sealed) - distinct,
    )


def _write_rejected(shards: list[Shard], path: Path) -> int:
    """Gather the rows without an answer; return how many."""
    count = 0
    with pq.ParquetWriter(path, schema.REJECTED) as writer:
        for shard in shards:
            failed = pq.read_table(shard.sealed, columns=["row_id", "error"])
            failed = failed.filter(pc.is_valid(failed.column("error")))
            count += len(failed)
            nothing = pa.nulls(len(failed), pa.string())
            writer.write_table(
                pa.Table.from_arrays([*failed.columns, nothing], schema=schema.REJECTED)
            )
    return count
