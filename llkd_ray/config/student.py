"""Selection, the student, its training and its evaluation."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from llkd_ray.config.section import Fraction, Section, Text


class LLKDRule(Section):
    """Keep rows where the teacher is confident and the student uncertain (arXiv 2411.08028)."""

    rule: Literal["llkd"] = "llkd"
    teacher_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Lambda of the teacher's moving thresholds."""
    student_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Lambda of the student's moving thresholds: 0 follows the student at once."""
    weight: Literal["product", "sum", "confidence", "uncertainty", "one"] = "product"
    """Weight of a kept row in the loss."""


class AllRule(Section):
    """Keep every row, at weight one: plain pseudo-labelling, the baseline."""

    rule: Literal["all"] = "all"


SelectionSection = Annotated[LLKDRule | AllRule, Field(discriminator="rule")]


class StudentSection(Section):
    """The small classifier."""

    kind: Literal["encoder"] = "encoder"
    model: Text = "minilm-l6"
    """An embedded encoder by name, or the folder of a Hugging Face encoder (safetensors)."""
    max_length: PositiveInt = 128
    """Tokens of a text that the student reads; the rest is cut."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Dropout while training; the encoder's own when not given."""


class TrainSection(Section):
    """The distillation job."""

    num_workers: PositiveInt = 2
    use_gpu: bool = False
    cpus_per_worker: PositiveFloat = 1.0
    threads_per_worker: PositiveInt = 1
    """Threads of one worker on a CPU."""
    max_failures: NonNegativeInt = 2
    """How often the job restarts its workers from the last checkpoint."""
    epochs: PositiveInt = 4
    batch_size: PositiveInt = 32
    """Rows of one optimizer step, over all workers."""
    scoring_batch_size: PositiveInt = 128
    """Rows of one forward pass when the student is only scored."""
    learning_rate: PositiveFloat = 5e-5
    warmup_fraction: Fraction = 0.1
    """Share of the training over which the learning rate rises; then it falls to zero."""
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: PositiveFloat = 1.0
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: partitions the optimizer (1), the gradients too (2), the weights too (3). 0
    is the fastest where a worker has room for all of them."""
    bf16: bool = False
    """Train in bfloat16, where the hardware has it."""


class EvaluateSection(Section):
    """What is scored on the gold test rows."""

    compare_rules: tuple[Literal["llkd", "all"], ...] = ()
    """Other rules to train on the same labels and score beside the experiment's own."""
    bootstrap_resamples: PositiveInt = 1000
    calibration_bins: PositiveInt = 10


RULES: dict[str, type[LLKDRule | AllRule]] = {
    option.model_fields["rule"].default: option for option in (LLKDRule, AllRule)
}


def rule_named(rule: str, own: LLKDRule | AllRule) -> LLKDRule | AllRule:
    """Return the experiment's own rule if it has this name, else that rule at its defaults."""
    return own if own.rule == rule else RULES[rule]()
