"""An open loop: requests of one text come when they come, whether or not the last is answered.

Users do not wait for each other, so this is where queueing is seen. A latency counts from the
moment at which the request was meant to be sent, not from when the client got round to it:
otherwise an endpoint that stalls would delay the very requests that would have seen it stall
("coordinated omission").
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator

import numpy as np

from llkd_ray.bench.measurement import Measurement, Sample
from llkd_ray.bench.session import OK, Session
from llkd_ray.config import BenchSection
from llkd_ray.metrics import Floats

_PRECISION = 1.15
"""The search ends when the lowest rate that was too much is this much above the highest met."""


def arrivals(rate_per_s: float, seconds: float, seed: int) -> Floats:
    """Return when requests of a Poisson process come, in seconds from its start, at least one."""
    rng = np.random.default_rng(seed)
    # Six standard deviations more than are expected: they reach past the end.
    expected = rate_per_s * seconds
    gaps = rng.exponential(1 / rate_per_s, math.ceil(expected + 6 * math.sqrt(expected) + 10))
    times = np.cumsum(gaps)
    within: Floats = times[: max(1, int(np.searchsorted(times, seconds)))]
    return within


def is_met(samples: list[Sample], bench: BenchSection) -> bool:
    """Return whether enough requests were answered within the target; a refused one was not."""
    late = sum(_late(sample, bench) for sample in samples)
    return late <= _late_allowed(len(samples), bench)


async def offer(
    session: Session,
    measured: Measurement,
    rate_per_s: float,
    texts: Iterator[str],
    bench: BenchSection,
) -> bool:
    """Send requests at a rate, keep their samples and return whether the target was met.

    Sending ends early once so many are late that the target is lost: an endpoint that cannot keep
    up would else be busy with the rest for long.
    """
    schedule = arrivals(rate_per_s, bench.open_s, bench.seed)
    allowed = _late_allowed(len(schedule), bench)
    began = time.perf_counter()
    under_way: set[float] = set()
    samples: list[Sample] = []
    late = 0

    async def one(at: float, text: str) -> None:
        nonlocal late
        under_way.add(at)
        sent_s = time.perf_counter() - began
        reply = await session.ask((text,))
        under_way.remove(at)
        sample = Sample(
            endpoint=measured.endpoint,
            measure="open",
            concurrency=None,
            rate_per_s=rate_per_s,
            texts=1,
            start_s=at,
            sent_s=sent_s,
            latency_ms=(reply.end_s - began - at) * 1000,
            status=reply.status,
        )
        samples.append(sample)
        late += _late(sample, bench)

    tasks = []
    given_up = False
    for at in schedule.tolist():
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        now = time.perf_counter() - began
        overdue = sum((now - other) * 1000 > bench.latency_target_ms for other in under_way)
        if overdue + late > allowed:
            given_up = True
            break
        tasks.append(asyncio.create_task(one(at, next(texts))))
    await asyncio.gather(*tasks)
    measured.samples.extend(sorted(samples, key=lambda sample: sample.start_s))
    return not given_up and is_met(samples, bench)


async def highest_rate(
    is_met_at: Callable[[float], Awaitable[bool]], start: float, tries: int
) -> float | None:
    """Search for the highest rate that meets the target, by doubling, halving and bisecting.

    Args:
        is_met_at: Tries a rate.
        start: The first rate to try.
        tries: How many rates are tried at most.

    Returns:
        The highest rate that was met, None where none was.
    """
    met: float | None = None
    too_much: float | None = None
    rate = start
    for _ in range(tries):
        if await is_met_at(rate):
            met = rate
        else:
            too_much = rate
        if met is None:
            rate /= 2
        elif too_much is None:
            rate *= 2
        elif too_much / met <= _PRECISION:
            break
        else:
            rate = math.sqrt(met * too_much)
    return met


def _late(sample: Sample, bench: BenchSection) -> bool:
    return sample.status != OK or sample.latency_ms > bench.latency_target_ms


def _late_allowed(requests: int, bench: BenchSection) -> int:
    # A little more, since 1000 * (100 - 99.9) / 100 is 0.99999 to a computer.
    return math.floor(requests * (100 - bench.latency_percentile) / 100 + 1e-9)
