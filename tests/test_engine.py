"""DeepSpeed's settings, an expert's file over them, and the average of the weights."""

import json
from dataclasses import replace

import pytest
import torch
from training_workers import changed, kept_rows, run_workers

from llkd_ray.config import TrainSection
from llkd_ray.errors import ConfigError
from llkd_ray.student.engine import Average, deepspeed_settings, read_expert_settings


def section(**settings):
    return TrainSection.model_validate(settings)


def test_settings_follow_from_the_experiment():
    train = section(num_workers=4, batch_size=64, accumulation=2, max_grad_norm=0.5, zero_stage=3,
                    offload="all", bf16=True)  # fmt: skip
    settings = deepspeed_settings(train, 4, {})
    assert settings["train_micro_batch_size_per_gpu"] == 8
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"] == {"enabled": True}
    assert settings["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    }


def test_an_experts_file_is_laid_over_them_and_keeps_the_rest(tmp_path):
    file = tmp_path / "expert.json"
    expert = {
        "zero_optimization": {"reduce_bucket_size": 1000},
        "optimizer": {"params": {"betas": [0.9, 0.98]}},
        "wall_clock_breakdown": True,
    }
    file.write_text(json.dumps(expert))
    train = section(deepspeed=str(file), zero_stage=1)
    settings = deepspeed_settings(train, 2, read_expert_settings(train))
    assert settings["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}
    assert settings["optimizer"]["params"]["betas"] == [0.9, 0.98]
    assert settings["optimizer"]["params"]["weight_decay"] == 0.01
    assert settings["wall_clock_breakdown"] is True
    assert read_expert_settings(section()) == {}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "not readable as JSON"),
        ("[]", "JSON object"),
        ('{"train_batch_size": 8}', r"train_batch_size .*\[train\]"),
        ('{"zero_optimization": {"stage": 0}}', r"zero_optimization\.stage"),
        ('{"zero_optimization": 3}', "zero_optimization"),
        ('{"fp16": {"enabled": true}}', "fp16"),
    ],
)
def test_an_experts_file_that_cannot_be_meant_says_what_to_do(tmp_path, content, match):
    file = tmp_path / "expert.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=match):
        read_expert_settings(section(deepspeed=str(file)))
    with pytest.raises(ConfigError, match="nowhere"):
        read_expert_settings(section(deepspeed=str(tmp_path / "nowhere.json")))


@pytest.mark.slow
def test_an_experts_settings_reach_deepspeed(tmp_path, work, one_worker):
    heavy = replace(work, expert={"optimizer": {"params": {"weight_decay": 50.0}}})
    run_workers(tmp_path, heavy, 1)
    plain, expert = (
        torch.linalg.vector_norm(weights(out)).item() for out in (one_worker[0], tmp_path)
    )
    assert expert < 0.99 * plain


@pytest.mark.slow
def test_accumulating_takes_the_steps_of_whole_batches(tmp_path, work, one_worker):
    out, whole = one_worker
    parts = run_workers(tmp_path, changed(work, accumulation=3), 1)
    assert kept_rows(out, 2) == kept_rows(tmp_path, 2)
    assert [row["loss"] for row in parts.epochs] == pytest.approx(
        [row["loss"] for row in whole.epochs], rel=1e-4
    )


def test_the_average_follows_the_weights_and_can_take_their_place():
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data.fill_(0.0)
    average = Average(model, 0.9)
    for _ in range(200):
        model.weight.data.fill_(1.0)
        average.update()
    assert average.weights[0].mean().item() == pytest.approx(1.0, abs=1e-3)
    average.weights[0].fill_(0.5)
    with average.in_place():
        assert model.weight.mean().item() == 0.5
    assert model.weight.mean().item() == 1.0


def weights(out):
    from safetensors.torch import load_file

    tensors = load_file(out / "epoch-0002/student/model.safetensors")
    return tensors["bert.encoder.layer.0.intermediate.dense.weight"]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "offload"), [(1, "optimizer"), (3, "all")])
def test_offloading_takes_the_same_steps(tmp_path, work, one_worker, stage, offload):
    _, plain = one_worker
    moved = run_workers(tmp_path, changed(work, zero_stage=stage, offload=offload), 1)
    assert [row["loss"] for row in moved.epochs] == pytest.approx(
        [row["loss"] for row in plain.epochs], rel=1e-3
    )
