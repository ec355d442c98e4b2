"""What do a rolling update and the death of a replica cost those who ask?

Two replicas of an untrained student, and requests of 16 questions at a third of their capacity,
each sent at its time whether those before are answered or not. Under that load

- `update`: the endpoint is replaced by another student, as a second jobs/serve.py does it;
- `kill`: a replica is killed with SIGKILL while requests are under way, and its successor awaited;
  thrice, once with --quick.

Failed is every request that is not answered with predictions: refused, in error, or lost. Nobody
asks twice here: what is sent again is sent again by the endpoint.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import figures
import served

from llkd_ray.config import ServeSection
from llkd_ray.errors import EndpointError

REPLICAS = 2
_CLIENTS = 6
_SHARE_OF_CAPACITY = 1 / 3
_START_TIMEOUT_S = 240.0
_POLL_S = 0.2


async def update(url: str, student: Path, config: ServeSection, stack: contextlib.ExitStack) -> str:
    """Deploy another student in place of the one that serves; return what happened."""
    from llkd_ray.serving.deploy import running, student_app

    port = urlsplit(url).port
    there = config.model_copy(update={"port": port})
    app = student_app(student, "student-2", served.MAX_LENGTH, there)
    began = time.perf_counter()
    await asyncio.to_thread(stack.enter_context, running(app, there))
    return f"both replicas replaced after {time.perf_counter() - began:.0f} s"


def kill(load: served.Load) -> str:
    """Kill a replica with requests under way and wait for another; return what happened."""
    from ray import serve

    from llkd_ray.serving.deploy import APP

    known = served.replicas()
    while load.under_way < REPLICAS:
        time.sleep(0.001)
    under_way = load.under_way
    known[0].kill()
    began = time.perf_counter()
    while True:
        (deployment,) = serve.status().applications[APP].deployments.values()
        there = sum(n for state, n in deployment.replica_states.items() if state == "RUNNING")
        # Serve needs a moment to notice; the new process is the proof.
        if there == REPLICAS and not set(served.replicas()) <= set(known):
            return f"{under_way} requests under way; another replica after {_since(began)}"
        if time.perf_counter() - began > _START_TIMEOUT_S:
            raise EndpointError(f"no other replica was there after {_since(began)}")
        time.sleep(_POLL_S)


def _since(began: float) -> str:
    return f"{time.perf_counter() - began:.0f} s"


async def measure(url: str, student: Path, config: ServeSection, *, quick: bool) -> dict[str, Any]:
    """Update and kill under load."""
    load = served.Load(url)
    await load.rate(_CLIENTS, 3.0)  # Warms up.
    rate_per_s = _SHARE_OF_CAPACITY * await load.rate(_CLIENTS, 5.0)
    failed = {"update": 0, "kill": 0}
    models: set[str | None] = set()
    rows = []
    with contextlib.ExitStack() as stack:
        acts: list[tuple[str, Callable[[], Awaitable[str]]]] = [
            ("update", lambda: update(url, student, config, stack)),
            *[("kill", lambda: asyncio.to_thread(kill, load))] * (1 if quick else 3),
        ]
        for name, act in acts:
            answers, happened = await load.during(rate_per_s, act)
            bad = sum(answer.status != served.OK for answer in answers)
            failed[name] += bad
            models.update(answer.model for answer in answers[-3:])
            latencies = [served.percentile(answers, percent) for percent in (50, 99, 100)]
            rows.append([name, len(answers), bad, *latencies, served.statuses(answers), happened])
    header = ["under load", "requests", "failed", "p50 ms", "p99 ms", "slowest ms", "answers", ""]
    print(figures.table(header, rows), flush=True)
    if models != {"student-2"}:
        raise EndpointError(f"after the update these have answered: {models}")
    return {
        "failed_requests_update": failed["update"],
        "failed_requests_kill": failed["kill"],
        "requests": sum(row[1] for row in rows),
        "kills": len(rows) - 1,
        "requests_per_s": round(rate_per_s, 1),
        "ingress": config.ingress,
    }


def benchmark(student: Path | None, config: ServeSection, *, quick: bool) -> dict[str, Any]:
    """Serve a student and do to it what happens in production."""
    with served.student_in(student) as folder, served.endpoint(folder, config) as url:
        return asyncio.run(measure(url, folder, config, quick=quick))


def main() -> int:
    parser = served.parser_of(__doc__, "one kill instead of three")
    parser.add_argument("--ingress", choices=["serve", "haproxy"], default="serve")
    arguments = parser.parse_args()
    config = ServeSection(
        port=0,
        ingress=arguments.ingress,
        num_replicas=REPLICAS,
        # Four of them stand on two cores for a moment.
        cpus_per_replica=0.25,
        threads_per_replica=1,
        # A queue is another benchmark's matter (overload.py).
        max_queue_ms=60_000.0,
    )
    from llkd_ray.serving.ingress import environment_of

    os.environ.update(environment_of(config))  # Before Serve is imported.
    return figures.run(lambda: benchmark(arguments.student, config, quick=arguments.quick))


if __name__ == "__main__":
    sys.exit(main())
