"""What measuring an endpoint leaves."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Sample(NamedTuple):
    """One request: a row of schema.SAMPLES."""

    endpoint: str
    measure: str
    concurrency: int | None
    rate_per_s: float | None
    texts: int
    start_s: float
    sent_s: float
    latency_ms: float
    status: int


@dataclass
class Measurement:
    """What came back from one endpoint."""

    endpoint: str
    model: str
    """What the endpoint calls itself."""
    samples: list[Sample] = field(default_factory=list)
    labels: dict[str, str | None] = field(default_factory=dict)
    """The endpoint's answer for each text of the closed loops, None where it abstained."""
    max_rate_per_s: float | None = None
    """Highest rate of the open loop that was within the latency target, None where none was."""
