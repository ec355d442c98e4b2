"""The web application of an endpoint: the protocol's paths, and what is answered to all else."""

import functools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llkd_ray.serving.access import Access, Observer, bears
from llkd_ray.serving.dialects import read_tei, read_vllm
from llkd_ray.serving.openapi import document
from llkd_ray.serving.page import page
from llkd_ray.serving.protocol import (
    Classifier,
    Health,
    ModelCard,
    Question,
    Refusal,
    read_classify,
)

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def application(
    card: ModelCard,
    classifier: Classifier,
    digest: bytes | None,
    observers: Sequence[Observer] = (),
) -> Starlette:
    """Return the web application of an endpoint.

    Args:
        card: What answers, and its limits.
        classifier: The model.
        digest: SHA-256 of the bearer token; None lets everybody in.
        observers: Told of every request when it is over, refused ones included. They are called
            in the event loop, so they must be brief; what they raise ends the connection.
    """

    def guarded(handler: _Handler) -> _Handler:
        @functools.wraps(handler)
        async def guard(request: Request) -> Response:
            header = request.headers.get("authorization", "")
            if digest is not None and not bears(header, digest):
                raise Refusal(
                    401,
                    "this endpoint asks for a token: send the header `Authorization: Bearer TOKEN`",
                    {"WWW-Authenticate": "Bearer"},
                )
            return await handler(request)

        return guard

    def asking(read: Callable[[bytes, ModelCard], Question]) -> _Handler:
        async def ask(request: Request) -> Response:
            question = read(await _body(request, card.max_body_bytes), card)
            request.state.texts = len(question.texts)
            found = await classifier.classify(question.texts)
            request.state.classification = found
            return _json(question.answer(found))

        return guarded(ask)

    async def model(_request: Request) -> Response:
        return _json(card)

    async def healthz(_request: Request) -> Response:
        classifier.check_health()
        return _json(Health(status="ok"))

    described = document(card, guarded=digest is not None)
    shown = page()

    async def openapi(_request: Request) -> Response:
        return JSONResponse(described)

    async def root(_request: Request) -> Response:
        return shown

    app = Starlette(
        routes=[
            Route("/v1/classify", asking(read_classify), methods=["POST"]),
            Route("/classify", asking(read_vllm), methods=["POST"]),
            Route("/predict", asking(read_tei), methods=["POST"]),
            Route("/v1/model", guarded(model)),
            Route("/openapi.json", guarded(openapi)),
            Route("/healthz", healthz),
            Route("/", root),
        ],
        middleware=[Middleware(Access, observers=observers)],
        exception_handlers={Refusal: _refused, HTTPException: _unrouted},
    )
    app.router.redirect_slashes = False  # A redirect would name the host that the client named.
    return app


def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse({"detail": error.reason}, error.status, error.headers)


def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reason = {
        404: "there is no such path here; GET /openapi.json lists those that are",
        405: f"this path does not answer {request.method}",
    }.get(error.status_code, error.detail)
    return JSONResponse({"detail": reason}, error.status_code, error.headers)


async def _body(request: Request, max_bytes: int) -> bytes:
    """Read a body, chunked or not, and stop as soon as it is too long."""
    declared = request.headers.get("content-length", "0")
    too_large = Refusal(413, f"the body is too large: at most {max_bytes} bytes are read")
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
        raise Refusal(400, "the client left before the body was whole") from None
    return bytes(body)


def _json(content: BaseModel) -> Response:
    # What is absent by the protocol was never set: `by`, where one model answers all.
    return Response(content.model_dump_json(exclude_unset=True), media_type="application/json")
