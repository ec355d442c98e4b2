"""What a rule may know of each row, and the arithmetic that many workers agree on.

Shape legend: N rows of this worker, C classes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Keys = npt.NDArray[np.uint64]
Probabilities = npt.NDArray[np.float32]
AllReduce = Callable[[Floats], Floats]
"""Sums an array over the workers and returns the sum to each of them."""

NONE = -1
"""Stands for a label or gold that a row does not have."""
GRID = 2**20
"""Signals are rounded to multiples of 1 / GRID: fine enough that no threshold notices, coarse
enough that float64 sums over 2**33 rows are exact, whatever the order of the rows or workers."""

# Rows whose distributions are worked on at a time: what that takes fits a processor's cache, and
# ten million rows take no more of it than these.
_BLOCK_ROWS = 2**14


@dataclass(frozen=True)
class Signals:
    """N rows, as a rule sees them."""

    keys: Keys
    """[N], half of each row's id: as good as random, and the same in every run."""
    label: Ints
    """[N], the teacher's label, 0 to C - 1."""
    gold: Ints
    """[N], the human's, or NONE. For the rule `gold` alone."""
    teacher: Probabilities
    """[N, C], the teacher's calibrated distribution."""
    student: Probabilities | None
    """[N, C], the student's; None where it was not asked."""

    def __len__(self) -> int:
        return len(self.label)

    @property
    def num_classes(self) -> int:
        """C."""
        return int(self.teacher.shape[1])

    @cached_property
    def confidence(self) -> Floats:
        """The teacher's probability of its label, [N], on the grid."""
        return on_grid(_chosen(self.teacher, self.label))

    @cached_property
    def uncertainty(self) -> Floats:
        """Of the student, [N], on the grid."""
        return on_grid(uncertainty(self._asked))

    @cached_property
    def predicted(self) -> Ints:
        """The student's label, [N]."""
        predicted: Ints = self._asked.argmax(axis=1)
        return predicted

    @cached_property
    def student_confidence(self) -> Floats:
        """The student's probability of its own label, [N], on the grid."""
        return on_grid(self._asked.max(axis=1, initial=0.0))

    @cached_property
    def student_of_label(self) -> Floats:
        """The student's probability of the teacher's label, [N], on the grid."""
        return on_grid(_chosen(self._asked, self.label))

    @property
    def teacher_sums(self) -> Floats:
        """The sum of the teacher's distributions, [C], on the grid."""
        return _summed(self.teacher)

    @property
    def student_sums(self) -> Floats:
        """The sum of the student's distributions, [C], on the grid."""
        return _summed(self._asked)

    def student_blocks(self) -> Iterator[tuple[slice, Floats]]:
        """Yield the student's distributions on the grid, some of the N rows at a time."""
        return _blocks(self._asked)

    @property
    def _asked(self) -> Probabilities:
        assert self.student is not None, "this rule needs the student's answers"
        return self.student


def uncertainty(probabilities: npt.NDArray[np.floating[Any]]) -> Floats:
    """Return the entropy of each row's distribution over the entropy of a uniform one.

    Args:
        probabilities: [N, C], rows sum to 1, C at least 2.

    Returns:
        [N], from 0 (certain) to 1 (clueless).
    """
    entropy = np.empty(len(probabilities))
    for start in range(0, len(entropy), _BLOCK_ROWS):
        p = probabilities[start : start + _BLOCK_ROWS].astype(np.float64)
        # 0 ln 0 is 0; a softmax in float32 does underflow to 0.
        surprise = -np.log(p, out=np.zeros_like(p), where=p > 0)
        entropy[start : start + _BLOCK_ROWS] = (p * surprise).sum(axis=1) / np.log(p.shape[1])
    return entropy.clip(0.0, 1.0)


def _blocks(probabilities: Probabilities) -> Iterator[tuple[slice, Floats]]:
    for start in range(0, len(probabilities), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        yield block, on_grid(probabilities[block])


def _summed(probabilities: Probabilities) -> Floats:
    # Sums of numbers on the grid are exact, whatever their order.
    total: Floats = np.zeros(probabilities.shape[1])
    for _, block in _blocks(probabilities):
        total += block.sum(axis=0)
    return total


def on_grid(signal: npt.NDArray[np.floating[Any]]) -> Floats:
    """Round to multiples of 1 / GRID."""
    rounded: Floats = np.round(signal.astype(np.float64) * GRID) / GRID
    return rounded


def class_sums(label: Ints, num_classes: int, *signals: Floats) -> Floats:
    """Count the rows of each class and sum signals over them: [1 + signals, C], of this worker."""
    counts = np.bincount(label, minlength=num_classes).astype(np.float64)
    sums = (np.bincount(label, weights=signal, minlength=num_classes) for signal in signals)
    return np.stack([counts, *sums])


def mix(keys: Keys, salt: np.random.SeedSequence) -> Keys:
    """Hash keys with a salt (the finalizer of splitmix64)."""
    mixed = keys ^ salt.generate_state(1, np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def hashed(keys: Keys, *salt: int) -> Floats:
    """Return a number in [0, 1) for each key, on the grid: the same in every run, [N]."""
    drawn = mix(keys, np.random.SeedSequence(salt)) >> np.uint64(64 - 20)
    return drawn.astype(np.float64) / GRID


def _chosen(probabilities: Probabilities, label: Ints) -> Probabilities:
    chosen: Probabilities = np.take_along_axis(probabilities, label[:, None], axis=1)[:, 0]
    return chosen
