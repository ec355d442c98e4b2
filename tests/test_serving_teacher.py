"""The teacher, really served, against plain forward passes of the same model.

It reads whole words token by token, so that several passes a text go through the engine.
"""

import httpx
import numpy as np
import pytest
from conftest import QUICKSTART
from plain_teacher import plain_probabilities

from llkd_ray.config import ServeSection, VLLMTeacher, load_experiment
from llkd_ray.serving.deploy import running, teacher_app
from llkd_ray.serving.teacher import TeacherModel
from llkd_ray.teacher.calibration import Calibration

CONFIG = ServeSection(port=0)


@pytest.mark.slow
def test_the_served_teacher_answers_what_plain_forward_passes_answer(ray_local):  # noqa: ARG001
    experiment = load_experiment(
        QUICKSTART, ["teacher.readout=trie", "teacher.prompt.overlong=reject"]
    )
    assert isinstance(experiment.teacher, VLLMTeacher)
    calibration = Calibration((-1.0, -2.0, -3.0, -1.5, -0.5, -2.5))
    model = TeacherModel(
        experiment.task, experiment.teacher, (), calibration, "batch", experiment.cache
    )
    texts = ["Where is Lima ?", "Who wrote Hamlet ?", "How many legs has a spider ?"]
    with running(teacher_app(model, "teacher-test", CONFIG), CONFIG) as url:
        answers = httpx.post(f"{url}/v1/classify", json={"texts": texts}, timeout=120)
        strange = ["\x00", "👩‍👩‍👧", "من؟", "<|endoftext|>"]
        survived = httpx.post(f"{url}/v1/classify", json={"texts": strange}, timeout=300)
        too_long = {"texts": [texts[0], "word " * 3900]}
        refused = httpx.post(f"{url}/v1/classify", json=too_long, timeout=120)
        card = httpx.get(f"{url}/v1/model").json()
        assert (card["kind"], card["calibration"]) == ("teacher", "batch")
        assert httpx.get(f"{url}/healthz").status_code == 200
    assert survived.status_code == 200, survived.text
    assert len(survived.json()["predictions"]) == 4
    assert refused.status_code == 422, refused.text
    assert refused.json()["detail"].startswith("texts[1]: the text takes about 39")

    assert answers.status_code == 200, answers.text
    served = [list(item["probabilities"].values()) for item in answers.json()["predictions"]]
    expected = plain_probabilities(experiment, calibration, texts)
    np.testing.assert_allclose(served, expected, atol=2e-3)
