"""The one grammar of all jobs: EXPERIMENT.toml [section.key=value ...] [@FILE ...] [--dry-run]."""

import argparse
import errno
import io
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llkd_ray import storage
from llkd_ray.config import Experiment, as_tree, load_experiment
from llkd_ray.errors import LLKDError
from llkd_ray.journal import recorded


def run_job(
    summary: str,
    job: Callable[[Experiment], None],
    *,
    dry_run: Callable[[Experiment], None] | None = None,
    status: Callable[[Experiment], None] | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Read the experiment and run a job on it; the run's journal tells that it ran.

    Args:
        summary: What the job does, for `--help`.
        job: Does the work. Its heavy imports belong inside it: a typo in the experiment is
            answered before anything is imported.
        dry_run: Prints what the job would do, after the resolved experiment.
        status: Prints how far the job is; gives it a `--status`.
        argv: Arguments, those of the process when not given.

    Returns:
        The exit status: 0 done, 1 an `LLKDError` (one line on standard error), 130 interrupted.
    """
    parser = parser_of(summary)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved experiment and stop",
    )
    if status is not None:
        parser.add_argument("--status", action="store_true", help="print how far it is and stop")
    arguments = parser.parse_intermixed_args(argv)

    def act(experiment: Experiment) -> None:
        if status is not None and arguments.status:
            status(experiment)
        elif arguments.dry_run:
            print(json.dumps(as_tree(experiment), indent=2, ensure_ascii=False))
            if dry_run is not None:
                dry_run(experiment)
        else:
            run = storage.folder_of(experiment.runs, experiment.cache) / experiment.name
            with recorded(run, Path(sys.argv[0]).stem, arguments.overrides):
                storage.check(run)
                job(experiment)

    return answer(arguments, act)


class _Parser(argparse.ArgumentParser):
    """Takes further arguments from a file, one a line."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Return what a line of such a file says: nothing if it is blank or a comment."""
        line = arg_line.strip()
        return [line] if line and not line.startswith("#") else []


def parser_of(summary: str) -> argparse.ArgumentParser:
    """Return the parser of what all jobs understand.

    Args:
        summary: What the job does, for `--help`.
    """
    parser = _Parser(description=summary, fromfile_prefix_chars="@")
    parser.add_argument("experiment", metavar="EXPERIMENT.toml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="replaces a key of the experiment, e.g. train.epochs=2; @FILE stands for the lines of "
        "a file, each with one, # before a comment",
    )
    return parser


def show_log() -> None:
    """Show what the project's log says was done, and what others' say is wrong, on stderr."""
    # Ray and vLLM log through the root logger too.
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("llkd_ray").setLevel(logging.INFO)


def answer(arguments: argparse.Namespace, act: Callable[[Experiment], None]) -> int:
    """Act on the experiment that the arguments name, and say in one line what went wrong.

    Returns:
        The exit status, as of `run_job`.
    """
    # What a stage has written shows at once and in order, in a log file too.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    show_log()
    try:
        act(load_experiment(arguments.experiment, arguments.overrides))
    except LLKDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # Any write of any stage may be the one that there is no room for; none leaves a part that
        # counts, so the remedy is the same for all. A Ray task's error holds the disk's as `cause`.
        if getattr(error, "cause", error).errno != errno.ENOSPC:
            raise
        print(
            "error: no space is left on the disk; make room (python jobs/clean.py lists what other "
            "settings have left in the run) and run the same command again to go on",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0
