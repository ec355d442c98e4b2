"""Many ways of training, side by side on the same labels."""

import json
import shutil

import numpy as np
import pytest
from conftest import QUICKSTART

from llkd_ray.artifacts import Rows, make
from llkd_ray.compare.page import as_text
from llkd_ray.compare.table import tabulate
from llkd_ray.compare.trial import Trial
from llkd_ray.compare.variants import variants_of
from llkd_ray.config import load_experiment
from llkd_ray.errors import ConfigError
from llkd_ray.lineage import Lineage
from llkd_ray.metrics import macro_f1

GOLD = np.arange(300) % 3


def trial(*errors, validation=None, held_out=None, kept=30):
    """A trial whose student is wrong on so many of the 300 rows after each epoch."""
    epochs = [
        {
            "kept": kept,
            "rows": 100,
            "steps": 4 * (at + 1),
            "row_steps": kept * (at + 1),
            "validation_macro_f1": validation and validation[at],
            "held_out_macro_f1": held_out and held_out[at],
        }
        for at in range(len(errors))
    ]
    predicted = np.stack(
        [np.where(np.arange(300) < wrong, (GOLD + 1) % 3, GOLD) for wrong in errors]
    )
    return Trial(epochs=epochs, audit=[], seconds=2.0, predicted=predicted)


def table(**trials):
    return tabulate(trials, GOLD, 3, baselines=("all", "random"), resamples=200, seed=0)


def test_each_criterion_chooses_its_own_epoch():
    one = trial(90, 30, 60, validation=[0.1, 0.2, 0.3], held_out=[0.3, 0.2, 0.1])
    by = {line.criterion: line for line in table(all=[one])}
    assert {name: line.epoch for name, line in by.items()} == {"gold": 3, "teacher": 1, "last": 3}
    assert by["gold"].accuracy == pytest.approx(0.8)
    assert {name: line.validation_macro_f1 for name, line in by.items()} == pytest.approx(
        {"gold": 0.3, "teacher": 0.1, "last": 0.3}
    )
    assert by["teacher"].accuracy == pytest.approx(0.7)
    assert by["last"].best_macro_f1 == pytest.approx(macro_f1(GOLD, one.predicted[1], 3))
    assert by["last"].rows_used_fraction == pytest.approx(0.3)
    assert by["last"].row_steps == 90
    assert by["last"].steps == 12
    [line] = table(all=[trial(1, 2)])
    assert (line.criterion, line.validation_macro_f1) == ("last", None)


def test_differences_are_paired_over_rows_and_averaged_over_seeds():
    lines = {
        line.variant: line
        for line in table(
            llkd=[trial(30), trial(42)], all=[trial(60), trial(60)], random=[trial(33)]
        )
    }
    mean = np.mean([macro_f1(GOLD, trial(wrong).predicted[0], 3) for wrong in (30, 42)])
    llkd = lines["llkd"]
    assert llkd.macro_f1 == pytest.approx(mean)
    assert llkd.macro_f1_sd > 0
    over = llkd.over["all"]
    assert over.value == pytest.approx(mean - lines["all"].macro_f1)
    assert 0 < over.low < over.value < over.high
    assert llkd.over["random"].low < 0 < llkd.over["random"].high
    assert "all" not in lines["all"].over


def test_the_table_has_the_best_first_within_each_criterion():
    lines = table(all=[trial(60)], llkd=[trial(30)])
    text = as_text(lines, {"accuracy": 0.5, "macro_f1": 0.25})
    names = [line.split()[0] for line in text.splitlines()]
    assert names == ["rule", "(teacher)", "llkd", "all"]
    assert "0.900     0.900" in text
    assert "0.900     0.900     0.700" in as_text(
        table(llkd=[trial(30, validation=[0.7])]), {"accuracy": 0.5, "macro_f1": 0.25}
    )
    assert "±" not in text  # One seed says nothing of a standard deviation.
    assert "0.850 ±0.071" in as_text(
        table(llkd=[trial(30), trial(60)]), {"accuracy": 0.5, "macro_f1": 0.25}
    )
    assert "0.250" in text


def test_variants_are_overrides_of_the_experiment():
    experiment = load_experiment(
        QUICKSTART,
        [
            "selection.teacher_decay=0.5",
            'compare.rules=["random", "llkd"]',
            'compare.variants.soft=["train.soft_targets=0.5"]',
            'compare.variants.top=["selection.rule=top-fraction"]',
        ],
    )
    variants = {variant.name: variant for variant in variants_of(experiment)}
    assert list(variants) == ["llkd", "soft", "top", "random"]
    assert variants["llkd"].experiment.selection.teacher_decay == 0.5
    assert variants["soft"].experiment.train.soft_targets == 0.5
    assert variants["soft"].experiment.selection.rule == "llkd"
    assert variants["top"].experiment.selection.rule == "top-fraction"
    assert [name for name, variant in variants.items() if variant.matched] == ["random"]
    assert all(variant.experiment.train.num_workers == 1 for variant in variants.values())


def test_lessons_of_every_variant_are_those_of_the_experiment():
    experiment = load_experiment(
        QUICKSTART,
        [
            *("train.lessons=true", 'compare.rules=["llkd", "all"]'),
            'compare.variants.fast=["train.learning_rate=1e-3", "student.layers=2"]',
            'compare.variants.raw=["calibration.kind=none"]',
            'compare.variants.none=["train.lessons=false"]',
        ],
    )
    lineage = Lineage(experiment)
    rows = {variant.name: variant.rows.labelled for variant in variants_of(experiment)}
    for name in ("llkd", "all", "fast"):
        assert rows[name].path == lineage.mixture.path
    assert rows["raw"].noun == "mixture"
    assert rows["raw"].path != lineage.mixture.path
    assert rows["none"].path == lineage.labels.path


def test_a_comparison_that_cannot_be_meant_is_refused():
    for override, match in (
        ('compare.rules=["lkld"]', "did you mean llkd"),
        ("compare.seeds=[]", "at least one seed"),
        ("compare.variants={all=[]}", "rename one"),
    ):
        with pytest.raises(ConfigError, match=match):
            load_experiment(QUICKSTART, [override])
    wrong = load_experiment(QUICKSTART, ['compare.variants={x=["train.epoch=2"]}'])
    with pytest.raises(ConfigError, match=r"train\.epochs"):
        variants_of(wrong)


@pytest.mark.slow
def test_trials_are_run_once_and_random_keeps_as_many_rows_as_llkd(
    tmp_path,
    folders,
    small_encoder,
    ray_local,  # noqa: ARG001
):
    from llkd_ray.compare.run import compare

    def lineage(*more):
        settings = [
            f"runs={tmp_path}",
            f"student.model={small_encoder}",
            "student.max_length=64",
            "train.epochs=2",
            "train.stopping.held_out_fraction=0.1",
            'compare.rules=["llkd", "random"]',
            'compare.variants={soft=["train.soft_targets=0.5"]}',
            "compare.seeds=[0]",
            "evaluate.bootstrap_resamples=50",
        ]
        return Lineage(load_experiment(QUICKSTART, [*settings, *more]))

    one = lineage()
    for artifact, content in zip((one.labels, one.corpus), folders, strict=True):
        with make(artifact) as draft:
            shutil.copytree(content, draft.folder, dirs_exist_ok=True)
            draft.rows = Rows(taken=1, kept=1, rejected=0)
    first = compare(one, out_of(tmp_path, "one"))
    assert first.test_rows == 60
    assert len(first.lines) == 3 * 3
    trials = {path: path.stat().st_mtime_ns for path in one.run.glob("trials/*.json")}
    assert len(trials) == 3
    kept = [[row["kept"] for row in json.loads(path.read_text())["epochs"]] for path in trials]
    # llkd and soft choose by students that differ; random keeps as many as llkd.
    assert len({tuple(of) for of in kept}) < len(kept)
    assert "<svg" in (tmp_path / "one/curves.svg").read_text()

    killed = next(iter(trials))
    killed.unlink()
    grown = compare(lineage("compare.seeds=[0, 1]"), out_of(tmp_path, "two"))
    for path, made in trials.items():
        assert (path.stat().st_mtime_ns == made) == (path != killed)
    assert {line.seeds for line in grown.lines} == {2}
    again = compare(one, out_of(tmp_path, "three"))
    for ours, theirs in zip(first.lines, again.lines, strict=True):
        assert vars(ours) | {"seconds": 0} == vars(theirs) | {"seconds": 0}


def out_of(folder, name):
    (folder / name).mkdir()
    return folder / name
