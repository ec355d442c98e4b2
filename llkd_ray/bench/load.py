"""Send real requests to an endpoint and time them.

Both endpoints get the same texts in the same order, each text once as far as there are enough, so
that neither is flattered by a cache that real traffic would not fill.
"""

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import httpx

from llkd_ray.config import BenchSection
from llkd_ray.errors import EndpointError

BATCH_TEXTS = 64
"""Texts in a request of the measure batch64."""

_OK = 200
_Endpoint = Literal["student", "teacher"]


class Sample(NamedTuple):
    """One request: a row of schema.SAMPLES."""

    endpoint: str
    measure: str
    concurrency: int
    texts: int
    start_s: float
    latency_ms: float
    status: int


@dataclass(frozen=True)
class Measure:
    """Requests that are sent by so many clients at once, each waiting for its answer."""

    name: Literal["warm-up", "single", "batch64", "sweep"]
    concurrency: int
    requests: tuple[tuple[str, ...], ...]


@dataclass
class Measurement:
    """What came back from one endpoint."""

    endpoint: _Endpoint
    model: str
    """What the endpoint calls itself."""
    samples: list[Sample] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    """The endpoint's answer for each text of the measures."""


def plan(texts: Sequence[str], bench: BenchSection) -> list[Measure]:
    """Share out texts over the measures, in the order in which they are run.

    The first texts go to the large requests, which settle the accuracy beside the speed. When
    there are too few, they start over.

    Args:
        texts: Distinct texts, at least one.
        bench: Numbers of requests.
    """
    source = itertools.cycle(texts)

    def requests(count: int, texts_each: int) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(itertools.islice(source, texts_each)) for _ in range(count))

    batch = Measure("batch64", 1, requests(bench.batch_requests, BATCH_TEXTS))
    sweep = [
        Measure("sweep", concurrency, requests(bench.sweep_requests, bench.sweep_texts))
        for concurrency in bench.concurrency
    ]
    single = Measure("single", 1, requests(bench.single_requests, 1))
    warm_up = Measure("warm-up", 1, requests(bench.warmup_requests, 1))
    return [warm_up, single, batch, *sweep]


def measure(
    url: str,
    endpoint: _Endpoint,
    measures: Sequence[Measure],
    *,
    timeout_s: float,
    token: str | None,
    advance: Callable[[int], object],
) -> Measurement:
    """Run the measures against an endpoint, one after the other.

    Args:
        url: Base URL.
        endpoint: What should answer there.
        measures: From `plan`.
        timeout_s: For one request.
        token: Bearer token, None to send none.
        advance: Called with the number of texts after each request.

    Raises:
        EndpointError: It does not answer, refuses the warm-up, or speaks another protocol. Later
            requests that it refuses are samples with their status.
    """
    concurrency = max(item.concurrency for item in measures)
    try:
        client = httpx.AsyncClient(
            base_url=url,
            timeout=timeout_s,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            limits=httpx.Limits(max_connections=concurrency),
            # A proxy of the environment would be measured along with the endpoint.
            trust_env=False,
        )
        return asyncio.run(_measure(client, endpoint, measures, advance))
    except httpx.TimeoutException:
        raise EndpointError(
            f"the {endpoint} at {url} did not answer within {timeout_s:g} s; raise "
            "bench.request_timeout_s or look at its log"
        ) from None
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise EndpointError(
            f"the {endpoint} at {url} cannot be reached: {error or type(error).__name__}"
        ) from None


async def _measure(
    client: httpx.AsyncClient,
    endpoint: _Endpoint,
    measures: Sequence[Measure],
    advance: Callable[[int], object],
) -> Measurement:
    async with client:
        measured = Measurement(endpoint, await _introduce(client, endpoint, measures))
        for item in measures:
            await _run(client, item, measured, advance)
    return measured


async def _introduce(
    client: httpx.AsyncClient, endpoint: _Endpoint, measures: Sequence[Measure]
) -> str:
    """Ask the endpoint what it is, and check that it takes what will be sent."""
    response = await client.get("/v1/model")
    if response.status_code != _OK:
        raise EndpointError(f"{response.url}: {_refusal(response)}")
    card = _json(response)
    kind, name, max_texts = card.get("kind"), card.get("name"), card.get("max_texts")
    if not isinstance(name, str) or not isinstance(max_texts, int):
        raise _another_protocol(response)
    if kind != endpoint:
        raise EndpointError(f"{response.url}: a {endpoint} was expected there, this is a {kind}")
    largest = max(len(texts) for item in measures for texts in item.requests)
    if largest > max_texts:
        raise EndpointError(
            f"{response.url}: it takes {max_texts} texts at once and {largest} will be sent; raise "
            "serve.max_texts_per_request there"
        )
    return name


async def _run(
    client: httpx.AsyncClient,
    item: Measure,
    measured: Measurement,
    advance: Callable[[int], object],
) -> None:
    """Send a measure's requests from `concurrency` clients that share one list."""
    began = time.perf_counter()
    left = iter(item.requests)

    async def one_client(requests: Iterator[tuple[str, ...]]) -> None:
        for texts in requests:
            start = time.perf_counter()
            response = await client.post("/v1/classify", json={"texts": texts})
            latency_s = time.perf_counter() - start
            advance(len(texts))
            if item.name == "warm-up":
                if response.status_code != _OK:
                    raise EndpointError(f"{response.url}: {_refusal(response)}")
                _labels(response, texts)
                continue
            sample = Sample(
                endpoint=measured.endpoint,
                measure=item.name,
                concurrency=item.concurrency,
                texts=len(texts),
                start_s=start - began,
                latency_ms=latency_s * 1000,
                status=response.status_code,
            )
            measured.samples.append(sample)
            if response.status_code == _OK:
                measured.labels.update(_labels(response, texts))

    # Not a task group: the first client's error is the answer, not a group of errors.
    await asyncio.gather(*(one_client(left) for _ in range(item.concurrency)))


def _labels(response: httpx.Response, texts: tuple[str, ...]) -> dict[str, str]:
    """Return the answered label of each text."""
    predictions = _json(response).get("predictions")
    if not isinstance(predictions, list) or len(predictions) != len(texts):
        raise _another_protocol(response)
    labels = {}
    for text, prediction in zip(texts, predictions, strict=True):
        label = prediction.get("label") if isinstance(prediction, dict) else None
        if not isinstance(label, str):
            raise _another_protocol(response)
        labels[text] = label
    return labels


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        content = response.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise _another_protocol(response) from None
    if not isinstance(content, dict):
        raise _another_protocol(response)
    return content


def _another_protocol(response: httpx.Response) -> EndpointError:
    return EndpointError(
        f"{response.url}: this is no endpoint of llkd_ray; its answer begins {response.text[:60]!r}"
    )


def _refusal(response: httpx.Response) -> str:
    match response.status_code:
        case 401:
            return "it asks for a token (HTTP 401); set the variable that serve.token_env names"
        case 404:
            return "there is no endpoint of llkd_ray (HTTP 404)"
        case status:
            return f"it refuses (HTTP {status}): {response.text[:200]!r}"
