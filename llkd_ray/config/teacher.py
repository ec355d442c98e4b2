"""The teacher and what is made of its answers."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    model_validator,
)

from llkd_ray.config.section import Address, Fraction, OpenFraction, Section, Text


class EngineSection(Section):
    """vLLM engine arguments, under vLLM's own names. The defaults are for a CPU."""

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """float32 on CPUs without native bfloat16, where bfloat16 is emulated and about 50x slower."""
    max_model_len: PositiveInt = 2048
    block_size: PositiveInt | None = 32
    """Tokens in one cached block. The prefix that rows share is cached in whole blocks."""
    max_num_seqs: PositiveInt = 64
    max_num_batched_tokens: PositiveInt | None = None
    """Tokens that one step of the engine computes at most; vLLM's own default when not given."""
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
    """CPUs that one actor reserves in Ray; leave some for the readers."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs that one actor reserves for each rank of `tensor_parallel_size`; 0 on a CPU."""
    threads: PositiveInt = 2
    """Threads of one CPU engine."""
    batches_in_flight: PositiveInt = 4
    """Batches that one actor holds at once: while some are computed, others are tokenized and
    written. A crash of the actor costs these batches, no more."""

    @model_validator(mode="after")
    def _min_is_not_above_max(self) -> "ActorsSection":
        if self.min > self.max:
            raise ValueError(f"min = {self.min} is above max = {self.max}")
        return self


class PromptSection(Section):
    """How a text is put before the teacher."""

    format: Literal["plain", "chat"] = "plain"
    """`plain`: text to be completed. `chat`: the tokenizer's chat template, for instruction-tuned
    models."""
    max_text_tokens: PositiveInt | None = None
    """Tokens of one text that the teacher reads; what the engine takes when not given."""
    overlong: Literal["head", "head-tail", "reject"] = "head"
    """What becomes of a longer text: its head is read, or its head and its tail (half of the
    tokens each), or the row is kept aside."""
    align: bool = True
    """Fill the part that all rows share up to a whole cache block, so that no token of it is
    computed again for every row."""


class ShotsSection(Section):
    """Which gold examples the teacher is shown."""

    kind: Literal["fixed", "balanced", "nearest"] = "fixed"
    """`fixed`: task.examples as they stand. `balanced`: `per_label` of each label, the same for
    all rows. `nearest`: the `nearest` ones by embedding, for each row its own (as LLMaAA does,
    arXiv 2310.19596); nothing but the instruction is then shared in the cache."""
    per_label: PositiveInt = 3
    nearest: PositiveInt = 8
    encoder: Text = "minilm-l6"
    """Embeds texts for `nearest`: an embedded encoder by name, or a folder."""


Split = Literal["unlabeled", "validation", "test"]


class TeacherBase(Section):
    """What every kind of teacher shares."""

    splits: tuple[Split, ...] = ("unlabeled", "test")
    """Splits to label. The test split is labelled to score the teacher, never to train; the
    validation split where `calibration.kind` is `temperature`, `vector` or `stacked`."""
    max_unlabeled_rows: PositiveInt | None = None
    """Label this many rows of the unlabeled split, the first by row_id, which is a hash; all when
    not given."""
    batch_size: PositiveInt = 64
    """Rows that an actor takes and writes together."""
    attempts: PositiveInt = 1
    """How often a row is asked about at most. Raised after a run, only the rows without an answer
    are asked about again."""
    max_rejected_fraction: Fraction = 0.01
    """The job stops when a larger share of the rows gets no answer."""
    readout: Literal["auto", "first_token", "letters", "trie"] = "auto"
    """How a label is read. `first_token`: one forward pass, where the labels' words begin with
    different tokens. `letters`: one pass, the labels offered as A, B, C. `trie`: the probability
    of each label's words, token by token. `auto`: `first_token` where that is exact, else
    `trie`; over HTTP, which has no trie, `letters` for up to 26 labels, else votes."""
    prompt: PromptSection = PromptSection()
    shots: ShotsSection = ShotsSection()


class VLLMTeacher(TeacherBase):
    """An LLM that runs on the cluster."""

    kind: Literal["vllm"] = "vllm"
    model: Text = "smollm2-135m-instruct"
    """An embedded model by name, the folder of a Hugging Face causal language model, or one of the
    hub with its revision, NAME/MODEL@REVISION."""
    engine: EngineSection = EngineSection()
    actors: ActorsSection = ActorsSection()
    usd_per_actor_hour: NonNegativeFloat = 0.10
    """Price of what one actor runs on."""
    tokens_per_s: PositiveFloat | None = None
    """Uncached prompt tokens that one actor computes in a second, for the plan of `--dry-run`; as
    measured in this run's earlier labellings when not given."""


class HTTPTeacher(TeacherBase):
    """An LLM behind an OpenAI-compatible endpoint."""

    kind: Literal["http"] = "http"
    url: Annotated[Address, StringConstraints(pattern=r"^https?://")]
    """Base of the API, for instance http://localhost:8000/v1."""
    model: Text
    """As the endpoint names it."""
    api: Literal["completions", "chat"] = "chat"
    api_key_env: str | None = None
    """Name of the environment variable with the key."""
    top_logprobs: NonNegativeInt = 20
    """Log-probabilities to ask for; 0 where the server gives none: then labels are voted on."""
    votes: PositiveInt = 8
    """Answers sampled for one text where there are no log-probabilities."""
    vote_temperature: PositiveFloat = 1.0
    max_concurrency: PositiveInt = 16
    """Requests that one actor has open at once."""
    requests_per_minute: PositiveFloat | None = None
    """Of one actor; no limit when not given."""
    timeout_s: PositiveFloat = 60.0
    max_retries: NonNegativeInt = 6
    """Retries of one request after 429, 5xx or a lost connection, each after a longer wait."""
    actors: ActorsSection = ActorsSection(num_cpus=0.5)
    usd_per_million_input_tokens: NonNegativeFloat = 0.0
    usd_per_million_output_tokens: NonNegativeFloat = 0.0


class ScriptedTeacher(TeacherBase):
    """No language model: answers made from a hash of the text, to simulate scale. Never a result.

    Its labels mean nothing, and every artifact made from them says so.
    """

    kind: Literal["scripted"] = "scripted"
    rows_per_s: PositiveFloat | None = None
    """What one actor answers in a second; as fast as it can when not given."""
    actors: ActorsSection = ActorsSection(num_cpus=0.5)

    @property
    def model(self) -> str:
        """A name that no one takes for a model."""
        return "scripted"


TeacherSection = Annotated[VLLMTeacher | HTTPTeacher | ScriptedTeacher, Field(discriminator="kind")]


ON_GOLD = ("temperature", "vector", "stacked")
"""Kinds of calibration that are fitted on validation rows with gold."""


class CalibrationSection(Section):
    """How the stored log-probabilities become a label and a confidence."""

    kind: Literal["none", "contextual", "batch", "temperature", "vector", "stacked"] = "batch"
    """`none`: the teacher's own probabilities. `contextual`: divide by its probabilities for texts
    without content (arXiv 2102.09690). `batch`: divide by the mean probability of each label over
    the unlabeled rows (arXiv 2309.17249). `temperature`: `batch`, then one temperature fitted on
    the gold validation rows (arXiv 1706.04599). `vector`: a bias for each label as well, fitted
    with it, which mends labels given too often or too rarely; a hundred such rows help. `stacked`:
    what these rows say about texts like this one, too: a logistic regression over the teacher's
    log-probabilities and an embedding of the text (stacked generalization, Wolpert 1992)."""
    encoder: Text = "minilm-l6"
    """Embeds texts for `stacked`: an embedded encoder by name, or a folder."""
    min_label_mass: Fraction = 0.0
    """A row is kept aside where the labels together have a smaller share of the teacher's
    probability: it wanted to say something else."""
