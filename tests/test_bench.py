"""Arithmetic, arrivals and search, and the clients against served students and what is none."""

import asyncio
import contextlib
import http.server
import json
import shutil
import socket
import threading
import time
from collections import Counter

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from bare import answering
from conftest import SMALL, Run
from training_data import make_split_folders
from untrained import LABELS, free_port, questions, untrained_student

from llkd_ray import schema
from llkd_ray.artifacts import Rows, make
from llkd_ray.bench import closed_loop, cost, open_loop, table
from llkd_ray.bench.load import measure
from llkd_ray.bench.machine import this_machine
from llkd_ray.bench.measurement import Measurement, Sample
from llkd_ray.bench.session import Target
from llkd_ray.config import BenchSection, ServeSection
from llkd_ray.errors import EndpointError
from llkd_ray.serving.application import application
from llkd_ray.serving.deploy import running, student_app
from llkd_ray.serving.protocol import model_card
from llkd_ray.serving.student import StudentClassifier
from llkd_ray.serving.targets import model_name

CONFIG = ServeSection(port=0, max_text_chars=300)
BENCH = BenchSection(
    warmup_requests=2,
    single_requests=6,
    batch_requests=2,
    concurrency=(1, 3),
    sweep_requests=5,
    sweep_texts=7,
    search_tries=0,
)


def send(url, *, texts=None, advance=lambda _: None, target=(), **settings):
    return measure(
        Target("student", url, **{"kind": "student", **dict(target)}),
        texts or questions(300),
        BENCH.model_copy(update={"request_timeout_s": 60.0, **settings}),
        advance=advance,
    )


@pytest.fixture(scope="module")
def student_url(ray_local, tmp_path_factory):  # noqa: ARG001
    folder = untrained_student(tmp_path_factory.mktemp("student"))
    with running(student_app(folder, "student-test", 128, CONFIG), CONFIG) as url:
        yield url


def sample(measure, start_s, latency_ms, texts=1, *, status=200, concurrency=1, rate=None):
    return Sample(
        "student", measure, concurrency, rate, texts, start_s, start_s, latency_ms, status
    )


def measured(name="student", *, seconds=1.0, clients=1, labels=None):
    """Requests that each take so long, one after the other with each client."""
    ms = 1000 * seconds
    return Measurement(
        name,
        f"{name}-test",
        [
            *(sample("single", row * seconds, ms) for row in range(10)),
            *(sample("batch64", row * seconds, ms, 64) for row in range(3)),
            *(
                sample("sweep", row * seconds, ms, 16, concurrency=clients)
                for row in range(5)
                for _ in range(clients)
            ),
        ],
        labels or {},
    )


def summarize(measurement, usd_per_hour=0.1, gold=None, bench=BENCH):
    return cost.summarize(measurement, bench, usd_per_hour=usd_per_hour, gold=gold or {})


def test_a_million_texts_cost_the_hours_they_take():
    # 100 texts/s are 360,000 an hour: a million takes 2.78 hours.
    assert cost.cost_usd_per_million(0.36, 100.0) == pytest.approx(1.0)
    assert cost.cost_usd_per_million(0.72, 100.0) == pytest.approx(2.0)
    assert cost.cost_usd_per_million(0.36, 50.0) == pytest.approx(2.0)


def test_ratios_are_of_the_batch_of_64_of_throughput_and_of_price():
    ends = {
        "teacher": summarize(measured("teacher", seconds=6.4), 1.0),
        "student": summarize(measured("student", seconds=0.4, clients=2), 0.1),
        "peer": summarize(measured("peer"), 0.1),
    }
    compared = cost.compare(ends, BENCH)
    assert compared.speedup == pytest.approx(16)
    assert compared.throughput_ratio == pytest.approx(32)
    assert compared.cost_ratio == pytest.approx(32 * 10)
    assert list(compared.endpoints) == ["teacher", "student", "peer"]
    assert compared.latency_levels == ["p50"]  # Ten requests say nothing of one in twenty.
    lines = table.lines(compared)
    assert lines[0].split() == ["teacher", "student", "peer", "student", ":", "teacher"]
    assert lines[1].split()[-1] == "16x"
    assert "400 (400 to 400)" not in lines[1]


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
    made = summarize(Measurement("student", "student-test", samples), usd_per_hour=0.072)
    assert made.latency_ms.p50 == pytest.approx(np.percentile(np.arange(1, 101), 50))
    assert made.latency_ms.p99 == pytest.approx(np.percentile(np.arange(1, 101), 99))
    assert made.batch64_s == pytest.approx(0.3)
    assert "p95" in made.intervals
    assert "p99" not in made.intervals  # Above all of a hundred in more than one run of three.
    assert made.texts_per_s_by_clients == pytest.approx({1: 10.0, 2: 20.0})
    assert made.texts_per_s == pytest.approx(20.0)
    assert made.cost_usd_per_million == pytest.approx(1.0)
    assert (made.failed, made.requests) == (2, len(samples))


def test_intervals_hold_the_value_and_are_wider_where_requests_differ_more():
    rng = np.random.default_rng(0)

    def widths(spread):
        seconds = rng.lognormal(0.0, spread, 300) / 100
        starts = np.concatenate([[0.0], np.cumsum(seconds)[:-1]])
        samples = [
            sample(name, start, 1000 * took, texts)
            for name, texts in (("single", 1), ("batch64", 64), ("sweep", 16))
            for start, took in zip(starts, seconds, strict=True)
        ]
        made = summarize(Measurement("student", "s", samples))
        for name, (low, high) in made.intervals.items():
            value = getattr(made.latency_ms, name, None) or getattr(made, name)
            assert low <= value <= high
        return {name: (high - low) / high for name, (low, high) in made.intervals.items()}

    steady, unsteady = widths(0.1), widths(1.0)
    assert set(steady) == {"p50", "p95", "p99", "batch64_s", "texts_per_s", "cost_usd_per_million"}
    assert all(unsteady[name] > steady[name] > 0 for name in steady)


def test_the_interval_of_a_rate_covers_the_true_one_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        seconds = rng.exponential(0.1, 40)
        starts = np.concatenate([[0.0], np.cumsum(seconds)[:-1]])
        found = cost.texts_per_s(
            [sample("sweep", *pair, 1) for pair in zip(starts, 1000 * seconds, strict=True)], 0
        )
        covered += found.low <= 10.0 <= found.high
    assert covered >= 85


def test_answers_that_come_at_the_same_moment_make_no_interval_without_end():
    # Four clients whose requests share passes of 1.0 s, then 1.2 s.
    samples = [
        sample("sweep", start, latency_ms, 16, concurrency=4)
        for start, latency_ms in ((0.0, 1000.0), (1.0, 1200.0))
        for _ in range(4)
    ]
    found = cost.texts_per_s(samples, 0)
    assert found.value == pytest.approx(8 * 16 / 2.2)
    assert 4 * 16 / 1.2 <= found.low < found.value < found.high <= 4 * 16 / 1.0


def test_an_endpoint_that_answers_nothing_of_a_measure_has_no_summary():
    refused = Measurement("teacher", "t", [sample("single", 0, 1, status=503)])
    with pytest.raises(EndpointError, match=r"none of the 1 requests .* 'single' \(HTTP 503\)"):
        summarize(refused)


def test_accuracy_is_of_texts_with_gold_that_every_endpoint_answered():
    ours = measured(labels={"a": "x", "b": "y", "c": "x", "d": None, "f": "x"})
    other = measured("peer", labels={"a": "x", "b": "x", "c": "x", "d": "x"})
    gold = {"a": "x", "b": "x", "c": None, "d": "x", "e": "x", "f": "x"}
    judged = cost.answered_by_all([ours, other], gold)
    assert judged == {"a": "x", "b": "x", "c": None, "d": "x"}
    accuracy = summarize(ours, gold=judged).accuracy
    # Of a, b and d: one wrong, one abstained.
    assert accuracy.value == pytest.approx(1 / 3)
    assert accuracy.low <= accuracy.value <= accuracy.high
    assert summarize(other, gold=judged).accuracy.value == 1.0
    assert summarize(ours, gold=dict.fromkeys("abcd")).accuracy is None


def test_the_interval_of_accuracy_does_not_follow_from_the_order_in_which_answers_came():
    labels = {f"text {at}": "x" if at % 5 else "y" for at in range(50)}
    gold = dict.fromkeys(labels, "x")
    other_order = dict(sorted(labels.items(), key=lambda answer: answer[1]))
    one, other = (summarize(measured(labels=of), gold=gold) for of in (labels, other_order))
    assert one.accuracy == other.accuracy is not None


def test_arrivals_are_a_poisson_process_of_the_rate():
    times = open_loop.arrivals(200.0, 50.0, seed=3)
    gaps = np.diff(times)
    assert len(times) == pytest.approx(200 * 50, rel=0.05)
    assert times[-1] < 50.0
    # Of exponential gaps, mean and standard deviation are equal.
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 200, rel=0.05)
    assert np.array_equal(times, open_loop.arrivals(200.0, 50.0, seed=3))
    assert not np.array_equal(times[:9], open_loop.arrivals(200.0, 50.0, seed=4)[:9])
    assert len(open_loop.arrivals(0.001, 1.0, seed=0)) == 1


@pytest.mark.parametrize("capacity", [1.0, 7.3, 50.0, 4000.0])
def test_the_search_ends_just_below_the_capacity(capacity):
    tried = []

    async def is_met_at(rate):
        tried.append(rate)
        return rate <= capacity

    found = asyncio.run(open_loop.highest_rate(is_met_at, 20.0, tries=20))
    assert capacity / 1.15 <= found <= capacity
    assert len(tried) < 14
    assert asyncio.run(open_loop.highest_rate(is_met_at, 20.0 * capacity, tries=2)) is None


def test_a_refused_request_is_a_late_one():
    bench = BenchSection(latency_target_ms=100.0, latency_percentile=90.0)
    fast = [sample("open", row, 50.0) for row in range(18)]
    late, refused = sample("open", 18, 101.0), sample("open", 19, 1.0, status=429)
    assert open_loop.is_met([*fast, late, refused], bench)
    assert not open_loop.is_met([*fast, late, refused, refused], bench)


@pytest.mark.parametrize(("percentile", "requests", "late"), [(99.9, 1000, 1), (99.7, 1000, 3)])
def test_a_whole_number_of_late_requests_is_allowed_whole(percentile, requests, late):
    bench = BenchSection(latency_target_ms=100.0, latency_percentile=percentile)
    fast = [sample("open", row, 50.0) for row in range(requests - late)]
    slow = [sample("open", row, 101.0) for row in range(requests - late, requests)]
    assert open_loop.is_met([*fast, *slow], bench)
    assert not open_loop.is_met([*fast[1:], *slow, slow[0]], bench)


def test_each_text_is_sent_once_while_there_are_enough():
    measures = closed_loop.plan(questions(400), BENCH)
    sent = Counter(text for item in measures for request in item.requests for text in request)
    assert set(sent.values()) == {1}
    assert [item.name for item in measures] == ["warm-up", "single", "batch64", "sweep", "sweep"]
    few = closed_loop.plan(["a", "b", "c"], BENCH)
    assert {len(request) for request in few[2].requests} == {64}
    assert closed_loop.plan(questions(400), BENCH) == measures


def test_the_machine_is_described():
    machine = this_machine()
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert machine["memory_gib"] > 0


@pytest.mark.slow
def test_every_request_after_the_warm_up_is_a_sample(student_url):
    progress = []
    found = send(student_url, advance=progress.append)
    assert found.model == "student-test"
    counts = Counter((s.measure, s.concurrency, s.texts, s.status) for s in found.samples)
    assert counts == {
        ("single", 1, 1, 200): 6,
        ("batch64", 1, 64, 200): 2,
        ("sweep", 1, 7, 200): 5,
        ("sweep", 3, 7, 200): 5,
    }
    assert sum(progress) == 2 + 64 + 6 + 2 * 64 + 2 * 5 * 7
    assert all(s.latency_ms > 0 and s.start_s >= 0 for s in found.samples)
    assert summarize(found).texts_per_s > 0
    direct = httpx.post(f"{student_url}/v1/classify", json={"texts": questions(20)}, timeout=60)
    for text, prediction in zip(questions(20), direct.json()["predictions"], strict=True):
        assert found.labels[text] == prediction["label"]


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
    # The first texts go to the measure batch64, and the warm-up has to do without this one.
    found = send(student_url, texts=["x" * 301, *questions(299)])
    refused = [s for s in found.samples if s.status != 200]
    assert [(s.measure, s.status) for s in refused] == [("batch64", 422)]
    assert summarize(found).batch64_s > 0


@pytest.mark.slow
def test_another_endpoint_than_the_experiments_is_an_error(student_url):
    with pytest.raises(EndpointError, match="a teacher was expected there, this is a student"):
        send(student_url, target={"kind": "teacher"})
    with pytest.raises(EndpointError, match="student-new was expected there, this is student-test"):
        send(student_url, target={"model": "student-new"})
    assert send(student_url, target={"model": "student-test"}).model == "student-test"


@pytest.mark.slow
def test_an_endpoint_that_takes_less_than_will_be_sent_is_an_error(student_url):
    with pytest.raises(EndpointError, match=r"takes 256 texts at once and 300 will be sent"):
        send(student_url, sweep_texts=300)


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


@contextlib.contextmanager
def serving(handler):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


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
        ((404, b""), None, "no endpoint of the protocol 'llkd'"),
        ((401, b""), None, "token"),
        ((500, b"oops"), None, "HTTP 500"),
        ((200, b"<html>hello</html>"), None, "begins '<html>hello"),
        ((200, b"\xff\xfe"), None, "does not speak the protocol 'llkd'"),
        ((200, b"[]"), None, "does not speak the protocol 'llkd'"),
        ((200, b"{}"), None, "does not speak the protocol 'llkd'"),
        (_CARD, (503, b"busy"), "HTTP 503"),
        (_CARD, (200, b'{"predictions": []}'), "does not speak the protocol 'llkd'"),
        (_CARD, (200, b'{"predictions": [{}]}'), "does not speak the protocol 'llkd'"),
        (_CARD, (200, b'{"predictions": [3]}'), "does not speak the protocol 'llkd'"),
    ],
)
def test_another_protocol_is_an_error(card, classify, reason):
    answers = {"/v1/model": card, "/v1/classify": classify or (404, b"")}
    handler = type("Handler", (_Other,), {"answers": answers})
    with serving(handler) as url, pytest.raises(EndpointError, match=reason):
        send(url)


def test_an_endpoint_that_never_answers_is_an_error():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(EndpointError, match=r"did not answer within 0\.5 s"):
            send(f"http://127.0.0.1:{silent.getsockname()[1]}", request_timeout_s=0.5)


class _Speaks(http.server.BaseHTTPRequestHandler):
    """A real server that labels each text by its first letter, after `before` has returned."""

    protocol_version = "HTTP/1.1"
    # One packet for head and body: the second of two would wait for a delayed acknowledgement.
    wbufsize = 65_536
    path_of = "/classify"
    token: str | None = None

    def before(self):
        pass

    def answer(self, body):
        rows = [{"index": n, "label": text[0]} for n, text in enumerate(body["input"])]
        return {"data": rows[::-1]}

    def do_POST(self):
        assert self.path == self.path_of
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.before()
        content = json.dumps(self.answer(body)).encode()
        self.send_response(200 if self.token in (None, self.headers["authorization"]) else 401)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, *_):
        pass


class _SpeaksLikeTEI(_Speaks):
    path_of = "/predict"

    def answer(self, body):
        assert all(len(row) == 1 for row in body["inputs"])
        return [
            [{"label": "other", "score": 0.1}, {"label": row[0][0], "score": 0.9}]
            for row in body["inputs"]
        ]


@pytest.mark.parametrize(("protocol", "handler"), [("vllm", _Speaks), ("tei", _SpeaksLikeTEI)])
def test_other_endpoints_are_measured_in_their_own_protocol(protocol, handler):
    with serving(handler) as url:
        found = send(url, target={"protocol": protocol})
    assert len(found.labels) > 100
    assert all(label == text[0] for text, label in found.labels.items())
    assert {s.status for s in found.samples} == {200}
    assert found.model == f"{protocol} at {url}"


@pytest.mark.slow
def test_the_job_measures_another_endpoint_beside_teacher_and_student(tmp_path):
    labels, corpus = make_split_folders(tmp_path, 10, 10, 100)
    overrides = (f"runs={tmp_path}/runs", *SMALL, "bench.search_tries=0", "serve.backend=torch")
    # What answers as the teacher is not the point, only that it says it is the run's.
    patient = CONFIG.model_copy(update={"max_queue_ms": 60_000})
    classifier = StudentClassifier(untrained_student(tmp_path / "student"), 128, patient)
    teacher, student = (
        application(
            model_card(kind, model_name(kind, Run(overrides).lineage), LABELS, CONFIG),
            classifier,
            None,
        )
        for kind in ("teacher", "student")
    )
    with answering(teacher) as teacher_url, answering(student) as student_url:
        run = Run(
            (
                *overrides,
                *(f"bench.teacher_url={teacher_url}", f"bench.student_url={student_url}"),
                f'bench.others=[{{name="peer", url="{student_url}", protocol="tei", '
                "usd_per_hour=0.3}]",
            )
        )
        lineage = run.lineage
        for artifact, folder in ((lineage.corpus, corpus), (lineage.labels, labels)):
            with make(artifact) as draft:
                shutil.copytree(folder, draft.folder, dirs_exist_ok=True)
                draft.rows = Rows(taken=0, kept=0, rejected=0)
        with make(lineage.student()) as draft:
            draft.rows = Rows(taken=0, kept=0, rejected=0)
        done = run.job("bench")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:3] == ["teacher", "student", "peer"]
    found = schema.BenchSummary.model_validate_json(
        (lineage.bench.path / "bench.json").read_bytes()
    )
    peer, student = found.others["peer"], found.student
    assert peer.model == f"tei at {student_url}"
    assert (peer.requests, peer.failed) == (student.requests, 0)
    assert peer.accuracy == student.accuracy is not None
    assert peer.cost_usd_per_million == cost.cost_usd_per_million(0.3, peer.texts_per_s)
    samples = pq.read_table(lineage.bench.path / "samples.parquet")
    assert set(samples["endpoint"].to_pylist()) == {"teacher", "student", "peer"}


def test_a_protocol_that_an_endpoint_does_not_speak_is_an_error():
    class Tei(_SpeaksLikeTEI):
        path_of = "/classify"

        def answer(self, body):
            return super().answer({"inputs": [[text] for text in body["input"]]})

    with serving(Tei) as url, pytest.raises(EndpointError, match="not speak the protocol 'vllm'"):
        send(url, target={"protocol": "vllm"})


def test_another_endpoint_gets_its_own_token():
    token = "sesame"  # noqa: S105
    handler = type("Guarded", (_Speaks,), {"token": f"Bearer {token}"})
    with serving(handler) as url:
        with pytest.raises(EndpointError, match="it asks for a token"):
            send(url, target={"protocol": "vllm"})
        target = Target("peer", url, "vllm", token=token)
        found = measure(target, questions(300), BENCH)
    assert {s.status for s in found.samples} == {200}
    assert token not in repr(target)


def test_an_open_loop_sees_a_stall_that_a_closed_one_hides():
    gate = threading.Lock()

    class Stalls(_Speaks):
        requests = 0

        def before(self):
            with gate:
                Stalls.requests += 1
                # Once while one client waits, once among those that come at random.
                time.sleep(0.5 if Stalls.requests in (20, 100) else 0.0)

    single = {"single_requests": 50, "batch_requests": 1, "sweep_requests": 1}
    calm = {"latency_target_ms": 60_000.0, "open_s": 1.5, "rates_per_s": (100.0,)}
    with serving(Stalls) as url:
        samples = send(url, target={"protocol": "vllm"}, **single, **calm).samples
    alone = [s for s in samples if s.measure == "single"]
    offered = [s for s in samples if s.measure == "open"]
    # A busy machine may add stalls of its own.
    assert 1 <= sum(s.latency_ms > 250 for s in alone) <= 10
    # Half a second at 100 a second; those of its first quarter waited more than as long.
    assert sum(s.latency_ms > 250 for s in offered) >= 15
    assert all(s.sent_s >= s.start_s for s in offered)
    assert {s.rate_per_s for s in offered} == {100.0}


def test_the_highest_rate_is_what_an_endpoint_can_do():
    gate = threading.Lock()

    class OneAtATime(_Speaks):
        def before(self):
            with gate:
                time.sleep(0.02)

    few = {"single_requests": 5, "batch_requests": 1, "sweep_requests": 1}
    bench = {"latency_target_ms": 300.0, "open_s": 1.5, "search_tries": 6}
    with serving(OneAtATime) as url:
        for _ in range(3):  # A stall of a busy machine at a low rate is one too many.
            found = send(url, target={"protocol": "vllm"}, **few, **bench)
            if (found.max_rate_per_s or 0) > 15:
                break
    # Fifty a second; more for as long as what waits stays within the latency that is allowed.
    assert 15 < found.max_rate_per_s <= 75
    made = summarize(found, bench=BENCH.model_copy(update=bench))
    rates = [offered.rate_per_s for offered in made.open_loop]
    assert rates == sorted(rates)
    assert made.max_rate_per_s == max(o.rate_per_s for o in made.open_loop if o.met)
    assert any(not offered.met for offered in made.open_loop)


def test_a_connection_that_breaks_is_a_failed_request():
    class Breaks(_Speaks):
        requests = 0

        def before(self):
            Breaks.requests += 1
            if Breaks.requests == 5:  # The warm-up has three.
                raise ConnectionAbortedError

    Breaks.do_POST = _quietly(_Speaks.do_POST)
    with serving(Breaks) as url:
        found = send(url, target={"protocol": "vllm"})
    assert [s.status for s in found.samples].count(0) == 1
    assert summarize(found).failed == 1


def _quietly(handle):
    def do_post(self):
        try:
            handle(self)
        except ConnectionAbortedError:
            self.close_connection = True

    return do_post
