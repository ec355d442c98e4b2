"""Measure what a cascade wins and costs, and choose where the student hands over.

Shape legend: N rows with gold that the teacher answered, C classes.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray import schema
from llkd_ray.artifacts import Rows, write_text
from llkd_ray.config import CascadeSection, EvaluateSection
from llkd_ray.corpus import read_shards
from llkd_ray.errors import ArtifactError
from llkd_ray.metrics import Floats, Ints, bootstrap_interval
from llkd_ray.serving.cascade import Handover
from llkd_ray.serving.curve import Answers, choose, trace
from llkd_ray.student.evaluate import predict
from llkd_ray.teacher.calibration import Calibration

SUMMARY, CURVE = "cascade.json", "curve.parquet"


@dataclass(frozen=True)
class Measured:
    """What was measured, for the manifest and the user."""

    rows: Rows
    """Validation rows that the teacher answered; those without gold count as rejected."""
    summary: schema.CascadeSummary


@dataclass(frozen=True)
class _Both:
    """Both models' answers to the rows of a split."""

    taken: int
    """Rows that the teacher answered, with gold or without."""
    gold: Ints
    """[N]"""
    student: Floats
    """[N, C], calibrated."""
    teacher: Floats
    """[N, C], calibrated as the teacher is served."""


def measure(
    labels: Path,
    student: Path,
    out: Path,
    *,
    label_names: tuple[str, ...],
    calibration: Calibration,
    target: CascadeSection,
    section: EvaluateSection,
    max_length: int,
    batch_size: int,
    seed: int,
) -> Measured:
    """Choose the threshold on the validation rows, and score it on the test rows, if there are any.

    Reads:
        labels/validation/shard-*.parquet and labels/test/shard-*.parquet (schema.labels).

    Writes:
        out/curve.parquet (schema.CURVE), out/cascade.json (schema.CascadeSummary).

    Args:
        labels: Folder of the labels artifact.
        student: Folder of the exported student.
        out: Folder to write into.
        label_names: The C classes.
        calibration: With which the teacher is served. One fitted on gold saw these validation
            rows, so that the test rows tell more.
        target: What the threshold is to reach.
        section: Resamples of the intervals.
        max_length: Tokens of a text that the student reads.
        batch_size: Rows of the student's forward pass.
        seed: Of the bootstrap.

    Raises:
        ArtifactError: No validation row has gold and an answer of the teacher.
        StudentError: The student cannot be loaded, or tells other classes apart.
    """

    def both(split: str) -> _Both:
        answers = predict(
            student, labels / split, label_names, max_length=max_length, batch_size=batch_size
        )
        told = [probabilities.astype(np.float64) for _, probabilities in answers]
        return _read(labels / split, label_names, calibration, told)

    validation, test = both("validation"), both("test")
    if not len(validation.gold):
        raise ArtifactError(
            f"{labels / 'validation'}: no row has gold and an answer of the teacher, so nothing "
            "tells where the teacher is better; give corpus.gold_column, "
            'corpus.validation_fraction a share, and teacher.splits the name "validation"'
        )
    curve = trace(
        _answers(validation.student, validation.gold),
        _answers(validation.teacher, validation.gold),
        target.abstain_below,
    )
    chosen = choose(curve, target)
    handover = Handover(chosen.threshold, target.abstain_below)
    pq.write_table(pa.table(asdict(curve), schema=schema.CURVE), out / CURVE)
    summary = schema.CascadeSummary(
        threshold=chosen.threshold,
        reached=chosen.reached,
        reason=chosen.reason,
        validation=_score(validation, handover, section, seed),
        test=_score(test, handover, section, seed) if len(test.gold) else None,
    )
    write_text(out / SUMMARY, summary.model_dump_json(indent=2) + "\n")
    kept = len(validation.gold)
    rows = Rows(taken=validation.taken, kept=kept, rejected=validation.taken - kept)
    return Measured(rows, summary)


def _read(
    split: Path, label_names: tuple[str, ...], calibration: Calibration, told: list[Floats]
) -> _Both:
    """Put the student's answers to all rows of a split beside the teacher's, where gold is."""
    gold: list[str | None] = []
    logprobs = [np.empty((0, len(label_names)))]
    for shard in read_shards(split):
        table = pq.read_table(shard, columns=["gold", "logprobs"])
        gold += table["gold"].to_pylist()
        flat = table["logprobs"].combine_chunks().flatten().to_numpy()
        logprobs.append(flat.reshape(-1, len(label_names)).astype(np.float64))
    student = np.concatenate([np.empty((0, len(label_names))), *told])
    known = [at for at, name in enumerate(gold) if name is not None]
    return _Both(
        taken=len(gold),
        gold=np.array([label_names.index(str(gold[at])) for at in known], dtype=np.int64),
        student=student[known],
        teacher=calibration.probabilities(np.concatenate(logprobs)[known]),
    )


def _answers(probabilities: Floats, gold: Ints) -> Answers:
    return Answers(probabilities.argmax(axis=1) == gold, probabilities.max(axis=1))


def _score(
    both: _Both, handover: Handover, section: EvaluateSection, seed: int
) -> schema.CascadeScore:
    """Score the cascade, and both models by themselves, each answering every row."""
    asked = handover.unsure(both.student)
    settled = handover.settle(both.student, asked, both.teacher[asked])
    assert settled.by is not None
    answered = np.array([who is not None for who in settled.by])

    def share(right: Floats, counted: Floats) -> schema.Bounded:
        def of(rows: Ints) -> float:
            return float(right[rows].sum() / max(counted[rows].sum(), 1))

        interval = bootstrap_interval(of, len(both.gold), section.bootstrap_resamples, seed)
        return schema.Bounded(**asdict(interval))

    all_rows = np.ones(len(both.gold))
    student, teacher, cascade = (
        (probabilities.argmax(axis=1) == both.gold).astype(np.float64)
        for probabilities in (both.student, both.teacher, settled.probabilities)
    )
    return schema.CascadeScore(
        rows=len(both.gold),
        teacher_fraction=len(asked) / len(both.gold),
        answered_fraction=float(answered.mean()),
        accuracy=share(cascade * answered, answered.astype(np.float64)),
        student=share(student, all_rows),
        teacher=share(teacher, all_rows),
        gain=share((cascade - student) * all_rows, all_rows),
    )
