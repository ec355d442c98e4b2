"""Jobs in processes of their own, and what they leave, as seen from outside while they run."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import figures
import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray.config import Experiment, VLLMTeacher, load_experiment
from llkd_ray.corpus import read_shards
from llkd_ray.errors import ClusterError
from llkd_ray.lineage import Lineage

QUICKSTART = figures.JOBS / "configs/quickstart.toml"

# Starts a command that writes to the end of a log.
Run = Callable[[Sequence[str], Path], "subprocess.Popen[bytes]"]

_TIMEOUT_S = 600.0
_POLL_S = 0.5


def here(command: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    """Start a command as a child of this process."""
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output)


class Job:
    """A job on the quickstart's experiment."""

    def __init__(self, verb: str, changes: Sequence[str], log: Path, run: Run = here) -> None:
        """Say what is to run; nothing is started yet.

        Args:
            verb: jobs/VERB.py.
            changes: Overrides of the experiment.
            log: Takes what it prints.
            run: Where it is started.
        """
        self.experiment: Experiment = load_experiment(QUICKSTART, changes)
        self.lineage = Lineage(self.experiment)
        self.process: subprocess.Popen[bytes] | None = None
        """None before the start."""
        self._verb = verb
        self._changes = changes
        self._log = log
        self._run = run

    def start(self) -> None:
        """Begin the job, or begin it again."""
        self.process = self._run(self._command(self._verb), self._log)

    def before(self, verb: str) -> None:
        """Run a job that has to come before this one, to its end, on a Ray of its own.

        Raises:
            ClusterError: It failed.
        """
        process = here(self._command(verb), self._log)
        if process.wait():
            raise ClusterError(f"jobs/{verb}.py has failed:\n{self.said()}")

    def kill(self) -> None:
        """End the job's own process, without a word."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def look(self) -> None:
        """Take notice of what the job has done since the last look."""

    def wait(self, until: Callable[[], bool] | None = None) -> None:
        """Watch the job, until something is so or, when that is not given, until its end.

        Raises:
            ClusterError: It failed, ended before, or takes too long.
        """
        assert self.process is not None
        deadline = time.monotonic() + _TIMEOUT_S
        while (status := self.process.poll()) is None:
            self.look()
            if until is not None and until():
                return
            if time.monotonic() > deadline:
                raise ClusterError(f"no end in sight:\n{self.said()}")
            time.sleep(_POLL_S)
        self.look()
        if status != 0 or (until is not None and not until()):
            raise ClusterError(f"the job ended with status {status}:\n{self.said()}")

    def said(self) -> str:
        """Return the last of what it printed."""
        if not self._log.is_file():
            return ""
        return self._log.read_text(encoding="utf-8", errors="replace")[-4000:]

    def _command(self, verb: str) -> list[str]:
        return [
            sys.executable,
            str(figures.JOBS / f"{verb}.py"),
            str(QUICKSTART),
            *self._changes,
        ]


class Labelling(Job):
    """Labelling with the LLM, and its ledger."""

    def __init__(
        self, folder: Path, name: str, rows: int, run: Run = here, changes: Sequence[str] = ()
    ) -> None:
        """Say what is to be labelled; see `Job`.

        Args:
            folder: For all runs; the log stands beside it.
            name: Of this one.
            rows: To label.
            run: Where the job is started.
            changes: Further overrides.
        """
        changes = [
            f"runs={folder}",
            f"name={name}",
            'teacher.splits=["unlabeled"]',
            f"teacher.max_unlabeled_rows={rows}",
            "teacher.batch_size=8",
            "corpus.shard_rows=200",
            *changes,
        ]
        super().__init__("label", changes, folder.with_name(f"{name}.log"), run)
        teacher = self.experiment.teacher
        assert isinstance(teacher, VLLMTeacher)
        self.held_rows = teacher.batch_size * teacher.actors.batches_in_flight
        """Rows that an actor has in hand at most."""
        self.rows = rows
        self.answered = set[str]()
        self.answered_again = 0
        """Rows that were written into the ledger when they stood there already."""
        self._written: dict[Path, int] = {}

    def look(self) -> None:
        """Take notice of what was written into the ledger since the last look."""
        # Files right in the ledger are parts put together: nothing new.
        for path in self.lineage.ledger.glob("*/*.parquet"):
            with contextlib.suppress(FileNotFoundError):
                written = path.stat().st_mtime_ns
                if path.name.startswith(".") or self._written.get(path) == written:
                    continue
                ids = column(path, "row_id")
                self._written[path] = written
                self.answered_again += len(self.answered.intersection(ids))
                self.answered.update(ids)

    def labels(self) -> pa.Table:
        """Return the labels, in the order of the corpus."""
        shards = read_shards(self.lineage.labels.require().path / "unlabeled")
        columns = ["row_id", "label", "confidence"]
        return pa.concat_tables(pq.read_table(shard, columns=columns) for shard in shards)

    def lost_and_doubled(self) -> tuple[int, int]:
        """Count the rows without a label, and those with more than one, against the corpus."""
        ids = self.labels().column("row_id").to_pylist()
        shards = read_shards(self.lineage.corpus.require().path / "unlabeled")
        asked = [id_ for shard in shards for id_ in column(shard, "row_id")][: self.rows]
        return lost_and_doubled(asked, ids)


class Training(Job):
    """Training on labels that are there, and its checkpoints."""

    def __init__(
        self, folder: Path, name: str, changes: Sequence[str] = (), run: Run = here
    ) -> None:
        """Say what is to be trained; see `Job`.

        Args:
            folder: For all runs; the log stands beside it.
            name: Of this one.
            changes: Overrides, those that have made the labels among them.
            run: Where the job is started.
        """
        changes = [f"runs={folder}", f"name={name}", *changes]
        super().__init__("train", changes, folder.with_name(f"{name}.log"), run)
        self.checkpoints = 0
        """Seen so far."""

    @property
    def student(self) -> Path:
        """Folder of the student, when it is made."""
        return self.lineage.student().path

    def look(self) -> None:
        """Count the checkpoints by the last; earlier ones are removed as they age."""
        from llkd_ray.student.fit import RUN

        folders = (self.lineage.student().making / RUN).glob("epoch-*/progress.json")
        epochs = [int(path.parent.name.split("-")[1]) for path in folders]
        self.checkpoints = max([self.checkpoints, *epochs])

    def lost_and_doubled(self) -> tuple[int, int]:
        """Count labelled rows that an epoch went without, and those it had more than once."""
        from llkd_ray.student.fit import SIGNALS

        shards = read_shards(self.lineage.labelled.path / "unlabeled")
        labelled = [id_ for shard in shards for id_ in column(shard, "row_id")]
        signals = self.student / SIGNALS
        epochs = sorted({path.name.rpartition("-of-")[0][:-6] for path in signals.iterdir()})
        counts = [
            lost_and_doubled(
                labelled,
                [id_ for part in signals.glob(f"{epoch}-*") for id_ in column(part, "row_id")],
            )
            for epoch in epochs
        ]
        return sum(lost for lost, _ in counts), sum(doubled for _, doubled in counts)


def lost_and_doubled(wanted: Sequence[str], there: Sequence[str]) -> tuple[int, int]:
    """Count what is wanted and not there, and what is there more than once."""
    return len(set(wanted).difference(there)), len(there) - len(set(there))


def column(path: Path, name: str) -> list[str]:
    """Read a column of a Parquet file."""
    values: list[str] = pq.read_table(path, columns=[name]).column(name).to_pylist()
    return values
