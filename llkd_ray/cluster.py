"""Join the Ray cluster that runs a stage, or start a private one and stop it."""

import contextlib
import logging
import os
from collections.abc import Iterator

import ray

from llkd_ray.config import RaySection
from llkd_ray.errors import ClusterError

# These warn of what is meant to be: a private cluster asks for a token that Ray makes itself, a
# library joins the session that a job has opened, and progress is shown by the job.
_QUIET = (
    "ray._private.authentication",
    "ray._private.worker",
    "ray.data._internal.execution.streaming_executor",
    "ray.data._internal.progress",
    "ray.llm",
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
    address = os.environ.get("RAY_ADDRESS") or config.address
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
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
