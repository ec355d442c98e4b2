import numpy as np
import pytest

from llkd_ray import metrics


def naive_f1(gold: list[int], predicted: list[int], class_: int) -> float | None:
    pairs = list(zip(gold, predicted, strict=True))
    true_positive = sum(g == class_ and p == class_ for g, p in pairs)
    false_positive = sum(g != class_ and p == class_ for g, p in pairs)
    false_negative = sum(g == class_ and p != class_ for g, p in pairs)
    if true_positive + false_positive + false_negative == 0:
        return None
    return 2 * true_positive / (2 * true_positive + false_positive + false_negative)


def test_macro_f1_agrees_with_counting_pairs_one_by_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        gold, predicted = rng.integers(0, 5, 30), rng.integers(0, 4, 30)
        each = [naive_f1(gold.tolist(), predicted.tolist(), class_) for class_ in range(6)]
        expected = np.mean([f1 for f1 in each if f1 is not None])
        assert metrics.macro_f1(gold, predicted, 6) == pytest.approx(expected)


def test_a_class_that_never_occurs_does_not_count() -> None:
    gold = np.array([0, 1])
    assert metrics.macro_f1(gold, gold, 50) == 1.0


def test_calibration_error_is_the_weighted_gap() -> None:
    confidence = np.array([0.95, 0.95, 0.55, 1.0])
    correct = np.array([True, False, True, True])
    # Bin 0.9-1.0 holds three rows: mean confidence 2.9/3, accuracy 2/3. Bin 0.5-0.6 holds one.
    expected = 3 / 4 * (2.9 / 3 - 2 / 3) + 1 / 4 * (1 - 0.55)
    assert metrics.expected_calibration_error(confidence, correct, 10) == pytest.approx(expected)


def test_every_row_is_in_one_reliability_bin() -> None:
    confidence = np.array([0.0, 0.1, 0.999, 1.0])
    table = metrics.reliability(confidence, np.ones(4, dtype=bool), 10)
    assert sum(bin_.rows for bin_ in table) == 4
    for bin_ in table:
        assert bin_.lower <= bin_.mean_confidence <= bin_.upper


def test_tenths_hold_equally_many_rows_sorted_by_confidence() -> None:
    rng = np.random.default_rng(2)
    confidence, correct = rng.random(103), rng.random(103) < 0.6
    tenths = metrics.reliability_by_rank(confidence, correct, 10)
    assert {part.rows for part in tenths} == {10, 11}
    assert [part.position for part in tenths] == list(range(10))
    pairs = sorted(zip(confidence.tolist(), correct.tolist(), strict=True))
    for part in tenths:
        mine, pairs = pairs[: part.rows], pairs[part.rows :]
        assert (part.lower, part.upper) == (mine[0][0], mine[-1][0])
        assert part.mean_confidence == pytest.approx(sum(c for c, _ in mine) / len(mine))
        assert part.accuracy == pytest.approx(sum(right for _, right in mine) / len(mine))
    assert pairs == []


def test_rows_of_equal_confidence_are_ranked_as_they_come() -> None:
    correct = np.array([False, False, True, True])
    halves = metrics.reliability_by_rank(np.full(4, 0.5), correct, 2)
    assert [half.accuracy for half in halves] == [0.0, 1.0]


def test_fewer_rows_than_tenths_leave_tenths_out() -> None:
    table = metrics.reliability_by_rank(np.array([0.9, 0.2]), np.array([True, False]), 10)
    assert [(part.position, part.rows, part.accuracy) for part in table] == [
        (0, 1, 0.0),
        (1, 1, 1.0),
    ]


def test_the_confident_half_is_the_upper_one_and_has_the_odd_row() -> None:
    gold, predicted = np.array([0, 0, 1]), np.array([0, 1, 1])
    found = metrics.quality(gold, predicted, np.array([0.6, 0.3, 0.9]), 2, 10)
    assert found.rows == 3
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.accuracy_confident_half == 1.0
    assert found.macro_f1 == pytest.approx(2 / 3)
    assert found.ece == pytest.approx((0.4 + 0.3 + 0.1) / 3)


def test_a_reflected_interval_holds_a_calibration_error_that_the_plain_one_lies_above() -> None:
    rng = np.random.default_rng(0)
    plain = turned = 0
    for trial in range(60):
        confidence = rng.random(512)
        correct = rng.random(512) < np.clip(confidence - 0.04, 0, 1)  # Off by almost 0.04.

        def error(
            of: metrics.Ints, c: metrics.Floats = confidence, right: object = correct
        ) -> float:
            return metrics.expected_calibration_error(c[of], np.asarray(right)[of], 10)

        found = metrics.bootstrap_interval(error, 512, 100, trial)
        around = metrics.reflected(found)
        assert 0 <= around.low <= around.value <= around.high
        plain += found.low <= 0.04 <= found.high
        turned += around.low <= 0.04 <= around.high
    assert plain < 48  # Of 60.
    assert turned >= 52


def test_the_bootstrap_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        sample = rng.random(100) < 0.7
        interval = metrics.bootstrap_interval(
            lambda rows, sample=sample: float(sample[rows].mean()), 100, 200, trial
        )
        assert interval.low <= interval.value <= interval.high
        hits += interval.low <= 0.7 <= interval.high
    assert 180 <= hits <= 199


def test_percentiles_are_named_and_interpolated() -> None:
    assert metrics.percentiles_ms(np.arange(101.0)) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
