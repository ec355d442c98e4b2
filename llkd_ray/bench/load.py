"""Measure one endpoint: warm-up, closed loops, then open ones."""

import asyncio
import itertools
import statistics
from collections.abc import Callable, Sequence

import httpx

from llkd_ray.bench import closed_loop, open_loop
from llkd_ray.bench.closed_loop import Measure
from llkd_ray.bench.measurement import Measurement
from llkd_ray.bench.session import OK, Session, Target
from llkd_ray.config import BenchSection
from llkd_ray.errors import EndpointError


def measure(
    target: Target,
    texts: Sequence[str],
    bench: BenchSection,
    *,
    advance: Callable[[int], object] = lambda _: None,
) -> Measurement:
    """Measure an endpoint.

    Args:
        target: The endpoint.
        texts: Distinct texts, at least one.
        bench: What is measured.
        advance: Called with the number of texts after each request.

    Raises:
        EndpointError: It does not answer, refuses the warm-up, or speaks another protocol. Later
            requests that it refuses are samples with their status.
    """
    token = {"Authorization": f"Bearer {target.token}"} if target.token else {}
    try:
        client = httpx.AsyncClient(
            base_url=target.url,
            timeout=bench.request_timeout_s,
            headers=token,
            # Requests wait for the endpoint, not for a connection of ours.
            limits=httpx.Limits(max_connections=None),
            # A proxy of the environment would be measured along with the endpoint.
            trust_env=False,
        )
        return asyncio.run(_measure(client, target, texts, bench, advance))
    except httpx.TimeoutException:
        raise EndpointError(
            f"the {target.name} at {target.url} did not answer within "
            f"{bench.request_timeout_s:g} s; raise bench.request_timeout_s or look at its log"
        ) from None
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise EndpointError(
            f"the {target.name} at {target.url} cannot be reached: {error or type(error).__name__}"
        ) from None


async def _measure(
    client: httpx.AsyncClient,
    target: Target,
    texts: Sequence[str],
    bench: BenchSection,
    advance: Callable[[int], object],
) -> Measurement:
    measures = closed_loop.plan(texts, bench)
    async with client:
        session = Session(client, target, advance)
        measured = Measurement(target.name, await session.introduce(_largest(measures)))
        for item in measures:
            await closed_loop.run(session, item, measured)
        # From the other end, so that few texts come a second time.
        source = itertools.cycle(reversed(texts))

        async def is_met_at(rate_per_s: float) -> bool:
            return await open_loop.offer(session, measured, rate_per_s, source, bench)

        for rate_per_s in bench.rates_per_s:
            await is_met_at(rate_per_s)
        if bench.search_tries:
            # What one client alone reaches is a rate that an open loop can begin with.
            alone = [
                s.latency_ms for s in measured.samples if (s.measure, s.status) == ("single", OK)
            ]
            start = 1000 / statistics.median(alone) if alone else 1.0
            measured.max_rate_per_s = await open_loop.highest_rate(
                is_met_at, start, bench.search_tries
            )
    return measured


def _largest(measures: Sequence[Measure]) -> int:
    return max(len(texts) for item in measures for texts in item.requests)
