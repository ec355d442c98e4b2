"""The endpoint under load: deadlines, full queues, metrics, updates, deaths, and more replicas."""

import asyncio
import contextlib
import sys
import threading
import time
from urllib.parse import urlsplit

import httpx
import pytest
from conftest import ROOT
from test_metrics_export import scrape, total, workers
from untrained import questions, untrained_student

from llkd_ray.config import ServeSection, load_experiment
from llkd_ray.errors import ClusterError, ConfigError
from llkd_ray.serving.deploy import _shut_serve_down, running, student_app
from llkd_ray.serving.ingress import environment_of, require_haproxy

sys.path.insert(0, str(ROOT / "jobs/benchmarks"))
import served
import serving_faults

SMALL = {"port": 0, "cpus_per_replica": 0.25, "threads_per_replica": 1, "max_queue_ms": 500.0}
LONG = "What is the meaning of a question that goes on " + "and on " * 400 + "?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return untrained_student(tmp_path_factory.mktemp("student"))


def serve(folder, **settings):
    config = ServeSection(**{**SMALL, **settings})
    return running(student_app(folder, "student-1", 128, config), config)


def post(url, texts, **headers):
    return httpx.post(f"{url}/v1/classify", json={"texts": texts}, headers=headers, timeout=120)


@pytest.mark.slow
def test_deadlines_and_queues_have_an_end_and_prometheus_sees_the_load(ray_local, folder):  # noqa: ARG001
    texts = questions(300)
    others = workers(scrape())
    with serve(folder) as url:
        late = post(url, [LONG] * 128, **{"X-Request-Timeout-Seconds": "0.2"})
        assert late.status_code == 504
        assert "timed out after 0.2s" in late.json()["detail"]
        while (first := post(url, ["Who?"])).status_code == 429:  # What has begun is finished.
            time.sleep(0.2)
        assert first.status_code == 200

        async def burst():
            async with httpx.AsyncClient(base_url=url, timeout=120) as client:
                body = {"texts": [LONG] * 32}
                asked = (client.post("/v1/classify", json=body) for _ in range(20))
                return await asyncio.gather(*asked)

        answers = asyncio.run(burst())
        refused = [answer for answer in answers if answer.status_code == 429]
        assert {answer.status_code for answer in answers} == {200, 429}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert "too many texts are waiting" in refused[0].json()["detail"]
        answered = [texts[start : start + 20] for start in range(0, 300, 20)]
        assert {post(url, part).status_code for part in answered} == {200}
        deadline = time.monotonic() + 60
        labelled = 300 + 1 + 32 * (len(answers) - len(refused))
        while total(exported := scrape(), "ray_llkd_serve_labels", others) != labelled:
            assert time.monotonic() < deadline, exported[-4000:]
            time.sleep(2)
        assert total(exported, "ray_llkd_serve_confidence_count", others) == labelled
        assert total(exported, "ray_llkd_serve_call_texts_sum", others) >= labelled
        assert total(exported, "ray_llkd_serve_latency_ms_count", others) == total(
            exported, "ray_llkd_serve_requests", others
        )
        assert 'status="429"' in exported
        assert total(exported, "ray_llkd_serve_waiting_tokens", others) == 0


@pytest.mark.slow
def test_an_endpoint_that_is_taken_down_answers_what_it_has_begun(ray_local, folder):  # noqa: ARG001
    answers = []
    with serve(folder) as url:
        asking = threading.Thread(target=lambda: answers.append(post(url, [LONG] * 128)))
        asking.start()
        time.sleep(0.5)
    asking.join()
    assert answers[0].status_code == 200
    assert len(answers[0].json()["predictions"]) == 128


@pytest.mark.slow
def test_an_update_and_a_killed_replica_fail_no_request(ray_local, folder):  # noqa: ARG001
    config = ServeSection(**{**SMALL, "num_replicas": 2, "max_queue_ms": 60_000.0})
    with running(student_app(folder, "student-1", 128, config), config) as url:
        seen = asyncio.run(serving_faults.measure(url, folder, config, quick=True))
    assert seen["failed_requests_update"] == seen["failed_requests_kill"] == 0, seen
    assert seen["requests"] > 10


@pytest.mark.slow
def test_the_end_of_the_first_job_leaves_what_another_has_put_in_its_place(ray_local, folder):  # noqa: ARG001
    def answers(url):
        return httpx.get(f"{url}/v1/model", timeout=30).json()["name"]

    with contextlib.ExitStack() as second:
        second.callback(_shut_serve_down)  # The first had started it, and leaves it to the second.
        with serve(folder) as url:
            assert answers(url) == "student-1"
            port = urlsplit(url).port
            with pytest.raises(ClusterError, match=f"set serve.port={port}"), serve(folder):
                pass
            there = ServeSection(**{**SMALL, "port": port})
            second.enter_context(running(student_app(folder, "student-2", 128, there), there))
            assert answers(url) == "student-2"
        assert answers(url) == "student-2"
    with pytest.raises(httpx.ConnectError):
        answers(url)


@pytest.mark.slow
def test_replicas_come_with_the_load_and_go_with_it(ray_local, folder):  # noqa: ARG001
    scaling = {"num_replicas": (1, 2), "target_ongoing_requests": 1.0, "downscale_delay_s": 3.0}
    with serve(folder, **scaling) as url:
        assert len(served.replicas()) == 1
        asyncio.run(load_until_there_are_two(url))
        wait_for_replicas(1, 120)
        assert post(url, ["Who?"]).status_code == 200


async def load_until_there_are_two(url):
    load = asyncio.create_task(served.Load(url).rate(6, 300.0))
    await asyncio.to_thread(wait_for_replicas, 2, 120)
    load.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await load


def wait_for_replicas(number, timeout_s):
    deadline = time.monotonic() + timeout_s
    while len(served.replicas()) != number:
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_haproxy_is_asked_for_before_serve_starts(monkeypatch):
    assert environment_of(ServeSection()) == {}
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    with pytest.raises(ClusterError, match="RAY_SERVE_ENABLE_HA_PROXY=1"):
        require_haproxy()
    for name, value in environment_of(ServeSection(ingress="haproxy")).items():
        monkeypatch.setenv(name, value)
    require_haproxy()


def test_replicas_are_a_number_or_fewest_and_most():
    quickstart = ROOT / "jobs/configs/quickstart.toml"
    serve = load_experiment(quickstart, ["serve.num_replicas=[1, 4]"]).serve
    assert serve.num_replicas == (1, 4)
    with pytest.raises(ConfigError, match="the fewest are more than the most"):
        load_experiment(quickstart, ["serve.num_replicas=[4, 1]"])
