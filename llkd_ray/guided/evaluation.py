"""The gradual evaluation check: what the student gets right and wrong, for the teacher to read.

Shape legend: N validation rows, C classes.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llkd_ray.metrics import Floats, Ints

_LEAST = 1e-12


@dataclass(frozen=True)
class ClassReport:
    """One class on the validation rows; a score without a row to count is 0."""

    label: str
    rows: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Confusion:
    """Rows of one class that were taken for another."""

    gold: str
    predicted: str
    rows: int


@dataclass(frozen=True)
class Report:
    """A student on the validation rows."""

    rows: int
    loss: float
    """Mean cross-entropy, natural logarithm."""
    accuracy: float
    precision: float
    """Mean over the classes that have gold rows or are predicted, as are recall and F1."""
    recall: float
    f1: float
    classes: tuple[ClassReport, ...]
    """In the order of the labels, C."""
    confusions: tuple[Confusion, ...]
    """Most rows first."""


def report_on(gold: Ints, probabilities: Floats, label_names: Sequence[str]) -> Report:
    """Judge a student by gold.

    Args:
        gold: Position of each row's label [N], N at least 1.
        probabilities: The student's [N, C].
        label_names: The C classes.
    """
    num_classes = len(label_names)
    predicted = probabilities.argmax(axis=1)
    table = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(table, (gold, predicted), 1)
    right, of_gold, of_predicted = np.diag(table), table.sum(axis=1), table.sum(axis=0)
    precision = right / np.maximum(of_predicted, 1)
    recall = right / np.maximum(of_gold, 1)
    f1 = 2 * right / np.maximum(of_gold + of_predicted, 1)
    present = (of_gold + of_predicted) > 0
    mistakes = sorted(
        (
            Confusion(label_names[truth], label_names[said], int(table[truth, said]))
            for truth, said in itertools.permutations(range(num_classes), 2)
            if table[truth, said]
        ),
        key=lambda pair: -pair.rows,
    )
    of_truth = probabilities[np.arange(len(gold)), gold].astype(np.float64)
    return Report(
        rows=len(gold),
        loss=float(-np.log(np.maximum(of_truth, _LEAST)).mean()),
        accuracy=float(right.sum() / len(gold)),
        precision=float(precision[present].mean()),
        recall=float(recall[present].mean()),
        f1=float(f1[present].mean()),
        classes=tuple(
            ClassReport(
                name, int(of_gold[at]), float(precision[at]), float(recall[at]), float(f1[at])
            )
            for at, name in enumerate(label_names)
        ),
        confusions=tuple(mistakes),
    )


def render(
    report: Report, words: dict[str, str], *, tokens: int, count: Callable[[str], int]
) -> str:
    """Put a report into words for the prompt, the most important lines of it that fit.

    The totals come first, then in turn the weakest class and the commonest confusion. Nothing is
    said of a class without a validation row.

    Args:
        report: Of the student.
        words: What the teacher reads for each label.
        tokens: That the text may take.
        count: Returns the tokens of a text.
    """
    total = (
        f"A classifier of these texts: accuracy {report.accuracy:.2f}, "
        f"precision {report.precision:.2f}, recall {report.recall:.2f}, F1 {report.f1:.2f}."
    )
    weakest = sorted((of for of in report.classes if of.rows), key=lambda of: of.f1)
    classes = [
        f"{words[of.label]}: precision {of.precision:.2f}, recall {of.recall:.2f}, F1 {of.f1:.2f}."
        for of in weakest
    ]
    confusions = [
        f"{words[of.gold]} is taken for {words[of.predicted]}, {of.rows} of {report.rows} times."
        for of in report.confusions
    ]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(classes, confusions))
    text = ""
    for line in [total, *filter(None, in_turn)]:
        longer = f"{text}\n{line}" if text else line
        if count(longer) > tokens:
            break
        text = longer
    return text
