"""Run the teacher over the corpus, once: Ray Data streams rows through a pool of teacher actors.

Readers hand on the rows of each shard that the ledger has no answer for; actors answer them and
write the ledger. When every row has its answer, each shard's answers are put beside it in the
corpus's order, checked row by row.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy

from llkd_ray import schema, storage
from llkd_ray.artifacts import hand_over
from llkd_ray.cluster import TASK_CPUS, each
from llkd_ray.config import VLLMTeacher
from llkd_ray.corpus import read_shards, row_id
from llkd_ray.errors import TooManyRejectedError
from llkd_ray.teacher.actor import Opening, TeacherActor
from llkd_ray.teacher.answers import CONTENT_FREE
from llkd_ray.teacher.engine import engine_environment
from llkd_ray.teacher.ledger import Ledger, range_name
from llkd_ray.teacher.stream import data_context, tables
from llkd_ray.teacher.tally import Tally

CONTENT_FREE_FILE = "content_free.parquet"
# Ray Data keeps about 5 KB for each block in the driver until a dataset is done. So the larger the
# corpus, the more batches are in a block, and a corpus larger than that is asked about in several
# datasets, between which the teachers start anew. Hundreds of teachers want thousands of blocks, or
# most of them wait for the last ones; a block of 128 batches of 64 short texts is a few megabytes.
_BLOCKS = 8_000
_BATCHES_PER_BLOCK = 128
# Of these, Ray Data hands so many to an asynchronous actor at once.
_BATCHES_AT_ONCE = 4


@dataclass(frozen=True)
class Shard:
    """A shard of texts and where its answers go."""

    texts: str
    """A file with row_id and text, sorted by row_id."""
    sealed: str
    """The file that holds its answers when all are there."""
    take: int
    """Rows to label, from the first."""

    def row_ids(self) -> pa.Array:
        """Return the ids to label, sorted [N]."""
        texts = storage.here(Path(self.texts))
        ids = pq.read_table(texts, columns=["row_id"]).column("row_id")
        return ids.slice(0, self.take).combine_chunks()


@dataclass(frozen=True)
class Answered:
    """What a call of `read_out` did, and what the sealed shards hold."""

    taken: int
    """Rows that were up for labelling."""
    rejected: int
    """Of these, rows without an answer."""
    answered_now: int
    """Rows that this call asked the teacher about."""
    rows_per_s: float
    """Rate of this call between its first and its last batch; 0 when it had nothing to ask."""
    tokens_per_s: float
    """Uncached prompt tokens computed in that time, by all actors."""
    actors: int
    """Teachers that answered."""
    prompt_tokens: int
    cached_tokens: int
    cut_rows: int
    """Rows whose text was cut to fit."""
    duplicates: int
    """Rows that stand twice among the answers: 0, or something is broken."""
    cost_usd: float
    """Of this call's asking, by the prices of the experiment."""


def plan(corpus: Path, folder: Path, splits: tuple[str, ...], max_rows: int | None) -> list[Shard]:
    """List the shards to label, with the label budget spread over the first of them."""
    shards = []
    for split in splits:
        left = max_rows if split == "unlabeled" else None
        for path in read_shards(corpus / split):
            rows = pq.read_metadata(path).num_rows
            take = rows if left is None else min(left, rows)
            left = None if left is None else left - take
            if take:
                shards.append(Shard(str(path), str(folder / split / path.name), take))
    return shards


def read_out(corpus: Path, folder: Path, opening: Opening, ledger: Ledger) -> Answered:
    """Ask the teacher about every row that has no answer yet, then put the answers in order.

    Args:
        corpus: The corpus artifact's folder.
        folder: The read-outs' unfinished folder.
        opening: The teacher.
        ledger: Its answers so far.

    Reads:
        `SPLIT/shard-*.parquet` (schema.TEXT).

    Writes:
        `SPLIT/shard-*.parquet` (schema.readouts), one row per row asked about, in the corpus's
        order; `content_free.parquet`, the answers about texts without content; `rejected.parquet`.

    Raises:
        TeacherError: The teacher cannot answer, or not about these labels.
        TooManyRejectedError: More than `max_rejected_fraction` of the rows got no answer.
    """
    teacher = opening.teacher
    free = _write_content_free(folder)
    shards = plan(corpus, folder, teacher.splits, teacher.max_unlabeled_rows)
    taken = sum(shard.take for shard in shards)
    tally = Tally(opening, taken)
    with ledger.only_writer():
        _compact(ledger)
        for _ in range(teacher.attempts):
            todo = list(_unanswered([free, *shards], ledger, teacher.attempts))
            if not todo:
                break
            with tally.shown(sum(rows for _, rows in todo)):
                for window in _windows(todo, _BLOCKS * _BATCHES_PER_BLOCK * teacher.batch_size):
                    _ask(window, opening, ledger, tally)
                    _compact(ledger)
        _compact(ledger)
    _seal(free, ledger)
    counts = Counter[str]()
    for sealed in each(functools.partial(_seal, ledger=ledger), shards):
        counts.update(sealed)
    storage.here(folder)
    rejected = _write_rejected(shards, folder / "rejected.parquet")
    if rejected.total() > teacher.max_rejected_fraction * taken:
        reasons = "; ".join(f"{reason} ({rows})" for reason, rows in rejected.most_common(3))
        raise TooManyRejectedError(
            f"the teacher gave no answer for {rejected.total()} of {taken} rows, more than "
            f"teacher.max_rejected_fraction = {teacher.max_rejected_fraction}: {reasons}; ask "
            f"about these rows again with teacher.attempts={teacher.attempts + 1}, or see "
            f"{folder / 'rejected.parquet'}"
        )
    return Answered(
        taken=taken,
        rejected=rejected.total(),
        answered_now=tally.rows,
        rows_per_s=tally.rows_per_s,
        tokens_per_s=tally.tokens_per_s,
        actors=tally.actors,
        prompt_tokens=counts["prompt_tokens"],
        cached_tokens=counts["cached_tokens"],
        cut_rows=counts["cut_rows"],
        duplicates=counts["duplicates"],
        cost_usd=tally.cost_usd,
    )


def _windows(todo: Iterable[tuple[Shard, int]], max_rows: int) -> Iterator[list[tuple[Shard, int]]]:
    """Cut shards with their rows to ask about into runs of so many rows, a shard at least."""
    window: list[tuple[Shard, int]] = []
    rows_of_window = 0
    for shard, rows in todo:
        if window and rows_of_window + rows > max_rows:
            yield window
            window, rows_of_window = [], 0
        window.append((shard, rows))
        rows_of_window += rows
    if window:
        yield window


def _ask(window: list[tuple[Shard, int]], opening: Opening, ledger: Ledger, tally: Tally) -> None:
    """Stream the unanswered rows of shards through the teacher actors."""
    # A thread for each task, on the cores that the teacher could use; nobody reads what it finds.
    data_context().memory_usage_poll_interval_s = None
    teacher = opening.teacher
    actors = teacher.actors
    shards = [asdict(shard) for shard, _ in window]
    rows_to_ask = sum(rows for _, rows in window)
    batches_per_block = math.ceil(rows_to_ask / (_BLOCKS * teacher.batch_size))
    # Two calls at least, so that a block which comes to its end leaves no gap.
    in_flight = actors.batches_in_flight
    calls = max(math.ceil(in_flight / min(batches_per_block, _BATCHES_AT_ONCE)), min(in_flight, 2))
    rows = (
        ray.data.from_items(shards, override_num_blocks=len(shards))
        .map_batches(
            functools.partial(
                _read_unanswered,
                ledger=ledger,
                attempts=teacher.attempts,
                batch_size=teacher.batch_size,
            ),
            batch_size=1,
            batch_format="numpy",
            num_cpus=TASK_CPUS,
        )
        .repartition(target_num_rows_per_block=batches_per_block * teacher.batch_size)
    )
    # Ray Data 2.60 gives a repartition a whole CPU and has no argument to change that: teachers
    # that hold nearly all would wait for it forever. With the reader's share both are one operator.
    rows._logical_plan.dag.ray_remote_args["num_cpus"] = TASK_CPUS  # type: ignore[attr-defined]
    counts = rows.map_batches(
        TeacherActor,
        fn_constructor_args=(opening, ledger),
        batch_size=teacher.batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=actors.min,
            max_size=actors.max,
            max_concurrent_calls_per_actor=calls,
            max_tasks_in_flight_per_actor=2 * calls,
        ),
        **actor_resources(opening),
    )
    for batch in tables(counts):
        tally.add(batch)


def _compact(ledger: Ledger) -> None:
    """Join the parts that nobody writes to any more; a window leaves one for each batch."""
    for _ in each(ledger.compact, ledger.open_folders()):
        pass


def actor_resources(opening: Opening) -> dict[str, Any]:
    """Return what Ray sets aside and sets up for an actor with a teacher."""
    teacher = opening.teacher
    resources: dict[str, Any] = {
        "num_cpus": teacher.actors.num_cpus,
        "num_gpus": opening.num_gpus or None,
    }
    if isinstance(teacher, VLLMTeacher):
        environment = engine_environment(teacher.engine, teacher.actors.threads)
        resources["runtime_env"] = {"env_vars": environment}
    return resources


def _unanswered(shards: list[Shard], ledger: Ledger, attempts: int) -> Iterator[tuple[Shard, int]]:
    """Yield the shards with rows to ask about, and how many these are."""
    count = functools.partial(count_unanswered, ledger=ledger, attempts=attempts)
    for shard, rows in zip(shards, each(count, shards), strict=True):
        if rows:
            yield shard, rows


def count_unanswered(shard: Shard, ledger: Ledger, attempts: int) -> int:
    """Count the rows of a shard that are still to be asked about."""
    ids = shard.row_ids()
    return len(ids) - len(_settled(ledger.find(ids), attempts))


def _settled(entries: pa.Table, attempts: int) -> pa.Table:
    """Leave out the entries of rows that failed and may be asked about again."""
    answered = pc.is_null(entries.column("error"))
    spent = pc.greater_equal(entries.column("attempt"), attempts)
    return entries.filter(pc.or_(answered, spent))


def _read_unanswered(
    batch: dict[str, Any], *, ledger: Ledger, attempts: int, batch_size: int
) -> Iterator[pa.Table]:
    """Yield the unanswered rows of shards; memory is bounded by a few batches and a shard's ids.

    What is written meanwhile is not looked at: Ray runs a reader again whose node is lost, takes
    up its blocks by number where the first one stopped, and so they have to be the same ones. The
    actor passes over the batches that are written.
    """
    for values in zip(batch["texts"], batch["sealed"], batch["take"], strict=True):
        shard = Shard(str(values[0]), str(values[1]), int(values[2]))
        ids = shard.row_ids()
        parts = range_name(ids[0].as_py(), ids[-1].as_py())
        entries = ledger.find(ids, parts=False)
        settled = _settled(entries, attempts).column("row_id").combine_chunks()
        failed = entries.column("row_id").combine_chunks()
        left = shard.take
        with pq.ParquetFile(shard.texts) as file:
            for texts in file.iter_batches(batch_size, columns=["row_id", "text"]):
                rows = pa.Table.from_batches([texts.slice(0, left)])
                left -= len(rows)
                rows = rows.filter(pc.invert(pc.is_in(rows.column("row_id"), value_set=settled)))
                if not rows:
                    continue
                where = pc.index_in(rows.column("row_id"), value_set=failed)
                before = pc.fill_null(entries.column("attempt").take(where), 0)
                yield rows.append_column(
                    "attempt", pc.add(before, 1).cast(pa.int32())
                ).append_column("parts", pa.array([parts] * len(rows), pa.string()))


def _write_content_free(folder: Path) -> Shard:
    """Write the texts without content as a shard of their own."""
    texts = folder / ".content_free_texts.parquet"
    rows = [
        {"row_id": id_, "text": text} for id_, text in sorted((row_id(t), t) for t in CONTENT_FREE)
    ]
    pq.write_table(pa.Table.from_pylist(rows), texts)
    storage.put(texts)
    return Shard(str(texts), str(folder / CONTENT_FREE_FILE), len(rows))


def _seal(shard: Shard, ledger: Ledger) -> Counter[str]:
    """Write a shard's answers in the corpus's order, prove that no row is lost, count."""
    asked = shard.row_ids()
    entries = ledger.find(asked)
    ids = entries.column("row_id").combine_chunks()
    assert ids.equals(asked), f"{shard.texts}: {len(asked)} rows, {len(ids)} of them answered"
    answers = entries.select(schema.readouts(ledger.num_classes).names)
    beside = Path(f"{shard.sealed}.making")
    beside.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(answers, beside)
    beside.replace(shard.sealed)
    hand_over(Path(shard.sealed))
    sealed = pq.read_table(shard.sealed)
    return Counter(
        prompt_tokens=pc.sum(sealed.column("prompt_tokens")).as_py(),
        cached_tokens=pc.sum(sealed.column("cached_tokens")).as_py(),
        cut_rows=pc.sum(pc.greater(sealed.column("cut_tokens"), 0)).as_py(),
        duplicates=len(sealed) - pc.count_distinct(sealed.column("row_id")).as_py(),
    )


def _write_rejected(shards: list[Shard], path: Path) -> Counter[str]:
    """Gather the rows without an answer; return how often each reason was given."""
    reasons = Counter[str]()
    with pq.ParquetWriter(path, schema.REJECTED) as writer:
        for shard in shards:
            failed = pq.read_table(shard.sealed, columns=["row_id", "error"])
            failed = failed.filter(pc.is_valid(failed.column("error")))
            reasons.update(failed.column("error").to_pylist())
            nothing = pa.nulls(len(failed), pa.string())
            writer.write_table(
                pa.Table.from_arrays([*failed.columns, nothing], schema=schema.REJECTED)
            )
    return reasons
