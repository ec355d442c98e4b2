"""What do crashes cost? A labelling is killed again and again, and compared with an unbroken one.

Processes and language model are real, and every kill is a SIGKILL:

- `engine`: vLLM's own process. The actor starts another;
- `actor`: the Ray actor that holds the teacher. Ray starts another;
- `driver`: the job. It is run again;
- `cluster`: the job, Ray's scheduler and its store, all at once. The job is run again.

`lost` and `duplicates` are counted from the labels against the corpus. A kill costs at most the
rows that the actor held (batches_in_flight * batch_size, or what was left), and the rows that the
ledger was then seen to be given a second time; `relabelled_most` is the sum for the worst kill.
`orphans` are processes of either run that still live when both are over.
"""

import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import figures
import psutil
import pyarrow as pa
import pyarrow.compute as pc
from hosts import lives
from watched import Labelling

from llkd_ray.teacher.answers import CONTENT_FREE

_TITLES = {
    "engine": ("VLLM::EngineCore",),
    "actor": ("ray::MapWorker(MapBatches(TeacherActor))",),
    "cluster": ("raylet", "gcs_server"),
}
_GRACE_S = 90.0
# They take a minute to notice that their raylet was killed, and hold nothing that is missed.
_RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
_POLL_S = 0.5


@dataclass(frozen=True)
class Kill:
    """What is killed, and when."""

    victim: str
    after_rows: int
    """Rows answered since the kill before; 0: while the engine is loading."""

    @property
    def ends_job(self) -> bool:
        """Whether the job has to be run again."""
        return self.victim in ("driver", "cluster")


QUICK = (Kill("engine", 50), Kill("actor", 50), Kill("driver", 50))
FULL = (
    Kill("engine", 40),
    Kill("engine", 100),
    Kill("actor", 0),
    Kill("actor", 60),
    Kill("driver", 0),
    Kill("driver", 80),
    Kill("cluster", 40),
    Kill("actor", 100),
)


class Killed(Labelling):
    """A labelling on a private Ray, whose processes are children of the job."""

    def __init__(self, folder: Path, name: str, rows: int) -> None:
        super().__init__(folder, name, rows)
        self.started = set[psutil.Process]()
        """Every process of the job, ended ones too."""

    def look(self) -> None:
        """Take notice of answers and processes."""
        super().look()
        self.started.update(self._processes())

    def wait_for(self, answered: int) -> None:
        """Wait until the ledger holds so many rows; for 0, until an engine is loading."""
        self.wait(lambda: len(self.answered) >= answered if answered else self._loading())

    def strike(self, victim: str) -> list[psutil.Process]:
        """Kill, and return the processes that are to end with that; Ray's agents are left out."""
        assert self.process is not None
        driver = psutil.Process(self.process.pid)
        victims = [driver] if victim == "driver" else self._of_kind(victim)
        if not victims:
            raise RuntimeError(f"there is no {victim} to kill:\n{self.said()}")
        if victim == "cluster":
            victims.append(driver)
        ending = {p for each in victims for p in (each, *each.children(recursive=True))}
        self.started |= ending
        ending = {process for process in ending if not _title(process).startswith(_RAY_AGENTS)}
        for process in victims:
            process.send_signal(signal.SIGKILL)
        if driver in victims:
            self.process.wait()
        return list(ending)

    def end(self) -> None:
        """Kill whatever is left of the job."""
        for process in self.started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _loading(self) -> bool:
        return bool(self._of_kind("engine"))

    def _of_kind(self, kind: str) -> list[psutil.Process]:
        """Find the job's processes of a kind by their titles."""
        return [p for p in self._processes() if _title(p).startswith(_TITLES[kind])]

    def _processes(self) -> list[psutil.Process]:
        assert self.process is not None
        try:
            driver = psutil.Process(self.process.pid)
            return [driver, *driver.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def measure(kills: Sequence[Kill], rows: int) -> dict[str, Any]:
    """Label twice, once in peace, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        unbroken, killed = (
            Killed(Path(folder, "runs"), name, rows) for name in ("unbroken", "killed")
        )
        try:
            unbroken.before("prepare")
            unbroken.start()
            unbroken.wait()
            print(f"unbroken: {rows} rows labelled", flush=True)
            killed.before("prepare")
            costs = _label_with_kills(killed, kills)
            orphans, _ = _outliving(unbroken.started | killed.started)
            lost, duplicates = killed.lost_and_doubled()
            changes = _compare(unbroken.labels(), killed.labels())
        finally:
            for labelling in (unbroken, killed):
                labelling.end()
    header = ["killed", "rows answered", "held at most", "answered again", "ended s"]
    print(
        figures.table(
            header, [[kill.victim, *astuple(cost)] for kill, cost in zip(kills, costs, strict=True)]
        )
    )
    return {
        "kills": len(kills),
        "duplicates": duplicates,
        "lost": lost,
        **changes,
        "relabelled_most": max(cost.held + cost.again for cost in costs),
        "answered_again": killed.answered_again,
        "orphans": orphans,
        "ended_s_most": round(max(cost.ended_s for cost in costs), 1),
        "rows": rows,
    }


@dataclass
class Cost:
    """What a kill cost."""

    answered: int
    """Rows in the ledger when all that was killed had ended."""
    held: int
    """Rows that the teacher may have been asked about without an answer in the ledger."""
    again: int
    """Rows that were given to the ledger again, after this kill and before the next."""
    ended_s: float
    """Seconds until all had ended that belonged to what was killed, Ray's agents aside."""


def _label_with_kills(labelling: Killed, kills: Sequence[Kill]) -> list[Cost]:
    costs: list[Cost] = []
    again = 0
    labelling.start()
    for kill in kills:
        goal = len(labelling.answered) + kill.after_rows if kill.after_rows else 0
        labelling.wait_for(goal)
        if costs:
            costs[-1].again = labelling.answered_again - again
        _, seconds = _outliving(labelling.strike(kill.victim))
        labelling.look()
        again = labelling.answered_again
        answered = len(labelling.answered)
        held = min(labelling.held_rows, labelling.rows + len(CONTENT_FREE) - answered)
        costs.append(Cost(answered, held, 0, seconds))
        print(f"killed: {kill.victim}, {answered} rows answered", flush=True)
        if kill.ends_job:
            labelling.start()
    labelling.wait()
    costs[-1].again = labelling.answered_again - again
    return costs


def _compare(unbroken: pa.Table, killed: pa.Table) -> dict[str, Any]:
    """Hold the labels of the killed run against those of the unbroken run."""
    where = pc.index_in(unbroken.column("row_id"), value_set=killed.column("row_id"))
    same = killed.take(where.drop_null())
    other = unbroken.filter(pc.is_valid(where))
    changed = pc.not_equal(same.column("label"), other.column("label"))
    difference = pc.abs(pc.subtract(same.column("confidence"), other.column("confidence")))
    return {
        "labels_changed": pc.sum(changed).as_py(),
        "confidence_change_most": pc.max(difference).as_py(),
    }


def _outliving(processes: Iterable[psutil.Process]) -> tuple[int, float]:
    """Wait for processes to end; return how many did not, and the seconds until the last did."""
    started = time.monotonic()
    while left := [process for process in processes if lives(process)]:
        if time.monotonic() - started > _GRACE_S:
            break
        time.sleep(_POLL_S)
    return len(left), time.monotonic() - started


def _title(process: psutil.Process) -> str:
    """Return what a process calls itself, or its program's name; empty when it has ended."""
    try:
        title = "".join(process.cmdline()[:1])
    except psutil.NoSuchProcess:
        return ""
    return title if "::" in title else Path(title).name


def main() -> int:
    parser = figures.parser_of(__doc__, "three kills on fewer rows, within four minutes")
    kills, rows = (QUICK, 240) if parser.parse_args().quick else (FULL, 640)
    return figures.run(lambda: measure(kills, rows))


if __name__ == "__main__":
    sys.exit(main())
