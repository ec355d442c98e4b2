"""From stored log-probabilities to a label and a confidence that means something.

A language model prefers some label words whatever the text says. Calibration takes that away
after the fact: it needs the stored read-outs only, never the teacher again.

Shape legend: N rows, C classes.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llkd_ray.artifacts import write_text
from llkd_ray.config import CalibrationSection

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """What is subtracted from each label's log-probability before they are normalised."""

    log_prior: tuple[float, ...]

    @classmethod
    def fit(
        cls, config: CalibrationSection, logprobs: Iterable[Floats], num_classes: int
    ) -> "Calibration":
        """Estimate the calibration over batches of read-outs, each [N, C].

        `batch` takes the mean of the normalised probabilities over the corpus for the teacher's
        prior, and so assumes the labels to be about equally frequent.
        Source: arXiv 2309.17249, with the whole corpus for a batch.
        """
        match config.kind:
            case "none":
                return cls((0.0,) * num_classes)
            case "batch":
                total, rows = np.zeros(num_classes), 0
                for batch in logprobs:
                    total += softmax(batch).sum(axis=0)
                    rows += len(batch)
                return cls(tuple(np.log(total / rows).tolist()))

    def probabilities(self, logprobs: Floats) -> Floats:
        """Return the calibrated distribution [N, C] over the labels."""
        return softmax(logprobs - np.array(self.log_prior))

    def write(self, path: Path) -> None:
        """Store as JSON."""
        write_text(path, json.dumps({"log_prior": self.log_prior}) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Calibration":
        """Read what `write` stored."""
        return cls(tuple(json.loads(path.read_text(encoding="utf-8"))["log_prior"]))


def softmax(logits: Floats) -> Floats:
    """Normalise exponentials along the last axis, without overflow."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), dtype=np.float64)
