"""Join the Ray cluster that runs a stage, or start a private one and stop it."""

import contextlib
import functools
import logging
import os
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

from llkd_ray.config import RaySection
from llkd_ray.errors import ClusterError, LLKDError

# These warn of what is meant to be: a private cluster asks for a token that Ray makes itself, a
# library joins the session that a job has opened, and progress is shown by the job.
_QUIET = (
    "ray._private.authentication",
    "ray._private.worker",
    "ray.data._internal.execution.streaming_executor",
    "ray.data._internal.progress",
    "ray.llm",
)

# A task that reads or writes shards needs little; with whole CPUs a pool of teachers, each of
# which holds some, could starve them.
TASK_CPUS = 0.25
_TASKS_IN_FLIGHT = 64

# An OpenMP thread that waits for its siblings spins for milliseconds by default. Where anything
# else runs on the cores (Serve's proxy does), it so keeps the very thread that it waits for from
# running: 64 texts took up to 2.7 s instead of 0.14 s on two shared cores.
BRIEF_SPIN = {"GOMP_SPINCOUNT": "2000"}
"""Environment of a process that answers."""
TRAINING_SPIN = {"GOMP_SPINCOUNT": "10000"}
"""Environment of a process that trains: its threads meet so often that sleeping costs more."""

_log = logging.getLogger(__name__)

In = TypeVar("In")
Out = TypeVar("Out")


def each(
    function: Callable[[In], Out], items: Iterable[In], num_cpus: float = TASK_CPUS
) -> Iterator[Out]:
    """Run a function over items as Ray tasks, and yield the results in the order of the items.

    The function and its results are pickled, so both are to be small; a number of items is under
    way at a time, so that neither grows with how many there are. Needs a `ray_session`.
    """

    @ray.remote(num_cpus=num_cpus)
    def task(item: In) -> Out:
        return function(item)

    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(task.remote(item))
        if len(waiting) == _TASKS_IN_FLIGHT:
            yield result_of(waiting.popleft())
    while waiting:
        yield result_of(waiting.popleft())


def result_of(task: Any) -> Any:
    """Return what a Ray task returns, and raise what it raised for people to read as it was."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LLKDError):
            raise error.cause from None
        raise


@functools.cache
def end_children_with_actor() -> "subprocess.Popen[bytes] | None":
    """See to it that the processes of this Ray actor end with it, however it ends.

    Ray ends the process group of a worker that died, but not when the node's raylet is gone too,
    and a private raylet goes with its driver. vLLM's engine does not notice: it would hold its
    memory for ever. So a shell waits for the end of a pipe that this process alone holds open,
    and then kills the group. Without effect outside an actor.

    Returns:
        The shell; to be held for as long as the actor is to live.
    """
    in_actor = ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
    if not in_actor or os.getpgrp() != os.getpid():
        return None
    return subprocess.Popen(
        ["sh", "-c", f"read -r _; kill -KILL -- -{os.getpid()}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@contextlib.contextmanager
def ray_session(config: RaySection) -> Iterator[None]:
    """Hold a connection to Ray for the length of the block.

    RAY_ADDRESS (set by `ray job submit`) wins over `config.address`. A session inside a session
    uses the outer one, so that jobs/run.py starts Ray once.

    Raises:
        ClusterError: There is no cluster at that address.
    """
    if ray.is_initialized():
        yield
        return
    address = _address(config)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray starts workers at niceness 15, at which the waiting of vLLM's processes for each other
    # costs a quarter of an engine's speed where they share all cores.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray ends a worker that had nothing to do for a second, as there is between the steps of most
    # stages, and starting the next one costs more than that.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "10000")
    # Serve's proxies read this, and send a request again whose replica died.
    os.environ.setdefault(
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "llkd_ray.serving.ingress.middlewares"
    )
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if address == "local":
            ray.init(
                address="local",
                num_cpus=config.num_cpus,
                object_store_memory=config.object_store_mb * 1_000_000,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise ClusterError(
            f"no Ray cluster at {address} ({error}); start one with `ray start --head`, or set "
            'ray.address="local"'
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def require_room(config: RaySection, actors: int, num_cpus: float, num_gpus: float = 0.0) -> None:
    """Refuse to wait for actors that a private Ray will never have room for.

    Ray itself would wait without a word: for the actors that do not fit, or, where they hold every
    CPU, for the tasks that read shards for them. A cluster that is joined may grow, by its
    autoscaler or by nodes that are still on their way, so there the wait is only told.

    Args:
        config: Of the session that is held.
        actors: How many have to run at once, teacher.actors.min.
        num_cpus: CPUs that one reserves.
        num_gpus: GPUs that one reserves.

    Raises:
        ClusterError: The Ray is private and too small.
    """
    has: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = has.get("CPU", 0.0), has.get("GPU", 0.0)
    cpus_asked = actors * num_cpus + TASK_CPUS
    if cpus_asked <= cpus and actors * num_gpus <= gpus:
        return
    if _address(config) != "local":
        _log.info(
            "%d teachers ask for %g CPUs and %g GPUs, and the cluster has %g and %g: they wait "
            "until it has grown",
            *(actors, cpus_asked, actors * num_gpus, cpus, gpus),
        )
        return
    if actors * num_gpus > gpus:
        raise ClusterError(
            f"teacher.actors.min = {actors} teachers with {num_gpus:g} GPUs each ask for "
            f"{actors * num_gpus:g} GPUs, and this machine has {gpus:g}; lower "
            "teacher.actors.num_gpus or teacher.actors.min, or join a larger cluster with "
            "ray.address"
        )
    raise ClusterError(
        f"teacher.actors.min = {actors} times teacher.actors.num_cpus = {num_cpus:g} leaves no "
        f"{TASK_CPUS:g} CPUs for the tasks that read shards, out of the {cpus:g} of this private "
        f"Ray; set teacher.actors.num_cpus to {(cpus - TASK_CPUS) / actors:g} at most, or lower "
        "teacher.actors.min, or raise ray.num_cpus"
    )


def _address(config: RaySection) -> str:
    return os.environ.get("RAY_ADDRESS") or config.address
