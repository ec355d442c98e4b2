"""Numbers in, numbers out: accuracy, macro-F1, calibration, percentiles, bootstrap intervals.

Shape legend: N rows, C classes, B bins.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def softmax(logits: Floats) -> Floats:
    """Normalise exponentials along the last axis, without overflow; float64."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), dtype=np.float64)


def accuracy(gold: Ints, predicted: Ints) -> float:
    """Return the share of rows predicted right; both arrays [N], N at least 1."""
    return float(np.mean(gold == predicted))


def macro_f1(gold: Ints, predicted: Ints, num_classes: int) -> float:
    """Return the unweighted mean of the per-class F1.

    A class that is neither in the gold nor predicted has no F1 and is left out of the mean.
    """
    true_positive = np.bincount(gold[gold == predicted], minlength=num_classes)
    of_gold = np.bincount(gold, minlength=num_classes)
    of_predicted = np.bincount(predicted, minlength=num_classes)
    present = (of_gold + of_predicted) > 0
    f1 = 2 * true_positive[present] / (of_gold + of_predicted)[present]
    return float(np.mean(f1))


@dataclass(frozen=True)
class ReliabilityBin:
    """Rows of about the same confidence: what it promises, and what is right."""

    position: int
    """From 0, the least confident."""
    lower: float
    upper: float
    rows: int
    mean_confidence: float
    accuracy: float


def reliability(
    confidence: Floats, correct: npt.NDArray[np.bool_], bins: int
) -> list[ReliabilityBin]:
    """Sort rows into equally wide bins of confidence (0 to 1); empty bins are left out."""
    index = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    return [
        ReliabilityBin(
            position=bin_,
            lower=bin_ / bins,
            upper=(bin_ + 1) / bins,
            rows=int(inside.sum()),
            mean_confidence=float(confidence[inside].mean()),
            accuracy=float(correct[inside].mean()),
        )
        for bin_ in range(bins)
        if (inside := index == bin_).any()
    ]


def expected_calibration_error(
    confidence: Floats, correct: npt.NDArray[np.bool_], bins: int
) -> float:
    """Return the row-weighted mean gap between confidence and accuracy over the bins.

    Source: Guo et al. 2017, arXiv 1706.04599, Eq. 3, with equally wide bins.
    """
    table = reliability(confidence, correct, bins)
    gaps = sum(bin_.rows * abs(bin_.mean_confidence - bin_.accuracy) for bin_ in table)
    return gaps / sum(bin_.rows for bin_ in table)


def reliability_by_rank(
    confidence: Floats, correct: npt.NDArray[np.bool_], parts: int
) -> list[ReliabilityBin]:
    """Cut rows sorted by confidence into equally many; empty parts are left out.

    Rows of equal confidence stay in the order given. A part's bounds are the least and the most
    confidence in it.
    """
    ranked = np.array_split(np.argsort(confidence, kind="stable"), parts)
    return [
        ReliabilityBin(
            position=position,
            lower=float(confidence[inside[0]]),
            upper=float(confidence[inside[-1]]),
            rows=len(inside),
            mean_confidence=float(confidence[inside].mean()),
            accuracy=float(correct[inside].mean()),
        )
        for position, inside in enumerate(ranked)
        if len(inside)
    ]


@dataclass(frozen=True)
class Quality:
    """How often answers are right, and whether their confidence knows it."""

    rows: int
    accuracy: float
    macro_f1: float
    ece: float
    """Expected calibration error, 0 best."""
    accuracy_confident_half: float
    """Of the half of the rows with the most confidence."""


def quality(
    gold: Ints, predicted: Ints, confidence: Floats, num_classes: int, bins: int
) -> Quality:
    """Judge answers to N rows, at least 1, by gold; all arrays [N]."""
    correct = gold == predicted
    confident = np.argsort(confidence, kind="stable")[len(gold) // 2 :]
    return Quality(
        rows=len(gold),
        accuracy=accuracy(gold, predicted),
        macro_f1=macro_f1(gold, predicted, num_classes),
        ece=expected_calibration_error(confidence, correct, bins),
        accuracy_confident_half=float(correct[confident].mean()),
    )


@dataclass(frozen=True)
class Interval:
    """A value and its bootstrap 95 % percentile interval."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    statistic: Callable[[Ints], float], num_rows: int, resamples: int, seed: int
) -> Interval:
    """Resample rows with replacement and return the statistic with its 95 % interval.

    Args:
        statistic: Takes row indices [N] and returns the number for those rows.
        num_rows: N.
        resamples: How many resamples are drawn.
        seed: Of the resampling, so that the interval is repeatable.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, num_rows, num_rows)) for _ in range(resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(statistic(np.arange(num_rows)), float(low), float(high))


def reflected(interval: Interval) -> Interval:
    """Turn a bootstrap interval around, for what noise makes larger, such as calibration errors.

    Resamples are noisier than the rows, so that their values lie above the truth by about as much
    as that of the rows does. Never below 0.

    Source: the basic bootstrap, Davison and Hinkley 1997, Bootstrap Methods, section 5.2.
    """
    value = interval.value
    return Interval(
        value, max(0.0, 2 * value - interval.high), max(value, 2 * value - interval.low)
    )


def percentiles_ms(latencies_ms: Floats) -> dict[str, float]:
    """Return p50, p95 and p99 of latencies in milliseconds, linearly interpolated."""
    return {f"p{level}": float(np.percentile(latencies_ms, level)) for level in (50, 95, 99)}
