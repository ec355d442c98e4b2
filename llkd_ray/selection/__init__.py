"""The method: which rows the student trains on, at what weight, towards which label."""

from llkd_ray.selection.rules import Selection, balanced, needs_student, select
from llkd_ray.selection.signals import (
    NONE,
    AllReduce,
    Bools,
    Floats,
    Ints,
    Keys,
    Probabilities,
    Signals,
    hashed,
    mix,
    uncertainty,
)
from llkd_ray.selection.thresholds import MovingLevels, SelectionState, cuts

__all__ = [
    "NONE",
    "AllReduce",
    "Bools",
    "Floats",
    "Ints",
    "Keys",
    "MovingLevels",
    "Probabilities",
    "Selection",
    "SelectionState",
    "Signals",
    "balanced",
    "cuts",
    "hashed",
    "mix",
    "needs_student",
    "select",
    "uncertainty",
]
