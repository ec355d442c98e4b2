"""A teacher that cannot be asked, in an actor of Ray Data.

A module of its own, that comes after those of the endpoints: under pytest its actors have kept
their CPUs for minutes in some runs, by what is not known, and an endpoint would wait for them.
"""

import logging
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import Run

from llkd_ray import schema
from llkd_ray.config import SamplingSection
from llkd_ray.errors import TeacherError
from llkd_ray.guided.write import Round, write
from llkd_ray.teacher.actor import Opening


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_what_an_actor_says_of_its_teacher_is_one_sentence_and_nothing_is_logged_before_it(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    nobody = Run(
        (
            *run.overrides,
            "teacher.kind=http",
            "teacher.url=http://127.0.0.1:9/v1",
            "teacher.model=m",
            "teacher.max_retries=0",
        )
    )
    nobody.stage("prepare")
    with caplog.at_level(logging.ERROR), pytest.raises(TeacherError) as labelling:
        nobody.stage("label")
    prompt = {"prompt_id": "p", "label": "person", "first": 0, "samples": 1, "text": "Question:"}
    with caplog.at_level(logging.ERROR), pytest.raises(TeacherError) as writing:
        write(
            pa.Table.from_pylist([prompt], schema.PROMPTS),
            Path(nobody.experiment.runs) / "parts",
            opening=Opening.of(nobody.experiment),
            sampling=SamplingSection(),
            of=Round(1, 0),
        )
    said = "http://127.0.0.1:9/v1 cannot be reached"
    for error in (labelling, writing):
        assert str(error.value).startswith(said)
        assert "\n" not in str(error.value)
    assert str(writing.value).endswith("run the same command again to go on")
    assert [record.getMessage() for record in caplog.records if record.levelno >= 40] == []
    # An actor ends when nothing refers to it any more: Ray Data's error, which refers to all of its
    # actors, is no context of what is raised.
    assert labelling.value.__context__ is None
    assert isinstance(writing.value.__context__, TeacherError)
    assert writing.value.__context__.__context__ is None
