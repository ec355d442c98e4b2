"""A server that speaks S3 (moto's), and a front before it that refuses requests.

As a program, `s3_server.py ADDRESS PORT BUCKET FLAG`, it serves until it is ended, and refuses
while there is a file FLAG; it prints a line for every request that it refuses.
"""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# Any do: the server checks no signature.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "of-the-tests",
    "AWS_SECRET_ACCESS_KEY": "of-the-tests",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_SLOW_DOWN = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"""

# Headers of the client's connection, not of what it asks for.
_OF_A_HOP = {"connection", "expect", "transfer-encoding"}

Refuses = Callable[[str, str], bool]
"""Takes method and path of a request; may keep it waiting. True answers it with 503 SlowDown."""


@contextlib.contextmanager
def s3_server(*buckets: str) -> Iterator[str]:
    """Serve buckets from memory for the length of the block; yields the base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for bucket in buckets:
            _put_bucket(port, bucket)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def _put_bucket(port: int, bucket: str) -> None:
    until = time.monotonic() + 60
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("PUT", f"/{bucket}")
            assert connection.getresponse().status == 200
        except ConnectionError:
            assert time.monotonic() < until, "the S3 server does not start"
            time.sleep(0.05)
        else:
            return
        finally:
            connection.close()


@contextlib.contextmanager
def front_of(
    server: str, refuses: Refuses, address: str = "127.0.0.1", port: int = 0
) -> Iterator[str]:
    """Stand before a server for the length of the block; yields the front's URL."""
    with _Front((address, port), server.removeprefix("http://"), refuses) as front:
        thread = threading.Thread(target=front.serve_forever)
        thread.start()
        try:
            yield f"http://{address}:{front.server_address[1]}"
        finally:
            front.shutdown()
            thread.join()


class _Front(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, at: tuple[str, int], host: str, refuses: Refuses) -> None:
        super().__init__(at, _Forwarding)
        self.host = host
        self.refuses = refuses

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that are killed: tests do that."""


class _Forwarding(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Front

    def _forward(self) -> None:
        body = self._body()
        if self.server.refuses(self.command, self.path):
            self._answer(503, {"Content-Type": "application/xml"}, _SLOW_DOWN)
            return
        connection = http.client.HTTPConnection(self.server.host, timeout=60)
        headers = {name: self.headers[name] for name in self.headers if name not in _OF_A_HOP}
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        self._answer(response.status, dict(response.getheaders()), response.read())
        connection.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward  # noqa: N815 - http.server's.

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in {"content-length", *_OF_A_HOP}:
                self.send_header(name, value)
        # Of a HEAD it is the length of what a GET would return.
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def environment(url: str) -> dict[str, str]:
    """Return the environment of a process that is to find the server."""
    return {**os.environ, **CREDENTIALS, "AWS_ENDPOINT_URL": url}


def main() -> None:
    address, port, bucket, flag = sys.argv[1:]

    def refuses(method: str, path: str) -> bool:
        refused = Path(flag).exists()
        if refused:
            print(f"refused {method} {path}", flush=True)
        return refused

    with s3_server(bucket) as server, front_of(server, refuses, address, int(port)):
        threading.Event().wait()


if __name__ == "__main__":
    main()
