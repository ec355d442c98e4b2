"""Does the memory of a labelling grow with its corpus?

A small and a large corpus of made-up texts are labelled in two goes each: nine tenths of the rows,
then all of them, so that the second go finds most rows answered. The teacher is the scripted one,
which loads nothing: measured is everything around a teacher, and no label.

Measured are the driver and, of the Ray workers that read the corpus, the one that holds most: what
is resident and a process's own, at its peak. The object store is left out; its size is fixed. Ray
Data keeps about 5 KB of every block in the driver until a dataset is done; there are 8,000 at most.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray.config import load_experiment
from llkd_ray.lineage import Lineage

JOBS = Path(__file__).parents[1]
QUICKSTART = JOBS / "configs/quickstart.toml"

_FILE_ROWS = 50_000
_POLL_S = 0.1
# Ray's processes that read no corpus: its agents, what Ray Data keeps beside, and the teacher.
_NOT_READERS = (
    "ray::DashboardAgent",
    "ray::RuntimeEnvAgent",
    "ray::_",
    "ray::ActorLocationTracker",
    "ray::MapWorker",
)


@dataclass
class Peaks:
    """Highest memory seen, in MB."""

    driver_mb: float = 0.0
    reader_mb: float = 0.0

    def look(self, driver: psutil.Process) -> None:
        """Take notice of what the processes of a job hold now."""
        # A process may end while it is looked at.
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            self.driver_mb = max(self.driver_mb, _own_mb(driver))
            for process in driver.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, OSError):
                    title = "".join(process.cmdline()[:1])
                    if title.startswith("ray::") and not title.startswith(_NOT_READERS):
                        self.reader_mb = max(self.reader_mb, _own_mb(process))


def measure(small: int, large: int) -> dict[str, Any]:
    """Label both corpora and compare."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in (small, large):
            source = Path(folder) / f"texts-{rows}"
            write_texts(source, rows)
            run("prepare", arguments(folder, source, rows))
            for goal in (rows * 9 // 10, rows):
                label = arguments(folder, source, goal)
                peaks = run("label", label)
                made = Lineage(load_experiment(QUICKSTART, label)).readouts.manifest()
                asked, rate = made.details["answered_now"], made.details["rows_per_s"]
                lines.append([rows, asked, rate, peaks.driver_mb, peaks.reader_mb])
                print(f"{rows} rows: asked about {asked}", flush=True)
    print(figures.table(["rows", "asked about", "rows/s", "driver MB", "reader MB"], lines))
    # Each go against the same go over the small corpus: a resumed one has less to ask.
    pairs = list(zip(lines[:2], lines[2:], strict=True))
    return {
        "driver_growth_mb": round(max(many[3] - few[3] for few, many in pairs), 1),
        "reader_growth_mb": round(max(many[4] - few[4] for few, many in pairs), 1),
        "driver_mb": round(max(line[3] for line in lines), 1),
        "reader_mb": round(max(line[4] for line in lines), 1),
        "rows_per_s": round(lines[2][2], 1),
        "rows": large,
    }


def write_texts(folder: Path, rows: int) -> None:
    """Write distinct texts of 10 to 52 words without gold, in Parquet files."""
    folder.mkdir()
    for start in range(0, rows, _FILE_ROWS):
        numbers = range(start, min(start + _FILE_ROWS, rows))
        texts = [
            f"text {number} of many: " + "some words and " * (2 + number % 15) for number in numbers
        ]
        table = pa.table({"text": texts, "label": pa.nulls(len(texts), pa.string())})
        pq.write_table(table, folder / f"{start:09}.parquet")


def arguments(folder: str, source: Path, goal: int) -> list[str]:
    """Return the overrides that label a number of rows of a source."""
    return [
        f"runs={folder}/runs",
        f"name={source.name}",
        f"corpus.source={source}",
        "teacher.kind=scripted",
        'teacher.splits=["unlabeled"]',
        f"teacher.max_unlabeled_rows={goal}",
        "corpus.shard_rows=10000",
    ]


def run(verb: str, overrides: list[str]) -> Peaks:
    """Run a job and watch its memory."""
    peaks = Peaks()
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            [sys.executable, str(JOBS / f"{verb}.py"), str(QUICKSTART), *overrides],
            stdout=log,
            stderr=log,
        ) as job,
    ):
        driver = psutil.Process(job.pid)
        while job.poll() is None:
            peaks.look(driver)
            time.sleep(_POLL_S)
        if job.returncode != 0:
            log.seek(0)
            raise RuntimeError(log.read().decode(errors="replace")[-4000:])
    return peaks


def _own_mb(process: psutil.Process) -> float:
    """Return the resident memory that a process does not share through the object store, in MB."""
    lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
    kib = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssFile:"))]
    return sum(kib) * 1024 / 1e6


def main() -> int:
    parser = figures.parser_of(__doc__, "up to 100 thousand rows, not a million; four minutes")
    large = 100_000 if parser.parse_args().quick else 1_000_000
    return figures.run(lambda: measure(10_000, large))


if __name__ == "__main__":
    sys.exit(main())
