"""Save and restore everything that a later step depends on, after an epoch or within one.

A checkpoint folder holds, from every worker, its parts of the engine's weights and optimizer and
what it knows of its rows, and from worker 0 the progress, the average of the weights and the
student itself as a Hugging Face folder. Workers may write to folders of their own: laid over each
other they make the whole. What is known of rows is found again by row id, so that another number of
workers can go on. Random numbers need no saving: each step draws from the experiment's seed and its
own number.

Shape legend: N rows of this worker, C classes.
"""

import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from llkd_ray import storage
from llkd_ray.artifacts import write_text
from llkd_ray.selection import Bools, Floats, Ints, Probabilities, SelectionState
from llkd_ray.student.batches import Rows
from llkd_ray.student.engine import Average

STUDENT = "student"
"""The student's folder inside a checkpoint: a plain Hugging Face model with its tokenizer."""
_PROGRESS = "progress.json"
_AVERAGE = "average.safetensors"
_ENGINE_TAG = "engine"


@dataclass(frozen=True)
class Progress:
    """How far training has come; the same on every worker."""

    epoch: int
    """Whole epochs done."""
    steps: int
    """Optimizer steps; one for which no row was kept counts, and leaves the weights alone."""
    row_steps: int
    """Rows trained on, counted once per epoch."""
    selection: SelectionState
    audit: tuple[dict[str, Any], ...]
    """Rows of schema.AUDIT so far, those of the epoch under way with them."""
    epochs: tuple[dict[str, Any], ...]
    """Rows of schema.EPOCHS so far."""
    cursor: int = 0
    """Steps taken of the epoch under way."""
    loss_sum: float = 0.0
    """Sum of weight times loss over them, over all workers."""

    @classmethod
    def start(cls) -> "Progress":
        """Return the progress before the first epoch."""
        return cls(0, 0, 0, SelectionState(), (), ())

    def after_epoch(self, *, steps: int, row_steps: int, epoch_row: dict[str, Any]) -> "Progress":
        """Return the progress one epoch later; steps and row_steps are this epoch's."""
        return replace(
            self,
            epoch=self.epoch + 1,
            steps=self.steps + steps,
            row_steps=self.row_steps + row_steps,
            epochs=(*self.epochs, epoch_row),
            cursor=0,
            loss_sum=0.0,
        )


@dataclass
class RowMemory:
    """What a worker remembers of its rows from step to step."""

    used: Bools
    """[N], trained on so far."""
    student: Probabilities
    """[N, C], the student's last answers; NaN where it was never asked."""
    keep: Bools
    """[N], the choice of the epoch under way."""
    weight: Floats
    """[N], likewise."""
    target: Ints
    """[N], likewise."""

    @classmethod
    def start(cls, rows: Rows) -> "RowMemory":
        """Return the memory before the first epoch."""
        none = np.zeros(len(rows), dtype=np.bool_)
        return cls(
            used=none,
            student=np.full_like(rows.teacher, np.nan),
            keep=none.copy(),
            weight=np.zeros(len(rows)),
            target=rows.label.copy(),
        )


def save(
    folder: Path,
    engine: Any,
    tokenizer: Any,
    *,
    progress: Progress,
    rows: Rows,
    memory: RowMemory,
    average: Average | None,
    rank: int,
) -> None:
    """Write this worker's part of a checkpoint. Every worker must call this at the same time.

    Args:
        folder: Empty, of this worker alone.
        engine: The DeepSpeed engine, at any ZeRO stage.
        tokenizer: Of the student.
        progress: So far.
        rows: This worker's.
        memory: Of these rows.
        average: Of the weights, which is then what the student's folder holds.
        rank: Of this worker.
    """
    # Choosing the accelerator comes before the first import, which is the engine's to do.
    from deepspeed.runtime.zero import GatheredParameters

    engine.save_checkpoint(str(folder), tag=_ENGINE_TAG)
    np.savez(folder / f"rows-{rank:05d}.npz", ids=_ids(rows), **vars(memory))
    parameters = list(engine.module.parameters())
    partitioned = engine.zero_optimization_stage() == 3
    with (
        GatheredParameters(parameters, enabled=partitioned),
        average.in_place() if average else contextlib.nullcontext(),
    ):
        if rank == 0:
            student = folder / STUDENT
            weights = engine.module.state_dict()
            engine.module.save_pretrained(
                student, state_dict={name: value.float() for name, value in weights.items()}
            )
            tokenizer.save_pretrained(student)
            if average:
                numbered = {str(at): weight for at, weight in enumerate(average.weights)}
                save_file(numbered, folder / _AVERAGE, {"steps": str(average.steps)})
            write_progress(folder, progress)
    # Nobody reports the checkpoint before all of it is written.
    dist.barrier()


def restore(
    folder: Path, engine: Any, *, rows: Rows, average: Average | None
) -> tuple[Progress, RowMemory]:
    """Load a whole checkpoint into the engine and the average.

    Returns:
        The progress and what was known of this worker's rows, whoever had them before.
    """
    loaded, _ = engine.load_checkpoint(str(folder), tag=_ENGINE_TAG)
    assert loaded is not None, f"{folder} holds no engine"
    progress = read_progress(folder)
    if average:
        with safe_open(folder / _AVERAGE, framework="pt") as saved:
            for at, weight in enumerate(average.weights):
                weight.copy_(saved.get_tensor(str(at)))
            # Fewer than there were steps, where some kept no row.
            average.steps = int(saved.metadata()["steps"])
    memory, ids = RowMemory.start(rows), _ids(rows)
    order = np.argsort(ids)
    for part in sorted(folder.glob("rows-*.npz")):
        with np.load(part, allow_pickle=False) as theirs:
            at = np.searchsorted(ids, theirs["ids"], sorter=order)
            mine = order[np.minimum(at, len(order) - 1)] if len(order) else at
            shared = np.zeros(len(at), np.bool_) if not len(order) else ids[mine] == theirs["ids"]
            for name, values in vars(memory).items():
                values[mine[shared]] = theirs[name][shared]
    return progress, memory


def write_progress(folder: Path, progress: Progress) -> None:
    """Write the progress beside the engine's files."""
    tree = {**vars(progress), "selection": progress.selection.to_json()}
    write_text(folder / _PROGRESS, json.dumps(tree, ensure_ascii=False))


def read_progress(folder: Path) -> Progress:
    """Read what `write_progress` wrote."""
    tree = json.loads(storage.read(folder / _PROGRESS))
    return Progress(
        **{
            **tree,
            "selection": SelectionState.from_json(tree["selection"]),
            "audit": tuple(tree["audit"]),
            "epochs": tuple(tree["epochs"]),
        }
    )


def _ids(rows: Rows) -> Any:
    """Return the row ids as 16 bytes each, [N], which numpy compares as one."""
    both = np.stack([rows.keys, rows.lower], axis=1).astype(">u8")
    return np.ascontiguousarray(both).view("S16")[:, 0]
