"""What a million texts cost, and how teacher and student compare."""

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from llkd_ray.bench.load import Measurement, Sample
from llkd_ray.errors import EndpointError
from llkd_ray.metrics import percentiles_ms
from llkd_ray.schema import BenchSummary, EndpointSummary, Latency

_OK = 200


def cost_usd_per_million(usd_per_hour: float, texts_per_s: float) -> float:
    """Return the machine's price for a million texts at a rate."""
    return usd_per_hour / 3600 / texts_per_s * 1_000_000


def texts_per_s(samples: list[Sample]) -> float:
    """Return answered texts over the time from the first request's start to the last one's end."""
    answered = [sample for sample in samples if sample.status == _OK]
    if not answered:
        return 0.0
    start = min(sample.start_s for sample in answered)
    end = max(sample.start_s + sample.latency_ms / 1000 for sample in answered)
    return sum(sample.texts for sample in answered) / (end - start)


def sweep_texts_per_s(samples: list[Sample]) -> dict[int, float]:
    """Return the rate at each concurrency of the sweep."""
    sweep = [sample for sample in samples if sample.measure == "sweep"]
    return {
        concurrency: texts_per_s([s for s in sweep if s.concurrency == concurrency])
        for concurrency in sorted({sample.concurrency for sample in sweep})
    }


def summarize(measured: Measurement, usd_per_hour: float) -> EndpointSummary:
    """Condense an endpoint's samples; requests that failed count for nothing here.

    Raises:
        EndpointError: Not one request of a measure was answered.
    """
    single = _latencies_ms(measured, "single")
    batch = _latencies_ms(measured, "batch64")
    _latencies_ms(measured, "sweep")
    rate = max(sweep_texts_per_s(measured.samples).values())
    return EndpointSummary(
        latency_ms=Latency(**percentiles_ms(np.array(single))),
        batch64_s=statistics.median(batch) / 1000,
        texts_per_s=rate,
        cost_usd_per_million=cost_usd_per_million(usd_per_hour, rate),
    )


def compare(teacher: EndpointSummary, student: EndpointSummary) -> BenchSummary:
    """Put teacher and student side by side."""
    return BenchSummary(
        teacher=teacher,
        student=student,
        speedup=teacher.batch64_s / student.batch64_s,
        cost_ratio=teacher.cost_usd_per_million / student.cost_usd_per_million,
    )


def details(measured: Measurement, gold: Mapping[str, str | None]) -> dict[str, Any]:
    """Return what an endpoint is, its rate at each concurrency, and how often it was right.

    Args:
        measured: The endpoint's samples and answers.
        gold: Gold label of every text that was sent, None where it is not known.
    """
    known = {text: gold[text] for text in measured.labels if gold[text] is not None}
    right = sum(measured.labels[text] == label for text, label in known.items())
    return {
        "model": measured.model,
        "sweep_texts_per_s": sweep_texts_per_s(measured.samples),
        "accuracy": right / len(known) if known else None,
        "accuracy_rows": len(known),
    }


def _latencies_ms(measured: Measurement, measure: str) -> list[float]:
    of_measure = [sample for sample in measured.samples if sample.measure == measure]
    answered = [sample.latency_ms for sample in of_measure if sample.status == _OK]
    if not answered:
        statuses = sorted({sample.status for sample in of_measure})
        raise EndpointError(
            f"the {measured.endpoint} answered none of the {len(of_measure)} requests of the "
            f"measure {measure!r} (HTTP {', '.join(map(str, statuses))})"
        )
    return answered
