"""What jobs did to a run: `journal.jsonl`, an object a line, for people and log collectors alike.

Each line has `time` (UTC), `run`, `stage`, `job` (the same for all lines of one call), `host`,
`pid`, `event` (`started`, `log`, `done`, `failed`, `interrupted`) and, by event, `overrides`,
`level` and `message`, `seconds`, `error`. A job that was killed has no last line.
"""

import contextlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llkd_ray.errors import ArtifactError, LLKDError

FILE = "journal.jsonl"


class Journal(logging.Handler):
    """Appends to the journal of a run; what our own loggers say goes there, too."""

    def __init__(self, run: Path, stage: str) -> None:
        super().__init__(logging.INFO)
        self._file = run / FILE
        self._always = {
            "run": run.name,
            "stage": stage,
            "job": uuid.uuid4().hex[:12],
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    def emit(self, record: logging.LogRecord) -> None:
        """Write what a logger said."""
        self.write("log", level=record.levelname, message=record.getMessage())

    def write(self, event: str, **details: Any) -> None:
        """Append a line, whole, whoever else appends at the same time."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, **self._always, "event": event, **details})
        with self._file.open("ab", buffering=0) as file:
            file.write(line.encode() + b"\n")


@contextlib.contextmanager
def recorded(run: Path, stage: str, overrides: list[str]) -> Iterator[None]:
    """Record a job: that it started, what it logs, how it ended.

    Raises:
        ArtifactError: The run's folder cannot be written.
    """
    journal = Journal(run, stage)
    try:
        run.mkdir(parents=True, exist_ok=True)
        journal.write("started", overrides=overrides)
    except OSError as error:
        raise ArtifactError(
            f"{run}: a run cannot be kept there ({error}); set runs=FOLDER to one that can be "
            "written"
        ) from error
    ours = logging.getLogger("llkd_ray")
    ours.addHandler(journal)
    started = time.perf_counter()

    def end(event: str, **details: Any) -> None:
        journal.write(event, seconds=round(time.perf_counter() - started, 3), **details)

    try:
        yield
    except KeyboardInterrupt:
        end("interrupted")
        raise
    except BaseException as error:
        # Ours are written for people; of others the kind is the better half.
        end("failed", error=str(error) if isinstance(error, LLKDError) else repr(error))
        raise
    else:
        end("done")
    finally:
        ours.removeHandler(journal)


def last_of_each_stage(run: Path) -> dict[str, dict[str, Any]]:
    """Return the last line of each stage but for `log`, by stage; lines cut off are passed over."""
    last: dict[str, dict[str, Any]] = {}
    file = run / FILE
    if not file.is_file():
        return last
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if entry["event"] != "log":
                    last[entry["stage"]] = entry
    return last
