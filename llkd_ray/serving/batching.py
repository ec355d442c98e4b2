"""Put the texts of several waiting requests into one call of the model, and refuse in time.

While the model computes, requests gather; the next call takes them together. So batches grow with
the load by themselves, and a lone request does not wait for company. How long a request would have
to wait is known beforehand, from the tokens in front of it and what calls have taken; one that
would wait too long is refused at once, when asking elsewhere still helps.
"""

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llkd_ray.serving.protocol import Refusal

Floats = npt.NDArray[np.float64]

# Of the last call in the average over calls.
_NEWEST_SHARE = 0.3


@dataclass(frozen=True)
class Pace:
    """How long calls take on a machine that has nothing else to do."""

    call_s: float
    """Seconds of a call, however small it is."""
    token_s: float
    """Seconds that each estimated token adds."""

    def seconds(self, calls: int, tokens: int) -> float:
        """Return how long calls with so many tokens together take."""
        return calls * self.call_s + tokens * self.token_s


@dataclass(frozen=True)
class Call:
    """One call of the model."""

    requests: int
    texts: int
    tokens: int
    """Estimated."""
    seconds: float
    waiting: int
    """Tokens that wait for the next calls, estimated."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    texts: list[str]
    tokens: int
    since: float
    answer: asyncio.Future[Floats]


class Batcher:
    """Feed one model from many coroutines, in the order in which they came.

    The model computes in another thread, so the event loop stays free to read requests and to
    answer health checks. A request whose coroutine is cancelled while it waits, as Serve does past
    a deadline or when the client has left, is not computed.
    """

    def __init__(
        self,
        compute: Callable[[list[str]], Floats],
        thread: Executor,
        *,
        tokens: Callable[[str], int],
        max_tokens: int,
        gather_s: float,
        max_wait_s: float,
        pace: Pace,
        observe: Callable[[Call], None] | None = None,
    ) -> None:
        """Prepare; the first `submit` starts the work, in its event loop.

        Args:
            compute: Takes N texts and returns an array [N, C]. Called once at a time.
            thread: Where `compute` is called.
            tokens: Estimates the tokens of a text, quickly.
            max_tokens: Requests share a call up to so many estimated tokens; one that is larger
                goes alone.
            gather_s: How long an idle model lets a request wait for others.
            max_wait_s: A request that would wait for longer is refused.
            pace: How long calls take; corrected by how long they are seen to take.
            observe: Told of each call.
        """
        self._compute = compute
        self._tokens = tokens
        self._max_tokens = max_tokens
        self._gather_s = gather_s
        self._max_wait_s = max_wait_s
        self._pace = pace
        self._slowness = 1.0
        self._observe = observe
        self._waiting: deque[_Waiting] = deque()
        self._waiting_tokens = 0
        self._computing_tokens = 0
        self._arrived = asyncio.Event()
        self._thread = thread
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, texts: list[str]) -> Floats:
        """Return the model's rows for these texts, in their order.

        Raises:
            Refusal: 429, they would wait for too long.
        """
        loop = asyncio.get_running_loop()
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        self.check_health()
        tokens_before = self._waiting_tokens + self._computing_tokens
        calls_before = math.ceil(tokens_before / self._max_tokens)
        wait_s = self._slowness * self._pace.seconds(calls_before, tokens_before)
        if wait_s > self._max_wait_s:
            raise Refusal(
                429,
                f"too many texts are waiting: yours would be read in {wait_s:.1f} s; ask later",
                {"Retry-After": str(math.ceil(wait_s))},
            )
        tokens = sum(map(self._tokens, texts))
        request = _Waiting(texts, tokens, loop.time(), loop.create_future())
        self._waiting.append(request)
        self._waiting_tokens += tokens
        self._arrived.set()
        try:
            return await request.answer
        except asyncio.CancelledError:
            with contextlib.suppress(ValueError):  # It is computed already.
                self._waiting.remove(request)
                self._waiting_tokens -= tokens
            raise

    def check_health(self) -> None:
        """Raise if no request will ever be answered again."""
        if self._worker is not None and self._worker.done():
            raise RuntimeError("the batcher has stopped")

    async def close(self) -> None:
        """Stop; requests that are not answered are cancelled."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait([self._worker])
        for request in self._waiting:
            request.answer.cancel()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._gather()
            requests = self._take()
            texts = [text for request in requests for text in request.texts]
            self._computing_tokens = sum(request.tokens for request in requests)
            began = loop.time()
            computed = loop.run_in_executor(self._thread, self._compute, texts)
            try:
                await asyncio.wait([computed])
            except asyncio.CancelledError:
                for request in requests:
                    request.answer.cancel()
                raise
            error = computed.exception()
            start = 0
            for request in requests:
                end = start + len(request.texts)
                if not request.answer.done():  # Its client may have left meanwhile.
                    if error is not None:
                        request.answer.set_exception(error)
                    else:
                        request.answer.set_result(computed.result()[start:end])
                start = end
            tokens, self._computing_tokens = self._computing_tokens, 0
            call = Call(
                requests=len(requests),
                texts=len(texts),
                tokens=tokens,
                seconds=loop.time() - began,
                waiting=self._waiting_tokens,
            )
            slowness = call.seconds / self._pace.seconds(1, tokens)
            self._slowness += _NEWEST_SHARE * (slowness - self._slowness)
            if self._observe is not None:
                self._observe(call)

    async def _gather(self) -> None:
        """Return when there is work and its oldest request has waited long enough."""
        loop = asyncio.get_running_loop()
        while True:
            self._arrived.clear()
            wait_s = None
            if self._waiting:
                wait_s = self._waiting[0].since + self._gather_s - loop.time()
                if wait_s <= 0 or self._waiting_tokens >= self._max_tokens:
                    return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), wait_s)

    def _take(self) -> list[_Waiting]:
        """Take whole requests from the front, at least one."""
        taken: list[_Waiting] = []
        tokens = 0
        while self._waiting and (not taken or tokens + self._waiting[0].tokens <= self._max_tokens):
            request = self._waiting.popleft()
            taken.append(request)
            tokens += request.tokens
        self._waiting_tokens -= tokens
        return taken
