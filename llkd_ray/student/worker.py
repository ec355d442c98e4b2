"""One worker: what it is told, what it holds, and how it asks its student.

Shape legend: N rows, C classes.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from llkd_ray.config import LLKDRule, Rule, StudentSection, TrainSection
from llkd_ray.errors import StudentError
from llkd_ray.selection import AllReduce, Floats, Ints, Probabilities, Signals
from llkd_ray.student import stopping
from llkd_ray.student.batches import Rows, Share, read_rows
from llkd_ray.student.engine import Average, start_engine
from llkd_ray.student.evaluate import class_probabilities
from llkd_ray.student.model import load_student, load_tokenizer, load_untrained, locate
from llkd_ray.student.order import lanes_for
from llkd_ray.student.temperature import undo_temperature


@dataclass(frozen=True)
class Context:
    """What a worker is told by whoever runs it."""

    rank: int
    world_size: int
    """Workers, each with a torch.distributed process group around it."""
    device: torch.device
    report: Callable[[dict[str, Any] | None, Path, str], None] | None
    """Takes the epoch's row of schema.EPOCHS (None within an epoch), this worker's part of the
    checkpoint, which is gone after the call, and the checkpoint's name. A barrier: every worker
    reports equally often. None to write no checkpoint."""
    restored: Path | None
    """A whole checkpoint to go on from."""
    signals: Path | None = None
    """Folder, shared by the workers, for what the rows looked like; None to write nothing."""
    look: Callable[["Worker", dict[str, Any]], None] | None = None
    """Takes the worker and the row of each epoch at its end, to ask the student more."""


@dataclass(frozen=True)
class Work:
    """What is to be trained, the same for every worker."""

    labels: Path
    """Folder of the labelled shards."""
    validation: Path | None
    """Folder of the validation shards; None when there is no gold."""
    label_names: tuple[str, ...]
    selection: Rule
    student: StudentSection
    train: TrainSection
    expert: dict[str, Any]
    """Further settings of DeepSpeed."""
    seed: int
    start: Path | None = None
    """Folder of a trained student to go on from; one with a fresh head when None."""

    @property
    def stepwise(self) -> bool:
        """Whether rows are chosen in each step instead of before each epoch."""
        return isinstance(self.selection, LLKDRule) and self.selection.cadence == "step"


@dataclass(frozen=True)
class Worker:
    """One of them, started."""

    context: Context
    work: Work
    tokenizer: Any
    engine: Any
    average: Average | None
    all_reduce: AllReduce
    rows: Rows
    """To train on."""
    held_out: Rows
    """Of the labelled rows; those whose label the teacher is surest of."""
    validation: Rows | None
    """With gold."""


def start_worker(context: Context, work: Work) -> Worker:
    """Read the worker's rows and start its engine. Every worker must call this at the same time.

    Raises:
        StudentError: The student cannot be loaded, or there is not one row to train on.
    """
    all_reduce = sum_over_workers()
    tokenizer = load_tokenizer(locate(work.student.model))
    share = Share(context.rank, context.world_size, lanes_for(work.train.batch_size))

    def read(folder: Path, *, gold_only: bool) -> Rows:
        return read_rows(
            folder,
            tokenizer,
            work.student.max_length,
            work.label_names,
            share=share,
            gold_only=gold_only,
        )

    rows = read(work.labels, gold_only=False)
    apart = stopping.held_out(rows.keys, work.train.stopping.held_out_fraction, work.seed)
    held_out = rows.subset(apart)
    if apart.any():
        rows = rows.subset(~apart)
    if not all_reduce(np.array([float(len(rows))]))[0]:
        raise StudentError(f"{work.labels}: no labelled row to train on; run python jobs/label.py")
    by = stopping.criterion(work.train.stopping, has_gold=work.validation is not None)
    if by == "held_out_macro_f1" and not all_reduce(np.array([float(len(held_out))]))[0]:
        raise StudentError(
            f"{work.labels}: train.stopping.held_out_fraction = "
            f"{work.train.stopping.held_out_fraction} holds none of so few rows out of training; "
            "raise it, or set train.stopping.choose_by = 'last'"
        )
    validation = None if work.validation is None else read(work.validation, gold_only=True)
    most = work.train.stopping.gold_rows
    if validation is not None and most is not None:
        validation = validation.subset(
            stopping.first_rows(validation.keys, most, all_reduce=all_reduce)
        )
    if work.start is None:
        model = load_untrained(work.student, work.label_names, seed=work.seed)
    else:
        model = load_student(work.start)[0]
        undo_temperature(model)
    engine = start_engine(
        model, work.train, work.expert, world_size=context.world_size, device=context.device
    )
    decay = work.train.average_decay
    return Worker(
        context=context,
        work=work,
        tokenizer=tokenizer,
        engine=engine,
        average=Average(engine.module, decay) if decay else None,
        all_reduce=all_reduce,
        rows=rows,
        held_out=held_out.subset(stopping.surest_half(held_out, all_reduce=all_reduce)),
        validation=validation,
    )


def validate(worker: Worker) -> dict[str, float | None]:
    """Return the scores of the epoch, None for those there are no rows for."""
    work = worker.work

    def against(rows: Rows | None, truth: Ints | None) -> tuple[float | None, float | None]:
        if rows is None or truth is None:
            return None, None
        predicted = score(worker, rows, np.arange(len(rows))).argmax(axis=1)
        found = stopping.agreement(
            truth, predicted, len(work.label_names), all_reduce=worker.all_reduce
        )
        return found or (None, None)

    gold = worker.validation
    accuracy, macro_f1 = against(gold, None if gold is None else gold.gold)
    held_out = worker.held_out if work.train.stopping.held_out_fraction else None
    scores = {
        "validation_accuracy": accuracy,
        "validation_macro_f1": macro_f1,
        "held_out_macro_f1": against(held_out, worker.held_out.label)[1],
    }
    by = stopping.criterion(work.train.stopping, has_gold=gold is not None)
    return {**scores, stopping.SCORE: scores.get(by)}


def score(worker: Worker, rows: Rows, positions: Ints) -> Probabilities:
    """Return the student's probabilities of some rows, [positions, C]."""
    context, work = worker.context, worker.work
    needed = np.zeros(context.world_size)
    needed[context.rank] = -(-len(positions) // work.train.scoring_batch_size)
    average = worker.average
    with torch.no_grad(), average.in_place() if average else contextlib.nullcontext():
        return class_probabilities(
            worker.engine,
            rows.tokens,
            positions,
            batch_size=work.train.scoring_batch_size,
            pad_token_id=worker.tokenizer.pad_token_id,
            num_classes=len(work.label_names),
            device=context.device,
            num_batches=int(worker.all_reduce(needed).max()),
        )


def signals_of(
    rows: Rows, student: Probabilities | None, positions: Ints | slice = slice(None)
) -> Signals:
    """Return what a rule may know of some rows; `student` is of all rows, [N, C]."""
    return Signals(
        keys=rows.keys[positions],
        label=rows.label[positions],
        gold=rows.gold[positions],
        teacher=rows.teacher[positions],
        student=None if student is None else student[positions],
    )


def sum_over_workers() -> AllReduce:
    """Return a sum over the workers in float64, through gloo whatever the gradients use."""
    group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def all_reduce(values: Floats) -> Floats:
        tensor = torch.from_numpy(values.copy())
        dist.all_reduce(tensor, group=group)
        summed: Floats = tensor.numpy()
        return summed

    return all_reduce
