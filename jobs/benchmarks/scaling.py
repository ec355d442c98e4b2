"""The labelling stage as arithmetic: what each of its parts takes at a size and a number of GPUs.

It follows `llkd_ray/teacher/readouts.py`: windows of `_BLOCKS` blocks between which the teachers
start anew, a part for each batch in the ledger, compacting, and after the last window sealing and
the driver's walk over all shards.
"""

import heapq
import math
from dataclasses import dataclass

from llkd_ray.teacher.readouts import _BATCHES_PER_BLOCK, _BLOCKS


@dataclass(frozen=True)
class Stage:
    """What a labelling run is made of; defaults are stated, not measured, unless they say so."""

    rows: int
    actors: int
    """Teachers, of one GPU each."""
    rows_per_s: float
    """Of one teacher that runs."""
    start_up_s: float = 180.0
    """From a window's begin to a teacher's first row: image, weights, engine."""
    batch_rows: int = 64
    """teacher.batch_size, its default."""
    shard_rows: int = 10_000
    """corpus.shard_rows, its default."""
    tasks: int = 64
    """Tasks over shards at once: `cluster._TASKS_IN_FLIGHT`."""
    entry_s: float = 0.0
    """Looking at one entry of the ledger's folder in one look-up; measured here, local disk."""
    compact_s: float = 0.0
    """Compacting one shard; measured here."""
    seal_s: float = 0.0
    """Sealing one shard, its look-up among few entries included; measured here."""
    block_kb: float = 5.0
    """Driver memory for a block of a window; stated."""


@dataclass(frozen=True)
class Times:
    """Seconds of the parts of a run, one after the other."""

    start_up_s: float
    """Waiting for teachers, over all windows."""
    ask_s: float
    """Asking, the wait for the last block of each window included."""
    compact_s: float
    seal_s: float
    windows: int
    files: int
    """Parts in the ledger at most: those of a window, before they are compacted."""
    driver_mb: float
    """Of blocks in one window."""

    @property
    def wall_s(self) -> float:
        """Seconds of the whole."""
        return self.start_up_s + self.ask_s + self.compact_s + self.seal_s

    @property
    def bottleneck(self) -> str:
        """The part that takes longest."""
        parts = {
            "asking": self.ask_s,
            "start-up": self.start_up_s,
            "compacting": self.compact_s,
            "sealing": self.seal_s,
        }
        return max(parts, key=lambda part: parts[part])


def simulate(stage: Stage) -> Times:
    """Go through the windows of a run, block by block, then through its shards."""
    left, windows, asked = stage.rows, 0, 0.0
    most = _BLOCKS * _BATCHES_PER_BLOCK * stage.batch_rows
    took: dict[int, float] = {}
    blocks = 0
    while left:
        rows = min(left, most)
        # As _ask cuts a window into blocks.
        block = math.ceil(rows / (_BLOCKS * stage.batch_rows)) * stage.batch_rows
        if rows not in took:
            took[rows] = _window_s(rows, block, stage)
        asked += took[rows]
        blocks = max(blocks, math.ceil(rows / block))
        left, windows = left - rows, windows + 1
    shards = math.ceil(stage.rows / stage.shard_rows)
    # Ledger.find looks at every entry of the ledger's folder, a file for each shard by then.
    look_up_s = shards * stage.entry_s
    return Times(
        start_up_s=windows * stage.start_up_s,
        ask_s=asked,
        compact_s=shards * stage.compact_s / stage.tasks,
        seal_s=shards * (stage.seal_s + look_up_s) / stage.tasks,
        windows=windows,
        files=math.ceil(min(stage.rows, most) / stage.batch_rows),
        driver_mb=blocks * stage.block_kb / 1e3,
    )


def _window_s(rows: int, block: int, stage: Stage) -> float:
    """Return when the last teacher is done: the one that is free first takes the next block."""
    free = [0.0] * stage.actors
    for start in range(0, rows, block):
        asked = min(block, rows - start) / stage.rows_per_s
        heapq.heappush(free, heapq.heappop(free) + asked)
    return max(free)
