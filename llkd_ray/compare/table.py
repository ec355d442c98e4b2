"""From trials to a table: means over seeds, and intervals of differences over test rows.

Shape legend: N gold test rows, R resamples, S seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llkd_ray.compare.trial import Trial
from llkd_ray.metrics import Floats, Ints, accuracy, macro_f1
from llkd_ray.student.stopping import best_of

VALIDATION = "validation_macro_f1"
CRITERIA = {"gold": VALIDATION, "teacher": "held_out_macro_f1", "last": None}
"""How the epoch can be chosen: the column of schema.EPOCHS that the chosen one has most of."""


@dataclass(frozen=True)
class Difference:
    """Mean over the seeds of macro-F1 minus another's, with a 95 % interval over test rows."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """One variant, over its seeds, at the epochs that one criterion chooses."""

    variant: str
    criterion: str
    seeds: int
    accuracy: float
    accuracy_sd: float | None
    """Sample standard deviation over the seeds; None of a single one."""
    macro_f1: float
    macro_f1_sd: float | None
    validation_macro_f1: float | None
    """On the gold validation rows, after the chosen epochs: what settings may be chosen by; None
    without such gold."""
    best_macro_f1: float
    """Of the epoch that is best on the test rows: a perfect criterion would find it; no result."""
    epoch: float
    """Mean of the chosen epochs."""
    row_steps: float
    """Mean of the rows trained on, over all epochs."""
    rows_used_fraction: float
    """The same as a share of all rows in every epoch."""
    steps: float
    seconds: float
    """Of one trial, on its share of the machine."""
    over: dict[str, Difference]
    """By baseline."""


def tabulate(
    trials: Mapping[str, Sequence[Trial]],
    gold: Ints,
    num_classes: int,
    *,
    baselines: Sequence[str],
    resamples: int,
    seed: int,
) -> list[Line]:
    """Return a line for each variant and each criterion that has something to go by.

    Args:
        trials: By variant, in the order of the seeds, the same for all.
        gold: [N].
        num_classes: Of the task.
        baselines: Variants that all others are set against.
        resamples: R, of the test rows.
        seed: Of the resamples, which are the same for every variant.
    """
    lines = []
    for criterion in CRITERIA:
        chosen = {
            name: [_chosen(trial, criterion) for trial in of_seeds]
            for name, of_seeds in trials.items()
        }
        if any(epoch is None for epochs in chosen.values() for epoch in epochs):
            continue
        resampled = {
            name: np.mean(
                [
                    _resampled(trial.predicted[epoch or 0], gold, num_classes, resamples, seed)
                    for trial, epoch in zip(trials[name], chosen[name], strict=True)
                ],
                axis=0,
            )
            for name in trials
        }
        for name, of_seeds in trials.items():
            epochs = [epoch or 0 for epoch in chosen[name]]
            others = [base for base in baselines if base in trials and base != name]
            over = {base: _difference(resampled[name] - resampled[base]) for base in others}
            lines.append(_line((name, criterion), of_seeds, epochs, (gold, num_classes), over))
    return lines


def _chosen(trial: Trial, criterion: str) -> int | None:
    """Return the position of the chosen epoch, None where there is nothing to choose by."""
    column = CRITERIA[criterion]
    if column is None:
        return len(trial.epochs) - 1
    scores = [row[column] for row in trial.epochs]
    if any(score is None for score in scores):
        return None
    return best_of(scores)


def _resampled(predicted: Ints, gold: Ints, num_classes: int, resamples: int, seed: int) -> Floats:
    """Return macro-F1 on all rows and on each resample of them, [1 + R]."""
    rng = np.random.default_rng(seed)
    values = [macro_f1(gold, predicted, num_classes)]
    for _ in range(resamples):
        rows = rng.integers(0, len(gold), len(gold))
        values.append(macro_f1(gold[rows], predicted[rows], num_classes))
    return np.array(values)


def _difference(values: Floats) -> Difference:
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return Difference(float(values[0]), float(low), float(high))


def _line(
    what: tuple[str, str],
    trials: Sequence[Trial],
    epochs: Sequence[int],
    truth: tuple[Ints, int],
    over: dict[str, Difference],
) -> Line:
    gold, num_classes = truth
    answers = [trial.predicted[epoch] for trial, epoch in zip(trials, epochs, strict=True)]
    accuracies = [accuracy(gold, of) for of in answers]
    f1 = [macro_f1(gold, of, num_classes) for of in answers]
    best = [max(macro_f1(gold, of, num_classes) for of in trial.predicted) for trial in trials]
    row_steps = [trial.epochs[-1]["row_steps"] for trial in trials]
    all_rows = [sum(row["rows"] for row in trial.epochs) for trial in trials]
    return Line(
        variant=what[0],
        criterion=what[1],
        seeds=len(trials),
        accuracy=float(np.mean(accuracies)),
        accuracy_sd=_sd(accuracies),
        macro_f1=float(np.mean(f1)),
        macro_f1_sd=_sd(f1),
        validation_macro_f1=_validation(trials, epochs),
        best_macro_f1=float(np.mean(best)),
        epoch=float(np.mean(epochs)) + 1,
        row_steps=float(np.mean(row_steps)),
        rows_used_fraction=sum(row_steps) / sum(all_rows),
        steps=float(np.mean([trial.epochs[-1]["steps"] for trial in trials])),
        seconds=float(np.mean([trial.seconds for trial in trials])),
        over=over,
    )


def _validation(trials: Sequence[Trial], epochs: Sequence[int]) -> float | None:
    scores = [trial.epochs[at][VALIDATION] for trial, at in zip(trials, epochs, strict=True)]
    return None if None in scores else float(np.mean(scores))


def _sd(values: Sequence[float]) -> float | None:
    """Return the standard deviation over seeds; one alone says nothing of it."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
