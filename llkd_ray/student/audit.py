"""What each epoch kept and what became of it: the rows of audit.parquet and epochs.parquet.

Gold is read here, to say how pure the kept labels are, and nowhere near the loss.

Shape legend: N rows of this worker, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llkd_ray.metrics import accuracy, macro_f1
from llkd_ray.selection import AllReduce, Floats, Ints, Selection
from llkd_ray.student.batches import NONE, Rows


def audit_classes(
    epoch: int,
    label_names: Sequence[str],
    rows: Rows,
    uncertainty: Floats | None,
    *,
    selection: Selection,
    all_reduce: AllReduce,
) -> list[dict[str, Any]]:
    """Return one row of schema.AUDIT per class, over all workers.

    Every worker must call this at the same time.

    Args:
        epoch: From 1.
        label_names: Names of the C classes.
        rows: Of this worker.
        uncertainty: [N], or None when the student was not asked.
        selection: What was kept of these rows.
        all_reduce: Sum over the workers.
    """
    kept = selection.keep.astype(np.float64)
    known = (rows.gold != NONE).astype(np.float64)
    right = (rows.gold == rows.label).astype(np.float64)
    unsure = np.zeros(len(rows)) if uncertainty is None else uncertainty
    measures = {
        "rows": np.ones(len(rows)),
        "kept": kept,
        "confidence": rows.confidence,
        "confidence_kept": rows.confidence * kept,
        "uncertainty": unsure,
        "uncertainty_kept": unsure * kept,
        "known": known,
        "known_kept": known * kept,
        "right": right,
        "right_kept": right * kept,
    }
    per_class = [
        np.bincount(rows.label, weights=measure, minlength=len(label_names))
        for measure in measures.values()
    ]
    sums = dict(zip(measures, all_reduce(np.stack(per_class)), strict=True))
    return [
        {
            "epoch": epoch,
            "label": name,
            **_class_row({key: float(values[y]) for key, values in sums.items()}),
            "teacher_threshold": _number(selection.teacher_thresholds[y]),
            "student_threshold": _number(selection.student_thresholds[y]),
        }
        | (
            {}
            if uncertainty is not None
            else {"uncertainty_kept": None, "uncertainty_dropped": None}
        )
        for y, name in enumerate(label_names)
    ]


def _class_row(of: dict[str, float]) -> dict[str, Any]:
    dropped = of["rows"] - of["kept"]
    return {
        "rows": int(of["rows"]),
        "kept": int(of["kept"]),
        "confidence_kept": _ratio(of["confidence_kept"], of["kept"]),
        "confidence_dropped": _ratio(of["confidence"] - of["confidence_kept"], dropped),
        "uncertainty_kept": _ratio(of["uncertainty_kept"], of["kept"]),
        "uncertainty_dropped": _ratio(of["uncertainty"] - of["uncertainty_kept"], dropped),
        "purity_kept": _ratio(of["right_kept"], of["known_kept"]),
        "purity_all": _ratio(of["right"], of["known"]),
    }


def score_validation(
    gold: Ints, predicted: Ints, num_classes: int, *, all_reduce: AllReduce
) -> tuple[float, float] | None:
    """Return accuracy and macro-F1 over all workers, or None when there is no row.

    Every worker must call this at the same time, with the gold and prediction of its own rows.
    """
    cells = np.bincount(gold * num_classes + predicted, minlength=num_classes**2)
    confusion = all_reduce(cells.astype(np.float64)).astype(np.int64)
    if not confusion.sum():
        return None
    # The table back as rows, so that the formulas stay in one place.
    every_gold, every_predicted = np.divmod(
        np.repeat(np.arange(num_classes**2), confusion), num_classes
    )
    return (
        accuracy(every_gold, every_predicted),
        macro_f1(every_gold, every_predicted, num_classes),
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
