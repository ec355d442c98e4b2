"""Score teacher and students side by side on the gold test rows.

Shape legend: N gold test rows, C classes.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray import schema
from llkd_ray.artifacts import Rows, write_text
from llkd_ray.config import EvaluateSection
from llkd_ray.corpus import read_shards
from llkd_ray.errors import ArtifactError
from llkd_ray.metrics import (
    Floats,
    Interval,
    Ints,
    accuracy,
    bootstrap_interval,
    expected_calibration_error,
    macro_f1,
    reflected,
    softmax,
)
from llkd_ray.selection import Probabilities
from llkd_ray.student.evaluate import predict
from llkd_ray.student.temperature import UNCHANGED, Temperature, as_trained, read_temperature

TEACHER, UNCALIBRATED = "teacher", "teacher_uncalibrated"
_READ_ROWS = 4096
_Answers = Iterator[tuple[list[str], Probabilities | Floats]]


@dataclass(frozen=True)
class Scored:
    """What was scored."""

    rows: Rows
    """Test rows; those without gold count as rejected."""
    models: dict[str, schema.ModelScore]


@dataclass(frozen=True)
class _Outcome:
    """One model's answers to the gold test rows, in the order of the shards."""

    gold: Ints
    predicted: Ints
    confidence: Floats
    """[N], the model's probability of what it predicted."""
    as_trained: Floats
    """[N], likewise, before a student's temperature."""


def score_models(
    test: Path,
    students: Mapping[str, Path],
    out: Path,
    *,
    label_names: Sequence[str],
    section: EvaluateSection,
    max_length: int,
    batch_size: int,
    seed: int,
) -> Scored:
    """Score the teacher, the teacher without calibration, and each student.

    A student's probabilities are those that it is served with; beside their calibration error
    stands that of before the temperature.

    All of them answer the same rows: those that have gold and that the teacher answered.

    Reads:
        test/shard-*.parquet (schema.labels).

    Writes:
        out/predictions.parquet (schema.predictions), out/scores.json (schema.ModelScore by model).

    Args:
        test: The test split of the labels artifact.
        students: Folder of each exported student, by rule.
        out: Folder to write into.
        label_names: The C classes.
        section: Bins and resamples.
        max_length: Tokens of a text that a student reads.
        batch_size: Rows of a student's forward pass.
        seed: Of the bootstrap; the same resamples for every model.

    Raises:
        ArtifactError: The teacher labelled no test row, or none of them has gold.
        StudentError: A student cannot be loaded, or tells other classes apart.
    """
    gold, rows = _gold_of(test, label_names)
    models: dict[str, _Answers] = {
        TEACHER: _teacher(test, "probabilities"),
        UNCALIBRATED: _teacher(test, "logprobs"),
    }
    for rule, folder in students.items():
        models[rule] = predict(
            folder, test, label_names, max_length=max_length, batch_size=batch_size
        )
    temperatures = {rule: read_temperature(folder) for rule, folder in students.items()}
    with pq.ParquetWriter(
        out / "predictions.parquet", schema.predictions(len(label_names))
    ) as writer:
        outcomes = {
            name: _collect(
                name,
                answers,
                gold,
                label_names,
                writer=writer,
                temperature=temperatures.get(name),
            )
            for name, answers in models.items()
        }
    scores = {
        name: _score(outcome, len(label_names), section, seed, temperatures.get(name))
        for name, outcome in outcomes.items()
    }
    _write_json(out / "scores.json", {name: score.model_dump() for name, score in scores.items()})
    return Scored(rows, scores)


def score_student(
    test: Path,
    student: Path,
    *,
    label_names: Sequence[str],
    section: EvaluateSection,
    max_length: int,
    batch_size: int,
    seed: int,
) -> schema.ModelScore:
    """Score one student by itself, on the rows that have gold; see `score_models`.

    Reads:
        test/shard-*.parquet: row_id, text, gold.

    Raises:
        ArtifactError: No row has gold.
        StudentError: The student cannot be loaded, or tells other classes apart.
    """
    gold, _ = _gold_of(test, label_names)
    answers = predict(student, test, label_names, max_length=max_length, batch_size=batch_size)
    temperature = read_temperature(student)
    outcome = _collect(
        student.name, answers, gold, label_names, writer=None, temperature=temperature
    )
    return _score(outcome, len(label_names), section, seed, temperature)


def _gold_of(test: Path, label_names: Sequence[str]) -> tuple[dict[str, int], Rows]:
    """Return the position of each row's gold by row id, and how many rows there are."""
    position = {name: index for index, name in enumerate(label_names)}
    shards = read_shards(test)
    if not shards:
        raise ArtifactError(
            f"{test}: there is no labelled test row, so nothing can be scored: it takes "
            "corpus.gold_column, a share of rows in corpus.test_fraction, and teacher.splits with "
            '"test" in it; then run python jobs/prepare.py and jobs/label.py'
        )
    taken = 0
    gold: dict[str, int] = {}
    for shard in shards:
        columns = pq.read_table(shard, columns=["row_id", "gold"]).to_pydict()
        taken += len(columns["row_id"])
        pairs = zip(columns["row_id"], columns["gold"], strict=True)
        gold |= {row_id: position[name] for row_id, name in pairs if name is not None}
    if not gold:
        raise ArtifactError(
            f"{test}: none of the {taken} test rows has gold, so nothing can be scored; name the "
            "column of human labels in corpus.gold_column, or skip this job"
        )
    return gold, Rows(taken=taken, kept=len(gold), rejected=taken - len(gold))


def _teacher(test: Path, column: str) -> _Answers:
    """Yield row ids and the teacher's probabilities, normalized over the classes."""
    for shard in read_shards(test):
        with pq.ParquetFile(shard) as file:
            for batch in file.iter_batches(_READ_ROWS, columns=["row_id", column]):
                flat = batch.column(column).flatten().to_numpy(zero_copy_only=False)
                values = flat.reshape(len(batch), -1)
                yield (
                    batch.column("row_id").to_pylist(),
                    softmax(values) if column == "logprobs" else values,
                )


def _collect(
    name: str,
    answers: _Answers,
    gold: Mapping[str, int],
    label_names: Sequence[str],
    *,
    writer: pq.ParquetWriter | None,
    temperature: Temperature | None,
) -> _Outcome:
    """Write one model's predictions, if there is a writer, and keep what scoring needs."""
    num_classes = len(label_names)
    parts = []
    for row_ids, probabilities in answers:
        known = np.array([row_id in gold for row_id in row_ids], dtype=np.bool_)
        chosen = probabilities[known]
        ids = [row_id for row_id in row_ids if row_id in gold]
        truth = np.array([gold[row_id] for row_id in ids], dtype=np.int64)
        predicted = chosen.argmax(axis=1)
        before = as_trained(chosen, temperature or UNCHANGED)
        confidences = [shares.max(axis=1, initial=0.0) for shares in (chosen, before)]
        parts.append((truth, predicted, *(part.astype(np.float64) for part in confidences)))
        if writer is None:
            continue
        flat = pa.array(chosen.ravel(), pa.float32())
        writer.write_table(
            pa.table(
                {
                    "model": pa.array([name] * len(ids), pa.string()),
                    "row_id": pa.array(ids, pa.string()),
                    "gold": pa.array([label_names[y] for y in truth], pa.string()),
                    "predicted": pa.array([label_names[y] for y in predicted], pa.string()),
                    "probabilities": pa.FixedSizeListArray.from_arrays(flat, num_classes),
                },
                schema=schema.predictions(num_classes),
            )
        )
    return _Outcome(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _score(
    outcome: _Outcome,
    num_classes: int,
    section: EvaluateSection,
    seed: int,
    temperature: Temperature | None,
) -> schema.ModelScore:
    """Score one model's answers, with bootstrap intervals."""
    gold, predicted = outcome.gold, outcome.predicted
    bins = section.calibration_bins

    def interval(statistic: Callable[[Ints], float]) -> Interval:
        return bootstrap_interval(statistic, len(gold), section.bootstrap_resamples, seed)

    def bounded(found: Interval) -> schema.Bounded:
        return schema.Bounded(**asdict(found))

    def calibration_error(confidence: Floats) -> schema.Bounded:
        found = interval(
            lambda of: expected_calibration_error(confidence[of], gold[of] == predicted[of], bins)
        )
        return bounded(reflected(found))

    return schema.ModelScore(
        accuracy=bounded(interval(lambda of: accuracy(gold[of], predicted[of]))),
        macro_f1=bounded(interval(lambda of: macro_f1(gold[of], predicted[of], num_classes))),
        ece=calibration_error(outcome.confidence),
        rows=len(gold),
        ece_as_trained=calibration_error(outcome.as_trained) if temperature else None,
        temperature=temperature.value if temperature else None,
    )


def _write_json(path: Path, tree: object) -> None:
    write_text(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
