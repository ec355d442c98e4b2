"""Sift what the teacher wrote: calibrate what it reads in it, ask the student, check every row.

Shape legend: N rows, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray import schema
from llkd_ray.config import Experiment
from llkd_ray.corpus import read_shards, row_id
from llkd_ray.guided.asking import probabilities_of_texts
from llkd_ray.guided.checks import GENERATED, Checks, Sample
from llkd_ray.guided.duplicates import Seen
from llkd_ray.guided.form import Form
from llkd_ray.guided.seed import SHARD, TRAIN, VALIDATION, read_seed, write_labelled
from llkd_ray.metrics import Floats, Ints, softmax
from llkd_ray.selection import uncertainty
from llkd_ray.teacher.calibration import Calibration

SAMPLES = "samples.parquet"


@dataclass(frozen=True)
class Sources:
    """What a round is made from."""

    corpus: Path
    """Of the artifact: its validation and test texts are not to come up again."""
    seed: Path
    lessons: tuple[Path, ...]
    """Of the rounds before."""
    student: Path
    """Folder of the round before's exported student."""


def sift(
    written: pa.Table, sources: Sources, experiment: Experiment, folder: Path
) -> list[str | None]:
    """Check every sample and return why each was dropped, None where it was not [N].

    Writes:
        folder/samples.parquet (schema.lessons) and folder/unlabeled (schema.labels), those kept.
    """
    names = experiment.task.label_names
    rows = written.to_pylist()
    asked = np.array([names.index(row["label"]) for row in rows], dtype=np.int64)
    logprobs = np.array([row["logprobs"] or [np.nan] * len(names) for row in rows])
    teacher = calibrated(logprobs, asked)
    student = probabilities_of_texts([row["text"] for row in rows], sources.student, experiment)
    checks = _checks(sources, experiment)
    reasons = [
        checks.reason_against(
            Sample(
                text=row["text"],
                label=int(asked[at]),
                finished=row["finished"],
                error=row["error"],
                teacher=teacher[at],
                student=student[at],
            )
        )
        for at, row in enumerate(rows)
    ]
    unsure = uncertainty(student)
    samples = [
        {
            **row,
            **_read(teacher[at], student[at], names),
            "uncertainty": unsure[at],
            "dropped": reasons[at],
        }
        for at, row in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(samples, schema.lessons(len(names))), folder / SAMPLES)
    (folder / TRAIN).mkdir(exist_ok=True)
    kept = [
        _labelled(row, teacher[at], logprobs[at], int(asked[at]))
        for at, row in enumerate(rows)
        if reasons[at] is None
    ]
    write_labelled(folder / TRAIN / SHARD, kept, names)
    return reasons


def calibrated(logprobs: Floats, asked: Ints) -> Floats:
    """Return the teacher's distributions [N, C] of its own texts, NaN where it has none.

    The teacher's preference for labels is its mean answer over the texts, each asked label with
    the same share, whatever the budget; batch calibration (arXiv 2309.17249) on what is balanced
    by design. Where no text of some label came of the budget, nothing is known of the preference
    for it, and the distributions stay as they are.
    """
    told = ~np.isnan(logprobs).any(axis=1)
    result = np.full(logprobs.shape, np.nan)
    if told.any():
        raw = softmax(logprobs[told])
        of_label = [raw[asked[told] == label].mean(axis=0) for label in np.unique(asked[told])]
        if len(of_label) < logprobs.shape[1]:
            result[told] = raw
        else:
            calibration = Calibration.dividing_by(np.mean(of_label, axis=0))
            result[told] = calibration.probabilities(logprobs[told])
    return result


def _checks(sources: Sources, experiment: Experiment) -> Checks:
    task, section = experiment.task, experiment.guide.checks
    seen = Seen(section.near)
    for part in ("validation", "test"):
        for path in read_shards(sources.corpus / part):
            for text in pq.read_table(path, columns=["text"]).column("text").to_pylist():
                seen.add(f"the {part} split", text, held_out=True)
    train = read_seed(sources.seed, [TRAIN], task.label_names).texts
    validation = read_seed(sources.seed, [VALIDATION], task.label_names).texts
    for text in validation:
        seen.add("the seed's validation rows", text, held_out=True)
    for text in train:
        seen.add("the seed", text)
    for earlier in sources.lessons:
        for path in read_shards(earlier / TRAIN):
            for text in pq.read_table(path, columns=["text"]).column("text").to_pylist():
                seen.add(GENERATED, text)
    parts = (task.text_prefix, task.label_prefix)
    return Checks(section, Form.of([*train, *validation], section, parts), seen)


def _read(teacher: Floats, student: Floats, names: Sequence[str]) -> dict[str, Any]:
    """Return the labels that both models read in a text, as columns of schema.lessons."""
    told = not np.isnan(teacher).any()
    return {
        "read_label": names[int(teacher.argmax())] if told else None,
        "confidence": float(teacher.max()) if told else None,
        "student_label": names[int(student.argmax())],
    }


def _labelled(row: dict[str, Any], teacher: Floats, logprobs: Floats, asked: int) -> dict[str, Any]:
    """Return a row of schema.labels with the label that was asked for."""
    return {
        "row_id": row_id(row["text"]),
        "text": row["text"],
        "gold": None,
        "label": row["label"],
        "confidence": teacher[asked],
        "probabilities": teacher,
        "logprobs": logprobs,
        "label_mass": np.exp(logprobs).sum(),
    }
