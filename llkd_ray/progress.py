"""Show progress: a bar on a terminal, a line now and then elsewhere."""

import sys
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0
_LINE = (
    "{desc}: {n_fmt} of {total_fmt}{unit} ({percentage:.0f}%), {rate_noinv_fmt}, "
    "{elapsed} passed, {remaining} to go{postfix}"
)


class _Lines:
    """A stream that turns each redrawn bar into a line of its own."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(name: str, unit: str, total: int | None = None, done: int = 0) -> Any:
    """Return a tqdm bar for a long piece of work.

    Args:
        name: What is being done, for instance `label`.
        unit: What is counted, in the plural.
        total: How many there are, if known.
        done: How many an earlier run had done; they do not count for the rate.
    """
    settings = {"desc": name, "unit": f" {unit}", "total": total, "initial": done}
    if sys.stderr.isatty():
        return tqdm(**settings)
    return tqdm(
        **settings,
        file=_Lines(),
        mininterval=_SECONDS_BETWEEN_LINES,
        bar_format=_LINE if total else None,
    )
