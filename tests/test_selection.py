"""Every rule, alone and over many workers, against a second implementation."""

import json
import math
import threading

import numpy as np
import pytest
from cleanlab.filter import find_label_issues

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
    StudentOnlyRule,
    TeacherOnlyRule,
    TopFractionRule,
)
from llkd_ray.selection import (
    NONE,
    SelectionState,
    Signals,
    balanced,
    cuts,
    needs_student,
    select,
    uncertainty,
)

C = 5
RULES = [
    LLKDRule(teacher_decay=0.7, student_decay=0.3),
    LLKDRule(class_term="mean_probability"),
    AllRule(),
    RandomRule(fraction=0.3),
    RandomRule(kept=(50, 20)),
    TeacherOnlyRule(),
    StudentOnlyRule(),
    FixedRule(teacher_threshold=0.5, student_threshold=0.3),
    *(TopFractionRule(by=by) for by in ("product", "confidence", "uncertainty", "agreement")),
    FreeMatchRule(),
    FlexMatchRule(threshold=0.6),
    ConfidentLearningRule(),
    JointRule(decay=0.5),
    JointRule(fraction=0.2),
    GoldRule(),
]
IDS = [
    f"{rule.rule}-{at}" for at, rule in enumerate(RULES)
]  # fmt: skip


def alone(sums):
    return sums


def drawn(seed, rows=400, classes=C):
    """Rows of a teacher and a student that are often sure, and more often right than not."""
    rng = np.random.default_rng(seed)
    gold = rng.choice(classes, rows, p=rng.dirichlet(np.ones(classes) * 3))
    teacher, student = (rng.dirichlet(np.ones(classes) * 0.6, rows) for _ in range(2))
    for p, strength in ((teacher, 1.0), (student, 2.0)):
        p[np.arange(rows), gold] += strength * rng.random(rows)
    teacher, student = (p / p.sum(axis=1, keepdims=True) for p in (teacher, student))
    return signals_of(
        teacher, student, gold=np.where(rng.random(rows) < 0.8, gold, NONE), seed=seed
    )


def signals_of(teacher, student, *, gold=None, label=None, seed=0):
    teacher = np.asarray(teacher, dtype=np.float32)
    rows = len(teacher)
    return Signals(
        keys=np.random.default_rng(seed).integers(0, 2**63, rows).astype(np.uint64),
        label=teacher.argmax(axis=1) if label is None else np.asarray(label),
        gold=np.full(rows, NONE) if gold is None else gold.astype(np.int64),
        teacher=teacher,
        student=None if student is None else np.asarray(student, dtype=np.float32),
    )


def two_class(confidence, unsure):
    """Rows with label 0 of this confidence, and of about this uncertainty."""
    q = [0.5 if u == 1 else u / 4 for u in unsure]
    return signals_of(
        [[c, 1 - c] for c in confidence],
        [[1 - x, x] for x in q],
        label=np.zeros(len(confidence), np.int64),
    )


def part(signals, mine):
    return Signals(
        signals.keys[mine],
        signals.label[mine],
        signals.gold[mine],
        signals.teacher[mine],
        None if signals.student is None else signals.student[mine],
    )


def chosen_by(rule, state, signals, epoch=1, all_reduce=alone):
    return select(rule, state, signals, seed=1, epoch=epoch, all_reduce=all_reduce)


def sharded(rule, states, signals, owner, epoch):
    """Run `select` on real threads whose all-reduce sums over all of them, in random order."""
    workers = len(states)
    slots, results = [None] * workers, [None] * workers
    barrier = threading.Barrier(workers)

    def work(rank):
        def all_reduce(sums):
            slots[rank] = sums
            barrier.wait()
            order = np.random.default_rng(rank).permutation(workers)
            total = sum(slots[other] for other in order)
            barrier.wait()
            return total

        mine = part(signals, owner == rank)
        results[rank] = chosen_by(rule, states[rank], mine, epoch, all_reduce)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_any_number_of_workers_keeps_the_same_rows_to_the_last_bit(rule, workers):
    single, states = SelectionState(), [SelectionState()] * workers
    for epoch in range(1, 4):
        signals = drawn(epoch, rows=1000)
        owner = np.random.default_rng(epoch).integers(0, workers, len(signals))
        if epoch == 3:
            owner[:] = 0  # The others have no row, and still take part.
        whole = chosen_by(rule, single, signals, epoch)
        parts = sharded(rule, states, signals, owner, epoch)
        single, states = whole.state, [of.state for of in parts]
        for rank, of in enumerate(parts):
            assert of.state == whole.state
            assert {name: tau.tobytes() for name, tau in of.thresholds.items()} == {
                name: tau.tobytes() for name, tau in whole.thresholds.items()
            }
            assert (of.keep == whole.keep[owner == rank]).all()
            assert (of.weight == whole.weight[owner == rank]).all()
            assert (of.target == whole.target[owner == rank]).all()


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_every_rule_weighs_what_it_keeps_and_nothing_else(rule):
    state = SelectionState()
    for epoch in (1, 2):
        signals = drawn(epoch)
        chosen = chosen_by(rule, state, signals, epoch)
        state = chosen.state
        assert 0 < chosen.keep.sum() <= len(signals)
        assert (chosen.weight[~chosen.keep] == 0).all()
        assert (chosen.weight[chosen.keep] > 0).mean() > 0.95
        assert np.isfinite(chosen.weight).all()
        if rule.rule != "gold":
            assert (chosen.target == signals.label).all()


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_every_rule_holds_for_no_rows_at_all_and_for_rows_all_alike(rule):
    nothing = part(drawn(0, classes=2), np.zeros(400, dtype=np.bool_))
    state = chosen_by(rule, SelectionState(), nothing).state
    alike = signals_of([[0.7, 0.3]] * 9, [[0.6, 0.4]] * 9, gold=np.zeros(9))
    for epoch in range(1, 5):
        chosen = chosen_by(rule, state, alike, epoch)
        state = chosen.state
        if rule.rule not in {"random", "fixed"}:
            assert chosen.keep.all()


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_a_rule_that_does_not_need_the_student_does_without(rule):
    if not needs_student(rule, 1):
        signals = drawn(1)
        without = Signals(signals.keys, signals.label, signals.gold, signals.teacher, None)
        kept = chosen_by(rule, SelectionState(), without).keep
        assert (kept == chosen_by(rule, SelectionState(), signals).keep).all()
    else:
        assert needs_student(rule, 2)


def test_uncertainty_is_0_for_a_certain_row_and_1_for_a_clueless_one():
    probabilities = np.array([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0]], dtype=np.float32)
    expected = [0, 1, math.log(2) / math.log(3)]
    np.testing.assert_allclose(uncertainty(probabilities), expected, atol=1e-6)


class Naive:
    """The formulas of the method's page, row by row, in plain Python."""

    def __init__(self, classes, decays):
        self.classes = classes
        self.decays = decays
        self.overall = [None, None]
        self.per_class = [[None] * classes, [None] * classes]

    def thresholds(self, labels, signals):
        taus = []
        for s, (signal, decay) in enumerate(zip(signals, self.decays, strict=True)):
            mean = sum(signal) / len(signal)
            last = self.overall[s]
            self.overall[s] = mean if last is None else decay * last + (1 - decay) * mean
            for y in range(self.classes):
                mine = [value for value, label in zip(signal, labels, strict=True) if label == y]
                if mine:
                    mean, last = sum(mine) / len(mine), self.per_class[s][y]
                    self.per_class[s][y] = (
                        mean if last is None else decay * last + (1 - decay) * mean
                    )
            top = max(k for k in self.per_class[s] if k is not None)
            taus.append([k if k is None else k / top * self.overall[s] for k in self.per_class[s]])
        return taus


@pytest.mark.parametrize("decays", [(0.9, 0.0), (0.0, 0.9), (0.5, 0.5)])
@pytest.mark.parametrize("seed", range(3))
def test_llkd_agrees_with_a_naive_second_implementation_over_epochs(seed, decays):
    rule = LLKDRule(teacher_decay=decays[0], student_decay=decays[1])
    state, naive = SelectionState(), Naive(C, decays)
    for epoch in range(1, 6):
        signals = drawn(100 * seed + epoch)
        c = signals.teacher.max(axis=1).astype(float)
        u = uncertainty(signals.student)
        chosen = chosen_by(rule, state, signals, epoch)
        state = chosen.state
        tau_teacher, tau_student = naive.thresholds(signals.label, (c, u))
        np.testing.assert_allclose(chosen.thresholds["teacher"], tau_teacher, atol=2e-6)
        np.testing.assert_allclose(chosen.thresholds["student"], tau_student, atol=2e-6)
        for i, y in enumerate(signals.label):
            if min(abs(c[i] - tau_teacher[y]), abs(u[i] - tau_student[y])) > 4e-6:
                assert chosen.keep[i] == (c[i] >= tau_teacher[y] and u[i] >= tau_student[y])


def test_llkd_keeps_rows_the_teacher_is_sure_of_and_the_student_is_not():
    signals = two_class([0.9, 0.9, 0.3, 0.3], [0.8, 0.1, 0.8, 0.1])
    assert chosen_by(LLKDRule(), SelectionState(), signals).keep.tolist() == [
        True,
        False,
        False,
        False,
    ]


def test_a_class_the_teacher_is_less_sure_of_gets_a_lower_threshold():
    teacher = [[0.9, 0.1, 0], [0.7, 0.3, 0], [0.25, 0.5, 0.25], [0.35, 0.3, 0.35]]
    signals = signals_of(teacher, [[0.5, 0.3, 0.2]] * 4, label=[0, 0, 1, 1])
    chosen = chosen_by(LLKDRule(), SelectionState(), signals)
    np.testing.assert_allclose(chosen.thresholds["teacher"][:2], [0.6, 0.3], atol=1e-5)


def test_a_class_without_rows_keeps_its_last_level_and_never_makes_nan_of_the_others():
    rule = LLKDRule(teacher_decay=0.5)
    student = [[1 / 3] * 3] * 2
    both = signals_of([[0.8, 0.1, 0.1], [0.3, 0.4, 0.3]], student)
    first = chosen_by(rule, SelectionState(), both)
    assert np.isnan(first.thresholds["teacher"]).tolist() == [False, False, True]
    one = signals_of([[0.6, 0.2, 0.2]], student[:1])
    second = chosen_by(rule, first.state, one)
    assert second.state.of("teacher", 3).per_class == pytest.approx((0.7, 0.4, None), abs=1e-5)
    assert not np.isnan(second.thresholds["teacher"][:2]).any()


def test_a_student_that_is_certain_of_everything_divides_by_nothing():
    signals = signals_of([[0.6, 0.4]] * 3, [[1.0, 0.0]] * 3)
    chosen = chosen_by(LLKDRule(), SelectionState(), signals)
    assert (chosen.thresholds["student"][0] == 0).all()
    assert chosen.weight.sum() == 0


@pytest.mark.parametrize(
    ("form", "expected"),
    [("product", 0.75), ("sum", 1.75), ("confidence", 0.75), ("uncertainty", 1.0), ("one", 1.0)],
)
def test_weighs_a_kept_row_by_the_chosen_form_and_a_dropped_one_by_nothing(form, expected):
    signals = signals_of([[0.75, 0.25], [0.55, 0.45]], [[0.5, 0.5]] * 2)
    chosen = chosen_by(LLKDRule(weight=form), SelectionState(), signals)
    assert chosen.weight.tolist() == [expected, 0.0]


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_the_state_survives_json_to_the_last_bit(rule):
    state = chosen_by(rule, SelectionState(), drawn(3)).state
    assert SelectionState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_random_draws_other_rows_each_epoch_and_as_many_as_asked_for():
    signals = drawn(4, rows=2000)
    first, second = (
        chosen_by(RandomRule(fraction=0.25), SelectionState(), signals, epoch).keep
        for epoch in (1, 2)
    )
    assert first.sum() == second.sum() == 500
    assert 60 < (first & second).sum() < 190
    counted = RandomRule(kept=(30, 70))
    kept = [chosen_by(counted, SelectionState(), signals, epoch).keep.sum() for epoch in (1, 2, 3)]
    assert kept == [30, 70, 70]
    # As another run does whose student has become sure of every row.
    assert not chosen_by(RandomRule(kept=(30, 0)), SelectionState(), signals, 2).keep.any()


@pytest.mark.parametrize("by", ["product", "confidence", "uncertainty", "agreement"])
def test_top_fraction_keeps_the_best_share_of_every_class(by):
    signals = drawn(5, rows=1000)
    chosen = chosen_by(TopFractionRule(by=by, fraction=0.25), SelectionState(), signals, 2)
    for y in range(C):
        mine = signals.label == y
        assert chosen.keep[mine].sum() == math.ceil(0.25 * mine.sum())
    if by == "confidence":
        mine = signals.label == 0
        kept, dropped = (
            signals.confidence[mine & chosen.keep],
            signals.confidence[mine & ~chosen.keep],
        )
        assert kept.min() >= dropped.max()


@pytest.mark.parametrize("seed", range(5))
def test_cuts_are_those_that_sorting_finds(seed):
    rng = np.random.default_rng(seed)
    score = np.round(rng.beta(0.3, 0.3, 3000) * 2**20) / 2**20
    score[:100] = score[0]
    label = rng.choice(3, 3000, p=[0.9, 0.1, 0.0])
    wanted = np.array([700.0, 10.0, 5.0])
    found = cuts(score, label, wanted, all_reduce=alone)
    for y in range(2):
        ranked = np.sort(score[label == y])[::-1]
        least = ranked[int(wanted[y]) - 1]
        assert (score[label == y] >= found[y]).sum() == (ranked >= least).sum()
    assert found[2] == 0


def test_freematch_and_flexmatch_keep_rows_the_student_is_sure_of():
    sure, unsure = [0.98, 0.01, 0.01], [0.4, 0.3, 0.3]
    signals = signals_of([[0.5, 0.3, 0.2]] * 20, [sure] * 15 + [unsure] * 5)
    for rule in (FreeMatchRule(), FlexMatchRule()):
        assert chosen_by(rule, SelectionState(), signals).keep.tolist() == [True] * 15 + [False] * 5
    # Nobody is sure yet: the curriculum starts with every row.
    fresh = signals_of([[0.5, 0.3, 0.2]] * 4, [unsure] * 4)
    assert chosen_by(FlexMatchRule(), SelectionState(), fresh).keep.all()


def test_flexmatch_lowers_the_threshold_of_classes_not_yet_learned():
    q = [[0.99, 0.01]] * 8 + [[0.01, 0.99]] * 2 + [[0.6, 0.4]] * 0
    signals = signals_of([[0.5, 0.5]] * 10, q)
    threshold = chosen_by(FlexMatchRule(threshold=0.95), SelectionState(), signals).thresholds
    # M(x) = x / (2 - x) of shares 8/8 and 2/8.
    assert threshold["probability"] == pytest.approx([0.95, 0.95 * 0.25 / 1.75])


def test_confident_learning_drops_the_rows_that_cleanlab_drops():
    for seed in range(5):
        signals = drawn(seed, rows=800)
        kept = chosen_by(ConfidentLearningRule(), SelectionState(), signals, 2).keep
        issues = find_label_issues(
            signals.label,
            signals.student.astype(np.float64),
            filter_by="confident_learning",
            n_jobs=1,
        )
        assert (~kept).sum() > 20
        assert (kept != issues).all()


def test_joint_begins_with_the_teacher_and_then_asks_both():
    teacher = [[0.9, 0.1], [0.8, 0.2], [0.55, 0.45], [0.9, 0.1]]
    student = [[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.2, 0.8]]
    signals = signals_of(teacher, student)
    first = chosen_by(JointRule(), SelectionState(), signals, 1)
    assert first.keep.tolist() == [True, True, False, True]
    second = chosen_by(JointRule(), first.state, signals, 2)
    assert second.keep.tolist() == [True, False, True, False]
    one = chosen_by(JointRule(fraction=0.25), first.state, signals, 2)
    assert one.keep.tolist() == [True, False, False, False]


def test_gold_trains_on_the_humans_labels_and_no_other_rule_reads_them():
    signals = drawn(7)
    chosen = chosen_by(GoldRule(), SelectionState(), signals)
    assert (chosen.keep == (signals.gold != NONE)).all()
    assert (chosen.target[chosen.keep] == signals.gold[chosen.keep]).all()
    blind = Signals(
        signals.keys, signals.label, np.full(400, NONE), signals.teacher, signals.student
    )
    for rule in RULES[:-1]:
        one, other = (chosen_by(rule, SelectionState(), of, 2) for of in (signals, blind))
        assert (one.weight == other.weight).all()


def test_balanced_weights_give_each_class_the_same_share():
    signals = drawn(8)
    chosen = balanced(chosen_by(LLKDRule(), SelectionState(), signals), C, all_reduce=alone)
    shares = np.bincount(signals.label, weights=chosen.weight, minlength=C)
    present = np.bincount(signals.label[chosen.keep], minlength=C) > 0
    assert present.sum() > 1
    np.testing.assert_allclose(shares[present], shares[present][0])
    assert (shares[~present] == 0).all()
