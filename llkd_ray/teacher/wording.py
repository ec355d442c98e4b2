"""The prompt as text, for any tokenizer or none."""

import string
from collections.abc import Sequence
from dataclasses import dataclass

from llkd_ray.config import Example, TaskSection

LETTERS = string.ascii_uppercase
"""What labels are offered as, at most so many."""


@dataclass(frozen=True)
class Wording:
    """What a teacher is told about a task, and how it is asked about a text."""

    task: TaskSection
    answers: tuple[str, ...]
    """What stands for each of the C labels, in their order: its words, or its letter."""
    offered: bool = False
    """List the labels as options, each behind its letter."""

    @classmethod
    def in_words(cls, task: TaskSection) -> "Wording":
        """Ask for the words of a label."""
        return cls(task, label_words(task))

    @classmethod
    def in_letters(cls, task: TaskSection) -> "Wording":
        """Ask for the letter of one of the labels offered."""
        return cls(task, tuple(LETTERS[: len(task.labels)]), offered=True)

    @property
    def preamble(self) -> str:
        """Return the instruction and what is said about the labels; empty if there is nothing."""
        paragraphs = [self.task.instruction.strip(), "\n".join(self._labels())]
        return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)

    def prefix(self, shots: Sequence[Example]) -> str:
        """Return what stands before the question; it ends with a blank line unless it is empty."""
        paragraphs = [self.preamble] if self.preamble else []
        paragraphs += [f"{self.question(shot.text)} {self.answer(shot)}" for shot in shots]
        return "".join(f"{paragraph}\n\n" for paragraph in paragraphs)

    def question(self, text: str) -> str:
        """Return what is asked about a text; the answer follows after a space.

        Runs of white space become one space, so that a text stays one line and cannot pass for
        another example or an answer of its own.
        """
        return f"{self.task.text_prefix} {one_line(text)}\n{self.task.label_prefix}"

    def answer(self, shot: Example) -> str:
        """Return what the teacher should have answered about an example."""
        return self.answers[self.task.label_names.index(shot.label)]

    def messages(self, text: str, shots: Sequence[Example]) -> list[dict[str, str]]:
        """Return the prompt as a chat: the examples are earlier turns, the question is the last.

        The label prefix ends each question, so that a turn of the assistant is the bare answer.
        """
        chat = [{"role": "system", "content": self.preamble}] if self.preamble else []
        for shot in shots:
            chat.append({"role": "user", "content": self.question(shot.text)})
            chat.append({"role": "assistant", "content": self.answer(shot)})
        return [*chat, {"role": "user", "content": self.question(text)}]

    def _labels(self) -> list[str]:
        """Return a line about each label where they are offered, or any of them is described."""
        described = [one_line(label.description or "") for label in self.task.labels]
        if self.offered:
            words = label_words(self.task)
            return [
                f"{letter}: {said}" + (f" ({description})" if description else "")
                for letter, said, description in zip(self.answers, words, described, strict=True)
            ]
        if not any(described):
            return []
        return [
            f"{answer}: {description}" if description else answer
            for answer, description in zip(self.answers, described, strict=True)
        ]


def label_words(task: TaskSection) -> tuple[str, ...]:
    """Return what the teacher reads and writes for each of the C labels."""
    return tuple(one_line(label.words or label.name) for label in task.labels)


def one_line(text: str) -> str:
    """Turn each run of white space into one space, and none at the ends."""
    return " ".join(text.split())
