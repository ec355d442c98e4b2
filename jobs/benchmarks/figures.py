"""How a benchmark speaks: a table for people, then one last line of JSON with its figures."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llkd_ray.bench.machine import this_machine
from llkd_ray.errors import LLKDError

JOBS = Path(__file__).parents[1]


def parser_of(summary: str | None, quick: str) -> argparse.ArgumentParser:
    """Return a parser with `--quick`.

    Args:
        summary: What the benchmark measures, for `--help`.
        quick: What `--quick` leaves out.
    """
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lay rows out in columns; numbers with three digits after the point."""
    cells = [[_cell(value) for value in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def job(verb: str, experiment: Path, overrides: Sequence[str]) -> None:
    """Run a job of the project, as a user would.

    Raises:
        LLKDError: It has failed; it has said why.
    """
    command = [sys.executable, str(JOBS / f"{verb}.py"), str(experiment), *overrides]
    if subprocess.run(command, check=False).returncode:
        raise LLKDError(f"jobs/{verb}.py has failed for {experiment.stem}")


def run(benchmark: Callable[[], dict[str, Any]]) -> int:
    """Run a benchmark and print its figures as the last line; return the exit status."""
    machine = this_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB", flush=True)
    try:
        figures = benchmark()
    except LLKDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures))
    return 0
