"""How far a labelling is: rows done, left and rejected, read from the ledger alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc

from llkd_ray.artifacts import MANIFEST, Manifest
from llkd_ray.config import TeacherSection
from llkd_ray.teacher.ledger import Ledger
from llkd_ray.teacher.plan import Measured
from llkd_ray.teacher.readouts import Shard, plan


@dataclass(frozen=True)
class SplitStatus:
    """Rows of a split that are up for labelling: rows = done + rejected + left."""

    split: str
    rows: int
    done: int
    rejected: int
    """Asked about, without an answer."""
    left: int
    """Not asked about yet."""


def status(corpus: Path, teacher: TeacherSection, ledger: Ledger) -> Iterator[SplitStatus]:
    """Count each split; memory is bounded by a shard, and a running job is not disturbed."""
    for split in teacher.splits:
        rows = done = rejected = 0
        for shard in plan(corpus, Path(), (split,), teacher.max_unlabeled_rows):
            answered, failed = _count(shard, ledger)
            rows += shard.take
            done += answered
            rejected += failed
        yield SplitStatus(split, rows, done, rejected, rows - done - rejected)


def measured(run: Path, model: str) -> Measured | None:
    """Return what an actor with this model was last seen to compute in this run, if it was."""
    rates = []
    for manifest in run.glob(f"readouts-*/{MANIFEST}"):
        made = Manifest.model_validate_json(manifest.read_text(encoding="utf-8"))
        if made.details.get("model") == model and made.details.get("tokens_per_s"):
            rate = made.details["tokens_per_s"] / max(1, made.details["actors"])
            rates.append((made.created, Measured(rate, f"measured in {manifest.parent.name}")))
    return max(rates, key=lambda rate: rate[0])[1] if rates else None


def _count(shard: Shard, ledger: Ledger) -> tuple[int, int]:
    entries = ledger.find(shard.row_ids())
    failed = pc.sum(pc.is_valid(entries.column("error"))).as_py() or 0
    return len(entries) - failed, failed
