"""Run the training loop on Ray Train and watch it."""

import contextlib
import errno
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from llkd_ray import storage
from llkd_ray.cluster import TRAINING_SPIN
from llkd_ray.config import TrainSection
from llkd_ray.errors import ClusterError, LLKDError
from llkd_ray.student.loop import train_worker
from llkd_ray.student.stopping import SCORE, criterion
from llkd_ray.student.worker import Context, Work

_log = logging.getLogger(__name__)
RUN = "ray_train"
"""Ray Train's own folder, in the artifact while it is made."""
SIGNALS = "signals"
"""Folder of schema.SIGNALS."""
# Ray Train waits a minute for room before each try: ten minutes for a cluster that grows.
_START_TRIES = 10


def fit(work: Work, out: Path) -> tuple[Path, Path]:
    """Run Ray Train to the end and return the folders of the last and the best checkpoint.

    Goes on from the last checkpoint that an earlier call left under `out`.

    Raises:
        StudentError: The student cannot be loaded, or there is not one row to train on.
        ClusterError: Workers found no room, or died more often than `train.max_failures`.
    """
    section = work.train
    scored = criterion(section.stopping, has_gold=work.validation is not None) != "last"
    few = section.num_workers if isinstance(section.num_workers, int) else section.num_workers[0]
    resources = {"CPU": section.cpus_per_worker, **({"GPU": 1.0} if section.use_gpu else {})}
    _warn_of_no_room(few, resources)
    # With the driver, as Ray Train's controller: no other node's loss takes them away.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    filesystem, storage_path = storage.filesystem_of(out)
    trainer = TorchTrainer(
        _train_on_ray,
        train_loop_config={
            "work": work,
            "signals": str((out / SIGNALS).resolve()) if section.keep_signals else None,
        },
        scaling_config=ScalingConfig(
            num_workers=section.num_workers,
            use_gpu=section.use_gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=RUN,
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(
                max_failures=section.max_failures, controller_failure_limit=_START_TRIES
            ),
            # Beside the one to keep, Ray Train always keeps the latest, to resume from.
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=SCORE if scored else None
            ),
            callbacks=[_ToDriver(queue)],
            worker_runtime_env={"env_vars": TRAINING_SPIN},
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
    best = result.get_best_checkpoint(SCORE, "max") if scored else result.checkpoint
    assert best is not None
    assert result.checkpoint is not None
    # Where both are in a store, these are the paths of this node's mirror.
    last_name, best_name = (Path(checkpoint.path).name for checkpoint in (result.checkpoint, best))
    return out / RUN / last_name, out / RUN / best_name


def _train_on_ray(config: dict[str, Any]) -> None:
    """Run one worker's loop inside a Ray Train worker."""
    context = ray_train.get_context()
    restored = ray_train.get_checkpoint()

    def report(row: dict[str, Any] | None, folder: Path, name: str) -> None:
        ray_train.report(
            row or {},
            checkpoint=Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=name,
        )

    with contextlib.ExitStack() as stack:
        train_worker(
            Context(
                rank=context.get_world_rank(),
                world_size=context.get_world_size(),
                device=get_device(),
                report=report,
                restored=Path(stack.enter_context(restored.as_directory())) if restored else None,
                signals=Path(config["signals"]) if config["signals"] else None,
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
        # The controller runs an event loop, which must not wait. Reports within an epoch are empty.
        if metrics[0]:
            self._actor.put_nowait.remote(metrics[0])


def _watch(future: "Future[Any]", queue: Queue, work: Work) -> None:
    """Show one line per epoch, and a bar in a terminal, until training is over."""
    epochs = None if work.train.steps else work.train.epochs
    with logging_redirect_tqdm(), tqdm(total=epochs, unit="epoch", disable=None) as bar:
        for row in _reports(future, queue):
            scores = _scores(row)
            loss = "no row to train on" if row["loss"] is None else f"loss {row['loss']:.3f}"
            seconds = row["scoring_s"] + row["selection_s"] + row["training_s"]
            _log.info(
                "%s: epoch %d%s: kept %d of %d rows, %s%s (%.0f s)",
                *(work.selection.rule, row["epoch"], f" of {epochs}" if epochs else ""),
                *(row["kept"], row["rows"]),
                *(loss, scores, seconds),
            )
            bar.update(row["epoch"] - bar.n)


def _scores(row: dict[str, Any]) -> str:
    parts = []
    if row["validation_macro_f1"] is not None:
        parts.append(f"validation accuracy {row['validation_accuracy']:.3f}")
        parts.append(f"macro-F1 {row['validation_macro_f1']:.3f}")
    if row["held_out_macro_f1"] is not None:
        parts.append(f"macro-F1 on held-out labels {row['held_out_macro_f1']:.3f}")
    return "".join(f", {part}" for part in parts)


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
        if isinstance(failure, LLKDError) or _is_full_disk(failure):
            return failure
    if any(isinstance(failure, ray.exceptions.RayActorError) for failure in failures):
        return ClusterError(
            f"training workers died more than train.max_failures = {section.max_failures} times, "
            f"the last time: {failures[0]}; mend the cause (often memory: lower train.batch_size) "
            "and run the same command again to go on from the last epoch"
        )
    return error


def _is_full_disk(failure: Exception) -> bool:
    return isinstance(failure, OSError) and failure.errno == errno.ENOSPC


def _warn_of_no_room(num_workers: int, resources: dict[str, float]) -> None:
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name, amount in resources.items():
        if num_workers * amount > there.get(name, 0):
            _log.warning(
                "training asks for %g %s, the cluster has %g: waiting for it to grow "
                "(or lower train.num_workers)",
                *(num_workers * amount, name, there.get(name, 0)),
            )
