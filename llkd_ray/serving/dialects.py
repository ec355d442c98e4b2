"""Two shapes that clients speak already, for the same model behind the same limits.

    POST /classify  {"input": "..." or ["..."]}          vLLM's classification API
    POST /predict   {"inputs": "..." or [["..."], ...]}  text-embeddings-inference's

Keys that only their own servers know are read past, but those that would have another text read
than is read here are refused; both are answered with errors in our shape. Sources:
vllm/entrypoints/pooling/classify/protocol.py of vLLM 0.32, and router/src/http/types.rs of
text-embeddings-inference.

Shape legend: N texts, C classes.
"""

import time
import uuid
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, FailFast, PlainValidator, RootModel

from llkd_ray.serving.protocol import (
    Answerer,
    Classification,
    Floats,
    ModelCard,
    Question,
    Refusal,
    Shape,
    parse,
    within_limits,
)


def _one_or_more(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return value
    raise ValueError("a text or a list of texts belongs here")


def _one_or_batch(value: Any) -> str | list[str]:
    """Return one text for "a" and ["a"], several for [["a"], ["b"]].

    ["a", "b"] is no batch there but one pair, so taking it for two texts would answer another
    question than the one that was asked.
    """
    match value:
        case str(text) | [str(text)]:
            return text
        case [[_], *_] if all(_is_single(item) for item in value):
            return [text for (text,) in value]
    raise ValueError(
        'a text or a batch of texts [["..."], ["..."]] belongs here; pairs of texts are not read'
    )


def _is_single(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 1 and isinstance(item[0], str)


class VLLMRequest(Shape):
    """Texts to classify, as vLLM's clients send them."""

    input: Annotated[list[str], FailFast(), BeforeValidator(_one_or_more)]
    model: str | None = None
    """Must be the name of the model that answers, where it is given."""
    use_activation: bool | None = None
    """False asks for logits in place of probabilities."""
    truncate_prompt_tokens: Literal[-1] | None = None
    """-1, what the model reads: that is always so."""
    truncation_side: Literal["right"] | None = None
    """A text's end is what is cut."""
    add_special_tokens: Literal[True] | None = None


class VLLMPrediction(Shape):
    """The answer for one text."""

    index: int
    label: str | None
    probs: list[float]
    """In the order of the labels of GET /v1/model."""
    num_classes: int
    by: Answerer | None = None
    """Our own addition: who answered; absent where one model answers all."""


class VLLMUsage(Shape):
    """0 throughout: tokens are not counted here."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


class VLLMResponse(Shape):
    """One prediction per text, in the order of the request."""

    id: str
    object: Literal["list"]
    created: int
    """Seconds since 1970."""
    model: str
    data: list[VLLMPrediction]
    usage: VLLMUsage


class TEIRequest(Shape):
    """Texts to classify, as text-embeddings-inference's clients send them."""

    inputs: Annotated[str | list[str], PlainValidator(_one_or_batch)]
    raw_scores: bool | None = None
    """True asks for logits in place of probabilities."""
    truncate: bool | None = None
    """Read past: what goes beyond the model's number of tokens is always cut."""
    truncation_direction: Literal["Right", "right"] | None = None
    """A text's end is what is cut."""


class TEIPrediction(Shape):
    """A label and its score."""

    label: str
    score: float


class TEIResponse(RootModel[list[TEIPrediction] | list[list[TEIPrediction]]]):
    """All labels, the likeliest first: of one text, or of every text of a batch."""


def read_vllm(body: bytes, card: ModelCard) -> Question:
    """Read the body of POST /classify.

    Raises:
        Refusal: 400, 422 as `read_classify` does; 404 when another model is asked.
    """
    request = parse(body, VLLMRequest)
    if request.model not in (None, card.name):
        raise Refusal(404, f"model: {card.name!r} answers here, no other")
    logits = request.use_activation is False

    def answer(found: Classification) -> VLLMResponse:
        rows = _scores(found.probabilities, logits=logits).tolist()
        verdicts = found.verdicts(card.labels)
        predictions = [
            VLLMPrediction(index=index, **verdict, probs=row, num_classes=len(row))
            for index, (verdict, row) in enumerate(zip(verdicts, rows, strict=True))
        ]
        return VLLMResponse(
            id=f"classify-{uuid.uuid4().hex}",
            object="list",
            created=int(time.time()),
            model=card.name,
            data=predictions,
            usage=VLLMUsage(prompt_tokens=0, total_tokens=0, completion_tokens=0),
        )

    return Question(within_limits(request.input, card, "input"), answer)


def read_tei(body: bytes, card: ModelCard) -> Question:
    """Read the body of POST /predict.

    Raises:
        Refusal: 400, 422 as `read_classify` does, and 422 for pairs of texts.
    """
    request = parse(body, TEIRequest)
    single = isinstance(request.inputs, str)
    texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs

    def answer(found: Classification) -> TEIResponse:
        rows = [
            sorted(
                (
                    TEIPrediction(label=label, score=score)
                    for label, score in zip(card.labels, row, strict=True)
                ),
                key=lambda prediction: -prediction.score,
            )
            for row in _scores(found.probabilities, logits=request.raw_scores is True).tolist()
        ]
        return TEIResponse(rows[0] if single else rows)

    return Question(within_limits(texts, card, "inputs"), answer)


def _scores(probabilities: Floats, *, logits: bool) -> Floats:
    """Return the probabilities [N, C], or logits of which they are the softmax.

    The model's own logits differ from these by a constant in each row.
    """
    if logits:
        probabilities = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
    return probabilities
