"""Save and restore, at the end of an epoch, everything that a later epoch depends on.

A checkpoint folder holds, from every worker, its parts of the engine's weights and optimizer and
the mask of its rows used so far, and from worker 0 the progress and the student itself as a Hugging
Face folder. Workers may write to folders of their own: laid over each other they make the whole.
Random numbers need no saving: each epoch draws from the experiment's seed and its own number.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from llkd_ray.artifacts import write_text
from llkd_ray.selection import Bools, SelectionState

STUDENT = "student"
"""The student's folder inside a checkpoint: a plain Hugging Face model with its tokenizer."""
_PROGRESS = "progress.json"
_ENGINE_TAG = "engine"


@dataclass(frozen=True)
class Progress:
    """How far training has come; the same on every worker."""

    epoch: int
    """Epochs done."""
    steps: int
    """Optimizer steps taken."""
    row_steps: int
    """Rows trained on, counted once per epoch."""
    selection: SelectionState
    audit: tuple[dict[str, Any], ...]
    """Rows of schema.AUDIT so far."""
    epochs: tuple[dict[str, Any], ...]
    """Rows of schema.EPOCHS so far."""

    @classmethod
    def start(cls, num_classes: int) -> "Progress":
        """Return the progress before the first epoch."""
        return cls(0, 0, 0, SelectionState.start(num_classes), (), ())

    def after_epoch(
        self,
        *,
        steps: int,
        row_steps: int,
        selection: SelectionState,
        audit: list[dict[str, Any]],
        epoch_row: dict[str, Any],
    ) -> "Progress":
        """Return the progress one epoch later; steps and row_steps are this epoch's."""
        return replace(
            self,
            epoch=self.epoch + 1,
            steps=self.steps + steps,
            row_steps=self.row_steps + row_steps,
            selection=selection,
            audit=(*self.audit, *audit),
            epochs=(*self.epochs, epoch_row),
        )


def save(
    folder: Path, engine: Any, tokenizer: Any, *, progress: Progress, used: Bools, rank: int
) -> None:
    """Write this worker's part of a checkpoint. Every worker must call this at the same time.

    Args:
        folder: Empty, of this worker alone.
        engine: The DeepSpeed engine, at any ZeRO stage.
        tokenizer: Of the student.
        progress: After this epoch.
        used: [N], this worker's rows trained on so far.
        rank: Of this worker.
    """
    # Choosing the accelerator comes before the first import, which is the loop's to do.
    from deepspeed.runtime.zero import GatheredParameters

    engine.save_checkpoint(str(folder), tag=_ENGINE_TAG)
    np.save(folder / f"used-{rank:05d}.npy", used, allow_pickle=False)
    parameters = list(engine.module.parameters())
    partitioned = engine.zero_optimization_stage() == 3
    with GatheredParameters(parameters, enabled=partitioned):
        if rank == 0:
            student = folder / STUDENT
            weights = engine.module.state_dict()
            engine.module.save_pretrained(
                student, state_dict={name: value.float() for name, value in weights.items()}
            )
            tokenizer.save_pretrained(student)
            write_progress(folder, progress)
    # Nobody reports the checkpoint before all of it is written.
    dist.barrier()


def restore(folder: Path, engine: Any, *, rank: int) -> tuple[Progress, Bools]:
    """Load a whole checkpoint into the engine.

    Returns:
        The progress and this worker's mask of rows used so far, [N].
    """
    loaded, _ = engine.load_checkpoint(str(folder), tag=_ENGINE_TAG)
    assert loaded is not None, f"{folder} holds no engine"
    used: Bools = np.load(folder / f"used-{rank:05d}.npy", allow_pickle=False)
    return read_progress(folder), used


def write_progress(folder: Path, progress: Progress) -> None:
    """Write the progress beside the engine's files."""
    tree = {
        "epoch": progress.epoch,
        "steps": progress.steps,
        "row_steps": progress.row_steps,
        "selection": progress.selection.to_json(),
        "audit": progress.audit,
        "epochs": progress.epochs,
    }
    write_text(folder / _PROGRESS, json.dumps(tree, ensure_ascii=False))


def read_progress(folder: Path) -> Progress:
    """Read what `write_progress` wrote."""
    tree = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
    return Progress(
        epoch=tree["epoch"],
        steps=tree["steps"],
        row_steps=tree["row_steps"],
        selection=SelectionState.from_json(tree["selection"]),
        audit=tuple(tree["audit"]),
        epochs=tuple(tree["epochs"]),
    )
