"""Samples in, figures out: latency, throughput, what a million texts cost, and who is ahead."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llkd_ray.bench.measurement import Measurement, Sample
from llkd_ray.bench.open_loop import is_met
from llkd_ray.bench.session import OK
from llkd_ray.config import BenchSection
from llkd_ray.errors import EndpointError
from llkd_ray.metrics import Floats, Interval, Ints, bootstrap_interval, percentiles_ms
from llkd_ray.schema import BenchSummary, Bounded, EndpointSummary, Latency, Offered

_RESAMPLES = 1000
# No interval for a percentile that lies above all of so few requests more often than this.
_ALL_BELOW = 0.1


def cost_usd_per_million(usd_per_hour: float, texts_per_s: float) -> float:
    """Return the machine's price for a million texts at a rate."""
    return usd_per_hour / 3600 / texts_per_s * 1_000_000


def texts_per_s(samples: Sequence[Sample], seed: int) -> Interval:
    """Return answered texts over the time from the first request's start to the last one's end.

    The interval follows from resampled requests: clients that always wait for an answer make a rate
    that is inverse to their mean latency (Little's law). It takes requests for independent.

    Args:
        samples: Of one closed loop, at least one of them answered.
        seed: Of the bootstrap.
    """
    answered = [sample for sample in samples if sample.status == OK]
    texts = np.array([sample.texts for sample in answered], dtype=np.float64)
    latency_s = np.array([sample.latency_ms / 1000 for sample in answered])
    start_s = np.array([sample.start_s for sample in answered])
    seconds = float((start_s + latency_s).max() - start_s.min())
    clients = float(latency_s.sum()) / seconds  # That waited at a time, on average.

    def rate(rows: Ints) -> float:
        return float(clients * texts[rows].sum() / latency_s[rows].sum())

    return bootstrap_interval(rate, len(answered), _RESAMPLES, seed)


def sweep_texts_per_s(samples: Sequence[Sample], seed: int) -> dict[int, Interval]:
    """Return the rate at each concurrency of the sweep that was answered."""
    sweep: dict[int, list[Sample]] = {}
    for sample in samples:
        if sample.measure == "sweep" and sample.concurrency is not None:
            sweep.setdefault(sample.concurrency, []).append(sample)
    return {
        concurrency: texts_per_s(of_concurrency, seed)
        for concurrency, of_concurrency in sorted(sweep.items())
        if any(sample.status == OK for sample in of_concurrency)
    }


def summarize(
    measured: Measurement,
    bench: BenchSection,
    *,
    usd_per_hour: float,
    gold: Mapping[str, str | None],
) -> EndpointSummary:
    """Condense an endpoint's samples; requests that failed are counted, and are in no figure.

    Args:
        measured: Samples and answers.
        bench: What was measured.
        usd_per_hour: Price of the endpoint's machine.
        gold: Gold label of each text to judge by; texts that were not answered are left out.

    Raises:
        EndpointError: Not one request of a measure was answered.
    """
    single = _latencies_ms(measured, "single")
    batch_s = _latencies_ms(measured, "batch64") / 1000
    _latencies_ms(measured, "sweep")
    sweep = sweep_texts_per_s(measured.samples, bench.seed)
    rate = max(sweep.values(), key=lambda interval: interval.value)
    closed = [sample for sample in measured.samples if sample.measure != "open"]

    def of_single(percentile: int) -> tuple[float, float]:
        return _bounds(
            lambda rows: float(np.percentile(single[rows], percentile)), len(single), bench.seed
        )

    return EndpointSummary(
        model=measured.model,
        latency_ms=Latency(**percentiles_ms(single)),
        batch64_s=float(np.median(batch_s)),
        texts_per_s=rate.value,
        texts_per_s_by_clients={clients: found.value for clients, found in sweep.items()},
        cost_usd_per_million=cost_usd_per_million(usd_per_hour, rate.value),
        accuracy=_accuracy(measured, gold, bench.seed),
        requests=len(closed),
        failed=sum(sample.status != OK for sample in closed),
        max_rate_per_s=measured.max_rate_per_s,
        open_loop=_offered(measured, bench),
        intervals={
            **{
                f"p{percentile}": of_single(percentile)
                for percentile in (50, 95, 99)
                if (percentile / 100) ** len(single) < _ALL_BELOW
            },
            "batch64_s": _bounds(
                lambda rows: float(np.median(batch_s[rows])), len(batch_s), bench.seed
            ),
            "texts_per_s": (rate.low, rate.high),
            "cost_usd_per_million": (
                cost_usd_per_million(usd_per_hour, rate.high),
                cost_usd_per_million(usd_per_hour, rate.low),
            ),
        },
    )


def compare(endpoints: Mapping[str, EndpointSummary], bench: BenchSection) -> BenchSummary:
    """Put teacher and student side by side, and beside them whatever else was measured.

    Args:
        endpoints: By name, `teacher` and `student` among them.
        bench: What was measured.
    """
    teacher, student = endpoints["teacher"], endpoints["student"]
    return BenchSummary(
        teacher=teacher,
        student=student,
        others={
            name: found for name, found in endpoints.items() if name not in ("teacher", "student")
        },
        speedup=teacher.batch64_s / student.batch64_s,
        throughput_ratio=student.texts_per_s / teacher.texts_per_s,
        cost_ratio=teacher.cost_usd_per_million / student.cost_usd_per_million,
        latency_target_ms=bench.latency_target_ms,
        latency_percentile=bench.latency_percentile,
    )


def answered_by_all(
    measured: Sequence[Measurement], gold: Mapping[str, str | None]
) -> dict[str, str | None]:
    """Return gold of the texts that every endpoint answered, so that all are judged alike."""
    return {
        text: label for text, label in gold.items() if all(text in one.labels for one in measured)
    }


def _accuracy(measured: Measurement, gold: Mapping[str, str | None], seed: int) -> Bounded | None:
    # In the order of gold: answers stand in the order in which they came, each time another, and
    # the interval would follow it.
    known = [text for text, label in gold.items() if label is not None and text in measured.labels]
    if not known:
        return None
    right = np.array([measured.labels[text] == gold[text] for text in known])
    found = bootstrap_interval(lambda rows: float(right[rows].mean()), len(known), _RESAMPLES, seed)
    return Bounded(value=found.value, low=found.low, high=found.high)


def _offered(measured: Measurement, bench: BenchSection) -> list[Offered]:
    """Condense the open loop, from the lowest rate to the highest."""
    by_rate: dict[float, list[Sample]] = {}
    for sample in measured.samples:
        if sample.rate_per_s is not None:
            by_rate.setdefault(sample.rate_per_s, []).append(sample)
    found = []
    for rate_per_s, samples in sorted(by_rate.items()):
        answered = np.array([s.latency_ms for s in samples if s.status == OK], dtype=np.float64)
        found.append(
            Offered(
                rate_per_s=rate_per_s,
                requests=len(samples),
                failed=len(samples) - len(answered),
                latency_ms=Latency(**percentiles_ms(answered)) if len(answered) else None,
                met=is_met(samples, bench),
            )
        )
    return found


def _bounds(statistic: Callable[[Ints], float], rows: int, seed: int) -> tuple[float, float]:
    found = bootstrap_interval(statistic, rows, _RESAMPLES, seed)
    return found.low, found.high


def _latencies_ms(measured: Measurement, measure: str) -> Floats:
    of_measure = [sample for sample in measured.samples if sample.measure == measure]
    answered = [sample.latency_ms for sample in of_measure if sample.status == OK]
    if not answered:
        statuses = sorted({sample.status for sample in of_measure})
        raise EndpointError(
            f"the {measured.endpoint} answered none of the {len(of_measure)} requests of the "
            f"measure {measure!r} (HTTP {', '.join(map(str, statuses))})"
        )
    return np.array(answered, dtype=np.float64)
