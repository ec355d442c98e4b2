"""What a replica tells Prometheus, by Ray's metrics, which Serve tags with the replica's name.

    llkd_serve_requests           by path and status
    llkd_serve_latency_ms         of requests, within the replica
    llkd_serve_labels             texts by the label that was answered
    llkd_serve_confidence         of those labels
    llkd_serve_call_texts         in a call of the student, and llkd_serve_call_ms, its length
    llkd_serve_waiting_tokens     in the student's queue, estimated

What Serve's proxies refuse themselves is in Serve's own metrics.
"""

import collections
import functools
from collections.abc import Sequence

from ray.serve.metrics import Counter, Gauge, Histogram

from llkd_ray.serving.access import Answered
from llkd_ray.serving.batching import Call

_MS = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 3e4, 6e4]
_TENTHS = [tenth / 10 for tenth in range(1, 10)] + [0.95, 0.99]
_POWERS = [float(2**power) for power in range(11)]
_NOBODY = ""
"""The label of a text that nobody was sure enough about."""


class RequestMetrics:
    """Observe requests when they are over."""

    def __init__(self, labels: Sequence[str]) -> None:
        """Register the metrics; inside a replica, so that Serve tags them.

        Args:
            labels: The classes, in the order of the probabilities.
        """
        self._labels = tuple(labels)
        self._requests = Counter(
            "llkd_serve_requests",
            description="Requests answered",
            tag_keys=("path", "status"),  # type: ignore[arg-type]  # Ray means tuple[str, ...].
        )
        self._latency = Histogram(
            "llkd_serve_latency_ms",
            description="From a request's arrival in the replica to its answer",
            boundaries=_MS,
            tag_keys=("path",),
        )
        self._answered = Counter(
            "llkd_serve_labels", description="Texts by the label answered", tag_keys=("label",)
        )
        self._confidence = Histogram(
            "llkd_serve_confidence",
            description="Probability of the label answered",
            boundaries=_TENTHS,
        )

    def __call__(self, answered: Answered) -> None:
        """Count one request."""
        # A path that is not there is the client's invention, and would be a time series of its own.
        path = answered.path if answered.routed else "other"
        self._requests.inc(tags={"path": path, "status": str(answered.status)})
        self._latency.observe(answered.seconds * 1000, {"path": path})
        found = answered.classification
        if found is None:
            return
        best = found.probabilities.argmax(axis=1).tolist()
        by = found.by or ["student"] * len(best)
        mix = collections.Counter(
            _NOBODY if who is None else self._labels[column]
            for who, column in zip(by, best, strict=True)
        )
        for label, texts in mix.items():
            self._answered.inc(texts, {"label": label})
        for confidence in found.probabilities.max(axis=1).tolist():
            self._confidence.observe(confidence)


def observe_call(call: Call) -> None:
    """Count one call of the student."""
    texts, length, waiting = _call_metrics()
    texts.observe(call.texts)
    length.observe(call.seconds * 1000)
    waiting.set(call.waiting)


@functools.cache
def _call_metrics() -> tuple[Histogram, Histogram, Gauge]:
    return (
        Histogram("llkd_serve_call_texts", description="Texts in one call", boundaries=_POWERS),
        Histogram("llkd_serve_call_ms", description="Length of one call", boundaries=_MS),
        Gauge("llkd_serve_waiting_tokens", description="Tokens in the queue, estimated"),
    )
