"""Run the training loop on Ray Train, watch it, and export the best epoch."""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import ray
from ray import train as ray_train
from ray.train import Checkpoint
from ray.train.torch import get_device

# Ray Train V2 by its own name: ray.train and ray.train.torch hand out the same classes at run time,
# but a type checker reads V1 there.
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.queue import Empty, Queue
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from llkd_ray import embedded, schema
from llkd_ray.artifacts import Rows
from llkd_ray.config import AllRule, LLKDRule, StudentSection, TrainSection
from llkd_ray.corpus import read_shards
from llkd_ray.errors import ClusterError, LLKDError, StudentError
from llkd_ray.student.checkpoint import STUDENT, Progress, read_progress
from llkd_ray.student.export import Card, export
from llkd_ray.student.loop import Context, Work, train_worker
from llkd_ray.student.model import check_student

_log = logging.getLogger(__name__)
MODEL = "model"
"""Folder of the exported student inside its artifact."""
_RUN = "ray_train"
_SCORE = "validation_macro_f1"
# Ray Train waits a minute for room before each try: ten minutes for a cluster that grows.
_START_TRIES = 10


@dataclass(frozen=True)
class Trained:
    """What a training run was, for the manifest."""

    rows: Rows
    """Labelled rows in the shards, all of which were loaded."""
    details: dict[str, Any]
    """steps, rows_used_fraction (row-steps over rows times epochs), distinct_rows, best_epoch,
    validation_accuracy and validation_macro_f1 of that epoch, seconds of this call."""


def train(
    labels: Path,
    out: Path,
    *,
    corpus: Path,
    label_names: tuple[str, ...],
    selection: LLKDRule | AllRule,
    student: StudentSection,
    section: TrainSection,
    seed: int,
) -> Trained:
    """Train a student on the teacher's labels and leave the best epoch as a plain model.

    Needs a connection to Ray. A run that was killed goes on from its last whole epoch when called
    again with the same `out`.

    Reads:
        labels/unlabeled/shard-*.parquet (schema.labels) and, to choose the best epoch where
        there is gold, corpus/validation/shard-*.parquet (schema.TEXT).

    Writes:
        out/model (Hugging Face folder with model card), out/audit.parquet (schema.AUDIT),
        out/epochs.parquet (schema.EPOCHS).

    Args:
        labels: Folder of the labels artifact.
        out: Folder of the student artifact in the making; on more than one machine, shared.
        corpus: Folder of the corpus artifact.
        label_names: The C classes.
        selection: The rule that chooses rows.
        student: Which encoder.
        section: How to train.
        seed: Of head, order and dropout.

    Raises:
        StudentError: The encoder cannot be loaded, or there is no row to train on.
        ClusterError: Workers found no room, or died more often than `train.max_failures`.
    """
    started = time.perf_counter()
    check_student(student)
    folder = labels / "unlabeled"
    num_rows = _count(folder)
    if not num_rows:
        raise StudentError(f"{folder}: no labelled row to train on; run python jobs/label.py first")
    validation = corpus / "validation"
    has_gold = _count(validation, with_gold=True) > 0
    work = Work(
        labels=folder.resolve(),
        validation=validation.resolve() if has_gold else None,
        label_names=label_names,
        selection=selection,
        student=_found_from_anywhere(student),
        train=section,
        seed=seed,
    )
    _drop_broken_run(out / _RUN)
    last, best = _fit(work, out)
    progress, best_epoch = read_progress(last), read_progress(best).epoch
    details = _details(progress, best_epoch, num_rows)
    pq.write_table(pa.Table.from_pylist(list(progress.audit), schema.AUDIT), out / "audit.parquet")
    pq.write_table(
        pa.Table.from_pylist(list(progress.epochs), schema.EPOCHS), out / "epochs.parquet"
    )
    card = Card(
        base_model=student.model,
        label_names=label_names,
        max_length=student.max_length,
        rows=num_rows,
        rule=selection.rule,
        epochs=section.epochs,
        details=details,
    )
    export(best / STUDENT, out / MODEL, card)
    shutil.rmtree(out / _RUN)
    seconds = round(time.perf_counter() - started, 3)
    return Trained(
        rows=Rows(taken=num_rows, kept=progress.epochs[-1]["rows"], rejected=0),
        details={**details, "seconds": seconds},
    )


def _fit(work: Work, out: Path) -> tuple[Path, Path]:
    """Run Ray Train to the end and return the folders of the last and the best checkpoint."""
    section = work.train
    resources = {"CPU": section.cpus_per_worker, **({"GPU": 1.0} if section.use_gpu else {})}
    _warn_of_no_room(section.num_workers, resources)
    queue = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        _train_on_ray,
        train_loop_config={"work": work},
        scaling_config=ScalingConfig(
            num_workers=section.num_workers,
            use_gpu=section.use_gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=_RUN,
            storage_path=str(out.resolve()),
            failure_config=FailureConfig(
                max_failures=section.max_failures, controller_failure_limit=_START_TRIES
            ),
            # Beside the one to keep, Ray Train always keeps the latest, to resume from.
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=_SCORE if work.validation else None
            ),
            callbacks=[_ToDriver(queue)],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    # In the main thread, Ray Train would take over Ctrl-C for good.
    pool = ThreadPoolExecutor(1)
    try:
        future = pool.submit(trainer.fit)
        _watch(future, queue, work)
        result = future.result()
    except WorkerGroupError as error:
        raise _explain(error, section) from error
    except ControllerError as error:
        raise ClusterError(
            f"no room for {section.num_workers} training workers with {resources} each "
            f"({error.controller_failure}); lower train.num_workers or train.cpus_per_worker, or "
            "give the cluster more"
        ) from error
    finally:
        pool.shutdown(wait=False)
        queue.shutdown()
    best = result.get_best_checkpoint(_SCORE, "max") if work.validation else result.checkpoint
    assert best is not None
    assert result.checkpoint is not None
    return Path(result.checkpoint.path), Path(best.path)


def _train_on_ray(config: dict[str, Any]) -> None:
    """Run one worker's loop inside a Ray Train worker."""
    context = ray_train.get_context()
    restored = ray_train.get_checkpoint()

    def report(row: dict[str, Any], folder: Path) -> None:
        ray_train.report(
            row,
            checkpoint=Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=f"epoch-{row['epoch']:04d}",
        )

    with contextlib.ExitStack() as stack:
        train_worker(
            Context(
                rank=context.get_world_rank(),
                world_size=context.get_world_size(),
                device=get_device(),
                report=report,
                restored=Path(stack.enter_context(restored.as_directory())) if restored else None,
            ),
            config["work"],
        )


class _ToDriver(UserCallback):
    """Sends each epoch's row from Ray Train's controller, a process of its own, to the driver."""

    def __init__(self, queue: Queue) -> None:
        self._actor: Any = queue.actor

    def after_report(
        self,
        run_context: Any,  # noqa: ARG002 - Ray Train passes it by name.
        metrics: list[dict[str, Any]],
        checkpoint: Checkpoint | None,  # noqa: ARG002 - likewise.
    ) -> None:
        # The controller runs an event loop, which must not wait.
        self._actor.put_nowait.remote(metrics[0])


def _watch(future: "Future[Any]", queue: Queue, work: Work) -> None:
    """Show one line per epoch, and a bar in a terminal, until training is over."""
    epochs = work.train.epochs
    with logging_redirect_tqdm(), tqdm(total=epochs, unit="epoch", disable=None) as bar:
        for row in _reports(future, queue):
            scores = (
                f", validation accuracy {row['validation_accuracy']:.3f}, "
                f"macro-F1 {row[_SCORE]:.3f}"
                if work.validation
                else ""
            )
            loss = "no row to train on" if row["loss"] is None else f"loss {row['loss']:.3f}"
            seconds = row["scoring_s"] + row["selection_s"] + row["training_s"]
            _log.info(
                "%s: epoch %d of %d: kept %d of %d rows, %s%s (%.0f s)",
                *(work.selection.rule, row["epoch"], epochs, row["kept"], row["rows"]),
                *(loss, scores, seconds),
            )
            bar.update(row["epoch"] - bar.n)


def _reports(future: "Future[Any]", queue: Queue) -> Iterator[dict[str, Any]]:
    while not future.done():
        with contextlib.suppress(Empty):
            yield queue.get(timeout=1.0)
    with contextlib.suppress(Empty):
        while True:
            yield queue.get(block=False)


def _explain(error: WorkerGroupError, section: TrainSection) -> Exception:
    """Return what the user should hear of the workers' failures."""
    failures = [
        # Ray Train wraps what the loop raised, to keep its traceback.
        getattr(failure, "_base_exc", failure)
        for failure in error.worker_failures.values()
    ]
    for failure in failures:
        if isinstance(failure, LLKDError):
            return failure
    if any(isinstance(failure, ray.exceptions.RayActorError) for failure in failures):
        return ClusterError(
            f"training workers died more than train.max_failures = {section.max_failures} times, "
            f"the last time: {failures[0]}; mend the cause (often memory: lower train.batch_size) "
            "and run the same command again to go on from the last epoch"
        )
    return error


def _warn_of_no_room(num_workers: int, resources: dict[str, float]) -> None:
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name, amount in resources.items():
        if num_workers * amount > there.get(name, 0):
            _log.warning(
                "training asks for %g %s, the cluster has %g: waiting for it to grow "
                "(or lower train.num_workers)",
                *(num_workers * amount, name, there.get(name, 0)),
            )


def _found_from_anywhere(student: StudentSection) -> StudentSection:
    """Make the folder of a model absolute: Ray Train's workers run in folders of their own."""
    if student.model in embedded.STUDENTS:
        return student
    return student.model_copy(update={"model": str(Path(student.model).expanduser().resolve())})


def _drop_broken_run(run: Path) -> None:
    """Remove a run whose list of checkpoints a kill left half-written: Ray Train refuses it."""
    for snapshot in run.glob("*snapshot*.json"):
        try:
            json.loads(snapshot.read_text(encoding="utf-8"))
        except ValueError:
            _log.warning("%s: half-written; training starts over", snapshot)
            shutil.rmtree(run)
            return


def _details(progress: Progress, best_epoch: int, num_rows: int) -> dict[str, Any]:
    best = progress.epochs[best_epoch - 1]
    return {
        "steps": progress.steps,
        "rows_used_fraction": progress.row_steps / (num_rows * progress.epoch),
        "distinct_rows": progress.epochs[-1]["distinct_rows"],
        "best_epoch": best_epoch,
        "validation_accuracy": best["validation_accuracy"],
        "validation_macro_f1": best["validation_macro_f1"],
    }


def _count(folder: Path, *, with_gold: bool = False) -> int:
    files = [str(path) for path in read_shards(folder)]
    if not files:
        return 0
    condition = ds.field("gold").is_valid() if with_gold else None
    return int(ds.dataset(files).count_rows(filter=condition))
