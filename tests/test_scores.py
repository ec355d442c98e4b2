"""A student that is asked: predictions, scores, and encoders that cannot be loaded."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from training_data import NAMES, make_split_folders
from untrained import untrained_student

from llkd_ray import schema
from llkd_ray.config import EncoderStudent, EvaluateSection
from llkd_ray.errors import ArtifactError, StudentError
from llkd_ray.student.evaluate import predict
from llkd_ray.student.model import check_student
from llkd_ray.student.scores import score_models


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return untrained_student(tmp_path_factory.mktemp("student"))


def test_models_are_scored_on_the_gold_test_rows(tmp_path, folders, student):
    labels, _ = folders
    scored = score_models(
        labels / "test",
        {"llkd": student},
        tmp_path,
        label_names=NAMES,
        section=EvaluateSection(bootstrap_resamples=50),
        max_length=64,
        batch_size=8,
        seed=0,
    )
    assert list(scored.models) == ["teacher", "teacher_uncalibrated", "llkd"]
    assert scored.rows.kept == 60
    rows = pq.read_table(tmp_path / "predictions.parquet")
    assert rows.schema.equals(schema.predictions(len(NAMES)))
    for name, score in scored.models.items():
        mine = [row for row in rows.to_pylist() if row["model"] == name]
        right = [row["gold"] == row["predicted"] for row in mine]
        assert score.accuracy.value == pytest.approx(sum(right) / 60)
        assert score.accuracy.low <= score.accuracy.value <= score.accuracy.high
        assert all(sum(row["probabilities"]) == pytest.approx(1, abs=1e-5) for row in mine)
    shards = [pq.read_table(path).to_pylist() for path in sorted((labels / "test").iterdir())]
    of_teacher = {row["row_id"]: row["label"] for shard in shards for row in shard}
    mine = [row for row in rows.to_pylist() if row["model"] == "teacher"]
    assert {row["row_id"]: row["predicted"] for row in mine} == of_teacher


def test_predictions_do_not_depend_on_the_batch_and_follow_the_classes_asked_for(folders, student):
    split, model = folders[0] / "test", student
    turned = NAMES[::-1]
    one = list(predict(model, split, NAMES, max_length=64, batch_size=1))
    many = list(predict(model, split, turned, max_length=64, batch_size=32))
    assert [i for ids, _ in one for i in ids] == [i for ids, _ in many for i in ids]
    first, second = (np.concatenate([p for _, p in part]) for part in (one, many))
    np.testing.assert_allclose(first, second[:, ::-1], atol=1e-5)
    with pytest.raises(StudentError, match="tells abbreviation"):
        list(predict(model, split, ("yes", "no"), max_length=64, batch_size=8))


def test_a_test_split_that_cannot_be_scored_says_what_to_do(tmp_path):
    labels, _ = make_split_folders(tmp_path, 3, 3, 5, gold=False)
    settings = {
        "label_names": NAMES,
        "section": EvaluateSection(),
        "max_length": 64,
        "batch_size": 8,
        "seed": 0,
    }
    with pytest.raises(ArtifactError, match="gold_column"):
        score_models(labels / "test", {}, tmp_path, **settings)
    with pytest.raises(ArtifactError, match=r"teacher\.splits"):
        score_models(labels / "nowhere", {}, tmp_path, **settings)


def test_an_encoder_that_cannot_be_loaded_says_what_to_do(tmp_path, small_encoder):
    with pytest.raises(StudentError, match="minilm-l6"):
        check_student(EncoderStudent(model=str(tmp_path / "nowhere")))
    pickled = tmp_path / "pickled"
    shutil.copytree(small_encoder, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(StudentError, match="safetensors"):
        check_student(EncoderStudent(model=str(pickled)))
    with pytest.raises(StudentError, match="at most 512 tokens"):
        check_student(EncoderStudent(model=str(small_encoder), max_length=513))
    check_student(EncoderStudent(model=str(small_encoder)))
