"""What does choosing among ten million rows cost: seconds, bytes between workers, memory?

Two workers, each with half of the rows, move thresholds and mask their rows, as before an epoch.
Their signals are drawn at random, for six classes; the sums go through gloo as in a training job.

Bytes sent are those of the arrays that a worker gave to be summed. Beside them stands what the
loopback device counted meanwhile, which is everything that any process of this machine sent to
another. Memory is a worker's own: resident at its peak, and what of it was not there before the
choice, when the signals alone were.
"""

import multiprocessing
import statistics
import sys
import tempfile
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import figures
import psutil

from llkd_ray.config import LLKDRule, TopFractionRule
from llkd_ray.selection import (
    NONE,
    AllReduce,
    Floats,
    Probabilities,
    Selection,
    SelectionState,
    Signals,
    select,
)

WORKERS, CLASSES = 2, 6
RULES = (LLKDRule(), TopFractionRule())

_DRAWN_ROWS = 100_000
_STATUS = Path("/proc/self/status")


def measure(rows: int, rounds: int) -> dict[str, Any]:
    """Let the workers choose by each rule and return what it cost."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        ends = [spawn.Pipe(duplex=False) for _ in range(WORKERS)]
        workers = [
            spawn.Process(target=work, args=(rank, meeting, rows // WORKERS, rounds, end))
            for rank, (_, end) in enumerate(ends)
        ]
        for worker, (_, end) in zip(workers, ends, strict=True):
            worker.start()
            end.close()
        try:
            found = [ours.recv() for ours, _ in ends]
        finally:
            for worker in workers:
                worker.join()
    signals_mb = max(of["signals_mb"] for of in found)
    figures_of: dict[str, dict[str, Any]] = {}
    for rule in RULES:
        each = [of[rule.rule] for of in found]
        figures_of[rule.rule] = {
            "seconds": round(max(of["seconds"] for of in each), 3),
            "bytes_sent": max(of["bytes_sent"] for of in each),
            "loopback_bytes": max(of["loopback_bytes"] for of in each),
            "peak_mb": round(max(of["peak_mb"] for of in each), 1),
            "peak_above_signals_mb": round(max(of["above_mb"] for of in each), 1),
            "kept": sum(of["kept"] for of in each),
        }
    header = list(next(iter(figures_of.values())))
    lines = [[name, *of.values()] for name, of in figures_of.items()]
    print(figures.table(["", *header], lines))
    return {
        "rows": rows,
        **figures_of[RULES[0].rule],
        "signals_mb": round(signals_mb, 1),
        "workers": WORKERS,
        "classes": CLASSES,
        **{
            f"{rule.rule.replace('-', '_')}_{key}": value
            for rule in RULES[1:]
            for key, value in figures_of[rule.rule].items()
        },
    }


def work(rank: int, meeting: str, rows: int, rounds: int, end: Connection) -> None:
    """Be a worker: draw signals, choose by each rule, tell what it cost."""
    import torch

    from llkd_ray.student.worker import sum_over_workers

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORKERS)
    signals = drawn(rank, rows)
    held: list[Any] = [signals.keys, signals.label, signals.gold, signals.teacher, signals.student]
    result: dict[str, Any] = {
        "signals_mb": sum(values.nbytes for values in held if values is not None) / 1e6
    }
    for rule in RULES:
        state, sums = SelectionState(), Counted(sum_over_workers())
        select(rule, state, replace(signals), seed=0, epoch=1, all_reduce=sums)
        seconds = []
        torch.distributed.barrier()
        before_mb, loopback = _reset_peak_mb(), _loopback_bytes()
        sums.bytes = 0
        for number in range(rounds):
            torch.distributed.barrier()
            started = perf_counter()
            chosen: Selection = select(
                rule, state, replace(signals), seed=0, epoch=number + 1, all_reduce=sums
            )
            seconds.append(perf_counter() - started)
            state, kept = chosen.state, int(chosen.keep.sum())
            del chosen
        result[rule.rule] = {
            "seconds": statistics.median(seconds),
            "bytes_sent": sums.bytes // rounds,
            "loopback_bytes": (_loopback_bytes() - loopback) // rounds,
            "peak_mb": _memory_mb("VmHWM"),
            "above_mb": _memory_mb("VmHWM") - before_mb,
            "kept": kept,
        }
    end.send(result)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class Counted:
    """A sum over the workers that counts the bytes it is given."""

    def __init__(self, all_reduce: AllReduce) -> None:
        self._all_reduce = all_reduce
        self.bytes = 0

    def __call__(self, values: Floats) -> Floats:
        """Sum over the workers."""
        self.bytes += values.nbytes
        return self._all_reduce(values)


def drawn(rank: int, rows: int) -> Signals:
    """Draw one worker's signals, a few rows at a time so that only they take memory."""
    import numpy as np

    random = np.random.default_rng(rank)

    def distributions() -> Probabilities:
        found = np.empty((rows, CLASSES), dtype=np.float32)
        for start in range(0, rows, _DRAWN_ROWS):
            part = found[start : start + _DRAWN_ROWS]
            random.standard_exponential(out=part, dtype=np.float32)
            part **= 2
            part /= part.sum(axis=1, keepdims=True)
        return found

    teacher = distributions()
    label = np.empty(rows, dtype=np.int64)
    for start in range(0, rows, _DRAWN_ROWS):
        part = slice(start, start + _DRAWN_ROWS)
        label[part] = teacher[part].argmax(axis=1)
    return Signals(
        keys=random.integers(0, 2**63, rows, dtype=np.uint64),
        label=label,
        gold=np.full(rows, NONE, dtype=np.int64),
        teacher=teacher,
        student=distributions(),
    )


def _reset_peak_mb() -> float:
    """Let the peak begin anew and return what is resident now, in MB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _memory_mb("VmRSS")


def _memory_mb(name: str) -> float:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    return kib * 1024 / 1e6


def _loopback_bytes() -> int:
    counters = psutil.net_io_counters(pernic=True)
    return int(counters["lo"].bytes_sent) if "lo" in counters else 0


def main() -> int:
    parser = figures.parser_of(__doc__, "one million rows instead of ten")
    rows, rounds = (1_000_000, 3) if parser.parse_args().quick else (10_000_000, 3)
    return figures.run(lambda: measure(rows, rounds))


if __name__ == "__main__":
    sys.exit(main())
