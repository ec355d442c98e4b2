import math
from pathlib import Path

import numpy as np
import pytest

from llkd_ray.config import CalibrationSection
from llkd_ray.teacher.calibration import Calibration, Floats


def biased_logprobs(rows: int) -> tuple[Floats, np.ndarray]:
    """Read-outs of a teacher that knows the answer and prefers the first label anyway."""
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 3, rows)
    logits = rng.normal(size=(rows, 3)) + 1.5 * np.eye(3)[gold] + np.array([3.0, 0.0, 0.0])
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) - 1.0, gold


def naive_batch_calibration(logprobs: Floats) -> list[list[float]]:
    rows = [[math.exp(value) for value in row] for row in logprobs]
    normal = [[value / sum(row) for value in row] for row in rows]
    mean = [sum(column) / len(normal) for column in zip(*normal, strict=True)]
    divided = [[value / m for value, m in zip(row, mean, strict=True)] for row in normal]
    return [[value / sum(row) for value in row] for row in divided]


def test_batch_calibration_agrees_with_a_plain_second_implementation() -> None:
    logprobs, _ = biased_logprobs(50)
    parts = [logprobs[:10], logprobs[10:]]
    fitted = Calibration.fit(CalibrationSection(kind="batch"), parts, 3)
    np.testing.assert_allclose(fitted.probabilities(logprobs), naive_batch_calibration(logprobs))


def test_batch_calibration_takes_away_a_preference_for_one_label() -> None:
    logprobs, gold = biased_logprobs(2000)
    none = Calibration.fit(CalibrationSection(kind="none"), [logprobs], 3)
    batch = Calibration.fit(CalibrationSection(kind="batch"), [logprobs], 3)
    before = (none.probabilities(logprobs).argmax(axis=1) == gold).mean()
    after = (batch.probabilities(logprobs).argmax(axis=1) == gold).mean()
    assert after > before + 0.1


def test_no_calibration_is_the_teachers_own_distribution() -> None:
    logprobs, _ = biased_logprobs(5)
    raw = np.exp(logprobs)
    none = Calibration.fit(CalibrationSection(kind="none"), [], 3)
    np.testing.assert_allclose(none.probabilities(logprobs), raw / raw.sum(axis=1, keepdims=True))


def test_a_stored_calibration_is_read_back_exactly(tmp_path: Path) -> None:
    stored = Calibration((-0.1, -1 / 3, -5e-7))
    stored.write(tmp_path / "calibration.json")
    assert Calibration.read(tmp_path / "calibration.json") == stored


@pytest.mark.parametrize("size", [1e-30, 1.0, 700.0])
def test_probabilities_sum_to_one_whatever_the_scale(size: float) -> None:
    logprobs = -size * np.random.default_rng(0).random((20, 4))
    probabilities = Calibration((0.0,) * 4).probabilities(logprobs)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0)
