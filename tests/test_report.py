"""The report reads real artifacts: each test makes those it needs, small and with known numbers."""

import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_job
from PIL import Image

from llkd_ray import schema
from llkd_ray.artifacts import Draft, Rows, make
from llkd_ray.config import Experiment, ScriptedTeacher
from llkd_ray.errors import ArtifactError
from llkd_ray.lineage import Lineage
from llkd_ray.report import plots
from llkd_ray.report.page import draw, render, write_report
from llkd_ray.report.summary import readable, result_lines
from llkd_ray.report.tables import read_run

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>"
LABELS = ("cat & co", "dog", "<b>fish</b>")
STAGES = ("corpus", "readouts", "labels", "student", "scores", "bench")
ROWS = {
    # gold, the teacher's label, the student's label
    "0": ("cat & co", "cat & co", "cat & co"),
    "1": ("dog", "dog", "cat & co"),
    "2": ("<b>fish</b>", "dog", "<b>fish</b>"),
    "3": ("dog", "cat & co", "dog"),
}


# The teacher on the test rows: two calibrations could be fitted.
QUALITY = {
    "none": {
        "rows": 4, "accuracy": 0.251, "macro_f1": 0.211, "ece": 0.451,
        "accuracy_confident_half": 0.301,
    },
    "batch": {
        "rows": 4, "accuracy": 0.552, "macro_f1": 0.512, "ece": 0.152,
        "accuracy_confident_half": 0.652,
    },
}  # fmt: skip


@pytest.fixture
def lineage(tmp_path: Path) -> Lineage:
    """A run of which nothing is made yet."""
    return trial(tmp_path)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    """A run with every artifact and its report, to be read only."""
    lineage = trial(tmp_path_factory.mktemp("reported"))
    make_run(lineage)
    write_report(lineage)
    return lineage


def trial(folder: Path) -> Lineage:
    """An experiment that trains with `llkd` and compares it with `all`."""
    source = folder / "corpus.csv"
    source.write_text("text,label\na,dog\n")
    return Lineage(
        Experiment.model_validate(
            {
                "name": "trial",
                "runs": str(folder / "runs"),
                "task": {"labels": [{"name": name} for name in LABELS]},
                "corpus": {"source": str(source), "gold_column": "label"},
                "teacher": {"kind": "vllm", "model": "example/teacher"},
                "student": {"kind": "encoder", "model": "example/student"},
                "evaluate": {"compare_rules": ["all"]},
                "serve": {"port": 8123, "token_env": "TRIAL_TOKEN"},
            }
        )
    )


def write(path: Path, rows: list[dict[str, Any]], columns: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, columns), path)


def probabilities_of(label: str, confidence: float = 0.8) -> list[float]:
    rest = (1 - confidence) / (len(LABELS) - 1)
    return [confidence if name == label else rest for name in LABELS]


def write_corpus(draft: Draft, *, gold: bool = True) -> None:
    rows = [
        {"row_id": id_, "text": f"{id_} {HOSTILE}", "gold": row[0] if gold else None}
        for id_, row in ROWS.items()
    ]
    for split in ("unlabeled", "test"):
        write(draft.folder / split / "shard-00000.parquet", rows, schema.TEXT)
    aside = [{"where": "corpus.csv:7", "reason": "the text is empty", "content": ""}] * 2
    write(draft.folder / "rejected.parquet", aside, schema.REJECTED)
    draft.rows = Rows(taken=10, kept=8, rejected=2)
    draft.details = {"unlabeled": 4, "validation": 0, "test": 4}


def write_readouts(draft: Draft) -> None:
    draft.rows = Rows(taken=8, kept=8, rejected=0)
    draft.details = {
        "prompt_tokens": 1000,
        "cached_tokens": 750,
        "rows_per_s": 12.5,
        "duplicates": 1,
        "cut_rows": 2,
    }


def write_labels(draft: Draft, *, gold: bool = True) -> None:
    rows = [
        {
            "row_id": id_,
            "text": HOSTILE,
            "gold": row[0] if gold else None,
            "label": row[1],
            "confidence": 0.8,
            "probabilities": probabilities_of(row[1]),
            "logprobs": [-1.0] * len(LABELS),
            "label_mass": 0.9,
            "confidence_none": 0.7,
            "confidence_batch": 0.8,
        }
        for id_, row in ROWS.items()
    ]
    write(draft.folder / "unlabeled/shard-00000.parquet", rows, schema.labels(len(LABELS)))
    reliability = [
        {
            "calibration": kind,
            "split": split,
            "table": table,
            "position": position,
            "rows": 2,
            "confidence_mean": 0.55 + 0.03 * position,
            "accuracy": 0.1 * position,
            "lower": 0.5 + 0.03 * position,
            "upper": 0.6 + 0.03 * position,
        }
        for kind in QUALITY
        for split in ("unlabeled", "test")
        for table in ("bin", "decile")
        for position in (8, 3)
    ]
    write(draft.folder / "reliability.parquet", reliability if gold else [], schema.RELIABILITY)
    draft.rows = Rows(taken=13, kept=8, rejected=5)
    draft.details = {
        "splits": {
            "test": {"taken": 6, "kept": 4, "rejected": 2, "reasons": {HOSTILE: 2}},
            "unlabeled": {"taken": 7, "kept": 4, "rejected": 3, "reasons": {"too slow": 3}},
        },
        "unlabeled_rows": 4,
        "unlabeled_rejected": 3,
        "unlabeled_rejected_label_mass": 1,
        "accuracy": 0.5 if gold else None,
        "accuracy_uncalibrated": 0.25 if gold else None,
        "accuracy_confident_half": 0.75 if gold else None,
        "macro_f1": 0.45 if gold else None,
        "ece": 0.3 if gold else None,
        "quality": {
            kind: {"test": of, "unlabeled": {**of, "accuracy": 0.5}} if gold else {}
            for kind, of in QUALITY.items()
        },
    }


def audit_rows(*, gold: bool = True, thresholds: bool = True) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "label": label,
            "rows": 10 * (position + 1),
            "kept": 10 - 2 * epoch,
            "teacher_threshold": 0.5 + 0.1 * position if thresholds else None,
            "student_threshold": 0.9 - 0.2 * epoch if thresholds else None,
            "purity_kept": 0.5 + 0.1 * epoch if gold else None,
            "purity_all": 0.5 if gold else None,
        }
        for epoch in (1, 2)
        for position, label in enumerate(LABELS)
    ]


def epoch_rows(*, gold: bool = True) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "kept": 30 - 6 * epoch,
            "rows": 60,
            "distinct_rows": 40,
            "steps": 5 * epoch,
            "row_steps": 20 * epoch,
            "loss": 1.0 / epoch,
            "validation_accuracy": 0.5 + 0.1 * epoch if gold else None,
            "validation_macro_f1": 0.4 + 0.1 * epoch if gold else None,
            "scoring_s": 0.25,
            "selection_s": 0.01,
            "training_s": 75.0,
        }
        for epoch in (1, 2)
    ]


def write_student(draft: Draft, *, gold: bool = True, thresholds: bool = True) -> None:
    audit = audit_rows(gold=gold, thresholds=thresholds)
    write(draft.folder / "audit.parquet", audit, schema.AUDIT)
    write(draft.folder / "epochs.parquet", epoch_rows(gold=gold), schema.EPOCHS)
    draft.rows = Rows(taken=60, kept=60, rejected=0)
    draft.details = {"steps": 10, "rows_used_fraction": 0.35, "best_epoch": 2}


def score(value: float) -> dict[str, Any]:
    around = {"value": value, "low": value - 0.1, "high": value + 0.1}
    return {"accuracy": around, "macro_f1": around, "ece": around, "rows": len(ROWS)}


def write_scores(draft: Draft) -> None:
    predictions = [
        {
            "model": model,
            "row_id": id_,
            "gold": row[0],
            "predicted": row[column],
            "probabilities": probabilities_of(row[column]),
        }
        for model, column in (("teacher", 1), ("llkd", 2), ("all", 1))
        for id_, row in ROWS.items()
    ]
    write(draft.folder / "predictions.parquet", predictions, schema.predictions(len(LABELS)))
    models = {"teacher": 0.5, "teacher_uncalibrated": 0.25, "llkd": 0.75, "all": 0.5}
    scores = {model: score(value) for model, value in models.items()}
    before = {"value": 0.85, "low": 0.8, "high": 0.9}
    scores["llkd"] |= {"ece_as_trained": before, "temperature": 0.6}
    (draft.folder / "scores.json").write_text(json.dumps(scores))
    draft.rows = Rows(taken=4, kept=4, rejected=0)


def write_cascade(draft: Draft) -> None:
    curve = [
        {
            "threshold": at / 10 if at < 10 else 2.0,
            "teacher_fraction": at / 10,
            "answered_fraction": 0.9,
            "accuracy": 0.7 + 0.02 * at - 0.0025 * at**2,
            "helps": 0 < at < 6,
        }
        for at in range(11)
    ]
    write(draft.folder / "curve.parquet", curve, schema.CURVE)
    around = {"value": 0.74, "low": 0.7, "high": 0.78}
    of_split = {
        "rows": 40,
        "teacher_fraction": 0.4,
        "answered_fraction": 0.9,
        **dict.fromkeys(("accuracy", "student", "teacher", "gain"), around),
    }
    summary = {
        "threshold": 0.4,
        "reached": False,
        "reason": "cascade.accuracy = 0.9 is not reached: the best threshold",
        "validation": of_split,
        "test": {**of_split, "rows": 30, "teacher_fraction": 0.375},
    }
    (draft.folder / "cascade.json").write_text(json.dumps(summary))
    draft.rows = Rows(taken=40, kept=40, rejected=0)


def write_bench(draft: Draft) -> None:
    (draft.folder / "bench.json").write_text(json.dumps(BENCH))
    draft.rows = Rows(taken=3, kept=2, rejected=1)
    draft.details = {"machine": {"cpu": "Example CPU", "cores": 2}}


def endpoint(scale: float, accuracy: float) -> dict[str, Any]:
    latency = {"p50": 10.0 * scale, "p95": 20.0 * scale, "p99": 30.0 * scale}
    return {
        "model": f"an endpoint {scale:g} times as slow",
        "latency_ms": latency,
        "batch64_s": 0.25 * scale,
        "texts_per_s": 400.0 / scale,
        "texts_per_s_by_clients": {"1": 200.0 / scale, "4": 400.0 / scale},
        "cost_usd_per_million": 0.05 * scale,
        "accuracy": {"value": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1},
        "requests": 20,
        "failed": 3,
        "max_rate_per_s": 80.0 / scale,
        "open_loop": [
            {
                "rate_per_s": rate / scale,
                "requests": 40,
                "failed": 0,
                "latency_ms": latency,
                "met": rate == 80.0,
            }
            for rate in (80.0, 160.0)
        ],
        "intervals": {
            **{level: [0.9 * value, 1.1 * value] for level, value in latency.items()},
            "batch64_s": [0.2 * scale, 0.3 * scale],
            "texts_per_s": [300.0 / scale, 500.0 / scale],
            "cost_usd_per_million": [0.04 * scale, 0.06 * scale],
        },
    }


BENCH = {
    "teacher": endpoint(40.0, 0.5),
    "student": endpoint(1.0, 0.75),
    "others": {"peer-1": endpoint(2.0, 0.75)},
    "speedup": 40.0,
    "throughput_ratio": 40.0,
    "cost_ratio": 40.0,
    "latency_target_ms": 500.0,
    "latency_percentile": 95.0,
}


def make_run(lineage: Lineage, until: str = "bench") -> None:
    """Make every artifact up to one that is not there yet, as the stages would."""
    writers: Mapping[str, Callable[[Draft], None]] = {
        "corpus": write_corpus,
        "readouts": write_readouts,
        "labels": write_labels,
        "student": write_student,
        "scores": write_scores,
        "bench": write_bench,
    }
    for noun in STAGES[: STAGES.index(until) + 1]:
        artifacts = lineage.students.values() if noun == "student" else [getattr(lineage, noun)]
        for artifact in artifacts:
            if not artifact.made:
                with make(artifact) as draft:
                    writers[noun](draft)


class Page(HTMLParser):
    """What a browser would take the page to be made of."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.missing: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.missing.extend(value for name, value in attrs if name == "data-missing")

    def handle_data(self, data):
        self.text += data


def rows_of(lineage: Lineage) -> list[list[str]]:
    """Return the cells of every table row on the page, as text."""
    html = (lineage.run / "report.html").read_text(encoding="utf-8")
    rows = re.findall(r"<tr>(.*?)</tr>", html, flags=re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL) for row in rows]
    return [[cell.strip() for cell in row] for row in cells]


def page_of(lineage: Lineage) -> Page:
    return Page((lineage.run / "report.html").read_text(encoding="utf-8"))


def test_summary_holds_the_numbers_of_every_stage(lineage):
    make_run(lineage)
    written = write_report(lineage)
    summary = json.loads((lineage.run / "summary.json").read_text())
    assert schema.Summary.model_validate(summary) == written
    seconds = summary.pop("seconds")
    assert set(seconds) == {"prepare", "label", "train", "train (all)", "evaluate", "bench"}
    assert summary == {
        "name": "trial",
        "corpus": {"unlabeled": 4, "validation": 0, "test": 4, "rejected": 2},
        "labels": {
            "rows": 4,
            "rejected": 3,
            "rejected_label_mass": 1,
            "duplicates": 1,
            "cut_rows": 2,
            "calibration": "batch",
            "accuracy": 0.5,
            "accuracy_uncalibrated": 0.25,
            "accuracy_confident_half": 0.75,
            "macro_f1": 0.45,
            "ece": 0.3,
            "rows_per_s": 12.5,
            "prompt_tokens": 1000,
            "cached_tokens": 750,
        },
        "teacher": {"accuracy": 0.5, "macro_f1": 0.5},
        "student": {
            "rule": "llkd",
            "accuracy": 0.75,
            "macro_f1": 0.75,
            "ece": 0.75,
            "ece_as_trained": 0.85,
            "temperature": 0.6,
            "rows_used_fraction": 0.35,
            "optimizer_steps": 10,
        },
        "others": [
            {
                "rule": "all",
                "accuracy": 0.5,
                "macro_f1": 0.5,
                "ece": 0.5,
                "ece_as_trained": None,
                "temperature": None,
                "rows_used_fraction": 0.35,
                "optimizer_steps": 10,
            }
        ],
        "cascade": None,
        "bench": BENCH,
    }


def test_seconds_of_labelling_are_those_of_reading_out_and_of_calibrating(lineage):
    make_run(lineage, "labels")
    seconds = write_report(lineage).seconds
    both = lineage.readouts.manifest().seconds + lineage.labels.manifest().seconds
    assert seconds["label"] == pytest.approx(both, abs=1e-3)


@pytest.mark.parametrize("until", STAGES[:-1])
def test_sections_are_null_until_their_stage_has_run_and_the_page_names_the_job(lineage, until):
    make_run(lineage, until)
    summary = write_report(lineage)
    reached = STAGES.index(until)
    assert (summary.labels is None) == (reached < STAGES.index("labels"))
    assert (summary.student is None) == (reached < STAGES.index("student"))
    assert (summary.teacher is None) == (reached < STAGES.index("scores"))
    assert summary.bench is None
    page = page_of(lineage)
    assert set(STAGES[reached + 1 :]) <= set(page.missing)
    assert "run python jobs/bench.py with this experiment first" in page.text
    assert ("python jobs/train.py" in page.text) == (reached < STAGES.index("student"))


def test_a_student_that_is_not_scored_yet_has_no_accuracy(lineage):
    make_run(lineage, "student")
    student = write_report(lineage).student
    assert student is not None
    assert student.accuracy is None
    assert student.optimizer_steps == 10


def test_a_run_without_a_corpus_is_an_error_that_names_the_job(lineage):
    with pytest.raises(ArtifactError, match=r"run python jobs/prepare\.py"):
        write_report(lineage)
    assert not lineage.run.exists()


def test_the_page_fetches_nothing_and_runs_nothing(reported):
    page = page_of(reported)
    names = {tag for tag, _ in page.tags}
    assert "svg" in names
    assert names.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form"})
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert value is not None
                assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
            if value is not None and "url(" in value:
                assert value.count("url(") == value.count("url(#"), (tag, name, value)
    html = (reported.run / "report.html").read_text(encoding="utf-8")
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_hostile_text_and_labels_stay_text(reported):
    page = page_of(reported)
    assert f"1 {HOSTILE}" in page.text  # The student took this dog for a cat.
    assert "<b>fish</b>" in page.text
    assert "cat & co" in page.text
    assert [attributes for tag, attributes in page.tags if tag == "b" and attributes] == []
    assert page.text.count("<b>fish</b>") > 3  # In the tables and in the plots.
    assert "<b>fish</b>" not in (reported.run / "report.html").read_text(encoding="utf-8")


def test_identifiers_inside_the_plots_name_one_thing_each(reported):
    drawn: dict[str, str] = {}
    for tag, attributes in page_of(reported).tags:
        id_ = attributes.get("id")
        if id_ is not None:
            described = json.dumps([tag, attributes], sort_keys=True)
            # Two plots may define the same marker or clip under the same hash: the content is one.
            assert id_ not in drawn or tag in ("path", "clippath"), id_
            assert drawn.setdefault(id_, described) == described


def test_the_page_follows_light_and_dark(reported):
    html = (reported.run / "report.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in html
    assert "currentColor" in html


def test_the_page_tells_how_to_serve_and_query(reported):
    text = page_of(reported).text
    assert "python jobs/serve.py EXPERIMENT.toml" in text
    assert "curl -s http://127.0.0.1:8123/v1/classify" in text
    assert "Authorization: Bearer $TRIAL_TOKEN" in text


def test_the_page_shows_where_everything_came_from(reported):
    text = page_of(reported).text
    for artifact in (reported.corpus, reported.labels, *reported.students.values(), reported.bench):
        assert artifact.fingerprint in text
    assert reported.corpus.manifest().commit in text
    assert "pyarrow" in text
    assert "Example CPU" in text
    assert "the text is empty (2)" in text


def test_only_wrong_rows_stand_under_mistakes_with_the_teachers_label(reported):
    run = read_run(reported)
    assert run.scores is not None
    [mistake] = run.scores.mistakes
    assert (mistake.gold, mistake.student, mistake.teacher) == ("dog", "cat & co", "dog")
    assert mistake.confidence == pytest.approx(0.8)


def test_classes_are_counted_by_label_and_by_gold(lineage):
    make_run(lineage, "labels")
    labels = read_run(lineage).labels
    assert labels is not None
    found = {item.label: (item.labelled, item.gold, item.right) for item in labels.classes}
    assert found == {"cat & co": (2, 1, 0.5), "dog": (2, 2, 0.5), "<b>fish</b>": (0, 1, None)}


def test_every_calibration_stands_beside_the_others_on_the_test_rows(reported):
    lines = [" ".join(row) for row in rows_of(reported)]
    assert "none 0.251 0.211 0.451 0.301" in lines
    assert "batch (chosen) 0.552 0.512 0.152 0.652" in lines
    nothing = " ".join(["\N{EN DASH}"] * 4)
    assert {f"contextual {nothing}", f"temperature {nothing}"} <= set(lines)


def test_rows_without_a_usable_answer_are_told_with_their_reasons(reported):
    text = page_of(reported).text
    assert "too slow (3)" in text
    assert f"{HOSTILE} (2)" in text
    assert "Of 2 rows it did not read all" in text


def test_reliability_is_drawn_before_and_after_from_the_least_confident_on(lineage):
    make_run(lineage, "labels")
    labels = read_run(lineage).labels
    assert labels is not None
    assert [bin_.position for bin_ in labels.deciles["batch"]] == [3, 8]
    drawn = draw(read_run(lineage))
    for name in ("reliability", "deciles"):
        told = [line.get_label() for line in drawn[name].figure.axes[0].lines]
        assert told[-2:] == ["before calibration", "after calibration (batch)"]
    before, after = drawn["deciles"].figure.axes[0].lines
    assert list(before.get_xdata()) == list(after.get_xdata()) == [4, 9]
    assert list(after.get_ydata()) == pytest.approx([0.3, 0.8])


def test_without_calibration_there_is_no_after(lineage):
    make_run(lineage, "labels")
    run = read_run(lineage)
    assert run.labels is not None
    plain = replace(run, labels=replace(run.labels, calibration="none"))
    told = [line.get_label() for line in draw(plain)["deciles"].figure.axes[0].lines]
    assert told == ["before calibration"]


def test_a_simulation_says_so_on_top_and_a_real_run_does_not(lineage):
    make_run(lineage, "labels")
    run, summary = read_run(lineage), write_report(lineage)
    warning = "Scripted teacher: labels mean nothing"
    assert warning not in render(run, summary, {})
    scripted = run.experiment.model_copy(update={"teacher": ScriptedTeacher()})
    page = Page(render(replace(run, experiment=scripted), summary, {}))
    assert page.text.index(warning) < page.text.index("Result")


def test_the_students_calibration_error_stands_beside_that_of_before(reported):
    lines = [" ".join(row) for row in rows_of(reported)]
    [own] = [line for line in lines if line.startswith("student, rule llkd")]
    assert "before its temperature 0.850" in own
    assert sum("before its temperature" in line for line in lines) == 1


def test_a_cascade_is_shown_with_its_curve_cost_and_what_it_did_not_reach(lineage, reported):
    assert "Student and teacher together" not in page_of(reported).text
    labelled = lineage.experiment.teacher.model_copy(
        update={"splits": ("unlabeled", "validation", "test")}
    )
    with_cascade = Lineage(lineage.experiment.model_copy(update={"teacher": labelled}))
    make_run(with_cascade)
    write_report(with_cascade)
    assert "cascade" in page_of(with_cascade).missing
    with make(with_cascade.cascade) as draft:
        write_cascade(draft)
    summary = write_report(with_cascade)
    assert summary.cascade is not None
    assert summary.cascade.threshold == 0.4
    page = page_of(with_cascade)
    assert page.missing == []
    assert "cascade.accuracy = 0.9 is not reached" in page.text
    assert "The target is not reached." in page.text
    lines = [" ".join(row) for row in rows_of(with_cascade)]
    # 0.05 USD of the student for all, and 0.4 of the teacher's 2.00.
    assert "0.400 40.0% 90.0% 0.740 yes 0.85" in lines
    assert "any 100.0% 90.0% 0.650 not measurably 2.05" in lines
    assert any(line.startswith("test 30 37.5% 10.0%") for line in lines)
    drawn = draw(read_run(with_cascade))["cascade"].figure
    told = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert {"student alone", "teacher alone", "chosen", "chosen, test rows"} <= set(told)
    assert (with_cascade.run / "plots/cascade.png").is_file()


def test_every_endpoint_has_its_column_with_intervals_and_failed_requests(reported):
    rows = {cells[0]: cells[1:] for cells in rows_of(reported) if cells}
    assert rows["64 texts in one request"] == [
        '10 s <br><span class="soft">8 to 12</span>',
        '0.25 s <br><span class="soft">0.2 to 0.3</span>',
        '0.5 s <br><span class="soft">0.4 to 0.6</span>',
        "40x faster",
    ]
    assert rows["Requests/s at random, 95 % within 500 ms"] == ["2", "80", "40", "40x"]
    assert rows["Failed requests"] == ["3 of 20"] * 3 + [""]
    assert "peer-1" in page_of(reported).text


def test_plots_are_written_and_not_blank(reported):
    files = sorted((reported.run / "plots").iterdir())
    assert [file.stem for file in files] == [
        "accuracy", "cost", "deciles", "kept", "latency", "purity", "rates", "reliability",
        "thresholds",
    ]  # fmt: skip
    for file in files:
        pixels = np.asarray(Image.open(io.BytesIO(file.read_bytes())).convert("RGB"))
        assert pixels.shape[1] > 600
        drawn = (pixels != 255).any(axis=2)
        assert 0.01 < drawn.mean() < 0.9, file
        coloured = np.ptp(pixels.astype(int), axis=2) > 40
        assert coloured.mean() > 0.001, file


def test_a_corpus_without_gold_is_reported_without_what_needs_gold(lineage):
    for artifact, writer in (
        (lineage.corpus, write_corpus),
        (lineage.labels, write_labels),
        (lineage.student(), write_student),
    ):
        with make(artifact) as draft:
            writer(draft, gold=False)
    with make(lineage.readouts) as draft:
        write_readouts(draft)
    summary = write_report(lineage)
    assert summary.labels is not None
    assert summary.labels.accuracy is None
    drawn = {file.stem for file in (lineage.run / "plots").iterdir()}
    assert drawn == {"thresholds", "kept"}
    labels = read_run(lineage).labels
    assert labels is not None
    assert all(item.gold is None and item.right is None for item in labels.classes)
    assert "under each calibration" not in page_of(lineage).text


def test_a_rule_without_thresholds_has_no_plot_of_them(lineage):
    make_run(lineage, "labels")
    with make(lineage.student()) as draft:
        write_student(draft, thresholds=False)
    write_report(lineage)
    drawn = {file.stem for file in (lineage.run / "plots").iterdir()}
    assert drawn == {"accuracy", "deciles", "kept", "purity", "reliability"}


def test_a_guided_student_is_reported_as_the_experiments_own(lineage):
    serve = lineage.experiment.serve.model_copy(update={"student": "guided"})
    guided = Lineage(lineage.experiment.model_copy(update={"serve": serve}))
    make_run(guided, "labels")
    with make(guided.guided) as draft:
        write_student(draft)
        draft.details["best_round"] = 3
    summary = write_report(guided)
    assert summary.student is not None
    assert summary.student.rule == "guided"
    assert "guide" in summary.seconds
    text = page_of(guided).text
    assert "Round 3 of jobs/guide.py" in text
    assert "student, guided" in text


def test_a_report_is_made_anew_and_drops_what_is_no_longer_true(lineage):
    make_run(lineage)
    write_report(lineage)
    faster = lineage.experiment.model_copy(
        update={"bench": lineage.experiment.bench.model_copy(update={"single_requests": 7})}
    )
    summary = write_report(Lineage(faster))
    assert summary.bench is None
    assert not (lineage.run / "plots/latency.png").exists()
    page = page_of(lineage)
    assert f"there is {lineage.bench.fingerprint}, made from other settings" in page.text


def test_plots_hold_for_many_classes_and_epochs():
    labels = [f"a class with quite a long name, number {position}" for position in range(77)]
    rows = [
        {**row, "epoch": epoch, "label": label, "rows": 5 + position}
        for epoch in range(1, 31)
        for position, label in enumerate(labels)
        for row in audit_rows()[:1]
    ]
    audit = pa.Table.from_pylist(rows, schema.AUDIT)
    assert len(plots.thresholds(audit).legends[0].get_texts()) == 8
    labelled = [text.get_text() for text in plots.kept(audit).axes[0].get_yticklabels()]
    assert len(labelled) == 20
    assert max(map(len, labelled)) <= 24
    assert plots.purity(audit).get_size_inches()[1] < 12


def test_thresholds_are_drawn_under_what_they_are_thresholds_of():
    def titles(*epochs):
        rows = [
            {"epoch": epoch, "label": label, "rows": 9, "kept": 3, **of}
            for epoch, of in enumerate(epochs, start=1)
            for label in LABELS
        ]
        return [
            axes.get_title(loc="left")
            for axes in plots.thresholds(pa.Table.from_pylist(rows, schema.AUDIT)).axes
        ]

    [one] = titles({"probability_threshold": 0.6}, {"probability_threshold": 0.7})
    assert "its probability of a class" in one
    first, both = titles({"teacher_threshold": 0.7}, {"joint_threshold": 0.5})
    assert first.startswith("Teacher")
    assert both.startswith("Both")


def test_purity_over_classes_is_weighted_by_rows():
    rows = [
        {"epoch": 1, "label": "a", "rows": 90, "kept": 10, "purity_kept": 1.0, "purity_all": 0.5},
        {"epoch": 1, "label": "b", "rows": 10, "kept": 0, "purity_kept": None, "purity_all": 1.0},
    ]
    kept, everything = plots.purity(pa.Table.from_pylist(rows, schema.AUDIT)).axes[0].lines
    assert list(kept.get_ydata()) == pytest.approx([1.0])
    assert list(everything.get_ydata()) == pytest.approx([0.55])


def test_result_lines_put_teacher_and_student_side_by_side(lineage):
    make_run(lineage)
    lines = [line.split() for line in result_lines(write_report(lineage))]
    assert lines[0] == ["teacher", "student", "gain"]
    assert lines[1] == ["accuracy", "0.500", "0.750", "1.50x"]
    assert lines[3] == ["latency", "p50", "400", "ms", "10", "ms", "40x"]
    assert lines[5] == ["throughput", "10", "texts/s", "400", "texts/s", "40x"]


def test_result_lines_leave_dashes_for_what_is_not_measured(lineage):
    make_run(lineage, "corpus")
    for line in result_lines(write_report(lineage))[1:]:
        assert line.split()[-3:] == ["-", "-", "-"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.04544, "0.0454"),
        (9.9, "9.9"),
        (61.26, "61.3"),
        (1422.4, "1,422"),
        (3e-6, "0.000003"),
    ],
)
def test_numbers_are_readable(number, text):
    assert readable(number) == text


def test_the_job_prints_the_reports_path_last(tmp_path):
    experiment = tmp_path / "trial.toml"
    (tmp_path / "corpus.csv").write_text("text,label\na,dog\n")
    experiment.write_text(
        f'name = "trial"\nruns = "{tmp_path}/runs"\n'
        '[task]\nlabels = [{ name = "cat" }, { name = "dog" }]\n'
        f'[corpus]\nsource = "{tmp_path}/corpus.csv"\n'
        '[teacher]\nmodel = "example/teacher"\n[student]\nmodel = "example/student"\n'
    )
    failed = run_job("report", str(experiment))
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert "jobs/prepare.py" in failed.stderr
    assert run_job("prepare", str(experiment)).returncode == 0
    done = run_job("report", str(experiment))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "runs/trial/report.html")
    assert (tmp_path / "runs/trial/summary.json").is_file()
