"""The report's page: one HTML file that needs nothing else, and the files next to it."""

import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import pyarrow as pa
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from llkd_ray import storage
from llkd_ray.artifacts import write_text
from llkd_ray.config import ServeSection, as_tree
from llkd_ray.lineage import Lineage
from llkd_ray.report import plots
from llkd_ray.report.figures import to_png, to_svg
from llkd_ray.report.summary import readable, summarise
from llkd_ray.report.tables import RunTables, read_run
from llkd_ray.schema import CALIBRATIONS, EndpointSummary, ModelScore, Summary

_DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Plot:
    """A figure with the words that go with it."""

    figure: Figure
    title: str
    caption: str


@dataclass(frozen=True)
class CurvePoint:
    """One line of the cascade's table."""

    threshold: float
    teacher_fraction: float
    answered_fraction: float
    accuracy: float
    helps: bool
    cost_usd_per_million: float | None
    """The student's, for every text, and the teacher's for those that it answers."""


@dataclass(frozen=True)
class Result:
    """One line of the result table."""

    name: str
    role: str
    score: ModelScore | None
    rows_used_fraction: float | None
    endpoint: EndpointSummary | None


def write_report(lineage: Lineage) -> Summary:
    """Write summary.json, report.html and plots/*.png into the run's folder, always anew.

    Each file is replaced whole; a plot that no longer has data is removed.

    Raises:
        ArtifactError: Not even the corpus is made.
    """
    run = read_run(lineage)
    summary = summarise(run)
    drawn = draw(run)
    folder = lineage.run / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for name, plot in drawn.items():
        _write_bytes(folder / f"{name}.png", to_png(plot.figure))
    for file in folder.glob("*.png"):
        if file.stem not in drawn:
            storage.remove(file)
    write_text(lineage.run / "report.html", render(run, summary, drawn))
    write_text(lineage.run / "summary.json", summary.model_dump_json(indent=2) + "\n")
    for name in ("plots", "report.html", "summary.json"):
        storage.put(lineage.run / name)
    return summary


def draw(run: RunTables) -> dict[str, Plot]:
    """Draw every plot that the run has data for, by name."""
    drawn: dict[str, Plot] = {}
    own = run.students.get(run.experiment.own_student)
    if own is not None:
        if any(_any(own.audit, name) for name in own.audit.column_names if "threshold" in name):
            drawn["thresholds"] = Plot(
                plots.thresholds(own.audit),
                "Thresholds",
                "A signal counts where it reaches the threshold of its class.",
            )
        drawn["kept"] = Plot(
            plots.kept(own.audit),
            "Rows kept",
            "Rows that each epoch kept, and their share of all rows with that label.",
        )
        if _any(own.audit, "purity_all"):
            drawn["purity"] = Plot(
                plots.purity(own.audit),
                "Purity of the labels",
                "How often the teacher's label equals gold. Training never reads gold.",
            )
    if run.labels is not None and run.labels.quality:
        moments = {"none": "before calibration"}
        if run.labels.calibration != "none":
            moments[run.labels.calibration] = f"after calibration ({run.labels.calibration})"
        drawn["reliability"] = Plot(
            plots.reliability({name: run.labels.bins[kind] for kind, name in moments.items()}),
            "Reliability of the teacher",
            "On the dotted line, confidence is accuracy. Below: the test rows behind each point.",
        )
        drawn["deciles"] = Plot(
            plots.deciles({name: run.labels.deciles[kind] for kind, name in moments.items()}),
            "Accuracy by confidence",
            "The steeper, the better confidence tells right labels from wrong ones.",
        )
    scores = run.scores
    validated = [_any(student.epochs, "validation_accuracy") for student in run.students.values()]
    if run.students and (scores is not None or any(validated)):
        drawn["accuracy"] = Plot(
            plots.accuracy(
                {rule: student.epochs for rule, student in run.students.items()},
                {rule: student.best_epoch for rule, student in run.students.items()},
                scores.models if scores else {},
            ),
            "Accuracy against rows used",
            "One point per epoch on validation rows; stars are test rows, with 95 % intervals.",
        )
    if run.cascade is not None:
        drawn["cascade"] = Plot(
            plots.cascade(run.cascade.curve, run.cascade.summary),
            "Student and teacher together",
            "From left to right the teacher answers more of the texts, those that the student is "
            "least sure of first.",
        )
    if run.bench is not None:
        bench = run.bench.summary
        drawn["latency"] = Plot(
            plots.latency(bench),
            "Latency",
            "Milliseconds of a request with one text, one client, as the client sees it.",
        )
        drawn["cost"] = Plot(
            plots.cost(bench),
            "Speed and cost",
            "Side by side, measured in the same run; lines are 95 % intervals.",
        )
        if any(offered.latency_ms for end in bench.endpoints.values() for offered in end.open_loop):
            drawn["rates"] = Plot(
                plots.rates(bench),
                "Latency under load",
                "Requests of one text that come at random, at a rate; latency counts from when "
                "they were meant to be sent. Hollow: the target was missed.",
            )
    return drawn


def render(run: RunTables, summary: Summary, drawn: dict[str, Plot]) -> str:
    """Return the page: no script, no network, every value from the corpus escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "readable": readable,
        "count": lambda number: f"{number:,}",
        "score": lambda value: _DASH if value is None else f"{value:.3f}",
        "share": lambda value: _DASH if value is None else f"{value:.1%}",
        "duration": _duration,
    }
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        run=run,
        experiment=run.experiment,
        summary=summary,
        results=_results(run, summary),
        plots=drawn,
        # The SVG is ours, except for label names, which matplotlib escapes.
        svgs={name: Markup(to_svg(plot.figure, plot.title)) for name, plot in drawn.items()},  # noqa: S704
        own=run.students.get(run.experiment.own_student),
        calibrations=CALIBRATIONS,
        curve=_curve(run, summary),
        versions=_versions(run),
        query=_query(run.experiment.serve),
        settings=json.dumps(as_tree(run.experiment), indent=2, ensure_ascii=False),
    )


def _results(run: RunTables, summary: Summary) -> list[Result]:
    """Return the result table: the teacher, the student, then what it is compared with."""
    models = run.scores.models if run.scores else {}
    bench = summary.bench
    results = [
        Result(
            run.experiment.teacher.model,
            "teacher",
            models.get("teacher"),
            None,
            bench.teacher if bench else None,
        )
    ]
    if "teacher_uncalibrated" in models:
        results.append(
            Result(
                run.experiment.teacher.model,
                "teacher, uncalibrated",
                models["teacher_uncalibrated"],
                None,
                None,
            )
        )
    if summary.student is not None:
        own = summary.student
        results.append(
            Result(
                run.experiment.student.summary,
                "student, guided" if own.rule == "guided" else f"student, rule {own.rule}",
                models.get(own.rule),
                own.rows_used_fraction,
                bench.student if bench else None,
            )
        )
    results.extend(
        Result(
            run.experiment.student.summary,
            f"compared, rule {other.rule}",
            models.get(other.rule),
            other.rows_used_fraction,
            None,
        )
        for other in summary.others
    )
    return results


def _curve(run: RunTables, summary: Summary) -> list[CurvePoint]:
    """Return the cascade at each tenth of the texts that the teacher answers."""
    if run.cascade is None:
        return []
    rows = run.cascade.curve.to_pylist()
    bench = summary.bench
    points = []
    for tenth in range(11):
        row = min(rows, key=lambda row: abs(row["teacher_fraction"] - tenth / 10))
        cost = None
        if bench is not None:
            of_teacher = bench.teacher.cost_usd_per_million
            cost = bench.student.cost_usd_per_million + row["teacher_fraction"] * of_teacher
        points.append(CurvePoint(**row, cost_usd_per_million=cost))
    return list(dict.fromkeys(points))


def _query(serve: ServeSection) -> str:
    """Return the command that asks the served student, as the experiment would serve it."""
    host = "127.0.0.1" if serve.host == "0.0.0.0" else serve.host  # noqa: S104  Nothing binds here.
    port = serve.port or "PORT"
    token = f' -H "Authorization: Bearer ${serve.token_env}"' if serve.token_env else ""
    return (
        f"curl -s http://{host}:{port}/v1/classify -H 'Content-Type: application/json'{token} \\\n"
        """  -d '{"texts": ["a text to classify", "another"]}'"""
    )


def _versions(run: RunTables) -> dict[str, str]:
    """Return the versions of each package, more than one where stages ran under different ones."""
    found: dict[str, dict[str, None]] = {}
    for manifest in run.manifests.values():
        for package, version in manifest.versions.items():
            found.setdefault(package, {})[version] = None
    return {package: ", ".join(versions) for package, versions in sorted(found.items())}


def _any(table: pa.Table, column: str) -> bool:
    return bool(table[column].null_count < table.num_rows)


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    os.replace(beside, path)
