"""The teacher, really served, against a plain forward pass of the same model."""

import httpx
import numpy as np
import pytest
import torch
from conftest import QUICKSTART
from transformers import AutoModelForCausalLM, AutoTokenizer

from llkd_ray.config import ServeSection, load_experiment
from llkd_ray.serving.deploy import running, teacher_app
from llkd_ray.serving.teacher import TeacherModel
from llkd_ray.teacher.calibration import Calibration
from llkd_ray.teacher.pretrained import teacher_folder
from llkd_ray.teacher.prompt import Prompt
from llkd_ray.teacher.verbalizer import label_token_ids

pytestmark = pytest.mark.slow

CONFIG = ServeSection(port=0)


def test_the_served_teacher_answers_what_a_plain_forward_pass_answers(ray_local):  # noqa: ARG001
    experiment = load_experiment(QUICKSTART)
    calibration = Calibration((-1.0, -2.0, -3.0, -1.5, -0.5, -2.5))
    model = TeacherModel(experiment.task, experiment.teacher, calibration, experiment.cache)
    texts = ["Where is Lima ?", "Who wrote Hamlet ?", "How many legs has a spider ?"]
    with running(teacher_app(model, "teacher-test", CONFIG), CONFIG) as url:
        answers = httpx.post(f"{url}/v1/classify", json={"texts": texts}, timeout=120)
        strange = ["\x00", "👩‍👩‍👧", "من؟", "word " * 3900, "<|endoftext|>"]
        survived = httpx.post(f"{url}/v1/classify", json={"texts": strange}, timeout=300)
        assert httpx.get(f"{url}/v1/model").json()["kind"] == "teacher"
        assert httpx.get(f"{url}/healthz").status_code == 200
    assert survived.status_code == 200, survived.text
    assert len(survived.json()["predictions"]) == 5

    assert answers.status_code == 200, answers.text
    served = [list(item["probabilities"].values()) for item in answers.json()["predictions"]]
    folder = teacher_folder(experiment.teacher.model, experiment.cache)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    language_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = label_token_ids(tokenizer, experiment.task)
    prompt = Prompt.of(experiment.task)
    expected = []
    for text in texts:
        with torch.inference_mode():
            inputs = tokenizer(prompt.render(text), return_tensors="pt")
            logits = language_model(**inputs).logits[0, -1].double()
        unnormalised = np.exp(logits.log_softmax(-1)[ids].numpy() - calibration.log_prior)
        expected.append(unnormalised / unnormalised.sum())
    np.testing.assert_allclose(served, expected, atol=2e-3)
