"""From any source to a corpus: distinct texts with stable ids, split by hash.

A row's id and its split follow from its text alone: the same text always lands in the same split,
whatever else the source holds and in whichever order.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray import embedded, schema, sources, storage
from llkd_ray.artifacts import Rows
from llkd_ray.config import CorpusSection, Example, TaskSection
from llkd_ray.errors import CorpusError, TooManyRejectedError
from llkd_ray.progress import progress

SPLITS = ("unlabeled", "validation", "test")

# Sources are spilled into buckets of about this size, each de-duplicated in memory by itself.
_BUCKET_BYTES = 64_000_000
_MAX_BUCKETS = 256
_SPILL_ROWS = 2048
_SPILL_CHARS = 64_000_000
_SHOWN_CHARS = 200
_MOST_REASONS = 1000
_SPILL = pa.schema([*schema.TEXT, pa.field("where", pa.string())])


def row_id(text: str) -> str:
    """Return the 32 hexadecimal digits that name a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` counted. Every row read is in exactly one of these numbers."""

    splits: dict[str, int]
    rejected: int
    duplicates: int
    """Rows with the text of a row before."""
    examples: int
    """Distinct texts left out because the teacher's prompt shows them."""
    read: int

    @property
    def rows(self) -> Rows:
        """The stage's count: rows that were up for use."""
        kept = sum(self.splits.values())
        return Rows(taken=kept + self.rejected, kept=kept, rejected=self.rejected)


def prepare(config: CorpusSection, task: TaskSection, folder: Path) -> Prepared:
    """Read the source once, keep bad rows aside, drop duplicates, split, write shards.

    Writes:
        `SPLIT/shard-*.parquet` (schema.TEXT) and `rejected.parquet` (schema.REJECTED), in which an
        unreadable file counts as one row. Memory is bounded by a shard, or by the distinct texts
        of a bucket where these are larger: about 64 MB of the source, or a 256th of one of more
        than 16 GB.

    Raises:
        CorpusError: The source is missing, empty, unreadable or lacks a column, or leaves nothing
            to label.
        TooManyRejectedError: More than `max_rejected_fraction` of the rows were kept aside.
    """
    shown = _shown(task) | {row_id(example.text) for example in example_pool(config, task)}
    aside = _Aside(folder / "rejected.parquet")
    spill = folder / ".spill"
    spill.mkdir()
    buckets = min(_MAX_BUCKETS, sources.size_bytes(config) // _BUCKET_BYTES + 1)
    read = _spill(config, task, spill, buckets, aside)
    if read == 0:
        raise CorpusError(f"corpus.source = {config.source!r}: there are no rows")
    writers = {split: _ShardWriter(folder / split, config.shard_rows) for split in SPLITS}
    duplicates = examples = 0
    for bucket in range(buckets):
        path = spill / f"{bucket}.arrow"
        distinct = _distinct(path)
        _set_aside_contradictions(path, distinct, aside)
        for id_, found in sorted(distinct.items()):
            if len(found.golds) > 1:
                continue
            duplicates += found.copies - 1
            if id_ in shown:
                examples += 1
                continue
            gold = next(iter(found.golds), None)
            split = _split(id_, gold, config)
            writers[split].add({"row_id": id_, "text": found.text, "gold": gold})
        path.unlink()
    spill.rmdir()
    for writer in writers.values():
        writer.close()
    aside.close()
    prepared = Prepared(
        splits={split: writer.rows for split, writer in writers.items()},
        rejected=aside.rows,
        duplicates=duplicates,
        examples=examples,
        read=read,
    )
    accounted = prepared.rows.taken + duplicates + examples
    assert accounted == read, f"{read} rows read, {accounted} accounted for"
    if aside.rows > config.max_rejected_fraction * read:
        raise TooManyRejectedError(
            f"corpus.source = {config.source!r}: {aside.rows} of {read} rows are unusable, more "
            f"than corpus.max_rejected_fraction = {config.max_rejected_fraction}: "
            f"{aside.commonest()}"
        )
    if prepared.splits["unlabeled"] == 0:
        raise CorpusError(
            f"corpus.source = {config.source!r}: no row is left to label; "
            + (
                f"{examples} of {read} are examples that the teacher is shown: lower "
                "task.max_examples, or name other rows in task.examples_source"
                if examples
                else "lower corpus.validation_fraction and corpus.test_fraction"
            )
        )
    return prepared


def example_pool(config: CorpusSection, task: TaskSection) -> tuple[Example, ...]:
    """Return gold rows that the teacher may be shown beside task.examples.

    They are the `max_examples` distinct texts of `task.examples_source` with the smallest row_id,
    which is a hash and so a fair choice, in its order. Unusable rows and rows without a known gold
    are passed over, and of the chosen texts those whose rows disagree on gold. Memory is bounded by
    `max_examples`.

    Raises:
        CorpusError: The source is missing or unreadable, or no row of it can be an example.
    """
    source = task.examples_source
    if source is None:
        return ()
    if config.gold_column is None and source not in embedded.CORPORA:
        raise CorpusError(
            f"task.examples_source = {source!r}: examples need gold; set corpus.gold_column"
        )
    names = _gold_names(task)
    fixed = _shown(task)
    chosen: dict[str, _Distinct] = {}
    largest: list[int] = []  # The ids of `chosen`, negated: a heap gives up its smallest.
    for row in sources.read(config, source):
        usable = _usable(row, names, config.max_text_chars)
        if isinstance(usable, sources.Unreadable) or usable.gold is None:
            continue
        id_ = row_id(usable.text)
        if id_ not in chosen:
            if id_ in fixed:
                continue
            heapq.heappush(largest, -int(id_, 16))
            chosen[id_] = _Distinct(usable.text)
            if len(chosen) > task.max_examples:
                del chosen[f"{-heapq.heappop(largest):032x}"]
        if id_ in chosen:
            chosen[id_].golds.add(usable.gold)
    pool = tuple(
        Example(text=found.text, label=found.golds.pop())
        for _, found in sorted(chosen.items())
        if len(found.golds) == 1
    )
    if not pool:
        raise CorpusError(
            f"task.examples_source = {source!r}: no row beside task.examples has both a usable "
            "text and a gold value of task.labels; look at corpus.gold_column"
        )
    return pool


def _shown(task: TaskSection) -> set[str]:
    """Return the ids of task.examples, as their texts would stand in a corpus."""
    return {row_id(example.text.strip()) for example in task.examples}


def read_shards(folder: Path) -> list[Path]:
    """Return the shards of a split in order; none when the split is empty."""
    return sorted(storage.here(folder).glob("shard-*.parquet"))


def _split(id_: str, gold: str | None, config: CorpusSection) -> str:
    """Place a row by the last digits of its id; what has no gold can only be labelled."""
    # The first digits order the rows within a split, so the last ones must decide the split.
    position = int(id_[-8:], 16) / 16**8
    if gold is None or position >= config.validation_fraction + config.test_fraction:
        return "unlabeled"
    return "validation" if position < config.validation_fraction else "test"


def _spill(
    config: CorpusSection, task: TaskSection, spill: Path, buckets: int, aside: "_Aside"
) -> int:
    """Check every row and write it into the bucket of its id; return the rows read."""
    names = _gold_names(task)
    writers = [pa.ipc.new_stream(spill / f"{bucket}.arrow", _SPILL) for bucket in range(buckets)]
    waiting: list[list[dict[str, str | None]]] = [[] for _ in range(buckets)]

    def flush(bucket: int) -> None:
        writers[bucket].write_batch(pa.RecordBatch.from_pylist(waiting[bucket], _SPILL))
        waiting[bucket].clear()

    read = chars = 0
    bar = progress("prepare", "rows")
    for row in sources.read(config):
        read += 1
        bar.update()
        usable = _usable(row, names, config.max_text_chars)
        if isinstance(usable, sources.Unreadable):
            aside.add(row.where, usable.reason, usable.content)
            continue
        id_ = row_id(usable.text)
        bucket = int(id_[:8], 16) * buckets >> 32
        waiting[bucket].append(
            {"row_id": id_, "text": usable.text, "gold": usable.gold, "where": row.where}
        )
        chars += len(usable.text)
        if len(waiting[bucket]) == _SPILL_ROWS:
            flush(bucket)
        if chars > _SPILL_CHARS:
            for each in range(buckets):
                flush(each)
            chars = 0
    bar.close()
    for bucket in range(buckets):
        flush(bucket)
        writers[bucket].close()
    return read


@dataclass(frozen=True)
class _Usable:
    """A row that can be labelled."""

    text: str
    gold: str | None
    """A label's name."""


def _gold_names(task: TaskSection) -> dict[str, str]:
    """Return the label's name for each value that a gold column may hold."""
    return {value: label.name for label in task.labels for value in label.gold or (label.name,)}


def _usable(
    row: sources.SourceRow, names: dict[str, str], max_chars: int
) -> _Usable | sources.Unreadable:
    """Take a row as it was found for a text with gold, or say why it is none."""
    if isinstance(row.text, sources.Unreadable):
        return row.text
    text = row.text.strip() if isinstance(row.text, str) else row.text
    # A CSV has no other way to say that there is none.
    gold = None if row.gold is None or row.gold == "" else str(row.gold)
    problem = _problem(text, max_chars)
    if problem is None and gold is not None and gold not in names:
        problem = f"gold value {gold[:40]!r} is not among task.labels"
    if problem is not None:
        return sources.Unreadable(problem, str(row.text)[:_SHOWN_CHARS])
    assert isinstance(text, str)
    return _Usable(text, None if gold is None else names[gold])


def _problem(text: object, max_chars: int) -> str | None:
    """Say why a value is not a usable text, or None if it is one."""
    match text:
        case None:
            return "the text is null"
        case "":
            return "the text is empty"
        case str() if len(text) > max_chars:
            return f"the text is longer than corpus.max_text_chars = {max_chars}"
        case str():
            try:
                text.encode()
            except UnicodeEncodeError:
                return "the text is not valid Unicode"
            return None
        case _:
            return f"the text is not text but {type(text).__name__}"


@dataclass
class _Distinct:
    """What the rows with one text have in common."""

    text: str
    golds: set[str] = field(default_factory=set)
    """What they say it is, nulls left out; more than one is a contradiction."""
    copies: int = 0


def _distinct(bucket: Path) -> dict[str, _Distinct]:
    """Return a bucket's texts by id, each held once however often it stands there."""
    distinct: dict[str, _Distinct] = {}
    for row in _spilled(bucket):
        found = distinct.get(row["row_id"])
        if found is None:
            found = distinct[row["row_id"]] = _Distinct(row["text"])
        found.copies += 1
        if row["gold"] is not None:
            found.golds.add(row["gold"])
    return distinct


def _set_aside_contradictions(
    bucket: Path, distinct: dict[str, _Distinct], aside: "_Aside"
) -> None:
    """Keep aside every row of a text that has several golds, null ones included."""
    reasons = {
        id_: f"rows with this text disagree on gold: {', '.join(sorted(found.golds))}"
        for id_, found in distinct.items()
        if len(found.golds) > 1
    }
    if reasons:
        for row in _spilled(bucket):
            if row["row_id"] in reasons:
                aside.add(row["where"], reasons[row["row_id"]], row["text"])


def _spilled(bucket: Path) -> Iterator[dict[str, str]]:
    """Yield a bucket's rows in the order of the source."""
    with pa.ipc.open_stream(bucket) as stream:
        for batch in stream:
            yield from batch.to_pylist()


class _ShardWriter:
    """Write rows into numbered shards of a fixed size."""

    def __init__(self, folder: Path, shard_rows: int) -> None:
        folder.mkdir()
        self.rows = 0
        self._folder = folder
        self._shard_rows = shard_rows
        self._waiting: list[dict[str, str | None]] = []

    def add(self, row: dict[str, str | None]) -> None:
        self._waiting.append(row)
        self.rows += 1
        if len(self._waiting) == self._shard_rows:
            self.close()

    def close(self) -> None:
        if self._waiting:
            number = (self.rows - 1) // self._shard_rows
            table = pa.Table.from_pylist(self._waiting, schema.TEXT)
            pq.write_table(table, self._folder / f"shard-{number:05d}.parquet")
            self._waiting.clear()


class _Aside:
    """Keep bad rows with a reason, and count the reasons."""

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self._reasons: Counter[str] = Counter()
        self._writer = pq.ParquetWriter(path, schema.REJECTED)
        self._waiting: list[dict[str, str]] = []

    def add(self, where: str, reason: str, content: str) -> None:
        row = {"where": where, "reason": reason, "content": content[:_SHOWN_CHARS]}
        # What is no valid Unicode is shown by its escapes.
        self._waiting.append(
            {key: text.encode(errors="backslashreplace").decode() for key, text in row.items()}
        )
        # A wrong column has a reason for every row, each with its own value.
        told = reason in self._reasons or len(self._reasons) < _MOST_REASONS
        self._reasons[reason if told else "for other reasons"] += 1
        self.rows += 1
        if len(self._waiting) == _SPILL_ROWS:
            self._flush()

    def commonest(self) -> str:
        return "; ".join(f"{reason} ({count})" for reason, count in self._reasons.most_common(3))

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._waiting, schema.REJECTED))
        self._waiting.clear()
