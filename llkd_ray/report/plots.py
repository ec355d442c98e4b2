"""The plots of a report: tables in, a matplotlib figure out."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, StrMethodFormatter

from llkd_ray.metrics import Floats, ReliabilityBin
from llkd_ray.report.figures import INK, MARKERS, SERIES, STUDENT, TEACHER, styled
from llkd_ray.report.summary import readable
from llkd_ray.schema import BenchSummary, Bounded, CascadeSummary, ModelScore

_MOST_LINES = 8
_MOST_ROWS = 20
_MOST_CELLS_ACROSS = 8
# Colour, marker and side of the bars: before calibration, then after.
_MOMENTS = ((TEACHER, "s", -0.5), (STUDENT, "o", 0.5))


@styled
def thresholds(audit: pa.Table) -> Figure:
    """Draw the thresholds of each class over the epochs, for the most frequent classes.

    Args:
        audit: `schema.AUDIT`, of a rule that has thresholds.
    """
    shown = _most_frequent(audit, _MOST_LINES)
    titles = {
        "teacher_threshold": "Teacher: kept from this confidence on",
        "student_threshold": "Student: kept from this uncertainty on",
        "joint_threshold": "Both: kept from this agreement on",
        "probability_threshold": "Student: its probability of a class counts from here on",
    }
    there = [column for column in titles if column in audit.column_names]
    grids = {column: _by_class_and_epoch(audit, column, shown) for column in there}
    present = [column for column, grid in grids.items() if np.isfinite(grid).any()]
    figure = Figure(figsize=(6.4, 0.9 + 2.25 * len(present)), layout="constrained")
    panels = figure.subplots(len(present), 1, sharex=True, squeeze=False)[:, 0]
    for axes, column in zip(panels, present, strict=True):
        lines = [
            axes.plot(np.arange(1, len(values) + 1), values, color=color, marker=marker)[0]
            for values, color, marker in zip(grids[column], SERIES, MARKERS, strict=False)
        ]
        axes.set_title(titles[column])
        axes.set_ylabel("threshold (0 to 1)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("epoch")
    names = [_short(label) for label in shown]
    figure.legend(lines, names, loc="outside lower center", ncols=min(len(shown), 4))
    return figure


@styled
def kept(audit: pa.Table) -> Figure:
    """Draw the share of each class's rows that each epoch kept, for the most frequent classes.

    Args:
        audit: `schema.AUDIT`.
    """
    shown = _most_frequent(audit, _MOST_ROWS)
    rows = _by_class_and_epoch(audit, "rows", shown)
    chosen = _by_class_and_epoch(audit, "kept", shown)
    share = np.divide(chosen, rows, out=np.zeros_like(chosen), where=rows > 0)
    num_epochs = share.shape[1]
    figure = Figure(figsize=(6.4, 1.5 + 0.42 * len(shown)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="cividis", vmin=0.0, vmax=1.0, aspect="auto")
    axes.grid(visible=False)
    axes.set_yticks(range(len(shown)), [_short(label) for label in shown])
    axes.set_xticks(range(num_epochs), [str(epoch) for epoch in range(1, num_epochs + 1)])
    if num_epochs > _MOST_CELLS_ACROSS:
        axes.xaxis.set_major_locator(MaxNLocator(_MOST_CELLS_ACROSS, integer=True))
    else:
        for (row, column), value in np.ndenumerate(share):
            axes.text(
                column,
                row,
                f"{chosen[row, column]:,.0f} ({value:.0%})",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if value < 0.55 else "black",
            )
    axes.set_xlabel("epoch")
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="share of the class's rows kept", format=_percent())
    return figure


@styled
def purity(audit: pa.Table) -> Figure:
    """Draw how often labels are right: of kept rows, uncertain ones, and all.

    Args:
        audit: `schema.AUDIT`, of a corpus with gold.
    """
    labels = _most_frequent(audit, audit.num_rows)
    rows = _by_class_and_epoch(audit, "rows", labels)
    chosen = _by_class_and_epoch(audit, "kept", labels)
    of_kept = _by_class_and_epoch(audit, "purity_kept", labels)
    of_all = _by_class_and_epoch(audit, "purity_all", labels)
    uncertain = _by_class_and_epoch(audit, "uncertain", labels)
    of_uncertain = _by_class_and_epoch(audit, "purity_uncertain", labels)
    epochs = np.arange(1, rows.shape[1] + 1)
    shown = min(len(labels), _MOST_ROWS)
    figure = Figure(figsize=(6.4, 3.1 + 0.3 * shown), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(2.2, 0.6 + 0.3 * shown))
    above.plot(epochs, _mean(of_kept, chosen), color=STUDENT, marker="o", label="kept rows")
    above.plot(epochs, _mean(of_all, rows), color=TEACHER, marker="s", ls="--", label="all rows")
    if np.isfinite(of_uncertain).any():
        of_these = _mean(of_uncertain, uncertain)
        above.plot(epochs, of_these, color=INK, marker="^", ls=":", label="student is uncertain")
    above.set_title("All classes, by epoch")
    above.set_xlabel("epoch")
    above.set_ylabel("labels that are right")
    above.yaxis.set_major_formatter(_percent())
    above.xaxis.set_major_locator(MaxNLocator(integer=True))
    above.legend(loc="best")
    position = np.arange(shown)
    before, after = of_all[:shown, -1], of_kept[:shown, -1]
    below.hlines(position, before, after, color=INK, alpha=0.35, lw=2)
    below.plot(before, position, "s", color=TEACHER)
    below.plot(after, position, "o", color=STUDENT)
    below.set_yticks(position, [_short(label) for label in labels[:shown]])
    below.set_ylim(shown - 0.5, -0.5)
    below.set_title(f"By class, epoch {epochs[-1]}")
    below.set_xlabel("labels that are right")
    below.xaxis.set_major_formatter(_percent())
    return figure


@styled
def reliability(bins: Mapping[str, Sequence[ReliabilityBin]]) -> Figure:
    """Draw the teacher's accuracy against its confidence.

    Args:
        bins: Equally wide ranges of confidence, by the name of what was done to it: one or two.
    """
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color=INK, alpha=0.45, lw=1, ls=":", label="as right as confident")
    for (name, of_name), (color, marker, shift) in zip(bins.items(), _MOMENTS, strict=False):
        above.plot(
            [bin_.mean_confidence for bin_ in of_name],
            [bin_.accuracy for bin_ in of_name],
            color=color,
            marker=marker,
            label=name,
        )
        width = [0.4 * (bin_.upper - bin_.lower) for bin_ in of_name]
        middle = [
            (bin_.lower + bin_.upper) / 2 + shift * w
            for bin_, w in zip(of_name, width, strict=True)
        ]
        below.bar(middle, [bin_.rows for bin_ in of_name], width, color=color)
    above.set_ylabel("accuracy on gold")
    above.set_xlim(0, 1)
    above.set_ylim(0, 1)
    above.legend(loc="upper left")
    below.set_ylabel("test rows")
    below.set_xlabel("confidence of the teacher in its label (0 to 1)")
    return figure


@styled
def deciles(tenths: Mapping[str, Sequence[ReliabilityBin]]) -> Figure:
    """Draw the teacher's accuracy on each tenth of the rows, from the least confident on.

    Args:
        tenths: Equally many rows each, by the name of what was done to the confidence.
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for (name, of_name), (color, marker, _) in zip(tenths.items(), _MOMENTS, strict=False):
        axes.plot(
            [tenth.position + 1 for tenth in of_name],
            [tenth.accuracy for tenth in of_name],
            color=color,
            marker=marker,
            label=name,
        )
    axes.set_xticks(range(1, 11))
    axes.set_xlabel("tenth of the test rows, from the least to the most confident")
    axes.set_ylabel("accuracy on gold")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(_percent())
    axes.legend(loc="best")
    return figure


@styled
def accuracy(
    epochs: Mapping[str, pa.Table], best: Mapping[str, int], scores: Mapping[str, ModelScore]
) -> Figure:
    """Draw accuracy against the rows trained on, for each rule, with the teacher as a line.

    Args:
        epochs: `schema.EPOCHS` by rule, the experiment's own rule first.
        best: The epoch of the finished student by rule, from 1.
        scores: Test scores by model, as far as there are any.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    teacher = scores.get("teacher")
    if teacher is not None:
        axes.axhspan(teacher.accuracy.low, teacher.accuracy.high, color=TEACHER, alpha=0.15, lw=0)
        axes.axhline(teacher.accuracy.value, color=TEACHER, ls="--", label="teacher, test")
    colors = [color for color in SERIES if color != TEACHER]
    for position, (rule, table) in enumerate(epochs.items()):
        color = colors[position % len(colors)]
        rows = table["row_steps"].to_numpy()
        validation = _numbers(table["validation_accuracy"])
        if np.isfinite(validation).any():
            marker = MARKERS[position % len(MARKERS)]
            axes.plot(rows, validation, color=color, marker=marker, label=f"{rule}, validation")
        score = scores.get(rule)
        if score is not None:
            value = score.accuracy
            axes.errorbar(
                [rows[best[rule] - 1]],
                [value.value],
                yerr=_bars(value),
                color=color,
                marker="*",
                markersize=13,
                capsize=4,
                ls="none",
                label=f"{rule}, test (epoch {best[rule]})",
            )
    axes.set_xlim(left=0)
    axes.set_xlabel("rows trained on, summed over the epochs")
    axes.set_ylabel("accuracy on gold")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(_percent())
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def latency(bench: BenchSummary) -> Figure:
    """Draw latency percentiles of one text, one client, with their intervals, on a log scale."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    levels, width = bench.latency_levels, 0.8 / len(bench.endpoints)
    for position, (name, end) in enumerate(bench.endpoints.items()):
        values = [getattr(end.latency_ms, level) for level in levels]
        places = np.arange(len(levels)) + (position + 0.5) * width - 0.4
        color = _endpoint_color(position)
        axes.bar(places, values, 0.95 * width, color=color, label=_short(name))
        bounds = np.array([end.intervals[level] for level in levels])
        axes.vlines(places, *bounds.T, color=INK, lw=1.2)
        for place, top, value in zip(places, np.fmax(values, bounds[:, 1]), values, strict=True):
            axes.annotate(
                readable(value), (place, top), (0, 2), textcoords="offset points", ha="center",
                va="bottom", fontsize=9,
            )  # fmt: skip
    named = {"p50": "median", "p95": "95th percentile", "p99": "99th percentile"}
    axes.set_xticks(range(len(levels)), [named[level] for level in levels])
    axes.set_ylabel("latency (ms, log scale)")
    _log_axis(axes)
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@styled
def rates(bench: BenchSummary) -> Figure:
    """Draw latency against the rate at which requests come, on log scales."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for position, (name, end) in enumerate(bench.endpoints.items()):
        points = [(at, at.latency_ms) for at in end.open_loop]
        color, marker = _endpoint_color(position), MARKERS[position % len(MARKERS)]
        for level, style in (("p50", ":"), ("p95", "-")):
            drawn = [(at, getattr(found, level)) for at, found in points if found is not None]
            axes.plot(
                [at.rate_per_s for at, _ in drawn],
                [value for _, value in drawn],
                color=color,
                ls=style,
                label=f"{_short(name)}, {level}",
            )
            for at, value in drawn:
                face = color if at.met else "none"
                axes.plot(at.rate_per_s, value, marker, color=color, markerfacecolor=face)
    axes.axhline(bench.latency_target_ms, color=INK, alpha=0.45, lw=1, ls="--")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.7g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("requests per second (log scale)")
    axes.set_ylabel("latency (ms, log scale)")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


@styled
def cost(bench: BenchSummary) -> Figure:
    """Draw seconds per 64 texts, throughput and cost of each endpoint, on log scales."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    ends = bench.endpoints
    colors = [_endpoint_color(position) for position in range(len(ends))]
    for axes, title, unit, key in zip(
        figure.subplots(1, 3),
        ("64 texts", "Throughput", "A million texts"),
        ("seconds (log)", "texts per second (log)", "US dollars (log)"),
        ("batch64_s", "texts_per_s", "cost_usd_per_million"),
        strict=True,
    ):
        values = np.array([getattr(end, key) for end in ends.values()])
        bounds = [end.intervals.get(key, (np.nan, np.nan)) for end in ends.values()]
        bars = axes.bar(range(len(ends)), values, 0.6, color=colors)
        axes.vlines(range(len(ends)), *np.array(bounds).T, color=INK, lw=1.2)
        above = np.fmax(values, np.array(bounds)[:, 1])
        for bar, top, value in zip(bars, above, values, strict=True):
            middle = bar.get_x() + bar.get_width() / 2
            axes.annotate(
                readable(value), (middle, top), (0, 2), textcoords="offset points", ha="center",
                va="bottom", fontsize=9,
            )  # fmt: skip
        names = [_short(name) for name in ends]
        axes.set_xticks(range(len(ends)), names, rotation=0 if len(ends) < 3 else 30)
        axes.set_title(title)
        axes.set_ylabel(unit)
        _log_axis(axes)
        axes.grid(visible=False, axis="x")
    return figure


@styled
def cascade(curve: pa.Table, summary: CascadeSummary) -> Figure:
    """Draw the cascade's accuracy against the share of texts that its teacher answers.

    Args:
        curve: `schema.CURVE`, on validation rows.
        summary: Names the chosen threshold, and its score on test rows.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    fraction, values = _numbers(curve["teacher_fraction"]), _numbers(curve["accuracy"])
    helps = np.array(curve["helps"].to_pylist())
    axes.plot(fraction, values, color=STUDENT, label="validation rows")
    if helps.any():
        axes.plot(
            fraction,
            np.where(helps, values, np.nan),
            color=TEACHER,
            lw=3.5,
            alpha=0.6,
            label="where the teacher measurably helps",
        )
    axes.plot(0, values[0], "o", color=STUDENT, label="student alone")
    axes.plot(1, values[-1], "s", color=TEACHER, label="teacher alone")
    chosen = [
        ("chosen", summary.validation, "D", 0.0),
        ("chosen, test rows", summary.test, "*", 0.012),  # Beside it: both may be at 0.
    ]
    for name, score, marker, aside in chosen:
        if score is not None:
            value = score.accuracy
            axes.errorbar(
                [score.teacher_fraction + aside],
                [value.value],
                yerr=_bars(value),
                color=INK,
                marker=marker,
                markersize=8 if marker == "D" else 13,
                elinewidth=1.2,
                capsize=4,
                ls="none",
                label=name,
            )
    axes.set_xlabel("share of the texts that the teacher answers")
    axes.set_ylabel("accuracy on gold, of what is answered")
    axes.xaxis.set_major_formatter(_percent())
    axes.yaxis.set_major_formatter(_percent())
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _bars(value: Bounded) -> list[list[float]]:
    """Return an interval as bars below and above; of few resamples it may miss the value."""
    return [[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]]


def _percent() -> FuncFormatter:
    """Return a formatter of shares that writes 60% and 62.5%, not 60.0% and 62%."""
    return FuncFormatter(lambda share, _position: f"{100 * share:.4g}%")


def _endpoint_color(position: int) -> str:
    """Return the colour of an endpoint: the teacher's, the student's, then those of the others."""
    others = [color for color in SERIES if color not in (TEACHER, STUDENT)]
    return (TEACHER, STUDENT, *others)[position % len(SERIES)]


def _log_axis(axes: Axes) -> None:
    """Make y logarithmic, from a decade below the bars to room for their numbers above."""
    heights = [patch.get_height() for patch in axes.patches if isinstance(patch, Rectangle)]
    axes.set_yscale("log")
    axes.set_ylim(10 ** np.floor(np.log10(min(heights)) - 0.3), max(heights) * 2.5)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.7g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _most_frequent(audit: pa.Table, most: int) -> list[str]:
    """Return the labels with the most rows, in the order of the table."""
    rows: dict[str, int] = {}
    for label, count in zip(audit["label"].to_pylist(), audit["rows"].to_pylist(), strict=True):
        rows[label] = max(rows.get(label, 0), count)
    chosen = set(sorted(rows, key=lambda label: -rows[label])[:most])
    return [label for label in rows if label in chosen]


def _by_class_and_epoch(audit: pa.Table, column: str, labels: Sequence[str]) -> Floats:
    """Return a column as [classes, epochs], NaN where the table has nothing."""
    epochs = audit["epoch"].to_pylist()
    grid = np.full((len(labels), max(epochs)), np.nan)
    row_of = {label: position for position, label in enumerate(labels)}
    found = zip(epochs, audit["label"].to_pylist(), _numbers(audit[column]), strict=True)
    for epoch, label, value in found:
        if label in row_of:
            grid[row_of[label], epoch - 1] = value
    return grid


def _mean(values: Floats, weights: Floats) -> Floats:
    """Return the weighted mean over classes, [epochs]; NaN where nothing has weight."""
    weights = np.where(np.isfinite(values), weights, 0.0)
    total = weights.sum(axis=0)
    products = (np.nan_to_num(values) * weights).sum(axis=0)
    mean: Floats = np.divide(products, total, out=np.full(total.shape, np.nan), where=total > 0)
    return mean


def _numbers(column: pa.ChunkedArray) -> Floats:
    """Return a column as float64, null as NaN."""
    return np.array([np.nan if value is None else value for value in column.to_pylist()], float)


def _short(label: str) -> str:
    """Cut a long label, and keep matplotlib from reading anything into it.

    It takes text between `$` as mathematics, and leaves names with a leading `_` out of legends.
    """
    cut = label if len(label) <= 24 else f"{label[:23]}…"
    return f"{' ' if cut.startswith('_') else ''}{cut}".replace("$", r"\$")
