"""What does three times too much do to an endpoint?

One replica of an untrained student. First its capacity is found: the requests of 16 questions per
second that a few clients get who wait for their answers. Then requests come at three times that
rate for a minute, whether those before are answered or not; then, after a rest, at a third of it.

`p99_ms_accepted` is of those answered, counted from the time at which each was to be sent, and is
to stay below `target_ms`, twice the longest wait that the endpoint allows (`serve.max_queue_ms`).
`shed_share` is the share that was refused with 429 and a Retry-After; there should be no other
answers (`other`). `memory_growth_mb` is what replica and proxy hold at the end of the overload
more than in its first fifth. `recovered`: afterwards every request is answered within the target.
"""

import asyncio
import statistics
import sys
import threading
from pathlib import Path
from typing import Any

import figures
import served

from llkd_ray.config import ServeSection

TIMES_TOO_MUCH = 3
CONFIG = ServeSection(port=0, max_queue_ms=1000.0)
_TARGET_MS = 2 * CONFIG.max_queue_ms
_CLIENTS = 6
_REST_S = 3.0


class MemoryWatch:
    """Write down what replicas and proxies hold, every second of the block."""

    def __init__(self) -> None:
        self.seen_mb: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            self.seen_mb.append(served.memory_mb())

    @property
    def growth_mb(self) -> float:
        """The last fifth's median less the first's."""
        fifth = max(1, len(self.seen_mb) // 5)
        return statistics.median(self.seen_mb[-fifth:]) - statistics.median(self.seen_mb[:fifth])


async def measure(url: str, *, quick: bool) -> dict[str, Any]:
    """Find the capacity, go past it, and come back."""
    load = served.Load(url)
    await load.rate(_CLIENTS, 3.0)  # Warms up.
    capacity = await load.rate(_CLIENTS, 6.0 if quick else 15.0)
    with MemoryWatch() as memory:
        over = await load.offer(TIMES_TOO_MUCH * capacity, 15.0 if quick else 60.0)
    await asyncio.sleep(_REST_S)
    after = await load.offer(capacity / 3, 6.0 if quick else 15.0)
    shed = [answer for answer in over if answer.status == served.TOO_MANY and answer.told_when]
    accepted = [answer for answer in over if answer.status == served.OK]
    p99_ms, p99_after_ms = served.percentile(over, 99), served.percentile(after, 99)
    slowest_after_ms = served.percentile(after, 100)
    rows = [
        [name, *numbers, served.statuses(answers)]
        for name, numbers, answers in (
            (
                f"{TIMES_TOO_MUCH} x capacity",
                [TIMES_TOO_MUCH * capacity, served.percentile(over, 50), p99_ms],
                over,
            ),
            ("afterwards", [capacity / 3, served.percentile(after, 50), p99_after_ms], after),
        )
    ]
    print(f"capacity: {capacity:.1f} requests of {served.TEXTS} texts per second")
    print(figures.table(["load", "requests/s", "p50 ms", "p99 ms", "answers"], rows), flush=True)
    return {
        "p99_ms_accepted": p99_ms,
        "target_ms": _TARGET_MS,
        "shed_share": round(len(shed) / len(over), 3),
        "other": len(over) - len(shed) - len(accepted),
        "memory_growth_mb": round(memory.growth_mb, 1),
        "recovered": all(answer.status == served.OK for answer in after)
        and slowest_after_ms is not None
        and slowest_after_ms <= _TARGET_MS,
        "capacity_requests_per_s": round(capacity, 1),
        "accepted_requests_per_s": round(len(accepted) / over[-1].at_s, 1),
    }


def benchmark(student: Path | None, *, quick: bool) -> dict[str, Any]:
    """Serve a student and overload it."""
    with served.student_in(student) as folder, served.endpoint(folder, CONFIG) as url:
        return asyncio.run(measure(url, quick=quick))


def main() -> int:
    parser = served.parser_of(__doc__, "15 s of overload instead of a minute")
    arguments = parser.parse_args()
    return figures.run(lambda: benchmark(arguments.student, quick=arguments.quick))


if __name__ == "__main__":
    sys.exit(main())
