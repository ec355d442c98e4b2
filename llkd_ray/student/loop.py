"""One worker's training loop. It knows DeepSpeed and torch.distributed, and nothing of Ray.

Each epoch: score the worker's rows without gradients (where the rule asks), select, train on the
kept rows, validate, checkpoint. All workers go through the same collective calls.

The loss of a step is the weighted mean over the rows of ALL workers,
L_w = sum w CE / sum w, so that N workers take the step that one would take.

Shape legend: N rows of this worker, C classes.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from llkd_ray.config import AllRule, LLKDRule, StudentSection, TrainSection
from llkd_ray.errors import StudentError
from llkd_ray.selection import (
    AllReduce,
    Bools,
    Floats,
    Ints,
    Selection,
    needs_student,
    select,
    uncertainty,
)
from llkd_ray.student import checkpoint
from llkd_ray.student.audit import audit_classes, score_validation
from llkd_ray.student.batches import Rows, Share, pad, plan_epoch, read_rows
from llkd_ray.student.checkpoint import Progress
from llkd_ray.student.evaluate import Probabilities, class_probabilities
from llkd_ray.student.model import load_encoder, load_tokenizer, locate


@dataclass(frozen=True)
class Context:
    """What a worker is told by whoever runs it."""

    rank: int
    world_size: int
    """Workers, each with a torch.distributed process group around it."""
    device: torch.device
    report: Callable[[dict[str, Any], Path], None]
    """Takes the epoch's row of schema.EPOCHS and this worker's part of the checkpoint, which is
    gone after the call. A barrier: every worker reports every epoch."""
    restored: Path | None
    """A whole checkpoint to go on from."""


@dataclass(frozen=True)
class Work:
    """What is to be trained, the same for every worker."""

    labels: Path
    """Folder of the labelled shards."""
    validation: Path | None
    """Folder of the validation shards; None when there is no gold."""
    label_names: tuple[str, ...]
    selection: LLKDRule | AllRule
    student: StudentSection
    train: TrainSection
    seed: int


@dataclass(frozen=True)
class _Worker:
    context: Context
    work: Work
    tokenizer: Any
    engine: Any
    all_reduce: AllReduce
    rows: Rows
    validation: Rows | None


def train_worker(context: Context, work: Work) -> None:
    """Train from the restored checkpoint, or the beginning, to the last epoch.

    Raises:
        StudentError: The student cannot be loaded, or there is not one row to train on.
    """
    if context.device.type == "cpu":
        torch.set_num_threads(work.train.threads_per_worker)
    worker = _start(context, work)
    progress = Progress.start(len(work.label_names))
    used = np.zeros(len(worker.rows), dtype=np.bool_)
    if context.restored is not None:
        progress, used = checkpoint.restore(context.restored, worker.engine, rank=context.rank)
    for epoch in range(progress.epoch + 1, work.train.epochs + 1):
        # One seed per epoch and worker: a resumed run draws the dropout of an unbroken one.
        torch.manual_seed(_seed_of(work.seed, epoch, context.rank))
        progress = _run_epoch(worker, epoch, progress, used)
        with tempfile.TemporaryDirectory(prefix="llkd_ray-") as folder:
            checkpoint.save(
                Path(folder),
                worker.engine,
                worker.tokenizer,
                progress=progress,
                used=used,
                rank=context.rank,
            )
            context.report(progress.epochs[-1], Path(folder))


def learning_rate(section: TrainSection, done: float) -> float:
    """Return the learning rate when a share `done` (0 to 1) of all training lies behind.

    It rises linearly over the warm-up and falls linearly to zero. The share counts epochs, and
    within an epoch its steps: how many rows later epochs will keep is not known beforehand.
    """
    if done < section.warmup_fraction:
        return section.learning_rate * done / section.warmup_fraction
    return section.learning_rate * (1 - done) / (1 - section.warmup_fraction)


def _start(context: Context, work: Work) -> _Worker:
    all_reduce = _all_reduce()
    tokenizer = load_tokenizer(locate(work.student.model))

    def read(folder: Path, *, gold_only: bool) -> Rows:
        return read_rows(
            folder,
            tokenizer,
            work.student.max_length,
            work.label_names,
            share=Share(context.rank, context.world_size),
            gold_only=gold_only,
        )

    rows = read(work.labels, gold_only=False)
    if not all_reduce(np.array([float(len(rows))]))[0]:
        raise StudentError(f"{work.labels}: no labelled row to train on; run python jobs/label.py")
    return _Worker(
        context=context,
        work=work,
        tokenizer=tokenizer,
        engine=_engine(context, work),
        all_reduce=all_reduce,
        rows=rows,
        validation=None if work.validation is None else read(work.validation, gold_only=True),
    )


def _engine(context: Context, work: Work) -> Any:
    if context.device.type == "cpu":
        # Read by DeepSpeed's first import, hence not before this.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    # The shared-memory kernel serves inference alone, yet every worker of every run would compile
    # it with g++. Asking which kernels are compatible compiles probes; nothing asks again once
    # the module has an answer.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel("WARNING")
    model = load_encoder(work.student, work.label_names, seed=work.seed)
    train = work.train
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": max(1, train.batch_size // context.world_size),
            "gradient_accumulation_steps": 1,
            "gradient_clipping": train.max_grad_norm,
            "zero_optimization": {"stage": train.zero_stage},
            "bf16": {"enabled": train.bf16},
            "optimizer": {
                "type": "AdamW",
                "params": {
                    "lr": train.learning_rate,
                    "weight_decay": train.weight_decay,
                    # torch's own fused AdamW: 3x faster here than its unfused one, and nothing
                    # to compile.
                    "torch_adam": True,
                    "fused": True,
                },
            },
        },
    )
    return engine


def _run_epoch(worker: _Worker, epoch: int, progress: Progress, used: Bools) -> Progress:
    """Go through one epoch and return the progress after it; marks the rows used."""
    work, rows, all_reduce = worker.work, worker.rows, worker.all_reduce
    started = time.perf_counter()
    unsure = uncertainty(_score(worker, rows)) if needs_student(work.selection) else None
    scored = time.perf_counter()
    selection = select(
        work.selection,
        progress.selection,
        rows.label,
        rows.confidence,
        unsure,
        all_reduce=all_reduce,
    )
    audit = audit_classes(
        epoch, work.label_names, rows, unsure, selection=selection, all_reduce=all_reduce
    )
    used |= selection.keep
    distinct_rows = int(all_reduce(np.array([float(used.sum())]))[0])
    total = sum(row["rows"] for row in audit)
    kept = sum(row["kept"] for row in audit)
    selected = time.perf_counter()
    num_steps = -(-kept // work.train.batch_size)
    loss = _train_epoch(worker, epoch, selection, num_steps)
    trained = time.perf_counter()
    scores = _validate(worker)
    return progress.after_epoch(
        steps=num_steps,
        row_steps=kept,
        selection=selection.state,
        audit=audit,
        epoch_row={
            "epoch": epoch,
            "kept": kept,
            "rows": total,
            "distinct_rows": distinct_rows,
            "steps": progress.steps + num_steps,
            "loss": loss,
            "validation_accuracy": None if scores is None else scores[0],
            "validation_macro_f1": None if scores is None else scores[1],
            "scoring_s": scored - started if unsure is not None else 0.0,
            "selection_s": selected - scored,
            "training_s": trained - selected,
        },
    )


def _score(worker: _Worker, rows: Rows) -> Probabilities:
    """Return the student's probabilities of this worker's rows, [N, C]."""
    context, work = worker.context, worker.work
    needed = np.zeros(context.world_size)
    needed[context.rank] = -(-len(rows) // work.train.scoring_batch_size)
    return class_probabilities(
        worker.engine,
        rows.tokens,
        batch_size=work.train.scoring_batch_size,
        pad_token_id=worker.tokenizer.pad_token_id,
        num_classes=len(work.label_names),
        device=context.device,
        num_batches=int(worker.all_reduce(needed).max()),
    )


def _train_epoch(worker: _Worker, epoch: int, selection: Selection, num_steps: int) -> float | None:
    """Train on the kept rows and return the weighted mean loss, None without a row to train on."""
    work, rows, engine = worker.work, worker.rows, worker.engine
    plan = plan_epoch(rows, np.flatnonzero(selection.keep), num_steps, seed=work.seed, epoch=epoch)
    weight_sums = worker.all_reduce(
        np.array([selection.weight[chosen].sum() for chosen in plan], dtype=np.float64)
    )
    engine.train()
    loss_sum = 0.0
    for step, (chosen, weight_sum) in enumerate(zip(plan, weight_sums, strict=True)):
        rate = learning_rate(work.train, (epoch - 1 + (step + 0.5) / num_steps) / work.train.epochs)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        loss_sum += _take_step(worker, chosen, selection.weight[chosen], weight_sum)
    total = float(worker.all_reduce(np.array([loss_sum]))[0])
    return total / weight_sums.sum() if weight_sums.sum() else None


def _take_step(worker: _Worker, chosen: Ints, weight: Floats, weight_sum: float) -> float:
    """Take one optimizer step and return this worker's sum of w CE."""
    device = worker.context.device
    inputs = pad(worker.rows.tokens, chosen, worker.tokenizer.pad_token_id, device)
    logits = worker.engine(**inputs).logits.float()
    if len(chosen):
        labels = torch.from_numpy(worker.rows.label[chosen]).to(device)
        weights = torch.from_numpy(weight).to(device, torch.float32)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        weighted = (weights * losses).sum()
    else:
        weighted = logits.sum() * 0.0
    # DeepSpeed takes the mean of the workers' gradients; the loss of the step is their sum.
    scale = worker.context.world_size / weight_sum if weight_sum else 0.0
    worker.engine.backward(weighted * scale)
    worker.engine.step()
    return float(weighted.detach())


def _validate(worker: _Worker) -> tuple[float, float] | None:
    if worker.validation is None:
        return None
    predicted = _score(worker, worker.validation).argmax(axis=1)
    return score_validation(
        worker.validation.gold,
        predicted,
        len(worker.work.label_names),
        all_reduce=worker.all_reduce,
    )


def _all_reduce() -> AllReduce:
    """Return a sum over the workers in float64, through gloo whatever the gradients use."""
    group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def all_reduce(values: Floats) -> Floats:
        tensor = torch.from_numpy(values.copy())
        dist.all_reduce(tensor, group=group)
        summed: Floats = tensor.numpy()
        return summed

    return all_reduce


def _seed_of(seed: int, epoch: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])
