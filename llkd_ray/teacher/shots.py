"""Which gold examples the teacher is shown: as they stand, so many of each label, or the nearest.

Shape legend: N texts, P examples in the pool, D numbers in an embedding.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llkd_ray.config import Example, ShotsSection, TaskSection
from llkd_ray.errors import TeacherError
from llkd_ray.teacher.embedding import Encoder, Floats
from llkd_ray.teacher.wording import one_line


class Shots(Protocol):
    """Examples for the prompt: a row is shown the shared ones, then its own."""

    @property
    def shared(self) -> tuple[Example, ...]:
        """Examples that every row is shown."""

    @property
    def candidates(self) -> tuple[Example, ...]:
        """Examples of which each row is shown its own."""

    @property
    def own_count(self) -> int:
        """How many of its own a row is shown at most."""

    def own(self, texts: Sequence[str]) -> list[tuple[Example, ...]]:
        """Return the examples that each of N texts alone is shown, the best one last."""


def choose_shots(task: TaskSection, section: ShotsSection, pool: Sequence[Example] = ()) -> Shots:
    """Choose examples from the task's own and, but for `fixed`, from a pool of more.

    Raises:
        TeacherError: A label has too few examples, there are none at all, or the encoder that
            compares texts is not there.
    """
    if section.kind == "fixed":
        return SharedShots(task.examples)
    distinct = {one_line(example.text): example for example in reversed((*task.examples, *pool))}
    examples = tuple(reversed(distinct.values()))
    if section.kind == "balanced":
        return SharedShots(_balanced(task, section.per_label, examples))
    if not examples:
        raise TeacherError(
            "teacher.shots.kind = 'nearest': there are no examples to choose from; give "
            "task.examples or task.examples_source"
        )
    encoder = Encoder(section.encoder, "teacher.shots.encoder")
    embeddings = encoder.embed([example.text for example in examples])
    return NearestShots(examples, section.nearest, encoder, embeddings)


@dataclass(frozen=True)
class SharedShots:
    """The same examples for every row."""

    shared: tuple[Example, ...]
    candidates: tuple[Example, ...] = ()
    own_count: int = 0

    def own(self, texts: Sequence[str]) -> list[tuple[Example, ...]]:
        """Return no examples for each of N texts."""
        return [()] * len(texts)


def _balanced(
    task: TaskSection, per_label: int, examples: Sequence[Example]
) -> tuple[Example, ...]:
    """Take the first examples of each label, in rounds of one of each.

    A teacher leans to the label that it saw last and to an order that it saw before, so each round
    has an order of its own, and no label follows itself.
    """
    of = {
        name: [example for example in examples if example.label == name][:per_label]
        for name in task.label_names
    }
    for name, found in of.items():
        if len(found) < per_label:
            raise TeacherError(
                f"teacher.shots.per_label = {per_label}: the label {name!r} has {len(found)} "
                "examples; add some to task.examples or task.examples_source, or lower it"
            )
    chosen: list[Example] = []
    for number in range(per_label):
        # Drawn by a hash: the same on every machine and with every version of every library.
        order = sorted(of, key=lambda name: hashlib.sha256(f"{number} {name}".encode()).digest())
        if chosen and order[0] == chosen[-1].label:
            order[0], order[1] = order[1], order[0]
        chosen += [of[name][number] for name in order]
    return tuple(chosen)


@dataclass(frozen=True)
class NearestShots:
    """For each row the examples whose texts are the most like its own.

    Source: arXiv 2310.19596, k-NN demonstrations.
    """

    candidates: tuple[Example, ...]
    own_count: int
    encoder: Encoder
    embeddings: Floats
    """Of the candidates, length 1 each [P, D]."""
    shared: tuple[Example, ...] = ()

    def own(self, texts: Sequence[str]) -> list[tuple[Example, ...]]:
        """Return the nearest examples of each of N texts, the nearest last, never itself."""
        likeness = self.encoder.embed(texts) @ self.embeddings.T
        return [
            self._nearest(one_line(text), row) for text, row in zip(texts, likeness, strict=True)
        ]

    def _nearest(self, text: str, likeness: Floats) -> tuple[Example, ...]:
        ranked = (self.candidates[at] for at in np.argsort(-likeness, kind="stable"))
        others = [example for example in ranked if one_line(example.text) != text]
        return tuple(reversed(others[: self.own_count]))
