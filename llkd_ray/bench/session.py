"""Ask one endpoint, in the protocol that it speaks, and notice when it is another."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

from llkd_ray.bench.protocols import PROTOCOLS
from llkd_ray.config import ProtocolName
from llkd_ray.errors import EndpointError

OK = 200
NO_ANSWER = 0
"""Status of a request whose connection broke before there was an answer."""


@dataclass(frozen=True)
class Target:
    """An endpoint to be measured."""

    name: str
    url: str
    protocol: ProtocolName = "llkd"
    kind: str | None = None
    """What its model card must say it is; None takes any."""
    model: str | None = None
    """What its model card must call it; None takes any."""
    token: str | None = field(default=None, repr=False)
    """Bearer token, None to send none."""


class Reply(NamedTuple):
    """What came back, and when."""

    status: int
    labels: list[str | None]
    """One for each text, None where the endpoint abstained; nothing unless the status is 200."""
    end_s: float
    """Of time.perf_counter, when the answer was there and not yet read."""
    refusal: str
    """Why not, in a sentence, where the status is another."""


class Session:
    """The client of one endpoint."""

    def __init__(
        self, client: httpx.AsyncClient, target: Target, advance: Callable[[int], object]
    ) -> None:
        """Prepare.

        Args:
            client: With the endpoint's base URL.
            target: The endpoint.
            advance: Called with the number of texts after each request.
        """
        self._client = client
        self._protocol = PROTOCOLS[target.protocol]
        self._target = target
        self._advance = advance

    async def introduce(self, largest: int) -> str:
        """Return what the endpoint calls itself.

        Args:
            largest: Most texts that one request will hold.

        Raises:
            EndpointError: It is another than was expected, or takes fewer texts at once.
        """
        target = self._target
        if target.protocol != "llkd":  # The other protocols have no model card.
            return f"{target.protocol} at {target.url}"
        response = await self._client.get("/v1/model")
        if response.status_code != OK:
            raise EndpointError(self._refusal(response))
        card = self._json(response)
        if not isinstance(card, dict):
            raise self._another_protocol(response)
        kind, name, max_texts = card.get("kind"), card.get("name"), card.get("max_texts")
        if not isinstance(name, str) or not isinstance(max_texts, int):
            raise self._another_protocol(response)
        if target.kind not in (None, kind):
            raise EndpointError(
                f"{response.url}: a {target.kind} was expected there, this is a {kind}"
            )
        if target.model not in (None, name):
            raise EndpointError(
                f"{response.url}: {target.model} was expected there, this is {name}, of other "
                "settings; start jobs/serve.py there with this experiment"
            )
        if largest > max_texts:
            raise EndpointError(
                f"{response.url}: it takes {max_texts} texts at once and {largest} will be sent; "
                "raise serve.max_texts_per_request there"
            )
        return name

    async def ask(self, texts: Sequence[str]) -> Reply:
        """Ask about texts.

        Raises:
            httpx.TimeoutException: No answer in time.
            EndpointError: The answer is of another protocol.
        """
        try:
            response = await self._client.post(self._protocol.path, json=self._protocol.body(texts))
        except httpx.TimeoutException:
            raise
        except httpx.TransportError as error:
            refusal = f"it cannot be reached: {error or type(error).__name__}"
            return Reply(NO_ANSWER, [], time.perf_counter(), refusal)
        end_s = time.perf_counter()
        self._advance(len(texts))
        if response.status_code != OK:
            return Reply(response.status_code, [], end_s, self._refusal(response))
        try:
            labels = self._protocol.labels(self._json(response))
        except (KeyError, TypeError, ValueError):
            raise self._another_protocol(response) from None
        if len(labels) != len(texts) or not all(isinstance(item, str | None) for item in labels):
            raise self._another_protocol(response)
        return Reply(OK, labels, end_s, "")

    def _json(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise self._another_protocol(response) from None

    def _another_protocol(self, response: httpx.Response) -> EndpointError:
        return EndpointError(
            f"{response.url}: this endpoint does not speak the protocol "
            f"{self._target.protocol!r}; its answer begins {response.text[:60]!r}"
        )

    def _refusal(self, response: httpx.Response) -> str:
        match response.status_code:
            case 401:
                why = (
                    "it asks for a token (HTTP 401); set the variable that serve.token_env, or the "
                    "token_env of one of bench.others, names"
                )
            case 404:
                why = f"there is no endpoint of the protocol {self._target.protocol!r} (HTTP 404)"
            case status:
                why = f"it refuses (HTTP {status}): {response.text[:200]!r}"
        return f"{response.url}: {why}"
