"""Every kind of student trains, resumes, is exported, loaded and served alike."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICKSTART
from training_data import NAMES
from training_workers import changed, run_workers, without_seconds
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    RobertaConfig,
    pipeline,
)
from untrained import questions

from llkd_ray.config import (
    AllRule,
    EncoderStudent,
    ServeSection,
    StaticStudent,
    as_tree,
    load_experiment,
)
from llkd_ray.errors import ConfigError, LLKDError, StudentError
from llkd_ray.serving.student import StudentClassifier, student_labels
from llkd_ray.student.batches import tokenize
from llkd_ray.student.evaluate import class_probabilities
from llkd_ray.student.export import Card, export
from llkd_ray.student.model import (
    check_student,
    load_encoder,
    load_student,
    load_tokenizer,
    load_untrained,
    locate,
)
from llkd_ray.student.static import distilled
from llkd_ray.student.train import found_from_anywhere

TEXTS = [*questions(40), "x", "What " + "is this " * 60, "漢字 👩‍👩‍👧"]
_THIN = {
    "vocab_size": 30522,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def vectors(small_encoder, tmp_path_factory):
    """The folder of a static student before training."""
    cache = str(tmp_path_factory.mktemp("cache"))
    section = StaticStudent(model=str(small_encoder), dimensions=16)
    folder = distilled(section, cache)
    before = (folder / "model.safetensors").stat()
    assert distilled(section, cache) == folder
    assert (folder / "model.safetensors").stat() == before
    return folder


@pytest.fixture(params=["cut", "mean", "static"])
def student(request, small_encoder):
    match request.param:
        case "cut":
            return EncoderStudent(model=str(small_encoder), max_length=64, layers=1)
        case "mean":
            return EncoderStudent(model=str(small_encoder), max_length=64, head="mean")
        case _:
            folder = request.getfixturevalue("vectors")
            return StaticStudent(model=str(folder), max_length=64, dimensions=16, head_units=32)


def probabilities(model, tokenizer):
    return class_probabilities(
        model,
        tokenize(tokenizer, TEXTS, 64),
        batch_size=16,
        pad_token_id=tokenizer.pad_token_id,
        num_classes=len(NAMES),
        device=torch.device("cpu"),
    )


@pytest.mark.slow
def test_it_trains_goes_on_and_answers_alike_wherever_it_is_asked(tmp_path, work, student):
    work = changed(replace(work, student=student), rule=AllRule(), dropout=0.1, learning_rate=5e-3)
    unbroken = run_workers(tmp_path / "unbroken", work, 1)
    assert unbroken.epochs[1]["loss"] < unbroken.epochs[0]["loss"]
    first = tmp_path / "unbroken/epoch-0001"
    resumed = run_workers(tmp_path / "resumed", work, 1, restored=first)
    assert without_seconds(resumed.epochs) == without_seconds(unbroken.epochs)
    weights = "epoch-0002/student/model.safetensors"
    assert (tmp_path / "resumed" / weights).read_bytes() == (
        tmp_path / "unbroken" / weights
    ).read_bytes()

    details = {"rows_used_fraction": 1.0, "steps": 16, "best_epoch": 2, "chosen_by": "last"}
    card = Card(student.summary, NAMES, 64, 120, "all", 2, details)
    folder = tmp_path / "model"
    export(tmp_path / "resumed/epoch-0002/student", folder, card)
    told = (folder / "README.md").read_text()
    assert "no human label was trained on" in told
    export(tmp_path / "resumed/epoch-0002/student", folder, replace(card, calibration="stacked"))
    assert "calibrated (`stacked`) on validation rows" in (folder / "README.md").read_text()
    plain = isinstance(student, EncoderStudent) and student.head == "own"
    assert ("import llkd_ray.student.model" in told) != plain
    assert not list(folder.glob("*.py"))
    assert student_labels(folder) == NAMES

    answers = probabilities(*load_student(folder))
    assert np.ptp(answers, axis=0).max() > 1e-4  # Far more than what is taken for equal below.
    served = StudentClassifier(folder, 64, ServeSection()).probabilities(TEXTS)
    np.testing.assert_allclose(served, answers, atol=2e-6)
    classify = pipeline("text-classification", str(folder), top_k=None, device="cpu")
    for row, expected in zip(answers, classify(TEXTS, truncation=True, max_length=64), strict=True):
        found = {answer["label"]: answer["score"] for answer in expected}
        np.testing.assert_allclose(row, [found[name] for name in NAMES], atol=2e-6)


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**_THIN),
        RobertaConfig(**_THIN),
        DistilBertConfig(vocab_size=30522, dim=32, n_heads=2, n_layers=3, hidden_dim=64),
        ModernBertConfig(**_THIN, intermediate_size=64),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("head", ["own", "mean"])
def test_the_first_layers_of_any_encoder_make_a_student(tmp_path, small_encoder, config, head):
    folder = tmp_path / "encoder"
    whole = AutoModel.from_config(config)
    whole.save_pretrained(folder)
    load_tokenizer(small_encoder).save_pretrained(folder)
    section = EncoderStudent(model=str(folder), layers=2, head=head, dropout=0.3)
    check_student(section)
    cut = load_untrained(section, NAMES, seed=0)
    mine = {name.partition(".")[2]: weight for name, weight in cut.named_parameters()}
    theirs = dict(whole.named_parameters())
    shared = mine.keys() & theirs.keys()
    dropped = {name for name in theirs.keys() - shared if "pooler" not in name}
    assert all(torch.equal(mine[name], theirs[name]) for name in shared)
    assert dropped == {name for name in theirs if ".2." in name}
    assert {0.3} == {module.p for module in cut.modules() if isinstance(module, torch.nn.Dropout)}
    cut.save_pretrained(tmp_path / "cut")
    load_tokenizer(folder).save_pretrained(tmp_path / "cut")
    loaded, tokenizer = load_student(tmp_path / "cut")
    np.testing.assert_array_equal(probabilities(loaded, tokenizer), probabilities(cut, tokenizer))


@pytest.mark.slow
def test_static_vectors_are_what_model2vec_makes_of_the_encoder(small_encoder, vectors):
    from model2vec.distill import distill_from_model

    theirs = distill_from_model(
        load_encoder(small_encoder), load_tokenizer(small_encoder), pca_dims=16
    )
    model = load_untrained(StaticStudent(model=str(vectors), dimensions=16), NAMES, seed=0)
    tokenizer = load_tokenizer(vectors)
    texts = TEXTS[:40]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert (
        batch["input_ids"][0].tolist()[:3]
        == load_tokenizer(small_encoder)(texts[0])["input_ids"][:3]
    )
    with torch.no_grad():
        bag = model.embedding(
            batch["input_ids"], per_sample_weights=batch["attention_mask"].float()
        )
    mine = torch.nn.functional.normalize(bag, dim=-1).numpy()
    # Theirs are kept in 16 bits here.
    np.testing.assert_allclose(mine, theirs.encode(texts), atol=2e-3)


def test_a_student_that_cannot_be_made_of_the_encoder_is_told(small_encoder):
    with pytest.raises(StudentError, match=r"student\.layers = 3: .* has 2"):
        check_student(EncoderStudent(model=str(small_encoder), layers=3))
    with pytest.raises(StudentError, match=r"student\.dimensions = 33: .* has 32"):
        check_student(StaticStudent(model=str(small_encoder), dimensions=33))
    check_student(StaticStudent(model=str(small_encoder), dimensions=32, max_length=5000))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "[]"),
        ("config.json", '{"model_type": "bert", "hidden_size": "abc"}'),
        ("tokenizer.json", "{}"),
    ],
)
def test_a_folder_that_is_not_what_it_should_be_is_told(tmp_path, small_encoder, file, content):
    folder = shutil.copytree(small_encoder, tmp_path / "encoder")
    (folder / file).write_text(content)
    with pytest.raises(StudentError, match=str(folder)):
        check_student(EncoderStudent(model=str(folder)))


def test_the_kind_of_student_is_chosen_in_the_experiment():
    assert load_experiment(QUICKSTART).student == EncoderStudent()
    static = load_experiment(QUICKSTART, ["student.kind=static", "student.dimensions=64"])
    assert static.student == StaticStudent(dimensions=64)
    assert type(static).model_validate(as_tree(static)) == static
    with pytest.raises(ConfigError, match=r"did you mean student\.layers"):
        load_experiment(QUICKSTART, ["student.layrs=3"])
    with pytest.raises(ConfigError, match=r"student\.layers: unknown key"):
        load_experiment(QUICKSTART, ["student.kind=static", "student.layers=3"])


def test_a_student_of_the_hub_is_found_by_every_worker_in_its_own_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--people--their-encoder" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"")
    student = EncoderStudent(model=f"people/their-encoder@{commit}")
    assert found_from_anywhere(student, str(tmp_path), tmp_path) == student
    assert locate(student.model) == snapshot
    with pytest.raises(LLKDError, match=r"student\.model = .*not in its cache"):
        locate(f"people/another@{commit}")
