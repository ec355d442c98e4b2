"""Which epoch is the best, by gold or without it.

Shape legend: N rows of this worker, C classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llkd_ray.config import StoppingSection
from llkd_ray.metrics import accuracy, macro_f1
from llkd_ray.selection import AllReduce, Bools, Ints, Keys, Signals, cuts, hashed
from llkd_ray.student.batches import Rows

SCORE = "score"
"""Key of an epoch's row of schema.EPOCHS that the best epoch has most of."""


def held_out(keys: Keys, fraction: float, seed: int) -> Bools:
    """Return which rows are kept from training, [N]; by row id alone, whoever holds the row."""
    apart: Bools = hashed(keys, seed) < fraction
    return apart


def surest_half(rows: Rows, *, all_reduce: AllReduce) -> Bools:
    """Return the half of each class, over all workers, whose label the teacher is surest of."""
    signals = Signals(rows.keys, rows.label, rows.gold, rows.teacher, None)
    of_class = all_reduce(np.bincount(rows.label, minlength=signals.num_classes).astype(float))
    cut = cuts(signals.confidence, rows.label, np.ceil(of_class / 2), all_reduce=all_reduce)
    surest: Bools = signals.confidence >= cut[rows.label]
    return surest


def first_rows(keys: Keys, most: int, *, all_reduce: AllReduce) -> Bools:
    """Return at most about so many rows over all workers, the same ones however they lie."""
    one_class = np.zeros(len(keys), dtype=np.int64)
    score = hashed(keys, 0)
    cut = cuts(score, one_class, np.array([float(most)]), all_reduce=all_reduce)
    first: Bools = score >= cut[0]
    return first


def agreement(
    truth: Ints, predicted: Ints, num_classes: int, *, all_reduce: AllReduce
) -> tuple[float, float] | None:
    """Return accuracy and macro-F1 over all workers, or None when there is no row.

    Every worker must call this at the same time, with the truth and prediction of its own rows.
    """
    cells = np.bincount(truth * num_classes + predicted, minlength=num_classes**2)
    confusion = all_reduce(cells.astype(np.float64)).astype(np.int64)
    if not confusion.sum():
        return None
    # The table back as rows, so that the formulas stay in one place.
    every_truth, every_predicted = np.divmod(
        np.repeat(np.arange(num_classes**2), confusion), num_classes
    )
    return (
        accuracy(every_truth, every_predicted),
        macro_f1(every_truth, every_predicted, num_classes),
    )


def criterion(section: StoppingSection, *, has_gold: bool) -> str:
    """Return which column of schema.EPOCHS is the score, or `last` for none of them."""
    by_gold, by_teacher = "validation_macro_f1", "held_out_macro_f1"
    match section.choose_by:
        case "gold":
            return by_gold
        case "teacher":
            return by_teacher
        case "last":
            return "last"
        case "auto":
            return by_gold if has_gold else by_teacher if section.held_out_fraction else "last"


def best_of(scores: Sequence[float | None]) -> int:
    """Return the position of the best score, of equal ones the last; the last without any.

    On few rows equal scores are frequent, and the later epoch has learned longer, at a lower rate.
    """
    return max(range(len(scores)), key=lambda at: (scores[at] is not None, scores[at] or 0.0, at))


def should_stop(epochs: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Return whether the score has not risen for so many epochs; never, where there is none."""
    scores = [row[SCORE] for row in epochs]
    if patience is None or all(score is None for score in scores):
        return False
    rose = scores.index(scores[best_of(scores)])
    return len(scores) - 1 - rose >= patience
