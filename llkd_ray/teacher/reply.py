"""What is read of an OpenAI-compatible endpoint's reply, from either API.

Endpoints leave out and add what they like: only what labels are read from is looked at, and that
strictly.

Shape legend: K likeliest first tokens.
"""

from typing import Annotated

from pydantic import BaseModel, Field

# A probability a little above 1 is a rounding error; NaN fails the comparison.
Logprob = Annotated[float, Field(le=0.01)]
Count = Annotated[int, Field(ge=0, le=10_000_000)]


class _Alternative(BaseModel):
    token: str
    logprob: Logprob


class _Position(BaseModel):
    top_logprobs: list[_Alternative] | None = None


class _Logprobs(BaseModel):
    content: list[_Position] | None = None
    """Of a chat."""
    top_logprobs: list[dict[str, Logprob] | None] | None = None
    """Of a completion."""


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message | None = None
    """Of a chat."""
    text: str | None = None
    """Of a completion."""
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Details(BaseModel):
    cached_tokens: Count | None = None


class _Usage(BaseModel):
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    prompt_tokens_details: _Details | None = None


class Reply(BaseModel):
    """A reply with its choices, one for each sample that was asked for."""

    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage | None = None

    @property
    def said(self) -> list[str]:
        """The words of each choice."""
        return [
            (choice.message.content if choice.message else choice.text) or ""
            for choice in self.choices
        ]

    @property
    def finished(self) -> bool:
        """Whether the first choice came to its end."""
        return self.choices[0].finish_reason == "stop"

    @property
    def top(self) -> list[tuple[str, float]]:
        """Text and log-probability of the K likeliest first tokens; none if they were not given."""
        logprobs = self.choices[0].logprobs
        if logprobs and logprobs.content:
            alternatives = logprobs.content[0].top_logprobs or []
            return [(one.token, one.logprob) for one in alternatives]
        if logprobs and logprobs.top_logprobs:
            return list((logprobs.top_logprobs[0] or {}).items())
        return []

    @property
    def prompt_tokens(self) -> int:
        """Tokens put before the model; 0 where the endpoint does not count."""
        return self.usage.prompt_tokens if self.usage else 0

    @property
    def tokens(self) -> int:
        """Tokens that the model wrote; 0 where the endpoint does not count."""
        return self.usage.completion_tokens if self.usage else 0

    @property
    def cached_tokens(self) -> int:
        """Of these, tokens that came from its cache."""
        details = self.usage and self.usage.prompt_tokens_details
        return (details and details.cached_tokens) or 0
