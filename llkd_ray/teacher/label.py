"""Turn stored read-outs into labels: calibrate, take the best, keep the probabilities.

This step is cheap and repeatable: another calibration never asks the teacher again. It goes twice
over the shards, once to count and to fit, once to write, and whoever calls says how a function is
run over shards: one after the other, or on a cluster.

Shape legend: N rows, C classes, G rows with gold.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llkd_ray import metrics, schema, storage
from llkd_ray.artifacts import hand_over
from llkd_ray.config import CalibrationSection
from llkd_ray.errors import TeacherError
from llkd_ray.teacher import usable
from llkd_ray.teacher.calibration import (
    Calibration,
    Floats,
    Ints,
    fit_temperature,
    fit_vector,
    write_calibrations,
)
from llkd_ray.teacher.embedding import Encoder
from llkd_ray.teacher.stacking import Stacking, fit_stacking
from llkd_ray.teacher.usable import Shard, SplitRows, Tally

_BINS = 10
# Ids are hashes, so the first rows are a fair sample, and one number needs no more of them.
_TEMPERATURE_ROWS = 50_000
# More gold than this would train a student by itself.
_STACKED_ROWS = 5_000

# Runs a function on every shard, anywhere, and yields the results in the shards' order.
Each = Callable[[Callable[[Shard], Any], Iterable[Shard]], Iterable[Any]]


@dataclass(frozen=True)
class Labelled:
    """Counts and, where rows have gold, the teacher's quality on them."""

    rows: int
    """With a label, all splits."""
    rejected: int
    """Kept aside, all splits."""
    splits: dict[str, SplitRows]
    unlabeled_rows: int
    unlabeled_rejected: int
    unlabeled_rejected_label_mass: int
    """Of these, rows whose label mass is too small."""
    temperature: float | None
    """As fitted; None where there was nothing to fit it on."""
    accuracy: float | None
    """On the unlabeled split, as is all that follows."""
    accuracy_uncalibrated: float | None
    accuracy_confident_half: float | None
    macro_f1: float | None
    ece: float | None
    quality: dict[str, dict[str, metrics.Quality]]
    """By calibration, then by split, for all that could be fitted and that have gold."""


def label(
    corpus: Path,
    readouts: Path,
    folder: Path,
    calibration: CalibrationSection,
    label_names: tuple[str, ...],
    *,
    max_rejected_fraction: float,
    each: Each = map,
) -> Labelled:
    """Fit every calibration that can be fitted and write every split's labels by the chosen one.

    Memory is bounded by a shard and by some 60 bytes for each row with gold: accuracy by rank of
    confidence needs all of them at once.

    Args:
        corpus: The corpus artifact's folder.
        readouts: The read-outs artifact's folder.
        folder: To write into.
        calibration: Which one decides, and what counts as an answer.
        label_names: The C classes, in the order of the read-outs.
        max_rejected_fraction: Of all rows; teacher.max_rejected_fraction.
        each: Runs the two passes, with functions and results that can be pickled. Sums are taken in
            the shards' order, so that the result does not depend on which shard is done first.

    Reads:
        `SPLIT/shard-*.parquet` of the corpus (schema.TEXT) and of the read-outs (schema.readouts);
        `content_free.parquet` of the read-outs, if there is one.

    Writes:
        `SPLIT/shard-*.parquet` (schema.labels), `rejected.parquet` (schema.REJECTED),
        `calibrations.json` and `reliability.parquet` (schema.RELIABILITY).

    Raises:
        TooManyRejectedError: More than `max_rejected_fraction` of the rows have no usable answer.
        TeacherError: None has, or the chosen calibration cannot be fitted.
    """
    minimum = calibration.min_label_mass
    shards = usable.shards_of(corpus.resolve(), readouts.resolve(), folder.resolve())
    aside = folder / "rejected.parquet"
    sift = functools.partial(usable.sift, min_label_mass=minimum)
    tallies = usable.gather(each(sift, shards), len(label_names), aside)
    usable.check_rejected(tallies, max_rejected_fraction, aside)
    unlabeled = tallies.get("unlabeled", Tally(np.zeros(len(label_names))))
    known = _validation(shards, label_names, minimum)
    fitted = _fit(calibration.kind, unlabeled, readouts, known)
    write_calibrations(folder / "calibrations.json", fitted)
    stacking = (
        _stack(calibration, fitted["batch"], known) if calibration.kind == "stacked" else None
    )
    write = functools.partial(
        _write,
        fitted=fitted,
        stacking=stacking,
        calibration=calibration,
        label_names=label_names,
    )
    judged: dict[str, list[_Judged]] = {split: [] for split in tallies}
    for shard, of_shard in zip(shards, each(write, shards), strict=True):
        judged[shard.split].append(of_shard)
    storage.here(folder)
    splits = {split: tally.rows() for split, tally in tallies.items()}
    for split, counted in splits.items():
        assert sum(part.rows for part in judged[split]) == counted.kept, f"{split}: rows got lost"
    kinds = (*fitted, "stacked") if stacking else tuple(fitted)
    quality = _judge(judged, kinds, len(label_names), folder / "reliability.parquet")
    own = quality[calibration.kind].get("unlabeled")
    raw = quality["none"].get("unlabeled")
    return Labelled(
        rows=sum(counted.kept for counted in splits.values()),
        rejected=sum(counted.rejected for counted in splits.values()),
        splits=splits,
        unlabeled_rows=unlabeled.kept,
        unlabeled_rejected=unlabeled.reasons.total(),
        unlabeled_rejected_label_mass=unlabeled.reasons[usable.too_little(minimum)],
        temperature=fitted["temperature"].temperature if "temperature" in fitted else None,
        accuracy=own.accuracy if own else None,
        accuracy_uncalibrated=raw.accuracy if raw else None,
        accuracy_confident_half=own.accuracy_confident_half if own else None,
        macro_f1=own.macro_f1 if own else None,
        ece=own.ece if own else None,
        quality=quality,
    )


def _fit(kind: str, unlabeled: Tally, readouts: Path, known: "_Known") -> dict[str, Calibration]:
    """Fit every calibration of log-probabilities that there is something to fit on, by kind.

    `batch` takes the mean of the normalised probabilities over the unlabeled split for the
    teacher's prior, and so assumes the labels to be about equally frequent; `contextual` takes
    that over texts without content.

    Source: arXiv 2309.17249, with the whole corpus for a batch; arXiv 2102.09690.
    """
    num_classes = known.logprobs.shape[1]
    fitted = {"none": Calibration((0.0,) * num_classes)}
    content_free = readouts / "content_free.parquet"
    if content_free.is_file():
        told = usable.read_answers(content_free, min_label_mass=0.0).logprobs
        if len(told):
            fitted["contextual"] = Calibration.dividing_by(metrics.softmax(told).mean(axis=0))
    if unlabeled.kept:
        batch = Calibration.dividing_by(unlabeled.probabilities / unlabeled.kept)
        fitted["batch"] = batch
        if len(known.gold):
            logits = batch.logits(known.logprobs)
            fitted["temperature"] = replace(batch, temperature=fit_temperature(logits, known.gold))
            fitted["vector"] = batch.corrected(*fit_vector(logits, known.gold))
    if ("vector" if kind == "stacked" else kind) not in fitted:
        raise TeacherError(_why_not(kind, fitted, content_free))
    return fitted


def _stack(config: CalibrationSection, teacher: Calibration, known: "_Known") -> Stacking:
    """Stack an encoder's embeddings on the teacher's answers."""
    rows = slice(_STACKED_ROWS)
    embeddings = _encoder(config.encoder).embed(known.texts[rows])
    return fit_stacking(teacher, known.logprobs[rows], embeddings, known.gold[rows])


@functools.cache
def _encoder(name: str) -> Encoder:
    """Load an encoder once in a process."""
    return Encoder(name, "calibration.encoder")


def _why_not(kind: str, fitted: Mapping[str, Calibration], content_free: Path) -> str:
    """Say what a calibration that could not be fitted needs."""
    if kind == "contextual":
        return (
            f'{content_free}: calibration.kind="contextual" needs an answer about a text without '
            'content, and there is none; choose calibration.kind="batch", which asks nothing, or '
            f"delete {content_free.parent} and run python jobs/label.py again"
        )
    if "batch" not in fitted:
        return (
            f'calibration.kind="{kind}" is fitted on the unlabeled split, of which no row has a '
            'usable answer: add "unlabeled" to teacher.splits'
        )
    return (
        f'calibration.kind="{kind}" is fitted on validation rows with a gold label, and the '
        'teacher answered none: add "validation" to teacher.splits and give corpus.gold_column'
    )


@dataclass(frozen=True)
class _Known:
    """Validation rows whose gold can be learned from."""

    logprobs: Floats
    """[N, C]"""
    gold: Ints
    """[N]"""
    texts: list[str]


def _validation(
    shards: Sequence[Shard], label_names: Sequence[str], min_label_mass: float
) -> _Known:
    """Read the validation rows that have gold."""
    logprobs, gold = [np.empty((0, len(label_names)))], [np.empty(0, dtype=np.int64)]
    texts: list[str] = []
    for shard in shards:
        if shard.split == "validation" and len(texts) < _TEMPERATURE_ROWS:
            answers = usable.read_answers(shard.readouts, min_label_mass)
            rows = usable.texts_of(shard, answers.row_ids)
            of_shard = _positions(rows.column("gold"), label_names)
            # Where gold has no probability at all, no temperature gives it any.
            known = (of_shard >= 0) & np.isfinite(
                answers.logprobs[np.arange(len(of_shard)), of_shard]
            )
            logprobs.append(answers.logprobs[known])
            gold.append(of_shard[known])
            texts += rows.column("text").filter(pa.array(known)).to_pylist()
    return _Known(np.concatenate(logprobs), np.concatenate(gold), texts)


def _positions(gold: pa.ChunkedArray, label_names: Sequence[str]) -> Ints:
    """Return the class of each gold label, -1 where there is none."""
    found = pc.index_in(gold, value_set=pa.array(label_names, pa.string()))
    positions: Ints = pc.fill_null(found, -1).to_numpy().astype(np.int64)
    return positions


@dataclass(frozen=True)
class _Judged:
    """What the second pass leaves of a shard: its count, and its rows with gold beside it."""

    rows: int
    gold: npt.NDArray[np.int16]
    """[G]"""
    predicted: dict[str, npt.NDArray[np.int16]]
    """By calibration, each [G]."""
    confidence: dict[str, npt.NDArray[np.float32]]
    """By calibration, each [G]."""


def _write(
    shard: Shard,
    *,
    fitted: Mapping[str, Calibration],
    stacking: Stacking | None,
    calibration: CalibrationSection,
    label_names: tuple[str, ...],
) -> _Judged:
    """Write a shard's labels."""
    answers = usable.read_answers(shard.readouts, calibration.min_label_mass)
    texts = usable.texts_of(shard, answers.row_ids)
    probabilities = {
        kind: of_kind.probabilities(answers.logprobs) for kind, of_kind in fitted.items()
    }
    if stacking is not None:
        embeddings = _encoder(calibration.encoder).embed(texts.column("text").to_pylist())
        probabilities["stacked"] = stacking.probabilities(answers.logprobs, embeddings)
    chosen = calibration.kind
    predicted = {kind: values.argmax(axis=1) for kind, values in probabilities.items()}
    confidence = {
        kind: values.max(axis=1).astype(np.float32) for kind, values in probabilities.items()
    }
    columns = schema.labels(len(label_names))
    vectors = columns.field("probabilities").type
    table = pa.Table.from_arrays(
        [
            *texts.columns,
            pa.array(np.array(label_names, dtype=object)[predicted[chosen]], pa.string()),
            pa.array(confidence[chosen]),
            _vectors(probabilities[chosen], vectors),
            _vectors(answers.logprobs, vectors),
            pa.array(answers.label_mass),
            *(
                pa.array(confidence[kind])
                if kind in confidence
                else pa.nulls(len(texts), pa.float32())
                for kind in schema.CALIBRATIONS
            ),
        ],
        schema=columns,
    )
    shard.labels.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, shard.labels)
    hand_over(shard.labels)
    gold = _positions(texts.column("gold"), label_names)
    known = gold >= 0
    return _Judged(
        rows=len(table),
        gold=gold[known].astype(np.int16),
        predicted={kind: values[known].astype(np.int16) for kind, values in predicted.items()},
        confidence={kind: values[known] for kind, values in confidence.items()},
    )


def _vectors(values: Floats, kind: pa.DataType) -> pa.Array:
    flat = pa.array(values.astype(np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


def _judge(
    judged: Mapping[str, Sequence[_Judged]], kinds: Sequence[str], num_classes: int, path: Path
) -> dict[str, dict[str, metrics.Quality]]:
    """Hold every calibration against gold, by calibration and split, and write the tables."""
    quality: dict[str, dict[str, metrics.Quality]] = {kind: {} for kind in kinds}
    rows: list[dict[str, object]] = []
    for kind, (split, shards) in itertools.product(kinds, judged.items()):
        gold = np.concatenate([shard.gold for shard in shards]).astype(np.int64)
        if not len(gold):
            continue
        predicted = np.concatenate([shard.predicted[kind] for shard in shards]).astype(np.int64)
        confidence = np.concatenate([shard.confidence[kind] for shard in shards]).astype(np.float64)
        correct = gold == predicted
        quality[kind][split] = metrics.quality(gold, predicted, confidence, num_classes, _BINS)
        for table, bins in (
            ("bin", metrics.reliability(confidence, correct, _BINS)),
            ("decile", metrics.reliability_by_rank(confidence, correct, _BINS)),
        ):
            rows += [
                {
                    "calibration": kind,
                    "split": split,
                    "table": table,
                    "position": bin_.position,
                    "rows": bin_.rows,
                    "confidence_mean": bin_.mean_confidence,
                    "accuracy": bin_.accuracy,
                    "lower": bin_.lower,
                    "upper": bin_.upper,
                }
                for bin_ in bins
            ]
    pq.write_table(pa.Table.from_pylist(rows, schema.RELIABILITY), path)
    return quality
