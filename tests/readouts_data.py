"""A corpus and read-outs made by hand, to be labelled without a teacher and without Ray."""

import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray import schema
from llkd_ray.config import CalibrationSection
from llkd_ray.corpus import read_shards
from llkd_ray.teacher.label import Labelled, label

NAMES = ("cat", "dog", "fish")
Row = dict[str, Any]


def write(rows: list[Row], path: Path, columns: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    counted = {"prompt_tokens": 9, "cached_tokens": 3, "cut_tokens": 0}
    pq.write_table(pa.Table.from_pylist([{**counted, **row} for row in rows], columns), path)


class Made:
    """A corpus and its read-outs, in shards of 40 rows."""

    def __init__(self, folder: Path) -> None:
        self.corpus, self.readouts, self.labels = (
            folder / name for name in ("corpus", "readouts", "labels")
        )
        self.readouts.mkdir(parents=True)
        self.rows: dict[str, list[Row]] = {}

    def add(self, split: str, rows: list[Row]) -> None:
        self.rows[split] = rows
        for number, start in enumerate(range(0, len(rows), 40)):
            name, part = f"{split}/shard-{number:05d}.parquet", rows[start : start + 40]
            # The corpus may hold more than the teacher was asked about, and in another order.
            more = {"row_id": f"{split}-more-{number}", "text": "not asked about", "gold": None}
            write([more, *reversed(part)], self.corpus / name, schema.TEXT)
            write(part, self.readouts / name, schema.readouts(len(NAMES)))

    def content_free(self, answers: list[list[float] | None]) -> None:
        rows = [
            {"row_id": f"free-{n}", "logprobs": told, "error": None if told else "it hung"}
            for n, told in enumerate(answers)
        ]
        write(rows, self.readouts / "content_free.parquet", schema.readouts(len(NAMES)))

    def label(self, kind: str = "batch", *, mass: float = 0.0, **more: Any) -> Labelled:
        section = CalibrationSection.model_validate({"kind": kind, "min_label_mass": mass})
        self.labels.mkdir()
        more = {"max_rejected_fraction": 1.0, **more}
        return label(self.corpus, self.readouts, self.labels, section, NAMES, **more)

    def table(self, split: str = "unlabeled") -> pa.Table:
        return pa.concat_tables(map(pq.read_table, read_shards(self.labels / split)))

    def rejected(self) -> list[Row]:
        found: list[Row] = pq.read_table(self.labels / "rejected.parquet").to_pylist()
        return found


def out_of_order(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
    """Run as a cluster would: pickled, whichever comes first, the results in order."""
    waiting = list(items)
    done = {}
    for position in np.random.default_rng(7).permutation(len(waiting)).tolist():
        carried, item = _sent((function, waiting[position]))
        done[position] = _sent(carried(item))
    return (done[position] for position in sorted(done))


def _sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301  Made in this process.
