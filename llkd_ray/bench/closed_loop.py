"""A closed loop: so many clients, each of which sends its next request after the last answer.

All endpoints get the same texts in the same order, each text once as far as there are enough, so
that none is flattered by a cache that real traffic would not fill.
"""

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from llkd_ray.bench.measurement import Measurement, Sample
from llkd_ray.bench.session import OK, Session
from llkd_ray.config import BenchSection
from llkd_ray.errors import EndpointError

BATCH_TEXTS = 64
"""Texts in a request of the measure batch64."""


@dataclass(frozen=True)
class Measure:
    """Requests that are sent by so many clients at once, each waiting for its answer."""

    name: Literal["warm-up", "single", "batch64", "sweep"]
    concurrency: int
    requests: tuple[tuple[str, ...], ...]


def plan(texts: Sequence[str], bench: BenchSection) -> list[Measure]:
    """Share out texts over the measures, in the order in which they are run.

    The first texts go to the large requests, which settle the accuracy beside the speed. When
    there are too few, they start over.

    Args:
        texts: Distinct texts, at least one.
        bench: Numbers of requests.
    """
    source = itertools.cycle(texts)

    def requests(count: int, texts_each: int) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(itertools.islice(source, texts_each)) for _ in range(count))

    batch = Measure("batch64", 1, requests(bench.batch_requests, BATCH_TEXTS))
    sweep = [
        Measure("sweep", concurrency, requests(bench.sweep_requests, bench.sweep_texts))
        for concurrency in bench.concurrency
    ]
    single = Measure("single", 1, requests(bench.single_requests, 1))
    # The first pass of a size allocates for it.
    warm_up = Measure("warm-up", 1, requests(bench.warmup_requests, 1) + requests(1, BATCH_TEXTS))
    return [warm_up, single, batch, *sweep]


async def run(session: Session, item: Measure, measured: Measurement) -> None:
    """Send a measure's requests from `concurrency` clients that share one list.

    Raises:
        EndpointError: The warm-up is refused. Later requests that are refused are samples with
            their status.
    """
    began = time.perf_counter()
    left = iter(item.requests)

    async def one_client(requests: Iterator[tuple[str, ...]]) -> None:
        for texts in requests:
            start = time.perf_counter()
            reply = await session.ask(texts)
            if item.name == "warm-up":
                if reply.status != OK:
                    raise EndpointError(f"the {measured.endpoint}: {reply.refusal}")
                continue
            sample = Sample(
                endpoint=measured.endpoint,
                measure=item.name,
                concurrency=item.concurrency,
                rate_per_s=None,
                texts=len(texts),
                start_s=start - began,
                sent_s=start - began,
                latency_ms=(reply.end_s - start) * 1000,
                status=reply.status,
            )
            measured.samples.append(sample)
            if reply.status == OK:
                measured.labels.update(zip(texts, reply.labels, strict=True))

    # Not a task group: the first client's error is the answer, not a group of errors.
    await asyncio.gather(*(one_client(left) for _ in range(item.concurrency)))
