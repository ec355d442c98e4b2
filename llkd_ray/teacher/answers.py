"""What a teacher answers about a text, whichever kind of teacher it is.

Shape legend: N texts, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llkd_ray.errors import TeacherError


@dataclass(frozen=True)
class Answer:
    """A teacher's answer about one text."""

    logprobs: list[float] | None
    """Natural logarithm of the full-vocabulary probability of each label [C]; None where there is
    no answer."""
    prompt_tokens: int
    """Tokens put before the teacher, over all forward passes of this text."""
    cached_tokens: int
    """Of these, tokens that came from its prefix cache."""
    cut_tokens: int
    """Tokens of the text that were left out to fit."""
    error: str | None = None
    """Why there is no answer."""


class TeacherDiedError(TeacherError):
    """The teacher's process is gone: another one may well answer the same texts."""


class Teacher(Protocol):
    """Answers about texts. Whoever holds it keeps several calls open at once."""

    async def read(self, texts: Sequence[str]) -> list[Answer]:
        """Return an answer for each of N texts, in their order.

        What concerns one text alone is that answer's error.

        Raises:
            TeacherDiedError: The teacher's process has died; a new one can take over.
            TeacherError: It cannot answer at all: a wrong address, key or model.
        """

    async def close(self) -> None:
        """Let go of processes and connections."""


# Texts without content, by which a teacher shows which label it prefers whatever the text says.
# Source: arXiv 2102.09690, section 5, names the first two and a mask token.
CONTENT_FREE = ("N/A", "", "[MASK]")
