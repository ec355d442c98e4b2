"""The endpoint, what is measured against it, and the cluster that runs it all."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from llkd_ray.config.section import Address, Name, Section

ServeTarget = Literal["student", "teacher", "cascade"]
"""What an experiment can serve."""
StudentSource = Literal["trained", "guided"]
"""Who made a student: jobs/train.py or jobs/guide.py."""
ProtocolName = Literal["llkd", "vllm", "tei"]
"""Ours (POST /v1/classify), vLLM's (/classify), text-embeddings-inference's (/predict)."""


class ServeSection(Section):
    """The endpoint."""

    target: ServeTarget = "student"
    student: StudentSource = "trained"
    """trained: what jobs/train.py makes. guided: what jobs/guide.py makes; evaluation, cascade,
    bench and report are then about it, too."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 takes a free port."""
    ingress: Literal["serve", "haproxy"] = "serve"
    """What stands before the replicas: Serve's own proxy in Python, or HAProxy, which Serve starts
    and which leaves more of the machine to them."""
    num_replicas: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Or [fewest, most]: as many of them as `target_ongoing_requests` asks for."""
    target_ongoing_requests: PositiveFloat = 8.0
    """Requests of one replica, those that wait included, past which there are to be more."""
    downscale_delay_s: PositiveFloat = 300.0
    """For so long there must have been too many replicas before one is taken down."""
    cpus_per_replica: PositiveFloat = 2.0
    gpus_per_replica: NonNegativeFloat = 0.0
    threads_per_replica: PositiveInt | None = None
    """Threads of one replica on a CPU; as many as its CPUs when not given."""
    backend: Literal["auto", "torch", "onnx", "onnx-int8"] = "auto"
    """What computes the student. auto: torch on a GPU, on a CPU ONNX Runtime in float32 (`onnx`).
    onnx-int8 is faster, but what it answers to a text depends on the texts that share its pass."""
    max_batch_texts: PositiveInt = 16
    """Texts that one forward pass of the student takes at most. Small passes waste less on padding
    and are the fastest on a CPU; a GPU wants 64 or more."""
    max_batch_tokens: PositiveInt = 512
    """Tokens that one forward pass of the student takes at most, padding included. About 512 are
    the fastest on a CPU, whose caches hold them; a GPU wants 8,192 or more."""
    batch_wait_ms: NonNegativeFloat = 0.0
    """How long an idle student lets a request wait for others to share its pass. Requests that
    come while it computes share the next pass anyway."""
    max_texts_per_request: PositiveInt = 256
    max_text_chars: PositiveInt = 20_000
    max_body_bytes: PositiveInt = 4_000_000
    max_queue_ms: PositiveFloat = 1000.0
    """A request that would wait for longer than this for the student is refused at once, with 429
    and the seconds after which to ask again. The wait is known from the texts in front of it and
    from the rate of the calls before."""
    max_ongoing_requests: PositiveInt = 512
    """Requests that one replica holds at once; the next ones wait in the proxy."""
    max_queued_requests: PositiveInt = 512
    """Requests that wait in a proxy at most, as they do while a replica starts; past them the
    answer is 429."""
    deadline_s: PositiveFloat = 60.0
    """A request without an answer by then is dropped, uncomputed if it still waits, and answered
    504. The header X-Request-Timeout-Seconds sets another deadline for one request, of up to
    999 s."""
    start_timeout_s: PositiveFloat = 600.0
    """The job gives up when the endpoint does not answer by then."""
    access_log: bool = True
    """One line of JSON per request, without its texts, in what the replica prints: Ray keeps it
    among its logs as worker-*.out."""
    token_env: str | None = None
    """Name of the environment variable with the bearer token; no token is asked for without it."""

    @property
    def threads(self) -> int:
        """Return the threads of one replica on a CPU."""
        return self.threads_per_replica or max(1, int(self.cpus_per_replica))

    @property
    def on_onnx(self) -> bool:
        """Return whether the student is served by ONNX Runtime."""
        return self.backend != "torch" and not self.gpus_per_replica

    @validator(mode="after")
    def _fits_together(self) -> "ServeSection":
        if isinstance(self.num_replicas, tuple) and self.num_replicas[0] > self.num_replicas[1]:
            raise ValueError("num_replicas = [fewest, most]: the fewest are more than the most")
        if self.backend.startswith("onnx") and self.gpus_per_replica:
            raise ValueError(
                f"backend = {self.backend!r} computes on CPUs; with gpus_per_replica choose "
                "'torch' or 'auto'"
            )
        return self


class OtherEndpoint(Section):
    """An endpoint that serves already, to be measured beside the experiment's own."""

    name: Name
    url: Address
    protocol: ProtocolName = "llkd"
    token_env: str | None = None
    """Name of the environment variable with the bearer token that it asks for."""
    usd_per_hour: PositiveFloat = 0.10
    """Price of the machine that serves it."""


class BenchSection(Section):
    """What is measured against the endpoints, from outside."""

    targets: tuple[ServeTarget, ...] = ("teacher", "student")
    """Which of the experiment's own are measured; teacher and student must be among them."""
    others: tuple[OtherEndpoint, ...] = ()
    student_url: Address | None = None
    """A student that already serves; without it the job deploys one and takes it down."""
    teacher_url: Address | None = None
    """A teacher that already serves; likewise."""
    warmup_requests: PositiveInt = 4
    """Requests of one text each; one of 64 follows them."""
    single_requests: PositiveInt = 50
    """Requests of one text each, one after the other."""
    batch_requests: PositiveInt = 5
    """Requests of 64 texts each, one after the other."""
    concurrency: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 4)
    """Clients at once, each sending one request of `sweep_texts` texts after the other."""
    sweep_requests: PositiveInt = 12
    """Requests at each concurrency."""
    sweep_texts: PositiveInt = 16
    latency_target_ms: PositiveFloat = 500.0
    """The open loop searches for the highest rate of requests of one text, coming at random, of
    which `latency_percentile` per cent are answered within this time."""
    latency_percentile: Annotated[float, Field(gt=0.0, lt=100.0)] = 95.0
    open_s: PositiveFloat = 4.0
    """For how long requests come at each rate that is tried."""
    search_tries: NonNegativeInt = 6
    """Rates that the search tries at most; 0 leaves it out."""
    rates_per_s: tuple[PositiveFloat, ...] = ()
    """Rates that the open loop measures besides, such as that of your own traffic."""
    seed: int = 0
    """Of the arrivals and of the bootstrap."""
    request_timeout_s: PositiveFloat = 120.0
    """The job stops when one request takes longer."""
    student_usd_per_hour: PositiveFloat = 0.10
    """Price of the machine that serves the student."""
    teacher_usd_per_hour: PositiveFloat = 0.10
    """Price of the machine that serves the teacher."""

    def url_of(self, target: ServeTarget) -> str | None:
        """Return where one of our own serves already, None where it has to be deployed."""
        return {"student": self.student_url, "teacher": self.teacher_url}.get(target)

    def usd_per_hour_of(self, name: str) -> float:
        """Return the price of an endpoint's machine; whatever holds the teacher costs the same."""
        if name == "student":
            return self.student_usd_per_hour
        prices = {other.name: other.usd_per_hour for other in self.others}
        return prices.get(name, self.teacher_usd_per_hour)

    @validator(mode="after")
    def _endpoints_are_told_apart(self) -> "BenchSection":
        names = [*self.targets, *(other.name for other in self.others)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]!r} names two endpoints of targets and others")
        if len(set(self.concurrency)) < len(self.concurrency):
            raise ValueError("concurrency names a number twice; a sweep of it is one measure")
        if not {"teacher", "student"} <= set(self.targets):
            raise ValueError("targets must have teacher and student, which are compared")
        return self


class RaySection(Section):
    """The Ray cluster that runs the stages."""

    address: str = "local"
    """`local` starts a private Ray and stops it at the end; `auto` or HOST:PORT joins one.
    RAY_ADDRESS, which `ray job submit` sets, wins over this key."""
    num_cpus: PositiveInt | None = None
    """CPUs of a private Ray; the machine's when not given."""
    object_store_mb: PositiveInt = 512
    """Object store of a private Ray."""
