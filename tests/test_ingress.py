"""What stands before the replicas, around an application that behaves as Serve's proxy does."""

import asyncio

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse

from llkd_ray.serving.ingress import Ingress

LARGE = b" " * 17_000_000


def post(app, content=b"texts", path="/v1/classify"):
    async def ask():
        transport = httpx.ASGITransport(Ingress(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post(path, content=content)

    return asyncio.run(ask())


async def read(receive):
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    return body


def losing(times, bodies):
    """Behave as Serve's proxy whose replica is lost so often: it leaves without a word."""

    async def app(scope, receive, send):
        bodies.append(await read(receive))
        if len(bodies) > times:
            await JSONResponse({"read": len(bodies[-1])})(scope, receive, send)

    return app


@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_request_whose_replica_is_lost_is_sent_again_as_it_was(times):
    bodies = []
    response = post(losing(times, bodies))
    assert (response.status_code, response.json()) == (200, {"read": 5})
    assert bodies == [b"texts"] * (times + 1)


def test_it_is_not_sent_again_for_ever_nor_when_it_is_too_large_to_hold():
    for content, tries in [(b"texts", 3), (LARGE, 1)]:
        bodies = []
        response = post(losing(9, bodies), content)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert "ask again" in response.json()["detail"]
        assert len(bodies) == tries


def test_what_serve_says_of_queues_and_deadlines_is_said_in_json():
    for status, said, answered in [
        (408, "Request 1 timed out after 2s.", 504),
        (429, "the queue is full", 429),
        (503, "no replica", 503),
    ]:
        headers = {"Retry-After": "7", "X-Request-ID": "1"}
        response = post(PlainTextResponse(f'"{said}"', status, headers))
        assert response.status_code == answered
        assert response.json() == {"detail": said}
        assert response.headers["x-request-id"] == "1"
        assert response.headers["retry-after"] == "7"


def test_what_a_replica_answers_and_what_others_are_asked_stays_as_it_is():
    own = JSONResponse({"detail": "too many texts are waiting"}, 429, {"Retry-After": "3"})
    response = post(own)
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert response.json() == {"detail": "too many texts are waiting"}
    other = post(PlainTextResponse("late", 408), path="/another/application")
    assert (other.status_code, other.text) == (408, "late")


def test_a_client_that_has_left_is_not_served_again():
    calls, sent = [], []

    async def app(scope, receive, send):  # noqa: ARG001
        calls.append(await receive())

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/predict", "headers": []}
    asyncio.run(Ingress(app)(scope, receive, send))
    assert len(calls) == 1
    assert sent == []


def test_what_the_proxy_could_not_decode_does_not_reach_it():
    async def app(scope, receive, send):
        assert all(value.isascii() for _, value in scope["headers"])
        await JSONResponse({})(scope, receive, send)

    async def ask():
        transport = httpx.ASGITransport(Ingress(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            headers = {b"x-request-priority": b"\xff"}
            return await client.post("/v1/classify", json={"texts": ["a"]}, headers=headers)

    assert asyncio.run(ask()).status_code == 200


@pytest.mark.parametrize(
    ("name", "given", "passed"),
    [
        (b"x-request-id", b"a-1/b", True),
        *((b"x-request-id", bad, False) for bad in (b"\xff\xfe", b'{"forged": 1}', b"x" * 200)),
        *((b"x-request-timeout-seconds", good, True) for good in (b"5", b"0.25", b"600")),
        *(
            (b"x-request-timeout-seconds", bad, False)
            for bad in (b"0", b"0.0", b"-1", b"nan", b"inf", b"1e9", b"3600", b"soon", b"")
        ),
        (b"x-request-disconnect-disabled", b"?1", False),
    ],
)
def test_headers_that_would_talk_serve_out_of_its_limits_do_not_reach_the_proxy(
    name, given, passed
):
    seen = []

    async def app(scope, receive, send):
        seen.extend(value for header, value in scope["headers"] if header == name)
        assert (b"accept", b"*/*") in scope["headers"]
        await JSONResponse({})(scope, receive, send)

    async def ask():
        transport = httpx.ASGITransport(Ingress(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.get("/v1/model", headers={name: given})

    assert asyncio.run(ask()).status_code == 200
    assert seen == ([given] if passed else [])
