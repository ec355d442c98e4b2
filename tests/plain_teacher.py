"""The teacher without an engine: plain forward passes of its model, word by word."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llkd_ray.teacher.pretrained import teacher_folder
from llkd_ray.teacher.prompt import Prompt


def plain_probabilities(experiment, calibration, texts):
    """Probabilities [texts, classes] of an experiment that reads labels by `trie`."""
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
                output = language_model(
                    torch.tensor([[*encoded.ids, *words]]), logits_to_keep=len(words) + 1
                )
            steps = output.logits[0, :-1].double().log_softmax(-1)
            logprobs.append(float(steps[range(len(words)), words].sum()))
        unnormalised = np.exp(np.array(logprobs) - calibration.log_prior)
        expected.append(unnormalised / unnormalised.sum())
    return np.array(expected)
