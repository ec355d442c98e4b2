import math
from pathlib import Path

import numpy as np
import pytest

from llkd_ray.metrics import softmax
from llkd_ray.teacher.calibration import (
    Calibration,
    Floats,
    fit_temperature,
    fit_vector,
    read_calibrations,
    write_calibrations,
)


def biased_logprobs(rows: int) -> tuple[Floats, np.ndarray]:
    """Read-outs of a teacher that knows the answer and prefers the first label anyway."""
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 3, rows)
    logits = rng.normal(size=(rows, 3)) + 1.5 * np.eye(3)[gold] + np.array([3.0, 0.0, 0.0])
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) - 1.0, gold


def naive_division(logprobs: Floats, prior: list[float]) -> list[list[float]]:
    rows = [[math.exp(value) for value in row] for row in logprobs]
    normal = [[value / sum(row) for value in row] for row in rows]
    divided = [[value / p for value, p in zip(row, prior, strict=True)] for row in normal]
    return [[value / sum(row) for value in row] for row in divided]


def loss(logits: Floats, gold: np.ndarray, temperature: float) -> float:
    """The negative log-likelihood, row by row."""
    total = 0.0
    for row, right in zip(logits, gold, strict=True):
        scaled = [value / temperature for value in row]
        total -= scaled[right] - math.log(sum(math.exp(value) for value in scaled))
    return total


def test_dividing_by_a_prior_agrees_with_a_plain_second_implementation() -> None:
    logprobs, _ = biased_logprobs(50)
    prior = [0.7, 0.2, 0.05]
    np.testing.assert_allclose(
        Calibration.dividing_by(np.array(prior)).probabilities(logprobs),
        naive_division(logprobs, prior),
    )


def test_dividing_by_the_mean_takes_away_a_preference_for_one_label() -> None:
    logprobs, gold = biased_logprobs(2000)
    batch = Calibration.dividing_by(softmax(logprobs).mean(axis=0))
    before = (logprobs.argmax(axis=1) == gold).mean()
    after = (batch.probabilities(logprobs).argmax(axis=1) == gold).mean()
    assert after > before + 0.1


def test_no_calibration_is_the_teachers_own_distribution() -> None:
    logprobs, _ = biased_logprobs(5)
    raw = np.exp(logprobs)
    none = Calibration((0.0,) * 3)
    np.testing.assert_allclose(none.probabilities(logprobs), raw / raw.sum(axis=1, keepdims=True))


def test_a_label_that_never_had_any_probability_keeps_none() -> None:
    calibration = Calibration.dividing_by(np.array([0.5, 0.5, 0.0]))
    logprobs = np.array([[-1.0, -2.0, -np.inf]])
    expected = [*softmax(np.array([-1.0, -2.0])), 0.0]
    np.testing.assert_allclose(calibration.probabilities(logprobs)[0], expected)


@pytest.mark.parametrize("scale", [0.2, 1.0, 6.0])
def test_the_temperature_is_the_best_of_a_fine_grid(scale: float) -> None:
    logprobs, gold = biased_logprobs(200)
    logits = scale * (logprobs - np.array([3.0, 0.0, 0.0]))
    fitted = fit_temperature(logits, gold)
    grid = np.exp(np.linspace(math.log(0.05), math.log(20), 300))
    best = min(grid, key=lambda temperature: loss(logits, gold, temperature))
    assert fitted == pytest.approx(best, rel=0.02)
    assert loss(logits, gold, fitted) <= loss(logits, gold, best)


def test_a_temperature_undoes_exactly_the_scale_that_was_put_on() -> None:
    logprobs, gold = biased_logprobs(500)
    once, thrice = fit_temperature(logprobs, gold), fit_temperature(3 * logprobs, gold)
    assert thrice == pytest.approx(3 * once, rel=1e-4)


def test_the_temperature_stays_within_bounds_when_nothing_holds_it() -> None:
    always_right = np.array([[0.0, -1.0]] * 5)
    assert fit_temperature(always_right, np.zeros(5, dtype=np.int64)) == pytest.approx(0.05)
    assert fit_temperature(always_right, np.ones(5, dtype=np.int64)) == pytest.approx(20.0)


def test_a_few_rows_that_are_all_right_make_nobody_certain():
    sure = np.log([[0.92, 0.08]])
    for rows in (1, 5, 20):
        held = fit_temperature(np.repeat(sure, rows, axis=0), np.zeros(rows, int), hold=1.0)
        assert 0.3 < held < 1
    # Of many rows what is held does not matter.
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1000, 3)) * 3
    gold = np.array([rng.choice(3, p=softmax(row[None] / 2)[0]) for row in logits])
    assert fit_temperature(logits, gold, hold=1.0) == pytest.approx(
        fit_temperature(logits, gold), rel=0.01
    )


def test_a_temperature_never_changes_which_label_is_best() -> None:
    logprobs, _ = biased_logprobs(100)
    cold, hot = Calibration((0.5, 0.0, -0.5), 0.3), Calibration((0.5, 0.0, -0.5), 7.0)
    best = cold.probabilities(logprobs).argmax(axis=1)
    np.testing.assert_array_equal(best, hot.probabilities(logprobs).argmax(axis=1))


def test_stored_calibrations_are_read_back_exactly(tmp_path: Path) -> None:
    fitted = {
        "batch": Calibration((-0.1, -1 / 3, -5e-7)),
        "temperature": Calibration((-0.1, -1 / 3, -5e-7), 1 / 7),
    }
    write_calibrations(tmp_path / "calibrations.json", fitted)
    assert read_calibrations(tmp_path / "calibrations.json") == fitted


@pytest.mark.parametrize("size", [1e-30, 1.0, 700.0])
def test_probabilities_sum_to_one_whatever_the_scale(size: float) -> None:
    logprobs = -size * np.random.default_rng(0).random((20, 4))
    probabilities = Calibration((0.0,) * 4).probabilities(logprobs)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0)


def test_vector_scaling_finds_the_bias_and_scale_that_were_put_on() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(20_000, 4)) * 2
    gold = np.array([rng.choice(4, p=p) for p in softmax(true)])
    bias = np.array([1.5, -1.0, 0.0, 0.5])
    scale, found = fit_vector((true - bias) / 0.5, gold)
    assert scale == pytest.approx(0.5, rel=0.05)
    np.testing.assert_allclose(found - found.mean(), bias - bias.mean(), atol=0.1)


def test_vector_scaling_mends_a_label_that_is_given_too_often() -> None:
    logits = np.array([[2.0, 1.0, 0.0]] * 90 + [[0.0, 0.1, 3.0]] * 10)
    gold = np.array([1] * 80 + [0] * 10 + [2] * 10)
    calibration = Calibration((0.0, 0.0, 0.0)).corrected(*fit_vector(logits, gold))
    assert calibration.probabilities(logits).argmax(axis=1).tolist() == [1] * 90 + [2] * 10
    few = Calibration((0.0, 0.0, 0.0)).corrected(*fit_vector(logits[:1], gold[:1]))
    assert np.isfinite(few.probabilities(logits)).all()


def test_vector_scaling_holds_for_a_teacher_that_is_always_right_or_says_never() -> None:
    certain = np.array([[0.0, -np.inf, -9.0], [-9.0, 0.0, -np.inf]])
    for gold in ([0, 1], [2, 0]):
        scale, bias = fit_vector(certain, np.array(gold))
        assert 0.05 <= scale <= 20
        assert np.isfinite(bias).all()


def test_a_corrected_calibration_is_the_one_before_scaled_and_shifted() -> None:
    before = Calibration((-0.5, 0.2, 0.0), temperature=2.0)
    logprobs = np.log(np.array([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]]))
    bias = np.array([0.3, -0.2, 0.1])
    after = before.corrected(1.7, bias)
    np.testing.assert_allclose(after.logits(logprobs), 1.7 * before.logits(logprobs) + bias)
