"""What a labelling run has done so far: counted from its batches, shown while it runs."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llkd_ray.config import HTTPTeacher, VLLMTeacher
from llkd_ray.progress import progress
from llkd_ray.teacher.actor import Opening

_LABELS_SHOWN = 3


class Tally:
    """Rows, tokens, cost and labels of one call, over all its attempts."""

    def __init__(self, opening: Opening, taken: int) -> None:
        self.rows = self.rejected = 0
        self.prompt_tokens = self.cached_tokens = 0
        self.labels: npt.NDArray[np.int64] = np.zeros(len(opening.task.labels), dtype=np.int64)
        self._opening = opening
        self._taken = taken
        self._alive_s: dict[str, float] = {}
        # The first batch ends the start-up of the engine; rates are of what comes after it.
        self._first: tuple[float, int, int] | None = None
        self._last_s = 0.0
        self._bar: Any = None

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that did not come from the cache."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def actors(self) -> int:
        """Teachers that have answered so far."""
        return len(self._alive_s)

    @property
    def rows_per_s(self) -> float:
        """Rows per second since the first batch."""
        return self._rate(self.rows, 1)

    @property
    def tokens_per_s(self) -> float:
        """Uncached prompt tokens per second since the first batch."""
        return self._rate(self.computed_tokens, 2)

    @property
    def cost_usd(self) -> float:
        """Price of the actors' time, or of the tokens sent to an endpoint."""
        match self._opening.teacher:
            case VLLMTeacher(usd_per_actor_hour=price):
                return sum(self._alive_s.values()) / 3600 * price
            case HTTPTeacher() as teacher:
                # One token answers a row where there are log-probabilities, and a few for each
                # vote where there are none.
                per_row = 1 if teacher.top_logprobs else teacher.votes
                spent = (
                    self.prompt_tokens * teacher.usd_per_million_input_tokens
                    + self.rows * per_row * teacher.usd_per_million_output_tokens
                )
                return spent / 1e6
            case _:
                return 0.0

    @contextlib.contextmanager
    def shown(self, to_ask: int) -> Iterator[None]:
        """Show progress for the length of an attempt at a number of rows."""
        total = max(self._taken, to_ask)
        with progress("label", "rows", total, total - to_ask) as self._bar:
            yield

    def add(self, batch: pa.Table) -> None:
        """Count batches, as `actor.count` describes them."""
        now = time.perf_counter()
        rows = sum(batch.column("rows").to_pylist())
        self.rows += rows
        self.rejected += sum(batch.column("rejected").to_pylist())
        self.prompt_tokens += sum(batch.column("prompt_tokens").to_pylist())
        self.cached_tokens += sum(batch.column("cached_tokens").to_pylist())
        for labels in batch.column("labels").to_pylist():
            self.labels += np.array(labels)
        for actor, alive_s in zip(
            batch.column("actor").to_pylist(), batch.column("alive_s").to_pylist(), strict=True
        ):
            self._alive_s[actor] = max(alive_s, self._alive_s.get(actor, 0.0))
        if self._first is None:
            self._first = (now, self.rows, self.computed_tokens)
        self._last_s = now
        self._bar.set_postfix_str(self._figures(), refresh=False)
        self._bar.update(rows)

    def _rate(self, count: int, which: int) -> float:
        if self._first is None or self._last_s <= self._first[0]:
            return 0.0
        return (count - self._first[which]) / (self._last_s - self._first[0])

    def _figures(self) -> str:
        figures = [f"{self.computed_tokens} tokens computed, {self.cached_tokens} cached"]
        if self.cost_usd:
            figures.append(f"{self.cost_usd:.4f} USD")
        figures.append(f"{self.rejected} rejected")
        total = max(1, int(self.labels.sum()))
        names = self._opening.task.label_names
        often = np.argsort(-self.labels, kind="stable")[:_LABELS_SHOWN]
        figures.append(", ".join(f"{names[at]} {self.labels[at] / total:.0%}" for at in often))
        return "; ".join(figures)
