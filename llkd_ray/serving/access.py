"""Who asks and what came of it: the bearer token, request ids, and one record per request."""

import hashlib
import hmac
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llkd_ray.errors import ConfigError
from llkd_ray.serving.protocol import Classification

_log = logging.getLogger(__name__)
# What tracing systems send, and nothing that could forge a line of a log.
SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
CLIENT_LEFT = 499
"""Status on record when a client left, or its time was up, before it had an answer."""


@dataclass(frozen=True)
class Answered:
    """A request that is over. It holds neither the texts nor the token."""

    id: str
    method: str
    path: str
    """As it was asked for; whatever it was, `routed` or not."""
    routed: bool
    """Whether the endpoint has such a path, so that a metric may carry it."""
    status: int
    """Of HTTP; 499 when the client left before the answer."""
    seconds: float
    texts: int
    """In the request; 0 when it held none that could be classified."""
    classification: Classification | None
    """What the model answered, if it was asked and answered."""


Observer = Callable[[Answered], None]


class Access:
    """Give every request an id, and tell observers how it ended.

    The id is the client's X-Request-Id if it is a sane one. Serve's proxy puts one there where
    there is none, and puts what stands there into the answer; so it is put there here only when it
    was made here. What is not sane is taken away before the proxy (`ingress`); where that does not
    stand before it, the answer carries both.
    """

    def __init__(self, app: ASGIApp, observers: Sequence[Observer]) -> None:
        """Wrap an ASGI application."""
        self._app = app
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if SANE_ID.fullmatch(given.encode("latin-1")) else uuid.uuid4().hex
        scope["state"] = {}  # Of this request alone, whatever the server has put there.
        status = 0
        began = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if request_id != given:
                    MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            # Whatever it is, it is our mistake: its traceback is for our log, not for the client.
            _log.exception("request %s could not be answered", request_id)
            if status:
                raise  # The answer has begun, so the connection can only be cut.
            detail = f"the endpoint could not answer; its log has the reason under {request_id}"
            await JSONResponse({"detail": detail}, 500)(scope, receive, send_with_id)
        finally:
            state = Request(scope).state
            answered = Answered(
                id=request_id,
                method=scope["method"],
                path=scope["path"],
                routed="endpoint" in scope,
                status=status or CLIENT_LEFT,
                seconds=time.perf_counter() - began,
                texts=getattr(state, "texts", 0),
                classification=getattr(state, "classification", None),
            )
            for observe in self._observers:
                observe(answered)


def print_line(answered: Answered) -> None:
    """Observe a request: print one line of JSON, which Ray keeps with what its process prints.

    Its keys are time (of the end, UTC), id, method, path, status, ms and texts (how many).
    """
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": answered.id,
        "method": answered.method,
        "path": answered.path[:200],
        "status": answered.status,
        "ms": round(answered.seconds * 1000, 1),
        "texts": answered.texts,
    }
    print(json.dumps(line), flush=True)


def token_digest(token_env: str | None) -> bytes | None:
    """Return the SHA-256 of the token that requests must bear, None when none is asked for.

    Only the digest travels to the replicas: the cluster never stores the token.

    Raises:
        ConfigError: The variable is empty or not set.
    """
    if token_env is None:
        return None
    return hashlib.sha256(read_token(token_env).encode()).digest()


def read_token(token_env: str) -> str:
    """Return the token that an environment variable holds, without white space around it.

    Raises:
        ConfigError: There is none, or none that a header can carry; it is not repeated.
    """
    token = os.environ.get(token_env, "").strip()
    if not token:
        raise ConfigError(
            f"token_env = {token_env!r}: this environment variable is empty; set it to the token, "
            "or leave token_env out to ask for none"
        )
    if not (token.isascii() and token.isprintable()):
        raise ConfigError(
            f"token_env = {token_env!r}: this environment variable holds characters that no HTTP "
            "header takes; make a token of printable ASCII"
        )
    return token


def bears(header: str, digest: bytes) -> bool:
    """Return whether an Authorization header bears the token of this digest."""
    scheme, _, token = header.partition(" ")
    # Headers are bytes in Latin-1; equal digests in constant time say nothing about the token.
    presented = hashlib.sha256(token.strip().encode("latin-1")).digest()
    return hmac.compare_digest(presented, digest) and scheme.lower() == "bearer"
