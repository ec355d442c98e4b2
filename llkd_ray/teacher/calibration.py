"""From stored log-probabilities to a label and a confidence that means something.

A language model prefers some label words whatever the text says, and is surer than it is right.
Calibration takes that away after the fact: it needs the stored read-outs only, never the teacher
again.

Shape legend: N rows, C classes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llkd_ray.artifacts import write_text
from llkd_ray.metrics import softmax

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_TEMPERATURES = (0.05, 20.0)
# Of a label against the likeliest one: a probability of zero says no more than this.
LEAST_LOGIT = -50.0
_NEWTON_STEPS = 100
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Calibration:
    """A preference that is taken off each label, and a scale for what is left."""

    log_prior: tuple[float, ...]
    """Subtracted from each label's log-probability [C]."""
    temperature: float = 1.0
    """Divides the difference: above 1 makes a teacher that is too sure less so."""

    @classmethod
    def dividing_by(cls, prior: Floats) -> "Calibration":
        """Divide each label's probability by what the teacher gives it anyway, [C]."""
        # A label that never got any probability keeps none; zero over zero would be no number.
        floored = np.maximum(prior, np.finfo(np.float64).tiny)
        return cls(tuple(np.log(floored).tolist()))

    def corrected(self, scale: float, bias: Floats) -> "Calibration":
        """Return this calibration with `scale * logits + bias` of it."""
        log_prior = np.array(self.log_prior) - bias * self.temperature / scale
        return Calibration(tuple(log_prior.tolist()), self.temperature / scale)

    def logits(self, logprobs: Floats) -> Floats:
        """Return the calibrated, not yet normalised log-probabilities [N, C]."""
        logits: Floats = (logprobs - np.array(self.log_prior)) / self.temperature
        return logits

    def probabilities(self, logprobs: Floats) -> Floats:
        """Return the calibrated distribution [N, C] over the labels."""
        return softmax(self.logits(logprobs))


def fit_temperature(logits: Floats, gold: Ints, *, hold: float = 0.0) -> float:
    """Return the temperature under which gold is likeliest, within 0.05 to 20.

    The negative log-likelihood is convex in 1/T, so over log T it has a single valley, which
    golden sections close in on; what holds T is least at one and bends it little.

    Source: Guo et al. 2017, arXiv 1706.04599, section 4.2.

    Args:
        logits: [N, C], N at least 1; finite where gold is.
        gold: Position of the right label of each row [N].
        hold: Towards a temperature of one, like by so many more rows; of a few rows that are all
            right, gold would be likeliest at the lowest temperature there is.
    """
    below_best = logits - logits.max(axis=1, keepdims=True)
    of_gold = below_best[np.arange(len(gold)), gold]

    def loss(log_temperature: float) -> float:
        scale = math.exp(-log_temperature)
        normaliser = np.log(np.exp(below_best * scale).sum(axis=1))
        held = hold * log_temperature**2 / (2 * len(gold))
        return float(np.mean(normaliser - of_gold * scale)) + held

    low, high = map(math.log, _TEMPERATURES)
    while high - low > 1e-6:
        step = _GOLDEN * (high - low)
        if loss(high - step) <= loss(low + step):
            high = low + step
        else:
            low = high - step
    return math.exp((low + high) / 2)


def fit_vector(logits: Floats, gold: Ints) -> tuple[float, Floats]:
    """Return the scale and the bias of each label under which gold is likeliest.

    The biases are held towards zero like by one more row, so that few rows do not move them far.
    The loss is convex; Newton's steps are halved until they help.

    Source: vector scaling, Guo et al. 2017, arXiv 1706.04599, section 4.2, with one scale for all
    labels.

    Args:
        logits: [N, C], N at least 1; finite where gold is.
        gold: Position of the right label of each row [N].

    Returns:
        The scale, from 0.05 to 20, and the biases [C]: `scale * logits + bias` is calibrated.
    """
    rows, num_classes = logits.shape
    x = np.maximum(logits - logits.max(axis=1, keepdims=True), LEAST_LOGIT)
    right = np.eye(num_classes)[gold]
    held = 2 / rows

    def loss(parameters: Floats) -> float:
        z = parameters[0] * x + parameters[1:]
        top = z.max(axis=1)
        normaliser = np.log(np.exp(z - top[:, None]).sum(axis=1)) + top
        likelihood = np.mean(normaliser - z[np.arange(rows), gold])
        return float(likelihood + held / 2 * (parameters[1:] ** 2).sum())

    parameters = np.concatenate([[1.0], np.zeros(num_classes)])
    for _ in range(_NEWTON_STEPS):
        p = softmax(parameters[0] * x + parameters[1:])
        wrong, mean_x = p - right, (p * x).sum(axis=1)
        gradient = np.concatenate(
            [[(wrong * x).sum() / rows], wrong.mean(axis=0) + held * parameters[1:]]
        )
        hessian = np.empty((num_classes + 1,) * 2)
        hessian[0, 0] = np.mean((p * x**2).sum(axis=1) - mean_x**2) + 1e-9
        hessian[0, 1:] = hessian[1:, 0] = (p * (x - mean_x[:, None])).mean(axis=0)
        hessian[1:, 1:] = np.diag(p.mean(axis=0) + held) - p.T @ p / rows
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-6:
            moved = parameters - size * step
            moved[0] = np.clip(moved[0], 1 / _TEMPERATURES[1], 1 / _TEMPERATURES[0])
            if loss(moved) < loss(parameters):
                break
            size /= 2
        else:
            break
        parameters = moved
    return float(parameters[0]), parameters[1:]


def write_calibrations(path: Path, fitted: Mapping[str, Calibration]) -> None:
    """Store calibrations by kind, as JSON."""
    tree = {kind: asdict(calibration) for kind, calibration in fitted.items()}
    write_text(path, json.dumps(tree, indent=2) + "\n")


def read_calibrations(path: Path) -> dict[str, Calibration]:
    """Read what `write_calibrations` stored."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    return {
        kind: Calibration(tuple(stored["log_prior"]), stored["temperature"])
        for kind, stored in tree.items()
    }
