"""The HTTP protocol, asked of a served student: limits, the token, and strange text."""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import ray
from bare import TOKEN
from malformed import RAW, malformed_requests
from pydantic import ValidationError
from ray import serve
from untrained import LABELS, untrained_student

from llkd_ray.config import ServeSection
from llkd_ray.errors import ConfigError
from llkd_ray.serving.access import bears, token_digest
from llkd_ray.serving.deploy import APP, HTTP, running, student_app
from llkd_ray.serving.dialects import VLLMRequest
from llkd_ray.serving.protocol import ClassifyRequest

pytestmark = pytest.mark.slow

CONFIG = ServeSection(
    port=0,
    max_texts_per_request=4,
    max_text_chars=200,
    max_body_bytes=20_000,
    token_env="LLKD_TEST_TOKEN",  # noqa: S106 - the variable's name
)


@pytest.fixture(scope="module")
def url(ray_local, tmp_path_factory):  # noqa: ARG001
    os.environ["LLKD_TEST_TOKEN"] = TOKEN
    folder = untrained_student(tmp_path_factory.mktemp("student"))
    with running(student_app(folder, "student-test", 128, CONFIG), CONFIG) as url:
        yield url
    del os.environ["LLKD_TEST_TOKEN"]


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        yield client


def post(client, body):
    return client.post("/v1/classify", content=body)


def test_answers_one_prediction_per_text_with_probabilities_of_every_label(client):
    response = client.post("/v1/classify", json={"texts": ["Who?", "Where is Lima?"]})
    assert response.status_code == 200
    content = response.json()
    assert content["model"] == "student-test"
    assert len(content["predictions"]) == 2
    for prediction in content["predictions"]:
        assert tuple(prediction["probabilities"]) == LABELS
        assert sum(prediction["probabilities"].values()) == pytest.approx(1)
        best = max(prediction["probabilities"], key=prediction["probabilities"].__getitem__)
        assert prediction["label"] == best
        assert prediction["confidence"] == prediction["probabilities"][best]


def test_says_what_it_is_and_how_much_it_takes(client):
    assert client.get("/v1/model").json() == {
        "kind": "student",
        "name": "student-test",
        "labels": list(LABELS),
        "max_texts": 4,
        "max_text_chars": 200,
        "max_body_bytes": 20_000,
        "calibration": "none",
    }


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"\xff\xfe\x00", 400, "not JSON"),
        (b"[" * 10_000, 400, "not JSON"),
        (b'{"texts": [' + b"9" * 5000 + b"]}", 400, "not JSON"),
        (b'{"texts": ["\\ud800"]}', 400, "not JSON"),
        (b'{"texts": ["a\xed\xa0\x80b"]}', 400, "not JSON"),
        (b"null", 422, "the body"),
        (b"[]", 422, "the body"),
        (b"{}", 422, "texts: field required"),
        (b'{"texts": "Who?"}', 422, "texts"),
        (b'{"texts": null}', 422, "texts"),
        (b'{"texts": [1]}', 422, "texts[0]"),
        (b'{"texts": ["a", null]}', 422, "texts[1]"),
        (b'{"texts": [["a"]]}', 422, "texts[0]"),
        (b'{"texts": ["a"], "n": 1}', 422, "n: "),
        (b'{"texts": []}', 422, "empty"),
        (b'{"texts": ["a", ""]}', 422, "texts[1]: the text is empty"),
        (b'{"texts": [" \\n\\u00a0"]}', 422, "texts[0]: the text is empty"),
        (b'{"texts": ["a", "a", "a", "a", "a"]}', 422, "at most 4"),
        (b'{"texts": ["' + b"a" * 201 + b'"]}', 422, "201 characters, at most 200"),
    ],
)
def test_refuses_with_one_sentence(client, body, status, reason):
    response = post(client, body)
    assert response.status_code == status
    detail = response.json()["detail"]
    assert reason in detail
    assert "\n" not in detail


@pytest.mark.parametrize("sent", ["whole", "chunked"])
def test_a_body_past_the_limit_is_refused_before_it_is_parsed(client, sent):
    # Valid JSON: only its size is wrong.
    body = json.dumps({"texts": ["a"]}).encode() + b" " * 2_000_000
    chunks = (body[start : start + 5000] for start in range(0, len(body), 5000))
    response = post(client, body if sent == "whole" else chunks)
    assert response.status_code == 413
    assert "20000 bytes" in response.json()["detail"]
    assert client.get("/v1/model").status_code == 200


def test_a_declared_length_past_the_limit_is_refused_before_the_body_is_sent(url):
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), 30) as raw:
        raw.settimeout(30)
        raw.sendall(
            b"POST /v1/classify HTTP/1.1\r\nHost: here\r\nContent-Length: 99999999999\r\n"
            b"Authorization: Bearer " + TOKEN.encode() + b"\r\n\r\n"
        )
        assert b" 413 " in raw.recv(200).partition(b"\r\n")[0] + b" "


def test_a_client_that_leaves_half_way_harms_nobody(url, client):
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), 30) as raw:
        raw.sendall(
            b"POST /v1/classify HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n"
            b"Authorization: Bearer " + TOKEN.encode() + b'\r\n\r\n{"texts":'
        )
    assert client.post("/v1/classify", json={"texts": ["Who?"]}).status_code == 200


@pytest.mark.parametrize(
    "text",
    [
        "\x00",
        "a\x00b",
        "\u0000\u0001\u001f\x7f",
        "👩‍👩‍👧‍👦🏴‍☠️",
        "\U0010ffff",
        "من اخترع الهاتف؟",
        "\u202eright to left\u202c",
        "e\u0301" * 50,
        "\ufeffbyte order mark",
        "\ufffd\ufffe\uffff",
        "[CLS] [SEP] [MASK] [PAD]",
        "</s><|endoftext|>{{7*7}}%s%n",
        "\U0001d54c\U0001d55f 漢字 ไทย",
        "\u200b",
        "a" * 200,
        "a " * 100,
    ],
)
def test_answers_strange_text(client, text):
    response = client.post("/v1/classify", json={"texts": [text]})
    assert response.status_code == 200, response.text
    assert response.json()["predictions"][0]["label"] in LABELS


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN}x",
        b"Bearer \xff\xfe",
    ],
)
@pytest.mark.parametrize(
    "path", ["/v1/model", "/openapi.json", "/v1/classify", "/classify", "/predict"]
)
def test_without_the_token_nothing_is_told(url, header, path):
    headers = {} if header is None else {"Authorization": header}
    method = "GET" if path in ("/v1/model", "/openapi.json") else "POST"
    response = httpx.request(method, url + path, headers=headers, content=b"not JSON")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert TOKEN not in response.text


def test_health_asks_for_no_token(url):
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}


def test_other_paths_and_methods_are_not_there(client):
    assert client.get("/v1/classify").status_code == 405
    for path in ("/docs", "/metrics", "/v1", "/v1/classify/x", "/v1/classify/"):
        response = client.get(path)
        assert response.status_code == 404
        assert "/openapi.json" in response.json()["detail"]


def test_a_thousand_malformed_requests_are_refused_and_a_good_one_is_answered_after_them(client):
    url = client.base_url

    async def send_all():
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as malformed:
            return await asyncio.gather(
                *(malformed.request(**request) for request in malformed_requests(TOKEN, 1000))
            )

    answers = Counter(
        (response.request.method, response.status_code, response.request.url.path)
        for response in asyncio.run(send_all())
    )
    assert {status // 100 for _, status, _ in answers} == {4}, answers
    assert client.post("/v1/classify", json={"texts": ["Who?"]}).status_code == 200
    # Nothing was replaced meanwhile either: the same replica has answered all of them.
    replicas = serve.status().applications[APP].deployments[HTTP].replica_states
    assert replicas == {"RUNNING": 1}


@pytest.mark.parametrize("sent", [pytest.param(sent, id=name) for name, sent in RAW.items()])
def test_what_is_hardly_http_gets_no_5xx(url, client, sent):
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), 30) as raw:
        raw.settimeout(2)
        answer = b""  # It stays so where the rest is waited for, or the connection is cut.
        with contextlib.suppress(TimeoutError, ConnectionError):
            raw.sendall(sent.replace(b"TOKEN", TOKEN.encode()))
            answer = raw.recv(1000)
    assert answer[:10] in (b"", *(b"HTTP/1.1 %d" % digit for digit in (2, 4))), answer
    assert client.get("/v1/model").status_code == 200


def test_the_access_log_has_a_line_per_request_without_texts_or_token(client):
    name = "line-of-this-test"
    text = "a text that no log may hold"
    headers = {"X-Request-Id": name}
    response = client.post("/v1/classify", json={"texts": [text, text]}, headers=headers)
    assert response.headers.get_list("x-request-id") == [name]
    made = client.post("/v1/classify", json={"texts": [text]}).headers.get_list("x-request-id")
    assert len(made) == 1
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    deadline = time.monotonic() + 20
    printed = ""
    while made[0] not in printed and time.monotonic() < deadline:
        time.sleep(0.1)
        printed = "".join(file.read_text(errors="replace") for file in logs.rglob("worker-*.out"))
    (line,) = (json.loads(line) for line in printed.splitlines() if name in line)
    assert line.keys() == {"time", "id", "method", "path", "status", "ms", "texts"}
    assert (line["id"], line["method"], line["path"]) == (name, "POST", "/v1/classify")
    assert (line["status"], line["texts"]) == (200, 2)
    everything = "".join(
        file.read_text(errors="replace") for file in logs.rglob("*") if file.is_file()
    )
    assert name in everything
    assert text not in everything
    assert TOKEN not in everything


def test_an_empty_token_variable_is_an_error_at_the_start(monkeypatch):
    monkeypatch.setenv("LLKD_EMPTY_TOKEN", "")
    for name in ("LLKD_EMPTY_TOKEN", "LLKD_TOKEN_THAT_IS_NOT_SET"):
        with pytest.raises(ConfigError, match=name):
            token_digest(name)
    assert token_digest(None) is None


def test_a_token_from_a_file_with_a_line_end_opens(monkeypatch):
    monkeypatch.setenv("LLKD_TOKEN_OF_A_FILE", "secret-of-a-file\n")
    digest = token_digest("LLKD_TOKEN_OF_A_FILE")
    assert bears("Bearer secret-of-a-file", digest)
    assert not bears("Bearer secret", digest)


@pytest.mark.parametrize("token", ["gehéim", "two\nlines"])
def test_a_token_that_no_header_takes_is_refused_and_not_repeated(monkeypatch, token):
    monkeypatch.setenv("LLKD_ODD_TOKEN", token)
    with pytest.raises(ConfigError, match="LLKD_ODD_TOKEN") as caught:
        token_digest("LLKD_ODD_TOKEN")
    assert token not in str(caught.value)


@pytest.mark.parametrize("shape", [ClassifyRequest, VLLMRequest])
def test_of_a_long_list_of_what_is_no_text_only_the_first_is_looked_at(shape):
    key = "texts" if shape is ClassifyRequest else "input"
    wrong = {key: [1] * 1000}
    with pytest.raises(ValidationError) as caught:
        shape.model_validate_json(json.dumps(wrong))
    assert caught.value.error_count() == 1
