"""A run in numbers: summary.json, and the short table that the job prints."""

from collections.abc import Callable

from llkd_ray.report.tables import RunTables, StudentTables
from llkd_ray.schema import (
    CorpusSummary,
    EndpointSummary,
    LabelsSummary,
    ModelScore,
    StudentSummary,
    Summary,
    TeacherSummary,
)


def summarise(run: RunTables) -> Summary:
    """Return the run's summary; a section is null until its stage has been run."""
    corpus = run.manifests["corpus"]
    own = run.experiment.own_student
    scores = run.scores.models if run.scores else {}
    teacher = scores.get("teacher")
    students = {
        rule: _student(rule, tables, scores.get(rule)) for rule, tables in run.students.items()
    }
    return Summary(
        name=run.experiment.name,
        corpus=CorpusSummary(
            unlabeled=corpus.details["unlabeled"],
            validation=corpus.details["validation"],
            test=corpus.details["test"],
            rejected=corpus.rows.rejected,
        ),
        labels=_labels(run),
        teacher=None
        if run.scores is None
        else TeacherSummary(
            accuracy=teacher.accuracy.value if teacher else None,
            macro_f1=teacher.macro_f1.value if teacher else None,
        ),
        student=students.get(own),
        others=[student for rule, student in students.items() if rule != own],
        cascade=run.cascade.summary if run.cascade else None,
        bench=run.bench.summary if run.bench else None,
        seconds=_seconds(run),
    )


def _labels(run: RunTables) -> LabelsSummary | None:
    if "labels" not in run.manifests or "readouts" not in run.manifests:
        return None
    labels = run.manifests["labels"].details
    readouts = run.manifests["readouts"].details
    return LabelsSummary(
        rows=labels["unlabeled_rows"],
        rejected=labels["unlabeled_rejected"],
        rejected_label_mass=labels["unlabeled_rejected_label_mass"],
        duplicates=readouts["duplicates"],
        cut_rows=readouts.get("cut_rows"),
        calibration=run.experiment.calibration.kind,
        accuracy=labels["accuracy"],
        accuracy_uncalibrated=labels["accuracy_uncalibrated"],
        accuracy_confident_half=labels["accuracy_confident_half"],
        macro_f1=labels["macro_f1"],
        ece=labels["ece"],
        rows_per_s=readouts["rows_per_s"],
        prompt_tokens=readouts["prompt_tokens"],
        cached_tokens=readouts["cached_tokens"],
    )


def _student(rule: str, tables: StudentTables, score: ModelScore | None) -> StudentSummary:
    details = tables.manifest.details
    return StudentSummary(
        rule=rule,
        accuracy=score.accuracy.value if score else None,
        macro_f1=score.macro_f1.value if score else None,
        ece=score.ece.value if score else None,
        ece_as_trained=score.ece_as_trained.value if score and score.ece_as_trained else None,
        temperature=score.temperature if score else None,
        rows_used_fraction=details["rows_used_fraction"],
        optimizer_steps=details["steps"],
    )


def _seconds(run: RunTables) -> dict[str, float]:
    """Return seconds by stage; the label stage makes two artifacts, so its seconds are a sum."""
    stages = {
        "corpus": "prepare",
        "readouts": "label",
        "labels": "label",
        "student": "train",
        "guided": "guide",
        "mixture": "train",
        "scores": "evaluate",
        "cascade": "evaluate",
    }
    seconds: dict[str, float] = {}
    for name, manifest in run.manifests.items():
        stage = stages.get(name, name.replace("student", "train"))
        seconds[stage] = round(seconds.get(stage, 0.0) + manifest.seconds, 3)
    return seconds


def result_lines(summary: Summary) -> list[str]:
    """Return a short table of teacher against student, a dash where nothing is measured yet."""
    bench = summary.bench

    def quality(label: str, teacher: float | None, student: float | None) -> str:
        ratio = f"{student / teacher:.2f}x" if teacher and student is not None else "-"
        return _line(label, _score(teacher), _score(student), ratio)

    def speed(
        label: str, of: Callable[[EndpointSummary], float], unit: str, *, more_is_better: bool
    ) -> str:
        if bench is None:
            return _line(label, "-", "-", "-")
        teacher, student = of(bench.teacher), of(bench.student)
        ratio = student / teacher if more_is_better else teacher / student
        return _line(
            label, f"{readable(teacher)}{unit}", f"{readable(student)}{unit}", f"{readable(ratio)}x"
        )

    teacher, student = summary.teacher, summary.student
    return [
        _line("", "teacher", "student", "gain"),
        quality(
            "accuracy", teacher.accuracy if teacher else None, student.accuracy if student else None
        ),
        quality(
            "macro-F1", teacher.macro_f1 if teacher else None, student.macro_f1 if student else None
        ),
        speed("latency p50", lambda end: end.latency_ms.p50, " ms", more_is_better=False),
        speed("64 texts", lambda end: end.batch64_s, " s", more_is_better=False),
        speed("throughput", lambda end: end.texts_per_s, " texts/s", more_is_better=True),
        speed(
            "a million texts", lambda end: end.cost_usd_per_million, " USD", more_is_better=False
        ),
    ]


def readable(number: float) -> str:
    """Return a number with three significant digits, without an exponent and without noise."""
    if abs(number) >= 100:
        return f"{number:,.0f}"
    digits = f"{number:.3g}"
    return digits if "e" not in digits else f"{number:.7f}".rstrip("0").rstrip(".")


def _line(label: str, teacher: str, student: str, ratio: str) -> str:
    return f"{label:<16}{teacher:>16}{student:>16}{ratio:>10}"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
