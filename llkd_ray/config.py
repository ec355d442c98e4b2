"""The experiment: one frozen, typed tree, read from TOML.

There is no second list of flags: an override on the command line is `section.key=value` against
the same tree, and every key is documented by the string below its field.
"""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    ValidationError,
    model_validator,
)

from llkd_ray.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Text = Annotated[str, StringConstraints(min_length=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Section(BaseModel):
    """A table of the experiment file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Label(Section):
    """One class of the task."""

    name: Text
    """The class, as it stands in every artifact and answer."""
    words: Text | None = None
    """What the teacher reads and writes for it; the name when not given."""
    gold: tuple[Text, ...] = ()
    """Values of the gold column that mean this class; the name when not given."""


class Example(Section):
    """A gold row shown to the teacher, and to nobody else: it is left out of the corpus."""

    text: Text
    label: Text


class TaskSection(Section):
    """What is to be told apart, in the words that the teacher reads."""

    instruction: str = ""
    """The first lines of the prompt."""
    text_prefix: str = "Text:"
    """Stands in front of a row's text."""
    label_prefix: str = "Label:"
    """Stands in front of the teacher's answer."""
    labels: Annotated[tuple[Label, ...], Field(min_length=2)]
    """The classes, in the order of every probability vector."""
    examples: tuple[Example, ...] = ()
    """Few-shot examples, in the order in which the teacher reads them."""

    @model_validator(mode="after")
    def _labels_are_told_apart(self) -> "TaskSection":
        names = [label.name for label in self.labels]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the label {name!r} stands twice in task.labels")
        for example in self.examples:
            if example.label not in names:
                raise ValueError(
                    f"the example {example.text[:40]!r} has the label {example.label!r}, which is "
                    f"not among task.labels ({', '.join(names)})"
                )
        return self

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the C classes, in the order of every probability vector."""
        return tuple(label.name for label in self.labels)


class CorpusSection(Section):
    """Where the texts come from and how they are split."""

    source: Text
    """`trec` (built in), or a Parquet, CSV or JSONL file, folder or URI."""
    text_column: Text = "text"
    gold_column: Text | None = None
    """Column with the human's label. Without it nothing can be validated or tested."""
    validation_fraction: Fraction = 0.1
    """Share of the distinct texts held out to choose the epoch (only where there is gold)."""
    test_fraction: Fraction = 0.1
    """Share of the distinct texts held out to score the models (only where there is gold)."""
    shard_rows: PositiveInt = 10_000
    """Rows in one Parquet shard."""
    max_text_chars: PositiveInt = 20_000
    """A longer text is kept aside."""
    max_rejected_fraction: Fraction = 0.1
    """The job stops when a larger share of the rows is kept aside."""


class EngineSection(Section):
    """vLLM engine arguments, under vLLM's own names. The defaults are for a CPU."""

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """float32 on CPUs without native bfloat16, where bfloat16 is emulated and about 50x slower."""
    max_model_len: PositiveInt = 2048
    block_size: PositiveInt | None = 32
    """Tokens in one cached block. The prefix that rows share is cached in whole blocks."""
    max_num_seqs: PositiveInt = 64
    enforce_eager: bool = True
    """Skip graph compilation: a start in seconds, a little less speed."""
    tensor_parallel_size: PositiveInt = 1
    gpu_memory_utilization: OpenFraction = 0.9
    """Share of a GPU's memory, or of the machine's on a CPU, that the engine may plan with."""
    quantization: str | None = None
    cpu_kvcache_gib: PositiveInt = 2
    """Memory for cached keys and values on a CPU. No meaning on a GPU."""


class ActorsSection(Section):
    """The pool of teacher actors that a labelling run may hold."""

    min: PositiveInt = 1
    max: PositiveInt = 1
    num_cpus: PositiveFloat = 1.0
    """CPUs that one actor reserves in Ray; leave some for the readers and writers."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs that one actor reserves, 0 for a CPU engine."""
    threads: PositiveInt = 2
    """Threads of one CPU engine."""

    @model_validator(mode="after")
    def _min_is_not_above_max(self) -> "ActorsSection":
        if self.min > self.max:
            raise ValueError(f"min = {self.min} is above max = {self.max}")
        return self


class TeacherSection(Section):
    """The LLM that labels, and how it is run."""

    kind: Literal["vllm"] = "vllm"
    model: Text = "smollm2-135m-instruct"
    """An embedded model by name, or the folder of a Hugging Face causal language model."""
    splits: tuple[Literal["unlabeled", "validation", "test"], ...] = ("unlabeled", "test")
    """Splits to label. The test split is labelled to score the teacher, never to train."""
    max_unlabeled_rows: PositiveInt | None = None
    """Label this many rows of the unlabeled split, the first by row_id, which is a hash; all when
    not given."""
    batch_size: PositiveInt = 64
    """Rows handed to the engine together, and written together: what a crash costs is the
    batches that were under way."""
    max_rejected_fraction: Fraction = 0.01
    """The job stops when a larger share of the rows gets no answer."""
    engine: EngineSection = EngineSection()
    actors: ActorsSection = ActorsSection()


class CalibrationSection(Section):
    """How the stored log-probabilities become a label and a confidence."""

    kind: Literal["none", "batch"] = "batch"
    """`batch`: divide by the mean probability of each label over the unlabeled rows
    (arXiv 2309.17249). `none`: the teacher's own probabilities."""


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


class ServeSection(Section):
    """The endpoint."""

    target: Literal["student", "teacher"] = "student"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 takes a free port."""
    num_replicas: PositiveInt = 1
    cpus_per_replica: PositiveFloat = 1.0
    gpus_per_replica: NonNegativeFloat = 0.0
    threads_per_replica: PositiveInt = 2
    """Threads of one replica on a CPU."""
    max_batch_texts: PositiveInt = 16
    """Texts that one forward pass of the student takes at most. Small passes waste less on padding
    and are the fastest on a CPU; a GPU wants 64 or more."""
    batch_wait_ms: NonNegativeFloat = 0.0
    """How long an idle student lets a request wait for others to share its pass. Requests that
    come while it computes share the next pass anyway."""
    max_texts_per_request: PositiveInt = 256
    max_text_chars: PositiveInt = 20_000
    max_body_bytes: PositiveInt = 4_000_000
    max_ongoing_requests: PositiveInt = 128
    """Requests that one replica holds at once; the next ones wait in the proxy."""
    max_queued_requests: PositiveInt = 512
    """Requests that wait in a proxy at most; past them the answer is 503."""
    start_timeout_s: PositiveFloat = 600.0
    """The job gives up when the endpoint does not answer by then."""
    token_env: str | None = None
    """Name of the environment variable with the bearer token; no token is asked for without it."""


class BenchSection(Section):
    """What is measured against the endpoints, from outside."""

    student_url: str | None = None
    """A student that already serves; without it the job deploys one and takes it down."""
    teacher_url: str | None = None
    """A teacher that already serves; likewise."""
    warmup_requests: PositiveInt = 4
    single_requests: PositiveInt = 50
    """Requests of one text each, one after the other."""
    batch_requests: PositiveInt = 3
    """Requests of 64 texts each, one after the other."""
    concurrency: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 4)
    """Clients at once, each sending one request of `sweep_texts` texts after the other."""
    sweep_requests: PositiveInt = 6
    """Requests at each concurrency."""
    sweep_texts: PositiveInt = 16
    request_timeout_s: PositiveFloat = 120.0
    """The job stops when one request takes longer."""
    student_usd_per_hour: PositiveFloat = 0.10
    """Price of the machine that serves the student."""
    teacher_usd_per_hour: PositiveFloat = 0.10
    """Price of the machine that serves the teacher."""


class RaySection(Section):
    """The Ray cluster that runs the stages."""

    address: str = "local"
    """`local` starts a private Ray and stops it at the end; `auto` or HOST:PORT joins one.
    RAY_ADDRESS, which `ray job submit` sets, wins over this key."""
    num_cpus: PositiveInt | None = None
    """CPUs of a private Ray; the machine's when not given."""
    object_store_mb: PositiveInt = 512
    """Object store of a private Ray."""


class Experiment(Section):
    """Everything that decides a run."""

    name: Name
    """The run: its artifacts stand in `runs/NAME`."""
    runs: Text = "runs"
    """Folder or URI of all runs."""
    cache: Text = "~/.cache/llkd_ray"
    """Folder for converted models."""
    seed: NonNegativeInt = 0
    task: TaskSection
    corpus: CorpusSection
    teacher: TeacherSection = TeacherSection()
    calibration: CalibrationSection = CalibrationSection()
    selection: SelectionSection = LLKDRule()
    student: StudentSection = StudentSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    serve: ServeSection = ServeSection()
    bench: BenchSection = BenchSection()
    ray: RaySection = RaySection()


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file and apply overrides.

    Args:
        path: The TOML file.
        overrides: `section.key=value`, the value in TOML syntax; a value that is not TOML is
            taken as a string, so that `name=trial` needs no quotes.

    Raises:
        ConfigError: The file is missing or not TOML, a key is unknown, a value does not fit. The
            sentence names the dotted path and, for a key, the nearest one there is.
    """
    file = Path(path)
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{file}: no such experiment file; try jobs/configs/quickstart.toml"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{file}: this is a folder, not an experiment file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None
    for override in overrides:
        _apply(tree, override)
    if isinstance(tree.get("selection"), dict):
        tree["selection"].setdefault("rule", LLKDRule().rule)
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{file}: {_explain(error)}") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write section.key=value, e.g. train.epochs=2")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent} is not a section")
    if leaf == "rule" and node.get("rule") not in (None, value):
        # The keys of one rule mean nothing to another, so naming a rule starts its table afresh.
        node.clear()
    node[leaf] = value


def _explain(error: ValidationError) -> str:
    """Turn the first problem pydantic found into a sentence with a dotted path."""
    problem = error.errors()[0]
    # A discriminated union puts the chosen tag into the path; it is no key of the file.
    path = [part for part in problem["loc"] if not _is_tag(part, problem["loc"])]
    dotted = ".".join(map(str, path))
    rest = len(error.errors()) - 1
    more = f" (and {rest} more)" if rest else ""
    match problem["type"]:
        case "extra_forbidden":
            known = _keys_at(Experiment, problem["loc"][:-1])
            near = difflib.get_close_matches(str(path[-1]), known, n=1)
            hint = (
                f"did you mean {'.'.join([*map(str, path[:-1]), near[0]])}?"
                if near
                else f"known keys here: {', '.join(known)}"
            )
            return f"{dotted}: unknown key; {hint}{more}"
        case "missing":
            return f"{dotted}: this key must be set{more}"
        case "value_error":
            return f"{dotted}: {problem['msg'].removeprefix('Value error, ')}{more}"
        case _:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            return f"{dotted} = {problem['input']!r}: {message}{more}"


def _is_tag(part: str | int, path: tuple[str | int, ...]) -> bool:
    return len(path) > 1 and path[0] == "selection" and path.index(part) == 1 and part in _RULES


_RULES = {option.model_fields["rule"].default: option for option in (LLKDRule, AllRule)}


def _keys_at(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """List the keys known at a path of the experiment."""
    current = model
    for part in path:
        if part in _RULES and current not in (Experiment,):
            current = _RULES[str(part)]
        elif isinstance(part, str):
            found = _section_of(current.model_fields[part].annotation)
            current = found if found is not None else current
    return sorted(current.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = _section_of(inner)
        if found is not None:
            return found
    return None


def rule_named(rule: str, own: LLKDRule | AllRule) -> LLKDRule | AllRule:
    """Return the experiment's own rule if it has this name, else that rule at its defaults."""
    return own if own.rule == rule else _RULES[rule]()


def as_tree(section: BaseModel) -> Mapping[str, Any]:
    """Return a section as plain JSON types, for fingerprints and for printing."""
    tree: Mapping[str, Any] = section.model_dump(mode="json")
    return tree
