"""Class-wise thresholds: moving levels, and the cut that keeps a given share.

Moving levels are our reading of LLKD (arXiv 2411.08028), shaped after FreeMatch (arXiv 2205.07246):

    m_t      = mean of the signal over all rows
    m_t(y)   = mean of the signal over the rows with label y
    g_t      = lambda g_{t-1} + (1 - lambda) m_t
    k_t(y)   = lambda k_{t-1}(y) + (1 - lambda) m_t(y)
    tau_t(y) = g_t * k_t(y) / max_y' k_t(y')

The first time g and k are the means themselves; a class without rows keeps its last value.

Shape legend: N rows of this worker, C classes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from llkd_ray.selection.signals import GRID, AllReduce, Floats, Ints

# Two histograms of this many bins find a cut on the grid.
_BINS = 1024


@dataclass(frozen=True)
class MovingLevels:
    """Moving averages of one signal."""

    overall: float | None
    """g, over all rows; None before the first rows."""
    per_class: tuple[float | None, ...]
    """k(y); None for a class that never had a row."""

    @classmethod
    def start(cls, num_classes: int) -> "MovingLevels":
        """Return the levels before the first rows."""
        return cls(None, (None,) * num_classes)

    def moved(self, rows: Floats, sums: Floats, decay: float) -> "MovingLevels":
        """Return the levels after one more round.

        Args:
            rows: [C], how many there are of each class, over all workers.
            sums: [C], of the signal over them.
            decay: Lambda.
        """
        if rows.sum() == 0:
            return self
        means = np.divide(sums, rows, out=np.full(len(rows), np.nan), where=rows > 0)
        return self.moved_to(float(sums.sum() / rows.sum()), means, decay)

    def moved_to(self, overall: float, per_class: Floats, decay: float) -> "MovingLevels":
        """Return the levels after a round with these means; NaN for a class without rows."""
        return MovingLevels(
            _moved(self.overall, overall, decay),
            tuple(
                last if np.isnan(mean) else _moved(last, float(mean), decay)
                for last, mean in zip(self.per_class, per_class, strict=True)
            ),
        )

    def thresholds(self) -> Floats:
        """Return tau [C]: the overall level, scaled down for the classes with a lower level."""
        per_class = np.array([np.nan if k is None else k for k in self.per_class])
        if self.overall is None:
            return per_class
        top = np.nanmax(per_class)
        # A signal that is 0 everywhere has all its classes at the top.
        share = per_class / top if top > 0 else np.where(np.isnan(per_class), np.nan, 1.0)
        return share * self.overall


@dataclass(frozen=True)
class SelectionState:
    """What the next thresholds depend on: moving levels by the name of their signal."""

    levels: Mapping[str, MovingLevels] = field(default_factory=dict)

    def of(self, signal: str, num_classes: int) -> MovingLevels:
        """Return the levels of a signal, fresh ones if it never had a row."""
        return self.levels.get(signal) or MovingLevels.start(num_classes)

    def with_levels(self, **levels: MovingLevels) -> "SelectionState":
        """Return the state with these levels replaced."""
        return SelectionState({**self.levels, **levels})

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types, from which `from_json` gives back the same state exactly."""
        return {signal: asdict(levels) for signal, levels in self.levels.items()}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "SelectionState":
        """Undo `to_json`."""
        return cls(
            {
                signal: MovingLevels(of["overall"], tuple(of["per_class"]))
                for signal, of in tree.items()
            }
        )


def cuts(score: Floats, label: Ints, wanted: Floats, *, all_reduce: AllReduce) -> Floats:
    """Return for each class the highest cut that at least `wanted` of its rows reach.

    Rows of equal score stand or fall together. Exact on the grid, from two histograms that are
    summed over the workers, whatever the number of rows.

    Args:
        score: [N], 0 to 1, on the grid.
        label: [N], the class of each row, 0 to C - 1.
        wanted: [C], rows to keep; of a class with fewer rows all are kept.
        all_reduce: Sum over the workers.

    Returns:
        [C]; 0 for a class without rows.
    """
    num_classes = len(wanted)
    level = np.minimum(score * GRID, GRID - 1).astype(np.int64)
    coarse, fine = np.divmod(level, GRID // _BINS)

    def at_least(bins: Ints, rows: Ints) -> Floats:
        counts = np.bincount(rows * _BINS + bins, minlength=num_classes * _BINS)
        summed = all_reduce(counts.astype(np.float64)).reshape(num_classes, _BINS)
        return summed[:, ::-1].cumsum(axis=1)[:, ::-1]

    above = at_least(coarse, label)
    crossing = _last_reaching(above, wanted)
    beyond = np.append(above, np.zeros((num_classes, 1)), axis=1)[
        np.arange(num_classes), crossing + 1
    ]
    inside = coarse == crossing[label]
    within = at_least(fine[inside], label[inside])
    return (crossing * (GRID // _BINS) + _last_reaching(within, wanted - beyond)) / GRID


def _last_reaching(counts: Floats, wanted: Floats) -> Ints:
    """Return for each class the last bin that at least `wanted` rows reach, else the first."""
    reached = counts >= np.maximum(wanted, 1.0)[:, None]
    last: Ints = np.maximum(reached.sum(axis=1) - 1, 0)
    return last


def _moved(last: float | None, mean: float, decay: float) -> float:
    # Written so that a mean that stays does not move: one bit up would drop a class of equal rows.
    return mean if last is None else mean + decay * (last - mean)
