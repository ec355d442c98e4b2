"""The student in ONNX Runtime: torch's answers, int8 within its limits, no file but its own."""

import numpy as np
import onnx
import pytest
from conftest import QUICKSTART
from training_data import NAMES, make_split_folders
from transformers import AutoModelForSequenceClassification, BertConfig, ModernBertConfig
from untrained import questions, untrained_student

from llkd_ray.config import ExportSection, ServeSection, load_experiment
from llkd_ray.errors import ConfigError, StudentError
from llkd_ray.lineage import Lineage
from llkd_ray.serving.student import StudentClassifier, student_labels
from llkd_ray.student.architectures import (
    MeanPooledClassifier,
    MeanPooledConfig,
    StaticClassifier,
    StaticConfig,
)
from llkd_ray.student.model import load_tokenizer
from llkd_ray.student.onnx import export_onnx, refusal
from llkd_ray.student.runtime import FLOAT32, INT8, cut_passes, onnx_file, onnx_network

TEXTS = [*questions(40), "x", "What " + "is this " * 60, "漢字 👩‍👩‍👧"]
ANY = ExportSection(max_accuracy_drop=1.0, max_changed=1.0)


@pytest.fixture(scope="module")
def corpus(folders):
    return folders[1]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The embedded encoder: large enough for int8 to change some answers."""
    return untrained_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def exported(student, corpus, tmp_path_factory):
    """The folder for ONNX Runtime, int8 in it, and what its manifest says."""
    out = tmp_path_factory.mktemp("onnx") / "model"
    return out, export_onnx(student, out, corpus=corpus, section=ANY, max_length=64)


def ask(folder, backend="auto", **settings):
    classifier = StudentClassifier(folder, 64, ServeSection(backend=backend, **settings))
    return classifier.probabilities(TEXTS)


def test_the_endpoint_answers_alike_in_torch_and_in_onnx_runtime(student, exported):
    folder, _ = exported
    expected = ask(student, "torch")
    np.testing.assert_allclose(ask(folder, "onnx"), expected, atol=1e-4)
    np.testing.assert_array_equal(ask(folder), ask(folder, "onnx"))
    int8 = ask(folder, "onnx-int8")
    difference = np.abs(int8 - expected).max()
    assert 1e-4 < difference < 0.2  # It is another network, and still this student.
    assert student_labels(folder) == student_labels(student)
    assert (folder / INT8).stat().st_size < 0.7 * (folder / FLOAT32).stat().st_size


def test_int8_past_its_limit_is_not_served(student, exported, tmp_path):
    _, accepted = exported
    found = accepted.details
    assert (found["int8"], found["split"], found["gold_rows"]) == ("accepted", "test", 60)
    assert found["float32_max_difference"] < 1e-4
    assert abs(found["float32_accuracy"] - found["int8_accuracy"]) <= found["int8_changed"] < 0.5

    _, no_gold = make_split_folders(tmp_path / "no-gold", 30, 40, gold=False)
    folder, section = tmp_path / "model", ExportSection(max_changed=0.0)
    refused = export_onnx(student, folder, corpus=no_gold, section=section, max_length=64).details
    assert (refused["split"], refused["gold_rows"]) == ("validation", 0)
    assert refused["int8_changed"] > 0
    assert refused["int8"] == (
        f"refused, changed {refused['int8_changed']:.3g} > export.max_changed = 0"
    )
    assert onnx_file(folder, "auto") == folder / FLOAT32
    with pytest.raises(StudentError, match=r"export\.max_accuracy_drop and export\.max_changed"):
        StudentClassifier(folder, 64, ServeSection(backend="onnx-int8"))


def test_gold_decides_about_int8_where_there_is_any():
    limits = ExportSection(max_accuracy_drop=0.01, max_changed=0.02)
    assert refusal(limits, drop=None, changed=0.02) == ""
    assert "max_changed" in refusal(limits, drop=None, changed=0.021)
    assert refusal(limits, drop=0.01, changed=0.3) == ""
    assert refusal(limits, drop=-0.05, changed=0.3) == ""
    assert "max_accuracy_drop" in refusal(limits, drop=0.011, changed=0.0)


@pytest.mark.parametrize("kind", ["mean", "modernbert", "static"])
def test_every_kind_of_student_is_exported(tmp_path, small_encoder, corpus, kind):
    thin = {"vocab_size": 30522, "hidden_size": 32, "num_attention_heads": 2, "pad_token_id": 0}
    labels = {
        "id2label": dict(enumerate(NAMES)),
        "label2id": {name: position for position, name in enumerate(NAMES)},
    }
    match kind:
        case "static":
            config = StaticConfig(vocab_size=30522, dimensions=16, **labels)
            model = StaticClassifier(config)
        case "mean":
            encoder = BertConfig(**thin, num_hidden_layers=2).to_dict()
            model = MeanPooledClassifier(MeanPooledConfig(encoder=encoder, **labels))
        case _:
            config = ModernBertConfig(**thin, **labels, num_hidden_layers=2, intermediate_size=64)
            model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "plain")
    load_tokenizer(small_encoder).save_pretrained(tmp_path / "plain")
    out = tmp_path / "model"
    done = export_onnx(tmp_path / "plain", out, corpus=corpus, section=ANY, max_length=64)
    assert done.details["int8"] == "accepted" or kind == "static"
    expected = ask(tmp_path / "plain", "torch")
    assert np.ptp(expected, axis=0).max() > 1e-3  # Far more than what is taken for equal.
    np.testing.assert_allclose(ask(out, "onnx"), expected, atol=1e-4)


def test_a_model_that_points_to_other_files_is_refused(tmp_path):
    outside, file = tmp_path / "outside", tmp_path / "folder" / FLOAT32
    outside.write_bytes(bytes(8))
    file.parent.mkdir()
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[2])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=str(outside))
    output = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [2])
    plain = onnx.helper.make_graph([], "plain", [], [output], [tensor])
    choose = onnx.helper.make_node("If", ["c"], ["o"], then_branch=plain, else_branch=plain)
    constant = onnx.helper.make_node("Constant", [], ["w"], value=tensor)
    for graph in (
        plain,
        onnx.helper.make_graph([choose], "in a subgraph", [], [output]),
        onnx.helper.make_graph([constant], "in a constant", [], [output]),
    ):
        file.write_bytes(onnx.helper.make_model(graph).SerializeToString())
        with pytest.raises(StudentError, match="weights stand in other files"):
            onnx_network(file, 1)
    file.write_bytes(b"not a model")
    with pytest.raises(StudentError, match="no ONNX model"):
        onnx_network(file, 1)
    file.write_bytes(b"")
    with pytest.raises(StudentError, match="ONNX Runtime does not load it"):
        onnx_network(file, 1)


def test_passes_hold_like_texts_up_to_both_limits():
    lengths = np.array([5, 90, 7, 6, 300, 5, 40, 41, 6, 5])
    passes = list(cut_passes(lengths, 4, 100))
    assert sorted(np.concatenate(passes)) == list(range(10))
    assert [sorted(lengths[chosen]) for chosen in passes] == [
        [5, 5, 5, 6],
        [6, 7],
        [40, 41],
        [90],
        [300],
    ]


def test_the_size_of_a_pass_changes_no_answer(exported):
    expected = ask(exported[0], "onnx")
    many = ask(exported[0], "onnx", max_batch_texts=1000, max_batch_tokens=150)
    np.testing.assert_allclose(many, expected, atol=1e-6)


def test_what_is_served_follows_from_backend_and_gpus():
    def experiment(*overrides):
        return load_experiment(QUICKSTART, overrides)

    own = Lineage(experiment())
    assert own.served.fingerprint == own.onnx("trained").fingerprint
    for override in ("serve.gpus_per_replica=1", "serve.backend=torch"):
        lineage = Lineage(experiment(override))
        assert lineage.served.fingerprint == own.student().fingerprint
    assert (
        Lineage(experiment("export.int8=false")).student().fingerprint == own.student().fingerprint
    )
    assert experiment("serve.cpus_per_replica=4").serve.threads == 4
    assert experiment("serve.cpus_per_replica=0.5").serve.threads == 1
    with pytest.raises(ConfigError, match="computes on CPUs"):
        experiment("serve.backend=onnx", "serve.gpus_per_replica=1")
