"""DeepSpeed around the student: its settings, its start, and the moving average of the weights."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llkd_ray.config import TrainSection
from llkd_ray.errors import ConfigError
from llkd_ray.student.exchange import GradientMean

# What follows from the experiment, or would take the loop's work from it.
_OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "scheduler",
    "fp16",
    "bf16",
)


def read_expert_settings(train: TrainSection) -> dict[str, Any]:
    """Return the content of `train.deepspeed`, empty where there is none.

    Raises:
        ConfigError: The file is no JSON object, or sets what the experiment decides.
    """
    file = train.deepspeed
    if file is None:
        return {}
    try:
        tree = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"train.deepspeed = {file!r}: not readable as JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"train.deepspeed = {file!r}: this must be a JSON object of settings")
    ours = [key for key in _OURS if key in tree]
    zero = tree.get("zero_optimization", {})
    if not isinstance(zero, dict) or "stage" in zero:
        ours.append("zero_optimization.stage")
    if ours:
        raise ConfigError(
            f"train.deepspeed = {file!r}: {', '.join(ours)} follows from the experiment; set it "
            "under [train] (batch_size, accumulation, max_grad_norm, zero_stage, bf16)"
        )
    return tree


def deepspeed_settings(
    train: TrainSection, world_size: int, expert: dict[str, Any]
) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    Args:
        train: How to train.
        world_size: Workers.
        expert: Further settings, laid over what follows from `train`.
    """
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if train.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    settings = {
        "train_micro_batch_size_per_gpu": max(
            1, train.batch_size // (world_size * train.accumulation)
        ),
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": zero,
        # The optimizer is torch's own, whose compiled twin for offloading needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.bf16},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": train.learning_rate,
                "weight_decay": train.weight_decay,
                # torch's own fused AdamW: 3x faster on a CPU than its unfused one, and nothing
                # to compile.
                "torch_adam": True,
                "fused": True,
            },
        },
    }
    return _laid_over(settings, expert)


def start_engine(
    model: Any,
    train: TrainSection,
    expert: dict[str, Any],
    *,
    world_size: int,
    device: torch.device,
) -> Any:
    """Return a DeepSpeed engine around the model; torch.distributed must be up."""
    if device.type == "cpu":
        # Read by DeepSpeed's first import, hence not before this.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    # The shared-memory kernel serves inference alone, yet every worker of every run would compile
    # it with g++. Asking which kernels are compatible compiles probes; nothing asks again once
    # the module has an answer.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel("WARNING")
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        dist_init_required=False,
        config=deepspeed_settings(train, world_size, expert),
    )
    if device.type == "cpu" and train.zero_stage == 0 and not (train.bf16 or expert):
        engine.buffered_allreduce_fallback = GradientMean(engine.module)
    return engine


class Average:
    """A moving average of the weights, the same on every worker (Polyak averaging)."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self._parameters = [parameter.detach() for parameter in model.parameters()]
        self._decay = decay
        self.steps = 0
        """Updates so far."""
        self.weights = [parameter.clone().float() for parameter in self._parameters]
        """In the order of the model's parameters."""

    def update(self) -> None:
        """Take one step: the first ones forget fast, the start being far from any result."""
        self.steps += 1
        decay = min(self._decay, self.steps / (self.steps + 10))
        current = [parameter.float() for parameter in self._parameters]
        torch._foreach_lerp_(self.weights, current, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the model for a while."""
        kept = [parameter.clone() for parameter in self._parameters]
        for parameter, weight in zip(self._parameters, self.weights, strict=True):
            parameter.copy_(weight)
        try:
            yield
        finally:
            for parameter, weight in zip(self._parameters, kept, strict=True):
                parameter.copy_(weight)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        both = isinstance(under, dict) and isinstance(value, dict)
        merged[key] = _laid_over(under, value) if both else value  # type: ignore[arg-type]
    return merged
