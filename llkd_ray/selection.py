"""The method: which rows the student trains on, and at what weight.

Source: "Learning with Less: Knowledge Distillation from Large Language Models via Unlabeled Data"
(LLKD, arXiv 2411.08028): train on the rows where the teacher is confident and the student is
uncertain, by moving class-wise thresholds, and weight what is kept. The form of the thresholds is
our reading, shaped after FreeMatch (arXiv 2205.07246), the same for both signals:

    m_t      = mean of the signal over all rows
    m_t(y)   = mean of the signal over the rows with label y
    g_t      = lambda g_{t-1} + (1 - lambda) m_t
    k_t(y)   = lambda k_{t-1}(y) + (1 - lambda) m_t(y)
    tau_t(y) = g_t * k_t(y) / max_y' k_t(y')
    keep_i   = [c_i >= tau^teacher_t(y_i)] and [u_i >= tau^student_t(y_i)]

The first time g and k are the means themselves; a class without rows keeps its last value.

Rows may lie with any number of workers: class sums go through an injected all-reduce. Signals are
rounded to multiples of 2**-20 first, so their float64 sums are exact, whatever the order, and one
worker or many derive the same thresholds to the last bit.

Shape legend: N rows of this worker, C classes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt

from llkd_ray.config import AllRule, LLKDRule

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
AllReduce = Callable[[Floats], Floats]
"""Sums an array over the workers and returns the sum to each of them."""

# Fine enough that no threshold notices, coarse enough that 2**33 rows still sum exactly.
_GRID = float(2**20)


@dataclass(frozen=True)
class MovingLevels:
    """Moving averages of one signal."""

    overall: float | None
    """g, over all rows; None before the first rows."""
    per_class: tuple[float | None, ...]
    """k(y); None for a class that never had a row."""


@dataclass(frozen=True)
class SelectionState:
    """What the next epoch's thresholds depend on."""

    teacher: MovingLevels
    student: MovingLevels

    @classmethod
    def start(cls, num_classes: int) -> "SelectionState":
        """Return the state before the first epoch."""
        levels = MovingLevels(None, (None,) * num_classes)
        return cls(levels, levels)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types, from which `from_json` gives back the same state exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "SelectionState":
        """Undo `to_json`."""
        return cls(
            *(
                MovingLevels(tree[name]["overall"], tuple(tree[name]["per_class"]))
                for name in ("teacher", "student")
            )
        )


@dataclass(frozen=True)
class Selection:
    """One epoch's choice among the rows of this worker."""

    keep: Bools
    """[N], true for the rows to train on."""
    weight: Floats
    """[N], at least 0; weight in the loss of a kept row, 0 for a dropped one."""
    state: SelectionState
    teacher_thresholds: Floats
    """[C], NaN where the rule has none, or no row of the class was ever seen."""
    student_thresholds: Floats
    """[C], likewise."""


def uncertainty(probabilities: npt.NDArray[np.floating[Any]]) -> Floats:
    """Return the entropy of each row's distribution over the entropy of a uniform one.

    Args:
        probabilities: [N, C], rows sum to 1, C at least 2.

    Returns:
        [N], from 0 (certain) to 1 (clueless).
    """
    p: Floats = probabilities.astype(np.float64)
    # 0 ln 0 is 0; a softmax in float32 does underflow to 0.
    surprise = -np.log(p, out=np.zeros_like(p), where=p > 0)
    entropy: Floats = (p * surprise).sum(axis=1) / np.log(p.shape[1])
    return entropy.clip(0.0, 1.0)


def needs_student(rule: LLKDRule | AllRule) -> bool:
    """Return whether a rule asks for the student's uncertainty, that is, for a scoring pass."""
    match rule:
        case LLKDRule():
            return True
        case AllRule():
            return False
        case _:
            assert_never(rule)


def select(
    rule: LLKDRule | AllRule,
    state: SelectionState,
    labels: Ints,
    confidence: Floats,
    uncertainty: Floats | None,
    *,
    all_reduce: AllReduce,
) -> Selection:
    """Choose the rows of one epoch.

    Every worker must call this at the same time: it sums over workers.

    Args:
        rule: Which rows to keep, with its settings.
        state: After the epoch before.
        labels: [N], the teacher's label of each row, 0 to C - 1.
        confidence: [N], the teacher's probability of that label, 0 to 1.
        uncertainty: [N], of the student, 0 to 1; None is fine where `needs_student` is false.
        all_reduce: Sum over the workers.

    Returns:
        The choice, with thresholds and state the same on every worker.
    """
    match rule:
        case LLKDRule():
            assert uncertainty is not None, "llkd selects by the student's uncertainty"
            return _select_llkd(rule, state, labels, confidence, uncertainty, all_reduce=all_reduce)
        case AllRule():
            none = np.full(len(state.teacher.per_class), np.nan)
            keep = np.ones(len(labels), dtype=np.bool_)
            return Selection(keep, keep.astype(np.float64), state, none, none)
        case _:
            assert_never(rule)


def _select_llkd(
    rule: LLKDRule,
    state: SelectionState,
    labels: Ints,
    confidence: Floats,
    uncertainty: Floats,
    *,
    all_reduce: AllReduce,
) -> Selection:
    c, u = _on_grid(confidence), _on_grid(uncertainty)
    num_classes = len(state.teacher.per_class)
    sums = all_reduce(
        np.stack(
            [
                np.bincount(labels, minlength=num_classes).astype(np.float64),
                np.bincount(labels, weights=c, minlength=num_classes),
                np.bincount(labels, weights=u, minlength=num_classes),
            ]
        )
    )
    teacher = _advance(state.teacher, sums[0], sums[1], rule.teacher_decay)
    student = _advance(state.student, sums[0], sums[2], rule.student_decay)
    teacher_thresholds, student_thresholds = _thresholds(teacher), _thresholds(student)
    keep = (c >= teacher_thresholds[labels]) & (u >= student_thresholds[labels])
    return Selection(
        keep=keep,
        weight=np.where(keep, _weight(rule, c, u), 0.0),
        state=SelectionState(teacher, student),
        teacher_thresholds=teacher_thresholds,
        student_thresholds=student_thresholds,
    )


def _on_grid(signal: Floats) -> Floats:
    return np.round(signal * _GRID) / _GRID


def _advance(levels: MovingLevels, rows: Floats, sums: Floats, decay: float) -> MovingLevels:
    """Move the averages of one signal by one epoch; rows and sums per class, [C]."""
    if rows.sum() == 0:
        return levels
    return MovingLevels(
        _move(levels.overall, float(sums.sum() / rows.sum()), decay),
        tuple(
            _move(last, float(total / count), decay) if count else last
            for last, count, total in zip(levels.per_class, rows, sums, strict=True)
        ),
    )


def _move(last: float | None, mean: float, decay: float) -> float:
    # Written so that a mean that stays does not move: one bit up would drop a class of equal rows.
    return mean if last is None else mean + decay * (last - mean)


def _thresholds(levels: MovingLevels) -> Floats:
    """Return tau [C]: the overall level, scaled down for the classes with a lower level."""
    per_class = np.array([np.nan if k is None else k for k in levels.per_class])
    if levels.overall is None:
        return per_class
    top = np.nanmax(per_class)
    # A signal that is 0 everywhere has all its classes at the top.
    share = per_class / top if top > 0 else np.where(np.isnan(per_class), np.nan, 1.0)
    return share * levels.overall


def _weight(rule: LLKDRule, confidence: Floats, uncertainty: Floats) -> Floats:
    match rule.weight:
        case "product":
            return confidence * uncertainty
        case "sum":
            return confidence + uncertainty
        case "confidence":
            return confidence
        case "uncertainty":
            return uncertainty
        case "one":
            return np.ones_like(confidence)
        case _:
            assert_never(rule.weight)
