"""A student's temperature: found on rows not trained on, the same wherever the student answers."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from training_data import NAMES, make_split_folders
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    RobertaConfig,
    pipeline,
)
from untrained import questions

from llkd_ray.config import EncoderStudent, EvaluateSection, ExportSection, ServeSection
from llkd_ray.serving.student import StudentClassifier
from llkd_ray.student.architectures import (
    MeanPooledClassifier,
    MeanPooledConfig,
    StaticClassifier,
    StaticConfig,
)
from llkd_ray.student.batches import split_ids
from llkd_ray.student.evaluate import predict
from llkd_ray.student.model import load_student, load_tokenizer, load_untrained
from llkd_ray.student.onnx import export_onnx
from llkd_ray.student.scores import score_models
from llkd_ray.student.stopping import held_out
from llkd_ray.student.temperature import (
    UNCHANGED,
    Temperature,
    as_trained,
    find_temperature,
    read_temperature,
    set_temperature,
)

TEXTS = [*questions(60), "x", "漢字 👩‍👩‍👧"]
HALF = Temperature(0.5, "gold", 40)
_THIN = {
    "vocab_size": 30522,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}
_CLASSES = {
    "id2label": dict(enumerate(NAMES)),
    "label2id": {name: position for position, name in enumerate(NAMES)},
}


@pytest.fixture(scope="module")
def student(small_encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    model = load_untrained(EncoderStudent(model=str(small_encoder)), NAMES, seed=0)
    model.classifier.weight.data *= 20  # So that it tells texts apart.
    model.save_pretrained(folder)
    load_tokenizer(small_encoder).save_pretrained(folder)
    return folder


def find(student, labels, corpus, fraction=0.0):
    return find_temperature(
        student,
        corpus,
        labels,
        NAMES,
        max_length=64,
        batch_size=16,
        held_out_fraction=fraction,
        seed=7,
    )


def answers(student, split):
    parts = list(predict(student, split, NAMES, max_length=64, batch_size=16))
    return [row_id for ids, _ in parts for row_id in ids], np.concatenate([p for _, p in parts])


def likeliest(probabilities, right):
    """The best of many temperatures, tried one by one; they are likelier near one beforehand."""
    tried = np.exp(np.linspace(np.log(0.05), np.log(20), 6000))
    logits = np.log(probabilities.astype(np.float64))
    rows = np.arange(len(right))

    def likelihood(temperature):
        scaled = logits / temperature
        told = (scaled[rows, right] - np.log(np.exp(scaled).sum(axis=1))).sum()
        return told - np.log(temperature) ** 2 / 2

    return max(tried, key=likelihood)


def test_it_is_fitted_on_gold_or_else_on_the_teachers_labels_of_rows_held_out(tmp_path, student):
    labels, corpus = make_split_folders(tmp_path / "gold", 200, 80)
    found = find(student, labels, corpus, 0.3)
    _, probabilities = answers(student, corpus / "validation")
    gold = [NAMES.index(name) for name in _column(corpus / "validation", "gold")]
    assert (found.fitted_on, found.rows) == ("gold", 80)
    assert found.value == pytest.approx(likeliest(probabilities, gold), rel=2e-3)

    labels, corpus = make_split_folders(tmp_path / "no-gold", 200, 0, gold=False)
    found = find(student, labels, corpus, 0.3)
    ids, probabilities = answers(student, labels / "unlabeled")
    apart = held_out(split_ids(ids)[:, 0], 0.3, 7)
    label = np.array([NAMES.index(name) for name in _column(labels / "unlabeled", "label")])
    assert (found.fitted_on, found.rows) == ("labels", apart.sum())
    assert 40 < found.rows < 80
    assert found.value == pytest.approx(likeliest(probabilities[apart], label[apart]), rel=2e-3)
    assert "agrees with its teacher" in found.summary

    assert find(student, labels, corpus) == UNCHANGED


def _column(split, name):
    return [
        value for path in sorted(split.iterdir()) for value in pq.read_table(path)[name].to_pylist()
    ]


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**_THIN, **_CLASSES),
        RobertaConfig(**_THIN, **_CLASSES),
        DistilBertConfig(
            vocab_size=30522, dim=32, n_heads=2, n_layers=2, hidden_dim=64, **_CLASSES
        ),
        ModernBertConfig(**_THIN, **_CLASSES, intermediate_size=64),
        MeanPooledConfig(encoder=BertConfig(**_THIN).to_dict(), **_CLASSES),
        StaticConfig(vocab_size=30522, dimensions=16, **_CLASSES),
    ],
    ids=lambda config: config.model_type,
)
def test_every_kind_of_student_has_its_logits_divided(tmp_path, small_encoder, config):
    ours = {"llkd_ray_mean_pooled": MeanPooledClassifier, "llkd_ray_static": StaticClassifier}
    made = ours.get(config.model_type, AutoModelForSequenceClassification.from_config)
    torch.manual_seed(0)
    made(config).save_pretrained(tmp_path)
    load_tokenizer(small_encoder).save_pretrained(tmp_path)
    before, after = _logits(tmp_path), None
    assert read_temperature(tmp_path) is None
    set_temperature(tmp_path, HALF)
    after = _logits(tmp_path)
    assert np.ptp(before, axis=1).max() > 1e-2
    np.testing.assert_allclose(after, before / 0.5, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after.argmax(axis=1), before.argmax(axis=1))
    assert read_temperature(tmp_path) == HALF


def _logits(folder):
    model, tokenizer = load_student(folder)
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.inference_mode():
        return model(batch["input_ids"], batch["attention_mask"]).logits.numpy()


def test_whatever_computes_the_student_gives_the_calibrated_probabilities(
    tmp_path, folders, student
):
    calibrated = tmp_path / "calibrated"
    shutil.copytree(student, calibrated)
    set_temperature(calibrated, HALF)
    onnx = {}
    section = ExportSection(max_accuracy_drop=1.0, max_changed=1.0)
    for folder in (student, calibrated):
        onnx[folder] = tmp_path / f"onnx-{folder.name}"
        export_onnx(folder, onnx[folder], corpus=folders[1], section=section, max_length=64)
    for backend, of in (("torch", {f: f for f in onnx}), ("onnx", onnx), ("onnx-int8", onnx)):
        before, after = (
            StudentClassifier(of[folder], 64, ServeSection(backend=backend)).probabilities(TEXTS)
            for folder in (student, calibrated)
        )
        np.testing.assert_allclose(as_trained(after, HALF), before, atol=1e-5)
        np.testing.assert_array_equal(after.argmax(axis=1), before.argmax(axis=1))
        assert after.max(axis=1).mean() > before.max(axis=1).mean() + 0.05
    assert read_temperature(onnx[calibrated]) == HALF
    elsewhere = pipeline("text-classification", str(calibrated), device="cpu")
    served = StudentClassifier(calibrated, 64, ServeSection(backend="torch")).probabilities(TEXTS)
    scores = [answer["score"] for answer in elsewhere(TEXTS)]
    np.testing.assert_allclose(scores, served.max(axis=1), atol=1e-5)


def test_scores_hold_the_calibration_error_before_and_after(tmp_path, folders, student):
    labels, corpus = folders
    calibrated = tmp_path / "calibrated"
    shutil.copytree(student, calibrated)
    temperature = find(student, labels, corpus)
    set_temperature(calibrated, temperature)
    scored = score_models(
        labels / "test",
        {"all": student, "llkd": calibrated},
        tmp_path,
        label_names=NAMES,
        section=EvaluateSection(bootstrap_resamples=50),
        max_length=64,
        batch_size=8,
        seed=0,
    ).models
    assert scored["all"].ece_as_trained is scored["teacher"].ece_as_trained is None
    assert scored["llkd"].accuracy == scored["all"].accuracy
    assert scored["llkd"].temperature == temperature.value
    before, after = scored["llkd"].ece_as_trained, scored["llkd"].ece
    assert before is not None
    assert before.value == pytest.approx(scored["all"].ece.value, abs=1e-6)
    assert after.value < before.value
