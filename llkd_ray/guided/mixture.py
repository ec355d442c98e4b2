"""Labelled rows of several artifacts in one folder, to train on all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llkd_ray.artifacts import Artifact, Rows
from llkd_ray.corpus import read_shards
from llkd_ray.guided.seed import TRAIN
from llkd_ray.lineage import Lineage


def mix(lineage: Lineage, out: Path) -> tuple[Rows, dict[str, Any]]:
    """Put the rows that the teacher wrote in all rounds beside those that it labelled.

    Writes:
        out/unlabeled/shard-*.parquet (schema.labels), the written rows first.

    Returns:
        The count, texts that were written and stand in the corpus as well being one row, and
        details: `rows` taken from each artifact, by its folder's name, in the order of the shards.

    Raises:
        ArtifactError: The labels or the guided student are not made yet.
    """
    labels, guided = lineage.labels.require(), lineage.guided.require()
    rounds = range(1, guided.manifest().details["rounds"] + 1)
    parts = [*(lineage.lessons(number) for number in rounds), labels]
    return _counted(parts, lay_out(parts, out / TRAIN))


def lay_out(parts: Sequence[Artifact], folder: Path) -> list[tuple[int, int]]:
    """Copy the shards of artifacts into a new folder, a shard at a time.

    A row that stands in several of them is the first one's. Ids are held in memory of all parts but
    the last, so that the largest should come last.

    Returns:
        For each part, how many rows it has and how many of them were copied.

    Raises:
        ArtifactError: One is not made.
    """
    folder.mkdir(parents=True)
    seen: set[str] = set()
    counts, number = [], 0
    for part in parts:
        taken = copied = 0
        for shard in read_shards(part.require().path / TRAIN):
            table = pq.read_table(shard)
            ids = table.column("row_id").to_pylist()
            fresh = table.filter(pa.array([id_ not in seen for id_ in ids], pa.bool_()))
            if part is not parts[-1]:
                seen.update(ids)
            pq.write_table(fresh, folder / f"shard-{number:05d}.parquet")
            number += 1
            taken, copied = taken + len(table), copied + len(fresh)
        counts.append((taken, copied))
    return counts


def _counted(
    parts: Sequence[Artifact], counts: Sequence[tuple[int, int]]
) -> tuple[Rows, dict[str, Any]]:
    taken, kept = map(sum, zip(*counts, strict=True))
    copied = {part.path.name: rows for part, (_, rows) in zip(parts, counts, strict=True)}
    return Rows(taken=taken, kept=kept, rejected=taken - kept), {"rows": copied}
