"""The endpoints in one table: a row for each figure, a column for each endpoint."""

from collections.abc import Callable

from llkd_ray.schema import BenchSummary, EndpointSummary


def lines(summary: BenchSummary) -> list[str]:
    """Lay the endpoints out side by side, with 95 % intervals, and the ratio of the first two."""
    ends = summary.endpoints

    def row(
        name: str,
        value: Callable[[EndpointSummary], float | None],
        interval: Callable[[EndpointSummary], tuple[float, float] | None] = lambda _: None,
        *,
        more_is_better: bool,
    ) -> list[str]:
        teacher, student = value(summary.teacher), value(summary.student)
        ratio = "-"
        if teacher and student:
            gain = student / teacher if more_is_better else teacher / student
            ratio = f"{_number(gain)}x"
        return [name, *(_cell(value(end), interval(end)) for end in ends.values()), ratio]

    target = f"p{summary.latency_percentile:g} <= {summary.latency_target_ms:g} ms"
    table = [
        ["", *ends, "student : teacher"],
        row(
            "64 texts, s",
            lambda end: end.batch64_s,
            lambda end: end.intervals.get("batch64_s"),
            more_is_better=False,
        ),
        row(
            "texts/s",
            lambda end: end.texts_per_s,
            lambda end: end.intervals.get("texts_per_s"),
            more_is_better=True,
        ),
        row(
            "USD per million texts",
            lambda end: end.cost_usd_per_million,
            lambda end: end.intervals.get("cost_usd_per_million"),
            more_is_better=False,
        ),
        row(
            "accuracy",
            lambda end: end.accuracy.value if end.accuracy else None,
            lambda end: (end.accuracy.low, end.accuracy.high) if end.accuracy else None,
            more_is_better=True,
        ),
        row(
            "one text, p50 ms",
            lambda end: end.latency_ms.p50,
            lambda end: end.intervals.get("p50"),
            more_is_better=False,
        ),
        row(
            "one text, p95 ms",
            lambda end: end.latency_ms.p95,
            lambda end: end.intervals.get("p95"),
            more_is_better=False,
        ),
        row(f"requests/s, {target}", lambda end: end.max_rate_per_s, more_is_better=True),
        ["failed requests", *(f"{end.failed} of {end.requests}" for end in ends.values()), ""],
    ]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in table
    ]


def _cell(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    if interval is None:
        return _number(value)
    low, high = interval
    return f"{_number(value)} ({_number(low)} to {_number(high)})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
