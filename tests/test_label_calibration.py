"""From read-outs made by hand to labels: no teacher, no Ray."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from readouts_data import NAMES, Made, Row, out_of_order

from llkd_ray import schema
from llkd_ray.errors import TeacherError, TooManyRejectedError
from llkd_ray.teacher.calibration import read_calibrations

KINDS = ("none", "contextual", "batch", "temperature")


def rows_of(split: str, count: int, *, gold: bool = True) -> list[Row]:
    """Rows of a teacher that prefers the first label and is surer than it is right."""
    rng = np.random.default_rng(sum(map(ord, split)))
    rows = []
    for number in range(count):
        right = int(rng.integers(3))
        logits = [rng.normal(0, 2) + 2.5 * (k == right) + 2.0 * (k == 0) for k in range(3)]
        total = math.log(sum(map(math.exp, logits))) + rng.random()
        rows.append(
            {
                "row_id": f"{split}-{number:04d}",
                "text": f"text {number} of {split}",
                "gold": NAMES[right] if gold else None,
                "logprobs": [value - total for value in logits],
                "error": None,
            }
        )
    return rows


FREE = [[-0.2, -2.5, -4.0], [-0.6, -1.5, -3.0]]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Three splits with gold, and answers about texts without content."""
    made = Made(tmp_path)
    made.add("unlabeled", rows_of("unlabeled", 130))
    made.add("validation", rows_of("validation", 60))
    made.add("test", rows_of("test", 50))
    made.content_free([FREE[0], None, FREE[1]])
    return made


def normal(values: Iterable[float]) -> list[float]:
    values = list(values)
    return [value / sum(values) for value in values]


def naive_distributions(made: Made, kind: str, split: str, temperature: float) -> list[list[float]]:
    """Divide probabilities by the prior of a kind, one number after the other."""

    def told(rows: list[list[float]]) -> list[list[float]]:
        return [normal(map(math.exp, row)) for row in rows]

    def mean(rows: list[list[float]]) -> list[float]:
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    of_split = told([row["logprobs"] for row in made.rows[split]])
    prior = [1.0, 1.0, 1.0]
    if kind == "contextual":
        prior = mean(told(FREE))
    if kind in ("batch", "temperature"):
        prior = mean(told([row["logprobs"] for row in made.rows["unlabeled"]]))
    power = 1 / temperature if kind == "temperature" else 1.0
    return [
        normal((value / p) ** power for value, p in zip(row, prior, strict=True))
        for row in of_split
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_each_calibration_agrees_with_a_plain_second_implementation(made: Made, kind: str) -> None:
    labelled = made.label(kind)
    assert labelled.temperature is not None
    assert labelled.temperature > 1.2  # The teacher made here is too sure.
    for split in ("unlabeled", "test"):
        table = made.table(split)
        expected = naive_distributions(made, kind, split, labelled.temperature)
        assert table.schema.equals(schema.labels(3))
        np.testing.assert_allclose(table["probabilities"].to_pylist(), expected, atol=1e-5)
        best = [NAMES[row.index(max(row))] for row in expected]
        assert table["label"].to_pylist() == best
        np.testing.assert_allclose(table["confidence"].to_pylist(), [*map(max, expected)], 1e-4)
        for other in KINDS:
            of_other = naive_distributions(made, other, split, labelled.temperature)
            stored = table[f"confidence_{other}"].to_pylist()
            np.testing.assert_allclose(stored, [*map(max, of_other)], 1e-4)
        np.testing.assert_array_equal(table["confidence"], table[f"confidence_{kind}"])


def test_labels_keep_text_gold_and_what_the_teacher_said(made: Made) -> None:
    made.label()
    table = made.table()
    for name in ("row_id", "text", "gold"):
        assert table[name].to_pylist() == [row[name] for row in made.rows["unlabeled"]]
    said = [row["logprobs"] for row in made.rows["unlabeled"]]
    np.testing.assert_allclose(table["logprobs"].to_pylist(), said, rtol=1e-6)
    np.testing.assert_allclose(table["label_mass"], np.exp(said).sum(axis=1), rtol=1e-5)


def test_the_temperature_is_fitted_on_validation_gold_alone(made: Made, tmp_path: Path) -> None:
    temperature = made.label("temperature").temperature
    prior = read_calibrations(made.labels / "calibrations.json")["batch"].log_prior
    rows = made.rows["validation"]
    grid = np.exp(np.linspace(math.log(0.05), math.log(20), 400))

    def loss(temperature: float) -> float:
        total = 0.0
        for row in rows:
            scaled = [
                math.exp((value - p) / temperature)
                for value, p in zip(row["logprobs"], prior, strict=True)
            ]
            total -= math.log(normal(scaled)[NAMES.index(row["gold"])])
        return total

    assert temperature == pytest.approx(min(grid, key=loss), rel=0.02)
    others = Made(tmp_path / "others")
    others.add("unlabeled", rows_of("unlabeled", 130, gold=False))
    others.add("validation", rows)
    assert others.label("temperature").temperature == temperature


def test_all_fitted_calibrations_are_stored_whichever_is_chosen(made: Made) -> None:
    made.label("none")
    stored = json.loads((made.labels / "calibrations.json").read_text())
    assert tuple(stored) == (*KINDS, "vector")
    assert stored["none"] == {"log_prior": [0.0, 0.0, 0.0], "temperature": 1.0}
    assert stored["batch"]["log_prior"] == stored["temperature"]["log_prior"]
    assert stored["batch"]["temperature"] == 1.0


def test_a_distributed_run_writes_the_same_to_the_byte(made: Made, tmp_path: Path) -> None:
    plain = made.label("temperature")
    expected = {
        path.relative_to(made.labels): path.read_bytes() for path in made.labels.rglob("*.*")
    }
    made.labels = tmp_path / "again"
    spread = made.label("temperature", each=out_of_order)
    assert spread == plain
    found = {path.relative_to(made.labels): path.read_bytes() for path in made.labels.rglob("*.*")}
    assert found == expected
    assert len(found) == 4 + 2 + 2 + 3


def test_every_row_is_labelled_or_kept_aside_with_a_reason(made: Made) -> None:
    rows = rows_of("unlabeled", 100)
    for row in rows[10:13]:
        row |= {"logprobs": None, "error": "the text is too long"}
    rows[50] |= {"logprobs": None, "text": "x" * 500}
    rows[60]["logprobs"] = [-math.inf] * 3
    rows[70]["logprobs"] = [math.nan, -1.0, -1.0]
    for row in rows[90:95]:
        row["logprobs"] = [value - 9.0 for value in row["logprobs"]]
    for shard in (made.readouts / "unlabeled").iterdir():
        shard.unlink()
    made.add("unlabeled", rows)
    labelled = made.label(mass=0.01)
    assert labelled.splits["unlabeled"].taken == 100
    assert labelled.splits["unlabeled"].kept == len(made.table()) == labelled.unlabeled_rows == 89
    assert labelled.splits["unlabeled"].rejected == labelled.unlabeled_rejected == 11
    assert labelled.unlabeled_rejected_label_mass == 5
    reasons = {
        "the labels' probability is below calibration.min_label_mass = 0.01": 5,
        "the text is too long": 3,
        "no label has any probability": 2,
        "the teacher gave no answer": 1,
    }
    assert labelled.splits["unlabeled"].reasons == reasons
    assert (labelled.rows, labelled.rejected) == (89 + 60 + 50, 11)
    aside = made.rejected()
    assert [row["where"] for row in aside] == [
        f"unlabeled unlabeled-{number:04d}" for number in (10, 11, 12, 50, 60, 70, *range(90, 95))
    ]
    assert aside[3]["content"] == "x" * 200
    assert aside[0]["content"] == "text 10 of unlabeled"
    ids = made.table()["row_id"].to_pylist()
    both = {*ids, *(row["where"].split()[1] for row in aside)}
    assert both == {row["row_id"] for row in rows}
    assert len(ids) + len(aside) == len(rows)


def test_a_row_at_the_smallest_label_mass_is_kept_and_one_below_is_not(tmp_path: Path) -> None:
    made = Made(tmp_path)
    rows = rows_of("unlabeled", 3, gold=False)
    # Exact: one label has all of the mass, and the logarithm of a power of e is its exponent.
    for row, logarithm in zip(rows, (-1.0, -1.0 - 1e-6, -0.5), strict=True):
        row["logprobs"] = [logarithm, -math.inf, -math.inf]
    made.add("unlabeled", rows)
    labelled = made.label("none", mass=math.exp(-1.0))
    assert labelled.unlabeled_rejected_label_mass == 1
    assert made.table()["row_id"].to_pylist() == ["unlabeled-0000", "unlabeled-0002"]
    assert [row["where"] for row in made.rejected()] == ["unlabeled unlabeled-0001"]


def test_rows_kept_aside_have_no_say_in_the_calibration(made: Made, tmp_path: Path) -> None:
    made.label()
    noisy = Made(tmp_path / "noisy")
    stray = rows_of("stray", 40)
    for row in stray:
        row["logprobs"] = [-20.0, -5.0, -20.0]
    noisy.add("unlabeled", [*made.rows["unlabeled"], *stray])
    noisy.label(mass=0.01)
    prior, noisy_prior = (
        read_calibrations(of.labels / "calibrations.json")["batch"].log_prior
        for of in (made, noisy)
    )
    assert noisy_prior == pytest.approx(prior)


def test_too_many_rejected_rows_stop_the_job_and_their_reasons_are_told(made: Made) -> None:
    rows = rows_of("test", 50)
    for row in rows[:6]:
        row |= {"logprobs": None, "error": "the server\nis overloaded " + "again " * 100}
    made.add("test", rows)
    made.label(max_rejected_fraction=6 / 240)
    made.labels = made.labels.with_name("stricter")
    with pytest.raises(TooManyRejectedError) as stopped:
        made.label(max_rejected_fraction=5 / 240)
    sentence = str(stopped.value)
    assert "6 of 240 rows" in sentence
    assert "teacher.max_rejected_fraction" in sentence
    assert "the server is overloaded" in sentence
    assert str(made.labels / "rejected.parquet") in sentence
    assert "\n" not in sentence
    assert len(sentence) < 600
    assert len(made.rejected()) == 6


def test_readouts_without_any_answer_say_why(tmp_path: Path) -> None:
    made = Made(tmp_path)
    silent = [{**row, "logprobs": None, "error": "it hung"} for row in rows_of("unlabeled", 90)]
    made.add("unlabeled", silent)
    with pytest.raises(TeacherError, match=r"none of 90 rows has a usable answer: it hung \(90\)"):
        made.label("none")


@pytest.mark.parametrize("answers", [None, [None, None]])
def test_contextual_calibration_needs_content_free_answers(
    made: Made, answers: list[None] | None
) -> None:
    (made.readouts / "content_free.parquet").unlink()
    if answers is not None:
        made.content_free(list(answers))
    with pytest.raises(TeacherError, match=r"content_free\.parquet.*run python jobs/label\.py"):
        made.label("contextual")


@pytest.mark.parametrize("validation", ["absent", "without gold"])
def test_a_temperature_needs_validation_gold(tmp_path: Path, validation: str) -> None:
    made = Made(tmp_path)
    made.add("unlabeled", rows_of("unlabeled", 30))
    if validation == "without gold":
        made.add("validation", rows_of("validation", 30, gold=False))
    with pytest.raises(TeacherError, match=r'add "validation" to teacher\.splits.*gold_column'):
        made.label("temperature")


def test_batch_calibration_needs_the_unlabeled_split(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.add("test", rows_of("test", 30))
    with pytest.raises(TeacherError, match=r'add "unlabeled" to teacher\.splits'):
        made.label("batch")
    made.labels = tmp_path / "raw"
    labelled = made.label("none")
    assert (labelled.rows, labelled.unlabeled_rows, labelled.accuracy) == (30, 0, None)


def test_what_could_not_be_fitted_is_null_and_not_judged(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.add("unlabeled", rows_of("unlabeled", 30))
    labelled = made.label()
    assert set(labelled.quality) == {"none", "batch"}
    table = made.table()
    for kind in ("contextual", "temperature"):
        assert table[f"confidence_{kind}"].null_count == 30


def test_gold_of_no_probability_leaves_the_temperature_to_the_other_rows(made: Made) -> None:
    plain = made.label("temperature").temperature
    lost = {"row_id": "validation-lost", "text": "?", "gold": "fish", "error": None}
    rows = [*made.rows["validation"], {**lost, "logprobs": [-0.1, -3.0, -math.inf]}]
    made.add("validation", rows)
    made.labels = made.labels.with_name("again")
    assert made.label("temperature").temperature == pytest.approx(plain)


def test_quality_is_judged_by_calibration_and_split(made: Made) -> None:
    labelled = made.label("contextual")
    assert labelled.temperature is not None
    for kind in KINDS:
        for split in ("unlabeled", "validation", "test"):
            found = labelled.quality[kind][split]
            of = naive_distributions(made, kind, split, labelled.temperature)
            gold = [row["gold"] for row in made.rows[split]]
            right = [NAMES[row.index(max(row))] == g for row, g in zip(of, gold, strict=True)]
            assert found.rows == len(gold)
            assert found.accuracy == pytest.approx(sum(right) / len(right))
            surest = sorted(range(len(of)), key=lambda row, of=of: max(of[row]))[len(of) // 2 :]
            half = sum(right[row] for row in surest) / len(surest)
            assert found.accuracy_confident_half == pytest.approx(half)
    own = labelled.quality["contextual"]["unlabeled"]
    assert (labelled.accuracy, labelled.macro_f1, labelled.ece) == (
        own.accuracy,
        own.macro_f1,
        own.ece,
    )
    assert labelled.accuracy_uncalibrated == labelled.quality["none"]["unlabeled"].accuracy
    assert json.loads(json.dumps(asdict(labelled)))["quality"]["none"]["test"]["rows"] == 50


def test_the_reliability_tables_hold_every_gold_row_once(made: Made) -> None:
    labelled = made.label()
    table = pq.read_table(made.labels / "reliability.parquet")
    assert table.schema.equals(schema.RELIABILITY)
    rows = table.to_pylist()
    for kind in KINDS:
        for split, of_split in made.rows.items():
            for name in ("bin", "decile"):
                mine = [
                    row
                    for row in rows
                    if (row["calibration"], row["split"], row["table"]) == (kind, split, name)
                ]
                assert sum(row["rows"] for row in mine) == len(of_split)
                right = sum(row["rows"] * row["accuracy"] for row in mine)
                accuracy = labelled.quality[kind][split].accuracy
                assert right == pytest.approx(accuracy * len(of_split))
                positions = [row["position"] for row in mine]
                assert positions == sorted(set(positions))
                for row in mine:
                    assert row["lower"] <= row["confidence_mean"] <= row["upper"]


def test_rows_without_gold_are_labelled_and_not_judged(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.add("unlabeled", rows_of("unlabeled", 50, gold=False))
    labelled = made.label()
    assert labelled.unlabeled_rows == 50
    assert (labelled.accuracy, labelled.macro_f1, labelled.ece) == (None, None, None)
    assert labelled.quality == {"none": {}, "batch": {}}
    assert pq.read_table(made.labels / "reliability.parquet").num_rows == 0


def test_readouts_of_before_cut_tokens_were_counted_can_be_calibrated(made: Made) -> None:
    for shard in (made.readouts / "test").iterdir():
        pq.write_table(pq.read_table(shard).drop_columns("cut_tokens"), shard)
    assert made.label().splits["test"].kept == 50
