"""The cascade: its curve against a plain count, its choice, and who answers what."""

import asyncio
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import QUICKSTART, Run, run_job
from pydantic import ValidationError
from training_data import NAMES, make_split_folders
from untrained import untrained_student

from llkd_ray import schema
from llkd_ray.artifacts import Rows, make
from llkd_ray.config import CascadeSection, EncoderStudent, EvaluateSection, load_experiment
from llkd_ray.errors import ArtifactError, ConfigError
from llkd_ray.lineage import Lineage
from llkd_ray.serving.cascade import CascadeClassifier, Handover
from llkd_ray.serving.curve import EVERYTHING, Answers, choose, trace
from llkd_ray.serving.protocol import Classification, Refusal
from llkd_ray.serving.targets import application_of
from llkd_ray.serving.teacher import served_calibration
from llkd_ray.serving.tradeoff import measure
from llkd_ray.student.model import load_tokenizer, load_untrained
from llkd_ray.student.train import MODEL
from llkd_ray.teacher.calibration import Calibration, write_calibrations


def models(rows, *, teacher_right, seed=0):
    """A calibrated student, and a teacher that is right as often wherever it is asked."""
    rng = np.random.default_rng(seed)
    confidence = np.round(rng.uniform(0.2, 1.0, rows), 2)  # Rounded, so that some are equal.
    student = Answers(rng.random(rows) < confidence, confidence)
    return student, Answers(rng.random(rows) < teacher_right, rng.uniform(0.2, 1.0, rows))


@pytest.mark.parametrize("abstain_below", [0.0, 0.45])
def test_the_curve_is_what_counting_row_by_row_gives(abstain_below):
    student, teacher = models(300, teacher_right=0.8)
    curve = trace(student, teacher, abstain_below)
    assert curve.threshold[0] == curve.teacher_fraction[0] == 0
    assert (curve.threshold[-1], curve.teacher_fraction[-1]) == (EVERYTHING, 1)
    assert len(curve.threshold) == len(set(student.confidence)) + 1
    for at, threshold in enumerate(curve.threshold):
        asked = answered = right = mended = spoilt = 0
        for row in range(300):
            asks = student.confidence[row] < threshold
            by = teacher if asks else student
            asked += asks
            mended += by.right[row] and not student.right[row]
            spoilt += student.right[row] and not by.right[row]
            if by.confidence[row] < abstain_below:
                by = student
            answered += by.confidence[row] >= abstain_below
            right += by.confidence[row] >= abstain_below and by.right[row]
        assert curve.teacher_fraction[at] == pytest.approx(asked / 300)
        assert curve.answered_fraction[at] == pytest.approx(answered / 300)
        assert curve.accuracy[at] == pytest.approx(right / answered)
        surely = mended > spoilt and (mended - spoilt - 1) ** 2 / (mended + spoilt) >= 2.8**2
        assert curve.helps[at] == surely


def test_a_teacher_that_is_better_where_the_student_is_unsure_is_asked_there():
    student, teacher = models(4000, teacher_right=0.7)
    curve = trace(student, teacher, 0.0)
    best = choose(curve, CascadeSection())
    # The student is right less often than the teacher below a confidence of 0.7.
    assert best.threshold == pytest.approx(0.7, abs=0.06)
    assert curve.accuracy[best.position] == curve.accuracy.max()

    few = choose(curve, CascadeSection(max_teacher_fraction=0.2))
    assert 0.17 < curve.teacher_fraction[few.position] <= 0.2
    assert few.reached
    assert choose(curve, CascadeSection(max_teacher_fraction=0.0)).threshold == 0

    alone, most = curve.accuracy[0], curve.accuracy.max()
    target = float((alone + most) / 2)
    enough = choose(curve, CascadeSection(accuracy=target))
    assert enough.reached
    assert curve.accuracy[enough.position] >= target
    cheaper = curve.helps & (curve.teacher_fraction < curve.teacher_fraction[enough.position])
    assert (curve.accuracy[cheaper] < target).all()
    assert "fewest texts" in enough.reason

    beyond = choose(curve, CascadeSection(accuracy=float(most) + 0.01))
    assert not beyond.reached
    assert beyond.position == best.position
    assert "is not reached" in beyond.reason
    easy = choose(curve, CascadeSection(accuracy=float(alone) - 0.01))
    assert (easy.threshold, easy.reached) == (0, True)
    assert "student alone reaches" in easy.reason


@pytest.mark.parametrize("target", [{}, {"accuracy": 0.9}, {"max_teacher_fraction": 0.3}])
def test_a_teacher_that_is_no_better_is_asked_about_nothing_and_the_reason_says_so(target):
    chosen = [
        choose(trace(*models(500, teacher_right=0.25, seed=seed), 0.0), CascadeSection(**target))
        for seed in range(20)
    ]
    assert sum(choice.threshold == 0 for choice in chosen) >= 18  # Chance is not shut out.
    choice = chosen[0]
    assert choice.threshold == 0
    assert "teacher is not asked, since on no share of the rows" in choice.reason
    assert choice.reached == ("accuracy" not in target)


def test_a_few_lucky_rows_do_not_choose_the_threshold():
    confidence = np.linspace(0.3, 0.99, 200)
    student = Answers(np.ones(200, bool), confidence)
    student.right[:3] = False
    teacher = Answers(np.zeros(200, bool), confidence)
    teacher.right[:3] = True
    curve = trace(student, teacher, 0.0)
    assert curve.accuracy.max() == 1.0
    assert choose(curve, CascadeSection()).threshold == 0


def test_a_teacher_that_is_no_better_helps_at_no_threshold():
    rng = np.random.default_rng(0)
    helped = 0
    for _ in range(300):
        # Each is right where the other is wrong on three of ten rows, on whichever side.
        right = np.where(rng.random(500) < 0.3, rng.random(500) < 0.5, 2)
        student, teacher = (
            Answers(np.where(right == 2, True, right == of).astype(bool), np.linspace(0.2, 1, 500))
            for of in (0, 1)
        )
        helped += trace(student, teacher, 0.0).helps.any()
    assert helped <= 15


def test_withheld_answers_do_not_count_as_wrong():
    student, teacher = models(2000, teacher_right=0.5)
    every, withheld = trace(student, teacher, 0.0), trace(student, teacher, 0.6)
    assert (every.answered_fraction == 1).all()
    assert withheld.answered_fraction[0] == pytest.approx((student.confidence >= 0.6).mean())
    assert withheld.accuracy[0] > every.accuracy[0]
    np.testing.assert_array_equal(withheld.helps, every.helps)


def test_a_teacher_that_is_hardly_ever_sure_does_not_win_by_withholding_answers():
    rng = np.random.default_rng(0)
    student = Answers(rng.random(2000) < 0.85, rng.uniform(0.75, 1.0, 2000))
    flat = np.where(rng.random(2000) < 0.05, 0.9, 0.5)
    teacher = Answers(student.right | (rng.random(2000) < 0.4), flat)
    curve = trace(student, teacher, 0.75)
    assert (curve.answered_fraction == 1).all()
    position = choose(curve, CascadeSection(abstain_below=0.75)).position
    assert curve.accuracy[position] >= curve.accuracy[0]


def test_without_a_target_the_most_right_answers_count():
    # Both withhold on the rows where neither is sure; the teacher is right more often.
    student, teacher = models(2000, teacher_right=0.9)
    curve = trace(student, teacher, 0.6)
    position = choose(curve, CascadeSection(abstain_below=0.6)).position
    rightly = curve.accuracy * curve.answered_fraction
    able = curve.helps | (curve.teacher_fraction == 0)
    assert rightly[position] == rightly[able].max()


def test_one_row_and_equal_rows_have_a_curve():
    one = Answers(np.array([True]), np.array([1.0]))
    assert trace(one, one, 0.0).threshold.tolist() == [0, EVERYTHING]
    assert trace(one, one, 1.1).accuracy.tolist() == [0, 0]
    same = Answers(np.ones(5, bool), np.full(5, 0.5))
    assert trace(same, same, 0.0).teacher_fraction.tolist() == [0, 1]


STUDENT = np.array([[0.9, 0.1], [0.6, 0.4], [0.55, 0.45], [0.3, 0.7]])


class Student:
    def __init__(self):
        self.closed = False

    async def classify(self, texts):
        return Classification(STUDENT[: len(texts)])

    def check_health(self):
        pass

    async def close(self):
        self.closed = True


def test_the_unsure_texts_go_to_the_teacher_in_one_call_and_the_answer_says_who_gave_it():
    calls = []

    async def ask(texts):
        calls.append(texts)
        return np.array([[0.2, 0.8], [np.nan, np.nan]])

    cascade = CascadeClassifier(Student(), ask, Handover(threshold=0.65, abstain_below=0.0))
    found = asyncio.run(cascade.classify(["a", "b", "c", "d"]))
    assert calls == [["b", "c"]]
    assert found.by == ["student", "teacher", "student", "student"]
    assert found.probabilities.tolist() == [[0.9, 0.1], [0.2, 0.8], [0.55, 0.45], [0.3, 0.7]]


def test_nobody_answers_where_nobody_is_sure():
    async def ask(_texts):
        return np.array([[0.42, 0.58], [0.1, 0.9]])

    cascade = CascadeClassifier(Student(), ask, Handover(threshold=0.65, abstain_below=0.8))
    found = asyncio.run(cascade.classify(["a", "b", "c", "d"]))
    assert found.by == ["student", None, "teacher", None]


def test_the_students_answer_stands_where_the_teachers_would_be_withheld():
    async def ask(_texts):
        return np.array([[0.45, 0.55], [np.nan, np.nan]])

    cascade = CascadeClassifier(Student(), ask, Handover(threshold=0.65, abstain_below=0.58))
    found = asyncio.run(cascade.classify(["a", "b", "c", "d"]))
    assert found.by == ["student", "student", None, "student"]
    assert found.probabilities.tolist() == STUDENT.tolist()


def test_a_teacher_that_need_not_be_asked_is_not_asked_and_one_that_cannot_be_is_a_refusal():
    async def ask(_texts):
        raise Refusal(429, "too many texts wait for the teacher")

    alone = CascadeClassifier(Student(), ask, Handover(threshold=0.5, abstain_below=0.0))
    assert asyncio.run(alone.classify(["a", "b"])).by == ["student"] * 2
    asking = CascadeClassifier(Student(), ask, Handover(threshold=0.65, abstain_below=0.0))
    with pytest.raises(Refusal):
        asyncio.run(asking.classify(["a", "b"]))
    asyncio.run(asking.close())


def test_there_is_one_target_and_it_needs_the_teachers_answers_about_validation_rows():
    with pytest.raises(ValidationError, match="two targets"):
        CascadeSection(accuracy=0.9, max_teacher_fraction=0.1)
    labelled = 'teacher.splits=["unlabeled", "validation", "test"]'
    benched = 'bench.targets=["teacher", "student", "cascade"]'
    for wanted in ("serve.target=cascade", "cascade.accuracy=0.9", benched):
        with pytest.raises(ConfigError, match=r"set teacher\.splits"):
            load_experiment(QUICKSTART, ["teacher.splits=['unlabeled', 'test']", wanted])
        load_experiment(QUICKSTART, [labelled, wanted])


def test_what_is_benched_follows_the_cascade_where_it_is_measured_and_only_there():
    def bench(*overrides):
        splits = 'teacher.splits=["unlabeled", "validation", "test"]'
        return Lineage(load_experiment(QUICKSTART, [splits, *overrides])).bench

    changes = ("cascade.accuracy=0.9", "cascade.teacher_replicas=2")
    assert {bench(change).path for change in changes} == {bench().path}
    assert "cascade" not in bench().inputs
    cascade = 'bench.targets=["teacher", "student", "cascade"]'
    other = {bench(cascade, change).path for change in changes}
    assert len(other | {bench(cascade).path}) == 3
    assert bench(cascade).inputs["cascade"] != bench(cascade, changes[0]).inputs["cascade"]


def test_the_threshold_is_measured_on_validation_rows_and_scored_on_test_rows(tmp_path):
    student = untrained_student(tmp_path / "student")
    labels, _ = make_split_folders(tmp_path, 10, 120, 90)
    settings = {
        "label_names": NAMES,
        "calibration": Calibration((0.0,) * len(NAMES)),
        "section": EvaluateSection(bootstrap_resamples=50),
        "max_length": 64,
        "batch_size": 16,
        "seed": 0,
    }
    # The student has learned nothing, so its teacher is better everywhere.
    target = CascadeSection(max_teacher_fraction=0.5)
    found = measure(labels, student, tmp_path, target=target, **settings)
    told = json.loads((tmp_path / "cascade.json").read_text())
    assert schema.CascadeSummary.model_validate(told) == found.summary
    assert (found.rows.taken, found.rows.kept) == (120, 120)
    validation, test = found.summary.validation, found.summary.test
    assert test is not None
    assert (validation.rows, test.rows) == (120, 90)
    assert 0.4 < validation.teacher_fraction <= 0.5
    curve = pq.read_table(tmp_path / "curve.parquet")
    assert curve.schema.equals(schema.CURVE)
    [chosen] = [row for row in curve.to_pylist() if row["threshold"] == found.summary.threshold]
    assert chosen["accuracy"] == pytest.approx(validation.accuracy.value)
    assert chosen["teacher_fraction"] == pytest.approx(validation.teacher_fraction)
    ends = curve.to_pylist()[0], curve.to_pylist()[-1]
    assert ends[0]["accuracy"] == pytest.approx(validation.student.value)
    assert ends[1]["accuracy"] == pytest.approx(validation.teacher.value)
    for of in (validation, test):
        assert of.student.value < of.accuracy.value < of.teacher.value
        assert of.gain.value == pytest.approx(of.accuracy.value - of.student.value)
    assert test.gain.low > 0

    for shard in (labels / "validation").iterdir():
        shard.unlink()
    with pytest.raises(ArtifactError, match=r"corpus\.gold_column"):
        measure(labels, student, tmp_path, target=target, **settings)


def test_the_evaluate_job_chooses_and_what_is_served_follows(tmp_path, small_encoder):
    overrides = [
        f"runs={tmp_path}/runs",
        'teacher.splits=["unlabeled", "validation", "test"]',
        "cascade.max_teacher_fraction=0.3",
        "calibration.kind=stacked",
        "evaluate.bootstrap_resamples=50",
        "serve.backend=torch",
        "serve.target=cascade",
    ]
    lineage = Lineage(load_experiment(QUICKSTART, overrides))
    labels, corpus = make_split_folders(tmp_path, 10, 400, 60)
    write_calibrations(labels / "calibrations.json", {"batch": Calibration((0.0,) * len(NAMES))})
    model = load_untrained(EncoderStudent(model=str(small_encoder)), NAMES, seed=0)
    for artifact, source in ((lineage.corpus, corpus), (lineage.labels, labels)):
        with make(artifact) as draft:
            shutil.copytree(source, draft.folder, dirs_exist_ok=True)
            draft.rows, draft.details = Rows(taken=0, kept=0, rejected=0), {"validation": 400}
    with make(lineage.student()) as draft:
        model.save_pretrained(draft.folder / MODEL)
        load_tokenizer(small_encoder).save_pretrained(draft.folder / MODEL)
        draft.rows = Rows(taken=0, kept=0, rejected=0)
    with pytest.raises(ArtifactError, match=r"jobs/evaluate\.py"):
        application_of("cascade", lineage, lineage.experiment.serve)
    done = run_job("evaluate", str(QUICKSTART), *overrides)
    assert done.returncode == 0, done.stderr
    assert "the cascade asks the teacher about" in done.stdout
    details = lineage.cascade.manifest().details
    assert details["threshold"] > 0

    of_guided = Run((*overrides, "serve.student=guided"))
    guided = of_guided.lineage
    with make(guided.guided) as draft:
        shutil.copytree(lineage.student().path / MODEL, draft.folder / MODEL)
        draft.rows = Rows(taken=0, kept=0, rejected=0)
    of_guided.stage("evaluate")
    assert set(guided.scores.manifest().details) == {"teacher", "teacher_uncalibrated", "guided"}
    assert guided.cascade.manifest().details["threshold"] == details["threshold"]
    assert application_of("cascade", guided, guided.experiment.serve) is not None
    # The labels are stacked; the teacher that would answer is not.
    kind, _ = served_calibration(lineage.labels.path, "stacked")
    assert kind == "batch"
    assert application_of("cascade", lineage, lineage.experiment.serve) is not None
