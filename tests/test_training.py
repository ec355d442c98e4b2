"""The training loop in real processes: any number of workers, any kill, the same result."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_workers import changed, kept_rows, run_workers, signals_of, without_seconds

from llkd_ray.config import (
    AllRule,
    ConfidentLearningRule,
    EncoderStudent,
    FixedRule,
    FlexMatchRule,
    FreeMatchRule,
    GoldRule,
    JointRule,
    LLKDRule,
    RandomRule,
    TopFractionRule,
    TrainSection,
)
from llkd_ray.errors import ConfigError
from llkd_ray.student.checkpoint import STUDENT
from llkd_ray.student.model import load_student, load_untrained
from llkd_ray.student.step import learning_rate
from llkd_ray.student.stopping import best_of, should_stop
from llkd_ray.student.temperature import Temperature, set_temperature
from llkd_ray.student.train import _check_criterion, drop_broken_run


def test_the_learning_rate_rises_then_falls_to_zero():
    section = TrainSection(learning_rate=1.0, warmup_fraction=0.2)
    rates = [learning_rate(section, done) for done in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])


def numbers(row):
    return {key: value or 0.0 for key, value in row.items() if key != "label"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "others"),
    [
        (LLKDRule(), (2, 4)),
        (LLKDRule(cadence="step", student_decay=0.5), (4,)),
        (JointRule(), (2,)),
    ],
    ids=["llkd", "llkd-step", "joint"],
)
def test_one_two_and_four_workers_keep_the_same_rows(tmp_path, work, rule, others):
    work = changed(work, rule=rule, epochs=3, num_workers=4, class_balanced=True)
    one = run_workers(tmp_path / "1", work, 1)
    assert {len(kept_rows(tmp_path / "1", epoch)) for epoch in (1, 2, 3)} - {0, 120}
    for workers in others:
        out = tmp_path / str(workers)
        many = run_workers(out, work, workers)
        for epoch in (1, 2, 3):
            assert kept_rows(out, epoch) == kept_rows(tmp_path / "1", epoch)
        # Sums of gradients and padding differ in the last digits of a float32.
        for mine, theirs in zip(one.audit, many.audit, strict=True):
            assert numbers(mine) == pytest.approx(numbers(theirs), rel=1e-3)
        for mine, theirs in zip(one.epochs, many.epochs, strict=True):
            assert mine["kept"] == theirs["kept"]
            assert (mine["loss"] or 0) == pytest.approx(theirs["loss"] or 0, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_takes_the_same_steps(tmp_path, work, one_worker, stage):
    out, one = one_worker
    assert work.train.zero_stage == 0
    two = run_workers(tmp_path, changed(work, zero_stage=stage), 2)
    assert kept_rows(out, 2) == kept_rows(tmp_path, 2)
    assert [row["loss"] for row in one.epochs] == pytest.approx(
        [row["loss"] for row in two.epochs], rel=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed_at", "settings"),
    [
        ("epoch-0001", {}),
        ("epoch-0002-step-000002", {"checkpoint_steps": 2, "average_decay": 0.9}),
        # A threshold that moves slowly: steps that keep no row are none of the average.
        (
            "epoch-0002-step-000004",
            {
                "checkpoint_steps": 4,
                "average_decay": 0.9,
                "rule": LLKDRule(cadence="step", student_decay=0.6),
            },
        ),
        ("epoch-0002", {"scoring_every": 2, "scoring_parts": 2}),
    ],
    ids=["epoch", "average", "stepwise", "rotating"],
)
def test_a_run_killed_anywhere_goes_on_as_if_unbroken(tmp_path, work, killed_at, settings):
    work = changed(work, epochs=3, dropout=0.2, **settings)
    unbroken = run_workers(tmp_path / "unbroken", work, 2)
    broken = tmp_path / "broken"
    run_workers(broken, work, 2, killed_at=killed_at)
    resumed = run_workers(broken, work, 2, restored=broken / killed_at)
    # The same numbers in the same order: not a tolerance, the same bits.
    assert resumed.audit == unbroken.audit
    assert without_seconds(resumed.epochs) == without_seconds(unbroken.epochs)
    assert resumed.selection == unbroken.selection
    for epoch in (1, 2, 3):
        assert signals_of(broken, epoch) == signals_of(tmp_path / "unbroken", epoch)
    weights = "epoch-0003/student/model.safetensors"
    assert (broken / weights).read_bytes() == (tmp_path / "unbroken" / weights).read_bytes()


@pytest.mark.slow
def test_another_number_of_workers_can_go_on(tmp_path, work):
    work = changed(work, epochs=3, num_workers=(1, 2), zero_stage=0)
    unbroken = run_workers(tmp_path / "two", work, 2)
    run_workers(tmp_path / "one", work, 2, killed_at="epoch-0001")
    # One of two workers may be lost when both have told how the next epoch begins.
    signals = tmp_path / "one/signals"
    shutil.copy(
        next(signals.glob("epoch-0001-00001-*")), signals / "epoch-0002-00001-of-00002.parquet"
    )
    resumed = run_workers(tmp_path / "one", work, 1, restored=tmp_path / "one/epoch-0001")
    assert [path.name for path in signals.glob("epoch-0002-*")] == [
        "epoch-0002-00000-of-00001.parquet"
    ]
    assert [row["kept"] for row in resumed.epochs] == [row["kept"] for row in unbroken.epochs]
    assert [row["distinct_rows"] for row in resumed.epochs] == [
        row["distinct_rows"] for row in unbroken.epochs
    ]
    assert [row["loss"] for row in resumed.epochs] == pytest.approx(
        [row["loss"] for row in unbroken.epochs], rel=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("head", ["own", "mean"])
def test_a_student_goes_on_from_a_trained_one(tmp_path, work, head):
    """At a rate of nothing it stays what it was, head and all; a fresh one is another."""
    student = work.student.model_copy(update={"head": head})
    taught = changed(replace(work, student=student), rule=AllRule(), epochs=1)
    run_workers(tmp_path / "first", taught, 1)
    trained = tmp_path / "first/epoch-0001" / STUDENT
    # As it is exported.
    start = shutil.copytree(trained, tmp_path / "exported")
    set_temperature(start, Temperature(1.5, "gold", 40))
    still = changed(taught, epochs=1, learning_rate=1e-12, weight_decay=0.0)
    weights = {"first": load_student(trained)[0].state_dict()}
    for name, further in (("last", replace(still, start=start)), ("fresh", still)):
        run_workers(tmp_path / name, further, 1)
        folder = tmp_path / name / "epoch-0001" / STUDENT
        weights[name] = load_student(folder)[0].state_dict()
        set_temperature(folder, Temperature(0.8, "gold", 40))  # It has none yet.
    heads = [key for key in weights["first"] if key.startswith(("classifier", "head"))]
    assert heads
    for key, value in weights["first"].items():
        assert torch.allclose(weights["last"][key], value, atol=1e-6), key
    assert not all(torch.allclose(weights["fresh"][key], weights["first"][key]) for key in heads)


@pytest.mark.slow
def test_of_a_trained_classifier_the_encoder_counts_and_its_head_is_drawn_anew(tmp_path, work):
    run_workers(tmp_path / "first", changed(work, rule=AllRule(), epochs=1), 1)
    folder = tmp_path / "first/epoch-0001" / STUDENT
    set_temperature(folder, Temperature(1.5, "gold", 40))
    trained = dict(load_student(folder)[0].named_parameters())
    for names in (work.label_names, ("yes", "no")):
        section = EncoderStudent(model=str(folder), dropout=0.0)
        drawn, again, other = (
            dict(load_untrained(section, names, seed=seed).named_parameters()) for seed in (0, 0, 1)
        )
        for key, weight in drawn.items():
            assert torch.equal(weight, again[key]), key
            if key.startswith("bert."):
                assert torch.equal(weight, trained[key]), key
        assert drawn["classifier.weight"].shape[0] == len(names)
        assert not torch.equal(drawn["classifier.weight"], other["classifier.weight"])
        assert drawn["classifier.weight"].shape != trained["classifier.weight"].shape or (
            not torch.equal(drawn["classifier.weight"], trained["classifier.weight"])
        )


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_training(tmp_path, work):
    with pytest.raises(AssertionError):
        run_workers(tmp_path, changed(work, rule=AllRule(), learning_rate=1e25), 1)
    assert "lower train.learning_rate (now 1e+25)" in (tmp_path / "error-0").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("cadence", ["epoch", "step"])
def test_rows_that_no_step_is_left_for_were_not_used(tmp_path, work, cadence):
    short = changed(work, rule=LLKDRule(cadence=cadence, teacher_decay=0.0), steps=9)
    progress = run_workers(tmp_path, short, 2)
    before = 0
    for row in progress.epochs:
        taken = row["row_steps"] - before
        assert row["distinct_rows"] <= row["row_steps"]
        assert cadence == "epoch" or row["kept"] == taken
        assert row["kept"] >= taken
        before = row["row_steps"]
    assert progress.epochs[-1]["steps"] == 9
    used = sum(row["used"] for row in progress.audit if row["epoch"] == progress.epoch)
    assert used == progress.epochs[-1]["distinct_rows"]


@pytest.mark.slow
def test_rule_all_keeps_every_row_every_epoch_and_never_scores(tmp_path, work):
    from dataclasses import replace

    progress = run_workers(tmp_path, replace(changed(work, rule=AllRule()), validation=None), 2)
    assert progress.steps == 2 * -(-120 // 16)
    assert progress.row_steps == 2 * 120
    assert progress.epochs[-1]["distinct_rows"] == 120
    assert all(row["scoring_s"] < 0.01 for row in progress.epochs)
    assert all(row["validation_macro_f1"] is None for row in progress.epochs)
    assert all(row["score"] is None for row in progress.epochs)
    for row in progress.audit:
        assert row["uncertainty_kept"] is None
        assert row["teacher_threshold"] is None
        assert row["purity_kept"] == row["purity_all"]
    assert progress.epochs[1]["loss"] < progress.epochs[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [RandomRule(fraction=0.5), TopFractionRule(), FreeMatchRule(decay=0.5), FlexMatchRule(),
     ConfidentLearningRule(), GoldRule()],
    ids=lambda rule: rule.rule,
)  # fmt: skip
def test_every_rule_trains_for_the_steps_it_is_given(tmp_path, work, rule):
    progress = run_workers(tmp_path, changed(work, rule=rule, steps=5, accumulation=2), 1)
    assert progress.steps == 5
    assert progress.epochs[-1]["steps"] == 5
    assert all(np.isfinite(row["loss"]) for row in progress.epochs if row["kept"])
    if rule.rule == "gold":
        assert progress.epochs[0]["kept"] == 120


@pytest.mark.slow
def test_a_rule_that_keeps_nothing_for_ever_is_told(tmp_path, work):
    nothing = FixedRule(teacher_threshold=1.0, student_threshold=1.0)
    with pytest.raises(AssertionError):
        run_workers(tmp_path, changed(work, rule=nothing, steps=5), 1)
    assert "kept no row in 20 epochs" in (tmp_path / "error-0").read_text()
    assert len(list(tmp_path.glob("epoch-*"))) == 20


@pytest.mark.slow
def test_training_ends_where_a_rule_keeps_no_row_any_more(tmp_path, work):
    while_unsure = FixedRule(teacher_threshold=0.0, student_threshold=0.97)
    work = changed(work, rule=while_unsure, steps=10_000, learning_rate=2e-3)
    progress = run_workers(tmp_path, work, 1)
    kept = [row["kept"] for row in progress.epochs]
    assert kept[0] > 0
    assert kept[-20:] == [0] * 20
    assert 0 < progress.steps < 10_000


@pytest.mark.slow
def test_without_gold_the_teachers_surest_held_out_labels_choose_the_epoch(tmp_path, work):
    from dataclasses import replace

    stopping = {"held_out_fraction": 0.2, "patience": 1}
    work = replace(changed(work, epochs=8, stopping=stopping), validation=None)
    progress = run_workers(tmp_path, work, 2)
    held_out = 120 - progress.epochs[0]["rows"]
    assert 12 <= held_out <= 36
    scores = [row["score"] for row in progress.epochs]
    assert scores == [row["held_out_macro_f1"] for row in progress.epochs]
    assert progress.epoch == 8 or max(scores[:-1]) >= scores[-1]


@pytest.mark.slow
def test_training_stops_when_its_score_has_not_risen_for_the_patience(tmp_path, work):
    still = changed(work, epochs=8, learning_rate=1e-12, stopping={"patience": 2})
    progress = run_workers(tmp_path, still, 1)
    assert len({row["score"] for row in progress.epochs}) == 1
    assert progress.epoch == 3


@pytest.mark.slow
def test_soft_targets_change_the_loss_and_train(tmp_path, work):
    work = changed(work, rule=AllRule(), learning_rate=1e-3)
    hard = run_workers(tmp_path / "hard", work, 1)
    soft = run_workers(tmp_path / "soft", changed(work, soft_targets=0.5, temperature=2.0), 1)
    assert soft.epochs[0]["loss"] != pytest.approx(hard.epochs[0]["loss"], rel=1e-3)
    assert soft.epochs[1]["loss"] < soft.epochs[0]["loss"]


def test_of_equal_scores_the_last_is_the_best_and_patience_counts_from_the_first():
    scores = [0.6, 0.7, 0.7, None, 0.7, 0.5]
    assert best_of(scores) == 4
    assert best_of([None] * 3) == 2
    assert best_of([0.0, None, 0.0]) == 2
    epochs = [{"score": score} for score in scores]
    assert should_stop(epochs, 4)
    assert not should_stop(epochs, 5)


def test_patience_where_nothing_is_scored_is_refused():
    for by, has_gold in (("last", True), ("auto", False)):
        section = TrainSection.model_validate({"stopping": {"patience": 2, "choose_by": by}})
        with pytest.raises(ConfigError, match="patience = 2: nothing is scored"):
            _check_criterion(section, has_gold=has_gold)
    _check_criterion(TrainSection(stopping={"patience": 2}), has_gold=True)


def test_where_nothing_is_scored_no_epoch_is_the_last():
    none = [{"score": None}] * 5
    assert not should_stop(none, 1)
    assert should_stop([{"score": 0.5}, {"score": 0.4}], 1)


@pytest.mark.slow
def test_a_share_held_out_of_so_few_rows_that_it_holds_none_ends_at_once(tmp_path, work):
    stopping = {"held_out_fraction": 1e-6, "choose_by": "teacher"}
    with pytest.raises(AssertionError):
        run_workers(tmp_path, changed(work, stopping=stopping), 1)
    assert "holds none of so few rows" in (tmp_path / "error-0").read_text()
    assert not list(tmp_path.glob("epoch-*"))


def test_a_run_whose_list_of_checkpoints_is_half_written_starts_over_and_another_stays(tmp_path):
    for name, content in (("whole", "{}"), ("half", '{"checkpoints": [')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "experiment_state_snapshot.json").write_text(content)
        drop_broken_run(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_settings_that_do_not_fit_together_are_refused():
    for settings, match in (
        ({"num_workers": 9, "batch_size": 32}, "batch_size"),
        ({"average_decay": 0.9, "zero_stage": 3}, "average_decay"),
        ({"offload": "all", "zero_stage": 2}, "offload"),
        ({"num_workers": (3, 2), "zero_stage": 0}, "fewest"),
        ({"num_workers": (1, 2), "zero_stage": 1}, "zero_stage = 0"),
    ):
        with pytest.raises(ValueError, match=match):
            TrainSection.model_validate(settings)
