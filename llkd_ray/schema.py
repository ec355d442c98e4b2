"""Columns that each stage reads and writes, and the keys of summary.json.

C is the number of classes; probability vectors follow the order of task.labels.
"""

from typing import get_args

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from llkd_ray.config import CalibrationSection

CALIBRATIONS: tuple[str, ...] = get_args(CalibrationSection.model_fields["kind"].annotation)
"""Kinds of calibration, from none to the one that asks most."""

TEXT = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),  # 32 hex digits, from the text alone
        pa.field("text", pa.string(), nullable=False),
        pa.field("gold", pa.string()),  # a label name, or null
    ]
)
"""corpus/SPLIT/shard-*.parquet, SPLIT one of unlabeled, validation, test."""

REJECTED = pa.schema(
    [
        pa.field("where", pa.string(), nullable=False),  # file and row number, or row_id
        pa.field("reason", pa.string(), nullable=False),
        pa.field("content", pa.string()),  # the first 200 characters of what stood there
    ]
)
"""rejected.parquet of any artifact: rows kept aside."""


def readouts(num_classes: int) -> pa.Schema:
    """Return the columns of the teacher's raw answers."""
    return pa.schema(
        [
            pa.field("row_id", pa.string(), nullable=False),
            # Natural logarithm of the full-vocabulary probability of each label's token.
            pa.field("logprobs", pa.list_(pa.float32(), num_classes)),
            pa.field("prompt_tokens", pa.int32(), nullable=False),
            pa.field("cached_tokens", pa.int32(), nullable=False),  # of these, from the cache
            pa.field("cut_tokens", pa.int32(), nullable=False),  # of the text, left out to fit
            pa.field("error", pa.string()),  # why there are no logprobs, else null
        ]
    )


def labels(num_classes: int) -> pa.Schema:
    """Return the columns of labels/SPLIT/shard-*.parquet.

    Label, confidence and probabilities are those of the chosen calibration. Beside them stands the
    confidence that each calibration would give, in the label that it would choose; null where that
    calibration could not be fitted.
    """
    return pa.schema(
        [
            *TEXT,
            pa.field("label", pa.string(), nullable=False),  # argmax of probabilities
            pa.field("confidence", pa.float32(), nullable=False),  # its probability, 0 to 1
            pa.field("probabilities", pa.list_(pa.float32(), num_classes), nullable=False),
            pa.field("logprobs", pa.list_(pa.float32(), num_classes), nullable=False),
            pa.field("label_mass", pa.float32(), nullable=False),  # sum of raw probabilities
            *(pa.field(f"confidence_{kind}", pa.float32()) for kind in CALIBRATIONS),
        ]
    )


RELIABILITY = pa.schema(
    [
        pa.field("calibration", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        # `bin`: ten equally wide ranges of confidence; `decile`: ten times equally many rows.
        pa.field("table", pa.string(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),  # 0 to 9; empty ones are left out
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("confidence_mean", pa.float64(), nullable=False),
        pa.field("accuracy", pa.float64(), nullable=False),
        pa.field("lower", pa.float64(), nullable=False),  # of the confidence
        pa.field("upper", pa.float64(), nullable=False),
    ]
)
"""labels/reliability.parquet: every calibration against gold, on the rows that have it."""


AUDIT = pa.schema(
    [
        pa.field("epoch", pa.int32()),  # from 1
        pa.field("label", pa.string()),
        pa.field("rows", pa.int64()),  # with this label
        pa.field("kept", pa.int64()),
        # That the student is uncertain of: at or above its threshold, or 0.5 where there is none.
        pa.field("uncertain", pa.int64()),
        pa.field("used", pa.int64()),  # trained on in this or an earlier epoch
        pa.field("teacher_threshold", pa.float64()),  # null where the rule has none
        pa.field("student_threshold", pa.float64()),
        pa.field("joint_threshold", pa.float64()),
        # Of the student's probability of this class: freematch, flexmatch, confident-learning.
        pa.field("probability_threshold", pa.float64()),
        pa.field("confidence_kept", pa.float64()),  # means; null where there is no row
        pa.field("confidence_dropped", pa.float64()),
        pa.field("uncertainty_kept", pa.float64()),
        pa.field("uncertainty_dropped", pa.float64()),
        pa.field("purity_kept", pa.float64()),  # share of labels equal to gold; null without gold
        pa.field("purity_uncertain", pa.float64()),  # of the uncertain rows, kept or not
        pa.field("purity_all", pa.float64()),
    ]
)
"""student/audit.parquet: one row per epoch and class. Gold is read for this, never trained on."""

EPOCHS = pa.schema(
    [
        pa.field("epoch", pa.int32()),
        pa.field("kept", pa.int64()),
        pa.field("rows", pa.int64()),
        pa.field("distinct_rows", pa.int64()),  # trained on in this or an earlier epoch
        pa.field("steps", pa.int64()),  # optimizer steps since the start
        pa.field("row_steps", pa.int64()),  # rows trained on since the start, once per epoch
        pa.field("loss", pa.float64()),  # weighted mean over the epoch
        pa.field("validation_accuracy", pa.float64()),  # null without gold
        pa.field("validation_macro_f1", pa.float64()),
        # Against the teacher's surest labels on rows held out; null where none are.
        pa.field("held_out_macro_f1", pa.float64()),
        pa.field("score", pa.float64()),  # what the best epoch has most of; null: the last is best
        pa.field("scoring_s", pa.float64()),
        pa.field("selection_s", pa.float64()),
        pa.field("training_s", pa.float64()),
    ]
)
"""student/epochs.parquet."""

SIGNALS = pa.schema(
    [
        pa.field("row_id", pa.string()),
        pa.field("confidence", pa.float32()),  # of the teacher in its label
        pa.field("uncertainty", pa.float32()),  # of the student; null where it was not asked
        pa.field("student_of_label", pa.float32()),  # its probability of the teacher's label
        pa.field("kept", pa.bool_()),
        pa.field("weight", pa.float32()),  # in the loss; 0 of a dropped row
    ]
)
"""student/signals/epoch-EPOCH-WORKER-of-WORKERS.parquet: every row, as it was in that epoch."""


def predictions(num_classes: int) -> pa.Schema:
    """Return the columns of scores/predictions.parquet: one row per model and test row."""
    return pa.schema(
        [
            pa.field("model", pa.string()),  # `teacher`, `teacher_uncalibrated`, or a rule's name
            pa.field("row_id", pa.string()),
            pa.field("gold", pa.string()),
            pa.field("predicted", pa.string()),
            pa.field("probabilities", pa.list_(pa.float32(), num_classes)),
        ]
    )


CURVE = pa.schema(
    [
        # The teacher is asked where the student's confidence is below: 0 nowhere, 2 everywhere.
        pa.field("threshold", pa.float64()),
        pa.field("teacher_fraction", pa.float64()),  # of the rows, that the teacher is asked about
        pa.field("answered_fraction", pa.float64()),  # of the rows, with an answer sure enough
        pa.field("accuracy", pa.float64()),  # of these answers
        # Whether the teacher is right more often on the rows it is asked about, beyond chance.
        pa.field("helps", pa.bool_()),
    ]
)
"""cascade/curve.parquet: the cascade on the validation rows, from the student alone on."""


PROMPTS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),  # that the teacher is to write about
        pa.field("first", pa.int32(), nullable=False),  # index of its first sample in the label
        pa.field("samples", pa.int32(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)
"""lessons/prompts.parquet: what the teacher was given to write on."""


def written(num_classes: int) -> pa.Schema:
    """Return the columns of what the teacher wrote, before any check."""
    return pa.schema(
        [
            pa.field("sample_id", pa.string(), nullable=False),  # ROUND-LABEL-INDEX, in numbers
            pa.field("prompt_id", pa.string(), nullable=False),
            pa.field("label", pa.string(), nullable=False),  # asked for
            pa.field("seed", pa.int64(), nullable=False),  # of the sampling
            pa.field("text", pa.string(), nullable=False),
            pa.field("finished", pa.bool_(), nullable=False),  # came to its end
            pa.field("tokens", pa.int32(), nullable=False),  # written
            pa.field("prompt_tokens", pa.int32(), nullable=False),
            pa.field("cached_tokens", pa.int32(), nullable=False),  # of the prompt's
            # As in readouts: what the teacher says of its text, asked for the label.
            pa.field("logprobs", pa.list_(pa.float32(), num_classes)),
            pa.field("readout_tokens", pa.int32(), nullable=False),
            pa.field("readout_cached_tokens", pa.int32(), nullable=False),
            pa.field("error", pa.string()),
        ]
    )


def lessons(num_classes: int) -> pa.Schema:
    """Return the columns of lessons/samples.parquet: every text of a round, kept or not."""
    return pa.schema(
        [
            *written(num_classes),
            pa.field("read_label", pa.string()),  # the teacher's, of its own text
            pa.field("confidence", pa.float32()),  # in it, calibrated
            pa.field("student_label", pa.string(), nullable=False),
            pa.field("uncertainty", pa.float32(), nullable=False),  # of the student
            pa.field("dropped", pa.string()),  # why; null where the row is kept
        ]
    )


SAMPLES = pa.schema(
    [
        pa.field("endpoint", pa.string()),  # teacher, student, or another's name
        pa.field("measure", pa.string()),  # single, batch64 or sweep, which are closed loops; open
        pa.field("concurrency", pa.int32()),  # clients of a closed loop; null of an open one
        pa.field("rate_per_s", pa.float64()),  # requests offered by an open loop; null of a closed
        pa.field("texts", pa.int32()),
        pa.field("start_s", pa.float64()),  # since the measure began; meant time of an open loop
        pa.field("sent_s", pa.float64()),  # when the client really sent it
        pa.field("latency_ms", pa.float64()),  # from start_s to the answer
        pa.field("status", pa.int32()),  # HTTP; 0 where the connection broke
    ]
)
"""bench/samples.parquet: every request that was sent after the warm-up."""


class _Keys(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Bounded(_Keys):
    """A value with its bootstrap 95 % interval."""

    value: float
    low: float
    high: float


class ModelScore(_Keys):
    """One model on the gold test rows (scores/scores.json holds one per model)."""

    accuracy: Bounded
    macro_f1: Bounded
    ece: Bounded
    """Expected calibration error, 0 best."""
    rows: int
    ece_as_trained: Bounded | None = None
    """Of a student before its temperature; null of a teacher, and of a student without one."""
    temperature: float | None = None


class CascadeScore(_Keys):
    """A cascade on the gold rows of a split that the teacher answered."""

    rows: int
    teacher_fraction: float
    """Share of the rows that the teacher is asked about."""
    answered_fraction: float
    """Share of the rows with an answer that is sure enough."""
    accuracy: Bounded
    """Of these answers."""
    student: Bounded
    """Accuracy of the student alone, answering every row."""
    teacher: Bounded
    gain: Bounded
    """Accuracy that the teacher adds to the student's on all rows, none of them withheld."""


class CascadeSummary(_Keys):
    """cascade/cascade.json: where the student hands over to the teacher."""

    threshold: float
    """The teacher is asked where the student's confidence is below it; 0: never."""
    reached: bool
    """Whether the target is met on the validation rows."""
    reason: str
    validation: CascadeScore
    """The threshold was chosen on these rows."""
    test: CascadeScore | None


class CorpusSummary(_Keys):
    """Rows per split, and rows kept aside."""

    unlabeled: int
    validation: int
    test: int
    rejected: int


class LabelsSummary(_Keys):
    """The teacher on the unlabeled split; its quality is null where there is no gold."""

    rows: int
    rejected: int
    rejected_label_mass: int
    """Of the rejected: its labels together had less probability than was asked for."""
    duplicates: int
    """Rows that stand twice among the labels: 0, or something is broken."""
    cut_rows: int | None
    """Rows of which the teacher did not read all, in all splits; null where nobody counted."""
    calibration: str
    accuracy: float | None
    accuracy_uncalibrated: float | None
    accuracy_confident_half: float | None
    """Of the half of the rows with the most confidence."""
    macro_f1: float | None
    ece: float | None
    rows_per_s: float
    """Rows answered over seconds between first and last answer of the last call; all splits."""
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt tokens, those the engine took from its prefix cache."""


class TeacherSummary(_Keys):
    """The teacher on the gold test rows."""

    accuracy: float | None
    macro_f1: float | None


class StudentSummary(_Keys):
    """The student on the gold test rows, and what its training took."""

    rule: str
    """Or `guided`."""
    accuracy: float | None
    macro_f1: float | None
    ece: float | None
    ece_as_trained: float | None
    """Before the temperature."""
    temperature: float | None
    rows_used_fraction: float
    """Row-steps trained on over row-steps of all rows in every epoch."""
    optimizer_steps: int


class Latency(_Keys):
    """Milliseconds of a request with one text, one client."""

    p50: float
    p95: float
    p99: float


class Offered(_Keys):
    """Requests of one text that came at random at one rate (an open loop)."""

    rate_per_s: float
    requests: int
    """Fewer than the rate makes where so many were late that sending was given up."""
    failed: int
    latency_ms: Latency | None
    """Of the answered ones, from the moment they were meant to be sent; null where none was."""
    met: bool
    """Whether enough of them were answered within the latency target."""


class EndpointSummary(_Keys):
    """One endpoint, measured from outside."""

    model: str
    """What it calls itself."""
    latency_ms: Latency
    batch64_s: float
    """Median seconds of a request with 64 texts."""
    texts_per_s: float
    """Highest of the concurrency sweep."""
    texts_per_s_by_clients: dict[int, float]
    cost_usd_per_million: float
    """Price of the machine over that throughput, for a million texts."""
    accuracy: Bounded | None
    """On the gold test texts that every endpoint answered; null where there is no gold."""
    requests: int
    """Of the closed loops."""
    failed: int
    """Of these, those not answered with HTTP 200."""
    max_rate_per_s: float | None
    """Highest rate of the open loop that met the latency target; null where none did."""
    open_loop: list[Offered]
    """By rate, the lowest first."""
    intervals: dict[str, tuple[float, float]]
    """Bootstrap 95 % intervals of p50, p95 and p99 (ms), as far as the requests are enough for
    them, batch64_s, texts_per_s and cost_usd_per_million."""


class BenchSummary(_Keys):
    """Teacher and student side by side, and beside them whatever else was measured."""

    teacher: EndpointSummary
    student: EndpointSummary
    others: dict[str, EndpointSummary]
    speedup: float
    """Seconds per batch of 64, teacher over student."""
    throughput_ratio: float
    """Texts per second, student over teacher."""
    cost_ratio: float
    """Cost per million, teacher over student."""
    latency_target_ms: float
    latency_percentile: float
    """This percentage of requests had to be answered within the target."""

    @property
    def endpoints(self) -> dict[str, EndpointSummary]:
        """Every endpoint by name, teacher and student first."""
        return {"teacher": self.teacher, "student": self.student, **self.others}

    @property
    def latency_levels(self) -> list[str]:
        """The percentiles that every endpoint was asked often enough for."""
        ends = self.endpoints.values()
        return [
            level for level in ("p50", "p95", "p99") if all(level in end.intervals for end in ends)
        ]


class Summary(_Keys):
    """summary.json: a section is null until its stage has been run."""

    name: str
    corpus: CorpusSummary | None
    labels: LabelsSummary | None
    teacher: TeacherSummary | None
    student: StudentSummary | None
    others: list[StudentSummary]
    """Students trained with evaluate.compare_rules."""
    cascade: CascadeSummary | None
    bench: BenchSummary | None
    seconds: dict[str, float]
    """Wall-clock seconds of each stage, as in its manifest."""
