"""Turn stored read-outs into labels: calibrate, take the best, keep the probabilities.

This step is cheap and repeatable: another calibration never asks the teacher again.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llkd_ray import metrics, schema
from llkd_ray.config import CalibrationSection
from llkd_ray.corpus import read_shards
from llkd_ray.teacher.calibration import Calibration, Floats, softmax

_BINS = 10


@dataclass(frozen=True)
class Labelled:
    """Counts and, where the unlabeled rows have gold, the teacher's quality on them."""

    rows: int
    """All splits."""
    unlabeled_rows: int
    unlabeled_rejected: int
    accuracy: float | None
    accuracy_uncalibrated: float | None
    ece: float | None


def label(
    corpus: Path,
    readouts: Path,
    folder: Path,
    calibration: CalibrationSection,
    label_names: tuple[str, ...],
) -> Labelled:
    """Calibrate over the unlabeled split and write every split's labels.

    Reads:
        `SPLIT/shard-*.parquet` of the corpus (schema.TEXT) and of the read-outs
        (schema.readouts); memory is bounded by a shard.

    Writes:
        `SPLIT/shard-*.parquet` (schema.labels) and `calibration.json`.
    """
    shards = read_shards(readouts / "unlabeled")
    fitted = Calibration.fit(calibration, map(_logprobs, shards), len(label_names))
    fitted.write(folder / "calibration.json")
    rows = answered = unanswered = 0
    judged: list[_Judged] = []
    for split in sorted(path.name for path in readouts.iterdir() if path.is_dir()):
        (folder / split).mkdir()
        for shard in read_shards(readouts / split):
            asked = pq.read_metadata(shard).num_rows
            labels = _join(pq.read_table(corpus / split / shard.name), shard, fitted, label_names)
            pq.write_table(labels, folder / split / shard.name)
            rows += len(labels)
            if split == "unlabeled":
                answered += len(labels)
                unanswered += asked - len(labels)
                judged.append(_judge(labels, label_names))
    return _summarise(judged, rows, answered, unanswered)


def _logprobs(shard: Path) -> Floats:
    """Read the answered rows' label log-probabilities [N, C] of a shard."""
    return matrix(pq.read_table(shard, columns=["logprobs"]).column("logprobs").drop_null())


def matrix(column: pa.ChunkedArray) -> Floats:
    """Turn a column of fixed-size lists without nulls into an array [N, C]."""
    flat: Floats = column.combine_chunks().flatten().to_numpy().astype(np.float64)
    return flat.reshape(len(column), column.type.list_size)


def _join(
    texts: pa.Table, shard: Path, calibration: Calibration, label_names: tuple[str, ...]
) -> pa.Table:
    """Put texts and calibrated answers side by side; rows without an answer are left out."""
    answers = pq.read_table(shard)
    answers = answers.filter(pc.is_valid(answers.column("logprobs")))
    where = pc.index_in(answers.column("row_id"), value_set=texts.column("row_id"))
    assert where.null_count == 0, f"{shard}: answers to rows that the corpus does not hold"
    logprobs = matrix(answers.column("logprobs"))
    probabilities = calibration.probabilities(logprobs)
    columns = schema.labels(len(label_names))
    vectors = columns.field("probabilities").type
    return pa.Table.from_arrays(
        [
            *texts.take(where).select(schema.TEXT.names).columns,
            pa.array(np.array(label_names)[probabilities.argmax(axis=1)], pa.string()),
            pa.array(probabilities.max(axis=1), pa.float32()),
            _vectors(probabilities, vectors),
            _vectors(logprobs, vectors),
            pa.array(np.exp(logprobs).sum(axis=1), pa.float32()),
        ],
        schema=columns,
    )


def _vectors(values: Floats, kind: pa.DataType) -> pa.Array:
    flat = pa.array(values.astype(np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


@dataclass(frozen=True)
class _Judged:
    """The teacher against gold on a shard's rows that have it."""

    confidence: Floats
    correct: npt.NDArray[np.bool_]
    correct_uncalibrated: npt.NDArray[np.bool_]


def _judge(labels: pa.Table, label_names: tuple[str, ...]) -> _Judged:
    known = labels.filter(pc.is_valid(labels.column("gold")))
    gold = known.column("gold").to_numpy()
    raw = softmax(matrix(known.column("logprobs"))).argmax(axis=1)
    return _Judged(
        confidence=known.column("confidence").to_numpy().astype(np.float64),
        correct=known.column("label").to_numpy() == gold,
        correct_uncalibrated=np.array(label_names, dtype=object)[raw] == gold,
    )


def _summarise(judged: list[_Judged], rows: int, answered: int, unanswered: int) -> Labelled:
    confidence = np.concatenate([part.confidence for part in judged])
    correct = np.concatenate([part.correct for part in judged])
    uncalibrated = np.concatenate([part.correct_uncalibrated for part in judged])
    known = len(correct) > 0
    return Labelled(
        rows=rows,
        unlabeled_rows=answered,
        unlabeled_rejected=unanswered,
        accuracy=float(correct.mean()) if known else None,
        accuracy_uncalibrated=float(uncalibrated.mean()) if known else None,
        ece=metrics.expected_calibration_error(confidence, correct, _BINS) if known else None,
    )
