"""Cost arithmetic, and the load generator against a served student and against what is none."""

import http.server
import socket
import threading
from collections import Counter

import httpx
import numpy as np
import pytest
from untrained import free_port, questions, untrained_student

from llkd_ray.bench import cost, load
from llkd_ray.bench.machine import this_machine
from llkd_ray.config import BenchSection, ServeSection
from llkd_ray.errors import EndpointError
from llkd_ray.schema import EndpointSummary, Latency
from llkd_ray.serving.deploy import running, student_app

CONFIG = ServeSection(port=0, max_text_chars=300)
BENCH = BenchSection(
    warmup_requests=2,
    single_requests=6,
    batch_requests=2,
    concurrency=(1, 3),
    sweep_requests=5,
    sweep_texts=7,
)


def send(url, *, endpoint="student", texts=None, bench=BENCH, advance=lambda _: None, timeout_s=60):
    return load.measure(
        url,
        endpoint,
        load.plan(texts or questions(300), bench),
        timeout_s=timeout_s,
        token=None,
        advance=advance,
    )


@pytest.fixture(scope="module")
def student_url(ray_local, tmp_path_factory):  # noqa: ARG001
    folder = untrained_student(tmp_path_factory.mktemp("student"))
    with running(student_app(folder, "student-test", 128, CONFIG), CONFIG) as url:
        yield url


def summary(batch64_s, texts_per_s, usd_per_hour):
    usd = cost.cost_usd_per_million(usd_per_hour, texts_per_s)
    return EndpointSummary(
        latency_ms=Latency(p50=1, p95=2, p99=3),
        batch64_s=batch64_s,
        texts_per_s=texts_per_s,
        cost_usd_per_million=usd,
    )


def test_a_million_texts_cost_the_hours_they_take():
    # 100 texts/s are 360,000 an hour: a million takes 2.78 hours.
    assert cost.cost_usd_per_million(0.36, 100.0) == pytest.approx(1.0)
    assert cost.cost_usd_per_million(0.72, 100.0) == pytest.approx(2.0)
    assert cost.cost_usd_per_million(0.36, 50.0) == pytest.approx(2.0)


def test_speedup_is_of_the_batch_of_64_and_the_cost_ratio_of_throughput_and_price():
    compared = cost.compare(summary(6.4, 10, 1.0), summary(0.4, 200, 0.1))
    assert compared.speedup == pytest.approx(16)
    assert compared.cost_ratio == pytest.approx(20 * 10)


def sample(measure, start_s, latency_ms, texts=1, *, status=200, concurrency=1):
    return load.Sample("student", measure, concurrency, texts, start_s, latency_ms, status)


def test_a_summary_is_made_of_answered_requests_alone():
    samples = [
        *(sample("single", row, float(row + 1)) for row in range(100)),
        sample("single", 100, 9e9, status=500),
        *(sample("batch64", row, latency, 64) for row, latency in enumerate((100, 900, 300))),
        # Two clients: 4 requests of 10 texts in 2 s; a refused one is no text answered.
        *(sample("sweep", 1 + row, 1000, 10, concurrency=2) for row in (0, 0, 1, 1)),
        sample("sweep", 0, 1, 10, status=503, concurrency=2),
        sample("sweep", 0, 1000, 10, concurrency=1),
    ]
    made = cost.summarize(load.Measurement("student", "student-test", samples), usd_per_hour=0.072)
    assert made.latency_ms.p50 == pytest.approx(np.percentile(np.arange(1, 101), 50))
    assert made.latency_ms.p99 == pytest.approx(np.percentile(np.arange(1, 101), 99))
    assert made.batch64_s == pytest.approx(0.3)
    assert cost.sweep_texts_per_s(samples) == pytest.approx({1: 10.0, 2: 20.0})
    assert made.texts_per_s == pytest.approx(20.0)
    assert made.cost_usd_per_million == pytest.approx(1.0)


def test_an_endpoint_that_answers_nothing_of_a_measure_has_no_summary():
    measured = load.Measurement("teacher", "t", [sample("single", 0, 1, status=503)])
    with pytest.raises(EndpointError, match=r"none of the 1 requests .* 'single' \(HTTP 503\)"):
        cost.summarize(measured, 0.1)


def test_accuracy_is_of_texts_with_gold_alone():
    samples = [sample("sweep", 0, 1000, 4)]
    measured = load.Measurement("student", "s", samples, {"a": "x", "b": "y", "c": "x", "d": "x"})
    details = cost.details(measured, {"a": "x", "b": "x", "c": None, "d": "x", "e": "x"})
    assert details["accuracy"] == pytest.approx(2 / 3)
    assert details["accuracy_rows"] == 3
    assert cost.details(measured, dict.fromkeys("abcd"))["accuracy"] is None


def test_each_text_is_sent_once_while_there_are_enough():
    measures = load.plan(questions(300), BENCH)
    sent = Counter(text for item in measures for request in item.requests for text in request)
    assert set(sent.values()) == {1}
    assert [item.name for item in measures] == ["warm-up", "single", "batch64", "sweep", "sweep"]
    few = load.plan(["a", "b", "c"], BENCH)
    assert {len(request) for request in few[2].requests} == {64}
    assert load.plan(questions(300), BENCH) == measures


def test_the_machine_is_described():
    machine = this_machine()
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert machine["memory_gib"] > 0


@pytest.mark.slow
def test_every_request_after_the_warm_up_is_a_sample(student_url):
    progress = []
    measured = send(student_url, advance=progress.append)
    assert measured.model == "student-test"
    counts = Counter((s.measure, s.concurrency, s.texts, s.status) for s in measured.samples)
    assert counts == {
        ("single", 1, 1, 200): 6,
        ("batch64", 1, 64, 200): 2,
        ("sweep", 1, 7, 200): 5,
        ("sweep", 3, 7, 200): 5,
    }
    assert sum(progress) == 2 + 6 + 2 * 64 + 2 * 5 * 7
    assert all(s.latency_ms > 0 and s.start_s >= 0 for s in measured.samples)
    assert cost.summarize(measured, 0.1).texts_per_s > 0
    direct = httpx.post(f"{student_url}/v1/classify", json={"texts": questions(20)}, timeout=60)
    for text, prediction in zip(questions(20), direct.json()["predictions"], strict=True):
        assert measured.labels[text] == prediction["label"]


@pytest.mark.slow
def test_clients_of_a_sweep_really_send_at_once(student_url):
    samples = send(student_url).samples
    sweep = sorted(s.start_s for s in samples if s.measure == "sweep" and s.concurrency == 3)
    alone = sorted(s.start_s for s in samples if s.measure == "sweep" and s.concurrency == 1)
    first = min(s.latency_ms for s in samples if s.measure == "sweep") / 1000
    assert sweep[2] < first
    assert alone[1] >= first


@pytest.mark.slow
def test_refused_requests_are_samples_with_their_status(student_url):
    # The warm-up takes the last texts, so the first one is met in the measure batch64.
    measured = send(student_url, texts=["x" * 301, *questions(299)])
    refused = [s for s in measured.samples if s.status != 200]
    assert [(s.measure, s.status) for s in refused] == [("batch64", 422)]
    assert cost.summarize(measured, 0.1).batch64_s > 0


@pytest.mark.slow
def test_a_student_where_a_teacher_was_expected_is_an_error(student_url):
    with pytest.raises(EndpointError, match="a teacher was expected there, this is a student"):
        send(student_url, endpoint="teacher")


@pytest.mark.slow
def test_an_endpoint_that_takes_less_than_will_be_sent_is_an_error(student_url):
    with pytest.raises(EndpointError, match=r"takes 256 texts at once and 300 will be sent"):
        send(student_url, bench=BenchSection(sweep_texts=300))


def test_a_dead_endpoint_is_an_error_that_names_it():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EndpointError, match=f"student at {url} cannot be reached"):
        send(url)


@pytest.mark.parametrize(
    "url", ["nonsense", "http://", "ftp://127.0.0.1", "http://[", "http://a b"]
)
def test_what_is_no_url_is_an_error(url):
    with pytest.raises(EndpointError, match="cannot be reached"):
        send(url)


class _Other(http.server.BaseHTTPRequestHandler):
    """A real server of something else; `answers` maps a path to status and body."""

    answers: dict[str, tuple[int, bytes]] = {}  # noqa: RUF012 - each test makes its own subclass

    def do_GET(self):
        status, body = self.answers.get(self.path, (404, b"nothing here"))
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815 - http.server's own names

    def log_message(self, *_):
        pass


_CARD = (200, b'{"kind": "student", "name": "s", "max_texts": 256}')


@pytest.mark.parametrize(
    ("card", "classify", "reason"),
    [
        ((404, b""), None, "no endpoint of llkd_ray"),
        ((401, b""), None, "token"),
        ((500, b"oops"), None, "HTTP 500"),
        ((200, b"<html>hello</html>"), None, "begins '<html>hello"),
        ((200, b"\xff\xfe"), None, "no endpoint of llkd_ray"),
        ((200, b"[]"), None, "no endpoint of llkd_ray"),
        ((200, b"{}"), None, "no endpoint of llkd_ray"),
        (_CARD, (503, b"busy"), "HTTP 503"),
        (_CARD, (200, b'{"predictions": []}'), "no endpoint of llkd_ray"),
        (_CARD, (200, b'{"predictions": [{}]}'), "no endpoint of llkd_ray"),
        (_CARD, (200, b'{"predictions": [3]}'), "no endpoint of llkd_ray"),
    ],
)
def test_another_protocol_is_an_error(card, classify, reason):
    answers = {"/v1/model": card, "/v1/classify": classify or (404, b"")}
    handler = type("Handler", (_Other,), {"answers": answers})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(EndpointError, match=reason):
                send(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()


def test_an_endpoint_that_never_answers_is_an_error():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(EndpointError, match=r"did not answer within 0\.5 s"):
            send(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.5)
