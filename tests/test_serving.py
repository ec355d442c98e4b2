"""The student, really served, against a second way to the same answers."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest
from conftest import QUICKSTART, ROOT, command
from transformers import pipeline
from untrained import LABELS, free_port, questions, untrained_student

from llkd_ray.artifacts import Rows, make
from llkd_ray.config import ServeSection, load_experiment
from llkd_ray.errors import ClusterError, EndpointError, StudentError
from llkd_ray.lineage import Lineage
from llkd_ray.serving.batching import Batcher, Pace
from llkd_ray.serving.deploy import running, student_app
from llkd_ray.serving.protocol import Refusal
from llkd_ray.serving.student import StudentClassifier
from llkd_ray.student.train import MODEL

# As many wait here as come.
# Where a replica does not come up, Serve's reason is told before the test's own time is up.
CONFIG = ServeSection(port=0, max_queue_ms=60_000, start_timeout_s=240)
LONG = "What is the meaning of a question that goes on " + "and on " * 400 + "?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return untrained_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def student_url(ray_local, folder):  # noqa: ARG001
    with running(student_app(folder, "student-test", 128, CONFIG), CONFIG) as url:
        yield url


def probabilities(response):
    assert response.status_code == 200, response.text
    predictions = response.json()["predictions"]
    return np.array([list(item["probabilities"].values()) for item in predictions])


@pytest.mark.slow
def test_what_keeps_an_endpoint_from_starting_is_named(ray_local, folder, tmp_path):  # noqa: ARG001
    # Stands first: one cluster serves one endpoint, and the module's own comes next.
    with pytest.raises(StudentError, match=r"config\.json"):
        student_app(tmp_path, "student-test", 128, CONFIG)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = ServeSection(port=taken.getsockname()[1])
        with (
            pytest.raises(ClusterError, match=r"serve\.port=0 takes a free port"),
            running(student_app(folder, "student-test", 128, config), config),
        ):
            pass
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not weights")
    # What the student's module says in the replica arrives here.
    with (
        pytest.raises(EndpointError, match=r"did not start: .*header too large"),
        running(student_app(broken, "student-test", 128, CONFIG), CONFIG),
    ):
        pass


@pytest.mark.slow
def test_the_served_student_answers_what_a_transformers_pipeline_answers(student_url, folder):
    texts = [*questions(60), LONG, "漢字 👩‍👩‍👧", "a\x00b", "من؟"]
    direct = pipeline("text-classification", model=str(folder), top_k=None)
    expected = direct(texts, truncation=True, max_length=128)
    served = httpx.post(f"{student_url}/v1/classify", json={"texts": texts}, timeout=60)
    rows = [{item["label"]: item["score"] for item in row} for row in expected]
    np.testing.assert_allclose(
        probabilities(served), [[row[name] for name in LABELS] for row in rows], atol=1e-5
    )
    labels = [item["label"] for item in served.json()["predictions"]]
    assert labels == [max(row, key=row.__getitem__) for row in rows]
    assert len(set(labels)) > 1


@pytest.mark.slow
def test_many_requests_at_once_are_all_answered_with_their_own_texts_in_order(student_url, folder):
    texts = questions(400)
    rows = StudentClassifier(folder, 128, CONFIG).probabilities(texts)
    direct = dict(zip(texts, rows, strict=True))
    rng = np.random.default_rng(0)
    requests = [list(rng.choice(texts, rng.integers(1, 20), replace=False)) for _ in range(60)]

    async def ask():
        async with httpx.AsyncClient(base_url=student_url, timeout=120) as client:
            return await asyncio.gather(
                *(client.post("/v1/classify", json={"texts": request}) for request in requests)
            )

    for request, response in zip(requests, asyncio.run(ask()), strict=True):
        expected = [direct[text] for text in request]
        np.testing.assert_allclose(probabilities(response), expected, atol=1e-5)


@pytest.mark.slow
def test_health_is_answered_while_the_student_computes(student_url):
    answers = []

    def load():
        texts = {"texts": [LONG] * 128}  # Seconds of computing.
        answers.append(httpx.post(f"{student_url}/v1/classify", json=texts, timeout=300))

    worker = threading.Thread(target=load)
    worker.start()
    time.sleep(1)
    for _ in range(3):
        assert httpx.get(f"{student_url}/healthz", timeout=30).status_code == 200
    # Were the loop blocked, this would have been answered first.
    assert not answers
    worker.join()
    assert answers[0].status_code == 200


async def _with_batcher(compute, work, **settings):
    usual = {
        "tokens": lambda _: 1,
        "max_tokens": 8,
        "gather_s": 0.0,
        "max_wait_s": 60.0,
        "pace": Pace(0.0, 1e-9),
    }
    with ThreadPoolExecutor(1) as thread:
        batcher = Batcher(compute, thread, **{**usual, **settings})
        try:
            return await work(batcher)
        finally:
            await batcher.close()


def test_requests_that_come_while_the_model_computes_share_the_next_call():
    calls = []

    def lengths(texts):
        calls.append(len(texts))
        time.sleep(0.05)
        return np.array([[float(len(text))] for text in texts])

    async def work(batcher):
        requests = [["x" * (row + 1)] * (1 + row % 3) for row in range(20)]
        answers = await asyncio.gather(*(batcher.submit(request) for request in requests))
        for request, answer in zip(requests, answers, strict=True):
            assert answer.tolist() == [[len(request[0])]] * len(request)
        assert (await batcher.submit(["y"] * 30)).shape == (30, 1)

    asyncio.run(_with_batcher(lengths, work))
    assert max(calls[:-1]) <= 8  # Only the request of 30 texts goes past it, alone.
    assert calls[-1] == 30
    assert len(calls) < 12


def test_an_idle_model_waits_for_company_only_as_long_as_it_is_told():
    calls = []

    def count(texts):
        calls.append(len(texts))
        return np.zeros((len(texts), 1))

    async def work(batcher):
        first = asyncio.create_task(batcher.submit(["a"]))
        await asyncio.sleep(0.05)
        await batcher.submit(["b"])
        await first
        start = time.perf_counter()
        await batcher.submit(["c"] * 8)  # Full at once: there is nothing to wait for.
        assert time.perf_counter() - start < 0.3

    asyncio.run(_with_batcher(count, work, gather_s=0.4))
    assert calls == [2, 8]


def test_an_error_of_the_model_reaches_its_requests_and_no_others():
    def fails_on_bad(texts):
        if "bad" in texts:
            raise ValueError("bad text")
        return np.zeros((len(texts), 1))

    async def work(batcher):
        with pytest.raises(ValueError, match="bad text"):
            await batcher.submit(["bad"])
        assert (await batcher.submit(["good"])).shape == (1, 1)
        batcher.check_health()

    asyncio.run(_with_batcher(fails_on_bad, work))


def test_a_client_that_leaves_does_not_disturb_those_who_stay():
    def slow(texts):
        time.sleep(0.1)
        return np.array([[float(len(text))] for text in texts])

    async def work(batcher):
        tasks = [asyncio.create_task(batcher.submit(["x" * (i + 1)])) for i in range(6)]
        await asyncio.sleep(0.05)
        tasks[0].cancel()
        tasks[3].cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [answers[i].item() for i in (1, 2, 4, 5)] == [2, 3, 5, 6]

    asyncio.run(_with_batcher(slow, work))


def test_what_is_not_answered_when_the_batcher_is_closed_is_cancelled():
    def slow(texts):
        time.sleep(0.3)
        return np.zeros((len(texts), 1))

    async def work(batcher):
        tasks = [asyncio.create_task(batcher.submit(["text"] * 8)) for _ in range(3)]
        await asyncio.sleep(0.1)  # The first is computed, the others wait.
        await batcher.close()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)

    found = asyncio.run(_with_batcher(slow, work))
    assert [type(error) for error in found] == [asyncio.CancelledError] * 3


def test_a_request_that_would_wait_too_long_is_refused_with_the_time_to_come_back():
    computed = []

    def slow(texts):
        computed.extend(texts)
        time.sleep(0.02 * len(texts))
        return np.zeros((len(texts), 1))

    async def work(batcher):
        burst = [batcher.submit([f"{row}"] * 8) for row in range(20)]
        answers = await asyncio.gather(*burst, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, Refusal)]
        # A call of 8 takes 0.16 s: 4 and those before them wait for 0.5 s at most.
        assert len(answers) - len(refused) == 4
        assert {(refusal.status, refusal.headers["Retry-After"]) for refusal in refused} == {
            (429, "1")
        }
        assert "read in 0.6 s" in refused[0].reason
        assert (await batcher.submit(["after it"])).shape == (1, 1)

    asyncio.run(_with_batcher(slow, work, pace=Pace(0.0, 0.02), max_wait_s=0.5))
    assert len(computed) == 4 * 8 + 1


def test_the_pace_that_refuses_follows_what_calls_take():
    calls = []

    def slow(texts):
        time.sleep(0.03)
        return np.zeros((len(texts), 1))

    async def work(batcher):
        for _ in range(16):
            await batcher.submit(["x"] * 8)
        answers = await asyncio.gather(
            *(batcher.submit(["x"] * 8) for _ in range(20)), return_exceptions=True
        )
        # It was told of 1 s for a token, and 8 tokens take 0.03 s.
        assert not any(isinstance(answer, Refusal) for answer in answers)

    asyncio.run(
        _with_batcher(slow, work, pace=Pace(0.0, 1.0), max_wait_s=5.0, observe=calls.append)
    )
    assert sum(call.texts for call in calls) == 36 * 8
    assert calls[16].waiting == 19 * 8


def test_small_calls_which_take_longer_for_a_text_do_not_refuse_a_burst():
    def slow(texts):
        time.sleep(0.05 + 0.001 * len(texts))
        return np.zeros((len(texts), 1))

    async def work(batcher):
        for _ in range(6):
            await batcher.submit(["x"])
        # Each would wait for 2.5 s at the pace of single texts.
        await asyncio.gather(*(batcher.submit(["x"] * 8) for _ in range(6)))

    asyncio.run(_with_batcher(slow, work, pace=Pace(0.05, 0.001), max_wait_s=1.5))


def test_a_request_whose_deadline_passes_while_it_waits_is_not_computed():
    computed, begun, finish = [], threading.Event(), threading.Event()

    def held(texts):
        computed.extend(texts)
        begun.set()
        assert finish.wait(60)
        return np.zeros((len(texts), 1))

    async def work(batcher):
        first = asyncio.create_task(batcher.submit(["first"] * 8))
        await asyncio.to_thread(begun.wait, 60)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(batcher.submit(["late"] * 8), 0.05)
        finish.set()
        await first
        await batcher.submit(["next"])

    asyncio.run(_with_batcher(held, work))
    assert set(computed) == {"first", "next"}


@pytest.mark.slow
def test_ctrl_c_ends_the_serve_job_without_traceback_or_left_processes(tmp_path, folder):
    port = free_port()
    overrides = (
        *(f"runs={tmp_path}", f"serve.port={port}", "serve.backend=torch"),
        "serve.student=guided",
    )
    lineage = Lineage(load_experiment(QUICKSTART, overrides))
    with make(lineage.guided) as draft:
        (draft.folder / MODEL).symlink_to(folder)
        draft.rows = Rows(taken=0, kept=0, rejected=0)
    job = subprocess.Popen(
        command("serve", str(QUICKSTART), *overrides),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_ADDRESS": ""},
        start_new_session=True,
    )
    assert job.stdout is not None
    assert f"http://127.0.0.1:{port}" in job.stdout.readline()
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/classify", json={"texts": ["Who?"]})
    assert answer.status_code == 200
    assert answer.json()["model"] == f"guided-{lineage.guided.fingerprint}"
    started = psutil.Process(job.pid).children(recursive=True)
    assert started
    os.killpg(job.pid, signal.SIGINT)  # As a terminal does: everything in the foreground gets it.
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    assert "Traceback" not in out + err
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []
