"""What each epoch kept and what became of it: rows of audit.parquet and of the signals.

Gold is read here, to say how pure the kept labels are, and nowhere near the loss.

Shape legend: N rows of this worker, C classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray import schema, storage
from llkd_ray.selection import NONE, AllReduce, Bools, Floats, Selection, Signals
from llkd_ray.student.batches import Rows


def audit_classes(
    epoch: int,
    label_names: Sequence[str],
    signals: Signals,
    selection: Selection,
    used: Bools,
    *,
    all_reduce: AllReduce,
) -> list[dict[str, Any]]:
    """Return one row of schema.AUDIT per class, over all workers.

    Every worker must call this at the same time.

    Args:
        epoch: From 1.
        label_names: Names of the C classes.
        signals: Of this worker's rows; without the student's answers where it was not asked.
        selection: What was kept of these rows.
        used: [N], trained on in this or an earlier epoch.
        all_reduce: Sum over the workers.
    """
    one = np.ones(len(signals))
    kept = selection.keep.astype(np.float64)
    known = (signals.gold != NONE).astype(np.float64)
    right = (signals.gold == signals.label).astype(np.float64)
    asked = signals.student is not None
    unsure = signals.uncertainty if asked else np.zeros(len(signals))
    threshold = selection.thresholds.get("student")
    uncertain = (unsure >= (0.5 if threshold is None else threshold[signals.label])) & asked
    measures = {
        "rows": one,
        "kept": kept,
        "used": used.astype(np.float64),
        "confidence": signals.confidence,
        "confidence_kept": signals.confidence * kept,
        "uncertainty": unsure,
        "uncertainty_kept": unsure * kept,
        "uncertain": uncertain.astype(np.float64),
        "known": known,
        "known_kept": known * kept,
        "known_uncertain": known * uncertain,
        "right": right,
        "right_kept": right * kept,
        "right_uncertain": right * uncertain,
    }
    per_class = [
        np.bincount(signals.label, weights=measure, minlength=len(label_names))
        for measure in measures.values()
    ]
    sums = dict(zip(measures, all_reduce(np.stack(per_class)), strict=True))
    return [
        {
            "epoch": epoch,
            "label": name,
            **_class_row({key: float(values[y]) for key, values in sums.items()}, asked=asked),
            **{
                f"{signal}_threshold": _number(selection.thresholds.get(signal), y)
                for signal in ("teacher", "student", "joint", "probability")
            },
        }
        for y, name in enumerate(label_names)
    ]


def write_signals(path: Path, rows: Rows, signals: Signals, selection: Selection) -> None:
    """Write what this worker's rows looked like in one epoch: schema.SIGNALS.

    Args:
        path: The file to make; its folder is made too.
        rows: This worker's.
        signals: Of these rows.
        selection: What was kept of them.
    """
    asked = signals.student is not None
    none = pa.nulls(len(rows), pa.float32())

    def column(values: Floats) -> pa.Array:
        return pa.array(values.astype(np.float32))

    ids = [f"{upper:016x}{lower:016x}" for upper, lower in zip(rows.keys, rows.lower, strict=True)]
    table = pa.table(
        [
            pa.array(ids, pa.string()),
            column(signals.confidence),
            column(signals.uncertainty) if asked else none,
            column(signals.student_of_label) if asked else none,
            pa.array(selection.keep),
            column(selection.weight),
        ],
        schema=schema.SIGNALS,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    pq.write_table(table, beside)
    beside.replace(path)
    storage.put(path)


def _class_row(of: dict[str, float], *, asked: bool) -> dict[str, Any]:
    dropped = of["rows"] - of["kept"]
    unsure = of["uncertainty"] - of["uncertainty_kept"]
    return {
        "rows": int(of["rows"]),
        "kept": int(of["kept"]),
        "uncertain": int(of["uncertain"]) if asked else None,
        "used": int(of["used"]),
        "confidence_kept": _ratio(of["confidence_kept"], of["kept"]),
        "confidence_dropped": _ratio(of["confidence"] - of["confidence_kept"], dropped),
        "uncertainty_kept": _ratio(of["uncertainty_kept"], of["kept"]) if asked else None,
        "uncertainty_dropped": _ratio(unsure, dropped) if asked else None,
        "purity_kept": _ratio(of["right_kept"], of["known_kept"]),
        "purity_uncertain": _ratio(of["right_uncertain"], of["known_uncertain"]),
        "purity_all": _ratio(of["right"], of["known"]),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _number(threshold: Floats | None, y: int) -> float | None:
    return None if threshold is None or np.isnan(threshold[y]) else float(threshold[y])
