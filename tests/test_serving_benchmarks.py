"""What the benchmarks of served students choose and count; the figures are theirs to measure."""

import argparse
import sys

import pytest
from conftest import QUICKSTART, ROOT
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(ROOT / "jobs/benchmarks"))

import label_throughput
import serving_peers
import student_over_teacher

from llkd_ray.config import load_experiment
from llkd_ray.lineage import Lineage


def test_every_rung_is_a_student_of_the_same_labels() -> None:
    base = load_experiment(QUICKSTART)
    ladder = student_over_teacher.ladder(base)
    encoders = ["encoder", "layers_3", "layers_1"]
    int8 = [f"{name}_int8" for name in encoders]
    assert sorted(ladder) == sorted([*encoders, *int8, "static"])
    lineages = [Lineage(experiment) for experiment in ladder.values()]
    assert {lineage.labels.fingerprint for lineage in lineages} == {lineages[0].labels.fingerprint}
    assert len({lineage.student().fingerprint for lineage in lineages}) == 4
    for name in encoders:
        served = [Lineage(ladder[of]).served.fingerprint for of in (name, f"{name}_int8")]
        assert served[0] == served[1]
        assert ladder[f"{name}_int8"].serve.backend == "onnx-int8"
    assert ladder["encoder"] == base


def test_the_fastest_rung_that_is_as_right_as_the_teacher_is_chosen() -> None:
    rungs = {
        "slow": {"accuracy": 0.8, "throughput_ratio": 8.0},
        "fast": {"accuracy": 0.7, "throughput_ratio": 40.0},
        "wrong": {"accuracy": 0.5, "throughput_ratio": 200.0},
    }
    assert student_over_teacher.choose(rungs, 0.7) == "fast"
    assert student_over_teacher.choose(rungs, 0.75) == "slow"
    assert student_over_teacher.choose(rungs, 0.9) == "slow"


def test_flops_are_two_for_each_weight_of_the_layers_and_each_token_that_is_computed() -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    model = AutoModelForCausalLM.from_config(config)
    weights = sum(
        parameter.numel() for parameter in model.model.layers.parameters() if parameter.ndim == 2
    )
    head = 2 * 64 * 100
    # Of a prompt without length, attention costs nothing.
    assert label_throughput.flops_per_row(config, 10, 0) == 10 * 2 * weights + head
    attention = 10 * 2 * 2 * 3 * 64 * 50
    assert label_throughput.flops_per_row(config, 10, 50) == 10 * 2 * weights + attention + head


def test_a_peer_that_serves_already_is_named_with_its_protocol() -> None:
    peer = serving_peers.peer_of("infinity=tei=http://127.0.0.1:7997/v=1")
    assert (peer.name, peer.protocol, peer.url) == ("infinity", "tei", "http://127.0.0.1:7997/v=1")
    with pytest.raises(argparse.ArgumentTypeError, match="llkd, vllm, tei"):
        serving_peers.peer_of("infinity=grpc=http://127.0.0.1:7997")
