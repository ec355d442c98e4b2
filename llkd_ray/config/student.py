"""The student, its training and its evaluation."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from llkd_ray.config.section import Fraction, Section, Text
from llkd_ray.config.selection import RuleName

UnitOpenAbove = Annotated[float, Field(ge=0.0, lt=1.0)]


class StudentBase(Section):
    """What every kind of student shares."""

    model: Text = "minilm-l6"
    """The encoder that is trained, or that a static student's vectors come from: an embedded one by
    name, the folder of a Hugging Face encoder (safetensors), or one of the hub with its revision,
    NAME/MODEL@REVISION."""
    max_length: PositiveInt = 128
    """Tokens of a text that the student reads; the rest is cut."""


class EncoderStudent(StudentBase):
    """A transformer encoder with a classification head."""

    kind: Literal["encoder"] = "encoder"
    layers: PositiveInt | None = None
    """Keep the encoder's first so many layers; all of them when not given."""
    head: Literal["own", "mean"] = "own"
    """own: the architecture's own classifier. mean: the mean of the last layer's tokens, then one
    linear layer."""
    dropout: UnitOpenAbove | None = None
    """Dropout while training; the encoder's own when not given."""

    @property
    def summary(self) -> str:
        """What the student is, in a few words."""
        cut = "" if self.layers is None else f", {self.layers} layer{'s' * (self.layers > 1)}"
        return self.model + cut + (", mean pooling" if self.head == "mean" else "")


class StaticStudent(StudentBase):
    """A vector for each token, their mean and a small head: when throughput is everything.

    The vectors are distilled from an encoder by model2vec and trained further with the head. The
    default `train.learning_rate` is an encoder's: set a higher one.
    """

    kind: Literal["static"] = "static"
    dimensions: PositiveInt = 256
    """Of a vector; at most those of the encoder."""
    head_units: NonNegativeInt = 256
    """Units of the head's hidden layer; 0 makes the head linear."""
    dropout: UnitOpenAbove = 0.1
    """Dropout in the head while training."""

    @property
    def summary(self) -> str:
        """What the student is, in a few words."""
        return f"{self.model}, static, {self.dimensions} dimensions"


StudentSection = Annotated[EncoderStudent | StaticStudent, Field(discriminator="kind")]
"""The small classifier."""


class StoppingSection(Section):
    """Which epoch's weights are the result, and when to stop.

    A student learns wrong labels by heart after a few epochs.
    """

    choose_by: Literal["auto", "gold", "teacher", "last"] = "auto"
    """gold: best macro-F1 on the validation split. teacher: best macro-F1 against the teacher's
    surest labels on rows held out of training, which needs no gold. last: the last epoch. auto:
    gold where there is some, else teacher where rows are held out, else last."""
    gold_rows: PositiveInt | None = None
    """Rows of the validation split to look at, at most; all of them when not given."""
    held_out_fraction: UnitOpenAbove = 0.0
    """Share of the labelled rows held out of training for `teacher`."""
    patience: PositiveInt | None = None
    """Stop after so many epochs in a row without a better score."""


class TrainSection(Section):
    """The distillation job."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 2
    """Training workers, or [fewest, most]: as many of them as the cluster has room for, also after
    the loss of a node; with zero_stage 0."""
    use_gpu: bool = False
    cpus_per_worker: PositiveFloat = 1.0
    threads_per_worker: PositiveInt = 1
    """Threads of one worker on a CPU."""
    max_failures: NonNegativeInt = 2
    """How often the job restarts its workers from the last checkpoint."""
    checkpoint_steps: PositiveInt | None = None
    """Write a checkpoint after so many steps within an epoch too, not only after each epoch."""
    epochs: PositiveInt = 4
    steps: PositiveInt | None = None
    """Train for so many optimizer steps instead of `epochs`, in as many epochs as that takes."""
    batch_size: PositiveInt = 32
    """Rows of one optimizer step, over all workers; at least four for each worker."""
    accumulation: PositiveInt = 1
    """Forward passes that a worker's rows of one step are spread over, to save memory."""
    scoring_batch_size: PositiveInt = 128
    """Rows of one forward pass when the student is only scored."""
    scoring_every: PositiveInt = 1
    """Score the corpus in the first of so many epochs; the others go by the last scores."""
    scoring_parts: PositiveInt = 1
    """Score one of so many parts of the corpus at a time, in turn; the first time all of it."""
    learning_rate: PositiveFloat = 5e-5
    warmup_fraction: Fraction = 0.1
    """Share of the training over which the learning rate rises; then it falls to zero."""
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: PositiveFloat = 1.0
    average_decay: UnitOpenAbove = 0.0
    """Decay of a moving average of the weights, per step; the average is what is scored, validated
    and exported. 0 keeps none."""
    class_balanced: bool = False
    """Scale weights so that each class has the same share of an epoch's loss."""
    soft_targets: Fraction = 0.0
    """Share of the loss that follows the teacher's distribution instead of its label."""
    temperature: PositiveFloat = 1.0
    """Softens both distributions for `soft_targets`."""
    stopping: StoppingSection = StoppingSection()
    keep_signals: bool = True
    """Write what every row's signals were in each epoch, for jobs/explain.py."""
    lessons: bool = False
    """Train also on the rows that the teacher wrote in the rounds of jobs/guide.py, each with the
    label that was asked for and the teacher's confidence in it."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: partitions the optimizer (1), the gradients too (2), the weights too (3). 0
    is the fastest where a worker has room for all of them, as it has for an encoder."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What DeepSpeed moves from the GPU's memory to the machine's: nothing, the optimizer (from
    stage 1), the weights too (stage 3)."""
    deepspeed: Text | None = None
    """JSON file of further DeepSpeed settings, laid over those that follow from this section."""
    bf16: bool = False
    """Train in bfloat16, where the hardware has it."""

    @property
    def most_workers(self) -> int:
        """Return the most workers there can be."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @validator(mode="after")
    def _fits_together(self) -> "TrainSection":
        if isinstance(self.num_workers, tuple) and self.num_workers[0] > self.num_workers[1]:
            raise ValueError("num_workers = [fewest, most]: the fewest are more than the most")
        if self.most_workers > max(1, self.batch_size // 4):
            raise ValueError(
                f"batch_size = {self.batch_size} gives {self.most_workers} workers less than four "
                "rows each; raise it or lower num_workers"
            )
        if self.average_decay and self.zero_stage == 3:
            raise ValueError("average_decay needs whole weights: choose a zero_stage below 3")
        if self.offload != "none" and self.zero_stage < {"optimizer": 1, "all": 3}[self.offload]:
            raise ValueError(f"offload = {self.offload!r} needs a higher zero_stage")
        if isinstance(self.num_workers, tuple) and self.zero_stage:
            raise ValueError(
                "num_workers = [fewest, most] needs zero_stage = 0: DeepSpeed cannot hand an "
                "optimizer in parts to another number of workers"
            )
        return self


class ExportSection(Section):
    """The student for CPUs: ONNX in float32 and, where its answers hold, in int8."""

    int8: bool = True
    max_accuracy_drop: Fraction = 0.01
    """int8 is refused when its accuracy on gold rows is lower than float32's by more than this."""
    max_changed: Fraction = 0.02
    """int8 is refused, where there is no gold, when the share of rows with another prediction than
    float32's is larger than this."""
    max_rows: PositiveInt = 2000
    """Rows to compare on at most: of the test split, else of validation, else unlabeled ones."""


class EvaluateSection(Section):
    """What is scored on the gold test rows."""

    compare_rules: tuple[RuleName, ...] = ()
    """Other rules to train on the same labels and score beside the experiment's own."""
    bootstrap_resamples: PositiveInt = 1000
    calibration_bins: PositiveInt = 10
