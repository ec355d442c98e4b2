"""What the student gets wrong: the validation report, hard negatives, the budget of each label."""

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from llkd_ray.config import GuideSection, ShownSection
from llkd_ray.guided.budget import share_out
from llkd_ray.guided.evaluation import render, report_on
from llkd_ray.guided.shown import Answered, draw, sort_rows

NAMES = ("person", "place", "number")
WORDS = {name: name for name in NAMES}


def words(text):
    return len(text.split())


@pytest.fixture
def answered():
    """60 rows, 20 of each class, answered at random but better than chance."""
    rng = np.random.default_rng(1)
    gold = np.arange(60) % 3
    logits = rng.normal(size=(60, 3)) + 1.0 * np.eye(3)[gold]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Answered(tuple(f"text {n}" for n in range(60)), gold, probabilities)


def test_the_report_agrees_with_scikit_learn(answered):
    report = report_on(answered.gold, answered.probabilities, NAMES)
    predicted = answered.probabilities.argmax(axis=1)
    precision, recall, f1, rows = precision_recall_fscore_support(answered.gold, predicted)
    for at, of_class in enumerate(report.classes):
        assert (of_class.precision, of_class.recall, of_class.f1, of_class.rows) == pytest.approx(
            (precision[at], recall[at], f1[at], rows[at])
        )
    assert report.f1 == pytest.approx(f1.mean())
    assert report.precision == pytest.approx(precision.mean())
    assert report.accuracy == pytest.approx((predicted == answered.gold).mean())
    assert sum(pair.rows for pair in report.confusions) == (predicted != answered.gold).sum()
    assert report.loss == pytest.approx(
        -np.log(answered.probabilities[np.arange(60), answered.gold]).mean()
    )


def test_a_probability_of_zero_gives_a_finite_loss():
    report = report_on(np.array([0]), np.array([[0.0, 1.0, 0.0]]), NAMES)
    assert 20 < report.loss < 30
    assert report.f1 == 0.0


def test_the_report_keeps_within_its_tokens_and_the_weakest_class_comes_first(answered):
    report = report_on(answered.gold, answered.probabilities, NAMES)
    whole = render(report, WORDS, tokens=1000, count=words)
    weakest = min(report.classes, key=lambda of_class: of_class.f1).label
    lines = whole.splitlines()
    assert lines[0].startswith("A classifier of these texts: accuracy 0.")
    assert lines[1].startswith(f"{weakest}: precision")
    assert " is taken for " in lines[2]
    assert all(any(line.startswith(f"{name}: ") for line in lines) for name in NAMES)
    for tokens in range(words(whole) + 1):
        text = render(report, WORDS, tokens=tokens, count=words)
        assert words(text) <= tokens
        assert whole.startswith(text)
    assert render(report, WORDS, tokens=0, count=words) == ""


def test_hard_negatives_are_the_rows_of_each_label_with_most_confidence_in_a_wrong_one(answered):
    predicted = answered.probabilities.argmax(axis=1)
    confidence = answered.probabilities.max(axis=1)
    by_share = sort_rows(answered, ShownSection(hard_of_label=0.5))
    for label, rows in enumerate(by_share):
        mistaken = [n for n in range(60) if answered.gold[n] == label != predicted[n]]
        mistaken.sort(key=lambda n: -confidence[n])
        half = -(-len(mistaken) // 2)
        assert rows.hard.tolist() == mistaken[:half]
        assert rows.wrong.tolist() == mistaken[half:]
        assert len(rows.correct) + len(mistaken) == 20
    for rows in sort_rows(answered, ShownSection(hard_of_label=1)):
        assert len(rows.hard) == 1


def test_a_prompt_shows_the_asked_number_of_each_kind_the_same_for_the_same_seed(answered):
    section = ShownSection(correct=3, wrong=1, hard=2)
    of_label = sort_rows(answered, section)[0]
    shown = draw(answered, of_label, section, (0, 1, 2))
    assert (len(shown.correct), len(shown.wrong), len(shown.hard)) == (3, 1, 2)
    assert shown == draw(answered, of_label, section, (0, 1, 2))
    assert shown != draw(answered, of_label, section, (0, 1, 3))


def test_correct_rows_stand_in_for_wrong_ones_and_the_other_way_round():
    section = ShownSection(correct=2, wrong=1, hard=1)
    texts, gold = tuple("abcd"), np.zeros(4, dtype=np.int64)
    right = Answered(texts, gold, np.array([[0.9, 0.1]] * 4))
    shown = draw(right, sort_rows(right, section)[0], section, (0,))
    assert (len(shown.correct), len(shown.wrong), len(shown.hard)) == (4, 0, 0)
    wrong = Answered(texts, gold, np.array([[0.1, 0.9]] * 4))
    shown = draw(wrong, sort_rows(wrong, section)[0], section, (0,))
    assert (len(shown.correct), len(shown.wrong), len(shown.hard)) == (0, 2, 1)
    nothing = draw(wrong, sort_rows(wrong, section)[1], section, (0,))
    assert len(nothing) == 0


def test_without_hard_negatives_none_are_shown(answered):
    section = ShownSection(correct=4, wrong=0, hard=0)
    shown = draw(answered, sort_rows(answered, section)[0], section, (0,))
    assert (len(shown.correct), len(shown.wrong), len(shown.hard)) == (4, 0, 0)


@pytest.mark.parametrize("samples", [0, 1, 7, 100, 257])
def test_the_budget_adds_up_and_the_weakest_label_gets_most(samples):
    f1 = np.array([0.9, 0.2, 0.6, 0.9])
    shares = share_out(samples, f1, 0.5)
    assert shares.sum() == samples
    assert shares.argmax() == (0 if samples == 0 else 1)
    assert (shares >= 0).all()


def test_the_budget_is_even_without_a_weakness_or_where_it_is_not_to_count():
    assert share_out(9, np.ones(3), 1.0).tolist() == [3, 3, 3]
    assert share_out(10, np.array([0.0, 0.5, 1.0]), 0.0).tolist() == [4, 3, 3]
    assert share_out(9, np.array([0.0, 0.5, 1.0]), 1.0).tolist() == [6, 3, 0]


def test_a_seed_without_rows_to_train_or_to_validate_is_refused():
    assert GuideSection(seed_rows=1000).validation_rows == 200
    with pytest.raises(ValueError, match="no row to train or none to validate"):
        GuideSection(seed_rows=10, validation_fraction=0.01)
