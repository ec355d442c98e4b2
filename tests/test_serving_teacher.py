"""The teacher, really served, against plain forward passes of the same model.

It reads whole words token by token, so that several passes a text go through the engine.
"""

import httpx
import numpy as np
import pytest
import torch
from conftest import QUICKSTART
from transformers import AutoModelForCausalLM, AutoTokenizer

from llkd_ray.config import ServeSection, VLLMTeacher, load_experiment
from llkd_ray.serving.deploy import running, teacher_app
from llkd_ray.serving.teacher import TeacherModel
from llkd_ray.teacher.calibration import Calibration
from llkd_ray.teacher.pretrained import teacher_folder
from llkd_ray.teacher.prompt import Prompt

CONFIG = ServeSection(port=0)


@pytest.mark.slow
def test_the_served_teacher_answers_what_plain_forward_passes_answer(ray_local):  # noqa: ARG001
    experiment = load_experiment(QUICKSTART, ["teacher.readout=trie"])
    assert isinstance(experiment.teacher, VLLMTeacher)
    calibration = Calibration((-1.0, -2.0, -3.0, -1.5, -0.5, -2.5))
    model = TeacherModel(experiment.task, experiment.teacher, (), calibration, experiment.cache)
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
    prompt = Prompt.of(tokenizer, experiment.task, experiment.teacher)
    expected = []
    for encoded in prompt.encode(texts):
        logprobs = []
        for label in experiment.task.labels:
            words = tokenizer(f" {label.words or label.name}")["input_ids"]
            with torch.inference_mode():
                logits = language_model(torch.tensor([[*encoded.ids, *words]])).logits[0].double()
            steps = logits.log_softmax(-1)[len(encoded.ids) - 1 : -1]
            logprobs.append(float(steps[range(len(words)), words].sum()))
        unnormalised = np.exp(np.array(logprobs) - calibration.log_prior)
        expected.append(unnormalised / unnormalised.sum())
    np.testing.assert_allclose(served, expected, atol=2e-3)
