"""Requests that no endpoint should answer, and none should fall over."""

import json
import random
from collections.abc import Iterator
from typing import Any

# One field of a body with a value that does not belong there.
_VALUES = (
    *(None, True, 0, -1, 1e308, 10**400, "", " ", "\x00" * 300, [], {}, [[]], [None], [1, "a"]),
    *(["a"] * 5, ["a", ""], ["a" * 201], [["a", "b"]], [["a"], ["b", "c"]], [{"text": "a"}]),
    *({"0": "a"}, [["a"], "b"], ["\u200b\n \t"[1:]], ["a", ["a"]], float("nan"), [float("inf")]),
)
_BODIES = (
    *(b"", b"{", b"}", b"[]", b"null", b'"a"', b"1e999", b"\x00", b"\xff\xfe{}", b"texts=a"),
    *(b"[" * 15_000, b'{"texts":' * 2_000, b'{"texts": ["' + b"a" * 19_000, b" " * 30_000),
    *(b'{"texts": ["\\ud800"]}', b'{"texts": ["\\u12"]}', b'{"texts": ["\xed\xa0\x80"]}'),
    *(b'{"texts": [' + b"9" * 15_000 + b"]}", b'{"texts": ["a"]} {}', b"--x\r\n\r\na\r\n--x--"),
)
_PATHS = {"/v1/classify": "texts", "/classify": "input", "/predict": "inputs"}
_HEADERS: tuple[dict[str, Any], ...] = (
    {},
    {"Content-Type": "text/plain"},
    {"Content-Type": "multipart/form-data"},
    {"Content-Encoding": "gzip"},
    {"X-Request-Id": "x" * 5000},
    {"X-Request-Id": '{"forged": "line"}'},
    {"X-Request-Id": b"\xc3\xa4"},
    {"Expect": "something"},
)


def malformed_requests(token: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield arguments of httpx's `request`, the same ones each time.

    One in ten is a good request without the token, or asked of a path or by a method that is not
    there.
    """
    rng = random.Random(0)  # noqa: S311 - no secret
    for number in range(count):
        path, key = rng.choice(list(_PATHS.items()))
        headers = {"Authorization": f"Bearer {token}", **rng.choice(_HEADERS)}
        good = json.dumps({key: "a" if key == "input" else ["a"]}).encode()
        method, body = "POST", good
        match number % 10:
            case 0:
                wrong = rng.choice(
                    ("", "Bearer", f"Basic {token}", f"Bearer {token[:-1]}", "x" * 9)
                )
                headers["Authorization"] = wrong
            case 1:
                method = rng.choice(("GET", "PUT", "DELETE", "PATCH", "OPTIONS"))
            case 2:
                path += rng.choice(("/", "/x", "%00", "%ff", "%2e%2e", "//", "\u00e4"))
            case 3 | 4 | 5:
                body = rng.choice(_BODIES)
            case 6 | 7:
                body = good[: rng.randrange(len(good))] + rng.randbytes(rng.randrange(1, 40))
            case _:
                body = json.dumps({key: rng.choice(_VALUES)}).encode()
        chunked = iter([body[:7], body[7:]]) if rng.random() < 0.2 else None
        content = _chunks(chunked) if chunked else body
        yield {"method": method, "url": path, "headers": headers, "content": content}


async def _chunks(chunks: Iterator[bytes]) -> Any:
    for chunk in chunks:
        yield chunk


_START = b"POST /v1/classify HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer TOKEN\r\n"
_GOOD = b'Content-Length: 16\r\n\r\n{"texts": ["a"]}'
RAW = {
    "no request line": b"\r\n\r\n\r\n",
    "bytes": bytes(range(256)),
    "not a version": b"GET / HTTP/9.9\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "no method": b"FROB /v1/classify HTTP/1.1\r\nHost: here\r\n\r\n",
    "no host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "negative length": _START + b"Content-Length: -1\r\n\r\n",
    "two lengths": _START + b"Content-Length: 3\r\n" + _GOOD,
    "length and chunks": _START + b"Transfer-Encoding: chunked\r\n" + _GOOD,
    "no number of bytes": _START + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "chunk too short": _START + b"Transfer-Encoding: chunked\r\n\r\n9\r\n{}\r\n0\r\n\r\n",
    "a header of 100 kB": _START + b"X: " + b"x" * 100_000 + b"\r\n" + _GOOD,
    "a thousand headers": _START + b"X: x\r\n" * 1000 + _GOOD,
    "an id that is no UTF-8": _START + b"X-Request-Id: \xff\xfe\r\n" + _GOOD,
    "a name that is no UTF-8": _START + b"\xff: x\r\n" + _GOOD,
    "a path that is no UTF-8": b"GET /\xff\xfe HTTP/1.1\r\nHost: here\r\n\r\n",
    "a path of 100 kB": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: here\r\n\r\n",
    "upgrade to a websocket": b"GET /v1/classify HTTP/1.1\r\nHost: here\r\nConnection: Upgrade\r\n"
    b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
}
"""What an HTTP client library would not send, by what is wrong with it."""
