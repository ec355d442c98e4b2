"""Rows streamed through teacher actors by Ray Data: quietly, and failing in the teacher's words."""

import gc
import logging
from collections.abc import Iterator

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset

from llkd_ray.errors import TeacherError

# They log the whole traceback of an error that is then raised.
_LOG_WHAT_IS_RAISED = (
    "ray.data.exceptions",
    "ray.data._internal.execution.streaming_executor_state",
)


def data_context() -> DataContext:
    """Return Ray Data's settings, for the datasets that are made after this."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Wrapped, an actor's error would have lost its type.
    context.raise_original_map_exception = True
    for name in _LOG_WHAT_IS_RAISED:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return context


def tables(dataset: Dataset) -> Iterator[pa.Table]:
    """Run a dataset and yield what its last actors return, in no order.

    Raises:
        TeacherError: What a teacher in an actor said of itself, which is what the user can act on.
    """
    said = None
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except ray.exceptions.RayTaskError as error:
        if not isinstance(error.cause, TeacherError):
            raise
        # Ray Data puts lines of its own below the sentence.
        said = str(error.cause).partition("\n")[0]
    if said is not None:
        # Actors end when nothing refers to them any more, and until then they hold their CPUs: what
        # is raised here must not have Ray Data's error, and all it refers to, for its context.
        gc.collect()
        raise TeacherError(said)
