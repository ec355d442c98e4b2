"""The HTTP protocol that student and teacher share, and its limits.

    POST /v1/classify  {"texts": ["..."]}  ->  {"model": ..., "predictions": [...]}
    GET  /v1/model                         ->  what answers, and how much it takes at once
    GET  /healthz                          ->  200 while the model can answer

What cannot be answered is refused with a 4xx and one sentence under `detail`.

Shape legend: N texts, C classes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, FailFast, ValidationError

from llkd_ray.config import ServeSection

Floats = npt.NDArray[np.float64]
Answerer = Literal["student", "teacher"]
Kind = Literal["student", "teacher", "cascade"]
Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class Classification:
    """What a classifier answers to N texts."""

    probabilities: Floats
    """[N, C]."""
    by: Sequence[Answerer | None] | None = None
    """Who answered each of the N texts, None where nobody was sure enough: such a text gets no
    label. None as a whole where one model answers all, and then the protocol does not say it."""

    def verdicts(self, labels: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield each text's label and, where more than one could answer, who did.

        Args:
            labels: The C classes.
        """
        best = self.probabilities.argmax(axis=1).tolist()
        if self.by is None:
            yield from ({"label": labels[column]} for column in best)
            return
        for column, by in zip(best, self.by, strict=True):
            yield {"label": None if by is None else labels[column], "by": by}


class Classifier(Protocol):
    """A model behind the protocol. It lives in one process with one event loop."""

    async def classify(self, texts: list[str]) -> Classification:
        """Answer N texts, N at least 1.

        Raises:
            Refusal: The texts are not answered, for the reason that the client is told.
        """

    def check_health(self) -> None:
        """Raise if the model can answer no more."""

    async def close(self) -> None:
        """Release threads and child processes."""


class Refusal(Exception):  # noqa: N818 - an answer, not a mistake of ours
    """A request is not answered, for a reason that the client is told.

    Raised by whoever finds the reason: the readers of bodies (4xx), the queue (429, 503).
    """

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        """Hold the answer.

        Args:
            status: Of HTTP, 400 to 599.
            reason: One sentence, for the client.
            headers: To be sent along, such as Retry-After.
        """
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.headers = headers


@dataclass(frozen=True)
class Question:
    """A request that has been read: texts within the limits, and how their answer is put."""

    texts: list[str]
    answer: Callable[[Classification], BaseModel]


class Shape(BaseModel):
    """A body of a request or an answer; its documentation goes into the OpenAPI document."""

    model_config = ConfigDict(strict=True, frozen=True, use_attribute_docstrings=True)


class ModelCard(Shape):
    """What answers, and its limits."""

    kind: Kind
    name: str
    """Model or artifact with its fingerprint."""
    calibration: str
    """What makes its probabilities honest: of a teacher the kind of its calibration, of a student
    its temperature; `none` without."""
    labels: tuple[str, ...]
    """The C classes, in the order of every probability vector."""
    max_texts: int
    """Texts in one request."""
    max_text_chars: int
    max_body_bytes: int


class ClassifyRequest(Shape):
    """Texts to classify."""

    model_config = ConfigDict(extra="forbid")

    texts: Annotated[list[str], FailFast()]
    """None of them empty."""


class Prediction(Shape):
    """The answer for one text."""

    label: str | None
    """None where nobody was sure enough."""
    confidence: float
    """Highest probability, 0 to 1: the label's."""
    probabilities: dict[str, float]
    """Of every label, in the task's order."""
    by: Answerer | None = None
    """Who answered; absent where one model answers all."""


class ClassifyResponse(Shape):
    """One prediction per text, in the order of the request."""

    model: str
    predictions: list[Prediction]


class Health(Shape):
    """The model can answer."""

    status: Literal["ok"]


class Problem(Shape):
    """Why a request was not answered."""

    detail: str


def model_card(
    kind: Kind,
    name: str,
    labels: tuple[str, ...],
    serve: ServeSection,
    calibration: str = "none",
) -> ModelCard:
    """Describe an endpoint with the limits of its configuration."""
    return ModelCard(
        kind=kind,
        name=name,
        calibration=calibration,
        labels=labels,
        max_texts=serve.max_texts_per_request,
        max_text_chars=serve.max_text_chars,
        max_body_bytes=serve.max_body_bytes,
    )


def read_classify(body: bytes, card: ModelCard) -> Question:
    """Read the body of POST /v1/classify.

    Raises:
        Refusal: 400 when the body is not JSON, 422 when it is not such a request or goes past the
            limits.
    """
    texts = within_limits(parse(body, ClassifyRequest).texts, card, "texts")
    return Question(texts, lambda found: answer(card, found))


def answer(card: ModelCard, found: Classification) -> ClassifyResponse:
    """Put a classification of N texts into the words of the protocol."""
    rows = found.probabilities.tolist()
    return ClassifyResponse(
        model=card.name,
        predictions=[
            Prediction(
                **verdict,
                confidence=max(row),
                probabilities=dict(zip(card.labels, row, strict=True)),
            )
            for verdict, row in zip(found.verdicts(card.labels), rows, strict=True)
        ],
    )


def parse(body: bytes, shape: type[Body]) -> Body:
    """Return the body as the request that it should be.

    Raises:
        Refusal: 400 when it is not JSON, 422 when it is another request.
    """
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if problem["type"] == "json_invalid":
        # A lone surrogate ends here as well: JSON can write it, but it is no character.
        raise Refusal(400, f"the body is not JSON: {_sentence(problem)}")
    where = "".join(f"[{part}]" if isinstance(part, int) else part for part in problem["loc"])
    raise Refusal(422, f"{where or 'the body'}: {_sentence(problem)}")


def within_limits(texts: list[str], card: ModelCard, key: str) -> list[str]:
    """Return the texts, all of them such as the model reads.

    Args:
        texts: Of one request.
        card: Says the limits.
        key: Under which the request holds them.

    Raises:
        Refusal: 422 with the text that is not.
    """
    if not texts:
        raise Refusal(422, f"{key}: the list is empty; send at least one text")
    if len(texts) > card.max_texts:
        raise Refusal(
            422, f"{key}: {len(texts)} texts, at most {card.max_texts} go into one request"
        )
    for position, text in enumerate(texts):
        if not text.strip():
            raise Refusal(422, f"{key}[{position}]: the text is empty")
        if len(text) > card.max_text_chars:
            raise Refusal(
                422,
                f"{key}[{position}]: {len(text)} characters, at most {card.max_text_chars} are "
                "read of one text",
            )
    return texts


def _sentence(problem: Any) -> str:
    message = str(problem["msg"]).removeprefix("Invalid JSON: ").removeprefix("Value error, ")
    return message if message.startswith("EOF") else message[0].lower() + message[1:]
