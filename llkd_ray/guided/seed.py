"""The gold rows that a guided distillation starts from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llkd_ray import schema
from llkd_ray.artifacts import Rows
from llkd_ray.config import Example, GuideSection, TaskSection
from llkd_ray.corpus import read_shards, row_id
from llkd_ray.errors import ConfigError
from llkd_ray.metrics import Ints

TRAIN, VALIDATION = "unlabeled", "validation"
"""Folders of the two parts, named so that a student is trained on the seed as on any labels."""
SHARD = "shard-00000.parquet"


@dataclass(frozen=True)
class Seed:
    """One part of the seed, or both."""

    texts: tuple[str, ...]
    """N."""
    gold: Ints
    """Position of each row's label [N]."""


def write_seed(corpus: Path, task: TaskSection, section: GuideSection, folder: Path) -> Rows:
    """Take the seed: task.examples and the first unlabeled rows with gold, by row_id.

    The examples are trained on: their gold is as much a human's as that of the other rows. Rows
    that validate a trained student, which has seen the unlabeled ones, are those of its split.

    Reads:
        corpus/unlabeled/shard-*.parquet and, where guide.start is "student", corpus/validation
        (schema.TEXT).

    Writes:
        folder/unlabeled (schema.labels) to train on, folder/validation (schema.TEXT).

    Raises:
        ConfigError: There are not so many rows with gold.
    """
    examples = {example.text.strip(): example.label for example in task.examples}
    validated = section.validation_rows
    trained = max(0, section.seed_rows - validated - len(examples))
    wanted = (
        {"unlabeled": trained + validated}
        if section.start == "seed"
        else {"unlabeled": trained, "validation": validated}
    )
    rows: list[dict[str, Any]] = []
    for split, number in wanted.items():
        found = _first_with_gold(corpus / split, number)
        if len(found) < number:
            raise ConfigError(
                f"guide.seed_rows = {section.seed_rows}: beside {len(examples)} task.examples the "
                f"{split} split has {len(found)} rows with gold for it, of {number}; lower "
                "guide.seed_rows, or name the column of human labels in corpus.gold_column"
            )
        rows += found
    validation = rows[trained:]
    shown = [
        {"row_id": row_id(text), "text": text, "gold": label} for text, label in examples.items()
    ]
    train = [*shown, *rows[:trained]]
    for part in (TRAIN, VALIDATION):
        (folder / part).mkdir()
    pq.write_table(pa.Table.from_pylist(validation, schema.TEXT), folder / VALIDATION / SHARD)
    write_labelled(folder / TRAIN / SHARD, train, task.label_names)
    count = len(train) + len(validation)
    return Rows(taken=count, kept=count, rejected=0)


def write_labelled(path: Path, rows: Sequence[dict[str, Any]], label_names: Sequence[str]) -> None:
    """Write rows as schema.labels; where they name no label, gold is it, with confidence 1."""
    one_hot = np.eye(len(label_names), dtype=np.float32)
    whole = [
        {
            "label": row["gold"],
            "confidence": 1.0,
            "probabilities": one_hot[label_names.index(row["gold"])],
            "logprobs": np.log(np.maximum(one_hot[label_names.index(row["gold"])], 1e-9)),
            "label_mass": 1.0,
            **row,
        }
        if row["gold"] is not None
        else row
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(whole, schema.labels(len(label_names))), path)


def read_seed(folder: Path, parts: Sequence[str], label_names: Sequence[str]) -> Seed:
    """Read parts of the seed, in the order of their shards."""
    table = pa.concat_tables(
        pq.read_table(path, columns=["text", "gold"])
        for part in parts
        for path in read_shards(folder / part)
    )
    position = {name: at for at, name in enumerate(label_names)}
    return Seed(
        texts=tuple(table.column("text").to_pylist()),
        gold=np.array([position[name] for name in table.column("gold").to_pylist()]),
    )


def examples_of(seed: Seed, label_names: Sequence[str]) -> tuple[Example, ...]:
    """Return gold rows as a pool of examples that the teacher may be shown."""
    return tuple(
        Example(text=text, label=label_names[at])
        for text, at in zip(seed.texts, seed.gold, strict=True)
    )


def _first_with_gold(folder: Path, most: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for path in read_shards(folder):
        if len(found) >= most:
            break
        table = pq.read_table(path, schema=schema.TEXT)
        found += table.filter(pc.is_valid(table.column("gold"))).to_pylist()
    return found[:most]
