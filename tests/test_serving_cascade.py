"""Student and teacher, both real, served as a cascade and asked over HTTP."""

import asyncio

import httpx
import numpy as np
import pytest
from conftest import QUICKSTART
from plain_teacher import plain_probabilities
from untrained import questions, untrained_student

from llkd_ray.config import CascadeSection, ServeSection, VLLMTeacher, load_experiment
from llkd_ray.serving.cascade import Handover
from llkd_ray.serving.composition import cascade_app
from llkd_ray.serving.deploy import running
from llkd_ray.serving.student import StudentClassifier
from llkd_ray.serving.teacher import TeacherModel
from llkd_ray.student.temperature import Temperature, set_temperature
from llkd_ray.teacher.calibration import Calibration

CONFIG = ServeSection(port=0, max_texts_per_request=64)


@pytest.mark.slow
def test_the_served_cascade_asks_its_teacher_about_the_unsure_texts_alone(ray_local, tmp_path):  # noqa: ARG001
    folder = untrained_student(tmp_path)
    set_temperature(folder, Temperature(0.5, "gold", 40))
    texts = questions(48)
    classifier = StudentClassifier(folder, 128, CONFIG)
    student = classifier.probabilities(texts)
    confidence = np.sort(student.max(axis=1))
    # A quarter goes to the teacher; halfway between two texts, so that rounding moves none.
    handover = Handover(float(confidence[11:13].mean()), 0.0)
    unsure = handover.unsure(student)
    assert len(unsure) == 12

    def left_to_the_teacher(end):
        """A question that ends so, and that the student is unsure about."""
        for question in questions(200):
            text = f"{question} {end}"
            if len(handover.unsure(classifier.probabilities([text]))):
                return text
        raise AssertionError("the student is sure of them all")

    strange = [left_to_the_teacher(end) for end in ("\x00", "👩‍👩‍👧", "من؟", "<|endoftext|>")]
    too_long = left_to_the_teacher("word " * 3900)

    # It reads whole words token by token, so that several passes a text go through the engine.
    experiment = load_experiment(
        QUICKSTART, ["teacher.readout=trie", "teacher.prompt.overlong=reject"]
    )
    assert isinstance(experiment.teacher, VLLMTeacher)
    calibration = Calibration((-1.0, -2.0, -3.0, -1.5, -0.5, -2.5))
    teacher = TeacherModel(
        experiment.task, experiment.teacher, (), calibration, "batch", experiment.cache
    )
    app = cascade_app(
        folder,
        "cascade-test",
        128,
        CONFIG,
        handover=handover,
        teacher=teacher,
        cascade=CascadeSection(),
    )

    async def ask(url):
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            parts = [texts[start : start + 8] for start in range(0, 48, 8)]
            return await asyncio.gather(
                *(client.post("/v1/classify", json={"texts": part}) for part in parts)
            )

    with running(app, CONFIG) as url:
        card = httpx.get(f"{url}/v1/model").json()
        answers = asyncio.run(ask(url))
        assert httpx.post(f"{url}/v1/classify", json={"texts": []}).status_code == 422
        assert httpx.post(f"{url}/v1/classify", json={"texts": ["x"] * 65}).status_code == 422
        other = httpx.post(f"{url}/predict", json={"inputs": texts[unsure[0]]}, timeout=60)
        survived = httpx.post(f"{url}/v1/classify", json={"texts": strange}, timeout=300)
        unread = httpx.post(
            f"{url}/v1/classify", json={"texts": [too_long, strange[0]]}, timeout=120
        )
        assert httpx.get(f"{url}/healthz").status_code == 200

    assert card["kind"] == "cascade"
    assert card["calibration"] == "student temperature 0.5 on gold, teacher batch"
    predictions = [p for response in answers for p in response.json()["predictions"]]
    by = np.array([prediction["by"] for prediction in predictions])
    assert np.flatnonzero(by == "teacher").tolist() == unsure.tolist()
    assert set(by) == {"student", "teacher"}
    served = np.array([list(prediction["probabilities"].values()) for prediction in predictions])
    expected = student.copy()
    expected[unsure[:4]] = plain_probabilities(
        experiment, calibration, [texts[at] for at in unsure[:4]]
    )
    compared = np.setdiff1d(np.arange(48), unsure[4:])
    np.testing.assert_allclose(served[compared], expected[compared], atol=2e-3)
    best = [max(p["probabilities"], key=p["probabilities"].__getitem__) for p in predictions]
    assert best == [prediction["label"] for prediction in predictions]
    assert other.json()[0]["label"] == predictions[unsure[0]]["label"]

    assert survived.status_code == 200, survived.text
    assert [answer["by"] for answer in survived.json()["predictions"]] == ["teacher"] * 4
    # The student's answer stands where the teacher does not read a text.
    assert unread.status_code == 200, unread.text
    assert [answer["by"] for answer in unread.json()["predictions"]] == ["student", "teacher"]
