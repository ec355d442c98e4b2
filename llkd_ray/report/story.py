"""The story of one row: what teacher and students thought of it, epoch by epoch.

Reads artifacts of a run alone, whatever experiment made them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq

from llkd_ray.artifacts import MANIFEST, Manifest
from llkd_ray.errors import ArtifactError

_SIGNALS = "signals"


@dataclass(frozen=True)
class Told:
    """One student's training, as one row went through it."""

    student: Path
    rule: str
    row: dict[str, Any]
    """Of schema.labels."""
    epochs: list[dict[str, Any]]
    """Rows of schema.SIGNALS with the epoch and the thresholds of the row's class."""


def tell(run: Path, row_id: str) -> list[Told]:
    """Return the story of a row in each student of a run.

    Args:
        run: Folder of a run.
        row_id: Of the row, or its first digits.

    Raises:
        ArtifactError: The run has no student, or none was trained on such a row.
    """
    students = sorted(path.parent for path in run.glob(f"student-*/{MANIFEST}"))
    if not students:
        raise ArtifactError(
            f"{run}: there is no student in this run; run python jobs/train.py with its experiment"
        )
    told = [story for student in students for story in _of_student(run, student, row_id)]
    if not told:
        raise ArtifactError(
            f"{run}: no student was trained on a row {row_id!r}; the column row_id of "
            "labels-*/unlabeled/*.parquet names them, 32 hexadecimal digits each"
        )
    return told


def as_text(story: Told) -> str:
    """Lay out a story for a terminal."""
    row, label = story.row, story.row["label"]
    head = [
        f"{story.student}: rule {story.rule}",
        f"  {row['text'][:200]}",
        f"  teacher: {label} ({row['confidence']:.3f}); gold: {row['gold'] or 'unknown'}",
    ]
    if not story.epochs:
        return "\n".join([*head, "  held out of training, or train.keep_signals was off"])
    return "\n".join([*head, *(f"  {line}" for line in map(_epoch, story.epochs))])


def _epoch(at: dict[str, Any]) -> str:
    parts = [_against("teacher is sure", at["confidence"], at["teacher_threshold"])]
    if at["uncertainty"] is not None:
        parts.append(_against("student is unsure", at["uncertainty"], at["student_threshold"]))
        parts.append(f"student gives the label {at['student_of_label']:.3f}")
    if at["joint_threshold"] is not None:
        parts.append(f"both together must reach {at['joint_threshold']:.3f}")
    verdict = f"kept, weight {at['weight']:.3f}" if at["kept"] else "dropped"
    return f"epoch {at['epoch']}: {', '.join(parts)}: {verdict}"


def _against(what: str, value: float, threshold: float | None) -> str:
    if threshold is None:
        return f"{what} {value:.3f}"
    return f"{what} {value:.3f} {'>=' if value >= threshold else '<'} {threshold:.3f}"


def _of_student(run: Path, student: Path, row_id: str) -> Iterator[Told]:
    manifest = Manifest.model_validate_json((student / MANIFEST).read_text(encoding="utf-8"))
    [(noun, fingerprint)] = manifest.inputs.items()  # Labels, or a mixture with lessons.
    shards = run / f"{noun}-{fingerprint}" / "unlabeled"
    if not shards.is_dir():
        raise ArtifactError(f"{shards}: the labels that {student.name} was trained on are gone")
    rows = _find(shards, row_id, ["row_id", "text", "gold", "label", "confidence"])
    if len({row["row_id"] for row in rows}) > 1:
        raise ArtifactError(
            f"{shards}: {len(rows)} row ids begin with {row_id!r}; give more digits"
        )
    if not rows:
        return
    [row] = rows
    of_label = {
        at["epoch"]: at
        for at in pq.read_table(student / "audit.parquet").to_pylist()
        if at["label"] == row["label"]
    }
    epochs = []
    for epoch, at in sorted(of_label.items()):
        parts = f"epoch-{epoch:04d}-*.parquet"
        found = _find(student / _SIGNALS, row["row_id"], None, parts)
        if found:
            thresholds = {key: at[key] for key in at if key.endswith("_threshold")}
            epochs.append({**found[0], **thresholds, "epoch": epoch})
    yield Told(student, manifest.settings["selection"]["rule"], row, epochs)


def _find(
    folder: Path, row_id: str, columns: list[str] | None, pattern: str = "shard-*.parquet"
) -> list[dict[str, Any]]:
    files = sorted(map(str, folder.glob(pattern)))
    if not files:
        return []
    condition = ds.field("row_id") == row_id
    if len(row_id) < 32:
        # As a range, so that files and row groups that cannot hold it are not read.
        condition = (ds.field("row_id") >= row_id) & (ds.field("row_id") < row_id + "g")
    found: list[dict[str, Any]] = ds.dataset(files).to_table(columns, filter=condition).to_pylist()
    return found
