"""From an experiment's artifacts to what Serve runs."""

import logging
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve

from llkd_ray.config import ServeSection, VLLMTeacher, load_experiment
from llkd_ray.errors import TeacherError
from llkd_ray.lineage import Lineage
from llkd_ray.schema import CascadeSummary
from llkd_ray.serving.cascade import Handover
from llkd_ray.serving.composition import cascade_app
from llkd_ray.serving.deploy import APP, PROXIES, http_options, student_app, teacher_app
from llkd_ray.serving.protocol import Kind
from llkd_ray.serving.teacher import TeacherModel, served_calibration
from llkd_ray.serving.tradeoff import SUMMARY
from llkd_ray.student.train import MODEL
from llkd_ray.teacher.actor import pool_of

_log = logging.getLogger(__name__)


class Named(BaseModel):
    """What a Serve config names in `args`: an experiment, as on the command line of a job."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    experiment: str
    """Path of its TOML, on every node that serves."""
    overrides: tuple[str, ...] = ()


def named(args: Named) -> serve.Application:
    """Describe an experiment's endpoint; what a Serve config imports, see `serve_config`.

    Raises:
        LLKDError: As `load_experiment` and `application_of` do.
    """
    experiment = load_experiment(args.experiment, args.overrides)
    return application_of(experiment.serve.target, Lineage(experiment), experiment.serve)


def serve_config(args: Named) -> dict[str, Any]:
    """Return the Serve config of an experiment's endpoint, for `serve deploy` and KubeRay.

    Replicas, queues and deadlines are not in it: `named` takes them from the experiment.

    Raises:
        ConfigError: The experiment cannot be read.
    """
    config = load_experiment(args.experiment, args.overrides).serve
    return {
        "proxy_location": PROXIES,
        "http_options": http_options(config, config.port),
        "applications": [
            {
                "name": APP,
                "route_prefix": "/",
                "import_path": f"{named.__module__}:{named.__name__}",
                "args": args.model_dump(mode="json", exclude_defaults=True),
            }
        ],
    }


def model_name(target: Kind, lineage: Lineage) -> str:
    """Return what the endpoint of an experiment calls itself."""
    match target:
        case "student":
            return f"{lineage.own.noun}-{lineage.own.fingerprint}"
        case "teacher":
            return f"teacher-{lineage.labels.fingerprint}"
        case "cascade":
            return f"cascade-{lineage.cascade.fingerprint}"


def application_of(target: Kind, lineage: Lineage, config: ServeSection) -> serve.Application:
    """Describe the endpoint of an experiment's student, of its teacher, or of both.

    Args:
        target: Which of them.
        lineage: Names the artifacts; the run's folder must be the same on every node.
        config: The endpoint.

    Raises:
        ArtifactError: The student, the teacher's calibration, or the cascade's threshold is not
            made yet.
        TeacherError: The teacher is not one that can be served.
        ConfigError: The token's environment variable is empty.
    """
    experiment = lineage.experiment
    max_length, name = experiment.student.max_length, model_name(target, lineage)
    match target:
        case "student":
            folder = (lineage.served.require().path / MODEL).resolve()
            return student_app(folder, name, max_length, config)
        case "teacher":
            return teacher_app(_teacher(lineage), name, config)
        case "cascade":
            folder = (lineage.served.require().path / MODEL).resolve()
            chosen = CascadeSummary.model_validate_json(
                (lineage.cascade.require().path / SUMMARY).read_bytes()
            )
            _log.info("cascade: threshold %.3f: %s", chosen.threshold, chosen.reason)
            return cascade_app(
                folder,
                name,
                max_length,
                config,
                handover=Handover(chosen.threshold, experiment.cascade.abstain_below),
                teacher=_teacher(lineage),
                cascade=experiment.cascade,
            )


def _teacher(lineage: Lineage) -> TeacherModel:
    experiment, labels = lineage.experiment, lineage.labels.require()
    teacher = experiment.teacher
    if not isinstance(teacher, VLLMTeacher):
        raise TeacherError(
            f"a teacher of kind {teacher.kind!r} is not served here, neither by itself nor in a "
            "cascade; only a vllm one is"
        )
    kind, calibration = served_calibration(labels.path, experiment.calibration.kind)
    if kind != experiment.calibration.kind:
        _log.warning(
            "the labels are calibrated by %r, which reads more than the teacher's answer; the "
            "teacher is served by itself, calibrated by %r",
            experiment.calibration.kind,
            kind,
        )
    return TeacherModel(
        task=experiment.task,
        teacher=teacher,
        pool=pool_of(experiment),
        calibration=calibration,
        kind=kind,
        cache=experiment.cache,
    )
