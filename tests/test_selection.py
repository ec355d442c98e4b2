import json
import math
import threading

import numpy as np
import pytest

from llkd_ray.config import AllRule, LLKDRule
from llkd_ray.selection import SelectionState, needs_student, select, uncertainty

C = 5


def alone(sums):
    return sums


def drawn(seed, rows=400, classes=C):
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, rows, p=rng.dirichlet(np.ones(classes) * 2)).astype(np.int64)
    return labels, rng.uniform(1 / classes, 1, rows), rng.beta(0.7, 1.5, rows)


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


def sharded(rule, states, rows, owner, workers):
    """Run `select` on real threads whose all-reduce sums over all of them, in random order."""
    labels, confidence, unsure = rows
    slots, results = [None] * workers, [None] * workers
    barrier = threading.Barrier(workers)

    def work(rank):
        mine = owner == rank

        def all_reduce(sums):
            slots[rank] = sums
            barrier.wait()
            order = np.random.default_rng(rank).permutation(workers)
            total = sum(slots[other] for other in order)
            barrier.wait()
            return total

        results[rank] = select(
            rule, states[rank], labels[mine], confidence[mine], unsure[mine], all_reduce=all_reduce
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_uncertainty_is_0_for_a_certain_row_and_1_for_a_clueless_one():
    probabilities = np.array([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0]], dtype=np.float32)
    expected = [0, 1, math.log(2) / math.log(3)]
    np.testing.assert_allclose(uncertainty(probabilities), expected, atol=1e-6)


@pytest.mark.parametrize("decays", [(0.9, 0.0), (0.0, 0.9), (0.5, 0.5)])
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_a_naive_second_implementation_over_epochs(seed, decays):
    rule = LLKDRule(teacher_decay=decays[0], student_decay=decays[1])
    state, naive = SelectionState.start(C), Naive(C, decays)
    for epoch in range(5):
        labels, c, u = drawn(100 * seed + epoch)
        chosen = select(rule, state, labels, c, u, all_reduce=alone)
        state = chosen.state
        tau_teacher, tau_student = naive.thresholds(labels, (c, u))
        np.testing.assert_allclose(chosen.teacher_thresholds, tau_teacher, atol=2e-6)
        np.testing.assert_allclose(chosen.student_thresholds, tau_student, atol=2e-6)
        for i, y in enumerate(labels):
            if min(abs(c[i] - tau_teacher[y]), abs(u[i] - tau_student[y])) > 4e-6:
                assert chosen.keep[i] == (c[i] >= tau_teacher[y] and u[i] >= tau_student[y])


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_any_number_of_workers_gives_the_same_thresholds_and_rows_to_the_last_bit(workers):
    rule = LLKDRule(teacher_decay=0.7, student_decay=0.3)
    single, states = SelectionState.start(C), [SelectionState.start(C)] * workers
    for epoch in range(4):
        labels, c, u = drawn(epoch, rows=1000)
        owner = np.random.default_rng(epoch).integers(0, workers, len(labels))
        whole = select(rule, single, labels, c, u, all_reduce=alone)
        parts = sharded(rule, states, (labels, c, u), owner, workers)
        single, states = whole.state, [part.state for part in parts]
        for rank, part in enumerate(parts):
            assert part.state == whole.state
            assert part.teacher_thresholds.tobytes() == whole.teacher_thresholds.tobytes()
            assert part.student_thresholds.tobytes() == whole.student_thresholds.tobytes()
            assert (part.keep == whole.keep[owner == rank]).all()
            assert (part.weight == whole.weight[owner == rank]).all()


def test_a_worker_without_rows_takes_part():
    labels, c, u = drawn(1)
    owner = np.zeros(len(labels), dtype=np.int64)
    parts = sharded(LLKDRule(), [SelectionState.start(C)] * 2, (labels, c, u), owner, 2)
    assert parts[0].state == parts[1].state
    assert len(parts[1].keep) == 0


def test_keeps_rows_the_teacher_is_sure_of_and_the_student_is_not():
    labels = np.zeros(4, dtype=np.int64)
    confidence, unsure = np.array([0.9, 0.9, 0.3, 0.3]), np.array([0.8, 0.1, 0.8, 0.1])
    chosen = select(
        LLKDRule(), SelectionState.start(2), labels, confidence, unsure, all_reduce=alone
    )
    assert chosen.keep.tolist() == [True, False, False, False]


def test_a_class_the_teacher_is_less_sure_of_gets_a_lower_threshold():
    labels = np.array([0, 0, 1, 1])
    confidence, unsure = np.array([0.9, 0.7, 0.5, 0.3]), np.full(4, 0.5)
    chosen = select(
        LLKDRule(), SelectionState.start(2), labels, confidence, unsure, all_reduce=alone
    )
    np.testing.assert_allclose(chosen.teacher_thresholds, [0.6, 0.3], atol=1e-5)
    np.testing.assert_allclose(chosen.student_thresholds, [0.5, 0.5], atol=1e-5)


def test_a_class_without_rows_keeps_its_last_level_and_never_makes_nan_of_the_others():
    rule = LLKDRule(student_decay=0.5)
    first = select(
        rule,
        SelectionState.start(3),
        np.array([0, 1]),
        np.array([0.8, 0.4]),
        np.ones(2),
        all_reduce=alone,
    )
    assert np.isnan(first.teacher_thresholds).tolist() == [False, False, True]
    assert first.keep.tolist() == [True, True]
    second = select(
        rule, first.state, np.array([0]), np.array([0.8]), np.array([0.5]), all_reduce=alone
    )
    assert second.state.student.per_class == (0.75, 1.0, None)
    assert not np.isnan(second.student_thresholds[:2]).any()


def test_rows_that_are_all_alike_stay_kept_epoch_after_epoch():
    labels = np.zeros(3, dtype=np.int64)
    c, u, state = np.full(3, 0.7), np.full(3, 0.3), SelectionState.start(2)
    for _ in range(5):
        chosen = select(LLKDRule(student_decay=0.9), state, labels, c, u, all_reduce=alone)
        state = chosen.state
        assert chosen.keep.all()


def test_no_rows_at_all_change_nothing():
    state = SelectionState.start(2)
    nothing = np.array([])
    chosen = select(LLKDRule(), state, nothing.astype(np.int64), nothing, nothing, all_reduce=alone)
    assert chosen.state == state


def test_a_student_that_is_certain_of_everything_divides_by_nothing():
    labels, c, _ = drawn(2)
    chosen = select(
        LLKDRule(), SelectionState.start(C), labels, c, np.zeros(len(c)), all_reduce=alone
    )
    assert (chosen.student_thresholds == 0).all()
    assert chosen.weight.sum() == 0


@pytest.mark.parametrize(
    ("form", "expected"),
    [("product", 0.375), ("sum", 1.25), ("confidence", 0.75), ("uncertainty", 0.5), ("one", 1.0)],
)
def test_weighs_a_kept_row_by_the_chosen_form_and_a_dropped_one_by_nothing(form, expected):
    labels, c, u = np.array([0, 0]), np.array([0.75, 0.25]), np.array([0.5, 0.5])
    chosen = select(LLKDRule(weight=form), SelectionState.start(2), labels, c, u, all_reduce=alone)
    assert chosen.weight.tolist() == [expected, 0.0]


def test_the_state_survives_json_to_the_last_bit():
    labels, c, u = drawn(3)
    state = select(LLKDRule(), SelectionState.start(C + 1), labels, c, u, all_reduce=alone).state
    assert SelectionState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_rule_all_keeps_every_row_at_weight_one_without_asking_the_student():
    labels, c, _ = drawn(4)
    chosen = select(AllRule(), SelectionState.start(C), labels, c, None, all_reduce=alone)
    assert chosen.keep.all()
    assert (chosen.weight == 1).all()
    assert np.isnan(chosen.teacher_thresholds).all()
    assert needs_student(LLKDRule())
    assert not needs_student(AllRule())
