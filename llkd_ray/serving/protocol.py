"""The HTTP protocol that student and teacher share, and its limits.

    POST /v1/classify  {"texts": ["..."]}  ->  {"model": ..., "predictions": [...]}
    GET  /v1/model                         ->  what answers, and how much it takes at once
    GET  /healthz                          ->  200 while the model can answer

A request that cannot be answered gets a 4xx and one sentence under `detail`.

Shape legend: N texts, C classes.
"""

import hashlib
import hmac
import os
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect

from llkd_ray.config import ServeSection
from llkd_ray.errors import ConfigError

Floats = npt.NDArray[np.float64]


class ClassifyRequest(BaseModel):
    """Body of POST /v1/classify."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    texts: list[str]


class Prediction(BaseModel):
    """The answer for one text."""

    label: str
    confidence: float
    """Probability of the label, 0 to 1."""
    probabilities: dict[str, float]
    """Of every label, in the task's order."""


class ClassifyResponse(BaseModel):
    """Answer of POST /v1/classify: one prediction per text, in the order of the request."""

    model: str
    predictions: list[Prediction]


class ModelCard(BaseModel):
    """Answer of GET /v1/model."""

    kind: Literal["student", "teacher"]
    name: str
    """Model or artifact with its fingerprint."""
    labels: tuple[str, ...]
    """The C classes, in the order of every probability vector."""
    max_texts: int
    """Texts in one request."""
    max_text_chars: int
    max_body_bytes: int


class Classifier(Protocol):
    """A model behind the protocol. It lives in one process with one event loop."""

    async def classify(self, texts: list[str]) -> Floats:
        """Return the probabilities [N, C] of N texts, N at least 1."""

    def check_health(self) -> None:
        """Raise if the model can answer no more."""

    async def close(self) -> None:
        """Release threads and child processes."""


def model_card(
    kind: Literal["student", "teacher"], name: str, labels: tuple[str, ...], serve: ServeSection
) -> ModelCard:
    """Describe an endpoint with the limits of its configuration."""
    return ModelCard(
        kind=kind,
        name=name,
        labels=labels,
        max_texts=serve.max_texts_per_request,
        max_text_chars=serve.max_text_chars,
        max_body_bytes=serve.max_body_bytes,
    )


def token_digest(token_env: str | None) -> bytes | None:
    """Return the SHA-256 of the token that requests must bear, None when none is asked for.

    Only the digest travels to the replicas: the cluster never stores the token.

    Raises:
        ConfigError: The variable is empty or not set.
    """
    if token_env is None:
        return None
    token = os.environ.get(token_env, "")
    if not token:
        raise ConfigError(
            f"serve.token_env = {token_env!r}: this environment variable is empty; set it to the "
            "token, or leave serve.token_env out to ask for none"
        )
    return hashlib.sha256(token.encode()).digest()


def application(card: ModelCard, classifier: Classifier, digest: bytes | None) -> FastAPI:
    """Return the web application of an endpoint.

    Args:
        card: What answers, and its limits.
        classifier: The model.
        digest: SHA-256 of the bearer token; None lets everybody in.
    """

    async def authorize(request: Request) -> None:
        if digest is not None and not _bears(request.headers.get("authorization", ""), digest):
            raise HTTPException(
                401,
                "this endpoint asks for a token: send the header `Authorization: Bearer TOKEN`",
                {"WWW-Authenticate": "Bearer"},
            )

    # No pages for people and no OpenAPI document: they would be outside the token.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    guarded = APIRouter(prefix="/v1", dependencies=[Depends(authorize)])

    # Response objects, not models: FastAPI would validate our own answer a second time.
    @guarded.post("/classify")
    async def classify(request: Request) -> Response:
        texts = read_texts(await _body(request, card.max_body_bytes), card)
        probabilities = await classifier.classify(texts)
        return _json(answer(card, probabilities))

    @guarded.get("/model")
    async def model() -> Response:
        return _json(card)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        classifier.check_health()
        return {"status": "ok"}

    app.include_router(guarded)
    return app


def read_texts(body: bytes, card: ModelCard) -> list[str]:
    """Return the texts of a request's body.

    Raises:
        HTTPException: 400 when the body is not JSON, 422 when it is not such a request or goes
            past the limits.
    """
    try:
        texts = ClassifyRequest.model_validate_json(body).texts
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if problem["type"] == "json_invalid":
            # A lone surrogate ends here as well: JSON can write it, but it is no character.
            raise HTTPException(400, f"the body is not JSON: {_sentence(problem)}") from None
        where = "".join(f"[{part}]" if isinstance(part, int) else part for part in problem["loc"])
        raise HTTPException(422, f"{where or 'the body'}: {_sentence(problem)}") from None
    if not texts:
        raise HTTPException(422, "texts: the list is empty; send at least one text")
    if len(texts) > card.max_texts:
        raise HTTPException(
            422, f"texts: {len(texts)} texts, at most {card.max_texts} go into one request"
        )
    for position, text in enumerate(texts):
        if not text.strip():
            raise HTTPException(422, f"texts[{position}]: the text is empty")
        if len(text) > card.max_text_chars:
            raise HTTPException(
                422,
                f"texts[{position}]: {len(text)} characters, at most {card.max_text_chars} are "
                "read of one text",
            )
    return texts


def answer(card: ModelCard, probabilities: Floats) -> ClassifyResponse:
    """Put probabilities [N, C] into the words of the protocol."""
    best = probabilities.argmax(axis=1)
    return ClassifyResponse(
        model=card.name,
        predictions=[
            Prediction(
                label=card.labels[column],
                confidence=row[column],
                probabilities=dict(zip(card.labels, row, strict=True)),
            )
            for row, column in zip(probabilities.tolist(), best.tolist(), strict=True)
        ],
    )


async def _body(request: Request, max_bytes: int) -> bytes:
    """Read a body, chunked or not, and stop as soon as it is too long."""
    declared = request.headers.get("content-length", "0")
    too_large = HTTPException(413, f"the body is too large: at most {max_bytes} bytes are read")
    # Twenty digits are past every limit, and int() refuses absurdly many.
    if len(declared) > 20 or (declared.isdecimal() and int(declared) > max_bytes):
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise too_large
    except ClientDisconnect:
        raise HTTPException(400, "the client left before the body was whole") from None
    return bytes(body)


def _bears(header: str, digest: bytes) -> bool:
    scheme, _, token = header.partition(" ")
    # Headers are bytes in Latin-1; equal digests in constant time say nothing about the token.
    presented = hashlib.sha256(token.strip().encode("latin-1")).digest()
    return hmac.compare_digest(presented, digest) and scheme.lower() == "bearer"


def _sentence(problem: Any) -> str:
    message = str(problem["msg"]).removeprefix("Invalid JSON: ")
    return message if message.startswith("EOF") else message[0].lower() + message[1:]


def _json(content: BaseModel) -> Response:
    return Response(content.model_dump_json(), media_type="application/json")
