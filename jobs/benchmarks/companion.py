"""A process beside a benchmark, which measures one thing by itself whenever it is asked."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

_MARK = "companion:"  # Whatever else the process prints is not for us.


class Companion:
    """The other process, from the benchmark's side."""

    def __init__(self, command: list[str], work: Any, environment: Mapping[str, str]) -> None:
        """Start it and wait until it is ready.

        Args:
            command: A Python file and its arguments; it calls `answer`.
            work: What it is to measure, as JSON.
            environment: Variables beside those of this process.
        """
        self._command = command
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.ask(json.dumps(work))

    def ask(self, question: str) -> float:
        """Return the answer to a line.

        Raises:
            RuntimeError: The process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(_MARK):
                return float(line.removeprefix(_MARK))
        raise RuntimeError(f"{' '.join(self._command)} ended before it answered")

    def close(self) -> None:
        """End the process, and what it has started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def answer(open_work: Callable[[Any], Callable[[str], float]]) -> None:
    """Be the other process: get ready for the work, then answer line by line.

    Args:
        open_work: Takes the work and returns what answers a question.
    """
    reply = open_work(json.loads(sys.stdin.readline()))
    print(f"{_MARK} 0", flush=True)
    for line in sys.stdin:
        print(f"{_MARK} {reply(line.strip())}", flush=True)
