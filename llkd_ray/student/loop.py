"""One worker's training loop. It knows DeepSpeed and torch.distributed, and nothing of Ray.

Each epoch: score the worker's rows without gradients (where the rule asks), select, train on the
kept rows, validate, checkpoint. All workers go through the same collective calls.

The loss of a step is the weighted mean over the rows of ALL workers,
L_w = sum w CE / sum w, so that N workers take the step that one would take.

Shape legend: N rows of this worker, C classes.
"""

import logging
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llkd_ray import storage
from llkd_ray.config import TrainSection
from llkd_ray.errors import StudentError
from llkd_ray.selection import (
    Bools,
    Floats,
    Ints,
    Selection,
    Signals,
    balanced,
    needs_student,
    select,
)
from llkd_ray.student import checkpoint, stopping
from llkd_ray.student.audit import audit_classes, write_signals
from llkd_ray.student.checkpoint import Progress, RowMemory
from llkd_ray.student.order import lanes_for, plan_epoch
from llkd_ray.student.step import Stepper, learning_rate
from llkd_ray.student.worker import (
    Context,
    Work,
    Worker,
    score,
    signals_of,
    start_worker,
    validate,
)

_log = logging.getLogger(__name__)
# Moving thresholds may lie above every row for a while, and come down again by themselves.
_EMPTY_EPOCHS = 20


def train_worker(context: Context, work: Work) -> Progress:
    """Train from the restored checkpoint, or the beginning, to the end, and return the progress.

    A rule that keeps no row for many epochs ends the training where it is: nothing changes the
    student any more.

    Raises:
        StudentError: The student cannot be loaded, there was not one row to train on, or the loss
            is no number any more.
    """
    if context.device.type == "cpu":
        torch.set_num_threads(work.train.threads_per_worker)
    worker = start_worker(context, work)
    progress, memory = Progress.start(), RowMemory.start(worker.rows)
    if context.restored is not None:
        progress, memory = checkpoint.restore(
            context.restored, worker.engine, rows=worker.rows, average=worker.average
        )
    while not _is_over(work.train, progress):
        progress = _run_epoch(worker, progress, memory)
        if context.look is not None:
            context.look(worker, progress.epochs[-1])
        _report(worker, progress, memory, progress.epochs[-1])
    if not progress.steps:
        raise StudentError(
            f"the rule {work.selection.rule} kept no row in {progress.epoch} epochs; loosen it"
        )
    if work.train.steps is not None and progress.steps < work.train.steps and _is_dry(progress):
        _log.warning(
            "the rule %s keeps no row any more: training ended after %d of train.steps = %d",
            work.selection.rule,
            progress.steps,
            work.train.steps,
        )
    return progress


def _is_over(train: TrainSection, progress: Progress) -> bool:
    if stopping.should_stop(progress.epochs, train.stopping.patience):
        return True
    if train.steps is not None:
        return progress.steps >= train.steps or _is_dry(progress)
    return progress.epoch >= train.epochs


def _is_dry(progress: Progress) -> bool:
    """Return whether the rule has kept nothing for so long that it never will again."""
    lately = [row["kept"] for row in progress.epochs[-_EMPTY_EPOCHS:]]
    return len(lately) == _EMPTY_EPOCHS and not any(lately)


def _run_epoch(worker: Worker, progress: Progress, memory: RowMemory) -> Progress:
    """Go through one epoch, or what is left of it, and return the progress after it."""
    work, rows, all_reduce = worker.work, worker.rows, worker.all_reduce
    epoch, clock = progress.epoch + 1, [time.perf_counter()]
    choice: tuple[Signals, Selection] | None = None
    if not progress.cursor and work.stepwise:
        memory.keep[:], memory.weight[:] = False, 0.0
    elif not progress.cursor:
        if needs_student(work.selection, epoch):
            _ask_student(worker, epoch, memory)
            all_reduce(np.zeros(1))  # Who is done first waits here: that is scoring's time.
        clock.append(time.perf_counter())
        choice = _choose(worker, progress, memory)
    chosen = np.arange(len(rows)) if work.stepwise else np.flatnonzero(memory.keep)
    total, kept = all_reduce(np.array([len(rows), len(chosen)], dtype=np.float64)).astype(int)
    num_steps = int(-(-kept // work.train.batch_size))
    plan = plan_epoch(
        rows.keys[chosen],
        rows.lower[chosen],
        rows.tokens.lengths[chosen],
        lanes=lanes_for(work.train.batch_size),
        num_steps=num_steps,
        seed=work.seed,
        epoch=epoch,
    )
    if work.train.steps is not None:
        plan = plan[: work.train.steps - progress.steps]
    plan = [chosen[at] for at in plan]
    if choice is not None:
        memory.used[_all_of(plan)] = True
        progress = _audited(worker, progress, *choice, memory.used)
    clock.append(time.perf_counter())
    progress, row_steps, loss = _take_steps(worker, progress, memory, plan)
    if loss is not None and not math.isfinite(loss):
        raise StudentError(
            f"epoch {epoch}: the loss is {loss}, no number to learn by; lower train.learning_rate "
            f"(now {work.train.learning_rate:g}), or look at the weights of student.model"
        )
    if work.stepwise:
        kept = int(all_reduce(np.array([float(memory.keep.sum())]))[0])
    distinct = int(all_reduce(np.array([float(memory.used.sum())]))[0])
    clock.append(time.perf_counter())
    epoch_row = {
        "epoch": epoch,
        "kept": int(kept),
        "rows": int(total),
        "distinct_rows": distinct,
        "steps": progress.steps + len(plan),
        "row_steps": progress.row_steps + row_steps,
        "loss": loss,
        **validate(worker),
        "scoring_s": clock[1] - clock[0],
        "selection_s": clock[-2] - clock[1],
        "training_s": clock[-1] - clock[-2],
    }
    return progress.after_epoch(steps=len(plan), row_steps=row_steps, epoch_row=epoch_row)


def _ask_student(worker: Worker, epoch: int, memory: RowMemory) -> None:
    """Score the rows whose turn it is, and those never scored."""
    train = worker.work.train
    turn, waiting = divmod(epoch - 1, train.scoring_every)
    stale = np.isnan(memory.student[:, 0])
    if not waiting:
        parts = np.uint64(train.scoring_parts)
        stale |= worker.rows.keys % parts == turn % train.scoring_parts
    positions = np.flatnonzero(stale)
    memory.student[positions] = score(worker, worker.rows, positions)


def _choose(worker: Worker, progress: Progress, memory: RowMemory) -> tuple[Signals, Selection]:
    """Select the epoch's rows, into the memory, and return what by and how."""
    work, epoch = worker.work, progress.epoch + 1
    asked = needs_student(work.selection, epoch)
    signals = signals_of(worker.rows, memory.student if asked else None)
    selection = _select(worker, signals, progress, epoch)
    memory.keep, memory.weight, memory.target = selection.keep, selection.weight, selection.target
    return signals, selection


def _select(worker: Worker, signals: Signals, progress: Progress, epoch: int) -> Selection:
    work, all_reduce = worker.work, worker.all_reduce
    selection = select(
        work.selection,
        progress.selection,
        signals,
        seed=work.seed,
        epoch=epoch,
        all_reduce=all_reduce,
    )
    if not work.train.class_balanced:
        return selection
    return balanced(selection, len(work.label_names), all_reduce=all_reduce)


def _audited(
    worker: Worker, progress: Progress, signals: Signals, selection: Selection, used: Bools
) -> Progress:
    context, work, epoch = worker.context, worker.work, progress.epoch + 1
    if context.signals is not None:
        if context.rank == 0:
            _forget_signals(context.signals, epoch, context.world_size)
        part = f"epoch-{epoch:04d}-{context.rank:05d}-of-{context.world_size:05d}.parquet"
        write_signals(context.signals / part, worker.rows, signals, selection)
    rows = audit_classes(
        epoch, work.label_names, signals, selection, used, all_reduce=worker.all_reduce
    )
    return replace(progress, selection=selection.state, audit=(*progress.audit, *rows))


def _forget_signals(folder: Path, epoch: int, world_size: int) -> None:
    """Remove what workers of another number left of this epoch before one of them was lost."""
    for name in storage.names(folder):
        if name.startswith(f"epoch-{epoch:04d}-") and f"-of-{world_size:05d}." not in name:
            storage.remove(folder / name)


def _take_steps(
    worker: Worker, progress: Progress, memory: RowMemory, plan: list[Ints]
) -> tuple[Progress, int, float | None]:
    """Take the steps of an epoch that are left.

    Returns:
        The progress, the rows trained on in the whole epoch, and their weighted mean loss.
    """
    work, all_reduce = worker.work, worker.all_reduce
    if work.stepwise:
        return _choose_and_take_steps(worker, progress, memory, plan)
    weights = [memory.weight[chosen].sum() for chosen in plan]
    sums = all_reduce(np.array([weights, [len(chosen) for chosen in plan]], dtype=np.float64))
    stepper = _stepper(worker, progress, len(plan))
    for at in range(progress.cursor, len(plan)):
        chosen = plan[at]
        stepper.take(chosen, memory.weight[chosen], memory.target[chosen], sums[0, at])
        progress = _maybe_checkpoint(worker, stepper, progress, memory, num_steps=len(plan))
    loss = stepper.loss_sum_of_all() / sums[0].sum() if sums[0].sum() else None
    return progress, int(sums[1].sum()), loss


def _choose_and_take_steps(
    worker: Worker, progress: Progress, memory: RowMemory, plan: list[Ints]
) -> tuple[Progress, int, float | None]:
    """Choose among each step's rows by what the student says of them now, and train on those."""
    rows, epoch = worker.rows, progress.epoch + 1
    stepper = _stepper(worker, progress, len(plan))
    thresholds: dict[str, Floats] = {}
    for at in range(progress.cursor, len(plan)):
        batch = plan[at]
        memory.student[batch] = score(worker, rows, batch)
        signals = signals_of(rows, memory.student, batch)
        selection = _select(worker, signals, progress, epoch)
        progress = replace(progress, selection=selection.state)
        thresholds = dict(selection.thresholds)
        memory.keep[batch], memory.weight[batch] = selection.keep, selection.weight
        memory.target[batch] = selection.target
        memory.used[batch] |= selection.keep
        weight, chosen = selection.weight[selection.keep], batch[selection.keep]
        total = float(worker.all_reduce(np.array([weight.sum()]))[0])
        stepper.take(chosen, weight, selection.target[selection.keep], total)
        progress = _maybe_checkpoint(worker, stepper, progress, memory, num_steps=len(plan))
    seen = _all_of(plan)
    kept, weight_sum = worker.all_reduce(
        np.array([memory.keep[seen].sum(), memory.weight[seen].sum()], dtype=np.float64)
    )
    whole = Selection(memory.keep, memory.weight, memory.target, progress.selection, thresholds)
    signals = signals_of(rows, np.nan_to_num(memory.student, nan=1 / len(worker.work.label_names)))
    progress = _audited(worker, progress, signals, whole, memory.used)
    loss = stepper.loss_sum_of_all() / weight_sum if weight_sum else None
    return progress, int(kept), loss


def _all_of(plan: list[Ints]) -> Ints:
    """Return the positions of all rows of a plan."""
    return np.concatenate([np.empty(0, dtype=np.int64), *plan])


def _stepper(worker: Worker, progress: Progress, num_steps: int) -> Stepper:
    train, epoch = worker.work.train, progress.epoch + 1

    def rate(at: int) -> float:
        if train.steps is not None:
            return learning_rate(train, (progress.steps + at + 0.5) / train.steps)
        return learning_rate(train, (epoch - 1 + (at + 0.5) / num_steps) / train.epochs)

    return Stepper(
        engine=worker.engine,
        average=worker.average,
        rows=worker.rows,
        train=train,
        pad_token_id=worker.tokenizer.pad_token_id,
        device=worker.context.device,
        world_size=worker.context.world_size,
        all_reduce=worker.all_reduce,
        seed=(worker.work.seed, epoch, worker.context.rank),
        rate=rate,
        at=progress.cursor,
        loss_sum=progress.loss_sum if worker.context.rank == 0 else 0.0,
    )


def _maybe_checkpoint(
    worker: Worker, stepper: Stepper, progress: Progress, memory: RowMemory, *, num_steps: int
) -> Progress:
    every = worker.work.train.checkpoint_steps
    # After the last step comes the checkpoint of the whole epoch.
    if every is None or stepper.at % every or stepper.at == num_steps:
        return progress
    loss_sum = stepper.loss_sum_of_all()
    # So that an unbroken run adds up the same numbers in the same order as one that goes on here.
    stepper.loss_sum = loss_sum if worker.context.rank == 0 else 0.0
    within = replace(progress, cursor=stepper.at, loss_sum=loss_sum)
    _report(worker, within, memory, None)
    return progress


def _report(
    worker: Worker, progress: Progress, memory: RowMemory, row: dict[str, Any] | None
) -> None:
    report = worker.context.report
    if report is None:
        return
    epoch = progress.epoch if row is not None else progress.epoch + 1
    name = f"epoch-{epoch:04d}" + ("" if row is not None else f"-step-{progress.cursor:06d}")
    with tempfile.TemporaryDirectory(prefix="llkd_ray-") as folder:
        checkpoint.save(
            Path(folder),
            worker.engine,
            worker.tokenizer,
            progress=progress,
            rows=worker.rows,
            memory=memory,
            average=worker.average,
            rank=worker.context.rank,
        )
        report(row, Path(folder), name)
