"""The rules: LLKD, its ablations, and the baselines of the field, in one shape.

Source of `llkd`: "Learning with Less: Knowledge Distillation from Large Language Models via
Unlabeled Data" (arXiv 2411.08028): train on the rows where the teacher is confident and the student
is uncertain, by moving class-wise thresholds, and weight what is kept:

    keep_i = [c_i >= tau^teacher_t(y_i)] and [u_i >= tau^student_t(y_i)]

with c the teacher's confidence, u the student's uncertainty and the thresholds of `thresholds.py`.
Every rule is a pure function of signals and state; rows may lie with any number of workers.

Shape legend: N rows of this worker, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import assert_never

import numpy as np

from llkd_ray.config import (
    AllRule,
    ConfidentLearningRule,
    FixedRule,
    FlexMatchRule,
    FreeMatchRule,
    GoldRule,
    JointRule,
    LLKDRule,
    RandomRule,
    Rule,
    StudentOnlyRule,
    TeacherOnlyRule,
    TopFractionRule,
)
from llkd_ray.selection.signals import (
    GRID,
    NONE,
    AllReduce,
    Bools,
    Floats,
    Ints,
    Signals,
    class_sums,
    hashed,
    on_grid,
)
from llkd_ray.selection.thresholds import SelectionState, cuts


@dataclass(frozen=True)
class Selection:
    """The choice among the rows of this worker."""

    keep: Bools
    """[N], true for the rows to train on."""
    weight: Floats
    """[N], at least 0; weight in the loss of a kept row, 0 for a dropped one."""
    target: Ints
    """[N], the class to train towards: the teacher's label, but for the rule `gold`."""
    state: SelectionState
    thresholds: Mapping[str, Floats] = field(default_factory=dict)
    """[C] by signal: teacher, student, joint; NaN where no row of the class was ever seen."""


def needs_student(rule: Rule, epoch: int) -> bool:
    """Return whether a rule asks for the student's answers, that is, for a scoring pass."""
    match rule:
        case AllRule() | RandomRule() | TeacherOnlyRule() | GoldRule():
            return False
        case JointRule() | ConfidentLearningRule():
            return epoch > 1
        case TopFractionRule():
            return not (rule.by == "confidence" and rule.weight in {"confidence", "one"})
        case LLKDRule() | StudentOnlyRule() | FixedRule() | FreeMatchRule() | FlexMatchRule():
            return True
        case _:
            assert_never(rule)


def select(  # noqa: C901, PLR0912 - one arm for each rule.
    rule: Rule,
    state: SelectionState,
    signals: Signals,
    *,
    seed: int,
    epoch: int,
    all_reduce: AllReduce,
) -> Selection:
    """Choose among the rows of an epoch, or of a step.

    Every worker must call this at the same time: it sums over workers.

    Args:
        rule: Which rows to keep, with its settings.
        state: After the choice before.
        signals: Of the N rows; without the student's answers where `needs_student` is false.
        seed: Of the rule `random`.
        epoch: From 1.
        all_reduce: Sum over the workers.

    Returns:
        The choice, with thresholds and state the same on every worker.
    """
    match rule:
        case LLKDRule():
            return _llkd(rule, state, signals, all_reduce)
        case AllRule():
            return _kept(np.ones(len(signals), dtype=np.bool_), signals, state)
        case RandomRule():
            return _random(rule, state, signals, all_reduce, salt=(seed, epoch))
        case TeacherOnlyRule():
            return _one_sided(
                ("teacher", signals.confidence),
                0.0,  # From epoch to epoch the teacher's signals are the same.
                state,
                signals,
                all_reduce,
                weight=rule.weight,
            )
        case StudentOnlyRule():
            return _one_sided(
                ("student", signals.uncertainty),
                rule.student_decay,
                state,
                signals,
                all_reduce,
                weight=rule.weight,
            )
        case FixedRule():
            keep = (signals.confidence >= rule.teacher_threshold) & (
                signals.uncertainty >= rule.student_threshold
            )
            return _kept(keep, signals, state, weight=rule.weight)
        case TopFractionRule():
            score = _score(rule, signals, all_reduce)
            keep = score >= _share_cuts(score, rule.fraction, signals, all_reduce)[signals.label]
            return _kept(keep, signals, state, weight=rule.weight)
        case FreeMatchRule():
            return _freematch(rule, state, signals, all_reduce)
        case FlexMatchRule():
            return _flexmatch(rule, state, signals, all_reduce)
        case ConfidentLearningRule():
            return _confident_learning(state, signals, all_reduce, epoch)
        case JointRule():
            return _joint(rule, state, signals, all_reduce, epoch)
        case GoldRule():
            known = signals.gold != NONE
            target = np.where(known, signals.gold, signals.label)
            return Selection(known, known.astype(np.float64), target, state)
        case _:
            assert_never(rule)


def balanced(selection: Selection, num_classes: int, *, all_reduce: AllReduce) -> Selection:
    """Return the selection with weights scaled so that each class has the same share of them.

    Every worker must call this at the same time.
    """
    target, weight = selection.target, selection.weight
    sums = all_reduce(class_sums(target, num_classes, weight)[1])
    scale = np.divide(sums.sum(), sums, out=np.zeros_like(sums), where=sums > 0)
    return replace(selection, weight=weight * scale[target])


def _llkd(
    rule: LLKDRule, state: SelectionState, signals: Signals, all_reduce: AllReduce
) -> Selection:
    c, u, num_classes = signals.confidence, signals.uncertainty, signals.num_classes
    of_class = class_sums(signals.label, num_classes, c, u)
    if rule.class_term == "within_class":
        rows, of_c, of_u = all_reduce(of_class)
        teacher = state.of("teacher", num_classes).moved(rows, of_c, rule.teacher_decay)
        student = state.of("student", num_classes).moved(rows, of_u, rule.student_decay)
    else:
        of_p, of_q = signals.teacher_sums, signals.student_sums
        rows, of_c, of_u, of_p, of_q = all_reduce(np.vstack([of_class, of_p, of_q]))
        total = rows.sum()
        if not total:
            return _kept(np.zeros(0, dtype=np.bool_), signals, state)
        teacher = state.of("teacher", num_classes).moved_to(
            float(of_c.sum() / total), of_p / total, rule.teacher_decay
        )
        student = state.of("student", num_classes).moved_to(
            float(of_u.sum() / total), of_q / total, rule.student_decay
        )
    thresholds = {"teacher": teacher.thresholds(), "student": student.thresholds()}
    keep = (c >= thresholds["teacher"][signals.label]) & (u >= thresholds["student"][signals.label])
    return _kept(
        keep,
        signals,
        state.with_levels(teacher=teacher, student=student),
        thresholds,
        weight=rule.weight,
    )


def _one_sided(
    named: tuple[str, Floats],
    decay: float,
    state: SelectionState,
    signals: Signals,
    all_reduce: AllReduce,
    *,
    weight: str,
) -> Selection:
    """Keep the rows whose one signal reaches its class's moving threshold."""
    name, signal = named
    rows, sums = all_reduce(class_sums(signals.label, signals.num_classes, signal))
    levels = state.of(name, signals.num_classes).moved(rows, sums, decay)
    threshold = levels.thresholds()
    return _kept(
        signal >= threshold[signals.label],
        signals,
        state.with_levels(**{name: levels}),
        {name: threshold},
        weight=weight,
    )


def _random(
    rule: RandomRule,
    state: SelectionState,
    signals: Signals,
    all_reduce: AllReduce,
    *,
    salt: tuple[int, int],
) -> Selection:
    score = hashed(signals.keys, *salt)
    total = float(all_reduce(np.array([float(len(signals))]))[0])
    epoch = salt[1]
    wanted = (
        float(rule.kept[min(epoch, len(rule.kept)) - 1])
        if rule.kept
        else np.ceil(rule.fraction * total)
    )
    one_class = np.zeros(len(signals), dtype=np.int64)
    cut = cuts(score, one_class, np.array([wanted]), all_reduce=all_reduce)[0]
    # A cut keeps a row at least.
    return _kept((score >= cut) & (wanted > 0), signals, state)


def _score(rule: TopFractionRule, signals: Signals, all_reduce: AllReduce) -> Floats:
    match rule.by:
        case "product":
            return on_grid(signals.confidence * signals.uncertainty)
        case "confidence":
            return signals.confidence
        case "uncertainty":
            return signals.uncertainty
        case "agreement":
            return _agreement(signals, all_reduce)
        case _:
            assert_never(rule.by)


def _share_cuts(score: Floats, fraction: float, signals: Signals, all_reduce: AllReduce) -> Floats:
    """Return for each class the cut that keeps a share of its rows, [C]."""
    rows = all_reduce(class_sums(signals.label, signals.num_classes)[0])
    return cuts(score, signals.label, np.ceil(fraction * rows), all_reduce=all_reduce)


def _freematch(
    rule: FreeMatchRule, state: SelectionState, signals: Signals, all_reduce: AllReduce
) -> Selection:
    """ArXiv 2205.07246, Eq. 5 to 8 as we read them; epochs stand for its batches."""
    confidence, num_classes = signals.student_confidence, signals.num_classes
    sums = all_reduce(np.array([len(signals), confidence.sum(), *signals.student_sums], np.float64))
    if not sums[0]:
        return _kept(np.zeros(0, dtype=np.bool_), signals, state)
    levels = state.of("student", num_classes).moved_to(
        float(sums[1] / sums[0]), sums[2:] / sums[0], rule.decay
    )
    threshold = levels.thresholds()
    return _kept(
        confidence >= threshold[signals.predicted],
        signals,
        state.with_levels(student=levels),
        {"probability": threshold},
    )


def _flexmatch(
    rule: FlexMatchRule, state: SelectionState, signals: Signals, all_reduce: AllReduce
) -> Selection:
    """ArXiv 2110.08263: T(y) = M(beta(y)) tau with M(x) = x / (2 - x), and its warm-up."""
    confidence, predicted = signals.student_confidence, signals.predicted
    rows, learned = all_reduce(
        class_sums(predicted, signals.num_classes, (confidence >= rule.threshold).astype(float))
    )
    # Rows that no class has learned yet hold all thresholds down, at first to zero.
    beta = learned / max(learned.max(), rows.sum() - learned.sum(), 1.0)
    threshold = beta / (2 - beta) * rule.threshold
    return _kept(confidence >= threshold[predicted], signals, state, {"probability": threshold})


def _confident_learning(
    state: SelectionState, signals: Signals, all_reduce: AllReduce, epoch: int
) -> Selection:
    """ArXiv 1911.00068: drop the off-diagonals of the confident joint.

    A class's threshold is the mean of the student's probability of it over the rows that the
    teacher gave this label; the student's guess is its most probable class among those that reach
    their threshold. A row whose label the student gives too is never dropped.
    """
    if epoch == 1:
        return _kept(np.ones(len(signals), dtype=np.bool_), signals, state)
    rows, sums = all_reduce(
        class_sums(signals.label, signals.num_classes, signals.student_of_label)
    )
    threshold = np.divide(sums, rows, out=np.full(len(rows), np.nan), where=rows > 0)
    keep: Bools = signals.predicted == signals.label
    for block, q in signals.student_blocks():
        reached = q >= np.nan_to_num(threshold, nan=np.inf)
        guess = np.where(reached, q, -1.0).argmax(axis=1)
        keep[block] |= (guess == signals.label[block]) | ~reached.any(axis=1)
    return _kept(keep, signals, state, {"probability": threshold})


def _joint(
    rule: JointRule,
    state: SelectionState,
    signals: Signals,
    all_reduce: AllReduce,
    epoch: int,
) -> Selection:
    if epoch == 1:
        # The student knows nothing yet, and is not asked.
        named, weight = ("teacher", signals.confidence), "one"
    else:
        named, weight = ("joint", _agreement(signals, all_reduce)), rule.weight
    chosen = _one_sided(named, rule.decay, state, signals, all_reduce, weight=weight)
    if rule.fraction is None:
        return chosen
    name, signal = named
    cut = _share_cuts(signal, rule.fraction, signals, all_reduce)
    thresholds = {name: np.fmax(chosen.thresholds[name], cut)}
    keep = signal >= thresholds[name][signals.label]
    return _kept(keep, signals, chosen.state, thresholds, weight=weight)


def _agreement(signals: Signals, all_reduce: AllReduce) -> Floats:
    """Return how probable the teacher's label is to both models together, [N].

    The product of teacher and student, each class divided by the student's mean probability of it
    (else frequent classes win twice), normalized over the classes.
    """
    sums = all_reduce(np.array([float(len(signals)), *signals.student_sums]))
    prior = np.maximum(sums[1:] / max(sums[0], 1.0), 1 / GRID)
    chosen, total = np.empty(len(signals)), np.empty(len(signals))
    for block, q in signals.student_blocks():
        product = signals.teacher[block].astype(np.float64) * (q / prior)
        of_label = np.take_along_axis(product, signals.label[block, None], axis=1)
        chosen[block], total[block] = of_label[:, 0], product.sum(axis=1)
    return on_grid(np.divide(chosen, total, out=np.zeros_like(chosen), where=total > 0))


def _kept(
    keep: Bools,
    signals: Signals,
    state: SelectionState,
    thresholds: Mapping[str, Floats] | None = None,
    *,
    weight: str = "one",
) -> Selection:
    return Selection(
        keep=keep,
        weight=np.where(keep, _weight(weight, signals), 0.0),
        target=signals.label,
        state=state,
        thresholds=thresholds or {},
    )


def _weight(form: str, signals: Signals) -> Floats:
    match form:
        case "product":
            return signals.confidence * signals.uncertainty
        case "sum":
            return signals.confidence + signals.uncertainty
        case "confidence":
            return signals.confidence
        case "uncertainty":
            return signals.uncertainty
        case _:
            return np.ones(len(signals))
