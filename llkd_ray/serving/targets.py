"""From an experiment's artifacts to what Serve runs."""

from typing import Literal

from ray import serve

from llkd_ray.config import ServeSection, VLLMTeacher
from llkd_ray.errors import TeacherError
from llkd_ray.lineage import Lineage
from llkd_ray.serving.deploy import student_app, teacher_app
from llkd_ray.serving.teacher import TeacherModel
from llkd_ray.student.train import MODEL
from llkd_ray.teacher.actor import pool_of
from llkd_ray.teacher.calibration import read_calibrations


def application_of(
    target: Literal["student", "teacher"], lineage: Lineage, config: ServeSection
) -> serve.Application:
    """Describe the endpoint of an experiment's student or teacher.

    Args:
        target: Which of the two.
        lineage: Names the artifacts; the run's folder must be the same on every node.
        config: The endpoint.

    Raises:
        ArtifactError: The student, or the teacher's calibration, is not made yet.
        ConfigError: The token's environment variable is empty.
    """
    experiment = lineage.experiment
    match target:
        case "student":
            folder = (lineage.served.require().path / MODEL).resolve()
            name = f"student-{lineage.student().fingerprint}"
            return student_app(folder, name, experiment.student.max_length, config)
        case "teacher":
            labels = lineage.labels.require()
            fitted = read_calibrations(labels.path / "calibrations.json")
            teacher = experiment.teacher
            if not isinstance(teacher, VLLMTeacher):
                raise TeacherError(
                    f'serve.target="teacher": a teacher of kind {teacher.kind!r} is not served '
                    "here; only a vllm one is"
                )
            model = TeacherModel(
                task=experiment.task,
                teacher=teacher,
                pool=pool_of(experiment),
                # Behind the endpoint is the teacher alone, without what was stacked on it.
                calibration=fitted.get(experiment.calibration.kind, fitted["batch"]),
                cache=experiment.cache,
            )
            return teacher_app(model, f"teacher-{labels.fingerprint}", config)
