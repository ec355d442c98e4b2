"""From any source to a corpus: distinct texts with stable ids, split by hash.

A row's id and its split follow from its text alone: the same text always lands in the same split,
whatever else the source holds and in whichever order.
"""

import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray import schema, sources
from llkd_ray.artifacts import Rows
from llkd_ray.config import CorpusSection, TaskSection
from llkd_ray.errors import CorpusError, TooManyRejectedError
from llkd_ray.progress import progress

SPLITS = ("unlabeled", "validation", "test")

# Sources are spilled into buckets of about this size, each de-duplicated in memory by itself.
_BUCKET_BYTES = 64_000_000
_MAX_BUCKETS = 256
_SPILL_ROWS = 2048
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
        `SPLIT/shard-*.parquet` (schema.TEXT) and `rejected.parquet` (schema.REJECTED). Memory is
        bounded by the larger of a bucket and a shard, not by the corpus.

    Raises:
        CorpusError: The source is missing, empty or lacks a column, or leaves nothing to label.
        TooManyRejectedError: More than `max_rejected_fraction` of the rows were kept aside.
    """
    aside = _Aside(folder / "rejected.parquet")
    spill = folder / ".spill"
    spill.mkdir()
    buckets = min(_MAX_BUCKETS, sources.size_bytes(config) // _BUCKET_BYTES + 1)
    read = _spill(config, task, spill, buckets, aside)
    if read == 0:
        raise CorpusError(f"corpus.source = {config.source!r}: there are no rows")
    shown = {row_id(example.text) for example in task.examples}
    writers = {split: _ShardWriter(folder / split, config.shard_rows) for split in SPLITS}
    duplicates = examples = 0
    for bucket in range(buckets):
        texts = _read_bucket(spill / f"{bucket}.arrow")
        for id_, copies in itertools.groupby(texts, key=lambda row: row["row_id"]):
            first, *others = copies
            golds = {row["gold"] for row in (first, *others)} - {None}
            if len(golds) > 1:
                told = ", ".join(sorted(golds))
                for row in (first, *others):
                    aside.add(
                        row["where"], f"rows with this text disagree on gold: {told}", row["text"]
                    )
                continue
            duplicates += len(others)
            if id_ in shown:
                examples += 1
                continue
            gold = golds.pop() if golds else None
            split = _split(id_, gold, config)
            writers[split].add({"row_id": id_, "text": first["text"], "gold": gold})
        (spill / f"{bucket}.arrow").unlink()
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
            f"corpus.source = {config.source!r}: no row is left to label; lower "
            "corpus.validation_fraction and corpus.test_fraction"
        )
    return prepared


def read_shards(folder: Path) -> list[Path]:
    """Return the shards of a split in order; none when the split is empty."""
    return sorted(folder.glob("shard-*.parquet"))


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
    names = {value: label.name for label in task.labels for value in label.gold or (label.name,)}
    writers = [pa.ipc.new_stream(spill / f"{bucket}.arrow", _SPILL) for bucket in range(buckets)]
    waiting: list[list[dict[str, str | None]]] = [[] for _ in range(buckets)]

    def flush(bucket: int) -> None:
        writers[bucket].write_batch(pa.RecordBatch.from_pylist(waiting[bucket], _SPILL))
        waiting[bucket].clear()

    read = 0
    bar = progress("prepare", "rows")
    for row in sources.read(config):
        read += 1
        bar.update()
        text = row.text.strip() if isinstance(row.text, str) else row.text
        gold = None if row.gold is None else str(row.gold)
        problem = _problem(text, config.max_text_chars)
        if problem is None and gold is not None and gold not in names:
            problem = f"gold value {gold[:40]!r} is not among task.labels"
        if problem is not None:
            aside.add(row.where, problem, row.text)
            continue
        assert isinstance(text, str)
        id_ = row_id(text)
        bucket = int(id_[:8], 16) * buckets >> 32
        named = names[gold] if gold is not None else None
        waiting[bucket].append({"row_id": id_, "text": text, "gold": named, "where": row.where})
        if len(waiting[bucket]) == _SPILL_ROWS:
            flush(bucket)
    bar.close()
    for bucket in range(buckets):
        flush(bucket)
        writers[bucket].close()
    return read


def _problem(text: object, max_chars: int) -> str | None:
    """Say why a value is not a usable text, or None if it is one."""
    match text:
        case None:
            return "the text is null"
        case sources.Unreadable(reason=reason):
            return reason
        case "":
            return "the text is empty"
        case str() if len(text) > max_chars:
            return f"the text is longer than corpus.max_text_chars = {max_chars}"
        case str() if any("\ud800" <= char <= "\udfff" for char in text):
            return "the text is not valid Unicode (a lone surrogate)"
        case str():
            return None
        case _:
            return f"the text is not text but {type(text).__name__}"


def _read_bucket(path: Path) -> list[dict[str, str]]:
    """Return a bucket's rows by id, copies of a text in the order of the source."""
    with pa.ipc.open_stream(path) as stream:
        rows: list[dict[str, str]] = stream.read_all().to_pylist()
    return sorted(rows, key=lambda row: row["row_id"])


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

    def add(self, where: str, reason: str, content: object) -> None:
        shown = content.content if isinstance(content, sources.Unreadable) else str(content)
        shown = shown[:200].encode(errors="replace").decode()
        self._waiting.append({"where": where, "reason": reason, "content": shown})
        self._reasons[reason] += 1
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
