"""Train one variant with one seed, and keep what it answers to the test rows after each epoch.

Shape legend: N gold test rows, E epochs.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from llkd_ray import storage
from llkd_ray.artifacts import write_text
from llkd_ray.corpus import read_shards
from llkd_ray.errors import ArtifactError
from llkd_ray.metrics import Ints
from llkd_ray.student.batches import Share, read_rows
from llkd_ray.student.loop import train_worker
from llkd_ray.student.model import load_tokenizer, locate
from llkd_ray.student.worker import Context, Work, Worker, score


@dataclass(frozen=True)
class Trial:
    """What a variant came to with one seed."""

    epochs: list[dict[str, Any]]
    """Rows of schema.EPOCHS, E."""
    audit: list[dict[str, Any]]
    """Rows of schema.AUDIT."""
    seconds: float
    predicted: Ints
    """[E, N], after each epoch, in the order of the shards."""

    @property
    def kept(self) -> tuple[int, ...]:
        """Rows kept in each epoch."""
        return tuple(row["kept"] for row in self.epochs)


def run_trial(work: Work, test: Path, out: Path) -> None:
    """Train and write out.npz and, last, out.json; needs a process that trains nothing else.

    Args:
        work: The variant, with its seed.
        test: Folder of the gold test shards.
        out: Path of both files, without their ending.
    """
    if not dist.is_initialized():
        # DeepSpeed looks for what a launcher would say.
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    started = time.perf_counter()
    epochs: list[dict[str, Any]] = []
    predicted: list[Ints] = []

    test_rows = read_rows(
        test,
        load_tokenizer(locate(work.student.model)),
        work.student.max_length,
        work.label_names,
        share=Share(0, 1, lanes=1),
        gold_only=True,
    )

    def look(worker: Worker, row: dict[str, Any]) -> None:
        epochs.append(row)
        answers = score(worker, test_rows, np.arange(len(test_rows)))
        predicted.append(answers.argmax(axis=1))

    device = torch.device("cuda" if work.train.use_gpu and torch.cuda.is_available() else "cpu")
    audit = train_worker(Context(0, 1, device, report=None, restored=None, look=look), work).audit
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out.with_suffix(".npz"), predicted=np.stack(predicted))
    storage.put(out.with_suffix(".npz"))
    seconds = round(time.perf_counter() - started, 3)
    tree = {"epochs": epochs, "audit": list(audit), "seconds": seconds}
    write_text(out.with_suffix(".json"), json.dumps(tree, ensure_ascii=False))
    storage.put(out.with_suffix(".json"))


def read_trial(out: Path) -> Trial | None:
    """Read what `run_trial` wrote, None if it has not come to its end."""
    file = storage.here(out.with_suffix(".json"))
    if not file.is_file():
        return None
    tree = json.loads(file.read_text(encoding="utf-8"))
    with np.load(storage.here(out.with_suffix(".npz")), allow_pickle=False) as arrays:
        return Trial(**tree, predicted=arrays["predicted"].astype(np.int64))


def read_gold(test: Path, label_names: tuple[str, ...]) -> tuple[Ints, Ints]:
    """Return gold and the teacher's label of the test rows that have gold, both [N].

    Raises:
        ArtifactError: There is no such row.
    """
    gold, label = [], []
    for shard in read_shards(test):
        table = pq.read_table(shard, columns=["gold", "label"])
        table = table.filter(pc.is_valid(table["gold"]))
        gold += [label_names.index(name) for name in table["gold"].to_pylist()]
        label += [label_names.index(name) for name in table["label"].to_pylist()]
    if not gold:
        raise ArtifactError(
            f"{test}: no labelled test row has gold, so nothing can be compared; give "
            'corpus.test_fraction a share, corpus.gold_column a name, and teacher.splits "test"'
        )
    return np.array(gold, dtype=np.int64), np.array(label, dtype=np.int64)
