"""A student that is served, and requests that come at their time, whatever became of those before.

Shared by the benchmarks of load and of faults. The student is real and untrained: the embedded
encoder with a fresh head, in ONNX Runtime.
"""

import argparse
import asyncio
import collections
import contextlib
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import figures
import httpx
import numpy as np
import psutil

from llkd_ray.config import EncoderStudent, ExportSection, RaySection, ServeSection
from llkd_ray.embedded import CORPORA, locate

LABELS = ("abbreviation", "description", "thing", "person", "place", "number")
MAX_LENGTH = 128
OK, TOO_MANY = 200, 429
TEXTS = 16
"""Texts in a request."""
_TIMEOUT_S = 120.0
_CONNECT_S = 1.0
_AROUND_S = 3.0

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What became of a request."""

    at_s: float
    """When it was to be sent, from the start of the load."""
    latency_ms: float
    """From then on, so that a client that cannot keep up flatters nobody."""
    status: int
    """0: the connection was lost."""
    told_when: bool
    """Whether a Retry-After came with it."""
    model: str | None


def parser_of(summary: str | None, quick: str) -> argparse.ArgumentParser:
    """Return a parser with `--quick` and `--student`."""
    parser = figures.parser_of(summary, quick)
    parser.add_argument(
        "--student", type=Path, help="folder of an exported student; made anew when not given"
    )
    return parser


@contextlib.contextmanager
def student_in(folder: Path | None) -> Iterator[Path]:
    """Hold the folder of a student, that given or one made for the block."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="llkd-") as made:
        _, onnx = make_student(Path(made))
        yield onnx


def make_student(folder: Path) -> tuple[Path, Path]:
    """Make an untrained student; return its folders, plain and for ONNX Runtime."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from llkd_ray.student.model import load_tokenizer, load_untrained
    from llkd_ray.student.model import locate as locate_encoder
    from llkd_ray.student.onnx import export_onnx

    section = EncoderStudent()
    plain, sample = folder / "plain", folder / "corpus/test"
    load_untrained(section, LABELS, seed=0).save_pretrained(plain)
    load_tokenizer(locate_encoder(section.model)).save_pretrained(plain)
    sample.mkdir(parents=True)
    texts = questions()[:64]
    rows = pa.table({"text": texts, "gold": pa.array([None] * len(texts), pa.string())})
    pq.write_table(rows, sample / "shard-00000.parquet")
    export_onnx(
        plain,
        folder / "onnx",
        corpus=folder / "corpus",
        section=ExportSection(int8=False),
        max_length=MAX_LENGTH,
    )
    return plain, folder / "onnx"


def questions() -> list[str]:
    """Return the embedded corpus's distinct texts."""
    lines = locate(CORPORA["trec"]).read_text(encoding="latin-1").splitlines()
    return list(dict.fromkeys(line.partition(" ")[2] for line in lines if " " in line))


@contextlib.contextmanager
def endpoint(folder: Path, config: ServeSection) -> Iterator[str]:
    """Serve the student on a private Ray with a CPU for each of its replicas; yield the URL."""
    from llkd_ray.cluster import ray_session
    from llkd_ray.serving.deploy import running, student_app

    app = student_app(folder, "student-1", MAX_LENGTH, config)
    with ray_session(RaySection()), running(app, config, free_port=True) as url:
        yield url


# An idle one bears its actor's name, one that computes that of its class.
REPLICA = ("ray::SERVE_REPLICA", "ray::ServeReplica")


def replicas() -> list[psutil.Process]:
    """Return the processes of the replicas below this one."""
    return _below(*REPLICA)


def memory_mb() -> float:
    """Return what replicas and proxies hold, in megabytes."""
    held = 0
    for process in _below(*REPLICA, "ray::ProxyActor", "haproxy"):
        with contextlib.suppress(psutil.NoSuchProcess):
            held += process.memory_info().rss
    return held / 1e6


def _below(*titles: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            # The title stands in the command line; the name is cut to 15 characters.
            if any(title in " ".join(process.cmdline()) for title in titles):
                found.append(process)
    return found


class Load:
    """Requests to one endpoint."""

    def __init__(self, *urls: str) -> None:
        """Know the endpoint by one URL or by several, as a load balancer before its hosts does.

        Of several each request takes the next, on a connection of its own; where nobody listens
        and nothing was sent, the one after.
        """
        self._urls = urls
        texts = questions()
        self._bodies = [
            {"texts": texts[start : start + TEXTS]} for start in range(0, len(texts) - TEXTS, TEXTS)
        ]
        self.under_way = 0

    async def rate(self, concurrency: int, seconds: float) -> float:
        """Return the requests per second that so many clients get, one after the other each."""
        end = time.perf_counter() + seconds
        answered = 0

        async def client(first: int) -> None:
            nonlocal answered
            request = first
            while time.perf_counter() < end:
                answer = await self._ask(http, request, time.perf_counter(), 0.0)
                answered += answer.status == OK
                request += concurrency

        async with self._client() as http:
            began = time.perf_counter()
            await asyncio.gather(*(client(first) for first in range(concurrency)))
            return answered / (time.perf_counter() - began)

    async def offer(
        self, rate_per_s: float, seconds: float, until: asyncio.Event | None = None
    ) -> list[Answer]:
        """Send requests as clients do that know nothing of each other; wait for all answers.

        Args:
            rate_per_s: Requests in a second on average; they come at random (Poisson).
            seconds: For so long, or for so long after `until`.
            until: Set when what is to happen meanwhile has happened.
        """
        tasks: list[asyncio.Task[Answer]] = []
        gaps = np.random.default_rng(0)
        async with self._client() as http, asyncio.TaskGroup() as group:
            began = time.perf_counter()
            end = None if until else seconds
            at = 0.0
            while end is None or at < end:
                await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
                tasks.append(group.create_task(self._ask(http, len(tasks), began, at)))
                if until is not None and until.is_set() and end is None:
                    end = at + seconds
                at += gaps.exponential(1 / rate_per_s)
        return [task.result() for task in tasks]

    async def during(
        self, rate_per_s: float, act: Callable[[], Awaitable[T]]
    ) -> tuple[list[Answer], T]:
        """Do something while requests come; return their answers and what came of it."""
        over = asyncio.Event()

        async def acting() -> T:
            try:
                await asyncio.sleep(_AROUND_S)
                return await act()
            finally:
                over.set()

        return await asyncio.gather(self.offer(rate_per_s, _AROUND_S, over), acting())

    async def _ask(self, http: httpx.AsyncClient, request: int, began: float, at: float) -> Answer:
        self.under_way += 1
        status, told_when, model = 0, False, None
        try:
            response = await self._post(http, request)
            status, told_when = response.status_code, "retry-after" in response.headers
            model = response.json()["model"] if status == OK else None
        except httpx.HTTPError:
            pass
        finally:
            self.under_way -= 1
        latency_s = time.perf_counter() - began - at
        return Answer(at, latency_s * 1000, status, told_when, model)

    async def _post(self, http: httpx.AsyncClient, request: int) -> httpx.Response:
        body = self._bodies[request % len(self._bodies)]
        *others, last = (
            self._urls[(request + further) % len(self._urls)] for further in range(len(self._urls))
        )
        for url in others:
            with contextlib.suppress(httpx.ConnectError, httpx.ConnectTimeout):
                return await http.post(f"{url}/v1/classify", json=body)
        return await http.post(f"{last}/v1/classify", json=body)

    def _client(self) -> httpx.AsyncClient:
        several = len(self._urls) > 1
        return httpx.AsyncClient(
            timeout=httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_S if several else _TIMEOUT_S),
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=0 if several else None
            ),
            trust_env=False,
        )


def percentile(answers: Sequence[Answer], percent: float) -> float | None:
    """Return a percentile of the latencies of those that were answered, in ms."""
    latencies = [answer.latency_ms for answer in answers if answer.status == OK]
    return round(float(np.percentile(latencies, percent)), 1) if latencies else None


def statuses(answers: Sequence[Answer]) -> str:
    """Return how many answers there were of each kind."""
    counted = collections.Counter(answer.status or "lost" for answer in answers)
    return ", ".join(f"{count} x {status}" for status, count in sorted(counted.items(), key=str))
