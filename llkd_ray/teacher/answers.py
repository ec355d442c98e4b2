"""What a teacher answers about a text, or writes, whichever kind of teacher it is.

Shape legend: N texts, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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


@dataclass(frozen=True)
class Continuation:
    """What a teacher wrote after a prompt."""

    text: str
    finished: bool
    """Whether it came to a stop string or an end of its own."""
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt's, from the cache."""
    error: str | None = None
    """Why there is no text."""


class TeacherDiedError(TeacherError):
    """The teacher's process is gone: another one may well answer the same texts."""


class Teacher(Protocol):
    """Answers about texts. Whoever holds it keeps several calls open at once."""

    @property
    def way(self) -> str | None:
        """How labels are read, where only its answers say so; None where the settings do."""

    async def read(self, texts: Sequence[str]) -> list[Answer]:
        """Return an answer for each of N texts, in their order.

        What concerns one text alone is that answer's error.

        Raises:
            TeacherDiedError: The teacher's process has died; a new one can take over.
            TeacherError: It cannot answer at all: a wrong address, key or model.
        """

    async def close(self) -> None:
        """Let go of processes and connections."""


class Author(Teacher, Protocol):
    """A teacher that also writes."""

    async def write(
        self, prompt: str, *, json_schema: Mapping[str, Any] | None = None, **sampling: Any
    ) -> Continuation:
        """Go on from a prompt, or answer it where the teacher's format is a chat.

        What concerns this prompt alone is the continuation's error.

        Args:
            prompt: Text, in which nothing is special.
            json_schema: Of what is to be written; any text where not given.
            sampling: temperature, top_p, max_tokens, seed and stop, as OpenAI's API and vLLM's
                SamplingParams have them.

        Raises:
            TeacherDiedError: The teacher's process has died.
            TeacherError: It cannot write at all: a wrong address, key or model.
        """


# Texts without content, by which a teacher shows which label it prefers whatever the text says.
# Source: arXiv 2102.09690, section 5, names the first two and a mask token.
CONTENT_FREE = ("N/A", "", "[MASK]")
