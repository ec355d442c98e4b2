"""Which of the teacher's answers can be used: the first pass over the read-outs.

A row without an answer, or whose labels together have too little of the teacher's probability, is
kept aside with its reason. Every row is counted on one side or the other.

Shape legend: N rows, C classes.
"""

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llkd_ray import schema, storage
from llkd_ray.corpus import read_shards
from llkd_ray.errors import TeacherError, TooManyRejectedError
from llkd_ray.metrics import softmax
from llkd_ray.teacher.calibration import Floats

_REASONS_KEPT = 10
_REASONS_TOLD = 3
_REASON_CHARS = 160
_SHOWN_CHARS = 200


@dataclass(frozen=True)
class Shard:
    """The same rows in three artifacts."""

    split: str
    corpus: Path
    readouts: Path
    labels: Path


def shards_of(corpus: Path, readouts: Path, folder: Path) -> list[Shard]:
    """List the shards of all splits that were read out, in order."""
    return [
        Shard(split.name, corpus / split.name / path.name, path, folder / split.name / path.name)
        for split in sorted(path for path in readouts.iterdir() if path.is_dir())
        for path in read_shards(split)
    ]


def texts_of(shard: Shard, row_ids: pa.ChunkedArray) -> pa.Table:
    """Return the corpus's rows (schema.TEXT) with these ids, in their order."""
    texts = pq.read_table(storage.here(shard.corpus), columns=schema.TEXT.names)
    where = pc.index_in(row_ids, value_set=texts.column("row_id"))
    assert where.null_count == 0, f"{shard.readouts}: answers to rows that the corpus does not hold"
    return texts.take(where)


@dataclass(frozen=True)
class Answers:
    """The read-outs of a file, the usable ones apart from the others."""

    row_ids: pa.ChunkedArray
    """[N]"""
    logprobs: Floats
    """[N, C]"""
    label_mass: npt.NDArray[np.float32]
    """[N]"""
    rejected: pa.Table
    """The others: row_id and reason."""


def read_answers(path: Path, min_label_mass: float) -> Answers:
    """Read a file of schema.readouts.

    Args:
        path: The file.
        min_label_mass: A row is usable from this label mass on.
    """
    table = pq.read_table(storage.here(path), columns=["row_id", "logprobs", "error"])
    answered = pc.is_valid(table.column("logprobs")).to_numpy()
    logprobs = _matrix(table.column("logprobs").drop_null())
    # Compared as it is stored, so that the column shows why a row is where it is.
    mass = np.exp(logprobs).sum(axis=1).astype(np.float32)
    # No distribution: no log-probability is finite, or one is not a number.
    is_distribution = np.isfinite(logprobs.max(axis=1))
    usable = answered.copy()
    usable[answered] = is_distribution & (mass >= np.float32(min_label_mass))
    reasons = pc.fill_null(table.column("error"), "the teacher gave no answer").to_numpy().copy()
    reasons[answered] = np.where(
        is_distribution, too_little(min_label_mass), "no label has any probability"
    )
    ids = table.column("row_id")
    return Answers(
        row_ids=ids.filter(pa.array(usable)),
        logprobs=logprobs[usable[answered]],
        label_mass=mass[usable[answered]],
        rejected=pa.table(
            {
                "row_id": ids.filter(pa.array(~usable)),
                "reason": pa.array(reasons[~usable], pa.string()),
            }
        ),
    )


def too_little(min_label_mass: float) -> str:
    """Say why a row's label mass keeps it aside."""
    return f"the labels' probability is below calibration.min_label_mass = {min_label_mass}"


def _matrix(column: pa.ChunkedArray) -> Floats:
    """Turn a column of fixed-size lists without nulls into an array [N, C]."""
    flat: Floats = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float64).reshape(len(column), column.type.list_size)


@dataclass(frozen=True)
class Sifted:
    """What the first pass takes from a shard."""

    split: str
    taken: int
    kept: int
    probabilities: Floats
    """The normalised distributions of the kept rows, summed [C]."""
    rejected: pa.Table
    """schema.REJECTED"""


def sift(shard: Shard, *, min_label_mass: float) -> Sifted:
    """Count a shard's usable answers, add up their distributions, and show the other rows."""
    answers = read_answers(shard.readouts, min_label_mass)
    ids = answers.rejected.column("row_id")
    # Most shards have nothing to show: their texts are not read for it.
    texts = texts_of(shard, ids).column("text") if len(ids) else ids
    columns = [
        pc.binary_join_element_wise(shard.split, ids, " "),
        answers.rejected.column("reason"),
        pc.utf8_slice_codeunits(texts, 0, _SHOWN_CHARS),
    ]
    return Sifted(
        split=shard.split,
        taken=pq.read_metadata(shard.readouts).num_rows,
        kept=len(answers.logprobs),
        probabilities=softmax(answers.logprobs).sum(axis=0),
        rejected=pa.Table.from_arrays(columns, schema=schema.REJECTED),
    )


@dataclass(frozen=True)
class SplitRows:
    """Where the rows of a split went: taken = kept + rejected."""

    taken: int
    kept: int
    rejected: int
    reasons: dict[str, int]
    """Rows kept aside by reason, the ten commonest."""


@dataclass
class Tally:
    """A split, as far as it is sifted."""

    probabilities: Floats
    """As in `Sifted`."""
    taken: int = 0
    kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, shard: Sifted) -> None:
        """Count a shard in."""
        self.probabilities += shard.probabilities
        self.taken += shard.taken
        self.kept += shard.kept
        for count in shard.rejected.column("reason").value_counts().to_pylist():
            self.reasons[count["values"]] += count["counts"]

    def rows(self) -> SplitRows:
        """Return the counts, which must add up."""
        rejected = self.reasons.total()
        assert self.taken == self.kept + rejected, f"rows got lost: {self}"
        reasons = dict(self.reasons.most_common(_REASONS_KEPT))
        return SplitRows(self.taken, self.kept, rejected, reasons)


def gather(sifted: Iterable[Sifted], num_classes: int, aside: Path) -> dict[str, Tally]:
    """Add up each split's shards in their order, and write the rows kept aside as they come."""
    tallies: dict[str, Tally] = {}
    with pq.ParquetWriter(aside, schema.REJECTED) as writer:
        for shard in sifted:
            tallies.setdefault(shard.split, Tally(np.zeros(num_classes))).add(shard)
            writer.write_table(shard.rejected)
    return tallies


def check_rejected(tallies: Mapping[str, Tally], max_rejected_fraction: float, aside: Path) -> None:
    """Stop where too few answers can be used.

    Raises:
        TooManyRejectedError: More than this fraction of all rows was kept aside.
        TeacherError: All of them were.
    """
    reasons = sum((tally.reasons for tally in tallies.values()), Counter[str]())
    taken = sum(tally.taken for tally in tallies.values())
    rejected = reasons.total()
    told = "; ".join(
        f"{textwrap.shorten(reason, _REASON_CHARS)} ({count})"
        for reason, count in reasons.most_common(_REASONS_TOLD)
    )
    if rejected > max_rejected_fraction * taken:
        raise TooManyRejectedError(
            f"{rejected} of {taken} rows have no usable answer, more than "
            f"teacher.max_rejected_fraction = {max_rejected_fraction}: {told}; all of them are in "
            f"{aside}"
        )
    if rejected == taken:
        raise TeacherError(
            f"none of {taken} rows has a usable answer: {told}; all of them are in {aside}"
        )
