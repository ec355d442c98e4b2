"""Stacking: what a little gold says about texts, beside what the teacher says."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from readouts_data import Made, out_of_order

from llkd_ray import schema
from llkd_ray.metrics import softmax
from llkd_ray.teacher.calibration import Calibration
from llkd_ray.teacher.stacking import fit_stacking

BATCH = Calibration((0.3, -0.2, 0.0))
Arrays = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


def drawn(rows: int, told: float, written: float, seed: int = 0) -> Arrays:
    """Gold of three classes, a teacher and embeddings that show so much of it."""
    rng = np.random.default_rng(seed)
    gold = rng.integers(3, size=rows)
    right = np.eye(3)[gold]
    logprobs = np.log(softmax(rng.normal(size=(rows, 3)) + told * right))
    embeddings = rng.normal(size=(rows, 8)) + written * np.pad(right, ((0, 0), (0, 5)))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return logprobs, embeddings.astype(np.float32), gold


def accuracy(probabilities: Any, gold: Any) -> float:
    return float((probabilities.argmax(axis=1) == gold).mean())


def test_both_together_know_more_than_either_alone() -> None:
    known, others = drawn(200, told=1.2, written=1.5), drawn(4000, told=1.2, written=1.5, seed=1)
    both = fit_stacking(BATCH, *known)
    told = accuracy(BATCH.probabilities(others[0]), others[2])
    silent = np.zeros_like(known[0])
    written = fit_stacking(Calibration((0.0,) * 3), silent, *known[1:])
    alone = accuracy(written.probabilities(np.zeros_like(others[0]), others[1]), others[2])
    together = both.probabilities(*others[:2])
    assert accuracy(together, others[2]) > max(told, alone) + 0.05
    confidence = together.max(axis=1)
    assert confidence.mean() == pytest.approx(accuracy(together, others[2]), abs=0.04)


def test_texts_that_say_nothing_leave_the_teacher_as_it_is() -> None:
    known, others = drawn(100, told=2.0, written=0.0), drawn(4000, told=2.0, written=0.0, seed=1)
    stacking = fit_stacking(BATCH, *known)
    assert stacking.strength >= 1
    told = accuracy(Calibration((0.0,) * 3).probabilities(others[0]), others[2])
    assert accuracy(stacking.probabilities(*others[:2]), others[2]) > told - 0.03


def test_the_fit_is_the_bottom_of_its_loss() -> None:
    logprobs, embeddings, gold = drawn(60, told=1.0, written=1.0)
    found = fit_stacking(BATCH, logprobs, embeddings, gold)
    assert math.isfinite(found.strength)
    logits = BATCH.logits(logprobs)

    def loss(scale: float, bias: Any, weights: Any) -> float:
        p = softmax(scale * logits + embeddings @ weights + bias)
        held = 2.0 * (bias**2).sum() + found.strength * (weights**2).sum()
        return float(-np.log(p[np.arange(60), gold]).mean() + held / 2 / 60)

    least = loss(found.scale, found.bias, found.weights)
    rng = np.random.default_rng(3)
    for size in (1e-1, 1e-2):
        for _ in range(20):
            moved = (
                found.scale + size * rng.normal(),
                found.bias + size * rng.normal(size=3),
                found.weights + size * rng.normal(size=(8, 3)),
            )
            assert loss(*moved) > least


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_handful_of_rows_and_a_teacher_that_says_never_give_numbers(rows: int) -> None:
    logprobs, embeddings, gold = drawn(rows, told=1.0, written=1.0)
    logprobs[:, 0] = -math.inf
    stacking = fit_stacking(Calibration((0.0,) * 3), logprobs, embeddings, np.maximum(gold, 1))
    probabilities = stacking.probabilities(logprobs, embeddings)
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0)


SAID = {
    "cat": ("the cat purrs on the sofa", "a kitten and its whiskers", "cats chase mice at night"),
    "dog": ("the dog barks at the gate", "a puppy fetched the stick", "dogs walk on a leash"),
    "fish": ("the trout swims upstream", "a goldfish in its bowl", "sharks live in the ocean"),
}


def rows_of(split: str, count: int) -> list[dict[str, Any]]:
    """Rows about animals, and a teacher that knows little of them."""
    rng = np.random.default_rng(len(split))
    rows = []
    for number in range(count):
        right = int(rng.integers(3))
        name = tuple(SAID)[right]
        told = np.log(softmax(rng.normal(size=3) + 0.5 * np.eye(3)[right]))
        text = f"{SAID[name][int(rng.integers(3))]}, {split} {number}"
        row = {"row_id": f"{split}-{number:04d}", "text": text, "gold": name}
        rows.append({**row, "logprobs": told.tolist(), "error": None})
    return rows


def test_labels_are_stacked_with_the_real_encoder_and_the_same_when_distributed(
    tmp_path: Path,
) -> None:
    made = Made(tmp_path)
    for split, count in (("unlabeled", 90), ("validation", 30), ("test", 30)):
        made.add(split, rows_of(split, count))
    labelled = made.label("stacked")
    quality = labelled.quality
    assert quality["stacked"]["test"].accuracy > 0.9
    assert quality["batch"]["test"].accuracy < 0.7
    table = made.table("test")
    assert table.schema.equals(schema.labels(3))
    np.testing.assert_array_equal(table["confidence"], table["confidence_stacked"])
    stored = np.array(table["probabilities"].to_pylist())
    np.testing.assert_allclose(stored.max(axis=1), table["confidence"], rtol=1e-6)
    tables = {path.name for path in made.labels.rglob("*.parquet")}
    assert "reliability.parquet" in tables
    kinds = pq.read_table(made.labels / "reliability.parquet")["calibration"]
    assert "stacked" in pa.compute.unique(kinds).to_pylist()
    plain = made.table()
    made.labels = tmp_path / "again"
    assert made.label("stacked", each=out_of_order) == labelled
    assert made.table().equals(plain)
