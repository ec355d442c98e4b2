"""Two deployments on Ray Serve: the student's answers HTTP and asks the teacher's by its handle."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.exceptions
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from llkd_ray.config import CascadeSection, ServeSection
from llkd_ray.serving.cascade import CascadeClassifier, Handover
from llkd_ray.serving.deploy import endpoint_app, open_student, student_environment
from llkd_ray.serving.protocol import Classifier, Floats, Refusal, model_card
from llkd_ray.serving.student import student_calibration, student_labels
from llkd_ray.serving.teacher import TeacherClassifier, TeacherModel
from llkd_ray.teacher.answers import TeacherDiedError
from llkd_ray.teacher.engine import engine_environment

_log = logging.getLogger(__name__)
_SOON = {"Retry-After": "1"}


class OnCall:
    """What runs in a replica of a cascade's teacher: no web application, only calls by handle."""

    def __init__(self, open_model: Callable[[], TeacherClassifier]) -> None:
        """Load the model; the replica takes no call before that."""
        self._classifier = open_model()

    async def answer(self, texts: list[str]) -> Floats:
        """Return the teacher's probabilities [N, C], NaN where it has no answer."""
        return await self._classifier.answer(texts)

    def check_health(self) -> None:
        """Let Serve replace the replica when this raises."""
        self._classifier.check_health()

    async def __del__(self) -> None:
        # As with Endpoint.
        if hasattr(self, "_classifier"):
            await self._classifier.close()


def cascade_app(
    folder: Path,
    name: str,
    max_length: int,
    config: ServeSection,
    *,
    handover: Handover,
    teacher: TeacherModel,
    cascade: CascadeSection,
) -> serve.Application:
    """Describe the endpoint of a student that asks its teacher where it is unsure.

    The teacher is a deployment of its own behind the student's, so each has its own replicas; one
    that is never asked is not started.

    Args:
        folder: Of the exported student, as for `student_app`.
        name: What the endpoint calls itself.
        max_length: Tokens of a text that the student reads.
        config: The endpoint, and the student's replicas.
        handover: Who answers which text.
        teacher: Task, engine and calibration.
        cascade: The teacher's replicas.

    Raises:
        StudentError: There is no student in the folder, or not in the form of `serve.backend`.
        ConfigError: The token's environment variable is empty.
    """
    labels = student_labels(folder)
    assert labels == teacher.task.label_names, "student and teacher know the classes in one order"
    calibration = f"student {student_calibration(folder)}, teacher {teacher.kind}"
    card = model_card("cascade", name, labels, config, calibration)
    student = open_student(folder, max_length, config)
    asked = []
    if handover.threshold > 0:
        environment = engine_environment(teacher.teacher.engine, config.threads)
        asked.append(
            serve.deployment(
                name="teacher",
                num_replicas=cascade.teacher_replicas,
                ray_actor_options={
                    "num_cpus": cascade.teacher_cpus_per_replica,
                    "num_gpus": cascade.teacher_gpus_per_replica,
                    "runtime_env": {"env_vars": environment},
                },
                max_ongoing_requests=cascade.teacher_max_ongoing_requests,
                max_queued_requests=cascade.teacher_max_queued_requests,
                max_constructor_retry_count=1,
                graceful_shutdown_timeout_s=config.deadline_s,
            )(OnCall).bind(functools.partial(TeacherClassifier, teacher))
        )
    open_model = functools.partial(_open, student, handover)
    return endpoint_app(open_model, card, config, student_environment(config), *asked)


def _open(
    open_student: Callable[[], Classifier], handover: Handover, *asked: DeploymentHandle[Any]
) -> CascadeClassifier:
    async def ask(texts: list[str]) -> Floats:
        [teacher] = asked
        try:
            answered: Floats = await teacher.answer.remote(texts)
        except BackPressureError:
            raise Refusal(429, "too many texts wait for the teacher", _SOON) from None
        # The engine's process may be dead before Serve has seen it.
        except (
            DeploymentUnavailableError,
            ray.exceptions.RayActorError,
            TeacherDiedError,
        ) as error:
            _log.warning("the teacher cannot be asked: %s", error)
            raise Refusal(503, "the teacher cannot be asked now", _SOON) from error
        return answered

    return CascadeClassifier(open_student(), ask, handover)
