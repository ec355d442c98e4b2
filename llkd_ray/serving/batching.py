"""Put the texts of several waiting requests into one call of the model.

While the model computes, requests gather; the next call takes them together. So batches grow with
the load by themselves, and a lone request does not wait for company.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Waiting:
    texts: list[str]
    since: float
    answer: asyncio.Future[Floats]


class Batcher:
    """Feed one model from many coroutines, in the order in which they came.

    The model computes in another thread, so the event loop stays free to read requests and to
    answer health checks.
    """

    def __init__(
        self,
        compute: Callable[[list[str]], Floats],
        thread: Executor,
        *,
        max_texts: int,
        wait_s: float,
    ) -> None:
        """Prepare; the first `submit` starts the work, in its event loop.

        Args:
            compute: Takes N texts and returns an array [N, C]. Called once at a time.
            thread: Where `compute` is called.
            max_texts: Requests share a call up to this many texts; one that is larger goes alone.
            wait_s: How long an idle model lets a request wait for others.
        """
        self._compute = compute
        self._max_texts = max_texts
        self._wait_s = wait_s
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._thread = thread
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, texts: list[str]) -> Floats:
        """Return the model's rows for these texts, in their order."""
        loop = asyncio.get_running_loop()
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        self.check_health()
        request = _Waiting(texts, loop.time(), loop.create_future())
        self._waiting.append(request)
        self._arrived.set()
        return await request.answer

    def check_health(self) -> None:
        """Raise if no request will ever be answered again."""
        if self._worker is not None and self._worker.done():
            raise RuntimeError("the batcher has stopped")

    async def close(self) -> None:
        """Stop; requests that still wait are cancelled."""
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
            if not requests:
                continue
            texts = [text for request in requests for text in request.texts]
            computed = loop.run_in_executor(self._thread, self._compute, texts)
            await asyncio.wait([computed])
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

    async def _gather(self) -> None:
        """Return when there is work and its oldest request has waited long enough."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        loop = asyncio.get_running_loop()
        deadline = self._waiting[0].since + self._wait_s
        while self._num_waiting() < self._max_texts and loop.time() < deadline:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), deadline - loop.time())
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        """Take whole requests from the front, at least one if there is any."""
        taken: list[_Waiting] = []
        texts = 0
        while self._waiting:
            request = self._waiting[0]
            if taken and texts + len(request.texts) > self._max_texts:
                break
            self._waiting.popleft()
            if not request.answer.cancelled():
                taken.append(request)
                texts += len(request.texts)
        return taken

    def _num_waiting(self) -> int:
        return sum(len(request.texts) for request in self._waiting)
